"""What is known of the arrays of a program while it is walked: a `Value` each, of `Axis`."""

import functools
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

Place = tuple[int, int]  # (input, its axis)


class Axis(NamedTuple):
    """One axis of an array."""

    labels: np.ndarray  # int [size], see `labels.Labels`; never written to, as axes share them
    zero: bool  # removed entries are exactly 0 in the masked program
    origin: tuple[Place, ...] = ()  # whose entries these are

    @property
    def size(self) -> int:
        return len(self.labels)


class Value(NamedTuple):
    """One array."""

    axes: tuple[Axis, ...]
    constant: float | None = None  # the value of all entries, if it is known to be one
    sources: int = 0  # bit i is set if the array depends on input i

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    def pick(self, axes: list[int]) -> "Value":
        """With only these of its axes, in their order."""
        return self._replace(axes=tuple(self.axes[a] for a in axes))

    def drop(self, gone: Container[int]) -> "Value":
        """Without these of its axes."""
        return self.pick([a for a in range(len(self.axes)) if a not in gone])

    def relabel(self, position: int, labels: np.ndarray) -> "Value":
        """With other entries along the axis at `position`."""
        return self.put(position, self.axes[position]._replace(labels=labels))

    def put(self, position: int, axis: Axis) -> "Value":
        """With another axis at `position`."""
        before, after = self.axes[:position], self.axes[position + 1 :]
        return self._replace(axes=(*before, axis, *after))


class Program(NamedTuple):
    """A walked jaxpr: what is known of its variables, and of the jaxprs inside its equations.

    inner: by the number of the equation, in the order in which they run.
    """

    jaxpr: Any
    values: dict[Any, Value]
    inner: dict[int, list["Program"]]

    def value(self, var: Any) -> Value:
        """What is known of a variable; of a literal, its shape."""
        return whole(var.aval) if is_literal(var) else self.values[var]

    def equations(self) -> Iterator[tuple[Any, list["Program"]]]:
        """Each equation with the programs inside of it."""
        for number, eqn in enumerate(self.jaxpr.eqns):
            yield eqn, self.inner.get(number, [])


@functools.lru_cache(maxsize=4096)
def fixed(size: int) -> np.ndarray:
    """Labels of an axis that keeps all its entries."""
    return np.zeros(size, int)


def whole(aval: Any) -> Value:
    """Of an array of which nothing may be removed."""
    shape = getattr(aval, "shape", ())
    return Value(tuple(Axis(fixed(size), False) for size in shape))


def nowhere_zero(value: Value) -> Value:
    """The array, but removed entries need not be zero."""
    axes = tuple(axis._replace(zero=False) for axis in value.axes)
    return value._replace(axes=axes, constant=None)


def is_literal(var: Any) -> bool:
    return isinstance(var, core.Literal)


def bits(number: int) -> Iterator[int]:
    """Positions of the set bits, the lowest first."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
