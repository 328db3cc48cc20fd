"""Plain convolutional networks: convolutions and max-pools in a row, then dense layers."""

from sparsity_jax.models import convolutions
from sparsity_jax.models.convolutions import Conv, Norm, local_response_norm, max_pool
from sparsity_jax.models.layers import RELU, Apply, Dense, Dropout, Plan, Steps, flatten, network
from sparsity_jax.tables import Count, Share

__all__ = ["MODELS", "FiveWidths", "Widths", "alexnet", "alexnet_cifar", "small_cnn", "unpadded"]

Widths = tuple[Count, ...]
FiveWidths = tuple[Count, Count, Count, Count, Count]
_POOL2, _POOL3 = Apply(max_pool, (2,)), Apply(max_pool, (3,))
_LRN = Apply(local_response_norm)


def _smallest_side(layout: Steps) -> int:
    """The side of the smallest square image of which a pixel is left after the layout."""
    side = 1
    for step in reversed(layout):
        if isinstance(step, Conv):
            padding = step.padding or 0
            side = step.stride * (side - 1) + step.size - 2 * padding
            side = max(1, side)
        elif step in (_POOL2, _POOL3):
            side = 2 * (side - 1) + step.arguments[0]
    return side


def _cnn(
    layout: Steps,
    dense_widths: Widths,
    *,
    after: Steps = (RELU,),
    after_dense: Steps = (RELU,),
    dropout: float = 0.0,
    upsample: int = 1,
) -> Plan:
    """`layout`, with the steps `after` each convolution, then dense layers.

    upsample: every pixel becomes so many equal ones on both sides, before all else.
    """
    steps: Steps = (Apply(convolutions.upsample, (upsample,)),)
    for step in layout:
        steps += (step, *after) if isinstance(step, Conv) else (step,)
    steps += (Apply(flatten),)
    for width in dense_widths:
        steps += (Dense(width), *after_dense, Dropout(dropout))
    return Plan(steps, smallest=-(-_smallest_side(layout) // upsample))


def _padded(width: int, size: int = 3) -> Conv:
    """A convolution with bias that keeps the size of images."""
    return Conv(width, size, padding=size // 2, bias=True)


def small_cnn(
    *,
    widths: Widths = (32, 64, 64),
    dense_widths: Widths = (64,),
    batch_norm: bool = False,
    dropout: Share = 0.0,
) -> Plan:
    """3x3 convolutions of `widths`, each with ReLU and a 2x2 max-pool, then dense layers of
    `dense_widths`, then `fc`.

    The plain network of tutorials, for the small-CNN study (pruning with stochastic Frank-Wolfe).
    Convolutions have a bias unless `batch_norm` follows them. Images: at least `2 ** len(widths)` a
    side, 8x8 by default; `dense1` fits the size the network was initialised with. The default has
    122,570 parameters on 32x32x3 images with 10 classes, and 60,554 on 8x8x1.
    """
    layout: Steps = ()
    for width in widths:
        layout += (Conv(width, 3, padding=1, bias=not batch_norm), _POOL2)
    after = (Norm(), RELU) if batch_norm else (RELU,)
    return _cnn(layout, dense_widths, after=after, dropout=dropout)


def unpadded(
    between: Steps,
    last: Steps,
    after: Steps,
    *,
    widths: Widths,
    dense_widths: Widths,
) -> Plan:
    """5x5 convolutions of `widths`, without padding and with bias, then dense layers.

    between: steps between two convolutions. last: those behind the last one. after: behind each.
    """
    layout: Steps = ()
    for width in widths:
        layout += (*(between if layout else ()), Conv(width, 5, padding=0, bias=True))
    return _cnn((*layout, *last), dense_widths, after=after)


def alexnet(
    padding: int,
    after: Steps,
    *,
    widths: FiveWidths,
    dense_widths: Widths,
    dropout: Share = 0.0,
    upsample: Count = 1,
) -> Plan:
    """AlexNet for large images. padding: of the first convolution. after: steps behind each."""
    first, second, *others = widths
    start = Conv(first, 11, stride=4, padding=padding, bias=True)
    layout = (start, _POOL3, _padded(second, 5), _POOL3, *map(_padded, others), _POOL3)
    return _cnn(layout, dense_widths, after=after, dropout=dropout, upsample=upsample)


def alexnet_cifar(
    *,
    widths: FiveWidths = (48, 128, 192, 192, 128),
    dense_widths: Widths = (512, 256),
    dropout: Share = 0.0,
) -> Plan:
    """AlexNet for small images, of the growing-regularisation study: batch norm behind each ReLU
    and max-pool.

    Local response normalisation, over two channels, behind the first two convolutions. Images: at
    least 15x15. 1,659,178 parameters on 32x32x3 images with 10 classes; with half of all widths
    417,434.
    """
    first, second, third, fourth, fifth = widths
    layout = (
        *(_padded(first, 5), _LRN, _POOL3, Norm()),
        *(_padded(second, 5), _LRN, _POOL3, Norm()),
        *(_padded(third), Norm()),
        *(_padded(fourth), Norm()),
        *(_padded(fifth), _POOL3, Norm()),
    )
    after_dense = (RELU, Norm("dense_bn#"))
    return _cnn(layout, dense_widths, after_dense=after_dense, dropout=dropout)


MODELS = dict(
    small_cnn=network(small_cnn),
    lenet=network(
        unpadded,
        *((_POOL2,), (_POOL2,), (RELU,)),
        doc="""LeNet (LeCun et al. 1998) with ReLU and max-pools, as in the geometric-limit study.

        Unpadded 5x5 convolutions of `widths`, each with ReLU and a 2x2 max-pool, then dense layers
        of `dense_widths`. Images: at least 16x16. 121,182 parameters on 32x32x3 images with 10
        classes, 85,822 on 28x28x1.
        """,
        widths=(16, 32),
        dense_widths=(120, 84),
    ),
    lenet5=network(
        unpadded,
        *((_POOL2,), (), (RELU,)),
        doc="""LeNet-5 with ReLU and max-pools, as in the growing-regularisation study.

        Unpadded 5x5 convolutions of `widths` with ReLU, a 2x2 max-pool after each but the last,
        then dense layers of `dense_widths`. Images: at least 32x32. 61,706 parameters on 32x32x1
        images with 10 classes; the study's mini version, `widths` (10, 10, 10) and `dense_widths`
        (10,), has 5,500.
        """,
        widths=(6, 16, 120),
        dense_widths=(84,),
    ),
    cnet=network(
        unpadded,
        *((), (_POOL2,), (Norm(), RELU)),
        doc="""CNet of the geometric-limit study: unpadded 5x5 convolutions with bias and batch
        norm, then a single max-pool.

        Then dense layers of `dense_widths`. Images: at least 4 * len(widths) + 2 a side, 18x18 by
        default. 305,742 parameters on 32x32x3 images with 10 classes.
        """,
        widths=(64, 64, 32, 16),
        dense_widths=(120, 84),
    ),
    alexnet=network(
        alexnet,
        *(1, (RELU,)),
        doc="""AlexNet (Krizhevsky et al. 2012), one tower, without local response normalisation;
        images enlarged first.

        Every pixel becomes `upsample` x `upsample` equal ones, so that 32x32 images fill the
        224x224 the convolutions are made for; use 1 for images of that size. Dropout after the
        dense layers, off as in the geometric-limit study. Images: at least 65 pixels a side once
        enlarged. 46,787,978 parameters on 32x32x3 images with 10 classes.
        """,
        widths=(96, 256, 384, 384, 256),
        dense_widths=(4096, 4096),
        upsample=7,
    ),
    alexnet_bn=network(
        alexnet,
        *(2, (Norm(), RELU)),
        doc="""A thin AlexNet for images of 224x224, batch norm after each convolution: of the
        growing-regularisation study.

        Images: at least 63x63. 14,264,354 parameters on 224x224x3 images with 2 classes.
        """,
        widths=(32, 96, 192, 128, 128),
        dense_widths=(2048, 2048),
    ),
    alexnet_cifar=network(alexnet_cifar),
)
