"""Stages of structured pruning: `cut` removes channels in rounds, `compact` takes stock of the
network without them.

While pruning, removed channels are masked: shapes stay, and all rounds share their compiled
programs. The coupled channels come from the trace of the network (`groups`), so any network of the
zoo can be cut.
Source: Lubana and Dick 2021, arXiv:2009.11839, and its published code; see `scores` and `budgets`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import (
    alone,
    budgets,
    cost,
    groups,
    interface,
    losses,
    masks,
    scores,
    stages,
    tables,
    train,
    trees,
    units,
    workdirs,
)
from sparsity_jax.groups import Channels
from sparsity_jax.interface import Place
from sparsity_jax.train import Problem, State
from sparsity_jax.types import Arrays, PyTree, Row

Keep = Mapping[str, Any]  # bools by name of group, True = kept
NOTHING = "(?!)"  # a pattern that matches no name


def channels_of(problem: Problem, branches: groups.Branches = "tied") -> Channels:
    """The channel groups of the run's network."""
    key = ("channels", branches)
    return problem.once(key, lambda: groups.trace(*traceable(problem), branches=branches))


def traceable(problem: Problem) -> tuple[Callable, PyTree, jax.ShapeDtypeStruct]:
    """The run's network as a function, its variables and its input, of which only shapes count."""
    image = jax.ShapeDtypeStruct((2, *problem.dataset.test.images.shape[1:]), jnp.float32)
    return problem.model.apply, jax.eval_shape(problem.init, jax.random.key(0)), image


def variables_of(state: State) -> PyTree:
    """What a model is applied to."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def without(state: State, channels: Channels, keep: Keep, kept: PyTree) -> State:
    """`state` of one member without the channels that `keep` leaves out, nor what the masks `kept`
    do.
    """
    tree = groups.mask(dict(params=kept, batch_stats=state.batch_stats), channels, keep)
    params = masks.apply(state.params, tree["params"])
    return state._replace(params=params, masks=tree["params"], batch_stats=tree["batch_stats"])


# cut ----------------------------------------------------------------------------------------------


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
    imp_samples: tables.Count = 2560
    batch_size: tables.Count = 128
    temperature: tables.Positive = 1.0
    grasp_temperature: tables.Positive = 200.0
    preserve_temperature: tables.Positive = 1.0
    min_share: tables.Fraction = 0.05
    protect: Literal["correct", "original", "original_resnet"] = "correct"
    multiple: tables.Count = 1
    exclude: str = ""
    skip: str = ""
    rules: tuple[tuple[str, tables.Share], ...] = ()

    # Checks

    def check(self) -> None:
        trees.check_pattern(self.exclude, "exclude")
        trees.check_pattern(self.skip, "skip")
        if self.rules:
            self._check_rules()
        scores.required(self.measure, use_l2=self.use_l2, use_init=self.use_init)
        self.plan(1)

    def _check_rules(self) -> None:
        cumulative = self.schedule.get("cumulative", "exact")
        for field, value, wrong, why in (
            ("budget", self.budget, self.budget != "channels", "of rules it is 'channels'"),
            ("schedule.cumulative", cumulative, cumulative != "exact", "of rules it is 'exact'"),
            ("schedule.name", "manual", self.manual, "rules say what is removed"),
        ):
            if wrong:
                raise tables.ConfigError(field, value, why=f"but {why}")

    def check_order(self, order: interface.Order) -> None:
        """The thresholds of its schedule must be as many as its visits, and a tracked measure must
        be tracked.
        """
        if "saliency" in self.needed:
            self._check_tracked(order.before)
        rounds = len(self.plan(order.visits).ratios)
        if rounds != order.visits:
            raise tables.ConfigError(
                "schedule.thresholds",
                self.schedule["thresholds"],
                why=f"{rounds} rounds",
                allowed=f"{order.visits}, as often as config.pipeline names the stage",
            )

    def _check_tracked(self, before: Sequence[interface.Stage]) -> None:
        trainings = [stage for stage in before if not isinstance(stage, Cut)]
        tracked = dict(getattr(trainings[-1], "tracked", {})) if trainings else {}
        if not tracked:
            raise tables.ConfigError(
                "measure",
                self.measure,
                why="which the training right before it must track: set its track.name='saliency'",
            )
        for name in ("use_l2", "use_init") if self.use_l2 else ("use_l2",):
            value = getattr(self, name)
            if value != tracked[name]:
                raise tables.ConfigError(
                    name, value, allowed=f"{tracked[name]}, which the training tracks"
                )

    def check_streamed(self) -> None:
        if self.balanced:
            raise interface.needs_memory(
                "measure", self.measure, "which needs equally many images of every class"
            )

    def check_network(self, problem: Problem, visits: int = 1) -> None:
        """Raises ConfigError for `visits` rounds that do not fit the network or its data."""
        channels = channels_of(problem, self.branches)
        if not channels.groups:
            raise tables.ConfigError(
                "", why="finds no channels in the network of config.model that can be removed"
            )
        if self.exclude and all(trees.matching(channels.sizes, self.exclude, "exclude").values()):
            raise tables.ConfigError("exclude", self.exclude, why="which leaves no group to cut")
        if self.rules:
            with tables.within("rules"):
                trees.match_rules(channels.sizes, self.rules)
        self._check_readable(problem)
        if self.protect != "original_resnet":  # which removes less instead
            whole = groups.complete(channels, {})
            last = Place("", 0, {}, visit=visits, visits=visits)
            self.select(problem, whole, whole, last, 1 - self.density(last))
        if self.balanced:
            examples = min(self.imp_samples, problem.size("train"))
            if examples < problem.dataset.num_classes:
                raise tables.ConfigError(
                    "imp_samples", self.imp_samples, why="fewer than one of each class"
                )

    def _check_readable(self, problem: Problem) -> None:
        """Raises ConfigError if the measure reads arrays that some groups lack, such as the scale
        of a norm.
        """
        params = {"params": train.shapes_of(problem)}
        statistics = scores.Statistics(*[params] * len(scores.Statistics._fields))
        unreadable = {}
        for name, group in self.cuttable(problem).items():
            try:
                jax.eval_shape(self.score_of(group), statistics, jax.random.key(0))
            except ValueError as error:
                unreadable[re.escape(name)] = error
        if unreadable:
            first = next(iter(unreadable.values()))
            whole = "|".join([*filter(None, [self.exclude]), *unreadable])
            raise tables.ConfigError(
                "measure",
                self.measure,
                why=f"{first} To leave such groups whole, set exclude={whole!r}",
                allowed="a measure of kernels; with aggregate='sum' and without skip of any group",
            )

    # What its options say

    @property
    def manual(self) -> bool:
        """Whether thresholds say how much each round removes."""
        return self.schedule.get("name") == "manual"

    @property
    def needed(self) -> tuple[str, ...]:
        """The statistics that its measure needs."""
        return scores.required(self.measure, use_l2=self.use_l2, use_init=self.use_init)

    @property
    def balanced(self) -> bool:
        """Whether its scores need equally many examples of every class."""
        return any(name.startswith("hg") for name in self.needed)

    def plan(self, num_rounds: int, ratio: float | None = None) -> budgets.Rounds:
        """ratio: of one group, instead of that of the whole network."""
        fields = {"name": "gradient_flow", **self.schedule}
        if not self.manual:
            fields |= dict(ratio=self.ratio if ratio is None else ratio, num_rounds=num_rounds)
        with tables.within("schedule"):
            return budgets.schedule(**fields)

    def density(self, place: Place, ratio: float | None = None) -> float:
        """The share that is left after a round; ratio: as in `plan`."""
        return float(self.plan(place.visits, ratio).density[place.visit - 1])

    def cuttable(self, problem: Problem) -> dict[str, groups.Group]:
        """The groups that `exclude` does not leave whole."""
        every = channels_of(problem, self.branches).groups
        whole = re.compile(self.exclude or NOTHING)
        return {name: group for name, group in every.items() if not whole.fullmatch(name)}

    # One round

    def begin(self, problem: Problem, state: State, place: Place) -> State:
        return interface.without_optimizer(state)._replace(opt_state=state.opt_state)

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        channels = channels_of(problem, self.branches)
        compiled = dataclasses.replace(self, ratio=0.0, schedule=tables.Options())
        score = problem.once(("scores", compiled), lambda: make_scores(problem, self))
        importance = score(state, train.stage_key(state.key, place.position))
        alive = units.alive(channels, {"params": state.masks})
        keep = self.select(problem, importance, alive, place)

        def cut(state: State, keep: Keep) -> State:
            carried = state.opt_state and groups.mask(state.opt_state, channels, keep)
            return without(state._replace(opt_state=carried), channels, keep, state.masks)

        compiled_cut = problem.once(("cut", self.branches), lambda: jax.jit(cut))
        state = compiled_cut(state, jax.tree.map(jnp.asarray, keep))
        return state, [self._row(channels, keep, place)]

    def _row(self, channels: Channels, keep: Arrays, place: Place) -> Row:
        kept = {name: int(bools.sum()) for name, bools in keep.items()}
        num = sum(kept.values())
        total = sum(channels.sizes.values())
        row = dict(
            measure=self.measure,
            ratio=1 - num / total,
            budget=self.budget,
            round=place.visit,
            num_kept=num,
            num_channels=total,
            kept=kept,
            sizes=channels.sizes,
        )
        if place.visit == 1:
            row["layout"] = groups.layout(channels)
        return row

    def score_of(self, group: groups.Group) -> Callable:
        """`score(statistics, key)` of the group's channels."""
        names = ("aggregate", "use_l2", "use_init", "skip")
        options = {name: getattr(self, name) for name in names}
        return lambda statistics, key: scores.score(
            self.measure, statistics, group, key=key, **options
        )

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
        channels = channels_of(problem, self.branches)
        floors = budgets.minimum_kept(channels.sizes, self.min_share)
        limits = budgets.Limits(
            alive=alive, floors=floors, protect=self.protect, exclude=self.exclude or None
        )
        field = "rules" if self.rules else "ratio"
        if self.manual:
            field = "schedule.thresholds"
        with tables.blaming(field):
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
                keep = budgets.select_to_cost(importance, price, target, **limits)
        if self.multiple == 1:
            return keep
        return budgets.round_to_multiple(
            keep, importance, self.multiple, alive=alive, floors=floors
        )

    def _counts(self, problem: Problem, place: Place) -> dict[str, int]:
        """How many channels of each group the rules leave after a round."""
        sizes = channels_of(problem, self.branches).sizes
        shares = trees.match_rules(sizes, self.rules)
        counts = dict(sizes)
        for name in self.cuttable(problem):
            removed = 1 - self.density(place, shares[name])
            counts[name] -= masks.count_of(removed, sizes[name], "floor")
        return counts

    def _share_of_round(self, problem: Problem, alive: Keep, place: Place) -> float:
        """The share of the channels alive that a round removes."""
        # of the whole, where what is left is not what the earlier rounds asked for
        if self.schedule.get("cumulative") == "truncated" or self.multiple > 1:
            counted = [alive[name] for name in self.cuttable(problem)]
            total = sum(kept.size for kept in counted)
            living = sum(int(kept.sum()) for kept in counted)
            return budgets.ratio_to_reach(self.density(place), total, living)
        return float(self.plan(place.visits).ratios[place.visit - 1])


def make_scores(problem: Problem, stage: Cut) -> Callable:
    """`scores_of(state, key) -> {group: float [channels]}` of one member; compiled once for all
    rounds.
    """
    needs = stage.needed
    channels = channels_of(problem, stage.branches)
    score_of = {name: stage.score_of(group) for name, group in stage.cuttable(problem).items()}

    def loss(variables: PyTree, batch: tuple, temperature: Array) -> Array:
        # no part of gradients and Hessian products
        fixed = jax.lax.stop_gradient(variables["batch_stats"])
        logits = problem.model.apply({**variables, "batch_stats": fixed}, problem.images(batch[0]))
        return losses.cross_entropy(logits / temperature, batch[1]).mean()

    examples = problem.examples("train", stage.imp_samples)
    balanced = _balanced_examples(problem, len(examples[1])) if stage.balanced else None
    collect = scores.gather(
        loss,
        needs,
        stage.batch_size,
        temperature=stage.temperature,
        grasp_temperature=stage.grasp_temperature,
        preserve_temperature=stage.preserve_temperature,
        on_host=stages.on_host(problem),
    )

    @jax.jit
    def score(statistics: scores.Statistics, key: Array) -> dict[str, Array]:
        result = {}
        for i, (name, score) in enumerate(score_of.items()):
            result[name] = score(statistics, jax.random.fold_in(key, i))
        return result

    def scores_of(state: State, key: Array) -> Arrays:
        init = None
        if "w0" in needs:
            init = train.initial_variables(problem, state.key, problem.pretrained)
        statistics = collect(variables_of(state), examples, balanced=balanced, init=init)
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
    index = order[scores.class_balanced(labels[order], classes, min(most, classes * rarest))]
    images, classes_of = train.arrays(problem, "train")
    return images[index], classes_of[index]


# compact ------------------------------------------------------------------------------------------


@tables.option
class Compact(alone.EachMember):
    """The network without its removed channels: the same logits, fewer parameters and FLOPs,
    measured time.

    The run's network itself stays masked. batch_size, repeats: of the time measured; 0 repeats:
    none. tolerance: largest difference of compact from masked logits, relative to the largest
    logit, that counts as rounding; 0: that of the arithmetic, see `rounding_of`. A larger one, or a
    network that cannot be compacted, is told by the row's `warning`.
    """

    kind: ClassVar[str] = "compact"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    batch_size: tables.Count = 64
    repeats: tables.Index = 20
    tolerance: tables.NonNegative = 0.0

    def of_member(self, problem: Problem, state: State, place: Place) -> alone.Result:
        try:
            row = take_stock(problem, state, self)
        except ValueError as error:  # an emptied layer
            row = dict(warning=f"the network cannot be compacted: {error}")
        if row["warning"]:
            workdirs.say(f"{place.name}: {row['warning']}")
        return state, [row]


def rounding_of(problem: Problem) -> float:
    """Largest relative difference of two orders of summation of the logits, by the arithmetic of
    the network.

    Accelerators multiply float32 in shorter types (TF32, bfloat16).
    """
    dtype = jnp.dtype(problem.model.dtype)
    if dtype == jnp.bfloat16:
        return 1e-1
    if dtype == jnp.float16 or jax.default_backend() != "cpu":
        return 2e-2
    return 1e-4


class Stock(NamedTuple):
    """A network without its removed channels. variables: its arrays; apply(variables, images) ->
    logits.
    """

    variables: PyTree
    apply: Callable
    keep: Arrays
    channels: Channels


def compacted(problem: Problem, state: State) -> Stock:
    """One member's network, compacted; raises ValueError where all channels of a group are
    masked.
    """
    channels = channels_of(problem)
    keep = units.alive(channels, {"params": state.masks})
    small = groups.compact(variables_of(state), channels, keep)
    return Stock(small, groups.elastic(problem.model.apply, channels, keep), keep, channels)


def take_stock(problem: Problem, state: State, chosen: Compact) -> Row:
    """Accuracy, size and time of one member's network, dense (masked) and compact, as fields of a
    row.
    """
    stock = compacted(problem, state)
    networks = {
        "dense": (jax.jit(problem.model.apply), variables_of(state)),
        "compact": (jax.jit(stock.apply), stock.variables),
    }
    images = problem.images(problem.examples("test", chosen.batch_size)[0])
    masked, compact = (apply(variables, images) for apply, variables in networks.values())
    largest = jnp.maximum(jnp.max(jnp.abs(masked)), 1e-30)
    difference = float(jnp.max(jnp.abs(masked - compact)) / largest)
    tolerance = chosen.tolerance or rounding_of(problem)
    warning = ""
    if not difference <= tolerance:
        warning = (
            "the compact network's logits differ from the masked one's by "
            f"{difference:.2g} of the largest, more than the {tolerance:g} that count as rounding "
            f"in {jnp.dtype(problem.model.dtype).name}"
        )
    row = dict(
        accuracy=accuracy(problem, stock),
        difference=difference,
        tolerance=tolerance,
        warning=warning,
        kept={name: int(bools.sum()) for name, bools in stock.keep.items()},
        sizes=stock.channels.sizes,
    )
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    for end, (apply, variables) in zip(("", "_compact"), networks.values()):
        row[f"parameters{end}"] = cost.num_params(variables)
        row[f"flops{end}"] = cost.flops(apply, variables, image).products
        row[f"bytes{end}"] = cost.num_bytes(variables)
    if chosen.repeats:
        calls = {name: (apply, (arrays, images)) for name, (apply, arrays) in networks.items()}
        row |= _times(cost.compare(calls, repeats=chosen.repeats))
        row["batch_size"] = len(images)
    return row


def _times(pair: cost.Comparison) -> Row:
    """Fields of a row for measured times."""
    fields = ("speedup", "speedup_low", "speedup_high", "verdict")
    row = {field: getattr(pair, field) for field in fields}
    row["device"] = jax.devices()[0].device_kind
    for quantile, end in (("median", ""), ("low", "_low"), ("high", "_high")):
        row[f"milliseconds{end}"] = {
            name: 1e3 * getattr(latency, quantile) for name, latency in pair.latencies.items()
        }
    return row


def accuracy(problem: Problem, stock: Stock) -> float:
    """Of the compact network on the test set."""
    model = problem.model._replace(apply=stock.apply)
    compact = problem._replace(model=model, members=None, compiled={})
    variables = stock.variables
    measured = train.measure(compact, variables["params"], variables["batch_stats"], "test")
    size = problem.size("test") - len(measured.unreadable)
    return round(float(measured.accuracy) * size) / size  # not rounded to float32


STAGES = (Cut, Compact)
