"""VGG networks (Simonyan and Zisserman 2015, arXiv:1409.1556) for small images: convolutions, then
one dense layer.
"""

from collections.abc import Callable
from typing import Literal

import jax
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers

Layout = tuple[
    tables.Count | Literal["M"], ...
]  # width of a 3x3 convolution, or "M": a 2x2 max-pool
Order = Literal["conv_bn_relu", "conv_relu_bn"]

# Convolutions in each of the five stages; a stage has 1, 2, 4, 8, 8 times the base width and ends
# in a max-pool.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """conv{i}, bn{i} and ReLU in the given order, max-pools where the layout has "M"; global
    average pool; `fc`.
    """

    num_classes: int
    settings: layers.Settings
    layout: tuple[int | str, ...]
    order: str
    conv_bias: bool
    batch_norm: bool
    dropout: float

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        settings = self.settings
        x = layers.as_images(images, settings.dtype, smallest=2 ** self.layout.count("M"))
        i = 0
        for entry in self.layout:
            if entry == "M":
                x = layers.max_pool(x)
                continue
            i += 1
            x = layers.conv(x, entry, 3, bias=self.conv_bias, settings=settings, name=f"conv{i}")
            if self.order == "conv_relu_bn":
                x = nn.relu(x)
            if self.batch_norm:
                x = layers.batch_norm(x, train=train, settings=settings, name=f"bn{i}")
            if self.order == "conv_bn_relu":
                x = nn.relu(x)
        x = layers.dropout(layers.global_average_pool(x), self.dropout, train=train)
        return layers.classifier(x, self.num_classes, settings=settings)


def stages(depth: int, width: int) -> tuple[int | str, ...]:
    """The layout of VGG-`depth` (11, 13, 16 or 19), e.g. (64, "M", 128, "M", ...) for depth 11 and
    width 64.
    """
    scales = zip(DEPTHS[depth], (1, 2, 4, 8, 8))
    return tuple(entry for count, scale in scales for entry in (width * scale,) * count + ("M",))


VGG11 = stages(11, 64)


def vgg(
    num_classes: int,
    settings: layers.Settings,
    *,
    layout: Layout = VGG11,
    order: Order = "conv_bn_relu",
    conv_bias: bool = True,
    batch_norm: bool = True,
    dropout: tables.Share = 0.0,
) -> nn.Module:
    """A VGG of any `layout`: widths of 3x3 convolutions and "M" for 2x2 max-pools, e.g. `(8, "M",
    16, 16, "M")`.

    After the last entry: global average pool, dropout, `fc`. Images: at least 2 ** (number of "M")
    a side. `order`: batch norm before the ReLU, or after it as in the gradient-flow study (Lubana
    and Dick 2021).
    """
    return VGG(
        num_classes,
        settings,
        layout=layout,
        order=order,
        conv_bias=conv_bias,
        batch_norm=batch_norm,
        dropout=dropout,
    )


def preset(depth: int) -> Callable:
    """The factory of VGG-`depth`."""

    def factory(
        num_classes: int,
        settings: layers.Settings,
        *,
        width: tables.Count = 64,
        order: Order = "conv_bn_relu",
        conv_bias: bool = True,
        batch_norm: bool = True,
        dropout: tables.Share = 0.0,
    ) -> nn.Module:
        return vgg(
            num_classes,
            settings,
            layout=stages(depth, width),
            order=order,
            conv_bias=conv_bias,
            batch_norm=batch_norm,
            dropout=dropout,
        )

    factory.__name__ = factory.__qualname__ = f"vgg{depth}"
    factory.__doc__ = f"""VGG-{depth}: stages of 1, 2, 4, 8 and 8 times `width`.

    For images of at least 32x32. Parameters with 10 classes: VGG11 9,231,114; VGG13 9,416,010;
    VGG16 14,728,266; VGG19 20,040,522 (with conv_bias). VGG16 is the SFW and the geometric-limit
    net. The gradient-flow VGG13 has order="conv_relu_bn", conv_bias=False (9,459,236 with 100
    classes). The growing-regularisation VGG19 has no conv_bias and no last max-pool: use `vgg`.
    """
    return factory


vgg11, vgg13, vgg16, vgg19 = (preset(depth) for depth in (11, 13, 16, 19))
