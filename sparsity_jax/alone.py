"""Stages that are written for one network: those of a sweep take their turns.

Each network is handed to its stage as if there were no other: a problem without members, its state,
and a place that holds its own settings and rows.
"""

from collections.abc import Iterator

from sparsity_jax import interface, train
from sparsity_jax.interface import Place
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import Rows

__all__ = ["EachMember", "OneByOne", "Result"]

Result = tuple[State, Rows]  # one network's state after a stage, and its rows


class EachMember(interface.Stage):
    """A stage that changes networks: all at once, after the turn of the last one."""

    def of_member(self, problem: Problem, state: State, place: Place) -> Result:
        """What the stage does to one network."""
        raise NotImplementedError

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        alone = problem.with_members(None)
        states = []
        rows = []
        for member, stage in enumerate(place.own):
            network = train.member_of(problem, state, member)
            after, added = stage.of_member(alone, network, place.of_member(member))
            states.append(after)
            rows.append(added)
        after_all = problem.divide(train.together(problem, states))
        yield Update(after_all, rows, 1.0)


class OneByOne(interface.Stage):
    """A stage that leaves networks as they are and reports what it measures as it goes."""

    def measure(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        """Updates of one network, as those of `run`.

        state: in its `opt_state` the stage remembers where it stands, of one network at a time.
        """
        raise NotImplementedError

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        alone = problem.with_members(None)
        networks = state._replace(opt_state=())
        for member, stage in enumerate(place.own):
            network = train.member_of(problem, networks, member)
            network = network._replace(opt_state=state.opt_state)
            for update in stage.measure(alone, network, place.of_member(member)):
                state = networks._replace(opt_state=update.state.opt_state)
                rows = interface.rows_per_member(problem)
                (rows[member],) = update.rows
                yield Update(state, rows, (member + update.done) / len(place.own))
