"""What a function that shows rows returns: a section of the page with a drawing, tables or both."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from sparsity_jax.types import Row

__all__ = [
    "MOST_LINES",
    "Cell",
    "Cells",
    "Section",
    "Shown",
    "Table",
    "amount",
    "heading",
    "joined",
    "mean_cell",
    "only_first",
    "setting",
    "table",
]

_NOTHING = "–"  # in a cell without a number
MOST_LINES = 60  # lines of a table that may be long


class Cell(NamedTuple):
    """A cell of a table, or a heading. color: index of the series or prediction it is about."""

    text: str
    small: str = ""
    bold: bool = False
    color: int | None = None


Cells = list[Cell | str]


class Table(NamedTuple):
    """Headings, and rows of as many cells or texts. words: the columns that hold words."""

    heads: Sequence[Cell | str]
    rows: Sequence[Sequence[Cell | str]]
    words: tuple[int, ...] = (0,)
    note: str = ""


class Section(NamedTuple):
    """A section of the page. fold: what a reader unfolds to see the drawing, "" if it is open.

    statements: (what it is about, text, caution).
    """

    heading: str
    figure: Figure | None = None
    caption: str = ""
    fold: str = ""
    statements: Sequence[tuple[str, str, str]] = ()
    tables: Sequence[Table] = ()


Shown = Section | None  # None without the rows that it shows


def table(
    about: str,
    columns: Mapping[str, str],
    lines: Sequence[tuple[Cell | str, Row]],
    *,
    note: str = "",
) -> Table:
    """A table of the first lines (name, row), without columns that say nothing. columns: heading to
    template, see `_cell`.
    """
    heads: Cells = [about]
    rows: list[Cells] = [[name] for name, _ in lines]
    for head, template in columns.items():
        cells = [_cell(template, row) for _, row in lines]
        if any(told.text not in ("", _NOTHING) for told in cells):
            heads.append(heading(head))
            for row, told in zip(rows, cells):
                row.append(told)
    note += only_first(MOST_LINES, len(rows), "lines")
    return Table(heads, rows[:MOST_LINES], note=note)


def heading(text: str) -> Cell:
    """A heading with its unit, which stands behind "|": "accuracy|%"."""
    name, _, unit = text.partition("|")
    return Cell(name, unit)


def _cell(template: str, row: Row) -> Cell:
    """`template` filled with fields of a row; what stands behind "|" is set small, or left out."""
    text, _, small = template.partition("|")
    return Cell(_fill(text, row, _NOTHING), _fill(small, row, ""))


def _fill(template: str, row: Row, missing: str) -> str:
    """`template` with fields of a row, shares without the sign; `missing` if one is."""
    known = {key: value for key, value in row.items() if value == value}  # not NaN
    try:
        return template.format_map(known).replace("%", "")
    except (KeyError, TypeError):
        return missing


def mean_cell(mean: float, deviation: float, count: int, form: str = ".2%") -> Cell:
    """A mean and, of several numbers, its deviation; shares in percent, without the sign."""
    if not count:
        return Cell("–")
    text = f"{mean:{form}}".replace("-", "−")
    small = f"± {deviation:{form.strip('+')}}" if count > 1 else ""
    return Cell(text.strip("%"), small.strip("%"))


def amount(value: float) -> str:
    """A number with all its digits before the point, and four at least: 13,706 and 0.05082."""
    if value != value:  # NaN
        return "–"
    whole = abs(value) >= 1000 or value == round(value)
    if whole:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def setting(value: Any) -> str:
    """A setting, or a field of a row, as a reader would write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def joined(*parts: str) -> str:
    """The parts that say something."""
    return ", ".join(filter(None, parts))


def only_first(shown: int, count: int, what: str) -> str:
    """A sentence that says how many are shown, "" if all are."""
    if count > shown:
        return f" The first {shown} of {count} {what}."
    return ""
