"""A run whose members are handed to workers: checked here, trained there, reported here."""

import contextlib
import datetime
import functools
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparsity_jax import (
    finished,
    imports,
    lock,
    members,
    pipeline,
    plans,
    progress,
    provenance,
    report,
    turns,
    workdirs,
)
from sparsity_jax.launching import dispatch, mirror, ray_cluster, resources, worker
from sparsity_jax.launching.tasks import Task
from sparsity_jax.report import Writer
from sparsity_jax.train import NonFiniteLossError
from sparsity_jax.turns import Turn
from sparsity_jax.types import AnyPath, Config, Fields, Rows
from sparsity_jax.workdirs import say

__all__ = ["RETRIES", "run"]

RETRIES = 3  # default of the times that a lost worker of a member is replaced
_LOG_LINES = 20  # of the end of a log, in the report
_SHIPPED = ("JAX_", "XLA_FLAGS")  # beginnings of the variables that decide numbers


def run(
    config: Config,
    workdir: AnyPath,
    *,
    needs: str = "",
    address: str = "",
    retries: int = RETRIES,
    keep_programs: bool = False,
    command: str = "",
    config_file: AnyPath | None = None,
    lock_seconds: float = lock.STALE_SECONDS,
) -> Rows:
    """Runs, or continues, the members of a sweep on a cluster of Ray; the rows of all.

    needs: resources of each worker, see `resources.read`. address: of the cluster; RAY_ADDRESS, or
    a local one, where it is empty. retries: how often a lost worker of a member is replaced.
    keep_programs: whether workers keep compiled programs on disk. The other options, and what is
    raised, are those of `pipeline.run`; members.FailedError too, once the other members have run.
    """
    config = pipeline.plain(config)
    workdir = Path(workdir)
    workdirs.check_path(workdir)
    wanted = resources.read(needs)
    jax.config.update("jax_platforms", "cpu")  # a GPU of this machine is for workers
    if workdirs.holds_run(workdir) and workdirs.read_config(workdir) == config:
        snapshots = finished.last_snapshots(workdir, config)
        if snapshots:
            return finished.write_again(workdir, config, snapshots)[1]
    with imports.telling_files(workdir):
        every = turns.turns_of(plans.check(config), workdir, config)
    files = worker.shipped(imports.REGISTERED)
    workdirs.refuse_other(workdir, config)
    if len(every) == 1:
        workdirs.refuse_members(workdir)
    lock.refuse(workdir, stale_seconds=lock_seconds)
    setup = worker.Setup(
        config=config,
        workdir=str(workdir.absolute()),
        folder=os.getcwd(),
        sees_workdir=True,
        files=files,
        environment=_variables(os.environ),
        threads=int(wanted.cpu) if "cpu" in needs or not wanted.gpu else 0,
        keep_programs=keep_programs,
    )
    tasks = [_task(turn, index) for index, turn in enumerate(every)]
    with contextlib.ExitStack() as ends:
        cluster = ends.enter_context(ray_cluster.connected(address, wanted))
        still_mine = ends.enter_context(lock.held(workdir, stale_seconds=lock_seconds))
        ends.enter_context(workdirs.naming(workdir))
        seen = cluster.survey(workdir)
        ray_cluster.compare(ray_cluster.versions(), seen)
        unseen = [node.host for node in seen if not node.workdir]
        if unseen:
            setup = setup._replace(sees_workdir=False)
            hosts = ", ".join(dict.fromkeys(unseen))
            say(f"{hosts}: {workdir} is not seen there; files of members come back through Ray")
        workdirs.claim(workdir, config)
        imports.remember(workdir)
        origin = provenance.describe(config, command=command, config_file=config_file)
        tell = functools.partial(_tell_environment, workdir, origin)
        launch = dispatch.Dispatch(
            tasks,
            [dispatch.Place(turn.folder, turn.config) for turn in every],
            start=lambda: cluster.start(setup),
            room=cluster.room,
            launch=_name(),
            retries=retries,
            fetches=bool(unseen),
            still_mine=still_mine,
            greeted=tell,
        )
        launch.run()
        rows = _rows_of(every, workdir)
        _tell_failed(workdir, every, tasks)
        progress.write_report(workdir, config, rows)
    _raise_failed(tasks)
    return rows


def _name() -> str:
    """Of a launch: later ones sort behind earlier ones."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now.isoformat(timespec='microseconds')} {uuid.uuid4().hex[:8]}"


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that workers need to compute the same numbers."""
    return {name: value for name, value in environment.items() if name.startswith(_SHIPPED)}


def _task(turn: Turn, index: int) -> Task:
    """The task of a plan; one that has finished is done."""
    plan = turn.plan
    together = [plan.members[0].stages[name].together() for name in plan.pipeline]
    program = (repr(together), plan.size)
    snapshot = workdirs.newest(turn.folder)
    is_done = snapshot is not None and snapshot.is_finished
    state: Any = "done" if is_done else "waiting"
    return Task(index, plan.name, len(plan.members), program, state)


def _tell_environment(workdir: Path, origin: Fields, environment: Fields) -> None:
    """Writes what a new worker says of its machine; other machines are added."""
    known = report.continued(workdir, environment | origin)
    known.pop(report.FAILED, None)
    report.write_environment(workdir, known)


def _rows_of(every: list[Turn], workdir: Path) -> Rows:
    """The rows of all members so far, which are written as those of the whole run."""
    rows: Rows = []
    for turn in every:
        snapshot = workdirs.newest(turn.folder)
        path = turn.folder / report.METRICS
        own: Rows = []
        if snapshot is not None and snapshot.is_finished:
            own = snapshot.progress.rows
        elif path.is_file():
            own = report.read_rows(path)
        rows += workdirs.renumbered(own, turn.plan.numbers[0] if len(every) > 1 else 0)
    Writer(workdir, rows).close()
    return rows


def _tell_failed(workdir: Path, every: list[Turn], tasks: list[Task]) -> None:
    """Writes to environment.json, for the report, which members failed, and why."""
    environment = report.read_environment(workdir) or {}
    environment.pop(report.FAILED, None)
    failed = {}
    for turn, task in zip(every, tasks, strict=True):
        if task.state == "failed":
            log = turn.folder / mirror.LOG
            failed[task.name] = {"why": task.sentence, "log": str(log), "end": _end_of(log)}
    if failed:
        environment[report.FAILED] = failed
    report.write_environment(workdir, environment)


def _end_of(log: Path) -> str:
    """The last lines of a log, "" without one."""
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:])


def _raise_failed(tasks: list[Task]) -> None:
    """Raises what says of every failed member why, if there are any."""
    failed = [task for task in tasks if task.state == "failed"]
    lines = "\n".join(f"{task.name}: {task.sentence}" for task in failed)
    if failed and all(task.diverged for task in failed):
        raise NonFiniteLossError(lines)
    if failed:
        raise members.FailedError(lines)
