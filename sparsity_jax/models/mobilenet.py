"""MobileNet V1 (Howard et al. 2017, arXiv:1704.04861) for small images, and V2 (Sandler et al.
2018, 1801.04381).
"""

from sparsity_jax.models.convolutions import GLOBAL_AVERAGE, RELU6, Block, Conv, Norm, Residual
from sparsity_jax.models.layers import RELU, Dropout, Plan, Steps, network
from sparsity_jax.tables import Count, Positive, Share

__all__ = ["MODELS", "mobilenet", "mobilenet_v2"]

# (width, stride) of the pointwise convolution and the depthwise one before it.
_V1 = (
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
_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet(*, stem_width: Count = 32, blocks: tuple[tuple[Count, Count], ...] = _V1) -> Plan:
    """MobileNet V1 with a 3x3 stem of stride 1; `blocks` are (width, stride) pairs of
    depthwise-separable blocks, named block{i}, i from 0.

    The default is the network of the gradient-flow study: 3,309,476 parameters with 100 classes.
    """
    steps: Steps = (Conv(stem_width, 3), Norm(), RELU)
    channels = stem_width
    for i, (width, stride) in enumerate(blocks):
        depthwise = _depthwise(channels, stride)
        pointwise = Conv(width, 1, name="pointwise")
        inside = (depthwise, Norm(), RELU, pointwise, Norm(), RELU)
        steps += (Block(f"block{i}", inside),)
        channels = width
    return Plan((*steps, GLOBAL_AVERAGE))


def _depthwise(channels: int, stride: int) -> Conv:
    """A 3x3 convolution of every channel by itself."""
    return Conv(channels, 3, stride, groups=channels, name="depthwise")


def _inverted(channels: int, expansion: int, width: int, stride: int) -> Steps:
    """expand 1x1, depthwise 3x3 with `stride`, project 1x1; each with bn{i}, the first two ReLU6.

    Without `expand` where `expansion` is 1. channels: of the input, which is added where size and
    channels stay.
    """
    hidden = channels * expansion
    steps: Steps = ()
    if expansion > 1:
        steps = (Conv(hidden, 1, name="expand"), Norm(), RELU6)
    steps += (_depthwise(hidden, stride), Norm(), RELU6, Conv(width, 1, name="project"), Norm())
    if stride == 1 and width == channels:
        return (Residual((), steps),)
    return steps


def _divisible(width: float, divisor: int = 8) -> int:
    """`width` rounded to a multiple of `divisor`, up where it would lose more than a tenth, and at
    least `divisor`.
    """
    multiples = int(width + divisor / 2) // divisor
    rounded = max(1, multiples) * divisor
    return rounded + divisor if rounded < 0.9 * width else rounded


def mobilenet_v2(
    *,
    multiplier: Positive = 1.0,
    stem_stride: Count = 2,
    blocks: tuple[tuple[Count, Count, Count, Count], ...] = _V2,
    dropout: Share = 0.0,
) -> Plan:
    """MobileNet V2 as in torchvision, whose weights fit: 3,504,872 parameters with 1,000 classes,
    2,236,682 with 10.

    blocks: (expansion, width, repeats, stride of the first) of inverted residual blocks, named
    block{i}, i from 0; one that keeps image size and channels adds its input. multiplier: of all
    widths, which are rounded to multiples of 8 (that of the last convolution, 1,280, only grows).
    stem_stride: 1 for small images. dropout: before `fc`; 0.2 in training on ImageNet.
    """
    channels = _divisible(32 * multiplier)
    steps: Steps = (Conv(channels, 3, stem_stride), Norm(), RELU6)
    number = 0
    for expansion, width, repeats, stride in blocks:
        width = _divisible(width * multiplier)
        for repeat in range(repeats):
            inside = _inverted(channels, expansion, width, 1 if repeat else stride)
            steps += (Block(f"block{number}", inside),)
            channels = width
            number += 1
    last_width = _divisible(1280 * max(1.0, multiplier))
    steps += (Conv(last_width, 1), Norm(), RELU6, GLOBAL_AVERAGE, Dropout(dropout))
    return Plan(steps)


MODELS = dict(mobilenet=network(mobilenet), mobilenet_v2=network(mobilenet_v2))
