"""Every trained network of a run is there by its label, whatever happened in between."""

import shutil

import jax
import pytest
import tiny

from sparsity_jax import evaluate, intact, kept, pipeline, train

STAGES = ("fit", "cut", "second", "third")


def config(**fields) -> dict:
    """Three trainings, the first of them pruned, of two members side by side."""
    one = dict(tiny.config()["again"], label="SFW")
    stages = dict(
        fit=dict(one, label="first"),
        second=dict(one, label="second", start="init"),
        third=dict(one, label="third"),
    )
    return tiny.config(*STAGES, sweep=dict(seed=(0, 1)), **stages, **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, states after each training) of a finished run."""
    workdir = tmp_path_factory.mktemp("kept") / "run"
    states = []
    with pytest.MonkeyPatch.context() as patch:
        save = kept.save
        patch.setattr(
            kept,
            "save",
            lambda place, state, *rest: (states.append(state), save(place, state, *rest))[1],
        )
        last = pipeline.run(config(), workdir).state
    return workdir, [*states, last]


def files(workdir) -> dict:
    folder = workdir / kept.FOLDER
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != intact.SUMS}


def test_each_network_is_opened_by_its_label(whole):
    workdir, states = whole
    labels = ("first", "second", "third")
    for label, state in zip(labels, states, strict=True):
        saved = evaluate.open_run(workdir, label=label)
        assert saved.labels == labels
        assert [network.member for network in saved.networks] == [0, 1]
        assert {network.label for network in saved.networks} == {label}
        for network in saved.networks:
            own = jax.tree.map(lambda leaf, i=network.member: leaf[i], state)
            tiny.same(network.state.params, own.params)
            tiny.same(network.state.masks, own.masks)
            tiny.same(network.state.key, own.key)
    assert evaluate.open_run(workdir).networks[0].label == "third"
    assert (
        evaluate.open_run(workdir, label="first").networks[0].progress == "after stage 2 of 4 (cut)"
    )
    assert {one.label for one in evaluate.open_run(workdir, label="se").networks} == {"second"}
    with tiny.refused("label", "frist", closest="first"):
        evaluate.open_run(workdir, label="frist")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(states[0].params))
    assert all(len(text) < 1.1 * size + 1000 for text in files(workdir).values())


def test_the_command_line_says_which_network_it_measures(whole, capsys):
    evaluate.main(["--workdir", str(whole[0]), "--label", "first"])
    told = capsys.readouterr().out
    assert "mlp on digits, first, member 1 (seed=1): after stage 2 of 4 (cut)" in told
    assert "networks of this run, for --label: 'first', 'second', 'third'" in told


def test_a_damaged_network_is_refused_by_name(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    file = tmp_path / "run" / kept.FOLDER / "001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(intact.DamagedError, match=r"001\.safetensors is not as it was written"):
        evaluate.open_run(tmp_path / "run", label="first")
    shutil.rmtree(file.parent)  # as runs of before have none
    saved = evaluate.open_run(tmp_path / "run")
    assert saved.labels == ("third",)


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_run_killed_around_the_write_keeps_each_network_once(whole, tmp_path, monkeypatch, when):
    save, record = kept.save, intact.record

    def killed(*arguments):
        if when == "after":
            save(*arguments)
        if when == "within":
            monkeypatch.setattr(intact, "record", stop)
            save(*arguments)
        raise KeyboardInterrupt

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config(), tmp_path)
    monkeypatch.setattr(kept, "save", save)
    monkeypatch.setattr(intact, "record", record)
    assert set(kept.networks(tmp_path)) == ({"first"} if when == "after" else set())
    pipeline.run(config(), tmp_path)
    assert files(tmp_path) == files(whole[0])
    assert intact.damage(tmp_path / kept.FOLDER) == ""
    pipeline.run(config(), tmp_path)
    assert files(tmp_path) == files(whole[0])


def test_no_more_are_kept_than_asked_for(tmp_path, whole):
    _, (state, *_) = whole

    def labels(most, *made):
        workdir = tmp_path / f"{most}{len(made)}"
        for position, label in enumerate(made):
            kept.save(workdir, state, label, position, most)
        assert not made or not most or intact.damage(workdir / kept.FOLDER) == ""
        return [(one.label, one.position) for one in kept.networks(workdir).values()]

    assert labels(0, "a", "b") == []
    assert labels(1, "a", "b") == [("b", 1)]
    assert labels(2, "a", "b", "c") == [("b", 1), ("c", 2)]
    assert labels(5, "a", "b", "a", "a") == [("b", 1), ("a", 3)]


def test_short_types_and_masks_come_back(tmp_path):
    problem = tiny.problem()
    state = train.initial_state(problem, train.key_of(0))
    short = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), state.params)
    masks = jax.tree.map(lambda leaf: leaf > 0, state.params)
    state = state._replace(params=short, masks=masks)
    kept.save(tmp_path, state, "$x/<ü>", 3, 10)
    (network,) = kept.networks(tmp_path).values()
    assert (network.label, network.position) == ("$x/<ü>", 3)
    arrays = kept.arrays(network)
    tiny.same(arrays["params/fc/kernel"], short["fc"]["kernel"])
    tiny.same(arrays["masks/fc/kernel"], masks["fc"]["kernel"])
    (tmp_path / kept.FOLDER / "004.safetensors").write_bytes(b"x" * 40)
    intact.record(tmp_path / kept.FOLDER / "004.safetensors")
    with pytest.raises(intact.DamagedError, match="holds no network"):
        kept.networks(tmp_path)
