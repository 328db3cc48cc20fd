"""Frank-Wolfe with AdaGrad's metric."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.tree_util import tree_map
from optax import GradientTransformationExtraArgs as Transformation

from sparsity_jax import polytopes, tables, trees
from sparsity_jax.optim import steps
from sparsity_jax.optim.rates import LearningRate, Updated
from sparsity_jax.trees import widen
from sparsity_jax.types import PyTree

__all__ = ["AdaGradState", "adagrad_sfw"]


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
    accumulator_dtype: steps.Accumulator = None,
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
        return AdaGradState(steps.accumulators(params, accumulator_dtype))

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
            return polytopes.settled(s, w, y - start)

        return polytopes.map_arrays(step, sets, params, averages, root), AdaGradState(root)

    average = steps.heavy_ball(momentum, dampening=momentum, accumulator_dtype=accumulator_dtype)
    return steps.by_averages(init, update, average, learning_rate, weight_decay)
