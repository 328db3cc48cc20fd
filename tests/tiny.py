"""Tiny runs that tests share: a small network on few digits, and small random sets."""

import contextlib
import copy
import functools
import html
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import (
    data,
    interface,
    models,
    optim,
    pipeline,
    plans,
    polytopes,
    report,
    tables,
    train,
)
from sparsity_jax.report import draw

WRITE = report.write
SUMMARY = report.summary_of
BUILD = pipeline.build
ROOT = pathlib.Path(__file__).resolve().parent.parent
POLYTOPE = tables.options(polytopes.SETS, "k_sparse", k_frac=0.2)
SGD = optim.settings("sgd", learning_rate=0.1)
SFW = optim.settings("sfw", learning_rate=0.5, constraint=POLYTOPE)
BALL = dict(name="l2", tau=15.0)  # quick to compile
IN_BALL = dict(SFW, constraint=BALL)
QUICKLY = (  # options of XLA, for most of a test's time is compilation
    ("xla_backend_optimization_level", 0),
    ("xla_llvm_disable_expensive_passes", True),
    ("xla_cpu_use_fusion_emitters", False),
    ("xla_cpu_parallel_codegen_split_count", 1),
)


def module(path: str):
    """The module of a file that no package holds, such as `configs/quickstart.py`."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def digits(train_limit: int = 128, test_limit: int = 50) -> data.Dataset:
    return data.load(name="digits", train_limit=train_limit, test_limit=test_limit)


def problem(
    dataset: data.Dataset | None = None, widths: tuple[int, ...] = (16,), **options
) -> train.Problem:
    model = models.build(name="mlp", num_classes=10, widths=widths)
    return train.build_problem(dataset or digits(), model, **options)


def settings(kind: str, **fields) -> interface.Stage:
    """The checked stage `config.x`."""
    with tables.within("config.x"):
        return plans.read_stage(dict(fields, kind=kind))


def fit(optimizer: dict = SGD, **fields) -> train.Fit:
    return settings("train", **dict(epochs=2, batch_size=32, optimizer=optimizer) | fields)


def start(problem: train.Problem, chosen: train.Fit, seed: int = 0) -> tuple[train.State, dict]:
    """(state at the start of training, its numbers)."""
    state = train.initial_state(problem, problem.place(train.key_of(seed)))
    numbers = train.numbers_of(problem, state, [chosen])
    return train.begin_members(problem, state, [chosen], numbers), numbers


def trained(
    problem: train.Problem, chosen: train.Fit, seed: int = 0
) -> tuple[train.State, list[dict]]:
    """(state after training, rows)."""
    state, numbers = start(problem, chosen, seed)
    rows = []
    for update in train.fit_epochs(problem, state, chosen, numbers, 0):
        state = update.state
        rows += update.rows[0]
    return state, rows


def config(*names: str, **fields) -> dict:
    """A config of the stages `fit`, `curve`, ... on few digits; `names`: its pipeline."""
    made = {
        "data": dict(name="digits", train_limit=128, test_limit=50),
        "model": dict(name="mlp", widths=(16,)),
        "fit": pipeline.stage("train", epochs=2, batch_size=32, optimizer=SGD),
        "again": pipeline.stage(
            "train", epochs=1, batch_size=32, optimizer=dict(SGD, learning_rate=0.01)
        ),
        "curve": pipeline.stage("curve", ratios=(0.0, 0.5, 0.9)),
        "retrained": pipeline.stage("curve", ratios=(0.0, 0.5, 0.9), retrain="again"),
        "cut": pipeline.stage("prune", ratio=0.5),
        "weights": pipeline.stage("histogram"),
        "learn": pipeline.stage("sfw_init", constraint=BALL, iterations=12, batch_size=32),
        "pipeline": names,
    }
    return copy.deepcopy(made | fields)


@functools.cache
def is_known(name: str, value: int | bool) -> bool:
    """Whether this version of XLA has the option; all that it lacks is speed."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def quickly() -> list[tuple]:
    """Options with which this version of XLA compiles in little time."""
    return [option for option in QUICKLY if is_known(*option)]


def flags() -> str:
    """XLA_FLAGS of a process that compiles quickly."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in quickly())


def python(*arguments, cwd: pathlib.Path = ROOT, **options) -> subprocess.CompletedProcess:
    """What a Python process with these arguments printed and returned; it must end in time."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


def compiled(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` as two programs: outside `jit` each of its operations is one of its own."""
    return optax.GradientTransformationExtraArgs(jax.jit(tx.init), jax.jit(tx.update))


def jitted_once(function):
    """`function` compiled, which fails where it is traced a second time."""
    traced = []

    def once(*arguments):
        traced.append(arguments)
        assert len(traced) == 1, "compiled again"
        return function(*arguments)

    return jax.jit(once)


@contextlib.contextmanager
def pages(drawn: bool):
    """Runs inside draw their reports, which take longer than they do, or none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "summary_of", SUMMARY if drawn else lambda *_: "")
        patch.setattr(report, "write", WRITE if drawn else lambda workdir, *_, **__: workdir)
        yield


@contextlib.contextmanager
def sketches():
    """Figures inside are no more than the titles of their panels."""

    def sketch(name, figure):
        titles = [axes.get_title(loc=side) for axes in figure.axes for side in ("left", "center")]
        return b"", f"<svg>{html.escape(' '.join(titles))}</svg>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "files_of", sketch)
        yield


@contextlib.contextmanager
def same_programs():
    """Runs inside share compiled programs where they have the same digits, network and devices."""
    programs = {}
    decide_nothing = ("pipeline", "seed", "sweep", "title", "start_from", "checkpoint_seconds")

    def build(plans):
        problem, common = BUILD(plans), plans[0].common
        if common["data"]["name"] != "digits" or common["pretrained"]:
            return problem
        deciding = {name: common[name] for name in common if name not in decide_nothing}
        key = repr((sorted(deciding.items()), plans[0].size))
        return problem._replace(compiled=programs.setdefault(key, problem.compiled))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "build", build)
        yield


def random_set(
    shape: tuple[int, ...] = (32, 32, 3), num_classes: int = 10, examples: int = 16
) -> data.Dataset:
    """Random images; twice the batch for two steps."""
    rng = default_rng(0)
    split = lambda size: data.Split(
        rng.integers(0, 256, (size, *shape), np.uint8),
        rng.integers(0, num_classes, size).astype(np.int32),
    )
    channels = shape[-1]
    return data.Dataset(
        "random", split(examples), split(5), num_classes, (0.5,) * channels, (0.25,) * channels
    )


def residual(*stage_sizes: int) -> tuple[train.Problem, train.State]:
    """A small residual network, untrained, its statistics and the scales of its norms random."""
    options = dict(stage_sizes=stage_sizes, widths=(6, 8), stem_width=6)
    model = models.build(name="resnet", num_classes=4, **options)
    found = train.build_problem(random_set((8, 8, 3), 4, examples=40), model)
    state = train.initial_state(found, train.key_of(0))
    rng = default_rng(0)
    noisy = lambda leaf: jnp.asarray(np.asarray(leaf) + 0.2 * rng.random(leaf.shape, np.float32))
    shake = lambda tree: jax.tree.map(lambda leaf: noisy(leaf) if leaf.ndim == 1 else leaf, tree)
    return found, state._replace(params=shake(state.params), batch_stats=shake(state.batch_stats))


@contextlib.contextmanager
def refused(where: str, value: Any = ..., closest: str = "", *, allowed=""):
    """Asserts that the block refuses the setting `where`; allowed: a part of what the error says
    is allowed. The error is not asked for what is not given."""
    with pytest.raises(tables.ConfigError) as raised:
        yield raised
    error = raised.value
    assert error.where == where or (error.is_sentence() and error.where.startswith(where))
    assert value is ... or error.value == value or error.value is value
    assert allowed in error.allowed
    assert not closest or error.closest == closest


def complains(sentence: str):
    """Asserts that the block finds a wrong setting and says so in a sentence that matches."""
    return pytest.raises(tables.ConfigError, match=sentence)


def same(first, second) -> None:
    """Asserts that two trees have the same structure and the same bits."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert_array_equal(a, b)


def check_on_meshes(function, *arrays, rtol=1e-5) -> None:
    """Asserts that `function` of the rows of arrays [2, ...] gives the same in each of `shard_map`,
    one row per device, `vmap` of it, and on arrays that an explicit mesh divides."""
    close = lambda a, b: assert_allclose(a, b, rtol=rtol, atol=rtol)
    alone = jax.jit(jax.vmap(function))(*arrays)
    kinds, spec = jax.sharding.AxisType, jax.sharding.PartitionSpec("x")
    make = lambda kind: jax.make_mesh((2,), ("x",), (kind,), devices=jax.devices()[:2])
    mesh, explicit = make(kinds.Auto), make(kinds.Explicit)

    def first(*rows):
        return jax.tree.map(lambda leaf: leaf[None], function(*(row[0] for row in rows)))

    mapped = jax.vmap(jax.shard_map(first, mesh=mesh, in_specs=spec, out_specs=spec))
    both = jax.jit(mapped)(*(np.stack([array, array[::-1]]) for array in arrays))
    jax.tree.map(lambda a, b: close(a, np.stack([b, b[::-1]])), both, alone)
    with jax.set_mesh(explicit):
        shared = jax.jit(function)(
            *(jax.device_put(array[0], jax.NamedSharding(explicit, spec)) for array in arrays)
        )
    jax.tree.map(lambda a, b: close(a, b[0]), shared, alone)


def read_back(rows: list[dict]) -> list[dict]:
    """Rows as a file of them holds them."""
    return json.loads(json.dumps(rows))


def timeless(rows: list[dict]) -> list[dict]:
    """Rows without the one field that two equal runs differ in."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# names that a swept value or a config may carry: mathtext, markup, patterns, formats, colours, text
# XML cannot hold
HOSTILE_LABELS = (
    "$$",
    "a$b",
    r"$x_1^2$",
    r"\d \1 \$ $\frac{1}{2}$",
    "100% _x_",
    "_",
    "<b>&lt;\"'",
    "#0072b2",
    "{0} %s",
    "-->",
    "]]>",
    "\x00\x1b\ud800",
    "名" * 100,
    "a\nb",
)
