"""What a function that shows rows returns: a section of the page with a drawing, tables or both."""

import json
import math
from typing import Any, NamedTuple

from matplotlib.figure import Figure

MOST = 60  # lines of a table that may be long


class Cell(NamedTuple):
    """A cell of a table, or a heading. color: index of the series or prediction it is about."""

    text: str
    small: str = ""
    bold: bool = False
    color: int | None = None


class Table(NamedTuple):
    """Headings, and rows of as many cells or texts. words: the columns that hold words."""

    heads: list[Cell | str]
    rows: list[list[Cell | str]]
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
    statements: tuple[tuple[str, str, str], ...] = ()
    tables: tuple[Table, ...] | list[Table] = ()


def percent(value: float, decimals: int = 2) -> str:
    """A share in percent, without the sign; "–" for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.{decimals}f}"


def mean_cell(mean: float, deviation: float, count: int, form: str = ".2f") -> Cell:
    """A mean share in percent and, of several networks, its deviation."""
    small = f"± {100 * deviation:.2f}" if count > 1 else ""
    return Cell(format(100 * mean, form), small)


def fill(template: str, row: dict) -> str:
    """`template` with fields of a row, shares without the sign; "–" where one is missing."""
    try:
        return template.format_map(row).replace("%", "")
    except (KeyError, TypeError):
        return "–"


def amount(value: float) -> str:
    """A number with all its digits before the point, and four at least: 13,706 and 0.05082."""
    if math.isnan(value):
        return "–"
    whole = abs(value) >= 1000 or value == round(value)
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def setting(value: Any) -> str:
    """A setting, or a field of a row, as a reader would write it."""
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def name(*parts: str) -> str:
    """The parts that say something."""
    return ", ".join(part for part in parts if part)


def first(shown: int, count: int, what: str) -> str:
    """A sentence that says how many are shown, "" if all are."""
    return f" The first {shown} of {count}{what}." if count > shown else ""
