"""Sparsity-constrained optimizers as optax transformations, and the learning-rate schemes that
drive them.

A learning rate is a number, an optax schedule (step -> rate) or a `Rate` with state of its own,
such as one that follows the loss: then pass `value=loss` to `update`. Every number may be traced,
so a sweep over learning rates, momenta or radii is one compiled program.

They work in the wrappers of optax; docs/sfw_options.md tells what to know of some. Arrays of no
entries stay as they are. Sums over steps are float32 or wider whatever the weights are
(`accumulator_dtype`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from sparsity_jax import originals, polytopes, tables, trees

PyTree = Any
Updated = tuple[PyTree, Any]  # updates and state


# Learning rates -----------------------------------------------------------------------------------


class Rate(NamedTuple):
    """A learning rate with state: `init() -> state`, `update(state, step, value) -> (rate, state)`.

    step: int32, optimizer steps taken so far. value: the loss of this step, or None where the
        caller gave none.
    """

    init: Callable
    update: Callable


def as_rate(learning_rate: float | Array | Callable | Rate) -> Rate:
    """A number, an optax schedule or a Rate as a Rate."""
    if isinstance(learning_rate, Rate):
        return learning_rate
    rule = learning_rate if callable(learning_rate) else lambda _: learning_rate
    return Rate(lambda: (), lambda state, step, value: (rule(step), state))


class _LossHistory(NamedTuple):
    losses: Array  # of the last 11 finished epochs, newest last
    total: Array  # of this epoch's step losses
    factor: Array


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
    boundaries, warm = (
        [epoch * steps_per_epoch for epoch in milestones],
        round(warmup_epochs * steps_per_epoch),
    )
    passed = lambda step: jnp.sum(step >= jnp.asarray(boundaries, jnp.int32))
    warmup = lambda step: jnp.minimum(step / warm, 1.0) if warm else 1.0
    return as_rate(
        lambda step: learning_rate * jnp.asarray(gamma, float) ** passed(step) * warmup(step)
    )


def decrease_3(learning_rate: float, epochs: int, steps_per_epoch: int) -> Rate:
    """Divided by 10 at one and at two thirds of the epochs, rounded down; of one or two epochs the
    first are gone.
    """
    return multistep(learning_rate, epochs, steps_per_epoch, milestones=_thirds(epochs))


def decrease_3_180(learning_rate: float, epochs: int, steps_per_epoch: int) -> Rate:
    """Divided by 10 at epochs 90 and 130."""
    return multistep(learning_rate, epochs, steps_per_epoch, milestones=(90, 130))


def cosine(
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    warmup_epochs: tables.NonNegative = 0.0,
) -> Rate:
    """Linear warm-up from 0, then half a cosine to 0 over the remaining steps."""
    total, warm = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    if warm >= total:
        raise tables.ConfigError(
            f"warmup_epochs is {warmup_epochs}; allowed: below epochs ({epochs})."
        )

    def rule(step: Array) -> Array:
        progress = jnp.clip((step - warm) / (total - warm), 0, 1)
        return learning_rate * jnp.where(
            step < warm, step / max(warm, 1), (1 + jnp.cos(jnp.pi * progress)) / 2
        )

    return as_rate(rule)


def piecewise(
    learning_rate: float, epochs: int, steps_per_epoch: int, *, table: str = "0:1.0"
) -> Rate:
    """Factors of the rate from given epochs on, e.g. `0:1.0,60:0.1,90:0.01`; with learning_rate 1
    they are the rates.

    Before the first epoch named the last factor applies, as in the original's notation.
    """
    del epochs
    try:
        pairs = sorted(
            (int(epoch), float(factor))
            for epoch, factor in (item.split(":") for item in table.split(","))
        )
    except ValueError:
        raise tables.ConfigError(
            f"schedule.table is {table!r}; allowed: epoch:factor,epoch:factor,..."
        ) from None

    def rule(step: Array) -> Array:
        factor = jnp.asarray(pairs[-1][1], float)
        for epoch, value in pairs:
            factor = jnp.where(step >= epoch * steps_per_epoch, value, factor)
        return learning_rate * factor

    return as_rate(rule)


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
    drops = decrease_3(1.0, epochs, steps_per_epoch)

    def init() -> _LossHistory:
        return _LossHistory(jnp.zeros(11, float), jnp.zeros((), float), jnp.ones((), float))

    def update(state: _LossHistory, step: Array, value: Any) -> tuple[Array, _LossHistory]:
        if value is None:
            raise ValueError(
                "the rate 'dynamic_change' follows the loss: call update(..., value=loss)."
            )
        epoch, new_epoch = step // steps_per_epoch, (step % steps_per_epoch == 0) & (step > 0)
        finished = state.total / steps_per_epoch if loss == "mean" else state.total
        losses = jnp.where(new_epoch, jnp.append(state.losses[1:], finished), state.losses)
        recent, longer = losses[5:10].mean(), losses[:10].mean()
        change = jnp.where(recent > longer, 0.7, jnp.where(recent < longer, 1.06, 1.0))
        factor = state.factor * jnp.where(new_epoch & (epoch > 20) & (epoch % 5 == 0), change, 1.0)
        kept = jnp.where(new_epoch | (loss == "last_batch"), 0.0, state.total)
        return learning_rate * drops.update((), step, None)[0] * factor, _LossHistory(
            losses, kept + value, factor
        )

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
        following = jnp.where(step < warm, learning_rate * (step + 1) / (warm + 1e-8), rate)
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


def _thirds(epochs: int) -> tuple[int, int]:
    return int(epochs / 3), int(2 * epochs / 3)


SCHEDULES: dict[str, Callable] = {
    "keep": keep,
    "decrease_3": decrease_3,
    "decrease_3_180": decrease_3_180,
    "dynamic_change": dynamic_change,
    "multistep": multistep,
    "cosine": cosine,
    "piecewise": piecewise,
    "original_multistep": original_multistep,
    "original_cosine": original_cosine,
}


# Pieces -------------------------------------------------------------------------------------------


class RateState(NamedTuple):
    """step: int32, updates made. learning_rate: of the latest update. rate: the Rate's own
    state.
    """

    step: Array
    learning_rate: Array
    rate: Any


def _start_rate(rate: Rate) -> RateState:
    return RateState(jnp.zeros((), jnp.int32), jnp.zeros((), float), rate.init())


def _next_rate(rate: Rate, state: RateState, value: Any) -> tuple[Array, RateState]:
    learning_rate, inner = rate.update(state.rate, state.step, value)
    learning_rate = jnp.asarray(learning_rate, float)
    return learning_rate, RateState(state.step + 1, learning_rate, inner)


def scale_by_rate(learning_rate: float | Callable | Rate) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate."""
    rate = as_rate(learning_rate)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, value: Any = None, **extra: Any
    ) -> Updated:
        del params, extra
        lr, state = _next_rate(rate, state, value)
        return jax.tree.map(lambda u: -lr.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: _start_rate(rate), update)


Accumulator = Literal["float16", "bfloat16", "float32", "float64"] | None


def accumulators(params: PyTree, dtype: Any = None) -> PyTree:
    """Zeros in the shapes of `params`, for sums over many steps.

    dtype: of these; by default that of the array, but at least float32, where small terms still
        count after many steps.
    """
    wide = lambda w: jnp.promote_types(w.dtype, jnp.float32) if dtype is None else jnp.dtype(dtype)
    return jax.tree.map(lambda w: jnp.zeros_like(w, dtype=wide(w)), params)


class HeavyBallState(NamedTuple):
    """step: int32. buffer: momentum, in the structure of the params."""

    step: Array
    buffer: PyTree


def heavy_ball(
    momentum: float,
    dampening: float = 0.0,
    *,
    nesterov: bool = False,
    accumulator_dtype: Accumulator = None,
) -> optax.GradientTransformationExtraArgs:
    """buffer = momentum * buffer + (1 - dampening) * g, and simply g at the first step (PyTorch's
    rule).

    Where momentum is 0, dampening does nothing, as in PyTorch. accumulator_dtype: of the buffer,
    see `accumulators`.
    """

    def init(params: PyTree) -> Any:
        return HeavyBallState(jnp.zeros((), jnp.int32), accumulators(params, accumulator_dtype))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        del params, extra
        state = _blend(state, updates, momentum, dampening)
        out = state.buffer
        if nesterov:
            out = jax.tree.map(lambda g, b: g + momentum * b, updates, out)
        return jax.tree.map(lambda g, b: b.astype(g.dtype), updates, out), state

    return optax.GradientTransformationExtraArgs(init, update)


def _blend(
    state: HeavyBallState, updates: PyTree, momentum: float, dampening: float
) -> HeavyBallState:
    first = state.step == 0
    share = _share_of_new(momentum, dampening)
    mix = lambda b, g: jnp.where(first, g, momentum * b + share * trees.widen(g)).astype(b.dtype)
    return HeavyBallState(state.step + 1, jax.tree.map(mix, state.buffer, updates))


def _share_of_new(momentum: float | Array, dampening: float | Array) -> float | Array:
    """The factor of the new gradient in the buffer: 1 - dampening, but 1 without momentum."""
    if isinstance(momentum, (int, float)):
        return 1 - dampening if momentum else 1.0
    return jnp.where(momentum == 0, 1.0, 1 - dampening)


def momentum_of(opt_state: PyTree) -> HeavyBallState:
    """The momentum in an optimizer's state; raises ValueError if there is not exactly one."""
    found = [
        leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_momentum) if _is_momentum(leaf)
    ]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(found)} momenta; only that of one sgd can be "
            "handed on."
        )
    return found[0]


def with_momentum(opt_state: PyTree, momentum: HeavyBallState) -> PyTree:
    """`opt_state` going on from this momentum."""
    return jax.tree.map(
        lambda leaf: momentum if _is_momentum(leaf) else leaf, opt_state, is_leaf=_is_momentum
    )


def _is_momentum(state: Any) -> bool:
    return isinstance(state, HeavyBallState)


def add_decayed_weights(weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """g + weight_decay * w; a weight decay that is the number 0 needs no params."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.with_extra_args_support(optax.identity())
    return _add_slope(weight_decay, lambda w: w)


def add_l1(strength: float | Array | PyTree) -> optax.GradientTransformationExtraArgs:
    """g + strength * sign(w), a subgradient of strength * ||w||_1. strength: a number, or one per
    parameter array.
    """
    return _add_slope(strength, jnp.sign)


def add_l2(strength: float | Array | PyTree) -> optax.GradientTransformationExtraArgs:
    """g + 2 * strength * w, the gradient of strength * ||w||_2^2. strength: a number, or one per
    parameter array.
    """
    return _add_slope(strength, lambda w: 2 * w)


def _add_slope(strength: PyTree, slope: Callable) -> optax.GradientTransformationExtraArgs:
    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        del extra
        _need_params(params)
        add = lambda w, g, s: (g + s * slope(w)).astype(g.dtype)
        return jax.tree.map(add, params, updates, _one_each(strength, params)), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _one_each(strength: PyTree, params: PyTree) -> PyTree:
    if jax.tree_util.all_leaves([strength]):
        return jax.tree.map(lambda _: strength, params)
    return trees.aligned(strength, params, "strengths")


class ProximalState(NamedTuple):
    """inner: of the wrapped optimizer. memory: its buffers if every gradient so far had been 1, of
    one entry per array (two of arrays that have one), as one vector."""

    inner: PyTree
    memory: Array


def proximal_l1(
    inner: optax.GradientTransformation,
    strength: float | Array | PyTree,
    *,
    learning_rate: float | None = None,
    momentum: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, then soft thresholding: w <- sign(w) max(|w| - t, 0), t = strength * step per unit
    of gradient.

    Reaches exact zeros, which the subgradient never does. strength: a number, or one per parameter
    array.
    inner: gradient descent, in any wrapper: with a schedule, momentum, decay, scaled, in
    `optax.MultiSteps` or `optax.apply_if_finite`. Descent multiplies gradients by a number, the
    step per unit, which depends on the update and on what wrappers did, but not on the gradients.
    So `inner` runs beside the real arrays on one more entry per array, whose weight is 0 and whose
    gradient is always 1: minus its update is that number. It follows momentum as it gathers, and is
    0 in calls that make no step.
    learning_rate: of `inner`; needed where its state names none (this module's optimizers and
    `optax.inject_hyperparams` do), and checked: the first step per unit, or the last one times 1 -
    momentum. `init` tries `inner` out, at the cost of one small compilation, and raises ValueError
    for steps that are no multiple of the gradients: adaptive, normalised, clipped, projected ones,
    where soft thresholding solves another problem. In a trace that `inner` depends on, nothing can
    be tried. Raises ValueError if `update` gets no params.
    Source: Parikh, Boyd 2014, Proximal Algorithms, section 4.2.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Any:
        state, unit = inner.init(params), _unit_arrays(params)
        if jax.tree.leaves(unit):  # `optax.tree_map_params` calls `init` without arrays
            if learning_rate is None and _rate_in(state) is None:
                raise ValueError(
                    "proximal_l1: the inner optimizer's state names no learning_rate; pass "
                    "learning_rate=."
                )
            _check_descent(inner, unit, learning_rate, momentum)
        return ProximalState(state, _memory(state, inner.init(unit)))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        _need_params(params)
        unit = _unit_arrays(params)
        remembered = _remembered(state, jax.eval_shape(inner.init, unit))
        ones = jax.tree.map(jnp.ones_like, unit)
        if any(map(_is_skipping, jax.tree.leaves(state.inner, is_leaf=_is_skipping))):
            # what makes the wrapper skip a step must do so here too
            ones = jax.tree.map(
                lambda u, g: jnp.where(jnp.all(jnp.isfinite(g)), u, jnp.nan), ones, updates
            )
        steps, remembered = inner.update(ones, remembered, unit, **extra)
        updates, new = inner.update(updates, state.inner, params, **extra)
        bounds = jax.tree.map(lambda u, s: -jnp.ravel(u)[0] * s, steps, _one_each(strength, params))
        return _shrunk(params, updates, bounds), ProximalState(new, _memory(new, remembered))

    return optax.GradientTransformationExtraArgs(init, update)


def _proximal_sgd(
    inner: optax.GradientTransformationExtraArgs, strength: PyTree, momentum: Array
) -> optax.GradientTransformationExtraArgs:
    """`proximal_l1` of this module's `sgd` at its known rate and momentum, t = rate * strength / (1
    - momentum).
    """

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        updates, state = inner.update(updates, state, params, **extra)
        rate = _rate_in(state)
        bounds = jax.tree.map(lambda s: rate * s / (1 - momentum), _one_each(strength, params))
        return _shrunk(params, updates, bounds), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _shrunk(params: PyTree, updates: PyTree, bounds: PyTree) -> PyTree:
    """`updates` followed by soft thresholding at `bounds`."""

    def shrink(w: Array, u: Array, bound: Array) -> Array:
        moved = trees.widen(w) + u
        return (jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - bound, 0) - w).astype(u.dtype)

    return jax.tree.map(shrink, params, updates, bounds)


def _unit_arrays(params: PyTree) -> PyTree:
    """Zeros of one entry, or two where the parameter has one, with the number of axes of each
    parameter.
    """
    length = lambda w: 2 if jnp.size(w) == 1 else 1
    return jax.tree.map(lambda w: jnp.zeros((length(w),) * max(jnp.ndim(w), 1), float), params)


def _is_skipping(state: Any) -> bool:
    return isinstance(state, (optax.MultiStepsState, optax.ApplyIfFiniteState))


def _memory(state: PyTree, of_units: PyTree) -> Array:
    """What the state for unit arrays has of its own: the buffers, which have other shapes than
    those of `state`.
    """
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(of_units), strict=True)
    buffers = [
        jnp.ravel(unit).astype(float) for leaf, unit in pairs if jnp.shape(leaf) != jnp.shape(unit)
    ]
    return jnp.concatenate([jnp.zeros(0, float), *buffers])


def _remembered(state: ProximalState, like: PyTree) -> PyTree:
    """The state for unit arrays: buffers from the memory; counters, rates and the like are those of
    the inner state.
    """
    leaves, start = [], 0
    for leaf, unit in zip(jax.tree.leaves(state.inner), jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != unit.shape:
            leaf = state.memory[start : start + unit.size].reshape(unit.shape).astype(unit.dtype)
            start += unit.size
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _check_descent(
    inner: optax.GradientTransformationExtraArgs, unit: PyTree, rate: Any, momentum: Any
) -> None:
    """Raises ValueError where steps of `inner` are no multiple of the gradients, or another one
    than stated.

    Tries gradients that stay the same until all momentum is gathered; two very different ones tell
    what is not linear.
    """

    def try_out(slope: float) -> Array:
        gradient = jax.tree.map(lambda w: jnp.full_like(w, slope), unit)

        def step(state: Any, _: None) -> tuple[Any, Array]:
            updates, state = inner.update(gradient, state, unit, value=jnp.zeros(()))
            return state, jnp.stack(
                [-jnp.ravel(update)[0] / slope for update in jax.tree.leaves(updates)]
            )

        return lax.scan(step, inner.init(unit), None, length=2048)[1]

    with jax.ensure_compile_time_eval():
        tries = [try_out(slope) for slope in (1.0, 2.0**20)]
    if any(isinstance(x, jax.core.Tracer) for x in (*tries, rate, momentum)):
        return
    of_small, of_large = jax.device_get(tries)
    wrong = ~((of_small >= 0) & (np.abs(of_large - of_small) <= 1e-3 * of_small)).all(
        0
    ) | ~of_small.any(0)
    if wrong.any():
        path = list(trees.named_leaves(unit))[np.argmax(wrong)]
        raise ValueError(
            "proximal_l1: steps of the inner optimizer are no fixed multiple of the gradient of "
            f"{path!r}; allowed: "
            "descent without adaptive, normalised, clipped, projected or masked steps. Before "
            "such an optimizer use "
            "add_l1; learning_rate= does not help."
        )
    if rate is None:
        return
    first, last = of_small[of_small.any(1)][[0, -1]].max(1)
    if not min(abs(first - rate), abs(last * (1 - momentum) - rate)) <= 0.02 * rate:
        raise ValueError(
            f"proximal_l1: learning_rate={rate} and momentum={momentum}, but the first step of "
            "the inner optimizer is "
            f"{first:.3g} times the gradient, and {last:.3g} times in the end."
        )


def projected(
    inner: optax.GradientTransformation, sets: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer whose result is projected (Euclidean) onto the sets after every step."""
    inner = optax.with_extra_args_support(inner)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        _need_params(params)
        updates, state = inner.update(updates, state, params, **extra)

        def pull(s: polytopes.ConstraintSet, w: Array, u: Array) -> Array:
            wide = trees.widen(w)
            return _settled(s, w, s.project(wide + u) - wide)

        return _map_sets(pull, sets, params, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _map_sets(function: Callable, sets: PyTree, params: PyTree, *rest: PyTree) -> PyTree:
    """`function(set, w, *rest)` of every parameter array `w`; empty arrays stay as they are."""
    of_array = lambda s, w, *others: function(s, w, *others) if w.size else w
    return jax.tree.map(
        of_array, polytopes.broadcast(sets, params), params, *rest, is_leaf=polytopes.is_set
    )


def _settled(constraint: polytopes.ConstraintSet, w: Array, update: Array) -> Array:
    """`update` in the type of the weights `w`; of types narrower than float32 one that keeps them
    in the set.

    In float32 or wider a step inside the set ends inside it. In a narrow type the sum w + update is
    rounded, by more than the pull towards the set of a small step, and the error of many steps
    would add up. So the new weights are pulled back into the set in float32, then rounded once:
    they are at most that rounding outside. The cost is one more norm per array.
    """
    if jnp.finfo(w.dtype).bits >= 32:
        return update.astype(w.dtype)
    wide = trees.widen(w)
    target = _rounded(constraint.pull_back(wide + update), w.dtype)
    update = (target - wide).astype(w.dtype)
    # rounding of the difference may end beyond the target: then a step that is one number shorter
    # or longer does not
    beyond = jnp.abs(_rounded(wide + trees.widen(update), w.dtype)) > jnp.abs(target)
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


def _rate_in(opt_state: PyTree) -> Array | None:
    """The one learning rate that an optimizer's state names; None if there is none."""
    rates = _rates_in(opt_state)
    if len(rates) > 1:
        raise ValueError(
            f"the optimizer's state names {len(rates)} learning rates; allowed: one. Say which is "
            "meant with "
            "learning_rate=, or read it from a part of the state."
        )
    return rates[0] if rates else None


def _rates_in(opt_state: PyTree) -> list[Array]:
    """All rates of states that are made to hold one; entries of that name in other trees are
    parameters.
    """
    rates = []
    for state in jax.tree.leaves(opt_state, is_leaf=_names_rate):
        if isinstance(state, RateState):
            rates.append(state.learning_rate)
        elif isinstance(state, INJECTED):
            # a transformation of this module knows its rate itself; the hyper-parameter is what it
            # was made of
            injected = (
                [state.hyperparams["learning_rate"]] if "learning_rate" in state.hyperparams else []
            )
            rates += _rates_in(state.inner_state) or injected
    return rates


INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _names_rate(state: Any) -> bool:
    return isinstance(state, (RateState, *INJECTED))


def _need_params(params: PyTree) -> None:
    if params is None:
        raise ValueError(
            "this optimizer depends on the weights: call update(grads, state, params)."
        )


def frank_wolfe_step_size(
    learning_rate: float | Array,
    direction: Array,
    gap: Array,
    diameter: float | Array,
    rescale: Literal["gradient", "diameter", "none"],
) -> Array:
    """clip(learning_rate * f, 0, 1): f = ||direction|| / ||gap||, 1 / diameter or 1. gap: vertex -
    weights.
    """
    if rescale == "gradient":
        length = trees.norm(gap)
        factor = trees.norm(direction) / jnp.where(length > 0, length, 1)
        factor = jnp.minimum(
            factor, float(jnp.finfo(factor.dtype).max)
        )  # infinity times a rate of 0 is no number
        # at the vertex itself the factor is infinite, hence 1 after clipping
        return jnp.where(length > 0, jnp.clip(learning_rate * factor, 0, 1), 1.0)
    return jnp.clip(learning_rate / diameter if rescale == "diameter" else learning_rate, 0, 1)


WHOLE_SPACE = polytopes.Unconstrained()


# Optimizers ---------------------------------------------------------------------------------------


def sgd(
    learning_rate: float | Callable | Rate,
    sets: PyTree = WHOLE_SPACE,
    *,
    momentum: tables.Fraction = 0.9,
    dampening: tables.Fraction = 0.0,
    weight_decay: tables.NonNegative = 0.0,
    nesterov: bool = False,
    accumulator_dtype: Accumulator = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum as in PyTorch; with constrained `sets` projected SGD.

    sets: one feasible set (`polytopes`) for all parameter arrays, or a tree of them.
    accumulator_dtype: of the momentum buffer, see `accumulators`.
    Source: Pokutta et al. 2020, arXiv:2010.07243 (projected variant).
    """
    descent = optax.chain(
        add_decayed_weights(weight_decay),
        heavy_ball(momentum, dampening, nesterov=nesterov, accumulator_dtype=accumulator_dtype),
        scale_by_rate(learning_rate),
    )
    free = all(
        isinstance(s, polytopes.Unconstrained)
        for s in jax.tree.leaves(sets, is_leaf=polytopes.is_set)
    )
    return descent if free else projected(descent, sets)


def _after(constraint: polytopes.ConstraintSet, step_size: Array) -> polytopes.ConstraintSet:
    """The same set, usable only once the previous array's step size (never negative) is known.

    XLA's CPU backend would otherwise search all arrays side by side and push each out of the cache:
    one update of a ResNet-18 took 35 to 44 ms, and 30 ms in turn (2 cores, jax 0.10.2).
    """
    if isinstance(constraint, polytopes.KSparse):
        return dataclasses.replace(constraint, k=jnp.where(step_size < 0, 1, constraint.k))
    return constraint


class FrankWolfeState(NamedTuple):
    """rate: RateState. momentum: HeavyBallState."""

    rate: RateState
    momentum: HeavyBallState


def sfw(
    learning_rate: float | Callable | Rate,
    sets: PyTree,
    *,
    momentum: tables.Fraction = 0.9,
    rescale: Literal["gradient", "diameter", "none"] = "gradient",
    weight_decay: tables.NonNegative = 0.0,
    accumulator_dtype: Accumulator = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic Frank-Wolfe: w <- (1 - a) w + a v with the vertex v = LMO(m), m = momentum m + (1
    - momentum) g.

    a = clip(learning_rate * f, 0, 1); rescale: f = ||m|| / ||v - w|| (`gradient`), 1 / diameter or
    1. Feasible weights stay feasible; in bfloat16 and float16 they are at most one rounding
    outside. sets: one feasible set (`polytopes`) for all parameter arrays, or a tree of them;
    unconstrained arrays, where no vertex exists, take the step
    -learning_rate * m (its length is that of `gradient`). accumulator_dtype: of m, see
    `accumulators`. Raises ValueError where `update` gets no params. Source: Pokutta et al. 2020,
    arXiv:2010.07243, Algorithm 1.
    """
    rate, average = (
        as_rate(learning_rate),
        heavy_ball(momentum, momentum, accumulator_dtype=accumulator_dtype),
    )
    decay = add_decayed_weights(weight_decay)
    if rescale not in ("gradient", "diameter", "none"):
        raise ValueError(f"rescale is {rescale!r}; allowed: 'gradient', 'diameter', 'none'.")

    def init(params: PyTree) -> Any:
        return FrankWolfeState(_start_rate(rate), average.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, value: Any = None, **extra: Any
    ) -> Updated:
        del extra
        _need_params(params)
        lr, rate_state = _next_rate(rate, state.rate, value)
        updates, _ = decay.update(updates, decay.init(params), params)
        momentum_state = _blend(state.momentum, updates, momentum, momentum)
        size = jnp.zeros(())

        def step(s: Any, w: Array, d: Array) -> Any:
            nonlocal size
            if isinstance(s, polytopes.Unconstrained):
                return (-lr * d).astype(w.dtype)
            d = trees.widen(d)
            gap = _after(s, size).lmo(d) - w
            size = frank_wolfe_step_size(lr, d, gap, s.diameter(w.size), rescale)
            return _settled(s, w, size * gap)

        out = _map_sets(step, sets, params, momentum_state.buffer)
        return out, FrankWolfeState(rate_state, momentum_state)

    return optax.GradientTransformationExtraArgs(init, update)


class AdaGradSFWState(NamedTuple):
    """rate: RateState. momentum: HeavyBallState.

    squares: sum of squared directions, in the structure of the params, in units of their array's
        `units` squared.
    units: [arrays] powers of two that keep the squares in the range of their type, 1 in ordinary
        ranges.
    """

    rate: RateState
    momentum: HeavyBallState
    squares: PyTree
    units: Array


def adagrad_sfw(
    learning_rate: float | Callable | Rate,
    sets: PyTree,
    *,
    momentum: tables.Fraction = 0.9,
    inner_steps: tables.Count = 2,
    delta: tables.Positive = 1e-8,
    weight_decay: tables.NonNegative = 0.0,
    accumulator_dtype: Accumulator = None,
) -> optax.GradientTransformationExtraArgs:
    """Frank-Wolfe with AdaGrad's metric H = sqrt(sum of squares) + delta.

    Each update makes `inner_steps` Frank-Wolfe steps on <d, y - w> + ||y - w||_H^2 / (2
    learning_rate) from y = w; unconstrained arrays take its minimiser -learning_rate * d / H. sets:
    as for `sfw`. accumulator_dtype: of the sum of squares and of the averaged gradient d, see
    `accumulators`.
    Source: Combettes, Spiegel, Pokutta 2020, arXiv:2009.14114.
    """
    rate, average = (
        as_rate(learning_rate),
        heavy_ball(momentum, momentum, accumulator_dtype=accumulator_dtype),
    )
    decay = add_decayed_weights(weight_decay)

    def init(params: PyTree) -> Any:
        squares = accumulators(params, accumulator_dtype)
        return AdaGradSFWState(
            _start_rate(rate), average.init(params), squares, _smallest_units(squares)
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, value: Any = None, **extra: Any
    ) -> Updated:
        del extra
        _need_params(params)
        lr, rate_state = _next_rate(rate, state.rate, value)
        updates, _ = decay.update(updates, decay.init(params), params)
        momentum_state = _blend(state.momentum, updates, momentum, momentum)
        direction = momentum_state.buffer
        units = _units_for(direction, state.units)
        squares = _add_squares(state.squares, direction, state.units, units)

        def step(
            s: polytopes.ConstraintSet, w: Array, d: Array, square: Array, unit: Array
        ) -> Array:
            unit = unit.astype(trees.widen(d).dtype)
            d, square = trees.widen(d) / unit, trees.widen(square)
            positive = square > 0  # the square root has no derivative at 0
            root = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
            metric = root + delta / unit
            if isinstance(s, polytopes.Unconstrained):
                return (-lr * d / metric).astype(w.dtype)
            start = trees.widen(w)
            y = start
            for _ in range(inner_steps):
                slope = d + metric * (y - start) / jnp.where(lr > 0, lr, 1)
                gap = y - s.lmo(slope * unit)
                scale = trees.scale_of(gap)
                scaled = gap / scale  # its squares stay in range
                curvature = trees.dot(metric * scaled, scaled)
                best = (
                    lr * trees.dot(slope, scaled) / jnp.where(curvature > 0, curvature, 1) / scale
                )
                y = y - jnp.clip(best, 0, 1) * gap
            return _settled(s, w, y - start)

        per_array = jax.tree.unflatten(jax.tree.structure(direction), list(units))
        out = _map_sets(step, sets, params, direction, squares, per_array)
        return out, AdaGradSFWState(rate_state, momentum_state, squares, units)

    return optax.GradientTransformationExtraArgs(init, update)


def _smallest_units(squares: PyTree) -> Array:
    """Units of the squares before anything is summed: [arrays], so small that any other is
    larger.
    """
    leaves = jax.tree.leaves(squares)
    dtype = jnp.result_type(jnp.float32, *leaves)
    units = jnp.full(len(leaves), float(jnp.finfo(dtype).tiny), dtype)
    return trees.varying_like(units, leaves)


def _units_for(direction: PyTree, units: Array) -> Array:
    """The units, each larger where the squares of its array's `direction` would leave the range,
    and 1 where not.
    """
    needed = []
    for d in jax.tree.leaves(direction):
        scale = trees.scale_of(trees.widen(d)).astype(units.dtype)
        reach = 2.0 ** (
            jnp.finfo(d.dtype).maxexp // 4
        )  # the squares fill half of the range, their sums the other
        needed.append(scale / jnp.clip(scale, 1 / reach, reach))
    return jnp.maximum(units, jnp.stack(needed)) if needed else units


def _add_squares(squares: PyTree, direction: PyTree, before: Array, after: Array) -> PyTree:
    """The sums, in units of `before`, with the squares of `direction`, in units of `after`."""
    sums = []
    leaves, structure = jax.tree.flatten(squares)
    for square, d, unit, ratio in zip(leaves, jax.tree.leaves(direction), after, before / after):
        wide = trees.widen(d)
        term = wide / unit.astype(wide.dtype)
        rescaled = trees.widen(square) * ratio.astype(wide.dtype) ** 2
        total = jnp.where(ratio == 1, square, rescaled) + term * term
        sums.append(total.astype(square.dtype))
    return jax.tree.unflatten(structure, sums)


OPTIMIZERS: dict[str, Callable] = {"sfw": sfw, "adagrad_sfw": adagrad_sfw, "sgd": sgd}


# Penalties ----------------------------------------------------------------------------------------


def no_penalty() -> None:
    """The loss as it is."""


def l1(
    *,
    strength: tables.NonNegative = 3e-5,
    method: Literal["subgradient", "proximal"] = "subgradient",
    parameters: str = ".*",
) -> None:
    """strength * ||w||_1 in the loss: by its subgradient as published, or by a proximal step that
    reaches exact zeros.

    parameters: regular expression that the whole path of a penalised parameter array matches.
    """


def l2(*, strength: tables.NonNegative = 3e-5, parameters: str = ".*") -> None:
    """strength * ||w||_2^2 in the loss (its gradient is 2 * strength * w). parameters: as for
    `l1`.
    """


PENALTIES = {"none": no_penalty, "l1": l1, "l2": l2}


# From configuration to a transformation -----------------------------------------------------------


class Recipe(NamedTuple):
    """A checked optimizer config. Recipes that differ in `numbers` only share a program."""

    name: str
    numbers: dict[str, float]
    static: dict[str, Any]
    schedule: tuple[str, dict[str, Any]]
    constraint: tuple[tuple[str, str, dict], ...]
    norms: str
    penalty: tuple[str, dict[str, str]] = ("none", {})


def options(
    *,
    name: str,
    learning_rate: tables.NonNegative = 0.1,
    schedule: Annotated[dict, tables.Named(SCHEDULES)] = {"name": "keep"},  # noqa: B006
    constraint: polytopes.Config = {"name": "unconstrained"},  # noqa: B006
    norms: Literal["per_parameter", "per_shape"] = "per_parameter",
    penalty: Annotated[dict, tables.Named(PENALTIES)] = {"name": "none"},  # noqa: B006
) -> None:
    """Fields of every optimizer config beside the chosen optimizer's own.

    norms: how `initialization` radii are measured; `per_shape` is the original's table, see
        `share_by_shape`.
    """


Config = Annotated[dict, tables.Named(OPTIMIZERS, options)]


def settings(
    name: str, *, schedule: str | dict = "keep", penalty: str | dict = "none", **chosen: Any
) -> dict:
    """An optimizer config with all its fields; schedule, penalty: a name, or a dict of a name and
    chosen options.
    """
    own = tables.defaults(tables.lookup(OPTIMIZERS, name, "name"))
    whole = lambda table, entry: tables.options(
        table, **({"name": entry} if isinstance(entry, str) else entry)
    )
    entries = dict(schedule=whole(SCHEDULES, schedule), penalty=whole(PENALTIES, penalty))
    return {"name": name, **tables.defaults(options), **own, **entries, **chosen}


def check(config: dict) -> Recipe:
    """The recipe of an optimizer config such as `dict(name="sfw", learning_rate=1.0,
    constraint=dict(...), ...)`.

    Raises ConfigError for unknown names and fields, wrong types and values out of range.
    """
    config = dict(config)
    factory = tables.lookup(OPTIMIZERS, config.get("name", ""), "name")
    fields = tables.parameters(options)
    common = {field: config.pop(field) for field in fields if field in config}
    common = {**tables.defaults(options), **tables.check_options(options, common)}
    own = tables.check_options(factory, config, also=fields)
    if common["name"] == "sfw" and common["learning_rate"] > 1:
        raise tables.ConfigError(
            "learning_rate", common["learning_rate"], allowed="0 to 1 with the name 'sfw'"
        )
    schedule = dict(common["schedule"])
    schedule_name = schedule.pop("name", "keep")
    with tables.within("schedule"):
        rule = tables.lookup(SCHEDULES, schedule_name, "name")
        schedule = tables.check_options(rule, schedule)
    rule(1.0, 10**6, 1, **schedule)
    own = {**tables.defaults(factory), **own}
    numbers = {key: value for key, value in own.items() if isinstance(value, float)}
    static = {key: value for key, value in own.items() if key not in numbers}
    numbers["learning_rate"] = common["learning_rate"]
    with tables.within("constraint"):
        constraint = polytopes.check(common["constraint"])
    with tables.within("penalty"):
        penalty = _check_penalty(common, constraint)
    if "strength" in penalty[1]:
        numbers["penalty"] = penalty[1].pop("strength")
    return Recipe(
        common["name"],
        numbers,
        static,
        (schedule_name, schedule),
        constraint,
        common["norms"],
        penalty,
    )


def _check_penalty(config: dict, constraint: tuple) -> tuple[str, dict]:
    given = dict(config["penalty"])
    name = given.pop("name", "none")
    rule = tables.lookup(PENALTIES, name, "name")
    chosen = {**tables.defaults(rule), **tables.check_options(rule, given)}
    trees.check_pattern(chosen.get("parameters", ""), "parameters")
    free = all(kind == "unconstrained" for _, kind, _ in constraint)
    if chosen.get("method") == "proximal" and not (config["name"] == "sgd" and free):
        raise tables.ConfigError(
            "method", "proximal", allowed="'subgradient', and 'proximal' with an unconstrained sgd"
        )
    return name, chosen


def program(recipe: Recipe) -> str:
    """What the compiled program depends on: all but the numbers."""
    kinds = []
    for pattern, name, chosen in recipe.constraint:
        static = [chosen.get(key) for key in ("p", "zero_up", "zero_below")]
        kinds.append((pattern, name, static))
    same = (recipe.name, recipe.static, recipe.schedule, recipe.norms, recipe.penalty)
    return repr((same, sorted(recipe.numbers), kinds))


def needs_norms(recipe: Recipe) -> bool:
    """Whether some set takes its radius from the initialisation."""
    for _, name, chosen in recipe.constraint:
        options = {**tables.defaults(polytopes.SETS[name]), **chosen}
        if options.get("mode") == "initialization":
            return True
    return False


def numbers(
    recipe: Recipe,
    params: PyTree,
    norms: PyTree | None,
    order: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What `make` may trace: the recipe's numbers and the feasible set of every parameter array.

    params: arrays or shape structs. norms: mean initial norms (`polytopes.mean_norms`), None if not
        `needs_norms`.
    order: paths of the params in the network's order, for norms `per_shape`; see
        `polytopes.share_by_shape`.
    """
    if norms is None:
        norms = jax.tree.map(lambda _: 1.0, params)
    elif recipe.norms == "per_shape":
        norms = polytopes.share_by_shape(norms, params, order)
    sets = polytopes.build(params, norms, recipe.constraint)
    values = {key: jnp.asarray(value, float) for key, value in recipe.numbers.items()}
    if "penalty" in values:
        chosen = trees.matching(params, recipe.penalty[1]["parameters"], "penalty.parameters")
        strength = values["penalty"]
        of_array = lambda path, _: jnp.where(chosen[path], strength, 0.0)
        values["penalty"] = trees.map_named(of_array, params)
    return {**values, "sets": jax.tree.map(jnp.asarray, sets)}


def make(
    recipe: Recipe, values: dict[str, Any], epochs: int, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The transformation of `recipe` with `values` from `numbers`, for a run of so many epochs."""
    values = dict(values)
    name, schedule = recipe.schedule
    rate = SCHEDULES[name](values.pop("learning_rate"), epochs, steps_per_epoch, **schedule)
    strength = values.pop("penalty", None)
    tx = OPTIMIZERS[recipe.name](rate, values.pop("sets"), **values, **recipe.static)
    if strength is None:
        return tx
    penalty, chosen = recipe.penalty
    if chosen.get("method") == "proximal":  # momentum with dampening lengthens steps less
        share = _share_of_new(values["momentum"], values["dampening"])
        kept = (1 - values["momentum"]) / jnp.maximum(share, 1e-12)
        return _proximal_sgd(tx, strength, 1 - kept)
    return optax.chain({"l1": add_l1, "l2": add_l2}[penalty](strength), tx)


def learning_rate(opt_state: PyTree) -> Array | None:
    """The rate of the latest update, found in an optimizer's state; None if no part of it names a
    rate.

    Rates are named by this module's transformations and by `optax.inject_hyperparams`, within any
    wrapper of optax. Raises ValueError if the state names several.
    """
    return _rate_in(opt_state)
