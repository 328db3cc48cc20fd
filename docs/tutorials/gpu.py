# %% [markdown]
# # On a GPU
#
# `pip install "sparsity_jax[cuda]"` brings JAX for NVIDIA GPUs; nothing else is different. Which
# device computes here:

# %%
import datetime

import jax

print(datetime.date.today(), jax.__version__, jax.devices())

# %% [markdown]
# ## Run
#
# `config.platform=gpu` refuses to start where there is none, instead of computing for hours on a
# CPU. Here it is whatever JAX found above.

# %%
import os

os.environ["PLATFORM"] = jax.default_backend()

# %% language="bash"
# sparsity-jax run --config quickstart --workdir runs/eight --config.platform=$PLATFORM \
#     "--config.pipeline=('fit_sgd', 'curve')" --config.fit_sgd.epochs=5 \
#     '--config.sweep.seed=(0, 1, 2, 3, 4, 5, 6, 7)' 2> log.txt
# tail -n 5 log.txt

# %% [markdown]
# ## The same numbers again
#
# A GPU adds in an order of its own, so that two runs differ in the last bits, and training carries
# them further. `config.deterministic=True` makes a run, and one that was interrupted and continued,
# repeat bit by bit, at a few percent of speed:

# %% language="bash"
# for name in one two; do
#     sparsity-jax run --config quickstart --workdir runs/$name --config.platform=$PLATFORM \
#         "--config.pipeline=('fit_sgd', 'curve')" --config.fit_sgd.epochs=5 \
#         '--config.sweep.seed=(0,)' --config.deterministic=True 2> log.txt
# done

# %%
from sparsity_jax import runs

one, two = (runs.load(f"runs/{name}").drop(columns=["run", "seconds"]) for name in ("one", "two"))
one.equals(two)

# %% [markdown]
# ## One network or eight
#
# Members of a sweep that differ in numbers alone train side by side in one compiled program. One
# small network hardly keeps a GPU busy. The median time of an epoch, in milliseconds:

# %%
for name in ("one", "eight"):
    rows = runs.load(f"runs/{name}")
    ends = rows[rows["kind"] == "train"].groupby(["stage", "epoch"])["seconds"].max()
    epochs = ends.groupby("stage").diff().groupby("stage").median()
    print(f"{name}:", (1000 * epochs).round(1).to_dict())

# %% [markdown]
# ## Precision
#
# Matrix products of float32 are computed in TF32 on an NVIDIA GPU, if nothing is said:
# `config.precision=highest` has them exact. What claims to be exact (curvature, importance,
# predicted limits) is computed in full float32 anyway, see `config.curvature_precision`. With
# `config.model.dtype=bfloat16` a network computes in bfloat16, and its weights stay float32.
#
# ## Start-up
#
# Compiled programs are kept on disk for the next start (`--nocompilation_cache`: not). Training
# makes several steps per call of the device, `config.steps_per_call`; the automatic choice is an
# epoch on a GPU.
#
# ## More than one
#
# `config.mesh=0` shares every batch over all local GPUs. Several runs on one GPU at a time: JAX
# takes three quarters of its memory at once, unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says less.
