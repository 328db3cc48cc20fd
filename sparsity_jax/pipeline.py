"""A run: its config checked as a whole, then its stages in order, saved on the way and resumed
where it stopped.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import pathlib
import platform as host
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

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

PyTree = Any
say = workdirs.say
Platform = Literal["default", "cpu", "gpu", "tpu"]
STAGES = {
    one.kind: one for one in (*stages.STAGES, *geometry.STAGES, *structured.STAGES, *greg.STAGES)
}
LARGE = (
    "batch_size",
    "num_examples",
    "imp_samples",
    "num_matvecs",
)  # fields that decide how much a stage holds


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

    data: see `data.load`. model: see `models.build`. pipeline: names of stage configs, in order.
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


def base(**fields: Any) -> ml_collections.ConfigDict:
    """A config with all common fields, so that every one can be overridden on the command line."""
    fields["data"] = {**tables.defaults(data.load), **fields.get("data", {})}
    fields["model"] = complete_model(fields.get("model", {}))
    return ml_collections.ConfigDict({**tables.defaults(settings), **fields})


def stage(kind: str, **fields: Any) -> dict[str, Any]:
    """A stage config with all its fields; see `STAGES` for kinds."""
    row = tables.lookup(STAGES, kind, "kind")
    return {"kind": kind, **tables.defaults(row), **fields}


class Plan(NamedTuple):
    """Members that run side by side. numbers: of the members, consecutive. common: the checked
    fields beside the stages. settings: by stage name, one per member.
    """

    numbers: list[int]
    members: list[members.Member]
    common: dict[str, Any]
    settings: dict[str, list[Any]]

    @property
    def pipeline(self) -> tuple[str, ...]:
        """Names of its stages, in order."""
        return self.common["pipeline"]

    @property
    def size(self) -> int | None:
        """Size of the leading axis of its states; None: no such axis."""
        return len(self.members) if len(self.members) > 1 else None


def plain(config: Mapping) -> dict:
    """A config as nested plain dicts with JSON's types (tuples become lists)."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError) as error:
        with tables.within("config"):
            refuse_foreign(config)
        raise tables.ConfigError("config", why=f"is no plain data: {error}") from None


def refuse_foreign(value: Any) -> None:
    """Raises ConfigError for the first value in a config that JSON cannot hold."""
    if isinstance(value, Mapping):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"[{i}]", item) for i, item in enumerate(value)]
    else:
        with tables.blaming("", value):
            json_of(value)
        return
    for path, item in items:
        with tables.within(path):
            refuse_foreign(item)


def json_of(value: Any) -> str:
    """`value` as JSON; raises ValueError."""
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ValueError(f"no plain data: {error}") from None


def check(config: Mapping) -> list[Plan]:
    """Checks a whole config without compiling anything: the plans, one after the other, of members
    that run side by side.

    Raises ConfigError for the first mistake, saying what was given, what is allowed and the closest
    match.
    """
    config = {**tables.defaults(settings), **plain(config)}
    common = check_common(config)
    found = members.expand(config)
    checked = [check_member(member.config) for member in found]
    done = {**check_pretrained(common), **check_origin(common)}
    for own in checked:
        check_order(common["pipeline"], config, own, done)
    with tables.within("config.data"):
        data.check(**dict(common["data"]))
    again = {own[name].retrain for own in checked for name in common["pipeline"]}
    used = sorted({*common["pipeline"], *again} - {""})
    if common["data"].get("stream"):
        check_streamed(common, checked, used)
    plans = []
    for numbers in side_by_side(common, found, checked, used):
        own = [checked[i] for i in numbers]
        stages_of_members = {name: [stages[name] for stages in own] for name in own[0]}
        plans.append(Plan(numbers, [found[i] for i in numbers], common, stages_of_members))
    return plans


def check_common(config: dict) -> dict[str, Any]:
    """The checked fields of a config beside its stages; raises ConfigError for other fields."""
    known = tables.parameters(settings)
    common = {name: value for name, value in config.items() if name in known}
    with tables.within("config"):
        common |= tables.check_options(settings, common)
    names = members.stages_of(config)
    check_names(common["pipeline"], names)
    for name in config:
        if name not in (*known, *names):
            raise tables.ConfigError("config", name, verb="has no field", known=[*known, *names])
    return common


def check_streamed(common: Mapping, checked: Sequence[dict], used: Sequence[str]) -> None:
    """Raises ConfigError for stages that need in memory what stays where it is."""
    if members.mode_of(common) == "vmap" and len(checked) > 1:
        raise tables.ConfigError(
            "config.sweep.mode",
            "vmap",
            why="but one member at a time reads what config.data.stream leaves where it is",
            allowed="'loop'",
        )
    for own in checked:
        for name in used:
            with tables.within(f"config.{name}"):
                own[name].check_streamed()


def side_by_side(
    common: Mapping, found: Sequence[members.Member], checked: Sequence[dict], used: Sequence[str]
) -> list[list[int]]:
    """Numbers of the members that run at once, in one program each.

    used: names of the stages that run. Raises ConfigError if all shall, but cannot.
    """
    mode, numbers = members.mode_of(common), range(len(found))
    if mode == "loop" or len(found) == 1:
        return [[i] for i in numbers]
    if mode == "auto" and (common["data"].get("stream") or convolves(common["model"])):
        return [[i] for i in numbers]
    program = lambda i: [checked[i][name].together() for name in used]
    groups = [list(group) for _, group in itertools.groupby(numbers, program)]
    if mode == "vmap" and len(groups) > 1:
        refuse_programs(found[0].config, found[groups[1][0]].config, used)
    return groups


def refuse_programs(first: Mapping, other: Mapping, used: Sequence[str]) -> None:
    """Raises ConfigError for two members that need programs of their own."""
    differing = workdirs.differences(
        {name: first[name] for name in used}, {name: other[name] for name in used}
    )
    raise tables.ConfigError(
        "config.sweep",
        [field for field, _, _ in differing if not field.endswith(".label")],
        verb="changes",
        why="which needs another program",
        allowed="seed and numbers of one optimizer; anything with config.sweep.mode='loop'",
    )


def check_names(pipeline: Sequence[str], stage_names: Sequence[str]) -> None:
    """Raises ConfigError for a pipeline that is empty or names a stage that the config has not."""
    if not pipeline:
        raise tables.ConfigError("config.pipeline", (), allowed="at least one name of a stage")
    for name in pipeline:
        if name not in stage_names:
            raise tables.ConfigError("config.pipeline", name, verb="names", known=stage_names)


def convolves(model: Mapping) -> bool:
    """Whether the network of `config.model` has convolutions; only shapes are computed."""
    init, images = (
        models.build(num_classes=10, **model).init,
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    try:
        variables = jax.eval_shape(lambda: init(jax.random.key(0), images))
    except Exception:  # `check_size` tells, for images of the right size
        return True
    return train.convolves(variables["params"])


def check_member(config: dict) -> dict[str, Any]:
    """The checked settings of all stages of one member, by name; checks data and model options
    too.
    """
    with tables.within("config.model"):
        check_model(config["model"])
    with tables.within("config.data"):
        tables.check_options(data.load, config["data"])
    found = {}
    for name, value in config.items():
        if name not in tables.parameters(settings):
            with tables.within(f"config.{name}"):
                found[name] = read_stage(value)
    return found


def read_stage(config: Mapping[str, Any]) -> interface.Stage:
    """The checked settings of one stage's config."""
    fields = dict(config)
    kind = tables.lookup(STAGES, fields.pop("kind"), "kind")
    return kind(**tables.check_options(kind, fields)).settings()


def check_model(model: Mapping[str, Any]) -> None:
    """Raises ConfigError for a network that cannot be built of `model`; nothing is computed."""
    options = dict(model)
    name = options.pop("name", "")
    factory = tables.lookup(models.MODELS, name, "name")
    shared = {
        field: options.pop(field) for field in ("init", "dtype", "param_dtype") if field in options
    }
    tables.check_options(factory, options, also=("init", "dtype", "param_dtype"))
    models.build(name=name, num_classes=10, **shared, **options)
    for field, value in shared.items():
        if value == "float64" and not jax.config.jax_enable_x64:
            raise tables.ConfigError(
                field,
                value,
                allowed="'float32', 'bfloat16', 'float16', and with JAX_ENABLE_X64=1 in the "
                "environment also 'float64'",
            )


def check_origin(config: dict) -> dict[str, str]:
    """Kinds of the stages that the run in `config.start_from`, and those before it, have finished,
    by name.

    Raises ConfigError if it cannot be used.
    """
    if not config["start_from"]:
        return {}
    path = pathlib.Path(config["start_from"])
    refused = functools.partial(tables.ConfigError, "config.start_from", config["start_from"])
    if not workdirs.holds_run(path):
        raise refused(why="which holds no run (no config.json)")
    other = workdirs.read_config(path)
    differing = workdirs.differences(
        *map(complete_model, (other.get("model") or {}, plain(config["model"])))
    )
    if differing:
        lines = "\n".join(
            f"  config.model.{name}: {old} there, {new} now" for name, old, new in differing
        )
        raise refused(why=f"a run of another network\n{lines}")
    other, folders = {**tables.defaults(settings), **other}, sorted(path.glob("member_*"))
    several = other["sweep"] and not path.name.startswith("member_")
    if several and plain(config["sweep"]) != other["sweep"]:
        one = f", or one of its networks, e.g. {folders[0]}" if folders else ""
        sweep = f"with its sweep {json.dumps(other['sweep'])}"
        raise refused(why="a run of several networks", allowed=f"{sweep}{one}")
    missing = folders and number_of_members(folders) < len(members.expand(other))
    if missing or not all(map(workdirs.is_finished, folders or [path])):
        raise refused(why="which is not finished: run it to its end first")
    kinds: dict[str, str] = {}
    for _, found in reversed(list(ancestry(path))):
        kinds |= trained_before(found) | {name: found[name]["kind"] for name in found["pipeline"]}
    return kinds


def number_of_members(folders: Sequence[pathlib.Path]) -> int:
    """How many members run in these folders of their own."""
    configs = [workdirs.read_config(folder) for folder in folders]
    return sum(len(members.expand(config)) for config in configs)


def complete_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` with the defaults of the options that it lacks: a config's, or those of an
    older version's run.
    """
    known = models.MODELS.get(model.get("name"))
    return {**tables.defaults(models.build), **(tables.defaults(known) if known else {}), **model}


def trained_before(config: Mapping) -> dict[str, str]:
    """What a pretrained network stands for, by the name of its field: a finished stage of kind
    `train`.
    """
    return {"config.pretrained": "train"} if config.get("pretrained") else {}


def check_pretrained(config: dict) -> dict[str, str]:
    """`trained_before`; raises ConfigError if the weight file cannot be used."""
    for name in ("fresh_classifier", "pretrained_names", "pretrained_zeros"):
        if not config["pretrained"] and config[name] != tables.defaults(settings)[name]:
            raise tables.ConfigError(
                f"config.{name}",
                config[name],
                why="which is for the weights of config.pretrained, but that is empty",
            )
    if config["pretrained"] and config["start_from"]:
        raise tables.ConfigError(
            "config.pretrained",
            config["pretrained"],
            why=f"and config.start_from {config['start_from']!r}",
            allowed="one of them",
        )
    if config["pretrained"]:
        with tables.within("config.pretrained"):
            pretrained.check(config["pretrained"])
    return trained_before(config)


def ancestry(path: str | pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
    """(path, config) of the run in `path`, of the run it started from, and so on, as far as they
    are still there.
    """
    path, seen = pathlib.Path(path), set()
    while (path / "config.json").is_file():
        if path.resolve() in seen:
            raise tables.ConfigError(
                str(path),
                why="started from a run that started from it",
                allowed="another run",
            )
        seen.add(path.resolve())
        config = workdirs.read_config(path)
        yield path, config
        if not config.get("start_from"):
            break
        before = pathlib.Path(config["start_from"])
        path = (
            before / path.name if (before / path.name).is_dir() else before
        )  # of separate members the same one


def check_order(
    pipeline: tuple[str, ...],
    config: Mapping,
    checked: dict[str, Any],
    done: Mapping[str, str] = {},
) -> None:
    """Raises ConfigError for a stage that needs another's result first.

    done: kinds of the stages that another run has finished, by name.
    """
    done = dict(done)
    for name in pipeline:
        kind = config[name]["kind"]
        needs = STAGES[kind].needs
        if needs and not set(done.values()) & set(needs):
            sources = " or ".join(map(repr, needs))
            if "train" in needs:
                sources += ", config.start_from or config.pretrained"
            raise tables.ConfigError(
                "config.pipeline",
                name,
                verb="runs",
                why=f"of kind {kind!r}, before what it needs the result of",
                allowed=f"after a stage of kind {sources}",
            )
        before = [checked[earlier] for earlier in pipeline[: pipeline.index(name)]]
        order = interface.Order(before, done, checked, pipeline.count(name))
        with tables.within(f"config.{name}"):
            checked[name].check_order(order)
        done[name] = kind
        if checked[name].retrain:
            with tables.within(f"config.{name}.retrain"):
                check_retrain(checked[name].retrain, config, checked)


def check_retrain(name: str, config: Mapping, checked: Mapping[str, Any]) -> None:
    """Raises ConfigError for a `retrain` that is no training of the current network."""
    trains = [n for n in members.stages_of(config) if config[n]["kind"] == "train"]
    if name not in trains:
        raise tables.ConfigError("", name, why="no stage of kind 'train'", known=trains)
    if checked[name].start != "current":
        raise tables.ConfigError(
            "", name, why="whose start is 'init'", allowed="one whose start is 'current'"
        )


# Running ------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """state: at the end, with a leading axis if a sweep ran at once. rows: of all stages and
    members.
    """

    state: train.State
    rows: list[dict]


def run(
    config: Mapping,
    workdir: str | pathlib.Path,
    *,
    command: str = "",
    lock_seconds: float = lock.STALE_SECONDS,
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
    config, workdir = plain(config), pathlib.Path(workdir)
    workdirs.check_path(workdir)
    if workdirs.holds_run(workdir) and workdirs.read_config(workdir) == config:
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
        environment = describe_environment(problem) | ({"command": command} if command else {})
        environment = report.continued(workdir, environment)
        report.write_environment(workdir, environment)
        if problem.streamed and problem.dataset.train.images.reading:
            say(f"images are read by {problem.dataset.train.images.reading}")
        if "pretrained" in environment:
            say(f"config.pretrained: {environment['pretrained']}")
        if len(plans) == 1:
            outcome, diverged = run_plan(plans[0], problem, workdir, config, still_mine), []
        else:
            outcome, diverged = run_separately(plans, problem, workdir, config, still_mine)
        title = plans[0].common["title"] or None
        path = report.write(workdir, config, outcome.rows, title=title, environment=environment)
    say(f"report: {path}")
    if diverged:
        raise train.NonFiniteLossError("\n".join(diverged))
    return outcome


def last_snapshots(workdir: pathlib.Path, config: dict) -> list[workdirs.Snapshot]:
    """The last checkpoint of every separate member of a finished run; [] for a run that is not
    finished.
    """
    folders = sorted(workdir.glob("member_[0-9]*"))
    if folders and number_of_members(folders) < len(members.expand(config)):
        return []
    found = [workdirs.newest(folder) for folder in folders or [workdir]]
    ended = [
        snapshot is not None and snapshot.progress.stage == len(config["pipeline"])
        for snapshot in found
    ]
    return found if all(ended) else []


def redraw(config: dict, workdir: pathlib.Path, snapshots: list[workdirs.Snapshot]) -> Outcome:
    """Writes rows and report of a finished run again; versions stay those it was made with."""
    rows = []
    for snapshot in snapshots:
        own = snapshot.progress.rows
        folder = snapshot.folder.parent.parent
        if folder != workdir:
            report.Writer(folder, own).close()
            own = renumbered(own, int(folder.name.removeprefix("member_")))
        rows += own
    report.Writer(workdir, rows).close()
    title = config.get("title") or None
    path = report.write(
        workdir, config, rows, title=title, environment=report.read_environment(workdir)
    )
    say(f"report: {path}")
    with checkpoint.reading(snapshots[-1]):
        tree = checkpoint.tree(snapshots[-1])
        state = train.State(**{**tree, "metrics": train.Metrics(**tree["metrics"])})
    return Outcome(state, rows)


def use_platform(name: str) -> None:
    """Makes JAX compute on `config.platform`; raises ConfigError where it cannot."""
    if tables.convert(name, Platform, "config.platform") == "default":
        return
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    try:
        found = jax.local_devices()[0].platform
    except (RuntimeError, AssertionError):  # which of them depends on the version of jax
        raise tables.ConfigError(
            "config.platform", name, why="but jax finds no such device here"
        ) from None
    if found != name:
        raise tables.ConfigError(
            "config.platform", name, why=f"but this process already uses jax on {found!r}"
        )


def run_separately(
    plans: list[Plan],
    problem: train.Problem,
    workdir: pathlib.Path,
    config: dict,
    still_mine: Callable[[], None],
) -> tuple[Outcome, list[str]]:
    """The plans one after the other, in folders of their own: (outcome, a line for each that
    diverged).

    The outcome's state is that of the last plan that did not.
    """
    rows, state, diverged = [], None, []
    compiled: dict[int | None, dict] = {problem.members: problem.compiled}
    for plan in plans:
        first = plan.numbers[0]
        place = workdir / f"member_{first:03d}"
        stopping.check()
        plan = plan._replace(common=member_origin(plan.common, first))
        own_config = config_of(plan, config)
        workdirs.claim(place, own_config)
        say(f"{names_of(plan)} ({first + 1} of {plans[-1].numbers[-1] + 1}): {told(plan)}")
        own_problem = problem._replace(
            members=plan.size, compiled=compiled.setdefault(plan.size, {})
        )
        try:
            state, own = run_plan(plan, own_problem, place, own_config, still_mine)
        except train.NonFiniteLossError as error:
            diverged.append(f"{names_of(plan)}: {error}")
            own = report.read_rows(place / report.METRICS)
        rows += renumbered(own, first)
        report.Writer(workdir, rows).close()
    return Outcome(state, rows), diverged


def renumbered(rows: list[dict], first: int) -> list[dict]:
    """Rows of members that ran by themselves, numbered as those of the whole run from `first`
    on.
    """
    return [{**row, "member": first + row["member"]} for row in rows]


def names_of(plan: Plan) -> str:
    """`member 3`, or `members 3 to 5`."""
    first, last = plan.numbers[0], plan.numbers[-1]
    return f"member {first}" if first == last else f"members {first} to {last}"


def told(plan: Plan) -> str:
    """The swept values of a plan's members, in words."""
    shown = lambda swept: ", ".join(f"{name}={value}" for name, value in swept.items())
    return "; ".join(shown(member.swept) for member in plan.members)


def member_origin(common: dict[str, Any], member: int) -> dict[str, Any]:
    """The common fields of one separate member: it starts from the same member of a run that has
    such.
    """
    own = pathlib.Path(common["start_from"]) / f"member_{member:03d}"
    return {**common, "start_from": str(own)} if common["start_from"] and own.is_dir() else common


def config_of(plan: Plan, config: dict) -> dict:
    """The config of one separate plan; of a single member it makes the same network alone, in
    whatever folder.
    """
    own = dict(config, start_from=plan.common["start_from"])
    if plan.size:
        return {**own, "sweep": {**config["sweep"], "members": plan.numbers}}
    ((single, swept),) = plan.members
    label = swept.get("arm")
    for name, value in single.items():
        if label and isinstance(value, Mapping) and value.get("kind") == "train":
            single = {**single, name: {**value, "label": label}}
    return {**single, "start_from": plan.common["start_from"]}


def build(plans: list[Plan]) -> train.Problem:
    """Loads the data and builds the network; raises ConfigError for settings that do not fit
    them.
    """
    common = plans[0].common
    available = len(jax.local_devices())
    if common["mesh"] > available:
        raise tables.ConfigError(
            "config.mesh", common["mesh"], allowed=f"0 (all) to {available}, the local devices"
        )
    with tables.within("config.data"):
        dataset = data.load(**tables.check_options(data.load, common["data"]))
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
    check_size(problem, common["model"])
    shapes = train.shapes_of(problem)
    if common["pretrained"]:
        with enough_memory_for("config.pretrained", None, common):
            arrays = problem.place(pretrained_arrays(common, problem))
        problem = problem._replace(
            pretrained=arrays, keep_zeros=common["pretrained_zeros"] == "keep"
        )
    for plan in plans:
        if plan.common["start_from"]:
            separate = len(plans) > 1
            own = member_origin(plan.common, plan.numbers[0]) if separate else plan.common
            check_arrays(own["start_from"], shapes, plan.size)
    for name in runs(plans[0]):
        visits, checked = max(plans[0].pipeline.count(name), 1), []
        for own in (own for plan in plans for own in plan.settings[name]):
            if own not in checked:  # members with the same settings are checked once
                with tables.within(f"config.{name}"):
                    own.check_network(problem, visits)
                checked.append(own)
    return problem


def check_size(problem: train.Problem, model: Mapping[str, Any]) -> None:
    """Raises ConfigError for a network that cannot be made for the run's images, or is larger than
    the memory.
    """
    height, width, channels = problem.dataset.test.images.shape[1:]
    images = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    given = f"for images of {height} x {width} x {channels}"
    with tables.within("config.model"), making_network(f"{model['name']!r} {given}"):
        variables = jax.eval_shape(problem.init, jax.random.key(0))
        logits = jax.eval_shape(problem.model.apply, variables, images)
    empty = [path for path, leaf in trees.named_leaves(variables).items() if not leaf.size]
    if empty or not logits.size:
        raise tables.ConfigError(
            "config.model",
            why=f"{model['name']!r} {given} has nothing in {empty[0] if empty else 'its logits'}: "
            "it is too large for them",
        )
    leaves = jax.tree.leaves(variables["params"])
    needed = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)  # with gradients
    size = f"{trees.size(variables['params']):,} weights"
    with tables.within("config.model"):
        train.check_memory(
            needed, f"{model['name']!r} {given} has {size}, which with their gradients"
        )


@contextlib.contextmanager
def making_network(name: str) -> Iterator[None]:
    """What goes wrong while a network is traced inside, in whatever type, as a ConfigError about
    the network `name`.
    """
    try:
        yield
    except Exception as error:  # which ones depends on the layer that does not fit
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise tables.ConfigError(
            "",
            why=f"{name} cannot be made: {tables.shortened(reason)}; is it too large for its "
            "images?",
        ) from None


def pretrained_arrays(common: dict[str, Any], problem: train.Problem) -> dict[str, Any]:
    """The arrays of `config.pretrained` by path, without the classifier if that is to be fresh."""
    like = jax.eval_shape(problem.init, jax.random.key(0))
    fresh = pretrained.CLASSIFIER if common["fresh_classifier"] else ""
    state_dict = pretrained.read(common["pretrained"])
    with tables.within("config.pretrained"):
        variables = pretrained.to_variables(
            state_dict,
            like,
            names=common["pretrained_names"],
            fresh=fresh,
            image_channels=problem.dataset.test.images.shape[-1],
        )
    kept = trees.named_leaves(like)
    return {
        path: leaf for path, leaf in trees.named_leaves(variables).items() if leaf is not kept[path]
    }


def runs(plan: Plan) -> list[str]:
    """Names of the stages that run, those that retrain included."""
    again = [plan.settings[name][0].retrain for name in plan.pipeline]
    return sorted({*plan.pipeline, *filter(None, again)})


def initial_state(plan: Plan, problem: train.Problem) -> train.State:
    """The networks at the start, one per member; members of the same seed start alike."""
    keys = [train.key_of(member.config["seed"]) for member in plan.members]
    key = keys[0] if problem.members is None else jnp.stack(keys)
    return train.initial_state(problem, problem.place(key))


class Run(NamedTuple):
    """A plan being run. rows: all so far, of this run only. origin: rows of the run it started
    from.
    """

    plan: Plan
    problem: train.Problem
    saved: checkpoint.Checkpoints
    writer: report.Writer
    rows: list[dict]
    origin: list[dict]

    def per_member(self, rows: list[dict]) -> list[list[dict]]:
        return [
            [row for row in rows if row["member"] == i] for i in range(self.problem.members or 1)
        ]


def run_plan(
    plan: Plan,
    problem: train.Problem,
    workdir: pathlib.Path,
    config: dict,
    still_mine: Callable[[], None],
) -> Outcome:
    """Runs the stages of one plan, from its newest whole checkpoint if there is one.

    config: of the plan, as plain data. still_mine: raises OSError if the workdir belongs to another
        run by now.
    """
    found = workdirs.newest(workdir)
    saved = checkpoint.Checkpoints(workdir, config, found, still_mine)
    with contextlib.ExitStack() as stack:
        stack.callback(saved.close)
        progress = found.progress if found else workdirs.Progress(0, False, [])
        with enough_memory_for("config.model", None, plan.common):
            state, origin = initial_state(plan, problem), []
        if plan.common["start_from"]:
            state, origin = continue_from(plan.common["start_from"], state)
        stages.check_weights(problem, state, "at the start of the run")
        rows = progress.rows
        writer = stack.enter_context(contextlib.closing(report.Writer(workdir, rows)))
        run = Run(plan, problem, saved, writer, rows, origin)
        if progress.stage or progress.begun or rows:
            say(
                f"continuing {workdir} in stage {min(progress.stage + 1, len(plan.pipeline))} of "
                f"{len(plan.pipeline)}"
            )
        for position, name in enumerate(plan.pipeline):
            if position < progress.stage:
                continue
            kind, own = plan.members[0].config[name]["kind"], plan.settings[name]
            visit = plan.pipeline[: position + 1].count(name)
            begun = [row for row in rows if row["stage"] == name and row["visit"] == visit]
            before = [row for row in rows if row["stage"] != name or row["visit"] != visit]
            again = {
                row["stage"] for row in before
            }  # replaces the stage of this name in the run it started from
            earlier = [row for row in origin if row["stage"] not in again] + before
            visits = plan.pipeline.count(name)
            place = interface.Place(
                name, position, plan.settings, run.per_member(earlier), visit, visits
            )
            memory = enough_memory_for(f"config.{name}", own[0], plan.common)
            with memory, tables.within(f"config.{name}"):
                resumed = position == progress.stage and progress.begun
                if resumed or (position == progress.stage and position):
                    state = state._replace(opt_state=carried_before(plan, state, position))
                    like = own[0].begin(problem, state, own, place) if resumed else state
                    state = checkpoint.restore(found, checkpoint.abstract(like))
                if not resumed:
                    state = own[0].begin(problem, state, own, place)
                    saved.save(state, workdirs.Progress(position, True, rows))
                common = dict(
                    stage=name, kind=kind, visit=visit, arm=arm_of(plan.members[0].config, position)
                )
                state = run_stage(run, state, place, run.per_member(begun), common)
                stages.check_weights(problem, state, f"{name}, at its end")
                state = after(plan, state, position)
                saved.save(state, workdirs.Progress(position + 1, False, rows))
        if progress.stage >= len(plan.pipeline):
            state = checkpoint.restore(
                found, checkpoint.abstract(interface.without_optimizer(state))
            )
    return Outcome(state, rows)


@contextlib.contextmanager
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
        raise tables.ConfigError(
            f"{part}: the memory is full ({tables.shortened(reason)}). {advice}"
        ) from error


def enough_memory_for(
    part: str, settings: Any, common: Mapping[str, Any]
) -> contextlib.AbstractContextManager:
    """`enough_memory` for a part of a run that says what to lower. part: a stage with its
    `settings`, or another.
    """
    lower = [f"{part}.{field}" for field in LARGE if hasattr(settings, field)]
    lower += ["config.eval_batch_size", "the network of config.model"]
    loop = " or set config.sweep.mode to 'loop'" if common["sweep"] else ""
    advice = (
        f"Lower {', '.join(lower)}{loop}, in another --workdir; with more memory the same command "
        "goes on from the "
        "last checkpoint."
    )
    return enough_memory(part, advice)


def after(plan: Plan, state: train.State, position: int) -> train.State:
    """The state as the stage at `position` leaves it to the next one; the last one leaves no
    optimizer.
    """
    if position + 1 == len(plan.pipeline):
        return interface.without_optimizer(state)
    return interface.handed_on(state, plan.settings[plan.pipeline[position]][0])


def carried_before(plan: Plan, state: train.State, position: int) -> Any:
    """What the stages before `position` hand on, in shapes only."""
    carried = ()
    for name in plan.pipeline[:position]:
        carried = plan.settings[name][0].carried(state, carried)
    return carried


def check_arrays(path: str, shapes: PyTree, members: int | None) -> None:
    """Raises ConfigError if the parameters in the finished run in `path` do not have `shapes`, for
    each member.
    """
    found = checkpoint.shapes(workdirs.newest(path))
    for name, leaf in trees.named_leaves(shapes).items():
        there, here = (
            found.get(f"params/{name}"),
            (() if members is None else (members,)) + leaf.shape,
        )
        if there != here:
            raise tables.ConfigError(
                "config.start_from",
                path,
                why=f"whose params/{name} has the shape {there}",
                allowed=f"{here}, that of this run's network for its data",
            )


def continue_from(path: str, state: train.State) -> tuple[train.State, list[dict]]:
    """The network at the end of the finished run in `path`, under `state`'s own key, and that run's
    rows.

    They follow those of the runs it started from itself, except for stages that it made anew.
    """
    rows: list[dict] = []
    for place, _ in reversed(list(ancestry(path))):
        saved = workdirs.newest(place)
        new = saved.progress.rows
        stages_anew = {row["stage"] for row in new}
        rows = [row for row in rows if row["stage"] not in stages_anew] + new
        restored = (
            checkpoint.restore(saved, checkpoint.abstract(state))
            if place == pathlib.Path(path)
            else None
        )
    return restored._replace(key=state.key), rows


def run_stage(
    run: Run, state: train.State, place: interface.Place, begun: list[list[dict]], common: dict
) -> train.State:
    """One stage: its rows go out as they come, its state is saved every `checkpoint_seconds`."""
    plan, rows, own = run.plan, run.rows, run.plan.settings[place.name]
    last, every = time.monotonic(), plan.common["checkpoint_seconds"]
    position, spe = place.position, own[0].steps_per_epoch(run.problem)
    # what an interruption saves, replaced as one: it may come between any two instructions
    good = (state, workdirs.Progress(position, True, list(rows)))
    shown = f"{place.position + 1}/{len(plan.pipeline)} {place.name}"
    with Display(shown) as display, contextlib.ExitStack() as stack:
        try:
            updates = stack.enter_context(
                contextlib.closing(own[0].run(run.problem, state, own, place, begun))
            )
            for update in updates:
                new = [
                    {**common, "member": i, **plan.members[i].swept, **found}
                    for i, own_rows in enumerate(update.rows)
                    for found in own_rows
                ]
                rows.extend(new)
                if update.state is not None:
                    state = update.state
                    if update.done < 1:
                        good = (state, workdirs.Progress(position, True, list(rows)))
                    else:
                        good = (
                            after(plan, state, position),
                            workdirs.Progress(position + 1, False, list(rows)),
                        )
                run.writer.append(new)
                display.show(update.done, new)
                stopping.check()
                if (
                    update.state is not None
                    and update.done < 1
                    and time.monotonic() - last >= every
                ):
                    train.check_finite(state, spe, place.name)
                    run.saved.save(*good)
                    last = time.monotonic()
        except KeyboardInterrupt:
            deleted = (
                leaf.is_deleted()
                for leaf in jax.tree.leaves(good[0])
                if isinstance(leaf, jax.Array)
            )
            if not any(deleted):
                train.check_finite(good[0], spe, place.name)
                run.saved.save(*good)
            raise
    return state


def arm_of(config: Mapping, position: int) -> str:
    """Label of the network a stage belongs to: of the latest `train` stage up to it, or the next
    one.

    A stage that makes another network without training it gives that the label of the next
    training, or else its own name. `network` before anything is made, if this run trains none.
    """
    names = config["pipeline"]
    kinds = [STAGES.get(config[name]["kind"], interface.Stage) for name in names]
    trains = [i for i, kind in enumerate(kinds) if kind.trains]
    removes = [i for i, kind in enumerate(kinds) if kind.makes_network]
    latest = max((i for i in (*trains, *removes) if i <= position), default=-1)
    named = latest if latest in trains else next((i for i in trains if i > latest), latest)
    if named < 0:
        return "network"
    return config[names[named]].get("label") or names[named]


def chance(dataset: data.Dataset) -> float:
    """Test accuracy of always answering the most frequent class; of a stream, one over the number
    of classes.
    """
    labels = dataset.test.labels
    if labels is None:
        return 1 / dataset.num_classes
    return round(float(np.bincount(labels).max() / labels.size), 4)


def describe_environment(problem: train.Problem) -> dict[str, Any]:
    """Versions and hardware, and the accuracy by chance, for the report."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    device = jax.local_devices()[0]
    shapes = jax.tree.leaves(train.shapes_of(problem))
    reading = {}
    if problem.streamed:
        workers = problem.dataset.train.images.options["workers"]
        reading["reading"] = f"{workers} processes" if workers > 0 else "threads"
    return {
        "device": f"{device.device_kind} ({device.platform}, {len(jax.local_devices())} local)",
        "python": host.python_version(),
        "parameters": f"{sum(leaf.size for leaf in shapes):,}",
        "chance": chance(problem.dataset),
        **reading,
        "sparsity_jax": sparsity_jax.__version__,
        **versions,
        **({"pretrained": zeros_of(problem)} if problem.pretrained else {}),
    }


def zeros_of(problem: train.Problem) -> str:
    """How many weights of the kernels in the file of `config.pretrained` are zero, and what becomes
    of them.
    """
    zeros, size = pretrained.count_zeros(problem.pretrained)
    after = (
        "masked, they stay zero"
        if problem.keep_zeros
        else "training moves them (config.pretrained_zeros)"
    )
    return f"{zeros:,} of {size:,} weights are zero" + f"; {after}" * (zeros > 0)


class Display:
    """Progress of a stage: a bar where stderr is a terminal, otherwise a line for new rows, at most
    every five seconds, and one a minute where there are none."""

    def __init__(self, name: str):
        self._name, self._started = name, time.monotonic()
        self._said = self._started - 5
        form = "{desc:<24} {percentage:3.0f}% |{bar:30}| {elapsed}<{remaining} {postfix}"
        self._bar = (
            tqdm.tqdm(total=1.0, desc=name, bar_format=form) if sys.stderr.isatty() else None
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            say(f"{self._name}: done in {time.monotonic() - self._started:.1f} s")

    def show(self, done: float, rows: list[dict]) -> None:
        """done: share in [0, 1]; of the rows the newest one's numbers are shown."""
        newest = rows[-1] if rows else {}
        names = (
            "epoch",
            "iteration",
            "ratio",
            "train_loss",
            "test_accuracy",
            "accuracy",
            "loss_after",
        )
        text = " ".join(f"{name}={newest[name]:.4g}" for name in names if name in newest)
        if self._bar is not None:
            self._bar.n = min(done, 1.0)
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.refresh() if done >= 1 else self._bar.update(0)
        elif time.monotonic() - self._said > (5 if text else 60):
            self._said = time.monotonic()
            say(f"{self._name}: {done:.0%} {text}".rstrip())
