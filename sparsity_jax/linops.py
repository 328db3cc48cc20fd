"""Symmetric linear operators given as products: curvature of a loss, Lanczos, quadrature, traces,
spectral density.

An operator is a function `matvec(v) -> A v` on pytrees of one structure; A is real and symmetric.
Nothing here knows a network: `hvp` and `gauss_newton` make operators of any loss and any pytree,
everything else takes any operator.
All compute in full float32 on every device, unless an operator says how precise it is itself, see
`precision`.

    tridiagonal = lanczos(64)(hvp(loss, params, batch), rademacher(key, params))
    values, weights = ritz(tridiagonal)             # Ritz values and weights: float64, on the host
    np.sum(weights * function(values))              # v^T function(A) v for the unit start vector v

Products run on the device in the type of their vectors; the small tridiagonal problem is solved in
float64 by SciPy.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

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
from sparsity_jax.precision import FULL, Precision, computed
from sparsity_jax.trees import varying_like, widen
from sparsity_jax.types import PyTree

__all__ = [
    "REORTHOGONALIZE",
    "Blocks",
    "Eigenpairs",
    "Lanczos",
    "LanczosState",
    "Matvec",
    "Pair",
    "Rows",
    "Trace",
    "Tridiagonal",
    "border_for",
    "bordered",
    "check_scalar",
    "gauss_newton",
    "gauss_radau",
    "hutchinson",
    "hutchpp",
    "hvp",
    "lanczos",
    "probes_of",
    "rademacher",
    "ritz",
    "spectral_density",
    "squared",
    "tangent",
    "top_eigenpairs",
    "truncate",
]

Matvec = Callable[[PyTree], PyTree]
_einsum = partial(jnp.einsum, precision=FULL)
_inner = partial(jnp.dot, precision=FULL)


# Products with the curvature of a loss ------------------------------------------------------------


def hvp(loss: Callable, params: PyTree, *args: Any, precision: Precision = FULL) -> Matvec:
    """The product with the Hessian of `loss(params, *args)` at `params`, forward over reverse.

    matvec(v): v has the structure and shapes of `params`, and so has the product. precision: of all
    products of matrices inside. Raises ValueError for a loss that is no scalar and for a v of
    another structure, TypeError for params that are no floats.
    """
    trees.check_parameters(params, "hvp")
    scalar = lambda params: loss(params, *args)
    computed(check_scalar, precision)(scalar, params)
    gradient = jax.grad(scalar)

    def matvec(v: PyTree) -> PyTree:
        direction = tangent(v, params)
        _, product = jax.jvp(gradient, (params,), (direction,))
        return product

    return computed(matvec, precision)


def gauss_newton(
    outputs: Callable, loss: Callable, params: PyTree, *args: Any, precision: Precision = FULL
) -> Matvec:
    """The product with J^T H J: J the Jacobian of `z = outputs(params, *args)`, H the Hessian of
    `loss(z, *args)` in z.

    Positive semi-definite if the loss is convex in z. z may be a pytree; precision and errors: as
    of `hvp`.
    """
    trees.check_parameters(params, "gauss_newton")
    network = lambda params: outputs(params, *args)
    scalar = lambda z: loss(z, *args)
    shapes = computed(jax.eval_shape, precision)(network, params)
    computed(check_scalar, precision)(scalar, shapes)
    gradient = jax.grad(scalar)

    def matvec(v: PyTree) -> PyTree:
        direction = tangent(v, params)
        z, change = jax.jvp(network, (params,), (direction,))
        _, pull_back = jax.vjp(network, params)
        _, curved = jax.jvp(gradient, (z,), (change,))
        (product,) = pull_back(curved)
        return product

    return computed(matvec, precision)


def squared(matvec: Matvec) -> Matvec:
    """The product with A^2: positive semi-definite, and |A| is its square root. Costs two products.

    Its type is at least float32, as squares may leave the range of narrower types.
    """

    def twice(v: PyTree) -> PyTree:
        once = matvec(v)
        scale = trees.scale_of(once)
        unit = tree_map(lambda x: (x / scale).astype(x.dtype), once)
        return tree_map(lambda x: widen(x) * scale, matvec(unit))

    return computed(twice)


def check_scalar(loss: Callable, argument: PyTree) -> None:
    """Raises ValueError unless `loss(argument)` is a scalar; nothing is computed."""
    value = jax.eval_shape(loss, argument)
    shape = getattr(value, "shape", None)
    if shape == ():
        return
    returned = f"an array of shape {shape}"
    if shape is None:
        returned = f"a {type(value).__name__}"
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
    allowed: Any = tree_structure(like)
    if given != allowed:
        raise ValueError(f"{name} has the structure {given}; allowed: that of {other}, {allowed}.")
    for (path, x), y in zip(tree_leaves_with_path(tree), tree_leaves(like)):
        given = jnp.shape(x)
        allowed = jnp.shape(y)
        if given != allowed:
            place = f"shape {given} at {trees.path_name(path)!r}"
            raise ValueError(f"{name} has {place}; allowed: that of {other}, {allowed}.")


# Trees as vectors ---------------------------------------------------------------------------------


def rademacher(key: Array, like: PyTree) -> PyTree:
    """Independent signs +-1 in the structure, shapes and types of `like`, divided among devices as
    it is; TypeError for types that are no floats.
    """
    trees.check_parameters(like, "rademacher")
    leaves, structure = tree_flatten(like)
    keys = jax.random.split(key, len(leaves))

    def sign(key: Array, x: Array) -> Array:
        drawn = jax.random.rademacher(key, jnp.shape(x), jnp.result_type(x))
        return trees.divided_like(drawn, x)

    return tree_unflatten(structure, map(sign, keys, leaves))


def _dot(first: PyTree, second: PyTree, *, divided: bool = False) -> Array:
    """Inner product. Of two vectors at a time: XLA's CPU backend sums those pairwise (error 1e-9
    for 1e6 entries), a matrix-vector product one after the other (1e-5).

    divided: devices have shares of the arrays, which flat ones would gather.
    """
    if divided:
        return trees.dot(first, second)
    flat = lambda x: widen(x).ravel()
    dot = lambda x, y: _inner(flat(x), flat(y))
    products = tree_map(dot, first, second)
    return jnp.asarray(sum(tree_leaves(products)))


def _is_divided(tree: PyTree) -> bool:
    """Whether devices may have shares of the arrays."""
    return any(map(trees.may_be_divided, tree_leaves(tree)))


def _flatten(tree: PyTree) -> Array:
    return jnp.concatenate([widen(leaf).ravel() for leaf in tree_leaves(tree)])


def _unflatten(vector: Array, like: PyTree) -> PyTree:
    """`vector` [..., D] cut into the leaves of `like`: each [..., *shape], in its type."""
    leaves, structure = tree_flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = jnp.split(vector, ends[:-1], axis=-1)
    shaped = []
    for piece, leaf in zip(pieces, leaves):
        shape = (*vector.shape[:-1], *leaf.shape)
        piece = piece.reshape(shape)
        shaped.append(piece.astype(jnp.result_type(leaf)))
    return tree_unflatten(structure, shaped)


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
    matrix on the host, or None. Of arrays that devices have shares of: a tuple of `Rows`.
    """

    step: Array
    num_steps: Array  # falls behind `step` once the Krylov space is exhausted
    alphas: Array
    betas: Array
    current: PyTree
    previous: PyTree
    basis: Any

    @property
    def tridiagonal(self) -> Tridiagonal:
        """What the steps so far have found."""
        return Tridiagonal(self.alphas, self.betas, self.num_steps)


Blocks = tuple[Any, ...]
_CHUNK = 2**12  # entries whose products are summed one after the other
_SHARDS = 64  # several chunks are a multiple of so many, for many numbers of devices to share them


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
    divided: ClassVar[bool] = False
    row_axis: ClassVar[int] = 1

    def vector(self, tree: PyTree) -> PyTree:
        """A tree in the form in which vectors are kept."""
        return _flatten(tree)

    def tree(self, vector: PyTree, like: PyTree) -> PyTree:
        """A vector as the tree that it was."""
        return _unflatten(vector, like)

    def pieces(self, vector: PyTree) -> PyTree:
        """A vector as a row of a block is."""
        return _chunks(vector)

    def whole(self, pieces: PyTree, like: PyTree) -> PyTree:
        """The vector of some pieces."""
        return pieces.ravel()[: like.size]

    def first_row(self, piece: Array, is_first: ndarray) -> Array:
        """A piece as the one row of a block that is not zero."""
        # made of the piece, so that they are sharded as it is
        return jnp.where(is_first[:, None], piece[:, None], 0)

    def coefficients(self, block: PyTree, pieces: PyTree) -> Array:
        """Products of a vector with the rows of a block: [rows]."""
        return _einsum("krc,kc->kr", block, pieces).sum(0)

    def without(self, pieces: PyTree, part: Array, block: PyTree) -> PyTree:
        """A vector without such a part of each row."""
        every = jnp.broadcast_to(part, block.shape[:2])
        return pieces - _einsum("kr,krc->kc", every, block)

    def mixed(self, mixing: ndarray, basis: Blocks, like: PyTree) -> PyTree:
        """Combinations of the rows, a column of `mixing` each: leaves [combinations, ...]."""
        flat: Any = 0
        for block in basis:
            rows = self._rows(block)
            used = jnp.asarray(mixing[:rows], block.dtype)
            filled = block[:, : len(used)]
            flat = flat + _einsum("rn,krc->nkc", used, filled)
            mixing = mixing[rows:]
        flat = flat.reshape(len(flat), -1)
        flat = flat[:, : trees.size(like)]
        return _unflatten(flat, like)

    def create(self, vector: PyTree, num_rows: int) -> Blocks:
        """The basis with `vector` as row 0."""
        rows = -(-num_rows // self.num_blocks)
        pieces = self.pieces(vector)
        index = np.arange(num_rows)
        blocks = []
        for first in range(0, num_rows, rows):
            is_first = index[first : first + rows] == 0
            kept = lambda piece, is_first=is_first: self._kept(self.first_row(piece, is_first))
            blocks.append(tree_map(kept, pieces))
        return tuple(blocks)

    def write(self, basis: Blocks, row: Array, vector: PyTree) -> Blocks:
        """The basis with another row; unchanged if there is no such row."""
        pieces = tree_map(self._kept, self.pieces(vector))

        def place(block: PyTree, index: Array) -> PyTree:
            put = lambda rows, piece: lax.dynamic_update_index_in_dim(
                rows, piece, index, self.row_axis
            )
            return tree_map(put, block, pieces)

        keep = lambda block, index: block
        blocks = []
        for block in basis:
            inside = (row >= 0) & (row < self._rows(block))
            # a `select` would read and write a row of every block; `cond` touches one, in place
            blocks.append(lax.cond(inside, place, keep, block, row))
            row = row - self._rows(block)
        return tuple(blocks)

    def orthogonalize(self, basis: Blocks, row: Array, vector: PyTree) -> PyTree:
        """The vector without its part in rows 0..row."""
        squares, rest = self.part_in(basis, row, vector)
        again = lambda rest: self.part_in(basis, row, rest)[1]
        enough = lambda rest: rest
        return lax.cond(_dot(rest, rest, divided=self.divided) < squares, again, enough, rest)

    def part_in(self, basis: Blocks, row: Array, vector: PyTree) -> tuple[Array, PyTree]:
        """(the squared length of the vector's part in rows 0..row, the vector without it)."""

        def subtract(pieces: PyTree, squares: Array, block: PyTree) -> tuple[PyTree, Array]:
            block = tree_map(lambda rows: rows.astype(squares.dtype), block)
            part = self.coefficients(block, pieces)
            return self.without(pieces, part, block), squares + _inner(part, part)

        skip = lambda pieces, squares, block: (pieces, squares)
        pieces = self.pieces(vector)
        leaves = tree_leaves(pieces)
        squares = varying_like(jnp.zeros((), leaves[0].dtype), leaves)
        for block in basis:
            pieces, squares = lax.cond(row >= 0, subtract, skip, pieces, squares, block)
            row = row - self._rows(block)
        return squares, self.whole(pieces, vector)

    def _rows(self, block: PyTree) -> int:
        return tree_leaves(block)[0].shape[self.row_axis]

    def _kept(self, array: Array) -> Array:
        return array.astype(self.dtype or array.dtype)


class Rows(NamedTuple):
    """Vectors that devices have shares of. each: a tree like the start vector, of [rows, ...]."""

    each: PyTree


@dataclasses.dataclass(frozen=True)
class _Divided(_OnDevice):
    """Keeps rows of every array for itself, [rows, ...], so that devices keep their shares: only
    coefficients cross them.
    """

    divided: ClassVar[bool] = True
    row_axis: ClassVar[int] = 0

    def vector(self, tree: PyTree) -> PyTree:
        return tree

    def tree(self, vector: PyTree, like: PyTree) -> PyTree:
        del like
        return vector

    def pieces(self, vector: PyTree) -> PyTree:
        return Rows(vector)

    def whole(self, pieces: PyTree, like: PyTree) -> PyTree:
        del like
        return pieces.each

    def first_row(self, piece: Array, is_first: ndarray) -> Array:
        is_first = is_first.reshape(-1, *[1] * piece.ndim)
        return jnp.where(is_first, piece, 0)

    def coefficients(self, block: PyTree, pieces: PyTree) -> Array:
        products = map(_products, tree_leaves(block), tree_leaves(pieces))
        return functools.reduce(jnp.add, products)

    def without(self, pieces: PyTree, part: Array, block: PyTree) -> PyTree:
        less = lambda piece, rows: piece - jnp.tensordot(part, rows, 1, precision=FULL)
        return tree_map(less, pieces, block)

    def mixed(self, mixing: ndarray, basis: Blocks, like: PyTree) -> PyTree:
        parts = []
        for block in basis:
            filled = self._rows(block)
            parts.append(tree_map(partial(_combined, mixing[:filled]), block.each))
            mixing = mixing[filled:]
        return tree_map(lambda *own: functools.reduce(jnp.add, own), *parts)


def _combined(mixing: ndarray, rows: Array) -> Array:
    """Combinations of the first rows of [rows, ...], a column of `mixing` each."""
    columns = jnp.asarray(mixing.T, rows.dtype)
    return jnp.tensordot(columns, rows[: len(mixing)], 1, precision=FULL)


def _products(rows: Array, piece: Array) -> Array:
    """Inner products of an array with each row of [rows, ...]."""
    axes = tuple(range(piece.ndim))
    behind = tuple(axis + 1 for axis in axes)
    # products of shares are summed over devices
    everywhere = jax.sharding.PartitionSpec() if any(trees.division(piece)) else None
    return jnp.tensordot(rows, piece, (behind, axes), precision=FULL, out_sharding=everywhere)


def _chunks(vector: Array) -> Array:
    """[D] as [chunks, entries], the last filled up with zeros."""
    size = vector.size
    chunks = 1
    if size > _CHUNK:
        chunks = -(-size // (_CHUNK * _SHARDS)) * _SHARDS
    entries = -(-size // chunks)  # the same in all, to fill up less
    missing = chunks * entries - size
    padded = jnp.pad(vector, (0, missing))
    return padded.reshape(chunks, entries)


class _OnHost:
    """Keeps the basis in one NumPy matrix, written in place and multiplied on the host."""

    divided: ClassVar[bool] = False

    def vector(self, tree: PyTree) -> Array:
        return _flatten(tree)

    def tree(self, vector: Array, like: PyTree) -> PyTree:
        return _unflatten(vector, like)

    def create(self, vector: Array, num_rows: int) -> ndarray:
        basis = np.zeros((num_rows, vector.size), vector.dtype)
        basis[0] = vector
        return basis

    def write(self, basis: ndarray, row: Array, vector: Array) -> ndarray:
        if row < len(basis):
            basis[int(row)] = vector
        return basis

    def orthogonalize(self, basis: ndarray, row: Array, vector: Array) -> ndarray:
        rows = basis[: int(row) + 1]
        flat = np.asarray(vector)
        part = rows @ flat
        rest = flat - part @ rows
        if rest @ rest < part @ part:
            rest = rest - (rows @ rest) @ rows
        return rest


_Basis = _OnDevice | _OnHost
REORTHOGONALIZE: dict[str, _Basis | None] = {
    "full": _OnDevice(4),
    "bfloat16": _OnDevice(16, jnp.bfloat16),
    "host": _OnHost(),
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class Lanczos:
    """Lanczos tridiagonalisation with `num_matvecs` products: `lanczos(64)(matvec, start) ->
    Tridiagonal`, or one product at a time.

    The call is one traced loop, so matvec must be traceable; works under `jit` and `vmap` over
    start vectors, except with reorthogonalize="host". Outside `jit` each call compiles anew and
    holds the basis twice: to repeat it, or for large D, wrap it in `jit`, with all that matvec
    depends on as arguments (XLA computes with constants while compiling).
    on_host: a host loop of steps instead, for a matvec that is one itself, or a convolution's on a
    CPU, whose gradients XLA compiles badly inside loops.

    `step` and `update` take any matvec, host loops too. While `jit` traces, they are pure; outside
    of it they consume the state they are given: its basis is updated in place. Save a state before
    it is passed on.

    reorthogonalize: every new vector against all before it,
        `full`      kept in the vectors' type: m D numbers;
        `bfloat16`  kept in half of float32's memory, multiplied and accumulated in the vectors'
                    type. Coefficients are off by some 1e-3 / sqrt(D) of the largest, and smaller
                    details of the spectrum are lost;
        `host`      kept and multiplied in host memory: the device holds three vectors. Cannot be
                    traced by `jit`;
        `none`      not at all: three vectors. Converged eigenvalues then reappear in copies, which
                    delays the others.
    The three-term recurrence comes first and leaves rounding errors only, so one pass of
    Gram-Schmidt is enough, and a second one is made where the first removed more than half of the
    squared length (Kahan and Parlett's "twice is enough"). Ends early, see `Tridiagonal`, after D
    steps or where the residual is nothing but rounding errors.

    shift: added to every norm a vector is divided by. The original of the geometric study uses
        1e-6.

    Vectors and basis are divided among devices as the start vector is, by automatic or explicit
    axes of a mesh, and a step exchanges nothing but sums: 4 (num_matvecs + 4) bytes or so. `host`
    gathers each vector. Inside `shard_map` the start vector varies over the axes that the products
    vary over (`lax.pcast`).

    Start vectors have floating-point leaves of one type, float32 or float64: TypeError; ValueError
    for a start vector that is zero or not finite (NaN results while tracing), for a product of
    another structure, for num_matvecs < 1.
    """

    num_matvecs: int
    reorthogonalize: str = "full"
    shift: float = 0.0
    on_host: bool = False

    def __post_init__(self) -> None:
        tables.lookup(REORTHOGONALIZE, self.reorthogonalize, "reorthogonalize")
        if self.num_matvecs < 1:
            raise ValueError(f"num_matvecs is {self.num_matvecs}; allowed: 1 and above.")

    def basis(self, *, divided: bool) -> _Basis | None:
        """Where earlier vectors are kept; None: nowhere."""
        found = REORTHOGONALIZE[self.reorthogonalize]
        if divided and isinstance(found, _OnDevice):
            return _Divided(found.num_blocks, found.dtype)
        return found

    @property
    def in_host_memory(self) -> bool:
        """Whether earlier vectors are kept there."""
        return isinstance(REORTHOGONALIZE[self.reorthogonalize], _OnHost)

    def __call__(self, matvec: Matvec, start: PyTree) -> Tridiagonal:
        return self.run(matvec, start).tridiagonal

    def init(self, start: PyTree) -> LanczosState:
        """The state before the first product."""
        divided = _is_divided(start) and not self.in_host_memory
        start = _checked_start(start, divided)
        if self.in_host_memory:
            return _begin(self, divided, start)
        return _begin_compiled(self, divided, start)

    def step(self, matvec: Matvec, state: LanczosState) -> LanczosState:
        """The state after one more product."""
        return self.update(state, computed(matvec)(state.current))

    def update(self, state: LanczosState, product: PyTree) -> LanczosState:
        """The state after a step whose product is known."""
        *numbers, current, previous, rows = state
        _check_like(product, current, "the product", "the start vector")
        divided = _is_divided(current) and not self.in_host_memory
        if rows is not None and not self.in_host_memory:
            divided = isinstance(rows[0], Rows)  # as it was begun
        fit = trees.divided_like if divided else lambda leaf, _: trees.gathered(leaf)
        product = tree_map(fit, product, current)
        if self.in_host_memory:
            return _advance(self, divided, numbers, current, product, previous, rows)
        return _advance_in_place(self, divided, numbers, current, product, previous, rows)

    def run(self, matvec: Matvec, start: PyTree) -> LanczosState:
        """The state after all products."""
        state = self.init(start)
        if not (self.on_host or self.in_host_memory):
            step = lambda _, state: self.step(matvec, state)
            return lax.fori_loop(0, self.num_matvecs, step, state)
        for _ in range(self.num_matvecs):
            stopping.check()
            state = self.step(matvec, state)
        return state


lanczos = Lanczos


def _checked_start(start: PyTree, divided: bool) -> PyTree:
    start = tree_map(jnp.asarray, start)
    if not divided:
        start = tree_map(trees.gathered, start)
    types = sorted({str(leaf.dtype) for leaf in tree_leaves(start)})
    if types not in (["float32"], ["float64"]):
        given = ", ".join(types) or "no arrays"
        raise TypeError(
            f"the start vector has {given}; Lanczos needs leaves of one type, float32 or float64."
        )
    length = trees.norm(start)
    if not isinstance(length, jax.core.Tracer) and not 0 < length < math.inf:
        raise ValueError(
            f"the start vector has length {length}; Lanczos needs a finite vector that is not zero."
        )
    return start


def _begin(method: Lanczos, divided: bool, start: PyTree) -> LanczosState:
    unit = trees.scale_of(start)
    start = tree_map(lambda leaf: leaf / unit, start)
    square = _dot(start, start, divided=divided)
    length = jnp.sqrt(square) + method.shift / unit
    current = tree_map(lambda leaf: leaf / length, start)
    rows = None
    basis = method.basis(divided=divided)
    if basis:
        rows = basis.create(basis.vector(current), min(method.num_matvecs, trees.size(current)))
    leaves = tree_leaves(current)
    zero = varying_like(jnp.zeros((), jnp.int32), leaves)
    numbers = varying_like(jnp.zeros(method.num_matvecs, square.dtype), leaves)
    previous = tree_map(trees.zeros_like, current)
    return LanczosState(zero, zero, numbers, numbers, current, previous, rows)


_begin_compiled = jax.jit(_begin, static_argnums=(0, 1))


def _advance(
    method: Lanczos,
    divided: bool,
    numbers: Sequence[Array],
    current: PyTree,
    product: PyTree,
    previous: PyTree,
    rows: Any,
) -> LanczosState:
    """The state after one step.

    numbers: the first four fields of the state before. The product is divided by a power of two
    near its size first: no square leaves the range, whatever the unit of A.
    """
    step, _, _, betas = numbers
    basis = method.basis(divided=divided)
    before = jnp.where(step > 0, betas[step - 1], 0)
    unit, alpha, rest = _recurrence(current, product, previous, before, divided)
    if basis:
        rest = basis.orthogonalize(rows, step, basis.vector(rest))
    after, factor = _close(numbers, unit, alpha, before, rest, method.shift, divided)
    following = tree_map(lambda leaf: leaf * factor, rest)
    if basis:
        rows = basis.write(rows, step + 1, following)
        following = basis.tree(following, current)
    return LanczosState._make((*after, following, current, rows))


_advance_in_place = jax.jit(_advance, static_argnums=(0, 1), donate_argnums=(5, 6))


@partial(jax.jit, static_argnums=4)
def _recurrence(
    current: PyTree, product: PyTree, previous: PyTree, beta: Array, divided: bool
) -> tuple[Array, Array, PyTree]:
    """(unit, alpha / unit, residual / unit)."""
    product = tree_map(lambda p, v: p.astype(v.dtype), product, current)
    unit = trees.scale_of(product)
    product = tree_map(lambda p: p / unit, product)
    alpha = _dot(product, current, divided=divided)
    beta = beta / unit
    subtract = lambda p, v, u: p - alpha * v - beta * u
    return unit, alpha, tree_map(subtract, product, current, previous)


@partial(jax.jit, static_argnums=(5, 6))
def _close(
    numbers: Sequence[Array],
    unit: Array,
    alpha: Array,
    before: Array,
    rest: PyTree,
    shift: float,
    divided: bool,
) -> tuple:
    """The numbers after a step, and what to multiply its residual `rest` by: 0 once the Krylov
    space is exhausted.

    alpha, rest: divided by `unit`.
    """
    step, num_steps, alphas, betas = numbers
    running = (step == 0) | (before != 0)
    alpha = jnp.where(running, unit * alpha, 0)
    square = _dot(rest, rest, divided=divided)
    length = jnp.sqrt(square)
    beta = unit * length
    alphas = alphas.at[step].set(alpha)
    largest = jnp.max(jnp.abs(alphas))
    largest = jnp.maximum(largest, jnp.max(betas))
    # False for NaN, which goes on, to be seen
    rounding = beta / (16 * jnp.finfo(beta.dtype).eps) <= largest
    is_full = step + 1 >= trees.size(rest)
    more = running & ~is_full & ~rounding
    last = jnp.where(more, beta, 0)
    betas = betas.at[step].set(last)
    divisor = jnp.where(more, length + shift / unit, 1)
    factor = jnp.where(more, 1 / divisor, 0)
    return (step + 1, num_steps + running, alphas, betas), factor


class Eigenpairs(NamedTuple):
    """values [k], largest magnitude first; vectors: a tree of leaves [k, ...]; residuals [k]: norm
    of A v - value v.
    """

    values: ndarray
    vectors: PyTree
    residuals: ndarray


def top_eigenpairs(
    num: int, num_matvecs: int, *, on_host: bool = False
) -> Callable[..., Eigenpairs]:
    """The `num` eigenvalues of largest magnitude and their unit vectors, from `num_matvecs` steps
    of full Lanczos.

    top_eigenpairs(3, 64)(matvec, start) -> Eigenpairs. An eigenvalue of A lies within a value's
    residual of it; the residuals are Lanczos' own and cost no products. Of a repeated eigenvalue
    one vector is found. Not traceable. Raises ValueError where the Krylov space of `start` has
    fewer than `num` dimensions.
    """
    if not 1 <= num <= num_matvecs:
        raise ValueError(f"num is {num}; allowed: 1 to num_matvecs, {num_matvecs}.")
    method = Lanczos(num_matvecs, on_host=on_host)

    def find(matvec: Matvec, start: PyTree) -> Eigenpairs:
        state = method.run(matvec, start)
        alphas, betas = _coefficients(state.tridiagonal)
        steps = len(alphas)
        if num > steps:
            raise ValueError(
                f"the Krylov space has {steps} dimensions; allowed: num up to that, not {num}."
            )
        values, mixing = _eigh(alphas, betas)
        order = np.argsort(-np.abs(values), kind="stable")
        top = order[:num]
        mixing = mixing[:, top]
        residuals = betas[-1] * np.abs(mixing[-1])
        basis: Any = method.basis(divided=isinstance(state.basis[0], Rows))
        vectors = basis.mixed(mixing, state.basis, state.current)
        return Eigenpairs(values[top], vectors, residuals)

    return find


# Quadrature: float64 on the host ------------------------------------------------------------------

Pair = tuple[ndarray, ndarray]  # values and weights, or alphas and betas


def truncate(tridiagonal: Tridiagonal, num_matvecs: int) -> Tridiagonal:
    """What Lanczos would have returned after `num_matvecs` >= 1 products: the history of a result
    costs nothing.
    """
    alphas, betas, num_steps = tridiagonal
    steps = np.minimum(num_steps, num_matvecs)
    return Tridiagonal(alphas[..., :num_matvecs], betas[..., :num_matvecs], steps)


def ritz(tridiagonal: Tridiagonal) -> Pair:
    """Ritz values, ascending, and Ritz weights, the squared first components of the eigenvectors:
    float64 [num_steps].

    They are the nodes and weights of Gauss quadrature for v^T f(A) v, v the unit start vector:
    exact for polynomials of degree up to 2 num_steps - 1. With a leading axis of probes both are
    [num_probes, most steps]; a probe of fewer repeats its largest value with weight 0. Raises
    ValueError for coefficients that are not finite.
    """
    return _per_probe(_gauss, tridiagonal)


def gauss_radau(tridiagonal: Tridiagonal) -> Pair:
    """Values and weights of the Gauss-Radau rule with one value at 0, of a positive semi-definite
    operator.

    [num_steps + 1] values, exact for polynomials of degree up to 2 num_steps. If f is completely
    monotone from 0 on, its quadrature is an upper bound of v^T f(A) v, and that of `ritz` a lower
    one. Where the Krylov space is exhausted, both are exact, and the rule of `ritz` is returned.
    Probes as for `ritz`.

    Values a little below 0 (rounding errors) are moved to it. Raises ValueError if a Ritz value is
    below by more than 1e-3 of the largest. Source: Golub and Meurant, Matrices, Moments and
    Quadrature (2010), section 6.2.
    """
    return _per_probe(_radau, tridiagonal)


def bordered(probe: Tridiagonal, *, last: float) -> tuple[ndarray, ndarray, ndarray]:
    """(values, firsts, lasts), [num_steps + 1] each, of the tridiagonal matrix with one more row
    ending in `last`.

    firsts, lasts: first and last components of its unit eigenvectors. Values and firsts^2 are a
    quadrature rule exact for polynomials of degree up to 2 num_steps, whatever `last`: they are the
    canonical representations of the moments known so far, one for each position of a node. Where
    the Krylov space is exhausted `last` gets no weight. Takes one probe.
    Source: Krein and Nudelman, The Markov Moment Problem (1977), chapter 3.
    """
    alphas, betas = _coefficients(probe)
    values, vectors = _eigh(np.append(alphas, last), betas)
    return values, vectors[0], vectors[-1]


def border_for(probe: Tridiagonal) -> float:
    """The `last` with which `bordered` has a value at 0; huge if a Ritz value is there."""
    alphas, betas = _coefficients(probe)
    sizes = np.abs(alphas)
    size = max(np.max(sizes), np.max(betas))
    least = np.finfo(np.float64).tiny ** 0.25 * (size or 1.0)
    pivot = math.inf
    before = 0.0
    # eliminating from the top
    for alpha, beta in zip(alphas, betas):
        pivot = (alpha - before**2 / pivot) or least
        before = beta
    return float(before**2 / pivot)


def probes_of(tridiagonal: Tridiagonal) -> list[Tridiagonal]:
    """The result of every probe."""
    if np.ndim(tridiagonal.alphas) == 1:
        return [tridiagonal]
    columns = map(np.asarray, tridiagonal)
    return [Tridiagonal(*probe) for probe in zip(*columns)]


def _per_probe(rule: Callable, tridiagonal: Tridiagonal) -> Pair:
    rules = [rule(*_coefficients(probe)) for probe in probes_of(tridiagonal)]
    if np.ndim(tridiagonal.alphas) == 1:
        return rules[0]
    most = max(len(values) for values, _ in rules)
    padded = []
    for values, weights in rules:
        missing = (0, most - len(values))
        repeated = np.pad(values, missing, mode="edge")
        padded.append((repeated, np.pad(weights, missing)))
    values, weights = np.stack(padded, axis=1)
    return values, weights


def _coefficients(probe: Tridiagonal) -> Pair:
    """alphas and betas [num_steps] in float64, checked."""
    steps = int(probe.num_steps)
    alphas = np.asarray(probe.alphas[:steps], float)
    betas = np.asarray(probe.betas[:steps], float)
    if not np.isfinite([alphas, betas]).all():
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


def _radau(alphas: ndarray, betas: ndarray) -> Pair:
    values, vectors = _eigh(alphas, betas)
    weights = vectors[0] ** 2
    sizes = np.abs(values)
    largest = np.max(sizes)
    if values[0] < -1e-3 * largest or (largest == 0 < betas[-1]):
        raise ValueError(
            f"the operator is not positive semi-definite: its Ritz values begin at {values[0]:.3g} "
            f"and end at {values[-1]:.3g}. Take one that is: gauss_newton, squared."
        )
    if betas[-1] > 0:
        # the last entry that makes 0 an eigenvalue is beta^2 T^-1 [n, n]
        rounding = 16 * np.finfo(np.float64).eps * largest
        positive = np.maximum(values, rounding)
        inverse = np.sum(vectors[-1] ** 2 / positive)
        last = betas[-1] ** 2 * inverse
        alphas = np.append(alphas, last)
        values, weights = _gauss(alphas, betas)
    return np.maximum(values, 0.0), weights


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
    as the original's first step to its width: with few bins for sigma2, mass falls between them,
    which quadrature with the Ritz weights avoids.
    Source: Ghorbani, Krishnan, Xiao 2019, arXiv:1901.10159.
    """
    values = np.atleast_2d(values).astype(np.float64)
    weights = np.ravel(weights).astype(np.float64)
    least = values.min(-1).mean()
    largest = values.max(-1).mean()
    grid = np.linspace(least - overhead, largest + overhead, bins)
    variance = sigma2 * max(1.0, grid[-1] - grid[0])
    height = 1 / math.sqrt(2 * math.pi * variance)
    density = np.zeros(bins)
    for value, weight in zip(values.ravel(), weights):
        squares = (value - grid) ** 2
        falls = np.exp(-squares / (2 * variance))
        density += weight * (height * falls)
    density /= len(values)
    mass = np.sum(density) * (grid[1] - grid[0])
    if mass > 0:
        density /= mass
    return density, grid


# Traces -------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """An unbiased estimate of a trace and its standard error."""

    trace: Array
    standard_error: Array


def hutchinson(num_probes: int, *, on_host: bool = False) -> Callable[..., Trace]:
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
            product = computed(matvec)(probe)
            return _dot(probe, product, divided=_is_divided(probe))

        keys = jax.random.split(key, num_probes)
        samples = _map(sample, keys, on_host)
        return _mean(samples)

    return estimate


def hutchpp(num_matvecs: int, *, on_host: bool = False) -> Callable[..., Trace]:
    """Hutch++: `hutchpp(60)(matvec, key, like) -> Trace`, from `num_matvecs` products in total.

    The trace on the range of A times a third of the probes exactly, Hutchinson's on the rest. Exact
    for an operator of rank up to num_matvecs // 3, and for semi-definite ones of error O(1 /
    num_matvecs). Keeps two vectors per product of that third, and only one, divided among devices
    as `like` is, where devices have shares of that. on_host as for `lanczos`. Raises ValueError for
    fewer than 4 products.
    Source: Meyer, Musco, Musco, Woodruff 2021, arXiv:2010.09649.
    """
    if num_matvecs < 4:
        raise ValueError(
            f"num_matvecs is {num_matvecs}; allowed: 4 and above, for a standard error."
        )
    third = num_matvecs // 3

    def estimate(matvec: Matvec, key: Array, like: PyTree) -> Trace:
        keys = jax.random.split(key, num_matvecs - third)
        if _is_divided(like):
            return _divided_hutchpp(computed(matvec), keys, third, like, on_host)

        def product(vector: PyTree) -> Array:
            image = computed(matvec)(vector)
            return _flatten(tree_map(trees.gathered, image))

        def image(key: Array) -> Array:
            return product(rademacher(key, like))

        def share(row: Array) -> Array:
            vector = _unflatten(row, like)
            return _inner(row, product(vector))

        def sample(key: Array) -> Array:
            probe = _flatten(rademacher(key, like))
            inside = _inner(basis, probe)
            return share(probe - _inner(inside, basis))

        images = _map(image, keys[:third], on_host)
        columns, _ = jnp.linalg.qr(images.T / trees.scale_of(images))
        basis = columns.T
        return _in_parts(_map(share, basis, on_host), _map(sample, keys[third:], on_host))

    return estimate


def _divided_hutchpp(matvec: Matvec, keys: Array, third: int, like: PyTree, on_host: bool) -> Trace:
    """`hutchpp` of vectors that devices have shares of: an orthonormal basis row by row, where QR
    would gather all of them. A row is zero where the images so far span the next one.
    """
    method = _Divided(1)

    def image(key: Array) -> PyTree:
        product = matvec(rademacher(key, like))
        return tree_map(trees.divided_like, product, like)

    def add(row: Array, basis: Blocks) -> Blocks:
        found = image(keys[row])
        size = trees.norm(found)
        unit = tree_map(lambda leaf: leaf / jnp.where(size > 0, size, 1), found)
        rest = method.orthogonalize(basis, row, unit)
        length = trees.norm(rest)
        new = length > 16 * jnp.finfo(length.dtype).eps
        factor = jnp.where(new, 1 / jnp.where(new, length, 1), 0)
        return method.write(basis, row, tree_map(lambda leaf: leaf * factor, rest))

    def share(vector: PyTree) -> Array:
        return _dot(vector, matvec(vector), divided=True)

    def sample(key: Array) -> Array:
        _, rest = method.part_in(basis, row, rademacher(key, like))
        return share(rest)

    row = jnp.zeros((), jnp.int32)
    zeros = tree_map(lambda leaf: trees.zeros_like(widen(leaf)), like)
    basis = method.create(zeros, third)
    if on_host:
        for number in range(third):
            stopping.check()
            basis = add(jnp.asarray(number, jnp.int32), basis)
    else:
        basis = lax.fori_loop(0, third, add, basis)
    vectors = method.whole(basis[0], like)
    return _in_parts(_map(share, vectors, on_host), _map(sample, keys[third:], on_host))


def _in_parts(shares: Array, samples: Array) -> Trace:
    """The trace on a subspace, known as a sum, and that on the rest."""
    known = jnp.sum(shares)
    rest = _mean(samples)
    return Trace(known + rest.trace, rest.standard_error)


def _map(function: Callable, inputs: PyTree, on_host: bool) -> Array:
    """`function` of each entry along the first axis of all arrays."""
    if not on_host:
        return lax.map(function, inputs)
    results = []
    for number in range(len(tree_leaves(inputs)[0])):
        stopping.check()
        entry = tree_map(operator.itemgetter(number), inputs)
        results.append(function(entry))
    return jnp.stack(results)


def _mean(samples: Array) -> Trace:
    scale = trees.scale_of(samples)
    deviation = scale * jnp.std(samples / scale, ddof=1)
    root = math.sqrt(len(samples))
    return Trace(jnp.mean(samples), deviation / root)
