"""Asked to stop: signals set a flag, and every loop that can take long looks at it between two
pieces of work.

Nothing is raised inside a signal handler, where it could hit a library that holds a lock.
"""

import concurrent.futures
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

__all__ = [
    "agree_by",
    "check",
    "check_here",
    "clear",
    "listen",
    "request",
    "requested",
    "result_of",
]

_asked = False  # a plain variable: setting it takes no lock
_agreed: Callable[[], bool] | None = None


def request() -> None:
    """Asks for a stop."""
    global _asked
    _asked = True


def clear() -> None:
    """Takes a request back."""
    global _asked
    _asked = False


def requested() -> bool:
    """Whether a stop has been asked for."""
    return _asked


def agree_by(agreed: Callable[[], bool]) -> None:
    """Several processes stop at the same `check`: that at which `agreed()` says so in all."""
    global _agreed
    _agreed = agreed


def check() -> None:
    """Raises KeyboardInterrupt once a stop has been asked for; of several processes, all come by
    here in the same order.
    """
    stop = _asked if _agreed is None else _agreed()
    if stop:
        request()
        raise KeyboardInterrupt


def check_here() -> None:
    """`check` where several processes do not come by alike; they go on to the next `check`."""
    if _asked and _agreed is None:
        raise KeyboardInterrupt


def result_of(future: concurrent.futures.Future) -> Any:
    """`future.result()`, that looks for a request every half second."""
    while True:
        check_here()
        try:
            return future.result(timeout=0.5)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise


def listen() -> None:
    """SIGTERM, SIGINT and SIGHUP ask for a stop; a second one ends the process at once, with exit
    code 130.

    One that was ignored when the process started, as `nohup` does with SIGHUP, stays ignored. Only
    in the main thread.
    """
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    # Python writes the number there at once, also while the main thread is inside a library
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: request())
    watch = threading.Thread(target=_end_at_the_second, args=(source, set(numbers)), daemon=True)
    watch.start()


def _end_at_the_second(source: int, numbers: set[int]) -> None:
    """Reads numbers of signals from the pipe `source`, until the second one of `numbers`."""
    seen = 0
    while seen < 2:
        request_bytes = os.read(source, 64)
        seen += sum(number in numbers for number in request_bytes)
        if seen:
            request()
    os.write(2, b"interrupted again: ended without saving\n")
    os._exit(130)
