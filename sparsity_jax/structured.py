"""What the stages of structured pruning share: the channels of the run's network, and the state
without some of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsity_jax import groups, masks
from sparsity_jax.groups import Channels
from sparsity_jax.train import Problem, State
from sparsity_jax.types import PyTree

__all__ = ["Keep", "channels_of", "traceable", "variables_of", "without"]

Keep = Mapping[str, Any]  # bools by name of group, True = kept


def channels_of(problem: Problem, *, branches: groups.Branches = "tied") -> Channels:
    """The channel groups of the run's network."""
    traced = lambda: groups.trace(*traceable(problem), branches=branches)
    return problem.once(("channels", branches), traced)


def traceable(problem: Problem) -> tuple:
    """The run's network as a function, its variables and its input, of which only shapes count."""
    images = problem.dataset.test.images
    batch = jax.ShapeDtypeStruct((2, *images.shape[1:]), jnp.float32)
    variables = jax.eval_shape(problem.init, jax.random.key(0))
    return problem.model.apply, variables, batch


def variables_of(state: State) -> PyTree:
    """What a model is applied to."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def without(state: State, channels: Channels, keep: Keep, kept: PyTree) -> State:
    """`state` of one member without the channels that `keep` leaves out, nor what the masks `kept`
    do.
    """
    variables = dict(params=kept, batch_stats=state.batch_stats)
    masked = groups.mask(variables, channels, keep)
    kept = masked["params"]
    params = masks.apply(state.params, kept)
    return state._replace(params=params, masks=kept, batch_stats=masked["batch_stats"])
