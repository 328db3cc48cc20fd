"""Configs beside each other: where two differ, and how one of another version reads."""

import json
import re
from pathlib import Path
from typing import Any

import sparsity_jax
from sparsity_jax import intact
from sparsity_jax.intact import DamagedError
from sparsity_jax.tables import ConfigError, joined
from sparsity_jax.types import AnyPath, Fields

__all__ = [
    "ABSENT",
    "ENVIRONMENT",
    "as_saved",
    "check_version",
    "differences",
    "told",
    "told_differences",
    "upgraded",
    "version_of",
]

ENVIRONMENT = "environment.json"
_FIRST_VERSION = "0.1.0"  # which did not say so
ABSENT = object()  # in the place of a field that is not there
_LONGEST = 100  # characters of a value in a refusal


def version_of(workdir: AnyPath) -> str:
    """The version of this library that the run in `workdir` was made with last, e.g. `0.2.0`.

    This one where there is no readable environment.json, as before a run's first row.
    """
    try:
        told = intact.read_object(Path(workdir) / ENVIRONMENT).get("sparsity_jax", _FIRST_VERSION)
    except (OSError, DamagedError):
        told = ""
    version = re.search(r"\d+(\.\d+)*$", str(told))  # of "0.1.0, then 0.2.0" the last
    if version:
        return version[0]
    return sparsity_jax.__version__


def check_version(workdir: AnyPath) -> None:
    """Raises ConfigError for a run of a later version than this one."""
    numbers = lambda version: [int(number) for number in version.split(".")]
    theirs = version_of(workdir)
    ours = sparsity_jax.__version__
    if numbers(theirs) > numbers(ours):
        raise ConfigError(
            str(workdir),
            why=f"is a run of sparsity_jax {theirs}, which that version reads",
            allowed=f"runs of {ours} and before",
        )


def upgraded(config: Fields) -> Fields:
    """A config as this version has it: in 0.1.0 `arms`, `arm` and `sweep_mode` stood beside
    `sweep`.
    """
    if "sweep_mode" not in config:
        return config
    older = {"arm": "", "arms": {}, **config}
    mode, arm, arms = (older.pop(name) for name in ("sweep_mode", "arm", "arms"))
    sweep = dict(older.get("sweep", {}))
    if mode != "auto":
        sweep["mode"] = mode
    if arm or "arm" in sweep:
        sweep = {"arm": [arm], "arms": arms, **sweep}
    return {**older, "sweep": sweep}


def told_differences(there: Any, here: Any, path: str) -> str:
    """One line per field that differs; a long value is cut."""
    lines = []
    for name, old, new in differences(there, as_saved(here), path):
        lines.append(f"  {name}: {told(old)} there, {told(new)} now")
    return "\n".join(lines)


def told(value: Any) -> str:
    """A value of a config as JSON, cut where it is long."""
    text = "absent" if value is ABSENT else json.dumps(value)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}..."


def as_saved(value: Any) -> Any:
    """A config as a file gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def differences(first: Any, second: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(field, value in first, value in second) of every field that differs."""
    if first == second:
        return []
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return [(path, first, second)]
    fields = []
    for name in sorted({*first, *second}):
        old = first.get(name, ABSENT)
        new = second.get(name, ABSENT)
        fields += differences(old, new, joined(path, name))
    return fields
