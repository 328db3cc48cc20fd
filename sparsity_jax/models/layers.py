"""Networks as steps, dense layers, and initialisers chosen by name, with PyTorch's numerics.

Images are `[batch, height, width, channels]`, dense kernels `[in, out]`. A network is a tuple of
steps, taken one after the other: each is called as `step(x, mode)` and creates the submodule of its
name. Those for images are in `convolutions`.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from sparsity_jax.tables import ConfigError
from sparsity_jax.types import Shape

__all__ = [
    "INITIALIZERS",
    "RELU",
    "Apply",
    "Dense",
    "Dropout",
    "Initializer",
    "Mode",
    "Network",
    "Plan",
    "Settings",
    "Steps",
    "at_least_float32",
    "flatten",
    "network",
    "take",
    "uniform_bias",
]


class Settings(NamedTuple):
    """What all layers of a network share."""

    init: str = "torch"  # row of INITIALIZERS
    dtype: np.dtype = jnp.dtype("float32")  # of activations and of the arithmetic
    param_dtype: np.dtype = jnp.dtype("float32")


class Initializer(NamedTuple):
    """How a layer starts: initialisers of kernels, and `bias(fan_in)`, that of a bias."""

    conv: Callable
    dense: Callable
    bias: Callable = lambda fan_in: nn.initializers.zeros


def uniform_bias(fan_in: int) -> Callable:
    """U(-b, b) with b = 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def uniform(key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform


_scaling = nn.initializers.variance_scaling
_torch = _scaling(1 / 3, "fan_in", "uniform")
_normal = _scaling(2.0, "fan_in", "normal")
_uniform_of_two = _scaling(2.0, "fan_in", "uniform")
_lecun = nn.initializers.lecun_normal()

# fan_in = (in / groups) * height * width, the inputs of one output; fan_out = out * height * width,
# groups or not.
INITIALIZERS = {
    # PyTorch's default: kernels and biases U(+-1 / sqrt(fan_in)), a variance of 1 / (3 fan_in).
    "torch": Initializer(_torch, _torch, uniform_bias),
    # He et al. 2015 (arXiv:1502.01852): N(0, 2 / fan_out) for convolutions, N(0, 2 / fan_in) for
    # dense, zero biases.
    "kaiming": Initializer(_scaling(2.0, "fan_out", "normal"), _normal),
    # The same with the variance 2 / fan_in throughout, normal or uniform: the two of the
    # geometric-limit study.
    "kaiming_normal": Initializer(_normal, _normal),
    "kaiming_uniform": Initializer(_uniform_of_two, _uniform_of_two),
    # Flax's default: normal of variance 1 / fan_in, cut at two standard deviations, zero biases.
    "flax": Initializer(_lecun, _lecun),
}


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """float32, or `dtype` where that is wider."""
    return jnp.promote_types(jnp.float32, dtype)


# Steps of a network -------------------------------------------------------------------------------


class Mode(NamedTuple):
    """How the steps of a network, or of a block of it, are taken."""

    settings: Settings
    train: bool
    numbers: collections.Counter  # of the steps so far, by name

    def named(self, name: str) -> str:
        """The name of a step, with its number for a `#`: conv1, conv2, ..., bn1, bn2, ..."""
        self.numbers[name] += 1
        return name.replace("#", str(self.numbers[name]))


Steps = tuple[Any, ...]  # callables (Array, Mode) -> Array


class Dense(NamedTuple):
    """`x @ kernel + bias` on the last axis. wide: in float32 at least."""

    width: int
    name: str = "dense#"
    wide: bool = False

    def __call__(self, x: Array, mode: Mode) -> Array:
        init, dtype, param_dtype = mode.settings
        layer = nn.Dense(
            self.width,
            kernel_init=INITIALIZERS[init].dense,
            bias_init=INITIALIZERS[init].bias(x.shape[-1]),
            dtype=at_least_float32(dtype) if self.wide else dtype,
            param_dtype=param_dtype,
            name=mode.named(self.name),
        )
        return layer(x)


class Dropout(NamedTuple):
    """Zeroes entries with probability `rate` in training, and divides the others by 1 - rate."""

    rate: float

    def __call__(self, x: Array, mode: Mode) -> Array:
        return nn.Dropout(self.rate, deterministic=not mode.train)(x) if self.rate else x


class Apply(NamedTuple):
    """`function(x, *arguments)`, without parameters."""

    function: Callable
    arguments: tuple = ()

    def __call__(self, x: Array, mode: Mode) -> Array:
        return self.function(x, *self.arguments)


RELU = Apply(nn.relu)


def take(steps: Steps, x: Array, mode: Mode) -> Array:
    """`x` after all `steps`."""
    for step in steps:
        x = step(x, mode)
    return x


# Whole networks -----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A network up to its last layer.

    smallest: side that images [batch, height, width, channels] need at least; 0: images of any
    shape are flattened first.
    """

    steps: Steps
    smallest: int = 1


class Network(nn.Module):
    """Images to logits: the steps of `plan`, then the dense layer `fc`, in float32 or wider."""

    num_classes: int
    settings: Settings
    plan: Plan

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        _check_images(images.shape, self.plan.smallest)
        x = jnp.asarray(images, self.settings.dtype)
        if not self.plan.smallest:
            x = flatten(x)
        mode = Mode(self.settings, train, collections.Counter())
        x = take(self.plan.steps, x, mode)
        return Dense(self.num_classes, "fc", wide=True)(x, mode)


def _check_images(shape: Shape, smallest: int) -> None:
    """Raises ConfigError for images that a `Network` cannot take."""
    needed = "[batch, ...] with at least two axes"
    fits = len(shape) >= 2
    if smallest:
        needed = (
            f"[batch, height, width, channels] with height and width at least {smallest}: larger "
            "images, or fewer max-pools and strides"
        )
        fits = len(shape) == 4 and min(shape[1:3]) >= smallest
    if not fits:
        raise ConfigError(f"images have the shape {shape}; this network needs {needed}.")


def flatten(x: Array) -> Array:
    """[batch, ...] to [batch, features]."""
    return x.reshape(x.shape[0], -1)


def network(
    plan: Callable[..., Plan], *fixed: Any, doc: str | None = None, **defaults: Any
) -> Callable[..., Network]:
    """The factory (num_classes, settings, *, options...) of networks of `plan(*fixed, *,
    options...)`, some options with other `defaults`.
    """
    preset = functools.partial(plan, *fixed, **defaults)

    def build(num_classes: int, settings: Settings, **options: Any) -> Network:
        return Network(num_classes, settings, preset(**options))

    functools.update_wrapper(build, plan)
    build.__dict__["__wrapped__"] = preset  # its signature has the defaults
    build.__doc__ = doc or plan.__doc__
    return build
