"""Config, rows and environment of a workdir, or of several runs together."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsity_jax import intact, workdirs
from sparsity_jax.report import files
from sparsity_jax.report.rows import completed, is_seed
from sparsity_jax.types import AnyPath, Fields, Rows

__all__ = ["Run", "gather", "read_rows"]

_IDLE = {"title", "checkpoint_seconds", "sweep", "seed"}  # no number depends on them


class Run(NamedTuple):
    """What the files of one run say."""

    folder: pathlib.Path
    config: Fields
    environment: Fields
    rows: Rows


# One run ------------------------------------------------------------------------------------------


def gather(workdir: AnyPath) -> tuple[Fields, Rows, Fields | None]:
    """Config, rows and environment of a finished or running workdir.

    Rows come from the members of a sweep, which are newer than the joint ones while it runs, else
    from `metrics.jsonl`, else from the folders inside, see `_merged`. Raises FileNotFoundError
    saying what is missing, ValueError for a file that cannot be read.
    """
    folder = pathlib.Path(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the workdir of a run.")
    every = workdirs.member_folders(folder)
    members = {number: own for number, own in every.items() if _has_rows(own)}
    if members:
        place = folder if workdirs.holds_run(folder) else next(iter(members.values()))
        run = _read_run(place, members)
        return run.config, run.rows, run.environment or None
    inside = sorted(folder.iterdir())
    folders = [folder] if _has_rows(folder) else list(filter(_has_rows, inside))
    if not folders:
        raise FileNotFoundError(
            f"neither {folder} nor a folder in it has {files.METRICS}; has the run started there?"
        )
    several = [_read_run(own) for own in folders]
    run = several[0] if len(several) == 1 else _merged(several)
    return run.config, run.rows, run.environment or None


def _has_rows(folder: pathlib.Path) -> bool:
    """Whether a folder has rows, or checkpoints, which have them too."""
    return (folder / files.METRICS).exists() or (folder / workdirs.FOLDER).is_dir()


def _read_run(folder: pathlib.Path, members: Mapping[int, pathlib.Path] = {}) -> Run:
    """The run in `folder`, with the rows of its `members`' folders if it has any.

    Raises FileNotFoundError where it has no config.
    """
    if not workdirs.holds_run(folder):
        raise FileNotFoundError(
            f"{folder} has no config.json; a run writes it when it starts. Its settings are not "
            "known."
        )
    rows = [] if members else _whole_rows(folder)
    for first, part in members.items():
        rows += workdirs.renumbered(_whole_rows(part), first)
    environment = files.read_environment(folder) or {}
    return Run(folder, workdirs.read_config(folder), environment, rows)


def _whole_rows(folder: pathlib.Path) -> Rows:
    """Rows of the metrics file of a run; aloud, those of its newest checkpoint where they are not
    its first ones.

    Raises ValueError where the file is damaged and there is no other copy. Checkpoints that are all
    damaged, or older than their checksums, leave the rows as they are, aloud.
    """
    path = folder / files.METRICS
    known = None
    try:
        saved = workdirs.newest(folder)
        if saved is not None:
            known = files.plain(saved.progress.rows)
    except intact.DamagedError as error:
        workdirs.say(f"{error} The rows of {path.name} are all that is known.")
    try:
        rows = read_rows(path)
        problem = f"{path} is not as it was written"
    except (FileNotFoundError, ValueError) as error:
        if known is None:
            raise
        rows = []
        problem = str(error)
    if known is None or rows[: len(known)] == known:
        return rows
    workdirs.say(f"{problem}; the rows of the newest checkpoint are used")
    return known


def read_rows(path: AnyPath) -> Rows:
    """Rows of a metrics file, without their checksums.

    A last line cut off by a killed run is left out. Raises ValueError with the line number for any
    other line that is not one JSON object, or not as it was written.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    rows = []
    total = 0
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


# Several runs -------------------------------------------------------------------------------------


def _merged(several: list[Run]) -> Run:
    """Several runs as one.

    Members are numbered anew. Rows have every setting under a dotted name, so that only networks
    whose settings agree in all but the seed are averaged; where even that agrees, the name of the
    run. Config and environment have one value where the runs agree, else the list of values.
    """
    settings = [_settings_of(run.folder, run.config) for run in several]
    unset = dict.fromkeys(path for own in settings for path in own)
    rows: Rows = []
    numbers: dict[tuple, int] = {}
    for run, own in zip(several, settings):
        told = {"seed": run.config.get("seed", 0), **unset, **own}
        for other, theirs in zip(several, settings):
            if other is not run and theirs == own and _seeds_of(other) & _seeds_of(run):
                told["config.run"] = run.folder.name  # a network twice is no sample of seeds
        for row in completed(run.rows, run.config, run.environment):
            network = (run.folder, row.get("member", 0))
            member = numbers.setdefault(network, len(numbers))
            rows.append({**told, **row, "member": member})
    config = _agreed([run.config for run in several])
    environment = _agreed([run.environment for run in several])
    return Run(several[0].folder.parent, config, environment, rows)


def _settings_of(folder: pathlib.Path, config: Fields, seen: tuple = ()) -> Fields:
    """Every setting that decides the numbers of a run, by dotted path; for `start_from`, those of
    the run there.
    """
    deciding = {name: value for name, value in config.items() if name not in _IDLE}
    start = pathlib.Path(config.get("start_from") or folder)
    seen = (*seen, folder.resolve())
    if start.resolve() not in seen and workdirs.holds_run(start):
        deciding["start_from"] = _settings_of(start, workdirs.read_config(start), seen)
    settings = {}
    for path, value in files.flatten(deciding):
        if not is_seed(path):
            settings[path if "." in path else f"config.{path}"] = value
    return settings


def _seeds_of(run: Run) -> set:
    """Seeds of all networks of a run."""
    return {row.get("seed", run.config.get("seed", 0)) for row in run.rows}


def _agreed(trees: list[Fields]) -> Fields:
    """One nested dict of several: a value where all have the same, else the list of different
    values.
    """
    result: Fields = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree[key] for tree in trees if key in tree]
        if all(isinstance(value, dict) for value in values):
            result[key] = _agreed(values)
            continue
        different: list[Any] = []
        for value in values:
            if value not in different:
                different.append(value)
        result[key] = different if len(different) > 1 else different[0]
    return result
