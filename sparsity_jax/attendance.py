"""Which of several processes does not come, or holds the others up: while a process waits, it says
in a folder that all see how far it is.

Clocks of hosts differ, and a file may be of an earlier run: a process is there if its file changes.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Attendance", "Sign", "absent", "behind", "told"]


class Sign(NamedTuple):
    """What a process says. rank: from 0, -1 where a scheduler has yet to tell it; met: how often it
    has met the others; works: whether it compiles, loads or writes something.
    """

    rank: int
    host: str
    met: int
    works: bool


class Attendance:
    """What this process and the others say in `folder`. name: of this one's file."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._name = name
        self._forget()

    def _forget(self) -> None:
        self._calls = 0
        self._texts: dict[str, str] = {}  # by the name of a file
        self._signs: dict[str, Sign] = {}  # of files that have changed

    def call(self, own: Sign) -> None:
        """Says how far this process is, and listens once to the others. Raises OSError."""
        self._calls += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / self._name).write_text(json.dumps([self._calls, *own]))
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError, ValueError):  # removed, or half written
                self._listen(path.name, path.read_text())

    def _listen(self, name: str, text: str) -> None:
        _, *sign = json.loads(text)
        before = self._texts.get(name, text)
        self._texts[name] = text
        if text != before:
            self._signs[name] = Sign(*sign)

    def there(self) -> list[Sign]:
        """The last signs of all that were there since this process began to wait."""
        return sorted(self._signs.copy().values())

    def leave(self) -> None:
        """This process waits no longer."""
        if not self._calls:
            return
        self._forget()
        with contextlib.suppress(OSError):
            (self._folder / self._name).unlink()
            self._folder.rmdir()  # unless others are still there


def absent(there: Sequence[Sign], number: int) -> list[int]:
    """The ranks, of so many processes, that nobody there has."""
    ranks = {sign.rank for sign in there}
    return sorted({*range(number)} - ranks)


def behind(there: Sequence[Sign]) -> list[Sign]:
    """Those that the others wait for; none where all are equally far.

    A process waits where it meets the others, so that those which have met them the least often are
    still to come; among equals, those that work.
    """
    places = [(sign.met, not sign.works) for sign in there]
    least = min(places, default=None)
    late = [sign for sign, place in zip(there, places, strict=True) if place == least]
    return late if len(late) < len(there) else []


def told(ranks: Sequence[int]) -> str:
    """Ranks in words: `process 1`, `processes 0, 2`."""
    noun = "process" if len(ranks) == 1 else "processes"
    return f"{noun} {', '.join(map(str, ranks))}"
