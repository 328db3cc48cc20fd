"""Growing regularisation: an L2 penalty that rises on what is to be removed, so that it can go
without harm.

    layers = growing.layers(params, {"conv1/kernel": 0.5, "conv2/kernel": 0.7}, "filter")
    tx = optax.chain(growing.growing_l2(layers, method="greg1", update_every=10), optax.sgd(1e-3,
    0.9)) ...                                      # steps, until growing.finished(opt_state) keep =
    growing.kept(opt_state)           # bools by name of layer, True = keep

List layers in the order of the network: GReg-1 judges one after the other, see `growing_l2`.
A layer is a set of groups (filters, channels, weights, or coupled channels of `groups.trace`) of
which a share goes. Its groups are picked by score, the mean absolute weight; those picked are
pushed towards zero; then the penalty rests while the network settles. All of it is state of the
transformation: it runs under jit, scan and vmap, without the host. No penalty is stored per group,
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

from sparsity_jax import groups, kernels, masks, tables, trees

PyTree = Any
Keep = dict[str, jax.Array]  # bools by name of layer, True = keep
Granularity = Literal["filter", "channel", "weight"]
Members = Literal["all", "kernels", "producers"]
Pick = Literal["min", "max", "rand"]
PICK, PUSH, STABILIZE = 0, 1, 2  # phases of a layer


# What is regularised ------------------------------------------------------------------------------


class Part(NamedTuple):
    """Where the groups of a layer are in one array: along `axis`; if that is None, every entry is a
    group.

    path: a plain one, see `trees.plain_path`.
    index: int [groups, copies], the positions of every group on the axis; None: group i is at
        position i.
    """

    path: str
    axis: int | None
    index: np.ndarray | None = None


class Layer(NamedTuple):
    """Groups of which `num_pruned` go (None: those below the largest gap between scores).

    shape: of one bool per group. parts: what the penalty acts on. scored: the arrays of which the
    mean absolute entry of a group is its score.
    """

    name: str
    shape: tuple[int, ...]
    num_pruned: int | None
    parts: tuple[Part, ...]
    scored: tuple[Part, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def of_weights(self) -> bool:
        return self.scored[0].axis is None


def layers(
    params: PyTree,
    ratios: Mapping[str, float],
    granularity: Granularity = "filter",
    *,
    channels: groups.Channels | None = None,
    layout: kernels.Layout | None = None,
) -> tuple[Layer, ...]:
    """A layer for every kernel in `ratios`, named by its path: its output slices, input slices or
    entries.

    params: arrays or shape structs; the kernel of a grouped convolution has the inputs of one of
        its groups.
    ratios: share to remove by path, or `masks.AUTOMATIC`; see `masks.num_pruned`.
    channels, layout: which axes of a kernel are its inputs and outputs, by the trace of the
    function that uses it, or `in_out` or `out_in` for all of them; without both the names must
    tell. See `kernels.axes`. Raises ValueError for unknown paths, ratios out of range, slices of
    vectors, kernels whose axes nothing tells, and kernels with several axes of outputs (or inputs),
    such as the heads of an attention.
    """
    tables.convert(granularity, Granularity, "granularity")
    leaves = trees.plain_leaves(params)
    paths = {name: _plain(name, leaves) for name in ratios}
    _check_names(paths.values(), leaves, "path of the params")
    found = []
    for name, ratio in ratios.items():
        path = paths[name]
        shape, axis = tuple(leaves[path].shape), None
        if granularity != "weight":
            axis = _axis_of(params, path, granularity, channels, layout)
            shape = (shape[axis],)
        part = (Part(path, axis),)
        found.append(Layer(name, shape, _num_pruned(name, ratio, math.prod(shape)), part, part))
    return tuple(found)


def _plain(path: str, leaves: Mapping[str, Any]) -> str:
    """`path` as it is among the plain ones of `leaves`, if it is."""
    return path if path in leaves else path.removesuffix("/value")


def _axis_of(
    params: PyTree,
    path: str,
    granularity: Literal["filter", "channel"],
    channels: groups.Channels | None,
    layout: kernels.Layout | None,
) -> int:
    """The axis of the outputs (filter) or inputs (channel) of a kernel."""
    leaves = trees.plain_leaves(params)
    whole_paths = dict(zip(leaves, trees.named_leaves(params)))
    shape = tuple(leaves[path].shape)
    if len(shape) < 2:
        raise ValueError(
            f"{path!r} has shape {shape}; a {granularity} is a slice of a matrix or more."
        )
    (axes,) = kernels.axes(params, [whole_paths[path]], channels, layout=layout).values()
    sliced = axes.outputs if granularity == "filter" else axes.inputs
    if len(sliced) != 1:
        raise ValueError(
            f"{path!r} of shape {shape} has a {granularity} for every index of the axes {sliced}; "
            "allowed: one axis. "
            "`growing.coupled` takes channels of several axes."
        )
    return sliced[0]


def coupled(
    channels: groups.Channels,
    params: PyTree,
    ratios: Mapping[str, float],
    *,
    members: Members = "all",
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
    tables.convert(members, Members, "members")
    leaves = trees.plain_leaves(params)
    _check_names(ratios, channels.groups, "group")
    found = []
    for name, ratio in ratios.items():
        group = channels.groups[name]
        everything, weights, producers = [], [], []
        for member in group.members:
            part = _part(member, leaves)
            if part is None:
                continue
            everything.append(part)
            if member.role != "other" or _named_kernel(part, leaves):
                weights.append(part)
            if member.role == "producer":
                producers.append(part)
        scored = producers or weights
        if not scored:
            raise ValueError(
                f"the group {name!r} has no kernel among the params; leave it out of the ratios."
            )
        parts = {"all": everything, "kernels": weights, "producers": scored}[members]
        number = _num_pruned(name, ratio, group.size)
        found.append(Layer(name, (group.size,), number, tuple(parts), tuple(scored)))
    return tuple(found)


def _named_kernel(part: Part, leaves: Mapping[str, Any]) -> bool:
    """Whether an array that makes and reads no channels is a kernel all the same, such as one of a
    depthwise layer.
    """
    return trees.is_kernel(part.path) and leaves[part.path].ndim > 1


def _part(member: groups.Member, leaves: Mapping[str, Any]) -> Part | None:
    """The member as a part of `leaves`, which may lack the first name of its path; None for running
    statistics.
    """
    paths = [_plain(path, leaves) for path in (member.path, member.path.partition("/")[2])]
    path = next((path for path in paths if path in leaves), None)
    if path is None:
        return None
    positions = np.arange(leaves[path].shape[member.axis])[:, None]
    return Part(
        path,
        member.axis,
        None if np.array_equal(member.index, positions) else np.asarray(member.index),
    )


def _num_pruned(name: str, ratio: float, size: int) -> int | None:
    if not (ratio == masks.AUTOMATIC or 0 <= ratio <= 1):
        allowed = f"0 to 1, or {masks.AUTOMATIC:g} for the largest gap"
        raise ValueError(f"the ratio of {name!r} is {ratio}; allowed: {allowed}.")
    return None if ratio == masks.AUTOMATIC and size > 1 else masks.num_pruned(abs(ratio), size)


def _check_names(named: Collection[str], known: Collection[str], kind: str) -> None:
    if not named:
        raise ValueError(
            f"no {kind} is given; name at least one, e.g. {next(iter(known), None)!r}."
        )
    for name in named:
        if name not in known:
            hint = tables.closest(name, known)
            raise ValueError(f"{name!r} is no {kind}; one is {next(iter(known), None)!r}.{hint}")


# Picking ------------------------------------------------------------------------------------------


def largest_gap(scores: jax.Array) -> jax.Array:
    """How many `scores` lie below the largest gap between neighbours in order: int32, at least 1,
    never all.

    floor(0.02 n) scores at either end are not compared. Of equal gaps the lowest. Sorts. NaN counts
    as minus infinity, and equal infinities have no gap. Raises ValueError for fewer than 2 scores
    and, outside `jit`, for NaN.
    """
    if scores.size < 2:
        raise ValueError(f"there are {scores.size} scores; a gap is between 2 or more.")
    trees.check_finite(scores, "scores", infinite=True)
    trim = masks.count_of(0.02, scores.size, math.floor)
    lowest = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    ordered = jnp.sort(trees.gathered(lowest).ravel())[trim : scores.size - trim]
    gaps = jnp.where(ordered[1:] == ordered[:-1], 0, jnp.diff(ordered))
    return (jnp.argmax(gaps) + trim + 1).astype(jnp.int32)


def pick(
    params: PyTree, layers: Sequence[Layer], *, pick: Pick = "min", key: jax.Array | None = None
) -> Keep:
    """What one-shot pruning keeps: all but the `num_pruned` groups of lowest or highest score, or
    random ones.

    key: for `rand`. Equal scores: groups of lower index stay (`max`: go). Groups whose score is NaN
    go first, whatever `pick` is. Traceable in params and key. Raises ValueError for layers of other
    params, a missing key, an automatic number without pick='min' and, outside `jit`, weights that
    are NaN.
    """
    tables.convert(pick, Pick, "pick")
    leaves = _checked_leaves(params, layers)
    return _select(leaves, layers, pick, _keys(layers, pick, key))


def _keys(layers: Sequence[Layer], how: Pick, key: jax.Array | None) -> dict[str, jax.Array]:
    """A key for every layer where picks are random."""
    if how != "min" and (automatic := [layer.name for layer in layers if layer.num_pruned is None]):
        raise ValueError(
            f"{automatic[0]!r} is cut at the largest gap, which needs pick='min'; it is {how!r}."
        )
    if how == "rand" and key is None:
        raise ValueError("pick='rand' needs a key.")
    return {layer.name: _key(key, layer.name) for layer in layers} if how == "rand" else {}


def _key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _checked_leaves(params: PyTree, layers: Sequence[Layer]) -> dict[str, jax.Array]:
    """Leaves of `params` by path; raises ValueError where a layer does not fit them."""
    leaves = trees.plain_leaves(params)
    for layer in layers:
        for path, axis, index in (*layer.parts, *layer.scored):
            if path not in leaves:
                raise ValueError(
                    f"layer {layer.name!r}: {path!r} is no path.{tables.closest(path, leaves)}"
                )
            shape = jnp.shape(leaves[path])
            if axis is None:
                fits = shape == layer.shape
            else:
                size = shape[axis] if -len(shape) <= axis < len(shape) else 0
                fits = (size,) == layer.shape if index is None else index.max(initial=-1) < size
            if not fits:
                raise ValueError(
                    f"layer {layer.name!r} was made for another array than {path!r} of shape "
                    f"{shape}."
                )
    return leaves


def _values(leaves: Mapping[str, jax.Array], layer: Layer) -> jax.Array:
    """What ranks the groups of a layer: their scores, of weights the weights themselves, with their
    signs.
    """
    return leaves[layer.scored[0].path] if layer.of_weights else _score(leaves, layer)


def _score(leaves: Mapping[str, jax.Array], layer: Layer) -> jax.Array:
    """Mean absolute weight of every group: [groups]."""
    total, entries = 0.0, 0
    for path, axis, index in layer.scored:
        w = leaves[path]
        sums = trees.gathered(
            jnp.sum(jnp.abs(trees.widen(w)), [i for i in range(w.ndim) if i != axis % w.ndim])
        )
        total = total + (sums if index is None else jnp.sum(sums[index], 1))
        entries += w.size // w.shape[axis] * (1 if index is None else index.shape[1])
    return total / entries


def _select(
    leaves: Mapping, layers: Sequence[Layer], how: Pick, keys: Mapping[str, jax.Array]
) -> Keep:
    """What stays of every layer. Layers of one shape share a compiled search: filters of ResNet-56
    need three.
    """
    scored = {part.path: leaves[part.path] for layer in layers for part in layer.scored}
    trees.check_finite(scored, "params", infinite=True)
    keep, by_shape = {}, {}
    for layer in layers:
        values = _values(leaves, layer)
        number = largest_gap(jnp.abs(values)) if layer.num_pruned is None else layer.num_pruned
        if keys:
            values = jnp.where(
                jnp.isnan(values), jnp.nan, jax.random.uniform(keys[layer.name], layer.shape)
            )
        if how == "max":
            values = jnp.where(jnp.isnan(values), jnp.inf, values)
        row = (layer.name, values, jnp.asarray(number, jnp.int32))
        by_shape.setdefault((layer.shape, trees.division(values)), []).append(row)

    for own in by_shape.values():
        names, values, numbers = zip(*own)
        found = _kept(jnp.stack(values), jnp.stack(numbers), largest_go=how == "max")
        keep |= {name: found[i] for i, name in enumerate(names)}
    return keep


@functools.partial(jax.jit, static_argnames="largest_go")
def _kept(values: jax.Array, numbers: jax.Array, *, largest_go: bool) -> jax.Array:
    """What stays of every row of `values` [layers, ...] where `numbers` [layers] of its entries go:
    bool.
    """

    def search(row):
        values, number = row
        if largest_go:
            return ~masks.k_largest_mask(values, number, magnitude=True)
        return masks.k_largest_mask(values, values.size - number, magnitude=True)

    return jax.lax.map(search, (values, numbers))


# How the penalty grows ----------------------------------------------------------------------------


class Plan(NamedTuple):
    """A method in numbers; `updates` of the penalty are counted from 1, every `update_every` steps.

    The first `pick_updates` give all groups updates * pick_increment; then what goes has push_start
    + (updates - pick_updates) * push_increment, and what stays `recover`. A layer is done after
    `push_updates` of these, or earlier once the ratio of scores reaches `ratio_limit`: every one
    `recorded` so far, its `own`, or it never matters.
    """

    update_every: int
    pick_updates: int
    push_updates: int
    pick_increment: float
    push_start: float
    push_increment: float
    recover: float
    ratio_limit: float
    ratio_of: Literal["recorded", "own", "none"]
    stabilize_steps: int
    pick: Pick


def plan(
    *,
    method: Literal["greg1", "greg2", "fixreg"] = "greg1",
    pick: Pick = "min",
    update_every: tables.Count = 5,
    granularity_prune: tables.Positive = 1e-4,
    granularity_pick: tables.Positive = 1e-5,
    granularity_recover: float = -1e-4,
    upper_limit: tables.Positive = 1.0,
    upper_limit_pick: tables.Positive = 1e-2,
    mag_ratio_limit: tables.Positive = 1000.0,
    fix_steps: tables.Index = 10_000,
    stabilize_steps: tables.Index = 40_000,
    counting: Literal["exact", "float32", "float64"] = "exact",
) -> Plan:
    """Options of `growing_l2`.

    method: `greg1` picks at once and adds `granularity_prune` to the penalty of what goes, every
        `update_every` steps. `greg2` first adds `granularity_pick` everywhere, until the penalty
        reaches `upper_limit_pick`, and picks then; what stays gets the penalty
        `granularity_recover`. `fixreg` gives what goes `upper_limit` at once, and is done with the
        first update after step `fix_steps`.
    upper_limit: a layer is done once a penalty exceeds it. mag_ratio_limit: or once the mean score
        of what stays is so many times that of what goes, smoothed (0.9 old + 0.1 new): with greg2
        in this layer; with greg1 in every layer that has a ratio yet, also those done already. As
        in the original, greg1 looks at one layer after the other: it compares the new ratios of
        this layer and those before it, and those of the layers behind it as the update before left
        them. So layers before the last to get there are done an update later than it; in the first
        update a layer is compared without those behind it. Layers of weights go by the penalty
        only.
    pick: what goes has the lowest score, the highest, or is random.
    stabilize_steps: further steps at rest once all layers are done.
    counting: updates to a limit follow from the decimals as written (`exact`), or from what the
        original reaches by adding up in floating point: 10,000 to exceed 1.0 in steps of 1e-4 in
        float32, 10,001 in float64 and exactly; 1,001 to reach 1e-2 in steps of 1e-5 in either,
        1,000 exactly.
    """
    pick_updates, push_start, push_increment, recover = 0, 0, granularity_prune, 0.0
    if method == "greg2":
        pick_updates, push_start = _grow(0, granularity_pick, upper_limit_pick, True, counting)
        recover = granularity_recover
    if method == "fixreg":
        push_updates, push_start, push_increment = fix_steps // update_every + 2, upper_limit, 0.0
    else:
        push_updates, _ = _grow(push_start, granularity_prune, upper_limit, False, counting)
    return Plan(
        update_every,
        pick_updates,
        push_updates,
        granularity_pick,
        float(push_start),
        push_increment,
        recover,
        mag_ratio_limit,
        {"greg1": "recorded", "greg2": "own", "fixreg": "none"}[method],
        stabilize_steps,
        pick,
    )


def _grow(
    start: Any, increment: float, limit: float, reach: bool, counting: str
) -> tuple[int, Any]:
    """(additions of `increment` to `start` until the sum exceeds `limit`, or reaches it if `reach`;
    that sum).
    """
    if not increment > 0:
        raise tables.ConfigError(f"steps of {increment} never get to {limit}; allowed: above 0.")
    first, step, end = (fractions.Fraction(str(x)) for x in (start, increment, limit))
    exact = max(
        math.ceil((end - first) / step) if reach else math.floor((end - first) / step) + 1, 0
    )
    if counting == "exact":
        return exact, first + exact * step
    terms = np.full(2 * exact + 2, increment, counting)
    terms[0] = start
    sums = np.add.accumulate(terms)
    end = sums.dtype.type(limit)
    hits = np.flatnonzero(sums >= end if reach else sums > end)
    if not hits.size:
        raise tables.ConfigError(
            f"steps of {increment} never get to {limit} in {counting}; use counting='exact'."
        )
    return int(hits[0]), sums[hits[0]]


# The transformation -------------------------------------------------------------------------------


class Progress(NamedTuple):
    """Of every layer, in the order of `GrowingState.keep`, as of the latest update; arrays
    [layers].

    phase: PICK, PUSH or STABILIZE. updates: of its penalty so far. reg_kept, reg_pruned: penalties
    of what stays and of what goes. score_kept, score_pruned: mean scores of them. ratio: of these
    two, smoothed; 0 before the first update and in layers of weights.
    """

    phase: jax.Array
    updates: jax.Array
    reg_kept: jax.Array
    reg_pruned: jax.Array
    score_kept: jax.Array
    score_pruned: jax.Array
    ratio: jax.Array


class GrowingState(NamedTuple):
    """step: updates of the params so far. left: steps to make once all layers are done. keep: what
    stays, by layer; in the phase PICK what would stay if it ended now, of weights everything.
    progress: of the layers."""

    step: jax.Array
    left: jax.Array
    keep: Keep
    progress: Progress


def growing_l2(
    layers: Sequence[Layer],
    *,
    key: jax.Array | None = None,
    keep: Mapping[str, Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """g + reg * w with the penalties `reg` of a growing regularisation; put it before weight decay
    and momentum.

    layers: of `layers` or `coupled`, in the order of the network, in which GReg-1 judges them (see
    `plan`); one that loses nothing is left alone. key: for pick='rand'. keep: picks made before,
    bools by name of layer as `pick` and `kept` return, known on the host; they replace the picks of
    these layers. options: those of `plan`. GReg-1 and FixReg pick from the params given to `init`.
    Updates happen at steps 0, update_every, 2 update_every, ..., before the penalty acts. Raises
    ConfigError for wrong options, ValueError for picks that do not fit, a missing key, layers of
    other params and an `update` without params.
    """
    chosen = plan(**tables.check_options(plan, options))
    given = _checked_keep(layers, keep or {})
    losing = lambda layer: (
        not given[layer.name].all() if layer.name in given else layer.num_pruned != 0
    )
    active = sorted(
        filter(losing, layers), key=lambda layer: layer.name
    )  # the order of a dict's leaves
    free = [layer for layer in active if layer.name not in given]
    keys = _keys(free, chosen.pick, key)
    slices = np.array([not layer.of_weights for layer in active], bool)
    names = [layer.name for layer in layers]
    turn = np.array([names.index(layer.name) for layer in active], int)
    judged = turn <= turn[:, None]  # [i, j]: layer i is judged after layer j, or is layer j
    parts: dict[str, list[tuple[int, Part]]] = {}
    for i, layer in enumerate(active):
        for part in layer.parts:
            parts.setdefault(part.path, []).append((i, part))

    def init(params):
        if jax.tree.leaves(params):
            leaves = _checked_leaves(params, layers)
            values = {layer.name: _values(leaves, layer) for layer in active}
            picked = {} if chosen.pick_updates else _select(leaves, free, chosen.pick, keys)
        else:  # `optax.tree_map_params` calls `init` without arrays
            values = {layer.name: jnp.ones(layer.shape) for layer in active}
            picked = {}
        whole = {name: jnp.ones_like(own, bool) for name, own in values.items()}
        known = {
            layer.name: jnp.asarray(given[layer.name]) for layer in active if layer.name in given
        }
        like_params = lambda x: trees.varying_like(x, list(values.values()))
        phase = jnp.full(len(active), PICK if chosen.pick_updates else PUSH, jnp.int32)
        zeros = [
            jnp.zeros(len(active), dtype) for dtype in (jnp.int32, *[float] * 5)
        ]  # apart, to be donated
        progress = Progress(*map(like_params, (phase, *zeros)))
        left = jnp.asarray(
            chosen.stabilize_steps + 1, jnp.int32
        )  # with the step that makes the last layer done
        return GrowingState(
            jnp.zeros((), jnp.int32), like_params(left), whole | picked | known, progress
        )

    def repick(leaves, keep, due, number):
        """The picks after update `number`, of GReg-2."""
        for when, own in (
            (
                due & (number <= chosen.pick_updates),
                [layer for layer in free if not layer.of_weights],
            ),
            (due & (number == chosen.pick_updates), [layer for layer in free if layer.of_weights]),
        ):
            old = {layer.name: keep[layer.name] for layer in own}
            anew = lambda own=own: _select(leaves, own, chosen.pick, keys)
            keep = keep | jax.lax.cond(when, anew, lambda old=old: old)
        return keep

    def advance(leaves, keep, number, old):
        going = old.phase < STABILIZE
        updates = jnp.where(going, number, old.updates)
        means = [_mean_scores(leaves, layer, keep[layer.name]) for layer in active]
        kept, pruned = jnp.asarray(means, float).reshape(-1, 2).T
        # of two zeros 1: neither is larger; smoothing would keep a NaN for ever
        ratio = jnp.where(
            pruned > 0, kept / jnp.where(pruned > 0, pruned, 1), jnp.where(kept > 0, jnp.inf, 1)
        )
        ratio = jnp.where(old.updates == 0, ratio, 0.9 * old.ratio + 0.1 * ratio)
        ratio = jnp.where(going & slices, ratio, old.ratio)
        reached = lambda ratio: ratio >= chosen.ratio_limit
        enough = reached(ratio) & slices & (chosen.ratio_of != "none")
        if chosen.ratio_of == "recorded":
            before = reached(old.ratio) | (old.updates == 0)
            enough = slices & jnp.all(jnp.where(judged, reached(ratio), before) | ~slices, axis=1)
        enough |= updates >= chosen.pick_updates + chosen.push_updates
        pushed = updates >= chosen.pick_updates
        phase = jnp.where(pushed, jnp.where(enough, STABILIZE, PUSH), PICK)
        phase = jnp.where(going, phase, old.phase)
        return Progress(phase, updates, *_penalties(chosen, updates), kept, pruned, ratio)

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("growing_l2 reads the weights; call update(grads, state, params).")
        leaves = trees.plain_leaves(params)
        number, due = state.step // chosen.update_every + 1, state.step % chosen.update_every == 0
        keep = repick(leaves, state.keep, due, number) if chosen.pick_updates else state.keep
        progress = jax.lax.cond(
            due, lambda: advance(leaves, keep, number, state.progress), lambda: state.progress
        )
        left = jnp.maximum(state.left - jnp.all(progress.phase == STABILIZE), 0)
        state = GrowingState(state.step + 1, left, keep, progress)
        regs = list(_regs(state).values())

        def add(path, update, w):
            own = parts.get(trees.plain_path(path), ())
            if not own:
                return update
            reg = sum(_spread(regs[i], part, w.shape) for i, part in own)
            return (update + reg * w).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(add, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _checked_keep(layers: Sequence[Layer], keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
    shapes = {layer.name: layer.shape for layer in layers}
    if len(shapes) < len(layers):
        raise ValueError("two layers have the same name; leave one out.")
    given = {name: np.asarray(own) for name, own in keep.items()}
    for name, own in given.items():
        if name not in shapes:
            raise ValueError(
                f"keep names {name!r}, which is no layer.{tables.closest(name, shapes)}"
            )
        if own.dtype != bool or own.shape != shapes[name] or not own.any():
            raise ValueError(
                f"keep[{name!r}] is {own.dtype} {own.shape} with {own.sum()} groups; allowed: "
                f"bool {shapes[name]} that "
                "keeps one or more."
            )
    return given


def _mean_scores(
    leaves: Mapping[str, jax.Array], layer: Layer, keep: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean scores of what stays and of what goes, 0 if that is nothing."""
    scores = _values(leaves, layer)
    kept = trees.fold_sum(lambda s, k: jnp.where(k, jnp.abs(trees.widen(s)), 0), scores, keep)
    pruned = trees.fold_sum(lambda s, k: jnp.where(k, 0, jnp.abs(trees.widen(s))), scores, keep)
    number = trees.fold_sum(lambda k: k.astype(jnp.int32), keep)
    return kept / number, pruned / jnp.maximum(layer.size - number, 1)


def _penalties(chosen: Plan, updates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Penalties of what stays and of what goes."""
    number = updates.astype(float)
    picking = number * chosen.pick_increment
    pushing = chosen.push_start + (number - chosen.pick_updates) * chosen.push_increment
    early = updates <= chosen.pick_updates
    return jnp.where(early, picking, chosen.recover), jnp.where(early, picking, pushing)


def _spread(reg: jax.Array, part: Part, shape: tuple[int, ...]) -> jax.Array:
    """`reg` of every group at its entries of an array of `shape`."""
    if part.axis is None:
        return reg
    size = shape[part.axis]
    along = (
        reg if part.index is None else jnp.zeros(size, reg.dtype).at[part.index].add(reg[:, None])
    )
    return along.reshape([size if i == part.axis % len(shape) else 1 for i in range(len(shape))])


# What the state tells -----------------------------------------------------------------------------


def state_of(opt_state: PyTree) -> GrowingState:
    """The state of the one `growing_l2` in an optimizer's state; raises ValueError if there is not
    exactly one.
    """
    ours = lambda state: isinstance(state, GrowingState)
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=ours) if ours(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(found)} states of growing_l2; it must hold one."
        )
    (state,) = found
    progress = Progress(*Progress._fields)
    structure = jax.tree.structure(
        GrowingState("step", "left", dict.fromkeys(state.keep, "keep"), progress)
    )
    return jax.tree.unflatten(
        structure, jax.tree.leaves(state)
    )  # plain arrays, which `nnx.Optimizer` wraps


def finished(opt_state: PyTree) -> jax.Array:
    """Whether all layers are done and `stabilize_steps` more steps are made: bool."""
    return state_of(opt_state).left <= 0


def kept(opt_state: PyTree) -> Keep:
    """What stays, of the layers that lose something; decided once their phase is PUSH."""
    return state_of(opt_state).keep


def penalties(opt_state: PyTree) -> dict[str, jax.Array]:
    """The penalty of every group, by layer: of filters [groups], of weights in the shape of the
    kernel.
    """
    return _regs(state_of(opt_state))


def _regs(state: GrowingState) -> dict[str, jax.Array]:
    result = {}
    for i, (name, keep) in enumerate(state.keep.items()):
        # a leading axis of members of a sweep stays in front
        own = lambda reg, i=i, keep=keep: reg[..., i].reshape(
            state.step.shape + (1,) * (keep.ndim - state.step.ndim)
        )
        result[name] = jnp.where(keep, own(state.progress.reg_kept), own(state.progress.reg_pruned))
    return result


def progress(opt_state: PyTree) -> dict[str, Progress]:
    """The numbers of every layer, scalars, for logs and figures."""
    state = state_of(opt_state)
    return {
        name: Progress(*(x[..., i] for x in state.progress)) for i, name in enumerate(state.keep)
    }


def scores(params: PyTree, layers: Sequence[Layer]) -> dict[str, jax.Array]:
    """The score of every group, by layer: mean absolute weights [groups], of weights their
    magnitudes.
    """
    leaves = _checked_leaves(params, layers)
    return {layer.name: jnp.abs(_values(leaves, layer)) for layer in layers}
