"""Ways back into a set: the nearest point of a K-sparse polytope, and updates of narrow weights."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from sparsity_jax import blocks, platforms, trees
from sparsity_jax.masks import digits
from sparsity_jax.trees import widen

__all__ = ["nearest_k_sparse", "settled"]


def nearest_k_sparse(
    points: Sequence[Array], budgets: Sequence[Array], radii: Sequence[Array]
) -> list[Array]:
    """The nearest point to each x of at least float32 with L1 norm at most the budget, in magnitude
    at most the radius.

    That is sign(x) * clip(|x| - t, 0, radius). The threshold t is `high` - `beyond`, where `high`
    is a neighbour of t and |x| - high is exact near t: so nothing is lost where t has fewer digits
    than the radius. Derivatives follow `beyond`, which the budget and the entries strictly between
    0 and the radius decide.
    """
    constant = lax.stop_gradient(([*points], [*budgets], [*radii]))
    thresholds = platforms.per_platform(_thresholds, *constant)
    return list(map(_clipped, points, budgets, radii, thresholds))


def _clipped(x: Array, budget: Array, radius: Array, threshold: Array) -> Array:
    """The nearest point to x, from its threshold."""
    sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
    magnitude = sign * x

    def cut(raised: Array) -> Array:
        """Like `jnp.clip`, but its derivative is 1 at 0 and 0 at the radius."""
        positive = jnp.where(raised < 0, 0, raised)
        return jnp.where(raised >= radius, radius, positive)

    rest = magnitude - threshold
    beyond = jnp.zeros((), x.dtype)
    for _ in range(2):  # of a sum that is concave in `beyond` and has one kink at most
        raised = rest + beyond
        free = (raised >= 0) & (raised < radius)
        missing = budget - jnp.sum(cut(raised))
        number = jnp.sum(free)
        beyond = beyond + missing / jnp.maximum(number, 1)
    inside = jnp.sum(cut(magnitude)) <= budget
    moved = jnp.where(inside, magnitude, rest + beyond)
    return sign * cut(moved)


def _thresholds(
    points: Sequence[Array], budgets: Sequence[Array], radii: Sequence[Array]
) -> list[Array]:
    """The smallest floating-point numbers t with sum(clip(|x| - t, 0, radius)) <= budget."""
    if platforms.in_turn():
        return list(map(_threshold, points, budgets, radii))
    results: dict[int, Array] = {}
    for kind in dict.fromkeys(x.dtype for x in points):
        own = [i for i, x in enumerate(points) if x.dtype == kind]
        columns = [[column[i] for i in own] for column in (points, budgets, radii)]
        results |= zip(own, _thresholds_together(*columns))
    return [results[i] for i in range(len(points))]


def _threshold(x: Array, budget: Array, radius: Array) -> Array:
    """The threshold of one point, by bisection among the bits of floating-point numbers, which are
    in their order.
    """
    magnitude = jnp.abs(x)
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    number = lambda key: lax.bitcast_convert_type(key, x.dtype)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        bound = number(middle)
        total = trees.fold_sum(lambda m: jnp.clip(m - bound, 0, radius), magnitude)
        over = total > budget
        low = jnp.where(over, middle, low)
        high = jnp.where(over, high, middle)
        return low, high

    largest = jnp.max(magnitude, initial=0)
    largest = jnp.where(budget > 0, largest, 0)
    last = lax.bitcast_convert_type(largest, integer)
    first = jnp.zeros_like(last)
    _, key = lax.fori_loop(0, jnp.iinfo(integer).bits, halve, (first, last))
    return number(key)


def _thresholds_together(
    points: Sequence[Array], budgets: Sequence[Array], radii: Sequence[Array]
) -> list[Array]:
    """The thresholds of points of one type, some bits of all of them at a time."""
    kind = points[0].dtype
    layout = blocks.Layout([[x] for x in points])
    magnitudes = [jnp.abs(piece) for piece in layout.pack([[x] for x in points])]
    spread_radii = layout.spread(jnp.stack(radii))
    budget = jnp.stack(budgets)

    def over(keys: Array) -> Array:
        several = []
        for bounds in lax.bitcast_convert_type(keys, kind):
            pieces = zip(magnitudes, layout.spread(bounds), spread_radii)
            several.append([jnp.clip(m - bound, 0, radius) for m, bound, radius in pieces])
        return layout.sums(several) > budget

    bits = 8 * kind.itemsize
    start = trees.varying_like(jnp.zeros(budget.shape, f"uint{bits}"), [*points, budget])
    key = digits.largest(over, start, bits - 1) + 1
    needed = over(start[None])[0] & (budget > 0)
    return list(lax.bitcast_convert_type(jnp.where(needed, key, 0), kind))


def settled(constraint: Any, w: Array, update: Array) -> Array:
    """`update` of weights `w` narrower than float32, in their type, so that they stay in the set.

    The sum w + update is rounded, by more than the pull towards the set of a small step, and the
    error of many steps would add up. So the new weights are pulled back into the set in float32,
    then rounded once: they are at most that rounding outside. The cost is one more norm per array.
    """
    wide = widen(w)
    target = _rounded(constraint.pull_back(wide + update), w.dtype)
    difference = target - wide
    update = difference.astype(w.dtype)
    # rounding of the difference may end beyond the target: then a step that is one number shorter
    # or longer does not
    reached = _rounded(wide + widen(update), w.dtype)
    beyond = jnp.abs(reached) > jnp.abs(target)
    return jnp.where(beyond, jnp.nextafter(update, -w), update)


def _rounded(wide: Array, dtype: Any) -> Array:
    """The numbers of a narrow `dtype` nearest to those of `wide`, in whose type they stay.

    XLA may leave out a conversion to and fro, and its `reduce_precision` makes zeros of subnormal
    numbers, which float16 weights below 6e-5 are.
    """
    kind = jnp.finfo(dtype)
    normal = lax.reduce_precision(wide, kind.nexp, kind.nmant)
    if kind.minexp <= jnp.finfo(wide.dtype).minexp:
        return normal
    spacing = float(kind.smallest_subnormal)
    subnormal = spacing * jnp.round(wide / spacing)
    return jnp.where(jnp.abs(wide) < float(kind.tiny), subnormal, normal)
