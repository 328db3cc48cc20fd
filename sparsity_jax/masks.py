"""Selection without sorting: the k largest of an array or of a whole tree, and the masks made of
them.

One order holds everywhere: numbers by size, subnormals as zero, NaN below every number, and below
NaN what an earlier mask (`before=`) left out. So NaN is the first to go and stays only where more
entries are asked for than there are numbers. Outside `jit` NaN is refused, with the path of its
array.

Floats order like integers ("keys"), so the k-th largest of n entries is found by counting `scores
>= bound` for a dozen or two bounds: no sort, no gather, no temporary array, no concatenation of a
tree's leaves; under sharding only scalar sums cross devices. `k` may be traced, so one compilation
serves every pruning ratio.

A mask is a tree of bool arrays, True = keep, with the structure of the tree it applies to.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sparsity_jax import trees
from sparsity_jax.trees import varying_like
from sparsity_jax.types import PyTree

Count = int | Array
Rounding = Literal["floor", "nearest", "ceil"]
ROUNDINGS: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "nearest": round,  # a half to even
    "ceil": math.ceil,
}


def count_of(share: float, total: int, rounding: Rounding = "nearest") -> int:
    """`share` of `total` things, where a decimal share means what it says: 0.29 of 100 are 29 by
    `floor`, not 28.

    share: on the host. A product within rounding errors (of a few units in the last place) of a
    whole or a half counts as that. rounding: a row of ROUNDINGS.
    """
    decimal = float(str(share))  # of a float32, not the nearest binary fraction
    product = decimal * total
    halves = round(2 * product)
    if math.isclose(2 * product, halves, rel_tol=8 * np.finfo(float).eps):
        product = halves / 2
    return ROUNDINGS[rounding](product)


def num_pruned(ratio: float, size: int) -> int:
    """How many of a layer's `size` filters, channels or weights go: min(ceil(ratio * size), size -
    1), where 0.28 of 25 are 7. `originals.num_pruned` is the published code's.
    """
    wanted = count_of(ratio, size, "ceil")
    return min(wanted, size - 1)


# What users call outside `jit` compiles once per shape, instead of its loops at every call; inside
# it nothing changes.
_compiled = functools.partial(jax.jit, static_argnames="magnitude", inline=True)


# The order of scores ------------------------------------------------------------------------------


class _Ranking:
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
        infinite = np.asarray(np.inf, self.real)
        self.infinity = int(infinite.view(self.integer)) - self.skipped
        self.nan = -1 if magnitude else -self.infinity - 1

    def bound(self, key: Array) -> Array:
        """The smallest score whose key is at least `key`."""
        bits = jnp.where(key == 0, 0, jnp.abs(key) + self.skipped)
        value = lax.bitcast_convert_type(bits.astype(self.integer), self.real)
        kind = np.finfo(self.real)
        largest_subnormal = jnp.asarray(kind.smallest_normal * (1 - kind.eps), self.real)
        signed = jnp.where(key < 0, -value, value)
        return jnp.where(key == 0, -largest_subnormal, signed)

    def value(self, key: Array) -> Array:
        """The score of `key`."""
        number = jnp.where(key == 0, 0, self.bound(key))
        value = jnp.where(key == self.nan, jnp.nan, number)
        return value.astype(jnp.result_type(*self.leaves))

    def key(self, score: Array) -> Array:
        """The key of a scalar score."""
        bits = lax.bitcast_convert_type(jnp.abs(score), self.integer)
        key = jnp.maximum(bits - self.skipped, 0)
        key = jnp.where(score < 0, -key, key)
        return jnp.where(jnp.isnan(score), self.nan, key)

    def size(self, scores: Array) -> Array:
        """What is ranked of scores."""
        scores = scores.astype(self.real)
        return jnp.abs(scores) if self.magnitude else scores

    def at_least(self, scores: Array, key: Array) -> Array:
        """Whether every score has at least this key; bool, elementwise."""
        return (self.size(scores) >= self.bound(key)) | (key == self.nan)

    def fold(self, combine: Callable, reduce: Callable, function: Callable) -> Array:
        """`trees.fold` over all scores."""
        parts = [trees.fold(combine, reduce, function, leaf) for leaf in self.leaves]
        return functools.reduce(combine, parts)

    def count(self, key: Array) -> Array:
        """How many scores have at least this key."""
        reached = lambda leaf: self.at_least(leaf, key).astype(jnp.int32)
        return self.fold(jnp.add, jnp.sum, reached).astype(jnp.int32)


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
    doubles = {kind == jnp.float64 for kind in types}
    if len(doubles) > 1:
        raise TypeError("scores mix float64 with narrower types; convert them to one type.")
    return jnp.dtype(jnp.float64 if doubles.pop() else jnp.float32)


# The search for the k-th largest ------------------------------------------------------------------


class _Bracket(NamedTuple):
    """count_low scores have key >= low, at least k; count_high of them key > high, fewer than k.

    side: times in a row that low (> 0) or high (< 0) moved. slow: probes since the scores in
    between were halved.
    """

    low: Array
    high: Array
    count_low: Array
    count_high: Array
    side: Count = 0
    slow: Count = 0


def _bracket(ranking: _Ranking, k: Array) -> _Bracket:
    """Where the search starts: at the least and the greatest number."""

    def number_or(other: float) -> Callable:
        return lambda leaf: jnp.where(jnp.isnan(leaf), other, ranking.size(leaf))

    greatest = ranking.fold(jnp.maximum, jnp.max, number_or(-jnp.inf))
    least = ranking.fold(jnp.minimum, jnp.min, number_or(jnp.inf))
    high = ranking.key(greatest)
    low = jnp.minimum(ranking.key(least), high)
    count = ranking.count(low)  # fewer than all if there are NaNs
    inside = count >= k
    low = jnp.where(inside, low, ranking.nan).astype(ranking.integer)
    high = jnp.where(inside, high, low)
    count = jnp.where(inside, count, ranking.total)
    return _Bracket(low, high, count, jnp.zeros_like(count))


def _sampled_bracket(ranking: _Ranking, sample: Array, k: Array) -> _Bracket:
    """Where the search starts in one large array: at two order statistics of a sample that enclose
    the k-th largest almost surely; the counts tell.
    """
    expected = k.astype(jnp.float32) * (sample.size / ranking.total)
    margin = 3 * jnp.sqrt(expected * (1 - expected / sample.size)) + 2
    first = jnp.floor(expected - margin).astype(jnp.int32)
    last = jnp.ceil(expected + margin).astype(jnp.int32)
    ranks = jnp.clip(jnp.stack([first, last]), 1, sample.size)
    few = _Ranking(sample, ranking.magnitude)
    high, low = jax.vmap(lambda rank: _search(few, rank)[0])(ranks)
    above = ranking.count(high + 1)
    count = ranking.count(low)
    below = (above < k) & (first >= 1)
    inside = count >= k
    return _Bracket(
        jnp.where(inside, low, ranking.nan),
        jnp.where(below, high, ranking.infinity),
        jnp.where(inside, count, ranking.total),
        jnp.where(below, above, 0),
    )


def _next_key(ranking: _Ranking, bracket: _Bracket, k: Array) -> Array:
    """Where to count next, see `_search`."""
    low, high, count_low, count_high, side, slow = bracket
    real = ranking.real
    over = (count_low - k).astype(real)
    under = (k - count_high).astype(real)
    near = 0.1 * (over + under)
    beyond = jnp.where(under < near, jnp.sqrt(under), 0)
    beyond = jnp.where(over < near, -jnp.sqrt(over), beyond)
    aim = jnp.maximum(k.astype(real) + beyond / 2, 0.5)

    def excess(count: Array, damped: Any) -> Array:
        ratio = jnp.maximum(count.astype(real), 0.5) / aim
        return jnp.log(ratio) * jnp.where(damped, 0.5, 1)

    above = excess(count_low, side < -1)
    below = excess(count_high, side > 1)
    distance = jnp.where(above > below, above - below, 1)
    share = jnp.clip(above / distance, 0, 1)
    # the width of a bracket may need one bit more than a signed integer has, and more bits than a
    # float
    width = (high - low).astype(f"u{ranking.integer}")
    step = jnp.minimum((share * width).astype(width.dtype), width)
    halfway = (low & high) + ((low ^ high) >> 1)  # no overflow
    key = jnp.where(slow == 3, halfway + 1, low + step.astype(low.dtype))
    return jnp.clip(key, low + 1, high)


def _ends(bracket: _Bracket) -> tuple[Array, Array]:
    return bracket.low, bracket.count_low


def _search(ranking: _Ranking, k: Array) -> tuple[Array, Array]:
    """(t, number of scores with key >= t): t is the largest key that has at least `k`, or any that
    has exactly `k`.

    Regula falsi with Illinois damping on the logarithm of the count, which is nearly straight in
    the key for the tails of common distributions. Counts between two bounds scatter like the square
    root of their difference: once one bound is that near, the next probe aims a little beyond `k`,
    so that both close in. Probes that do not halve the number of scores in between are followed,
    now and then, by one that halves the bracket, which bounds the worst case.
    """

    def unfinished(bracket: _Bracket) -> Array:
        return (bracket.count_low != k) & (bracket.low < bracket.high)

    def probe(bracket: _Bracket) -> _Bracket:
        low, high, count_low, count_high, side, slow = bracket
        key = _next_key(ranking, bracket, k)
        count = ranking.count(key)
        enough = count >= k
        up = _Bracket(key, high, count, count_high, jnp.maximum(side, 0) + 1)
        down = _Bracket(low, key - 1, count_low, count, jnp.minimum(side, 0) - 1)
        closer = tree_map(lambda x, y: jnp.where(enough, x, y), up, down)
        between = (count_low - count_high).astype(ranking.real)
        left = (closer.count_low - closer.count_high).astype(ranking.real)
        restart = (2 * left <= between) | (slow == 3)
        return closer._replace(slow=jnp.where(restart, 0, slow + 1))

    def loop(bracket: _Bracket) -> _Bracket:
        return lax.while_loop(unfinished, probe, bracket)

    several = len(ranking.leaves) > 1
    sample = None if several else trees.sample(ranking.leaves[0])
    bracket = _bracket(ranking, k) if sample is None else _sampled_bracket(ranking, sample, k)
    bracket = bracket._replace(side=jnp.zeros_like(k), slow=jnp.zeros_like(k))
    if sample is None:
        return _ends(loop(bracket))
    # a loop copies the scores it closes over, `cond` does not
    for advance in [probe] * 6 + [loop]:
        bracket = lax.cond(unfinished(bracket), advance, lambda bracket: bracket, bracket)
    return _ends(bracket)


def _checked(scores: PyTree, k: Count, lowest: int = 0) -> Array:
    """`k` as an array; raises what `k_largest_mask` does, here where numbers outside `jit` are
    known.
    """
    trees.check_finite(scores, "scores", infinite=True)
    total = _Ranking(scores).total
    if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(
            f"k is {k}, which is no integer; a share of all scores must be made a number first."
        )
    known = lowest if isinstance(k, jax.core.Tracer) else np.asarray(k)
    if np.any((known < lowest) | (known > total)):
        raise ValueError(f"k is {k}; allowed: {lowest} to {total}, the number of scores.")
    return jnp.asarray(k, jnp.int32)


def kth_largest(scores: PyTree, k: Count, *, magnitude: bool = False) -> Array:
    """The k-th largest of all entries of `scores`, exactly.

    scores: an array or a tree of arrays of floats, any shapes; NaN counts as smallest, subnormals
    of float32 and float64 as zero.
    k: int in 1..n, or an integer array of any shape (several answers in one pass); may be traced,
        then it is clipped.
    magnitude: rank, and return, absolute values without computing them first.
    Its derivative is that of the entry it returns, of equal ones their mean.
    Returns an array of k's shape and the scores' type. Raises ValueError for empty scores, a k
    outside 1..n and, outside `jit`, NaN; TypeError for scores that are no floats.
    """
    return _kths(scores, _checked(scores, k, lowest=1), magnitude=magnitude)


@_compiled
def _kths(scores: PyTree, k: Array, magnitude: bool) -> Array:
    leaves = _Ranking(scores).leaves
    kth = lambda k: _kth(leaves, k, magnitude)
    if not k.ndim:
        return kth(k)
    return jax.vmap(kth)(k.ravel()).reshape(k.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kth(leaves: list[Array], k: Array, magnitude: bool) -> Array:
    ranking = _Ranking(leaves, magnitude)
    wanted = jnp.clip(k, 1, ranking.total)
    threshold, _ = _search(ranking, varying_like(wanted, leaves))

    def size_if_kept(leaf: Array) -> Array:
        kept = ranking.at_least(leaf, threshold) & ~jnp.isnan(leaf)
        return jnp.where(kept, ranking.size(leaf), jnp.inf)

    least = ranking.fold(jnp.minimum, jnp.min, size_if_kept)
    least_number = jnp.asarray(ranking.nan + 1, threshold.dtype)
    enough = ranking.count(least_number) >= k
    exact = jnp.where(enough, ranking.key(least), ranking.nan)
    return ranking.value(exact)


@_kth.defjvp
def _kth_derivative(magnitude: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """That of the entry which is the k-th largest; the mean of those of equal ones."""
    leaves, k = primals
    value = _kth(leaves, k, magnitude)
    number = change = jnp.zeros(())
    for leaf, tangent in zip(leaves, tangents[0]):
        sign = jnp.sign(leaf) if magnitude else jnp.ones_like(leaf)
        hit = leaf == sign * value
        number += jnp.sum(hit)
        change += jnp.sum(jnp.where(hit, sign * tangent, 0))
    return value, (change / jnp.maximum(number, 1)).astype(value.dtype)


# Masks --------------------------------------------------------------------------------------------


def _cut(ranking: _Ranking, positions: Callable[[], list], k: Array) -> tuple[Array, Array]:
    """(threshold, cut): the k largest have keys above the threshold, or that one and a position
    below the cut.
    """
    wanted = varying_like(jnp.clip(k, 1, ranking.total), ranking.leaves)
    threshold, count = _search(ranking, wanted)
    # above the position of every entry
    last = jnp.full_like(wanted, 2 * ranking.total, _position_type(ranking.total))

    def cut_ties() -> Array:
        """The smallest cut with enough entries above the threshold, or tied before the cut."""
        places = [position for position in positions() if position.size]
        missing = wanted - ranking.count(threshold + 1)

        def tied_before(cut: Array) -> Any:
            def tied(leaf: Array, position: Array) -> Array:
                reached = ranking.at_least(leaf, threshold)
                above = ranking.at_least(leaf, threshold + 1)
                return (reached & ~above & (position < cut)).astype(jnp.int32)

            return sum(map(functools.partial(trees.fold_sum, tied), ranking.leaves, places))

        def halve(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = low + (high - low) // 2
            enough = tied_before(middle) >= missing
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        unfinished = lambda bracket: bracket[0] < bracket[1]
        return lax.while_loop(unfinished, halve, (jnp.zeros_like(last), last))[1]

    # `cond`, not a loop that ends at once: a loop copies the scores it closes over
    cut = lax.cond(count != wanted, cut_ties, lambda: last)
    return jnp.where(k > 0, threshold, ranking.infinity), jnp.where(k > 0, cut, 0)


def _position_type(total: int) -> Any:
    """Of integers up to twice the number of entries; CPUs compare signed ones faster."""
    return jnp.int32 if 2 * total < 2**31 else jnp.uint32


def _positions(leaves: list[Array], before: list[Array]) -> list[Array]:
    """Of equal scores those of lower position come first: the index in the concatenation of the
    flattened leaves, behind all others where a mask of `before` is False.
    """
    total = trees.size(leaves)
    integer = _position_type(total)
    number = lambda value: jnp.asarray(value, integer)
    positions = []
    offset = 0
    for leaf in leaves:
        position = jnp.full(leaf.shape, offset, integer)
        for axis in range(leaf.ndim):
            stride = number(math.prod(leaf.shape[axis + 1 :]))
            position = position + stride * lax.broadcasted_iota(integer, leaf.shape, axis)
        positions.append(position)
        offset += leaf.size
    if not before:
        return positions
    behind = lambda position, kept: position + number(total) * (~kept).astype(integer)
    return list(map(behind, positions, before))


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
    return _mask(scores, _checked(scores, k), before, magnitude=magnitude)


@_compiled
def _mask(scores: PyTree, k: Array, before: PyTree | None, magnitude: bool) -> PyTree:
    constant = lambda leaf: lax.stop_gradient(jnp.asarray(leaf))
    ranked = scores = tree_map(constant, scores)
    if before is not None:
        lowest = lambda leaf, kept: jnp.where(kept, leaf, jnp.nan)
        ranked = tree_map(lowest, scores, before)
    leaves, structure = tree_flatten(ranked)
    # made where they are used: kept for later, they would be written to memory
    positions = lambda: _positions(leaves, tree_leaves(before))
    ranking = _Ranking(ranked, magnitude)
    threshold, cut = _cut(ranking, positions, k)

    def kept(leaf: Array, position: Array) -> Array:
        above = ranking.at_least(leaf, threshold + 1)
        reached = ranking.at_least(leaf, threshold)
        return above | (reached & (position < cut))

    return tree_unflatten(structure, map(kept, leaves, positions()))


def random_mask(key: Array, tree: PyTree, k: Count, *, before: PyTree | None = None) -> PyTree:
    """True on exactly `k` entries of `tree`, drawn uniformly; of those that a mask `before` leaves
    out only if it must.

    before: in the structure of `tree`.
    """
    leaves, structure = tree_flatten(tree)
    keys = jax.random.split(key, len(leaves))
    uniform = [jax.random.uniform(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    scores = tree_unflatten(structure, uniform)
    if before is not None:
        behind = lambda score, kept: jnp.where(kept, score, score - 1)
        scores = tree_map(behind, scores, before)
    return k_largest_mask(scores, k)


def full(tree: PyTree) -> PyTree:
    """The mask that keeps everything."""
    return tree_map(lambda leaf: jnp.ones(leaf.shape, bool), tree)


def nonzero(params: PyTree) -> PyTree:
    """Masks of what is left of a pruned network: True where a kernel is not zero, and in all other
    arrays.
    """

    def mask(path: str, leaf: Array) -> Array:
        if trees.is_kernel(path):
            return jnp.asarray(leaf) != 0
        return jnp.ones(leaf.shape, bool)

    return trees.map_named(mask, params)


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
