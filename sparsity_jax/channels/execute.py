"""A walked program run without its removed entries: same equations, smaller arrays.

Most equations take their sizes from their operands. `RESIZES` has those with sizes among their
parameters, `RUNS` those with jaxprs inside, and `DRAWS` those that run at the full size and are
then cut.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax.channels.labels import FROZEN, Labels
from sparsity_jax.channels.values import Axis, Program, Value, is_literal, nowhere_zero
from sparsity_jax.channels.walk import Analysis, Walk, scan_operands, while_operands

Arrays = Sequence[Any]
Params = dict[str, Any]
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


def _run_equation(
    alive: Alive,
    program: Program,
    eqn: Any,
    ins: Arrays,
    inner: list[Program],
) -> Arrays:
    name, params = eqn.primitive.name, eqn.params
    if name in RUNS:
        return RUNS[name](alive, eqn, ins, inner)
    results = [program.value(var) for var in eqn.outvars]
    if name in RESIZES:
        given = [program.value(var) for var in eqn.invars]
        sizes = Sizes(alive, params, given, results)
        params = {**params, **RESIZES[name](sizes)}
    bound = eqn.primitive.get_bind_params(params)
    outs = eqn.primitive.bind(*ins, **bound)
    if not eqn.primitive.multiple_results:
        outs = [outs]
    if name in DRAWS:
        outs = list(map(alive.cut, outs, results))
    return outs


# Parameters of equations that hold sizes ---------------------------------------------------------


class Sizes(NamedTuple):
    """What new parameters of an equation are made from."""

    alive: Alive
    params: Params  # of the full size
    ins: list[Value]
    outs: list[Value]


Resize = Callable[[Sizes], Params]


def resizes_to(name: str) -> Resize:
    """For a parameter that is the shape of the result."""

    def resize(at: Sizes) -> Params:
        return {name: at.alive.shape(at.outs[0])}

    return resize


def _limits(at: Sizes) -> Params:
    changed = {}
    for name in ("start_indices", "limit_indices"):
        ends = zip(at.ins[0].axes, at.params[name], strict=True)
        changed[name] = tuple(at.alive.count(axis, end) for axis, end in ends)
    return changed


def _paddings(at: Sizes) -> Params:
    config = []
    given = at.params["padding_config"]
    for axis, (low, high, inside) in zip(at.outs[0].axes, given, strict=True):
        if min(low, high) >= 0 and not inside:
            end = at.alive.count(axis, axis.size - high)
            high = at.alive.count(axis) - end
            low = at.alive.count(axis, low)
        config.append((low, high, inside))
    return dict(padding_config=tuple(config))


def _groups(at: Sizes) -> Params:
    groups = at.params["feature_group_count"]
    if groups == 1:
        return {}
    spec = at.params["dimension_numbers"].rhs_spec
    outputs = at.ins[1].axes[spec[0]]
    rows = at.alive(outputs.labels).reshape(groups, -1)
    return dict(feature_group_count=int(rows.any(1).sum()))


def _split_sizes(at: Sizes) -> Params:
    axis = at.params["axis"]
    sizes = tuple(at.alive.count(out.axes[axis]) for out in at.outs)
    return dict(sizes=sizes)


def _slice_sizes(at: Sizes) -> Params:
    sizes = []
    for axis, size in zip(at.ins[0].axes, at.params["slice_sizes"], strict=True):
        whole = size == axis.size
        sizes.append(at.alive.count(axis) if whole else size)
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
    function = _inner(alive, eqn.params["jaxpr"], inner[0])
    again = jax.checkpoint(
        function,
        policy=eqn.params.get("policy"),
        prevent_cse=eqn.params.get("prevent_cse", True),
    )
    return again(*ins)


def _run_scan(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    given = scan_operands(eqn, ins)
    body = _inner(alive, eqn.params["jaxpr"], inner[0])

    def turn(carry: list, each: list) -> tuple[list, list]:
        outs = body(*given.consts, *carry, *each)
        end = len(carry)
        return outs[:end], outs[end:]

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
    given = while_operands(eqn, ins)
    test = _inner(alive, eqn.params["cond_jaxpr"], inner[0])
    body = _inner(alive, eqn.params["body_jaxpr"], inner[1])

    def goes_on(carry: list) -> Any:
        (decision,) = test(*given.for_test, *carry)
        return decision

    def turn(carry: list) -> list:
        return body(*given.consts, *carry)

    return jax.lax.while_loop(goes_on, turn, given.carry)


def _run_cond(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    index, *operands = ins
    pairs = zip(eqn.params["branches"], inner, strict=True)
    branches = [_inner(alive, closed, program) for closed, program in pairs]
    return jax.lax.switch(index, branches, *operands)


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
    operands = [program.value(var)._replace(constant=None) for var in program.jaxpr.invars]
    results = [program.value(var) for var in program.jaxpr.outvars]
    return _Custom(alive, eqn, plain, operands, results)


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _is_steep(slope: Any) -> bool:
    return slope.dtype != FLOAT0


def _take(items: Sequence, positions: list[int]) -> list:
    return [items[i] for i in positions]


def _no_slope(array: Any) -> np.ndarray:
    return np.zeros(array.shape, FLOAT0)


def _beside(
    alive: Alive,
    function: Callable,
    known: Sequence[Value],
    wanted: Sequence[Value],
    arrays: Arrays,
) -> list[Any]:
    """Results of another function of arrays in the program, e.g. a derivative, at the smaller
    sizes.

    known, wanted: what its operands and its results correspond to. Raises ValueError if it would
    couple more
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
                "the hand-written derivative of a jax.custom_jvp or custom_vjp function couples "
                "channels that the function itself does not: it cannot be evaluated without the "
                "removed ones."
            )
    return _inner(inside, closed, program)(*arrays)


def _run_custom_jvp(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    """The function with its own derivative: relu has slope 0 at 0, which max(x, 0) has not."""
    custom = _custom(alive, eqn, inner[0])
    function = jax.custom_jvp(custom.plain)

    @function.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[list, list]:
        count = len(primals)
        _, moving = custom.at_full_size(primals)

        def outs_and_slopes(*arrays: Any) -> list[Any]:
            full, _ = custom.at_full_size(arrays[:count])
            start = _take(arrays, moving)
            outs, slopes = jax.jvp(full, start, list(arrays[count:]))
            return [*outs, *filter(_is_steep, slopes)]

        outs = custom.plain(*primals)
        steep = [i for i, out in enumerate(outs) if _is_inexact(out)]
        known = custom.operands + _take(custom.operands, moving)
        wanted = custom.results + _take(custom.results, steep)
        arrays = [*primals, *_take(tangents, moving)]
        found = _beside(alive, outs_and_slopes, known, wanted, arrays)
        slopes = list(map(_no_slope, outs))
        for i, slope in zip(steep, found[len(outs) :], strict=True):
            slopes[i] = slope
        return found[: len(outs)], slopes

    return function(*ins)


def _run_custom_vjp(alive: Alive, eqn: Any, ins: Arrays, inner: list[Program]) -> Arrays:
    """The function with its own backward rule, which evaluates it anew: a straight-through rounding
    has slope 1."""
    custom = _custom(alive, eqn, inner[0])

    @jax.custom_vjp
    def function(*primals: Any) -> tuple:
        return tuple(custom.plain(*primals))

    def forward(*primals: Any) -> tuple[Any, tuple]:
        return function(*primals), primals

    def backward(primals: tuple, slopes: tuple) -> tuple:
        count = len(primals)
        _, moving = custom.at_full_size(primals)
        steep = [i for i, slope in enumerate(slopes) if _is_steep(slope)]

        def pulled(*arrays: Any) -> tuple:
            full, _ = custom.at_full_size(arrays[:count])
            outs, pull = jax.vjp(full, *_take(arrays, moving))
            given = list(map(_no_slope, outs))
            for i, slope in zip(steep, arrays[count:], strict=True):
                given[i] = slope
            return pull(given)

        # Slopes along removed channels need not be zero, even if the entries are.
        results = map(nowhere_zero, _take(custom.results, steep))
        known = [*custom.operands, *results]
        wanted = _take(custom.operands, moving)
        arrays = [*primals, *_take(slopes, steep)]
        found = [None] * count
        for i, slope in zip(moving, _beside(alive, pulled, known, wanted, arrays), strict=True):
            found[i] = slope
        return tuple(found)

    function.defvjp(forward, backward)
    return function(*ins)


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
