"""Whole filters or input channels of layers as units: the selection `structured` of `allocate`."""

from typing import ClassVar, Literal

from sparsity_jax import coupling, groups, kernels, shares, tables, trees, units
from sparsity_jax.groups import Channels
from sparsity_jax.types import PyTree

__all__ = ["Layers", "Structured"]

Layers = dict[str, units.Layer]


@tables.option
class Structured:
    """Whole filters or input channels, by their L1 norm; its fields are options of
    `allocate.keep_counts`.
    """

    together: ClassVar[bool] = False
    granularity: units.Sliced = "filter"
    layer_ratios: shares.LayerRatios = "uniform"
    count: Literal["nearest", "per_layer"] = "nearest"
    layers: Literal["auto", "convolutions", "all"] = "auto"
    layout: kernels.Layout | None = None
    include: str = ""
    exclude: str = ""

    def units_of(self, params: PyTree, channels: Channels | None) -> Layers:
        """What it chooses slices of, by name; errors as in `allocate.keep_counts`."""
        paths = kernels.paths(params, channels, include=self.include, exclude=self.exclude)
        every = kernels.axes(params, paths, channels, layout=self.layout)
        axes = self._of_layers(every, channels is None)
        if channels is not None and self.granularity == "filter":
            layers = _coupled(params, channels, axes)
        else:
            layers = self._slices(params, axes)
        if not layers:
            raise ValueError(
                f"no {self.granularity} can be removed: layers={self.layers!r}, kernels "
                f"{paths[:5]}."
            )
        return layers

    def _of_layers(self, every: dict, by_name: bool) -> dict:
        """Those of the kernels (their axes by path) that `layers` says. by_name: whether names tell
        all.
        """
        convolutions = {path: axes for path, axes in every.items() if axes.window}
        preferred = by_name and self.layers == "auto" and convolutions
        axes = convolutions if preferred or self.layers == "convolutions" else every
        if not by_name or self.granularity == "channel":
            return axes
        is_fc = lambda path: path.split("/")[-2:-1] == ["fc"]
        others = {path: own for path, own in axes.items() if not is_fc(path)}
        some_stay = self.include or self.exclude or len(others) < len(every)
        if not some_stay:
            raise ValueError(
                f"names do not tell which of the layers {list(axes)[:5]} makes the network's "
                "outputs, and keeps its filters (none is called fc). Give "
                "channels=groups.trace(apply, variables, inputs), or exclude=pattern of its path."
            )
        return others

    def _slices(self, params: PyTree, axes: dict) -> Layers:
        """Every kernel alone."""
        leaves = trees.named_leaves(params)
        layers = {}
        for path, own in axes.items():
            along = own.inputs if self.granularity == "channel" else own.outputs
            layers[path] = units.of_kernel(path, path, leaves[path].shape, along)
        return layers


def _coupled(params: PyTree, channels: Channels, axes: dict) -> Layers:
    """The groups of channels that the kernels in `axes`, and no others, make."""
    owners = groups.owners(params, channels)
    path_of = {variable: path for path, variable in owners.items()}
    leaves = trees.named_leaves(params)
    layers = {}
    for name, group in channels.groups.items():
        members = []
        for member in group.members:
            path = path_of.get(member.path, "")
            members.append(member._replace(path=path))
        masked = [member for member in members if member.path]
        makers = [member for member in members if member.role in ("producer", "depthwise")]
        producers = [member for member in makers if member.role == "producer"]
        chosen = [member.path in axes for member in makers]
        if not makers or not all(chosen):
            continue
        # kernels that read the channels may stay: what they read is zero, if all that makes it is
        # masked
        if len(masked) == len(members):
            masked = [member for member in masked if member.role != "consumer" or member.exposed]
        scored = producers or makers
        layers[name] = coupling.of_members(group, leaves, masked, scored)
    return layers
