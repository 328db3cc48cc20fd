"""The summary table: what every trained network and every pruning curve amounts to."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import pandas as pd

from sparsity_jax.report import series
from sparsity_jax.report.sections import Cell, Cells, Section, Shown, Table, heading, mean_cell
from sparsity_jax.report.series import Frame, Grouped, Series, member_of, number

STOPS = (0.9, 0.95, 0.98, 0.99)  # pruning ratios with a column of their own
DROP = 0.01  # "within one point of dense"
Numbers = tuple[float, float, int]  # mean, sample standard deviation, number of networks


COLUMNS = {  # heading, format, whether the best number is bold
    "dense": ("unpruned|%", ".2%", True),
    "before": ("after epochs", ",.0f", False),
    "channels": ("channels removed|%", ".1%", False),
    "weights": ("weights removed|%", ".1%", False),
    "pruned": ("pruned|%", ".2%", True),
    **{str(stop): (f"at {stop:.0%}|%", ".2%", True) for stop in STOPS},
    "largest": ("largest within 1 point|%", ".1%", True),
    "epochs": ("epochs", ",.0f", False),
    "seconds": ("training|s", ",.1f", False),
}
NOTES = {  # what the numbers of a column are
    "dense": "Unpruned: before anything was removed.",
    **dict.fromkeys(map(str, STOPS), "At: with that share of the prunable weights removed."),
    "pruned": "Pruned: after the last training, with the share removed that stands before it.",
    "largest": (
        "Largest: the last share that loses at most one point; ≥ where no measured one loses more."
    ),
    "seconds": "Training: epochs times the median one, so that compilation is left out.",
}


class Summary(NamedTuple):
    """One line of the summary table. floors: columns whose numbers are lower bounds."""

    series: int
    label: str
    variant: str
    cells: dict[str, Numbers]
    floors: frozenset = frozenset()


def summarize(grouped: Grouped, stops: Sequence[float] = STOPS) -> list[Summary]:
    """One line per curve, and one per series whose trained network has none or was pruned on the
    way.

    Columns of a curve: `dense` (its own accuracy where nothing is removed; without that, the last
    test accuracy of the training before it if it does not retrain and nothing was removed before),
    `0.9` ... (accuracy at those `stops`), `largest` (largest share whose accuracy is at most DROP
    below `dense`, per member; none for a network at chance). Columns of a trained network: `dense`
    (last test accuracy before anything was removed, `before`: after so many epochs), `pruned` (last
    test accuracy after that), `channels` or `weights` (the share then gone). Of both: `epochs` and
    `seconds` under the name of the series until then, see `times`. Columns without any number are
    left out.
    """
    curves = series.best_known_curves(grouped)
    trained = series.frame(grouped, *series.TRAINING, fields=("epoch", "seconds"))
    lines = []
    for index, one in enumerate(grouped):
        mine = curves[curves["series"] == index]
        trainings = trained[(trained["series"] == index) & trained["epoch"].notna()]
        for _, curve in mine.groupby("dash"):
            numbers = curve_numbers(curve, trainings, stops)
            unbounded = numbers["largest"].max() == curve["removed"].max()
            floors = frozenset(["largest"] if unbounded else [])
            variant = curve["variant"].iloc[0]
            lines.append(Summary(index, one.label, variant, cells_of(numbers), floors))
        numbers = trained_numbers(one, trainings)
        if mine.empty or "pruned" in numbers:
            variant = "" if mine.empty else "as trained"
            lines.append(Summary(index, one.label, variant, cells_of(numbers)))
    return [line for line in lines if line.cells]


def cells_of(numbers: Frame) -> dict[str, Numbers]:
    """Mean, deviation and count of every column [members] with a number."""
    known = numbers.dropna(axis="columns", how="all")
    return {column: series.spread(known[column]) for column in known}


def curve_numbers(curve: Frame, trainings: Frame, stops: Sequence[float]) -> Frame:
    """Numbers of one curve, [members, columns]; see `summarize`."""
    accuracy = curve.pivot(index="removed", columns="member", values="accuracy")
    told = []
    for member, dense in series.at_ratio(accuracy, 0.0).items():
        first = curve[curve["member"] == member].iloc[0]
        network = first["row"]["network"]
        if math.isnan(dense) and not first["retrained"] and not network["removed"]:
            dense = number(network.get("dense"))
        largest = math.nan
        if not dense <= number(network["chance"]) + DROP:
            within = accuracy.index[accuracy[member] >= dense - DROP - 1e-9]
            largest = max(within, default=math.nan)
        before = trainings[trainings["place"] < first["place"]]
        told.append({"dense": dense, "largest": largest, **times(before, member)})
    numbers = pd.DataFrame(told, accuracy.columns)
    for stop in stops:
        numbers[str(stop)] = series.at_ratio(accuracy, stop)
    return numbers


def trained_numbers(one: Series, trainings: Frame) -> Frame:
    """Numbers of the network as training left it, [members, columns]; see `summarize`."""
    networks = {member_of(row): row["network"] for row in one.rows}
    told = []
    for member in trainings["member"].unique():
        network = networks[member]
        numbers = {"dense": number(network.get("dense")), **times(trainings, member)}
        if number(network.get("pruned")) >= 0:
            what, share = network["removed"]
            epochs = sum(network.get("epochs", {}).values())
            numbers |= {"before": epochs, what: share, "pruned": network["pruned"]}
        told.append(numbers)
    return pd.DataFrame(told)


def times(trainings: Frame, member: Hashable) -> dict[str, float]:
    """`epochs` and `seconds` of the trainings of a member.

    seconds: per stage, the number of its epochs times their median time without the first one,
    which compiles. A stage with a single epoch counts as it was measured.
    """
    own = trainings[trainings["member"] == member]
    if own.empty:
        return {}
    ends = own.drop_duplicates([*series.PLACE, "epoch"], keep="last")
    took = ends["seconds"] - ends.groupby(series.PLACE)["seconds"].shift(fill_value=0.0)
    seconds = 0.0
    for _, epochs in took.groupby(ends["stage"]):
        after_the_first = epochs.iloc[min(1, len(epochs) - 1) :]
        seconds += len(epochs) * after_the_first.median()
    return {"epochs": ends.groupby(series.PLACE)["epoch"].max().sum(), "seconds": seconds}


# ------------------------------------------------------------------------------------ the section


def summary(grouped: Grouped) -> Shown:
    """The summary table; bold: a mean that is above all others by more than one deviation."""
    lines = summarize(grouped)
    if not lines:
        return None
    columns = [column for column in COLUMNS if any(column in line.cells for line in lines)]
    best = {column: best_line(lines, column) for column in columns}
    words = ["network", "pruning"] if any(line.variant for line in lines) else ["network"]
    rows = []
    for i, line in enumerate(lines):
        row: Cells = [Cell(line.label, color=line.series)]
        if "pruning" in words:
            row.append(line.variant)
        for column in columns:
            row.append(shown(line, column, bold=best[column] == i))
        rows.append(row)
    heads: Cells = list(words)
    for column in columns:
        heads.append(heading(COLUMNS[column][0]))
    notes = notes_of(lines, columns)
    if any(line is not None for line in best.values()):
        notes.append("Bold: above all other lines by more than one deviation.")
    table = Table(heads, rows, tuple(range(len(words))), " ".join(notes))
    return Section("Summary", tables=[table])


def notes_of(lines: list[Summary], columns: list[str]) -> list[str]:
    """Sentences that say what the numbers are."""
    sentences = ["Accuracies on test data, or on train data where there are no others."]
    sentences += dict.fromkeys(NOTES[column] for column in columns if column in NOTES)
    if any(line.variant.startswith("retrained") for line in lines):
        sentences.append(
            "Retrained: every number of the line is after retraining, also the unpruned one."
        )
    members = max(count for line in lines for _, _, count in line.cells.values())
    if members > 1:
        sentences.append(
            f"Mean ± sample standard deviation over up to {members} networks; those trained side "
            "by side share their wall time."
        )
    return sentences


def shown(line: Summary, column: str, *, bold: bool) -> Cell:
    """Mean and, over several members, the deviation."""
    if column not in line.cells:
        return Cell("–")
    mean, deviation, count = line.cells[column]
    if column in ("before", "epochs") and not deviation:
        count = 1  # the same number by design
    told = mean_cell(mean, deviation, count, COLUMNS[column][1])
    floor = "≥ " if column in line.floors else ""
    return told._replace(text=floor + told.text, bold=bold)


def best_line(lines: list[Summary], column: str) -> int | None:
    """The line whose mean is above all others by more than either deviation; None without one."""
    _, form, comparable = COLUMNS[column]
    known = {}
    for i, line in enumerate(lines):
        if column in line.cells and column not in line.floors:
            known[i] = line.cells[column]
    if not comparable or len(known) < 2:
        return None
    best = max(known, key=lambda i: known[i][0])
    mean, std, _ = known.pop(best)
    for other, deviation, _ in known.values():
        alike = format(other, form) == format(mean, form)
        if alike or mean - other <= max(std, deviation):
            return None
    return best


def finding(lines: list[Summary]) -> str:
    """One sentence on the accuracy kept at 98 % of the weights removed, for at most four lines."""
    parts = []
    for line in lines:
        if "0.98" in line.cells:
            variant = f" ({line.variant})" if line.variant else ""
            dense = f" of {line.cells['dense'][0]:.1%}" if "dense" in line.cells else ""
            kept = line.cells["0.98"][0]
            parts.append(f"{line.label}{variant} keeps {kept:.1%}{dense}")
    if not 1 <= len(parts) <= 4:
        return ""
    return f"With 98% of the weights removed, {'; '.join(parts)}."
