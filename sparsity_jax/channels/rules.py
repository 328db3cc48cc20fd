"""Rules: what an equation makes of what is known of its operands, for each primitive that is
understood.

    rule(walk, eqn, ins) -> [Value, ...]        # ins: of the operands; one Value per result

A rule ties axes that must lose the same entries, freezes those that must stay, and says of every
axis of the results which labels it has and whether removed entries are zero in the masked program.
`walk` offers `tie`, `freeze`, `contract` and `role`. Primitives with jaxprs inside are the walk's
own affair.
"""

import itertools
import operator
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsity_jax.channels.values import Axis, Value, fixed, nowhere_zero, whole
from sparsity_jax.types import Shape

Walk = Any  # `walk.Walk`, which imports this module
Values = list[Value]
Rule = Callable[[Walk, Any, Values], Values]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Makes the decorated function the rule of these primitives."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def unknown(walk: Walk, eqn: Any, ins: Values) -> Values:
    """Whatever is not understood keeps its arrays whole."""
    for value in ins:
        walk.freeze(value, "is not known to the analysis")
    return [whole(var.aval) for var in eqn.outvars]


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
Zero = Callable[[Operands], Flag]


def elementwise(zero: Zero, *, cases: int = 0) -> Rule:
    """The rule of an operation on each entry.

    zero(operands): whether removed entries of the result are zero, or None if the masked program
    would be infinite or undefined there. The first `cases` operands do not count.
    """

    def apply(walk: Walk, eqn: Any, ins: Values) -> Values:
        axes = []
        for d, size in enumerate(shape_of(eqn)):
            varying, operands = [], []
            for value in ins:
                operand = Operand(value.constant == 0, value.constant)
                if value.axes and value.axes[d].size == size:
                    varying.append(value.axes[d])
                    operand = operand._replace(zero=value.axes[d].zero)
                operands.append(operand)
            axis = _joined(walk, varying)
            flag = zero(operands[cases:])
            if flag is None:
                reason = "divides by, or takes the logarithm of, entries that are zero when removed"
                walk.freeze(axis, reason)
            origin = next((axis.origin for axis in varying if axis.origin), ())
            axes.append(Axis(axis.labels, bool(flag), origin))
        constant = ins[0].constant if eqn.primitive.name in KEEPS_CONSTANTS else None
        result = Value(axes, constant)
        return [result] * len(eqn.outvars)

    return apply


def _joined(walk: Walk, axes: Sequence[Axis]) -> Axis:
    """The axis of a result that several operands have."""
    for axis in axes[1:]:
        walk.tie(axes[0], axis)
    return Axis(axes[0].labels, all(axis.zero for axis in axes))


def first_zero(operands: Operands) -> Flag:
    return operands[0].zero


def never_zero(operands: Operands) -> Flag:
    return False


def infinite_at_zero(operands: Operands) -> Flag:
    return None if operands[0].zero else False


def any_zero(operands: Operands) -> Flag:
    return any(operand.zero for operand in operands)


def all_zero(operands: Operands) -> Flag:
    return all(operand.zero for operand in operands)


def _quotient(operands: Operands) -> Flag:
    numerator, denominator = operands
    return None if denominator.zero else numerator.zero


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


def _extreme(sign: int) -> Zero:
    """max (1) or min (-1): zero if all operands are, or constants on the other side of zero."""

    def zero(operands: Operands) -> Flag:
        for operand in operands:
            beyond = operand.constant is not None and sign * operand.constant <= 0
            if not (operand.zero or beyond):
                return False
        return any_zero(operands)

    return zero


KEEPS_CONSTANTS = ("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient")
ZERO_AT_ZERO = """
abs asin asinh atan atanh bessel_i1e cbrt conj convert_element_type copy copy_p erf erf_inv expm1
floor ceil imag log1p neg real reduce_precision round sign sin sinh sqrt square stop_gradient tan
tanh sharding_constraint name mesh_cast pvary
"""
NOT_ZERO_AT_ZERO = """
acos bessel_i0e cos cosh erfc exp exp2 is_finite logistic not one_minus_square population_count clz
eq ne lt le gt ge nextafter shift_left shift_right_logical shift_right_arithmetic complex
"""
ELEMENTWISE: dict[str, Zero] = {
    ZERO_AT_ZERO: first_zero,
    NOT_ZERO_AT_ZERO: never_zero,
    "log log2 rsqrt lgamma digamma acosh": infinite_at_zero,
    "mul and": any_zero,
    "or xor atan2": all_zero,
    "div rem": _quotient,
    "max": _extreme(1),
    "min": _extreme(-1),
    "pow": _power,
    "clamp": _clamped,
}
for _names, _zero in ELEMENTWISE.items():
    RULES |= dict.fromkeys(_names.split(), elementwise(_zero))
RULES["select_n"] = elementwise(all_zero, cases=1)


@rule("integer_pow")
def _integer_power(walk: Walk, eqn: Any, ins: Values) -> Values:
    zero = first_zero if eqn.params["y"] > 0 else infinite_at_zero
    return elementwise(zero)(walk, eqn, ins)


@rule("add", "sub", "add_any")
def _sum(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, y = ins
    branches = walk.separate and walk.is_data(x) and walk.is_data(y)
    if branches and x.shape == y.shape and not walk.are_tied(x, y):  # tied e.g. in x + x**3
        return [whole(eqn.outvars[0].aval)]
    return elementwise(all_zero)(walk, eqn, ins)


@rule("bitcast_convert_type")
def _bitcast(walk: Walk, eqn: Any, ins: Values) -> Values:
    same = shape_of(eqn) == ins[0].shape  # else bytes are an axis
    apply = elementwise(all_zero) if same else unknown
    return apply(walk, eqn, ins)


@rule("optimization_barrier", "device_put")
def _each(walk: Walk, eqn: Any, ins: Values) -> Values:
    return ins


# Shapes ------------------------------------------------------------------------------------------


@rule("transpose")
def _transpose(walk: Walk, eqn: Any, ins: Values) -> Values:
    return [ins[0].pick(eqn.params["permutation"])]


@rule("squeeze")
def _squeeze(walk: Walk, eqn: Any, ins: Values) -> Values:
    return [ins[0].drop(eqn.params["dimensions"])]


@rule("unstack")
def _unstack(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,), gone = ins, eqn.params["axis"]
    walk.freeze(x.axes[gone], "is taken apart")
    return [x.drop([gone])] * len(eqn.outvars)


@rule("broadcast_in_dim")
def _broadcast(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,) = ins
    kept = dict(zip(eqn.params["broadcast_dimensions"], x.axes))
    axes = []
    for d, size in enumerate(shape_of(eqn)):
        axis = kept.get(d)
        if axis is None or axis.size != size:
            axis = walk.new(size, x.constant == 0)
        axes.append(axis)
    return [Value(axes, x.constant)]


@rule("reshape")
def _reshape(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, shape = ins[0], shape_of(eqn)
    axes = [Axis(fixed(size), x.constant == 0) for size in shape]
    for old, new in blocks(x.shape, shape):
        before = x.pick(old).axes
        zero = _zero_if_live(walk, before)
        if len(old) == len(new) == 1:
            axes[new[0]] = before[0]._replace(zero=zero)
            continue
        merged = walk.labels.merge([axis.labels for axis in before])
        sizes = [shape[d] for d in new]
        parts = walk.labels.split(merged, sizes, ("split", id(eqn)))
        for d, labels in zip(new, parts, strict=True):
            axes[d] = Axis(labels, zero)
    return [Value(axes, x.constant)]


def blocks(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Axes of two shapes of one size in pairs of runs of equal product; without axes of size 1."""
    start = 1
    for end in sorted({*_products(old)} & {*_products(new)}):
        if end > start:
            yield _between(old, start, end), _between(new, start, end)
            start = end


def _products(shape: Shape) -> list[int]:
    """Of the sizes up to each axis."""
    return list(itertools.accumulate(shape, operator.mul))


def _between(shape: Shape, start: int, end: int) -> list[int]:
    """Axes up to which the product is above `start` and at most `end`."""
    products = enumerate(_products(shape))
    return [a for a, product in products if start < product <= end and shape[a] != 1]


def _zero_if_live(walk: Walk, axes: Sequence[Axis]) -> bool:
    """Whether entries of several axes are zero if they are removed."""
    return all(axis.zero or not walk.labels.is_live(axis.labels) for axis in axes)


@rule("concatenate")
def _concatenate(walk: Walk, eqn: Any, ins: Values) -> Values:
    axes = []
    for d, parts in enumerate(zip(*(value.axes for value in ins))):
        if d == eqn.params["dimension"]:
            labels = np.concatenate([axis.labels for axis in parts])
            axis = Axis(labels, _zero_if_live(walk, parts))
        else:
            axis = _joined(walk, parts)
        origin = tuple(place for axis in parts for place in axis.origin)
        axes.append(axis._replace(origin=origin))
    return [Value(axes)]


@rule("stack")
def _stack(walk: Walk, eqn: Any, ins: Values) -> Values:
    axes = [_joined(walk, parts) for parts in zip(*(value.axes for value in ins))]
    axes.insert(eqn.params["axis"], Axis(fixed(len(ins)), False))
    return [Value(axes)]


@rule("rev")
def _reverse(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,) = ins
    for a in eqn.params["dimensions"]:
        x = _part(walk, x, a, slice(None, None, -1))
    return [x]


@rule("slice")
def _slice(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, params = ins[0], eqn.params
    steps = params["strides"] or (1,) * len(x.axes)
    bounds = map(slice, params["start_indices"], params["limit_indices"], steps)
    for a, entries in enumerate(bounds):
        if entries.step != 1:
            walk.freeze(x.axes[a], "takes every so many entries")
        x = _part(walk, x, a, entries)
    return [x]


@rule("split")
def _split(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,), position = ins, eqn.params["axis"]
    start, outs = 0, []
    for size in eqn.params["sizes"]:
        outs.append(_part(walk, x, position, slice(start, start + size)))
        start += size
    return outs


def _part(walk: Walk, x: Value, position: int, entries: slice) -> Value:
    """A part of an axis; a single entry stays, since an axis of one may be broadcast next."""
    axis = x.axes[position]
    part = axis._replace(labels=axis.labels[entries])
    if part.size == 1 < axis.size:
        walk.freeze(part, "takes a single entry")
        part = part._replace(labels=fixed(1))
    return x.put(position, part)


@rule("tile")
def _tile(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,) = ins
    for a, times in enumerate(eqn.params["reps"]):
        labels = np.tile(x.axes[a].labels, times)
        x = x.put(a, x.axes[a]._replace(labels=labels))
    return [x]


@rule("pad")
def _pad(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, fill = ins
    config = eqn.params["padding_config"]
    clean = fill.constant == 0 or not np.any(config)
    axes = []
    for axis, size, (low, high, inside) in zip(x.axes, shape_of(eqn), config, strict=True):
        labels = fixed(size)
        if inside or min(low, high) < 0:
            walk.freeze(axis, "pads between entries, or cuts")
        else:
            before, after = walk.labels.fresh(low), walk.labels.fresh(high)
            labels = np.concatenate([before, axis.labels, after])
        axes.append(Axis(labels, axis.zero and clean, axis.origin))
    return [Value(axes)]


# Products ----------------------------------------------------------------------------------------


@rule("dot_general")
def _dot(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, y = ins
    (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    for pair in zip(x.pick(x_sum).axes, y.pick(y_sum).axes, strict=True):
        walk.contract(*pair, "a product sums")
    axes = []
    for first, second in zip(x.pick(x_batch).axes, y.pick(y_batch).axes, strict=True):
        walk.tie(first, second)
        axes.append(Axis(first.labels, first.zero or second.zero))
    free = (*x.drop([*x_sum, *x_batch]).axes, *y.drop([*y_sum, *y_batch]).axes)
    for axis in free:
        walk.role(axis, "producer")
        axes.append(Axis(axis.labels, axis.zero))
    return [Value(axes)]


@rule("conv_general_dilated")
def _convolve(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, kernel = ins
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] > 1:
        return unknown(walk, eqn, ins)
    batch, features, *space = x.pick(spec.lhs_spec).axes
    outputs, inputs, *window = kernel.pick(spec.rhs_spec).axes
    for axis in (*space, *window):
        walk.freeze(axis, "is a convolution's space")
    for axis in window:
        walk.role(axis, "window")
    summed = features
    if groups > 1:  # each group of features is summed over for outputs of its own
        of_features, summed = _grouped(walk, eqn, features, 0)
        of_outputs, _ = _grouped(walk, eqn, outputs, 1)
        walk.tie(of_features, of_outputs)
    walk.contract(summed, inputs, "a convolution sums")
    depthwise = inputs.size == 1 < groups
    walk.role(outputs, "depthwise" if depthwise else "producer")
    zero = outputs.zero
    if depthwise and groups == outputs.size:
        zero = zero or features.zero
    out_batch, out_features, *_ = spec.out_spec
    result = whole(eqn.outvars[0].aval)
    result = result.put(out_batch, Axis(batch.labels, batch.zero))
    return [result.put(out_features, Axis(outputs.labels, zero))]


def _grouped(walk: Walk, eqn: Any, axis: Axis, number: int) -> list[Axis]:
    """The axis of a grouped convolution as two: groups, and entries of each."""
    count = eqn.params["feature_group_count"]
    mark = (("groups", id(eqn)), number)
    parts = walk.labels.split(axis.labels, (count, axis.size // count), mark)
    return [Axis(labels, axis.zero) for labels in parts]


# Reductions --------------------------------------------------------------------------------------


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
@rule("reduce_xor", "argmax", "argmin")
def _reduce(walk: Walk, eqn: Any, ins: Values) -> Values:
    sums, gone = eqn.primitive.name == "reduce_sum", eqn.params["axes"]
    outs: Values = []
    for x in ins[: len(eqn.outvars)]:
        for axis in x.pick(gone).axes:
            if not sums:
                walk.freeze(axis, "looks for the largest, smallest or a product")
            elif not axis.zero:
                walk.freeze(axis, "sums over entries that are not zero when removed")
        out = x.drop(gone)._replace(constant=None)
        if 0 in x.shape and not sums:  # the largest of nothing is not zero
            out = nowhere_zero(out)
        outs.append(out)
    return outs


def passing(walk: Walk, eqn: Any, x: Value, stopped: Container[int], reason: str) -> Value:
    """The result of an operation along the axes `stopped`, which must stay; the others pass."""
    axes = []
    for d, size in enumerate(shape_of(eqn)):
        axis = x.axes[d]
        if d in stopped:
            walk.freeze(axis, reason)
            axis = axis._replace(labels=fixed(size))
        axes.append(axis)
    return Value(axes)


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(walk: Walk, eqn: Any, ins: Values) -> Values:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    windows = list(zip(*(eqn.params[name] for name in names), strict=True))
    slid = [d for d, window in enumerate(windows) if window[:4] != (1, 1, (0, 0), 1)]
    out = passing(walk, eqn, ins[0], slid, "slides a window over it")
    # The largest of nothing but padding is no zero, so each window must cover an entry.
    if eqn.primitive.name == "reduce_window_sum" or all(map(_covers_an_entry, windows)):
        return [out]
    return [nowhere_zero(out)]


def _covers_an_entry(window: tuple) -> bool:
    size, _, padding, apart, hole = window
    return max(padding) < size and apart == hole == 1


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk: Walk, eqn: Any, ins: Values) -> Values:
    out = passing(walk, eqn, ins[0], [eqn.params["axis"]], "accumulates along it")
    zero = eqn.primitive.name in ("cumsum", "cummax", "cummin")
    return [out if zero else nowhere_zero(out)]


@rule("sort")
def _sort(walk: Walk, eqn: Any, ins: Values) -> Values:
    outs = []
    for x in ins:
        walk.tie(ins[0], x)
        outs.append(passing(walk, eqn, x, [eqn.params["dimension"]], "sorts along it"))
    return outs if len(ins) == 1 else list(map(nowhere_zero, outs))


# Indices and random numbers ----------------------------------------------------------------------


@rule("iota")
def _iota(walk: Walk, eqn: Any, ins: Values) -> Values:
    value = walk.filled(shape_of(eqn), None)
    walk.labels.freeze(value.axes[eqn.params["dimension"]].labels)
    return [value]


@rule("random_bits")
def _random_bits(walk: Walk, eqn: Any, ins: Values) -> Values:
    for value in ins:
        walk.freeze(value, "is a random key")
    value = walk.filled(shape_of(eqn), None)
    keys = len(value.axes) - len(eqn.params["shape"])
    walk.labels.freeze(value.pick(range(keys)).labels)
    return [value]


@rule("gather")
def _gather(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, index = ins
    walk.freeze(index, "is an index")
    numbers = eqn.params["dimension_numbers"]
    fills = eqn.params.get("fill_value") not in (None, 0)  # what an index outside gives
    removed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    positions = iter(numbers.offset_dims)
    result = whole(eqn.outvars[0].aval)
    for d, (axis, size) in enumerate(zip(x.axes, eqn.params["slice_sizes"], strict=True)):
        position = None if d in removed else next(positions)
        if position is None or size != axis.size:
            walk.freeze(axis, "is indexed")
        else:
            walk.role(axis, "producer")
            result = result.put(position, Axis(axis.labels, axis.zero and not fills))
    return [result]


def _unequal(first: Shape, second: Shape) -> list[int]:
    """Axes along which two shapes differ."""
    return [a for a, size in enumerate(first) if size != second[a]]


@rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, ins: Values) -> Values:
    indexed = _unequal(ins[0].shape, shape_of(eqn))
    out = passing(walk, eqn, ins[0], indexed, "is indexed")
    return [out._replace(constant=ins[0].constant)]


@rule("dynamic_update_slice")
def _update_slice(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, part = ins[:2]
    indexed = _unequal(x.shape, part.shape)
    out = passing(walk, eqn, x, indexed, "is indexed")
    axes = []
    for a, (axis, written) in enumerate(zip(out.axes, part.axes)):
        if a in indexed:
            walk.freeze(written, "is written at an index")
        else:
            walk.tie(axis, written)
        axes.append(Axis(axis.labels, axis.zero and written.zero))
    return [Value(axes)]
