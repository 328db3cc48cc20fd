"""Damaged files of a workdir and of an export: harmless, recovered, or refused by name, never
another number.
"""

import errno
import functools
import importlib
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from numpy.random import default_rng

import sparsity_jax
from sparsity_jax import (
    checkpoint,
    evaluate,
    intact,
    pipeline,
    report,
    train,
    versions,
    workdirs,
)

# orbax's readers of damaged states complain when they are collected, in whichever test that is
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = tiny.config(
    "fit", "curve", fit=pipeline.stage("train", epochs=1, batch_size=32, optimizer=tiny.SGD)
)


def flip(path: pathlib.Path, other: pathlib.Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def truncate(path, other, rng):
    path.write_bytes(path.read_bytes()[: int(rng.integers(max(path.stat().st_size, 1)))])


def delete(path, other, rng):
    path.unlink()


def empty(path, other, rng):
    path.write_bytes(b"")


def swap(path, other, rng):
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


FAULTS = (flip, truncate, delete, empty, swap)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def files_that_are_read(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Those of the newest checkpoint for all of them."""
    newest = workdirs.newest(workdir).folder
    others = ("checkpoints", "tensorboard")
    names = [path for path in files_of(workdir) if path.parts[0] not in others]
    return names + [newest.relative_to(workdir) / path for path in files_of(newest)]


def damaged(
    whole: pathlib.Path, target: pathlib.Path, name: pathlib.Path, fault, rng
) -> pathlib.Path:
    """A copy of the folder `whole` with a fault in its file `name`, or in it and another one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    others = [target / other for other in files_of(whole) if other != name]
    fault(target / name, others[int(rng.integers(len(others)))], rng)
    return target


def outcome_or_refusal(read, folder):
    """What `read(folder)` gives, or the sentence that refuses it."""
    try:
        return read(folder), ""
    except (ValueError, OSError) as error:
        return None, str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, its state, its rows) of a finished run, with the checkpoint before the last."""
    workdir = tmp_path_factory.mktemp("whole")
    outcome = pipeline.run(CONFIG, workdir)
    return workdir, outcome.state, tiny.timeless(tiny.read_back(outcome.rows))


@pytest.fixture
def built_once(whole, monkeypatch):
    """Data and network of the whole run for all readers; the evaluation's own `build`."""
    problem, build = pipeline.build(pipeline.check(CONFIG)), evaluate.build
    monkeypatch.setattr(pipeline, "build", lambda _: problem)
    monkeypatch.setattr(evaluate, "build", lambda *_, **__: problem)
    return build


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_of_a_workdir_never_gives_another_number(fault, whole, tmp_path, built_once):
    """What is read and evaluated; `experiments/robustness/faults.py` also runs each."""
    workdir, state, rows = whole
    rng = default_rng(0)
    names = files_that_are_read(workdir)
    assert len(names) > 12
    kept = {path.name: intact.read_sums(path) for path in (workdir / "checkpoints").iterdir()}
    for name in names:
        place = damaged(workdir, tmp_path / "damaged", name, fault, rng)
        snapshot, refusal = outcome_or_refusal(workdirs.newest, place)
        if snapshot:  # verified against checksums that are those of the whole one
            assert intact.read_sums(snapshot.folder) == kept[snapshot.folder.name]
        gathered, second = outcome_or_refusal(report.gather, place)
        if gathered:
            config, told, _ = gathered
            assert config == workdirs.read_config(workdir)
            assert tiny.timeless(told) == rows[: len(told)], name
        saved, third = outcome_or_refusal(evaluate.open_run, place)
        if saved:  # the curve leaves the network as it is
            tiny.same(saved.networks[0].state.params, state.params)
        for sentence in filter(None, (refusal, second, third)):
            assert any(str(other) in sentence for other in names), (name, sentence)


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "progress.json", "manifest.ocdbt", "SHA256SUMS"]
)
def test_a_run_goes_on_from_what_is_whole(name, whole, tmp_path, built_once):
    workdir, state, rows = whole
    place = shutil.copytree(workdir, tmp_path / "run")
    newest = workdirs.newest(place).folder
    flip(
        next(p for p in (place / name, newest / name, newest / "state" / name) if p.exists()),
        None,
        default_rng(1),
    )
    outcome = pipeline.run(CONFIG, place)
    tiny.same(outcome.state, state)
    assert tiny.timeless(tiny.read_back(outcome.rows)) == rows
    assert tiny.timeless(report.read_rows(place / "metrics.jsonl")) == rows


def test_evaluation_goes_on_where_a_run_removes_what_it_reads(
    whole, tmp_path, built_once, monkeypatch
):
    place = shutil.copytree(whole[0], tmp_path / "run")
    restore, calls = evaluate.restore, []

    def beside_a_run(snapshot, *others):
        if not calls:  # the run saves once more, and removes the checkpoint that is being read
            later = str(int(snapshot.folder.name) + 1)
            shutil.copytree(snapshot.folder, snapshot.folder.with_name(later))
            shutil.rmtree(snapshot.folder)
        calls.append(snapshot.folder.name)
        return restore(snapshot, *others)

    monkeypatch.setattr(evaluate, "restore", beside_a_run)
    saved = evaluate.open_run(place)
    tiny.same(saved.networks[0].state.params, whole[1].params)
    assert len(set(calls)) == 2


def test_without_a_whole_checkpoint_the_run_says_so_and_an_empty_one_is_passed_over(
    whole, tmp_path, capsys
):
    place = shutil.copytree(whole[0], tmp_path / "run")
    newest = workdirs.newest(place).folder
    (newest.parent / "99").mkdir()
    assert workdirs.newest(place).folder == newest
    assert "99" in capsys.readouterr().err
    tiny.same(pipeline.run(CONFIG, place).state, whole[1])
    for folder in newest.parent.glob("[0-9]*"):
        for path in folder.glob("progress.json"):
            path.write_bytes(path.read_bytes().replace(b"1", b"7", 1))
    with pytest.raises(
        intact.DamagedError, match=r"no checkpoint in .* is whole: .*progress\.json"
    ):
        pipeline.run(CONFIG, place)
    with pytest.raises(intact.DamagedError, match="is whole"):
        evaluate.run(place)


def test_evaluation_uses_the_checkpoint_before_and_the_copy_of_the_config(whole, tmp_path, capsys):
    numbers = [int(path.name) for path in (whole[0] / "checkpoints").iterdir()]
    assert len(numbers) > 1
    assert int(workdirs.newest(whole[0]).folder.name) == max(numbers)
    expected = evaluate.run(whole[0])
    place = shutil.copytree(whole[0], tmp_path / "run")
    config = place / "config.json"
    config.write_bytes(
        config.read_bytes().replace(b'"normalization": "auto"', b'"normalization": "none"')
    )
    config.write_bytes(config.read_bytes().replace(b'"test_limit": 50', b'"test_limit": 40'))
    assert evaluate.run(place) == expected
    assert "config.json is not as it was written" in capsys.readouterr().err
    newest = workdirs.newest(place)
    (newest.folder / "state" / "manifest.ocdbt").unlink()
    (row,) = evaluate.run(place)
    assert (
        row["test_accuracy"] == expected[0]["test_accuracy"]
    )  # the curve leaves the network as it is
    assert row["progress"] != expected[0]["progress"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    problem = tiny.problem(widths=(4,))
    state, _ = tiny.start(problem, tiny.fit())
    place = tmp_path_factory.mktemp("exported") / "network"
    return evaluate.export(problem, dict(name="mlp", widths=(4,)), state, place)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_of_an_exported_folder_is_refused(fault, exported, tmp_path):
    variables, _ = evaluate.load(exported)
    rng = default_rng(0)
    refused = 0
    for name in files_of(exported) * 8:
        place = damaged(exported, tmp_path / "damaged", name, fault, rng)
        loaded, refusal = outcome_or_refusal(evaluate.load, place)
        if loaded is None:
            refused += 1
            assert any(str(other) in refusal for other in files_of(exported)), refusal
        else:
            tiny.same(loaded[0], variables)
    assert refused > 12


def test_environment_and_rows_say_when_they_were_changed(whole, tmp_path, capsys):
    place = shutil.copytree(whole[0], tmp_path / "run")
    (place / "environment.json").write_text("{}", encoding="utf-8")
    assert report.read_environment(place) is None
    assert "environment.json is not as it was written" in capsys.readouterr().err
    rows = place / "metrics.jsonl"
    lines = rows.read_bytes().split(b"\n")
    rows.write_bytes(b"\n".join([lines[0], *lines[2:]]))  # a whole line is gone
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not as it was written"):
        report.read_rows(rows)
    assert tiny.timeless(report.gather(place)[1]) == whole[2]
    shutil.rmtree(place / "checkpoints")
    with pytest.raises(ValueError, match="line 2"):
        report.gather(place)


def of_version(version: str | None, whole: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run in `whole` which says that it was made with `version`."""
    shutil.copytree(whole, place)
    told = report.read_environment(place)
    assert told.pop("sparsity_jax") == sparsity_jax.__version__
    report.write_environment(place, told if version is None else told | {"sparsity_jax": version})
    return place


def test_runs_of_the_first_version_are_read(whole, tmp_path):
    """Its config had `arms`, `arm` and `sweep_mode` beside the sweep, and no version."""
    place = of_version(None, whole[0], tmp_path / "run")
    assert versions.version_of(place) == "0.1.0"
    arms = {"a": dict(label="A", fit=dict(augment="none"))}
    older = pipeline.plain(CONFIG) | dict(arms=arms, arm="a", sweep_mode="loop")
    (place / "config.json").write_text(json.dumps(older, indent=2) + "\n")
    intact.record(place / "config.json")
    (network,) = evaluate.open_run(place).networks
    assert network.swept == dict(arm="A")
    config, rows, _ = report.gather(place)
    assert config["sweep"] == dict(arm=["a"], arms=arms, mode="loop")
    assert {row["stage"] for row in rows} == {"fit", "curve"}


def test_a_run_of_a_later_version_says_which_reads_it(whole, tmp_path):
    place = of_version("0.1.0, then 0.12.3", whole[0], tmp_path / "run")
    for read in (evaluate.open_run, report.gather):
        with tiny.refused(str(place)) as raised:
            read(place)
        assert "0.12.3" in raised.value.why


def test_an_unfinished_run_goes_on_with_its_own_version(whole, tmp_path):
    place = of_version(None, whole[0], tmp_path / "run")
    pipeline.run(CONFIG, place)  # a finished one only draws its report again
    shutil.rmtree(place / "checkpoints")
    with tiny.refused("--workdir", str(place), allowed="that version"):
        pipeline.run(CONFIG, place)


def test_a_file_that_came_into_a_sealed_folder_is_damage(tmp_path):
    (tmp_path / "known").write_text("1", encoding="utf-8")
    intact.seal(tmp_path)
    assert intact.damage(tmp_path) == ""
    (tmp_path / "stranger").write_text("2", encoding="utf-8")
    assert "stranger has no checksum" in intact.damage(tmp_path)


# Hostile folders, whose checksums are right -------------------------------------------------------


class Payload:
    """Imports a module when it is unpickled."""

    def __reduce__(self):
        return importlib.import_module, ("hostile_module",)


def with_class(value):
    """JSON data whose first text names a class, and the rest too where it is a list."""
    if isinstance(value, dict):
        return {name: with_class(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [with_class(entry) for entry in value]
    return "hostile_module.Feature" if isinstance(value, str) else value


def write_sealed(place: pathlib.Path, name: pathlib.Path, content: bytes) -> None:
    """`content` in a file of the workdir `place`, in all its checkpoints, with checksums that
    fit.
    """
    if name.parts[0] != "checkpoints":
        (place / name).write_bytes(content)
        intact.record(place / name)
        return
    for folder in (place / "checkpoints").iterdir():
        path = folder.joinpath(*name.parts[2:])
        if path.is_file():
            path.write_bytes(content)
        intact.seal(folder)


@pytest.mark.parametrize("content", ["pickle", "names of classes", "other data"])
def test_nothing_in_a_run_folder_is_imported_or_unpickled(
    content, whole, tmp_path, built_once, monkeypatch
):
    (tmp_path / "hostile_module.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [name for name in files_that_are_read(whole[0]) if name.name != intact.SUMS]
    refused = []
    for name in names:
        original = (whole[0] / name).read_bytes()
        if content == "names of classes":
            try:
                made = json.dumps(with_class(json.loads(original))).encode()
            except ValueError:
                continue
        else:
            made = pickle.dumps(Payload()) if content == "pickle" else b"[3]"
        place = tmp_path / "run"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole[0], place)
        write_sealed(place, name, made)
        for read in (evaluate.open_run, report.gather):
            _, sentence = outcome_or_refusal(read, place)
            if sentence:
                refused.append(name.name)
                assert str(place) in sentence or "config." in sentence, (name, sentence)
    assert content == "names of classes" or "progress.json" in refused
    assert "_METADATA" in refused
    assert not (tmp_path / "ran").exists()
    assert "hostile_module" not in sys.modules


def test_a_network_of_absurd_size_in_a_run_folder_is_refused(
    whole, tmp_path, built_once, monkeypatch
):
    monkeypatch.setattr(evaluate, "build", built_once)
    place = shutil.copytree(whole[0], tmp_path / "run")
    config = workdirs.read_config(place)
    absurd = ([10**20], [2**31 - 1] * 3, [2 * 10**9, 2])
    models = [dict(name="mlp", widths=widths) for widths in absurd]
    for model in (*models, dict(name="mlp", width=3), dict(name="os.system")):
        write_sealed(
            place, pathlib.Path("config.json"), json.dumps({**config, "model": model}).encode()
        )
        with tiny.complains(r"config\.model|of another network"):
            evaluate.open_run(place)


# Memory and disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")]
)
def test_memory_that_is_full_names_the_stage_and_leaves_the_checkpoints(
    error, whole, tmp_path, built_once
):
    loop = train.fit_epochs

    def fails(*args):
        yield next(loop(*args))
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit_epochs", fails)
        with tiny.complains(r"config\.fit: the memory is full.* config\.fit\.batch_size"):
            pipeline.run(CONFIG, tmp_path)
    assert workdirs.newest(tmp_path) is not None
    tiny.same(pipeline.run(CONFIG, tmp_path).state, whole[1])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and how to give it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = lambda options: ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    run = functools.partial(subprocess.run, capture_output=True, timeout=60)
    tried = run(mount("size=60k"), check=False)
    if tried.returncode:
        pytest.skip("mounting a small file system needs rights that this process has not")
    yield folder, lambda size: run(mount(f"remount,size={size}"), check=True)
    run(["umount", "-l", str(folder)], check=True)


def test_a_write_that_fails_without_a_name_is_told_with_the_folder(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, workdirs.naming(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path)
    for other in (OSError(errno.ENOSPC, "full", "a file"), OSError(errno.EACCES, "refused")):
        with pytest.raises(OSError, match=r"full|refused") as caught, workdirs.naming(tmp_path):
            raise other
        assert caught.value is other


RUN = """
import json, sys
from sparsity_jax import pipeline
pipeline.run(json.loads(sys.argv[1]), sys.argv[2])
"""


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(small_disk, whole, built_once):
    """In a process of its own: writers that failed complain whenever they are collected."""
    folder, resize = small_disk
    run = [sys.executable, "-c", RUN, json.dumps(CONFIG), str(folder / "run")]
    full = subprocess.run(run, capture_output=True, text=True, check=False, timeout=200)
    told = [line for line in full.stderr.splitlines() if line.startswith("OSError: ")]
    assert full.returncode != 0
    assert "No space left" in told[-1]
    assert str(folder) in told[-1]
    resize("20m")
    tiny.same(pipeline.run(CONFIG, folder / "run").state, whole[1])


# Paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a[1]", "a]", "back\\slash", "gs:"])
def test_paths_that_cannot_be_read_back_are_refused_before_anything_is_made(name, tmp_path):
    with tiny.complains(r"workdir.*allowed: paths without"):
        pipeline.run(CONFIG, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["st*r", "q?", "{x}", "p%20", "é b", "a'b\"c", "$HOME", "~", "#x"])
def test_other_paths_hold_checkpoints(name, tmp_path):
    state = {"w": np.arange(6.0).reshape(2, 3)}
    saved = checkpoint.Checkpoints(tmp_path / name, {})
    saved.save(state, workdirs.Progress(0, True, []))
    saved.close()
    workdirs.check_path(tmp_path / name)
    tiny.same(
        checkpoint.restore(workdirs.newest(tmp_path / name), state), jax.tree.map(np.asarray, state)
    )


def test_the_first_checkpoint_is_read_back(tmp_path, monkeypatch):
    restore = checkpoint.restore
    monkeypatch.setattr(
        checkpoint, "restore", lambda *args: jax.tree.map(lambda leaf: leaf + 1, restore(*args))
    )
    saved = checkpoint.Checkpoints(tmp_path, {})
    with pytest.raises(OSError, match="does not read as it was written"):
        saved.save({"w": np.ones(3)}, workdirs.Progress(0, True, []))
    saved.close()
