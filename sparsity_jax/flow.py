"""Which entries of a program's arrays live or die together, and the same program run without the dead ones.

`analyse` walks a jaxpr once and labels every axis of every array (`labels.Labels`): entries that must be removed
together get one label, entries that must stay are FROZEN. `run` evaluates the same jaxpr on arrays whose removed
entries have been cut out. Neither knows a framework; `groups` gives both to users.

What keeps it exact is one flag per axis: are removed entries exactly zero while they are still there, masked? A sum
over an axis with removed entries is the same with and without them only if they are. An operation that would not be
the same, or that is not known, freezes the axes it touches and is reported.

Frozen, and why:

- inputs, results and integers: they are the user's, or indices;
- space, time and position: windows, strided slices, cumulative sums and sorts mix neighbours; a scan walks along them;
- what is repeated by `tile`, also along an axis of one, which broadcasting would leave free;
- what is indexed (the vocabulary of an embedding, experts that are routed to), or meets an index computed by `iota`
  (rotary positions turn each pair of q and k by its own angle; triangular masks): entries would change places;
- what a maximum, a softmax, or a sum of entries that are not zero runs over (a layer norm that subtracts the mean
  before it squares): removed entries would count. Sums of zeros, e.g. of a norm that squares first, keep the full
  program's divisor: see `sums`;
- kernels divided by their own norm without an epsilon, logarithms and negative powers: 0 / 0 in the masked program;
- scatter, top_k, ragged products, Fourier transforms, linear algebra, callbacks, Pallas kernels, convolutions with
  batch groups, gradients of max-pooling inside the function: no rule. They run as they are.
- channels that two layouts of one axis put in different rows (a channel shuffle): tied until the layouts agree, in
  the end to entries that stay.

Two limits. The flag only sees zeros: where another value cancels to zero (1 - cos(0)) and is then divided by, the
masked program gives NaN, which the compact one does not. And equations that name a device mesh keep it, so programs
traced for explicitly sharded arrays should be traced on one device.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sparsity_jax.labels import FROZEN, Labels


class Value(NamedTuple):
    """What is known of one array."""

    labels: tuple[np.ndarray, ...]  # of every axis: int [size]
    zero: tuple[bool, ...]  # of every axis: removed entries are exactly 0 in the masked program
    origin: tuple[tuple[tuple[int, int], ...], ...]  # of every axis: (input, its axis) whose entries these are
    constant: float | None = None  # the value of all entries, if it is known to be one
    data: bool = False  # depends on an input that may not be cut, e.g. images: it is no weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.labels))


class Event(NamedTuple):
    """An operation that froze axes of inputs: (input, axis) each."""

    reason: str
    primitive: str
    source: str
    axes: tuple[tuple[int, int], ...]


class Program(NamedTuple):
    """An analysed jaxpr: what is known of its variables, and of the jaxprs inside its equations, in order."""

    jaxpr: Any
    values: dict[Any, Value]
    inner: dict[int, list["Program"]]


class Analysis(NamedTuple):
    program: Program
    consts: list[Any]
    labels: Labels
    inputs: list[Value]
    events: list[Event]
    roles: dict[tuple[int, int], str]  # (input, axis) -> producer, consumer, depthwise or window
    exposed: frozenset[tuple[int, int]]  # axes summed over with entries that are not zero when removed
    used: tuple[int, ...]  # inputs that some equation reads, in order of use


def analyse(closed: Any, frozen_inputs: Iterable[int], *, sums: str = "allow", branches: str = "tied") -> Analysis:
    """Labels of a closed jaxpr. frozen_inputs: numbers of inputs none of whose entries may be removed.

    sums: `freeze` forbids removing what a plain sum runs over, e.g. the channels of a layer norm, where a program
    traced anew at the smaller size would divide by another number; `allow` keeps the number of the full one.
    branches: `separate` does not tie what is only added together, such as the two sides of a skip connection: their
    entries can be masked one by one, but not cut out.
    """
    walk = _Walk(sums, branches)
    frozen_inputs, inputs = set(frozen_inputs), []
    for i, var in enumerate(closed.jaxpr.invars):
        free = i not in frozen_inputs and jnp.issubdtype(var.aval.dtype, jnp.inexact)
        axes = tuple(walk.axis(n) if free else _fixed(n) for n in var.aval.shape)
        inputs.append(
            Value(axes, (True,) * len(axes), tuple(((i, a),) for a in range(len(axes))), data=i in frozen_inputs)
        )
    walk.watch(inputs)
    program = walk.closed(closed, inputs)
    for value in walk.results(program):
        for axis in value.labels:
            walk.freeze(axis, "is an output")
    walk.attribute("is an output", "output")
    return Analysis(
        program,
        closed.consts,
        walk.labels,
        inputs,
        walk.events,
        walk.roles,
        frozenset(walk.exposed),
        _reads(closed.jaxpr),
    )


def _reads(jaxpr: Any) -> tuple[int, ...]:
    """Numbers of the inputs that some equation computes with, in order: handing one to what ignores it is no use."""
    names, read = {var: i for i, var in enumerate(jaxpr.invars)}, {}
    for eqn in jaxpr.eqns:
        inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params), None)
        whole = inner is None or eqn.primitive.name not in INNER
        numbers = range(len(eqn.invars)) if whole else _reads(getattr(inner, "jaxpr", inner))
        places = (eqn.invars[i] for i in numbers)
        read |= dict.fromkeys(names[var] for var in places if not _is_literal(var) and var in names)
    return tuple(read)


def _fixed(size: int) -> np.ndarray:
    return np.zeros(size, int)


def _whole(aval: Any) -> Value:
    """Nothing may be removed."""
    shape = getattr(aval, "shape", ())
    return Value(tuple(map(_fixed, shape)), (False,) * len(shape), ((),) * len(shape))


def _is_literal(var: Any) -> bool:
    return isinstance(var, core.Literal)


def source_of(eqn: Any) -> str:
    """Module path and first line of user code of an equation, as far as they are known."""
    scope, line = str(eqn.source_info.name_stack), ""
    with contextlib.suppress(Exception):  # tracebacks are no public interface: without one the name has to do
        hidden = (__file__, "/jax/", "/jaxlib/", "/flax/", "/equinox/", "/contextlib.py", "/functools.py")
        frames = [f for f in eqn.source_info.traceback.frames if not any(part in f.file_name for part in hidden)]
        line = f"{frames[0].file_name.rsplit('/', 1)[-1]}:{frames[0].line_num}"
    return " ".join(filter(None, (scope, line)))


# The walk over a jaxpr ---------------------------------------------------------------------------------------------


class _Walk:
    def __init__(self, sums: str = "allow", branches: str = "tied", labels: Labels | None = None):
        self.labels, self.sums, self.branches = labels or Labels(), sums, branches
        self.events: list[Event] = []
        self.roles: dict[tuple[int, int], str] = {}
        self.exposed: set[tuple[int, int]] = set()
        self.reason = ""
        self.path: list[Any] = []  # the equation at work, after those it is inside of
        self.watch([])

    def watch(self, inputs: Sequence[Value]) -> None:
        """Notes in `events` what freezes axes of these."""
        axes = [((i, a), axis) for i, value in enumerate(inputs) for a, axis in enumerate(value.labels)]
        self.places = [place for place, _ in axes]
        self.owner = np.repeat(np.arange(len(axes)), [len(axis) for _, axis in axes])
        self.watched = np.concatenate([_fixed(0), *(axis for _, axis in axes)])
        self.frozen, self.seen = self.watched == FROZEN, self.labels.freezes

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        before = self.labels.freezes
        self.labels.freeze(labels)
        if self.labels.freezes > before and not self.reason:
            self.reason = reason

    def attribute(self, reason: str, primitive: str) -> None:
        """Books input axes frozen since the last call on this operation."""
        if self.labels.freezes > self.seen:
            frozen = self.labels.find(self.watched) == FROZEN
            axes = [self.places[k] for k in np.unique(self.owner[frozen & ~self.frozen]).tolist()]
            if axes:
                source = next(filter(None, map(source_of, reversed(self.path))), "")
                self.events.append(Event(self.reason or reason, primitive, source, tuple(axes)))
            self.frozen, self.seen = frozen, self.labels.freezes
        self.reason = ""

    def axis(self, size: int) -> np.ndarray:
        """Labels of a new axis; of one entry: frozen, for it cannot be shortened."""
        return _fixed(size) if size == 1 else self.labels.fresh(size)

    def array(self, value: Any) -> Value:
        """A constant: it may be cut but is not masked."""
        shape = np.shape(value)
        constant = None
        with contextlib.suppress(TypeError, ValueError):  # keys have no such value
            flat = np.asarray(value).ravel()
            if flat.size and flat.size < 4096 and not np.iscomplexobj(flat) and (flat == flat[0]).all():
                constant = float(flat[0])
        return self.filled(shape, constant)

    def filled(self, shape: Sequence[int], constant: float | None) -> Value:
        axes = tuple(map(self.axis, shape))
        return Value(axes, (constant == 0,) * len(shape), ((),) * len(shape), constant)

    def read(self, values: dict, var: Any) -> Value:
        if _is_literal(var):
            return self.array(var.val)
        return values[var]

    def jaxpr(self, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> Program:
        values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))
        program = Program(jaxpr, values, {})
        for number, eqn in enumerate(jaxpr.eqns):
            ins = [self.read(values, var) for var in eqn.invars]
            name = eqn.primitive.name
            self.path.append(eqn)
            if name in INNER:
                outs, program.inner[number] = INNER[name](self, eqn, ins)
            elif name in RULES:
                outs = RULES[name](self, eqn, ins)
            else:
                outs = unknown(self, eqn, ins)
            self.attribute("ties it to entries that cannot be removed", name)
            self.path.pop()
            if any(value.data for value in ins):
                outs = [v._replace(data=True, origin=((),) * len(v.labels)) for v in outs]
            values.update(zip(eqn.outvars, outs, strict=True))
        return program

    def closed(self, closed: Any, inputs: Sequence[Value]) -> Program:
        """An inner jaxpr, closed or (in some versions of jax) plain."""
        if hasattr(closed, "consts"):
            return self.jaxpr(closed.jaxpr, [self.array(const) for const in closed.consts], inputs)
        return self.jaxpr(closed, [], inputs)

    def results(self, program: Program) -> list[Value]:
        return [self.read(program.values, var) for var in program.jaxpr.outvars]

    def tie(self, first: Value, second: Value) -> None:
        """All axes of two arrays of one shape."""
        for a, b in zip(first.labels, second.labels, strict=True):
            self.labels.tie(a, b)

    def role(self, value: Value, axis: int, role: str) -> None:
        for place in value.origin[axis]:
            self.roles.setdefault(place, role)

    def contract(self, pairs: Sequence[tuple[Value, int]], what: str) -> None:
        """Axes summed over together: removed entries must be zero in one of the factors."""
        (x, i), (y, j) = pairs
        self.labels.tie(x.labels[i], y.labels[j])
        if not (x.zero[i] or y.zero[j]):
            self.freeze(x.labels[i], f"{what} over entries that are not zero when removed")
        for value, axis, zero in ((x, i, y.zero[j]), (y, j, x.zero[i])):
            if not zero:
                self.exposed.update(value.origin[axis])


def unknown(walk: _Walk, eqn: Any, ins: Sequence[Value]) -> list[Value]:
    """Whatever is not understood keeps its arrays whole."""
    for value in ins:
        for axis in value.labels:
            walk.freeze(axis, "is not known to the analysis")
    return [_whole(var.aval) for var in eqn.outvars]


# Rules: an equation's values from those it reads -------------------------------------------------------------------


def _elementwise(zero: Callable, *, cases: int = 0) -> Callable:
    """zero(flags, constants) -> whether removed entries of the result are zero, given those of the operands from
    `cases` on; an operand that does not vary along the axis counts by its constant."""

    def rule(walk: _Walk, eqn: Any, ins: Sequence[Value]) -> list[Value]:
        shape = eqn.outvars[0].aval.shape
        labels, flags, origin = [], [], []
        for d, size in enumerate(shape):
            along = [v for v in ins if v.labels and len(v.labels[d]) == size]
            for value in along[1:]:
                walk.labels.tie(along[0].labels[d], value.labels[d])
            labels.append(along[0].labels[d])
            origin.append(next((v.origin[d] for v in along if v.origin[d]), ()))
            own = [v.zero[d] if v.labels and len(v.labels[d]) == size else v.constant == 0 for v in ins[cases:]]
            found = zero(own, [v.constant for v in ins[cases:]])
            if found is None:  # infinite or undefined in the masked program
                walk.freeze(labels[d], "divides by, or takes the logarithm of, entries that are zero when removed")
            flags.append(bool(found))
        constant = ins[0].constant if len(ins) == 1 and eqn.primitive.name in KEEPS_CONSTANTS else None
        return [Value(tuple(labels), tuple(flags), tuple(origin), constant) for _ in eqn.outvars]

    return rule


KEEPS_CONSTANTS = ("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient")
ZERO_AT_ZERO = """
abs asin asinh atan atanh bessel_i1e cbrt conj convert_element_type copy copy_p erf erf_inv expm1 floor
ceil imag log1p neg real reduce_precision round sign sin sinh sqrt square stop_gradient tan tanh
sharding_constraint name mesh_cast pvary
"""
NOT_ZERO_AT_ZERO = """
acos bessel_i0e cos cosh erfc exp exp2 is_finite logistic not one_minus_square population_count clz eq ne lt le gt ge
nextafter shift_left shift_right_logical shift_right_arithmetic complex
"""
INFINITE_AT_ZERO = ("log", "log2", "rsqrt", "lgamma", "digamma", "acosh")


def _integer_power(walk, eqn, ins):
    positive = eqn.params["y"] > 0
    return _elementwise(lambda own, _: own[0] if positive else (None if own[0] else False))(walk, eqn, ins)


def _power(own, constants):
    exponent = constants[1]
    if own[0] and (exponent is None or exponent < 0):
        return None
    return own[0] and exponent > 0


def _extreme(sign: int) -> Callable:
    """max (1) or min (-1): zero if all operands are, or constants on the other side of zero."""
    return lambda own, constants: (
        all(z or (c is not None and sign * c <= 0) for z, c in zip(own, constants)) and any(own)
    )


def _clamp(own, constants):
    low, _, high = constants
    return own[1] and low is not None and high is not None and low <= 0 <= high


def _all(own, constants):
    del constants
    return all(own)


def _add(walk, eqn, ins):
    x, y = ins
    if walk.branches == "separate" and x.data and y.data and x.shape == y.shape:
        same = lambda a, b: np.array_equal(walk.labels.find(a), walk.labels.find(b))
        if not all(map(same, x.labels, y.labels)):  # else one channel, e.g. x + x**3
            return [_whole(eqn.outvars[0].aval)]
    return _elementwise(_all)(walk, eqn, ins)


def _divide(own, constants):
    del constants
    return None if own[1] else own[0]


RULES: dict[str, Callable] = {
    **dict.fromkeys(ZERO_AT_ZERO.split(), _elementwise(lambda own, _: own[0])),
    **dict.fromkeys(NOT_ZERO_AT_ZERO.split(), _elementwise(lambda *_: False)),
    **dict.fromkeys(INFINITE_AT_ZERO, _elementwise(lambda own, _: None if own[0] else False)),
    **dict.fromkeys(("mul", "and"), _elementwise(lambda own, _: any(own))),
    **dict.fromkeys(("or", "xor", "atan2"), _elementwise(_all)),
    **dict.fromkeys(("div", "rem"), _elementwise(_divide)),
    "max": _elementwise(_extreme(1)),
    "min": _elementwise(_extreme(-1)),
    "pow": _elementwise(_power),
    "integer_pow": _integer_power,
    "clamp": _elementwise(_clamp),
    **dict.fromkeys(("add", "sub", "add_any"), _add),
    "select_n": _elementwise(_all, cases=1),
}


def rule(*names: str) -> Callable:
    def add(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _pick(value: Value, axes: Sequence[int]) -> Value:
    return Value(*(tuple(field[a] for a in axes) for field in value[:3]), value.constant)


@rule("bitcast_convert_type")
def _bitcast(walk, eqn, ins):
    same = eqn.outvars[0].aval.shape == ins[0].shape  # else bytes are an axis
    return (_elementwise(_all) if same else unknown)(walk, eqn, ins)


@rule("optimization_barrier", "device_put")
def _each(walk, eqn, ins):
    del walk, eqn
    return list(ins)


@rule("transpose")
def _transpose(walk, eqn, ins):
    return [_pick(ins[0], eqn.params["permutation"])]


@rule("squeeze")
def _squeeze(walk, eqn, ins):
    dropped = eqn.params["dimensions"]
    return [_pick(ins[0], [a for a in range(len(ins[0].labels)) if a not in dropped])]


@rule("rev")
def _reverse(walk, eqn, ins):
    (x,), turned = ins, eqn.params["dimensions"]
    labels = tuple(axis[::-1] if a in turned else axis for a, axis in enumerate(x.labels))
    return [x._replace(labels=labels)]


@rule("broadcast_in_dim")
def _broadcast(walk, eqn, ins):
    x, shape = ins[0], eqn.outvars[0].aval.shape
    for extra in ins[1:]:  # sizes of a dynamic shape
        walk.freeze(np.concatenate([_fixed(0), *extra.labels]), "sets a shape")
    found = list(zip(*walk.filled(shape, x.constant)[:3]))
    for a, d in enumerate(eqn.params["broadcast_dimensions"]):
        if len(x.labels[a]) == shape[d]:
            found[d] = tuple(field[a] for field in x[:3])
    return [Value(*(tuple(field) for field in zip(*found)), x.constant) if found else Value((), (), (), x.constant)]


@rule("reshape")
def _reshape(walk, eqn, ins):
    x, shape = ins[0], eqn.outvars[0].aval.shape
    labels, zero, origin = [_fixed(n) for n in shape], [x.constant == 0] * len(shape), [()] * len(shape)
    mark = ("split", id(eqn))
    for old, new in _blocks(x.shape, shape):
        flags = [x.zero[a] for a in old if walk.labels.is_live(x.labels[a])]
        if len(old) == len(new) == 1:
            labels[new[0]], origin[new[0]] = x.labels[old[0]], x.origin[old[0]]
        elif old and new:
            sizes = [shape[d] for d in new]
            merged = walk.labels.merge([x.labels[a] for a in old])
            for d, axis in zip(new, walk.labels.split(merged, sizes, mark), strict=True):
                labels[d] = axis
        for d in new:
            zero[d] = bool(flags) and all(flags)
    return [Value(tuple(labels), tuple(zero), tuple(origin), x.constant)]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of one size in pairs of runs of equal product; axes of size 1 left out."""
    if 0 in old:
        return []
    olds, news = ([a for a, n in enumerate(shape) if n != 1] for shape in (old, new))
    blocks, i, j = [], 0, 0
    while i < len(olds):
        first, second = [olds[i]], [news[j]]
        i, j = i + 1, j + 1
        while (a := math.prod(old[k] for k in first)) != (b := math.prod(new[k] for k in second)):
            if a < b:
                first.append(olds[i])
                i += 1
            else:
                second.append(news[j])
                j += 1
        blocks.append((first, second))
    return blocks


@rule("concatenate")
def _concatenate(walk, eqn, ins):
    dimension, labels, flags, origin = eqn.params["dimension"], [], [], []
    for d in range(len(ins[0].labels)):
        if d == dimension:
            labels.append(np.concatenate([v.labels[d] for v in ins]))
        else:
            for value in ins[1:]:
                walk.labels.tie(ins[0].labels[d], value.labels[d])
            labels.append(ins[0].labels[d])
        flags.append(all(v.zero[d] for v in ins if d != dimension or walk.labels.is_live(v.labels[d])))
        origin.append(tuple(place for v in ins for place in v.origin[d]))
    return [Value(tuple(labels), tuple(flags), tuple(origin))]


@rule("stack")
def _stack(walk, eqn, ins):
    for value in ins[1:]:
        walk.tie(ins[0], value)
    axis = eqn.params["axis"]
    insert = lambda field, new: (*field[:axis], new, *field[axis:])
    zero = tuple(map(all, zip(*(value.zero for value in ins))))
    size = eqn.outvars[0].aval.shape[axis]
    return [Value(insert(ins[0].labels, _fixed(size)), insert(zero, False), ((),) * (len(zero) + 1))]


@rule("unstack")
def _unstack(walk, eqn, ins):
    (x,), axis = ins, eqn.params["axis"]
    walk.freeze(x.labels[axis], "is taken apart")
    part = _pick(x, [a for a in range(len(x.labels)) if a != axis])
    return [part] * len(eqn.outvars)


def _part(walk: _Walk, axis: np.ndarray, low: int, high: int, step: int = 1) -> np.ndarray:
    """A part of an axis; a single entry is frozen, since an axis of one may be squeezed or broadcast next."""
    part = axis[low:high:step]
    if len(part) == 1 < len(axis):
        walk.freeze(part, "takes a single entry")
        part = _fixed(1)
    return part


@rule("slice")
def _slice(walk, eqn, ins):
    x, labels, origin = ins[0], [], []
    steps = eqn.params["strides"] or (1,) * len(x.labels)
    for d, (low, high, step) in enumerate(zip(eqn.params["start_indices"], eqn.params["limit_indices"], steps)):
        if step != 1:
            walk.freeze(x.labels[d], "takes every so many entries")
        labels.append(_part(walk, x.labels[d], low, high, step))
        origin.append(x.origin[d])
    return [x._replace(labels=tuple(labels), origin=tuple(origin))]


@rule("split")
def _split(walk, eqn, ins):
    x, axis, outs, start = ins[0], eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        replaced = lambda field, new: (*field[:axis], new, *field[axis + 1 :])
        part = _part(walk, x.labels[axis], start, start + size)
        outs.append(x._replace(labels=replaced(x.labels, part)))
        start += size
    return outs


@rule("tile")
def _tile(walk, eqn, ins):
    x, reps = ins[0], eqn.params["reps"]
    labels = tuple(np.tile(axis, n) for axis, n in zip(x.labels, reps, strict=True))
    return [x._replace(labels=labels)]


@rule("pad")
def _pad(walk, eqn, ins):
    (x, fill), labels, flags, origin = ins, [], [], []
    padded = any(entry != (0, 0, 0) for entry in eqn.params["padding_config"])
    for d, (low, high, inside) in enumerate(eqn.params["padding_config"]):
        if inside or min(low, high) < 0:
            walk.freeze(x.labels[d], "pads between entries, or cuts")
            labels.append(_fixed(eqn.outvars[0].aval.shape[d]))
        else:
            labels.append(np.concatenate([walk.labels.fresh(low), x.labels[d], walk.labels.fresh(high)]))
        flags.append(x.zero[d] and (not padded or fill.constant == 0))
        origin.append(x.origin[d])
    return [Value(tuple(labels), tuple(flags), tuple(origin))]


@rule("dot_general")
def _dot(walk, eqn, ins):
    x, y = ins
    (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    for i, j in zip(x_sum, y_sum, strict=True):
        walk.contract([(x, i), (y, j)], "a product sums")
        walk.role(x, i, "consumer")
        walk.role(y, j, "consumer")
    out = []
    for i, j in zip(x_batch, y_batch, strict=True):
        walk.labels.tie(x.labels[i], y.labels[j])
        out.append((x.labels[i], x.zero[i] or y.zero[j], ()))
    for value, used in ((x, (*x_sum, *x_batch)), (y, (*y_sum, *y_batch))):
        for d in (d for d in range(len(value.labels)) if d not in used):
            walk.role(value, d, "producer")
            out.append((value.labels[d], value.zero[d], ()))
    return [Value(*map(tuple, zip(*out))) if out else Value((), (), ())]


@rule("conv_general_dilated")
def _convolve(walk, eqn, ins):
    x, kernel = ins
    spec = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] > 1:
        return unknown(walk, eqn, ins)
    (batch, feature, *space), (out, inward, *window) = spec.lhs_spec, spec.rhs_spec
    for value, axes in ((x, space), (kernel, window)):
        for a in axes:
            walk.freeze(value.labels[a], "is a convolution's space")
    channels, outputs = x.labels[feature], kernel.labels[out]
    if groups == 1:
        walk.contract([(x, feature), (kernel, inward)], "a convolution sums")
    else:
        mark = ("groups", id(eqn))
        of_x, inside = walk.labels.split(channels, (groups, len(channels) // groups), (mark, 0))
        of_kernel, _ = walk.labels.split(outputs, (groups, len(outputs) // groups), (mark, 1))
        walk.labels.tie(of_x, of_kernel)
        walk.labels.tie(inside, kernel.labels[inward])
        if not (x.zero[feature] or kernel.zero[inward]):
            walk.freeze(inside, "a convolution sums over entries that are not zero when removed")
        if not x.zero[feature]:
            walk.exposed.update(kernel.origin[inward])
    depthwise = kernel.labels[inward].size == 1 and groups > 1
    for a in window:
        walk.role(kernel, a, "window")
    walk.role(kernel, inward, "consumer")
    walk.role(kernel, out, "depthwise" if depthwise else "producer")
    zero = kernel.zero[out] or (depthwise and groups == len(outputs) and x.zero[feature])
    shape = eqn.outvars[0].aval.shape
    found = [(_fixed(n), False, ()) for n in shape]
    found[spec.out_spec[0]] = (x.labels[batch], x.zero[batch], ())
    found[spec.out_spec[1]] = (outputs, zero, ())
    return [Value(*map(tuple, zip(*found)))]


def _reduce(passes: bool) -> Callable:
    def reduce(walk, eqn, ins):
        gone, count = eqn.params["axes"], len(eqn.outvars)
        for x in ins[:count]:
            for d in gone:
                if not passes:
                    walk.freeze(x.labels[d], "looks for the largest, smallest or a product")
                elif not x.zero[d]:
                    walk.freeze(x.labels[d], "sums over entries that are not zero when removed")
                elif walk.sums == "freeze":
                    walk.freeze(x.labels[d], "sums over all entries")
        kept = [d for d in range(len(ins[0].labels)) if d not in gone]
        outs = [_pick(x, kept)._replace(constant=None) for x in ins[:count]]
        if not passes and 0 in ins[0].shape:  # the largest of nothing is not zero
            outs = [x._replace(zero=(False,) * len(kept)) for x in outs]
        return outs

    return reduce


RULES["reduce_sum"] = _reduce(True)
RULES |= dict.fromkeys(
    ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"),
    _reduce(False),
)


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(walk, eqn, ins):
    """A window over some axes; the others pass."""
    (x,), shape = ins, eqn.outvars[0].aval.shape
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    windows = list(zip(*(eqn.params[name] for name in names), strict=True))
    untouched = [window[:4] == (1, 1, (0, 0), 1) for window in windows]
    # The largest of nothing but padding is no zero, so each window must cover an entry.
    covers = all(max(padding) < size and apart == hole == 1 for size, _, padding, apart, hole in windows)
    labels = []
    for axis, size, whole in zip(x.labels, shape, untouched, strict=True):
        if not whole:
            walk.freeze(axis, "slides a window over it")
        labels.append(axis if whole else _fixed(size))
    zero = covers or eqn.primitive.name == "reduce_window_sum"
    return [Value(tuple(labels), tuple(zero and z for z in x.zero), ((),) * len(shape))]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk, eqn, ins):
    walk.freeze(ins[0].labels[eqn.params["axis"]], "accumulates along it")
    keeps = eqn.primitive.name in ("cumsum", "cummax", "cummin")
    return [ins[0]._replace(zero=tuple(keeps and z for z in ins[0].zero), constant=None)]


@rule("sort")
def _sort(walk, eqn, ins):
    for x in ins:
        walk.tie(ins[0], x)
        walk.freeze(x.labels[eqn.params["dimension"]], "sorts along it")
    return [x._replace(zero=tuple(z and len(ins) == 1 for z in x.zero), constant=None) for x in ins]


@rule("iota")
def _iota(walk, eqn, ins):
    value = walk.filled(eqn.outvars[0].aval.shape, None)
    walk.labels.freeze(value.labels[eqn.params["dimension"]])
    return [value]


@rule("random_bits")
def _bits(walk, eqn, ins):
    for value in ins:
        for axis in value.labels:
            walk.freeze(axis, "is a random key")
    inner = len(eqn.params["shape"])
    value = walk.filled(eqn.outvars[0].aval.shape, None)
    for axis in value.labels[: len(value.labels) - inner]:
        walk.labels.freeze(axis)
    return [value]


@rule("gather")
def _gather(walk, eqn, ins):
    x, index = ins
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    fills = eqn.params.get("fill_value") not in (None, 0)  # what an index outside gives
    for axis in index.labels:
        walk.freeze(axis, "is an index")
    batching = getattr(numbers, "operand_batching_dims", ())
    removed = {*numbers.collapsed_slice_dims, *batching}
    inner = [d for d in range(len(x.labels)) if d not in removed]
    shape = eqn.outvars[0].aval.shape
    found = [(_fixed(n), False, ()) for n in shape]
    for d, axis in enumerate(x.labels):
        whole = d not in removed and sizes[d] == len(axis)
        if not whole:
            walk.freeze(axis, "is indexed")
        else:
            walk.role(x, d, "producer")
            found[numbers.offset_dims[inner.index(d)]] = (axis, x.zero[d] and not fills, ())
    return [Value(*map(tuple, zip(*found))) if found else Value((), (), ())]


@rule("dynamic_slice")
def _dynamic_slice(walk, eqn, ins):
    x = ins[0]
    labels = []
    for axis, size in zip(x.labels, eqn.params["slice_sizes"], strict=True):
        if size != len(axis):
            walk.freeze(axis, "is indexed")
        labels.append(axis if size == len(axis) else _fixed(size))
    return [x._replace(labels=tuple(labels), origin=((),) * len(labels))]


@rule("dynamic_update_slice")
def _update_slice(walk, eqn, ins):
    x, part = ins[:2]
    for a, b in zip(x.labels, part.labels, strict=True):
        if len(a) == len(b):
            walk.labels.tie(a, b)
        else:
            walk.freeze(a, "is indexed")
            walk.freeze(b, "is written at an index")
    zero = tuple(a and b for a, b in zip(x.zero, part.zero))
    return [Value(x.labels, zero, ((),) * len(zero))]


# Rules of equations with jaxprs inside: (values, programs) ------------------------------------------------------------


def _call(name: str) -> Callable:
    def call(walk, eqn, ins):
        program = walk.closed(eqn.params[name], ins)
        return walk.results(program), [program]

    return call


class _Loop(NamedTuple):
    """How many of a scan's operands are constants and how many are carried; the rest is scanned over."""

    consts: int
    carry: int


def _loop_of(eqn: Any) -> _Loop:
    if "num_carry" in eqn.params:
        return _Loop(eqn.params["num_consts"], eqn.params["num_carry"])
    consts, carry, _ = eqn.params["ft_in"].unpack()  # jax 0.12
    return _Loop(len(consts), len(carry))


def _settled(walk: _Walk, body: Callable, carry: list[Value]) -> tuple[list[Value], list[Value], Program]:
    """(carry, other results, program) once what is zero in the carry is so after every turn; body(carry) -> program."""
    while True:
        program = body(carry)
        outs = walk.results(program)
        for before, after in zip(carry, outs):
            walk.tie(before, after)
        lower = [
            v._replace(zero=tuple(a and b for a, b in zip(v.zero, o.zero)), origin=((),) * len(v.zero), constant=None)
            for v, o in zip(carry, outs)
        ]
        if [v.zero for v in lower] == [v.zero for v in carry]:
            return lower, outs[len(carry) :], program
        carry = lower


def _scan(walk, eqn, ins):
    loop = _loop_of(eqn)
    consts, carry, scanned = ins[: loop.consts], ins[loop.consts :][: loop.carry], ins[loop.consts + loop.carry :]
    for x in scanned:
        walk.freeze(x.labels[0], "is scanned over")
    each = [Value(*(field[1:] for field in x[:3]), x.constant) for x in scanned]
    carry = [v._replace(constant=None) for v in carry]
    body = lambda carry: walk.closed(eqn.params["jaxpr"], [*consts, *carry, *each])
    carry, outs, program = _settled(walk, body, carry)
    lead = lambda v: Value((_fixed(eqn.params["length"]), *v.labels), (False, *v.zero), ((), *(() for _ in v.zero)))
    return [*carry, *map(lead, outs)], [program]


def _while(walk, eqn, ins):
    before, inside = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    for_test, consts, carry = ins[:before], ins[before : before + inside], ins[before + inside :]
    body = lambda carry: walk.closed(eqn.params["body_jaxpr"], [*consts, *carry])
    carry, _, program = _settled(walk, body, [v._replace(constant=None) for v in carry])
    test = walk.closed(eqn.params["cond_jaxpr"], [*for_test, *carry])
    return carry, [program, test]


def _cond(walk, eqn, ins):
    programs = [walk.closed(branch, ins[1:]) for branch in eqn.params["branches"]]
    first, *others = map(walk.results, programs)
    for outs in others:
        for a, b in zip(first, outs, strict=True):
            walk.tie(a, b)
    zero = [tuple(map(all, zip(*(v.zero for v in same)))) for same in zip(first, *others)]
    return [v._replace(zero=z, origin=((),) * len(z), constant=None) for v, z in zip(first, zero)], programs


INNER: dict[str, Callable] = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint"), _call("jaxpr")),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), _call("call_jaxpr")),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


# Running without the removed entries --------------------------------------------------------------------------------


class Alive:
    """Which labels live. removed: simple labels that die."""

    def __init__(self, labels: Labels, removed: set[int]):
        self.labels, self.removed = labels, removed
        self._known: dict[int, bool] = {FROZEN: True}

    def __call__(self, axis: np.ndarray) -> np.ndarray:
        """bool, of the axis's shape: the entries that stay."""
        if not self.removed or not axis.any():
            return np.ones(axis.shape, bool)
        unique, inverse = np.unique(self.labels.find(axis), return_inverse=True)
        for label in unique.tolist():
            if label not in self._known:
                self._known[label] = not self.removed & set(self.labels.parts(label))
        return np.array([self._known[label] for label in unique.tolist()])[inverse].reshape(axis.shape)

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(int(self(axis).sum()) for axis in value.labels)

    def cut(self, array: Any, value: Value) -> Any:
        for axis, labels in enumerate(value.labels):
            kept = self(labels)
            if not kept.all():
                array = jnp.take(array, np.flatnonzero(kept), axis)
        return array


def run(analysis: Analysis, removed: set[int], arrays: Sequence[Any]) -> list[Any]:
    """Results of the analysed program for inputs without the `removed` entries."""
    return _function(Alive(analysis.labels, removed), analysis.consts, analysis.program)(*arrays)


def _function(alive: Alive, consts: Sequence[Any], program: Program) -> Callable:
    """The program at the smaller sizes, as a function of its inputs there; consts: whole."""
    values = [program.values[var] for var in program.jaxpr.constvars]
    return lambda *arrays: _run(alive, program, [*map(alive.cut, consts, values), *arrays])


def _inner(alive: Alive, closed: Any, program: Program) -> Callable:
    return _function(alive, getattr(closed, "consts", ()), program)


def _run(alive: Alive, program: Program, arrays: Sequence[Any]) -> list[Any]:
    """arrays: of the constants and the inputs."""
    jaxpr = program.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), arrays, strict=True))
    read = lambda var: var.val if _is_literal(var) else env[var]
    last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not _is_literal(var)}
    keep = {var for var in jaxpr.outvars if not _is_literal(var)}
    for number, eqn in enumerate(jaxpr.eqns):
        ins, name = [read(var) for var in eqn.invars], eqn.primitive.name
        if name in RUNS:
            outs = RUNS[name](alive, eqn, ins, program.inner[number])
        else:
            params = dict(eqn.params)
            if name in RESIZES:
                known = ([_known(program, var) for var in variables] for variables in (eqn.invars, eqn.outvars))
                params |= RESIZES[name](alive, eqn, *known)
            outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(params))
            outs = outs if eqn.primitive.multiple_results else [outs]
            if name in DRAWS:
                outs = [alive.cut(out, program.values[var]) for out, var in zip(outs, eqn.outvars, strict=True)]
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in eqn.invars:
            if not _is_literal(var) and last[var] == number and var not in keep:
                env.pop(var, None)
    return [read(var) for var in jaxpr.outvars]


def _known(program: Program, var: Any) -> Value:
    return _whole(var.aval) if _is_literal(var) else program.values[var]


def _limits(alive: Alive, eqn: Any, ins: list, outs: list) -> dict:
    before = lambda axis, stop: int(alive(axis)[:stop].sum())
    axes = list(zip(ins[0].labels, eqn.params["start_indices"], eqn.params["limit_indices"], strict=True))
    return dict(
        start_indices=tuple(before(axis, start) for axis, start, _ in axes),
        limit_indices=tuple(before(axis, stop) for axis, _, stop in axes),
    )


def _paddings(alive: Alive, eqn: Any, ins: list, outs: list) -> dict:
    config = []
    for (low, high, inside), axis in zip(eqn.params["padding_config"], outs[0].labels, strict=True):
        kept = alive(axis)
        count = lambda part: int(part.sum())
        ends = (low, high) if min(low, high) < 0 or inside else (count(kept[:low]), count(kept[len(kept) - high :]))
        config.append((*ends, inside))
    return dict(padding_config=tuple(config))


def _groups(alive: Alive, eqn: Any, ins: list, outs: list) -> dict:
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if groups == 1:
        return {}
    kept = alive(ins[1].labels[spec.rhs_spec[0]]).reshape(groups, -1)
    return dict(feature_group_count=int(kept.any(1).sum()))


def _parts(alive: Alive, eqn: Any, ins: list, outs: list) -> dict:
    return dict(sizes=tuple(alive.shape(out)[eqn.params["axis"]] for out in outs))


def _slice_sizes(alive: Alive, eqn: Any, ins: list, outs: list) -> dict:
    sizes = eqn.params["slice_sizes"]
    kept = alive.shape(ins[0])
    return dict(slice_sizes=tuple(k if n == len(a) else n for n, a, k in zip(sizes, ins[0].labels, kept)))


def _shape(name: str) -> Callable:
    return lambda alive, eqn, ins, outs: {name: alive.shape(outs[0])}


RESIZES: dict[str, Callable] = {  # parameters of an equation that hold sizes
    "broadcast_in_dim": _shape("shape"),
    "iota": _shape("shape"),
    "reshape": _shape("new_sizes"),
    "slice": _limits,
    "split": _parts,
    "pad": _paddings,
    "conv_general_dilated": _groups,
    "gather": _slice_sizes,
    "dynamic_slice": _slice_sizes,
}


DRAWS = ("random_bits",)  # drawn in full, then cut: other sizes would be other numbers


def _run_call(name: str) -> Callable:
    return lambda alive, eqn, ins, inner: _inner(alive, eqn.params[name], inner[0])(*ins)


def _run_remat(alive, eqn, ins, inner):
    function = _inner(alive, eqn.params["jaxpr"], inner[0])
    return jax.checkpoint(function, policy=eqn.params.get("policy"), prevent_cse=eqn.params.get("prevent_cse", True))(
        *ins
    )


def _beside(
    alive: Alive, function: Callable, known: Sequence[Value], wanted: Sequence[Value], arrays: Sequence
) -> list:
    """Results of another function of arrays in the program, e.g. a derivative, at the smaller sizes.

    known, wanted: what its operands and its results correspond to. Raises ValueError if it would couple more
    entries than the program does: then it has no meaning without the removed ones.
    """
    structs = [jax.ShapeDtypeStruct(value.shape, array.dtype) for value, array in zip(known, arrays, strict=True)]
    closed = jax.make_jaxpr(function)(*structs)
    walk = _Walk(labels=alive.labels.copy())
    program = walk.closed(closed, known)
    for value, other in zip(walk.results(program), wanted, strict=True):
        walk.tie(value, other)
    inside = Alive(walk.labels, alive.removed)
    if any(inside.shape(value) != alive.shape(value) for value in (*known, *wanted)):
        raise ValueError(
            "the hand-written derivative of a jax.custom_jvp or custom_vjp function couples channels that the function "
            "itself does not: it cannot be evaluated without the removed ones."
        )
    return _inner(inside, closed, program)(*arrays)


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _custom(alive: Alive, eqn: Any, program: Program) -> tuple[Callable, Callable, list[Value], list[Value]]:
    """(function, full, inputs, results) of an equation with a hand-written derivative; full: at the full size.

    full(primals) -> (function of those that it may be differentiated by, these, their numbers)
    """
    bind = functools.partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params))

    def full(primals):
        moving = [i for i, x in enumerate(primals) if i >= eqn.params["num_consts"] and _is_inexact(x)]

        def function(*moved):
            return bind(*(moved[moving.index(i)] if i in moving else x for i, x in enumerate(primals)))

        return function, [primals[i] for i in moving], moving

    function = _inner(alive, eqn.params["call_jaxpr"], program)
    plain = [value._replace(constant=None) for value in map(program.values.get, program.jaxpr.invars)]
    results = [_known(program, var) for var in program.jaxpr.outvars]
    return function, full, plain, results


def _run_custom_jvp(alive, eqn, ins, inner):
    """The function with its own derivative: relu has slope 0 at 0, which max(x, 0) has not."""
    plain, full, known, results = _custom(alive, eqn, inner[0])
    function = jax.custom_jvp(plain)

    @function.defjvp
    def derivative(primals, tangents):
        _, _, moving = full(primals)

        def whole(*arrays):
            at, start, _ = full(arrays[: len(primals)])
            outs, slopes = jax.jvp(at, start, list(arrays[len(primals) :]))
            return [*outs, *(slope for out, slope in zip(outs, slopes) if _is_inexact(out))]

        outs = plain(*primals)
        wanted = [*results, *(value for value, out in zip(results, outs) if _is_inexact(out))]
        operands = [*known, *(known[i] for i in moving)]
        found = _beside(alive, whole, operands, wanted, [*primals, *(tangents[i] for i in moving)])
        slopes = iter(found[len(outs) :])
        none = lambda out: np.zeros(out.shape, jax.dtypes.float0)
        return found[: len(outs)], [next(slopes) if _is_inexact(out) else none(out) for out in outs]

    return function(*ins)


def _run_custom_vjp(alive, eqn, ins, inner):
    """The function with its own backward rule, which evaluates it anew: a straight-through rounding has slope 1."""
    plain, full, known, results = _custom(alive, eqn, inner[0])
    function = jax.custom_vjp(lambda *primals: tuple(plain(*primals)))

    def forward(*primals):
        return function(*primals), primals

    def backward(primals, slopes):
        _, _, moving = full(primals)
        steep = [i for i, slope in enumerate(slopes) if slope.dtype != jax.dtypes.float0]

        def whole(*arrays):
            at, start, _ = full(arrays[: len(primals)])
            outs, pull = jax.vjp(at, *start)
            given = dict(zip(steep, arrays[len(primals) :]))
            return pull([given.get(i, np.zeros(out.shape, jax.dtypes.float0)) for i, out in enumerate(outs)])

        # Slopes along removed channels need not be zero, even if the entries are.
        operands = [*known, *(results[i]._replace(zero=(False,) * len(results[i].zero), constant=None) for i in steep)]
        arrays = [*primals, *(slopes[i] for i in steep)]
        found = dict(zip(moving, _beside(alive, whole, operands, [known[i] for i in moving], arrays)))
        return tuple(found.get(i) for i in range(len(primals)))

    function.defvjp(forward, backward)
    return function(*ins)


def _run_scan(alive, eqn, ins, inner):
    loop, body = _loop_of(eqn), _inner(alive, eqn.params["jaxpr"], inner[0])
    consts, carry, scanned = ins[: loop.consts], ins[loop.consts :][: loop.carry], ins[loop.consts + loop.carry :]

    def turn(carry, each):
        outs = body(*consts, *carry, *each)
        return tuple(outs[: loop.carry]), tuple(outs[loop.carry :])

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, outs = jax.lax.scan(turn, tuple(carry), tuple(scanned), **options)
    return [*carry, *outs]


def _run_while(alive, eqn, ins, inner):
    before, inside = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    for_test, consts, carry = ins[:before], ins[before : before + inside], ins[before + inside :]
    body = _inner(alive, eqn.params["body_jaxpr"], inner[0])
    test = _inner(alive, eqn.params["cond_jaxpr"], inner[1])
    return jax.lax.while_loop(
        lambda carry: test(*for_test, *carry)[0], lambda carry: tuple(body(*consts, *carry)), tuple(carry)
    )


def _run_cond(alive, eqn, ins, inner):
    branches = [
        functools.partial(lambda function, *arrays: tuple(function(*arrays)), _inner(alive, branch, program))
        for branch, program in zip(eqn.params["branches"], inner, strict=True)
    ]
    return jax.lax.switch(ins[0], branches, *ins[1:])


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
