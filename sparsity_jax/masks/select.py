"""Masks of the k largest entries, and what masks do to trees."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sparsity_jax import trees
from sparsity_jax.masks import search
from sparsity_jax.masks.search import Count, Ranking
from sparsity_jax.trees import varying_like
from sparsity_jax.types import PyTree

__all__ = ["apply", "full", "k_largest_mask", "sparsity"]


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
    return _mask(scores, search.checked_count(scores, k), before, magnitude=magnitude)


@search.compiled
def _mask(scores: PyTree, k: Array, before: PyTree | None, magnitude: bool) -> PyTree:
    constant = lambda leaf: lax.stop_gradient(jnp.asarray(leaf))
    ranked = tree_map(constant, scores)
    if before is not None:
        lowest = lambda leaf, kept: jnp.where(kept, leaf, jnp.nan)
        ranked = tree_map(lowest, ranked, before)
    leaves, structure = tree_flatten(ranked)
    # made where they are used: kept for later, they would be written to memory
    positions = lambda: _positions(leaves, tree_leaves(before))
    ranking = Ranking(ranked, magnitude)
    threshold, cut = _cut(ranking, positions, k)

    def kept(leaf: Array, position: Array) -> Array:
        above = ranking.at_least(leaf, threshold + 1)
        reached = ranking.at_least(leaf, threshold)
        return above | (reached & (position < cut))

    return tree_unflatten(structure, map(kept, leaves, positions()))


def _cut(ranking: Ranking, positions: Callable[[], list], k: Array) -> tuple[Array, Array]:
    """(threshold, cut): the k largest have keys above the threshold, or that one and a position
    below the cut.
    """
    wanted = jnp.clip(k, 1, ranking.total)
    wanted = varying_like(wanted, ranking.leaves)
    threshold, count = search.kth_key(ranking, wanted)
    # above the position of every entry
    integer = _position_type(ranking.total)
    last = jnp.full_like(wanted, 2 * ranking.total, integer)

    def cut_ties() -> Array:
        """The smallest cut with enough entries above the threshold, or tied before the cut."""
        places = [position for position in positions() if position.size]
        larger = ranking.count(threshold + 1)
        missing = wanted - larger

        def tied_before(cut: Array) -> Any:
            def tied(leaf: Array, position: Array) -> Array:
                reached = ranking.at_least(leaf, threshold)
                above = ranking.at_least(leaf, threshold + 1)
                counted = reached & ~above & (position < cut)
                return counted.astype(jnp.int32)

            number: Any = 0
            for leaf, position in zip(ranking.leaves, places):
                number += trees.fold_sum(tied, leaf, position)
            return number

        def halve(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = low + (high - low) // 2
            enough = tied_before(middle) >= missing
            low = jnp.where(enough, low, middle + 1)
            high = jnp.where(enough, middle, high)
            return low, high

        unfinished = lambda bracket: bracket[0] < bracket[1]
        first = jnp.zeros_like(last)
        _, cut = lax.while_loop(unfinished, halve, (first, last))
        return cut

    # `cond`, not a loop that ends at once: a loop copies the scores it closes over
    cut = lax.cond(count != wanted, cut_ties, lambda: last)
    threshold = jnp.where(k > 0, threshold, ranking.infinity)
    return threshold, jnp.where(k > 0, cut, 0)


def _position_type(total: int) -> Any:
    """Of integers up to twice the number of entries; CPUs compare signed ones faster."""
    return jnp.int32 if 2 * total < 2**31 else jnp.uint32


def _positions(leaves: list[Array], before: list[Array]) -> list[Array]:
    """Of equal scores those of lower position come first: the index in the concatenation of the
    flattened leaves, behind all others where a mask of `before` is False.
    """
    total = trees.size(leaves)
    integer = _position_type(total)
    positions = []
    offset = 0
    for i, leaf in enumerate(leaves):
        shape = leaf.shape
        position = jnp.full(shape, offset, integer)
        for axis in range(leaf.ndim):
            inner = shape[axis + 1 :]
            stride = jnp.asarray(math.prod(inner), integer)
            index = lax.broadcasted_iota(integer, shape, axis)
            position += stride * index
        if before:
            position += jnp.where(before[i], 0, jnp.asarray(total, integer))
        positions.append(position)
        offset += leaf.size
    return positions


def full(tree: PyTree) -> PyTree:
    """The mask that keeps everything."""
    return tree_map(lambda leaf: jnp.ones(leaf.shape, bool), tree)


def apply(tree: PyTree, masks: PyTree) -> PyTree:
    """`tree` with zeros where `masks` is False (also where the entry is not finite)."""
    kept = lambda leaf, mask: jnp.where(mask, leaf, jnp.zeros_like(leaf))
    return tree_map(kept, tree, masks)


def sparsity(tree: PyTree) -> Array:
    """Share of exact zeros (or False) over all leaves; TypeError for leaves that are neither floats
    nor bools.
    """
    trees.check_parameters(tree, "sparsity", masks=True)
    zeros = [jnp.sum(leaf == 0, dtype=jnp.int32) for leaf in tree_leaves(tree)]
    return jnp.asarray(sum(zeros) / trees.size(tree))
