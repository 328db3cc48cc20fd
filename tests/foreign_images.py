"""Image networks of well-known kinds, one block each, as (apply, variables, inputs)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from foreign import Maker, filled, image, linen
from foreign_text import (
    attend,
    attention,
    attention_layer,
    biased,
    dense,
    layer_norm,
    mlp,
    mlp_layer,
    norm,
    sincos,
    weights,
)

CLASSES = 5


def convolve(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def standardised(kernel):
    """Every filter without its mean, at unit variance."""
    centred = kernel - kernel.mean((0, 1, 2))
    return centred / jnp.sqrt(jnp.mean(centred**2, (0, 1, 2)) + 1e-5)


def group_norm(p, x, groups):
    """In two passes, over positions and the channels of each group."""
    parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    centred = parts - parts.mean((1, 3), keepdims=True)
    variance = jnp.mean(centred**2, (1, 3), keepdims=True)
    return (centred / jnp.sqrt(variance + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]


def bit(*, groups, inside, hidden):
    """A residual block, group norms before its layers; standardised kernels."""
    width = groups * inside
    variables = dict(
        stem=weights(3, 3, 3, width),
        norm1=norm(width),
        first=weights(3, 3, width, groups * hidden),
        norm2=norm(groups * hidden),
        second=weights(3, 3, groups * hidden, width),
        norm=norm(width),
        head=biased(width, CLASSES),
    )

    def apply(p, x):
        x = convolve(x, standardised(p["stem"]))
        y = nn.relu(group_norm(p["norm1"], x, groups))
        y = convolve(y, standardised(p["first"]))
        y = nn.relu(group_norm(p["norm2"], y, groups))
        x = x + convolve(y, standardised(p["second"]))
        x = nn.relu(group_norm(p["norm"], x, groups)).mean((1, 2))
        return dense(p["head"], x)

    return apply, filled(variables), (image(),)


def encoder(width, heads, size, hidden):
    """A block of attention and a hidden layer, and the classifier behind it."""
    return dict(
        norm1=norm(width),
        attention=attention_layer(width, heads, size),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(width),
        head=biased(width, CLASSES),
    )


def hybrid_vit(*, groups, inside, width, heads, size, hidden):
    """Patches of a convolution with standardised kernels, then a transformer."""
    stem = groups * inside
    variables = dict(
        stem=weights(3, 3, 3, stem),
        norm0=norm(stem),
        patches=biased(2, 2, stem, width),
        token=weights(1, 1, width),
        positions=weights(5, width),
        **encoder(width, heads, size, hidden),
    )

    def apply(p, x):
        x = convolve(x, standardised(p["stem"]), 2)
        x = nn.relu(group_norm(p["norm0"], x, groups))
        x = convolve(x, p["patches"]["kernel"], 2) + p["patches"]["bias"]
        token = jnp.broadcast_to(p["token"], (len(x), 1, width))
        x = jnp.concatenate([token, x.reshape(len(x), -1, width)], 1) + p["positions"]
        y = layer_norm(p["norm1"], x)
        x = x + attention(p["attention"], y, y)
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x))
        return dense(p["head"], layer_norm(p["norm3"], x)[:, 0])

    return apply, filled(variables), (image(),)


def sincos_vit(*, width, heads, size, hidden):
    """Positions are constants of the program; the mean of all patches is classified."""
    variables = dict(
        patches=biased(2, 2, 3, width),
        **encoder(width, heads, size, hidden),
    )

    def apply(p, x):
        x = convolve(x, p["patches"]["kernel"], 2) + p["patches"]["bias"]
        x = x.reshape(len(x), -1, width) + sincos(16, width)
        y = layer_norm(p["norm1"], x)
        x = x + attention(p["attention"], y, y)
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x))
        return dense(p["head"], layer_norm(p["norm3"], x.mean(1)))

    return apply, filled(variables), (image(),)


class Mixer(nn.Module):
    """Layers along the patches, with biases, and layers along the channels."""

    width: int
    mixing: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (2, 2), strides=(2, 2), name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        y = nn.LayerNorm(name="norm1")(x).swapaxes(1, 2)
        y = nn.gelu(nn.Dense(self.mixing, name="mix_up")(y))
        x = x + nn.Dense(x.shape[1], name="mix_down")(y).swapaxes(1, 2)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dense(self.width, name="down")(y)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm3")(x).mean(1))


def response_norm(p, x):
    """Global response normalisation: channels compete by their norms over all positions."""
    norms = jnp.sqrt(jnp.sum(x**2, (1, 2), keepdims=True) + 1e-6)
    return x + p["scale"] * (x * norms / (norms.mean(-1, keepdims=True) + 1e-6)) + p["bias"]


def convnext(competing, *, width, hidden):
    """Depthwise kernels of seven pixels, a norm, two layers along the channels.

    competing: with global response normalisation, else with a scale per channel.
    """
    scale = dict(response=norm(hidden)) if competing else dict(scale=weights(width))
    variables = dict(
        stem=biased(2, 2, 3, width),
        norm0=norm(width),
        depthwise=biased(7, 7, 1, width),
        norm1=norm(width),
        up=biased(width, hidden),
        down=biased(hidden, width),
        norm2=norm(width),
        head=biased(width, CLASSES),
        **scale,
    )

    def apply(p, x):
        x = convolve(x, p["stem"]["kernel"], 2) + p["stem"]["bias"]
        x = layer_norm(p["norm0"], x)
        y = convolve(x, p["depthwise"]["kernel"], groups=width) + p["depthwise"]["bias"]
        y = nn.gelu(dense(p["up"], layer_norm(p["norm1"], y)))
        if competing:
            y = dense(p["down"], response_norm(p["response"], y))
        else:
            y = dense(p["down"], y) * p["scale"]
        return dense(p["head"], layer_norm(p["norm2"], (x + y).mean((1, 2))))

    return apply, filled(variables), (image(),)


class Mobilenet(nn.Module):
    """An inverted residual block with squeeze and excitation."""

    width: int
    hidden: int
    squeeze: int

    @nn.compact
    def __call__(self, x):
        def normed(x, name):
            return nn.BatchNorm(use_running_average=True, name=name)(x)

        x = nn.hard_swish(normed(nn.Conv(self.width, (3, 3), (2, 2), name="stem")(x), "norm0"))
        y = nn.Conv(self.hidden, (1, 1), use_bias=False, name="up")(x)
        y = nn.relu6(normed(y, "norm1"))
        y = nn.Conv(self.hidden, (3, 3), feature_group_count=self.hidden, name="depthwise")(y)
        y = nn.hard_swish(normed(y, "norm2"))
        gate = nn.relu(nn.Dense(self.squeeze, name="squeeze")(y.mean((1, 2))))
        gate = nn.hard_sigmoid(nn.Dense(self.hidden, name="excite")(gate))
        y = nn.Conv(self.width, (1, 1), name="down")(y * gate[:, None, None])
        x = x + normed(y, "norm3")
        return nn.Dense(CLASSES, name="head")(nn.avg_pool(x, (4, 4)).reshape(len(x), -1))


def swin(*, width, heads, size, hidden, later):
    """Attention in shifted windows of two by two patches; then four neighbours become one."""
    variables = dict(
        patches=biased(2, 2, 3, width),
        norm1=norm(width),
        qkv=biased(width, 3 * heads * size),
        near=weights(9, heads),
        out=biased(heads * size, width),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(4 * width),
        merge=weights(4 * width, later),
        head=biased(later, CLASSES),
    )
    row, column = np.divmod(np.arange(4, dtype=np.int32), 2)
    apart = 3 * (row[:, None] - row + 1) + column[:, None] - column + 1

    def windows(x):
        x = x.reshape(-1, 2, 2, 2, 2, x.shape[-1]).swapaxes(2, 3)
        return x.reshape(-1, 4, x.shape[-1])

    def image_of(x):
        x = x.reshape(-1, 2, 2, 2, 2, x.shape[-1]).swapaxes(2, 3)
        return x.reshape(-1, 4, 4, x.shape[-1])

    def attended(p, x):
        qkv = dense(p["qkv"], windows(x)).reshape(-1, 4, 3, heads, size)
        bias = jnp.moveaxis(p["near"][apart], -1, 0)
        mixed = attend(*jnp.moveaxis(qkv, 2, 0), bias)
        return image_of(dense(p["out"], mixed.reshape(-1, 4, heads * size)))

    def apply(p, x):
        x = convolve(x, p["patches"]["kernel"], 2) + p["patches"]["bias"]
        y = jnp.roll(layer_norm(p["norm1"], x), -1, (1, 2))
        x = x + jnp.roll(attended(p, y), 1, (1, 2))
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x))
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        merged = layer_norm(p["norm3"], jnp.concatenate(corners, -1)) @ p["merge"]
        return dense(p["head"], merged.mean((1, 2)))

    return apply, filled(variables), (image(),)


IMAGES = {
    "bit": Maker(bit, groups=2, inside=5, hidden=6),
    "hybrid vit": Maker(hybrid_vit, groups=2, inside=4, width=16, heads=2, size=6, hidden=32),
    "sincos vit": Maker(sincos_vit, width=16, heads=2, size=6, hidden=20),
    "mixer": Maker(linen, Mixer, image(), width=16, mixing=16, hidden=64),
    "convnext": Maker(convnext, False, width=16, hidden=80),
    "convnext v2": Maker(convnext, True, width=16, hidden=80),
    "mobilenet block": Maker(linen, Mobilenet, image(), width=8, hidden=24, squeeze=6),
    "swin": Maker(swin, width=16, heads=2, size=6, hidden=20, later=24),
}
