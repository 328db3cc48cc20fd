"""Speed and memory of curvature products and Lanczos, as ratios measured in one run.

    python experiments/speed/curvature.py            # rivals: pip install matfree torch

Rows of times have the median (least to greatest) of repeated calls in one process, where rivals
take turns in blocks; those of the prediction the least of a few. All multiply by the same Hessian,
that of the cross-entropy of a dense network on fixed random data.
"""

import argparse
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import linops, losses, models, spectrum, trees, width

try:
    from matfree import decomp
except ImportError:
    decomp = None
try:
    import torch
except ImportError:
    torch = None

WIDTHS = (784, 1000, 300, 100, 10)  # 1,116,410 weights and biases
NUM_MATVECS = 64


def measure(calls: dict, repeats: int, rounds: int = 3) -> dict[str, np.ndarray]:
    """Milliseconds of every call: `rounds` times in turn, each time in a block of its own after a
    warm-up call.
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
    """A table of times, and of each rival's time as a multiple of `ours`: medians, and least
    times.
    """
    print(
        f"\n{title}\n| | ms (median) | least - greatest | / {ours} | least / least "
        "|\n|---|---|---|---|---|"
    )
    for name, values in times.items():
        median, least = (
            function(values) / function(times[ours]) for function in (np.median, np.min)
        )
        spread = f"{values.min():.1f} - {values.max():.1f}"
        print(
            f"| {name} | {np.median(values):.1f} | {spread} | {median:.2f} | {least:.2f} |",
            flush=True,
        )


def network(params, x):
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    return x @ params[-1][0] + params[-1][1]


def loss(params, x, y):
    return losses.cross_entropy(network(params, x), y).mean()


def problem(samples: int) -> tuple:
    """(params, images, labels) of NumPy arrays."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    layers = [(draw(a, b) * math.sqrt(2 / a), 0.1 * draw(b)) for a, b in itertools.pairwise(WIDTHS)]
    return layers, draw(samples, WIDTHS[0]), rng.integers(0, WIDTHS[-1], samples)


# The originals' kind of Lanczos in PyTorch: lists of tensors, double backward per batch, one vector
# after the other


def torch_product(params, batches):
    """v -> H v: a fresh graph per batch, weighted by its size."""
    total = sum(len(y) for _, y in batches)

    def matvec(v):
        result = [torch.zeros_like(p) for p in params]
        for x, y in batches:
            for i in range(0, len(params), 2):
                x = (torch.relu(x) if i else x) @ params[i] + params[i + 1]
            value = torch.nn.functional.cross_entropy(x, y)
            grads = torch.autograd.grad(value, params, create_graph=True)
            for sums, part in zip(result, torch.autograd.grad(grads, params, grad_outputs=v)):
                sums.add_(part, alpha=len(y) / total)
        return result

    return matvec


def torch_lanczos(matvec, start, num_matvecs=NUM_MATVECS):
    """(alphas, betas) with every vector orthogonalised against a Python list of all before it."""
    inner = lambda u, v: sum((x * y).sum() for x, y in zip(u, v))
    add = lambda u, v, scale: [x + y * scale for x, y in zip(u, v)]
    unit = lambda u: [x / inner(u, u).sqrt() for x in u]
    basis, alphas, betas = [unit(start)], [], []
    for i in range(num_matvecs):
        w = matvec(basis[i])
        alpha = inner(w, basis[i])
        w = add(w, basis[i], -alpha)
        if i:
            w = add(w, basis[i - 1], -betas[-1])
        for v in basis:
            w = add(w, v, -inner(w, v))
        alphas.append(float(alpha))
        betas.append(float(inner(w, w).sqrt()))
        basis.append(unit(w))
    return np.array(alphas), np.array(betas)


def race(title: str, operator, args, start, rivals: dict, repeats: int) -> None:
    """m steps on `operator(args)`, ours against matfree and other rivals: functions of m to
    (alphas, betas).
    """
    run = lambda **options: jax.jit(
        lambda args, start: linops.lanczos(NUM_MATVECS, **options)(operator(args), start)
    )
    steps = lambda **options: linops.lanczos(NUM_MATVECS, **options)
    compiled = {"lanczos": run()} | {
        f"lanczos, {name}": run(reorthogonalize=name) for name in ("bfloat16", "none")
    }
    product = jax.jit(lambda args, v: operator(args)(v))
    matvec = lambda v: product(args, v)
    calls = {name: functools.partial(call, args, start) for name, call in compiled.items()}
    calls["lanczos, a step at a time"] = functools.partial(steps(on_host=True), matvec, start)
    calls["lanczos, host"] = functools.partial(steps(reorthogonalize="host"), matvec, start)
    if decomp is not None:
        tridiag = decomp.tridiag_sym(
            NUM_MATVECS, materialize=False, reortho="full", custom_vjp=False
        )
        jitted = jax.jit(lambda args, start: tridiag(lambda v: operator(args)(v), start).J_small)
        calls["matfree tridiag_sym"] = functools.partial(jitted, args, start)
    calls |= rivals
    expected, _ = linops.ritz(calls["lanczos"]())
    for name in list(calls)[5:]:  # the same leading eigenvalues
        alphas, betas = map(np.asarray, calls[name]())
        betas = np.append(betas, 0)[:NUM_MATVECS]  # some lack the last
        found, _ = linops.ritz(linops.Tridiagonal(alphas, betas, NUM_MATVECS))
        np.testing.assert_allclose(found[-3:], expected[-3:], rtol=1e-3)
    show(title, measure(calls, repeats), "lanczos")


def lanczos(repeats: int, samples: int = 512, batch_size: int = 128) -> None:
    """m Lanczos steps with full re-orthogonalisation: on a Hessian, and on a diagonal matrix to see
    them alone.
    """
    params, x, y = jax.tree.map(jnp.asarray, problem(samples))
    start = linops.rademacher(jax.random.key(0), params)
    diagonal = jax.tree.map(lambda p: jax.random.uniform(jax.random.key(p.size), p.shape), params)
    on_hessian, on_diagonal = {}, {}
    if torch is not None:
        tensors = lambda tree: [torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(tree)]
        weights, first, entries = (
            [w.requires_grad_() for w in tensors(params)],
            tensors(start),
            tensors(diagonal),
        )
        images, labels = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y)).long()
        batches = list(zip(images.split(batch_size), labels.split(batch_size)))
        on_hessian = {
            f"torch, batches of {batch_size}": lambda: torch_lanczos(
                torch_product(weights, batches), first
            ),
            "torch, one batch": lambda: torch_lanczos(
                torch_product(weights, [(images, labels)]), first
            ),
        }
        multiply = lambda v: [a * b for a, b in zip(entries, v)]
        on_diagonal = {"torch": lambda: torch_lanczos(multiply, first)}
    title = f"Lanczos, m = {NUM_MATVECS}, {trees.size(params):,} weights"
    hessian = lambda args: linops.hvp(loss, *args)
    race(
        f"{title}, Hessian of {samples} examples",
        hessian,
        (params, x, y),
        start,
        on_hessian,
        repeats,
    )
    multiply_by = lambda args: functools.partial(jax.tree.map, jnp.multiply, args)
    race(
        f"{title}, products aside: a diagonal matrix",
        multiply_by,
        diagonal,
        start,
        on_diagonal,
        repeats,
    )


def product(title: str, outputs, params, x, y, repeats: int) -> None:
    """One curvature product against one gradient; outputs(params, x) -> logits."""
    cost = lambda z, x, y: losses.cross_entropy(z, y).mean()
    function = lambda params, x, y: cost(outputs(params, x), x, y)
    network = lambda params, x, y: outputs(params, x)
    v = linops.rademacher(jax.random.key(0), params)
    gradient = jax.jit(jax.grad(function))
    hessian = jax.jit(lambda params, v, x, y: linops.hvp(function, params, x, y)(v))
    of_batch = lambda params, batch: function(params, *batch)
    linearized = spectrum.linearized(spectrum.hessian_product(of_batch), params, (x, y), len(x))
    gauss = jax.jit(lambda params, v, x, y: linops.gauss_newton(network, cost, params, x, y)(v))
    calls = {
        "gradient": lambda: gradient(params, x, y),
        "hvp": lambda: hessian(params, v, x, y),
        "hvp, linearized once": functools.partial(linearized, v),
        "gauss_newton": lambda: gauss(params, v, x, y),
    }
    show(f"one product, {title}", measure(calls, 10 * repeats), "gradient")


def products(repeats: int, samples: int = 512) -> None:
    params, x, y = jax.tree.map(jnp.asarray, problem(samples))
    product(f"dense network, {samples} examples", network, params, x, y, repeats)
    model = models.build(name="small_cnn", num_classes=10)
    images = jax.random.normal(jax.random.key(1), (64, 32, 32, 3))
    variables = model.init(jax.random.key(0), images[:1])
    outputs = lambda params, images: model.apply({**variables, "params": params}, images)
    product("small_cnn, 64 examples", outputs, variables["params"], images, y[:64], repeats)


def memory() -> None:
    """Arguments, results and temporaries of one step with a trivial product, in vectors of the
    parameters' size.
    """
    start = jax.tree.map(jnp.ones_like, problem(1)[0])
    unit = 4 * trees.size(start)
    print(f"\none Lanczos step, m = {NUM_MATVECS}, in parameter-sized float32 buffers")
    print("| | state | step, in total |\n|---|---|---|")
    for name in ("none", "full", "bfloat16"):
        method = linops.Lanczos(NUM_MATVECS, name)
        state = jax.eval_shape(method.init, start)
        step = jax.jit(lambda s, method=method: method.step(lambda v: v, s), donate_argnums=0)
        found = step.lower(state).compile().memory_analysis()
        total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        total -= found.alias_size_in_bytes
        print(f"| {name} | {found.argument_size_in_bytes / unit:.2f} | {total / unit:.2f} |")


# The originals' kind of prediction: a density on a fine grid, every whole distance, a thousand
# prunings


def grid_procedure(
    params: np.ndarray, values: np.ndarray, weights: np.ndarray, epsilon: float
) -> float:
    grid = np.linspace(values.min() - 0.01, values.max() + 0.01, 100_000)
    variance = 1e-10 * max(1.0, grid[-1] - grid[0])
    density = np.zeros_like(grid)
    for value, weight in zip(values, weights):
        density += (
            weight
            * np.exp(-((value - grid) ** 2) / (2 * variance))
            / math.sqrt(2 * math.pi * variance)
        )
    semi_axes = 2 * epsilon / np.abs(grid)
    width_at = lambda distance: (
        np.sum(density * semi_axes / (distance**2 + semi_axes)) / np.sum(density)
    )
    widths = [width_at(distance) for distance in range(int(np.linalg.norm(params)) + 1)]
    gaps = []
    for ratio in np.arange(1000) / 1000:
        last = max(math.ceil(ratio * params.size) - 1, 0)
        threshold = np.partition(np.abs(params), last)[last]
        distance = round(float(np.linalg.norm(params - params * (np.abs(params) > threshold))))
        gaps.append(abs(widths[min(distance, len(widths) - 1)] - ratio))
    return float(np.argmin(gaps)) / 1000


def prediction(
    repeats: int, size: int = 3_868_900, num_matvecs: int = 128, epsilon: float = 0.1
) -> None:
    """From a Lanczos run (128 products, the weights of FC5) to the predicted ratio, and from 1e5
    Ritz values.
    """
    rng = np.random.default_rng(0)
    params = rng.laplace(scale=1e-2, size=size).astype(np.float32)
    alphas, betas = rng.normal(0, 0.05, num_matvecs), rng.gamma(2.0, 0.05, num_matvecs)
    run = linops.Tridiagonal(alphas, betas, np.int32(num_matvecs))
    values, weights = linops.ritz(run)
    distances = width.distances([params], scope="all")
    many = rng.normal(size=100_000), rng.uniform(size=100_000)
    milliseconds = lambda call: min(measure({"": call}, repeats, rounds=1)[""])
    times = {
        "sort the weights, solve the fixed point": milliseconds(
            lambda: width.predict(values, weights, width.distances([params], scope="all"), epsilon)
        ),
        "the same with its enclosure": milliseconds(
            lambda: width.predict_probes(run, width.distances([params], scope="all"), epsilon)
        ),
        "fixed point from 100,000 Ritz values, weights sorted": milliseconds(
            lambda: width.predict(*many, distances, epsilon)
        ),
    }
    start = time.perf_counter()
    found = grid_procedure(params, values, weights, epsilon)
    times["grid, 1,000 prunings (once)"] = (time.perf_counter() - start) * 1e3
    exact = width.predict(values, weights, distances, epsilon)
    ours = times["sort the weights, solve the fixed point"]
    print(
        f"\nprediction, {size:,} weights, {num_matvecs} Ritz values: {exact:.4f}, on the grid "
        f"{found:.3f}"
    )
    print("| | ms (least) | as a multiple |\n|---|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.1f} | {value / ours:.2f} |", flush=True)


SECTIONS = {  # a part of the benchmark by name: add one here
    "lanczos": lanczos,
    "products": products,
    "memory": lambda repeats: memory(),
    "prediction": prediction,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    arguments = parser.parse_args()
    packages = ["jax", *(["matfree"] if decomp else []), *(["torch"] if torch else [])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}"
    )
    for section in arguments.only:
        SECTIONS[section](arguments.repeats)
    print(
        "\npeak memory of this process: "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )
