"""Times of calls that take turns, and the rows made of them."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from numpy import ndarray

__all__ = ["Call", "Row", "compared", "in_turn", "looped", "one"]

Call = Callable[[], Any]


class Row(NamedTuple):
    """What was measured: the median of several rounds, and the least and the greatest.

    goal: what issue or documentation asks for, as a condition such as "<= 0.3"; "" if nothing.
    """

    name: str
    value: float
    least: float
    greatest: float
    unit: str
    goal: str = ""

    @property
    def reached(self) -> str:
        """Whether the goal is reached: yes, no, or nothing without one."""
        if not self.goal:
            return ""
        relation, text = self.goal.split()
        wanted = float(text)
        holds = self.value <= wanted if relation == "<=" else self.value >= wanted
        return "yes" if holds else "no"


def one(name: str, values: Iterable[float] | float, unit: str, goal: str = "") -> Row:
    """A row of several values of the same thing."""
    every = np.ravel(np.asarray(values, float))
    return Row(name, float(np.median(every)), float(every.min()), float(every.max()), unit, goal)


def wait(result: Any) -> None:
    """Until `result` is there, of either framework."""
    if jax.tree.leaves(result):
        jax.block_until_ready(result)
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(calls: dict[str, Call], rounds: int, repeats: int = 1) -> dict[str, ndarray]:
    """Milliseconds per call: every round makes `repeats` calls of each in a row and waits once.

    A call of another framework than JAX returns None and is waited for by its own means.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = call()
            wait(result)
            if number:  # the first compiles
                seconds = time.perf_counter() - start
                times[name].append(1e3 * seconds / repeats)
    return {name: np.array(values) for name, values in times.items()}


def looped(step: Callable, state: Any, count: int) -> Call:
    """A call that makes `count` steps inside one program, as training does, from where the one
    before ended.

    step: state -> state.
    """
    program = jax.jit(lambda state: lax.scan(lambda s, _: (step(s), None), state, None, count)[0])
    at = [state]

    def call() -> Any:
        at[0] = program(at[0])
        return at[0]

    return call


def compared(
    times: dict[str, ndarray], unit: str, ratios: Sequence[tuple[str, str, str]] = ()
) -> Iterator[Row]:
    """A row per call, and one of ratios by round for each (ours, of what, goal)."""
    for name, values in times.items():
        yield one(name, values, unit)
    for ours, other, goal in ratios:
        yield one(f"{ours} / {other}", times[ours] / times[other], "times", goal)
