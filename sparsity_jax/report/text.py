"""The summary table of the page as plain text, for a terminal."""

import shutil

import pandas as pd

from sparsity_jax.report import files, series, summary
from sparsity_jax.report.rows import completed
from sparsity_jax.report.sections import MOST_LINES, Cell, Table, only_first
from sparsity_jax.types import Fields, Rows

__all__ = ["summary_of", "text_of"]


def summary_of(config: Fields, rows: Rows, environment: Fields | None = None) -> str:
    """The summary table as the page has it, "" without one."""
    config, rows = files.plain([config, rows])
    grouped = series.group(completed(rows, config, environment or {}))
    section = summary.summary(grouped)
    if section is None:
        return ""
    return text_of(section.tables[0])


def text_of(table: Table) -> str:
    """A table in lines as wide as the terminal: upright, else on its side, else in parts."""
    shown = table.rows[:MOST_LINES]
    heads = [_plain(cell) for cell in table.heads]
    lines = [[_plain(cell) for cell in row] for row in shown]
    frame = pd.DataFrame(lines, columns=heads)
    named = frame.set_index(heads[0]).rename_axis(None)
    text = _fitting(named, shutil.get_terminal_size().columns)
    return text + only_first(MOST_LINES, len(table.rows), "lines")


def _fitting(frame: pd.DataFrame, columns: int) -> str:
    for shown in (frame, frame.T):
        text = shown.to_string()
        if max(map(len, text.splitlines())) <= columns:
            return text
    return frame.to_string(line_width=columns)


def _plain(cell: Cell | str) -> str:
    """What a cell says."""
    if isinstance(cell, str):
        return cell
    if cell.small and not cell.text.endswith(cell.small):
        return f"{cell.text} {cell.small}"
    return cell.text
