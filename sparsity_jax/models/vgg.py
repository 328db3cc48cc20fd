"""VGG networks (Simonyan and Zisserman 2015, arXiv:1409.1556) for small images: convolutions, then
one dense layer.
"""

from typing import Literal

from sparsity_jax.models.convolutions import GLOBAL_AVERAGE, Conv, Norm, max_pool
from sparsity_jax.models.layers import RELU, Apply, Dropout, Plan, Steps, network
from sparsity_jax.tables import Count, Share

__all__ = ["MODELS", "Layout", "Order", "stages", "vgg"]

# width of a 3x3 convolution, or "M": a 2x2 max-pool
Layout = tuple[Count | Literal["M"], ...]
Order = Literal["conv_bn_relu", "conv_relu_bn"]

# Convolutions in each of the five stages; a stage has 1, 2, 4, 8, 8 times the base width and ends
# in a max-pool.
_DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def stages(depth: int, width: int) -> Layout:
    """The layout of VGG-`depth` (11, 13, 16 or 19), e.g. (64, "M", 128, "M", ...) for depth 11 and
    width 64.
    """
    layout: Layout = ()
    for count, scale in zip(_DEPTHS[depth], (1, 2, 4, 8, 8)):
        layout += (*[width * scale] * count, "M")
    return layout


_VGG11 = stages(11, 64)


def vgg(
    *,
    layout: Layout = _VGG11,
    order: Order = "conv_bn_relu",
    conv_bias: bool = True,
    batch_norm: bool = True,
    dropout: Share = 0.0,
) -> Plan:
    """A VGG of any `layout`: widths of 3x3 convolutions and "M" for 2x2 max-pools, e.g. `(8, "M",
    16, 16, "M")`.

    After the last entry: global average pool, dropout, `fc`. Images: at least 2 ** (number of "M")
    a side. `order`: batch norm before the ReLU, or after it as in the gradient-flow study (Lubana
    and Dick 2021).
    """
    after = [Norm(), RELU] if batch_norm else [RELU]
    if order == "conv_relu_bn":
        after.reverse()
    steps: Steps = ()
    for entry in layout:
        if entry == "M":
            steps += (Apply(max_pool),)
        else:
            steps += (Conv(entry, 3, bias=conv_bias), *after)
    steps += (GLOBAL_AVERAGE, Dropout(dropout))
    return Plan(steps, smallest=2 ** layout.count("M"))


def _of_depth(
    depth: int,
    *,
    width: Count = 64,
    order: Order = "conv_bn_relu",
    conv_bias: bool = True,
    batch_norm: bool = True,
    dropout: Share = 0.0,
) -> Plan:
    """stages of 1, 2, 4, 8 and 8 times `width`.

    For images of at least 32x32. Parameters with 10 classes: VGG11 9,231,114; VGG13 9,416,010;
    VGG16 14,728,266; VGG19 20,040,522 (with conv_bias). VGG16 is the SFW and the geometric-limit
    net. The gradient-flow VGG13 has order="conv_relu_bn", conv_bias=False (9,459,236 with 100
    classes). The growing-regularisation VGG19 has no conv_bias and no last max-pool: use `vgg`.
    """
    return vgg(
        layout=stages(depth, width),
        order=order,
        conv_bias=conv_bias,
        batch_norm=batch_norm,
        dropout=dropout,
    )


MODELS = dict(vgg=network(vgg))
for depth in _DEPTHS:
    text = f"VGG-{depth}: {_of_depth.__doc__}"
    MODELS[f"vgg{depth}"] = network(_of_depth, depth, doc=text)
