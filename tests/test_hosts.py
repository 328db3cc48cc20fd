"""Several processes of one run: the same numbers as one, together to the end, also a bad one."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import several
import tiny
from absl import flags
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import (
    attendance,
    checkpoint,
    data,
    hosts,
    meshes,
    pipeline,
    report,
    stream,
    watch,
)

thorough = pytest.mark.skipif(
    not os.environ.get("SPARSITY_JAX_HOSTS"), reason="takes long: with SPARSITY_JAX_HOSTS=1"
)
PACKAGE = pathlib.Path(hosts.__file__).parent.parent  # first: it may be a copy with a fault
PATHS = os.pathsep.join(map(str, (PACKAGE, tiny.ROOT, tiny.ROOT / "tests")))
CLOSE = 1e-5  # largest relative difference between one process and several


def address() -> str:
    """A free port here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def environment() -> dict[str, str]:
    """That of a process with one CPU device."""
    return {**os.environ, "XLA_FLAGS": tiny.flags(), "PYTHONPATH": PATHS}


def start(*arguments, **options) -> subprocess.Popen:
    """A Python process with one CPU device."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=tiny.ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen]):
    """None of the processes outlives the block."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def results(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each process, all of which must end in time."""
    with ended(processes):
        told = [process.communicate(timeout=200)[0] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def assert_rows_close(rows: list[dict], others: list[dict]) -> None:
    """Asserts that rows say the same, but for times and rounding."""
    rows, others = (tiny.timeless(tiny.read_back(some)) for some in (rows, others))
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert [*row] == [*other]
        for name, value in row.items():
            close = isinstance(value, float)
            expected = pytest.approx(other[name], rel=CLOSE, abs=CLOSE) if close else other[name]
            assert value == expected, name


# The same numbers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> pathlib.Path:
    """The folder in which four processes have run all of `several.CASES`, and gone on with a run
    that one process had begun.
    """
    folder = tmp_path_factory.mktemp("four")
    several.write_images(folder / "images")
    several.begin(several.config_of("begun", folder), folder / "begun", 5)
    assert checkpoint.newest(folder / "begun").progress.begun
    place = address()
    script = pathlib.Path(several.__file__)
    done = results([start(script, folder, place, 4, rank) for rank in range(4)])
    assert [code for code, _ in done] == [0] * 4, done
    return folder


@thorough
@pytest.mark.parametrize("case", several.CASES)
def test_four_processes_have_the_numbers_of_one(four, tmp_path, case):
    alone = pipeline.run(several.config_of(case, four), tmp_path)
    paths = [four / f"{case}_{rank}.npz" for rank in range(4)]
    first, *others = [[*np.load(path).values()] for path in paths]
    for other in others:
        for leaf, same in zip(first, other, strict=True):
            assert_array_equal(leaf, same)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(alone.state)]
    for leaf, same in zip(first, leaves, strict=True):
        assert_allclose(leaf, same, rtol=CLOSE, atol=CLOSE)
    assert_rows_close(report.read_rows(four / case / report.METRICS), alone.rows)


@thorough
def test_a_divided_run_goes_on_in_four_processes_and_in_one(four):
    folder = four / "begun"
    saved = checkpoint.newest(folder)
    epochs = [row for row in saved.progress.rows if "epoch" in row]
    assert epochs
    assert not saved.is_finished
    goes_on = pipeline.run(several.config_of("begun", four), folder)
    assert goes_on.rows[: len(saved.progress.rows)] == saved.progress.rows
    assert_rows_close(goes_on.rows, report.read_rows(four / "divided" / report.METRICS))


@thorough
def test_a_run_starts_from_a_network_that_four_processes_divided_otherwise(four, tmp_path):
    config = several.config_of("divided", four)
    start = dict(pipeline=("curve",), start_from=str(four / "divided"), mesh=dict(params=4))
    curve = pipeline.run({**config, **start}, tmp_path).rows
    rows = report.read_rows(four / "divided" / report.METRICS)
    for row, other in zip(curve, rows[-len(curve) :], strict=True):
        assert_rows_close([dict(row, arm="fit")], [other])


@thorough
def test_unreadable_images_of_all_processes_are_told(four):
    rows = report.read_rows(four / "streamed" / report.METRICS)
    told = [row["unreadable_images"] for row in rows if "unreadable_images" in row]
    assert told
    assert all("3.png" in name for names in told for name in names)
    assert rows[-1]["test_unreadable"] == 1


@thorough
def test_processes_that_differ_are_refused(four):
    own, config = (four / "refused_0").read_text().split("\n")
    assert "which process 1, 2, 3 does not see" in own
    assert "config of process 1, 2, 3 differs" in config
    told = {(four / f"refused_{rank}").read_text().split("\n")[1] for rank in range(4)}
    assert told == {config}
    assert not (four / "differing" / "config.json").exists()


def test_one_process_agrees_with_itself(tmp_path):
    assert hosts.agree(True)
    assert not hosts.agree(False)
    assert hosts.of_first(7) == 7
    assert hosts.gathered(["a"]) == ["a"]
    assert hosts.by_first(max, 1, 2) == 2
    hosts.check_alike("the config", {})
    hosts.check_shared(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert (hosts.number(), hosts.is_first(), hosts.several()) == (1, True, False)
    assert len(hosts.devices(1)) == 1


def test_processes_read_their_shares_of_a_stream(tmp_path):
    several.write_images(tmp_path / "images")
    config = several.config_of("streamed", tmp_path)
    images = data.load(**config["data"]).train.images
    here = lambda batch: batch
    common = dict(batch_size=8, put=here)
    reads = [
        lambda **rows: stream.train_batches(images, [3], epochs=1, start=1, **common, **rows),
        lambda **rows: stream.eval_batches(images, **common, **rows),
    ]
    for read in reads:
        whole = [*read()]
        shares = [[*read(rows=slice(start, start + 2))] for start in range(0, 8, 2)]
        for batch, *parts in zip(whole, *shares, strict=True):
            assert_array_equal(batch.images, np.concatenate([part.images for part in parts]))
            assert_array_equal(batch.labels, np.concatenate([part.labels for part in parts]))
            assert batch.unreadable == sum((part.unreadable for part in parts), ())


def test_rows_of_a_batch_become_one_array(eight_devices):
    mesh = jax.make_mesh((8,), ("batch",), (jax.sharding.AxisType.Auto,))
    sharding = meshes.over_batch(mesh)
    assert meshes.own_rows(sharding, 16) == slice(0, 16)
    batch = np.arange(32).reshape(16, 2), np.arange(16)
    for array, own in zip(batch, meshes.put_rows(slice(0, 16), 16, sharding, batch), strict=True):
        assert own.sharding == sharding
        assert_array_equal(own, array)


def test_an_alarm_rings_at_the_same_call_in_all(monkeypatch):
    clock, told = [0.0], []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "of_first", lambda value: told.append(value) or value)
    monkeypatch.setattr(hosts.time, "monotonic", lambda: clock[0])
    alarm = hosts.Alarm(10.0)
    rung = []
    for call in range(300):
        clock[0] += 0.1
        if alarm.rings():
            rung.append(call)
            alarm.reset()
    assert len(rung) == 2
    assert 98 <= rung[0] <= 110
    assert len(told) < 40  # calls at which the processes exchange something


# The process that watches -------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
from sparsity_jax import watch

watch.begin(sys.argv[1:])
{}
"""
LOST = (
    "os.write(2, b'E0101 00:00:00 1 coordination_service.cc:1] The following tasks are unhealthy "
    "(stopped sending heartbeats):\\n0\\nThe tasks have crashed.\\n'); os.abort()"
)
FIRST_LOST = (
    "os.write(2, b'F0101 00:00:00 1 client.h:80] Terminating process because the JAX distributed "
    "service detected fatal errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\\n\\n"
    "RPC: /xla.coordination.CoordinationService/Heartbeat\\n'); os.abort()"
)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "seconds", "why"),
    [
        ("time.sleep(60)", dict(compile=1), "no step for 1 s (--compile_seconds)"),
        ("watch.note(watch.STEP); time.sleep(60)", dict(step=1), "(--step_seconds)"),
        ("watch.note(watch.JOINING); time.sleep(60)", dict(join=1), "not all of 2 processes"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", dict(lost=1), "no sign of life for 1 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", {}, "process 1 of 2 was ended by SIGSEGV"),
        (LOST, {}, "process 0 gave no sign of life"),
        (FIRST_LOST, {}, "process 0 gave no sign of life"),
    ],
)
def test_the_end_of_a_child_is_told(code, seconds, why):
    limits = [f"--{name}_seconds={value}" for name, value in seconds.items()]
    process = start("-c", CHILD.format(code), "--distributed", "here:1,2,1", *limits)
    ((exit_code, text),) = results([process])
    assert exit_code == 1
    assert why in last_line(text)
    assert "checkpoint" in last_line(text)
    assert "coordination_service" not in text


@pytest.mark.parametrize(
    ("code", "who"), [("", "this process"), ("watch.meet(2, 4); ", "process 2 of 4")]
)
def test_a_child_of_a_scheduler_has_the_number_that_it_was_told(code, who):
    code = CHILD.format(f"{code}os.kill(os.getpid(), signal.SIGSEGV)")
    ((_, text),) = results([start("-c", code, "--distributed=auto")])
    assert last_line(text).startswith(f"error: {who} was ended by SIGSEGV")


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit('error: a mistake')", 1, "error: a mistake"),
        ("watch.note(watch.TOLD); print('told', file=sys.stderr); os.abort()", 1, "told"),
        ("os.write(2, b'seen'); sys.exit(3)", 3, "seen"),
        ("os.write(1, b'[Gloo] Rank 0 is here\\nGl\\xc3'); os.write(1, b'\\xb6')", 0, "Gl\u00f6"),
    ],
)
def test_nothing_is_added_where_a_child_has_told_its_end(code, expected, said):
    process = start("-c", CHILD.format(code), "--distributed=here:1,2,1")
    assert results([process]) == [(expected, f"{said}\n" if said else "")]


@pytest.mark.parametrize(
    ("doing", "signals", "expected"), [("STEP", 1, 3), ("STEP", 2, 130), ("JOINING", 1, 130)]
)
def test_signals_are_handed_on(doing, signals, expected):
    listen = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3) if ENDS else None)"
    listen = listen.replace("ENDS", str(signals == 1))
    wait = "print('ready', flush=True); time.sleep(60); time.sleep(60)"
    code = CHILD.format(f"{listen}; watch.note(watch.{doing}); {wait}")
    process = start("-c", code, "--distributed=here:1,2,1")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # the note is read
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    ((ended_with, text),) = results([process])
    assert ended_with == expected, text


def test_a_child_ends_with_its_parent(tmp_path):
    code = CHILD.format("print(os.getpid(), flush=True); time.sleep(60)")
    process = start("-c", code, "--distributed=here:1,2,1")
    child = int(process.stdout.readline())
    process.kill()
    until = time.monotonic() + 20
    while is_there(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_there(child)
    results([process])


def is_there(process: int) -> bool:
    """Whether a process lives, or is not yet waited for."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "given", ["on", "here,2,0", "here:1,2", "here:1,2,2", "here:1,two,0", "here:1,2,-1", ""]
)
def test_wrong_places_are_refused(given):
    with tiny.refused("--distributed", given):
        watch.place_of(given)


def test_places():
    assert watch.place_of("off") is None
    assert watch.place_of("auto") == watch.AUTOMATIC
    assert watch.place_of("[::1]:80,4,3") == watch.Place("[::1]:80", 4, 3)


def test_the_environment_gives_the_default(monkeypatch):
    monkeypatch.setenv(watch.VARIABLE, "here:1,2,1")
    values = flags.FlagValues()
    watch.define(values)
    values(["run", "--lost_seconds=5"])
    place, limits = watch.read(values)
    assert place == watch.Place("here:1", 2, 1)
    assert limits.lost_seconds == 5


# Who is there -------------------------------------------------------------------------------------


def sign(rank: int, met: int = 0, works: bool = False) -> attendance.Sign:
    return attendance.Sign(rank, f"host{rank}", met, works)


def test_who_is_there_is_known_from_files_that_change(tmp_path):
    folder = tmp_path / "new" / "here"
    first, second = (attendance.Attendance(folder, name) for name in "ab")
    folder.mkdir(parents=True)
    (folder / "old").write_text('[7, 2, "host2", 5, false]')  # of a process that was killed
    (folder / "half").write_text("[7,")
    for _ in range(3):
        first.call(sign(0, met=4))
        second.call(sign(1, met=5))
    assert first.there() == second.there() == [sign(0, met=4), sign(1, met=5)]
    assert attendance.absent(first.there(), 4) == [2, 3]
    second.leave()
    assert not second.there()
    first.call(sign(0, met=4))
    assert first.there() == [sign(0, met=4), sign(1, met=5)]  # until it waits no longer
    first.leave()
    assert sorted(path.name for path in folder.iterdir()) == ["half", "old"]


def test_a_process_that_is_alone_leaves_nothing(tmp_path):
    alone = attendance.Attendance(tmp_path / "here", "a")
    alone.leave()
    alone.call(sign(0))
    alone.leave()
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("there", "late"),
    [
        ([sign(0, 4), sign(1, 3), sign(2, 5)], [1]),
        ([sign(0, 4), sign(1, 3), sign(2, 3)], [1, 2]),
        ([sign(0, 4), sign(1, 4, works=True)], [1]),
        ([sign(0, 4, works=True), sign(1, 3)], [1]),
        ([sign(0, 4), sign(1, 4)], []),
        ([], []),
    ],
)
def test_others_wait_for_those_that_are_behind(there, late):
    assert [other.rank for other in attendance.behind(there)] == late


MEETING = """
import sys, time
from sparsity_jax import watch

watch.begin(sys.argv[1:])
from absl import flags
from sparsity_jax import hosts, stopping

values = flags.FlagValues()
watch.define(values)
values(["run", *sys.argv[2:]])
place, limits = watch.read(values)
hosts.begin(place, limits)

def hang():
    time.sleep(100)

for step in range(100):
    stopping.check()
    if step == 3 and place.rank == HANGS:
        hang()
    hosts.agree(False)
hosts.end()
"""


def meet(folder: pathlib.Path, rank: int, place: str, hangs: int, **seconds) -> subprocess.Popen:
    """One of two processes that meet a hundred times at `place`; `hangs`: the rank of one that does
    not.
    """
    limits = [f"--{name}_seconds={value}" for name, value in seconds.items()]
    code = MEETING.replace("HANGS", str(hangs))
    return start("-c", code, f"--workdir={folder}", f"--distributed={place},2,{rank}", *limits)


@thorough
def test_a_process_that_does_not_come_or_hangs_is_named_by_the_others(tmp_path):
    alone = [meet(tmp_path / str(rank), rank, address(), -1, join=3) for rank in range(2)]
    started = time.monotonic()
    done = results(alone)
    assert time.monotonic() - started < 3 + 20
    for rank, (code, text) in enumerate(done):
        assert code == 1
        assert "3 s (--join_seconds)" in last_line(text)
        assert f"process {1 - rank} did not come" in last_line(text)

    place = address()
    done = results([meet(tmp_path / "0", rank, place, 0, step=4) for rank in range(2)])
    for code, text in done:
        assert code == 1
        assert "4 s (--step_seconds)" in last_line(text)
        assert f"process 0 on {socket.gethostname()} is behind" in last_line(text)
    assert " in hang" in done[0][1]
    assert " in hang" not in done[1][1]
    assert not [*(tmp_path / "0").glob(".processes/*")]


# Signals, kills -----------------------------------------------------------------------------------

LONG = """
import sys
sys.path.insert(0, 'tests')
import tiny
from ml_collections import config_dict

def get_config():
    digits = dict(name='digits', train_limit=1024, test_limit=50)
    made = tiny.config('fit', data=digits, checkpoint_seconds=0.5, steps_per_call=1)
    gentle = dict(tiny.SGD, learning_rate=0.001)  # rounding does not grow
    made['fit'].update(epochs=EPOCHS, batch_size=4, evaluate_every=EPOCHS, optimizer=gentle)
    return config_dict.ConfigDict(made)
"""


def begin_run(folder: pathlib.Path, epochs: int, **seconds) -> list[subprocess.Popen]:
    """Both processes of a run of so many epochs in `folder / "run"`, which has saved something; one
    group, as a shell makes of a line.
    """
    config = folder / "long.py"
    config.write_text(LONG.replace("EPOCHS", str(epochs)))
    place = address()
    limits = [f"--{name}_seconds={value}" for name, value in seconds.items()]
    common = ("-m", "sparsity_jax.run", "--config", config, "--workdir", folder / "run", *limits)
    first = start(*common, f"--distributed={place},2,0", process_group=0)
    second = start(*common, f"--distributed={place},2,1", process_group=first.pid)
    processes = [first, second]
    until = time.monotonic() + 200
    while not (folder / "run" / "checkpoints" / "1").is_dir():
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            pytest.fail(str(results(processes)))
        time.sleep(0.1)
    return processes


@thorough
def test_a_signal_to_one_saves_and_ends_all_and_one_process_goes_on(tmp_path):
    processes = begin_run(tmp_path, 12)
    processes[1].send_signal(signal.SIGTERM)
    done = results(processes)
    assert [code for code, _ in done] == [130, 130], done
    assert all("interrupted" in text for _, text in done)
    config = tiny.module(str(tmp_path / "long.py")).get_config()
    saved = checkpoint.newest(tmp_path / "run")
    assert saved.progress.begun
    goes_on = pipeline.run(config, tmp_path / "run")
    alone = pipeline.run(config, tmp_path / "alone")
    assert goes_on.rows[: len(saved.progress.rows)] == saved.progress.rows
    assert_rows_close(goes_on.rows, alone.rows)


@thorough
def test_an_interrupt_from_the_terminal_saves_once_and_ends_all(tmp_path):
    processes = begin_run(tmp_path, 100_000)
    os.killpg(processes[0].pid, signal.SIGINT)
    done = results(processes)
    assert [code for code, _ in done] == [130, 130], done
    for _, text in done:
        assert last_line(text).startswith("interrupted: the same command continues")
        assert "Gloo" not in text
    saved = checkpoint.newest(tmp_path / "run")
    assert saved.progress.begun
    assert not [*(tmp_path / "run").glob(".processes")]


def child_of(process: subprocess.Popen) -> int:
    """The process that another one watches."""
    return int(pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@pytest.mark.skipif(not pathlib.Path("/proc/self").is_dir(), reason="needs Linux")
@pytest.mark.parametrize(
    ("rank", "number", "told"),
    [
        pytest.param(0, signal.SIGKILL, "SIGKILL", marks=thorough),
        (1, signal.SIGKILL, "SIGKILL"),
        pytest.param(1, signal.SIGSTOP, "no sign of life", marks=thorough),
    ],
)
def test_a_process_that_dies_or_stands_still_ends_all(tmp_path, rank, number, told):
    processes = begin_run(tmp_path, 100_000, lost=10)
    started = time.monotonic()
    os.kill(child_of(processes[rank]), number)
    done = results(processes)
    assert time.monotonic() - started < 10 + 30
    assert [code for code, _ in done] == [1, 1], done
    last = [last_line(text) for _, text in done]
    assert told in last[rank]
    assert f"process {rank}" in last[1 - rank]
    assert all("checkpoint" in line for line in last)


@thorough
def test_the_page_is_true(tmp_path):
    """Two processes as the page starts them, with fewer epochs."""
    page = (tiny.ROOT / "docs" / "many_hosts.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    few = "--config.fit_sfw.epochs=1 --config.fit_sgd.epochs=1"
    python = f"{sys.executable} -m sparsity_jax.run"
    command = block.replace("sparsity-jax run", python).replace(
        " --distributed", f" {few} --distributed"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0
    rows = report.read_rows(tmp_path / "runs" / "two" / report.METRICS)
    assert {row["stage"] for row in rows} == {"fit_sfw", "curve", "weights", "fit_sgd"}


def test_options_of_the_page_are_places():
    page = (tiny.ROOT / "docs" / "many_hosts.md").read_text()
    given = re.findall(r"--distributed ([^\s`]+)", page)
    assert len(given) >= 2
    for text in given:
        assert watch.place_of(text.replace("$rank", "1"))
