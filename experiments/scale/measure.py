"""Bytes that devices exchange and hold, of compiled programs on 1, 2, 4 and 8 devices.

    python experiments/scale/measure.py            prints a table and writes scale.json
    python experiments/scale/measure.py --print    only prints

Devices are virtual ones of a CPU: they tell bytes and memory, and nothing of time. Programs are
laid out as accelerators have them. The formulas are those of `formulas.py`.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

DEVICES = (1, 2, 4, 8)
if __name__ == "__main__":  # before JAX starts
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES[-1]}"
    os.environ["JAX_PLATFORMS"] = "cpu"

import algorithms  # noqa: E402
import collectives  # noqa: E402
import formulas  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from formulas import BATCH, MEASURED, WIDTHS  # noqa: E402

from sparsity_jax import linops, masks, meshes, platforms  # noqa: E402
from sparsity_jax.types import PyTree  # noqa: E402

PATH = pathlib.Path(__file__).parent / "scale.json"
NAMES = ("dense0", "dense1", "dense2", "fc")
ALONE = (  # of parameters alone
    *("masks", "masks by layer", "masks of filters", "sgd, penalties, saliency", "sgd, projected"),
    *("sfw", "adagrad_sfw", "pruned", "growing_l2, weights", "Lanczos, full", "Lanczos, none"),
)


def network() -> PyTree:
    """Kernels of random numbers; a device has its share of each."""
    rng = np.random.default_rng(0)
    draw = lambda shape: 0.05 * rng.normal(size=shape).astype(np.float32)
    pairs = zip(NAMES, WIDTHS[:-1], WIDTHS[1:])
    return {name: {"kernel": draw(shape)} for name, *shape in pairs}


def apply(params: PyTree, images: jax.Array) -> jax.Array:
    for name in NAMES:
        layer = params[name]
        images = jax.nn.tanh(images @ layer["kernel"])
    return images


def loss(network: Callable, params: PyTree, batch: tuple) -> jax.Array:
    images, targets = batch
    return jnp.mean(jnp.square(network(params, images) - targets))


# Programs -----------------------------------------------------------------------------------------


def forward_and_backward(division: meshes.Division | None) -> dict[str, Callable]:
    """Programs of (params, vector, batch), whose results are divided as params are."""
    gathering = apply if division is None else division.gathering(apply)
    keep = (lambda tree: tree) if division is None else division.kept
    mean = lambda params, batch: loss(gathering, params, batch)
    tx = optax.sgd(0.1, 0.9)

    def training(params: PyTree, vector: PyTree, batch: tuple) -> PyTree:
        """A step; vector: the momentum."""
        state = tx.init(params)
        state = optax.tree.set(state, trace=vector)
        updates, state = tx.update(keep(jax.grad(mean)(params, batch)), state)
        return optax.apply_updates(params, updates), optax.tree.get(state, "trace")

    def product(params: PyTree, vector: PyTree, batch: tuple) -> PyTree:
        return keep(linops.hvp(mean, params, batch)(vector))

    def curve(params: PyTree, vector: PyTree, batch: tuple) -> jax.Array:
        """The loss at one ratio; vector: of which the sign says what stays."""
        kept = jax.tree.map(lambda v: v > 0, vector)
        return mean(masks.apply(params, kept), batch)

    def importance(params: PyTree, vector: PyTree, batch: tuple) -> PyTree:
        """|w g| of a batch, added to what there is."""
        grads = keep(jax.grad(mean)(params, batch))
        return jax.tree.map(lambda v, w, g: v + jnp.abs(w * g), vector, params, grads)

    return {f.__name__: f for f in (training, product, curve, importance)}


def rows() -> Iterator[dict]:
    """One per algorithm and number of devices."""
    for devices in DEVICES:
        mesh = meshes.make({"params": devices}, jax.devices())
        params, vector = network(), jax.tree.map(np.cos, network())
        batch = np.ones((BATCH, WIDTHS[0]), np.float32), np.ones((BATCH, WIDTHS[-1]), np.float32)
        division = None
        if mesh is not None:
            division = meshes.division(params, mesh, meshes.largest_axis)
            params, vector = (meshes.put(t, division.shardings(t)) for t in (params, vector))
            batch = meshes.put(batch, meshes.over_batch(mesh))
        for name, program in forward_and_backward(division).items():
            yield measured(name, devices, program, params, vector, batch)
        with platforms.using("together"):
            for name in ALONE:
                yield measured(name, devices, algorithms.EVERY[name], params, vector)


def measured(name: str, devices: int, program: Callable, *arguments: Any) -> dict:
    """What the compiled program exchanges and holds on each device: bytes."""
    compiled = jax.jit(program).lower(*arguments).compile()
    found = collectives.of_program(compiled.as_text())
    memory = compiled.memory_analysis()
    exchanged: dict[str, float] = {}
    for collective in found:
        size = collectives.received(collective, devices)
        exchanged[collective.kind] = exchanged.get(collective.kind, 0) + size
    return dict(
        algorithm=name,
        devices=devices,
        exchanged=exchanged,
        held=memory.argument_size_in_bytes + memory.output_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
    )


def table(found: list[dict]) -> str:
    """Measured numbers beside those of the formulas: kilobytes."""
    columns = ("exchanged", "formula", "held", "formula", "temporary")
    heads = " ".join(f"{column:>9}" for column in columns)
    lines = [f"{'algorithm':26} devices  {heads}"]
    for row in found:
        expected = formulas.expected(row["algorithm"], MEASURED, row["devices"])
        numbers = [sum(row["exchanged"].values()), expected.exchanged, row["held"], expected.held]
        cells = [f"{number / 1e3:9.1f}" for number in (*numbers, row["temporary"])]
        lines.append(f"{row['algorithm']:26} {row['devices']:7}  {' '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="write no file")
    options = parser.parse_args()
    found = list(rows())
    sys.stdout.write(table(found) + "\n")
    if not options.print:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        kept = dict(date=str(datetime.date.today()), versions=versions, rows=found)
        PATH.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
