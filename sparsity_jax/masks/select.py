"""Masks of the k largest entries, and what masks do to trees."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_with_path,
    tree_unflatten,
)

from sparsity_jax import platforms, trees
from sparsity_jax.masks import search
from sparsity_jax.masks.order import Ranking, common_type, positions
from sparsity_jax.masks.search import Count
from sparsity_jax.types import PyTree

__all__ = ["apply", "full", "k_largest_mask", "k_largest_masks", "sparsity"]


def k_largest_mask(
    scores: PyTree, k: Count, *, magnitude: bool = False, before: PyTree | None = None
) -> PyTree:
    """True on exactly `k` entries of `scores`: the largest; equal scores: lower flat index first.

    scores: an array or a tree of arrays of one float type; the flat index runs through the leaves
        in tree order. NaN counts as smallest, subnormals as zero. k: 0..n, may be traced (then
        clipped).
    magnitude: rank absolute values without computing them first.
    before: an earlier mask in the structure of `scores`; what it leaves out ranks below everything
        else, below zeros and NaN too, whatever its scores.
    Returns bools in the shape of `scores`, a constant to derivatives. Raises ValueError for empty
    scores, a k outside 0..n and, outside `jit`, NaN; TypeError for scores that are no floats.
    """
    earlier = None if before is None else [before]
    return k_largest_masks([scores], [k], magnitude=magnitude, before=earlier)[0]


def k_largest_masks(
    scores: Sequence[PyTree],
    ks: Sequence[Count],
    *,
    magnitude: bool = False,
    before: Sequence[PyTree] | None = None,
) -> list[PyTree]:
    """`k_largest_mask` of several arrays or trees at once, each with a k and ranked for itself.

    On an accelerator all of them share a fixed number of passes.
    """
    counts = [search.checked_count(tree, k) for tree, k in zip(scores, ks, strict=True)]
    return _masks(list(scores), counts, before, magnitude=magnitude)


@functools.partial(platforms.compiled, static_argnames="magnitude")
def _masks(
    trees_of_scores: list, ks: list[Array], before: Sequence | None, magnitude: bool
) -> list[PyTree]:
    ranked = _ranked(trees_of_scores, before)
    by_type: dict[Any, list[int]] = {}
    for i, tree in enumerate(ranked):
        kind = common_type(tree_leaves(tree))
        by_type.setdefault(kind, []).append(i)
    results: dict[int, PyTree] = {}
    for own in by_type.values():
        found = _masks_of(
            [ranked[i] for i in own],
            [ks[i] for i in own],
            [before[i] if before else None for i in own],
            magnitude,
        )
        results |= zip(own, found)
    return [results[i] for i in range(len(ranked))]


def _ranked(several: list, before: Sequence | None) -> list:
    """Scores as constants, NaN where a mask of `before` is False."""

    def constant(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        return lax.stop_gradient(leaf)

    ranked = tree_map(constant, several)
    if before is None:
        return ranked
    lowest = lambda leaf, kept: jnp.where(kept, leaf, jnp.nan)
    return tree_map(lowest, ranked, list(before))


def _with_entries(tree: PyTree) -> list[Array]:
    return [leaf for leaf in tree_leaves(tree) if leaf.size]


def _masks_of(
    several: Sequence[PyTree], ks: Sequence[Array], before: Sequence[PyTree], magnitude: bool
) -> list[PyTree]:
    """Masks of trees of one type of scores."""
    groups = list(map(_with_entries, several))
    befores = list(map(_with_entries, before))
    totals = list(map(trees.size, groups))
    span = max(totals)
    wanted = [jnp.clip(k, 0, total) for k, total in zip(ks, totals)]
    found = search.cuts(groups, wanted, befores, span, magnitude)
    first, *_ = groups
    ranking = Ranking(common_type(first), magnitude)

    def mask(tree: PyTree, earlier: PyTree, cut: search.Cut) -> PyTree:
        leaves, structure = tree_flatten(tree)

        def kept(leaf: Array, position: Array) -> Array:
            above = ranking.at_least(leaf, cut.threshold + 1)
            reached = ranking.at_least(leaf, cut.threshold)
            return above | (reached & (position < cut.place))

        places = positions(leaves, tree_leaves(earlier), span)
        return tree_unflatten(structure, map(kept, leaves, places))

    return list(map(mask, several, before, found))


def full(tree: PyTree) -> PyTree:
    """The mask that keeps everything."""
    return tree_map(lambda leaf: trees.divided_like(jnp.ones(leaf.shape, bool), leaf), tree)


def apply(tree: PyTree, masks: PyTree) -> PyTree:
    """`tree` with zeros where `masks` is False (also where the entry is not finite).

    masks: bools in the structure and shapes of `tree`. Raises TypeError for masks that are no
    bools, such as the params, and ValueError for one of another shape than its array; both name it.
    """
    _check_masks(tree, masks)
    kept = lambda leaf, mask: jnp.where(mask, leaf, jnp.zeros_like(leaf))
    return tree_map(kept, tree, masks)


def _check_masks(tree: PyTree, masks: PyTree) -> None:
    """Raises what `apply` does."""

    def check(path: tuple, leaf: Array, mask: Array) -> None:
        name = trees.path_name(path) or "the array"
        kind = jnp.result_type(mask)
        if not jnp.issubdtype(kind, jnp.bool_):
            raise TypeError(
                f"the mask of {name!r} is {kind}; allowed: bool, in masks.apply(params, masks), "
                "where the masks come second."
            )
        shape = jnp.shape(leaf)
        if jnp.shape(mask) != shape:
            raise ValueError(
                f"the mask of {name!r} has shape {jnp.shape(mask)}; allowed: {shape}, that of its "
                "array."
            )

    tree_map_with_path(check, tree, masks)


def sparsity(tree: PyTree) -> Array:
    """Share of exact zeros (or False) over all leaves; TypeError for leaves that are neither floats
    nor bools.
    """
    trees.check_parameters(tree, "sparsity", masks=True)
    zeros = [jnp.sum(leaf == 0, dtype=jnp.int32) for leaf in tree_leaves(tree)]
    return jnp.asarray(sum(zeros) / trees.size(tree))
