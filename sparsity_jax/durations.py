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
        coming = keys[keys.index(key) + 1 :]
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
        for position, name in enumerate(plan.pipeline):
            stage = plan.settings[name][0]
            steps = stage.steps_in_all(problem)
            images = steps * stage.batch_size * len(plan.members) if steps else 0
            visits[plan.numbers[0], position] = Visit(name, steps, images)
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
        now = time.monotonic()
        since, before = self._since or (now, done)
        if self._is_first:
            self._since = (now, done)
            self._is_first = False
        if now <= since or done <= before:
            return []
        rate = (done - before) / (now - since)
        visit = self._schedule.visits[self._key]
        self._schedule.learn(visit, 1 / rate)
        left = (1 - done) / rate
        later, all_known = self._schedule.after(self._key)
        unknown = "" if all_known else "+"
        parts = [tqdm.format_interval(left), f"run {tqdm.format_interval(left + later)}{unknown}"]
        if visit.steps:
            parts.append(f"{tqdm.format_sizeof(visit.steps * rate)} steps/s")
            parts.append(f"{tqdm.format_sizeof(visit.images * rate)} images/s")
        return parts
