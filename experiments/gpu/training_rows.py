"""Rows of training steps: ResNet-18 by the program of the `train` stage, and by PyTorch."""

from collections.abc import Iterator
from typing import Any

import jax
import networks
import numpy as np
import timing

from sparsity_jax import allocate, masks, optim, train
from sparsity_jax.train import Fit, Problem

_SETTINGS = {
    "SGD": optim.settings("sgd", learning_rate=0.1, momentum=0.9),
    "SFW": optim.settings("sfw", learning_rate=1.0, momentum=0.9, constraint=dict(name="k_sparse")),
}


def rows(*, small: bool) -> Iterator[timing.Row]:
    for dtype, batch in (("bfloat16", 128), ("float32", 128), ("bfloat16", 512)):
        yield from _of_batch(dtype, 32 if small else batch, small=small)
    yield from _of_curve(small=small)


def _of_batch(dtype: str, batch: int, *, small: bool) -> Iterator[timing.Row]:
    steps = 2 if small else 60
    problem = networks.problem(small=small, dtype=dtype, images=max(10_000, steps * batch))
    calls = {
        name: _training(problem, settings, batch, steps) for name, settings in _SETTINGS.items()
    }
    times = timing.in_turn(calls, rounds=5)
    speeds = {name: 1e3 * steps * batch / values for name, values in times.items()}
    of = f"training, {dtype}, batch {batch}"
    for name, values in speeds.items():
        yield timing.one(f"{of}: {name}", values, "images/s")
    goal = ">= 0.9" if (dtype, batch) == ("bfloat16", 128) else ""
    yield timing.one(f"{of}: SFW / SGD", speeds["SFW"] / speeds["SGD"], "times", goal)
    if networks.has_torch() and not small:
        theirs = _torch_speed(dtype, batch)
        yield timing.one(f"{of}: SGD of PyTorch", theirs, "images/s")
        goal = ">= 2" if batch == 512 else ""
        ratio = np.median(speeds["SGD"]) / np.median(theirs)
        yield timing.one(f"{of}: SGD / SGD of PyTorch", ratio, "times", goal)


def _training(problem: Problem, settings: dict, batch: int, steps: int) -> timing.Call:
    """A call that makes so many steps of the `train` stage in one program."""
    fit = Fit(epochs=1, batch_size=batch, optimizer=settings)
    state = train.create_state(problem, train.key_of(0))
    numbers = train.numbers_of(problem, state, [fit])
    state = train.begin_members(problem, state, [fit], numbers)
    data = train.arrays(problem, "train")
    order = jax.numpy.arange(problem.size("train"))
    program = problem.program(
        train.steps_in_memory,
        fit,
        steps,
        key=(fit.program(), steps),
        axes=(0, 0, 0, None, None, None),
        donate_argnums=0,
    )
    at = [state]

    def call() -> Any:
        at[0] = program(at[0], numbers, order, 0, *data)
        return at[0].params

    return call


def _torch_speed(dtype: str, batch: int) -> np.ndarray:
    """Images per second of a compiled network that trains on one batch."""
    import torch

    device = networks.torch_device()
    model = torch.compile(networks.torch_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, 32, 32, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    low = dtype == "bfloat16"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    times = timing.in_turn({"step": step}, rounds=5, repeats=40)
    return 1e3 * batch / times["step"]


def _of_curve(*, small: bool) -> Iterator[timing.Row]:
    """A ratio of a pruning curve, against an evaluation of the network as it is."""
    problem = networks.problem(small=small, dtype="bfloat16")
    state = train.create_state(problem, train.key_of(0))
    of_curve = _evaluations(problem, state)
    times = timing.in_turn(of_curve, rounds=9, repeats=1 if small else 3)
    ratio = [("a ratio of the curve", "an evaluation", "<= 1.05")]
    yield from timing.compared(times, "ms", ratio)


def _evaluations(problem: Problem, state: train.State) -> dict[str, timing.Call]:
    data = (state.batch_stats, *train.arrays(problem, "test"))
    count = allocate.keep_counts(state.params, 0.9)

    def evaluate(params: Any, data: tuple) -> Any:
        return train.evaluation(problem, "test", params, *data)

    def of_ratio(params: Any, count: Any, data: tuple) -> Any:
        kept = allocate.keep_masks(params, count)
        return evaluate(masks.apply(params, kept), data)

    bare, pruned = jax.jit(evaluate), jax.jit(of_ratio)
    return {
        "an evaluation": lambda: bare(state.params, data),
        "a ratio of the curve": lambda: pruned(state.params, count, data),
    }
