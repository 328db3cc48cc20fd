"""Members on a real cluster of Ray, two nodes of one CPU on this machine: lost nodes and workers, a
command that is ended and started again, and a workdir that workers do not see.

Skipped without SPARSITY_JAX_RAY=1 in the environment, as in `.ci/run`, which needs the extra `ray`.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from sparsity_jax import extend, pipeline, report, train
from sparsity_jax.launching import launch, ray_cluster, resources

if os.environ.get("SPARSITY_JAX_RAY") != "1":
    pytest.skip("needs ray and SPARSITY_JAX_RAY=1", allow_module_level=True)

LOOPBACK = {  # Ray's switch for clusters that listen on the loopback address only
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOSS = """
import optax
from sparsity_jax import extend

def halved(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) / 2

extend.register("loss", "halved", halved)
"""
COMMAND_CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from sparsity_jax import pipeline

def get_config():
    return pipeline.base(**{config!r})
"""


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        pathlib.Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes the address
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=node())
        made.add_node(**node())
        yield made
        made.shutdown()


def node():
    return dict(
        num_cpus=1,
        node_ip_address="127.0.0.1",
        object_store_memory=80 * 2**20,
        include_dashboard=False,
    )


def long_config(rates, **fields):
    """Members that train for seconds, and save after every epoch."""
    sweep = dict(fit=dict(optimizer=dict(learning_rate=rates)), mode="loop")
    config = tiny.config("fit", "curve", sweep=sweep, checkpoint_seconds=0.0)
    config["fit"]["epochs"] = 12
    return config | fields


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The rows of one process, compiled as workers compile, by learning rate."""
    from conftest import compiling

    with compiling([]):
        outcome = pipeline.run(long_config((0.1, 0.05, 0.02)), tmp_path_factory.mktemp("alone"))
    rows = tiny.read_back(tiny.timeless(outcome.rows))
    field = "fit.optimizer.learning_rate"
    return {rate: [row for row in rows if row[field] == rate] for rate in (0.1, 0.05, 0.02)}


def check_equal(rows, number, expected):
    """Asserts that the rows of a member are those of one process, bit for bit."""
    own = [dict(row, member=0) for row in rows if row["member"] == number]
    assert tiny.read_back(tiny.timeless(own)) == [dict(row, member=0) for row in expected]


@contextlib.contextmanager
def when(path, act):
    """Calls `act()` once there is a file `path`, while the block runs."""
    ended = threading.Event()
    acted = threading.Event()

    def watch():
        while not ended.wait(0.05):
            if path.exists():
                act()
                acted.set()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert acted.is_set()


def pids(log):
    return [int(pid) for pid in re.findall(r"^attempt .* process (\d+),", log.read_text(), re.M)]


def lives(pid):
    with contextlib.suppress(OSError):
        return (
            "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        )
    return False


def wait_until(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_node_that_is_lost_and_a_member_that_diverges(cluster, alone, tmp_path, capsys):
    """The member of a lost node goes on elsewhere; workers do not see the workdir, so that its
    files come back as they are written.
    """
    (other,) = cluster.worker_nodes
    handle = os.open(tmp_path, os.O_RDONLY)  # of this process: a worker's path of that name differs
    workdir = pathlib.Path(f"/proc/self/fd/{handle}/run")
    seen = tmp_path / "run"

    def lose():
        cluster.remove_node(other, allow_graceful=False)

    config = long_config((0.1, 1e20, 0.05, 0.02))
    first = seen / "member_000" / "checkpoints" / "3"
    try:
        with when(first, lose), pytest.raises(train.NonFiniteLossError, match="^member 1: fit: "):
            launch.run(config, workdir, address=cluster.address)
    finally:
        os.close(handle)
        cluster.add_node(**node())
    told = capsys.readouterr().err
    assert "is not seen there; files of members come back through Ray" in told
    assert "3 done, 0 running, 1 failed, 0 waiting" in told
    rows = report.read_rows(seen / "metrics.jsonl")
    for number, rate in ((0, 0.1), (2, 0.05), (3, 0.02)):
        check_equal(rows, number, alone[rate])
    logs = [seen / f"member_{number:03d}" / "log.txt" for number in range(4)]
    assert sum(len(pids(log)) for log in logs) == 5  # one attempt more than members
    (twice,) = [log for log in logs if len(pids(log)) == 2]
    assert "continuing" in twice.read_text()
    assert len({pid for log in logs for pid in pids(log)}) <= 3  # workers are kept
    failed = report.read_environment(seen)[report.FAILED]
    assert list(failed) == ["member 1"]
    assert "NonFiniteLossError" in failed["member 1"]["end"]


def test_a_command_that_is_ended_and_started_again(cluster, alone, tmp_path):
    """First by SIGTERM, then by SIGKILL on a cluster of its own, of which nothing is left."""
    workdir = tmp_path / "run"
    file = tmp_path / "mine.py"
    tests = str(tiny.ROOT / "tests")
    config = long_config((0.1, 0.05, 0.02))
    file.write_text(COMMAND_CONFIG.format(tests=tests, config=config))
    words = [sys.executable, "-m", "sparsity_jax.run", "--launcher=ray", "--config", str(file)]
    words += ["--workdir", str(workdir), "--config.checkpoint_seconds=0.0"]
    checkpoints = workdir / "member_000" / "checkpoints"

    def begin(*more):
        options = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([*words, *more], env={**os.environ, "TMPDIR": "/tmp"}, **options)

    process = begin(f"--ray-address={cluster.address}")
    wait_until(lambda: checkpoints.is_dir() and (checkpoints / "3").exists())
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted: the same command continues {workdir}" in told
    log = workdir / "member_000" / "log.txt"
    assert "stopped; the next attempt goes on" in log.read_text()

    second = workdir / "member_001" / "log.txt"
    before = len(pids(second)) if second.exists() else 0
    process = begin()
    wait_until(lambda: second.exists() and len(pids(second)) > before)
    children = descendants(process.pid)
    assert len(children) > 3
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not any(map(lives, children)))

    finished = len(pids(log))
    rows = launch.run(config, workdir, address=cluster.address)
    for number, rate in enumerate((0.1, 0.05, 0.02)):
        check_equal(rows, number, alone[rate])
    is_done = not (workdir / "report.html").exists()
    assert len(pids(log)) - finished <= 1 or is_done
    assert not list(workdir.glob("**/run.lock"))


def descendants(pid):
    """Process ids of all children, and theirs."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found += [int(folder.name), *descendants(int(folder.name))]
    return found


def test_groups_with_parts_of_a_file_of_ones_own(cluster, tmp_path):
    """Groups side by side are tasks of their own, with the numbers of one process."""
    file = tmp_path / "mine.py"
    file.write_text(LOSS)
    extend.load(str(file))
    rates = dict(learning_rate=(0.1, 0.05))
    config = tiny.config("fit", sweep=dict(seed=(0, 1), fit=dict(optimizer=rates, epochs=(1, 2))))
    config["fit"]["loss"] = dict(name="halved")
    from conftest import compiling

    with compiling([]):
        expected = pipeline.run(config, tmp_path / "alone").rows
    rows = launch.run(config, tmp_path / "ray", address=cluster.address)
    assert tiny.timeless(rows) == tiny.timeless(expected)
    logs = sorted(path.parent.name for path in tmp_path.glob("ray/member_*/log.txt"))
    assert len(logs) == len(pipeline.check(config)) > 1


def test_what_no_node_has_is_refused(cluster, tmp_path):
    with tiny.refused("--resources", "cpu=3", allowed="with CPU=1"):
        launch.run(tiny.config("fit"), tmp_path, needs="cpu=3", address=cluster.address)
    wanted = resources.read("")
    with ray_cluster.connected(cluster.address, wanted) as joined:
        assert joined.room() == 2
    assert not (tmp_path / "config.json").exists()
