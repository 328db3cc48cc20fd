"""The geometric limit of sparsity as numbers: predicted and actual limits of every network.

Rows are those of the stages limit, path, row_norms, spectrum and width, and of curves; see `geometry`.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsity_jax.report import runs, sections, series
from sparsity_jax.report.sections import Cell, Section, Table, percent
from sparsity_jax.report.series import Series, number

WIDE = 0.01  # an enclosure wider than this is called so where the config asks for nothing
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
    curves: dict[str, pd.DataFrame]  # by split: accuracy and loss by ratio, without retraining
    search: list[dict]  # evaluations of the limit stages
    limits: dict[str, dict]  # result of each limit stage
    predictions: dict[str, dict]  # row of each width stage
    norms: list[dict]  # rows of the last row_norms stage, its result the last one
    path: list[dict]  # rows of the last path stage, by ratio

    def is_measured(self) -> bool:
        """Whether there are rows besides those of curves."""
        return bool(self.limits or self.predictions or self.norms or self.path)


def networks(grouped: list[Series]) -> list[Network]:
    """All networks that have rows of a limit, path, row_norms or width stage."""
    result = []
    for one in grouped:
        by_member = {}
        for row in one.rows:
            by_member.setdefault(series.member_of(row), []).append(row)
        for rows in by_member.values():
            seeds = [f"seed {row[key]}" for row in rows for key in row if runs.is_seed(key)]
            name = [*seeds, f"network {rows[0].get('member', 0)}"][0]
            network = network_of(name if len(by_member) > 1 else "", rows)
            if network.is_measured():
                result.append((one.label, network))
    several = len({label for label, _ in result}) > 1
    return [network._replace(label=sections.name(label if several else "", network.label)) for label, network in result]


def network_of(label: str, rows: list[dict]) -> Network:
    """The network of these rows."""
    by_kind = {}
    for row in rows:
        by_kind.setdefault(row.get("kind"), []).append(row)
    last = {stage: own for (stage, _), own in series.visits(by_kind.get("limit", [])).items()}
    searched = [row for own in last.values() for row in own]
    path = series.last_visit(by_kind.get("path", []))
    return Network(
        label,
        last_curves(by_kind.get("curve", [])),
        [row for row in searched if "ratio" in row],
        {row["stage"]: row for row in searched if row.get("phase") == "result"},
        {row["stage"]: row for row in by_kind.get("width", [])},
        series.last_visit(by_kind.get("row_norms", [])),
        sorted(path, key=lambda row: row["ratio"]),
    )


def last_curves(rows: list[dict]) -> dict[str, pd.DataFrame]:
    """Accuracy and loss by ratio of the last curve without retraining, by split."""
    pruned = [row for row in rows if not row.get("retrained") and "ratio" in row]
    by_split = {}
    for row in series.last_visit(pruned):
        by_split.setdefault(row.get("split", "test"), []).append(row)
    result = {}
    for split, own in by_split.items():
        table = series.numbers(own, "accuracy", "loss")
        table.index = [series.share_removed(row) for row in own]
        result[split] = table[~table.index.duplicated(keep="last")].sort_index()
    return result


def prediction_names(found: list[Network]) -> dict[str, str]:
    """What each width stage is called: its operator, and its own name where operators repeat."""
    rows = {stage: row for network in found for stage, row in network.predictions.items()}
    operators = {stage: row.get("operator", "") for stage, row in rows.items()}
    names = {}
    for stage, operator in operators.items():
        repeated = list(operators.values()).count(operator) > 1
        names[stage] = sections.name(OPERATORS.get(operator, operator), stage if repeated else "")
    return names


def actual(network: Network) -> dict[str, float]:
    """The actual limit by every definition: those of width stages, and limit stages by their name."""
    known = {}
    for row in network.predictions.values():
        known |= row.get("actual") or {}
    known |= {stage: row["limit"] for stage, row in network.limits.items()}
    numbers = {name: number(value) for name, value in known.items()}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def definitions(found: list[Network]) -> list[str]:
    """Names of all definitions that some network has an actual limit by: test, train, then stages."""
    order = [f"{split} {rule}" for split in ("test", "train") for rule in RULES]
    names = list(dict.fromkeys(name for network in found for name in actual(network)))
    usual = [name for name in order if name in names]
    return usual + [name for name in names if name not in order]


def main_limits(network: Network) -> dict[str, float]:
    """The actual limits to mark: those of limit stages, else one by accuracy, on the test set if known."""
    known = actual(network)
    usual = ("test accuracy", "train accuracy")
    names = [name for name in known if name.split(" ")[0] not in ("test", "train")]
    names = names or [name for name in usual if name in known][:1]
    return {name: known[name] for name in names}


def definition(name: str, found: list[Network]) -> str:
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
    text = rule_text(rows[0].get("criterion"), rows[0].get("split", "test"), tolerance, epsilon=f"{tolerance:g}")
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


def gap(found: list[Network], stage: str, name: str) -> Gap | None:
    """How far the predictions of a stage are from the actual limits; None without any pair."""
    differences, inside = [], 0
    for network in found:
        row, limit = network.predictions.get(stage), actual(network).get(name)
        if row and limit is not None:
            differences.append(row["predicted"] - limit)
            inside += row["low"] <= limit <= row["high"]
    return Gap(*series.spread(differences), inside) if differences else None


# ------------------------------------------------------------------------------------ in plain words


def verdicts(found: list[Network], names: dict[str, str]) -> list[tuple[str, str, str]]:
    """(prediction, how far it is from the actual limit, what stands against trusting it) of each."""
    limits = list(dict.fromkeys(name for network in found for name in main_limits(network)))
    result = []
    for stage, name in names.items():
        rows = [network.predictions[stage] for network in found if stage in network.predictions]
        text = f"{percent(np.mean([row['predicted'] for row in rows]))}% predicted"
        text += f" (mean of {len(rows)} networks)" if len(rows) > 1 else ""
        told = gap(found, stage, limits[0]) if limits else None
        if told is not None:
            text += distance_text(told, definition(limits[0], found))
        narrow, caution = enclosure_text(rows)
        caution += gradient_text(found, stage)
        result.append((name[:1].upper() + name[1:], f"{text}{narrow}.", caution.strip()))
    return result


def distance_text(told: Gap, defined: str) -> str:
    """How far predictions are from the actual limit."""
    side = "above" if told.mean >= 0 else "below"
    place = "inside the interval" if told.inside else "outside the interval"
    if told.count > 1:
        place = f"inside the interval of {told.inside} of {told.count}"
    return f", {100 * abs(told.mean):.2f} points {side} the actual limit ({defined}), which is {place}"


def enclosure_text(rows: list[dict]) -> tuple[str, str]:
    """(praise, caution) for the widest enclosure of a prediction, one of them "" ."""
    products = max(int(row.get("num_matvecs", 0)) for row in rows)
    asked = max(number(rows[0].get("stop_width", 0)), 0.0)
    asked = 0.0 if math.isnan(asked) else asked  # of several runs that ask for different widths
    ends = series.numbers(rows, "enclosure_low", "enclosure_high")
    wide = (ends["enclosure_high"] - ends["enclosure_low"]).max()
    if math.isnan(wide):
        return "", (
            "No enclosure: with negative values clipped nothing bounds the error left after "
            f"{products} products; only the history shows whether it has settled."
        )
    points = f"{100 * wide:.2g} points wide"
    if wide > (asked or WIDE):
        wanted = f" ({100 * asked:.2g} were asked for)" if asked else ""
        return "", (
            f"Not narrow enough: after {products} products the enclosure is {points}{wanted}; "
            "any value in it is possible, and more products narrow it."
        )
    narrower = f", narrower than the {100 * asked:.2g} asked for" if asked else ""
    return f". The enclosure is {points} after {products} products{narrower}", ""


def gradient_text(found: list[Network], stage: str) -> str:
    """A caution where the gradient, which predictions leave out, changes the loss; "" if it does not."""
    slopes = [slope(network, stage) for network in found]
    known = [pair for pair in slopes if not math.isnan(pair[0])]
    first, epsilon = max(known, key=lambda pair: abs(pair[0]) / pair[1], default=(0.0, math.inf))
    if abs(first) <= STEEP * epsilon:
        return ""
    side = "larger" if first < 0 else "smaller"
    worst = " (the worst network)" if len(known) > 1 else ""
    return (
        f" The gradient, which the prediction leaves out, changes the loss by {first:+.2g} on the way there, "
        f"beside an ε of {epsilon:.2g}{worst}: expect a {side} actual limit."
    )


def slope(network: Network, stage: str) -> tuple[float, float]:
    """(first-order change of the loss by pruning to the predicted ratio, ε); NaN where not measured."""
    row = network.predictions.get(stage)
    if not row or not network.path:
        return math.nan, math.nan
    path = series.numbers(network.path, "ratio", "first_order")
    nowhere = dict(left=math.nan, right=math.nan)
    first = np.interp(row["predicted"], path["ratio"], path["first_order"], **nowhere)
    return float(first), number(row["epsilon"])


# ---------------------------------------------------------------------------------------- the section


def prediction(grouped: list[Series]) -> Section | None:
    """Predictions, then every definition of the actual limit and how far off they are."""
    found = networks(grouped)
    names = prediction_names(found)
    tables = []
    if names:
        tables.append(prediction_table(found, names))
    if definitions(found):
        tables.append(actual_table(found, names))
    if not tables:
        return None
    return Section("Predicted and actual limit", statements=verdicts(found, names), tables=tables)


def colors(names: dict[str, str]) -> dict[str, int]:
    """Colour of each prediction; 0 is the network itself."""
    return {stage: i for i, stage in enumerate(names, start=1)}


PERCENTS = {  # columns of one prediction in percent: their fields and decimals
    "predicted": (2, "predicted"),
    "interval": (2, "low", "high"),
    "enclosure": (2, "enclosure_low", "enclosure_high"),
    "± probes": (2, "standard_error"),
    "± ε": (2, "epsilon_error"),
    "share without curvature": (1, "zero_share"),
    "weight below 0": (1, "negative_mass"),
    "on the original's grid": (1, "predicted_on_grid"),
}
AFTER_EPSILON = 5  # columns in percent before those that are not


def prediction_table(found: list[Network], names: dict[str, str]) -> Table:
    """One line per prediction and network."""
    heads = [Cell(column, "" if column[0] == "±" else "%") for column in PERCENTS]
    heads[AFTER_EPSILON:AFTER_EPSILON] = ["ε", "probes × products"]
    several = len(found) > 1
    rows = []
    for network in found:
        for stage in (stage for stage in names if stage in network.predictions):
            row = network.predictions[stage]
            cells = [percents(row, *columns) for columns in PERCENTS.values()]
            products = f"{row.get('num_probes', 1)} × {row.get('num_matvecs', 0)}"
            cells[AFTER_EPSILON:AFTER_EPSILON] = [f"{number(row.get('epsilon')):.3g}", products]
            first = [Cell(names[stage], color=colors(names)[stage])]
            rows.append([*first, *([network.label] if several else []), *cells])
    note = "Interval: the enclosure, or the prediction alone, widened by two deviations (±) of probes and ε."
    note += sections.first(sections.MOST, len(rows), "")
    first = ["prediction", *(["network"] if several else [])]
    return Table([*first, *heads], rows[: sections.MOST], (0, 1) if several else (0,), note)


def percents(row: dict, decimals: int, *fields: str) -> str:
    """The ends of a range, or one number; "–" where one is missing."""
    texts = [percent(number(row.get(field)), decimals) for field in fields]
    return "–" if "–" in texts else "–".join(texts)


def actual_table(found: list[Network], names: dict[str, str]) -> Table:
    """One line per definition: the actual limit, and how far every prediction is from it."""
    table = Table(["nothing is lost if", Cell("actual", "%")], [])
    for stage, name in names.items():
        table.heads.append(Cell(f"{name} less actual", "points", color=colors(names)[stage]))
    for name in definitions(found):
        limits = [actual(network).get(name) for network in found]
        mean, deviation, count = series.spread(limits)
        limit = Cell(percent(mean), f"± {percent(deviation)}" if count > 1 else "")
        gaps = [gap_cell(gap(found, stage, name)) for stage in names]
        table.rows.append([definition(name, found), limit, *gaps])
    several = len(found) > 1
    note = "Means ± sample standard deviation over networks. " if several else ""
    note += f"Bold: inside the interval{' of every network' if several else ''}."
    remarks = []
    for network in found:
        for stage, row in network.limits.items():
            name = sections.name(network.label, stage)
            remarks.append(f"{name}: {row.get('how')}; {row.get('evaluations')} evaluations.")
    return table._replace(note=note, remarks=tuple(remarks[: sections.MOST]))


def gap_cell(told: Gap | None) -> Cell | str:
    """Predicted less actual; bold where the actual limit is inside every interval."""
    if told is None:
        return "–"
    text = f"{100 * told.mean:+.2f}".replace("-", "−")
    deviation = f"± {percent(told.std)}" if told.count > 1 else ""
    return Cell(text, deviation, bold=told.inside == told.count)
