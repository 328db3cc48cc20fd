"""Stages that are written for one network: those of a sweep take their turns."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsity_jax import interface, train
from sparsity_jax.interface import Place
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import MemberRows, Rows

Result = tuple[State, Rows]  # one network's state after a stage, and its rows


class Turn(NamedTuple):
    """One network of a sweep, as if there were no other. place: its settings and rows alone."""

    problem: Problem
    state: State
    place: Place


def turn_of(problem: Problem, state: State, place: Place, member: int) -> Turn:
    """The turn of one member of a sweep, or of the only network."""
    others = {name: [members[member]] for name, members in place.others.items()}
    earlier = place.earlier[member : member + 1]
    place = place._replace(others=others, earlier=earlier)
    state = train.member_of(problem, state, member)
    return Turn(problem.with_members(None), state, place)


class EachMember(interface.Stage):
    """A stage that changes networks: all at once, after the turn of the last one."""

    def of_member(self, problem: Problem, state: State, place: Place) -> Result:
        """What the stage does to one network."""
        raise NotImplementedError

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: MemberRows,
    ) -> Iterator[Update]:
        states = []
        new = []
        for member, stage in enumerate(settings):
            turn = turn_of(problem, state, place, member)
            after, added = stage.of_member(*turn)
            states.append(after)
            new.append(added)
        together = states[0]
        if problem.members is not None:
            together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        yield Update(together, new, 1.0)


class OneByOne(interface.Stage):
    """A stage that leaves networks as they are and reports what it measures as it goes."""

    def measure(self, problem: Problem, state: State, place: Place, rows: Rows) -> Iterator[Update]:
        """Updates of one network. rows: those that it has already.

        state: its `opt_state` is what the stage itself remembers, of one network at a time.
        """
        raise NotImplementedError

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: MemberRows,
    ) -> Iterator[Update]:
        networks = state._replace(opt_state=())
        for member, stage in enumerate(settings):
            alone, network, here = turn_of(problem, networks, place, member)
            network = network._replace(opt_state=state.opt_state)
            for update in stage.measure(alone, network, here, rows[member]):
                state = networks._replace(opt_state=update.state.opt_state)
                new = interface.rows_per_member(problem)
                new[member] = update.rows[0]
                yield Update(state, new, (member + update.done) / len(settings))
