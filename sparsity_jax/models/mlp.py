"""Fully connected networks."""

from typing import Literal

from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers

Activation = Literal["relu", "tanh", "linear"]
ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh, "linear": lambda x: x}


class MLP(layers.Network):
    """Flattened images; dense{i}, activation and dropout per entry of `widths`; `fc`."""


def mlp(
    num_classes: int,
    settings: layers.Settings,
    *,
    widths: tuple[tables.Count, ...] = (128, 128),
    dropout: tables.Share = 0.0,
    activation: Activation = "relu",
) -> nn.Module:
    """Dense layers of `widths` with ReLU (and dropout after each) on flattened images of any shape,
    then `fc`.

    activation: what stands for the ReLUs; "linear" leaves them out.
    The default on 784 inputs and 10 classes has 118,282 parameters: the 784-128-128-10 net of the
    SFW study.
    """
    steps: list = []
    for width in widths:
        activate = layers.Apply(ACTIVATIONS[activation])
        steps += (layers.Dense(width), activate, layers.Dropout(dropout))
    return MLP(num_classes, settings, layers.numbered(*steps), smallest=0)


# The fully connected networks of the geometric-limit study, named after their number of dense
# layers, `fc` included.
fc2 = layers.preset(
    mlp,
    "fc2",
    "FC2, one hidden layer: 308,310 parameters on 32x32x3 images with 10 classes, 79,510 on "
    "28x28x1.",
    widths=(100,),
)
fc5 = layers.preset(
    mlp,
    "fc5",
    "FC5: 3,885,010 parameters on 32x32x3 images with 10 classes, 1,597,010 on 28x28x1.",
    widths=(1000, 600, 300, 100),
)
fc12 = layers.preset(
    mlp,
    "fc12",
    "FC12: 7,269,610 parameters on 32x32x3 images with 10 classes.",
    widths=(1000, 900, 800, 750, 700, 650, 600, 500, 400, 200, 100),
)
fc13 = layers.preset(
    mlp,
    "fc13",
    "FC13, which is FC12 with one more layer, of 250: 7,339,860 parameters on 32x32x3 images with "
    "10 classes.",
    widths=(1000, 900, 800, 750, 700, 650, 600, 500, 400, 250, 200, 100),
)
# Of the growing-regularisation study, which analyses the "linear" one.
mlp7 = layers.preset(
    mlp,
    "mlp7",
    "MLP-7, seven dense layers: 154,010 parameters on 32x32x1 images with 10 classes.",
    widths=(100,) * 6,
)
