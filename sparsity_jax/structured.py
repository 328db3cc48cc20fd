"""What the stages of structured pruning share: the channels of the run's network, and the state
without some of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import ShapeDtypeStruct

from sparsity_jax import groups, masks
from sparsity_jax.groups import Channels
from sparsity_jax.train import Problem, State
from sparsity_jax.types import PyTree

__all__ = ["Keep", "channels_of", "filters_of", "traceable", "without"]

Keep = Mapping[str, Any]  # bools by name of group, True = kept


def channels_of(problem: Problem, *, branches: groups.Branches = "tied") -> Channels:
    """The channel groups of the run's network."""
    key = ("channels", branches)
    return problem.once(key, lambda: groups.trace(*traceable(problem), branches=branches))


def filters_of(problem: Problem) -> Channels:
    """Channels of the network as a function of its params alone: each side of a residual sum may
    lose its own.
    """

    def traced() -> Channels:
        fixed = dict(problem.shapes())
        params = fixed.pop("params")
        # statistics are never masked
        fixed = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), fixed)
        apply = lambda params, images: problem.model.apply({**fixed, "params": params}, images)
        return groups.trace(apply, params, problem.image(2), branches="separate")

    return problem.once("filters", traced)


def traceable(problem: Problem) -> tuple[Callable, PyTree, ShapeDtypeStruct]:
    """The run's network as a function, its variables and its input, of which only shapes count."""
    return problem.model.apply, problem.shapes(), problem.image(2)


def without(state: State, channels: Channels, keep: Keep, kept: PyTree) -> State:
    """`state` of one member without the channels that `keep` leaves out, nor what the masks `kept`
    do.
    """
    tree = groups.mask(dict(params=kept, batch_stats=state.batch_stats), channels, keep)
    params = masks.apply(state.params, tree["params"])
    return state._replace(params=params, masks=tree["params"], batch_stats=tree["batch_stats"])
