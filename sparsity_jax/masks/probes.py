"""The search on a CPU: a dozen or two probes, each a count of `scores >= bound`.

No sort, no gather, no temporary array; under sharding only scalar sums cross devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
        return self.ranking.at_least(scores, _along(key, scores))

    def count_from(self, key: Array) -> Array:
        """How many scores of each search have at least its key; int32."""
        reached = lambda scores: self.at_least(scores, key).astype(jnp.int32)
        return self.fold(jnp.add, jnp.sum, reached).astype(jnp.int32)


def _along(values: Array, rows: Array) -> Array:
    """One value per search, in a shape that broadcasts with `rows`."""
    return values.reshape(len(values), *[1] * (rows.ndim - 1))


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
        return (self.count_low - self.count_high).astype(real)


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
    return high, jnp.minimum(ranking.key(least), high)


def _start(rows: Rows, high: Array) -> _Bracket:
    """Where a search starts: below the greatest key, or any that no score is above."""
    low = jnp.full_like(high, rows.ranking.nan)
    none = jnp.zeros_like(high, jnp.int32)
    return _Bracket(low, high, none + rows.total, none, none, none, none)


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
    aim = k.astype(real) + beyond / 2
    aim = jnp.maximum(aim, 0.5)

    def excess(count: Array, damped: Any) -> Array:
        number = count.astype(real)
        ratio = jnp.maximum(number, 0.5) / aim
        weight = jnp.where(damped, 0.5, 1)
        return jnp.log(ratio) * weight

    above = excess(count_low, side < -1)
    below = excess(count_high, side > 1)
    distance = above - below
    distance = jnp.where(distance > 0, distance, 1)
    share = jnp.clip(above / distance, 0, 1)
    # the width of a bracket may need one bit more than a signed integer has, and more bits than a
    # float
    width = high - low
    width = width.astype(ranking.unsigned)
    step = share * width
    step = step.astype(width.dtype)
    step = jnp.minimum(step, width)
    followed = low + step.astype(low.dtype)
    halfway = (low & high) + ((low ^ high) >> 1)  # no overflow
    return jnp.where(slow == 3, halfway + 1, followed)


def _narrowed(rows: Rows, k: Array, start: _Bracket, hints: Sequence[Array]) -> _Found:
    """The end of a search. hints: keys at which the first probes count."""
    ranking = rows.ranking

    def unfinished(bracket: _Bracket) -> Array:
        wide = bracket.low < bracket.high
        return (bracket.count_low != k) & wide

    def probe(bracket: _Bracket) -> _Bracket:
        key = _next_key(ranking, bracket, k)
        for i, hint in enumerate(hints):
            key = jnp.where(bracket.probes == i, hint, key)
        key = jnp.clip(key, bracket.low + 1, bracket.high)
        count = rows.count_from(key)
        enough = count >= k
        rises = jnp.maximum(bracket.side, 0) + 1
        falls = jnp.minimum(bracket.side, 0) - 1
        up = bracket._replace(low=key, count_low=count, side=rises)
        down = bracket._replace(high=key - 1, count_high=count, side=falls)
        closer = _where(enough, up, down)
        before = bracket.between(ranking.real)
        after = closer.between(ranking.real)
        hinted = bracket.probes < len(hints)
        restart = (2 * after <= before) | (bracket.slow == 3) | hinted
        closer = closer._replace(
            side=jnp.where(hinted, 0, closer.side),
            slow=jnp.where(restart, 0, bracket.slow + 1),
            probes=bracket.probes + 1,
        )
        return _where(unfinished(bracket), closer, bracket)

    searching = lambda bracket: jnp.any(unfinished(bracket))
    bracket = lax.while_loop(searching, probe, start)
    return _Found(bracket.low, bracket.count_low)


def _where(condition: Array, chosen: _Bracket, other: _Bracket) -> _Bracket:
    return tree_map(lambda x, y: jnp.where(condition, x, y), chosen, other)


# Searches -----------------------------------------------------------------------------------------


class Selection:
    """Searches for the k-th largest score of every group of leaves, and where equal ones are cut.

    ks: one per group, at least 1. Small arrays are searched side by side, the others in turn.
    """

    def __init__(
        self, ranking: Ranking, groups: Sequence[Sequence[Array]], ks: Sequence[Array]
    ) -> None:
        self._batches = _batches(groups)
        self._rows = [
            Rows(ranking, arrays) for arrays in self._stacked(groups, jnp.nan, ranking.real)
        ]
        self._ks = [
            trees.varying_like(jnp.stack([ks[i] for i in batch]), rows.arrays)
            for batch, rows in zip(self._batches, self._rows)
        ]
        self._found = _search(self._rows, self._ks)

    def _stacked(self, groups: Sequence, fill: Any, dtype: Any) -> list[list[Array]]:
        """The arrays of all batches. fill: behind shorter ones."""
        stacked = []
        for batch in self._batches:
            arrays = [array[None] for array in groups[batch[0]]]
            if len(batch) > 1:
                flat = [groups[i][0].astype(dtype).ravel() for i in batch]
                arrays = [_stack_padded(flat, fill)]
            stacked.append(arrays)
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
        return self._per_group([found.threshold for found in self._found])

    def cuts(self, positions: Callable[[], Sequence], last: int) -> list[Array]:
        """Positions below which enough equal scores lie: of a group those with keys above the
        threshold, and those that have it and lie below the cut, are k.

        positions: makes those of every entry where they are used: kept for later, they would be
        written to memory. last: above all of them; the cut where none of equal scores is cut off.
        """
        rows = lambda: self._stacked(positions(), last, position_type(last // 2))
        return self._per_group(_cut_ties(self._rows, self._ks, self._found, rows, last))


def _batches(groups: Sequence[Sequence[Array]]) -> list[list[int]]:
    """Which groups are searched side by side: small arrays of similar sizes."""
    batches: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        kind: Any = ("alone", i)
        if platforms.one_cpu() and len(group) == 1 and group[0].size < _SMALL:
            size = max(group[0].size, _SMALL // 16)
            kind = (size - 1).bit_length() // 3
        batches.setdefault(kind, []).append(i)
    return list(batches.values())


def _stack_padded(flat: Sequence[Array], fill: Any) -> Array:
    """Vectors as the rows of a matrix."""
    width = max(row.size for row in flat)
    padded = [jnp.pad(row, (0, width - row.size), constant_values=fill) for row in flat]
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
        if sampled is None:
            high, least = _extremes(rows)
            start, first = _start(rows, high), [least]
        else:
            start = _start(rows, jnp.full_like(k, rows.ranking.infinity, rows.ranking.integer))
            first = sampled
        varying = functools.partial(trees.varying_like, arrays=[k])
        start = tree_map(varying, start)
        if results:
            start = _after(start, results[-1])
        results.append(_narrowed(rows, k, start, first))
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
    samples = {}
    for i, rows in enumerate(several):
        if len(rows.arrays) == 1 and len(rows.arrays[0]) == 1:
            sample = trees.sample(rows.arrays[0][0])
            if sample is not None:
                samples[i] = sample.astype(rows.ranking.real)
    hints: list[list[Array] | None] = [None] * len(several)
    if not samples:
        return hints
    ranking = several[0].ranking
    few = Rows(ranking, [_stack_padded(list(samples.values()), jnp.nan)])
    sizes = jnp.asarray([sample.size for sample in samples.values()])
    shares = jnp.asarray([samples[i].size / several[i].total for i in samples], jnp.float32)
    expected = jnp.concatenate([ks[i] for i in samples]).astype(jnp.float32) * shares
    margin = 3 * jnp.sqrt(expected * (1 - expected / sizes)) + 2
    ranks = jnp.stack([jnp.floor(expected - margin), jnp.ceil(expected + margin)])
    ranks = jnp.clip(ranks, 1, sizes).astype(jnp.int32)
    greatest, least = _extremes(few)
    start = _start(few, greatest)
    search = jax.vmap(lambda k: _narrowed(few, k, start, [least]).threshold)
    high, low = search(ranks)
    # a rank beyond the sample tells nothing, and the first probe would be lost
    high = jnp.where(expected > margin, high + 1, ranking.infinity)
    for place, i in enumerate(samples):
        hints[i] = [high[place : place + 1], low[place : place + 1]]
    return hints


# Equal scores -------------------------------------------------------------------------------------


def _cut_ties(
    several: Sequence[Rows],
    ks: Sequence[Array],
    found: Sequence[_Found],
    positions: Callable[[], Sequence[Sequence[Array]]],
    last: int,
) -> list[Array]:
    """The smallest cuts, see `Selection.cuts`."""
    uncut = [jnp.zeros_like(k, position_type(last // 2)) + last for k in ks]
    tied = [result.reached != k for k, result in zip(ks, found)]
    some_tied = [jnp.any(row) for row in tied]

    def cut_ties() -> list[Array]:
        # in the type that a branch inside `vmap` of `shard_map` gives them
        places = [
            [trees.varying_like(position, rows.arrays) for position in own]
            for rows, own in zip(several, positions())
        ]

        def kept(i: int, cut: Array) -> Array:
            """How many scores the cut keeps; as many as asked for where none are equal."""
            rows, threshold = several[i], found[i].threshold

            def counted(scores: Array, position: Array) -> Array:
                reached = rows.at_least(scores, threshold)
                above = rows.at_least(scores, threshold + 1)
                before = position < _along(cut, position)
                return (above | (reached & before)).astype(jnp.int32)

            count = lambda: rows.fold(jnp.add, jnp.sum, counted, places[i]).astype(jnp.int32)
            return lax.cond(some_tied[i], count, lambda: ks[i])

        def halve(brackets: list) -> list:
            halves = []
            for i, (low, high) in enumerate(brackets):
                middle = low + (high - low) // 2
                enough = kept(i, middle) >= ks[i]
                upper = jnp.where(enough, low, jnp.minimum(middle + 1, high))
                halves.append((upper, jnp.where(enough, middle, high)))
            return halves

        unfinished = lambda brackets: jnp.any(
            jnp.stack([jnp.any(low < high) for low, high in brackets])
        )
        brackets = [(jnp.zeros_like(high), high) for high in uncut]
        ends = lax.while_loop(unfinished, halve, brackets)
        return [jnp.where(row, cut, last) for row, (_, cut) in zip(tied, ends)]

    return lax.cond(jnp.any(jnp.stack(some_tied)), cut_ties, lambda: uncut)
