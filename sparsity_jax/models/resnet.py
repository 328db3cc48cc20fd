"""Residual networks for small images (He et al. 2016, arXiv:1512.03385 and 1603.05027), plain and
pre-activation.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers

Shortcut = Literal["projection", "zero_pad"]
Stem = Literal["cifar", "imagenet"]


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


class Block(nn.Module):
    """One residual block; `width` channels inside, `features` outside, `stride` in its first 3x3
    convolution.

    A block that keeps image size and channels adds its input unchanged; any other goes through
    `shortcut`.
    """

    settings: layers.Settings
    width: int
    features: int
    stride: int
    shortcut: str

    def conv(self, x: jax.Array, features: int, size: int, name: str, stride: int = 1) -> jax.Array:
        return layers.conv(x, features, size, stride=stride, settings=self.settings, name=name)

    def bn(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        return layers.batch_norm(x, train=train, settings=self.settings, name=name)

    def keeps_shape(self, x: jax.Array) -> bool:
        return self.stride == 1 and x.shape[-1] == self.features

    def residual(self, x: jax.Array, train: bool, *, norm: bool = True) -> jax.Array:
        if self.keeps_shape(x):
            return x
        if self.shortcut == "zero_pad":
            return zero_pad_shortcut(x, self.features, self.stride)
        x = self.conv(x, self.features, 1, "shortcut_conv", self.stride)
        return self.bn(x, "shortcut_bn", train) if norm else x


class BasicBlock(Block):
    """conv1 3x3, bn1, ReLU, conv2 3x3, bn2, plus the shortcut, ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = nn.relu(self.bn(self.conv(x, self.width, 3, "conv1", self.stride), "bn1", train))
        y = self.bn(self.conv(y, self.features, 3, "conv2"), "bn2", train)
        return nn.relu(y + self.residual(x, train))


class BottleneckBlock(Block):
    """conv1 1x1, bn1, ReLU, conv2 3x3, bn2, ReLU, conv3 1x1, bn3, plus the shortcut, ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = nn.relu(self.bn(self.conv(x, self.width, 1, "conv1"), "bn1", train))
        y = nn.relu(self.bn(self.conv(y, self.width, 3, "conv2", self.stride), "bn2", train))
        y = self.bn(self.conv(y, self.features, 1, "conv3"), "bn3", train)
        return nn.relu(y + self.residual(x, train))


class PreactBlock(Block):
    """bn1, ReLU, conv1 3x3, bn2, ReLU, conv2 3x3, plus the shortcut.

    A shortcut that changes the shape starts from the first activation and has no batch norm.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = nn.relu(self.bn(x, "bn1", train))
        residual = self.residual(x if self.keeps_shape(x) else y, train, norm=False)
        y = nn.relu(self.bn(self.conv(y, self.width, 3, "conv1", self.stride), "bn2", train))
        return self.conv(y, self.features, 3, "conv2") + residual


BLOCKS = {
    "basic": (BasicBlock, 1),
    "bottleneck": (BottleneckBlock, 4),
    "preact": (PreactBlock, 1),
}  # class, expansion


class ResNet(nn.Module):
    """Stem conv1 (bn1, ReLU), blocks stage{i}_block{j} (i from 1, j from 0), global average pool,
    `fc`.

    Pre-activation networks have no bn1 but final_bn and ReLU after the blocks.
    """

    num_classes: int
    settings: layers.Settings
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    block: str
    shortcut: str
    stem: str
    stem_width: int
    inner_widths: tuple[int, ...]  # one per block

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        settings, preact = self.settings, self.block == "preact"
        block, expansion = BLOCKS[self.block]
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = layers.as_images(images, settings.dtype)
        x = layers.conv(x, self.stem_width, size, stride=stride, settings=settings, name="conv1")
        if not preact:
            x = nn.relu(layers.batch_norm(x, train=train, settings=settings, name="bn1"))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        inner_widths = iter(self.inner_widths)
        for i, (count, width) in enumerate(zip(self.stage_sizes, self.widths)):
            for j in range(count):
                x = block(
                    settings,
                    width=next(inner_widths),
                    features=width * expansion,
                    stride=2 if i > 0 and j == 0 else 1,
                    shortcut=self.shortcut,
                    name=f"stage{i + 1}_block{j}",
                )(x, train)
        if preact:
            x = nn.relu(layers.batch_norm(x, train=train, settings=settings, name="final_bn"))
        return layers.classifier(layers.global_average_pool(x), self.num_classes, settings=settings)


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
    if inner_widths is None:
        inner_widths = tuple(
            width for width, count in zip(widths, stage_sizes) for _ in range(count)
        )
    if len(inner_widths) != sum(stage_sizes):
        raise tables.ConfigError(
            f"config.model.inner_widths has {len(inner_widths)} entries; allowed: one per block, "
            f"{sum(stage_sizes)}."
        )
    stem_width = stem_width or widths[0]
    outer = (stem_width, *(width * BLOCKS[block][1] for width in widths))
    if shortcut == "zero_pad" and list(outer) != sorted(outer):
        raise tables.ConfigError(
            f"config.model.shortcut is 'zero_pad' and the channels go {outer}; allowed: channels "
            "that never decrease, "
            "or 'projection'."
        )
    return ResNet(
        num_classes,
        settings,
        stage_sizes=stage_sizes,
        widths=widths,
        block=block,
        shortcut=shortcut,
        stem=stem,
        stem_width=stem_width,
        inner_widths=inner_widths,
    )


def preset(name: str, doc: str, *, width: int, shortcut: str = "projection", **fixed) -> Callable:
    """A factory with the depth and block of a published network; `fixed` are options of
    `resnet`.
    """
    default_width, default_shortcut, stages = width, shortcut, len(fixed["stage_sizes"])

    def factory(
        num_classes: int,
        settings: layers.Settings,
        *,
        width: tables.Count = default_width,
        shortcut: Shortcut = default_shortcut,
        stem: Stem = "cifar",
    ) -> nn.Module:
        widths = tuple(width * 2**i for i in range(stages))
        return resnet(num_classes, settings, widths=widths, shortcut=shortcut, stem=stem, **fixed)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = doc
    return factory


resnet18 = preset(
    "resnet18",
    (
        "ResNet-18 of `width`, 2, 4, 8 times that: 11,173,962 parameters with 10 classes, "
        "11,220,132 with 100."
    ),
    width=64,
    stage_sizes=(2, 2, 2, 2),
)
resnet34 = preset(
    "resnet34",
    (
        "ResNet-34: 21,328,292 parameters with 100 classes; 21,797,672 with the imagenet stem and "
        "1,000."
    ),
    width=64,
    stage_sizes=(3, 4, 6, 3),
)
resnet50 = preset(
    "resnet50",
    (
        "ResNet-50, bottleneck blocks: 23,520,842 parameters with 10 classes, 23,705,252 with 100; "
        "25,557,032 with the imagenet stem and 1,000."
    ),
    width=64,
    stage_sizes=(3, 4, 6, 3),
    block="bottleneck",
)
preact_resnet18 = preset(
    "preact_resnet18",
    "Pre-activation ResNet-18: 11,172,170 parameters with 10 classes.",
    width=64,
    stage_sizes=(2, 2, 2, 2),
    block="preact",
)
resnet20 = preset(
    "resnet20",
    (
        "CIFAR ResNet-20, three stages of `width` 16: 269,722 parameters with 10 classes and "
        "zero_pad shortcuts."
    ),
    width=16,
    shortcut="zero_pad",
    stage_sizes=(3, 3, 3),
)
resnet56 = preset(
    "resnet56",
    (
        "CIFAR ResNet-56, three stages of `width` 16. Growing regularisation uses zero_pad "
        "shortcuts (853,018 parameters with 10 classes), the gradient-flow study projections "
        "(861,620 with 100)."
    ),
    width=16,
    shortcut="zero_pad",
    stage_sizes=(9, 9, 9),
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
