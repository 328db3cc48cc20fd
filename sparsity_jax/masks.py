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

from sparsity_jax import trees

PyTree = Any
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
    product = (
        float(str(share)) * total
    )  # of a float32 its decimal, not the nearest binary fraction's
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


class Selection(NamedTuple):
    """The k largest entries of a tree: those above the key `threshold`, and tied ones at a flat
    index below `cut`.
    """

    threshold: jax.Array
    cut: jax.Array


class _Order(NamedTuple):
    """How the scores of one float type map to integer keys: zero to 0, the n-th normal above it to
    n, NaN below all.
    """

    real: Any  # float32 or float64: narrower types convert exactly
    integer: Any
    skipped: int  # subnormals count as zero, on every device alike
    infinity: int  # key of inf
    nan: int  # key of NaN
    magnitude: bool

    def bound(self, key: jax.Array) -> jax.Array:
        """The smallest score whose key is at least `key`."""
        bits = jnp.where(key == 0, 0, jnp.abs(key) + self.skipped).astype(self.integer)
        value = jax.lax.bitcast_convert_type(bits, self.real)
        largest_subnormal = jnp.asarray(
            np.finfo(self.real).smallest_normal * (1 - np.finfo(self.real).eps), self.real
        )
        return jnp.where(key == 0, -largest_subnormal, jnp.where(key < 0, -value, value))

    def value(self, key: jax.Array, dtype: Any) -> jax.Array:
        """The score of `key`."""
        value = jnp.where(key == self.nan, jnp.nan, jnp.where(key == 0, 0, self.bound(key)))
        return value.astype(dtype)

    def key(self, score: jax.Array) -> jax.Array:
        """The key of a scalar score."""
        bits = jax.lax.bitcast_convert_type(jnp.abs(score), self.integer)
        key = jnp.maximum(bits - self.skipped, 0)
        return jnp.where(jnp.isnan(score), self.nan, jnp.where(score < 0, -key, key))

    def at_least(self, scores: jax.Array, key: jax.Array) -> jax.Array:
        """Whether every score has at least this key; bool, elementwise."""
        bound, scores = self.bound(key), scores.astype(self.real)
        found = (scores >= bound) | (scores <= -bound) if self.magnitude else scores >= bound
        return found | (key == self.nan)


def _order_of(leaves: list[jax.Array], magnitude: bool) -> _Order:
    if not leaves:
        raise ValueError("scores are empty; selection needs at least one entry.")
    if sum(leaf.size for leaf in leaves) > np.iinfo(np.int32).max:
        raise ValueError(f"scores have more than {np.iinfo(np.int32).max} entries; split the tree.")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"scores are {leaf.dtype}; selection needs floating-point scores.")
    wide = {leaf.dtype == jnp.float64 for leaf in leaves}
    if len(wide) > 1:
        raise TypeError("scores mix float64 with narrower types; convert them to one type.")
    real, integer, mantissa = (
        (jnp.float64, jnp.int64, 52) if wide.pop() else (jnp.float32, jnp.int32, 23)
    )
    skipped = 2**mantissa - 1
    infinity = int(np.asarray(np.inf, real).view(integer)) - skipped
    return _Order(real, integer, skipped, infinity, -1 if magnitude else -infinity - 1, magnitude)


def _leaves(scores: PyTree) -> list[jax.Array]:
    return [leaf for leaf in map(jnp.asarray, jax.tree.leaves(scores)) if leaf.size]


def _count(order: _Order, leaves: list[jax.Array], key: jax.Array) -> jax.Array:
    """How many scores have at least this key."""
    found = lambda leaf: order.at_least(leaf, key).astype(jnp.int32)
    return sum(trees.fold_sum(found, leaf) for leaf in leaves).astype(jnp.int32)


def _extreme(order: _Order, leaves: list[jax.Array], combine, reduce) -> jax.Array:
    """Key of the least or greatest score that is not NaN."""
    start = jnp.inf if combine is jnp.minimum else -jnp.inf
    size = jnp.abs if order.magnitude else lambda x: x
    number = lambda leaf: jnp.where(jnp.isnan(leaf), start, size(leaf.astype(order.real)))
    return order.key(
        functools.reduce(combine, [trees.fold(combine, reduce, number, leaf) for leaf in leaves])
    )


class _Bracket(NamedTuple):
    """count_low scores have key >= low, at least k; count_high of them key > high, fewer than k."""

    low: jax.Array
    high: jax.Array
    count_low: jax.Array
    count_high: jax.Array


def _bracket(order: _Order, leaves: list[jax.Array], k: jax.Array) -> _Bracket:
    """Where the search for the k-th largest starts."""
    total = jnp.asarray(sum(leaf.size for leaf in leaves), jnp.int32)
    if len(leaves) == 1 and (sample := trees.sample(leaves[0])) is not None:
        # two order statistics of a sample that enclose the k-th largest almost surely; the counts
        # tell
        expected = k.astype(jnp.float32) * (sample.size / leaves[0].size)
        margin = 3 * jnp.sqrt(expected * (1 - expected / sample.size)) + 2
        ranks = jnp.stack([jnp.floor(expected - margin), jnp.ceil(expected + margin)]).astype(
            jnp.int32
        )
        nearby = jax.vmap(lambda rank: _search(order, [sample], rank)[0])
        high, low = nearby(jnp.clip(ranks, 1, sample.size))
        above, count = _count(order, leaves, high + 1), _count(order, leaves, low)
        below, inside = (above < k) & (ranks[0] >= 1), count >= k
        return _Bracket(
            jnp.where(inside, low, order.nan),
            jnp.where(below, high, order.infinity),
            jnp.where(inside, count, total),
            jnp.where(below, above, 0),
        )
    high = _extreme(order, leaves, jnp.maximum, jnp.max)
    least = jnp.minimum(_extreme(order, leaves, jnp.minimum, jnp.min), high)
    count = _count(order, leaves, least)  # fewer than `total` if there are NaNs
    inside = count >= k
    low = jnp.where(inside, least, order.nan).astype(order.integer)
    count = jnp.where(inside, count, total)
    return _Bracket(low, jnp.where(inside, high, low), count, jnp.zeros_like(count))


def _search(order: _Order, leaves: list[jax.Array], k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(t, number of scores with key >= t): t is the largest key that has at least `k`, or any that
    has exactly `k`.

    Regula falsi with Illinois damping on the logarithm of the count, which is nearly straight in
    the key for the tails of common distributions. Counts between two bounds scatter like the square
    root of their difference: once one bound is that near, the next probe aims a little beyond `k`,
    so that both close in. Probes that do not halve the number of scores in between are followed,
    now and then, by one that halves the bracket, which bounds the worst case.
    """
    real, wanted = order.real, k.astype(order.real)
    unsigned = jnp.uint64 if order.integer == jnp.int64 else jnp.uint32
    halfway = lambda a, b: (a & b) + ((a ^ b) >> 1)  # no overflow
    excess = lambda count, aim: jnp.log(jnp.maximum(count.astype(real), 0.5) / aim)

    def unfinished(state):
        bracket, _, _ = state
        return (bracket.count_low != k) & (bracket.low < bracket.high)

    def probe(state):
        # side: times in a row that low (> 0) or high (< 0) moved; slow: probes since the scores in
        # between were halved
        (low, high, count_low, count_high), side, slow = state
        over, under = (count_low - k).astype(real), (k - count_high).astype(real)
        near = 0.1 * (over + under)
        beyond = jnp.where(
            over < near, -jnp.sqrt(over), jnp.where(under < near, jnp.sqrt(under), 0)
        )
        aim = jnp.maximum(wanted + beyond / 2, 0.5)
        above = excess(count_low, aim) * jnp.where(side < -1, 0.5, 1)
        below = excess(count_high, aim) * jnp.where(side > 1, 0.5, 1)
        share = jnp.clip(above / jnp.where(above > below, above - below, 1), 0, 1)
        # the width of a bracket may need one bit more than a signed integer has, and more bits than
        # a float
        width = (high - low).astype(unsigned)
        bound = low + jnp.minimum((share * width).astype(unsigned), width).astype(low.dtype)
        bound = jnp.where(slow == 3, halfway(low, high) + 1, bound)
        bound = jnp.clip(bound, low + 1, high)
        found = _count(order, leaves, bound)
        enough = found >= k
        closer = _Bracket(
            jnp.where(enough, bound, low),
            jnp.where(enough, high, bound - 1),
            jnp.where(enough, found, count_low),
            jnp.where(enough, count_high, found),
        )
        side = jnp.where(enough, jnp.maximum(side, 0) + 1, jnp.minimum(side, 0) - 1)
        halved = 2 * (closer.count_low - closer.count_high).astype(real) <= over + under
        return closer, side, jnp.where(halved | (slow == 3), 0, slow + 1)

    state = (_bracket(order, leaves, k), jnp.zeros_like(k), jnp.zeros_like(k))
    # a loop copies the scores it closes over, `cond` does not
    probes = 6 if len(leaves) == 1 and trees.sample(leaves[0]) is not None else 0
    for _ in range(probes):
        state = jax.lax.cond(unfinished(state), probe, lambda state: state, state)
    loop = lambda state: jax.lax.while_loop(unfinished, probe, state)
    bracket, _, _ = (
        jax.lax.cond(unfinished(state), loop, lambda state: state, state) if probes else loop(state)
    )
    return bracket.low, bracket.count_low


def _checked_k(k: int | jax.Array, lowest: int, total: int) -> jax.Array:
    if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(
            f"k is {k}, which is no integer; a share of all scores must be made a number first."
        )
    if not isinstance(k, jax.core.Tracer) and np.any(
        (np.asarray(k) < lowest) | (np.asarray(k) > total)
    ):
        raise ValueError(f"k is {k}; allowed: {lowest} to {total}, the number of scores.")
    return jnp.asarray(k, jnp.int32)


def kth_largest(scores: PyTree, k: int | jax.Array, *, magnitude: bool = False) -> jax.Array:
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
    return _kths(_leaves(scores), _checked(scores, k, lowest=1), magnitude=magnitude)


@_compiled
def _kths(leaves: list[jax.Array], k: jax.Array, magnitude: bool) -> jax.Array:
    one = lambda k: _kth(leaves, k, magnitude)
    return jax.vmap(one)(k.ravel()).reshape(k.shape) if k.ndim else one(k)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kth(leaves: list[jax.Array], k: jax.Array, magnitude: bool) -> jax.Array:
    order, total = _order_of(leaves, magnitude), sum(leaf.size for leaf in leaves)
    threshold, _ = _search(order, leaves, trees.varying_like(jnp.clip(k, 1, total), leaves))
    size = jnp.abs if magnitude else lambda x: x
    reached = lambda leaf: order.at_least(leaf, threshold) & ~jnp.isnan(leaf)
    kept = lambda leaf: jnp.where(reached(leaf), size(leaf.astype(order.real)), jnp.inf)
    least = [trees.fold(jnp.minimum, jnp.min, kept, leaf) for leaf in leaves]
    enough = _count(order, leaves, jnp.asarray(order.nan + 1, threshold.dtype)) >= k
    exact = jnp.where(enough, order.key(functools.reduce(jnp.minimum, least)), order.nan)
    return order.value(exact, jnp.result_type(*leaves))


@_kth.defjvp
def _kth_derivative(
    magnitude: bool, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    """That of the entry which is the k-th largest; the mean of those of equal ones."""
    (leaves, k), (changes, _) = primals, tangents
    value = _kth(leaves, k, magnitude)
    signs = [jnp.sign(leaf) if magnitude else jnp.ones_like(leaf) for leaf in leaves]
    hits = [leaf == (sign * value if magnitude else value) for leaf, sign in zip(leaves, signs)]
    number = sum(jnp.sum(hit) for hit in hits)
    change = sum(jnp.sum(jnp.where(hit, sign * d, 0)) for hit, sign, d in zip(hits, signs, changes))
    return value, (change / jnp.maximum(number, 1)).astype(value.dtype)


def _checked(scores: PyTree, k: int | jax.Array, lowest: int = 0) -> jax.Array:
    """`k` as an array; raises what `k_largest_mask` does, here where numbers outside `jit` are
    known.
    """
    trees.check_finite(scores, "scores", infinite=True)
    leaves = _leaves(scores)
    _order_of(leaves, magnitude=False)
    return _checked_k(k, lowest, sum(leaf.size for leaf in leaves))


def _select(
    leaves: list[jax.Array], positions: Callable[[], PyTree], k: jax.Array, magnitude: bool
) -> Selection:
    order, total = _order_of(leaves, magnitude), sum(leaf.size for leaf in leaves)
    wanted = trees.varying_like(jnp.clip(k, 1, total), leaves)
    threshold, count = _search(order, leaves, wanted)
    last = jnp.full_like(
        wanted, 2 * total, _position_type(leaves)
    )  # above the position of every entry

    def cut_ties():  # smallest cut with above + tied entries before it >= wanted
        above = _count(order, leaves, threshold + 1)
        places = jax.tree.leaves(positions())

        def halve(bracket):
            low, high = bracket
            middle = low + (high - low) // 2
            tied = lambda leaf, position: (
                _tied(order, leaf, threshold) & (position < middle)
            ).astype(jnp.int32)
            kept = sum(
                trees.fold_sum(tied, leaf, position) for leaf, position in zip(leaves, places)
            )
            enough = above + kept >= wanted
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        bracket = (jnp.zeros_like(last), last)
        return jax.lax.while_loop(lambda bracket: bracket[0] < bracket[1], halve, bracket)[1]

    # `cond`, not a loop that ends at once: a loop copies the scores it closes over
    cut = jax.lax.cond(count != wanted, cut_ties, lambda: last)
    return Selection(jnp.where(k > 0, threshold, order.infinity), jnp.where(k > 0, cut, 0))


def _ranked(scores: PyTree, before: PyTree | None) -> tuple[PyTree, Callable[[], PyTree]]:
    """(scores, positions()): NaN where `before` is False; of equal scores those of lower position
    come first.

    A position is the index in the concatenation of the flattened leaves, behind all others where
    `before` is False. They are made where they are used: kept for later, they would be written to
    memory.
    """
    scores = jax.tree.map(lambda leaf: jax.lax.stop_gradient(jnp.asarray(leaf)), scores)
    if before is None:
        return scores, lambda: _flat_positions(scores)
    total = jnp.asarray(trees.size(scores), _position_type(scores))
    last = lambda position, kept: position + total * (~kept).astype(total.dtype)
    lowest = lambda score, kept: jnp.where(kept, score, jnp.nan)
    positions = lambda: jax.tree.map(last, _flat_positions(scores), before)
    return jax.tree.map(lowest, scores, before), positions


def _position_type(tree: PyTree) -> Any:
    """Of integers up to twice the number of entries; CPUs compare signed ones faster."""
    return jnp.int32 if 2 * trees.size(tree) < 2**31 else jnp.uint32


def _tied(order: _Order, leaf: jax.Array, threshold: jax.Array) -> jax.Array:
    return order.at_least(leaf, threshold) & ~order.at_least(leaf, threshold + 1)


def _flat_positions(tree: PyTree) -> PyTree:
    """Index of every entry in the concatenation of the flattened leaves, in each leaf's own
    shape.
    """
    leaves, structure = jax.tree.flatten(tree)
    integer = _position_type(tree)
    positions, offset = [], 0
    for leaf in leaves:
        position = jnp.asarray(offset, integer)
        for axis in range(leaf.ndim):
            stride = jnp.asarray(math.prod(leaf.shape[axis + 1 :]), integer)
            position = position + stride * jax.lax.broadcasted_iota(integer, leaf.shape, axis)
        positions.append(jnp.broadcast_to(position, leaf.shape))
        offset += leaf.size
    return jax.tree.unflatten(structure, positions)


def k_largest_mask(
    scores: PyTree, k: int | jax.Array, *, magnitude: bool = False, before: PyTree | None = None
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
def _mask(scores: PyTree, k: jax.Array, before: PyTree | None, magnitude: bool) -> PyTree:
    ranked, positions = _ranked(scores, before)
    leaves = _leaves(ranked)
    threshold, cut = _select(leaves, positions, k, magnitude)
    order = _order_of(leaves, magnitude)

    def kept(leaf, position):
        return order.at_least(leaf, threshold + 1) | (
            order.at_least(leaf, threshold) & (position < cut)
        )

    return jax.tree.map(kept, ranked, positions())


def random_mask(
    key: jax.Array, tree: PyTree, k: int | jax.Array, *, before: PyTree | None = None
) -> PyTree:
    """True on exactly `k` entries of `tree`, drawn uniformly; of those that a mask `before` leaves
    out only if it must.

    before: in the structure of `tree`.
    """
    scores = random_scores(key, tree)
    if before is not None:
        scores = jax.tree.map(lambda score, kept: jnp.where(kept, score, score - 1), scores, before)
    return k_largest_mask(scores, k)


def random_scores(key: jax.Array, tree: PyTree) -> PyTree:
    """Independent uniform scores in the shape of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.uniform(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    )


def full(tree: PyTree) -> PyTree:
    """The mask that keeps everything."""
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), tree)


def nonzero(params: PyTree) -> PyTree:
    """Masks of what is left of a pruned network: True where a kernel is not zero, and in all other
    arrays.
    """

    def mask(path: str, leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf) != 0 if trees.is_kernel(path) else jnp.ones(leaf.shape, bool)

    return trees.map_named(mask, params)


def apply(tree: PyTree, masks: PyTree) -> PyTree:
    """`tree` with zeros where `masks` is False (also where the entry is not finite)."""
    return jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf, jnp.zeros_like(leaf)), tree, masks)


def density(masks: PyTree) -> jax.Array:
    """Share of True entries over all leaves."""
    kept = sum(jnp.sum(mask, dtype=jnp.int32) for mask in jax.tree.leaves(masks))
    return kept / trees.size(masks)


def sparsity(tree: PyTree) -> jax.Array:
    """Share of exact zeros (or False) over all leaves; TypeError for leaves that are neither floats
    nor bools.
    """
    trees.check_parameters(tree, "sparsity", masks=True)
    zeros = sum(jnp.sum(leaf == 0, dtype=jnp.int32) for leaf in jax.tree.leaves(tree))
    return zeros / trees.size(tree)
