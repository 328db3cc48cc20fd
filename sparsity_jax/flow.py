"""Which entries of a program's arrays live or die together, and the same program run without the dead ones.

`analyse` walks a jaxpr once and labels every axis of every array (`labels.Labels`): entries that must be removed
together get one label, entries that must stay are FROZEN. `run` evaluates the same jaxpr on arrays whose removed
entries have been cut out. Neither knows a framework; `groups` gives both to users.

What keeps it exact is one flag per axis: are removed entries exactly zero while they are still there, masked? A sum
over an axis with removed entries is the same with and without them only if they are. An operation that would not be
the same, or that is not known, freezes the axes it touches and is reported.
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
    roles: dict[tuple[int, int], str]  # (input, axis) -> producer, consumer or depthwise
    used: set[int]  # inputs that some equation reads


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
        axes = tuple(walk.labels.fresh(n, ("input", i, a)) if free else _fixed(n) for a, n in enumerate(var.aval.shape))
        for axis in axes:
            walk.labels.watch(axis)
        inputs.append(
            Value(axes, (True,) * len(axes), tuple(((i, a),) for a in range(len(axes))), data=i in frozen_inputs)
        )
    walk.inputs = inputs
    consts = [walk.array(const) for const in closed.consts]
    program = walk.jaxpr(closed.jaxpr, consts, inputs)
    for var in closed.jaxpr.outvars:
        for axis in walk.read(program.values, var).labels:
            walk.freeze(axis, "is an output")
    walk.attribute("is an output", "output", "")
    names = {var: i for i, var in enumerate(closed.jaxpr.invars)}
    used = {names[var] for eqn in closed.jaxpr.eqns for var in eqn.invars if not _is_literal(var) and var in names}
    return Analysis(program, closed.consts, walk.labels, inputs, walk.events, walk.roles, used)


def _fixed(size: int) -> np.ndarray:
    return np.zeros(size, int)


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
        self.inputs: list[Value] = []
        self.events: list[Event] = []
        self.roles: dict[tuple[int, int], str] = {}
        self.attributed, self.known = 0, {}
        self.reason = ""

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        before = self.labels.frozen
        self.labels.freeze(labels)
        if self.labels.frozen > before and not self.reason:
            self.reason = reason

    def attribute(self, reason: str, primitive: str, source: str) -> None:
        """Books input axes frozen since the last call on this operation."""
        if self.labels.frozen == self.attributed:
            return
        self.attributed, axes = self.labels.frozen, []
        for i, value in enumerate(self.inputs):
            for a, axis in enumerate(value.labels):
                count = int((self.labels.find(axis) == FROZEN).sum()) if axis.any() else 0
                if count > self.known.get((i, a), 0):
                    self.known[i, a] = count
                    axes.append((i, a))
        if axes:
            self.events.append(Event(self.reason or reason, primitive, source, tuple(axes)))
        self.reason = ""

    def array(self, value: Any) -> Value:
        """A constant: it may be cut but is not masked."""
        shape = np.shape(value)
        constant = None
        with contextlib.suppress(TypeError, ValueError):  # keys have no such value
            flat = np.asarray(value).ravel()
            constant = float(flat[0]) if flat.size and flat.size < 4096 and (flat == flat[0]).all() else None
        return self.filled(shape, constant)

    def filled(self, shape: Sequence[int], constant: float | None) -> Value:
        axes = tuple(self.labels.fresh(n) for n in shape)
        return Value(axes, (constant == 0,) * len(shape), ((),) * len(shape), constant)

    def fixed(self, aval: Any) -> Value:
        """Nothing may be removed."""
        shape = getattr(aval, "shape", ())
        return Value(tuple(map(_fixed, shape)), (False,) * len(shape), ((),) * len(shape))

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
            if name in INNER:
                outs, program.inner[number] = INNER[name](self, eqn, ins)
            elif name in RULES:
                outs = RULES[name](self, eqn, ins)
            else:
                outs = unknown(self, eqn, ins)
            self.attribute("ties it to entries that cannot be removed", name, source_of(eqn))
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


def unknown(walk: _Walk, eqn: Any, ins: Sequence[Value]) -> list[Value]:
    """Whatever is not understood keeps its arrays whole."""
    for value in ins:
        for axis in value.labels:
            walk.freeze(axis, "is not known to the analysis")
    return [walk.fixed(var.aval) for var in eqn.outvars]


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
ceil imag log1p neg real reduce_precision round sign sin sinh sqrt square stop_gradient tan tanh device_put
optimization_barrier sharding_constraint name bitcast_convert_type mesh_cast pvary
"""
NOT_ZERO_AT_ZERO = """
acos acosh cos cosh digamma erfc exp exp2 is_finite lgamma logistic not population_count clz
regularized_incomplete_beta igamma igammac polygamma eq ne lt le gt ge nextafter shift_left shift_right_logical
shift_right_arithmetic complex
"""
INFINITE_AT_ZERO = ("log", "rsqrt")


def _integer_power(walk, eqn, ins):
    positive = eqn.params["y"] > 0
    return _elementwise(lambda own, _: own[0] if positive else (None if own[0] else False))(walk, eqn, ins)


def _power(own, constants):
    return own[0] and constants[1] is not None and constants[1] > 0


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
    both = walk.branches == "separate" and x.data and y.data and x.shape == y.shape
    if both and any(walk.labels.is_live(axis) for value in ins for axis in value.labels):
        return [walk.fixed(eqn.outvars[0].aval)]
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
    origin = tuple(() if a in turned else o for a, o in enumerate(x.origin))
    return [x._replace(labels=labels, origin=origin)]


@rule("broadcast_in_dim")
def _broadcast(walk, eqn, ins):
    x, shape = ins[0], eqn.outvars[0].aval.shape
    for extra in ins[1:]:  # sizes of a dynamic shape
        walk.freeze(np.concatenate([_fixed(0), *extra.labels]), "sets a shape")
    found = list(zip(*walk.filled(shape, x.constant)[:3])) or []
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


@rule("slice")
def _slice(walk, eqn, ins):
    x, labels, origin = ins[0], [], []
    steps = eqn.params["strides"] or (1,) * len(x.labels)
    for d, (low, high, step) in enumerate(zip(eqn.params["start_indices"], eqn.params["limit_indices"], steps)):
        if step != 1:
            walk.freeze(x.labels[d], "takes every so many entries")
        labels.append(x.labels[d][low:high:step])
        origin.append(x.origin[d])
    return [x._replace(labels=tuple(labels), origin=tuple(origin))]


@rule("split")
def _split(walk, eqn, ins):
    x, axis, outs, start = ins[0], eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        replaced = lambda field, new: (*field[:axis], new, *field[axis + 1 :])
        part = x.labels[axis][start : start + size]
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
    for d, (low, high, inside) in enumerate(eqn.params["padding_config"]):
        axis, kept = x.labels[d], (low, high, inside) == (0, 0, 0)
        if not kept and (inside or min(low, high) < 0):
            walk.freeze(axis, "pads between entries, or cuts")
        size = eqn.outvars[0].aval.shape[d]
        if kept or (not inside and min(low, high) >= 0):
            axis = np.concatenate([walk.labels.fresh(low) if low else axis[:0], axis])
            axis = np.concatenate([axis, walk.labels.fresh(high) if high else axis[:0]])
        else:
            axis = _fixed(size)
        labels.append(axis)
        flags.append(x.zero[d] and (kept or fill.constant == 0))
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
    depthwise = kernel.labels[inward].size == 1 and groups > 1
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
                if not walk.labels.is_live(x.labels[d]):
                    continue
                if not passes:
                    walk.freeze(x.labels[d], "looks for the largest, smallest or a product")
                elif not x.zero[d] or walk.sums == "freeze":
                    walk.freeze(x.labels[d], "sums over entries that are not zero when removed"
                                if not x.zero[d] else "sums over all entries")  # fmt: skip
        for other in ins[1:count]:
            walk.tie(ins[0], other)
        return [
            _pick(x, [d for d in range(len(x.labels)) if d not in gone])._replace(constant=None) for x in ins[:count]
        ]

    return reduce


RULES["reduce_sum"] = _reduce(True)
RULES |= dict.fromkeys(
    ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"),
    _reduce(False),
)


def _window(keeps: bool) -> Callable:
    """A window over some axes; the others pass."""

    def window(walk, eqn, ins):
        x = ins[0]
        flags = []
        for d, size in enumerate(eqn.params["window_dimensions"]):
            untouched = size == 1 and len(x.labels[d]) == eqn.outvars[0].aval.shape[d]
            if not untouched:
                walk.freeze(x.labels[d], "slides a window over it")
            flags.append(keeps and untouched and x.zero[d])
        shape = eqn.outvars[0].aval.shape
        labels = tuple(a if len(a) == n else _fixed(n) for a, n in zip(x.labels, shape, strict=True))
        return [Value(labels, tuple(flags), ((),) * len(shape)) for _ in eqn.outvars]

    return window


RULES |= dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window(True))


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


@rule("top_k", "approx_top_k")
def _top(walk, eqn, ins):
    return unknown(walk, eqn, ins)


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
            found[numbers.offset_dims[inner.index(d)]] = (axis, x.zero[d], ())
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


def _custom_vjp(walk, eqn, ins):
    name = "call_jaxpr" if "call_jaxpr" in eqn.params else "fun_jaxpr"
    return _call(name)(walk, eqn, ins)


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
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call"), _call("call_jaxpr")),
    **dict.fromkeys(("custom_vjp_call", "custom_vjp_call_jaxpr"), _custom_vjp),
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
    alive = Alive(analysis.labels, removed)
    jaxpr = analysis.program.jaxpr
    values = analysis.program.values
    consts = [alive.cut(const, values[var]) for var, const in zip(jaxpr.constvars, analysis.consts, strict=True)]
    return _run(alive, analysis.program, [*consts, *arrays])


def _run(alive: Alive, program: Program, arrays: Sequence[Any]) -> list[Any]:
    """arrays: of the constants and the inputs."""
    jaxpr, values = program.jaxpr, program.values
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), arrays, strict=True))
    read = lambda var: var.val if _is_literal(var) else env[var]
    known = lambda var: _literal(var) if _is_literal(var) else values[var]
    last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not _is_literal(var)}
    keep = {var for var in jaxpr.outvars if not _is_literal(var)}
    for number, eqn in enumerate(jaxpr.eqns):
        ins, name = [read(var) for var in eqn.invars], eqn.primitive.name
        if name in RUNS:
            outs = RUNS[name](alive, eqn, ins, program.inner[number])
        else:
            params = dict(eqn.params)
            if name in RESIZES:
                shapes = [known(var) for var in eqn.invars], [values[var] for var in eqn.outvars]
                params |= RESIZES[name](alive, eqn, *shapes)
            outs = eqn.primitive.bind(*ins, **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in eqn.invars:
            if not _is_literal(var) and last[var] == number and var not in keep:
                env.pop(var, None)
    return [read(var) for var in jaxpr.outvars]


def _literal(var: Any) -> Value:
    shape = np.shape(var.val)
    return Value(tuple(map(_fixed, shape)), (False,) * len(shape), ((),) * len(shape))


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


def _bits_shape(alive: Alive, eqn: Any, ins: list, outs: list) -> dict:
    return dict(shape=alive.shape(outs[0])[len(outs[0].labels) - len(eqn.params["shape"]) :])


RESIZES: dict[str, Callable] = {  # parameters of an equation that hold sizes
    "broadcast_in_dim": _shape("shape"),
    "iota": _shape("shape"),
    "reshape": _shape("new_sizes"),
    "random_bits": _bits_shape,
    "slice": _limits,
    "split": _parts,
    "pad": _paddings,
    "conv_general_dilated": _groups,
    "gather": _slice_sizes,
    "dynamic_slice": _slice_sizes,
}


def _consts(alive: Alive, closed: Any, program: Program) -> list[Any]:
    consts = getattr(closed, "consts", ())
    return [alive.cut(c, program.values[var]) for var, c in zip(program.jaxpr.constvars, consts, strict=True)]


def _function(alive: Alive, closed: Any, program: Program) -> Callable:
    return lambda *arrays: _run(alive, program, [*_consts(alive, closed, program), *arrays])


def _run_call(name: str) -> Callable:
    return lambda alive, eqn, ins, inner: _function(alive, eqn.params[name], inner[0])(*ins)


def _run_remat(alive, eqn, ins, inner):
    function = _function(alive, eqn.params["jaxpr"], inner[0])
    return jax.checkpoint(function, policy=eqn.params.get("policy"), prevent_cse=eqn.params.get("prevent_cse", True))(
        *ins
    )


def _run_custom_vjp(alive, eqn, ins, inner):
    name = "call_jaxpr" if "call_jaxpr" in eqn.params else "fun_jaxpr"
    return _function(alive, eqn.params[name], inner[0])(*ins)


def _run_custom_jvp(alive, eqn, ins, inner):
    """The function with its own derivative: relu has slope 0 at 0, which max(x, 0) has not."""
    (program,) = inner
    function = jax.custom_jvp(_function(alive, eqn.params["call_jaxpr"], program))

    @function.defjvp
    def derivative(primals, tangents):
        number = len(primals)
        jaxpr, consts, zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*[False] * number)
        walk = _Walk(labels=alive.labels.copy())  # it may tie more than the function itself
        before = [program.values[var] for var in program.jaxpr.invars]
        known = [walk.array(const) for const in consts]
        found = walk.jaxpr(jaxpr, known, [*before, *before])
        inside = Alive(walk.labels, alive.removed)
        cut = [inside.cut(const, value) for const, value in zip(consts, known)]
        outs = _run(inside, found, [*cut, *primals, *tangents])
        half = len(zeros)
        results, slopes = outs[:half], iter(outs[half:])
        return results, [jnp.zeros_like(r) if zero else next(slopes) for r, zero in zip(results, zeros)]

    return function(*ins)


def _run_scan(alive, eqn, ins, inner):
    loop, body = _loop_of(eqn), _function(alive, eqn.params["jaxpr"], inner[0])
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
    body = _function(alive, eqn.params["body_jaxpr"], inner[0])
    test = _function(alive, eqn.params["cond_jaxpr"], inner[1])
    return jax.lax.while_loop(
        lambda carry: test(*for_test, *carry)[0], lambda carry: tuple(body(*consts, *carry)), tuple(carry)
    )


def _run_cond(alive, eqn, ins, inner):
    branches = [
        functools.partial(lambda function, *arrays: tuple(function(*arrays)), _function(alive, branch, program))
        for branch, program in zip(eqn.params["branches"], inner, strict=True)
    ]
    return jax.lax.switch(ins[0], branches, *ins[1:])


RUNS: dict[str, Callable] = {
    **dict.fromkeys(("jit", "pjit"), _run_call("jaxpr")),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _run_remat),
    **dict.fromkeys(("closed_call", "core_call"), _run_call("call_jaxpr")),
    **dict.fromkeys(("custom_vjp_call", "custom_vjp_call_jaxpr"), _run_custom_vjp),
    "custom_jvp_call": _run_custom_jvp,
    "scan": _run_scan,
    "while": _run_while,
    "cond": _run_cond,
}
