"""Stages of structured pruning: `cut` removes channels in rounds, `compact` takes stock of the
network without them.

While pruning, removed channels are masked: shapes stay, and all rounds share their compiled
programs. The coupled channels come from the trace of the network (`groups`), so any network of the
zoo can be cut.
Source: Lubana and Dick 2021, arXiv:2009.11839, and its published code; see `scores` and `budgets`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    workdirs,
)

PyTree = Any


def channels_of(problem: train.Problem, branches: str = "tied") -> groups.Channels:
    """The channel groups of the run's network."""
    image = jax.ShapeDtypeStruct((2, *problem.dataset.test.images.shape[1:]), jnp.float32)
    variables = jax.eval_shape(problem.init, jax.random.key(0))
    make = lambda: groups.trace(problem.model.apply, variables, image, branches=branches)
    return problem.once(("channels", branches), make)


def alive_channels(channels: groups.Channels, kept: PyTree) -> dict[str, np.ndarray]:
    """Channels that some array which makes them still has; kept: masks in the structure of the
    params.
    """
    leaves = {f"params/{path}": np.asarray(leaf) for path, leaf in trees.named_leaves(kept).items()}
    result = {}
    for name, group in channels.groups.items():
        members = [m for m in group.members if m.path in leaves]
        members = [m for m in members if m.role != "consumer"] or members
        own = np.zeros(group.size, bool)
        for member in members:
            leaf = np.moveaxis(leaves[member.path], member.axis, 0)
            own |= leaf.reshape(len(leaf), -1).any(1)[member.index].any(1)
        result[name] = own
    return result


def members_of(problem: train.Problem, state: train.State) -> Iterator[tuple[int, train.State]]:
    """Every member's own state, without the leading axis of a sweep."""
    for i in range(problem.members or 1):
        yield (
            i,
            state if problem.members is None else jax.tree.map(lambda leaf, i=i: leaf[i], state),
        )


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
    temperature: divides the logits, those of Hessian products have their own.
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
    ratio: tables.Fraction = 0.75
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
    rules: tuple[tuple[str, tables.Fraction], ...] = ()

    def check(self) -> None:
        tables.lookup(scores.MEASURES, self.measure, "measure")
        trees.check_pattern(self.exclude, "exclude")
        trees.check_pattern(self.skip, "skip")
        if self.rules:
            self._check_rules()
        _needs(self)
        with tables.blaming(""):
            self.plan(1)
        for i, (_, share) in enumerate(self.rules):
            with tables.blaming(f"rules[{i}]", share):
                self.plan(1, share)

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
        with tables.blaming(""):
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

    def check_network(self, problem: train.Problem, visits: int) -> None:
        check_network(problem, self, visits)

    def rounds(self) -> dict[str, Any]:
        """The schedule's fields, its thresholds a tuple."""
        fields = {"name": "gradient_flow", **self.schedule}
        if isinstance(fields.get("thresholds"), list):
            fields["thresholds"] = tuple(fields["thresholds"])
        return fields

    @property
    def balanced(self) -> bool:
        """Whether its scores need equally many examples of every class."""
        return any(name.startswith("hg") for name in _needs(self))

    def plan(self, num_rounds: int, ratio: float | None = None) -> budgets.Rounds:
        """ratio: of one group, instead of that of the whole network."""
        fields = self.rounds()
        if fields["name"] != "manual":
            fields |= dict(ratio=self.ratio if ratio is None else ratio, num_rounds=num_rounds)
        return budgets.schedule(**fields)

    @property
    def share_field(self) -> str:
        """The field that says how much is removed."""
        if self.rules:
            return "rules"
        return "schedule.thresholds" if self.rounds()["name"] == "manual" else "ratio"

    def begin(self, problem, state, settings, place) -> train.State:
        return interface.handed_on(state, self)

    def carried(self, state: train.State, before: Any) -> Any:
        return before

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        found, parts = interface.rows_per_member(problem), []
        for i, own in members_of(problem, state):
            chosen = settings[i]
            channels = channels_of(problem, chosen.branches)
            make = lambda chosen=chosen: make_scores(problem, chosen)
            scores_of = problem.once(
                ("scores", dataclasses.replace(chosen, ratio=0.0, schedule=tables.Options())), make
            )
            key = train.stage_key(own.key, place.position)
            alive = alive_channels(channels, own.masks)
            importance = scores_of(own, key)
            keep = _select_or_say(problem, chosen, importance, alive, place)

            def cut(own, keep, channels=channels):
                tree = dict(params=own.masks, batch_stats=own.batch_stats)
                tree = groups.mask(tree, channels, keep)
                carried = own.opt_state and groups.mask(own.opt_state, channels, keep)
                params = masks.apply(own.params, tree["params"])
                return own._replace(
                    params=params,
                    masks=tree["params"],
                    batch_stats=tree["batch_stats"],
                    opt_state=carried,
                )

            compiled = problem.once(("cut channels", chosen.branches), lambda cut=cut: jax.jit(cut))
            parts.append(compiled(own, {name: jnp.asarray(k) for name, k in keep.items()}))
            num, total = sum(int(k.sum()) for k in keep.values()), sum(channels.sizes.values())
            found[i].append(
                dict(
                    measure=chosen.measure,
                    ratio=1 - num / total,
                    budget=chosen.budget,
                    round=place.visit,
                    num_kept=num,
                    num_channels=total,
                    kept={name: int(k.sum()) for name, k in keep.items()},
                    sizes=channels.sizes,
                    **(dict(layout=groups.layout(channels)) if place.visit == 1 else {}),
                )
            )
        together = (
            parts[0]
            if problem.members is None
            else jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        )
        yield train.Update(together, found, 1.0)


def check_network(problem: train.Problem, chosen: Cut, visits: int = 1) -> None:
    """Raises ConfigError for `visits` rounds that do not fit the network or its data."""
    channels, size = channels_of(problem, chosen.branches), problem.size("train")
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
    if min(chosen.imp_samples, size) < problem.dataset.num_classes and chosen.balanced:
        raise tables.ConfigError(
            "imp_samples", chosen.imp_samples, why="fewer than one of each class"
        )


def _check_readable(problem: train.Problem, chosen: Cut) -> None:
    """Raises ConfigError if the measure reads arrays that some groups lack, such as the scale of a
    norm.
    """
    params, found = {"params": train.shapes_of(problem)}, {}
    statistics = scores.Statistics(*[params] * len(scores.Statistics._fields))
    groups_of = channels_of(problem, chosen.branches).groups
    scored = {name: group for name, group in groups_of.items() if not _excluded(chosen, name)}
    for name, group in scored.items():
        try:
            jax.eval_shape(_score(chosen, group), statistics, jax.random.key(0))
        except ValueError as error:
            found[name] = error
    if found:
        pattern = "|".join([*filter(None, [chosen.exclude]), *map(re.escape, found)])
        hint = (
            f" To leave such groups whole, set exclude={pattern!r}."
            if len(found) < len(scored)
            else ""
        )
        of_norms = scores.MEASURES[chosen.measure].on in ("scale", "norm")
        hint += (
            " Measures of kernels read any group."
            if of_norms
            else " Or set aggregate='sum', or another skip."
        )
        raise tables.ConfigError(
            "measure", chosen.measure, why=f"{next(iter(found.values()))}{hint}"
        )


def _check_reach(problem: train.Problem, chosen: Cut, visits: int) -> None:
    """Raises ConfigError if the minimum kept of each group does not allow what the last round shall
    leave.

    It depends on no score, but for `protect='original_resnet'`, which removes less than asked
    instead.
    """
    sizes = {
        n: size
        for n, size in channels_of(problem, chosen.branches).sizes.items()
        if not _excluded(chosen, n)
    }
    total, least = sum(sizes.values()), sum(budgets.minimum_kept(sizes, chosen.min_share).values())
    density = chosen.plan(visits).density[-1]
    if chosen.protect == "original_resnet":
        return
    if chosen.budget == "channels" and not chosen.rules:
        if density * total < least - 1e-6:
            limit = budgets.rounded_down(1 - least / total)
            raise tables.ConfigError(
                chosen.share_field,
                why=f"shall remove {1 - density:.4g} of {total} channels, but "
                f"min_share={chosen.min_share} keeps {least} of them, at least one of each group",
                allowed=f"up to {limit}",
            )
        return
    everything = {
        name: np.ones(size, bool)
        for name, size in channels_of(problem, chosen.branches).sizes.items()
    }
    place = interface.Place("", 0, {}, (), visits, visits)
    _select_or_say(problem, chosen, everything, everything, place)


def _score(chosen: Cut, group: groups.Group) -> Callable:
    """`score(statistics, key)` of the group's channels."""
    options = dict(
        aggregate=chosen.aggregate, use_l2=chosen.use_l2, use_init=chosen.use_init, skip=chosen.skip
    )
    return lambda statistics, key: scores.score(
        chosen.measure, statistics, group, key=key, **options
    )


def _needs(chosen: Cut) -> tuple[str, ...]:
    return scores.required(chosen.measure, use_l2=chosen.use_l2, use_init=chosen.use_init)


def make_scores(problem: train.Problem, chosen: Cut) -> Callable:
    """`scores_of(state, key) -> {group: float [channels]}` of one member; compiled once for all
    rounds.
    """
    needs, channels = _needs(chosen), channels_of(problem, chosen.branches)
    on_host = stages.on_host(problem)
    scored = {name: group for name, group in channels.groups.items() if not _excluded(chosen, name)}

    def loss(variables, batch, temperature):
        fixed = jax.lax.stop_gradient(
            variables["batch_stats"]
        )  # no part of gradients and Hessian products
        logits = problem.model.apply({**variables, "batch_stats": fixed}, problem.images(batch[0]))
        return losses.cross_entropy(logits / temperature, batch[1]).mean()

    images, labels = problem.examples("train", chosen.imp_samples)
    balanced = None
    if chosen.balanced:
        classes, known = problem.dataset.num_classes, problem.dataset.train.labels
        rarest = int(np.bincount(known, minlength=classes).min())
        order = problem.sample.order(len(known))
        index = order[
            scores.class_balanced(known[order], classes, min(len(labels), classes * rarest))
        ]
        balanced = (problem.train_images[index], problem.train_labels[index])
    collect = scores.gather(
        loss,
        needs,
        chosen.batch_size,
        temperature=chosen.temperature,
        grasp_temperature=chosen.grasp_temperature,
        preserve_temperature=chosen.preserve_temperature,
        on_host=on_host,
    )

    @jax.jit
    def score(statistics, key):
        return {
            name: _score(chosen, group)(statistics, jax.random.fold_in(key, i))
            for i, (name, group) in enumerate(scored.items())
        }

    def scores_of(state, key):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        init = (
            train.initial_variables(problem, state.key, problem.pretrained)
            if "w0" in needs
            else None
        )
        statistics = collect(variables, (images, labels), balanced=balanced, init=init)
        if "saliency" in needs:
            statistics = statistics._replace(saliency={"params": state.opt_state.saliency})
        found = {name: np.asarray(own, np.float64) for name, own in score(statistics, key).items()}
        return found | {
            name: np.ones(g.size) for name, g in channels.groups.items() if name not in scored
        }

    return scores_of


def _excluded(chosen: Cut, name: str) -> bool:
    return bool(chosen.exclude) and re.fullmatch(chosen.exclude, name) is not None


def select(
    problem: train.Problem, chosen: Cut, found: dict, alive: dict, place: interface.Place
) -> dict[str, np.ndarray]:
    """Which channels stay after this round."""
    channels, plan = channels_of(problem, chosen.branches), chosen.plan(place.visits)
    sizes, i = channels.sizes, place.visit - 1
    common = dict(
        alive=alive,
        floors=budgets.minimum_kept(sizes, chosen.min_share),
        protect=chosen.protect,
        exclude=chosen.exclude or None,
    )
    if chosen.rules:
        counts = {}
        for name, share in trees.match_rules(sizes, chosen.rules).items():
            density = (
                1.0
                if _excluded(chosen, name)
                else float(chosen.plan(place.visits, share).density[i])
            )
            counts[name] = sizes[name] - masks.count_of(1 - density, sizes[name], math.floor)
        del common["exclude"]
        keep = budgets.select_to_counts(found, counts, **common)
    elif chosen.budget == "channels":
        counted = [name for name in sizes if not _excluded(chosen, name)]
        ratio = float(plan.ratios[i])
        # of the whole, where what is left is not what the earlier rounds asked for
        if chosen.schedule.get("cumulative") == "truncated" or chosen.multiple > 1:
            living = sum(int(alive[name].sum()) for name in counted)
            ratio = budgets.ratio_to_reach(
                float(plan.density[i]), sum(sizes[name] for name in counted), living
            )
        keep = budgets.select(found, ratio, **common)
    else:
        price = cost.of_channels(channels, chosen.budget)
        full = price({name: np.ones(size, bool) for name, size in sizes.items()})
        keep = budgets.select_to_cost(found, price, float(plan.density[i]) * full, **common)
    if chosen.multiple > 1:
        keep = budgets.round_to_multiple(
            keep, found, chosen.multiple, alive=alive, floors=common["floors"]
        )
    return keep


def _select_or_say(problem, chosen, importance, alive, place):
    try:
        return select(problem, chosen, importance, alive, place)
    except ValueError as error:
        raise tables.ConfigError(
            chosen.share_field,
            why=f"removes too much in round {place.visit}: {error}",
        ) from None


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

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        found = []
        for i, own in members_of(problem, state):
            try:
                row = take_stock(problem, own, settings[i])
            except tables.ConfigError as error:  # an emptied layer
                row = dict(warning=f"the network cannot be compacted: {error}")
            if row["warning"]:
                workdirs.say(f"{place.name}: {row['warning']}")
            found.append([row])
        yield train.Update(state, found, 1.0)


def rounding_of(problem: train.Problem) -> float:
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
    channels: groups.Channels


def compacted(problem: train.Problem, state: train.State) -> Stock:
    """One member's network, compacted."""
    channels = channels_of(problem)
    keep = alive_channels(channels, state.masks)
    for name, own in keep.items():
        if not own.any():
            raise tables.ConfigError(
                f"all channels of {name} are masked: nothing is left to compact."
            )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    small = groups.compact(variables, channels, keep)
    return Stock(small, groups.elastic(problem.model.apply, channels, keep), keep, channels)


def take_stock(problem: train.Problem, state: train.State, chosen: Compact) -> dict[str, Any]:
    """Accuracy, size and time of one member's network, dense (masked) and compact, as fields of a
    row.
    """
    stock = compacted(problem, state)
    full = {"params": state.params, "batch_stats": state.batch_stats}
    dense, small = jax.jit(problem.model.apply), jax.jit(stock.apply)
    images = problem.images(problem.examples("test", chosen.batch_size)[0])
    masked, compact = dense(full, images), small(stock.variables, images)
    error = float(jnp.max(jnp.abs(masked - compact)) / jnp.maximum(jnp.max(jnp.abs(masked)), 1e-30))
    tolerance = chosen.tolerance or rounding_of(problem)
    warning = ""
    if not error <= tolerance:
        warning = (
            f"the compact network's logits differ from the masked one's by {error:.2g} of the "
            "largest, more than the "
            f"{tolerance:g} that count as rounding in {jnp.dtype(problem.model.dtype).name}"
        )
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    flops = lambda apply, variables: cost.flops(apply, variables, one).products
    row = dict(
        accuracy=accuracy(problem, stock),
        difference=error,
        tolerance=tolerance,
        warning=warning,
        parameters=cost.num_params(full),
        parameters_compact=cost.num_params(stock.variables),
        flops=flops(problem.model.apply, full),
        flops_compact=flops(stock.apply, stock.variables),
        bytes=cost.num_bytes(full),
        bytes_compact=cost.num_bytes(stock.variables),
        kept={name: int(own.sum()) for name, own in stock.keep.items()},
        sizes=stock.channels.sizes,
    )
    if chosen.repeats:
        pair = {"dense": (dense, (full, images)), "compact": (small, (stock.variables, images))}
        pair = cost.compare(pair, repeats=chosen.repeats)
        row |= dict(
            batch_size=len(images),
            milliseconds={name: 1e3 * one.median for name, one in pair.latencies.items()},
            milliseconds_low={name: 1e3 * one.low for name, one in pair.latencies.items()},
            milliseconds_high={name: 1e3 * one.high for name, one in pair.latencies.items()},
            speedup=pair.speedup,
            speedup_low=pair.speedup_low,
            speedup_high=pair.speedup_high,
            verdict=pair.verdict,
            device=jax.devices()[0].device_kind,
        )
    return row


def accuracy(problem: train.Problem, stock: Stock) -> float:
    """Of the compact network on the test set."""
    compact = problem._replace(
        model=problem.model._replace(apply=stock.apply), members=None, compiled={}
    )
    found = train.measure(
        compact, stock.variables["params"], stock.variables["batch_stats"], "test"
    )
    size = problem.size("test") - len(found.unreadable)
    return round(float(found.accuracy) * size) / size  # not rounded to float32


STAGES = (Cut, Compact)
