"""The summary table: what every trained network and every pruning curve amounts to."""

import math
from typing import NamedTuple

import pandas as pd

from sparsity_jax.report import series
from sparsity_jax.report.sections import Cell, Cells, Section, Table
from sparsity_jax.report.series import Curve, Grouped, Series, member_of, place_of

STOPS = (0.9, 0.95, 0.98, 0.99)  # pruning ratios with a column of their own
DROP = 0.01  # "within one point of dense"
PLACE = ["stage", "visit"]
Numbers = tuple[float, float, int]  # mean, sample standard deviation, number of networks


class Column(NamedTuple):
    """How one column is shown. decimals: None where no number is best. note: what numbers are."""

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
    `seconds` under the name of the series until then, see `times`. Columns without any number are
    left out.
    """
    lines = []
    for index, one in enumerate(grouped):
        mine = [curve for curve in curves if curve.series == index]
        for curve in mine:
            numbers = curve_numbers(one, curve, stops)
            end = max(row["removed"] for row in curve.rows)
            floors = frozenset({"largest"} if numbers["largest"].max() == end else ())
            lines.append(Summary(index, one.label, curve.variant, cells_of(numbers), floors))
        numbers = trained_numbers(one)
        if not mine or "pruned" in numbers:
            variant = "as trained" if mine else ""
            lines.append(Summary(index, one.label, variant, cells_of(numbers)))
    return [line for line in lines if line.cells]


def cells_of(numbers: pd.DataFrame) -> dict[str, Numbers]:
    """Mean, deviation and count of every column [members] with a number."""
    known = numbers.dropna(axis="columns", how="all")
    return {column: series.spread(known[column]) for column in known}


def curve_numbers(one: Series, curve: Curve, stops: tuple[float, ...]) -> pd.DataFrame:
    """Numbers of one curve, [members, columns]; see `summarize`."""
    accuracy = curve.table("accuracy")
    told = []
    for member, dense in series.at_ratio(accuracy, 0.0).items():
        past, own = history(one, member, (curve.stage, curve.visit))
        if math.isnan(dense) and not curve.retrained and past["what"].isna().all():
            dense = last(unpruned(past)["test_accuracy"])
        share = largest(accuracy[member], dense, last(past["chance"]))
        told.append({"dense": dense, "largest": share, **times(own)})
    numbers = pd.DataFrame(told, accuracy.columns)
    for stop in stops:
        numbers[str(stop)] = series.at_ratio(accuracy, stop)
    return numbers


def largest(accuracy: pd.Series, dense: float, chance: float) -> float:
    """The largest ratio whose accuracy is within DROP of `dense`; NaN without any, or at chance."""
    if dense <= chance + DROP:
        return math.nan
    within = accuracy.index[accuracy >= dense - DROP - 1e-9]
    return max(within, default=math.nan)


def trained_numbers(one: Series) -> pd.DataFrame:
    """Numbers of the network as training left it, [members, columns]; see `summarize`."""
    told = []
    for member in dict.fromkeys(map(member_of, one.of_kind(*series.TRAINING))):
        past, own = history(one, member)
        base = unpruned(past)
        numbers = {"dense": last(base["test_accuracy"]), **times(own)}
        pruned = last(past[past["what"].notna()]["test_accuracy"])
        if not math.isnan(pruned):
            what, share = past[["what", "share"]].iloc[-1]
            epochs = base.groupby(PLACE)["epoch"].last().sum()
            numbers |= {"before": epochs, what: share, "pruned": pruned}
        told.append(numbers)
    return pd.DataFrame(told)


def history(
    one: Series, member: str, place: tuple[str, int] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(all rows of one network up to the visit `place` of a stage, those under the series' name).

    what, share: what is removed by then. test_accuracy: of trainings.
    """
    rows = [row for row in one.rows if member_of(row) == member]
    places = [place_of(row) for row in rows]
    if place in places:
        rows = rows[: places.index(place)]
    before = one.before[member]
    rows = [*before, *rows]
    past = series.numbers(rows, "epoch", "seconds", "test_accuracy", "chance")
    past[PLACE] = pd.DataFrame(map(place_of, rows), columns=PLACE)
    past["kind"] = [row.get("kind") for row in rows]
    removals = [series.removal(row) or (None, math.nan) for row in rows]
    past[["what", "share"]] = pd.DataFrame(removals, columns=["what", "share"]).ffill()
    past["test_accuracy"] = past["test_accuracy"].where(past["kind"].isin(series.TRAINING))
    return past, past.iloc[len(before) :]


def unpruned(past: pd.DataFrame) -> pd.DataFrame:
    """Rows of training before anything was removed.

    A growing penalty already acts on what it will remove.
    """
    return past[past["what"].isna() & (past["kind"] == "train")]


def last(values: pd.Series) -> float:
    """The last number; NaN without any."""
    known = values.dropna()
    return known.iloc[-1] if known.size else math.nan


def times(own: pd.DataFrame) -> dict[str, float]:
    """`epochs` and `seconds` of the trainings among rows.

    seconds: per stage, the number of its epochs times their median time without the first one,
    which compiles. A stage with a single epoch counts as it was measured.
    """
    trained = own[own["kind"].isin(series.TRAINING) & own["epoch"].notna()]
    if trained.empty:
        return {}
    ends = trained.drop_duplicates([*PLACE, "epoch"], keep="last")
    took = ends["seconds"] - ends.groupby(PLACE)["seconds"].shift(fill_value=0.0)
    seconds = 0.0
    for _, epochs in took.groupby(ends["stage"]):
        typical = epochs.iloc[1:] if len(epochs) > 1 else epochs
        seconds += len(epochs) * typical.median()
    return {"epochs": ends.groupby(PLACE)["epoch"].max().sum(), "seconds": seconds}


# ------------------------------------------------------------------------------------ the section


def summary(grouped: Grouped) -> Section | None:
    """The summary table; bold: a mean that is above all others by more than one deviation."""
    curves = series.best_known_curves(grouped)
    lines = summarize(grouped, curves)
    if not lines:
        return None
    columns = [column for column in COLUMNS if any(column in line.cells for line in lines)]
    best = {column: best_line(lines, column) for column in columns}
    heads: Cells = ["network"]
    if any(line.variant for line in lines):
        heads.append("pruning")
    rows = []
    for i, line in enumerate(lines):
        about: Cells = [Cell(line.label, color=line.series), line.variant]
        rows.append(
            about[: len(heads)]
            + [shown(line, column, bold=best[column] == i) for column in columns]
        )
    words = tuple(range(len(heads)))
    heads += [Cell(*COLUMNS[column][:2]) for column in columns]
    note = explanations(grouped, lines, curves, columns)
    return Section("Summary", tables=[Table(heads, rows, words, note)])


def shown(line: Summary, column: str, *, bold: bool) -> Cell | str:
    """Mean and, over several members, the deviation; equal epochs need none."""
    if column not in line.cells:
        return "–"
    mean, std, count = line.cells[column]
    floor = "≥ " if column in line.floors else ""
    alone = count == 1 or (COLUMNS[column].unit == "" and std == 0)
    small = "" if alone else f"± {rounded(std, column, mean)}"
    return Cell(floor + rounded(mean, column, mean), small, bold=bold)


def rounded(value: float, column: str, mean: float) -> str:
    """`value` in the unit of a column, with the decimals of a mean."""
    _, unit, decimals, _ = COLUMNS[column]
    factor = 100 if unit == "%" else 1
    if decimals is None:
        decimals = 0 if unit == "" or factor * abs(mean) >= 100 else 1
    return f"{factor * value:,.{decimals}f}"


def best_line(lines: list[Summary], column: str) -> int | None:
    """The line whose mean is above all others by more than either deviation; None without one."""
    known = {}
    for i, line in enumerate(lines):
        if column in line.cells and column not in line.floors:
            known[i] = line.cells[column]
    if COLUMNS[column].decimals is None or len(known) < 2:
        return None
    best = max(known, key=lambda i: known[i][0])
    mean, std, _ = known.pop(best)
    text = rounded(mean, column, mean)
    for other, deviation, _ in known.values():
        if rounded(other, column, other) == text or mean - other <= max(std, deviation):
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
    members = max(count for line in lines for _, _, count in line.cells.values())
    if members > 1:
        notes.append(f"Mean ± sample standard deviation over up to {members} networks.")
        if "seconds" in columns:
            notes.append("Networks trained side by side share their wall time.")
    if len(lines) > 1:
        notes.append("Bold: above all other lines by more than one deviation.")
    return " ".join(dict.fromkeys(filter(None, notes)))


def finding(lines: list[Summary]) -> str:
    """One sentence on the accuracy kept at the telling ratio, for at most four lines."""
    for stop in ("0.98", "0.99", "0.95", "0.9"):
        told = [line for line in lines if stop in line.cells]
        if told:
            break
    if not 1 <= len(told) <= 4:
        return ""
    parts = []
    for line in told:
        label = f"{line.label} ({line.variant})" if line.variant else line.label
        dense = f" of {100 * line.cells['dense'][0]:.1f}%" if "dense" in line.cells else ""
        parts.append(f"{label} keeps {100 * line.cells[stop][0]:.1f}%{dense}")
    return f"With {100 * float(stop):g}% of the weights removed, {'; '.join(parts)}."
