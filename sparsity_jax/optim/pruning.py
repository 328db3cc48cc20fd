"""Pruning on a schedule while training: any optimizer, with masks in its state."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.tree_util import tree_leaves, tree_map
from optax import GradientTransformationExtraArgs as Transformation

from sparsity_jax import allocate, masks, tables
from sparsity_jax.groups import Channels
from sparsity_jax.optim import order, steps
from sparsity_jax.optim.rates import Updated
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import Fields, PyTree

__all__ = ["PrunedState", "PruningSchedule", "masks_of", "pruned"]


class PruningSchedule(NamedTuple):
    """After which updates, counted from 0, how much is pruned. ratios: of all units, one per step.

    Made by `once`, `cubic` or `at`.
    """

    steps: tuple[int, ...]
    ratios: tuple[float, ...]

    @classmethod
    def once(cls, ratio: float, *, step: int = 0) -> "PruningSchedule":
        """`ratio` after the update number `step`."""
        return cls.at([step], lambda _: ratio)

    @classmethod
    def cubic(
        cls, ratio: float, *, end: int, begin: int = 0, every: int = 1, first: float = 0.0
    ) -> "PruningSchedule":
        """Every so many updates from `begin` on, fast at first: from the ratio `first` to `ratio`
        at `end`, which is always among the steps.

        ratio + (first - ratio) (1 - t)^3, with t from 0 to 1. Source: Zhu, Gupta 2017,
        arXiv:1710.01878.
        """
        every = tables.convert(every, tables.Count, "every")
        if not begin < end:
            raise ConfigError("end", end, allowed=f"above begin ({begin})")

        def rule(step: int) -> float:
            left = (end - step) / (end - begin)
            return ratio + (first - ratio) * left**3

        return cls.at([*range(begin, end, every), end], rule)

    @classmethod
    def at(cls, steps: Iterable[int], rule: Callable[[int], float]) -> "PruningSchedule":
        """The ratio `rule(step)` after each of the updates in `steps`, e.g. `range(0, 1000, 100)`.

        Raises ConfigError for no steps, steps that do not rise and ratios outside [0, 1] or below
        the one before, as nothing that was pruned comes back.
        """
        times = tables.convert(tuple(steps), tuple[tables.Index, ...], "steps")
        given = tuple(float(rule(step)) for step in times)
        ratios = tables.convert(given, tuple[tables.Fraction, ...], "ratios")
        if not times or any(later <= step for step, later in itertools.pairwise(times)):
            raise ConfigError("steps", times, allowed="one or more, each above the one before")
        if any(later < ratio for ratio, later in itertools.pairwise(ratios)):
            raise ConfigError("ratios", ratios, allowed="numbers that never fall")
        return cls(times, ratios)


class PrunedState(NamedTuple):
    """step: updates so far, int32. masks: bools in the structure of the params, True = kept.
    broken: counts updates that began with a pruned weight that was not zero. inner: of the
    optimizer.
    """

    step: Array
    masks: PyTree
    broken: order.Broken
    inner: PyTree


def pruned(
    inner: optax.GradientTransformation,
    schedule: PruningSchedule | float,
    *,
    key: Array | None = None,
    selection: str = "global",
    channels: Channels | None = None,
    **options: Any,
) -> Transformation:
    """`inner`, whose weights are pruned on a schedule; `masks_of` its state has the masks.

    After each update that the schedule names, exactly as many entries (or filters) are kept as
    `allocate.keep_counts` says of its ratio: those of largest magnitude among the weights as
    `inner` left them. All others are zero from then on and never come back: their update is minus
    their value, and `inner` sees gradients of zero for them. So this comes last in an
    `optax.chain`: what is behind it may move pruned weights, which `optim.check` of the state
    tells.
    schedule: a `PruningSchedule`, or a ratio, which is pruned once, after the first update.
    selection, channels, options: those of `allocate.keep_counts`, such as scope, include, exclude
    and layer_ratios. key: for `random`.
    Works under `jit`, `scan` and `vmap`; masks are searched for in steps of the schedule only, but
    under `vmap` in every step. Raises ValueError where `update` gets no params, and what
    `keep_counts` and `keep_masks` do.
    """
    inner = optax.with_extra_args_support(inner)
    if not isinstance(schedule, PruningSchedule):
        schedule = PruningSchedule.once(schedule)
    choice = dict(selection=selection, channels=channels, **options)
    times = np.array(schedule.steps)

    def init(params: PyTree) -> PrunedState:
        zero = jnp.zeros((), jnp.int32)
        return PrunedState(zero, masks.full(params), order.unbroken(params), inner.init(params))

    def after(moved: PyTree, state: PrunedState) -> PyTree:
        """Masks of the weights after an update of the schedule."""
        counts = [allocate.keep_counts(moved, ratio, **choice) for ratio in schedule.ratios]
        due = jnp.searchsorted(times, state.step)
        own = tree_map(lambda *several: jnp.array(several)[due], *counts)
        drawn = None if key is None else jax.random.fold_in(key, state.step)
        return allocate.keep_masks(moved, own, drawn, before=state.masks, **choice)

    def update(grads: PyTree, state: PrunedState, params: PyTree, extra: Fields) -> Updated:
        slopes = masks.apply(grads, state.masks)
        updates, of_inner = inner.update(slopes, state.inner, params, **extra)
        moved = optax.apply_updates(params, updates)
        due = jnp.isin(state.step, times)
        kept = lax.cond(due, lambda: after(moved, state), lambda: state.masks)
        broken = order.counted(state.broken, _any_regrown(params, state.masks))
        stopped = lambda mask, u, w: jnp.where(mask, u, -w)
        ended = tree_map(stopped, kept, updates, params)
        return ended, PrunedState(state.step + 1, kept, broken, of_inner)

    return steps.needing_params(init, update)


def _any_regrown(params: PyTree, kept: PyTree) -> Array:
    """Whether some weight that is not kept is not zero."""
    regrown = tree_map(lambda w, mask: jnp.any(~mask & (w != 0)), params, kept)
    return jnp.any(jnp.stack(tree_leaves(regrown)))


def masks_of(opt_state: PyTree) -> PyTree:
    """The masks in the state of an optimizer that `pruned` is part of, True = kept.

    Raises ValueError if it is not, and KeyError if there are several.
    """
    state = optax.tree.get(opt_state, "PrunedState")
    if state is None:
        raise ValueError("the optimizer's state holds no masks; allowed: states of optim.pruned.")
    return state.masks
