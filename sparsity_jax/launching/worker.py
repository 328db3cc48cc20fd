"""What a worker of a launch does, in a process of its own: data and compiled programs are made
once, for all members that it is given.

Nothing here knows by which means the worker is reached. jax is imported once its environment is
set.
"""

import contextlib
import datetime
import os
import shutil
import socket
import sys
import tempfile
import traceback
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparsity_jax import compilation, imports, lock, stopping, tables, workdirs
from sparsity_jax.launching import mirror
from sparsity_jax.types import Config, Fields

__all__ = ["Outcome", "Ready", "Setup", "Worker", "shipped"]

_MEBIBYTE = bytes(2**20)


class Setup(NamedTuple):
    """What every worker is told at its start.

    config: of the whole run, plain. workdir, folder: of the launcher, and the one that it was
    started in. sees_workdir: whether workers read and write the workdir themselves. files: contents
    of the Python files that registered names, by path. environment: variables. threads: that XLA
    computes with on a CPU, 0 for all. keep_programs: whether compiled ones are kept on disk.
    """

    config: Config
    workdir: str
    folder: str
    sees_workdir: bool
    files: Mapping[str, bytes] = {}
    environment: Mapping[str, str] = {}
    threads: int = 0
    keep_programs: bool = False


class Ready(NamedTuple):
    """How the start of a worker went. sentence: what it lacks, or "". environment: what the report
    says of it.
    """

    sentence: str
    environment: Fields


class Outcome(NamedTuple):
    """How an attempt ended. unable: the worker cannot write, which another one may. sentence: why
    it failed. diverged: whether its loss was not finite.
    """

    state: Literal["done", "failed", "stopped", "unable"]
    sentence: str = ""
    diverged: bool = False


def shipped(registered: Mapping[str, Mapping[str, str]]) -> dict[str, bytes]:
    """Contents of the Python files that registered names in this process, by path.

    registered: see `imports.REGISTERED`. Raises ConfigError for names that no file registered, such
    as those of an interactive session.
    """
    contents = {}
    for what, files in registered.items():
        for name, file in files.items():
            path = Path(file)
            if not path.is_file():
                why = f"registered by {file}, which workers cannot load"
                raise tables.ConfigError(what, name, why=why, allowed="one of a Python file")
            contents[file] = path.read_bytes()
    return contents


class Worker:
    """Runs members of one run, one after the other."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._turns: list[Any] = []
        self._problem: Any = None
        self._schedule: Any = None
        self._own_folder = ""
        self._folder = Path(setup.workdir)  # of the latest attempt
        self._source: mirror.Source | None = None
        os.environ.update(setup.environment)
        if setup.threads:
            os.environ["NPROC"] = str(setup.threads)  # XLA's number of threads on a CPU

    def prepare(self) -> Ready:
        """Loads data and makes the network, once."""
        try:
            environment = self._prepare()
        except Exception as error:  # whatever this machine lacks
            return Ready(_sentence_of(error), {})
        return Ready("", environment)

    def _prepare(self) -> Fields:
        setup = self._setup
        if os.path.isdir(setup.folder):
            os.chdir(setup.folder)  # paths in the config are relative to it
        if setup.keep_programs:
            compilation.keep()

        from sparsity_jax import building, durations, plans, progress, turns

        self._load_files()
        config = setup.config
        building.use_deterministic(config.get("deterministic", False))
        building.use_platform(config.get("platform", "default"))
        every = plans.check(config)
        with building.enough_memory_for("config.data", None, every[0].common):
            self._problem = building.build(every)
        self._schedule = durations.schedule_of(every, self._problem)
        self._turns = turns.turns_of(every, Path(setup.workdir), config)
        return progress.describe_environment(self._problem)

    def _own(self) -> str:
        """A folder of the worker's own, made at first use."""
        if not self._own_folder:
            self._own_folder = tempfile.mkdtemp(prefix="sparsity_jax_")
        return self._own_folder

    def _load_files(self) -> None:
        """Runs the Python files that registered names: those here where they are the same, else
        copies.
        """
        for name, content in self._setup.files.items():
            path = Path(name)
            if not path.is_file() or path.read_bytes() != content:
                path = Path(self._own(), path.name)
                path.write_bytes(content)
            imports.load(path)

    def run(self, index: int, attempt: lock.Attempt, start: mirror.Changes | None) -> Outcome:
        """Runs, or continues, the plan at `index`; a failure of whatever type leaves the worker
        whole.

        start: files that the attempt begins with, where the workdir is not seen.
        """
        try:
            with self._said_to(self._enter(index, start)):
                return self._attempt(index, attempt)
        except OSError as error:  # of the log itself
            return self._failure(error)

    def _enter(self, index: int, start: mirror.Changes | None) -> Path:
        """The folder of the plan at `index`, with the files to begin with."""
        self._source = None
        self._folder = folder = self._turns[index].folder
        if self._setup.sees_workdir:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        place = Path(self._own(), "now")  # what was there before, the launcher has
        shutil.rmtree(place, ignore_errors=True)
        self._folder = folder = place / workdirs.member_name(index)
        folder.mkdir(parents=True)
        source = mirror.Source(folder)
        if start is not None:
            mirror.apply(folder, start)
            source.changes()  # which the launcher has
        self._source = source
        return folder

    @contextlib.contextmanager
    def _said_to(self, folder: Path) -> Iterator[None]:
        """What is said inside goes to the log in `folder`."""
        path = folder / mirror.LOG
        with path.open("a", encoding="utf-8", buffering=1) as log, contextlib.redirect_stderr(log):
            yield

    def _attempt(self, index: int, attempt: lock.Attempt) -> Outcome:
        turn = self._turns[index]
        is_whole = len(self._turns) == 1  # then the launcher's lock is in this folder
        file = mirror.ATTEMPT_LOCK if is_whole else lock.FILE
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        place = f"{socket.gethostname()}, process {os.getpid()}"
        workdirs.say(f"attempt {attempt.number} of the launch {attempt.launch}: {place}, {now}")
        try:
            with (
                workdirs.naming(self._folder),
                lock.held(self._folder, attempt=attempt, file=file) as still_mine,
            ):
                workdirs.claim(self._folder, turn.config)
                self._run_plan(turn, still_mine)
        except KeyboardInterrupt:
            stopping.clear()
            workdirs.say("stopped; the next attempt goes on")
            return Outcome("stopped")
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return self._failure(error)
        return Outcome("done")

    def _failure(self, error: Exception) -> Outcome:
        """How an attempt ended, by what it raised."""
        from sparsity_jax import train

        if isinstance(error, OSError) and not _has_room(self._folder):
            return Outcome("unable", _sentence_of(error))
        diverged = isinstance(error, train.NonFiniteLossError)
        return Outcome("failed", _sentence_of(error), diverged)

    def _run_plan(self, turn: Any, still_mine: Any) -> None:
        from sparsity_jax import pipeline

        pipeline.run_plan(
            turn.plan, self._problem, self._folder, turn.config, self._schedule, still_mine
        )

    def news(self) -> mirror.Changes:
        """What was written since the last call, where the workdir is not seen."""
        if self._source is None:
            return mirror.Changes({}, [])
        return self._source.changes()

    def stop(self) -> None:
        """Asks the member that runs to save and stop."""
        stopping.request()

    def leave(self) -> None:
        """Removes what the worker wrote for itself."""
        if self._own_folder:
            shutil.rmtree(self._own_folder, ignore_errors=True)


def _has_room(folder: Path) -> bool:
    """Whether as much as `folder` holds, and at least a mebibyte, can be written beside it."""
    probe = folder.with_name(f".room_{uuid.uuid4().hex}")
    try:
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        with probe.open("wb") as file:
            for _ in range(sum(sizes) // len(_MEBIBYTE) + 1):
                file.write(_MEBIBYTE)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return True


def _sentence_of(error: Exception) -> str:
    """What went wrong, with its type where a sentence of the library does not say it all."""
    from sparsity_jax import train

    if isinstance(error, (OSError, tables.ConfigError, train.NonFiniteLossError)):
        return str(error)
    return f"{type(error).__name__}: {tables.reason_of(error)}"
