"""Parameters, FLOPs and time: the originals' counters, XLA's own estimate, counts by hand,
verdicts.
"""

import functools
import time

import golden_data
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st
from tiny import complains

from sparsity_jax import cost, groups, models
from sparsity_jax.models import convolutions

# Rows of the zoo in small: (options, side of the images)
SMALL = {
    "mlp": ({"widths": (8, 6)}, 8),
    "small_cnn": ({"widths": (4, 6, 6), "dense_widths": (5,), "batch_norm": True}, 9),
    "alexnet": ({"widths": (3, 4, 5, 4, 3), "dense_widths": (6, 5)}, 10),
    "vgg13": ({"width": 2, "order": "conv_relu_bn"}, 32),
    "resnet18": ({"width": 2}, 8),
    "resnet20": ({"width": 2}, 8),
    "preact_resnet18": ({"width": 2}, 8),
    "mobilenet": ({"stem_width": 3, "blocks": ((4, 1), (6, 2))}, 8),
}


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes_of(model, images):
    return jax.eval_shape(model.init, jax.random.key(0), images)


@functools.cache
def small(name):
    options, side = SMALL[name]
    model, images = models.build(name=name, num_classes=5, **options), struct(3, side, side, 3)
    return model, shapes_of(model, images), images


def xla_flops(function, *args):
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return analysis["flops"] + analysis.get("transcendentals", 0)


# Size


def test_num_params_and_bytes():
    variables = {
        "params": {"kernel": jnp.zeros((3, 4)), "bias": struct(4)},
        "batch_stats": {"mean": np.zeros(4)},
    }
    assert cost.num_params(variables) == cost.num_params(variables["params"]) == 16
    assert cost.num_bytes(variables["params"]) == 64
    assert (
        cost.num_bytes(
            {"mask": np.ones(5, bool), "half": jnp.zeros(3, jnp.bfloat16), "wide": np.zeros(2)}
        )
        == 27
    )


# FLOPs


ORIGINALS = golden_data.load("11_models.json")


@pytest.mark.parametrize(
    "key", [key for key in ORIGINALS if "flops_conv_linear_no_bias" in ORIGINALS[key]]
)
def test_multiply_adds_of_the_originals_counter(key):
    net = ORIGINALS[key]
    counter = net["flops_conv_linear_no_bias"]
    model = models.build(**golden_data.network_options(key))
    side = counter["resolution"] // (
        net.get("upsample") or 1
    )  # the network enlarges the image itself
    images = struct(1, side, side, net["input_shape"][1])
    variables = shapes_of(model, images)
    count = cost.flops(model.apply, variables, images)
    products = [equation.flops for equation in count.equations]
    with_biases = net[
        "flops_nonzero_conv_plus_linear_with_bias_G"
    ]  # of dense layers; added up in float32
    if with_biases:
        biases = sum(shape[0] for _, kind, shape, _ in net["weight_layers"] if kind == "Linear")
        assert (sum(products) + biases) / 1e9 == pytest.approx(with_biases, rel=1e-6)
    assert net.get("layer_counter_params", net["n_params"]) == cost.num_params(variables["params"])
    if "layer_counter_macs" in net:
        products_and_layers = sum(products) // 2 + work_of_layers(net, model, variables, images)
        assert products_and_layers == net["layer_counter_macs"]
    if any(details and details[2] > 1 for *_, details in net["weight_layers"]):
        # that counter divides depthwise layers by the number of groups twice
        width = lambda place: variables["params"][place.split("/")[1]]["depthwise"]["kernel"].shape[
            -1
        ]
        products = [
            flops // width(where) if where.endswith("depthwise") else flops
            for _, where, flops in count.equations
        ]
        assert sum(products) < count.products
    assert sum(products) == counter["multiply_adds_counted_twice"] == 2 * counter["macs"]
    assert not count.notes


def work_of_layers(net, model, variables, images):
    """What the original's other counter adds: a norm counts twice for each of its numbers, a listed
    ReLU or pool once.

    In these networks a norm follows each convolution, and the listed ReLUs and pools see as many
    numbers as it.
    """
    sizes, times = (
        norm_sizes(model, variables, images),
        {"BatchNorm2d": 2, "ReLU": 1, "MaxPool2d": 1},
    )
    work, place = 0, -1
    for _, kind in net["leaf_module_order"]:
        place += kind == "Conv2d"
        work += times.get(kind, 0) * sizes[min(place, len(sizes) - 1)]
    return work


def norm_sizes(model, variables, images):
    """Numbers that each norm sees, in order."""
    sizes = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, convolutions.BatchNorm):
            sizes.append(args[0].size)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda *args: model.apply(*args), variables, images)
    return sizes


@pytest.mark.parametrize("name", sorted(SMALL))
def test_equals_the_estimate_of_xla(name):
    model, variables, images = small(name)
    count = cost.flops(model.apply, variables, images, count_padding=False)
    assert count.products + count.elementwise == xla_flops(model.apply, variables, images)
    padded = cost.flops(model.apply, variables, images)
    assert padded.products >= count.products
    assert padded.elementwise == count.elementwise


def test_equations_are_named():
    model, variables, images = small("resnet18")
    count = cost.flops(model.apply, variables, images)
    assert sum(equation.flops for equation in count.equations) == count.products
    places = [equation.where for equation in count.equations]
    assert (places[0], places[-1]) == ("Network/conv1", "Network/fc")
    assert any("stage2_block0" in place and place.endswith("/shortcut_conv") for place in places)
    assert [equation.primitive for equation in count.equations].count("dot_general") == 1
    (plain,) = cost.flops(lambda x: x @ x, struct(2, 2)).equations
    assert plain.where.startswith("test_cost.py:")
    backward = cost.flops(jax.grad(lambda x: (x @ x).sum()), struct(2, 2)).equations[-1]
    assert backward.where.startswith("transpose(jvp()) test_cost.py:")


def test_convolutions_by_hand():
    def count(kernel, *, count_padding=True, window_strides=(1, 1), padding="SAME", **options):
        options |= dict(
            window_strides=window_strides,
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        function = functools.partial(jax.lax.conv_general_dilated, **options)
        return cost.flops(
            function, struct(2, 4, 4, 6), struct(*kernel), count_padding=count_padding
        ).products

    assert count((3, 3, 6, 8)) == 2 * 2 * 16 * 8 * 6 * 9
    assert (
        count((3, 3, 6, 8), count_padding=False) == 2 * 2 * 8 * 6 * 10 * 10
    )  # 3 of 3 rows meet the image, at the rims 2
    assert count((3, 3, 6, 8), window_strides=(2, 2)) == 2 * 2 * 4 * 8 * 6 * 9
    assert count((3, 3, 3, 8), feature_group_count=2) == 2 * 2 * 16 * 8 * 3 * 9
    assert count((3, 3, 1, 6), feature_group_count=6) == 2 * 2 * 16 * 6 * 9
    upsample = dict(
        lhs_dilation=(2, 2), padding=((1, 1), (1, 1))
    )  # transposed: every entry meets 2 x 2 outputs
    assert count((2, 2, 6, 8), **upsample) == 2 * 2 * 16 * 8 * 6 * 4


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.data())
def test_any_convolution_equals_xla(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    groups, kind = (
        draw(1, 3),
        data.draw(st.sampled_from(["feature_group_count", "batch_group_count"])),
    )
    of = lambda option: groups if kind == option else 1
    image = struct(
        of("batch_group_count") * draw(1, 2), draw(4, 7), draw(4, 7), of("feature_group_count") * 2
    )
    kernel = struct(draw(1, 3), draw(1, 3), 2, groups * draw(1, 3))
    options = dict(
        window_strides=(draw(1, 2), draw(1, 2)),
        padding=((draw(0, 2), draw(0, 2)), (draw(0, 2), draw(0, 2))),
        lhs_dilation=(draw(1, 2), draw(1, 3)),
        rhs_dilation=(draw(1, 2), 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **{kind: groups},
    )
    function = functools.partial(jax.lax.conv_general_dilated, **options)
    count = cost.flops(function, image, kernel, count_padding=False)
    assert count.products == xla_flops(function, image, kernel)
    assert count.elementwise == 0


def test_the_price_of_channels_counts_transposed_convolutions_as_flops_does():
    def apply(v, x):
        x = jax.lax.conv_transpose(
            x, v["up"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.lax.conv_general_dilated(
            x, v["out"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    variables, image = {"up": struct(2, 2, 3, 8), "out": struct(1, 1, 8, 2)}, struct(1, 4, 4, 3)
    channels = groups.trace(apply, variables, image)
    price = cost.of_channels(channels, "flops")
    whole = {name: np.ones(size, bool) for name, size in channels.sizes.items()}
    assert price(whole) == cost.flops(apply, variables, image).products
    half = {name: np.arange(size) < size // 2 for name, size in channels.sizes.items()}
    assert price(half) == price(whole) / 2


def test_matrix_products_by_hand():
    product = lambda text, *shapes: cost.flops(
        functools.partial(jnp.einsum, text), *(struct(*shape) for shape in shapes)
    )
    assert product("ij,jk->ik", (2, 3), (3, 5)).products == 2 * 2 * 3 * 5
    assert product("bij,bjk->bik", (7, 2, 3), (7, 3, 5)).products == 7 * 2 * 2 * 3 * 5
    assert product("abij,abkj->abik", (2, 3, 4, 5), (2, 3, 6, 5)).products == 2 * 6 * 4 * 6 * 5
    assert cost.flops(jnp.dot, struct(4), struct(4)).products == 8
    batched = cost.flops(jax.vmap(lambda x: x @ x), struct(3, 2, 2))
    assert batched.products == 3 * 16
    assert (
        cost.flops(jax.grad(lambda w, x: (x @ w).sum()), struct(3, 5), struct(2, 3)).products
        == 2 * 60
    )


def test_elementwise_work_by_hand():
    count = lambda function, *shape: cost.flops(function, struct(*shape)).elementwise
    assert count(lambda x: x * 2 + 1, 5) == 10
    assert count(jnp.sum, 4, 5) == 19
    assert count(lambda x: jnp.argmax(x, axis=1), 4, 5) == 16
    assert count(lambda x: jnp.cumsum(x, axis=1), 4, 5) == 20
    assert count(lambda x: x.T.reshape(-1)[::2], 4, 5) == 0
    assert count(lambda x: jnp.stack([jnp.tile(x, (2, 3))] * 2), 4, 5) == 0
    pool = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID")
    assert count(pool, 4, 6) == 6 * 3
    scattered = lambda x: jax.ops.segment_sum(x, np.array([0, 1, 0]), num_segments=2)
    assert count(scattered, 3) >= 3


@jax.custom_jvp
def square(x):
    return x @ x


square.defjvp(lambda primals, tangents: (square(*primals), primals[0] @ tangents[0]))


@jax.custom_vjp
def cube(x):
    return x @ x @ x


cube.defvjp(lambda x: (cube(x), x), lambda x, g: (g @ x,))

ONE = 2 * 2**3  # FLOPs of a product of 2 x 2 matrices
PROGRAMS = {
    "jit": (jax.jit(lambda x: x @ x), 1),
    "remat": (jax.checkpoint(lambda x: x @ x), 1),
    "custom_jvp": (square, 1),
    "custom_vjp": (cube, 2),
    "scan": (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0], 7),
    "nested": (
        lambda x: jax.lax.fori_loop(
            0, 3, lambda _, c: jax.lax.fori_loop(0, 4, lambda _, c: c @ x, c), x
        ),
        12,
    ),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), 2),
    "switch": (lambda x: jax.lax.switch(1, [jnp.sin, square, cube], x), 2),
    "while": (lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ x, x), 1),
    "solve": (lambda x: jax.lax.custom_linear_solve(lambda v: x @ v, x, lambda _, b: x @ b @ b), 2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_inside_programs(name):
    function, products = PROGRAMS[name]
    count = cost.flops(function, struct(2, 2))
    assert count.products == products * ONE
    assert sum(equation.flops for equation in count.equations) == count.products
    if name == "while":
        (note,) = count.notes
        assert note.startswith("while at test_cost.py:")
        assert note.endswith(": counted once")
    else:
        assert not count.notes


def test_shards_count_together():
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    function = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert cost.flops(function, struct(4, 3), struct(3, 5)).products == 2 * 4 * 3 * 5


def test_unknown_work_is_reported():
    count = cost.flops(lambda x: jnp.linalg.qr(x)[0] @ jnp.fft.fft(x).real, struct(3, 3))
    assert any(note.startswith("fft at test_cost.py:") for note in count.notes)
    assert count.products >= 2 * 27


# Time


def samples(*seconds):
    return cost.summary(seconds)


def test_summary_by_hand():
    result = samples(4.0, 1.0, 2.0, 3.0, 100.0)
    assert (result.median, result.low, result.high) == (3.0, 2.0, 4.0)
    np.testing.assert_array_equal(result.samples, [4.0, 1.0, 2.0, 3.0, 100.0])


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ((1.0, 2.0, 3.0), "faster"),
        ((10.0, 20.0, 30.0), "slower"),
        ((3.0, 5.0, 7.0), "no measurable difference"),
        ((4.0, 6.0, 8.0), "no measurable difference"),
    ],
)
def test_verdicts(second, verdict):
    first, second = samples(4.0, 6.0, 8.0), samples(*second)
    result = cost.comparison({"dense": first, "compact": second})
    assert result.verdict == verdict
    assert result.speedup == first.median / second.median
    assert result.speedup_low <= result.speedup <= result.speedup_high
    overlap = first.low <= second.high and second.low <= first.high
    assert (
        (result.speedup_low <= 1 <= result.speedup_high)
        == overlap
        == (verdict == "no measurable difference")
    )
    assert list(result.latencies) == ["dense", "compact"]


def waiting(seconds, log, name):
    """A compiled function that takes `seconds` and notes its calls."""

    def on_host(x):
        log.append(name)
        time.sleep(seconds)
        return np.asarray(x)

    return lambda x: jax.pure_callback(on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_latency():
    log = []
    result = cost.latency(waiting(0.004, log, "f"), np.zeros(2, np.float32), repeats=4)
    assert len(log) == cost.WARMUP + 4
    assert result.samples.shape == (4,)
    assert 0.004 <= result.low <= result.median <= result.high
    compiled = jax.jit(jnp.sin).lower(struct(3)).compile()
    assert cost.latency(compiled, np.ones(3, np.float32), repeats=2).median > 0


def test_comparison_alternates_and_sees_the_difference():
    log, x = [], np.zeros(2, np.float32)
    calls = {"dense": (waiting(0.02, log, "d"), (x,)), "compact": (waiting(0.0, log, "c"), (x,))}
    result = cost.compare(calls, repeats=4)
    assert "".join(log) == "d" * cost.WARMUP + "c" * cost.WARMUP + "dccd" * 2
    assert result.verdict == "faster"
    assert result.speedup > 1.5
    back = cost.compare(dict(reversed(calls.items())), repeats=2)
    assert back.verdict == "slower"


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="candidates has 1 entries; compare takes two"):
        cost.compare({"dense": (jnp.sin, (1.0,))})
    with complains(r"repeats is 1; allowed: int >= 2"):
        cost.latency(jnp.sin, 1.0, repeats=1)
