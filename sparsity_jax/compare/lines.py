"""Networks beside each other: a line per setting, with means and deviations over seeds alone."""

import json
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

    def label(self, line: Summary) -> str:
        """The label of a line's networks in their own run."""
        return str(self.grouped[line.series].rows[0].get("arm", "run"))

    def values(self, line: Summary) -> Fields:
        """The settings of a line by their names on the command line."""
        row = self.grouped[line.series].rows[0]
        return {name: row.get(path) for path, name in self.settings.items()}

    def seeds(self, line: Summary) -> int:
        """How many networks a line is about."""
        return len({member_of(row) for row in self.grouped[line.series].rows})


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
    grouped = [one._replace(label=series.label_of(one.rows[0], telling)) for one in grouped]
    known = _metrics_in(rows)
    for name in metrics:
        if name not in known:
            raise ConfigError("--metric", name, why="which no row has", known=known)
    if not metrics:
        metrics = [name for name, kind in known.items() if _field_of(name) == _USUAL.get(kind)]
    lines = []
    for line in _summaries(grouped, ratios):
        last = {name: _last_numbers(grouped[line.series], name) for name in metrics}
        cells = {name: values for name, values in last.items() if values[2]}
        lines.append(line._replace(cells={**line.cells, **cells}))
    lines = [line for line in lines if line.cells]
    names = runs.free_names(every, {name for row in rows for name in row})
    settings = {path: names[path] for path in telling}
    also = [names[path] for path in every if path not in telling]
    columns = _columns_of(lines, metrics, ratios)
    for name, column in columns.items():
        if column.form == _ACCURACY:
            columns[name] = column._replace(form=f".{decimals}%")
    return Comparison(grouped, lines, settings, also, columns)


def _telling(grouped: Grouped, settings: Sequence[str]) -> list[str]:
    """The settings that tell networks of one label apart, each in a way of its own."""
    labels = [one.rows[0].get("arm") for one in grouped]
    telling: dict[tuple, str] = {}
    for path in settings:
        values = [json.dumps(one.rows[0].get(path), default=str) for one in grouped]
        parts = tuple(values.index(value) for value in values)
        if len({*zip(labels, parts)}) > len({*labels}):
            telling.setdefault(parts, path)
    return list(telling.values())


def _summaries(grouped: Grouped, ratios: Sequence[float]) -> list[Summary]:
    """Lines of the report's summary, and one without numbers of every other series."""
    lines = summary.summarize(grouped, stops=ratios)
    there = {line.series for line in lines}
    for index, one in enumerate(grouped):
        if index not in there:
            lines.append(Summary(index, one.label, "", {}))
    return sorted(lines, key=lambda line: line.series)


def _columns_of(
    lines: Sequence[Summary], metrics: Sequence[str], ratios: Sequence[float]
) -> dict[str, Column]:
    """All columns that some line has: shares in the order given, times last."""
    shares = [str(ratio) for ratio in ratios]
    there = dict.fromkeys(name for line in lines for name in line.cells)
    placed = {*metrics, *shares, *_LAST}
    first = [name for name in there if name not in placed]
    columns = {}
    for name in (*first, *shares, *metrics, *_LAST):
        if name in there:
            columns[name] = _metric(name) if name in metrics else summary.column_of(name)
    return columns


# Metrics ------------------------------------------------------------------------------------------


def _field_of(name: str) -> str:
    """The field of a metric `STAGE.FIELD`."""
    return name.rpartition(".")[2]


def _metric(name: str) -> Column:
    """The column of a metric."""
    field = _field_of(name)
    if field in _SHARES or field.endswith("accuracy"):
        return Column(f"{name}|%", _ACCURACY)
    return Column(name, "")


def _metrics_in(rows: Rows) -> dict[str, str]:
    """The kind of stage by the names of all metrics that rows have."""
    known = {}
    for row in rows:
        for field, value in row.items():
            if "." not in field and isinstance(value, (int, float)):
                known[f"{row.get('stage')}.{field}"] = str(row.get("kind"))
    return known


def _last_numbers(one: Series, name: str) -> Numbers:
    """Mean, deviation and count of the last number of every network."""
    stage, _, field = name.rpartition(".")
    last = {}
    for row in one.rows:
        value = number(row.get(field))
        if row.get("stage") == stage and value == value:  # not NaN
            last[member_of(row)] = value
    return series.spread(last.values())


# Texts --------------------------------------------------------------------------------------------


def told(values: Numbers, form: str = ".1%") -> str:
    """A mean and, of several numbers, its deviation: `98.7 ± 0.2`; shares in percent."""
    cell = sections.mean_cell(*values, form)
    return f"{cell.text} {cell.small}".strip()


def shown(comparison: Comparison, line: Summary, name: str) -> Cell:
    """A number of a line: mean, deviation, and of how many seeds where some have none."""
    if name not in line.cells:
        return Cell("–")
    mean, deviation, count = line.cells[name]
    if comparison.columns[name].form:
        cell = summary.shown(line, name, comparison.columns[name].form)
    else:
        spread = f"± {sections.amount(deviation)}" if count > 1 else ""
        cell = Cell(sections.amount(mean), spread)
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
        names = ", ".join(comparison.also[:_MOST_NAMES])
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
            own[f"{name} std"] = deviation if count > 1 else None
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
            own[head] = f"{cell.text} {cell.small}".strip()
        lines.append(own)
    table = pd.DataFrame(lines)
    return table.loc[:, (table != "").any()]  # without curves that need no telling


def markdown(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    table = texts(comparison)
    lines = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    escaped = [[text.replace("|", r"\|") for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
