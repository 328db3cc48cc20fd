"""Filter pruning by gradient-flow measures: rounds of {train an epoch, cut}, then training (arXiv:2009.11839).

    python -m sparsity_jax.run --config configs/gradient_flow.py:resnet56 --workdir runs/flow
    python -m sparsity_jax.run --config configs/gradient_flow.py:digits --workdir runs/flow_digits

Variants: a model, one of MODELS; `digits`, a minute on a CPU. After the model come settings, e.g.
`:vgg13,measure=grasp,data=cifar10,ratio=0.5,rounds=5,warmup=10` or `:mobilenet,thresholds=10;50;80` (percent gone
after each round); KEYS has their defaults. `preserve_moment=1` hands the momentum on through the cuts;
`measure=biased_loss_tracked,track_batches=20` tracks importance over the last 20 batches of each round. The stages:

    warmup   training before the first cut, if `warmup` is above 0
    fit, cut one epoch, then the least important channels of the whole network go; `rounds` times
    final    training of what is left: rates 0.1, 0.01, 0.001 for 80, 40, 40 epochs, less those spent before
    compact  the network without the removed channels: accuracy, parameters, FLOPs, size, time
"""

from sparsity_jax import models, optim, pipeline, tables

MODELS = {  # the networks of the study by name: that of the zoo, and its options
    "vgg13": ("vgg13", dict(order="conv_relu_bn", conv_bias=False)),
    "mobilenet": ("mobilenet", dict()),
    "resnet56": ("resnet56", dict(shortcut="projection")),
    "resnet34": ("resnet34", dict()),
    "resnet18": ("resnet18", dict()),
    "digits": ("mobilenet", dict(stem_width=16, blocks=((32, 1), (32, 2), (64, 1)))),
}
KEYS = dict(
    measure="mag_based", data="cifar100", ratio="0.75", rounds="25", warmup="0", lr_prune="0.1", moment="0.9",
    thresholds="", branches="tied", seeds="1", epochs="160", preserve_moment="0", track_batches="0", alpha="0.8",
    use_l2="0", temperature="1",
)  # fmt: skip


def parse(variant: str) -> tuple[str, dict[str, str]]:
    model, *pairs = variant.split(",")
    tables.lookup(MODELS, model, "variant")
    chosen = KEYS | (dict(data="digits", rounds="5", epochs="20") if model == "digits" else {})
    for pair in pairs:
        key, _, value = pair.partition("=")
        tables.lookup(KEYS, key, "variant key")
        chosen[key] = value
    return model, chosen


def get_config(variant: str = "resnet56"):
    model, chosen = parse(variant)
    network, options = MODELS[model]
    rounds, warmup, epochs = (int(chosen[key]) for key in ("rounds", "warmup", "epochs"))
    thresholds = tuple(float(part) / 100 for part in chosen["thresholds"].strip("[]").split(";") if part)
    rounds = len(thresholds) or rounds
    augment = "none" if chosen["data"] == "digits" else "pad_crop_flip"
    optimizer = lambda rate, schedule: optim.settings(
        "sgd", learning_rate=rate, momentum=float(chosen["moment"]), weight_decay=1e-4, schedule=schedule
    )
    common = dict(augment=augment, label=chosen["measure"], carry=chosen["preserve_moment"] == "1")
    temperature = float(chosen["temperature"])
    train = lambda epochs, rate, schedule=dict(name="keep"), **fields: pipeline.stage(
        "train",
        epochs=epochs,
        optimizer=optimizer(rate, schedule),
        loss=dict(name="cross_entropy", temperature=temperature),
        **common,
        **fields,
    )
    track = dict(name="none")
    if int(chosen["track_batches"]):
        numbers = dict(alpha=float(chosen["alpha"]), track_batches=int(chosen["track_batches"]))
        track = dict(name="saliency", use_l2=chosen["use_l2"] == "1", **numbers)
    seeds = int(chosen["seeds"])
    config = pipeline.base(
        title=f"Gradient flow: {model}, {chosen['measure']}",
        data=dict(name=chosen["data"]),
        model=tables.options(models.MODELS, network, init="torch", dtype="float32", **options),
        sweep=dict(seed=tuple(range(seeds))) if seeds > 1 else {},
        pipeline=(*(("warmup",) if warmup else ()), *("fit", "cut") * rounds, "final", "compact"),
    )
    if warmup:
        config.warmup = train(warmup, 0.1)
    config.fit = train(1, float(chosen["lr_prune"]), track=track)
    schedule = dict(name="manual", thresholds=thresholds) if thresholds else dict(name="gradient_flow")
    config.cut = pipeline.stage(
        "cut",
        measure=chosen["measure"],
        ratio=float(chosen["ratio"]),
        schedule=schedule,
        branches=chosen["branches"],
        use_l2=chosen["use_l2"] == "1",
        temperature=temperature,
    )
    left = epochs - rounds - warmup
    milestones = tuple(max(int(epochs * share) - rounds - warmup, 0) for share in (0.5, 0.75))
    config.final = train(left, 0.1, dict(name="multistep", milestones=milestones, gamma=0.1))
    config.compact = pipeline.stage("compact")
    return config
