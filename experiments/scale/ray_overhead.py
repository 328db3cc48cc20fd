"""What a launch on Ray costs per member: 50 small members on workers of this machine, and the same
one after the other in one process.

    python experiments/scale/ray_overhead.py [--members 50] [--resources cpu=1 cpu=2]

Both are commands of their own, with an empty folder of compiled programs each. A member's end is
the time of its last checkpoint. Prints a table; exits 1 where a member costs more than a second.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from sparsity_jax import optim, pipeline, workdirs

ROOT = pathlib.Path(__file__).resolve().parents[2]
ALLOWED = 1.0  # seconds of a worker per member


class Measured(NamedTuple):
    """workers: that trained. seconds: from the first member's end to the last one's."""

    workers: int
    seconds: float


def get_config():
    """The config of the members, of which the command line says how many."""
    sgd = optim.settings("sgd", learning_rate=0.1)
    return pipeline.base(
        data=dict(name="digits", train_limit=512, test_limit=256),
        model=dict(name="mlp", widths=(64,)),
        pipeline=("fit", "curve"),
        fit=pipeline.stage("train", epochs=5, batch_size=32, optimizer=sgd),
        curve=pipeline.stage("curve", ratios=(0.0, 0.5, 0.9)),
        sweep=dict(seed=(0, 1), mode="loop"),
    )


def measure(folder: pathlib.Path, members: int, *flags: str) -> Measured:
    """Runs the command with `flags` in `folder`."""
    seeds = ", ".join(map(str, range(members)))
    words = [sys.executable, "-m", "sparsity_jax.run", "--config", __file__]
    words += ["--workdir", str(folder / "run"), f"--config.sweep.seed=({seeds})", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    subprocess.run(words, env=environment, check=True, stderr=subprocess.DEVNULL)
    ends = []
    processes = set()
    for own in workdirs.member_folders(folder / "run").values():
        snapshot = workdirs.newest(own)
        ends.append((snapshot.folder / workdirs.PROGRESS).stat().st_mtime)
        log = own / "log.txt"
        if log.exists():
            first, *_ = log.read_text().splitlines()
            processes.add(re.search(r"process (\d+)", first)[1])
    assert len(ends) == members
    return Measured(max(len(processes), 1), max(ends) - min(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--resources", nargs="+", default=["cpu=1", "cpu=2"])
    options = parser.parse_args()
    others = options.members - 1
    worst = 0.0
    print("| | workers | s from the first end to the last | worker-seconds more per member |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        loop = measure(folder / "loop", options.members)
        print(f"| one process | 1 | {loop.seconds:.1f} | |", flush=True)
        for resources in options.resources:
            flags = ("--launcher=ray", f"--resources={resources}")
            ray = measure(folder / resources, options.members, *flags)
            more = (ray.workers * ray.seconds - loop.seconds) / others
            worst = max(worst, more)
            row = f"| `--resources {resources}` | {ray.workers} | {ray.seconds:.1f} | {more:.2f} |"
            print(row, flush=True)
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
