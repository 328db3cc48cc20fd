"""Which axes of a kernel are inputs, outputs and window: by the trace of a function, or by name."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from sparsity_jax import groups, tables, trees
from sparsity_jax.groups import Channels
from sparsity_jax.trees import named_leaves
from sparsity_jax.types import PyTree, Shape

__all__ = ["Axes", "Layout", "axes", "traced"]

Layout = Literal["in_out", "out_in"]
_TELLING = ("kernel", "w")  # Flax, Haiku: [..., in, out]


class Axes(NamedTuple):
    """Axes of a kernel, counted from the front. window: of a convolution. Others stack several
    kernels."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, ...] = ()


def axes(
    params: PyTree,
    paths: Iterable[str],
    channels: Channels | None = None,
    *,
    layout: Layout | None = None,
) -> dict[str, Axes]:
    """Which axes of the arrays at `paths` are inputs and outputs, by path.

    channels: trace of the function that uses them. layout: without a trace, how all of them are
    laid out: `in_out`, [..., in, out] as in Flax and Haiku, or `out_in`, [out, in, ...] as in
    PyTorch and Equinox; None: names tell. Only arrays of two axes, or four and more, called
    `kernel` or `w` do, by [..., in, out]; three axes may be a convolution in one dimension or the
    heads of an attention. Raises ValueError, naming the array, for unknown paths and where neither
    trace nor layout nor name tells.
    """
    leaves = named_leaves(params)
    told = None if channels is None else traced(params, channels)
    decided = {}
    for path in paths:
        if path not in leaves:
            raise ValueError(f"{path!r} is no path of the params.{tables.closest(path, leaves)}")
        if told is None:
            decided[path] = _by_name(path, tuple(leaves[path].shape), layout)
        elif path in told and told[path].outputs:
            decided[path] = told[path]
        else:
            raise ValueError(
                f"{path!r} has no inputs and outputs: the traced function sums over none of its "
                "axes."
            )
    return decided


def traced(params: PyTree, channels: Channels) -> dict[str, Axes]:
    """Axes of all arrays of two axes or more that the traced function sums over."""
    leaves = named_leaves(params)
    by_path = {}
    for path, roles in groups.roles(params, channels).items():
        inputs = _axes_of(roles, "consumer")
        if inputs and leaves[path].ndim > 1:
            outputs = _axes_of(roles, "producer", "depthwise")
            by_path[path] = Axes(inputs, outputs, _axes_of(roles, "window"))
    return by_path


def _axes_of(roles: Mapping[int, str], *names: str) -> tuple[int, ...]:
    """The axes that have one of the roles `names`."""
    return tuple(axis for axis in sorted(roles) if roles[axis] in names)


def _by_name(path: str, shape: Shape, layout: Layout | None) -> Axes:
    if layout is not None:
        tables.convert(layout, Layout, "layout")
    rank = len(shape)
    telling = trees.last_name(path) in _TELLING and rank != 3
    if rank < 2 or not (layout or telling):
        raise ValueError(
            f"{path!r} has shape {shape}, and its name does not tell which axes are inputs and "
            "outputs. Give channels=groups.trace(apply, variables, inputs), or layout='in_out' "
            "([..., in, out] as in Flax and Haiku) or layout='out_in' ([out, in, ...] as in "
            "PyTorch and Equinox)."
        )
    if layout == "out_in":
        return Axes((1,), (0,), tuple(range(2, rank)))
    return Axes((rank - 2,), (rank - 1,), tuple(range(rank - 2)))
