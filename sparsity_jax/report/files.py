"""Rows and the environment of a run as files, with checksums."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from sparsity_jax import intact, workdirs
from sparsity_jax.tables import joined
from sparsity_jax.types import AnyPath, Fields, Rows
from sparsity_jax.workdirs import ENVIRONMENT

__all__ = [
    "FAILED",
    "METRICS",
    "REPORT",
    "continued",
    "flatten",
    "plain",
    "read_environment",
    "title_of",
    "to_lines",
    "write_environment",
]

METRICS = "metrics.jsonl"
_OF_THE_START = ("command", "date")  # what a continued run does not change
REPORT = "report.html"
FAILED = "failed members"  # in the environment: by member why it failed, its log and its end


def plain(value: Any) -> Any:
    """`value` as JSON data: NumPy and JAX values become numbers and lists, NaN and infinities null.

    Raises TypeError for anything JSON cannot hold.
    """
    text = json.dumps(value, default=_simpler)
    return json.loads(text, parse_constant=lambda _: None)


def _simpler(value: Any) -> Any:
    """A value that JSON does not know as one that it may know."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(
        f"a row holds {value!r} ({type(value).__name__}); allowed: numbers, text, lists, dicts, "
        "arrays."
    )


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf of a nested dict."""
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from flatten(value, joined(path, key))


# Rows ---------------------------------------------------------------------------------------------


def to_lines(rows: Rows, before: int = 0) -> tuple[str, int]:
    """(the lines of plain rows, with their checksums, the checksum of the last one).

    before: the checksum of the line before the first one, 0 at the start of a file. Raises
    ValueError for a row that does not say its stage and kind.
    """
    text = ""
    for row in rows:
        for field in ("stage", "kind"):
            if field not in row:
                raise ValueError(f"a row lacks {field}; it has: {', '.join(row) or 'nothing'}.")
        line, before = intact.summed_row(json.dumps(row), before)
        text += f"{line}\n"
    return text, before


# The environment ----------------------------------------------------------------------------------


def write_environment(workdir: AnyPath, environment: Fields) -> None:
    """Writes `workdir/environment.json`."""
    path = pathlib.Path(workdir) / ENVIRONMENT
    intact.write_recorded(path, plain(environment))


def read_environment(workdir: AnyPath) -> Fields | None:
    """What `workdir/environment.json` holds; None where there is none, or, aloud, where it was
    changed.
    """
    path = pathlib.Path(workdir) / ENVIRONMENT
    if not path.exists():
        return None
    try:
        return intact.read_recorded(path)
    except intact.DamagedError as error:
        workdirs.say(f"{error}; versions are left out")
        return None


def continued(workdir: AnyPath, environment: Fields) -> Fields:
    """`environment` after that of the run so far: where they differ, both, e.g. `0.10.2, then
    0.11.0`.
    """
    joint = read_environment(workdir) or {}
    for name, value in environment.items():
        old = joint.setdefault(name, value)
        *_, last = str(old).split(", then ")
        if last != str(value) and name not in _OF_THE_START:
            joint[name] = f"{old}, then {value}"
    return joint


def title_of(config: Fields, folder: AnyPath) -> str:
    """Title of a page: the config's, else the folder's name."""
    title = config.get("title")
    if title and isinstance(title, str):
        return title
    return pathlib.Path(folder).resolve().name
