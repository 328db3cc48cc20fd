"""What the stages of structured pruning share: the channels of the run's network, the state without
some of them, and stages that are written for one network.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsity_jax import groups, interface, masks, train
from sparsity_jax.groups import Channels
from sparsity_jax.interface import Place
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import PyTree, Rows

Keep = Mapping[str, Any]  # bools by name of group, True = kept
Result = tuple[State, Rows]  # one network's state after a stage, and its rows


def channels_of(problem: Problem, branches: groups.Branches = "tied") -> Channels:
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


class EachMember(interface.Stage):
    """A stage that is written for one network; those of a sweep take their turns."""

    def of_member(self, problem: Problem, state: State, place: Place) -> Result:
        """What the stage does to one network. place: with the settings of one member."""
        raise NotImplementedError

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        alone = problem
        if problem.members is not None:
            alone = problem.once("alone", lambda: problem._replace(members=None, compiled={}))
        states = []
        new = []
        for i, stage in enumerate(place.own):
            after, added = stage.of_member(
                alone, train.member_of(problem, state, i), place.of_member(i)
            )
            states.append(after)
            new.append(added)
        together = states[0]
        if problem.members is not None:
            together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        yield Update(together, new, 1.0)
