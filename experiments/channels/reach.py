"""How much of a network is left when every channel group keeps half of its channels.

    python experiments/channels/reach.py
    python experiments/channels/reach.py --sources tests keras --networks "mixer|Mobile.*"

Prints a Markdown table, one row per network: what is left by default and with `sums="zeroed"`, as
a share of all parameters, and what `groups.check` finds for the second. Networks are those written
for the tests, and those of public libraries that are installed: Equinox, Haiku, Keras, and
Transformers with Flax. No weights are read: networks are small variants of theirs with random
weights.
"""

import argparse
import functools
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import groups, trees
from sparsity_jax.types import Arrays, PyTree

TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests"
HEAD = """\
| network | parameters | left | zeroed | best possible | make_jaxpr, s | trace, s | difference |
|---|---|---|---|---|---|---|---|"""
Struct = jax.ShapeDtypeStruct


class Network(NamedTuple):
    """A function of variables and inputs, with random variables."""

    apply: Callable
    variables: PyTree
    inputs: tuple


Makers = dict[str, Callable[[], tuple]]  # by name; each makes a Network, or its three parts


# What is left ------------------------------------------------------------------------------------


def half(size: int) -> int:
    return max(1, size // 2)


def best_share(maker: functools.partial) -> float:
    """Parameters of the network with half of every size that can shrink, over those of all.

    maker: its keywords are these sizes; it returns (apply, variables, inputs).
    """
    sizes = {name: half(size) for name, size in maker.keywords.items()}
    _, variables, _ = maker()
    _, small, _ = maker.func(*maker.args, **sizes)
    return trees.size(small) / trees.size(variables)


def first_half(channels: groups.Channels) -> Arrays:
    """Which channels stay, by group."""
    return {name: np.arange(size) < half(size) for name, size in channels.sizes.items()}


def share_left(channels: groups.Channels) -> float:
    """Of all parameters, when every group keeps its first half."""
    small = groups.compact_shapes(channels, first_half(channels))
    return trees.size(small) / trees.size(channels.shapes)


# Networks ----------------------------------------------------------------------------------------


def random_like(shapes: PyTree) -> PyTree:
    """Random arrays of these shapes and types; integers are zero."""

    def drawn(number: int, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, leaf.dtype)
        draw = np.random.default_rng(number)
        if max(leaf.shape, default=1) == math.prod(leaf.shape):
            values = draw.uniform(0.5, 1.5, leaf.shape)  # variances must be positive
        else:
            values = draw.standard_normal(leaf.shape, np.float32)
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        return values.astype(leaf.dtype)

    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, map(drawn, range(len(leaves)), leaves))


def images(size: int = 64) -> np.ndarray:
    return random_like(Struct((2, size, size, 3), jnp.float32))


def words(length: int = 8) -> np.ndarray:
    """Numbers of words in two texts."""
    return np.arange(2 * length).reshape(2, length)


def of_tests() -> Makers:
    sys.path.insert(0, str(TESTS))
    from architectures import NETWORKS

    return NETWORKS


def of_equinox() -> Makers:
    import equinox as eqx

    key = jax.random.key(0)

    def network(build: Callable, inputs: np.ndarray, examples: Callable) -> Network:
        is_array = lambda leaf: isinstance(leaf, Struct)
        shapes, static = eqx.partition(eqx.filter_eval_shape(build), is_array)
        apply = lambda params, x: examples(eqx.combine(params, static))(x)
        return Network(apply, random_like(shapes), (inputs,))

    sequence = random_like(Struct((2, 8, 64), jnp.float32))
    attended = lambda model: jax.vmap(lambda x: model(x, x, x))
    mlp = lambda: eqx.nn.MLP(64, 10, 128, 3, key=key)
    attention = lambda: eqx.nn.MultiheadAttention(4, 64, qk_size=24, vo_size=16, key=key)
    return {
        "MLP": lambda: network(mlp, sequence[:, 0], jax.vmap),
        "MultiheadAttention": lambda: network(attention, sequence, attended),
    }


def of_haiku() -> Makers:
    import haiku as hk

    def network(function: Callable) -> Network:
        """function: (images, whether for training) -> logits."""
        transformed = hk.transform_with_state(function)
        x = images()
        init = lambda key: transformed.init(key, x, True)
        params, state = random_like(jax.eval_shape(init, jax.random.key(0)))

        def apply(variables: PyTree, x: jax.Array) -> jax.Array:
            result, _ = transformed.apply(variables["params"], variables["state"], None, x, False)
            return result

        return Network(apply, dict(params=params, state=state), (x,))

    flat = lambda: hk.Sequential([hk.Flatten(), hk.nets.MLP([32, 32, 10])])
    functions = {
        "MLP": lambda x, training: flat()(x),
        "ResNet18": lambda x, training: hk.nets.ResNet18(10)(x, training),
        "ResNet50": lambda x, training: hk.nets.ResNet50(10, resnet_v2=True)(x, training),
        "MobileNetV1": lambda x, training: hk.nets.MobileNetV1(num_classes=10)(x, training),
    }
    return {name: functools.partial(network, own) for name, own in functions.items()}


def of_keras() -> Makers:
    os.environ["KERAS_BACKEND"] = "jax"  # before the first import
    import keras

    def network(name: str, **options: Any) -> Network:
        build = getattr(keras.applications, name)
        model = build(weights=None, classes=10, input_shape=(64, 64, 3), **options)
        variables = {variable.path: variable.value for variable in model.variables}
        arrays_of = lambda kind, own: [own[variable.path] for variable in kind]

        def apply(own: Arrays, x: jax.Array) -> jax.Array:
            trained = arrays_of(model.trainable_variables, own)
            others = arrays_of(model.non_trainable_variables, own)
            result, _ = model.stateless_call(trained, others, x, training=False)
            return result

        return Network(apply, random_like(variables), (images(),))

    options = {
        "MobileNet": dict(alpha=0.25),
        "MobileNetV2": dict(alpha=0.35),
        "MobileNetV3Small": dict(minimalistic=False),
        "ResNet50": {},
        "ResNet50V2": {},
        "DenseNet121": {},
        "EfficientNetB0": {},
        "ConvNeXtTiny": {},
    }
    return {name: functools.partial(network, name, **own) for name, own in options.items()}


SOUND = np.sin(np.arange(2.0 * 80 * 32)).reshape(2, 80, 32).astype(np.float32)
TEXT = dict(input_ids=words())
TEXTS = dict(TEXT, decoder_input_ids=words())
WIDTHS = dict(vocab_size=4096, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
SIDES = dict(
    d_model=128,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=512,
    decoder_ffn_dim=512,
)
TRANSFORMERS: dict = {  # config, model, inputs, options of the config
    "BERT": ("BertConfig", "FlaxBertForMaskedLM", TEXT, dict(WIDTHS, intermediate_size=512)),
    "GPT-2": (
        "GPT2Config",
        "FlaxGPT2LMHeadModel",
        TEXT,
        dict(vocab_size=4096, n_embd=128, n_layer=2, n_head=4),
    ),
    "GPT-J": (
        "GPTJConfig",
        "FlaxGPTJForCausalLM",
        TEXT,
        dict(vocab_size=4096, n_positions=64, n_embd=128, n_layer=2, n_head=4, rotary_dim=16),
    ),
    "OPT": (
        "OPTConfig",
        "FlaxOPTForCausalLM",
        TEXT,
        dict(WIDTHS, ffn_dim=512, word_embed_proj_dim=128, max_position_embeddings=64),
    ),
    "BLOOM": (
        "BloomConfig",
        "FlaxBloomForCausalLM",
        TEXT,
        dict(vocab_size=4096, hidden_size=128, n_layer=2, n_head=4),
    ),
    "Llama": (
        "LlamaConfig",
        "FlaxLlamaForCausalLM",
        TEXT,
        dict(WIDTHS, intermediate_size=344, max_position_embeddings=64, num_key_value_heads=2),
    ),
    "T5": (
        "T5Config",
        "FlaxT5ForConditionalGeneration",
        TEXTS,
        dict(vocab_size=4096, d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4),
    ),
    "BART": (
        "BartConfig",
        "FlaxBartForConditionalGeneration",
        TEXTS,
        dict(SIDES, vocab_size=4096, max_position_embeddings=64),
    ),
    "Whisper": (
        "WhisperConfig",
        "FlaxWhisperForConditionalGeneration",
        dict(input_features=SOUND, decoder_input_ids=words()),
        dict(SIDES, vocab_size=4096, max_source_positions=16, max_target_positions=16),
    ),
    "ViT": (
        "ViTConfig",
        "FlaxViTForImageClassification",
        dict(pixel_values=np.moveaxis(images(), -1, 1)),
        dict(WIDTHS, intermediate_size=512, image_size=64),
    ),
}


def of_transformers() -> Makers:
    import transformers

    if not hasattr(transformers, "FlaxPreTrainedModel"):
        raise ImportError("versions 5 and later have no Flax models")

    def network(config: str, model: str, inputs: dict, options: dict) -> Network:
        settings = getattr(transformers, config)(**options)
        built = getattr(transformers, model)(settings, _do_init=False)
        init = lambda key: built.init_weights(key, built.input_shape)
        shapes = jax.eval_shape(init, jax.random.key(0))
        apply = lambda params, inputs: built(**inputs, params=params)[0]
        return Network(apply, random_like(shapes), (inputs,))

    return {name: functools.partial(network, *own) for name, own in TRANSFORMERS.items()}


SOURCES: dict[str, Callable[[], Makers]] = {
    "tests": of_tests,
    "equinox": of_equinox,
    "haiku": of_haiku,
    "keras": of_keras,
    "transformers": of_transformers,
}


# The table ---------------------------------------------------------------------------------------


def seconds(call: Callable) -> tuple[float, Any]:
    """CPU seconds of a call that finds nothing traced before, and its result."""
    jax.clear_caches()
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def row(name: str, maker: Callable, best: str) -> str:
    apply, variables, inputs = maker()
    made, _ = seconds(lambda: jax.make_jaxpr(apply)(variables, *inputs))
    traced, channels = seconds(lambda: groups.trace(apply, variables, *inputs))
    zeroed = groups.trace(apply, variables, *inputs, sums="zeroed")
    difference = groups.check(apply, variables, zeroed, *inputs, key=jax.random.key(1))
    cells = (
        name,
        f"{trees.size(variables):,}",
        f"{share_left(channels):.3f}",
        f"{share_left(zeroed):.3f}",
        best,
        f"{made:.2f}",
        f"{traced:.2f}",
        f"{difference:.0e}",
    )
    return f"| {' | '.join(cells)} |"


def main(sources: list[str], networks: str) -> None:
    absent = []
    print(HEAD)
    for source in sources:
        try:
            makers = SOURCES[source]()
        except ImportError as error:
            absent.append(f"{source} ({error})")
            continue
        for name, maker in makers.items():
            if not re.fullmatch(networks, name):
                continue
            best = f"{best_share(maker):.3f}" if source == "tests" else ""
            title = name if source == "tests" else f"{source}: {name}"
            try:
                text = row(title, maker, best)
            except Exception as error:  # of a library that does not fit this version of JAX
                text = f"| {title} | {type(error).__name__}: {error} | | | | | | |"
            print(text, flush=True)
    if absent:
        print(f"\nAbsent: {', '.join(absent)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--networks", default=".*", help="a pattern of whole names")
    main(**vars(parser.parse_args()))
