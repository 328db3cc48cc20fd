"""The tasks of a launch: which wait, run, are done or have failed, and the line that tells it."""

import collections
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

__all__ = ["Task", "next_task", "status"]

_STATES = ("done", "running", "failed", "waiting")


@dataclass
class Task:
    """Members that run in one program, a single one or some side by side.

    index: of the plan. members: how many. program: tasks of the same one share what is compiled.
    attempts: how often it was handed to a worker by this launch. sentence: why it failed. diverged:
    whether its loss was not finite. began, seconds: when its attempt did, and how long it took in
    all once it was done, by `time.monotonic`.
    """

    index: int
    name: str
    members: int
    program: object
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    attempts: int = 0
    sentence: str = ""
    diverged: bool = False
    began: float = 0.0
    seconds: float = 0.0


def next_task(tasks: Iterable[Task], compiled: Collection[object]) -> Task | None:
    """The task that a worker runs next: the first that waits, of programs that it has compiled if
    there is one.
    """
    waiting = [task for task in tasks if task.state == "waiting"]
    known = [task for task in waiting if task.program in compiled]
    return next(iter([*known, *waiting]), None)


def status(tasks: Sequence[Task], workers: int, now: float) -> str:
    """One line: members done, running, failed and waiting, and the time left if it is known.

    workers: that train at the same time. now: by `time.monotonic`.
    """
    counts: collections.Counter[str] = collections.Counter()
    for task in tasks:
        counts[task.state] += task.members
    parts = [f"{counts[state]} {state}" for state in _STATES]
    left = _seconds_left(tasks, workers, now)
    if left is not None:
        parts.append(f"left {tqdm.format_interval(left)}")
    return f"members: {', '.join(parts)}"


def _seconds_left(tasks: Sequence[Task], workers: int, now: float) -> float | None:
    """From the mean time of a member that is done; None before there is one."""
    measured = [task for task in tasks if task.state == "done" and task.seconds]
    members = sum(task.members for task in measured)
    if not members:
        return None
    per_member = sum(task.seconds for task in measured) / members
    left = 0.0
    for task in tasks:
        if task.state in ("waiting", "running"):
            whole = task.members * per_member
            past = now - task.began if task.state == "running" else 0.0
            left += max(whole - past, 0.0)
    return left / max(workers, 1)
