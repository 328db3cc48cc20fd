"""Language models of well-known kinds, one layer each, as (apply, variables, inputs).

What they share is built of functions of (variables, x); each keeps what is its own: positions,
norms, how heads are laid out, what is tied.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from foreign import Maker, equinox_shapes, filled, in_nnx, linen, rms_norm, rotate

WORDS = 160  # ten times the width and more, as in large models
LENGTH = 6
TOKENS = np.arange(2 * LENGTH).reshape(2, LENGTH) * 13 % WORDS
LATER = TOKENS[:, ::-1].copy()  # what a decoder reads


def weights(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def biased(*shape, outputs=1):
    """Kernel and bias of a layer; `outputs` counts the kernel's last axes that it makes."""
    return dict(kernel=weights(*shape), bias=weights(*shape[-outputs:]))


def norm(width):
    return dict(scale=weights(width), bias=weights(width))


def layer_norm(p, x):
    """In two passes: the mean is subtracted, then squares are summed."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def attend(q, k, v, bias=0.0):
    """bias: of the scores, [batch, heads, queries, keys] or less."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]) + bias
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def causal(length):
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -1e9)


def heads_of(width, heads, size):
    """Kernels of attention without biases."""
    made = dict.fromkeys("qkv", weights(width, heads, size))
    return dict(made, out=weights(heads, size, width))


def attention_layer(width, heads, size):
    made = dict.fromkeys("qkv", biased(width, heads, size, outputs=2))
    return dict(made, out=dict(kernel=weights(heads, size, width), bias=weights(width)))


def attention(p, x, memory, bias=0.0):
    """Of x to memory, with biases everywhere."""
    made = {}
    for name, source in (("q", x), ("k", memory), ("v", memory)):
        made[name] = jnp.einsum("btw,whd->bthd", source, p[name]["kernel"]) + p[name]["bias"]
    mixed = attend(**made, bias=bias)
    return jnp.einsum("bthd,hdw->btw", mixed, p["out"]["kernel"]) + p["out"]["bias"]


def mlp_layer(width, hidden):
    return dict(up=biased(width, hidden), down=biased(hidden, width))


def mlp(p, x, function=jax.nn.gelu):
    return dense(p["down"], function(dense(p["up"], x)))


def gpt2(*, width, heads, size, hidden):
    """One kernel makes q, k and v; learned positions, tied logits."""
    variables = dict(
        words=weights(WORDS, width),
        positions=weights(LENGTH, width),
        norm1=norm(width),
        qkv=biased(width, 3 * heads * size),
        out=biased(heads * size, width),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(width),
    )

    def apply(p, tokens):
        x = p["words"][tokens] + p["positions"]
        qkv = jnp.split(dense(p["qkv"], layer_norm(p["norm1"], x)), 3, -1)
        q, k, v = (part.reshape(*tokens.shape, heads, size) for part in qkv)
        mixed = attend(q, k, v, causal(LENGTH))
        x = x + dense(p["out"], mixed.reshape(*tokens.shape, -1))
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x))
        return layer_norm(p["norm3"], x) @ p["words"].T

    return apply, filled(variables), (TOKENS,)


def opt(*, width, heads, size, hidden):
    """Learned positions behind an offset, relu, q, k and v apart."""
    variables = dict(
        words=weights(WORDS, width),
        positions=weights(LENGTH + 2, width),
        norm1=norm(width),
        attention=attention_layer(width, heads, size),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(width),
    )

    def apply(p, tokens):
        x = jnp.take(p["words"], tokens, 0) + jnp.take(p["positions"], 2 + np.arange(LENGTH), 0)
        y = layer_norm(p["norm1"], x)
        x = x + attention(p["attention"], y, y, causal(LENGTH))
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x), jax.nn.relu)
        return layer_norm(p["norm3"], x) @ p["words"].T

    return apply, filled(variables), (TOKENS,)


def bloom(*, width, heads, size, hidden):
    """Scores fall with the distance, in each head by its own slope; a norm behind the embedding;
    q, k and v of a head side by side."""
    variables = dict(
        words=weights(WORDS, width),
        norm0=norm(width),
        norm1=norm(width),
        qkv=biased(width, heads * 3 * size),
        out=biased(heads * size, width),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(width),
    )
    slopes = 2.0 ** -np.arange(1, heads + 1)

    def apply(p, tokens):
        x = layer_norm(p["norm0"], p["words"][tokens])
        qkv = dense(p["qkv"], layer_norm(p["norm1"], x)).reshape(*tokens.shape, heads, 3, size)
        distance = jnp.arange(LENGTH) - (LENGTH - 1.0)
        alibi = (slopes[:, None] * distance)[:, None]
        mixed = attend(*jnp.moveaxis(qkv, 3, 0), alibi + causal(LENGTH))
        x = x + dense(p["out"], mixed.reshape(*tokens.shape, -1))
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x))
        return layer_norm(p["norm3"], x) @ p["words"].T

    return apply, filled(variables), (TOKENS,)


def llama(*, width, heads, shared, size, hidden):
    """Rotary positions in halves, root-mean-square norms, keys for several heads, a gate."""
    variables = dict(
        words=weights(WORDS, width),
        norm1=weights(width),
        q=weights(width, heads * shared * size),
        k=weights(width, heads * size),
        v=weights(width, heads * size),
        out=weights(heads * shared * size, width),
        norm2=weights(width),
        gate=weights(width, hidden),
        up=weights(width, hidden),
        down=weights(hidden, width),
        norm3=weights(width),
        logits=weights(width, WORDS),
    )

    def apply(p, tokens):
        x = jnp.take(p["words"], tokens, axis=0)
        y = rms_norm(x, p["norm1"])
        q, k, v = ((y @ p[name]).reshape(*tokens.shape, -1, size) for name in "qkv")
        k, v = (jnp.repeat(part, shared, 2) for part in (rotate(k), v))
        mixed = attend(rotate(q), k, v, causal(LENGTH))
        x = x + mixed.reshape(*tokens.shape, -1) @ p["out"]
        y = rms_norm(x, p["norm2"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return rms_norm(x, p["norm3"]) @ p["logits"]

    return apply, filled(variables), (TOKENS,)


def rotate_neighbours(x):
    """Rotary positions: pairs of neighbours on the last axis."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 100.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def gptj(*, width, heads, size, hidden):
    """Rotary positions of neighbours; attention and hidden layer read one norm, side by side."""
    variables = dict(
        words=weights(WORDS, width),
        norm1=norm(width),
        **heads_of(width, heads, size),
        mlp=mlp_layer(width, hidden),
        norm2=norm(width),
        logits=biased(width, WORDS),
    )

    def apply(p, tokens):
        x = p["words"][tokens]
        y = layer_norm(p["norm1"], x)
        q, k, v = (jnp.einsum("btw,whd->bthd", y, p[name]) for name in "qkv")
        mixed = attend(rotate_neighbours(q), rotate_neighbours(k), v, causal(LENGTH))
        x = x + jnp.einsum("bthd,hdw->btw", mixed, p["out"]) + mlp(p["mlp"], y)
        return dense(p["logits"], layer_norm(p["norm2"], x))

    return apply, filled(variables), (TOKENS,)


def t5(*, width, heads, size, hidden):
    """Encoder and decoder without biases; a table of biases for buckets of distances."""
    buckets = 8
    layer = dict(
        norm=weights(width),
        q=weights(width, heads * size),
        k=weights(width, heads * size),
        v=weights(width, heads * size),
        out=weights(heads * size, width),
    )
    hidden_layer = dict(norm=weights(width), up=weights(width, hidden), down=weights(hidden, width))
    variables = dict(
        words=weights(WORDS, width),
        near=weights(buckets, heads),
        near_decoder=weights(buckets, heads),
        layer=layer,
        hidden_layer=hidden_layer,
        decoder=layer,
        cross=layer,
        decoder_hidden=hidden_layer,
        norm=weights(width),
        norm_decoder=weights(width),
    )

    def positions(table):
        steps = jnp.arange(LENGTH)
        distance = steps[None] - steps[:, None]
        far = jnp.minimum(2 + jnp.log2(jnp.maximum(jnp.abs(distance), 1)), 3).astype(int)
        bucket = jnp.where(distance > 0, 4, 0) + jnp.where(abs(distance) < 2, abs(distance), far)
        return jnp.moveaxis(table[bucket], -1, 0)

    def attended(p, x, memory, bias):
        y = rms_norm(x, p["norm"])
        q, k, v = (
            (source @ p[name]).reshape(*x.shape[:2], heads, size)
            for name, source in (("q", y), ("k", y), ("v", y))
        )
        if memory is not None:
            k, v = ((memory @ p[name]).reshape(*x.shape[:2], heads, size) for name in "kv")
        mixed = attend(q, k, v, bias)
        return x + mixed.reshape(*x.shape[:2], -1) @ p["out"]

    def hidden_of(p, x):
        return x + jax.nn.relu(rms_norm(x, p["norm"]) @ p["up"]) @ p["down"]

    def apply(p, tokens, later):
        x = attended(p["layer"], p["words"][tokens], None, positions(p["near"]))
        memory = rms_norm(hidden_of(p["hidden_layer"], x), p["norm"])
        bias = positions(p["near_decoder"]) + causal(LENGTH)
        x = attended(p["decoder"], p["words"][later], None, bias)
        x = attended(p["cross"], x, memory, 0.0)
        x = rms_norm(hidden_of(p["decoder_hidden"], x), p["norm_decoder"])
        return x * width**-0.5 @ p["words"].T

    return apply, filled(variables), (TOKENS, LATER)


def bart(*, width, heads, size, hidden):
    """Encoder and decoder; norms behind each sum, learned positions, tied logits with a bias."""
    attention_of = attention_layer(width, heads, size)
    hidden_layer = mlp_layer(width, hidden)
    side = dict(positions=weights(LENGTH + 2, width), norm0=norm(width))
    side |= dict(attention=attention_of, norm1=norm(width), mlp=hidden_layer, norm2=norm(width))
    variables = dict(
        words=weights(WORDS, width),
        encoder=side,
        decoder=dict(side, cross=attention_of, norm3=norm(width)),
        bias=weights(WORDS),
    )

    def embedded(p, words, tokens):
        positions = jnp.take(p["positions"], 2 + np.arange(LENGTH), 0)
        return layer_norm(p["norm0"], jnp.take(words, tokens, 0) * np.sqrt(width) + positions)

    def apply(p, tokens, later):
        encoder, decoder = p["encoder"], p["decoder"]
        x = embedded(encoder, p["words"], tokens)
        x = layer_norm(encoder["norm1"], x + attention(encoder["attention"], x, x))
        memory = layer_norm(encoder["norm2"], x + mlp(encoder["mlp"], x))
        x = embedded(decoder, p["words"], later)
        y = attention(decoder["attention"], x, x, causal(LENGTH))
        x = layer_norm(decoder["norm1"], x + y)
        x = layer_norm(decoder["norm3"], x + attention(decoder["cross"], x, memory))
        x = layer_norm(decoder["norm2"], x + mlp(decoder["mlp"], x))
        return x @ p["words"].T + p["bias"]

    return apply, filled(variables), (TOKENS, LATER)


def sincos(length, width):
    """Positions as sines and cosines, constants of the program."""
    rates = 100.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)


def whisper(*, width, heads, size, hidden):
    """Sound through two convolutions and constant positions; a decoder that attends to it."""
    layer = dict(
        norm1=norm(width),
        attention=attention_layer(width, heads, size),
        norm2=norm(width),
        mlp=mlp_layer(width, hidden),
        norm3=norm(width),
    )
    variables = dict(
        stem=biased(3, 8, width),
        halving=biased(3, width, width),
        encoder=layer,
        words=weights(WORDS, width),
        positions=weights(LENGTH, width),
        decoder=dict(layer, norm0=norm(width), cross=attention_layer(width, heads, size)),
    )
    sound = np.sin(np.arange(2 * 12 * 8)).reshape(2, 12, 8).astype(np.float32)

    def convolved(p, x, stride):
        return p["bias"] + jax.lax.conv_general_dilated(
            x, p["kernel"], (stride,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def apply(p, sound, tokens):
        x = jax.nn.gelu(convolved(p["stem"], sound, 1))
        x = jax.nn.gelu(convolved(p["halving"], x, 2)) + sincos(6, width)
        encoder, decoder = p["encoder"], p["decoder"]
        y = layer_norm(encoder["norm1"], x)
        x = x + attention(encoder["attention"], y, y)
        x = x + mlp(encoder["mlp"], layer_norm(encoder["norm2"], x))
        memory = layer_norm(encoder["norm3"], x)
        x = p["words"][tokens] + p["positions"]
        y = layer_norm(decoder["norm0"], x)
        x = x + attention(decoder["attention"], y, y, causal(LENGTH))
        x = x + attention(decoder["cross"], layer_norm(decoder["norm1"], x), memory)
        x = x + mlp(decoder["mlp"], layer_norm(decoder["norm2"], x))
        return layer_norm(decoder["norm3"], x) @ p["words"].T

    return apply, filled(variables), (sound, TOKENS)


class Bert(nn.Module):
    """Three tables added, norms behind each sum, the transposed table for the words left out."""

    width: int
    heads: int
    size: int
    hidden: int

    @nn.compact
    def __call__(self, tokens, kinds):
        words = nn.Embed(WORDS, self.width, name="words")
        x = words(tokens) + nn.Embed(LENGTH, self.width, name="positions")(np.arange(LENGTH))
        x = nn.LayerNorm(name="norm0")(x + nn.Embed(2, self.width, name="kinds")(kinds))
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, qkv_features=self.heads * self.size, name="attention"
        )
        x = nn.LayerNorm(name="norm1")(x + attention(x))
        y = nn.gelu(nn.Dense(self.hidden, name="up")(x))
        x = nn.LayerNorm(name="norm2")(x + nn.Dense(self.width, name="down")(y))
        y = nn.LayerNorm(name="norm3")(nn.gelu(nn.Dense(self.width, name="transform")(x)))
        bias = self.param("bias", nn.initializers.zeros, (WORDS,))
        return words.attend(y) + bias, nn.Dense(2, name="next")(nn.tanh(x[:, 0]))


class NnxDecoder(nnx.Module):
    """Embeddings, norms and attention of NNX."""

    def __init__(self, width, heads, size, hidden, rngs):
        self.words = nnx.Embed(WORDS, width, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, heads * size, decode=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, tokens):
        x = self.words(tokens)
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(tokens))
        x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
        return self.words.attend(x)


def equinox_encoder(*, width, heads, size, hidden):
    """Embedding, norms and attention of Equinox, written for one text."""
    import equinox as eqx  # an extra of the tests

    def build():
        key = jax.random.key(0)
        return dict(
            words=eqx.nn.Embedding(WORDS, width, key=key),
            attention=eqx.nn.MultiheadAttention(heads, width, qk_size=size, vo_size=size, key=key),
            norm1=eqx.nn.LayerNorm(width),
            mlp=eqx.nn.MLP(width, width, hidden, 1, jax.nn.gelu, key=key),
            norm2=eqx.nn.LayerNorm(width),
            out=eqx.nn.Linear(width, 5, key=key),
        )

    params, static = equinox_shapes(build)

    def of_text(params, tokens):
        p = eqx.combine(params, static)
        x = jax.vmap(p["words"])(tokens)
        x = jax.vmap(p["norm1"])(x + p["attention"](x, x, x))
        x = jax.vmap(p["norm2"])(x + jax.vmap(p["mlp"])(x))
        return p["out"](x.mean(0))

    apply = lambda params, tokens: jax.vmap(of_text, (None, 0))(params, tokens)
    return apply, filled(params), (TOKENS,)


def cached(*, width, heads, size):
    """A step of generation: keys and values of the new words are put into rows of a cache."""
    variables = dict(
        words=weights(WORDS, width),
        norm=weights(width),
        **heads_of(width, heads, size),
    )

    def apply(p, tokens, rows):
        x = p["words"][tokens]
        y = rms_norm(x, p["norm"])
        q, k, v = (jnp.einsum("btw,whd->bthd", y, p[name]) for name in "qkv")
        empty = jnp.zeros((len(tokens), 8, heads, size), x.dtype)
        k = empty.at[:, rows].set(k)
        v = jax.lax.dynamic_update_slice(empty, v, (0, rows[0], 0, 0))
        x = x + jnp.einsum("bthd,hdw->btw", attend(q, k, v), p["out"])
        return x @ p["words"].T

    return apply, filled(variables), (TOKENS[:, :3], np.array([1, 2, 4]))


SIZES = dict(width=16, heads=2, size=6, hidden=20)
ROTARY = dict(SIZES, size=8)  # four pairs

TEXT = {
    "gpt2": Maker(gpt2, **SIZES),
    "opt": Maker(opt, **SIZES),
    "bloom": Maker(bloom, **SIZES),
    "llama": Maker(llama, **ROTARY, shared=2),
    "gptj": Maker(gptj, **ROTARY),
    "t5": Maker(t5, **SIZES),
    "bart": Maker(bart, **SIZES),
    "whisper": Maker(whisper, **SIZES),
    "bert": Maker(linen, Bert, TOKENS, LATER % 2, **SIZES),
    "nnx decoder": Maker(in_nnx, NnxDecoder, TOKENS, **SIZES),
    "equinox encoder": Maker(equinox_encoder, **SIZES),
    "cached": Maker(cached, width=16, heads=2, size=6),
}
