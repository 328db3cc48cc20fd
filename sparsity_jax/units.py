"""What can be removed from a network, as units: weights, slices of kernels, coupled channels.

    layer = units.of_kernel("conv1", "conv1/kernel", (3, 3, 16, 64), (3,))  # 64 filters
    norms = units.absolute_sums(leaves, layer)                # scores: L1 norms [64]
    mask = units.spread_mask(keep, part, shape)               # False where a filter is gone

A unit is kept or removed as one, and a `Layer` is a set of units that are compared with each other.
Whatever removes (`allocate`, `budgets`, `growing`) takes one path: units, a score of each, how many
are left of a layer, by one named rule of `masks.ROUNDINGS`, then masks. On this path

- every layer keeps at least one unit. `budgets` and `masks.num_pruned` see to it, `allocate` for
  selection `structured`, and `groups.complete` refuses an emptied group;
- with the channels known (`groups.trace`, see `coupling`), the scale, shift and statistics of the
  norm behind a removed filter go with it, and so do its bias, a depthwise kernel that it feeds and
  the weights that read it. So the outputs are those of the network without the filter. From
  parameters alone nobody knows which norm that is: then it still sends its shift on.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import trees
from sparsity_jax.types import PyTree, Shape

__all__ = [
    "Granularity",
    "Keep",
    "Layer",
    "Leaves",
    "Part",
    "Sliced",
    "absolute_sums",
    "entries",
    "entries_left",
    "mean_magnitudes",
    "of_kernel",
    "parts_by_path",
    "spread",
    "spread_mask",
    "without",
]

Keep = dict[str, Array]  # bools by name of layer, True = keep
Granularity = Literal["filter", "channel", "weight"]
Sliced = Literal["filter", "channel"]
Leaves = Mapping[str, Any]  # arrays by path


class Part(NamedTuple):
    """Where the units of a layer are in one array: along `axes`; if these are None, every entry is
    a unit.

    path: a plain one, see `trees.plain_path`.
    index: int [units, copies], the positions of every unit along `axes` flattened; None: unit i is
        at position i.
    """

    path: str
    axes: Shape | None
    index: np.ndarray | None = None  # type: ignore[assignment]  # tuples have a method `index`

    def positions(self, shape: Shape) -> int:
        """How many positions an array of `shape` has along `axes`."""
        axes = self.axes or ()
        return math.prod(size for axis, size in enumerate(shape) if axis in axes)

    def units(self, shape: Shape) -> Shape:
        """Shape of one bool per unit in an array of `shape`; () where it lacks positions."""
        if self.axes is None:
            return shape
        positions = self.positions(shape)
        if self.index is None:
            return (positions,)
        lacking = self.index.max(initial=-1) >= positions
        return () if lacking else (len(self.index),)

    def entries(self, shape: Shape) -> int:
        """How many entries of an array of `shape` each unit has."""
        if self.axes is None:
            return 1
        copies = 1 if self.index is None else self.index.shape[1]
        return math.prod(shape) // self.positions(shape) * copies


class Layer(NamedTuple):
    """Units that are compared with each other.

    shape: of one bool per unit. parts: all that is removed with them. scored: the arrays that their
    scores are read from. num_pruned: how many go; None where the scores decide, or counts given
    elsewhere.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    scored: tuple[Part, ...]
    num_pruned: int | None = None

    @property
    def size(self) -> int:
        """Number of units."""
        return math.prod(self.shape)

    @property
    def of_weights(self) -> bool:
        """Whether its units are single weights."""
        return self.scored[0].axes is None


def of_kernel(name: str, path: str, shape: Shape, axes: Shape | None) -> Layer:
    """The slices of one array along `axes`, or all its entries. shape: of the array."""
    part = Part(path, axes)
    return Layer(name, part.units(shape), (part,), (part,))


# From arrays to units -----------------------------------------------------------------------------


def _sums(function: Callable, leaves: Leaves, layer: Layer) -> Array:
    """Sum of `function(array)` over the scored entries of each unit, in the shape of the layer."""
    total: Any = 0
    for part in layer.scored:
        values = function(leaves[part.path])
        if part.axes is not None:
            others = np.delete(range(values.ndim), part.axes)
            sums = jnp.sum(values, tuple(others))
            values = trees.gathered(sums).ravel()
        if part.index is not None:
            values = jnp.sum(values[part.index], 1)
        total = total + values
    return total


def absolute_sums(leaves: Leaves, layer: Layer) -> Array:
    """L1 norm of each unit's scored entries, in at least float32: [units]."""
    return _sums(lambda leaf: jnp.abs(trees.widen(leaf)), leaves, layer)


def entries_left(kept: Leaves, layer: Layer) -> Array:
    """How many scored entries of each unit the masks `kept` leave: int [units]."""
    return _sums(lambda mask: mask.astype(jnp.int32), kept, layer)


def entries(leaves: Leaves, layer: Layer) -> int:
    """How many scored entries each unit has."""
    return sum(part.entries(leaves[part.path].shape) for part in layer.scored)


def mean_magnitudes(leaves: Leaves, layer: Layer) -> Array:
    """Mean of the magnitudes of each unit's scored entries: [units]."""
    return absolute_sums(leaves, layer) / entries(leaves, layer)


# From units to arrays -----------------------------------------------------------------------------


def spread(values: Array, part: Part, shape: Shape) -> Array:
    """The sum of the `values` of all units that an entry belongs to, for an array of `shape`.

    Of the same rank as the array, of length 1 along axes that the units do not vary along.
    """
    if part.axes is None:
        return values
    values = trees.gathered(values)
    if part.index is not None:
        along = jnp.zeros(part.positions(shape), values.dtype)
        values = along.at[part.index].add(values[:, None])
    sizes = [n if axis in part.axes else 1 for axis, n in enumerate(shape)]
    return values.reshape(sizes)


def spread_mask(keep: Array, part: Part, shape: Shape) -> Array:
    """Bools of `shape`, False where a unit is that `keep` leaves out."""
    if part.axes is None:
        return keep
    removed = spread((~keep).astype(jnp.int32), part, shape)
    return jnp.broadcast_to(removed == 0, shape)


def parts_by_path(layers: Iterable[Layer]) -> dict[str, list]:
    """(name of layer, part) of all that is removed from each array."""
    result: dict = {}
    for layer in layers:
        for part in layer.parts:
            result.setdefault(part.path, []).append((layer.name, part))
    return result


def without(kept: PyTree, layers: Iterable[Layer], keep: Leaves) -> PyTree:
    """The masks `kept` without the units that `keep` (by name of layer) leaves out."""
    parts = parts_by_path(layer for layer in layers if layer.name in keep)

    def cut(path: str, mask: Array) -> Array:
        for name, part in parts.get(path, []):
            mask = mask & spread_mask(keep[name], part, mask.shape)
        return mask

    return trees.map_named(cut, kept)
