"""The page of a comparison: its table, the curves of all networks, and a filter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from sparsity_jax import intact
from sparsity_jax.compare import lines
from sparsity_jax.compare.lines import Comparison
from sparsity_jax.report import draw, files, pruning, sections, training
from sparsity_jax.report.page import TEMPLATES
from sparsity_jax.report.runs import Run, names_of
from sparsity_jax.types import AnyPath, Fields

__all__ = ["PAGE", "write"]

PAGE = "compare.html"
_CURVES = (  # what draws every network in a colour of its own
    pruning.accuracy,
    training.training,
    pruning.loss,
    pruning.accuracy_train,
    training.sfw_init,
)


def write(folder: AnyPath, several: Sequence[Run], comparison: Comparison, title: str) -> Path:
    """Writes `folder/compare.html`, one file without outside parts, of runs and their comparison.

    The same arguments give the same bytes. Returns the path of the page.
    """
    figures = []
    with matplotlib.rc_context(draw.STYLE):
        for show in _CURVES:
            section = show(comparison.grouped)
            if section is not None and section.figure is not None:
                _, drawing = draw.files_of(show.__name__, section.figure)
                figures.append((section, drawing))
    heads = [sections.heading(column.heading) for column in comparison.columns.values()]
    text = TEMPLATES.get_template("compare/page.html.j2").render(
        title=title,
        runs=len(several),
        heads=heads,
        rows=[_row(comparison, line) for line in comparison.lines],
        settings=list(comparison.settings.values()),
        choices=_choices(comparison),
        notes=lines.notes(comparison),
        figures=figures,
        origins=dict(zip(names_of(list(several)), map(_origin, several))),
        colors=draw.COLORS,
    )
    path = Path(folder) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    intact.write(path, draw.printable(text).encode(errors="replace"))
    return path


def _row(comparison: Comparison, line: Any) -> Fields:
    """What the page shows of a line: its network, texts of its settings, cells of its numbers."""
    values = comparison.values(line)
    texts = {name: sections.setting(value) for name, value in values.items()}
    texts["network"] = comparison.label(line)
    return {
        "series": line.series,
        "name": sections.Cell(texts["network"], line.variant, color=line.series),
        "texts": texts,
        "filter": json.dumps(texts),
        "seeds": comparison.seeds(line),
        "cells": [lines.shown(comparison, line, name) for name in comparison.columns],
    }


def _choices(comparison: Comparison) -> dict[str, list[str]]:
    """The values to choose from, by setting; the label of a network is one."""
    rows = [_row(comparison, line)["texts"] for line in comparison.lines]
    names = ["network", *comparison.settings.values()]
    every = {name: list(dict.fromkeys(row[name] for row in rows)) for name in names}
    return {name: values for name, values in every.items() if len(values) > 1}


def _origin(run: Run) -> list[tuple[str, str]]:
    """Where a run comes from, as its environment says."""
    flat = files.flatten(run.environment)
    return [(name, sections.setting(value)) for name, value in flat]
