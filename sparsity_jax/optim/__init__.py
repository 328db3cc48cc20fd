"""Sparsity-constrained optimizers as optax transformations, and the learning-rate schemes that
drive them.

A learning rate is a number, an optax schedule (step -> rate) or a `Rate` with state of its own,
such as one that follows the loss: then pass `value=loss` to `update`. Every number may be traced,
so a sweep over learning rates, momenta or radii is one compiled program.

They work in the wrappers of optax; docs/sfw_options.md tells what to know of some. Arrays of no
entries stay as they are. Sums over steps are float32 or wider whatever the weights are
(`accumulator_dtype`).
"""

from sparsity_jax.optim.adagrad import adagrad_sfw as adagrad_sfw
from sparsity_jax.optim.penalties import add_l1 as add_l1
from sparsity_jax.optim.penalties import add_l2 as add_l2
from sparsity_jax.optim.penalties import proximal_l1 as proximal_l1
from sparsity_jax.optim.rates import Rate as Rate
from sparsity_jax.optim.rates import decrease_3 as decrease_3
from sparsity_jax.optim.rates import decrease_3_180 as decrease_3_180
from sparsity_jax.optim.rates import keep as keep
from sparsity_jax.optim.rates import learning_rate as learning_rate
from sparsity_jax.optim.rates import multistep as multistep
from sparsity_jax.optim.rates import scale_by_rate as scale_by_rate
from sparsity_jax.optim.recipe import OPTIMIZERS as OPTIMIZERS
from sparsity_jax.optim.recipe import PENALTIES as PENALTIES
from sparsity_jax.optim.recipe import Config as Config
from sparsity_jax.optim.recipe import Recipe as Recipe
from sparsity_jax.optim.recipe import check as check
from sparsity_jax.optim.recipe import make as make
from sparsity_jax.optim.recipe import needs_norms as needs_norms
from sparsity_jax.optim.recipe import numbers as numbers
from sparsity_jax.optim.recipe import options as options
from sparsity_jax.optim.recipe import program as program
from sparsity_jax.optim.recipe import settings as settings
from sparsity_jax.optim.schedules import SCHEDULES as SCHEDULES
from sparsity_jax.optim.schedules import cosine as cosine
from sparsity_jax.optim.schedules import dynamic_change as dynamic_change
from sparsity_jax.optim.schedules import original_cosine as original_cosine
from sparsity_jax.optim.schedules import original_multistep as original_multistep
from sparsity_jax.optim.schedules import piecewise as piecewise
from sparsity_jax.optim.steps import HeavyBallState as HeavyBallState
from sparsity_jax.optim.steps import add_decayed_weights as add_decayed_weights
from sparsity_jax.optim.steps import frank_wolfe_step_size as frank_wolfe_step_size
from sparsity_jax.optim.steps import heavy_ball as heavy_ball
from sparsity_jax.optim.steps import momentum_of as momentum_of
from sparsity_jax.optim.steps import projected as projected
from sparsity_jax.optim.steps import sfw as sfw
from sparsity_jax.optim.steps import sgd as sgd
from sparsity_jax.optim.steps import with_momentum as with_momentum
