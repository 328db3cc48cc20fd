"""Networks that the library knows nothing of, as (apply, variables, inputs): Linen, NNX, Equinox
and plain JAX.

Each is small and has one idea that decides which of its channels are coupled. `CHANNELS` says how
many channels each of its groups has: counted by hand, so that a trace which freezes too much is
noticed.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.random import default_rng


def image(channels=3, size=8, batch=2):
    return default_rng(7).normal(size=(batch, size, size, channels)).astype(np.float32)


def normal(seed, *shape):
    """Numbers whose products keep their size."""
    return np.float32(default_rng(seed).normal(size=shape) / np.sqrt(math.prod(shape[:-1])))


def filled(shapes):
    """Random arrays of these shapes; vectors are positive, as variances must be."""
    leaves, tree = jax.tree.flatten(shapes)
    vector = lambda i, leaf: np.float32(default_rng(i).uniform(0.5, 1.5, leaf.shape))
    arrays = [
        normal(i, *leaf.shape) if leaf.ndim > 1 else vector(i, leaf)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)


def linen(module, *inputs):
    return module.apply, filled(jax.eval_shape(module.init, jax.random.key(0), *inputs)), inputs


class Densenet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=True, name=f"bn{i}")(x))
            x = jnp.concatenate([x, nn.Conv(6, (3, 3), name=f"conv{i}")(y)], -1)
        x = nn.avg_pool(x, (4, 4), (4, 4)).reshape(x.shape[0], -1)
        return nn.Dense(5, name="out")(nn.relu(nn.Dense(8, name="hidden")(x)))


class Resnext(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (1, 1), name="stem")(x)
        y = nn.relu(nn.Conv(12, (1, 1), name="reduce")(x))
        y = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(y))
        x = nn.relu(x + nn.Conv(8, (1, 1), name="expand")(y))
        return nn.Dense(5, name="out")(x.mean((1, 2)))


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        x = nn.relu(
            nn.Conv(12, (3, 3), feature_group_count=6, name="depthwise")(x)
        )  # two filters for each channel
        x = nn.relu(nn.Conv(7, (1, 1), name="pointwise")(x))
        return nn.Dense(5, name="out")(x.mean((1, 2)))


class Shuffle(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (1, 1), name="stem")(x)
        y = nn.relu(nn.Conv(12, (1, 1), feature_group_count=3, name="first")(x))
        y = y.reshape(*y.shape[:3], 3, 4).swapaxes(-1, -2).reshape(y.shape)  # channel shuffle
        y = nn.Conv(12, (1, 1), feature_group_count=3, name="second")(y)
        return nn.Dense(5, name="out")(nn.relu(x + y).mean((1, 2)))


class Unet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(6, (3, 3), name="down1")(x))
        b = nn.relu(nn.Conv(8, (3, 3), name="down2")(nn.max_pool(a, (2, 2), (2, 2))))
        c = nn.relu(nn.Conv(10, (3, 3), name="middle")(nn.max_pool(b, (2, 2), (2, 2))))
        b = jnp.concatenate([b, nn.ConvTranspose(7, (2, 2), strides=(2, 2), name="up2")(c)], -1)
        b = nn.relu(nn.Conv(9, (3, 3), name="merge2")(b))
        up = jax.image.resize(b, (*a.shape[:3], b.shape[-1]), "nearest")
        up = nn.ConvTranspose(5, (3, 3), transpose_kernel=True, name="up1")(up)
        return nn.Conv(2, (1, 1), name="out")(jnp.concatenate([a, up], -1))


class Vit(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), strides=(4, 4), name="patches")(x).reshape(x.shape[0], -1, 12)
        x = jnp.concatenate(
            [
                jnp.tile(
                    self.param("token", nn.initializers.normal(), (1, 1, 12)), (x.shape[0], 1, 1)
                ),
                x,
            ],
            1,
        )
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 12))
        attention = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12, name="attention")
        x = x + attention(nn.LayerNorm(name="norm1")(x))
        y = nn.gelu(nn.Dense(20, name="up")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dense(12, name="down")(y)
        return nn.Dense(5, name="out")(nn.LayerNorm(name="norm3")(x)[:, 0])


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


def rotate(x):
    """Rotary positions: pairs of halves of the last axis."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 100 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def transformer(fused=True, rotary=False, groups=1):
    """One block of plain JAX with RMS norm and a gated MLP; qkv fused in one matrix or apart, heads
    possibly shared.
    """
    width, heads, size = 10, 4, 6
    variables = dict(
        norm=np.ones(width, np.float32),
        gate=normal(1, width, 14),
        up=normal(2, width, 14),
        down=normal(3, 14, width),
        out=normal(4, heads * size, width),
        logits=normal(5, width, 5),
        embed=normal(6, 11, width),
    )
    if fused:
        variables["qkv"] = normal(7, width, 3 * heads * size)
    else:
        variables |= dict(
            q=normal(7, width, heads, size), k=normal(8, width, heads // groups, size)
        )
        variables |= dict(v=normal(9, width, heads // groups, size))

    def apply(variables, tokens):
        x = variables["embed"][tokens]
        y = rms_norm(x, variables["norm"])
        if fused:
            q, k, v = (
                part.reshape(*x.shape[:2], heads, size)
                for part in jnp.split(y @ variables["qkv"], 3, -1)
            )
        else:
            q, k, v = (jnp.einsum("btw,whd->bthd", y, variables[name]) for name in "qkv")
            k, v = (jnp.repeat(part, groups, 2) for part in (k, v))
        if rotary:
            q, k = rotate(q), rotate(k)
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(size), -1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1)
        x = x + mixed @ variables["out"]
        x = x + (jax.nn.silu(x @ variables["gate"]) * (x @ variables["up"])) @ variables["down"]
        return x @ variables["logits"]

    return apply, variables, (np.arange(10).reshape(2, 5),)


class Groupnorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=4, name="norm")(nn.Conv(12, (3, 3), name="conv")(x)))
        x = nn.GroupNorm(num_groups=None, group_size=1, name="instance")(
            nn.Conv(6, (3, 3), name="second")(x)
        )
        return nn.Dense(5, name="out")(x.max((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(14, name="up")(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="stem")(x.mean((1, 2)))
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(5, name="out")(x)


class Recurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x.reshape(x.shape[0], 8, -1))
        x = nn.RNN(self.cell(9), name="rnn")(x)
        return nn.Dense(5, name="out")(x[:, -1])


class Gated(nn.Module):
    """Squeeze and excitation, one convolution used twice, an embedding added."""

    @nn.compact
    def __call__(self, x, index):
        x = nn.Conv(10, (3, 3), name="stem")(x)
        shared = nn.Conv(10, (3, 3), name="shared")
        x = nn.relu(shared(nn.relu(shared(x))))
        gate = nn.relu(nn.Dense(4, name="squeeze")(x.mean((1, 2))))
        x = x * nn.sigmoid(nn.Dense(10, name="excite")(gate))[:, None, None]
        return nn.Dense(5, name="out")(x.max((1, 2)) + nn.Embed(7, 10, name="embed")(index))


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True)
        self.out = nnx.Linear(6 * 16, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.out(self.dropout(x.reshape(x.shape[0], -1)))


def nnx_cnn():
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxCnn(nnx.Rngs(0))))
    return (lambda state, x: nnx.merge(graph, state)(x)), filled(state), (image(),)


def equinox_cnn():
    import equinox as eqx  # an extra of the tests

    key = jax.random.key(0)
    layers = [
        eqx.nn.Conv2d(3, 8, 3, key=key),
        eqx.nn.GroupNorm(2, 8),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(8, 6, 3, key=key),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(6 * 16, 7, key=key),
        eqx.nn.Lambda(jax.nn.elu),
        eqx.nn.Linear(7, 5, key=key),
    ]
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_inexact_array)
    apply = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    return apply, filled(params), (np.moveaxis(image(), -1, 1),)


def plain():
    """Weight norm, a branch, a loop, a constant of the size of a hidden layer."""
    variables = dict(
        v=normal(0, 12, 9),
        g=normal(1, 1, 9)[0],
        w=normal(2, 9, 8),
        u=normal(3, 8, 8),
        out=normal(4, 8, 5),
    )
    constant = np.linspace(-1, 1, 9, dtype=np.float32)

    def apply(variables, x):
        v = variables["v"]
        kernel = v * (variables["g"] / jnp.sqrt(jnp.sum(v**2, 0) + 1e-6))
        x = jnp.tanh(x @ kernel) * constant
        x = jax.lax.cond(
            x.sum() > 0,
            lambda x: jax.nn.relu(x @ variables["w"]),
            lambda x: x @ variables["w"] * 2.0,
            x,
        )
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ variables["u"]), x)
        return x @ variables["out"]

    return apply, variables, (normal(5, 4, 12),)


def tied_embedding():
    """Logits from the transposed embedding: the width can go, the vocabulary cannot."""
    variables = dict(embed=normal(0, 11, 8), w=normal(1, 8, 8))
    apply = lambda v, tokens: jnp.tanh(v["embed"][tokens] @ v["w"]) @ v["embed"].T
    return apply, variables, (np.arange(6),)


FOREIGN = {
    "densenet": functools.partial(linen, Densenet(), image()),
    "resnext": functools.partial(linen, Resnext(), image()),
    "depthwise": functools.partial(linen, Depthwise(), image()),
    "shuffle": functools.partial(linen, Shuffle(), image()),
    "unet": functools.partial(linen, Unet(), image()),
    "vit": functools.partial(linen, Vit(), image()),
    "fused qkv": transformer,
    "rotary": functools.partial(transformer, fused=False, rotary=True),
    "shared heads": functools.partial(transformer, fused=False, groups=2),
    "groupnorm": functools.partial(linen, Groupnorm(), image()),
    "scanned": functools.partial(linen, Scanned(), image()),
    "lstm": functools.partial(linen, Recurrent(nn.OptimizedLSTMCell), image()),
    "gru": functools.partial(linen, Recurrent(nn.GRUCell), image()),
    "gated": functools.partial(linen, Gated(), image(), np.array([1, 5])),
    "nnx": nnx_cnn,
    "equinox": equinox_cnn,
    "plain": plain,
    "tied embedding": tied_embedding,
}

KINDS = {  # what a human calls the channels of each group, in order of use
    "vit": ("channels", "heads", "head dimensions", "head dimensions", "hidden units"),
    "shared heads": (
        *("residual channels", "key-value heads", "query heads of each"),
        *("head dimensions", "head dimensions", "hidden units"),
    ),
    "fused qkv": (
        *("residual channels", "heads", "head dimensions"),
        *("head dimensions", "hidden units"),
    ),
    "gated": ("channels", "hidden units"),
    "lstm": ("hidden units", "hidden units"),
}

CHANNELS = {  # sizes of the groups
    "densenet": (6, 6, 6, 8),
    "resnext": (
        8,
        4,
        3,
        3,
    ),  # residual sum; groups of the convolution, inputs and outputs of each group
    "depthwise": (6, 2, 7),  # stem with its filters, the two filters of every channel
    "shuffle": (
        4,
    ),  # positions within a group of the residual sum; the shuffle ties all else to everything
    "unet": (6, 8, 10, 7, 9, 5),
    "vit": (12, 3, 4, 4, 20),  # width, heads, q-k and v of a head, hidden units
    "fused qkv": (10, 4, 6, 6, 14),
    "rotary": (10, 4, 3, 6, 14),  # q and k turn in pairs, each by its own angle
    "shared heads": (10, 2, 2, 6, 6, 14),  # heads: shared ones, and q's in each of them
    "groupnorm": (4, 3, 6),  # groups, positions within them; channels normalised alone
    "scanned": (8, 14),
    "lstm": (6, 9),
    "gru": (6, 9),
    "gated": (10, 4),
    "nnx": (8, 6),
    "equinox": (2, 6, 7),  # whole groups: this group norm subtracts the mean before it squares
    "plain": (9, 8),
    "tied embedding": (8,),
}
