"""Exact answers about small networks: every way to prune them, the singular values of their
Jacobians.

    # 4 of 8 channels of each: 4,900 networks
    tried = probes.oracle(losses, {"conv1": (8, 4), "conv2": (8, 4)})
    tried.best, probes.rank(tried, keep)    # the best keep; how good another one is
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
from sparsity_jax.precision import FULL, Precision, computed
from sparsity_jax.tables import Count
from sparsity_jax.types import Arrays, PyTree

__all__ = [
    "Counts",
    "Isometry",
    "Oracle",
    "check_counts",
    "isometry",
    "jacobian_singular_values",
    "oracle",
    "rank",
    "row_of",
]

# Every combination --------------------------------------------------------------------------------


Counts = Mapping[str, tuple[int, int]]


class Oracle(NamedTuple):
    """Every network that `oracle` tried, in the lexicographic order of what it lacks."""

    choices: Arrays  # bool [choices, groups] of every layer, True = kept; all pairs are networks
    losses: ndarray  # float64 [networks]; inf for NaN

    def keep(self, row: Any) -> Arrays:
        """Bool [groups] of every layer of one network; row: also int [...], of several."""
        shape = [len(choices) for choices in self.choices.values()]
        indices = np.unravel_index(row, shape)
        layers = zip(self.choices.items(), indices)
        return {name: choices[index] for (name, choices), index in layers}

    @property
    def best(self) -> Arrays:
        """`keep` of the lowest loss, the first of equals."""
        return self.keep(self.losses.argmin())


def oracle(
    evaluate: Callable[[Arrays], Any],
    counts: Counts,
    *,
    batch: Count = 64,
    limit: Count = 1_000_000,
) -> Oracle:
    """Every combination of pruned groups: exhaustive, so for tiny networks only.

    counts: (groups, how many of them go), by name of layer; the combinations of all layers are
        crossed.
    evaluate: losses [batch] for bool [batch, groups] of every layer, True = kept, e.g.
        jax.jit(jax.vmap(loss)); the loss of the pruned network, or after fine-tuning it. The shapes
        are always the same: one compilation; the last batch repeats its last network.
    Raises ValueError for counts out of range and for more than `limit` combinations.
    """
    batch = tables.convert(batch, Count, "batch")
    total = check_counts(counts, tables.convert(limit, Count, "limit"))
    choices = {name: _choices(size, num) for name, (size, num) in counts.items()}
    tried = Oracle(choices, np.full(total, np.inf))
    for start in range(0, total, batch):
        stopping.check()
        rows = np.minimum(np.arange(start, start + batch), total - 1)
        losses = np.asarray(evaluate(tried.keep(rows)), float)
        if losses.shape != (batch,):
            raise ValueError(
                f"evaluate returned the shape {losses.shape}; needed: one loss per network, "
                f"({batch},)."
            )
        tried.losses[rows] = np.where(np.isnan(losses), np.inf, losses)
    return tried


def _choices(size: int, num: int) -> ndarray:
    """Every way to prune `num` of `size` groups."""
    lost = list(itertools.combinations(range(size), num))
    kept = np.ones((len(lost), size), bool)
    for row, groups in zip(kept, lost):
        row[list(groups)] = False
    return kept


def check_counts(counts: Counts, limit: int) -> int:
    """The number of combinations; raises ValueError for no counts, counts out of range and for more
    than `limit` of them.
    """
    if not counts:
        raise ValueError("counts names no layer, so there is nothing to try.")
    total = 1
    for name, (size, num) in counts.items():
        if not 0 <= num < size:
            raise ValueError(f"{name!r} loses {num} of {size} groups; allowed: 0 to {size - 1}.")
        total *= math.comb(size, num)
    if total > limit:
        raise ValueError(
            f"there are {total:,} combinations of {dict(counts)}, more than limit = {limit:,}; "
            "prune fewer layers at a time, take a smaller network or raise the limit."
        )
    return total


def row_of(tried: Oracle, keep: Mapping[str, Any]) -> int:
    """The row of `tried` that is the network `keep` leaves; raises ValueError if it is none of
    those tried.
    """
    row = 0
    for name, choices in tried.choices.items():
        if name not in keep:
            raise ValueError(f"keep has no {name!r}.{tables.closest(name, keep)}")
        kept = np.asarray(keep[name], bool)
        same = np.zeros(1)
        if kept.shape == choices[0].shape:
            same = (choices == kept).all(1)
        if not same.any():
            raise ValueError(
                f"keep[{name!r}] leaves {kept.sum()} of {kept.size} groups; the oracle tried "
                f"{choices[0].sum()} of {choices[0].size}."
            )
        row = row * len(choices) + int(same.argmax())
    return row


def rank(tried: Oracle, keep: Mapping[str, Any]) -> int:
    """1 + the number of networks with a lower loss than the one that `keep` leaves: 1 is the best
    of len(losses).

    Raises ValueError if it is none of those tried.
    """
    loss = tried.losses[row_of(tried, keep)]
    return 1 + int((tried.losses < loss).sum())


# Jacobians ----------------------------------------------------------------------------------------


class Isometry(NamedTuple):
    """Of singular values over all examples; an isometric network has mean 1 and std 0."""

    mean: Array
    std: Array
    smallest: Array
    largest: Array


def jacobian_singular_values(
    apply: Callable, variables: PyTree, inputs: Array, *, precision: Precision = FULL
) -> Array:
    """Singular values of d outputs / d input of each example, descending: [batch, min(outputs,
    entries of an input)].

    apply: (variables, inputs [batch, ...]) -> [batch, ...], without effects between examples
    (inference mode). Exact: as many products with the Jacobian as its smaller side, all examples at
    once; call it in chunks where that needs too much memory. precision: of matrix products, in full
    float32 by default.
    """
    return computed(_singular_values, precision)(apply, variables, inputs)


def _singular_values(apply: Callable, variables: PyTree, inputs: Array) -> Array:
    single = lambda x: apply(variables, x[None])[0].ravel()
    num_outputs = jax.eval_shape(single, inputs[0]).size
    jacobian = jax.jacfwd(single)
    if num_outputs < inputs[0].size:
        jacobian = jax.jacrev(single)
    matrices = jax.vmap(jacobian)(inputs)
    matrices = matrices.reshape(len(inputs), num_outputs, -1)
    return jnp.linalg.svd(trees.widen(matrices), compute_uv=False)


def isometry(values: Array) -> Isometry:
    """Mean, population standard deviation and range of singular values of any shape."""
    return Isometry(values.mean(), values.std(), values.min(), values.max())
