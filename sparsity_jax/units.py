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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import tables, trees
from sparsity_jax.groups import Channels, Group, Member

PyTree = Any
Keep = dict[str, Array]  # bools by name of layer, True = keep
Granularity = Literal["filter", "channel", "weight"]
Sliced = Literal["filter", "channel"]
Members = Literal["all", "kernels", "producers"]
Leaves = Mapping[str, Any]  # arrays by path
Shape = tuple[int, ...]


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
    num = shape
    if axes is not None:
        num = (math.prod(shape[axis] for axis in axes),)
    return Layer(name, num, (part,), (part,))


def of_group(group: Group, leaves: Leaves, members: Members = "all") -> Layer:
    """The coupled channels of a group, in arrays of `leaves`.

    leaves: arrays by plain path, those of the trace or their part `params`. members: of which
    arrays the channels go: of `all`, with norms, biases and the kernels that read them; of
    `kernels`; or of `producers`. Scores are those of the producers, or of all kernels where a group
    has none. Raises ValueError for a group without a kernel among the leaves.
    """
    tables.convert(members, Members, "members")
    located = [(member.role, _part(member, leaves)) for member in group.members]
    found = [(role, part) for role, part in located if part is not None]
    everything = [part for _, part in found]
    producers = [part for role, part in found if role == "producer"]
    # a depthwise kernel may make and read no channels
    weights = [part for role, part in found if role != "other" or _is_matrix(part, leaves)]
    scored = producers or weights
    if not scored:
        raise ValueError(
            f"the group {group.name!r} has no kernel among the params; leave it out of the ratios."
        )
    parts = {"all": everything, "kernels": weights, "producers": scored}[members]
    return Layer(group.name, (group.size,), tuple(parts), tuple(scored))


def _is_matrix(part: Part, leaves: Leaves) -> bool:
    return trees.is_kernel(part.path) and leaves[part.path].ndim > 1


def _part(member: Member, leaves: Leaves) -> Part | None:
    """The member as a part of `leaves`, which may lack the first name of its path; None for running
    statistics.
    """
    for whole in (member.path, member.path.partition("/")[2]):
        path = plain(whole, leaves)
        if path in leaves:
            size = leaves[path].shape[member.axis]
            in_order = np.arange(size)[:, None]
            index = None if np.array_equal(member.index, in_order) else member.index
            return Part(path, (member.axis,), index)
    return None


def plain(path: str, leaves: Leaves) -> str:
    """`path` as it is among the plain ones of `leaves`, if it is."""
    return path if path in leaves else path.removesuffix("/value")


# Arrays and units ---------------------------------------------------------------------------------


def sums(array: Array, part: Part) -> Array:
    """Sum over the entries of each unit: [units]; the array itself where every entry is one."""
    if part.axes is None:
        return array
    others = [axis for axis in range(array.ndim) if axis not in part.axes]
    along = trees.gathered(jnp.sum(array, others)).ravel()
    return along if part.index is None else jnp.sum(along[part.index], 1)


def entries(array: Any, part: Part) -> int:
    """How many entries of an array each unit has."""
    if part.axes is None:
        return 1
    along = math.prod(array.shape[axis] for axis in part.axes)
    copies = 1 if part.index is None else part.index.shape[1]
    return array.size // along * copies


def absolute_sums(leaves: Leaves, layer: Layer) -> Array:
    """L1 norm of each unit's scored entries, in at least float32: [units]."""
    total: Any = 0
    for part in layer.scored:
        magnitudes = jnp.abs(trees.widen(leaves[part.path]))
        total = total + sums(magnitudes, part)
    return total


def entries_left(kept: Leaves, layer: Layer) -> Array:
    """How many scored entries of each unit the masks `kept` leave: int [units]."""
    total: Any = 0
    for part in layer.scored:
        total = total + sums(kept[part.path].astype(jnp.int32), part)
    return total


def spread(values: Array, part: Part, shape: Shape) -> Array:
    """The sum of the `values` of all units that an entry belongs to, for an array of `shape`.

    Of the same rank as the array, of length 1 along axes that the units do not vary along.
    """
    if part.axes is None:
        return values
    sizes = [n if axis in part.axes else 1 for axis, n in enumerate(shape)]
    if part.index is not None:
        along = jnp.zeros(math.prod(sizes), values.dtype)
        values = along.at[part.index].add(values[:, None])
    return values.reshape(sizes)


def spread_mask(keep: Array, part: Part, shape: Shape) -> Array:
    """Bools of `shape`, False where a unit is that `keep` leaves out."""
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


def coupled(
    channels: Channels,
    keep: Leaves,
    granularity: Sliced = "filter",
) -> dict[str, Any]:
    """`keep` by name of the groups that the filters, or input channels, of some kernels are.

    keep: bools [filters or input channels] by path in the traced variables. A channel goes if any
    of the kernels that make (channel: read) it leaves it out.
    """
    found: dict[str, Any] = {}
    for name, member in deciding(channels, granularity):
        several = member.index.shape[1] > 1  # copies, e.g. of a flattened image
        if member.path not in keep or several or member.role == "depthwise":
            continue
        own = keep[member.path][member.index[:, 0]]
        found[name] = found[name] & own if name in found else own
    return found


def deciding(channels: Channels, granularity: Sliced) -> Iterator[tuple[str, Member]]:
    """(name of group, member) of the kernels, also depthwise, that make or read its channels."""
    roles = ("producer", "depthwise") if granularity == "filter" else ("consumer",)
    for name, group in channels.groups.items():
        for member in group.members:
            if member.role in roles:
                yield name, member


def alive(channels: Channels, kept: PyTree) -> dict[str, np.ndarray]:
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
            mask = np.asarray(leaves[member.path])
            slices = np.moveaxis(mask, member.axis, 0)
            flat = slices.reshape(len(slices), -1)
            left = np.any(flat, axis=1)
            lives |= np.any(np.take(left, member.index), axis=1)
        result[name] = lives
    return result
