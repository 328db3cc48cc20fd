"""Pruning ratios layer by layer: short notations, rules on paths, another network's choice, a
target speed-up.

    layers = ratios.order(model.apply, variables, images)            # paths of the kernels, in the
    network's order table = ratios.parse("[0,0.75,0.75,0.32,0]", layers)             # residual
    networks: one ratio per stage table = ratios.parse("[0-4:0.5, 7-10:0.2]", layers)              #
    others: ranges of layers table = ratios.parse(((".*/conv1/kernel", 0.5), (".*", 0.0)), layers)
    price = cost.of_channels(channels, "flops")                      # channels: groups.trace found
    = ratios.for_speedup(lambda table: price(ratios.keep_of(channels, table)), 2.55, table)

A table maps the path of every kernel to the share of its filters, channels or weights that goes: 0
<= ratio < 1, or `masks.AUTOMATIC` (cut at the largest gap of the scores).
Source: Wang et al. 2021, arXiv:2012.09243, and its published code.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sparsity_jax import groups, kernels, masks, tables, trees
from sparsity_jax.channels import walk

PyTree = Any
Table = dict[str, float]
Granularity = Literal["filter", "channel", "weight"]

# A layer inside a residual block: the named groups are numbers, `shortcut` matches only in layers
# of the other branch.
BLOCKS = (
    r"(?:.*/)?(?:stage|layer)(?P<stage>\d+)(?:_block|[./])(?P<block>\d+)[./]"
    r"(?P<shortcut>shortcut|downsample)?.*"
)


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
    whole: tuple[str, ...]  # granularities that leave it whole


def places(layers: Sequence[str], blocks: str = BLOCKS) -> list[Layer]:
    """`layers` (paths in the network's order) with their places in stages and blocks.

    blocks: regular expression with the named groups `stage` and `block` (numbers) and maybe
    `shortcut` that matches the whole path of every layer inside a block. Stages count from 1.
    Filter pruning leaves the last convolution of a block whole, channel pruning the first, both the
    shortcut. Raises ConfigError for a pattern without these groups.
    """
    trees.check_pattern(blocks, "blocks")
    pattern = re.compile(blocks)
    if not {"stage", "block"} <= pattern.groupindex.keys():
        raise tables.ConfigError(
            f"blocks is {blocks!r}; it needs the named groups (?P<stage>...) and (?P<block>...)."
        )
    inside = {path: match for path in layers if (match := pattern.fullmatch(path))}
    if not inside:
        return [Layer(path, (i,), ()) for i, path in enumerate(layers)]
    key_of = {
        path: tuple(_number(match, name) for name in ("stage", "block"))
        for path, match in inside.items()
    }
    branch: dict[tuple, list[str]] = {
        key: [] for key in sorted(set(key_of.values()))
    }  # of each block, the main one
    for path, match in inside.items():
        branch[key_of[path]] += [path] * (not match.groupdict().get("shortcut"))
    stages = sorted({stage for stage, _ in branch})
    last = max(i for i, path in enumerate(layers) if path in inside)
    stage, result = 0, []
    for i, path in enumerate(layers):
        if path not in inside:
            result.append(Layer(path, (stage if i < last else len(stages) + 1,), ()))
            continue
        key, own = key_of[path], branch[key_of[path]]
        stage, block = (
            stages.index(key[0]) + 1,
            [other for other in branch if other[0] == key[0]].index(key),
        )
        if path in own:
            whole = ("filter",) * (path == own[-1]) + ("channel",) * (path == own[0])
            result.append(Layer(path, (stage, block, own.index(path)), whole))
        else:
            result.append(Layer(path, (stage, block, -1), ("filter", "channel")))
    return result


def _number(match: re.Match, name: str) -> int:
    if not re.fullmatch(r"\d+", match[name] or ""):
        raise tables.ConfigError(
            f"blocks: in {match.string!r} the group {name!r} is {match[name]!r}, not a number."
        )
    return int(match[name])


# Notations ----------------------------------------------------------------------------------------


def parse(
    notation: str | Sequence,
    layers: Sequence[str],
    *,
    granularity: Granularity = "filter",
    skip: str | Sequence[str] = "",
    blocks: str = BLOCKS,
    reading: Literal["correct", "original"] = "correct",
) -> Table:
    """The ratio of every layer; see `order` for `layers` and `places` for `blocks` and what a
    granularity leaves whole.

    notation: of a residual network the ratio of each stage, "[0,0.68,0.68,0.68,0.5,0]" or a
        sequence of numbers: the layers before the blocks, each stage of blocks, the layers after.
        Of any other network "[0-4:0.5, 7-10:0.2]": inclusive ranges of layers counted from 0, later
        ones win, all others 0. Of both, rules: pairs of a regular expression of whole paths and a
        ratio, the first that matches decides.
    skip: layers left out, "[1.0,2.3,3.0.1]": stage, block, convolution, or less of it for all it
        contains; the number of the layer in a network without blocks.
    reading: `original`, as the published code: "3.1" also skips block 3.10, nothing is skipped in
        weight pruning of residual networks, and ranges and skips beyond the last layer are ignored.
    Raises ConfigError, of the setting `ratios` or `skip`, for anything malformed or out of range,
    and for rules and skips that match nothing.
    """
    tables.convert(granularity, Granularity, "granularity")
    tables.convert(reading, Literal["correct", "original"], "reading")
    located = places(layers, blocks)
    residual = any(len(layer.address) > 1 for layer in located)
    whole = {layer.path for layer in located if granularity in layer.whole}
    with tables.within("ratios"):
        items = _items(notation)
        if not items:
            raise tables.ConfigError("", notation, why="which has no ratio")
        if any(isinstance(item, (tuple, list)) for item in items):
            table = _by_rule(items, layers, whole, granularity)
        elif any(":" in str(item) for item in items):
            _refuse_ranges(notation, located if residual else ())
            table = _by_range(items, layers, reading)
        else:
            _refuse_stages(notation, () if residual else layers)
            table = _by_stage(items, located)
    with tables.within("skip"):
        skipped = _skipped(skip, located, reading)
    if reading == "original" and granularity == "weight" and residual:
        skipped = set()
    return {
        path: 0.0 if path in whole or path in skipped else ratio for path, ratio in table.items()
    }


def _refuse_ranges(notation: Any, located: Sequence[Layer]) -> None:
    """Raises ConfigError where layers are in residual blocks."""
    if located:
        raise tables.ConfigError(
            "",
            notation,
            why="ranges of layers, but the network has residual blocks",
            allowed=f"one ratio each for {', '.join(_stages(located))}, or rules on paths",
        )


def _refuse_stages(notation: Any, layers: Sequence[str]) -> None:
    """Raises ConfigError for layers of a network without residual blocks."""
    if layers:
        raise tables.ConfigError(
            "",
            notation,
            why="one ratio per stage, but no layer is in a residual block",
            allowed=f"ranges of the layers 0 to {len(layers) - 1}, e.g. "
            f"'[0-{len(layers) - 2}:0.5]', rules on paths, or `blocks`",
        )


def _items(notation: str | Sequence) -> list:
    """The entries of "[a, b, ]", "a, b" or a sequence."""
    if not isinstance(notation, Iterable):
        raise tables.ConfigError(
            "", notation, allowed="'[0-4:0.5]', '[0,0.5,0]', or rules on paths"
        )
    if not isinstance(notation, str):
        return list(notation)
    text, inner = notation, notation.strip()
    if inner.startswith("[") != inner.endswith("]"):
        raise tables.ConfigError("", text, why="with one bracket", allowed="'[a, b]' or 'a, b'")
    items = [item.strip() for item in inner.removeprefix("[").removesuffix("]").split(",")]
    if items[-1] == "":
        items.pop()
    if "" in items:
        raise tables.ConfigError("", text, why=f"whose entry {items.index('')} is empty")
    return items


def _ratio(value: Any) -> float:
    try:
        ratio = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        ratio = math.nan
    if not (0 <= ratio < 1 or ratio == masks.AUTOMATIC):
        raise tables.ConfigError(
            "",
            value,
            allowed="the share removed, 0 <= ratio < 1, or -1 to cut at the largest gap of the "
            "scores",
        )
    return ratio


def _by_rule(rules: Sequence, layers: Sequence[str], whole: set[str], granularity: str) -> Table:
    values = []
    for i, rule in enumerate(rules):
        with tables.within(f"[{i}]"):
            values.append(_ratio_of_rule(rule))
    decided = trees.match_rules(
        dict.fromkeys(layers, 0), [(rule[0], i) for i, rule in enumerate(rules)]
    )
    for i, (pattern, _) in enumerate(rules):
        own = {path for path, rule in decided.items() if rule == i}
        if values[i] and own and own <= whole:
            raise tables.ConfigError(
                f"[{i}]",
                pattern,
                why=f"which decides only layers that {granularity} pruning leaves whole: "
                f"{', '.join(own)}",
            )
    return {path: values[decided[path]] for path in layers}


def _ratio_of_rule(rule: Any) -> float:
    if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)):
        raise tables.ConfigError("", rule, allowed="a pair such as ('.*/conv1/.*', 0.5)")
    return _ratio(rule[1])


def _by_range(items: Sequence[str], layers: Sequence[str], reading: str) -> Table:
    table, last = dict.fromkeys(layers, 0.0), len(layers) - 1
    for i, item in enumerate(items):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?\s*:(.*)", item)
        if not match:
            raise tables.ConfigError(
                f"[{i}]", item, allowed="a range of layers such as '0-4:0.5' or '5:0.5'"
            )
        first, end = int(match[1]), int(match[2] or match[1])
        if first > end or (end > last and reading == "correct"):
            raise tables.ConfigError(
                f"[{i}]", item, allowed=f"the layers 0 to {last}, {layers[-1]!r}"
            )
        with tables.within(f"[{i}]"):
            ratio = _ratio(match[3].strip())
        table |= dict.fromkeys(layers[first : end + 1], ratio)
    return table


def _stages(located: Sequence[Layer]) -> list[str]:
    """What a list of ratios is for, in words."""
    last = max(layer.address[0] for layer in located if len(layer.address) > 1)
    return [
        "0 (before the blocks)",
        *(f"{i}" for i in range(1, last + 1)),
        f"{last + 1} (after the blocks)",
    ]


def _by_stage(items: Sequence, located: Sequence[Layer]) -> Table:
    stages = _stages(located)
    if len(items) != len(stages):
        raise tables.ConfigError(
            "",
            items,
            why=f"{len(items)} ratios",
            allowed=f"{len(stages)}, one per stage of the network: {', '.join(stages)}",
        )
    values = []
    for i, item in enumerate(items):
        with tables.within(f"[{i}]"):
            values.append(_ratio(item))
    return {layer.path: values[layer.address[0]] for layer in located}


def _skipped(skip: str | Sequence[str], located: Sequence[Layer], reading: str) -> set[str]:
    residual = any(len(layer.address) > 1 for layer in located)
    result = set()
    for entry in map(str, _items(skip)):
        if not re.fullmatch(r"\d+(\.\d+){0,2}" if residual else r"\d+", entry):
            form = (
                "stage.block.convolution, e.g. '2.3' or '3.0.1'"
                if residual
                else "the number of a layer"
            )
            raise tables.ConfigError("", entry, why="no place in this network", allowed=form)
        parts = tuple(map(int, entry.split(".")))
        if residual and reading == "original":
            own = {
                layer.path
                for layer in located
                if ".".join(map(str, layer.address)).startswith(entry)
            }
        else:
            own = {layer.path for layer in located if layer.address[: len(parts)] == parts}
        if not own and reading == "correct":
            known = " ".join(
                ".".join(map(str, layer.address)) for layer in located if -1 not in layer.address
            )
            raise tables.ConfigError("", entry, why="which matches no layer", allowed=known)
        result |= own
    return result


# Another network's ratios -------------------------------------------------------------------------


def kept_groups(
    given: Mapping[str, Any],
    layers: Sequence[str],
    *,
    granularity: Granularity,
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
    tables.convert(granularity, Granularity, "granularity")
    result = {}
    for path in layers:
        if path not in given:
            raise ValueError(
                f"masks have no {path!r}; they have {list(given)[:5]}.{tables.closest(path, given)}"
            )
        mask = np.asarray(given[path])
        if mask.dtype != bool or mask.ndim == 0 or (mask.ndim == 1 and granularity == "weight"):
            raise ValueError(
                f"the mask of {path!r} is {mask.dtype} {mask.shape}; allowed: bool, True = kept."
            )
        if granularity != "weight" and mask.ndim > 1:
            axes = kernels.axes({path: mask}, [path], layout=layout)[path]
            (axis,) = axes.outputs if granularity == "filter" else axes.inputs
            mask = mask.any(tuple(i for i in range(mask.ndim) if i != axis))
        result[path] = mask
    return result


def inherited(
    given: Mapping[str, Any],
    layers: Sequence[str],
    *,
    granularity: Granularity,
    layout: kernels.Layout | None = None,
) -> Table:
    """The ratios that another pruned network has; arguments and errors as `kept_groups`.

    `masks.num_pruned` of them gives back its counts. Raises ValueError if a layer keeps nothing.
    """
    table = {}
    for path, kept in kept_groups(given, layers, granularity=granularity, layout=layout).items():
        if not kept.any():
            raise ValueError(f"the mask of {path!r} keeps nothing; a ratio below 1 is needed.")
        removed = int((~kept).sum())
        table[path] = removed / kept.size
    return table


# Speed-up -----------------------------------------------------------------------------------------


def by_group(
    channels: groups.Channels,
    table: Mapping[str, float],
    *,
    granularity: Literal["filter", "channel"] = "filter",
) -> Table:
    """The ratios of coupled channels by name of group, from those of the layers that make (channel:
    read) them.

    table: by path in the traced variables, such as params/conv1/kernel; depthwise layers may have
    none, or 0, where the layer before them has one. Groups without a ratio above 0 are left out,
    AUTOMATIC ones stay. Raises ValueError for a path that is no variable, a ratio out of range, one
    for a layer whose channels cannot be removed, and different ratios of layers that share their
    channels.
    """
    tables.convert(granularity, Literal["filter", "channel"], "granularity")
    role = "producer" if granularity == "filter" else "consumer"
    for path, ratio in table.items():
        if path not in channels.shapes:
            raise ValueError(
                f"{path!r} is no variable of the trace.{tables.closest(path, channels.shapes)}"
            )
        if not (0 <= ratio < 1 or ratio == masks.AUTOMATIC):
            raise ValueError(
                f"the ratio of {path!r} is {ratio}; allowed: 0 <= ratio < 1, or -1 for automatic."
            )
    result, left = {}, {path for path, ratio in table.items() if ratio}
    for name, group in channels.groups.items():
        given = [(member, table[member.path]) for member in group.members if member.path in table]
        decides = lambda m, ratio: (
            m.role == role or (granularity == "filter" and m.role == "depthwise" and ratio)
        )
        own = {member.path: ratio for member, ratio in given if decides(member, ratio)}
        if len(set(own.values())) > 1:
            raise ValueError(
                f"the channels {name!r} belong to layers with different ratios: {own}; use one "
                "for all."
            )
        left -= own.keys()
        if any(own.values()):
            result[name] = next(iter(own.values()))
    if left:
        raise ValueError(
            f"no {granularity} of {sorted(left)[0]!r} can be removed; its ratio must be 0."
        )
    return result


def keep_of(
    channels: groups.Channels,
    table: Mapping[str, float],
    *,
    granularity: Literal["filter", "channel"] = "filter",
) -> dict[str, np.ndarray]:
    """A `keep` of every group with `num_pruned` channels less: the lowest go, so it is for counts
    and costs only.

    Arguments and errors as `by_group`; ValueError also for an AUTOMATIC ratio, whose count depends
    on scores.
    """
    found = by_group(channels, table, granularity=granularity)
    for name, ratio in found.items():
        if ratio == masks.AUTOMATIC:
            raise ValueError(
                f"the ratio of {name!r} is automatic: its count is known once there are scores."
            )
    sizes = channels.sizes.items()
    return {
        name: np.arange(size) >= masks.num_pruned(found.get(name, 0.0), size)
        for name, size in sizes
    }


class Speedup(NamedTuple):
    """table: the ratios. factor: of the table that was asked for. speedup: price of the dense
    network over theirs.
    """

    table: Table
    factor: float
    speedup: float


def for_speedup(
    price: Callable[[Table], float],
    target: float,
    table: Mapping[str, float],
    *,
    highest: tables.Fraction = 0.99,
    steps: tables.Count = 10_000,
) -> Speedup:
    """The smallest factor of `table` whose ratios cost at most 1 / `target` of the dense network.

    price: of a table, e.g. FLOPs; it must not rise with any ratio and is called about log2(steps)
    times. table: the proportions between layers, e.g. 1 for each to have one ratio for all; 0 stays
    0. highest: where ratios end. steps: the factor is a whole number over `steps`. Channels are
    whole: the speed-up reached is the least one not below the target. Raises ValueError if even the
    highest ratios do not reach the target, naming what they do.
    """
    highest = tables.convert(highest, tables.Fraction, "highest")
    steps = tables.convert(steps, tables.Count, "steps")
    if highest == 1 or not target >= 1:
        raise ValueError(
            f"target is {target} and highest {highest}; allowed: 1 and above, and below 1."
        )
    if any(ratio < 0 for ratio in table.values()) or not any(table.values()):
        raise ValueError("table holds proportions: 0 and above, not all 0.")
    scaled = lambda i: {path: min(i / steps * ratio, highest) for path, ratio in table.items()}
    dense = price(scaled(0))
    speedup = lambda i: dense / price(scaled(i))
    low, high = 0, math.ceil(highest * steps / min(ratio for ratio in table.values() if ratio))
    if target > speedup(high):
        raise ValueError(
            f"a speed-up of {target} cannot be reached; ratios of {highest} give at most "
            f"{speedup(high):.4g}. Prune "
            "more layers or use a larger `highest`."
        )
    if target <= 1:
        high = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if speedup(middle) >= target else (middle, high)
    return Speedup(scaled(high), high / steps, speedup(high))
