"""Coupled channels as units: which arrays they are removed from, which kernels decide about them.

layer = coupling.of_group(channels.groups["conv1"], leaves)  # with norms and readers
alive = coupling.alive(channels, {"params": kept})           # bools by group, from masks
"""

import jax.numpy as jnp
import numpy as np

from sparsity_jax import groups, trees
from sparsity_jax.groups import Channels, Group, Member
from sparsity_jax.types import Arrays, Fields, PyTree
from sparsity_jax.units import Layer, Leaves, Part, Sliced

__all__ = [
    "alive",
    "by_group",
    "deciding",
    "is_weight",
    "of_group",
    "of_members",
    "plain",
]


def of_group(group: Group, leaves: Leaves) -> Layer:
    """The coupled channels of a group, in all arrays of `leaves` that they are removed from.

    leaves: arrays by plain path, those of the trace or their part `params`. Scores are those of the
    kernels that make the channels, or of all kernels where none does. Raises ValueError for a group
    without a kernel among the leaves.
    """
    removed = []
    producers = []
    kernels = []
    for member in group.members:
        _, _, inner = member.path.partition("/")
        path = plain(member.path, leaves)
        if path not in leaves:
            path = plain(inner, leaves)
        if path not in leaves:  # running statistics
            continue
        member = member._replace(path=path)
        removed.append(member)
        if member.role == "producer":
            producers.append(member)
        if is_weight(member, leaves):
            kernels.append(member)
    scored = producers or kernels
    if not scored:
        raise ValueError(
            f"the group {group.name!r} has no kernel among the params; leave it out of the ratios."
        )
    return of_members(group, leaves, removed, scored)


def of_members(group: Group, leaves: Leaves, removed: list, scored: list) -> Layer:
    """The channels of a group as units, by the members they are removed from and scored by, whose
    paths are those of `leaves`.
    """

    def part_of(member: Member) -> Part:
        index = member.index
        size = leaves[member.path].shape[member.axis]
        in_order = np.arange(size)[:, None]
        same = np.array_equal(index, in_order)
        axes = (member.axis,)
        return Part(member.path, axes, None if same else index)

    parts = map(part_of, removed)
    scored_parts = map(part_of, scored)
    return Layer(group.name, (group.size,), tuple(parts), tuple(scored_parts))


def plain(path: str, leaves: Leaves) -> str:
    """`path` as it is among the plain ones of `leaves`, if it is."""
    return path if path in leaves else path.removesuffix("/value")


def is_weight(member: Member, leaves: Leaves) -> bool:
    """Whether a member makes or reads channels, or is a matrix called a kernel: a depthwise one may
    do neither.
    """
    rank = jnp.ndim(leaves.get(member.path, 0))
    matrix = trees.is_kernel(member.path) and rank > 1
    return matrix or member.role != "other"


def deciding(channels: Channels, granularity: Sliced) -> groups.Members:
    """(name of group, member) of the kernels, also depthwise, that make or read its channels."""
    roles = ("producer", "depthwise") if granularity == "filter" else ("consumer",)
    members = channels.members
    return [(name, member) for name, member in members if member.role in roles]


def by_group(channels: Channels, keep: Leaves, granularity: Sliced = "filter") -> Fields:
    """`keep` by name of the groups that the filters, or input channels, of some kernels are.

    keep: bools [filters or input channels] by path in the traced variables. A channel goes if any
    of the kernels that make (channel: read) it leaves it out.
    """
    result: Fields = {}
    for name, member in deciding(channels, granularity):
        first, *copies = member.index.T  # copies e.g. of a flattened image
        if member.path in keep and not copies and member.role != "depthwise":
            kept = keep[member.path][first]
            result[name] = result.get(name, True) & kept
    return result


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
            mask = np.asarray(leaves[member.path])
            mask = np.moveaxis(mask, member.axis, 0)
            flat = mask.reshape(len(mask), -1)
            left = np.asarray(flat.any(1))
            entries = left[member.index]
            lives |= entries.any(1)
        result[name] = lives
    return result
