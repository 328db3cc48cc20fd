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

    def traced() -> Channels:
        network = traceable(problem)
        return groups.trace(*network, branches=branches)

    return problem.once(("channels", branches), traced)


def filters_of(problem: Problem) -> Channels:
    """Channels of the network as a function of its params alone: each side of a residual sum may
    lose its own.
    """

    def traced() -> Channels:
        apply, variables, image = traceable(problem)
        ones = lambda leaf: np.ones(leaf.shape, leaf.dtype)
        fixed = jax.tree.map(ones, variables["batch_stats"])  # statistics are never masked
        of_params = lambda params, images: apply({"params": params, "batch_stats": fixed}, images)
        return groups.trace(of_params, variables["params"], image, branches="separate")

    return problem.once("filters", traced)


def traceable(problem: Problem) -> tuple[Callable, PyTree, ShapeDtypeStruct]:
    """The run's network as a function, its variables and its input, of which only shapes count."""
    return problem.model.apply, problem.shapes(), problem.image(2)


def without(state: State, channels: Channels, keep: Keep, kept: PyTree) -> State:
    """`state` of one member without the channels that `keep` leaves out, nor what the masks `kept`
    do.
    """
    whole = dict(params=kept, batch_stats=state.batch_stats)
    left = groups.mask(whole, channels, keep)
    params = masks.apply(state.params, left["params"])
    return state._replace(
        params=params,
        masks=left["params"],
        batch_stats=left["batch_stats"],
    )
