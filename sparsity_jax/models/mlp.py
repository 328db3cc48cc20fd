"""Fully connected networks."""

from typing import Literal

from flax import linen as nn

from sparsity_jax.models.layers import Apply, Dense, Dropout, Plan, Steps, network
from sparsity_jax.tables import Count, Share

__all__ = ["MODELS", "mlp"]

_ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh, "linear": lambda x: x}


def mlp(
    *,
    widths: tuple[Count, ...] = (128, 128),
    dropout: Share = 0.0,
    activation: Literal["relu", "tanh", "linear"] = "relu",
) -> Plan:
    """Dense layers of `widths` with ReLU (and dropout after each) on flattened images of any shape,
    then `fc`.

    activation: what stands for the ReLUs; "linear" leaves them out.
    The default on 784 inputs and 10 classes has 118,282 parameters: the 784-128-128-10 net of the
    SFW study.
    """
    steps: Steps = ()
    activate = Apply(_ACTIVATIONS[activation])
    for width in widths:
        steps += (Dense(width), activate, Dropout(dropout))
    return Plan(steps, smallest=0)


MODELS = dict(
    mlp=network(mlp),
    # The fully connected networks of the geometric-limit study, named after their number of dense
    # layers, `fc` included.
    fc2=network(
        mlp,
        doc="FC2, one hidden layer: 308,310 parameters on 32x32x3 images with 10 classes, 79,510 "
        "on 28x28x1.",
        widths=(100,),
    ),
    fc5=network(
        mlp,
        doc="FC5: 3,885,010 parameters on 32x32x3 images with 10 classes, 1,597,010 on 28x28x1.",
        widths=(1000, 600, 300, 100),
    ),
    fc12=network(
        mlp,
        doc="FC12: 7,269,610 parameters on 32x32x3 images with 10 classes.",
        widths=(1000, 900, 800, 750, 700, 650, 600, 500, 400, 200, 100),
    ),
    fc13=network(
        mlp,
        doc="FC13, which is FC12 with one more layer, of 250: 7,339,860 parameters on 32x32x3 "
        "images with 10 classes.",
        widths=(1000, 900, 800, 750, 700, 650, 600, 500, 400, 250, 200, 100),
    ),
    # Of the growing-regularisation study, which analyses the "linear" one.
    mlp7=network(
        mlp,
        doc="MLP-7, seven dense layers: 154,010 parameters on 32x32x1 images with 10 classes.",
        widths=(100,) * 6,
    ),
)
