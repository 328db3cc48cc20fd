"""Stages of structured pruning: `cut` removes channels in rounds, `compact` takes stock of the
network without them.

While pruning, removed channels are masked: shapes stay, and all rounds share their compiled
programs. The coupled channels come from the trace of the network (`groups`), so any network of the
zoo can be cut.
Source: Lubana and Dick 2021, arXiv:2009.11839, and its published code; see `scores` and `budgets`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import (
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
from sparsity_jax.train import Problem, State, Update

PyTree = Any
Keep = dict[str, np.ndarray]  # bools by name of group, True = kept


def channels_of(problem: Problem, branches: groups.Branches = "tied") -> Channels:
    """The channel groups of the run's network."""

    def traced() -> Channels:
        return groups.trace(*traceable(problem), branches=branches)

    return problem.once(("channels", branches), traced)


def traceable(problem: Problem) -> tuple[Callable, PyTree, jax.ShapeDtypeStruct]:
    """The run's network as a function, its variables and its input, of which only shapes count."""
    image = jax.ShapeDtypeStruct((2, *problem.dataset.test.images.shape[1:]), jnp.float32)
    return problem.model.apply, jax.eval_shape(problem.init, jax.random.key(0)), image


def members_of(problem: Problem, state: State) -> Iterator[tuple[int, State]]:
    """Every member's own state, without the leading axis of a sweep."""
    if problem.members is None:
        yield 0, state
        return
    for i in range(problem.members):
        yield i, jax.tree.map(lambda leaf, i=i: leaf[i], state)


def stacked(problem: Problem, states: Sequence[State]) -> State:
    """The state of all members."""
    if problem.members is None:
        return states[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def without(state: State, channels: Channels, keep: Mapping[str, Any], kept: PyTree) -> State:
    """`state` of one member without the channels that `keep` leaves out, nor what the masks `kept`
    do.
    """
    tree = groups.mask(dict(params=kept, batch_stats=state.batch_stats), channels, keep)
    params = masks.apply(state.params, tree["params"])
    return state._replace(params=params, masks=tree["params"], batch_stats=tree["batch_stats"])


# cut ----------------------------------------------------------------------------------------------


@tables.option
class Cut(interface.Stage):
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

    def check(self) -> None:
        tables.lookup(scores.MEASURES, self.measure, "measure")
        trees.check_pattern(self.exclude, "exclude")
        trees.check_pattern(self.skip, "skip")
        if self.rules:
            self._check_rules()
        scores.required(self.measure, use_l2=self.use_l2, use_init=self.use_init)
        self.plan(1)

    def _check_rules(self) -> None:
        cumulative = self.rounds().get("cumulative", "exact")
        for name, value, needed in (
            ("budget", self.budget, "channels"),
            ("schedule.cumulative", cumulative, "exact"),
        ):
            if value != needed:
                raise tables.ConfigError(name, value, allowed=f"{needed!r} with rules")
        if self.rounds()["name"] == "manual":
            raise tables.ConfigError(
                "schedule.name", "manual", why="but rules say what is removed of each group"
            )

    def check_order(self, order: interface.Order) -> None:
        """The thresholds of its schedule must be as many as its visits, and a tracked measure must
        be tracked.
        """
        if scores.MEASURES[self.measure].needs == ("saliency",):
            self._check_tracked(order.before)
        rounds = len(self.plan(order.visits).ratios)
        if rounds != order.visits:
            raise tables.ConfigError(
                "schedule.thresholds",
                self.schedule["thresholds"],
                why=f"{rounds} rounds",
                allowed=f"{order.visits}, as often as config.pipeline names the stage",
            )

    def _check_tracked(self, before: list[interface.Stage]) -> None:
        trainings = [own for own in before if not isinstance(own, Cut)]
        tracked = dict(getattr(trainings[-1], "track", ())) if trainings else {}
        if not tracked:
            raise tables.ConfigError(
                "measure",
                self.measure,
                why="which the training right before it must track: set its track.name='saliency'",
            )
        for name in ("use_l2", "use_init") if self.use_l2 else ("use_l2",):
            if tracked[name] != (own := getattr(self, name)):
                raise tables.ConfigError(
                    name, own, allowed=f"{tracked[name]}, which the training tracks"
                )

    def check_streamed(self) -> None:
        if self.balanced:
            raise interface.needs_memory(
                "measure", self.measure, "which needs equally many images of every class"
            )

    def check_network(self, problem: Problem, visits: int) -> None:
        check_network(problem, self, visits)

    def rounds(self) -> dict[str, Any]:
        """The schedule's fields, its thresholds a tuple."""
        fields = {"name": "gradient_flow", **self.schedule}
        if isinstance(fields.get("thresholds"), list):
            fields["thresholds"] = tuple(fields["thresholds"])
        return fields

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
        fields = self.rounds()
        if fields["name"] != "manual":
            fields |= dict(ratio=self.ratio if ratio is None else ratio, num_rounds=num_rounds)
        with tables.within("schedule"):
            return budgets.schedule(**fields)

    @property
    def share_field(self) -> str:
        """The field that says how much is removed."""
        if self.rules:
            return "rules"
        return "schedule.thresholds" if self.rounds()["name"] == "manual" else "ratio"

    def begin(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
    ) -> State:
        return interface.handed_on(state, self)

    def carried(self, state: State, before: Any) -> Any:
        return before

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        found, states = interface.rows_per_member(problem), []
        for i, member in members_of(problem, state):
            stage = settings[i]
            channels = channels_of(problem, stage.branches)
            keep = stage.kept(problem, member, place)
            cut = problem.once(("cut", stage.branches), functools.partial(_compiled_cut, channels))
            states.append(cut(member, jax.tree.map(jnp.asarray, keep)))
            found[i].append(stage.row(channels, keep, place))
        yield Update(stacked(problem, states), found, 1.0)

    def kept(self, problem: Problem, state: State, place: Place) -> Keep:
        """Which channels of one member's network stay after this round."""
        compiled = dataclasses.replace(self, ratio=0.0, schedule=tables.Options())
        scores_of = problem.once(("scores", compiled), lambda: make_scores(problem, self))
        importance = scores_of(state, train.stage_key(state.key, place.position))
        alive = units.alive(channels_of(problem, self.branches), {"params": state.masks})
        return select(problem, self, importance, alive, place)

    def row(self, channels: Channels, keep: Keep, place: Place) -> dict[str, Any]:
        kept = {name: int(bools.sum()) for name, bools in keep.items()}
        num, total = sum(kept.values()), sum(channels.sizes.values())
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
            row |= dict(layout=groups.layout(channels))
        return row

    def leaves_whole(self, name: str) -> bool:
        """Whether `exclude` says so of a group."""
        return bool(self.exclude) and re.fullmatch(self.exclude, name) is not None


def _compiled_cut(channels: Channels) -> Callable:
    @jax.jit
    def cut(state: State, keep: Mapping[str, Array]) -> State:
        carried = state.opt_state and groups.mask(state.opt_state, channels, keep)
        return without(state._replace(opt_state=carried), channels, keep, state.masks)

    return cut


def check_network(problem: Problem, chosen: Cut, visits: int = 1) -> None:
    """Raises ConfigError for `visits` rounds that do not fit the network or its data."""
    channels = channels_of(problem, chosen.branches)
    if not channels.groups:
        raise tables.ConfigError(
            "", why="finds no channels in the network of config.model that can be removed"
        )
    if chosen.exclude:
        excluded = trees.matching(channels.sizes, chosen.exclude, "exclude")
        if all(excluded.values()):
            raise tables.ConfigError("exclude", chosen.exclude, why="which leaves no group to cut")
    if chosen.rules:
        with tables.within("rules"):
            trees.match_rules(channels.sizes, chosen.rules)
    _check_readable(problem, chosen)
    _check_reach(problem, chosen, visits)
    examples = min(chosen.imp_samples, problem.size("train"))
    if chosen.balanced and examples < problem.dataset.num_classes:
        raise tables.ConfigError(
            "imp_samples", chosen.imp_samples, why="fewer than one of each class"
        )


def _check_readable(problem: Problem, chosen: Cut) -> None:
    """Raises ConfigError if the measure reads arrays that some groups lack, such as the scale of a
    norm.
    """
    params = {"params": train.shapes_of(problem)}
    statistics = scores.Statistics(*[params] * len(scores.Statistics._fields))
    scored = _scored(problem, chosen)
    unreadable = {}
    for name, group in scored.items():
        try:
            jax.eval_shape(_score(chosen, group), statistics, jax.random.key(0))
        except ValueError as error:
            unreadable[name] = str(error)
    if not unreadable:
        return
    hint = "Set aggregate='sum', or another skip."
    if scores.MEASURES[chosen.measure].on in ("scale", "norm"):
        hint = "Measures of kernels read any group."
    if len(unreadable) < len(scored):
        whole = "|".join([*filter(None, [chosen.exclude]), *map(re.escape, unreadable)])
        hint += f" To leave such groups whole, set exclude={whole!r}."
    first = next(iter(unreadable.values()))
    raise tables.ConfigError("measure", chosen.measure, why=f"{first} {hint}")


def _check_reach(problem: Problem, chosen: Cut, visits: int) -> None:
    """Raises ConfigError if the minimum kept of each group does not allow what the last round shall
    leave.

    It depends on no score, but for `protect='original_resnet'`, which removes less than asked
    instead.
    """
    if chosen.protect == "original_resnet":
        return
    every = channels_of(problem, chosen.branches).sizes
    if chosen.budget != "channels" or chosen.rules:
        everything = {name: np.ones(size, bool) for name, size in every.items()}
        last = Place("", 0, {}, (), visits, visits)
        select(problem, chosen, everything, everything, last)
        return
    sizes = {name: size for name, size in every.items() if not chosen.leaves_whole(name)}
    total, least = sum(sizes.values()), sum(budgets.minimum_kept(sizes, chosen.min_share).values())
    density = chosen.plan(visits).density[-1]
    if density * total < least - 1e-6:
        raise tables.ConfigError(
            chosen.share_field,
            why=f"shall remove {1 - density:.4g} of {total} channels, but "
            f"min_share={chosen.min_share} keeps {least} of them, at least one of each group",
            allowed=f"up to {budgets.rounded_down(1 - least / total)}",
        )


def _scored(problem: Problem, chosen: Cut) -> dict[str, groups.Group]:
    """The groups that may be cut."""
    every = channels_of(problem, chosen.branches).groups
    return {name: group for name, group in every.items() if not chosen.leaves_whole(name)}


def _score(chosen: Cut, group: groups.Group) -> Callable:
    """`score(statistics, key)` of the group's channels."""
    names = ("aggregate", "use_l2", "use_init", "skip")
    options = {name: getattr(chosen, name) for name in names}
    return lambda statistics, key: scores.score(
        chosen.measure, statistics, group, key=key, **options
    )


def make_scores(problem: Problem, chosen: Cut) -> Callable:
    """`scores_of(state, key) -> {group: float [channels]}` of one member; compiled once for all
    rounds.
    """
    needs, sizes = chosen.needed, channels_of(problem, chosen.branches).sizes
    scored = _scored(problem, chosen)

    def loss(variables: PyTree, batch: tuple, temperature: Array) -> Array:
        # no part of gradients and Hessian products
        fixed = jax.lax.stop_gradient(variables["batch_stats"])
        logits = problem.model.apply({**variables, "batch_stats": fixed}, problem.images(batch[0]))
        return losses.cross_entropy(logits / temperature, batch[1]).mean()

    examples = problem.examples("train", chosen.imp_samples)
    balanced = _balanced_examples(problem, len(examples[1])) if chosen.balanced else None
    temperatures = ("temperature", "grasp_temperature", "preserve_temperature")
    collect = scores.gather(
        loss,
        needs,
        chosen.batch_size,
        on_host=stages.on_host(problem),
        **{name: getattr(chosen, name) for name in temperatures},
    )

    @jax.jit
    def score(statistics: scores.Statistics, key: Array) -> dict[str, Array]:
        return {
            name: _score(chosen, group)(statistics, jax.random.fold_in(key, i))
            for i, (name, group) in enumerate(scored.items())
        }

    def scores_of(state: State, key: Array) -> dict[str, np.ndarray]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        init = None
        if "w0" in needs:
            init = train.initial_variables(problem, state.key, problem.pretrained)
        statistics = collect(variables, examples, balanced=balanced, init=init)
        if "saliency" in needs:
            statistics = statistics._replace(saliency={"params": state.opt_state.saliency})
        result = {name: np.ones(size) for name, size in sizes.items()}
        for name, values in score(statistics, key).items():
            result[name] = np.asarray(values, np.float64)
        return result

    return scores_of


def _balanced_examples(problem: Problem, most: int) -> tuple[Any, Any]:
    """(images, labels) of up to `most` train examples, equally many of every class."""
    classes, labels = problem.dataset.num_classes, np.asarray(problem.dataset.train.labels)
    rarest = int(np.bincount(labels, minlength=classes).min())
    order = problem.sample.order(len(labels))
    index = order[scores.class_balanced(labels[order], classes, min(most, classes * rarest))]
    return problem.train_images[index], problem.train_labels[index]


def select(
    problem: Problem,
    chosen: Cut,
    importance: Mapping[str, Any],
    alive: Mapping[str, Any],
    place: Place,
) -> Keep:
    """Which channels stay after this round; raises ConfigError where that cannot be."""
    sizes = channels_of(problem, chosen.branches).sizes
    floors = budgets.minimum_kept(sizes, chosen.min_share)
    limits = budgets.Limits(alive=alive, floors=floors, protect=chosen.protect)
    if chosen.exclude:
        limits["exclude"] = chosen.exclude
    try:
        if chosen.rules:
            counts = _counts_by_rule(chosen, sizes, place)
            keep = budgets.select_to_counts(importance, counts, **limits)
        elif chosen.budget == "channels":
            ratio = _share_of_round(chosen, sizes, alive, place)
            keep = budgets.select(importance, ratio, **limits)
        else:
            channels = channels_of(problem, chosen.branches)
            price = cost.of_channels(channels, chosen.budget)
            full = price({name: np.ones(size, bool) for name, size in sizes.items()})
            density = float(chosen.plan(place.visits).density[place.visit - 1])
            keep = budgets.select_to_cost(importance, price, density * full, **limits)
    except ValueError as error:
        raise tables.ConfigError(
            chosen.share_field, why=f"removes too much in round {place.visit}: {error}"
        ) from None
    if chosen.multiple > 1:
        multiple = chosen.multiple
        keep = budgets.round_to_multiple(keep, importance, multiple, alive=alive, floors=floors)
    return keep


def _counts_by_rule(chosen: Cut, sizes: Mapping[str, int], place: Place) -> dict[str, int]:
    """How many channels of each group are left after a round."""
    counts = dict(sizes)
    for name, share in trees.match_rules(sizes, chosen.rules).items():
        if not chosen.leaves_whole(name):
            density = float(chosen.plan(place.visits, share).density[place.visit - 1])
            counts[name] -= masks.count_of(1 - density, sizes[name], "floor")
    return counts


def _share_of_round(
    chosen: Cut, sizes: Mapping[str, int], alive: Mapping[str, Any], place: Place
) -> float:
    """The share of the channels alive that a round removes."""
    plan, i = chosen.plan(place.visits), place.visit - 1
    # of the whole, where what is left is not what the earlier rounds asked for
    if chosen.schedule.get("cumulative") == "truncated" or chosen.multiple > 1:
        counted = [name for name in sizes if not chosen.leaves_whole(name)]
        living = sum(int(alive[name].sum()) for name in counted)
        total = sum(sizes[name] for name in counted)
        return budgets.ratio_to_reach(float(plan.density[i]), total, living)
    return float(plan.ratios[i])


# compact ------------------------------------------------------------------------------------------


@tables.option
class Compact(interface.Stage):
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

    def run(
        self,
        problem: Problem,
        state: State,
        settings: Sequence[Any],
        place: Place,
        rows: list[list[dict]],
    ) -> Iterator[Update]:
        found = []
        for i, member in members_of(problem, state):
            try:
                row = take_stock(problem, member, settings[i])
            except tables.ConfigError as error:  # an emptied layer
                row = dict(warning=f"the network cannot be compacted: {error}")
            if row["warning"]:
                workdirs.say(f"{place.name}: {row['warning']}")
            found.append([row])
        yield Update(state, found, 1.0)


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
    keep: dict[str, np.ndarray]
    channels: Channels


def compacted(problem: Problem, state: State) -> Stock:
    """One member's network, compacted."""
    channels = channels_of(problem)
    keep = units.alive(channels, {"params": state.masks})
    for name, bools in keep.items():
        if not bools.any():
            raise tables.ConfigError(
                f"all channels of {name} are masked: nothing is left to compact."
            )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    small = groups.compact(variables, channels, keep)
    return Stock(small, groups.elastic(problem.model.apply, channels, keep), keep, channels)


def take_stock(problem: Problem, state: State, chosen: Compact) -> dict[str, Any]:
    """Accuracy, size and time of one member's network, dense (masked) and compact, as fields of a
    row.
    """
    stock = compacted(problem, state)
    full = {"params": state.params, "batch_stats": state.batch_stats}
    networks = {
        "dense": (jax.jit(problem.model.apply), full),
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
    for (apply, variables), end in zip(networks.values(), ("", "_compact"), strict=True):
        row[f"parameters{end}"] = cost.num_params(variables)
        row[f"flops{end}"] = cost.flops(apply, variables, image).products
        row[f"bytes{end}"] = cost.num_bytes(variables)
    if chosen.repeats:
        row |= _measured_times(networks, images, chosen.repeats)
    return row


def _measured_times(
    networks: Mapping[str, tuple[Callable, PyTree]], images: Array, repeats: int
) -> dict[str, Any]:
    candidates = {
        name: (apply, (variables, images)) for name, (apply, variables) in networks.items()
    }
    pair = cost.compare(candidates, repeats=repeats)
    row = dict(
        batch_size=len(images),
        speedup=pair.speedup,
        speedup_low=pair.speedup_low,
        speedup_high=pair.speedup_high,
        verdict=pair.verdict,
        device=jax.devices()[0].device_kind,
    )
    for field, quantile in (("", "median"), ("_low", "low"), ("_high", "high")):
        row[f"milliseconds{field}"] = {
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
