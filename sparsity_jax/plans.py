"""A config checked as a whole: the plans of its members, before anything is loaded or compiled."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import ml_collections
from jax import ShapeDtypeStruct, eval_shape, random

from sparsity_jax import (
    ancestry,
    compaction,
    cuts,
    data,
    geometry,
    greg,
    interface,
    members,
    meshes,
    models,
    pretrained,
    removal,
    sfw_init,
    stages,
    tables,
    train,
    trials,
    versions,
)
from sparsity_jax.interface import Stage
from sparsity_jax.members import Member, stages_of
from sparsity_jax.precision import FULL, Precision
from sparsity_jax.report import trackers
from sparsity_jax.tables import ConfigError, Index, check_options, defaults, lookup, within
from sparsity_jax.train import Fit, State
from sparsity_jax.types import Config, Fields

__all__ = [
    "STAGES",
    "Plan",
    "Platform",
    "Stages",
    "base",
    "check",
    "check_member",
    "check_model",
    "check_names",
    "convolves",
    "plain",
    "read_stage",
    "settings",
    "stage",
    "stages_used",
]

Stages = Mapping[str, Stage]  # by name
Platform = Literal["default", "cpu", "gpu", "tpu"]
STAGES = {
    stage.kind: stage
    for module in (sfw_init, stages, geometry, cuts, compaction, removal, greg, trials)
    for stage in module.STAGES
}
_SHARED = ("init", "dtype", "param_dtype")  # options of every network
_NARROWER = "'float32', 'bfloat16', 'float16'"
_WIDER = f"{_NARROWER}, and with JAX_ENABLE_X64=1 in the environment also 'float64'"


def settings(
    *,
    data: dict,
    model: dict,
    pipeline: tuple[str, ...],
    title: str = "",
    start_from: str = "",
    pretrained: str = "",
    pretrained_names: tuple[tuple[str, str], ...] = (),
    pretrained_zeros: Literal["train", "keep"] = "train",
    fresh_classifier: bool = False,
    seed: tables.Seed = 0,
    platform: Platform = "default",
    mesh: Index | dict = 1,
    mesh_rule: str = "largest_axis",
    steps_per_call: Index = 0,
    eval_batch_size: tables.Count = 1000,
    sample: Literal["spread", "first"] = "spread",
    sample_seed: Index = 0,
    deterministic: bool = False,
    precision: Precision = "default",
    curvature_precision: Precision = FULL,
    checkpoint_seconds: tables.NonNegative = 60.0,
    log: tuple[Literal["wandb", "mlflow"], ...] = (),
    keep_networks: Index = 1000,
    sweep: dict = {},  # noqa: B006 - never changed
) -> None:
    """Fields of every config beside its stages.

    data: see `data.Options`. model: see `models.build`. pipeline: names of stage configs, in order.
    title: of the report. seed: of initial weights and all random numbers. start_from: workdir
    of a finished run, whose trained network and rows this one goes on from; its model must be
    the same. pretrained: a file of PyTorch weights (see `pretrained.read`), with which all
    networks start, also where a `train` stage has start="init"; stages that need a trained
    network take it as one. pretrained_names: which of its layers is which here, see
    `pretrained.name_map`. pretrained_zeros: whether weights that are zero in the file train as
    all others, or are masked as pruned ones and stay zero ("keep"). fresh_classifier: without
    its last layer, which starts fresh: for other classes. platform: where to compute (default:
    JAX's choice). mesh: local devices that share each batch, 0 for all; or how many along each of
    two axes, e.g. `dict(data=2, params=4)`: batches are divided over all of them, parameters and
    what is as large over those of `params`. mesh_rule: which axis of a parameter is divided, a row
    of `meshes.RULES`. steps_per_call:
    training steps per compiled call, 0 for automatic. eval_batch_size: images per batch of
    evaluations. sample: which images a stage takes that is given a number of them
    (`imp_samples`, `num_examples`): "spread" evenly over the stored order, in memory and
    streamed alike, another sample for each sample_seed; or the "first", which in a folder are
    those of the first classes. sample_seed: number of the sample. deterministic: makes a run and
    its resume repeat bit by bit on a GPU too, where training is 4 to 5 % slower so; on a CPU they
    always do. precision: of matrix products in training and evaluation, as
    `jax.default_matmul_precision` names it; JAX's default is TF32 on NVIDIA GPUs and bfloat16 on
    TPUs. curvature_precision: of those in curvature, importance, Jacobians, `sfw_init` and
    whatever else claims to be exact; a narrower one is some five times as fast on a GPU and off by
    some 3 %. checkpoint_seconds: least time between two saves. log: services that get all numbers
    too, as TensorBoard does: Weights & Biases, MLflow. keep_networks: how many trained
    networks stay on disk beside the last one, without optimizer, the newest of each label.
    sweep: lists of values under the names of fields, e.g. `dict(seed=(0, 1),
    fit=dict(optimizer=dict(learning_rate=(0.1, 0.3))))`; all combinations run. What else it may
    say, see `members.choices`.
    """


_DEFAULTS = defaults(settings)


def base(**fields: Any) -> ml_collections.ConfigDict:
    """A config with all common fields, so that every one can be overridden on the command line."""
    fields["data"] = {**defaults(data.Options), **fields.get("data", {})}
    fields["model"] = models.complete(fields.get("model", {}))
    return ml_collections.ConfigDict({**_DEFAULTS, **fields})


def stage(kind: str, **fields: Any) -> Fields:
    """A stage config with all its fields; see `STAGES` for kinds."""
    return {"kind": kind, **defaults(lookup(STAGES, kind, "kind")), **fields}


def plain(value: Any, path: str = "config") -> Any:
    """A config as nested plain dicts with JSON's types: tuples become lists.

    Raises ConfigError for what JSON cannot hold. path: of the value.
    """
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    try:
        if isinstance(value, Mapping):
            return {
                str(name): plain(item, tables.joined(path, str(name)))
                for name, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
        return json.loads(json.dumps(value))
    except (TypeError, RecursionError) as error:
        raise ConfigError(path, why=f"is no plain data: {error}") from None


class Plan(NamedTuple):
    """Members that run side by side. numbers: of the members, consecutive. common: the checked
    fields beside the stages.
    """

    numbers: list[int]
    members: list[Member]
    common: Fields

    @property
    def pipeline(self) -> tuple[str, ...]:
        """Names of its stages, in order."""
        return self.common["pipeline"]

    @property
    def settings(self) -> dict[str, list[Any]]:
        """The checked stages by name, one per member."""
        names = self.members[0].stages
        return {name: [member.stages[name] for member in self.members] for name in names}

    @property
    def size(self) -> int | None:
        """Size of the leading axis of its states; None: no such axis."""
        if len(self.members) > 1:
            return len(self.members)
        return None

    @property
    def name(self) -> str:
        """`member 3`, or `members 3 to 5`."""
        first = self.numbers[0]
        last = self.numbers[-1]
        if first == last:
            return f"member {first}"
        return f"members {first} to {last}"

    def after(self, state: State, position: int) -> State:
        """The state as the stage at `position` leaves it to the next one; the last one leaves no
        optimizer.
        """
        bare = interface.without_optimizer(state)
        if position + 1 == len(self.pipeline):
            return bare
        stage = self.members[0].stages[self.pipeline[position]]
        return bare._replace(opt_state=stage.hand_on(state.opt_state))


# Checks -------------------------------------------------------------------------------------------


def check(config: Config) -> list[Plan]:
    """Checks a whole config without compiling anything: the plans, one after the other, of members
    that run side by side.

    Raises ConfigError for the first mistake, saying what was given, what is allowed and the closest
    match.
    """
    config = {**_DEFAULTS, **plain(config)}
    common = _check_common(config)
    every = [
        member._replace(stages=check_member(member.config)) for member in members.expand(config)
    ]
    _check_pretrained(common)
    with within("config"):
        trackers.check(common["log"])
    done = _kinds_before(common)
    for member in every:
        _check_order(common["pipeline"], member.stages, done)
    with within("config.data"):
        data.check(**dict(common["data"]))
    used = stages_used(common["pipeline"], every)
    _check_batches(common, every, used)
    if common["data"].get("stream"):
        _check_streamed(common, every, used)
    groups = _side_by_side(common, every, used)
    return [Plan(numbers, [every[i] for i in numbers], common) for numbers in groups]


def _check_common(config: Fields) -> Fields:
    """The checked fields of a config beside its stages; raises ConfigError for other fields."""
    names = stages_of(config)
    fields = {name: value for name, value in config.items() if name not in names}
    with within("config"):
        common = check_options(settings, fields, also=names)
        meshes.check(common["mesh"])
        lookup(meshes.RULES, common["mesh_rule"], "mesh_rule")
        meshes.check_batch("eval_batch_size", common["eval_batch_size"], common["mesh"])
    check_names(common["pipeline"], names)
    return common


def check_names(pipeline: Sequence[str], stage_names: Sequence[str]) -> None:
    """Raises ConfigError for a pipeline that is empty or names a stage that the config has not."""
    if not pipeline:
        raise ConfigError("config.pipeline", (), allowed="at least one name of a stage")
    for name in pipeline:
        lookup(dict.fromkeys(stage_names), name, "config.pipeline")


def check_member(config: Fields) -> dict[str, Stage]:
    """The checked stages of one member, by name; checks data and model options too."""
    with within("config.model"):
        check_model(config["model"])
    with within("config.data"):
        check_options(data.Options, config["data"])
    checked = {}
    for name in stages_of(config):
        with within(f"config.{name}"):
            checked[name] = read_stage(config[name])
    return checked


def read_stage(config: Config) -> Stage:
    """The checked stage of a stage's config."""
    fields = dict(config)
    kind = lookup(STAGES, fields.pop("kind"), "kind")
    stage = kind(**check_options(kind, fields))
    stage.check()
    return stage


def check_model(model: Config) -> None:
    """Raises ConfigError for a network that cannot be built of `model`; nothing is computed."""
    options = dict(model)
    factory = lookup(models.MODELS, options.pop("name", ""), "name")
    shared = {field: options.pop(field) for field in _SHARED if field in options}
    check_options(factory, options, also=_SHARED)
    models.build(num_classes=10, **model)
    if jax.dtypes.canonicalize_dtype("float64") == "float64":
        return
    for field, value in shared.items():
        if value == "float64":
            raise ConfigError(field, value, allowed=_WIDER)


def _check_order(pipeline: Sequence[str], by_name: Stages, done: Mapping[str, str]) -> None:
    """Raises ConfigError for a stage that needs another's result first.

    done: kinds of the stages that another run has finished, by name.
    """
    done = dict(done)
    trainings = {name: stage for name, stage in by_name.items() if stage.kind == Fit.kind}
    for name in pipeline:
        stage = by_name[name]
        if stage.needs and not set(done.values()) & set(stage.needs):
            raise _needs_another(name, stage)
        before = [by_name[earlier] for earlier in pipeline[: pipeline.index(name)]]
        with within(f"config.{name}"):
            stage.check_order(interface.Order(before, done, by_name, pipeline.count(name)))
            _check_retrain(stage.retrain, trainings)
        done[name] = stage.kind


def _needs_another(name: str, stage: Stage) -> ConfigError:
    """The error of the stage `name`, before which none has made what it needs."""
    sources = " or ".join(map(repr, stage.needs))
    if Fit.kind in stage.needs:
        sources += ", config.start_from or config.pretrained"
    return ConfigError(
        "config.pipeline",
        name,
        verb="runs",
        why=f"of kind {stage.kind!r}, before what it needs the result of",
        allowed=f"after a stage of kind {sources}",
    )


def _check_retrain(name: str, trainings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a `retrain` that is no training of the current network."""
    if name and lookup(trainings, name, "retrain").start == "init":
        raise ConfigError(
            "retrain", name, why="whose start is 'init'", allowed="one whose start is 'current'"
        )


def stages_used(pipeline: Sequence[str], every: Sequence[Member]) -> list[str]:
    """Names of the stages that run, those that retrain included."""
    again = {member.stages[name].retrain for member in every for name in pipeline}
    return sorted({*pipeline, *again} - {""})


def _check_batches(common: Config, every: Sequence[Member], used: Sequence[str]) -> None:
    """Raises ConfigError for a batch that named axes cannot divide."""
    for member, name in itertools.product(every, used):
        batch_size = getattr(member.stages[name], "batch_size", 0)
        with within(f"config.{name}"):
            meshes.check_batch("batch_size", batch_size, common["mesh"])


def _check_streamed(common: Config, every: Sequence[Member], used: Sequence[str]) -> None:
    """Raises ConfigError for stages that need in memory what stays where it is."""
    if members.mode_of(common) == "vmap" and len(every) > 1:
        raise ConfigError(
            "config.sweep.mode",
            "vmap",
            why="but one member at a time reads what config.data.stream leaves where it is",
            allowed="'loop'",
        )
    for member, name in itertools.product(every, used):
        with within(f"config.{name}"):
            member.stages[name].check_streamed()


def _side_by_side(common: Config, every: Sequence[Member], used: Sequence[str]) -> list[list[int]]:
    """Numbers of the members that run at once, in one program each.

    used: names of the stages that run. Raises ConfigError if all shall, but cannot.
    """
    mode = members.mode_of(common)
    alone = mode == "loop" or len(every) == 1
    if mode == "auto" and not alone:
        alone = common["data"].get("stream") or convolves(common["model"])
    if alone:
        return [[i] for i in range(len(every))]

    def program(i: int) -> list:
        return [every[i].stages[name].together() for name in used]

    indices = range(len(every))
    groups = [list(group) for _, group in itertools.groupby(indices, program)]
    if mode == "vmap" and len(groups) > 1:
        first, other = (every[group[0]].config for group in groups[:2])
        raise _another_program(first, other, used)
    return groups


def _another_program(first: Fields, other: Fields, used: Sequence[str]) -> ConfigError:
    """The error of two members that shall run at once, but whose programs differ."""
    fields = []
    for name in used:
        differing = versions.differences(first[name], other[name], name)
        fields += [field for field, _, _ in differing if not field.endswith(".label")]
    return ConfigError(
        "config.sweep",
        fields,
        verb="changes",
        why="which needs another program",
        allowed="seed and numbers of one optimizer; anything with config.sweep.mode='loop'",
    )


def convolves(model: Config) -> bool:
    """Whether the network of `config.model` has convolutions; only shapes are computed."""
    init = models.build(num_classes=10, **model).init
    images = ShapeDtypeStruct((1, 32, 32, 3), "float32")
    try:
        variables = eval_shape(lambda: init(random.key(0), images))
    except Exception:  # `building.check_size` tells, for images of the right size
        return True
    return train.convolves(variables["params"])


# Where a run starts -------------------------------------------------------------------------------


def _check_pretrained(common: Config) -> None:
    """Raises ConfigError if the weight file cannot be used."""
    path = common["pretrained"]
    if path and common["start_from"]:
        also = f"and config.start_from {common['start_from']!r}"
        raise ConfigError("config.pretrained", path, why=also, allowed="one of them")
    if path:
        with within("config.pretrained"):
            pretrained.check(path)
        return
    for name in ("fresh_classifier", "pretrained_names", "pretrained_zeros"):
        if common[name] != _DEFAULTS[name]:
            why = "which is for the weights of config.pretrained, but that is empty"
            raise ConfigError(f"config.{name}", common[name], why=why)


def _kinds_before(common: Config) -> dict[str, str]:
    """Kinds, by name, of the stages that are finished when a run begins: those of the run in
    `config.start_from` and of those before it, and a training for a weight file.

    Raises ConfigError if that run cannot be used.
    """
    start = common["start_from"]
    if start:
        with tables.blaming("config.start_from", start):
            return ancestry.kinds(start, models.complete(common["model"]), common["sweep"])
    if common["pretrained"]:
        return {"config.pretrained": Fit.kind}
    return {}
