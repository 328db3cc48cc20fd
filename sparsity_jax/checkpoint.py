"""Saving and restoring a whole run: one pytree of arrays, written by orbax, and the rows and position beside it.

A checkpoint is a folder `workdir/checkpoints/NUMBER` with the arrays in `state`, the rest in `progress.json`, and the
checksums of all files in `SHA256SUMS`. It appears at once, whole, and is verified before anything in it is read.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm

from sparsity_jax import intact, tables, trees

PyTree = Any
FOLDER, STATE, PROGRESS = "checkpoints", "state", "progress.json"
UNREADABLE = r"[\[\]\\]|:/"  # in paths: orbax's reader takes them for patterns or addresses


def say(message: str) -> None:
    """One line for the person at the terminal."""
    tqdm.tqdm.write(message, file=sys.stderr)


class Progress(NamedTuple):
    """Where a run is. stage: index in the pipeline; begun: whether it has made its own state; rows: all so far."""

    stage: int
    begun: bool
    rows: list[dict]


# Reading -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is whole. config: of its run, as plain data."""

    folder: pathlib.Path
    progress: Progress
    config: dict

    def restore(self, like: PyTree) -> PyTree:
        """The state; `like`: arrays or shape structs (with shardings) of the same structure."""
        with contextlib.closing(ocp.StandardCheckpointer()) as reader:
            return reader.restore(self.folder / STATE, like)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the state's arrays, by path."""
        return {path: leaf.shape for path, leaf in trees.named_leaves(self._metadata()).items()}

    def tree(self) -> PyTree:
        """The state as nested dicts, whatever wrote it, on one local device."""
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        struct = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return self.restore(jax.tree.map(struct, self._metadata()))

    def arrays(self) -> dict[str, jax.Array]:
        """The state's arrays by path, whatever wrote them, on one local device."""
        return trees.named_leaves(self.tree())

    def _metadata(self) -> PyTree:
        """Shapes and types of the state's arrays in the structure in which they were written."""
        with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
            return reader.metadata(self.folder / STATE).tree


def newest(workdir: pathlib.Path) -> Snapshot | None:
    """The newest whole checkpoint of the run in `workdir`; None if it has saved nothing.

    One that is damaged is passed over, aloud. Raises DamagedError if there are checkpoints, but none is whole.
    """
    folder = pathlib.Path(workdir).absolute() / FOLDER
    while True:
        numbers = _numbers(folder)
        damages = []
        for number in reversed(numbers):
            problem = intact.damage(folder / str(number))
            if not problem:
                for found in damages:
                    say(f"checkpoint passed over: {found}; the one before is used")
                return _read(folder / str(number))
            damages.append(problem)
        if not damages:
            return None
        if numbers == _numbers(folder):  # else the run has gone on in the meantime
            raise intact.DamagedError(
                f"no checkpoint in {folder} is whole: {'; '.join(damages)}. Without that folder the run starts anew."
            )


def _read(folder: pathlib.Path) -> Snapshot:
    saved = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return Snapshot(folder, Progress(saved["stage"], saved["begun"], saved["rows"]), saved["config"])


def _numbers(folder: pathlib.Path) -> list[int]:
    """Numbers of the checkpoints in `folder`, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


# Writing -----------------------------------------------------------------------------------------------------


class Checkpoints:
    """Writes the states of a run to `workdir/checkpoints` in the background; the newest `keep` stay.

    whole: the checkpoint that the run goes on from; it stays until newer ones are written. config: the run's, plain.
    before_save: called before every write, which an exception of it prevents.
    A thread of its own starts the writes, so that a Ctrl-C in the middle of one does not leave it half done.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: dict,
        whole: Snapshot | None = None,
        before_save: Callable[[], None] = lambda: None,
        keep: int = 2,
    ):
        self._folder = pathlib.Path(workdir).absolute() / FOLDER
        self._config = config
        self._before_save = before_save
        self._keep = keep
        self._whole = [int(whole.folder.name)] if whole else []
        self._orbax = ocp.StandardCheckpointer()
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future | None = None

    def save(self, state: PyTree, progress: Progress) -> None:
        """Saves after all earlier ones; afterwards `state` may be donated and `progress.rows` may grow.

        The first one is read back and compared. Raises OSError where this one or the one before cannot be written, or
        is read otherwise than it was written; those before stay.
        """
        record = dict(progress._asdict(), rows=list(progress.rows), config=self._config)
        first = self._pending is None
        self._before_save()
        with self._told():
            self._wait()
            number = max(_numbers(self._folder), default=0) + 1
            self._writer.submit(self._begin, number, state).result()
            self._pending = self._writer.submit(self._finish, number, record)
            if first:
                self._wait()
        if first:
            self._check_readable(number, state)

    def _begin(self, number: int, state: PyTree) -> None:
        """Copies the arrays from the devices and begins to write them."""
        part = self._part(number)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self._orbax.save(part / STATE, state)

    def _finish(self, number: int, record: dict) -> None:
        """Once the arrays are written: the rest, the checksums, the final name; then older ones may go."""
        self._orbax.wait_until_finished()
        part = self._part(number)
        (part / PROGRESS).write_text(json.dumps(record), encoding="utf-8")
        intact.seal(part)
        part.rename(self._folder / str(number))
        self._whole = [*self._whole, number][-self._keep :]
        for old in set(_numbers(self._folder)) - set(self._whole):
            shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def _part(self, number: int) -> pathlib.Path:
        return self._folder / f".writing_{number}"

    def _check_readable(self, number: int, state: PyTree) -> None:
        """Raises OSError unless the checkpoint `number` holds `state`, bit for bit."""
        folder = self._folder / str(number)
        reason = intact.damage(folder)
        if not reason and not _same_bits(_read(folder).restore(abstract(state)), state):
            reason = f"{folder} does not read as it was written"
        if reason:
            raise OSError(f"{reason}; the disk or file system of {self._folder} is not to be trusted.")

    def _wait(self) -> None:
        """Waits for the write under way; raises what made it fail."""
        if self._pending is not None:
            self._pending.result()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the file system, which come in many types with all their history, as a plain OSError."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{self._folder} cannot be written: {error.strerror or error}") from None
        except ValueError as error:
            if "os_error_code" not in str(error):
                raise
            reason = str(error).rsplit(": ", 1)[-1].partition(" [os_error_code")[0]
            raise OSError(f"{self._folder} cannot be written: {reason}") from None

    def close(self) -> None:
        """Waits for writes under way; raises OSError where they fail."""
        self._writer.shutdown()
        with self._told():
            self._wait()
            self._orbax.close()


def _same_bits(first: PyTree, second: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# Workdirs ----------------------------------------------------------------------------------------------------


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether the run in `workdir` has finished all stages of its pipeline."""
    saved = newest(workdir)
    return saved is not None and saved.progress.stage == len(saved.config["pipeline"])


def check_path(workdir: pathlib.Path) -> None:
    """Raises ConfigError for a path under which checkpoints could not be read."""
    path = pathlib.Path(workdir).absolute()
    if re.search(UNREADABLE, str(path)):
        raise tables.ConfigError(
            f"--workdir is {path}; allowed: paths without [, ], backslash, or a name that ends in a colon."
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
    """Raises ConfigError naming every field that differs if `workdir` belongs to another config."""
    workdir, config = pathlib.Path(workdir), json.loads(json.dumps(config))
    if workdir.exists() and not workdir.is_dir():
        raise tables.ConfigError(f"{workdir} is a file; use another --workdir.")
    if holds_run(workdir):
        differing = differences(read_config(workdir), config)
        if differing:
            lines = "\n".join(f"  config.{name}: {old} there, {new} now" for name, old, new in differing)
            raise tables.ConfigError(f"{workdir} holds a run of another config; use another --workdir.\n{lines}")


def holds_run(workdir: pathlib.Path) -> bool:
    """Whether a run has begun in `workdir`."""
    workdir = pathlib.Path(workdir)
    return (workdir / "config.json").is_file() or bool(_numbers(workdir / FOLDER))


def read_config(workdir: pathlib.Path) -> dict:
    """The config of the run in `workdir`: of config.json, or where that is damaged, aloud, of the newest checkpoint.

    Raises ConfigError for a file that holds none, or not the one that was written.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        config = _parse_config(path)
        problem = f"{path} is not as it was written (its checksum differs)" if intact.is_changed(path) else ""
    except tables.ConfigError as error:
        config, problem = None, str(error)
    if not problem:
        return config
    saved = newest(workdir)
    if saved is None:
        raise tables.ConfigError(f"{problem}; use another folder.")
    if saved.config != config:
        say(f"{problem}; the config of the newest checkpoint is used")
    return saved.config


def _parse_config(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise tables.ConfigError(f"{path} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise tables.ConfigError(f"{path} is not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise tables.ConfigError(f"{path} holds no config but a {type(found).__name__}")
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
