"""A run of several processes is the child of a small process without jax, which hands signals on
and ends it when it no longer gets on.

The runtime of several processes ends one of them from C++, where nobody can catch it, and a process
that waits for another one waits for ever: only another process can tell what happened.
"""

import contextlib
import os
import re
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from sparsity_jax import attendance
from sparsity_jax.tables import ConfigError

__all__ = [
    "AUTOMATIC",
    "BUSY",
    "JOINING",
    "STARTING",
    "STEP",
    "TOLD",
    "VARIABLE",
    "WHERE",
    "Limits",
    "Place",
    "begin",
    "define",
    "meet",
    "note",
    "place_of",
    "read",
]

VARIABLE = "SPARSITY_JAX_DISTRIBUTED"  # the default of --distributed
_CHILD = "SPARSITY_JAX_WATCHED"  # in a child: the file descriptors that it shares with its parent
_FORMS = "off, auto, or HOST:PORT,NUMBER,RANK, e.g. 10.0.0.1:1234,2,0"
_LOOK = 0.5  # seconds between two looks at the child
_KEPT = 400  # lines of the runtime's log that are remembered
_INTERRUPTED = 130  # exit code
_FOLDER = ".processes"  # in the workdir, where those that wait say how far they are
_CALLS = 20  # of that, while a process is waited for
_PACE = 5.0  # most seconds between two of them
_FAR = struct.Struct("=3q")  # rank, how many processes there are, how often this one has met them
WHERE = signal.SIGUSR2  # asks a child to show where it is

# What a child notes, one byte each
STARTING = b"s"
JOINING = b"j"  # the other processes are waited for
BUSY = b"b"  # a program is compiled, data loaded, or a report written
STEP = b"."  # a piece of work is done
TOLD = b"t"  # it has said why it ends
_ALIVE = b"a"  # it is not stopped
_MARKS = TOLD + _ALIVE  # what it may note beside what it does
_ALIVE_SECONDS = 0.5  # between two such notes
_LONG = (STARTING, BUSY)  # what may take long


class Place(NamedTuple):
    """A process among all of a run: address of the first one, how many there are, its rank from 0.

    An empty address: the scheduler is asked.
    """

    address: str
    number: int
    rank: int


AUTOMATIC = Place("", 0, 0)


class Limits(NamedTuple):
    """Seconds after which a run ends: join: until all processes have come; lost: since the last
    sign of life of one of them; step: between two steps; compile: between two while a program is
    compiled or data is loaded.
    """

    join_seconds: float
    lost_seconds: float
    step_seconds: float
    compile_seconds: float


# The command line ---------------------------------------------------------------------------------

_TIMES = {
    "join_seconds": (300.0, "How long the processes of --distributed wait for each other."),
    "lost_seconds": (
        60.0,
        "A process of --distributed without a sign of life for so long is lost, and all end.",
    ),
    "step_seconds": (
        600.0,
        "A process of --distributed that finishes no step for so long is ended, and with it all.",
    ),
    "compile_seconds": (
        3600.0,
        "The same while a program is compiled, data is loaded, or a report is written.",
    ),
}


def define(values: flags.FlagValues) -> None:
    """Adds `--distributed` and its limits to the flags `values`."""
    flags.DEFINE_string(
        "distributed",
        os.environ.get(VARIABLE, "off"),
        (
            "One run on several processes, a command on each host: auto (Slurm, Open MPI, "
            "Kubernetes, TPUs tell the rest), off, or HOST:PORT,NUMBER,RANK: where the first "
            f"process listens, how many there are, and which one this is. Default: ${VARIABLE}."
        ),
        flag_values=values,
    )
    for name, (seconds, text) in _TIMES.items():
        flags.DEFINE_float(name, seconds, text, lower_bound=1.0, flag_values=values)


def place_of(text: str) -> Place | None:
    """What `--distributed` says; None: a run of one process. Raises ConfigError."""
    if text == "off":
        return None
    if text == "auto":
        return AUTOMATIC
    found = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", text)
    if found is None:
        raise ConfigError("--distributed", text, allowed=_FORMS)
    place = Place(found[1], int(found[2]), int(found[3]))
    if place.rank >= place.number:
        allowed = f"a RANK below the NUMBER of processes, {place.number}"
        raise ConfigError("--distributed", text, allowed=allowed)
    return place


def read(values: flags.FlagValues) -> tuple[Place | None, Limits]:
    """What flags with those of `define` say. Raises ConfigError."""
    given = values.flag_values_dict()
    seconds = [given[name] for name in Limits._fields]
    return place_of(given["distributed"]), Limits(*seconds)


# The child ----------------------------------------------------------------------------------------

_notes: int | None = None  # file descriptor of the parent's pipe
_far: int | None = None  # of a file that both have
_met = 0


def note(what: bytes) -> None:
    """Tells the process that watches this one what it does; nothing where there is none."""
    if _notes is not None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(_notes, what)


def meet(rank: int, number: int) -> None:
    """Process `rank` of `number` comes to where it meets the others, all in the same order."""
    global _met
    _met += 1
    if _far is not None:
        os.pwrite(_far, _FAR.pack(rank, number, _met), 0)


def begin(arguments: Sequence[str]) -> None:
    """Where `arguments` ask for several processes, starts this command again as a child, watches
    it, and ends with its exit code. In the child, and for one process, it returns.
    """
    shared = os.environ.pop(_CHILD, "")
    if shared:
        _connect(*map(int, shared.split(",")))
        return
    known = flags.FlagValues()
    define(known)
    for name in ("workdir", "member"):
        flags.DEFINE_string(name, "", "", flag_values=known)
    try:
        known(["run", *_flags_in(arguments, known)], known_only=True)
        place, limits = read(known)
    except (flags.Error, ConfigError) as error:
        sys.exit(f"error: {error}")
    if place is None:
        return
    given = known.flag_values_dict()
    folder = Path(given["workdir"], f"{_FOLDER}{given['member']}")
    sys.exit(_Watch(place, limits, folder).run())


def _flags_in(arguments: Sequence[str], known: flags.FlagValues) -> Iterator[str]:
    """Of a command line the flags that are known, in one word each."""
    following = [*arguments[1:], ""]
    for argument, value in zip(arguments, following):
        name, equals, _ = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name in known:
            yield argument if equals else f"{argument}={value}"


def _connect(notes: int, far: int, life: int, output: int, terminal: int) -> None:
    """Makes this process one that is watched.

    notes: where `note` writes. far: a file where `meet` does. life: a pipe that ends with the
    parent. output, terminal: the standard output and error of the command; the parent reads this
    process's own, where the runtime writes from C++.
    """
    global _notes, _far
    _notes = notes
    _far = far
    for descriptor in (notes, far, life, output, terminal):
        os.set_inheritable(descriptor, False)
    os.set_blocking(notes, False)
    encoding = sys.stdout.encoding
    errors = sys.stdout.errors
    sys.stdout = open(output, "w", buffering=1, encoding=encoding, errors=errors)  # noqa: SIM115
    sys.stderr = open(terminal, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115

    def follow() -> None:
        while not select.select([life], [], [], _ALIVE_SECONDS)[0]:
            note(_ALIVE)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# The parent ---------------------------------------------------------------------------------------

_OF_RUNTIME = re.compile(r"[IWEF]\d{4} .*(coordination|preemption|distributed|client\.h)|\[Gloo\]")
_OF_LOG = re.compile(r"[IWEF]\d{4} \d\d:\d\d|\[Gloo\]")


class _Lines:
    """Lines of text that comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def of(self, data: bytes) -> list[str]:
        """Those that end with `data`; without data, what is left."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            lines = [self._rest]
        return [line.decode(errors="replace") for line in lines]


class _Watch:
    """The life of a child. folder: where processes that wait say how far they are."""

    def __init__(self, place: Place, limits: Limits, folder: Path):
        self._place = place
        self._limits = limits
        self._folder = folder
        self._host = socket.gethostname()
        self._others = attendance.Attendance(folder, f"{self._host}-{os.getpid()}")
        self._far = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._far.write(bytes(_FAR.size))  # so that a full disk is met here
        self._over = threading.Event()
        self._doing = STARTING
        self._since = time.monotonic()
        self._alive = self._since
        self._told = False
        self._asked = 0  # signals
        self._log: list[str] = []  # what the runtime said
        self._hidden = False  # whether the line before was the runtime's
        self._log_lines = _Lines()
        self._output_lines = _Lines()

    def run(self) -> int:
        """Starts the child; its exit code, not zero where it did not end by itself."""
        notes, child_notes = os.pipe()
        child_life, life = os.pipe()
        log, child_log = os.pipe()
        output, child_output = os.pipe()
        far = os.dup(self._far.fileno())
        shared = (child_notes, far, child_life, os.dup(1), os.dup(2))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hand_on)
        self._child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, _CHILD: ",".join(map(str, shared))},
            pass_fds=shared,
            stdout=child_output,
            stderr=child_log,
            start_new_session=True,  # signals of the terminal come through this process
        )
        for descriptor in (*shared, child_output, child_log):
            os.close(descriptor)
        saying = threading.Thread(target=self._say, daemon=True)
        saying.start()
        why = self._wait(notes, output, log)
        os.close(life)
        code = self._ended(why)
        self._over.set()
        saying.join(_PACE)
        return code

    def _hand_on(self, *_: Any) -> None:
        """A signal: the first one asks the run to save and end, the second ends it at once."""
        self._asked += 1
        working = self._doing in (STEP, BUSY)
        number = signal.SIGTERM if working and self._asked == 1 else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def _say(self) -> None:
        """A thread, for a disk may hang: while the others are waited for, says how far this process
        is.
        """
        patience = self._limits.step_seconds / 2
        pace = min(_PACE, min(self._limits.join_seconds, patience) / _CALLS)
        while not self._over.wait(pace):
            waits = self._doing == JOINING or time.monotonic() - self._since > patience
            if not waits:
                self._others.leave()
                continue
            rank, _, met = self._how_far()
            own = attendance.Sign(rank, self._host, met, self._doing in _LONG)
            with contextlib.suppress(OSError):  # what the others say is then not known
                self._others.call(own)
        self._others.leave()

    def _how_far(self) -> tuple[int, int, int]:
        """Rank, number of processes, and how often the child has met them."""
        rank, number, met = _FAR.unpack(os.pread(self._far.fileno(), _FAR.size, 0))
        if met:
            return rank, number, met
        if self._place == AUTOMATIC:
            return -1, 0, 0
        return self._place.rank, self._place.number, 0

    def _wait(self, notes: int, output: int, log: int) -> str:
        """Until the child has ended; why this process ended it, or ""."""
        why = ""
        with selectors.DefaultSelector() as selector:
            selector.register(notes, selectors.EVENT_READ, self._read_notes)
            selector.register(output, selectors.EVENT_READ, self._read_output)
            selector.register(log, selectors.EVENT_READ, self._read_log)
            while self._child.poll() is None:
                self._look(selector, _LOOK)
                why = self._overdue()
                if why and self._doing != JOINING:
                    self._hidden = False
                    self._child.send_signal(WHERE)
                    self._look(selector, _LOOK)
                if why:
                    os.killpg(self._child.pid, signal.SIGKILL)
                    self._child.wait()
            while self._look(selector, 0):
                continue
        return why

    def _look(self, selector: selectors.BaseSelector, seconds: float) -> bool:
        """Reads what the child has written; whether there was something within so many seconds."""
        found = selector.select(seconds)
        for key, _ in found:
            data = os.read(key.fd, 2**16)
            key.data(data)
            if not data:
                selector.unregister(key.fd)
        return bool(found)

    def _read_notes(self, data: bytes) -> None:
        now = time.monotonic()
        self._told |= TOLD in data
        doing = data.translate(None, _MARKS)[-1:]
        if data:
            self._alive = now
        if doing:
            self._doing = doing
            self._since = now

    def _read_output(self, data: bytes) -> None:
        """Hands on what the child prints, but for what its runtime does."""
        for line in self._output_lines.of(data):
            if _OF_RUNTIME.match(line):
                self._keep(line)
            else:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()

    def _keep(self, line: str) -> None:
        self._log = [*self._log, line][-_KEPT:]

    def _read_log(self, data: bytes) -> None:
        """Shows what the child logs, but for what its runtime says of other processes."""
        for line in self._log_lines.of(data):
            if _OF_LOG.match(line):
                self._hidden = bool(_OF_RUNTIME.match(line))
            if self._hidden:
                self._keep(line)
            else:
                sys.stderr.write(f"{line}\n")

    def _overdue(self) -> str:
        """What to say where the child takes too long for what it does; else ""."""
        now = time.monotonic()
        limits = self._limits
        if now - self._alive > limits.lost_seconds:
            seconds = f"{limits.lost_seconds:g} s (--lost_seconds)"
            return f"gave no sign of life for {seconds}: it is stopped, or its host is"
        if self._doing == JOINING:
            late = now - self._since > limits.join_seconds
            return self._not_joined() if late else ""
        name = "compile_seconds" if self._doing in _LONG else "step_seconds"
        limit = getattr(limits, name)
        if now - self._since <= limit:
            return ""
        return f"finished no step for {limit:g} s (--{name}): {self._cause()}"

    def _cause(self) -> str:
        """Which process the others wait for, as far as this one knows."""
        _, number, _ = self._how_far()
        there = self._others.there()
        if not there or not number:
            return "it hangs, or waits for another process"
        absent = attendance.absent(there, number)
        if absent:
            return f"of {attendance.told(absent)} there is no sign in {self._folder}"
        behind = attendance.behind(there)
        if not behind:
            return "all processes are equally far, so that none is known to be the cause"
        late = attendance.told([sign.rank for sign in behind])
        names = sorted({sign.host for sign in behind})
        verb = "is" if len(behind) == 1 else "are"
        return f"{late} on {', '.join(names)} {verb} behind, and the others wait"

    def _not_joined(self) -> str:
        seconds = f"{self._limits.join_seconds:g} s (--join_seconds)"
        if self._place == AUTOMATIC:
            return f"did not meet all other processes within {seconds}{self._who_came()}"
        number = self._place.number
        address = self._place.address
        missing = self._who_came()
        return f"met not all of {number} processes at {address} within {seconds}{missing}"

    def _who_came(self) -> str:
        """Which of the processes came, or which did not, as far as this one knows."""
        there = self._others.there()
        if not there:
            return ""
        if self._place == AUTOMATIC:
            return f": {len(there)} came, on {', '.join(sorted({sign.host for sign in there}))}"
        absent = attendance.absent(there, self._place.number)
        if not absent:
            return ": all came, but not all reach that address"
        return f": {attendance.told(absent)} did not come"

    # The end

    def _ended(self, why: str) -> int:
        """Says in one line what is known, unless the child has said why it ended."""
        code = self._child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)  # processes that read for it
        if not why and (code >= 0 or self._told):
            return code if code >= 0 else 1
        if self._asked > 1 or (self._asked and self._doing in (STARTING, JOINING)):
            sys.stderr.write("interrupted: ended without saving\n")
            return _INTERRUPTED
        reason = why or self._reason(code)
        rank, number, _ = self._how_far()
        who = f"process {rank} of {number}" if number else "this process"
        sys.stderr.write(
            f"error: {who} {reason}. Once its cause is gone, the same commands go on from the last "
            "checkpoint.\n"
        )
        return 1

    def _reason(self, code: int) -> str:
        """What the log of the runtime, and the exit code, tell of the end."""
        log = "\n".join(self._log)
        lost = re.search(r"heartbeats\):\n([\d,\s]+)", log)
        lost = lost or re.search(r"Task (\d+) heartbeat timeout", log)
        number = " ".join(lost[1].split()) if lost else ""
        if re.search(r"DEADLINE_EXCEEDED.*\n+RPC: \S+/Heartbeat", log):
            number = "0"  # whom all others tell that they live
        if number:
            seconds = f"{self._limits.lost_seconds:g} s (--lost_seconds)"
            return f"ended: process {number} gave no sign of life for {seconds}, or has died"
        if "RegisterTask" in log:
            return self._not_joined()
        if "leader" in log:
            return "ended: the connection to process 0 broke, which has ended or died"
        if "Shutdown barrier" in log or "detected fatal errors" in log:
            return "ended: another process ended before it; see what that says"
        return f"was ended by {signal.Signals(-code).name}"
