"""The one door for results: rows to `metrics.jsonl` and TensorBoard, and rows to one `report.html`.

Reads rows and the config as plain data, never models. Rebuild a report: `python -m
sparsity_jax.report --workdir DIR`.
"""

import pathlib

from sparsity_jax.report.events import Writer
from sparsity_jax.report.files import (
    FAILED,
    METRICS,
    REPORT,
    continued,
    plain,
    read_environment,
    write_environment,
)
from sparsity_jax.report.runs import gather, read_rows
from sparsity_jax.types import AnyPath, Fields, Rows
from sparsity_jax.workdirs import ENVIRONMENT

__all__ = [
    "ENVIRONMENT",
    "FAILED",
    "METRICS",
    "REPORT",
    "Writer",
    "continued",
    "gather",
    "plain",
    "read_environment",
    "read_rows",
    "summary_of",
    "write",
    "write_environment",
]


def write(
    workdir: AnyPath,
    config: Fields,
    rows: Rows,
    *,
    title: str | None = None,
    environment: Fields | None = None,
) -> pathlib.Path:
    """Writes `workdir/report.html`, one file without outside parts, and `workdir/figures/NAME.png`.

    title: default `config["title"]`, else the folder's name. environment: versions, devices and, as
    `command`, what was run; it is kept in `workdir/environment.json` so that a rebuilt report shows
    it too. The same arguments give the same bytes. Sections without rows are left out; rows that no
    figure shows become a table. Returns the path of the page.
    """
    from sparsity_jax.report import page  # imports pandas and matplotlib, which takes a second

    return page.write(workdir, config, rows, title=title, environment=environment)


def summary_of(config: Fields, rows: Rows, environment: Fields | None = None) -> str:
    """The summary table of the page as text, as wide as the terminal; "" without one."""
    from sparsity_jax.report import text  # imports pandas, which takes a second

    return text.summary_of(config, rows, environment)
