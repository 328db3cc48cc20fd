"""Rows and the environment of a run as files, with checksums."""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sparsity_jax import intact, workdirs

METRICS, CONFIG = "metrics.jsonl", "config.json"
ENVIRONMENT, REPORT = "environment.json", "report.html"
Rows = list[dict]
AnyPath = str | os.PathLike[str]


def plain(value: Any) -> Any:
    """`value` as JSON data: NumPy and JAX values become numbers and lists, NaN and infinities null.

    Raises TypeError for anything JSON cannot hold.
    """
    text = json.dumps(value, default=simpler)
    return json.loads(text, parse_constant=lambda _: None)


def simpler(value: Any) -> Any:
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


def flatten(tree: Any, path: str = "", separator: str = ".") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of a nested dict."""
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{path}{separator}{key}" if path else str(key), separator)


def write_atomic(path: pathlib.Path, data: bytes) -> None:
    """Replaces `path` at once: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def to_lines(rows: Iterable[Mapping], before: int = 0) -> tuple[str, int]:
    """(the lines of rows, with their checksums, the checksum of the last one).

    before: the checksum of the line before the first one, 0 at the start of a file. Raises
    ValueError for a row that does not say its stage and kind.
    """
    lines = []
    for row in rows:
        missing = [field for field in ("stage", "kind") if field not in row]
        if missing:
            has = ", ".join(map(str, row)) or "nothing"
            raise ValueError(f"a row lacks {' and '.join(missing)}; it has: {has}.")
        text = json.dumps(plain(row), allow_nan=False)
        line, before = intact.summed_row(text, before)
        lines.append(line + "\n")
    return "".join(lines), before


def read_rows(path: AnyPath) -> Rows:
    """Rows of a metrics file, without their checksums.

    A last line cut off by a killed run is left out. Raises ValueError with the line number for any
    other line that is not one JSON object, or not as it was written.
    """
    path = pathlib.Path(path)
    lines = path.read_bytes().split(b"\n")
    rows, total = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row, total = intact.read_row(line, total)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: {error}. Each line holds one row as a JSON object."
            ) from error
        rows.append(row)
    return rows


def read_dict(path: pathlib.Path) -> dict:
    """The JSON object in a file; ValueError, which names the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; it must hold a JSON object.")
    return value


def write_environment(workdir: AnyPath, environment: dict) -> None:
    """Writes `workdir/environment.json`."""
    path = pathlib.Path(workdir) / ENVIRONMENT
    text = json.dumps(plain(environment), indent=2)
    write_atomic(path, f"{text}\n".encode())
    intact.record(path)


def read_environment(workdir: AnyPath) -> dict | None:
    """What `workdir/environment.json` holds; None where there is none, or, aloud, where it was
    changed.
    """
    path = pathlib.Path(workdir) / ENVIRONMENT
    try:
        if not path.exists():
            return None
        if intact.is_changed(path):
            raise ValueError(f"{path} is not as it was written (its checksum differs)")
        return read_dict(path)
    except ValueError as error:
        workdirs.say(f"{error}; versions are left out")
        return None


def continued(workdir: AnyPath, environment: dict) -> dict:
    """`environment` after that of the run so far: where they differ, both, e.g. `0.10.2, then
    0.11.0`.
    """
    joined = read_environment(workdir) or {}
    for name, value in environment.items():
        old = joined.setdefault(name, value)
        last = str(old).split(", then ")[-1]
        if last != str(value) and name != "command":
            joined[name] = f"{old}, then {value}"
    return joined
