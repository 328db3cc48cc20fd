"""What training and evaluation read of a problem whose data is streamed, see `stream`."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import hosts, meshes, stopping, stream
from sparsity_jax.types import Fields, PyTree

__all__ = ["Calls", "batches", "examples", "measured", "steps"]

# (state after a compiled call, steps so far, images that could not be read) of each call
Calls = Generator[tuple[Any, int, Sequence[str]], None, None]


def _shared(problem: Any, batch_size: int) -> Fields:
    """Options `put` and `rows` of batches: split over the devices, of several processes each reads
    what its own devices hold.
    """
    sharding = problem.over_devices(range(batch_size))
    if sharding is None:
        return dict(put=problem.place)
    if not hosts.several():
        return dict(put=partial(meshes.put, shardings=sharding))
    rows = meshes.own_rows(sharding, batch_size)
    return dict(put=partial(meshes.put_rows, rows, batch_size, sharding), rows=rows)


def examples(problem: Any, split: str, indices: np.ndarray) -> tuple[Array, Array]:
    """The images and labels of a split with these numbers."""
    images = problem.split(split).images
    return problem.place(stream.examples(images, indices.tolist()))


def batches(problem: Any, split: str) -> stream.Batches:
    """A split in order, for evaluation; `stream.eval_batches`."""
    batch_size = problem.evaluation_batch(split)
    images = problem.split(split).images
    return stream.eval_batches(images, batch_size=batch_size, **_shared(problem, batch_size))


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
        lost=lost,
        **_shared(problem, fit.batch_size),
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
