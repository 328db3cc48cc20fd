"""One network, two optimizers, every sparsity: stochastic Frank-Wolfe in a K-sparse polytope
against plain SGD.

An MLP on the 1,797 handwritten digits inside scikit-learn, three seeds at once, no retraining after
pruning.

    python -m sparsity_jax.run --config configs/quickstart.py --workdir runs/quickstart

Takes about half a minute on two CPU cores; the first figure of runs/quickstart/report.html tells
the story.
"""

from sparsity_jax import models, optim, pipeline, polytopes, tables


def get_config():
    config = pipeline.base(
        title="Train once, prune to any sparsity",
        data=dict(name="digits"),
        model=tables.options(models.MODELS, "mlp", widths=(256, 256), init="torch"),
        pipeline=("fit_sfw", "curve", "weights", "fit_sgd", "curve", "weights"),
        sweep=dict(seed=(0, 1, 2)),
    )
    common = dict(epochs=60, batch_size=64, start="init", evaluate_every=5)
    polytope = tables.options(polytopes.SETS, "k_sparse", k=10, k_frac=0.01, tau=15.0)
    sfw = optim.settings("sfw", learning_rate=1.0, schedule="decrease_3", constraint=polytope)
    config.fit_sfw = pipeline.stage(
        "train", label="SFW, K-sparse polytope", optimizer=sfw, **common
    )
    config.fit_sgd = pipeline.stage(
        "train", label="SGD", optimizer=optim.settings("sgd", learning_rate=0.1), **common
    )
    config.curve = pipeline.stage("curve")
    config.weights = pipeline.stage("histogram")
    return config
