"""Pruning ratios layer by layer: short notations, rules on paths, another network's choice, a
target speed-up.

    layers = ratios.order(model.apply, variables, images)   # paths, in the network's order
    table = ratios.parse("[0,0.75,0.75,0.32,0]", layers)    # residual networks: one per stage
    table = ratios.parse("[0-4:0.5, 7-10:0.2]", layers)     # others: ranges of layers
    table = ratios.parse(((".*/conv1/kernel", 0.5), (".*", 0.0)), layers)
    price = cost.of_channels(channels, "flops")             # channels: groups.trace found
    found = ratios.for_speedup(lambda table: price(ratios.keep_of(channels, table)), 2.55, table)

A table maps the path of every kernel to the share of its filters, channels or weights that goes: 0
<= ratio < 1, or `gap`: those below the largest gap between the scores.
Source: Wang et al. 2021, arXiv:2012.09243, and its published code.
"""

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sparsity_jax import groups, kernels, masks, originals, tables, trees, units
from sparsity_jax.channels import walk

PyTree = Any
Ratio = float | Literal["gap"]
Table = dict[str, Ratio]
Reading = Literal["correct", "original"]
Coupled = Literal["filter", "channel"]

# A layer inside a residual block: the named groups are numbers, `shortcut` matches only in layers
# of the other branch.
BLOCKS = (
    r"(?:.*/)?(?:stage|layer)(?P<stage>\d+)(?:_block|[./])(?P<block>\d+)[./]"
    r"(?P<shortcut>shortcut|downsample)?.*"
)
NOTATIONS = "'[0-4:0.5]' (ranges of layers), '[0,0.5,0]' (stages of blocks), or rules on paths"


# Layers -------------------------------------------------------------------------------------------


def order(
    apply: Callable,
    variables: PyTree,
    *inputs: PyTree,
    is_kernel: Callable[[str], bool] = trees.is_kernel,
) -> list[str]:
    """Paths of the kernels of `apply(variables, *inputs)`, by the first convolution or matrix
    product each is in.

    Kernels are arrays of two axes or more whose path `is_kernel`; those in no product are left out.
    A kernel may be cast, reshaped or normalised before. variables, inputs: arrays or shape structs;
    nothing is computed.
    """
    leaves = list(trees.named_leaves(variables).items())
    used = walk.read(apply, variables, *inputs).multiplied
    arrays = [leaves[number] for number in used if number < len(leaves)]
    return [path for path, leaf in arrays if is_kernel(path) and leaf.ndim > 1]


class Layer(NamedTuple):
    """Where a kernel is. address: (stage, block, convolution), all but the stage counted from 0, -1
    for a shortcut; (stage,) outside of blocks, 0 before them; (number of the layer,) in a network
    without blocks."""

    path: str
    address: tuple[int, ...]
    whole: tuple[str, ...] = ()  # granularities that leave it whole

    @property
    def in_block(self) -> bool:
        return len(self.address) > 1

    @property
    def name(self) -> str:
        """Its address as it is written in `skip`."""
        return ".".join(map(str, self.address))


def places(layers: Sequence[str], blocks: str = BLOCKS) -> list[Layer]:
    """`layers` (paths in the network's order) with their places in stages and blocks.

    blocks: regular expression with the named groups `stage` and `block` (numbers) and maybe
    `shortcut` that matches the whole path of every layer inside a block. Stages count from 1.
    Filter pruning leaves the last convolution of a block whole, channel pruning the first, both the
    shortcut. Raises ConfigError for a pattern without these groups.
    """
    inside = _blocks_of(layers, blocks)
    if not inside:
        return [Layer(path, (i,)) for i, path in enumerate(layers)]
    stages = sorted({match.stage for match in inside.values()})
    last_inside = list(inside)[-1]
    stage, passed, result = 0, False, []
    for path in layers:
        if path in inside:
            stage = stages.index(inside[path].stage) + 1
            result.append(_inside_block(path, stage, inside))
        else:
            result.append(Layer(path, (len(stages) + 1 if passed else stage,)))
        passed = passed or path == last_inside
    return result


class _Match(NamedTuple):
    stage: int
    block: int
    shortcut: bool


def _blocks_of(layers: Sequence[str], blocks: str) -> dict[str, _Match]:
    """The layers inside blocks."""
    trees.check_pattern(blocks, "blocks")
    pattern = re.compile(blocks)
    if not {"stage", "block"} <= pattern.groupindex.keys():
        raise tables.ConfigError(
            "blocks", blocks, allowed="a pattern with the groups (?P<stage>...) and (?P<block>...)"
        )
    inside = {}
    for path in layers:
        match = pattern.fullmatch(path)
        if match is None:
            continue
        shortcut = bool(match.groupdict().get("shortcut"))
        inside[path] = _Match(_number(match, "stage"), _number(match, "block"), shortcut)
    return inside


def _number(match: re.Match, name: str) -> int:
    if not re.fullmatch(r"\d+", match[name] or ""):
        raise tables.ConfigError(
            "blocks", match[name], why=f"the {name} of {match.string!r}", allowed="numbers"
        )
    return int(match[name])


def _inside_block(path: str, stage: int, inside: Mapping[str, _Match]) -> Layer:
    here = inside[path]
    in_stage = [match for match in inside.values() if match.stage == here.stage]
    block = sorted({match.block for match in in_stage}).index(here.block)
    if here.shortcut:
        return Layer(path, (stage, block, -1), ("filter", "channel"))
    branch = [other for other, match in inside.items() if match == here]
    first, last = branch[0], branch[-1]
    whole = []
    if path == last:
        whole.append("filter")
    if path == first:
        whole.append("channel")
    return Layer(path, (stage, block, branch.index(path)), tuple(whole))


# Notations ----------------------------------------------------------------------------------------


def parse(
    notation: str | Sequence,
    layers: Sequence[str],
    *,
    granularity: units.Granularity = "filter",
    skip: str | Sequence[str] = "",
    blocks: str = BLOCKS,
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
    with tables.within("ratios"):
        table = _by_notation(notation, located, granularity, reading)
    with tables.within("skip"):
        skipped = _skipped(skip, located, granularity, reading)
    for layer in located:
        if granularity in layer.whole or layer.path in skipped:
            table[layer.path] = 0.0
    return table


def _by_notation(
    notation: str | Sequence, located: Sequence[Layer], granularity: str, reading: Reading
) -> Table:
    if not isinstance(notation, Sequence):
        raise tables.ConfigError("", notation, allowed=NOTATIONS)
    items = _items(notation) if isinstance(notation, str) else notation
    if not items:
        raise tables.ConfigError("", notation, allowed=NOTATIONS)
    if any(isinstance(item, (tuple, list)) for item in items):
        return _by_rule(items, located, granularity)
    residual = any(layer.in_block for layer in located)
    ranges = any(":" in str(item) for item in items)
    if residual == ranges:
        form = f"[0-{len(located) - 2}:0.5], ranges of the layers 0 to {len(located) - 1}"
        if residual:
            form = f"a ratio each for {', '.join(_stages(located))}"
        raise tables.ConfigError("", notation, allowed=f"{form}, or rules on paths")
    return _by_range(items, located, reading) if ranges else _by_stage(items, located)


def _items(text: str) -> list[str]:
    """The entries of "[a, b, ]" or "a, b"."""
    inner = text.strip()
    items = [item.strip() for item in inner.removeprefix("[").removesuffix("]").split(",")]
    if items[-1] == "":
        items.pop()
    if "" in items or inner.startswith("[") != inner.endswith("]"):
        raise tables.ConfigError("", text, allowed="'[a, b]' or 'a, b'")
    return items


def _ratio(value: Any, place: str = "") -> Ratio:
    try:
        ratio = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        ratio = math.nan
    if ratio == -1 or str(value) == "gap":
        return "gap"
    if not 0 <= ratio < 1:
        raise tables.ConfigError(
            place, value, allowed="0 <= ratio < 1, the share removed, or 'gap': below the largest"
        )
    return ratio


def _by_rule(rules: Sequence, located: Sequence[Layer], granularity: str) -> Table:
    values = []
    for i, rule in enumerate(rules):
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)):
            raise tables.ConfigError(f"[{i}]", rule, allowed="a pair such as ('.*/conv1/.*', 0.5)")
        values.append(_ratio(rule[1], f"[{i}]"))
    numbered = [(pattern, i) for i, (pattern, _) in enumerate(rules)]
    deciding = trees.match_rules({layer.path: 0 for layer in located}, numbered)
    for pattern, i in numbered:
        decided = [layer for layer in located if deciding[layer.path] == i]
        if values[i] and decided and all(granularity in layer.whole for layer in decided):
            raise tables.ConfigError(
                f"[{i}]", pattern, why=f"only layers that {granularity} pruning leaves whole"
            )
    return {layer.path: values[deciding[layer.path]] for layer in located}


def _by_range(items: Sequence, located: Sequence[Layer], reading: Reading) -> Table:
    paths = [layer.path for layer in located]
    table: Table = dict.fromkeys(paths, 0.0)
    for i, item in enumerate(items):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?\s*:(.*)", str(item))
        if not match:
            raise tables.ConfigError(f"[{i}]", item, allowed="'0-4:0.5' or '5:0.5'")
        first, end = int(match[1]), int(match[2] or match[1])
        if first > end or (end >= len(paths) and reading == "correct"):
            raise tables.ConfigError(f"[{i}]", item, allowed=f"the layers 0 to {len(paths) - 1}")
        ratio = _ratio(match[3].strip(), f"[{i}]")
        table |= dict.fromkeys(paths[first : end + 1], ratio)
    return table


def _stages(located: Sequence[Layer]) -> list[str]:
    """What a list of ratios is for, in words."""
    last = max(layer.address[0] for layer in located if layer.in_block)
    inside = map(str, range(1, last + 1))
    return ["0 (before the blocks)", *inside, f"{last + 1} (after the blocks)"]


def _by_stage(items: Sequence, located: Sequence[Layer]) -> Table:
    stages = _stages(located)
    if len(items) != len(stages):
        raise tables.ConfigError("", list(items), allowed=f"a ratio each for {', '.join(stages)}")
    values = [_ratio(item, f"[{i}]") for i, item in enumerate(items)]
    return {layer.path: values[layer.address[0]] for layer in located}


def _skipped(
    skip: str | Sequence[str], located: Sequence[Layer], granularity: str, reading: Reading
) -> set[str]:
    residual = any(layer.in_block for layer in located)
    entries = _items(skip) if isinstance(skip, str) else list(map(str, skip))
    result: set[str] = set()
    for entry in entries:
        if not re.fullmatch(r"\d+(\.\d+){0,2}" if residual else r"\d+", entry):
            form = "stage.block.convolution, e.g. '2.3' or '3.0.1'" if residual else "a number"
            raise tables.ConfigError("", entry, allowed=form)
        is_in = originals.in_place if residual and reading == "original" else _is_in
        matched = {layer.path for layer in located if is_in(layer.name, entry)}
        if not matched and reading == "correct":
            known = [layer.name for layer in located if -1 not in layer.address]
            raise tables.ConfigError("", entry, why="matches no layer", allowed=" ".join(known))
        result |= matched
    if reading == "original" and granularity == "weight" and residual:
        return set()
    return result


def _is_in(address: str, entry: str) -> bool:
    return f"{address}.".startswith(f"{entry}.")


# Another network's ratios -------------------------------------------------------------------------


def kept_groups(
    given: Mapping[str, Any],
    layers: Sequence[str],
    *,
    granularity: units.Granularity,
    layout: kernels.Layout | None = None,
) -> dict[str, np.ndarray]:
    """Which filters [out], channels [in] or weights (the kernel's shape) of each layer another
    pruned network keeps.

    given: its masks by path (`trees.named_leaves`), bool in the shape of the kernel, or bool
    [number of groups] for filters and channels; arrays that are no layers are ignored. A group is
    kept if any of its weights is. layout: of the kernels, where their names do not tell; see
    `kernels.axes`. Raises ValueError for a layer without a mask, for masks that are not bool and
    kernels of unknown layout.
    """
    tables.convert(granularity, units.Granularity, "granularity")
    result = {}
    for path in layers:
        if path not in given:
            raise ValueError(f"masks have no {path!r}.{tables.closest(path, given)}")
        mask = np.asarray(given[path])
        least = 2 if granularity == "weight" else 1
        if mask.dtype != bool or mask.ndim < least:
            raise ValueError(
                f"the mask of {path!r} is {mask.dtype} {mask.shape}; allowed: bool, True = kept."
            )
        if granularity != "weight" and mask.ndim > 1:
            (axes,) = kernels.axes({path: mask}, [path], layout=layout).values()
            (axis,) = axes.outputs if granularity == "filter" else axes.inputs
            slices = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
            mask = np.any(slices, axis=1)
        result[path] = mask
    return result


def inherited(
    given: Mapping[str, Any],
    layers: Sequence[str],
    *,
    granularity: units.Granularity,
    layout: kernels.Layout | None = None,
) -> Table:
    """The ratios that another pruned network has; arguments and errors as `kept_groups`.

    `masks.num_pruned` of them gives back its counts. Raises ValueError if a layer keeps nothing.
    """
    table: Table = {}
    for path, kept in kept_groups(given, layers, granularity=granularity, layout=layout).items():
        if not kept.any():
            raise ValueError(f"the mask of {path!r} keeps nothing; a ratio below 1 is needed.")
        removed = int((~kept).sum())
        table[path] = removed / kept.size
    return table


# Speed-up -----------------------------------------------------------------------------------------


def keep_of(
    channels: groups.Channels, table: Mapping[str, Any], *, granularity: Coupled = "filter"
) -> dict[str, np.ndarray]:
    """A `keep` of every group with `num_pruned` channels less: the lowest go, so it is for counts
    and costs only.

    table: by path in the traced variables, such as params/conv1/kernel, of the layers that make
    (channel: read) the channels. Raises ValueError for a path that is no variable, a ratio that is
    no number below 1, one for a layer whose channels cannot be removed, and different ratios of
    layers that share their channels.
    """
    tables.convert(granularity, Coupled, "granularity")
    for path, ratio in table.items():
        if path not in channels.shapes:
            hint = tables.closest(path, channels.shapes)
            raise ValueError(f"{path!r} is no variable of the trace.{hint}")
        if ratio == "gap" or not 0 <= ratio < 1:
            raise ValueError(f"the ratio of {path!r} is {ratio!r}; allowed: 0 <= ratio < 1.")
    ratios: dict[str, float] = {}
    removable = set()
    for name, member in units.deciding(channels, granularity):
        ratio = table.get(member.path)
        # a depthwise layer may have no ratio of its own, or 0
        if ratio is None or (member.role == "depthwise" and not ratio):
            continue
        removable.add(member.path)
        if ratios.setdefault(name, ratio) != ratio:
            raise ValueError(f"the channels {name!r} belong to layers with different ratios.")
    for path, ratio in table.items():
        if ratio and path not in removable:
            raise ValueError(f"no {granularity} of {path!r} can be removed; its ratio must be 0.")
    return {
        name: np.arange(size) >= masks.num_pruned(ratios.get(name, 0.0), size)
        for name, size in channels.sizes.items()
    }


class Speedup(NamedTuple):
    """table: the ratios. factor: of the table that was asked for. speedup: price of the dense
    network over theirs.
    """

    table: dict[str, float]
    factor: float
    speedup: float


def for_speedup(
    price: Callable[[dict[str, float]], float],
    target: float,
    table: Mapping[str, float],
    *,
    highest: tables.Share = 0.99,
    steps: tables.Count = 10_000,
) -> Speedup:
    """The smallest factor of `table` whose ratios cost at most 1 / `target` of the dense network.

    price: of a table, e.g. FLOPs; it must not rise with any ratio and is called about log2(steps)
    times. table: the proportions between layers, e.g. 1 for each to have one ratio for all; 0 stays
    0. highest: where ratios end. steps: the factor is a whole number over `steps`. Channels are
    whole: the speed-up reached is the least one not below the target. Raises ValueError if even the
    highest ratios do not reach the target, naming what they do.
    """
    tables.convert(highest, tables.Share, "highest")
    tables.convert(steps, tables.Count, "steps")
    if not target >= 1:
        raise ValueError(f"target is {target}; allowed: 1 and above.")
    if any(ratio < 0 for ratio in table.values()) or not any(table.values()):
        raise ValueError("table holds proportions: 0 and above, not all 0.")

    def scaled(number: int) -> dict[str, float]:
        return {path: min(number / steps * ratio, highest) for path, ratio in table.items()}

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
    return Speedup(scaled(number), number / steps, speedup(number))
