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

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from sparsity_jax import tables, trees
from sparsity_jax.channels import carried, execute, grouping, resized, rules, unstack, walk
from sparsity_jax.channels.grouping import Group, Groups, Member
from sparsity_jax.channels.labels import FROZEN
from sparsity_jax.types import Arrays, Fields, PyTree

__all__ = [
    "Branches",
    "Channels",
    "Group",
    "Keep",
    "Member",
    "Members",
    "State",
    "Struct",
    "Sums",
    "Unstacked",
    "check",
    "compact",
    "compact_shapes",
    "complete",
    "describe",
    "elastic",
    "layout",
    "mask",
    "masked",
    "order_of_use",
    "owners",
    "random_keep",
    "roles",
    "teach",
    "trace",
    "unstacked",
]

Struct = jax.ShapeDtypeStruct
Branches = Literal["tied", "separate"]
Sums = Literal["frozen", "zeroed"]
Keep = Mapping[str, Any]  # bool [channels] by name of group; a group left out keeps all
State = str | Mapping[str, str] | None  # which results are new values of variables, see `trace`
Members = list[tuple[str, Member]]  # each with the name of its group


class Channels(NamedTuple):
    """What `trace` finds: data, and the walked program that `elastic` runs."""

    groups: Groups
    frozen: list[walk.Frozen]  # operations that keep axes of the variables whole, by path
    shapes: dict[str, Struct]  # by path, of the full variables
    apply: Callable
    walked: walk.Walk
    signature: tuple  # of the arguments it was traced for
    variables: Any  # their tree
    results: Any  # their tree
    branches: Branches
    sums: Sums
    state: carried.Places  # results that are new values of variables

    @property
    def names(self) -> list[str]:
        """Names of all groups."""
        return list(self.groups)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of channels of each group, by name."""
        return {name: group.size for name, group in self.groups.items()}

    @property
    def members(self) -> Members:
        """(name of its group, member) of all groups."""
        groups = self.groups.items()
        return [(name, member) for name, group in groups for member in group.members]

    @property
    def used(self) -> list[str]:
        """Paths of the variables that the program uses, in order."""
        return self.walked.used.of(self.shapes)

    @property
    def inputs(self) -> Fields:
        """What the walk knows of each variable, by path."""
        return dict(zip(self.shapes, self.walked.inputs))

    def find_groups(self) -> None:
        """Adds the groups."""
        found = grouping.find(self.walked, self.inputs, self.used)
        self.groups.update(found)

    def alive(self, keep: Keep) -> execute.Alive:
        """Which entries of the program stay; raises as `complete` does. keep: not traced."""
        removed = np.zeros(self.walked.labels.num, bool)
        for name, kept in complete(self, keep).items():
            gone = ~np.asarray(kept)
            labels = self.groups[name].labels[gone]
            removed[labels] = True
        return execute.Alive(self.walked.labels, removed, self.walked.zeroes)

    def zeroing(self, keep: Keep) -> execute.Zeroing:
        """The same, where keep may be traced and entries are made zero in place of removed."""
        removed = jnp.zeros(self.walked.labels.num, bool)
        for name, kept in complete(self, keep).items():
            labels = self.groups[name].labels
            removed = removed.at[labels].set(~jnp.asarray(kept))
        return execute.Zeroing(self.walked.labels, removed, self.walked.zeroes)


def trace(
    apply: Callable,
    variables: PyTree,
    *inputs: PyTree,
    branches: Branches = "tied",
    sums: Sums = "frozen",
    state: State = None,
) -> Channels:
    """Groups of coupled channels of `apply(variables, *inputs)`, in its inference mode.

    variables, inputs: arrays or shape structs; nothing is computed. Axes of inputs and results are
    never removed, nor are integer arrays. Sizes of inputs may be symbolic (`jax.export`).
    branches: `separate` lets the two sides of a skip connection be masked one by one, as the
    gradient-flow original does; such channels cannot be compacted.
    sums: `zeroed` finds more groups: those whose removed entries are summed over when they are not
    zero, as by a layer norm that subtracts the mean before it squares. Setting variables to zero is
    not enough for these: `masked` runs the function without them, `mask` refuses them.
    state: which results are new values of variables, such as running statistics; they lose the
    channels of these variables. By default those are recognised that have, below some path, the
    names, shapes and types of all variables below another, and are computed from these; they are in
    `channels.state` and in what `describe` tells. Others can be named: "1" if the second result has
    the names of variables; `{"1": "2"}` if those are at another path or have numbers for names, as
    in the lists of Keras; `{}` if there are none.
    Raises TypeError for an apply that cannot be traced and for variables that are no arrays, and
    ValueError for a `state` that names no such results or variables, or some of other shapes.
    """
    tables.convert(branches, Branches, "branches")
    tables.convert(sums, Sums, "sums")
    channels = _traced(apply, variables, inputs, branches, sums, state)
    channels.find_groups()
    walked = channels.walked
    left = grouping.left_over(walked, channels.inputs, channels.used, channels.groups)
    channels.frozen.extend(left)
    return channels


def _traced(
    apply: Callable,
    variables: PyTree,
    inputs: tuple,
    branches: Branches,
    sums: Sums,
    state: State,
) -> Channels:
    """What `trace` finds, without the groups."""
    leaves = trees.named_leaves(variables)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"variables hold {type(leaf).__name__} at {path!r}; give arrays only, e.g. the "
                "first part of equinox.partition(model, equinox.is_array) or the state of "
                "nnx.split(model)."
            )
    closed, result = _jaxpr(apply, variables, inputs)
    walked = walk.analyse(closed, leaves, branches=branches, zeroes=sums == "zeroed")
    ends = carried.leaves_of(result)
    starts = carried.leaves_of(variables)
    if state is None:
        places = carried.recognised(walked, ends, starts)
    else:
        places = carried.declared(state, ends, starts)
    walk.end(walked, carried.numbers(places, ends, starts))
    return Channels(
        {},
        walked.events,
        {path: _struct(leaf) for path, leaf in leaves.items()},
        apply,
        walked,
        _signature(leaves, inputs),
        jax.tree.structure(variables),
        jax.tree.structure(result),
        branches,
        sums,
        places,
    )


def _jaxpr(apply: Callable, variables: PyTree, inputs: tuple) -> tuple[Any, PyTree]:
    """(closed jaxpr, shapes of the results); raises TypeError if apply cannot be traced."""
    abstract = jax.tree.map(_abstract, inputs)
    try:
        return jax.make_jaxpr(apply, return_shape=True)(variables, *abstract)
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


def _struct(leaf: Any) -> Struct:
    return Struct(jnp.shape(leaf), jnp.result_type(leaf))


def _abstract(leaf: Any) -> Any:
    if hasattr(leaf, "dtype"):
        return leaf
    return _struct(leaf)


def _signature(variables: Fields, inputs: tuple) -> tuple:
    """What a trace is valid for: types of the variables, whose shapes are known; all of inputs."""
    leaves, tree = jax.tree.flatten(inputs)
    types = [leaf.dtype for leaf in variables.values()]
    structs = map(_struct, leaves)
    return tuple(types), tuple(structs), tree


class Unstacked(NamedTuple):
    """A function whose layers have arrays of their own, where one array held those of all."""

    apply: Callable  # apply(variables, *inputs)
    variables: PyTree
    restack: Callable  # restack(variables): the tree with stacked arrays


def unstacked(
    apply: Callable, variables: PyTree, *inputs: PyTree, state: State = None
) -> Unstacked:
    """`apply` with its scans over layers run layer by layer, so that each layer may lose channels
    of its own.

        apply, variables, restack = groups.unstacked(apply, variables, *inputs)
        channels = groups.trace(apply, variables, *inputs)

    Every array of the variables that scans take apart, and that nothing else reads, becomes a list
    with one array per layer: `params/layers/up/kernel` becomes `params/layers/up/kernel/0` and so
    on. So do results that are new values of such variables, see `state` of `trace`. A scan that
    also takes apart fractions computed from inputs goes along these, such as time, and stays; give
    caches of layers among the variables. Scans inside of scanned layers need another call.
    Values and gradients are those of the scan, but compilation takes longer the more layers there
    are. variables, inputs: arrays or shape structs. restack: for checkpoints of full variables;
    raises ValueError for compact ones.
    Raises ValueError if there is no such array, since layers would then lose the same channels as
    before, and what `trace` raises.
    """
    channels = _traced(apply, variables, inputs, "tied", "frozen", state)
    stacks = unstack.Stacks(unstack.scanned(channels.walked), list(channels.shapes.values()))
    if not stacks.axes:
        raise ValueError(
            "no scan takes apart arrays of the variables that nothing else reads; allowed: a "
            "function that scans over layers, all of whose stacked arrays are variables."
        )
    programs = _programs(apply, channels)

    def layered(arrays: Iterable) -> PyTree:
        return jax.tree.unflatten(channels.variables, stacks.split(arrays))

    expected = trees.named_leaves(layered(channels.shapes.values()))

    def leaves_of(variables: PyTree) -> list:
        return stacks.joined(_expected(variables, expected, "unstacked").values())

    def function(variables: PyTree, *inputs: PyTree) -> PyTree:
        leaves = leaves_of(variables)
        traced = programs(dict(zip(channels.shapes, leaves)), inputs)
        outs = unstack.run(traced.walked, [*leaves, *jax.tree.leaves(inputs)])
        results = stacks.results(outs, _renewed_numbers(traced))
        return jax.tree.unflatten(traced.results, results)

    def restack(variables: PyTree) -> PyTree:
        arrays = map(unstack.whole, leaves_of(variables))
        return jax.tree.unflatten(channels.variables, arrays)

    return Unstacked(function, layered(jax.tree.leaves(variables)), restack)


def _renewed_numbers(channels: Channels) -> dict[int, int]:
    """Numbers of the results that are new values of variables, with those of the variables."""
    outs = [_struct(var.aval) for var in channels.walked.program.jaxpr.outvars]
    variables = jax.tree.unflatten(channels.variables, channels.shapes.values())
    ends = carried.leaves_of(jax.tree.unflatten(channels.results, outs))
    return carried.numbers(channels.state, ends, carried.leaves_of(variables))


# Masks and smaller arrays ------------------------------------------------------------------------


def complete(channels: Channels, keep: Keep) -> Arrays:
    """`keep` with every group, checked.

    Raises ValueError for unknown groups, wrong sizes and emptied groups.
    """
    for name in keep:
        tables.lookup(channels.groups, name, "the name of a group in keep")
    result = {}
    for name, size in channels.sizes.items():
        kept = keep.get(name, np.ones(size, bool))
        if not isinstance(kept, jax.Array):
            kept = np.asarray(kept)
        if kept.shape != (size,) or kept.dtype != bool:
            given = f"{kept.dtype} {kept.shape}"
            raise ValueError(f"keep[{name!r}] is {given}; allowed: bool ({size},).")
        if not isinstance(kept, jax.core.Tracer) and not np.any(kept):
            raise ValueError(f"keep[{name!r}] keeps none of {size} channels; one must stay.")
        result[name] = kept
    return result


def _stays(kept: Any, index: np.ndarray, size: int) -> Any:
    """bool [size]: entries all of whose channels are kept; several for x[:, None] * x[None]."""
    if isinstance(kept, jax.Array):
        removed = jnp.zeros(size, bool)
        return ~removed.at[index].max(~kept[:, None])
    stays = np.ones(size, bool)
    stays[index[~kept]] = False
    return stays


def owners(tree: PyTree, channels: Channels) -> dict[str, str]:
    """Path of the variable that each leaf of `tree` belongs to.

    tree: the variables themselves, a part, or optimizer state. A leaf belongs to the variable whose
    path, whole or without its first part, ends its own. Raises ValueError if there are several.
    """
    return _owners(trees.named_leaves(tree), channels.shapes)


def _owners(paths: Iterable, variables: Iterable) -> dict[str, str]:
    known = collections.defaultdict(list)
    for path in variables:
        known[path.partition("/")[2]].append(path)
    for path in variables:
        known[path] = [path]
    result = {}
    for path in paths:
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        fitting = next((known[end] for end in ends if end in known), [])
        if len(fitting) > 1:
            several = " or ".join(fitting)
            told = "give a tree with the paths of the variables"
            raise ValueError(f"{path} may belong to {several}; {told}.")
        if fitting:
            result[path] = fitting[0]
    return result


def roles(tree: PyTree, channels: Channels) -> dict[str, dict[int, str]]:
    """What the traced function does with axes of each array of `tree`, by path and axis.

    `producer`: it makes channels, or `depthwise`, from one channel each; `consumer`: a matrix
    product or convolution sums over it; `window`: of a convolution. Axes in no group are told too,
    others are missing. tree: as for `mask`.
    Raises ValueError for arrays of other shapes than those traced.
    """
    traced: dict = collections.defaultdict(dict)
    for (path, axis), role in channels.walked.roles.items():
        traced[path][axis] = role
    leaves = trees.named_leaves(tree)
    result = {}
    for path, owner in owners(tree, channels).items():
        _check_shape(path, leaves[path], channels.shapes[owner], "traced")
        if owner in traced:
            result[path] = traced[owner]
    return result


def _check_shape(path: str, leaf: Any, expected: Struct, what: str) -> None:
    given = np.shape(leaf)
    if given != expected.shape:
        told = f"the {what} variables have {expected.shape} there"
        raise ValueError(f"{path} has shape {given}; {told}.")


def mask(variables: PyTree, channels: Channels, keep: Keep) -> PyTree:
    """`variables` with removed channels at zero; shapes stay, so that `keep` may be traced.

    variables: those traced, a part of them such as `params`, or a state of an optimizer, whose
    moments follow. An array belongs to the variable whose path ends its own; those that belong to
    none stay as they are.
    Raises ValueError for a tree without any, for groups of `sums="zeroed"`, and as `complete` does.
    """
    for name in keep:
        if name in channels.groups and channels.groups[name].zeroed:
            raise ValueError(
                f"keep[{name!r}]: zeros in its variables are not zeros where they are summed over. "
                "groups.masked(apply, channels, keep)(variables, *inputs) runs the function "
                "without its channels."
            )
    return _masked(variables, channels, complete(channels, keep))


def _masked(variables: PyTree, channels: Channels, keep: Keep) -> PyTree:
    def with_zeros(leaf: Any, members: Members) -> Any:
        leaf = jnp.asarray(leaf)
        for name, (_, axis, index, *_) in members:
            kept = _stays(keep[name], index, leaf.shape[axis])
            shape = [1] * leaf.ndim
            shape[axis] = -1
            leaf = jnp.where(kept.reshape(shape), leaf, jnp.zeros((), leaf.dtype))
        return leaf

    return _map(with_zeros, variables, channels)


def compact(variables: PyTree, channels: Channels, keep: Keep) -> PyTree:
    """`variables` without removed channels, for `elastic`; arguments as for `mask`, keep known.

    Of arrays that devices have shares of they exchange parts, and what is left is divided along the
    same axes where its size allows it, see `trees.taken`. Under `jit` on automatic axes the
    compiler chooses, and `out_shardings` say how it ends.
    """
    _check_tied(channels)
    alive = channels.alive(keep)
    inputs = channels.inputs

    def cut(leaf: Any, members: Members) -> Any:
        _, member = members[0]
        small = alive.cut(leaf, inputs[member.path])
        return trees.divided_along(small, leaf)

    return _map(cut, variables, channels)


def _check_tied(channels: Channels) -> None:
    if channels.branches == "separate":
        told = "mask them; only tied ones can be compacted"
        raise ValueError(f"channels were traced with branches='separate': {told}.")


def _map(function: Callable, tree: PyTree, channels: Channels) -> PyTree:
    """function(leaf, members) of what belongs to variables with members of groups."""
    members: dict = collections.defaultdict(list)
    for name, member in channels.members:
        members[member.path].append((name, member))
    owned = owners(tree, channels)
    arrays = [path for path, leaf in trees.named_leaves(tree).items() if np.ndim(leaf)]
    if arrays and not owned:
        told = f"it has {arrays[:3]}, they have {list(channels.shapes)[:3]}"
        raise ValueError(f"no array of the tree belongs to the traced variables; {told}.")

    def of_leaf(path: str, leaf: Any) -> Any:
        variable = owned.get(path, "")
        if variable not in members:
            return leaf
        _check_shape(path, leaf, channels.shapes[variable], "traced")
        return function(leaf, members[variable])

    return trees.map_named(of_leaf, tree)


def compact_shapes(channels: Channels, keep: Keep) -> dict[str, Struct]:
    """Shapes of the compact variables, by path."""
    alive = channels.alive(keep)
    shapes = {}
    for path, value in channels.inputs.items():
        dtype = channels.shapes[path].dtype
        shapes[path] = Struct(alive.shape(value), dtype)
    return shapes


def masked(apply: Callable, channels: Channels, keep: Keep, *, state: State = None) -> Callable:
    """`function(variables, *inputs)`: what `apply` computes without the removed channels.

    Variables have their full shapes, and keep may be traced. For most groups it is
    `apply(mask(variables, channels, keep), *inputs)`. For those of `sums="zeroed"` it is a program
    that makes removed entries zero again before they are summed over; means are over the full
    number. Other input shapes and types than those traced, and another `apply` of the same groups,
    are traced once more. state: as for `trace`.
    """
    programs = _programs(apply, channels, state)
    kept = complete(channels, keep)

    def function(variables: PyTree, *inputs: PyTree) -> PyTree:
        leaves = trees.named_leaves(_masked(variables, channels, kept))
        traced = programs(leaves, inputs)
        if traced.groups is not channels.groups:
            traced.find_groups()
            if _content(traced) != _content(channels):
                raise ValueError("this function has other channel groups here: trace it anew.")
        arrays = [*leaves.values(), *jax.tree.leaves(inputs)]
        outs = execute.run(traced.zeroing(kept), traced.walked.program, *arrays)
        return jax.tree.unflatten(traced.results, outs)

    return function


def _content(channels: Channels) -> list:
    """What makes groups equal, whatever the order in which the function uses their arrays."""
    content = []
    for name, (path, axis, index, *_) in channels.members:
        content.append((name, path, axis, index.shape, index.tobytes()))
    return sorted(content)


# Smaller programs --------------------------------------------------------------------------------


def elastic(apply: Callable, channels: Channels, keep: Keep, *, state: State = None) -> Callable:
    """`function(compact_variables, *inputs)`: what `apply` computes with masked variables.

    The traced program is evaluated at the smaller sizes, so it is exact wherever masking is, for
    any framework, under jit, grad and vmap; sizes written in the code of `apply` need no change,
    and random numbers (dropout) are those of the full size. Other input shapes or types than those
    traced (another batch size, bfloat16) are traced once more, and so is an `apply` that is not the
    one traced, such as that of training; it may use fewer of the variables, but must not couple
    more channels. Sizes of inputs may be symbolic, as `jax.export` has them.
    compact_variables: a tree as traced, or a dict of its arrays by path (`trees.named_leaves`),
    which any file format and `jax.export` can hold.
    state: see `trace`; by default that of the trace if it was of `apply`. These results lose the
    channels of their variables, too. All other results have their full size.
    Hand-written derivatives (`jax.custom_jvp`, `custom_vjp`) stay. Raises ValueError for one that
    sums over channels which its function keeps apart, for variables of other shapes than `compact`
    gives, for a wrong `state`, and for a function that cannot lose these channels.
    """
    _check_tied(channels)
    expected = compact_shapes(channels, keep)
    programs = _programs(apply, channels, state)

    def function(variables: PyTree, *inputs: PyTree) -> PyTree:
        leaves = _expected(variables, expected, "compact")
        traced = programs(leaves, inputs)
        alive = _alive_in(traced, channels, keep)
        arrays = [*leaves.values(), *jax.tree.leaves(inputs)]
        outs = execute.run(alive, traced.walked.program, *arrays)
        return jax.tree.unflatten(traced.results, outs)

    return function


def _expected(variables: PyTree, expected: dict[str, Struct], what: str) -> Fields:
    """Arrays by path, in the order of `expected`; raises ValueError for others than these."""
    given = trees.named_leaves(variables)
    for path, struct in expected.items():
        _check_shape(path, given.get(path), struct, what)
    for path in given:
        if path not in expected:
            raise ValueError(f"{path} is no array of the {what} variables.")
    return {path: given[path] for path in expected}


def _programs(apply: Callable, channels: Channels, state: State = None) -> Callable:
    """`function(leaves, inputs)`: the trace that serves arguments of their types."""
    if state is None and apply == channels.apply:
        state = channels.state
    known = {}
    if apply == channels.apply and state == channels.state:
        known[channels.signature] = channels

    def find(leaves: Fields, inputs: tuple) -> Channels:
        key = _signature(leaves, inputs)
        if key not in known:
            full = []
            for path, leaf in leaves.items():
                full.append(Struct(channels.shapes[path].shape, leaf.dtype))
            variables = jax.tree.unflatten(channels.variables, full)
            known[key] = _again(apply, variables, inputs, channels, state)
        return known[key]

    return find


def _again(
    apply: Callable, variables: PyTree, inputs: tuple, channels: Channels, state: State
) -> Channels:
    """Another trace; one of the same equations at other sizes needs no walk."""
    if apply == channels.apply and state == channels.state:
        closed, result = _jaxpr(apply, variables, inputs)
        walked = resized.walked_like(channels.walked, closed)
        if walked is not None:
            return channels._replace(walked=walked, results=jax.tree.structure(result))
    return _traced(apply, variables, inputs, channels.branches, channels.sums, state)


def _alive_in(again: Channels, channels: Channels, keep: Keep) -> execute.Alive:
    """Which entries of another trace stay, if its variables lose those of `channels`.

    Raises ValueError if it would lose others.
    """
    first = channels.alive(keep)
    if again.walked.labels is channels.walked.labels:
        return first
    labels = again.walked.labels
    known = np.zeros(labels.num, bool)
    stays = np.zeros(labels.num, bool)
    stays[FROZEN] = True
    axes = []
    for path, value in channels.inputs.items():
        for a, (axis, other) in enumerate(zip(value.axes, again.inputs[path].axes, strict=True)):
            kept = first(axis.labels)
            parts = labels.parts(labels.find(other.labels))
            known[parts] = True
            stays[parts[kept]] = True
            axes.append((f"{path} axis {a}", kept, other))
    alive = execute.Alive(labels, known & ~stays, again.walked.zeroes)
    for place, kept, axis in axes:
        if not np.array_equal(alive(axis.labels), kept):
            raise ValueError(
                f"this function has other channel groups here: it cannot lose the removed entries "
                f"of {place}, or not alone; trace it anew."
            )
    return alive


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


def random_keep(channels: Channels, key: jax.Array, *, density: float = 0.6) -> Arrays:
    """A random choice that keeps about `density` of every group's channels, at least one."""
    result = {}
    for i, (name, size) in enumerate(channels.sizes.items()):
        key_of_group = jax.random.fold_in(key, i)
        uniform = jax.random.uniform(key_of_group, (size,))
        draws = np.asarray(uniform)
        result[name] = (draws < density) | (draws == draws.min())
    return result


def check(
    apply: Callable, variables: PyTree, channels: Channels, *inputs: PyTree, key: jax.Array
) -> float:
    """Largest difference of masked and compact results at a random `keep`, over the largest result.

    About 1e-6 in float32; anything much larger means that the function does something at run time
    that its trace does not show. Worth a second before a long run.
    """
    keep = random_keep(channels, key)
    if any(group.zeroed for group in channels.groups.values()):
        full = jax.jit(masked(apply, channels, keep))(variables, *inputs)
    else:
        anew = lambda *args: apply(*args)  # jax would not trace the same function twice
        full = jax.jit(anew)(mask(variables, channels, keep), *inputs)
    small = compact(variables, channels, keep)
    compacted = jax.jit(elastic(apply, channels, keep))(small, *inputs)
    traced = _programs(apply, channels)(trees.named_leaves(small), inputs)
    alive = _alive_in(traced, channels, keep)
    ends = traced.walked.results(traced.walked.program)
    cut = list(map(alive.cut, jax.tree.leaves(full), ends))  # new values of variables lose entries
    flat = []
    for results in (cut, compacted):
        vector, _ = jax.flatten_util.ravel_pytree(results)
        flat.append(vector)
    first, second = np.asarray(flat, complex)
    differ = first != second  # infinities may be equal
    errors = np.abs(first[differ] - second[differ])
    worst = np.max(errors, initial=0.0)
    finite = np.abs(first[np.isfinite(first)])
    scale = np.max(finite, initial=0.0)
    return float(worst / scale if scale else worst)


# What the analysis says --------------------------------------------------------------------------


def order_of_use(function: Callable, tree: PyTree) -> list[str]:
    """Paths of all leaves of `tree` by their first use in `function(tree)`; unused ones first.

    Of a network's parameters it is the order of its modules. Leaves: arrays or shape structs;
    nothing is computed.
    """
    paths = list(trees.named_leaves(tree))
    used = walk.read(function, tree).used.of(paths)
    return [path for path in paths if path not in used] + used


def describe(channels: Channels) -> str:
    """The groups and what was frozen, as text."""
    total = sum(channels.sizes.values())
    lines = [f"{len(channels.groups)} groups, {total} channels"]
    for group in channels.groups.values():
        told = ", zeroed in sums" if group.zeroed else ""
        lines.append(f"{group.name}: {group.size} {group.kind}{told}")
        for member in group.members:
            place = f"{member.path} axis {member.axis}"
            copies = member.index.shape[1]
            if copies > 1:
                place += f" x {copies}"
            lines.append(f"    {place} ({member.term or member.role})")
    if channels.frozen:
        lines.append("kept whole:")
    for reason, primitive, source, members, since in channels.frozen:
        places = ", ".join(f"{path} axis {axis}" for path, axis in members[:3])
        if len(members) > 3:
            places += f" and {len(members) - 3} more"
        if primitive not in ("output", "trace"):  # the axes themselves
            if source:
                primitive = f"{primitive} at {source}"
            reason = f"{primitive} {reason}"
        if since:
            reason = f"{reason} since {since}"
        lines.append(f"    {places}: {reason}")
    return "\n".join(lines + _renewed(channels))


def _renewed(channels: Channels) -> list[str]:
    """Which results are new values of variables, as lines of text."""
    lines = []
    if channels.state:
        lines.append("results that are new values of variables, and lose their channels:")
    for place, origin in channels.state.items():
        lines.append(f"    {place or 'all'} of {origin or 'all'}")
    return lines


def layout(channels: Channels) -> Fields:
    """The groups as plain data, for `report.channels.group_figure`.

    kernels: paths of the arrays that make or read channels, in order of use. groups: by name the
    size and, by role, positions of the members among the kernels; other arrays are half a step
    behind the kernel used before them.
    """
    kernels = {path for path, _ in channels.walked.roles}
    positions: dict[str, float] = {}
    in_order: list[str] = []
    for path in channels.used:
        positions[path] = len(in_order) - 0.5
        if path in kernels:
            positions[path] = len(in_order)
            in_order.append(path)
    layouts = {}
    for name, group in channels.groups.items():
        places = {(member.role, positions.get(member.path)) for member in group.members}
        marks: dict = {}
        used = [place for place in places if place[1] is not None]
        for role, position in sorted(used):
            marks.setdefault(role, []).append(position)
        layouts[name] = dict(size=group.size, marks=marks)
    return dict(kernels=in_order, groups=layouts)
