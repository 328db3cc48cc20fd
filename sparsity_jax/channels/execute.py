"""A walked program run without its removed entries: same equations, smaller arrays.

Most equations take their sizes from their operands. `RESIZES` has those with sizes among their
parameters, `RUNS` those with jaxprs inside that are more than a call, and `DRAWS` those that run at
the full size and are then cut.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax.channels.labels import Labels
from sparsity_jax.channels.values import Axis, Program, Value, is_literal, nowhere_zero
from sparsity_jax.channels.walk import INNER, Walk, loop_operands
from sparsity_jax.types import Fields, Shape

Arrays = Sequence[Any]
FLOAT0 = jax.dtypes.float0


class Alive(NamedTuple):
    """Which labels live. removed: simple labels that die."""

    labels: Labels
    removed: set[int]

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """bool, of the labels' shape: the entries that stay."""
        if not self.removed or not labels.any():
            return np.ones(labels.shape, bool)
        unique, inverse = np.unique(self.labels.find(labels), return_inverse=True)
        parts = map(self.labels.parts, unique.tolist())
        lives = np.array([self.removed.isdisjoint(labels) for labels in parts])
        return lives[inverse].reshape(labels.shape)

    def shape(self, value: Value) -> Shape:
        if not self.removed:
            return value.shape
        return tuple(self.count(axis) for axis in value.axes)

    def count(self, axis: Axis, end: int | None = None) -> int:
        """How many entries stay, of those before `end`."""
        return int(self(axis.labels)[:end].sum())

    def cut(self, array: Any, value: Value) -> Any:
        for position, axis in enumerate(value.axes):
            kept = self(axis.labels)
            if not kept.all():
                array = jnp.take(array, np.flatnonzero(kept), position)
        return array


def run(alive: Alive, program: Program, *arrays: Any) -> list[Any]:
    """Results of the program for inputs that have the living entries only."""
    jaxpr = program.jaxpr
    consts = map(alive.cut, program.consts, program.known(jaxpr.constvars))
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arrays), strict=True))
    last: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        last |= dict.fromkeys(_variables(eqn.invars), eqn)
    for eqn, inner in program.equations():
        ins = _read(env, eqn.invars)
        outs = _run_equation(alive, program, eqn, ins, inner)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in _variables(eqn.invars):
            if last[var] is eqn and var not in jaxpr.outvars:
                env.pop(var, None)
    return _read(env, jaxpr.outvars)


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [var for var in atoms if not is_literal(var)]


def _read(env: dict, atoms: Sequence[Any]) -> list[Any]:
    return [var.val if is_literal(var) else env[var] for var in atoms]


def _run_equation(
    alive: Alive, program: Program, eqn: Any, ins: Arrays, inner: list[Program]
) -> Arrays:
    name, params = eqn.primitive.name, eqn.params
    if name in INNER:
        return RUNS.get(name, _run_call)(alive, eqn, ins, inner)
    results = program.known(eqn.outvars)
    if name in RESIZES:
        sizes = Sizes(alive, params, program.known(eqn.invars), results)
        params = {**params, **RESIZES[name](sizes)}
    outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(params))
    if not eqn.primitive.multiple_results:
        outs = [outs]
    return list(map(alive.cut, outs, results)) if name in DRAWS else outs


# Parameters of equations that hold sizes ---------------------------------------------------------


class Sizes(NamedTuple):
    """What new parameters of an equation are made from."""

    alive: Alive
    params: Fields  # of the full size
    ins: list[Value]
    outs: list[Value]


Resize = Callable[[Sizes], Fields]


def resizes_to(name: str) -> Resize:
    """For a parameter that is the shape of the result."""

    def resize(at: Sizes) -> Fields:
        return {name: at.alive.shape(at.outs[0])}

    return resize


def _limits(at: Sizes) -> Fields:
    changed = {}
    for name in ("start_indices", "limit_indices"):
        changed[name] = tuple(map(at.alive.count, at.ins[0].axes, at.params[name]))
    return changed


def _paddings(at: Sizes) -> Fields:
    config = []
    for axis, (low, high, inside) in zip(at.outs[0].axes, at.params["padding_config"]):
        kept = at.alive(axis.labels)
        if low > 0:
            low = int(kept[:low].sum())
        if high > 0:
            high = int(kept[-high:].sum())
        config.append((low, high, inside))
    return dict(padding_config=tuple(config))


def _groups(at: Sizes) -> Fields:
    outputs = at.ins[1].axes[at.params["dimension_numbers"].rhs_spec[0]]
    rows = at.alive(outputs.labels).reshape(at.params["feature_group_count"], -1)
    return dict(feature_group_count=int(rows.any(1).sum()))


def _split_sizes(at: Sizes) -> Fields:
    axis = at.params["axis"]
    return dict(sizes=tuple(at.alive.count(out.axes[axis]) for out in at.outs))


def _slice_sizes(at: Sizes) -> Fields:
    sizes = []
    for axis, size in zip(at.ins[0].axes, at.params["slice_sizes"], strict=True):
        sizes.append(at.alive.count(axis) if size == axis.size else size)
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
DRAWS = ("random_bits",)  # drawn in full, then cut: other sizes would be other numbers


# Equations with jaxprs inside --------------------------------------------------------------------


def _run_call(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    return run(alive, *inner, *ins)


def _run_remat(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    function = functools.partial(run, alive, *inner)
    again = jax.checkpoint(
        function, policy=eqn.params.get("policy"), prevent_cse=eqn.params.get("prevent_cse", True)
    )
    return again(*ins)


def _run_scan(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    given = loop_operands(eqn, ins)

    def turn(carry: list, each: list) -> tuple[list, list]:
        outs = run(alive, *inner, *given.consts, *carry, *each)
        return outs[: len(carry)], outs[len(carry) :]

    carry, outs = jax.lax.scan(
        turn,
        given.carry,
        given.scanned,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *outs]


def _run_while(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    given = loop_operands(eqn, ins)
    test, body = inner

    def goes_on(carry: list) -> Any:
        (decision,) = run(alive, test, *given.for_test, *carry)
        return decision

    def turn(carry: list) -> list:
        return run(alive, body, *given.consts, *carry)

    return jax.lax.while_loop(goes_on, turn, given.carry)


def _run_cond(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    branches = [functools.partial(run, alive, program) for program in inner]
    return jax.lax.switch(ins[0], branches, *ins[1:])


# Functions with a hand-written derivative --------------------------------------------------------


def _inexact(variables: Sequence[Any]) -> list[int]:
    """Numbers of those with a fraction."""
    dtypes = [var.aval.dtype for var in variables]
    return [i for i, dtype in enumerate(dtypes) if jnp.issubdtype(dtype, jnp.inexact)]


def _take(items: Sequence, numbers: list[int]) -> list:
    return [items[i] for i in numbers]


def _put(items: Sequence, numbers: list[int], values: Sequence) -> list:
    """`items` with others at these numbers."""
    result = list(items)
    for i, value in zip(numbers, values, strict=True):
        result[i] = value
    return result


def _flat(arrays: Sequence[Any]) -> list[np.ndarray]:
    """Slopes of arrays that have none."""
    return [np.zeros(array.shape, FLOAT0) for array in arrays]


def _beside(
    alive: Alive, function: Callable, known: list[Value], wanted: list[Value], arrays: Arrays
) -> list[Any]:
    """Results of another function of arrays in the program, e.g. a derivative, at the smaller
    sizes.

    known, wanted: what its operands and its results correspond to. Raises ValueError if it would
    couple more entries than the program does: then it has no meaning without the removed ones.
    """
    pairs = zip(known, arrays, strict=True)
    structs = [jax.ShapeDtypeStruct(value.shape, array.dtype) for value, array in pairs]
    walk = Walk(alive.labels.copy())
    program = walk.closed(jax.make_jaxpr(function)(*structs), known)
    for value, other in zip(walk.results(program), wanted, strict=True):
        walk.tie(value, other)
    inside = Alive(walk.labels, alive.removed)
    for value in (*known, *wanted):
        if inside.shape(value) != alive.shape(value):
            raise ValueError(
                "the hand-written derivative of a jax.custom_jvp or custom_vjp function couples "
                "channels that the function itself does not: it cannot be evaluated without the "
                "removed ones."
            )
    return run(inside, program, *arrays)


def _run_custom(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    """The function with its own derivative: relu has slope 0 at 0, which max(x, 0) has not, and a
    straight-through rounding slope 1. The derivative evaluates the function anew."""
    (program,) = inner
    primitive, count = eqn.primitive, len(ins)
    moving, steep = _inexact(eqn.invars), _inexact(eqn.outvars)
    operands = program.known(program.jaxpr.invars)
    operands = [value._replace(constant=None) for value in operands]
    results = program.known(program.jaxpr.outvars)

    def at_full_size(primals: Arrays) -> tuple:
        """The equation as a function of the operands with a fraction; these."""
        params = primitive.get_bind_params(eqn.params)
        whole = lambda *moved: primitive.bind(*_put(primals, moving, moved), **params)
        return whole, *_take(primals, moving)

    def push(*arrays: Any) -> list[Any]:
        whole, *moved = at_full_size(arrays[:count])
        outs, slopes = jax.jvp(whole, moved, list(arrays[count:]))
        return [*outs, *_take(slopes, steep)]

    def pull(*arrays: Any) -> tuple:
        outs, pulled = jax.vjp(*at_full_size(arrays[:count]))
        return pulled(_put(_flat(outs), steep, arrays[count:]))

    def derivative(primals: tuple, tangents: tuple) -> tuple[list, list]:
        known = operands + _take(operands, moving)
        wanted = results + _take(results, steep)
        both = _beside(alive, push, known, wanted, [*primals, *_take(tangents, moving)])
        outs = both[: len(results)]
        return outs, _put(_flat(outs), steep, both[len(results) :])

    def forward(*primals: Any) -> tuple[Any, tuple]:
        return function(*primals), primals

    def backward(primals: tuple, slopes: list) -> tuple:
        # Slopes along removed channels need not be zero, even if the entries are.
        known = [*operands, *map(nowhere_zero, _take(results, steep))]
        wanted = _take(operands, moving)
        pulled = _beside(alive, pull, known, wanted, [*primals, *_take(slopes, steep)])
        return tuple(_put([None] * count, moving, pulled))

    function: Any = functools.partial(run, alive, program)
    if primitive.name == "custom_jvp_call":
        function = jax.custom_jvp(function)
        function.defjvp(derivative)
    else:
        function = jax.custom_vjp(function)
        function.defvjp(forward, backward)
    return function(*ins)


RUNS: dict[str, Callable] = {
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _run_remat),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _run_custom),
    "scan": _run_scan,
    "while": _run_while,
    "cond": _run_cond,
}
