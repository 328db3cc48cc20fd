"""Curvature of a loss over a whole data set: deterministic products, and the Hessian rows of chosen
weights.

    product = over_batches(hessian_product(loss), (images, labels), 1000)    # loss(params, batch):
    a batch's mean matvec = functools.partial(product, params)     # or:
    linearized(hessian_product(loss), params, data, 1000) tridiagonal = linops.lanczos(64,
    on_host=True)(matvec, linops.rademacher(key, params)) terms = taylor(loss, (images, labels),
    1000)(params, step)    # is the gradient small against the curvature?

Examples come in a fixed order, without augmentation, and every batch counts by its size: the same
product twice is equal bit by bit, and the batch size changes rounding only. `select` restricts
everything to some of the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import linops, stopping, tables, trees

PyTree = Any
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
    return _mean(
        product, lambda params, v: jax.tree.map(jnp.zeros_like, v), data, batch_size, on_host
    )


def _mean(part: Callable, zero: Callable, data: PyTree, batch_size: int, on_host: bool) -> Callable:
    """`mean(params, v)` of `part(params, v, batch)`, whose structure is that of `zero(params,
    v)`.
    """
    size, batch_size = _sizes(data, batch_size)
    whole, rest = divmod(size, batch_size)
    data = jax.tree.map(
        jnp.asarray, data
    )  # NumPy arrays would be sent to the device for every call

    def add(total, params, v, data, start, length):
        found = part(params, v, cut(data, start, length))
        return jax.tree.map(lambda t, p: t + p * (length / size), total, found)

    def scanned(params, v, data):
        body = lambda total, i: (add(total, params, v, data, i * batch_size, batch_size), None)
        inputs = jax.tree.leaves((params, v, data))
        start = jax.tree.map(lambda leaf: trees.varying_like(leaf, inputs), zero(params, v))
        total, _ = jax.lax.scan(body, start, jnp.arange(whole))
        return add(total, params, v, data, whole * batch_size, rest) if rest else total

    if not on_host:
        compiled = jax.jit(scanned)
        return lambda params, v: compiled(params, v, data)

    one = jax.jit(add, static_argnums=5)

    def looped(params, v):
        total = zero(params, v)
        for start in range(0, size, batch_size):
            stopping.check()
            total = one(total, params, v, data, start, min(batch_size, size - start))
        return total

    return looped


def linearized(product: Product, params: PyTree, data: PyTree, batch_size: int) -> Callable:
    """`matvec(v)`: what `over_batches` computes, for many v at the same `params`.

    All that does not depend on v, such as activations and back-propagated errors, is computed here,
    once, and kept for every example; a product then takes 0.7 to 0.8 of its time on a dense
    network. The device holds some dozen numbers a unit and example: 2.4 GB for FC5 and 7.2 GB for
    FC12 on 50,000 images of CIFAR-10, float32. matvec is not traceable: it makes one compiled call
    per batch. Raises as `over_batches`.
    """
    size, batch_size = _sizes(data, batch_size)
    data, zero = jax.tree.map(jnp.asarray, data), jax.tree.map(jnp.zeros_like, params)

    def prepare(params, data, start, length):
        return jax.linearize(lambda v: product(params, v, cut(data, start, length)), zero)[1]

    def add(total, part, v, share):
        return jax.tree.map(lambda t, p: t + p * share, total, part(v))

    prepare, add = jax.jit(prepare, static_argnums=3), jax.jit(add, static_argnums=3)
    lengths = {start: min(batch_size, size - start) for start in range(0, size, batch_size)}
    parts = [
        (prepare(params, data, start, length), length / size) for start, length in lengths.items()
    ]

    def matvec(v):
        total, v = jax.tree.map(jnp.zeros_like, v), linops.tangent(v, params)
        for part, share in parts:
            stopping.check()
            total = add(total, part, v, share)
        return total

    return matvec


class Taylor(NamedTuple):
    """What a step d does to a loss: `change`, the whole of it; `first_order`, g.d; `second_order`,
    d.Hd / 2.
    """

    change: jax.Array
    first_order: jax.Array
    second_order: jax.Array


def taylor(loss: Callable, data: PyTree, batch_size: int, *, on_host: bool = False) -> Callable:
    """`terms(params, step) -> Taylor`: of the mean of `loss(params, batch)` over all examples of
    `data`.

    step: structure and shapes of `params`. The terms are derivatives along the step, so no gradient
    is formed: forward mode twice, about five evaluations of the loss. data, batch_size, on_host and
    errors: as for `over_batches`; ValueError also for a loss that is no scalar and for a step of
    another structure.
    """

    def part(params, step, batch):
        linops.check_scalar(lambda params: loss(params, batch), params)
        step = linops.tangent(step, params)
        moved = lambda t: loss(
            jax.tree.map(lambda w, d: w + t.astype(w.dtype) * d, params, step), batch
        )
        slope = lambda t: jax.jvp(moved, (t,), (one,))  # -> loss, first derivative
        zero, one = jnp.zeros(()), jnp.ones(())
        (before, first), (_, second) = jax.jvp(slope, (zero,), (one,))
        return Taylor(moved(one) - before, first, second / 2)

    def zero(params, step):
        terms = jax.eval_shape(lambda *at: part(*at, data), params, step)
        return jax.tree.map(lambda term: jnp.zeros(term.shape, term.dtype), terms)

    return _mean(part, zero, data, batch_size, on_host)


def _sizes(data: PyTree, batch_size: int) -> tuple[int, int]:
    """(number of examples, examples in a batch); ValueError for empty or unequal arrays and no
    batch.
    """
    sizes = {len(leaf) for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            f"data has arrays of length {sorted(sizes)}; allowed: one length, at least 1."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 and above.")
    size = sizes.pop()
    return size, min(batch_size, size)


def cut(data: PyTree, start: int, length: int) -> PyTree:
    """`length` examples of `data` from `start` on; start may be traced."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), data)


def batch_losses(loss: Callable, params: PyTree, data: PyTree, batch_size: int) -> jax.Array:
    """`loss(params, batch)` of every whole batch of `data` in order: [N // batch_size]."""
    size, _ = _sizes(data, 1)
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size is {batch_size}; allowed: 1 to {size}, the number of examples."
        )

    def one(_, i):
        return None, loss(params, cut(data, i * batch_size, batch_size))

    return jax.lax.scan(one, None, jnp.arange(size // batch_size))[1]


# Some of the parameters


class Selected(NamedTuple):
    """params: the chosen arrays by path. rebuild(params) -> the whole tree, all other arrays as
    they were.
    """

    params: dict[str, jax.Array]
    rebuild: Callable[[dict[str, jax.Array]], PyTree]


def select(params: PyTree, pattern: str) -> Selected:
    """The arrays whose whole path matches the regular expression `pattern`, e.g. `.*/kernel`.

    Raises ConfigError for a bad pattern and if nothing matches.
    """
    chosen = trees.matching(params, pattern, "parameters")
    named, structure = trees.named_leaves(params), jax.tree.structure(params)
    picked = {path: leaf for path, leaf in named.items() if chosen[path]}
    rebuild = lambda new: jax.tree.unflatten(structure, list({**named, **new}.values()))
    return Selected(picked, rebuild)


# Rows of the Hessian


def quantile_entries(
    params: dict[str, jax.Array], num: int
) -> list[tuple[str, tuple[int, ...], float]]:
    """(path, index, magnitude) of the weights at `num` magnitude quantiles 0, 1/num, ...: the
    ceil(q n)-th smallest.

    params: the prunable arrays by path; the smallest one for q = 0; of equal magnitudes the first
        in order.
    """
    flat = np.concatenate([np.abs(np.asarray(leaf)).ravel() for leaf in params.values()])
    ends, paths = np.cumsum([leaf.size for leaf in params.values()]), list(params)
    ranks = np.maximum(np.ceil(np.arange(num) / num * flat.size).astype(int), 1) - 1
    order = np.argsort(flat, kind="stable")[ranks]
    entries = []
    for position in order:
        which = int(np.searchsorted(ends, position, side="right"))
        leaf = params[paths[which]]
        index = np.unravel_index(position - (ends[which] - leaf.size), leaf.shape)
        entries.append((paths[which], tuple(map(int, index)), float(flat[position])))
    return entries


def one_hot(like: dict[str, jax.Array], path: str, index: tuple[int, ...]) -> dict[str, jax.Array]:
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
    zeros = {name: trees.gathered(jnp.zeros_like(leaf)) for name, leaf in like.items()}
    return linops.tangent({**zeros, path: zeros[path].at[index].set(1)}, like)


def row_norm(
    matvec: Callable, like: dict[str, jax.Array], path: str, index: tuple[int, ...]
) -> jax.Array:
    """L1 norm of the row of A that belongs to entry `index` of `params[path]`, by one product."""
    row = matvec(one_hot(like, path, index))
    return sum(map(trees.absolute_sum, row.values()))
