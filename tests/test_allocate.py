"""Counts and masks at a ratio: golden numbers of the original, exact counts, structure."""

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsity_jax import allocate, masks, tables


def golden_params():
    """(tree of PyTorch-layout arrays under Flax leaf names in the golden order, paths)."""
    golden = golden_data.load("05_magnitude_pruning.npz")
    params, paths, start = {}, [], 0
    for i, (name, shape) in enumerate(zip(golden["param_names"], golden["param_shapes"])):
        shape = tuple(int(n) for n in str(shape).split("x"))
        leaf = str(name).rsplit(".", 1)[1].replace("weight", "kernel" if len(shape) > 1 else "scale")
        paths.append(f"layer{i:02d}_{name}/{leaf}".replace(".", "_", 1))
        size = int(np.prod(shape))
        params[paths[-1]] = jnp.asarray(golden["flat_params"][start : start + size].reshape(shape))
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
    compiled = jax.jit(lambda p, c: allocate.keep_masks(p, c, **options))
    for keep, expected in zip(golden["keep_ratios"], golden[f"{selection}_keep_mask"], strict=True):
        counts = allocate.keep_counts(params, 1 - keep, **options)
        np.testing.assert_array_equal(flat(compiled(params, counts), paths), expected, err_msg=f"keep {keep}")
    assert compiled._cache_size() == 1


def test_convolution_only_masks_match_the_original():
    golden, params, paths = golden_params()
    kernels = {path: params[path] for path in paths if params[path].ndim == 4}
    for share, expected in zip(golden["convonly_px"], golden["convonly_keep_mask"], strict=True):
        counts = allocate.keep_counts(kernels, float(share))
        np.testing.assert_array_equal(flat(allocate.keep_masks(kernels, counts), list(kernels)), expected)


@pytest.mark.parametrize("case", [0, 1])
def test_erk_input_channel_masks_match_the_original(case):
    golden, params, paths = golden_params()
    torch = {path: params[path] for path in paths if params[path].ndim == 4}
    kernels = {path: leaf.transpose(2, 3, 1, 0) for path, leaf in torch.items()}
    options = dict(selection="structured", granularity="channel", layer_ratios="erk_original")
    counts = allocate.keep_counts(kernels, float(golden["erk_ratio"][case]), **options)
    kept = allocate.keep_masks(kernels, counts, **options)
    ours = {path: mask.transpose(3, 2, 0, 1) for path, mask in kept.items()}
    np.testing.assert_array_equal(flat(ours, list(torch)), golden[f"erk_keep_mask/{case}"])


def network():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return {
        "conv1": {"kernel": draw(3, 3, 3, 8), "bias": draw(8)},
        "bn1": {"scale": draw(8), "bias": draw(8)},
        "conv2": {"kernel": draw(3, 3, 8, 10), "bias": draw(10)},
        "fc": {"kernel": draw(40, 5), "bias": draw(5)},
    }


@pytest.mark.parametrize("selection", ["global", "layerwise", "random"])
@pytest.mark.parametrize("scope", ["kernels", "all"])
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
    pruned = masks.apply(params, kept)
    smallest_kept = min(float(jnp.abs(leaf[leaf != 0]).min()) for leaf in allocate.prunable(pruned, "kernels").values())
    removed = jax.tree.map(lambda leaf, mask: jnp.where(mask, 0, leaf), params, kept)
    assert smallest_kept > max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(removed))


@pytest.mark.parametrize(("granularity", "axis"), [("filter", 3), ("channel", 2)])
def test_structured_masks_remove_whole_slices_of_least_l1_norm(granularity, axis):
    params = network()
    counts = allocate.keep_counts(params, 0.5, selection="structured", granularity=granularity)
    kept = allocate.keep_masks(params, counts, selection="structured", granularity=granularity)
    for name in ("conv1", "conv2"):
        mask = np.moveaxis(np.asarray(kept[name]["kernel"]), axis, 0).reshape(params[name]["kernel"].shape[axis], -1)
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
    assert bool(allocate.keep_masks(whole, counts, selection="structured")["params"]["fc"]["kernel"].all())


def test_misuse_is_explained():
    with pytest.raises(ValueError, match=r"ratio is 1.5; allowed: 0 to 1"):
        allocate.keep_counts(network(), 1.5)
    with pytest.raises(tables.ConfigError, match=r"selection is 'globl'; known: global.*Did you mean 'global'"):
        allocate.check("globl", {}, "config.curve")
    with pytest.raises(tables.ConfigError, match=r"scope is 'kernel'; allowed: 'kernels' \| 'all'.*Did you mean"):
        allocate.check("global", dict(scope="kernel"), "config.curve")
    for options, message in (
        (dict(scope="ALL"), "scope is 'ALL'; allowed: 'kernels'"),
        (dict(count="orignal"), "count is 'orignal'; allowed: 'nearest'"),
    ):
        with pytest.raises(tables.ConfigError, match=message):
            allocate.keep_counts(network(), 0.5, **options)
    with pytest.raises(tables.ConfigError, match=r"selection is 'globl'; known: .*Did you mean 'global'"):
        allocate.keep_masks(network(), 5, selection="globl")
    with pytest.raises(ValueError, match="'random' needs a key"):
        allocate.keep_masks(network(), 5, selection="random")
    with pytest.raises(ValueError, match="erk_original needs"):
        allocate.erk_original_ratios({"a": (1, 1)}, 0.5)
