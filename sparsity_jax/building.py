"""From checked plans to a problem: data loaded, network made, and both seen to fit the stages and
the memory.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import eval_shape, local_devices

from sparsity_jax import (
    ancestry,
    data,
    meshes,
    models,
    plans,
    tables,
    train,
    trees,
    weights,
    workdirs,
)
from sparsity_jax.plans import Plan
from sparsity_jax.tables import ConfigError, reason_of, within
from sparsity_jax.train import Problem, shapes_of
from sparsity_jax.trees import named_leaves
from sparsity_jax.types import Config

__all__ = [
    "DETERMINISTIC",
    "build",
    "check_size",
    "enough_memory",
    "enough_memory_for",
    "making_network",
    "origin_of",
    "use_deterministic",
    "use_platform",
]

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # of XLA_FLAGS
# fields that decide how much a stage holds
_LARGE = ("batch_size", "num_examples", "imp_samples", "num_matvecs")


def use_deterministic(wanted: bool) -> None:
    """Makes programs on a GPU repeat bit by bit, as they do on a CPU anyway, if
    `config.deterministic` asks for it.

    Raises ConfigError where a GPU is in use already: XLA reads its flags once, before that.
    """
    wanted = tables.convert(wanted, bool, "config.deterministic")
    flags = os.environ.get("XLA_FLAGS", "")
    if not wanted or DETERMINISTIC in flags.split():
        return
    if not _has_started():
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()
    elif jax.default_backend() == "gpu":
        raise ConfigError(
            "config.deterministic",
            True,
            why="but this process already uses jax on a GPU that need not repeat itself",
            allowed=f"with XLA_FLAGS={DETERMINISTIC} in the environment, or before jax computes",
        )


def _has_started() -> bool:
    """Whether jax computes already: then it refuses another number of devices."""
    config: Any = jax.config
    number = config.jax_num_cpu_devices
    try:
        config.update("jax_num_cpu_devices", number + 1)
    except RuntimeError:
        return True
    config.update("jax_num_cpu_devices", number)
    return False


def use_platform(name: str) -> None:
    """Makes JAX compute on `config.platform`; raises ConfigError where it cannot."""
    if tables.convert(name, plans.Platform, "config.platform") == "default":
        return
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    with within("config.platform"):
        try:
            used = local_devices()[0].platform
        except (RuntimeError, AssertionError):  # which of them depends on the version of jax
            raise ConfigError("", name, why="but jax finds no such device here") from None
        if used != name:
            why = f"but this process already uses jax on {used!r}"
            raise ConfigError("", name, why=why)


def build(every: list[Plan]) -> Problem:
    """Loads the data and builds the network; raises ConfigError for settings that do not fit
    them.
    """
    common = every[0].common
    with within("config"):
        meshes.of_hosts(common["mesh"])
    with within("config.data"):
        dataset = data.load(**common["data"])
    model = models.build(num_classes=dataset.num_classes, **common["model"])
    problem = train.build_problem(
        dataset,
        model,
        mesh=common["mesh"],
        mesh_rule=meshes.RULES[common["mesh_rule"]],
        members=every[0].size,
        eval_batch_size=common["eval_batch_size"],
        sample=data.FixedSample(common["sample"], common["sample_seed"]),
        steps_per_call=common["steps_per_call"],
        precision=common["precision"],
        curvature_precision=common["curvature_precision"],
    )
    with within("config.model"):
        check_size(problem, common["model"]["name"])
    if common["pretrained"]:
        with enough_memory_for("config.pretrained", None, common):
            problem = weights.starting_with(problem, common)
    for plan in every:
        start = origin_of(plan, len(every))
        if start:
            ancestry.check_arrays(start, shapes_of(problem), plan.size)
    _check_stages(every, problem)
    return problem


def origin_of(plan: Plan, num_plans: int) -> str:
    """The folder that a plan starts from, or "": of several plans that of the same member, if the
    run before has such.
    """
    start = plan.common["start_from"]
    if start and num_plans > 1:
        return str(ancestry.of_member(start, workdirs.member_name(plan.numbers[0])))
    return start


def _check_stages(every: list[Plan], problem: Problem) -> None:
    """Raises ConfigError for stages that do not fit the network or the data."""
    pipeline = every[0].pipeline
    members = [member for plan in every for member in plan.members]
    for name in plans.stages_used(pipeline, members[:1]):
        visits = max(pipeline.count(name), 1)
        for stage in dict.fromkeys(member.stages[name] for member in members):
            with within(f"config.{name}"):
                stage.check_network(problem, visits)


def check_size(problem: Problem, name: str) -> None:
    """Raises ConfigError for a network that cannot be made for the run's images, or is larger than
    the memory.
    """
    images = problem.image(2)
    _, height, width, channels = images.shape
    what = f"{name!r} for images of {height} x {width} x {channels}"
    with making_network(what):
        variables = problem.shapes()
        logits = eval_shape(problem.model.apply, variables, images)
    sizes = {path: leaf.size for path, leaf in named_leaves(variables).items()}
    sizes["its logits"] = logits.size
    empty = [path for path, size in sizes.items() if not size]
    if empty:
        too_large = "it is too large for them"
        raise ConfigError("", why=f"{what} has nothing in {empty[0]}: {too_large}")
    needed = 2 * train.bytes_of(problem, variables["params"])  # with gradients
    weights = f"{trees.size(variables['params']):,} weights"
    train.check_memory(needed, f"{what} has {weights}, which with their gradients")


@contextmanager
def making_network(name: str) -> Iterator[None]:
    """What goes wrong while a network is traced inside, in whatever type, as a ConfigError about
    the network `name`.
    """
    try:
        yield
    except Exception as error:  # which ones depends on the layer that does not fit
        why = f"{name} cannot be made: {reason_of(error)}"
        raise ConfigError("", why=f"{why}; is it too large for its images?") from None


@contextmanager
def enough_memory(part: str, advice: str) -> Iterator[None]:
    """Memory that is full inside, of the host or of a device, as a ConfigError that ends with
    `advice`.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        full = f"{part}: the memory is full ({reason_of(error)})"
        raise ConfigError(f"{full}. {advice}") from error


def enough_memory_for(
    part: str, stage: Any, common: Config
) -> contextlib.AbstractContextManager[None]:
    """`enough_memory` for a part of a run that says what to lower. part: a `stage` in the config,
    or something else.
    """
    lower = [f"{part}.{field}" for field in _LARGE if hasattr(stage, field)]
    lower += ["config.eval_batch_size", "the network of config.model"]
    loop = " or set config.sweep.mode to 'loop'" if common["sweep"] else ""
    advice = f"Lower {', '.join(lower)}{loop}, in another --workdir; with more memory the same "
    return enough_memory(part, f"{advice}command goes on from the last checkpoint.")
