# %% [markdown]
# # In a loop of your own
#
# You have a training loop and want a sparse network out of it. The optimizers are optax
# transformations, so that only the line that makes the optimizer changes.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from sparsity_jax import data, losses

digits = data.load(name="digits")
scaled = lambda images: (jnp.asarray(images, jnp.float32) / 255 - 0.3) / 0.4
flat = lambda images: scaled(images).reshape(len(images), -1)
images, labels = flat(digits.train.images), jnp.asarray(digits.train.labels)
test_images, test_labels = flat(digits.test.images), jnp.asarray(digits.test.labels)

net = eqx.nn.MLP(64, 10, 64, 2, key=jax.random.key(0))
start, static = eqx.partition(net, eqx.is_inexact_array)
apply = lambda params, images: jax.vmap(eqx.combine(params, static))(images)
accuracy = jax.jit(lambda params: (apply(params, test_images).argmax(-1) == test_labels).mean())


def train(tx, params, steps):
    """Your loop: nothing in it knows of sparsity."""
    loss = lambda params, batch: losses.cross_entropy(
        apply(params, images[batch]), labels[batch]
    ).mean()

    @jax.jit
    def step(params, state, key):
        batch = jax.random.choice(key, len(images), (64,))
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    course = []
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
        if i % 20 == 0:
            course.append((i, float(accuracy(params))))
    return params, state, course


# %% [markdown]
# ## Prune while you train
#
# `optim.pruned` wraps any optimizer. Between step 100 and step 300 it removes 95 % of the weights,
# fast at first. What is removed is exactly zero from then on. Which arrays are prunable is found by
# their names, `weight` here; biases stay.

# %%
from sparsity_jax import masks, optim

schedule = optim.PruningSchedule.cubic(0.95, begin=100, end=300, every=20)
dense, _, dense_course = train(optax.adam(1e-2), start, 400)
pruned, state, pruned_course = train(optim.pruned(optax.adam(1e-2), schedule), start, 400)
optim.check(state)
weights = [layer.weight for layer in pruned.layers]
print(f"{masks.sparsity(weights):.1%} of the weights are zero")
print(f"test accuracy {accuracy(pruned):.1%}, dense {accuracy(dense):.1%}")

# %%
import matplotlib.pyplot as plt

plt.plot(*zip(*dense_course), label="dense")
plt.plot(*zip(*pruned_course), label="95 % pruned on a schedule")
plt.gca().set(xlabel="step", ylabel="test accuracy", ylim=(0.8, 1))
plt.legend()
plt.show()

# %% [markdown]
# `optim.masks_of(state)` has the masks, True where a weight is kept. Other schedules are a number,
# `PruningSchedule.once` and `PruningSchedule.at`.
#
# ## Train inside feasible sets
#
# Stochastic Frank-Wolfe in K-sparse polytopes makes a network that can be pruned afterwards, to any
# sparsity, without training again. `polytopes.for_params` makes the set of every array,
# `shift_inside` moves the start into them. A step goes a share of the way to a vertex:
# the rate.

# %%
from sparsity_jax import polytopes

sets = polytopes.for_params(start, k=10, k_frac=0.01, tau=15.0)
inside = polytopes.shift_inside(start, sets)
rate = optax.cosine_decay_schedule(1.0, 400)
sparse, state, _ = train(optim.sfw(rate, sets), inside, 400)
optim.check(state)  # no update began outside a set
print(f"test accuracy {accuracy(sparse):.1%}")

# %% [markdown]
# Both networks, pruned once by magnitude:

# %%
import numpy as np

from sparsity_jax import allocate

prune = jax.jit(lambda params, counts: masks.apply(params, allocate.keep_masks(params, counts)))
ratios = np.linspace(0.5, 0.99, 30)
for label, params in (("Adam", dense), ("Frank-Wolfe", sparse)):
    curve = [accuracy(prune(params, allocate.keep_counts(params, ratio))) for ratio in ratios]
    plt.plot(ratios, curve, label=label)
plt.gca().set(xlabel="weights removed", ylabel="test accuracy")
plt.legend()
plt.show()

# %% [markdown]
# ## When the order is wrong
#
# In an `optax.chain` what acts on gradients comes first, and what holds the weights comes last.
# Behind it nothing may move them. The state counts what began outside, and `optim.check` says so:

# %%
wrong = optax.chain(optim.sfw(0.3, sets), optax.scale(20.0))
_, state, _ = train(wrong, inside, 5)
try:
    optim.check(state)
except ValueError as error:
    print(error)

# %% [markdown]
# [In a loop of your own](../your_loop.md) has all schedules, Flax NNX, and what is refused.
