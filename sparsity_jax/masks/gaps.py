"""The largest gap between scores that are neighbours in order, without sorting.

Some gap among n scores is at least their range / (n - 1). Buckets narrower than a gap that is known
hold none as large, so the least and the greatest score of each bucket tell all that matters. A
window of buckets moves over the scores, and the larger the gaps it meets, the wider they become. Of
arrays that devices have shares of, buckets alone are exchanged.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from sparsity_jax import platforms, trees
from sparsity_jax.masks.thresholds import kth_largest

__all__ = ["count_below_largest"]

_BUCKETS = 2**14
_NARROWER = 1.25  # a bucket than a gap: so much that rounded places of scores do not matter


class _Gap(NamedTuple):
    """A gap and the score below it."""

    size: Array
    lower: Array

    def or_larger(self, other: "_Gap") -> "_Gap":
        """The other one where that is larger."""
        larger = other.size > self.size
        return _Gap(*[jnp.where(larger, new, old) for new, old in zip(other, self)])


class _Search(NamedTuple):
    """start: the least score whose gap above was not looked at. widest: of those that were."""

    start: Array
    widest: _Gap


def count_below_largest(scores: Array, trim: int, *, buckets: int = _BUCKETS) -> Array:
    """How many scores lie below the largest gap between neighbours in order, of equal gaps the
    lowest: int32.

    trim: how many scores at either end are not compared. Without any gap the result is `trim` + 1.
    buckets: of a window.
    Scores are compared in at least float32; NaN counts as minus infinity, subnormals as zero, among
    gaps too. Equal infinities have no gap, others an infinite one.
    After the search for both ends, at most 6 + 1.25 n / buckets windows pass over all n scores: so
    many where all gaps are equal, a handful where a few million scores are drawn at random.
    """
    values = lax.stop_gradient(trees.widen(scores))
    count = functools.partial(_count, trim=trim, buckets=min(buckets, 2 * values.size))
    if any(trees.division(values)):  # every device fills buckets from its share
        count = jax.sharding.auto_axes(count, out_sharding=PartitionSpec())
    return count(values)


@functools.partial(platforms.compiled, static_argnames=("trim", "buckets"))
def _count(scores: Array, trim: int, buckets: int) -> Array:
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    scores = _normal(scores)
    first, last = _ends(scores, trim)
    span = _span(scores, first, last)
    surely = span / (scores.size - 1)
    coarse = _look(scores, first, last, buckets, buckets / span)
    surely = jnp.maximum(surely, coarse.widest.size)

    def look(search: _Search) -> _Search:
        known = jnp.maximum(surely, search.widest.size)
        start, widest = _look(scores, search.start, last, buckets, _NARROWER / known)
        return _Search(start, search.widest.or_larger(widest))

    none = _Gap(jnp.zeros_like(first), first)
    unfinished = lambda search: search.start < last
    found = lax.while_loop(unfinished, look, _Search(first, none))
    below = lambda x: (x <= found.widest.lower).astype(jnp.int32)
    number = trees.fold_sum(below, scores)
    return jnp.where(found.widest.size > 0, number, trim + 1)


def _ends(scores: Array, trim: int) -> tuple[Array, Array]:
    """The least and the greatest score that is compared."""
    if not trim:
        return jnp.min(scores), jnp.max(scores)
    return tuple(kth_largest(scores, jnp.array([scores.size - trim, trim + 1])))


def _normal(x: Array) -> Array:
    """Subnormals as zero, on every device alike."""
    return jnp.where(jnp.abs(x) < jnp.finfo(x.dtype).tiny, 0, x)


def _span(scores: Array, first: Array, last: Array) -> Array:
    """From the least to the greatest finite score between two, at most the largest number."""

    def or_else(other: float) -> Callable:
        inside = lambda x: (x >= first) & (x <= last) & jnp.isfinite(x)
        return lambda x: jnp.where(inside(x), x, other)

    least = trees.fold(jnp.minimum, jnp.min, or_else(jnp.inf), scores)
    most = trees.fold(jnp.maximum, jnp.max, or_else(-jnp.inf), scores)
    return jnp.clip(most - least, 0, jnp.finfo(scores.dtype).max)


def _look(scores: Array, start: Array, last: Array, buckets: int, density: Array) -> _Search:
    """The widest gap above the scores of a window that begins at the score `start`, and the least
    score behind it, infinity if that is above `last`.

    buckets: of the window. density: of buckets, in one unit of scores.
    """
    tiny = jnp.finfo(scores.dtype).tiny
    density = jnp.clip(density, 2 * tiny, _NARROWER / tiny)
    compared = (scores > start) & (scores <= last)
    places = jnp.where(compared, (scores - start) * density, 0)
    behind = places >= buckets
    following = jnp.min(scores, where=behind, initial=jnp.inf)
    # those outside are dropped
    places = jnp.where(compared & ~behind, places, buckets).astype(jnp.int32)
    empty = jnp.full(buckets, jnp.inf, scores.dtype)
    least = empty.at[places].min(scores, mode="drop")
    most = (-empty).at[places].max(scores, mode="drop")
    upper = jnp.append(least, following)
    lower = lax.cummax(jnp.append(start, most))
    found = jnp.append(least <= most, following <= last)
    sizes = jnp.where(found, _normal(upper - lower), 0)
    place = jnp.argmax(sizes)
    return _Search(following, _Gap(sizes[place], lower[place]))
