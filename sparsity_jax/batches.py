"""Means over the batches of a data set, each of which counts by its size, and sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from sparsity_jax import stopping, trees
from sparsity_jax.types import PyTree

__all__ = ["cut", "mean", "num_examples", "pieces", "plus"]


def mean(
    function: Callable, batch_size: int, *, on_host: bool = False, weighted: bool = True
) -> Callable:
    """`mean(zeros, data, *arguments)` of `function(batch, *arguments)`, which gives a tree like
    `zeros`.

    data: a pytree of arrays [N, ...]; a shorter last batch counts by its size. on_host: one
    compiled call per batch instead of a scan, which XLA's CPU backend needs for convolutions
    (inside a scan their gradients become a naive loop); the mean is then not traceable. weighted:
    False gives the sum over batches. It compiles once for one shape of data. Raises ValueError for
    empty or unequal arrays.
    """

    def add(total: PyTree, data: PyTree, start: Any, length: int, arguments: tuple) -> PyTree:
        share = length / num_examples(data) if weighted else 1.0
        batch = cut(data, start, length)
        term = function(batch, *arguments)
        return plus(total, term, share)

    @jax.jit
    def scanned(total: PyTree, data: PyTree, *arguments: Any) -> PyTree:
        size = num_examples(data)
        length = min(batch_size, size)
        whole, rest = divmod(size, length)
        inputs = jax.tree.leaves((data, arguments))
        total = jax.tree.map(lambda leaf: trees.varying_like(leaf, inputs), total)
        step = lambda i, total: add(total, data, i * length, length, arguments)
        total = lax.fori_loop(0, whole, step, total)
        if rest:
            total = add(total, data, size - rest, rest, arguments)
        return total

    compiled_add = jax.jit(add, static_argnums=3)

    def looped(total: PyTree, data: PyTree, *arguments: Any) -> PyTree:
        data = jax.tree.map(jnp.asarray, data)  # NumPy arrays would be sent for every call
        for start, length in pieces(data, batch_size):
            stopping.check()
            total = compiled_add(total, data, start, length, arguments)
        return total

    return looped if on_host else scanned


def plus(total: PyTree, term: PyTree, share: float) -> PyTree:
    """`total` with a share of `term` added, in the types of `total`."""
    return jax.tree.map(lambda t, p: t + p.astype(t.dtype) * share, total, term)


def pieces(data: PyTree, batch_size: int) -> list[tuple[int, int]]:
    """(start, length) of every batch of `data`; the last may be shorter.

    Raises ValueError for empty or unequal arrays and for a batch size below 1.
    """
    size = num_examples(data)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 and above.")
    return [(start, min(batch_size, size - start)) for start in range(0, size, batch_size)]


def cut(data: PyTree, start: int | Array, length: int) -> PyTree:
    """`length` examples of `data` from `start` on; start may be traced."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length), data)


def num_examples(data: PyTree) -> int:
    """The one length of all arrays; raises ValueError."""
    sizes = {len(leaf) for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            f"the data have arrays of length {sorted(sizes)}; allowed: one length, at least 1."
        )
    return sizes.pop()
