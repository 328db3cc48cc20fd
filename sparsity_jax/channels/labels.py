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
from typing import Any

import numpy as np

from sparsity_jax.types import Shape

__all__ = ["FROZEN", "MOST", "Labels", "Row"]

Row = np.ndarray  # int: the labels of entries, one after the other

FROZEN = 0
MOST = 2**18  # composite labels that one merge may make; a larger product is frozen


class Labels:
    """A partition of labels that only gets coarser: ties unite, freezing unites with FROZEN."""

    def __init__(self) -> None:
        self._num = 1
        self._parent = np.zeros(1024, int)  # of every label; of a representative, the label itself
        self._composite = np.zeros(1024, bool)
        self._sets: dict[int, Shape] = {}  # of composite labels: the simple ones inside
        self._names: dict[Shape, int] = {}
        self._starts: list[int] = []  # the first label of each axis that has new ones
        self.freezes = 0  # grows whenever something is frozen

    def copy(self) -> "Labels":
        other = Labels()
        for name, field in vars(self).items():
            setattr(other, name, copy.copy(field))
        return other

    def fresh(self, num: int) -> Row:
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

    def find(self, labels: Row) -> Row:
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
            renewed = np.array(list(map(self._find, unique.tolist())))
            roots[composite] = renewed[inverse]
        return roots

    def parts(self, label: int) -> Shape:
        """The simple labels that a representative dies with; none for FROZEN."""
        if label == FROZEN:
            return ()
        return self._sets.get(label, (label,))

    def axis_of(self, label: int) -> int:
        """The number of the axis that the label was made for."""
        return bisect.bisect(self._starts, label)

    def is_live(self, labels: Row) -> bool:
        """Whether any of them can die."""
        return bool(self.find(labels).any())

    def freeze(self, labels: Row) -> bool:
        """None of them may die; returns whether any could."""
        roots = np.unique(self.find(labels))
        parts = set(itertools.chain(*map(self.parts, roots.tolist())))
        if parts:
            self._unite(list(parts), FROZEN)
        return bool(parts)

    def tie(self, first: Row, second: Row) -> None:
        """Entry i of one dies exactly if entry i of the other does."""
        while True:
            pairs = self.find(np.stack([first, second]))
            composite = self._composite[pairs].any(0)
            different = (pairs[0] != pairs[1]) & ~composite
            if not different.any():
                break
            low, high = np.sort(pairs[:, different], axis=0)
            self._unite(high, low)  # of several partners of a label one; others in the next turn
        for a, b in np.unique(pairs[:, composite], axis=1).T.tolist():
            self._tie(a, b)

    def merge(self, axes: list) -> Row:
        """Labels of the row-major product of several axes."""
        live = list(filter(self.is_live, axes))
        size = math.prod(map(len, live))
        if len(live) > 1 and size > MOST:
            self.freeze(np.concatenate(live))
        merged = np.zeros(1, int)
        for axis in axes:
            merged = self._product(merged, self.find(axis))
        return merged

    def split(self, labels: Row, shape: Shape) -> list:
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

    def _product(self, first: Row, second: Row) -> Row:
        """Labels of all pairs of two rows of representatives, the second fastest."""
        rows, row = np.unique(first, return_inverse=True)
        columns, column = np.unique(second, return_inverse=True)
        names = []
        for a, b in itertools.product(rows.tolist(), columns.tolist()):
            parts = {*self.parts(a), *self.parts(b)}
            names.append(self._name(parts))
        table = np.array(names, int).reshape(len(rows), len(columns))
        products = table[row][:, column]
        return products.ravel()

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
                simple = map(self._find, self._sets[label])
                parts = itertools.chain(*map(self.parts, simple))
                parent = self._name(set(parts))
            if parent == label:
                break
            path.append(label)
            label = parent
        self._parent[path] = label
        return label

    def _unite(self, labels: Any, others: Any) -> None:
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
