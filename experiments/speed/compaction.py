"""Time of networks without half of their channels, and of the steps of a pruning round.

    python experiments/speed/compaction.py

Untrained networks on random images; of every channel group the half of least magnitude goes. Dense
and compact take turns, so that noise hits both.
"""

import argparse
import importlib.metadata
import os
import platform
import time

import jax
import numpy as np

from sparsity_jax import budgets, cost, groups, models, scores

NETWORKS = {
    "vgg13": dict(order="conv_relu_bn", conv_bias=False),
    "mobilenet": {},
    "resnet56": dict(shortcut="projection"),
    "resnet18": {},
}


def least(call, repeats: int = 5) -> float:
    """Milliseconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def row(name: str, batch_size: int, repeats: int) -> str:
    model = models.build(name=name, num_classes=10, **NETWORKS[name])
    images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    variables = model.init(jax.random.key(1), images)
    trace = lambda: groups.trace(model.apply, variables, images)
    channels = trace()
    of_group = lambda group, tree: scores.score("mag_based", scores.Statistics(w=tree), group)
    score = jax.jit(lambda tree: {n: of_group(group, tree) for n, group in channels.groups.items()})
    importance = score(variables)
    keep = budgets.select_to_counts(
        importance, {name: len(row) // 2 for name, row in importance.items()}
    )
    hide = jax.jit(lambda tree, keep: groups.mask(tree, channels, keep))
    hide(variables, keep)
    select = lambda: budgets.select(importance, 0.5)
    steps = [
        least(call)
        for call in (
            lambda: trace().names,
            lambda: score(variables),
            select,
            lambda: hide(variables, keep),
        )
    ]

    small, run = (
        groups.compact(variables, channels, keep),
        groups.elastic(model.apply, channels, keep),
    )
    pair = {
        "dense": (jax.jit(model.apply), (variables, images)),
        "compact": (jax.jit(run), (small, images)),
    }
    found = cost.compare(pair, repeats=repeats)
    times = [
        f"{1e3 * t.median:.1f} ({1e3 * t.low:.1f} - {1e3 * t.high:.1f})"
        for t in found.latencies.values()
    ]
    speed = (
        f"{found.speedup:.2f} ({found.speedup_low:.2f} - {found.speedup_high:.2f}), {found.verdict}"
    )
    products = [
        cost.flops(f, v, images[:1]).products for f, v in ((model.apply, variables), (run, small))
    ]
    shares = [products[1] / products[0], cost.num_params(small) / cost.num_params(variables)]
    worst = groups.check(model.apply, variables, channels, images, key=jax.random.key(2))
    assert np.isfinite(worst), name
    assert worst < 1e-4, name
    cells = [
        name,
        *times,
        speed,
        *(f"{100 * share:.0f} %" for share in shares),
        *(f"{ms:.1f}" for ms in steps),
    ]
    return f"| {' | '.join(cells)} |"


def main(batch_size: int, repeats: int) -> None:
    versions = f"Python {platform.python_version()}, jax {importlib.metadata.version('jax')}"
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {versions}, batch {batch_size}\n"
    )
    print(
        "| | dense ms | compact ms | speed | FLOPs | parameters | trace ms | scores ms | select "
        "ms | mask ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        print(row(name, batch_size, repeats), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    main(arguments.batch_size, arguments.repeats)
