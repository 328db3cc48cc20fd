"""Rows to series, the networks that differ in their seed only, and to frames of their numbers.

Accuracies and ratios are fractions in [0, 1] throughout and become percentages only where they are
shown.
"""

import collections
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from pandas import DataFrame as Frame

from sparsity_jax.report import runs
from sparsity_jax.report.files import Rows

NEAR = 0.0015  # a ratio this close to a stop stands for it; nothing is interpolated
TRAINING = ("train", "grow")  # kinds of stages that train
PLACE = ["stage", "visit"]
WAYS = ["retrained", "selection", "scope", *PLACE]  # what tells curves of a series apart
OF_CURVES = ("accuracy", "loss", "sparsity", "sparsity_all", "channels_removed")


class Series(NamedTuple):
    """All rows of one arm at one setting of the swept values; its members differ in their seeds."""

    label: str
    rows: Rows

    def of_kind(self, *kinds: str) -> Rows:
        """Rows of stages of these kinds."""
        return [row for row in self.rows if row.get("kind") in kinds]


Grouped = Sequence[Series]


def labels(grouped: Grouped) -> dict[int, str]:
    """What the series are called, by index."""
    return dict(enumerate(series.label for series in grouped))


def number(value: Any) -> float:
    """`value` as a float; anything that is no finite number becomes NaN."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return math.nan


def numbers(rows: Collection[Mapping], *fields: str) -> Frame:
    """Those fields of every row as numbers, NaN where a row has none."""
    columns = {}
    for field in fields:
        columns[field] = [number(row.get(field)) for row in rows]
    return pd.DataFrame(columns, range(len(rows)))


def frame(grouped: Grouped, *kinds: str, fields: Sequence[str] = ()) -> Frame:
    """A line per row of these kinds, in order: index of its series, member, stage, visit, the row
    itself, and `fields` of it as numbers. place: among all rows of the series.
    """
    about = []
    for index, series in enumerate(grouped):
        for place, row in enumerate(series.rows):
            if row.get("kind") in kinds:
                stage, visit = place_of(row)
                about.append((place, index, member_of(row), stage, visit, row))
    columns = ["place", "series", "member", "stage", "visit", "row"]
    told = pd.DataFrame(about, columns=columns)
    return told.join(numbers(told["row"], *fields))


def last_visits(told: Frame) -> Frame:
    """The lines of a frame that are of the last visit of their stage."""
    last = told.groupby(["series", "member", "stage"])["visit"].transform("max")
    return told[told["visit"] == last]


def spread(values: Any) -> tuple[float, float, int]:
    """(mean, sample standard deviation, count) of the numbers among `values`.

    The deviation of one number is 0.
    """
    known = pd.Series(values, dtype=float).dropna()
    deviation = known.std(ddof=1) if len(known) > 1 else 0.0
    mean = float(known.mean())
    return mean, float(deviation), len(known)


def at_ratio(table: Frame, stop: float) -> pd.Series:
    """The line of `table`, which has ratios as index, nearest to `stop`; NaN if none is near."""
    nearest = table.reindex([stop], method="nearest", tolerance=NEAR)
    return nearest.iloc[0]


# ------------------------------------------------------------------------------ which network a
# row is of


def member_of(row: dict) -> str:
    """Identity of the trained network within its series."""
    seeds = sorted(filter(runs.is_seed, row))
    told = [f"{key}={row[key]}" for key in seeds]
    return " ".join([str(row.get("member", 0)), *told])


def place_of(row: dict) -> tuple[str, int]:
    """(stage, number of the visit) that a row comes from."""
    return str(row.get("stage")), row.get("visit") or 1


def swept_keys(rows: Rows) -> list[str]:
    """Names of the swept settings other than seeds that take several values within some arm.

    Settings have dotted names (`fit.optimizer.name`), metrics have not.
    """
    values = collections.defaultdict(set)
    for row in rows:
        for key in row:
            if "." in key and not runs.is_seed(key):
                text = json.dumps(row[key], default=str)
                values[key, row.get("arm")].add(text)
    several = {key for (key, _), texts in values.items() if len(texts) > 1}
    return sorted(several)


def group(rows: Rows) -> list[Series]:
    """Rows by arm and swept values, in order of first appearance; seeds stay together.

    Each row has what is known of its `network` by then, see `follow`.
    """
    keys = swept_keys(rows)
    grouped: dict[str, Rows] = {}
    for row in follow(rows):
        label = label_of(row, keys)
        grouped.setdefault(label, []).append(row)
    return list(itertools.starmap(Series, grouped.items()))


def label_of(row: dict, keys: list[str]) -> str:
    """The arm and its swept values, by the last part of their names unless that is ambiguous."""
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    texts = []
    for key, last in zip(keys, lasts):
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            value = json.dumps(value, default=str)
        name = last if lasts.count(last) == 1 else key
        texts.append(f"{name}={value}")
    arm = str(row.get("arm", "run"))
    if not texts:
        return arm
    return f"{arm} ({', '.join(texts)})"


def follow(rows: Rows) -> Rows:
    """Rows with a field `network`: what is known then of the network since its weights were drawn.

    removed: ("weights" or "channels", the share that is gone), if anything was removed. dense,
    pruned: last test accuracy of trainings before and after that. epochs: of the former, by the
    visit of a stage. chance: accuracy of always answering the most frequent class.
    """
    networks: dict[str, dict] = {}
    told = []
    for row in rows:
        place = place_of(row)
        network = dict(networks.get(member_of(row), {}))
        if row.get("start") == "init" and network.get("place") != place:
            network = {}
        network["place"] = place
        network["chance"] = row.get("chance", network.get("chance"))
        removed = removal(row) or network.get("removed")
        kind, accuracy = row.get("kind"), row.get("test_accuracy")
        if kind == "train" and not removed:
            epochs = network.get("epochs", {})
            network["epochs"] = {**epochs, place: row.get("epoch", 0)}
        trains = kind == "train" or (kind == "grow" and removed)
        if trains and accuracy is not None:
            name = "pruned" if removed else "dense"
            network[name] = accuracy
        network["removed"] = removed
        networks[member_of(row)] = network
        told.append({**row, "network": network})
    return told


# ------------------------------------------------------------------------------ what was removed


def share_gone(row: dict, total: str = "num_prunable") -> float:
    """Share of what a row counts that is not kept; NaN of a row without counts."""
    whole = number(row.get(total))
    if not whole > 0:
        return math.nan
    return 1 - number(row.get("num_kept")) / whole


def share_removed(row: dict) -> float:
    """Share that a row of a curve really removed: the one asked for, unless counts say another.

    Masks from before a curve, and selections of whole filters, do not allow every share.
    """
    asked = number(row["ratio"])
    gone = share_gone(row)
    if abs(gone - asked) > NEAR:
        return round(gone, 4)
    return round(asked, 6)


def removal(row: dict) -> tuple[str, float] | None:
    """(what was removed, its share of all) by a stage that removes something; else None."""
    kind = row.get("kind")
    if kind == "cut" and "num_channels" in row:
        return "channels", share_gone(row, "num_channels")
    ends_growth = kind == "grow" and "layers" in row
    if kind not in ("prune", "remove") and not ends_growth:
        return None
    gone = share_gone(row)
    if math.isnan(gone):
        gone = number(row.get("sparsity", row.get("ratio")))
    return "weights", gone


# ------------------------------------------------------------------------------ pruning curves


def curves(grouped: Grouped, split: str = "test") -> Frame:
    """Every row of every pruning curve on one split: a `frame` with OF_CURVES, the share `removed`,
    `retrained`, and what the curve is called.

    A series with several ways of pruning (retrained, selection, scope, or another stage or visit)
    has one curve each. variant: what tells it from others, "" if nothing needs telling; dash: index
    of the variant, the same for all series.
    """
    told = frame(grouped, "curve", fields=OF_CURVES)
    splits = [row.get("split", "test") if "ratio" in row else "" for row in told["row"]]
    wanted = [own == split for own in splits]
    told = told.loc[wanted].copy()
    told["removed"] = told["row"].map(share_removed)
    retrained = [bool(row.get("retrained")) for row in told["row"]]
    told["retrained"] = pd.Series(retrained, told.index, dtype=bool)
    ways = pd.DataFrame(map(way_of, told["row"]), told.index, WAYS)
    different = ways.assign(series=told["series"]).drop_duplicates()
    telling = telling_parts(different)
    told["variant"] = list(map(", ".join, ways[telling].to_numpy()))
    ordered = ways.sort_values(WAYS, kind="stable").index
    variants = list(told["variant"].loc[ordered].unique())
    told["dash"] = told["variant"].map(variants.index)
    place = ["series", "dash", "removed", "member"]
    told = told.drop_duplicates(place, keep="last")
    return told.sort_values(["series", "dash"], kind="stable")


def best_known_curves(grouped: Grouped) -> Frame:
    """Curves on test data; on training data where there are no others."""
    tested = curves(grouped)
    if tested.empty:
        return curves(grouped, "train")
    return tested


def way_of(row: dict) -> list[str]:
    """WAYS of a row of a curve, in words."""
    words = [str(row.get(part)) for part in WAYS]
    words[0] = "retrained" if row.get("retrained") else "no retraining"
    words[-1] = f"visit {words[-1]}"
    return words


def telling_parts(ways: Frame) -> list[str]:
    """The parts that tell curves apart; stage and visit only where the others do not."""
    differing = [part for part in WAYS if ways[part].nunique() > 1]
    telling = [part for part in differing if part not in PLACE]
    needs_place = ways.duplicated(["series", *telling]).any()
    if needs_place:
        return differing
    return telling
