"""The geometric limit of sparsity as numbers: predicted and actual limits of every network.

Rows are those of the stages limit, path, row_norms, spectrum and width, and of curves; see
`geometry`.
"""

import collections
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sparsity_jax.report import runs, series
from sparsity_jax.report.sections import (
    MOST_LINES,
    Cell,
    Cells,
    Section,
    Table,
    filled,
    headings,
    joined,
    mean_cell,
    only_first,
)
from sparsity_jax.report.series import Grouped, member_of, number, numbers

WIDE = 1.0  # an enclosure of more points than this is called so where the config asks for nothing
STEEP = 0.5  # share of ε that the gradient may change the loss by before a prediction is cautioned
KINDS = {"limit", "path", "row_norms", "width"}  # of rows that make a network one of these here
OPERATORS = {
    "hessian": "Hessian",
    "gauss_newton": "Gauss-Newton",
    "absolute": "absolute Hessian",
}
RULES = {  # definitions of "nothing is lost", as `geometry.CRITERIA` names them
    "accuracy": "{split} accuracy not below dense",
    "better_accuracy": "{split} accuracy above dense, as the original",
    "accuracy_within": "{split} accuracy at most {points} below dense",
    "loss_within": "{split} loss at most {epsilon} above dense",
}


class Network(NamedTuple):
    """What the rows say about one trained network.

    label: "" if there is only one. rows: of the last visit of every stage; predictions, those of
    width stages, have a `name` and a `color`, for colour 0 is the network. curves: by split,
    accuracy and loss by ratio, without retraining.
    """

    label: str
    rows: list[dict]
    curves: dict[str, pd.DataFrame]

    def of_kind(self, kind: str) -> list[dict]:
        """Rows of stages of that kind."""
        return [row for row in self.rows if row.get("kind") == kind]

    def predictions(self) -> list[dict]:
        """The row of each width stage."""
        return self.of_kind("width")

    def limits(self) -> dict[str, dict]:
        """The result of each limit stage, by its name."""
        rows = self.of_kind("limit")
        return {row["stage"]: row for row in rows if row.get("phase") == "result"}

    def actual(self) -> dict[str, float]:
        """The actual limit by every definition: of width stages, and limit stages by their name."""
        known: dict[str, Any] = {}
        for row in self.predictions():
            known |= row.get("actual") or {}
        known |= {stage: row["limit"] for stage, row in self.limits().items()}
        return pd.Series(known, dtype=float).dropna().to_dict()

    def main_limits(self) -> dict[str, float]:
        """The actual limits to mark: of limit stages, else by accuracy, on test data if known."""
        actual = self.actual()
        names = [name for name in actual if name.split(" ")[0] not in ("test", "train")]
        usual = ("test accuracy", "train accuracy")
        names = names or [name for name in usual if name in actual][:1]
        return {name: actual[name] for name in names}


Networks = list[Network]


def networks(grouped: Grouped) -> Networks:
    """All networks that have rows of a limit, path, row_norms or width stage."""
    found = []
    about = predictions_of(grouped)
    for one in grouped:
        members: dict[str, list[dict]] = {}
        for row in one.rows:
            told = about[row["stage"]] if row.get("kind") == "width" else {}
            members.setdefault(member_of(row), []).append({**row, **told})
        for own in members.values():
            last = {stage: rows for (stage, _), rows in series.visits(own).items()}
            rows = list(itertools.chain(*last.values()))
            if KINDS & {row.get("kind") for row in rows}:
                name = seed_of(own) if len(members) > 1 else ""
                label = joined(one.label if len(grouped) > 1 else "", name)
                found.append(Network(label, rows, last_curves(rows)))
    return found


def predictions_of(grouped: Grouped) -> dict[str, dict]:
    """`name` and `color` of the predictions by stage: the operator, and the stage if repeated."""
    operators: dict[str, str] = {}
    for one in grouped:
        for row in one.of_kind("width"):
            operators.setdefault(row["stage"], row.get("operator", ""))
    repeats = collections.Counter(operators.values())
    about = {}
    for color, (stage, operator) in enumerate(operators.items(), start=1):
        name = joined(OPERATORS.get(operator, operator), stage if repeats[operator] > 1 else "")
        about[stage] = {"name": name, "color": color}
    return about


def seed_of(rows: list[dict]) -> str:
    """Name of a network among those of its series."""
    seeds = [row[key] for row in rows for key in row if runs.is_seed(key)]
    return f"seed {seeds[0]}" if seeds else f"network {rows[0].get('member', 0)}"


def last_curves(rows: list[dict]) -> dict[str, pd.DataFrame]:
    """Accuracy and loss by ratio, without retraining, by split."""
    plain = [row for row in rows if row.get("kind") == "curve" and "ratio" in row]
    plain = [row for row in plain if not row.get("retrained")]
    table = numbers(plain, "accuracy", "loss")
    table["ratio"] = list(map(series.share_removed, plain))
    splits = [row.get("split", "test") for row in plain]
    by_split = table.groupby(splits, sort=False)
    return {split: own.groupby("ratio").last() for split, own in by_split}


def definitions(found: Networks) -> list[str]:
    """Names of all definitions that some network has an actual limit by: test, train, stages."""
    order = [f"{split} {rule}" for split in ("test", "train") for rule in RULES]
    names = list(dict.fromkeys(name for network in found for name in network.actual()))
    usual = [name for name in order if name in names]
    return usual + [name for name in names if name not in order]


def definition(name: str, found: Networks) -> str:
    """What the definition `name` of an actual limit means."""
    split, _, rule = name.partition(" ")
    if rule in RULES:
        rows = [row for network in found for row in network.predictions()]
        tolerance = number(rows[0].get("tolerance")) if rows else math.nan
        return rule_text(rule, split, tolerance, "ε")
    rows = [network.limits()[name] for network in found if name in network.limits()]
    if not rows:
        return "by bisection, in the run this one started from"
    tolerance = number(rows[0].get("tolerance"))
    split = rows[0].get("split", "test")
    text = rule_text(rows[0].get("criterion", ""), split, tolerance, f"{tolerance:g}")
    return f"{text}, by bisection"


def rule_text(rule: str, split: str, tolerance: float, epsilon: str) -> str:
    """A rule in words."""
    points = "the tolerance" if math.isnan(tolerance) else f"{100 * tolerance:g} points"
    return RULES.get(rule, str(split)).format(split=split, points=points, epsilon=epsilon)


class Gap(NamedTuple):
    """A prediction against one definition of the actual limit, over the networks that have both."""

    mean: float  # predicted less actual
    std: float
    networks: int
    inside: int  # networks whose interval contains the actual limit


def gap(found: Networks, stage: str, name: str) -> Gap | None:
    """How far the predictions of a stage are from the actual limits; None without any pair."""
    differences, inside = [], 0
    for network in found:
        limit = network.actual().get(name)
        for row in network.predictions():
            if row["stage"] == stage and limit is not None:
                differences.append(row["predicted"] - limit)
                inside += row["low"] <= limit <= row["high"]
    return Gap(*series.spread(differences), inside) if differences else None


# -------------------------------------------------------------------------------- in plain words


def by_stage(found: Networks) -> dict[str, list[dict]]:
    """Rows of all networks by the stage that predicts."""
    rows_of: dict[str, list[dict]] = {}
    for network in found:
        for row in network.predictions():
            rows_of.setdefault(row["stage"], []).append(row)
    return rows_of


def verdicts(found: Networks) -> list[tuple[str, str, str]]:
    """Per prediction (its name, how far it is from the actual limit, what stands against it)."""
    limits = [name for network in found for name in network.main_limits()]
    result = []
    for stage, rows in by_stage(found).items():
        name = rows[0]["name"]
        table = numbers(
            rows, "predicted", "num_matvecs", "stop_width", "enclosure_low", "enclosure_high"
        )
        text = f"{table['predicted'].mean():.2%} predicted"
        if len(rows) > 1:
            text += f" (mean of {len(rows)} networks)"
        told = gap(found, stage, limits[0]) if limits else None
        if told is not None:
            text += distance_text(told, definition(limits[0], found))
        narrow, caution = enclosure_text(table)
        caution += gradient_text(found, stage)
        result.append((name[:1].upper() + name[1:], f"{text}{narrow}.", caution.strip()))
    return result


def distance_text(told: Gap, defined: str) -> str:
    """How far predictions are from the actual limit."""
    side = "above" if told.mean >= 0 else "below"
    points = 100 * abs(told.mean)
    place = "inside" if told.inside else "outside"
    of_all = f" of {told.inside} of {told.networks}" if told.networks > 1 else ""
    place = "inside" if of_all else place
    return (
        f", {points:.2f} points {side} the actual limit ({defined}), which is {place} the "
        f"interval{of_all}"
    )


def enclosure_text(rows: pd.DataFrame) -> tuple[str, str]:
    """(praise, caution) for the widest enclosure of a prediction, one of them empty."""
    products = int(rows["num_matvecs"].max())
    asked = 100 * rows["stop_width"].fillna(0.0).iloc[0]
    wide = 100 * (rows["enclosure_high"] - rows["enclosure_low"]).max()
    if math.isnan(wide):
        return "", (
            "No enclosure: with negative values clipped nothing bounds the error left after "
            f"{products} products; only the history shows whether it has settled."
        )
    if wide > (asked or WIDE):
        wanted = f" ({asked:.2g} were asked for)" if asked else ""
        return "", (
            f"Not narrow enough: after {products} products the enclosure is {wide:.2g} points wide"
            f"{wanted}; any value in it is possible, and more products narrow it."
        )
    narrower = f", narrower than the {asked:.2g} asked for" if asked else ""
    return f". The enclosure is {wide:.2g} points wide after {products} products{narrower}", ""


def gradient_text(found: Networks, stage: str) -> str:
    """A caution where the gradient, which predictions leave out, changes the loss; else ""."""
    slopes = []
    for network in found:
        path = numbers(network.of_kind("path"), "ratio", "first_order").sort_values("ratio")
        for row in network.predictions():
            if row["stage"] == stage and path.size:
                nowhere = dict(left=math.nan, right=math.nan)
                first = np.interp(row["predicted"], path["ratio"], path["first_order"], **nowhere)
                slopes.append((first, number(row["epsilon"])))
    table = pd.DataFrame(slopes, columns=["first", "epsilon"]).dropna()
    steepness = abs(table["first"]) / table["epsilon"]
    if not (steepness > STEEP).any():
        return ""
    first, epsilon = table.loc[steepness.idxmax()]
    side = "larger" if first < 0 else "smaller"
    worst = " (the worst network)" if len(table) > 1 else ""
    return (
        f" The gradient, which the prediction leaves out, changes the loss by {first:+.2g} on the "
        f"way there, beside an ε of {epsilon:.2g}{worst}: expect a {side} actual limit."
    )


# ------------------------------------------------------------------------------------ the section

COLUMNS = {  # of one prediction
    "predicted|%": "{predicted:.2%}",
    "interval|%": "{low:.2%}–{high:.2%}",
    "enclosure|%": "{enclosure_low:.2%}–{enclosure_high:.2%}",
    "± probes": "{standard_error:.2%}",
    "± ε": "{epsilon_error:.2%}",
    "ε": "{epsilon:.3g}",
    "probes × products": "{num_probes} × {num_matvecs}",
    "share without curvature|%": "{zero_share:.1%}",
    "weight below 0|%": "{negative_mass:.1%}",
    "on the original's grid|%": "{predicted_on_grid:.1%}",
}


def prediction(grouped: Grouped) -> Section | None:
    """Predictions, then every definition of the actual limit and how far off they are."""
    found = networks(grouped)
    statements = verdicts(found)
    tables = [prediction_table(found)] if statements else []
    if definitions(found):
        tables.append(actual_table(found))
    heading = "Predicted and actual limit"
    return Section(heading, statements=statements, tables=tables) if tables else None


def prediction_table(found: Networks) -> Table:
    """One line per prediction and network."""
    heads: Cells = ["prediction", "network"] if len(found) > 1 else ["prediction"]
    words = tuple(range(len(heads)))
    lines = []
    for network in found:
        for row in network.predictions():
            about: Cells = [Cell(row["name"], color=row["color"]), network.label]
            lines.append(about[: len(heads)] + filled(COLUMNS, row))
    note = (
        "Interval: the enclosure, or the prediction alone, widened by two deviations (±) of probes "
        f"and ε.{only_first(MOST_LINES, len(lines), '')}"
    )
    return Table([*heads, *headings(COLUMNS)], lines[:MOST_LINES], words, note)


def actual_table(found: Networks) -> Table:
    """One line per definition: the actual limit, and how far every prediction is from it."""
    heads: Cells = ["nothing is lost if", Cell("actual", "%")]
    stages = by_stage(found)
    for row, *_ in stages.values():
        heads.append(Cell(f"{row['name']} less actual", "points", color=row["color"]))
    lines = []
    for name in definitions(found):
        limits = series.spread([network.actual().get(name) for network in found])
        gaps = [gap_cell(gap(found, stage, name)) for stage in stages]
        lines.append([definition(name, found), mean_cell(*limits), *gaps])
    note = "Bold: inside the interval."
    if len(found) > 1:
        note = (
            "Means ± sample standard deviation over networks. Bold: inside the interval of every "
            "network."
        )
    remarks = []
    for network in found[:MOST_LINES]:
        for stage, row in network.limits().items():
            name = joined(network.label, stage)
            remarks.append(f"{name}: {row.get('how')}; {row.get('evaluations')} evaluations.")
    return Table(heads, lines, note=note, remarks=tuple(remarks))


def gap_cell(told: Gap | None) -> Cell | str:
    """Predicted less actual; bold where the actual limit is inside every interval."""
    if told is None:
        return "–"
    text, deviation, *_ = mean_cell(told.mean, told.std, told.networks, "+.2f")
    bold = told.inside == told.networks
    return Cell(text.replace("-", "−"), deviation, bold)
