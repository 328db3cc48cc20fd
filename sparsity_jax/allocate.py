"""How many entries each parameter array keeps at a pruning ratio, and the masks that follow.

    counts = allocate.keep_counts(params, 0.9)                  # integers, on the host
    kept = allocate.keep_masks(params, counts)                  # traceable: one program for every
    ratio channels = groups.trace(apply, params, inputs)              # tells what is prunable,
    whatever the names counts = allocate.keep_counts(params, 0.5, channels=channels,
    selection="structured") kept = allocate.keep_masks(params, counts, channels=channels,
    selection="structured")

Magnitude is the score. Whole filters or input channels go by their L1 norm.
"""

import abc
import fractions
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax import groups, kernels, masks, originals, tables, trees, units

PyTree = Any
Leaves = dict[str, Any]  # by path
Channels = groups.Channels | None
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
    channels: Channels = None,
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


# Single weights -----------------------------------------------------------------------------------


@tables.option
class _OfWeights(abc.ABC):
    """A selection among single weights; its fields are its options."""

    scope: Scope = "kernels"
    include: str = ""
    exclude: str = ""

    def chosen(self, params: PyTree, channels: Channels) -> Leaves:
        """The arrays it prunes, by path."""
        patterns = dict(include=self.include, exclude=self.exclude)
        return prunable(params, self.scope, channels, **patterns)

    def counts(self, params: PyTree, ratio: float, channels: Channels) -> Any:
        """See `keep_counts`."""
        return self.counts_of(self.chosen(params, channels), ratio)

    def mask(self, params: PyTree, counts: Any, channels: Channels, **others: Any) -> Leaves:
        """Masks of the chosen arrays by path, see `keep_masks`."""
        return self.mask_of(self.chosen(params, channels), counts, **others)

    def left(self, kept: PyTree, channels: Channels) -> tuple[Array, Array]:
        """See `left_by`."""
        chosen = self.chosen(kept, channels)
        numbers = [jnp.sum(mask, dtype=jnp.int32) for mask in chosen.values()]
        number = jnp.asarray(sum(numbers))
        return number, 1 - number / trees.size(chosen)

    def counts_of(self, chosen: Leaves, ratio: float) -> Any:
        return num_kept(trees.size(chosen), ratio)

    @abc.abstractmethod
    def mask_of(
        self, chosen: Leaves, counts: Any, key: Array | None, before: PyTree | None
    ) -> Leaves:
        """Masks of the chosen arrays by path."""


def _at(chosen: Leaves, tree: PyTree | None) -> Leaves | None:
    """The leaves of `tree` at the paths of `chosen`."""
    if tree is None:
        return None
    leaves = trees.named_leaves(tree)
    return {path: leaves[path] for path in chosen}


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


@tables.option
class Global(_OfWeights):
    """One threshold of magnitude."""

    count: GlobalCount = "nearest"

    def counts_of(self, chosen: Leaves, ratio: float) -> int:
        size = trees.size(chosen)
        if self.count == "ceil":
            return size - max(math.ceil(ratio * size), 1)
        if self.count == "original":
            return originals.kept_of_all(size, ratio)
        return num_kept(size, ratio)

    def mask_of(
        self, chosen: Leaves, counts: Any, key: Array | None, before: PyTree | None
    ) -> Leaves:
        return _largest(chosen, counts, _at(chosen, before), self.count)


@tables.option
class Layerwise(_OfWeights):
    """A share of every array."""

    count: LayerCount = "nearest"
    layer_ratios: LayerRatios = "uniform"

    def counts_of(self, chosen: Leaves, ratio: float) -> dict[str, int]:
        sizes = {path: leaf.size for path, leaf in chosen.items()}
        shapes = {path: leaf.shape for path, leaf in chosen.items()}
        ratios = LAYER_RATIOS[self.layer_ratios](shapes, ratio)
        if self.count == "original":
            kept_of = originals.kept_of_layer
            return {path: kept_of(size, ratios[path]) for path, size in sizes.items()}
        return _layer_counts(sizes, ratios, self)

    def mask_of(
        self, chosen: Leaves, counts: Any, key: Array | None, before: PyTree | None
    ) -> Leaves:
        rule = "original" if self.count == "original" else "nearest"
        earlier = _at(chosen, before) or {}
        kept = {}
        for path, leaf in chosen.items():
            kept[path] = _largest(leaf, counts[path], earlier.get(path), rule)
        return kept


def _layer_counts(
    sizes: dict[str, int], ratios: dict[str, float], options: "Layerwise | Structured"
) -> dict[str, int]:
    if options.count == "per_layer" or options.layer_ratios == "erk_original":
        return {path: num_kept(size, ratios[path]) for path, size in sizes.items()}
    return largest_remainders(sizes, ratios)


@tables.option
class Random(_OfWeights):
    """Weights drawn uniformly."""

    def mask_of(
        self, chosen: Leaves, counts: Any, key: Array | None, before: PyTree | None
    ) -> Leaves:
        if key is None:
            raise ValueError("selection 'random' needs a key.")
        return masks.random_mask(key, chosen, counts, before=_at(chosen, before))


# Filters and input channels -----------------------------------------------------------------------


def layers_of(
    params: PyTree,
    channels: Channels = None,
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


@tables.option
class Structured:
    """Whole filters or input channels, by their L1 norm."""

    granularity: Granularity = "filter"
    layer_ratios: LayerRatios = "uniform"
    count: SliceCount = "nearest"
    layers: Layers = "auto"
    layout: kernels.Layout | None = None
    include: str = ""
    exclude: str = ""

    def layers_of(self, params: PyTree, channels: Channels) -> dict[str, units.Layer]:
        """What it chooses slices of."""
        return layers_of(
            params,
            channels,
            granularity=self.granularity,
            layers=self.layers,
            layout=self.layout,
            include=self.include,
            exclude=self.exclude,
        )

    def counts(self, params: PyTree, ratio: float, channels: Channels) -> dict[str, int]:
        """See `keep_counts`."""
        layers = self.layers_of(params, channels)
        sizes = {name: layer.size for name, layer in layers.items()}
        leaves = trees.named_leaves(params)
        shapes = {name: leaves[layer.scored[0].path].shape for name, layer in layers.items()}
        ratios = LAYER_RATIOS[self.layer_ratios](shapes, ratio)
        counts = _layer_counts(sizes, ratios, self)
        return {name: max(kept, 1) for name, kept in counts.items()}

    def mask(
        self, params: PyTree, counts: Any, channels: Channels, before: PyTree | None, **_: Any
    ) -> Leaves:
        """Masks of the chosen arrays by path, see `keep_masks`."""
        leaves = trees.named_leaves(params)
        earlier = trees.named_leaves(before)
        result: Leaves = {}
        for name, layer in self.layers_of(params, channels).items():
            norms = units.absolute_sums(leaves, layer)
            alive = units.entries_left(earlier, layer) > 0 if earlier else None
            kept = masks.k_largest_mask(norms, counts[name], before=alive)
            for part in layer.parts:
                mask = units.spread_mask(kept, part, leaves[part.path].shape)
                result[part.path] = result.get(part.path, True) & mask
        return result

    def left(self, kept: PyTree, channels: Channels) -> tuple[Array, Array]:
        """See `left_by`."""
        layers = self.layers_of(kept, channels).values()
        leaves = trees.named_leaves(kept)
        entries = [units.entries_left(leaves, layer) for layer in layers]
        whole = [units.entries_left(masks.full(leaves), layer) for layer in layers]
        number = jnp.asarray(sum(jnp.sum(left > 0) for left in entries))
        possible = [jnp.sum(jnp.where(left > 0, n, 0)) for left, n in zip(entries, whole)]
        inside = sum(map(jnp.sum, entries)) / sum(possible)
        slices = sum(layer.size for layer in layers)
        return number, 1 - jnp.minimum(number / slices, inside)


SELECTIONS = {
    "global": Global,
    "layerwise": Layerwise,
    "random": Random,
    "structured": Structured,
}


def check(selection: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the selection, checked against its table row; raises ConfigError."""
    return tables.check_options(tables.lookup(SELECTIONS, selection, "selection"), options)


def _made(selection: str, options: dict[str, Any]) -> Any:
    checked = check(selection, options)
    return SELECTIONS[selection](**checked)


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
    return _made(selection, options).counts(params, ratio, channels)


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
    found = _made(selection, options).mask(params, counts, channels, key=key, before=before)
    kept = trees.map_named(lambda path, leaf: found.get(path, jnp.ones(leaf.shape, bool)), params)
    return kept if before is None else jax.tree.map(jnp.logical_and, kept, before)


def left_by(
    kept: PyTree,
    *,
    selection: str = "global",
    channels: Channels = None,
    **options: Any,
) -> tuple[Array, Array]:
    """(number, share) of what masks `kept` have left and removed, by the counting of a selection;
    traceable.

    number: entries left, or slices of which any entry is left: comparable to the sum of
    `keep_counts`. share: removed; of `structured` at least the share of entries removed inside the
    slices left, so that it is 0 of whole kernels only.
    selection, channels, options: as in `keep_counts`.
    """
    return _made(selection, options).left(kept, channels)
