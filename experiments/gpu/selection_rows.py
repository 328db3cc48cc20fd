"""Rows of selection: the k-th largest of one array, and masks over all arrays of a network."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import networks
import numpy as np
import timing
from jax import Array, lax

from sparsity_jax import allocate, masks, trees

SIZES = (2_359_296, 11_173_962, 100_000_000)
_SHARE = 0.05
_FULL_SORTS = 50_000_000  # entries above which `lax.top_k` is left out


def rows(*, small: bool) -> Iterator[timing.Row]:
    for size in (4096,) if small else SIZES:
        yield from _of_one_array(size)
    yield from _of_a_network(small=small)


def _of_one_array(size: int) -> Iterator[timing.Row]:
    k = int(_SHARE * size)
    scores = jax.random.normal(jax.random.key(0), (size,))
    count = jnp.asarray(k)
    kth = jax.jit(functools.partial(masks.kth_largest, magnitude=True))
    mask = jax.jit(functools.partial(masks.k_largest_mask, magnitude=True))
    read = jax.jit(lambda scores: jnp.max(jnp.abs(scores)))
    sort = jax.jit(lambda scores: jnp.sort(jnp.abs(scores))[-k])
    top = jax.jit(lambda scores: lax.top_k(jnp.abs(scores), k)[0][-1])
    _check(float(kth(scores, count)), np.asarray(scores), k)
    calls: dict[str, timing.Call] = {
        "k-th largest": lambda: kth(scores, count),
        "mask of the k largest": lambda: mask(scores, count),
        "one read": lambda: read(scores),
        "jnp.sort": lambda: sort(scores),
    }
    if size < _FULL_SORTS:
        calls["lax.top_k"] = lambda: top(scores)
    if networks.has_torch():
        calls["torch.topk"] = _torch_top(np.asarray(scores), k)
    times = timing.in_turn(calls, rounds=9, repeats=5)
    goal = "<= 4" if size > 10**7 else ""
    rivals = [("k-th largest", name, "<= 1") for name in calls if "." in name]
    ratios = [("k-th largest", "one read", goal), *rivals]
    for row in timing.compared(times, "ms", ratios):
        yield row._replace(name=f"{row.name}, n = {size:,}")


def _check(found: float, scores: np.ndarray, k: int) -> None:
    """Raises unless it is the k-th largest magnitude."""
    size = np.abs(scores)
    expected = np.partition(size, -k)[-k]
    if found != expected:
        raise ValueError(f"the k-th largest of {scores.size:,} is {found}, a sort says {expected}")


def _torch_top(scores: np.ndarray, k: int) -> timing.Call:
    import torch

    tensor = torch.from_numpy(scores.copy()).to(networks.torch_device())

    def call() -> None:
        torch.topk(tensor.abs(), k)

    return call


def _of_a_network(*, small: bool) -> Iterator[timing.Row]:
    params = networks.params_of(small=small)
    leaves = jax.tree.leaves(params)
    ks = jnp.asarray([max(leaf.size // 20, 1) for leaf in leaves])
    each = jax.jit(_masks_of_all)
    count = allocate.keep_counts(params, 0.95)
    whole = jax.jit(allocate.keep_masks)
    calls = {
        "masks of all arrays, each its own k": lambda: each(leaves, ks),
        "one global mask over all arrays": lambda: whole(params, count),
    }
    times = timing.in_turn(calls, rounds=9, repeats=5)
    for row in timing.compared(times, "ms"):
        yield row._replace(name=f"{row.name}, {trees.size(params):,} entries")


def _masks_of_all(leaves: list[Array], ks: Array) -> list[Array]:
    return masks.k_largest_masks(leaves, list(ks), magnitude=True)
