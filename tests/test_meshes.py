"""Named axes of devices: batches over all of them, parameters and what is as large over one."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose

from sparsity_jax import evaluate, extend, meshes, pipeline, progress, train, trees

pytestmark = pytest.mark.usefixtures("eight_devices")
AXES = dict(data=2, params=4)


def small(path, shape, devices):
    """Divides the last axis that devices divide, of arrays of any size."""
    even = [axis for axis, length in enumerate(shape) if length % devices == 0]
    names = [None] * len(shape)
    if even:
        names[even[-1]] = "params"
    return PartitionSpec(*names)


@pytest.fixture(scope="module", autouse=True)
def of_small_arrays():
    """The rule "small" for configs, since arrays of tests are below the limit of the library's."""
    extend.register("mesh_rule", "small", small)
    yield
    del meshes.RULES["small"]


def divided(*names, **fields):
    return tiny.config(*names, **dict(mesh=AXES, mesh_rule="small", eval_batch_size=16) | fields)


# Meshes and rules ---------------------------------------------------------------------------------


def test_a_mesh_has_the_axes_that_it_names():
    devices = jax.devices()
    mesh = meshes.make(dict(params=4, data=2), devices)
    assert dict(mesh.shape) == dict(data=2, params=4)
    assert mesh.devices[0].tolist() == devices[:4]  # neighbours share parameters
    assert meshes.make(3, devices).shape == {"batch": 3}
    assert meshes.make(0, devices).size == 8
    assert meshes.make(1, devices) is None
    assert meshes.make(dict(data=1), devices).size == 1
    assert [meshes.filled_up(count, mesh) for count in (1, 8, 50)] == [8, 8, 56]
    assert meshes.filled_up(50, meshes.make(8, devices)) == meshes.filled_up(50, None) == 50


MISTAKES = {
    "another axis": (dict(mesh=dict(data=2, param=4)), "config.mesh", "param", "params"),
    "no axis": (dict(mesh={}), "config.mesh", {}),
    "an axis without devices": (dict(mesh=dict(params=0)), "config.mesh.params", 0),
    "more than there are": (dict(mesh=dict(data=4, params=4)), "config.mesh"),
    "another rule": (dict(mesh_rule="largest"), "config.mesh_rule", "largest", "largest_axis"),
    "a batch": (
        dict(fit=pipeline.stage("train", epochs=1, batch_size=12, optimizer=tiny.SGD)),
        "config.fit.batch_size",
        12,
    ),
    "a batch that scales are learned from": (
        dict(pipeline=("learn",), learn=pipeline.stage("sfw_init", batch_size=24)),
        "config.learn.batch_size",
        24,
    ),
    "a batch of evaluations": (dict(eval_batch_size=50), "config.eval_batch_size", 50),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_stop_before_a_run(mistake, tmp_path):
    changed, *told = MISTAKES[mistake]
    with tiny.refused(*told):
        pipeline.run(divided("fit", **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_largest_axis_that_devices_divide_is_divided():
    rule = meshes.largest_axis
    assert rule("a", (256, 512), 4) == PartitionSpec(None, "params")
    assert rule("a", (512, 256), 4) == PartitionSpec("params", None)
    assert rule("a", (256, 256), 4) == PartitionSpec(None, "params")
    assert rule("a", (1001, 16), 4) == PartitionSpec(None, "params")
    assert rule("a", (1001, 1001), 4) == PartitionSpec()
    assert rule("a", (meshes.SMALLEST - 4,), 4) == PartitionSpec()


@pytest.mark.parametrize("spec", ["params", ("params",), PartitionSpec("model"), None])
@pytest.mark.parametrize("shape", [(8, 8)])
def test_a_rule_that_does_not_fit_is_refused(spec, shape):
    params = {"a": jax.ShapeDtypeStruct(shape, "float32")}
    mesh = meshes.make(AXES, jax.devices())
    with tiny.refused("", spec, allowed="data, params"):
        meshes.division(params, mesh, lambda *_: spec)
    with tiny.refused(""):
        meshes.division(params, mesh, lambda *_: PartitionSpec(None, None, "params"))
    with tiny.refused(""):
        meshes.division({"a": jnp.zeros(6)}, mesh, lambda *_: PartitionSpec("params"))


def test_what_has_the_path_and_the_shape_of_a_parameter_is_divided_as_it_is():
    params = {"a": {"w": jnp.zeros((8, 3))}, "w": jnp.zeros((5, 8))}
    mesh = meshes.make(AXES, jax.devices())
    division = meshes.division(params, mesh, small)
    spec = lambda *arguments: division.sharding(*arguments).spec
    assert spec("a/w", (8, 3)) == PartitionSpec("params", None)
    assert spec("momentum/a/w", (8, 3)) == PartitionSpec("params", None)
    assert spec("momentum/a/w", (2, 8, 3)) == PartitionSpec(None, "params", None)
    assert spec("momentum/w", (5, 8)) == PartitionSpec(None, "params")
    assert spec("momentum/a/w", (5, 8)) == PartitionSpec(None, "params")  # that of w
    assert not any(spec("momentum/a/w", (3,)))
    assert not any(spec("momentum/a/v", (8, 3)))
    placed = meshes.put(params, division.shardings(params))
    assert placed["w"].addressable_shards[0].data.shape == (5, 2)
    tiny.same(meshes.fetch(placed), meshes.fetch(params))
    like = meshes.structs(params, division.shardings(params))
    assert like["w"].sharding == placed["w"].sharding


# Programs -----------------------------------------------------------------------------------------

AS_ACCELERATORS_DO = {  # of XLA: each array for itself, in the order of least memory
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner,cse",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
COLLECTIVES = tiny.module("experiments/scale/collectives.py")


def exchanged(text):
    """Bytes of what every collective of a compiled program gives, by its kind."""
    sizes = {"all-gather": [], "all-reduce": [], "all-to-all": []}
    for collective in COLLECTIVES.of_program(text):
        sizes.setdefault(collective.kind, []).append(collective.size)
    return sizes


def test_a_step_gathers_one_layer_at_a_time():
    """Each layer twice, and sums each gradient once; the update of a Frank-Wolfe step gathers
    nothing.
    """
    problem = tiny.problem(widths=(64,) * 3, mesh=AXES, eval_batch_size=16)
    fit = tiny.fit(tiny.IN_BALL)
    state, numbers = tiny.start(problem, fit)
    step = jax.jit(problem.dividing(partial(train.step_on_batch, problem, fit)))
    batch = problem.train_images[:32], problem.train_labels[:32]
    compiled = step.lower(state, numbers, 0, *batch).compile(compiler_options=AS_ACCELERATORS_DO)
    divided = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size >= meshes.SMALLEST]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) - sum(
        leaf.nbytes for leaf in divided
    )
    (layer,) = {leaf.nbytes for leaf in divided}
    assert len(divided) == 3
    sizes = exchanged(compiled.as_text())
    assert {*sizes["all-gather"]} == {layer}
    assert len(sizes["all-gather"]) == 2 * len(divided) - 1  # images have no gradient
    over_params = layer * len(divided)
    reduced = [size for size in sizes["all-reduce"] if size > 4]
    assert sum(reduced) <= over_params + over_params / AXES["params"] + whole
    assert not sizes["all-to-all"]
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * layer
    prune = tiny.settings("prune", ratio=0.5)
    select = prune.pruned(problem, 0).lower(state, prune.counts(problem, 0.5)).compile()
    assert max(exchanged(select.as_text())["all-reduce"]) < layer / 16  # counts
    assert "all-gather" not in select.as_text()


def test_the_documented_step_on_tpus_is_what_was_measured():
    """And within what a step may gather, P in bfloat16 twice, and sum: P, then its shares."""
    measured = json.loads((tiny.ROOT / "experiments/scale/tpu.json").read_text(encoding="utf-8"))
    page = (tiny.ROOT / "docs/many_devices.md").read_text(encoding="utf-8")
    assert all(f"{name} {version}" in page for name, version in measured["versions"].items())
    fields = ("state", "temporary", "gathers", "largest_gather", "gathered", "reduced")
    whole = measured["rows"][0]["reduced"]
    for row in measured["rows"]:
        axes = ", ".join(f"{name}={number}" for name, number in row["mesh"].items())
        numbers = [row[name] if name == "gathers" else f"{row[name] / 1e6:.1f}" for name in fields]
        assert f"| `dict({axes})` | {' | '.join(map(str, numbers))} |" in page
        divided = "params" in row["mesh"]
        assert row["gathered"] <= divided * whole
        shares = whole / row["mesh"]["params"] if {"data", "params"} == {*row["mesh"]} else 0
        assert row["reduced"] <= whole + shares + 1e5


def test_the_first_networks_are_made_divided():
    problem = tiny.problem(widths=(64,), mesh=AXES, eval_batch_size=16, members=2)
    keys = problem.place(jnp.stack([train.key_of(0), train.key_of(1)]))
    create = problem.program(train.create_state, axes=(0, None))
    compiled = create.lower(keys, ()).compile()
    assert "64,64]" not in compiled.as_text()
    state = compiled(keys, ())
    kernel = state.masks["dense1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64, 16)


def test_the_memory_of_a_device_has_to_hold_its_share(monkeypatch):
    problem = tiny.problem(widths=(64,), mesh=AXES, eval_batch_size=16)
    shapes = train.shapes_of(problem)
    kernel, others = 4 * 64 * 64, 4 * (64 + 640 + 10)
    assert train.bytes_of(problem, shapes) == kernel + others  # of one memory for all devices
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert train.bytes_of(problem, shapes) == kernel / 4 + others


# Runs ---------------------------------------------------------------------------------------------

CARRIED = pipeline.stage(
    "train", epochs=1, batch_size=32, optimizer=dict(tiny.SGD, momentum=0.9), carry=True
)
STAGES = dict(
    grow=pipeline.stage(
        "grow",
        ratios="[0:0.5]",
        optimizer=tiny.SGD,
        batch_size=32,
        update_every=1,
        granularity_prune=1.0,
        upper_limit=2.0,
        stabilize_steps=2,
        log_every=2,
    ),
    limit=pipeline.stage("limit", scan=(0.5,), resolution=0.25),
    path=pipeline.stage("path", ratios=(0.5,), num_examples=32, batch_size=32),
    rows=pipeline.stage("row_norms", num_weights=1, num_examples=32, batch_size=32),
    hessian=pipeline.stage("spectrum", num_matvecs=3, num_examples=32, batch_size=32),
    width=pipeline.stage("width", batch_size=16),
    channels=pipeline.stage("cut", ratio=0.3, imp_samples=64, batch_size=32, measure="tfo"),
    compact=pipeline.stage("compact", repeats=0, batch_size=16),
    remove=pipeline.stage("remove", ratios="[0:0.25]"),
    tried=pipeline.stage("oracle", ratios="[0:0.1]"),
    reinit=pipeline.stage("reinit"),
    noise=pipeline.stage("noise", num=1),
    jacobian=pipeline.stage("jacobian", num_examples=16),
)
SEEDS = dict(sweep=dict(seed=(0, 1)))
STREAMED = dict(
    name="digits",
    stream=True,
    image_size=8,
    normalization="none",
    train_limit=64,
    test_limit=50,
)
RUNS = {
    "curvature": divided("fit", "curve", "limit", "path", "rows", "hessian", "width", **STAGES),
    "channels": divided(
        *("fit", "channels", "compact", "remove", "tried", "reinit", "noise", "jacobian"),
        "weights",
        **STAGES,
    ),
    "streamed": divided("fit", "curve", data=STREAMED),
    "members": divided("fit", "cut", "grow", **STAGES, **SEEDS),
    "scales": divided(
        "learn", learn=pipeline.stage("sfw_init", iterations=2, batch_size=16, constraint=tiny.BALL)
    ),
}


@pytest.fixture
def undivided(monkeypatch):
    """Paths of what belongs divided in the states of a run, but is not."""
    paths = set()
    reached = pipeline.Run.reached

    def looked_at(run, state, position, done):
        belong = trees.named_leaves(run.problem.shardings(state))
        for path, leaf in trees.named_leaves(state).items():
            wanted = belong[path]
            if wanted.is_fully_replicated:
                continue
            if not leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
                paths.add(path)
        return reached(run, state, position, done)

    monkeypatch.setattr(pipeline.Run, "reached", looked_at)
    return paths


def close(first, second, path=""):
    """Asserts that rows of two runs agree but for rounding and time."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for name in first.keys() - {"seconds"}:
            close(first[name], second[name], f"{path}.{name}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for a, b in zip(first, second):
            close(a, b, path)
    elif isinstance(first, float):
        assert second == pytest.approx(first, rel=1e-3, abs=1e-5), path
    else:
        assert first == second, path


@pytest.mark.parametrize("case", RUNS)
def test_divided_runs_give_the_numbers_of_one_device(case, tmp_path, undivided):
    config = RUNS[case]
    outcome = pipeline.run(config, tmp_path / "divided")
    assert not undivided
    alone = pipeline.run(config | dict(mesh=1), tmp_path / "alone")
    close(alone.rows, outcome.rows)
    near = partial(assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(near, *(meshes.fetch(run.state.variables) for run in (outcome, alone)))
    tiny.same(*(meshes.fetch(run.state.masks) for run in (outcome, alone)))


def test_a_divided_run_goes_on_and_is_evaluated_on_one_device(tmp_path, monkeypatch, undivided):
    """Interrupted in the stage that takes over the momentum, and before it."""
    stages = dict(STAGES, fit=CARRIED, again=CARRIED, checkpoint_seconds=0.0)
    config = divided("fit", "channels", "again", **stages)
    expected = pipeline.run(config, tmp_path / "whole")
    show = progress.Display.show
    for name in ("channels", "again"):
        with monkeypatch.context() as patch:

            def interrupted(self, done, rows, name=name):
                if rows and rows[0]["stage"] == name:
                    raise KeyboardInterrupt
                show(self, done, rows)

            patch.setattr(progress.Display, "show", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(config, tmp_path / "broken")
    outcome = pipeline.run(config, tmp_path / "broken")
    assert not undivided
    tiny.same(meshes.fetch(outcome.state), meshes.fetch(expected.state))
    saved = evaluate.open_run(tmp_path / "broken")
    (network,) = saved.networks
    assert saved.problem.mesh is None
    tiny.same(meshes.fetch(network.state.params), meshes.fetch(outcome.state.params))
    (row,) = evaluate.run(tmp_path / "broken")
    assert row["test_accuracy"] == pytest.approx(outcome.rows[-1]["test_accuracy"])
    folders = evaluate.export_run(saved, tmp_path / "network")
    network = evaluate.load(folders[0])
    assert network is not None
