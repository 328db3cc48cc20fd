"""The search on a CPU: a dozen or two probes, each a count of `scores >= bound`.

No sort, no gather, no temporary array; under sharding only scalar sums cross devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_map

from sparsity_jax import platforms, trees
from sparsity_jax.masks.order import Ranking, position_type

__all__ = ["Rows", "Selection"]

_SMALL = 2**16  # arrays below share a search on one CPU


class Rows(NamedTuple):
    """Scores of several searches side by side. Each array is [searches, ...]; the scores of a
    search are its entries of all arrays.
    """

    ranking: Ranking
    arrays: Sequence[Array]

    @property
    def total(self) -> int:
        """Number of scores of a search."""
        return sum(array[0].size for array in self.arrays)

    def fold(self, combine: Callable, reduce: Callable, function: Callable, *others: Any) -> Array:
        """`trees.fold_rows` over all arrays; others: arrays of the same shapes."""
        result = None
        for arrays in zip(self.arrays, *others):
            part = trees.fold_rows(combine, reduce, function, *arrays)
            result = part if result is None else combine(result, part)
        return jnp.asarray(result)

    def at_least(self, scores: Array, key: Array) -> Array:
        """Whether the scores of each search [searches, ...] have at least its key."""
        key = _along(key, scores)
        return self.ranking.at_least(scores, key)

    def count_from(self, key: Array) -> Array:
        """How many scores of each search have at least its key; int32."""

        def reached(scores: Array) -> Array:
            enough = self.at_least(scores, key)
            return enough.astype(jnp.int32)

        number = self.fold(jnp.add, jnp.sum, reached)
        return number.astype(jnp.int32)


def _along(values: Array, rows: Array) -> Array:
    """One value per search, in a shape that broadcasts with `rows`."""
    inner = [1] * (rows.ndim - 1)
    return values.reshape(-1, *inner)


class _Found(NamedTuple):
    """threshold: the largest key that at least k scores have, or any that exactly k have. reached:
    how many have it. One each per search.
    """

    threshold: Array
    reached: Array


# Brackets -----------------------------------------------------------------------------------------


class _Bracket(NamedTuple):
    """count_low scores have key >= low, at least k; count_high of them key > high, fewer than k.

    side: times in a row that low (> 0) or high (< 0) moved. slow: probes since the scores in
    between were halved. probes: how many were made.
    """

    low: Array
    high: Array
    count_low: Array
    count_high: Array
    side: Array
    slow: Array
    probes: Array

    def between(self, real: Any) -> Array:
        """The number of scores that may still be the k-th largest."""
        number = self.count_low - self.count_high
        return number.astype(real)


def _extremes(rows: Rows) -> tuple[Array, Array]:
    """The keys of the greatest and of the least number of each search."""
    ranking = rows.ranking

    def number_or(other: float) -> Callable:
        def score(scores: Array) -> Array:
            unknown = jnp.isnan(scores)
            return jnp.where(unknown, other, ranking.size(scores))

        return score

    greatest = rows.fold(jnp.maximum, jnp.max, number_or(-jnp.inf))
    least = rows.fold(jnp.minimum, jnp.min, number_or(jnp.inf))
    high = ranking.key(greatest)
    low = ranking.key(least)
    return high, jnp.minimum(low, high)


def _start(rows: Rows, high: Array) -> _Bracket:
    """Where a search starts: below the greatest key, or any that no score is above."""
    low = jnp.full_like(high, rows.ranking.nan)
    none = jnp.zeros_like(high, jnp.int32)
    count = none + rows.total
    return _Bracket(low, high, count, none, none, none, none)


def _next_key(ranking: Ranking, bracket: _Bracket, k: Array) -> Array:
    """Where to count next, see `thresholds`."""
    low, high, count_low, count_high, side, slow, _ = bracket
    real = ranking.real
    over = count_low - k
    over = over.astype(real)
    under = k - count_high
    under = under.astype(real)
    near = 0.1 * (over + under)
    up = jnp.sqrt(under)
    down = -jnp.sqrt(over)
    beyond = jnp.where(under < near, up, 0)
    beyond = jnp.where(over < near, down, beyond)
    wanted = k.astype(real)
    aim = wanted + beyond / 2
    aim = jnp.maximum(aim, 0.5)

    def excess(count: Array, damped: Any) -> Array:
        number = count.astype(real)
        number = jnp.maximum(number, 0.5)
        ratio = number / aim
        weight = jnp.where(damped, 0.5, 1)
        return jnp.log(ratio) * weight

    above = excess(count_low, side < -1)
    below = excess(count_high, side > 1)
    distance = above - below
    distance = jnp.where(distance > 0, distance, 1)
    share = above / distance
    share = jnp.clip(share, 0, 1)
    # the width of a bracket may need one bit more than a signed integer has, and more bits than a
    # float
    width = high - low
    width = width.astype(ranking.unsigned)
    step = share * width
    step = step.astype(width.dtype)
    step = jnp.minimum(step, width)
    followed = low + step.astype(low.dtype)
    shared = low & high
    differing = low ^ high
    halfway = shared + (differing >> 1)  # no overflow
    return jnp.where(slow == 3, halfway + 1, followed)


def _narrowed(rows: Rows, k: Array, start: _Bracket, hints: Sequence[Array]) -> _Found:
    """The end of a search. hints: keys at which the first probes count."""
    ranking = rows.ranking

    def unfinished(bracket: _Bracket) -> Array:
        wide = bracket.low < bracket.high
        unequal = bracket.count_low != k
        return unequal & wide

    def probe(bracket: _Bracket) -> _Bracket:
        key = _next_key(ranking, bracket, k)
        for i, hint in enumerate(hints):
            key = jnp.where(bracket.probes == i, hint, key)
        key = jnp.clip(key, bracket.low + 1, bracket.high)
        count = rows.count_from(key)
        enough = count >= k
        side = bracket.side
        rises = jnp.maximum(side, 0) + 1
        falls = jnp.minimum(side, 0) - 1
        up = bracket._replace(low=key, count_low=count, side=rises)
        down = bracket._replace(high=key - 1, count_high=count, side=falls)
        closer = _where(enough, up, down)
        before = bracket.between(ranking.real)
        after = closer.between(ranking.real)
        hinted = bracket.probes < len(hints)
        halved = 2 * after <= before
        restart = halved | (bracket.slow == 3) | hinted
        side = jnp.where(hinted, 0, closer.side)
        slow = jnp.where(restart, 0, bracket.slow + 1)
        probes = bracket.probes + 1
        closer = closer._replace(side=side, slow=slow, probes=probes)
        return _where(unfinished(bracket), closer, bracket)

    searching = lambda bracket: jnp.any(unfinished(bracket))
    end = lax.while_loop(searching, probe, start)
    return _Found(end.low, end.count_low)


def _where(condition: Array, chosen: _Bracket, other: _Bracket) -> _Bracket:
    either = lambda x, y: jnp.where(condition, x, y)
    return tree_map(either, chosen, other)


# Searches -----------------------------------------------------------------------------------------


class Selection:
    """Searches for the k-th largest score of every group of leaves, and where equal ones are cut.

    ks: one per group, at least 1. Small arrays are searched side by side, the others in turn.
    """

    def __init__(
        self, ranking: Ranking, groups: Sequence[Sequence[Array]], ks: Sequence[Array]
    ) -> None:
        self._batches = _batches(groups)
        self._rows: list[Rows] = []
        self._ks: list[Array] = []
        stacked = self._stacked(groups, jnp.nan, ranking.real)
        for batch, arrays in zip(self._batches, stacked):
            own = jnp.stack([ks[i] for i in batch])
            self._ks.append(trees.varying_like(own, arrays))
            self._rows.append(Rows(ranking, arrays))
        self._found = _search(self._rows, self._ks)

    def _stacked(self, groups: Sequence, fill: Any, dtype: Any) -> list[list[Array]]:
        """The arrays of all batches. fill: behind shorter ones."""
        stacked = []
        for batch in self._batches:
            own = [groups[i] for i in batch]
            if len(own) == 1:
                (arrays,) = own
                stacked.append([array[None] for array in arrays])
                continue
            flat = []
            for (array,) in own:
                array = array.astype(dtype)
                flat.append(array.ravel())
            stacked.append([_stack_padded(flat, fill)])
        return stacked

    def _per_group(self, values: Sequence[Array]) -> list[Array]:
        """One value per group, from those of the batches."""
        result: dict[int, Array] = {}
        for batch, row in zip(self._batches, values):
            result |= zip(batch, row)
        return [result[i] for i in range(len(result))]

    def thresholds(self) -> list[Array]:
        """Keys, each the largest that at least k scores of its group have, or any that exactly k
        have.
        """
        found = [found.threshold for found in self._found]
        return self._per_group(found)

    def cuts(self, positions: Callable[[], Sequence], last: int) -> list[Array]:
        """Positions below which enough equal scores lie: of a group those with keys above the
        threshold, and those that have it and lie below the cut, are k.

        positions: makes those of every entry where they are used: kept for later, they would be
        written to memory. last: above all of them; the cut where none of equal scores is cut off.
        """
        kind = position_type(last // 2)
        stacked = lambda: self._stacked(positions(), last, kind)
        ends = _cut_ties(self._rows, self._ks, self._found, stacked, last)
        return self._per_group(ends)


def _batches(groups: Sequence[Sequence[Array]]) -> list[list[int]]:
    """Which groups are searched side by side: small arrays of similar sizes."""
    batches: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        kind: Any = ("alone", i)
        largest = max(leaf.size for leaf in group)
        if platforms.one_cpu() and len(group) == 1 and largest < _SMALL:
            size = max(largest, _SMALL // 16)
            bits = (size - 1).bit_length()
            kind = bits // 3
        batches.setdefault(kind, []).append(i)
    return list(batches.values())


def _stack_padded(flat: Sequence[Array], fill: Any) -> Array:
    """Vectors as the rows of a matrix."""
    width = max(row.size for row in flat)
    padded = []
    for row in flat:
        missing = width - row.size
        longer = jnp.pad(row, (0, missing), constant_values=fill)
        padded.append(longer)
    return jnp.stack(padded)


def _search(several: Sequence[Rows], ks: Sequence[Array]) -> list[_Found]:
    """The k-th largest score of every search. ks: [searches], of each of several rows.

    Regula falsi with Illinois damping on the logarithm of the count, which is nearly straight in
    the key for the tails of common distributions. Counts between two bounds scatter like the square
    root of their difference: once one bound is that near, the next probe aims a little beyond `k`,
    so that both close in. Probes that do not halve the number of scores in between are followed,
    now and then, by one that halves the bracket, which bounds the worst case.

    One large array starts between two order statistics of a sample, which enclose the k-th largest
    almost surely; the counts tell.
    """
    hints = _sampled(several, ks)
    results: list[_Found] = []
    for rows, k, sampled in zip(several, ks, hints):
        ranking = rows.ranking
        high = jnp.full_like(k, ranking.infinity, ranking.integer)
        if sampled is None:
            high, least = _extremes(rows)
            sampled = [least]
        start = _start(rows, high)
        varying = functools.partial(trees.varying_like, arrays=[k])
        start = tree_map(varying, start)
        if results:
            start = _after(start, results[-1])
        found = _narrowed(rows, k, start, sampled)
        results.append(found)
    return results


def _after(start: _Bracket, found: _Found) -> _Bracket:
    """The same start, known only once another search has ended (counts are never negative).

    XLA's CPU backend would otherwise search all arrays side by side and push each out of the cache:
    one update of a ResNet-18 took 35 to 44 ms, and 30 ms in turn (2 cores, jax 0.10.2).
    """
    ended = found.reached[0] >= 0
    return start._replace(low=jnp.where(ended, start.low, start.high))


def _sampled(several: Sequence[Rows], ks: Sequence[Array]) -> list[list[Array] | None]:
    """Keys that enclose the k-th largest of large arrays, almost surely: high, low; else None."""
    samples: dict[int, Array] = {}
    for i, rows in enumerate(several):
        sample = _sample(rows)
        if sample is not None:
            samples[i] = sample
    hints: list[list[Array] | None] = [None] * len(several)
    if not samples:
        return hints
    ranking = several[0].ranking
    padded = _stack_padded(list(samples.values()), jnp.nan)
    few = Rows(ranking, [padded])
    sizes = np.array([sample.size for sample in samples.values()])
    totals = np.array([several[i].total for i in samples])
    shares = (sizes / totals).astype(np.float32)
    wanted = jnp.concatenate([ks[i] for i in samples])
    expected = wanted.astype(jnp.float32) * shares
    variance = expected * (1 - expected / sizes)
    deviation = jnp.sqrt(variance)
    margin = 3 * deviation + 2
    first = jnp.floor(expected - margin)
    last = jnp.ceil(expected + margin)
    ranks = jnp.stack([first, last])
    ranks = jnp.clip(ranks, 1, sizes)
    greatest, least = _extremes(few)
    start = _start(few, greatest)
    search = jax.vmap(lambda rank: _narrowed(few, rank, start, [least]))
    high, low = search(ranks.astype(jnp.int32)).threshold
    # a rank beyond the sample tells nothing, and the first probe would be lost
    inside = expected > margin
    high = jnp.where(inside, high + 1, ranking.infinity)
    for place, i in enumerate(samples):
        own = slice(place, place + 1)
        hints[i] = [high[own], low[own]]
    return hints


def _sample(rows: Rows) -> Array | None:
    """Some scores of one large array; else None."""
    first, *others = rows.arrays
    if others or len(first) > 1:
        return None
    (array,) = first
    sample = trees.sample(array)
    return None if sample is None else sample.astype(rows.ranking.real)


# Equal scores -------------------------------------------------------------------------------------


def _cut_ties(
    several: Sequence[Rows],
    ks: Sequence[Array],
    found: Sequence[_Found],
    positions: Callable[[], Sequence[Sequence[Array]]],
    last: int,
) -> list[Array]:
    """The smallest cuts, see `Selection.cuts`."""
    kind = position_type(last // 2)
    uncut = [jnp.zeros_like(k, kind) + last for k in ks]
    tied = [result.reached != k for k, result in zip(ks, found)]
    some_tied = [jnp.any(row) for row in tied]

    def cut_ties() -> list[Array]:
        places = []
        for rows, own in zip(several, positions()):
            # in the type that a branch inside `vmap` of `shard_map` gives them
            varying = functools.partial(trees.varying_like, arrays=rows.arrays)
            places.append(list(map(varying, own)))

        def enough(i: int, cut: Array) -> Array:
            """Whether a cut keeps as many scores as asked for, or none are equal."""
            rows = several[i]
            threshold, _ = found[i]

            def kept(scores: Array, position: Array) -> Array:
                reached = rows.at_least(scores, threshold)
                above = rows.at_least(scores, threshold + 1)
                before = position < _along(cut, position)
                counted = above | (reached & before)
                return counted.astype(jnp.int32)

            def count() -> Array:
                number = rows.fold(jnp.add, jnp.sum, kept, places[i])
                return number.astype(jnp.int32)

            number = lax.cond(some_tied[i], count, lambda: ks[i])
            return number >= ks[i]

        def halve(brackets: list) -> list:
            halves = []
            for i, (low, high) in enumerate(brackets):
                middle = low + (high - low) // 2
                below = enough(i, middle)
                above = jnp.minimum(middle + 1, high)
                low = jnp.where(below, low, above)
                high = jnp.where(below, middle, high)
                halves.append((low, high))
            return halves

        def unfinished(brackets: list) -> Array:
            wide = [jnp.any(low < high) for low, high in brackets]
            return jnp.any(jnp.stack(wide))

        brackets = [(jnp.zeros_like(high), high) for high in uncut]
        ends = lax.while_loop(unfinished, halve, brackets)
        return [jnp.where(row, cut, last) for row, (_, cut) in zip(tied, ends)]

    any_tied = jnp.any(jnp.stack(some_tied))
    return lax.cond(any_tied, cut_ties, lambda: uncut)
