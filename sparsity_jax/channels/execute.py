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

from sparsity_jax import trees
from sparsity_jax.channels import symbolic
from sparsity_jax.channels.labels import Labels, with_room
from sparsity_jax.channels.rules import Values
from sparsity_jax.channels.values import Axis, Program, Value, fixed, is_literal, nowhere_zero
from sparsity_jax.channels.walk import INNER, Walk, loop_operands
from sparsity_jax.types import Fields, Shape

__all__ = ["RESIZES", "Alive", "Arrays", "Resize", "Sizes", "Zeroing", "resizes_to", "run"]

Arrays = Sequence


class Alive(NamedTuple):
    """Which labels live. removed: bool by label, the simple ones that die.

    zeroes: whether the program was walked as one in which sums get zeros for removed entries.
    """

    labels: Labels
    removed: Any
    zeroes: bool = False

    def __call__(self, labels: np.ndarray) -> Any:
        """bool, of the labels' shape: the entries that stay."""
        if not labels.any():
            return np.ones(labels.shape, bool)
        roots = self.labels.find(labels)
        parts = self.labels.parts(roots)
        return ~self.removed[parts].any(-1)

    def shape(self, value: Value) -> Shape:
        """How many entries stay along each axis."""
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
                array = trees.taken(array, entries, position)
        return array

    def zero(self, array: Any, value: Value, positions: Sequence[int]) -> Any:
        """The operand of a sum, in which removed entries must be zero: they are not there."""
        return array

    def params(self, program: Program, eqn: Any) -> Fields:
        """Parameters of an equation at the smaller sizes."""
        name = eqn.primitive.name
        if name not in RESIZES:
            return eqn.params
        full = symbolic.numbers(eqn.params, program.stand_ins)
        sizes = Sizes(self, full, program.known(eqn.invars), program.known(eqn.outvars))
        changed = RESIZES[name](sizes)
        if program.stand_ins:
            changed = symbolic.restored(changed, full, eqn.params)
        return eqn.params | changed

    def equation(self, program: Program, eqn: Any, ins: Arrays, inner: list) -> Arrays:
        """Results of an equation with the programs inside of it."""
        return _run_equation(self, program, eqn, ins, inner)

    def results(self, outs: list) -> list:
        """What is given on of the results of a program."""
        return outs

    def beside(self, labels: Labels) -> "Alive":
        """The same of labels that more were added to."""
        removed = with_room(self.removed, labels.num)
        return self._replace(labels=labels, removed=removed)

    def agrees(self, other: "Alive", values: Values) -> bool:
        """Whether the same entries stay with the other labels."""
        return list(map(self.shape, values)) == list(map(other.shape, values))


class Zeroing(Alive):
    """Which labels live in a program of the full size, in which removed entries are made zero
    where they are summed over. removed: may be traced."""

    def count(self, axis: Axis, end: int | None = None) -> int:
        return len(axis.labels[:end])

    def cut(self, array: Any, value: Value) -> Any:
        return array

    def zero(self, array: Any, value: Value, positions: Sequence[int]) -> Any:
        for position in positions:
            shape = [1] * array.ndim
            shape[position] = -1
            kept = self(value.axes[position].labels).reshape(shape)
            array = jnp.where(kept, array, jnp.zeros((), array.dtype))
        return array

    def params(self, program: Program, eqn: Any) -> Fields:
        return eqn.params

    def beside(self, labels: Labels) -> "Zeroing":
        missing = labels.num - len(self.removed)
        removed = jnp.pad(self.removed, (0, missing))
        return self._replace(labels=labels, removed=removed)

    def agrees(self, other: Alive, values: Values) -> bool:
        """Whether the other labels couple no more."""
        labels = np.concatenate([fixed(1), *(value.labels for value in values)])
        before = np.unique(self.labels.find(labels))
        after = np.unique(other.labels.find(labels))
        return len(before) == len(after)


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
    for (eqn, inner), zeroed in zip(program.equations(), program.zeroed):
        ins = _read(env, eqn.invars)
        if zeroed:
            value, *_ = program.known(eqn.invars)
            ins[0] = alive.zero(ins[0], value, zeroed)
        outs = alive.equation(program, eqn, ins, inner)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in _variables(eqn.invars):
            if last[var] is eqn:
                env.pop(var, None)
    return alive.results([_result(env, var) for var in jaxpr.outvars])


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
    if name == "slice" and params["strides"]:
        (value,) = program.known(eqn.invars)
        if alive.shape(value) != value.shape:
            bounds = symbolic.numbers(params, program.stand_ins)
            return [_take(alive, bounds, value, *ins)]
    options = primitive.get_bind_params(alive.params(program, eqn))
    outs = primitive.bind(*ins, **options)
    if not primitive.multiple_results:
        outs = [outs]
    if name in _DRAWS:
        outs = list(map(alive.cut, outs, program.known(eqn.outvars)))
    return outs


def _take(alive: Alive, params: Fields, value: Value, array: Any) -> Any:
    """A slice with strides: those of its entries that are there."""
    bounds = zip(params["start_indices"], params["limit_indices"], params["strides"])
    for position, (axis, bound) in enumerate(zip(value.axes, bounds, strict=True)):
        wanted = np.zeros(axis.size, bool)
        wanted[slice(*bound)] = True
        there = alive.cut(wanted, Value([axis]))
        if not there.all():
            array = array.take(np.flatnonzero(there), position)
    return array


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
    "reshape": resizes_to("new_sizes"),
    "slice": _limits,
    "split": _split_sizes,
    "pad": _paddings,
    "conv_general_dilated": _groups,
    "gather": _slice_sizes,
    "dynamic_slice": _slice_sizes,
}
# In full, then cut: at other sizes they would be other numbers.
_DRAWS = ("iota", "random_bits")


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


def _run_sharded(alive: Alive, eqn: Any, ins: Arrays, inner: list) -> Arrays:
    function = functools.partial(run, alive, *inner)
    options = _options(eqn, "mesh", "in_specs", "out_specs", "check_vma")
    options["axis_names"] = eqn.params["newly_manual_axes"]
    options["out_specs"] = list(options["out_specs"])
    return jax.shard_map(function, **options)(*ins)


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
        shape = tuple(map(alive.full_size, value.axes, array.shape))
        struct = jax.typeof(array).update(shape=shape)  # which varies over the same devices
        structs.append(struct)
    closed = jax.make_jaxpr(function)(*structs)
    walk = Walk(alive.labels.copy())
    walk.zeroes = alive.zeroes
    walk.stand_ins = stand_ins
    program = walk.closed(closed, known)
    for value, other in zip(walk.results(program), wanted, strict=True):
        walk.tie(value, other)
    inside = alive.beside(walk.labels)
    if not alive.agrees(inside, [*known, *wanted]):
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
    "shard_map": _run_sharded,
}
