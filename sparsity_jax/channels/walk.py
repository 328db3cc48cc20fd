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
- space, time and position: windows, strided slices, cumulative sums and sorts mix neighbours; a
  scan walks along them;
- what is repeated by `tile`, also along an axis of one, which broadcasting would leave free;
- what is indexed (the vocabulary of an embedding, experts that are routed to), or meets an index
  computed by `iota` (rotary positions turn each pair of q and k by its own angle; triangular
  masks): entries would change places;
- what a maximum, a softmax, or a sum of entries that are not zero runs over (a layer norm that
  subtracts the mean before it squares): removed entries would count. Sums of zeros, e.g. of a norm
  that squares first, keep the full program's divisor: see `sums`;
- kernels divided by their own norm without an epsilon, logarithms and negative powers: 0 / 0 in the
  masked program;
- scatter, top_k, ragged products, Fourier transforms, linear algebra, callbacks, Pallas kernels,
  convolutions with batch groups, gradients of max-pooling inside the function: no rule. They run as
  they are.
- channels that two layouts of one axis put in different rows (a channel shuffle): tied until the
  layouts agree, in the end to entries that stay.

Two limits. The flag only sees zeros: where another value cancels to zero (1 - cos(0)) and is then
divided by, the masked program gives NaN, which the compact one does not. And equations that name a
device mesh keep it, so programs traced for explicitly sharded arrays should be traced on one
device.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax.channels.labels import FROZEN, Labels
from sparsity_jax.channels.rules import RULES, Values, unknown
from sparsity_jax.channels.values import (
    Axis,
    Place,
    Program,
    Value,
    bits,
    fixed,
    is_literal,
    whole,
)

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
LIBRARIES = (__file__, *_FOLDERS, "/contextlib.py", "/functools.py")
LARGEST_CONSTANT = 4096  # entries up to which a constant array is looked at


class Event(NamedTuple):
    """An operation that froze axes of inputs."""

    reason: str
    primitive: str
    source: str
    axes: tuple[Place, ...]


class Analysis(NamedTuple):
    """What a walk finds out about a program."""

    program: Program
    consts: list[Any]
    labels: Labels
    inputs: list[Value]
    events: list[Event]
    roles: dict[Place, str]  # producer, consumer, depthwise or window
    exposed: frozenset[Place]  # axes summed over with entries that are not zero when removed
    used: tuple[int, ...]  # inputs that some equation reads, in order of use
    multiplied: tuple[int, ...]  # inputs that reach a product or convolution, in order


def analyse(
    closed: Any,
    frozen_inputs: Iterable[int],
    *,
    sums: str = "allow",
    branches: str = "tied",
    carried: Mapping[int, int] | None = None,
) -> Analysis:
    """Labels of a closed jaxpr. frozen_inputs: numbers of inputs none of whose entries may be
    removed.

    sums: `freeze` forbids removing what a plain sum runs over, e.g. the channels of a layer norm,
    where a program traced anew at the smaller size would divide by another number; `allow` keeps
    the number of the full one.
    branches: `separate` does not tie what is only added together, such as the two sides of a skip
    connection: their entries can be masked one by one, but not cut out.
    carried: results that lose the entries of an input, by number, such as running statistics; all
    others stay whole.
    """
    data = sum(1 << number for number in set(frozen_inputs))
    walk = Walk(Labels(), data)
    walk.freezes_sums = sums == "freeze"
    walk.separate = branches == "separate"
    inputs = []
    for number, var in enumerate(closed.jaxpr.invars):
        free = not data >> number & 1 and jnp.issubdtype(var.aval.dtype, jnp.inexact)
        inputs.append(walk.input(number, var.aval.shape, free))
    return walk.analysis(closed, inputs, carried or {})


def read(function: Callable, *args: Any) -> Analysis:
    """Analysis of `function(*args)` as it is, no entry of which may be removed: for its order and
    its sizes.

    args: pytrees of arrays or shape structs; nothing is computed.
    """
    closed = jax.make_jaxpr(function)(*args)
    walk = Walk(Labels())
    inputs = []
    for number, var in enumerate(closed.jaxpr.invars):
        inputs.append(walk.input(number, var.aval.shape, False))
    return walk.analysis(closed, inputs, {})


def source_of(eqn: Any) -> str:
    """Module path and first line of user code of an equation, as far as they are known."""
    return f"{eqn.source_info.name_stack} {line_of(eqn)}".strip()


def line_of(eqn: Any) -> str:
    """File and line of the innermost call outside of libraries, or an empty text."""
    with contextlib.suppress(Exception):  # tracebacks are no public interface
        for frame in eqn.source_info.traceback.frames:
            if not any(part in frame.file_name for part in LIBRARIES):
                return f"{pathlib.Path(frame.file_name).name}:{frame.line_num}"
    return ""


class _Blame:
    """Which operation froze which axes of the inputs."""

    def __init__(self, labels: Labels):
        self.labels = labels
        self.events: list[Event] = []
        self.watch([])

    def watch(self, inputs: Sequence[Value]) -> None:
        self.places: list[Place] = []
        sizes, labels = [], [fixed(0)]
        for i, value in enumerate(inputs):
            for a, axis in enumerate(value.axes):
                self.places.append((i, a))
                sizes.append(axis.size)
                labels.append(axis.labels)
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.watched = np.concatenate(labels)
        self.frozen = self.watched == FROZEN
        self.seen = self.labels.freezes

    def book(self, reason: str, primitive: str, path: Sequence[Any]) -> None:
        """Axes frozen since the last call are the doing of the last equation of `path`."""
        if self.labels.freezes == self.seen:
            return
        frozen = self.labels.find(self.watched) == FROZEN
        owners = np.unique(self.owner[frozen & ~self.frozen]).tolist()
        if owners:
            source = next(filter(None, map(source_of, reversed(path))), "")
            axes = tuple(self.places[k] for k in owners)
            self.events.append(Event(reason, primitive, source, axes))
        self.frozen, self.seen = frozen, self.labels.freezes


class Walk:
    """State of a walk, and what rules do to it. data: bits of the inputs that may not be cut: no
    weights."""

    freezes_sums = False
    separate = False  # branches that are only added are not tied

    def __init__(self, labels: Labels, data: int = 0):
        self.labels = labels
        self.data = data
        self.blame = _Blame(labels)
        self.reason = ""
        self.path: list[Any] = []  # the equation at work, after those it is inside of
        self.roles: dict[Place, str] = {}
        self.exposed: set[Place] = set()
        self.used: list[int] = []
        self.multiplied: list[int] = []
        self._used = self._multiplied = 0  # the same as bits

    # For rules

    def freeze(self, axis: Axis, reason: str) -> None:
        """No entry of the axis may be removed; the reason is told to the user."""
        before = self.labels.freezes
        self.labels.freeze(axis.labels)
        if self.labels.freezes > before:
            self.reason = self.reason or reason

    def tie(self, first: Axis, second: Axis) -> None:
        """Entry i of one is removed exactly if entry i of the other is."""
        self.labels.tie(first.labels, second.labels)

    def tie_all(self, first: Value, second: Value) -> None:
        """All axes of two arrays of one shape."""
        for a, b in zip(first.axes, second.axes, strict=True):
            self.tie(a, b)

    def are_tied(self, first: Value, second: Value) -> bool:
        """Whether two arrays of one shape lose the same entries anyway."""
        for a, b in zip(first.axes, second.axes, strict=True):
            if not np.array_equal(self.labels.find(a.labels), self.labels.find(b.labels)):
                return False
        return True

    def contract(self, first: Axis, second: Axis, what: str) -> None:
        """Axes summed over together: removed entries must be zero in one of the factors."""
        self.tie(first, second)
        if not (first.zero or second.zero):
            self.freeze(first, f"{what} over entries that are not zero when removed")
        if not second.zero:
            self.exposed.update(first.origin)
        if not first.zero:
            self.exposed.update(second.origin)

    def role(self, axis: Axis, role: str) -> None:
        """What is done with an axis of an input: the first role counts."""
        for place in axis.origin:
            self.roles.setdefault(place, role)

    def is_data(self, value: Value) -> bool:
        """Whether an array depends on an input that may not be cut, e.g. images: it is no
        weight."""
        return bool(value.sources & self.data)

    def new(self, size: int, zero: bool) -> Axis:
        """A new axis, free to be cut; of one entry: frozen, for it cannot be shortened."""
        return Axis(fixed(1) if size == 1 else self.labels.fresh(size), zero)

    def filled(self, shape: Sequence[int], constant: float | None) -> Value:
        """An array that depends on no input: it may be cut but is not masked."""
        axes = [self.new(size, constant == 0) for size in shape]
        return Value(tuple(axes), constant)

    # The walk

    def analysis(self, closed: Any, inputs: list[Value], carried: Mapping[int, int]) -> Analysis:
        """Walks a whole program. carried: see `analyse`."""
        self.blame.watch(inputs)
        program = self.closed(closed, inputs)
        for number, result in enumerate(self.results(program)):
            if number in carried:
                self.tie_all(result, inputs[carried[number]])
                continue
            for axis in result.axes:
                self.freeze(axis, "is an output")
        self.attribute("is an output", "output")
        return Analysis(
            program,
            closed.consts,
            self.labels,
            inputs,
            self.blame.events,
            self.roles,
            frozenset(self.exposed),
            tuple(self.used),
            tuple(self.multiplied),
        )

    def input(self, number: int, shape: Sequence[int], free: bool) -> Value:
        axes = []
        for a, size in enumerate(shape):
            labels = self.new(size, True).labels if free else fixed(size)
            axes.append(Axis(labels, True, ((number, a),)))
        return Value(tuple(axes), sources=1 << number)

    def array(self, array: Any) -> Value:
        """A constant of the program."""
        constant = None
        with contextlib.suppress(TypeError, ValueError):  # keys have no such value
            if 0 < np.size(array) < LARGEST_CONSTANT:
                flat = np.asarray(array).ravel()
                if not np.iscomplexobj(flat) and (flat == flat[0]).all():
                    constant = float(flat[0])
        return self.filled(np.shape(array), constant)

    def read(self, values: dict, var: Any) -> Value:
        return self.array(var.val) if is_literal(var) else values[var]

    def results(self, program: Program) -> Values:
        return [self.read(program.values, var) for var in program.jaxpr.outvars]

    def closed(self, closed: Any, inputs: Sequence[Value]) -> Program:
        """An inner jaxpr, closed or (in some versions of jax) plain."""
        consts = [self.array(const) for const in getattr(closed, "consts", ())]
        jaxpr = getattr(closed, "jaxpr", closed)
        variables = (*jaxpr.constvars, *jaxpr.invars)
        values = dict(zip(variables, (*consts, *inputs), strict=True))
        program = Program(jaxpr, values, {})
        for number, eqn in enumerate(jaxpr.eqns):
            ins = [self.read(values, var) for var in eqn.invars]
            self.path.append(eqn)
            outs, inner = self.equation(eqn, ins)
            self.attribute("ties it to entries that cannot be removed", eqn.primitive.name)
            self.path.pop()
            values.update(zip(eqn.outvars, outs, strict=True))
            if inner:
                program.inner[number] = inner
        return program

    def equation(self, eqn: Any, ins: Values) -> tuple[Values, list[Program]]:
        """Results of an equation, and the programs inside of it."""
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
            inner = self.enter(eqn, ins, sources)
        return [self.dependent(out, sources) for out in outs], inner

    def use(self, name: str, ins: Values) -> int:
        """Notes which inputs an equation is the first to read; returns bits of those it depends
        on."""
        sources = 0
        for value in ins:
            sources |= value.sources
            if fresh := value.sources & ~self._used:
                self._used |= fresh
                self.used.extend(bits(fresh))
        if name in PRODUCTS:
            self.multiplied.extend(bits(sources & ~self._multiplied))
            self._multiplied |= sources
        return sources

    def dependent(self, value: Value, sources: int) -> Value:
        """The value with these sources; entries that depend on data are no weight's."""
        axes = value.axes
        if sources & self.data:
            axes = tuple(Axis(axis.labels, axis.zero) for axis in axes)
        return Value(axes, value.constant, sources)

    def enter(self, eqn: Any, ins: Values, sources: int) -> list[Program]:
        """Walks the programs inside an unknown equation, which keeps its arrays whole."""
        programs = []
        for body in bodies(eqn):
            jaxpr = getattr(body, "jaxpr", body)
            same = len(jaxpr.invars) == len(ins)
            inputs = []
            for number, var in enumerate(jaxpr.invars):
                depends = ins[number].sources if same else sources
                inputs.append(whole(var.aval)._replace(sources=depends))
            programs.append(self.closed(body, inputs))
        return programs

    def attribute(self, reason: str, primitive: str) -> None:
        """Books input axes frozen since the last call on this operation."""
        self.blame.book(self.reason or reason, primitive, self.path)
        self.reason = ""


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters that it runs, closed or not, alone or in tuples."""
    name, params = eqn.primitive.name, eqn.params
    if name in OPAQUE or name.startswith(SCALAR_BODIES):
        return []
    if name == "custom_linear_solve":  # also carries its transpose and the product, for derivatives
        return [params["jaxprs"].solve]
    found = []
    for value in params.values():
        several = value if isinstance(value, tuple | list) else (value,)
        found += [item for item in several if hasattr(item, "eqns")]
    return found


# Equations with jaxprs inside that are understood ------------------------------------------------


def _call(name: str) -> Callable:
    def call(walk: Walk, eqn: Any, ins: Values) -> tuple[Values, list[Program]]:
        program = walk.closed(eqn.params[name], ins)
        return walk.results(program), [program]

    return call


class Scan(NamedTuple):
    """Operands of a scan, or what belongs to them."""

    consts: list
    carry: list
    scanned: list


def scan_operands(eqn: Any, operands: Sequence) -> Scan:
    """The operands of a scan, by what it does with them."""
    if "num_carry" in eqn.params:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:
        given, carried, _ = eqn.params["ft_in"].unpack()  # jax 0.12
        consts, carry = len(given), len(carried)
    end = consts + carry
    operands = list(operands)
    return Scan(operands[:consts], operands[consts:end], operands[end:])


class While(NamedTuple):
    """Operands of a `while` loop, or what belongs to them."""

    for_test: list
    consts: list
    carry: list


def while_operands(eqn: Any, operands: Sequence) -> While:
    """The operands of a `while` loop, by what it does with them."""
    tested = eqn.params["cond_nconsts"]
    end = tested + eqn.params["body_nconsts"]
    operands = list(operands)
    return While(operands[:tested], operands[tested:end], operands[end:])


def _settled(walk: Walk, turn: Callable, carry: Values) -> tuple[Values, list[Program]]:
    """(carry, programs) once what is zero in the carry is so after every turn.

    turn(carry) -> the programs of one turn, the last of which returns the next carry first.
    """
    carry = [value._replace(constant=None) for value in carry]
    while True:
        programs = turn(carry)
        lower = []
        for before, after in zip(carry, walk.results(programs[-1])):
            walk.tie_all(before, after)
            lower.append(_zero_in_all(before, [after]))
        if [_flags(value) for value in lower] == [_flags(value) for value in carry]:
            return lower, programs
        carry = lower


def _flags(value: Value) -> list[bool]:
    return [axis.zero for axis in value.axes]


def _zero_in_all(value: Value, others: Values) -> Value:
    """An array that may be any of several of one shape."""
    axes = []
    for axis, *same in zip(value.axes, *(other.axes for other in others)):
        zero = axis.zero and all(other.zero for other in same)
        axes.append(Axis(axis.labels, zero))
    return Value(tuple(axes), None, value.sources)


def _all_sources(ins: Values) -> int:
    sources = 0
    for value in ins:
        sources |= value.sources
    return sources


def _scan(walk: Walk, eqn: Any, ins: Values) -> tuple[Values, list[Program]]:
    given = scan_operands(eqn, ins)
    each = []
    for value in given.scanned:
        walk.freeze(value.axes[0], "is scanned over")
        weights = value.sources & ~walk.data  # both sides of a sum stay tied in every turn
        each.append(Value(value.axes[1:], value.constant, weights))

    def turn(carry: Values) -> list[Program]:
        return [walk.closed(eqn.params["jaxpr"], [*given.consts, *carry, *each])]

    outs, programs = _settled(walk, turn, given.carry)
    turns = Axis(fixed(eqn.params["length"]), False)
    for value in walk.results(programs[-1])[len(outs) :]:
        axes = tuple(Axis(axis.labels, axis.zero) for axis in value.axes)
        outs.append(Value((turns, *axes)))
    return _of_all(outs, ins), programs


def _while(walk: Walk, eqn: Any, ins: Values) -> tuple[Values, list[Program]]:
    given = while_operands(eqn, ins)

    def turn(carry: Values) -> list[Program]:
        test = walk.closed(eqn.params["cond_jaxpr"], [*given.for_test, *carry])
        return [test, walk.closed(eqn.params["body_jaxpr"], [*given.consts, *carry])]

    outs, programs = _settled(walk, turn, given.carry)
    return _of_all(outs, ins), programs


def _of_all(outs: Values, ins: Values) -> Values:
    """Results of a loop, which depend on all that it was given, after some turns."""
    sources = _all_sources(ins)
    return [value._replace(sources=sources) for value in outs]


def _cond(walk: Walk, eqn: Any, ins: Values) -> tuple[Values, list[Program]]:
    chosen = walk.use("cond", ins[:1])
    programs = [walk.closed(branch, ins[1:]) for branch in eqn.params["branches"]]
    outs = []
    for value, *others in zip(*map(walk.results, programs), strict=True):
        for other in others:
            walk.tie_all(value, other)
        sources = chosen | _all_sources([value, *others])
        outs.append(_zero_in_all(value, others)._replace(sources=sources))
    return outs, programs


INNER: dict[str, Callable] = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint"), _call("jaxpr")),
    **dict.fromkeys(("closed_call", "core_call"), _call("call_jaxpr")),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _call("call_jaxpr")),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
