"""Means over the batches of a data set, each of which counts by its size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsity_jax import stopping, trees
from sparsity_jax.types import PyTree


def mean(function: Callable, batch_size: int, *, on_host: bool = False) -> Callable:
    """`mean(zeros, data, *arguments)` of `function(batch, *arguments)`, which gives a tree like
    `zeros`.

    data: a pytree of arrays [N, ...]; a shorter last batch counts by its size. on_host: one
    compiled call per batch instead of a scan, which XLA's CPU backend needs for convolutions
    (inside a scan their gradients become a naive loop); the mean is then not traceable. It compiles
    once for one shape of data. Raises ValueError for empty or unequal arrays.
    """

    def add(total: PyTree, data: PyTree, start: Any, length: int, arguments: tuple) -> PyTree:
        batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), data)
        share = length / num_examples(data)
        term = function(batch, *arguments)
        return jax.tree.map(lambda t, p: t + p.astype(t.dtype) * share, total, term)

    @jax.jit
    def scanned(total: PyTree, data: PyTree, *arguments: Any) -> PyTree:
        size = num_examples(data)
        length = min(batch_size, size)
        whole, rest = divmod(size, length)
        inputs = jax.tree.leaves((data, arguments))
        total = jax.tree.map(lambda leaf: trees.varying_like(leaf, inputs), total)
        body = lambda total, start: (add(total, data, start, length, arguments), None)
        total, _ = jax.lax.scan(body, total, jnp.arange(whole) * length)
        return add(total, data, size - rest, rest, arguments) if rest else total

    compiled_add = jax.jit(add, static_argnums=3)

    def looped(total: PyTree, data: PyTree, *arguments: Any) -> PyTree:
        size = num_examples(data)
        data = jax.tree.map(jnp.asarray, data)  # NumPy arrays would be sent for every call
        for start in range(0, size, batch_size):
            stopping.check()
            length = min(batch_size, size - start)
            total = compiled_add(total, data, start, length, arguments)
        return total

    return looped if on_host else scanned


def num_examples(data: PyTree) -> int:
    """The one length of all arrays; raises ValueError."""
    sizes = {len(leaf) for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            f"the data have arrays of length {sorted(sizes)}; allowed: one length, at least 1."
        )
    return sizes.pop()
