"""Rows of any runs as one pandas table, with the settings in which the runs differ.

from sparsity_jax import runs

rows = runs.load("runs/a", "runs/b")
last = rows[rows["kind"] == "train"].groupby(["run", "arm", "member"]).last()
"""

import itertools
import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparsity_jax.report.rows import is_seed
from sparsity_jax.report.runs import Run, merged, names_of, runs_in
from sparsity_jax.report.sections import setting
from sparsity_jax.types import AnyPath, Rows

__all__ = ["as_text", "differing", "free_names", "load", "several"]

_UNNAMED = "config."  # before the names of settings that are of no stage, in rows
_PLACE = ["stage", "kind", "visit"]


def several(*workdirs: AnyPath) -> list[Run]:
    """The runs in folders of runs, sweeps, or several runs, each once.

    Raises FileNotFoundError for a folder without a run, ValueError for one that cannot be read.
    """
    every: dict[Path, Run] = {}
    for workdir in workdirs:
        for run in runs_in(workdir):
            every.setdefault(run.folder.resolve(), run)
    return list(every.values())


def load(*workdirs: AnyPath) -> pd.DataFrame:
    """A line per row of all stages of the runs in `workdirs`: folders of runs, sweeps, or several
    runs.

    Columns: `run` (its folder), `member` of that run, `arm` (label of the network), the settings in
    which networks differ by the names they have on the command line (`seed`,
    `fit_sgd.optimizer.learning_rate`; lists as JSON, nothing where a network has no such setting),
    `stage`, `kind`, `visit`, and all other fields of the rows. Accuracies and ratios are fractions.
    Raises ValueError without a folder, and what `several` raises.
    """
    every = several(*workdirs)
    if not every:
        raise ValueError("no folder was given; allowed: at least one folder of a run.")
    rows = merged(every).rows
    settings = differing(rows)
    table = pd.DataFrame(rows)
    for path in settings:
        table[path] = table[path].map(_scalar)
    places = []
    for name, run in zip(names_of(every), every):
        for row in run.rows:
            member = row.get("member", 0)
            places.append((name, member))
    table[["run", "member"]] = pd.DataFrame(places, table.index, ["run", "member"])
    fields = [name for name in table if "." not in name]
    first = ["run", "member", "arm", *settings, *filter(is_seed, table), *_PLACE]
    order = dict.fromkeys([*first, *fields])
    there = [name for name in order if name in table]
    told = table[there].dropna(axis="columns", how="all")
    return told.rename(columns=free_names(settings, fields))


def differing(rows: Rows) -> list[str]:
    """Names of the settings, but seeds, in which the networks of merged rows differ."""
    names = dict.fromkeys(itertools.chain(*rows))
    paths = [name for name in names if "." in name and not is_seed(name)]
    differ = []
    for path in paths:
        values = {as_text(row.get(path)) for row in rows}
        if len(values) > 1:
            differ.append(path)
    return differ


def free_names(settings: Sequence[str], fields: Container[str]) -> dict[str, str]:
    """By the names of settings in rows, those on the command line, unless a field has that name."""
    names = {path: path.removeprefix(_UNNAMED) for path in settings}
    return {path: path if name in fields else name for path, name in names.items()}


def as_text(value: Any) -> str:
    """A setting as JSON, to compare it."""
    return json.dumps(value, default=str)


def _scalar(value: Any) -> Any:
    """A setting as a cell that can be compared and grouped by."""
    if isinstance(value, (list, dict)):
        return setting(value)
    return value
