"""Stages of growing regularisation: what goes, with what is coupled to it, when growth ends;
oracle, noise, ...
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from tiny import settings

from sparsity_jax import (
    compaction,
    coupling,
    data,
    interface,
    models,
    optim,
    pipeline,
    removal,
    stages,
    structured,
    train,
    trees,
)

MOMENTUM = optim.settings("sgd", learning_rate=0.05, momentum=0.9)
FAST = dict(  # done after some 30 steps
    optimizer=MOMENTUM,
    batch_size=32,
    update_every=1,
    granularity_prune=0.2,
    granularity_pick=0.01,
    upper_limit=4.0,
    upper_limit_pick=0.05,
    mag_ratio_limit=100.0,
    stabilize_steps=5,
    log_every=2,
    fix_steps=20,
)


@pytest.fixture(scope="module")
def problem():
    return tiny.problem(widths=(12, 8))


@pytest.fixture(scope="module")
def trained(problem):
    state, _ = tiny.trained(problem, tiny.fit(epochs=4))
    return interface.without_optimizer(state)


@pytest.fixture(scope="module")
def residual():
    return tiny.residual(1, 2)


def run(problem, state, kind, others=None, **fields):
    """(state, rows) of a whole stage."""
    own = [settings(kind, **fields)] * (problem.members or 1)
    place = interface.Place("x", 1, {"x": own, **(others or {})})
    state, rows = own[0].begin(problem, state, place), []
    for update in own[0].run(problem, state, place):
        state, rows = update.state, rows + update.rows[0]
    assert update.done == 1.0
    return state, rows


def kernel(tree, path):
    return np.asarray(trees.named_leaves(tree)[f"{path}/kernel"])


# What goes ----------------------------------------------------------------------------------------


def test_filters_go_with_all_that_is_coupled_to_them(problem, trained):
    state, (row,) = run(problem, trained, "remove", ratios="[0:0.5, 1:0.25]")
    norms = np.abs(kernel(trained.params, "dense1")).mean(0)
    kept = np.ones(12, bool)
    kept[np.argsort(norms)[:6]] = False
    assert_array_equal(kernel(state.masks, "dense1").all(0), kept)
    assert_array_equal(state.masks["dense1"]["bias"], kept)
    assert_array_equal(kernel(state.masks, "dense2").any(1), kept)
    assert kernel(state.masks, "dense2").any(0).sum() == 6
    assert kernel(state.masks, "fc").any(0).all()
    assert row["layers"] == pytest.approx(
        {"dense1/kernel": 0.5, "dense2/kernel": 1 - 36 / 96, "fc/kernel": 0.25}
    )
    kernels = [kernel(state.masks, path) for path in ("dense1", "dense2", "fc")]
    assert row["ratio"] == pytest.approx(
        sum((~own).sum() for own in kernels) / sum(own.size for own in kernels)
    )
    for leaf, mask in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.masks)):
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])


@pytest.mark.parametrize(
    ("pick", "chosen"),
    [("min", lambda norms: np.argsort(norms)[:6]), ("max", lambda norms: np.argsort(-norms)[:6])],
)
def test_picks_by_norm(problem, trained, pick, chosen):
    state, _ = run(problem, trained, "remove", ratios="[0:0.5]", pick=pick)
    gone = np.flatnonzero(~kernel(state.masks, "dense1").any(0))
    assert_array_equal(gone, np.sort(chosen(np.abs(kernel(trained.params, "dense1")).mean(0))))


def test_random_picks_follow_the_seed(problem, trained):
    first, again = (
        run(problem, trained, "remove", ratios="[0:0.5]", pick="rand")[0] for _ in range(2)
    )
    tiny.same(first.masks, again.masks)
    other, _ = run(
        problem, trained._replace(key=train.key_of(5)), "remove", ratios="[0:0.5]", pick="rand"
    )
    assert not np.array_equal(kernel(first.masks, "dense1"), kernel(other.masks, "dense1"))


def test_weights_and_input_channels(problem, trained):
    state, _ = run(problem, trained, "remove", ratios="[0-2:0.9]", granularity="weight")
    for path in ("dense1", "dense2", "fc"):
        mask, weights = kernel(state.masks, path), np.abs(kernel(trained.params, path))
        assert (~mask).sum() == int(np.ceil(0.9 * mask.size))
        assert weights[mask].min() >= weights[~mask].max()
    state, _ = run(problem, trained, "remove", ratios="[1:0.5]", granularity="channel")
    kept = kernel(state.masks, "dense2").any(1)
    norms = np.abs(kernel(trained.params, "dense2")).mean(1)
    assert_array_equal(np.flatnonzero(~kept), np.sort(np.argsort(norms)[:6]))
    assert_array_equal(kernel(state.masks, "dense1").any(0), kept)  # nothing else reads them


@pytest.mark.parametrize(
    ("granularity", "ratios"),
    [("filter", "[0,0.5,0.5,0]"), ("channel", "[0,0.5,0.5,0]"), ("group", "0.5")],
)
def test_a_pruned_residual_network_is_compacted(residual, granularity, ratios):
    problem, state = residual
    state, _ = run(problem, state, "remove", ratios=ratios, granularity=granularity)
    chosen = compaction.Compact(repeats=0)
    row = compaction.take_stock(
        problem, state, chosen
    )  # raises unless compact and masked logits are equal
    assert row["difference"] < 1e-5
    inner = {
        "params/stage1_block0/conv1": 3,
        "params/stage2_block0/conv1": 4,
        "params/stage2_block1/conv1": 4,
    }
    assert {name: row["kept"][name] for name in inner} == inner
    outer = {name: size for name, size in row["sizes"].items() if name not in inner}
    share = 0.5 if granularity == "group" else 1.0
    assert {name: row["kept"][name] for name in outer} == {
        name: int(share * size) for name, size in outer.items()
    }
    assert row["parameters_compact"] < row["parameters"]


def test_depthwise_layers_follow_the_layer_before_them():
    model = models.build(name="mobilenet", num_classes=4, stem_width=8, blocks=((8, 1), (12, 2)))
    problem = train.build_problem(tiny.random_set((8, 8, 3), 4, examples=40), model)
    state = train.initial_state(problem, train.key_of(0))
    cut, _ = run(problem, state, "remove", ratios="[0-4:0.5]")
    channels = structured.channels_of(problem, branches="separate")
    alive = coupling.alive(channels, {"params": cut.masks})
    assert {name: int(own.sum()) for name, own in alive.items()} == {
        name: (size + 1) // 2 for name, size in channels.sizes.items()
    }
    norms = np.abs(kernel(state.params, "conv1")).mean((0, 1, 2))
    kept = norms >= np.sort(norms)[4]
    for path, axis in (("conv1", -1), ("block0/depthwise", -1), ("block0/pointwise", -2)):
        own = np.moveaxis(kernel(cut.masks, path), axis, 0).reshape(8, -1).any(1)
        assert_array_equal(own, kept, err_msg=path)
    row = compaction.take_stock(problem, cut, compaction.Compact(repeats=0))
    assert row["difference"] < 1e-5
    faster, _ = run(problem, state, "remove", ratios="1.5x")
    row = compaction.take_stock(problem, faster, compaction.Compact(repeats=0))
    assert 1.5 <= row["flops"] / row["flops_compact"] < 2


@pytest.mark.parametrize(
    ("granularity", "ratios"),
    [("filter", ((".*", 0.5),)), ("weight", "[0-4:0.5]"), ("group", "0.5")],
)
def test_layers_come_in_the_order_of_the_network(granularity, ratios):
    model = models.build(name="mobilenet", num_classes=4, stem_width=8, blocks=((8, 1), (12, 2)))
    problem = train.build_problem(tiny.random_set((8, 8, 3), 4, examples=40), model)
    layers = settings("remove", ratios=ratios, granularity=granularity).layers(problem)
    first = [layer.scored[0].path for layer in layers]
    in_order = removal.kernels_of(problem)
    assert first == [path for path in in_order if path in first] != sorted(first)


def test_a_speedup_is_reached_in_flops(residual):
    problem, state = residual
    cut, _ = run(problem, state, "remove", ratios="1.4x")
    row = compaction.take_stock(problem, cut, compaction.Compact(repeats=0))
    assert 1.4 <= row["flops"] / row["flops_compact"] < 1.6
    with tiny.refused("ratios", "90x"):
        settings("remove", ratios="90x").check_network(problem, 1)


def test_ratios_and_picks_of_another_run(problem, tmp_path, monkeypatch):
    config = tiny.config(
        *("fit", "out"),
        model=dict(name="mlp", widths=(12, 8)),
        out=pipeline.stage("remove", ratios="[0:0.5, 1:0.3]"),
    )
    other = pipeline.run(config, tmp_path / "other").state
    state = train.initial_state(problem, train.key_of(9))
    same, _ = run(problem, state, "remove", inherit=str(tmp_path / "other"))
    tiny.same(same.masks, other.masks)
    grown, _ = run(problem, state, "grow", inherit=str(tmp_path / "other"), **FAST)
    tiny.same(grown.masks, other.masks)
    counts, _ = run(problem, state, "remove", inherit=str(tmp_path / "other"), inherit_as="ratio")
    for path in ("dense1", "dense2"):
        assert kernel(counts.masks, path).any(0).sum() == kernel(other.masks, path).any(0).sum()
    assert not np.array_equal(kernel(counts.masks, "dense1"), kernel(other.masks, "dense1"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(removal.Remove, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(config, tmp_path / "half")
    with tiny.refused("inherit"):
        settings("remove", inherit=str(tmp_path / "half")).check_network(problem, 1)
    with tiny.refused("inherit"):
        settings("remove", inherit=str(tmp_path / "none")).check_network(problem, 1)
    with tiny.complains(r"mask of dense1/kernel has the shape \(64, 12\); allowed: \(64"):
        settings("remove", inherit=str(tmp_path / "other")).check_network(
            tiny.problem(widths=(7,)), 1
        )


# grow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["greg1", "greg2", "fixreg"])
def test_growth_pushes_to_zero_and_removes(problem, trained, method):
    state, rows = run(
        problem, trained, "grow", method=method, ratios="[0:0.5, 1:0.25]", log_scores=True, **FAST
    )
    assert kernel(state.masks, "dense1").any(0).sum() == 6
    assert kernel(state.masks, "dense2").any(0).sum() == 6
    logs, last = [row for row in rows if "growth" in row], rows[-1]
    assert [row["step"] for row in logs] == list(range(2, last["step"] + 1, 2))
    assert all("finished" not in row for row in rows)
    before, after = logs[-2]["growth"]["dense1/kernel"], logs[-1]["growth"]["dense1/kernel"]
    assert after["phase"] == 2
    assert after["score_pruned"] < 0.2 * after["score_kept"]
    assert after["reg_pruned"] == before["reg_pruned"]  # at rest
    assert [row["epoch"] for row in rows if "epoch" in row] == list(range(1, 1 + last["step"] // 4))
    norms = np.abs(kernel(trained.params, "dense1")).mean(0)
    if method != "greg2":  # picked before the first step
        assert set(np.flatnonzero(~kernel(state.masks, "dense1").any(0))) == set(
            np.argsort(norms)[:6]
        )
    scores, keep = logs[-1]["scores"]["dense1/kernel"], np.array(logs[-1]["keep"]["dense1/kernel"])
    assert np.mean(np.array(scores)[keep]) == pytest.approx(after["score_kept"], rel=0.2)
    assert_array_equal(kernel(state.masks, "dense1").any(0), keep)


def test_growth_ends_when_all_is_done_and_not_later(problem, trained):
    fields = FAST | dict(log_every=1, mag_ratio_limit=1e9)
    _, rows = run(problem, trained, "grow", ratios="[0:0.5]", **fields)
    # exceeding 4.0 in steps of 0.2 takes 21 updates, one a step, then 5 steps at rest
    assert rows[-1]["step"] == 26
    assert settings("grow", ratios="[0:0.5]", **fields).most_steps() >= 26


def test_only_penalties_move_kernels(problem, trained):
    fields = FAST | dict(optimizer=optim.settings("sgd", learning_rate=0.05), penalty_only=True)
    state, _ = run(problem, trained, "grow", ratios="[0:0.5]", **fields)
    assert_array_equal(kernel(state.params, "fc"), kernel(trained.params, "fc"))
    kept = kernel(state.masks, "dense1").any(0)
    assert_array_equal(
        kernel(state.params, "dense1")[:, kept], kernel(trained.params, "dense1")[:, kept]
    )
    assert not np.array_equal(state.params["fc"]["bias"], trained.params["fc"]["bias"])


def test_members_grow_side_by_side(problem):
    both = problem.with_members(2)
    keys = [train.key_of(seed) for seed in (0, 1)]
    fields = dict(ratios="[0:0.5]", method="greg2", **FAST)
    together, _ = run(both, train.initial_state(both, jnp.stack(keys)), "grow", **fields)
    for i, key in enumerate(keys):
        alone, _ = run(problem, train.initial_state(problem, key), "grow", **fields)
        assert_array_equal(kernel(together.masks, "dense1")[i], kernel(alone.masks, "dense1"))
        assert_allclose(
            kernel(together.params, "fc")[i], kernel(alone.params, "fc"), rtol=1e-4, atol=1e-5
        )


# oracle, reinit, noise, jacobian ------------------------------------------------------------------


def test_the_oracle_finds_the_best_choice(problem, trained):
    state, (row,) = run(problem, trained, "oracle", ratios="[1:0.25]")
    found = []
    for gone in itertools.combinations(range(8), 2):
        kept = ~np.isin(np.arange(8), gone)
        params = jax.tree.map(jnp.asarray, trained.params)
        params["dense2"] = dict(
            kernel=params["dense2"]["kernel"] * kept, bias=params["dense2"]["bias"] * kept
        )
        found.append(float(train.evaluate(problem, params, {}, "train")[0]))
    assert row["choices"] == 28
    assert row["loss"] == pytest.approx(min(found), rel=1e-5)
    assert_allclose(row["losses"], np.sort(found), rtol=1e-5)
    best = list(itertools.combinations(range(8), 2))[int(np.argmin(found))]
    assert_array_equal(np.flatnonzero(~kernel(state.masks, "dense2").any(0)), best)
    assert row["rank"] == 1 + sum(loss < row["loss_by_norm"] * (1 - 1e-6) for loss in found)


def test_the_oracle_may_train_every_choice(problem, trained):
    again = tiny.fit(epochs=1)
    _, (row,) = run(
        problem, trained, "oracle", {"again": [again]}, ratios="[1:0.1]", retrain="again"
    )
    cut, _ = run(problem, trained, "remove", ratios="[1:0.1]")
    numbers = train.numbers_of(problem, cut, [again])
    state = train.begin_members(problem, cut, [again], numbers)
    for update in train.fit_epochs(problem, state, again, numbers, 1):
        state = update.state
    assert row["choices"] == 8
    assert row["loss_by_norm"] == pytest.approx(
        float(train.evaluate(problem, state.params, {}, "train")[0]), rel=1e-5
    )


def test_the_oracle_trains_every_member_by_its_own_settings(problem, trained):
    fits = [tiny.fit(dict(tiny.SGD, learning_rate=rate), epochs=1) for rate in (0.1, 1e-6)]
    both = problem.with_members(2)
    state = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), trained)
    own = [settings("oracle", ratios="[1:0.1]", retrain="again")] * 2
    place = interface.Place("x", 1, {"x": own, "again": fits}, rows=[[], []])
    (update,) = own[0].run(both, state, place)
    first, second = (rows[0]["loss"] for rows in update.rows)
    _, (alone,) = run(
        problem, trained, "oracle", {"again": fits[1:]}, ratios="[1:0.1]", retrain="again"
    )
    assert second == pytest.approx(alone["loss"], rel=1e-5)
    assert first < second


def test_the_oracle_refuses_what_takes_for_ever(problem):
    with tiny.refused("limit", 100):
        settings("oracle", ratios="[0:0.5]", limit=100).check_network(problem, 1)
    with tiny.refused("ratios", "[0:-1]"):
        settings("oracle", ratios="[0:-1]").check_network(problem, 1)


def test_weights_drawn_anew_keep_the_masks(residual):
    problem, state = residual
    state, _ = run(problem, state, "remove", ratios="[0,0.5,0.5,0]")
    anew, rows = run(problem, state, "reinit", method="orthogonal")
    assert rows == []
    tiny.same(anew.masks, state.masks)
    path = "stage1_block0/conv1"
    assert not np.any(kernel(anew.params, path)[~kernel(state.masks, path)])
    assert not np.array_equal(kernel(anew.params, path), kernel(state.params, path))
    assert float(anew.batch_stats["bn1"]["var"].max()) == 1.0


def test_noise_on_weights(problem, trained):
    state, rows = run(problem, trained, "noise", std=0.0, num=2)
    _, accuracy = train.evaluate(problem, trained.params, {}, "test")
    assert [row["accuracy"] for row in rows] == [pytest.approx(float(accuracy))] * 2
    tiny.same(state.params, trained.params)
    _, rows = run(problem, trained, "noise", std=2.0, num=3, relative=True)
    assert [row["draw"] for row in rows] == [0, 1, 2]
    assert len({row["loss"] for row in rows}) == 3
    assert np.mean([row["accuracy"] for row in rows]) < float(accuracy)
    nothing = trained._replace(
        params=jax.tree.map(jnp.zeros_like, trained.params),
        masks=jax.tree.map(lambda mask: jnp.zeros(mask.shape, bool), trained.masks),
    )
    _, rows = run(problem, nothing, "noise", std=2.0, num=2)
    assert (
        rows[0]["loss"] == rows[1]["loss"] == pytest.approx(np.log(10))
    )  # masked weights stay zero


def test_noise_on_no_array_is_refused_before_training(problem):
    with tiny.refused("parameters", ".*/kernle", "fc/kernel"):
        settings("noise", parameters=".*/kernle").check_network(problem, 1)
    config = tiny.config("fit", "noise", noise=pipeline.stage("noise", parameters=".*/kernle"))
    with tiny.complains(r"config.noise.parameters"):
        pipeline.build(pipeline.check(config))


def test_singular_values_of_the_jacobian(problem, trained):
    _, (row,) = run(problem, trained, "jacobian", num_examples=7)
    single = lambda x: problem.model.apply({"params": trained.params, "batch_stats": {}}, x[None])[
        0
    ]
    images = problem.images(
        problem.train_images[data.FixedSample().indices(problem.size("train"), 7)]
    )
    slopes = jax.jit(jax.vmap(jax.jacrev(single)))(images).reshape(7, 10, -1)
    values = np.linalg.svd(np.asarray(slopes), compute_uv=False)
    assert row["mean"] == pytest.approx(np.mean(values), rel=1e-4)
    assert row["largest"] == pytest.approx(np.max(values), rel=1e-4)
    assert_allclose(row["mean_by_rank"], np.mean(values, 0), rtol=1e-3, atol=1e-6)
    assert row["num_examples"] == 7


def test_stages_name_weights_that_are_not_finite(problem, trained):
    params = jax.tree.map(np.array, trained.params)
    params["dense2"]["kernel"][0, 0] = np.nan
    broken = trained._replace(params=params)
    with pytest.raises(train.NonFiniteLossError, match=r"the network: .*dense2/kernel"):
        stages.check_weights(problem, broken)
    both = problem._replace(members=2)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), trained, broken)
    with pytest.raises(train.NonFiniteLossError, match=r"member 1: .*dense2/kernel"):
        stages.check_weights(both, stacked)
    stages.check_weights(problem, trained)


def test_no_stage_begins_with_weights_that_are_not_finite(tmp_path, monkeypatch):
    create = train.create_state
    spoil = lambda params: jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), params)
    spoiled = lambda *args, **own: (lambda state: state._replace(params=spoil(state.params)))(
        create(*args, **own)
    )
    monkeypatch.setattr(train, "create_state", spoiled)
    config = tiny.config(
        "noise", model=dict(name="mlp", widths=(4,)), noise=pipeline.stage("noise")
    )
    with pytest.raises(train.NonFiniteLossError, match=r"start of the run: .*infinite"):
        pipeline.run(config, tmp_path)


# Names of networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("base", "grow", "tune", "compact"), ["unpruned", "greg1", "greg1", "greg1"]),
        (("base", "remove", "noise"), ["unpruned", "remove", "remove"]),
        (("noise", "grow", "compact"), ["network", "grow", "grow"]),
        (("noise", "base", "noise"), ["unpruned"] * 3),
        (("noise", "compact"), ["network"] * 2),
    ],
)
def test_a_pruned_network_is_not_called_by_the_name_of_the_one_before(names, labels):
    kinds = dict(base="train", tune="train")
    given = dict(base="unpruned", tune="greg1")
    stages = {name: dict(kind=kinds.get(name, name), label=given.get(name, "")) for name in names}
    config = dict(stages, pipeline=names)
    assert [pipeline.arm_of(config, i) for i in range(len(names))] == labels


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        (
            dict(),
            ("config.x",),
        ),
        (dict(ratios="2x", inherit="runs/a"), ("config.x",)),
        (
            dict(inherit="runs/a", granularity="group"),
            ("config.x.granularity", "group"),
        ),
        (
            dict(ratios="0.5", granularity="group", skip="1"),
            ("config.x.skip", "1"),
        ),
        (dict(inherit="runs/a", skip="1"), ("config.x.skip", "1")),
        (
            dict(inherit="runs/a", pick="max"),
            ("config.x.pick", "max"),
        ),
        (
            dict(ratios="[0:0.5]", inherit_as="ratio"),
            ("config.x.inherit_as", "ratio"),
        ),
        (
            dict(ratios="[0:0.5]", pick="mni"),
            ("config.x.pick", "mni", "min"),
        ),
        # of the network
        (
            dict(ratios="[0,0.5,0]"),
            ("ratios", "[0,0.5,0]"),
        ),
        (
            dict(ratios="[0-7:0.5]"),
            ("ratios[0]", "0-7:0.5"),
        ),
        (dict(ratios="[0:0]"), ("ratios", "[0:0]")),
        (
            dict(ratios="2x", granularity="weight"),
            ("ratios", "2x"),
        ),
        (dict(ratios=((".*/kernle", 0.5),)), ("ratios[0]", ".*/kernle", "fc/kernel")),
        (
            dict(ratios="[0:0.5]", granularity="group"),
            ("ratios", "[0:0.5]"),
        ),
        (dict(ratios="[0:0.5]", skip="9"), ("skip", "9")),
        (
            dict(ratios="[0:-1]", pick="max"),
            ("pick", "max"),
        ),
    ],
)
def test_options_that_do_not_fit(problem, fields, refusal):
    with tiny.refused(*refusal):
        settings("remove", **fields).check_network(problem, 1)


def test_limits_that_are_never_reached():
    with tiny.complains(r"granularity_prune"):
        settings("grow", ratios="[0:0.5]", **FAST | dict(granularity_prune=0.0))
    with tiny.complains("method is 'greg3'"):
        settings("grow", ratios="[0:0.5]", method="greg3", **FAST)
