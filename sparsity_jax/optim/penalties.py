"""Norms of the weights in the loss: by their slopes, or by proximal steps that make exact zeros."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.tree_util import tree_leaves, tree_map
from optax import GradientTransformationExtraArgs as Transformation

from sparsity_jax import tables, trees
from sparsity_jax.optim import rates, steps
from sparsity_jax.optim.rates import Updated
from sparsity_jax.optim.steps import Strength
from sparsity_jax.trees import widen
from sparsity_jax.types import Fields, PyTree

__all__ = ["add_l1", "add_l2", "l1", "l2", "proximal_l1"]


def add_l1(strength: Strength) -> Transformation:
    """g + strength * sign(w), a subgradient of strength * ||w||_1. strength: a number, or one per
    parameter array.
    """
    return steps.add_slope(jnp.sign, strength)


def add_l2(strength: Strength) -> Transformation:
    """g + 2 * strength * w, the gradient of strength * ||w||_2^2. strength: a number, or one per
    parameter array.
    """
    return steps.add_slope(lambda w: 2 * w, strength)


# Penalties: of an optimizer that has certain numbers, the one with the penalty --------------------


def l1(
    tx: Transformation,
    values: Fields,
    *,
    strength: tables.NonNegative = 3e-5,
    method: Literal["subgradient", "proximal"] = "subgradient",
    parameters: str = ".*",
) -> Transformation:
    """strength * ||w||_1 in the loss: by its subgradient as published, or by a proximal step that
    reaches exact zeros.

    parameters: regular expression that the whole path of a penalised parameter array matches.
    """
    del parameters  # the strength is 0 of all others
    if method == "subgradient":
        return optax.chain(add_l1(strength), tx)
    # momentum with dampening lengthens steps less
    share = steps.share_of_new(values["momentum"], values["dampening"])
    kept = (1 - values["momentum"]) / jnp.maximum(share, 1e-12)
    return _proximal_sgd(tx, strength, 1 - kept)


def l2(
    tx: Transformation,
    values: Fields,
    *,
    strength: tables.NonNegative = 3e-5,
    parameters: str = ".*",
) -> Transformation:
    """strength * ||w||_2^2 in the loss (its gradient is 2 * strength * w). parameters: as for
    `l1`.
    """
    del values, parameters
    return optax.chain(add_l2(strength), tx)


# Proximal steps -----------------------------------------------------------------------------------


def _proximal_sgd(inner: Transformation, strength: PyTree, momentum: Array) -> Transformation:
    """`proximal_l1` of this package's `sgd` at its known rate and momentum, t = rate * strength /
    (1 - momentum).
    """

    def update(updates: PyTree, state: Any, params: PyTree, extra: Fields) -> Updated:
        updates, state = inner.update(updates, state, params, **extra)
        rate = rates.learning_rate(state)
        each = steps.one_each(strength, params)
        bounds = tree_map(lambda s: rate * s / (1 - momentum), each)
        return tree_map(_shrunk, updates, params, bounds), state

    return steps.needing_params(inner.init, update)


def _shrunk(u: Array, w: Array, bound: Array) -> Array:
    """The update `u` of `w` followed by soft thresholding at `bound`."""
    moved = widen(w) + u
    left = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - bound, 0)
    return (left - w).astype(u.dtype)


def proximal_l1(
    inner: optax.GradientTransformation,
    strength: Strength,
    *,
    learning_rate: float | None = None,
    momentum: float = 0.0,
) -> Transformation:
    """`inner`, then soft thresholding: w <- sign(w) max(|w| - t, 0), t = strength * step per unit
    of gradient.

    Reaches exact zeros, which the subgradient never does. strength: a number, or one per parameter
    array.
    inner: gradient descent, in any wrapper: with a schedule, momentum, decay, scaled, in
    `optax.MultiSteps` or `optax.apply_if_finite`. Descent multiplies gradients by a number, the
    step per unit, which depends on the update and on what wrappers did, but not on the gradients.
    So `inner` gets with each array another one, of one entry, whose weight is 0 and whose gradient
    is always 1: minus its update is that number. It follows momentum as it gathers, and is 0 in
    calls that make no step. Trees that `inner` was made of must be prefixes of the params.
    learning_rate: of `inner`; needed where its state names none (this package's optimizers and
    `optax.inject_hyperparams` do), and checked: the first step per unit, or the last one times 1 -
    momentum. `init` tries `inner` out, at the cost of one small compilation, and raises ValueError
    for steps that are no multiple of the gradients: adaptive, normalised, clipped, projected ones,
    where soft thresholding solves another problem. In a trace that `inner` depends on, nothing can
    be tried. Raises ValueError if `update` gets no params.
    Source: Parikh, Boyd 2014, Proximal Algorithms, section 4.2.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        state = inner.init(_with_units(params, params, 0))
        if tree_leaves(params):  # `optax.tree_map_params` calls `init` without arrays
            if learning_rate is None and rates.learning_rate(state) is None:
                raise ValueError(
                    "proximal_l1: the inner optimizer's state names no learning_rate; pass "
                    "learning_rate=."
                )
            units = tree_map(lambda w: _unit(w, 0), params)
            _check_descent(inner, units, learning_rate, momentum)
        return state

    def update(updates: PyTree, state: Any, params: PyTree, extra: Fields) -> Updated:
        slopes = _with_units(updates, params, 1)
        moved, state = inner.update(slopes, state, _with_units(params, params, 0), **extra)

        def shrink(w: Array, pair: tuple[Array, Array], strength: Array) -> Array:
            step, of_unit = pair
            return _shrunk(step, w, -jnp.ravel(of_unit)[0] * strength)

        return tree_map(shrink, params, moved, steps.one_each(strength, params)), state

    return steps.needing_params(init, update)


def _unit(w: Array, value: float) -> Array:
    """`value` in an array of as many axes as `w`, of one entry, or two where `w` has one."""
    length = 2 if jnp.size(w) == 1 else 1
    return jnp.full((length,) * max(jnp.ndim(w), 1), value, float)


def _with_units(tree: PyTree, params: PyTree, value: float) -> PyTree:
    """Every array of `tree` paired with `value` in a small one."""
    return tree_map(lambda x, w: (x, _unit(w, value)), tree, params)


def _check_descent(inner: Transformation, units: PyTree, rate: Any, momentum: Any) -> None:
    """Raises ValueError where steps of `inner` are no multiple of the gradients, or another one
    than stated.

    Tries gradients that stay the same until all momentum is gathered; two very different ones tell
    what is not linear.
    """

    def try_out(slope: float) -> Array:
        gradient = tree_map(lambda w: jnp.full_like(w, slope), units)

        def step(state: Any, _: None) -> tuple[Any, Array]:
            updates, state = inner.update(gradient, state, units, value=jnp.zeros(()))
            firsts = [jnp.ravel(update)[0] for update in tree_leaves(updates)]
            return state, -jnp.stack(firsts) / slope

        return lax.scan(step, inner.init(units), None, length=2048)[1]

    with jax.ensure_compile_time_eval():
        tries = try_out(1.0), try_out(2.0**20)
    if any(isinstance(x, jax.core.Tracer) for x in (*tries, rate, momentum)):
        return
    small, large = jax.device_get(tries)
    linear = (small >= 0) & (np.abs(large - small) <= 1e-3 * small)
    right = linear.all(0) & small.any(0)
    if not right.all():
        path = list(trees.named_leaves(units))[np.argmin(right)]
        raise ValueError(
            "proximal_l1: steps of the inner optimizer are no fixed multiple of the gradient of "
            f"{path!r}; allowed: descent without adaptive, normalised, clipped, projected or "
            "masked steps. Before such an optimizer use add_l1; learning_rate= does not help."
        )
    if rate is None:
        return
    first, last = small[small.any(1)][[0, -1]].max(1)
    at_first = abs(first - rate)
    in_the_end = abs(last * (1 - momentum) - rate)
    if not min(at_first, in_the_end) <= 0.02 * rate:
        raise ValueError(
            f"proximal_l1: learning_rate={rate} and momentum={momentum}, but the first step of "
            f"the inner optimizer is {first:.3g} times the gradient, and {last:.3g} times in the "
            "end."
        )
