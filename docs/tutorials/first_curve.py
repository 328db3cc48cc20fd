# %% [markdown]
# # A first curve
#
# Train a network with two optimizers, prune each once to many sparsities, and look at what is left.
# Nothing is downloaded: the 1,797 handwritten digits are a file inside scikit-learn.
#
# ## Run
#
# `--config quickstart` names a config of the library; every field of it can be changed on the
# command line. Here one seed and 15 epochs instead of three and 60 make it fast.

# %% language="bash"
# sparsity-jax run --config quickstart --workdir runs/first '--config.sweep.seed=(0,)' \
#     --config.fit_sfw.epochs=15 --config.fit_sgd.epochs=15

# %% [markdown]
# In a terminal there is one line that renews itself: the stage, the newest metric, the time left of
# the stage and of the whole run, steps and images per second. Here, without a terminal, each epoch
# has a line of its own. The end is the summary: test accuracy after so many weights were removed.
#
# `--describe` instead of `--workdir` tells every field, and `sparsity-jax run --list` what configs
# can name:

# %% language="bash"
# sparsity-jax run --list configs

# %% [markdown]
# ## The report
#
# The folder of the run has everything: `report.html` is one page with table, figures and settings,
# `metrics.jsonl` the numbers, `checkpoints/` the state that the same command goes on from if it was
# interrupted.

# %% language="bash"
# ls runs/first runs/first/figures

# %% [markdown]
# Its figures are also files:

# %%
from IPython.display import Image

Image("runs/first/figures/accuracy.png", width=700)

# %% [markdown]
# ## The numbers
#
# `runs.load` gives all rows of a run, or of several, as one pandas DataFrame. `arm` is the label of
# the network.

# %%
from sparsity_jax import runs

rows = runs.load("runs/first")
curve = rows[rows["stage"] == "curve"]
curve.pivot(index="ratio", columns="arm", values="accuracy").loc[[0, 0.9, 0.95, 0.98, 0.99]]

# %% [markdown]
# ## The networks
#
# A run keeps each of its trained networks under its label, as it was before the next training. The
# beginning of a label is enough.

# %%
from sparsity_jax import cost, evaluate

for label in ("SFW", "SGD"):
    saved = evaluate.open_run("runs/first", label=label)
    network = saved.networks[0]  # one for each seed
    print(network.label, cost.num_params(network.state.params), "parameters")
print(saved.labels)

# %% [markdown]
# `saved.problem` has the data and the function of the network, so that you can go on with it in
# Python. Which digits does it take for another one?

# %%
import matplotlib.pyplot as plt

images, labels = saved.problem.examples("test", saved.problem.size("test"))
variables = network.state.variables
guesses = saved.problem.model.apply(variables, saved.problem.images(images)).argmax(-1)
wrong = (guesses != labels).nonzero()[0]
_, (places,) = plt.subplots(1, len(wrong), figsize=(9, 2), squeeze=False)
for place, i in zip(places, wrong):
    place.imshow(images[i].squeeze(), cmap="gray_r")
    place.set(title=f"{labels[i]} as {guesses[i]}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The command line measures the same networks:

# %% language="bash"
# sparsity-jax evaluate --workdir runs/first --label SFW

# %% [markdown]
# ## Where it comes from
#
# Every run, and every page, tells what made its numbers: versions, the git commit of library and
# config, date, hardware, seed and command.

# %%
import json
from pathlib import Path

about = json.loads(Path("runs/first/environment.json").read_text())
{name: about[name] for name in ("sparsity_jax", "jax", "date", "cpu", "cores", "device", "command")}

# %% [markdown]
# `--config.log='("wandb",)'` or `("mlflow",)` sends all numbers to Weights & Biases or MLflow, too,
# see [Compare runs](../compare.md).
#
# Next: [your own network and data](own_network.md), or [sweep and compare](sweep_and_compare.md).
# What a run does when it is stopped, and all options of configs, are in the how-to pages.
