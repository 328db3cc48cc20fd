"""The geometric limit of sparsity as numbers: predicted and actual limits of every network.

Rows are those of the stages limit, path, row_norms, spectrum and width, and of curves; see
`geometry`.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsity_jax.report import runs, sections, series
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import Grouped, member_of, number, numbers

WIDE = 1.0  # an enclosure of more points than this is called so where the config asks for nothing
STEEP = 0.5  # share of ε that the gradient may change the loss by before a prediction is cautioned
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
    """What the rows say about one trained network. Of several visits of a stage the last counts."""

    label: str  # "" if there is only one network
    rows: dict[str, list[dict]]  # by kind
    limits: dict[str, dict]  # result of each limit stage
    predictions: dict[str, dict]  # row of each width stage
    curves: dict[str, pd.DataFrame]  # by split: accuracy and loss by ratio, without retraining

    def of_kind(self, kind: str) -> list[dict]:
        """Rows of stages of that kind."""
        return self.rows.get(kind, [])


Networks = list[Network]
Names = dict[str, str]  # of predictions, by the stage that makes them


def networks(grouped: Grouped) -> Networks:
    """All networks that have rows of a limit, path, row_norms or width stage."""
    result = []
    several = len(grouped) > 1
    for one in grouped:
        by_member = {}
        for row in one.rows:
            by_member.setdefault(member_of(row), []).append(row)
        for rows in by_member.values():
            network = network_of(rows)
            if set(network.rows) & {"limit", "path", "row_norms", "width"}:
                name = seed_of(rows) if len(by_member) > 1 else ""
                label = sections.name(one.label if several else "", name)
                result.append(network._replace(label=label))
    return result


def seed_of(rows: list[dict]) -> str:
    """Name of a network among those of its series."""
    seeds = [row[key] for row in rows for key in row if runs.is_seed(key)]
    return f"seed {seeds[0]}" if seeds else f"network {rows[0].get('member', 0)}"


def network_of(rows: list[dict]) -> Network:
    """The network of these rows."""
    last = {stage: own for (stage, _), own in series.visits(rows).items()}
    by_kind = {}
    for own in last.values():
        for row in own:
            by_kind.setdefault(row.get("kind"), []).append(row)
    limits = [row for row in by_kind.get("limit", []) if row.get("phase") == "result"]
    return Network(
        "",
        by_kind,
        {row["stage"]: row for row in limits},
        {row["stage"]: row for row in by_kind.get("width", [])},
        last_curves(by_kind.get("curve", [])),
    )


def last_curves(rows: list[dict]) -> dict[str, pd.DataFrame]:
    """Accuracy and loss by ratio, without retraining, by split."""
    by_split = {}
    for row in rows:
        if not row.get("retrained") and "ratio" in row:
            by_split.setdefault(row.get("split", "test"), []).append(row)
    result = {}
    for split, own in by_split.items():
        table = numbers(own, "accuracy", "loss")
        table.index = list(map(series.share_removed, own))
        result[split] = table.groupby(level=0).last()
    return result


def prediction_names(found: Networks) -> Names:
    """What each width stage is called: its operator, and its own name where operators repeat."""
    rows = {stage: row for network in found for stage, row in network.predictions.items()}
    operators = {stage: row.get("operator", "") for stage, row in rows.items()}
    names = {}
    for stage, operator in operators.items():
        repeated = list(operators.values()).count(operator) > 1
        names[stage] = sections.name(OPERATORS.get(operator, operator), stage if repeated else "")
    return names


def actual(network: Network) -> dict[str, float]:
    """The actual limit by every definition: those of width stages, and limit stages by their
    name.
    """
    known = {}
    for row in network.predictions.values():
        known |= row.get("actual") or {}
    known |= {stage: row["limit"] for stage, row in network.limits.items()}
    numbers = {name: number(value) for name, value in known.items()}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def definitions(found: Networks) -> list[str]:
    """Names of all definitions that some network has an actual limit by: test, train, then
    stages.
    """
    order = [f"{split} {rule}" for split in ("test", "train") for rule in RULES]
    names = list(dict.fromkeys(name for network in found for name in actual(network)))
    usual = [name for name in order if name in names]
    return usual + [name for name in names if name not in order]


def main_limits(network: Network) -> dict[str, float]:
    """The actual limits to mark: those of limit stages, else one by accuracy, on the test set if
    known.
    """
    known = actual(network)
    usual = ("test accuracy", "train accuracy")
    names = [name for name in known if name.split(" ")[0] not in ("test", "train")]
    names = names or [name for name in usual if name in known][:1]
    return {name: known[name] for name in names}


def definition(name: str, found: Networks) -> str:
    """What the definition `name` of an actual limit means."""
    split, _, rule = name.partition(" ")
    if rule in RULES:
        rows = [row for network in found for row in network.predictions.values()]
        tolerances = [number(row.get("tolerance")) for row in rows]
        return rule_text(rule, split, *tolerances[:1], epsilon="ε")
    rows = [network.limits[name] for network in found if name in network.limits]
    if not rows:
        return "by bisection, in the run this one started from"
    tolerance = number(rows[0].get("tolerance"))
    text = rule_text(
        rows[0].get("criterion"), rows[0].get("split", "test"), tolerance, epsilon=f"{tolerance:g}"
    )
    return f"{text}, by bisection"


def rule_text(rule: str, split: str, tolerance: float = math.nan, *, epsilon: str) -> str:
    """A rule in words."""
    points = "the tolerance" if math.isnan(tolerance) else f"{100 * tolerance:g} points"
    return RULES.get(rule, str(split)).format(split=split, points=points, epsilon=epsilon)


class Gap(NamedTuple):
    """A prediction against one definition of the actual limit, over the networks that have both."""

    mean: float  # predicted less actual
    std: float
    count: int
    inside: int  # networks whose interval contains the actual limit


def gap(found: Networks, stage: str, name: str) -> Gap | None:
    """How far the predictions of a stage are from the actual limits; None without any pair."""
    differences, inside = [], 0
    for network in found:
        row = network.predictions.get(stage)
        limit = actual(network).get(name)
        if row and limit is not None:
            differences.append(row["predicted"] - limit)
            inside += row["low"] <= limit <= row["high"]
    return Gap(*series.spread(differences), inside) if differences else None


# ------------------------------------------------------------------------------------ in plain
# words


def verdicts(found: Networks, names: Names) -> list[tuple[str, str, str]]:
    """(prediction, how far it is from the actual limit, what stands against trusting it) of
    each.
    """
    limits = [name for network in found for name in main_limits(network)]
    result = []
    for stage, name in names.items():
        rows = [network.predictions[stage] for network in found if stage in network.predictions]
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
    of_all = f" of {told.inside} of {told.count}" if told.count > 1 else ""
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
    """A caution where the gradient, which predictions leave out, changes the loss; "" if it does
    not.
    """
    slopes = pd.DataFrame(
        [slope(network, stage) for network in found], columns=["first", "epsilon"]
    )
    slopes = slopes.dropna()
    steepness = abs(slopes["first"]) / slopes["epsilon"]
    if not (steepness > STEEP).any():
        return ""
    first, epsilon = slopes.loc[steepness.idxmax()]
    side = "larger" if first < 0 else "smaller"
    worst = " (the worst network)" if len(slopes) > 1 else ""
    return (
        f" The gradient, which the prediction leaves out, changes the loss by {first:+.2g} on the "
        "way "
        f"there, beside an ε of {epsilon:.2g}{worst}: expect a {side} actual limit."
    )


def slope(network: Network, stage: str) -> tuple[float, float]:
    """(first-order change of the loss by pruning to the predicted ratio, ε); NaN where not
    measured.
    """
    row = network.predictions.get(stage)
    path = numbers(network.of_kind("path"), "ratio", "first_order").sort_values("ratio")
    if not row or path.empty:
        return math.nan, math.nan
    nowhere = dict(left=math.nan, right=math.nan)
    first = np.interp(row["predicted"], path["ratio"], path["first_order"], **nowhere)
    return float(first), number(row["epsilon"])


# ---------------------------------------------------------------------------------------- the
# section

COLUMNS = {  # of one prediction
    "predicted": "{predicted:.2%}",
    "interval": "{low:.2%}–{high:.2%}",
    "enclosure": "{enclosure_low:.2%}–{enclosure_high:.2%}",
    "± probes": "{standard_error:.2%}",
    "± ε": "{epsilon_error:.2%}",
    "ε": "{epsilon:.3g}",
    "probes × products": "{num_probes} × {num_matvecs}",
    "share without curvature": "{zero_share:.1%}",
    "weight below 0": "{negative_mass:.1%}",
    "on the original's grid": "{predicted_on_grid:.1%}",
}


def prediction(grouped: Grouped) -> Section | None:
    """Predictions, then every definition of the actual limit and how far off they are."""
    found = networks(grouped)
    names = prediction_names(found)
    tables = [prediction_table(found, names)] if names else []
    if definitions(found):
        tables.append(actual_table(found, names))
    statements = verdicts(found, names)
    heading = "Predicted and actual limit"
    return Section(heading, statements=statements, tables=tables) if tables else None


def colors(names: Names) -> dict[str, int]:
    """Colour of each prediction; 0 is the network itself."""
    return {stage: i for i, stage in enumerate(names, start=1)}


def prediction_table(found: Networks, names: Names) -> Table:
    """One line per prediction and network."""
    several = len(found) > 1
    heads = ["prediction", "network"] if several else ["prediction"]
    words = tuple(range(len(heads)))
    for column, template in COLUMNS.items():
        percent = template.endswith("%}") and column[0] != "±"
        heads.append(Cell(column, "%" if percent else ""))
    rows = []
    for network in found:
        for stage, row in network.predictions.items():
            about = [Cell(names[stage], color=colors(names)[stage]), network.label]
            cells = [sections.fill(template, row) for template in COLUMNS.values()]
            rows.append([*about[: len(words)], *cells])
    note = (
        "Interval: the enclosure, or the prediction alone, widened by two deviations (±) of probes "
        f"and ε.{sections.first(sections.MOST, len(rows), '')}"
    )
    return Table(heads, rows[: sections.MOST], words, note)


def actual_table(found: Networks, names: Names) -> Table:
    """One line per definition: the actual limit, and how far every prediction is from it."""
    heads = ["nothing is lost if", Cell("actual", "%")]
    for stage, name in names.items():
        heads.append(Cell(f"{name} less actual", "points", color=colors(names)[stage]))
    rows = []
    for name in definitions(found):
        limits = [actual(network).get(name) for network in found]
        gaps = [gap_cell(gap(found, stage, name)) for stage in names]
        rows.append([definition(name, found), sections.mean_cell(*series.spread(limits)), *gaps])
    note = "Bold: inside the interval."
    if len(found) > 1:
        note = (
            "Means ± sample standard deviation over networks. Bold: inside the interval of every "
            "network."
        )
    remarks = []
    for network in found[: sections.MOST]:
        for stage, row in network.limits.items():
            name = sections.name(network.label, stage)
            remarks.append(f"{name}: {row.get('how')}; {row.get('evaluations')} evaluations.")
    return Table(heads, rows, note=note, remarks=tuple(remarks))


def gap_cell(told: Gap | None) -> Cell | str:
    """Predicted less actual; bold where the actual limit is inside every interval."""
    if told is None:
        return "–"
    text, deviation, *_ = sections.mean_cell(told.mean, told.std, told.count, "+.2f")
    bold = told.inside == told.count
    return Cell(text.replace("-", "−"), deviation, bold)
