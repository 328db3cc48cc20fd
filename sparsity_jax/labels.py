"""Labels of array entries: which entries of which axes must be removed together.

Every axis of length n has one int array [n] of labels. Entries with equal labels live or die together; FROZEN entries
never die. A composite label stands for a set of others and dies with any of them: entry (i, j) of two axes merged into
one dies with i or with j.
"""

from collections.abc import Iterable, Sequence

import numpy as np

FROZEN = 0
MOST = 2**18  # composite labels that one merge may make


class Labels:
    """A partition of labels that only gets coarser: ties unite, freezing unites with FROZEN."""

    def __init__(self):
        self._parent = [FROZEN]
        self._sets: dict[int, tuple[int, ...]] = {}  # of composite labels: the simple ones they were made of
        self._names: dict[tuple[int, ...], int] = {}
        self._marks: list[object] = [None]
        self._watched: set[int] = set()
        self.frozen = 0  # how many watched labels have been frozen so far

    def copy(self) -> "Labels":
        other = Labels()
        other._parent, other._marks = self._parent.copy(), self._marks.copy()
        other._sets, other._names = self._sets.copy(), self._names.copy()
        return other

    def fresh(self, num: int, mark: object = None) -> np.ndarray:
        """`num` new labels; none for an axis of one entry, which cannot be shortened. mark: where they come from."""
        if num == 1:
            return np.zeros(1, int)
        start = len(self._parent)
        self._parent.extend(range(start, start + num))
        self._marks.extend([mark] * num)
        return np.arange(start, start + num)

    def watch(self, labels: np.ndarray) -> None:
        """Counts these labels, and all that they will be united with, in `frozen`."""
        self._watched.update(labels.tolist())

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The representative of every label."""
        unique, inverse = np.unique(labels, return_inverse=True)
        return np.array([self._find(label) for label in unique.tolist()], int)[inverse].reshape(labels.shape)

    def parts(self, label: int) -> tuple[int, ...]:
        """The simple labels that a representative dies with; none for FROZEN."""
        return self._sets.get(label, (label,) if label else ())

    def mark(self, label: int) -> object:
        return self._marks[label]

    def simple(self) -> Iterable[tuple[int, int]]:
        """(label, its representative) of all simple labels that are still simple and not frozen."""
        for label in range(1, len(self._parent)):
            root = self._find(label)
            if label not in self._sets and root and root not in self._sets:
                yield label, root

    def is_live(self, labels: np.ndarray) -> bool:
        """Whether any of them can die."""
        return bool(labels.any()) and bool(self.find(labels).any())

    def freeze(self, labels: np.ndarray) -> None:
        for label in np.unique(labels).tolist():
            for part in self.parts(self._find(label)):
                self._unite(part, FROZEN)

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """Entry i of one dies exactly if entry i of the other does."""
        if first is second:
            return
        first, second = self.find(first), self.find(second)
        different = first != second
        for a, b in np.unique(np.stack([first[different], second[different]]), axis=1).T.tolist():
            self._tie(a, b)

    def merge(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Labels of the row-major product of several axes."""
        shape = tuple(len(axis) for axis in axes)
        live = [i for i, axis in enumerate(axes) if self.is_live(axis)]
        if len(live) > 1 and np.prod([shape[i] for i in live]) > MOST:
            for i in live:
                self.freeze(axes[i])
            live = []
        grid = np.zeros([shape[i] if i in live else 1 for i in range(len(axes))], int)
        for i in live:
            found = self.find(axes[i]).reshape([-1 if j == i else 1 for j in range(len(axes))])
            grid = found + grid if not grid.any() else self._compose(*np.broadcast_arrays(grid, found))
        return np.broadcast_to(grid, shape).ravel()

    def split(self, labels: np.ndarray, shape: Sequence[int], mark: object = None) -> list[np.ndarray]:
        """Labels of the axes of `shape` into which one axis is split, row-major; ties what must die as a row."""
        grid = self.find(labels).reshape(shape)
        varies = [i for i in range(len(shape)) if (grid != grid.take([0], i)).any()]
        axes = [np.zeros(size, int) for size in shape]
        if len(varies) == 1:
            (i,) = varies
            axes[i] = np.moveaxis(grid, i, 0).reshape(shape[i], -1)[:, 0]
        elif varies:
            for i in varies:
                axes[i] = self.fresh(shape[i], (mark, i))
            self.tie(labels, self.merge(axes))
        elif grid.size and grid.flat[0]:
            self.freeze(labels)  # all entries die at once, so none may
        return axes

    def _compose(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        pairs, inverse = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1, return_inverse=True)
        named = [self._name({*self.parts(a), *self.parts(b)}) for a, b in pairs.T.tolist()]
        return np.array(named, int)[inverse.ravel()].reshape(first.shape)

    def _name(self, parts: set[int]) -> int:
        """The label that dies with any of the simple, live labels `parts`."""
        if len(parts) < 2:
            return next(iter(parts), FROZEN)
        key = tuple(sorted(parts))
        if key not in self._names:
            self._names[key] = len(self._parent)
            self._sets[len(self._parent)] = key
            self._parent.append(len(self._parent))
            self._marks.append(None)
        return self._names[key]

    def _find(self, label: int) -> int:
        path = []
        while True:
            parent = self._parent[label]
            if parent == label and label in self._sets:  # its parts may have been united, replaced or frozen
                parts = {part for own in self._sets[label] for part in self.parts(self._find(own))}
                parent = self._name(parts)
            if parent == label:
                break
            path.append(label)
            label = parent
        for passed in path:
            self._parent[passed] = label
        return label

    def _unite(self, label: int, other: int) -> None:
        self._parent[label] = other
        if label in self._watched:
            self.frozen += other == FROZEN
            self._watched.update(self.parts(other))

    def _tie(self, first: int, second: int) -> None:
        first, second = self._find(first), self._find(second)
        if first == second:
            return
        a, b = set(self.parts(first)), set(self.parts(second))
        a, b = sorted(a - b), sorted(b - a)
        if len(a) > len(b):
            a, b = b, a
        if not a:  # {x} against {x, y}: y may not die alone
            for label in b:
                self._unite(label, FROZEN)
            return
        for label, other in zip(a[:-1], b):  # any pairing is sound: it ties more than needed, never less
            self._unite(max(label, other), min(label, other))
        rest = b[len(a) - 1 :]
        if len(rest) == 1:
            self._unite(max(a[-1], rest[0]), min(a[-1], rest[0]))
        else:
            self._unite(a[-1], self._name(set(rest)))
