"""Compact networks as ordinary Flax Linen programs: every layer takes its width from the arrays it is given.

    channels = groups.trace(model.apply, variables, images, sums="freeze")
    keep = {name: scores[name] > threshold for name in channels.names}
    small = groups.compact(variables, channels, keep)
    apply = relaxed.apply(model.apply, channels, keep, small, images)  # compared with groups.elastic, or ValueError
    logits = apply(small, other_images)  # other batch and image sizes are fine: Linen runs on what it is given

Training works on the small network as on any other, batch statistics included:

    apply_train = relaxed.apply(model.apply_train, channels, keep, small, images, traced=model.apply)

    def loss_fn(params, batch_stats):
        logits, batch_stats = apply_train({"params": params, "batch_stats": batch_stats}, images)
        return losses.cross_entropy(logits, labels).mean(), batch_stats

    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(small["params"], small["batch_stats"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, small["params"], grads)

Plain Linen refuses such arrays, since its modules hold their widths. Here `flax.linen.intercept_methods` sets
`features` and `feature_group_count` from the kernels just before a layer is called. That cannot reach a number of
channels in the code around the layers, nor a mean over channels; such networks are refused, with the reason.
`groups.elastic` runs them.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparsity_jax import groups, trees

PyTree = Any
_NORM = "takes its statistics over the remaining channels only; trace with sums='freeze' to keep its width whole"
REASONS = {  # why a module whose arrays got smaller is another function; subclasses included
    nn.MultiHeadDotProductAttention: "divides its scores by the square root of the head size, which has changed",
    nn.GroupNorm: "divides the remaining channels into groups anew",
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.RNNCellBase: "carries a state of the width that is written in its `features`",
}
ELSEWHERE = "a number of channels is written in the code, or something is averaged over channels"


def _convolution(module: nn.Module, shape: tuple[int, ...], x: Any) -> dict[str, int]:
    grouped = module.feature_group_count > 1
    return dict(features=shape[-1], feature_group_count=jnp.shape(x)[-1] // shape[-2] if grouped else 1)


def _dense_general(module: nn.Module, shape: tuple[int, ...], x: Any) -> dict[str, Any]:
    several = not isinstance(module.features, int)
    return dict(features=shape[len(shape) - len(module.features) :] if several else shape[-1])


LAYERS: dict[type, tuple[str, Callable]] = {  # module: its parameter, and fields(module, shape of it, input)
    nn.Conv: ("kernel", _convolution),
    nn.ConvLocal: ("kernel", lambda module, shape, x: dict(features=shape[-1])),
    nn.ConvTranspose: ("kernel", lambda module, shape, x: dict(features=shape[-2 if module.transpose_kernel else -1])),
    nn.Dense: ("kernel", lambda module, shape, x: dict(features=shape[-1])),
    nn.DenseGeneral: ("kernel", _dense_general),
    nn.Einsum: ("kernel", lambda module, shape, x: dict(shape=shape)),
    nn.Embed: ("embedding", lambda module, shape, x: dict(num_embeddings=shape[0], features=shape[1])),
}


class _Resize:
    """The interceptor of one call, and what it saw: the modules by path, and where an error came from."""

    def __init__(self, fields: Mapping[str, Mapping[str, Any]]):
        self.fields, self.modules, self.failed = fields, {}, None

    def __call__(self, method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if module.scope is None:
            return method(*args, **kwargs)
        path = "/".join(module.path)
        self.modules[path] = type(module)
        new = self.of_layer(module, next(iter((*args, *kwargs.values())), None))
        new |= next((own for pattern, own in self.fields.items() if re.fullmatch(pattern, path)), {})
        for name in new:
            if name not in module.__dataclass_fields__:
                raise ValueError(f"fields set {name!r} of {path!r}, but {type(module).__name__} has no such field.")
        old = {name: getattr(module, name) for name in new}
        try:
            for name, value in new.items():
                object.__setattr__(module, name, value)  # the module is frozen, and a copy made for this call
            return method(*args, **kwargs)
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            for name, value in old.items():
                object.__setattr__(module, name, value)

    @staticmethod
    def of_layer(module: nn.Module, x: Any) -> dict[str, Any]:
        name, rule = next((row for kind, row in LAYERS.items() if isinstance(module, kind)), ("", None))
        array = nn.meta.unbox(module.get_variable("params", name)) if rule else None
        return {} if array is None or (x is None and isinstance(module, nn.Conv)) else rule(module, array.shape, x)


def apply(
    function: Callable,
    channels: groups.Channels,
    keep: groups.Keep,
    small: PyTree,
    *inputs: PyTree,
    traced: Callable | None = None,
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    tolerance: float | None = 1e-4,
) -> Callable:
    """`f(compact_variables, *inputs, **kwargs)`: `function` with Linen layers of the widths of the compact variables.

    function: calls the `apply` of a Linen module, in any mode. traced: what `channels` were traced from, where that is
    another function of the same modules: it is the one that is checked, as `traced(small, *inputs)`.
    The check, here and once: the traced function must run on the compact shapes, sum over no removed channel, keep the
    size of attention heads, and agree with `groups.elastic` on two draws of all parameters up to `tolerance` of the
    range of its results (None leaves out this comparison; networks that compute in bfloat16 need about 0.05). What
    only training runs is not checked.
    small, inputs: arrays or shape structs. Variables are drawn anew, inputs only in place of shape structs (integers
    from 0 and 1).
    fields: widths that the network's own modules hold, by regular expression on module paths, for instance
    `{"stage1_.*": {"features": 5}}`; the first that matches the whole path counts.
    Raises ValueError with the reason if the network does not work as a Linen program of these widths, if `function`
    calls no Linen module, and, when called, for variables of other shapes than `groups.compact` gives.
    """
    expected = groups.compact_shapes(channels, keep)
    fields, function = dict(fields or {}), _unjitted(function)
    checked = _unjitted(traced or function)
    pairs = {path: (full.shape, expected[path].shape) for path, full in channels.shapes.items()}
    changed = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
    reference = groups.elastic(checked, channels, keep)
    resize = _trace(checked, reference, changed, (small, *inputs), fields)
    _check_sums(checked, channels, keep, changed, (small, *inputs), resize)
    if tolerance is not None:
        _compare(checked, reference, changed, (small, *inputs), resize, tolerance)

    def relaxed(variables: PyTree, *inputs: PyTree, **kwargs: Any) -> PyTree:
        leaves = trees.named_leaves(variables)
        for path, struct in expected.items():
            shape = getattr(leaves.get(path), "shape", None)
            if shape != struct.shape:
                raise ValueError(f"{path} has shape {shape}; the compact variables have {struct.shape} there.")
        return _relax(function, _Resize(fields))(variables, *inputs, **kwargs)

    return relaxed


def _unjitted(function: Callable) -> Callable:
    """The function inside `jax.jit`, whose cache would skip the interceptor."""
    return function.__wrapped__ if isinstance(function, jax.stages.Wrapped) else function


def _relax(function: Callable, resize: _Resize) -> Callable:
    def relaxed(*args: PyTree, **kwargs: Any) -> PyTree:
        with nn.intercept_methods(resize):
            return function(*args, **kwargs)

    return relaxed


def _trace(function: Callable, reference: Callable, changed: dict, args: tuple, fields: Mapping) -> _Resize:
    """What the relaxed function calls, traced at the compact shapes. changed: (old, new) shapes by path."""
    first, error, resize = jax.eval_shape(reference, *args), None, _Resize(fields)
    try:
        second = jax.eval_shape(_relax(function, resize), *args)
    except Exception as raised:  # whatever the code of the network raises for sizes that it was not written for
        error = raised
    if not resize.modules:
        raise ValueError(
            f"{function} calls no Flax Linen module whose widths could be set (one inside a jax.jit that ran before is "
            "not seen); groups.elastic runs compact variables of any function."
        ) from error
    for pattern in fields:
        if not any(re.fullmatch(pattern, path) for path in resize.modules):
            raise ValueError(f"fields name {pattern!r}, which matches none of the modules {list(resize.modules)}.")
    if error is not None:
        text = " ".join(str(error).split()).rstrip(".")
        what = f"{repr(resize.failed) if resize.failed else 'its code'} raises {type(error).__name__}, {text}"
        raise _refusal(what, resize, changed, resize.failed or "") from error
    first, second = (jax.tree.map(lambda leaf: leaf.shape, shapes) for shapes in (first, second))
    if first != second:
        raise _refusal(f"its results have shapes {second} instead of {first}", resize, changed)
    for path, kind in resize.modules.items():
        query = "/".join(filter(None, ("params", path, "query/kernel")))
        old, new = changed.get(query, ((0,), (0,)))
        if issubclass(kind, nn.MultiHeadDotProductAttention) and old[-1] != new[-1]:
            raise _refusal(f"{path!r} has heads of {new[-1]} instead of {old[-1]} entries", resize, changed, path)
    return resize


def _check_sums(
    function: Callable, channels: groups.Channels, keep: groups.Keep, changed: dict, args: tuple, resize: _Resize
) -> None:
    """Raises ValueError if a removed channel is summed over: one of thousands would hardly change the results."""
    leaves, tree = jax.tree.flatten(args[0])
    full = [jax.ShapeDtypeStruct(own.shape, leaf.dtype) for own, leaf in zip(channels.shapes.values(), leaves)]
    frozen = groups.trace(function, jax.tree.unflatten(tree, full), *args[1:], sums="freeze")
    free: dict[tuple[str, int], set] = {}
    for group in frozen.groups.values():
        for member in group.members:
            free.setdefault((member.path, member.axis), set()).update(member.index.ravel().tolist())
    for name, own in keep.items():
        for member in channels.groups[name].members:
            removed = set(member.index[~np.asarray(own)].ravel().tolist())
            if removed - free.get((member.path, member.axis), set()):
                what = f"{member.path} loses entries of axis {member.axis}, which is summed over without weights"
                raise _refusal(what, resize, changed)


def _compare(
    function: Callable, reference: Callable, changed: dict, args: tuple, resize: _Resize, tolerance: float
) -> None:
    """Raises ValueError unless the relaxed function equals `reference` at random parameters."""
    relaxed, worst, size = _relax(function, resize), 0.0, 0.0
    both = jax.jit(lambda *args: (reference(*args), relaxed(*args)))
    for seed, gain in enumerate((1.0, 0.5)):  # the smaller one for results that saturate, such as probabilities
        for exact, found in zip(*map(jax.tree.leaves, both(*_draw(args, seed, gain)))):
            exact, found = (np.asarray(leaf).astype(np.float64) for leaf in (exact, found))
            if exact.size:
                largest = np.abs(exact).max()
                size = np.maximum(size, largest)
                with np.errstate(invalid="ignore"):
                    worst = np.maximum(worst, np.abs(exact - found).max() / (np.ptp(exact) or largest or 1.0))
    if not 0 < size < np.inf:
        what = f"its largest result at random parameters is {size:g}, so that nothing could be compared"
        raise _refusal(what, resize, changed)
    if not worst <= tolerance:
        what = f"its results differ from groups.elastic by {worst:.2g} of their range; allowed: {tolerance:g}"
        raise _refusal(what, resize, changed)


def _draw(args: tuple, seed: int, gain: float) -> tuple:
    """Variables and inputs at random: positive scales and variances, kernels that keep activations in range.

    By NumPy, which has nothing to compile for each shape.
    """
    rng = np.random.default_rng(seed)

    def variable(path: str, leaf: Any) -> jax.Array:
        small = len(leaf.shape) < 2 or path.rpartition("/")[-1] in ("scale", "var")
        if small and jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return any_of(leaf, gain * math.sqrt(2 / max(1, math.prod(leaf.shape[:-1]))))

    def any_of(leaf: Any, scale: float = 1.0) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)

    given = lambda leaf: leaf if not isinstance(leaf, jax.ShapeDtypeStruct) else any_of(leaf)
    return trees.map_named(variable, args[0]), *jax.tree.map(given, args[1:])


def _refusal(what: str, resize: _Resize, changed: dict, where: str = "") -> ValueError:
    """The error that names the modules at fault among those at or around the path `where`, and their arrays."""

    def inside(path: str, outer: str) -> bool:
        return not outer or f"{path}/".startswith(f"{outer}/")

    arrays = lambda module: [path for path in changed if inside(path.partition("/")[2], module)]
    near = {path: kind for path, kind in resize.modules.items() if inside(path, where) or inside(where, path)}
    known = lambda kind: next((text for base, text in REASONS.items() if issubclass(kind, base)), None)
    faults = {path: f"{path!r} ({kind.__name__}) {known(kind)}" for path, kind in near.items() if known(kind)}
    faults = {path: text for path, text in faults.items() if arrays(path)}
    paths = [path for module in faults or [where] for path in arrays(module)] or list(changed)
    paths.sort(key=lambda path: path.count("/"))  # those of the module itself first
    shapes = ", ".join(f"{path} {changed[path][0]} -> {changed[path][1]}" for path in paths[:4])
    return ValueError(
        f"the network is no Linen program of these widths: {what}. Reason: {'; '.join(faults.values()) or ELSEWHERE}. "
        f"Smaller arrays: {shapes}{' ...' if len(paths) > 4 else ''}. Keep their channels whole, or run them by "
        "groups.elastic, which is exact."
    )
