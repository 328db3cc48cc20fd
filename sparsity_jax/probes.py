"""Exact answers about small networks: every way to prune them, the singular values of their
Jacobians.

    found = probes.oracle(losses, {"conv1": (8, 4), "conv2": (8, 4)})    # 4 of 8 channels of each:
    4,900 networks found.best, probes.rank(found, keep)                                 # the best
    keep; how good another one is values = probes.jacobian_singular_values(model.apply, variables,
    images)

Source: Wang et al. 2021, arXiv:2012.09243, and its published code; Saxe et al. 2014,
    arXiv:1312.6120 (isometry).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import stopping, tables

PyTree = Any


# Every combination --------------------------------------------------------------------------------


class Oracle(NamedTuple):
    """Every network that `oracle` tried, in the lexicographic order of what it lacks."""

    sizes: dict[str, int]
    pruned: dict[str, np.ndarray]  # int [networks, number pruned]: ascending
    losses: np.ndarray  # float64 [networks]; inf for NaN

    def keep(self, row: int) -> dict[str, np.ndarray]:
        """Bool [size] of every layer of one network."""
        return {
            name: ~np.isin(np.arange(size), self.pruned[name][row])
            for name, size in self.sizes.items()
        }

    @property
    def best(self) -> dict[str, np.ndarray]:
        """`keep` of the lowest loss, the first of equals."""
        return self.keep(int(self.losses.argmin()))


def oracle(
    evaluate: Callable[[dict[str, np.ndarray]], Any],
    counts: Mapping[str, tuple[int, int]],
    *,
    batch: tables.Count = 64,
    limit: tables.Count = 1_000_000,
) -> Oracle:
    """Every combination of pruned groups: exhaustive, so for tiny networks only.

    counts: (groups, how many of them go), by name of layer; the combinations of all layers are
        crossed.
    evaluate: losses [batch] for bool [batch, groups] of every layer, True = kept, e.g.
        jax.jit(jax.vmap(loss)); the loss of the pruned network, or after fine-tuning it. The shapes
        are always the same: one compilation; the last batch repeats its last network.
    Raises ValueError for counts out of range and for more than `limit` combinations.
    """
    batch, limit = (
        tables.convert(n, tables.Count, name) for n, name in ((batch, "batch"), (limit, "limit"))
    )
    check_counts(counts, limit)
    pruned: dict[str, list] = {name: [] for name in counts}
    losses: list[np.ndarray] = []
    for rows in _batches(counts, batch):
        stopping.check()
        found = len(next(iter(rows.values())))
        keep = {}
        for name, (size, _) in counts.items():
            pruned[name].append(rows[name])
            keep[name] = np.ones((batch, size), bool)
            np.put_along_axis(
                keep[name], np.pad(rows[name], ((0, batch - found), (0, 0)), mode="edge"), False, 1
            )
        own = np.asarray(evaluate(keep), np.float64)
        if own.shape != (batch,):
            raise ValueError(
                f"evaluate returned the shape {own.shape}; needed: one loss per network, "
                f"({batch},)."
            )
        losses.append(own[:found])
    every = np.concatenate(losses)
    return Oracle(
        {name: size for name, (size, _) in counts.items()},
        {name: np.concatenate(rows) for name, rows in pruned.items()},
        np.where(np.isnan(every), np.inf, every),
    )


def check_counts(counts: Mapping[str, tuple[int, int]], limit: int) -> None:
    """Raises ValueError for no counts, counts out of range and for more than `limit`
    combinations.
    """
    if not counts:
        raise ValueError("counts names no layer, so there is nothing to try.")
    for name, (size, num) in counts.items():
        if not 0 <= num < size:
            raise ValueError(f"{name!r} loses {num} of {size} groups; allowed: 0 to {size - 1}.")
    total = math.prod(math.comb(size, num) for size, num in counts.values())
    if total > limit:
        raise ValueError(
            f"there are {total:,} combinations of {dict(counts)}, more than limit = {limit:,}; "
            "prune fewer layers at a "
            "time, take a smaller network or raise the limit."
        )


def _batches(counts: Mapping[str, tuple[int, int]], batch: int) -> Iterator[dict[str, np.ndarray]]:
    networks = itertools.product(
        *(itertools.combinations(range(size), num) for size, num in counts.values())
    )
    while rows := list(itertools.islice(networks, batch)):
        columns = zip(counts.items(), zip(*rows))
        yield {
            name: np.array(own, np.int32).reshape(len(rows), num)
            for (name, (_, num)), own in columns
        }


def row_of(found: Oracle, keep: Mapping[str, Any]) -> int:
    """The row of `found` that is the network `keep` leaves; raises ValueError if it is none of
    those tried.
    """
    same = np.ones(len(found.losses), bool)
    for name, size in found.sizes.items():
        if name not in keep:
            raise ValueError(
                f"keep has no {name!r}, which the oracle tried.{tables.closest(name, keep)}"
            )
        own = np.flatnonzero(~np.asarray(keep[name], bool))
        if np.shape(keep[name]) != (size,) or own.size != found.pruned[name].shape[1]:
            raise ValueError(
                f"keep[{name!r}] leaves out {own.size} of {np.size(keep[name])} groups; the "
                "oracle tried "
                f"{found.pruned[name].shape[1]} of {size}."
            )
        same &= (found.pruned[name] == own).all(1)
    return int(same.argmax())


def rank(found: Oracle, keep: Mapping[str, Any]) -> int:
    """1 + the number of networks with a lower loss than the one that `keep` leaves: 1 is the best
    of len(losses).

    Raises ValueError if it is none of those tried.
    """
    return 1 + int((found.losses < found.losses[row_of(found, keep)]).sum())


# Jacobians ----------------------------------------------------------------------------------------


class Isometry(NamedTuple):
    """Of singular values over all examples; an isometric network has mean 1 and std 0."""

    mean: Array
    std: Array
    smallest: Array
    largest: Array


def jacobian_singular_values(apply: Callable, variables: PyTree, inputs: Array) -> Array:
    """Singular values of d outputs / d input of each example, descending: [batch, min(outputs,
    entries of an input)].

    apply: (variables, inputs [batch, ...]) -> [batch, ...], without effects between examples
    (inference mode). Exact: as many products with the Jacobian as its smaller side, all examples at
    once; call it in chunks where that needs too much memory.
    """
    single = lambda x: apply(variables, x[None])[0].ravel()
    num_outputs = jax.eval_shape(single, inputs[0]).size
    jacobian = jax.jacrev(single) if num_outputs < inputs[0].size else jax.jacfwd(single)
    matrices = jax.vmap(jacobian)(inputs).reshape(len(inputs), num_outputs, -1)
    return jnp.linalg.svd(
        matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32)), compute_uv=False
    )


def isometry(values: Array) -> Isometry:
    """Mean, population standard deviation and range of singular values of any shape."""
    return Isometry(values.mean(), values.std(), values.min(), values.max())
