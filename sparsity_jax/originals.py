"""What the five original programs do knowingly wrong, kept so that their numbers can be had back.

Each function names its source and the option that asks for it; by default nothing here is used.
Sources, each with its published code. SFW: Miao et al., Learning Pruning-Friendly Networks via
Frank-Wolfe, ICLR 2022. Flow: Lubana and Dick 2021, arXiv:2009.11839. GReg: Wang et al. 2021,
arXiv:2012.09243. Limit: Zhang et al. 2023, arXiv:2306.05857.

What is no function of its own is a branch where it happens:

- SFW keeps all weights tied with the last one: `count="original"` of `allocate`;
- SFW sends zero gradients to +radius, and small ones to zero: `zero_up`, `zero_below` of
  `polytopes`;
- Flow masks the two sides of a skip connection one by one: `branches=separate` of `groups.trace`;
- Limit sums the norms of the Hessian's rows over batches: `rows=original` of the stage `row_norms`,
  and takes the best of 1,000 ratios for its prediction: `method=grid` of `width.predict`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import tree_map

from sparsity_jax import trees
from sparsity_jax.types import PyTree, Shape

__all__ = [
    "additions",
    "cosine",
    "erk_ratios",
    "floor_of_product",
    "in_place",
    "kept_of_all",
    "kept_of_layer",
    "last_alive",
    "multistep",
    "num_pruned",
    "share_by_shape",
    "square_distances",
    "truncated_density",
]

# Learning rates -----------------------------------------------------------------------------------


def multistep(rate: Array, step: Array, milestones: Sequence[int], gamma: float) -> Array:
    """The rate after `step` iterations: `milestones` count iterations, not epochs, so most fall
    inside the warm-up.

    Limit; the schedule `original_multistep`.
    """
    reached = jnp.sum(step == jnp.asarray(milestones, jnp.int32))
    factor = jnp.asarray(gamma, float) ** reached
    return rate * factor


def cosine(rate: Array, step: Array, learning_rate: float, epochs: int) -> Array:
    """The rate after `step` iterations: a cosine of period 2 * epochs iterations, as a recursion on
    the rate, which after a warm-up is not its own and can exceed `learning_rate` many times.

    Limit; the schedule `original_cosine`. Recursion: PyTorch's CosineAnnealingLR.
    """

    def height(step: Array) -> Array:
        angle = jnp.pi * jnp.asarray(step, float) / epochs
        return 1 + jnp.cos(angle)

    previous = step - 1
    restart = (previous - epochs) % (2 * epochs) == 0  # the previous cosine is zero there
    rise = 1 - math.cos(math.pi / epochs)
    risen = rate + learning_rate * rise / 2
    before = jnp.where(restart, 1, height(previous))
    change = height(step) / before
    followed = change * rate
    return jnp.where(restart, risen, followed)


# Radii -------------------------------------------------------------------------------------------


def share_by_shape(norms: PyTree, params: PyTree, order: Sequence[str] | None) -> PyTree:
    """A norm table keyed by shape, so that a later array of equal shape overwrites an earlier one.
    SFW; `norms="per_shape"` of an optimizer.

    norms: mean norms (0 counts as 1), one per array of `params`.
    order: paths of all arrays in the network's order, see `groups.order_of_use`. Raises ValueError
        for an order that does not name every array once.
    """
    leaves = trees.named_leaves(params)
    by_path = trees.named_leaves(norms)
    order = list(order or ())
    if sorted(order) != sorted(leaves):
        raise ValueError(
            f"order has {len(order)} paths; allowed: each of the {len(leaves)} of params once."
        )
    table = {leaves[path].shape: float(by_path[path]) or 1.0 for path in order}
    return tree_map(lambda leaf: table[leaf.shape], params)


# Numbers of weights -------------------------------------------------------------------------------


def kept_of_all(size: int, ratio: float) -> int:
    """One weight more than nominal: SFW; `count="original"` of the selection `global`."""
    removed = int(ratio * size) - 1
    return size - max(removed, 0)


def kept_of_layer(size: int, ratio: float) -> int:
    """One weight more than nominal: SFW; `count="original"` of the selection `layerwise`."""
    removed = int(ratio * (size - 1))
    return size - removed


def erk_ratios(shapes: Mapping[str, Shape], ratio: float) -> dict[str, float]:
    """What is called ERK there, and is another rule than `shares.erk_ratios`: nearly uniform.

    ratio_l = c s_l with s = 1 - (sum of the kernel's dimensions) / (their product) and c = ratio
    sum(n) / sum(n s), at most 1. Raises ValueError if no kernel is larger than the sum of its
    dimensions. SFW; `layer_ratios="erk_original"`.
    """
    sizes = np.array(list(map(math.prod, shapes.values())))
    dimensions = np.array(list(map(sum, shapes.values())))
    slack = 1 - dimensions / sizes
    weighted = sum((sizes * slack).tolist())
    if weighted <= 0:
        raise ValueError(
            f"erk_original needs kernels larger than the sum of their dimensions: {dict(shapes)}."
        )
    scale = ratio * sizes.sum() / weighted
    ratios = np.clip(scale * slack, 0, 1)
    return dict(zip(shapes, ratios.tolist()))


def square_distances(distances: Any, ratios: np.ndarray) -> np.ndarray:
    """Squares of `width.Distances` at pruning ratios: all up to and including the ceil(p n)-th
    smallest are removed, with those tied with the last, and the network pruned so at ratio 0, which
    has lost its smallest weight, is where they are measured from.

    Limit; `count="original"` of `width.Distances.at`.
    """
    shares = np.append(ratios, 0.0)
    counts = np.ceil(shares * distances.size).astype(int)
    last = np.maximum(counts, 1) - 1
    magnitudes = distances.magnitudes
    removed = np.searchsorted(magnitudes, magnitudes[last], side="right")
    squares = distances.squares[removed]
    differences = squares[:-1] - squares[-1]
    return differences.reshape(ratios.shape)


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
    wanted = math.ceil(ratio * size)
    return min(wanted, size - 1)


def truncated_density(ratios: np.ndarray) -> np.ndarray:
    """Shares left after rounds that remove `ratios`, as whole percentages, truncated every round.

    Ends lower than asked: at 0.18 for 0.75 in 25 rounds. Flow, its ResNets;
    `config.cut.schedule.cumulative=truncated`.
    """
    percent = 100
    densities = []
    for removed in ratios:
        percent = int(percent * (1 - removed))
        densities.append(percent / 100)
    return np.array(densities)


def last_alive(index: np.ndarray) -> np.ndarray:
    """What decides which channels alive no selection removes: not their scores, but their places in
    the layer, the last ones first.

    Flow; `config.cut.protect=original`. With `original_resnet` any may be selected, and then the
    best of a layer that is left below its minimum come back, so that fewer go than asked.
    """
    return index


def in_place(address: str, entry: str) -> bool:
    """Whether `skip` leaves out a layer: as text, so that "3.1" also skips block 3.10.

    In weight pruning of residual networks nothing is skipped, and ranges of layers and skips beyond
    the last layer are ignored. GReg; `config.grow.reading=original`, `config.remove.reading`.
    """
    return address.startswith(entry)


# Growing penalties --------------------------------------------------------------------------------


def additions(
    start: float, increment: float, limit: float, most: int, dtype: str, *, reach: bool
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
    hits = sums >= end if reach else sums > end
    if not hits.any():
        return None
    first = int(np.argmax(hits))
    return first, sums[first]
