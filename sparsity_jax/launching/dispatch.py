"""Hands the tasks of a launch to workers, and takes back what they say, until all are done or have
failed.
"""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tqdm

from sparsity_jax import intact, lock, stopping, tables, workdirs
from sparsity_jax.launching import mirror, tasks
from sparsity_jax.launching.tasks import Task
from sparsity_jax.launching.worker import Outcome, Ready
from sparsity_jax.types import Fields

__all__ = ["Dispatch", "Hand", "Place"]

_LOOK_SECONDS = 0.5  # between two looks at a signal
_FETCH_SECONDS = 1.0  # between two questions for news
_COUNT_SECONDS = 10.0  # between two questions for room, which nodes that come and go change
_LINE_SECONDS = 5.0  # between two lines of a log
_LEAVE_SECONDS = 5.0  # that idle workers have to remove their own files
_SAVE_SECONDS = 120.0  # that workers have to save and stop


class Hand(Protocol):
    """A worker as it is reached."""

    def call(self, method: str, *arguments: Any) -> Future:
        """What a method of `worker.Worker` gives; an exception where the worker is lost."""

    def end(self) -> None:
        """Ends its process."""


@dataclass(frozen=True)
class Place:
    """Where a task runs. folder: in the workdir. config: of that folder."""

    folder: Path
    config: Fields


@dataclass(eq=False)
class _Worker:
    """What is known of a worker. asked: its start or its task. compiled: programs that it has.
    news: the latest question for them, asked at `news_at`.
    """

    hand: Hand
    asked: Future
    is_ready: bool = False
    is_refused: bool = False
    task: Task | None = None
    compiled: set[object] = field(default_factory=set)
    news: Future | None = None
    news_at: float = 0.0


class Dispatch:
    """One launch.

    start: begins one more worker. room: how many the machines have room for. places: of the tasks,
    by index. launch: its name in locks. retries: how often a lost worker is replaced, per task.
    fetches: whether files come back through workers, which do not see the workdir. still_mine:
    raises OSError once the workdir belongs to another run. greeted: called with what a new worker
    says of its machine.
    """

    def __init__(
        self,
        every: Sequence[Task],
        places: Sequence[Place],
        *,
        start: Callable[[], Hand],
        room: Callable[[], int],
        launch: str,
        retries: int,
        fetches: bool,
        still_mine: Callable[[], None],
        greeted: Callable[[Fields], None],
    ):
        self._tasks = every
        self._places = places
        self._start = start
        self._room = room
        self._launch = launch
        self._retries = retries
        self._fetches = fetches
        self._still_mine = still_mine
        self._greeted = greeted
        self._workers: list[_Worker] = []
        self._counted = (-_COUNT_SECONDS, 0)
        self._lost_starts = 0  # workers that ended before their first task
        self._line = _Line()

    def run(self) -> None:
        """Runs all tasks that wait; afterwards each is done or has failed.

        Raises ConfigError where no worker can begin, OSError where the workdir is lost or cannot be
        written, KeyboardInterrupt once a stop is asked for: workers have saved by then, if they
        could.
        """
        try:
            while self._open_tasks():
                stopping.check()
                self._still_mine()
                self._add_workers()
                self._wait()
                for worker in list(self._workers):
                    self._look_at(worker)
                self._hand_out()
                self._line.show(self._status(), self._settled())
        except KeyboardInterrupt:
            self._save_and_stop()
            raise
        finally:
            self._line.close(self._status())
            self._dismiss(list(self._workers))

    def _open_tasks(self) -> list[Task]:
        return [task for task in self._tasks if task.state in ("waiting", "running")]

    def _settled(self) -> int:
        return len(self._tasks) - len(self._open_tasks())

    def _status(self) -> str:
        training = sum(worker.task is not None for worker in self._workers)
        return tasks.status(self._tasks, training, time.monotonic())

    # Workers --------------------------------------------------------------------------------------

    def _add_workers(self) -> None:
        """As many as there is room for, and work."""
        now = time.monotonic()
        counted, room = self._counted
        if now - counted >= _COUNT_SECONDS:
            room = self._room()
            self._counted = (now, room)
        refused = [worker for worker in self._workers if worker.is_refused]
        wanted = min(len(self._open_tasks()) + len(refused), max(room, 1))
        while len(self._workers) < wanted:
            hand = self._start()
            self._workers.append(_Worker(hand, hand.call("prepare")))

    def _wait(self) -> None:
        """Until something comes back, or for a moment."""
        asked = [worker.asked for worker in self._workers if not worker.is_refused]
        asked += [worker.news for worker in self._workers if worker.news is not None]
        pending = [future for future in asked if not future.done() or self._is_due(future)]
        if not pending:
            time.sleep(_LOOK_SECONDS)
        concurrent.futures.wait(
            pending, timeout=_LOOK_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
        )

    def _is_due(self, future: Future) -> bool:
        """Whether a future is done, and nobody has looked at it."""
        return any(
            future is worker.news or (future is worker.asked and self._is_busy(worker))
            for worker in self._workers
        )

    @staticmethod
    def _is_busy(worker: _Worker) -> bool:
        return worker.task is not None or not (worker.is_ready or worker.is_refused)

    def _look_at(self, worker: _Worker) -> None:
        """Takes what a worker has said since the last look."""
        if self._is_busy(worker) and worker.asked.done():
            self._take_answer(worker)
        elif worker.task is not None and self._fetches:
            self._fetch(worker)

    def _take_answer(self, worker: _Worker) -> None:
        try:
            answer = worker.asked.result()
        except Exception as error:  # of whatever engine: the process or its machine is gone
            self._lose(worker, tables.reason_of(error))
            return
        task = worker.task
        if task is None:
            self._greet(worker, answer)
            return
        if self._fetches:
            self._fetch_rest(worker)
            if answer.state == "done" and not self._has_finished(task):
                self._lose(worker, "its last files did not arrive")
                return
        self._settle(worker, task, answer)

    def _greet(self, worker: _Worker, ready: Ready) -> None:
        """Takes a new worker for one that can work, or keeps it from doing so."""
        if not ready.sentence:
            worker.is_ready = True
            self._greeted(ready.environment)
            return
        worker.is_refused = True  # it stays, so that no other one begins in its place
        if self._has_nobody():
            raise tables.ConfigError(ready.sentence)
        workdirs.say(f"a worker is left out: {ready.sentence}")

    def _lose(self, worker: _Worker, reason: str) -> None:
        """A worker has ended by itself; its task goes to another one."""
        self._workers.remove(worker)
        worker.hand.end()
        task = worker.task
        if task is None:
            self._lost_starts += 1
            if self._lost_starts > self._retries:
                raise tables.ConfigError(f"workers end before they can train: {reason}")
            return
        self._try_again(task, f"its worker was lost ({reason})")

    def _leave_out(self, worker: _Worker, sentence: str) -> None:
        """Gives nothing more to a worker that cannot write; fails all that wait where it was the
        last.
        """
        worker.is_ready = False
        worker.is_refused = True
        if self._has_nobody():
            for task in self._open_tasks():
                self._fail(task, f"no worker is left that can write: {sentence}")

    def _has_nobody(self) -> bool:
        """Whether all workers that there is room for are left out."""
        is_full = len(self._workers) >= self._room()
        return is_full and all(worker.is_refused for worker in self._workers)

    def _dismiss(self, workers: Sequence[_Worker]) -> None:
        """Ends workers; idle ones remove their own files first."""
        idle = [worker for worker in workers if not self._is_busy(worker)]
        leaving = [worker.hand.call("leave") for worker in idle]
        concurrent.futures.wait(leaving, timeout=_LEAVE_SECONDS)
        for worker in workers:
            self._workers.remove(worker)
            worker.hand.end()

    # Tasks ----------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Gives every idle worker a task; one for which there is none makes room for others."""
        for worker in list(self._workers):
            if not worker.is_ready or worker.task is not None:
                continue
            task = tasks.next_task(self._tasks, worker.compiled)
            if task is not None:
                self._begin(worker, task)
            elif self._open_tasks():
                self._dismiss([worker])

    def _has_finished(self, task: Task) -> bool:
        """Whether the last checkpoint of a task is in the workdir."""
        snapshot = workdirs.newest(self._places[task.index].folder)
        return snapshot is not None and snapshot.is_finished

    def _begin(self, worker: _Worker, task: Task) -> None:
        place = self._places[task.index]
        try:
            workdirs.claim(place.folder, place.config)
            start = mirror.start(place.folder) if self._fetches else None
        except (tables.ConfigError, intact.DamagedError) as error:
            self._fail(task, str(error))
            return
        task.attempts += 1
        task.state = "running"
        task.began = time.monotonic()
        worker.task = task
        worker.compiled.add(task.program)
        attempt = lock.Attempt(self._launch, task.attempts)
        worker.asked = worker.hand.call("run", task.index, attempt, start)

    def _settle(self, worker: _Worker, task: Task, outcome: Outcome) -> None:
        """Notes how an attempt ended."""
        worker.task = None
        if outcome.state == "done":
            task.state = "done"
            task.seconds = time.monotonic() - task.began
        elif outcome.state == "failed":
            task.diverged = outcome.diverged
            self._fail(task, outcome.sentence)
        elif outcome.state == "unable":
            self._try_again(task, f"its worker cannot write ({outcome.sentence})")
            self._leave_out(worker, outcome.sentence)
        else:
            task.state = "waiting"

    def _try_again(self, task: Task, why: str) -> None:
        """Lets a task wait for another worker, unless it has had its attempts."""
        if task.attempts > self._retries:
            self._fail(task, f"attempt {task.attempts} was the last; {why}.")
            return
        task.state = "waiting"
        again = f"attempt {task.attempts + 1} of {self._retries + 1} follows"
        workdirs.say(f"{task.name}: {why}; {again}")

    def _fail(self, task: Task, sentence: str) -> None:
        task.state = "failed"
        task.sentence = sentence
        log = self._places[task.index].folder / mirror.LOG
        workdirs.say(f"{task.name} failed: {sentence} Its log: {log}")

    # Files ----------------------------------------------------------------------------------------

    def _fetch(self, worker: _Worker) -> None:
        """Writes the news of a worker that have come, and asks for more once in a while."""
        now = time.monotonic()
        if worker.news is None:
            if now - worker.news_at >= _FETCH_SECONDS:
                worker.news = worker.hand.call("news")
                worker.news_at = now
        elif worker.news.done():
            self._write_news(worker)

    def _write_news(self, worker: _Worker) -> None:
        """Waits for the news that were asked for, and writes them; those of a lost worker never
        come.
        """
        news, worker.news = worker.news, None
        task = worker.task
        if news is None or task is None:
            return
        try:
            changes = news.result()
        except Exception:  # told when its task is looked at
            return
        mirror.apply(self._places[task.index].folder, changes)

    def _fetch_rest(self, worker: _Worker) -> None:
        """The last news of an attempt, behind those under way."""
        self._write_news(worker)
        worker.news = worker.hand.call("news")
        self._write_news(worker)

    # The end --------------------------------------------------------------------------------------

    def _save_and_stop(self) -> None:
        """Asks all workers to save and stop, and waits for them."""
        busy = [worker for worker in self._workers if worker.task is not None]
        for worker in busy:
            worker.hand.call("stop")
        deadline = time.monotonic() + _SAVE_SECONDS
        for worker in busy:
            left = max(deadline - time.monotonic(), 0.0)
            concurrent.futures.wait([worker.asked], timeout=left)
            if worker.asked.done():
                self._take_answer(worker)


class _Line:
    """The line of the launch: one that is written over where stderr is a terminal, otherwise one
    whenever a task ends, at most every few seconds.
    """

    def __init__(self) -> None:
        self._bar = tqdm.tqdm(bar_format="{desc}", leave=False, disable=None)
        self._said = -_LINE_SECONDS
        self._settled = -1
        self._last = ""

    def show(self, line: str, settled: int) -> None:
        """settled: number of tasks that have ended."""
        if not self._bar.disable:
            self._bar.set_description_str(line)
            return
        now = time.monotonic()
        if settled != self._settled and now - self._said >= _LINE_SECONDS:
            self._settled = settled
            self._said = now
            self._last = line
            workdirs.say(line)

    def close(self, line: str) -> None:
        """Leaves the last line where it can be read."""
        self._bar.close()
        if line != self._last:
            workdirs.say(line)
