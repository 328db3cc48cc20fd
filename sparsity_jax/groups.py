"""Channels of any JAX function that live or die together, derived from its jaxpr: trace, mask, compact, run.

    channels = groups.trace(model.apply, variables, images)
    print(groups.describe(channels))
    keep = {name: scores[name] > threshold for name in channels.names}         # bool [channels] of every group
    logits = model.apply(groups.mask(variables, channels, keep), images)       # shapes unchanged, keep may be traced
    small = groups.compact(variables, channels, keep)                          # removed channels cut out, once
    logits = groups.elastic(model.apply, channels, keep)(small, images)        # the same function on smaller arrays

Linen, NNX, Equinox and hand-written functions work alike: `apply(variables, *inputs)` must be traceable and its
variables a pytree of arrays. A group is data: which entries of which axes of which arrays belong to each channel. What
the analysis cannot follow stays whole and is listed in `channels.frozen`, never guessed. `flow` has the rules.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import flow, trees

PyTree = Any
Keep = Mapping[str, Any]  # bool [channels] by name of group; a group left out keeps all


class Member(NamedTuple):
    """One axis of one array of the variables, and where on it each channel of a group is."""

    path: str  # e.g. params/conv1/kernel
    axis: int
    index: np.ndarray  # int [channels, copies]
    role: str  # producer: a kernel's outputs; consumer: its inputs; depthwise: both; other: biases, norms
    exposed: bool = False  # a consumer of what is not zero where other members are, e.g. behind a sigmoid


class Group(NamedTuple):
    """Channels that can be removed, each with all its members."""

    name: str
    size: int
    members: tuple[Member, ...]


class Frozen(NamedTuple):
    """An operation that keeps axes of the variables whole."""

    reason: str
    primitive: str
    source: str  # module path and first line of user code
    members: tuple[tuple[str, int], ...]  # (path, axis)


class Channels(NamedTuple):
    """What `trace` finds: data only, except for the analysis that `elastic` runs on."""

    groups: dict[str, Group]
    frozen: tuple[Frozen, ...]
    shapes: dict[str, jax.ShapeDtypeStruct]  # of the full variables, by path
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
    analysis: flow.Analysis
    atoms: dict[str, np.ndarray]  # label of every channel, by name of group
    signature: tuple  # of the arguments it was traced for
    tree: Any  # of the results

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and types of the inputs it was traced for."""
        return self.signature[1]


def trace(
    apply: Callable,
    variables: PyTree,
    *inputs: PyTree,
    sums: Literal["allow", "freeze"] = "allow",
    branches: Literal["tied", "separate"] = "tied",
) -> Channels:
    """Groups of coupled channels of `apply(variables, *inputs)`, in its inference mode; nothing is computed.

    variables, inputs: arrays or shape structs. Axes of inputs and results are never removed, nor are integer arrays.
    sums: `freeze` keeps axes whole that are summed up without weights (the width of a layer norm): a module built anew
    at the smaller width would divide by another number. `elastic` runs the traced program, for which `allow` is exact.
    branches: `separate` lets the two sides of a skip connection be masked one by one, as the gradient-flow original
    does; such channels cannot be compacted.
    Raises TypeError for an apply that cannot be traced and for variables that are no arrays.
    """
    for name, value, known in (("sums", sums, ("allow", "freeze")), ("branches", branches, ("tied", "separate"))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; allowed: {known[0]!r} or {known[1]!r}.")
    leaves, shapes = _shapes(variables)
    traced = _trace(apply, variables, inputs, dict(sums=sums, branches=branches))
    found = _groups(traced.analysis, list(leaves))
    atoms = {name: labels for name, (_, labels) in found.items()}
    paths = list(leaves)
    frozen = []
    for event in traced.analysis.events:
        members = tuple((paths[i], a) for i, a in event.axes if i < len(paths))
        if members:
            frozen.append(Frozen(event.reason, event.primitive, event.source, members))
    grouped = {name: group for name, (group, _) in found.items()}
    frozen += _left(traced.analysis, paths, grouped)
    options = (("sums", sums), ("branches", branches))
    return Channels(grouped, tuple(frozen), shapes, traced._replace(atoms=atoms), options)


def _left(analysis: flow.Analysis, paths: list[str], groups: dict[str, Group]) -> list[Frozen]:
    """Axes that nothing froze but that are in no group."""
    grouped = {(member.path, member.axis) for group in groups.values() for member in group.members}
    left: dict[str, list] = {}
    for i, path in enumerate(paths):
        for a, axis in enumerate(analysis.inputs[i].labels):
            if (path, a) not in grouped and analysis.labels.is_live(axis):
                reason = "could lose one channel only" if i in analysis.used else "is not used"
                left.setdefault(reason, []).append((path, a))
    return [Frozen(reason, "trace", "", tuple(places)) for reason, places in left.items()]


def _shapes(variables: PyTree) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    leaves = trees.named_leaves(variables)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"variables hold {type(leaf).__name__} at {path!r}; give arrays only, e.g. the first part of "
                "equinox.partition(model, equinox.is_array) or the state of nnx.split(model)."
            )
    return leaves, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}


def _trace(apply: Callable, variables: PyTree, inputs: tuple, options: dict[str, str]) -> _Traced:
    abstract = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else _struct(leaf), inputs)
    try:
        closed, result = jax.make_jaxpr(apply, return_shape=True)(variables, *abstract)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
    ) as error:
        raise TypeError(
            f"apply cannot be traced: {type(error).__name__}. It must not branch on values or turn them into NumPy; "
            "call it in inference mode with all settings bound, e.g. functools.partial(model.apply, train=False)."
        ) from error
    num = len(jax.tree.leaves(variables))
    frozen = range(num, len(closed.jaxpr.invars))
    analysis = flow.analyse(closed, frozen, **options)
    return _Traced(apply, analysis, {}, _signature(variables, inputs), jax.tree.structure(result))


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _signature(variables: PyTree, inputs: tuple) -> tuple:
    """What a trace is valid for: the types of the variables, whose shapes are known, and all of the inputs."""
    leaves, tree = jax.tree.flatten(inputs)
    return tuple(leaf.dtype for leaf in jax.tree.leaves(variables)), tuple(map(_struct, leaves)), tree


def _groups(analysis: flow.Analysis, paths: list[str]) -> dict[str, tuple[Group, np.ndarray]]:
    """Groups and the labels of their channels, by name: channels that are the same entries of the same axes.

    Groups and their members are in the order in which the program uses them.
    """
    order = [i for i in dict.fromkeys((*analysis.used, *range(len(paths)))) if i < len(paths)]
    places = [(i, a) for i in order for a in range(len(analysis.inputs[i].labels))]
    marks: dict[int, set] = {}
    for label, mark in analysis.labels.marks():
        marks.setdefault(label, set()).add(mark)
    clusters: dict[tuple, list[tuple[int, np.ndarray]]] = {}
    for label, place, position in _entries(analysis, places):
        key = (place.tobytes(), frozenset(marks.get(label, ())))
        clusters.setdefault(key, []).append((label, place, position))
    result: dict[str, tuple[Group, np.ndarray]] = {}
    for found in clusters.values():
        atoms, place = np.array([label for label, _, _ in found]), found[0][1]
        if len(atoms) < 2 or not any(places[k][0] in analysis.used for k in place.tolist()):
            continue
        positions, members = np.stack([position for _, _, position in found]), []
        for k in np.unique(place).tolist():
            i, a = places[k]
            role, exposed = analysis.roles.get((i, a), "other"), (i, a) in analysis.exposed
            members.append(Member(paths[i], a, positions[:, place == k], role, exposed))
        name = _name(members, paths, result)
        result[name] = (Group(name, len(atoms), tuple(members)), atoms)
    return result


def _entries(analysis: flow.Analysis, places: list) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(label, number in `places`, position) of all entries that die with each label, in order of the first of them."""
    labels, rows = analysis.labels, []
    for k, (i, a) in enumerate(places):
        found = labels.find(analysis.inputs[i].labels[a])
        position = np.flatnonzero(found)
        parts = [labels.parts(label) for label in found[position].tolist()]
        position = np.repeat(position, [len(own) for own in parts])
        rows.append(np.stack([[part for own in parts for part in own], np.full(len(position), k), position]))
    label, place, position = np.concatenate([np.zeros((3, 0), int), *rows], axis=1).astype(int)
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.diff(label[order], prepend=-1))
    pieces = sorted(np.split(order, starts[1:]) if len(order) else [], key=lambda piece: piece[0])
    return [(int(label[piece[0]]), place[piece], position[piece]) for piece in pieces]


def _name(members: Sequence[Member], paths: list[str], taken: Mapping) -> str:
    """Path of the first array that makes the channels, without `kernel`; with its axis, or a number, if need be."""
    roles = ("producer", "depthwise", "consumer", "other")
    first = min(members, key=lambda m: (roles.index(m.role), paths.index(m.path)))
    name = first.path.removesuffix("/value").rpartition("/")[0] if trees.is_kernel(first.path) else ""
    name = name or first.path
    options = itertools.chain(
        (name, f"{name}[{first.axis}]"), (f"{name}[{first.axis}].{i}" for i in itertools.count(2))
    )
    return next(option for option in options if option not in taken)


def complete(channels: Channels, keep: Keep) -> dict[str, Any]:
    """`keep` with every group, checked: raises ValueError for unknown groups, wrong sizes and emptied groups."""
    unknown = sorted(set(keep) - set(channels.groups))
    if unknown:
        raise ValueError(f"keep names {unknown[0]!r}; groups: {', '.join(channels.names)}.")
    result = {}
    for name, group in channels.groups.items():
        own = keep.get(name)
        own = np.ones(group.size, bool) if own is None else own if hasattr(own, "dtype") else np.asarray(own)
        if jnp.shape(own) != (group.size,) or own.dtype != bool:
            raise ValueError(f"keep[{name!r}] is {own.dtype} {jnp.shape(own)}; allowed: bool ({group.size},).")
        if not isinstance(own, jax.core.Tracer) and not np.any(own):
            raise ValueError(f"keep[{name!r}] keeps none of {group.size} channels; at least one must stay.")
        result[name] = own
    return result


def _alive(channels: Channels, keep: Keep) -> dict[str, list[tuple[int, Any]]]:
    """(axis, bool of its length: which entries stay), by path: of axes with members only."""
    numpy = not any(isinstance(own, jax.Array) for own in keep.values())
    xp = np if numpy else jnp
    found: dict[str, dict[int, Any]] = {}
    for name, group in channels.groups.items():
        for member in group.members:
            size = channels.shapes[member.path].shape[member.axis]
            own = xp.append(keep[name], True)[_channels_of(member.index, size)].all(1)
            axes = found.setdefault(member.path, {})
            axes[member.axis] = axes[member.axis] & own if member.axis in axes else own
    return {path: sorted(axes.items()) for path, axes in found.items()}


def _channels_of(index: np.ndarray, size: int) -> np.ndarray:
    """int [size, most]: the channels that each entry belongs to, several for those of x[:, None] * x[None]; filled up
    with the number of channels."""
    entry, channel = index.ravel(), np.repeat(np.arange(len(index)), index.shape[1])
    order = np.argsort(entry, kind="stable")
    entry, channel = entry[order], channel[order]
    rank = np.arange(len(entry)) - np.searchsorted(entry, entry)
    channels = np.full((size, rank.max() + 1), len(index))
    channels[entry, rank] = channel
    return channels


def owners(tree: PyTree, channels: Channels) -> dict[str, str]:
    """Path of the variable that each leaf of `tree` belongs to: the variables themselves, a part, or optimizer state.

    A leaf belongs to the variable whose path, whole or without its first part, ends its own. Raises ValueError if
    there are several.
    """
    whole, rest = {path: [path] for path in channels.shapes}, {}
    for path in channels.shapes:
        rest.setdefault(path.partition("/")[2], []).append(path)
    result: dict[str, str] = {}
    for path in trees.named_leaves(tree):
        parts = path.split("/")
        ends = ["/".join(parts[i:]) for i in range(len(parts))]
        fitting = next((known[end] for known in (whole, rest) for end in ends if end in known), [])
        if len(fitting) > 1:
            raise ValueError(
                f"{path} may belong to {' or '.join(fitting)}; give a tree with the paths of the variables."
            )
        if fitting:
            result[path] = fitting[0]
    return result


def roles(tree: PyTree, channels: Channels) -> dict[str, dict[int, str]]:
    """What the traced function does with the axes of each array of `tree`, by path and axis; also of axes in no group.

    `producer`: it makes channels, or `depthwise`, from one channel each; `consumer`: a matrix product or convolution
    sums over it; `window`: of a convolution. Other axes are missing. tree: as for `mask`.
    Raises ValueError for arrays of other shapes than those traced.
    """
    traced: dict[str, dict[int, str]] = {}
    paths = list(channels.shapes)
    for (number, axis), role in channels.traced.analysis.roles.items():
        if number < len(paths):
            traced.setdefault(paths[number], {})[axis] = role
    leaves = trees.named_leaves(tree)
    owned = owners(tree, channels)
    for path, owner in owned.items():
        given, expected = leaves[path].shape, channels.shapes[owner].shape
        if given != expected:
            raise ValueError(f"{path} has shape {given}; the traced variables have {expected} there.")
    return {path: traced[owner] for path, owner in owned.items() if owner in traced}


def mask(variables: PyTree, channels: Channels, keep: Keep) -> PyTree:
    """`variables` with removed channels at zero; shapes stay, so that `keep` may be traced.

    variables: those traced, a part of them such as `params`, or a state of an optimizer, whose moments follow. An array
    belongs to the variable whose path ends its own; those that belong to none stay as they are.
    Raises ValueError for a tree without any, and as `complete` does.
    """
    alive = _alive(channels, complete(channels, keep))

    def one(path: str, leaf: Any, axes: list[tuple[int, Any]]) -> Any:
        del path
        leaf = jnp.asarray(leaf) if axes else leaf
        for axis, kept in axes:
            shape = [1] * leaf.ndim
            shape[axis] = -1
            leaf = jnp.where(kept.reshape(shape), leaf, jnp.zeros((), leaf.dtype))
        return leaf

    return _map(one, variables, channels, alive)


def compact(variables: PyTree, channels: Channels, keep: Keep) -> PyTree:
    """`variables` without removed channels, for `elastic`; takes what `mask` takes, with `keep` known."""
    _check_tied(channels)
    alive = _alive(channels, {name: np.asarray(own) for name, own in complete(channels, keep).items()})

    def one(path: str, leaf: Any, axes: list[tuple[int, Any]]) -> Any:
        del path
        for axis, kept in axes:
            if not kept.all():
                leaf = (np if isinstance(leaf, np.ndarray) else jnp).take(leaf, np.flatnonzero(kept), axis)
        return leaf

    return _map(one, variables, channels, alive)


def _check_tied(channels: Channels) -> None:
    if ("branches", "separate") in channels.options:
        raise ValueError("channels were traced with branches='separate': mask them; only tied ones can be compacted.")


def _map(function: Callable, tree: PyTree, channels: Channels, alive: Mapping) -> PyTree:
    owned = owners(tree, channels)
    if not owned and any(jnp.ndim(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"no array of the tree belongs to the traced variables; it has {list(trees.named_leaves(tree))[:3]}, they "
            f"have {list(channels.shapes)[:3]}."
        )

    def one(path: str, leaf: Any) -> Any:
        axes = alive.get(owned.get(path), [])
        shape = channels.shapes[owned[path]].shape if axes else ()
        if axes and jnp.shape(leaf) != shape:
            raise ValueError(f"{path} has shape {jnp.shape(leaf)}; the traced variables have {shape} there.")
        return function(path, leaf, axes)

    return trees.map_named(one, tree)


def compact_shapes(channels: Channels, keep: Keep) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the compact variables, by path."""
    alive = _alive(channels, {name: np.asarray(own) for name, own in complete(channels, keep).items()})
    result = {}
    for path, full in channels.shapes.items():
        sizes = list(full.shape)
        for axis, kept in alive.get(path, []):
            sizes[axis] = int(kept.sum())
        result[path] = jax.ShapeDtypeStruct(tuple(sizes), full.dtype)
    return result


def elastic(apply: Callable, channels: Channels, keep: Keep) -> Callable:
    """`function(compact_variables, *inputs)`: what `apply` computes with masked variables, on the compact ones.

    The traced program is evaluated at the smaller sizes, so it is exact wherever masking is, for any framework, under
    jit, grad and vmap; sizes written in the code of `apply` need no change, and random numbers (dropout) are those of
    the full size. Other input shapes or types than those traced (another batch size, bfloat16) are traced once more,
    and so is an `apply` that is not the one traced, such as that of training; it must have the same groups.
    Hand-written derivatives (`jax.custom_jvp`, `custom_vjp`) stay. Raises ValueError for one that sums over channels
    which its function keeps apart, and for variables of other shapes than `compact` gives.
    """
    _check_tied(channels)
    keep = {name: np.asarray(own) for name, own in complete(channels, keep).items()}
    expected, first = compact_shapes(channels, keep), channels.traced
    analyses = {first.signature: first} if apply == first.apply else {}
    options = dict(channels.options)

    def function(variables: PyTree, *inputs: PyTree) -> PyTree:
        leaves = trees.named_leaves(variables)
        for path, struct in expected.items():
            shape = getattr(leaves.get(path), "shape", None)
            if shape != struct.shape:
                raise ValueError(f"{path} has shape {shape}; the compact variables have {struct.shape} there.")
        if more := sorted(leaves.keys() - expected.keys()):
            raise ValueError(f"{more[0]} is no array of the compact variables.")
        key = _signature(variables, inputs)
        if key not in analyses:
            shapes = [jax.ShapeDtypeStruct(channels.shapes[path].shape, leaf.dtype) for path, leaf in leaves.items()]
            full = jax.tree.unflatten(jax.tree.structure(variables), shapes)
            traced = _trace(apply, full, inputs, options)
            found = _groups(traced.analysis, list(channels.shapes))
            if not _same({name: group for name, (group, _) in found.items()}, channels.groups):
                raise ValueError("this function has other channel groups with these inputs: trace it anew.")
            analyses[key] = traced._replace(atoms={name: atoms for name, (_, atoms) in found.items()})
        traced = analyses[key]
        removed = {int(label) for name, atoms in traced.atoms.items() for label in atoms[~keep[name]]}
        outs = flow.run(traced.analysis, removed, [*leaves.values(), *jax.tree.leaves(inputs)])
        return jax.tree.unflatten(traced.tree, outs)

    return function


def _same(first: Mapping[str, Group], second: Mapping[str, Group]) -> bool:
    equal = lambda a, b: a[:2] == b[:2] and np.array_equal(a.index, b.index)
    return list(first) == list(second) and all(
        len(first[name].members) == len(group.members) and all(map(equal, first[name].members, group.members))
        for name, group in second.items()
    )


def random_keep(channels: Channels, key: jax.Array, density: float = 0.6) -> dict[str, np.ndarray]:
    """A random choice that keeps about `density` of every group's channels, at least one."""
    result = {}
    for i, (name, group) in enumerate(channels.groups.items()):
        draws = np.asarray(jax.random.uniform(jax.random.fold_in(key, i), (group.size,)))
        result[name] = (draws < density) | (draws == draws.min())
    return result


def check(apply: Callable, variables: PyTree, channels: Channels, *inputs: PyTree, key: jax.Array) -> float:
    """Largest difference between masked and compact results at a random `keep`, relative to the largest result.

    About 1e-6 in float32; anything much larger means that the function does something at run time that its trace does
    not show. Worth a second before a long run.
    """
    keep = random_keep(channels, key)
    anew = lambda *args: apply(*args)  # jax would not trace the same function twice
    masked = jax.jit(anew)(mask(variables, channels, keep), *inputs)
    small = jax.jit(elastic(apply, channels, keep))(compact(variables, channels, keep), *inputs)
    scale = worst = 0.0
    for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(small), strict=True):
        a, b = (np.asarray(leaf, np.complex128 if np.iscomplexobj(leaf) else np.float64) for leaf in (a, b))
        differ = a != b  # infinities may be equal
        scale = np.maximum(scale, np.max(np.abs(a), where=np.isfinite(a), initial=0.0))
        worst = np.maximum(worst, np.max(np.abs(a[differ] - b[differ]), initial=0.0))
    return float(worst / scale if scale else worst)


def describe(channels: Channels) -> str:
    """The groups and what was frozen, as text."""
    lines = [f"{len(channels.groups)} groups, {sum(channels.sizes.values())} channels"]
    for group in channels.groups.values():
        lines.append(f"{group.name}: {group.size} channels")
        for member in group.members:
            copies = member.index.shape[1]
            times = f" x {copies}" if copies > 1 else ""
            lines.append(f"    {member.path} axis {member.axis}{times} ({member.role})")
    if channels.frozen:
        lines.append("kept whole:")
    for event in channels.frozen:
        axes = ", ".join(f"{path} axis {axis}" for path, axis in event.members[:3])
        more = f" and {len(event.members) - 3} more" if len(event.members) > 3 else ""
        where = f" at {event.source}" if event.source else ""
        what = "" if event.primitive in ("output", "trace") else f"{event.primitive}{where} "  # the axes themselves
        lines.append(f"    {axes}{more}: {what}{event.reason}")
    return "\n".join(lines)


def layout(channels: Channels) -> dict[str, Any]:
    """The groups as plain data, for `report.channels.group_figure`.

    kernels: paths of the arrays that make or read channels, in order of use. groups: by name the size and, by role,
    positions of the members among the kernels; other arrays are half a step behind the kernel used before them.
    """
    paths, analysis = list(channels.shapes), channels.traced.analysis
    used = [paths[i] for i in analysis.used if i < len(paths)]
    kernels = {paths[i] for i, _ in analysis.roles if i < len(paths)}
    count = dict(zip(used, itertools.accumulate(path in kernels for path in used)))
    found: dict[str, Any] = {}
    for name, group in channels.groups.items():
        marks: dict[str, set[float]] = {}
        for member in group.members:
            if member.path in count:
                position = count[member.path] - (1 if member.path in kernels else 0.5)
                marks.setdefault(member.role, set()).add(position)
        found[name] = dict(size=group.size, marks={role: sorted(marks[role]) for role in sorted(marks)})
    return dict(kernels=[path for path in used if path in kernels], groups=found)
