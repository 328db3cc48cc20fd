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
from jax.tree_util import tree_leaves, tree_map
from optax import GradientTransformationExtraArgs as Transformation

from sparsity_jax import originals, polytopes, tables, trees
from sparsity_jax.tables import ConfigError
from sparsity_jax.trees import widen
from sparsity_jax.types import Fields, PyTree

Number = float | Array
Strength = Number | PyTree  # a number, or one per parameter array
Updated = tuple[PyTree, Any]  # updates and state


# Learning rates -----------------------------------------------------------------------------------


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
        return learning_rate * factor * jnp.where(step < warm, step / max(warm, 1), 1.0)

    return as_rate(rule)


def decrease_3(learning_rate: float, epochs: int, steps_per_epoch: int) -> Rate:
    """Divided by 10 at one and at two thirds of the epochs, rounded down; of one or two epochs the
    first are gone.
    """
    thirds = (int(epochs / 3), int(2 * epochs / 3))
    return multistep(learning_rate, epochs, steps_per_epoch, milestones=thirds)


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
    total = epochs * steps_per_epoch
    warm = round(warmup_epochs * steps_per_epoch)
    if warm >= total:
        raise ConfigError("warmup_epochs", warmup_epochs, allowed=f"below epochs ({epochs})")

    def rule(step: Array) -> Array:
        progress = jnp.clip((step - warm) / (total - warm), 0, 1)
        falling = (1 + jnp.cos(jnp.pi * progress)) / 2
        return learning_rate * jnp.where(step < warm, step / max(warm, 1), falling)

    return as_rate(rule)


def piecewise(
    learning_rate: float, epochs: int, steps_per_epoch: int, *, table: str = "0:1.0"
) -> Rate:
    """Factors of the rate from given epochs on, e.g. `0:1.0,60:0.1,90:0.01`; with learning_rate 1
    they are the rates.

    Before the first epoch named the last factor applies, as in the original's notation.
    """
    del epochs
    pairs = []
    for item in table.split(","):
        try:
            epoch, factor = item.split(":")
            pairs.append((int(epoch), float(factor)))
        except ValueError:
            raise ConfigError("table", table, allowed="epoch:factor,epoch:factor") from None
    boundaries, factors = np.array(sorted(pairs)).T
    starts = jnp.asarray(steps_per_epoch * boundaries, jnp.int32)
    values = jnp.asarray(np.append(factors[-1], factors), float)
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
    drops = decrease_3(1.0, epochs, steps_per_epoch)

    def init() -> _LossHistory:
        return _LossHistory(jnp.zeros(11, float), jnp.zeros((), float), jnp.ones((), float))

    def update(state: _LossHistory, step: Array, value: Any) -> tuple[Array, _LossHistory]:
        if value is None:
            raise ValueError(
                "the rate 'dynamic_change' follows the loss: call update(..., value=loss)."
            )
        epoch = step // steps_per_epoch
        begins = (step % steps_per_epoch == 0) & (step > 0)
        finished = state.total / steps_per_epoch if loss == "mean" else state.total
        losses = jnp.where(begins, jnp.append(state.losses[1:], finished), state.losses)
        rise = losses[5:10].mean() - losses[:10].mean()
        change = jnp.select([rise > 0, rise < 0], [0.7, 1.06], 1.0)
        factor = state.factor * jnp.where(begins & (epoch > 20) & (epoch % 5 == 0), change, 1.0)
        total = jnp.where(begins | (loss == "last_batch"), 0.0, state.total) + value
        rate = learning_rate * drops.update((), step, None)[0] * factor
        return rate, _LossHistory(losses, total, factor)

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


class RateState(NamedTuple):
    """step: int32, updates made. learning_rate: of the latest update. rate: the Rate's own
    state.
    """

    step: Array
    learning_rate: Array
    rate: Any


def _start_rate(rate: Rate) -> RateState:
    return RateState(jnp.zeros((), jnp.int32), jnp.zeros((), float), rate.init())


def _next_rate(rate: Rate, state: RateState, value: Any) -> RateState:
    learning_rate, inner = rate.update(state.rate, state.step, value)
    return RateState(state.step + 1, jnp.asarray(learning_rate, float), inner)


INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _rates_in(opt_state: PyTree) -> list[Array]:
    """All rates of states that are made to hold one; entries of that name in other trees are
    parameters.
    """
    names_rate = lambda state: isinstance(state, (RateState, *INJECTED))
    rates = []
    for state in tree_leaves(opt_state, is_leaf=names_rate):
        if isinstance(state, RateState):
            rates.append(state.learning_rate)
        elif isinstance(state, INJECTED):
            # a transformation of this module knows its rate itself; the hyper-parameter is what it
            # was made of
            within = _rates_in(state.inner_state)
            if not within and "learning_rate" in state.hyperparams:
                within = [state.hyperparams["learning_rate"]]
            rates += within
    return rates


def learning_rate(opt_state: PyTree) -> Array | None:
    """The rate of the latest update, found in an optimizer's state; None if no part of it names a
    rate.

    Rates are named by this module's transformations and by `optax.inject_hyperparams`, within any
    wrapper of optax. Raises ValueError if the state names several.
    """
    rates = _rates_in(opt_state)
    if len(rates) > 1:
        raise ValueError(
            f"the optimizer's state names {len(rates)} learning rates; allowed: one. Say which is "
            "meant with learning_rate=, or read it from a part of the state."
        )
    return rates[0] if rates else None


_rate_in = learning_rate  # where an argument has its name


# Pieces -------------------------------------------------------------------------------------------


def _needing_params(init: Callable, update: Callable) -> Transformation:
    """The transformation of `update(updates, state, params, extra)`, where extra holds further
    arguments such as the loss, by name; refuses calls without params.
    """

    def checked(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        if params is None:
            raise ValueError(
                "this optimizer depends on the weights: call update(grads, state, params)."
            )
        return update(updates, state, params, extra)

    return Transformation(init, checked)


def _one_each(value: Any, params: PyTree) -> PyTree:
    if jax.tree_util.all_leaves([value]):
        return tree_map(lambda _: value, params)
    return trees.aligned(value, params, "strengths")


def scale_by_rate(learning_rate: LearningRate) -> Transformation:
    """Multiplies updates by minus the learning rate."""
    rate = as_rate(learning_rate)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, value: Any = None, **extra: Any
    ) -> Updated:
        del params, extra
        state = _next_rate(rate, state, value)
        scale = lambda u: -state.learning_rate.astype(u.dtype) * u
        return tree_map(scale, updates), state

    return Transformation(lambda _: _start_rate(rate), update)


Accumulator = Literal["float16", "bfloat16", "float32", "float64"] | None


def accumulators(params: PyTree, dtype: Any = None) -> PyTree:
    """Zeros in the shapes of `params`, for sums over many steps.

    dtype: of these; by default that of the array, but at least float32, where small terms still
        count after many steps.
    """
    wide = lambda w: jnp.promote_types(w.dtype, jnp.float32) if dtype is None else jnp.dtype(dtype)
    return tree_map(lambda w: jnp.zeros_like(w, dtype=wide(w)), params)


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
) -> Transformation:
    """buffer = momentum * buffer + (1 - dampening) * g, and simply g at the first step (PyTorch's
    rule).

    Where momentum is 0, dampening does nothing, as in PyTorch. accumulator_dtype: of the buffer,
    see `accumulators`.
    """

    def answer(g: Array, b: Array) -> Array:
        return (g + momentum * b if nesterov else b).astype(g.dtype)

    return _momentum(momentum, dampening, accumulator_dtype, answer)


def _average(momentum: Number, accumulator_dtype: Accumulator) -> Transformation:
    """momentum m + (1 - momentum) g, in the type of the accumulator."""
    return _momentum(momentum, momentum, accumulator_dtype, lambda g, b: b)


def _momentum(
    momentum: Number, dampening: Number, accumulator_dtype: Accumulator, answer: Callable
) -> Transformation:
    """`heavy_ball` that makes `answer(g, buffer)` of every array."""
    share = _share_of_new(momentum, dampening)

    def init(params: PyTree) -> HeavyBallState:
        return HeavyBallState(jnp.zeros((), jnp.int32), accumulators(params, accumulator_dtype))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        del params, extra
        first = state.step == 0

        def mix(b: Array, g: Array) -> Array:
            return jnp.where(first, g, momentum * b + share * widen(g)).astype(b.dtype)

        buffer = tree_map(mix, state.buffer, updates)
        return tree_map(answer, updates, buffer), HeavyBallState(state.step + 1, buffer)

    return Transformation(init, update)


def _share_of_new(momentum: Number, dampening: Number) -> Number:
    """The factor of the new gradient in the buffer: 1 - dampening, but 1 without momentum."""
    if isinstance(momentum, (int, float)):
        return 1 - dampening if momentum else 1.0
    return jnp.where(momentum == 0, 1.0, 1 - dampening)


def momentum_of(opt_state: PyTree) -> HeavyBallState:
    """The momentum in an optimizer's state; raises KeyError if there are several."""
    return optax.tree.get(opt_state, "HeavyBallState")


def with_momentum(opt_state: PyTree, momentum: HeavyBallState) -> PyTree:
    """`opt_state` going on from this momentum."""
    return optax.tree.set(opt_state, HeavyBallState=momentum)


def add_decayed_weights(weight_decay: Number) -> Transformation:
    """g + weight_decay * w; a weight decay that is the number 0 needs no params."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.with_extra_args_support(optax.identity())
    return _add_slope(weight_decay, lambda w: w)


def add_l1(strength: Strength) -> Transformation:
    """g + strength * sign(w), a subgradient of strength * ||w||_1. strength: a number, or one per
    parameter array.
    """
    return _add_slope(strength, jnp.sign)


def add_l2(strength: Strength) -> Transformation:
    """g + 2 * strength * w, the gradient of strength * ||w||_2^2. strength: a number, or one per
    parameter array.
    """
    return _add_slope(strength, lambda w: 2 * w)


def _add_slope(strength: Strength, slope: Callable) -> Transformation:
    def update(updates: PyTree, state: Any, params: PyTree, extra: Fields) -> Updated:
        del extra
        add = lambda g, w, s: (g + s * slope(w)).astype(g.dtype)
        return tree_map(add, updates, params, _one_each(strength, params)), state

    return _needing_params(lambda _: optax.EmptyState(), update)


# Proximal steps -----------------------------------------------------------------------------------


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
    learning_rate: of `inner`; needed where its state names none (this module's optimizers and
    `optax.inject_hyperparams` do), and checked: the first step per unit, or the last one times 1 -
    momentum. `init` tries `inner` out, at the cost of one small compilation, and raises ValueError
    for steps that are no multiple of the gradients: adaptive, normalised, clipped, projected ones,
    where soft thresholding solves another problem. In a trace that `inner` depends on, nothing can
    be tried. Raises ValueError if `update` gets no params.
    Source: Parikh, Boyd 2014, Proximal Algorithms, section 4.2.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        unit = _unit_arrays(params, 0)
        state = inner.init(_paired(params, unit))
        if tree_leaves(unit):  # `optax.tree_map_params` calls `init` without arrays
            if learning_rate is None and _rate_in(state) is None:
                raise ValueError(
                    "proximal_l1: the inner optimizer's state names no learning_rate; pass "
                    "learning_rate=."
                )
            _check_descent(inner, unit, learning_rate, momentum)
        return state

    def update(updates: PyTree, state: Any, params: PyTree, extra: Fields) -> Updated:
        slopes = _paired(updates, _unit_arrays(params, 1))
        steps, state = inner.update(
            slopes, state, _paired(params, _unit_arrays(params, 0)), **extra
        )

        def shrink(w: Array, step: tuple[Array, Array], strength: Array) -> Array:
            u, of_unit = step
            return _shrunk(u, w, -jnp.ravel(of_unit)[0] * strength)

        return tree_map(shrink, params, steps, _one_each(strength, params)), state

    return _needing_params(init, update)


def _proximal_sgd(inner: Transformation, strength: PyTree, momentum: Array) -> Transformation:
    """`proximal_l1` of this module's `sgd` at its known rate and momentum, t = rate * strength / (1
    - momentum).
    """

    def update(updates: PyTree, state: Any, params: PyTree, extra: Fields) -> Updated:
        updates, state = inner.update(updates, state, params, **extra)
        rate = _rate_in(state)
        bounds = tree_map(lambda s: rate * s / (1 - momentum), _one_each(strength, params))
        return tree_map(_shrunk, updates, params, bounds), state

    return _needing_params(inner.init, update)


def _shrunk(u: Array, w: Array, bound: Array) -> Array:
    """The update `u` of `w` followed by soft thresholding at `bound`."""
    moved = widen(w) + u
    return (jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - bound, 0) - w).astype(u.dtype)


def _unit_arrays(params: PyTree, value: float) -> PyTree:
    """`value` in arrays of one entry, or two where the parameter has one, with the number of axes
    of each parameter.
    """

    def unit(w: Array) -> Array:
        length = 2 if jnp.size(w) == 1 else 1
        return jnp.full((length,) * max(jnp.ndim(w), 1), value, float)

    return tree_map(unit, params)


def _paired(params: PyTree, unit: PyTree) -> PyTree:
    return tree_map(lambda w, u: (w, u), params, unit)


def _check_descent(inner: Transformation, unit: PyTree, rate: Any, momentum: Any) -> None:
    """Raises ValueError where steps of `inner` are no multiple of the gradients, or another one
    than stated.

    Tries gradients that stay the same until all momentum is gathered; two very different ones tell
    what is not linear.
    """

    def try_out(slope: float) -> Array:
        gradient = tree_map(lambda w: jnp.full_like(w, slope), unit)

        def step(state: Any, _: None) -> tuple[Any, Array]:
            updates, state = inner.update(gradient, state, unit, value=jnp.zeros(()))
            firsts = [jnp.ravel(update)[0] for update in tree_leaves(updates)]
            return state, -jnp.stack(firsts) / slope

        return lax.scan(step, inner.init(unit), None, length=2048)[1]

    with jax.ensure_compile_time_eval():
        tries = [try_out(slope) for slope in (1.0, 2.0**20)]
    if any(isinstance(x, jax.core.Tracer) for x in (*tries, rate, momentum)):
        return
    small, large = jax.device_get(tries)
    linear = (small >= 0) & (np.abs(large - small) <= 1e-3 * small)
    right = linear.all(0) & small.any(0)
    if not right.all():
        path = list(trees.named_leaves(unit))[np.argmin(right)]
        raise ValueError(
            "proximal_l1: steps of the inner optimizer are no fixed multiple of the gradient of "
            f"{path!r}; allowed: descent without adaptive, normalised, clipped, projected or "
            "masked steps. Before such an optimizer use add_l1; learning_rate= does not help."
        )
    if rate is None:
        return
    first, last = small[small.any(1)][[0, -1]].max(1)
    if not min(abs(first - rate), abs(last * (1 - momentum) - rate)) <= 0.02 * rate:
        raise ValueError(
            f"proximal_l1: learning_rate={rate} and momentum={momentum}, but the first step of "
            f"the inner optimizer is {first:.3g} times the gradient, and {last:.3g} times in the "
            "end."
        )


# Steps inside feasible sets -----------------------------------------------------------------------


def projected(inner: optax.GradientTransformation, sets: PyTree) -> Transformation:
    """Any optimizer whose result is projected (Euclidean) onto the sets after every step."""

    def pull(s: polytopes.ConstraintSet, w: Array, u: Array) -> Array:
        wide = widen(w)
        return _settled(s, w, s.project(wide + u) - wide)

    def update(updates: PyTree, state: Any, params: PyTree, extra: Fields) -> Updated:
        del extra
        return _map_sets(pull, sets, params, updates), state

    return optax.chain(inner, _needing_params(lambda _: optax.EmptyState(), update))


def _map_sets(function: Callable, sets: PyTree, params: PyTree, *rest: PyTree) -> PyTree:
    """`function(set, w, *rest)` of every parameter array `w`; empty arrays stay as they are."""
    of_array = lambda s, w, *others: function(s, w, *others) if w.size else w
    of_params = polytopes.broadcast(sets, params)
    return tree_map(of_array, of_params, params, *rest, is_leaf=polytopes.is_set)


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
    wide = widen(w)
    target = _rounded(constraint.pull_back(wide + update), w.dtype)
    update = (target - wide).astype(w.dtype)
    # rounding of the difference may end beyond the target: then a step that is one number shorter
    # or longer does not
    beyond = jnp.abs(_rounded(wide + widen(update), w.dtype)) > jnp.abs(target)
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


def frank_wolfe_step_size(
    learning_rate: Number, direction: Array, gap: Array, diameter: Number, rescale: str
) -> Array:
    """clip(learning_rate * f, 0, 1): f = ||direction|| / ||gap|| for rescale `gradient`, 1 /
    diameter for `diameter` and 1 for `none`. gap: vertex - weights.
    """
    if rescale == "gradient":
        length = trees.norm(gap)
        factor = trees.norm(direction) / jnp.where(length > 0, length, 1)
        # infinity times a rate of 0 is no number
        factor = jnp.minimum(factor, float(jnp.finfo(factor.dtype).max))
        # at the vertex itself the factor is infinite, hence 1 after clipping
        return jnp.where(length > 0, jnp.clip(learning_rate * factor, 0, 1), 1.0)
    return jnp.clip(learning_rate / diameter if rescale == "diameter" else learning_rate, 0, 1)


def _after(constraint: Any, step_size: Array) -> Any:
    """The same set, usable only once the previous array's step size (never negative) is known.

    XLA's CPU backend would otherwise search all arrays side by side and push each out of the cache:
    one update of a ResNet-18 took 35 to 44 ms, and 30 ms in turn (2 cores, jax 0.10.2).
    """
    if isinstance(constraint, polytopes.KSparse):
        return dataclasses.replace(constraint, k=jnp.where(step_size < 0, 1, constraint.k))
    return constraint


# Optimizers ---------------------------------------------------------------------------------------

WHOLE_SPACE = polytopes.Unconstrained()


def sgd(
    learning_rate: LearningRate,
    sets: PyTree = WHOLE_SPACE,
    *,
    momentum: tables.Fraction = 0.9,
    dampening: tables.Fraction = 0.0,
    weight_decay: tables.NonNegative = 0.0,
    nesterov: bool = False,
    accumulator_dtype: Accumulator = None,
) -> Transformation:
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
    kinds = set(map(type, tree_leaves(sets, is_leaf=polytopes.is_set)))
    return descent if kinds <= {polytopes.Unconstrained} else projected(descent, sets)


def sfw(
    learning_rate: LearningRate,
    sets: PyTree,
    *,
    momentum: tables.Fraction = 0.9,
    rescale: Literal["gradient", "diameter", "none"] = "gradient",
    weight_decay: tables.NonNegative = 0.0,
    accumulator_dtype: Accumulator = None,
) -> Transformation:
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
    tables.convert(rescale, Literal["gradient", "diameter", "none"], "rescale")

    def update(averages: PyTree, state: tuple, params: PyTree, lr: Array) -> Updated:
        size = jnp.zeros(())

        def step(s: Any, w: Array, d: Array) -> Array:
            nonlocal size
            if isinstance(s, polytopes.Unconstrained):
                return (-lr * d).astype(w.dtype)
            d = widen(d)
            gap = _after(s, size).lmo(d) - w
            size = frank_wolfe_step_size(lr, d, gap, s.diameter(w.size), rescale)
            return _settled(s, w, size * gap)

        return _map_sets(step, sets, params, averages), state

    average = _average(momentum, accumulator_dtype)
    return _in_sets(learning_rate, weight_decay, average, lambda params: (), update)


def _in_sets(
    learning_rate: LearningRate,
    weight_decay: Number,
    average: Transformation,
    init: Callable,
    update: Callable,
) -> Transformation:
    """Weight decay, an average of gradients and `update(averages, state, params, rate)`, whose
    state starts as `init(params)`.
    """
    rate = as_rate(learning_rate)

    def start(params: PyTree) -> tuple[RateState, Any]:
        return _start_rate(rate), init(params)

    def step(averages: PyTree, states: Any, params: PyTree, extra: Fields) -> Updated:
        rate_state, state = states
        rate_state = _next_rate(rate, rate_state, extra.get("value"))
        updates, state = update(averages, state, params, rate_state.learning_rate)
        return updates, (rate_state, state)

    return optax.chain(add_decayed_weights(weight_decay), average, _needing_params(start, step))


class AdaGradState(NamedTuple):
    """root: of the sum of squared directions, in the structure of the params; it stays in range
    where squares would not.
    """

    root: PyTree


def adagrad_sfw(
    learning_rate: LearningRate,
    sets: PyTree,
    *,
    momentum: tables.Fraction = 0.9,
    inner_steps: tables.Count = 2,
    delta: tables.Positive = 1e-8,
    weight_decay: tables.NonNegative = 0.0,
    accumulator_dtype: Accumulator = None,
) -> Transformation:
    """Frank-Wolfe with AdaGrad's metric H = sqrt(sum of squares) + delta.

    Each update makes `inner_steps` Frank-Wolfe steps on <d, y - w> + ||y - w||_H^2 / (2
    learning_rate) from y = w; unconstrained arrays take its minimiser -learning_rate * d / H. sets:
    as for `sfw`. accumulator_dtype: of the metric and of the averaged gradient d, see
    `accumulators`.
    Source: Combettes, Spiegel, Pokutta 2020, arXiv:2009.14114.
    """
    add = lambda r, d: jnp.hypot(widen(r), widen(d)).astype(r.dtype)

    def init(params: PyTree) -> AdaGradState:
        return AdaGradState(accumulators(params, accumulator_dtype))

    def update(averages: PyTree, state: AdaGradState, params: PyTree, lr: Array) -> Updated:
        root = tree_map(add, state.root, averages)

        def step(s: Any, w: Array, d: Array, r: Array) -> Array:
            d = widen(d)
            metric = widen(r) + delta
            if isinstance(s, polytopes.Unconstrained):
                return (-lr * d / metric).astype(w.dtype)
            unit = trees.scale_of(metric)
            start = y = widen(w)
            for _ in range(inner_steps):
                slope = d + metric * (y - start) / jnp.where(lr > 0, lr, 1)
                gap = y - s.lmo(slope)
                scale = trees.scale_of(gap)
                scaled = gap / scale  # its squares stay in range
                curvature = trees.dot(metric / unit * scaled, scaled)
                descent = trees.dot(slope / unit, scaled)
                best = lr * descent / jnp.where(curvature > 0, curvature, 1) / scale
                y = y - jnp.clip(best, 0, 1) * gap
            return _settled(s, w, y - start)

        return _map_sets(step, sets, params, averages, root), AdaGradState(root)

    average = _average(momentum, accumulator_dtype)
    return _in_sets(learning_rate, weight_decay, average, init, update)


OPTIMIZERS: dict[str, Callable] = {"sfw": sfw, "adagrad_sfw": adagrad_sfw, "sgd": sgd}


# Penalties: of an optimizer that has certain numbers, the one with the penalty --------------------


def no_penalty(tx: Transformation, values: Fields) -> Transformation:
    """The loss as it is."""
    del values
    return tx


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
    share = _share_of_new(values["momentum"], values["dampening"])
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


PENALTIES: dict[str, Callable] = {"none": no_penalty, "l1": l1, "l2": l2}


# From configuration to a transformation -----------------------------------------------------------


class Recipe(NamedTuple):
    """A checked optimizer config. Recipes that differ in numbers only share a program.

    Options are complete, defaults included; the optimizer's own have the learning rate among them.
    """

    name: str
    options: Fields
    schedule: tuple[str, Fields]
    constraint: tuple[tuple[str, str, Fields], ...]
    norms: str
    penalty: tuple[str, Fields]


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
) -> Fields:
    """An optimizer config with all its fields; schedule, penalty: a name, or a dict of a name and
    chosen options.
    """
    config = {**tables.defaults(options), **tables.options(OPTIMIZERS, name)}
    for field, table, entry in (("schedule", SCHEDULES, schedule), ("penalty", PENALTIES, penalty)):
        given = {"name": entry} if isinstance(entry, str) else entry
        config[field] = tables.options(table, **given)
    return {**config, **chosen}


def check(config: dict) -> Recipe:
    """The recipe of an optimizer config such as `dict(name="sfw", learning_rate=1.0,
    constraint=dict(...), ...)`.

    Raises ConfigError for unknown names and fields, wrong types and values out of range.
    """
    fields = tables.parameters(options)
    given = {field: value for field, value in config.items() if field in fields}
    own = {field: value for field, value in config.items() if field not in fields}
    factory = tables.lookup(OPTIMIZERS, config.get("name", ""), "name")
    common = {**tables.defaults(options), **tables.check_options(options, given)}
    own = {**tables.defaults(factory), **tables.check_options(factory, own, also=fields)}
    own["learning_rate"] = common["learning_rate"]
    if common["name"] == "sfw" and common["learning_rate"] > 1:
        raise ConfigError(
            "learning_rate", common["learning_rate"], allowed="0 to 1 with the name 'sfw'"
        )
    with tables.within("schedule"):
        schedule = tables.entry(SCHEDULES, common["schedule"], "keep")
        SCHEDULES[schedule[0]](1.0, 10**6, 1, **schedule[1])
    with tables.within("constraint"):
        constraint = polytopes.check(common["constraint"])
    with tables.within("penalty"):
        penalty = tables.entry(PENALTIES, common["penalty"], "none")
        trees.check_pattern(penalty[1].get("parameters", ""), "parameters")
        free = all(kind == "unconstrained" for _, kind, _ in constraint)
        if penalty[1].get("method") == "proximal" and not (common["name"] == "sgd" and free):
            allowed = "'subgradient', and 'proximal' with an unconstrained sgd"
            raise ConfigError("method", "proximal", allowed=allowed)
    return Recipe(common["name"], own, schedule, constraint, common["norms"], penalty)


def _traced(options: Fields) -> Fields:
    return {name: value for name, value in options.items() if isinstance(value, float)}


def _static(options: Fields) -> Fields:
    return {name: value for name, value in options.items() if not isinstance(value, float)}


def program(recipe: Recipe) -> str:
    """What the compiled program depends on: all but the numbers."""
    kinds = []
    for pattern, name, of_set in recipe.constraint:
        static = [of_set.get(field) for field in ("p", "zero_up", "zero_below")]
        kinds.append((pattern, name, static))
    penalty, of_penalty = recipe.penalty
    optimizer = (recipe.name, _static(recipe.options), recipe.schedule)
    return repr((optimizer, kinds, recipe.norms, penalty, _static(of_penalty)))


def needs_norms(recipe: Recipe) -> bool:
    """Whether some set takes its radius from the initialisation."""
    modes = [of_set.get("mode") for _, _, of_set in recipe.constraint]
    return "initialization" in modes


def numbers(
    recipe: Recipe, params: PyTree, norms: PyTree | None, order: Sequence[str] | None = None
) -> Fields:
    """What `make` may trace: the recipe's numbers and the feasible set of every parameter array.

    params: arrays or shape structs. norms: mean initial norms (`polytopes.mean_norms`), None if not
        `needs_norms`.
    order: paths of the params in the network's order, for norms `per_shape`; see
        `polytopes.share_by_shape`.
    """
    if norms is None:
        norms = tree_map(lambda _: 1.0, params)
    elif recipe.norms == "per_shape":
        norms = polytopes.share_by_shape(norms, params, order)
    sets = polytopes.build(params, norms, recipe.constraint)
    values = {name: jnp.asarray(x, float) for name, x in _traced(recipe.options).items()}
    _, of_penalty = recipe.penalty
    if "strength" in of_penalty:
        penalised = trees.matching(params, of_penalty["parameters"], "penalty.parameters")
        strength = jnp.asarray(of_penalty["strength"], float)
        of_array = lambda path, _: jnp.where(penalised[path], strength, 0.0)
        values["penalty"] = trees.map_named(of_array, params)
    return {**values, "sets": tree_map(jnp.asarray, sets)}


def make(recipe: Recipe, values: Fields, epochs: int, steps_per_epoch: int) -> Transformation:
    """The transformation of `recipe` with `values` from `numbers`, for a run of so many epochs."""
    numbers = {name: values[name] for name in _traced(recipe.options)}
    schedule, of_schedule = recipe.schedule
    rate = SCHEDULES[schedule](numbers.pop("learning_rate"), epochs, steps_per_epoch, **of_schedule)
    tx = OPTIMIZERS[recipe.name](rate, values["sets"], **numbers, **_static(recipe.options))
    penalty, of_penalty = recipe.penalty
    if "penalty" in values:
        of_penalty = {**of_penalty, "strength": values["penalty"]}
    return PENALTIES[penalty](tx, numbers, **of_penalty)
