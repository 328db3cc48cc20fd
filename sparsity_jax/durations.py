"""How long the stages of a run take, and what is left of it.

A training takes as long per image as the latest one, any other stage as long as the last time. What
nothing is known about is left out, and said to be: `01:05+`.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

__all__ = ["Key", "Schedule", "Visit", "Watch", "schedule_of"]

Key = tuple[int, int]  # first member, position in the pipeline


class Visit(NamedTuple):
    """One stage of the whole run. steps, images: of its training, of all networks that are trained
    side by side; 0 where nothing is trained.
    """

    name: str
    steps: int = 0
    images: int = 0


class Schedule:
    """All stages of a run in order, and how long those took that were measured."""

    def __init__(self, visits: Mapping[Key, Visit]):
        self.visits = visits
        self._per_image: float | None = None
        self._by_name: dict[str, float] = {}

    def learn(self, visit: Visit, seconds: float) -> None:
        """Notes that the whole of `visit` takes so many seconds."""
        if visit.images:
            self._per_image = seconds / visit.images
        else:
            self._by_name[visit.name] = seconds

    def after(self, key: Key) -> tuple[float, bool]:
        """(seconds of the stages behind the one at `key`, whether those of all are known)."""
        keys = list(self.visits)
        place = keys.index(key)
        coming = keys[place + 1 :]
        expected = [self._expected(self.visits[later]) for later in coming]
        known = [seconds for seconds in expected if seconds is not None]
        return sum(known), len(known) == len(expected)

    def _expected(self, visit: Visit) -> float | None:
        if not visit.images:
            return self._by_name.get(visit.name)
        if self._per_image is None:
            return None
        return self._per_image * visit.images


def schedule_of(plans: Sequence[Any], problem: Any) -> Schedule:
    """The stages of all `plans.Plan`s of a run, one after the other."""
    visits = {}
    for plan in plans:
        first = plan.numbers[0]
        networks = len(plan.members)
        for position, name in enumerate(plan.pipeline):
            stage = plan.settings[name][0]
            visit = Visit(name)
            steps = stage.steps_in_all(problem)
            if steps:
                images = steps * stage.batch_size * networks
                visit = Visit(name, steps, images)
            visits[first, position] = visit
    return Schedule(visits)


class Watch:
    """Times the stage at `key`. resumed: whether a part of it was done before."""

    def __init__(self, schedule: Schedule, key: Key, *, resumed: bool = False):
        self._schedule = schedule
        self._key = key
        self._begun = time.monotonic()
        # since when, and from which share on, it is measured: the first update compiles
        self._since = None if resumed else (self._begun, 0.0)
        self._is_first = True

    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._begun

    def told(self, done: float) -> list[str]:
        """What is to be said once this share is done: time left of the stage and of the run, steps
        and images per second; [] where nothing was measured yet.
        """
        rate = self._rate(done)
        if not rate:
            return []
        visit = self._schedule.visits[self._key]
        self._schedule.learn(visit, 1 / rate)
        left = (1 - done) / rate
        later, all_known = self._schedule.after(self._key)
        of_run = tqdm.format_interval(left + later)
        if not all_known:
            of_run += "+"
        parts = [f"left {tqdm.format_interval(left)}/{of_run}"]
        if visit.steps:
            parts.append(_speed(visit.steps * rate, "steps"))
            parts.append(_speed(visit.images * rate, "images"))
        return parts

    def _rate(self, done: float) -> float:
        """The share done per second, 0 where it is not known yet."""
        now = time.monotonic()
        since, before = self._since or (now, done)
        if self._is_first:
            self._since = (now, done)
            self._is_first = False
        seconds = now - since
        if seconds > 0:
            return (done - before) / seconds
        return 0.0


def _speed(per_second: float, what: str) -> str:
    return f"{tqdm.format_sizeof(per_second)} {what}/s"
