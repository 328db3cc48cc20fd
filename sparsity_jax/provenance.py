"""Where a run comes from: the commits of this package and of the config file, date and machine."""

import datetime
import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import sparsity_jax
from sparsity_jax import members
from sparsity_jax.types import AnyPath, Config, Fields

__all__ = ["commit_of", "describe"]

_SECONDS = 10  # after which git is not waited for


def describe(config: Config, *, command: str = "", config_file: AnyPath | None = None) -> Fields:
    """What `environment.json` says of the origin of a run.

    commit, dirty: of the checkout that this package is imported from, see `commit_of`;
    config_commit, config_dirty: of the file that the config is of. date: now, in UTC. cpu: its
    model. cores: those that the process may use. seed: of all members. command: what was typed.
    What cannot be known is None.
    """
    commit, dirty = _own_commit()
    config_commit, config_dirty = commit_of(config_file) if config_file else (None, None)
    now = datetime.datetime.now(datetime.UTC)
    seeds = dict.fromkeys(member.config["seed"] for member in members.expand(config))
    origin = {
        "commit": commit,
        "dirty": dirty,
        "config_commit": config_commit,
        "config_dirty": config_dirty,
        "date": now.isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": _cores(),
        "seed": list(seeds) if len(seeds) > 1 else next(iter(seeds)),
    }
    return origin | ({"command": command} if command else {})


@functools.cache
def _own_commit() -> tuple[str | None, bool | None]:
    """`commit_of` this package, as it was imported."""
    return commit_of(sparsity_jax.__file__)


def commit_of(file: AnyPath) -> tuple[str | None, bool | None]:
    """(the commit that a file is checked out of, whether anything in its folder differs from it).

    Both are None where git is absent, or does not follow the file.
    """
    path = Path(file).resolve()
    if _git(path.parent, "ls-files", "--error-unmatch", "--", path.name) is None:
        return None, None
    told = _git(path.parent, "status", "--porcelain=v2", "--branch", "--", ".") or ""
    commit = re.search(r"^# branch\.oid ([0-9a-f]+)$", told, re.MULTILINE)
    if commit is None:  # a repository without any commit
        return None, None
    changes = [line for line in told.splitlines() if not line.startswith("#")]
    return commit[1], bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints in `folder`, without a lock or any other change; None where it fails."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _cpu() -> str | None:
    """The model of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if model:
        return model[1].strip()
    return platform.processor() or None


def _cores() -> int | None:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
