"""Rules: what an equation makes of what is known of its operands, for each primitive that is
understood.

    rule(walk, eqn, ins) -> [Value, ...]        # ins: of the operands; one Value per result

A rule ties axes that must lose the same entries, freezes those that must stay, and says of every
axis of the results which labels it has and whether removed entries are zero in the masked program.
`walk` offers `tie`, `freeze`, `contract` and `role`. Primitives with jaxprs inside are the walk's
own affair.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsity_jax.channels.values import Axis, Value, fixed, nowhere_zero, whole

Walk = Any  # `walk.Walk`, which imports this module
Values = list[Value]
Rule = Callable[[Walk, Any, Values], Values]

Shape = Sequence[int]

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
        for axis in value.axes:
            walk.freeze(axis, "is not known to the analysis")
    return [whole(var.aval) for var in eqn.outvars]


def shape_of(eqn: Any) -> tuple[int, ...]:
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
                flag = value.constant == 0
                if value.axes and value.axes[d].size == size:
                    varying.append(value.axes[d])
                    flag = value.axes[d].zero
                operands.append(Operand(flag, value.constant))
            flag = zero(operands[cases:])
            axes.append(_joined(walk, varying, flag))
        constant = None
        if len(ins) == 1 and eqn.primitive.name in KEEPS_CONSTANTS:
            constant = ins[0].constant
        result = Value(tuple(axes), constant)
        return [result] * len(eqn.outvars)

    return apply


def _joined(walk: Walk, axes: Sequence[Axis], zero: Flag) -> Axis:
    """The axis of a result that several operands have."""
    first = axes[0]
    origin = first.origin
    for axis in axes[1:]:
        walk.tie(first, axis)
        origin = origin or axis.origin
    if zero is None:
        reason = "divides by, or takes the logarithm of, entries that are zero when removed"
        walk.freeze(first, reason)
    return Axis(first.labels, bool(zero), origin)


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
INFINITE_AT_ZERO = "log log2 rsqrt lgamma digamma acosh"


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
    positive = exponent.constant is not None and exponent.constant >= 0
    return exponent.constant > 0 if positive else None


def _clamped(operands: Operands) -> Flag:
    low, x, high = operands
    if low.constant is None or high.constant is None:
        return False
    return x.zero and low.constant <= 0 <= high.constant


def _extreme(sign: int) -> Zero:
    """max (1) or min (-1): zero if all operands are, or constants on the other side of zero."""

    def zero(operands: Operands) -> Flag:
        for operand in operands:
            known = operand.constant is not None
            beyond = known and sign * operand.constant <= 0
            if not (operand.zero or beyond):
                return False
        return any_zero(operands)

    return zero


RULES |= dict.fromkeys(ZERO_AT_ZERO.split(), elementwise(first_zero))
RULES |= dict.fromkeys(NOT_ZERO_AT_ZERO.split(), elementwise(never_zero))
RULES |= dict.fromkeys(INFINITE_AT_ZERO.split(), elementwise(infinite_at_zero))
RULES |= dict.fromkeys(("mul", "and"), elementwise(any_zero))
RULES |= dict.fromkeys(("or", "xor", "atan2"), elementwise(all_zero))
RULES |= dict.fromkeys(("div", "rem"), elementwise(_quotient))
RULES["max"] = elementwise(_extreme(1))
RULES["min"] = elementwise(_extreme(-1))
RULES["pow"] = elementwise(_power)
RULES["clamp"] = elementwise(_clamped)
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


@rule("rev")
def _reverse(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,) = ins
    for a in eqn.params["dimensions"]:
        turned = x.axes[a].labels[::-1]
        x = x.relabel(a, turned)
    return [x]


@rule("broadcast_in_dim")
def _broadcast(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, *sizes = ins
    for size in sizes:  # of a dynamic shape
        for axis in size.axes:
            walk.freeze(axis, "sets a shape")
    shape = shape_of(eqn)
    kept = dict(zip(eqn.params["broadcast_dimensions"], x.axes))
    axes = []
    for d, size in enumerate(shape):
        given = kept.get(d)
        repeated = given is None or given.size != size
        axes.append(walk.new(size, x.constant == 0) if repeated else given)
    return [Value(tuple(axes), x.constant)]


@rule("reshape")
def _reshape(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, shape = ins[0], shape_of(eqn)
    axes = [Axis(fixed(size), x.constant == 0) for size in shape]
    for old, new in blocks(x.shape, shape):
        before = [x.axes[a] for a in old]
        sizes = [shape[d] for d in new]
        for d, axis in zip(new, _regrouped(walk, eqn, before, sizes), strict=True):
            axes[d] = axis
    return [Value(tuple(axes), x.constant)]


def _regrouped(walk: Walk, eqn: Any, axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """The entries of `axes`, row-major, as axes of other sizes."""
    live = [axis.zero for axis in axes if walk.labels.is_live(axis.labels)]
    zero = bool(live) and all(live)
    if len(axes) == len(sizes) == 1:
        return [axes[0]._replace(zero=zero)]
    merged = walk.labels.merge([axis.labels for axis in axes])
    parts = walk.labels.split(merged, sizes, ("split", id(eqn)))
    return [Axis(labels, zero) for labels in parts]


def blocks(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Axes of two shapes of one size in pairs of runs of equal product; without axes of size 1."""
    if 0 in old:
        return
    olds = [a for a, size in enumerate(old) if size != 1]
    news = [a for a, size in enumerate(new) if size != 1]
    while olds:
        first, second = [olds.pop(0)], [news.pop(0)]
        while True:
            left = math.prod(old[a] for a in first)
            right = math.prod(new[a] for a in second)
            if left == right:
                break
            if left < right:
                first.append(olds.pop(0))
            else:
                second.append(news.pop(0))
        yield first, second


@rule("concatenate")
def _concatenate(walk: Walk, eqn: Any, ins: Values) -> Values:
    axes = []
    for d, parts in enumerate(zip(*(value.axes for value in ins))):
        labels, counted = parts[0].labels, parts
        if d == eqn.params["dimension"]:
            labels = np.concatenate([axis.labels for axis in parts])
            counted = [axis for axis in parts if walk.labels.is_live(axis.labels)]
        else:
            for axis in parts[1:]:
                walk.tie(parts[0], axis)
        zero = all(axis.zero for axis in counted)
        origin = tuple(place for axis in parts for place in axis.origin)
        axes.append(Axis(labels, zero, origin))
    return [Value(tuple(axes))]


@rule("stack")
def _stack(walk: Walk, eqn: Any, ins: Values) -> Values:
    position = eqn.params["axis"]
    axes = []
    for parts in zip(*(value.axes for value in ins)):
        for axis in parts[1:]:
            walk.tie(parts[0], axis)
        zero = all(axis.zero for axis in parts)
        axes.append(Axis(parts[0].labels, zero))
    axes.insert(position, Axis(fixed(len(ins)), False))
    return [Value(tuple(axes))]


@rule("unstack")
def _unstack(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,), gone = ins, eqn.params["axis"]
    walk.freeze(x.axes[gone], "is taken apart")
    return [x.drop([gone])] * len(eqn.outvars)


def _part(walk: Walk, axis: Axis, low: int, high: int, step: int = 1) -> Axis:
    """A part of an axis; a single entry stays, since an axis of one may be broadcast next."""
    part = axis._replace(labels=axis.labels[low:high:step])
    if part.size == 1 < axis.size:
        walk.freeze(part, "takes a single entry")
        part = part._replace(labels=fixed(1))
    return part


@rule("slice")
def _slice(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, params = ins[0], eqn.params
    steps = params["strides"] or (1,) * len(x.axes)
    bounds = zip(x.axes, params["start_indices"], params["limit_indices"], steps, strict=True)
    axes = []
    for axis, low, high, step in bounds:
        if step != 1:
            walk.freeze(axis, "takes every so many entries")
        axes.append(_part(walk, axis, low, high, step))
    return [x._replace(axes=tuple(axes))]


@rule("split")
def _split(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,), position = ins, eqn.params["axis"]
    start, outs = 0, []
    for size in eqn.params["sizes"]:
        part = _part(walk, x.axes[position], start, start + size)
        outs.append(x.put(position, part))
        start += size
    return outs


@rule("tile")
def _tile(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,) = ins
    for a, times in enumerate(eqn.params["reps"]):
        tiled = np.tile(x.axes[a].labels, times)
        x = x.relabel(a, tiled)
    return [x]


@rule("pad")
def _pad(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, fill = ins
    config = eqn.params["padding_config"]
    nothing = [(0, 0, 0)] * len(config)
    clean = fill.constant == 0 or list(config) == nothing
    axes = []
    for axis, size, (low, high, inside) in zip(x.axes, shape_of(eqn), config, strict=True):
        labels = fixed(size)
        if inside or min(low, high) < 0:
            walk.freeze(axis, "pads between entries, or cuts")
        else:
            before, after = walk.labels.fresh(low), walk.labels.fresh(high)
            labels = np.concatenate([before, axis.labels, after])
        axes.append(Axis(labels, axis.zero and clean, axis.origin))
    return [Value(tuple(axes))]


# Products ----------------------------------------------------------------------------------------


@rule("dot_general")
def _dot(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, y = ins
    (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    for i, j in zip(x_sum, y_sum, strict=True):
        walk.contract(x.axes[i], y.axes[j], "a product sums")
        walk.role(x.axes[i], "consumer")
        walk.role(y.axes[j], "consumer")
    axes = []
    for i, j in zip(x_batch, y_batch, strict=True):
        first, second = x.axes[i], y.axes[j]
        walk.tie(first, second)
        axes.append(Axis(first.labels, first.zero or second.zero))
    free = [*x.drop([*x_sum, *x_batch]).axes, *y.drop([*y_sum, *y_batch]).axes]
    for axis in free:
        walk.role(axis, "producer")
        axes.append(Axis(axis.labels, axis.zero))
    return [Value(tuple(axes))]


@rule("conv_general_dilated")
def _convolve(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, kernel = ins
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] > 1:
        return unknown(walk, eqn, ins)
    batch, features, *space = (x.axes[a] for a in spec.lhs_spec)
    outputs, inputs, *window = (kernel.axes[a] for a in spec.rhs_spec)
    for axis in (*space, *window):
        walk.freeze(axis, "is a convolution's space")
    if groups == 1:
        walk.contract(features, inputs, "a convolution sums")
    else:
        _contract_groups(walk, eqn, features, inputs, outputs)
    for axis in window:
        walk.role(axis, "window")
    walk.role(inputs, "consumer")
    depthwise = inputs.size == 1 and groups > 1
    walk.role(outputs, "depthwise" if depthwise else "producer")
    zero = outputs.zero
    if depthwise and groups == outputs.size:
        zero = zero or features.zero
    out_batch, out_features, *_ = spec.out_spec
    result = whole(eqn.outvars[0].aval)
    result = result.put(out_batch, Axis(batch.labels, batch.zero))
    return [result.put(out_features, Axis(outputs.labels, zero))]


def _contract_groups(walk: Walk, eqn: Any, features: Axis, inputs: Axis, outputs: Axis) -> None:
    """Each group of features is summed over for outputs of its own."""
    groups, mark = eqn.params["feature_group_count"], ("groups", id(eqn))
    rows = (groups, features.size // groups)
    of_features, inside = walk.labels.split(features.labels, rows, (mark, 0))
    rows = (groups, outputs.size // groups)
    of_outputs, _ = walk.labels.split(outputs.labels, rows, (mark, 1))
    walk.labels.tie(of_features, of_outputs)
    walk.contract(Axis(inside, features.zero), inputs, "a convolution sums")


# Reductions --------------------------------------------------------------------------------------


@rule("reduce_sum")
def _reduce_sum(walk: Walk, eqn: Any, ins: Values) -> Values:
    for x in ins:
        for d in eqn.params["axes"]:
            if not x.axes[d].zero:
                walk.freeze(x.axes[d], "sums over entries that are not zero when removed")
            elif walk.freezes_sums:
                walk.freeze(x.axes[d], "sums over all entries")
    return _reduced(eqn, ins)


@rule("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
@rule("argmax", "argmin")
def _reduce_others(walk: Walk, eqn: Any, ins: Values) -> Values:
    for x in ins[: len(eqn.outvars)]:
        for d in eqn.params["axes"]:
            walk.freeze(x.axes[d], "looks for the largest, smallest or a product")
    outs = _reduced(eqn, ins)
    if 0 not in ins[0].shape:
        return outs
    return [nowhere_zero(x) for x in outs]  # the largest of nothing is not zero


def _reduced(eqn: Any, ins: Values) -> Values:
    outs = [x.drop(eqn.params["axes"]) for x in ins[: len(eqn.outvars)]]
    return [x._replace(constant=None) for x in outs]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(walk: Walk, eqn: Any, ins: Values) -> Values:
    """A window over some axes; the others pass."""
    (x,) = ins
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    windows = list(zip(*(eqn.params[name] for name in names), strict=True))
    # The largest of nothing but padding is no zero, so each window must cover an entry.
    covered = eqn.primitive.name == "reduce_window_sum" or all(map(_covers_an_entry, windows))
    axes = []
    for axis, size, window in zip(x.axes, shape_of(eqn), windows, strict=True):
        labels = axis.labels
        if window[:4] != (1, 1, (0, 0), 1):
            walk.freeze(axis, "slides a window over it")
            labels = fixed(size)
        axes.append(Axis(labels, covered and axis.zero))
    return [Value(tuple(axes))]


def _covers_an_entry(window: tuple) -> bool:
    size, _, padding, apart, hole = window
    return max(padding) < size and apart == hole == 1


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk: Walk, eqn: Any, ins: Values) -> Values:
    (x,) = ins
    walk.freeze(x.axes[eqn.params["axis"]], "accumulates along it")
    if eqn.primitive.name not in ("cumsum", "cummax", "cummin"):
        return [nowhere_zero(x)]
    return [x._replace(constant=None)]


@rule("sort")
def _sort(walk: Walk, eqn: Any, ins: Values) -> Values:
    for x in ins:
        walk.tie_all(ins[0], x)
        walk.freeze(x.axes[eqn.params["dimension"]], "sorts along it")
    if len(ins) > 1:
        return [nowhere_zero(x) for x in ins]
    return [x._replace(constant=None) for x in ins]


# Indices and random numbers ----------------------------------------------------------------------


@rule("iota")
def _iota(walk: Walk, eqn: Any, ins: Values) -> Values:
    value = walk.filled(shape_of(eqn), None)
    walk.labels.freeze(value.axes[eqn.params["dimension"]].labels)
    return [value]


@rule("random_bits")
def _random_bits(walk: Walk, eqn: Any, ins: Values) -> Values:
    for value in ins:
        for axis in value.axes:
            walk.freeze(axis, "is a random key")
    value = walk.filled(shape_of(eqn), None)
    keys = len(value.axes) - len(eqn.params["shape"])
    for axis in value.axes[:keys]:
        walk.labels.freeze(axis.labels)
    return [value]


@rule("gather")
def _gather(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, index = ins
    for axis in index.axes:
        walk.freeze(axis, "is an index")
    numbers = eqn.params["dimension_numbers"]
    fills = eqn.params.get("fill_value") not in (None, 0)  # what an index outside gives
    batching = getattr(numbers, "operand_batching_dims", ())
    removed = {*numbers.collapsed_slice_dims, *batching}
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


@rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, ins: Values) -> Values:
    x = ins[0]
    axes = []
    for axis, size in zip(x.axes, eqn.params["slice_sizes"], strict=True):
        labels = axis.labels
        if size != axis.size:
            walk.freeze(axis, "is indexed")
            labels = fixed(size)
        axes.append(Axis(labels, axis.zero))
    return [x._replace(axes=tuple(axes))]


@rule("dynamic_update_slice")
def _update_slice(walk: Walk, eqn: Any, ins: Values) -> Values:
    x, part = ins[:2]
    axes = []
    for axis, written in zip(x.axes, part.axes, strict=True):
        if axis.size == written.size:
            walk.tie(axis, written)
        else:
            walk.freeze(axis, "is indexed")
            walk.freeze(written, "is written at an index")
        axes.append(Axis(axis.labels, axis.zero and written.zero))
    return [Value(tuple(axes))]
