"""Whole runs in one process: checked configs, sweeps, exact resume from any interruption."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import (
    ancestry,
    checkpoint,
    data,
    evaluate,
    optim,
    pipeline,
    plans,
    progress,
    report,
    runs,
    stopping,
    tables,
    train,
    workdirs,
)

DYNAMIC = dict(tiny.SFW, schedule=dict(name="dynamic_change"))
SEEDS = dict(sweep=dict(seed=(0, 1)))
ARMS = {
    "sgd": dict(label="SGD", fit=dict(optimizer=dict(tiny.SGD, learning_rate=0.05))),
    "sfw": dict(
        fit=dict(optimizer=dict(DYNAMIC, constraint=tiny.BALL)),
        again=dict(optimizer=tiny.IN_BALL),
    ),
}
GRID = dict(sweep=dict(arms=ARMS, seed=(0, 1)))
LOOP = dict(sweep=dict(seed=(0, 1), mode="loop"))


def stage(**fields):
    return pipeline.stage("train", **dict(epochs=2, batch_size=32, optimizer=tiny.SGD) | fields)


GROW = pipeline.stage(  # three steps of picking, three of pushing, two at rest; two a call
    "grow",
    method="greg2",
    ratios="[0:0.5]",
    optimizer=tiny.SGD,
    batch_size=32,
    update_every=1,
    granularity_pick=0.05,
    granularity_prune=1.0,
    upper_limit_pick=0.15,
    upper_limit=3.0,
    stabilize_steps=2,
    log_every=2,
)
GEOMETRY = {  # stages for few products on few digits
    "limit": pipeline.stage("limit", scan=(0.5,), resolution=0.25),
    "path": pipeline.stage("path", ratios=(0.5,)),
    "rows": pipeline.stage("row_norms", num_weights=2),
    "hessian": pipeline.stage("spectrum", num_matvecs=3),
    "newton": pipeline.stage("spectrum", num_matvecs=5, operator="gauss_newton", stop_width=0.2),
    "width": pipeline.stage("width", batch_size=16),
}


def geometric(*names, **fields):
    return tiny.config(*names, **{**GEOMETRY, **fields})


# Mistakes -----------------------------------------------------------------------------------------

MISTAKES = {
    "unknown field": (dict(epocs=3), "config", "epocs"),
    "near field": (
        dict(swep={}),
        "config",
        "swep",
        "sweep",
    ),
    "missing field": (dict(data=None), "config.data", None),
    "unknown stage field": (
        dict(fit=stage() | dict(epocs=3)),
        "config.fit",
        "epocs",
        "epochs",
    ),
    "missing stage field": (
        dict(fit=dict(kind="train", epochs=1)),
        "config.fit.optimizer",
    ),
    "unknown kind": (
        dict(fit=stage() | dict(kind="tran")),
        "config.fit.kind",
        "tran",
        "train",
    ),
    "unknown model": (
        dict(model=dict(name="mpl")),
        "config.model.name",
        "mpl",
        "mlp",
    ),
    "model name of a wrong type": (
        dict(model=dict(name=["mlp"])),
        "config.model.name",
        ["mlp"],
        "mlp",
    ),
    "unknown model field": (
        dict(model=dict(name="mlp", width=(8,))),
        "config.model",
        "width",
        "widths",
    ),
    "unknown init": (
        dict(model=dict(name="mlp", init="torhc")),
        "config.model.init",
        "torhc",
        "torch",
    ),
    "unknown optimizer": (
        dict(fit=stage(optimizer=dict(name="sgf"))),
        "config.fit.optimizer.name",
        "sgf",
        "sgd",
    ),
    "unknown schedule": (
        dict(fit=stage(optimizer=dict(tiny.SGD, schedule=dict(name="cosin")))),
        "config.fit.optimizer.schedule.name",
        "cosin",
        "cosine",
    ),
    "unknown constraint": (
        dict(fit=stage(optimizer=dict(tiny.SFW, constraint=dict(name="k_spars")))),
        "config.fit.optimizer.constraint.name",
        "k_spars",
        "k_sparse",
    ),
    "unknown data": (dict(data=dict(name="digit")), "config.data.name"),
    "unknown data field": (
        dict(data=dict(name="digits", limit=3)),
        "config.data",
        "limit",
        "test_limit",
    ),
    "unknown selection": (
        dict(curve=pipeline.stage("curve", selection="globl")),
        "config.curve.selection",
        "globl",
        "global",
    ),
    "wrong type": (
        dict(fit=stage(epochs="3")),
        "config.fit.epochs",
        "3",
    ),
    "wrong common type": (
        dict(eval_batch_size=1.5),
        "config.eval_batch_size",
        1.5,
    ),
    "wrong choice": (
        dict(platform="tpuu"),
        "config.platform",
        "tpuu",
        "tpu",
    ),
    "out of range": (dict(fit=stage(epochs=0)), "config.fit.epochs", 0),
    "momentum out of range": (
        dict(fit=stage(optimizer=dict(tiny.SGD, momentum=1.5))),
        "config.fit.optimizer.momentum",
        1.5,
    ),
    "Frank-Wolfe rate": (
        dict(fit=stage(optimizer=dict(tiny.SFW, learning_rate=2))),
        "config.fit.optimizer.learning_rate",
        2.0,
    ),
    "swept seed": (
        dict(sweep=dict(seed=(0, 1.5))),
        "config.sweep.seed",
        1.5,
    ),
    "idle seed": (
        dict(seed=7, sweep=dict(seed=(0, 1))),
        "config.seed",
        7,
    ),
    "flat sweep": (
        dict(sweep={"fit.epochs": (1, 2)}),
        "config.sweep",
        "fit.epochs",
    ),
    "not data": (dict(title=object()), "config.title", ...),
    "no pipeline": (dict(pipeline=()), "config.pipeline", ()),
    "absent stage": (
        dict(pipeline=("fti", "curve")),
        "config.pipeline",
        "fti",
        "fit",
    ),
    "nothing trained": (
        dict(pipeline=("curve", "fit")),
        "config.pipeline",
        "curve",
    ),
    "retrain with no training": (
        dict(curve=pipeline.stage("curve", retrain="cut")),
        "config.curve.retrain",
        "cut",
    ),
    "retrain from scratch": (
        dict(curve=pipeline.stage("curve", retrain="again"), again=stage(start="init")),
        "config.curve.retrain",
        "again",
    ),
    "sweep of nothing": (
        dict(sweep=dict(fit=dict(epocs=(1, 2)))),
        "config.sweep.fit",
        "epocs",
        "epochs",
    ),
    "sweep of no list": (
        dict(sweep=dict(seed=3)),
        "config.sweep.seed",
        3,
    ),
    "sweep of the network": (
        dict(sweep=dict(model=dict(widths=([8], [9])))),
        "config.sweep",
        "model",
    ),
    "sweep of another program": (
        dict(sweep=dict(fit=dict(epochs=(1, 2)), mode="vmap")),
        "config.sweep",
        ["fit.epochs"],
    ),
    "sweep of a retraining's length": (
        dict(
            pipeline=("fit", "retrained"),
            sweep=dict(again=dict(epochs=(1, 2)), mode="vmap"),
        ),
        "config.sweep",
        ["again.epochs"],
    ),
    "unknown arm": (
        dict(sweep=dict(arms=ARMS, arm=("sgd", "sfv"))),
        "config.sweep.arm",
        "sfv",
        "sfw",
    ),
    "no list of arms": (
        dict(sweep=dict(arms=ARMS, arm="sgd")),
        "config.sweep.arm",
        "sgd",
    ),
    "arms in no dict": (
        dict(sweep=dict(arms=("sgd",))),
        "config.sweep.arms",
        ["sgd"],
    ),
    "arm of no stages": (
        dict(sweep=dict(arms=dict(a=3))),
        "config.sweep.arms.a",
        3,
    ),
    "label of an arm": (
        dict(sweep=dict(arms=dict(a=dict(label=1)))),
        "config.sweep.arms.a",
        {"label": 1},
    ),
    "arm of an unknown stage": (
        dict(sweep=dict(arms=dict(a=dict(fti=dict(epochs=1))))),
        "config.sweep.arms.a",
        "fti",
        "fit",
    ),
    "arm of a value": (
        dict(sweep=dict(arms=dict(a=dict(fit=1)))),
        "config.sweep.arms.a.fit",
        1,
    ),
    "arm of an unknown field": (
        dict(sweep=dict(arms=dict(a=dict(fit=dict(epocs=1))))),
        "config.fit",
        "epocs",
        "epochs",
    ),
    "arms of the same label": (
        dict(sweep=dict(arms=dict(a=dict(label="b"), b={}))),
        "config.sweep.arms.b.label",
        "b",
    ),
    "value in an arm": (
        dict(sweep=dict(arms=dict(a=dict(fit=dict(epochs=0))))),
        "config.fit.epochs",
        0,
    ),
    "member that is not there": (
        dict(sweep=dict(seed=(0, 1), members=(2,))),
        "config.sweep.members",
        (2,),
    ),
    "arm of another program": (
        dict(sweep=dict(arms=ARMS, mode="vmap")),
        "config.sweep",
    ),
    "value in a sweep": (
        dict(sweep=dict(fit=dict(epochs=(1, 0)))),
        "config.fit.epochs",
        0,
    ),
    "prediction before its spectrum": (
        dict(pipeline=("fit", "width", "hessian")) | GEOMETRY,
        "config.pipeline",
        "width",
    ),
    "unknown spectrum": (
        dict(
            GEOMETRY,
            pipeline=("fit", "hessian", "width"),
            width=pipeline.stage("width", spectrum="hesian"),
        ),
        "config.width.spectrum",
        "hesian",
        "hessian",
    ),
    "later spectrum": (
        geometric(
            "fit", "hessian", "width", "newton", width=pipeline.stage("width", spectrum="newton")
        ),
        "config.width.spectrum",
        "newton",
    ),
    "nothing that tolerates": (
        dict(pipeline=("fit", "newton"), newton=GEOMETRY["newton"]),
        "config.newton.stop_width",
        0.2,
    ),
    "start from nowhere": (
        dict(start_from="nowhere"),
        "config.start_from",
        "nowhere",
    ),
}
LATE_MISTAKES = {  # found when the data and devices are known, still before anything compiles
    "mesh": (dict(mesh=99), "config.mesh", 99),
    "batch": (
        dict(fit=stage(batch_size=129)),
        "config.fit.batch_size",
        129,
    ),
    "batch of retraining": (
        dict(curve=pipeline.stage("curve", retrain="again"), again=stage(batch_size=500)),
        "config.again.batch_size",
        500,
    ),
    "batch in a sweep": (
        dict(sweep=dict(fit=dict(batch_size=(32, 200)), mode="loop")),
        "config.fit.batch_size",
        200,
    ),
    "batch on a mesh": (
        dict(mesh=8, fit=stage(batch_size=12)),
        "config.fit.batch_size",
        12,
    ),
    "absent parameters": (
        dict(
            pipeline=("fit", "hessian"), hessian=pipeline.stage("spectrum", parameters="dense2/.*")
        ),
        "config.hessian.parameters",
        "dense2/.*",
        "dense1/bias",
    ),
    "rows of no kernel": (
        dict(pipeline=("fit", "rows"), rows=pipeline.stage("row_norms", parameters=".*/bias")),
        "config.rows.parameters",
        ".*/bias",
    ),
    "one batch": (
        geometric("fit", "hessian", "width", width=pipeline.stage("width", batch_size=65)),
        "config.width.batch_size",
        65,
    ),
    "idle rule": (
        dict(
            fit=stage(
                optimizer=dict(
                    tiny.SFW, constraint=dict(tiny.POLYTOPE, rules=[["conv.*", dict(name="l2")]])
                )
            )
        ),
        "config.fit.optimizer.constraint.rules[0]",
        "conv.*",
    ),
}


@pytest.mark.parametrize(
    ("mistake", "not_reached"),
    [(mistake, "build") for mistake in MISTAKES]  # nothing is loaded
    + [(mistake, "tell_environment") for mistake in LATE_MISTAKES],  # nothing is compiled
)
def test_mistakes_stop_before_a_run(mistake, not_reached, tmp_path, monkeypatch):
    fields, *refusal = {**MISTAKES, **LATE_MISTAKES}[mistake]
    monkeypatch.setattr(pipeline, not_reached, lambda *_: pytest.fail("went on"))
    with tiny.refused(*refusal):
        pipeline.run(tiny.config(**dict(pipeline=("fit", "curve")) | fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # the corrected config may use it


def test_a_config_needs_only_data_a_model_and_stages():
    (plan,) = pipeline.check(tiny.config("fit"))
    assert [member.config["seed"] for member in plan.members] == [0]
    assert not pipeline.base(pipeline=("fit",)).sweep
    with tiny.refused("kind", "tran", "train"):
        pipeline.stage("tran")


# Sweeps -------------------------------------------------------------------------------------------


def test_sweeps_combine_all_values():
    sweep = dict(seed=(0, 1), fit=dict(optimizer=dict(learning_rate=(0.1, 0.3))))
    (plan,) = pipeline.check(tiny.config("fit", sweep=sweep))
    found = [tuple(member.swept.values()) for member in plan.members]
    assert found == [(0, 0.1), (0, 0.3), (1, 0.1), (1, 0.3)]
    rates = [member.config["fit"]["optimizer"]["learning_rate"] for member in plan.members]
    assert rates == [0.1, 0.3, 0.1, 0.3]
    numbers_of = lambda **fields: [
        plan.numbers for plan in pipeline.check(tiny.config("fit", **fields))
    ]
    alone = [[0], [1], [2], [3]]
    assert numbers_of(sweep=dict(sweep, mode="loop")) == alone
    assert numbers_of(sweep=sweep, model=dict(name="small_cnn")) == alone
    # those of one program side by side, if they follow each other
    assert numbers_of(sweep=dict(fit=dict(epochs=(1, 2)), seed=(0, 1))) == [[0, 1], [2, 3]]
    assert numbers_of(sweep=dict(seed=(0, 1), fit=dict(epochs=(1, 2)))) == alone
    assert numbers_of(sweep=dict(sweep, members=(1, 3))) == [[0, 1]]


def test_both_modes_of_a_sweep_give_the_rows_of_single_runs(tmp_path):
    sweep = dict(fit=dict(optimizer=dict(learning_rate=(0.02, 0.2))))
    together = pipeline.run(tiny.config("fit", "curve", sweep=sweep), tmp_path / "vmap")
    compiled = []
    once = train.Problem.once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train.Problem,
            "once",
            lambda self, name, make: once(self, name, spy(make, name, compiled)),
        )
        loop = pipeline.run(
            tiny.config("fit", "curve", sweep=dict(sweep, mode="loop")), tmp_path / "loop"
        )
    assert len(compiled) == len(set(compiled))  # both members share every program
    assert len(together.rows) == len(loop.rows) == 10
    of = lambda rows, rate: [row for row in rows if row["fit.optimizer.learning_rate"] == rate]
    whole = tiny.config("fit", "curve", sweep=sweep)
    for number, rate in enumerate((0.02, 0.2)):
        single = pipeline.run_member(whole, tmp_path / "alone", number).rows
        if number == 0:
            with tiny.refused("--workdir", str(tmp_path / "alone"), allowed="--member"):
                pipeline.run(whole, tmp_path / "alone")  # would train both in one program
        for a, b, c in zip(of(together.rows, rate), of(loop.rows, rate), single, strict=True):
            assert (a["stage"], a.get("epoch"), a.get("ratio")) == (
                c["stage"],
                c.get("epoch"),
                c.get("ratio"),
            )
            loss = "train_loss" if a["stage"] == "fit" else "loss"
            assert_allclose([a[loss], b[loss]], c[loss], rtol=1e-4)
            assert b[loss] == c[loss]  # the very same program
    assert {row["member"] for row in loop.rows} == {0, 1}
    found = runs.load(tmp_path / "alone").groupby("fit.optimizer.learning_rate")["loss"].last()
    assert found.to_list() == [of(loop.rows, rate)[-1]["loss"] for rate in (0.02, 0.2)]
    with tiny.refused("--member", 2, allowed="0 to 1"):
        pipeline.run_member(whole, tmp_path / "alone", 2)
    with tiny.complains("another config"):
        pipeline.run_member({**whole, "seed": 1}, tmp_path / "alone", 0)
    assert pipeline.run(whole, tmp_path / "alone").rows  # finished
    measured = [row["swept"] for row in evaluate.run(tmp_path / "alone")]
    assert measured == [{"fit.optimizer.learning_rate": rate} for rate in (0.02, 0.2)]


def test_networks_with_convolutions_are_known_by_their_shapes():
    dense = {
        name: not plans.convolves(dict(name=name))
        for name in ("mlp", "fc12", "lenet", "alexnet", "resnet18")
    }
    assert dense == dict(mlp=True, fc12=True, lenet=False, alexnet=False, resnet18=False)


def test_arms_replace_whole_fields_and_name_their_rows():
    plans = pipeline.check(tiny.config("fit", "retrained", **GRID))
    assert [[member.swept for member in plan.members] for plan in plans] == [
        [dict(arm=label, seed=seed) for seed in (0, 1)] for label in ("SGD", "sfw")
    ]  # one program per optimizer, its seeds side by side
    first, last = plans[0].members[0].config, plans[-1].members[-1].config
    assert (
        first["fit"]["optimizer"]["learning_rate"],
        first["again"]["optimizer"]["learning_rate"],
    ) == (0.05, 0.01)
    assert last["fit"]["optimizer"] == pipeline.plain(dict(DYNAMIC, constraint=tiny.BALL))
    assert (last["seed"], last["fit"]["epochs"]) == (1, 2)
    assert len({plan.settings["fit"][0].program() for plan in plans}) == 2
    named = {
        name: dict(fit=dict(label=name, optimizer=dict(tiny.SGD, learning_rate=rate)))
        for name, rate in (("a", 0.1), ("b", 0.2))
    }
    plans = pipeline.check(tiny.config("fit", sweep=dict(arms=named)))
    assert len(plans) == 1  # neither labels nor numbers make another program
    (plan,) = pipeline.check(tiny.config("fit", sweep=dict(arms=ARMS, arm=("sfw",))))
    assert [member.swept for member in plan.members] == [dict(arm="sfw")]


@pytest.mark.parametrize("name", ["train", "sfw_init", "cut", "remove"])
def test_stages_with_nested_options_run_side_by_side(name):
    """What decides whether members share a program can be compared, whatever lists and dicts a
    config holds.
    """
    fields = {
        "train": dict(epochs=1, optimizer=tiny.SGD, track=dict(name="saliency")),
        "sfw_init": dict(constraint=dict(tiny.POLYTOPE, rules=((".*", tiny.POLYTOPE),))),
        "cut": dict(schedule=dict(name="manual", thresholds=(0.5,))),
        "remove": dict(ratios=((".*kernel", 0.5),)),
    }
    config = tiny.config(
        "fit", "own", own=pipeline.stage(name, **fields[name]), sweep=dict(seed=(0, 1))
    )
    (plan,) = pipeline.check(config)
    assert len({own.together() for own in plan.settings["own"]}) == 1


def test_a_sweep_may_list_whole_dicts():
    chosen = (tiny.SGD, tiny.SFW, dict(tiny.SGD, nesterov=True))
    sweep = dict(fit=dict(optimizer=chosen, loss=(dict(name="cross_entropy"),)))
    plans = pipeline.check(tiny.config("fit", sweep=sweep))
    swept = [plan.members[0].swept for plan in plans]
    assert [values["fit.optimizer"] for values in swept] == ["sgd 1", "sfw", "sgd 3"]
    assert {values["fit.loss"] for values in swept} == {"cross_entropy"}
    optimizers = [plan.members[0].config["fit"]["optimizer"] for plan in plans]
    assert optimizers == pipeline.plain(dict(found=chosen))["found"]


def test_arms_are_one_program_per_optimizer_and_give_the_rows_of_single_runs(tmp_path, monkeypatch):
    step, traced = train.step_on_batch, []
    monkeypatch.setattr(
        train, "step_on_batch", lambda *given: traced.append(given[1].program()) or step(*given)
    )
    config = tiny.config("fit", "retrained", **GRID)
    problem = tiny.BUILD(pipeline.check(config))  # nothing is compiled yet
    monkeypatch.setattr(pipeline, "build", lambda _: problem)
    rows = pipeline.run(config, tmp_path / "arms").rows
    # training and retraining, of either optimizer
    assert len(traced) == len(set(traced)) == 4
    alone = dict(sweep=dict(arms=ARMS, arm=("sfw",), seed=(0, 1), mode="loop"))
    single = pipeline.run(config | alone, tmp_path / "sfw").rows
    found = [
        [row for seed in (0, 1) for row in made if (row["arm"], row["seed"]) == ("sfw", seed)]
        for made in (rows, single)
    ]
    assert len(single) == len(found[0]) == 2 * (2 + 3)
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys()
        assert not any(isinstance(value, dict) for name, value in a.items() if name != "layers")
        for name in ("train_loss", "learning_rate") if a["stage"] == "fit" else ("loss",):
            assert_allclose(a[name], b[name], rtol=1e-4)


def spy(make, name, compiled):
    def made():
        compiled.append(name)
        return make()

    return made


# One run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, workdir, outcome) of a run over all kinds of stages."""
    workdir = tmp_path_factory.mktemp("run") / "deep" / "finished"
    config = tiny.config(
        "learn", "fit", "curve", "weights", "cut", "again", "curve", title="All stages"
    )
    with tiny.pages(True), tiny.sketches():
        return config, workdir, pipeline.run(config, workdir)


def test_rows_say_where_they_come_from(finished):
    _, workdir, outcome = finished
    order = (
        ["learn"] * 3 + ["fit"] * 2 + ["curve"] * 3 + ["weights", "cut", "again"] + ["curve"] * 2
    )
    assert [row["stage"] for row in outcome.rows] == order
    assert [row["visit"] for row in outcome.rows if row["stage"] == "curve"] == [1, 1, 1, 2, 2]
    assert {row["arm"] for row in outcome.rows[:10]} == {"fit"}
    assert {row["arm"] for row in outcome.rows[10:]} == {"again"}
    assert {row["member"] for row in outcome.rows} == {0}
    assert report.read_rows(workdir / "metrics.jsonl") == tiny.read_back(outcome.rows)
    assert "All stages" in (workdir / "report.html").read_text(encoding="utf-8")
    first, second = (
        [r for r in outcome.rows if r["kind"] == "curve" and r["visit"] == v] for v in (1, 2)
    )
    assert first[1]["num_kept"] == second[0]["num_kept"] == 592  # cut in half for good
    assert outcome.state.opt_state == ()


def test_a_finished_run_is_not_repeated(finished, monkeypatch, pages, sketches):
    config, workdir, outcome = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    page = (workdir / "report.html").read_bytes()
    monkeypatch.setattr(train, "steps_in_memory", lambda *_: pytest.fail("it trained again"))
    monkeypatch.setattr(train, "evaluation", lambda *_: pytest.fail("it evaluated again"))
    again = pipeline.run(config, workdir)
    tiny.same(again.state, outcome.state)
    assert again.rows == tiny.read_back(outcome.rows)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert (workdir / "report.html").read_bytes() == page


def test_a_workdir_of_another_config_is_refused_and_kept(finished):
    config, workdir, _ = finished
    before = {path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()}
    other = config | dict(fit=stage(epochs=3), seed=1, more=pipeline.stage("histogram"))
    with pytest.raises(tables.ConfigError) as error:
        pipeline.run(other, workdir)
    message = str(error.value)
    assert "holds a run of another config; use another --workdir" in message
    assert "config.fit.epochs: 2 there, 3 now" in message
    assert "config.seed: absent there, 1 now" in message
    assert "config.more: absent there" in message
    assert "config.curve" not in message
    assert before == {
        path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()
    }


def test_a_damaged_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with tiny.complains(r"config\.json is not readable as JSON .*; use another folder"):
        pipeline.run(tiny.config("fit"), tmp_path)


def test_eight_devices_train_and_resume(tmp_path):
    config = tiny.config("fit", "curve", mesh=0, fit=stage(optimizer=tiny.IN_BALL))
    outcome = pipeline.run(config, tmp_path / "eight")
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(outcome.state.params))
    tiny.same(pipeline.run(config, tmp_path / "eight").state, outcome.state)


def test_a_member_that_diverges_does_not_stop_the_others(tmp_path, pages, sketches):
    sweep = dict(fit=dict(optimizer=dict(learning_rate=(1e20, 0.1))))
    config = tiny.config("fit", sweep=dict(sweep, mode="loop"))
    for _ in range(2):  # the second time the others are finished
        with pytest.raises(
            train.NonFiniteLossError,
            match=r"^member 0: fit: the training loss is not finite at step",
        ):
            pipeline.run(config, tmp_path)
        _, rows, _ = report.gather(tmp_path)
        assert [(row["member"], row["epoch"]) for row in rows] == [(1, 1), (1, 2)]
        assert (tmp_path / "report.html").is_file()


def test_another_device_than_the_process_already_uses_is_refused(tmp_path):
    before = jax.config.jax_platforms
    try:
        with tiny.complains(r"platform is 'gpu', but (this process already|jax finds no)"):
            pipeline.run(tiny.config("fit", platform="gpu"), tmp_path / "run")
    finally:
        jax.config.update("jax_platforms", before)
    assert not (tmp_path / "run").exists()


# Starting from another run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """(workdir, outcome) of a run that trains and predicts."""
    workdir = tmp_path_factory.mktemp("analysed")
    return workdir, pipeline.run(geometric("fit", "hessian", "width"), workdir)


def plain_rows(outcome, *names):
    """Rows of these stages as read back, without times and arms."""
    rows = tiny.timeless(tiny.read_back(outcome.rows))
    return [{n: v for n, v in row.items() if n != "arm"} for row in rows if row["stage"] in names]


def test_stages_on_a_finished_run_give_the_numbers_of_one_pipeline(analysed, tmp_path, monkeypatch):
    workdir, whole = analysed
    pipeline.run(geometric("fit"), tmp_path / "fit")
    # each stage in the place it has above, which decides its random numbers
    names = ("weights", "hessian", "width", "limit", "path", "rows", "curve")
    config = geometric(*names, start_from=str(tmp_path / "fit"))
    later = pipeline.run(config, tmp_path / "later")
    assert plain_rows(later, "hessian", "width") == plain_rows(whole, "hessian", "width")
    assert {row["stage"] for row in later.rows} == set(names)
    assert {row["arm"] for row in later.rows} == {
        "network"
    }  # nothing is trained: one network, one line in the report
    tiny.same(later.state.params, whole.state.params)
    rows = pipeline.run(config, tmp_path / "later").rows
    assert tiny.timeless(rows) == tiny.timeless(tiny.read_back(later.rows))
    with tiny.pages(True), tiny.sketches():  # a report without any training
        alone = pipeline.run(geometric("width", start_from=str(workdir)), tmp_path / "alone")
    assert 'id="prediction"' in (tmp_path / "alone" / "report.html").read_text(encoding="utf-8")
    drawn = ("epsilon_error", "low", "high")  # by the stage's place
    without = lambda rows: [{n: v for n, v in row.items() if n not in drawn} for row in rows]
    assert without(plain_rows(alone, "width")) == without(plain_rows(whole, "width"))


def test_a_stage_made_anew_replaces_that_of_the_run_it_started_from(analysed, tmp_path):
    deeper = pipeline.stage("spectrum", num_matvecs=5)
    config = geometric(
        "width", "hessian", "again", "width", start_from=str(analysed[0]), hessian=deeper
    )
    rows = [row for row in pipeline.run(config, tmp_path).rows if row["stage"] == "width"]
    assert [(row["num_matvecs"], row["num_probes"]) for row in rows] == [(3, 1), (5, 1)]


def test_a_run_inherits_what_its_origin_inherited(analysed, tmp_path):
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    pipeline.run(geometric("weights", start_from=str(analysed[0])), first)
    (row,) = (
        row for row in pipeline.run(geometric("width", start_from=first), tmp_path / "x").rows
    )
    assert row["num_matvecs"] == 3
    deeper = pipeline.stage("spectrum", num_matvecs=5)
    pipeline.run(geometric("hessian", start_from=first, hessian=deeper), again)
    last = pipeline.run(geometric("width", start_from=again), tmp_path / "y")
    assert [(row["num_matvecs"], row["num_probes"]) for row in last.rows] == [(5, 1)]
    own_key = last.state.key + 1
    there, inherited = ancestry.continue_from(again, last.state._replace(key=own_key))
    assert_array_equal(there.key, own_key)
    assert [row["num_matvecs"] for row in inherited if row["stage"] == "hessian"] == [5]
    loop = dict(LOOP, fit=stage(epochs=1))
    pipeline.run(geometric("fit", "hessian", **loop), tmp_path / "loop")
    middle = str(tmp_path / "middle")
    pipeline.run(geometric("weights", **loop, start_from=str(tmp_path / "loop")), middle)
    rows = pipeline.run(geometric("width", **loop, start_from=middle), tmp_path / "z").rows
    assert [(row["seed"], row["num_matvecs"]) for row in rows] == [(0, 3), (1, 3)]


def test_members_start_from_the_same_members(tmp_path):
    seeds = dict(SEEDS, fit=stage(epochs=1))
    together = pipeline.run(geometric("fit", **seeds), tmp_path / "vmap")
    found = pipeline.run(
        geometric("hessian", **seeds, start_from=str(tmp_path / "vmap")), tmp_path / "after"
    )
    tiny.same(found.state.params, together.state.params)
    loop = seeds | LOOP
    pipeline.run(geometric("fit", **loop), tmp_path / "loop")
    each = pipeline.run(
        geometric("hessian", **loop, start_from=str(tmp_path / "loop")), tmp_path / "each"
    )
    assert [row["seed"] for row in each.rows] == [0, 1]
    for row, other in zip(each.rows, found.rows, strict=True):
        assert_allclose(row["alphas"], other["alphas"], rtol=1e-3, atol=1e-4)
    one = tmp_path / "loop" / "member_001"
    single = pipeline.run(geometric("hessian", seed=1, start_from=str(one)), tmp_path / "single")
    assert single.rows[0]["alphas"] == each.rows[1]["alphas"]
    for other in ("vmap", "loop"):
        with tiny.complains(r"a run of several networks; .* its sweep .*\[0, 1\]") as error:
            pipeline.check(geometric("hessian", start_from=str(tmp_path / other)))
        assert (str(one.with_name("member_000")) in str(error.value)) == (other == "loop")


def test_an_option_that_a_run_does_not_have_yet_is_its_default(analysed):
    config = json.loads((analysed[0] / "config.json").read_text())
    assert "activation" not in config["model"]
    start = lambda activation: geometric(
        "hessian", start_from=str(analysed[0]), model=config["model"] | {"activation": activation}
    )
    assert pipeline.check(start("relu"))
    with tiny.complains(r'another network\n  config\.model\.activation: "relu" there, "lin'):
        pipeline.check(start("linear"))


def test_runs_that_cannot_be_started_from_are_named(analysed, tmp_path, monkeypatch):
    start = lambda path, *names, **fields: pipeline.run(
        geometric(*(names or ("hessian",)), **fields, start_from=str(path)), tmp_path / "new"
    )
    with tiny.complains(r"which holds no run \(no config\.json\)"):
        start(tmp_path / "absent")
    with tiny.complains(r"a run of another network\n  config\.model\.widths: \[16\] there, "):
        start(analysed[0], model=dict(name="mlp", widths=(8,)))
    with tiny.refused("config.width.spectrum", "newton", allowed="hessian"):
        start(analysed[0], "width", width=pipeline.stage("width", spectrum="newton"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(geometric("fit"), tmp_path / "half")
    with tiny.complains("half', which is not finished: run it to its end first"):
        start(tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints")
    with tiny.complains("which is not finished"):
        start(tmp_path / "half")
    pipeline.run(geometric("fit"), tmp_path / "fit")
    with tiny.refused("config.pipeline", "width", allowed="'spectrum'"):
        start(tmp_path / "fit", "width")
    loop = json.loads((tmp_path / "fit" / "config.json").read_text()) | dict(
        start_from=str(tmp_path / "fit")
    )
    (tmp_path / "fit" / "SHA256SUMS").unlink()
    (tmp_path / "fit" / "config.json").write_text(json.dumps(loop))
    with tiny.complains("fit started from a run that started from it"):
        start(tmp_path / "fit")
    shutil.rmtree(tmp_path / "fit" / "checkpoints")  # the copy
    (tmp_path / "fit" / "config.json").write_text("[]")
    with tiny.complains(r"fit/config\.json holds no JSON object"):
        start(tmp_path / "fit")
    fake = tmp_path / "fake"
    shutil.copytree(analysed[0], fake)
    config = json.loads((fake / "config.json").read_text())
    (fake / "SHA256SUMS").unlink()
    (fake / "config.json").write_text(
        json.dumps(config | {"model": {"name": "mlp", "widths": [8]}})
    )
    with tiny.complains(r"fake', whose params/dense1/bias has the shape \(16,\); allowed: \(8,\)"):
        start(fake, model=dict(name="mlp", widths=(8,)))
    assert not (tmp_path / "new").exists()


# Interruptions ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nobody catches it, so nothing is saved on the way out."""


RESUMED = {  # every kind of state and of stage, alone and side by side
    "sfw": tiny.config(
        *("learn", "fit", "cut", "again", "weights"),
        fit=stage(optimizer=dict(DYNAMIC, constraint=tiny.BALL)),
        steps_per_call=3,
    ),
    "spectrum": geometric(
        *("fit", "limit", "hessian", "newton", "width"),
        fit=stage(epochs=1),
        hessian=pipeline.stage("spectrum", num_matvecs=2, num_probes=2, reorthogonalize="host"),
    ),
    "curves of members": tiny.config(
        *("learn", "fit", "retrained", "curve"),
        curve=pipeline.stage("curve", ratios=tuple(i / 40 for i in range(40))),
        **SEEDS,
    ),
    "growth of members": geometric(
        *("fit", "hessian", "grow", "again"),
        fit=stage(epochs=1),
        grow=GROW,
        hessian=pipeline.stage("spectrum", num_matvecs=2, operator="absolute"),
        steps_per_call=3,
        **SEEDS,
    ),
    "loop": tiny.config("fit", "curve", sweep=dict(arms=ARMS)),
    "programs side by side": tiny.config("fit", "curve", **GRID),
}


def interrupt_at(monkeypatch, number, error):
    """The show of the update `number` (from 1) of all coming ones raises; returns how often it was
    called.
    """
    calls, show = [], progress.Display.show

    def interrupted(self, done, rows):
        calls.append(done)
        if len(calls) == number:
            raise error
        return show(self, done, rows)

    monkeypatch.setattr(progress.Display, "show", interrupted)
    return calls


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_interrupted_again_and_again_ends_the_same(case, tmp_path, monkeypatch):
    """By turns with a last save, from its first update on, and without one."""
    config, workdir = RESUMED[case] | dict(checkpoint_seconds=0.0), tmp_path / "broken"
    with monkeypatch.context() as patch:
        calls = interrupt_at(patch, 0, None)
        expected = pipeline.run(RESUMED[case], tmp_path / "whole")
    total = len(calls)
    rows = tiny.timeless(tiny.read_back(expected.rows))
    number = 1
    for turn in range(total):
        with monkeypatch.context() as patch:
            calls = interrupt_at(patch, number, Killed if turn % 2 else KeyboardInterrupt)
            with contextlib.suppress(Killed, KeyboardInterrupt):
                outcome = pipeline.run(config, workdir)
                break
        assert len(calls) == number
        number = max(total // 3, 3)
    assert turn >= 2
    assert len(calls) <= number  # it went on where it was interrupted last
    tiny.same(outcome.state, expected.state)
    assert tiny.timeless(tiny.read_back(outcome.rows)) == rows
    written, own = workdir / "metrics.jsonl", rows
    if case == "loop":
        written = workdir / "member_001" / "metrics.jsonl"
        own = [dict(row, member=0) for row in rows if row["member"]]
    assert tiny.timeless(report.read_rows(written)) == own


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    config = tiny.config("fit", "again", steps_per_call=3, checkpoint_seconds=0.0)
    expected = pipeline.run(config, tmp_path / "whole")
    save, reason = (
        checkpoint.ocp.StandardCheckpointer.save,
        "No space left on device [os_error_code='28']",
    )

    def full(self, folder, state):
        if folder.parent.name == ".writing_3":
            raise ValueError(f"RESOURCE_EXHAUSTED: Error writing: {reason}")
        return save(self, folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
        with pytest.raises(
            OSError, match=r"full/checkpoints cannot be written: No space left on device$"
        ):
            pipeline.run(config, tmp_path / "full")
    tiny.same(pipeline.run(config, tmp_path / "full").state, expected.state)


def test_a_request_to_stop_is_met_at_the_next_update(tmp_path, monkeypatch):
    config, save = tiny.config("fit", steps_per_call=1), checkpoint.Checkpoints.save

    def save_and_ask(*arguments):
        save(*arguments)
        stopping.request()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_and_ask)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(config, tmp_path)
    stopping.clear()
    progress = workdirs.newest(tmp_path).progress
    assert (progress.stage, progress.begun, progress.rows) == (0, True, [])
    assert len(pipeline.run(config, tmp_path).rows) == 2


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    wild = stage(optimizer=dict(tiny.SGD, learning_rate=1e20))
    config = tiny.config(
        "fit", "curve", "wild", wild=wild, steps_per_call=1, checkpoint_seconds=0.0
    )
    good = pipeline.run(tiny.config("fit", "curve"), tmp_path / "good")
    for _ in range(2):  # the same call finds the same step again
        with pytest.raises(
            train.NonFiniteLossError, match=r"wild: .* not finite at step [12] \(epoch 1\)"
        ):
            pipeline.run(config, tmp_path / "bad")
    saved = workdirs.newest(tmp_path / "bad")
    progress = saved.progress
    assert (progress.stage, progress.begun) == (2, True)
    assert tiny.timeless(progress.rows) == tiny.timeless(tiny.read_back(good.rows))
    fit = tiny.fit(dict(tiny.SGD, learning_rate=1e20))
    like, _ = tiny.start(tiny.problem(), fit)
    state = checkpoint.restore(saved, like)
    assert int(state.metrics.bad_step) == -1
    assert bool(np.isfinite(state.metrics.loss))


def test_optimizer_settings_have_every_field():
    made = pipeline.stage("train", epochs=1, optimizer=optim.settings("sfw"))
    assert {"momentum", "rescale", "schedule", "constraint", "norms"} <= set(made["optimizer"])
    assert made["start"] == "current"
    pipeline.check(tiny.config("fit", fit=made))


# Progress -----------------------------------------------------------------------------------------


def test_accuracy_by_chance_is_that_of_the_largest_class():
    images = np.zeros((4, 2, 2, 1), np.uint8)
    known = data.Split(images, np.array([0, 1, 1, 1], np.int32))
    dataset = data.Dataset("few", known, known, 4, (0.0,), (1.0,))
    assert progress.chance(dataset) == 0.75
    assert progress.chance(dataset._replace(test=known._replace(labels=None))) == 0.25
