"""Labels of array entries: which entries of which axes must be removed together.

Every axis of length n has one int array [n] of labels. Entries with equal labels live or die
together; FROZEN entries never die. A composite label stands for a set of others and dies with any
of them: entry (i, j) of two axes merged into one dies with i or with j. Arrays of labels are never
written to: axes may share them.
"""

import bisect
import copy
import itertools
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["FROZEN", "MOST", "Labels"]

FROZEN = 0
MOST = 2**18  # composite labels that one merge may make; a larger product is frozen


class Labels:
    """A partition of labels that only gets coarser: ties unite, freezing unites with FROZEN."""

    def __init__(self) -> None:
        self._num = 1
        self._parent = np.zeros(1024, int)  # of every label; of a representative, the label itself
        self._composite = np.zeros(1024, bool)
        # of composite labels: the simple ones they were made of
        self._sets: dict[int, tuple[int, ...]] = {}
        self._names: dict[tuple[int, ...], int] = {}
        self._starts: list[int] = []  # the first label of each axis that has new ones
        self.freezes = 0  # grows whenever something is frozen

    def copy(self) -> "Labels":
        other = Labels()
        for name, field in vars(self).items():
            setattr(other, name, copy.copy(field))
        return other

    def fresh(self, num: int) -> np.ndarray:
        """`num` new labels, of one axis."""
        self._starts.append(self._num)
        labels = np.arange(self._num, self._num + num)
        self._num += num
        if self._num > len(self._parent):
            room = 2 * self._num
            self._parent.resize(room, refcheck=False)
            self._composite.resize(room, refcheck=False)
        self._parent[labels] = labels
        return labels

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The representative of every label."""
        roots = self._parent[labels]
        above = self._parent[roots]
        while not np.array_equal(above, roots):
            roots = above
            above = self._parent[roots]
        self._parent[labels] = roots
        composite = self._composite[roots]
        if composite.any():  # their parts may have been united, replaced or frozen
            unique, inverse = np.unique(roots[composite], return_inverse=True)
            renewed = [self._find(label) for label in unique.tolist()]
            roots[composite] = np.array(renewed)[inverse]
        return roots

    def parts(self, label: int) -> tuple[int, ...]:
        """The simple labels that a representative dies with; none for FROZEN."""
        if label == FROZEN:
            return ()
        return self._sets.get(label, (label,))

    def axis_of(self, label: int) -> int:
        """The number of the axis that the label was made for."""
        return bisect.bisect(self._starts, label)

    def is_live(self, labels: np.ndarray) -> bool:
        """Whether any of them can die."""
        return bool(self.find(labels).any())

    def freeze(self, labels: np.ndarray) -> bool:
        """None of them may die; returns whether any could."""
        parts: set[int] = set()
        roots = self.find(labels)
        for root in np.unique(roots[roots != FROZEN]).tolist():
            parts.update(self.parts(root))
        if parts:
            self._unite(list(parts), FROZEN)
        return bool(parts)

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """Entry i of one dies exactly if entry i of the other does."""
        while True:
            first = self.find(first)
            second = self.find(second)
            composite = self._composite[first] | self._composite[second]
            different = (first != second) & ~composite
            if not different.any():
                break
            low = np.minimum(first, second)[different]
            high = np.maximum(first, second)[different]
            self._unite(high, low)  # of several partners of a label one; others in the next turn
        pairs = set(zip(first[composite].tolist(), second[composite].tolist()))
        for a, b in sorted(pairs):
            self._tie(a, b)

    def merge(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Labels of the row-major product of several axes."""
        live = [axis for axis in axes if self.is_live(axis)]
        if len(live) > 1 and math.prod(map(len, live)) > MOST:
            for axis in live:
                self.freeze(axis)
        merged = np.zeros(1, int)
        for axis in axes:
            merged = self._product(merged, self.find(axis))
        return merged

    def split(self, labels: np.ndarray, shape: Sequence[int]) -> list[np.ndarray]:
        """Labels of the axes of `shape` into which one axis is split, row-major; ties what must die
        as a row."""
        grid = self.find(labels).reshape(shape)
        varies = [i for i in range(grid.ndim) if np.diff(grid, axis=i).any()]
        axes = [np.zeros(size, int) for size in shape]
        if not varies:
            self.freeze(labels)  # all entries die at once, so none may
        elif len(varies) == 1:
            (i,) = varies
            slices = np.moveaxis(grid, i, 0).reshape(shape[i], -1)
            axes[i] = slices[:, 0]
        else:
            for i in varies:
                axes[i] = self.fresh(shape[i])
            self.tie(labels, self.merge(axes))
        return axes

    def _product(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Labels of all pairs of two rows of representatives, the second fastest."""
        rows, row = np.unique(first, return_inverse=True)
        columns, column = np.unique(second, return_inverse=True)
        names = []
        for a, b in itertools.product(rows.tolist(), columns.tolist()):
            parts = {*self.parts(a), *self.parts(b)}
            names.append(self._name(parts))
        table = np.array(names, int).reshape(len(rows), len(columns))
        return table[row][:, column].ravel()

    def _name(self, parts: set[int]) -> int:
        """The label that dies with any of the simple, live labels `parts`."""
        if len(parts) < 2:
            return next(iter(parts), FROZEN)
        key = tuple(sorted(parts))
        if key not in self._names:
            (name,) = self.fresh(1).tolist()
            self._names[key] = name
            self._sets[name] = key
            self._composite[name] = True
        return self._names[key]

    def _find(self, label: int) -> int:
        """`find` of one label."""
        path = []
        while True:
            parent = int(self._parent[label])
            if parent == label and label in self._sets:
                parts: set[int] = set()
                for simple in self._sets[label]:
                    parts.update(self.parts(self._find(simple)))
                parent = self._name(parts)
            if parent == label:
                break
            path.append(label)
            label = parent
        self._parent[path] = label
        return label

    def _unite(self, labels: Sequence[int] | np.ndarray, others: np.ndarray | int) -> None:
        """labels: simple representatives; others: what each becomes."""
        self._parent[labels] = others
        if np.equal(others, FROZEN).any():
            self.freezes += 1

    def _tie(self, first: int, second: int) -> None:
        first = self._find(first)
        second = self._find(second)
        if first == second:
            return
        of_first = set(self.parts(first))
        of_second = set(self.parts(second))
        apart = (of_first - of_second, of_second - of_first)
        few, many = map(sorted, sorted(apart, key=len))
        if not few:  # {x} against {x, y}: y may not die alone
            self._unite(many, FROZEN)
            return
        # Any pairing is sound: it ties more than needed, never less.
        if len(few) < len(many):
            rest = many[len(few) - 1 :]
            self._unite([few.pop()], self._name(set(rest)))
        for label, other in zip(few, many):
            self._unite([max(label, other)], min(label, other))
