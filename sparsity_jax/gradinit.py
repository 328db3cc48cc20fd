"""SFW-Init: a learned scale for every parameter array, so that one Frank-Wolfe step from there
helps most.

Sources: Miao et al., ICLR 2022, section 3.3; Zhu et al. 2021, arXiv:2102.08098 (GradInit).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import tree_map, tree_structure, tree_unflatten

from sparsity_jax import polytopes, trees
from sparsity_jax.precision import FULL, Precision, computed
from sparsity_jax.trees import widen
from sparsity_jax.types import PyTree

__all__ = ["ScaleMetrics", "ScaleState", "init", "scale_step"]


class ScaleState(NamedTuple):
    """params: scaled so far. scales: factors (scalars). first_norms: L2 norms at scale 1. mean,
    square: Adam's.

    All but the params are in float32 or wider. No two leaves share a buffer, so the state can be
    donated; its params are those given to `init`.
    """

    step: Array
    params: PyTree
    scales: PyTree
    first_norms: PyTree
    mean: PyTree
    square: PyTree


class ScaleMetrics(NamedTuple):
    """loss_before, loss_after: around the inner step. inner_products, step_sizes: one scalar a
    parameter array.
    """

    loss_before: Array
    loss_after: Array
    inner_products: PyTree
    step_sizes: PyTree


def init(params: PyTree) -> ScaleState:
    """Every scale 1."""
    norms = tree_map(trees.norm, params)
    zeros = lambda: tree_map(jnp.zeros_like, norms)
    scales = tree_map(jnp.ones_like, norms)
    return ScaleState(jnp.zeros((), jnp.int32), params, scales, norms, zeros(), zeros())


def scale_step(
    loss: Callable,
    sets: PyTree,
    *,
    learning_rate: float = 1.0,
    scale_learning_rate: float = 1e-3,
    min_scale: float = 0.01,
    clip: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    precision: Precision = FULL,
) -> Callable:
    """One iteration, `(state, inner_batch, outer_batch) -> (state, metrics)`.

    loss(params, batch) -> scalar. The objective is the loss on `outer_batch` after one SFW step
    (`gradient` rescale, no momentum) on `inner_batch`, divided by `learning_rate`; vertices count
    as constants, step sizes are differentiated where they are not clipped. The scales follow it by
    scalar Adam at `scale_learning_rate` with the gradient clipped to +-`clip`, never below
    `min_scale` (kernels, norm scales) or 0 (biases); arrays whose norm is 0 are left alone. sets:
    feasible sets as for `optim.sfw`; unconstrained arrays take their gradient step. precision: of
    matrix products, in full float32 by default.
    """

    def free(w: Array, g: Array) -> tuple[Array, Array]:
        return w - learning_rate * g, jnp.asarray(learning_rate, w.dtype)

    def move(sets: Sequence, ws: Sequence[Array], gs: Sequence[Array]) -> list[tuple[Array, Array]]:
        slopes = [widen(g) for g in gs]
        starts = [widen(w) for w in ws]
        vertices = lax.stop_gradient(polytopes.vertices(sets, slopes))
        gaps = [vertex - start for vertex, start in zip(vertices, starts)]
        norms = jnp.stack(trees.norms([*gaps, *slopes]))
        lengths, steepness = jnp.split(norms, 2)
        moving = lengths > 0
        ratios = steepness / jnp.where(moving, lengths, 1)
        sizes = jnp.where(moving, jnp.clip(learning_rate * ratios, 0, 1), 1.0)
        ends = [
            (1 - size) * start + size * vertex
            for start, vertex, size in zip(starts, vertices, sizes)
        ]
        return [(end.astype(w.dtype), size) for end, w, size in zip(ends, ws, sizes)]

    def objective(params: PyTree, inner_batch: PyTree, outer_batch: PyTree) -> tuple[Array, tuple]:
        before, grads = jax.value_and_grad(loss)(params, inner_batch)
        pairs = polytopes.map_together(move, free, sets, params, grads)
        stepped, sizes = _columns(params, pairs)
        return loss(stepped, outer_batch) / learning_rate, (before, sizes)

    def step(
        state: ScaleState, inner_batch: PyTree, outer_batch: PyTree
    ) -> tuple[ScaleState, ScaleMetrics]:
        slopes_of = jax.value_and_grad(objective, has_aux=True)
        (after, (before, sizes)), grads = slopes_of(state.params, inner_batch, outer_batch)
        products = tree_map(trees.dot, state.params, grads)
        count = state.step + 1

        def update(
            path: str,
            p: Array,
            scale: Array,
            first: Array,
            mean: Array,
            square: Array,
            product: Array,
        ) -> tuple[Array, ...]:
            norm = trees.norm(p)
            alive = norm > 0
            grow = first / jnp.where(alive, norm, 1)
            slope = jnp.clip(product * grow, -clip, clip)
            mean = beta1 * mean + (1 - beta1) * slope
            square = beta2 * square + (1 - beta2) * slope * slope
            height = mean / (1 - beta1**count)
            spread = jnp.sqrt(square / (1 - beta2**count)) + eps
            move = scale_learning_rate * height / spread
            floor = 0.0 if path.rsplit("/", 1)[-1] == "bias" else min_scale
            scale = jnp.where(alive, jnp.maximum(scale - move, floor), scale)
            grown = widen(p) * (scale * grow)
            p = jnp.where(alive, grown.astype(p.dtype), p)
            return p, scale, mean, square

        _, params, scales, norms, means, squares = state
        rows = trees.map_named(update, params, scales, norms, means, squares, products)
        params, scales, means, squares = _columns(params, rows)
        metrics = ScaleMetrics(before, after * learning_rate, products, sizes)
        return ScaleState(count, params, scales, norms, means, squares), metrics

    return computed(step, precision)


def _columns(like: PyTree, rows: PyTree) -> list[PyTree]:
    """One tree per entry of the tuples that `rows` holds in place of the leaves of `like`."""
    structure: Any = tree_structure(like)
    columns = zip(*structure.flatten_up_to(rows))
    return [tree_unflatten(structure, column) for column in columns]
