"""Rows of Hessian products: error, symmetry, repetition and cost."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import timing

from sparsity_jax import linops, losses, train, trees
from sparsity_jax.types import PyTree

_BATCH = 512


def rows(*, small: bool) -> Iterator[timing.Row]:
    yield _against_float64()
    problem = networks.problem(small=small)
    state = train.create_state(problem, train.key_of(0))
    images, labels = train.arrays(problem, "train")
    count = 16 if small else _BATCH
    loss = functools.partial(loss_of, problem, state.batch_stats)
    batch = images[:count], labels[:count]
    yield from _of_products(loss, state.params, batch)
    yield from _of_lanczos(loss, state.params, batch, small=small)


def loss_of(problem: train.Problem, batch_stats: PyTree, params: PyTree, batch: Any) -> Any:
    """The mean cross-entropy of a batch (images, labels), as a Hessian is taken of."""
    images, labels = batch
    logits = problem.logits(params, batch_stats, images)
    return losses.cross_entropy(logits, labels).mean()


def _against_float64() -> timing.Row:
    """The error of a product of a dense network in float32, relative to its norm."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) / 8 for shape in ((64, 128), (128, 10))]
    direction = [rng.normal(size=weight.shape) for weight in weights]
    images, labels = rng.normal(size=(256, 64)), np.arange(256) % 10

    def loss(weights: list, images: Any) -> Any:
        logits = jnp.tanh(images @ weights[0]) @ weights[1]
        return losses.cross_entropy(logits, labels).mean()

    def product(kind: Any) -> list[np.ndarray]:
        cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, kind))
        matvec = linops.hvp(loss, cast(weights), jnp.asarray(images, kind))
        return jax.device_get(jax.jit(matvec)(cast(direction)))

    with jax.enable_x64(True):
        exact = product(jnp.float64)
    error = _distance(product(jnp.float32), exact)
    return timing.one("error of a product against float64, small network", error, "", "<= 1e-5")


def _distance(found: PyTree, exact: PyTree) -> float:
    """|found - exact| / |exact|."""
    first = _flat(found)
    second = _flat(exact)
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def _flat(tree: PyTree) -> np.ndarray:
    """All entries of a tree of arrays in float64."""
    leaves = jax.tree.leaves(jax.device_get(tree))
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])


def _of_products(loss: Callable, params: PyTree, batch: Any) -> Iterator[timing.Row]:
    def product(precision: Any) -> Callable:
        multiply = lambda params, batch, v: linops.hvp(loss, params, batch, precision=precision)(v)
        return jax.jit(multiply)

    ours = jax.jit(lambda params, batch, v: linops.hvp(loss, params, batch)(v))
    fast = product("default")
    highest = product("highest")
    v, w = (_direction(params, seed) for seed in (0, 1))
    first = ours(params, batch, v)
    error = _distance(first, highest(params, batch, v))
    yield timing.one("error of a product against highest precision", error, "", "<= 1e-5")
    relaxed = _distance(fast(params, batch, v), first)
    yield timing.one("error of a product in the backend's default precision", relaxed, "")
    yield timing.one(
        "asymmetry of the product", _asymmetry(ours, params, batch, v, w), "", "<= 1e-5"
    )
    again = ours(params, batch, v)
    differs = float(_distance(again, first) > 0)
    yield timing.one("repeats of a product that differ", differs, "of 1")
    gradient = jax.jit(jax.grad(loss))
    with jax.default_matmul_precision("highest"):
        jax.block_until_ready(gradient(params, batch))  # traced with it
        times = timing.in_turn(
            {
                "product, full precision": lambda: ours(params, batch, v),
                "product, default precision": lambda: fast(params, batch, v),
                "gradient, full precision": lambda: gradient(params, batch),
            },
            rounds=7,
        )
    ratio = [("product, full precision", "gradient, full precision", "<= 2.3")]
    yield from timing.compared(times, "ms", ratio)


def _direction(params: PyTree, seed: int) -> PyTree:
    return linops.rademacher(jax.random.key(seed), params)


def _asymmetry(product: Callable, params: PyTree, batch: Any, v: PyTree, w: PyTree) -> float:
    """|wHv - vHw| / (|w| |Hv|)."""
    first, second, with_first, with_second = (
        _flat(tree) for tree in (v, w, product(params, batch, v), product(params, batch, w))
    )
    difference = second @ with_first - first @ with_second
    return abs(float(difference)) / (np.linalg.norm(second) * np.linalg.norm(with_first))


def _of_lanczos(loss: Callable, params: PyTree, batch: Any, *, small: bool) -> Iterator[timing.Row]:
    steps = 4 if small else 16
    method = linops.lanczos(steps)
    start = _direction(params, 2)
    run = jax.jit(lambda params, batch, v: method(linops.hvp(loss, params, batch), v))
    times = timing.in_turn({"run": lambda: run(params, batch, start).alphas}, rounds=2)
    of = f"a step of Lanczos, {trees.size(params):,} weights"
    yield timing.one(of, times["run"] / steps, "ms")
