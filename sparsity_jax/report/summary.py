"""The summary table: what every trained network and every pruning curve amounts to."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparsity_jax.report import series
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import Curve, Grouped, Series, member_of, number, place_of, removal

STOPS = (0.9, 0.95, 0.98, 0.99)  # pruning ratios with a column of their own
DROP = 0.01  # "within one point of dense"
Numbers = tuple[float, float, int]  # mean, sample standard deviation, number of networks


class Column(NamedTuple):
    """How one column is shown. decimals: None where no number is best. note: what its numbers
    are.
    """

    heading: str
    unit: str = "%"
    decimals: int | None = None
    note: str = ""


AT = "At: with that share of the prunable weights removed."
COLUMNS = {
    "dense": Column(
        "unpruned", "%", 2, "Unpruned: the network of that line before anything was removed."
    ),
    "before": Column("after epochs", ""),
    "channels": Column("channels removed"),
    "weights": Column("weights removed"),
    "pruned": Column(
        "pruned",
        "%",
        2,
        "Pruned: after the last training, with the share removed that stands before it.",
    ),
    **{str(stop): Column(f"at {stop:.0%}", "%", 2, AT) for stop in STOPS},
    "largest": Column(
        "largest within 1 point",
        "%",
        1,
        (
            "Largest: the last share that loses at most one point; ≥ where no measured share loses "
            "more."
        ),
    ),
    "epochs": Column("epochs", ""),
    "seconds": Column(
        "training",
        "s",
        None,
        "Training: epochs times the median one, so that compilation is left out.",
    ),
}


class Summary(NamedTuple):
    """One line of the summary table. floors: columns whose numbers are lower bounds."""

    series: int
    label: str
    variant: str
    cells: dict[str, Numbers]
    floors: frozenset = frozenset()

    def name(self) -> str:
        """Label and variant."""
        return f"{self.label} ({self.variant})" if self.variant else self.label


def summarize(
    grouped: Grouped, curves: list[Curve], stops: tuple[float, ...] = STOPS
) -> list[Summary]:
    """One line per curve, and one per series whose trained network has none or was pruned on the
    way.

    Columns of a curve: `dense` (its own accuracy where nothing is removed; without that, the last
    test accuracy of the training before it if it does not retrain and nothing was removed before),
    `0.9` ... (accuracy at those `stops`), `largest` (largest share whose accuracy is at most DROP
    below `dense`, per member; none for a network at chance). Columns of a trained network: `dense`
    (last test accuracy before anything was removed, `before`: after so many epochs), `pruned` (last
    test accuracy after that), `channels` or `weights` (the share then gone). Of both: `epochs` and
    `seconds` under the name of the series until then, see `time_spent`. Columns without any number
    are left out.
    """
    lines = []
    for index, one in enumerate(grouped):
        mine = [curve for curve in curves if curve.series == index]
        for curve in mine:
            columns = curve_columns(one, curve, stops)
            end = max(row["removed"] for row in curve.rows)
            floors = frozenset({"largest"} if end in columns["largest"] else ())
            lines.append(Summary(index, one.label, curve.variant, cells_of(columns), floors))
        columns = trained_columns(one)
        if not mine or "pruned" in columns:
            variant = "as trained" if mine else ""
            lines.append(Summary(index, one.label, variant, cells_of(columns)))
    return [line for line in lines if line.cells]


def cells_of(columns: dict[str, list[float]]) -> dict[str, Numbers]:
    """Mean, deviation and count of every column with a number."""
    cells = {column: series.spread(values) for column, values in columns.items()}
    return {column: cell for column, cell in cells.items() if cell[2]}


def curve_columns(one: Series, curve: Curve, stops: tuple[float, ...]) -> dict[str, list[float]]:
    """Values per member of each column of one curve; see `summarize`."""
    accuracy = curve.table("accuracy")
    dense = series.at_ratio(accuracy, 0.0)
    columns = {
        "dense": [],
        **{str(stop): series.at_ratio(accuracy, stop).tolist() for stop in stops},
    }
    columns |= {"largest": [], "epochs": [], "seconds": []}
    for member, unpruned in dense.items():
        own = rows_until(one, member, (curve.stage, curve.visit))
        past = [*one.before[member], *own]
        before, _, gone = accuracies(past)
        if math.isnan(unpruned) and not curve.retrained and not gone[0]:
            unpruned = before
        columns["dense"].append(unpruned)
        columns["largest"].append(largest(accuracy[member], unpruned, chance_of(past)))
        add_time(columns, own)
    return columns


def largest(accuracy: pd.Series, dense: float, chance: float) -> float:
    """The largest ratio whose accuracy is within DROP of `dense`; NaN without any, or at chance."""
    within = accuracy.index[accuracy >= dense - DROP - 1e-9]
    return max(within, default=math.nan) if dense > chance + DROP else math.nan


def trained_columns(one: Series) -> dict[str, list[float]]:
    """Values per member of each column of the network as training left it; see `summarize`."""
    columns = {"dense": [], "epochs": [], "seconds": []}
    members = dict.fromkeys(member_of(row) for row in one.of_kind(*series.TRAINING))
    for member in members:
        own = rows_until(one, member)
        past = [*one.before[member], *own]
        before, after, (what, share) = accuracies(past)
        columns["dense"].append(before)
        if not math.isnan(after):
            told = {"before": epochs_unpruned(past), what: share, "pruned": after}
            for column, value in told.items():
                columns.setdefault(column, []).append(value)
        add_time(columns, own)
    return columns


def rows_until(one: Series, member: str, place: tuple[str, int] | None = None) -> list[dict]:
    """Rows of one member, up to the visit `place` of a stage."""
    own = [row for row in one.rows if member_of(row) == member]
    places = [place_of(row) for row in own]
    return own[: places.index(place)] if place in places else own


def accuracies(rows: list[dict]) -> tuple[float, float, tuple[str, float]]:
    """(last test accuracy before anything was removed, last one after that, what is gone by
    then).
    """
    before = after = math.nan
    gone = ("", 0.0)
    for row in rows:
        gone = removal(row) or gone
        tested = number(row.get("test_accuracy"))
        if math.isnan(tested) or row.get("kind") not in series.TRAINING:
            continue
        if gone[0]:
            after = tested
        elif row["kind"] == "train":  # a growing penalty already acts on what it will remove
            before = tested
    return before, after, gone


def epochs_unpruned(rows: list[dict]) -> float:
    """Epochs of training before anything was removed."""
    last = {}
    for row in rows:
        if removal(row):
            break
        if row.get("kind") == "train" and "epoch" in row:
            last[place_of(row)] = int(row["epoch"])
    return float(sum(last.values()))


def chance_of(rows: list[dict]) -> float:
    """Accuracy of always answering the most frequent class, as far as rows know it."""
    known = [row["chance"] for row in rows if "chance" in row]
    return known[-1] if known else -math.inf


def add_time(columns: dict[str, list[float]], rows: list[dict]) -> None:
    """Adds `epochs` and `seconds` of the trainings among the rows of one member.

    seconds: per stage, the number of its epochs times their median time without the first one,
    which compiles. A stage with a single epoch counts as it was measured.
    """
    times, epochs = {}, {}
    for row in rows:
        if row.get("kind") in series.TRAINING and "epoch" in row:
            epochs.setdefault(place_of(row), {})[row["epoch"]] = number(row.get("seconds"))
    for (stage, _), ends in epochs.items():
        times.setdefault(stage, []).extend(np.diff([0.0, *ends.values()]))
    if times:
        columns["epochs"].append(float(sum(max(ends) for ends in epochs.values())))
        columns["seconds"].append(
            sum(len(own) * np.median(own[1:] or own) for own in times.values())
        )


# ------------------------------------------------------------------------------------------- the
# section


def summary(grouped: Grouped) -> Section | None:
    """The summary table; bold: a mean that is above all others by more than one deviation."""
    curves = series.best_known_curves(grouped)
    lines = summarize(grouped, curves)
    if not lines:
        return None
    columns = [column for column in COLUMNS if any(column in line.cells for line in lines)]
    best = {column: best_line(lines, column) for column in columns}
    variants = any(line.variant for line in lines)
    heads = ["network", *(["pruning"] if variants else [])]
    numbered = [Cell(*COLUMNS[column][:2]) for column in columns]
    table = Table([*heads, *numbered], [], words=(0, 1) if variants else (0,))
    for i, line in enumerate(lines):
        cells = [Cell(line.label, color=line.series), *([line.variant] if variants else [])]
        cells += [shown(line, column, bold=best[column] == i) for column in columns]
        table.rows.append(cells)
    note = explanations(grouped, lines, curves, columns)
    return Section("Summary", tables=[table._replace(note=note)])


def cell_text(column: str, cell: Numbers) -> tuple[str, str]:
    """Mean and, over several members, the deviation, as shown; equal epochs need none."""
    mean, std, count = cell
    _, unit, decimals, _ = COLUMNS[column]
    factor = 100 if unit == "%" else 1
    if decimals is None:
        decimals = 0 if unit == "" or factor * abs(mean) >= 100 else 1
    alone = count == 1 or (unit == "" and std == 0)
    return f"{factor * mean:,.{decimals}f}", "" if alone else f"± {factor * std:,.{decimals}f}"


def shown(line: Summary, column: str, *, bold: bool) -> Cell | str:
    """One number of the table."""
    if column not in line.cells:
        return "–"
    mean, deviation = cell_text(column, line.cells[column])
    floor = "≥ " if column in line.floors else ""
    return Cell(floor + mean, deviation, bold=bold)


def best_line(lines: list[Summary], column: str) -> int | None:
    """The line whose mean is above all others by more than either deviation; None if there is
    none.
    """
    known = {
        i: line.cells[column]
        for i, line in enumerate(lines)
        if column in line.cells and column not in line.floors
    }
    if COLUMNS[column].decimals is None or len(known) < 2:
        return None
    best = max(known, key=lambda i: known[i][0])
    mean, std, _ = known.pop(best)
    text, _ = cell_text(column, (mean, std, 1))
    for other, deviation, _ in known.values():
        alike = cell_text(column, (other, deviation, 1))[0] == text
        if alike or mean - other <= max(std, deviation):
            return None
    return best


def explanations(
    grouped: Grouped, lines: list[Summary], curves: list[Curve], columns: list[str]
) -> str:
    """What the numbers of the table mean, as far as it has them."""
    tested = series.curves(grouped) or not curves
    notes = ["Test accuracy." if tested else "Train accuracy."]
    notes += [COLUMNS[column].note for column in columns]
    if any(curve.retrained for curve in curves):
        notes.append(
            "Retrained: every number of the line is after retraining, also the unpruned one."
        )
    members = max(cell[2] for line in lines for cell in line.cells.values())
    if members > 1:
        notes.append(f"Mean ± sample standard deviation over up to {members} networks.")
        if "seconds" in columns:
            notes.append("Networks trained side by side share their wall time.")
    if len(lines) > 1:
        notes.append("Bold: above all other lines by more than one deviation.")
    return " ".join(dict.fromkeys(filter(None, notes)))


def finding(lines: list[Summary]) -> str:
    """One sentence on the accuracy kept at the telling ratio, for at most four lines of the
    table.
    """
    stops = [
        stop
        for stop in ("0.98", "0.99", "0.95", "0.9")
        if any(stop in line.cells for line in lines)
    ]
    if not stops:
        return ""
    told = [line for line in lines if stops[0] in line.cells]
    parts = []
    for line in told:
        dense = f" of {100 * line.cells['dense'][0]:.1f}%" if "dense" in line.cells else ""
        parts.append(f"{line.name()} keeps {100 * line.cells[stops[0]][0]:.1f}%{dense}")
    sentence = f"With {100 * float(stops[0]):g}% of the weights removed, {'; '.join(parts)}."
    return sentence if len(told) <= 4 else ""
