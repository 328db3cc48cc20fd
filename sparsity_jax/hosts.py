"""Processes on several hosts that compute one run together; of one process, all of this costs
nothing.

All processes run the same program on the same numbers, each with its share of every batch. What
only one may do, as writing files, is done by the first. What one alone learns, as a signal or a
full disk, the others learn at the same place of the program.
"""

import contextlib
import faulthandler
import json
import os
import re
import secrets
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparsity_jax import stopping, tables, watch
from sparsity_jax.tables import ConfigError

__all__ = [
    "Alarm",
    "EndedError",
    "agree",
    "begin",
    "by_first",
    "check_alike",
    "check_shared",
    "devices",
    "end",
    "gathered",
    "give_up",
    "is_first",
    "number",
    "of_first",
    "several",
    "together",
]

_LEAVING_SECONDS = 10  # that one that ends waits for the others to end too
_SEEN_SECONDS = 15.0  # after which a file must be seen by other hosts
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LOOPBACK = ("localhost", "127.0.0.1")
_BROKEN = (
    "(?i)gloo|nccl|connection|socket closed|unavailable|barrier"  # in an error of a collective
)
_RINGS = -1
_PADDED = 1024  # bytes that texts fill up, so that few programs gather them
_PASSED = 10_000  # calls
_Result = TypeVar("_Result")


class Alarm:
    """Rings every so many seconds by the clock of the first process, at the same call in all."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """The seconds begin anew."""
        self._begun = time.monotonic()
        self._calls = 0
        self._passed = 0  # calls that no process looks at its clock

    def rings(self) -> bool:
        """Whether the seconds are over; the first process tells the others a few times only."""
        elapsed = time.monotonic() - self._begun
        left = self._seconds - elapsed
        if not several():
            return left <= 0
        self._calls += 1
        if self._passed:
            self._passed -= 1
            return False
        pace = max(elapsed, 1e-6) / self._calls
        self._passed = of_first(_RINGS if left <= 0 else min(int(left / pace / 2), _PASSED))
        if self._passed != _RINGS:
            return False
        self._passed = 0
        return True


class EndedError(Exception):
    """Another process has failed, and said why; so this one ends too."""


# Beginning and end --------------------------------------------------------------------------------


def begin(place: watch.Place, limits: watch.Limits) -> None:
    """Meets the other processes of a run; called once, before jax computes anything.

    Raises ConfigError where a scheduler is asked that is not there. A process that does not come,
    or is lost later, ends all others from C++, see `watch`.
    """
    global _lost_seconds
    _lost_seconds = limits.lost_seconds
    address = place.address or None
    host, _, _ = place.address.rpartition(":")
    faulthandler.enable(2)  # where the runtime logs, see `watch`
    faulthandler.register(watch.WHERE, file=2, all_threads=False)
    watch.note(watch.JOINING)
    try:
        jax.distributed.initialize(
            address,
            num_processes=place.number if address else None,
            process_id=place.rank if address else None,
            coordinator_bind_address=address if host in _LOOPBACK else None,
            # the process that watches this one ends it earlier, and says so
            initialization_timeout=round(limits.join_seconds) + _LEAVING_SECONDS,
            heartbeat_timeout_seconds=round(limits.lost_seconds),
            shutdown_timeout_seconds=_LEAVING_SECONDS,
        )
    except ValueError as error:  # no scheduler that it knows
        why = f"but no scheduler tells the processes here ({tables.reason_of(error)})"
        allowed = "HOST:PORT,NUMBER,RANK"
        raise ConfigError("--distributed", "auto", why=why, allowed=allowed) from None
    watch.note(watch.BUSY)
    jax.monitoring.register_event_duration_secs_listener(_note_compiling)
    stopping.agree_by(_all_stop)


def end(*, told: bool = False) -> None:
    """Leaves the others, which end as well; where they do not, the runtime ends them.

    told: whether this process has said why it ends.
    """
    if several():
        if told:
            watch.note(watch.TOLD)
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()


def give_up(error: Exception) -> None:
    """After an error that nobody expected, to be called where it is handled: ends this process, if
    it is one of several.

    Where a connection to another one broke, it waits for the runtime, which soon knows which one is
    lost and says so, see `watch`.
    """
    if not several():
        return
    if re.search(_BROKEN, str(error)):
        time.sleep(_lost_seconds + _LEAVING_SECONDS)
    sys.stderr.write("".join(traceback.format_exception(error)))
    end(told=True)
    os._exit(1)


def _note_compiling(event: str, *_: Any, **__: Any) -> None:
    """Compilation begins when a program is lowered."""
    if event == _LOWERED:
        watch.note(watch.BUSY)
    elif event == _COMPILED:
        watch.note(watch.STEP)


def _meet() -> None:
    watch.meet(jax.process_index(), jax.process_count())


_looks = 0
_lost_seconds = 0.0


def _all_stop() -> bool:
    """Whether all stop here, because one of them was asked to a moment ago.

    All processes come by here in the same order. The runtime chooses one of the next looks, costs
    microseconds, and listens to SIGTERM alone.
    """
    global _looks
    _looks += 1
    _meet()
    watch.note(watch.STEP)
    if stopping.requested():
        os.kill(os.getpid(), signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(_looks)


# Who is there -------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized()


def number() -> int:
    """How many processes there are."""
    return jax.process_count() if several() else 1


def is_first() -> bool:
    """Whether this process writes the files of the run."""
    return not several() or jax.process_index() == 0


def devices(each: int) -> Sequence[jax.Device]:
    """The first `each` devices of every process, 0 for all, process by process."""
    if not several():
        return jax.local_devices()[: each or None]
    own: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        own.setdefault(device.process_index, []).append(device)
    return [device for index in sorted(own) for device in own[index][: each or None]]


# What all know ------------------------------------------------------------------------------------


def agree(flag: bool) -> bool:
    """Whether the flag is set in some process; all must come by."""
    if not several():
        return flag
    _meet()
    return bool(multihost_utils.process_allgather(np.array([flag])).any())


def of_first(value: int) -> int:
    """The value of the first process, below 2**31."""
    if not several():
        return value
    _meet()
    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def gathered(texts: Sequence[str]) -> list[str]:
    """The texts, one line each, of all processes, in their order."""
    if not several():
        return list(texts)
    _meet()
    own = np.frombuffer("\n".join(texts).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([own.size], np.int32)).ravel()
    if not lengths.any():
        return []
    padded = np.zeros(-(-int(lengths.max()) // _PADDED) * _PADDED, np.uint8)
    padded[: own.size] = own
    every = multihost_utils.process_allgather(padded)
    found: list[str] = []
    for length, data in zip(lengths, every, strict=True):
        found += data[:length].tobytes().decode().splitlines()
    return found


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes leave the block together: where one fails, it raises what it met, the others
    raise EndedError.
    """
    if not several():
        yield
        return
    watch.note(watch.BUSY)
    try:
        yield
    except Exception:
        agree(True)
        raise
    if agree(False):
        raise EndedError("another process has failed; see what that says.")


def by_first(action: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result | None:
    """What `action(*arguments, **options)` gives in the first process; None in the others, which
    wait until it is done, and raise EndedError where it fails.
    """
    with together():
        return action(*arguments, **options) if is_first() else None


def check_alike(what: str, value: Any) -> None:
    """Raises ConfigError, in every process, for JSON data that is not the same in all of them.

    what: its name.
    """
    if not several():
        return
    _meet()
    text = json.dumps(value, sort_keys=True)
    digest = np.array([zlib.crc32(text.encode())], np.uint32)
    every = multihost_utils.process_allgather(digest).ravel()
    differing = [str(index) for index, other in enumerate(every) if other != every[0]]
    if differing:
        told = ", ".join(differing)
        raise ConfigError(f"{what} of process {told} differs from that of process 0.")


def check_shared(folder: Path) -> None:
    """Raises ConfigError, in every process, unless all see the same `folder`, which is made."""
    if not several():
        return
    token = of_first(secrets.randbelow(2**31))
    probe = folder / f".probe_{token}"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()

    by_first(write)
    until = time.monotonic() + _SEEN_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < until:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # a network file system looks again
    missing = gathered([] if seen else [str(jax.process_index())])
    by_first(lambda: probe.unlink(missing_ok=True))
    if missing:
        told = ", ".join(missing)
        why = f"which process {told} does not see"
        raise ConfigError(
            "--workdir", str(folder), why=why, allowed="a folder that all hosts share"
        )
