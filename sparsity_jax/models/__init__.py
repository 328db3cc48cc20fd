"""The model zoo: networks as pure functions on `{"params": ..., "batch_stats": ...}`.

No other part of the library knows these classes: every algorithm takes a pytree and a callable.

Module names are stable, so that rules can match paths: `conv1`, `bn1`, `stage1_block0/conv1`,
`stage2_block0/shortcut_conv`, `block3/depthwise`, and the last layer of every network is `fc`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax.models import cnn, frameworks, mlp, mobilenet, resnet, vgg
from sparsity_jax.models.layers import INITIALIZERS, Settings
from sparsity_jax.tables import ConfigError, Count, check_options, convert, defaults, lookup
from sparsity_jax.types import Config, Fields, PyTree, Shape

__all__ = ["MODELS", "Dtype", "Model", "build", "complete"]

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

# Name to factory(num_classes, settings, *, options...) -> what `frameworks.functions_of` takes.
MODELS: dict[str, Callable] = {
    **mlp.MODELS,
    **cnn.MODELS,
    **vgg.MODELS,
    **resnet.MODELS,
    **mobilenet.MODELS,
}


class Model(NamedTuple):
    """A network as functions. images: [batch, height, width, channels]; logits: [batch,
    num_classes], >= float32.

    `variables` is `{"params": ..., "batch_stats": ...}`; "batch_stats" is {} for a network without
    batch norm.
    """

    init: Callable  # init(key, images) -> variables; of the images only the shape matters
    apply: Callable  # apply(variables, images) -> logits; inference: running statistics, no dropout
    # apply_train(variables, images, key=None) -> (logits, new batch_stats); key for dropout
    apply_train: Callable
    dtype: Any = jnp.float32  # of its arithmetic


def build(
    *,
    name: str,
    num_classes: int,
    init: str = "torch",
    dtype: str = "float32",
    param_dtype: str = "float32",
    **options: Any,
) -> Model:
    """The network `name` of MODELS as a `Model`.

    init: row of `layers.INITIALIZERS`. dtype: of activations and arithmetic (batch norm, pooling
    before `fc` and `fc` itself stay in float32 or wider). param_dtype: of params; running
    statistics are float32 or wider. options: those of the factory, e.g. `widths`. Raises
    ConfigError for anything unknown or out of range; "float64" needs `jax.enable_x64`, which is
    checked when the functions are called.
    """
    factory = lookup(MODELS, name, "name")
    lookup(INITIALIZERS, init, "init")
    num_classes = convert(num_classes, Count, "num_classes")
    convert(dtype, Dtype, "dtype")
    convert(param_dtype, Dtype, "param_dtype")
    options = check_options(factory, options)
    settings = Settings(init, jnp.dtype(dtype), jnp.dtype(param_dtype))
    network = frameworks.functions_of(factory(num_classes, settings, **options))
    dropout = options.get("dropout", 0.0)

    def checked() -> frameworks.Functions:
        """The network, where jax computes in its precision."""
        if "float64" in (dtype, param_dtype) and not jax.config.read("jax_enable_x64"):
            raise ConfigError(
                f"{name} was built with dtype {dtype} and param_dtype {param_dtype}, but jax runs "
                "in 32 bits; set jax_enable_x64 or call it inside `with jax.enable_x64(True):`."
            )
        return network

    # the forward pass only finds shapes: compiling drops it
    @functools.partial(jax.jit, static_argnums=1)
    def create(key: Array, shape: Shape) -> PyTree:
        return network.init(key, jnp.zeros(shape, settings.dtype))

    def initialise(key: Array, images: Any) -> PyTree:
        checked()
        return create(key, images.shape)

    def apply(variables: PyTree, images: Array) -> Array:
        return checked().apply(variables, images, False, None)[0]

    def apply_train(
        variables: PyTree, images: Array, key: Array | None = None
    ) -> tuple[Array, PyTree]:
        if dropout and key is None:
            raise ValueError(f"{name} has dropout {dropout}: apply_train needs a key.")
        return checked().apply(variables, images, True, key)

    return Model(initialise, apply, apply_train, settings.dtype)


def complete(model: Config) -> Fields:
    """`model` with the defaults of the options that it lacks: a config's, or those of an older
    version's run.
    """
    factory = MODELS.get(model.get("name", ""))
    own = defaults(factory) if factory else {}
    return {**defaults(build), **own, **model}
