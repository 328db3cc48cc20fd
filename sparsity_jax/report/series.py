"""Rows to series: the networks that differ in their seed only, and tables of their numbers.

Accuracies and ratios are fractions in [0, 1] throughout and become percentages only where they are
shown.
"""

import collections
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from sparsity_jax.report import runs

NEAR = 0.0015  # a ratio this close to a stop stands for it; nothing is interpolated
TRAINING = ("train", "grow")  # kinds of stages that train
PARTS = ("retrained", "selection", "scope", "stage", "visit")  # what tells curves of a series apart


class Series(NamedTuple):
    """All rows of one arm at one setting of the swept values; its members differ in their seeds
    only.

    before: by member, rows of the same network under earlier names, since its weights were drawn.
    """

    label: str
    rows: list[dict]
    before: dict[str, list[dict]]

    def of_kind(self, *kinds: str) -> list[dict]:
        """Rows of stages of these kinds."""
        return [row for row in self.rows if row.get("kind") in kinds]


class Curve(NamedTuple):
    """One way of pruning one series, at every ratio; each row says the share `removed`."""

    series: int  # index of the series
    stage: str
    visit: int
    variant: str  # what tells this curve from others of the series, "" if nothing needs telling
    dash: int  # index of the variant, the same for all series
    retrained: bool
    rows: list[dict]

    def table(self, field: str) -> pd.DataFrame:
        """`field` as [ratios, members], NaN where a member has no number."""
        return by_member(self.rows, "removed", field)


Grouped = list[Series]


def number(value: Any) -> float:
    """`value` as a float; anything that is no finite number becomes NaN."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if known else math.nan


def numbers(rows: list[dict], *fields: str) -> pd.DataFrame:
    """Those fields of every row as numbers, NaN where a row has none."""
    columns = {field: [number(row.get(field)) for row in rows] for field in fields}
    return pd.DataFrame(columns)


def by_member(rows: list[dict], at: str, field: str) -> pd.DataFrame:
    """`field` as [values of `at`, members]; of two rows of one member at one place the later one
    counts.
    """
    frame = numbers(rows, at, field)
    frame["member"] = [member_of(row) for row in rows]
    last = frame.drop_duplicates([at, "member"], keep="last")
    return last.pivot(index=at, columns="member", values=field)


def spread(values: Any) -> tuple[float, float, int]:
    """(mean, sample standard deviation, count) of the numbers among `values`; 0 is the deviation of
    one.
    """
    known = pd.Series(values, dtype=float).dropna()
    deviation = known.std(ddof=1) if len(known) > 1 else 0.0
    return float(known.mean()), float(deviation), len(known)


def at_ratio(table: pd.DataFrame, stop: float) -> pd.Series:
    """Numbers of every member at the ratio nearest to `stop`; NaN if none is within NEAR."""
    distance = abs(table.index - stop)
    if distance.min() > NEAR:
        return pd.Series(math.nan, table.columns)
    return table.iloc[distance.argmin()]


def member_of(row: dict) -> str:
    """Identity of the trained network within its series."""
    seeds = [f"{key}={row[key]}" for key in sorted(row) if runs.is_seed(key)]
    return " ".join([str(row.get("member", 0)), *seeds])


def swept_keys(rows: list[dict]) -> list[str]:
    """Names of the swept settings other than seeds that take several values within some arm.

    Settings have dotted names (`fit.optimizer.name`), metrics have not.
    """
    settings = {key for row in rows for key in row if "." in key and not runs.is_seed(key)}
    values = collections.defaultdict(set)
    for row in rows:
        for key in settings:
            values[key, row.get("arm")].add(json.dumps(row.get(key), default=str))
    return sorted({key for (key, _), seen in values.items() if len(seen) > 1})


def group(rows: list[dict]) -> Grouped:
    """Rows by arm and swept values, in order of first appearance; seeds stay together."""
    keys = swept_keys(rows)
    grouped, lives = {}, {}
    for row in rows:
        values = {key: row[key] for key in keys if row.get(key) is not None}
        place = json.dumps([str(row.get("arm", "run")), values], default=str)
        member = member_of(row)
        if member not in lives or begins_anew(row, lives[member]):
            lives[member] = []
        series = grouped.setdefault(place, Series("", [], {}))
        series.before.setdefault(member, list(lives[member]))
        series.rows.append(row)
        if row.get("kind") != "curve":
            lives[member].append(row)
    stages = {row.get("stage") for row in rows}
    return [
        series._replace(label=label_of(*json.loads(place), series.rows, keys, stages))
        for place, series in grouped.items()
    ]


def label_of(arm: str, values: dict, rows: list[dict], keys: list[str], stages: set) -> str:
    """The arm and its swept values.

    The last part of a name says enough, unless it is ambiguous or the setting belongs to a stage of
    another arm.
    """
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    others = stages - {row.get("stage") for row in rows}
    texts = []
    for key, value in values.items():
        last = key.rsplit(".", 1)[-1]
        short = lasts.count(last) == 1 and key.partition(".")[0] not in others
        text = value if isinstance(value, str) else json.dumps(value)
        texts.append(f"{last if short else key}={text}")
    return f"{arm} ({', '.join(texts)})" if texts else arm


def place_of(row: dict) -> tuple[str, int]:
    """(stage, number of the visit) that a row comes from."""
    return str(row.get("stage")), row.get("visit") or 1


def begins_anew(row: dict, earlier: list[dict]) -> bool:
    """Whether `row` is the first one of a training that begins with the initial weights."""
    same = bool(earlier) and place_of(earlier[-1]) == place_of(row)
    return row.get("start") == "init" and not same


def visits(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows by the visit of a stage, (its name, number), in the order of the run."""
    result = {}
    for row in rows:
        result.setdefault(place_of(row), []).append(row)
    return result


def last_visit(rows: list[dict]) -> list[dict]:
    """Rows of the stage and visit that the last one comes from."""
    return [row for row in rows if place_of(row) == place_of(rows[-1])]


def seen_again(grouped: Grouped, *kinds: str) -> str:
    """A sentence for figures that show the last visit only; "" if no stage of these kinds has
    another.
    """
    places = [set(visits(one.of_kind(*kinds))) for one in grouped]
    several = any(len({stage for stage, _ in own}) < len(own) for own in places)
    return " Of several visits of a stage the last one." if several else ""


def share_gone(row: dict, total: str = "num_prunable") -> float:
    """Share of what a row counts that is not kept; NaN of a row without counts."""
    whole = number(row.get(total))
    return 1 - number(row.get("num_kept")) / whole if whole > 0 else math.nan


def share_removed(row: dict) -> float:
    """Share that a row of a curve really removed: the one asked for, unless counts of weights say
    another.

    Masks from before a curve, and selections of whole filters, do not allow every share.
    """
    asked, gone = number(row["ratio"]), share_gone(row)
    exact = math.isnan(gone) or abs(gone - asked) <= NEAR
    return round(asked, 6) if exact else round(gone, 4)


def removal(row: dict) -> tuple[str, float] | None:
    """(what was removed, its share of all) by a stage that removes something; None for any other
    row.
    """
    kind = row.get("kind")
    if kind == "cut" and "num_channels" in row:
        return "channels", share_gone(row, "num_channels")
    if kind not in ("prune", "remove") and not (kind == "grow" and "layers" in row):
        return None
    gone = share_gone(row)
    told = number(row.get("sparsity", row.get("ratio")))
    return "weights", told if math.isnan(gone) else gone


def curves(grouped: Grouped, split: str = "test") -> list[Curve]:
    """Every pruning curve of every series on one split.

    A series with several ways of pruning (retrained, selection, scope, or another stage or visit)
    has one curve each.
    """
    rows_of = {}
    for index, one in enumerate(grouped):
        for row in one.of_kind("curve"):
            if row.get("split", "test") == split and "ratio" in row:
                variant = (bool(row.get("retrained")), *(str(row.get(part)) for part in PARTS[1:]))
                told = {**row, "removed": share_removed(row)}
                rows_of.setdefault((index, *variant), []).append(told)
    telling = telling_parts(list(rows_of))
    described = {key: describe(key[1:], telling) for key in rows_of}
    names = list(dict.fromkeys(described[key] for key in sorted(rows_of, key=lambda key: key[1:])))
    result = []
    for key, rows in rows_of.items():
        stage, visit = place_of(rows[0])
        name = described[key]
        result.append(Curve(key[0], stage, visit, name, names.index(name), key[1], rows))
    return sorted(result, key=lambda curve: (curve.series, curve.dash))


def best_known_curves(grouped: Grouped) -> list[Curve]:
    """Curves on test data; on training data where there are no others."""
    return curves(grouped) or curves(grouped, "train")


def telling_parts(variants: Iterable[tuple]) -> list[str]:
    """The parts of a variant that tell curves apart; stage and visit only where the others do
    not.
    """
    frame = pd.DataFrame(variants, columns=["series", *PARTS])
    differing = [part for part in PARTS if frame[part].nunique() > 1]
    telling = [part for part in differing if part not in ("stage", "visit")]
    alike = frame.duplicated(["series", *telling]).any()
    return differing if alike else telling


def describe(variant: tuple, telling: list[str]) -> str:
    """What tells this way of pruning from others."""
    words = dict(zip(PARTS, variant, strict=True))
    words["visit"] = f"visit {words['visit']}"
    words["retrained"] = "retrained" if words["retrained"] else "no retraining"
    return ", ".join(words[part] for part in telling)


def trained_rows(series: Series) -> list[dict]:
    """Rows of training, growing penalties or not; epochs of later stages and visits count on."""
    result, progress = [], {}
    for row in series.of_kind(*TRAINING):
        if "epoch" not in row:
            continue
        member, place = member_of(row), place_of(row)
        current, start, last = progress.get(member, (place, 0, 0))
        if place != current:
            start = last
        epoch = start + int(row["epoch"])
        progress[member] = (place, start, max(last, epoch))
        result.append({**row, "epoch": epoch})
    return result
