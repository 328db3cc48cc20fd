# %% [markdown]
# # Sweep and compare
#
# Does the learning rate change how well a network can be pruned? Three seeds of each of three rates
# are nine networks. They train side by side in one compiled program, as they differ in nothing but
# numbers.

# %% language="bash"
# sparsity-jax run --config quickstart --workdir runs/wide \
#     "--config.pipeline=('fit_sgd', 'curve')" --config.fit_sgd.epochs=10 \
#     '--config.sweep.seed=(0, 1, 2)' \
#     '--config.sweep.fit_sgd.optimizer.learning_rate=(0.03, 0.1, 0.3)' 2> log.txt
# tail -n 20 log.txt

# %% [markdown]
# A field of any stage can be swept so, on the command line or in `config.sweep` of a config file.
# Does the answer hold for a smaller network? The same in another folder:

# %% language="bash"
# sparsity-jax run --config quickstart --workdir runs/narrow '--config.model.widths=(64, 64)' \
#     "--config.pipeline=('fit_sgd', 'curve')" --config.fit_sgd.epochs=10 \
#     '--config.sweep.seed=(0, 1, 2)' \
#     '--config.sweep.fit_sgd.optimizer.learning_rate=(0.03, 0.1, 0.3)' 2> log.txt

# %% [markdown]
# ## The table
#
# `compare` takes any number of folders. There is one line per network and setting in which they
# differ; mean and standard deviation are over seeds alone.

# %% language="bash"
# sparsity-jax compare runs/wide runs/narrow --ratios 0 0.8 0.9 --decimals 1 --out runs/comparison
# ls runs/comparison

# %% [markdown]
# `compare.html` is one page with the curves of all networks and a filter. `compare.md` is for a
# document:

# %%
from pathlib import Path

from IPython.display import Markdown

Markdown(Path("runs/comparison/compare.md").read_text())

# %% [markdown]
# ## In Python
#
# `runs.load` gives all rows as one pandas DataFrame. The settings in which the networks differ are
# columns, named as on the command line.

# %%
from sparsity_jax import runs

rows = runs.load("runs/wide", "runs/narrow")
curve = rows[rows["kind"] == "curve"].rename(
    columns={"fit_sgd.optimizer.learning_rate": "rate", "model.widths": "widths"}
)
curve[["widths", "rate", "seed", "ratio", "accuracy"]].head()

# %%
accuracy = curve.groupby(["ratio", "widths", "rate"])["accuracy"]
accuracy.agg(["mean", "std"]).loc[0.8].round(3)

# %% [markdown]
# pandas draws it, too:

# %%
table = accuracy.mean().unstack(["widths", "rate"])
axes = table.plot(figsize=(7, 3.5), xlabel="weights removed", ylabel="test accuracy")

# %% [markdown]
# [Compare runs](../compare.md) tells all options, what is averaged and what is refused.
