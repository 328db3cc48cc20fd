# %% [markdown]
# # A sweep anywhere
#
# Members of a sweep know nothing of each other, so each can run where there is room: in a job of a
# scheduler, or on a worker that a launcher looks after. Here are three of them, in both ways, on
# this machine.

# %% language="bash"
# cat > three.py <<'CONFIG'
# from sparsity_jax import optim, pipeline
#
# def get_config():
#     sgd = optim.settings("sgd", learning_rate=0.1)
#     return pipeline.base(
#         data=dict(name="digits", train_limit=512, test_limit=256),
#         model=dict(name="mlp", widths=(64,)),
#         pipeline=("fit", "curve"),
#         fit=pipeline.stage("train", epochs=5, batch_size=32, optimizer=sgd),
#         curve=pipeline.stage("curve", ratios=(0.0, 0.5, 0.9)),
#         sweep=dict(fit=dict(optimizer=dict(learning_rate=(0.03, 0.1, 0.3))), mode="loop"),
#     )
# CONFIG

# %% [markdown]
# ## With any scheduler
#
# `--member NUMBER` runs one member alone. In an array job of Slurm the number is
# `$SLURM_ARRAY_TASK_ID`, in an indexed job of Kubernetes `$JOB_COMPLETION_INDEX`; here a loop of
# the shell gives it. Nothing is shared but the folder, and a job that is started again goes on.

# %% language="bash"
# for number in 0 1 2; do
#     sparsity-jax run --config three.py --workdir runs/alone --member $number 2> log_$number.txt
# done
# sparsity-jax report --workdir runs/alone
# ls runs/alone

# %% [markdown]
# ## With Ray
#
# `--launcher ray` (extra `ray`) hands members to workers, here on a cluster of this machine that
# the command starts and ends; `--ray-address` names one that is there. A worker takes what
# `--resources` says, keeps its data and compiled programs for all members that it is given, and is
# replaced where it is lost.

# %% language="bash"
# sparsity-jax run --config three.py --workdir runs/ray --launcher ray --resources cpu=1 2> log.txt
# tail -n 9 log.txt

# %% [markdown]
# The numbers are the same, bit for bit:

# %%
from sparsity_jax import runs

alone = runs.load("runs/alone").groupby(["fit.optimizer.learning_rate", "ratio"])["loss"].last()
ray = runs.load("runs/ray").groupby(["fit.optimizer.learning_rate", "ratio"])["loss"].last()
print((alone == ray).all())
alone.unstack()

# %% [markdown]
# A member that fails does not stop the others: its sentence and the end of its log are in the
# report. The same command again runs only what is missing. [Sweeps past one
# machine](../scale_out.md) has clusters, jobs and what happens when something is lost.
