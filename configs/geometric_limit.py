"""How sparse can it get: L1 training, then the predicted and the actual largest pruning ratio
(arXiv:2306.05857).

    python -m sparsity_jax.run --config configs/geometric_limit.py:fc5 --workdir runs/fc5
    python -m sparsity_jax.run --config configs/geometric_limit.py:digits --workdir runs/limit

Variants: SETTINGS, the published ones, then networks that have none (fc2 to cnet), and `digits`, a
minute on a CPU. The stages:

    fit          L1-regularised training
    curve        accuracy and loss of the network pruned at 1,000 ratios
    limit        the actual largest ratio by bisection, some 20 evaluations
    row_norms    weights without curvature (convolutional networks only, as published)
    hessian      Lanczos on the Hessian; width: the prediction from it, as published
    gauss_newton Lanczos on its positive semi-definite part; width_gauss_newton: the prediction from
    it path         how pruning moves the training loss, and its first two orders: does the gradient
    matter? absolute     Lanczos on the squared Hessian; width_absolute: the prediction from it; not
    run by default

Each can be run alone on a finished run, e.g. a deeper Lanczos run and its prediction:

    python -m sparsity_jax.run --config configs/geometric_limit.py:fc5 --workdir runs/fc5_deeper \\
        --config.start_from=runs/fc5 "--config.pipeline=('hessian','width')"
        --config.hessian.num_matvecs=256

On a CPU the thousand evaluations on the train set take longest: `"--config.curve.splits=('test',)"`
leaves them out.
"""

from sparsity_jax import models, optim, pipeline, tables

CONSTANT = dict(name="keep")
WARM = dict(name="multistep", milestones=(), warmup_epochs=5.0)
MULTISTEP = dict(name="multistep", milestones=(60, 120, 160), gamma=0.5, warmup_epochs=5.0)
COSINE = dict(name="cosine", warmup_epochs=5.0)
SETTINGS = {  # data, network, learning rate, schedule, strength of the L1 penalty, Lanczos steps
    "fc5": ("cifar10", "fc5", 0.01, CONSTANT, 5e-5, 128),
    "fc12": ("cifar10", "fc12", 0.01, CONSTANT, 5e-5, 128),
    "alexnet": ("cifar10", "alexnet", 0.01, MULTISTEP, 3e-5, 96),
    "vgg16": ("cifar10", "vgg16", 0.01, WARM, 1e-4, 128),
    "resnet18": ("cifar100", "resnet18", 0.1, COSINE, 5e-5, 128),
    "resnet50": ("cifar100", "resnet50", 0.1, COSINE, 2e-5, 128),
    "resnet18_tiny": ("tiny", "resnet18", 0.1, COSINE, 5e-5, 128),
    "resnet50_tiny": ("tiny", "resnet50", 0.1, COSINE, 2e-5, 128),
    "fc2": ("cifar10", "fc2", 0.01, CONSTANT, 5e-5, 128),
    "fc13": ("cifar10", "fc13", 0.01, CONSTANT, 5e-5, 128),
    "lenet": ("cifar10", "lenet", 0.01, CONSTANT, 5e-5, 128),
    "cnet": ("cifar10", "cnet", 0.01, CONSTANT, 5e-5, 128),
    "digits": ("digits", "mlp", 0.01, CONSTANT, 1e-3, 64),
}
DATASETS = {
    "cifar10": (dict(name="cifar10"), "pad_crop_flip"),
    "cifar100": (dict(name="cifar100"), "pad_crop_flip"),
    "tiny": (
        dict(name="folder:tiny-imagenet-200", image_size=32, train_image_size=64),
        "resized_crop_flip",
    ),
    "digits": (dict(name="digits"), "none"),
}
DENSE = ("fc2", "fc5", "fc12", "fc13", "digits")


def variants() -> dict[str, str]:
    """What may stand behind the colon, with a line on it."""
    return {name: f"{network} on {data}" for name, (data, network, *_) in SETTINGS.items()}


def get_config(variant: str = "fc5"):
    data_name, network, learning_rate, schedule, strength, num_matvecs = tables.lookup(
        SETTINGS, variant, "variant"
    )
    data, augment = DATASETS[data_name]
    dense = variant in DENSE
    before = ("fit", "curve", "limit") if dense else ("fit", "curve", "limit", "row_norms")
    config = pipeline.base(
        title=f"Geometric limit of sparsity: {variant}",
        data=data,
        model=tables.options(models.MODELS, network, init="kaiming_normal", dtype="float32"),
        pipeline=(*before, "hessian", "width", "gauss_newton", "width_gauss_newton", "path"),
    )
    optimizer = optim.settings(
        "sgd",
        learning_rate=learning_rate,
        momentum=0.9,
        schedule=schedule,
        penalty=dict(name="l1", strength=strength),
    )
    epochs = 1000 if variant == "digits" else 200
    config.fit = pipeline.stage(
        "train", epochs=epochs, augment=augment, optimizer=optimizer, evaluate_every=10
    )
    config.curve = pipeline.stage(
        "curve", ratios=tuple(i / 1000 for i in range(1000)), splits=("test", "train")
    )
    config.limit = pipeline.stage("limit")
    config.row_norms = pipeline.stage("row_norms", rows="original")
    config.hessian = pipeline.stage("spectrum", num_matvecs=num_matvecs)
    config.width = pipeline.stage("width", spectrum="hessian")
    config.gauss_newton = pipeline.stage(
        "spectrum", operator="gauss_newton", num_matvecs=num_matvecs, num_probes=3, stop_width=0.001
    )
    config.width_gauss_newton = pipeline.stage("width", spectrum="gauss_newton")
    config.path = pipeline.stage("path")
    config.absolute = pipeline.stage(
        "spectrum", operator="absolute", num_matvecs=num_matvecs, stop_width=0.001
    )
    config.width_absolute = pipeline.stage("width", spectrum="absolute")
    return config
