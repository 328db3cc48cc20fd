"""Devices with named axes, and how the arrays of a network are divided over them.

Batches are divided over all axes of a mesh. Parameters, and what has their paths and shapes, as
masks, momentum and vectors of curvature do, are divided over the axis `params`.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from sparsity_jax import hosts, tables, trees
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import PyTree, Shape

__all__ = [
    "AXES",
    "RULES",
    "SMALLEST",
    "Division",
    "Rule",
    "check",
    "check_batch",
    "division",
    "fetch",
    "filled_up",
    "largest_axis",
    "make",
    "of_hosts",
    "over_batch",
    "own_rows",
    "put",
    "put_rows",
    "size",
    "structs",
    "whole",
]

AXES = ("data", "params")  # devices along the last one are neighbours
_UNNAMED = ("batch",)  # the axis of a mesh that is no more than a number of devices
SMALLEST = 2**12  # entries of an array that is worth dividing
Rule = Callable[[str, Shape, int], PartitionSpec]


# Devices ------------------------------------------------------------------------------------------


def check(mesh: int | Mapping[str, int]) -> None:
    """Raises ConfigError for a mesh of other axes than `AXES`, or of an axis without devices.

    mesh: as of `make`.
    """
    if isinstance(mesh, int):
        return
    if not mesh:
        raise ConfigError("mesh", mesh, why="without an axis", known=AXES)
    for name, devices in mesh.items():
        if name not in AXES:
            raise ConfigError("mesh", name, verb="has the axis", known=AXES)
        tables.convert(devices, tables.Count, f"mesh.{name}")


def size(mesh: int | Mapping[str, int]) -> int:
    """How many devices a mesh has; 0 for all that there are."""
    if isinstance(mesh, int):
        return mesh
    sizes = [*mesh.values()]
    return int(np.prod(sizes))


def check_batch(field: str, examples: int, mesh: int | Mapping[str, int]) -> None:
    """Raises ConfigError for a batch that a mesh of named axes cannot divide; field: its size."""
    if isinstance(mesh, int):
        return
    devices = size(mesh)
    if examples % devices:
        allowed = f"multiples of {devices}, the devices of config.mesh"
        raise ConfigError(field, examples, allowed=allowed)


def filled_up(examples: int, mesh: Mesh | None) -> int:
    """The size of a batch that holds so many examples: what named axes divide, or as many."""
    if mesh is None or mesh.axis_names == _UNNAMED:
        return examples
    return -(-examples // mesh.size) * mesh.size


def make(mesh: int | Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh | None:
    """The first of `devices` as a mesh.

    mesh: how many, 0 for all, along one axis `batch`, of one device None; or how many along each of
    the named `AXES`, e.g. `dict(data=2, params=4)`. Raises ConfigError for more than there are, and
    as `check`.
    """
    check(mesh)
    number = size(mesh) or len(devices)
    if number > len(devices):
        why = "" if isinstance(mesh, int) else f"{number} devices"
        least = "0 (all)" if isinstance(mesh, int) else "1"
        allowed = f"{least} to {len(devices)}, the local devices"
        raise ConfigError("mesh", mesh, why=why, allowed=allowed)
    used = np.array(devices[:number])
    if isinstance(mesh, int):
        return Mesh(used, _UNNAMED) if number > 1 else None
    names = [name for name in AXES if name in mesh]
    grid = used.reshape([mesh[name] for name in names])
    return Mesh(grid, names)


def of_hosts(mesh: int | Mapping[str, int]) -> Mesh | None:
    """`make` of the local devices; of several processes, an integer counts those of each of them,
    and named axes are over the devices of all.
    """
    if not hosts.several():
        return make(mesh, jax.local_devices())
    if isinstance(mesh, int):
        make(mesh, jax.local_devices())
        return make(0, hosts.devices(mesh))
    devices = hosts.devices(0)
    if size(mesh) != len(devices):
        allowed = f"{len(devices)} in all, those of {hosts.number()} processes"
        raise ConfigError("mesh", dict(mesh), why=f"{size(mesh)} devices", allowed=allowed)
    return make(mesh, devices)


def over_batch(mesh: Mesh) -> NamedSharding:
    """Every device holds its share of the first axis."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def whole(mesh: Mesh | None) -> Sharding:
    """Every device of the mesh holds all; without a mesh the first local device does."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, PartitionSpec())


# Moving arrays ------------------------------------------------------------------------------------


def put(tree: PyTree, shardings: Any) -> PyTree:
    """The arrays of a tree where `shardings` say: one for all, or a tree of them.

    Every one of several processes has the whole arrays, and puts its part.
    """
    if not hosts.several():
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put_part, tree, shardings)


def _put_part(leaf: Any, sharding: Sharding) -> jax.Array:
    """One array of `put`, of several processes; none of them asks the others."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def own_rows(sharding: Sharding, size: int) -> slice:
    """The rows, from the first to the last, of a batch of which devices of this process hold a
    part.
    """
    parts = sharding.addressable_devices_indices_map((size,)).values()
    ends = [part[0].indices(size)[:2] for part in parts if part]
    return slice(min(start for start, _ in ends), max(stop for _, stop in ends))


def put_rows(rows: slice, size: int, sharding: Sharding, arrays: Sequence[Any]) -> list[jax.Array]:
    """Arrays of the `rows` of a batch of `size` as those of the whole batch, divided among
    processes, each of which puts its own rows.
    """

    def placed(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(size)
            return array[start - rows.start : stop - rows.start]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return [placed(array) for array in arrays]


def fetch(tree: PyTree) -> PyTree:
    """The arrays of a tree as whole NumPy arrays on the host; several processes all come by."""
    if not hosts.several():
        return jax.tree.map(np.asarray, jax.device_get(tree))
    return jax.tree.map(_fetched, tree)


def _fetched(leaf: Any) -> np.ndarray:
    """One array of `fetch`, of several processes."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_replicated or leaf.is_fully_addressable):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def structs(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shape structs of the arrays of a tree, which say where those belong; a tree of shardings."""
    struct = lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)
    return jax.tree.map(struct, tree, shardings)


# Dividing parameters ------------------------------------------------------------------------------


def largest_axis(path: str, shape: Shape, devices: int) -> PartitionSpec:
    """Divides the largest axis of an array that so many devices divide, the last of equal ones.

    Arrays below `SMALLEST` entries stay whole, and so do those without an axis that divides evenly.
    """
    del path
    even = [axis for axis, length in enumerate(shape) if length % devices == 0]
    if not even or np.prod(shape) < SMALLEST:
        return PartitionSpec()
    largest = max(even, key=lambda axis: (shape[axis], axis))
    names: list[str | None] = [None] * len(shape)
    names[largest] = "params"
    return PartitionSpec(*names)


RULES: dict[str, Rule] = {"largest_axis": largest_axis}  # by name, for `config.mesh_rule`


class Division(NamedTuple):
    """How the parameters of a network are divided. specs: shape and PartitionSpec of each, by
    path.
    """

    mesh: Mesh
    specs: Mapping[str, tuple[Shape, PartitionSpec]]

    def sharding(self, path: str, shape: Shape) -> NamedSharding:
        """Of an array whose path ends with that of a parameter, and whose shape does with its
        shape: that of the parameter, other axes in front undivided. Other arrays stay whole.
        """
        parts = path.split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            if end not in self.specs:
                continue
            own_shape, spec = self.specs[end]
            leading = len(shape) - len(own_shape)
            if shape[leading:] == own_shape:
                return NamedSharding(self.mesh, PartitionSpec(*[None] * leading, *spec))
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: PyTree) -> PyTree:
        """`sharding` of every array, or shape struct, of a tree."""
        return trees.map_named(lambda path, leaf: self.sharding(path, leaf.shape), tree)

    def kept(self, tree: PyTree) -> PyTree:
        """The arrays of a tree, inside a program, which leaves them divided so."""
        return lax.with_sharding_constraint(tree, self.shardings(tree))

    def gathering(self, function: Callable) -> Callable:
        """`function(tree, *arguments)`, a network's for instance, of arrays that are divided.

        Inside a program each array is gathered where it is used, once more for derivatives, and
        forgotten in between; its gradient comes back divided.
        """

        def of_whole(tree: PyTree, *arguments: Any) -> Any:
            whole = trees.map_named(self._gathered, tree)
            return function(whole, *arguments)

        return jax.checkpoint(of_whole, policy=_remembered)

    def _gathered(self, path: str, array: Array) -> Array:
        own = self.sharding(path, array.shape)
        if not any(own.spec):
            return array
        return _gather(own, array)


def _remembered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether derivatives may use what the operation gave, and need not compute it again."""
    return primitive.name != "sharding_constraint"


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gather(divided: NamedSharding, array: Array) -> Array:
    """`array` whole on every device. Of its gradient each device sums its own part alone."""
    return lax.with_sharding_constraint(array, divided.update(spec=PartitionSpec()))


@_gather.defjvp
def _derivative_of_gather(divided: NamedSharding, primals: tuple, tangents: tuple) -> tuple:
    (array,), (change,) = primals, tangents
    everywhere = lax.with_sharding_constraint(array, divided.update(spec=PartitionSpec()))
    return everywhere, lax.with_sharding_constraint(change, divided)


def division(params: PyTree, mesh: Mesh, rule: Rule) -> Division:
    """How `rule` divides `params`, arrays or shape structs.

    rule: `rule(path, shape, devices)` gives the PartitionSpec of a parameter, devices: those along
    the axis `params`. Raises ConfigError for a rule that does not fit the mesh or a shape.
    """
    devices = mesh.shape.get("params", 1)
    specs = {}
    for path, leaf in trees.named_leaves(params).items():
        spec = rule(path, leaf.shape, devices)
        _check_spec(spec, path, leaf.shape, mesh)
        specs[path] = (leaf.shape, spec)
    return Division(mesh, specs)


def _check_spec(spec: Any, path: str, shape: Shape, mesh: Mesh) -> None:
    """Raises ConfigError unless `spec` divides an array of that shape."""
    if isinstance(spec, PartitionSpec) and len(spec) <= len(shape):
        with contextlib.suppress(ValueError):
            NamedSharding(mesh, spec).shard_shape(shape)
            return
    axes = ", ".join(mesh.axis_names)
    allowed = f"a PartitionSpec of {axes} that divides the shape"
    raise ConfigError("", spec, why=f"for {path!r} of shape {shape}", allowed=allowed)
