"""Scans over layers, run layer by layer.

A scan takes stacked arrays apart, one entry per turn. If they are apart from the start, each layer
may have channels of its own. All else in a program stays as it is.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from sparsity_jax.channels import execute
from sparsity_jax.channels.values import Program, is_literal
from sparsity_jax.channels.walk import INNER, Walk, loop_operands

__all__ = ["Layers", "Stacks", "run", "scanned", "whole"]

_KEPT = ("custom_jvp_call", "custom_vjp_call", "shard_map")  # run as they are
_ENTERED = set(INNER).difference(_KEPT)
_LOOPS = ("scan", "while", "cond")
_REMAT = ("remat", "remat2", "checkpoint")
_ELEMENTWISE = ("convert_element_type", "copy")
_MOVING = ("transpose", *_ELEMENTWISE)  # what may be done with a stacked array before its scan


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class Layers:
    """A stacked array, apart: what is at each position along `axis`."""

    arrays: Sequence
    axis: int = 0

    @property
    def dtype(self) -> Any:
        """Of the stacked array."""
        return self.arrays[0].dtype


def whole(item: Any) -> Any:
    """The stacked array of layers; any other array as it is."""
    if isinstance(item, Layers):
        return jnp.stack(item.arrays, item.axis)
    return item


def _apart(array: Any, axis: int) -> list:
    """What is at each position along an axis; of a shape struct, the shapes."""
    count = array.shape[axis]
    before = (slice(None),) * axis
    take = lambda array: [array[(*before, i)] for i in range(count)]
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.eval_shape(take, array)
    return take(array)


class Stacks(NamedTuple):
    """Which variables are stacked arrays of layers."""

    axes: dict[int, int]  # by number of a variable, the axis that scans take it apart along
    shapes: list  # of all variables, in flattening order

    def split(self, arrays: Iterable) -> list:
        """All variables, a list of arrays for each that is stacked."""
        leaves = list(arrays)
        for number, axis in self.axes.items():
            leaves[number] = _apart(leaves[number], axis)
        return leaves

    def joined(self, arrays: Iterable) -> list:
        """All variables, `Layers` for those that are stacked. arrays: of `split`, flat."""
        rest = iter(arrays)
        leaves: list = []
        for number, struct in enumerate(self.shapes):
            if number in self.axes:
                axis = self.axes[number]
                layers = itertools.islice(rest, struct.shape[axis])
                leaves.append(Layers(list(layers), axis))
            else:
                leaves.append(next(rest))
        return leaves

    def results(self, outs: Iterable, renewed: Mapping[int, int]) -> list:
        """Results without `Layers`: new values of stacked variables are lists, as these are.

        renewed: numbers of results, each with that of the variable.
        """
        results = []
        for number, out in enumerate(outs):
            axis = self.axes.get(renewed.get(number, -1))
            if axis is None:
                out = whole(out)
            elif isinstance(out, Layers) and out.axis == axis:
                out = out.arrays
            else:
                out = _apart(whole(out), axis)
            results.append(out)
        return results


# Which arrays are stacked ------------------------------------------------------------------------


class _Stacked(NamedTuple):
    """A variable of the program that is an input, or one with its axes in another order."""

    number: int
    axes: tuple[int, ...]  # of the input

    def after(self, eqn: Any) -> "_Stacked":
        """What an equation of `_MOVING` makes of it."""
        if eqn.primitive.name == "transpose":
            axes = tuple(self.axes[a] for a in eqn.params["permutation"])
            return self._replace(axes=axes)
        return self


_Operands = list[_Stacked | None]
_Use = tuple[int, int | None]  # number of an input, and the axis if a scan takes it apart


def scanned(walk: Walk) -> dict[int, int]:
    """The inputs that scans take apart and that nothing else reads, each with the axis.

    A scan that also takes apart fractions computed from data goes along these, such as time: it
    stays.
    """
    known = {}
    for number, var in enumerate(walk.program.jaxpr.invars):
        if not walk.data >> number & 1:
            known[var] = _Stacked(number, tuple(range(var.aval.ndim)))
    axes = collections.defaultdict(set)
    for number, axis in _uses(walk, walk.program, known):
        axes[number].add(axis)
    result = {}
    for number, (axis, *others) in axes.items():
        if axis is not None and not others:
            result[number] = axis
    return result


def _uses(walk: Walk, program: Program, known: dict) -> Iterator[_Use]:
    """What a program does with inputs. known: which of its variables are inputs."""
    for eqn, inner in program.equations():
        name = eqn.primitive.name
        operands = [None if is_literal(var) else known.get(var) for var in eqn.invars]
        stacked = list(filter(None, operands))
        if not stacked:
            continue
        if name in _MOVING:
            (out,) = eqn.outvars
            known[out] = stacked[0].after(eqn)
        elif name in _ENTERED:
            yield from _uses_in_turns(walk, program, eqn, operands)
            for body, given in zip(inner, _operands_inside(eqn, operands), strict=True):
                variables = zip(body.jaxpr.invars, given)
                inside = {var: item for var, item in variables if item}
                yield from _uses(walk, body, inside)
        else:
            yield from ((item.number, None) for item in stacked)


def _operands_inside(eqn: Any, operands: _Operands) -> Iterator[_Operands]:
    """The operands that stay what they are in each program inside of an equation."""
    name = eqn.primitive.name
    if name == "cond":
        for _ in eqn.params["branches"]:
            yield operands[1:]
    elif name in _LOOPS:
        given = loop_operands(eqn, operands)
        if name == "while":
            yield given.for_test
        yield given.consts
    else:
        yield operands


def _uses_in_turns(walk: Walk, program: Program, eqn: Any, operands: _Operands) -> Iterator[_Use]:
    """What a loop does with inputs that change from turn to turn."""
    if eqn.primitive.name not in ("scan", "while"):
        return
    given = loop_operands(eqn, operands)
    for item in filter(None, given.carry):
        yield item.number, None
    variables = loop_operands(eqn, eqn.invars).scanned
    along_data = any(_is_data(walk, program, var) for var in variables)
    for item in filter(None, given.scanned):
        first, *_ = item.axes
        yield item.number, None if along_data else first


def _is_data(walk: Walk, program: Program, var: Any) -> bool:
    """Whether an operand has fractions computed from data; keys and counters have none."""
    (value,) = program.known([var])
    inexact = jnp.issubdtype(var.aval.dtype, jnp.inexact)
    return inexact and value.sources & walk.data != 0


# Running layer by layer --------------------------------------------------------------------------


class _Unrolling(execute.Zeroing):
    """Runs a program, nothing of which is removed, on arrays and `Layers`."""

    def equation(
        self, program: Program, eqn: Any, ins: execute.Arrays, inner: list
    ) -> execute.Arrays:
        info = eqn.source_info
        names = source_info_util.current_name_stack() + info.name_stack
        with source_info_util.user_context(info.traceback, name_stack=names):
            return self._equation(program, eqn, ins, inner)

    def _equation(
        self, program: Program, eqn: Any, ins: execute.Arrays, inner: list
    ) -> execute.Arrays:
        name = eqn.primitive.name
        if not any(isinstance(item, Layers) for item in ins):
            return _as_it_is(eqn, ins)
        if name in _MOVING:
            return [_moved(eqn, *ins)]
        if name == "scan" and any(map(_is_apart, loop_operands(eqn, ins).scanned)):
            return _unrolled(self, eqn, ins, inner)
        if name in _LOOPS:
            inside = _Inside(*self)
            ins = _whole_in_turns(eqn, ins)
            return execute.Zeroing.equation(inside, program, eqn, ins, inner)
        if name in _ENTERED:
            return super().equation(program, eqn, ins, inner)
        return _as_it_is(eqn, list(map(whole, ins)))


class _Inside(_Unrolling):
    """The same inside of a loop or branch, whose results have one structure in all turns."""

    def results(self, outs: list) -> list:
        return list(map(whole, outs))


def run(walk: Walk, arrays: Sequence) -> list:
    """Results of a walked program, of arrays and `Layers` as its inputs; some may be `Layers`."""
    nothing = np.zeros(walk.labels.num, bool)
    return execute.run(_Unrolling(walk.labels, nothing), walk.program, *arrays)


def _as_it_is(eqn: Any, ins: execute.Arrays) -> execute.Arrays:
    primitive = eqn.primitive
    params = eqn.params
    if primitive.name in _REMAT:  # a scan does without, as it separates its turns itself
        params = params | dict(prevent_cse=True)
    outs = primitive.bind(*ins, **primitive.get_bind_params(params))
    return outs if primitive.multiple_results else [outs]


def _is_apart(item: Any) -> bool:
    return isinstance(item, Layers) and item.axis == 0


def _moved(eqn: Any, layers: Layers) -> Layers:
    """The result of an equation of `_MOVING`, layer by layer."""
    axis = layers.axis
    params = eqn.params
    if eqn.primitive.name == "transpose":
        order = params["permutation"]
        rest = [a - (a > axis) for a in order if a != axis]
        params = dict(permutation=tuple(rest))
        axis = order.index(axis)
    arrays = [eqn.primitive.bind(array, **params) for array in layers.arrays]
    return Layers(arrays, axis)


def _unrolled(alive: _Unrolling, eqn: Any, ins: execute.Arrays, inner: list) -> execute.Arrays:
    """A scan as its turns, one after the other."""
    given = loop_operands(eqn, ins)
    carry = given.carry
    parts = []
    for item in given.scanned:
        if not _is_apart(item):
            item = Layers(_apart(whole(item), 0))
        parts.append(item.arrays)
    turns = list(zip(*parts, strict=True))
    order = 1
    if eqn.params["reverse"]:
        order = -1
    outs = []
    for each in turns[::order]:
        results = execute.run(alive, *inner, *given.consts, *carry, *each)
        carry = results[: len(carry)]
        per_turn = results[len(carry) :]
        outs.append(list(map(whole, per_turn)))
    stacked = map(list, zip(*outs[::order]))
    return [*carry, *map(Layers, stacked)]


def _whole_in_turns(eqn: Any, ins: execute.Arrays) -> list:
    """Operands of a loop or branch: those that change from turn to turn are whole."""
    if eqn.primitive.name == "cond":
        return list(ins)
    given = loop_operands(eqn, ins)
    carry = map(whole, given.carry)
    per_turn = map(whole, given.scanned)
    return [*given.for_test, *given.consts, *carry, *per_turn]
