"""What is known of the arrays of a program while it is walked: a `Value` each, of `Axis`."""

import functools
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from sparsity_jax.channels.labels import LABEL
from sparsity_jax.channels.symbolic import StandIns
from sparsity_jax.types import Shape

__all__ = [
    "Axis",
    "Order",
    "Place",
    "Program",
    "Value",
    "fixed",
    "is_literal",
    "nowhere_zero",
    "whole",
]

Place = tuple[Any, int]  # (name of an input, its axis)


class Axis(NamedTuple):
    """One axis of an array."""

    labels: np.ndarray  # int [size], see `labels.Labels`; never written to, as axes share them
    zero: bool  # removed entries are exactly 0 in the masked program
    origin: tuple[Place, ...] = ()  # whose entries these are
    cleared: tuple = ()  # the equation after which they need not be 0, after those it is inside of

    @property
    def size(self) -> int:
        """Number of entries along it."""
        return len(self.labels)

    @property
    def unnamed(self) -> "Axis":
        """The same axis, as that of no input."""
        return self._replace(origin=()) if self.origin else self


class Value(NamedTuple):
    """One array."""

    axes: Sequence[Axis]
    constant: float | None = None  # the value of all entries, if it is known to be one
    sources: int = 0  # bit i is set if the array depends on input i
    nonnegative: bool = False  # no entry can be below 0
    given: bool = False  # an input as it is, but for shape and type

    @property
    def shape(self) -> Shape:
        """Sizes of its axes."""
        return tuple(axis.size for axis in self.axes)

    @property
    def labels(self) -> np.ndarray:
        """Of all axes, one after the other."""
        return np.concatenate([fixed(0), *(axis.labels for axis in self.axes)])

    def pick(self, positions: Sequence) -> "Value":
        """With only these of its axes, in their order."""
        return self._replace(axes=[self.axes[a] for a in positions])

    def drop(self, gone: Container[int]) -> "Value":
        """Without these of its axes."""
        return self.pick([a for a in range(len(self.axes)) if a not in gone])

    def put(self, position: int, axis: Axis) -> "Value":
        """With another axis at `position`."""
        axes = list(self.axes)
        axes[position] = axis
        return self._replace(axes=axes)


class Program(NamedTuple):
    """A walked jaxpr: what is known of its variables, and of the jaxprs inside its equations."""

    jaxpr: Any
    consts: Sequence
    values: dict  # a Value for each variable
    inner: list[list]  # of each equation, in the order in which they run
    zeroed: list[list[int]]  # of each, the axes of its first operand to make removed entries 0 on
    stand_ins: StandIns

    def known(self, variables: Sequence) -> list[Value]:
        """What is known of these variables; of a literal, its shape."""
        return [whole(var.aval) if is_literal(var) else self.values[var] for var in variables]

    def equations(self) -> Iterator:
        """Each equation with the programs inside of it."""
        return zip(self.jaxpr.eqns, self.inner)


class Order:
    """Inputs in the order in which something is first done with them."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._bits = 0

    def note(self, sources: int) -> None:
        """It is done with the inputs of these bits."""
        fresh = sources & ~self._bits
        self._bits |= fresh
        while fresh:
            lowest = fresh & -fresh
            self.numbers.append(lowest.bit_length() - 1)
            fresh ^= lowest

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of the inputs with names, which come first."""
        known = dict(enumerate(names))
        return [known[number] for number in self.numbers if number in known]


@functools.lru_cache(maxsize=4096)
def fixed(size: int) -> np.ndarray:
    """Labels of an axis that keeps all its entries."""
    return np.zeros(size, LABEL)


def whole(aval: Any) -> Value:
    """Of an array of which nothing may be removed."""
    shape = getattr(aval, "shape", ())
    return Value([Axis(fixed(size), False) for size in shape])


def nowhere_zero(value: Value) -> Value:
    """The array, but removed entries need not be zero."""
    axes = [axis._replace(zero=False) for axis in value.axes]
    return value._replace(axes=axes, constant=None)


def is_literal(var: Any) -> bool:
    """Whether a jaxpr holds the value itself in place of a variable."""
    return isinstance(var, core.Literal)
