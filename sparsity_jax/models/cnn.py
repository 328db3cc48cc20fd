"""A small plain convolutional network, for studies that run in minutes."""

import jax
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers


class SmallCNN(nn.Module):
    """Stages conv{i}, (bn{i}), ReLU, 2x2 max-pool; then dense{i} and ReLU; then `fc`."""

    num_classes: int
    settings: layers.Settings
    widths: tuple[int, ...]
    dense_widths: tuple[int, ...]
    batch_norm: bool
    dropout: float

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        settings = self.settings
        x = layers.as_images(images, settings.dtype, smallest=2 ** len(self.widths))
        for i, width in enumerate(self.widths, 1):
            x = layers.conv(x, width, 3, bias=not self.batch_norm, settings=settings, name=f"conv{i}")
            if self.batch_norm:
                x = layers.batch_norm(x, train=train, settings=settings, name=f"bn{i}")
            x = layers.max_pool(nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.dense_widths, 1):
            x = nn.relu(layers.dense(x, width, settings=settings, name=f"dense{i}"))
            x = layers.dropout(x, self.dropout, train=train)
        return layers.classifier(x, self.num_classes, settings=settings)


def small_cnn(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: tuple[tables.Count, ...] = (32, 64, 64),
    dense_widths: tuple[tables.Count, ...] = (64,),
    batch_norm: bool = False,
    dropout: tables.Fraction = 0.0,
) -> nn.Module:
    """3x3 convolutions of `widths`, each with ReLU and a 2x2 max-pool, then dense layers of `dense_widths`, then `fc`.

    The plain network of tutorials, for the small-CNN study (pruning with stochastic Frank-Wolfe). Convolutions have a
    bias unless `batch_norm` follows them. Images: at least `2 ** len(widths)` a side, 8x8 by default; `dense1` fits
    the size the network was initialised with. The default has 122,570 parameters on 32x32x3 images with 10 classes,
    and 60,554 on 8x8x1.
    """
    return SmallCNN(
        num_classes, settings, widths=widths, dense_widths=dense_widths, batch_norm=batch_norm, dropout=dropout
    )
