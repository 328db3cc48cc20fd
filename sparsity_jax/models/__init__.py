"""The model zoo: flax.linen networks as pure functions on `{"params": ..., "batch_stats": ...}`.

No other part of the library knows these classes: every algorithm takes a pytree and a callable.

Module names are stable, so that rules can match paths: `conv1`, `bn1`, `stage1_block0/conv1`,
`stage2_block0/shortcut_conv`, `block3/depthwise`, and the last layer of every network is `fc`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sparsity_jax import tables
from sparsity_jax.models import cnn, layers, mlp, mobilenet, resnet, vgg

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

# Name to factory(num_classes, settings, *, options...) -> flax.linen.Module, called as
# module(images, train).
MODELS = {
    "mlp": mlp.mlp,
    "fc2": mlp.fc2,
    "fc5": mlp.fc5,
    "fc12": mlp.fc12,
    "fc13": mlp.fc13,
    "mlp7": mlp.mlp7,
    "small_cnn": cnn.small_cnn,
    "lenet": cnn.lenet,
    "lenet5": cnn.lenet5,
    "cnet": cnn.cnet,
    "alexnet": cnn.alexnet,
    "alexnet_cifar": cnn.alexnet_cifar,
    "alexnet_bn": cnn.alexnet_bn,
    "vgg": vgg.vgg,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
    "resnet": resnet.resnet,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet20": resnet.resnet20,
    "resnet56": resnet.resnet56,
    "preact_resnet18": resnet.preact_resnet18,
    "wrn": resnet.wrn,
    "mobilenet": mobilenet.mobilenet,
    "mobilenet_v2": mobilenet.mobilenet_v2,
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
    factory = tables.lookup(MODELS, name, "name")
    tables.lookup(layers.INITIALIZERS, init, "init")
    num_classes = tables.convert(num_classes, tables.Count, "num_classes")
    tables.convert(dtype, Dtype, "dtype")
    tables.convert(param_dtype, Dtype, "param_dtype")
    options = tables.check_options(factory, options)
    settings = layers.Settings(init, jnp.dtype(dtype), jnp.dtype(param_dtype))
    module = factory(num_classes, settings, **options)
    dropout = options.get("dropout", 0.0)

    def check_precision():
        if "float64" in (dtype, param_dtype) and not jax.config.jax_enable_x64:
            raise tables.ConfigError(
                f"{name} was built with dtype {dtype} and param_dtype {param_dtype}, but jax runs "
                "in 32 bits; set "
                "jax_enable_x64 or call it inside `with jax.enable_x64(True):`."
            )

    def create(key, shape):
        return module.init(key, jnp.zeros(shape, settings.dtype))

    create = jax.jit(
        create, static_argnums=1
    )  # the forward pass only finds shapes: compiling drops it

    def initialise(key, images):
        check_precision()
        return {"batch_stats": {}, **create(key, images.shape)}

    def apply(variables, images):
        check_precision()
        return module.apply(variables, images)

    def apply_train(variables, images, key=None):
        check_precision()
        if dropout and key is None:
            raise ValueError(f"{name} has dropout {dropout}: apply_train needs a key.")
        rngs = None if key is None else {"dropout": key}
        logits, updated = module.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return logits, updated.get("batch_stats", {})

    return Model(initialise, apply, apply_train, settings.dtype)
