"""Rows to series: the networks that differ in their seed only, and tables of their numbers.

Accuracies and ratios are fractions in [0, 1] throughout and become percentages only where they are
shown.
"""

import collections
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from sparsity_jax.report import runs

NEAR = 0.0015  # a ratio this close to a stop stands for it; nothing is interpolated
TRAINING = ("train", "grow")  # kinds of stages that train
PARTS = ["retrained", "selection", "scope", "stage", "visit"]  # what tells curves of a series apart


class Series(NamedTuple):
    """All rows of one arm at one setting of the swept values; its members differ in their seeds.

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


def labels(grouped: Grouped) -> list[str]:
    """What the series are called."""
    return [one.label for one in grouped]


def number(value: Any) -> float:
    """`value` as a float; anything that is no finite number becomes NaN."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return math.nan


def numbers(rows: Sequence[dict], *fields: str) -> pd.DataFrame:
    """Those fields of every row as numbers, NaN where a row has none."""
    columns = {}
    for field in fields:
        columns[field] = [number(row.get(field)) for row in rows]
    return pd.DataFrame(columns)


def by_member(rows: Sequence[dict], at: str, field: str) -> pd.DataFrame:
    """`field` as [values of `at`, members].

    Of two rows of one member at one place the later one counts.
    """
    frame = numbers(rows, at, field)
    frame["member"] = [member_of(row) for row in rows]
    last = frame.drop_duplicates([at, "member"], keep="last")
    return last.pivot(index=at, columns="member", values=field)


def spread(values: Any) -> tuple[float, float, int]:
    """(mean, sample standard deviation, count) of the numbers among `values`.

    The deviation of one number is 0.
    """
    known = pd.Series(values, dtype=float).dropna()
    mean = float(known.mean())
    if len(known) < 2:
        return mean, 0.0, len(known)
    return mean, float(known.std(ddof=1)), len(known)


def at_ratio(table: pd.DataFrame, stop: float) -> pd.Series:
    """Numbers of every member at the ratio nearest to `stop`; NaN if none is within NEAR."""
    distance = abs(table.index - stop)
    if distance.min() > NEAR:
        return pd.Series(math.nan, table.columns)
    return table.iloc[distance.argmin()]


# ------------------------------------------------------------------------------ which network a
# row is of


def member_of(row: dict) -> str:
    """Identity of the trained network within its series."""
    number = str(row.get("member", 0))
    seeds = sorted(filter(runs.is_seed, row))
    told = [f"{key}={row[key]}" for key in seeds]
    return " ".join([number, *told])


def place_of(row: dict) -> tuple[str, int]:
    """(stage, number of the visit) that a row comes from."""
    return str(row.get("stage")), row.get("visit") or 1


def begins_anew(row: dict, earlier: list[dict]) -> bool:
    """Whether `row` is the first one of a training that begins with the initial weights."""
    if earlier and place_of(earlier[-1]) == place_of(row):
        return False
    return row.get("start") == "init"


def swept_keys(rows: list[dict]) -> list[str]:
    """Names of the swept settings other than seeds that take several values within some arm.

    Settings have dotted names (`fit.optimizer.name`), metrics have not.
    """
    settings = [{key: row[key] for key in row if "." in key} for row in rows]
    frame = pd.DataFrame(settings, dtype=object)
    arms = [str(row.get("arm")) for row in rows]
    keys = []
    for key in sorted(frame):
        texts = frame[key].map(lambda value: json.dumps(value, default=str))
        counts = texts.replace("NaN", "null").groupby(arms).nunique()
        if counts.max() > 1 and not runs.is_seed(key):
            keys.append(key)
    return keys


def group(rows: list[dict]) -> Grouped:
    """Rows by arm and swept values, in order of first appearance; seeds stay together."""
    keys = swept_keys(rows)
    grouped: dict[str, Series] = {}
    lives: dict[str, list[dict]] = {}  # by member, its rows since its weights were drawn
    for row in rows:
        arm = str(row.get("arm", "run"))
        values = {key: row[key] for key in keys if row.get(key) is not None}
        place = json.dumps([arm, values], default=str)
        member = member_of(row)
        if begins_anew(row, lives.get(member, [])):
            lives[member] = []
        life = lives.setdefault(member, [])
        series = grouped.setdefault(place, Series("", [], {}))
        series.before.setdefault(member, list(life))
        series.rows.append(row)
        if row.get("kind") != "curve":
            life.append(row)
    stages = {row.get("stage") for row in rows}
    labelled = []
    for place, series in grouped.items():
        arm, values = json.loads(place)
        others = stages - {row.get("stage") for row in series.rows}
        labelled.append(series._replace(label=label_of(arm, values, keys, others)))
    return labelled


def label_of(arm: str, values: dict, keys: list[str], others: set) -> str:
    """The arm and its swept values.

    The last part of a name says enough, unless it is ambiguous or the setting belongs to a stage of
    another arm. others: these stages.
    """
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    texts = []
    for key, value in values.items():
        last = key.rsplit(".", 1)[-1]
        stage, _, _ = key.partition(".")
        if lasts.count(last) == 1 and stage not in others:
            key = last
        text = value if isinstance(value, str) else json.dumps(value)
        texts.append(f"{key}={text}")
    if not texts:
        return arm
    return f"{arm} ({', '.join(texts)})"


# ------------------------------------------------------------------------------ visits of stages


def visits(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows by the visit of a stage, (its name, number), in the order of the run."""
    result = collections.defaultdict(list)
    for row in rows:
        result[place_of(row)].append(row)
    return dict(result)


def last_visit(rows: list[dict]) -> list[dict]:
    """Rows of the stage and visit that the last one comes from."""
    return [row for row in rows if place_of(row) == place_of(rows[-1])]


def seen_again(grouped: Grouped, *kinds: str) -> str:
    """A sentence for figures that show the last visit only; "" where no stage has another."""
    for one in grouped:
        stages = [stage for stage, _ in visits(one.of_kind(*kinds))]
        if len(set(stages)) < len(stages):
            return " Of several visits of a stage the last one."
    return ""


def trained_rows(series: Series) -> list[dict]:
    """Rows of training, growing penalties or not; epochs of later stages and visits count on."""
    result = []
    ends = collections.Counter[str]()  # by member: the last epoch so far
    for rows in visits(series.of_kind(*TRAINING)).values():
        starts = ends.copy()
        for row in rows:
            if "epoch" in row:
                member = member_of(row)
                epoch = starts[member] + int(row["epoch"])
                ends[member] = max(ends[member], epoch)
                result.append({**row, "epoch": epoch})
    return result


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


def removes_weights(row: dict) -> bool:
    """Whether a row tells what a stage removed, weight by weight."""
    if row.get("kind") == "grow":
        return "layers" in row
    return row.get("kind") in ("prune", "remove")


def removal(row: dict) -> tuple[str, float] | None:
    """(what was removed, its share of all) by a stage that removes something; else None."""
    if row.get("kind") == "cut" and "num_channels" in row:
        return "channels", share_gone(row, "num_channels")
    if not removes_weights(row):
        return None
    gone = share_gone(row)
    if math.isnan(gone):
        gone = number(row.get("sparsity", row.get("ratio")))
    return "weights", gone


# ------------------------------------------------------------------------------ pruning curves


def curves(grouped: Grouped, split: str = "test") -> list[Curve]:
    """Every pruning curve of every series on one split.

    A series with several ways of pruning (retrained, selection, scope, or another stage or visit)
    has one curve each.
    """
    rows_of: dict[tuple, list[dict]] = collections.defaultdict(list)
    for index, one in enumerate(grouped):
        for row in one.of_kind("curve"):
            if row.get("split", "test") != split or "ratio" not in row:
                continue
            told = {**row, "removed": share_removed(row)}
            rows_of[index, *way_of(row)].append(told)
    ways = pd.DataFrame(rows_of.keys(), columns=["series", *PARTS])
    telling = telling_parts(ways)
    ways["variant"] = ways[telling].agg(", ".join, axis=1) if telling else ""
    variants = list(ways.sort_values(PARTS)["variant"].unique())
    result = []
    for key, variant, rows in zip(rows_of, ways["variant"], rows_of.values()):
        dash = variants.index(variant)
        retrained = bool(rows[0].get("retrained"))
        result.append(Curve(key[0], *place_of(rows[0]), variant, dash, retrained, rows))
    return sorted(result, key=lambda curve: (curve.series, curve.dash))


def best_known_curves(grouped: Grouped) -> list[Curve]:
    """Curves on test data; on training data where there are no others."""
    return curves(grouped) or curves(grouped, "train")


def way_of(row: dict) -> tuple[str, ...]:
    """PARTS of a row of a curve, in words."""
    words = [str(row.get(part)) for part in PARTS]
    words[0] = "retrained" if row.get("retrained") else "no retraining"
    words[-1] = f"visit {words[-1]}"
    return tuple(words)


def telling_parts(ways: pd.DataFrame) -> list[str]:
    """The parts that tell curves apart; stage and visit only where the others do not."""
    differing = [part for part in PARTS if ways[part].nunique() > 1]
    telling = [part for part in differing if part not in ("stage", "visit")]
    if ways.duplicated(["series", *telling]).any():
        return differing
    return telling
