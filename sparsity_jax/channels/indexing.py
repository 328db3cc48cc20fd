"""Rules of what reads or writes at indices, counts, or draws random numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsity_jax.channels.rules import RULES, Walk, passing, rule, shape_of
from sparsity_jax.channels.values import Axis, Value
from sparsity_jax.types import Shape

__all__ = ["RULES"]


@rule("iota")
def _iota(walk: Walk, eqn: Any, *sizes: Value) -> Value:
    return walk.filled(shape_of(eqn), None)  # counted in full, then cut


@rule("random_bits")
def _random_bits(walk: Walk, eqn: Any, key: Value) -> Value:
    walk.freeze(key, "is a random key")
    value = walk.filled(shape_of(eqn), None)
    keys = len(value.axes) - len(eqn.params["shape"])
    return passing(walk, eqn, value, range(keys), "is of a random key")


@rule("gather")
def _gather(walk: Walk, eqn: Any, x: Value, index: Value) -> Value:
    walk.freeze(index, "is an index")
    numbers = eqn.params["dimension_numbers"]
    fill = eqn.params.get("fill_value")  # what an index outside gives
    clean = fill is None or fill == 0 or np.isnan(fill)  # NaN: then no entry says anything
    removed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    positions = iter(numbers.offset_dims)
    result = walk.whole(eqn.outvars[0].aval, "is indexed")
    for d, size in enumerate(eqn.params["slice_sizes"]):
        axis = x.axes[d]
        position = None if d in removed else next(positions)
        if position is None or size != axis.size:
            walk.freeze(axis, "is indexed")
        else:
            walk.role(axis, "producer")
            zero = axis.zero and clean
            result = result.put(position, Axis(axis.labels, zero))
    return result


@rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(walk: Walk, eqn: Any, x: Value, index: Value, updates: Value) -> Value:
    walk.freeze(index, "is an index")
    windows = dict(_windows(eqn, x))
    written = {d: updates.axes[position] for d, position in windows.items()}
    scattered = updates.drop(windows.values())
    walk.freeze(scattered, "is written at indices")
    axes = []
    for d, axis in enumerate(x.axes):
        along = written.get(d)
        if along is not None and along.size == axis.size:
            both = walk.joined([axis, along])
            if eqn.primitive.name == "scatter-mul":
                both = both._replace(zero=axis.zero)
            axis = both
        else:
            for written_to in filter(None, (axis, along)):
                walk.freeze(written_to, "is written at an index")
        axes.append(axis.unnamed)
    return Value(axes)


def _windows(eqn: Any, x: Value) -> Iterator:
    """Axes of the operand that a window is written along, each with that of the updates."""
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    left = [d for d in range(len(x.axes)) if d not in gone]
    return zip(left, numbers.update_window_dims, strict=True)


def _unequal(first: Shape, second: Shape) -> list[int]:
    """Axes along which two shapes differ."""
    return np.flatnonzero(np.not_equal(first, second)).tolist()


@rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, x: Value, *starts: Value) -> Value:
    indexed = _unequal(x.shape, shape_of(eqn))
    out = passing(walk, eqn, x, indexed, "is indexed")
    return out._replace(constant=x.constant)


@rule("dynamic_update_slice")
def _update_slice(walk: Walk, eqn: Any, x: Value, part: Value, *starts: Value) -> Value:
    indexed = _unequal(x.shape, part.shape)
    out = passing(walk, eqn, x, indexed, "is indexed")
    for a, written in enumerate(part.axes):
        if a in indexed:
            walk.freeze(written, "is written at an index")
        else:
            axis = walk.joined([out.axes[a], written])
            out = out.put(a, axis)
    return out
