"""Channels of any JAX function that live or die together, derived from its jaxpr.

    channels = groups.trace(model.apply, variables, images)
    print(groups.describe(channels))
    keep = {name: scores[name] > 0 for name in channels.names}  # bool [channels] of every group
    logits = model.apply(groups.mask(variables, channels, keep), images)  # keep may be traced
    small = groups.compact(variables, channels, keep)  # removed channels cut out, once
    logits = groups.elastic(model.apply, channels, keep)(small, images)  # the same function

Linen, NNX, Equinox and hand-written functions work alike: `apply(variables, *inputs)` must be
traceable and its variables a pytree of arrays. A group is data: which entries of which axes of
which arrays belong to each channel. What the analysis cannot follow stays whole and is listed in
`channels.frozen`, never guessed. `channels.walk` tells what, `channels.rules` has the rules.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import tables, trees
from sparsity_jax.channels import execute, rules, walk
from sparsity_jax.channels.values import Place

PyTree = Any
Struct = jax.ShapeDtypeStruct
Arrays = dict[str, Any]  # by path, or by name of group
ByAxis = dict[str, dict[int, Any]]  # by path and axis
Sums = Literal["allow", "freeze"]
Branches = Literal["tied", "separate"]
Keep = Mapping[str, Any]  # bool [channels] by name of group; a group left out keeps all


class Member(NamedTuple):
    """One axis of one array of the variables, and where on it each channel of a group is."""

    path: str  # e.g. params/conv1/kernel
    axis: int
    index: np.ndarray  # type: ignore[assignment]  # int [channels, copies]
    # producer: a kernel's outputs; consumer: its inputs; depthwise: both; other: biases, norms
    role: str
    # a consumer of what is not zero where other members are, e.g. behind a sigmoid
    exposed: bool = False


class Group(NamedTuple):
    """Channels that can be removed, each with all its members."""

    name: str
    size: int
    members: tuple[Member, ...]


Groups = dict[str, Group]


class Frozen(NamedTuple):
    """An operation that keeps axes of the variables whole."""

    reason: str
    primitive: str
    source: str  # module path and first line of user code
    members: tuple[tuple[str, int], ...]  # (path, axis)


class Channels(NamedTuple):
    """What `trace` finds: data only, except for the analysis that `elastic` runs on."""

    groups: Groups
    frozen: tuple[Frozen, ...]
    shapes: dict[str, Struct]  # of the full variables, by path
    traced: "_Traced"
    options: tuple[tuple[str, str], ...]

    @property
    def names(self) -> list[str]:
        return list(self.groups)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: group.size for name, group in self.groups.items()}


class _Traced(NamedTuple):
    apply: Callable
    analysis: walk.Analysis
    groups: Groups
    atoms: dict[str, np.ndarray]  # label of every channel, by name of group
    signature: tuple  # of the arguments it was traced for
    tree: Any  # of the results

    @property
    def inputs(self) -> tuple[Struct, ...]:
        """Shapes and types of the inputs it was traced for."""
        return self.signature[1]

    def alive(self, keep: Keep) -> execute.Alive:
        """Which entries of the program stay. keep: of all groups."""
        removed: set[int] = set()
        for name, atoms in self.atoms.items():
            gone = ~np.asarray(keep[name])
            removed.update(atoms[gone].tolist())
        return execute.Alive(self.analysis.labels, removed)


def trace(
    apply: Callable,
    variables: PyTree,
    *inputs: PyTree,
    sums: Sums = "allow",
    branches: Branches = "tied",
) -> Channels:
    """Groups of coupled channels of `apply(variables, *inputs)`, in its inference mode.

    variables, inputs: arrays or shape structs; nothing is computed. Axes of inputs and results are
    never removed, nor are integer arrays.
    sums: `freeze` keeps axes whole that are summed up without weights (the width of a layer norm):
    a module built anew at the smaller width would divide by another number. `elastic` runs the
    traced program, for which `allow` is exact.
    branches: `separate` lets the two sides of a skip connection be masked one by one, as the
    gradient-flow original does; such channels cannot be compacted.
    Raises TypeError for an apply that cannot be traced and for variables that are no arrays.
    """
    tables.convert(sums, Sums, "sums")
    tables.convert(branches, Branches, "branches")
    options: dict[str, str] = dict(sums=sums, branches=branches)
    leaves = _arrays(variables)
    paths = list(leaves)
    traced = _trace(apply, variables, inputs, options)
    frozen = []
    for event in traced.analysis.events:
        places = [place for place in event.axes if place[0] < len(paths)]
        if places:
            members = tuple((paths[i], a) for i, a in places)
            frozen.append(Frozen(event.reason, event.primitive, event.source, members))
    frozen += _left(traced, paths)
    shapes = {path: _struct(leaf) for path, leaf in leaves.items()}
    return Channels(traced.groups, tuple(frozen), shapes, traced, tuple(options.items()))


def _left(traced: _Traced, paths: list[str]) -> list[Frozen]:
    """Axes that nothing froze but that are in no group."""
    grouped: set[tuple[str, int]] = set()
    for group in traced.groups.values():
        grouped.update((member.path, member.axis) for member in group.members)
    analysis = traced.analysis
    left: dict[str, list] = {}
    for i, path in enumerate(paths):
        reason = "could lose one channel only" if i in analysis.used else "is not used"
        for a, axis in enumerate(analysis.inputs[i].axes):
            live = analysis.labels.is_live(axis.labels)
            if live and (path, a) not in grouped:
                left.setdefault(reason, []).append((path, a))
    return [Frozen(reason, "trace", "", tuple(places)) for reason, places in left.items()]


def _arrays(variables: PyTree) -> dict[str, Any]:
    """Leaves by path; raises TypeError for one that is no array."""
    leaves = trees.named_leaves(variables)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"variables hold {type(leaf).__name__} at {path!r}; give arrays only, e.g. the "
                "first part of equinox.partition(model, equinox.is_array) or the state of "
                "nnx.split(model)."
            )
    return leaves


def _trace(
    apply: Callable,
    variables: PyTree,
    inputs: tuple,
    options: dict[str, str],
    state: str = "",
) -> _Traced:
    """state: see `elastic`."""
    abstract = jax.tree.map(_abstract, inputs)
    try:
        closed, result = jax.make_jaxpr(apply, return_shape=True)(variables, *abstract)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
    ) as error:
        raise TypeError(
            f"apply cannot be traced: {type(error).__name__}. It must not branch on values or turn "
            "them into NumPy; call it in inference mode with all settings bound, e.g. "
            "functools.partial(model.apply, train=False)."
        ) from error
    paths = list(trees.named_leaves(variables))
    carried = _carried(result, paths, state) if state else {}
    inputs_only = range(len(paths), len(closed.jaxpr.invars))
    analysis = walk.analyse(closed, inputs_only, carried=carried, **options)
    groups, atoms = _groups(analysis, paths)
    tree = jax.tree.structure(result)
    return _Traced(apply, analysis, groups, atoms, _signature(variables, inputs), tree)


def _carried(result: PyTree, paths: list[str], state: str) -> dict[int, int]:
    """Numbers of the results below `state`, each with that of the variable it is the next of."""
    leaves = list(trees.named_leaves(result))
    start = f"{state}/"
    below = {path: path.removeprefix(start) for path in leaves if path.startswith(start)}
    owned = _owners(below.values(), paths)
    if not owned or len(owned) < len(below):
        raise ValueError(
            f"state is {state!r}; the results below it must have the paths of variables. Results: "
            f"{leaves[:5]}, variables: {paths[:5]}."
        )
    carried = {}
    for path, name in below.items():
        carried[leaves.index(path)] = paths.index(owned[name])
    return carried


def _struct(leaf: Any) -> Struct:
    return Struct(jnp.shape(leaf), jnp.result_type(leaf))


def _abstract(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else _struct(leaf)


def _signature(variables: PyTree, inputs: tuple) -> tuple:
    """What a trace is valid for: types of the variables, whose shapes are known; all of inputs."""
    leaves, tree = jax.tree.flatten(inputs)
    structs = tuple(map(_struct, leaves))
    types = tuple(leaf.dtype for leaf in jax.tree.leaves(variables))
    return types, structs, tree


def _groups(analysis: walk.Analysis, paths: list[str]) -> tuple[Groups, Arrays]:
    """Groups, and the labels of their channels: channels that are entries of the same axes.

    Groups and their members are in the order in which the program uses them.
    """
    places = _places(analysis, len(paths))
    entries = _entries(analysis, places)
    marks: dict[int, set] = {}
    for label, mark in analysis.labels.marks():
        marks.setdefault(label, set()).add(mark)
    clusters: dict[tuple, list[int]] = {}
    for label, at in entries.items():
        axes = tuple(k for k, _ in at)
        marked = frozenset(marks.get(label, ()))
        clusters.setdefault((axes, marked), []).append(label)
    groups: Groups = {}
    atoms: Arrays = {}
    for (axes, _), labels in clusters.items():
        inputs = {places[k][0] for k in axes}
        if len(labels) < 2 or inputs.isdisjoint(analysis.used):
            continue
        positions = np.array([entries[label] for label in labels])[:, :, 1]
        members = []
        for k in sorted(set(axes)):
            index = positions[:, np.equal(axes, k)]
            members.append(_member(analysis, paths, places[k], index))
        name = _name(members, paths, groups)
        groups[name] = Group(name, len(labels), tuple(members))
        atoms[name] = np.array(labels)
    return groups, atoms


def _places(analysis: walk.Analysis, num_variables: int) -> list[Place]:
    """All axes of the variables, the variables by their first use."""
    places = []
    for i in dict.fromkeys((*analysis.used, *range(num_variables))):
        if i < num_variables:
            places += [(i, a) for a in range(len(analysis.inputs[i].axes))]
    return places


def _entries(analysis: walk.Analysis, places: list[Place]) -> dict[int, list[Place]]:
    """(number of the place, position there) of all that dies with each label, in order of the first
    of them.
    """
    labels = analysis.labels
    entries: dict[int, list[Place]] = {}
    for k, (i, a) in enumerate(places):
        roots = labels.find(analysis.inputs[i].axes[a].labels)
        for position in np.flatnonzero(roots).tolist():
            for label in labels.parts(int(roots[position])):
                entries.setdefault(label, []).append((k, position))
    return entries


def _member(
    analysis: walk.Analysis,
    paths: list[str],
    place: Place,
    index: np.ndarray,
) -> Member:
    number, axis = place
    role = analysis.roles.get(place, "other")
    return Member(paths[number], axis, index, role, place in analysis.exposed)


def _name(members: Sequence[Member], paths: list[str], taken: Mapping) -> str:
    """Path of the first array that makes the channels, without `kernel`; made unique if need be."""
    roles = ("producer", "depthwise", "consumer", "other")

    def rank(member: Member) -> tuple[int, int]:
        return roles.index(member.role), paths.index(member.path)

    first = min(members, key=rank)
    name = ""
    if trees.is_kernel(first.path):
        name = first.path.removesuffix("/value").rpartition("/")[0]
    name = name or first.path
    with_axis = f"{name}[{first.axis}]"
    option, number = name, 1
    while option in taken:
        option = with_axis if number == 1 else f"{with_axis}.{number}"
        number += 1
    return option


def complete(channels: Channels, keep: Keep) -> Arrays:
    """`keep` with every group, checked.

    Raises ValueError for unknown groups, wrong sizes and emptied groups.
    """
    for name in keep:
        if name not in channels.groups:
            raise ValueError(f"keep names {name!r}; groups: {', '.join(channels.names)}.")
    result = {}
    for name, size in channels.sizes.items():
        kept = keep.get(name, np.ones(size, bool))
        if not hasattr(kept, "dtype"):
            kept = np.asarray(kept)
        if jnp.shape(kept) != (size,) or kept.dtype != bool:
            given = f"{kept.dtype} {jnp.shape(kept)}"
            raise ValueError(f"keep[{name!r}] is {given}; allowed: bool ({size},).")
        if not isinstance(kept, jax.core.Tracer) and not np.any(kept):
            raise ValueError(f"keep[{name!r}] keeps none of {size} channels; one must stay.")
        result[name] = kept
    return result


def _known(channels: Channels, keep: Keep) -> Arrays:
    """`complete` of what is known while tracing."""
    checked = complete(channels, keep)
    return {name: np.asarray(kept) for name, kept in checked.items()}


def _alive(channels: Channels, keep: Keep) -> ByAxis:
    """bool [size], which entries stay, by path and axis: of axes with members only."""
    alive: ByAxis = {}
    for name, group in channels.groups.items():
        for member in group.members:
            size = channels.shapes[member.path].shape[member.axis]
            stays = _stays(keep[name], member.index, size)
            axes = alive.setdefault(member.path, {})
            if member.axis in axes:
                stays = axes[member.axis] & stays
            axes[member.axis] = stays
    return alive


def _stays(kept: Any, index: np.ndarray, size: int) -> Any:
    """bool [size]: entries all of whose channels are kept; several for x[:, None] * x[None]."""
    if isinstance(kept, jax.Array):
        removed = jnp.broadcast_to(~kept[:, None], index.shape)
        return ~jnp.zeros(size, bool).at[index].max(removed)
    stays = np.ones(size, bool)
    stays[index[~kept]] = False
    return stays


def owners(tree: PyTree, channels: Channels) -> dict[str, str]:
    """Path of the variable that each leaf of `tree` belongs to.

    tree: the variables themselves, a part, or optimizer state. A leaf belongs to the variable whose
    path, whole or without its first part, ends its own. Raises ValueError if there are several.
    """
    return _owners(trees.named_leaves(tree), channels.shapes)


def _owners(paths: Iterable[str], variables: Iterable[str]) -> dict[str, str]:
    whole = {path: [path] for path in variables}
    rest: dict[str, list[str]] = {}
    for path in whole:
        rest.setdefault(path.partition("/")[2], []).append(path)
    result: dict[str, str] = {}
    for path in paths:
        fitting = _fitting(path, whole) or _fitting(path, rest)
        if len(fitting) > 1:
            several = " or ".join(fitting)
            told = "give a tree with the paths of the variables"
            raise ValueError(f"{path} may belong to {several}; {told}.")
        if fitting:
            result[path] = fitting[0]
    return result


def _fitting(path: str, known: Mapping[str, list[str]]) -> list[str]:
    """What is known of the longest end of the path of which anything is."""
    while path not in known:
        if "/" not in path:
            return []
        _, _, path = path.partition("/")
    return known[path]


def roles(tree: PyTree, channels: Channels) -> ByAxis:
    """What the traced function does with axes of each array of `tree`, by path and axis.

    `producer`: it makes channels, or `depthwise`, from one channel each; `consumer`: a matrix
    product or convolution sums over it; `window`: of a convolution. Axes in no group are told too,
    others are missing. tree: as for `mask`.
    Raises ValueError for arrays of other shapes than those traced.
    """
    traced: ByAxis = {}
    paths = list(channels.shapes)
    for (number, axis), role in channels.traced.analysis.roles.items():
        if number < len(paths):
            traced.setdefault(paths[number], {})[axis] = role
    leaves = trees.named_leaves(tree)
    result = {}
    for path, owner in owners(tree, channels).items():
        _check_shape(path, leaves[path].shape, channels.shapes[owner], "traced")
        if owner in traced:
            result[path] = traced[owner]
    return result


def _check_shape(path: str, given: Any, expected: Struct, what: str) -> None:
    if given != expected.shape:
        told = f"the {what} variables have {expected.shape} there"
        raise ValueError(f"{path} has shape {given}; {told}.")


def mask(variables: PyTree, channels: Channels, keep: Keep) -> PyTree:
    """`variables` with removed channels at zero; shapes stay, so that `keep` may be traced.

    variables: those traced, a part of them such as `params`, or a state of an optimizer, whose
    moments follow. An array belongs to the variable whose path ends its own; those that belong to
    none stay as they are.
    Raises ValueError for a tree without any, and as `complete` does.
    """

    def masked(leaf: Any, axis: int, kept: Any) -> Any:
        leaf = jnp.asarray(leaf)
        shape = [1] * leaf.ndim
        shape[axis] = -1
        return jnp.where(kept.reshape(shape), leaf, jnp.zeros((), leaf.dtype))

    return _map(masked, variables, channels, complete(channels, keep))


def compact(variables: PyTree, channels: Channels, keep: Keep) -> PyTree:
    """`variables` without removed channels, for `elastic`; arguments as for `mask`, keep known."""
    _check_tied(channels)

    def cut(leaf: Any, axis: int, kept: Any) -> Any:
        xp = np if isinstance(leaf, np.ndarray) else jnp
        return leaf if kept.all() else xp.take(leaf, np.flatnonzero(kept), axis)

    return _map(cut, variables, channels, _known(channels, keep))


def _check_tied(channels: Channels) -> None:
    if ("branches", "separate") in channels.options:
        told = "mask them; only tied ones can be compacted"
        raise ValueError(f"channels were traced with branches='separate': {told}.")


def _map(function: Callable, tree: PyTree, channels: Channels, keep: Keep) -> PyTree:
    """function(leaf, axis, kept) along all axes with members; keep: of all groups."""
    alive = _alive(channels, keep)
    owned = owners(tree, channels)
    leaves = trees.named_leaves(tree)
    arrays = [path for path, leaf in leaves.items() if jnp.ndim(leaf)]
    if arrays and not owned:
        known = list(channels.shapes)
        told = f"it has {arrays[:3]}, they have {known[:3]}"
        raise ValueError(f"no array of the tree belongs to the traced variables; {told}.")

    def of_leaf(path: str, leaf: Any) -> Any:
        owner = owned.get(path)
        if owner not in alive:
            return leaf
        _check_shape(path, jnp.shape(leaf), channels.shapes[owner], "traced")
        for axis, kept in sorted(alive[owner].items()):
            leaf = function(leaf, axis, kept)
        return leaf

    return trees.map_named(of_leaf, tree)


def compact_shapes(channels: Channels, keep: Keep) -> dict[str, Struct]:
    """Shapes of the compact variables, by path."""
    alive = _alive(channels, _known(channels, keep))
    result = {}
    for path, full in channels.shapes.items():
        sizes = list(full.shape)
        for axis, kept in alive.get(path, {}).items():
            sizes[axis] = int(kept.sum())
        result[path] = Struct(tuple(sizes), full.dtype)
    return result


def elastic(apply: Callable, channels: Channels, keep: Keep, *, state: str = "") -> Callable:
    """`function(compact_variables, *inputs)`: what `apply` computes with masked variables.

    The traced program is evaluated at the smaller sizes, so it is exact wherever masking is, for
    any framework, under jit, grad and vmap; sizes written in the code of `apply` need no change,
    and random numbers (dropout) are those of the full size. Other input shapes or types than those
    traced (another batch size, bfloat16) are traced once more, and so is an `apply` that is not the
    one traced, such as that of training; it must have the same groups.
    state: path among the results of arrays with the names of variables, such as "1" if `apply`
    returns (logits, running statistics): they lose the channels of these variables, too. All other
    results have their full size.
    Hand-written derivatives (`jax.custom_jvp`, `custom_vjp`) stay. Raises ValueError for one that
    sums over channels which its function keeps apart, for variables of other shapes than `compact`
    gives, and for a `state` that holds other arrays.
    """
    _check_tied(channels)
    keep = _known(channels, keep)
    expected, first = compact_shapes(channels, keep), channels.traced
    traces = {first.signature: first} if apply == first.apply and not state else {}

    def function(variables: PyTree, *inputs: PyTree) -> PyTree:
        leaves = trees.named_leaves(variables)
        for path, struct in expected.items():
            _check_shape(path, getattr(leaves.get(path), "shape", None), struct, "compact")
        if more := sorted(leaves.keys() - expected.keys()):
            raise ValueError(f"{more[0]} is no array of the compact variables.")
        key = _signature(variables, inputs)
        if key not in traces:
            traces[key] = _anew(apply, variables, inputs, channels, state)
        traced = traces[key]
        arrays = [*leaves.values(), *jax.tree.leaves(inputs)]
        outs = execute.run(traced.analysis, traced.alive(keep), arrays)
        return jax.tree.unflatten(traced.tree, outs)

    return function


def _anew(
    apply: Callable,
    variables: PyTree,
    inputs: tuple,
    channels: Channels,
    state: str,
) -> _Traced:
    """Another trace with the same groups, or ValueError. variables: compact."""
    leaves, tree = jax.tree.flatten(variables)
    full = []
    for traced, leaf in zip(channels.shapes.values(), leaves, strict=True):
        full.append(Struct(traced.shape, leaf.dtype))
    options = dict(channels.options)
    again = _trace(apply, jax.tree.unflatten(tree, full), inputs, options, state)
    if _content(again.groups) != _content(channels.groups):
        raise ValueError("this function has other channel groups here: trace it anew.")
    return again


def _content(groups: Groups) -> list:
    """What makes groups equal."""
    content = []
    for group in groups.values():
        for member in group.members:
            entries = member.index.tolist()
            content.append((group.name, member.path, member.axis, entries))
    return content


def teach(primitive: str, rule: rules.Rule, *, resize: execute.Resize | None = None) -> None:
    """Makes traces understand a primitive; docs/teach_a_primitive.md has examples.

    rule: rule(walk, eqn, ins) -> [Value, ...], what is known of the results from what is known of
    the operands. resize: resize(sizes) -> parameters that change at the smaller sizes; None if the
    primitive has no sizes among its parameters.
    Raises ValueError for a primitive with programs inside, which the walk enters itself.
    """
    if primitive in walk.INNER:
        raise ValueError(f"{primitive!r} runs programs inside; it cannot have another rule.")
    rules.RULES[primitive] = rule
    execute.RESIZES.pop(primitive, None)
    if resize is not None:
        execute.RESIZES[primitive] = resize


def order_of_use(function: Callable, tree: PyTree) -> list[str]:
    """Paths of all leaves of `tree` by their first use in `function(tree)`; unused ones first.

    Of a network's parameters it is the order of its modules. Leaves: arrays or shape structs;
    nothing is computed.
    """
    paths = list(trees.named_leaves(tree))
    used = [paths[number] for number in walk.read(function, tree).used]
    return [path for path in paths if path not in used] + used


def random_keep(channels: Channels, key: jax.Array, density: float = 0.6) -> dict[str, np.ndarray]:
    """A random choice that keeps about `density` of every group's channels, at least one."""
    result = {}
    for i, (name, group) in enumerate(channels.groups.items()):
        group_key = jax.random.fold_in(key, i)
        draws = np.asarray(jax.random.uniform(group_key, (group.size,)))
        result[name] = (draws < density) | (draws == draws.min())
    return result


def check(
    apply: Callable,
    variables: PyTree,
    channels: Channels,
    *inputs: PyTree,
    key: jax.Array,
) -> float:
    """Largest difference of masked and compact results at a random `keep`, over the largest result.

    About 1e-6 in float32; anything much larger means that the function does something at run time
    that its trace does not show. Worth a second before a long run.
    """
    keep = random_keep(channels, key)
    anew = lambda *args: apply(*args)  # jax would not trace the same function twice
    masked = jax.jit(anew)(mask(variables, channels, keep), *inputs)
    small = compact(variables, channels, keep)
    compacted = jax.jit(elastic(apply, channels, keep))(small, *inputs)
    first, second = map(_flat, (masked, compacted))
    differ = first != second  # infinities may be equal
    errors = np.abs(first[differ] - second[differ])
    finite = np.abs(first[np.isfinite(first)])
    worst, scale = np.max(errors, initial=0.0), np.max(finite, initial=0.0)
    return float(worst / scale if scale else worst)


def _flat(tree: PyTree) -> np.ndarray:
    """All entries, in a type that no other exceeds."""
    leaves = jax.tree.leaves(tree)
    leaves = list(map(np.asarray, leaves))
    kind = float if all(map(np.isrealobj, leaves)) else complex
    return np.concatenate([leaf.ravel().astype(kind) for leaf in leaves])


def describe(channels: Channels) -> str:
    """The groups and what was frozen, as text."""
    total = sum(channels.sizes.values())
    lines = [f"{len(channels.groups)} groups, {total} channels"]
    for group in channels.groups.values():
        lines.append(f"{group.name}: {group.size} channels")
        for member in group.members:
            copies = member.index.shape[1]
            times = f" x {copies}" if copies > 1 else ""
            place = f"{member.path} axis {member.axis}"
            lines.append(f"    {place}{times} ({member.role})")
    if channels.frozen:
        lines.append("kept whole:")
    lines += [f"    {_places_text(event)}: {_reason_text(event)}" for event in channels.frozen]
    return "\n".join(lines)


def _places_text(event: Frozen) -> str:
    shown = [f"{path} axis {axis}" for path, axis in event.members[:3]]
    text = ", ".join(shown)
    more = len(event.members) - len(shown)
    return f"{text} and {more} more" if more else text


def _reason_text(event: Frozen) -> str:
    if event.primitive in ("output", "trace"):  # the axes themselves
        return event.reason
    place = f" at {event.source}" if event.source else ""
    return f"{event.primitive}{place} {event.reason}"


def layout(channels: Channels) -> dict[str, Any]:
    """The groups as plain data, for `report.channels.group_figure`.

    kernels: paths of the arrays that make or read channels, in order of use. groups: by name the
    size and, by role, positions of the members among the kernels; other arrays are half a step
    behind the kernel used before them.
    """
    paths = list(channels.shapes)
    analysis = channels.traced.analysis
    kernels = {paths[i] for i, _ in analysis.roles if i < len(paths)}
    position: dict[str, float] = {}
    in_order: list[str] = []
    for i in analysis.used:
        if i >= len(paths):
            continue
        if paths[i] in kernels:
            in_order.append(paths[i])
        behind = 1 if paths[i] in kernels else 0.5
        position[paths[i]] = len(in_order) - behind
    layouts = {}
    for name, group in channels.groups.items():
        marks: dict[str, set[float]] = {}
        for member in group.members:
            if member.path in position:
                marks.setdefault(member.role, set()).add(position[member.path])
        ordered = {role: sorted(marks[role]) for role in sorted(marks)}
        layouts[name] = dict(size=group.size, marks=ordered)
    return dict(kernels=in_order, groups=layouts)
