"""Schedules beside those that drop at epochs: cosine, factors from a table, a rate that follows
the loss, and the original programs' rates, which change at every iteration.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import originals, tables
from sparsity_jax.optim import rates
from sparsity_jax.optim.rates import Rate, as_rate
from sparsity_jax.tables import ConfigError

__all__ = [
    "SCHEDULES",
    "cosine",
    "dynamic_change",
    "original_cosine",
    "original_multistep",
    "piecewise",
]


def cosine(
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    warmup_epochs: tables.NonNegative = 0.0,
) -> Rate:
    """Linear warm-up from 0, then half a cosine to 0 over the remaining steps."""
    total = epochs * steps_per_epoch
    warm = round(warmup_epochs * steps_per_epoch)
    if warm >= total:
        raise ConfigError("warmup_epochs", warmup_epochs, allowed=f"below epochs ({epochs})")

    def rule(step: Array) -> Array:
        progress = jnp.clip((step - warm) / (total - warm), 0, 1)
        falling = (1 + jnp.cos(jnp.pi * progress)) / 2
        return learning_rate * rates.warm_up(step, warm, falling)

    return as_rate(rule)


def piecewise(
    learning_rate: float, epochs: int, steps_per_epoch: int, *, table: str = "0:1.0"
) -> Rate:
    """Factors of the rate from given epochs on, e.g. `0:1.0,60:0.1,90:0.01`; with learning_rate 1
    they are the rates.

    Before the first epoch named the last factor applies, as in the original's notation.
    """
    del epochs
    factors = {}
    try:
        for item in table.split(","):
            epoch, factor = item.split(":")
            factors[int(epoch)] = float(factor)
    except ValueError:
        raise ConfigError("table", table, allowed="epoch:factor,epoch:factor") from None
    epochs_in_order = sorted(factors)
    starts = jnp.asarray(steps_per_epoch * np.array(epochs_in_order, float), jnp.int32)
    in_order = [factors[epoch] for epoch in epochs_in_order]
    values = jnp.asarray([in_order[-1], *in_order], float)
    return as_rate(lambda step: learning_rate * values[jnp.sum(step >= starts)])


class _LossHistory(NamedTuple):
    losses: Array  # of the last 11 finished epochs, newest last
    total: Array  # of this epoch's step losses
    factor: Array


def dynamic_change(
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    loss: Literal["mean", "last_batch"] = "mean",
) -> Rate:
    """`decrease_3`, and a factor that follows the training loss.

    At epochs e > 20 with e % 5 == 0 the mean loss of epochs e-6..e-2 is compared with that of
    e-11..e-2: times 0.7 if it is higher, times 1.06 if lower. loss: an epoch's mean, or as the
    original the loss of its last batch only. `update` needs `value=loss`. In `optax.MultiSteps`
    only the value of the call that makes the step counts: give it the mean over the calls of that
    step; steps, not calls, are then counted in `steps_per_epoch`.
    Source: Miao et al., ICLR 2022, training script.
    """
    tables.convert(loss, Literal["mean", "last_batch"], "loss")
    last_only = loss == "last_batch"
    drops = rates.decrease_3(1.0, epochs, steps_per_epoch)

    def init() -> _LossHistory:
        return _LossHistory(jnp.zeros(11, float), jnp.zeros((), float), jnp.ones((), float))

    def update(state: _LossHistory, step: Array, value: Any) -> tuple[Array, _LossHistory]:
        if value is None:
            raise ValueError(
                "the rate 'dynamic_change' follows the loss: call update(..., value=loss)."
            )
        epoch = step // steps_per_epoch
        begins = (step % steps_per_epoch == 0) & (step > 0)
        finished = state.total if last_only else state.total / steps_per_epoch
        losses = jnp.where(begins, jnp.append(state.losses[1:], finished), state.losses)
        rise = losses[5:10].mean() - losses[:10].mean()
        change = jnp.select([rise > 0, rise < 0], [0.7, 1.06], 1.0)
        judged = begins & (epoch > 20) & (epoch % 5 == 0)
        factor = state.factor * jnp.where(judged, change, 1.0)
        total = jnp.where(begins | last_only, 0.0, state.total) + value
        drop, _ = drops.update((), step, None)
        return learning_rate * drop * factor, _LossHistory(losses, total, factor)

    return Rate(init, update)


def _stepped_per_iteration(
    learning_rate: float,
    warmup_epochs: float,
    steps_per_epoch: int,
    change: Callable[[Array, Array], Array],
) -> Rate:
    """The original's loop: after every iteration `rate = change(rate, iterations so far)`, warm-up
    or not.

    Warm-up sets the rate to learning_rate * i / (its iterations + 1e-8) before that, so `change`
    then continues from wherever it finds the rate. The state is the rate of the next step.
    """
    warm = warmup_epochs * steps_per_epoch

    def update(state: Array, step: Array, value: Any) -> tuple[Array, Array]:
        del value
        rate = jnp.where(step == 0, 0.0 if warm else learning_rate, state)
        rising = learning_rate * (step + 1) / (warm + 1e-8)
        following = jnp.where(step < warm, rising, rate)
        return rate, jnp.asarray(change(following, step + 1), float)

    return Rate(lambda: jnp.zeros((), float), update)


def original_multistep(
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    milestones: tuple[tables.Index, ...] = (60, 120, 160),
    gamma: tables.Positive = 0.5,
    warmup_epochs: tables.NonNegative = 5.0,
) -> Rate:
    """See `originals.multistep`; `multistep` is what it evidently meant."""
    del epochs
    change = functools.partial(originals.multistep, milestones=milestones, gamma=gamma)
    return _stepped_per_iteration(learning_rate, warmup_epochs, steps_per_epoch, change)


def original_cosine(
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    warmup_epochs: tables.NonNegative = 5.0,
) -> Rate:
    """See `originals.cosine`; `cosine` is what it evidently meant."""
    change = functools.partial(originals.cosine, learning_rate=learning_rate, epochs=epochs)
    return _stepped_per_iteration(learning_rate, warmup_epochs, steps_per_epoch, change)


SCHEDULES: dict[str, Callable] = {
    "keep": rates.keep,
    "decrease_3": rates.decrease_3,
    "decrease_3_180": rates.decrease_3_180,
    "dynamic_change": dynamic_change,
    "multistep": rates.multistep,
    "cosine": cosine,
    "piecewise": piecewise,
    "original_multistep": original_multistep,
    "original_cosine": original_cosine,
}
