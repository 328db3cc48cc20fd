"""Removal of groups of weights: which units go, by `ratios` of layers or as in another run; the
stage `remove`.

Filters and channels go with all that is coupled to them, so that `compact` really removes them.
Source: Wang, Qin, Zhang, Fu 2021, arXiv:2012.09243, and its published code; see `growing` and
    `ratios`.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from sparsity_jax import (
    alone,
    cost,
    coupling,
    growing,
    masks,
    ratios,
    stored,
    structured,
    tables,
    train,
    trees,
    units,
    workdirs,
)
from sparsity_jax.interface import Place
from sparsity_jax.ratios import Reading, Table
from sparsity_jax.tables import ConfigError, blaming
from sparsity_jax.train import Problem, State
from sparsity_jax.types import Arrays, Fields

__all__ = ["STAGES", "Choosing", "Keep", "Layers", "Remove", "kernels_of", "shares_removed"]

Keep = Mapping[str, Any]  # bools by name of layer, True = keep
Layers = tuple[units.Layer, ...]
_SPEEDUP = re.compile(r"(\d+(?:\.\d*)?)x")


class Choosing(alone.EachMember):
    """A stage that says which units it removes: by `ratios` of layers, or as another run did."""

    needs: ClassVar[tuple[str, ...]] = ("train",)
    makes_network: ClassVar[bool] = True
    ratios: str | tuple
    skip: str
    granularity: Any
    # without types, so that they are fields of `remove` and `grow` only
    pick = "min"
    inherit = ""
    inherit_as = "index"
    reading = "correct"

    def check(self) -> None:
        if bool(self.ratios) == bool(self.inherit):
            raise ConfigError(
                "",
                why=f"has {'both' if self.ratios else 'neither'} of ratios and inherit",
                allowed="either ratios, e.g. '[0,0.5,0.5,0.5,0]', '[1-15:0.7]' or '2x', or "
                "inherit, the workdir of a pruned run",
            )
        grouped = self.granularity == "group"
        given = self.inherit and self.inherit_as == "index"
        for field, default, idle, why in (
            ("skip", "", self.inherit or grouped, "but inherit, or granularity 'group', tells all"),
            ("pick", "min", given, "but inherit_as 'index' leaves nothing to pick"),
            ("inherit_as", "index", not self.inherit, "but there is no run to inherit from"),
        ):
            value = getattr(self, field)
            if idle and value != default:
                raise ConfigError(field, value, why=why, allowed=repr(default))
        if self.inherit and grouped:
            allowed = "filter, channel and weight with inherit"
            raise ConfigError("granularity", "group", allowed=allowed)

    def check_network(self, problem: Problem, visits: int) -> None:
        numbers = [layer.num_pruned for layer in self.layers(problem)]
        if not any(number != 0 for number in numbers):
            raise ConfigError(*self._asked(), why="with which no layer loses anything")
        if self.pick != "min" and None in numbers:
            raise ConfigError("pick", self.pick, allowed="'min' with a ratio of 'gap'")

    def _asked(self) -> tuple[str, Any]:
        """The field that says how much is removed, and its value."""
        if self.inherit:
            return ("inherit", self.inherit)
        return ("ratios", self.ratios)

    def layers(self, problem: Problem) -> Layers:
        """The layers of the run's network and how many units each loses, in the order in which it
        uses them. Raises ConfigError where ratios do not fit.
        """
        make = self._groups if self.granularity == "group" else self._kernels
        return problem.once(("layers", self), lambda: make(problem))

    def _groups(self, problem: Problem) -> Layers:
        """Whole coupled groups of channels."""
        channels = structured.channels_of(problem)
        rules = self.ratios
        with blaming("ratios", rules):
            if isinstance(rules, str):  # one ratio for all
                rules = ((".*", tables.read_text(rules, float)),)
            by_name = trees.match_rules(channels.sizes, rules)
            in_order = {name: by_name[name] for name in channels.sizes}
            return growing.coupled(train.shapes_of(problem), channels, in_order)

    def _kernels(self, problem: Problem) -> Layers:
        """Slices, or all weights, of single kernels."""
        table = self._table(problem)
        channels = None
        if self.granularity != "weight":
            channels = structured.channels_of(problem, branches="separate")
            for _, member in coupling.deciding(channels, "filter"):
                if member.role == "depthwise":
                    # its filters and channels are those of the layer before
                    table[member.path.removeprefix("params/")] = 0.0
        shapes = train.shapes_of(problem)
        with blaming(*self._asked()):
            return growing.layers(shapes, table, self.granularity, channels=channels)

    def _table(self, problem: Problem) -> Table:
        """The ratio of every kernel, by path in the params."""
        paths = kernels_of(problem)
        if self.inherit:
            there = self._there(problem)
            with blaming("inherit", self.inherit):
                return ratios.inherited(there, paths, granularity=self.granularity)
        options = dict(granularity=self.granularity, skip=self.skip, reading=self.reading)
        target = _SPEEDUP.fullmatch(self.ratios) if isinstance(self.ratios, str) else None
        if target is None:
            return ratios.parse(self.ratios, paths, **options)
        if self.granularity != "filter":
            allowed = "with granularity 'filter' only"
            raise ConfigError("ratios", self.ratios, why="a speed-up", allowed=allowed)
        any_ratio = ratios.parse(((".*", 0.5),), paths, **options)
        with blaming("ratios", self.ratios):
            return _for_speedup(problem, float(target[1]), any_ratio)

    def kept_there(self, problem: Problem) -> Arrays:
        """The very units that the run in `inherit` keeps, by layer; empty if they are to be picked
        anew.
        """
        if not self.inherit or self.inherit_as == "ratio":
            return {}
        there = self._there(problem)
        return ratios.kept_groups(there, list(there), granularity=self.granularity)

    def _there(self, problem: Problem) -> Arrays:
        """The masks of the run in `inherit`, read once and outside of compiled programs."""
        return problem.once(("there", self.inherit), lambda: _masks_there(problem, self.inherit))

    def removed(self, problem: Problem, state: State, keep: Keep) -> State:
        """`state` of one member without the units that `keep` leaves out, nor what is coupled to
        them.
        """
        kept = units.without(state.masks, self.layers(problem), keep)
        if self.granularity == "weight":
            return state._replace(params=masks.apply(state.params, kept), masks=kept)
        if self.granularity == "group":
            channels = structured.channels_of(problem)
        else:
            channels = structured.channels_of(problem, branches="separate")
            by_path = {f"params/{path}": bools for path, bools in keep.items()}
            keep = coupling.by_group(channels, by_path, self.granularity)
        return structured.without(state, channels, keep, kept)


def _for_speedup(problem: Problem, target: float, any_ratio: Table) -> Table:
    """One ratio that reaches a speed-up, for all layers whose channels may be removed.

    any_ratio: of every layer, not 0 where it may lose filters.
    """
    channels = structured.channels_of(problem)
    price = cost.of_channels(channels, "flops")
    proportions = {f"params/{path}": 0.0 for path in any_ratio}
    removable = {f"params/{path}" for path, ratio in any_ratio.items() if ratio}
    for group in channels.groups.values():
        makers = [member.path for member in group.members if member.role == "producer"]
        if removable.issuperset(makers):
            proportions.update(dict.fromkeys(makers, 1.0))
    flops = lambda table: price(ratios.keep_of(channels, table))
    table = ratios.for_speedup(flops, target, proportions)
    return {path.removeprefix("params/"): ratio for path, ratio in table.items()}


def kernels_of(problem: Problem) -> list[str]:
    """Paths of the kernels in the params, in the order in which the network uses them."""
    paths = problem.once("kernels", lambda: ratios.order(*structured.traceable(problem)))
    return [path.removeprefix("params/") for path in paths]


def _masks_there(problem: Problem, workdir: str) -> Arrays:
    """The masks of the kernels at the end of a finished run of the same network, by path in the
    params; raises ConfigError unless it holds one.
    """
    end = workdirs.newest(workdir)
    if end is None or not end.is_finished:
        raise ConfigError("inherit", workdir, why="which holds no finished run")
    arrays = stored.arrays(end)
    shapes = trees.named_leaves(train.shapes_of(problem))
    result = {}
    for path in kernels_of(problem):
        mask = np.asarray(arrays.get(f"masks/{path}"))
        expected = shapes[path].shape
        if mask.shape != expected:
            why = f"whose mask of {path} has the shape {mask.shape}"
            allowed = f"{expected}, a run of the same network"
            raise ConfigError("inherit", workdir, why=why, allowed=allowed)
        result[path] = mask
    return result


def shares_removed(state: State) -> Fields:
    """Shares of kernel weights that are masked: of all (`ratio`), and by path (`layers`)."""
    kept = trees.named_leaves(state.masks)
    kernel_masks = {path: mask for path, mask in kept.items() if trees.is_kernel(path)}
    left = sum(map(jnp.sum, kernel_masks.values()))
    return dict(
        ratio=1 - left / trees.size(kernel_masks),
        layers={path: masks.sparsity(mask) for path, mask in kernel_masks.items()},
    )


@tables.option
class Remove(Choosing):
    """Removes groups of weights at once: by L1 norm, the smallest or largest, or at random.

    ratios: share removed from every layer. `[0,0.75,0.75,0.32,0]`: of residual networks, before the
    blocks, in each stage of blocks, after them; `[0-4:0.5, 7-10:0.2]`: of others, by number of the
    layer; `2.5x`: one ratio for all layers that makes the network so many times cheaper in FLOPs;
    or pairs of a pattern of paths and a ratio. `gap`, or -1, cuts at the largest gap of the norms.
    Filter pruning leaves the last convolution of a block whole, channel pruning the first, both the
    shortcuts. skip: layers left whole, `[1.0,2.3]`. granularity: `filter` (output channels),
    `channel` (input channels), `weight`, or `group`: whole coupled groups of channels, residual
    ones too, with one ratio or rules on their names. pick: `min`, `max` or `rand`. inherit: workdir
    of a pruned run of the same network, instead of ratios. inherit_as: what that removed (`index`),
    or as much of each layer (`ratio`). reading: `original` reads
    `skip` as prefixes and ignores what is out of range, see `originals.in_place`.
    """

    kind: ClassVar[str] = "remove"
    ratios: str | tuple = ""
    skip: str = ""
    granularity: Literal["filter", "channel", "weight", "group"] = "filter"
    pick: growing.Pick = "min"
    inherit: str = ""
    inherit_as: Literal["index", "ratio"] = "index"
    reading: Reading = "correct"

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        self.layers(problem)  # found before anything compiles
        given = self.kept_there(problem)
        state, shares = problem.program(_remove, self)(state, place.position, given)
        (rows,) = train.member_rows(problem, shares, step=0)
        return state, rows


def _remove(
    problem: Problem, stage: Remove, state: State, position: int, given: Arrays
) -> tuple[State, Fields]:
    """given: which units stay, of layers where that is known."""
    key = train.stage_key(state.key, position)
    keep = growing.pick(state.params, stage.layers(problem), pick=stage.pick, key=key)
    state = stage.removed(problem, state, keep | given)
    return state, shares_removed(state)


STAGES = (Remove,)
