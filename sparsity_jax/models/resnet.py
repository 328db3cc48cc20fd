"""Residual networks for small images (He et al. 2016, arXiv:1512.03385 and 1603.05027), plain and
pre-activation.
"""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sparsity_jax.models.convolutions import GLOBAL_AVERAGE, Block, Conv, Norm, Residual
from sparsity_jax.models.layers import RELU, Apply, Plan, Steps, network
from sparsity_jax.tables import ConfigError, Count

__all__ = ["MODELS", "Kind", "Shortcut", "Stem", "of_stages", "resnet", "wrn", "zero_pad_shortcut"]

Shortcut = Literal["projection", "zero_pad"]
Stem = Literal["cifar", "imagenet"]
Kind = Literal["basic", "bottleneck", "preact"]
_EXPANSION = {"basic": 1, "bottleneck": 4, "preact": 1}  # of the widths of blocks


def zero_pad_shortcut(x: Array, features: int, stride: int) -> Array:
    """He et al.'s option A, no parameters: every `stride`-th pixel, zero channels half before and
    half after.
    """
    missing = features - x.shape[-1]
    before = missing // 2
    pixels = x[:, ::stride, ::stride]
    none = (0, 0)
    widths = (none, none, none, (before, missing - before))
    return jnp.pad(pixels, widths)


def _residual(
    kind: Kind, inside: int, channels: int, width: int, stride: int, shortcut: Shortcut
) -> Steps:
    """A block of `inside` channels inside that makes `channels` of its input to `width`.

    basic: conv1 3x3, bn1, ReLU, conv2 3x3, bn2, plus the shortcut, ReLU. bottleneck: conv1 1x1,
    bn1, ReLU, conv2 3x3, bn2, ReLU, conv3 1x1, bn3, plus the shortcut, ReLU. preact: bn1, ReLU,
    conv1 3x3, bn2, ReLU, conv2 3x3, plus the shortcut; one that changes the shape starts from the
    first activation and has no batch norm. stride: of the first 3x3 convolution. A block that keeps
    image size and channels adds its input unchanged.
    """
    begin = (Norm(), RELU)
    first = Conv(inside, 3, stride)
    way: Steps = (first, *begin, Conv(width, 3))
    if kind == "bottleneck":
        way = (Conv(inside, 1), *begin, first, *begin, Conv(width, 1))
    other: Steps = ()
    if stride > 1 or channels != width:
        other = (Conv(width, 1, stride, name="shortcut_conv"), Norm("shortcut_bn"))
        if shortcut == "zero_pad":
            other = (Apply(zero_pad_shortcut, (width, stride)),)
    if kind != "preact":
        return (Residual((*way, Norm()), other), RELU)
    if other:
        return (*begin, Residual(other[:1], way))
    return (Residual((), (*begin, *way)),)


def resnet(
    *,
    stage_sizes: tuple[Count, ...] = (3, 3, 3),
    widths: tuple[Count, ...] = (16, 32, 64),
    block: Kind = "basic",
    shortcut: Shortcut = "projection",
    stem: Stem = "cifar",
    stem_width: Count | None = None,
    inner_widths: tuple[Count, ...] | None = None,
) -> Plan:
    """A residual network: `stage_sizes[i]` blocks of `widths[i]` channels (bottleneck blocks put
    out four times that), named stage{i}_block{j}, i from 1, j from 0.

    The first block of every stage but the first halves the image. `stem`: 3x3 convolution, or the
    7x7 of stride 2 and 3x3 max-pool of stride 2 for large images; its width is `stem_width`, by
    default `widths[0]`. `inner_widths`: one width per block, in order, for the channels inside it
    (by default those of its stage): networks with thinned blocks. `shortcut`: how a block that
    changes the shape passes its input on: 1x1 convolution (with batch norm, except pre-activation),
    or subsampling with zero channels. Pre-activation networks have no bn1 but final_bn and ReLU
    after the blocks. Raises ConfigError where these do not fit together.
    """
    if not stage_sizes:
        raise ConfigError("stage_sizes", stage_sizes, allowed="at least one stage")
    if len(stage_sizes) != len(widths):
        raise ConfigError("widths", widths, allowed=f"{len(stage_sizes)}, one per stage")
    if inner_widths is not None and len(inner_widths) != sum(stage_sizes):
        allowed = f"{sum(stage_sizes)}, one per block"
        raise ConfigError("inner_widths", inner_widths, allowed=allowed)
    channels = stem_width or widths[0]
    outer = [width * _EXPANSION[block] for width in widths]
    if shortcut == "zero_pad" and [channels, *outer] != sorted([channels, *outer]):
        why = f"and the channels go {channels}, {outer}"
        allowed = "channels that never decrease, or 'projection'"
        raise ConfigError("shortcut", shortcut, why=why, allowed=allowed)
    norm = () if block == "preact" else (Norm(), RELU)
    steps: Steps = (Conv(channels, 3), *norm)
    if stem == "imagenet":
        steps = (Conv(channels, 7, 2), *norm, Apply(_padded_max_pool))
    thinned = iter(inner_widths or ())
    for i, width in enumerate(outer):
        for j in range(stage_sizes[i]):
            inside = next(thinned, widths[i])
            stride = 2 if i > 0 and j == 0 else 1
            way = _residual(block, inside, channels, width, stride, shortcut)
            steps += (Block(f"stage{i + 1}_block{j}", way),)
            channels = width
    if block == "preact":
        steps += (Norm("final_bn"), RELU)
    return Plan((*steps, GLOBAL_AVERAGE))


def _padded_max_pool(x: Array) -> Array:
    """3x3 windows of stride 2, one pixel beyond every side."""
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


def of_stages(
    stage_sizes: tuple[int, ...],
    block: Kind,
    *,
    width: Count = 64,
    shortcut: Shortcut = "projection",
    stem: Stem = "cifar",
) -> Plan:
    """A `resnet` whose stages are `width`, 2, 4, ... times that wide."""
    widths = tuple(width * 2**i for i in range(len(stage_sizes)))
    return resnet(stage_sizes=stage_sizes, widths=widths, block=block, shortcut=shortcut, stem=stem)


def wrn(*, depth: Count = 16, widening: Count = 2) -> Plan:
    """Wide residual network WRN-`depth`-`widening` (Zagoruyko and Komodakis 2016,
    arXiv:1605.07146).

    A stem of 16, then three stages of (depth - 4) / 6 pre-activation blocks, 16, 32 and 64 times
    `widening` wide. The default is the network of the growing-regularisation study: 691,674
    parameters with 10 classes. Raises ConfigError for a depth that is not 10, 16, 22, ...
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ConfigError("depth", depth, allowed="6 n + 4, e.g. 10, 16, 22, 28, 40")
    widths = (16 * widening, 32 * widening, 64 * widening)
    return resnet(stage_sizes=(blocks,) * 3, widths=widths, block="preact", stem_width=16)


MODELS = dict(
    resnet=network(resnet),
    wrn=network(wrn),
    resnet18=network(
        of_stages,
        (2, 2, 2, 2),
        "basic",
        doc="ResNet-18 of `width`, 2, 4, 8 times that: 11,173,962 parameters with 10 classes, "
        "11,220,132 with 100.",
    ),
    resnet34=network(
        of_stages,
        (3, 4, 6, 3),
        "basic",
        doc="ResNet-34: 21,328,292 parameters with 100 classes; 21,797,672 with the imagenet stem "
        "and 1,000.",
    ),
    resnet50=network(
        of_stages,
        (3, 4, 6, 3),
        "bottleneck",
        doc="ResNet-50, bottleneck blocks: 23,520,842 parameters with 10 classes, 23,705,252 with "
        "100; 25,557,032 with the imagenet stem and 1,000.",
    ),
    preact_resnet18=network(
        of_stages,
        (2, 2, 2, 2),
        "preact",
        doc="Pre-activation ResNet-18: 11,172,170 parameters with 10 classes.",
    ),
    resnet20=network(
        of_stages,
        (3, 3, 3),
        "basic",
        doc="CIFAR ResNet-20, three stages of `width` 16: 269,722 parameters with 10 classes and "
        "zero_pad shortcuts.",
        width=16,
        shortcut="zero_pad",
    ),
    resnet56=network(
        of_stages,
        (9, 9, 9),
        "basic",
        doc="CIFAR ResNet-56, three stages of `width` 16. Growing regularisation uses zero_pad "
        "shortcuts (853,018 parameters with 10 classes), the gradient-flow study projections "
        "(861,620 with 100).",
        width=16,
        shortcut="zero_pad",
    ),
)
