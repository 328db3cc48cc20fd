"""MobileNet V1 (Howard et al. 2017, arXiv:1704.04861) for small images, and V2 (Sandler et al.
2018, 1801.04381).
"""

import jax
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers

# (width, stride) of the pointwise convolution and the depthwise one before it.
V1 = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)

# (expansion, width, repeats, stride of the first) of inverted residual blocks.
V2 = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)),
    *((6, 160, 3, 2), (6, 320, 1, 1)),
)


class SeparableBlock(nn.Module):
    """depthwise 3x3 with `stride`, bn1, ReLU, pointwise 1x1 to `width` channels, bn2, ReLU."""

    settings: layers.Settings
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        settings, channels = self.settings, x.shape[-1]
        x = layers.conv(
            x, channels, 3, stride=self.stride, groups=channels, settings=settings, name="depthwise"
        )
        x = nn.relu(layers.batch_norm(x, train=train, settings=settings, name="bn1"))
        x = layers.conv(x, self.width, 1, settings=settings, name="pointwise")
        return nn.relu(layers.batch_norm(x, train=train, settings=settings, name="bn2"))


class MobileNet(nn.Module):
    """Stem conv1, bn1, ReLU; blocks block{i} (i from 0); global average pool; `fc`."""

    num_classes: int
    settings: layers.Settings
    stem_width: int
    blocks: tuple[tuple[int, int], ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        settings = self.settings
        x = layers.as_images(images, settings.dtype)
        x = layers.conv(x, self.stem_width, 3, settings=settings, name="conv1")
        x = nn.relu(layers.batch_norm(x, train=train, settings=settings, name="bn1"))
        for i, (width, stride) in enumerate(self.blocks):
            x = SeparableBlock(settings, width=width, stride=stride, name=f"block{i}")(x, train)
        return layers.classifier(layers.global_average_pool(x), self.num_classes, settings=settings)


def mobilenet(
    num_classes: int,
    settings: layers.Settings,
    *,
    stem_width: tables.Count = 32,
    blocks: tuple[tuple[tables.Count, tables.Count], ...] = V1,
) -> nn.Module:
    """MobileNet V1 with a 3x3 stem of stride 1; `blocks` are (width, stride) pairs of
    depthwise-separable blocks.

    The default is the network of the gradient-flow study: 3,309,476 parameters with 100 classes.
    """
    return MobileNet(num_classes, settings, stem_width=stem_width, blocks=blocks)


class InvertedBlock(nn.Module):
    """expand 1x1, depthwise 3x3 with `stride`, project 1x1 to `width`; each with bn{i}, the first
    two with ReLU6.

    Without `expand` where `expansion` is 1. residual: adds its input.
    """

    settings: layers.Settings
    expansion: int
    width: int
    stride: int
    residual: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        settings = self.settings
        norms = (f"bn{i}" for i in range(1, 4))
        bn = lambda y: layers.batch_norm(y, train=train, settings=settings, name=next(norms))
        y = x
        if self.expansion > 1:
            y = nn.relu6(
                bn(
                    layers.conv(
                        y, x.shape[-1] * self.expansion, 1, settings=settings, name="expand"
                    )
                )
            )
        hidden = y.shape[-1]
        y = layers.conv(
            y, hidden, 3, stride=self.stride, groups=hidden, settings=settings, name="depthwise"
        )
        y = bn(layers.conv(nn.relu6(bn(y)), self.width, 1, settings=settings, name="project"))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Stem conv1, bn1, ReLU6; blocks block{i} (i from 0); conv2 1x1, bn2, ReLU6; global average
    pool; dropout; `fc`.
    """

    num_classes: int
    settings: layers.Settings
    stem_width: int
    stem_stride: int
    blocks: tuple[tuple[int, int, int, bool], ...]  # fields of InvertedBlock
    last_width: int
    dropout: float

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        settings = self.settings
        x = layers.as_images(images, settings.dtype)
        x = layers.conv(
            x, self.stem_width, 3, stride=self.stem_stride, settings=settings, name="conv1"
        )
        x = nn.relu6(layers.batch_norm(x, train=train, settings=settings, name="bn1"))
        for i, block in enumerate(self.blocks):
            x = InvertedBlock(settings, *block, name=f"block{i}")(x, train)
        x = layers.conv(x, self.last_width, 1, settings=settings, name="conv2")
        x = nn.relu6(layers.batch_norm(x, train=train, settings=settings, name="bn2"))
        x = layers.dropout(layers.global_average_pool(x), self.dropout, train=train)
        return layers.classifier(x, self.num_classes, settings=settings)


def divisible(width: float, divisor: int = 8) -> int:
    """`width` rounded to a multiple of `divisor`, up where it would lose more than a tenth, and at
    least `divisor`.
    """
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def mobilenet_v2(
    num_classes: int,
    settings: layers.Settings,
    *,
    multiplier: tables.Positive = 1.0,
    stem_stride: tables.Count = 2,
    blocks: tuple[tuple[tables.Count, tables.Count, tables.Count, tables.Count], ...] = V2,
    dropout: tables.Share = 0.0,
) -> nn.Module:
    """MobileNet V2 as in torchvision, whose weights fit: 3,504,872 parameters with 1,000 classes,
    2,236,682 with 10.

    blocks: (expansion, width, repeats, stride of the first) of inverted residual blocks; one that
    keeps image size and channels adds its input. multiplier: of all widths, which are rounded to
    multiples of 8 (that of the last convolution, 1,280, only grows). stem_stride: 1 for small
    images. dropout: before `fc`; 0.2 in training on ImageNet.
    """
    stem_width = previous = divisible(32 * multiplier)
    flat = []
    for expansion, width, repeats, stride in blocks:
        width = divisible(width * multiplier)
        for step in (stride, *(1,) * (repeats - 1)):
            flat.append((expansion, width, step, step == 1 and width == previous))
            previous = width
    return MobileNetV2(
        num_classes,
        settings,
        stem_width=stem_width,
        stem_stride=stem_stride,
        blocks=tuple(flat),
        last_width=divisible(1280 * max(1.0, multiplier)),
        dropout=dropout,
    )
