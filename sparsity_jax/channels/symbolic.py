"""Symbolic sizes, such as the `b` of a batch of any size: numbers that stand for them in a walk.

A program traced with symbolic sizes is walked as if each had a number that no other size is likely
to have; it runs with its own sizes.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax import export

from sparsity_jax.types import Fields, Shape

__all__ = ["StandIns", "check_number", "choose", "equation", "numbers", "restored", "scaled"]

StandIns = dict[str, Any]  # a number by name of a symbolic size
_FIRST = 101  # above most sizes of networks that are written as numbers
_MULTIPLES = 128


class _Typed(NamedTuple):
    """A variable of a jaxpr, as far as rules look at it."""

    aval: Any


def choose(shapes: Iterable[Shape]) -> StandIns:
    """Numbers for all names in the shapes, which meet the constraints on these.

    Raises ValueError if none are found.
    """
    sizes = list(filter(export.is_symbolic_dim, itertools.chain(*shapes)))
    if not sizes:
        return {}
    # what follows is no public interface of jax
    constraints = sizes[0].scope._explicit_constraints
    compared = [constraint.diff for constraint in constraints]
    names = sorted(set().union(*(size._get_vars() for size in (*sizes, *compared))))
    for candidate in _candidates(len(names)):
        stand_ins = dict(zip(names, candidate))
        differences = zip(constraints, numbers(compared, stand_ins))
        holds = all(
            value == 0 or (value > 0 and constraint.cmp.name == "GEQ")
            for constraint, value in differences
        )
        if holds and min(numbers(sizes, stand_ins)) > 0:
            return stand_ins
    raise ValueError(
        f"no numbers are found for the symbolic sizes {', '.join(names)}; allowed: constraints "
        f"that multiples of primes above {_FIRST} meet, or equal numbers up to {_MULTIPLES}."
    )


def _candidates(count: int) -> Iterator[list[int]]:
    """Numbers to try for `count` sizes: multiples of different primes, then small ones."""
    is_prime = lambda number: all(number % divisor for divisor in range(2, number))
    primes = list(itertools.islice(filter(is_prime, itertools.count(_FIRST)), count))
    for factor in range(1, _MULTIPLES + 1):
        yield [factor * prime for prime in primes]
    for number in range(_MULTIPLES, 0, -1):
        yield [number] * count


def numbers(tree: Any, stand_ins: StandIns) -> Any:
    """A tuple of sizes, or any parameters of an equation, with numbers for symbolic sizes."""
    if not stand_ins:
        return tree

    def number(leaf: Any) -> Any:
        if export.is_symbolic_dim(leaf):
            return int(leaf._evaluate(stand_ins))
        return leaf

    return jax.tree.map(number, tree)


def equation(eqn: Any, stand_ins: StandIns) -> Any:
    """An equation for rules to read, with numbers for symbolic sizes."""
    if not stand_ins:
        return eqn
    outs = []
    for var in eqn.outvars:
        aval = var.aval
        if hasattr(aval, "shape"):
            aval = aval.update(shape=numbers(aval.shape, stand_ins))
        outs.append(_Typed(aval))
    return eqn.replace(params=numbers(eqn.params, stand_ins), outvars=outs)


def restored(changed: Fields, full: Fields, own: Fields) -> Fields:
    """Changed parameters of an equation with its own symbolic sizes for their numbers.

    full: all parameters before the change, with numbers; own: with symbolic sizes. Raises
    ValueError as `scaled` does.
    """
    result = {}
    for name, value in changed.items():
        result[name] = jax.tree.map(scaled, own[name], full[name], value)
    return result


def scaled(size: Any, number: int, other: int) -> Any:
    """A size after what its number became another one.

    A symbolic size becomes the same part or multiple of itself, e.g. 4*b becomes 3*b where heads
    and examples share an axis. Raises ValueError if there is no such size.
    """
    if other == number:
        return size
    if not export.is_symbolic_dim(size):
        return other
    result, rest = divmod(size * other, number)
    if export.is_symbolic_dim(rest) or rest:
        check_number(size)
    return result


def check_number(size: Any) -> None:
    """Raises ValueError for a symbolic size, of an axis some entries of which are removed."""
    if export.is_symbolic_dim(size):
        raise ValueError(
            f"channels are entries of an axis of the symbolic size {size}, of which no fixed part "
            "can be removed; allowed: channels that have an axis of their own."
        )
