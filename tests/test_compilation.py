"""Compiled programs of command lines are kept from start to start, and cost nothing where they
cannot be; XLA reads its flags before it starts."""

import contextlib
import json
import os
import stat
import time

import jax
import pytest
import tiny

from sparsity_jax import building, compilation

CONFIG = """
import atexit
import json
import os

import jax
from sparsity_jax import data, optim, pipeline, report

report.write = lambda workdir, *_, **__: workdir  # no page
counts = dict(hits=0, misses=0)


def count(event, **_):
    name = event.rsplit("/", 1)[-1].removeprefix("cache_")
    if name in counts:
        counts[name] += 1


jax.monitoring.register_event_listener(count)


def tell():
    told = dict(counts, flags=os.environ.get("XLA_FLAGS", ""))
    with open(os.environ["COUNTS"], "w") as file:
        json.dump(told, file)


atexit.register(tell)


def get_config():
    sgd = optim.settings("sgd", learning_rate=0.1)
    return pipeline.base(
        data=dict(name="digits", train_limit=64, test_limit=50),
        model=dict(name="mlp", widths=(8,)),
        fit=pipeline.stage("train", epochs=1, batch_size=32, optimizer=sgd),
        pipeline=("fit",),
    )
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of the user's, not there yet, and no folder of JAX's own; the settings of JAX
    stay."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def started(config, workdir, counts, *flags):
    """What a command line printed, and how many programs it found and did not find."""
    environment = dict(os.environ, COUNTS=str(counts))
    arguments = ("--config", config, "--workdir", workdir, *flags)
    done = tiny.python("-m", "sparsity_jax.run", *arguments, env=environment)
    assert not done.returncode, done.stderr
    return done, json.loads(counts.read_text(encoding="utf-8"))


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def test_a_second_start_reads_programs_and_a_flag_turns_that_off(home, tmp_path):
    config = tmp_path / "tried.py"
    config.write_text(CONFIG, encoding="utf-8")
    counts = tmp_path / "counts.json"
    first, before = started(config, tmp_path / "first", counts)
    assert before["misses"] > 0
    for entry in home.rglob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:-9])  # of a process that was killed
        break
    second, after = started(config, tmp_path / "second", counts)
    assert after["hits"] > 0
    assert after["misses"] <= before["misses"] / 2  # of the entry that is cut off, however often
    assert "Warning" not in first.stderr + second.stderr
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert building.DETERMINISTIC not in after["flags"]
    flags = ("--nocompilation_cache", "--config.deterministic=True")
    _, off = started(config, tmp_path / "third", counts, *flags)
    assert off["hits"] == off["misses"] == 0
    assert building.DETERMINISTIC in off["flags"].split()  # nothing has started jax before


@pytest.mark.parametrize("flags", ["", building.DETERMINISTIC])
def test_determinism_is_refused_where_a_gpu_is_in_use_without(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    devices = jax.local_devices()  # jax has started
    building.use_deterministic(True)  # of a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    building.use_deterministic(False)
    refused = contextlib.nullcontext() if flags else tiny.refused("config.deterministic", True)
    with refused:
        building.use_deterministic(True)
    assert os.environ["XLA_FLAGS"] == flags
    assert jax.local_devices() == devices


def test_the_folder_is_the_users_alone(home):
    compilation.keep()
    place = compilation.folder()
    assert jax.config.jax_compilation_cache_dir == str(place)
    assert home in place.parents
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_folder_in_the_environment_comes_first(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    before = jax.config.jax_compilation_cache_dir
    compilation.keep()
    assert jax.config.jax_compilation_cache_dir == before
    assert not home.exists()


def test_a_folder_that_cannot_be_made_costs_a_line(home, capsys):
    home.write_text("a file in the way", encoding="utf-8")
    before = jax.config.jax_compilation_cache_dir
    compilation.keep()
    assert jax.config.jax_compilation_cache_dir == before
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_was_not_used_for_a_month_goes(home, monkeypatch):
    compilation.keep()
    place = compilation.folder()
    long_ago = time.time() - 31 * 24 * 3600
    ages = dict(old=(long_ago, long_ago), read=(time.time(), long_ago), gone=(long_ago, long_ago))
    ages["elsewhere"] = ages["old"]
    (place.parent / "another").mkdir()
    for name, times in ages.items():
        path = place.parent / "another" / name if name == "elsewhere" else place / name
        path.write_bytes(b"program")
        os.utime(path, times)
    unlink = type(place).unlink

    def removed_by_another(path, **options):
        if path.name == "gone":
            unlink(path)
        unlink(path, **options)

    monkeypatch.setattr(type(place), "unlink", removed_by_another)
    compilation.keep()
    assert [path.name for path in place.parent.rglob("*") if path.is_file()] == ["read"]


def test_importing_everything_sets_no_folder_and_is_quick(home):
    modules = "run, evaluate, pipeline, compilation, extend, export, report"
    code = f"""
import sys
import jax
from sparsity_jax import data, {modules}
data.check()
assert not {{"sklearn", "tensorflow", "tensorflow_datasets", "torch"}} & set(sys.modules)
assert not jax.config.jax_compilation_cache_dir
"""
    done = tiny.python("-c", code)
    assert not done.returncode, done.stderr
    assert not (home / "sparsity_jax").exists()
