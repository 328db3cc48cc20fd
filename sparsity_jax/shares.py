"""How a pruning ratio is shared among layers, and how many units each of them keeps."""

import fractions
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from sparsity_jax import masks, originals
from sparsity_jax.types import Shape

__all__ = [
    "LAYER_RATIOS",
    "LayerRatios",
    "Ratios",
    "Shapes",
    "Sizes",
    "erk_ratios",
    "kept_of_layers",
]

LayerRatios = Literal["uniform", "erk", "erk_original"]
Shapes = Mapping[str, Shape]
Sizes = Mapping[str, int]
Ratios = dict[str, float]


def erk_ratios(shapes: Shapes, ratio: float) -> Ratios:
    """Share to remove from each kernel so that `ratio` of all weights goes (Erdos-Renyi-Kernel).

    The density of a kernel is proportional to (sum of its dimensions) / (their product). Kernels
    that this would fill more than whole stay dense, and the others share the rest. Source: Evci et
    al. 2020, arXiv:1911.11134.
    """
    sizes = np.array(list(map(math.prod, shapes.values())))
    dimensions = np.array(list(map(sum, shapes.values())))
    raw = dimensions / sizes
    weighted = raw * sizes
    budget = (1 - ratio) * sizes.sum()
    dense = np.zeros(len(sizes), bool)
    while True:
        left = budget - sizes[dense].sum()
        scale = 0.0 if dense.all() else left / sum(weighted[~dense].tolist())
        full = ~dense & (scale * raw > 1 - 1e-12)
        if not full.any():
            break
        dense |= full
    shares = np.where(dense, 0.0, 1 - scale * raw)
    return dict(zip(shapes, shares.tolist()))


# (shapes, ratio) -> share to remove from each kernel
LAYER_RATIOS: dict[str, Callable] = {
    "uniform": dict.fromkeys,
    "erk": erk_ratios,
    "erk_original": originals.erk_ratios,
}


def _largest_remainders(sizes: Sizes, ratios: Ratios) -> Sizes:
    """How many of each layer's `sizes` stay, so that together as many go as `ratios` ask for,
    rounded once.

    Every layer loses its share rounded down, and those with the largest remainders one more; equal
    ones in order.
    """
    shares = {}
    for name, size in sizes.items():
        ratio = fractions.Fraction(str(ratios[name]))
        shares[name] = size * ratio
    removed = {name: math.floor(share) for name, share in shares.items()}
    wanted = round(sum(shares.values()))
    missing = wanted - sum(removed.values())
    by_remainder = sorted(shares, key=lambda name: removed[name] - shares[name])
    for name in by_remainder[:missing]:
        removed[name] += 1
    return {name: size - removed[name] for name, size in sizes.items()}


def kept_of_layers(
    sizes: Sizes, shapes: Shapes, ratio: float, *, layer_ratios: LayerRatios, count: str
) -> Sizes:
    """How many of each layer's `sizes` stay; options: those of `allocate.keep_counts`."""
    ratios = LAYER_RATIOS[layer_ratios](shapes, ratio)
    if count == "nearest" and layer_ratios != "erk_original":
        return _largest_remainders(sizes, ratios)
    kept_of = _nearest
    if count == "original":
        kept_of = originals.kept_of_layer
    return {name: kept_of(size, ratios[name]) for name, size in sizes.items()}


def _nearest(size: int, ratio: float) -> int:
    return size - masks.count_of(ratio, size)
