"""Rows of whole commands: how long a first and a second start take."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import timing

from sparsity_jax import report

__all__ = ["CONFIG", "SMALL", "Done", "rows", "run"]

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/sfw_oneshot.py:data=digits,epochs=3"
SMALL = ",arch=small_cnn"


class Done(NamedTuple):
    """A run that has ended. seconds: of the whole command; in_stages: of its stages."""

    seconds: float
    in_stages: float
    rows: list[dict]


def rows(*, small: bool) -> Iterator[timing.Row]:
    config = CONFIG + (SMALL if small else "")
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        for name, goal in (("first", ""), ("second", "<= 7")):
            done = run(config, place / name, place / "cache")
            rest = done.seconds - done.in_stages
            yield timing.one(f"{name} start, whole command", done.seconds, "s")
            yield timing.one(f"{name} start, all but its stages", rest, "s", goal)


def run(config: str, workdir: pathlib.Path, cache: pathlib.Path, *fields: str) -> Done:
    """Runs a config with a folder of compiled programs. fields: such as `--config.seed=1`."""
    command = [sys.executable, "-m", "sparsity_jax.run", "--config", config]
    command += ["--workdir", str(workdir), *fields]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout}")
    stages = re.findall(r": done in ([\d.]+) s", ended.stdout)
    rows = report.read_rows(workdir / "metrics.jsonl")
    return Done(seconds, sum(map(float, stages)), rows)
