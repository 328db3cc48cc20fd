"""A run: its config checked as a whole, then its stages in order, saved on the way and resumed
where it stopped.
"""

import contextlib
import importlib.metadata
import itertools
import json
import platform as host
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jax import ShapeDtypeStruct, eval_shape, local_devices, random

import sparsity_jax
from sparsity_jax import (
    checkpoint,
    data,
    geometry,
    greg,
    interface,
    lock,
    members,
    models,
    pretrained,
    report,
    stages,
    stopping,
    structured,
    tables,
    train,
    trees,
    workdirs,
)
from sparsity_jax.interface import Place, Stage
from sparsity_jax.members import Member, stages_of
from sparsity_jax.report import Writer
from sparsity_jax.tables import ConfigError, check_options, defaults, lookup, shortened, within
from sparsity_jax.train import Fit, NonFiniteLossError, Problem, State, shapes_of
from sparsity_jax.trees import named_leaves
from sparsity_jax.types import AnyPath, Config, Fields, MemberRows, PyTree, Row, Rows
from sparsity_jax.workdirs import Progress, Snapshot, holds_run, read_config, say

Stages = dict[str, Stage]  # by name
Platform = Literal["default", "cpu", "gpu", "tpu"]
ALL_STAGES = (*stages.STAGES, *geometry.STAGES, *structured.STAGES, *greg.STAGES)
STAGES = {stage.kind: stage for stage in ALL_STAGES}
# fields that decide how much a stage holds
LARGE = ("batch_size", "num_examples", "imp_samples", "num_matvecs")


# Configs ------------------------------------------------------------------------------------------


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
    mesh: tables.Index = 1,
    steps_per_call: tables.Index = 0,
    eval_batch_size: tables.Count = 1000,
    sample: Literal["spread", "first"] = "spread",
    sample_seed: tables.Index = 0,
    checkpoint_seconds: tables.NonNegative = 60.0,
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
    JAX's choice). mesh: local devices that share each batch, 0 for all. steps_per_call:
    training steps per compiled call, 0 for automatic. eval_batch_size: images per batch of
    evaluations. sample: which images a stage takes that is given a number of them
    (`imp_samples`, `num_examples`): "spread" evenly over the stored order, in memory and
    streamed alike, another sample for each sample_seed; or the "first", which in a folder are
    those of the first classes. sample_seed: number of the sample. checkpoint_seconds: least
    time between two saves.
    sweep: lists of values under the names of fields, e.g. `dict(seed=(0, 1),
    fit=dict(optimizer=dict(learning_rate=(0.1, 0.3))))`; all combinations run. What else it may
    say, see `members.choices`.
    """


FIELDS, DEFAULTS = tuple(tables.parameters(settings)), defaults(settings)


def base(**fields: Any) -> ml_collections.ConfigDict:
    """A config with all common fields, so that every one can be overridden on the command line."""
    fields["data"] = {**defaults(data.Options), **fields.get("data", {})}
    fields["model"] = complete_model(fields.get("model", {}))
    return ml_collections.ConfigDict({**DEFAULTS, **fields})


def stage(kind: str, **fields: Any) -> Fields:
    """A stage config with all its fields; see `STAGES` for kinds."""
    return {"kind": kind, **defaults(lookup(STAGES, kind, "kind")), **fields}


def complete_model(model: Config) -> Fields:
    """`config.model` with the defaults of the options that it lacks: a config's, or those of an
    older version's run.
    """
    own = models.MODELS.get(model.get("name", ""))
    return {**defaults(models.build), **(defaults(own) if own else {}), **model}


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
    fields beside the stages. settings: by stage name, one per member.
    """

    numbers: list[int]
    members: list[Member]
    common: Fields
    settings: dict[str, list[Any]]

    @property
    def pipeline(self) -> tuple[str, ...]:
        """Names of its stages, in order."""
        return self.common["pipeline"]

    @property
    def size(self) -> int | None:
        """Size of the leading axis of its states; None: no such axis."""
        return len(self.members) if len(self.members) > 1 else None

    @property
    def name(self) -> str:
        """`member 3`, or `members 3 to 5`."""
        first, last = self.numbers[0], self.numbers[-1]
        return f"member {first}" if first == last else f"members {first} to {last}"

    def after(self, state: State, position: int) -> State:
        """The state as the stage at `position` leaves it to the next one; the last one leaves no
        optimizer.
        """
        left = self.settings[self.pipeline[position]][0].hand_on(state.opt_state)
        last = position + 1 == len(self.pipeline)
        return interface.without_optimizer(state)._replace(opt_state=() if last else left)


def check(config: Config) -> list[Plan]:
    """Checks a whole config without compiling anything: the plans, one after the other, of members
    that run side by side.

    Raises ConfigError for the first mistake, saying what was given, what is allowed and the closest
    match.
    """
    config = {**DEFAULTS, **plain(config)}
    common = check_common(config)
    networks = members.expand(config)
    checked = [check_member(member.config) for member in networks]
    check_pretrained(common)
    done = kinds_before(common)
    for own in checked:
        check_order(config, own, done)
    with within("config.data"):
        data.check(**dict(common["data"]))
    used = stages_used(common["pipeline"], checked)
    if common["data"].get("stream"):
        check_streamed(common, checked, used)
    plans = []
    for numbers in side_by_side(common, networks, checked, used):
        by_name = {name: [checked[i][name] for i in numbers] for name in checked[0]}
        plans.append(Plan(numbers, [networks[i] for i in numbers], common, by_name))
    return plans


def check_common(config: Fields) -> Fields:
    """The checked fields of a config beside its stages; raises ConfigError for other fields."""
    names = stages_of(config)
    own = {name: value for name, value in config.items() if name not in names}
    with within("config"):
        common = check_options(settings, own, also=names)
    check_names(common["pipeline"], names)
    return common


def check_names(pipeline: Sequence[str], stage_names: Sequence[str]) -> None:
    """Raises ConfigError for a pipeline that is empty or names a stage that the config has not."""
    if not pipeline:
        raise ConfigError("config.pipeline", (), allowed="at least one name of a stage")
    for name in pipeline:
        lookup(dict.fromkeys(stage_names), name, "config.pipeline")


def check_member(config: Fields) -> Stages:
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
    shared = ("init", "dtype", "param_dtype")
    own = {field: value for field, value in options.items() if field not in shared}
    check_options(factory, own, also=shared)
    models.build(num_classes=10, **model)
    narrow = jax.dtypes.canonicalize_dtype("float64") != "float64"
    for field in shared:
        if narrow and options.get(field) == "float64":
            narrower = "'float32', 'bfloat16', 'float16'"
            wider = "with JAX_ENABLE_X64=1 in the environment also 'float64'"
            raise ConfigError(field, "float64", allowed=f"{narrower}, and {wider}")


def check_order(config: Config, checked: Stages, done: Mapping[str, str]) -> None:
    """Raises ConfigError for a stage that needs another's result first.

    done: kinds of the stages that another run has finished, by name.
    """
    pipeline, done = config["pipeline"], dict(done)
    for name in pipeline:
        kind = config[name]["kind"]
        needs = STAGES[kind].needs
        if needs and not set(done.values()) & set(needs):
            sources = " or ".join(map(repr, needs))
            if "train" in needs:
                sources += ", config.start_from or config.pretrained"
            raise ConfigError(
                "config.pipeline",
                name,
                verb="runs",
                why=f"of kind {kind!r}, before what it needs the result of",
                allowed=f"after a stage of kind {sources}",
            )
        before = [checked[earlier] for earlier in pipeline[: pipeline.index(name)]]
        with within(f"config.{name}"):
            order = interface.Order(before, done, checked, pipeline.count(name))
            checked[name].check_order(order)
            check_retrain(checked[name].retrain, config)
        done[name] = kind


def check_retrain(name: str, config: Config) -> None:
    """Raises ConfigError for a `retrain` that is no training of the current network."""
    trains = {n: config[n] for n in stages_of(config) if config[n]["kind"] == train.Fit.kind}
    if name and lookup(trains, name, "retrain").get("start") == "init":
        raise ConfigError(
            "retrain", name, why="whose start is 'init'", allowed="one whose start is 'current'"
        )


def stages_used(pipeline: Sequence[str], checked: Sequence[Stages]) -> list[str]:
    """Names of the stages that run, those that retrain included."""
    again = {own[name].retrain for own in checked for name in pipeline}
    return sorted({*pipeline, *again} - {""})


def check_streamed(common: Config, checked: Sequence[Stages], used: Sequence[str]) -> None:
    """Raises ConfigError for stages that need in memory what stays where it is."""
    if members.mode_of(common) == "vmap" and len(checked) > 1:
        raise ConfigError(
            "config.sweep.mode",
            "vmap",
            why="but one member at a time reads what config.data.stream leaves where it is",
            allowed="'loop'",
        )
    for own, name in itertools.product(checked, used):
        with within(f"config.{name}"):
            own[name].check_streamed()


def side_by_side(
    common: Config, networks: Sequence[Member], checked: Sequence[Stages], used: Sequence[str]
) -> list[list[int]]:
    """Numbers of the members that run at once, in one program each.

    used: names of the stages that run. Raises ConfigError if all shall, but cannot.
    """
    mode = members.mode_of(common)
    alone = mode == "loop" or len(networks) == 1
    if mode == "auto" and not alone:
        alone = common["data"].get("stream") or convolves(common["model"])
    if alone:
        return [[i] for i in range(len(networks))]
    program = lambda i: [checked[i][name].together() for name in used]
    groups = [list(group) for _, group in itertools.groupby(range(len(networks)), program)]
    if mode == "vmap" and len(groups) > 1:
        first, other = (
            {name: networks[group[0]].config[name] for name in used} for group in groups[:2]
        )
        fields = [field for field, _, _ in workdirs.differences(first, other)]
        raise ConfigError(
            "config.sweep",
            [field for field in fields if not field.endswith(".label")],
            verb="changes",
            why="which needs another program",
            allowed="seed and numbers of one optimizer; anything with config.sweep.mode='loop'",
        )
    return groups


def convolves(model: Config) -> bool:
    """Whether the network of `config.model` has convolutions; only shapes are computed."""
    init = models.build(num_classes=10, **model).init
    images = ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    try:
        variables = eval_shape(lambda: init(random.key(0), images))
    except Exception:  # `check_size` tells, for images of the right size
        return True
    return train.convolves(variables["params"])


# Where a run starts -------------------------------------------------------------------------------


def check_pretrained(config: Config) -> None:
    """Raises ConfigError if the weight file cannot be used."""
    path = config["pretrained"]
    for name in ("fresh_classifier", "pretrained_names", "pretrained_zeros"):
        if not path and config[name] != DEFAULTS[name]:
            raise ConfigError(
                f"config.{name}",
                config[name],
                why="which is for the weights of config.pretrained, but that is empty",
            )
    if path and config["start_from"]:
        also = f"and config.start_from {config['start_from']!r}"
        raise ConfigError("config.pretrained", path, why=also, allowed="one of them")
    if path:
        with within("config.pretrained"):
            pretrained.check(path)


def kinds_before(config: Config) -> dict[str, str]:
    """Kinds, by name, of the stages that are finished when a run begins: those of the run in
    `config.start_from` and of those before it.

    Raises ConfigError if that run cannot be used.
    """
    start, kinds = config["start_from"], {}
    if start:
        with tables.blaming("config.start_from", start):
            check_origin(Path(start), config)
    runs_before = [run for _, run in ancestry(start)] if start else []
    for run in [*reversed(runs_before), {**config, "pipeline": ()}]:
        if run.get("pretrained"):  # which stands for a training
            kinds["config.pretrained"] = Fit.kind
        kinds |= {name: run[name]["kind"] for name in run["pipeline"]}
    return kinds


def check_origin(path: Path, config: Config) -> None:
    """Raises ConfigError unless `path` holds a finished run of the same network."""
    if not holds_run(path):
        raise ConfigError("", why="which holds no run (no config.json)")
    other = {**DEFAULTS, **read_config(path)}
    there, here = (complete_model(run.get("model") or {}) for run in (other, config))
    differing = workdirs.told_differences(there, plain(here), "config.model")
    if differing:
        raise ConfigError("", why=f"a run of another network\n{differing}")
    folders = workdirs.member_folders(path)
    alone = path.name.startswith("member_")
    if other["sweep"] and not alone and plain(config["sweep"]) != other["sweep"]:
        sweep = f"with its sweep {json.dumps(other['sweep'])}"
        single = f", or one of its networks, e.g. {folders[0]}" if folders else ""
        raise ConfigError("", why="a run of several networks", allowed=f"{sweep}{single}")
    if not last_snapshots(path, other):
        raise ConfigError("", why="which is not finished: run it to its end first")


def last_snapshots(workdir: Path, config: Config) -> list[Snapshot]:
    """The last checkpoint of every separate member of a finished run; [] for a run that is not
    finished.
    """
    folders = workdirs.member_folders(workdir)
    configs = [read_config(folder) for folder in folders]
    if folders and sum(len(members.expand(own)) for own in configs) < len(members.expand(config)):
        return []
    snapshots = [workdirs.newest(folder) for folder in folders or [workdir]]
    finished = [found for found in snapshots if found is not None and found.is_finished]
    return finished if len(finished) == len(snapshots) else []


def ancestry(path: AnyPath) -> Iterator[tuple[Path, Fields]]:
    """(path, config) of the run in `path`, of the run it started from, and so on, as far as they
    are still there.
    """
    path, seen = Path(path), set()
    while (path / "config.json").is_file():
        if path.resolve() in seen:
            raise ConfigError(
                str(path), why="started from a run that started from it", allowed="another run"
            )
        seen.add(path.resolve())
        config = read_config(path)
        yield path, config
        if not config.get("start_from"):
            return
        path = of_member(config["start_from"], path.name)


def of_member(start: str, name: str) -> Path:
    """The folder `name` of one member in the run `start`; that run itself if it has none."""
    own = Path(start) / name
    return own if start and own.is_dir() else Path(start)


def check_arrays(path: AnyPath, shapes: PyTree, members: int | None) -> None:
    """Raises ConfigError if the parameters in the finished run in `path` do not have `shapes`, for
    each member.
    """
    snapshot = workdirs.newest(path)
    stored = checkpoint.shapes(snapshot) if snapshot else {}
    leading = () if members is None else (members,)
    for name, leaf in named_leaves(shapes).items():
        there, here = stored.get(f"params/{name}"), leading + leaf.shape
        if there != here:
            raise ConfigError(
                "config.start_from",
                str(path),
                why=f"whose params/{name} has the shape {there}",
                allowed=f"{here}, that of this run's network for its data",
            )


def continue_from(path: AnyPath, state: State) -> tuple[State, Rows]:
    """The network at the end of the finished run in `path`, under `state`'s own key, and that run's
    rows.

    They follow those of the runs it started from itself, except for stages that it made anew.
    """
    folders = [folder for folder, _ in ancestry(path)]
    snapshots = list(filter(None, map(workdirs.newest, folders)))
    rows: Rows = []
    for snapshot in reversed(snapshots):
        rows = behind(rows, snapshot.progress.rows)
    there = checkpoint.restore(snapshots[0], state)
    return there._replace(key=state.key), rows


def behind(before: Rows, rows: Rows) -> Rows:
    """`rows` behind those of another run, of which stages that `rows` made anew are left out."""
    stages_anew = {row["stage"] for row in rows}
    return [row for row in before if row["stage"] not in stages_anew] + rows


# The problem --------------------------------------------------------------------------------------


def use_platform(name: str) -> None:
    """Makes JAX compute on `config.platform`; raises ConfigError where it cannot."""
    if tables.convert(name, Platform, "config.platform") == "default":
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


def build(plans: list[Plan]) -> Problem:
    """Loads the data and builds the network; raises ConfigError for settings that do not fit
    them.
    """
    common, devices = plans[0].common, len(local_devices())
    if common["mesh"] > devices:
        raise ConfigError(
            "config.mesh", common["mesh"], allowed=f"0 (all) to {devices}, the local devices"
        )
    with within("config.data"):
        dataset = data.load(**common["data"])
    model = models.build(num_classes=dataset.num_classes, **common["model"])
    problem = train.build_problem(
        dataset,
        model,
        mesh=common["mesh"],
        members=plans[0].size,
        eval_batch_size=common["eval_batch_size"],
        sample=data.FixedSample(common["sample"], common["sample_seed"]),
        steps_per_call=common["steps_per_call"],
    )
    with within("config.model"):
        check_size(problem, common["model"]["name"])
    if common["pretrained"]:
        with enough_memory_for("config.pretrained", None, common):
            given = problem.place(pretrained_arrays(common, problem))
        keep = common["pretrained_zeros"] == "keep"
        problem = problem._replace(pretrained=given, keep_zeros=keep)
    for plan in plans:
        start = origin_of(plan, len(plans))
        if start:
            check_arrays(start, shapes_of(problem), plan.size)
    check_stages(plans, problem)
    return problem


def check_stages(plans: list[Plan], problem: Problem) -> None:
    """Raises ConfigError for stages that do not fit the network or the data."""
    pipeline, settings = plans[0].pipeline, plans[0].settings
    for name in stages_used(pipeline, [{name: own[0] for name, own in settings.items()}]):
        visits, checked = max(pipeline.count(name), 1), []
        for own in itertools.chain(*(plan.settings[name] for plan in plans)):
            if own in checked:  # members with the same settings are checked once
                continue
            with within(f"config.{name}"):
                own.check_network(problem, visits)
            checked.append(own)


def check_size(problem: Problem, name: str) -> None:
    """Raises ConfigError for a network that cannot be made for the run's images, or is larger than
    the memory.
    """
    height, width, channels = problem.dataset.test.images.shape[1:]
    images = ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    what = f"{name!r} for images of {height} x {width} x {channels}"
    with making_network(what):
        variables = eval_shape(problem.init, random.key(0))
        logits = eval_shape(problem.model.apply, variables, images)
    sizes = {path: leaf.size for path, leaf in named_leaves(variables).items()}
    sizes["its logits"] = logits.size
    empty = [path for path, size in sizes.items() if not size]
    if empty:
        too_large = "it is too large for them"
        raise ConfigError("", why=f"{what} has nothing in {empty[0]}: {too_large}")
    leaves = jax.tree.leaves(variables["params"])
    needed = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)  # with gradients
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = f"{name} cannot be made: {shortened(reason)}"
        raise ConfigError("", why=f"{why}; is it too large for its images?") from None


def pretrained_arrays(common: Config, problem: Problem) -> Fields:
    """The arrays of `config.pretrained` by path, without the classifier if that is to be fresh."""
    like = eval_shape(problem.init, random.key(0))
    state_dict = pretrained.read(common["pretrained"])
    with within("config.pretrained"):
        variables = pretrained.to_variables(
            state_dict,
            like,
            names=common["pretrained_names"],
            fresh=pretrained.CLASSIFIER if common["fresh_classifier"] else "",
            image_channels=problem.dataset.test.images.shape[-1],
        )
    fresh, leaves = named_leaves(like), named_leaves(variables)
    return {path: leaf for path, leaf in leaves.items() if leaf is not fresh[path]}


@contextmanager
def enough_memory(part: str, advice: str) -> Iterator[None]:
    """Memory that is full inside, of the host or of a device, as a ConfigError that ends with
    `advice`.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error) or "MemoryError").splitlines()[0]
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise ConfigError(f"{part}: the memory is full ({shortened(reason)}). {advice}") from error


def enough_memory_for(
    part: str, stage: Any, common: Config
) -> contextlib.AbstractContextManager[None]:
    """`enough_memory` for a part of a run that says what to lower. part: a `stage` in the config,
    or something else.
    """
    lower = [f"{part}.{field}" for field in LARGE if hasattr(stage, field)]
    lower += ["config.eval_batch_size", "the network of config.model"]
    loop = " or set config.sweep.mode to 'loop'" if common["sweep"] else ""
    advice = f"Lower {', '.join(lower)}{loop}, in another --workdir; with more memory the same "
    return enough_memory(part, f"{advice}command goes on from the last checkpoint.")


# Running ------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """state: at the end, with a leading axis if a sweep ran at once. rows: of all stages and
    members.
    """

    state: State
    rows: Rows


def run(
    config: Config, workdir: AnyPath, *, command: str = "", lock_seconds: float = lock.STALE_SECONDS
) -> Outcome:
    """Runs, or continues, the pipeline of `config` in `workdir`; writes rows, checkpoints and the
    report there.

    The same call continues an interrupted run and ends with the same numbers (bit for bit on CPU);
    a finished run only rewrites its report, and needs neither data nor the run it started from.
    command: what was typed, for the report.
    lock_seconds: how long a run of another host that holds `workdir` may be silent. Raises
    ConfigError before anything compiles, LockedError where another run is at work, DamagedError
    where no checkpoint is whole, and train.NonFiniteLossError; if members of a sweep run one after
    the other, once all have run.
    """
    config, workdir = plain(config), Path(workdir)
    workdirs.check_path(workdir)
    if holds_run(workdir) and read_config(workdir) == config:
        snapshots = last_snapshots(workdir, config)
        if snapshots:
            return redraw(config, workdir, snapshots)
    use_platform(config.get("platform", "default"))
    plans = check(config)
    workdirs.refuse_other(workdir, config)
    lock.refuse(workdir, lock_seconds)
    with enough_memory_for("config.data", None, plans[0].common):
        problem = build(plans)
    with lock.held(workdir, lock_seconds) as still_mine:
        workdirs.claim(workdir, config)
        tell_environment(problem, workdir, command)
        diverged: list[str] = []
        if len(plans) == 1:
            outcome = run_plan(plans[0], problem, workdir, config, still_mine)
        else:
            outcome, diverged = run_separately(plans, problem, workdir, config, still_mine)
        write_report(workdir, config, outcome.rows)
    if diverged:
        raise NonFiniteLossError("\n".join(diverged))
    return outcome


def write_report(workdir: Path, config: Config, rows: Rows) -> None:
    title, environment = config.get("title") or None, report.read_environment(workdir)
    path = report.write(workdir, dict(config), rows, title=title, environment=environment)
    say(f"report: {path}")


def redraw(config: Config, workdir: Path, snapshots: list[Snapshot]) -> Outcome:
    """Writes rows and report of a finished run again; versions stay those it was made with."""
    rows = []
    for snapshot in snapshots:
        own, folder = snapshot.progress.rows, snapshot.folder.parent.parent
        if folder != workdir:
            Writer(folder, own).close()
            own = renumbered(own, int(folder.name.removeprefix("member_")))
        rows += own
    Writer(workdir, rows).close()
    write_report(workdir, config, rows)
    with checkpoint.reading(snapshots[-1]):
        parts = checkpoint.tree(snapshots[-1])
        state = State(**{**parts, "metrics": train.Metrics(**parts["metrics"])})
    return Outcome(state, rows)


def run_separately(
    plans: list[Plan],
    problem: Problem,
    workdir: Path,
    config: Config,
    still_mine: Callable[[], None],
) -> tuple[Outcome, list[str]]:
    """The plans one after the other, in folders of their own: (outcome, a line for each that
    diverged).

    The outcome's state is that of the last plan that did not.
    """
    rows: Rows = []
    diverged: list[str] = []
    state: Any = None
    number = plans[-1].numbers[-1] + 1
    for plan in plans:
        stopping.check()
        first = plan.numbers[0]
        place = workdir / f"member_{first:03d}"
        plan = plan._replace(common={**plan.common, "start_from": origin_of(plan, len(plans))})
        own_config = config_of(plan, config)
        workdirs.claim(place, own_config)
        swept = [
            ", ".join(f"{name}={value}" for name, value in member.swept.items())
            for member in plan.members
        ]
        say(f"{plan.name} ({first + 1} of {number}): {'; '.join(swept)}")
        own_problem = problem.with_members(plan.size)
        try:
            state, own = run_plan(plan, own_problem, place, own_config, still_mine)
        except NonFiniteLossError as error:
            diverged.append(f"{plan.name}: {error}")
            own = report.read_rows(place / report.METRICS)
        rows += renumbered(own, first)
        Writer(workdir, rows).close()
    return Outcome(state, rows), diverged


def renumbered(rows: Rows, first: int) -> Rows:
    """Rows of members that ran by themselves, numbered as those of the whole run from `first`
    on.
    """
    return [{**row, "member": first + row["member"]} for row in rows]


def origin_of(plan: Plan, num_plans: int) -> str:
    """The folder that a plan starts from, or "": of several plans that of the same member, if the
    run before has such.
    """
    start = plan.common["start_from"]
    if start and num_plans > 1:
        return str(of_member(start, f"member_{plan.numbers[0]:03d}"))
    return start


def config_of(plan: Plan, config: Config) -> Fields:
    """The config of one separate plan; of a single member it makes the same network alone, in
    whatever folder.
    """
    start = dict(start_from=plan.common["start_from"])
    if plan.size:
        return {**config, **start, "sweep": {**config["sweep"], "members": plan.numbers}}
    ((own, swept),) = plan.members
    own = {**own, **start}
    for name in stages_of(own):
        if "arm" in swept and STAGES[own[name]["kind"]].trains:
            own[name] = {**own[name], "label": swept["arm"]}
    return own


class Run(NamedTuple):
    """A plan being run. rows: all so far, of this run only. origin: rows of the run it started
    from.
    """

    plan: Plan
    problem: Problem
    saved: checkpoint.Checkpoints
    writer: Writer
    rows: Rows
    origin: Rows

    def per_member(self, rows: Rows) -> MemberRows:
        every = range(self.problem.members or 1)
        return [[row for row in rows if row["member"] == i] for i in every]

    def place(self, position: int) -> tuple[Place, MemberRows]:
        """(where the stage at `position` stands, its own rows so far)."""
        pipeline = self.plan.pipeline
        name = pipeline[position]
        visit, visits = pipeline[: position + 1].count(name), pipeline.count(name)
        mine = lambda row: (row["stage"], row["visit"]) == (name, visit)
        own = [row for row in self.rows if mine(row)]
        before = [row for row in self.rows if not mine(row)]
        earlier = self.per_member(behind(self.origin, before))
        place = Place(name, position, self.plan.settings, earlier, visit, visits)
        return place, self.per_member(own)

    def reached(self, state: State, position: int, done: float) -> tuple[State, Progress]:
        """What a checkpoint says once the stage at `position` is done by this share."""
        rows = list(self.rows)
        if done < 1:
            return state, Progress(position, True, rows)
        return self.plan.after(state, position), Progress(position + 1, False, rows)


def run_plan(
    plan: Plan, problem: Problem, workdir: Path, config: Config, still_mine: Callable[[], None]
) -> Outcome:
    """Runs the stages of one plan, from its newest whole checkpoint if there is one.

    config: of the plan, as plain data. still_mine: raises OSError if the workdir belongs to another
        run by now.
    """
    found = workdirs.newest(workdir)
    progress = found.progress if found else Progress(0, False, [])
    with contextlib.ExitStack() as stack:
        saved = checkpoint.Checkpoints(workdir, config, found, still_mine)
        stack.callback(saved.close)
        with enough_memory_for("config.model", None, plan.common):
            state = initial_state(plan, problem)
        origin: Rows = []
        if plan.common["start_from"]:
            state, origin = continue_from(plan.common["start_from"], state)
        stages.check_weights(problem, state, "at the start of the run")
        writer = stack.enter_context(Writer(workdir, progress.rows))
        run = Run(plan, problem, saved, writer, progress.rows, origin)
        if found:
            stage_number = min(progress.stage + 1, len(plan.pipeline))
            say(f"continuing {workdir} in stage {stage_number} of {len(plan.pipeline)}")
            state = restored(run, state, found)
        begun = progress.begun
        for position in range(progress.stage, len(plan.pipeline)):
            state = run_stage(run, state, position, begun)
            begun = False
    return Outcome(state, progress.rows)


def initial_state(plan: Plan, problem: Problem) -> State:
    """The networks at the start, one per member; members of the same seed start alike."""
    keys = [train.key_of(member.config["seed"]) for member in plan.members]
    key = keys[0] if problem.members is None else jnp.stack(keys)
    return train.initial_state(problem, problem.place(key))


def restored(run: Run, state: State, snapshot: Snapshot) -> State:
    """The state in a checkpoint; `state`: at the start of the run, which tells its structure."""
    progress, plan = snapshot.progress, run.plan
    if progress.begun:
        name = plan.pipeline[progress.stage]
        own = plan.settings[name]
        place, _ = run.place(progress.stage)
        with enough_memory_for(f"config.{name}", own[0], plan.common):
            state = own[0].begin(run.problem, state, own, place)
    if state.opt_state == ():
        with checkpoint.reading(snapshot):
            stored = checkpoint.structs(snapshot, state.step.sharding)["opt_state"]
            state = state._replace(opt_state=interface.carried(stored))
    return checkpoint.restore(snapshot, state)


def run_stage(run: Run, state: State, position: int, begun: bool) -> State:
    """The state that the stage at `position` hands on. begun: whether `state` is its own."""
    plan, problem, (place, rows) = run.plan, run.problem, run.place(position)
    where, own = f"config.{place.name}", plan.settings[place.name]
    with enough_memory_for(where, own[0], plan.common), within(where):
        if not begun:
            state = own[0].begin(problem, state, own, place)
            run.saved.save(*run.reached(state, position, 0.0))
        state = run_updates(run, state, place, rows)
        stages.check_weights(problem, state, f"{place.name}, at its end")
        state, progress = run.reached(state, position, 1.0)
        run.saved.save(state, progress)
    return state


def run_updates(run: Run, state: State, place: Place, own_rows: MemberRows) -> State:
    """What a stage does: its rows go out as they come, its state is saved every
    `checkpoint_seconds`.
    """
    plan, name, position = run.plan, place.name, place.position
    own, config = plan.settings[name], plan.members[0].config
    common = dict(stage=name, kind=config[name]["kind"], visit=place.visit)
    common["arm"] = arm_of(config, position)
    last, spe = time.monotonic(), own[0].steps_per_epoch(run.problem)
    # what an interruption saves, replaced as one: it may come between any two instructions
    good = run.reached(state, position, 0.0)
    display = Display(f"{position + 1}/{len(plan.pipeline)} {name}")
    updates = own[0].run(run.problem, state, own, place, own_rows)
    with display, contextlib.closing(updates):
        try:
            for update in updates:
                new = rows_of(update, plan, common)
                run.rows.extend(new)
                if update.state is not None:
                    state = update.state
                    good = run.reached(state, position, update.done)
                run.writer.append(new)
                display.show(update.done, new)
                stopping.check()
                due = time.monotonic() - last >= plan.common["checkpoint_seconds"]
                if due and update.state is not None and update.done < 1:
                    train.check_finite(state, spe, name)
                    run.saved.save(*good)
                    last = time.monotonic()
        except KeyboardInterrupt:
            arrays = [leaf for leaf in jax.tree.leaves(good[0]) if isinstance(leaf, jax.Array)]
            if not any(array.is_deleted() for array in arrays):
                train.check_finite(good[0], spe, name)
                run.saved.save(*good)
            raise
    return state


def rows_of(update: train.Update, plan: Plan, common: Row) -> Rows:
    """The rows of an update, which say where they come from."""
    rows = []
    for i, (member, own) in enumerate(zip(plan.members, update.rows, strict=True)):
        rows += [{**common, "member": i, **member.swept, **row} for row in own]
    return rows


def arm_of(config: Config, position: int) -> str:
    """Label of the network a stage belongs to: of the latest `train` stage up to it, or the next
    one.

    A stage that makes another network without training it gives that the label of the next
    training, or else its own name. `network` before anything is made, if this run trains none.
    """
    names = config["pipeline"]
    kinds = [STAGES.get(config[name]["kind"], Stage) for name in names]
    trains = [i for i, kind in enumerate(kinds) if kind.trains]
    makes = [i for i, kind in enumerate(kinds) if kind.trains or kind.makes_network]
    latest = max((i for i in makes if i <= position), default=-1)
    later = [i for i in trains if i > latest]
    named = latest if latest in trains or not later else later[0]
    return (config[names[named]].get("label") or names[named]) if named >= 0 else "network"


# What is told -------------------------------------------------------------------------------------


def chance(dataset: data.Dataset) -> float:
    """Test accuracy of always answering the most frequent class; of a stream, one over the number
    of classes.
    """
    labels = dataset.test.labels
    if labels is None:
        return 1 / dataset.num_classes
    return round(float(np.bincount(labels).max() / labels.size), 4)


def tell_environment(problem: Problem, workdir: Path, command: str) -> None:
    """Writes environment.json, and says how images are read and what pretrained weights become."""
    environment = describe_environment(problem) | ({"command": command} if command else {})
    report.write_environment(workdir, report.continued(workdir, environment))
    if problem.streamed and problem.dataset.train.images.reading:
        say(f"images are read by {problem.dataset.train.images.reading}")
    if "pretrained" in environment:
        say(f"config.pretrained: {environment['pretrained']}")


def describe_environment(problem: Problem) -> Fields:
    """Versions and hardware, and the accuracy by chance, for the report."""
    device, count = local_devices()[0], len(local_devices())
    environment = {
        "device": f"{device.device_kind} ({device.platform}, {count} local)",
        "python": host.python_version(),
        "parameters": f"{trees.size(shapes_of(problem)):,}",
        "chance": chance(problem.dataset),
    }
    if problem.streamed:
        workers = problem.dataset.train.images.options.workers
        environment["reading"] = f"{workers} processes" if workers > 0 else "threads"
    environment["sparsity_jax"] = sparsity_jax.__version__
    for name in ("jax", "jaxlib", "flax", "optax", "numpy"):
        environment[name] = importlib.metadata.version(name)
    if problem.pretrained:
        zeros, size = pretrained.count_zeros(problem.pretrained)
        after = "masked, they stay zero"
        if not problem.keep_zeros:
            after = "training moves them (config.pretrained_zeros)"
        told = f"{zeros:,} of {size:,} weights are zero"
        environment["pretrained"] = f"{told}; {after}" if zeros else told
    return environment


# numbers of a row that its line of progress shows
SHOWN = ("epoch", "iteration", "ratio", "train_loss", "test_accuracy", "accuracy", "loss_after")
BAR = "{desc:<24} {percentage:3.0f}% |{bar:30}| {elapsed}<{remaining} {postfix}"


class Display:
    """Progress of a stage: a bar where stderr is a terminal, otherwise a line for new rows, at most
    every five seconds, and one a minute where there are none."""

    def __init__(self, name: str):
        self._name, self._started = name, time.monotonic()
        self._said = self._started - 5
        # without a terminal there is no bar
        self._bar = tqdm.tqdm(total=1.0, desc=name, bar_format=BAR, disable=None)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._bar.close()
        if self._bar.disable and kind is None:
            say(f"{self._name}: done in {time.monotonic() - self._started:.1f} s")

    def show(self, done: float, rows: Rows) -> None:
        """done: share in [0, 1]; of the rows the newest one's numbers are shown."""
        newest = rows[-1] if rows else {}
        text = " ".join(f"{name}={newest[name]:.4g}" for name in SHOWN if name in newest)
        if text:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(min(done, 1.0) - self._bar.n)
        silent = time.monotonic() - self._said
        if self._bar.disable and silent > (5 if text else 60):
            self._said = time.monotonic()
            say(f"{self._name}: {done:.0%} {text}".rstrip())
