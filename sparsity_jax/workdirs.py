"""What a run keeps in its folder, read without jax: its config, and position and rows of its
checkpoints.

A checkpoint is a folder `workdir/checkpoints/NUMBER` with the arrays in `state`, the rest in
`progress.json`, and the checksums of all files in `SHA256SUMS`. It appears at once, whole, and is
verified before anything in it is read.
"""

import json
import pathlib
import re
import sys
from typing import Any, NamedTuple

import tqdm

import sparsity_jax
from sparsity_jax import intact, tables

FOLDER, STATE, PROGRESS = "checkpoints", "state", "progress.json"
ENVIRONMENT = "environment.json"
FIRST_VERSION = "0.1.0"  # which did not say so
UNREADABLE = r"[\[\]\\]|:/"  # in paths: orbax's reader takes them for patterns or addresses


def say(message: str) -> None:
    """One line for the person at the terminal."""
    tqdm.tqdm.write(message, file=sys.stderr)


class Progress(NamedTuple):
    """Where a run is. stage: index in the pipeline; begun: whether it has made its own state; rows:
    all so far.
    """

    stage: int
    begun: bool
    rows: list[dict]


class Snapshot(NamedTuple):
    """A checkpoint that is whole. config: of its run, as plain data."""

    folder: pathlib.Path
    progress: Progress
    config: dict


# Checkpoints --------------------------------------------------------------------------------------


def newest(workdir: pathlib.Path) -> Snapshot | None:
    """The newest whole checkpoint of the run in `workdir`; None if it has saved nothing.

    One that is damaged is passed over, aloud. Raises DamagedError if there are checkpoints, but
    none is whole.
    """
    folder = pathlib.Path(workdir).absolute() / FOLDER
    while True:
        numbers = numbers_in(folder)
        damages = []
        for number in reversed(numbers):
            try:
                snapshot = read(folder / str(number))
            except (intact.DamagedError, FileNotFoundError) as error:  # a run at work may remove it
                damages.append(str(error))
                continue
            for damage in damages:
                say(f"checkpoint passed over: {damage}; the one before is used")
            return snapshot
        if not damages:
            return None
        if numbers == numbers_in(folder):  # else the run has gone on in the meantime
            raise intact.DamagedError(
                f"no checkpoint in {folder} is whole: {'; '.join(damages)}. Without that folder "
                "the run starts anew."
            )


def read(folder: pathlib.Path) -> Snapshot:
    """The checkpoint in `folder`; raises DamagedError unless it is whole."""
    damage = intact.damage(folder)
    if damage:
        raise intact.DamagedError(damage)
    path = folder / PROGRESS
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise intact.DamagedError(f"{path} is not readable as JSON ({error})") from None
    if not _is_record(saved):
        raise intact.DamagedError(f"{path} is not the progress of a run")
    return Snapshot(
        folder, Progress(saved["stage"], saved["begun"], saved["rows"]), saved["config"]
    )


def _is_record(saved: Any) -> bool:
    """Whether JSON data has the fields that a checkpoint's progress has."""
    fields = dict(stage=int, begun=bool, rows=list, config=dict)
    if not isinstance(saved, dict):
        return False
    if not all(isinstance(saved.get(name), kind) for name, kind in fields.items()):
        return False
    rows_are_dicts = all(isinstance(row, dict) for row in saved["rows"])
    return rows_are_dicts and isinstance(saved["config"].get("pipeline", []), list)


def numbers_in(folder: pathlib.Path) -> list[int]:
    """Numbers of the checkpoints in `folder`, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


# Configs ------------------------------------------------------------------------------------------


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether the run in `workdir` has finished all stages of its pipeline."""
    saved = newest(workdir)
    return saved is not None and saved.progress.stage == len(saved.config["pipeline"])


def check_path(workdir: pathlib.Path) -> None:
    """Raises ConfigError for a path under which checkpoints could not be read."""
    path = pathlib.Path(workdir).absolute()
    if re.search(UNREADABLE, f"{path}/"):
        raise tables.ConfigError(
            f"--workdir is {path}; allowed: paths without [, ], backslash, or a name that ends in "
            "a colon."
        )


def claim(workdir: pathlib.Path, config: dict) -> None:
    """Makes `workdir` the place of `config` (written to config.json), or checks that it already is.

    Raises ConfigError naming every field that differs.
    """
    refuse_other(workdir, config)
    path = pathlib.Path(workdir) / "config.json"
    text = json.dumps(config, indent=2) + "\n"
    if not path.exists() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        intact.record(path)


def refuse_other(workdir: pathlib.Path, config: dict) -> None:
    """Raises ConfigError naming every field that differs if `workdir` belongs to another config,
    and for an unfinished run of another version, whose numbers may differ.
    """
    workdir, config = pathlib.Path(workdir), json.loads(json.dumps(config))
    if workdir.exists() and not workdir.is_dir():
        raise tables.ConfigError(f"{workdir} is a file; use another --workdir.")
    if holds_run(workdir):
        differing = differences(read_config(workdir), config)
        if differing:
            lines = "\n".join(
                f"  config.{name}: {old} there, {new} now" for name, old, new in differing
            )
            raise tables.ConfigError(
                f"{workdir} holds a run of another config; use another --workdir.\n{lines}"
            )
        version = version_of(workdir)
        if version != sparsity_jax.__version__:
            raise tables.ConfigError(
                "--workdir",
                str(workdir),
                why=f"an unfinished run of sparsity_jax {version}",
                allowed="that version, or another folder",
            )


def holds_run(workdir: pathlib.Path) -> bool:
    """Whether a run has begun in `workdir`."""
    workdir = pathlib.Path(workdir)
    return (workdir / "config.json").is_file() or bool(numbers_in(workdir / FOLDER))


def version_of(workdir: pathlib.Path) -> str:
    """The version of this library that the run in `workdir` was made with last, e.g. `0.2.0`.

    This one where there is no readable environment.json, as before a run's first row.
    """
    try:
        environment = json.loads((pathlib.Path(workdir) / ENVIRONMENT).read_text(encoding="utf-8"))
        told = environment.get("sparsity_jax", FIRST_VERSION)
        version = re.search(r"\d+(\.\d+)*$", told)  # of "0.1.0, then 0.2.0" the last
    except (OSError, ValueError, AttributeError, TypeError):
        version = None
    return version[0] if version else sparsity_jax.__version__


def check_version(workdir: pathlib.Path) -> None:
    """Raises ConfigError for a run of a later version than this one."""
    numbers = lambda version: [int(number) for number in version.split(".")]
    theirs, ours = version_of(workdir), sparsity_jax.__version__
    if numbers(theirs) > numbers(ours):
        raise tables.ConfigError(
            str(workdir),
            why=f"is a run of sparsity_jax {theirs}, which that version reads",
            allowed=f"runs of {ours} and before",
        )


def read_config(workdir: pathlib.Path) -> dict:
    """The config of the run in `workdir`: of config.json, or where that is damaged, aloud, of the
    newest checkpoint.

    Raises ConfigError for a file that holds none, or not the one that was written, and for a run of
    a later version.
    """
    check_version(pathlib.Path(workdir))
    path = pathlib.Path(workdir) / "config.json"
    try:
        config = _parse_config(path)
        problem = (
            f"{path} is not as it was written (its checksum differs)"
            if intact.is_changed(path)
            else ""
        )
    except tables.ConfigError as error:
        config, problem = None, str(error)
    if not problem:
        return config
    saved = newest(workdir)
    if saved is None:
        raise tables.ConfigError(f"{problem}; use another folder.")
    if upgraded(saved.config) != config:
        say(f"{problem}; the config of the newest checkpoint is used")
    return upgraded(saved.config)


def upgraded(config: dict) -> dict:
    """A config as this version has it: in 0.1.0 `arms`, `arm` and `sweep_mode` stood beside
    `sweep`.
    """
    if "sweep_mode" not in config:
        return config
    config = dict(config)
    mode, arm, arms = config.pop("sweep_mode"), config.pop("arm", ""), config.pop("arms", {})
    sweep = dict(config.get("sweep", {}))
    if mode != "auto":
        sweep["mode"] = mode
    if arm or "arm" in sweep:
        sweep = {"arm": [arm], "arms": arms, **sweep}
    return {**config, "sweep": sweep}


def _parse_config(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise tables.ConfigError(f"{path} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise tables.ConfigError(f"{path} is not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise tables.ConfigError(f"{path} holds no config but a {type(found).__name__}")
    return upgraded(found)


def differences(first: Any, second: Any, path: str = "") -> list[tuple[str, str, str]]:
    """(field, value in first, value in second) of every field that differs."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for name in sorted({*first, *second}):
            deeper = f"{path}.{name}" if path else name
            missing = {"absent"}
            a, b = first.get(name, missing), second.get(name, missing)
            if a is missing or b is missing:
                show = lambda x: "absent" if x is missing else json.dumps(x)  # noqa: B023
                found.append((deeper, show(a), show(b)))
            else:
                found += differences(a, b, deeper)
        return found
    return [] if first == second else [(path, json.dumps(first), json.dumps(second))]
