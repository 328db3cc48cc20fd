"""Stages that try things on a network: every choice of what to remove (`oracle`, of a tiny one),
other weights for what is left (`reinit`), noise on them (`noise`), and its Jacobian (`jacobian`).

Source: Wang, Qin, Zhang, Fu 2021, arXiv:2012.09243, and its published code; see `probes` and
    `surgery`.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import (
    alone,
    growing,
    interface,
    probes,
    removal,
    surgery,
    tables,
    train,
    trees,
    units,
)
from sparsity_jax.interface import Place
from sparsity_jax.tables import Count, option
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import Fields, PyTree

__all__ = ["STAGES", "Jacobian", "Noise", "Oracle", "Reinit"]

# oracle -------------------------------------------------------------------------------------------


@option
class Oracle(removal.Choosing):
    """Tries every choice of groups, all layers together, and removes that of the least training
    loss: tiny networks.

    ratios, skip, granularity: what may go, see `remove`; `gap` is not allowed. limit: choices above
        which it refuses.
    batch: choices a compiled call evaluates. retrain: name of a `train` config that trains the
    network after each choice, before its loss counts; the choices then run one after the other. The
    row tells how many choices are better than that by norm (`rank`, 1: none).
    """

    kind: ClassVar[str] = "oracle"
    ratios: str | tuple
    skip: str = ""
    granularity: Literal["filter", "channel"] = "filter"
    limit: Count = 100_000
    batch: Count = 16
    retrain: str = ""

    def check_streamed(self) -> None:
        why = "which evaluates every choice on all images in memory"
        raise interface.needs_memory("kind", self.kind, why)

    def check_network(self, problem: Problem, visits: int) -> None:
        super().check_network(problem, visits)
        self._counts(problem)

    def _losing(self, problem: Problem) -> list[units.Layer]:
        return [layer for layer in self.layers(problem) if layer.num_pruned != 0]

    def _counts(self, problem: Problem) -> dict[str, tuple[int, int]]:
        """(units, how many go) of the layers that lose any; raises ConfigError where that cannot be
        tried exhaustively.
        """
        counts = {}
        for layer in self._losing(problem):
            if layer.num_pruned is None:
                raise tables.ConfigError("ratios", self.ratios, allowed="numbers, no 'gap'")
            counts[layer.name] = (layer.size, layer.num_pruned)
        with tables.blaming("limit", self.limit):
            probes.check_counts(counts, self.limit)
        return counts

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        if self.retrain:
            batch = 1
            evaluate = self._trained(problem, state, place)
        else:
            batch = self.batch
            evaluate = self._evaluated(problem, state)
        result = probes.oracle(evaluate, self._counts(problem), batch=batch, limit=self.limit)
        by_norm = growing.pick(state.params, self._losing(problem))
        losses = result.losses
        row = dict(
            choices=len(losses),
            loss=float(losses.min()),
            loss_by_norm=float(losses[probes.row_of(result, by_norm)]),
            rank=probes.rank(result, by_norm),
            losses=np.sort(losses)[:10_000].tolist(),
        )
        best = jax.tree.map(jnp.asarray, result.best)
        return self.removed(problem, state, best), [row]

    def _evaluated(self, problem: Problem, state: State) -> Callable:
        """Training losses of a batch of choices, in one compiled call."""
        compiled = problem.program(_losses_of, self)
        return lambda keeps: compiled(state, keeps, *train.arrays(problem, "train"))

    def _trained(self, problem: Problem, state: State, place: Place) -> Callable:
        """The training loss after training what one choice leaves."""
        fits = place.settings[self.retrain]
        numbers = train.numbers_of(problem, state, fits)
        cut = problem.program(_removed, self)

        def evaluate(keeps: PyTree) -> np.ndarray:
            keep = {name: jnp.asarray(choices[0]) for name, choices in keeps.items()}
            left = cut(state, keep)
            current = train.trained(problem, left, fits, numbers, place.position)
            loss, _ = train.evaluate(problem, current.params, current.batch_stats, "train")
            return np.asarray(loss)[None]

        return evaluate


def _removed(problem: Problem, stage: Oracle, state: State, keep: removal.Keep) -> State:
    return stage.removed(problem, state, keep)


def _losses_of(problem: Problem, stage: Oracle, state: State, keeps: PyTree, *data: Array) -> Array:
    """Training losses of the networks that choices leave, stacked in `keeps`."""

    def loss_of(keep: removal.Keep) -> Array:
        params, batch_stats, *_ = stage.removed(problem, state, keep)
        return train.evaluation(problem, "train", params, batch_stats, *data)[0]

    return jax.lax.map(loss_of, keeps)


# Changes and measurements without training --------------------------------------------------------


@option
class Reinit(alone.EachMember):
    """Draws the weights that are left anew, and starts the running statistics anew: is it the
    structure that matters?

    method: `normal` (He et al.) or `orthogonal`, with the fan-in of what is left; see
        `surgery.reinitialize`.
    """

    kind: ClassVar[str] = "reinit"
    method: str = "normal"

    def check(self) -> None:
        tables.lookup(surgery.METHODS, self.method, "method")

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        return problem.program(_drawn_anew, self)(state, place.position), []


def _drawn_anew(problem: Problem, stage: Reinit, state: State, position: int) -> State:
    key = train.stage_key(state.key, position)
    params = surgery.reinitialize(state.params, state.masks, key, method=stage.method)
    fresh = problem.init(jax.random.wrap_key_data(state.key))["batch_stats"]
    return state._replace(params=params, batch_stats=fresh)


@option
class Noise(interface.Stage):
    """Accuracy and loss of the network with Gaussian noise on its weights, `num` times; the network
    stays as it is.

    num: how often it is drawn. std: of the noise. relative: whether std is a share of the root mean
    square of each array.
    parameters: pattern of the whole paths of the arrays that get it. Masked weights stay zero.
    """

    kind: ClassVar[str] = "noise"
    std: tables.NonNegative = 0.01
    num: Count = 10
    relative: bool = False
    parameters: str = ".*"

    def check(self) -> None:
        trees.check_pattern(self.parameters, "parameters")

    def check_network(self, problem: Problem, visits: int) -> None:
        trees.matching(train.shapes_of(problem), self.parameters, "parameters")

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        disturbed = problem.program(_disturbed, self, axes=(0, None, None))
        for draw in range(len(place.rows[0]), self.num):
            params = disturbed(state, place.position, draw)
            loss, accuracy = train.evaluate(problem, params, state.batch_stats, "test")
            numbers = dict(loss=loss, accuracy=accuracy)
            drawn = train.member_rows(problem, numbers, draw=draw, std=self.std)
            yield Update(state, drawn, (draw + 1) / self.num)


def _disturbed(problem: Problem, stage: Noise, state: State, position: int, draw: int) -> PyTree:
    del problem
    return surgery.add_noise(
        state.params,
        jax.random.fold_in(train.stage_key(state.key, position), draw),
        std=stage.std,
        relative=stage.relative,
        pattern=stage.parameters,
        kept=state.masks,
    )


@option
class Jacobian(alone.EachMember):
    """Singular values of the Jacobian of the logits in the image, of `num_examples` train images:
    mean, spread and range. Which ones: see `config.sample`.

    Mean 1 and spread 0 is dynamical isometry. The network stays as it is.
    """

    kind: ClassVar[str] = "jacobian"
    num_examples: Count = 100

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        images = problem.images(problem.examples("train", self.num_examples)[0])
        numbers = problem.program(_isometry)(state, images)
        (rows,) = train.member_rows(problem, numbers, num_examples=len(images))
        return state, rows


def _isometry(problem: Problem, state: State, images: Array) -> Fields:
    variables = state.variables
    values = probes.jacobian_singular_values(
        problem.apply, variables, images, precision=problem.curvature_precision
    )
    return dict(probes.isometry(values)._asdict(), mean_by_rank=values.mean(0))


STAGES = (Oracle, Reinit, Noise, Jacobian)
