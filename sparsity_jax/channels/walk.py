"""One walk over a jaxpr: which entries live or die together, in which order inputs are used.

`analyse` labels every axis of every array (`labels.Labels`): entries that must be removed together
get one label, entries that must stay are FROZEN. `execute.run` evaluates the same jaxpr on arrays
whose removed entries have been cut out. Neither knows a framework; `groups` gives both to users,
and `cost` and `ratios` read FLOPs and order off them.

What keeps it exact is one flag per axis: are removed entries exactly zero while they are still
there, masked? A sum over an axis with removed entries is the same with and without them only if
they are. An operation that would not be the same, or that is not known, freezes the axes it touches
and is reported.

Frozen, and why:

- inputs, results and integers: they are the user's, or indices;
- space, time and position: windows, cumulative sums, sorts and Fourier transforms mix neighbours; a
  scan walks along them;
- what is repeated by `tile`, also along an axis of one, which broadcasting would leave free;
- what is indexed or written at indices (the vocabulary of an embedding, rows of a graph, experts
  that are routed to): entries would change places;
- what a maximum or a softmax runs over: removed entries would count. A maximum of entries that
  cannot be below zero is the same with zeros among them;
- what a sum of entries runs over that are not zero when removed (a layer norm that subtracts the
  mean before it squares), unless zeros are asked for: see `execute.Zeroing`. Sums of zeros, e.g. of
  a norm that squares first, keep the full program's divisor;
- kernels divided by their own norm without an epsilon, logarithms and negative powers: 0 / 0 in the
  masked program;
- axes that are shared out over several devices;
- top_k, linear algebra, callbacks with results, Pallas kernels, convolutions with batch groups,
  gradients of max-pooling inside the function: no rule. They run as they are.
- channels that two layouts of one axis put in different rows (a channel shuffle): tied until the
  layouts agree, in the end to entries that stay.

Two limits. The flag only sees zeros: where another value cancels to zero (1 - cos(0)) and is then
divided by, the masked program gives NaN, which the compact one does not. And equations that name a
device mesh keep it, so programs traced for explicitly sharded arrays should be traced on one
device.
"""

import collections
import contextlib
import functools
import itertools
import math
import operator
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax.channels import symbolic
from sparsity_jax.channels.indexing import RULES
from sparsity_jax.channels.labels import Labels
from sparsity_jax.channels.rules import Values, unknown
from sparsity_jax.channels.values import (
    Axis,
    Order,
    Place,
    Program,
    Value,
    fixed,
    is_literal,
)
from sparsity_jax.types import Shape

__all__ = [
    "INNER",
    "OPAQUE",
    "PRODUCTS",
    "SCALAR_BODIES",
    "Frozen",
    "Loop",
    "Result",
    "Walk",
    "analyse",
    "bodies",
    "end",
    "line_of",
    "loop_operands",
    "read",
]

_SAME_ARRAY = "broadcast_in_dim convert_element_type copy reshape slice squeeze transpose"
_RESHAPES = frozenset(_SAME_ARRAY.split())
_TERMS = {"mul": "scale", "add": "shift", "add_any": "shift"}  # of a vector, after the operation
PRODUCTS = ("dot_general", "conv_general_dilated")
# Work that the shapes do not tell, or in foreign code: never walked.
_OPAQUE = """
cholesky custom_call eig eigh ffi_call fft hessenberg householder_product io_callback lu pallas_call
pure_callback qr ragged_dot ragged_dot_general schur sort svd top_k triangular_solve tridiagonal
tridiagonal_solve
"""
OPAQUE = frozenset(_OPAQUE.split())
# Reductions and the like: their jaxprs, if any, combine two scalars, and are not walked.
SCALAR_BODIES = ("reduce", "scatter", "select_and_scatter", "cum", "argmax", "argmin")
_FOLDERS = ("/jax/", "/jaxlib/", "/flax/", "/equinox/")
_LIBRARIES = (__file__, *_FOLDERS, "/contextlib.py", "/functools.py")
_LARGEST_CONSTANT = 4096  # entries up to which a constant array is looked at
Result = tuple[Values, list]  # of an equation, and the programs inside of it


class Frozen(NamedTuple):
    """An operation that keeps axes of the inputs whole."""

    reason: str
    primitive: str
    source: str  # module path and first line of user code
    members: Sequence[Place]
    since: str = ""  # where removed entries ceased to be zero, for a sum over them


class Walk:
    """A program at work: what rules do to it, and what is found out.

    program: what was walked. inputs: what is known of its inputs. events: what froze axes of them.
    roles: producer, consumer, depthwise or window, of axes of inputs. exposed: axes that are summed
    over with entries that are not zero when removed. terms: scale or shift, of axes of vectors that
    entries are multiplied by or that are added to them. used: inputs that some equation reads.
    multiplied: inputs that reach a product or convolution. zeroed: labels of axes that are summed
    over once removed entries are zero again. shared: different labels of axes of inputs, with all
    axes that have them, once all is walked. stand_ins: numbers for symbolic sizes.
    """

    program: Program
    separate = False  # branches that are only added are not tied
    zeroes = False  # sums that need zeros are noted, for a program that makes them, not frozen
    data = 0  # bits of the inputs that may not be cut: no weights

    def __init__(self, labels: Labels):
        self.labels = labels
        self.inputs: Values = []
        self.stand_ins: symbolic.StandIns = {}
        self.events: list[Frozen] = []
        self.roles: dict[Place, str] = {}
        self.exposed: set[Place] = set()
        self.terms: dict[Place, str] = {}
        self.uses: list[tuple[str, np.ndarray]] = []  # see `kinds`, each with labels of an axis
        self.used = Order()
        self.multiplied = Order()
        self._path: list = []  # the equation at work, after those it is inside of
        self._reason = ""
        self._since: tuple = ()
        self._asked: list[Axis] = []  # which the equation at work needs zeros along
        self.zeroed: list = []
        self.shared: list[tuple[np.ndarray, list[Place]]] = []
        self._events: list[tuple] = []  # those that are dates of `labels`, and where they were

    # For rules

    def freeze(self, entries: Axis | Value, reason: str) -> None:
        """No entry of the axis, or of all axes of the array, may be removed; the reason is told to
        the user."""
        if self.labels.freeze(entries.labels):
            self._reason = self._reason or reason

    def need_zero(self, axis: Axis, reason: str, *, part_of: Axis | None = None) -> None:
        """Removed entries of the first operand must be zero for the equation at work, or the axis
        stays. part_of: the axis of that operand, if it is not the same."""
        if axis.zero:
            return
        if self.zeroes:
            if self.labels.is_live(axis.labels):
                self._asked.append(part_of or axis)
                self.zeroed.append(axis.labels)
            return
        known = self._reason
        self.freeze(axis, reason)
        if self._reason != known:
            self._since = axis.cleared

    def stopped(self, size: int, reason: str) -> np.ndarray:
        """Labels of an axis of a result that stays, for this reason."""
        self._reason = self._reason or reason
        return self.labels.stopped(size)

    def whole(self, aval: Any, reason: str) -> Value:
        """A result of which nothing may be removed, for this reason."""
        axes = [Axis(self.stopped(size, reason), False) for size in aval.shape]
        return Value(axes)

    def tie(self, first: Axis | Value, second: Axis | Value) -> None:
        """Entry i of one is removed exactly if entry i of the other is, along all axes."""
        self.labels.tie(first.labels, second.labels)

    def joined(self, axes: Sequence[Axis]) -> Axis:
        """The axis of a result that is that of several operands: all lose the same entries."""
        first, *others = axes
        for axis in others:
            self.tie(first, axis)
        zeros = [axis.zero for axis in axes]
        cleared = () if any(zeros) else first.cleared
        return Axis(first.labels, all(zeros), (), cleared)

    def either(self, values: Sequence) -> Value:
        """An array that may be any of several of one shape; of the sources of the first."""
        same = zip(*(value.axes for value in values), strict=True)
        axes = list(map(self.joined, same))
        return Value(axes, sources=values[0].sources)

    def contract(
        self, first: Axis, second: Axis, what: str, *, part_of: Axis | None = None
    ) -> None:
        """Axes summed over together: removed entries must be zero in one of the factors.

        first, part_of: of the first operand, as in `need_zero`.
        """
        self.tie(first, second)
        if not second.zero:
            reason = f"{what} over entries that are not zero when removed"
            self.need_zero(first, reason, part_of=part_of)
        for axis, other in ((first, second), (second, first)):
            self.role(axis, "consumer")
            if not other.zero:
                self.exposed.update(axis.origin)

    def role(self, axis: Axis, role: str) -> None:
        """What is done with an axis of an input: the first role counts."""
        for place in axis.origin:
            self.roles.setdefault(place, role)

    def note(self, use: str, axes: Iterable[Axis]) -> None:
        """What is done along axes of activations, for `kinds`."""
        self.uses += [(use, axis.labels) for axis in axes]

    def is_data(self, value: Value) -> bool:
        """Whether an array depends on inputs that are no weights."""
        return value.sources & self.data > 0

    def filled(self, shape: Shape, constant: float | None) -> Value:
        """An array that depends on no input: it may be cut but is not masked."""
        axes = [self.new_axis(size, constant == 0) for size in shape]
        return Value(axes, constant)

    def new_axis(self, size: int, zero: bool) -> Axis:
        """An axis that is free to be cut; of one entry: frozen, for it cannot be shortened."""
        labels = fixed(1) if size == 1 else self.labels.fresh(size)
        return Axis(labels, zero)

    # The walk

    def closed(self, closed: Any, inputs: Values) -> Program:
        """An inner jaxpr, closed or (in some versions of jax) plain."""
        consts = getattr(closed, "consts", ())
        jaxpr = getattr(closed, "jaxpr", closed)
        variables = (*jaxpr.constvars, *jaxpr.invars)
        known = (*map(self._array, consts), *inputs)
        values = dict(zip(variables, known, strict=True))
        program = Program(jaxpr, consts, values, [], [], self.stand_ins)
        for eqn in jaxpr.eqns:
            self._path.append(eqn)
            ins = self._read(values, eqn.invars)
            numbered = symbolic.equation(eqn, self.stand_ins)
            self._asked = []
            outs, inner = self._equation(numbered, ins)
            self.attribute("ties it to entries that cannot be removed", eqn.primitive.name)
            outs = [self._clearing(out) for out in outs]
            self._path.pop()
            values.update(zip(eqn.outvars, outs, strict=True))
            program.inner.append(inner)
            program.zeroed.append([] if inner else self._positions(ins))
        return program

    def _positions(self, ins: Values) -> list[int]:
        """Of the axes of the first operand that the equation at work needs zeros along."""
        if not self._asked:
            return []
        asked = [axis.labels for axis in self._asked]
        is_asked = lambda axis: any(axis.labels is labels for labels in asked)
        return [d for d, axis in enumerate(ins[0].axes) if is_asked(axis)]

    def results(self, program: Program) -> Values:
        """What the walk knows of the results of a program."""
        return self._read(program.values, program.jaxpr.outvars)

    def attribute(self, reason: str, primitive: str) -> None:
        """What is frozen since the last call is the doing of the equation at work."""
        event = (self._reason or reason, primitive, tuple(self._path), self._since)
        self._events.append(event)
        self._reason = ""
        self._since = ()
        self.labels.date = len(self._events) + 1

    def find_events(self) -> None:
        """Which axes of inputs each event froze, if any; once, at the end."""
        axes = [axis for value in self.inputs for axis in value.axes if axis.origin]
        rows, sharing = self.labels.roots([axis.labels for axis in axes])
        dates = self.labels.dates(np.concatenate([fixed(0), *rows]))
        numbers = np.repeat(np.arange(len(rows)), list(map(len, rows)))
        is_frozen = np.flatnonzero(dates)
        changes = np.stack([numbers[is_frozen], dates[is_frozen]])
        changes = changes[:, np.diff(changes, prepend=0).any(0)]
        frozen: dict = collections.defaultdict(set)
        for number, date in changes.T.tolist():
            frozen[date].update(sharing[number])
        for date, (reason, primitive, path, since) in enumerate(self._events, 1):
            if date in frozen:
                origins = [axes[number].origin for number in sorted(frozen[date])]
                members = tuple(dict.fromkeys(itertools.chain(*origins)))
                event = Frozen(reason, primitive, _source(path), members, _told(since))
                self.events.append(event)
        for row, own in zip(rows, sharing):
            origins = [axes[number].origin for number in own]
            places = list(itertools.chain(*origins))
            self.shared.append((row, places))

    def needing_zeros(self) -> np.ndarray:
        """Simple labels of entries that are zero in some sums only if they are made so."""
        labels = np.concatenate([fixed(0), *self.zeroed])
        found = self.labels.find(labels)
        return np.unique(self.labels.parts(found))

    def _clearing(self, value: Value) -> Value:
        """The result of the equation at work, if it was it after which entries need not be zero."""
        if all(axis.zero or axis.cleared for axis in value.axes):
            return value
        path = tuple(self._path)
        axes = []
        for axis in value.axes:
            if not (axis.zero or axis.cleared):
                axis = Axis(axis.labels, False, axis.origin, path)
            axes.append(axis)
        return value._replace(axes=axes)

    def _array(self, array: Any) -> Value:
        """A constant of the program."""
        constant = None
        shape = symbolic.numbers(np.shape(array), self.stand_ins)
        with contextlib.suppress(TypeError, ValueError):  # keys have no such value
            if 0 < math.prod(shape) < _LARGEST_CONSTANT:
                flat = np.asarray(array).ravel()
                if np.isrealobj(flat) and (flat == flat[0]).all():
                    constant = float(flat[0])
        return self.filled(shape, constant)

    def _read(self, values: dict, variables: Sequence) -> Values:
        return [self._array(var.val) if is_literal(var) else values[var] for var in variables]

    def _equation(self, eqn: Any, ins: Values) -> Result:
        name = eqn.primitive.name
        if name in INNER:
            return INNER[name](self, eqn, ins)
        sources = self.use(name, ins)
        inner = []
        if name in RULES:
            outs = RULES[name](self, eqn, ins)
        else:
            outs = unknown(self, eqn, ins)
            self.attribute("is not known to the analysis", name)
            inner = self._enter(eqn, ins, sources)
        if sources & self.data:  # no weight's entries
            outs = list(map(_unnamed, outs))
        if name in _TERMS:
            self._note_terms(_TERMS[name], ins, sources)
        given = name in _RESHAPES and ins[0].given
        return [out._replace(sources=sources, given=given) for out in outs], inner

    def _note_terms(self, term: str, ins: Values, sources: int) -> None:
        """Vectors that the entries of a product or sum are multiplied by, or shifted by."""
        if term == "shift" and not sources & self.data:
            return  # e.g. a variance and its epsilon
        for value in ins:
            named = [axis for axis in value.axes if axis.origin and axis.size > 1]
            if value.given and len(named) == 1:
                for place in named[0].origin:
                    self.terms.setdefault(place, term)

    def use(self, name: str, ins: Values) -> int:
        """Notes which inputs an equation reads; returns bits of those it depends on."""
        for value in ins:
            self.used.note(value.sources)
        sources = _sources(ins)
        if name in PRODUCTS:
            self.multiplied.note(sources)
        return sources

    def _enter(self, eqn: Any, ins: Values, sources: int) -> list:
        """Walks the programs inside an unknown equation, which keeps its arrays whole."""
        programs = []
        for body in bodies(eqn):
            variables = getattr(body, "jaxpr", body).invars
            depends = [sources] * len(variables)
            if len(variables) == len(ins):
                depends = [value.sources for value in ins]
            inputs = []
            for var, bits in zip(variables, depends):
                shape = symbolic.numbers(getattr(var.aval, "shape", ()), self.stand_ins)
                axes = [Axis(fixed(size), False) for size in shape]
                inputs.append(Value(axes, sources=bits))
            programs.append(self.closed(body, inputs))
        return programs


def _sources(values: Values) -> int:
    return functools.reduce(operator.or_, (value.sources for value in values), 0)


def _unnamed(value: Value) -> Value:
    """The array as that of no input."""
    return value._replace(axes=[axis.unnamed for axis in value.axes])


# Whole programs ----------------------------------------------------------------------------------


def analyse(
    closed: Any,
    names: Iterable,
    *,
    whole: bool = False,
    branches: str = "tied",
    zeroes: bool = False,
) -> Walk:
    """Walks a closed jaxpr. names: of the inputs that are weights; those behind them are data, and
    must not be cut.

    whole: no entry of any input may be removed.
    branches: `separate` does not tie what is only added together, such as the two sides of a skip
    connection: their entries can be masked one by one, but not cut out.
    zeroes: sums over entries that are not zero when removed freeze nothing; see `execute.Zeroing`.
    """
    jaxpr = closed.jaxpr
    walk = Walk(Labels())
    walk.separate = branches == "separate"
    walk.zeroes = zeroes
    walk.stand_ins = symbolic.choose(var.aval.shape for var in (*jaxpr.constvars, *jaxpr.invars))
    for var, name in itertools.zip_longest(jaxpr.invars, names):
        source = 1 << len(walk.inputs)
        if name is None:
            walk.data |= source
        inexact = jnp.issubdtype(var.aval.dtype, jnp.inexact)
        free = inexact and not whole and name is not None
        axes = []
        for a, size in enumerate(symbolic.numbers(var.aval.shape, walk.stand_ins)):
            axis = walk.new_axis(size, True) if free else Axis(fixed(size), True)
            origin = () if name is None else ((name, a),)
            axes.append(axis._replace(origin=origin))
        walk.inputs.append(Value(axes, sources=source, given=True))
    walk.program = walk.closed(closed, walk.inputs)
    return walk


def end(walk: Walk, carried: Mapping[int, int]) -> None:
    """Says what happens to the results, and finds what kept inputs whole.

    carried: results that lose the entries of an input, by number, such as running statistics; all
    others stay whole.
    """
    for number, result in enumerate(walk.results(walk.program)):
        if number in carried:
            walk.tie(result, walk.inputs[carried[number]])
        else:
            walk.freeze(result, "is an output")
    walk.attribute("is an output", "output")
    walk.find_events()


def read(function: Callable, *args: Any) -> Walk:
    """Walks `function(*args)` as it is, no entry of which may be removed: for its order and sizes.

    args: pytrees of arrays or shape structs; nothing is computed.
    """
    closed = jax.make_jaxpr(function)(*args)
    return analyse(closed, range(len(closed.jaxpr.invars)), whole=True)


def _source(path: Sequence) -> str:
    """Module path and line of the innermost of nested equations for which they are known."""
    source = ""
    for eqn in path:
        stack = eqn.source_info.name_stack
        source = f"{stack} {line_of(eqn)}".strip() or source
    return source


def _told(path: Sequence) -> str:
    """The primitive and source of the last of nested equations."""
    if not path:
        return ""
    return f"{path[-1].primitive.name} at {_source(path)}"


def line_of(eqn: Any) -> str:
    """File and line of the innermost call outside of libraries, or an empty text."""
    with contextlib.suppress(Exception):  # tracebacks are no public interface
        for frame in eqn.source_info.traceback.frames:
            file = frame.file_name
            if not any(part in file for part in _LIBRARIES):
                return f"{pathlib.Path(file).name}:{frame.line_num}"
    return ""


def bodies(eqn: Any) -> list:
    """The jaxprs among an equation's parameters that it runs, closed or not, alone or in tuples; in
    the order in which they are walked."""
    name = eqn.primitive.name
    if name in INNER and "branches" not in eqn.params:
        test = [eqn.params["cond_jaxpr"]] if "cond_jaxpr" in eqn.params else []
        return [*test, _body_of(eqn)]
    if name in OPAQUE or name.startswith(SCALAR_BODIES):
        return []
    if name == "custom_linear_solve":  # also carries its transpose and the product, for derivatives
        return [eqn.params["jaxprs"].solve]
    is_program = lambda item: hasattr(item, "eqns")
    leaves = jax.tree.leaves(eqn.params, is_leaf=is_program)
    return list(filter(is_program, leaves))


# Equations with jaxprs inside that are understood ------------------------------------------------


def _body_of(eqn: Any) -> Any:
    """The jaxpr of a call, or of one turn of a loop."""
    names = ("jaxpr", "call_jaxpr", "body_jaxpr")
    return next(eqn.params[name] for name in names if name in eqn.params)


class Loop(NamedTuple):
    """Operands of a loop, or what belongs to them."""

    for_test: list  # of the test of a `while`
    consts: list
    carry: list
    scanned: list  # each turn of a scan has an entry of them


def loop_operands(eqn: Any, operands: Sequence) -> Loop:
    """The operands of a loop, by what it does with them."""
    params = eqn.params
    for_test = params.get("cond_nconsts", 0)
    consts = params.get("body_nconsts", params.get("num_consts"))
    carry = params.get("num_carry", len(eqn.outvars))
    if "ft_in" in params:  # jax 0.12
        consts, carry, _ = map(len, params["ft_in"].unpack())
    rest = iter(operands)
    counts = (for_test, consts, carry, None)
    return Loop(*(list(itertools.islice(rest, count)) for count in counts))


def _call(walk: Walk, eqn: Any, ins: Values) -> Result:
    program = walk.closed(_body_of(eqn), ins)
    return walk.results(program), [program]


def _loop(walk: Walk, eqn: Any, ins: Values) -> Result:
    """Turns are walked until what is zero in the carry is so after every turn."""
    given = loop_operands(eqn, ins)
    scanned = []
    for value in given.scanned:
        along, *axes = value.axes
        walk.freeze(along, "is scanned over")
        walk.attribute("is scanned over", "scan")
        weights = value.sources & ~walk.data  # both sides of a sum stay tied in every turn
        scanned.append(Value(axes, value.constant, weights))
    carry = [value._replace(constant=None) for value in given.carry]
    zeros = None
    while zeros != _zeros(carry):
        zeros = _zeros(carry)
        programs = []
        if "cond_jaxpr" in eqn.params:
            test = walk.closed(eqn.params["cond_jaxpr"], given.for_test + carry)
            programs.append(test)
        body = walk.closed(_body_of(eqn), given.consts + carry + scanned)
        programs.append(body)
        outs = walk.results(body)
        carry = [walk.either(pair) for pair in zip(carry, outs)]
    length = eqn.params.get("length", 0)
    turns = Axis(walk.stopped(length, "is scanned over"), False)
    per_turn = outs[len(carry) :]
    stacked = [Value([turns, *_unnamed(value).axes]) for value in per_turn]
    sources = _sources(ins)
    return [value._replace(sources=sources) for value in carry + stacked], programs


def _zeros(values: Values) -> list:
    return [axis.zero for value in values for axis in value.axes]


def _cond(walk: Walk, eqn: Any, ins: Values) -> Result:
    chosen = walk.use("cond", ins[:1])
    programs = [walk.closed(branch, ins[1:]) for branch in eqn.params["branches"]]
    outs = []
    for options in zip(*map(walk.results, programs), strict=True):
        sources = chosen | _sources(options)
        outs.append(walk.either(options)._replace(sources=sources))
    return outs, programs


def _sharded(walk: Walk, eqn: Any, ins: Values) -> Result:
    """A program for each device; axes that are shared out stay."""
    body = eqn.params["jaxpr"]
    inputs = []
    for value, var in zip(ins, body.invars, strict=True):
        shape = symbolic.numbers(var.aval.shape, walk.stand_ins)
        inputs.append(_resharded(walk, value, shape))
    program = walk.closed(body, inputs)
    outs = []
    for value, var in zip(walk.results(program), eqn.outvars, strict=True):
        outs.append(_resharded(walk, value, var.aval.shape))
    return outs, [program]


def _resharded(walk: Walk, value: Value, shape: Shape) -> Value:
    """The array with the sizes that it has on all devices, or on each."""
    for d, size in enumerate(shape):
        axis = value.axes[d]
        if axis.size != size:
            walk.freeze(axis, "is shared out over devices")
            labels = walk.stopped(size, "is shared out over devices")
            value = value.put(d, axis._replace(labels=labels))
    return value._replace(constant=None)


_CALLS = """
jit pjit remat remat2 checkpoint closed_call core_call custom_jvp_call custom_vjp_call
"""
INNER: dict[str, Callable] = {
    **dict.fromkeys(_CALLS.split(), _call),
    "scan": _loop,
    "while": _loop,
    "cond": _cond,
    "shard_map": _sharded,
}
