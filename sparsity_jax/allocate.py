"""How many entries each parameter array keeps at a pruning ratio, and the masks that follow.

Counts are integers made on the host, of floating-point products as the originals' are; masks are made of them inside
jit, so one compiled program serves every ratio. Magnitude is the score.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sparsity_jax import masks, tables, trees

PyTree = Any
Scope = Literal["kernels", "all"]
GlobalCount = Literal["nearest", "original", "ceil"]


def num_kept(size: int, ratio: float) -> int:
    """size - round(ratio * size): entries left when the share `ratio` is removed."""
    return size - round(ratio * size)


def prunable(params: PyTree, scope: Scope) -> dict[str, Any]:
    """The arrays that may be pruned, by path: `kernels` (matrices and convolutions) or `all` (as the SFW original).

    Raises ValueError if no array is named like a kernel.
    """
    leaves = trees.named_leaves(params)
    kernels = {path: leaf for path, leaf in leaves.items() if trees.is_kernel(path) and leaf.ndim > 1}
    if scope == "kernels" and not kernels:
        raise ValueError(f"no matrix is named kernel, weight or w; use scope='all'. Paths: {list(leaves)[:5]}")
    return leaves if scope == "all" else kernels


def erk_ratios(shapes: dict[str, tuple[int, ...]], ratio: float) -> dict[str, float]:
    """Share to remove from each kernel so that about `ratio` of all weights goes (Erdos-Renyi-Kernel).

    ratio_l = c s_l with s = 1 - (sum of the kernel's dimensions) / (their product) and c = ratio sum(n) / sum(n s),
    at most 1. Source: Evci et al. 2020, arXiv:1911.11134, as in the SFW original's utilities.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    slack = {path: 1 - sum(shape) / sizes[path] for path, shape in shapes.items()}
    weighted = sum(sizes[path] * slack[path] for path in shapes)
    if weighted <= 0:
        raise ValueError(f"ERK needs kernels larger than the sum of their dimensions; given shapes: {shapes}.")
    scale = ratio * sum(sizes.values()) / weighted
    return {path: min(max(scale * slack[path], 0.0), 1.0) for path in shapes}


class Selection(NamedTuple):
    """counts(params, ratio, **options) -> tree of ints, on the host; mask(params, counts, key, before, **options) ->
    masks."""

    counts: Callable
    mask: Callable


def _complete(params: PyTree, chosen: dict[str, jax.Array]) -> PyTree:
    return trees.map_named(lambda path, leaf: chosen.get(path, jnp.ones(leaf.shape, bool)), params)


def _global_counts(params, ratio, *, scope: Scope = "kernels", count: GlobalCount = "nearest"):
    size = trees.size(prunable(params, scope))
    if count == "ceil":
        return size - max(math.ceil(ratio * size), 1)
    return size - max(int(ratio * size) - 1, 0) if count == "original" else num_kept(size, ratio)


def _global_mask(params, counts, key, before, *, scope: Scope = "kernels", count: str = "nearest"):
    del key, before
    chosen = prunable(params, scope)
    if count == "original":
        threshold = masks.kth_largest(chosen, counts, magnitude=True)
        return _complete(params, {path: jnp.abs(leaf) >= threshold for path, leaf in chosen.items()})
    if count == "ceil":
        threshold = masks.kth_largest(chosen, counts + 1, magnitude=True)
        return _complete(params, {path: jnp.abs(leaf) > threshold for path, leaf in chosen.items()})
    return _complete(params, masks.k_largest_mask(chosen, counts, magnitude=True))


def _layerwise_counts(params, ratio, *, scope: Scope = "kernels", count: Literal["nearest", "original"] = "nearest"):
    sizes = {path: leaf.size for path, leaf in prunable(params, scope).items()}
    kept = (lambda n: n - int(ratio * (n - 1))) if count == "original" else (lambda n: num_kept(n, ratio))
    return {path: kept(size) for path, size in sizes.items()}


def _layerwise_mask(params, counts, key, before, *, scope: Scope = "kernels", count: str = "nearest"):
    one = lambda leaf, k: _global_mask(leaf, k, key, before, scope="all", count=count)
    chosen = prunable(params, scope)
    return _complete(params, {path: one(leaf, counts[path]) for path, leaf in chosen.items()})


def _random_counts(params, ratio, *, scope: Scope = "kernels"):
    return num_kept(trees.size(prunable(params, scope)), ratio)


def _random_mask(params, counts, key, before, *, scope: Scope = "kernels"):
    if key is None:
        raise ValueError("selection 'random' needs a key.")
    chosen = prunable(params, scope)
    before = None if before is None else {path: trees.named_leaves(before)[path] for path in chosen}
    return _complete(params, masks.random_mask(key, chosen, counts, before=before))


AXES = {"filter": -1, "channel": -2}


def _structured_kernels(params: PyTree, granularity: str) -> dict[str, Any]:
    """Convolution kernels, or dense ones where there are none; a classifier called `fc` keeps its outputs."""
    kernels = prunable(params, "kernels")
    convolutions = {path: leaf for path, leaf in kernels.items() if leaf.ndim > 2}
    if convolutions:
        return convolutions
    classifier = lambda path: path.split("/")[-2:-1] == ["fc"]
    return {path: leaf for path, leaf in kernels.items() if granularity == "channel" or not classifier(path)}


def _structured_counts(
    params,
    ratio,
    *,
    granularity: Literal["filter", "channel"] = "filter",
    layer_ratios: Literal["uniform", "erk"] = "uniform",
):
    kernels = _structured_kernels(params, granularity)
    if layer_ratios == "erk":
        ratios = erk_ratios({path: leaf.shape for path, leaf in kernels.items()}, ratio)
    else:
        ratios = dict.fromkeys(kernels, ratio)
    return {path: num_kept(leaf.shape[AXES[granularity]], ratios[path]) for path, leaf in kernels.items()}


def _structured_mask(params, counts, key, before, *, granularity: str = "filter", layer_ratios: str = "uniform"):
    del key, before, layer_ratios
    axis = AXES[granularity]

    def one(kernel, k):
        others = [a for a in range(kernel.ndim) if a != kernel.ndim + axis]
        kept = masks.k_largest_mask(jnp.sum(jnp.abs(trees.widen(kernel)), others, keepdims=True), k)
        return jnp.broadcast_to(kept, kernel.shape)

    kernels = _structured_kernels(params, granularity)
    return _complete(params, {path: one(kernel, counts[path]) for path, kernel in kernels.items()})


SELECTIONS = {
    "global": Selection(_global_counts, _global_mask),
    "layerwise": Selection(_layerwise_counts, _layerwise_mask),
    "random": Selection(_random_counts, _random_mask),
    "structured": Selection(_structured_counts, _structured_mask),
}


def check(selection: str, options: dict[str, Any], where: str) -> dict[str, Any]:
    """Options of the selection, checked against its table row; raises ConfigError."""
    return tables.check_options(tables.lookup(SELECTIONS, selection, f"{where}.selection").counts, options, where)


def keep_counts(params: PyTree, ratio: float, *, selection: str = "global", **options) -> PyTree:
    """What `keep_masks` may trace: how many entries (or filters) stay at pruning ratio `ratio` in [0, 1].

    params: arrays or shape structs. selection: `global` (one magnitude threshold), `layerwise` (the same share of every
    array), `random` or `structured` (whole filters or input channels of least L1 norm; `layer_ratios` uniform or erk;
    kernels are [..., in, out] as in Flax; in networks without convolutions a last layer called `fc` keeps its filters).
    options: `scope` (kernels, all), `count` (`original`: the SFW original's counts, one more than nominal, and ties
    kept; `ceil`, global only: the geometric study's, the ceil(p n) smallest go, at least one, and ties with them),
    `granularity`, `layer_ratios`. Raises ValueError for a ratio outside [0, 1] and ConfigError for other options.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; allowed: 0 to 1, the share removed.")
    options = check(selection, options, "keep_counts")
    return SELECTIONS[selection].counts(params, ratio, **options)


def keep_masks(
    params: PyTree,
    counts: PyTree,
    key: jax.Array | None = None,
    *,
    selection: str = "global",
    before: PyTree | None = None,
    **options,
) -> PyTree:
    """Masks (True = keep) in the structure of `params` for `counts` from `keep_counts`; selection, options: as there.

    key: for `random`. before: masks of earlier pruning; what they leave out goes first, by magnitude as a zero, at
    random by these masks. Raises ConfigError for unknown options and ValueError for `random` without a key.
    """
    options = check(selection, options, "keep_masks")
    return SELECTIONS[selection].mask(params, counts, key, before, **options)
