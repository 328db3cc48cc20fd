"""Layers with PyTorch's numerics on top of flax.linen: padding, batch norm, pooling, and
initialisers chosen by name.

Images are `[batch, height, width, channels]`, convolution kernels `[height, width, in / groups,
out]`, dense kernels `[in, out]`. A network is a tuple of steps, taken one after the other: each is
called as `step(x, mode)` and creates the submodule of its name.
"""

import collections
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparsity_jax import tables


class Settings(NamedTuple):
    """What all layers of a network share."""

    init: str = "torch"  # row of INITIALIZERS
    dtype: np.dtype = jnp.dtype("float32")  # of activations and of the arithmetic
    param_dtype: np.dtype = jnp.dtype("float32")


class Initializer(NamedTuple):
    """How a layer starts: initialisers of kernels, and `bias(fan_in)`, that of a bias."""

    conv: Callable
    dense: Callable
    bias: Callable


def uniform_bias(fan_in: int) -> Callable:
    """U(-b, b) with b = 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def zero_bias(fan_in: int) -> Callable:
    del fan_in
    return nn.initializers.zeros


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
    "kaiming": Initializer(
        _scaling(2.0, "fan_out", "normal"), _scaling(2.0, "fan_in", "normal"), zero_bias
    ),
    # The same with the variance 2 / fan_in throughout, normal or uniform: the two of the
    # geometric-limit study.
    "kaiming_normal": Initializer(
        _scaling(2.0, "fan_in", "normal"), _scaling(2.0, "fan_in", "normal"), zero_bias
    ),
    "kaiming_uniform": Initializer(
        _scaling(2.0, "fan_in", "uniform"), _scaling(2.0, "fan_in", "uniform"), zero_bias
    ),
    # Flax's default: normal of variance 1 / fan_in, cut at two standard deviations, zero biases.
    "flax": Initializer(nn.initializers.lecun_normal(), nn.initializers.lecun_normal(), zero_bias),
}


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """float32, or `dtype` where that is wider."""
    return jnp.promote_types(jnp.float32, dtype)


# Layers -------------------------------------------------------------------------------------------


def dense(x: jax.Array, features: int, *, settings: Settings, name: str) -> jax.Array:
    """`x @ kernel + bias` on the last axis, in `settings.dtype`."""
    init = INITIALIZERS[settings.init]
    return nn.Dense(
        features,
        kernel_init=init.dense,
        bias_init=init.bias(x.shape[-1]),
        dtype=settings.dtype,
        param_dtype=settings.param_dtype,
        name=name,
    )(x)


def classifier(x: jax.Array, num_classes: int, *, settings: Settings) -> jax.Array:
    """The last layer, always named `fc`: [batch, features] to logits, in float32 or wider."""
    wide = settings._replace(dtype=at_least_float32(settings.dtype))
    return dense(x, num_classes, settings=wide, name="fc")


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
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
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


def upsample(x: jax.Array, factor: int) -> jax.Array:
    """Nearest neighbour: every pixel of [batch, height, width, channels] becomes `factor` x
    `factor` equal ones.
    """
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
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


def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
    """The larger entry of two arrays, NaN where one is."""
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def local_response_norm(x: jax.Array, size: int = 2) -> jax.Array:
    """PyTorch's local response normalisation with its defaults (alpha 1e-4, beta 0.75, k 1).

    Divides by (1 + 1e-4 * mean square of `size` neighbouring channels, missing ones zero) ** 0.75;
    an even `size` takes one more channel before than after. float32 or wider inside.
    """
    wide, channels = x.astype(at_least_float32(x.dtype)), x.shape[-1]
    squares = jnp.pad(jnp.square(wide), ((0, 0), (0, 0), (0, 0), (size // 2, (size - 1) // 2)))
    mean = sum(squares[..., i : i + channels] for i in range(size)) / size
    return (wide / (1 + 1e-4 * mean) ** 0.75).astype(x.dtype)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over height and width, in float32 or wider: [batch, channels]."""
    return x.astype(at_least_float32(x.dtype)).mean((1, 2))


# Steps of a network -------------------------------------------------------------------------------


class Mode(NamedTuple):
    """How the steps of a network are taken."""

    settings: Settings
    train: bool


Steps = tuple[Callable[[jax.Array, Mode], jax.Array], ...]


@dataclass(frozen=True)
class Conv:
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

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        settings = mode.settings
        init = INITIALIZERS[settings.init]
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
            name=self.name,
            dtype=settings.dtype,
            param_dtype=settings.param_dtype,
        )(x)


@dataclass(frozen=True)
class Dense:
    """A `dense` layer."""

    width: int
    name: str = "dense#"

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return dense(x, self.width, settings=mode.settings, name=self.name)


@dataclass(frozen=True)
class Norm:
    """A `BatchNorm`."""

    name: str = "bn#"

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return BatchNorm(mode.settings, name=self.name)(x, mode.train)


@dataclass(frozen=True)
class Dropout:
    """Zeroes entries with probability `rate` in training, and divides the others by 1 - rate."""

    rate: float

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not mode.train)(x) if self.rate else x


@dataclass(frozen=True)
class Apply:
    """`function(x, *arguments)`, without parameters."""

    function: Callable
    arguments: tuple = ()

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return self.function(x, *self.arguments)


@dataclass(frozen=True)
class Residual:
    """The sum of two ways of `x`; one without steps passes it on."""

    first: Steps
    second: Steps

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = take(self.first, x, mode)
        return y + take(self.second, x, mode)


@dataclass(frozen=True)
class Block:
    """Steps whose submodules lie in one of the block's name."""

    name: str
    steps: Steps

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return Sequence(mode.settings, self.steps, name=self.name)(x, mode.train)


RELU, RELU6 = Apply(nn.relu), Apply(nn.relu6)


def take(steps: Steps, x: jax.Array, mode: Mode) -> jax.Array:
    """`x` after all `steps`."""
    for step in steps:
        x = step(x, mode)
    return x


def numbered(*steps: Any) -> Steps:
    """The steps, with numbers for the `#` in their names: conv1, conv2, ..., bn1, bn2, ..."""
    counts: collections.Counter[str] = collections.Counter()
    named = []
    for step in steps:
        name = getattr(step, "name", "")
        if "#" in name:
            counts[name] += 1
            step = replace(step, name=name.replace("#", str(counts[name])))
        named.append(step)
    return tuple(named)


class Sequence(nn.Module):
    """Steps one after the other."""

    settings: Settings
    steps: Steps

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return take(self.steps, x, Mode(self.settings, train))


class Network(nn.Module):
    """Images to logits: `steps`, then `fc`.

    smallest: side that images [batch, height, width, channels] need at least; 0: images of any
    shape are flattened first.
    """

    num_classes: int
    settings: Settings
    steps: Steps
    smallest: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        check_images(images.shape, self.smallest)
        x = jnp.asarray(images, self.settings.dtype)
        x = take(self.steps, x if self.smallest else flatten(x), Mode(self.settings, train))
        return classifier(x, self.num_classes, settings=self.settings)


def check_images(shape: tuple[int, ...], smallest: int) -> None:
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


def flatten(x: jax.Array) -> jax.Array:
    """[batch, ...] to [batch, features]."""
    return x.reshape(x.shape[0], -1)


# Presets ------------------------------------------------------------------------------------------


def preset(
    factory: Callable, name: str, doc: str, fixed: Mapping[str, Any] = {}, **defaults: Any
) -> Callable:
    """`factory` as a network of its own: some options `fixed`, others with other defaults."""

    @functools.wraps(factory)
    def build(num_classes: int, settings: Settings, **options: Any) -> nn.Module:
        return factory(num_classes, settings, **fixed, **{**defaults, **options})

    signature = inspect.signature(factory)
    options = [
        option.replace(default=defaults.get(option.name, option.default))
        for option in signature.parameters.values()
        if option.name not in fixed
    ]
    build.__dict__["__signature__"] = signature.replace(parameters=options)
    build.__name__ = build.__qualname__ = name
    build.__doc__ = doc
    return build
