"""Curvature of a loss over a whole data set: deterministic products, and the Hessian rows of chosen
weights.

    # loss(params, batch): the mean over a batch
    product = over_batches(hessian_product(loss), (images, labels), 1000)
    matvec = partial(product, params)
    tridiagonal = linops.lanczos(64, on_host=True)(matvec, linops.rademacher(key, params))

    # the same products faster, with more memory
    matvec = linearized(hessian_product(loss), params, (images, labels), 1000)

    # is the gradient small against the curvature?
    terms = taylor(loss, (images, labels), 1000)(params, step)

Examples come in a fixed order, without augmentation, and every batch counts by its size: the same
product twice is equal bit by bit, and the batch size changes rounding only. `select` restricts
everything to some of the parameters. All is computed in full float32 unless the option `precision`
says otherwise.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_leaves, tree_map, tree_structure, tree_unflatten

from sparsity_jax import batches, linops, stopping, tables, trees
from sparsity_jax.precision import FULL, Precision, computed
from sparsity_jax.types import PyTree, Shape

__all__ = [
    "Product",
    "Selected",
    "Taylor",
    "absolute_sum",
    "batch_losses",
    "hessian_product",
    "linearized",
    "one_hot",
    "over_batches",
    "quantile_entries",
    "select",
    "taylor",
]

Product = Callable[[PyTree, PyTree, PyTree], PyTree]
_Leaves = dict[str, Array]  # by path


# Products of one batch: (params, v, batch) -> A v, A the mean over the batch's examples


def hessian_product(loss: Callable, *, precision: Precision = FULL) -> Product:
    """Of the Hessian of `loss(params, batch)`, the mean over the batch."""
    return lambda params, v, batch: linops.hvp(loss, params, batch, precision=precision)(v)


def over_batches(
    product: Product,
    data: PyTree,
    batch_size: int,
    *,
    on_host: bool = False,
    precision: Precision = FULL,
) -> Callable:
    """`mean(params, v)`: the mean of `product` over all examples of `data`, batch by batch.

    product: as above, of the mean over a batch. data: a pytree of arrays [N, ...]; a shorter last
    batch counts by its size. on_host: one compiled call per batch instead of a scan, which XLA's
    CPU backend needs for convolutions (inside a scan their gradients become a naive loop); the
    function is then not traceable. precision: of what `product` leaves open. Sharded data keep
    their sharding; explicit mesh axes over the examples must divide every batch. Raises ValueError
    for empty data and for a batch size below 1.
    """
    mean = _mean(product, data, batch_size, on_host, precision)
    return lambda params, v: mean(tree_map(trees.zeros_like, v), params, v)


def _mean(
    part: Callable, data: PyTree, batch_size: int, on_host: bool, precision: Precision
) -> Callable:
    """`mean(zeros, params, v)` of `part(params, v, batch)`, which gives a tree like `zeros`."""
    batches.pieces(data, batch_size)  # checks both
    # NumPy arrays would be sent to the device for every call
    data = tree_map(jnp.asarray, data)
    of_batch = lambda batch, params, v: part(params, v, batch)
    mean = batches.mean(computed(of_batch, precision), batch_size, on_host=on_host)
    return lambda zeros, params, v: mean(zeros, data, params, v)


def linearized(
    product: Product,
    params: PyTree,
    data: PyTree,
    batch_size: int,
    *,
    like: PyTree = None,
    precision: Precision = FULL,
) -> Callable:
    """`matvec(v)`: what `over_batches` computes, for many v at the same `params`. like: a tree such
    as v, if not `params`. precision: as there.

    All that does not depend on v, such as activations and back-propagated errors, is computed here,
    once, and kept for every example; a product then takes 0.7 to 0.8 of its time on a dense
    network. The device holds some dozen numbers a unit and example: 2.4 GB for FC5 and 7.2 GB for
    FC12 on 50,000 images of CIFAR-10, float32. matvec is not traceable: it makes one compiled call
    per batch. Raises as `over_batches`.
    """
    pieces = batches.pieces(data, batch_size)
    size = batches.num_examples(data)
    data = tree_map(jnp.asarray, data)
    if like is None:
        like = params
    zero = tree_map(jnp.zeros_like, like)

    @partial(jax.jit, static_argnums=3)
    def prepare(params: PyTree, data: PyTree, start: int, length: int) -> Callable:
        batch = batches.cut(data, start, length)
        of_vector = computed(lambda v: product(params, v, batch), precision)
        _, linear = jax.linearize(of_vector, zero)
        return linear

    @partial(jax.jit, static_argnums=3)
    def add(total: PyTree, linear: Callable, v: PyTree, share: float) -> PyTree:
        return batches.plus(total, linear(v), share)

    parts = []
    for start, length in pieces:
        linear = prepare(params, data, start, length)
        parts.append((linear, length / size))

    def matvec(v: PyTree) -> PyTree:
        total = tree_map(trees.zeros_like, v)
        v = linops.tangent(v, like)
        for linear, share in parts:
            stopping.check()
            total = add(total, linear, v, share)
        return total

    return matvec


class Taylor(NamedTuple):
    """What a step d does to a loss: `change`, the whole of it; `first_order`, g.d; `second_order`,
    d.Hd / 2.
    """

    change: Array
    first_order: Array
    second_order: Array


def taylor(
    loss: Callable,
    data: PyTree,
    batch_size: int,
    *,
    on_host: bool = False,
    precision: Precision = FULL,
) -> Callable:
    """`terms(params, step) -> Taylor`: of the mean of `loss(params, batch)` over all examples of
    `data`.

    step: structure and shapes of `params`. The terms are derivatives along the step, so no gradient
    is formed: forward mode twice, about five evaluations of the loss. data, batch_size, on_host,
    precision and errors: as for `over_batches`; ValueError also for a loss that is no scalar and
    for a step of another structure.
    """

    def part(params: PyTree, step: PyTree, batch: PyTree) -> Taylor:
        linops.check_scalar(lambda params: loss(params, batch), params)
        step = linops.tangent(step, params)

        def moved(t: Array) -> Array:
            along = lambda w, d: w + t.astype(w.dtype) * d
            return loss(tree_map(along, params, step), batch)

        def slope(t: Array) -> tuple[Array, Array]:
            return jax.jvp(moved, (t,), (one,))

        one = jnp.ones(())
        values, slopes = jax.jvp(slope, (zero,), (one,))
        before, first = values
        _, second = slopes
        return Taylor(moved(one) - before, first, second / 2)

    mean = _mean(part, data, batch_size, on_host, precision)
    zero = jnp.zeros(())
    zeros = Taylor(zero, zero, zero)
    return lambda params, step: mean(zeros, params, step)


def batch_losses(
    loss: Callable,
    params: PyTree,
    data: PyTree,
    batch_size: int,
    *,
    precision: Precision = FULL,
) -> Array:
    """`loss(params, batch)` of every whole batch of `data` in order: [N // batch_size]."""
    size = batches.num_examples(data)
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size is {batch_size}; allowed: 1 to {size}, the number of examples."
        )

    def of_batch(start: Array) -> Array:
        batch = batches.cut(data, start, batch_size)
        return loss(params, batch)

    starts = batch_size * jnp.arange(size // batch_size)
    return lax.map(computed(of_batch, precision), starts)


# Some of the parameters


class Selected(NamedTuple):
    """params: the chosen arrays by path. rebuild(params) -> the whole tree, all other arrays as
    they were.
    """

    params: _Leaves
    rebuild: Callable[[_Leaves], PyTree]


def select(params: PyTree, pattern: str) -> Selected:
    """The arrays whose whole path matches the regular expression `pattern`, e.g. `.*/kernel`.

    Raises ConfigError for a bad pattern and if nothing matches.
    """
    matches = trees.matching(params, pattern, "parameters")
    leaves = trees.named_leaves(params)
    structure = tree_structure(params)

    def rebuild(new: _Leaves) -> PyTree:
        replaced = leaves | new
        return tree_unflatten(structure, replaced.values())

    chosen = {path: leaf for path, leaf in leaves.items() if matches[path]}
    return Selected(chosen, rebuild)


# Rows of the Hessian


def quantile_entries(params: _Leaves, num: int) -> list[tuple[str, Shape, float]]:
    """(path, index, magnitude) of the weights at `num` magnitude quantiles 0, 1/num, ...: the
    ceil(q n)-th smallest.

    params: the prunable arrays by path; the smallest one for q = 0; of equal magnitudes the first
        in order.
    """
    magnitudes = np.concatenate([np.abs(leaf).ravel() for leaf in params.values()])
    order = np.argsort(magnitudes, kind="stable")
    ranks = np.ceil(np.arange(num) / num * magnitudes.size)
    ranks = np.maximum(ranks.astype(int), 1)
    entries = []
    for position in order[ranks - 1]:
        magnitude = float(magnitudes[position])
        for path, leaf in params.items():
            if position < leaf.size:
                index = np.unravel_index(position, leaf.shape)
                numbers = tuple(map(int, index))
                entries.append((path, numbers, magnitude))
                break
            position -= leaf.size
    return entries


def one_hot(like: _Leaves, path: str, index: Shape) -> _Leaves:
    """Zeros in the shapes of `like`, but for a 1 at one entry: the vector whose product is a row of
    the matrix.

    Raises ConfigError for another path, ValueError for an index that is no entry.
    """
    shape = jnp.shape(tables.lookup(like, path, "path"))
    inside = [0 <= i < size for i, size in zip(index, shape)]
    if len(index) != len(shape) or not all(inside):
        raise ValueError(f"index {index} is no entry of {path!r}, whose shape is {shape}.")

    def entry_of(name: str, leaf: Array) -> Array:
        chosen = jnp.full(jnp.shape(leaf), name == path)
        for axis, place in enumerate(index if name == path else ()):
            chosen &= lax.broadcasted_iota(jnp.int32, chosen.shape, axis) == place
        return trees.divided_like(chosen.astype(jnp.result_type(leaf)), leaf)

    return {name: entry_of(name, leaf) for name, leaf in like.items()}


def absolute_sum(tree: PyTree) -> Array:
    """L1 norm of all entries of `tree`, e.g. of a row: the product with `one_hot`."""
    sums = map(trees.absolute_sum, tree_leaves(tree))
    return jnp.asarray(sum(sums))
