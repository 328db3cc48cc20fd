"""The importance of every weight, tracked over the minibatches of a training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparsity_jax import tables, trees
from sparsity_jax.types import PyTree

__all__ = ["TrackedState", "of_weights", "track"]


def of_weights(
    params: PyTree, grads: PyTree, *, use_l2: bool = False, init: PyTree = None
) -> PyTree:
    """abs(w g) of every weight, times abs(w) if `use_l2`, or times abs(w - init) if `init` is given
    too.
    """
    importance = lambda w, g: jnp.abs(trees.widen(w) * trees.widen(g))
    saliency = jax.tree.map(importance, params, grads)
    if not use_l2:
        return saliency
    distance = params if init is None else jax.tree.map(jnp.subtract, params, init)
    return jax.tree.map(lambda s, d: s * jnp.abs(d), saliency, distance)


class TrackedState(NamedTuple):
    """step: updates so far, int32. saliency: average of the statistic over the newest window, 0
    before the first; `optax.tree.get(opt_state, "saliency")` finds it. inner: of the optimizer.
    """

    step: Array
    saliency: PyTree
    inner: PyTree


def track(
    inner: optax.GradientTransformation,
    *,
    alpha: tables.Fraction = 0.8,
    steps_per_epoch: tables.Count | None = None,
    track_batches: tables.Count = 20,
    statistic: Callable = of_weights,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, with an exponential average of `statistic(params, grads)` in its state: alpha * new
    + (1 - alpha) * old, from 0. The updates are those of `inner`.

    The original evaluates the statistic with the gradient of a batch and the weights after its
    step. Only what wraps the whole optimizer knows both: the gradient comes in, the new weights are
    `params` plus the updates that go out.
    steps_per_epoch: average over the last `track_batches` steps of an epoch (all, if it has fewer),
    anew in every epoch; None: over all steps. statistic: any tree, e.g. scores of channels, which
    are then averaged themselves.
    """
    numbers = dict(alpha=alpha, steps_per_epoch=steps_per_epoch, track_batches=track_batches)
    tables.check_options(track, numbers)
    wrapped = optax.with_extra_args_support(inner)
    first = 0 if steps_per_epoch is None else max(steps_per_epoch - track_batches, 0)

    def init(params: PyTree) -> TrackedState:
        values = statistic(params, params)
        zeros = jax.tree.map(trees.zeros_like, values)
        return TrackedState(jnp.zeros((), jnp.int32), zeros, wrapped.init(params))

    def update(
        grads: PyTree, state: TrackedState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, TrackedState]:
        if params is None:
            raise ValueError("saliency.track reads the weights; call update(grads, state, params).")
        updates, inner_state = wrapped.update(grads, state.inner, params, **extra)
        moved = optax.apply_updates(params, updates)
        step = state.step if steps_per_epoch is None else state.step % steps_per_epoch

        def mixed(old: Array, new: Array) -> Array:
            before = jnp.where(step == first, 0, old)  # a window starts from 0
            return (alpha * new + (1 - alpha) * before).astype(old.dtype)

        def average() -> PyTree:
            return jax.tree.map(mixed, state.saliency, statistic(moved, grads))

        if first == 0:
            saliency = average()
        else:
            saliency = jax.lax.cond(step >= first, average, lambda: state.saliency)
        return updates, TrackedState(state.step + 1, saliency, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
