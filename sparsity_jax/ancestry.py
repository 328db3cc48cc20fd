"""The finished run that another one goes on from, and those before it: what they made, and what is
taken over.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsity_jax import checkpoint, finished, models, stored, versions, workdirs
from sparsity_jax.tables import ConfigError
from sparsity_jax.trees import named_leaves
from sparsity_jax.types import AnyPath, Config, Fields, PyTree, Rows
from sparsity_jax.workdirs import read_config

__all__ = ["check_arrays", "continue_from", "kinds", "of_member"]


def kinds(start: str, model: Config, sweep: Config) -> dict[str, str]:
    """Kinds, by name, of the stages that the run in `start` and those before it have finished; a
    weight file stands for a training.

    model, sweep: of the run that starts from it. Raises ConfigError if that run cannot be used.
    """
    _check(Path(start), model, sweep)
    kinds: dict[str, str] = {}
    for _, run in reversed([*_ancestry(start)]):
        if run.get("pretrained"):
            kinds["config.pretrained"] = "train"
        for name in run["pipeline"]:
            kinds[name] = run[name]["kind"]
    return kinds


def _check(path: Path, model: Config, sweep: Config) -> None:
    """Raises ConfigError unless `path` holds a finished run of the same network."""
    if not workdirs.holds_run(path):
        raise ConfigError("", why="which holds no run (no config.json)")
    other = read_config(path)
    there = models.complete(other.get("model") or {})
    differing = versions.told_differences(there, models.complete(model), "config.model")
    if differing:
        raise ConfigError("", why=f"a run of another network\n{differing}")
    theirs = other.get("sweep")
    alone = path.name.startswith("member_")
    if theirs and not alone and versions.as_saved(sweep) != theirs:
        allowed = f"with its sweep {versions.told(theirs)}"
        for folder in [*workdirs.member_folders(path).values()][:1]:
            allowed += f", or one of its networks, e.g. {folder}"
        raise ConfigError("", why="a run of several networks", allowed=allowed)
    if not finished.last_snapshots(path, other):
        raise ConfigError("", why="which is not finished: run it to its end first")


def _ancestry(path: AnyPath) -> Iterator[tuple[Path, Fields]]:
    """(path, config) of the run in `path`, of the run it started from, and so on, as far as they
    are still there.
    """
    path = Path(path)
    seen = set()
    while (path / "config.json").is_file():
        if path.resolve() in seen:
            raise ConfigError(
                str(path), why="started from a run that started from it", allowed="another run"
            )
        seen.add(path.resolve())
        config = read_config(path)
        yield path, config
        if not config.get("start_from"):
            return
        path = of_member(config["start_from"], path.name)


def of_member(start: str, name: str) -> Path:
    """The folder `name` of one member in the run `start`; that run itself if it has none."""
    folder = Path(start) / name
    if folder.is_dir():
        return folder
    return Path(start)


def check_arrays(path: AnyPath, shapes: PyTree, members: int | None) -> None:
    """Raises ConfigError if the parameters in the finished run in `path` do not have `shapes`, for
    each member.
    """
    snapshot = workdirs.newest(path)
    shapes_there = stored.shapes(snapshot) if snapshot else {}
    leading = () if members is None else (members,)
    for name, leaf in named_leaves(shapes).items():
        there = shapes_there.get(f"params/{name}")
        here = leading + leaf.shape
        if there != here:
            raise ConfigError(
                "config.start_from",
                str(path),
                why=f"whose params/{name} has the shape {there}",
                allowed=f"{here}, that of this run's network for its data",
            )


def continue_from(path: AnyPath, state: Any) -> tuple[Any, Rows]:
    """The network at the end of the finished run in `path`, under the own key of the train.State
    `state`, and that run's rows.

    They follow those of the runs it started from itself, except for stages that it made anew.
    """
    snapshots = [workdirs.newest(folder) for folder, _ in _ancestry(path)]
    saved = [snapshot for snapshot in snapshots if snapshot is not None]
    rows: Rows = []
    for snapshot in reversed(saved):
        rows = workdirs.behind(rows, snapshot.progress.rows)
    there = checkpoint.restore(saved[0], state)
    return there._replace(key=state.key), rows
