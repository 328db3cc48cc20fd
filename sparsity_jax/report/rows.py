"""What one row says: of which network it is, and what was removed from that.

Accuracies and ratios are fractions in [0, 1] throughout and become percentages only where they are
shown.
"""

import math
from typing import Any

from sparsity_jax.report import files
from sparsity_jax.types import Fields, Row, Rows

__all__ = [
    "NEAR",
    "completed",
    "follow",
    "is_seed",
    "member_of",
    "number",
    "place_of",
    "removal",
    "share_removed",
]

NEAR = 0.0015  # a ratio this close to another stands for it; nothing is interpolated


def number(value: Any) -> float:
    """`value` as a float; anything that is no finite number becomes NaN."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return math.nan


def is_seed(key: str) -> bool:
    """Whether a swept value is a seed, to be averaged over: `seed`, or a setting of that name."""
    return key.split(".")[-1] == "seed"


def member_of(row: Row) -> str:
    """Identity of the trained network within its series."""
    seeds = [f" {key}={row[key]}" for key in sorted(filter(is_seed, row))]
    return f"{row.get('member', 0)}{''.join(seeds)}"


def place_of(row: Row) -> tuple[str, int]:
    """(stage, number of the visit) that a row comes from."""
    return str(row.get("stage")), row.get("visit") or 1


def completed(rows: Rows, config: Fields, environment: Fields) -> Rows:
    """`rows` with what their run knows about them besides, unless they say so themselves.

    start: of a training, whether it begins with the initial weights ("init") or the current ones.
    chance: accuracy of always answering the most frequent class. stop_width: of a predicted limit,
    the width of the enclosure that was asked for.
    """
    settings = dict(files.flatten(config))
    result = []
    for row in rows:
        more = {}
        if row.get("kind") == "train":
            more["start"] = settings.get(f"{row.get('stage')}.start")
            more["chance"] = environment.get("chance")
        if row.get("kind") == "width":
            more["stop_width"] = settings.get(f"{row.get('spectrum')}.stop_width")
        result.append({**more, **row})
    return result


# What was removed ---------------------------------------------------------------------------------


def _share_gone(row: Row, total: str = "num_prunable") -> float:
    """Share of what a row counts that is not kept; NaN of a row without counts."""
    whole = number(row.get(total))
    if not whole > 0:
        return math.nan
    return 1 - number(row.get("num_kept")) / whole


def share_removed(row: Row) -> float:
    """Share that a row of a curve really removed: the one asked for, unless counts say another.

    Masks from before a curve, and selections of whole filters, do not allow every share.
    """
    asked = number(row["ratio"])
    gone = _share_gone(row)
    if abs(gone - asked) > NEAR:
        return round(gone, 4)
    return round(asked, 6)


def removal(row: Row) -> tuple[str, float] | None:
    """(what was removed, its share of all) by a stage that removes something; else None."""
    kind = row.get("kind")
    if kind == "cut" and "num_channels" in row:
        return "channels", _share_gone(row, "num_channels")
    if kind == "grow" and "layers" not in row:  # only the last row of a growth removes
        return None
    if kind not in ("prune", "remove", "grow"):
        return None
    gone = _share_gone(row)
    if math.isnan(gone):
        gone = number(row.get("sparsity", row.get("ratio")))
    return "weights", gone


def follow(rows: Rows) -> Rows:
    """Rows with a field `network`: what is known then of the network since its weights were drawn.

    removed: ("weights" or "channels", the share that is gone), if anything was removed. dense,
    pruned: last test accuracy of trainings before and after that. epochs: of the former, by the
    visit of a stage. chance: accuracy of always answering the most frequent class.
    """
    networks: dict[str, Fields] = {}
    result = []
    for row in rows:
        place = place_of(row)
        network = dict(networks.get(member_of(row), {}))
        if row.get("start") == "init" and network.get("place") != place:
            network = {}
        network["place"] = place
        network["removed"] = removal(row) or network.get("removed")
        network["chance"] = row.get("chance", network.get("chance"))
        trains = row.get("kind") == "train"
        if trains and not network["removed"]:
            network["epochs"] = {**network.get("epochs", {}), place: row.get("epoch", 0)}
            network["dense"] = row.get("test_accuracy", network.get("dense"))
        elif network["removed"] and (trains or row.get("kind") == "grow"):
            network["pruned"] = row.get("test_accuracy", network.get("pruned"))
        networks[member_of(row)] = network
        result.append({**row, "network": network})
    return result
