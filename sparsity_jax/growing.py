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
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sparsity_jax import groups, kernels, masks, originals, tables, trees, units
from sparsity_jax.units import Keep, Layer

PyTree = Any
Leaves = Mapping[str, Array]  # by plain path
Pick = Literal["min", "max", "rand"]
Counting = Literal["exact", "float32", "float64"]
PICK, PUSH, STABILIZE = 0, 1, 2  # phases of a layer


# What is regularised ------------------------------------------------------------------------------


def layers(
    params: PyTree,
    ratios: Mapping[str, float | Literal["gap"]],
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
    tell. See `kernels.axes`. Raises ValueError for unknown paths, ratios out of range, slices of
    vectors, kernels whose axes nothing tells, and kernels with several axes of outputs (or inputs),
    such as the heads of an attention.
    """
    tables.convert(granularity, units.Granularity, "granularity")
    leaves = trees.plain_leaves(params)
    paths = {name: units.plain(name, leaves) for name in ratios}
    _check_names(paths.values(), leaves, "path of the params")
    whole_paths = dict(zip(leaves, trees.named_leaves(params)))
    result = []
    for name, ratio in ratios.items():
        path = paths[name]
        shape, along = tuple(leaves[path].shape), None
        if granularity != "weight":
            if len(shape) < 2:
                raise ValueError(
                    f"{path!r} of shape {shape}: a {granularity} is a slice of a matrix or more."
                )
            (axes,) = kernels.axes(params, [whole_paths[path]], channels, layout=layout).values()
            along = axes.outputs if granularity == "filter" else axes.inputs
            if len(along) != 1:
                raise ValueError(
                    f"{path!r} of shape {shape} has a {granularity} for every index of the axes "
                    f"{along}; allowed: one axis. `growing.coupled` takes channels of several axes."
                )
        layer = units.of_kernel(name, path, shape, along)
        result.append(_with_count(layer, ratio))
    return tuple(result)


def coupled(
    channels: groups.Channels,
    params: PyTree,
    ratios: Mapping[str, float | Literal["gap"]],
    *,
    members: units.Members = "all",
) -> tuple[Layer, ...]:
    """A layer for every coupled channel group in `ratios`, by name of the group.

    channels: of `groups.trace`. params: what the optimizer sees, the traced variables or their part
        `params`.
    members: the penalty acts on `all` arrays of the group, with norms, biases and the kernels that
    read the channels; on its `kernels`; or on its `producers`, as with granularity `filter`. An
    entry in two groups has both penalties. Kernels are what a matrix product or convolution of the
    trace multiplies with, whatever their names. Scores are those of the producers, or of all
    kernels where a group has none. Raises ValueError for unknown groups, ratios out of range and
    groups without a kernel in `params`.
    """
    leaves = trees.plain_leaves(params)
    _check_names(ratios, channels.groups, "group")
    result = []
    for name, ratio in ratios.items():
        layer = units.of_group(channels.groups[name], leaves, members)
        result.append(_with_count(layer, ratio))
    return tuple(result)


def _with_count(layer: Layer, ratio: float | Literal["gap"]) -> Layer:
    if ratio == "gap":  # a layer of one unit keeps it
        return layer._replace(num_pruned=None if layer.size > 1 else 0)
    if isinstance(ratio, str) or not 0 <= ratio <= 1:
        raise ValueError(f"the ratio of {layer.name!r} is {ratio!r}; allowed: 0 to 1, or 'gap'.")
    return layer._replace(num_pruned=masks.num_pruned(ratio, layer.size))


def _check_names(named: Collection[str], known: Collection[str], kind: str) -> None:
    example = next(iter(known), None)
    if not named:
        raise ValueError(f"no {kind} is given; name at least one, e.g. {example!r}.")
    for name in named:
        if name not in known:
            hint = tables.closest(name, known)
            raise ValueError(f"{name!r} is no {kind}; one is {example!r}.{hint}")


# Picking ------------------------------------------------------------------------------------------


def largest_gap(scores: Array) -> Array:
    """How many `scores` lie below the largest gap between neighbours in order: int32, at least 1,
    never all.

    floor(0.02 n) scores at either end are not compared. Of equal gaps the lowest. Sorts. NaN counts
    as minus infinity, and equal infinities have no gap. Raises ValueError for fewer than 2 scores
    and, outside `jit`, for NaN.
    """
    if scores.size < 2:
        raise ValueError(f"there are {scores.size} scores; a gap is between 2 or more.")
    trees.check_finite(scores, "scores", infinite=True)
    trim = masks.count_of(0.02, scores.size, "floor")
    lowest = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    ordered = jnp.sort(trees.gathered(lowest).ravel())[trim : scores.size - trim]
    gaps = jnp.where(ordered[1:] == ordered[:-1], 0, jnp.diff(ordered))
    return (jnp.argmax(gaps) + trim + 1).astype(jnp.int32)


def pick(
    params: PyTree,
    layers: Sequence[Layer],
    *,
    pick: Pick = "min",
    key: Array | None = None,
) -> Keep:
    """What one-shot pruning keeps: all but the `num_pruned` units of lowest or highest score, or
    random ones.

    key: for `rand`. Equal scores: units of lower index stay (`max`: go). Units whose score is NaN
    go first, whatever `pick` is. Traceable in params and key. Raises ValueError for layers of other
    params, a missing key, an automatic number without pick='min' and, outside `jit`, weights that
    are NaN.
    """
    tables.convert(pick, Pick, "pick")
    leaves = _checked_leaves(params, layers)
    return _select(leaves, layers, pick, _keys(layers, pick, key))


def _keys(layers: Sequence[Layer], how: Pick, key: Array | None) -> dict[str, Array]:
    """A key for every layer where picks are random."""
    automatic = [layer.name for layer in layers if layer.num_pruned is None]
    if how != "min" and automatic:
        raise ValueError(
            f"{automatic[0]!r} is cut at the largest gap, which needs pick='min'; it is {how!r}."
        )
    if how != "rand":
        return {}
    if key is None:
        raise ValueError("pick='rand' needs a key.")
    codes = {layer.name: zlib.crc32(layer.name.encode()) for layer in layers}
    return {name: jax.random.fold_in(key, code) for name, code in codes.items()}


def _checked_leaves(params: PyTree, layers: Sequence[Layer]) -> dict[str, Array]:
    """Leaves of `params` by path; raises ValueError where a layer does not fit them."""
    leaves = trees.plain_leaves(params)
    for layer in layers:
        for part in (*layer.parts, *layer.scored):
            if part.path not in leaves:
                hint = tables.closest(part.path, leaves)
                raise ValueError(f"layer {layer.name!r}: {part.path!r} is no path.{hint}")
            shape = jnp.shape(leaves[part.path])
            if not _fits(layer, part, shape):
                raise ValueError(
                    f"layer {layer.name!r} was made for another array than {part.path!r} of shape "
                    f"{shape}."
                )
    return leaves


def _fits(layer: Layer, part: units.Part, shape: tuple[int, ...]) -> bool:
    if part.axes is None:
        return shape == layer.shape
    if max(part.axes) >= len(shape):
        return False
    size = math.prod(shape[axis] for axis in part.axes)
    if part.index is None:
        return size == layer.size
    return part.index.max(initial=-1) < size


def _values(leaves: Leaves, layer: Layer) -> Array:
    """What ranks the units of a layer: their scores, of weights the weights themselves, with their
    signs.
    """
    if layer.of_weights:
        return leaves[layer.scored[0].path]
    entries = sum(units.entries(leaves[part.path], part) for part in layer.scored)
    return units.absolute_sums(leaves, layer) / entries


def _select(
    leaves: Leaves,
    layers: Sequence[Layer],
    how: Pick,
    keys: Mapping[str, Array],
) -> Keep:
    """What stays of every layer. Layers of one shape share a compiled search: filters of ResNet-56
    need three.
    """
    scored = {part.path: leaves[part.path] for layer in layers for part in layer.scored}
    trees.check_finite(scored, "params", infinite=True)
    keep: Keep = {}
    by_shape: dict[tuple, list] = {}
    for layer in layers:
        values = _values(leaves, layer)
        number = largest_gap(jnp.abs(values)) if layer.num_pruned is None else layer.num_pruned
        if keys:
            drawn = jax.random.uniform(keys[layer.name], layer.shape)
            values = jnp.where(jnp.isnan(values), jnp.nan, drawn)
        if how == "max":
            values = jnp.where(jnp.isnan(values), jnp.inf, values)
        row = (layer.name, values, jnp.asarray(number, jnp.int32))
        by_shape.setdefault((layer.shape, trees.division(values)), []).append(row)
    for rows in by_shape.values():
        names, scores, numbers = zip(*rows)
        kept = _kept(jnp.stack(scores), jnp.stack(numbers), largest_go=how == "max")
        for i, name in enumerate(names):
            keep[name] = kept[i]
    return keep


@functools.partial(jax.jit, static_argnames="largest_go")
def _kept(values: Array, numbers: Array, *, largest_go: bool) -> Array:
    """What stays of every row of `values` [layers, ...] where `numbers` [layers] of its entries go:
    bool.
    """

    def search(row: tuple) -> Array:
        values, number = row
        if largest_go:
            return ~masks.k_largest_mask(values, number, magnitude=True)
        return masks.k_largest_mask(values, values.size - number, magnitude=True)

    return jax.lax.map(search, (values, numbers))


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
    counting: Counting = "exact"

    def plan(self) -> Plan:
        """Raises ConfigError for a limit that is never reached."""
        if self.method == "fixreg":
            updates = self.fix_steps // self.update_every + 2
            return Plan(0, updates, self.upper_limit, 0.0, 0.0)
        picking, start, recover = 0, fractions.Fraction(0), 0.0
        if self.method == "greg2":
            picking, start = _additions(
                start, self.granularity_pick, self.upper_limit_pick, self.counting, reach=True
            )
            recover = self.granularity_recover
        pushing, _ = _additions(start, self.granularity_prune, self.upper_limit, self.counting)
        return Plan(picking, pushing, float(start), self.granularity_prune, recover)

    def most_steps(self) -> int:
        """Steps after which growth has ended at the latest."""
        plan = self.plan()
        updates = plan.pick_updates + plan.push_updates
        return self.update_every * updates + self.stabilize_steps + 1


def _additions(
    start: Any, increment: float, limit: float, counting: Counting, *, reach: bool = False
) -> tuple[int, Any]:
    """(additions of `increment` to `start` until the sum exceeds `limit`, or reaches it if `reach`;
    that sum).
    """
    if not increment > 0:
        raise tables.ConfigError(
            "granularity", increment, why=f"never gets to {limit}", allowed="above 0"
        )
    step = fractions.Fraction(str(increment))
    begin, end = fractions.Fraction(str(start)), fractions.Fraction(str(limit))
    needed = (end - begin) / step
    exact = max(math.ceil(needed) if reach else math.floor(needed) + 1, 0)
    if counting == "exact":
        return exact, begin + exact * step
    found = originals.additions(start, increment, limit, 2 * exact + 2, counting, reach=reach)
    if found is None:
        raise tables.ConfigError(
            "granularity",
            increment,
            why=f"never gets to {limit} in {counting}",
            allowed="counting='exact'",
        )
    return found


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
    layers: Sequence[Layer],
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

    def __init__(
        self,
        options: Penalty,
        layers: Sequence[Layer],
        given: Mapping[str, np.ndarray],
        key: Array | None,
    ) -> None:
        self.options = options
        self.plan = options.plan()
        self.layers = layers
        self.given = given
        losing = [layer for layer in layers if self._loses(layer)]
        self.active = sorted(losing, key=lambda layer: layer.name)  # the order of a dict's leaves
        self.free = [layer for layer in self.active if layer.name not in given]
        self.keys = _keys(self.free, options.pick, key)
        self.slices = np.array([not layer.of_weights for layer in self.active], bool)
        names = [layer.name for layer in layers]
        turn = np.array([names.index(layer.name) for layer in self.active], int)
        self.judged = turn <= turn[:, None]  # [i, j]: layer i is judged after layer j, or is it

    def _loses(self, layer: Layer) -> bool:
        if layer.name in self.given:
            return not self.given[layer.name].all()
        return layer.num_pruned != 0

    def init(self, params: PyTree) -> GrowingState:
        picked: Keep = {}
        values = {layer.name: jnp.ones(layer.shape) for layer in self.active}
        if jax.tree.leaves(params):  # `optax.tree_map_params` calls `init` without arrays
            leaves = _checked_leaves(params, self.layers)
            values = {layer.name: _values(leaves, layer) for layer in self.active}
            if not self.plan.pick_updates:
                picked = self.select(leaves, self.free)
        keep = {name: jnp.ones_like(value, bool) for name, value in values.items()} | picked
        for layer in self.active:
            if layer.name in self.given:
                keep[layer.name] = jnp.asarray(self.given[layer.name])
        num = len(self.active)
        progress = Progress(
            jnp.full(num, PICK if self.plan.pick_updates else PUSH, jnp.int32),
            jnp.zeros(num, jnp.int32),
            *(jnp.zeros(num, float) for _ in range(5)),  # apart, to be donated
        )
        # with the step that makes the last layer done
        left = jnp.asarray(self.options.stabilize_steps + 1, jnp.int32)
        like = list(values.values())
        return GrowingState(
            jnp.zeros((), jnp.int32),
            trees.varying_like(left, like),
            keep,
            Progress(*(trees.varying_like(numbers, like) for numbers in progress)),
        )

    def select(self, leaves: Leaves, layers: Sequence[Layer]) -> Keep:
        return _select(leaves, layers, self.options.pick, self.keys)

    def update(
        self, updates: PyTree, state: GrowingState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, GrowingState]:
        del extra
        if params is None:
            raise ValueError("growing_l2 reads the weights; call update(grads, state, params).")
        leaves = trees.plain_leaves(params)
        number = state.step // self.options.update_every + 1
        due = state.step % self.options.update_every == 0
        keep = state.keep
        if self.plan.pick_updates:
            keep = self.repick(leaves, keep, due, number)
        progress = jax.lax.cond(
            due,
            lambda: self.advance(leaves, keep, number, state.progress),
            lambda: state.progress,
        )
        left = jnp.maximum(state.left - jnp.all(progress.phase == STABILIZE), 0)
        state = GrowingState(state.step + 1, left, keep, progress)
        return self.penalized(updates, state, params), state

    def repick(self, leaves: Leaves, keep: Keep, due: Array, number: Array) -> Keep:
        """The picks after update `number`, of GReg-2: of weights only when picking ends."""
        for of_weights in (False, True):
            layers = [layer for layer in self.free if layer.of_weights == of_weights]
            last = self.plan.pick_updates
            now = number == last if of_weights else number <= last
            old = {layer.name: keep[layer.name] for layer in layers}
            anew = functools.partial(self.select, leaves, layers)
            keep = keep | jax.lax.cond(due & now, anew, lambda old=old: old)
        return keep

    def advance(self, leaves: Leaves, keep: Keep, number: Array, old: Progress) -> Progress:
        """The progress of update `number`."""
        going = old.phase < STABILIZE
        updates = jnp.where(going, number, old.updates)
        means = [_mean_scores(leaves, layer, keep[layer.name]) for layer in self.active]
        kept, pruned = jnp.asarray(means, float).reshape(-1, 2).T
        ratio = _ratio_of_scores(kept, pruned)
        ratio = jnp.where(old.updates == 0, ratio, 0.9 * old.ratio + 0.1 * ratio)
        ratio = jnp.where(going & self.slices, ratio, old.ratio)
        done = self.reached(ratio, old)
        done |= updates >= self.plan.pick_updates + self.plan.push_updates
        picked = updates >= self.plan.pick_updates
        phase = jnp.where(picked, jnp.where(done, STABILIZE, PUSH), PICK)
        phase = jnp.where(going, phase, old.phase)
        return Progress(phase, updates, *self.penalties(updates), kept, pruned, ratio)

    def reached(self, ratio: Array, old: Progress) -> Array:
        """Layers whose scores differ enough, see `Penalty.mag_ratio_limit`."""
        limit = self.options.mag_ratio_limit
        if self.options.method == "fixreg":
            return jnp.zeros_like(ratio, bool)
        if self.options.method == "greg2":
            return (ratio >= limit) & self.slices
        before = (old.ratio >= limit) | (old.updates == 0)
        seen = jnp.where(self.judged, ratio >= limit, before)
        return jnp.all(seen | ~self.slices, axis=1) & self.slices

    def penalties(self, updates: Array) -> tuple[Array, Array]:
        """Penalties of what is kept and of what is pruned."""
        number = updates.astype(float)
        picking = number * self.options.granularity_pick
        pushed = number - self.plan.pick_updates
        pushing = self.plan.push_start + pushed * self.plan.push_increment
        early = updates <= self.plan.pick_updates
        return jnp.where(early, picking, self.plan.recover), jnp.where(early, picking, pushing)

    def penalized(self, updates: PyTree, state: GrowingState, params: PyTree) -> PyTree:
        regs = _regs(state)
        parts = units.parts_by_path(self.active)

        def add(path: Sequence, update: Array, w: Array) -> Array:
            inside = parts.get(trees.plain_path(path), [])
            if not inside:
                return update
            reg = sum(units.spread(regs[name], part, w.shape) for name, part in inside)
            return (update + reg * w).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(add, updates, params)


def _checked_keep(layers: Sequence[Layer], keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
    shapes = {layer.name: layer.shape for layer in layers}
    if len(shapes) < len(layers):
        raise ValueError("two layers have the same name; leave one out.")
    given = {name: np.asarray(bools) for name, bools in keep.items()}
    for name, bools in given.items():
        if name not in shapes:
            hint = tables.closest(name, shapes)
            raise ValueError(f"keep names {name!r}, which is no layer.{hint}")
        if bools.dtype != bool or bools.shape != shapes[name] or not bools.any():
            raise ValueError(
                f"keep[{name!r}] is {bools.dtype} {bools.shape} with {bools.sum()} units; allowed: "
                f"bool {shapes[name]} that keeps one or more."
            )
    return given


def _mean_scores(leaves: Leaves, layer: Layer, keep: Array) -> tuple[Array, Array]:
    """Mean scores of what is kept and of what is pruned, 0 if that is nothing."""
    scores = _values(leaves, layer)
    magnitude = lambda score: jnp.abs(trees.widen(score))
    kept = trees.fold_sum(lambda s, k: jnp.where(k, magnitude(s), 0), scores, keep)
    pruned = trees.fold_sum(lambda s, k: jnp.where(k, 0, magnitude(s)), scores, keep)
    number = trees.fold_sum(lambda k: k.astype(jnp.int32), keep)
    return kept / number, pruned / jnp.maximum(layer.size - number, 1)


def _ratio_of_scores(kept: Array, pruned: Array) -> Array:
    """Of two zeros 1: neither is larger; smoothing would keep a NaN for ever."""
    positive = pruned > 0
    quotient = kept / jnp.where(positive, pruned, 1)
    return jnp.where(positive, quotient, jnp.where(kept > 0, jnp.inf, 1))


# What the state tells -----------------------------------------------------------------------------


def state_of(opt_state: PyTree) -> GrowingState:
    """The state of the one `growing_l2` in an optimizer's state; raises ValueError if there is not
    exactly one.
    """
    ours = lambda state: isinstance(state, GrowingState)
    states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=ours) if ours(leaf)]
    if len(states) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(states)} states of growing_l2; it must hold one."
        )
    (state,) = states
    # plain arrays, which `nnx.Optimizer` wraps
    step, left, *rest = jax.tree.leaves(state)
    names = sorted(state.keep)
    keep, numbers = dict(zip(names, rest)), rest[len(names) :]
    return GrowingState(step, left, keep, Progress(*numbers))


def finished(opt_state: PyTree) -> Array:
    """Whether all layers are done and `stabilize_steps` more steps are made: bool."""
    return state_of(opt_state).left <= 0


def kept(opt_state: PyTree) -> Keep:
    """What stays, of the layers that lose something; decided once their phase is PUSH."""
    return state_of(opt_state).keep


def penalties(opt_state: PyTree) -> dict[str, Array]:
    """The penalty of every unit, by layer: of filters [units], of weights in the shape of the
    kernel.
    """
    return _regs(state_of(opt_state))


def _regs(state: GrowingState) -> dict[str, Array]:
    result = {}
    for i, (name, keep) in enumerate(state.keep.items()):
        # a leading axis of members of a sweep stays in front
        shape = state.step.shape + (1,) * (keep.ndim - state.step.ndim)
        reg_kept = state.progress.reg_kept[..., i].reshape(shape)
        reg_pruned = state.progress.reg_pruned[..., i].reshape(shape)
        result[name] = jnp.where(keep, reg_kept, reg_pruned)
    return result


def progress(opt_state: PyTree) -> dict[str, Progress]:
    """The numbers of every layer, scalars, for logs and figures."""
    state = state_of(opt_state)
    return {
        name: Progress(*(numbers[..., i] for numbers in state.progress))
        for i, name in enumerate(state.keep)
    }


def scores(params: PyTree, layers: Sequence[Layer]) -> dict[str, Array]:
    """The score of every unit, by layer: mean absolute weights [units], of weights their
    magnitudes.
    """
    leaves = _checked_leaves(params, layers)
    return {layer.name: jnp.abs(_values(leaves, layer)) for layer in layers}
