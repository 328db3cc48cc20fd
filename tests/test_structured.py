"""Stages `cut` and `compact`: rounds, budgets, members, compilation, accuracy and costs of what is
left.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import (
    budgets,
    compaction,
    cost,
    coupling,
    cuts,
    data,
    interface,
    models,
    pipeline,
    plans,
    scores,
    structured,
    train,
)

ROUNDS = 4


@pytest.fixture(scope="module")
def problem():
    return tiny.problem(widths=(24, 16))


@pytest.fixture(scope="module")
def trained(problem):
    state, _ = tiny.trained(problem, tiny.fit(epochs=8))
    return interface.without_optimizer(state)


@pytest.fixture(scope="module")
def convolutional():
    return tiny.residual(1, 1)


def settings(kind="cut", **fields):
    return tiny.settings(kind, **fields)


def run(problem, state, kind="cut", visit=1, visits=1, position=1, **fields):
    """(state, row) of one visit of a stage."""
    own = [settings(kind, **fields)] * (problem.members or 1)
    place = interface.Place("x", position, {"x": own}, visit=visit, visits=visits)
    (update,) = own[0].run(problem, state, place)
    return update.state, update.rows[0][0]


# cut ----------------------------------------------------------------------------------------------


def test_one_round_removes_the_least_important_channels_everywhere(problem, trained):
    state, row = run(problem, trained, measure="mag_based", ratio=0.25)
    norms = {
        f"params/dense{i}": np.linalg.norm(trained.params[f"dense{i}"]["kernel"], axis=0)
        for i in (1, 2)
    }
    expected = budgets.select(norms, 0.25)
    for i in (1, 2):
        kept = expected[f"params/dense{i}"]
        for tree in (state.masks, jax.tree.map(lambda leaf: leaf != 0, state.params)):
            assert_array_equal(np.asarray(tree[f"dense{i}"]["kernel"]).any(0), kept)
            assert_array_equal(tree[f"dense{i}"]["bias"], kept)
        follower = "dense2" if i == 1 else "fc"
        assert_array_equal(np.asarray(state.masks[follower]["kernel"]).any(1), kept)
    assert (row["num_kept"], row["num_channels"], row["round"]) == (30, 40, 1)
    assert row["kept"] == {name: int(kept.sum()) for name, kept in expected.items()}
    assert row["ratio"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "measure", sorted(name for name in scores.MEASURES if name not in ("bn", "nvidia"))
)
def test_every_measure_of_kernels_cuts(problem, trained, measure):
    if measure == "biased_loss_tracked":
        saliency = jax.tree.map(lambda leaf: jnp.abs(jnp.sin(leaf)), trained.params)
        trained = trained._replace(opt_state=interface.Carried((), saliency))
    state, row = run(problem, trained, measure=measure, ratio=0.5, imp_samples=60)
    assert row["num_kept"] == 20
    assert np.isfinite(train.evaluate(problem, state.params, state.batch_stats, "test")[0])


def taking_the_first(problem):
    return problem._replace(sample=data.FixedSample("first"), compiled={})


def test_gradients_are_those_of_the_first_examples_in_inference_mode(convolutional):
    problem, state = taking_the_first(convolutional[0]), convolutional[1]
    own = settings(measure="tfo", imp_samples=24, batch_size=10, temperature=5.0)
    found = cuts.make_scores(problem, own)(state, jax.random.key(0))
    loss = mean_loss(problem, state, problem.train_images[:24], problem.train_labels[:24], 5.0)
    grads = jax.jit(jax.grad(loss))(state.params)
    block = lambda tree: np.asarray(tree["stage1_block0"]["conv1"]["kernel"])
    expected = np.abs(np.sum(block(grads) * block(state.params), (0, 1, 2)))
    assert_allclose(found["params/stage1_block0/conv1"], expected, rtol=2e-3, atol=1e-6)


def mean_loss(problem, state, images, labels, temperature):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits = problem.model.apply(variables, problem.images(images)) / temperature
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    return loss


def test_hessian_products_leave_the_statistics_out(convolutional):
    problem, state = taking_the_first(convolutional[0]), convolutional[1]
    own = settings(measure="grad_preserve", imp_samples=20, batch_size=7)
    found = cuts.make_scores(problem, own)(state, jax.random.key(0))
    index = scores.class_balanced(problem.dataset.train.labels, 4, 20)
    loss = mean_loss(problem, state, problem.train_images[index], problem.train_labels[index], 1.0)

    @jax.jit
    def product(params):
        gradient = jax.grad(loss)
        return jax.jvp(gradient, (params,), (gradient(params),))[1]

    block = lambda tree: np.asarray(tree["stage2_block0"]["conv1"]["kernel"])
    expected = np.abs(np.sum(block(product(state.params)) * block(state.params), (0, 1, 2)))
    assert_allclose(found["params/stage2_block0/conv1"], expected, rtol=2e-3, atol=1e-5)


def test_rounds_follow_the_originals_schedule_and_compile_once(problem, trained):
    fresh, state = problem._replace(compiled={}), trained
    rounds = 25
    plan, compiled, kept = budgets.round_ratios(ratio=0.75, num_rounds=rounds), [], [40]
    listen = lambda event, seconds, **_: (
        compiled.append(event) if "backend_compile" in event else None
    )
    for visit in range(1, rounds + 1):
        state, row = run(
            fresh,
            state,
            visit=visit,
            visits=rounds,
            position=visit,
            measure="loss_based",
            imp_samples=64,
        )
        assert row["num_kept"] == kept[-1] - int(plan.ratios[visit - 1] * kept[-1])
        assert row["ratio"] == 1 - row["num_kept"] / row["num_channels"]
        kept.append(row["num_kept"])
        if visit == 1:
            jax.monitoring.register_event_duration_secs_listener(listen)
            before = state.masks
    assert not compiled
    assert all(
        np.all(old | ~new)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.masks))
    )
    assert len(set(kept)) > 10  # of 40 channels a share below 1 / 25 is none in many a round


def selected(problem, rounds, **fields):
    """Channels left after many rounds of one and the same importance."""
    chosen, random = settings(**fields), np.random.default_rng(0)
    found = {"params/dense1": random.random(24), "params/dense2": random.random(16)}
    keep = {name: np.ones(own.size, bool) for name, own in found.items()}
    for visit in range(1, rounds + 1):
        keep = chosen.select(
            problem, found, keep, interface.Place("x", visit, {}, visit=visit, visits=rounds)
        )
    return {name: int(own.sum()) for name, own in keep.items()}


def test_manual_thresholds(problem, trained):
    state = trained
    for visit, share in ((1, 0.1), (2, 0.5)):
        fields = dict(schedule=dict(name="manual", thresholds=(0.1, 0.5)), visit=visit, visits=2)
        state, row = run(problem, state, **fields)
        assert row["num_kept"] == pytest.approx(40 * (1 - share), abs=1)


def test_the_truncated_percentage_of_the_published_rounds(problem):
    schedule = dict(name="gradient_flow", cumulative="truncated")
    assert budgets.round_ratios(ratio=0.75, num_rounds=25, cumulative="truncated").density[
        -1
    ] == pytest.approx(0.18)
    assert sum(selected(problem, 25, schedule=schedule).values()) == 8  # 7.2, of whole channels
    assert (
        sum(selected(problem, 25).values()) > 15
    )  # in the original's rounding many rounds remove none


@pytest.mark.parametrize("budget", ["parameters", "flops"])
def test_a_budget_is_met(convolutional, budget):
    problem, state = convolutional
    state, _ = run(problem, state, measure="l1", ratio=0.5, budget=budget)
    channels = structured.channels_of(problem)
    keep = coupling.alive(channels, {"params": state.masks})
    price = cost.of_channels(channels, budget)
    full = price({name: np.ones(size, bool) for name, size in channels.sizes.items()})
    assert price(keep) / full < 0.505
    stock = compaction.compacted(problem, state)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    if budget == "flops":
        assert price(keep) == cost.flops(stock.apply, stock.variables, image).products
        assert full == cost.flops(problem.model.apply, variables, image).products
    else:
        assert price(keep) == cost.num_params(stock.variables)
        assert full == cost.num_params(variables)


def test_separate_branches_are_masked_alone(convolutional):
    problem, state = convolutional
    tied, apart = (
        structured.channels_of(problem, branches=branches) for branches in ("tied", "separate")
    )
    assert len(apart.groups) > len(tied.groups)
    state, row = run(problem, state, measure="l1", ratio=0.5, branches="separate")
    assert row["num_channels"] == sum(apart.sizes.values())
    stock = compaction.compacted(problem, state)  # what is gone on all sides
    images = problem.images(problem.test_images)
    masked = jax.jit(problem.model.apply)(
        {"params": state.params, "batch_stats": state.batch_stats}, images
    )
    assert_allclose(jax.jit(stock.apply)(stock.variables, images), masked, rtol=1e-4, atol=1e-5)
    assert cost.num_params(stock.variables) < cost.num_params(state.params)


def test_every_group_loses_the_share_of_its_rule(problem, trained):
    rules, state = (("params/dense1", 0.75), (".*", 0.5)), trained
    for visit in range(1, ROUNDS + 1):
        state, row = run(problem, state, measure="l1", rules=rules, visit=visit, visits=ROUNDS)
        for name, share in (("params/dense1", 0.75), ("params/dense2", 0.5)):
            gone = (
                1 - budgets.round_ratios(ratio=share, num_rounds=ROUNDS).density[visit - 1]
            ) * row["sizes"][name]
            assert row["kept"][name] == row["sizes"][name] - int(gone + 1e-9)
        assert row["ratio"] == 1 - row["num_kept"] / 40
    assert row["kept"] == {"params/dense1": 6, "params/dense2": 8}
    norms = np.abs(trained.params["dense1"]["kernel"]).sum(0)
    kept = coupling.alive(structured.channels_of(problem), {"params": state.masks})["params/dense1"]
    assert_array_equal(np.flatnonzero(kept), np.sort(np.argsort(norms)[-6:]))
    _, row = run(problem, trained, rules=rules, exclude="params/dense2", protect="original")
    assert row["kept"] == {"params/dense1": 6, "params/dense2": 16}


@pytest.mark.parametrize("measure", ["bn", "nvidia"])
def test_measures_of_norms(convolutional, measure):
    problem, state = convolutional
    settings(measure=measure).check_network(problem)
    found = cuts.make_scores(problem, settings(measure=measure, imp_samples=20))(
        state, jax.random.key(0)
    )
    if measure == "bn":
        expected = np.abs(state.params["stage1_block0"]["bn1"]["scale"])
        assert_allclose(found["params/stage1_block0/conv1"], expected, rtol=1e-6)
    assert all(np.ptp(own) > 0 for own in found.values())


def test_groups_without_a_norm_are_named_before_anything_runs(problem):
    model = models.build(name="small_cnn", num_classes=4, batch_norm=True)
    mixed = train.build_problem(tiny.random_set((8, 8, 3), 4, examples=40), model)
    refusal = ("measure", "bn")
    with tiny.complains(
        r"the measure 'l1' .* no kernel .* exclude='params/dense1'; .*aggregate='sum'"
    ):
        settings(measure="l1", skip="params/dense1/kernel").check_network(mixed)
    with tiny.refused(*refusal):
        settings(measure="bn").check_network(mixed)
    settings(measure="bn", exclude="params/dense1").check_network(mixed)
    with tiny.complains(r"no norm scale.*a measure of kernels"):
        settings(measure="nvidia").check_network(problem)
    with tiny.refused("exclude", ".*"):
        settings(exclude=".*").check_network(problem)


def test_excluded_groups_and_multiples(problem, trained):
    _, row = run(problem, trained, ratio=0.5, exclude="params/dense1")
    assert row["kept"] == {"params/dense1": 24, "params/dense2": 8}
    _, row = run(problem, trained, ratio=0.5, multiple=8)
    assert all(number % 8 == 0 for number in row["kept"].values())


@pytest.mark.parametrize("multiple", [4, 8])
def test_many_rounds_reach_their_ratio_in_multiples(problem, multiple):
    kept = selected(problem, 25, ratio=0.75, multiple=multiple)
    assert all(number % multiple == 0 for number in kept.values())
    assert 10 <= sum(kept.values()) < 10 + len(kept) * multiple  # a quarter of 40, rounded up


def test_members_are_cut_by_their_own_scores():
    problem = tiny.problem(widths=(24, 16), members=2)
    keys = jnp.stack([train.key_of(seed) for seed in (0, 1)])
    state = jax.jit(problem.lift(lambda key: train.create_state(problem, key)))(keys)
    together, _ = run(problem, state, ratio=0.5)
    alone = tiny.problem(widths=(24, 16))
    for i in range(2):
        expected, _ = run(alone, train.member_of(problem, state, i), ratio=0.5)
        tiny.same(jax.tree.map(lambda leaf, i=i: leaf[i], together.masks), expected.masks)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        (dict(measure="mag"), ("config.x.measure", "mag")),
        (dict(ratio=1.0), ("config.x.ratio", 1.0)),
        (
            dict(schedule=dict(name="cubic")),
            ("config.x.schedule.name", "cubic"),
        ),
        (
            dict(schedule=dict(name="polynomial", powr=2)),
            ("config.x.schedule", "powr"),
        ),
        (dict(measure="tfo", use_init=True), ("config.x.use_init", True)),
        (dict(exclude="("), ("config.x.exclude", "(")),
        (dict(budget="filters"), ("config.x.budget", "filters")),
        (dict(rules=((".*", 1.0),)), ("config.x.rules[0][1]", 1.0)),
        (
            dict(rules=((".*", 0.5),), budget="flops"),
            ("config.x.budget", "flops"),
        ),
        (
            dict(rules=((".*", 0.5),), schedule=dict(name="manual", thresholds=(0.5,))),
            ("config.x.schedule.name", "manual"),
        ),
    ],
)
def test_wrong_settings_are_named(fields, refusal):
    with tiny.refused(*refusal):
        settings(**fields)


def test_cuts_that_cannot_be_are_named_before_anything_runs(problem, trained, tmp_path):
    cut = pipeline.stage("cut", schedule=dict(name="manual", thresholds=(0.1, 0.5)))
    config = tiny.config("fit", "cut", cut=cut)
    with tiny.refused("config.cut.schedule.thresholds", [0.1, 0.5]):
        pipeline.run(config, tmp_path / "run")
    config = tiny.config("fit", "cut", cut=pipeline.stage("cut", exclude="params/conv.*"))
    with tiny.complains(r"config\.cut\.exclude is 'params/conv\.\*', which matches no"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with tiny.refused("ratio"):
        run(problem, trained, ratio=0.99)
    with tiny.complains(r"1 of 24 channels of layer 'params/dense1' are to stay"):
        run(problem, trained, rules=((".*", 0.98),))
    for fields, refusal in (
        (
            dict(ratio=0.99),
            ("ratio",),
        ),
        (
            dict(ratio=0.99, budget="parameters"),
            ("ratio",),
        ),
        (
            dict(rules=((".*", 0.98),)),
            ("rules",),
        ),
    ):
        with tiny.refused(*refusal):
            settings(**fields).check_network(problem, 3)
    settings(ratio=0.925).check_network(problem, 3)
    settings(ratio=0.99, protect="original_resnet").check_network(problem, 3)
    with tiny.refused("rules"):
        settings(rules=((".*1", 0.5),)).check_network(problem)


def handing_on(*names, **fields):
    """A config whose trainings hand on their momentum and what they track."""
    momentum = dict(tiny.SGD, momentum=0.9)
    fit = dict(epochs=1, batch_size=32, optimizer=momentum, carry=True, **fields)
    return tiny.config(
        *names,
        fit=pipeline.stage("train", track=dict(name="saliency", track_batches=2), **fit),
        final=pipeline.stage("train", **fit),
        cut=pipeline.stage("cut", measure="biased_loss_tracked"),
        loss=pipeline.stage("cut", measure="loss_based", imp_samples=64),
    )


def test_momentum_and_tracked_importance_go_through_cuts(tmp_path, monkeypatch):
    handed, cut_before, original = [], [], cuts.Cut.run

    def seen(self, problem, state, place):
        cut_before.append(state)
        for update in original(self, problem, state, place):
            handed.append(update.state)
            yield update

    monkeypatch.setattr(cuts.Cut, "run", seen)
    config = handing_on("fit", "cut", "fit", "cut", "final")
    whole = pipeline.run(config, tmp_path / "whole")
    for before, after in zip(cut_before, handed, strict=True):
        trees_of = lambda state: (state.opt_state.momentum["buffer"], state.opt_state.saliency)
        for old, new in zip(trees_of(before), trees_of(after), strict=True):
            masked = jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf, 0), old, after.masks)
            tiny.same(new, masked)
            assert float(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(masked))) > 0
        assert int(after.opt_state.momentum["step"]) > 0
    steps = [int(state.opt_state.momentum["step"]) for state in handed]
    assert steps[1] == 2 * steps[0]
    assert whole.state.opt_state == ()
    monkeypatch.setattr(cuts.Cut, "run", broken_at_second(original))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, tmp_path / "half")
    monkeypatch.setattr(cuts.Cut, "run", original)
    again = pipeline.run(config, tmp_path / "half")
    tiny.same(again.state.params, whole.state.params)
    assert tiny.timeless(again.rows) == tiny.timeless(tiny.read_back(whole.rows))


def broken_at_second(original):
    calls = []

    def run_cut(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from original(*arguments)

    return run_cut


def test_tracking_multiplies_by_the_distance_while_training():
    problem = tiny.problem(tiny.digits(train_limit=64))

    def tracked(**distance):
        """(weights before, weights after, what was tracked on the way)."""
        fit = tiny.fit(track=dict(name="saliency", alpha=1.0, track_batches=1, **distance))
        state, _ = tiny.trained(problem, fit)
        return tiny.start(problem, fit)[0].params, state.params, fit.hand_on(state.opt_state)

    start, end, plain = tracked()
    zeros = jax.tree.map(np.zeros_like, start)
    for init, use_init in ((zeros, False), (start, True)):
        _, _, found = tracked(use_l2=True, use_init=use_init)
        distance = lambda s, w, w0: np.asarray(s) * np.abs(np.asarray(w) - np.asarray(w0))
        expected = jax.tree.map(distance, plain.saliency, end, init)
        close = lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-9)
        jax.tree.map(close, found.saliency, expected)
        assert max(leaf.max() for leaf in jax.tree.leaves(expected)) > 1e-7


def test_what_nothing_hands_on_is_named(tmp_path):
    config = handing_on("fit", "cut") | dict(
        fit=pipeline.stage("train", epochs=1, optimizer=tiny.SGD)
    )
    with tiny.complains(r"config\.cut\.measure is 'biased_loss_tracked', which the training right"):
        pipeline.run(config, tmp_path / "x")
    config = handing_on("fit", "cut")
    config["cut"]["use_l2"] = True
    with tiny.refused("config.cut.use_l2", True):
        pipeline.run(config, tmp_path / "x")
    config["fit"]["track"] |= dict(use_l2=True, use_init=True)
    with tiny.refused("config.cut.use_init", False):
        pipeline.run(config, tmp_path / "x")
    config["fit"]["track"] |= dict(use_l2=False)
    with tiny.refused("config.fit.track.use_init", True):
        pipeline.run(config, tmp_path / "x")
    with tiny.refused("config.fit.carry", True):
        plans.check_member(
            handing_on("fit")
            | dict(fit=pipeline.stage("train", epochs=1, optimizer=tiny.SFW, carry=True))
        )


# compact ------------------------------------------------------------------------------------------


def test_taking_stock(problem, trained):
    state, _ = run(problem, trained, ratio=0.5)
    same, row = run(problem, state, "compact", repeats=3, batch_size=16)
    tiny.same(same.params, state.params)
    loss_and_accuracy = train.evaluate(problem, state.params, state.batch_stats, "test")
    assert row["accuracy"] == pytest.approx(float(loss_and_accuracy[1]), abs=1e-6)
    assert row["difference"] < 1e-5
    a, b = row["kept"]["params/dense1"], row["kept"]["params/dense2"]
    assert row["parameters_compact"] == 64 * a + a + a * b + b + b * 10 + 10
    assert row["flops_compact"] == 2 * (64 * a + a * b + b * 10)
    assert row["bytes_compact"] == 4 * row["parameters_compact"]
    assert row["parameters"] == 64 * 24 + 24 + 24 * 16 + 16 + 160 + 10
    assert row["verdict"] in ("faster", "slower", "no measurable difference")
    assert (
        row["milliseconds_low"]["dense"]
        <= row["milliseconds"]["dense"]
        <= row["milliseconds_high"]["dense"]
    )
    _, row = run(problem, state, "compact", repeats=0)
    assert "milliseconds" not in row


def test_a_network_without_cuts_is_compact_already(problem, trained):
    _, row = run(problem, trained, "compact", repeats=0)
    assert row["parameters"] == row["parameters_compact"]
    assert row["flops"] == row["flops_compact"]


def test_what_cannot_be_compacted_is_a_row_with_a_warning(problem, trained):
    """The run goes on to its report."""
    empty = trained._replace(masks=jax.tree.map(jnp.zeros_like, trained.masks))
    _, row = run(problem, empty, "compact")
    assert "keep['params/dense1'] keeps none of" in row["warning"]
    wrong = trained._replace(masks=jax.tree.map(jnp.ones_like, trained.masks))
    wrong.masks["dense1"]["kernel"] = wrong.masks["dense1"]["kernel"].at[:, 0].set(False)
    wrong.masks["dense1"]["bias"] = wrong.masks["dense1"]["bias"].at[0].set(False)
    _, row = run(problem, wrong, "compact", repeats=0)
    assert "logits differ" in row["warning"]  # masked by name only: the weights are still there
    assert row["difference"] > row["tolerance"] == 1e-4


def test_rounding_follows_the_arithmetic_not_the_type_of_the_weights(problem):
    of = lambda **types: problem._replace(model=models.build(name="mlp", num_classes=10, **types))
    assert (
        compaction.rounding_of(of(dtype="bfloat16"))
        > compaction.rounding_of(of(dtype="float16"))
        > 1e-3
    )
    assert (
        compaction.rounding_of(of(param_dtype="bfloat16")) == compaction.rounding_of(of()) == 1e-4
    )
