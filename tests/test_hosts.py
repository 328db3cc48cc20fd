"""Several processes of one run: the same numbers as one, together to the end, also a bad one."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import several
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import hosts, pipeline, report

QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
CLOSE = 1e-5  # largest relative difference between one process and several


def address() -> str:
    """A free port here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(*arguments, **options) -> subprocess.Popen:
    """A Python process with one CPU device."""
    environment = {**os.environ, "XLA_FLAGS": QUICKLY, "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=tiny.ROOT,
        env=environment,
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
        assert row == pytest.approx(other, rel=CLOSE, abs=CLOSE)


# The same numbers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> pathlib.Path:
    """The folder in which four processes have run all of `several.CASES`."""
    folder = tmp_path_factory.mktemp("four")
    several.write_images(folder / "images")
    place = address()
    script = pathlib.Path(several.__file__)
    done = results([start(script, folder, place, 4, rank) for rank in range(4)])
    assert [code for code, _ in done] == [0] * 4, done
    return folder


@pytest.mark.parametrize("case", several.CASES)
def test_four_processes_have_the_numbers_of_one(four, tmp_path, case):
    alone = pipeline.run(several.config_of(case, four), tmp_path)
    paths = [four / f"{case}_{rank}.npz" for rank in range(4)]
    first, *others = [[*np.load(path).values()] for path in paths]
    for other in others:
        for leaf, same in zip(first, other, strict=True):
            assert_array_equal(leaf, same)
    leaves = [np.asarray(leaf) for leaf in tiny.jax.tree.leaves(alone.state)]
    for leaf, same in zip(first, leaves, strict=True):
        assert_allclose(leaf, same, rtol=CLOSE, atol=CLOSE)
    assert_rows_close(report.read_rows(four / case / report.METRICS), alone.rows)


def test_unreadable_images_of_all_processes_are_told(four):
    rows = report.read_rows(four / "streamed" / report.METRICS)
    told = [row["unreadable_images"] for row in rows if "unreadable_images" in row]
    assert told
    assert all("3.png" in name for names in told for name in names)
    assert rows[-1]["test_unreadable"] == 1


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


# Signals, kills -----------------------------------------------------------------------------------

LONG = """
import pathlib, sys
sys.path.insert(0, 'tests')
import tiny
from ml_collections import config_dict

def get_config():
    made = tiny.config('fit', checkpoint_seconds=0.0, steps_per_call=1)
    made['fit'].update(epochs=EPOCHS, evaluate_every=EPOCHS)
    return config_dict.ConfigDict(made)
"""


def begin_run(folder: pathlib.Path, epochs: int, number: int = 2, **seconds) -> list:
    """The processes of a run of so many epochs in `folder / "run"`, once it has saved something."""
    config = folder / "long.py"
    config.write_text(LONG.replace("EPOCHS", str(epochs)))
    place = address()
    limits = [f"--{name}_seconds={value}" for name, value in seconds.items()]
    common = ("-m", "sparsity_jax.run", "--config", config, "--workdir", folder / "run", *limits)
    processes = [start(*common, f"--distributed={place},{number},{rank}") for rank in range(number)]
    until = time.monotonic() + 120
    while not (folder / "run" / "checkpoints" / "2").is_dir():
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            pytest.fail(str(results(processes)))
        time.sleep(0.1)
    return processes


def child_of(process: subprocess.Popen) -> int:
    """The process that another one watches."""
    return int(pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self").is_dir(), reason="needs Linux")


def test_a_signal_to_one_saves_and_ends_all_and_one_process_goes_on(tmp_path):
    processes = begin_run(tmp_path, 100_000)
    processes[1].send_signal(signal.SIGTERM)
    done = results(processes)
    assert [code for code, _ in done] == [130, 130], done
    assert all("interrupted" in text for _, text in done)


@needs_proc
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_all(tmp_path, killed):
    processes = begin_run(tmp_path, 100_000, lost=2)
    started = time.monotonic()
    os.kill(child_of(processes[killed]), signal.SIGKILL)
    done = results(processes)
    assert time.monotonic() - started < 40
    assert [code for code, _ in done] == [1, 1], done
    last = [text.strip().splitlines()[-1] for _, text in done]
    assert "SIGKILL" in last[killed]
    assert f"process {killed}" in last[1 - killed]
    assert all("checkpoint" in line for line in last)
