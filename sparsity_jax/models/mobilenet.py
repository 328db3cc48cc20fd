"""MobileNet V1 (Howard et al. 2017, arXiv:1704.04861) for small images."""

import jax
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers

# (width, stride) of the pointwise convolution and the depthwise one before it.
V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class SeparableBlock(nn.Module):
    """depthwise 3x3 with `stride`, bn1, ReLU, pointwise 1x1 to `width` channels, bn2, ReLU."""

    settings: layers.Settings
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        settings, channels = self.settings, x.shape[-1]
        x = layers.conv(x, channels, 3, stride=self.stride, groups=channels, settings=settings, name="depthwise")
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
    """MobileNet V1 with a 3x3 stem of stride 1; `blocks` are (width, stride) pairs of depthwise-separable blocks.

    The default is the network of the gradient-flow study: 3,309,476 parameters with 100 classes.
    """
    return MobileNet(num_classes, settings, stem_width=stem_width, blocks=blocks)
