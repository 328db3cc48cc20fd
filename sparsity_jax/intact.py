"""Checksums: whether files are still as they were written.

`SHA256SUMS` in a folder has the lines of the tool `sha256sum`, whose `--check` verifies it too.
Rows of a file that grows carry a checksum each, of their own text and all before it.
"""

import hashlib
import json
import re
import uuid
import zlib
from pathlib import Path
from typing import Any

from sparsity_jax import tables
from sparsity_jax.types import Config, Fields

__all__ = [
    "SUMS",
    "DamagedError",
    "damage",
    "digest_of",
    "digest_of_value",
    "read_object",
    "read_recorded",
    "read_row",
    "read_sums",
    "record",
    "remove",
    "seal",
    "summed_row",
    "write",
    "write_object",
    "write_recorded",
]

SUMS = "SHA256SUMS"
_ROW_SUM = re.compile(rb', "sum": "([0-9a-f]{8})"\}$')


class DamagedError(tables.ConfigError):
    """A file is not as it was written, and no other copy is whole; the message names it."""


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Folders ------------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Writes `folder/SHA256SUMS` of all files in `folder` and below."""
    _write_sums(folder, {name: digest_of(path) for name, path in _files_in(folder).items()})


def _files_in(folder: Path) -> dict[str, Path]:
    """The files that `folder/SHA256SUMS` is of, by name."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / SUMS:
            files[path.relative_to(folder).as_posix()] = path
    return files


def damage(folder: Path) -> str:
    """What of a sealed folder is not as it was written, or "" if all is."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    sums = read_sums(folder)
    if not sums:
        return f"{folder / SUMS} is missing or holds no checksum"
    there = _files_in(folder)
    for name in sorted({*sums, *there}):
        if name not in there:
            return f"{folder / name} is missing"
        if name not in sums:
            return f"{folder / name} has no checksum in {SUMS}"
        if digest_of(folder / name) != sums[name]:
            return f"{folder / name} is not as it was written"
    return ""


def record(path: Path) -> None:
    """Writes the checksum of the file `path` to `SHA256SUMS` beside it."""
    _write_sums(path.parent, {**read_sums(path.parent), path.name: digest_of(path)})


def remove(path: Path) -> None:
    """Removes the file `path` and its recorded checksum."""
    path.unlink(missing_ok=True)
    sums = read_sums(path.parent)
    sums.pop(path.name, None)
    _write_sums(path.parent, sums)


def read_sums(folder: Path) -> dict[str, str]:
    """Checksums in `folder/SHA256SUMS` by name; lines that are none are left out."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
    write(folder / SUMS, "".join(lines).encode())


# Files --------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> None:
    """Replaces `path` at once: a reader sees the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_object(path: Path, value: Config) -> None:
    """Replaces `path` by JSON."""
    write(path, f"{json.dumps(value, indent=2)}\n".encode())


def write_recorded(path: Path, value: Config) -> None:
    """Replaces `path` by JSON whose checksum is recorded."""
    write_object(path, value)
    record(path)


def read_recorded(path: Path) -> Fields:
    """The JSON object in a file; raises DamagedError too where it differs from its recorded
    checksum, if it has one.
    """
    value = read_object(path)
    if read_sums(path.parent).get(path.name, digest_of(path)) != digest_of(path):
        raise DamagedError(f"{path} is not as it was written (its checksum differs)")
    return value


def read_object(path: Path) -> Fields:
    """The JSON object in a file; raises DamagedError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} holds no JSON object but a {type(value).__name__}")
    return value


# Values and rows ----------------------------------------------------------------------------------


def digest_of_value(value: Any) -> str:
    """SHA-256 of JSON data, whatever the order of its fields and the space between them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def summed_row(line: str, before: int) -> tuple[str, int]:
    """(a JSON object's text with its checksum as a last field "sum", the checksum); before: that of
    the line before.
    """
    total = zlib.crc32(line.encode(), before)
    return f'{line[:-1]}, "sum": "{total:08x}"}}', total


def read_row(line: bytes, before: int) -> tuple[dict, int]:
    """(the row of a line without its checksum, the checksum); lines without one are taken as they
    are.

    Raises ValueError for what is no JSON object, and where line and checksum do not fit.
    """
    found = _ROW_SUM.search(line)
    text = line[: found.start()] + b"}" if found else line
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    total = zlib.crc32(text, before)
    if found and int(found[1], 16) != total:
        raise ValueError("not as it was written (its checksum differs)")
    return row, total
