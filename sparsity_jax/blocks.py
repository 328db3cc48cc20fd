"""Sums over each of many groups of arrays, in one pass over all of them.

On one device the entries lie in blocks, the rows of one matrix, each of them of a single group: a
reduction along the rows and a short one over the blocks serve all groups. On several devices the
arrays may be divided, and packing would gather them; there each is reduced for itself, and only its
sum crosses devices.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import platforms

__all__ = ["Groups", "Layout"]

_WIDTH = 4096  # entries of a block
Groups = Sequence[Sequence[Array]]


class Layout:
    """Where the entries of groups of arrays lie. `pack` makes pieces of them, all alike for groups
    of the same shapes, so that elementwise functions act on pieces.
    """

    def __init__(self, groups: Groups) -> None:
        self.packed = platforms.one_device()
        leaves = [(number, leaf) for number, group in enumerate(groups) for leaf in group]
        self._num_groups = len(groups)
        self._owners = np.array([number for number, _ in leaves])
        if self.packed:
            blocks = [-(-leaf.size // _WIDTH) for _, leaf in leaves]
            self._owners = np.repeat(self._owners, blocks)

    def pack(self, groups: Groups, fill: float = 0) -> list[Array]:
        """The entries of all groups. fill: stands where a block is not full."""
        leaves = [leaf for group in groups for leaf in group]
        if not self.packed:
            return leaves
        kind = jnp.result_type(*leaves)
        blocks = []
        for leaf in leaves:
            flat = leaf.astype(kind).ravel()
            missing = -leaf.size % _WIDTH
            flat = jnp.pad(flat, (0, missing), constant_values=fill)
            blocks.append(flat.reshape(-1, _WIDTH))
        return [jnp.concatenate(blocks)]

    def spread(self, values: Array) -> list[Array]:
        """One value per group [groups], for every piece."""
        if self.packed:
            return [values[self._owners][:, None]]
        return [values[owner] for owner in self._owners]

    def sums(self, several: Sequence[Sequence[Array]]) -> Array:
        """The sum of every group in each of several lists of pieces: [lists, groups]."""
        return self._reduced(several, jnp.sum, jnp.add, jax.ops.segment_sum)

    def largest(self, pieces: Sequence[Array]) -> Array:
        """The largest entry of every group, at least 0: [groups]."""
        reduce = functools.partial(jnp.max, initial=0)
        (peaks,) = self._reduced([pieces], reduce, jnp.maximum, jax.ops.segment_max)
        return jnp.maximum(peaks, 0)

    def _reduced(
        self,
        several: Sequence[Sequence[Array]],
        reduce: Callable,
        combine: Callable,
        of_owners: Callable,
    ) -> Array:
        if self.packed:
            of_blocks = [reduce(pieces[0], axis=1) for pieces in several]
            columns = jnp.stack(of_blocks, axis=1)
            per_group = of_owners(columns, self._owners, self._num_groups, indices_are_sorted=True)
            return per_group.T
        rows = []
        for pieces in several:
            own: list[list[Array]] = [[] for _ in range(self._num_groups)]
            for owner, piece in zip(self._owners, pieces):
                own[owner].append(reduce(piece))
            rows.append(jnp.stack([functools.reduce(combine, parts) for parts in own]))
        return jnp.stack(rows)
