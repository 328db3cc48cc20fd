"""Networks beside each other: a line per setting, with means and deviations over seeds alone."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from sparsity_jax import runs
from sparsity_jax.report import sections, series, summary
from sparsity_jax.report.rows import member_of, number
from sparsity_jax.report.sections import Cell
from sparsity_jax.report.series import Grouped, Series
from sparsity_jax.report.summary import Column, Numbers, Summary
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import Fields, Rows

__all__ = [
    "RATIOS",
    "Comparison",
    "compared",
    "markdown",
    "notes",
    "numbers",
    "shown",
    "texts",
    "told",
]

RATIOS = (0.9, 0.95, 0.98, 0.99)  # shares removed whose accuracies have a column
_USUAL = {"width": "predicted", "limit": "limit"}  # kinds of rows, and the number that counts
_SHARES = ("predicted", "limit", "low", "high", "sparsity", "sparsity_all")
_LAST = ("largest", "epochs", "seconds")  # columns behind all others
_ACCURACY = ".2%"  # the form of columns of accuracies
_MOST_NAMES = 8  # of settings in a sentence


class Comparison(NamedTuple):
    """Lines of a table. grouped: the networks that differ in nothing but the seed. settings: what
    tells them apart besides the label, by name in rows as on the command line. also: names of
    settings that differ only together with these. columns: of the numbers, by name, in order.
    """

    grouped: Grouped
    lines: list[Summary]
    settings: dict[str, str]
    also: list[str]
    columns: dict[str, Column]

    def rows(self, line: Summary) -> Rows:
        """All rows of a line's networks."""
        return self.grouped[line.series].rows

    def label(self, line: Summary) -> str:
        """The label of a line's networks in their own run."""
        return _arm_of(self.grouped[line.series])

    def values(self, line: Summary) -> Fields:
        """The settings of a line by their names on the command line."""
        row = self.rows(line)[0]
        return {name: row.get(path) for path, name in self.settings.items()}

    def seeds(self, line: Summary) -> int:
        """How many networks a line is about."""
        rows = self.rows(line)
        networks = set(map(member_of, rows))
        return len(networks)


def compared(
    rows: Rows,
    *,
    ratios: Sequence[float] = RATIOS,
    metrics: Sequence[str] = (),
    decimals: int = 2,
) -> Comparison:
    """Rows of one run, or of several as `report.gather` gives them, as lines of a table.

    A line per pruning curve and per trained network of every setting, see `summary.summarize`.
    ratios: shares removed whose accuracy it tells. metrics: names `STAGE.FIELD` of further numbers,
    of which the last one of every network counts; default: predicted and found limits.
    decimals: of accuracies and limits in percent. Raises ConfigError for a name that no row has.
    """
    every = runs.differing(rows)
    grouped = series.group(rows)
    telling = _telling(grouped, every)
    labelled = []
    for one in grouped:
        label = series.label_of(one.rows[0], telling)
        labelled.append(one._replace(label=label))
    chosen = _chosen_metrics(rows, metrics)
    lines = _lines_of(labelled, ratios, chosen)
    fields = set().union(*rows)
    names = runs.free_names(every, fields)
    settings = {path: names.pop(path) for path in telling}
    columns = _columns_of(lines, ratios, chosen)
    for name, column in columns.items():
        if column.form == _ACCURACY:
            columns[name] = column._replace(form=f".{decimals}%")
    return Comparison(labelled, lines, settings, list(names.values()), columns)


def _arm_of(one: Series) -> str:
    """The label of networks in their own run."""
    return str(one.rows[0].get("arm", "run"))


def _telling(grouped: Grouped, settings: Sequence[str]) -> list[str]:
    """The settings that tell networks of one label apart, each in a way of its own."""
    labels = list(map(_arm_of, grouped))
    firsts = [one.rows[0] for one in grouped]
    telling: dict[tuple, str] = {}
    for path in settings:
        values = [runs.as_text(row.get(path)) for row in firsts]
        parts = tuple(map(values.index, values))
        pairs = set(zip(labels, parts))
        if len(pairs) > len(set(labels)):
            telling.setdefault(parts, path)
    return list(telling.values())


def _lines_of(grouped: Grouped, ratios: Sequence[float], metrics: Sequence[str]) -> list[Summary]:
    """Lines of the report's summary, with metrics; one of every other series that has a metric."""
    lines = summary.summarize(grouped, stops=ratios)
    there = {line.series for line in lines}
    for index, one in enumerate(grouped):
        if index not in there:
            empty = Summary(index, one.label, "", {})
            lines.append(empty)
    lines.sort(key=lambda line: line.series)
    for line in lines:
        for name in metrics:
            last = _last_numbers(grouped[line.series], name)
            if last[2]:
                line.cells[name] = last
    return [line for line in lines if line.cells]


def _columns_of(
    lines: Sequence[Summary], ratios: Sequence[float], metrics: Sequence[str]
) -> dict[str, Column]:
    """All columns that some line has: shares in the order given, times last; no `dense` where the
    share 0 tells it.
    """
    there: dict[str, Numbers] = {}
    for line in lines:
        there |= line.cells
    if all("0.0" in line.cells for line in lines):
        there.pop("dense", None)  # the same once more
    shares = list(map(str, ratios))
    behind = (*shares, *metrics, *_LAST)
    first = [name for name in there if name not in behind]
    columns = {}
    for name in (*first, *behind):
        if name in metrics:
            columns[name] = _column_of(name)
        elif name in there:
            columns[name] = summary.column_of(name)
    return columns


# Metrics ------------------------------------------------------------------------------------------


def _chosen_metrics(rows: Rows, names: Sequence[str]) -> list[str]:
    """The metrics of these names; without any, those that are usual for the kinds of rows.

    Raises ConfigError for a name that no row has.
    """
    known: dict[str, bool] = {}
    for row in rows:
        stage = row.get("stage")
        usual = _USUAL.get(str(row.get("kind")))
        for field, value in row.items():
            if "." not in field and isinstance(value, (int, float)):
                known[f"{stage}.{field}"] = field == usual
    for name in names:
        if name not in known:
            raise ConfigError("--metric", name, why="which no row has", known=known)
    return list(names) or [name for name, is_usual in known.items() if is_usual]


def _column_of(name: str) -> Column:
    """The column of a metric."""
    field = name.rpartition(".")[2]
    if field in _SHARES or field.endswith("accuracy"):
        return Column(f"{name}|%", _ACCURACY)
    return Column(name, "")


def _last_numbers(one: Series, name: str) -> Numbers:
    """Mean, deviation and count of the last number of every network."""
    stage, _, field = name.rpartition(".")
    last = {}
    for row in one.rows:
        value = number(row.get(field))
        is_known = value == value  # not NaN
        if is_known and row.get("stage") == stage:
            member = member_of(row)
            last[member] = value
    return series.spread(last.values())


# Texts --------------------------------------------------------------------------------------------


def told(values: Numbers, form: str = ".1%") -> str:
    """A mean and, of several numbers, its deviation: `98.7 ± 0.2`; shares in percent."""
    cell = sections.mean_cell(*values, form)
    return _text_of(cell)


def _text_of(cell: Cell) -> str:
    return f"{cell.text} {cell.small}".strip()


def shown(comparison: Comparison, line: Summary, name: str) -> Cell:
    """A number of a line: mean, deviation, and of how many seeds where some have none."""
    if name not in line.cells:
        return Cell("–")
    mean, deviation, count = line.cells[name]
    form = comparison.columns[name].form
    if form:
        cell = summary.shown(line, name, form)
    else:
        cell = Cell(sections.amount(mean))
        spread = sections.amount(deviation)
        if count > 1:
            cell = cell._replace(small=f"± {spread}")
    if count < comparison.seeds(line):
        return cell._replace(small=f"{cell.small} (n={count})".strip())
    return cell


def notes(comparison: Comparison) -> list[str]:
    """Sentences on what the numbers are, and on what is not averaged."""
    sentences = summary.notes_of(comparison.lines) if comparison.lines else []
    for path in comparison.settings:
        place, _, fact = path.partition(".")
        if place == "environment":
            sentences.append(f"Runs that differ in {fact} are not averaged.")
        if path == "config.run":
            sentences.append("Runs with the same settings and the same seed are not averaged.")
    if comparison.also:
        first = comparison.also[:_MOST_NAMES]
        names = ", ".join(first)
        rest = sections.only_first(_MOST_NAMES, len(comparison.also), "names")
        sentences.append(f"Differing together with these: {names}.{rest}")
    return sentences


def numbers(comparison: Comparison) -> pd.DataFrame:
    """A line each: label, curve, settings, seeds, and per number its mean, deviation and count."""
    lines = []
    for line in comparison.lines:
        own: Fields = {"network": comparison.label(line), "curve": line.variant}
        own |= comparison.values(line)
        own["seeds"] = comparison.seeds(line)
        for name in comparison.columns:
            mean, deviation, count = line.cells.get(name, (None, None, 0))
            own[name] = mean
            several = count > 1
            own[f"{name} std"] = deviation if several else None
            own[f"{name} count"] = count
        lines.append(own)
    return pd.DataFrame(lines)


def texts(comparison: Comparison) -> pd.DataFrame:
    """The same for a reader, a text per number."""
    lines = []
    for line in comparison.lines:
        own = {"network": comparison.label(line), "curve": line.variant}
        for name, value in comparison.values(line).items():
            own[name] = sections.setting(value)
        own["seeds"] = str(comparison.seeds(line))
        for name, column in comparison.columns.items():
            cell = shown(comparison, line, name)
            head = column.heading.replace("%|%", "%").replace("|", " ")
            own[head] = _text_of(cell)
        lines.append(own)
    table = pd.DataFrame(lines)
    needed = (table != "").any()  # not the curves, where they need no telling
    return table.loc[:, needed]


def markdown(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    table = texts(comparison)
    rule = ["---"] * table.shape[1]
    rows = table.to_numpy().tolist()
    lines = []
    for cells in (list(table.columns), rule, *rows):
        escaped = [text.replace("|", r"\|") for text in cells]
        inside = " | ".join(escaped)
        lines.append(f"| {inside} |\n")
    return "".join(lines)
