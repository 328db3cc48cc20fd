"""Whether something behind an optimizer undoes what it holds: feasible sets, or zeros of masks."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import tree_leaves

from sparsity_jax import trees
from sparsity_jax.types import PyTree

__all__ = ["Broken", "check", "counted", "unbroken"]


class Broken(NamedTuple):
    """updates: how many so far began outside the feasible sets (`polytopes.outside`), or with a
    pruned weight that was not zero; int32.
    """

    updates: Array


def unbroken(params: PyTree) -> Broken:
    """The state before all updates."""
    zero = jnp.zeros((), jnp.int32)
    return Broken(trees.varying_like(zero, tree_leaves(params)))


def counted(broken: Broken, begins_outside: Array) -> Broken:
    """The state after one more update."""
    return Broken(broken.updates + begins_outside)


def check(opt_state: PyTree) -> None:
    """Raises ValueError if updates began outside the feasible sets, or with pruned weights that
    were not zero: the order of the `optax.chain` is wrong, or the weights did not start inside.

    opt_state: of any optimizer, outside `jit`; `sfw`, `adagrad_sfw`, `projected` and `pruned` count
    in theirs.
    """
    is_count = lambda state: isinstance(state, Broken)
    states = filter(is_count, tree_leaves(opt_state, is_leaf=is_count))
    numbers = [int(np.max(number)) for number in tree_leaves(list(states))]
    most = max(numbers, default=0)
    if most:
        raise ValueError(
            f"{most} updates began outside the feasible sets, or with pruned weights that were not "
            "zero. In optax.chain sfw, adagrad_sfw, projected and pruned come last, behind all "
            "that moves weights (clipping, weight decay, penalties, noise); start from "
            "polytopes.shift_inside(params, sets)."
        )
