"""Arrays of a checkpoint of whatever state, in nested dicts or by path, on one local device."""

from contextlib import closing
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import Array, ShapeDtypeStruct

from sparsity_jax.checkpoint import reading, restore
from sparsity_jax.trees import named_leaves
from sparsity_jax.types import PyTree, Shape
from sparsity_jax.workdirs import STATE, Snapshot

__all__ = ["arrays", "shapes", "structs", "tree"]


def structs(snapshot: Snapshot, sharding: Any = None) -> PyTree:
    """Shape structs of the state's arrays, in nested dicts. sharding: of all of them, by default on
    one local device.
    """
    place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    struct = lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    with reading(snapshot), closing(ocp.StandardCheckpointHandler()) as reader:
        return jax.tree.map(struct, reader.metadata(snapshot.folder / STATE).tree)


def shapes(snapshot: Snapshot) -> dict[str, Shape]:
    """Shapes of the state's arrays, by path."""
    return {path: leaf.shape for path, leaf in named_leaves(structs(snapshot)).items()}


def tree(snapshot: Snapshot) -> PyTree:
    """The state as nested dicts."""
    return restore(snapshot, structs(snapshot))


def arrays(snapshot: Snapshot) -> dict[str, Array]:
    """The state's arrays by path."""
    return named_leaves(tree(snapshot))
