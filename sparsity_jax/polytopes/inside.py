"""Ways back into a set: the nearest point of a K-sparse polytope, and updates of narrow weights."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from sparsity_jax import trees
from sparsity_jax.trees import widen

__all__ = ["nearest_k_sparse", "settled"]


def nearest_k_sparse(x: Array, budget: Array, radius: Array) -> Array:
    """The nearest point to x of at least float32 with L1 norm at most `budget`, in magnitude at
    most `radius`.

    That is sign(x) * clip(|x| - t, 0, radius). The threshold t is `high` - `beyond`, where `high`
    is a neighbour of t and |x| - high is exact near t: so nothing is lost where t has fewer digits
    than the radius. Derivatives follow `beyond`, which the budget and the entries strictly between
    0 and the radius decide.
    """
    sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
    magnitude = sign * x

    def cut(raised: Array) -> Array:
        """Like `jnp.clip`, but its derivative is 1 at 0 and 0 at the radius."""
        positive = jnp.where(raised < 0, 0, raised)
        return jnp.where(raised >= radius, radius, positive)

    constant = lax.stop_gradient((x, budget, radius))
    rest = magnitude - _threshold(*constant)
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


def _threshold(x: Array, budget: Array, radius: Array) -> Array:
    """The smallest floating-point number t with sum(clip(|x| - t, 0, radius)) <= budget.

    Found by bisection among the bits of these numbers, which are in their order.
    """
    magnitude = jnp.abs(x)
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
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
