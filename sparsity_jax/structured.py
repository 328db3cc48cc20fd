"""What the stages of structured pruning share: the channels of the run's network, and the state
without some of them.
"""

from collections.abc import Callable, Mapping
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
    key = ("channels", branches)
    return problem.once(key, lambda: groups.trace(*traceable(problem), branches=branches))


def traceable(problem: Problem) -> tuple[Callable, PyTree, jax.ShapeDtypeStruct]:
    """The run's network as a function, its variables and its input, of which only shapes count."""
    image = jax.ShapeDtypeStruct((2, *problem.dataset.test.images.shape[1:]), jnp.float32)
    return problem.model.apply, jax.eval_shape(problem.init, jax.random.key(0)), image


def variables_of(state: State) -> PyTree:
    """What a model is applied to."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def without(state: State, channels: Channels, keep: Keep, kept: PyTree) -> State:
    """`state` of one member without the channels that `keep` leaves out, nor what the masks `kept`
    do.
    """
    tree = groups.mask(dict(params=kept, batch_stats=state.batch_stats), channels, keep)
    params = masks.apply(state.params, tree["params"])
    return state._replace(params=params, masks=tree["params"], batch_stats=tree["batch_stats"])
