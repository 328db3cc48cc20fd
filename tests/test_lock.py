"""One run at a time in a workdir: who holds it, when it is taken over, and two processes at
once.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pytest
import tiny

from sparsity_jax import lock, pipeline

HOLD = """
import sys, time
from sparsity_jax import lock
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def written(workdir, **changes):
    """A lock as this process would write it, changed; its path."""
    path = workdir / lock.FILE
    with tempfile.TemporaryDirectory() as aside, lock.held(aside):
        content = json.loads(pathlib.Path(aside, lock.FILE).read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(60)
    process.stdout.close()


def test_a_second_run_is_refused_and_takes_over_at_once_when_the_first_is_killed(other, tmp_path):
    config = tiny.config("fit")
    with pytest.raises(
        lock.LockedError,
        match=rf"in use by .* \(process {other.pid}, since 20.*use another --workdir",
    ):
        pipeline.run(config, tmp_path)
    assert not (tmp_path / "config.json").exists()
    other.kill()
    other.wait(60)
    assert (tmp_path / lock.FILE).exists()
    pipeline.run(config, tmp_path)
    assert not (tmp_path / lock.FILE).exists()


def test_a_lock_of_another_host_ends_when_it_was_silent_for_the_stated_time(tmp_path):
    path = written(tmp_path, host="elsewhere", machine="elsewhere")
    with pytest.raises(lock.LockedError, match=r"on elsewhere .*its lock ends in [0-9]+ s"):
        lock.refuse(tmp_path, stale_seconds=600)
    os.utime(path, (time.time() - 100,) * 2)
    with pytest.raises(lock.LockedError):
        lock.refuse(tmp_path, stale_seconds=600)
    lock.refuse(tmp_path, stale_seconds=50)
    with lock.held(tmp_path, stale_seconds=50):
        assert json.loads(path.read_text())["host"] != "elsewhere"


@pytest.mark.parametrize("changes", [dict(pid=2**22 + 1), dict(process="another boot 1")])
def test_a_process_of_this_host_that_is_gone_holds_nothing(changes, tmp_path):
    written(tmp_path, **changes)
    lock.refuse(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_that_cannot_be_read_counts_as_one_of_another_host(text, tmp_path):
    path = tmp_path / lock.FILE
    path.write_text(text, encoding="utf-8")
    with pytest.raises(lock.LockedError, match=r"run\.lock"):
        lock.refuse(tmp_path)
    os.utime(path, (0, 0))
    lock.refuse(tmp_path)


def test_a_lock_is_refreshed_and_a_lost_one_stops_the_run(tmp_path):
    with lock.held(tmp_path, stale_seconds=0.4) as still_mine:
        os.utime(tmp_path / lock.FILE, (0, 0))
        for _ in range(200):
            time.sleep(0.02)
            if (tmp_path / lock.FILE).stat().st_mtime > 0:
                break
        assert time.time() - (tmp_path / lock.FILE).stat().st_mtime < 60
        still_mine()
        (tmp_path / lock.FILE).unlink()
        still_mine()  # written again
        written(tmp_path, run="another", user="somebody else")
        with pytest.raises(OSError, match="taken over by somebody else"):
            still_mine()
    assert json.loads((tmp_path / lock.FILE).read_text())["run"] == "another"  # not ours to remove


def test_the_next_attempt_takes_over_at_once_and_the_one_before_saves_nothing(tmp_path):
    first, second = lock.Attempt("launch a", 1), lock.Attempt("launch a", 2)
    with lock.held(tmp_path, attempt=first) as still_first:
        still_first()
        written_lock = json.loads((tmp_path / lock.FILE).read_text())
        assert (written_lock["launch"], written_lock["number"]) == first
        elsewhere = {**written_lock, "host": "elsewhere", "machine": "elsewhere"}
        (tmp_path / lock.FILE).write_text(json.dumps(elsewhere))
        with pytest.raises(lock.LockedError, match="in use by"):
            lock.refuse(tmp_path)  # a run that no launcher started
        with lock.held(tmp_path, attempt=second) as still_second:
            still_second()
            with pytest.raises(OSError, match="taken over by attempt 2"):
                still_first()
        with pytest.raises(OSError, match="taken over by attempt 2"):
            still_first()  # also when the later one has ended
    with (
        pytest.raises(lock.LockedError, match="attempt 1 of launch a stops"),
        lock.held(tmp_path, attempt=first),
    ):
        pass
    with lock.held(tmp_path, attempt=lock.Attempt("launch b", 1)) as still_mine:
        still_mine()


def test_an_attempt_does_not_take_over_a_run_of_its_own(other, tmp_path):
    with (
        pytest.raises(lock.LockedError, match=f"process {other.pid}"),
        lock.held(tmp_path, attempt=lock.Attempt("launch", 1)),
    ):
        pass
