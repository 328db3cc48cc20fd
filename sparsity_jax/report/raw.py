"""Rows as they are, in tables: of stages that prune, and those that no figure shows."""

from collections.abc import Callable

from sparsity_jax.report.sections import (
    MOST_LINES,
    Cell,
    Cells,
    Section,
    Shown,
    Table,
    only_first,
    setting,
)
from sparsity_jax.report.series import Grouped
from sparsity_jax.types import Row

__all__ = ["STEPS", "pruned", "unknown"]

STEPS = ("prune", "remove", "grow", "oracle", "noise", "jacobian")  # kinds that prune or measure it
_KNOWN = ("kind", "arm")  # fields that the heading and the name say, as they do settings


def pruned(grouped: Grouped) -> Shown:
    """Rows of stages that prune, or measure a pruned network, as they are."""
    removes = lambda row: row.get("kind") != "grow" or "layers" in row
    told = lambda row: row.get("kind") in STEPS and removes(row)
    return _section("Pruning steps", grouped, told)


def unknown(grouped: Grouped, kind: str, file: str = "FILE") -> Shown:
    """Rows of a kind that no figure shows, as they are. file: that registered their stage."""
    note = f"No figure here shows rows of {kind}. One of your own comes with --import {file}."
    is_meant = lambda row: str(row.get("kind")) == kind
    return _section(f"Rows of {kind}", grouped, is_meant, note)


def _section(heading: str, grouped: Grouped, told: Callable[[Row], bool], note: str = "") -> Shown:
    """A table of the rows of which `told` holds: every field that is a number or a text."""
    lines: list[tuple[Cell, Row]] = []
    heads: dict[str, None] = {}
    for index, one in enumerate(grouped):
        for row in filter(told, one.rows):
            lines.append((Cell(one.label, color=index), row))
            for field, value in row.items():
                if (
                    isinstance(value, (str, int, float))
                    and field not in _KNOWN
                    and "." not in field
                ):
                    heads[field] = None
    if not heads:
        return None
    rows: list[Cells] = []
    for name, row in lines[:MOST_LINES]:
        cells = [setting(row.get(field, "–")) for field in heads]
        rows.append([name, *cells])
    words = tuple(range(len(heads) + 1))
    note = f"{only_first(MOST_LINES, len(lines), 'rows')} {note}".strip()
    return Section(heading, tables=[Table(["network", *heads], rows, words, note)])
