"""Plain convolutional networks: convolutions and max-pools in a row, then dense layers."""

from typing import Literal, NamedTuple

import jax
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers


class Conv(NamedTuple):
    """A convolution of a layout, with `padding` zeros on every side."""

    width: int
    size: int
    stride: int = 1
    padding: int = 0


class Pool(NamedTuple):
    """A max-pool of a layout: `size` x `size` windows, stride 2."""

    size: int


Widths = tuple[tables.Count, tables.Count, tables.Count, tables.Count, tables.Count]
# Besides them a layout may name "bn", a batch norm, and "lrn", a local response normalisation.
Entry = Conv | Pool | Literal["bn", "lrn"]


def smallest_side(layout: tuple[Entry, ...]) -> int:
    """The side of the smallest square image of which at least one pixel is left after the
    layout.
    """
    side = 1
    for entry in reversed(layout):
        if isinstance(entry, Pool):
            side = 2 * (side - 1) + entry.size
        elif isinstance(entry, Conv):
            side = max(1, entry.stride * (side - 1) + entry.size - 2 * entry.padding)
    return side


class CNN(nn.Module):
    """Enlarged images; `layout`; dense{i}, ReLU (and dense_bn{i}) per entry of `dense_widths`;
    `fc`.

    A convolution of the layout is conv{i}, (bn{i}) and ReLU; a "bn" of the layout is the bn{i} of
    the one before it.
    """

    num_classes: int
    settings: layers.Settings
    layout: tuple[Entry, ...]
    dense_widths: tuple[int, ...]
    conv_bias: bool = True
    batch_norm: bool = False
    dense_batch_norm: bool = False
    dropout: float = 0.0
    upsample: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        settings = self.settings
        smallest = -(-smallest_side(self.layout) // self.upsample)
        x = layers.upsample(
            layers.as_images(images, settings.dtype, smallest=smallest), self.upsample
        )
        i = 0
        for entry in self.layout:
            if isinstance(entry, Pool):
                x = layers.max_pool(x, entry.size)
                continue
            if entry == "lrn":
                x = layers.local_response_norm(x)
                continue
            if entry == "bn":
                x = layers.batch_norm(x, train=train, settings=settings, name=f"bn{i}")
                continue
            i += 1
            x = layers.conv(
                x,
                entry.width,
                entry.size,
                stride=entry.stride,
                padding=entry.padding,
                bias=self.conv_bias,
                settings=settings,
                name=f"conv{i}",
            )
            if self.batch_norm:
                x = layers.batch_norm(x, train=train, settings=settings, name=f"bn{i}")
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.dense_widths, 1):
            x = nn.relu(layers.dense(x, width, settings=settings, name=f"dense{i}"))
            if self.dense_batch_norm:
                x = layers.batch_norm(x, train=train, settings=settings, name=f"dense_bn{i}")
            x = layers.dropout(x, self.dropout, train=train)
        return layers.classifier(x, self.num_classes, settings=settings)


def small_cnn(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: tuple[tables.Count, ...] = (32, 64, 64),
    dense_widths: tuple[tables.Count, ...] = (64,),
    batch_norm: bool = False,
    dropout: tables.Share = 0.0,
) -> nn.Module:
    """3x3 convolutions of `widths`, each with ReLU and a 2x2 max-pool, then dense layers of
    `dense_widths`, then `fc`.

    The plain network of tutorials, for the small-CNN study (pruning with stochastic Frank-Wolfe).
    Convolutions have a bias unless `batch_norm` follows them. Images: at least `2 ** len(widths)` a
    side, 8x8 by default; `dense1` fits the size the network was initialised with. The default has
    122,570 parameters on 32x32x3 images with 10 classes, and 60,554 on 8x8x1.
    """
    layout = tuple(entry for width in widths for entry in (Conv(width, 3, padding=1), Pool(2)))
    return CNN(
        num_classes,
        settings,
        layout,
        dense_widths,
        conv_bias=not batch_norm,
        batch_norm=batch_norm,
        dropout=dropout,
    )


def lenet(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: tuple[tables.Count, tables.Count] = (16, 32),
    dense_widths: tuple[tables.Count, ...] = (120, 84),
) -> nn.Module:
    """LeNet (LeCun et al. 1998) with ReLU and max-pools, as in the geometric-limit study.

    Two unpadded 5x5 convolutions of `widths`, each with ReLU and a 2x2 max-pool, then dense layers
    of `dense_widths`.
    Images: at least 16x16. 121,182 parameters on 32x32x3 images with 10 classes, 85,822 on 28x28x1.
    """
    layout = tuple(entry for width in widths for entry in (Conv(width, 5), Pool(2)))
    return CNN(num_classes, settings, layout, dense_widths)


def lenet5(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: tuple[tables.Count, tables.Count, tables.Count] = (6, 16, 120),
    dense_widths: tuple[tables.Count, ...] = (84,),
) -> nn.Module:
    """LeNet-5 with ReLU and max-pools, as in the growing-regularisation study.

    Unpadded 5x5 convolutions of `widths` with ReLU, a 2x2 max-pool after each but the last, then
    dense layers of `dense_widths`. Images: at least 32x32. 61,706 parameters on 32x32x1 images with
    10 classes; the study's mini version, `widths` (10, 10, 10) and `dense_widths` (10,), has 5,500.
    """
    first, second, third = widths
    layout = (Conv(first, 5), Pool(2), Conv(second, 5), Pool(2), Conv(third, 5))
    return CNN(num_classes, settings, layout, dense_widths)


def cnet(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: tuple[tables.Count, ...] = (64, 64, 32, 16),
    dense_widths: tuple[tables.Count, ...] = (120, 84),
) -> nn.Module:
    """CNet of the geometric-limit study: unpadded 5x5 convolutions with bias and batch norm, then a
    single max-pool.

    Then dense layers of `dense_widths`. Images: at least 4 * len(widths) + 2 a side, 18x18 by
    default. 305,742 parameters on 32x32x3 images with 10 classes.
    """
    layout = (*(Conv(width, 5) for width in widths), Pool(2))
    return CNN(num_classes, settings, layout, dense_widths, batch_norm=True)


def alexnet(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: Widths = (96, 256, 384, 384, 256),
    dense_widths: tuple[tables.Count, ...] = (4096, 4096),
    dropout: tables.Share = 0.0,
    upsample: tables.Count = 7,
) -> nn.Module:
    """AlexNet (Krizhevsky et al. 2012), one tower, without local response normalisation; images
    enlarged first.

    Every pixel becomes `upsample` x `upsample` equal ones, so that 32x32 images fill the 224x224
    the convolutions are made for; use 1 for images of that size. Dropout after the dense layers,
    off as in the geometric-limit study.
    Images: at least 65 pixels a side once enlarged. 46,787,978 parameters on 32x32x3 images with 10
        classes.
    """
    first, second, *others = widths
    layout = (
        Conv(first, 11, stride=4, padding=1),
        Pool(3),
        Conv(second, 5, padding=2),
        Pool(3),
        *(Conv(width, 3, padding=1) for width in others),
        Pool(3),
    )
    return CNN(num_classes, settings, layout, dense_widths, dropout=dropout, upsample=upsample)


def alexnet_cifar(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: Widths = (48, 128, 192, 192, 128),
    dense_widths: tuple[tables.Count, ...] = (512, 256),
    dropout: tables.Share = 0.0,
) -> nn.Module:
    """AlexNet for small images, of the growing-regularisation study: batch norm behind each ReLU
    and max-pool.

    Local response normalisation, over two channels, behind the first two convolutions. Images: at
    least 15x15. 1,659,178 parameters on 32x32x3 images with 10 classes; with half of all widths
    417,434.
    """
    first, second, third, fourth, fifth = widths
    layout = (
        *(Conv(first, 5, padding=2), "lrn", Pool(3), "bn"),
        *(Conv(second, 5, padding=2), "lrn", Pool(3), "bn"),
        *(Conv(third, 3, padding=1), "bn"),
        *(Conv(fourth, 3, padding=1), "bn"),
        *(Conv(fifth, 3, padding=1), Pool(3), "bn"),
    )
    return CNN(num_classes, settings, layout, dense_widths, dense_batch_norm=True, dropout=dropout)


def alexnet_bn(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: Widths = (32, 96, 192, 128, 128),
    dense_widths: tuple[tables.Count, ...] = (2048, 2048),
    dropout: tables.Share = 0.0,
) -> nn.Module:
    """A thin AlexNet for images of 224x224, batch norm after each convolution: of the
    growing-regularisation study.

    Images: at least 63x63. 14,264,354 parameters on 224x224x3 images with 2 classes.
    """
    first, second, *others = widths
    layout = (
        *(Conv(first, 11, stride=4, padding=2), Pool(3)),
        *(Conv(second, 5, padding=2), Pool(3)),
        *(Conv(width, 3, padding=1) for width in others),
        Pool(3),
    )
    return CNN(num_classes, settings, layout, dense_widths, batch_norm=True, dropout=dropout)
