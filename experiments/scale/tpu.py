"""What a training step on eight TPUs holds and exchanges, compiled ahead of time without a TPU.

    pip install libtpu && JAX_PLATFORMS=cpu python experiments/scale/tpu.py

A dense network of seven layers [2048, 2048] and one at each end, SGD with momentum, 64 images.
Prints a table and writes `tpu.json` beside this file. gathered, reduced: bytes of what the
collectives of one device give; temporary: bytes beside state and batch, outside the fast memory.
"""

import collections
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
from functools import partial
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax import ShapeDtypeStruct, eval_shape
from jax.experimental import topologies

from sparsity_jax import data, meshes, models, optim, platforms, train

TOPOLOGY = "v5e:2x4"
MESHES = (dict(data=8), dict(data=2, params=4), dict(params=8))
BATCH = 64
SIZES = {"f32": 4, "s32": 4, "bf16": 2}
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce)\(.*channel_id=(\d+)")
FILE = pathlib.Path(__file__).with_name("tpu.json")


def problem_on(mesh: jax.sharding.Mesh, axes: dict[str, int]) -> train.Problem:
    """The network and its images, of which only shapes count, on a mesh of devices elsewhere."""
    digits = data.load(name="digits", train_limit=BATCH, test_limit=BATCH)
    model = models.build(name="mlp", num_classes=10, widths=(2048,) * 8)
    here = train.build_problem(digits, model, mesh=axes)
    division = here.division and meshes.division(train.shapes_of(here), mesh, meshes.largest_axis)
    return here._replace(mesh=mesh, division=division, compiled={})


def compiled_step(axes: dict[str, int]) -> Any:
    """The step of a training, compiled for the topology."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    mesh = meshes.make(axes, described.devices)
    assert mesh is not None
    problem = problem_on(mesh, axes)
    anywhere = problem._replace(mesh=None, division=None, compiled={})
    fit = train.Fit(epochs=1, batch_size=BATCH, optimizer=optim.settings("sgd", learning_rate=0.1))
    numbers = eval_shape(lambda: optim.numbers(fit.recipe, train.shapes_of(problem), None, None))
    first = eval_shape(partial(train.create_state, anywhere), train.key_of(0), ())
    state = eval_shape(partial(train.begin, anywhere, fit), first, numbers)
    batch = [ShapeDtypeStruct(array.shape, array.dtype) for array in problem.split("train")]
    arguments = (state, numbers, ShapeDtypeStruct((), np.int32), *batch)
    placed = meshes.structs(arguments, problem.shardings(arguments))
    step = problem.dividing(partial(train.step_on_batch, problem, fit))
    with platforms.using("together"):
        return jax.jit(step, donate_argnums=0).lower(*placed).compile()


def exchanged(text: str) -> dict[str, list[int]]:
    """Bytes of what every collective of a compiled program gives, by its kind.

    One that runs beside other operations is written once for each of them, with one channel.
    """
    sizes: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for line in text.splitlines():
        found = COLLECTIVE.search(line)
        if found:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            of_arrays = [
                SIZES[kind] * int(np.prod([int(n) for n in dims.split(",") if n]))
                for kind, dims in arrays
                if kind in SIZES
            ]
            sizes[found[2]][found[3]] = sum(of_arrays)
    return {kind: sorted(own.values()) for kind, own in sizes.items()}


def row_of(axes: dict[str, int]) -> dict[str, Any]:
    """What is known of the step on one mesh."""
    compiled = compiled_step(axes)
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    sizes = exchanged(text)
    gathers = sizes.get("all-gather", [])
    scattered = re.findall(r"^%all-reduce-scatter\S* \(", text, re.MULTILINE)
    return dict(
        mesh=axes,
        state=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        gathers=len(gathers),
        gathered=sum(gathers),
        largest_gather=max(gathers, default=0),
        reduced=sum(sizes["all-reduce"]),
        sums_that_come_back_divided=len(scattered),
    )


def main() -> None:
    rows = [row_of(axes) for axes in MESHES]
    columns = list(rows[0])
    for row in rows:
        print(", ".join(f"{name} {row[name]}" for name in columns))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    date = datetime.date.today().isoformat()
    told = dict(topology=TOPOLOGY, date=date, versions=versions, batch=BATCH, rows=rows)
    FILE.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
