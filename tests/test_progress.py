"""What a run tells while it works: a bar of 80 columns, lines in a log, the summary at its end."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest
import tiny
import tqdm

from sparsity_jax import durations, pipeline, progress, report

FIT = durations.Visit("fit", steps=60 * 22, images=60 * 22 * 64 * 3)
CURVE = durations.Visit("curve")
VISITS = {(0, i): visit for i, visit in enumerate((FIT, CURVE, FIT, CURVE))}


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(progress.durations.time, "monotonic", lambda: now[0])
    return now


def display(name, key, schedule=None, **options):
    return progress.Display(name, durations.Watch(schedule or of_run(), key, **options))


def of_run():
    return durations.Schedule(VISITS)


# Time left ----------------------------------------------------------------------------------------


def test_time_left_is_that_of_the_stage_and_of_all_behind_it(clock):
    schedule = of_run()
    first = durations.Watch(schedule, (0, 0))
    clock[0] += 7  # of which 6 compile
    assert first.told(1 / 60) == ["left 06:53/13:53+", "3.14 steps/s", "603 images/s"]
    clock[0] += 9
    # the first update does not count; the curves are unknown
    assert first.told(10 / 60) == ["left 00:50/01:50+", "22.0 steps/s", "4.22k images/s"]
    curve = durations.Watch(schedule, (0, 1))
    clock[0] += 4
    assert curve.told(1.0) == ["left 00:00/01:04"]


def test_a_resumed_stage_is_timed_from_its_first_update_on(clock):
    watch = durations.Watch(of_run(), (0, 2), resumed=True)
    clock[0] += 5
    assert watch.told(0.5) == []
    clock[0] += 1
    assert watch.told(0.6)[:1] == ["left 00:04/00:04+"]


def test_a_schedule_has_every_stage_of_every_plan_with_its_images():
    problem = tiny.problem()
    sweep = dict(arms=dict(a=dict(again=dict(batch_size=64)), b={}), seed=(0, 1), mode="vmap")
    plans = pipeline.check(tiny.config("fit", "curve", "again", sweep=dict(sweep, mode="auto")))
    visits = durations.schedule_of(plans, problem).visits
    told = [(name, *visit) for name, visit in visits.items()]
    assert told == [
        ((0, 0), "fit", 8, 8 * 32 * 2),
        ((0, 1), "curve", 0, 0),
        ((0, 2), "again", 2, 2 * 64 * 2),
        ((2, 0), "fit", 8, 8 * 32 * 2),
        ((2, 1), "curve", 0, 0),
        ((2, 2), "again", 4, 4 * 32 * 2),
    ]


# A terminal ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal(columns):
    """Standard error is a terminal; gives what was written to it since it was asked last."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.set_blocking(reader, False)
    with (
        open(writer, "w") as stream,
        open(reader, "rb", buffering=0) as screen,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stderr", stream)
        patch.setattr(tqdm.tqdm, "monitor_interval", 0)  # no thread

        def written() -> str:
            stream.flush()
            return screen.read().decode()

        yield written


def test_a_line_of_80_columns_has_metric_times_and_speed(clock):
    with terminal(80) as written:
        with display("1/4 fit", (0, 0)) as shown:
            shown._bar.mininterval = 0
            clock[0] += 1
            shown.show(0.25, [dict(epoch=15, train_loss=0.25, test_accuracy=0.98125)])
            clock[0] += 1
            shown.show(0.5, [dict(epoch=16, train_loss=0.125)])
            *_, line = written().split("\r")
        told = "left 00:02/00:06+, 330 steps/s, 63.4k images/s"
        assert re.fullmatch(rf"1/4 fit 50% test 98\.1% \|.+\| {re.escape(told)}", line)
        assert len(line) < 80
        *_, last, end = written().split("\r")
        assert (last, end) == ("1/4 fit: done in 2.0 s, test 98.1%", "\n")


def test_any_name_of_a_stage_is_shown_as_it_is():
    with terminal(80) as written, display("1/1 {bar} {0}", (0, 0)) as shown:
        shown.show(0.5, [])
        assert "1/1 {bar} {0} |" in written()


# A log --------------------------------------------------------------------------------------------


def test_a_log_gets_a_line_for_rows_and_one_a_minute_without(capsys, clock):
    shown = display("2/4 curve", (0, 1))
    for clock[0], row in [
        (101, {}),
        (102, dict(ratio=0.5)),
        (105, dict(ratio=0.6)),
        (161, {}),
        (163, {}),
        (164, {}),
    ]:
        shown.show(0.25, [row] if row else [])
    told = [line.split(",")[:2] for line in capsys.readouterr().err.splitlines()]
    assert told == [["2/4 curve: 25%", " ratio 0.5"], ["2/4 curve: 25%"]]


def test_a_log_gets_a_whole_line_per_epoch(capsys, clock):
    with display("1/4 fit", (0, 0)) as shown:
        for epoch in (1, 2, 3):
            clock[0] += 0.5
            shown.show(epoch / 60, [dict(epoch=epoch, train_loss=1 / epoch)])
    printed = capsys.readouterr().err
    assert "\r" not in printed
    told = printed.splitlines()
    speed = "44.0 steps/s, 8.45k images/s"
    assert told[1] == f"1/4 fit: 3%, epoch 2, loss 0.5, left 00:29/00:59+, {speed}"
    assert len(told) == 4
    assert told[3] == "1/4 fit: done in 1.5 s, loss 0.3333"


# The end ------------------------------------------------------------------------------------------


ROWS = [
    dict(stage="fit", kind="train", epoch=1, seconds=1.0, test_accuracy=0.9),
    *(
        dict(stage="curve", kind="curve", ratio=ratio, accuracy=0.9 - ratio / 10)
        for ratio in (0.0, 0.9, 0.95, 0.98, 0.99)
    ),
]


def test_a_run_ends_with_the_summary_of_its_page(pages, sketches, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    progress.write_report(tmp_path, {}, ROWS)
    _, heads, line, _, end = capsys.readouterr().err.splitlines()
    assert end == f"report: {tmp_path / 'report.html'}"
    name, *numbers = line.split()
    assert (name, numbers[:2]) == ("run", ["90.00", "81.00"])
    assert heads.split()[:6] == ["unpruned", "%", "at", "90%", "at", "95%"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(number in page for number in numbers)


def test_a_run_without_a_summary_ends_without(pages, sketches, capsys, tmp_path):
    progress.write_report(tmp_path, {}, [dict(stage="weights", kind="own", number=1)])
    assert capsys.readouterr().err == f"report: {tmp_path / 'report.html'}\n"


def test_the_summary_is_as_wide_as_the_terminal(pages, monkeypatch):
    many = [dict(row, arm=f"network {i}") for i in range(9) for row in ROWS]
    firsts = {}
    for columns, rows in ((300, ROWS), (50, ROWS), (55, many)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = report.summary_of({}, rows).splitlines()
        assert max(map(len, lines)) <= columns
        firsts[columns] = [line.split()[0] for line in lines if line.strip()]
    assert firsts[300] == ["unpruned", "run"]
    assert firsts[50][:3] == ["run", "unpruned", "at"]  # on its side: a line per number
    assert firsts[55].count("network") > 9  # in parts, each with a line per network
