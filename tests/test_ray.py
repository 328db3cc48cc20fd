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
import tempfile
import threading
import time

import pytest
import tiny

from sparsity_jax import extend, pipeline, report, train
from sparsity_jax.launching import launch, ray_cluster, resources

if os.environ.get("SPARSITY_JAX_RAY") != "1":
    pytest.skip("needs ray and SPARSITY_JAX_RAY=1", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's sockets

LOOPBACK = {  # Ray's switch for clusters that listen on the loopback address only
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

node = dict(
    num_cpus=1,
    node_ip_address="127.0.0.1",
    object_store_memory=80 * 2**20,
    include_dashboard=False,
)
cluster = Cluster(initialize_head=True, head_node_args=node)
other = cluster.add_node(**node)
raylet = lambda: other.all_processes["raylet"][0].process.pid
print("address", cluster.address, raylet(), flush=True)
for line in sys.stdin:
    if line == "lose\\n":
        cluster.remove_node(other, allow_graceful=False)
    elif line == "add\\n":
        other = cluster.add_node(**node)
    else:
        cluster.shutdown()
    print("done", raylet() if line == "add\\n" else "", flush=True)
"""
LOSS = """
import optax
from sparsity_jax import extend

def halved(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) / 2

extend.register("loss", "halved", halved)
"""
COMMAND_CONFIG = """
from sparsity_jax import pipeline

def get_config():
    return pipeline.base(**{config!r})
"""


class Cluster:
    """Two nodes, in a process that does what lines of its input say."""

    def __init__(self):
        pathlib.Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes the address
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        words = [sys.executable, "-W", "ignore", "-c", CLUSTER]
        environment = {**os.environ, **LOOPBACK, "PYTHONPATH": str(tiny.ROOT)}
        self.process = subprocess.Popen(words, env=environment, **pipes)
        _, self.address, self.raylet = self.process.stdout.readline().split()

    def tell(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        done, *raylet = self.process.stdout.readline().split()
        assert done == "done"
        self.raylet = raylet[0] if raylet else self.raylet

    def trains(self, folder):
        """Whether the second node trains the member in `folder`, and has saved twice."""
        if max(numbers_in(folder), default=0) < 2:
            return False
        return parent_of(pids(folder / "log.txt")[-1]) == self.raylet


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        made = Cluster()
        yield made
        made.tell("end")
        made.process.communicate(timeout=60)


def long_config(rates, **fields):
    """Members that train for seconds, and save after every epoch."""
    sweep = dict(fit=dict(optimizer=dict(learning_rate=rates)), mode="loop")
    config = tiny.config("fit", "curve", sweep=sweep, checkpoint_seconds=0.0)
    config["fit"]["epochs"] = 24
    return config | fields


@pytest.fixture(scope="module")
def alone(cluster, tmp_path_factory):
    """The rows of one process, by learning rate."""
    outcome = pipeline.run(long_config((0.1, 0.05, 0.02)), tmp_path_factory.mktemp("alone"))
    rows = tiny.read_back(tiny.timeless(outcome.rows))
    field = "fit.optimizer.learning_rate"
    return {rate: [row for row in rows if row[field] == rate] for rate in (0.1, 0.05, 0.02)}


def check_equal(rows, number, expected):
    """Asserts that the rows of a member are those of one process, bit for bit."""
    own = [dict(row, member=0) for row in rows if row["member"] == number]
    assert tiny.read_back(tiny.timeless(own)) == [dict(row, member=0) for row in expected]


@contextlib.contextmanager
def when(holds, act):
    """Calls `act()` once `holds()`, while the block runs."""
    ended = threading.Event()
    acted = threading.Event()

    def watch():
        while not ended.wait(0.05):
            if holds():
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


def state_of(pid):
    """(state, parent) of a process; none of one that is gone."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    return "", ""


def lives(pid):
    return state_of(pid)[0] not in ("", "Z")


def parent_of(pid):
    return state_of(pid)[1]


def numbers_in(folder):
    """Numbers of the checkpoints of a member."""
    return [int(path.name) for path in folder.glob("checkpoints/[0-9]*")]


def wait_until(holds, seconds=120, process=None):
    """process: whose end makes it fail at once."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.1)


def test_a_node_that_is_lost_and_a_member_that_diverges(cluster, alone, tmp_path, capsys):
    """The member of a lost node goes on elsewhere; workers do not see the workdir, so that its
    files come back as they are written.
    """
    handle = os.open(tmp_path, os.O_RDONLY)  # of this process: a worker's path of that name differs
    workdir = pathlib.Path(f"/proc/self/fd/{handle}/run")
    seen = tmp_path / "run"

    config = long_config((0.1, 1e20, 0.05, 0.02))
    trains = lambda: any(map(cluster.trains, seen.glob("member_*")))
    try:
        with (
            when(trains, lambda: cluster.tell("lose")),
            pytest.raises(train.NonFiniteLossError, match=r"^member 1: fit: "),
        ):
            launch.run(config, workdir, address=cluster.address)
    finally:
        os.close(handle)
        cluster.tell("add")
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


@pytest.fixture
def short_folder():
    """A temporary folder whose name is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


def test_a_command_that_is_ended_and_started_again(cluster, alone, tmp_path, short_folder):
    """First by SIGTERM, then by SIGKILL on a cluster of its own, of which nothing is left."""
    workdir = tmp_path / "run"
    told = tmp_path / "told"
    file = tmp_path / "mine.py"
    config = long_config((0.1, 0.05, 0.02))
    file.write_text(COMMAND_CONFIG.format(config=config))
    words = [sys.executable, "-m", "sparsity_jax.run", "--launcher=ray", "--config", str(file)]
    words += ["--workdir", str(workdir), "--config.checkpoint_seconds=0.0"]

    @contextlib.contextmanager
    def begun(*more):
        environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "TMPDIR": short_folder}
        options = dict(cwd=tmp_path, stdin=subprocess.DEVNULL, env=environment)
        with open(told, "a") as stderr:
            process = subprocess.Popen([*words, *more], stderr=stderr, **options)
        try:
            yield process
        except AssertionError:
            raise AssertionError(told.read_text()) from None
        finally:
            process.kill()
            process.wait(60)

    with begun(f"--ray-address={cluster.address}") as process:
        trained = lambda: max(numbers_in(workdir / "member_000"), default=0) > 2
        wait_until(trained, process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    assert f"interrupted: the same command continues {workdir}" in told.read_text()
    log = workdir / "member_000" / "log.txt"
    assert "stopped; the next attempt goes on" in log.read_text()

    second = workdir / "member_001" / "log.txt"
    before = len(pids(second)) if second.exists() else 0
    with begun() as process:
        again = lambda: second.exists() and len(pids(second)) > before
        wait_until(again, process=process)
        children = descendants(process.pid)
        assert len(children) > 3
        process.kill()
    workers = {pids(log)[-1] for log in workdir.glob("member_*/log.txt")}
    wait_until(lambda: not any(map(lives, workers)))

    rows = launch.run(pipeline.base(**config), workdir, address=cluster.address)
    for number, rate in enumerate((0.1, 0.05, 0.02)):
        check_equal(rows, number, alone[rate])
    assert not list(workdir.glob("**/run.lock"))
    wait_until(lambda: not any(map(lives, children)))  # Ray's own need a minute


def descendants(pid):
    """Process ids of all children, and theirs."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        child = int(folder.name)
        if parent_of(child) == str(pid):
            found += [child, *descendants(child)]
    return found


def test_groups_with_parts_of_a_file_of_ones_own(cluster, tmp_path):
    """Groups side by side are tasks of their own, with the numbers of one process."""
    file = tmp_path / "mine.py"
    file.write_text(LOSS)
    extend.load(str(file))
    rates = dict(learning_rate=(0.1, 0.05))
    config = tiny.config("fit", sweep=dict(seed=(0, 1), fit=dict(optimizer=rates, epochs=(1, 2))))
    config["fit"]["loss"] = dict(name="halved")
    expected = pipeline.run(config, tmp_path / "alone").rows
    rows = launch.run(config, tmp_path / "ray", address=cluster.address)
    assert tiny.timeless(rows) == tiny.timeless(expected)
    logs = sorted(path.parent.name for path in tmp_path.glob("ray/member_*/log.txt"))
    assert len(logs) == len(pipeline.check(config)) > 1


def test_what_no_node_has_is_refused_and_a_lost_node_is_left_out(cluster, tmp_path):
    with tiny.refused("--resources", "cpu=3", allowed="with CPU=1"):
        launch.run(tiny.config("fit"), tmp_path, needs="cpu=3", address=cluster.address)
    wanted = resources.read("")
    with ray_cluster.connected(cluster.address, wanted) as joined:
        assert joined.room() == 2
        cluster.tell("lose")
        assert len(joined.survey(tmp_path)) == 1
    assert not (tmp_path / "config.json").exists()
