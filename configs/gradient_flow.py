"""Filter pruning by gradient-flow measures: rounds of {train an epoch, cut}, then training
(arXiv:2009.11839).

    python -m sparsity_jax.run --config configs/gradient_flow.py:resnet56 --workdir runs/flow
    python -m sparsity_jax.run --config configs/gradient_flow.py:digits --workdir runs/flow_digits

Variants: a model, one of MODELS; `digits`, a minute on a CPU. After the model come settings, e.g.
`:vgg13,measure=grasp,data=cifar10,ratio=0.5,rounds=5,warmup=10`, `:resnet18,schedule=polynomial` or
`:mobilenet,thresholds=10;50;80` (percent gone after each round, instead of a schedule); KEYS has
their defaults. `preserve_moment=1` hands the momentum on through the cuts;
`measure=biased_loss_tracked` tracks importance over the last `track_batches` batches of each round.
The stages:

    warmup   training before the first cut, if `warmup` is above 0
    fit, cut one epoch, then the least important channels of the whole network go; `rounds` times
    final    training of what is left: rates 0.1, 0.01, 0.001 for 80, 40, 40 epochs, less those
    spent before compact  the network without the removed channels: accuracy, parameters, FLOPs,
    size, time
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
    measure="mag_based",
    data="cifar100",
    ratio=0.75,
    rounds=25,
    warmup=0,
    lr_prune=0.1,
    moment=0.9,
    thresholds=(),
    schedule="gradient_flow",
    branches="tied",
    seeds=1,
    epochs=160,
    preserve_moment=False,
    track_batches=20,
    alpha=0.8,
    use_l2=False,
    use_init=False,
    temperature=1.0,
)
SCHEDULES = {
    "gradient_flow": dict(name="gradient_flow", cumulative="exact"),
    "polynomial": dict(name="polynomial", power=3.0),
}
READ = {  # a value of each type from its text
    bool: lambda text: {"0": False, "1": True}[text],
    tuple: lambda text: tuple(float(part) / 100 for part in text.strip("[]").split(";")),
}


def defaults(model: str) -> dict:
    return KEYS | (dict(data="digits", rounds=5, epochs=20) if model == "digits" else {})


def variants() -> dict[str, str]:
    """What may stand behind the colon, with a line on it."""
    named = {model: f"on {defaults(model)['data']}" for model in MODELS}
    settings = {f"MODEL,{key}=": f"by default {value!r}" for key, value in KEYS.items()}
    return named | settings


def parse(variant: str) -> tuple[str, dict]:
    model, *pairs = variant.split(",")
    tables.lookup(MODELS, model, "variant")
    chosen = defaults(model)
    for pair in pairs:
        key, _, text = pair.partition("=")
        kind = type(tables.lookup(KEYS, key, "variant key"))
        try:
            chosen[key] = READ.get(kind, kind)(text)
        except (ValueError, KeyError):
            allowed = {bool: "0 or 1", tuple: "percents such as 10;50;80"}.get(kind, kind.__name__)
            raise tables.ConfigError(f"variant {key} is {text!r}; allowed: {allowed}.") from None
    return model, chosen


def get_config(variant: str = "resnet56"):
    model, chosen = parse(variant)
    network, options = MODELS[model]
    thresholds, warmup, epochs = chosen["thresholds"], chosen["warmup"], chosen["epochs"]
    rounds = len(thresholds) or chosen["rounds"]
    for key, least in dict(rounds=1, seeds=1, warmup=0).items():
        if chosen[key] < least:
            raise tables.ConfigError(f"variant {key} is {chosen[key]}; allowed: {least} and above.")
    idle = dict.fromkeys(("rounds", "ratio", "schedule"), "thresholds") if thresholds else {}
    if chosen["measure"] != "biased_loss_tracked":
        idle |= dict.fromkeys(("alpha", "track_batches"), f"measure={chosen['measure']}")
    for key, reason in idle.items():
        if chosen[key] != defaults(model)[key]:
            raise tables.ConfigError(f"variant {key}={chosen[key]} has no effect with {reason}.")
    schedule = tables.lookup(SCHEDULES, chosen["schedule"], "variant schedule")
    if rounds + warmup >= epochs:
        raise tables.ConfigError(
            f"variant: {rounds} rounds and {warmup} epochs of warm-up leave none of {epochs}."
        )

    def train(epochs, rate, schedule, **fields):
        optimizer = dict(
            learning_rate=rate, momentum=chosen["moment"], weight_decay=1e-4, schedule=schedule
        )
        return pipeline.stage(
            "train",
            epochs=epochs,
            optimizer=optim.settings("sgd", **optimizer),
            loss=dict(name="cross_entropy", temperature=chosen["temperature"]),
            augment="none" if chosen["data"] == "digits" else "pad_crop_flip",
            label=chosen["measure"],
            carry=chosen["preserve_moment"],
            **fields,
        )

    config = pipeline.base(
        title=f"Gradient flow: {model}, {chosen['measure']}",
        data=dict(name=chosen["data"]),
        model=tables.options(models.MODELS, network, init="torch", dtype="float32", **options),
        sweep=dict(seed=tuple(range(chosen["seeds"]))) if chosen["seeds"] > 1 else {},
        pipeline=(*(("warmup",) if warmup else ()), *("fit", "cut") * rounds, "final", "compact"),
    )
    importance = {name: chosen[name] for name in ("use_l2", "use_init")}
    track = dict(name="none")
    if chosen["measure"] == "biased_loss_tracked":
        window = {name: chosen[name] for name in ("alpha", "track_batches")}
        track = dict(
            name="saliency", **window, use_l2=chosen["use_l2"], use_init=all(importance.values())
        )
    if warmup:
        config.warmup = train(warmup, 0.1, dict(name="keep"))
    config.fit = train(1, chosen["lr_prune"], dict(name="keep"), track=track)
    config.cut = pipeline.stage(
        "cut",
        **{name: chosen[name] for name in ("measure", "ratio", "branches", "temperature")},
        **importance,
        schedule=dict(name="manual", thresholds=thresholds) if thresholds else schedule,
    )
    milestones = tuple(max(int(epochs * share) - rounds - warmup, 0) for share in (0.5, 0.75))
    steps = dict(name="multistep", milestones=milestones, gamma=0.1)
    config.final = train(epochs - rounds - warmup, 0.1, steps)
    config.compact = pipeline.stage("compact")
    return config
