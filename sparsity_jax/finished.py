"""A run that has finished: its last checkpoints, from which its files are written again."""

from pathlib import Path

from sparsity_jax import checkpoint, hosts, members, progress, stored, workdirs
from sparsity_jax.report import Writer
from sparsity_jax.train import Metrics, State
from sparsity_jax.types import Config, Rows
from sparsity_jax.workdirs import Snapshot

__all__ = ["last_snapshots", "write_again"]


def last_snapshots(workdir: Path, config: Config) -> list[Snapshot]:
    """The last checkpoint of every separate member of a finished run; [] for a run that is not
    finished.
    """
    folders = list(workdirs.member_folders(workdir).values())
    begun = sum(len(members.expand(workdirs.read_config(folder))) for folder in folders)
    if folders and begun < len(members.expand(config)):
        return []
    snapshots = []
    for folder in folders or [workdir]:
        snapshot = workdirs.newest(folder)
        if snapshot is None or not snapshot.is_finished:
            return []
        snapshots.append(snapshot)
    return snapshots


def write_again(workdir: Path, config: Config, snapshots: list[Snapshot]) -> tuple[State, Rows]:
    """Writes rows and report; versions stay those that the run was made with.

    snapshots: the `last_snapshots`. Returns the state of the last one, and the rows of all.
    """
    rows = hosts.by_first(_write_rows, workdir, config, snapshots) or []
    with checkpoint.reading(snapshots[-1]):
        parts = stored.tree(snapshots[-1])
        state = State(**{**parts, "metrics": Metrics(**parts["metrics"])})
    return state, rows


def _write_rows(workdir: Path, config: Config, snapshots: list[Snapshot]) -> Rows:
    """Writes rows and report; returns the rows of all."""
    folders = workdirs.member_folders(workdir)
    rows: Rows = []
    for first, snapshot in zip(folders or [0], snapshots):
        own = snapshot.progress.rows
        if folders:
            Writer(snapshot.workdir, own).close()
        rows += workdirs.renumbered(own, first)
    Writer(workdir, rows).close()
    progress.write_report(workdir, config, rows)
    return rows
