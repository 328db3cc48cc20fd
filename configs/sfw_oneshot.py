"""SFW one-shot pruning with the original's settings (Miao et al., ICLR 2022): train once, prune to
any sparsity.

ResNet-18 on CIFAR-10, 180 epochs of stochastic Frank-Wolfe in K-sparse polytopes, then accuracy at
19 pruning ratios.

    python -m sparsity_jax.run --config configs/sfw_oneshot.py --workdir runs/sfw_oneshot
    python -m sparsity_jax.run --config configs/sfw_oneshot.py:arch=vgg16,data=cifar100,tau=10
    --workdir runs/vgg16

After the colon come any of `key=value`, separated by commas; VARIANTS lists them with their
defaults, the original's. Every single field can be overridden too, e.g. --config.fit.epochs=20.
Hours on a GPU, days on a CPU: use `configs/toy_cnn.py` there.
"""

from sparsity_jax import models, optim, pipeline, polytopes, tables

DATASETS = {
    "cifar10": (dict(name="cifar10"), "pad_crop_flip"),
    "cifar100": (dict(name="cifar100"), "pad_crop_flip"),
    "mnist": (dict(name="mnist"), "none"),
    "fashion_mnist": (dict(name="fashion_mnist"), "none"),
    "svhn": (dict(name="svhn_cropped"), "none"),
    "tiny": (
        dict(name="folder:tiny-imagenet-200", image_size=32, train_image_size=64),
        "resized_crop_flip",
    ),
    "digits": (dict(name="digits"), "none"),
}
ARCHITECTURES = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "vgg16": "vgg16",
    "preact_resnet18": "preact_resnet18",
    "mlp": "mlp",
    "small_cnn": "small_cnn",
}
CONSTRAINTS = ("k_sparse", "l2", "unconstrained")
VARIANTS = dict(
    data="cifar10",
    arch="resnet18",
    optimizer="sfw",
    constraint="",  # k_sparse, for sgd unconstrained
    lr="",  # 1.0 for sfw, 0.1 for sgd
    scheme="dynamic_change",
    momentum="0.9",
    weight_decay="0.0",
    k="10",
    k_frac="0.05",
    tau="15",
    mode="initialization",
    rescale="gradient",
    sfw_init="0",
    seeds="1",  # 3: seeds 0, 1 and 2 after one another
    epochs="180",
    batch_size="128",
)


def variants() -> dict[str, str]:
    """What may stand behind the colon, with a line on it."""
    choices = dict(data=DATASETS, arch=ARCHITECTURES, constraint=CONSTRAINTS)
    lines = {}
    for key, value in VARIANTS.items():
        allowed = f"; allowed: {', '.join(choices[key])}" if key in choices else ""
        lines[f"{key}="] = f"by default {value!r}{allowed}"
    return lines


def parse(variant: str) -> dict[str, str]:
    """`key=value,key=value` over the defaults of VARIANTS."""
    chosen = dict(VARIANTS)
    for item in filter(None, variant.split(",")):
        key, _, value = item.partition("=")
        tables.lookup(VARIANTS, key, "variant key")
        chosen[key] = value
    return chosen


def get_config(variant: str = ""):
    chosen = parse(variant)
    data, augment = tables.lookup(DATASETS, chosen["data"], "variant data")
    arch = tables.lookup(ARCHITECTURES, chosen["arch"], "variant arch")
    name = chosen["optimizer"]
    tables.lookup(optim.OPTIMIZERS, name, "variant optimizer")
    set_name = chosen["constraint"] or ("unconstrained" if name == "sgd" else "k_sparse")
    tables.lookup(dict.fromkeys(CONSTRAINTS), set_name, "variant constraint")
    learned = tables.lookup({"0": False, "1": True}, chosen["sfw_init"], "variant sfw_init")
    number = lambda key, kind, **limit: tables.read_text(
        chosen[key], kind, f"variant {key}", **limit
    )
    seeds = number("seeds", int, least=1)

    constraint = tables.options(polytopes.SETS, set_name)
    fields = dict(tau=float, mode=str, k=int, k_frac=float)
    constraint.update({key: number(key, kind) for key, kind in fields.items() if key in constraint})
    idle = {*(fields.keys() - constraint.keys()), *({"rescale"} if name != "sfw" else ())}
    for key in sorted(idle):
        if chosen[key] != VARIANTS[key]:
            raise tables.ConfigError(
                f"variant {key}={chosen[key]} has no effect with {name} and {set_name}."
            )
    optimizer = optim.settings(
        name,
        schedule=chosen["scheme"],
        learning_rate=number("lr", float) if chosen["lr"] else {"sgd": 0.1}.get(name, 1.0),
        momentum=number("momentum", float),
        weight_decay=number("weight_decay", float),
        constraint=constraint,
    )
    if name == "sfw":
        optimizer["rescale"] = chosen["rescale"].lower()

    config = pipeline.base(
        title=f"One-shot pruning: {chosen['arch']} on {chosen['data']}, {name}",
        data=data,
        sweep=dict(seed=tuple(range(seeds))) if seeds > 1 else {},
        model=tables.options(models.MODELS, arch, init="torch", dtype="float32"),
        pipeline=(*(("sfw_init",) if learned else ()), "fit", "curve", "weights"),
    )
    batch_size = number("batch_size", int)
    if learned:
        rate = optimizer["learning_rate"]
        common = dict(constraint=constraint, batch_size=batch_size, augment=augment)
        config.sfw_init = pipeline.stage("sfw_init", learning_rate=rate, **common)
    config.fit = pipeline.stage(
        "train",
        epochs=number("epochs", int),
        batch_size=batch_size,
        optimizer=optimizer,
        augment=augment,
        label=f"{name}, {constraint['name']}",
    )
    config.curve = pipeline.stage("curve")
    config.weights = pipeline.stage("histogram")
    return config
