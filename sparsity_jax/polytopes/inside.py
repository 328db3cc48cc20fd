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
    given = list(points), list(budgets), list(radii)
    constant = lax.stop_gradient(given)
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
        reached = jnp.sum(cut(raised))
        missing = budget - reached
        number = jnp.maximum(jnp.sum(free), 1)
        beyond = beyond + missing / number
    length = jnp.sum(cut(magnitude))
    inside = length <= budget
    moved = jnp.where(inside, magnitude, rest + beyond)
    nearest = cut(moved)
    return sign * nearest


def _thresholds(
    points: Sequence[Array], budgets: Sequence[Array], radii: Sequence[Array]
) -> list[Array]:
    """The smallest floating-point numbers t with sum(clip(|x| - t, 0, radius)) <= budget."""
    if platforms.in_turn():
        return list(map(_threshold, points, budgets, radii))
    by_type: dict[Any, list[int]] = {}
    for i, x in enumerate(points):
        by_type.setdefault(x.dtype, []).append(i)
    results: dict[int, Array] = {}
    for own in by_type.values():
        found = _thresholds_together(
            [points[i] for i in own],
            [budgets[i] for i in own],
            [radii[i] for i in own],
        )
        results |= zip(own, found)
    return [results[i] for i in range(len(points))]


def _threshold(x: Array, budget: Array, radius: Array) -> Array:
    """The threshold of one point, by bisection among the bits of floating-point numbers, which are
    in their order.
    """
    magnitude = jnp.abs(x)
    bits = 8 * x.dtype.itemsize
    integer = jnp.dtype(f"int{bits}")
    number = lambda key: lax.bitcast_convert_type(key, x.dtype)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        bound = number(middle)
        clipped = lambda m: jnp.clip(m - bound, 0, radius)
        total = trees.fold_sum(clipped, magnitude)
        over = total > budget
        low = jnp.where(over, middle, low)
        high = jnp.where(over, high, middle)
        return low, high

    largest = jnp.max(magnitude, initial=0)
    largest = jnp.where(budget > 0, largest, 0)
    last = lax.bitcast_convert_type(largest, integer)
    first = jnp.zeros_like(last)
    _, key = lax.fori_loop(0, bits, halve, (first, last))
    return number(key)


def _thresholds_together(
    points: Sequence[Array], budgets: Sequence[Array], radii: Sequence[Array]
) -> list[Array]:
    """The thresholds of points of one type, some bits of all of them at a time."""
    kind = points[0].dtype
    groups = [[x] for x in points]
    layout = blocks.Layout(groups)
    magnitudes = [jnp.abs(piece) for piece in layout.pack(groups)]
    stacked = jnp.stack(radii)
    spread_radii = layout.spread(stacked)
    budget = jnp.stack(budgets)

    def over(keys: Array) -> Array:
        """Whether what lies above the numbers of keys [candidates, points] is over the budget."""
        numbers = lax.bitcast_convert_type(keys, kind)
        several = []
        for bounds in numbers:
            spread = layout.spread(bounds)
            clipped = []
            for magnitude, bound, radius in zip(magnitudes, spread, spread_radii):
                above = magnitude - bound
                clipped.append(jnp.clip(above, 0, radius))
            several.append(clipped)
        return layout.sums(several) > budget

    bits = 8 * kind.itemsize
    start = jnp.zeros(budget.shape, f"uint{bits}")
    start = trees.varying_like(start, [*points, budget])
    last_over = digits.largest(over, start, bits - 1)  # signs are clear
    (zero_over,) = over(start[None])
    needed = zero_over & (budget > 0)
    key = jnp.where(needed, last_over + 1, 0)
    thresholds = lax.bitcast_convert_type(key, kind)
    return list(thresholds)


def settled(constraint: Any, w: Array, update: Array) -> Array:
    """`update` of weights `w` narrower than float32, in their type, so that they stay in the set.

    The sum w + update is rounded, by more than the pull towards the set of a small step, and the
    error of many steps would add up. So the new weights are pulled back into the set in float32,
    then rounded once: they are at most that rounding outside. The cost is one more norm per array.
    """
    wide = widen(w)
    inner = constraint.pull_back(wide + update)
    target = _rounded(inner, w.dtype)
    difference = target - wide
    update = difference.astype(w.dtype)
    # rounding of the difference may end beyond the target: then a step that is one number shorter
    # or longer does not
    end = wide + widen(update)
    reached = _rounded(end, w.dtype)
    beyond = jnp.abs(reached) > jnp.abs(target)
    nearer = jnp.nextafter(update, -w)
    return jnp.where(beyond, nearer, update)


def _rounded(wide: Array, dtype: Any) -> Array:
    """The numbers of a narrow `dtype` nearest to those of `wide`, in whose type they stay.

    XLA may leave out a conversion to and fro, and its `reduce_precision` makes zeros of subnormal
    numbers, which float16 weights below 6e-5 are.
    """
    kind = jnp.finfo(dtype)
    normal = lax.reduce_precision(wide, kind.nexp, kind.nmant)
    least = jnp.finfo(wide.dtype).minexp
    if kind.minexp <= least:
        return normal
    spacing = float(kind.smallest_subnormal)
    subnormal = spacing * jnp.round(wide / spacing)
    small = jnp.abs(wide) < float(kind.tiny)
    return jnp.where(small, subnormal, normal)
