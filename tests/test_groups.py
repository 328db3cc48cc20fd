"""Channel groups: masked equals compact on the zoo, foreign networks and hostile little functions;
counts by hand.
"""

import functools

import foreign
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import jit, lax
from numpy.testing import assert_allclose, assert_array_equal
from test_models import TINY

from sparsity_jax import groups, models, trees
from sparsity_jax.channels import labels, rules

# Sizes of the groups of `TINY`, in any order. A residual sum is one group; a zero_pad shortcut
# leaves the channels it pads to a group of their own.
VGG13 = (2, 2, 4, 4, 8, 8, 16, 16, 16, 16)
CHANNELS = {
    "mlp": (8, 6),
    "fc2": (100,),
    "fc5": (8, 6, 5, 4),
    "fc12": (8,) * 11,
    "fc13": (8,) * 12,
    "mlp7": (4,) * 6,
    "small_cnn": (4, 6, 6, 5),
    "lenet": (3, 4, 6, 5),
    "lenet5": (3, 4, 5, 6),
    "cnet": (3, 4, 3, 2, 6, 5),
    "alexnet": (3, 4, 5, 4, 3, 6, 5),
    "alexnet_cifar": (5, 4, 3, 6, 5),  # without those whose neighbours normalise them
    "alexnet_bn": (3, 4, 5, 4, 3, 6, 5),
    "vgg": (4, 6, 6),
    "vgg11": (2, 4, 8, 8, 16, 16, 16, 16),
    "vgg13": VGG13,
    "vgg16": (*VGG13, 8, 16, 16),
    "vgg19": (*VGG13, 8, 8, 16, 16, 16, 16),
    "resnet": (3, 4, 6, 3, 5),  # stem, two stages, inside each block
    "resnet18": (2, 4, 8, 16) * 3,  # stages, two blocks each
    "resnet34": (2, 4, 8, 16) + (2,) * 3 + (4,) * 4 + (8,) * 6 + (16,) * 3,
    "resnet50": (2, 8, 16, 32, 64)
    + (2,) * 6
    + (4,) * 8
    + (8,) * 12
    + (16,) * 6,  # stem, stages, two in each block
    "resnet20": (2, 2, 4) + (2, 4, 8) * 3,
    "resnet56": (2, 2, 4) + (2, 4, 8) * 9,
    "preact_resnet18": (2, 4, 8, 16) * 3,
    "wrn": (16, 32, 64) * 2,  # stages, one block each
    "mobilenet": (3, 4, 6),
    "mobilenet_v2": (
        8,
        16,
        8,
        16,
        1280,
    ),  # stem and block0; expand of block1; their sum; expand of block2; last
}
# Layers of the zoo, besides `fc`, that cannot lose outputs: local response normalisation mixes
# neighbouring channels.
WHOLE = {"alexnet_cifar": ("params/conv1/kernel", "params/conv2/kernel")}
KEY = jax.random.key(0)


@functools.cache
def network(name):
    """(apply, variables, inputs) of the zoo or of `foreign`."""
    if name in foreign.FOREIGN:
        return foreign.FOREIGN[name]()
    options, side = TINY[name]
    model = models.build(name=name, num_classes=5, **options)
    images = foreign.image(size=side)
    return model.apply, foreign.filled(jax.eval_shape(model.init, KEY, images)), (images,)


@functools.cache
def traced(name):
    apply, variables, inputs = network(name)
    return groups.trace(apply, variables, *inputs)


def close(first, second, rtol=1e-5):
    """Largest difference against the largest entry of the whole tree."""
    scale = max(
        (float(np.max(np.abs(leaf), initial=0.0)) for leaf in jax.tree.leaves(first)), default=0.0
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        assert_allclose(
            np.asarray(b, np.float64), np.asarray(a, np.float64), rtol=0, atol=rtol * scale
        )


def keeps(channels, seed):
    return groups.random_keep(channels, jax.random.key(seed))


def compare(apply, variables, inputs, channels, keep, rtol=1e-5):
    small = groups.compact(variables, channels, keep)
    elastic = groups.elastic(apply, channels, keep)

    @jit
    def both(variables, small, *inputs):
        return apply(groups.mask(variables, channels, keep), *inputs), elastic(small, *inputs)

    masked, found = both(variables, small, *inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(masked))
    close(masked, found, rtol)
    return small


def members(channels):
    return {
        (member.path, member.axis): member
        for group in channels.groups.values()
        for member in group.members
    }


# Networks


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_masked_equals_compact(name):
    apply, variables, inputs = network(name)
    compare(apply, variables, inputs, traced(name), keeps(traced(name), len(name)))


@pytest.mark.parametrize("name", [*sorted(models.MODELS), *foreign.FOREIGN])
def test_channels_by_hand_and_nothing_left_out(name):
    channels = traced(name)
    expected = foreign.CHANNELS if name in foreign.CHANNELS else CHANNELS
    assert sorted(channels.sizes.values()) == sorted(expected[name])
    found = members(channels)
    frozen = {place for event in channels.frozen for place in event.members}
    for path, struct in channels.shapes.items():
        for axis, size in enumerate(struct.shape):
            if jnp.issubdtype(struct.dtype, jnp.inexact) and size > 1:
                assert (path, axis) in found or (path, axis) in frozen
    if name in models.MODELS:  # every layer but the last can lose outputs
        for path, struct in channels.shapes.items():
            if trees.is_kernel(path):
                whole = path in ("params/fc/kernel", *WHOLE.get(name, ()))
                assert ((path, len(struct.shape) - 1) in found) == (not whole)
    for event in channels.frozen:
        assert event.reason
        assert event.primitive


@pytest.mark.parametrize("name", foreign.KINDS)
def test_kinds_of_channels(name):
    channels = traced(name)
    assert tuple(group.kind for group in channels.groups.values()) == foreign.KINDS[name]
    for group in channels.groups.values():
        assert f"{group.name}: {group.size} {group.kind}\n" in groups.describe(channels)


def test_experts_are_a_kind():
    """All experts work on every example; those with a closed gate can go."""
    variables = dict(
        gate=foreign.normal(0, 5, 4),
        up=foreign.normal(1, 4, 5, 6),
        down=foreign.normal(2, 4, 6, 3),
    )

    def apply(v, x):
        h = jax.nn.relu(jnp.einsum("bi,eih->ebh", x, v["up"]))
        outs = jnp.einsum("ebh,eho->ebo", h, v["down"])
        return jnp.einsum("be,ebo->bo", jax.nn.relu(x @ v["gate"]), outs)

    channels = groups.trace(apply, variables, X)
    kinds = {group.kind: group.size for group in channels.groups.values()}
    assert kinds == {"experts": 4, "hidden units": 6}
    compare(apply, variables, (X,), channels, keeps(channels, 1))


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "groupnorm", "nnx"])
def test_scales_and_shifts_of_norms(name):
    """As their names say, which the analysis does not look at."""
    channels = traced(name)
    terms = {"scale": "scale", "bias": "shift"}
    told = 0
    for path, axis in members(channels):
        last = trees.last_name(path)
        if last in terms and len(channels.shapes[path].shape) == 1:
            assert members(channels)[path, axis].term == terms[last]
            told += 1
    assert told > 2


def compare_slopes(loss, function, variables, channels, keep):
    """The masked and the compact network have the same gradient of `loss(function)(variables)`,
    which is returned.
    """
    elastic = groups.elastic(function, channels, keep)

    @jit
    def both(variables, small):
        masked = groups.mask(variables, channels, keep)
        return jax.grad(loss(function))(masked), jax.grad(loss(elastic))(small)

    full, small = both(variables, groups.compact(variables, channels, keep))
    close(groups.compact(jax.tree.map(np.asarray, full), channels, keep), small)
    return small


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit", "lstm", "scanned", "equinox"])
def test_gradients_of_survivors(name):
    apply, variables, inputs = network(name)
    channels = traced(name)
    square = lambda apply: lambda variables: jnp.sum(apply(variables, *inputs) ** 2)
    compare_slopes(square, apply, variables, channels, keeps(channels, 5))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=5)
def test_any_keep_pattern(data):
    """Residual sums, padded shortcuts and flattened channels, down to a single channel each."""
    name = data.draw(st.sampled_from(["small_cnn", "densenet"]))
    channels = traced(name)
    keep = {
        name: np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
        for name, n in channels.sizes.items()
    }
    apply, variables, inputs = network(name)
    small = compare(apply, variables, inputs, channels, keep)
    assert trees.size(small) <= trees.size(variables)


def deep(depth):
    """A transformer of so many layers: heads split and merged, and frozen where softmax sums."""
    width, heads, shape = 12, 3, jax.ShapeDtypeStruct
    kernels = dict(qkv=shape((width, 3 * width), float), out=shape((width, width), float))

    def apply(layers, x):
        for layer in layers:
            qkv = jnp.split(foreign.rms_norm(x, 1.0) @ layer["qkv"], 3, -1)
            q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in qkv)
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
            mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
            x = x + mixed.reshape(x.shape) @ layer["out"]
        return x

    return apply, [kernels] * depth, shape((1, 5, width), float)


def test_work_is_linear_in_depth(monkeypatch):
    """Twice the layers more, twice the labels more that are looked up."""
    sizes = []
    find = labels.Labels.find

    def counted(self, entries):
        sizes.append(entries.size)
        return find(self, entries)

    monkeypatch.setattr(labels.Labels, "find", counted)
    totals = []
    for depth in (4, 8, 16):
        sizes.clear()
        assert len(groups.trace(*deep(depth)).groups) >= depth
        totals.append(sum(sizes))
    assert totals[2] - totals[1] <= 2.1 * (totals[1] - totals[0])


# What the data says


def test_members():
    channels = traced("small_cnn")
    assert channels.names == [f"params/{name}" for name in ("conv1", "conv2", "conv3", "dense1")]
    found = members(channels)
    flat = found["params/dense1/kernel", 0]  # one pixel of six channels
    assert flat.role == "consumer"
    assert_array_equal(flat.index, np.arange(6)[:, None])
    producer = found["params/conv3/kernel", 3]
    assert producer.role == "producer"
    assert_array_equal(producer.index, np.arange(6)[:, None])
    for name in (
        "params/bn3/scale",
        "params/bn3/bias",
        "batch_stats/bn3/mean",
        "batch_stats/bn3/var",
    ):
        assert found[name, 0].role == "other"
    assert {"params/conv1/kernel": 2, "params/fc/kernel": 1}.items() <= {
        path: axis for event in channels.frozen for path, axis in event.members
    }.items()


def test_index_of_flattened_concatenated_and_fused_axes():
    found = members(traced("densenet"))
    assert_array_equal(found["params/conv2/kernel", 2].index, np.arange(9, 15)[:, None])
    flat = next(
        member
        for member in traced("densenet").groups["params/conv0"].members
        if (member.path, member.axis) == ("params/hidden/kernel", 0)
    )
    assert_array_equal(
        flat.index, 3 + np.arange(6)[:, None] + 21 * np.arange(4)
    )  # 2x2 pixels of 21
    channels = traced("fused qkv")
    columns = np.arange(3 * 4 * 6).reshape(3, 4, 6)
    fused = {
        tuple(map(tuple, member.index.tolist()))
        for group in channels.groups.values()
        for member in group.members
        if (member.path, member.axis) == ("qkv", 1)
    }
    as_tuples = lambda index: tuple(map(tuple, np.sort(index, 1).tolist()))
    heads = np.moveaxis(columns, 1, 0).reshape(4, -1)
    q_and_k = np.moveaxis(columns[:2], 2, 0).reshape(6, -1)
    values = columns[2].T
    assert fused == {as_tuples(heads), as_tuples(q_and_k), as_tuples(values)}


def test_roles_of_depthwise_and_attention():
    found = members(traced("mobilenet"))
    assert found["params/block0/depthwise/kernel", 3].role == "depthwise"
    assert found["params/block0/pointwise/kernel", 2].role == "consumer"
    assert found["params/block0/pointwise/kernel", 3].role == "producer"
    channels = traced("vit")
    assert "params/attention/key" in channels.names
    assert members(channels)["params/attention/out/kernel", 0].role == "consumer"
    assert channels.sizes["params/attention/out"] == 12  # the width, named after its first kernel


def test_layout_is_in_order_of_use():
    found = groups.layout(traced("mobilenet"))
    layers = [
        "conv1",
        *(f"block{i}/{kind}wise" for i in range(13) for kind in ("depth", "point")),
        "fc",
    ]
    blocks = len(found["groups"]) - 1  # block10 comes after block9, as the network has it
    assert found["kernels"] == [
        f"params/{name}/kernel" for name in (*layers[: 1 + 2 * blocks], "fc")
    ]
    assert list(found["groups"]) == [f"params/{name}" for name in layers[: 1 + 2 * blocks : 2]]
    for i, (name, group) in enumerate(found["groups"].items()):
        marks = dict(
            depthwise=[2 * i + 1],
            consumer=[2 * i + 2],
            producer=[2 * i],
            other=[2 * i + 0.5, 2 * i + 1.5],
        )
        if i == blocks:
            marks = dict(consumer=[2 * i + 1], producer=[2 * i], other=[2 * i + 0.5])
        assert group == dict(size=traced("mobilenet").sizes[name], marks=marks)
    assert [member.path for member in traced("vit").groups["params/up"].members] == [
        f"params/{name}" for name in ("up/kernel", "up/bias", "down/kernel")
    ]


def test_frozen_says_why_and_where():
    def apply(v, x):
        h = jnp.sort(jnp.tanh(x @ v["a"]), 1)
        return h @ v["b"]

    channels = groups.trace(apply, {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((2, 3)))
    (event,) = [event for event in channels.frozen if event.primitive == "sort"]
    assert event.reason == "sorts along it"
    assert event.members == (("a", 1), ("b", 0))  # the axis that is sorted, and what is tied to it
    assert "test_groups.py:" in event.source
    text = groups.describe(channels)
    assert text.startswith("0 groups, 0 channels\nkept whole:\n")
    assert "    a axis 1, b axis 0: sort at test_groups.py:" in text
    text = groups.describe(traced("densenet"))
    assert "params/conv0: 6 channels\n" in text
    assert "    params/hidden/kernel axis 0 x 4 (consumer)" in text


def only_event(apply, variables, **like):
    """The event of these fields."""
    channels = groups.trace(apply, variables, X)
    has = lambda event: all(getattr(event, name) == value for name, value in like.items())
    (event,) = filter(has, channels.frozen)
    return event


def test_a_sum_is_frozen_since_an_equation_that_made_removed_entries_other_than_zero():
    def apply(v, x):
        h = hidden(v, x)
        centred = h - h.mean(-1, keepdims=True)
        spread = jnp.square(centred).mean(-1, keepdims=True)
        return centred / jnp.sqrt(spread + 1) @ v["out"]

    line = apply.__code__.co_firstlineno + 2
    event = only_event(apply, V, primitive="reduce_sum")
    assert event.since == f"sub at test_groups.py:{line}"
    assert event.source == f"test_groups.py:{line + 1}"
    assert set(event.members) == {("a", 1), ("out", 0)}


def test_ties_are_told_under_their_cause():
    """A chain of layers whose widths are all tied to one that is sorted, before it and after."""

    def apply(v, x):
        h = hidden(v, x)
        h = h + jnp.tanh(h @ v["c"])
        h = h + jnp.sort(h, 1) @ v["d"]
        return h @ v["out"]

    tied = {("a", 1), ("c", 0), ("c", 1), ("d", 0), ("d", 1), ("out", 0)}
    event = only_event(apply, V, reason="sorts along it")
    assert set(event.members) == tied


def test_scanned_layers_are_blamed_on_the_scan():
    def apply(v, x):
        turn = lambda h, kernel: (jnp.sin(h) @ kernel, None)
        h, _ = lax.scan(turn, hidden(v, x), v["k"])
        return h @ v["out"]

    event = only_event(apply, V, reason="is scanned over")
    assert event.primitive == "scan"
    assert event.members == (("k", 0),)


# Ways of use


def test_mask_under_jit_and_vmap():
    _, variables, _ = network("densenet")
    channels = traced("densenet")
    chosen = [keeps(channels, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *own: jnp.stack(own), *chosen)
    masks = jit(jax.vmap(lambda keep: groups.mask(variables, channels, keep)))(stacked)
    for i, keep in enumerate(chosen):
        expected = groups.mask(variables, channels, keep)
        jax.tree.map(assert_array_equal, expected, jax.tree.map(lambda leaf, i=i: leaf[i], masks))
    none = groups.mask(variables, channels, {})
    jax.tree.map(assert_array_equal, none, variables)


def test_other_batches_and_types():
    apply, variables, (images,) = network("small_cnn")
    channels, keep = traced("small_cnn"), keeps(traced("small_cnn"), 3)
    small = groups.compact(variables, channels, keep)
    run = groups.elastic(apply, channels, keep)
    several = np.concatenate([images, 2 * images[:1]])
    close(jit(apply)(groups.mask(variables, channels, keep), several), jit(run)(small, several))
    vmapped = jit(jax.vmap(run, (None, 0)))(small, several[:, None])
    close(jit(run)(small, several), vmapped[:, 0])
    with pytest.raises(ValueError, match=r"has shape .* the compact variables have"):
        run(variables, images)
    half = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree)
    masked = jit(apply)(half(groups.mask(variables, channels, keep)), images)
    found = jit(run)(half(small), images)  # traced anew
    close(np.float32(masked), np.float32(found), 2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_precisions(dtype):
    with jax.enable_x64(dtype == "float64"):
        model = models.build(
            name="mlp", num_classes=3, widths=(7, 5), dtype=dtype, param_dtype=dtype
        )
        images = np.asarray(foreign.image(1, 4), dtype)
        struct = jax.eval_shape(model.init, KEY, images)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), foreign.filled(struct))
        channels = groups.trace(model.apply, variables, images)
        assert sorted(channels.sizes.values()) == [5, 7]
        compare(
            model.apply,
            variables,
            (images,),
            channels,
            keeps(channels, 1),
            1e-12 if dtype == "float64" else 1e-2,
        )


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)], ids=["sgd", "adam"]
)
def test_optimizer_state_follows(optimizer):
    _, variables, _ = network("resnext")
    channels, keep = traced("resnext"), keeps(traced("resnext"), 2)
    params = variables["params"]
    state = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params)
    )
    small = groups.compact(params, channels, keep)  # a part of the variables
    jax.tree.map(assert_array_equal, small, groups.compact(variables, channels, keep)["params"])
    expected = jax.tree.map(np.shape, jax.eval_shape(optimizer.init, small))
    assert jax.tree.map(np.shape, groups.compact(state, channels, keep)) == expected
    masked = jax.tree.map(np.asarray, jit(lambda state: groups.mask(state, channels, keep))(state))
    assert sum(map(np.sum, jax.tree.leaves(masked))) == trees.size(
        expected := groups.compact(masked, channels, keep)
    )
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(expected))
    empty = optax.sgd(0.1).init(params)
    assert groups.mask(empty, channels, keep) == groups.compact(empty, channels, keep) == empty


def test_separate_branches():
    apply, variables, inputs = network("resnet18")
    channels = groups.trace(apply, variables, *inputs, branches="separate")
    name = "params/stage1_block0/conv2"
    assert {"params/conv1", name, "params/stage1_block1/conv2"} <= set(channels.names)
    keep = {name: np.array([True, False])}
    masked = groups.mask(variables, channels, keep)
    by_hand = jax.tree.map(np.array, variables)
    block, statistics = (by_hand[kind]["stage1_block0"] for kind in ("params", "batch_stats"))
    block["conv2"]["kernel"][..., 1] = 0
    for array in (*block["bn2"].values(), *statistics["bn2"].values()):
        array[1] = 0
    jax.tree.map(assert_array_equal, masked, by_hand)
    with pytest.raises(ValueError, match="only tied ones can be compacted"):
        groups.compact(variables, channels, keep)
    with pytest.raises(ValueError, match="only tied ones can be compacted"):
        groups.elastic(apply, channels, keep)
    gelu = {"a": np.ones((3, 4), np.float32), "b": np.ones((4, 2), np.float32)}
    channels = groups.trace(
        lambda v, x: jax.nn.gelu(x @ v["a"]) @ v["b"], gelu, np.ones((2, 3)), branches="separate"
    )
    assert set(members(channels)) == {("a", 1), ("b", 0)}  # x + x**3 has no branches


def test_another_function_of_the_same_groups_is_traced_anew():
    apply, variables, inputs = network("mlp")
    channels = traced("mlp")
    keep = groups.random_keep(channels, KEY)
    small, twice = groups.compact(variables, channels, keep), lambda v, x: 2 * apply(v, x)
    plain, double = (
        groups.elastic(function, channels, keep)(small, *inputs) for function in (apply, twice)
    )
    assert_allclose(double, 2 * plain, rtol=1e-6)
    with pytest.raises(ValueError, match="this function has other channel groups"):
        groups.elastic(
            lambda v, x: apply(v, x) + sum(map(jnp.max, jax.tree.leaves(v))), channels, keep
        )(small, *inputs)
    with pytest.raises(ValueError, match="more is no array of the compact variables"):
        groups.elastic(apply, channels, keep)({**small, "more": jnp.ones(2)}, *inputs)


def test_check_notices_a_wrong_group():
    apply, variables, inputs = network("mlp")
    channels = traced("mlp")
    assert groups.check(apply, variables, channels, *inputs, key=KEY) < 1e-5
    name, group = next(iter(channels.groups.items()))
    lost = next(member for member in group.members if member.role == "other")  # the bias stays
    wrong = group._replace(members=tuple(member for member in group.members if member is not lost))
    broken = channels._replace(groups={**channels.groups, name: wrong})
    with pytest.raises((TypeError, ValueError)):
        groups.check(apply, variables, broken, *inputs, key=KEY)
    turned = []  # read at run time, as no trace shows

    def changing(v, x):
        return (1 + len(turned)) * apply(v, x)

    once = groups.trace(changing, variables, *inputs)
    turned.append(1)
    assert groups.check(changing, variables, once, *inputs, key=KEY) == pytest.approx(0.5, abs=1e-3)
    assert np.isnan(
        groups.check(lambda v, x: apply(v, x) / 0 * 0, variables, channels, *inputs, key=KEY)
    )


def test_errors():
    apply, variables, inputs = network("mlp")
    channels = traced("mlp")
    name, size = next(iter(channels.sizes.items()))
    for keep, message in (
        ({"nothing": np.ones(3, bool)}, "keep is 'nothing'; allowed: params/"),
        (
            {name: np.ones(size + 1, bool)},
            rf"keep\['{name}'\] is bool \({size + 1},\); allowed: bool \({size},\)",
        ),
        ({name: np.ones(size)}, "is float64"),
        ({name: np.zeros(size, bool)}, f"keeps none of {size} channels"),
        ({name: [False] * size}, f"keeps none of {size} channels"),
    ):
        for function in (groups.mask, groups.compact):
            with pytest.raises(ValueError, match=message):
                function(variables, channels, keep)
    with pytest.raises(ValueError, match="no array of the tree belongs to the traced variables"):
        groups.mask({"other": jnp.ones(3)}, channels, {})
    with pytest.raises(ValueError, match="the traced variables have"):
        groups.mask(jax.tree.map(lambda leaf: leaf[..., None], variables), channels, {})
    with pytest.raises(TypeError, match=r"branch on values.*functools.partial"):
        groups.trace(lambda v, x: x if v.sum() > 0 else -x, jnp.ones(3), jnp.ones(3))
    with pytest.raises(TypeError, match="cannot be traced"):
        groups.trace(lambda v, x: np.asarray(v) * x, jnp.ones(3), jnp.ones(3))
    with pytest.raises(TypeError, match="cannot be traced"):
        groups.trace(lambda v, x: x[v > 0], jnp.ones(3), jnp.ones(3))
    with pytest.raises(TypeError, match="variables hold float at 'rate'"):
        groups.trace(lambda v, x: x, {"rate": 0.1}, jnp.ones(3))
    with pytest.raises(ValueError, match="branches is 'never'; allowed: 'tied'"):
        groups.trace(apply, variables, *inputs, branches="never")


def test_part_of_another_tree_is_refused():
    """Blocks without their own names might be any block."""
    variables = {f"block{i}": {"kernel": np.ones((3, 3), np.float32)} for i in range(2)}
    apply = lambda v, x: x @ v["block0"]["kernel"] @ v["block1"]["kernel"]
    channels = groups.trace(apply, variables, np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="kernel may belong to block0/kernel or block1/kernel"):
        groups.mask(variables["block0"], channels, {})


# Functions that try to break it: name to (function of (variables, x), channels that can go)

V = dict(
    a=foreign.normal(0, 5, 6),
    b=np.linspace(0.5, 1.5, 6, dtype=np.float32),
    c=foreign.normal(1, 6, 6),
    d=foreign.normal(2, 6, 6),
    out=foreign.normal(3, 6, 3),
    wide=foreign.normal(4, 12, 3),
    square=foreign.normal(5, 36, 3),
    k=foreign.normal(6, 3, 6, 6),
    g=foreign.normal(7, 3, 3, 6),
)
X = foreign.normal(8, 4, 5)
hidden = lambda v, x: jnp.tanh(x @ v["a"])
images = lambda v, x: jnp.tanh(x[:, :, None] * v["b"])  # [4, 5, 6]
pool = functools.partial(lax.reduce_window, window_strides=(1, 1, 1))


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 4) / 4


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, slope: (slope,))


@jax.custom_vjp
def summing_backward(x):
    return 2 * x


summing_backward.defvjp(
    lambda x: (2 * x, None), lambda _, slope: (slope + slope.sum(-1, keepdims=True),)
)


def loop(v, x):
    """A carry that holds labelled values, one that starts as ones."""
    turn = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ v["c"]), carry[2] + carry[1])
    test = lambda carry: (carry[0] < 3) & (jnp.abs(carry[1]).sum() < 1e3)
    return lax.while_loop(test, turn, (0, hidden(v, x), jnp.ones((4, 6))))[2]


def nested_scans(v, x):
    inner = lambda h, kernel: (jnp.tanh(h @ kernel), h.sum(1))
    outer = lambda h, kernel: lax.scan(inner, h, jnp.stack([kernel, kernel.T]))
    h, sums = lax.scan(outer, hidden(v, x), v["k"])
    return h @ v["out"] + sums.sum()


def slow_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def routed(v, x):
    """A mixture of experts: three, of which every example uses two."""
    weights, chosen = lax.top_k(hidden(v, x) @ v["out"], 2)
    return (
        jnp.einsum("bk,bi,bkij->bj", jax.nn.softmax(weights), hidden(v, x), v["k"][chosen])
        @ v["wide"][:6]
    )


HOSTILE = {
    # zero or not when removed
    "padded with ones": (
        lambda v, x: jnp.pad(hidden(v, x), ((1, 0), (0, 0)), constant_values=1.0).sum(1),
        (),
    ),
    "padded channels": (lambda v, x: jnp.pad(hidden(v, x), ((0, 0), (5, 1))) @ v["wide"], (6, 6)),
    "max below zero": (lambda v, x: jnp.maximum(hidden(v, x), -0.2).sum(1), (6,)),
    "max above zero": (lambda v, x: jnp.maximum(hidden(v, x), 0.2).sum(1), ()),
    "clip over zero": (lambda v, x: jnp.clip(hidden(v, x), -0.2, 0.3).sum(1), (6,)),
    "clip beside zero": (lambda v, x: jnp.clip(hidden(v, x), 0.1, 0.3).sum(1), ()),
    "select": (lambda v, x: jnp.where(x @ v["a"] > 0, x @ v["a"], 0.1 * hidden(v, x)).sum(1), (6,)),
    "select ones": (lambda v, x: jnp.where(hidden(v, x) > 0, hidden(v, x), 0.1).sum(1), ()),
    "positive power": (lambda v, x: (v["b"] ** 2.5).sum() + hidden(v, x).sum(1), (6, 6)),
    "negative power": (lambda v, x: (v["b"] ** -1.0 * hidden(v, x)) @ v["out"], ()),
    "unknown power": (lambda v, x: (v["b"] ** jnp.exp(hidden(v, x)) * hidden(v, x)) @ v["out"], ()),
    "division": (lambda v, x: (hidden(v, x) / v["b"]) @ v["out"], ()),
    "logarithm": (lambda v, x: (hidden(v, x) * jnp.log(v["b"])) @ v["out"], ()),
    "log gamma": (lambda v, x: (hidden(v, x) * jax.scipy.special.gammaln(v["b"])) @ v["out"], ()),
    "exponentials summed": (lambda v, x: jnp.exp(hidden(v, x)).sum(1), ()),
    "exponentials weighted": (lambda v, x: jnp.exp(hidden(v, x)) @ v["out"], (6,)),
    "complex constant": (lambda v, x: jnp.imag(hidden(v, x) + 1j * jnp.ones(6)).sum(1), ()),
    "rounded": (lambda v, x: lax.reduce_precision(hidden(v, x), 8, 7).sum(1), (6,)),
    "constant of its size": (
        lambda v, x: (hidden(v, x) + np.arange(6.0, dtype=np.float32)) @ v["out"],
        (6,),
    ),
    "constant summed": (lambda v, x: (hidden(v, x) + np.arange(6.0, dtype=np.float32)).sum(1), ()),
    "filled gather": (
        lambda v, x: v["a"].at[np.array([0, 9])].get(mode="fill", fill_value=1.0).sum(1),
        (),
    ),
    # normalisation
    "softmax": (lambda v, x: jax.nn.softmax(x @ v["a"]) @ v["out"], ()),
    "layer norm": (lambda v, x: slow_norm(x @ v["a"]) @ v["out"], ()),
    "weight norm": (
        lambda v, x: (x @ (v["a"] / (jnp.linalg.norm(v["a"], axis=0) + 1e-3))) @ v["out"],
        (6,),
    ),
    "weight norm without eps": (
        lambda v, x: (x @ (v["a"] / jnp.linalg.norm(v["a"], axis=0))) @ v["out"],
        (),
    ),
    "local response": (
        lambda v, x: (
            (
                hidden(v, x)
                / (1 + lax.reduce_window(hidden(v, x) ** 2, 0.0, lax.add, (1, 3), (1, 1), "SAME"))
            )
            @ v["out"]
        ),
        (),
    ),
    # shapes
    "single entry": (lambda v, x: hidden(v, x) * hidden(v, x)[:, :1] @ v["out"], (5,)),
    "single entry broadcast": (
        lambda v, x: hidden(v, x) @ v["out"] + hidden(v, x)[:, 0, None],
        (5,),
    ),
    "split in ones": (lambda v, x: sum(jnp.split(hidden(v, x), 6, 1)), ()),
    "outer product": (
        lambda v, x: (
            jnp.einsum("bi,bj->bij", hidden(v, x), hidden(v, x)).reshape(4, 36) @ v["square"]
        ),
        (6,),
    ),
    "stacked": (
        lambda v, x: jnp.stack([hidden(v, x), hidden(v, x) @ v["c"]], 1).reshape(4, 12) @ v["wide"],
        (6,),
    ),
    "halves": (lambda v, x: jnp.maximum(*jnp.split(hidden(v, x), 2, 1)) @ v["out"][:3], (3, 3)),
    "another factoring": (
        lambda v, x: hidden(v, x).reshape(4, 3, 2).sum(2) @ v["out"][:3],
        (3, 2, 3),
    ),
    "rolled": (lambda v, x: (hidden(v, x) + jnp.roll(hidden(v, x), 3, 1)) @ v["out"], (3,)),
    "repeated": (
        lambda v, x: jnp.repeat(hidden(v, x), 2, 1) @ v["wide"],
        (6, 2),
    ),  # channels, copies
    "tied": (lambda v, x: hidden(v, x) @ v["c"] @ v["c"].T @ v["out"], (6, 6)),
    "empty": (lambda v, x: hidden(v, x)[:0].sum() + hidden(v, x) @ v["out"], (6,)),
    "bytes": (
        lambda v, x: (
            lax.bitcast_convert_type(hidden(v, x), jnp.uint8).astype(jnp.float32).sum((1, 2))
        ),
        (),
    ),
    "outputs that are inputs": (lambda v, x: (hidden(v, x) @ v["out"], v["b"], x), (6,)),
    "ignored": (lambda v, x: jit(lambda v, x: x)(v, x), ()),
    # order
    "sorted": (lambda v, x: jnp.sort(hidden(v, x), 1) @ v["out"], ()),
    "sorted beside": (lambda v, x: jnp.sort(hidden(v, x), 0) @ v["out"], (6,)),
    "cumulative": (lambda v, x: jnp.cumsum(hidden(v, x), 1) @ v["out"], ()),
    "cumulative beside": (lambda v, x: jnp.cumsum(hidden(v, x), 0).sum(1), (6,)),
    "argmax beside": (
        lambda v, x: jnp.argmax(hidden(v, x), 0).astype(jnp.float32) @ v["out"],
        (6,),
    ),
    "scattered": (lambda v, x: hidden(v, x).at[:, 2].add(2.0) @ v["out"], ()),
    "sliced at an index": (
        lambda v, x: lax.dynamic_slice(hidden(v, x), (1, 0), (2, 6)) @ v["out"],
        (6,),
    ),
    "routed": (
        routed,
        (6, 6, 6),
    ),  # inputs and outputs of the experts, the rows of `wide` that nothing reads
    # convolution and pooling
    "dilated": (
        lambda v, x: (
            lax.conv_general_dilated(
                images(v, x),
                v["k"],
                (1,),
                [(4, 2)],
                (2,),
                (2,),
                ("NWC", "WIO", "NWC"),
                preferred_element_type=jnp.float32,
            ).mean(1)
            @ v["out"]
        ),
        (6, 6),
    ),
    "grouped": (
        lambda v, x: (
            lax.conv_general_dilated(
                images(v, x),
                v["g"],
                (1,),
                "SAME",
                None,
                None,
                ("NWC", "WIO", "NWC"),
                feature_group_count=2,
            ).mean(1)
            @ v["out"]
        ),
        (2, 3, 3),  # groups, inputs and outputs of each
    ),
    "batch groups": (
        lambda v, x: (
            lax.conv_general_dilated(
                images(v, x),
                v["k"],
                (1,),
                "SAME",
                None,
                None,
                ("NWC", "WIO", "NWC"),
                batch_group_count=2,
            ).mean(1)
            @ v["out"]
        ),
        (),
    ),
    "pooled": (
        lambda v, x: pool(images(v, x), -jnp.inf, lax.max, (1, 2, 1), padding="SAME").sum((1, 2)),
        (6,),
    ),
    "pooled padding": (
        lambda v, x: jnp.maximum(
            pool(images(v, x), -jnp.inf, lax.max, (1, 2, 1), padding=((0, 0), (3, 1), (0, 0))), -9.0
        ).sum((1, 2)),
        (),
    ),
    "pooled shift": (
        lambda v, x: pool(
            images(v, x), 0.0, lax.add, (1, 1, 1), padding=((0, 0),) * 2 + ((1, -1),)
        ).sum((1, 2)),
        (),
    ),
    # control flow and derivatives
    "loop": (loop, ()),
    "loop weighted": (lambda v, x: loop(v, x) @ v["out"], (6,)),
    "nested scans": (nested_scans, (6,)),
    "scanned channels": (
        lambda v, x: lax.scan(lambda c, k: (c + k, None), jnp.zeros(4), hidden(v, x).T)[0],
        (),
    ),
    "branches": (
        lambda v, x: lax.switch(
            jnp.argmax(x[0]) % 3,
            (lambda h: h @ v["c"], lambda h: h * v["b"], jnp.zeros_like),
            hidden(v, x),
        ).sum(1),
        (6,),
    ),
    "branch with ones": (
        lambda v, x: lax.cond(
            x.sum() > 0, lambda h: h @ v["c"], lambda h: h + 1.0, hidden(v, x)
        ).sum(1),
        (),
    ),
    "vmapped": (lambda v, x: jax.vmap(lambda row: jnp.tanh(row @ v["a"]) @ v["out"])(x), (6,)),
    "rematerialised": (
        lambda v, x: jax.checkpoint(lambda h: jnp.tanh(h @ v["c"]))(hidden(v, x)) @ v["out"],
        (6, 6),
    ),
    "gradient inside": (
        lambda v, x: jax.grad(lambda x: (hidden(v, x) @ v["out"]).sum())(x),
        (6, 3),
    ),
    "straight through": (lambda v, x: straight_through(hidden(v, x)).sum(1), (6,)),
    # randomness
    "dropout": (
        lambda v, x: jnp.where(
            jax.random.bernoulli(jax.random.key(1), 0.5, (4, 6)), hidden(v, x), 0.0
        ).sum(1),
        (6,),
    ),
    "noise": (
        lambda v, x: (hidden(v, x) + jax.random.normal(jax.random.PRNGKey(1), (4, 6))) @ v["out"],
        (6,),
    ),
    # unknown
    "fourier": (lambda v, x: jnp.abs(jnp.fft.fft(hidden(v, x), axis=1)) @ v["out"], ()),
    "solved": (lambda v, x: jnp.linalg.solve(v["c"] + jnp.eye(6), hidden(v, x).T).T @ v["out"], ()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name):
    function, sizes = HOSTILE[name]
    channels = groups.trace(function, V, X)
    assert sorted(channels.sizes.values()) == sorted(sizes)
    if sizes:
        compare(function, V, (X,), channels, keeps(channels, 1))


def test_entries_of_several_channels_go_with_any_of_them():
    """Products of all pairs of channels, side by side."""
    pairs = lambda h: jnp.einsum("bi,bj->bij", h, h).reshape(4, 36)
    channels = groups.trace(lambda v, x: pairs(hidden(v, x)) @ v["square"], V, X)
    (name,) = channels.names
    kept = np.arange(6) % 3 > 0
    for given in (kept, jnp.asarray(kept)):
        masked = groups.mask(V, channels, {name: given})
        stays = np.any(masked["square"], 1).reshape(6, 6)
        assert_array_equal(stays, np.outer(kept, kept))


def test_a_loop_cannot_be_taught_anew():
    with pytest.raises(ValueError, match="'scan' runs programs inside"):
        groups.teach("scan", rules.elementwise(rules.all_zero))


def test_random_key_as_input():
    drop = lambda v, x, key: (
        jnp.where(jax.random.bernoulli(key, 0.5, (4, 6)), hidden(v, x), 0.0) @ v["out"]
    )
    channels = groups.trace(drop, V, X, KEY)
    assert list(channels.sizes.values()) == [6]
    compare(drop, V, (X, KEY), channels, keeps(channels, 1))


def slopes(function, keep, channels):
    loss = lambda run: lambda v: jnp.sum(jnp.sin(run(v, X)))
    return compare_slopes(loss, function, V, channels, keep)


@pytest.mark.parametrize("custom", [straight_through, jax.nn.relu, jax.nn.softplus, jax.nn.silu])
def test_hand_written_derivatives_stay(custom):
    """Slopes on both sides of zero and at it, where relu's own is 0 and that of max(x, 0) a
    half.
    """
    function = lambda v, x: custom(x @ v["a"] * np.array([1, 0, 1, 1, 0, 1], np.float32)) @ v["out"]
    channels = groups.trace(function, V, X)
    small = slopes(
        function,
        {next(iter(channels.groups)): np.array([True, True, False, True, True, False])},
        channels,
    )
    assert np.abs(small["a"]).max() > 1e-3


def test_derivative_that_couples_more_is_refused():
    function = lambda v, x: summing_backward(x @ v["a"]) @ v["out"]
    channels = groups.trace(function, V, X)
    keep = keeps(channels, 1)
    compare(function, V, (X,), channels, keep)
    with pytest.raises(ValueError, match="hand-written derivative"):
        slopes(function, keep, channels)


def test_training_equals_training_of_the_masked_network():
    """With running statistics, which lose the channels of the variables of their names."""
    _, variables, (images,) = network("vgg")
    model = models.build(name="vgg", num_classes=5, **TINY["vgg"][0])
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    channels = groups.trace(model.apply, variables, images)
    keep = keeps(channels, 1)
    mask = lambda tree: groups.mask(tree, channels, keep)
    compact = lambda tree: groups.compact(tree, channels, keep)

    def trained(apply, restrict, variables):
        def loss(params, batch_stats):
            logits, batch_stats = apply({"params": params, "batch_stats": batch_stats}, images)
            return jnp.sum(jnp.sin(logits)), batch_stats

        for _ in range(2):
            slopes, batch_stats = jax.grad(loss, has_aux=True)(
                variables["params"], variables["batch_stats"]
            )
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], slopes)
            variables = {"params": restrict(params), "batch_stats": batch_stats}
        return variables

    elastic = groups.elastic(model.apply_train, channels, keep, state="1")
    small = jit(lambda v: trained(elastic, lambda params: params, v))(compact(variables))
    full = jit(lambda v: trained(model.apply_train, mask, v))(mask(variables))
    close(compact(full), small)
    assert float(jnp.abs(small["batch_stats"]["bn1"]["mean"]).max()) > 1e-3
    with pytest.raises(ValueError, match="state is '0'"):
        groups.elastic(model.apply_train, channels, keep, state="0")(compact(variables), images)


PROGRAM = {  # h: [4, 6], variables, 0..3
    "tanh": lambda h, v, k: jnp.tanh(h),
    "exp": lambda h, v, k: jnp.exp(-jnp.abs(h)),
    "scale": lambda h, v, k: h * v["b"],
    "shift": lambda h, v, k: h + v["b"],
    "abs": lambda h, v, k: jnp.abs(h) - 0.5 * k,
    "norm": lambda h, v, k: slow_norm(h) if k else foreign.rms_norm(h, v["b"]),
    "sort": lambda h, v, k: jnp.sort(h, k % 2),
    "flip": lambda h, v, k: h + h[:, ::-1] if k else h[::-1],
    "pad": lambda h, v, k: h + jnp.pad(h, ((k, 0), (0, 0)), constant_values=float(k % 2))[:4],
    "sum": lambda h, v, k: h + h.sum(1, keepdims=True),
    "gate": lambda h, v, k: h * jax.nn.sigmoid(h @ v["d"]),
    "mix": lambda h, v, k: (h.reshape(4, 2, 3).swapaxes(1, 2) if k else h).reshape(4, 6) @ v["c"],
}


@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from(sorted(PROGRAM)), st.integers(0, 3)), min_size=2, max_size=6
    ),
    st.booleans(),
)
@hypothesis.settings(max_examples=10)
def test_random_programs(steps, total):
    """Chains of operations on [4, channels], in any order."""

    def function(v, x):
        h = hidden(v, x)
        for name, k in steps:
            h = PROGRAM[name](h, v, k)
        return h.sum(1) if total else h @ v["out"]

    channels = groups.trace(function, V, X)
    if channels.groups:
        compare(function, V, (X,), channels, keeps(channels, len(steps)))
