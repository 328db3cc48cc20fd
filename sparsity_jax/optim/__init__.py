"""Sparsity-constrained optimizers as optax transformations, and the learning-rate schemes that
drive them.

A learning rate is a number, an optax schedule (step -> rate) or a `Rate` with state of its own,
such as one that follows the loss: then pass `value=loss` to `update`. Every number may be traced,
so a sweep over learning rates, momenta or radii is one compiled program.

What holds weights in sets or at zero (`sfw`, `adagrad_sfw`, `projected`, `pruned`) comes last in
an `optax.chain`; `check` of the optimizer's state tells whether something behind it undid that.

They work in the wrappers of optax; docs/sfw_options.md tells what to know of some. Arrays of no
entries stay as they are. Sums over steps are float32 or wider whatever the weights are
(`accumulator_dtype`).
"""

from sparsity_jax.optim.adagrad import adagrad_sfw
from sparsity_jax.optim.order import check
from sparsity_jax.optim.penalties import add_l1, add_l2, proximal_l1
from sparsity_jax.optim.pruning import PrunedState, PruningSchedule, masks_of, pruned
from sparsity_jax.optim.rates import (
    Rate,
    decrease_3,
    decrease_3_180,
    keep,
    learning_rate,
    multistep,
    scale_by_rate,
)
from sparsity_jax.optim.recipe import (
    OPTIMIZERS,
    PENALTIES,
    Config,
    Recipe,
    check_config,
    make,
    needs_norms,
    numbers,
    options,
    program,
    settings,
)
from sparsity_jax.optim.schedules import (
    SCHEDULES,
    cosine,
    dynamic_change,
    original_cosine,
    original_multistep,
    piecewise,
)
from sparsity_jax.optim.steps import (
    HeavyBallState,
    add_decayed_weights,
    frank_wolfe_step_size,
    heavy_ball,
    momentum_of,
    projected,
    sfw,
    sgd,
    with_momentum,
)

__all__ = [
    "OPTIMIZERS",
    "PENALTIES",
    "SCHEDULES",
    "Config",
    "HeavyBallState",
    "PrunedState",
    "PruningSchedule",
    "Rate",
    "Recipe",
    "adagrad_sfw",
    "add_decayed_weights",
    "add_l1",
    "add_l2",
    "check",
    "check_config",
    "cosine",
    "decrease_3",
    "decrease_3_180",
    "dynamic_change",
    "frank_wolfe_step_size",
    "heavy_ball",
    "keep",
    "learning_rate",
    "make",
    "masks_of",
    "momentum_of",
    "multistep",
    "needs_norms",
    "numbers",
    "options",
    "original_cosine",
    "original_multistep",
    "piecewise",
    "program",
    "projected",
    "proximal_l1",
    "pruned",
    "scale_by_rate",
    "settings",
    "sfw",
    "sgd",
    "with_momentum",
]
