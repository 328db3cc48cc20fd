"""Frank-Wolfe with AdaGrad's metric."""

from collections.abc import Sequence
from typing import NamedTuple

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
    `accumulators`. Its place in an `optax.chain` is that of `sfw`.
    Source: Combettes, Spiegel, Pokutta 2020, arXiv:2009.14114.
    """
    metrics = lambda roots: [widen(r) + delta for r in roots]
    add = lambda r, d: jnp.hypot(widen(r), widen(d)).astype(r.dtype)

    def init(params: PyTree) -> AdaGradState:
        return AdaGradState(steps.accumulators(params, accumulator_dtype))

    def update(averages: PyTree, state: AdaGradState, params: PyTree, lr: Array) -> Updated:
        root = tree_map(add, state.root, averages)

        def step(
            sets: Sequence, ws: Sequence[Array], ds: Sequence[Array], roots: Sequence[Array]
        ) -> list[Array]:
            starts = [widen(w) for w in ws]
            directions = [widen(d) for d in ds]
            problem = _Quadratic(starts, directions, metrics(roots), lr)
            ys = problem.starts
            for _ in range(inner_steps):
                ys = problem.step(sets, ys)
            moves = [y - start for y, start in zip(ys, problem.starts)]
            return list(map(polytopes.settled, sets, ws, moves))

        def free(w: Array, d: Array, r: Array) -> Array:
            (metric,) = metrics([r])
            return (-lr * widen(d) / metric).astype(w.dtype)

        moved = polytopes.map_together(step, free, sets, params, averages, root)
        return moved, AdaGradState(root)

    average = steps.heavy_ball(momentum, dampening=momentum, accumulator_dtype=accumulator_dtype)
    return steps.by_averages(init, update, average, sets, learning_rate, weight_decay)


class _Quadratic(NamedTuple):
    """<d, y - w> + ||y - w||_H^2 / (2 learning_rate) of several arrays. starts: w; metrics: H."""

    starts: list[Array]
    directions: list[Array]
    metrics: list[Array]
    learning_rate: Array

    def step(self, sets: Sequence, ys: list[Array]) -> list[Array]:
        """After a Frank-Wolfe step with line search from each y."""
        lr = self.learning_rate
        divisor = jnp.where(lr > 0, lr, 1)
        slopes = [
            d + metric * (y - start) / divisor
            for start, d, metric, y in zip(self.starts, self.directions, self.metrics, ys)
        ]
        vertices = polytopes.vertices(sets, slopes)
        gaps = [y - vertex for y, vertex in zip(ys, vertices)]
        scales = trees.scales(gaps)
        scaled = [gap / scale for gap, scale in zip(gaps, scales)]  # its squares stay in range
        units = trees.scales(self.metrics)
        weighted = [metric / unit * part for metric, unit, part in zip(self.metrics, units, scaled)]
        curvatures = trees.dots(weighted, scaled)
        shrunk = [slope / unit for slope, unit in zip(slopes, units)]
        descents = trees.dots(shrunk, scaled)
        moved = []
        for y, gap, scale, curvature, descent in zip(ys, gaps, scales, curvatures, descents):
            best = lr * descent / jnp.where(curvature > 0, curvature, 1) / scale
            moved.append(y - jnp.clip(best, 0, 1) * gap)
        return moved
