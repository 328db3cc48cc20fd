"""The stage `sfw_init`: learned scales of the initial weights, before a Frank-Wolfe training."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, random

from sparsity_jax import (
    data,
    gradinit,
    interface,
    losses,
    optim,
    polytopes,
    stopping,
    tables,
    train,
)
from sparsity_jax.interface import Place, Stage
from sparsity_jax.tables import Options, Range, option
from sparsity_jax.train import NonFiniteLossError, Problem, State, Update, member_rows
from sparsity_jax.types import Fields, PyTree

__all__ = ["STAGES", "SfwInit"]


@option
class SfwInit(Stage):
    """Learns one scale per parameter array so that one Frank-Wolfe step helps most (SFW-Init).

    constraint, learning_rate: as in the training that follows. Each iteration draws `batch_size`
    examples, an even number, for the inner step, keeps half of them and draws half anew for the
    objective.
    scale_learning_rate, min_scale, clip: of the scales. norms: how radii are measured, as in an
    optimizer.
    """

    kind: ClassVar[str] = "sfw_init"
    constraint: polytopes.Config = Options(name="k_sparse")
    learning_rate: Annotated[float, Range(0.0, 1.0, above=True)] = 1.0
    iterations: tables.Count = 390
    batch_size: Annotated[int, Range(2)] = 128
    scale_learning_rate: tables.Positive = 1e-3
    min_scale: tables.NonNegative = 0.01
    clip: tables.Positive = 1.0
    norms: Literal["per_parameter", "per_shape"] = "per_parameter"
    augment: str = "none"

    @property
    def recipe(self) -> optim.Recipe:
        """The Frank-Wolfe step as an optimizer; raises ConfigError."""
        fields = ("learning_rate", "constraint", "norms")
        return optim.check_config({"name": "sfw", **{name: getattr(self, name) for name in fields}})

    def check(self) -> None:
        optim.program(self.recipe)
        tables.lookup(data.AUGMENTATIONS, self.augment, "augment")

    def check_streamed(self) -> None:
        raise interface.needs_memory("kind", self.kind, "which draws from all images in memory")

    def check_network(self, problem: Problem, visits: int) -> None:
        train.check_batch(self, problem)
        train.check_recipe(self.recipe, problem)
        if problem.division is not None:
            halves = 2 * problem.division.mesh.size
            if self.batch_size % halves:
                allowed = f"multiples of {halves}, twice the devices"
                raise tables.ConfigError("batch_size", self.batch_size, allowed=allowed)

    def together(self) -> tuple:
        same = dataclasses.replace(self, constraint=Options(), learning_rate=1.0)
        return same, optim.program(self.recipe)

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        key = (self.together(), place.position)
        axes = (0, 0, 0, None, None)
        iterate = problem.program(_rescaled, self, place.position, key=key, axes=axes)
        numbers = train.numbers_of(problem, state, place.own)
        begin = problem.program(_unscaled)
        scales = begin(state.params)
        images, labels = train.arrays(problem, "train")
        for i in range(1, self.iterations + 1):
            stopping.check()
            scales, losses_around = iterate(scales, state, numbers, images, labels)
            last = i == self.iterations
            if i > 1 and i % 10 and not last:
                continue
            rows = member_rows(problem, losses_around, iteration=i)
            if not np.isfinite([row["loss_after"] for (row,) in rows]).all():
                raise NonFiniteLossError(f"the loss is not finite at iteration {i}.")
            # the scales are not part of the state: an interrupted stage starts anew and finds the
            # same ones
            scaled = state._replace(params=scales.params) if last else None
            yield Update(scaled, rows, i / self.iterations)


def _unscaled(problem: Problem, params: PyTree) -> gradinit.ScaleState:
    """Scales of one."""
    del problem
    return gradinit.init(params)


def _rescaled(
    problem: Problem,
    stage: SfwInit,
    position: int,
    scales: gradinit.ScaleState,
    state: State,
    numbers: Fields,
    images: Array,
    labels: Array,
) -> tuple[gradinit.ScaleState, Fields]:
    """(scales after one iteration, losses before and after its inner step), of one member."""
    size = problem.size("train")
    half = stage.batch_size // 2
    keys = random.split(random.fold_in(train.stage_key(state.key, position), scales.step), 4)
    number = 3 * half
    index = random.choice(keys[0], size, (number,), replace=size < number)
    augment = data.make_augmentation(stage.augment, problem.dataset)
    inputs = problem.images(augment(keys[1], images[index]))
    targets = labels[index]

    def batch(second: int, key: Array) -> tuple:
        """The first half of a batch with the second or third, and the key of its dropout."""
        behind = slice(second * half, (second + 1) * half)
        halves = [jnp.concatenate([part[:half], part[behind]]) for part in (inputs, targets)]
        return (*halves, key)

    def loss(params: PyTree, batch: tuple) -> Array:
        inputs, targets, key = batch
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = problem.apply_train(variables, inputs, key)
        return losses.cross_entropy(logits, targets).mean()

    step = gradinit.scale_step(
        loss,
        numbers["sets"],
        learning_rate=numbers["learning_rate"],
        scale_learning_rate=stage.scale_learning_rate,
        min_scale=stage.min_scale,
        clip=stage.clip,
        precision=problem.curvature_precision,
    )
    inner = batch(1, keys[2])
    outer = batch(2, keys[3])
    scales, metrics = step(scales, inner, outer)
    return scales, dict(loss_before=metrics.loss_before, loss_after=metrics.loss_after)


STAGES = (SfwInit,)
