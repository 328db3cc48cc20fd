"""What a run tells of itself while it works: its environment, and how far each stage is."""

import importlib.metadata
import platform as host
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from jax import local_devices

import sparsity_jax
from sparsity_jax import data, report, trees, weights
from sparsity_jax.train import Problem, shapes_of
from sparsity_jax.types import Config, Fields, Rows
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
    """Writes the report of a run, and says where it is."""
    environment = report.read_environment(workdir)
    path = report.write(workdir, dict(config), rows, environment=environment)
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
    environment = {
        "device": f"{device.device_kind} ({device.platform}, {count} local)",
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


# numbers of a row that its line of progress shows
_SHOWN = ("epoch", "iteration", "ratio", "train_loss", "test_accuracy", "accuracy", "loss_after")
_BAR = "{desc:<24} {percentage:3.0f}% |{bar:30}| {elapsed}<{remaining} {postfix}"


def _told_precision(problem: Problem) -> str:
    """How precisely matrix products are computed, and which type bounds that."""
    told = f"{problem.precision}, of curvature {problem.curvature_precision}"
    narrow = jnp.finfo(problem.model.dtype).bits < 32
    if narrow:
        return f"{told}; the network computes in {problem.model.dtype}"
    return told


class Display:
    """Progress of a stage: a bar where stderr is a terminal, otherwise a line for new rows, at most
    every five seconds, and one a minute where there are none."""

    def __init__(self, name: str):
        self._name = name
        self._started = time.monotonic()
        self._said = self._started - 5
        # without a terminal there is no bar
        self._bar = tqdm.tqdm(total=1.0, desc=name, bar_format=_BAR, disable=None)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._bar.close()
        if self._bar.disable and kind is None:
            seconds = time.monotonic() - self._started
            say(f"{self._name}: done in {seconds:.1f} s")

    def show(self, done: float, rows: Rows) -> None:
        """done: share in [0, 1]; of the rows the newest one's numbers are shown."""
        newest = rows[-1] if rows else {}
        shown = [name for name in _SHOWN if name in newest]
        parts = [f"{name}={newest[name]:.4g}" for name in shown]
        text = " ".join(parts)
        if text:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(min(done, 1.0) - self._bar.n)
        silent = time.monotonic() - self._said
        if self._bar.disable and silent > (5 if text else 60):
            self._said = time.monotonic()
            say(f"{self._name}: {done:.0%} {text}".rstrip())
