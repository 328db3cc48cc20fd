"""Residual networks for small images (He et al. 2016, arXiv:1512.03385 and 1603.05027), plain and
pre-activation.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers
from sparsity_jax.models.layers import RELU, Conv, Norm

Shortcut = Literal["projection", "zero_pad"]
Stem = Literal["cifar", "imagenet"]
EXPANSION = {"basic": 1, "bottleneck": 4, "preact": 1}  # of the widths of blocks


def zero_pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """He et al.'s option A, no parameters: every `stride`-th pixel, zero channels half before and
    half after.
    """
    missing = features - x.shape[-1]
    if missing < 0:
        raise ValueError(
            f"a zero_pad shortcut cannot go from {x.shape[-1]} to {features} channels; use "
            "projection."
        )
    before = missing // 2
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (before, missing - before)))


def residual(
    kind: str, inside: int, channels: int, width: int, stride: int, shortcut: str
) -> layers.Steps:
    """A block of `inside` channels inside that makes `channels` of its input to `width`.

    basic: conv1 3x3, bn1, ReLU, conv2 3x3, bn2, plus the shortcut, ReLU. bottleneck: conv1 1x1,
    bn1, ReLU, conv2 3x3, bn2, ReLU, conv3 1x1, bn3, plus the shortcut, ReLU. preact: bn1, ReLU,
    conv1 3x3, bn2, ReLU, conv2 3x3, plus the shortcut; one that changes the shape starts from the
    first activation and has no batch norm. stride: of the first 3x3 convolution. A block that keeps
    image size and channels adds its input unchanged.
    """
    between = (Norm(), RELU)
    first, last = Conv(inside, 3, stride), Conv(width, 3)
    if kind == "preact":
        way = layers.numbered(*between, first, *between, last)
    elif kind == "basic":
        way = layers.numbered(first, *between, last, Norm())
    else:
        narrow, wide = Conv(inside, 1), Conv(width, 1)
        way = layers.numbered(narrow, *between, first, *between, wide, Norm())
    other: layers.Steps = ()
    if stride > 1 or channels != width:
        other = (Conv(width, 1, stride, name="shortcut_conv"), Norm("shortcut_bn"))
        if shortcut == "zero_pad":
            other = (layers.Apply(zero_pad_shortcut, (width, stride)),)
    if kind != "preact":
        return (layers.Residual(way, other), RELU)
    if not other:
        return (layers.Residual((), way),)
    return (*way[:2], layers.Residual(other[:1], way[2:]))


class ResNet(layers.Network):
    """conv1 (bn1, ReLU); stage{i}_block{j} (i from 1, j from 0); global average pool; `fc`.

    Pre-activation networks have no bn1 but final_bn and ReLU after the blocks.
    """


def resnet(
    num_classes: int,
    settings: layers.Settings,
    *,
    stage_sizes: tuple[tables.Count, ...] = (3, 3, 3),
    widths: tuple[tables.Count, ...] = (16, 32, 64),
    block: Literal["basic", "bottleneck", "preact"] = "basic",
    shortcut: Shortcut = "projection",
    stem: Stem = "cifar",
    stem_width: tables.Count | None = None,
    inner_widths: tuple[tables.Count, ...] | None = None,
) -> nn.Module:
    """A residual network: `stage_sizes[i]` blocks of `widths[i]` channels (bottleneck blocks put
    out four times that).

    The first block of every stage but the first halves the image. `stem`: 3x3 convolution, or the
    7x7 of stride 2 and 3x3 max-pool of stride 2 for large images; its width is `stem_width`, by
    default `widths[0]`. `inner_widths`: one width per block, in order, for the channels inside it
    (by default those of its stage): networks with thinned blocks. `shortcut`: how a block that
    changes the shape passes its input on: 1x1 convolution (with batch norm, except pre-activation),
    or subsampling with zero channels. Raises ConfigError where these do not fit together.
    """
    if not stage_sizes:
        raise tables.ConfigError("config.model.stage_sizes is empty; allowed: at least one stage.")
    if len(stage_sizes) != len(widths):
        raise tables.ConfigError(
            f"config.model.widths has {len(widths)} entries; allowed: one per entry of "
            f"stage_sizes, {len(stage_sizes)}."
        )
    stages = [i for i, count in enumerate(stage_sizes) for _ in range(count)]  # of each block
    if inner_widths is None:
        inner_widths = tuple(widths[i] for i in stages)
    if len(inner_widths) != len(stages):
        raise tables.ConfigError(
            f"config.model.inner_widths has {len(inner_widths)} entries; allowed: one per block, "
            f"{len(stages)}."
        )
    stem_width = stem_width or widths[0]
    outer = (stem_width, *(width * EXPANSION[block] for width in widths))
    if shortcut == "zero_pad" and list(outer) != sorted(outer):
        raise tables.ConfigError(
            f"config.model.shortcut is 'zero_pad' and the channels go {outer}; allowed: channels "
            "that never decrease, "
            "or 'projection'."
        )
    norm = () if block == "preact" else (Norm(), RELU)
    steps: list[Any] = [Conv(stem_width, 3), *norm]
    if stem == "imagenet":
        steps = [Conv(stem_width, 7, 2), *norm, layers.Apply(padded_max_pool)]
    channels = stem_width
    for position, (i, inside) in enumerate(zip(stages, inner_widths)):
        first = position == sum(stage_sizes[:i])
        stride = 2 if first and i > 0 else 1
        way = residual(block, inside, channels, outer[i + 1], stride, shortcut)
        steps.append(layers.Block(f"stage{i + 1}_block{position - sum(stage_sizes[:i])}", way))
        channels = outer[i + 1]
    if block == "preact":
        steps += (Norm("final_bn"), RELU)
    steps.append(layers.Apply(layers.global_average_pool))
    return ResNet(num_classes, settings, layers.numbered(*steps))


def padded_max_pool(x: jax.Array) -> jax.Array:
    """3x3 windows of stride 2, one pixel beyond every side."""
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


def of_stages(
    num_classes: int,
    settings: layers.Settings,
    *,
    stage_sizes: tuple[int, ...],
    block: Literal["basic", "bottleneck", "preact"],
    width: tables.Count = 64,
    shortcut: Shortcut = "projection",
    stem: Stem = "cifar",
) -> nn.Module:
    """A `resnet` whose stages are `width`, 2, 4, ... times that wide."""
    return resnet(
        num_classes,
        settings,
        stage_sizes=stage_sizes,
        widths=tuple(width * 2**i for i in range(len(stage_sizes))),
        block=block,
        shortcut=shortcut,
        stem=stem,
    )


resnet18 = layers.preset(
    of_stages,
    "resnet18",
    "ResNet-18 of `width`, 2, 4, 8 times that: 11,173,962 parameters with 10 classes, 11,220,132 "
    "with 100.",
    dict(stage_sizes=(2, 2, 2, 2), block="basic"),
)
resnet34 = layers.preset(
    of_stages,
    "resnet34",
    "ResNet-34: 21,328,292 parameters with 100 classes; 21,797,672 with the imagenet stem and "
    "1,000.",
    dict(stage_sizes=(3, 4, 6, 3), block="basic"),
)
resnet50 = layers.preset(
    of_stages,
    "resnet50",
    "ResNet-50, bottleneck blocks: 23,520,842 parameters with 10 classes, 23,705,252 with 100; "
    "25,557,032 with the imagenet stem and 1,000.",
    dict(stage_sizes=(3, 4, 6, 3), block="bottleneck"),
)
preact_resnet18 = layers.preset(
    of_stages,
    "preact_resnet18",
    "Pre-activation ResNet-18: 11,172,170 parameters with 10 classes.",
    dict(stage_sizes=(2, 2, 2, 2), block="preact"),
)
resnet20 = layers.preset(
    of_stages,
    "resnet20",
    "CIFAR ResNet-20, three stages of `width` 16: 269,722 parameters with 10 classes and zero_pad "
    "shortcuts.",
    dict(stage_sizes=(3, 3, 3), block="basic"),
    width=16,
    shortcut="zero_pad",
)
resnet56 = layers.preset(
    of_stages,
    "resnet56",
    "CIFAR ResNet-56, three stages of `width` 16. Growing regularisation uses zero_pad shortcuts "
    "(853,018 parameters with 10 classes), the gradient-flow study projections (861,620 with 100).",
    dict(stage_sizes=(9, 9, 9), block="basic"),
    width=16,
    shortcut="zero_pad",
)


def wrn(
    num_classes: int,
    settings: layers.Settings,
    *,
    depth: tables.Count = 16,
    widening: tables.Count = 2,
) -> nn.Module:
    """Wide residual network WRN-`depth`-`widening` (Zagoruyko and Komodakis 2016,
    arXiv:1605.07146).

    A stem of 16, then three stages of (depth - 4) / 6 pre-activation blocks, 16, 32 and 64 times
    `widening` wide. The default is the network of the growing-regularisation study: 691,674
    parameters with 10 classes. Raises ConfigError for a depth that is not 10, 16, 22, ...
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise tables.ConfigError(
            f"config.model.depth is {depth}; allowed: 6 n + 4, e.g. 10, 16, 22, 28, 40."
        )
    widths = tuple(width * widening for width in (16, 32, 64))
    return resnet(
        num_classes,
        settings,
        stage_sizes=(blocks,) * 3,
        widths=widths,
        block="preact",
        stem_width=16,
    )
