"""A walked program run without its removed entries: same equations, smaller arrays.

Most equations take their sizes from their operands. `RESIZES` has those with sizes among their
parameters, `_RUNS` those with jaxprs inside that are more than a call, and `_DRAWS` those that run
at the full size and are then cut.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax.channels import symbolic
from sparsity_jax.channels.labels import Labels, with_room
from sparsity_jax.channels.rules import Values
from sparsity_jax.channels.values import Axis, Program, Value, is_literal, nowhere_zero
from sparsity_jax.channels.walk import INNER, Walk, loop_operands
from sparsity_jax.types import Fields, Shape

__all__ = ["RESIZES", "Alive", "Arrays", "Resize", "Sizes", "resizes_to", "run"]

Arrays = Sequence


class Alive(NamedTuple):
    """Which labels live. removed: bool by label, the simple ones that die."""

    labels: Labels
    removed: np.ndarray

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """bool, of the labels' shape: the entries that stay."""
        if not labels.any():
            return np.ones(labels.shape, bool)
        roots = self.labels.find(labels)
        parts = self.labels.parts(roots)
        return ~self.removed[parts].any(-1)

    def shape(self, value: Value) -> Shape:
        return tuple(map(self.count, value.axes))

    def count(self, axis: Axis, end: int | None = None) -> int:
        """How many entries stay, of those before `end`."""
        return int(self(axis.labels)[:end].sum())

    def full_size(self, axis: Axis, size: Any) -> Any:
        """Of an axis that has `size` entries left, maybe a symbolic number of them."""
        return symbolic.scaled(size, self.count(axis), axis.size)

    def cut(self, array: Any, value: Value) -> Any:
        """The living entries of an array; raises ValueError for a symbolic number of them."""
        for position, axis in enumerate(value.axes):
            kept = self(axis.labels)
            if not kept.all():
                symbolic.check_number(array.shape[position])
                entries = np.flatnonzero(kept)
                array = array.take(entries, position)
        return array


def run(alive: Alive, program: Program, *arrays: Any) -> list:
    """Results of the program for inputs that have the living entries only."""
    jaxpr = program.jaxpr
    known = program.known(jaxpr.constvars)
    consts = map(alive.cut, program.consts, known)
    variables = (*jaxpr.constvars, *jaxpr.invars)
    env = dict(zip(variables, (*consts, *arrays), strict=True))
    last: dict = {}  # the equation after which a variable is not needed
    for eqn in jaxpr.eqns:
        last |= dict.fromkeys(_variables(eqn.invars), eqn)
    last |= dict.fromkeys(_variables(jaxpr.outvars))
    for eqn, inner in program.equations():
        ins = _read(env, eqn.invars)
        outs = _run_equation(alive, program, eqn, ins, inner)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in _variables(eqn.invars):
            if last[var] is eqn:
                env.pop(var, None)
    return [_result(env, var) for var in jaxpr.outvars]


def _variables(atoms: Arrays) -> list:
    return [var for var in atoms if not is_literal(var)]


def _read(env: dict, atoms: Arrays) -> list:
    return [var.val if is_literal(var) else env[var] for var in atoms]


def _result(env: dict, var: Any) -> Any:
    if is_literal(var):
        return jnp.asarray(var.val, var.aval.dtype)
    return env[var]


def _run_equation(alive: Alive, program: Program, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    primitive = eqn.primitive
    params = eqn.params
    name = primitive.name
    if name in INNER:
        run_inner = _RUNS.get(name, _run_call)
        return run_inner(alive, eqn, ins, inner)
    results = program.known(eqn.outvars)
    if name in RESIZES:
        operands = program.known(eqn.invars)
        full = symbolic.numbers(params, program.stand_ins)
        changed = RESIZES[name](Sizes(alive, full, operands, results))
        if program.stand_ins:
            changed = symbolic.restored(changed, full, params)
        params = params | changed
    options = primitive.get_bind_params(params)
    outs = primitive.bind(*ins, **options)
    if not primitive.multiple_results:
        outs = [outs]
    if name in _DRAWS:
        outs = list(map(alive.cut, outs, results))
    return outs


# Parameters of equations that hold sizes ---------------------------------------------------------


class Sizes(NamedTuple):
    """What new parameters of an equation are made from."""

    alive: Alive
    params: Fields  # of the full size
    ins: Values
    outs: Values


Resize = Callable[[Sizes], Fields]


def resizes_to(name: str) -> Resize:
    """For a parameter that is the shape of the result."""

    def resize(at: Sizes) -> Fields:
        return {name: at.alive.shape(at.outs[0])}

    return resize


def _limits(at: Sizes) -> Fields:
    (x,) = at.ins
    changed = {}
    for name in ("start_indices", "limit_indices"):
        counts = map(at.alive.count, x.axes, at.params[name])
        changed[name] = tuple(counts)
    return changed


def _paddings(at: Sizes) -> Fields:
    (out,) = at.outs
    config = []
    for axis, (low, high, inside) in zip(out.axes, at.params["padding_config"]):
        if high > 0:
            before = at.alive.count(axis, -high)
            high = at.alive.count(axis) - before
        if low > 0:
            low = at.alive.count(axis, low)
        config.append((low, high, inside))
    return dict(padding_config=tuple(config))


def _groups(at: Sizes) -> Fields:
    position, *_ = at.params["dimension_numbers"].rhs_spec
    outputs = at.ins[1].axes[position]
    kept = at.alive(outputs.labels)
    rows = kept.reshape(at.params["feature_group_count"], -1)
    number = rows.any(1).sum()
    return dict(feature_group_count=int(number))


def _split_sizes(at: Sizes) -> Fields:
    position = at.params["axis"]
    axes = [out.axes[position] for out in at.outs]
    return dict(sizes=tuple(map(at.alive.count, axes)))


def _slice_sizes(at: Sizes) -> Fields:
    sizes = []
    for axis, size in zip(at.ins[0].axes, at.params["slice_sizes"], strict=True):
        if size == axis.size:
            size = at.alive.count(axis)
        sizes.append(size)
    return dict(slice_sizes=tuple(sizes))


RESIZES: dict[str, Resize] = {
    "broadcast_in_dim": resizes_to("shape"),
    "iota": resizes_to("shape"),
    "reshape": resizes_to("new_sizes"),
    "slice": _limits,
    "split": _split_sizes,
    "pad": _paddings,
    "conv_general_dilated": _groups,
    "gather": _slice_sizes,
    "dynamic_slice": _slice_sizes,
}
_DRAWS = ("random_bits",)  # drawn in full, then cut: other sizes would be other numbers


# Equations with jaxprs inside --------------------------------------------------------------------


def _run_call(alive: Alive, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    return run(alive, *inner, *ins)


def _options(eqn: Any, *names: str) -> Fields:
    """Those of the parameters `names` that an equation has."""
    return {name: eqn.params[name] for name in names if name in eqn.params}


def _run_remat(alive: Alive, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    function = functools.partial(run, alive, *inner)
    options = _options(eqn, "policy", "prevent_cse")
    return jax.checkpoint(function, **options)(*ins)


def _run_scan(alive: Alive, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    given = loop_operands(eqn, ins)
    count = len(given.carry)

    def turn(carry: list, each: list) -> tuple[list, list]:
        outs = run(alive, *inner, *given.consts, *carry, *each)
        return outs[:count], outs[count:]

    options = _options(eqn, "reverse", "unroll")
    if not given.scanned:
        options |= _options(eqn, "length")
    carry, outs = jax.lax.scan(turn, given.carry, given.scanned, **options)
    return [*carry, *outs]


def _run_while(alive: Alive, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    given = loop_operands(eqn, ins)
    test, body = inner

    def goes_on(carry: list) -> Any:
        (decision,) = run(alive, test, *given.for_test, *carry)
        return decision

    def turn(carry: list) -> list:
        return run(alive, body, *given.consts, *carry)

    return jax.lax.while_loop(goes_on, turn, given.carry)


def _run_cond(alive: Alive, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    number, *operands = ins
    branches = [functools.partial(run, alive, program) for program in inner]
    return jax.lax.switch(number, branches, *operands)


# Functions with a hand-written derivative --------------------------------------------------------


def _has_slope(array: Any) -> bool:
    """Whether an array has a fraction, and so a slope."""
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _of_slopes(items: Iterable, arrays: Arrays) -> list:
    """The items of those arrays that have slopes."""
    return list(itertools.compress(items, map(_has_slope, arrays)))


def _slopes(given: Iterable, arrays: Arrays) -> list:
    """A slope for each array: the given ones for those that have slopes."""
    slopes = iter(given)
    result = []
    for array in arrays:
        if _has_slope(array):
            result.append(next(slopes))
        else:
            result.append(np.zeros(array.shape, jax.dtypes.float0))
    return result


def _beside(
    alive: Alive,
    stand_ins: symbolic.StandIns,
    function: Callable,
    known: list,
    wanted: list,
    arrays: Arrays,
) -> list:
    """Results of another function of arrays in the program, e.g. a derivative, at the smaller
    sizes.

    known, wanted: what its operands and its results correspond to. Raises ValueError if it would
    couple more entries than the program does: then it has no meaning without the removed ones.
    """
    structs = []
    for value, array in zip(known, arrays, strict=True):
        shape = list(map(alive.full_size, value.axes, array.shape))
        structs.append(jax.ShapeDtypeStruct(shape, array.dtype))
    closed = jax.make_jaxpr(function)(*structs)
    walk = Walk(alive.labels.copy())
    walk.stand_ins = stand_ins
    program = walk.closed(closed, known)
    for value, other in zip(walk.results(program), wanted, strict=True):
        walk.tie(value, other)
    removed = with_room(alive.removed, walk.labels.num)
    inside = Alive(walk.labels, removed)
    for value in (*known, *wanted):
        if inside.shape(value) != alive.shape(value):
            raise ValueError(
                "the hand-written derivative of a jax.custom_jvp or custom_vjp function couples "
                "channels that the function itself does not: it cannot be evaluated without the "
                "removed ones."
            )
    return run(inside, program, *arrays)


def _run_custom(alive: Alive, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    """The function with its own derivative: relu has slope 0 at 0, which max(x, 0) has not, and a
    straight-through rounding slope 1. The derivative evaluates the function anew."""
    (program,) = inner
    primitive = eqn.primitive
    count = len(ins)
    params = primitive.get_bind_params(eqn.params)
    whole = lambda *operands: primitive.bind(*operands, **params)
    operands = program.known(program.jaxpr.invars)
    operands = [value._replace(constant=None) for value in operands]
    results = program.known(program.jaxpr.outvars)
    types = [var.aval for var in eqn.outvars]
    operand_slopes = _of_slopes(operands, [var.aval for var in eqn.invars])
    result_slopes = _of_slopes(results, types)

    def push(*arrays: Any) -> list:
        primals = list(arrays[:count])
        slopes = _slopes(arrays[count:], primals)
        outs, pushed = jax.jvp(whole, primals, slopes)
        return [*outs, *_of_slopes(pushed, outs)]

    def pull(*arrays: Any) -> list:
        primals = arrays[:count]
        outs, pulled = jax.vjp(whole, *primals)
        slopes = _slopes(arrays[count:], outs)
        return _of_slopes(pulled(slopes), primals)

    def derivative(primals: tuple, tangents: tuple) -> tuple:
        arrays = [*primals, *_of_slopes(tangents, primals)]
        known = operands + operand_slopes
        wanted = results + result_slopes
        both = _beside(alive, program.stand_ins, push, known, wanted, arrays)
        outs = both[: len(results)]
        slopes = both[len(results) :]
        return outs, _slopes(slopes, outs)

    def forward(*primals: Any) -> tuple:
        return function(*primals), primals

    def backward(primals: tuple, slopes: list) -> tuple:
        # Slopes along removed channels need not be zero, even if the entries are.
        known = [*operands, *map(nowhere_zero, result_slopes)]
        arrays = [*primals, *_of_slopes(slopes, types)]
        pulled = _beside(alive, program.stand_ins, pull, known, operand_slopes, arrays)
        return tuple(_slopes(pulled, primals))

    function: Any = functools.partial(run, alive, program)
    if primitive.name == "custom_jvp_call":
        function = jax.custom_jvp(function)
        function.defjvp(derivative)
    else:
        function = jax.custom_vjp(function)
        function.defvjp(forward, backward)
    return function(*ins)


_RUNS: dict[str, Callable] = {
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _run_remat),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _run_custom),
    "scan": _run_scan,
    "while": _run_while,
    "cond": _run_cond,
}
