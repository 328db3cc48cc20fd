"""The search for the k-th largest score.

Floats order like integers ("keys"), so the k-th largest of n entries is found by counting `scores
>= bound` for a dozen or two bounds: no sort, no gather, no temporary array, no concatenation of a
tree's leaves; under sharding only scalar sums cross devices. `k` may be traced, so one compilation
serves every pruning ratio.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_leaves, tree_map

from sparsity_jax import trees
from sparsity_jax.types import PyTree

__all__ = ["Bracket", "Count", "Ranking", "checked_count", "compiled", "kth_key"]

Count = int | Array

# What users call outside `jit` compiles once per shape, instead of its loops at every call; inside
# it nothing changes.
compiled = functools.partial(jax.jit, static_argnames="magnitude", inline=True)


# The order of scores ------------------------------------------------------------------------------


class Ranking:
    """Scores in order, by integer keys: of zero 0, of the n-th normal above it n, of NaN the
    least.
    """

    def __init__(self, scores: PyTree, magnitude: bool = False) -> None:
        leaves = [jnp.asarray(leaf) for leaf in tree_leaves(scores)]
        self.leaves = [leaf for leaf in leaves if leaf.size]
        self.total = trees.size(leaves)
        self.magnitude = magnitude
        self.real = _common_type(self.leaves)  # narrower types convert exactly
        kind = np.finfo(self.real)
        self.integer = jnp.dtype(f"int{kind.bits}")
        # subnormals count as zero, on every device alike
        self.skipped = 2**kind.nmant - 1
        largest = kind.smallest_normal * (1 - kind.eps)
        self.subnormal = np.asarray(largest, self.real)
        infinite = np.asarray(np.inf, self.real)
        bits = int(infinite.view(self.integer))
        self.infinity = bits - self.skipped
        self.nan = -1 if magnitude else -self.infinity - 1

    def bound(self, key: Array) -> Array:
        """The smallest score whose key is at least `key`."""
        zero = key == 0
        bits = jnp.abs(key) + self.skipped
        bits = jnp.where(zero, 0, bits)
        bits = bits.astype(self.integer)
        size = lax.bitcast_convert_type(bits, self.real)
        score = jnp.where(key < 0, -size, size)
        return jnp.where(zero, -self.subnormal, score)

    def key(self, score: Array) -> Array:
        """The key of a scalar score."""
        size = jnp.abs(score)
        bits = lax.bitcast_convert_type(size, self.integer)
        key = jnp.maximum(bits - self.skipped, 0)
        key = jnp.where(score < 0, -key, key)
        unknown = jnp.isnan(score)
        return jnp.where(unknown, self.nan, key)

    def size(self, scores: Array) -> Array:
        """What is ranked of scores."""
        scores = scores.astype(self.real)
        return jnp.abs(scores) if self.magnitude else scores

    def at_least(self, scores: Array, key: Array) -> Array:
        """Whether every score has at least this key; bool, elementwise."""
        scores = scores.astype(self.real)
        bound = self.bound(key)
        reached = scores >= bound
        if self.magnitude:  # not of absolute values, which CPUs would write to memory first
            reached = reached | (scores <= -bound)
        return reached | (key == self.nan)

    def fold(self, combine: Callable, reduce: Callable, function: Callable) -> Array:
        """`trees.fold` over all scores."""
        of_leaf = functools.partial(trees.fold, combine, reduce, function)
        return functools.reduce(combine, map(of_leaf, self.leaves))

    def count(self, key: Array) -> Array:
        """How many scores have at least this key."""

        def reached(leaf: Array) -> Array:
            return self.at_least(leaf, key).astype(jnp.int32)

        number = self.fold(jnp.add, jnp.sum, reached)
        return number.astype(jnp.int32)


def _common_type(leaves: list[Array]) -> Any:
    """In which scores are compared; raises for scores that cannot be ranked."""
    most = np.iinfo(np.int32).max
    types = {leaf.dtype for leaf in leaves}
    if not types:
        raise ValueError("scores are empty; selection needs at least one entry.")
    if trees.size(leaves) > most:
        raise ValueError(f"scores have more than {most} entries; split the tree.")
    for kind in types:
        if not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"scores are {kind}; selection needs floating-point scores.")
    double = jnp.dtype(jnp.float64)
    if double not in types:
        return jnp.dtype(jnp.float32)
    if len(types) > 1:
        raise TypeError("scores mix float64 with narrower types; convert them to one type.")
    return double


def checked_count(scores: PyTree, k: Count, lowest: int = 0) -> Array:
    """`k` as an array; raises what `k_largest_mask` does, here where numbers outside `jit` are
    known.
    """
    trees.check_finite(scores, "scores", infinite=True)
    total = Ranking(scores).total
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


# The search ---------------------------------------------------------------------------------------


class Bracket(NamedTuple):
    """count_low scores have key >= low, at least k; count_high of them key > high, fewer than k.

    side: times in a row that low (> 0) or high (< 0) moved. slow: probes since the scores in
    between were halved.
    """

    low: Array
    high: Array
    count_low: Array
    count_high: Array
    side: Array
    slow: Array

    def between(self, real: Any) -> Array:
        """The number of scores that may still be the k-th largest."""
        return (self.count_low - self.count_high).astype(real)


def _whole_bracket(ranking: Ranking, k: Array) -> Bracket:
    """Where the search starts: at the least and the greatest number."""

    def number_or(other: float) -> Callable:
        def score(leaf: Array) -> Array:
            unknown = jnp.isnan(leaf)
            return jnp.where(unknown, other, ranking.size(leaf))

        return score

    greatest = ranking.fold(jnp.maximum, jnp.max, number_or(-jnp.inf))
    least = ranking.fold(jnp.minimum, jnp.min, number_or(jnp.inf))
    high = ranking.key(greatest)
    low = ranking.key(least)
    low = jnp.minimum(low, high)
    count = ranking.count(low)  # fewer than all if there are NaNs
    inside = count >= k
    low = jnp.where(inside, low, ranking.nan)
    low = low.astype(ranking.integer)
    high = jnp.where(inside, high, low)
    count = jnp.where(inside, count, ranking.total)
    none = jnp.zeros_like(count)
    return Bracket(low, high, count, none, none, none)


def _sampled_bracket(ranking: Ranking, sample: Array, k: Array) -> Bracket:
    """Where the search starts in one large array: at two order statistics of a sample that enclose
    the k-th largest almost surely; the counts tell.
    """
    size = sample.size
    few = Ranking(sample, ranking.magnitude)
    share = size / ranking.total
    expected = k.astype(jnp.float32) * share
    variance = expected * (1 - expected / size)
    margin = 3 * jnp.sqrt(variance) + 2
    first = jnp.floor(expected - margin)
    last = jnp.ceil(expected + margin)
    ranks = jnp.stack([first, last])
    ranks = jnp.clip(ranks, 1, size).astype(jnp.int32)
    search = jax.vmap(lambda rank: kth_key(few, rank))
    (high, low), _ = search(ranks)
    above = ranking.count(high + 1)
    count = ranking.count(low)
    below = (above < k) & (first >= 1)
    inside = count >= k
    low = jnp.where(inside, low, ranking.nan)
    high = jnp.where(below, high, ranking.infinity)
    count = jnp.where(inside, count, ranking.total)
    above = jnp.where(below, above, 0)
    none = jnp.zeros_like(count)
    return Bracket(low, high, count, above, none, none)


def _next_key(ranking: Ranking, bracket: Bracket, k: Array) -> Array:
    """Where to count next, see `kth_key`."""
    low, high, count_low, count_high, side, slow = bracket
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
    width = width.astype(f"u{ranking.integer}")
    step = share * width
    step = step.astype(width.dtype)
    step = jnp.minimum(step, width)
    followed = low + step.astype(low.dtype)
    halfway = (low & high) + ((low ^ high) >> 1)  # no overflow
    key = jnp.where(slow == 3, halfway + 1, followed)
    return jnp.clip(key, low + 1, high)


def kth_key(ranking: Ranking, k: Array) -> tuple[Array, Array]:
    """(t, number of scores with key >= t): t is the largest key that has at least `k`, or any that
    has exactly `k`.

    Regula falsi with Illinois damping on the logarithm of the count, which is nearly straight in
    the key for the tails of common distributions. Counts between two bounds scatter like the square
    root of their difference: once one bound is that near, the next probe aims a little beyond `k`,
    so that both close in. Probes that do not halve the number of scores in between are followed,
    now and then, by one that halves the bracket, which bounds the worst case.
    """

    def unfinished(bracket: Bracket) -> Array:
        wide = bracket.low < bracket.high
        return (bracket.count_low != k) & wide

    def probe(bracket: Bracket) -> Bracket:
        low, high, count_low, count_high, side, slow = bracket
        key = _next_key(ranking, bracket, k)
        count = ranking.count(key)
        enough = count >= k
        rises = jnp.maximum(side, 0) + 1
        falls = jnp.minimum(side, 0) - 1
        below = key - 1
        up = Bracket(key, high, count, count_high, rises, slow)
        down = Bracket(low, below, count_low, count, falls, slow)
        nearer = lambda if_up, if_down: jnp.where(enough, if_up, if_down)
        closer = tree_map(nearer, up, down)
        before = bracket.between(ranking.real)
        after = closer.between(ranking.real)
        restart = (2 * after <= before) | (slow == 3)
        slow = jnp.where(restart, 0, slow + 1)
        return closer._replace(slow=slow)

    def loop(bracket: Bracket) -> Bracket:
        return lax.while_loop(unfinished, probe, bracket)

    first, *others = ranking.leaves
    sample = None if others else trees.sample(first)
    if sample is None:
        start = _whole_bracket(ranking, k)
        bracket = loop(start)
        return bracket.low, bracket.count_low
    bracket = _sampled_bracket(ranking, sample, k)
    same = lambda bracket: bracket
    for advance in [probe] * 6 + [loop]:  # a loop copies the scores it closes over, `cond` does not
        bracket = lax.cond(unfinished(bracket), advance, same, bracket)
    return bracket.low, bracket.count_low
