"""What a function that shows rows returns: a section of the page with a drawing, tables or both."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

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
    remarks: tuple[str, ...] = ()


class Section(NamedTuple):
    """A section of the page. fold: what a reader unfolds to see the drawing, "" if it is open.

    statements: (what it is about, text, caution).
    """

    heading: str
    figure: Figure | None = None
    caption: str = ""
    fold: str = ""
    statements: tuple[tuple[str, str, str], ...] | list[tuple[str, str, str]] = ()
    tables: tuple[Table, ...] | list[Table] = ()


def headings(columns: Iterable[str]) -> Cells:
    """Headings of columns, with the unit behind "|": "accuracy|%"."""
    return [Cell(*column.partition("|")[::2]) for column in columns]


def filled(columns: Mapping[str, str], row: Mapping[str, Any]) -> Cells:
    """A cell per column, of its template, whose part behind "|" is set small."""
    cells: Cells = []
    for template in columns.values():
        text, _, small = template.partition("|")
        cells.append(Cell(fill(text, row), fill(small, row).strip("–")))
    return cells


def fill(template: str, row: Mapping[str, Any]) -> str:
    """`template` with fields of a row, shares without the sign; "–" where one is missing."""
    known = {key: value for key, value in row.items() if value == value}  # not NaN
    try:
        return template.format_map(known).replace("%", "")
    except (KeyError, TypeError):
        return "–"


def mean_cell(mean: float, deviation: float, count: int, form: str = ".2f") -> Cell:
    """A mean share in percent and, of several networks, its deviation."""
    small = f"± {100 * deviation:.2f}" if count > 1 else ""
    return Cell(format(100 * mean, form), small)


def amount(value: float) -> str:
    """A number with all its digits before the point, and four at least: 13,706 and 0.05082."""
    if math.isnan(value):
        return "–"
    whole = abs(value) >= 1000 or value == round(value)
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def setting(value: Any) -> str:
    """A setting, or a field of a row, as a reader would write it; "–" for NaN."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def joined(*parts: str) -> str:
    """The parts that say something."""
    return ", ".join(part for part in parts if part)


def only_first(shown: int, count: int, what: str) -> str:
    """A sentence that says how many are shown, "" if all are."""
    return f" The first {shown} of {count}{what}." if count > shown else ""
