"""The command line as a user meets it: whole runs in processes of their own, kills, and messages
for mistakes.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import tiny
from absl.testing import flagsaver

from sparsity_jax import members, pipeline, report, run, workdirs

ROOT = tiny.ROOT
QUICK = (  # the quick start, made shorter; three seeds at once
    "--config.data.train_limit=128",
    "--config.data.test_limit=60",
    "--config.model.widths=(16,)",
    "--config.fit_sfw.epochs=3",
    "--config.fit_sgd.epochs=1",
    "--config.fit_sfw.evaluate_every=1",
    "--config.curve.ratios=(0.0,0.5,0.9)",
    "--config.steps_per_call=1",
    "--config.deterministic=True",  # which a CPU is anyway, and a GPU only then
)

LANCZOS = """
quick_start = get_config


def get_config():
    config = quick_start()
    config.hessian = pipeline.stage("spectrum", num_matvecs=10)
    config.pipeline = ("fit_sfw", "curve", "weights", "hessian", "fit_sgd", "curve", "weights")
    return config
"""


def command_of(workdir, arguments, config):
    where = [] if workdir is None else ["--workdir", str(workdir)]
    of = [] if config is None else ["--config", str(config)]
    return [sys.executable, "-m", "sparsity_jax.run", *of, *where, *arguments]


def start(workdir, *arguments, config="configs/quickstart.py"):
    # the same programs again and again, and short ones, on one device
    quick = dict(XLA_FLAGS=tiny.flags(), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    return subprocess.Popen(
        command_of(workdir, arguments, config),
        cwd=ROOT,
        env=os.environ | quick,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process) -> str:
    """What a successful process printed."""
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


def wait_for(process, condition):
    """Returns once condition() holds; the process must still run."""
    for _ in range(2400):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pytest.fail("what was waited for did not come")


def wait_for_rows(process, path, count):
    """Returns once the metrics file has so many lines."""
    wait_for(process, lambda: path.exists() and path.read_bytes().count(b"\n") >= count)


def at_stage(workdir, position):
    """Whether the newest checkpoint lies within this stage."""
    saved = workdirs.newest(workdir)
    return saved is not None and (saved.progress.stage, saved.progress.begun) == (position, True)


def metrics(workdir):
    return tiny.timeless(report.read_rows(workdir / "metrics.jsonl"))


@pytest.fixture(scope="module")
def with_lanczos(tmp_path_factory):
    """A config file: the quick start with a spectrum in the middle."""
    path = tmp_path_factory.mktemp("configs") / "quickstart.py"
    path.write_text((ROOT / "configs" / "quickstart.py").read_text() + LANCZOS)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, with_lanczos):
    """(workdir, printed) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, finish(start(workdir, *QUICK, config=with_lanczos))


def test_the_quick_start_ends_with_a_report(whole):
    workdir, printed = whole
    assert f"report: {workdir / 'report.html'}" in printed
    # whole lines where there is no terminal
    assert "\r" not in printed
    assert printed.count("\n1/7 fit_sfw: ") + printed.startswith("1/7 fit_sfw: ") == 3 + 1
    assert "images/s\n1/7 fit_sfw: done in" in printed
    assert "largest within 1 point %" in printed  # the summary of the page
    assert "Traceback" not in printed
    assert "Warning" not in printed
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "Train once, prune to any sparsity" in page
    assert "over up to 3 networks" in page
    assert list((workdir / "figures").glob("*.png"))
    rows = report.read_rows(workdir / "metrics.jsonl")
    assert [row["seed"] for row in rows[:3]] == [0, 1, 2]
    assert {row["stage"] for row in rows} == {"fit_sfw", "fit_sgd", "curve", "weights", "hessian"}
    assert len([row for row in rows if row["stage"] == "curve"]) == 2 * 3 * 3
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    assert config["fit_sfw"]["epochs"] == 3
    environment = report.read_environment(workdir)
    assert environment["seed"] == [0, 1, 2]
    assert environment["command"].startswith("python -m sparsity_jax.run --config ")
    assert environment["date"] in page
    assert {"commit", "dirty", "config_commit", "config_dirty", "cpu", "cores"} <= {*environment}
    assert list((workdir / "tensorboard").glob("events*"))


def test_a_killed_run_continues_to_the_same_rows(whole, with_lanczos, tmp_path):
    """Asked to end while it trains, and killed in the middle of Lanczos."""
    expected = metrics(whole[0])
    often = "--config.checkpoint_seconds=0.0"
    begin = lambda: start(tmp_path, *QUICK, often, config=with_lanczos)
    asked = begin()
    wait_for_rows(asked, tmp_path / "metrics.jsonl", 3)
    asked.send_signal(signal.SIGTERM)
    printed, _ = asked.communicate(timeout=60)
    assert asked.returncode == 130, printed
    assert f"interrupted: the same command continues {tmp_path}" in printed
    killed = begin()
    wait_for(killed, lambda: at_stage(tmp_path, 3))
    killed.kill()
    printed, _ = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, printed
    assert f"continuing {tmp_path} in stage 1 of 7" in printed
    assert not any(row["stage"] == "fit_sgd" for row in metrics(tmp_path))
    assert f"continuing {tmp_path} in stage 4 of 7" in finish(begin())
    assert metrics(tmp_path) == expected


def test_a_signal_before_anything_runs_is_heard_once_all_is_imported(tmp_path):
    """An exception inside the import of a library can crash it."""
    send = (
        "import os\nimport signal\n\nif not os.environ.get('SENT'):\n    os.environ['SENT'] = "
        "'yes'\n"
    )
    send += "    os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "config.py").write_text(send + (ROOT / "configs" / "quickstart.py").read_text())
    run = start(tmp_path / "run", *QUICK, config=tmp_path / "config.py")
    printed, _ = run.communicate(timeout=120)
    assert (run.returncode, printed) == (
        130,
        f"interrupted: the same command continues {tmp_path / 'run'}\n",
    )
    assert not (tmp_path / "run").exists()


def test_objects_of_tracing_are_looked_at_a_few_times_only():
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    try:
        run.collect_rarely()
        assert gc.get_threshold()[0] > 100_000
    finally:
        gc.set_threshold(*before)


def test_a_full_disk_is_two_lines(tmp_path):
    """However deep in threads and libraries it was noticed."""
    program = """
import runpy
from sparsity_jax import pipeline
def full(*_, **__):
    raise OSError(28, "No space left on device")
pipeline.run = full
runpy.run_module("sparsity_jax.run", run_name="__main__", alter_sys=True)
"""
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    ended = tiny.python("-c", program, "--config=configs/quickstart.py", f"--workdir={tmp_path}")
    assert ended.returncode == 1
    told, again = ended.stderr.splitlines()
    assert told == f"error: {tmp_path}: [Errno 28] No space left on device"
    assert "goes on from the last checkpoint" in again


@pytest.fixture
def command(monkeypatch):
    """The command line in this process: what it gives, with the arguments as a process has them."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def call(workdir, *arguments, config="configs/quickstart.py"):
        place = ROOT / config if config and "/" in config else config
        monkeypatch.setattr(sys, "argv", command_of(workdir, arguments, place)[2:])
        with flagsaver.flagsaver(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # how config files are loaded
            run.main(run.parse(sys.argv))

    return call


def test_describe_prints_what_can_be_set_and_runs_nothing(command, capsys):
    command(None, "--describe", "--config.fit_sfw.epochs=7")
    printed = capsys.readouterr().out
    assert "config.fit_sfw, kind 'train'\n    Trains the network." in printed
    assert "\n  epochs: int >= 1 and <= 2147483647; no default, here 7\n" in printed


@pytest.mark.parametrize(("kind", "heads"), [("", ["configs", "variants"]), ("data", ["data"])])
def test_list_prints_names_and_runs_nothing(kind, heads, monkeypatch, capsys):
    """In the place of a config and a workdir."""
    monkeypatch.setattr(sys, "argv", ["run", "--list", *([kind] if kind else [])])
    with flagsaver.flagsaver():
        run.main(run.parse(sys.argv))
    printed = capsys.readouterr().out
    assert printed.startswith(heads[0])
    assert set(heads) <= set(printed.splitlines())


def test_a_config_of_the_library_goes_by_name_in_any_folder(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command(None, "--describe", config="toy_cnn:mlp")
    assert "'mlp'" in capsys.readouterr().out
    (tmp_path / "toy_cnn").write_text((ROOT / "configs" / "quickstart.py").read_text())
    command(None, "--describe", config="toy_cnn")  # a file goes first
    assert "fit_sfw" in capsys.readouterr().out


def test_any_field_of_any_config_is_swept_on_the_command_line(monkeypatch):
    monkeypatch.setattr(run, "SWEPT", {})
    typed = (
        "run --config.seed=3 --config.sweep.fit.optimizer.learning_rate=(0.1,0.2) "
        "--config.sweep.seed (0,1) --config.sweep.mode=loop --config.sweep.arms.a.fit.epochs=5"
    )
    assert run.without_sweep(typed.split()) == ["run", "--config.seed=3"]
    config = run.swept(pipeline.base(**tiny.config("fit")).to_dict(), run.SWEPT)
    found = members.expand(pipeline.plain(config))
    assert members.mode_of(config) == "loop"
    rates = [member.config["fit"]["optimizer"]["learning_rate"] for member in found]
    assert rates == [0.1, 0.1, 0.2, 0.2]
    assert [member.swept["seed"] for member in found] == [0, 1, 0, 1]
    assert {member.config["fit"]["epochs"] for member in found} == {5}


MLP = dict(config="configs/toy_cnn.py:mlp")
MISTAKES = {  # workdir, arguments, words of the message
    "unknown field": ("a", ["--config.fit_sfw.epocs=3"], {}, ["epocs", "epochs"]),
    "wrong type": ("a", ["--config.fit_sfw.epochs=many"], {}, ["epochs", "many"]),
    "missing file": (
        "a",
        [],
        dict(config="configs/quikstart.py"),
        ["configs/quikstart.py', which is neither a file nor", "configs/quickstart.py'?"],
    ),
    "file without its ending": (
        "a",
        [],
        dict(config="configs/quickstart"),
        ["configs/quickstart', which is neither", "configs/quickstart.py'?"],
    ),
    "missing config": ("a", [], dict(config=None), ["--config is missing", "quickstart, sfw"]),
    "unknown name": (
        "a",
        [],
        dict(config="quikstart"),
        ["'quikstart'", "greg, quickstart", "Did you mean 'quickstart'?"],
    ),
    "wrong variant of a name": ("a", [], dict(config="toy_cnn:mpl"), ["Did you mean 'mlp'?"]),
    "missing workdir": (None, [], {}, ["--workdir is missing"]),
    "empty workdir": ("", [], {}, ["--workdir is empty"]),
    "workdir that is a file": (
        ROOT / "README.md",
        [],
        {},
        ["README.md is a file; use another --workdir"],
    ),
    "forgotten dashes": ("a", ["config.seed=1"], {}, ["'config.seed=1' is no flag"]),
    "resources without a launcher": ("a", ["--resources=gpu=1"], {}, ["--launcher=ray"]),
    "a member on workers": ("a", ["--launcher=ray", "--member=0"], {}, ["--member", "one of them"]),
    "one run on workers": (
        "a",
        ["--launcher=ray", "--distributed=auto"],
        {},
        ["--distributed", "one of them"],
    ),
    "out of range": (
        "a",
        ["--config.fit_sfw.epochs=0"],
        {},
        ["config.fit_sfw.epochs is 0", ">= 1"],
    ),
    "wrong variant": (
        "a",
        [],
        dict(config="configs/toy_cnn.py:mpl"),
        ["'mpl'", "Did you mean 'mlp'?"],
    ),
    "a variant's field": ("a", ["--config.retrain.epochs=0"], MLP, ["config.retrain.epochs is 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_on_the_command_line_are_one_clear_message(mistake, command, tmp_path):
    workdir, arguments, options, words = MISTAKES[mistake]
    place = workdir if workdir in (None, "") else tmp_path / workdir
    with pytest.raises(SystemExit) as ended:
        command(place, *arguments, **options)
    assert ended.value.code.startswith("error: ")
    assert all(word in ended.value.code for word in words)
    assert len(ended.value.code.splitlines()) < 10
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    """Made in a sweep on the command line: the flags of configs read that by themselves."""
    workdir, config = tmp_path / "run", "configs/geometric_limit.py:digits"
    process = start(workdir, "--config.sweep.fit.epochs=3", config=config)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "config.sweep.fit.epochs" in printed
    assert "Traceback" not in printed
    assert not workdir.exists()
