"""Exact answers about small networks: every way to prune them, the singular values of their
Jacobians.

    # 4 of 8 channels of each: 4,900 networks
    found = probes.oracle(losses, {"conv1": (8, 4), "conv2": (8, 4)})
    found.best, probes.rank(found, keep)    # the best keep; how good another one is
    values = probes.jacobian_singular_values(model.apply, variables, images)

Source: Wang et al. 2021, arXiv:2012.09243, and its published code; Saxe et al. 2014,
    arXiv:1312.6120 (isometry).
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy import ndarray

from sparsity_jax import stopping, tables, trees
from sparsity_jax.types import PyTree

# Every combination --------------------------------------------------------------------------------


Counts = Mapping[str, tuple[int, int]]


class Oracle(NamedTuple):
    """Every network that `oracle` tried, in the lexicographic order of what it lacks."""

    sizes: dict[str, int]
    pruned: dict[str, ndarray]  # int [networks, number pruned]: ascending
    losses: ndarray  # float64 [networks]; inf for NaN

    def keep(self, row: int) -> dict[str, ndarray]:
        """Bool [size] of every layer of one network."""
        pruned = {name: rows[row] for name, rows in self.pruned.items()}
        return {name: ~np.isin(range(size), pruned[name]) for name, size in self.sizes.items()}

    @property
    def best(self) -> dict[str, ndarray]:
        """`keep` of the lowest loss, the first of equals."""
        return self.keep(int(self.losses.argmin()))


def oracle(
    evaluate: Callable[[dict[str, ndarray]], Any],
    counts: Counts,
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
    batch = tables.convert(batch, tables.Count, "batch")
    check_counts(counts, tables.convert(limit, tables.Count, "limit"))
    layers = [itertools.combinations(range(size), num) for size, num in counts.values()]
    networks = itertools.product(*layers)
    tried: list[tuple] = []
    losses: list[float] = []
    while rows := list(itertools.islice(networks, batch)):
        stopping.check()
        whole = rows + rows[-1:] * (batch - len(rows))
        results = np.asarray(evaluate(_kept(counts, _by_layer(counts, whole))), float)
        if results.shape != (batch,):
            raise ValueError(
                f"evaluate returned the shape {results.shape}; needed: one loss per network, "
                f"({batch},)."
            )
        tried += rows
        losses += results[: len(rows)].tolist()
    sizes = {name: size for name, (size, _) in counts.items()}
    results = np.where(np.isnan(losses), np.inf, losses)
    return Oracle(sizes, _by_layer(counts, tried), results)


def _by_layer(counts: Counts, networks: list[tuple]) -> dict[str, ndarray]:
    """Pruned groups of every layer: int [networks, number pruned]."""
    columns = {}
    for (name, (_, num)), rows in zip(counts.items(), zip(*networks)):
        columns[name] = np.array(rows, np.int32).reshape(len(networks), num)
    return columns


def _kept(counts: Counts, pruned: dict[str, ndarray]) -> dict[str, ndarray]:
    keep = {}
    for name, (size, _) in counts.items():
        keep[name] = np.ones((len(pruned[name]), size), bool)
        np.put_along_axis(keep[name], pruned[name], False, 1)
    return keep


def check_counts(counts: Counts, limit: int) -> None:
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
            "prune fewer layers at a time, take a smaller network or raise the limit."
        )


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
        pruned = np.flatnonzero(~np.asarray(keep[name], bool))
        tried = found.pruned[name]
        if np.shape(keep[name]) != (size,) or pruned.size != tried.shape[1]:
            raise ValueError(
                f"keep[{name!r}] leaves out {pruned.size} of {np.size(keep[name])} groups; the "
                f"oracle tried {tried.shape[1]} of {size}."
            )
        same &= (tried == pruned).all(1)
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
    return jnp.linalg.svd(trees.widen(matrices), compute_uv=False)


def isometry(values: Array) -> Isometry:
    """Mean, population standard deviation and range of singular values of any shape."""
    return Isometry(values.mean(), values.std(), values.min(), values.max())
