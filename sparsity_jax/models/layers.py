"""Layers with PyTorch's numerics on top of flax.linen: padding, batch norm, pooling, and
initialisers chosen by name.

Images are `[batch, height, width, channels]`, convolution kernels `[height, width, in / groups,
out]`, dense kernels `[in, out]`. A network is a tuple of steps, taken one after the other: each is
called as `step(x, mode)` and creates the submodule of its name.
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

from sparsity_jax import tables
from sparsity_jax.types import Shape


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
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


_scaling = nn.initializers.variance_scaling

# fan_in = (in / groups) * height * width, the inputs of one output; fan_out = out * height * width,
# groups or not.
INITIALIZERS = {
    # PyTorch's default: kernels and biases U(+-1 / sqrt(fan_in)), a variance of 1 / (3 fan_in).
    "torch": Initializer(
        _scaling(1 / 3, "fan_in", "uniform"), _scaling(1 / 3, "fan_in", "uniform"), uniform_bias
    ),
    # He et al. 2015 (arXiv:1502.01852): N(0, 2 / fan_out) for convolutions, N(0, 2 / fan_in) for
    # dense, zero biases.
    "kaiming": Initializer(_scaling(2.0, "fan_out", "normal"), _scaling(2.0, "fan_in", "normal")),
    # The same with the variance 2 / fan_in throughout, normal or uniform: the two of the
    # geometric-limit study.
    "kaiming_normal": Initializer(
        _scaling(2.0, "fan_in", "normal"), _scaling(2.0, "fan_in", "normal")
    ),
    "kaiming_uniform": Initializer(
        _scaling(2.0, "fan_in", "uniform"), _scaling(2.0, "fan_in", "uniform")
    ),
    # Flax's default: normal of variance 1 / fan_in, cut at two standard deviations, zero biases.
    "flax": Initializer(nn.initializers.lecun_normal(), nn.initializers.lecun_normal()),
}


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """float32, or `dtype` where that is wider."""
    return jnp.promote_types(jnp.float32, dtype)


# Layers -------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's statistics.

    Training normalises by the mean and the biased variance of the batch and moves the running
    statistics by a tenth towards the mean and the *unbiased* variance (Flax's own layer stores the
    biased one). Statistics and arithmetic are float32 or wider whatever `settings.dtype` is.
    params: scale, bias; batch_stats: mean, var; all [channels]. Raises ConfigError when training on
    a single value per channel, which has no variance.
    """

    settings: Settings

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        width, dtype = x.shape[-1:], at_least_float32(x.dtype)
        stats_dtype = at_least_float32(self.settings.param_dtype)
        scale = self.param("scale", nn.initializers.ones, width, self.settings.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, width, self.settings.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, width, stats_dtype)
        wide = x.astype(dtype)
        if train:
            count = x.size // x.shape[-1]  # values per channel
            if count < 2:
                raise tables.ConfigError(
                    f"batch norm {'/'.join(self.path)} gets the shape {tuple(x.shape)} in "
                    "training: one value per "
                    "channel has no variance. Use a larger batch or larger images."
                )
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            var = jnp.square(wide - mean).mean(axes)
            running_mean.value = 0.9 * running_mean.value + 0.1 * mean.astype(stats_dtype)
            running_var.value = 0.9 * running_var.value + 0.1 * (
                var * (count / (count - 1))
            ).astype(stats_dtype)
        else:
            mean, var = running_mean.value.astype(dtype), running_var.value.astype(dtype)
        y = (wide - mean) * (jax.lax.rsqrt(var + 1e-5) * scale.astype(dtype)) + bias.astype(dtype)
        return y.astype(x.dtype)


def upsample(x: Array, factor: int) -> Array:
    """Nearest neighbour: every pixel of [batch, height, width, channels] becomes `factor` x
    `factor` equal ones.
    """
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def max_pool(x: Array, size: int = 2) -> Array:
    """Maximum over `size` x `size` windows, stride 2; rows or columns that fill no window are
    dropped, as in PyTorch.

    [batch, height, width, channels] to [batch, (height - size) // 2 + 1, (width - size) // 2 + 1,
    channels]. Written with choices between two entries: on CPU the gradient of XLA's window
    reduction is 25 times slower. The gradient of `jnp.max` asks which entries equal the maximum:
    where XLA computes x twice, rounded differently, none does. A choice gives the gradient to one
    entry, of equal ones to the first, as PyTorch.
    """
    rows, columns = (x.shape[1] - size) // 2 + 1, (x.shape[2] - size) // 2 + 1
    x = functools.reduce(_larger, [x[:, i : i + 2 * rows - 1 : 2] for i in range(size)])
    return functools.reduce(_larger, [x[:, :, i : i + 2 * columns - 1 : 2] for i in range(size)])


def _larger(first: Array, second: Array) -> Array:
    """The larger entry of two arrays, NaN where one is."""
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def local_response_norm(x: Array, size: int = 2) -> Array:
    """PyTorch's local response normalisation with its defaults (alpha 1e-4, beta 0.75, k 1).

    Divides by (1 + 1e-4 * mean square of `size` neighbouring channels, missing ones zero) ** 0.75;
    an even `size` takes one more channel before than after. float32 or wider inside.
    """
    wide, channels = x.astype(at_least_float32(x.dtype)), x.shape[-1]
    squares = jnp.pad(jnp.square(wide), ((0, 0), (0, 0), (0, 0), (size // 2, (size - 1) // 2)))
    mean = sum(squares[..., i : i + channels] for i in range(size)) / size
    return (wide / (1 + 1e-4 * mean) ** 0.75).astype(x.dtype)


def global_average_pool(x: Array) -> Array:
    """Mean over height and width, in float32 or wider: [batch, channels]."""
    return x.astype(at_least_float32(x.dtype)).mean((1, 2))


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


class Conv(NamedTuple):
    """Convolution with a square kernel of odd `size`, padded by zeros on every side, as in PyTorch.

    padding: `size // 2` by default, which returns [batch, ceil(height / stride), ceil(width /
    stride), width]. (Flax's "SAME" differs: at stride 2 it pads an even image on one side only.)
    """

    width: int
    size: int
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    bias: bool = False
    name: str = "conv#"

    def __call__(self, x: Array, mode: Mode) -> Array:
        init = INITIALIZERS[mode.settings.init]
        padding = self.size // 2 if self.padding is None else self.padding
        return nn.Conv(
            self.width,
            (self.size, self.size),
            strides=(self.stride, self.stride),
            padding=((padding, padding), (padding, padding)),
            feature_group_count=self.groups,
            use_bias=self.bias,
            kernel_init=init.conv,
            bias_init=init.bias(self.size**2 * x.shape[-1] // self.groups),
            name=mode.named(self.name),
            dtype=mode.settings.dtype,
            param_dtype=mode.settings.param_dtype,
        )(x)


class Dense(NamedTuple):
    """`x @ kernel + bias` on the last axis. wide: in float32 at least."""

    width: int
    name: str = "dense#"
    wide: bool = False

    def __call__(self, x: Array, mode: Mode) -> Array:
        init, dtype = INITIALIZERS[mode.settings.init], mode.settings.dtype
        return nn.Dense(
            self.width,
            kernel_init=init.dense,
            bias_init=init.bias(x.shape[-1]),
            dtype=at_least_float32(dtype) if self.wide else dtype,
            param_dtype=mode.settings.param_dtype,
            name=mode.named(self.name),
        )(x)


class Norm(NamedTuple):
    """A `BatchNorm`."""

    name: str = "bn#"

    def __call__(self, x: Array, mode: Mode) -> Array:
        return BatchNorm(mode.settings, name=mode.named(self.name))(x, mode.train)


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


class Residual(NamedTuple):
    """The sum of two ways of `x`; one without steps passes it on."""

    first: Steps
    second: Steps

    def __call__(self, x: Array, mode: Mode) -> Array:
        y = take(self.first, x, mode)
        return y + take(self.second, x, mode)


class Block(NamedTuple):
    """Steps whose submodules lie in one of the block's name."""

    name: str
    steps: Steps

    def __call__(self, x: Array, mode: Mode) -> Array:
        return Sequence(mode.settings, self.steps, name=self.name)(x, mode.train)


RELU, RELU6 = Apply(nn.relu), Apply(nn.relu6)


def take(steps: Steps, x: Array, mode: Mode) -> Array:
    """`x` after all `steps`."""
    for step in steps:
        x = step(x, mode)
    return x


class Sequence(nn.Module):
    """Steps one after the other."""

    settings: Settings
    steps: Steps

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return take(self.steps, x, Mode(self.settings, train, collections.Counter()))


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
        check_images(images.shape, self.plan.smallest)
        x = jnp.asarray(images, self.settings.dtype)
        x = x if self.plan.smallest else flatten(x)
        steps = (*self.plan.steps, Dense(self.num_classes, "fc", wide=True))
        return take(steps, x, Mode(self.settings, train, collections.Counter()))


def check_images(shape: Shape, smallest: int) -> None:
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
        raise tables.ConfigError(f"images have the shape {shape}; this network needs {needed}.")


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
