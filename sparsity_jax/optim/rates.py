"""Learning rates: numbers, functions of the step and rates with state of their own; the schedules
that drop at given epochs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import tree_leaves, tree_map
from optax import GradientTransformationExtraArgs as Transformation

from sparsity_jax import tables
from sparsity_jax.types import PyTree

__all__ = [
    "LearningRate",
    "Number",
    "Rate",
    "RateState",
    "Updated",
    "as_rate",
    "decrease_3",
    "decrease_3_180",
    "first_state",
    "keep",
    "learning_rate",
    "multistep",
    "next_state",
    "scale_by_rate",
    "warm_up",
]

Number = float | Array
Updated = tuple[PyTree, Any]  # updates and state


class Rate(NamedTuple):
    """A learning rate with state: `init() -> state`, `update(state, step, value) -> (rate, state)`.

    step: int32, optimizer steps taken so far. value: the loss of this step, or None where the
        caller gave none.
    """

    init: Callable
    update: Callable


LearningRate = Number | Callable | Rate


def as_rate(learning_rate: LearningRate) -> Rate:
    """A number, an optax schedule or a Rate as a Rate."""
    if isinstance(learning_rate, Rate):
        return learning_rate
    rule = learning_rate if callable(learning_rate) else lambda _: learning_rate
    return Rate(tuple, lambda state, step, value: (rule(step), state))


def keep(learning_rate: float, epochs: int, steps_per_epoch: int) -> Rate:
    """The same rate throughout."""
    del epochs, steps_per_epoch
    return as_rate(learning_rate)


def multistep(
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    milestones: tuple[tables.Index, ...] = (60, 120, 160),
    gamma: tables.Positive = 0.1,
    warmup_epochs: tables.NonNegative = 0.0,
) -> Rate:
    """Linear warm-up from 0; times `gamma` from the start of every epoch in `milestones`."""
    del epochs
    boundaries = steps_per_epoch * jnp.asarray(milestones, jnp.int32)
    warm = round(warmup_epochs * steps_per_epoch)

    def rule(step: Array) -> Array:
        factor = jnp.asarray(gamma, float) ** jnp.sum(step >= boundaries)
        return learning_rate * factor * warm_up(step, warm, 1.0)

    return as_rate(rule)


def warm_up(step: Array, warm: int, later: Any) -> Array:
    """A ramp from 0 to 1 over the first `warm` steps, then `later`."""
    return jnp.where(step < warm, step / max(warm, 1), later)


def decrease_3(learning_rate: float, epochs: int, steps_per_epoch: int) -> Rate:
    """Divided by 10 at one and at two thirds of the epochs, rounded down; of one or two epochs the
    first are gone.
    """
    thirds = (epochs // 3, 2 * epochs // 3)
    return multistep(learning_rate, epochs, steps_per_epoch, milestones=thirds)


def decrease_3_180(learning_rate: float, epochs: int, steps_per_epoch: int) -> Rate:
    """Divided by 10 at epochs 90 and 130."""
    return multistep(learning_rate, epochs, steps_per_epoch, milestones=(90, 130))


class RateState(NamedTuple):
    """step: int32, updates made. learning_rate: of the latest update. rate: the Rate's own
    state.
    """

    step: Array
    learning_rate: Array
    rate: Any


def first_state(rate: Rate) -> RateState:
    """The state of a rate before all updates."""
    return RateState(jnp.zeros((), jnp.int32), jnp.zeros((), float), rate.init())


def next_state(rate: Rate, state: RateState, value: Any) -> RateState:
    """The state whose learning rate is that of the next update. value: the loss, or None."""
    learning_rate, inner = rate.update(state.rate, state.step, value)
    return RateState(state.step + 1, jnp.asarray(learning_rate, float), inner)


def scale_by_rate(learning_rate: LearningRate) -> Transformation:
    """Multiplies updates by minus the learning rate."""
    rate = as_rate(learning_rate)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, value: Any = None, **extra: Any
    ) -> Updated:
        del params, extra
        state = next_state(rate, state, value)
        scale = lambda u: -state.learning_rate.astype(u.dtype) * u
        return tree_map(scale, updates), state

    return Transformation(lambda _: first_state(rate), update)


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _rates_in(opt_state: PyTree) -> list[Array]:
    """All rates of states that are made to hold one; entries of that name in other trees are
    parameters.
    """
    names_rate = lambda state: isinstance(state, (RateState, *_INJECTED))
    rates = []
    for state in tree_leaves(opt_state, is_leaf=names_rate):
        if isinstance(state, RateState):
            rates.append(state.learning_rate)
        elif isinstance(state, _INJECTED):
            # a transformation of this package knows its rate itself; the hyper-parameter is what
            # it was made of
            within = _rates_in(state.inner_state)
            if not within and "learning_rate" in state.hyperparams:
                within = [state.hyperparams["learning_rate"]]
            rates += within
    return rates


def learning_rate(opt_state: PyTree) -> Array | None:
    """The rate of the latest update, found in an optimizer's state; None if no part of it names a
    rate.

    Rates are named by this package's transformations and by `optax.inject_hyperparams`, within any
    wrapper of optax. Raises ValueError if the state names several.
    """
    rates = _rates_in(opt_state)
    if len(rates) > 1:
        raise ValueError(
            f"the optimizer's state names {len(rates)} learning rates; allowed: one. Say which is "
            "meant with learning_rate=, or read it from a part of the state."
        )
    return rates[0] if rates else None
