"""Labels of array entries: which entries of which axes must be removed together.

Every axis of length n has one int array [n] of labels. Entries with equal labels live or die
together; FROZEN entries never die. A composite label stands for a set of others and dies with any
of them: entry (i, j) of two axes merged into one dies with i or with j. Arrays of labels are never
written to: axes may share them.
"""

import copy
from collections.abc import Iterator, Sequence

import numpy as np

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
        self._marked: list[tuple[np.ndarray, object]] = []
        self.freezes = 0  # grows whenever something is frozen

    def copy(self) -> "Labels":
        other = Labels()
        for name, field in vars(self).items():
            setattr(other, name, copy.copy(field))
        return other

    def fresh(self, num: int, mark: object = None) -> np.ndarray:
        """`num` new labels. mark: where they come from, for `marks`."""
        start, self._num = self._num, self._num + num
        if self._num > len(self._parent):
            more = max(num, len(self._parent))
            self._parent = np.append(self._parent, np.zeros(more, int))
            self._composite = np.append(self._composite, np.zeros(more, bool))
        labels = np.arange(start, self._num)
        self._parent[labels] = labels
        if mark is not None:
            self._marked.append((labels, mark))
        return labels

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The representative of every label."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[labels] = roots
        composite = self._composite[roots]
        if composite.any():  # their parts may have been united, replaced or frozen
            unique, inverse = np.unique(roots[composite], return_inverse=True)
            found = list(map(self._find, unique.tolist()))
            roots[composite] = np.array(found)[inverse]
        return roots

    def parts(self, label: int) -> tuple[int, ...]:
        """The simple labels that a representative dies with; none for FROZEN."""
        return self._sets.get(label, (label,) if label else ())

    def marks(self) -> Iterator[tuple[int, object]]:
        """(representative, mark) of all marked labels that are neither frozen nor composite by
        now."""
        for labels, mark in self._marked:
            for root in np.unique(self.find(labels)).tolist():
                if root and root not in self._sets:
                    yield root, mark

    def is_live(self, labels: np.ndarray) -> bool:
        """Whether any of them can die."""
        if not labels.any():
            return False
        return bool(self.find(labels).any())

    def freeze(self, labels: np.ndarray) -> bool:
        """None of them may die; returns whether any could."""
        roots = np.unique(self.find(labels)).tolist()
        parts = [part for root in roots for part in self.parts(root)]
        self._unite(parts, FROZEN)
        return bool(parts)

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """Entry i of one dies exactly if entry i of the other does."""
        while first is not second:
            first, second = self.find(first), self.find(second)
            different = first != second
            if not different.any():
                return
            first, second = first[different], second[different]
            composite = self._composite[first] | self._composite[second]
            if composite.all():
                break
            simple = ~composite
            low = np.minimum(first, second)[simple]
            high = np.maximum(first, second)[simple]
            self._unite(high, low)  # of several partners of a label one; others in the next turn
        if first is not second:
            pairs = set(zip(first.tolist(), second.tolist()))
            for a, b in sorted(pairs):
                self._tie(a, b)

    def merge(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Labels of the row-major product of several axes."""
        shape = tuple(len(axis) for axis in axes)
        live = [i for i, axis in enumerate(axes) if self.is_live(axis)]
        product = np.prod([shape[i] for i in live])
        if len(live) > 1 and product > MOST:
            for i in live:
                self.freeze(axes[i])
            live = []
        grid = np.zeros([1] * len(axes), int)
        for i in live:
            along = [1] * len(axes)
            along[i] = len(axes[i])
            grid = self._compose(grid, self.find(axes[i]).reshape(along))
        return np.broadcast_to(grid, shape).ravel()

    def split(
        self, labels: np.ndarray, shape: Sequence[int], mark: object = None
    ) -> list[np.ndarray]:
        """Labels of the axes of `shape` into which one axis is split, row-major; ties what must die
        as a row."""
        grid = self.find(labels).reshape(shape)
        varies = [i for i in range(grid.ndim) if np.diff(grid, axis=i).any()]
        axes = [np.zeros(size, int) for size in shape]
        if len(varies) == 1:
            (i,) = varies
            axes[i] = np.moveaxis(grid, i, 0).reshape(shape[i], -1)[:, 0]
        elif varies:
            for i in varies:
                axes[i] = self.fresh(shape[i], (mark, i))
            self.tie(labels, self.merge(axes))
        elif grid.any():
            self.freeze(labels)  # all entries die at once, so none may
        return axes

    def _compose(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        num = self._num
        grid = first * num + second
        pairs, inverse = np.unique(grid, return_inverse=True)
        names = []
        for pair in pairs.tolist():
            a, b = divmod(pair, num)
            names.append(self._name({*self.parts(a), *self.parts(b)}))
        return np.array(names, int)[inverse.ravel()].reshape(grid.shape)

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

    def _unite(self, labels: Sequence[int], others: np.ndarray | int) -> None:
        """labels: simple representatives; others: what each becomes."""
        self._parent[labels] = others
        frozen = np.equal(others, FROZEN)
        if len(labels) and np.any(frozen):
            self.freezes += 1

    def _tie(self, first: int, second: int) -> None:
        first, second = self._find(first), self._find(second)
        if first == second:
            return
        of_first, of_second = set(self.parts(first)), set(self.parts(second))
        a = sorted(of_first - of_second)
        b = sorted(of_second - of_first)
        a, b = sorted((a, b), key=len)
        if not a:  # {x} against {x, y}: y may not die alone
            self._unite(b, FROZEN)
            return
        # Any pairing is sound: it ties more than needed, never less.
        for label, other in zip(a[:-1], b):
            self._unite([max(label, other)], min(label, other))
        rest = b[len(a) - 1 :]
        if len(rest) > 1:
            self._unite([a[-1]], self._name(set(rest)))
            return
        low, high = sorted((a[-1], rest[0]))
        self._unite([high], low)
