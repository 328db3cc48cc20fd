"""What a stage of a pipeline is: a class whose fields are its options, with all that the runner
asks of it.

The runner makes a stage of its config, asks it to check itself, and runs it; it knows no stage by
name.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sparsity_jax import tables
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import MemberRows, PyTree, Rows

__all__ = [
    "Carried",
    "Order",
    "Place",
    "Stage",
    "carried",
    "needs_memory",
    "rows_joined",
    "rows_per_member",
    "without_optimizer",
]


class Carried(NamedTuple):
    """What a training hands on to the next one, through cuts; dicts of arrays only, so that a
    checkpoint tells their structure.
    """

    momentum: PyTree = ()  # the fields of heavy-ball momentum
    saliency: PyTree = ()  # the tracked importance of every weight


def carried(stored: PyTree) -> Carried | tuple[()]:
    """`Carried`, of nested dicts as a checkpoint gives them back; () of anything else."""
    fields = set(stored) if isinstance(stored, dict) else set()
    if fields == {*Carried._fields}:
        return Carried(**stored)
    return ()


class Place(NamedTuple):
    """Where in the pipeline a stage stands.

    settings: the checked stages of the config by name, one per member of those that run side by
    side. earlier: per member, the rows of all stages before it, those of the run it started from
    included. rows: per member, its own so far. visit: how often the pipeline has named the stage so
    far, this time included; visits: how often it does in all.
    """

    name: str
    position: int
    settings: dict[str, list[Any]]
    earlier: Sequence[Rows] = ()
    rows: MemberRows = [[]]  # noqa: RUF012 - never changed
    visit: int = 1
    visits: int = 1

    @property
    def own(self) -> list[Any]:
        """The stage itself, one per member."""
        return self.settings[self.name]

    def of_member(self, member: int) -> "Place":
        """The place as it is for one member alone."""
        return self._replace(
            settings={name: [stages[member]] for name, stages in self.settings.items()},
            earlier=self.earlier[member : member + 1],
            rows=self.rows[member : member + 1],
        )


class Order(NamedTuple):
    """The stages around one, while a config is checked.

    before: the settings of those before it in the pipeline, in order. done: kinds of all that will
    be finished, by name, those of earlier runs included. all: the settings of all stages of the
    config, by name.
    """

    before: Sequence["Stage"]
    done: Mapping[str, str]
    all: Mapping[str, "Stage"]
    visits: int = 1


@tables.option
class Stage:
    """One stage. Fields of subclasses are its options; `run` is all that they must have.

    kind: its name in configs. needs: kinds of which one must have run before. trains: whether it
    trains a network, whose label in the report is its own; makes_network: whether it makes another
    network without that. retrain: name of the `train` config that it runs itself.
    """

    kind: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False
    makes_network: ClassVar[bool] = False
    retrain = ""  # without a type, so that it is no field of every stage

    # Checks. They name fields of the stage; the runner adds its place in the config.

    def check(self) -> None:
        """Raises ConfigError for options that do not fit each other."""

    def check_order(self, order: Order) -> None:
        """Raises ConfigError for a stage that does not fit those around it."""

    def check_streamed(self) -> None:
        """Raises ConfigError for a stage that needs all images in memory."""

    def check_network(self, problem: Any, visits: int) -> None:
        """Raises ConfigError for options that do not fit the network or the data; nothing is
        compiled.
        """

    # Running. Of members that run side by side, their first stage is asked

    def together(self) -> Hashable:
        """Members whose stages agree in this can run side by side, in one compiled program."""
        return self

    def steps_per_epoch(self, problem: Any) -> int:
        """Steps of a state's counter that are an epoch."""
        del problem
        return 1

    def steps_in_all(self, problem: Any) -> int:
        """Steps of training that it makes, at most; 0 where it trains nothing by itself."""
        del problem
        return 0

    def begin(self, problem: Any, state: PyTree, place: Place) -> PyTree:
        """The state that it starts from; pure, so that a resumed run knows its structure."""
        del problem, place
        return without_optimizer(state)

    def run(self, problem: Any, state: PyTree, place: Place) -> Iterator[Any]:
        """Yields `train.Update`s, from each of which it can be resumed: with the state of the last
        one, and all rows so far in `place.rows`.
        """
        raise NotImplementedError

    def hand_on(self, opt_state: PyTree) -> Carried | tuple[()]:
        """What of the optimizer's state a later training, or cut, may use."""
        if isinstance(opt_state, Carried):
            return opt_state
        return ()


def needs_memory(field: str, value: Any, why: str) -> ConfigError:
    """The error of a stage that needs all images in memory; why: what for."""
    return ConfigError(
        field, value, why=f"{why}, but config.data.stream leaves images where they are"
    )


def without_optimizer(state: PyTree) -> PyTree:
    """The state between two stages: no optimizer, step 0."""
    zeros = jax.tree.map(jnp.zeros_like, state.metrics)
    fresh = zeros._replace(bad_step=jnp.full_like(state.metrics.bad_step, -1))
    return state._replace(opt_state=(), step=jnp.zeros_like(state.step), metrics=fresh)


def rows_per_member(problem: Any) -> MemberRows:
    """No rows, for every member."""
    return [[] for _ in range(problem.members or 1)]


def rows_joined(rows: MemberRows, more: MemberRows) -> MemberRows:
    """Rows of each member, then further ones of it."""
    return [[*first, *second] for first, second in zip(rows, more, strict=True)]
