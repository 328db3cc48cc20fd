"""The stage `grow` of growing regularisation: groups of weights go after penalties have pushed them
to zero.

Source: Wang, Qin, Zhang, Fu 2021, arXiv:2012.09243, and its published code; see `growing`.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
import optax
from jax import Array

from sparsity_jax import growing, losses, optim, removal, stages, tables, train, trees
from sparsity_jax.interface import Place, rows_joined
from sparsity_jax.tables import Count
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import Fields

__all__ = ["STAGES", "Grow"]


@tables.option
class _Pushing(train.Fit):
    """A training under the penalty of the stage `growth`, see `train.Fit`."""

    growth: Any = None  # type: ignore[misc]


@tables.option
class Grow(removal.Remove, growing.Penalty):
    """Trains under a growing penalty until what it pushes is small, then removes that: GReg-1,
    GReg-2, FixReg.

    The stage ends at the first log after all layers are done and have rested for `stabilize_steps`;
    networks of a sweep that run side by side end together, and those done first train on at rest.

    ratios, skip, granularity, pick, inherit, inherit_as, reading: what is removed, see `remove`.
    penalty_only: the loss has no gradient on kernels, so that only penalties move them. log_every:
    steps between logs of the penalties and norms of each layer, counted anew every epoch;
    log_scores: with the norm of every unit.
    """

    kind: ClassVar[str] = "grow"
    optimizer: optim.Config
    batch_size: Count = 128
    augment: str = "none"
    loss: losses.Config = losses.CROSS_ENTROPY
    penalty_only: bool = False
    evaluate_every: Count = 1
    log_every: Count = 100
    log_scores: bool = False

    def check(self) -> None:
        super().check()
        self.plan()  # raises ConfigError for limits that are never reached
        self.training().check()

    def check_streamed(self) -> None:
        self.training().check_streamed()

    def check_network(self, problem: Problem, visits: int) -> None:
        self.training().check_network(problem, visits)
        super().check_network(problem, visits)

    def together(self) -> tuple:
        return self.training().together()

    def steps_per_epoch(self, problem: Problem) -> int:
        return self.training().steps_per_epoch(problem)

    def most_epochs(self, problem: Problem) -> int:
        """As many as growth may take, and one more, which it never ends."""
        return math.ceil(self.most_steps() / self.steps_per_epoch(problem)) + 1

    def steps_in_all(self, problem: Problem) -> int:
        return self.most_epochs(problem) * self.steps_per_epoch(problem)

    def training(self, epochs: int = 1) -> train.Fit:
        """What trains under the penalty."""
        names = ("batch_size", "optimizer", "loss", "augment", "evaluate_every")
        fields = {name: getattr(self, name) for name in names}
        # members with other numbers of one optimizer share their program
        growth = dataclasses.replace(self, optimizer=tables.Options())
        return _Pushing(epochs=epochs, growth=growth, **fields)

    def make(self, problem: Problem, key: Array) -> optax.GradientTransformation:
        """The penalty, for `train.Fit.growth`. key: the member's root key (raw)."""
        root = jax.random.wrap_key_data(key)
        penalty = growing.growing_l2(
            self.layers(problem),
            key=jax.random.fold_in(root, 2**31 - 1),
            keep=self.kept_there(problem),
            **{name: getattr(self, name) for name in tables.parameters(growing.Penalty)},
        )
        if not self.penalty_only:
            return penalty
        kernels = lambda params: trees.map_named(lambda path, _: trees.is_kernel(path), params)
        return optax.chain(optax.masked(optax.set_to_zero(), kernels), penalty)

    def begin(self, problem: Problem, state: State, place: Place) -> State:
        self.layers(problem)  # reads the run it inherits from before anything compiles
        return train.begin_members(problem, state, *_fits_of(problem, state, place.own))

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        fits, numbers = _fits_of(problem, state, place.own)
        fit = fits[0]
        spe = fit.steps_per_epoch(problem)
        look = problem.program(_look, self, key=fit.growth)
        for update in train.fit_epochs(problem, state, fit, numbers, place.position, place.rows[0]):
            step = int(np.ravel(update.state.step)[0])
            if step % spe % self.log_every:
                yield update
                continue
            logged = train.member_rows(problem, look(update.state), step=step)
            ended = [row.pop("finished") for (row,) in logged]
            update = update._replace(rows=rows_joined(update.rows, logged))
            if all(ended):
                break
            yield update
        train.check_finite(update.state, spe)
        with train.naming("before it removes"):
            stages.check_weights(problem, update.state)
        state, shares = problem.program(_grown, self, key=fit.growth)(update.state)
        last = train.member_rows(problem, shares, step=step)
        yield Update(state, rows_joined(update.rows, last), 1.0)


def _look(problem: Problem, stage: Grow, state: State) -> Fields:
    """Fields of a row, and whether growth has ended."""
    progress = growing.progress(state.opt_state)
    row: Fields = dict(
        finished=growing.finished(state.opt_state),
        growth={name: numbers._asdict() for name, numbers in progress.items()},
    )
    if stage.log_scores:
        keep = growing.kept(state.opt_state)
        norms = growing.scores(state.params, stage.layers(problem))
        row |= dict(keep=keep, scores={name: norms[name] for name in keep})
    return row


def _grown(problem: Problem, stage: Grow, state: State) -> tuple[State, Fields]:
    state = stage.removed(problem, state, growing.kept(state.opt_state))
    return state, removal.shares_removed(state)


def _fits_of(
    problem: Problem, state: State, members: Sequence[Grow]
) -> tuple[list[train.Fit], Fields]:
    """The trainings of all members and their traced numbers."""
    fits = [stage.training(stage.most_epochs(problem)) for stage in members]
    return fits, train.numbers_of(problem, state, fits) | dict(key=state.key)


STAGES = (Grow,)
