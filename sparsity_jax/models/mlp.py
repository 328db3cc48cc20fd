"""Fully connected networks."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsity_jax import tables
from sparsity_jax.models import layers

Activation = Literal["relu", "tanh", "linear"]
ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh, "linear": lambda x: x}


class MLP(nn.Module):
    """Flatten, then dense and activation per entry of `widths` (modules dense1, dense2, ...), then
    `fc`.
    """

    num_classes: int
    settings: layers.Settings
    widths: tuple[int, ...]
    dropout: float
    activation: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if images.ndim < 2:
            raise tables.ConfigError(
                f"images have the shape {tuple(images.shape)}; needed: [batch, ...] with at least "
                "two axes."
            )
        x = jnp.asarray(images, self.settings.dtype).reshape(images.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            x = layers.dense(x, width, settings=self.settings, name=f"dense{i}")
            x = ACTIVATIONS[self.activation](x)
            x = layers.dropout(x, self.dropout, train=train)
        return layers.classifier(x, self.num_classes, settings=self.settings)


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
    return MLP(num_classes, settings, widths=widths, dropout=dropout, activation=activation)


def preset(name: str, doc: str, *, widths: tuple[int, ...]) -> Callable:
    """`mlp` with the widths of a published network as default."""
    default_widths = widths

    def factory(
        num_classes: int,
        settings: layers.Settings,
        *,
        widths: tuple[tables.Count, ...] = default_widths,
        dropout: tables.Share = 0.0,
        activation: Activation = "relu",
    ) -> nn.Module:
        return mlp(num_classes, settings, widths=widths, dropout=dropout, activation=activation)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = doc
    return factory


# The fully connected networks of the geometric-limit study, named after their number of dense
# layers, `fc` included.
fc2 = preset(
    "fc2",
    (
        "FC2, one hidden layer: 308,310 parameters on 32x32x3 images with 10 classes, 79,510 on "
        "28x28x1."
    ),
    widths=(100,),
)
fc5 = preset(
    "fc5",
    "FC5: 3,885,010 parameters on 32x32x3 images with 10 classes, 1,597,010 on 28x28x1.",
    widths=(1000, 600, 300, 100),
)
fc12 = preset(
    "fc12",
    "FC12: 7,269,610 parameters on 32x32x3 images with 10 classes.",
    widths=(1000, 900, 800, 750, 700, 650, 600, 500, 400, 200, 100),
)
fc13 = preset(
    "fc13",
    (
        "FC13, which is FC12 with one more layer, of 250: 7,339,860 parameters on 32x32x3 images "
        "with 10 classes."
    ),
    widths=(1000, 900, 800, 750, 700, 650, 600, 500, 400, 250, 200, 100),
)
# Of the growing-regularisation study, which analyses the "linear" one.
mlp7 = preset(
    "mlp7",
    "MLP-7, seven dense layers: 154,010 parameters on 32x32x1 images with 10 classes.",
    widths=(100,) * 6,
)
