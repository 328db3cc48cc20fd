"""Members of a sweep that run one after the other, each plan in a folder of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sparsity_jax import building, hosts, members, plans, report, stopping, workdirs
from sparsity_jax.plans import Plan
from sparsity_jax.report import Writer
from sparsity_jax.tables import ConfigError
from sparsity_jax.train import NonFiniteLossError, State
from sparsity_jax.types import Config, Fields, Rows
from sparsity_jax.workdirs import say

__all__ = ["RunPlan", "Turn", "alone", "run_all", "turns_of"]

RunPlan = Callable[[Plan, Path, Fields], tuple[State, Rows]]


class Turn(NamedTuple):
    """A plan with the folder that it runs in, and the config of that folder."""

    plan: Plan
    folder: Path
    config: Fields


def turns_of(every: list[Plan], workdir: Path, config: Config) -> list[Turn]:
    """Where each plan of a run goes: the only one into `workdir`, of several each into a folder in
    it.
    """
    if len(every) == 1:
        return [Turn(every[0], workdir, dict(config))]
    turns = []
    for plan in every:
        folder = workdir / workdirs.member_name(plan.numbers[0])
        start = building.origin_of(plan, len(every))
        plan = plan._replace(common={**plan.common, "start_from": start})
        turns.append(Turn(plan, folder, _config_of(plan, config)))
    return turns


def run_all(
    every: list[Plan], workdir: Path, config: Config, run_plan: RunPlan
) -> tuple[Any, Rows, list[str]]:
    """(state of the last plan that did not diverge, rows of all, a line for each that diverged).

    run_plan: `run_plan(plan, folder, config of the plan)`, the plan's state and rows.
    """
    rows: Rows = []
    diverged: list[str] = []
    state: Any = None
    number = every[-1].numbers[-1] + 1
    for plan, folder, own_config in turns_of(every, workdir, config):
        stopping.check()
        first = plan.numbers[0]
        hosts.by_first(workdirs.claim, folder, own_config)
        swept = "; ".join(members.told(member.swept) for member in plan.members)
        place = f"{first + 1} of {number}"
        say(f"{plan.name} ({place}): {swept}")
        try:
            state, new = run_plan(plan, folder, own_config)
        except NonFiniteLossError as error:
            diverged.append(f"{plan.name}: {error}")
            new = hosts.by_first(report.read_rows, folder / report.METRICS) or []
        rows += workdirs.renumbered(new, first)
        hosts.by_first(_write, workdir, rows)
    return state, rows, diverged


def _write(workdir: Path, rows: Rows) -> None:
    Writer(workdir, rows).close()


def alone(config: Config, number: int) -> Fields:
    """The config that makes one member of a sweep alone, as in its turn.

    Raises ConfigError for a mistake in the config, and for a number that no member has.
    """
    every = plans.check(config)
    networks = [member for plan in every for member in plan.members]
    if not 0 <= number < len(networks):
        raise ConfigError("--member", number, allowed=f"0 to {len(networks) - 1}")
    (together,) = [plan for plan in every if number in plan.numbers]
    if together.size:
        say(f"a whole run trains {together.name} in one program; alone, rounding may differ")
    plan = Plan([number], [networks[number]], together.common)
    start = building.origin_of(plan, len(networks))
    plan = plan._replace(common={**plan.common, "start_from": start})
    return _config_of(plan, config)


def _config_of(plan: Plan, config: Config) -> Fields:
    """The config of one separate plan; of a single member it makes the same network alone, in
    whatever folder.
    """
    start = dict(start_from=plan.common["start_from"])
    if plan.size:
        return {**config, **start, "sweep": {**config["sweep"], "members": plan.numbers}}
    (member,) = plan.members
    own = {**member.config, **start}
    for name in members.stages_of(own):
        if "arm" in member.swept and member.stages[name].trains:
            own[name] = {**own[name], "label": member.swept["arm"]}
    return own
