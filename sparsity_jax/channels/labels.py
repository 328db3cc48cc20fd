"""Labels of array entries: which entries of which axes must be removed together.

Every axis of length n has one int array [n] of labels. Entries with equal labels live or die
together; FROZEN entries never die. A composite label stands for a set of others and dies with any
of them: entry (i, j) of two axes merged into one dies with i or with j. Arrays of labels are never
written to: axes may share them.
"""

import collections
import copy
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from sparsity_jax.types import Shape

__all__ = ["FROZEN", "LABEL", "MOST", "Labels", "Pairs", "Row", "with_room"]

Row = np.ndarray  # int32: the labels of entries, one after the other
Pairs = np.ndarray  # int [2, num]: labels, and one other for each

FROZEN = 0
LABEL = np.int32  # the type of labels
MOST = 2**18  # composite labels that one merge may make; a larger product is frozen


class Labels:
    """A partition of labels that only gets coarser: ties unite, freezing unites with FROZEN.

    A forest, of which all labels of a class are a tree; all work is on arrays. A set of labels is a
    row of them in order, filled with FROZEN, which adds nothing to a set, in front.

    num: of labels, FROZEN included.
    date: of what is frozen next; whoever asks for `dates` counts it up.
    """

    def __init__(self) -> None:
        self.date = 1
        self.num = 1
        self._parent = np.zeros(1024, LABEL)  # of every label; of a root, the label itself
        self._dates = np.zeros(1024, LABEL)  # of every root: when it was frozen, 0 if it was not
        self._number = np.zeros(1024, LABEL)  # of every composite label: its row in `_sets`
        self._sets = np.zeros((1024, 1), LABEL)  # the simple labels inside; row 0 is of no label
        self._names = _Names()  # composite labels by what they are made from
        self._tied: dict[tuple[int, int], tuple[Row, Row]] = {}  # rows, by their identities
        self._starts: list[int] = []  # the first label of each axis that has new ones

    def copy(self) -> "Labels":
        """The same labels, to be changed apart from these."""
        other = Labels()
        for name, field in vars(self).items():
            setattr(other, name, copy.copy(field))
        return other

    def fresh(self, num: int) -> Row:
        """`num` new labels, of one axis."""
        self._starts.append(self.num)
        labels = np.arange(self.num, self.num + num, dtype=LABEL)
        self.num += num
        if self.num > len(self._parent):
            self._parent = with_room(self._parent, self.num)
            self._dates = with_room(self._dates, self.num)
            self._number = with_room(self._number, self.num)
        self._parent[labels] = labels
        return labels

    def stopped(self, num: int) -> Row:
        """`num` entries of one label that is frozen, as of now."""
        label = self.fresh(1)
        self._dates[label] = self.date
        return np.repeat(label, num)

    def find(self, labels: Row) -> Row:
        """The representative of every label."""
        roots = self._roots(labels)
        dates = self._dates.take(roots)
        if dates.any():
            return np.where(dates, FROZEN, roots)
        return roots

    def dates(self, labels: Row) -> Row:
        """When each label was frozen; 0 if it was not, or is FROZEN itself."""
        roots = self._roots(labels)  # which may make room for more
        return self._dates[roots]

    def roots(self, axes: Sequence[Row]) -> tuple[list[Row], list[list[int]]]:
        """Different rows of roots, and numbers of the axes that have each."""
        rows = list(axes)
        owners = [[number] for number in range(len(rows))]
        for look_up in (self._parent.take, self._roots):  # many rows differ in nothing above them
            ends = np.cumsum([0, *map(len, rows)])
            above = look_up(np.concatenate([np.zeros(0, LABEL), *rows]))
            shared: dict[bytes, list[int]] = collections.defaultdict(list)
            for own, (start, end) in zip(owners, itertools.pairwise(ends)):
                row = above[start:end]
                shared[row.tobytes()] += own
            rows = [np.frombuffer(row, LABEL) for row in shared]
            owners = list(shared.values())
        return rows, owners

    def parts(self, labels: Row) -> np.ndarray:
        """int [..., parts]: the simple labels that each representative dies with."""
        numbers = self._number.take(labels)
        if not numbers.any():
            return labels[..., None]
        parts = self._sets[numbers]
        simple = np.where(numbers, FROZEN, labels)
        parts[..., -1] += simple  # where row 0 has nothing
        return parts

    def axis_of(self, labels: Row) -> Row:
        """The number of the axis that each label was made for."""
        return np.searchsorted(self._starts, labels, "right")

    def is_live(self, labels: Row) -> bool:
        """Whether any of them can die."""
        return bool(self.find(labels).any())

    def freeze(self, labels: Row) -> bool:
        """None of them may die; returns whether any could."""
        parts = self.parts(self.find(labels))
        live = parts[parts != FROZEN]
        self._dates[live] = self.date
        return live.size > 0

    def tie(self, first: Row, second: Row) -> None:
        """Entry i of one dies exactly if entry i of the other does."""
        both = (id(first), id(second))
        if first is second or both in self._tied:
            return
        self._tied[both] = (first, second)
        pairs = self._different(np.stack([first, second]))
        simple = self._simple(pairs)
        if simple.all() and _are_apart(*pairs):
            self._unite(*pairs)
            return
        while simple.any():
            self._unite(*pairs[:, simple])  # of several partners of a label one
            pairs = self._different(pairs)  # the others have another turn
            simple = self._simple(pairs)
        if pairs.size:
            pairs = _unique(pairs)
        while pairs.size:
            partners = self._partners(*pairs)
            self._unite(*partners)
            pairs = self._different(pairs)

    def merge(self, axes: list) -> Row:
        """Labels of the row-major product of several axes."""
        live = list(filter(self.is_live, axes))
        size = math.prod(map(len, live))
        if len(live) > 1 and size > MOST:
            every = np.concatenate(live)
            self.freeze(every)
        return functools.reduce(self._product, map(self.find, axes))

    def split(self, labels: Row, shape: Shape) -> list:
        """Labels of the axes of `shape` into which one axis is split, row-major; ties what must die
        as a row."""
        grid = self.find(labels).reshape(shape)
        varies = [i for i in range(grid.ndim) if np.diff(grid, axis=i).any()]
        axes = [np.zeros(size, LABEL) for size in shape]
        if not varies:
            self.freeze(labels)  # all entries die at once, so none may
        elif len(varies) == 1:
            (i,) = varies
            grid = np.moveaxis(grid, i, 0)
            slices = grid.reshape(shape[i], -1)
            axes[i] = slices[:, 0]
        else:
            for i in varies:
                axes[i] = self.fresh(shape[i])
            product = self.merge(axes)
            self._replace(grid.ravel(), product)
        return axes

    def _replace(self, labels: Row, others: Row) -> None:
        """Ties representatives to labels of new sets."""
        is_live = labels[0] != FROZEN and others.all()
        is_simple = not self._number[labels].any()
        if _is_rising(labels) and is_live and is_simple:
            self._parent[labels] = others  # each of them becomes another set
        else:
            self.tie(labels, others)

    # Trees

    def _roots(self, labels: Row) -> Row:
        """The root of every label, frozen or not."""
        roots = self._climb(labels)
        numbers = self._number.take(roots)
        if numbers.any():
            is_live = self._dates.take(roots) == 0
            composite = roots[is_live & (numbers > 0)]
            if composite.size and self._renew(composite):
                roots = self._climb(labels)
        return roots

    def _climb(self, labels: Row) -> Row:
        """The root of every label, of which it is the child from now on."""
        parents = self._parent.take(labels)
        roots = self._parent.take(parents)
        if np.array_equal(parents, roots):
            return roots
        above = self._parent.take(roots)
        while not np.array_equal(above, roots):
            roots = above
            above = self._parent.take(roots)
        self._parent[labels] = roots
        return roots

    def _renew(self, composite: Row) -> bool:
        """Composite labels whose parts were united, replaced or frozen become what these are now;
        returns whether there are any."""
        sets = self.parts(composite)
        parts = self.find(sets)
        differs = parts != sets
        changed = differs.any(1)
        if not changed.any():
            return False
        self._rename(composite[changed], sets[changed], parts[changed])
        return True

    def _rename(self, composite: Row, sets: np.ndarray, found: np.ndarray) -> None:
        """found: representatives of the parts in `sets`."""
        parts = self.parts(found)
        parts = parts.reshape(len(found), -1)
        names = self._name(parts)
        live = names != FROZEN
        self._parent[composite[live]] = names[live]
        # a set is frozen with the last of its parts
        last = self.dates(sets).max(1)
        self._dates[composite[~live]] = last[~live]

    def _unite(self, labels: Row, others: Row) -> None:
        """labels: simple representatives; others: what each becomes."""
        simple = self._number[others] == 0
        smaller = np.minimum(labels, others)
        larger = np.maximum(labels, others)
        low = np.where(simple, smaller, others)
        high = np.where(simple, larger, labels)
        frozen = low == FROZEN
        self._dates[high[frozen]] = self.date
        self._parent[high[~frozen]] = low[~frozen]

    # Sets

    def _product(self, first: Row, second: Row) -> Row:
        """Labels of all pairs of two rows of representatives, the second fastest."""
        rows, row = _distinct(first)
        columns, column = _distinct(second)
        height = len(rows)
        width = len(columns)
        of_rows = np.repeat(self.parts(rows), width, 0)
        of_columns = np.tile(self.parts(columns), (height, 1))
        sets = np.column_stack([of_rows, of_columns])
        names = self._name(sets)
        table = names.reshape(height, width)
        products = table[row][:, column]
        return products.ravel()

    def _name(self, sets: np.ndarray) -> Row:
        """The label that dies with any of the simple, live labels of each row, in any order."""
        if np.any(sets[:, 1:] <= sets[:, :-1]):
            sets = _ordered(sets)
            repeated = sets[:, 1:] == sets[:, :-1]
            if repeated.any():
                sets[:, 1:][repeated] = FROZEN
                sets = _ordered(sets)
        names = np.zeros(len(sets), LABEL)
        for more in sets.T:
            names = self._pair(names, more)
        return names

    def _pair(self, names: Row, more: Row) -> Row:
        """The label of each set with one label more, which is behind all others."""
        larger = names != FROZEN
        if not larger.any():
            return more
        keys = _packed(names[larger], more[larger])
        if _is_rising(keys):
            made = self._made(keys, np.arange(len(keys)))
        else:
            keys, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
            made = self._made(keys, first)[inverse]
        result = more.copy()
        result[larger] = made
        return result

    def _made(self, keys: Row, first: Row) -> Row:
        """The label of each pair, by rising keys; new ones in the order of `first`."""
        made = self._names.of(keys)
        new = np.flatnonzero(made == FROZEN)
        if new.size:
            order = np.argsort(first[new])
            in_order = new[order]
            made[in_order] = self._compose(*_unpacked(keys[in_order]))
            self._names.add(keys[new], made[new])
        return made

    def _compose(self, names: Row, more: Row) -> Row:
        """New labels of sets with one label more each."""
        sets = np.column_stack([self.parts(names), more])
        if not sets[:, 0].any():
            sets = sets[:, 1:]
        wider = sets.shape[1] - self._sets.shape[1]
        if wider > 0:
            self._sets = np.pad(self._sets, ((0, 0), (wider, 0)))
        made = self.fresh(len(sets))
        first = self._names.num + 1
        numbers = np.arange(first, first + len(sets))
        self._sets = with_room(self._sets, first + len(sets))
        self._sets[numbers, -sets.shape[1] :] = sets
        self._number[made] = numbers
        return made

    def _different(self, pairs: Pairs) -> Pairs:
        """Representatives of the pairs that differ, but for those that one was frozen of."""
        roots = self._roots(pairs)
        dates = self._dates.take(roots)
        pairs = roots
        if dates.any():
            pairs = np.where(dates, FROZEN, roots)
            if self._pass_on(pairs, dates.max(0)):
                pairs = self.find(pairs)
        differ = pairs[0] != pairs[1]
        return pairs[:, differ]

    def _pass_on(self, pairs: Pairs, dates: Row) -> bool:
        """Representatives whose partner was frozen, at one of `dates`, are frozen for its cause;
        returns whether there are any."""
        live = (pairs != FROZEN) & (dates > 0)
        if not live.any():
            return False
        parts = self.parts(pairs[live])
        causes = np.broadcast_to(dates, live.shape)[live]
        self._dates[parts] = causes[:, None]
        self._dates[FROZEN] = 0  # it fills the rows of parts
        return True

    def _simple(self, pairs: Pairs) -> np.ndarray:
        """Whether neither of each pair is composite."""
        return ~self._number[pairs].any(0)

    def _partners(self, first: Row, second: Row) -> Pairs:
        """Simple labels, and what each becomes, for pairs of sets that must be equal.

        Labels that are in one set of a pair only are paired in order, the last with all that are
        left over. Any pairing is sound: it ties more than needed, never less. Pairs that ask for
        several partners of a label have another turn.
        """
        swapped = self._number[first] > 0
        pairs = np.where(swapped, (second, first), (first, second))
        if pairs.all() and not self._number[pairs[0]].any() and self._at_once(pairs):
            return pairs  # none of these labels is in the set that it becomes
        few, many = self._differences(first, second)
        forced = few.any(1) & (np.count_nonzero(many, 1) == 1)
        if forced.any():  # equal in any order, so that a label may have several partners
            return np.stack([few[forced, 0], many[forced, 0]])
        columns = np.arange(few.shape[1])
        last = np.count_nonzero(few, 1, keepdims=True) - 1
        left_over = np.where(columns >= last, many, FROZEN)
        rest = self._name(left_over)
        others = np.where(columns == last, rest[:, None], many)
        nothing = last < 0  # {x} against {x, y}: y may not die alone
        labels = np.where(nothing, many, few)
        others = np.where(nothing, FROZEN, others)
        return self._prefix_at_once(labels, others)

    def _prefix_at_once(self, labels: np.ndarray, others: np.ndarray) -> Pairs:
        """Pairs of the first rows, as many as can be united at once, by halving; at least one."""
        used = labels != FROZEN
        count = len(labels)
        while True:
            now = used[:count]
            of_labels = labels[:count][now]
            of_others = others[:count][now]
            pairs = _unique(np.stack([of_labels, of_others]))
            if count == 1 or self._at_once(pairs):
                return pairs
            count //= 2

    def _differences(self, first: Row, second: Row) -> tuple[np.ndarray, np.ndarray]:
        """What is in one set of each pair but not in the other; the smaller difference first."""
        sets, others = self.parts(np.stack([first, second]))
        equal = sets[:, :, None] == others[:, None]
        of_first = np.where(equal.any(2), FROZEN, sets)
        of_second = np.where(equal.any(1), FROZEN, others)
        differences = np.stack([of_first, of_second])
        ends = np.where(differences, differences, self.num)  # FROZEN goes behind all others
        in_order = np.sort(ends, -1) % self.num
        of_first, of_second = in_order
        sizes = np.count_nonzero(in_order, -1)
        larger = np.greater(*sizes)[:, None]
        few = np.where(larger, of_second, of_first)
        many = np.where(larger, of_first, of_second)
        return few, many

    def _at_once(self, pairs: Pairs) -> bool:
        """Whether no label has two partners, nor is part of a label that another becomes."""
        labels, others = pairs
        composite = self._number[others] > 0
        simple = others[~composite]
        simple = simple[simple != FROZEN]
        moved = np.concatenate([labels, simple])
        if len(np.unique(moved)) < len(moved):
            return False
        parts = self.parts(others[composite])
        return not np.isin(moved, parts).any()


class _Names:
    """Labels by keys, in a few runs of rising keys, each shorter than half of the one before.

    num: of keys.
    """

    def __init__(self) -> None:
        self.num = 0
        self._runs: list[tuple[Row, Row]] = []

    def __copy__(self) -> "_Names":
        other = _Names()
        other.num = self.num
        other._runs = list(self._runs)
        return other

    def of(self, keys: Row) -> Row:
        """The label of each of rising keys; FROZEN for those that have none."""
        found = np.zeros(len(keys), LABEL)
        for known, labels in self._runs:
            if known[0] <= keys[-1] and keys[0] <= known[-1]:
                at = np.searchsorted(known, keys)
                nearest = np.minimum(at, len(known) - 1)
                same = known[nearest] == keys
                found[same] = labels[nearest[same]]
        return found

    def add(self, keys: Row, labels: Row) -> None:
        """keys: rising, without labels so far."""
        self.num += len(keys)
        while self._runs and 2 * len(keys) > len(self._runs[-1][0]):
            known, others = self._runs.pop()
            keys = np.concatenate([known, keys])
            labels = np.concatenate([others, labels])
            order = np.argsort(keys, kind="stable")  # merges runs
            keys = keys[order]
            labels = labels[order]
        self._runs.append((keys, labels))


def _ordered(sets: np.ndarray) -> np.ndarray:
    """Each row in order."""
    if sets.shape[1] == 2:  # most are pairs, which sort() is slow for
        first, second = sets.T
        return np.stack([np.minimum(first, second), np.maximum(first, second)], 1)
    return np.sort(sets, 1)


def _distinct(labels: Row) -> tuple[Row, Row]:
    """The different labels in order, and which of them each is."""
    if _is_rising(labels):
        return labels, np.arange(len(labels))
    return np.unique(labels, return_inverse=True)


def _is_rising(row: Row) -> bool:
    return bool(np.all(row[1:] > row[:-1]))


def with_room(array: np.ndarray, num: int) -> np.ndarray:
    """The array with at least `num` rows."""
    if num <= len(array):
        return array
    larger = np.zeros((2 * num, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def _unique(pairs: Pairs) -> Pairs:
    """The different ones of pairs of labels, in order."""
    keys = np.unique(_packed(*pairs))
    return np.stack(_unpacked(keys))


def _are_apart(first: Row, second: Row) -> bool:
    """Whether no label is in two of the pairs; told for rising labels alone."""
    if not first.size or not _is_rising(first) or not _is_rising(second):
        return False
    return bool(first[-1] < second[0] or second[-1] < first[0])


def _packed(first: Row, second: Row) -> Row:
    """One number per pair."""
    return first.astype(np.int64) << 32 | second


def _unpacked(keys: Row) -> tuple[Row, Row]:
    second = keys & 2**32 - 1
    return (keys >> 32).astype(LABEL), second.astype(LABEL)
