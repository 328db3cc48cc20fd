"""The search on an accelerator: a fixed number of passes over all scores, a few bits each.

No loop ends where data says so, which the host would have to find out; all searches share each
pass.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sparsity_jax import blocks, trees
from sparsity_jax.masks.order import Ranking, position_type

__all__ = ["Selection", "largest"]

_BITS = 3  # of a pass: seven counts over one read


def largest(holds: Callable[[Array], Array], start: Array, bits: int) -> Array:
    """The largest number below 2^bits of which `holds`, per search; 0 if there is none.

    holds: numbers [candidates, searches] -> bool; true up to some number, false above. start:
    unsigned zeros [searches]. Each pass finds the next bits from the left.
    """
    digits = np.arange(1, 2**_BITS)[:, None].astype(start.dtype)
    shifts = np.arange(0, bits, _BITS)[::-1]
    lasts = np.minimum(2.0 ** (bits - shifts), 2**_BITS) - 1  # the first pass has fewer bits

    def append(number: Array, row: tuple) -> tuple[Array, None]:
        shift, last = row
        reached = holds(number | digits << shift) & (digits <= last)
        digit = jnp.sum(reached, axis=0).astype(number.dtype)
        return number | digit << shift, None

    rows = shifts.astype(start.dtype), lasts.astype(start.dtype)
    return lax.scan(append, start, rows)[0]


class Selection:
    """Searches for the k-th largest score of every group of leaves, and where equal ones are cut.

    ks: one per group, at least 1.
    """

    def __init__(self, ranking: Ranking, groups: blocks.Groups, ks: Sequence[Array]) -> None:
        self._ranking = ranking
        leaves = [leaf for group in groups for leaf in group]
        self._ks = trees.varying_like(jnp.stack(ks), leaves)
        self._layout = blocks.Layout(groups)
        pieces = self._layout.pack(groups, jnp.nan)
        self._numbers = [ranking.number(piece) for piece in pieces]
        self._kth = self._kth_largest(self._numbers, self._ks, ranking.bits)

    def _counts(self, numbers: Sequence[Array], bounds: Array) -> Array:
        """How many numbers of each group reach the bounds [candidates, groups]."""
        several = []
        for bound in bounds:
            spread = self._layout.spread(bound)
            reached = [piece >= own for piece, own in zip(numbers, spread)]
            several.append([piece.astype(jnp.int32) for piece in reached])
        return self._layout.sums(several)

    def _kth_largest(self, numbers: Sequence[Array], ks: Array, bits: int) -> Array:
        start = jnp.zeros_like(ks, numbers[0].dtype)
        return largest(lambda bounds: self._counts(numbers, bounds) >= ks, start, bits)

    def thresholds(self) -> list[Array]:
        """The keys of the k-th largest scores."""
        return list(self._ranking.key_of(self._kth))

    def cuts(self, positions: Callable[[], blocks.Groups], last: int) -> list[Array]:
        """As those of `probes`."""
        counts = self._counts(self._numbers, self._kth[None])[0]
        uncut = jnp.full_like(self._ks, last, jnp.uint32)

        def cut_ties() -> Array:
            above = self._counts(self._numbers, self._kth[None] + 1)[0]
            places = self._layout.pack(positions(), last)
            backwards = [  # the first position is the largest number
                jnp.where(number == own, last - place.astype(jnp.uint32), 0)
                for number, own, place in zip(self._numbers, self._layout.spread(self._kth), places)
            ]
            final = self._kth_largest(backwards, self._ks - above, last.bit_length())
            return last + 1 - final

        some_tied = jnp.any(counts != self._ks)
        ends = lax.cond(some_tied, cut_ties, lambda: uncut)
        return list(ends.astype(position_type(last // 2)))
