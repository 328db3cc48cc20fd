"""The folder of a member that runs where the workdir cannot be seen: its files there and back.

A checkpoint travels as a whole, and appears in the workdir as a whole.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from sparsity_jax import intact, kept, lock, workdirs

__all__ = ["ATTEMPT_LOCK", "LOG", "Changes", "Source", "apply", "start"]

LOG = "log.txt"  # what a worker says of a member
ATTEMPT_LOCK = "attempt.lock"  # where the launcher's own lock is in the same folder
# what each side writes for itself
_STAYING = (lock.FILE, ATTEMPT_LOCK, lock.ATTEMPTED, "config.json", intact.SUMS)


class Changes(NamedTuple):
    """What is new in a folder. files: contents by path. checkpoints: numbers of all that are whole
    there.
    """

    files: dict[str, bytes]
    checkpoints: list[int]


class Source:
    """A folder whose changes are asked for again and again."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[str, tuple[int, int]] = {}

    def changes(self) -> Changes:
        """All that was written since the last call."""
        numbers = workdirs.numbers_in(self._folder / workdirs.FOLDER)
        files: dict[str, bytes] = {}
        for number in list(numbers):
            try:
                files |= self._changed(self._folder / workdirs.FOLDER / str(number))
            except FileNotFoundError:  # a newer one has replaced it meanwhile
                numbers.remove(number)
        files |= self._changed(self._folder, besides=workdirs.FOLDER)
        return Changes(files, numbers)

    def _changed(self, folder: Path, besides: str = "") -> dict[str, bytes]:
        """The new contents below `folder`, lists of checksums last."""
        found = {}
        known = {}
        for path in sorted(folder.rglob("*"), key=lambda path: path.name == intact.SUMS):
            name = path.relative_to(self._folder).as_posix()
            if not path.is_file() or _is_left_out(name, besides):
                continue
            stat = path.stat()
            known[name] = (stat.st_mtime_ns, stat.st_size)
            if self._known.get(name) != known[name]:
                found[name] = path.read_bytes()
        self._known |= known
        return found


def _is_left_out(name: str, besides: str) -> bool:
    """Whether a file is below `besides`, of this folder alone, or not written to its end."""
    parts = name.split("/")
    is_besides = parts[0] == besides
    is_part = any(part.startswith(".") for part in parts)
    return is_besides or is_part or name in _STAYING


def apply(folder: Path, changes: Changes) -> None:
    """Writes what is new elsewhere into `folder`, and removes checkpoints older than the newest one
    there that are no longer there.

    Raises OSError where it cannot be written.
    """
    of_checkpoints: dict[int, dict[str, bytes]] = {}
    for name, content in changes.files.items():
        first, *rest = name.split("/")
        if first == workdirs.FOLDER:
            of_checkpoints.setdefault(int(rest[0]), {})["/".join(rest[1:])] = content
        else:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            intact.write(path, content)
    checkpoints = folder / workdirs.FOLDER
    for number, files in sorted(of_checkpoints.items()):
        _write_checkpoint(checkpoints, number, files)
    newest = max(changes.checkpoints, default=0)  # a worker that has none yet removes none
    here = set(workdirs.numbers_in(checkpoints))
    gone = here - set(changes.checkpoints)
    for number in gone:
        if number < newest:
            shutil.rmtree(checkpoints / str(number), ignore_errors=True)


def _write_checkpoint(checkpoints: Path, number: int, files: dict[str, bytes]) -> None:
    """Writes one checkpoint beside the others, then gives it its name."""
    part = checkpoints / f".writing_{number}"
    shutil.rmtree(part, ignore_errors=True)
    for name, content in files.items():
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    shutil.rmtree(checkpoints / str(number), ignore_errors=True)
    part.rename(checkpoints / str(number))


def start(folder: Path) -> Changes:
    """What the next attempt of a member needs of its folder: the newest whole checkpoint, the
    networks that were kept, and the log so far.

    Raises DamagedError if there are checkpoints, but none is whole.
    """
    snapshot = workdirs.newest(folder)
    changes = Source(folder).changes()
    whole = [] if snapshot is None else [int(snapshot.folder.name)]
    places = [f"{workdirs.FOLDER}/{number}/" for number in whole]
    wanted = (*places, f"{kept.FOLDER}/", LOG)
    files = {name: text for name, text in changes.files.items() if name.startswith(wanted)}
    return Changes(files, whole)
