"""SGD, projected SGD, stochastic Frank-Wolfe, and the pieces that optimizers are chained from."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import tree_leaves, tree_map
from optax import GradientTransformationExtraArgs as Transformation

from sparsity_jax import polytopes, tables, trees
from sparsity_jax.optim import order, rates
from sparsity_jax.optim.rates import LearningRate, Number, Updated
from sparsity_jax.trees import widen
from sparsity_jax.types import Fields, PyTree

__all__ = [
    "Accumulator",
    "HeavyBallState",
    "Strength",
    "accumulators",
    "add_decayed_weights",
    "add_slope",
    "by_averages",
    "frank_wolfe_step_size",
    "heavy_ball",
    "momentum_of",
    "needing_params",
    "one_each",
    "projected",
    "sfw",
    "sgd",
    "share_of_new",
    "with_momentum",
    "within_sets",
]

Strength = Number | PyTree  # a number, or one per parameter array
Accumulator = Literal["float16", "bfloat16", "float32", "float64"] | None
_WHOLE_SPACE = polytopes.Unconstrained()


# Pieces -------------------------------------------------------------------------------------------


def needing_params(init: Callable, update: Callable) -> Transformation:
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


def _stateless(function: Callable) -> Transformation:
    """The transformation that makes `function(updates, params)` of updates."""

    def update(updates: PyTree, state: Any, params: PyTree, extra: Fields) -> Updated:
        del extra
        return function(updates, params), state

    return needing_params(lambda _: optax.EmptyState(), update)


def add_slope(slope: Callable, strength: Strength) -> Transformation:
    """g + strength * slope(w)."""
    add = lambda g, w, s: (g + s * slope(w)).astype(g.dtype)
    return _stateless(
        lambda updates, params: tree_map(add, updates, params, one_each(strength, params))
    )


def one_each(value: Strength, params: PyTree) -> PyTree:
    """One number per parameter array."""
    if jax.tree_util.all_leaves([value]):
        return tree_map(lambda _: value, params)
    return trees.aligned(value, params, "strengths")


def add_decayed_weights(weight_decay: Number) -> Transformation:
    """g + weight_decay * w; a weight decay that is the number 0 needs no params."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.with_extra_args_support(optax.identity())
    return add_slope(lambda w: w, weight_decay)


# Momentum -----------------------------------------------------------------------------------------


def accumulators(params: PyTree, dtype: Any = None) -> PyTree:
    """Zeros in the shapes of `params`, divided among devices as they are, for sums over many steps.

    dtype: of these; by default that of the array, but at least float32, where small terms still
        count after many steps.
    """

    def zeros(w: Array) -> Array:
        own = jnp.promote_types(w.dtype, jnp.float32)
        return trees.zeros_like(w, own if dtype is None else dtype)

    return tree_map(zeros, params)


class HeavyBallState(NamedTuple):
    """step: int32. buffer: momentum, in the structure of the params."""

    step: Array
    buffer: PyTree


def heavy_ball(
    momentum: Number,
    *,
    dampening: Number = 0.0,
    nesterov: bool = False,
    accumulator_dtype: Accumulator = None,
) -> Transformation:
    """buffer = momentum * buffer + (1 - dampening) * g, and simply g at the first step (PyTorch's
    rule).

    Where momentum is 0, dampening does nothing, as in PyTorch. accumulator_dtype: of the buffer,
    see `accumulators`.
    """
    share = share_of_new(momentum, dampening)

    def init(params: PyTree) -> HeavyBallState:
        return HeavyBallState(jnp.zeros((), jnp.int32), accumulators(params, accumulator_dtype))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Updated:
        del params, extra
        first = state.step == 0

        def mix(b: Array, g: Array) -> Array:
            mixed = momentum * b + share * widen(g)
            return jnp.where(first, g, mixed).astype(b.dtype)

        def answer(g: Array, b: Array) -> Array:
            return (g + momentum * b if nesterov else b).astype(g.dtype)

        buffer = tree_map(mix, state.buffer, updates)
        return tree_map(answer, updates, buffer), HeavyBallState(state.step + 1, buffer)

    return Transformation(init, update)


def share_of_new(momentum: Number, dampening: Number) -> Number:
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


# Optimizers ---------------------------------------------------------------------------------------


def sgd(
    learning_rate: LearningRate,
    sets: PyTree = _WHOLE_SPACE,
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
        heavy_ball(
            momentum, dampening=dampening, nesterov=nesterov, accumulator_dtype=accumulator_dtype
        ),
        rates.scale_by_rate(learning_rate),
    )
    return within_sets(descent, sets)


def within_sets(inner: Transformation, sets: PyTree) -> Transformation:
    """`inner`, projected where some of the sets is a constraint."""
    kinds = set(map(type, tree_leaves(sets, is_leaf=polytopes.is_set)))
    return inner if kinds <= {polytopes.Unconstrained} else projected(inner, sets)


def projected(inner: optax.GradientTransformation, sets: PyTree) -> Transformation:
    """Any optimizer whose result is projected (Euclidean) onto the sets after every step.

    It comes last in an `optax.chain`; `optim.check` of its state tells whether it does.
    """

    def pull(sets: Sequence, ws: Sequence[Array], updates: Sequence[Array]) -> list[Array]:
        wide = [widen(w) for w in ws]
        ends = [w + u for w, u in zip(wide, updates)]
        nearest = polytopes.project_all(sets, ends)
        moves = [end - w for end, w in zip(nearest, wide)]
        return list(map(polytopes.settled, sets, ws, moves))

    def pull_all(updates: PyTree, broken: order.Broken, params: PyTree, extra: Fields) -> Updated:
        del extra
        broken = order.counted(broken, polytopes.outside(sets, params))
        free = lambda w, u: u.astype(w.dtype)
        return polytopes.map_together(pull, free, sets, params, updates), broken

    return optax.chain(inner, needing_params(order.unbroken, pull_all))


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
    `accumulators`. It comes last in an `optax.chain`, behind clipping, weight decay and penalties:
    what is behind it may move weights out of their sets, which `optim.check` of the state tells.
    Raises ValueError where `update` gets no params. Source: Pokutta et al. 2020, arXiv:2010.07243,
    Algorithm 1.
    """
    tables.convert(rescale, Literal["gradient", "diameter", "none"], "rescale")

    def update(averages: PyTree, state: tuple, params: PyTree, lr: Array) -> Updated:
        def step(sets: Sequence, ws: Sequence[Array], ds: Sequence[Array]) -> list[Array]:
            ds = [widen(d) for d in ds]
            vertices = polytopes.vertices(sets, ds)
            gaps = [v - w for v, w in zip(vertices, ws)]
            diameters = [s.diameter(w.size) for s, w in zip(sets, ws)]
            sizes = _step_sizes(lr, ds, gaps, diameters, rescale)
            moves = [size * gap for size, gap in zip(sizes, gaps)]
            return list(map(polytopes.settled, sets, ws, moves))

        free = lambda w, d: (-lr * d).astype(w.dtype)
        return polytopes.map_together(step, free, sets, params, averages), state

    average = heavy_ball(momentum, dampening=momentum, accumulator_dtype=accumulator_dtype)
    return by_averages(lambda params: (), update, average, sets, learning_rate, weight_decay)


def frank_wolfe_step_size(
    learning_rate: Number, direction: Array, gap: Array, diameter: Number, rescale: str
) -> Array:
    """clip(learning_rate * f, 0, 1): f = ||direction|| / ||gap|| for rescale `gradient`, 1 /
    diameter for `diameter` and 1 for `none`. gap: vertex - weights.
    """
    return _step_sizes(learning_rate, [direction], [gap], [diameter], rescale)[0]


def _step_sizes(
    learning_rate: Number,
    directions: Sequence[Array],
    gaps: Sequence[Array],
    diameters: Sequence[Number],
    rescale: str,
) -> list[Array]:
    """`frank_wolfe_step_size` of several arrays."""
    if rescale == "none":
        return [jnp.clip(learning_rate, 0, 1)] * len(gaps)
    if rescale == "diameter":
        return list(jnp.clip(learning_rate / jnp.stack(diameters), 0, 1))
    norms = jnp.stack(trees.norms([*gaps, *directions]))
    lengths, steepness = jnp.split(norms, 2)
    factors = steepness / jnp.where(lengths > 0, lengths, 1)
    # infinity times a rate of 0 is no number
    factors = jnp.minimum(factors, float(jnp.finfo(factors.dtype).max))
    # at the vertex itself the factor is infinite, hence 1 after clipping
    return list(jnp.where(lengths > 0, jnp.clip(learning_rate * factors, 0, 1), 1.0))


def by_averages(
    init: Callable,
    update: Callable,
    average: Transformation,
    sets: PyTree,
    learning_rate: LearningRate,
    weight_decay: Number,
) -> Transformation:
    """Weight decay, then `update(averages, state, params, rate)` on the buffer of `average`, whose
    state starts as `init(params)`. Updates that begin outside the sets are counted.
    """
    rate = rates.as_rate(learning_rate)

    def start(params: PyTree) -> tuple:
        own = init(params)
        return average.init(params), rates.first_state(rate), own, order.unbroken(params)

    def step(updates: PyTree, states: Any, params: PyTree, extra: Fields) -> Updated:
        averaged, rated, state, broken = states
        _, averaged = average.update(updates, averaged)
        rated = rates.next_state(rate, rated, extra.get("value"))
        updates, state = update(averaged.buffer, state, params, rated.learning_rate)
        broken = order.counted(broken, polytopes.outside(sets, params))
        return updates, (averaged, rated, state, broken)

    return optax.chain(add_decayed_weights(weight_decay), needing_params(start, step))
