"""Curvature of a loss over a whole data set: deterministic products, and the Hessian rows of chosen
weights.

    # loss(params, batch): the mean over a batch
    product = over_batches(hessian_product(loss), (images, labels), 1000)
    matvec = functools.partial(product, params)
    tridiagonal = linops.lanczos(64, on_host=True)(matvec, linops.rademacher(key, params))

    # the same products faster, with more memory
    matvec = linearized(hessian_product(loss), params, (images, labels), 1000)

    # is the gradient small against the curvature?
    terms = taylor(loss, (images, labels), 1000)(params, step)

Examples come in a fixed order, without augmentation, and every batch counts by its size: the same
product twice is equal bit by bit, and the batch size changes rounding only. `select` restricts
everything to some of the parameters.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_leaves, tree_map

from sparsity_jax import batches, linops, stopping, tables, trees
from sparsity_jax.types import PyTree

Product = Callable[[PyTree, PyTree, PyTree], PyTree]


# Products of one batch: (params, v, batch) -> A v, A the mean over the batch's examples


def hessian_product(loss: Callable) -> Product:
    """Of the Hessian of `loss(params, batch)`, the mean over the batch."""
    return lambda params, v, batch: linops.hvp(loss, params, batch)(v)


def over_batches(
    product: Product, data: PyTree, batch_size: int, *, on_host: bool = False
) -> Callable:
    """`mean(params, v)`: the mean of `product` over all examples of `data`, batch by batch.

    product: as above, of the mean over a batch. data: a pytree of arrays [N, ...]; a shorter last
    batch counts by its size. on_host: one compiled call per batch instead of a scan, which XLA's
    CPU backend needs for convolutions (inside a scan their gradients become a naive loop); the
    function is then not traceable. Sharded data keep their sharding; explicit mesh axes over the
    examples must divide every batch. Raises ValueError for empty data and for a batch size below 1.
    """
    zero = lambda params, v: tree_map(jnp.zeros_like, v)
    return _mean(product, zero, data, batch_size, on_host)


def _mean(
    part: Callable, zeros: Callable, data: PyTree, batch_size: int, on_host: bool
) -> Callable:
    """`mean(params, v)` of `part(params, v, batch)`, whose structure is that of `zeros(params,
    v)`.
    """
    _check_sizes(data, batch_size)
    # NumPy arrays would be sent to the device for every call
    data = tree_map(jnp.asarray, data)
    of_batch = lambda batch, params, v: part(params, v, batch)
    mean = batches.mean(of_batch, batch_size, on_host=on_host)
    return lambda params, v: mean(zeros(params, v), data, params, v)


def _plus(total: PyTree, term: PyTree, share: float) -> PyTree:
    return tree_map(lambda t, p: t + p * share, total, term)


def linearized(
    product: Product, params: PyTree, data: PyTree, batch_size: int, *, like: PyTree = None
) -> Callable:
    """`matvec(v)`: what `over_batches` computes, for many v at the same `params`. like: a tree such
    as v, if not `params`.

    All that does not depend on v, such as activations and back-propagated errors, is computed here,
    once, and kept for every example; a product then takes 0.7 to 0.8 of its time on a dense
    network. The device holds some dozen numbers a unit and example: 2.4 GB for FC5 and 7.2 GB for
    FC12 on 50,000 images of CIFAR-10, float32. matvec is not traceable: it makes one compiled call
    per batch. Raises as `over_batches`.
    """
    size = _check_sizes(data, batch_size)
    data = tree_map(jnp.asarray, data)
    like = params if like is None else like
    zero = tree_map(jnp.zeros_like, like)

    @functools.partial(jax.jit, static_argnums=3)
    def prepare(params: PyTree, data: PyTree, start: int, length: int) -> Callable:
        batch = cut(data, start, length)
        return jax.linearize(lambda v: product(params, v, batch), zero)[1]

    add = jax.jit(lambda total, part, v, share: _plus(total, part(v), share), static_argnums=3)
    parts = []
    for start, length in pieces(size, batch_size):
        parts.append((prepare(params, data, start, length), length / size))

    def matvec(v: PyTree) -> PyTree:
        total = tree_map(jnp.zeros_like, v)
        v = linops.tangent(v, like)
        for part, share in parts:
            stopping.check()
            total = add(total, part, v, share)
        return total

    return matvec


class Taylor(NamedTuple):
    """What a step d does to a loss: `change`, the whole of it; `first_order`, g.d; `second_order`,
    d.Hd / 2.
    """

    change: Array
    first_order: Array
    second_order: Array


def taylor(loss: Callable, data: PyTree, batch_size: int, *, on_host: bool = False) -> Callable:
    """`terms(params, step) -> Taylor`: of the mean of `loss(params, batch)` over all examples of
    `data`.

    step: structure and shapes of `params`. The terms are derivatives along the step, so no gradient
    is formed: forward mode twice, about five evaluations of the loss. data, batch_size, on_host and
    errors: as for `over_batches`; ValueError also for a loss that is no scalar and for a step of
    another structure.
    """

    def part(params: PyTree, step: PyTree, batch: PyTree) -> Taylor:
        linops.check_scalar(lambda params: loss(params, batch), params)
        step = linops.tangent(step, params)

        def moved(t: Array) -> Array:
            along = lambda w, d: w + t.astype(w.dtype) * d
            return loss(tree_map(along, params, step), batch)

        def slope(t: Array) -> tuple[Array, Array]:
            return jax.jvp(moved, (t,), (one,))

        zero, one = jnp.zeros(()), jnp.ones(())
        (before, first), (_, second) = jax.jvp(slope, (zero,), (one,))
        return Taylor(moved(one) - before, first, second / 2)

    def zero(params: PyTree, step: PyTree) -> PyTree:
        terms = jax.eval_shape(lambda params, step: part(params, step, data), params, step)
        return tree_map(lambda term: jnp.zeros(term.shape, term.dtype), terms)

    return _mean(part, zero, data, batch_size, on_host)


def _check_sizes(data: PyTree, batch_size: int) -> int:
    """Number of examples; ValueError for empty or unequal arrays and no batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 and above.")
    return batches.num_examples(data)


def pieces(size: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, length) of every batch of `size` examples; the last may be shorter."""
    return [(start, min(batch_size, size - start)) for start in range(0, size, batch_size)]


def cut(data: PyTree, start: int | Array, length: int) -> PyTree:
    """`length` examples of `data` from `start` on; start may be traced."""
    return tree_map(lambda x: lax.dynamic_slice_in_dim(x, start, length), data)


def batch_losses(loss: Callable, params: PyTree, data: PyTree, batch_size: int) -> Array:
    """`loss(params, batch)` of every whole batch of `data` in order: [N // batch_size]."""
    size = batches.num_examples(data)
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size is {batch_size}; allowed: 1 to {size}, the number of examples."
        )
    starts = batch_size * jnp.arange(size // batch_size)
    return lax.map(lambda start: loss(params, cut(data, start, batch_size)), starts)


# Some of the parameters


class Selected(NamedTuple):
    """params: the chosen arrays by path. rebuild(params) -> the whole tree, all other arrays as
    they were.
    """

    params: dict[str, Array]
    rebuild: Callable[[dict[str, Array]], PyTree]


def select(params: PyTree, pattern: str) -> Selected:
    """The arrays whose whole path matches the regular expression `pattern`, e.g. `.*/kernel`.

    Raises ConfigError for a bad pattern and if nothing matches.
    """
    matches = trees.matching(params, pattern, "parameters")
    leaves = trees.named_leaves(params)
    selected = {path: leaf for path, leaf in leaves.items() if matches[path]}
    structure = jax.tree.structure(params)
    rebuild = lambda new: jax.tree.unflatten(structure, {**leaves, **new}.values())
    return Selected(selected, rebuild)


# Rows of the Hessian


def quantile_entries(
    params: dict[str, Array], num: int
) -> list[tuple[str, tuple[int, ...], float]]:
    """(path, index, magnitude) of the weights at `num` magnitude quantiles 0, 1/num, ...: the
    ceil(q n)-th smallest.

    params: the prunable arrays by path; the smallest one for q = 0; of equal magnitudes the first
        in order.
    """
    magnitudes = np.concatenate([np.abs(leaf).ravel() for leaf in params.values()])
    ends = np.cumsum([leaf.size for leaf in params.values()])
    ranks = np.ceil(np.arange(num) / num * magnitudes.size).astype(int)
    order = np.argsort(magnitudes, kind="stable")
    entries = []
    for position in order[np.maximum(ranks, 1) - 1]:
        number = np.searchsorted(ends, position, side="right")
        path, leaf = list(params.items())[number]
        index = np.unravel_index(position - (ends[number] - leaf.size), leaf.shape)
        entries.append((path, tuple(map(int, index)), float(magnitudes[position])))
    return entries


def one_hot(like: dict[str, Array], path: str, index: tuple[int, ...]) -> dict[str, Array]:
    """Zeros in the shapes of `like`, but for a 1 at one entry: the vector whose product is a row of
    the matrix.
    """
    if path not in like:
        raise ValueError(
            f"{path!r} is not among the parameters {list(like)[:5]}.{tables.closest(path, like)}"
        )
    shape = jnp.shape(like[path])
    if len(index) != len(shape) or not all(0 <= i < n for i, n in zip(index, shape)):
        raise ValueError(f"index {index} is no entry of {path!r}, whose shape is {shape}.")
    vector = {name: trees.gathered(jnp.zeros_like(leaf)) for name, leaf in like.items()}
    vector[path] = vector[path].at[index].set(1)
    return linops.tangent(vector, like)


def absolute_sum(tree: PyTree) -> Array:
    """L1 norm of all entries of `tree`, e.g. of a row: the product with `one_hot`."""
    return jnp.asarray(sum(map(trees.absolute_sum, tree_leaves(tree))))
