"""A walked program at other sizes of its inputs, such as another batch, without another walk.

It must have the same equations, differ in sizes alone, and only along axes that stay whole.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from sparsity_jax.channels.values import Axis, Program, Value, fixed, is_literal
from sparsity_jax.channels.walk import Walk, bodies
from sparsity_jax.types import Fields, Shape

__all__ = ["walked_like"]

_SIZES = """
shape new_sizes start_indices limit_indices slice_sizes sizes length fft_lengths reps padding_config
"""
_IGNORED = frozenset(_SIZES.split())  # parameters that are sizes


class _OtherError(Exception):
    """The program is another one."""


def walked_like(walk: Walk, closed: Any) -> Walk | None:
    """`walk` for a program of other sizes; None if that may need another walk."""
    shapes = [var.aval.shape for var in closed.jaxpr.invars]
    if walk.stand_ins or any(map(export.is_symbolic_dim, sum(shapes, ()))):
        return None
    try:
        program = _program(walk, walk.program, closed)
    except _OtherError:
        return None
    again = copy.copy(walk)
    again.program = program
    again.inputs = [program.values[var] for var in closed.jaxpr.invars]
    return again


def _program(walk: Walk, old: Program, closed: Any) -> Program:
    """A program with what is known of the variables of the old one. Raises _OtherError."""
    consts = getattr(closed, "consts", ())
    jaxpr = getattr(closed, "jaxpr", closed)
    program = Program(jaxpr, consts, {}, [], old.zeroed, {})
    names: dict = {}  # variables by those of the old program

    def define(variables: Sequence, others: Sequence) -> None:
        for variable, other in _pairs(variables, others):
            names[variable] = other
            value = old.values[variable]
            program.values[other] = _resized(walk, value, other.aval.shape)

    def compare(atoms: Sequence, others: Sequence) -> None:
        for atom, other in _pairs(atoms, others):
            if is_literal(atom) and is_literal(other):
                _require(_are_alike(atom.val, other.val))
            else:
                _require(not is_literal(atom) and names[atom] is other)

    define(old.jaxpr.constvars, jaxpr.constvars)
    define(old.jaxpr.invars, jaxpr.invars)
    for const, var in zip(consts, jaxpr.constvars):
        known = program.values[var].constant
        _require(known is None or bool(np.all(np.asarray(const) == known)))
    _require(len(old.jaxpr.eqns) == len(jaxpr.eqns))
    for (eqn, inner), other in zip(old.equations(), jaxpr.eqns):
        _require(eqn.primitive is other.primitive)
        _compare_params(eqn, other)
        compare(eqn.invars, other.invars)
        define(eqn.outvars, other.outvars)
        programs = [_program(walk, *pair) for pair in _pairs(inner, bodies(other))]
        program.inner.append(programs)
    compare(old.jaxpr.outvars, jaxpr.outvars)
    return program


def _require(holds: bool) -> None:
    if not holds:
        raise _OtherError


def _pairs(items: Sequence, others: Sequence) -> Iterable[tuple]:
    _require(len(items) == len(others))
    return zip(items, others)


def _resized(walk: Walk, value: Value, shape: Shape) -> Value:
    axes = []
    for axis, size in _pairs(value.axes, shape):
        if axis.size != size:
            _require(not walk.labels.is_live(axis.labels))
            axis = Axis(fixed(size), axis.zero, axis.origin, axis.cleared)
        axes.append(axis)
    return value._replace(axes=axes)


def _are_alike(number: Any, other: Any) -> bool:
    """Whether rules make the same of two numbers, e.g. of one over the number of examples."""
    if not np.isscalar(number):
        return bool(np.all(number == other))
    return number == other or number * other > 0


def _compare_params(eqn: Any, other: Any) -> None:
    """Raises _OtherError for parameters that differ in more than sizes."""
    own = _plain_params(eqn)
    others = _plain_params(other)
    _require(own == others)


def _plain_params(eqn: Any) -> Fields:
    """Those that are neither sizes nor functions; of paddings, whether there are any."""
    plain = {}
    for name, value in eqn.params.items():
        if name == "padding_config":
            plain[name] = np.sign(value).tolist()
        elif name == "padding" and eqn.primitive.name == "conv_general_dilated":
            continue
        elif name not in _IGNORED:
            leaves = jax.tree.leaves(value, is_leaf=_is_function)
            plain[name] = [leaf for leaf in leaves if not _is_function(leaf)]
    return plain


def _is_function(item: Any) -> bool:
    """Whether a parameter is a program, walked or not, or makes one."""
    is_traced = hasattr(item, "eqns") or hasattr(item, "call_wrapped")
    return is_traced or callable(item)
