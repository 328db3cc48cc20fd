"""Speed of selection, of one Frank-Wolfe update and of a pruning curve, as ratios measured in one
run.

    python experiments/speed/selection.py            # needs torch for its columns: pip install
    torch

Each row is the median (least to greatest) of repeated calls in one process; rivals take turns in
blocks.
"""

import argparse
import functools
import importlib.metadata
import itertools
import os
import platform
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsity_jax import allocate, masks, models, optim, polytopes, train, trees
from sparsity_jax.data import Dataset, Split

try:
    import torch
except ImportError:
    torch = None


def measure(calls: dict, repeats: int, rounds: int = 3) -> dict[str, np.ndarray]:
    """Milliseconds of every call: `rounds` times in turn, each time in a block of its own after a
    warm-up call.

    Blocks, because calls of another library in between cost a PyTorch step up to seven times its
    own time here.
    """
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            for _ in range(-(-repeats // rounds)):
                start = time.perf_counter()
                jax.block_until_ready(call())
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def show(title: str, times: dict[str, np.ndarray], ours: str) -> None:
    """A table of times, and of each rival's time as a multiple of `ours`."""
    print(f"\n{title}\n| | ms (median) | least - greatest | / {ours} |\n|---|---|---|---|")
    for name, values in times.items():
        ratio = np.median(values) / np.median(times[ours])
        print(
            f"| {name} | {np.median(values):.2f} | {values.min():.2f} - {values.max():.2f} | "
            f"{ratio:.2f} |"
        )


def selection(repeats: int) -> None:
    n, k = 2_359_296, 117_964
    scores = jax.random.normal(jax.random.key(0), (n,))
    select = jax.jit(lambda x, k: masks.kth_largest(x, k, magnitude=True))
    top = jax.jit(lambda x: jax.lax.top_k(jnp.abs(x), k)[0][-1])
    order = jax.jit(lambda x: jnp.sort(jnp.abs(x))[-k])
    assert select(scores, k) == top(scores) == order(scores)
    calls = {
        "masks.kth_largest": lambda: select(scores, k),
        "jax.lax.top_k": lambda: top(scores),
        "jnp.sort": lambda: order(scores),
    }
    if torch is not None:
        x = torch.from_numpy(np.array(scores))
        assert float(torch.topk(x.abs(), k).values[-1]) == float(select(scores, k))
        calls["torch.topk"] = lambda: torch.topk(x.abs(), k).values[-1].item()
    show(
        f"k-th largest magnitude of n = {n:,}, k = 5 %",
        measure(calls, repeats),
        "masks.kth_largest",
    )


def torch_sfw(params, grads, buffers, ks, radii):
    """A straightforward SFW step: dampened momentum, top-k vertex, gradient rescaling."""
    with torch.no_grad():
        for p, g, b, k, r in zip(params, grads, buffers, ks, radii):
            b.mul_(0.9).add_(g, alpha=0.1)
            flat = b.flatten()
            chosen = torch.topk(flat.abs(), k).indices
            v = torch.zeros_like(flat)
            v[chosen] = -r * torch.sign(flat[chosen])
            v = v.view_as(p)
            lr = min(max(float(b.norm() / (p - v).norm()), 0.0), 1.0)
            p.mul_(1 - lr).add_(v, alpha=lr)


def update(repeats: int) -> None:
    model = models.build(name="resnet18", num_classes=10)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    )["params"]
    draw = lambda seed: jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(seed), x.shape), shapes
    )
    params, grads = jax.tree.map(lambda x: 0.05 * x, draw(0)), draw(1)
    sets = polytopes.build(
        shapes, jax.tree.map(lambda _: 1.0, shapes), polytopes.check({"name": "k_sparse"})
    )
    params = polytopes.shift_inside(params, sets)
    calls, counts = {}, {}
    for name, tx in {
        "optim.sfw": optim.sfw(1.0, sets),
        "optax.sgd, momentum": optax.sgd(0.1, 0.9),
    }.items():
        step = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p))
        carried = {"state": tx.init(params)}

        def call(step=step, carried=carried):
            updates, carried["state"] = step(grads, carried["state"], params)
            return updates

        calls[name], counts[name] = (
            call,
            step.lower(grads, carried["state"], params).compile().memory_analysis(),
        )
    if torch is not None:
        tensor = lambda tree: [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(tree)]
        each = jax.tree.leaves(sets, is_leaf=polytopes.is_set)
        p, g = tensor(params), tensor(grads)
        b, ks, radii = (
            [x.clone() for x in g],
            [int(s.k) for s in each],
            [float(s.radius) for s in each],
        )
        calls["torch SFW step (topk)"] = lambda: torch_sfw(p, g, b, ks, radii)
    show(
        f"one update of a ResNet-18 tree ({trees.size(shapes):,} entries)",
        measure(calls, repeats),
        "optim.sfw",
    )
    for name, found in counts.items():
        print(f"temporary memory of {name}: {found.temp_size_in_bytes / 2**20:.0f} MiB")


def curve(ratios: int, name: str, **options) -> None:
    rng = np.random.default_rng(0)
    images = lambda n: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    split = lambda n: Split(images(n), rng.integers(0, 10, n, dtype=np.int32))
    dataset = Dataset("random", split(10), split(10_000), 10, (0.5,) * 3, (0.25,) * 3)
    problem = train.build_problem(
        dataset, models.build(name=name, num_classes=10, **options), eval_batch_size=1000
    )
    state = train.create_state(problem, train.key_of(0))
    evaluate = functools.partial(train.evaluation, problem, "test")
    data = (state.batch_stats, *train.arrays(problem, "test"))
    counts = [allocate.keep_counts(state.params, i / ratios) for i in range(ratios)]
    every = itertools.cycle(counts)
    bare = jax.jit(evaluate)
    pruned = jax.jit(lambda p, c, *rest: evaluate(masks.apply(p, allocate.keep_masks(p, c)), *rest))
    calls = {
        "bare evaluation": lambda: bare(state.params, *data),
        "pruned to a ratio": lambda: pruned(state.params, next(every), *data),
    }
    times = measure(calls, ratios, rounds=10)
    show(
        f"{ratios} ratios, {name}, {trees.size(state.params):,} weights, 10,000 images",
        times,
        "bare evaluation",
    )
    bare_s, pruned_s = (values.sum() / 1e3 for values in times.values())
    print(
        f"whole curve {pruned_s:.1f} s, bare evaluations {bare_s:.1f} s: {pruned_s / bare_s:.3f} "
        "times"
    )
    print(f"programs compiled for the curve: {pruned._cache_size()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--ratios", type=int, default=1000)
    arguments = parser.parse_args()
    packages = ("jax", "optax", "torch") if torch else ("jax", "optax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}"
    )
    selection(arguments.repeats)
    update(arguments.repeats)
    curve(arguments.ratios, "mlp", widths=(256, 256))
    curve(max(arguments.ratios // 20, 10), "small_cnn", widths=(8, 16, 16))
    print(
        "\npeak memory of this process: "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )
