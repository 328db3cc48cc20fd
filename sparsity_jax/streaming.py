"""What training and evaluation read of a problem whose data is streamed, see `stream`."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import meshes, stopping, stream
from sparsity_jax.types import PyTree

__all__ = ["Calls", "batches", "examples", "measured", "put", "steps"]

# (state after a compiled call, steps so far, images that could not be read) of each call
Calls = Generator[tuple[Any, int, Sequence[str]], None, None]


def put(problem: Any, batch: tuple[np.ndarray, ...]) -> tuple[Array, ...]:
    """Arrays of a batch on the device, or split over those of the mesh."""
    sharding = problem.over_devices(batch[0])
    if sharding is None:
        return problem.place(batch)
    return meshes.put(batch, sharding)


def examples(problem: Any, split: str, indices: np.ndarray) -> tuple[Array, Array]:
    """The images and labels of a split with these numbers."""
    images = problem.split(split).images
    return problem.place(stream.examples(images, indices.tolist()))


def batches(problem: Any, split: str) -> stream.Batches:
    """A split in order, for evaluation; `stream.eval_batches`."""
    return stream.eval_batches(
        problem.split(split).images,
        batch_size=problem.evaluation_batch(split),
        put=partial(put, problem),
    )


def steps(
    problem: Any, fit: Any, state: Any, step_on: Callable, position: int, lost: Sequence[str]
) -> Calls:
    """Training, one step per call, on a batch that was read ahead.

    step_on: `step_on(state, images, labels)`. lost: images that were unreadable before.
    """
    step = int(state.step)
    read = stream.train_batches(
        problem.dataset.train.images,
        [*np.asarray(state.key).tolist(), position],
        batch_size=fit.batch_size,
        epochs=fit.epochs,
        start=step,
        put=partial(put, problem),
        lost=lost,
    )
    with closing(read):
        for batch in read:
            stopping.check()
            state = step_on(state, batch.images, batch.labels)
            step += 1
            yield state, step, batch.unreadable


def measured(
    problem: Any, networks: Sequence[tuple[PyTree, PyTree]], split: str, sums: Callable
) -> list[tuple[Array, Array, list[str]]]:
    """(mean loss, accuracy, images left out) of each network on a split, which is read once.

    sums: `sums(params, batch_stats, images, labels)`, of a batch.
    """
    totals: list[tuple] = [(0.0, 0)] * len(networks)
    unreadable: list[str] = []
    with closing(batches(problem, split)) as read:
        for batch in read:
            stopping.check()
            new = [sums(*network, batch.images, batch.labels) for network in networks]
            totals = jax.tree.map(jnp.add, totals, new)
            unreadable += batch.unreadable
    count = max(problem.size(split) - len(unreadable), 1)
    return [(loss / count, correct / count, unreadable) for loss, correct in totals]
