"""A walked program run without its removed entries: same equations, smaller arrays.

Most equations take their sizes from their operands. `RESIZES` has those with sizes among their parameters, `RUNS`
those with jaxprs inside, and `DRAWS` those that run at the full size and are then cut.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax.channels.labels import FROZEN, Labels
from sparsity_jax.channels.values import Program, Value, is_literal
from sparsity_jax.channels.walk import Analysis, Walk, scan_operands, while_operands

Arrays = Sequence[Any]
Resize = Callable[["Alive", Any, list[Value], list[Value]], dict[str, Any]]
FLOAT0 = jax.dtypes.float0


class Alive:
    """Which labels live. removed: simple labels that die."""

    def __init__(self, labels: Labels, removed: set[int]):
        self.labels = labels
        self.removed = removed
        self._known: dict[int, bool] = {FROZEN: True}

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """bool, of the labels' shape: the entries that stay."""
        if not self.removed or not labels.any():
            return np.ones(labels.shape, bool)
        unique, inverse = np.unique(self.labels.find(labels), return_inverse=True)
        lives = np.array([self._lives(label) for label in unique.tolist()])
        return lives[inverse].reshape(labels.shape)

    def _lives(self, label: int) -> bool:
        if label not in self._known:
            parts = self.labels.parts(label)
            self._known[label] = self.removed.isdisjoint(parts)
        return self._known[label]

    def shape(self, value: Value) -> tuple[int, ...]:
        if not self.removed:
            return value.shape
        return tuple(int(self(axis.labels).sum()) for axis in value.axes)

    def cut(self, array: Any, value: Value) -> Any:
        for position, axis in enumerate(value.axes):
            kept = self(axis.labels)
            if not kept.all():
                array = jnp.take(array, np.flatnonzero(kept), position)
        return array


def run(analysis: Analysis, alive: Alive, arrays: Arrays) -> list[Any]:
    """Results of the analysed program for inputs that have the living entries only."""
    return _function(alive, analysis.consts, analysis.program)(*arrays)


def _function(alive: Alive, consts: Arrays, program: Program) -> Callable:
    """The program at the smaller sizes, as a function of its inputs there; consts: whole."""
    values = [program.values[var] for var in program.jaxpr.constvars]

    def function(*arrays: Any) -> list[Any]:
        return _run(alive, program, [*map(alive.cut, consts, values), *arrays])

    return function


def _inner(alive: Alive, closed: Any, program: Program) -> Callable:
    return _function(alive, getattr(closed, "consts", ()), program)


def _run(alive: Alive, program: Program, arrays: Arrays) -> list[Any]:
    """arrays: of the constants and the inputs."""
    jaxpr = program.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), arrays, strict=True))
    last = {}
    for number, eqn in enumerate(jaxpr.eqns):
        last |= dict.fromkeys(_variables(eqn.invars), number)
    for var in _variables(jaxpr.outvars):
        last.pop(var, None)
    for number, (eqn, inner) in enumerate(program.equations()):
        ins = [_read(env, var) for var in eqn.invars]
        outs = _run_equation(alive, program, eqn, ins, inner)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in _variables(eqn.invars):
            if last.get(var) == number:
                env.pop(var, None)
    return [_read(env, var) for var in jaxpr.outvars]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [var for var in atoms if not is_literal(var)]


def _read(env: dict, var: Any) -> Any:
    return var.val if is_literal(var) else env[var]


def _run_equation(alive: Alive, program: Program, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    name, params = eqn.primitive.name, eqn.params
    if name in RUNS:
        return RUNS[name](alive, eqn, ins, inner)
    if name in RESIZES:
        given = [program.value(var) for var in eqn.invars]
        results = [program.value(var) for var in eqn.outvars]
        params = {**params, **RESIZES[name](alive, eqn, given, results)}
    outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(params))
    if not eqn.primitive.multiple_results:
        outs = [outs]
    if name in DRAWS:
        values = [program.values[var] for var in eqn.outvars]
        outs = list(map(alive.cut, outs, values))
    return outs


# Parameters of equations that hold sizes ---------------------------------------------------------


def resizes_to(name: str) -> Resize:
    """For a parameter that is the shape of the result."""

    def resize(alive: Alive, eqn: Any, ins: list[Value], outs: list[Value]) -> dict[str, Any]:
        return {name: alive.shape(outs[0])}

    return resize


def _limits(alive: Alive, eqn: Any, ins: list[Value], outs: list[Value]) -> dict[str, Any]:
    changed = {}
    for name in ("start_indices", "limit_indices"):
        kept = []
        for axis, stop in zip(ins[0].axes, eqn.params[name], strict=True):
            kept.append(int(alive(axis.labels)[:stop].sum()))
        changed[name] = tuple(kept)
    return changed


def _paddings(alive: Alive, eqn: Any, ins: list[Value], outs: list[Value]) -> dict[str, Any]:
    config = []
    for (low, high, inside), axis in zip(eqn.params["padding_config"], outs[0].axes, strict=True):
        if min(low, high) >= 0 and not inside:
            kept = alive(axis.labels)
            start = len(kept) - high
            low, high = int(kept[:low].sum()), int(kept[start:].sum())
        config.append((low, high, inside))
    return dict(padding_config=tuple(config))


def _groups(alive: Alive, eqn: Any, ins: list[Value], outs: list[Value]) -> dict[str, Any]:
    groups = eqn.params["feature_group_count"]
    if groups == 1:
        return {}
    outputs = ins[1].axes[eqn.params["dimension_numbers"].rhs_spec[0]]
    kept = alive(outputs.labels).reshape(groups, -1)
    return dict(feature_group_count=int(kept.any(1).sum()))


def _split_sizes(alive: Alive, eqn: Any, ins: list[Value], outs: list[Value]) -> dict[str, Any]:
    sizes = [alive.shape(out)[eqn.params["axis"]] for out in outs]
    return dict(sizes=tuple(sizes))


def _slice_sizes(alive: Alive, eqn: Any, ins: list[Value], outs: list[Value]) -> dict[str, Any]:
    sizes = list(eqn.params["slice_sizes"])
    full, kept = ins[0].shape, alive.shape(ins[0])
    for d, size in enumerate(sizes):
        if size == full[d]:
            sizes[d] = kept[d]
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


def _run_call(name: str) -> Callable:
    def run_call(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
        return _inner(alive, eqn.params[name], inner[0])(*ins)

    return run_call


def _run_remat(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    options = {"policy": None, "prevent_cse": True}
    options = {name: eqn.params.get(name, default) for name, default in options.items()}
    function = _inner(alive, eqn.params["jaxpr"], inner[0])
    return jax.checkpoint(function, **options)(*ins)


def _run_scan(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    given = scan_operands(eqn, ins)
    body = _inner(alive, eqn.params["jaxpr"], inner[0])

    def turn(carry: tuple, each: tuple) -> tuple[tuple, tuple]:
        outs = body(*given.consts, *carry, *each)
        return tuple(outs[: len(carry)]), tuple(outs[len(carry) :])

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, outs = jax.lax.scan(turn, tuple(given.carry), tuple(given.scanned), **options)
    return [*carry, *outs]


def _run_while(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    given = while_operands(eqn, ins)
    test = _inner(alive, eqn.params["cond_jaxpr"], inner[0])
    body = _inner(alive, eqn.params["body_jaxpr"], inner[1])

    def goes_on(carry: tuple) -> Any:
        (decision,) = test(*given.for_test, *carry)
        return decision

    def turn(carry: tuple) -> tuple:
        return tuple(body(*given.consts, *carry))

    return jax.lax.while_loop(goes_on, turn, tuple(given.carry))


def _run_cond(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    def branch(function: Callable, *arrays: Any) -> tuple:
        return tuple(function(*arrays))

    branches = []
    for closed, program in zip(eqn.params["branches"], inner, strict=True):
        branches.append(functools.partial(branch, _inner(alive, closed, program)))
    return jax.lax.switch(ins[0], branches, *ins[1:])


# Functions with a hand-written derivative --------------------------------------------------------


class _Custom(NamedTuple):
    """A function that brings its own derivative."""

    alive: Alive
    eqn: Any
    plain: Callable  # at the smaller sizes
    operands: list[Value]
    results: list[Value]

    def at_full_size(self, primals: Arrays) -> tuple[Callable, list[int]]:
        """The equation as a function of the operands that it may be differentiated by; these."""
        params = self.eqn.primitive.get_bind_params(self.eqn.params)
        first = self.eqn.params["num_consts"]
        moving = [i for i, x in enumerate(primals) if i >= first and _is_inexact(x)]

        def function(*moved: Any) -> Any:
            operands = list(primals)
            for i, x in zip(moving, moved, strict=True):
                operands[i] = x
            return self.eqn.primitive.bind(*operands, **params)

        return function, moving


def _custom(alive: Alive, eqn: Any, program: Program) -> _Custom:
    plain = _inner(alive, eqn.params["call_jaxpr"], program)
    inputs = [program.values[var] for var in program.jaxpr.invars]
    operands = [value._replace(constant=None) for value in inputs]
    results = [program.value(var) for var in program.jaxpr.outvars]
    return _Custom(alive, eqn, plain, operands, results)


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _no_slope(array: Any) -> np.ndarray:
    return np.zeros(array.shape, FLOAT0)


def _beside(
    alive: Alive,
    function: Callable,
    known: Sequence[Value],
    wanted: Sequence[Value],
    arrays: Arrays,
) -> list[Any]:
    """Results of another function of arrays in the program, e.g. a derivative, at the smaller sizes.

    known, wanted: what its operands and its results correspond to. Raises ValueError if it would couple more
    entries than the program does: then it has no meaning without the removed ones.
    """
    structs = []
    for value, array in zip(known, arrays, strict=True):
        structs.append(jax.ShapeDtypeStruct(value.shape, array.dtype))
    closed = jax.make_jaxpr(function)(*structs)
    walk = Walk(alive.labels.copy())
    program = walk.closed(closed, known)
    for value, other in zip(walk.results(program), wanted, strict=True):
        walk.tie_all(value, other)
    inside = Alive(walk.labels, alive.removed)
    for value in (*known, *wanted):
        if inside.shape(value) != alive.shape(value):
            raise ValueError(
                "the hand-written derivative of a jax.custom_jvp or custom_vjp function couples channels that the "
                "function itself does not: it cannot be evaluated without the removed ones."
            )
    return _inner(inside, closed, program)(*arrays)


def _run_custom_jvp(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    """The function with its own derivative: relu has slope 0 at 0, which max(x, 0) has not."""
    custom = _custom(alive, eqn, inner[0])
    function = jax.custom_jvp(custom.plain)

    @function.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[list, list]:
        _, moving = custom.at_full_size(primals)

        def outs_and_slopes(*arrays: Any) -> list[Any]:
            full, _ = custom.at_full_size(arrays[: len(primals)])
            start = [arrays[i] for i in moving]
            outs, slopes = jax.jvp(full, start, list(arrays[len(primals) :]))
            return [*outs, *(slope for slope in slopes if slope.dtype != FLOAT0)]

        outs = custom.plain(*primals)
        steep = [i for i, out in enumerate(outs) if _is_inexact(out)]
        known = [*custom.operands, *(custom.operands[i] for i in moving)]
        wanted = [*custom.results, *(custom.results[i] for i in steep)]
        arrays = [*primals, *(tangents[i] for i in moving)]
        found = _beside(alive, outs_and_slopes, known, wanted, arrays)
        slopes = list(map(_no_slope, outs))
        for i, slope in zip(steep, found[len(outs) :], strict=True):
            slopes[i] = slope
        return found[: len(outs)], slopes

    return function(*ins)


def _run_custom_vjp(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    """The function with its own backward rule, which evaluates it anew: a straight-through rounding has slope 1."""
    custom = _custom(alive, eqn, inner[0])

    @jax.custom_vjp
    def function(*primals: Any) -> tuple:
        return tuple(custom.plain(*primals))

    def forward(*primals: Any) -> tuple[Any, tuple]:
        return function(*primals), primals

    def backward(primals: tuple, slopes: tuple) -> tuple:
        _, moving = custom.at_full_size(primals)
        steep = [i for i, slope in enumerate(slopes) if slope.dtype != FLOAT0]

        def pulled(*arrays: Any) -> tuple:
            full, _ = custom.at_full_size(arrays[: len(primals)])
            outs, pull = jax.vjp(full, *(arrays[i] for i in moving))
            given = list(map(_no_slope, outs))
            for i, slope in zip(steep, arrays[len(primals) :], strict=True):
                given[i] = slope
            return pull(given)

        # Slopes along removed channels need not be zero, even if the entries are.
        known = [*custom.operands, *(_slope_of(custom.results[i]) for i in steep)]
        wanted = [custom.operands[i] for i in moving]
        arrays = [*primals, *(slopes[i] for i in steep)]
        found = dict(zip(moving, _beside(alive, pulled, known, wanted, arrays), strict=True))
        return tuple(found.get(i) for i in range(len(primals)))

    function.defvjp(forward, backward)
    return function(*ins)


def _slope_of(value: Value) -> Value:
    axes = tuple(axis._replace(zero=False) for axis in value.axes)
    return value._replace(axes=axes, constant=None)


RUNS: dict[str, Callable] = {
    **dict.fromkeys(("jit", "pjit"), _run_call("jaxpr")),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _run_remat),
    **dict.fromkeys(("closed_call", "core_call"), _run_call("call_jaxpr")),
    "custom_jvp_call": _run_custom_jvp,
    "custom_vjp_call": _run_custom_vjp,
    "scan": _run_scan,
    "while": _run_while,
    "cond": _run_cond,
}
