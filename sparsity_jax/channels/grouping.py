"""Groups of a walked program: channels that are entries of the same axes, each with all of them."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparsity_jax import trees
from sparsity_jax.channels import kinds
from sparsity_jax.channels.labels import FROZEN
from sparsity_jax.channels.values import Place, Value, fixed
from sparsity_jax.channels.walk import Frozen, Walk

__all__ = ["Group", "Groups", "Inputs", "Member", "find", "left_over"]

_ROLES = ("producer", "depthwise", "consumer", "other")  # a group is named after the first


class Member(NamedTuple):
    """One axis of one array of the variables, and where on it each channel of a group is."""

    path: str  # e.g. params/conv1/kernel
    axis: int
    index: np.ndarray  # type: ignore[assignment]  # int [channels, copies]
    # producer: a kernel's outputs; consumer: its inputs; depthwise: both; other: biases, norms
    role: str
    # a consumer of what is not zero where other members are, e.g. behind a sigmoid
    exposed: bool = False
    # of a vector: `scale` if channels are multiplied by it, as in a norm, `shift` if it is added
    term: str = ""


class Group(NamedTuple):
    """Channels that can be removed, each with all its members."""

    name: str
    size: int
    members: tuple[Member, ...]
    labels: np.ndarray  # int [size], of the channels in the walked program
    zeroed: bool = False  # removed entries are zero in sums only if `groups.masked` makes them so
    kind: str = ""  # what its channels are: heads, hidden units, ... (`kinds`)


Groups = dict[str, Group]
Inputs = Mapping[str, Value]  # what a walk knows of each variable, by path


class _Entries(NamedTuple):
    """What dies with each simple label: entries of rows of labels, one row for all axes that lose
    the same entries.

    In the order in which the labels first occur, the entries of each in that of rows.
    """

    places: list[list[Place]]  # the axes that have each row
    labels: np.ndarray
    rows: np.ndarray
    positions: np.ndarray  # on the axes


def find(walk: Walk, inputs: Inputs, used: Sequence[str]) -> Groups:
    """The groups, by name; they and their members are in the order in which the program uses them.

    used: paths of the inputs that the program uses, in order.
    """
    in_order = dict.fromkeys((*used, *inputs))
    ranks = {path: number for number, path in enumerate(in_order)}
    rank = lambda place: (ranks[place[0]], place[1])
    entries = _entries(walk, rank)
    zeroed = walk.needing_zeros()
    paths = {path: number for number, path in enumerate(inputs)}
    groups: Groups = {}
    for labels, indices in _alike(walk, entries):
        members = tuple(_member(walk, place, indices[place]) for place in sorted(indices, key=rank))
        is_used = any(member.path in used for member in members)
        if len(labels) < 2 or not is_used:
            continue
        names = _names(members, paths)
        name = next(name for name in names if name not in groups)
        needs_zeros = np.isin(labels, zeroed).any()
        groups[name] = Group(name, len(labels), members, labels, bool(needs_zeros))
    labels_of = {name: group.labels for name, group in groups.items()}
    counts = {name: len(group.members) for name, group in groups.items()}
    told = kinds.of_groups(walk, labels_of, counts)
    for name, kind in told.items():
        groups[name] = groups[name]._replace(kind=kind)
    return groups


def _member(walk: Walk, place: Place, index: np.ndarray) -> Member:
    path, axis = place
    return Member(
        path,
        axis,
        index,
        role=walk.roles.get(place, "other"),
        exposed=place in walk.exposed,
        term=walk.terms.get(place, ""),
    )


def _alike(walk: Walk, entries: _Entries) -> Iterator[tuple]:
    """(labels, positions of their entries by place) of labels that are of one axis and have entries
    in the same rows."""
    numbers = entries.rows
    starts = np.flatnonzero(np.diff(entries.labels, prepend=FROZEN))
    sizes = np.diff(starts, append=len(numbers))
    axes = walk.labels.axis_of(entries.labels[starts])
    alike: dict = collections.defaultdict(list)
    for run in _runs(numbers, starts, sizes, axes):
        first = run[0]
        copies = numbers[starts[first] :][: sizes[first]]
        same = alike[copies.tobytes(), axes[first]]
        same.extend(starts[run].tolist())
    for (buffer, _), found in alike.items():
        copies = np.frombuffer(buffer, numbers.dtype)
        own, bounds = np.unique(copies, return_index=True)
        firsts = np.array(found)
        each = np.arange(len(copies))
        which = np.add.outer(firsts, each)
        positions = entries.positions[which]
        indices: dict[Place, np.ndarray] = {}
        for row, index in zip(own, np.split(positions, bounds[1:], 1)):
            indices |= dict.fromkeys(entries.places[row], index)
        yield entries.labels[firsts], indices


def _runs(
    numbers: np.ndarray, starts: np.ndarray, sizes: np.ndarray, axes: np.ndarray
) -> Iterable[np.ndarray]:
    """Neighbours among labels that are of one axis and have entries in the same rows."""
    before = np.arange(len(numbers)) - np.repeat(sizes, sizes)  # the same entry of the one before
    same = np.logical_and.reduceat(numbers == numbers[before], starts)
    same &= np.diff(sizes, prepend=0) == 0
    same &= np.diff(axes, prepend=-1) == 0
    runs = np.split(np.arange(len(starts)), np.flatnonzero(~same))
    return filter(len, runs)


def _entries(walk: Walk, rank: Callable) -> _Entries:
    """rank: what axes are in order of."""
    shared = sorted(walk.shared, key=lambda item: min(map(rank, item[1])))
    rows = [row for row, _ in shared]
    places = [places for _, places in shared]
    sizes = list(map(len, rows))
    starts = np.cumsum([0, *sizes[:-1]])
    numbers = np.repeat(np.arange(len(rows)), sizes)
    positions = np.arange(len(numbers))
    positions -= np.repeat(starts, sizes)
    found = walk.labels.find(np.concatenate([fixed(0), *rows]))
    live = np.flatnonzero(found)
    parts = walk.labels.parts(found[live])
    which, column = np.nonzero(parts)
    simple = parts[which, column]
    backwards = np.arange(len(simple))[::-1]
    first = np.zeros(walk.labels.num, int)  # of all assignments the last counts
    backward_labels = simple[backwards]
    first[backward_labels] = backwards
    order = np.argsort(first[simple], kind="stable")
    at = live[which[order]]
    return _Entries(places, simple[order], numbers[at], positions[at])


def _names(members: Sequence[Member], paths: Mapping[str, int]) -> Iterator[str]:
    """Path of the first array that makes the channels, without `kernel`, and longer names.

    paths: of all variables, with their numbers.
    """

    def rank(member: Member) -> tuple:
        return _ROLES.index(member.role), paths[member.path]

    first = min(members, key=rank)
    name = first.path
    own = trees.last_name(name)
    module, _, layer = name.rpartition(f"/{own}")
    if module and trees.is_kernel(name):
        name = module + layer.removeprefix("/value")
    yield name
    yield f"{name}[{first.axis}]"
    for number in itertools.count(2):
        yield f"{name}[{first.axis}].{number}"


def left_over(walk: Walk, inputs: Inputs, used: Sequence[str], groups: Groups) -> list[Frozen]:
    """The axes that nothing froze but that are in no group."""
    grouped = set()
    for group in groups.values():
        for member in group.members:
            grouped.add((member.path, member.axis))
    left = collections.defaultdict(list)
    for path, value in inputs.items():
        reason = "could lose one channel only" if path in used else "is not used"
        for a, axis in enumerate(value.axes):
            if (path, a) not in grouped and walk.labels.is_live(axis.labels):
                left[reason].append((path, a))
    events = []
    for reason, places in left.items():
        event = Frozen(reason, "trace", "", places)
        events.append(event)
    return events
