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
        is_larger = other.size > self.size
        size = jnp.where(is_larger, other.size, self.size)
        lower = jnp.where(is_larger, other.lower, self.lower)
        return _Gap(size, lower)


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
    wide = trees.widen(scores)
    values = lax.stop_gradient(wide)
    buckets = min(buckets, 2 * values.size)
    count = functools.partial(_count, trim=trim, buckets=buckets)
    is_divided = any(trees.division(values))
    if is_divided:  # every device fills buckets from its share
        whole = PartitionSpec()
        count = jax.sharding.auto_axes(count, out_sharding=whole)
    return count(values)


@functools.partial(platforms.compiled, static_argnames=("trim", "buckets"))
def _count(scores: Array, trim: int, buckets: int) -> Array:
    is_unknown = jnp.isnan(scores)
    scores = jnp.where(is_unknown, -jnp.inf, scores)
    scores = _normal(scores)
    first, last = _ends(scores, trim)
    span = _span(scores, first, last)
    mean = span / (scores.size - 1)
    coarse = _look(scores, first, last, buckets, buckets / span)
    surely = jnp.maximum(mean, coarse.widest.size)

    def look(search: _Search) -> _Search:
        known = jnp.maximum(surely, search.widest.size)
        density = _NARROWER / known
        start, widest = _look(scores, search.start, last, buckets, density)
        so_far = search.widest.or_larger(widest)
        return _Search(start, so_far)

    def is_unfinished(search: _Search) -> Array:
        return search.start < last

    nothing = jnp.zeros_like(first)
    begin = _Search(first, _Gap(nothing, first))
    end = lax.while_loop(is_unfinished, look, begin)
    widest = end.widest

    def is_below(x: Array) -> Array:
        below = x <= widest.lower
        return below.astype(jnp.int32)

    number = trees.fold_sum(is_below, scores)
    return jnp.where(widest.size > 0, number, trim + 1)


def _ends(scores: Array, trim: int) -> tuple[Array, Array]:
    """The least and the greatest score that is compared."""
    if not trim:
        return jnp.min(scores), jnp.max(scores)
    ranks = jnp.array([scores.size - trim, trim + 1])
    first, last = kth_largest(scores, ranks)
    return first, last


def _normal(x: Array) -> Array:
    """Subnormals as zero, on every device alike."""
    tiny = jnp.finfo(x.dtype).tiny
    is_subnormal = jnp.abs(x) < tiny
    return jnp.where(is_subnormal, 0, x)


def _span(scores: Array, first: Array, last: Array) -> Array:
    """From the least to the greatest finite score between two, at most the largest number."""

    def or_else(other: float) -> Callable:
        def of(x: Array) -> Array:
            is_between = (x >= first) & (x <= last)
            is_counted = is_between & jnp.isfinite(x)
            return jnp.where(is_counted, x, other)

        return of

    least = trees.fold(jnp.minimum, jnp.min, or_else(jnp.inf), scores)
    most = trees.fold(jnp.maximum, jnp.max, or_else(-jnp.inf), scores)
    largest = jnp.finfo(scores.dtype).max
    return jnp.clip(most - least, 0, largest)


def _look(scores: Array, start: Array, last: Array, buckets: int, density: Array) -> _Search:
    """The widest gap above the scores of a window that begins at the score `start`, and the least
    score behind it, infinity if that is above `last`.

    buckets: of the window. density: of buckets, in one unit of scores.
    """
    tiny = jnp.finfo(scores.dtype).tiny
    density = jnp.clip(density, 2 * tiny, _NARROWER / tiny)
    is_compared = (scores > start) & (scores <= last)
    distances = scores - start
    places = jnp.where(is_compared, distances * density, 0)
    is_behind = places >= buckets
    following = jnp.min(scores, where=is_behind, initial=jnp.inf)
    is_inside = is_compared & ~is_behind
    places = jnp.where(is_inside, places, buckets)  # where those outside are dropped
    places = places.astype(jnp.int32)
    none = jnp.full(buckets, jnp.inf, scores.dtype)
    least = none.at[places].min(scores, mode="drop")
    none = -none
    most = none.at[places].max(scores, mode="drop")
    upper = jnp.append(least, following)
    before = jnp.append(start, most)
    lower = lax.cummax(before)
    is_filled = least <= most
    is_found = jnp.append(is_filled, following <= last)
    sizes = _normal(upper - lower)
    sizes = jnp.where(is_found, sizes, 0)
    place = jnp.argmax(sizes)
    widest = _Gap(sizes[place], lower[place])
    return _Search(following, widest)
