"""What growing regularisation adds to a training step: the same SGD step with and without it, side
by side.

    python experiments/speed/growing.py

ResNet-18 for 32 x 32 images, half of every kernel to remove. A round is `update_every` steps, one
of which updates the penalties. The steps of all rivals take turns, so that noise hits all; a row
compares the rounds of one rival with those of plain SGD made at the same time.
"""

import argparse
import importlib.metadata
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsity_jax import growing, models, trees

RIVALS = {  # in the phase that costs most: greg2 scores and selects before it picks
    "greg1, filters": dict(method="greg1", granularity="filter"),
    "greg2, filters": dict(method="greg2", granularity="filter"),
    "greg1, weights": dict(method="greg1", granularity="weight"),
    "greg2, weights": dict(method="greg2", granularity="weight"),
}


def optimizers(params, update_every: int) -> dict[str, optax.GradientTransformation]:
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(1e-3, 0.9))
    ratios = {path: 0.5 for path in trees.named_leaves(params) if trees.is_kernel(path)}
    grow = lambda method, granularity: growing.growing_l2(
        growing.layers(params, ratios, granularity), method=method, update_every=update_every
    )
    return {"sgd": sgd} | {name: optax.chain(grow(**own), sgd) for name, own in RIVALS.items()}


def rounds(steps: dict, num_rounds: int, update_every: int) -> dict[str, np.ndarray]:
    """Milliseconds per step of every rival, by round. A step: state -> state; the first round is
    thrown away.
    """
    states, times = (
        {name: start for name, (start, _) in steps.items()},
        {name: [] for name in steps},
    )
    for _ in range(num_rounds + 1):
        spent = dict.fromkeys(steps, 0.0)
        for _ in range(update_every):
            for name, (_, step) in steps.items():
                start = time.perf_counter()
                states[name] = jax.block_until_ready(step(states[name]))
                spent[name] += 1e3 * (time.perf_counter() - start) / update_every
        for name, ms in spent.items():
            times[name].append(ms)
    return {name: np.array(values[1:]) for name, values in times.items()}


def show(title: str, times: dict[str, np.ndarray]) -> None:
    print(f"\n| {title} | ms | as a multiple, by round | least / least |\n|---|---|---|---|")
    for name, values in times.items():
        quartiles = np.percentile(values / times["sgd"], [50, 25, 75])
        least = values.min() / times["sgd"].min()
        multiple = "{:.3f} ({:.3f} - {:.3f})".format(*quartiles)
        print(f"| {name} | {np.median(values):.1f} | {multiple} | {least:.3f} |", flush=True)


def main(batch_size: int, num_rounds: int, update_every: int, update_only: bool) -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax"))
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}"
    )
    model = models.build(name="resnet18", num_classes=10)
    images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    labels = jnp.arange(batch_size) % 10
    variables = model.init(jax.random.key(1), images)
    params, batch_stats = variables["params"], variables["batch_stats"]
    grads = jax.tree.map(lambda w: 1e-3 * w, params)

    def loss(params, batch_stats):
        logits, new = model.apply_train({"params": params, "batch_stats": batch_stats}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    def updating(tx):
        def step(state):
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return (jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)), jax.jit(
            step, donate_argnums=0
        )

    def training(tx):
        def step(state):
            params, batch_stats, opt_state = state
            own, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats)
            updates, opt_state = tx.update(own, opt_state, params)
            return optax.apply_updates(params, updates), batch_stats, opt_state

        start = jax.tree.map(jnp.copy, (params, batch_stats))
        return (*start, jax.jit(tx.init)(params)), jax.jit(step, donate_argnums=0)

    chosen = optimizers(params, update_every)
    steps = {name: updating(tx) for name, tx in chosen.items()}
    show(
        f"SGD update of {trees.size(params):,} entries", rounds(steps, 4 * num_rounds, update_every)
    )
    if not update_only:
        steps = {name: training(tx) for name, tx in chosen.items()}
        show(f"training step, batch {batch_size}", rounds(steps, num_rounds, update_every))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--update_every", type=int, default=5)
    parser.add_argument("--update_only", action="store_true")
    arguments = parser.parse_args()
    main(arguments.batch_size, arguments.rounds, arguments.update_every, arguments.update_only)
