"""Saving and restoring the arrays of a whole run, one pytree, with orbax; see `workdirs` for the
rest.
"""

import concurrent.futures
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import flags

from sparsity_jax import hosts, intact, meshes, tables, workdirs
from sparsity_jax.intact import DamagedError
from sparsity_jax.types import Config, PyTree
from sparsity_jax.workdirs import FOLDER, PROGRESS, STATE, Progress, Snapshot, numbers_in

__all__ = ["Checkpoints", "newest", "reading", "restore"]

_BARRIER = "experimental_orbax_use_distributed_barrier"  # a flag of orbax

# Reading ------------------------------------------------------------------------------------------


@contextmanager
def reading(snapshot: Snapshot) -> Iterator[None]:
    """What goes wrong inside, in whatever type, as a DamagedError that names the folder of the
    state.

    Checksums say that a state is as it was written, not that this library wrote it. A memory that
    is full stays what it is.
    """
    try:
        yield
    except (tables.ConfigError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        what = f"{snapshot.folder / STATE} is no state of this run's network"
        raise DamagedError(f"{what}: {tables.reason_of(error)}") from error


def restore(snapshot: Snapshot, like: PyTree) -> PyTree:
    """The state; `like`: arrays or shape structs (with shardings) of the same structure.

    Raises DamagedError where it is another one.
    """
    with reading(snapshot), closing(ocp.StandardCheckpointer()) as reader:
        return reader.restore(snapshot.folder / STATE, like)


def newest(workdir: Path) -> Snapshot | None:
    """`workdirs.newest`; of several processes, what the first finds."""
    found = hosts.by_first(workdirs.newest, workdir)
    number = hosts.of_first(int(found.folder.name) if found else 0)
    if hosts.is_first() or not number:
        return found
    return workdirs.read(Path(workdir).absolute() / FOLDER / str(number))


# Writing ------------------------------------------------------------------------------------------


class Checkpoints:
    """Writes the states of a run to `workdir/checkpoints` in the background; the newest `keep`
    stay.

    whole: the checkpoint that the run goes on from; it stays until newer ones are written. config:
        the run's, plain.
    before_save: called before every write, which an exception of it prevents.
    A thread of its own starts the writes, so that a Ctrl-C in the middle of one does not leave it
    half done. Of several processes each writes its arrays, and the first all else.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        whole: Snapshot | None = None,
        before_save: Callable[[], None] = lambda: None,
        keep: int = 2,
    ):
        self._folder = Path(workdir).absolute() / FOLDER
        self._config = config
        self._before_save = before_save
        self._keep = keep
        self._whole = [int(whole.folder.name)] if whole else []
        if hosts.several():
            _wait_without_devices()
        self._orbax = ocp.StandardCheckpointer()
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future | None = None

    def save(self, state: PyTree, progress: Progress) -> None:
        """Saves after all earlier ones; afterwards `state` may be donated and `progress.rows` may
        grow.

        The first one is read back and compared. Raises OSError where this one or the one before
        cannot be written, or is read otherwise than it was written; those before stay.
        """
        record = dict(progress._asdict(), rows=list(progress.rows), config=self._config)
        first = self._pending is None
        self._before_save()
        with self._told():
            self._wait()
            number = hosts.of_first(max(numbers_in(self._folder), default=0) + 1)
            self._writer.submit(self._begin, number, state).result()
            self._pending = self._writer.submit(self._finish, number, record)
            if first:
                hosts.by_first(self._wait)
        if first:
            self._check_readable(number, state)

    def _begin(self, number: int, state: PyTree) -> None:
        """Copies the arrays from the devices and begins to write them."""
        part = self._part(number)
        if hosts.is_first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self._orbax.save(part / STATE, state)

    def _finish(self, number: int, record: dict) -> None:
        """Once the arrays are written: the rest, the checksums, the final name; then older ones may
        go.
        """
        self._orbax.wait_until_finished()
        if not hosts.is_first():
            return
        part = self._part(number)
        (part / PROGRESS).write_text(json.dumps(record), encoding="utf-8")
        intact.seal(part)
        part.rename(self._folder / str(number))
        self._whole = [*self._whole, number][-self._keep :]
        for old in set(numbers_in(self._folder)) - set(self._whole):
            shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self._folder / f".writing_{number}"

    def _check_readable(self, number: int, state: PyTree) -> None:
        """Raises OSError unless the checkpoint `number` holds `state`, bit for bit."""
        folder = self._folder / str(number)
        reason = f"{folder} does not read as it was written"
        try:
            as_written = _same_bits(restore(workdirs.read(folder), state), state)
        except DamagedError as error:
            as_written = False
            reason = str(error)
        if not as_written:
            raise OSError(
                f"{reason}; the disk or file system of {self._folder} is not to be trusted."
            )

    def _wait(self) -> None:
        """Waits for the write under way; raises what made it fail."""
        if self._pending is not None:
            self._pending.result()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the file system, which come in many types with all their history, as a plain
        OSError.
        """
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
            try:
                self._wait()
            finally:
                self._orbax.close()


def _wait_without_devices() -> None:
    """Lets orbax's threads wait for other processes while the devices compute; by default they
    would wait by a program of their own, and each process might start the two in another order.
    """
    if not flags.FLAGS.is_parsed():  # without a command line
        flags.FLAGS.mark_as_parsed()
    flags.FLAGS[_BARRIER].value = True


def _same_bits(first: PyTree, second: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    content = lambda leaf: meshes.fetch(leaf).tobytes()
    return all(content(a) == content(b) for a, b in pairs)
