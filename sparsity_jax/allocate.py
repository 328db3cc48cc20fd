"""How many entries each parameter array keeps at a pruning ratio, and the masks that follow.

    counts = allocate.keep_counts(params, 0.9)                  # integers, on the host
    kept = allocate.keep_masks(params, counts)                  # traceable: one program for every
    ratio channels = groups.trace(apply, params, inputs)              # tells what is prunable,
    whatever the names counts = allocate.keep_counts(params, 0.5, channels=channels,
    selection="structured") kept = allocate.keep_masks(params, counts, channels=channels,
    selection="structured")

Magnitude is the score. Whole filters or input channels go by their L1 norm.
"""

import fractions
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sparsity_jax import groups, kernels, masks, originals, tables, trees, units

PyTree = Any
Scope = Literal["kernels", "all"]
GlobalCount = Literal["nearest", "original", "ceil"]
LayerCount = Literal["nearest", "per_layer", "original"]
SliceCount = Literal["nearest", "per_layer"]
LayerRatios = Literal["uniform", "erk", "erk_original"]
Granularity = Literal["filter", "channel"]
Layers = Literal["auto", "convolutions", "all"]


def num_kept(size: int, ratio: float) -> int:
    """Entries left of `size` when the share `ratio`, rounded to a whole number of them, is
    removed.
    """
    return size - masks.count_of(ratio, size)


def prunable(
    params: PyTree,
    scope: Scope,
    channels: groups.Channels | None = None,
    *,
    include: str = "",
    exclude: str = "",
) -> dict[str, Any]:
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


# Shares of layers ---------------------------------------------------------------------------------


def erk_ratios(shapes: Mapping[str, tuple[int, ...]], ratio: float) -> dict[str, float]:
    """Share to remove from each kernel so that `ratio` of all weights goes (Erdos-Renyi-Kernel).

    The density of a kernel is proportional to (sum of its dimensions) / (their product). Kernels
    that this would fill more than whole stay dense, and the others share the rest. Source: Evci et
    al. 2020, arXiv:1911.11134.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    raw = {path: sum(shape) / sizes[path] for path, shape in shapes.items()}
    budget, dense = (1 - ratio) * sum(sizes.values()), set()
    while True:
        rest = [path for path in shapes if path not in dense]
        left = budget - sum(sizes[path] for path in dense)
        scale = left / sum(raw[path] * sizes[path] for path in rest) if rest else 0.0
        full = {path for path in rest if scale * raw[path] > 1 - 1e-12}
        if not full:
            return {path: 0.0 if path in dense else 1 - scale * raw[path] for path in shapes}
        dense |= full


def uniform_ratios(shapes: Mapping[str, tuple[int, ...]], ratio: float) -> dict[str, float]:
    """The same share of every kernel."""
    return dict.fromkeys(shapes, ratio)


LAYER_RATIOS = {"uniform": uniform_ratios, "erk": erk_ratios, "erk_original": originals.erk_ratios}


def largest_remainders(sizes: Mapping[str, int], ratios: Mapping[str, float]) -> dict[str, int]:
    """How many of each layer's `sizes` stay, so that together as many go as `ratios` ask for,
    rounded once.

    Every layer loses its share rounded down, and those with the largest remainders one more; equal
    ones in order.
    """
    shares = {name: size * fractions.Fraction(str(ratios[name])) for name, size in sizes.items()}
    removed = {name: math.floor(share) for name, share in shares.items()}
    missing = round(sum(shares.values())) - sum(removed.values())
    by_remainder = sorted(shares, key=lambda name: removed[name] - shares[name])
    for name in by_remainder[:missing]:
        removed[name] += 1
    return {name: size - removed[name] for name, size in sizes.items()}


class Selection(NamedTuple):
    """counts(params, ratio, channels, **options) -> tree of ints, on the host; mask(params, counts,
    key, before, channels, **options) -> masks of the chosen arrays by path."""

    counts: Callable
    mask: Callable


def _of(tree: PyTree | None, chosen: Mapping[str, Any]) -> dict[str, Any] | None:
    """The leaves of `tree` at the paths of `chosen`."""
    if tree is None:
        return None
    leaves = trees.named_leaves(tree)
    return {path: leaves[path] for path in chosen}


# Single weights -----------------------------------------------------------------------------------


def _global_counts(
    params,
    ratio,
    channels,
    *,
    scope: Scope = "kernels",
    count: GlobalCount = "nearest",
    include: str = "",
    exclude: str = "",
):
    size = trees.size(prunable(params, scope, channels, include=include, exclude=exclude))
    if count == "ceil":
        return size - max(math.ceil(ratio * size), 1)
    rule = originals.kept_of_all if count == "original" else num_kept
    return rule(size, ratio)


def _global_mask(
    params, counts, key, before, channels, *, scope="kernels", count="nearest", **patterns
):
    del key
    chosen = prunable(params, scope, channels, **patterns)
    return _largest(chosen, counts, _of(before, chosen), count)


def _largest(chosen: PyTree, counts: Any, before: PyTree | None, count: str) -> PyTree:
    if count == "nearest":
        return masks.k_largest_mask(chosen, counts, magnitude=True, before=before)
    if before is not None:
        chosen = masks.apply(chosen, before)
    if count == "original":
        threshold = masks.kth_largest(chosen, counts, magnitude=True)
        return jax.tree.map(lambda leaf: jnp.abs(leaf) >= threshold, chosen)
    threshold = masks.kth_largest(chosen, counts + 1, magnitude=True)
    return jax.tree.map(lambda leaf: jnp.abs(leaf) > threshold, chosen)


def _layerwise_counts(
    params,
    ratio,
    channels,
    *,
    scope: Scope = "kernels",
    count: LayerCount = "nearest",
    layer_ratios: LayerRatios = "uniform",
    include: str = "",
    exclude: str = "",
):
    chosen = prunable(params, scope, channels, include=include, exclude=exclude)
    sizes = {path: leaf.size for path, leaf in chosen.items()}
    ratios = LAYER_RATIOS[layer_ratios]({path: leaf.shape for path, leaf in chosen.items()}, ratio)
    if count == "original":
        return {path: originals.kept_of_layer(sizes[path], ratios[path]) for path in sizes}
    return _layer_counts(sizes, ratios, count, layer_ratios)


def _layer_counts(sizes: dict, ratios: dict, count: str, layer_ratios: str) -> dict[str, int]:
    if count == "per_layer" or layer_ratios == "erk_original":
        return {path: num_kept(size, ratios[path]) for path, size in sizes.items()}
    return largest_remainders(sizes, ratios)


def _layerwise_mask(
    params,
    counts,
    key,
    before,
    channels,
    *,
    scope="kernels",
    count="nearest",
    layer_ratios="uniform",
    **patterns,
):
    del key, layer_ratios
    rule = "original" if count == "original" else "nearest"
    chosen = prunable(params, scope, channels, **patterns)
    earlier = _of(before, chosen) or dict.fromkeys(chosen)
    return {
        path: _largest(leaf, counts[path], earlier[path], rule) for path, leaf in chosen.items()
    }


def _random_counts(
    params, ratio, channels, *, scope: Scope = "kernels", include: str = "", exclude: str = ""
):
    return num_kept(
        trees.size(prunable(params, scope, channels, include=include, exclude=exclude)), ratio
    )


def _random_mask(params, counts, key, before, channels, *, scope="kernels", **patterns):
    if key is None:
        raise ValueError("selection 'random' needs a key.")
    chosen = prunable(params, scope, channels, **patterns)
    return masks.random_mask(key, chosen, counts, before=_of(before, chosen))


# Filters and input channels -----------------------------------------------------------------------


def layers_of(
    params: PyTree,
    channels: groups.Channels | None = None,
    *,
    granularity: Granularity = "filter",
    layers: Layers = "auto",
    layout: kernels.Layout | None = None,
    include: str = "",
    exclude: str = "",
) -> dict[str, units.Layer]:
    """What selection `structured` chooses slices of, by name; options and errors as in
    `keep_counts`.
    """
    paths = kernels.paths(params, channels, include=include, exclude=exclude)
    every = kernels.axes(params, paths, channels, layout=layout)
    convolutions = {path: own for path, own in every.items() if own.window}
    only = layers == "convolutions" or (layers == "auto" and channels is None and convolutions)
    axes = convolutions if only else every
    if channels is not None and granularity == "filter":
        found = _traced_layers(params, channels, axes)
    else:
        if granularity == "filter":
            axes = _without_classifier(axes, bool(include or exclude or len(axes) < len(every)))
        leaves, found = trees.named_leaves(params), {}
        for path, own in axes.items():
            along = own.outputs if granularity == "filter" else own.inputs
            found[path] = units.of_kernel(path, path, tuple(leaves[path].shape), along)
    if not found:
        raise ValueError(
            f"no {granularity} can be removed: layers={layers!r}, kernels {paths[:5]}."
        )
    return found


def _without_classifier(axes: dict[str, kernels.Axes], others: bool) -> dict[str, kernels.Axes]:
    """Without the kernel of a layer called `fc`, whose outputs are the classes.

    others: whether some kernels keep their filters anyway. Raises ValueError where all might lose
        some.
    """
    chosen = {path: own for path, own in axes.items() if path.split("/")[-2:-1] != ["fc"]}
    if len(chosen) == len(axes) and not others:
        raise ValueError(
            f"names do not tell which of the layers {list(axes)[:5]} makes the network's outputs, "
            "and keeps its "
            "filters (none is called fc). Give channels=groups.trace(apply, variables, inputs), "
            "or exclude=pattern of "
            "its path."
        )
    return chosen


def _traced_layers(
    params: PyTree, channels: groups.Channels, axes: dict[str, kernels.Axes]
) -> dict[str, units.Layer]:
    """The groups of channels that the kernels in `axes`, and no others, make."""
    owned = {owner: path for path, owner in groups.owners(params, channels).items()}
    found = {}
    for name, group in channels.groups.items():
        makers = [member for member in group.members if member.role in ("producer", "depthwise")]
        if not makers or not all(owned.get(member.path) in axes for member in makers):
            continue
        scored = [member for member in makers if member.role == "producer"] or makers
        # kernels that read the channels may stay: what they read is zero, if all that makes it is
        # masked
        inside = all(member.path in owned for member in group.members)
        masked = [member for member in group.members if member.path in owned]
        if inside:
            masked = [member for member in masked if member.role != "consumer" or member.exposed]

        def part_of(member: groups.Member) -> units.Part:
            return units.Part(owned[member.path], (member.axis,), member.index)

        parts, read = tuple(map(part_of, masked)), tuple(map(part_of, scored))
        found[name] = units.Layer(name, (group.size,), parts, read)
    return found


def _structured_counts(
    params,
    ratio,
    channels,
    *,
    granularity: Granularity = "filter",
    layer_ratios: LayerRatios = "uniform",
    count: SliceCount = "nearest",
    layers: Layers = "auto",
    layout: kernels.Layout | None = None,
    include: str = "",
    exclude: str = "",
):
    options = dict(
        granularity=granularity, layers=layers, layout=layout, include=include, exclude=exclude
    )
    found = layers_of(params, channels, **options)
    leaves = trees.named_leaves(params)
    shapes = {name: leaves[layer.scored[0].path].shape for name, layer in found.items()}
    ratios = LAYER_RATIOS[layer_ratios](shapes, ratio)
    sizes = {name: layer.size for name, layer in found.items()}
    counts = _layer_counts(sizes, ratios, count, layer_ratios)
    return {name: max(kept, 1) for name, kept in counts.items()}


def _structured_mask(
    params, counts, key, before, channels, *, layer_ratios="uniform", count="nearest", **options
):
    del key, layer_ratios, count
    leaves = trees.named_leaves(params)
    earlier = None if before is None else trees.named_leaves(before)
    result: dict[str, jax.Array] = {}
    for name, layer in layers_of(params, channels, **options).items():
        norms = units.absolute_sums(leaves, layer)
        alive = None if earlier is None else units.entries_left(earlier, layer) > 0
        kept = masks.k_largest_mask(norms, counts[name], before=alive)
        for part in layer.parts:
            mask = units.spread_mask(kept, part, leaves[part.path].shape)
            result[part.path] = result[part.path] & mask if part.path in result else mask
    return result


SELECTIONS = {
    "global": Selection(_global_counts, _global_mask),
    "layerwise": Selection(_layerwise_counts, _layerwise_mask),
    "random": Selection(_random_counts, _random_mask),
    "structured": Selection(_structured_counts, _structured_mask),
}


def check(selection: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the selection, checked against its table row; raises ConfigError."""
    row = tables.lookup(SELECTIONS, selection, "selection")
    return tables.check_options(row.counts, options)


def keep_counts(
    params: PyTree,
    ratio: float,
    *,
    selection: str = "global",
    channels: groups.Channels | None = None,
    **options,
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
    (`erk_ratios`) or `erk_original`. Of `structured`: granularity: `filter` or `channel`. layers:
    `convolutions`, `all`, or `auto`: all with a trace; by name convolutions if there are any; a
    layer called `fc` keeps its filters. layout: of all kernels without a trace, `in_out` ([..., in,
    out], Flax and Haiku) or `out_in` ([out, in, ...], PyTorch and Equinox). Raises ValueError for a
    ratio outside [0, 1] and where it is open what may be pruned, ConfigError for other options.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; allowed: 0 to 1, the share removed.")
    options = check(selection, options)
    return SELECTIONS[selection].counts(params, ratio, channels, **options)


def keep_masks(
    params: PyTree,
    counts: PyTree,
    key: jax.Array | None = None,
    *,
    selection: str = "global",
    channels: groups.Channels | None = None,
    before: PyTree | None = None,
    **options,
) -> PyTree:
    """Masks (True = keep) in the structure of `params` for `counts` from `keep_counts`; other
    arguments: as there.

    With selection `structured` and no `channels`, batch norms still add their shift where a filter
    is gone.
    key: for `random`. before: masks of earlier pruning; what they leave out stays out, and counts
    first. Raises ConfigError for unknown options and ValueError for `random` without a key and,
    outside `jit`, for NaN.
    """
    options = check(selection, options)
    found = SELECTIONS[selection].mask(params, counts, key, before, channels, **options)
    kept = trees.map_named(lambda path, leaf: found.get(path, jnp.ones(leaf.shape, bool)), params)
    return kept if before is None else jax.tree.map(jnp.logical_and, kept, before)


def left_by(
    kept: PyTree, *, selection: str = "global", channels: groups.Channels | None = None, **options
) -> tuple[jax.Array, jax.Array]:
    """(number, share) of what masks `kept` have left and removed, by the counting of a selection;
    traceable.

    number: entries left, or slices of which any entry is left: comparable to the sum of
    `keep_counts`. share: removed; of `structured` at least the share of entries removed inside the
    slices left, so that it is 0 of whole kernels only.
    selection, channels, options: as in `keep_counts`.
    """
    options = check(selection, options)
    if selection != "structured":
        patterns = {name: options[name] for name in ("include", "exclude") if name in options}
        chosen = prunable(kept, options.get("scope", "kernels"), channels, **patterns)
        number = sum(jnp.sum(mask, dtype=jnp.int32) for mask in chosen.values())
        return number, 1 - number / trees.size(chosen)
    shape_of = {
        name: value for name, value in options.items() if name not in ("layer_ratios", "count")
    }
    layers, masks_of = layers_of(kept, channels, **shape_of).values(), trees.named_leaves(kept)
    entries = [units.entries_left(masks_of, layer) for layer in layers]
    whole = [units.entries_left(masks.full(masks_of), layer) for layer in layers]
    number = sum(jnp.sum(left > 0) for left in entries)
    inside = sum(map(jnp.sum, entries)) / sum(
        jnp.sum(jnp.where(left > 0, n, 0)) for left, n in zip(entries, whole)
    )
    return number, 1 - jnp.minimum(number / sum(layer.size for layer in layers), inside)
