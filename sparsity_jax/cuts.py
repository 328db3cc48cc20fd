"""The stage `cut`: the least important channels of the whole network are removed, in rounds.

Removed channels are masked: shapes stay, and all rounds share their compiled programs. The coupled
channels come from the trace of the network (`groups`), so any network of the zoo can be cut.
Source: Lubana and Dick 2021, arXiv:2009.11839, and its published code; see `scores` and `budgets`.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import (
    alone,
    budgets,
    cost,
    coupling,
    groups,
    interface,
    losses,
    masks,
    scores,
    structured,
    tables,
    train,
    trees,
)
from sparsity_jax.groups import Channels, Group
from sparsity_jax.interface import Place
from sparsity_jax.structured import Keep
from sparsity_jax.tables import ConfigError, Count, Positive
from sparsity_jax.train import Problem, State
from sparsity_jax.types import Arrays, Fields, PyTree, Row

__all__ = ["STAGES", "Cut", "make_scores"]

_NOTHING = "(?!)"  # a pattern that matches no name


@tables.option
class Cut(alone.EachMember):
    """Removes the least important channels of the network; each visit of the stage is one round.

    measure: how important a channel is; see `scores.MEASURES`. ratio: share removed after all
    rounds; every round takes a whole number of the channels left, rounded down as by the original,
    so many rounds take less of a small network.
    schedule: how the rounds share it: `gradient_flow` (as the original; cumulative: `truncated` as
    its ResNets), `polynomial` (power) or `manual` (thresholds: cumulative shares, one a round,
    instead of `ratio`). budget: what the share is of: channels, parameters or FLOPs. aggregate:
    scores of the kernels that make a channel (`producer`, as the original) or of all that read or
    make it. branches: `tied` removes what a residual sum adds together; `separate` masks each of
    its sides alone, as the original does, and cannot be compacted there. use_l2, use_init: see
    `scores.score`.
    imp_samples: train examples (which ones: see `config.sample`) that gradients are averaged over,
    or all if there are fewer; Hessian products take equally many of every class, no more than the
    rarest has; batch_size: of their batches;
    temperature: divides the logits. grasp_temperature, preserve_temperature: those of Hessian
    products.
    min_share: int(min_share * channels) + 1 of each group stay; protect: which, see `budgets`.
    multiple: what is left of each group is rounded up to a multiple of it, and every round makes up
    for that of the one before.
    exclude: pattern of names of groups left whole and uncounted. skip: pattern of arrays that
        scores do not read.
    rules: pairs (pattern of names of groups, share); given, every group loses the share of its own
    channels that the first match says, and `ratio` is idle.
    """

    kind: ClassVar[str] = "cut"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    measure: str = "mag_based"
    ratio: tables.Share = 0.75
    schedule: dict = tables.Options(name="gradient_flow")
    budget: Literal["channels", "parameters", "flops"] = "channels"
    aggregate: Literal["producer", "sum", "mean", "l2"] = "producer"
    branches: Literal["tied", "separate"] = "tied"
    use_l2: bool = False
    use_init: bool = False
    imp_samples: Count = 2560
    batch_size: Count = 128
    temperature: Positive = 1.0
    grasp_temperature: Positive = 200.0
    preserve_temperature: Positive = 1.0
    min_share: tables.Fraction = 0.05
    protect: Literal["correct", "original", "original_resnet"] = "correct"
    multiple: Count = 1
    exclude: str = ""
    skip: str = ""
    rules: tuple[tuple[str, tables.Share], ...] = ()

    # Checks

    def check(self) -> None:
        trees.check_pattern(self.exclude, "exclude")
        trees.check_pattern(self.skip, "skip")
        if self.rules:
            self._check_rules()
        self.needed()
        self.plan(1)

    def _check_rules(self) -> None:
        cumulative = self.schedule.get("cumulative", "exact")
        for field, value, allowed in (
            ("budget", self.budget, "channels"),
            ("schedule.cumulative", cumulative, "exact"),
        ):
            if value != allowed:
                raise ConfigError(field, value, why=f"but of rules it is {allowed!r}")
        if self.manual:
            why = "but rules say what is removed"
            raise ConfigError("schedule.name", "manual", why=why)

    def check_order(self, order: interface.Order) -> None:
        """The thresholds of its schedule must be as many as its visits, and a tracked measure must
        be tracked.
        """
        if "saliency" in self.needed():
            self._check_tracked(order.before)
        rounds = len(self.plan(order.visits).ratios)
        if rounds != order.visits:
            raise ConfigError(
                "schedule.thresholds",
                self.schedule["thresholds"],
                why=f"{rounds} rounds",
                allowed=f"{order.visits}, as often as config.pipeline names the stage",
            )

    def _check_tracked(self, before: Sequence[interface.Stage]) -> None:
        trainings = [stage for stage in before if not isinstance(stage, Cut)]
        tracked = getattr(trainings[-1], "tracked", {}) if trainings else {}
        if not tracked:
            why = "which the training right before it must track: set its track.name='saliency'"
            raise ConfigError("measure", self.measure, why=why)
        for name in ("use_l2", "use_init") if self.use_l2 else ("use_l2",):
            value = getattr(self, name)
            if value != tracked[name]:
                allowed = f"{tracked[name]}, which the training tracks"
                raise ConfigError(name, value, allowed=allowed)

    def check_streamed(self) -> None:
        if self.balanced:
            why = "which needs equally many images of every class"
            raise interface.needs_memory("measure", self.measure, why)

    def check_network(self, problem: Problem, visits: int = 1) -> None:
        """Raises ConfigError for `visits` rounds that do not fit the network or its data."""
        channels = self.channels(problem)
        if not channels.groups:
            why = "finds no channels in the network of config.model that can be removed"
            raise ConfigError("", why=why)
        if self.exclude:
            trees.matching(channels.sizes, self.exclude, "exclude")
            if not self.cuttable(problem):
                why = "which leaves no group to cut"
                raise ConfigError("exclude", self.exclude, why=why)
        if self.rules:
            with tables.within("rules"):
                trees.match_rules(channels.sizes, self.rules)
        self._check_readable(problem)
        if self.protect != "original_resnet":  # which removes less instead
            whole = groups.complete(channels, {})
            last = Place("", 0, {}, visit=visits, visits=visits)
            self.select(problem, whole, whole, last, 1 - self.density(last))
        examples = min(self.imp_samples, problem.size("train"))
        if self.balanced and examples < problem.dataset.num_classes:
            why = "fewer than one of each class"
            raise ConfigError("imp_samples", self.imp_samples, why=why)

    def _check_readable(self, problem: Problem) -> None:
        """Raises ConfigError if the measure reads arrays that some groups lack, such as the scale
        of a norm.
        """
        params = {"params": train.shapes_of(problem)}
        statistics = scores.Statistics(*[params] * len(scores.Statistics._fields))
        whole = [self.exclude] if self.exclude else []
        reason = ""
        for name, group in self.cuttable(problem).items():
            try:
                jax.eval_shape(self.score_of(group), statistics, key=jax.random.key(0))
            except ValueError as error:
                whole.append(re.escape(name))
                reason = reason or str(error)
        if reason:
            exclude = "|".join(whole)
            raise ConfigError(
                "measure",
                self.measure,
                why=f"{reason} To leave such groups whole, set exclude={exclude!r}",
                allowed="a measure of kernels; with aggregate='sum' and without skip of any group",
            )

    # What its options say

    @property
    def manual(self) -> bool:
        """Whether thresholds say how much each round removes."""
        return self.schedule.get("name") == "manual"

    def needed(self) -> tuple[str, ...]:
        """The statistics that its measure needs; raises ConfigError."""
        return scores.required(self.measure, use_l2=self.use_l2, use_init=self.use_init)

    @property
    def balanced(self) -> bool:
        """Whether its scores need equally many examples of every class."""
        return any(name.startswith("hg") for name in self.needed())

    def plan(self, num_rounds: int, ratio: float | None = None) -> budgets.Rounds:
        """ratio: of one group, instead of that of the whole network."""
        fields: Fields = {"name": "gradient_flow", **self.schedule}
        if not self.manual:
            fields["ratio"] = self.ratio if ratio is None else ratio
            fields["num_rounds"] = num_rounds
        with tables.within("schedule"):
            return budgets.schedule(**fields)

    def density(self, place: Place, ratio: float | None = None) -> float:
        """The share that is left after a round; ratio: as in `plan`."""
        return float(self.plan(place.visits, ratio).density[place.visit - 1])

    def channels(self, problem: Problem) -> Channels:
        """The coupled channels of the network."""
        return structured.channels_of(problem, branches=self.branches)

    def cuttable(self, problem: Problem) -> dict[str, Group]:
        """The groups that `exclude` does not leave whole."""
        whole = re.compile(self.exclude or _NOTHING)
        every = self.channels(problem).groups
        return {name: group for name, group in every.items() if not whole.fullmatch(name)}

    def score_of(self, group: Group) -> Callable:
        """`score(statistics, key=key)` of the group's channels."""
        return partial(
            scores.score,
            self.measure,
            group=group,
            aggregate=self.aggregate,
            use_l2=self.use_l2,
            use_init=self.use_init,
            skip=self.skip,
        )

    # One round

    def begin(self, problem: Problem, state: State, place: Place) -> State:
        return interface.without_optimizer(state)._replace(opt_state=state.opt_state)

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        channels = self.channels(problem)
        compiled = dataclasses.replace(self, ratio=0.0, schedule=tables.Options())
        score = problem.once(("scores", compiled), lambda: make_scores(problem, self))
        importance = score(state, train.stage_key(state.key, place.position))
        alive = coupling.alive(channels, {"params": state.masks})
        keep = self.select(problem, importance, alive, place)
        on_device = jax.tree.map(jnp.asarray, keep)
        state = problem.program(_without, self.branches)(state, on_device)
        return state, [_row(self, channels, keep, place)]

    def select(
        self,
        problem: Problem,
        importance: Keep,
        alive: Keep,
        place: Place,
        share: float | None = None,
    ) -> Arrays:
        """Which channels stay after this round; raises ConfigError where that cannot be.

        share: of the channels alive, instead of that of the round; only where budget is `channels`.
        """
        channels = self.channels(problem)
        floors = budgets.minimum_kept(channels.sizes, share=self.min_share)
        limits = budgets.Limits(
            alive=alive, floors=floors, protect=self.protect, exclude=self.exclude or None
        )
        field = "rules" if self.rules else "ratio"
        with tables.blaming("schedule.thresholds" if self.manual else field):
            if self.rules:
                counts = self._counts(problem, place)
                keep = budgets.select_to_counts(importance, counts, **limits)
            elif self.budget == "channels":
                if share is None:
                    share = self._share_of_round(problem, alive, place)
                keep = budgets.select(importance, share, **limits)
            else:
                price = cost.of_channels(channels, self.budget)
                target = self.density(place) * price(groups.complete(channels, {}))
                keep = budgets.select_to_cost(price, importance, target, **limits)
        if self.multiple == 1:
            return keep
        return budgets.round_to_multiple(keep, importance, self.multiple, alive=alive)

    def _counts(self, problem: Problem, place: Place) -> dict[str, int]:
        """How many channels of each group the rules leave after a round."""
        sizes = self.channels(problem).sizes
        shares = trees.match_rules(sizes, self.rules)
        counts = dict(sizes)
        for name in self.cuttable(problem):
            removed = 1 - self.density(place, shares[name])
            counts[name] -= masks.count_of(removed, sizes[name], rounding="floor")
        return counts

    def _share_of_round(self, problem: Problem, alive: Keep, place: Place) -> float:
        """The share of the channels alive that a round removes."""
        # of the whole, where what is left is not what the earlier rounds asked for
        if self.schedule.get("cumulative") == "truncated" or self.multiple > 1:
            counted = np.concatenate([alive[name] for name in self.cuttable(problem)])
            return budgets.ratio_to_reach(self.density(place), counted.size, int(counted.sum()))
        return float(self.plan(place.visits).ratios[place.visit - 1])


def _without(problem: Problem, branches: groups.Branches, state: State, keep: Keep) -> State:
    """`state` of one member without the channels that `keep` leaves out, nor what a training hands
    on of them.
    """
    channels = structured.channels_of(problem, branches=branches)
    carried = state.opt_state and groups.mask(state.opt_state, channels, keep)
    return structured.without(state._replace(opt_state=carried), channels, keep, state.masks)


def _row(stage: Cut, channels: Channels, keep: Arrays, place: Place) -> Row:
    kept = {name: int(bools.sum()) for name, bools in keep.items()}
    num = sum(kept.values())
    total = sum(channels.sizes.values())
    row = dict(
        measure=stage.measure,
        ratio=1 - num / total,
        budget=stage.budget,
        round=place.visit,
        num_kept=num,
        num_channels=total,
        kept=kept,
        sizes=channels.sizes,
    )
    if place.visit == 1:
        row["layout"] = groups.layout(channels)
    return row


def make_scores(problem: Problem, stage: Cut) -> Callable:
    """`scores_of(state, key) -> {group: float [channels]}` of one member; compiled once for all
    rounds.
    """
    needs = stage.needed()
    channels = stage.channels(problem)
    score_of = {name: stage.score_of(group) for name, group in stage.cuttable(problem).items()}

    def loss(variables: PyTree, batch: tuple, temperature: Array) -> Array:
        # no part of gradients and Hessian products
        fixed = jax.lax.stop_gradient(variables["batch_stats"])
        images, labels = batch
        logits = problem.apply({**variables, "batch_stats": fixed}, problem.images(images))
        return losses.cross_entropy(logits / temperature, labels).mean()

    @jax.jit
    def score(statistics: scores.Statistics, key: Array) -> dict[str, Array]:
        result = {}
        for i, (name, score) in enumerate(score_of.items()):
            result[name] = score(statistics, key=jax.random.fold_in(key, i))
        return result

    collect = scores.gather(
        loss,
        needs,
        stage.batch_size,
        temperature=stage.temperature,
        grasp_temperature=stage.grasp_temperature,
        preserve_temperature=stage.preserve_temperature,
        on_host=train.on_host(problem),
        precision=problem.curvature_precision,
    )
    examples = problem.examples("train", stage.imp_samples)
    balanced = _balanced_examples(problem, len(examples[1])) if stage.balanced else None

    def scores_of(state: State, key: Array) -> Arrays:
        init = None
        if "w0" in needs:
            init = train.initial_variables(problem, state.key, problem.pretrained)
        variables = state.variables
        statistics = collect(variables, examples, balanced=balanced, init=init)
        if "saliency" in needs:
            statistics = statistics._replace(saliency={"params": state.opt_state.saliency})
        result = groups.complete(channels, {}) | score(statistics, key)
        return {name: np.asarray(values, np.float64) for name, values in result.items()}

    return scores_of


def _balanced_examples(problem: Problem, most: int) -> tuple[Any, Any]:
    """(images, labels) of up to `most` train examples, equally many of every class."""
    classes = problem.dataset.num_classes
    labels = np.asarray(problem.dataset.train.labels)
    rarest = int(np.bincount(labels, minlength=classes).min())
    order = problem.sample.order(len(labels))
    number = min(most, classes * rarest)
    balanced = scores.class_balanced(labels[order], classes, number)
    index = order[balanced]
    images, classes_of = train.arrays(problem, "train")
    return images[index], classes_of[index]


STAGES = (Cut,)
