"""Growing regularisation: a trained network, growing L2 penalties, removal, fine-tuning
(arXiv:2012.09243).

    python -m sparsity_jax.run --config configs/greg.py:resnet56 --workdir runs/greg1
    python -m sparsity_jax.run --config configs/greg.py:vgg19,method=greg2,ratio=0.9 --workdir
    runs/greg2 python -m sparsity_jax.run --config configs/greg.py:resnet50,speedup=2.31 --workdir
    runs/resnet50 \\
        --config.pretrained=resnet50.safetensors
    python -m sparsity_jax.run --config configs/greg.py:digits --workdir runs/greg_digits

Variants: a network, one of NETWORKS; `digits`, a minute on a CPU. After it come settings; KEYS has
their defaults: `method` greg1, greg2, fixreg or l1 (removal at once, no penalty); `ratio` for all
layers that the paper prunes, or `speedup`, one of the published ones, or `ratios` in the original's
notation with semicolons, `ratios=0;0.7;0.5;0.3;0` or `ratios=1-15:0.7`; `granularity` filter,
channel, weight or group; `pick` min, max or rand; `finetune=0:0.01;60:0.001`, rates of the
fine-tuning from given epochs on. The stages:

    base     the unpruned network (CIFAR); ImageNet's comes from config.pretrained instead
    grow     penalties pick and push groups of weights; the weights go when they have settled
    remove   instead of `grow` with method=l1
    finetune training of what is left
    compact  the network without the removed channels: accuracy, parameters, FLOPs, size, time

Several methods share one base: `:resnet56,base=0` leaves it out, and
`--config.start_from=runs/base` takes a finished run with `"--config.pipeline=('base',)"`.
"""

from typing import NamedTuple

from sparsity_jax import models, optim, pipeline, tables
from sparsity_jax.models import vgg


class Recipe(NamedTuple):
    """How networks are trained. base, finetune: epochs and learning rates from given epochs on.
    grow: fields of it.
    """

    base: tuple[int, str]
    grow: dict
    finetune: tuple[int, str]
    batch_size: int = 128
    weight_decay: float = 5e-4
    grow_rate: float = 1e-3


CIFAR = Recipe(
    (200, "0:0.1,100:0.01,150:0.001"),
    dict(update_every=10, stabilize_steps=10_000),
    (120, "0:0.01,60:0.001,90:0.0001"),
)
IMAGENET = Recipe(
    (0, "0:0.1"),
    dict(batch_size=64, update_every=5, stabilize_steps=40_000),
    (90, "0:0.01,30:0.001,60:0.0001,75:0.00001"),
    batch_size=256,
    weight_decay=1e-4,
)
SMALL = Recipe(  # minutes on a CPU
    (30, "0:0.02,20:0.002"),
    dict(update_every=5, granularity_prune=2e-3, granularity_pick=1e-4, stabilize_steps=1000),
    (15, "0:0.01,10:0.001"),
    grow_rate=5e-3,
)
DIGITS = Recipe(
    (30, "0:0.1,20:0.01,25:0.001"),
    dict(update_every=1, granularity_prune=2e-3, granularity_pick=1e-4, stabilize_steps=200),
    (20, "0:0.01,15:0.001"),
    batch_size=64,
    grow_rate=1e-2,
)


class Network(NamedTuple):
    """uniform: the notation of one ratio for all layers pruned. published: notations and layers
    skipped by speed-up.
    weights: the notation of the unstructured experiment."""

    data: str
    model: str
    options: dict
    recipe: Recipe
    uniform: str
    published: dict = {}  # noqa: RUF012 - never changed
    weights: str = ""


VGG19 = dict(layout=vgg.stages(19, 64)[:-1], conv_bias=False)
NETWORKS = {
    "resnet56": Network(
        "cifar10",
        "resnet56",
        {},
        CIFAR,
        "[0,{0},{0},{0},0]",
        {"2.55": ("[0,0.75,0.75,0.32,0]", "")},
    ),
    "vgg19": Network(
        "cifar100",
        "vgg",
        VGG19,
        CIFAR._replace(batch_size=256),
        "[1-15:{0}]",
        {"8.84": ("[1-15:0.7]", "")},
    ),
    "resnet34": Network(
        "imagenet2012",
        "resnet34",
        dict(stem="imagenet"),
        IMAGENET,
        "[0,{0},{0},{0},{0},0]",
        {"1.32": ("[0,0.5,0.6,0.4,0,0]", "[1.0,2.0,2.3,3.0,3.5]")},
    ),
    "resnet50": Network(
        "imagenet2012",
        "resnet50",
        dict(stem="imagenet"),
        IMAGENET,
        "[0,{0},{0},{0},{0},0]",
        {
            "1.49": ("[0,0.3,0.3,0.3,0.14,0]", ""),
            "2.31": ("[0,0.6,0.6,0.6,0.21,0]", ""),
            "2.56": ("[0,0.74,0.74,0.6,0.21,0]", ""),
            "3.06": ("[0,0.68,0.68,0.68,0.5,0]", ""),
        },
        "[0,0.827,0.827,0.827,0.827,0.827]",
    ),
    "resnet20": Network("cifar10", "resnet20", {}, CIFAR, "[0,{0},{0},{0},0]"),
    "lenet": Network("cifar10", "lenet", {}, SMALL, "[0-3:{0}]"),
    "digits": Network(
        "digits", "small_cnn", dict(widths=(16, 32), dense_widths=(64,)), DIGITS, "[0-2:{0}]"
    ),
}
KEYS = dict(
    method="greg1",
    ratio="",
    speedup="",
    ratios="",
    skip="",
    granularity="filter",
    pick="min",
    finetune="",
    base="1",
    seeds="1",
)


def variants() -> dict[str, str]:
    """What may stand behind the colon, with a line on it."""
    named = {name: f"{network.model} on {network.data}" for name, network in NETWORKS.items()}
    settings = {f"NETWORK,{key}=": f"by default {value!r}" for key, value in KEYS.items()}
    return named | settings


def parse(variant: str) -> tuple[str, dict[str, str]]:
    name, *pairs = variant.split(",")
    tables.lookup(NETWORKS, name, "variant")
    chosen = dict(KEYS)
    for pair in pairs:
        key, _, value = pair.partition("=")
        tables.lookup(KEYS, key, "variant key")
        chosen[key] = value
    return name, chosen


def ratios_of(network: Network, chosen: dict[str, str]) -> tuple[str, str]:
    """(ratios, skipped layers) in the original's notation; without a choice the first that is
    published, else 0.5.
    """
    given = [key for key in ("ratio", "ratios", "speedup") if chosen[key]]
    if len(given) > 1:
        raise tables.ConfigError(f"the variant gives {' and '.join(given)}; give one of them.")
    skip = chosen["skip"].replace(";", ",")
    if chosen["granularity"] == "group":
        if idle := [key for key in ("ratios", "speedup", "skip") if chosen[key]]:
            raise tables.ConfigError(
                f"the variant gives {idle[0]}; allowed with granularity=group: ratio, for all "
                "groups."
            )
        return f"{tables.read_text(chosen['ratio'] or '0.5', float, 'variant ratio')}", ""
    if chosen["speedup"]:
        notation, own = tables.lookup(network.published, chosen["speedup"], "variant speedup")
        return notation, skip or own
    if chosen["ratios"]:
        return f"[{chosen['ratios'].strip('[]').replace(';', ',')}]", skip
    if chosen["ratio"]:
        return network.uniform.format(
            tables.read_text(chosen["ratio"], float, "variant ratio")
        ), skip
    if chosen["granularity"] == "weight" and network.weights:
        return network.weights, skip
    notation, own = next(iter(network.published.values()), (network.uniform.format(0.5), ""))
    return notation, skip or own


def get_config(variant: str = "resnet56"):
    name, chosen = parse(variant)
    network, method = NETWORKS[name], chosen["method"]
    tables.lookup(dict.fromkeys(("greg1", "greg2", "fixreg", "l1")), method, "variant method")
    recipe, imagenet = network.recipe, network.data == "imagenet2012"
    notation, skip = ratios_of(network, chosen)
    groups = dict(
        ratios=notation, skip=skip, granularity=chosen["granularity"], pick=chosen["pick"]
    )
    augment = dict(digits="none", imagenet2012="flip").get(network.data, "pad_crop_flip")
    sgd = lambda rate, schedule: optim.settings(
        "sgd", learning_rate=rate, momentum=0.9, weight_decay=recipe.weight_decay, schedule=schedule
    )
    common = dict(batch_size=recipe.batch_size, augment=augment)
    train = lambda epochs, rates, label: pipeline.stage(
        "train",
        epochs=epochs,
        optimizer=sgd(1.0, dict(name="piecewise", table=rates)),
        label=label,
        **common,
    )
    config = pipeline.base(
        title=f"Growing regularisation: {name}, {method}",
        data=dict(
            name=network.data,
            **(dict(stream=True, image_size=224, test_split="validation") if imagenet else {}),
        ),
        model=tables.options(
            models.MODELS, network.model, init="torch", dtype="float32", **network.options
        ),
    )
    tables.lookup(dict.fromkeys("01"), chosen["base"], "variant base")
    has_base = chosen["base"] == "1" and not imagenet
    middle = "remove" if method == "l1" else "grow"
    config.pipeline = (*["base"] * has_base, middle, "finetune", "compact")
    if has_base:
        config.base = train(*recipe.base, "unpruned")
    if method == "l1":
        config.remove = pipeline.stage("remove", **groups)
    else:
        own = {**common, **recipe.grow, **groups}
        config.grow = pipeline.stage(
            "grow", method=method, optimizer=sgd(recipe.grow_rate, "keep"), **own
        )
    epochs, rates = recipe.finetune
    config.finetune = train(epochs, chosen["finetune"].replace(";", ",") or rates, method)
    config.compact = pipeline.stage("compact")
    if (seeds := tables.read_text(chosen["seeds"], int, "variant seeds", least=1)) > 1:
        config.sweep = dict(seed=tuple(range(seeds)))
    return config
