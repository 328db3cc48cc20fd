# %% [markdown]
# # Your own network and data
#
# Everything that a config names can be yours, and nothing of the library is changed for it: one
# call, `extend.register(what, name, entry)`. Here all of it is one file, this one.
#
# ## Data: arrays
#
# Images are uint8, labels are integers. This makes 600 noisy pictures of stripes in four
# directions.

# %%
import matplotlib.pyplot as plt
import numpy as np

from sparsity_jax import extend

ANGLES = np.pi * np.arange(4) / 4


def stripes(train_split, test_split):
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 4
    y, x = np.mgrid[:12, :12]
    along = np.cos(ANGLES)[:, None, None] * x + np.sin(ANGLES)[:, None, None] * y
    shifts = rng.uniform(0, 6, (600, 1, 1))
    waves = 128 + 60 * np.sin(along[labels] + shifts)
    images = np.clip(waves + rng.normal(0, 60, waves.shape), 0, 255).astype(np.uint8)
    return (images[:400], labels[:400]), (images[400:], labels[400:]), 4


extend.register("data", "stripes", stripes)

(images, labels), _, _ = stripes("train", "test")
_, places = plt.subplots(1, 4, figsize=(7, 2))
for place, image in zip(places, images):
    place.imshow(image, cmap="gray")
plt.show()

# %% [markdown]
# ## A network
#
# An Equinox module, called for one image [height, width, channels]. `width` is keyword-only and has
# a type: it becomes an option that configs can set, checked like those of the library. Flax Linen
# and NNX modules or a pair of functions do as well.

# %%
import equinox as eqx
import jax

from sparsity_jax import tables


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    fc: eqx.nn.Linear

    def __init__(self, width, num_classes, key):
        first, second, third = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(1, width, 3, stride=2, key=first)
        self.hidden = eqx.nn.Linear(25 * width, 32, key=second)
        self.fc = eqx.nn.Linear(32, num_classes, key=third)

    def __call__(self, image):
        x = jax.nn.relu(self.conv(image.transpose(2, 0, 1)))
        return self.fc(jax.nn.relu(self.hidden(x.ravel())))


def net(num_classes, settings, *, width: tables.Count = 8):
    return lambda key: Net(width, num_classes, key)


extend.register("model", "net", net)

# %% [markdown]
# ## A loss, a measure, a stage
#
# A loss gives one number per example. A measure scores channels: of each one the weights, then a
# number made of them. A stage is a class of options whose `run` yields updates; a run can go on
# from each of them.

# %%
from typing import ClassVar

import jax.numpy as jnp

from sparsity_jax import interface, scores, train


def hinge(logits, labels, *, margin: tables.Positive = 1.0):
    right = jnp.take_along_axis(logits, labels[..., None], -1)
    return jnp.maximum(logits - right + margin, 0).mean(-1)


extend.register("loss", "hinge", hinge)
extend.register("measure", "largest", scores.Measure(("w",), jnp.abs, lambda rows: rows.max(1)))


@tables.option
class Jitter(interface.Stage):
    """Adds noise to all weights, in steps."""

    kind: ClassVar[str] = "jitter"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    scale: tables.Positive = 0.001
    steps: tables.Count = 4

    def run(self, problem, state, place):
        for step in range(len(place.rows[0]), self.steps):  # goes on behind the rows so far
            if step == 2 and INTERRUPTED:
                raise KeyboardInterrupt
            add = lambda w, step=step: (
                w + self.scale * jax.random.normal(jax.random.key(step), w.shape)
            )
            state = state._replace(params=jax.tree.map(add, state.params))
            yield train.Update(state, [[dict(step=step + 1)]], (step + 1) / self.steps)


extend.register("stage", "jitter", Jitter)
INTERRUPTED = True  # see below

# %% [markdown]
# ## The config
#
# Train with AdamW of optax and the loss above, add noise, remove half of all channels by the
# measure above, train again, and take stock of the network without its removed channels.

# %%
from sparsity_jax import optim, pipeline

training = dict(
    epochs=12,
    batch_size=32,
    optimizer=optim.settings("adamw", learning_rate=0.003, weight_decay=1e-3),
    loss=dict(name="hinge", margin=2.0),
    evaluate_every=4,
)
config = pipeline.base(
    title="Stripes",
    data=dict(name="stripes"),
    model=dict(name="net", width=16),
    pipeline=("fit", "jitter", "cut", "again", "compact"),
    fit=pipeline.stage("train", label="first", **training),
    jitter=pipeline.stage("jitter"),
    cut=pipeline.stage("cut", measure="largest", ratio=0.5),
    again=pipeline.stage("train", label="again", **training),
    compact=pipeline.stage("compact", repeats=0),
)

# %% [markdown]
# A mistake is told before anything compiles:

# %%
try:
    pipeline.check({**config, "model": dict(name="net", widht=16)})
except tables.ConfigError as error:
    print(error)

# %% [markdown]
# ## Run, stop, go on
#
# The stage `jitter` above stops the run in its middle, as if you had pressed the notebook's stop
# button. The same call goes on where it was, here after the second step of noise, and ends with the
# numbers of a run that was never stopped.

# %%
try:
    pipeline.run(config, "runs/stripes")
except KeyboardInterrupt:
    print("stopped")

# %%
INTERRUPTED = False
outcome = pipeline.run(config, "runs/stripes")
[row["step"] for row in outcome.rows if row["kind"] == "jitter"]

# %% [markdown]
# ## Evaluate and report
#
# Each training left its network under its label, as the last stage before the next training had it:
# the first one with noise, without the removed channels, and not yet trained again.

# %%
from sparsity_jax import evaluate

for label in ("first", "again"):
    (row,) = evaluate.run("runs/stripes", label=label)
    print(evaluate.describe(row), "\n")

# %% [markdown]
# `runs/stripes/report.html` is the page of the run; its figures are files too.

# %%
from IPython.display import Image

Image("runs/stripes/figures/training.png", width=700)

# %% [markdown]
# ## On the command line
#
# Put the registrations into a file, `mine.py`, and the config into another beside it, as
# `get_config()`, that begins with `extend.load("mine.py")`. Then `sparsity-jax run --config NAME.py
# --workdir runs/stripes` is the same run, every field can be set and swept, and `sparsity-jax
# evaluate --import mine.py` measures it. [Your own](../your_own.md) has all kinds of entries, with
# an example of each.
