"""The summary table: what every trained network and every pruning curve amounts to."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import pandas as pd

from sparsity_jax.report import series
from sparsity_jax.report.rows import number
from sparsity_jax.report.sections import Cell, Section, Shown, Table, heading, mean_cell
from sparsity_jax.report.series import Frame, Grouped
from sparsity_jax.types import Fields

__all__ = [
    "Column",
    "Numbers",
    "Summary",
    "best_line",
    "column_of",
    "finding",
    "notes_of",
    "shown",
    "summarize",
    "summary",
]

_STOPS = (0.9, 0.95, 0.98, 0.99)  # pruning ratios with a column of their own
_DROP = 0.01  # "within one point of dense"
_VISIBLE = 1e-4  # a smaller difference may not show in the table
Numbers = tuple[float, float, int]  # mean, sample standard deviation, number of networks
_AT = "At: with that share of the prunable weights removed."


class Column(NamedTuple):
    """A column of the table. bold: whether the best number is. note: what the numbers are."""

    heading: str
    form: str
    bold: bool = False
    note: str = ""


_COLUMNS = {
    "dense": Column("unpruned|%", ".2%", True, "Unpruned: before anything was removed."),
    "before": Column("after epochs", ",.0f"),
    "channels": Column("channels removed|%", ".1%"),
    "weights": Column("weights removed|%", ".1%"),
    "pruned": Column(
        "pruned|%",
        ".2%",
        True,
        "Pruned: after the last training, with the share removed that stands before it.",
    ),
    **{str(stop): Column(f"at {stop:.0%}|%", ".2%", True, _AT) for stop in _STOPS},
    "largest": Column(
        "largest within 1 point|%",
        ".1%",
        True,
        "Largest: the last share that loses at most one point; ≥ where no measured one loses more.",
    ),
    "epochs": Column("epochs", ",.0f"),
    "seconds": Column(
        "training|s",
        ",.1f",
        False,
        "Training: epochs times the median one, so that compilation is left out.",
    ),
}


def column_of(name: str) -> Column:
    """The column that is called `name` in a line, such as the share removed, `0.9`."""
    if name in _COLUMNS:
        return _COLUMNS[name]
    return Column(f"at {100 * float(name):g}%|%", ".2%", True, _AT)


class Summary(NamedTuple):
    """One line of the summary table. floors: columns whose numbers are lower bounds."""

    series: int
    label: str
    variant: str
    cells: dict[str, Numbers]
    floors: Collection[str] = ()


# Numbers ------------------------------------------------------------------------------------------


def summarize(grouped: Grouped, *, stops: Sequence[float] = _STOPS) -> list[Summary]:
    """One line per curve, and one per series whose trained network has none or was pruned on the
    way.

    Columns of a curve: `dense` (its own accuracy where nothing is removed; without that, the last
    test accuracy of the training before it if it does not retrain and nothing was removed before),
    `0.9` ... (accuracy at those `stops`), `largest` (largest share whose accuracy is at most DROP
    below `dense`, per member; none for a network at chance). Columns of a trained network: `dense`
    (last test accuracy before anything was removed, `before`: after so many epochs), `pruned` (last
    test accuracy after that), `channels` or `weights` (the share then gone). Of both: `epochs` and
    `seconds` under the name of the series until then, see `_times`. Columns without any number are
    left out.
    """
    line = ["series", "variant"]
    curves = series.best_known_curves(grouped)
    measured = curves.groupby(line)["removed"].max()
    trained = series.frame(grouped, *series.TRAINING, fields=("epoch", "seconds"))
    trained = trained.dropna(subset="epoch")
    trainings = dict(list(trained.groupby(["series", "member"])))
    with_curve = set(curves["series"])
    lines = []
    for (index, variant, member), points in curves.groupby(["series", "variant", "member"]):
        own = trainings.get((index, member), trained[:0])
        before = own[own["place"] < points["place"].iloc[0]]
        numbers = {**_curve_numbers(points, stops), **_times(before)}
        lines.append({"series": index, "variant": variant, **numbers})
    for (index, _), own in trainings.items():
        network = own["row"].iloc[-1]["network"]
        if index not in with_curve or network.get("pruned") is not None:
            variant = "as trained" if index in with_curve else ""
            numbers = {**_trained_numbers(network), **_times(own)}
            lines.append({"series": index, "variant": variant, **numbers})
    result = []
    table = pd.DataFrame(lines) if lines else pd.DataFrame(columns=line)
    for (index, variant), members in table.groupby(line, sort=False):
        known = members.drop(columns=line).dropna(axis="columns", how="all")
        cells = {column: series.spread(known[column]) for column in known}
        floors = set()
        if "largest" in cells and known["largest"].max() == measured[index, variant]:
            floors = {"largest"}
        if cells:
            result.append(Summary(index, grouped[index].label, variant, cells, floors))
    return sorted(result, key=lambda line: line.series)


def _curve_numbers(points: Frame, stops: Sequence[float]) -> dict[str, float]:
    """Numbers of one network's curve; see `summarize`."""
    first = points.iloc[0]
    network = first["row"]["network"]
    accuracy = points.set_index("removed")["accuracy"].dropna()
    dense = series.at_ratio(accuracy, 0.0)
    if pd.isna(dense) and not first["retrained"] and not network["removed"]:
        dense = number(network.get("dense"))
    numbers = {"dense": dense}
    for stop in stops:
        numbers[str(stop)] = series.at_ratio(accuracy, stop)
    if not dense <= number(network["chance"]) + _DROP:
        numbers["largest"] = accuracy.index[accuracy >= dense - _DROP - 1e-9].max()
    return numbers


def _trained_numbers(network: Fields) -> dict[str, float]:
    """Numbers of a network as training left it; see `summarize`."""
    numbers = {"dense": number(network.get("dense"))}
    if network.get("pruned") is not None:
        what, share = network["removed"]
        before = sum(network.get("epochs", {}).values())
        numbers |= {"pruned": network["pruned"], "before": before, what: share}
    return numbers


def _times(trainings: Frame) -> dict[str, float]:
    """`epochs` and `seconds` of the trainings of one member.

    seconds: per stage, the number of its epochs times their median time without the first one,
    which compiles. A stage with a single epoch counts as it was measured.
    """
    if trainings.empty:
        return {}
    ends = trainings.drop_duplicates([*series.PLACE, "epoch"], keep="last")
    visits = ends.groupby(series.PLACE)
    took = ends["seconds"] - visits["seconds"].shift(fill_value=0.0)
    seconds = 0.0
    for _, epochs in took.groupby(ends["stage"]):
        typical = epochs.iloc[1:] if len(epochs) > 1 else epochs
        seconds += len(epochs) * typical.median()
    return {"epochs": visits["epoch"].max().sum(), "seconds": seconds}


# The section --------------------------------------------------------------------------------------


def summary(grouped: Grouped) -> Shown:
    """The summary table; bold: a mean that is above all others by more than one deviation."""
    lines = summarize(grouped)
    if not lines:
        return None
    heads: list[Cell] = [Cell("network")]
    rows = []
    for line in lines:
        first = Cell(line.label, line.variant, color=line.series)
        rows.append([first])
    notes = notes_of(lines)
    for name, column in _COLUMNS.items():
        if not any(name in line.cells for line in lines):
            continue
        heads.append(heading(column.heading))
        best = best_line(lines, name)
        for index, (row, line) in enumerate(zip(rows, lines)):
            row.append(shown(line, name, column.form, bold=index == best))
        notes.append(column.note)
    if any(cell.bold for row in rows for cell in row):
        notes.append("Bold: above all other lines by more than one deviation.")
    note = " ".join(filter(None, dict.fromkeys(notes)))
    return Section("Summary", tables=[Table(heads, rows, note=note)])


def notes_of(lines: list[Summary]) -> list[str]:
    """Sentences that say what the lines are."""
    sentences = ["Accuracies on test data, or on train data where there are no others."]
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


def shown(line: Summary, name: str, form: str, *, bold: bool = False) -> Cell:
    """Mean and, over several members, the deviation."""
    if name not in line.cells:
        return Cell("–")
    mean, deviation, count = line.cells[name]
    if name in ("before", "epochs") and not deviation:
        count = 1  # the same number by design
    told = mean_cell(mean, deviation, count, form)
    floor = "≥ " if name in line.floors else ""
    return told._replace(text=floor + told.text, bold=bold)


def best_line(lines: list[Summary], name: str) -> int | None:
    """The line whose mean is above all others by more than either deviation; None without one."""
    known = []
    for index, line in enumerate(lines):
        if name in line.cells and name not in line.floors:
            mean, deviation, _ = line.cells[name]
            known.append((mean, deviation, index))
    if not column_of(name).bold or len(known) < 2:
        return None
    *others, (best, spread, index) = sorted(known)
    for mean, deviation, _ in others:
        if best - mean <= max(spread, deviation, _VISIBLE):
            return None
    return index


def finding(lines: list[Summary]) -> str:
    """One sentence on the accuracy kept at 98 % of the weights removed, for at most four lines."""
    parts = []
    for line in lines:
        kept = line.cells.get("0.98")
        dense = line.cells.get("dense")
        if kept:
            variant = f" ({line.variant})" if line.variant else ""
            whole = f" of {dense[0]:.1%}" if dense else ""
            parts.append(f"{line.label}{variant} keeps {kept[0]:.1%}{whole}")
    if not 1 <= len(parts) <= 4:
        return ""
    return f"With 98% of the weights removed, {'; '.join(parts)}."
