"""What can be removed from a network: weights, slices of kernels, channels with what is coupled.

    layer = units.of_kernel("conv1", "conv1/kernel", (3, 3, 16, 64), (3,))  # 64 filters
    layer = units.of_group(channels.groups["conv1"], leaves)  # channels, with norms and readers
    norms = units.absolute_sums(leaves, layer)                # scores: L1 norms [64]
    mask = units.spread_mask(keep, part, shape)               # False where a filter is gone

A unit is kept or removed as one, and a `Layer` is a set of units that are compared with each other.
Whatever removes (`allocate`, `budgets`, `growing`) takes one path: units, a score of each, how many
are left of a layer, by one named rule of `masks.ROUNDINGS`, then masks. On this path

- every layer keeps at least one unit. `budgets` and `masks.num_pruned` see to it, `allocate` for
  selection `structured`, and `groups.complete` refuses an emptied group;
- with the channels known (`groups.trace`), the scale, shift and statistics of the norm behind a
  removed filter go with it, and so do its bias, a depthwise kernel that it feeds and the weights
  that read it. So the outputs are those of the network without the filter. From parameters alone
  nobody knows which norm that is: then it still sends its shift on.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import tables, trees
from sparsity_jax.groups import Channels, Group, Member
from sparsity_jax.types import Arrays, PyTree, Shape

Keep = dict[str, Array]  # bools by name of layer, True = keep
Granularity = Literal["filter", "channel", "weight"]
Sliced = Literal["filter", "channel"]
Members = Literal["all", "kernels", "producers"]
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
        if self.index.max(initial=-1) >= positions:
            return ()
        return (len(self.index),)

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
        return math.prod(self.shape)

    @property
    def of_weights(self) -> bool:
        return self.scored[0].axes is None


Parts = dict[str, list[tuple[str, Part]]]  # with the name of the layer, by path of the array


def of_kernel(name: str, path: str, shape: Shape, axes: Shape | None) -> Layer:
    """The slices of one array along `axes`, or all its entries. shape: of the array."""
    part = Part(path, axes)
    return Layer(name, part.units(shape), (part,), (part,))


def of_group(group: Group, leaves: Leaves, members: Members = "all") -> Layer:
    """The coupled channels of a group, in arrays of `leaves`.

    leaves: arrays by plain path, those of the trace or their part `params`. members: of which
    arrays the channels go: of `all`, with norms, biases and the kernels that read them; of
    `kernels`; or of `producers`. Scores are those of the producers, or of all kernels where a group
    has none. Raises ValueError for a group without a kernel among the leaves.
    """
    tables.convert(members, Members, "members")
    everything = []
    weights = []
    producers = []
    for member in group.members:
        part = _part(member, leaves)
        if part is None:  # running statistics
            continue
        everything.append(part)
        if member.role == "producer":
            producers.append(part)
        # a depthwise kernel may make and read no channels
        if member.role != "other" or is_matrix(part.path, leaves):
            weights.append(part)
    scored = producers or weights
    if not scored:
        raise ValueError(
            f"the group {group.name!r} has no kernel among the params; leave it out of the ratios."
        )
    parts = {"all": everything, "kernels": weights, "producers": scored}[members]
    return Layer(group.name, (group.size,), tuple(parts), tuple(scored))


def _part(member: Member, leaves: Leaves) -> Part | None:
    """The member as a part of `leaves`, which may lack the first name of its path, or lack it."""
    for whole in (member.path, member.path.partition("/")[2]):
        path = plain(whole, leaves)
        if path in leaves:
            in_order = np.arange(leaves[path].shape[member.axis])[:, None]
            index = None if np.array_equal(member.index, in_order) else member.index
            return Part(path, (member.axis,), index)
    return None


def is_matrix(path: str, leaves: Leaves) -> bool:
    """Whether an array is called a kernel and has two axes or more."""
    return trees.is_kernel(path) and jnp.ndim(leaves.get(path, 0)) > 1


def plain(path: str, leaves: Leaves) -> str:
    """`path` as it is among the plain ones of `leaves`, if it is."""
    return path if path in leaves else path.removesuffix("/value")


# Arrays and units ---------------------------------------------------------------------------------


def _sums(array: Array, part: Part) -> Array:
    """Sum over the entries of each unit: [units]; the array itself where every entry is one."""
    if part.axes is None:
        return array
    others = [axis for axis in range(array.ndim) if axis not in part.axes]
    along = trees.gathered(jnp.sum(array, others)).ravel()
    return along if part.index is None else jnp.sum(along[part.index], 1)


def _scored_sums(function: Callable, leaves: Leaves, layer: Layer) -> Array:
    """Sum of `function(array)` over the scored entries of each unit."""
    total: Any = 0
    for part in layer.scored:
        total = total + _sums(function(leaves[part.path]), part)
    return total


def absolute_sums(leaves: Leaves, layer: Layer) -> Array:
    """L1 norm of each unit's scored entries, in at least float32: [units]."""
    return _scored_sums(lambda leaf: jnp.abs(trees.widen(leaf)), leaves, layer)


def entries_left(kept: Leaves, layer: Layer) -> Array:
    """How many scored entries of each unit the masks `kept` leave: int [units]."""
    return _scored_sums(lambda mask: mask.astype(jnp.int32), kept, layer)


def entries(leaves: Leaves, layer: Layer) -> int:
    """How many scored entries each unit has."""
    return sum(part.entries(leaves[part.path].shape) for part in layer.scored)


def mean_magnitudes(leaves: Leaves, layer: Layer) -> Array:
    """Mean of the magnitudes of each unit's scored entries: [units]."""
    return absolute_sums(leaves, layer) / entries(leaves, layer)


def spread(values: Array, part: Part, shape: Shape) -> Array:
    """The sum of the `values` of all units that an entry belongs to, for an array of `shape`.

    Of the same rank as the array, of length 1 along axes that the units do not vary along.
    """
    if part.axes is None:
        return values
    if part.index is not None:
        along = jnp.zeros(part.positions(shape), values.dtype)
        values = along.at[part.index].add(values[:, None])
    return values.reshape([n if axis in part.axes else 1 for axis, n in enumerate(shape)])


def spread_mask(keep: Array, part: Part, shape: Shape) -> Array:
    """Bools of `shape`, False where a unit is that `keep` leaves out."""
    if part.axes is None:
        return keep
    removed = spread((~keep).astype(jnp.int32), part, shape)
    return jnp.broadcast_to(removed == 0, shape)


def parts_by_path(layers: Iterable[Layer]) -> Parts:
    """(name of layer, part) of all that is removed from each array."""
    result: Parts = {}
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


# Channels of layers -------------------------------------------------------------------------------


def coupled(channels: Channels, keep: Leaves, granularity: Sliced = "filter") -> dict[str, Any]:
    """`keep` by name of the groups that the filters, or input channels, of some kernels are.

    keep: bools [filters or input channels] by path in the traced variables. A channel goes if any
    of the kernels that make (channel: read) it leaves it out.
    """
    by_group: dict[str, Any] = {}
    for name, member in deciding(channels, granularity):
        several = member.index.shape[1] > 1  # copies, e.g. of a flattened image
        if member.path in keep and not several and member.role != "depthwise":
            kept = keep[member.path][member.index[:, 0]]
            by_group[name] = by_group.get(name, True) & kept
    return by_group


def deciding(channels: Channels, granularity: Sliced) -> Iterator[tuple[str, Member]]:
    """(name of group, member) of the kernels, also depthwise, that make or read its channels."""
    roles = ("producer", "depthwise") if granularity == "filter" else ("consumer",)
    for name, group in channels.groups.items():
        for member in group.members:
            if member.role in roles:
                yield name, member


def alive(channels: Channels, kept: PyTree) -> Arrays:
    """Channels that some array which makes them still has, bool by name of group, on the host.

    kept: masks in the structure of the variables, or of some of them.
    """
    leaves = trees.named_leaves(kept)
    result = {}
    for name, group in channels.groups.items():
        members = [member for member in group.members if member.path in leaves]
        makers = [member for member in members if member.role != "consumer"]
        lives = np.zeros(group.size, bool)
        for member in makers or members:
            slices = np.moveaxis(np.asarray(leaves[member.path]), member.axis, 0)
            left = np.any(slices.reshape(len(slices), -1), axis=1)
            lives |= np.take(left, member.index).any(1)
        result[name] = lives
    return result
