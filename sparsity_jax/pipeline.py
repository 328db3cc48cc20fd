"""A run: its config checked as a whole, then its stages in order, saved on the way and resumed
where it stopped.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

import sparsity_jax
from sparsity_jax import (
    ancestry,
    checkpoint,
    durations,
    finished,
    hosts,
    imports,
    interface,
    kept,
    lock,
    meshes,
    platforms,
    provenance,
    stages,
    stopping,
    stored,
    train,
    turns,
    workdirs,
)
from sparsity_jax.building import build, enough_memory_for, use_deterministic, use_platform
from sparsity_jax.interface import Place, Stage
from sparsity_jax.plans import STAGES, Plan, base, check, plain, settings, stage
from sparsity_jax.progress import Display, tell_environment, write_report
from sparsity_jax.report import Writer, trackers
from sparsity_jax.tables import within
from sparsity_jax.train import NonFiniteLossError, Problem, State
from sparsity_jax.types import AnyPath, Config, MemberRows, Row, Rows
from sparsity_jax.workdirs import Progress, Snapshot, holds_run, read_config, say

__all__ = [
    "STAGES",
    "Outcome",
    "Run",
    "arm_of",
    "base",
    "build",
    "check",
    "plain",
    "run",
    "run_member",
    "run_plan",
    "settings",
    "stage",
]


class Outcome(NamedTuple):
    """state: at the end, with a leading axis if a sweep ran at once. rows: of all stages and
    members.
    """

    state: State
    rows: Rows


def run(
    config: Config,
    workdir: AnyPath,
    *,
    command: str = "",
    config_file: AnyPath | None = None,
    lock_seconds: float = lock.STALE_SECONDS,
) -> Outcome:
    """Runs, or continues, the pipeline of `config` in `workdir`; writes rows, checkpoints and the
    report there.

    The same call continues an interrupted run and ends with the same numbers (bit for bit on CPU);
    a finished run only rewrites its report, and needs neither data nor the run it started from.
    command, config_file: what was typed, and the file of the config, for the report.
    lock_seconds: how long a run of another host that holds `workdir` may be silent. Raises
    ConfigError before anything compiles, LockedError where another run is at work, DamagedError
    where no checkpoint is whole, and train.NonFiniteLossError; if members of a sweep run one after
    the other, once all have run.
    """
    config = plain(config)
    workdir = Path(workdir)
    workdirs.check_path(workdir)
    if hosts.several():
        _meet(workdir, config)
    if holds_run(workdir) and read_config(workdir) == config:
        snapshots = finished.last_snapshots(workdir, config)
        if snapshots:
            return Outcome(*finished.write_again(workdir, config, snapshots))
    use_deterministic(config.get("deterministic", False))
    use_platform(config.get("platform", "default"))
    with imports.telling_files(workdir):
        plans = check(config)
    hosts.by_first(workdirs.refuse_other, workdir, config)
    if len(plans) == 1:
        hosts.by_first(workdirs.refuse_members, workdir)
    hosts.by_first(lock.refuse, workdir, stale_seconds=lock_seconds)
    with hosts.together(), enough_memory_for("config.data", None, plans[0].common):
        problem = build(plans)
    held = _held(workdir, lock_seconds)
    with workdirs.naming(workdir), held as still_mine:

        def claim() -> None:
            workdirs.claim(workdir, config)
            origin = provenance.describe(config, command=command, config_file=config_file)
            imports.remember(workdir)
            tell_environment(problem, workdir, origin)

        hosts.by_first(claim)
        diverged: list[str] = []
        schedule = durations.schedule_of(plans, problem)

        def run_one(plan: Plan, folder: Path, config: Config) -> Outcome:
            return run_plan(plan, problem, folder, config, schedule, still_mine)

        if len(plans) == 1:
            outcome = run_one(plans[0], workdir, config)
        else:
            state, rows, diverged = turns.run_all(plans, workdir, config, run_one)
            outcome = Outcome(state, rows)
        hosts.by_first(write_report, workdir, config, outcome.rows)
    if diverged:
        raise NonFiniteLossError("\n".join(diverged))
    return outcome


def _meet(workdir: Path, config: Config) -> None:
    """Where several processes run together: their devices, and what must be the same for all.

    Raises ConfigError where it is not.
    """
    use_deterministic(config.get("deterministic", False))
    use_platform(config.get("platform", "default"))
    workdirs.tell(hosts.is_first())
    hosts.check_alike("the config", config)
    hosts.check_alike(
        "the version of sparsity_jax or jax", [sparsity_jax.__version__, jax.__version__]
    )
    hosts.check_shared(workdir)


@contextlib.contextmanager
def _held(workdir: Path, lock_seconds: float) -> Iterator[Callable[[], None]]:
    """`lock.held`, by the first of several processes for all."""
    with contextlib.ExitStack() as stack:
        held = lock.held(workdir, stale_seconds=lock_seconds)
        check = hosts.by_first(stack.enter_context, held)
        yield check or _no_check


def _no_check() -> None:
    """Of a process that holds no lock."""


def run_member(config: Config, workdir: AnyPath, number: int, **options: Any) -> Outcome:
    """Runs, or continues, one member of the sweep of `config` alone, in `workdir/member_NNN`.

    Nothing is shared but the folder, so that members may run at the same time, on any machines:
    array jobs of Slurm, indexed jobs of Kubernetes. `report`, `compare` and `evaluate` of `workdir`
    read all that are there, and `run` goes on with them where it has a folder for each, too. A
    member that a whole run trains side by side with others has the same numbers
    but for rounding, all others the very same. number: counted from 0. options: those of `run`.
    Raises what `run` does, and ConfigError for a number that no member has.
    """
    config = plain(config)
    workdir = Path(workdir)
    workdirs.check_path(workdir)
    use_deterministic(config.get("deterministic", False))
    use_platform(config.get("platform", "default"))
    with imports.telling_files(workdir):
        own_config = turns.alone(config, number)
    workdirs.claim(workdir, config)
    return run(own_config, workdir / workdirs.member_name(number), **options)


# The stages of one plan ---------------------------------------------------------------------------


class Run(NamedTuple):
    """A plan being run. rows: all so far, of this run only. origin: rows of the run it started
    from. schedule: of all plans of the run.
    """

    plan: Plan
    problem: Problem
    workdir: Path
    saved: checkpoint.Checkpoints
    write: Callable[[Rows], None]
    rows: Rows
    origin: Rows
    schedule: durations.Schedule

    def per_member(self, rows: Rows) -> MemberRows:
        """The rows of each member."""
        every = range(self.problem.members or 1)
        return [[row for row in rows if row["member"] == i] for i in every]

    def place(self, position: int) -> Place:
        """Where the stage at `position` stands."""
        pipeline = self.plan.pipeline
        name = pipeline[position]
        visit = pipeline[: position + 1].count(name)
        visits = pipeline.count(name)
        mine = lambda row: (row["stage"], row["visit"]) == (name, visit)
        before = [row for row in self.rows if not mine(row)]
        return Place(
            name,
            position,
            self.plan.settings,
            earlier=self.per_member(workdirs.behind(self.origin, before)),
            rows=self.per_member([row for row in self.rows if mine(row)]),
            visit=visit,
            visits=visits,
        )

    def reached(self, state: State, position: int, done: float) -> tuple[State, Progress]:
        """What a checkpoint says once the stage at `position` is done by this share."""
        rows = list(self.rows)
        if done < 1:
            return state, Progress(position, True, rows)
        return self.plan.after(state, position), Progress(position + 1, False, rows)

    def keep(self, state: State, position: int) -> None:
        """Keeps the network of the stage at `position` if the next one belongs to another."""
        config = self.plan.members[0].config
        label = arm_of(config, position)
        is_last = position + 1 == len(self.plan.pipeline)
        if not is_last and arm_of(config, position + 1) != label:
            most = self.plan.common["keep_networks"]
            kept.save(self.workdir, state, label, position, most)


def run_plan(
    plan: Plan,
    problem: Problem,
    workdir: Path,
    config: Config,
    schedule: durations.Schedule,
    still_mine: Callable[[], None],
) -> Outcome:
    """Runs the stages of one plan in `workdir`, from its newest whole checkpoint if there is one.

    problem: what `build` gives for all plans of the run. config: of the plan, as plain data.
    schedule: of all plans. still_mine: raises OSError if the workdir belongs to another run by now.
    Raises train.NonFiniteLossError, and what `run` does while it trains.
    """
    precision = jax.default_matmul_precision(problem.precision)
    with precision, platforms.using(platforms.own()):
        own_problem = problem.with_members(plan.size)
        return _run_stages(plan, own_problem, workdir, config, schedule, still_mine)


def _run_stages(
    plan: Plan,
    problem: Problem,
    workdir: Path,
    config: Config,
    schedule: durations.Schedule,
    still_mine: Callable[[], None],
) -> Outcome:
    """`run_plan` for a problem of as many members as the plan has."""
    found = checkpoint.newest(workdir)
    progress = found.progress if found else Progress(0, False, [])
    with enough_memory_for("config.model", None, plan.common):
        state = _initial_state(plan, problem)
    origin: Rows = []
    if plan.common["start_from"]:
        state, origin = ancestry.continue_from(plan.common["start_from"], state)
    with train.naming("at the start of the run"):
        stages.check_weights(problem, state)
    saved = checkpoint.Checkpoints(workdir, config, found, still_mine)
    with contextlib.closing(saved), _writing(workdir, progress.rows, plan, config) as write:
        run = Run(plan, problem, workdir, saved, write, progress.rows, origin, schedule)
        if found:
            stage_number = min(progress.stage + 1, len(plan.pipeline))
            say(f"continuing {workdir} in stage {stage_number} of {len(plan.pipeline)}")
            state = _restored(run, state, found)
        begun = progress.begun
        for position in range(progress.stage, len(plan.pipeline)):
            state = _run_stage(run, state, position, begun)
            begun = False
    return Outcome(state, progress.rows)


@contextlib.contextmanager
def _writing(
    workdir: Path, rows: Rows, plan: Plan, config: Config
) -> Iterator[Callable[[Rows], None]]:
    """What rows are written by, behind `rows`; of several processes by the first alone."""
    if not hosts.is_first():
        yield lambda rows: None
        return
    own_trackers = trackers.begin(plan.common["log"], workdir, config)
    with Writer(workdir, rows, own_trackers) as writer:
        yield writer.append


def _initial_state(plan: Plan, problem: Problem) -> State:
    """The networks at the start, one per member; members of the same seed start alike."""
    keys = [train.key_of(member.config["seed"]) for member in plan.members]
    key = problem.place(train.together(problem, keys))
    return train.initial_state(problem, key)


def _restored(run: Run, state: State, snapshot: Snapshot) -> State:
    """The state in a checkpoint; `state`: at the start of the run, which tells its structure."""
    progress = snapshot.progress
    plan = run.plan
    if progress.begun:
        name = plan.pipeline[progress.stage]
        own = plan.settings[name]
        place = run.place(progress.stage)
        with enough_memory_for(f"config.{name}", own[0], plan.common):
            state = own[0].begin(run.problem, state, place)
    if state.opt_state == ():
        with checkpoint.reading(snapshot):
            there = stored.structs(snapshot)["opt_state"]
            carried = interface.carried(there)
            like = meshes.structs(carried, run.problem.shardings(carried))
            state = state._replace(opt_state=like)
    return checkpoint.restore(snapshot, state)


def _run_stage(run: Run, state: State, position: int, begun: bool) -> State:
    """The state that the stage at `position` hands on. begun: whether `state` is its own."""
    place = run.place(position)
    where = f"config.{place.name}"
    stage = place.own[0]
    with enough_memory_for(where, stage, run.plan.common), within(where), train.naming(place.name):
        if not begun:
            state = stage.begin(run.problem, state, place)
        if position == 0 and not begun:  # a folder that cannot be written is noticed early
            run.saved.save(*run.reached(state, position, 0.0))
        state = _run_updates(run, state, place)
        with train.naming("at its end"):
            stages.check_weights(run.problem, state)
        state, progress = run.reached(state, position, 1.0)
        run.keep(state, position)
        run.saved.save(state, progress)
    return state


def _run_updates(run: Run, state: State, place: Place) -> State:
    """What a stage does: its rows go out as they come, its state is saved every
    `checkpoint_seconds`.
    """
    plan = run.plan
    name = place.name
    position = place.position
    stage = place.own[0]
    config = plan.members[0].config
    common = dict(stage=name, kind=config[name]["kind"], visit=place.visit)
    common["arm"] = arm_of(config, position)
    alarm = hosts.Alarm(plan.common["checkpoint_seconds"])
    spe = stage.steps_per_epoch(run.problem)
    # what an interruption saves, replaced as one: it may come between any two instructions
    good = run.reached(state, position, 0.0)
    key = (plan.numbers[0], position)
    watch = durations.Watch(run.schedule, key, resumed=any(place.rows))
    display = Display(f"{position + 1}/{len(plan.pipeline)} {name}", watch)
    updates = stage.run(run.problem, state, place)
    with display, contextlib.closing(updates):
        try:
            for update in updates:
                new = _rows_of(update, plan, common)
                run.rows.extend(new)
                if update.state is not None:
                    state = update.state
                    good = run.reached(state, position, update.done)
                run.write(new)
                display.show(update.done, new)
                stopping.check()
                due = alarm.rings()
                if due and update.state is not None and update.done < 1:
                    train.check_finite(state, spe)
                    run.saved.save(*good)
                    alarm.reset()
        except KeyboardInterrupt:
            arrays = [leaf for leaf in jax.tree.leaves(good[0]) if isinstance(leaf, jax.Array)]
            if not any(array.is_deleted() for array in arrays):
                train.check_finite(good[0], spe)
                run.saved.save(*good)
            raise
    return state


def _rows_of(update: train.Update, plan: Plan, common: Row) -> Rows:
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
    if named >= 0:
        return config[names[named]].get("label") or names[named]
    return "network"
