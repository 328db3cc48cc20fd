"""Sends signals to real runs at random moments, and starts each again until it is finished.

    python experiments/robustness/signals.py --workdir /tmp/signals

A run trains, searches a limit, makes Lanczos steps and predicts. SIGTERM, SIGINT or SIGHUP comes
after a random delay within the time that a whole run takes, so also while Python starts, data loads
and programs compile. Allowed: the process ends within `BOUND` seconds with one of `STATUSES`, and
the finished run has the rows and arrays of one without signals, bit for bit. Prints the counts;
exits 1 for anything else.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from sparsity_jax import report, stored, workdirs

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUND = 60.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STATUSES = {
    0: "was finished",
    130: "saved and stopped",
    **{-number: "ended before it listened" for number in SIGNALS},
}
CONFIG = (
    "--config=configs/geometric_limit.py:digits",
    "--config.data.train_limit=128",
    "--config.data.test_limit=60",
    "--config.model.widths=(16,)",
    "--config.fit.epochs=4",
    "--config.steps_per_call=1",
    "--config.pipeline=('fit','limit','hessian','width')",
    "--config.limit.scan=(0.5,)",
    "--config.limit.resolution=0.25",
    "--config.hessian.num_matvecs=40",
    "--config.width.batch_size=16",
    "--config.checkpoint_seconds=0.2",
)


def start(workdir: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsity_jax.run", "--workdir", str(workdir), *CONFIG]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def result(workdir: pathlib.Path) -> tuple[list[dict], dict]:
    """(rows without their times, arrays) of a finished run."""
    rows = report.read_rows(workdir / "metrics.jsonl")
    for row in rows:
        row.pop("seconds", None)
    arrays = stored.arrays(workdirs.newest(workdir))
    return rows, jax.tree.map(np.asarray, arrays)


def same(first: tuple, second: tuple) -> bool:
    rows, arrays = first
    other_rows, other_arrays = second
    if rows != other_rows or arrays.keys() != other_arrays.keys():
        return False
    return all(arrays[path].tobytes() == other_arrays[path].tobytes() for path in arrays)


def interrupted(workdir: pathlib.Path, number: signal.Signals, delay: float) -> tuple[str, float]:
    """(how the process ended, seconds from the signal to its end)."""
    log = workdir.with_suffix(".log")
    process = start(workdir, log)
    try:
        process.wait(timeout=delay)
        sent = time.monotonic()
    except subprocess.TimeoutExpired:
        sent = time.monotonic()
        process.send_signal(number)
    try:
        process.wait(timeout=BOUND)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"HUNG ({log})", BOUND
    taken = time.monotonic() - sent
    in_python = number == signal.SIGINT and process.returncode == 1
    if in_python and "KeyboardInterrupt" in log.read_text():  # while it imported
        return STATUSES[-number], taken
    return STATUSES.get(process.returncode, f"STATUS {process.returncode} ({log})"), taken


def until_finished(
    workdir: pathlib.Path, seed: int, whole_seconds: float, most: int
) -> list[tuple[str, str, float]]:
    """(signal, how the process ended, seconds) of each start, at most `most`, until the run is
    finished.
    """
    draw = random.Random(seed)
    starts = []
    while len(starts) < most:
        number = draw.choice(SIGNALS)
        ending, seconds = interrupted(workdir, number, draw.uniform(0.0, whole_seconds))
        starts.append((number.name, ending, seconds))
        sys.stdout.write(f"{workdir.name}: {number.name} {ending}, {seconds:.1f} s\n")
        if ending == STATUSES[0] or ending not in STATUSES.values():
            break
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--signals", type=int, default=100, help="starts that get a signal (100)")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time (2)")
    arguments = parser.parse_args()
    for (
        number
    ) in SIGNALS:  # whatever this process ignores, as one in the background does, its runs do not
        signal.signal(number, signal.SIG_DFL)
    folder = arguments.workdir.absolute()
    folder.mkdir(parents=True)
    for name in ("warm", "whole"):
        began = time.monotonic()
        assert start(folder / name, folder / f"{name}.log").wait() == 0, folder / f"{name}.log"
    whole_seconds = time.monotonic() - began
    whole = result(folder / "whole")
    counts, slowest, wrong, runs, sent = collections.Counter(), 0.0, 0, 0, 0
    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        while sent < arguments.signals:
            seeds = range(runs, runs + arguments.processes)
            share = -(-(arguments.signals - sent) // arguments.processes)
            tries = [
                pool.submit(until_finished, folder / f"run_{seed}", seed, whole_seconds, share)
                for seed in seeds
            ]
            for seed, future in zip(seeds, tries):
                for name, ending, seconds in future.result():
                    counts[name, ending] += 1
                    slowest = max(slowest, seconds)
                    sent += 1
                place = folder / f"run_{seed}"
                log = place.with_suffix(".log")
                if start(place, log).wait(timeout=10 * BOUND) or not same(result(place), whole):
                    wrong += 1
                    sys.stdout.write(f"{place} did not end as the whole run\n")
            runs += arguments.processes
    for (name, ending), number in sorted(counts.items()):
        sys.stdout.write(f"{name:<10}{number:>6}  {ending}\n")
    failed = sum(
        number for (_, ending), number in counts.items() if ending not in STATUSES.values()
    )
    sys.stdout.write(
        f"{sent} starts, {runs} runs to their end; slowest end {slowest:.1f} s after the signal; "
        f"{failed} endings not allowed, {wrong} runs with other results\n"
    )
    sys.exit(failed + wrong > 0)


if __name__ == "__main__":
    main()
