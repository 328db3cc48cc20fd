"""Every config with its variants: it loads, passes all checks, and runs two steps of every training
at a tiny size.
"""

import itertools

import jax
import pytest
import tiny

from sparsity_jax import (
    data,
    describe,
    losses,
    members,
    models,
    optim,
    pipeline,
    polytopes,
    pretrained,
    tables,
    train,
)

PAGES = True  # see conftest.py


def load(name: str):
    return tiny.module(f"configs/{name}.py")


ONESHOT = load("sfw_oneshot")
CHOICES = {
    "data": ONESHOT.DATASETS,
    "arch": ONESHOT.ARCHITECTURES,
    "constraint": ONESHOT.CONSTRAINTS,
    "optimizer": ("sfw", "sgd", "adagrad_sfw"),
    "scheme": (
        "keep",
        "decrease_3",
        "decrease_3_180",
        "dynamic_change",
        "multistep",
        "cosine",
        "piecewise",
    ),
    "mode": ("initialization", "diameter", "radius"),
    "rescale": ("gradient", "diameter", "none"),
}
LIMIT = load("geometric_limit")
FLOW = load("gradient_flow")
GREG = load("greg")
VARIANTS = {
    "geometric_limit": [(), *((name,) for name in LIMIT.SETTINGS)],
    "gradient_flow": [
        (),
        *((name,) for name in FLOW.MODELS),
        (
            "vgg13,measure=grasp,data=cifar10,ratio=0.5,rounds=5,warmup=10,lr_prune=0.01,"
            "moment=0.8,seeds=3,epochs=50",
        ),
        (
            "resnet18,measure=biased_loss_tracked,track_batches=20,alpha=0.7,use_l2=1,"
            "preserve_moment=1,temperature=5",
        ),
        ("mobilenet,thresholds=[10;50;80],branches=separate",),
    ],
    "greg": [
        (),
        *((name,) for name in GREG.NETWORKS),
        *((f"resnet50,speedup={speedup}",) for speedup in GREG.NETWORKS["resnet50"].published),
        ("resnet56,method=greg2,ratio=0.9,seeds=3,base=0,finetune=0:0.01;60:0.001",),
        ("vgg19,method=l1,ratios=[0-4:0.5;7-10:0.2],pick=rand",),
        ("resnet50,method=fixreg,granularity=weight",),
        ("resnet34,ratios=0;0.5;0.6;0.4;0;0,skip=1.0;2.0,granularity=channel",),
        ("resnet56,granularity=group",),
    ],
    "quickstart": [()],
    "toy_cnn": [(), ("cnn",), ("mlp",), ("story",)],
    "sfw_oneshot": [
        (),
        (
            "lr=0.5,momentum=0.8,weight_decay=1e-4,k=5,k_frac=0.1,tau=30,sfw_init=1,"
            "epochs=3,batch_size=64",
        ),
        ("optimizer=sgd,scheme=decrease_3,arch=mlp,data=digits",),
        *((f"{key}={value}",) for key, values in CHOICES.items() for value in values),
    ],
}
ALL = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
label = lambda value: "".join(value) if isinstance(value, tuple) else value


def test_every_config_is_tried():
    assert {path.stem for path in (tiny.ROOT / "configs").glob("*.py")} == set(VARIANTS)


@pytest.mark.parametrize(("name", "variant"), ALL, ids=label)
def test_configs_pass_all_checks(name, variant, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "check", lambda **_: None)
    config = load(name).get_config(*variant)
    if config[config.pipeline[0]].kind == "grow":  # of a network that comes from elsewhere
        with tiny.refused("config.pipeline", allowed="config.start_from or config.pretrained"):
            pipeline.check(config)
        config.pretrained = str(pretrained.write(tmp_path / "weights.safetensors", {}))
    plans = pipeline.check(config)
    assert plans[0].pipeline == tuple(config.pipeline)
    assert {"init", "dtype", "param_dtype"} <= set(config.model)
    for stage in config.pipeline:  # every field is there, to be overridden
        kind = pipeline.STAGES[config[stage].kind]
        missing = {n for n, value in tables.defaults(kind).items() if value is not None} - set(
            config[stage]
        )
        assert not missing
        unset = [
            n for n, value in config[stage].items() if isinstance(value, list) or value is None
        ]
        assert not unset  # types that the command line cannot override
    described = describe.describe(config)
    for stage in config.pipeline:
        _, _, part = described.partition(f"config.{stage}, kind {config[stage].kind!r}\n")
        for option in tables.parameters(pipeline.STAGES[config[stage].kind]):
            assert f"\n  {option}: " in part


TABLES = (
    *(pipeline.STAGES, models.MODELS, optim.OPTIMIZERS, optim.SCHEDULES, optim.PENALTIES),
    *(polytopes.SETS, losses.LOSSES, train.TRACKERS),
    dict(
        data=data.Options, config=pipeline.settings, sweep=members.choices, optimizer=optim.options
    ),
)


@pytest.mark.parametrize("table", TABLES)
def test_every_option_is_explained(table):
    for name, entry in table.items():
        texts = describe.texts_of(entry)
        unexplained = [option for option in tables.parameters(entry) if not texts.get(option)]
        assert not unexplained, name


def test_describe_tells_what_a_config_chooses_by_name():
    described = describe.describe(tiny.config("fit", "learn"))
    for place in ("fit.optimizer", "learn.constraint"):
        assert f"\nconfig.{place}\n" in described
    assert "\n  label_smoothing: float >= 0.0 and <= 1.0; default 0.0\n      share" in described


def test_describe_tells_values_that_are_not_the_default():
    config = pipeline.base(
        data=dict(name="digits"),
        model=dict(name="mlp", widths=(16,)),
        pipeline=("noise",),
        noise=pipeline.stage("noise", num=3),
    )
    described = describe.describe(config)
    assert "\n  num: int >= 1 and <= 2147483647; default 10, here 3\n" in described
    assert "\n  std: float >= 0.0; default 0.01\n" in described


def test_variants_reach_their_fields():
    text = (
        "lr=0.5,momentum=0.8,weight_decay=1e-4,k=5,k_frac=0.1,tau=30,sfw_init=1,epochs=3,"
        "batch_size=64"
    )
    config = ONESHOT.get_config(text)
    optimizer = config.fit.optimizer
    assert (optimizer.learning_rate, optimizer.momentum, optimizer.weight_decay) == (0.5, 0.8, 1e-4)
    assert (optimizer.constraint.k, optimizer.constraint.k_frac, optimizer.constraint.tau) == (
        5,
        0.1,
        30.0,
    )
    assert (config.fit.epochs, config.fit.batch_size, config.pipeline[0]) == (3, 64, "sfw_init")
    original = ONESHOT.get_config()
    assert (original.fit.epochs, original.fit.optimizer.schedule.name) == (180, "dynamic_change")
    assert ONESHOT.get_config("optimizer=sgd").fit.optimizer.learning_rate == 0.1


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("arhc=vgg16", r"variant key is 'arhc'; allowed: .* Did you mean 'arch'"),
        ("arch=vgg17", r"variant arch is 'vgg17'; allowed: .* Did you mean 'vgg16'"),
        ("data=cifar11", r"variant data is 'cifar11'; allowed: .*"),
        ("tau=big", r"variant tau is 'big'; allowed: float"),
        ("seeds=0", r"variant seeds is 0; allowed: 1 and above"),
        (
            "optimizer=sgd,rescale=diameter",
            r"variant rescale=diameter has no effect with sgd and unconstrained",
        ),
        (
            "constraint=unconstrained,tau=5",
            r"variant tau=5 has no effect with sfw and unconstrained",
        ),
        ("scheme=decreas_3", r"name is 'decreas_3'; allowed: .* Did you mean 'decrease_3'"),
    ],
)
def test_wrong_variants_are_named(variant, message):
    with tiny.complains(message):
        ONESHOT.get_config(variant)
    with tiny.complains(r"variant is 'resnet18_tin'; allowed: .* Did you mean 'resnet18_tiny'"):
        LIMIT.get_config("resnet18_tin")


def test_published_settings_of_gradient_flow():
    config = FLOW.get_config("resnet56")
    assert config.pipeline == ("fit", "cut") * 25 + ("final", "compact")
    assert (config.model.name, config.model.shortcut, config.data.name) == (
        "resnet56",
        "projection",
        "cifar100",
    )
    assert (
        config.fit.epochs,
        config.fit.optimizer.learning_rate,
        config.fit.optimizer.momentum,
    ) == (1, 0.1, 0.9)
    assert (config.cut.ratio, config.cut.imp_samples, config.cut.grasp_temperature) == (
        0.75,
        2560,
        200.0,
    )
    assert (config.final.epochs, config.final.optimizer.schedule.milestones) == (135, (55, 95))
    manual = FLOW.get_config("vgg13,thresholds=[10;50;80],warmup=5")
    assert manual.pipeline == ("warmup", *("fit", "cut") * 3, "final", "compact")
    assert manual.cut.schedule.thresholds == (0.1, 0.5, 0.8)
    assert (manual.model.order, manual.final.epochs) == ("conv_relu_bn", 152)
    with tiny.complains(r"variant is 'resnet-56'; allowed: .* Did you mean 'resnet56'"):
        FLOW.get_config("resnet-56")
    assert FLOW.get_config("vgg13,schedule=polynomial").cut.schedule.to_dict() == dict(
        name="polynomial", power=3.0
    )
    tracked = FLOW.get_config(
        "resnet18,measure=biased_loss_tracked,use_l2=1,use_init=1,alpha=0.5,track_batches=7"
    )
    track = dict(name="saliency", alpha=0.5, track_batches=7, use_l2=True, use_init=True)
    assert tracked.fit.track.to_dict() == track
    assert (tracked.cut.use_l2, tracked.cut.use_init) == (True, True)
    for text, message in (
        ("schedule=cubic", "variant schedule is 'cubic'; allowed: gradient_flow, polynomial"),
        ("rounds=many", "variant rounds is 'many'; allowed: int"),
        ("use_l2=yes", "variant use_l2 is 'yes'; allowed: 0 or 1"),
        ("thresholds=10;x", "variant thresholds is '10;x'; allowed: percents such as 10;50;80"),
        ("rounds=-3", "variant rounds is -3; allowed: 1 and above"),
        ("thresholds=10;50,rounds=5", "variant rounds=5 has no effect with thresholds"),
        ("alpha=0.5", "variant alpha=0.5 has no effect with measure="),
        ("rounds=100,warmup=60", "100 rounds and 60 epochs of warm-up leave none of 160"),
    ):
        with tiny.complains(message):
            FLOW.get_config(f"vgg13,{text}")
    with tiny.complains(r"variant key is 'round'; allowed: .* Did you mean 'rounds'"):
        FLOW.get_config("resnet56,round=3")


def test_published_settings_of_growing_regularisation():
    config = GREG.get_config("resnet56,method=greg2")
    assert config.pipeline == ("base", "grow", "finetune", "compact")
    assert (config.model.name, config.model.shortcut, config.data.name) == (
        "resnet56",
        "zero_pad",
        "cifar10",
    )
    grow, finetune = config.grow, config.finetune
    assert (grow.method, grow.ratios, grow.granularity) == (
        "greg2",
        "[0,0.75,0.75,0.32,0]",
        "filter",
    )
    assert (grow.update_every, grow.stabilize_steps, grow.batch_size) == (10, 10_000, 128)
    assert (grow.granularity_prune, grow.granularity_pick, grow.granularity_recover) == (
        1e-4,
        1e-5,
        -1e-4,
    )
    assert (grow.upper_limit, grow.upper_limit_pick, grow.mag_ratio_limit) == (1.0, 1e-2, 1000.0)
    assert (grow.optimizer.learning_rate, grow.optimizer.weight_decay, grow.optimizer.momentum) == (
        1e-3,
        5e-4,
        0.9,
    )
    assert (finetune.epochs, finetune.optimizer.schedule.table) == (
        120,
        "0:0.01,60:0.001,90:0.0001",
    )
    assert (config.base.epochs, config.base.optimizer.schedule.table) == (
        200,
        "0:0.1,100:0.01,150:0.001",
    )
    vgg = GREG.get_config("vgg19,method=l1,ratio=0.9,pick=max")
    assert vgg.pipeline == ("base", "remove", "finetune", "compact")
    assert (vgg.remove.ratios, vgg.remove.pick, vgg.finetune.batch_size) == (
        "[1-15:0.9]",
        "max",
        256,
    )
    imagenet = GREG.get_config("resnet34")
    assert imagenet.pipeline == ("grow", "finetune", "compact")
    assert (imagenet.grow.ratios, imagenet.grow.skip) == (
        "[0,0.5,0.6,0.4,0,0]",
        "[1.0,2.0,2.3,3.0,3.5]",
    )
    assert (
        imagenet.grow.batch_size,
        imagenet.grow.update_every,
        imagenet.grow.stabilize_steps,
    ) == (64, 5, 40_000)
    assert (imagenet.finetune.epochs, imagenet.finetune.batch_size) == (90, 256)
    assert (
        GREG.get_config("resnet50,granularity=weight").grow.ratios
        == "[0,0.827,0.827,0.827,0.827,0.827]"
    )
    with tiny.complains(r"the variant gives ratio and speedup; give one of them"):
        GREG.get_config("resnet50,ratio=0.5,speedup=1.49")
    with tiny.complains(r"variant speedup is '2.3'; allowed: 1.49, 2.31"):
        GREG.get_config("resnet50,speedup=2.3")
    with tiny.complains(r"variant method is 'greg'; allowed: .* Did you mean 'greg"):
        GREG.get_config("resnet56,method=greg")
    groups = GREG.get_config("resnet56,granularity=group,ratio=0.7").grow
    assert (groups.ratios, groups.granularity) == ("0.7", "group")
    for variant, message in {
        "resnet56,granularity=group,skip=1.0": "gives skip; allowed with granularity=group: ratio",
        "resnet56,ratio=abc": "variant ratio is 'abc'; allowed: float",
        "resnet56,seeds=three": "variant seeds is 'three'; allowed: int",
        "resnet56,base=yes": "variant base is 'yes'; allowed: 0, 1",
    }.items():
        with tiny.complains(message):
            GREG.get_config(variant)


def test_published_settings_of_the_geometric_limit():
    config = LIMIT.get_config("resnet50")
    optimizer = config.fit.optimizer
    assert (config.model.name, config.data.name) == ("resnet50", "cifar100")
    assert (config.fit.epochs, config.fit.batch_size, config.fit.augment) == (
        200,
        128,
        "pad_crop_flip",
    )
    assert (optimizer.learning_rate, optimizer.momentum) == (0.1, 0.9)
    assert (optimizer.penalty.name, optimizer.penalty.strength) == ("l1", 2e-5)
    assert (optimizer.schedule.name, optimizer.schedule.warmup_epochs) == ("cosine", 5.0)
    assert (config.hessian.num_matvecs, config.hessian.operator, config.width.spectrum) == (
        128,
        "hessian",
        "hessian",
    )
    assert config.curve.ratios == tuple(i / 1000 for i in range(1000))
    assert "row_norms" in config.pipeline
    assert config.row_norms.rows == "original"
    alexnet = LIMIT.get_config("alexnet")
    assert (alexnet.hessian.num_matvecs, alexnet.fit.optimizer.schedule.milestones) == (
        96,
        (60, 120, 160),
    )
    assert "row_norms" not in LIMIT.get_config("fc12").pipeline
    tiny_imagenet = LIMIT.get_config("resnet18_tiny")
    assert (tiny_imagenet.data.image_size, tiny_imagenet.data.train_image_size) == (32, 64)


FEW = {  # products and evaluations
    "limit": dict(scan=[0.5], resolution=0.5),
    "path": dict(ratios=[0.9]),
    "row_norms": dict(num_weights=2),
    "spectrum": dict(num_matvecs=2, num_probes=1),
    "width": dict(batch_size=4),
    "cut": dict(imp_samples=8, batch_size=8, ratio=0.3),
    "compact": dict(repeats=2, batch_size=2),
    "remove": dict(ratios="[0:0.5]", skip=""),
    "grow": dict(
        ratios="[0:0.5]",
        skip="",
        batch_size=8,
        update_every=1,
        granularity_prune=0.9,
        stabilize_steps=0,
    ),
}
TINY = {"mlp": dict(widths=[8]), "small_cnn": dict(widths=[4], dense_widths=[8])}


def shrink(config) -> dict:
    """The config with tiny networks, two steps a training, two ratios a curve, and first and last
    value of a sweep.
    """
    config = pipeline.plain(config)
    options = TINY.get(config["model"]["name"])
    config["model"].update(options or dict(name="small_cnn", init="torch", **TINY["small_cnn"]))
    if options is None:
        config["model"] = {
            key: config["model"][key] for key in ("name", "init", "dtype", "widths", "dense_widths")
        }
    for field, values in config["sweep"].items():
        if isinstance(values, list):
            config["sweep"][field] = [values[0], values[-1]]
    arms = list(config["sweep"].get("arms", {}))
    if arms:
        config["sweep"]["arm"] = [arms[0], arms[-1]]
    for stage in config.values():
        kind = stage.get("kind") if isinstance(stage, dict) else None
        stage.update({"train": dict(epochs=1, batch_size=8)}.get(kind, {})) if kind else None
        stage.update({"curve": dict(ratios=[0.0, 0.9])}.get(kind, {})) if kind else None
        stage.update({"sfw_init": dict(iterations=2, batch_size=8)}.get(kind, {})) if kind else None
        stage.update(FEW.get(kind, {})) if kind else None
        schedule = stage.get("optimizer", {}).get("schedule", {}) if kind else {}
        schedule.update(warmup_epochs=0.5) if "warmup_epochs" in schedule else None
    return config


@pytest.mark.parametrize(  # the quick start runs in test_run.py
    ("name", "variant"),
    [
        ("toy_cnn", ("cnn",)),
        ("geometric_limit", ("digits",)),
        ("gradient_flow", ("resnet56,rounds=2,measure=fisher",)),
        ("greg", ("resnet56",)),
        ("greg", ("vgg19,method=l1",)),
        ("sfw_oneshot", ("data=tiny,arch=mlp,sfw_init=1,rescale=diameter",)),
    ],
    ids=label,
)
def test_configs_run_two_steps(name, variant, tmp_path, monkeypatch, sketches):
    images, large = tiny.random_set(), tiny.random_set((64, 64, 3))
    monkeypatch.setattr(data, "check", lambda **_: None)
    load_it = lambda *, train_image_size=0, **_: (
        images._replace(train=large.train) if train_image_size else images
    )
    monkeypatch.setattr(data, "load", load_it)
    config = shrink(load(name).get_config(*variant))
    outcome = pipeline.run(config, tmp_path)
    for row in outcome.rows:
        if row["kind"] == "train":
            assert row["step"] == 2
            assert 0 <= row["test_accuracy"] <= 1
        if row["kind"] == "curve":
            assert row["loss"] > 0
    swept = [values for values in config["sweep"].values() if isinstance(values, list)]
    expected = itertools.product(dict.fromkeys(config["pipeline"]), range(2 ** len(swept)))
    assert {(row["stage"], row["member"]) for row in outcome.rows} == set(expected)
    assert (tmp_path / "report.html").stat().st_size > 8_000
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(outcome.state.params))
