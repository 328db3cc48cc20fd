"""Networks of any framework as pure functions on nested dicts, which the rest of the library takes.

A factory may return a Flax Linen module, a pair of functions, or a function of a key that makes a
Flax NNX or an Equinox module.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from jax import Array, ShapeDtypeStruct, random
from jax.tree_util import tree_map_with_path

from sparsity_jax import trees
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import Fields, PyTree, Shape

__all__ = ["ALLOWED", "Functions", "functions_of"]

ALLOWED = (
    "a Flax Linen module, a pair of functions (init, apply), or a function of a key that makes a "
    "Flax NNX or Equinox module"
)


class Functions(NamedTuple):
    """A network. Variables are `{"params": ..., "batch_stats": ...}`, the latter {} without any."""

    init: Callable  # init(key, images) -> variables
    apply: Callable  # apply(variables, images, train, key) -> (logits, batch_stats)


def functions_of(made: Any) -> Functions:
    """The network that a factory made; its params and batch statistics are nested dicts by path.

    Raises ConfigError for anything but what is `ALLOWED`.
    """
    if isinstance(made, linen.Module):
        return Functions(*_of_linen(made))
    if isinstance(made, tuple) and len(made) == 2 and all(map(callable, made)):
        return _by_path(*made)
    is_module = isinstance(made, nnx.Module) or _is_equinox(type(made))
    if callable(made) and not is_module:
        return _by_path(*_of_constructor(made))
    why = "made already, so that all seeds would share its weights" if is_module else ""
    raise ConfigError("the model", type(made).__name__, why=why, allowed=ALLOWED)


def _of_linen(module: linen.Module) -> tuple[Callable, Callable]:
    def init(key: Array, images: Array) -> PyTree:
        return {"batch_stats": {}, **module.init(key, images)}

    def apply(variables: PyTree, images: Array, train: bool, key: Array | None) -> tuple:
        if not train:
            return module.apply(variables, images), variables.get("batch_stats", {})
        rngs = None if key is None else {"dropout": key}
        logits, updated = module.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return logits, updated.get("batch_stats", {})

    return init, apply


# Trees of any kind as nested dicts ----------------------------------------------------------------


def _by_path(init: Callable, apply: Callable) -> Functions:
    """The same functions on nested dicts."""

    def make(key: Array, images: Array) -> PyTree:
        made = init(key, images)
        if not isinstance(made, Mapping) or "params" not in made:
            allowed = "a dict of 'params' and, where there are any, 'batch_stats'"
            raise ConfigError("init(key, images)", why="gives no variables", allowed=allowed)
        return {"batch_stats": {}} | {name: _nested(tree) for name, tree in made.items()}

    @functools.cache
    def structure(shape: Shape, dtype: Any) -> PyTree:
        return jax.eval_shape(init, random.key(0), ShapeDtypeStruct(shape, dtype))

    def call(variables: PyTree, images: Array, train: bool, key: Array | None) -> tuple:
        like = structure((1, *images.shape[1:]), images.dtype)
        own = {name: _filled(tree, variables.get(name, {})) for name, tree in like.items()}
        logits, batch_stats = apply(own, images, train, key)
        return logits, _nested(batch_stats)

    return Functions(make, call)


def _nested(tree: PyTree) -> Fields:
    """The arrays of any tree in nested dicts, whose keys are the parts of their paths."""
    nested: Fields = {}
    for path, leaf in trees.plain_leaves(tree).items():
        *outer, last = path.split("/")
        functools.reduce(lambda part, name: part.setdefault(name, {}), outer, nested)[last] = leaf
    return nested


def _filled(tree: PyTree, nested: PyTree) -> PyTree:
    """`tree` with the arrays that nested dicts have at its paths."""
    given = trees.named_leaves(nested)
    return tree_map_with_path(lambda path, leaf: given.get(trees.plain_path(path), leaf), tree)


# Modules that a function of a key makes -----------------------------------------------------------


def _of_constructor(make: Callable) -> tuple[Callable, Callable]:
    @functools.cache
    def functions() -> tuple[Callable, Callable]:
        kinds: list[type] = []
        jax.eval_shape(lambda key: kinds.append(type(make(key))), random.key(0))
        (kind,) = kinds
        if issubclass(kind, nnx.Module):
            return _of_nnx(make)
        if _is_equinox(kind):
            return _of_equinox(make)
        raise ConfigError("the model", kind.__name__, why="made of a key", allowed=ALLOWED)

    def init(key: Array, images: Array) -> PyTree:
        return functions()[0](key, images)

    def apply(*arguments: Any) -> tuple:
        return functions()[1](*arguments)

    return init, apply


def _of_nnx(make: Callable) -> tuple[Callable, Callable]:
    """Called as `module(images)` after `module.train()` or `module.eval()`."""
    kinds = (nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    abstract = nnx.eval_shape(lambda: make(random.key(0)))
    parts: Any = nnx.split(abstract, *kinds)
    graph, _, _, streams, others = parts
    if jax.tree.leaves(others):
        path = next(iter(trees.plain_leaves(others)))
        allowed = "nnx.Param, nnx.BatchStat and random streams"
        raise ConfigError("the model", path, verb="has the variable", allowed=allowed)

    def init(key: Array, images: Array) -> PyTree:
        del images
        module = make(key)
        params = nnx.state(module, nnx.Param)
        return {"params": params, "batch_stats": nnx.state(module, nnx.BatchStat)}

    def apply(variables: PyTree, images: Array, train: bool, key: Array | None) -> tuple:
        root = random.key(0) if key is None else key
        begun = jax.tree.map(functools.partial(_begun, root), streams)
        module = nnx.merge(graph, variables["params"], variables["batch_stats"], begun)
        enter_mode = module.train if train else module.eval
        enter_mode()
        logits = module(images)
        return logits, nnx.state(module, nnx.BatchStat)

    return init, apply


def _begun(root: Array, leaf: Any) -> Array:
    """A random stream, or its count, at its beginning."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return root
    return jax.numpy.zeros(leaf.shape, leaf.dtype)


def _is_equinox(kind: type) -> bool:
    """Whether a class is a module of Equinox, which is imported where somebody uses it."""
    equinox = sys.modules.get("equinox")
    return equinox is not None and issubclass(kind, equinox.Module)


def _of_equinox(make: Callable) -> tuple[Callable, Callable]:
    """Called for one image each, as `module(image)`, with `state` where it has one, and with `key`
    where it takes one.
    """
    import equinox

    make_all = equinox.nn.make_with_state(make)
    like, state_like = equinox.filter_eval_shape(make_all, random.key(0))
    has_state = bool(jax.tree.leaves(state_like))
    takes_key = "key" in inspect.signature(type(like).__call__).parameters

    def init(key: Array, images: Array) -> PyTree:
        del images
        module, state = make_all(key)
        params = equinox.filter(module, equinox.is_inexact_array)
        return {"params": params, "batch_stats": state}

    def apply(variables: PyTree, images: Array, train: bool, key: Array | None) -> tuple:
        module = equinox.combine(variables["params"], static)
        state = variables["batch_stats"]
        root = random.key(0) if key is None else key
        keys = dict(key=random.split(root, len(images))) if takes_key else {}
        module = equinox.nn.inference_mode(module, not train)
        if not has_state:
            return jax.vmap(module, axis_name="batch")(images, **keys), state
        each = jax.vmap(module, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return each(images, state, **keys)

    is_param = lambda leaf: isinstance(leaf, ShapeDtypeStruct)
    static = jax.tree.map(lambda leaf: None if is_param(leaf) else leaf, like)
    return init, apply
