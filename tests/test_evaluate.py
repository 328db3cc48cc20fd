"""Evaluation and export of saved runs: numbers against independent ones, networks without the
library, mistakes.
"""

import json
import pathlib
import re
import shutil

import cv2
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax import export as stablehlo
from numpy.testing import assert_allclose

from sparsity_jax import (
    compaction,
    cost,
    data,
    evaluate,
    groups,
    intact,
    masks,
    models,
    optim,
    pipeline,
    structured,
    train,
    workdirs,
)

MOMENTUM = optim.settings("sgd", learning_rate=0.1, momentum=0.9)
TINY_MOBILENET = dict(name="mobilenet", stem_width=4, blocks=((8, 1), (8, 2)))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """(workdir, final state) of a network that lost half its channels."""
    workdir = tmp_path_factory.mktemp("runs") / "cut"
    fit = pipeline.stage("train", epochs=2, batch_size=32, optimizer=MOMENTUM)
    config = tiny.config("fit", "cut", fit=fit, cut=pipeline.stage("cut", ratio=0.5))
    return workdir, pipeline.run(config, workdir).state


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """(workdir, final state of the last) of two separate members with half their weights masked."""
    workdir = tmp_path_factory.mktemp("runs") / "masked"
    config = tiny.config("fit", "cut", sweep=dict(seed=(0, 1), mode="loop"))
    return workdir, pipeline.run(config, workdir).state


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(workdir, final states) of two unpruned members trained at once."""
    workdir = tmp_path_factory.mktemp("runs") / "dense"
    config = tiny.config(
        "fit",
        sweep=dict(seed=(0, 1)),
        fit=pipeline.stage("train", epochs=1, batch_size=32, optimizer=MOMENTUM),
    )
    return workdir, pipeline.run(config, workdir).state


def fresh(model: dict, cut_half: bool = True) -> tuple[train.Problem, train.State]:
    """An untrained network on few digits, half of each group's channels cut."""
    problem = train.build_problem(tiny.digits(), models.build(num_classes=10, **model))
    state = train.initial_state(problem, train.key_of(0))
    if cut_half:
        channels = structured.channels_of(problem)
        keep = {name: np.arange(size) % 2 == 0 for name, size in channels.sizes.items()}

        @jax.jit
        def removed(state):
            kept = groups.mask(
                dict(params=state.masks, batch_stats=state.batch_stats), channels, keep
            )
            return masks.apply(state.params, kept["params"]), kept

        params, kept = removed(state)
        state = state._replace(params=params, masks=kept["params"], batch_stats=kept["batch_stats"])
    return problem, state


def by_hand(params, split: data.Split, dataset: data.Dataset) -> tuple[np.ndarray, float, float]:
    """(logits, accuracy, loss) of the two-layer network in NumPy."""
    images = (split.images / 255.0 - dataset.mean) / dataset.std
    hidden = (
        images.reshape(len(images), -1) @ np.asarray(params["dense1"]["kernel"])
        + params["dense1"]["bias"]
    )
    logits = np.maximum(hidden, 0) @ np.asarray(params["fc"]["kernel"]) + params["fc"]["bias"]
    chosen = logits[np.arange(len(logits)), split.labels]
    loss = np.log(np.exp(logits).sum(1)) - chosen
    return logits, float((logits.argmax(1) == split.labels).mean()), float(loss.mean())


def normalised(dataset: data.Dataset, count: int) -> np.ndarray:
    images = (dataset.test.images[:count] / 255.0 - dataset.mean) / dataset.std
    return images.astype(np.float32)


# numbers ------------------------------------------------------------------------------------------


def test_numbers_of_a_network_with_channels_cut(cut):
    workdir, state = cut
    (row,) = evaluate.run(workdir, on_train=True, latency=True, batch_size=8, repeats=3)
    dataset = tiny.digits()
    for split in ("test", "train"):
        _, accuracy, loss = by_hand(state.params, getattr(dataset, split), dataset)
        assert row[f"{split}_accuracy"] == pytest.approx(accuracy)
        assert row[f"{split}_loss"] == pytest.approx(loss, rel=1e-4)
    assert row["test_accuracy_compact"] == row["test_accuracy"]
    size = lambda width: 65 * width + 10 * (width + 1)
    assert (row["parameters"], row["parameters_compact"]) == (size(16), size(8))
    assert row["parameters_kept"] == size(8)
    assert row["parameters_nonzero"] == sum(
        np.count_nonzero(leaf) for leaf in jax.tree.leaves(state.params)
    )
    assert (row["flops"], row["flops_compact"]) == (2 * 74 * 16, 2 * 74 * 8)
    assert (row["bytes"], row["bytes_compact"]) == (4 * size(16), 4 * size(8))
    assert row["compression"] == pytest.approx(size(16) / size(8))
    assert row["difference"] < 1e-5
    assert (row["pruned"], row["note"], row["progress"]) == ("channels", "", "finished")
    assert row["batch_size"] == 8
    assert set(row["milliseconds"]) == {"dense", "compact"}
    low, high = row["milliseconds_low"], row["milliseconds_high"]
    assert row["speedup_low"] == pytest.approx(low["dense"] / high["compact"])
    assert low["dense"] <= row["milliseconds"]["dense"] <= high["dense"]
    assert row["verdict"] in ("faster", "slower", "no measurable difference")
    text = evaluate.describe(row)
    assert (
        f"times the speed of dense ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})" in text
    )
    assert re.search(f"compression +{row['compression']:.2f}", text)


def test_single_weights_are_no_compression(masked):
    workdir, state = masked
    found = evaluate.run(workdir)
    assert [row["swept"] for row in found] == [{"seed": 0}, {"seed": 1}]
    dataset = tiny.digits()
    _, accuracy, loss = by_hand(state.params, dataset.test, dataset)
    assert found[1]["test_accuracy"] == pytest.approx(accuracy)
    assert found[1]["test_loss"] == pytest.approx(loss, rel=1e-4)
    for row in found:
        assert row["pruned"] == "weights"
        kernels = 64 * 16 + 16 * 10
        assert row["parameters_kept"] == row["parameters"] - kernels // 2
        assert "compression" not in row
    text = evaluate.describe_all(found)
    assert "so bytes and FLOPs stay" in text
    assert "compact" not in text
    apart = [row | {"test_accuracy": share} for row, share in zip(found, (0.5, 0.6))]
    told = evaluate.describe_all(apart)
    assert "test accuracy of 2 seeds: 55.00%, standard deviation 7.07%" in told
    assert "test accuracy of 2 seeds" in text
    (alone,) = evaluate.run(workdir / "member_001")
    assert alone == found[1]


def test_members_trained_at_once_and_networks_under_way(dense, tmp_path):
    workdir, states = dense
    rows = evaluate.run(workdir, latency=True, batch_size=4, repeats=2)
    dataset = tiny.digits()
    for i, row in enumerate(rows):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], states.params)
        _, accuracy, loss = by_hand(params, dataset.test, dataset)
        assert (row["member"], row["swept"], row["pruned"]) == (i, {"seed": i}, "nothing")
        assert row["test_accuracy"] == pytest.approx(accuracy)
        assert row["test_loss"] == pytest.approx(loss, rel=1e-4)
        assert list(row["milliseconds"]) == ["dense"]
    assert rows[0]["test_loss"] != rows[1]["test_loss"]
    assert "nothing is pruned" in evaluate.describe(rows[0])
    under_way = tmp_path / "under_way"
    shutil.copytree(workdir, under_way)
    newest = max((under_way / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(
        newest
    )  # what is left was saved at the start of training, with the optimizer's state
    assert [row["progress"] for row in evaluate.run(under_way)] == ["in stage 1 of 1 (fit)"] * 2


def test_the_network_is_that_of_the_last_training():
    first, second = dict(kind="train", label="SFW"), dict(kind="train", label="SGD")
    config = dict(
        pipeline=["one", "curve", "two", "curve"], one=first, two=second, curve=dict(kind="curve")
    )
    names = [
        evaluate.label_of(config, workdirs.Progress(stage, begun, []))
        for stage in range(4)
        for begun in (0, 1)
    ]
    assert names == ["SFW", "SFW", "SFW", "SFW", "SFW", "SGD", "SGD", "SGD"]
    assert evaluate.label_of(config, workdirs.Progress(4, False, [])) == "SGD"


def test_members_without_a_checkpoint_are_named(masked, tmp_path, capsys):
    workdir = tmp_path / "half"
    shutil.copytree(masked[0], workdir)
    shutil.rmtree(workdir / "member_001" / "checkpoints")
    evaluate.main(["--workdir", str(workdir)])
    assert "member 1 has no checkpoint yet" in capsys.readouterr().out


def test_data_elsewhere(cut, tmp_path, monkeypatch, capsys):
    dataset = tiny.digits()
    for split in ("train", "test"):
        images, labels = getattr(dataset, split)
        for i, (image, label) in enumerate(zip(images, labels)):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(folder / f"{i:03d}.png"), image)
    there, here = evaluate.run(cut[0], data_name=f"folder:{tmp_path}"), evaluate.run(cut[0])
    assert there[0]["test_accuracy"] == here[0]["test_accuracy"]
    assert there[0]["test_loss"] == pytest.approx(here[0]["test_loss"], rel=1e-5)
    other = evaluate.run(cut[0], data_name=f"folder:{tmp_path}", statistics="data")
    assert other[0]["test_loss"] == pytest.approx(
        here[0]["test_loss"], rel=1e-5
    )  # the same train images
    evaluate.main(
        ["--workdir", str(cut[0]), "--data", f"folder:{tmp_path}", "--statistics", "data"]
    )
    assert f"mean and std of the images are those of folder:{tmp_path}" in capsys.readouterr().out
    mixed = dict.fromkeys(map(str, range(10)), images[:1] // 4)
    for label, (
        image,
    ) in mixed.items():  # other train images: mean and std are still those of the run
        shutil.rmtree(tmp_path / "train" / label)
        (tmp_path / "train" / label).mkdir()
        cv2.imwrite(str(tmp_path / "train" / label / "0.png"), image)
    there = evaluate.run(cut[0], data_name=f"folder:{tmp_path}")
    assert there[0]["test_loss"] == pytest.approx(here[0]["test_loss"], rel=1e-5)
    other = evaluate.run(cut[0], data_name=f"folder:{tmp_path}", statistics="data")
    assert other[0]["test_loss"] > 1.1 * here[0]["test_loss"]
    for label in range(3, 10):
        for split in ("train", "test"):
            shutil.rmtree(tmp_path / split / str(label))
    with tiny.complains(r"fc/bias is \(10,\) there.* --data needs the run's classes"):
        evaluate.run(cut[0], data_name=f"folder:{tmp_path}")
    asked = []
    monkeypatch.setattr(evaluate.data, "load", asked_of(data.load, dataset, asked))
    evaluate.open_run(cut[0], data_dir="elsewhere")
    evaluate.open_run(cut[0], data_name="mnist")
    places = [(one["data_dir"], one["name"]) for one in asked]
    assert places == [
        ("elsewhere", "digits"),
        ("", "mnist"),
        ("", "digits"),
    ]  # the last for mean and std
    assert [one["train_limit"] for one in asked] == [128, 0, 128]


def test_statistics_of_a_run_whose_images_are_gone(cut, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(cut[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"] |= dict(name=f"folder:{tmp_path / 'gone'}", train_limit=0, test_limit=0)
    (workdir / "config.json").write_text(json.dumps(config))
    intact.record(workdir / "config.json")
    with tiny.complains(r"mean and std belong to the trained network.*--statistics data"):
        evaluate.open_run(workdir, data_name="digits")
    assert evaluate.open_run(workdir, data_name="digits", statistics="data").networks


def asked_of(function, result, asked: list):
    """`function`, but it only notes its options and returns `result`."""

    def noted(**options):
        asked.append(options)
        return result

    noted.__wrapped__ = function  # keeps the signature
    return noted


# export -------------------------------------------------------------------------------------------


def test_the_command_line_exports_a_network_that_runs_without_the_library(cut, tmp_path):
    workdir, state = cut
    folder, numbers = tmp_path / "network", tmp_path / "numbers.json"
    command = ["-W", "error", "-m", "sparsity_jax.evaluate", "--workdir", workdir, "--train"]
    command += ["--latency", "--batch_size", 8, "--repeats", 2]
    command += ["--json", numbers, "--export", folder]
    done = tiny.python(*command)
    assert "mlp on digits, fit, member 0: finished" in done.stdout
    assert f"exported compact network: {folder}" in done.stdout
    assert done.stderr == ""
    (row,) = json.loads(numbers.read_text(encoding="utf-8"))
    assert row["parameters_compact"] == 610
    assert {path.name for path in folder.iterdir()} == {
        "network.json",
        "network.stablehlo",
        "variables.npz",
    }

    dataset = tiny.digits()
    about = json.loads((folder / "network.json").read_text(encoding="utf-8"))
    assert (about["num_classes"], about["image_shape"], about["compact"]) == (10, [8, 8, 1], True)
    assert about["mean"] == list(dataset.mean)
    images = normalised(dataset, 7)
    np.save(tmp_path / "images.npy", images)
    code = "\n".join(
        [
            "import sys; sys.modules['sparsity_jax'] = None",
            "import numpy as np; images = np.load('../images.npy')",
            *about["use"],
            "np.save('../logits.npy', logits); np.save('../first.npy', network.call(images[:1]))",
        ]
    )
    read = tiny.python("-W", "error", "-c", code, cwd=folder)
    assert read.returncode == 0, read.stderr
    logits, *_ = by_hand(state.params, dataset.test, dataset)
    assert_allclose(np.load(tmp_path / "logits.npy"), logits[:7], rtol=1e-4, atol=1e-5)
    assert_allclose(np.load(tmp_path / "first.npy"), logits[:1], rtol=1e-4, atol=1e-5)
    variables, apply = evaluate.load(folder)
    assert variables["params"]["dense1"]["kernel"].shape == (64, 8)
    assert_allclose(jax.jit(apply)(variables, images), logits[:7], rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda variables: apply(variables, images).sum())(variables)
    assert gradient["params"]["fc"]["bias"] == pytest.approx(7.0)


@pytest.mark.parametrize("cut_half", [True, False], ids=["compact", "dense"])
def test_running_statistics_short_types_and_platforms(cut_half, tmp_path):
    model = TINY_MOBILENET | dict(param_dtype="bfloat16")
    problem, state = fresh(model, cut_half)
    folder = evaluate.export(
        problem, model, state, tmp_path / "deep" / "network", platforms=["cpu", "cuda"]
    )
    variables, apply = evaluate.load(folder)
    assert (cost.num_params(variables) < cost.num_params({"params": state.params})) is cut_half
    assert variables["params"]["fc"]["kernel"].dtype == jnp.bfloat16
    assert variables["batch_stats"]["block1"]["bn1"]["mean"].shape == ((4,) if cut_half else (8,))
    images = normalised(problem.dataset, 3)
    full = {"params": state.params, "batch_stats": state.batch_stats}
    expected = jax.jit(problem.model.apply)(full, images)
    assert_allclose(jax.jit(apply)(variables, images), expected, rtol=1e-4, atol=1e-5)
    program = stablehlo.deserialize(bytearray((folder / "network.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda")
    assert_allclose(program.call(images), expected, rtol=1e-4, atol=1e-5)
    assert [path.name for path in folder.parent.iterdir()] == ["network"]


def test_networks_that_are_not_pruned_are_exported_dense(dense, tmp_path, capsys):
    evaluate.main(["--workdir", str(dense[0]), "--export", str(tmp_path / "networks")])
    said = capsys.readouterr().out
    for i in range(2):
        folder = tmp_path / "networks" / f"member_{i:03d}"
        assert f"exported dense, since no channels are cut: network: {folder}" in said
        variables, _ = evaluate.load(folder)
        tiny.same(variables["params"], jax.tree.map(lambda leaf, i=i: leaf[i], dense[1].params))


# mistakes -----------------------------------------------------------------------------------------


def edited(workdir: pathlib.Path, target: pathlib.Path, change) -> pathlib.Path:
    """A copy of a run whose config was edited."""
    shutil.copytree(workdir, target)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    intact.record(path)
    return target


def test_folders_that_cannot_be_evaluated(cut, dense, tmp_path):
    with tiny.complains(r"holds no run \(no config.json\)"):
        evaluate.run(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with tiny.complains("not readable as JSON"):
        evaluate.run(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with tiny.complains("but a list"):
        evaluate.run(tmp_path)
    shutil.copy(cut[0] / "config.json", tmp_path)
    with tiny.complains("has no checkpoint: its run has saved nothing yet"):
        evaluate.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    wider = edited(cut[0], tmp_path / "wider", lambda config: config["model"].update(widths=[17]))
    with tiny.complains(
        r"params/dense1/bias is \(16,\) there and \(17,\) in the network; 2 more differ"
    ):
        evaluate.run(wider)
    deeper = edited(
        cut[0], tmp_path / "deeper", lambda config: config["model"].update(widths=[16, 16])
    )
    with tiny.complains(r"params/dense2/bias is absent there"):
        evaluate.run(deeper)
    more = edited(
        dense[0], tmp_path / "more", lambda config: config["sweep"].update(seed=[0, 1, 2])
    )
    with tiny.complains("makes 3 networks, the checkpoint has 2"):
        evaluate.run(more)
    assert len(evaluate.run(cut[0])) == 1  # nothing was harmed


def test_a_run_is_evaluated_without_the_one_it_started_from(cut, tmp_path):
    moved = edited(
        cut[0], tmp_path / "moved", lambda config: config.update(start_from="gone", mesh=64)
    )
    assert evaluate.run(moved) == evaluate.run(cut[0])


def test_options_that_cannot_work(cut, tmp_path, monkeypatch, capsys):
    with tiny.complains("repeats is 1; allowed: int >= 2"):
        evaluate.run(cut[0], latency=True, repeats=1)
    with tiny.complains("batch_size is 0; allowed: int >= 1"):
        evaluate.run(cut[0], batch_size=0)
    elsewhere = ["--export", str(tmp_path / "new"), "--platforms", "gpu"]
    with pytest.raises(SystemExit, match=r"allowed: 'cpu' \| 'cuda'"):
        evaluate.main(["--workdir", str(cut[0]), *elsewhere])
    (tmp_path / "mine").write_text("precious", encoding="utf-8")
    with pytest.raises(
        SystemExit, match=f"error: {tmp_path} is there and not empty; export to a new folder"
    ):
        evaluate.main(["--workdir", str(cut[0]), "--export", str(tmp_path)])
    assert capsys.readouterr().out == ""  # before anything is computed
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")]
)
def test_memory_that_is_full_is_one_sentence(error, cut, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(train, "measure", full)
    sentence = rf"{re.escape(str(cut[0]))}: the memory is full .*--batch_size.*JAX_PLATFORMS=cpu"
    with tiny.complains(sentence):
        evaluate.run(cut[0])
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        evaluate.main(["--workdir", str(cut[0])])


def test_an_emptied_layer_cannot_be_compacted(tmp_path):
    problem, state = fresh(dict(name="mlp", widths=(4,)), cut_half=False)
    gone = jax.tree.map(jnp.zeros_like, state.masks["dense1"])
    state = state._replace(masks=state.masks | {"dense1": gone})
    state = state._replace(params=masks.apply(state.params, state.masks))
    row = evaluate.measure(problem, state, latency=True, repeats=2)
    assert row["note"].startswith("cannot be compacted")
    assert "params/dense1" in row["note"]
    assert list(row["milliseconds"]) == ["dense"]
    model = dict(name="mlp", widths=(4,))
    with tiny.complains(r"params/dense1.* --dense"):
        evaluate.export(problem, model, state, tmp_path / "network")
    assert not list(tmp_path.iterdir())
    variables, _ = evaluate.load(
        evaluate.export(problem, model, state, tmp_path / "network", dense=True)
    )
    tiny.same(variables["params"], state.params)


def test_table_and_export_have_one_verdict(tmp_path, monkeypatch):
    """A network whose compact logits would differ is not exported compact, and the table says the
    same.
    """
    model = dict(name="mlp", widths=(8,))
    problem, state = fresh(model)
    state = state._replace(
        params=jax.tree.map(lambda leaf: leaf + 0.1, state.params)
    )  # masked channels live
    row = evaluate.measure(problem, state)
    assert "cannot be compacted: the compact network's logits differ" in row["note"]
    assert "parameters_compact" not in row
    with tiny.complains("logits differ"):
        evaluate.export(problem, model, state, tmp_path / "network")
    saved = evaluate.Saved(
        dict(model=model), problem, [evaluate.Network(0, {}, "finished", state, "fit")], []
    )
    looks = []
    monkeypatch.setattr(compaction, "take_stock", lambda *_: looks.append(1))
    with tiny.complains("logits differ"):
        evaluate.export_run(saved, tmp_path / "network", notes=[row["note"]])
    assert not looks  # compared once


def test_what_counts_as_rounding_follows_the_arithmetic():
    """A network of float32 weights that computes in bfloat16."""
    problem, state = fresh(dict(name="mlp", widths=(8,), dtype="bfloat16"))
    assert evaluate.compared(problem, state)[2] == ""


def test_places_that_cannot_be_written_are_told_before_anything_is_measured(cut, tmp_path):
    (tmp_path / "file").write_text("")
    for option, name in (
        ("--torch", "w.safetensors"),
        ("--export", "network"),
        ("--json", "numbers.json"),
    ):
        with pytest.raises(SystemExit, match="cannot be written, since"):
            evaluate.main(["--workdir", str(cut[0]), option, str(tmp_path / "file" / name)])


def test_exported_files_have_the_usual_mode_and_short_types_are_read_as_documented(tmp_path):
    problem, state = fresh(dict(name="mlp", widths=(4,), param_dtype="bfloat16"), cut_half=False)
    saved = evaluate.Saved({}, problem, [evaluate.Network(0, {}, "finished", state, "fit")], [])
    (tmp_path / "usual").write_text("")
    (file,) = evaluate.export_torch(saved, tmp_path / "w.safetensors")
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode
    folder = evaluate.export(
        problem, dict(name="mlp", widths=(4,), param_dtype="bfloat16"), state, tmp_path / "net"
    )
    about = json.loads((folder / "network.json").read_text(encoding="utf-8"))
    stored = np.load(folder / "variables.npz")["params/dense1/kernel"]
    assert about["arrays"]["params/dense1/kernel"]["dtype"] == "bfloat16"
    tiny.same(stored.view(ml_dtypes.bfloat16), np.asarray(state.params["dense1"]["kernel"]))
    assert any("ml_dtypes.bfloat16" in line for line in about["use"])


def test_folders_that_cannot_be_loaded(tmp_path):
    model = dict(name="mlp", widths=(4,))
    problem, state = fresh(model)
    folder = evaluate.export(problem, model, state, tmp_path / "network")
    with tiny.complains(r"no network.json"):
        evaluate.load(tmp_path)
    path = folder / "network.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    for change, message in (
        (dict(format=0), "has the format 0; known: 2"),
        (dict(num_classes=9), r"fc/bias is \(10,\) there and \(9,\) in"),
        (dict(sizes={}), "has other channel groups"),
        (
            dict(model=dict(name="mlp", widths=[2 * 10**9])),
            r"network\.json: model .* weights take .* GB; allowed: ",
        ),
        (dict(model=dict(name="mlp", widths=[2**31 - 1] * 3)), r"network\.json: model"),
        (dict(model=dict(name="mlp", widths=[10**20])), r"network\.json: model\.widths"),
        (dict(num_classes=10**30), r"network\.json: model .*cannot be made"),
        (dict(image_shape=[10**12] * 3), r"network\.json: model .* GB"),
    ):
        other = about | change
        path.write_text(json.dumps(other), encoding="utf-8")
        if "format" not in change:
            with pytest.raises(
                intact.DamagedError, match=r"network\.json is not as it was written"
            ):
                evaluate.load(folder)
        other["checksum"] = intact.digest_of_value(
            {name: other[name] for name in other if name != "checksum"}
        )
        path.write_text(json.dumps(other), encoding="utf-8")
        with tiny.complains(message):
            evaluate.load(folder)
    path.write_text("{", encoding="utf-8")
    with tiny.complains(r"network\.json"):
        evaluate.load(folder)
