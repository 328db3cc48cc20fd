"""Rows to series, the networks that differ in their seed only, and to frames of their numbers."""

import collections
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd
from pandas import DataFrame as Frame

from sparsity_jax.report.rows import (
    NEAR,
    follow,
    is_seed,
    member_of,
    number,
    place_of,
    share_removed,
)
from sparsity_jax.types import Row, Rows

__all__ = [
    "PLACE",
    "TRAINING",
    "Frame",
    "Grouped",
    "Series",
    "at_ratio",
    "best_known_curves",
    "curves",
    "frame",
    "group",
    "label_of",
    "labels",
    "last_visits",
    "network_name",
    "spread",
    "swept_keys",
]

TRAINING = ("train", "grow")  # kinds of stages that train
PLACE = ["stage", "visit"]
_WAYS = ["retrained", "selection", "scope", *PLACE]  # what tells curves of a series apart
_OF_CURVES = ("ratio", "accuracy", "loss", "sparsity", "sparsity_all", "channels_removed")


class Series(NamedTuple):
    """All rows of one arm at one setting of the swept values; its members differ in their seeds."""

    label: str
    rows: Rows

    def of_kind(self, *kinds: str) -> Rows:
        """Rows of stages of these kinds."""
        return [row for row in self.rows if row.get("kind") in kinds]


Grouped = Sequence[Series]


# Series -------------------------------------------------------------------------------------------


def group(rows: Rows) -> list[Series]:
    """Rows by arm and swept values, in order of first appearance; seeds stay together.

    Each row has what is known of its `network` by then, see `rows.follow`.
    """
    keys = swept_keys(rows)
    by_label: dict[str, Rows] = {}
    for row in follow(rows):
        label = label_of(row, keys)
        by_label.setdefault(label, []).append(row)
    return [Series(label, own) for label, own in by_label.items()]


def swept_keys(rows: Rows) -> list[str]:
    """Names of the swept settings other than seeds that take several values within some arm.

    Settings have dotted names (`fit.optimizer.name`), metrics have not.
    """
    values = collections.defaultdict(set)
    for row in rows:
        for key in row:
            if "." in key and not is_seed(key):
                text = json.dumps(row[key], default=str)
                values[key, row.get("arm")].add(text)
    several = {key for (key, _), texts in values.items() if len(texts) > 1}
    return sorted(several)


def label_of(row: Row, keys: list[str]) -> str:
    """The arm and its swept values, by the last part of their names unless that is ambiguous."""
    lasts = [key.split(".")[-1] for key in keys]
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


def labels(grouped: Grouped) -> list[str]:
    """What the series are called."""
    return [series.label for series in grouped]


def network_name(series: Series, member: str) -> str:
    """What a network is called: its series, and of several networks its seeds, or its number."""
    members = {member_of(row) for row in series.rows}
    number, _, seeds = member.partition(" ")
    if len(members) == 1:
        return series.label
    return f"{series.label}, {seeds or f'network {number}'}"


# Frames -------------------------------------------------------------------------------------------


def frame(grouped: Grouped, *kinds: str, fields: Sequence[str] = ()) -> Frame:
    """A line per row of these kinds, in order: its place among all rows of the series, the index of
    that, member, stage, visit, the row itself, and `fields` of it as numbers, NaN where it has
    none.
    """
    lines = []
    for index, series in enumerate(grouped):
        for place, row in enumerate(series.rows):
            if row.get("kind") in kinds:
                numbers = [number(row.get(field)) for field in fields]
                lines.append((place, index, member_of(row), *place_of(row), row, *numbers))
    columns = ["place", "series", "member", *PLACE, "row", *fields]
    told = pd.DataFrame(lines, columns=columns)
    return told.astype(dict.fromkeys(fields, float))


def last_visits(told: Frame) -> Frame:
    """The lines of a frame that are of the last visit of their stage."""
    last = told.groupby(["series", "member", "stage"])["visit"].transform("max")
    return told[told["visit"] == last]


def spread(values: Iterable) -> tuple[float, float, int]:
    """(mean, sample standard deviation, count) of the numbers among `values`.

    The deviation of one number is 0.
    """
    known = pd.Series(list(values), dtype=float).dropna()
    deviation = known.std(ddof=1) if len(known) > 1 else 0.0
    return float(known.mean()), float(deviation), len(known)


def at_ratio(table: Any, stop: float) -> Any:
    """The line of a frame or series, which has ratios as index, nearest to `stop`; NaN if none is
    near.
    """
    nearest = table.sort_index().reindex([stop], method="nearest", tolerance=NEAR)
    return nearest.iloc[0]


# Pruning curves -----------------------------------------------------------------------------------


def curves(grouped: Grouped, *, split: str = "test") -> Frame:
    """Every row of every pruning curve on one split: a `frame` with OF_CURVES, the share `removed`,
    `retrained`, and what the curve is called.

    A series with several ways of pruning (retrained, selection, scope, or another stage or visit)
    has one curve each. variant: what tells it from others, "" if nothing needs telling; dash: index
    of the variant, the same for all series.
    """
    told = frame(grouped, "curve", fields=_OF_CURVES).dropna(subset="ratio")
    of_split = [row.get("split", "test") == split for row in told["row"]]
    told = told.loc[of_split].copy()
    told["removed"] = told["row"].map(share_removed)
    retrained = [bool(row.get("retrained")) for row in told["row"]]
    told["retrained"] = pd.Series(retrained, told.index, dtype=bool)
    ways = pd.DataFrame(map(_way_of, told["row"]), told.index, _WAYS)
    telling = _telling_parts(ways.assign(series=told["series"]))
    told["variant"] = [", ".join(words) for words in ways[telling].to_numpy()]
    told["dash"], _ = pd.factorize(told["variant"], sort=True)
    line = ["series", "dash", "removed", "member"]
    told = told.drop_duplicates(line, keep="last")
    return told.sort_values(["series", "dash"], kind="stable")


def best_known_curves(grouped: Grouped) -> Frame:
    """Curves on test data; on training data where there are no others."""
    tested = curves(grouped)
    if tested.empty:
        return curves(grouped, split="train")
    return tested


def _way_of(row: Row) -> list[str]:
    """WAYS of a row of a curve, in words."""
    words = [str(row.get(part)) for part in _WAYS]
    words[0] = "retrained" if row.get("retrained") else "no retraining"
    words[-1] = f"visit {words[-1]}"
    return words


def _telling_parts(ways: Frame) -> list[str]:
    """The parts that tell curves apart; stage and visit only where the others do not."""
    differing = [part for part in _WAYS if ways[part].nunique() > 1]
    telling = [part for part in differing if part not in PLACE]
    curves = ways.drop_duplicates()
    needs_place = curves.duplicated(["series", *telling]).any()
    if needs_place:
        return differing
    return telling
