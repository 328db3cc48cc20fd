"""The order of scores: the one rule of which entry comes before which."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sparsity_jax import trees

__all__ = ["Ranking", "common_type", "position_type", "positions"]


class Ranking:
    """Scores of one float type in order, by integer keys: of zero 0, of the n-th normal above it n,
    of NaN the least.

    Methods act elementwise, on scores and keys that broadcast.
    """

    def __init__(self, real: Any, magnitude: bool = False) -> None:
        self.magnitude = magnitude
        self.real = jnp.dtype(real)  # narrower types convert exactly
        kind = np.finfo(self.real)
        self.integer = jnp.dtype(f"int{kind.bits}")
        self.unsigned = jnp.dtype(f"uint{kind.bits}")
        # subnormals count as zero, on every device alike
        self.skipped = 2**kind.nmant - 1
        largest = kind.smallest_normal * (1 - kind.eps)
        self.subnormal = np.asarray(largest, self.real)
        infinite = np.asarray(np.inf, self.real)
        bits = int(infinite.view(self.integer))
        self.infinity = bits - self.skipped
        self.nan = -1 if magnitude else -self.infinity - 1

    @property
    def bits(self) -> int:
        """Of the largest number."""
        return (self.infinity - self.nan).bit_length()

    def bound(self, key: Array) -> Array:
        """The smallest score whose key is at least `key`."""
        zero = key == 0
        bits = jnp.abs(key) + self.skipped
        bits = jnp.where(zero, 0, bits)
        bits = bits.astype(self.integer)
        size = lax.bitcast_convert_type(bits, self.real)
        score = jnp.where(key < 0, -size, size)
        return jnp.where(zero, -self.subnormal, score)

    def key(self, score: Array) -> Array:
        """The key of what is ranked of a score, see `size`."""
        size = jnp.abs(score)
        bits = lax.bitcast_convert_type(size, self.integer)
        key = jnp.maximum(bits - self.skipped, 0)
        key = jnp.where(score < 0, -key, key)
        unknown = jnp.isnan(score)
        return jnp.where(unknown, self.nan, key)

    def number(self, scores: Array) -> Array:
        """How many keys lie below that of a score: unsigned, 0 of NaN."""
        key = self.key(self.size(scores))
        return key.astype(self.unsigned) - self._unsigned_nan

    def key_of(self, number: Array) -> Array:
        """The key of a `number`."""
        key = number + self._unsigned_nan
        return key.astype(self.integer)

    @property
    def _unsigned_nan(self) -> Array:
        return jnp.asarray(self.nan, self.integer).astype(self.unsigned)

    def size(self, scores: Array) -> Array:
        """What is ranked of scores."""
        scores = scores.astype(self.real)
        return jnp.abs(scores) if self.magnitude else scores

    def at_least(self, scores: Array, key: Array) -> Array:
        """Whether every score has at least this key; bool."""
        scores = scores.astype(self.real)
        bound = self.bound(key)
        reached = scores >= bound
        if self.magnitude:  # not of absolute values, which CPUs would write to memory first
            reached = reached | (scores <= -bound)
        return reached | (key == self.nan)


def common_type(leaves: Sequence[Array]) -> Any:
    """In which scores are compared; raises for scores that cannot be ranked."""
    most = np.iinfo(np.int32).max
    types = {leaf.dtype for leaf in leaves if leaf.size}
    if not types:
        raise ValueError("scores are empty; selection needs at least one entry.")
    if trees.size(leaves) > most:
        raise ValueError(f"scores have more than {most} entries; split the tree.")
    for kind in types:
        if not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"scores are {kind}; selection needs floating-point scores.")
    double = jnp.dtype(jnp.float64)
    if double not in types:
        return jnp.dtype(jnp.float32)
    if len(types) > 1:
        raise TypeError("scores mix float64 with narrower types; convert them to one type.")
    return double


def position_type(span: int) -> Any:
    """Of integers up to twice `span`; CPUs compare signed ones faster."""
    return jnp.int32 if 2 * span < 2**31 else jnp.uint32


def positions(leaves: Sequence[Array], before: Sequence[Array], span: int) -> list[Array]:
    """Of equal scores those of lower position come first: the index in the concatenation of the
    flattened leaves, `span` higher where a mask of `before` is False.

    before: no masks, or one per leaf. span: at least the number of entries.
    """
    integer = position_type(span)
    places = []
    offset = 0
    for i, leaf in enumerate(leaves):
        shape = leaf.shape
        position = jnp.full(shape, offset, integer)
        for axis in range(leaf.ndim):
            inner = shape[axis + 1 :]
            stride = jnp.asarray(math.prod(inner), integer)
            index = lax.broadcasted_iota(integer, shape, axis)
            position += stride * index
        if before:
            position += jnp.where(before[i], 0, jnp.asarray(span, integer))
        places.append(position)
        offset += leaf.size
    return places
