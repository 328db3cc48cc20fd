"""Config, rows and environment of a workdir, or of several runs together."""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsity_jax import intact, members, workdirs
from sparsity_jax.report import files
from sparsity_jax.report.rows import completed, is_seed
from sparsity_jax.types import AnyPath, Fields, Row, Rows

__all__ = ["Run", "gather", "merged", "names_of", "read_rows", "runs_in"]

_IDLE = {"title", "checkpoint_seconds", "log", "sweep", "seed"}  # no number depends on them
_DECIDING = ("sparsity_jax", "precision", "chance")  # of the environment: numbers depend on them


class Run(NamedTuple):
    """What the files of one run say."""

    folder: pathlib.Path
    config: Fields
    environment: Fields
    rows: Rows


# One run ------------------------------------------------------------------------------------------


def gather(workdir: AnyPath) -> tuple[Fields, Rows, Fields | None]:
    """Config, rows and environment of a finished or running workdir, or of the runs in it, see
    `runs_in` and `merged`.
    """
    several = runs_in(workdir)
    run = several[0] if len(several) == 1 else merged(several)
    return run.config, run.rows, run.environment or None


def runs_in(workdir: AnyPath) -> list[Run]:
    """The run in a finished or running workdir, or those in the folders of a workdir.

    Rows come from the members of a sweep, which are newer than the joint ones while it runs, else
    from `metrics.jsonl`, else from the folders inside. Raises FileNotFoundError saying what is
    missing, ValueError for a file that cannot be read.
    """
    folder = pathlib.Path(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the workdir of a run.")
    every = workdirs.member_folders(folder)
    parts = {number: own for number, own in every.items() if _has_rows(own)}
    if parts and workdirs.holds_run(folder):
        return [_read_run(folder, parts)]
    inside = sorted(folder.iterdir())
    folders = [folder] if _has_rows(folder) else list(filter(_has_rows, inside))
    if not folders:
        raise FileNotFoundError(
            f"neither {folder} nor a folder in it has {files.METRICS}; has the run started there?"
        )
    return [_read_run(own) for own in folders]


def _has_rows(folder: pathlib.Path) -> bool:
    """Whether a folder has rows, or checkpoints, which have them too."""
    return (folder / files.METRICS).exists() or (folder / workdirs.FOLDER).is_dir()


def _read_run(folder: pathlib.Path, parts: Mapping[int, pathlib.Path] = {}) -> Run:
    """The run in `folder`, with the rows of its members' folders, `parts`, if it has any.

    Raises FileNotFoundError where it has no config.
    """
    if not workdirs.holds_run(folder):
        raise FileNotFoundError(
            f"{folder} has no config.json; a run writes it when it starts. Its settings are not "
            "known."
        )
    rows = [] if parts else _whole_rows(folder)
    for first, part in parts.items():
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


class _Network(NamedTuple):
    """What decides the numbers of one network: its settings by dotted path, and its seeds."""

    settings: Fields
    seeds: Fields


def merged(several: list[Run]) -> Run:
    """Several runs as one.

    Members are numbered anew. Rows have every setting under a dotted name, and what else decides
    the numbers (`environment.sparsity_jax`, the version), so that only networks are averaged that
    differ in nothing but the seed; where runs have a network in common, the name of the run
    (`config.run`). Config and environment have one value where the runs agree, else the list of
    values. Raises DamagedError for rows of members that a run's config does not make.
    """
    networks = list(map(_networks_of, several))
    unset: Fields = {}
    for network in itertools.chain(*networks):
        unset |= dict.fromkeys(network.settings)
    rows: Rows = []
    numbers: dict[tuple, int] = {}
    for index, (run, name) in enumerate(zip(several, names_of(several))):
        own = networks[index]
        others = itertools.chain(*networks[:index], *networks[index + 1 :])
        again = {}
        if any(network in own for network in others):
            again["config.run"] = name  # a network twice is no sample of seeds
        for row in completed(run.rows, run.config, run.environment):
            network = _network_of(row, run, own)
            told = {**network.seeds, **unset, **network.settings, **again}
            place = (index, row.get("member", 0))
            member = numbers.setdefault(place, len(numbers))
            rows.append({**told, **row, "member": member})
    config = _agreed([run.config for run in several])
    environment = _agreed([run.environment for run in several])
    return Run(several[0].folder.parent, config, environment, rows)


def names_of(several: list[Run]) -> list[str]:
    """What each run is called: its folder, or the path where several have the same."""
    folders = [run.folder.resolve().name for run in several]
    names = []
    for run, folder in zip(several, folders):
        is_unique = folders.count(folder) == 1
        names.append(folder if is_unique else str(run.folder))
    return names


def _networks_of(run: Run) -> list[_Network]:
    """The networks that a run's config makes, by member."""
    facts = {f"environment.{name}": run.environment.get(name) for name in _DECIDING}
    networks = []
    try:
        every = members.expand(run.config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise intact.DamagedError(
            f"{run.folder} has a config that makes no network ({error})"
        ) from None
    for member in every:
        settings = _settings_of(run.folder, member.config)
        leaves = files.flatten(member.config)
        seeds = {path: value for path, value in leaves if is_seed(path)}
        network = _Network({**settings, **facts}, seeds)
        networks.append(network)
    return networks


def _network_of(row: Row, run: Run, networks: list[_Network]) -> _Network:
    """The network that a row is of."""
    member = row.get("member", 0)
    if member >= len(networks):
        raise intact.DamagedError(
            f"{run.folder} has rows of member {member}, but its config makes {len(networks)}"
        )
    return networks[member]


def _settings_of(folder: pathlib.Path, config: Fields, seen: tuple = ()) -> Fields:
    """Every setting that decides the numbers of a run, by dotted path, without those of stages that
    it does not use; for `start_from`, those of the run there.
    """
    idle = _IDLE | _unused_stages(config)
    deciding = {name: value for name, value in config.items() if name not in idle}
    start = pathlib.Path(config.get("start_from") or folder)
    seen = (*seen, folder.resolve())
    if start.resolve() not in seen and workdirs.holds_run(start):
        deciding["start_from"] = _settings_of(start, workdirs.read_config(start), seen)
    settings = {}
    for path, value in files.flatten(deciding):
        if not is_seed(path):
            settings[path if "." in path else f"config.{path}"] = value
    return settings


def _unused_stages(config: Fields) -> set[str]:
    """Names of the stages that neither the pipeline nor a stage in use names, e.g. as `retrain`."""
    unused = set(members.stages_of(config))
    named = set(config.get("pipeline", unused))
    while named & unused:
        used = named & unused
        unused -= used
        values = [value for name in used for _, value in files.flatten(config[name])]
        told = itertools.chain(values, *(value for value in values if isinstance(value, list)))
        named = unused.intersection(value for value in told if isinstance(value, str))
    return unused


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
