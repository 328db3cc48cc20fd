"""Groups of a walked program: channels that are entries of the same axes, each with all of them."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """What dies with each simple label: a row of each array for each entry.

    In the order in which the labels first occur, the entries of each in that of places.
    """

    places: list[Place]  # axes of variables
    labels: np.ndarray
    numbers: np.ndarray  # of places
    positions: np.ndarray  # there


def find(walk: Walk, inputs: Inputs, used: Sequence[str]) -> Groups:
    """The groups, by name; they and their members are in the order in which the program uses them.

    used: paths of the inputs that the program uses, in order.
    """
    entries = _entries(walk, inputs, used)
    zeroed = walk.needing_zeros()
    paths = {path: number for number, path in enumerate(inputs)}
    groups: Groups = {}
    for own, rows, indices in _alike(walk, entries):
        places = [entries.places[number] for number in own]
        is_used = any(path in used for path, _ in places)
        if len(rows) < 2 or not is_used:
            continue
        members = tuple(map(_member, itertools.repeat(walk), places, indices))
        names = _names(members, paths)
        name = next(name for name in names if name not in groups)
        labels = entries.labels[rows]
        needs_zeros = np.isin(labels, zeroed).any()
        groups[name] = Group(name, len(rows), members, labels, bool(needs_zeros))
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
    """(numbers of places, first entry of each label, positions at each place) of labels that are of
    one axis and have entries in the same places."""
    numbers = entries.numbers
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
        rows = np.array(found)
        each = np.arange(len(copies))
        which = np.add.outer(rows, each)
        positions = entries.positions[which]
        indices = np.split(positions, bounds[1:], 1)
        yield own, rows, indices


def _runs(
    numbers: np.ndarray, starts: np.ndarray, sizes: np.ndarray, axes: np.ndarray
) -> Iterable[np.ndarray]:
    """Neighbours among labels that are of one axis and have entries in the same places."""
    before = np.arange(len(numbers)) - np.repeat(sizes, sizes)  # the same entry of the one before
    same = np.logical_and.reduceat(numbers == numbers[before], starts)
    same &= np.diff(sizes, prepend=0) == 0
    same &= np.diff(axes, prepend=-1) == 0
    runs = np.split(np.arange(len(starts)), np.flatnonzero(~same))
    return filter(len, runs)


def _entries(walk: Walk, inputs: Inputs, used: Sequence[str]) -> _Entries:
    places: list[Place] = []
    axes = []
    for path in dict.fromkeys((*used, *inputs)):
        for a, axis in enumerate(inputs[path].axes):
            places.append((path, a))
            axes.append(axis.labels)
    sizes = list(map(len, axes))
    numbers = np.repeat(np.arange(len(axes)), sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    positions = np.arange(len(numbers))
    positions -= np.repeat(starts, sizes)
    every = np.concatenate([fixed(0), *axes])
    found = walk.labels.find(every)
    live = np.flatnonzero(found)
    parts = walk.labels.parts(found[live])
    rows, which = np.nonzero(parts)
    simple = parts[rows, which]
    backwards = np.arange(len(simple))[::-1]
    first = np.zeros(walk.labels.num, int)  # of all assignments the last counts
    backward_labels = simple[backwards]
    first[backward_labels] = backwards
    order = np.argsort(first[simple], kind="stable")
    at = live[rows[order]]
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
