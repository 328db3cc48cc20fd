"""Counts and masks at a ratio: golden numbers of the original, exact counts, structure."""

import foreign
import golden_data
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import allocate, filters, groups, masks, models, originals, shares, trees


def golden_params():
    """(tree of PyTorch-layout arrays under Flax leaf names in the golden order, paths)."""
    golden = golden_data.load("05_magnitude_pruning.npz")
    params, paths, start = {}, [], 0
    for i, (name, shape) in enumerate(zip(golden["param_names"], golden["param_shapes"])):
        shape = tuple(int(n) for n in str(shape).split("x"))
        leaf = (
            str(name).rsplit(".", 1)[1].replace("weight", "kernel" if len(shape) > 1 else "scale")
        )
        paths.append(f"layer{i:02d}_{name}/{leaf}".replace(".", "_", 1))
        size = int(np.prod(shape))
        params[paths[-1]] = golden["flat_params"][start : start + size].reshape(shape)
        start += size
    assert start == golden["flat_params"].size
    return golden, params, paths


def flat(tree, paths):
    return np.concatenate([np.ravel(tree[path]) for path in paths])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("selection", ["global", "layerwise"])
def test_magnitude_masks_match_the_original(selection):
    golden, params, paths = golden_params()
    options = dict(selection=selection, scope="all", count="original")
    compiled = tiny.jitted_once(lambda p, c: allocate.keep_masks(p, c, **options))
    expected = zip(
        golden["keep_ratios"],
        golden[f"{selection}_keep_mask"],
        golden[f"{selection}_kept_count"],
        strict=True,
    )
    for keep, mask, number in expected:
        counts = allocate.keep_counts(params, 1 - keep, **options)
        ours = flat(compiled(params, counts), paths)
        assert_array_equal(ours, mask, err_msg=f"keep {keep}")
        assert ours.sum() == number
    if selection == "global":  # the original puts an artificial 0 in front
        assert_array_equal(golden["mask_vector"][:, 1:], golden["global_keep_mask"])


def test_convolution_only_masks_match_the_original():
    golden, params, paths = golden_params()
    kernels = {path: params[path] for path in paths if params[path].ndim == 4}
    remaining = []
    for share, expected in zip(golden["convonly_px"], golden["convonly_keep_mask"], strict=True):
        counts = allocate.keep_counts(kernels, float(share))
        ours = flat(allocate.keep_masks(kernels, counts), list(kernels))
        assert_array_equal(ours, expected)
        remaining.append(100 * ours.mean())
    assert_allclose(remaining, golden["convonly_remaining_percent"], rtol=1e-12)


@pytest.mark.parametrize(
    "case", golden_data.parts("05_magnitude_pruning.npz", r"erk_keep_mask/(\d+)")
)
def test_erk_input_channel_masks_match_the_original(case):
    golden, params, paths = golden_params()
    torch = {path: params[path] for path in paths if params[path].ndim == 4}
    kernels = {path: leaf.transpose(2, 3, 1, 0) for path, leaf in torch.items()}
    options = dict(selection="structured", granularity="channel", layer_ratios="erk_original")
    counts = allocate.keep_counts(kernels, float(golden["erk_ratio"][int(case)]), **options)
    kept = allocate.keep_masks(kernels, counts, **options)
    ours = {path: mask.transpose(3, 2, 0, 1) for path, mask in kept.items()}
    assert_array_equal(flat(ours, list(torch)), golden[f"erk_keep_mask/{case}"])


def network():
    rng = default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    return {
        "conv1": {"kernel": draw(3, 3, 3, 8), "bias": draw(8)},
        "bn1": {"scale": draw(8), "bias": draw(8)},
        "conv2": {"kernel": draw(3, 3, 8, 10), "bias": draw(10)},
        "fc": {"kernel": draw(40, 5), "bias": draw(5)},
    }


@pytest.mark.parametrize(
    ("selection", "scope"),
    [("global", "kernels"), ("global", "all"), ("layerwise", "all"), ("random", "kernels")],
)
@pytest.mark.parametrize("ratio", [0.0, 0.37, 0.99, 1.0])
def test_counts_are_exact_and_other_parameters_untouched(selection, scope, ratio):
    params = network()
    counts = allocate.keep_counts(params, ratio, selection=selection, scope=scope)
    kept = allocate.keep_masks(params, counts, jax.random.key(0), selection=selection, scope=scope)
    sizes = {path: mask.size for path, mask in allocate.prunable(kept, scope).items()}
    total = sum(int(mask.sum()) for mask in allocate.prunable(kept, scope).values())
    assert total == sum(sizes.values()) - round(ratio * sum(sizes.values()))
    if selection == "layerwise":
        assert all(abs(counts[path] - (1 - ratio) * size) < 1 for path, size in sizes.items())
    if scope == "kernels":
        assert bool(kept["bn1"]["scale"].all())
        assert bool(kept["fc"]["bias"].all())


def test_global_masks_keep_the_largest():
    params = network()
    kept = allocate.keep_masks(params, allocate.keep_counts(params, 0.9))
    sizes = jax.tree.map(np.abs, allocate.prunable(params, "kernels"))
    left = jax.tree.map(np.asarray, allocate.prunable(kept, "kernels"))
    smallest_kept = min(size[left[path]].min() for path, size in sizes.items())
    assert smallest_kept > max(size[~left[path]].max() for path, size in sizes.items())
    assert all(np.all(mask) for path, mask in trees.named_leaves(kept).items() if path not in left)


@pytest.mark.parametrize(("granularity", "axis"), [("filter", 3), ("channel", 2)])
def test_structured_masks_remove_whole_slices_of_least_l1_norm(granularity, axis):
    params = network()
    counts = allocate.keep_counts(params, 0.5, selection="structured", granularity=granularity)
    kept = allocate.keep_masks(params, counts, selection="structured", granularity=granularity)
    for name in ("conv1", "conv2"):
        mask = np.moveaxis(np.asarray(kept[name]["kernel"]), axis, 0).reshape(
            params[name]["kernel"].shape[axis], -1
        )
        norms = np.moveaxis(np.abs(params[name]["kernel"]), axis, 0).reshape(mask.shape).sum(1)
        assert (mask.all(1) | ~mask.any(1)).all()
        assert mask.all(1).sum() == len(mask) - round(0.5 * len(mask))
        assert norms[mask.all(1)].min() > norms[~mask.any(1)].max()
    assert bool(kept["fc"]["kernel"].all())


def test_structured_masks_of_dense_networks_spare_the_classes():
    params = {"dense1": {"kernel": jnp.ones((6, 4))}, "fc": {"kernel": jnp.ones((4, 3))}}
    counts = allocate.keep_counts(params, 0.5, selection="structured")
    kept = allocate.keep_masks(params, counts, selection="structured")
    assert kept["dense1"]["kernel"].sum() == 12
    assert bool(kept["fc"]["kernel"].all())
    whole = {"params": params}  # as Flax gives them
    counts = allocate.keep_counts(whole, 0.5, selection="structured")
    assert bool(
        allocate.keep_masks(whole, counts, selection="structured")["params"]["fc"]["kernel"].all()
    )


# What may be pruned, and which of its axes are inputs and outputs


def shapes(**arrays):
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in arrays.items()}


GATED = {
    "attention/w": (32, 32),
    "mlp/gating_einsum": (2, 32, 96),
    "mlp/linear": (96, 32),
    "embedder/input_embedding": (100, 32),
}


def gated(params, tokens):
    x = params["embedder/input_embedding"][tokens] @ params["attention/w"]
    gate, up = jnp.einsum("btd,cdh->cbth", x, params["mlp/gating_einsum"])
    return (jax.nn.gelu(gate) * up) @ params["mlp/linear"]


def test_weights_of_unknown_names_are_pruned_by_trace_or_pattern_and_refused_by_name():
    params = shapes(**GATED)
    with pytest.raises(
        ValueError, match=r"'mlp/gating_einsum' and 2 more .*channels=.*include=.*exclude="
    ):
        allocate.keep_counts(params, 0.9)
    total = 32 * 32 + 2 * 32 * 96 + 96 * 32
    channels = groups.trace(gated, params, np.zeros((1, 4), np.int32))
    assert allocate.keep_counts(params, 0.9, channels=channels) == total - round(0.9 * total)
    patterns = dict(include="mlp/.*", exclude="embedder/.*")
    assert allocate.keep_counts(params, 0.9, **patterns) == total - round(0.9 * total)


def attention(params, x):
    heads = [jnp.einsum("btd,dhs->bths", x, params[f"{name}/kernel"]) for name in ("query", "key")]
    scores = jax.nn.softmax(jnp.einsum("bths,bThs->bhtT", *heads), -1)
    x = jnp.einsum("bhtT,bTd->btd", scores, x)
    return jax.nn.relu(x @ params["mlp/kernel"]) @ params["head/kernel"]


def test_kernels_of_attention_are_no_convolutions():
    params = shapes(
        **{
            "query/kernel": (32, 4, 8),
            "key/kernel": (32, 4, 8),
            "mlp/kernel": (32, 128),
            "head/kernel": (128, 10),
        }
    )
    with pytest.raises(ValueError, match=r"'key/kernel' has shape .*channels=groups.trace"):
        allocate.keep_counts(params, 0.5, selection="structured")
    channels = groups.trace(attention, params, np.zeros((1, 3, 32), np.float32))
    counts = allocate.keep_counts(params, 0.5, selection="structured", channels=channels)
    assert counts == {
        "key": 4,
        "mlp": 64,
    }  # half of each head, of the MLP; the network's outputs stay


def test_the_outputs_of_a_network_stay_or_the_call_is_refused():
    params = {"hidden": {"kernel": jnp.ones((8, 16))}, "head": {"kernel": jnp.ones((16, 10))}}
    with pytest.raises(ValueError, match=r"outputs.*channels=groups.trace.*exclude="):
        allocate.keep_counts(params, 0.5, selection="structured")
    channels = groups.trace(
        lambda p, x: jax.nn.relu(x @ p["hidden"]["kernel"]) @ p["head"]["kernel"],
        params,
        jnp.ones((1, 8)),
    )
    for options in (dict(channels=channels), dict(exclude="head/kernel")):
        counts = allocate.keep_counts(params, 0.5, selection="structured", **options)
        kept = allocate.keep_masks(params, counts, selection="structured", **options)
        assert kept["hidden"]["kernel"].any(0).sum() == 8
        assert kept["head"]["kernel"].all()


def test_filters_of_any_layout():
    weight = jnp.asarray(default_rng(1).normal(size=(6, 3, 2, 2)))
    params = {"conv": {"weight": weight}, "out": {"weight": jnp.ones((4, 6))}}
    with pytest.raises(ValueError, match="layout='out_in'"):
        allocate.keep_counts(params, 0.5, selection="structured")

    def apply(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"]["weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return jax.nn.relu(x).mean((2, 3)) @ p["out"]["weight"].T

    channels = groups.trace(apply, params, jnp.ones((1, 3, 4, 4)))
    least = np.argsort(np.abs(weight).sum((1, 2, 3)))[:3]
    for options in (dict(channels=channels), dict(layout="out_in")):
        options["selection"] = "structured"
        kept = allocate.keep_masks(params, allocate.keep_counts(params, 0.5, **options), **options)
        filters = np.asarray(kept["conv"]["weight"]).reshape(6, -1)
        assert (filters.all(1) | ~filters.any(1)).all()
        assert_array_equal(np.flatnonzero(~filters.any(1)), np.sort(least))


# Whole channels


@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_no_layer_is_emptied_at_any_ratio(granularity):
    model = models.build(name="mobilenet", num_classes=5, stem_width=3, blocks=((4, 1), (6, 2)))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    params, channels = (
        variables["params"],
        groups.trace(model.apply, variables, jnp.ones((1, 8, 8, 3))),
    )
    for count, layer_ratios in (
        ("nearest", "uniform"),
        ("per_layer", "uniform"),
        ("nearest", "erk"),
        ("nearest", "erk_original"),
    ):
        options = dict(
            selection="structured", granularity=granularity, count=count, layer_ratios=layer_ratios
        )
        for ratio in (0.0, 0.34, 0.5, 0.9, 0.99, 1.0):
            by_name = allocate.keep_counts(params, ratio, **options)
            by_trace = allocate.keep_counts(params, ratio, channels=channels, **options)
            assert min(*by_name.values(), *by_trace.values()) >= 1
            if granularity == "channel":
                assert all(kept == 1 for path, kept in by_name.items() if "depthwise" in path)


def randomized(variables):
    """Norms that shift, and statistics that do."""
    rng = default_rng(3)
    draw = lambda leaf: np.float32(rng.uniform(0.2, 1.5, leaf.shape)) if leaf.ndim == 1 else leaf
    return jax.tree.map(draw, foreign.filled(variables))


@pytest.mark.parametrize(
    ("name", "options", "branches"),
    [
        ("small_cnn", dict(widths=(6, 8), dense_widths=(7,), batch_norm=True), "tied"),
        ("mobilenet", dict(stem_width=3, blocks=((4, 1), (6, 2))), "tied"),
        ("resnet", dict(stage_sizes=(1, 1), widths=(4, 6)), "separate"),
    ],
)
def test_a_removed_filter_takes_its_norm_with_it(name, options, branches):
    model = models.build(name=name, num_classes=5, **options)
    images = jnp.asarray(foreign.image(batch=3))
    with jax.enable_x64(False):
        variables = randomized(jax.eval_shape(model.init, jax.random.key(0), images))
    channels = groups.trace(model.apply, variables, images, branches=branches)
    own = dict(selection="structured", channels=channels)
    counts = allocate.keep_counts(variables["params"], 0.5, **own)
    kept = jax.jit(lambda params: allocate.keep_masks(params, counts, **own))(variables["params"])
    alive = {}
    for group, layer in filters.Structured().units_of(variables["params"], channels).items():
        mask = np.moveaxis(
            np.asarray(trees.named_leaves(kept)[layer.scored[0].path]), layer.scored[0].axes[0], 0
        )
        index = layer.scored[0].index
        alive[group] = mask.reshape(len(mask), -1).any(1)
        if index is not None:
            alive[group] = alive[group][index[:, 0]]
        assert alive[group].sum() == counts[group]

    @jax.jit
    def both(variables, kept, alive):
        masked = {**variables, "params": masks.apply(variables["params"], kept)}
        without = groups.mask(variables, channels, alive)
        return model.apply(masked, images), model.apply(without, images)

    first, second = both(variables, kept, alive)
    assert_allclose(first, second, atol=1e-5 * float(jnp.abs(second).max()))


def test_readers_are_masked_only_where_they_read_more_than_zero():
    params = {"a": jnp.ones((4, 6)), "shift": jnp.ones(6), "b": jnp.ones((6, 3))}
    for function, whole in ((jnp.tanh, True), (jax.nn.sigmoid, False)):
        apply = lambda p, x, function=function: function(x @ p["a"] + p["shift"]) @ p["b"]
        own = dict(selection="structured", channels=groups.trace(apply, params, jnp.ones((1, 4))))
        counts = allocate.keep_counts(params, 0.5, **own)
        kept = jax.jit(
            lambda params, counts=counts, own=own: allocate.keep_masks(params, counts, **own)
        )(params)
        assert kept["shift"].sum() == 3
        assert bool(kept["b"].all()) == whole
        pruned = apply(masks.apply(params, kept), jnp.ones((1, 4)))
        assert_allclose(pruned, 3 * function(5.0), rtol=1e-6)


# Shares of layers


def test_erk_is_the_published_rule():
    ratios = shares.erk_ratios({"small": (100, 100), "large": (1000, 1000)}, 0.9)
    assert [round(ratios[name], 3) for name in ("small", "large")] == [0.082, 0.908]
    ratios = shares.erk_ratios(
        {"stem": (7, 7, 3, 64), "a": (3, 3, 64, 64), "b": (3, 3, 512, 512)}, 0.9
    )
    assert ratios["stem"] == 0.0  # saturated: whole
    sizes = {"stem": 7 * 7 * 3 * 64, "a": 9 * 64**2, "b": 9 * 512**2}
    assert sum(ratios[name] * size for name, size in sizes.items()) == pytest.approx(
        0.9 * sum(sizes.values())
    )
    densities = [
        (1 - ratios[name]) * size / total
        for name, size, total in (("a", 9 * 64**2, 134), ("b", 9 * 512**2, 1030))
    ]
    assert densities[0] == pytest.approx(densities[1])
    assert shares.erk_ratios({"a": (3, 4), "b": (5, 6)}, 0.0) == {"a": 0.0, "b": 0.0}
    assert shares.erk_ratios({"a": (3, 4), "b": (5, 6)}, 1.0) == {"a": 1.0, "b": 1.0}


@hypothesis.given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(0, 1000),
    st.sampled_from(["uniform", "erk"]),
)
def test_layers_share_a_budget_by_largest_remainders(sizes, thousandths, layer_ratios):
    ratio = thousandths / 1000
    params = shapes(**{f"{i}/kernel": (size, 3) for i, size in enumerate(sizes)})
    counts = allocate.keep_counts(params, ratio, selection="layerwise", layer_ratios=layer_ratios)
    total = 3 * sum(sizes)
    assert abs(sum(counts.values()) - total * (1000 - thousandths) / 1000) <= 0.5 + 1e-6
    ratios = shares.LAYER_RATIOS[layer_ratios](
        {path: leaf.shape for path, leaf in params.items()}, ratio
    )
    assert all(
        abs(counts[path] - leaf.size * (1 - ratios[path])) < 1 for path, leaf in params.items()
    )


def test_arrays_of_an_odd_size_keep_half():
    for size, total in ((9, 576), (3, 192)):
        params = shapes(**{f"{i}/kernel": (size, 1) for i in range(total // size)})
        assert sum(allocate.keep_counts(params, 0.5, selection="layerwise").values()) == total // 2
        each = allocate.keep_counts(params, 0.5, selection="layerwise", count="per_layer")
        assert set(each.values()) == {size - round(size / 2)}


# Pruning again


@pytest.mark.parametrize(
    ("selection", "options"),
    [
        ("global", {}),
        ("global", dict(count="ceil")),
        ("global", dict(count="original")),
        ("layerwise", {}),
        ("random", {}),
        ("structured", {}),
        ("structured", dict(granularity="channel")),
    ],
)
def test_what_an_earlier_mask_left_out_goes_first(selection, options):
    """Whatever these entries hold: large values, or zeros that tie with others that training
    made.
    """
    params, own = network(), dict(selection=selection, **options)
    key = jax.random.key(0)
    cut = lambda ratio, before, params: allocate.keep_masks(
        params, allocate.keep_counts(params, ratio, **own), key, before=before, **own
    )
    before = cut(0.6, None, params)
    zeros = trees.map_named(
        lambda path, leaf, mask: np.where(mask & (leaf < 0), 0, leaf) if leaf.ndim > 1 else leaf,
        params,
        before,
    )
    large = jax.tree.map(lambda leaf, mask: np.where(mask, leaf, 100.0), params, before)
    tied = selection == "global" and "count" in options  # these originals keep or drop ties
    for changed in (large,) if tied else (large, zeros):
        more = cut(0.75, before, changed)
        assert all(
            np.all(np.asarray(old) | ~np.asarray(new))
            for new, old in zip(*map(jax.tree.leaves, (more, before)))
        )
        number, _ = allocate.left_by(more, **own)
        assert int(number) == sum(jax.tree.leaves(allocate.keep_counts(params, 0.75, **own)))
        less = cut(0.3, before, changed)
        assert not any(
            np.any(np.asarray(new) & ~np.asarray(old))
            for new, old in zip(*map(jax.tree.leaves, (less, before)))
        )


def test_misuse_is_explained():
    with pytest.raises(ValueError, match=r"ratio is 1.5; allowed: 0 to 1"):
        allocate.keep_counts(network(), 1.5)
    with pytest.raises(TypeError, match="give that the counts"):
        jax.jit(lambda ratio: allocate.keep_counts(network(), ratio))(0.5)
    with tiny.complains(r"selection is 'globl'; allowed: global.*Did you mean 'global'"):
        allocate.check("globl", {})
    with tiny.complains(r"scope is 'kernel'; allowed: 'kernels' \| 'all'.*Did you mean"):
        allocate.check("global", dict(scope="kernel"))
    for options, message in (
        (dict(scope="ALL"), "scope is 'ALL'; allowed: 'kernels'"),
        (dict(count="orignal"), "count is 'orignal'; allowed: 'nearest'"),
    ):
        with tiny.complains(message):
            allocate.keep_counts(network(), 0.5, **options)
    with tiny.complains(r"selection is 'globl'; allowed: .*Did you mean 'global'"):
        allocate.keep_masks(network(), 5, selection="globl")
    with pytest.raises(ValueError, match="'random' needs a key"):
        allocate.keep_masks(network(), 5, selection="random")
    with pytest.raises(ValueError, match="erk_original needs"):
        originals.erk_ratios({"a": (1, 1)}, 0.5)
