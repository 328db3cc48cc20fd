"""The k-th largest scores of several groups, and where equal ones are cut.

Floats order like integers ("keys"), so the k-th largest of n entries is found by counting. `k` may
be traced, so one compilation serves every pruning ratio. `probes` and `digits` are two ways to the
same thresholds; `platforms` says which.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import platforms, trees
from sparsity_jax.blocks import Groups
from sparsity_jax.masks import digits, probes
from sparsity_jax.masks.order import Ranking, common_type, positions
from sparsity_jax.types import PyTree

__all__ = ["Count", "Cut", "checked_count", "cuts", "kth_keys"]

Count = int | Array
_Selection = probes.Selection | digits.Selection


class Cut(NamedTuple):
    """The k largest have keys above the threshold, or that one and a position below `place`."""

    threshold: Array
    place: Array


def checked_count(scores: PyTree, k: Count, lowest: int = 0) -> Array:
    """`k` as an array; raises what `k_largest_mask` does, here where numbers outside `jit` are
    known.
    """
    trees.check_finite(scores, "scores", infinite=True)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(scores)]
    common_type(leaves)
    total = trees.size(leaves)
    if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(
            f"k is {k}, which is no integer; a share of all scores must be made a number first."
        )
    if not isinstance(k, jax.core.Tracer):
        known = np.asarray(k)
        outside = (known < lowest) | (known > total)
        if outside.any():
            raise ValueError(f"k is {k}; allowed: {lowest} to {total}, the number of scores.")
    return jnp.asarray(k, jnp.int32)


def kth_keys(groups: Groups, ks: Sequence[Array], magnitude: bool) -> list[Array]:
    """A key per group that at least k of its scores have, the largest, or any that exactly k have.

    groups: leaves that are ranked together, all of one type of keys. ks: one per group, at least 1.
    """

    def search(groups: Groups, ks: Sequence[Array]) -> list[Array]:
        return _selection(groups, ks, magnitude).thresholds()

    return platforms.per_platform(search, groups, ks)


def cuts(
    groups: Groups, ks: Sequence[Array], befores: Groups, span: int, magnitude: bool
) -> list[Cut]:
    """Where the k largest of every group end. befores, span: see `order.positions`."""

    def search(groups: Groups, ks: Sequence[Array], befores: Groups) -> list[Cut]:
        wanted = [jnp.maximum(k, 1) for k in ks]
        selection = _selection(groups, wanted, magnitude)
        places = lambda: [positions(*group, span) for group in zip(groups, befores)]
        thresholds = selection.thresholds()
        return list(map(Cut, thresholds, selection.cuts(places, 2 * span)))

    infinity = _ranking(groups, magnitude).infinity
    result = []
    for k, (threshold, place) in zip(ks, platforms.per_platform(search, groups, ks, befores)):
        threshold = jnp.where(k > 0, threshold, infinity)
        result.append(Cut(threshold, jnp.where(k > 0, place, 0)))
    return result


def _ranking(groups: Groups, magnitude: bool) -> Ranking:
    return Ranking(common_type(jax.tree.leaves(groups)), magnitude)


def _selection(groups: Groups, ks: Sequence[Array], magnitude: bool) -> _Selection:
    """The searches, in the way of the platform."""
    search = probes.Selection if platforms.in_turn() else digits.Selection
    return search(_ranking(groups, magnitude), groups, ks)
