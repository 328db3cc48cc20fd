"""Launching members without Ray: resources, tasks, files there and back, attempts, and workers that
fail or are lost.
"""

import concurrent.futures
import contextlib
import os
import resource
import sys
import types

import pytest
import tiny

from sparsity_jax import imports, lock, pipeline, plans, report, stopping, turns, workdirs
from sparsity_jax.launching import dispatch, launch, mirror, ray_cluster, resources, tasks, worker
from sparsity_jax.launching.tasks import Task

# Resources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", dict(CPU=1)),
        ("cpu=2", dict(CPU=2)),
        ("gpu=1", dict(CPU=1, GPU=1)),
        ("gpu=0.5,cpu=4", dict(CPU=4, GPU=0.5)),
        ("cpu=0,gpu=1,tpu_slice=2", dict(GPU=1, tpu_slice=2)),
    ],
)
def test_resources_are_read_by_name(text, expected):
    read = resources.read(text)
    assert read.by_name() == expected
    assert resources.read(resources.told(read)).by_name().items() <= {"CPU": 1, **expected}.items()


@pytest.mark.parametrize("text", ["gpu", "cpu=0.5", "cpu=-1", "cpu=1,cpu=2", "cpu=nan", "=1"])
def test_other_resources_are_refused(text):
    with tiny.refused("--resources", text, allowed="NAME=NUMBER"):
        resources.read(text)


def test_a_node_has_room_for_as_many_workers_as_its_scarcest_resource():
    room = lambda text, **there: resources.workers_on(resources.read(text), there)
    assert room("cpu=2", CPU=7.0) == 3
    assert room("gpu=0.5,cpu=1", CPU=3.0, GPU=1.0) == 2
    assert room("gpu=1", CPU=8.0) == 0
    assert resources.memory_share(resources.read("gpu=0.5")) == 0.45
    assert resources.memory_share(resources.read("gpu=1")) is None


# Tasks --------------------------------------------------------------------------------------------


def some_tasks(*states, **fields):
    return [Task(i, f"member {i}", 1, "a", state, **fields) for i, state in enumerate(states)]


def test_a_worker_gets_a_program_that_it_has_compiled_if_one_waits():
    every = some_tasks("done", "waiting", "waiting")
    every[2].program = "b"
    assert tasks.next_task(every, {"b"}).index == 2
    assert tasks.next_task(every, set()).index == 1
    every[2].state = "running"
    assert tasks.next_task(every, {"b"}).index == 1
    assert tasks.next_task(every[:1], {"b"}) is None


def test_the_line_counts_members_and_tells_the_time_left():
    every = some_tasks("done", "running", "failed", "waiting")
    every[3].members = 3
    assert tasks.status(every, 2, 0.0) == "members: 1 done, 1 running, 1 failed, 3 waiting"
    every[0].seconds = 20.0
    every[1].began = 100.0
    # 15 s of the running one and 60 s of three others, by two workers: 37.5 s
    assert tasks.status(every, 2, 105.0).endswith("3 waiting, left 00:37")


# Files there and back -----------------------------------------------------------------------------


def checkpoint(folder, number):
    """A whole checkpoint without arrays."""
    from sparsity_jax import intact

    there = folder / "checkpoints" / str(number)
    (there / "state").mkdir(parents=True)
    (there / "state" / "array").write_bytes(b"%d" % number)
    record = dict(stage=number, begun=False, rows=[], config=dict(pipeline=["fit"]))
    intact.write_object(there / "progress.json", record)
    intact.seal(there)


def test_changes_of_a_folder_arrive_as_they_were_written(tmp_path):
    there = tmp_path / "there"
    here = tmp_path / "here"
    checkpoint(there, 1)
    (there / "metrics.jsonl").write_text("1\n")
    (there / "run.lock").write_text("mine")
    (there / ".metrics.jsonl.0123").write_text("part")
    (there / "checkpoints" / ".writing_2").mkdir()
    (there / "checkpoints" / ".writing_2" / "part").write_text("x")
    source = mirror.Source(there)
    mirror.apply(here, source.changes())
    assert workdirs.newest(here).progress.stage == 1
    assert sorted(os.listdir(here)) == ["checkpoints", "metrics.jsonl"]
    assert os.listdir(here / "checkpoints") == ["1"]
    assert not source.changes().files
    checkpoint(there, 2)
    (there / "checkpoints" / "1").rename(tmp_path / "old")
    (there / "metrics.jsonl").write_text("1\n2\n")
    changes = source.changes()
    assert not any(name.startswith("checkpoints/1/") for name in changes.files)
    mirror.apply(here, changes)
    assert workdirs.numbers_in(here / "checkpoints") == [2]
    mirror.apply(here, mirror.Changes({}, []))  # of a worker that has only begun
    assert workdirs.numbers_in(here / "checkpoints") == [2]
    assert (here / "metrics.jsonl").read_text() == "1\n2\n"


def test_the_next_attempt_starts_with_the_newest_whole_checkpoint(tmp_path):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    (tmp_path / "checkpoints" / "2" / "state" / "array").write_bytes(b"x")
    (tmp_path / "log.txt").write_text("so far\n")
    (tmp_path / "config.json").write_text("{}")
    start = mirror.start(tmp_path)
    assert start.checkpoints == [1]
    assert {name.split("/")[0] for name in start.files} == {"checkpoints", "log.txt"}
    assert not any(name.startswith("checkpoints/2/") for name in start.files)


# Dispatch -----------------------------------------------------------------------------------------


class Hand:
    """A worker that answers at once, as `answers` say, by index of the task; an exception is a lost
    worker. `ready`: what it says of itself.
    """

    def __init__(self, answers, ready=None):
        self.answers = answers
        self.ready = ready or worker.Ready("", {})
        self.ran = []
        self.ended = False

    def call(self, method, *arguments):
        future = concurrent.futures.Future()
        if method == "prepare":
            future.set_result(self.ready)
        elif method == "run":
            index, attempt, _ = arguments
            self.ran.append((index, attempt.number))
            answer = self.answers(index, attempt.number)
            set_one = future.set_exception if isinstance(answer, Exception) else future.set_result
            set_one(answer)
        else:
            future.set_result(mirror.Changes({}, []))
        return future

    def end(self):
        self.ended = True


def dispatched(tmp_path, every, make, room=2, retries=1, fetches=False):
    """The hands of a launch that has ended."""
    hands = []

    def start():
        hands.append(make(len(hands)))
        return hands[-1]

    config = dict(pipeline=["fit"])
    places = [dispatch.Place(tmp_path / task.name, config) for task in every]
    try:
        dispatch.Dispatch(
            every,
            places,
            start=start,
            room=lambda: room,
            launch="now",
            retries=retries,
            fetches=fetches,
            still_mine=lambda: None,
            greeted=lambda environment: None,
        ).run()
    finally:
        assert all(hand.ended for hand in hands)
    return hands


def done(index, number):
    return worker.Outcome("done")


def test_every_task_runs_once_and_what_is_done_is_left_alone(tmp_path, capsys):
    every = some_tasks("waiting", "done", "waiting", "waiting")
    hands = dispatched(tmp_path, every, lambda number: Hand(done))
    assert sorted(index for hand in hands for index, _ in hand.ran) == [0, 2, 3]
    assert {task.state for task in every} == {"done"}
    assert "4 done, 0 running, 0 failed, 0 waiting" in capsys.readouterr().err


def test_a_failed_member_ends_neither_its_worker_nor_the_others(tmp_path):
    every = some_tasks("waiting", "waiting", "waiting")
    failure = worker.Outcome("failed", "the disk is full.")
    answers = lambda index, number: failure if index == 0 else worker.Outcome("done")
    (hand,) = dispatched(tmp_path, every, lambda number: Hand(answers), room=1)
    assert hand.ran == [(0, 1), (1, 1), (2, 1)]
    assert [task.state for task in every] == ["failed", "done", "done"]
    assert every[0].sentence == "the disk is full."
    with pytest.raises(launch.members.FailedError, match=r"^member 0: the disk is full\.$"):
        launch._raise_failed(every)


def test_a_lost_worker_is_replaced_as_often_as_was_said(tmp_path):
    every = some_tasks("waiting", "waiting")
    lost = RuntimeError("the node is gone")
    answers = lambda index, number: lost if index == 0 else worker.Outcome("done")
    hands = dispatched(tmp_path, every, lambda number: Hand(answers), room=1)
    assert [hand.ran for hand in hands] == [[(0, 1)], [(0, 2)], [(1, 1)]]
    assert every[0].state == "failed"
    assert "attempt 2 was the last; its worker was lost ('the node is gone')" in every[0].sentence
    assert every[1].state == "done"


def test_a_member_whose_last_files_do_not_arrive_is_not_done(tmp_path):
    every = some_tasks("waiting", "waiting")
    checkpoint(tmp_path / "member 1", 1)
    dispatched(tmp_path, every, lambda number: Hand(done), fetches=True)
    assert [task.state for task in every] == ["failed", "done"]
    assert "its last files did not arrive" in every[0].sentence


def test_a_worker_that_cannot_begin_is_left_out_and_none_at_all_is_an_error(tmp_path, capsys):
    no_data = worker.Ready("config.data.name is 'x', which is not there.", {})
    make = lambda number: Hand(done, no_data if number == 0 else None)
    hands = dispatched(tmp_path, some_tasks("waiting", "waiting"), make)
    assert [len(hand.ran) for hand in hands] == [0, 2]
    assert "left out: config.data.name" in capsys.readouterr().err
    with tiny.complains("config.data.name is 'x'"):
        dispatched(tmp_path, some_tasks("waiting"), lambda number: Hand(done, no_data), room=1)


def test_a_worker_with_a_full_disk_gets_nothing_more(tmp_path, capsys):
    unable = worker.Outcome("unable", "No space left on device")
    every = some_tasks("waiting", "waiting", "waiting")
    make = lambda number: Hand(done if number else lambda *_: unable)
    hands = dispatched(tmp_path, every, make)
    assert {task.state for task in every} == {"done"}
    assert [len(hand.ran) for hand in hands] == [1, 3]
    assert "member 0: its worker cannot write (No space left" in capsys.readouterr().err
    every = some_tasks("waiting", "waiting", "waiting")
    hands = dispatched(tmp_path, every, lambda number: Hand(lambda *_: unable))
    assert {task.state for task in every} == {"failed"}
    assert [len(hand.ran) for hand in hands] == [1, 1]
    assert every[2].sentence == "no worker is left that can write: No space left on device"


def test_a_stop_reaches_the_workers_and_their_tasks_wait_again(tmp_path):
    every = some_tasks("waiting", "waiting")

    class Slow(Hand):
        def call(self, method, *arguments):
            if method == "run":
                self.running = concurrent.futures.Future()
                stopping.request()
                return self.running
            if method == "stop":
                self.running.set_result(worker.Outcome("stopped"))
            return super().call(method, *arguments)

    try:
        with pytest.raises(KeyboardInterrupt):
            dispatched(tmp_path, every, lambda number: Slow(done))
    finally:
        stopping.clear()
    assert [task.state for task in every] == ["waiting", "waiting"]


# A worker in this process ------------------------------------------------------------------------


def started(config, workdir, sees_workdir=True, **options):
    config = pipeline.plain(config)
    setup = worker.Setup(config, str(workdir), os.getcwd(), sees_workdir, **options)
    made = worker.Worker(setup)
    assert made.prepare().sentence == ""
    return made


@pytest.fixture(scope="module")
def sweep():
    rates = dict(fit=dict(optimizer=dict(learning_rate=(1e20, 0.1))))
    return tiny.config("fit", sweep=dict(rates, mode="loop"), checkpoint_seconds=0.0)


@contextlib.contextmanager
def disk_of(size):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_worker_runs_members_as_one_process_does(sweep, tmp_path):
    with pytest.raises(pipeline.NonFiniteLossError):
        pipeline.run(sweep, tmp_path / "loop")
    config = pipeline.plain(sweep)
    unseen = started(sweep, tmp_path / "elsewhere", sees_workdir=False)
    every = turns.turns_of(plans.check(config), tmp_path / "launched", config)
    attempt = lock.Attempt("now", 1)
    poisoned = unseen.run(0, attempt, None)
    assert poisoned.state == "failed"
    assert poisoned.diverged
    assert "not finite" in poisoned.sentence
    mirror.apply(every[0].folder, unseen.news())
    with pytest.MonkeyPatch.context() as patch:
        missing = lambda *_: os.link(tmp_path / "none", tmp_path / "there")
        patch.setattr(pipeline, "run_plan", missing)
        failed = unseen.run(1, attempt, None)
        long = lambda *_: (tmp_path / "long").write_bytes(bytes(2**20))
        patch.setattr(pipeline, "run_plan", long)
        with disk_of(2**16):
            full = unseen.run(1, attempt, None)
    assert failed.state == "failed"
    assert "No such file" in failed.sentence
    assert full.state == "unable"
    assert "File too large" in full.sentence
    assert unseen.run(1, attempt, None).state == "done"
    mirror.apply(every[1].folder, unseen.news())
    unseen.leave()
    assert not (tmp_path / "elsewhere").exists()
    assert "Traceback" in (every[0].folder / "log.txt").read_text()
    rows = launch._rows_of(every, tmp_path / "launched")
    expected = report.read_rows(tmp_path / "loop" / "metrics.jsonl")
    assert tiny.timeless(rows) == tiny.timeless(expected)
    states = [launch._task(turn, index).state for index, turn in enumerate(every)]
    assert states == ["waiting", "done"]


def test_failed_members_are_in_the_report_until_they_run_again(tmp_path, pages, sketches):
    config = pipeline.plain(tiny.config("fit", sweep=dict(seed=(0, 1), mode="loop")))
    every = turns.turns_of(plans.check(config), tmp_path, config)
    states = some_tasks("failed", "done", sentence="the disk is full.")
    every[0].folder.mkdir()
    (every[0].folder / "log.txt").write_text("so far\n<last words>\n")
    launch._tell_failed(tmp_path, every, states)
    environment = report.read_environment(tmp_path)
    text = report.write(tmp_path, config, [], environment=environment).read_text()
    assert "<b>member 0</b> the disk is full." in text
    assert "&lt;last words&gt;" in text
    launch._tell_environment(tmp_path, {}, dict(device="CPU"))
    environment = report.read_environment(tmp_path)
    assert environment == dict(device="CPU")
    assert "the disk" not in report.write(tmp_path, config, [], environment=environment).read_text()


def test_files_that_registered_names_are_shipped(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("VALUE = 1\n")
    content = worker.shipped({"loss": {"hinge": str(file)}})
    assert content == {str(file): b"VALUE = 1\n"}
    with tiny.complains("'hinge'.*registered by <stdin>.*Python file"):
        worker.shipped({"loss": {"hinge": "<stdin>"}})
    loaded = []
    monkeypatch.setattr(imports, "load", lambda path: loaded.append(path))
    setup = worker.Setup({}, "", "", False, files={str(file): b"VALUE = 2\n"})
    made = worker.Worker(setup)
    made._own_folder = str(tmp_path / "own")
    (tmp_path / "own").mkdir()
    made._load_files()
    assert loaded[0].read_text() == "VALUE = 2\n"  # a copy: the file here is another one


# Ray's own, as far as it needs no cluster ---------------------------------------------------------


@pytest.mark.parametrize("address", ["nowhere", "ray://127.0.0.1:10001", "127.0.0.1:9"])
def test_addresses_that_cannot_be_reached_are_refused(address):
    with (
        tiny.refused("--ray-address", address, allowed="HOST:PORT"),
        ray_cluster.connected(address, resources.read("")),
    ):
        pass


def test_a_missing_ray_is_told_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with tiny.refused("--launcher", "ray", allowed="pip install '.[ray]'"):
        ray_cluster._imported()


@pytest.fixture
def without_ray(monkeypatch):
    """Versions without that of Ray, which need not be installed here."""
    monkeypatch.setattr(ray_cluster, "_LIBRARIES", ("jax", "jaxlib"))


def test_versions_that_differ_between_nodes_are_refused(without_ray):
    here = ray_cluster.versions()
    fits = ray_cluster.Seen("a", here, True)
    other = ray_cluster.Seen("b", {**here, "jax": "0.0.1"}, True)
    ray_cluster.compare(here, [fits])
    with tiny.complains(r"node b has jax 0\.0\.1; allowed: .* on all nodes"):
        ray_cluster.compare(here, [fits, other])


def test_a_node_says_whether_it_sees_the_workdir(tmp_path, without_ray):
    probe = tmp_path / "probe"
    probe.write_text("probe")
    versions, answer = ray_cluster._look(str(probe))
    assert versions == ray_cluster.versions()
    assert (tmp_path / answer).is_file()
    assert ray_cluster._look(str(tmp_path / "elsewhere"))[1] == ""
    probe.write_text("of another folder of the same name")
    assert ray_cluster._look(str(probe))[1] == ""
    nodes = [dict(Alive=True, NodeManagerHostname="a", Resources=dict(CPU=2.0))]
    cluster = ray_cluster.Cluster(
        types.SimpleNamespace(nodes=lambda: nodes), resources.read("gpu=1")
    )
    with tiny.refused("--resources", "gpu=1,cpu=1", allowed="a with CPU=2, GPU=0"):
        cluster.check_room()


class Node:
    """As Ray of one node. answers: what questions give or raise, in turn; the node is gone with the
    last.
    """

    def __init__(self, *answers):
        self.answers = list(answers)
        strategy = lambda node, soft: node
        self.util = types.SimpleNamespace(
            scheduling_strategies=types.SimpleNamespace(NodeAffinitySchedulingStrategy=strategy)
        )

    def nodes(self):
        there = dict(NodeID="1", NodeManagerHostname="a", Resources=dict(CPU=2.0))
        return [dict(there, Alive=bool(self.answers))]

    def remote(self, **options):
        return lambda look: types.SimpleNamespace(remote=look)

    def get(self, reference, timeout):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return reference


def test_a_node_that_is_lost_is_not_asked_for_its_versions(tmp_path, without_ray, monkeypatch):
    """Ray lists it for some seconds, in which nothing can be given to it."""
    monkeypatch.setattr(ray_cluster, "_AGAIN_SECONDS", 0.0)
    lost = RuntimeError("not schedulable")

    def survey(*answers):
        return ray_cluster.Cluster(Node(*answers), resources.read("")).survey(tmp_path)

    assert survey(lost, lost) == []
    (seen,) = survey(lost, "answers", "stays")
    assert seen == ray_cluster.Seen("a", ray_cluster.versions(), True)
    with tiny.complains("its node a cannot run sparsity_jax: 'no answer'"):
        survey(TimeoutError("no answer"), "stays")
    monkeypatch.setattr(ray_cluster, "_GONE_SECONDS", 0.0)
    with tiny.complains("its node a cannot run sparsity_jax: 'not schedulable'"):
        survey(lost, "stays")
    assert not list(tmp_path.iterdir())
