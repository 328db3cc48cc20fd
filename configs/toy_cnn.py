"""The small-CNN study ("Pruning DNNs with Stochastic Frank-Wolfe"): SFW and SGD, constrained or
not, retrained or not.

Four arms from the same initial weights: {SGD, SFW} x {unconstrained, K-sparse polytope} (SGD in a
polytope is projected SGD). Each is pruned layer by layer in steps of 10 %, without and with
retraining, and by whole filters.

    python -m sparsity_jax.run --config configs/toy_cnn.py --workdir runs/toy_cnn
    python -m sparsity_jax.run --config configs/toy_cnn.py:mlp --workdir runs/toy_mlp
    python -m sparsity_jax.run --config configs/toy_cnn.py:story --workdir runs/cifar_story

VARIANTS may stand behind the colon. Learning rates: 0.1 for SGD with heavy-ball momentum 0.9; SFW
averages its momentum, so the same step length is 1.0.
"""

from sparsity_jax import models, optim, pipeline, polytopes, tables

ARMS = {
    "sgd": ("SGD", "sgd", "unconstrained"),
    "sgd_k_sparse": ("SGD, K-sparse polytope", "sgd", "k_sparse"),
    "sfw": ("SFW, unconstrained", "sfw", "unconstrained"),
    "sfw_k_sparse": ("SFW, K-sparse polytope", "sfw", "k_sparse"),
}
VARIANTS = {
    "cnn": "the arms one after the other",
    "mlp": "digits; the arms one after the other, three seeds of each side by side",
    "story": "the two arms of the paper's claim, global pruning at 19 ratios",
}
STEPS = tuple(round(0.1 * i, 1) for i in range(10))


def variants() -> dict[str, str]:
    """What may stand behind the colon, with a line on it."""
    return VARIANTS


def optimizer_of(arm: str, dense: bool) -> dict:
    _, name, constraint = ARMS[arm]
    own = dict(k_frac=0.01 if dense else 0.05, tau=15.0) if constraint == "k_sparse" else {}
    return optim.settings(
        name,
        learning_rate=1.0 if name == "sfw" else 0.1,
        momentum=0.9,
        schedule="decrease_3",
        constraint=tables.options(polytopes.SETS, constraint, **own),
    )


def get_config(variant: str = "cnn"):
    tables.lookup(VARIANTS, variant, "variant")
    dense = variant == "mlp"
    network = tables.options(
        models.MODELS, "mlp" if dense else "small_cnn", init="torch", dtype="float32"
    )
    config = pipeline.base(
        title="Small-CNN study" if not dense else "Small-CNN study, dense network",
        data=dict(name="digits" if dense else "cifar10"),
        model=network,
        pipeline=("fit", "layerwise", "filters", "retrained", "weights"),
    )
    common = dict(batch_size=64 if dense else 128, augment="none" if dense else "pad_crop_flip")
    fit = dict(epochs=30 if dense else 20, evaluate_every=2, **common)
    config.weights = pipeline.stage("histogram")
    if variant == "story":
        config.pipeline = ()
        for arm in ("sgd", "sfw_k_sparse"):
            own = dict(label=ARMS[arm][0], optimizer=optimizer_of(arm, dense))
            config[f"fit_{arm}"] = pipeline.stage("train", start="init", **own, **fit)
            config.pipeline += (f"fit_{arm}", "curve", "weights")
        config.curve = pipeline.stage("curve")
        return config
    config.fit, config.retrain = (
        pipeline.stage("train", **fit),
        pipeline.stage("train", epochs=2, **common),
    )
    # rounded in every layer as the original does, and filters of convolutions only
    steps = dict(ratios=STEPS, count="per_layer")
    config.layerwise = pipeline.stage("curve", selection="layerwise", **steps)
    layers = "all" if dense else "convolutions"
    config.filters = pipeline.stage("curve", selection="structured", layers=layers, **steps)
    config.retrained = pipeline.stage("curve", selection="layerwise", retrain="retrain", **steps)
    arms = {}
    for arm in ARMS:
        first = optimizer_of(arm, dense)
        again = dict(first, learning_rate=first["learning_rate"] / 10, schedule=dict(name="keep"))
        arms[arm] = dict(
            label=ARMS[arm][0], fit=dict(optimizer=first), retrain=dict(optimizer=again)
        )
    config.sweep = dict(arms=arms, **(dict(seed=(0, 1, 2)) if dense else {}))
    return config
