"""Which arrays of a network are kernels (weights to prune), and which of their axes are inputs and
outputs.

    channels = groups.trace(apply, variables, inputs)
    paths = kernels.paths(params, channels)    # what products and convolutions sum over
    axes = kernels.axes(params, paths, channels)
    axes["conv1/weight"]    # Axes(inputs=(1,), outputs=(0,), window=(2, 3))

Without a trace names decide, as far as they can: what they do not tell is refused, never guessed.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp

from sparsity_jax import groups, tables, trees
from sparsity_jax.groups import Channels
from sparsity_jax.trees import is_kernel, named_leaves
from sparsity_jax.types import Fields, Paths, PyTree, Shape

__all__ = ["Axes", "Layout", "axes", "matching", "paths"]

Layout = Literal["in_out", "out_in"]
# known names of no kernels
_LEFT_OUT = ("embedding", "embeddings", "bias", "b", "scale", "offset", "mean", "var")
# of all entries: matrices with unknown names may hold as much, and are then left out
_UNKNOWN_SHARE = 0.01
_TELLING = ("kernel", "w")  # Flax, Haiku: [..., in, out]
_Positions = tuple[int, ...]


def paths(
    params: PyTree,
    channels: Channels | None = None,
    *,
    include: str = "",
    exclude: str = "",
    strict: bool = True,
) -> Paths:
    """Paths of the kernels in `params`, in its order.

    params: arrays or shape structs. channels: trace of the function that uses them
    (`groups.trace`); kernels are then the arrays of two axes or more that its matrix products and
    convolutions sum over. Without it they are those called `kernel`, `weight` or `w`; embeddings,
    biases, norms and their statistics are known too, and left out.
    include, exclude: regular expressions for whole paths of arrays that are kernels, or are none,
    whatever they are called; `exclude` wins. Raises ConfigError for a pattern that matches nothing
    and, if `strict`, ValueError if nothing is a kernel or if, without a trace, matrices with other
    names hold more than 1 % of all entries.
    """
    leaves = named_leaves(params)
    included = matching(params, include, "include")
    excluded = matching(params, exclude, "exclude")
    if channels is None:
        known = {path for path, leaf in leaves.items() if is_kernel(path) and leaf.ndim > 1}
        named = "is called kernel, weight or w"
        if strict:
            _refuse_unknown(leaves, included | excluded)
    else:
        known = set(_traced(params, channels))
        named = "is summed over by the traced function"
    chosen = (known | included) - excluded
    if strict and not chosen:
        raise ValueError(
            f"no matrix {named}; name those to prune by include='pattern', or take every array by "
            f"scope='all'. Paths: {list(leaves)[:5]}"
        )
    return [path for path in leaves if path in chosen]


def matching(params: PyTree, pattern: str, field: str) -> set[str]:
    """Paths that match the regular expression in the option `field`; none if it is empty."""
    matched = trees.matching(params, pattern, field) if pattern else {}
    return {path for path, matches in matched.items() if matches}


def _refuse_unknown(leaves: Fields, decided: set[str]) -> None:
    """Raises ValueError where names leave open whether a good part of the entries may be pruned."""
    unknown = {}
    for path, leaf in leaves.items():
        known = is_kernel(path) or trees.last_name(path) in _LEFT_OUT or path in decided
        matrix = sum(n > 1 for n in leaf.shape) > 1
        if matrix and not known and not jnp.issubdtype(leaf.dtype, jnp.integer):
            unknown[path] = leaf.size
    share = sum(unknown.values()) / max(trees.size(leaves), 1)
    if share <= _UNKNOWN_SHARE:
        return
    largest = max(unknown, key=unknown.__getitem__)
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise ValueError(
        f"{largest!r}{more} hold {share:.1%} of all entries, and names do "
        "not tell whether they may be pruned (kernel, weight and w may). Give "
        "channels=groups.trace(apply, variables, inputs), or take them in by "
        f"include={largest!r}, or leave them out by exclude={largest!r} (regular expressions for "
        "whole paths)."
    )


# Inputs and outputs -------------------------------------------------------------------------------


class Axes(NamedTuple):
    """Axes of a kernel, counted from the front. window: of a convolution. Others stack several
    kernels."""

    inputs: _Positions
    outputs: _Positions
    window: _Positions = ()


def axes(
    params: PyTree,
    paths: Paths,
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
    told = None if channels is None else _traced(params, channels)
    decided = {}
    for path in paths:
        leaf = tables.lookup(leaves, path, "the path of a kernel")
        if told is None:
            decided[path] = _by_name(path, tuple(leaf.shape), layout)
        elif path in told and told[path].outputs:
            decided[path] = told[path]
        else:
            raise ValueError(
                f"{path!r} has no inputs and outputs: the traced function sums over none of its "
                "axes."
            )
    return decided


def _traced(params: PyTree, channels: Channels) -> dict[str, Axes]:
    """Axes of all arrays of two axes or more that the traced function sums over."""
    leaves = named_leaves(params)
    by_path = {}
    for path, roles in groups.roles(params, channels).items():
        axes = Axes(
            _with_role(roles, "consumer"),
            _with_role(roles, "producer", "depthwise"),
            _with_role(roles, "window"),
        )
        if axes.inputs and leaves[path].ndim > 1:
            by_path[path] = axes
    return by_path


def _with_role(roles: Mapping, *names: str) -> _Positions:
    return tuple(axis for axis in sorted(roles) if roles[axis] in names)


def _by_name(path: str, shape: Shape, layout: Layout | None) -> Axes:
    tables.convert(layout, Layout | None, "layout")
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
    *window, inputs, outputs = range(rank)
    return Axes((inputs,), (outputs,), tuple(window))
