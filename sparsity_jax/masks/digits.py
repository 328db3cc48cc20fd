"""The search on an accelerator: a fixed number of passes over all scores, a few bits each.

No loop ends where data says so, which the host would have to find out; all searches share each
pass.
"""

from collections.abc import Callable, Sequence

import jax
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
    kind = start.dtype
    base = 2**_BITS
    digits = np.arange(1, base, dtype=kind)
    digits = digits[:, None]
    shifts = np.arange(0, bits, _BITS)[::-1]
    left = bits - shifts  # fewer than a digit's in the first pass
    lasts = np.minimum(2.0**left, base) - 1

    def append(number: Array, row: tuple) -> tuple[Array, None]:
        shift, last = row
        candidates = number | digits << shift
        reached = holds(candidates) & (digits <= last)
        digit = jnp.sum(reached, axis=0, dtype=kind)
        return number | digit << shift, None

    rows = shifts.astype(kind), lasts.astype(kind)
    number, _ = lax.scan(append, start, rows)
    return number


class Selection:
    """Searches for the k-th largest score of every group of leaves, and where equal ones are cut.

    ks: one per group, at least 1.
    """

    def __init__(self, ranking: Ranking, groups: blocks.Groups, ks: Sequence[Array]) -> None:
        self._ranking = ranking
        leaves = jax.tree.leaves(groups)
        stacked = jnp.stack(ks)
        self._ks = trees.varying_like(stacked, leaves)
        self._layout = blocks.Layout(groups)
        pieces = self._layout.pack(groups, jnp.nan)
        self._numbers = [ranking.number(piece) for piece in pieces]
        self._kth = self._kth_largest(self._numbers, self._ks, ranking.bits)

    def _counts(self, numbers: Sequence[Array], bounds: Array) -> Array:
        """How many numbers of each group reach the bounds [candidates, groups]."""
        several = []
        for bound in bounds:
            spread = self._layout.spread(bound)
            reached = []
            for piece, own in zip(numbers, spread):
                enough = piece >= own
                reached.append(enough.astype(jnp.int32))
            several.append(reached)
        return self._layout.sums(several)

    def _kth_largest(self, numbers: Sequence[Array], ks: Array, bits: int) -> Array:
        kind = numbers[0].dtype
        start = jnp.zeros_like(ks, kind)
        enough = lambda bounds: self._counts(numbers, bounds) >= ks
        return largest(enough, start, bits)

    def thresholds(self) -> list[Array]:
        """The keys of the k-th largest scores."""
        keys = self._ranking.key_of(self._kth)
        return list(keys)

    def cuts(self, positions: Callable[[], blocks.Groups], last: int) -> list[Array]:
        """As those of `probes`."""
        (reached,) = self._counts(self._numbers, self._kth[None])
        uncut = jnp.full_like(self._ks, last, jnp.uint32)

        def cut_ties() -> Array:
            next_number = self._kth[None] + 1
            (above,) = self._counts(self._numbers, next_number)
            missing = self._ks - above
            spread = self._layout.spread(self._kth)
            places = self._layout.pack(positions(), last)
            backwards = []  # the first position is the largest number
            for number, own, place in zip(self._numbers, spread, places):
                from_end = last - place.astype(jnp.uint32)
                tied = number == own
                backwards.append(jnp.where(tied, from_end, 0))
            bits = last.bit_length()
            final = self._kth_largest(backwards, missing, bits)
            return last + 1 - final

        some_tied = jnp.any(reached != self._ks)
        ends = lax.cond(some_tied, cut_ties, lambda: uncut)
        kind = position_type(last // 2)
        return list(ends.astype(kind))
