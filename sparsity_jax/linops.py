"""Symmetric linear operators given as products: curvature of a loss, Lanczos, quadrature, traces,
spectral density.

An operator is a function `matvec(v) -> A v` on pytrees of one structure; A is real and symmetric.
Nothing here knows a network: `hvp` and `gauss_newton` make operators of any loss and any pytree,
everything else takes any operator.

    tridiagonal = lanczos(64)(hvp(loss, params, batch), rademacher(key, params))
    values, weights = ritz(tridiagonal)             # Ritz values and weights: float64, on the host
    quadrature(function, values, weights)           # v^T function(A) v for the unit start vector v

Products run on the device in the type of their vectors; the small tridiagonal problem is solved in
float64 by SciPy.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array, lax
from jax.tree_util import (
    tree_flatten,
    tree_leaves,
    tree_leaves_with_path,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from numpy import ndarray

from sparsity_jax import stopping, tables, trees
from sparsity_jax.trees import varying_like, widen
from sparsity_jax.types import PyTree

Matvec = Callable[[PyTree], PyTree]
HIGHEST = lax.Precision.HIGHEST


# Products with the curvature of a loss ------------------------------------------------------------


def hvp(loss: Callable, params: PyTree, *args: Any) -> Matvec:
    """The product with the Hessian of `loss(params, *args)` at `params`, forward over reverse.

    matvec(v): v has the structure and shapes of `params`, and so has the product. Raises ValueError
    for a loss that is no scalar and for a v of another structure, TypeError for params that are no
    floats.
    """
    trees.check_parameters(params, "hvp")
    scalar = lambda params: loss(params, *args)
    check_scalar(scalar, params)
    gradient = jax.grad(scalar)

    def matvec(v: PyTree) -> PyTree:
        return jax.jvp(gradient, (params,), (tangent(v, params),))[1]

    return matvec


def gauss_newton(outputs: Callable, loss: Callable, params: PyTree, *args: Any) -> Matvec:
    """The product with J^T H J: J the Jacobian of `z = outputs(params, *args)`, H the Hessian of
    `loss(z, *args)` in z.

    Positive semi-definite if the loss is convex in z. z may be a pytree; raises as `hvp` does.
    """
    trees.check_parameters(params, "gauss_newton")
    network = lambda params: outputs(params, *args)
    scalar = lambda z: loss(z, *args)
    check_scalar(scalar, jax.eval_shape(network, params))
    gradient = jax.grad(scalar)

    def matvec(v: PyTree) -> PyTree:
        z, change = jax.jvp(network, (params,), (tangent(v, params),))
        _, pull_back = jax.vjp(network, params)
        return pull_back(jax.jvp(gradient, (z,), (change,))[1])[0]

    return matvec


def squared(matvec: Matvec) -> Matvec:
    """The product with A^2: positive semi-definite, and |A| is its square root. Costs two products.

    Its type is at least float32, as squares may leave the range of narrower types.
    """

    def twice(v: PyTree) -> PyTree:
        once = matvec(v)
        scale = trees.scale_of(once)
        product = matvec(tree_map(lambda x: (x / scale).astype(x.dtype), once))
        return tree_map(lambda x: widen(x) * scale, product)

    return twice


def check_scalar(loss: Callable, argument: PyTree) -> None:
    """Raises ValueError unless `loss(argument)` is a scalar; nothing is computed."""
    value = jax.eval_shape(loss, argument)
    shape = getattr(value, "shape", None)
    if shape == ():
        return
    returned = f"a {type(value).__name__}" if shape is None else f"an array of shape {shape}"
    raise ValueError(
        f"loss returns {returned}; curvature needs one scalar. Take the mean over examples."
    )


def tangent(v: PyTree, params: PyTree) -> PyTree:
    """`v` in the types of `params` and, on a mesh of explicit axes, divided as they are, as
    derivatives need it.

    Raises ValueError for another structure or shape.
    """
    _check_like(v, params, "the vector of a product", "params")

    def fitted(x: Array, p: Array) -> Array:
        x = jnp.asarray(x, jnp.result_type(p))
        division = trees.division(p)
        if trees.division(x) == division:
            return x
        return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*division))

    return tree_map(fitted, v, params)


def _check_like(tree: PyTree, like: PyTree, name: str, other: str) -> None:
    given: Any = tree_structure(tree)
    allowed = tree_structure(like)
    if given != allowed:
        raise ValueError(f"{name} has the structure {given}; allowed: that of {other}, {allowed}.")
    for (path, x), y in zip(tree_leaves_with_path(tree), tree_leaves(like)):
        if jnp.shape(x) != jnp.shape(y):
            place = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name} has shape {jnp.shape(x)} at {place!r}; allowed: that of {other}, "
                f"{jnp.shape(y)}."
            )


# Trees as vectors ---------------------------------------------------------------------------------


def rademacher(key: Array, like: PyTree) -> PyTree:
    """Independent signs +-1 in the structure, shapes and types of `like`; TypeError for types that
    are no floats.
    """
    trees.check_parameters(like, "rademacher")
    leaves, structure = tree_flatten(like)
    keys = jax.random.split(key, len(leaves))
    sign = lambda key, x: jax.random.rademacher(key, jnp.shape(x), jnp.result_type(x))
    return tree_unflatten(structure, map(sign, keys, leaves))


def _dot(first: PyTree, second: PyTree) -> Array:
    """Inner product. Of two vectors at a time: XLA's CPU backend sums those pairwise (error 1e-9
    for 1e6 entries), a matrix-vector product one after the other (1e-5)."""
    dot = lambda x, y: jnp.dot(widen(x).ravel(), widen(y).ravel(), precision=HIGHEST)
    products = tree_leaves(tree_map(dot, first, second))
    return jnp.asarray(sum(products))


def _flatten(tree: PyTree) -> Array:
    leaves = [widen(leaf).ravel() for leaf in tree_leaves(tree)]
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)


def _unflatten(vector: Array, like: PyTree) -> PyTree:
    """`vector` [..., D] cut into the leaves of `like`: each [..., *shape], in its type."""
    leaves, structure = tree_flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = []
    for piece, leaf in zip(jnp.split(vector, ends[:-1], axis=-1), leaves):
        # of NumPy's float64, float32 unless x64 is enabled
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        pieces.append(piece.reshape(*vector.shape[:-1], *leaf.shape).astype(dtype))
    return tree_unflatten(structure, pieces)


# Lanczos ------------------------------------------------------------------------------------------


class Tridiagonal(NamedTuple):
    """The tridiagonal matrix of `num_steps` Lanczos steps; entries from there on are 0. A leading
    axis: probes.

    alphas [m]: the diagonal. betas [m]: betas[i] couples i and i + 1; betas[num_steps - 1] is the
    norm of the last residual, 0 if the Krylov space is exhausted (every Ritz value is then an
    eigenvalue). num_steps: int32, at most D.
    """

    alphas: Any
    betas: Any
    num_steps: Any


class LanczosState(NamedTuple):
    """Where Lanczos stands: arrays only, to be saved and resumed.

    current: the unit vector to multiply next, in the structure of the start vector, and the one
    before it. basis: all of them, flat, as rows: a tuple of arrays [chunks, rows, entries], a NumPy
    matrix on the host, or None.
    """

    step: Array
    num_steps: Array  # falls behind `step` once the Krylov space is exhausted
    alphas: Array
    betas: Array
    current: PyTree
    previous: PyTree
    basis: Any


Blocks = tuple[Array, ...]
_einsum = functools.partial(jnp.einsum, precision=HIGHEST)
CHUNK = 2**12  # entries whose products are summed one after the other
SHARDS = 64  # several chunks are a multiple of so many, for many numbers of devices to share them


@dataclasses.dataclass(frozen=True)
class _OnDevice:
    """Keeps the basis as rows in `num_blocks` arrays [chunks, rows, entries]: classical
    Gram-Schmidt inside each, one after the other.

    Blocks, because only those in use are read: of a single matrix XLA's CPU backend would multiply
    all rows, or copy a slice of it before it multiplies, at twice the time. Chunks, because it sums
    a row's products one after the other: over 3e5 entries in float32 that put errors of 1e-6 into
    vectors that had none, and quadrature off by 3e-2 where chunks (and float64) give 3e-4. A type
    other than the vectors' is widened one block at a time. Vectors are flat.
    """

    num_blocks: int
    dtype: Any = None
    cond = staticmethod(lax.cond)

    def create(self, vector: Array, num_rows: int) -> Blocks:
        """The basis with `vector` as row 0."""
        rows = -(-num_rows // self.num_blocks)
        index = np.arange(num_rows)[:, None]
        vector = _chunks(vector)[:, None]
        blocks = []
        for first in range(0, num_rows, rows):
            # made of the vector, so that they are sharded as it is
            block = jnp.where(index[first : first + rows] == 0, vector, 0)
            blocks.append(block.astype(self.dtype or vector.dtype))
        return tuple(blocks)

    def write(self, basis: Blocks, row: Array, vector: Array) -> Blocks:
        """The basis with another row; unchanged if there is no such row."""
        vector = _chunks(vector).astype(basis[0].dtype)
        place = lambda block, index: lax.dynamic_update_index_in_dim(block, vector, index, 1)
        keep = lambda block, index: block
        blocks = []
        for block in basis:
            inside = (row >= 0) & (row < block.shape[1])
            # a `select` would read and write a row of every block; `cond` touches one, in place
            blocks.append(lax.cond(inside, place, keep, block, row))
            row = row - block.shape[1]
        return tuple(blocks)

    def project(self, basis: Blocks, row: Array, vector: Array) -> tuple[Array, Array]:
        """(the squared length of the vector's part in rows 0..row, the vector without it)."""

        def subtract(vector: Array, squares: Array, block: Array) -> tuple[Array, Array]:
            block = block.astype(vector.dtype)
            part = _einsum("krc,kc->kr", block, vector).sum(0)
            every = jnp.broadcast_to(part, block.shape[:2])
            rest = vector - _einsum("kr,krc->kc", every, block)
            return rest, squares + jnp.dot(part, part, precision=HIGHEST)

        skip = lambda vector, squares, block: (vector, squares)
        size = vector.size
        vector = _chunks(vector)
        squares = varying_like(jnp.zeros((), vector.dtype), [vector])
        for block in basis:
            vector, squares = lax.cond(row >= 0, subtract, skip, vector, squares, block)
            row = row - block.shape[1]
        return squares, vector.ravel()[:size]


def _chunks(vector: Array) -> Array:
    """[D] as [chunks, entries], the last filled up with zeros."""
    size = vector.size
    chunks = -(-size // (CHUNK * SHARDS)) * SHARDS if size > CHUNK else 1
    entries = -(-size // chunks)  # the same in all, to fill up less
    return jnp.pad(vector, (0, chunks * entries - size)).reshape(chunks, entries)


class _OnHost:
    """Keeps the basis in one NumPy matrix, written in place and multiplied on the host."""

    cond = staticmethod(lambda test, yes, no, vector: (yes if test else no)(vector))

    def create(self, vector: Array, num_rows: int) -> ndarray:
        basis = np.zeros((num_rows, vector.size), vector.dtype)
        basis[0] = vector
        return basis

    def write(self, basis: ndarray, row: Array, vector: Array) -> ndarray:
        if row < len(basis):
            basis[int(row)] = vector
        return basis

    def project(self, basis: ndarray, row: Array, vector: Array) -> tuple[float, ndarray]:
        rows = basis[: int(row) + 1]
        flat = np.asarray(vector)
        part = rows @ flat
        return part @ part, flat - part @ rows


_Basis = _OnDevice | _OnHost
REORTHOGONALIZE: dict[str, _Basis | None] = {
    "full": _OnDevice(4),
    "bfloat16": _OnDevice(16, jnp.bfloat16),
    "host": _OnHost(),
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class Lanczos:
    """Lanczos one product at a time, made by `lanczos_method`.

    While `jit` traces, all methods are pure. Outside of it, `step` and `update` take any matvec,
    host loops too, and consume the state they are given: its basis is updated in place. Save a
    state before it is passed on.
    """

    num_matvecs: int
    basis: _Basis | None
    shift: float

    def init(self, start: PyTree) -> LanczosState:
        """The state before the first product."""
        begin = _begin if isinstance(self.basis, _OnHost) else _begin_compiled
        return begin(_checked_start(start), self.num_matvecs, self.basis, self.shift)

    def step(self, matvec: Matvec, state: LanczosState) -> LanczosState:
        """The state after one more product."""
        return self.update(state, matvec(state.current))

    def update(self, state: LanczosState, product: PyTree) -> LanczosState:
        """The state after a step whose product is known."""
        _check_like(product, state.current, "the product", "the start vector")
        product = tree_map(trees.gathered, product)
        pure = isinstance(self.basis, _OnHost) or _is_traced((state, product))
        advance = _advance if pure else _advance_in_place
        vectors = (state.current, product, state.previous, state.basis)
        numbers, following, rows = advance(self.basis, self.shift, state[:4], *vectors)
        return LanczosState._make((*numbers, following, state.current, rows))

    def result(self, state: LanczosState) -> Tridiagonal:
        """What the steps so far have found."""
        return Tridiagonal(state.alphas, state.betas, state.num_steps)


def lanczos_method(
    num_matvecs: int, *, reorthogonalize: str = "full", shift: float = 0.0
) -> Lanczos:
    """Lanczos tridiagonalisation with `num_matvecs` products, to be driven step by step; see
    `Lanczos`.

    reorthogonalize: every new vector against all before it,
        `full`      kept in the vectors' type: m D numbers;
        `bfloat16`  kept in half of float32's memory, multiplied and accumulated in the vectors'
                    type. Coefficients are off by some 1e-3 / sqrt(D) of the largest, and smaller
                    details of the spectrum are lost;
        `host`      kept and multiplied in host memory: the device holds three vectors. Cannot be
        traced by `jit`; `none`      not at all: three vectors. Converged eigenvalues then reappear
        in copies, which delays the others.
    The three-term recurrence comes first and leaves rounding errors only, so one pass of
    Gram-Schmidt is enough, and a second one is made where the first removed more than half of the
    squared length (Kahan and Parlett's "twice is enough"). Ends early, see `Tridiagonal`, after D
    steps or where the residual is nothing but rounding errors.

    shift: added to every norm a vector is divided by. The original of the geometric study uses
        1e-6.

    Inside `shard_map` the start vector varies over the axes that the products vary over
    (`lax.pcast`); on a mesh of explicit axes every device holds whole vectors.

    Start vectors have floating-point leaves of one type, float32 or float64: TypeError; ValueError
    for a start vector that is zero or not finite (NaN results while tracing), for a product of
    another structure, for num_matvecs < 1.
    """
    basis = tables.lookup(REORTHOGONALIZE, reorthogonalize, "reorthogonalize")
    if num_matvecs < 1:
        raise ValueError(f"num_matvecs is {num_matvecs}; allowed: 1 and above.")
    return Lanczos(num_matvecs, basis, shift)


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in tree_leaves(tree))


def _checked_start(start: PyTree) -> PyTree:
    start = tree_map(lambda leaf: trees.gathered(jnp.asarray(leaf)), start)
    types = sorted({str(leaf.dtype) for leaf in tree_leaves(start)})
    if types not in (["float32"], ["float64"]):
        raise TypeError(
            f"the start vector has {', '.join(types) or 'no arrays'}; Lanczos needs leaves of one "
            "type, float32 or float64."
        )
    if _is_traced(start):
        return start
    length = float(trees.norm(start))
    if not 0 < length < math.inf:
        raise ValueError(
            f"the start vector has length {length}; Lanczos needs a finite vector that is not zero."
        )
    return start


def _begin(start: PyTree, num_matvecs: int, basis: _Basis | None, shift: float) -> LanczosState:
    unit = trees.scale_of(start)
    start = tree_map(lambda leaf: leaf / unit, start)
    length = jnp.sqrt(_dot(start, start)) + shift / unit
    current = tree_map(lambda leaf: leaf / length, start)
    vector = _flatten(current)
    rows = basis.create(vector, min(num_matvecs, vector.size)) if basis else None
    zero = varying_like(jnp.zeros((), jnp.int32), [vector])
    numbers = varying_like(jnp.zeros(num_matvecs, vector.dtype), [vector])
    previous = tree_map(jnp.zeros_like, current)
    return LanczosState(zero, zero, numbers, numbers, current, previous, rows)


_begin_compiled = jax.jit(_begin, static_argnums=(1, 2, 3))


def _advance(
    basis: _Basis | None,
    shift: float,
    numbers: Sequence[Array],
    current: PyTree,
    product: PyTree,
    previous: PyTree,
    rows: Any,
) -> tuple[tuple, PyTree, Any]:
    """(step, num_steps, alphas, betas), the next vector and the basis after one step.

    The product is divided by a power of two near its size first: no square leaves the range,
    whatever the unit of A.
    """
    step, _, _, betas = numbers
    before = jnp.where(step > 0, betas[step - 1], 0)
    unit, alpha, rest = _recurrence(current, product, previous, before)
    if basis:
        rest = _orthogonalize(basis, rows, step, _flatten(rest))
    after, factor = _close(numbers, unit, alpha, before, rest, trees.size(current), shift)
    following = tree_map(lambda leaf: leaf * factor, rest)
    if basis:
        rows = basis.write(rows, step + 1, following)
        following = _unflatten(following, current)
    return after, following, rows


_advance_in_place = jax.jit(_advance, static_argnums=(0, 1), donate_argnums=(5, 6))


@jax.jit
def _recurrence(
    current: PyTree, product: PyTree, previous: PyTree, beta: Array
) -> tuple[Array, Array, PyTree]:
    """(unit, alpha / unit, residual / unit)."""
    product = tree_map(lambda p, v: p.astype(v.dtype), product, current)
    unit = trees.scale_of(product)
    product = tree_map(lambda p: p / unit, product)
    alpha = _dot(product, current)
    beta = beta / unit
    subtract = lambda p, v, u: p - alpha * v - beta * u
    return unit, alpha, tree_map(subtract, product, current, previous)


def _orthogonalize(basis: _Basis, rows: Any, row: Array, vector: Array) -> Array:
    squares, rest = basis.project(rows, row, vector)
    again = lambda rest: basis.project(rows, row, rest)[1]
    enough = lambda rest: rest
    return basis.cond(jnp.dot(rest, rest, precision=HIGHEST) < squares, again, enough, rest)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _close(
    numbers: Sequence[Array],
    unit: Array,
    alpha: Array,
    before: Array,
    rest: PyTree,
    size: int,
    shift: float,
) -> tuple:
    """The numbers after a step, and what to multiply its residual `rest` by: 0 once the Krylov
    space is exhausted.

    alpha, rest: divided by `unit`.
    """
    step, num_steps, alphas, betas = numbers
    running = (step == 0) | (before != 0)
    alpha = jnp.where(running, unit * alpha, 0)
    length = jnp.sqrt(_dot(rest, rest))
    beta = unit * length
    largest = jnp.maximum(jnp.max(jnp.abs(alphas)), jnp.max(betas))
    largest = jnp.maximum(largest, jnp.abs(alpha))
    # False for NaN, which goes on, to be seen
    rounding = beta / (16 * jnp.finfo(beta.dtype).eps) <= largest
    more = running & (step + 1 < size) & ~rounding
    alphas = alphas.at[step].set(alpha)
    betas = betas.at[step].set(jnp.where(more, beta, 0))
    divisor = jnp.where(more, length + shift / unit, 1)
    return (step + 1, num_steps + running, alphas, betas), jnp.where(more, 1 / divisor, 0)


def lanczos(
    num_matvecs: int, *, reorthogonalize: str = "full", shift: float = 0.0, on_host: bool = False
) -> Callable[[Matvec, PyTree], Tridiagonal]:
    """Lanczos tridiagonalisation: `lanczos(64)(matvec, start) -> Tridiagonal`. Options as for
    `lanczos_method`.

    One traced loop, so matvec must be traceable; works under `jit` and `vmap` over start vectors,
    except with reorthogonalize="host". Outside `jit` each call compiles anew and holds the basis
    twice: to repeat it, or for large D, wrap it in `jit`, with all that matvec depends on as
    arguments (XLA computes with constants while compiling).
    on_host: a host loop of steps instead, for a matvec that is one itself, or a convolution's on a
    CPU, whose gradients XLA compiles badly inside loops.
    """
    method = lanczos_method(num_matvecs, reorthogonalize=reorthogonalize, shift=shift)
    on_host = on_host or reorthogonalize == "host"
    return lambda matvec, start: method.result(_run(method, matvec, start, on_host))


def _run(method: Lanczos, matvec: Matvec, start: PyTree, on_host: bool) -> LanczosState:
    state = method.init(start)
    if not on_host:
        step = lambda _, state: method.step(matvec, state)
        return lax.fori_loop(0, method.num_matvecs, step, state)
    for _ in range(method.num_matvecs):
        stopping.check()
        state = method.step(matvec, state)
    return state


class Eigenpairs(NamedTuple):
    """values [k], largest magnitude first; vectors: a tree of leaves [k, ...]; residuals [k]: norm
    of A v - value v.
    """

    values: ndarray
    vectors: PyTree
    residuals: ndarray


def top_eigenpairs(
    num: int, num_matvecs: int, *, on_host: bool = False
) -> Callable[[Matvec, PyTree], Eigenpairs]:
    """The `num` eigenvalues of largest magnitude and their unit vectors, from `num_matvecs` steps
    of full Lanczos.

    top_eigenpairs(3, 64)(matvec, start) -> Eigenpairs. An eigenvalue of A lies within a value's
    residual of it; the residuals are Lanczos' own and cost no products. Of a repeated eigenvalue
    one vector is found. Not traceable. Raises ValueError where the Krylov space of `start` has
    fewer than `num` dimensions.
    """
    if not 1 <= num <= num_matvecs:
        raise ValueError(f"num is {num}; allowed: 1 to num_matvecs, {num_matvecs}.")
    method = lanczos_method(num_matvecs)

    def find(matvec: Matvec, start: PyTree) -> Eigenpairs:
        state = _run(method, matvec, start, on_host)
        alphas, betas = _coefficients(method.result(state))
        if num > len(alphas):
            raise ValueError(
                f"the Krylov space has {len(alphas)} dimensions; allowed: num up to that, not "
                f"{num}."
            )
        values, vectors = _eigh(alphas, betas)
        top = np.argsort(-np.abs(values), kind="stable")[:num]
        ends = np.cumsum([block.shape[1] for block in state.basis])
        flat: Any = 0
        for block, mixing in zip(state.basis, np.split(vectors[:, top], ends[:-1])):
            used = block[:, : len(mixing)]
            flat = flat + _einsum("rn,krc->nkc", jnp.asarray(mixing, block.dtype), used)
        flat = flat.reshape(num, -1)[:, : trees.size(state.current)]
        residuals = betas[-1] * np.abs(vectors[-1, top])
        return Eigenpairs(values[top], _unflatten(flat, state.current), residuals)

    return find


# Quadrature: float64 on the host ------------------------------------------------------------------

Coefficients = Tridiagonal | ndarray
Pair = tuple[ndarray, ndarray]  # values and weights, or alphas and betas


def truncate(tridiagonal: Tridiagonal, num_matvecs: int) -> Tridiagonal:
    """What Lanczos would have returned after `num_matvecs` >= 1 products: the history of a result
    costs nothing.
    """
    if num_matvecs < 1:
        raise ValueError(f"num_matvecs is {num_matvecs}; allowed: 1 and above.")
    alphas, betas, num_steps = tridiagonal
    steps = np.minimum(num_steps, num_matvecs)
    return Tridiagonal(alphas[..., :num_matvecs], betas[..., :num_matvecs], steps)


def ritz(alphas: Coefficients, betas: ndarray | None = None) -> Pair:
    """Ritz values, ascending, and Ritz weights, the squared first components of the eigenvectors:
    float64 [num_steps].

    They are the nodes and weights of Gauss quadrature for v^T f(A) v, v the unit start vector:
    exact for polynomials of degree up to 2 num_steps - 1. Takes a Tridiagonal, or alphas [n] and
    betas ([n - 1], or [n], the last unused). For a Tridiagonal with a leading axis both are
    [num_probes, most steps]; a probe of fewer repeats its largest value with weight 0. Raises
    ValueError for coefficients that are not finite.
    """
    return _per_probe(_gauss, alphas, betas)


def gauss_radau(alphas: Coefficients, betas: ndarray | None = None, *, node: float = 0.0) -> Pair:
    """Values and weights of the Gauss-Radau rule with one value at `node`, a lower end of the
    spectrum.

    [num_steps + 1] values, exact for polynomials of degree up to 2 num_steps. If f is completely
    monotone from `node` on, its quadrature is an upper bound of v^T f(A) v, and that of `ritz` a
    lower one. Where the Krylov space is exhausted, both are exact, and the rule of `ritz` is
    returned. Takes what `ritz` takes; of alphas [n] and betas [n - 1] the last alpha is replaced,
    so the rule has n values.

    Values a little below `node` (rounding errors) are moved to it. Raises ValueError if a Ritz
    value is below by more than 1e-3 of the largest. Source: Golub and Meurant, Matrices, Moments
    and Quadrature (2010), section 6.2.
    """
    return _per_probe(functools.partial(_radau, node=node), alphas, betas)


def bordered(
    alphas: Coefficients, betas: ndarray | None = None, *, last: float
) -> tuple[ndarray, ndarray, ndarray]:
    """(values, firsts, lasts), [num_steps + 1] each, of the tridiagonal matrix with one more row
    ending in `last`.

    firsts, lasts: first and last components of its unit eigenvectors. Values and firsts^2 are a
    quadrature rule exact for polynomials of degree up to 2 num_steps, whatever `last`: they are the
    canonical representations of the moments known so far, one for each position of a node. Where
    the Krylov space is exhausted `last` gets no weight. Takes one probe of what `ritz` takes.
    Source: Krein and Nudelman, The Markov Moment Problem (1977), chapter 3.
    """
    alphas, betas = _coefficients(alphas, betas)
    values, vectors = _eigh(np.append(alphas[: len(betas)], last), betas)
    return values, vectors[0], vectors[-1]


def border_for(alphas: Coefficients, betas: ndarray | None = None, *, node: float = 0.0) -> float:
    """The `last` with which `bordered` has a value at `node`, anywhere on the line; huge if a Ritz
    value is there.
    """
    alphas, betas = _coefficients(alphas, betas)
    size = max(np.max(np.abs(alphas)), np.max(betas, initial=0.0), abs(node))
    least = np.finfo(np.float64).tiny ** 0.25 * (size or 1.0)
    pivot, last = math.inf, node
    # of T - node, eliminating from the top
    for alpha, beta, after in zip(alphas, [0.0, *betas], betas):
        pivot = (alpha - node - beta**2 / pivot) or least
        last = node + after**2 / pivot
    return float(last)


def quadrature(function: Callable, values: ndarray, weights: ndarray) -> ndarray:
    """Sum of weights * function(values) over the last axis; `function` is elementwise."""
    return np.sum(weights * function(values), -1)


def _per_probe(rule: Callable, alphas: Coefficients, betas: ndarray | None) -> Pair:
    if not isinstance(alphas, Tridiagonal) or np.ndim(alphas.alphas) == 1:
        return rule(*_coefficients(alphas, betas))
    rules = [rule(*_coefficients(probe)) for probe in probes_of(alphas)]
    shape = (len(rules), max(len(values) for values, _ in rules))
    values, weights = np.zeros(shape), np.zeros(shape)
    for i, (of_probe, shares) in enumerate(rules):
        values[i] = of_probe[-1]
        values[i, : len(of_probe)] = of_probe
        weights[i, : len(shares)] = shares
    return values, weights


def probes_of(tridiagonal: Tridiagonal) -> list[Tridiagonal]:
    """The result of every probe."""
    if np.ndim(tridiagonal.alphas) == 1:
        return [tridiagonal]
    return [Tridiagonal(*probe) for probe in zip(*map(np.asarray, tridiagonal))]


def _coefficients(alphas: Coefficients, betas: ndarray | None = None) -> Pair:
    """alphas [n] and betas [n] or [n - 1] in float64, checked."""
    if isinstance(alphas, Tridiagonal):
        alphas, betas = (numbers[: int(alphas.num_steps)] for numbers in alphas[:2])
    alphas = np.asarray(alphas, float)
    betas = np.asarray(betas, float)
    lengths = (alphas.size, alphas.size - 1)
    if alphas.ndim != 1 or betas.ndim != 1 or not alphas.size or betas.size not in lengths:
        shapes = f"shape {alphas.shape}, betas {betas.shape}"
        raise ValueError(f"alphas have {shapes}; allowed: [n] and [n] or [n - 1].")
    if not np.isfinite([*alphas, *betas]).all():
        raise ValueError(
            "the Lanczos coefficients are not finite: the product has NaN or inf, or the start is "
            "zero."
        )
    return alphas, betas


def _eigh(alphas: ndarray, betas: ndarray) -> Pair:
    return scipy.linalg.eigh_tridiagonal(alphas, betas[: len(alphas) - 1])


def _gauss(alphas: ndarray, betas: ndarray) -> Pair:
    values, vectors = _eigh(alphas, betas)
    return values, vectors[0] ** 2


def _radau(alphas: ndarray, betas: ndarray, node: float) -> Pair:
    if len(betas) < len(alphas):
        alphas = alphas[:-1]
    if not alphas.size:
        return np.array([node]), np.ones(1)
    values, vectors = _eigh(alphas, betas)
    largest = np.max(np.abs(values - node))
    if values[0] < node - 1e-3 * largest or (largest == 0 < betas[-1]):
        raise ValueError(
            f"the smallest Ritz value is {values[0]:.3g}; values reach below the node {node:g}, "
            "where there is no bound. Take a node below the spectrum, or a positive semi-definite "
            "operator: gauss_newton, squared."
        )
    weights = vectors[0] ** 2
    if betas[-1] > 0:
        # the last entry that makes `node` an eigenvalue is node + beta^2 (T - node)^-1 [n, n]
        rounding = 16 * np.finfo(np.float64).eps * largest
        inverse = np.sum(vectors[-1] ** 2 / np.maximum(values - node, rounding))
        values, weights = _gauss(np.append(alphas, node + betas[-1] ** 2 * inverse), betas)
    return np.maximum(values, node), weights


def spectral_density(
    values: ndarray,
    weights: ndarray,
    *,
    bins: int = 100_000,
    sigma2: float = 1e-10,
    overhead: float = 0.01,
) -> Pair:
    """Ritz values smeared by Gaussians, mean over probes: (density, grid), float64 [bins]; its
    integral is 1.

    values, weights: [m] or [num_probes, m]. The grid reaches `overhead` beyond the mean smallest
    and largest values; the Gaussians have variance sigma2 * max(1, grid length). For figures, and
    as the original's first step to its
    width: with few bins for sigma2, mass falls between them, which `quadrature` avoids.
    Source: Ghorbani, Krishnan, Xiao 2019, arXiv:1901.10159.
    """
    values = np.atleast_2d(values).astype(np.float64)
    least = values.min(-1).mean()
    largest = values.max(-1).mean()
    grid = np.linspace(least - overhead, largest + overhead, bins)
    variance = sigma2 * max(1.0, grid[-1] - grid[0])
    height = 1 / math.sqrt(2 * math.pi * variance)
    # exp(-750) is 0 in float64: skipping the rest changes nothing
    reach = math.sqrt(2 * variance * 750)
    density = np.zeros(bins)
    for value, weight in zip(values.ravel(), np.ravel(weights).astype(np.float64)):
        near = slice(*np.searchsorted(grid, [value - reach, value + reach]))
        squares = (value - grid[near]) ** 2
        density[near] += weight * (height * np.exp(-squares / (2 * variance)))
    density /= len(values)
    mass = np.sum(density) * (grid[1] - grid[0])
    return density / mass if mass > 0 else density, grid


# Traces -------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """An unbiased estimate of a trace and its standard error."""

    trace: Array
    standard_error: Array


def hutchinson(
    num_probes: int, *, on_host: bool = False
) -> Callable[[Matvec, Array, PyTree], Trace]:
    """Mean of v^T A v over `num_probes` sign vectors: `hutchinson(100)(matvec, key, like) ->
    Trace`.

    on_host as for `lanczos`. Raises ValueError for fewer than 2 probes, which have no standard
    error.
    Source: Hutchinson 1990.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes is {num_probes}; allowed: 2 and above, for a standard error.")

    def estimate(matvec: Matvec, key: Array, like: PyTree) -> Trace:
        def sample(key: Array) -> Array:
            probe = rademacher(key, like)
            return _dot(probe, matvec(probe))

        return _mean(_map(sample, jax.random.split(key, num_probes), on_host))

    return estimate


def hutchpp(num_matvecs: int, *, on_host: bool = False) -> Callable[[Matvec, Array, PyTree], Trace]:
    """Hutch++: `hutchpp(60)(matvec, key, like) -> Trace`, from `num_matvecs` products in total.

    The trace on the range of A times a third of the probes exactly, Hutchinson's on the rest. Exact
    for an operator of rank up to num_matvecs // 3, and for semi-definite ones of error O(1 /
    num_matvecs). Keeps two vectors per product of that third. on_host as for `lanczos`. Raises
    ValueError for fewer than 4 products.
    Source: Meyer, Musco, Musco, Woodruff 2021, arXiv:2010.09649.
    """
    if num_matvecs < 4:
        raise ValueError(
            f"num_matvecs is {num_matvecs}; allowed: 4 and above, for a standard error."
        )
    third = num_matvecs // 3
    dot = functools.partial(jnp.dot, precision=HIGHEST)

    def estimate(matvec: Matvec, key: Array, like: PyTree) -> Trace:
        flat = lambda tree: _flatten(tree_map(trees.gathered, tree))
        product = lambda vector: flat(matvec(_unflatten(vector, like)))
        keys = jax.random.split(key, num_matvecs - third)
        images = _map(lambda key: flat(matvec(rademacher(key, like))), keys[:third], on_host)
        basis = jnp.linalg.qr(images.T / trees.scale_of(images))[0].T
        known = jnp.sum(_map(lambda row: dot(row, product(row)), basis, on_host))

        def sample(key: Array) -> Array:
            probe = _flatten(rademacher(key, like))
            probe = probe - dot(dot(basis, probe), basis)
            return dot(probe, product(probe))

        rest = _mean(_map(sample, keys[third:], on_host))
        return Trace(known + rest.trace, rest.standard_error)

    return estimate


def _map(function: Callable, inputs: Array, on_host: bool) -> Array:
    if not on_host:
        return lax.map(function, inputs)
    results = []
    for x in inputs:
        stopping.check()
        results.append(function(x))
    return jnp.stack(results)


def _mean(samples: Array) -> Trace:
    scale = trees.scale_of(samples)
    deviation = scale * jnp.std(samples / scale, ddof=1)
    return Trace(jnp.mean(samples), deviation / math.sqrt(len(samples)))
