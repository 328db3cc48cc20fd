"""Steps for images, with PyTorch's numerics: convolutions and their padding, batch norm, pooling,
blocks and shortcuts.

Images are `[batch, height, width, channels]`, convolution kernels `[height, width, in / groups,
out]`.
"""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sparsity_jax.models.layers import (
    INITIALIZERS,
    Apply,
    Mode,
    Settings,
    Steps,
    at_least_float32,
    take,
)
from sparsity_jax.tables import ConfigError

__all__ = [
    "GLOBAL_AVERAGE",
    "RELU6",
    "BatchNorm",
    "Block",
    "Conv",
    "Norm",
    "Residual",
    "Sequence",
    "global_average_pool",
    "local_response_norm",
    "max_pool",
    "upsample",
]

RELU6 = Apply(nn.relu6)


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
        init, dtype, param_dtype = mode.settings
        padding = self.size // 2 if self.padding is None else self.padding
        fan_in = self.size**2 * x.shape[-1] // self.groups
        layer = nn.Conv(
            self.width,
            (self.size,) * 2,
            strides=(self.stride,) * 2,
            padding=((padding, padding),) * 2,
            feature_group_count=self.groups,
            use_bias=self.bias,
            kernel_init=INITIALIZERS[init].conv,
            bias_init=INITIALIZERS[init].bias(fan_in),
            name=mode.named(self.name),
            dtype=dtype,
            param_dtype=param_dtype,
        )
        return layer(x)


class Norm(NamedTuple):
    """A `BatchNorm`."""

    name: str = "bn#"

    def __call__(self, x: Array, mode: Mode) -> Array:
        return BatchNorm(mode.settings, name=mode.named(self.name))(x, mode.train)


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
        width = x.shape[-1:]
        dtype = at_least_float32(x.dtype)
        param_dtype = self.settings.param_dtype
        stats_dtype = at_least_float32(param_dtype)
        scale = self.param("scale", nn.initializers.ones, width, param_dtype)
        bias = self.param("bias", nn.initializers.zeros, width, param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, width, stats_dtype)
        wide = x.astype(dtype)
        if train:
            count = x.size // x.shape[-1]  # values per channel
            if count < 2:
                raise ConfigError(
                    f"batch norm {'/'.join(self.path)} gets the shape {tuple(x.shape)} in "
                    "training: one value per channel has no variance. Use a larger batch or larger "
                    "images."
                )
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            var = jnp.square(wide - mean).mean(axes)
            unbiased = var * (count / (count - 1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                running.value = 0.9 * running.value + 0.1 * new.astype(stats_dtype)
        else:
            mean = running_mean.value.astype(dtype)
            var = running_var.value.astype(dtype)
        factor = jax.lax.rsqrt(var + 1e-5) * scale.astype(dtype)
        y = (wide - mean) * factor + bias.astype(dtype)
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
    for axis in (1, 2):
        windows = (x.shape[axis] - size) // 2 + 1
        slices = []
        for first in range(size):
            last = first + 2 * windows - 1
            slices.append(jax.lax.slice_in_dim(x, first, last, stride=2, axis=axis))
        x = functools.reduce(_larger, slices)
    return x


def _larger(first: Array, second: Array) -> Array:
    """The larger entry of two arrays, NaN where one is."""
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def local_response_norm(x: Array, size: int = 2) -> Array:
    """PyTorch's local response normalisation with its defaults (alpha 1e-4, beta 0.75, k 1).

    Divides by (1 + 1e-4 * mean square of `size` neighbouring channels, missing ones zero) ** 0.75;
    an even `size` takes one more channel before than after. float32 or wider inside.
    """
    wide = _widened(x)
    channels = x.shape[-1]
    before = size // 2
    after = (size - 1) // 2
    none = (0, 0)
    widths = (none, none, none, (before, after))
    squares = jnp.pad(jnp.square(wide), widths)
    slices = [squares[..., i : i + channels] for i in range(size)]
    mean = sum(slices) / size
    divisor = (1 + 1e-4 * mean) ** 0.75
    return (wide / divisor).astype(x.dtype)


def global_average_pool(x: Array) -> Array:
    """Mean over height and width, in float32 or wider: [batch, channels]."""
    return _widened(x).mean((1, 2))


def _widened(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))


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


class Sequence(nn.Module):
    """Steps one after the other."""

    settings: Settings
    steps: Steps

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return take(self.steps, x, Mode(self.settings, train, collections.Counter()))


GLOBAL_AVERAGE = Apply(global_average_pool)
