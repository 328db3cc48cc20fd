"""Which arrays of a network are kernels (weights to prune), and which of their axes are inputs and
outputs.

    channels = groups.trace(apply, variables, inputs)
    paths = kernels.paths(params, channels)    # what products and convolutions sum over
    axes = kernels.axes(params, paths, channels)
    axes["conv1/weight"]    # Axes(inputs=(1,), outputs=(0,), window=(2, 3))

Without a trace names decide, as far as they can: what they do not tell is refused, never guessed.
"""

import jax.numpy as jnp

from sparsity_jax import trees
from sparsity_jax.axes import Axes, Layout, axes, traced
from sparsity_jax.groups import Channels
from sparsity_jax.trees import is_kernel, named_leaves
from sparsity_jax.types import Fields, PyTree

__all__ = ["Axes", "Layout", "axes", "paths"]

# known names of no kernels
_LEFT_OUT = ("embedding", "embeddings", "bias", "b", "scale", "offset", "mean", "var")
# of all entries: matrices with unknown names may hold as much, and are then left out
_UNKNOWN_SHARE = 0.01


def paths(
    params: PyTree,
    channels: Channels | None = None,
    *,
    include: str = "",
    exclude: str = "",
    strict: bool = True,
) -> list[str]:
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
    included = _matching(params, include, "include")
    excluded = _matching(params, exclude, "exclude")
    if channels is None:
        known = {path for path, leaf in leaves.items() if is_kernel(path) and leaf.ndim > 1}
        named = "is called kernel, weight or w"
        if strict:
            _refuse_unknown(leaves, included | excluded)
    else:
        known = set(traced(params, channels))
        named = "is summed over by the traced function"
    chosen = (known | included) - excluded
    if strict and not chosen:
        raise ValueError(
            f"no matrix {named}; name those to prune by include='pattern', or take every array by "
            f"scope='all'. Paths: {list(leaves)[:5]}"
        )
    return [path for path in leaves if path in chosen]


def _matching(params: PyTree, pattern: str, field: str) -> set[str]:
    if not pattern:
        return set()
    matched = trees.matching(params, pattern, field)
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
