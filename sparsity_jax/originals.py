"""What the five original programs do knowingly wrong, kept so that their numbers can be had back.

Each function names its source and the option that asks for it; by default nothing here is used.

SFW: Miao et al. 2022, "Learning Pruning-Friendly Networks via Frank-Wolfe" (ICLR). Flow: Lubana and
Dick 2021, arXiv:2009.11839. GReg: Wang et al. 2021, arXiv:2012.09243. Limit: Zhang et al. 2023,
arXiv:2306.05857.
"""

import math

import numpy as np

# Numbers of channels ------------------------------------------------------------------------------


def floor_of_product(share: float, total: int) -> int:
    """`share` of `total` as the floating-point product says, rounded down: 0.29 of 100 are 28.

    Flow; `config.cut.protect=original` or `original_resnet`.
    """
    return int(share * total)


def num_pruned(ratio: float, size: int) -> int:
    """`masks.num_pruned` of the floating-point product: of 25 the share 0.28 are 8, not 7.

    GReg; no option.
    """
    return min(math.ceil(ratio * size), size - 1)


def truncated_density(ratios: np.ndarray) -> np.ndarray:
    """Shares left after rounds that remove `ratios`, as whole percentages, truncated every round.

    Ends lower than asked: at 0.18 for 0.75 in 25 rounds. Flow, its ResNets;
    `config.cut.schedule.cumulative=truncated`.
    """
    percent, densities = 100, []
    for removed in ratios:
        percent = int(percent * (1 - removed))
        densities.append(percent / 100)
    return np.array(densities)


def last_alive(scores: np.ndarray, alive: np.ndarray, count: int) -> np.ndarray:
    """Positions of the channels that no selection removes: not the best, but the last `count`.

    Flow; `config.cut.protect=original`. With `original_resnet` any may be selected, and then the
    best of a layer that is left below its minimum come back, so that fewer go than asked.
    """
    del scores
    return np.flatnonzero(alive)[-count:]


def in_place(address: str, entry: str) -> bool:
    """Whether `skip` leaves out a layer: as text, so that "3.1" also skips block 3.10.

    In weight pruning of residual networks nothing is skipped, and ranges of layers and skips beyond
    the last layer are ignored. GReg; `config.grow.reading=original`, `config.remove.reading`.
    """
    return address.startswith(entry)


# Growing penalties --------------------------------------------------------------------------------


def additions(
    start: float,
    increment: float,
    limit: float,
    most: int,
    dtype: str,
    *,
    reach: bool,
) -> tuple[int, float] | None:
    """(number of `increment`s added to `start`, their sum) once the sum in `dtype` exceeds `limit`,
    or reaches it if `reach`; None if `most` are too few.

    Limits lie on the grid of increments, so rounding decides: 10,000 to exceed 1.0 in steps of 1e-4
    in float32, 10,001 in float64 and exactly; 1,001 to reach 1e-2 in steps of 1e-5 in either, 1,000
    exactly. GReg; `config.grow.counting=float32` or `float64`.
    """
    terms = np.full(most, increment, dtype)
    terms[0] = start
    sums = np.add.accumulate(terms)
    end = sums.dtype.type(limit)
    hits = np.flatnonzero(sums >= end if reach else sums > end)
    if not hits.size:
        return None
    first = int(hits[0])
    return first, sums[first]
