"""Rules: what an equation makes of what is known of its operands, for each primitive that is
understood.

    rule(walk, eqn, ins) -> [Value, ...]        # ins: of the operands; one Value per result

A rule ties axes that must lose the same entries, freezes those that must stay, and says of every
axis of the results which labels it has and whether removed entries are zero in the masked program.
`walk` offers `tie`, `freeze`, `contract` and `role`. Primitives with jaxprs inside are the walk's
own affair.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsity_jax.channels.values import Axis, Value, fixed, nowhere_zero
from sparsity_jax.types import Shape

__all__ = [
    "RULES",
    "Flag",
    "Operand",
    "Operands",
    "Rule",
    "Values",
    "Walk",
    "Zero",
    "all_zero",
    "any_zero",
    "elementwise",
    "first_zero",
    "infinite_at_zero",
    "never_zero",
    "passing",
    "rule",
    "shape_of",
    "unknown",
]

Walk = Any  # `walk.Walk`, which imports this module
Values = list[Value]
Rule = Callable[[Walk, Any, Values], Values]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable:
    """Makes `function(walk, eqn, *operands)` the rule of these primitives.

    It returns a list of Values, or the Value of the only result.
    """

    def add(function: Callable) -> Callable:
        def apply(walk: Walk, eqn: Any, ins: Values) -> Values:
            outs = function(walk, eqn, *ins)
            return [outs] if isinstance(outs, Value) else outs

        RULES.update(dict.fromkeys(names, apply))
        return function

    return add


def unknown(walk: Walk, eqn: Any, ins: Values) -> Values:
    """Whatever is not understood keeps its arrays whole."""
    reason = "is not known to the analysis"
    for value in ins:
        walk.freeze(value, reason)
    return [walk.whole(var.aval, reason) for var in eqn.outvars]


def shape_of(eqn: Any) -> Shape:
    """Shape of the first result."""
    return eqn.outvars[0].aval.shape


# Elementwise -------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """What the result of an elementwise operation may depend on, along one axis."""

    zero: bool  # removed entries are zero; without an axis of its own: it is 0
    constant: float | None  # its value, if it has only one


Operands = list[Operand]
Flag = bool | None
_UNDEFINED = "divides by, or takes the logarithm of, entries that are zero when removed"
Zero = Callable[[Operands], Flag]


def elementwise(zero: Zero) -> Rule:
    """The rule of an operation on each entry.

    zero(operands): whether removed entries of the result are zero, or None if the masked program
    would be infinite or undefined there.
    """

    def apply(walk: Walk, eqn: Any, ins: Values) -> Values:
        axes = []
        for d, size in enumerate(shape_of(eqn)):
            varying = []
            operands = []
            for value in ins:
                is_zero = value.constant == 0
                if value.axes and value.axes[d].size == size:
                    varying.append(value.axes[d])
                    is_zero = value.axes[d].zero
                operands.append(Operand(is_zero, value.constant))
            axis = walk.joined(varying)
            flag = zero(operands)
            if flag is None:
                walk.freeze(axis, _UNDEFINED)
            origins = filter(None, (axis.origin for axis in varying))
            origin = next(origins, ())
            axes.append(Axis(axis.labels, bool(flag), origin, axis.cleared))
        keeps = eqn.primitive.name in _KEEPS_CONSTANTS
        constant = ins[0].constant if keeps else None
        result = Value(axes, constant, nonnegative=_is_nonnegative(eqn, ins))
        return [result] * len(eqn.outvars)

    return apply


def first_zero(operands: Operands) -> Flag:
    """Zero where the first operand is."""
    return operands[0].zero


def never_zero(operands: Operands) -> Flag:
    """Not zero, whatever the operands are."""
    return False


def infinite_at_zero(operands: Operands) -> Flag:
    """Undefined (None) where the first operand is zero, else not zero."""
    if operands[0].zero:
        return None
    return False


def any_zero(operands: Operands) -> Flag:
    """Zero where some operand is."""
    return any(operand.zero for operand in operands)


def all_zero(operands: Operands) -> Flag:
    """Zero where every operand is."""
    return all(operand.zero for operand in operands)


def _quotient(operands: Operands) -> Flag:
    numerator, denominator = operands
    if denominator.zero:
        return None
    return numerator.zero


def _power(operands: Operands) -> Flag:
    base, exponent = operands
    if not base.zero:
        return False
    if exponent.constant is None or exponent.constant < 0:
        return None
    return exponent.constant > 0


def _clamped(operands: Operands) -> Flag:
    low, x, high = operands
    if low.constant is None or high.constant is None:
        return False
    return x.zero and low.constant <= 0 <= high.constant


def _selected(operands: Operands) -> Flag:
    return all_zero(operands[1:])


def _extreme(sign: int) -> Zero:
    """max (1) or min (-1): zero if all operands are, or constants on the other side of zero."""

    def zero(operands: Operands) -> Flag:
        for operand in operands:
            beyond = operand.constant is not None and sign * operand.constant <= 0
            if not operand.zero and not beyond:
                return False
        return any_zero(operands)

    return zero


_NEVER_NEGATIVE = "abs exp exp2 logistic square cosh erfc"
_KEEPS_SIGNS = """
add add_any mul div max min convert_element_type copy copy_p reduce_precision stop_gradient sqrt
tanh floor ceil round sign expm1 log1p sinh asinh atan cbrt erf select_n name sharding_constraint
pvary
"""
_SURE = frozenset(_NEVER_NEGATIVE.split())
_SAME = frozenset(_KEEPS_SIGNS.split())


def _is_nonnegative(eqn: Any, ins: Values) -> bool:
    """Whether no entry of the result can be below 0; integers may overflow."""
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return False
    name = eqn.primitive.name
    if name == "select_n":
        ins = ins[1:]
    signs = [value.nonnegative or _is_at_least_zero(value.constant) for value in ins]
    if name == "max":
        return any(signs)
    return name in _SURE or (name in _SAME and all(signs))


def _is_at_least_zero(constant: float | None) -> bool:
    return constant is not None and constant >= 0


_KEEPS_CONSTANTS = ("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient")
_ZERO_AT_ZERO = """
abs asin asinh atan atanh bessel_i1e cbrt conj convert_element_type copy copy_p erf erf_inv expm1
floor ceil imag log1p neg real reduce_precision round sign sin sinh sqrt square stop_gradient tan
tanh sharding_constraint name mesh_cast pvary
"""
_NOT_ZERO_AT_ZERO = """
acos bessel_i0e cos cosh erfc exp exp2 is_finite logistic not one_minus_square population_count clz
eq ne lt le gt ge nextafter shift_left shift_right_logical shift_right_arithmetic complex
"""
_ELEMENTWISE: dict[str, Zero] = {
    _ZERO_AT_ZERO: first_zero,
    _NOT_ZERO_AT_ZERO: never_zero,
    "log log2 rsqrt lgamma digamma acosh": infinite_at_zero,
    "mul and": any_zero,
    "or xor atan2": all_zero,
    "div rem": _quotient,
    "max": _extreme(1),
    "min": _extreme(-1),
    "pow": _power,
    "clamp": _clamped,
    "select_n": _selected,
}
RULES |= dict.fromkeys(("optimization_barrier", "device_put"), lambda walk, eqn, ins: ins)
RULES["debug_callback"] = lambda walk, eqn, ins: []
for _names, _zero in _ELEMENTWISE.items():
    RULES |= dict.fromkeys(_names.split(), elementwise(_zero))


@rule("integer_pow")
def _integer_power(walk: Walk, eqn: Any, x: Value) -> Values:
    power = eqn.params["y"]
    zero = first_zero if power > 0 else infinite_at_zero
    (result,) = elementwise(zero)(walk, eqn, [x])
    even = power % 2 == 0
    return [result._replace(nonnegative=even or x.nonnegative)]


@rule("add", "sub", "add_any")
def _sum(walk: Walk, eqn: Any, x: Value, y: Value) -> Value | Values:
    if walk.is_data(x) and walk.is_data(y) and x.shape == y.shape:
        first = walk.labels.find(x.labels)
        second = walk.labels.find(y.labels)
        if not np.array_equal(first, second):  # they are equal e.g. in x + x**3
            if walk.separate:
                return walk.whole(eqn.outvars[0].aval, "adds branches")
            walk.note("residual", x.axes)
    return elementwise(all_zero)(walk, eqn, [x, y])


@rule("bitcast_convert_type")
def _bitcast(walk: Walk, eqn: Any, x: Value) -> Values:
    same = shape_of(eqn) == x.shape  # else bytes are an axis
    apply = elementwise(all_zero) if same else unknown
    return apply(walk, eqn, [x])


# Shapes ------------------------------------------------------------------------------------------


@rule("transpose")
def _transpose(walk: Walk, eqn: Any, x: Value) -> Value:
    return x.pick(eqn.params["permutation"])


@rule("squeeze")
def _squeeze(walk: Walk, eqn: Any, x: Value) -> Value:
    return x.drop(eqn.params["dimensions"])


@rule("unstack")
def _unstack(walk: Walk, eqn: Any, x: Value) -> Values:
    gone = eqn.params["axis"]
    walk.freeze(x.axes[gone], "is taken apart")
    return [x.drop([gone])] * len(eqn.outvars)


@rule("broadcast_in_dim")
def _broadcast(walk: Walk, eqn: Any, x: Value) -> Value:
    axes = dict(zip(eqn.params["broadcast_dimensions"], x.axes))
    made = []
    for d, size in enumerate(shape_of(eqn)):
        axis = axes.get(d)
        if axis is None or axis.size != size:
            axis = walk.new_axis(size, x.constant == 0)
        made.append(axis)
    return x._replace(axes=made)


@rule("reshape")
def _reshape(walk: Walk, eqn: Any, x: Value) -> Value:
    shape = shape_of(eqn)
    axes = [Axis(fixed(size), x.constant == 0) for size in shape]
    for old, new in _blocks(x.shape, shape):
        before = x.pick(old).axes
        zero = _zero_if_live(walk, before)
        if len(old) == len(new) == 1:
            axes[new[0]] = before[0]._replace(zero=zero)
            continue
        merged = walk.labels.merge([axis.labels for axis in before])
        sizes = [shape[d] for d in new]
        parts = walk.labels.split(merged, sizes)
        for d, labels in zip(new, parts, strict=True):
            axes[d] = Axis(labels, zero)
    return x._replace(axes=axes)


def _blocks(old: Shape, new: Shape) -> Iterator:
    """Axes of two shapes of one size in pairs of runs of equal product; without axes of size 1."""
    ends = np.intersect1d(np.cumprod(old), np.cumprod(new))
    bounds = [1, *ends[ends > 1]]
    for start, end in itertools.pairwise(bounds):
        yield _between(old, start, end), _between(new, start, end)


def _between(shape: Shape, start: int, end: int) -> Sequence:
    """Axes up to which the product is above `start` and at most `end`."""
    products = np.cumprod(shape)
    inside = (products > start) & (products <= end)
    longer = np.not_equal(shape, 1)
    return np.flatnonzero(inside & longer).tolist()


def _zero_if_live(walk: Walk, axes: Sequence[Axis]) -> bool:
    """Whether entries of several axes are zero if they are removed."""
    nonzero = [axis for axis in axes if not axis.zero]
    return not any(walk.labels.is_live(axis.labels) for axis in nonzero)


@rule("concatenate")
def _concatenate(walk: Walk, eqn: Any, *ins: Value) -> Value:
    axes = []
    for d, parts in enumerate(zip(*(value.axes for value in ins))):
        if d == eqn.params["dimension"]:
            labels = np.concatenate([axis.labels for axis in parts])
            axis = Axis(labels, _zero_if_live(walk, parts))
        else:
            axis = walk.joined(parts)
        origins = [axis.origin for axis in parts]
        axes.append(axis._replace(origin=sum(origins, ())))
    return Value(axes)


@rule("stack")
def _stack(walk: Walk, eqn: Any, *ins: Value) -> Value:
    axes = list(walk.either(ins).axes)
    stacked = Axis(fixed(len(ins)), False)
    axes.insert(eqn.params["axis"], stacked)
    return Value(axes)


@rule("rev")
def _reverse(walk: Walk, eqn: Any, x: Value) -> Value:
    for a in eqn.params["dimensions"]:
        x = _part(walk, x, a, np.s_[::-1])
    return x


@rule("tile")
def _tile(walk: Walk, eqn: Any, x: Value) -> Value:
    for a, times in enumerate(eqn.params["reps"]):
        entries = np.arange(x.axes[a].size)
        tiled = np.tile(entries, times)
        x = _part(walk, x, a, tiled)
    return x


@rule("slice")
def _slice(walk: Walk, eqn: Any, x: Value) -> Value:
    params = eqn.params
    steps = params["strides"] or (1,) * len(x.axes)
    bounds = map(slice, params["start_indices"], params["limit_indices"], steps)
    for a, entries in enumerate(bounds):
        x = _part(walk, x, a, entries)
    return x


@rule("split")
def _split(walk: Walk, eqn: Any, x: Value) -> Values:
    position = eqn.params["axis"]
    start = 0
    outs = []
    for size in eqn.params["sizes"]:
        entries = slice(start, start + size)
        outs.append(_part(walk, x, position, entries))
        start += size
    return outs


def _part(walk: Walk, x: Value, position: int, entries: slice | np.ndarray) -> Value:
    """Entries of an axis; a single one stays, since an axis of one may be broadcast next."""
    axis = x.axes[position]
    part = axis._replace(labels=axis.labels[entries])
    if part.size == 1 < axis.size:
        walk.freeze(part, "takes a single entry")
        part = part._replace(labels=fixed(1))
    return x.put(position, part)


@rule("pad")
def _pad(walk: Walk, eqn: Any, x: Value, fill: Value) -> Value:
    config = eqn.params["padding_config"]
    clean = fill.constant == 0 or not np.any(config)
    axes = []
    for axis, size, (low, high, inside) in zip(x.axes, shape_of(eqn), config, strict=True):
        if inside or min(low, high) < 0:
            reason = "pads between entries, or cuts"
            walk.freeze(axis, reason)
            labels = walk.stopped(size, reason)
        else:
            before = walk.labels.fresh(low)
            after = walk.labels.fresh(high)
            labels = np.concatenate([before, axis.labels, after])
        axes.append(Axis(labels, axis.zero and clean, axis.origin))
    return Value(axes)


# Products ----------------------------------------------------------------------------------------


@rule("dot_general")
def _dot(walk: Walk, eqn: Any, *ins: Value) -> Value:
    summed, batch = eqn.params["dimension_numbers"]
    inside = []
    for first, second in _pairs(ins, summed):
        walk.contract(first, second, "a product sums")
        inside.append(first)
    along = []
    for pair in _pairs(ins, batch):
        zero = any(axis.zero for axis in pair)
        along.append(walk.joined(pair)._replace(zero=zero))
    free = []
    for value, *gone in zip(ins, summed, batch):
        for axis in value.drop(sum(gone, ())).axes:
            walk.role(axis, "producer")
            free.append(axis.unnamed)
    _note_product(walk, ins, along, [*inside, *free])
    return Value([*along, *free])


def _note_product(walk: Walk, ins: Sequence, along: Sequence[Axis], rest: Sequence[Axis]) -> None:
    """A product of activations along heads, the rest being their dimensions, or of experts."""
    if not any(walk.labels.is_live(axis.labels) for axis in along):
        return
    if all(map(walk.is_data, ins)):
        walk.note("heads", along)
        walk.note("head", rest)
    else:
        walk.note("experts", along)


def _pairs(values: Sequence, positions: Sequence) -> Iterator:
    """The axes of both factors at their `positions`."""
    first, second = map(Value.pick, values, positions)
    return zip(first.axes, second.axes, strict=True)


@rule("ragged_dot_general")
def _ragged_dot(walk: Walk, eqn: Any, x: Value, kernels: Value, *sizes: Value) -> Value | Values:
    """Rows in groups of several sizes, each multiplied by a kernel of its own."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (summed, other), (batch, _) = numbers.dot_dimension_numbers
    ragged = numbers.lhs_ragged_dimensions
    of_groups = numbers.rhs_group_dimensions
    if batch or not of_groups or set(ragged) & set(summed):
        return unknown(walk, eqn, [x, kernels, *sizes])
    for value in (x.pick(ragged), kernels.pick(of_groups), *sizes):
        walk.freeze(value, "is of groups of rows")
    for pair in zip(x.pick(summed).axes, kernels.pick(other).axes, strict=True):
        walk.contract(*pair, "a product sums")
    made = kernels.drop((*other, *of_groups)).axes
    for axis in made:
        walk.role(axis, "producer")
    axes = [*x.drop(summed).axes, *made]
    return Value([axis.unnamed for axis in axes])


@rule("conv_general_dilated")
def _convolve(walk: Walk, eqn: Any, x: Value, kernel: Value) -> Value | Values:
    spec = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] > 1:
        return unknown(walk, eqn, [x, kernel])
    batch, features, *space = x.pick(spec.lhs_spec).axes
    outputs, inputs, *window = kernel.pick(spec.rhs_spec).axes
    for axis in (*space, *window):
        walk.freeze(axis, "is a convolution's space")
    for axis in window:
        walk.role(axis, "window")
    summed = features
    if groups > 1:  # each group of features is summed over for outputs of its own
        of_features, summed = _grouped(walk, features, groups)
        of_outputs, _ = _grouped(walk, outputs, groups)
        walk.tie(of_features, of_outputs)
    walk.contract(summed, inputs, "a convolution sums", part_of=features)
    depthwise = inputs.size == 1 < groups
    walk.role(outputs, "depthwise" if depthwise else "producer")
    zero = outputs.zero
    if depthwise and groups == outputs.size:
        zero = zero or features.zero
    made = Axis(outputs.labels, zero)
    walk.note("filters", [made])
    out_batch, out_features, *_ = spec.out_spec
    result = walk.whole(eqn.outvars[0].aval, "is a convolution's space")
    result = result.put(out_batch, batch.unnamed)
    return result.put(out_features, made)


def _grouped(walk: Walk, axis: Axis, count: int) -> list[Axis]:
    """The axis of a grouped convolution as two: groups, and entries of each."""
    size = axis.size // count
    parts = walk.labels.split(axis.labels, (count, size))
    return [Axis(labels, axis.zero) for labels in parts]


# Reductions --------------------------------------------------------------------------------------


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
@rule("reduce_xor", "argmax", "argmin")
def _reduce(walk: Walk, eqn: Any, x: Value) -> Value:
    return _reduced(walk, eqn.primitive.name, x, eqn.params["axes"])


def _reduced(walk: Walk, name: str, x: Value, gone: Sequence[int]) -> Value:
    """What the primitive `name` makes of an array without the axes `gone`."""
    sums = name == "reduce_sum"
    for axis in x.pick(gone).axes:
        if sums:
            walk.need_zero(axis, "sums over entries that are not zero when removed")
        elif name != "reduce_max" or not (axis.zero and x.nonnegative):
            walk.freeze(axis, "looks for the largest, smallest or a product")
    out = x.drop(gone)._replace(constant=None)
    if 0 in x.shape and not sums:  # the largest of nothing is not zero
        out = nowhere_zero(out)
    return out


_OVER_DEVICES = {
    **dict.fromkeys(("psum", "psum_invariant"), "reduce_sum"),
    "pmax": "reduce_max",
    "pmin": "reduce_min",
}


@rule(*_OVER_DEVICES)
def _over_devices(walk: Walk, eqn: Any, *ins: Value) -> Values:
    """Also over axes that `vmap` has named, which have numbers here."""
    gone = [axis for axis in eqn.params["axes"] if isinstance(axis, int)]
    name = _OVER_DEVICES[eqn.primitive.name]
    return [_reduced(walk, name, x, gone) for x in ins]


def passing(walk: Walk, eqn: Any, x: Value, stopped: Iterable, reason: str) -> Value:
    """The result of an operation along the axes `stopped`, which must stay; the others pass."""
    for d in stopped:
        axis = x.axes[d]
        walk.freeze(axis, reason)
        labels = walk.stopped(shape_of(eqn)[d], reason)
        x = x.put(d, axis._replace(labels=labels))
    return Value(x.axes)


@rule("reduce")
def _reduce_any(walk: Walk, eqn: Any, *ins: Value) -> Values:
    """Some reduction: nothing is known of its axes, and nothing of zeros."""
    outs = []
    arrays = ins[: len(eqn.outvars)]
    for x in arrays:
        walk.tie(arrays[0], x)
        gone = x.pick(eqn.params["dimensions"])
        walk.freeze(gone, "reduces it")
        kept = x.drop(eqn.params["dimensions"])
        result = nowhere_zero(Value(kept.axes))
        outs.append(result)
    return outs


@rule("fft")
def _fourier(walk: Walk, eqn: Any, x: Value) -> Value:
    transformed = len(eqn.params["fft_lengths"])
    ndim = len(x.axes)
    along = range(ndim - transformed, ndim)
    return passing(walk, eqn, x, along, "is transformed")


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(walk: Walk, eqn: Any, x: Value) -> Value:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    slid = []
    covered = True
    windows = zip(*(eqn.params[name] for name in names), strict=True)
    for d, (size, stride, padding, apart, hole) in enumerate(windows):
        if (size, stride, padding, apart) != (1, 1, (0, 0), 1):
            slid.append(d)
        covered &= max(padding) < size and apart == hole == 1
    out = passing(walk, eqn, x, slid, "slides a window over it")
    # The largest of nothing but padding is no zero, so each window must cover an entry.
    if eqn.primitive.name != "reduce_window_sum" and not covered:
        out = nowhere_zero(out)
    return out


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort")
def _one_after_the_other(walk: Walk, eqn: Any, *ins: Value) -> Values:
    name = eqn.primitive.name
    params = eqn.params
    along = "axis"
    reason = "accumulates along it"
    if name == "sort":
        along = "dimension"
        reason = "sorts along it"
    outs = []
    for x in ins:
        walk.tie(ins[0], x)
        outs.append(passing(walk, eqn, x, [params[along]], reason))
    if len(ins) > 1 or name in ("cumprod", "cumlogsumexp"):
        outs = list(map(nowhere_zero, outs))
    return outs
