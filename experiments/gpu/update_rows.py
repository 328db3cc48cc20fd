"""Rows of optimizers: one update of a network's arrays inside a scan, and its compilation."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import networks
import optax
import timing

from sparsity_jax import growing, optim, polytopes, trees
from sparsity_jax.types import PyTree

_COMPILED = "compilation of the update: "


def rows(*, small: bool) -> Iterator[timing.Row]:
    params = networks.params_of(small=small)
    sets = networks.sets_of(params)
    params = polytopes.shift_inside(params, sets)
    constrained = {
        "optax.sgd, momentum": optax.sgd(0.1, 0.9),
        "optax.adamw": optax.adamw(1e-3),
        "optim.sfw": optim.sfw(1.0, sets),
        "optim.adagrad_sfw": optim.adagrad_sfw(0.1, sets),
        "optim.sgd, projected": optim.sgd(0.1, sets),
    }
    times = yield from _of_optimizers(constrained, params, small=small)
    extra = times["optim.sfw"] - times["optax.sgd, momentum"]
    yield timing.one("optim.sfw - optax.sgd", extra, "ms", "<= 0.3")
    times = yield from _of_optimizers(_growing(params), params, small=small)
    for name in ("greg1, filters", "greg2, filters", "greg1, weights", "greg2, weights"):
        ratio = times[name] / times["sgd, weight decay"]
        yield timing.one(f"{name} / sgd, weight decay", ratio, "times", "<= 1.2")
    if networks.has_torch():
        yield from _of_torch(params, small=small)


def _of_optimizers(
    optimizers: dict[str, optax.GradientTransformation], params: PyTree, *, small: bool
) -> Iterator[timing.Row]:
    """Rows of compilation and of an update each; returns the times of updates."""
    calls = {}
    for name, tx in optimizers.items():
        goal = "<= 4" if name == "optim.sfw" else ""
        yield timing.one(_COMPILED + name, _seconds_to_compile(tx, params), "s", goal)
        step = _step(tx, jax.tree.map(lambda w: 1e-3 * w, params))
        state = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        calls[name] = timing.looped(step, state, _steps(small=small))
    times = timing.in_turn(calls, rounds=9)
    times = {name: values / _steps(small=small) for name, values in times.items()}
    for row in timing.compared(times, "ms"):
        yield row._replace(name=f"update: {row.name}")
    return times


def _steps(*, small: bool) -> int:
    return 2 if small else 50


def _step(tx: optax.GradientTransformation, grads: PyTree) -> Callable:
    def step(state: tuple) -> tuple:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def _seconds_to_compile(tx: optax.GradientTransformation, params: PyTree) -> float:
    """Seconds to trace, lower and compile an update, nothing of it kept from before."""
    state = jax.jit(tx.init)(params)
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(tx.update).lower(params, state, params).compile()
    return time.perf_counter() - start


def _growing(params: PyTree) -> dict[str, optax.GradientTransformation]:
    """SGD, and growing penalties before it, which act in every one of the measured steps."""
    kernels = [path for path in trees.named_leaves(params) if trees.is_kernel(path)]
    ratios = dict.fromkeys(kernels, 0.5)
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(1e-3, 0.9))
    result = {"sgd, weight decay": sgd}
    for granularity in ("filter", "weight"):
        layers = growing.layers(params, ratios, granularity)
        for method in ("greg1", "greg2"):
            grow = growing.growing_l2(layers, method=method, update_every=5)
            result[f"{method}, {granularity}s"] = optax.chain(grow, sgd)
    return result


def _of_torch(params: PyTree, *, small: bool) -> Iterator[timing.Row]:
    """Fused SGD, and a Frank-Wolfe step as one writes it with `torch.topk`."""
    import torch

    arrays = [torch.from_numpy(jax.device_get(leaf).copy()) for leaf in jax.tree.leaves(params)]
    tensors = [array.to(networks.torch_device()).requires_grad_() for array in arrays]
    for tensor in tensors:
        tensor.grad = 1e-3 * tensor.detach()
    buffers = [tensor.detach().clone() for tensor in tensors]
    fused = torch.optim.SGD(tensors, lr=1e-3, momentum=0.9, fused=True)
    sets = jax.tree.leaves(networks.sets_of(params), is_leaf=polytopes.is_set)

    def frank_wolfe() -> None:
        with torch.no_grad():
            for tensor, buffer, own in zip(tensors, buffers, sets):
                _torch_step(tensor, buffer, int(own.k), float(own.radius))

    calls: dict[str, timing.Call] = {
        "torch.optim.SGD, fused": fused.step,
        "a step with torch.topk": frank_wolfe,
    }
    times = timing.in_turn(calls, rounds=9, repeats=1 if small else 5)
    for row in timing.compared(times, "ms"):
        yield row._replace(name=f"update: {row.name}")


def _torch_step(tensor: Any, buffer: Any, k: int, radius: float) -> None:
    """Momentum, the vertex of the k largest magnitudes, a step of gradient rescaling."""
    import torch

    buffer.mul_(0.9).add_(tensor.grad, alpha=0.1)
    flat = buffer.flatten()
    chosen = torch.topk(flat.abs(), k).indices
    vertex = torch.zeros_like(flat)
    vertex[chosen] = -radius * torch.sign(flat[chosen])
    gap = vertex.view_as(tensor) - tensor
    rate = (buffer.norm() / gap.norm()).clamp(0, 1)
    tensor.add_(rate * gap)
