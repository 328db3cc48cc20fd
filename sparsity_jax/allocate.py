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

import fractions
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax import groups, kernels, masks, originals, tables, trees, units
from sparsity_jax.types import Fields, PyTree, Shape

Channels = groups.Channels | None
Layers = dict[str, units.Layer]
Shapes = Mapping[str, Shape]
Scope = Literal["kernels", "all"]
LayerRatios = Literal["uniform", "erk", "erk_original"]


def num_kept(size: int, ratio: float) -> int:
    """Entries left of `size` when the share `ratio`, rounded to a whole number of them, is
    removed.
    """
    return size - masks.count_of(ratio, size)


def prunable(
    params: PyTree, scope: Scope, channels: Channels = None, *, include: str = "", exclude: str = ""
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


# Shares of layers ---------------------------------------------------------------------------------


def erk_ratios(shapes: Shapes, ratio: float) -> dict[str, float]:
    """Share to remove from each kernel so that `ratio` of all weights goes (Erdos-Renyi-Kernel).

    The density of a kernel is proportional to (sum of its dimensions) / (their product). Kernels
    that this would fill more than whole stay dense, and the others share the rest. Source: Evci et
    al. 2020, arXiv:1911.11134.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    raw = {path: sum(shape) / sizes[path] for path, shape in shapes.items()}
    budget = (1 - ratio) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        rest = [path for path in shapes if path not in dense]
        left = budget - sum(sizes[path] for path in dense)
        scale = left / sum(raw[path] * sizes[path] for path in rest) if rest else 0.0
        full = {path for path in rest if scale * raw[path] > 1 - 1e-12}
        if not full:
            return {path: 0.0 if path in dense else 1 - scale * raw[path] for path in shapes}
        dense |= full


# (shapes, ratio) -> share to remove from each kernel
LAYER_RATIOS: dict[str, Callable] = {
    "uniform": dict.fromkeys,
    "erk": erk_ratios,
    "erk_original": originals.erk_ratios,
}


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


# Selections: which units are compared with each other ---------------------------------------------


@tables.option
class _OfWeights:
    """A selection among single weights; its fields are its options."""

    together: ClassVar[bool] = True  # one number of units for all layers
    scope: Scope = "kernels"
    include: str = ""
    exclude: str = ""
    count = "nearest"

    def units_of(self, params: PyTree, channels: Channels) -> Layers:
        """The arrays it prunes, by path."""
        arrays = prunable(params, self.scope, channels, include=self.include, exclude=self.exclude)
        of_array = lambda path, leaf: units.of_kernel(path, path, leaf.shape, None)
        return {path: of_array(path, leaf) for path, leaf in arrays.items()}


@tables.option
class Global(_OfWeights):
    """One threshold of magnitude."""

    count: Literal["nearest", "original", "ceil"] = "nearest"


@tables.option
class Layerwise(_OfWeights):
    """A share of every array."""

    together: ClassVar[bool] = False
    count: Literal["nearest", "per_layer", "original"] = "nearest"
    layer_ratios: LayerRatios = "uniform"


@tables.option
class Random(_OfWeights):
    """Weights drawn uniformly."""


@tables.option
class Structured:
    """Whole filters or input channels, by their L1 norm."""

    together: ClassVar[bool] = False
    granularity: units.Sliced = "filter"
    layer_ratios: LayerRatios = "uniform"
    count: Literal["nearest", "per_layer"] = "nearest"
    layers: Literal["auto", "convolutions", "all"] = "auto"
    layout: kernels.Layout | None = None
    include: str = ""
    exclude: str = ""

    def units_of(self, params: PyTree, channels: Channels) -> Layers:
        """What it chooses slices of, by name; errors as in `keep_counts`."""
        paths = kernels.paths(params, channels, include=self.include, exclude=self.exclude)
        every = kernels.axes(params, paths, channels, layout=self.layout)
        convolutions = {path: axes for path, axes in every.items() if axes.window}
        by_name = self.layers == "auto" and channels is None and convolutions
        axes = convolutions if by_name or self.layers == "convolutions" else every
        if self.granularity == "channel":
            layers = _slices(params, {path: own.inputs for path, own in axes.items()})
        elif channels is None:
            some_stay = bool(self.include or self.exclude) or len(axes) < len(every)
            axes = _without_classifier(axes, some_stay)
            layers = _slices(params, {path: own.outputs for path, own in axes.items()})
        else:
            layers = _traced_layers(params, channels, axes)
        if not layers:
            raise ValueError(
                f"no {self.granularity} can be removed: layers={self.layers!r}, kernels "
                f"{paths[:5]}."
            )
        return layers


def _slices(params: PyTree, along: Shapes) -> Layers:
    """Slices of arrays along some axes, by path."""
    leaves = trees.named_leaves(params)
    return {
        path: units.of_kernel(path, path, tuple(leaves[path].shape), axes)
        for path, axes in along.items()
    }


def _without_classifier(axes: dict[str, kernels.Axes], some_stay: bool) -> dict[str, kernels.Axes]:
    """Without the kernel of a layer called `fc`, whose outputs are the classes.

    some_stay: whether some kernels keep their filters anyway. Raises ValueError where all might
    lose some.
    """
    others = {path: own for path, own in axes.items() if path.split("/")[-2:-1] != ["fc"]}
    if len(others) == len(axes) and not some_stay:
        raise ValueError(
            f"names do not tell which of the layers {list(axes)[:5]} makes the network's outputs, "
            "and keeps its filters (none is called fc). Give channels=groups.trace(apply, "
            "variables, inputs), or exclude=pattern of its path."
        )
    return others


def _traced_layers(
    params: PyTree, channels: groups.Channels, axes: dict[str, kernels.Axes]
) -> Layers:
    """The groups of channels that the kernels in `axes`, and no others, make."""
    owned = {owner: path for path, owner in groups.owners(params, channels).items()}

    def part_of(member: groups.Member) -> units.Part:
        return units.Part(owned[member.path], (member.axis,), member.index)

    layers = {}
    for name, group in channels.groups.items():
        makers = [member for member in group.members if member.role in ("producer", "depthwise")]
        if not makers or not all(owned.get(member.path) in axes for member in makers):
            continue
        scored = [member for member in makers if member.role == "producer"] or makers
        # kernels that read the channels may stay: what they read is zero, if all that makes it is
        # masked
        masked = [member for member in group.members if member.path in owned]
        if len(masked) == len(group.members):
            masked = [member for member in masked if member.role != "consumer" or member.exposed]
        parts = tuple(map(part_of, masked))
        layers[name] = units.Layer(name, (group.size,), parts, tuple(map(part_of, scored)))
    return layers


SELECTIONS = {"global": Global, "layerwise": Layerwise, "random": Random, "structured": Structured}


def check(selection: str, options: Fields) -> Fields:
    """Options of the selection, checked against its table row; raises ConfigError."""
    return tables.check_options(tables.lookup(SELECTIONS, selection, "selection"), options)


def _made(selection: str, options: Fields) -> Any:
    return tables.lookup(SELECTIONS, selection, "selection")(**check(selection, options))


# How many units stay, and which -------------------------------------------------------------------


def keep_counts(
    params: PyTree,
    ratio: float,
    *,
    selection: str = "global",
    channels: Channels = None,
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
    (`erk_ratios`) or `erk_original`. Of `structured`: granularity: `filter` or `channel`. layers:
    `convolutions`, `all`, or `auto`: all with a trace; by name convolutions if there are any; a
    layer called `fc` keeps its filters. layout: of all kernels without a trace, `in_out` ([..., in,
    out], Flax and Haiku) or `out_in` ([out, in, ...], PyTorch and Equinox). Raises ValueError for a
    ratio outside [0, 1] and where it is open what may be pruned, ConfigError for other options.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; allowed: 0 to 1, the share removed.")
    chosen = _made(selection, options)
    layers = chosen.units_of(params, channels)
    sizes = {name: layer.size for name, layer in layers.items()}
    if chosen.together:
        return _number_of_all(sum(sizes.values()), ratio, chosen.count)
    leaves = trees.named_leaves(params)
    shapes = {name: leaves[layer.scored[0].path].shape for name, layer in layers.items()}
    ratios = LAYER_RATIOS[chosen.layer_ratios](shapes, ratio)
    if chosen.count == "original":
        return {name: originals.kept_of_layer(size, ratios[name]) for name, size in sizes.items()}
    if chosen.count == "per_layer" or chosen.layer_ratios == "erk_original":
        counts = {name: num_kept(size, ratios[name]) for name, size in sizes.items()}
    else:
        counts = largest_remainders(sizes, ratios)
    least = 1 if selection == "structured" else 0
    return {name: max(kept, least) for name, kept in counts.items()}


def _number_of_all(size: int, ratio: float, count: str) -> int:
    """Entries left of `size`, counted as a row of `count` of `keep_counts` says."""
    if count == "original":
        return originals.kept_of_all(size, ratio)
    if count == "ceil":
        return size - max(math.ceil(ratio * size), 1)
    return num_kept(size, ratio)


def keep_masks(
    params: PyTree,
    counts: PyTree,
    key: Array | None = None,
    *,
    selection: str = "global",
    channels: Channels = None,
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
    earlier = trees.named_leaves(before)
    scores = {}
    alive = {}
    for name, layer in layers.items():
        scores[name] = leaves[name] if layer.of_weights else units.absolute_sums(leaves, layer)
        if earlier:
            alive[name] = units.entries_left(earlier, layer) > 0
    if selection == "random":
        if key is None:
            raise ValueError("selection 'random' needs a key.")
        units_kept = masks.random_mask(key, scores, counts, before=alive or None)
    elif chosen.together:
        units_kept = _largest(scores, counts, alive or None, chosen.count)
    else:
        units_kept = {
            name: _largest(scores[name], counts[name], alive.get(name), chosen.count)
            for name in layers
        }
    kept = units.without(masks.full(params), layers.values(), units_kept)
    return kept if before is None else jax.tree.map(jnp.logical_and, kept, before)


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
    kept: PyTree, *, selection: str = "global", channels: Channels = None, **options: Any
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
    return number, 1 - jnp.minimum(number / whole, inside / jnp.maximum(possible, 1))
