"""How many entries, filters or channels a decimal share is."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

__all__ = ["ROUNDINGS", "Rounding", "count_of", "num_pruned"]

Rounding = Literal["floor", "nearest", "ceil"]
ROUNDINGS: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "nearest": round,  # a half to even
    "ceil": math.ceil,
}


def count_of(share: float, total: int, *, rounding: Rounding = "nearest") -> int:
    """`share` of `total` things, where a decimal share means what it says: 0.29 of 100 are 29 by
    `floor`, not 28.

    share: on the host. A product within rounding errors (of a few units in the last place) of a
    whole or a half counts as that. rounding: a row of ROUNDINGS.
    """
    decimal = float(str(share))  # of a float32, not the nearest binary fraction
    product = decimal * total
    halves = round(2 * product)
    if math.isclose(2 * product, halves, rel_tol=8 * np.finfo(float).eps):
        product = halves / 2
    return ROUNDINGS[rounding](product)


def num_pruned(ratio: float, size: int) -> int:
    """How many of a layer's `size` filters, channels or weights go: min(ceil(ratio * size), size -
    1), where 0.28 of 25 are 7. `originals.num_pruned` is the published code's.
    """
    wanted = count_of(ratio, size, rounding="ceil")
    return min(wanted, size - 1)
