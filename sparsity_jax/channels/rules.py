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

import numpy as np

from sparsity_jax.channels.values import Axis, Value, fixed, nowhere_zero, whole
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
    "unknown",
]

Walk = Any  # `walk.Walk`, which imports this module
Values = list[Value]
Rule = Callable[[Walk, Any, Values], Values]

RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable:
    """Makes `function(walk, eqn, *operands)` the rule of these primitives.

    It returns a list of Values, or the Value of the only result.
    """

    def add(function: Callable) -> Callable:
        def rule(walk: Walk, eqn: Any, ins: Values) -> Values:
            outs = function(walk, eqn, *ins)
            return [outs] if isinstance(outs, Value) else outs

        RULES.update(dict.fromkeys(names, rule))
        return function

    return add


def unknown(walk: Walk, eqn: Any, ins: Values) -> Values:
    """Whatever is not understood keeps its arrays whole."""
    for value in ins:
        walk.freeze(value, "is not known to the analysis")
    return [whole(var.aval) for var in eqn.outvars]


def _shape_of(eqn: Any) -> Shape:
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
        for d, size in enumerate(_shape_of(eqn)):
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
            axes.append(Axis(axis.labels, bool(flag), next(origins, ())))
        keeps = eqn.primitive.name in _KEEPS_CONSTANTS
        result = Value(axes, ins[0].constant if keeps else None)
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
for _names, _zero in _ELEMENTWISE.items():
    RULES |= dict.fromkeys(_names.split(), elementwise(_zero))


@_rule("integer_pow")
def _integer_power(walk: Walk, eqn: Any, x: Value) -> Values:
    zero = first_zero if eqn.params["y"] > 0 else infinite_at_zero
    return elementwise(zero)(walk, eqn, [x])


@_rule("add", "sub", "add_any")
def _sum(walk: Walk, eqn: Any, x: Value, y: Value) -> Value | Values:
    both = x.sources & walk.data and y.sources & walk.data
    if walk.separate and both and x.shape == y.shape:
        first = walk.labels.find(x.labels)
        second = walk.labels.find(y.labels)
        if not np.array_equal(first, second):  # they are equal e.g. in x + x**3
            return whole(eqn.outvars[0].aval)
    return elementwise(all_zero)(walk, eqn, [x, y])


@_rule("bitcast_convert_type")
def _bitcast(walk: Walk, eqn: Any, x: Value) -> Values:
    same = _shape_of(eqn) == x.shape  # else bytes are an axis
    apply = elementwise(all_zero) if same else unknown
    return apply(walk, eqn, [x])


# Shapes ------------------------------------------------------------------------------------------


@_rule("transpose")
def _transpose(walk: Walk, eqn: Any, x: Value) -> Value:
    return x.pick(eqn.params["permutation"])


@_rule("squeeze")
def _squeeze(walk: Walk, eqn: Any, x: Value) -> Value:
    return x.drop(eqn.params["dimensions"])


@_rule("unstack")
def _unstack(walk: Walk, eqn: Any, x: Value) -> Values:
    gone = eqn.params["axis"]
    walk.freeze(x.axes[gone], "is taken apart")
    return [x.drop([gone])] * len(eqn.outvars)


@_rule("broadcast_in_dim")
def _broadcast(walk: Walk, eqn: Any, x: Value) -> Value:
    result = walk.filled(_shape_of(eqn), x.constant)
    for axis, d in zip(x.axes, eqn.params["broadcast_dimensions"]):
        if axis.size == result.axes[d].size:
            result = result.put(d, axis)
    return result


@_rule("reshape")
def _reshape(walk: Walk, eqn: Any, x: Value) -> Value:
    shape = _shape_of(eqn)
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
    return Value(axes, x.constant)


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


@_rule("concatenate")
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


@_rule("stack")
def _stack(walk: Walk, eqn: Any, *ins: Value) -> Value:
    axes = list(walk.either(ins).axes)
    stacked = Axis(fixed(len(ins)), False)
    axes.insert(eqn.params["axis"], stacked)
    return Value(axes)


@_rule("rev")
def _reverse(walk: Walk, eqn: Any, x: Value) -> Value:
    for a in eqn.params["dimensions"]:
        x = _part(walk, x, a, np.s_[::-1])
    return x


@_rule("tile")
def _tile(walk: Walk, eqn: Any, x: Value) -> Value:
    for a, times in enumerate(eqn.params["reps"]):
        entries = np.arange(x.axes[a].size)
        tiled = np.tile(entries, times)
        x = _part(walk, x, a, tiled)
    return x


@_rule("slice")
def _slice(walk: Walk, eqn: Any, x: Value) -> Value:
    params = eqn.params
    steps = params["strides"] or (1,) * len(x.axes)
    bounds = map(slice, params["start_indices"], params["limit_indices"], steps)
    for a, entries in enumerate(bounds):
        if entries.step != 1:
            walk.freeze(x.axes[a], "takes every so many entries")
        x = _part(walk, x, a, entries)
    return x


@_rule("split")
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


@_rule("pad")
def _pad(walk: Walk, eqn: Any, x: Value, fill: Value) -> Value:
    config = eqn.params["padding_config"]
    clean = fill.constant == 0 or not np.any(config)
    axes = []
    for axis, size, (low, high, inside) in zip(x.axes, _shape_of(eqn), config, strict=True):
        if inside or min(low, high) < 0:
            walk.freeze(axis, "pads between entries, or cuts")
            labels = fixed(size)
        else:
            before = walk.labels.fresh(low)
            after = walk.labels.fresh(high)
            labels = np.concatenate([before, axis.labels, after])
        axes.append(Axis(labels, axis.zero and clean, axis.origin))
    return Value(axes)


# Products ----------------------------------------------------------------------------------------


@_rule("dot_general")
def _dot(walk: Walk, eqn: Any, *ins: Value) -> Value:
    summed, batch = eqn.params["dimension_numbers"]
    for pair in _pairs(ins, summed):
        walk.contract(*pair, "a product sums")
    axes = []
    for pair in _pairs(ins, batch):
        zero = any(axis.zero for axis in pair)
        axes.append(walk.joined(pair)._replace(zero=zero))
    for value, *gone in zip(ins, summed, batch):
        free = value.drop(sum(gone, ()))
        for axis in free.axes:
            walk.role(axis, "producer")
            axes.append(axis.unnamed)
    return Value(axes)


def _pairs(values: Sequence, positions: Sequence) -> Iterator:
    """The axes of both factors at their `positions`."""
    first, second = map(Value.pick, values, positions)
    return zip(first.axes, second.axes, strict=True)


@_rule("conv_general_dilated")
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
    walk.contract(summed, inputs, "a convolution sums")
    depthwise = inputs.size == 1 < groups
    walk.role(outputs, "depthwise" if depthwise else "producer")
    zero = outputs.zero
    if depthwise and groups == outputs.size:
        zero = zero or features.zero
    made = Axis(outputs.labels, zero)
    out_batch, out_features, *_ = spec.out_spec
    result = whole(eqn.outvars[0].aval)
    result = result.put(out_batch, batch.unnamed)
    return result.put(out_features, made)


def _grouped(walk: Walk, axis: Axis, count: int) -> list[Axis]:
    """The axis of a grouped convolution as two: groups, and entries of each."""
    size = axis.size // count
    parts = walk.labels.split(axis.labels, (count, size))
    return [Axis(labels, axis.zero) for labels in parts]


# Reductions --------------------------------------------------------------------------------------


@_rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
@_rule("reduce_xor", "argmax", "argmin")
def _reduce(walk: Walk, eqn: Any, x: Value) -> Value:
    gone = eqn.params["axes"]
    sums = eqn.primitive.name in ("reduce_sum", "psum")
    for axis in x.pick(gone).axes:
        if not sums:
            walk.freeze(axis, "looks for the largest, smallest or a product")
        elif not axis.zero:
            walk.freeze(axis, "sums over entries that are not zero when removed")
    out = x.drop(gone)._replace(constant=None)
    if 0 in x.shape and not sums:  # the largest of nothing is not zero
        out = nowhere_zero(out)
    return out


@_rule("psum")
def _sum_of_mapped(walk: Walk, eqn: Any, *ins: Value) -> Values:
    """What is left of a sum over an axis that `vmap` has named."""
    own = all(isinstance(axis, int) for axis in eqn.params["axes"])
    if not own or eqn.params["axis_index_groups"]:
        return unknown(walk, eqn, list(ins))
    return [_reduce(walk, eqn, x) for x in ins]


def _passing(walk: Walk, eqn: Any, x: Value, stopped: Iterable, reason: str) -> Value:
    """The result of an operation along the axes `stopped`, which must stay; the others pass."""
    for d in stopped:
        axis = x.axes[d]
        walk.freeze(axis, reason)
        size = _shape_of(eqn)[d]
        x = x.put(d, axis._replace(labels=fixed(size)))
    return Value(x.axes)


@_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(walk: Walk, eqn: Any, x: Value) -> Value:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    slid = []
    covered = True
    windows = zip(*(eqn.params[name] for name in names), strict=True)
    for d, (size, stride, padding, apart, hole) in enumerate(windows):
        if (size, stride, padding, apart) != (1, 1, (0, 0), 1):
            slid.append(d)
        covered &= max(padding) < size and apart == hole == 1
    out = _passing(walk, eqn, x, slid, "slides a window over it")
    # The largest of nothing but padding is no zero, so each window must cover an entry.
    if eqn.primitive.name != "reduce_window_sum" and not covered:
        out = nowhere_zero(out)
    return out


@_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort")
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
        outs.append(_passing(walk, eqn, x, [params[along]], reason))
    if len(ins) > 1 or name in ("cumprod", "cumlogsumexp"):
        outs = list(map(nowhere_zero, outs))
    return outs


# Indices and random numbers ----------------------------------------------------------------------


@_rule("iota")
def _iota(walk: Walk, eqn: Any, *sizes: Value) -> Value:
    value = walk.filled(_shape_of(eqn), None)
    return _passing(walk, eqn, value, [eqn.params["dimension"]], "counts along it")


@_rule("random_bits")
def _random_bits(walk: Walk, eqn: Any, key: Value) -> Value:
    walk.freeze(key, "is a random key")
    value = walk.filled(_shape_of(eqn), None)
    keys = len(value.axes) - len(eqn.params["shape"])
    return _passing(walk, eqn, value, range(keys), "is of a random key")


@_rule("gather")
def _gather(walk: Walk, eqn: Any, x: Value, index: Value) -> Value:
    walk.freeze(index, "is an index")
    numbers = eqn.params["dimension_numbers"]
    fills = eqn.params.get("fill_value") not in (None, 0)  # what an index outside gives
    removed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    positions = iter(numbers.offset_dims)
    result = whole(eqn.outvars[0].aval)
    for d, size in enumerate(eqn.params["slice_sizes"]):
        axis = x.axes[d]
        position = None if d in removed else next(positions)
        if position is None or size != axis.size:
            walk.freeze(axis, "is indexed")
        else:
            walk.role(axis, "producer")
            zero = axis.zero and not fills
            result = result.put(position, Axis(axis.labels, zero))
    return result


def _unequal(first: Shape, second: Shape) -> list[int]:
    """Axes along which two shapes differ."""
    return np.flatnonzero(np.not_equal(first, second)).tolist()


@_rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, x: Value, *starts: Value) -> Value:
    indexed = _unequal(x.shape, _shape_of(eqn))
    out = _passing(walk, eqn, x, indexed, "is indexed")
    return out._replace(constant=x.constant)


@_rule("dynamic_update_slice")
def _update_slice(walk: Walk, eqn: Any, x: Value, part: Value, *starts: Value) -> Value:
    indexed = _unequal(x.shape, part.shape)
    out = _passing(walk, eqn, x, indexed, "is indexed")
    for a, written in enumerate(part.axes):
        if a in indexed:
            walk.freeze(written, "is written at an index")
        else:
            axis = walk.joined([out.axes[a], written])
            out = out.put(a, axis)
    return out
