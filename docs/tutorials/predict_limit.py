# %% [markdown]
# # Predict how sparse a network can get
#
# The curvature of the loss around trained weights tells which share of the weights can be removed,
# before any of them is. This works for any network that is a function of a tree of arrays; here it
# is one of Flax NNX. What is behind it is on [another page](../geometric_limit.md).
#
# ## A network, trained with an L1 penalty

# %%
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsity_jax import data, losses


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.fc = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.hidden(x)))


digits = data.load(name="digits")
flat = lambda split: (
    jnp.asarray(split.images, jnp.float32).reshape(len(split.images), -1) / 255,
    jnp.asarray(split.labels),
)
train, test = flat(digits.train), flat(digits.test)

graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
outputs = lambda params, images: nnx.merge(graph, params)(images)
loss = lambda params, batch: losses.cross_entropy(outputs(params, batch[0]), batch[1]).mean()


def penalised(params):
    size = sum(jnp.abs(w).sum() for w in jax.tree.leaves(params))
    return loss(params, train) + 3e-4 * size


STEPS = 2000
tx = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))


def step(_, carry):
    params, moments = carry
    updates, moments = tx.update(jax.grad(penalised)(params), moments)
    return optax.apply_updates(params, updates), moments


descend = jax.jit(lambda params: jax.lax.fori_loop(0, STEPS, step, (params, tx.init(params)))[0])
params = descend(params)
accuracy = jax.jit(lambda params: (outputs(params, test[0]).argmax(-1) == test[1]).mean())
print(f"test accuracy {accuracy(params):.1%}")

# %% [markdown]
# The rate falls to zero, as the theory is one of minima: it knows no gradient.
#
# ## The prediction
#
# A product with the curvature over the data, 48 steps of Lanczos with it, and the prediction: three
# lines. Epsilon is how much the loss may change, here its standard deviation over batches.

# %%
from sparsity_jax import linops, spectrum, width

product = spectrum.over_batches(spectrum.hessian_product(loss), train, batch_size=500)
found = linops.lanczos(48)(
    lambda v: product(params, v), linops.rademacher(jax.random.key(1), params)
)
epsilon = width.epsilon(spectrum.batch_losses(loss, params, train, batch_size=128))
answer = width.predict_probes(found, width.distances(params), epsilon)
print(f"predicted: {answer.ratio:.1%} of the weights can be removed")

# %% [markdown]
# The last few steps tell how much to trust it:

# %%
course = width.history(found, width.distances(params), epsilon).ratio[-8:]
print(f"after 41 to 48 products: {course.min():.1%} to {course.max():.1%}")

# %% [markdown]
# ## Pruned, for comparison
#
# Removing the smallest weights at once, without any training after it. One compilation serves all
# ratios, as the counts are traced.

# %%
import matplotlib.pyplot as plt
import numpy as np

from sparsity_jax import allocate, masks

prune = jax.jit(lambda counts: masks.apply(params, allocate.keep_masks(params, counts)))
ratios = np.linspace(0.5, 0.995, 40)
accuracies = [accuracy(prune(allocate.keep_counts(params, ratio))) for ratio in ratios]

plt.plot(100 * ratios, 100 * np.array(accuracies), label="pruned")
plt.axvline(100 * answer.ratio, color="tab:red", linestyle="--", label="predicted limit")
plt.gca().set(xlabel="weights removed, %", ylabel="test accuracy, %")
plt.legend()
plt.show()

# %%
within = ratios[np.array(accuracies) >= accuracy(params) - 0.01].max()
print(f"within one point of accuracy: {within:.1%} removed, predicted: {answer.ratio:.1%}")

# %% [markdown]
# Which arrays are prunable is found by their names, `kernel` here; `width.distances(params,
# scope="all")` takes all. `--config geometric_limit:digits` is this study as a run, with an
# enclosure of the prediction, in a minute.
