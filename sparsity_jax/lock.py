"""One run at a time in a workdir: `run.lock` names its owner and is refreshed while the run lives.

The lock is the run's, by an id of its own, not that of a process. Only runs take it; reports and
evaluations do not.
"""

import datetime
import fcntl
import getpass
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sparsity_jax import intact, tables
from sparsity_jax.types import Fields

__all__ = ["ATTEMPTED", "FILE", "STALE_SECONDS", "Attempt", "LockedError", "held", "refuse"]

FILE = "run.lock"
ATTEMPTED = "attempt.json"  # the latest attempt that held a member's folder
STALE_SECONDS = (
    600.0  # default of the time after which a lock of another host counts as left behind
)
_REFRESH_SECONDS = 20.0  # at most


class LockedError(tables.ConfigError):
    """The workdir is in use by another run; the message names its owner."""


class Attempt(NamedTuple):
    """One try of a launcher, which holds the lock of the whole workdir, to run a member of it.

    launch: of the launcher, the later the larger. number: of the try, from 1.
    """

    launch: str
    number: int


@contextmanager
def held(
    workdir: Path,
    *,
    stale_seconds: float = STALE_SECONDS,
    attempt: Attempt | None = None,
    file: str = FILE,
) -> Iterator[Callable[[], None]]:
    """Holds the lock of `workdir` while the context lasts; gives `check()`, which raises OSError
    once it is lost.

    A lock whose process on this host is gone is taken over at once; one of another host if it was
    not refreshed for `stale_seconds`. attempt: of a launcher, whose earlier ones have ended: their
    locks are taken over at once, and a later one takes over this. file: name of the lock. Raises
    LockedError where a run holds it, or a later attempt did.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / file
    mine = _describe()
    if attempt is not None:
        mine |= attempt._asdict()
    with _one_at_a_time(workdir):
        _refuse_owner(path, stale_seconds, attempt)
        _note(workdir, attempt)
        intact.write_object(path, mine)
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(min(_REFRESH_SECONDS, stale_seconds / 4)):
            with suppress(OSError):
                if _read(path).get("run") == mine["run"]:
                    os.utime(path)

    def check() -> None:
        too_late = _taken_over(workdir, attempt)
        if too_late:
            raise OSError(too_late)
        if not path.exists():
            intact.write_object(path, mine)
        other = _read(path)
        if other.get("run") != mine["run"]:
            raise OSError(
                f"{path} was taken over by {_owner(other)}; this run stops without saving."
            )

    refresher = threading.Thread(target=refresh, daemon=True)
    refresher.start()
    try:
        yield check
    finally:
        ended.set()
        refresher.join()
        with suppress(OSError):
            if _read(path).get("run") == mine["run"]:
                path.unlink()


def refuse(workdir: Path, *, stale_seconds: float = STALE_SECONDS) -> None:
    """Raises LockedError if a run that may still live holds the lock of `workdir`."""
    _refuse_owner(Path(workdir) / FILE, stale_seconds, None)


def _refuse_owner(path: Path, stale_seconds: float, attempt: Attempt | None) -> None:
    """Raises LockedError if a run that may still live holds the lock `path`, unless it is an
    attempt before this one.
    """
    if not path.exists():
        return
    owner = _read(path)
    if _is_gone(owner):
        return
    before = _attempt_in(owner)
    if attempt is not None and before is not None and before < attempt:
        return
    age = max(0.0, _now(path.parent) - path.stat().st_mtime)
    here = owner.get("machine") == _machine()
    if not here and age > stale_seconds:
        return
    left = "" if here else f" If it no longer lives, its lock ends in {stale_seconds - age:.0f} s."
    raise LockedError(
        f"{path.parent} is in use by {_owner(owner)}, whose {path.name} was refreshed "
        f"{age:.0f} s ago; "
        "wait for its end, "
        f"or use another --workdir.{left}"
    )


def _note(workdir: Path, attempt: Attempt | None) -> None:
    """Writes which attempt holds the folder. Raises LockedError where a later one did."""
    too_late = _taken_over(workdir, attempt)
    if too_late:
        raise LockedError(too_late)
    if attempt is not None:
        intact.write_object(workdir / ATTEMPTED, attempt._asdict())


def _taken_over(workdir: Path, attempt: Attempt | None) -> str:
    """A sentence if a later attempt has held the folder since, else ""."""
    latest = _attempt_in(_read(workdir / ATTEMPTED))
    if attempt is None or latest is None or latest <= attempt:
        return ""
    return (
        f"{workdir} was taken over by attempt {latest.number} of the launch {latest.launch}; "
        f"attempt {attempt.number} of {attempt.launch} stops without saving."
    )


def _attempt_in(saved: Fields) -> Attempt | None:
    """The attempt that a lock or record names, if it does."""
    launch = saved.get("launch")
    number = saved.get("number")
    if isinstance(launch, str) and isinstance(number, int):
        return Attempt(launch, number)
    return None


def _describe() -> Fields:
    """What this process writes into the lock."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = f"user {os.getuid()}"
    return dict(
        run=uuid.uuid4().hex,
        user=user,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        process=_process(os.getpid()),
    )


def _machine() -> str:
    """Where process ids mean the same: host and, on Linux, machine and namespace of process ids."""
    words = [socket.gethostname()]
    with suppress(OSError):
        words.append(Path("/etc/machine-id").read_text().strip())
    with suppress(OSError):
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)


def _process(pid: int) -> str:
    """A living process, told from others that had or will have its id: boot and start time where
    the system says.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        return f"{boot} {after_name.split()[19]}"
    return ""


def _is_gone(owner: Fields) -> bool:
    """Whether the owner was a process of this machine that no longer lives."""
    pid = owner.get("pid")
    if owner.get("machine") != _machine() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return owner.get("process") != _process(pid)


def _owner(owner: Fields) -> str:
    return (
        f"{owner.get('user', 'somebody')} on {owner.get('host', 'an unknown host')} "
        f"(process {owner.get('pid', 'unknown')}, since {owner.get('started', 'an unknown time')})"
    )


def _read(path: Path) -> Fields:
    """The owner; {} for a lock that cannot be read."""
    try:
        return intact.read_object(path)
    except (OSError, intact.DamagedError):
        return {}


def _now(folder: Path) -> float:
    """The time by the clock that stamps files in `folder`, which another host may keep."""
    probe = folder / f".{FILE}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes of this host, and of all hosts where the file system can, pass one after the
    other.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: `check` finds out
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
