"""Fills open rows of the ledger, in its order, for as many minutes as are given.

    python experiments/gpu/ledger.py --minutes 9            the next rows that fit
    python experiments/gpu/ledger.py --minutes 9 --part     also one that needs several calls
    python experiments/gpu/ledger.py --minutes 9 --dry      only says which

Each row's command runs as a process of its own. A finished run's rows are kept beside the ledger,
and its numbers written into it at once; one that does not end in time is stopped, saves its state
in its workdir, and the same call goes on from there. Rows without a command, or whose data or
starting point is not there, are passed over.

What fits is known from the run itself: after three epochs the rest of the training, at the median
speed of all but the first one, which compiles. What comes after the training is not counted.
"""

import argparse
import ast
import contextlib
import datetime
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))

from experiments import claims
from sparsity_jax import (
    intact,
    members,
    pipeline,
    plans,
    prepared,
    report,
    run,
    stopping,
    workdirs,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNNER = ("-m", "sparsity_jax.run")
SAME_RUN = "the same run"
SAVING = 40.0  # seconds kept free at the end, in which a run saves its state
POLL = 2.0  # seconds between two looks at a run
SECONDS = "ledger_seconds"  # file of a workdir: wall time of all calls so far
FAILED = "its run ended with exit code"
LARGE = 2**21  # bytes; of more rows only those are kept that claims need
FOLDERS = {"toy_cnn": "cifar10_small_cnn", "greg": "growing_regularisation"}
COPIES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
JPEG = b"\xff\xd8"


def say(text: str) -> None:
    print(text, flush=True)


# The ledger ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the ledger: its cells, as they stand there."""

    experiment: str
    published: str
    number: str
    command: str
    hardware: str
    time: str
    date: str
    status: str

    def line(self) -> str:
        return f"| {' | '.join(self)} |"

    def is_open(self) -> bool:
        return self.status == "open"

    def has_command(self) -> bool:
        return re.fullmatch(r"`run .+`", self.command) is not None

    def words(self) -> list[str]:
        """What follows `run` in its command. Raises ValueError for a quotation without an end."""
        command = self.command.strip("`")
        _, *words = shlex.split(command)
        return words


def row_of(line: str) -> Row | None:
    """The row that a line of the ledger is; None for any other line."""
    parts = re.split(r"(?<!\\)\|", line.strip())
    before, *inner, after = parts if len(parts) > 1 else ("", "")
    if before or after or len(inner) != len(Row._fields):
        return None
    cells = [cell.strip() for cell in inner]
    row = Row(*cells)
    if row.experiment in ("Experiment", "---"):
        return None
    return row


def rows_of(text: str) -> list[Row]:
    """All rows of a ledger, in order."""
    rows = []
    for line in text.splitlines():
        row = row_of(line)
        if row is not None:
            rows.append(row)
    return rows


def filled(text: str, row: Row, **cells: str) -> str:
    """The ledger `text` with `cells` of `row` replaced; open rows right below it that are of the
    same run refer to it. All else stays as it is, byte for byte.

    Raises ValueError unless the row is there once.
    """
    lines = text.splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if row_of(line) == row]
    if len(places) != 1:
        raise ValueError(f"the ledger has {len(places)} rows {row.line()}")
    (place,) = places
    lines[place] = replaced(lines[place], row, **cells)
    below = dict.fromkeys(("hardware", "time", "date"), "the same")
    below |= dict(number="in the row of the run", status=cells["status"])
    for number in range(place + 1, len(lines)):
        other = row_of(lines[number])
        if other is None or not other.is_open() or other.command != SAME_RUN:
            break
        lines[number] = replaced(lines[number], other, **below)
    return "".join(lines)


def replaced(line: str, row: Row, **cells: str) -> str:
    """The line of a row with other cells, and its own end."""
    content = line.rstrip("\r\n")
    end = line.removeprefix(content)
    new = row._replace(**cells)
    return new.line() + end


# What a row asks for ------------------------------------------------------------------------------


class Job(NamedTuple):
    """A row that can run. words: of its command. study: name of its config file. plans: the checked
    config, one plan per program.
    """

    row: Row
    words: list[str]
    study: str
    workdir: pathlib.Path
    plans: list[plans.Plan]


def literal(text: str) -> Any:
    """The Python value that `text` is, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def config_of(path: str, fields: list[str]) -> dict[str, Any]:
    """The config of a command as plain data. path: as `--config` has it, with its variant. fields:
    the other words, `--config.FIELD=VALUE`.
    """
    file, has_variant, variant = path.partition(".py:")
    if has_variant:
        file += ".py"
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_config(variant) if variant else module.get_config()
    config = pipeline.plain(made)
    for field in fields:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", field)
        if match is None:
            raise ValueError(f"{field} is no --config.FIELD=VALUE")
        name, value = match[1], literal(match[2])
        try:
            if name.startswith("sweep."):
                config = run.swept(config, {name.removeprefix("sweep."): value})
            else:
                config = members.replaced(config, {name: value})
        except (KeyError, TypeError):
            raise ValueError(f"the config has no field {name}") from None
    return config


def job_of(row: Row) -> Job:
    """What a row asks for. Raises ValueError or OSError saying why it cannot run: its command, its
    config, or something that is not there, such as data.
    """
    words = row.words()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--workdir", default="")
    try:
        options, fields = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if not (options.config and options.workdir):
        raise ValueError("its command lacks --config or --workdir")
    checked = pipeline.check(config_of(options.config, fields))
    study = pathlib.Path(options.config.partition(":")[0]).stem
    return Job(row, words, study, ROOT / options.workdir, checked)


# How long it takes --------------------------------------------------------------------------------


def epochs_of(job: Job) -> int:
    """Epochs of all trainings of a run; members side by side count once."""
    total = 0
    for plan in job.plans:
        for name in plan.pipeline:
            stage = plan.settings[name][0]
            if stage.kind == "train":
                total += stage.epochs
    return total


def training_left(job: Job, rows: list[dict]) -> float | None:
    """Seconds that the rest of the training takes, at the median speed of the epochs in `rows` but
    the first of each training, which compiles; None before there are two.
    """
    firsts = {plan.numbers[0] for plan in job.plans}
    trainings: dict[tuple, list[dict]] = {}
    for row in rows:
        is_epoch = row["kind"] == "train" and "epoch" in row
        if is_epoch and row["member"] in firsts:
            name = (row["member"], row["stage"], row["visit"])
            epochs = trainings.setdefault(name, [])
            epochs.append(row)
    done = 0
    speeds = []
    for epochs in trainings.values():
        done += epochs[-1]["epoch"]
        for before, after in itertools.pairwise(epochs):
            seconds = after["seconds"] - before["seconds"]
            speeds.append(seconds)
    if len(speeds) < 2:
        return None
    left = epochs_of(job) - done
    return left * statistics.median_low(speeds)


def rows_so_far(job: Job) -> list[dict]:
    """Rows of a run as far as it is; [] before it has some."""
    folders = workdirs.member_folders(job.workdir) or {0: job.workdir}
    rows = []
    for first, folder in folders.items():
        with contextlib.suppress(OSError, ValueError):
            own = report.read_rows(folder / report.METRICS)
            rows += workdirs.renumbered(own, first)
    return rows


def told_time(seconds: float | None) -> str:
    """Seconds as a person says them: 45 s, 7 min, 2 h 10 min; a dash where they are not known."""
    if seconds is None:
        return "–"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


# Running ------------------------------------------------------------------------------------------


def reason_to_stop(job: Job, deadline: float, part: bool) -> str:
    """Why a run under way has to be stopped now; "" if it may go on. deadline: on the clock of
    `time.monotonic`, when its state must be saved. part: whether it may need more calls than this.
    """
    if stopping.requested():
        return "interrupted"
    left = deadline - SAVING - time.monotonic()
    if left <= 0:
        return "the time is over; the same call goes on from here"
    needed = None if part else training_left(job, rows_so_far(job))
    if needed is not None and needed > left:
        return f"its training needs {told_time(needed)} more, {told_time(left)} are left"
    return ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks a run to save and stop, and makes it stop if it does not."""
    for _ in range(2):  # a second signal ends it without saving
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(SAVING)
        except subprocess.TimeoutExpired:
            continue
        return
    process.kill()
    process.wait()


def attempt(job: Job, deadline: float, part: bool) -> str:
    """Starts or continues a run, until it has ended or has to stop; see `reason_to_stop`. Returns
    why its row stays open, "" once the run is finished.
    """
    command = [sys.executable, *RUNNER, *job.words]
    before = seconds_so_far(job.workdir)
    started = time.monotonic()
    # in a group of its own: Ctrl-C reaches it once, through this process
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, process_group=0)
    reason = ""
    try:
        while process.poll() is None and not reason:
            reason = reason_to_stop(job, deadline, part)
            if not reason:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
    finally:
        if process.poll() is None:
            end(process)
        if before is not None and job.workdir.is_dir():
            total = before + time.monotonic() - started
            intact.write(job.workdir / SECONDS, f"{total:.1f}\n".encode())
    if process.returncode == 0:
        return ""
    return reason or f"{FAILED} {process.returncode}"


def seconds_so_far(workdir: pathlib.Path) -> float | None:
    """Wall time of a run in all calls; None if it was begun by other means."""
    if not workdirs.holds_run(workdir):
        return 0.0
    path = workdir / SECONDS
    return float(path.read_text()) if path.is_file() else None


# Writing ------------------------------------------------------------------------------------------


def hardware_of(environment: dict[str, Any] | None) -> str:
    """Device and version, as the ledger has them."""
    if environment is None:
        return "–"
    device = re.sub(r" \([^)]*\)", "", environment["device"])
    if device == "cpu":
        device = f"{os.cpu_count()} CPU cores"
    return f"{device}, jax {environment['jax']}"


def origin_of(data: dict[str, Any]) -> str:
    """A note for a set of which the images are JPEG copies; "" for others. data: its options."""
    name = COPIES.get(data["name"], "")
    if not name:
        return ""
    data_dir = data.get("data_dir", "")
    opened = prepared.open_prepared(data["name"], data_dir, "train", "test")
    image, _ = opened.train.read_one(0)
    if not image.startswith(JPEG):
        return ""
    return f"JPEG copy of {name}: "


def lines_of(rows: list[dict]) -> bytes:
    """Rows as JSON, one per line."""
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines)
    return f"{text}\n".encode()


def keep_rows(job: Job, rows: list[dict], folder: pathlib.Path) -> str:
    """Writes the rows of a run below `folder`; returns the path from there."""
    study = FOLDERS.get(job.study, job.study)
    name = f"{study}/{job.workdir.name}.jsonl"
    data = lines_of(rows)
    if len(data) > LARGE:
        data = lines_of(claims.slim(rows))
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    intact.write(path, data)
    return name


def told_seeds(config: dict[str, Any], rows: list[dict]) -> str:
    """The status of a finished run."""
    usual = config.get("seed", 0)
    seeds = {row.get("seed", usual) for row in rows}
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"done, {count}"


def fill(ledger: pathlib.Path, job: Job) -> str:
    """Writes a finished run into the ledger, and its rows beside it; returns what it says now."""
    config, rows, environment = report.gather(job.workdir)
    name = keep_rows(job, rows, ledger.parent)
    kept = report.read_rows(ledger.parent / name)
    text, numbers = claims.told(kept)
    origin = origin_of(job.plans[0].common["data"])
    number = f"{origin}{text.format(*numbers)} ([rows]({name}))"
    now = datetime.datetime.now(datetime.UTC)
    cells = dict(
        number=number,
        hardware=hardware_of(environment),
        time=told_time(seconds_so_far(job.workdir)),
        date=f"{now:%Y-%m-%d}",
        status=told_seeds(config, rows),
    )
    before = ledger.read_bytes().decode()
    after = filled(before, job.row, **cells)
    intact.write(ledger, after.encode())
    return number


# Command line -------------------------------------------------------------------------------------


def jobs(ledger: pathlib.Path, only: str) -> Iterator[Job]:
    """The open rows with a command that can run, in order; says why the others cannot. only: text
    that a row must have in its experiment or command.
    """
    for row in rows_of(ledger.read_bytes().decode()):
        is_meant = only in f"{row.experiment} {row.command}"
        if not (row.is_open() and row.has_command() and is_meant):
            continue
        try:
            yield job_of(row)
        except (ValueError, OSError) as error:
            reason = textwrap.shorten(str(error), 120, placeholder=" ...")
            say(f"passed over: {row.experiment}: {reason}")


def tell(job: Job) -> None:
    """Says what would run, and how far it is."""
    rows = rows_so_far(job)
    needed = training_left(job, rows)
    known = ""
    if needed is not None:
        known = f", {told_time(needed)} of training left"
    words = shlex.join(job.words)
    say(f"would run: {job.row.experiment}: {words}{known}")


def work(ledger: pathlib.Path, deadline: float, options: argparse.Namespace) -> int:
    """Runs and fills rows until the deadline; the exit code."""
    failed = False
    for job in jobs(ledger, options.only):
        if options.dry:
            tell(job)
            continue
        if time.monotonic() > deadline - 2 * SAVING:
            say("the time is over")
            break
        say(f"running: {job.row.experiment}")
        reason = reason_to_stop(job, deadline, options.part)
        reason = reason or attempt(job, deadline, options.part)
        failed |= reason.startswith(FAILED)
        if reason:
            say(f"still open: {job.row.experiment}: {reason}")
        else:
            say(f"done: {job.row.experiment}: {fill(ledger, job)}")
        if stopping.requested():
            return 130
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="wall time, at most")
    text = "also start a row that does not fit, and leave it unfinished"
    parser.add_argument("--part", action="store_true", help=text)
    parser.add_argument("--dry", action="store_true", help="run nothing, say what would run")
    text = "only rows that have this text in their experiment or command"
    parser.add_argument("--only", default="", metavar="TEXT", help=text)
    parser.add_argument("--ledger", type=pathlib.Path, default=claims.LEDGER)
    options = parser.parse_args(arguments)
    least = 3 * SAVING / 60
    if not options.minutes >= least:
        parser.exit(2, f"error: --minutes is {options.minutes:g}; allowed: {least:g} and more.\n")
    if not options.ledger.is_file():
        parser.exit(2, f"error: --ledger is {options.ledger}, which is no file.\n")
    deadline = time.monotonic() + 60 * options.minutes
    ledger = options.ledger.resolve()
    logging.set_verbosity(logging.FATAL)  # as runs do: failures arrive as exceptions
    # this process reads configs and rows only; the device is for the runs
    jax.config.update("jax_platforms", "cpu")
    try:
        with contextlib.chdir(ROOT):
            return work(ledger, deadline, options)
    except (OSError, ValueError) as error:  # of files that are written
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    stopping.listen()
    sys.exit(main())
