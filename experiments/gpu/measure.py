"""Measures on a GPU what is slow elsewhere, beside PyTorch where it is installed.

    python experiments/gpu/measure.py --out runs/gpu
    python experiments/gpu/measure.py --out runs/gpu --only updates training

Tests run first, on the GPU. Every group of rows has a process of its own; each row is written to
OUT/rows.jsonl when it is there, so that an interrupted call leaves what it has measured, and the
same call goes on with the groups that are missing. At the end a table, also in OUT/table.md.
Exit code 1 if a test or a group failed.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import timing

ROOT = pathlib.Path(__file__).parents[2]
GROUPS = {
    "selection": "selection_rows",
    "updates": "update_rows",
    "training": "training_rows",
    "curvature": "curvature_rows",
    "repeats": "repeat_rows",
    "start": "start_rows",
}
TESTED = ("masks", "polytopes", "linops", "optim", "growing", "platforms")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.group:
        _measure(options.group, options.out, small=options.small)
        return 0
    failed = []
    if not options.no_tests and not _test(options.out, options.test_minutes):
        failed.append("tests")
    done = {row["group"] for row in _read(options.out) if row["name"] == _END}
    for group in options.only:
        if group in done:
            continue
        command = [sys.executable, __file__, "--out", str(options.out), "--group", group]
        command += ["--small"] if options.small else []
        if subprocess.run(command, env=_environment()).returncode:
            failed.append(group)
    table = _table(options.out)
    (options.out / "table.md").write_text(table)
    sys.stdout.write(table)
    if failed:
        sys.stdout.write(f"\nfailed: {', '.join(failed)}\n")
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows"
    )
    parser.add_argument("--small", action="store_true", help="tiny networks: to try the scripts")
    parser.add_argument("--no-tests", action="store_true", help="measure without testing first")
    parser.add_argument(
        "--test-minutes", type=float, default=3.0, help="what the tests may take (default 3)"
    )
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    return parser


# Tests --------------------------------------------------------------------------------------------


def _test(out: pathlib.Path, minutes: float) -> bool:
    """Whether the tests of what is measured pass on the default device, in the time given."""
    files = [f"tests/test_{name}.py" for name in TESTED]
    command = [sys.executable, "-m", "pytest", *files]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4"]
    own = {"JAX_PLATFORMS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    told = out / "tests.txt"
    ended = None
    with told.open("w") as file, contextlib.suppress(subprocess.TimeoutExpired):
        ended = subprocess.run(
            command, cwd=ROOT, env=_environment() | own, timeout=60 * minutes, stdout=file
        )
    if ended is None:
        result = f"not finished in {minutes:g} minutes"
    else:
        result = told.read_text().strip().splitlines()[-1]
    _write(out, {"group": "tests", "name": _END, "result": result})
    return ended is not None and ended.returncode == 0


# Rows ---------------------------------------------------------------------------------------------

_END = "end of the group"


def _environment() -> dict[str, str]:
    """Of processes that import this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def _measure(group: str, out: pathlib.Path, *, small: bool) -> None:
    """Writes the rows of a group, each when it is there."""
    start = time.monotonic()
    module = importlib.import_module(GROUPS[group])
    for row in module.rows(small=small):
        _write(out, {"group": group, **row._asdict()})
        sys.stderr.write(f"{group}: {row.name}: {row.value:.4g} {row.unit}\n")
    seconds = round(time.monotonic() - start, 1)
    _write(out, {"group": group, "name": _END, "seconds": seconds, **_machine()})


def _machine() -> dict[str, str]:
    import jax

    versions = {}
    for name in _PACKAGES:
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": jax.devices()[0].device_kind,
        "cores": str(os.cpu_count()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": datetime.date.today().isoformat(),
    }


def _write(out: pathlib.Path, row: dict) -> None:
    with (out / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _read(out: pathlib.Path) -> list[dict]:
    file = out / "rows.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _table(out: pathlib.Path) -> str:
    """Markdown: machine, tests, and all rows; of rows measured twice the later ones."""
    ends = {}
    latest = {}
    for row in _read(out):
        if row["name"] == _END:
            ends[row["group"]] = row
        else:
            latest[row["group"], row["name"]] = row
    lines = []
    tests = ends.pop("tests", None)
    if tests:
        lines.append(f"Tests of {', '.join(TESTED)} on the device: {tests['result']}.\n")
    for end in ends.values():
        machine = f"{end['device']}, {end['cores']} CPU cores, {end['versions']}, {end['date']}"
        lines.append(f"{end['group']}: {end['seconds']} s on {machine}")
    lines += ["", "| row | median | least - greatest | unit | to reach | reached |"]
    lines.append("|---|---|---|---|---|---|")
    for row in latest.values():
        row.pop("group")
        lines.append(_line(timing.Row(**row)))
    return "\n".join(lines) + "\n"


def _line(row: timing.Row) -> str:
    spread = f"{row.least:.4g} - {row.greatest:.4g}"
    cells = (row.name, f"{row.value:.4g}", spread, row.unit, row.goal, row.reached)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
