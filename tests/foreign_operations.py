"""Networks around one operation that few other networks have, as (apply, variables, inputs)."""

import jax
import jax.numpy as jnp
import numpy as np
from foreign import Maker, filled, image, rms_norm
from foreign_images import convolve
from foreign_text import biased, dense, layer_norm, norm, weights
from jax import lax
from jax.sharding import PartitionSpec as P
from numpy.random import default_rng

NODES = 7
SENDERS = np.array([0, 1, 2, 3, 4, 5, 6, 0, 2, 5])
RECEIVERS = np.array([1, 2, 3, 4, 5, 6, 0, 3, 6, 1])
SERIES = default_rng(3).normal(size=(2, 8, 6)).astype(np.float32)  # [batch, time, features]


def graph(*, width, hidden):
    """Messages of edges, made by two layers, are summed at the nodes."""
    layer = dict(
        send=biased(width, hidden),
        receive=weights(width, hidden),
        message=biased(hidden, width),
        node=biased(2 * width, width),
    )
    variables = dict(stem=biased(6, width), layers=[layer, layer], head=biased(width, 5))

    def apply(p, features, senders, receivers):
        x = jax.nn.relu(dense(p["stem"], features))
        for layer in p["layers"]:
            edges = dense(layer["send"], x[senders]) + x[receivers] @ layer["receive"]
            messages = dense(layer["message"], jax.nn.relu(edges))
            received = jax.ops.segment_sum(messages, receivers, NODES)
            x = x + jax.nn.relu(dense(layer["node"], jnp.concatenate([x, received], -1)))
        return dense(p["head"], x.mean(0))

    return apply, filled(variables), (SERIES.reshape(-1, 6)[:NODES], SENDERS, RECEIVERS)


def graph_attention(*, width, heads, size):
    """A softmax over the edges that end at a node, in each head."""
    layer = dict(
        kernel=weights(width, heads, size),
        sender=weights(heads, size),
        receiver=weights(heads, size),
        out=biased(heads * size, width),
    )
    variables = dict(stem=biased(6, width), layers=[layer, layer], head=biased(width, 5))

    def apply(p, features, senders, receivers):
        x = jax.nn.relu(dense(p["stem"], features))
        for layer in p["layers"]:
            y = jnp.einsum("nw,whs->nhs", x, layer["kernel"])
            scores = (y * layer["sender"]).sum(-1)[senders]
            scores = jax.nn.leaky_relu(scores + (y * layer["receiver"]).sum(-1)[receivers])
            greatest = jax.ops.segment_max(scores, receivers, NODES)
            shares = jnp.exp(scores - greatest[receivers])
            shares = shares / jax.ops.segment_sum(shares, receivers, NODES)[receivers]
            received = jax.ops.segment_sum(shares[..., None] * y[senders], receivers, NODES)
            x = x + jax.nn.elu(dense(layer["out"], received.reshape(NODES, -1)))
        return dense(p["head"], x.mean(0))

    return apply, filled(variables), (SERIES.reshape(-1, 6)[:NODES], SENDERS, RECEIVERS)


def state_space(*, width, hidden):
    """Each channel is convolved with its own kernel along time, by Fourier transforms."""
    variables = dict(
        stem=biased(6, width),
        norm=weights(width),
        kernel=weights(8, width),
        skip=weights(width),
        gate=biased(width, 2 * hidden),
        down=biased(hidden, width),
        head=biased(width, 5),
    )

    def apply(p, x):
        x = dense(p["stem"], x)
        y = rms_norm(x, p["norm"])
        spectrum = jnp.fft.rfft(y, 16, axis=1) * jnp.fft.rfft(p["kernel"], 16, axis=0)
        y = jnp.fft.irfft(spectrum, 16, axis=1)[:, :8] + p["skip"] * y
        first, second = jnp.split(dense(p["gate"], jax.nn.gelu(y)), 2, -1)
        x = x + dense(p["down"], first * jax.nn.sigmoid(second))
        return dense(p["head"], x.mean(1))

    return apply, filled(variables), (SERIES,)


def fourier(*, width, hidden):
    """Real parts of Fourier transforms along time mix the steps."""
    variables = dict(
        stem=biased(6, width),
        norm1=norm(width),
        up=biased(width, hidden),
        down=biased(hidden, width),
        norm2=norm(width),
        head=biased(width, 5),
    )

    def apply(p, x):
        x = dense(p["stem"], x)
        x = layer_norm(p["norm1"], x + jnp.fft.fft(x, axis=1).real)
        y = dense(p["down"], jax.nn.gelu(dense(p["up"], x)))
        return dense(p["head"], layer_norm(p["norm2"], x + y)[:, 0])

    return apply, filled(variables), (SERIES,)


def expert_layers(width, hidden):
    """Of four experts, with all around them."""
    return dict(
        stem=biased(6, width),
        router=weights(width, 4),
        up=weights(4, width, hidden),
        down=weights(4, hidden, width),
        head=biased(width, 5),
    )


def ragged_experts(*, width, hidden):
    """Every row goes to one expert; rows are sorted by their experts."""

    def apply(p, x):
        x = dense(p["stem"], x.reshape(-1, 6))
        scores = jax.nn.softmax(x @ p["router"])
        expert = jnp.argmax(scores, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=4)
        y = jax.nn.relu(lax.ragged_dot(x[order], p["up"], sizes))
        y = lax.ragged_dot(y, p["down"], sizes)
        x = x + y[jnp.argsort(order)] * scores.max(-1, keepdims=True)
        return dense(p["head"], x)

    return apply, filled(expert_layers(width, hidden)), (SERIES,)


def dense_experts(*, width, hidden):
    """All experts see every row."""

    def apply(p, x):
        x = dense(p["stem"], x)
        y = jax.nn.relu(jnp.einsum("btw,ewh->bteh", x, p["up"]))
        y = jnp.einsum("bteh,ehw->btew", y, p["down"])
        x = x + jnp.einsum("btew,bte->btw", y, jax.nn.softmax(x @ p["router"]))
        return dense(p["head"], x.mean(1))

    return apply, filled(expert_layers(width, hidden)), (SERIES,)


def layers_of_image(width, hidden):
    return dict(
        stem=biased(3, 3, 3, width),
        middle=biased(3, 3, width, hidden),
        head=biased(hidden, 5),
    )


def hidden_image(p, x):
    x = jax.nn.relu(convolve(x, p["stem"]["kernel"], 2) + p["stem"]["bias"])
    return jax.nn.relu(convolve(x, p["middle"]["kernel"]) + p["middle"]["bias"])


def reduced(*, width, hidden):
    """Pooled by a reduction with its own function."""

    def apply(p, x):
        x = hidden_image(p, x)
        greater = lambda a, b: lax.max(a, b)
        return dense(p["head"], lax.reduce(x, np.zeros((), x.dtype), greater, (1, 2)))

    return apply, filled(layers_of_image(width, hidden)), (image(),)


def called_back(*, width, hidden):
    """The program tells what its hidden layer is."""

    def apply(p, x):
        x = hidden_image(p, x)
        jax.debug.callback(lambda x: None, x)
        return dense(p["head"], x.mean((1, 2)))

    return apply, filled(layers_of_image(width, hidden)), (image(),)


def sharded(*, width, hidden):
    """Each device has a part of the batch; here there is one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def apply(p, x):
        def of_part(p, x):
            return dense(p["head"], hidden_image(p, x).mean((1, 2)))

        return jax.shard_map(of_part, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(
            p, x
        )

    return apply, filled(layers_of_image(width, hidden)), (image(),)


def neighbour_gates(*, width, hidden):
    """Every second channel is a gate of the one before it."""
    variables = dict(
        stem=biased(6, width),
        up=biased(width, 2 * hidden),
        down=biased(hidden, width),
        head=biased(width, 5),
    )

    def apply(p, x):
        x = dense(p["stem"], x)
        y = dense(p["up"], x)
        x = x + dense(p["down"], y[..., ::2] * jax.nn.sigmoid(y[..., 1::2]))
        return dense(p["head"], x.mean(1))

    return apply, filled(variables), (SERIES,)


def quantised(*, width, hidden):
    """Weights rounded to steps of the greatest magnitude of each kernel."""
    variables = dict(
        stem=biased(6, width),
        up=biased(width, hidden),
        down=biased(hidden, width),
        head=biased(width, 5),
    )

    def rounded(p):
        kernel = p["kernel"]
        step = jnp.max(jnp.abs(kernel)) / 127
        return dict(p, kernel=jnp.round(kernel / step) * step)

    def apply(p, x):
        x = dense(rounded(p["stem"]), x)
        x = x + dense(rounded(p["down"]), jax.nn.relu(dense(rounded(p["up"]), x)))
        return dense(rounded(p["head"]), x.mean(1))

    return apply, filled(variables), (SERIES,)


def scanned_layers(*, width, heads, size, hidden):
    """Weights of equal layers stacked, one turn of a loop each."""
    layer = dict(
        norm1=weights(2, width),
        qkv=weights(2, 3, width, heads, size),
        out=weights(2, heads, size, width),
        norm2=weights(2, width),
        gate=weights(2, width, hidden),
        up=weights(2, width, hidden),
        down=weights(2, hidden, width),
    )
    variables = dict(stem=biased(6, width), layers=layer, head=biased(width, 5))

    def turn(x, p):
        y = rms_norm(x, p["norm1"])
        q, k, v = jnp.einsum("btw,nwhd->nbthd", y, p["qkv"])
        shares = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        x = x + jnp.einsum("bhts,bshd,hdw->btw", shares, v, p["out"])
        y = rms_norm(x, p["norm2"])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

    def apply(p, x):
        x, _ = lax.scan(turn, dense(p["stem"], x), p["layers"])
        return dense(p["head"], x.mean(1))

    return apply, filled(variables), (SERIES,)


OPERATIONS = {
    "graph": Maker(graph, width=12, hidden=20),
    "graph attention": Maker(graph_attention, width=12, heads=2, size=6),
    "state space": Maker(state_space, width=12, hidden=20),
    "fourier": Maker(fourier, width=12, hidden=20),
    "ragged experts": Maker(ragged_experts, width=12, hidden=20),
    "dense experts": Maker(dense_experts, width=12, hidden=20),
    "reduced": Maker(reduced, width=8, hidden=12),
    "called back": Maker(called_back, width=8, hidden=12),
    "sharded": Maker(sharded, width=8, hidden=12),
    "neighbour gates": Maker(neighbour_gates, width=12, hidden=20),
    "quantised": Maker(quantised, width=12, hidden=20),
    "scanned layers": Maker(scanned_layers, width=12, heads=2, size=6, hidden=20),
}
