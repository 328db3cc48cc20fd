"""Means over the batches of a data set, each of which counts by its size, and sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import tree_leaves, tree_map

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
        share = 1.0
        if weighted:
            share = length / num_examples(data)
        batch = cut(data, start, length)
        term = function(batch, *arguments)
        return plus(total, term, share)

    @jax.jit
    def scanned(total: PyTree, data: PyTree, *arguments: Any) -> PyTree:
        size = num_examples(data)
        length = min(batch_size, size)
        whole, rest = divmod(size, length)
        inputs = tree_leaves((data, arguments))
        varying = lambda leaf: trees.varying_like(leaf, inputs)
        total = tree_map(varying, total)
        step = lambda i, total: add(total, data, i * length, length, arguments)
        total = lax.fori_loop(0, whole, step, total)
        if rest:
            total = add(total, data, size - rest, rest, arguments)
        return total

    compiled_add = jax.jit(add, static_argnums=3)

    def looped(total: PyTree, data: PyTree, *arguments: Any) -> PyTree:
        data = tree_map(jnp.asarray, data)  # NumPy arrays would be sent for every call
        for start, length in pieces(data, batch_size):
            stopping.check()
            total = compiled_add(total, data, start, length, arguments)
        return total

    if on_host:
        return looped
    return scanned


def plus(total: PyTree, term: PyTree, share: float) -> PyTree:
    """`total` with a share of `term` added, in the types of `total`."""
    add = lambda t, p: t + p.astype(t.dtype) * share
    return tree_map(add, total, term)


def pieces(data: PyTree, batch_size: int) -> list[tuple[int, int]]:
    """(start, length) of every batch of `data`; the last may be shorter.

    Raises ValueError for empty or unequal arrays and for a batch size below 1.
    """
    size = num_examples(data)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 and above.")
    starts = range(0, size, batch_size)
    return [(start, min(batch_size, size - start)) for start in starts]


def cut(data: PyTree, start: int | Array, length: int) -> PyTree:
    """`length` examples of `data` from `start` on; start may be traced."""
    part = lambda x: lax.dynamic_slice_in_dim(x, start, length)
    return tree_map(part, data)


def num_examples(data: PyTree) -> int:
    """The one length of all arrays; raises ValueError."""
    sizes = {len(leaf) for leaf in tree_leaves(data)}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            f"the data have arrays of length {sorted(sizes)}; allowed: one length, at least 1."
        )
    return sizes.pop()
