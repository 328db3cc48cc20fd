"""What a run tells of itself while it works: its environment, and how far each stage is."""

import importlib.metadata
import platform as host
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from jax import local_devices

import sparsity_jax
from sparsity_jax import data, durations, hosts, report, trees, weights, workdirs
from sparsity_jax.train import Problem, shapes_of
from sparsity_jax.types import Config, Fields, Row, Rows
from sparsity_jax.workdirs import say

__all__ = ["Display", "chance", "describe_environment", "tell_environment", "write_report"]

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def chance(dataset: data.Dataset) -> float:
    """Test accuracy of always answering the most frequent class; of a stream, one over the number
    of classes.
    """
    labels = dataset.test.labels
    if labels is None:
        return 1 / dataset.num_classes
    return round(float(np.bincount(labels).max() / labels.size), 4)


def write_report(workdir: Path, config: Config, rows: Rows) -> None:
    """Writes the report of a run, and says what it amounts to and where it is."""
    environment = report.read_environment(workdir)
    path = report.write(workdir, dict(config), rows, environment=environment)
    table = report.summary_of(dict(config), rows, environment)
    if table:
        say(f"\n{table}\n")
    say(f"report: {path}")


def tell_environment(problem: Problem, workdir: Path, origin: Fields) -> None:
    """Writes environment.json, and says how images are read and what pretrained weights become.

    origin: of the run, see `provenance.describe`.
    """
    environment = describe_environment(problem) | origin
    report.write_environment(workdir, report.continued(workdir, environment))
    if problem.streamed and problem.dataset.train.images.reading:
        say(f"images are read by {problem.dataset.train.images.reading}")
    if "pretrained" in environment:
        say(f"config.pretrained: {environment['pretrained']}")


def describe_environment(problem: Problem) -> Fields:
    """Versions and hardware, and the accuracy by chance, for the report."""
    device = local_devices()[0]
    count = len(local_devices())
    processes = f", {hosts.number()} processes" if hosts.several() else ""
    environment = {
        "device": f"{device.device_kind} ({device.platform}, {count} local{processes})",
        "python": host.python_version(),
        "parameters": f"{trees.size(shapes_of(problem)):,}",
        "chance": chance(problem.dataset),
        "precision": _told_precision(problem),
    }
    if problem.streamed:
        workers = problem.dataset.train.images.options.workers
        environment["reading"] = f"{workers} processes" if workers > 0 else "threads"
    environment["sparsity_jax"] = sparsity_jax.__version__
    for name in _LIBRARIES:
        environment[name] = importlib.metadata.version(name)
    if problem.pretrained:
        environment["pretrained"] = weights.told(problem)
    return environment


def _told_precision(problem: Problem) -> str:
    """How precisely matrix products are computed, and which type bounds that."""
    told = f"{problem.precision}, of curvature {problem.curvature_precision}"
    narrow = jnp.finfo(problem.model.dtype).bits < 32
    if narrow:
        return f"{told}; the network computes in {problem.model.dtype}"
    return told


_SHOWN = {  # numbers of a row that are shown; in a bar only the first that is known
    "test_accuracy": "test {:.1%}",
    "accuracy": "accuracy {:.1%}",
    "train_accuracy": "train {:.1%}",
    "train_loss": "loss {:.4g}",
    "loss_after": "loss {:.4g}",
}
_AT = {"epoch": "epoch {}", "iteration": "iteration {}", "ratio": "ratio {:.4g}"}


class Display:
    """Progress of a stage: a bar where stderr is a terminal, otherwise a line per epoch, of other
    rows at most every five seconds, and one a minute where there are none."""

    def __init__(self, name: str, watch: durations.Watch):
        self._name = name
        self._watch = watch
        self._said = -5.0  # seconds since the stage began
        self._known: dict[str, str] = {}
        # without a terminal there is no bar
        self._bar = tqdm.tqdm(
            total=1.0,
            bar_format=_bar_between(name, ""),
            miniters=0,
            dynamic_ncols=True,
            leave=False,
            disable=None if workdirs.tells() else True,
        )

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._bar.close()
        if kind is None:
            seconds = f"done in {self._watch.elapsed():.1f} s"
            say(f"{self._name}: {', '.join([seconds, *self._metric()])}")

    def show(self, done: float, rows: Rows) -> None:
        """done: share in [0, 1]; of the rows the newest one's numbers are shown."""
        newest = rows[-1] if rows else {}
        told = self._watch.told(done)
        numbers = _numbers_of(newest, _SHOWN)
        self._known |= numbers
        if self._bar.disable:
            self._say(done, newest, [*_numbers_of(newest, _AT).values(), *numbers.values(), *told])
            return
        before = " ".join([self._name, f"{done:.0%}", *self._metric()])
        self._bar.bar_format = _bar_between(before, ", ".join(told))
        self._bar.update(min(done, 1.0) - self._bar.n)

    def _metric(self) -> list[str]:
        """The newest number of the first kind of `_SHOWN` that there is."""
        known = [self._known[name] for name in _SHOWN if name in self._known]
        return known[:1]

    def _say(self, done: float, newest: Row, parts: list[str]) -> None:
        """A line of a log, unless there was one a moment ago."""
        now = self._watch.elapsed()
        pause = 5 if newest else 60
        if "epoch" in newest or now - self._said > pause:
            self._said = now
            say(f"{self._name}: {', '.join([f'{done:.0%}', *parts])}")


def _bar_between(before: str, behind: str) -> str:
    """The line of a bar as tqdm reads it, for which braces are fields."""
    texts = [text.replace("{", "{{").replace("}", "}}") for text in (before, behind)]
    return "{} |{{bar}}| {}".format(*texts)


def _numbers_of(row: Row, forms: dict[str, str]) -> dict[str, str]:
    """The numbers of a row that are there, as they are shown."""
    return {name: form.format(row[name]) for name, form in forms.items() if name in row}
