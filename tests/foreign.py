"""Networks that the library knows nothing of, as (apply, variables, inputs): Linen, NNX, Equinox
and plain JAX.

Each is small and has one idea that decides which of its channels are coupled. The keywords of its
maker are the sizes that can shrink. `CHANNELS` says how many channels each of its groups has:
counted by hand, so that a trace which freezes too much is noticed.
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


def linen(make, *inputs, **sizes):
    module = make(**sizes)
    return module.apply, filled(jax.eval_shape(module.init, jax.random.key(0), *inputs)), inputs


class Densenet(nn.Module):
    growth: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=True, name=f"bn{i}")(x))
            x = jnp.concatenate([x, nn.Conv(self.growth, (3, 3), name=f"conv{i}")(y)], -1)
        x = nn.avg_pool(x, (4, 4), (4, 4)).reshape(x.shape[0], -1)
        return nn.Dense(5, name="out")(nn.relu(nn.Dense(self.hidden, name="hidden")(x)))


class Resnext(nn.Module):
    width: int
    groups: int
    inputs: int  # of each group
    outputs: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (1, 1), name="stem")(x)
        y = nn.relu(nn.Conv(self.groups * self.inputs, (1, 1), name="reduce")(x))
        grouped = nn.Conv(
            self.groups * self.outputs, (3, 3), feature_group_count=self.groups, name="grouped"
        )
        x = nn.relu(x + nn.Conv(self.width, (1, 1), name="expand")(nn.relu(grouped(y))))
        return nn.Dense(5, name="out")(x.mean((1, 2)))


class Depthwise(nn.Module):
    stem: int
    filters: int  # for each channel
    pointwise: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.stem, (3, 3), name="stem")(x))
        depthwise = nn.Conv(
            self.stem * self.filters, (3, 3), feature_group_count=self.stem, name="depthwise"
        )
        x = nn.relu(nn.Conv(self.pointwise, (1, 1), name="pointwise")(nn.relu(depthwise(x))))
        return nn.Dense(5, name="out")(x.mean((1, 2)))


class Shuffle(nn.Module):
    inside: int  # each of three groups of the residual sum

    @nn.compact
    def __call__(self, x):
        width = 3 * self.inside
        x = nn.Conv(width, (1, 1), name="stem")(x)
        y = nn.relu(nn.Conv(12, (1, 1), feature_group_count=3, name="first")(x))
        y = y.reshape(*y.shape[:3], 3, 4).swapaxes(-1, -2).reshape(y.shape)  # channel shuffle
        y = nn.Conv(width, (1, 1), feature_group_count=3, name="second")(y)
        return nn.Dense(5, name="out")(nn.relu(x + y).mean((1, 2)))


class Unet(nn.Module):
    down1: int
    down2: int
    middle: int
    up2: int
    merge2: int
    up1: int

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(self.down1, (3, 3), name="down1")(x))
        b = nn.relu(nn.Conv(self.down2, (3, 3), name="down2")(nn.max_pool(a, (2, 2), (2, 2))))
        c = nn.relu(nn.Conv(self.middle, (3, 3), name="middle")(nn.max_pool(b, (2, 2), (2, 2))))
        up = nn.ConvTranspose(self.up2, (2, 2), strides=(2, 2), name="up2")(c)
        b = jnp.concatenate([b, up], -1)
        b = nn.relu(nn.Conv(self.merge2, (3, 3), name="merge2")(b))
        up = jax.image.resize(b, (*a.shape[:3], b.shape[-1]), "nearest")
        up = nn.ConvTranspose(self.up1, (3, 3), transpose_kernel=True, name="up1")(up)
        return nn.Conv(2, (1, 1), name="out")(jnp.concatenate([a, up], -1))


class Vit(nn.Module):
    width: int
    heads: int
    size: int  # of a head
    hidden: int

    @nn.compact
    def __call__(self, x):
        width = self.width
        x = nn.Conv(width, (4, 4), strides=(4, 4), name="patches")(x)
        x = x.reshape(x.shape[0], -1, width)
        token = self.param("token", nn.initializers.normal(), (1, 1, width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], width))
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, qkv_features=self.heads * self.size, name="attention"
        )
        x = x + attention(nn.LayerNorm(name="norm1")(x))
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dense(width, name="down")(y)
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


def transformer(fused, rotary, *, width, heads, shared, size, hidden):
    """One block of plain JAX with RMS norm and a gated MLP; qkv fused in one matrix or apart.

    heads: of k and v, each for `shared` heads of q.
    """
    variables = dict(
        norm=np.ones(width, np.float32),
        gate=normal(1, width, hidden),
        up=normal(2, width, hidden),
        down=normal(3, hidden, width),
        out=normal(4, heads * shared * size, width),
        logits=normal(5, width, 5),
        embed=normal(6, 100, width),
    )
    if fused:
        variables["qkv"] = normal(7, width, 3 * heads * size)
    else:
        variables |= dict(
            q=normal(7, width, heads * shared, size),
            k=normal(8, width, heads, size),
            v=normal(9, width, heads, size),
        )

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
            k, v = (jnp.repeat(part, shared, 2) for part in (k, v))
        if rotary:
            q, k = rotate(q), rotate(k)
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(size), -1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1)
        x = x + mixed @ variables["out"]
        x = x + (jax.nn.silu(x @ variables["gate"]) * (x @ variables["up"])) @ variables["down"]
        return x @ variables["logits"]

    return apply, variables, (np.arange(10).reshape(2, 5),)


class Groupnorm(nn.Module):
    groups: int
    inside: int  # each group
    second: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.groups * self.inside, (3, 3), name="conv")(x)
        x = nn.relu(nn.GroupNorm(num_groups=self.groups, name="norm")(x))
        x = nn.Conv(self.second, (3, 3), name="second")(x)
        x = nn.GroupNorm(num_groups=None, group_size=1, name="instance")(x)
        return nn.Dense(5, name="out")(x.max((1, 2)))


class Block(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.Dense(self.hidden, name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


class Scanned(nn.Module):
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="stem")(x.mean((1, 2)))
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(self.hidden, name="layers")(x, None)
        return nn.Dense(5, name="out")(x)


class Recurrent(nn.Module):
    cell: type
    width: int
    units: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x.reshape(x.shape[0], 8, -1))
        x = nn.RNN(self.cell(self.units, param_dtype=x.dtype), name="rnn")(x)
        return nn.Dense(5, name="out")(x[:, -1])


class Gated(nn.Module):
    """Squeeze and excitation, one convolution used twice, an embedding added."""

    width: int
    squeeze: int

    @nn.compact
    def __call__(self, x, index):
        x = nn.Conv(self.width, (3, 3), name="stem")(x)
        shared = nn.Conv(self.width, (3, 3), name="shared")
        x = nn.relu(shared(nn.relu(shared(x))))
        gate = nn.relu(nn.Dense(self.squeeze, name="squeeze")(x.mean((1, 2))))
        x = x * nn.sigmoid(nn.Dense(self.width, name="excite")(gate))[:, None, None]
        x = x.max((1, 2)) + nn.Embed(100, self.width, name="embed")(index)
        return nn.Dense(5, name="out")(x)


class NnxCnn(nnx.Module):
    def __init__(self, first, second, rngs):
        self.conv1 = nnx.Conv(3, first, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(first, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True)
        self.out = nnx.Linear(second * 16, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.out(self.dropout(x.reshape(x.shape[0], -1)))


def in_nnx(make, *inputs, **sizes):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(**sizes, rngs=nnx.Rngs(0))))
    return (lambda state, *inputs: nnx.merge(graph, state)(*inputs)), filled(state), inputs


def equinox_shapes(build):
    """Shapes of the arrays of build(), and all else."""
    import equinox as eqx  # an extra of the tests

    is_array = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    return eqx.partition(eqx.filter_eval_shape(build), is_array)


def equinox_cnn(*, groups, inside, second, hidden):
    import equinox as eqx

    def build():
        key = jax.random.key(0)
        layers = [
            eqx.nn.Conv2d(3, groups * inside, 3, key=key),
            eqx.nn.GroupNorm(groups, groups * inside),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(groups * inside, second, 3, key=key),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(second * 16, hidden, key=key),
            eqx.nn.Lambda(jax.nn.elu),
            eqx.nn.Linear(hidden, 5, key=key),
        ]
        return eqx.nn.Sequential(layers)

    params, static = equinox_shapes(build)
    apply = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    return apply, filled(params), (np.moveaxis(image(), -1, 1),)


def plain(*, hidden, state):
    """Weight norm, a branch, a loop, a constant of the size of a hidden layer."""
    variables = dict(
        v=normal(0, 12, hidden),
        g=normal(1, 1, hidden)[0],
        w=normal(2, hidden, state),
        u=normal(3, state, state),
        out=normal(4, state, 5),
    )
    constant = np.linspace(-1, 1, hidden, dtype=np.float32)

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


def tied_embedding(*, width):
    """Logits from the transposed embedding: the width can go, the vocabulary cannot."""
    variables = dict(embed=normal(0, 80, width), w=normal(1, width, width))
    apply = lambda v, tokens: jnp.tanh(v["embed"][tokens] @ v["w"]) @ v["embed"].T
    return apply, variables, (np.arange(6),)


Maker = functools.partial  # its keywords: the sizes that can shrink

FOREIGN = {
    "densenet": Maker(linen, Densenet, image(), growth=6, hidden=8),
    "resnext": Maker(linen, Resnext, image(), width=8, groups=4, inputs=3, outputs=3),
    "depthwise": Maker(linen, Depthwise, image(), stem=6, filters=2, pointwise=7),
    "shuffle": Maker(linen, Shuffle, image(), inside=4),
    "unet": Maker(linen, Unet, image(), down1=6, down2=8, middle=10, up2=7, merge2=9, up1=5),
    "vit": Maker(linen, Vit, image(), width=12, heads=3, size=4, hidden=20),
    "fused qkv": Maker(transformer, True, False, width=10, heads=4, shared=1, size=6, hidden=14),
    "rotary": Maker(transformer, False, True, width=10, heads=4, shared=1, size=6, hidden=14),
    "shared heads": Maker(
        transformer, False, False, width=10, heads=2, shared=2, size=6, hidden=14
    ),
    "groupnorm": Maker(linen, Groupnorm, image(), groups=4, inside=3, second=6),
    "scanned": Maker(linen, Scanned, image(), width=8, hidden=14),
    "lstm": Maker(
        linen, functools.partial(Recurrent, nn.OptimizedLSTMCell), image(), width=6, units=9
    ),
    "gru": Maker(linen, functools.partial(Recurrent, nn.GRUCell), image(), width=6, units=9),
    "gated": Maker(linen, Gated, image(), np.array([1, 5]), width=10, squeeze=4),
    "nnx": Maker(in_nnx, NnxCnn, image(), first=8, second=6),
    "equinox": Maker(equinox_cnn, groups=2, inside=4, second=6, hidden=7),
    "plain": Maker(plain, hidden=9, state=8),
    "tied embedding": Maker(tied_embedding, width=8),
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
