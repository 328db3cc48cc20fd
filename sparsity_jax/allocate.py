"""How many entries each parameter array keeps at a pruning ratio, and the masks that follow.

    counts = allocate.keep_counts(params, 0.9)    # integers, on the host
    kept = allocate.keep_masks(params, counts)    # traceable: one program for every ratio

    # a trace tells what is prunable, whatever the names
    channels = groups.trace(apply, params, inputs)
    whole = dict(channels=channels, selection="structured")
    counts = allocate.keep_counts(params, 0.5, **whole)
    kept = allocate.keep_masks(params, counts, **whole)

Magnitude is the score. Whole filters or input channels go by their L1 norm.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax import filters, kernels, masks, originals, shares, tables, trees, units
from sparsity_jax.filters import Layers
from sparsity_jax.groups import Channels
from sparsity_jax.types import Fields, PyTree

__all__ = [
    "SELECTIONS",
    "Global",
    "Layerwise",
    "Random",
    "Scope",
    "Weights",
    "check",
    "keep_counts",
    "keep_masks",
    "left_by",
    "num_kept",
    "prunable",
]

Scope = Literal["kernels", "all"]


def num_kept(size: int, ratio: float) -> int:
    """Entries left of `size` when the share `ratio`, rounded to a whole number of them, is
    removed.
    """
    return size - masks.count_of(ratio, size)


def prunable(
    params: PyTree,
    scope: Scope,
    channels: Channels | None = None,
    *,
    include: str = "",
    exclude: str = "",
) -> Fields:
    """The arrays that may be pruned, by path: `kernels` or `all` (as the SFW original).

    Which arrays are kernels a trace tells, `channels`, or their names; see `kernels.paths`, also
    for `include`, `exclude` and the errors raised. `exclude` holds for `all` too.
    """
    leaves = trees.named_leaves(params)
    if scope == "kernels":
        chosen = kernels.paths(params, channels, include=include, exclude=exclude)
    else:
        excluded = trees.matching(params, exclude, "exclude") if exclude else {}
        chosen = [path for path in leaves if not excluded.get(path, False)]
    return {path: leaves[path] for path in chosen}


# Selections: which units are compared with each other ---------------------------------------------


@tables.option
class Weights:
    """A selection among single weights; its fields are its options."""

    together: ClassVar[bool] = True  # one number of units for all layers
    scope: Scope = "kernels"
    include: str = ""
    exclude: str = ""
    count = "nearest"

    def units_of(self, params: PyTree, channels: Channels | None) -> Layers:
        """The arrays it prunes, by path."""
        patterns = dict(include=self.include, exclude=self.exclude)
        layers = {}
        for path, leaf in prunable(params, self.scope, channels, **patterns).items():
            layers[path] = units.of_kernel(path, path, leaf.shape, None)
        return layers


@tables.option
class Global(Weights):
    """One threshold of magnitude."""

    count: Literal["nearest", "original", "ceil"] = "nearest"


@tables.option
class Layerwise(Weights):
    """A share of every array."""

    together: ClassVar[bool] = False
    count: Literal["nearest", "per_layer", "original"] = "nearest"
    layer_ratios: shares.LayerRatios = "uniform"


@tables.option
class Random(Weights):
    """Weights drawn uniformly."""


SELECTIONS = {
    "global": Global,
    "layerwise": Layerwise,
    "random": Random,
    "structured": filters.Structured,
}


def check(selection: str, options: Fields) -> Fields:
    """Options of the selection, checked against its table row; raises ConfigError."""
    return tables.check_options(tables.lookup(SELECTIONS, selection, "selection"), options)


def _made(selection: str, options: Fields) -> Any:
    checked = check(selection, options)
    return SELECTIONS[selection](**checked)


# How many units stay, and which -------------------------------------------------------------------


def keep_counts(
    params: PyTree,
    ratio: float,
    *,
    selection: str = "global",
    channels: Channels | None = None,
    **options: Any,
) -> PyTree:
    """What `keep_masks` may trace: how many entries (or filters) stay at pruning ratio `ratio` in
    [0, 1].

    params: arrays or shape structs. selection: `global` (one magnitude threshold), `layerwise` (a
    share of every array), `random`, or `structured` (whole filters or input channels of least L1
    norm; every layer keeps at least one, so a depthwise kernel loses none of its one input
    channel).
    channels: `groups.trace` of the function that uses the params. It tells, in any framework, which
    arrays are kernels and which of their axes are inputs and outputs; without it names tell, or the
    call is refused (see `kernels`). With it a removed filter is a whole channel: the norm's scale
    and shift, the bias and a depthwise kernel that it feeds are masked with it, and kernels that
    read it where they would read anything but zero, so that the outputs are those of the network
    without the channel; channels that are the network's outputs stay. Without it only kernels are
    masked: a batch norm behind a removed filter still sends its shift on. Options:
    scope: `kernels` or `all` arrays (not of `structured`). include, exclude: patterns of paths of
    arrays that are, or are no, kernels.
    count: `nearest` removes ratio * total, rounded once; among layers it is shared by largest
    remainders. `per_layer` (layerwise, structured) rounds in every layer, as
    `torch.nn.utils.prune`. `original` (global, layerwise): the SFW original's counts, one more than
    nominal, and ties kept; `ceil` (global): the geometric study's, the ceil(p n) smallest go, at
    least one, and ties with them. layer_ratios (layerwise, structured): `uniform`, `erk`
    (`shares.erk_ratios`) or `erk_original`. Of `structured`: granularity: `filter` or `channel`.
    layers: `convolutions`, `all`, or `auto`: all with a trace; by name convolutions if there are
    any; a layer called `fc` keeps its filters. layout: of all kernels without a trace, `in_out`
    ([..., in, out], Flax and Haiku) or `out_in` ([out, in, ...], PyTorch and Equinox). Raises
    ValueError for a ratio outside [0, 1] and where it is open what may be pruned, ConfigError for
    other options, TypeError for a traced ratio.
    """
    if isinstance(ratio, jax.core.Tracer):
        raise TypeError(
            "keep_counts counts outside jit, but its ratio is traced; call it before the traced "
            "function and give that the counts, which keep_masks may trace."
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; allowed: 0 to 1, the share removed.")
    chosen = _made(selection, options)
    layers = chosen.units_of(params, channels)
    sizes = {name: layer.size for name, layer in layers.items()}
    if chosen.together:
        return _KEPT_OF_ALL[chosen.count](sum(sizes.values()), ratio)
    leaves = trees.named_leaves(params)
    first = {name: layer.scored[0] for name, layer in layers.items()}
    shapes = {name: leaves[part.path].shape for name, part in first.items()}
    rule = dict(layer_ratios=chosen.layer_ratios, count=chosen.count)
    counts = shares.kept_of_layers(sizes, shapes, ratio, **rule)
    least = 1 if selection == "structured" else 0
    return {name: max(kept, least) for name, kept in counts.items()}


def _kept_but_ceil(size: int, ratio: float) -> int:
    return size - max(math.ceil(ratio * size), 1)


# entries left of all, (size, ratio) -> number, by `count` of `keep_counts`
_KEPT_OF_ALL: dict[str, Callable] = {
    "nearest": num_kept,
    "original": originals.kept_of_all,
    "ceil": _kept_but_ceil,
}


def keep_masks(
    params: PyTree,
    counts: PyTree,
    key: Array | None = None,
    *,
    selection: str = "global",
    channels: Channels | None = None,
    before: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """Masks (True = keep) in the structure of `params` for `counts` from `keep_counts`; other
    arguments: as there.

    With selection `structured` and no `channels`, batch norms still add their shift where a filter
    is gone.
    key: for `random`. before: masks of earlier pruning; what they leave out stays out, and counts
    first. Raises ConfigError for unknown options and ValueError for `random` without a key and,
    outside `jit`, for NaN.
    """
    chosen = _made(selection, options)
    layers = chosen.units_of(params, channels)
    leaves = trees.named_leaves(params)
    scores = {}
    for name, layer in layers.items():
        scores[name] = leaves[name] if layer.of_weights else units.absolute_sums(leaves, layer)
    start = masks.full(params) if before is None else before
    alive = None
    if before is not None:
        earlier = trees.named_leaves(before)
        alive = {name: units.entries_left(earlier, layer) > 0 for name, layer in layers.items()}
    if selection == "random":
        if key is None:
            raise ValueError("selection 'random' needs a key.")
        kept = masks.random_mask(scores, counts, key, before=alive)
    elif chosen.together:
        kept = _largest(scores, counts, alive, chosen.count)
    else:
        kept = _largest_per_layer(scores, counts, alive, chosen.count)
    return units.without(start, layers.values(), kept)


def _largest_per_layer(
    scores: dict[str, Array], counts: dict[str, Any], alive: dict[str, Array] | None, count: str
) -> dict[str, Array]:
    """`_largest` of every layer."""
    if count in ("original", "ceil"):
        own = lambda name: alive and alive[name]
        return {name: _largest(scores[name], counts[name], own(name), count) for name in scores}
    before = None if alive is None else [alive[name] for name in scores]
    wanted = [counts[name] for name in scores]
    kept = masks.k_largest_masks(list(scores.values()), wanted, magnitude=True, before=before)
    return dict(zip(scores, kept))


def _largest(scores: PyTree, counts: Any, alive: PyTree | None, count: str) -> PyTree:
    """Masks of the largest magnitudes, of those alive first; ties as `count` says."""
    if count not in ("original", "ceil"):
        return masks.k_largest_mask(scores, counts, magnitude=True, before=alive)
    if alive is not None:
        scores = masks.apply(scores, alive)
    if count == "original":
        threshold = masks.kth_largest(scores, counts, magnitude=True)
        return jax.tree.map(lambda leaf: jnp.abs(leaf) >= threshold, scores)
    threshold = masks.kth_largest(scores, counts + 1, magnitude=True)
    return jax.tree.map(lambda leaf: jnp.abs(leaf) > threshold, scores)


def left_by(
    kept: PyTree, *, selection: str = "global", channels: Channels | None = None, **options: Any
) -> tuple[Array, Array]:
    """(number, share) of what masks `kept` have left and removed, by the counting of a selection;
    traceable.

    number: entries left, or slices of which any entry is left: comparable to the sum of
    `keep_counts`. share: removed; of `structured` at least the share of entries removed inside the
    slices left, so that it is 0 of whole kernels only.
    selection, channels, options: as in `keep_counts`.
    """
    layers = _made(selection, options).units_of(kept, channels).values()
    leaves = trees.named_leaves(kept)
    number = inside = possible = jnp.zeros((), jnp.int32)
    for layer in layers:
        left = units.entries_left(leaves, layer)
        alive = jnp.sum(left > 0, dtype=jnp.int32)
        number += alive
        inside += jnp.sum(left, dtype=jnp.int32)
        possible += alive * units.entries(leaves, layer)
    whole = sum(layer.size for layer in layers)
    left = inside / jnp.maximum(possible, 1)
    left = jnp.minimum(number / whole, left)
    return number, 1 - left
