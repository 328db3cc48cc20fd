"""Rows of repetition: with deterministic operations a product and a run repeat bit by bit."""

import functools
import pathlib
import tempfile
from collections.abc import Iterator

import curvature_rows
import jax
import networks
import numpy as np
import start_rows
import timing

from sparsity_jax import building, linops, train


def rows(*, small: bool) -> Iterator[timing.Row]:
    yield _of_runs(small=small)  # first, while this process holds no memory of the GPU
    building.use_deterministic(True)
    yield _of_product(small=small)


def _of_product(*, small: bool) -> timing.Row:
    problem = networks.problem(small=small)
    state = train.create_state(problem, train.key_of(0))
    images, labels = train.arrays(problem, "train")
    batch = images[:64], labels[:64]
    loss = functools.partial(curvature_rows.loss_of, problem, state.batch_stats)
    v = linops.rademacher(jax.random.key(0), state.params)
    product = jax.jit(lambda params, batch, v: linops.hvp(loss, params, batch)(v))
    first, second = (jax.device_get(product(state.params, batch, v)) for _ in range(2))
    equal = jax.tree.map(np.array_equal, first, second)
    differ = sum(not same for same in jax.tree.leaves(equal))
    name = "arrays of a product that differ when it is repeated, deterministic"
    return timing.one(name, differ, "", "<= 0")


def _of_runs(*, small: bool) -> timing.Row:
    config = start_rows.CONFIG + (start_rows.SMALL if small else "")
    plain = []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        for name in ("one", "other"):
            fixed = "--config.deterministic=True"
            done = start_rows.run(config, place / name, place / "cache", fixed)
            plain.append([_without_times(row) for row in done.rows])
    differ = sum(first != second for first, second in zip(*plain, strict=True))
    name = f"of {len(plain[0])} rows of a run those that differ in another, deterministic"
    return timing.one(name, differ, "", "<= 0")


def _without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if "seconds" not in key}
