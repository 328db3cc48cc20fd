"""Every algorithm that works on parameters alone, of a tiny network or of any other arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparsity_jax import (
    allocate,
    growing,
    linops,
    masks,
    optim,
    polytopes,
    saliency,
    surgery,
    trees,
)
from sparsity_jax.types import PyTree

__all__ = ["EVERY", "OF_UNITS", "OF_WEIGHTS", "PRODUCTS", "UPDATED", "VECTORS", "Algorithm"]

Algorithm = Callable[[PyTree, PyTree], PyTree]  # (params, grads) -> results


def kept(params: PyTree) -> int:
    """A fifth of all entries."""
    return trees.size(params) // 5


# Masks --------------------------------------------------------------------------------------------


def select(params: PyTree, grads: PyTree) -> PyTree:
    """Masks of all arrays as one, after an earlier one."""
    return masks.k_largest_mask(params, kept(params), magnitude=True, before=_earlier(grads))


def _earlier(grads: PyTree) -> PyTree:
    return jax.tree.map(lambda g: g > 0, grads)


def threshold(params: PyTree, grads: PyTree) -> PyTree:
    del grads
    return masks.kth_largest(params, kept(params), magnitude=True)


def select_at_random(params: PyTree, grads: PyTree) -> PyTree:
    del grads
    return masks.random_mask(params, kept(params), jax.random.key(0))


def allocate_weights(params: PyTree, grads: PyTree) -> PyTree:
    """A share of every kernel; other arrays stay whole."""
    del grads
    chosen = dict(selection="layerwise", layer_ratios="erk")
    counts = allocate.keep_counts(params, 0.8, **chosen)
    found = allocate.keep_masks(params, counts, **chosen)
    return found, masks.apply(params, found), masks.sparsity(found), masks.nonzero(params)


def allocate_filters(params: PyTree, grads: PyTree) -> PyTree:
    del grads
    chosen = dict(selection="structured", layers="all")
    counts = allocate.keep_counts(params, 0.5, **chosen)
    found = allocate.keep_masks(params, counts, **chosen)
    return found, allocate.left_by(found, **chosen)


# Feasible sets ------------------------------------------------------------------------------------


def sets_of(params: PyTree, **constraint: Any) -> PyTree:
    norms = jax.tree.map(lambda w: 1.0, params)
    return polytopes.build(params, norms, polytopes.check(constraint))


KINDS: dict[str, dict] = {
    "k_sparse": dict(name="k_sparse", k_frac=0.2, tau=0.5),
    "L2": dict(name="l2", tau=0.5),
    "L3": dict(name="lp", p=3, tau=0.5),
}


def of_sets(params: PyTree, grads: PyTree) -> PyTree:
    """Vertices, projections, points moved inside and whether they are outside, of one set each."""
    results = {}
    for name, constraint in KINDS.items():
        sets = sets_of(params, **constraint)
        of_leaves = jax.tree.leaves(sets, is_leaf=polytopes.is_set)
        together = lambda function, tree, of_leaves=of_leaves: jax.tree.unflatten(
            jax.tree.structure(tree), function(of_leaves, jax.tree.leaves(tree))
        )
        results[name] = (
            together(polytopes.vertices, grads),
            together(polytopes.project_all, params) if name != "L3" else None,
            polytopes.shift_inside(params, sets),
            polytopes.outside(sets, params),
        )
    return results


# Updates ------------------------------------------------------------------------------------------


def optimizers(params: PyTree) -> dict[str, optax.GradientTransformation]:
    """Every transformation of the library that acts on single weights."""
    sets = sets_of(params, **KINDS["k_sparse"])
    penalties = optax.chain(optim.add_l1(1e-3), optim.add_l2(1e-3))
    sgd = optax.chain(penalties, optim.sgd(0.1, weight_decay=1e-3))
    layers = growing.layers(params, _halves(params), "weight")
    return {
        "sgd, penalties, saliency": saliency.track(sgd),
        "proximal_l1": optim.proximal_l1(optim.sgd(0.1), 0.1),
        "sgd, projected": optim.sgd(0.1, sets),
        "sfw": optim.sfw(0.1, sets),
        "adagrad_sfw": optim.adagrad_sfw(0.1, sets),
        "pruned": optim.pruned(sgd, optim.PruningSchedule.cubic(0.8, end=2)),
        "growing_l2, weights": growing.growing_l2(layers, method="greg2", update_every=1),
    }


def _halves(params: PyTree) -> dict[str, float]:
    """The ratio 0.5 of every kernel, by path."""
    return {path: 0.5 for path, leaf in trees.named_leaves(params).items() if leaf.ndim > 1}


def updates(name: str) -> Algorithm:
    """Two updates of one of `optimizers`, in a loop."""
    return lambda params, grads: _two_steps(optimizers(params)[name], params, grads)


def grow_filters(params: PyTree, grads: PyTree) -> PyTree:
    layers = growing.layers(params, _halves(params), "filter")
    tx = growing.growing_l2(layers, method="greg2", update_every=1)
    return _two_steps(tx, params, grads)


def _two_steps(tx: optax.GradientTransformation, params: PyTree, grads: PyTree) -> PyTree:
    tx = optax.with_extra_args_support(tx)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        moved, state = tx.update(grads, state, params, value=jnp.ones(()))
        return (optax.apply_updates(params, moved), state), None

    start = params, tx.init(params)
    return lax.scan(step, start, length=2)[0]


# Vectors ------------------------------------------------------------------------------------------

PRODUCTS = 4


def norms(params: PyTree, grads: PyTree) -> PyTree:
    leaves = jax.tree.leaves(params)
    return trees.norm(params), trees.norms(leaves), trees.dot(params, grads), trees.scales(leaves)


def disturb(params: PyTree, grads: PyTree) -> PyTree:
    del grads
    return surgery.add_noise(params, jax.random.key(0), std=0.1, relative=True)


def draw_anew(params: PyTree, grads: PyTree) -> PyTree:
    return surgery.reinitialize(params, _earlier(grads), jax.random.key(0))


def diagonal(params: PyTree) -> linops.Matvec:
    """The product with a diagonal matrix, which exchanges nothing."""
    return lambda v: jax.tree.map(lambda w, x: w * w * x, params, v)


def lanczos(reorthogonalize: str) -> Algorithm:
    """A few steps, and the vector that the next one would begin with."""
    method = linops.Lanczos(PRODUCTS, reorthogonalize)

    def run(params: PyTree, grads: PyTree) -> PyTree:
        state = method.run(diagonal(params), grads)
        return state.tridiagonal, state.current

    return run


def traces(params: PyTree, grads: PyTree) -> PyTree:
    del grads
    key = jax.random.key(0)
    product = diagonal(params)
    return linops.hutchinson(3)(product, key, params), linops.hutchpp(6)(product, key, params)


# Tables -------------------------------------------------------------------------------------------

UPDATED = tuple(optimizers({"kernel": jnp.ones((2, 2))}))
VECTORS = tuple(f"Lanczos, {kind}" for kind in ("full", "bfloat16", "none"))
OF_WEIGHTS: dict[str, Algorithm] = {
    "masks": select,
    "threshold": threshold,
    "random masks": select_at_random,
    "masks by layer": allocate_weights,
    "feasible sets": of_sets,
    **{name: updates(name) for name in UPDATED},
    "norms": norms,
    "noise": disturb,
    **{name: lanczos(name.removeprefix("Lanczos, ")) for name in VECTORS},
    "traces": traces,
}
OF_UNITS: dict[str, Algorithm] = {
    "masks of filters": allocate_filters,
    "growing_l2, filters": grow_filters,
    "weights drawn anew": draw_anew,
}
EVERY = OF_WEIGHTS | OF_UNITS
