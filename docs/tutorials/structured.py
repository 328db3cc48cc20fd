# %% [markdown]
# # Remove channels, measure the time, export
#
# Zeros alone make no network faster. Whole channels can really be removed: the arrays become
# smaller, and with them the time. Which arrays belong together is found by following a function, of
# any framework.
#
# ## A network with a skip connection

# %%
import jax
import jax.numpy as jnp
import optax

from sparsity_jax import data, losses


def apply(params, images):
    x = jax.nn.relu(images @ params["stem"])
    x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
    return x @ params["out"]


SHAPES = dict(stem=(64, 256), up=(256, 512), down=(512, 256), out=(256, 10))
keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0), len(SHAPES))))
params = {
    name: jax.random.normal(keys[name], shape) / jnp.sqrt(shape[0])
    for name, shape in SHAPES.items()
}

digits = data.load(name="digits")
flat = lambda images: jnp.asarray(images, jnp.float32).reshape(len(images), -1) / 255
images, labels = flat(digits.train.images), jnp.asarray(digits.train.labels)


def train(apply, params, steps):
    loss = lambda params: losses.cross_entropy(apply(params, images), labels).mean()
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def accuracy(apply, params):
    logits = apply(params, flat(digits.test.images))
    return float((logits.argmax(-1) == jnp.asarray(digits.test.labels)).mean())


params = train(apply, params, 40)
print(f"dense: {accuracy(apply, params):.1%}")

# %% [markdown]
# ## What belongs together
#
# `groups.trace` follows the function once, without computing anything. The skip connection ties
# `stem` and `down`: their channels are removed together or not at all.

# %%
from sparsity_jax import groups

channels = groups.trace(apply, params, images[:2])
print(groups.describe(channels))

# %% [markdown]
# ## What is important
#
# `scores.MEASURES` has fourteen rules; `sparsity-jax run --list measures` tells them. `loss_based`
# needs weights and their gradient. Three quarters of all channels go, ranked over the whole
# network.

# %%
from sparsity_jax import budgets, scores

loss = lambda params: losses.cross_entropy(apply(params, images), labels).mean()
statistics = scores.Statistics(w=params, g=jax.grad(loss)(params))
importance = {
    name: scores.score("loss_based", statistics, group) for name, group in channels.groups.items()
}
keep = budgets.select(importance, 0.75)
print({name: f"{bools.sum()} of {bools.size}" for name, bools in keep.items()})

# %% [markdown]
# ## The small network
#
# `compact` gives the smaller arrays, `elastic` the same function on them. Their logits are those of
# the network with zeros in the place of removed channels.

# %%
import numpy as np

small = groups.compact(params, channels, keep)
compact = groups.elastic(apply, channels, keep)
zeroed = groups.mask(params, channels, keep)
np.testing.assert_allclose(compact(small, images), apply(zeroed, images), rtol=1e-3, atol=1e-3)
print(jax.tree.map(jnp.shape, small))
print(f"removed: {accuracy(compact, small):.1%}")

# %% [markdown]
# It is a function like any other, and can be trained on:

# %%
small = train(compact, small, 40)
print(f"trained again: {accuracy(compact, small):.1%}")

# %% [markdown]
# ## Is it faster?
#
# `cost.compare` lets the two take turns, so that other work on the machine hits both, and only
# calls it faster where the quartiles do not overlap.

# %%
from sparsity_jax import cost

batch = jnp.tile(images, (2, 1))[:2048]
pair = cost.compare(
    {"dense": (jax.jit(apply), (params, batch)), "compact": (jax.jit(compact), (small, batch))}
)
for name, took in pair.latencies.items():
    print(f"{name}: {1e3 * took.median:.2f} ms ({1e3 * took.low:.2f} to {1e3 * took.high:.2f})")
print(f"{pair.verdict}, {pair.speedup:.1f} times, on {jax.devices()[0].device_kind}")

for name, function, arrays in (("dense", apply, params), ("compact", compact, small)):
    flops = cost.flops(function, arrays, images[:1]).products
    print(f"{name}: {cost.num_params(arrays):,} parameters, {flops:,} FLOPs per image")

# %% [markdown]
# `cost.latency(function, *arguments)` measures one alone.
#
# ## Export
#
# `jax.export` writes the compact function with its weights as bytes, for any batch size. It needs
# neither `apply` nor this library where it is used.

# %%
import pathlib

from jax import export

(size,) = export.symbolic_shape("batch")
inputs = jax.ShapeDtypeStruct((size, 64), jnp.float32)
channels = groups.trace(apply, params, inputs)
compact = groups.elastic(apply, channels, keep)
program = export.export(jax.jit(lambda images: compact(small, images)))(inputs)
file = pathlib.Path("compact.stablehlo")
file.write_bytes(program.serialize())
print(f"{file.stat().st_size:,} bytes")

# %%
loaded = export.deserialize(bytearray(file.read_bytes()))
np.testing.assert_allclose(loaded.call(images[:5]), compact(small, images[:5]), atol=1e-4)

# %% [markdown]
# A run does all of this by its stages `cut` and `compact`, and `sparsity-jax evaluate --workdir DIR
# --latency --export NEW` measures and exports its network; `evaluate.load(NEW)` reads it back. The
# page on [structured pruning](../gradient_flow.md) has the measures and what the trace knows.
