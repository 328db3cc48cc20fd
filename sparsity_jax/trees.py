"""Pytrees by name: paths of leaves, rules on paths, inner products and norms."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.experimental.shard_alike import shard_alike
from jax.tree_util import (
    tree_leaves,
    tree_leaves_with_path,
    tree_map,
    tree_map_with_path,
    tree_structure,
    tree_unflatten,
)

from sparsity_jax import blocks, platforms, tables
from sparsity_jax.precision import FULL
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import PyTree

__all__ = [
    "absolute_sum",
    "aligned",
    "check_finite",
    "check_parameters",
    "check_pattern",
    "divided_along",
    "divided_like",
    "division",
    "dot",
    "dots",
    "fold",
    "fold_rows",
    "fold_sum",
    "gathered",
    "is_kernel",
    "last_name",
    "map_named",
    "match_rules",
    "matching",
    "may_be_divided",
    "named_leaves",
    "norm",
    "norm_along",
    "norms",
    "path_name",
    "plain_leaves",
    "plain_path",
    "sample",
    "scale_of",
    "scales",
    "size",
    "taken",
    "varying_like",
    "widen",
    "zeros_like",
]


def path_name(path: Sequence) -> str:
    """A key path of `jax.tree_util` as text, e.g. `stage1_block0/conv1/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(
    tree: PyTree, *, name_of: Callable = path_name, is_leaf: Callable | None = None
) -> dict[str, Any]:
    """Leaves of `tree` by path, in flattening order; raises ValueError for two of the same path."""
    leaves: dict[str, Any] = {}
    for path, leaf in tree_leaves_with_path(tree, is_leaf=is_leaf):
        name = name_of(path)
        if name in leaves:
            raise ValueError(
                f"two leaves have the path {name!r}; names of a tree must not hold the '/' "
                "between them."
            )
        leaves[name] = leaf
    return leaves


def plain_path(path: Sequence) -> str:
    """`path_name` without the last `value`, the attribute in which a state of Flax NNX wraps every
    array.

    `nnx.Optimizer` gives wrapped arrays to `init` and bare ones to `update`: in both, an array has
    the same plain path.
    """
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return path_name(path)


def plain_leaves(tree: PyTree, *, is_leaf: Callable | None = None) -> dict[str, Any]:
    """Leaves of `tree` by `plain_path`; raises as `named_leaves`."""
    return named_leaves(tree, name_of=plain_path, is_leaf=is_leaf)


def aligned(tree: PyTree, like: PyTree, what: str, *, is_leaf: Callable | None = None) -> PyTree:
    """`tree` in the structure of `like`: its leaves by their plain paths, where the structures
    differ.

    So a tree that was made of NNX states serves bare arrays, and a tree of all params serves those
    that `optax.masked`
    shows: positions which `like` hides (`optax.MaskedNode`) are hidden in the result too.
    what: names `tree` in errors. is_leaf: what counts as a leaf of `tree`. Raises ValueError naming
    a path that only one of the two has.
    """
    structure: Any = tree_structure(tree, is_leaf=is_leaf)
    if structure == tree_structure(like):
        return tree
    given = plain_leaves(tree, is_leaf=is_leaf)
    wanted = plain_leaves(like, is_leaf=_is_hidden)
    hidden = {path: leaf for path, leaf in wanted.items() if _is_hidden(leaf)}
    leaves = {**given, **hidden}
    wrong = [f"no entry for {path!r}" for path in wanted if path not in leaves]
    wrong += [f"an entry {path!r}, which is no parameter" for path in given if path not in wanted]
    if wrong:
        raise ValueError(
            f"{what} have {wrong[0]}; allowed: one for all parameters, or a tree with the paths of "
            "the params."
        )
    in_order = [leaves[path] for path in wanted]
    return tree_unflatten(tree_structure(like, is_leaf=_is_hidden), in_order)


def _is_hidden(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def map_named(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function receives the path first: `function(path, leaf,
    *other_leaves)`.
    """
    of_path = lambda path, *leaves: function(path_name(path), *leaves)
    return tree_map_with_path(of_path, tree, *rest)


def match_rules(tree: PyTree, rules: Sequence[tuple[str, Any]]) -> PyTree:
    """The value of the first rule whose pattern matches the whole path, for every leaf of `tree`.

    rules: pairs of a regular expression and a value, e.g. `((r".*/bias", 0.0), (r".*", 0.9))`.
    Raises ConfigError for a bad pattern, for a leaf that no rule matches and for a rule that
    decides no leaf (a closing `.*` may be idle).
    """
    paths = list(named_leaves(tree))
    chosen: dict[str, int] = {}
    for index, (pattern, _) in enumerate(rules):
        with tables.within(f"[{index}]"):
            check_pattern(pattern)
            matched = {path for path in paths if re.fullmatch(pattern, path)}
            decided = matched - chosen.keys()
            closing = pattern == ".*" and index == len(rules) - 1
            if not decided and not closing:
                raise _idle("", pattern, "which decides no parameter", paths)
        chosen |= dict.fromkeys(decided, index)
    for path in paths:
        if path not in chosen:
            raise ConfigError(
                "", why=f"has no rule for {path!r}", allowed="a last pair ('.*', value)"
            )
    return map_named(lambda path, _: rules[chosen[path]][1], tree)


def matching(tree: PyTree, pattern: str, field: str = "") -> dict[str, bool]:
    """Whether the whole path of each leaf of `tree` matches the regular expression `pattern`, by
    path.

    Raises ConfigError for a bad pattern and if no leaf matches. field: the setting that holds it.
    """
    check_pattern(pattern, field)
    paths = list(named_leaves(tree))
    matches = {path: re.fullmatch(pattern, path) is not None for path in paths}
    if not any(matches.values()):
        raise _idle(field, pattern, "which matches no parameter", paths)
    return matches


def _idle(field: str, pattern: str, why: str, paths: list[str]) -> ConfigError:
    allowed = f"a pattern of paths such as {paths[0]!r}"
    return ConfigError(field, pattern, why=why, allowed=allowed, known=paths)


def check_pattern(pattern: str, field: str = "") -> None:
    """Raises ConfigError for what is no regular expression. field: the setting that holds it."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            field, pattern, why=f"which is not a regular expression: {error}"
        ) from None


def check_finite(tree: PyTree, what: str, *, infinite: bool = False) -> None:
    """Raises ValueError for the first array of `tree` that holds NaN or, unless `infinite`, an
    infinity.

    what: begins the sentence, e.g. the stage and member and what the tree is. Arrays without a
    fraction pass, and those that `jit`, `vmap` or `grad` is tracing, whose values nobody knows yet.
    """
    name, allowed = "NaN or infinite", "finite numbers"
    if infinite:
        name, allowed = "NaN", "finite numbers and infinities"
    for path, leaf in tree_leaves_with_path(tree):
        fraction = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        if isinstance(leaf, jax.core.Tracer) or not fraction:
            continue
        # a known array may meet a program that is being traced
        with jax.ensure_compile_time_eval():
            refused = jnp.isnan(leaf) if infinite else ~jnp.isfinite(leaf)
            number = int(jnp.sum(refused))
        if number:
            place = f" at {path_name(path)!r}" if path else ""
            entries = f"{number} of {jnp.size(leaf)} entries{place}"
            raise ValueError(f"{what}: {entries} are {name}; allowed: {allowed}.")


def check_parameters(tree: PyTree, what: str, *, masks: bool = False) -> None:
    """Raises TypeError for the first leaf of `tree` that is no array of real numbers, or bools if
    `masks`.

    Counters, random keys and masks are state of a network, but no parameters: nothing can be
    differentiated by them.
    """
    allowed = (jnp.floating, jnp.bool_) if masks else (jnp.floating,)
    for path, leaf in tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not any(jnp.issubdtype(dtype, kind) for kind in allowed):
            raise TypeError(
                f"{what}: {path_name(path) or 'the array'!r} is {dtype}; allowed: floating-point "
                "arrays. Give parameters only and keep counters, keys and running statistics "
                "apart; of a Flax NNX network they are the second of nnx.split(net, nnx.Param, "
                "...)."
            )


def is_kernel(path: str) -> bool:
    """Whether `path` names weights: `kernel` (Flax; NNX states end in `kernel/value`), `weight` or
    `w`.
    """
    return last_name(path) in ("kernel", "weight", "w")


def last_name(path: str) -> str:
    """The name of an array itself: the end of `path`, without the `value` of NNX states and the
    number of one of several arrays."""
    names = [name.strip(".[]'\"") for name in path.split("/")]
    if len(names) > 1 and names[-1].isdigit():
        names.pop()
    if len(names) > 1 and names[-1] == "value":
        names.pop()
    return names[-1]


def fold(combine: Callable, reduce: Callable, function: Callable, *arrays: Array) -> Array:
    """`reduce(function(*arrays))` for an elementwise `function` and its matching pair, e.g. jnp.add
    and jnp.sum; see `fold_rows`.
    """
    rows = [array[None] for array in arrays]
    return fold_rows(combine, reduce, function, *rows)[0]


def fold_rows(combine: Callable, reduce: Callable, function: Callable, *arrays: Array) -> Array:
    """`fold` of every row: of all that has the same first index. [rows].

    XLA's CPU backend writes `function`'s result to memory before it reduces it, and reduces vectors
    slowly: counting the entries of the 62 arrays of a ResNet-18 above a bound took 39 ms, and 2 ms
    once eight slices are combined elementwise first (2 cores, jax 0.10.2). With several devices the
    arrays may be sharded, where flattening would gather them; accelerators fuse the reduction
    anyway.
    """
    first = arrays[0]
    total = first[0].size
    if total < 4096 or not platforms.one_cpu():
        inner = tuple(range(1, first.ndim))
        return reduce(function(*arrays), axis=inner)
    width = total // 8
    flat = [array.reshape(len(array), total) for array in arrays]

    def part(start: int, end: int) -> Array:
        parts = [array[:, start:end] for array in flat]
        return function(*parts)

    starts = range(0, 8 * width, width)
    slices = [part(start, start + width) for start in starts]
    result = functools.reduce(combine, slices)
    if jnp.issubdtype(result.dtype, jnp.floating):
        result = fold_rows(combine, reduce, lambda x: x, result)
    else:  # sums of a vector of integers are fast
        result = reduce(result, axis=1)
    if total % 8:
        rest = part(8 * width, total)
        result = combine(result, reduce(rest, axis=1))
    return result


def sample(array: Array) -> Array | None:
    """At least 8,192 entries at equal distances, where that pays: large arrays on one CPU;
    elsewhere None.
    """
    if array.size < 2**16 or not platforms.one_cpu():
        return None
    return array.ravel()[:: array.size >> 13]


def fold_sum(function: Callable, *arrays: Array) -> Array:
    """Sum over all entries of the elementwise `function(*arrays)`; see `fold`."""
    return fold(jnp.add, jnp.sum, function, *arrays)


def varying_like(x: Array, arrays: Sequence[Array]) -> Array:
    """`x` as a value that differs between the devices of a mesh axis, inside `shard_map`, if one of
    `arrays` does.

    What a loop or a branch starts with must have the type of what it ends with.
    """
    for array in arrays:
        x = x + jnp.zeros_like(array, x.dtype, shape=())
    return x


def division(x: Array) -> tuple:
    """Names of the explicit mesh axes that divide the axes of `x`, None for none; () where no mesh
    is explicit.
    """
    return tuple(jax.typeof(x).sharding.spec)


def may_be_divided(x: Any) -> bool:
    """Whether devices may have shares of the array `x`, which is true of all arrays on a mesh of
    automatic axes while `jit` traces; not inside `shard_map`, where a share is the whole.
    """
    if not isinstance(x, jax.Array):
        return False
    if not isinstance(x, jax.core.Tracer):
        return not x.sharding.is_fully_replicated
    return _automatic(x) or any(division(x))


def _automatic(x: Array) -> bool:
    """Whether the compiler chooses how devices share a traced array."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.manual_axes and bool(mesh.auto_axes) and mesh.size > 1


def divided_like(x: Array, like: Any) -> Array:
    """`x` divided among devices as `like`, of the same shape, is; for arrays made of nothing but a
    shape, which would lie whole on every device.
    """
    if not isinstance(like, jax.Array):
        return x
    if not isinstance(like, jax.core.Tracer):
        several = len(like.sharding.device_set) > 1
        return jax.device_put(x, like.sharding) if several else x
    if not may_be_divided(like):
        return varying_like(x, [like])
    sharding = jax.typeof(like).sharding
    if division(x) != division(like):
        x = jax.sharding.reshard(x, sharding)
    if _automatic(like):
        # while tracing, `x` has to count as an array on the mesh too
        free = jax.sharding.PartitionSpec(*[jax.sharding.PartitionSpec.UNCONSTRAINED] * x.ndim)
        x = lax.with_sharding_constraint(x, jax.sharding.NamedSharding(sharding.mesh, free))
        x, _ = shard_alike(x, like)
    return x


def divided_along(x: Array, like: Array) -> Array:
    """`x` divided along the axes that divide `like`, of as many axes, where their lengths in `x`
    allow it; as it is where the compiler chooses how `like` is divided.
    """
    sharding = _known_division(like)
    if sharding is None:
        return x
    names = []
    for length, name in itertools.zip_longest(x.shape, sharding.spec):
        names.append(None if length % _parts(sharding, name) else name)
    return _moved(x, sharding, names)


def taken(x: Any, entries: np.ndarray, axis: int) -> Any:
    """The entries of `x` at these places along an axis; entries: known, in ascending order.

    Of what divides that axis, the largest other one is divided meanwhile whose length allows it:
    devices exchange parts of their shares, and none gets more than its own share. Without such an
    axis, entries pass from device to device, at most a share at a time, and the result is divided
    as `x` is; only where its length does not allow that, `x` is gathered. As the compiler likes
    where it chooses how `x` is divided.
    """
    sharding = _known_division(x)
    if sharding is None:
        return x.take(entries, axis)
    names = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    name = names[axis]
    if name is None:
        return x.take(entries, axis)
    parts = _parts(sharding, name)
    free = [i for i in range(x.ndim) if names[i] is None and x.shape[i] % parts == 0]
    if not free and len(entries) % parts == 0:
        return _passed_on(x, entries, axis, sharding)
    names[axis] = None
    if free:
        largest = max(free, key=lambda i: x.shape[i])
        names[largest] = name
    return _moved(x, sharding, names).take(entries, axis)


def _passed_on(
    x: Array, entries: np.ndarray, axis: int, sharding: jax.sharding.NamedSharding
) -> Array:
    """The entries along an axis that is divided and stays so: each device sends those of its share
    to the device that comes so many behind it, for every such distance.
    """
    name = sharding.spec[axis]
    parts = _parts(sharding, name)
    senders, places = np.divmod(entries, x.shape[axis] // parts)
    own = len(entries) // parts
    receivers, targets = np.divmod(np.arange(len(entries)), own)
    distances = (senders - receivers) % parts

    def pass_on(share: Array) -> Array:
        device = lax.axis_index(name)
        front = jnp.moveaxis(share, axis, 0)
        result = jnp.zeros_like(front, shape=(own, *front.shape[1:]))
        for distance in np.unique(distances):
            passed = distances == distance
            sent = _rows(places[passed], senders[passed], parts, 0)
            put = _rows(targets[passed], receivers[passed], parts, own)
            block = front[jnp.asarray(sent)[device]]
            if distance:
                ring = [(sender, (sender - distance) % parts) for sender in range(parts)]
                block = lax.ppermute(block, name, ring)
            result = result.at[jnp.asarray(put)[device]].set(block, mode="drop")
        return jnp.moveaxis(result, 0, axis)

    spec = sharding.spec
    program = jax.shard_map(pass_on, mesh=sharding.mesh, in_specs=spec, out_specs=spec)
    return jax.jit(program)(x)


def _rows(values: np.ndarray, owners: np.ndarray, number: int, fill: int) -> np.ndarray:
    """The values of every owner in its row, behind them `fill`: [number, most values of an owner].

    owners: in ascending order.
    """
    counts = np.bincount(owners, minlength=number)
    rows = np.full((number, counts.max()), fill)
    places = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows[owners, places] = values
    return rows


def _known_division(x: Any) -> jax.sharding.NamedSharding | None:
    """How devices share the array `x`; None where they do not, or the compiler chooses it."""
    if not may_be_divided(x):
        return None
    if isinstance(x, jax.core.Tracer):
        sharding: Any = None if _automatic(x) else jax.typeof(x).sharding
    else:
        sharding = x.sharding
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _parts(sharding: jax.sharding.NamedSharding, name: Any) -> int:
    """Into how many parts an axis is divided by the axes of a mesh that `name` names."""
    return math.prod(sharding.mesh.shape[own] for own in np.ravel(name) if own is not None)


def _moved(x: Array, sharding: jax.sharding.NamedSharding, names: Sequence) -> Array:
    """`x` divided by these axes of a mesh."""
    wanted = sharding.update(spec=jax.sharding.PartitionSpec(*names))
    if isinstance(x, jax.core.Tracer):
        return jax.sharding.reshard(x, wanted)
    return jax.device_put(x, wanted)


def zeros_like(x: Array, dtype: Any = None) -> Array:
    """Zeros in the shape of `x`, divided among devices as it is. dtype: by default that of `x`."""
    return divided_like(jnp.zeros_like(x, dtype=dtype), x)


def gathered(x: Array) -> Array:
    """`x` whole on every device, where a mesh of explicit axes divides it."""
    if not any(division(x)):
        return x
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec())


def widen(array: Array) -> Array:
    """In float32 if its type is narrower, else as it is."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def absolute_sum(array: Array) -> Array:
    """Sum of the magnitudes of all entries, in at least float32."""
    return fold_sum(lambda x: jnp.abs(widen(x)), array)


def _inner(first: Array, second: Array) -> Array:
    """Inner product. On one CPU XLA hands it to a library: for a sum of squares two times faster
    than `fold`, six than `jnp.sum`.
    """
    if not platforms.one_cpu():
        return jnp.sum(first * second)
    return jnp.dot(first.ravel(), second.ravel(), precision=FULL)


def _inners(first: Sequence[Array], second: Sequence[Array]) -> Array:
    """Inner products of pairs of arrays: [pairs]."""
    if platforms.in_turn():
        return jnp.stack([_inner(x, y) for x, y in zip(first, second)])
    layout, xs = _packed(first)
    _, ys = _packed(second)
    products = [x * y for x, y in zip(xs, ys)]
    (sums,) = layout.sums([products])
    return sums


def _packed(arrays: Sequence[Array]) -> tuple[blocks.Layout, list[Array]]:
    """A layout of arrays that are each a group of their own, and their pieces."""
    groups = [[array] for array in arrays]
    layout = blocks.Layout(groups)
    return layout, layout.pack(groups)


def size(tree: PyTree) -> int:
    """Number of entries of all leaves."""
    return sum(leaf.size for leaf in tree_leaves(tree))


def dot(first: PyTree, second: PyTree) -> Array:
    """Inner product of two trees of the same structure, in at least float32."""
    product = lambda x, y: _inner(widen(x), widen(y))
    products = tree_leaves(tree_map(product, first, second))
    return sum(products, start=jnp.zeros(()))


def norm(tree: PyTree) -> Array:
    """Euclidean norm of all entries of `tree`, in at least float32, whether or not their squares
    leave its range.

    Its derivative at zero is zero, a subgradient.
    """
    lengths = norms(tree_leaves(tree))
    if not lengths:
        return jnp.zeros(())
    if len(lengths) == 1:
        return lengths[0]
    return norms([jnp.stack(lengths)])[0]


def norms(arrays: Sequence[Array]) -> list[Array]:
    """`norm` of each of several arrays; on an accelerator in one pass over all."""
    return _lengths([widen(array) for array in arrays]) if arrays else []


def dots(first: Sequence[Array], second: Sequence[Array]) -> list[Array]:
    """Inner products of pairs of arrays, in at least float32; on an accelerator in one pass over
    all.
    """
    if not first:
        return []
    wide = [widen(array) for array in first]
    products = _inners(wide, [widen(array) for array in second])
    return [product.astype(x.dtype) for product, x in zip(products, wide)]


def scales(arrays: Sequence[Array]) -> list[Array]:
    """`scale_of` each of several arrays; on an accelerator in one pass over all."""
    if platforms.in_turn() or not arrays:
        return [scale_of(array) for array in arrays]
    constant = [lax.stop_gradient(array) for array in arrays]
    layout, pieces = _packed(constant)
    peaks = layout.largest([jnp.abs(piece) for piece in pieces])
    return [_power_of_two(peak.astype(array.dtype)) for peak, array in zip(peaks, constant)]


def scale_of(tree: PyTree) -> Array:
    """A power of two near the largest magnitude in `tree`, a constant to derivatives; 1 of zeros.

    Numbers divided by it are not rounded, and neither are their squares out of range.
    """
    leaves = [lax.stop_gradient(leaf) for leaf in tree_leaves(tree)]
    if not leaves:
        return jnp.ones(())
    largest = functools.partial(jnp.max, initial=0)
    peaks = [fold(jnp.maximum, largest, jnp.abs, leaf) for leaf in leaves]
    return _power_of_two(functools.reduce(jnp.maximum, peaks))


def _power_of_two(size: Array) -> Array:
    """The largest power of two up to `size`; 1 for 0, subnormals, NaN and infinity."""
    integer = jnp.dtype(f"uint{8 * size.dtype.itemsize}")
    # all bits of the exponent, and no other
    exponent = np.asarray(np.inf, size.dtype).view(integer)
    bits = lax.bitcast_convert_type(size, integer) & exponent
    power = lax.bitcast_convert_type(bits, size.dtype)
    return jnp.where((power > 0) & jnp.isfinite(size), power, 1)


# compiled, for outside `jit` both branches would compile at every call
@jax.custom_jvp
@platforms.compiled
def _lengths(arrays: Sequence[Array]) -> list[Array]:
    """Euclidean norms of arrays of at least float32."""
    squares = _inners(arrays, arrays)
    infos = [jnp.finfo(array.dtype) for array in arrays]
    # squares that vanished, at most `tiny` each, are less than a rounding error of the sum; NaN
    # stays what it is
    least = []
    for array, info in zip(arrays, infos):
        least.append(array.size * float(info.tiny) / float(info.eps))
    largest = [float(info.max) for info in infos]
    limits = jnp.asarray([least, largest], squares.dtype)
    precise = (squares >= limits[0]) & (squares <= limits[1])

    def scaled() -> Array:
        layout, pieces = _packed(arrays)
        scale = _power_of_two(layout.largest([jnp.abs(piece) for piece in pieces]))
        parts = [piece / own for piece, own in zip(pieces, layout.spread(scale))]
        squares = [jnp.square(part) for part in parts]
        (sums,) = layout.sums([squares])
        return scale * jnp.sqrt(sums)

    lengths = lax.cond(jnp.all(precise), lambda: jnp.sqrt(squares), scaled)
    return [length.astype(array.dtype) for length, array in zip(lengths, arrays)]


@_lengths.defjvp
def _derivatives_of_lengths(primals: tuple, tangents: tuple) -> tuple[list[Array], list[Array]]:
    (arrays,), (changes,) = primals, tangents
    lengths = _lengths(arrays)
    slopes = []
    for array, change, length in zip(arrays, changes, lengths):
        direction = array / jnp.where(length > 0, length, 1)
        slopes.append(jnp.sum(direction * change))
    return lengths, slopes


def norm_along(array: Array, axis: int) -> Array:
    """Euclidean norm of every slice of `array` along `axis`, as `norm`."""
    wide = widen(array)
    sizes = jnp.abs(lax.stop_gradient(wide))
    peaks = jnp.max(sizes, axis, keepdims=True, initial=0)
    scale = _power_of_two(peaks)
    squares = jnp.square(wide / scale)
    total = jnp.sum(squares, axis, keepdims=True)
    positive = total > 0
    roots = jnp.sqrt(jnp.where(positive, total, 1))
    roots = jnp.where(positive, roots, total)
    return jnp.squeeze(scale * roots, axis)
