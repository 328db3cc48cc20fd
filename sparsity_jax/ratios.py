"""Pruning ratios layer by layer: short notations, rules on paths, another network's choice, a
target speed-up.

    layers = ratios.order(model.apply, variables, images)   # paths, in the network's order
    table = ratios.parse("[0,0.75,0.75,0.32,0]", layers)    # residual networks: one per stage
    table = ratios.parse("[0-4:0.5, 7-10:0.2]", layers)     # others: ranges of layers
    table = ratios.parse(((".*/conv1/kernel", 0.5), (".*", 0.0)), layers)
    price = cost.of_channels(channels, "flops")             # channels: groups.trace
    flops = lambda table: price(ratios.keep_of(channels, table))
    table = ratios.for_speedup(flops, 2.55, table)

A table maps the path of every kernel to the share of its filters, channels or weights that goes: 0
<= ratio < 1, or `gap`: those below the largest gap between the scores.
Source: Wang et al. 2021, arXiv:2012.09243, and its published code.
"""

import bisect
import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sparsity_jax import coupling, groups, kernels, masks, originals, shares, tables, trees, units
from sparsity_jax.channels import walk
from sparsity_jax.types import Arrays, Paths, PyTree

__all__ = [
    "Layer",
    "Layers",
    "Ratio",
    "Reading",
    "Table",
    "for_speedup",
    "inherited",
    "keep_of",
    "kept_groups",
    "order",
    "parse",
    "places",
]

Ratio = float | Literal["gap"]
Table = dict[str, Ratio]
Reading = Literal["correct", "original"]

# A layer inside a residual block: the named groups are numbers, `shortcut` matches only in layers
# of the other branch.
_BLOCKS = (
    r"(?:.*/)?(?:stage|layer)(?P<stage>\d+)(?:_block|[./])(?P<block>\d+)[./]"
    r"(?P<shortcut>shortcut|downsample)?.*"
)
_NOTATIONS = "'[0-4:0.5]' (ranges of layers), '[0,0.5,0]' (stages of blocks), or rules on paths"
_RANGE = r"(\d+)(?:\s*-\s*(\d+))?\s*:(.*)"


# Layers -------------------------------------------------------------------------------------------


def order(apply: Callable, variables: PyTree, *inputs: PyTree) -> Paths:
    """Paths of the kernels of `apply(variables, *inputs)`, by the first convolution or matrix
    product each is in.

    Kernels are arrays of two axes or more with a name of kernels (`trees.is_kernel`); those in no
    product are left out. A kernel may be cast, reshaped or normalised before. variables, inputs:
    arrays or shape structs; nothing is computed.
    """
    leaves = trees.named_leaves(variables)
    multiplied = walk.read(apply, variables, *inputs).multiplied.of(leaves)
    return [path for path in multiplied if trees.is_kernel(path) and leaves[path].ndim > 1]


class Layer(NamedTuple):
    """Where a kernel is. address: (stage, block, convolution), all but the stage counted from 0, -1
    for a shortcut; (stage,) outside of blocks, 0 before them; (number of the layer,) in a network
    without blocks."""

    path: str
    address: tuple[int, ...]
    whole: tuple[str, ...] = ()  # granularities that leave it whole

    @property
    def name(self) -> str:
        """Its address as it is written in `skip`."""
        return ".".join(map(str, self.address))


Layers = Sequence[Layer]


class _Branch(NamedTuple):
    """A branch of a residual block, by its numbers in paths."""

    stage: int
    block: int
    shortcut: bool


def places(layers: Paths, blocks: str = _BLOCKS) -> list[Layer]:
    """`layers` (paths in the network's order) with their places in stages and blocks.

    blocks: regular expression with the named groups `stage` and `block` (numbers) and maybe
    `shortcut` that matches the whole path of every layer inside a block. Stages count from 1.
    Filter pruning leaves the last convolution of a block whole, channel pruning the first, both the
    shortcut. Raises ConfigError for a pattern without these groups.
    """
    inside = _branches(layers, blocks)
    if not inside:
        return [Layer(path, (i,)) for i, path in enumerate(layers)]
    stages = sorted({branch.stage for branch in inside.values()})
    stage = 0
    result = []
    for path in layers:
        if path not in inside:
            result.append(Layer(path, (stage,)))
            continue
        here = inside[path]
        stage = stages.index(here.stage) + 1
        numbers = {other.block for other in inside.values() if other.stage == here.stage}
        branch = [other for other in inside if inside[other] == here]
        number = branch.index(path)
        if here.shortcut:
            number = -1
        ends = {"filter": branch[-1], "channel": branch[0]}
        whole = tuple(name for name, end in ends.items() if here.shortcut or end == path)
        address = (stage, sorted(numbers).index(here.block), number)
        result.append(Layer(path, address, whole))
        if path == list(inside)[-1]:
            stage = len(stages) + 1
    return result


def _branches(layers: Paths, blocks: str) -> dict[str, _Branch]:
    """The branch of each layer inside blocks."""
    trees.check_pattern(blocks, "blocks")
    pattern = re.compile(blocks)
    if not {"stage", "block"} <= pattern.groupindex.keys():
        raise tables.ConfigError(
            "blocks", blocks, allowed="a pattern with the groups (?P<stage>...) and (?P<block>...)"
        )
    inside = {}
    matches = map(pattern.fullmatch, layers)
    for match in filter(None, matches):
        texts = match.groupdict("")
        stage = tables.read_text(texts["stage"], int, "blocks", 0)
        block = tables.read_text(texts["block"], int, "blocks", 0)
        inside[match.string] = _Branch(stage, block, bool(texts.get("shortcut")))
    return inside


# Notations ----------------------------------------------------------------------------------------


def parse(
    notation: str | Sequence,
    layers: Paths,
    *,
    granularity: units.Granularity = "filter",
    skip: str | Paths = "",
    blocks: str = _BLOCKS,
    reading: Reading = "correct",
) -> Table:
    """The ratio of every layer; see `order` for `layers` and `places` for `blocks` and what a
    granularity leaves whole.

    notation: of a residual network the ratio of each stage, "[0,0.68,0.68,0.68,0.5,0]" or a
        sequence of numbers: the layers before the blocks, each stage of blocks, the layers after.
        Of any other network "[0-4:0.5, 7-10:0.2]": inclusive ranges of layers counted from 0, later
        ones win, all others 0. Of both, rules: pairs of a regular expression of whole paths and a
        ratio, the first that matches decides. A ratio may be `gap`, or -1 as the original writes
        it.
    skip: layers left out, "[1.0,2.3,3.0.1]": stage, block, convolution, or less of it for all it
        contains; the number of the layer in a network without blocks.
    reading: `original`, see `originals.in_place`.
    Raises ConfigError, naming `ratios` or `skip`, for anything malformed or out of range, and for
    rules and skips that match nothing.
    """
    tables.convert(granularity, units.Granularity, "granularity")
    tables.convert(reading, Reading, "reading")
    located = places(layers, blocks)
    residual = any(len(layer.address) > 1 for layer in located)
    with tables.within("ratios"):
        items = _items(notation)
        ranges = any(":" in str(item) for item in items)
        if any(isinstance(item, (tuple, list)) for item in items):
            table = _by_rule(items, located, granularity)
        elif ranges and not residual:
            table = _by_range(items, located, reading)
        elif residual and not ranges:
            table = _by_stage(items, located)
        else:
            raise tables.ConfigError("", notation, allowed=_NOTATIONS)
    with tables.within("skip"):
        skipped = _skipped(skip, located, residual, reading)
    if reading == "original" and granularity == "weight" and residual:
        skipped = set()
    for layer in located:
        if granularity in layer.whole or layer.path in skipped:
            table[layer.path] = 0.0
    return table


def _items(notation: str | Sequence, least: int = 1) -> list:
    """The entries of "[a, b, ]", "a, b" or a sequence."""
    items = notation
    if isinstance(notation, str):
        inner = notation.strip()
        entries = inner.removeprefix("[").removesuffix("]").split(",")
        items = list(map(str.strip, entries))
        if items[-1] == "":
            items.pop()
        if "" in items or inner.startswith("[") != inner.endswith("]"):
            raise tables.ConfigError("", notation, allowed="'[a, b]' or 'a, b'")
    if not isinstance(items, Sequence) or len(items) < least:
        raise tables.ConfigError("", notation, allowed=_NOTATIONS)
    return list(items)


def _ratio(value: Any) -> Ratio:
    ratio = math.nan
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            ratio = float(value)
    if ratio == -1 or str(value) == "gap":
        return "gap"
    if not 0 <= ratio < 1:
        raise tables.ConfigError(
            "", value, allowed="0 <= ratio < 1, the share removed, or 'gap': below the largest"
        )
    return ratio


def _ratios(values: Sequence) -> list[Ratio]:
    ratios = []
    for i, value in enumerate(values):
        with tables.within(f"[{i}]"):
            ratios.append(_ratio(value))
    return ratios


def _by_rule(items: Sequence, located: Layers, granularity: str) -> Table:
    rules = tables.convert(items, tuple[tuple[str, Any], ...])
    patterns, values = zip(*rules)
    ratios = _ratios(values)
    numbered = [(pattern, i) for i, pattern in enumerate(patterns)]
    deciding = trees.match_rules({layer.path: 0 for layer in located}, numbered)
    prunable = {deciding[layer.path] for layer in located if granularity not in layer.whole}
    for i in set(deciding.values()) - prunable:
        if ratios[i]:
            told = f"only layers that {granularity} pruning leaves whole"
            raise tables.ConfigError(f"[{i}]", patterns[i], why=told)
    return {layer.path: ratios[deciding[layer.path]] for layer in located}


def _by_range(items: Sequence, located: Layers, reading: Reading) -> Table:
    paths = [layer.path for layer in located]
    last = len(paths) - 1
    table: Table = dict.fromkeys(paths, 0.0)
    for i, item in enumerate(items):
        with tables.within(f"[{i}]"):
            match = re.fullmatch(_RANGE, str(item))
            if not match:
                raise tables.ConfigError("", item, allowed="'0-4:0.5' or '5:0.5'")
            first = int(match[1])
            end = int(match[2] or first)
            if first > end or (end > last and reading == "correct"):
                raise tables.ConfigError("", item, allowed=f"the layers 0 to {last}")
            ratio = _ratio(match[3].strip())
        table |= dict.fromkeys(paths[first : end + 1], ratio)
    return table


def _by_stage(items: Sequence, located: Layers) -> Table:
    stages = [layer.address[0] for layer in located if len(layer.address) > 1]
    last = max(stages) + 1
    if len(items) != last + 1:
        told = f"a ratio each for 0 (before the blocks), 1 to {last - 1}, {last} (after the blocks)"
        raise tables.ConfigError("", items, allowed=told)
    ratios = _ratios(items)
    return {layer.path: ratios[layer.address[0]] for layer in located}


def _skipped(skip: str | Paths, located: Layers, residual: bool, reading: Reading) -> set[str]:
    form = r"\d+"
    told = "a number"
    if residual:
        form = r"\d+(\.\d+){0,2}"
        told = "stage.block.convolution, e.g. '2.3' or '3.0.1'"
    is_in = _is_in
    if residual and reading == "original":
        is_in = originals.in_place
    result: set[str] = set()
    for entry in map(str, _items(skip, 0)):
        if not re.fullmatch(form, entry):
            raise tables.ConfigError("", entry, allowed=told)
        matched = {layer.path for layer in located if is_in(layer.name, entry)}
        if not matched and reading == "correct":
            known = [layer.name for layer in located if -1 not in layer.address]
            raise tables.ConfigError("", entry, why="matches no layer", allowed=" ".join(known))
        result |= matched
    return result


def _is_in(address: str, entry: str) -> bool:
    return f"{address}.".startswith(f"{entry}.")


# Another network's ratios -------------------------------------------------------------------------


def kept_groups(given: units.Leaves, layers: Paths, *, granularity: units.Granularity) -> Arrays:
    """Which filters [out], channels [in] or weights (the kernel's shape) of each layer another
    pruned network keeps.

    given: its masks by path (`trees.named_leaves`), bool in the shape of the kernel, or bool
    [number of groups] for filters and channels; arrays that are no layers are ignored. A group is
    kept if any of its weights is. Raises ValueError for a layer without a mask, for masks that are
    not bool and kernels of unknown layout.
    """
    tables.convert(granularity, units.Granularity, "granularity")
    of_weights = granularity == "weight"
    result = {}
    for path in layers:
        mask = np.asarray(tables.lookup(given, path, "the path of a mask"))
        if mask.dtype != bool or mask.ndim < (2 if of_weights else 1):
            raise ValueError(
                f"the mask of {path!r} is {mask.dtype} {mask.shape}; allowed: bool, True = kept."
            )
        if mask.ndim > 1 and not of_weights:
            axes = kernels.axes({path: mask}, [path])[path]
            along = axes.outputs if granularity == "filter" else axes.inputs
            others = np.delete(range(mask.ndim), along)
            mask = np.asarray(mask.any(tuple(others)))
        result[path] = mask
    return result


def inherited(given: units.Leaves, layers: Paths, *, granularity: units.Granularity) -> Table:
    """The ratios that another pruned network has; arguments and errors as `kept_groups`.

    `masks.num_pruned` of them gives back its counts. Raises ValueError if a layer keeps nothing.
    """
    table: Table = {}
    for path, kept in kept_groups(given, layers, granularity=granularity).items():
        if not kept.any():
            raise ValueError(f"the mask of {path!r} keeps nothing; a ratio below 1 is needed.")
        removed = int((~kept).sum())
        table[path] = removed / kept.size
    return table


# Speed-up -----------------------------------------------------------------------------------------


def keep_of(channels: groups.Channels, table: Mapping[str, Any]) -> Arrays:
    """A `keep` of every group with `num_pruned` channels less: the lowest go, so it is for counts
    and costs only.

    table: by path in the traced variables, such as params/conv1/kernel, of the layers that make the
    channels. Raises ValueError for a path that is no variable, a ratio that is
    no number below 1, one for a layer whose channels cannot be removed, and different ratios of
    layers that share their channels.
    """
    for path, ratio in table.items():
        tables.lookup(channels.shapes, path, "the path of a ratio")
        if ratio == "gap" or not 0 <= ratio < 1:
            raise ValueError(f"the ratio of {path!r} is {ratio!r}; allowed: 0 <= ratio < 1.")
    ratios: shares.Ratios = {}
    unused = {path for path, ratio in table.items() if ratio}
    for name, member in coupling.deciding(channels, "filter"):
        ratio = table.get(member.path)
        # a depthwise layer may have no ratio of its own, or 0
        if ratio is None or (member.role == "depthwise" and not ratio):
            continue
        unused.discard(member.path)
        if ratios.setdefault(name, ratio) != ratio:
            raise ValueError(f"the channels {name!r} belong to layers with different ratios.")
    if unused:
        path = min(unused)
        raise ValueError(f"no filter of {path!r} can be removed; its ratio must be 0.")
    keep = {}
    for name, size in channels.sizes.items():
        ratio = ratios.get(name, 0.0)
        number = masks.num_pruned(ratio, size)
        keep[name] = np.arange(size) >= number
    return keep


def for_speedup(
    price: Callable,
    target: float,
    table: Mapping[str, float],
    *,
    highest: float = 0.99,
    steps: int = 10_000,
) -> shares.Ratios:
    """`table` times the smallest factor at which it costs 1 / `target` of the dense one, or less.

    price: of a table, e.g. FLOPs; it must not rise with any ratio and is called about log2(steps)
    times. table: the proportions between layers, e.g. 1 for each to have one ratio for all; 0 stays
    0. highest: where ratios end. steps: the factor is a whole number over `steps`. Channels are
    whole: the speed-up reached is the least one not below the target. Raises ValueError if even the
    highest ratios do not reach the target, naming what they do.
    """
    if not target >= 1:
        raise ValueError(f"target is {target}; allowed: 1 and above.")
    proportions = table.values()
    if any(proportion < 0 for proportion in proportions) or not any(proportions):
        raise ValueError("table holds proportions: 0 and above, not all 0.")

    def scaled(number: int) -> shares.Ratios:
        factor = number / steps
        return {path: min(factor * ratio, highest) for path, ratio in table.items()}

    def speedup(number: int) -> float:
        return dense / price(scaled(number))

    dense = price(scaled(0))
    least = min(ratio for ratio in table.values() if ratio)
    most = math.ceil(highest * steps / least)
    number = bisect.bisect_left(range(most + 1), target, key=speedup)
    if number > most:
        raise ValueError(
            f"a speed-up of {target} cannot be reached; ratios of {highest} give at most "
            f"{speedup(most):.4g}. Prune more layers or use a larger `highest`."
        )
    return scaled(number)
