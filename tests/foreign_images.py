"""Image networks of well-known kinds, one or two blocks each, as (apply, variables, inputs)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
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
    """Residual blocks before which group norms stand; standardised kernels."""
    width = groups * inside
    block = dict(
        norm1=norm(width),
        first=weights(3, 3, width, groups * hidden),
        norm2=norm(groups * hidden),
        second=weights(3, 3, groups * hidden, width),
    )
    variables = dict(
        stem=weights(3, 3, 3, width),
        blocks=[block, block],
        norm=norm(width),
        head=biased(width, CLASSES),
    )

    def apply(p, x):
        x = convolve(x, standardised(p["stem"]))
        for block in p["blocks"]:
            y = nn.relu(group_norm(block["norm1"], x, groups))
            y = convolve(y, standardised(block["first"]))
            y = nn.relu(group_norm(block["norm2"], y, groups))
            x = x + convolve(y, standardised(block["second"]))
        x = nn.relu(group_norm(p["norm"], x, groups)).mean((1, 2))
        return dense(p["head"], x)

    return apply, filled(variables), (image(),)


def hybrid_vit(*, groups, inside, width, heads, size, hidden):
    """Patches of a convolution with standardised kernels, then a transformer."""
    stem = groups * inside
    variables = dict(
        stem=weights(3, 3, 3, stem),
        norm0=norm(stem),
        patches=biased(2, 2, stem, width),
        token=weights(1, 1, width),
        positions=weights(5, width),
        norm1=norm(width),
        attention=attention_layer(width, heads, size),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(width),
        head=biased(width, CLASSES),
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
        norm1=norm(width),
        attention=attention_layer(width, heads, size),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(width),
        head=biased(width, CLASSES),
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
        for i in range(2):
            y = nn.LayerNorm(name=f"norm1_{i}")(x).swapaxes(1, 2)
            y = nn.gelu(nn.Dense(self.mixing, name=f"mix_up{i}")(y))
            x = x + nn.Dense(x.shape[1], name=f"mix_down{i}")(y).swapaxes(1, 2)
            y = nn.LayerNorm(name=f"norm2_{i}")(x)
            y = nn.gelu(nn.Dense(self.hidden, name=f"up{i}")(y))
            x = x + nn.Dense(self.width, name=f"down{i}")(y)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


def response_norm(p, x):
    """Global response normalisation: channels compete by their norms over all positions."""
    norms = jnp.sqrt(jnp.sum(x**2, (1, 2), keepdims=True) + 1e-6)
    return x + p["scale"] * (x * norms / (norms.mean(-1, keepdims=True) + 1e-6)) + p["bias"]


def convnext(competing, *, width, hidden):
    """Depthwise kernels of seven pixels, a norm, two layers along the channels.

    competing: with global response normalisation, else with a scale per channel.
    """
    block = dict(
        depthwise=biased(7, 7, 1, width),
        norm=norm(width),
        up=biased(width, hidden),
        down=biased(hidden, width),
    )
    if competing:
        block["response"] = norm(hidden)
    else:
        block["scale"] = weights(width)
    variables = dict(
        stem=biased(2, 2, 3, width),
        norm0=norm(width),
        blocks=[block, block],
        norm=norm(width),
        head=biased(width, CLASSES),
    )

    def apply(p, x):
        x = convolve(x, p["stem"]["kernel"], 2) + p["stem"]["bias"]
        x = layer_norm(p["norm0"], x)
        for block in p["blocks"]:
            y = convolve(x, block["depthwise"]["kernel"], groups=width)
            y = layer_norm(block["norm"], y + block["depthwise"]["bias"])
            y = nn.gelu(dense(block["up"], y))
            if competing:
                y = dense(block["down"], response_norm(block["response"], y))
            else:
                y = dense(block["down"], y) * block["scale"]
            x = x + y
        return dense(p["head"], layer_norm(p["norm"], x.mean((1, 2))))

    return apply, filled(variables), (image(),)


class Mobilenet(nn.Module):
    """Inverted residual blocks with squeeze and excitation."""

    width: int
    hidden: int
    squeeze: int

    @nn.compact
    def __call__(self, x):
        def normed(x, name):
            return nn.BatchNorm(use_running_average=True, name=name)(x)

        x = nn.hard_swish(normed(nn.Conv(self.width, (3, 3), (2, 2), name="stem")(x), "norm0"))
        for i in range(2):
            y = nn.Conv(self.hidden, (1, 1), use_bias=False, name=f"up{i}")(x)
            y = nn.relu6(normed(y, f"norm1_{i}"))
            depthwise = nn.Conv(
                self.hidden, (3, 3), feature_group_count=self.hidden, name=f"depthwise{i}"
            )
            y = nn.hard_swish(normed(depthwise(y), f"norm2_{i}"))
            gate = nn.relu(nn.Dense(self.squeeze, name=f"squeeze{i}")(y.mean((1, 2))))
            gate = nn.hard_sigmoid(nn.Dense(self.hidden, name=f"excite{i}")(gate))
            y = nn.Conv(self.width, (1, 1), name=f"down{i}")(y * gate[:, None, None])
            x = x + normed(y, f"norm3_{i}")
        return nn.Dense(CLASSES, name="head")(nn.avg_pool(x, (4, 4)).reshape(len(x), -1))


def swin(*, width, heads, size, hidden, later):
    """Attention in windows of two by two patches, shifted in the second layer; then four
    neighbours become one."""
    layer = dict(
        norm1=norm(width),
        qkv=biased(width, 3 * heads * size),
        near=weights(9, heads),
        out=biased(heads * size, width),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
    )
    variables = dict(
        patches=biased(2, 2, 3, width),
        layers=[layer, layer],
        norm=norm(4 * width),
        merge=weights(4 * width, later),
        head=biased(later, CLASSES),
    )
    row, column = jnp.divmod(jnp.arange(4), 2)
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
        for shift, layer in enumerate(p["layers"]):
            y = jnp.roll(layer_norm(layer["norm1"], x), -shift, (1, 2))
            x = x + jnp.roll(attended(layer, y), shift, (1, 2))
            x = x + mlp(layer["mlp"], layer_norm(layer["norm2"], x))
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        merged = layer_norm(p["norm"], jnp.concatenate(corners, -1)) @ p["merge"]
        return dense(p["head"], merged.mean((1, 2)))

    return apply, filled(variables), (image(),)


IMAGES = {
    "bit": Maker(bit, groups=2, inside=4, hidden=6),
    "hybrid vit": Maker(hybrid_vit, groups=2, inside=4, width=16, heads=2, size=6, hidden=32),
    "sincos vit": Maker(sincos_vit, width=16, heads=2, size=6, hidden=20),
    "mixer": Maker(linen, Mixer, image(), width=16, mixing=20, hidden=32),
    "convnext": Maker(convnext, False, width=16, hidden=64),
    "convnext v2": Maker(convnext, True, width=16, hidden=64),
    "mobilenet block": Maker(linen, Mobilenet, image(), width=8, hidden=24, squeeze=6),
    "swin": Maker(swin, width=16, heads=2, size=6, hidden=20, later=24),
}
