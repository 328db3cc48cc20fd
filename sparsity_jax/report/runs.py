"""Config, rows and environment of a workdir, or of several runs together."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from sparsity_jax import intact, workdirs
from sparsity_jax.report import files
from sparsity_jax.report.files import AnyPath, Rows

IDLE = {"title", "checkpoint_seconds", "sweep", "sweep_mode", "seed"}  # no number depends on them


class Run(NamedTuple):
    """What the files of one run say."""

    name: str
    config: dict
    environment: dict
    rows: Rows
    settings: dict[str, Any]  # that decide the numbers, by dotted path


def is_seed(key: str) -> bool:
    """Whether a swept value is a seed, to be averaged over: `seed`, or a setting of that name."""
    return key.rsplit(".", 1)[-1] == "seed"


def gather(workdir: AnyPath) -> tuple[dict, Rows, dict | None]:
    """Config, rows and environment of a finished or running workdir.

    Rows come from the members of a sweep, which are newer than the joint ones while it runs, else
    from `metrics.jsonl`, else from the folders inside, see `merged`. Raises FileNotFoundError
    saying what is missing, ValueError for a file that cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not a folder; give the workdir of a run.")
    members = with_rows(workdir.glob("member_[0-9]*"))
    folders = members or with_rows([workdir]) or with_rows(workdir.iterdir())
    if not folders:
        raise FileNotFoundError(
            f"neither {workdir} nor a folder in it has {files.METRICS}; has the run started there?"
        )
    if len(folders) > 1 and not members:
        return merged([read_run(folder) for folder in folders])
    rows = []
    for folder in folders:
        own = whole_rows(folder)
        if members:
            first = int(folder.name.removeprefix("member_"))
            own = [{**row, "member": first + row["member"]} for row in own]
        rows += own
    for place in (workdir, folders[0]):
        if workdirs.holds_run(place):
            return workdirs.read_config(place), rows, files.read_environment(place)
    raise FileNotFoundError(f"{workdir} has no {files.CONFIG}; a run writes it when it starts.")


def with_rows(folders: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Those folders that have rows, or checkpoints, which have them too."""
    has_rows = lambda folder: (folder / files.METRICS).exists()
    return [
        folder
        for folder in sorted(folders)
        if has_rows(folder) or (folder / workdirs.FOLDER).is_dir()
    ]


def read_run(folder: pathlib.Path) -> Run:
    """Everything about the run in `folder`; FileNotFoundError where it has no config."""
    if not workdirs.holds_run(folder):
        raise FileNotFoundError(
            f"{folder} has {files.METRICS} but no {files.CONFIG}, so its settings are not known; "
            "move it."
        )
    config = workdirs.read_config(folder)
    environment = files.read_environment(folder) or {}
    return Run(folder.name, config, environment, whole_rows(folder), settings_of(folder, config))


def merged(several: list[Run]) -> tuple[dict, Rows, dict | None]:
    """Config, rows and environment of several runs together.

    Members are numbered anew. Rows have every setting in which the runs differ, under a dotted
    name, so that only networks whose settings agree in all but the seed are averaged; where even
    that agrees, the name of the run. Config and environment have one value where the runs agree,
    else the list of values.
    """
    differing = differing_settings(several)
    rows: Rows = []
    numbers: dict[tuple, int] = {}
    for run in several:
        told = {"seed": run.config.get("seed", 0)}
        for path in differing:
            told[path if "." in path else f"config.{path}"] = run.settings.get(path)
        alike = [other for other in several if other is not run and other.settings == run.settings]
        if any(seeds_of(run) & seeds_of(other) for other in alike):
            told["config.run"] = run.name  # the same network twice is no sample of seeds
        for row in run.rows:
            row = complete({**told, **row}, run.config, run.environment)
            row["member"] = numbers.setdefault((run.name, row.get("member", 0)), len(numbers))
            rows.append(row)
    environment = agreed([run.environment for run in several])
    return agreed([run.config for run in several]), rows, environment or None


def differing_settings(several: list[Run]) -> list[str]:
    """Paths of the settings that are swept in a run, or differ between runs."""
    swept = {key for run in several for row in run.rows for key in row if not is_seed(key)}
    paths = dict.fromkeys(path for run in several for path in run.settings)
    differing = []
    for path in paths:
        values = {json.dumps(run.settings.get(path)) for run in several}
        if len(values) > 1 or ("." in path and path in swept):
            differing.append(path)
    return differing


def settings_of(folder: pathlib.Path, config: dict, seen: tuple = ()) -> dict[str, Any]:
    """Every setting that decides the numbers of a run; for `start_from`, those of the run there."""
    deciding = {name: value for name, value in config.items() if name not in IDLE}
    settings = dict(files.flatten(deciding))
    start = pathlib.Path(config.get("start_from") or folder)
    seen = (*seen, folder.resolve())
    if start.resolve() not in seen and workdirs.holds_run(start):
        del settings["start_from"]
        for path, value in settings_of(start, workdirs.read_config(start), seen).items():
            settings[f"start_from.{path}"] = value
    return settings


def seeds_of(run: Run) -> set:
    """Seeds of all networks of a run."""
    return {row.get("seed", run.config.get("seed", 0)) for row in run.rows}


def agreed(trees: Rows) -> dict:
    """One nested dict of several: a value where all have the same, else the list of different
    values.
    """
    result: dict[str, Any] = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree[key] for tree in trees if key in tree]
        different = list({json.dumps(value): value for value in values}.values())
        if all(isinstance(value, dict) for value in values):
            result[key] = agreed(values)
        else:
            result[key] = different[0] if len(different) == 1 else different
    return result


def title_of(config: dict, folder: AnyPath) -> str:
    """Title of a page: the config's, else the folder's name."""
    title = config.get("title")
    return title if title and isinstance(title, str) else pathlib.Path(folder).resolve().name


def complete(row: dict, config: dict, environment: dict) -> dict:
    """`row` with what its run knows about it besides, unless it says so itself.

    start: of a training, whether it begins with the initial weights ("init") or the current ones.
    chance: accuracy of always answering the most frequent class. stop_width: of a predicted limit,
    the width of the enclosure that was asked for.
    """
    stages = {name: stage for name, stage in config.items() if isinstance(stage, dict)}
    setting = lambda field, name: stages.get(row.get(field), {}).get(name)
    more = {}
    if row.get("kind") == "train":
        more = {"start": setting("stage", "start"), "chance": environment.get("chance")}
    if row.get("kind") == "width":
        more = {"stop_width": setting("spectrum", "stop_width")}
    more = {key: value for key, value in more.items() if isinstance(value, (str, int, float))}
    return {**more, **row}


def whole_rows(folder: pathlib.Path) -> Rows:
    """Rows of the metrics file of a run; aloud, those of its newest checkpoint where they are not
    its first ones.

    Raises ValueError where the file is damaged and there is no other copy. Checkpoints that are all
    damaged, or older than their checksums, leave the rows as they are, aloud.
    """
    path = folder / files.METRICS
    try:
        saved = workdirs.newest(folder)
    except intact.DamagedError as error:
        saved = None
        workdirs.say(f"{error} The rows of {path.name} are all that is known.")
    try:
        rows = files.read_rows(path)
        problem = f"{path} is not as it was written"
    except (FileNotFoundError, ValueError) as error:
        if saved is None:
            raise
        rows, problem = [], str(error)
    if saved is None:
        return rows
    known = files.plain(saved.progress.rows)
    if rows[: len(known)] == known:
        return rows
    workdirs.say(f"{problem}; the rows of the newest checkpoint are used")
    return known
