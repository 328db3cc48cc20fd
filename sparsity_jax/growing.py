"""Growing regularisation: an L2 penalty that rises on what is to be removed, so that it can go
without harm.

    layers = growing.layers(params, {"conv1/kernel": 0.5, "conv2/kernel": 0.7}, "filter")
    penalty = growing.growing_l2(layers, method="greg1", update_every=10)
    tx = optax.chain(penalty, optax.sgd(1e-3, 0.9))
    ...                                      # steps, until growing.finished(opt_state)
    keep = growing.kept(opt_state)           # bools by name of layer, True = keep

List layers in the order of the network: GReg-1 judges one after the other, see `Penalty`.
A layer is a set of units (filters, channels, weights, or coupled channels of `groups.trace`) of
which a share goes, see `units`. They are picked by score, the mean absolute weight; those picked
are pushed towards zero; then the penalty rests while the network settles. All of it is state of the
transformation: it runs under jit, scan and vmap, without the host. No penalty is stored per unit,
since it is one of two numbers of the layer.
Source: Wang, Qin, Zhang, Fu 2021, arXiv:2012.09243, and its published code.
"""

import fractions
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sparsity_jax import coupling, groups, kernels, masks, originals, tables, trees, units
from sparsity_jax.masks import gaps
from sparsity_jax.types import Arrays, PyTree
from sparsity_jax.units import Keep, Layer

__all__ = [
    "PUSH",
    "STABILIZE",
    "GrowingState",
    "Layers",
    "Leaves",
    "Penalty",
    "Pick",
    "Plan",
    "Progress",
    "Ratios",
    "coupled",
    "finished",
    "growing_l2",
    "kept",
    "largest_gap",
    "layers",
    "penalties",
    "pick",
    "progress",
    "scores",
]

Leaves = Mapping[str, Array]  # by plain path
Layers = Sequence[Layer]
Ratios = Mapping[str, float | Literal["gap"]]
Pick = Literal["min", "max", "rand"]
# Phases of a layer
_PICK = 0
PUSH = 1
STABILIZE = 2


# What is regularised ------------------------------------------------------------------------------


def layers(
    params: PyTree,
    ratios: Ratios,
    granularity: units.Granularity = "filter",
    *,
    channels: groups.Channels | None = None,
    layout: kernels.Layout | None = None,
) -> tuple[Layer, ...]:
    """A layer for every kernel in `ratios`, named by its path: its output slices, input slices or
    entries.

    params: arrays or shape structs; the kernel of a grouped convolution has the inputs of one of
        its groups.
    ratios: share to remove by path, see `masks.num_pruned`, or `gap`: those below the largest gap
        between scores.
    channels, layout: which axes of a kernel are its inputs and outputs, by the trace of the
    function that uses it, or `in_out` or `out_in` for all of them; without both the names must
    tell. See `kernels.axes`. Raises ConfigError for unknown paths and ratios out of range,
    ValueError for slices of vectors, kernels whose axes nothing tells, and kernels with several
    axes of outputs (or inputs), such as the heads of an attention.
    """
    tables.convert(granularity, units.Granularity, "granularity")
    leaves = trees.plain_leaves(params)
    whole_paths = dict(zip(leaves, trees.named_leaves(params)))

    def layer_of(name: str) -> Layer:
        path = coupling.plain(name, leaves)
        shape = tuple(tables.lookup(leaves, path, "ratios").shape)
        if granularity == "weight":
            return units.of_kernel(name, path, shape, None)
        (axes,) = kernels.axes(params, [whole_paths[path]], channels, layout=layout).values()
        along = axes.outputs if granularity == "filter" else axes.inputs
        if len(along) != 1:
            raise ValueError(
                f"{path!r} of shape {shape} has a {granularity} for every index of the axes "
                f"{along}; allowed: one axis. `growing.coupled` takes channels of several axes."
            )
        return units.of_kernel(name, path, shape, along)

    return _with_counts(layer_of, ratios)


def coupled(params: PyTree, channels: groups.Channels, ratios: Ratios) -> tuple[Layer, ...]:
    """A layer for every coupled channel group in `ratios`, by name of the group.

    params: what the optimizer sees, the traced variables or their part `params`. channels: of
        `groups.trace`.
    The penalty acts on all arrays of the group, with norms, biases and the kernels that read the
    channels. An entry in two groups has both penalties. Kernels are what a matrix product or
    convolution of the trace multiplies with, whatever their names. Scores are those of the
    producers, or of all kernels where a group has none. Raises ConfigError for unknown groups and
    ratios out of range, ValueError for groups without a kernel in `params`.
    """
    if isinstance(params, groups.Channels):
        message = "growing.coupled takes params first, then channels"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        params, channels = channels, params
    leaves = trees.plain_leaves(params)

    def layer_of(name: str) -> Layer:
        group = tables.lookup(channels.groups, name, "ratios")
        return coupling.of_group(group, leaves)

    return _with_counts(layer_of, ratios)


def _with_counts(layer_of: Callable, ratios: Ratios) -> tuple[Layer, ...]:
    """The layers that `ratios` names, with how many of their units go."""
    if not ratios:
        raise tables.ConfigError("ratios", {}, allowed="at least one layer")
    result = []
    for name, ratio in ratios.items():
        layer = layer_of(name)
        number = None
        if ratio != "gap":
            tables.convert(float(ratio), tables.Fraction, f"the ratio of {name!r}")
            number = masks.num_pruned(ratio, layer.size)
        elif layer.size == 1:  # which stays
            number = 0
        result.append(layer._replace(num_pruned=number))
    return tuple(result)


# Picking ------------------------------------------------------------------------------------------


def largest_gap(scores: Array) -> Array:
    """How many `scores` lie below the largest gap between neighbours in order: int32, at least 1,
    never all.

    floor(0.02 n) scores at either end are not compared. Of equal gaps the lowest. NaN counts as
    minus infinity, equal infinities have no gap, and subnormals are zero, among gaps too. Nothing
    is sorted or gathered; how much work that takes tells `masks.gaps.count_below_largest`. Raises
    ValueError for fewer than 2 scores and, outside `jit`, for NaN.
    """
    if scores.size < 2:
        raise ValueError(f"there are {scores.size} scores; a gap is between 2 or more.")
    trees.check_finite(scores, "scores", infinite=True)
    trim = masks.count_of(0.02, scores.size, rounding="floor")
    return gaps.count_below_largest(scores, trim)


def pick(params: PyTree, layers: Layers, *, pick: Pick = "min", key: Array | None = None) -> Keep:
    """What one-shot pruning keeps: all but the `num_pruned` units of lowest or highest score, or
    random ones.

    key: for `rand`. Equal scores: units of lower index stay (`max`: go). Units whose score is NaN
    go first, whatever `pick` is. Traceable in params and key. Raises ValueError for layers of other
    params, a missing key, an automatic number without pick='min' and, outside `jit`, weights that
    are NaN.
    """
    tables.convert(pick, Pick, "pick")
    _check_pick(layers, pick, key)
    return _select(_checked_leaves(params, layers), layers, pick, key)


def _check_pick(layers: Layers, how: Pick, key: Array | None) -> None:
    if how != "min" and any(layer.num_pruned is None for layer in layers):
        raise tables.ConfigError("pick", how, allowed="'min' to cut at the largest gap")
    if how == "rand" and key is None:
        raise ValueError("pick='rand' needs a key.")


def _checked_leaves(params: PyTree, layers: Layers) -> dict[str, Array]:
    """Leaves of `params` by path; raises ValueError where a layer does not fit them."""
    leaves = trees.plain_leaves(params)
    for layer in layers:
        for part in (*layer.parts, *layer.scored):
            with tables.within(f"layer {layer.name!r}"):
                shape = jnp.shape(tables.lookup(leaves, part.path))
            if part.units(shape) != layer.shape:
                raise ValueError(
                    f"layer {layer.name!r} was made for another array than {part.path!r} of shape "
                    f"{shape}."
                )
    return leaves


def _select(leaves: Leaves, layers: Layers, how: Pick, key: Any) -> Keep:
    """What stays of every layer."""
    scores, numbers = [], []
    for layer in layers:
        scored = {part.path: leaves[part.path] for part in layer.scored}
        trees.check_finite(scored, "params", infinite=True)
        values = units.mean_magnitudes(leaves, layer)
        number = largest_gap(values) if layer.num_pruned is None else layer.num_pruned
        if how == "rand":
            checksum = zlib.crc32(layer.name.encode())
            layer_key = jax.random.fold_in(key, checksum)
            drawn = jax.random.uniform(layer_key, layer.shape)
            values = jnp.where(jnp.isnan(values), jnp.nan, drawn)
        if how == "max":
            values = jnp.where(jnp.isnan(values), jnp.inf, values)
        scores.append(values)
        numbers.append(jnp.asarray(number, jnp.int32))
    if how == "max":
        largest = masks.k_largest_masks(scores, numbers, magnitude=True)
        kept = [~mask for mask in largest]
    else:
        counts = [values.size - number for values, number in zip(scores, numbers)]
        kept = masks.k_largest_masks(scores, counts, magnitude=True)
    return dict(zip([layer.name for layer in layers], kept))


# How the penalty grows ----------------------------------------------------------------------------


class Plan(NamedTuple):
    """A method in numbers; `updates` of the penalty are counted from 1, every `update_every` steps.

    The first `pick_updates` give all units updates * granularity_pick; then pruned ones have
    push_start + (updates - pick_updates) * push_increment, and kept ones `recover`. A layer is done
    after `push_updates` of these, or earlier, see `Penalty.mag_ratio_limit`.
    """

    pick_updates: int
    push_updates: int
    push_start: float
    push_increment: float
    recover: float


@tables.option
class Penalty:
    """Options of `growing_l2`.

    method: `greg1` picks at once and adds `granularity_prune` to the penalty of what is pruned,
        every `update_every` steps. `greg2` first adds `granularity_pick` everywhere, until the
        penalty reaches `upper_limit_pick`, and picks then; what is kept gets the penalty
        `granularity_recover`. `fixreg` gives what is pruned `upper_limit` at once, and is done with
        the first update after step `fix_steps`.
    update_every: steps between two growths. granularity_prune, granularity_pick: what each adds,
        see `method`. granularity_recover: penalty of what is kept by `greg2`. upper_limit_pick:
        penalty at which `greg2` picks. fix_steps: of `fixreg`.
    upper_limit: a layer is done once a penalty exceeds it. mag_ratio_limit: or once the mean score
        of what is kept is so many times that of what is pruned, smoothed (0.9 old + 0.1 new): with
        greg2 in this layer; with greg1 in every layer that has a ratio yet, also those done
        already. As in the original, greg1 looks at one layer after the other: it compares the new
        ratios of this layer and those before it, and those of the layers behind it as the update
        before left them. So layers before the last to get there are done an update later than it;
        in the first update a layer is compared without those behind it. Layers of weights go by the
        penalty only.
    pick: what is pruned has the lowest score, the highest, or is random.
    stabilize_steps: further steps at rest once all layers are done.
    counting: updates to a limit follow from the decimals as written (`exact`), or from sums in
        `float32` or `float64`, see `originals.additions`.
    """

    method: Literal["greg1", "greg2", "fixreg"] = "greg1"
    pick: Pick = "min"
    update_every: tables.Count = 5
    granularity_prune: tables.Positive = 1e-4
    granularity_pick: tables.Positive = 1e-5
    granularity_recover: float = -1e-4
    upper_limit: tables.Positive = 1.0
    upper_limit_pick: tables.Positive = 1e-2
    mag_ratio_limit: tables.Positive = 1000.0
    fix_steps: tables.Index = 10_000
    stabilize_steps: tables.Index = 40_000
    counting: Literal["exact", "float32", "float64"] = "exact"

    def plan(self) -> Plan:
        """Raises ConfigError for a limit that is never reached."""
        if self.method == "fixreg":
            updates = self.fix_steps // self.update_every + 2
            return Plan(0, updates, self.upper_limit, 0.0, 0.0)
        picking = 0
        start = recover = 0.0
        if self.method == "greg2":
            recover = self.granularity_recover
            picking, start = self._additions(0.0, "granularity_pick", "upper_limit_pick")
        pushing, _ = self._additions(start, "granularity_prune", "upper_limit")
        return Plan(picking, pushing, float(start), self.granularity_prune, recover)

    def most_steps(self) -> int:
        """Steps after which growth has ended at the latest."""
        plan = self.plan()
        updates = plan.pick_updates + plan.push_updates
        return self.update_every * updates + self.stabilize_steps + 1

    def _additions(self, start: Any, added: str, end: str) -> tuple[int, Any]:
        """(additions to `start` until the sum exceeds the limit `end`, or reaches that of picking;
        that sum). added, end: names of fields.
        """
        increment = getattr(self, added)
        limit = getattr(self, end)
        reach = end == "upper_limit_pick"
        decimal = lambda number: fractions.Fraction(str(number))
        step = decimal(increment)
        begin = decimal(start)
        needed = (decimal(limit) - begin) / step
        exact = math.ceil(needed) if reach else math.floor(needed) + 1
        exact = max(exact, 0)
        if self.counting == "exact":
            return exact, begin + exact * step
        most = 2 * exact + 2
        summed = originals.additions(start, increment, limit, most, self.counting, reach=reach)
        if summed is None:
            why = f"never gets to {limit} in {self.counting}"
            raise tables.ConfigError(added, increment, why=why, allowed="counting='exact'")
        return summed


# The transformation -------------------------------------------------------------------------------


class Progress(NamedTuple):
    """Of every layer, in the order of `GrowingState.keep`, as of the latest update; arrays
    [layers].

    phase: PICK, PUSH or STABILIZE. updates: of its penalty so far. reg_kept, reg_pruned: penalties
    of what is kept and of what is pruned. score_kept, score_pruned: mean scores of them. ratio: of
    these two, smoothed; 0 before the first update and in layers of weights.
    """

    phase: Array
    updates: Array
    reg_kept: Array
    reg_pruned: Array
    score_kept: Array
    score_pruned: Array
    ratio: Array


class GrowingState(NamedTuple):
    """step: updates of the params so far. left: steps to make once all layers are done. keep: what
    stays, by layer; in the phase PICK what would stay if it ended now, of weights everything.
    progress: of the layers."""

    step: Array
    left: Array
    keep: Keep
    progress: Progress


def growing_l2(
    layers: Layers,
    *,
    key: Array | None = None,
    keep: Mapping[str, Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """g + reg * w with the penalties `reg` of a growing regularisation; put it before weight decay
    and momentum.

    layers: of `layers` or `coupled`, in the order of the network, in which GReg-1 judges them (see
    `Penalty`); one that loses nothing is left alone. key: for pick='rand'. keep: picks made before,
    bools by name of layer as `pick` and `kept` return, known on the host; they replace the picks of
    these layers. options: those of `Penalty`. GReg-1 and FixReg pick from the params given to
    `init`. Updates happen at steps 0, update_every, 2 update_every, ..., before the penalty acts.
    Raises ConfigError for wrong options, ValueError for picks that do not fit, a missing key,
    layers of other params and an `update` without params.
    """
    penalty = Penalty(**tables.check_options(Penalty, options))
    growth = _Growth(penalty, layers, _checked_keep(layers, keep or {}), key)
    return optax.GradientTransformationExtraArgs(growth.init, growth.update)


class _Growth:
    """`growing_l2` of some layers. given: picks made before."""

    def __init__(self, options: Penalty, layers: Layers, given: Arrays, key: Array | None) -> None:
        self.options = options
        self.plan = options.plan()
        self.layers = layers
        self.given = given
        self.key = key
        active = []
        for turn, layer in enumerate(layers):
            loses = layer.num_pruned != 0
            if layer.name in given:
                loses = not given[layer.name].all()
            if loses:
                active.append((layer.name, turn, layer))
        active.sort()  # the order of a dict's leaves
        self.active = [layer for _, _, layer in active]
        self.free = [layer for name, _, layer in active if name not in given]
        _check_pick(self.free, options.pick, key)
        slices = [not layer.of_weights for layer in self.active]
        self.slices = np.array(slices, bool)
        turns = np.array([turn for _, turn, _ in active], int)
        self.judged = turns <= turns[:, None]  # [i, j]: layer i is judged after layer j, or is it

    def init(self, params: PyTree) -> GrowingState:
        values = [jnp.ones(layer.shape) for layer in self.active]
        picked: Keep = {}
        if jax.tree.leaves(params):  # `optax.tree_map_params` calls `init` without arrays
            leaves = _checked_leaves(params, self.layers)
            values = [units.mean_magnitudes(leaves, layer) for layer in self.active]
            if not self.plan.pick_updates:
                picked = self.select(leaves, self.free)
        keep: Keep = {}
        for layer, value in zip(self.active, values):
            kept: Any = self.given.get(layer.name)
            if kept is None:
                kept = picked.get(layer.name)
            if kept is None:
                kept = jnp.ones_like(value, bool)
            kept = jnp.asarray(kept)
            keep[layer.name] = trees.divided_like(kept, value) if layer.of_weights else kept
        num = len(self.active)
        phase = _PICK if self.plan.pick_updates else PUSH
        progress = Progress(
            jnp.full(num, phase, jnp.int32),
            jnp.zeros(num, jnp.int32),
            *(jnp.zeros(num, float) for _ in range(5)),  # apart, to be donated
        )
        # with the step that makes the last layer done
        left = jnp.asarray(self.options.stabilize_steps + 1, jnp.int32)
        vary = functools.partial(trees.varying_like, arrays=values)
        left, progress = jax.tree.map(vary, (left, progress))
        step = jnp.zeros((), jnp.int32)
        return GrowingState(step, left, keep, progress)

    def select(self, leaves: Leaves, layers: Layers) -> Keep:
        return _select(leaves, layers, self.options.pick, self.key)

    def update(
        self, updates: PyTree, state: GrowingState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, GrowingState]:
        del extra
        if params is None:
            raise ValueError("growing_l2 reads the weights; call update(grads, state, params).")
        leaves = trees.plain_leaves(params)
        every = self.options.update_every
        number = state.step // every + 1
        due = state.step % every == 0
        keep = dict(state.keep)
        for layer in self.active:
            if not layer.of_weights:
                keep[layer.name] = trees.gathered(keep[layer.name])
        if self.plan.pick_updates:
            keep = self.repick(leaves, keep, due, number)
        advance = lambda old: self.advance(leaves, keep, number, old)
        progress = jax.lax.cond(due, advance, lambda old: old, state.progress)
        resting = jnp.all(progress.phase == STABILIZE)
        left = jnp.maximum(state.left - resting, 0)
        keep = jax.tree.map(trees.divided_like, keep, state.keep)
        state = GrowingState(state.step + 1, left, keep, progress)
        return self.penalized(updates, state, params), state

    def repick(self, leaves: Leaves, keep: Keep, due: Array, number: Array) -> Keep:
        """The picks after update `number`, of GReg-2: of weights only when picking ends."""
        last = self.plan.pick_updates
        for of_weights in (False, True):
            now = number == last if of_weights else number <= last
            layers = [layer for layer in self.free if layer.of_weights == of_weights]
            old = {layer.name: keep[layer.name] for layer in layers}
            anew = functools.partial(self.select, leaves, layers)
            keep = keep | jax.lax.cond(due & now, anew, lambda old=old: old)
        return keep

    def advance(self, leaves: Leaves, keep: Keep, number: Array, old: Progress) -> Progress:
        """The progress of update `number`."""
        going = old.phase < STABILIZE
        updates = jnp.where(going, number, old.updates)
        means = [_mean_scores(leaves, layer, keep[layer.name]) for layer in self.active]
        table = jnp.asarray(means, float)
        kept, pruned = table.reshape(-1, 2).T
        # of two zeros 1: neither is larger; smoothing would keep a NaN for ever
        ratio = jnp.where(kept > 0, jnp.inf, 1)
        some = pruned > 0
        quotient = kept / jnp.where(some, pruned, 1)
        ratio = jnp.where(some, quotient, ratio)
        smoothed = 0.9 * old.ratio + 0.1 * ratio
        ratio = jnp.where(old.updates == 0, ratio, smoothed)
        ratio = jnp.where(going & self.slices, ratio, old.ratio)
        picking = self.plan.pick_updates
        done = self.reached(ratio, old)
        done |= updates >= picking + self.plan.push_updates
        pushing = jnp.where(done, STABILIZE, PUSH)
        phase = jnp.where(updates >= picking, pushing, _PICK)
        phase = jnp.where(going, phase, old.phase)
        reg_kept, reg_pruned = self.penalties(updates)
        return Progress(phase, updates, reg_kept, reg_pruned, kept, pruned, ratio)

    def reached(self, ratio: Array, old: Progress) -> Array:
        """Layers whose scores differ enough, see `Penalty.mag_ratio_limit`."""
        limit = self.options.mag_ratio_limit
        if self.options.method == "fixreg":
            return jnp.zeros_like(ratio, bool)
        enough = ratio >= limit
        if self.options.method == "greg1":
            before = (old.ratio >= limit) | (old.updates == 0)
            seen = jnp.where(self.judged, enough, before)
            enough = jnp.all(seen | ~self.slices, axis=1)
        return enough & self.slices

    def penalties(self, updates: Array) -> tuple[Array, Array]:
        """Penalties of what is kept and of what is pruned."""
        plan = self.plan
        number = updates.astype(float)
        picking = number * self.options.granularity_pick
        pushed = number - plan.pick_updates
        pushing = plan.push_start + pushed * plan.push_increment
        early = updates <= plan.pick_updates
        reg_kept = jnp.where(early, picking, plan.recover)
        reg_pruned = jnp.where(early, picking, pushing)
        return reg_kept, reg_pruned

    def penalized(self, updates: PyTree, state: GrowingState, params: PyTree) -> PyTree:
        regs = penalties(state)
        parts = units.parts_by_path(self.active)

        def add(path: Sequence, update: Array, w: Array) -> Array:
            inside = parts.get(trees.plain_path(path))
            if not inside:
                return update
            reg: Any = 0
            for name, part in inside:
                reg += units.spread(regs[name], part, w.shape)
            return (update + reg * w).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(add, updates, params)


def _checked_keep(layers: Layers, keep: Mapping[str, Any]) -> Arrays:
    shapes = {layer.name: layer.shape for layer in layers}
    if len(shapes) < len(layers):
        raise ValueError("two layers have the same name; leave one out.")
    given = {}
    for name, bools in keep.items():
        bools = given[name] = np.asarray(bools)
        shape = tables.lookup(shapes, name, "keep")
        right = bools.dtype == bool and bools.shape == shape
        if not right or not bools.any():
            raise tables.ConfigError(
                f"keep[{name!r}]",
                why=f"is {bools.dtype} {bools.shape} with {bools.sum()} units",
                allowed=f"bool {shape} that keeps one or more",
            )
    return given


def _mean_scores(leaves: Leaves, layer: Layer, keep: Array) -> tuple[Array, Array]:
    """Mean scores of what is kept and of what is pruned, 0 if that is nothing."""
    scores = units.mean_magnitudes(leaves, layer)
    count = lambda kept: kept.astype(jnp.int32)
    of_kept = lambda score, kept: jnp.where(kept, score, 0)
    of_pruned = lambda score, kept: jnp.where(kept, 0, score)
    number = trees.fold_sum(count, keep)
    kept = trees.fold_sum(of_kept, scores, keep)
    pruned = trees.fold_sum(of_pruned, scores, keep)
    others = jnp.maximum(layer.size - number, 1)
    return kept / number, pruned / others


# What the state tells -----------------------------------------------------------------------------


def _state_of(opt_state: PyTree) -> GrowingState:
    """The state of the one `growing_l2` in an optimizer's state; raises ValueError if there is not
    exactly one.
    """
    ours = lambda state: isinstance(state, GrowingState)
    leaves = jax.tree.leaves(opt_state, is_leaf=ours)
    states = list(filter(ours, leaves))
    if len(states) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(states)} states of growing_l2; it must hold one."
        )
    (state,) = states
    # plain arrays, which `nnx.Optimizer` wraps
    step, left, *rest = jax.tree.leaves(state)
    keep = dict(zip(sorted(state.keep), rest))
    numbers = rest[len(keep) :]
    return GrowingState(step, left, keep, Progress(*numbers))


def finished(opt_state: PyTree) -> Array:
    """Whether all layers are done and `stabilize_steps` more steps are made: bool."""
    return _state_of(opt_state).left <= 0


def kept(opt_state: PyTree) -> Keep:
    """What stays, of the layers that lose something; decided once their phase is PUSH."""
    return _state_of(opt_state).keep


def penalties(opt_state: PyTree) -> dict[str, Array]:
    """The penalty of every unit, by layer: of filters [units], of weights in the shape of the
    kernel.
    """
    state = _state_of(opt_state)
    result = {}
    for name, numbers in progress(state).items():
        keep = state.keep[name]
        # a leading axis of members of a sweep stays in front
        axes = tuple(range(state.step.ndim, keep.ndim))
        reg_kept = jnp.expand_dims(numbers.reg_kept, axes)
        reg_pruned = jnp.expand_dims(numbers.reg_pruned, axes)
        result[name] = jnp.where(keep, reg_kept, reg_pruned)
    return result


def progress(opt_state: PyTree) -> dict[str, Progress]:
    """The numbers of every layer, scalars, for logs and figures."""
    state = _state_of(opt_state)
    result = {}
    for i, name in enumerate(state.keep):
        of_layer = [numbers[..., i] for numbers in state.progress]
        result[name] = Progress(*of_layer)
    return result


def scores(params: PyTree, layers: Layers) -> dict[str, Array]:
    """The score of every unit, by layer: mean absolute weights [units], of weights their
    magnitudes.
    """
    leaves = _checked_leaves(params, layers)
    return {layer.name: units.mean_magnitudes(leaves, layer) for layer in layers}
