"""What a run keeps in its folder, read without jax: its config, and position and rows of its
checkpoints.

A checkpoint is a folder `workdir/checkpoints/NUMBER` with the arrays in `state`, the rest in
`progress.json`, and the checksums of all files in `SHA256SUMS`. It appears at once, whole, and is
verified before anything in it is read.
"""

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tqdm

import sparsity_jax
from sparsity_jax import intact, versions
from sparsity_jax.intact import DamagedError
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import AnyPath, Config, Fields, Rows
from sparsity_jax.versions import ENVIRONMENT

__all__ = [
    "ENVIRONMENT",
    "FOLDER",
    "PROGRESS",
    "STATE",
    "Progress",
    "Snapshot",
    "behind",
    "check_path",
    "claim",
    "holds_run",
    "member_folders",
    "member_name",
    "naming",
    "newest",
    "numbers_in",
    "read",
    "read_config",
    "refuse_members",
    "refuse_other",
    "renumbered",
    "say",
    "tell",
    "tells",
]

FOLDER = "checkpoints"
STATE = "state"
PROGRESS = "progress.json"
_UNREADABLE = r"[\[\]\\]|:/"  # in paths: orbax's reader takes them for patterns or addresses


@contextlib.contextmanager
def naming(workdir: Path) -> Iterator[None]:
    """A full disk is told with `workdir`, where the failed write does not say which file it was."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(workdir)) from error


_telling = True


def tell(wanted: bool) -> None:
    """Whether this process says anything: of several only the first does."""
    global _telling
    _telling = wanted


def tells() -> bool:
    """Whether this process says anything."""
    return _telling


def say(message: str) -> None:
    """One line for the person at the terminal."""
    if not _telling:
        return
    tqdm.tqdm.write(message, file=sys.stderr)


class Progress(NamedTuple):
    """Where a run is. stage: index in the pipeline; begun: whether it has made its own state; rows:
    all so far.
    """

    stage: int
    begun: bool
    rows: Rows


class Snapshot(NamedTuple):
    """A checkpoint that is whole. config: of its run, as plain data."""

    folder: Path
    progress: Progress
    config: Fields

    @property
    def workdir(self) -> Path:
        """The folder of its run."""
        return self.folder.parent.parent

    @property
    def is_finished(self) -> bool:
        """Whether its run had finished all stages of the pipeline."""
        return self.progress.stage == len(self.config["pipeline"])


# Checkpoints --------------------------------------------------------------------------------------


def newest(workdir: AnyPath) -> Snapshot | None:
    """The newest whole checkpoint of the run in `workdir`; None if it has saved nothing.

    One that is damaged is passed over, aloud. Raises DamagedError if there are checkpoints, but
    none is whole.
    """
    folder = Path(workdir).absolute() / FOLDER
    while True:
        numbers = numbers_in(folder)
        damages = []
        for number in reversed(numbers):
            try:
                snapshot = read(folder / str(number))
            except (DamagedError, FileNotFoundError) as error:  # a run at work may remove it
                damages.append(str(error))
                continue
            for damage in damages:
                say(f"checkpoint passed over: {damage}; the one before is used")
            return snapshot
        if not damages:
            return None
        if numbers == numbers_in(folder):  # else the run has gone on in the meantime
            raise DamagedError(
                f"no checkpoint in {folder} is whole: {'; '.join(damages)}. Without that folder "
                "the run starts anew."
            )


def read(folder: Path) -> Snapshot:
    """The checkpoint in `folder`; raises DamagedError unless it is whole."""
    damage = intact.damage(folder)
    if damage:
        raise DamagedError(damage)
    saved = intact.read_object(folder / PROGRESS)
    if not _is_record(saved):
        raise DamagedError(f"{folder / PROGRESS} is not the progress of a run")
    progress = Progress(*(saved[field] for field in Progress._fields))
    return Snapshot(folder, progress, saved["config"])


def _is_record(saved: Fields) -> bool:
    """Whether JSON data has the fields that a checkpoint's progress has."""
    fields = dict(stage=int, begun=bool, rows=list, config=dict)
    fits = (isinstance(saved.get(name), kind) for name, kind in fields.items())
    if not all(fits):
        return False
    rows_are_dicts = all(isinstance(row, dict) for row in saved["rows"])
    return rows_are_dicts and isinstance(saved["config"].get("pipeline", []), list)


def numbers_in(folder: Path) -> list[int]:
    """Numbers of the checkpoints in `folder`, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def behind(before: Rows, rows: Rows) -> Rows:
    """`rows` behind those of another run, of which stages that `rows` made anew are left out."""
    stages_anew = {row["stage"] for row in rows}
    return [row for row in before if row["stage"] not in stages_anew] + rows


# Configs ------------------------------------------------------------------------------------------


def member_name(number: int) -> str:
    """The folder, in that of a whole run, of members that ran by themselves; number: the first."""
    return f"member_{number:03d}"


def member_folders(workdir: AnyPath) -> dict[int, Path]:
    """The folders of members that ran by themselves, by number."""
    folders = {}
    for folder in Path(workdir).glob("member_*"):
        number = folder.name.removeprefix("member_")
        if number.isdecimal():
            folders[int(number)] = folder
    return dict(sorted(folders.items()))


def renumbered(rows: Rows, first: int) -> Rows:
    """Rows of members that ran by themselves, numbered as those of the whole run from `first`
    on.
    """
    return [{**row, "member": first + row["member"]} for row in rows]


def check_path(workdir: AnyPath) -> None:
    """Raises ConfigError for a path under which checkpoints could not be read."""
    path = Path(workdir).absolute()
    if re.search(_UNREADABLE, f"{path}/"):
        raise ConfigError(
            f"--workdir is {path}; allowed: paths without [, ], backslash, or a name that ends in "
            "a colon."
        )


def claim(workdir: AnyPath, config: Config) -> None:
    """Makes `workdir` the place of `config` (written to config.json), or checks that it already is.

    Raises ConfigError naming every field that differs.
    """
    refuse_other(workdir, config)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    intact.write_recorded(folder / "config.json", config)


def refuse_other(workdir: AnyPath, config: Config) -> None:
    """Raises ConfigError naming every field that differs if `workdir` belongs to another config,
    and for an unfinished run of another version, whose numbers may differ.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir} is a file; use another --workdir.")
    if holds_run(workdir):
        differing = versions.told_differences(read_config(workdir), config, "config")
        if differing:
            raise ConfigError(
                f"{workdir} holds a run of another config; use another --workdir.\n{differing}"
            )
        version = versions.version_of(workdir)
        if version != sparsity_jax.__version__:
            raise ConfigError(
                "--workdir",
                str(workdir),
                why=f"an unfinished run of sparsity_jax {version}",
                allowed="that version, or another folder",
            )


def refuse_members(workdir: AnyPath) -> None:
    """Raises ConfigError where members ran by themselves in `workdir`, for a run whose members have
    no folders of their own.
    """
    folders = member_folders(workdir)
    if folders:
        first, *_ = folders.values()
        raise ConfigError(
            "--workdir",
            str(workdir),
            why=f"where {first.name} ran alone, but a whole run trains all members in one program",
            allowed="--member for the others too, or another folder",
        )


def holds_run(workdir: AnyPath) -> bool:
    """Whether a run has begun in `workdir`."""
    workdir = Path(workdir)
    return (workdir / "config.json").is_file() or bool(numbers_in(workdir / FOLDER))


def read_config(workdir: AnyPath) -> Fields:
    """The config of the run in `workdir`: of config.json, or where that is damaged, aloud, of the
    newest checkpoint.

    Raises ConfigError for a file that holds none, or not the one that was written, and for a run of
    a later version.
    """
    versions.check_version(workdir)
    path = Path(workdir) / "config.json"
    try:
        return versions.upgraded(intact.read_recorded(path))
    except FileNotFoundError:
        problem = f"{path} is missing"
    except DamagedError as error:
        problem = str(error)
    saved = newest(workdir)
    if saved is None:
        raise ConfigError(f"{problem}; use another folder.")
    say(f"{problem}; the config of the newest checkpoint is used")
    return versions.upgraded(saved.config)
