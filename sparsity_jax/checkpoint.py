"""Saving and restoring a whole run with orbax: one pytree of arrays, and the rows and position beside it."""

import concurrent.futures
import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from sparsity_jax import tables, trees

PyTree = Any


class Progress(NamedTuple):
    """Where a run is. stage: index in the pipeline; begun: whether it has made its own state; rows: all so far."""

    stage: int
    begun: bool
    rows: list[dict]


class Checkpoints:
    """The newest states of a run in `workdir/checkpoints`: written atomically in the background, oldest dropped.

    A thread of its own starts the writes, so that a Ctrl-C or SIGTERM in the middle of one does not leave it half done.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, item_names=("state", "progress"), options=options)
        self._writer = concurrent.futures.ThreadPoolExecutor(1)

    def save(self, state: PyTree, progress: Progress) -> None:
        """Saves after all earlier ones; afterwards `state` may be donated and `progress.rows` may grow.

        Raises OSError where this one or the one before cannot be written; those before stay.
        """
        progress = progress._replace(rows=list(progress.rows))  # written later, when there may be more
        with self._told():
            self._writer.submit(self._save, state, progress).result()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the file system, which reach here as ValueError with all their history, as a plain OSError."""
        try:
            yield
        except ValueError as error:
            if "os_error_code" not in str(error):
                raise
            reason = str(error).rsplit(": ", 1)[-1].partition(" [os_error_code")[0]
            raise OSError(f"{self._folder} cannot be written: {reason}") from None

    def _save(self, state: PyTree, progress: Progress) -> None:
        self._manager.wait_until_finished()
        number = (self._manager.latest_step() or 0) + 1
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress._asdict()))
        self._manager.save(number, args=items)

    def progress(self) -> Progress | None:
        """Position and rows of the newest checkpoint, None if there is none."""
        number = self._manager.latest_step()
        if number is None:
            return None
        restored = self._manager.restore(number, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        return Progress(**restored.progress)

    def restore(self, like: PyTree) -> PyTree:
        """The newest state; `like`: arrays or shape structs (with shardings) of the same structure."""
        number = self._manager.latest_step()
        return self._manager.restore(number, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the newest state's arrays, by path."""
        return {path: leaf.shape for path, leaf in trees.named_leaves(self._metadata()).items()}

    def arrays(self) -> dict[str, jax.Array]:
        """The newest state's arrays by path, whatever wrote them, on one local device."""
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), self._metadata())
        return trees.named_leaves(self.restore(like))

    def _metadata(self) -> PyTree:
        """Shapes and types of the newest state's arrays in the structure in which they were written."""
        with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
            return reader.metadata(self._folder / str(self._manager.latest_step()) / "state").tree

    def close(self) -> None:
        """Waits for writes under way; raises OSError where they fail."""
        self._writer.shutdown()
        with self._told():
            self._manager.wait_until_finished()
            self._manager.close()


def finished_stages(workdir: pathlib.Path) -> int | None:
    """How many stages the run in `workdir` has finished; None if it has saved nothing."""
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        return None
    saved = Checkpoints(workdir)
    progress = saved.progress()
    saved.close()
    return progress and progress.stage


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether the run in `workdir` has finished all stages of its pipeline."""
    workdir = pathlib.Path(workdir)
    return (workdir / "config.json").is_file() and finished_stages(workdir) == len(read_config(workdir)["pipeline"])


def claim(workdir: pathlib.Path, config: dict) -> None:
    """Makes `workdir` the place of `config` (written to config.json), or checks that it already is.

    Raises ConfigError naming every field that differs.
    """
    refuse_other(workdir, config)
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        part.replace(path)


def refuse_other(workdir: pathlib.Path, config: dict) -> None:
    """Raises ConfigError naming every field that differs if `workdir` belongs to another config."""
    workdir, config = pathlib.Path(workdir), json.loads(json.dumps(config))
    if workdir.exists() and not workdir.is_dir():
        raise tables.ConfigError(f"{workdir} is a file; use another --workdir.")
    if (workdir / "config.json").exists():
        differing = differences(read_config(workdir), config)
        if differing:
            lines = "\n".join(f"  config.{name}: {old} there, {new} now" for name, old, new in differing)
            raise tables.ConfigError(f"{workdir} holds a run of another config; use another --workdir.\n{lines}")


def read_config(workdir: pathlib.Path) -> dict:
    """The config of the run in `workdir`; raises ConfigError for a file that holds none."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise tables.ConfigError(f"{path} is not readable as JSON ({error}); use another folder.") from None
    if not isinstance(found, dict):
        raise tables.ConfigError(f"{path} holds no config but a {type(found).__name__}; use another folder.")
    return found


def differences(first: Any, second: Any, path: str = "") -> list[tuple[str, str, str]]:
    """(field, value in first, value in second) of every field that differs."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for name in sorted({*first, *second}):
            deeper = f"{path}.{name}" if path else name
            missing = {"absent"}
            a, b = first.get(name, missing), second.get(name, missing)
            if a is missing or b is missing:
                show = lambda x: "absent" if x is missing else json.dumps(x)  # noqa: B023 - used at once
                found.append((deeper, show(a), show(b)))
            else:
                found += differences(a, b, deeper)
        return found
    return [] if first == second else [(path, json.dumps(first), json.dumps(second))]


def abstract(tree: PyTree) -> PyTree:
    """Shape structs of `tree`, with the shardings of its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)
