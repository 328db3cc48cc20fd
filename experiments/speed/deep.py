"""Seconds to find the channel groups of deep transformers, and to make their jaxprs.

    python experiments/speed/deep.py
    python experiments/speed/deep.py --network vit --depths 12
    python experiments/speed/deep.py --network llama --width 4096 --heads 32 --hidden 11008 \
        --depths 32

Only shapes are traced, so no weights are needed. Prints a Markdown table, one row per depth:
medians, and the span of what the trace takes beyond three times the jaxpr.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsity_jax import groups


class Network(NamedTuple):
    """A transformer: its function, and the shapes of its variables and inputs."""

    apply: Callable
    variables: Any
    inputs: Any


class Sizes(NamedTuple):
    depth: int
    width: int
    heads: int
    hidden: int
    length: int = 64  # of the text, in tokens
    outputs: int = 1000  # words or classes


def weights(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, -1, keepdims=True)


def root_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(mean(x * x) + 1e-6) * scale


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    variance = mean(x * x) - mean(x) ** 2
    return (x - mean(x)) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    if causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask, scores, -1e9)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions."""
    length, half = x.shape[1], x.shape[-1] // 2
    rates = 1e4 ** (-jnp.arange(half) / half)
    angles = jnp.arange(length)[:, None, None] * rates
    first, second = jnp.split(x, 2, -1)
    turned = (
        first * jnp.cos(angles) - second * jnp.sin(angles),
        first * jnp.sin(angles) + second * jnp.cos(angles),
    )
    return jnp.concatenate(turned, -1)


def decoder(at: Sizes, layer: dict, block: Callable, **head: Any) -> Network:
    """Equal layers on tokens. block: (weights, x) -> x. head: else the embedding."""

    def apply(variables: Any, tokens: jax.Array) -> jax.Array:
        x = variables["embed"][tokens]
        for i in range(at.depth):
            x = block(variables[f"layer{i}"], x)
        return x @ (variables["head"] if head else variables["embed"].T)

    variables: dict = {f"layer{i}": layer for i in range(at.depth)}
    variables |= dict(embed=weights(at.outputs, at.width), **head)
    return Network(apply, variables, jax.ShapeDtypeStruct((1, at.length), int))


def gpt(at: Sizes) -> Network:
    """Queries, keys and values made by one kernel."""
    layer = dict(
        norms=weights(2, at.width),
        qkv=weights(at.width, 3 * at.width),
        out=weights(at.width, at.width),
        up=weights(at.width, at.hidden),
        down=weights(at.hidden, at.width),
    )

    def block(p: dict, x: jax.Array) -> jax.Array:
        qkv = jnp.split(root_norm(x, p["norms"][0]) @ p["qkv"], 3, -1)
        qkv = [part.reshape(*part.shape[:2], at.heads, -1) for part in qkv]
        x = x + attend(*qkv, causal=True) @ p["out"]
        return x + jax.nn.gelu(root_norm(x, p["norms"][1]) @ p["up"]) @ p["down"]

    return decoder(at, layer, block)


def llama(at: Sizes) -> Network:
    """Rotary positions and a gated hidden layer."""
    layer = dict(
        norm=weights(at.width),
        **{name: weights(at.width, at.width) for name in "qkvo"},
        mlp_norm=weights(at.width),
        gate=weights(at.width, at.hidden),
        up=weights(at.width, at.hidden),
        down=weights(at.hidden, at.width),
    )

    def block(p: dict, x: jax.Array) -> jax.Array:
        y = root_norm(x, p["norm"])
        q, k, v = ((y @ p[name]).reshape(*y.shape[:2], at.heads, -1) for name in "qkv")
        x = x + attend(rotate(q), rotate(k), v, causal=True) @ p["o"]
        y = root_norm(x, p["mlp_norm"])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]

    return decoder(at, layer, block, head=weights(at.width, at.outputs))


def vit(at: Sizes) -> Network:
    """A ViT for images of 224 pixels, in patches of 16, with biases."""
    row = functools.partial(weights, at.width)
    size = at.width // at.heads
    layer = dict(
        norm=dict(scale=row(), bias=row()),
        qkv=dict(kernel=row(3, at.heads, size), bias=weights(3, at.heads, size)),
        out=dict(kernel=weights(at.heads, size, at.width), bias=row()),
        mlp_norm=dict(scale=row(), bias=row()),
        up=dict(kernel=row(at.hidden), bias=weights(at.hidden)),
        down=dict(kernel=weights(at.hidden, at.width), bias=row()),
    )
    dense = lambda x, p: x @ p["kernel"] + p["bias"]

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        kernel = variables["patches"]
        x = jax.lax.conv_general_dilated(
            images, kernel, (16, 16), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x.reshape(len(x), -1, at.width) + variables["positions"]
        for i in range(at.depth):
            p = variables[f"layer{i}"]
            y = layer_norm(x, **p["norm"])
            qkv = jnp.einsum("btc,cnhd->nbthd", y, p["qkv"]["kernel"])
            heads = attend(*(qkv + p["qkv"]["bias"][:, None, None]), causal=False)
            kernel = p["out"]["kernel"].reshape(-1, at.width)
            x = x + heads @ kernel + p["out"]["bias"]
            y = layer_norm(x, **p["mlp_norm"])
            x = x + dense(jax.nn.gelu(dense(y, p["up"])), p["down"])
        return dense(x.mean(1), variables["head"])

    variables: dict = {f"layer{i}": layer for i in range(at.depth)}
    variables |= dict(
        patches=weights(16, 16, 3, at.width),
        positions=row(),
        head=dict(kernel=row(at.outputs), bias=weights(at.outputs)),
    )
    return Network(apply, variables, weights(1, 224, 224, 3))


NETWORKS = dict(gpt=gpt, llama=llama, vit=vit)


def cpu_seconds(function: Callable) -> float:
    jax.clear_caches()
    start = time.process_time()
    function()
    return time.process_time() - start


def row(network: Network, depth: int, repeats: int) -> str:
    apply, variables, inputs = network
    make = lambda: jax.make_jaxpr(apply)(variables, inputs)
    trace = lambda: groups.trace(apply, variables, inputs)
    made, traced, beyond = [], [], []
    for _ in range(repeats):  # in turn, as the machine's speed changes
        made.append(cpu_seconds(make))
        traced.append(cpu_seconds(trace))
        beyond.append(traced[-1] - 3 * made[-1])
    cells = [
        f"{depth}",
        f"{len(make().eqns)}",
        f"{statistics.median(made):.2f}",
        f"{statistics.median(traced):.2f}",
        f"{statistics.median(beyond):.2f} ({min(beyond):.2f} to {max(beyond):.2f})",
        f"{len(trace().groups)}",
    ]
    return f"| {' | '.join(cells)} |"


def main(
    network: str, depths: list[int], width: int, heads: int, hidden: int, repeats: int
) -> None:
    print(f"{network}, width {width}, {heads} heads, hidden {hidden}, jax {jax.__version__}\n")
    print("| layers | equations | make_jaxpr s | trace s | beyond 3 jaxprs s | groups |")
    print("|---|---|---|---|---|---|")
    for depth in depths:
        text = row(NETWORKS[network](Sizes(depth, width, heads, hidden)), depth, repeats)
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="gpt")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 96])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=7)
    main(**vars(parser.parse_args()))
