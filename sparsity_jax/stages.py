"""The stages a pipeline is made of: each turns a state into a state and rows, and says how to check
its options.

See `interface` for what a stage is.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import (
    allocate,
    data,
    gradinit,
    groups,
    interface,
    losses,
    masks,
    optim,
    polytopes,
    stopping,
    tables,
    train,
    trees,
)

PyTree = Any
RATIOS = (
    0.0,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.91,
    0.92,
    0.93,
    0.94,
    0.95,
    0.96,
    0.97,
    0.98,
    0.99,
)


def member_state(problem: train.Problem, state: train.State, member: int) -> train.State:
    """One member's state between two stages."""
    state = interface.without_optimizer(state)
    return state if problem.members is None else jax.tree.map(lambda leaf: leaf[member], state)


# train --------------------------------------------------------------------------------------------


def no_tracker() -> None:
    """Tracks nothing."""


def saliency_tracker(
    *,
    alpha: tables.Fraction = 0.8,
    track_batches: tables.Count = 20,
    use_l2: bool = False,
    use_init: bool = False,
) -> None:
    """Options of `scores.track_saliency` of `scores.weight_saliency`; use_init: relative to the
    initial weights.
    """


TRACKERS = {"none": no_tracker, "saliency": saliency_tracker}


@tables.option
class Train(interface.Stage):
    """Trains the network.

    start: go on from the current weights, or from the run's initial ones, without masks (several
        arms of a comparison).
    shift_inside: moves the weights into the feasible sets first. evaluate_every: epochs between
    evaluations on the test set.
    carry: goes on with the momentum of the training before it if that has carry too, also through
    stages of kind `cut`, and no others (sgd only).
    track: `dict(name="saliency", alpha=0.8, track_batches=20, use_l2=False, use_init=False)` keeps
    a running average of every weight's importance over the last batches of each epoch, for a cut by
    `biased_loss_tracked`.
    label: name of the trained network in the report (default: the stage's).
    """

    kind: ClassVar[str] = "train"
    trains: ClassVar[bool] = True
    epochs: tables.Count
    batch_size: tables.Count = 128
    optimizer: optim.Config
    loss: losses.Config = losses.CROSS_ENTROPY
    augment: str = "none"
    start: Literal["current", "init"] = "current"
    shift_inside: bool = True
    evaluate_every: tables.Count = 1
    carry: bool = False
    track: Annotated[dict, tables.Named(TRACKERS)] = tables.Options(name="none")
    label: str = ""

    def settings(self) -> train.Fit:
        with tables.within("loss"):
            loss = losses.checked(self.loss)
        tables.lookup(data.AUGMENTATIONS, self.augment, "augment")
        with tables.within("optimizer"):
            recipe = optim.check(self.optimizer)
        schedule, options = recipe.schedule
        with tables.blaming("optimizer.schedule"):  # options that do not fit the epochs
            optim.SCHEDULES[schedule](1.0, self.epochs, 10**6, **options)
        if self.carry and recipe.name != "sgd":
            raise tables.ConfigError(
                "carry", True, why=f"but the optimizer is {recipe.name!r}", allowed="with sgd"
            )
        with tables.within("track"):
            track = checked_tracker(self.track)
        return train.Fit(
            epochs=self.epochs,
            batch_size=self.batch_size,
            recipe=recipe,
            loss=loss,
            augment=self.augment,
            start=self.start,
            shift_inside=self.shift_inside,
            evaluate_every=self.evaluate_every,
            carry=self.carry,
            track=track,
        )


def checked_tracker(track: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options of a tracker, sorted pairs, () for none; raises ConfigError for ones that cannot
    work.
    """
    given = dict(track)
    tracker = tables.lookup(TRACKERS, given.pop("name", "none"), "name")
    options = {**tables.defaults(tracker), **tables.check_options(tracker, given)}
    if options.get("use_init") and not options["use_l2"]:
        raise tables.ConfigError(
            "use_init", True, why="which replaces the factor |w| of use_l2, but that is False"
        )
    return tuple(sorted(options.items()))


# sfw_init -----------------------------------------------------------------------------------------


@tables.option
class SfwInit(interface.Stage):
    """Learns one scale per parameter array so that one Frank-Wolfe step helps most (SFW-Init).

    constraint, learning_rate: as in the training that follows. Each iteration draws `batch_size`
    examples, an even number, for the inner step, keeps half of them and draws half anew for the
    objective.
    scale_learning_rate, min_scale, clip: of the scales. norms: how radii are measured, as in an
    optimizer.
    """

    kind: ClassVar[str] = "sfw_init"
    constraint: polytopes.Config = tables.Options(name="k_sparse")
    learning_rate: Annotated[float, tables.Range(0.0, 1.0, above=True)] = 1.0
    iterations: tables.Count = 390
    batch_size: Annotated[int, tables.Range(2)] = 128
    scale_learning_rate: tables.Positive = 1e-3
    min_scale: tables.NonNegative = 0.01
    clip: tables.Positive = 1.0
    norms: Literal["per_parameter", "per_shape"] = "per_parameter"
    augment: str = "none"

    def recipe(self) -> optim.Recipe:
        """The Frank-Wolfe step as an optimizer; raises ConfigError."""
        fields = dict(
            learning_rate=self.learning_rate, constraint=self.constraint, norms=self.norms
        )
        return optim.check(dict(name="sfw", **fields))

    def check(self) -> None:
        self.recipe()
        tables.lookup(data.AUGMENTATIONS, self.augment, "augment")

    def check_streamed(self) -> None:
        raise interface.needs_memory("kind", self.kind, "which draws from all images in memory")

    def check_network(self, problem: train.Problem, visits: int) -> None:
        train.check_batch(self, problem)
        train.check_recipe(self.recipe(), problem)

    def together(self) -> tuple:
        same = dataclasses.replace(self, constraint=tables.Options(), learning_rate=1.0)
        return same, optim.program(self.recipe())

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        chosen, chunk = self, 10
        numbers = train.numbers_of(problem, state, [own.recipe() for own in settings])
        size, half = problem.size("train"), chosen.batch_size // 2
        augment = data.make_augmentation(chosen.augment, problem.dataset)

        def loss(params, batch_stats, batch):
            logits, _ = problem.model.apply_train(
                {"params": params, "batch_stats": batch_stats}, *batch[:1], batch[2]
            )
            return losses.cross_entropy(logits, batch[1]).mean()

        def iterate(scales, state, numbers, images, labels):
            keys = jax.random.split(
                jax.random.fold_in(train.stage_key(state.key, place.position), scales.step), 4
            )
            index = jax.random.choice(keys[0], size, (3 * half,), replace=size < 3 * half)
            inputs, targets = problem.images(augment(keys[1], images[index])), labels[index]
            batch = lambda *parts: tuple(
                jnp.concatenate([array[p * half : (p + 1) * half] for p in parts])
                for array in (inputs, targets)
            )
            step = gradinit.scale_step(
                lambda params, batch: loss(params, state.batch_stats, batch),
                numbers["sets"],
                learning_rate=numbers["learning_rate"],
                scale_learning_rate=chosen.scale_learning_rate,
                min_scale=chosen.min_scale,
                clip=chosen.clip,
            )
            scales, metrics = step(scales, (*batch(0, 1), keys[2]), (*batch(0, 2), keys[3]))
            return scales, (metrics.loss_before, metrics.loss_after)

        axes = (0, 0, 0, None, None)
        name = ("sfw_init", place.position, chosen.together())
        compiled = problem.once(name, lambda: jax.jit(problem.lift(iterate, axes)))
        scales = problem.once("scales", lambda: jax.jit(problem.lift(gradinit.init)))(state.params)
        for i in range(chosen.iterations):
            stopping.check()
            scales, (before, after) = compiled(
                scales, state, numbers, problem.train_images, problem.train_labels
            )
            if (i + 1) % chunk == 0 or i == 0 or i + 1 == chosen.iterations:
                found = train.member_rows(
                    problem, dict(loss_before=before, loss_after=after), iteration=i + 1
                )
                if not all(np.isfinite(row[0]["loss_after"]) for row in found):
                    raise train.NonFiniteLossError(
                        f"{place.name}: the loss is not finite at iteration {i + 1}."
                    )
                finished = i + 1 == chosen.iterations
                # the scales are not part of the state: an interrupted stage starts anew and finds
                # the same ones
                yield train.Update(
                    state._replace(params=scales.params) if finished else None,
                    found,
                    (i + 1) / chosen.iterations,
                )


# prune --------------------------------------------------------------------------------------------


@tables.option
class Selecting(interface.Stage):
    """A stage that selects what to prune. Empty options are the default of their selection.

    selection: `global`, `layerwise`, `random` or `structured`.
    scope: `kernels` or `all` arrays.
    count: how counts are rounded, see `allocate.keep_counts`.
    granularity: of `structured`, whole filters (output channels) or input channels.
    layer_ratios: of `layerwise` and `structured`, how the ratio is shared among layers.
    layers: of `structured`, `all` layers or `convolutions` only.
    include, exclude: patterns of whole paths of arrays that are kernels, or are none.
    """

    selection: str = "global"
    scope: Literal["", "kernels", "all"] = ""
    count: Literal["", "nearest", "per_layer", "original", "ceil"] = ""
    granularity: Literal["", "filter", "channel"] = ""
    layer_ratios: Literal["", "uniform", "erk", "erk_original"] = ""
    layers: Literal["", "convolutions", "all"] = ""
    include: str = ""
    exclude: str = ""

    def check(self) -> None:
        trees.check_pattern(self.include, "include")
        trees.check_pattern(self.exclude, "exclude")
        self.options()

    def options(self) -> dict[str, Any]:
        """The checked options of the selection; raises ConfigError."""
        given = {name: getattr(self, name) for name in SELECTING if name != "selection"}
        chosen = {name: value for name, value in given.items() if value}
        return allocate.check(self.selection, chosen)

    def keywords(self, problem: train.Problem) -> dict[str, Any]:
        """Keyword arguments of `allocate.keep_counts` and `keep_masks`."""
        channels = filters_of(problem) if self.selection == "structured" else None
        return dict(self.options(), selection=self.selection, channels=channels)

    def selecting(self, position: int) -> tuple:
        """What a compiled selection depends on; random masks also on the stage's `position` in the
        pipeline.
        """
        fields = tuple(getattr(self, name) for name in SELECTING)
        return (*fields, position if self.selection == "random" else 0)

    def check_network(self, problem: train.Problem, visits: int) -> None:
        with tables.blaming(""):
            allocate.keep_counts(train.shapes_of(problem), 0.0, **self.keywords(problem))


SELECTING = tuple(tables.parameters(Selecting))


@tables.option
class Prune(Selecting):
    """Prunes the network for good: later training keeps the pruned weights at zero, unless its
    start is `init`.

    `structured` removes the filters of each layer alone, also where a residual sum adds to them,
    with the scale and shift of the norm behind them and their bias.

    ratio: share removed, with what was pruned before.
    """

    kind: ClassVar[str] = "prune"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    ratio: tables.Fraction

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        options = self.keywords(problem)
        counts = allocate.keep_counts(train.shapes_of(problem), self.ratio, **options)

        def cut(state, counts):
            key = train.stage_key(state.key, place.position)
            kept = allocate.keep_masks(state.params, counts, key, before=state.masks, **options)
            params = masks.apply(state.params, kept)
            return state._replace(params=params, masks=kept), sparsity(params, kept, options)

        name = ("prune", *self.selecting(place.position))
        compiled = problem.once(name, lambda: jax.jit(problem.lift(cut, (0, None))))
        state, found = compiled(state, counts)
        common = dict(ratio=self.ratio, selection=self.selection)
        common |= dict(num_prunable=trees.size(choosable(train.shapes_of(problem), options)))
        yield train.Update(state, train.member_rows(problem, found, **common), 1.0)


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def check_weights(problem: train.Problem, state: train.State, where: str) -> None:
    """Raises NonFiniteLossError, naming member and array, unless weights and running statistics are
    finite.

    The runner hands every network on through here, so that no stage selects among NaN. where:
    begins the sentence.
    """
    if bool(_all_finite((state.params, state.batch_stats))):
        return
    for member in range(problem.members or 1):
        own = member_state(problem, state, member)
        named = f"{where}, member {member}" if problem.members else where
        try:
            trees.check_finite(dict(params=own.params, batch_stats=own.batch_stats), named)
        except ValueError as error:
            raise train.NonFiniteLossError(str(error)) from None


def on_host(problem: train.Problem) -> bool:
    """Whether batches should be compiled calls of their own, see `spectrum.over_batches`."""
    return train.convolves(train.shapes_of(problem)) and jax.default_backend() == "cpu"


def filters_of(problem: train.Problem) -> groups.Channels:
    """Channels of the network as a function of its params alone: each side of a residual sum may
    lose its own.
    """

    def make():
        variables = jax.eval_shape(problem.init, jax.random.key(0))
        fixed = {name: tree for name, tree in variables.items() if name != "params"}
        fixed = jax.tree.map(
            lambda leaf: np.ones(leaf.shape, leaf.dtype), fixed
        )  # statistics are never masked
        image = jax.ShapeDtypeStruct((2, *problem.dataset.test.images.shape[1:]), jnp.float32)
        apply = lambda params, images: problem.model.apply({**fixed, "params": params}, images)
        return groups.trace(apply, variables["params"], image, branches="separate")

    return problem.once("filters", make)


def sparsity(params: PyTree, kept: PyTree, options: dict[str, Any]) -> dict[str, Any]:
    """num_kept entries of the arrays that may be pruned; shares of zeros: `sparsity` in these
    arrays, `sparsity_all` in all parameters, and `layers` in every kernel; of structured selections
    `channels_removed`, their share."""
    alive = choosable(kept, options)
    num_kept = sum(jnp.sum(mask, dtype=jnp.int32) for mask in alive.values())
    chosen = {path: trees.named_leaves(params)[path] for path in alive}
    shares = dict(sparsity=masks.sparsity(chosen), sparsity_all=masks.sparsity(params))
    if options["selection"] == "structured":
        left, _ = allocate.left_by(kept, **options)
        shares["channels_removed"] = 1 - left / sum(
            jax.tree.leaves(allocate.keep_counts(params, 0.0, **options))
        )
    return dict(num_kept=num_kept, layers=layer_sparsity(params), **shares)


def choosable(tree: PyTree, options: dict[str, Any]) -> dict[str, Any]:
    """The arrays of `tree` that may be pruned."""
    patterns = {name: options.get(name, "") for name in ("include", "exclude")}
    return allocate.prunable(tree, options.get("scope", "kernels"), **patterns)


def layer_sparsity(params: PyTree) -> dict[str, jax.Array]:
    """Share of zeros in every kernel, by path."""
    return {
        path: masks.sparsity(leaf) for path, leaf in allocate.prunable(params, "kernels").items()
    }


# curve --------------------------------------------------------------------------------------------


@tables.option
class Curve(Selecting):
    """Accuracy and loss of the trained network pruned at every ratio; the network itself stays as
    it is.

    ratios: shares removed, with what was pruned before: a network of which more is gone than some
    of them starts the curve as it is, at the share that is gone, and has no rows below. splits:
    evaluated on.
    retrain: name of a `train` config to run at every ratio, from the same trained state, before
        evaluating.
    """

    kind: ClassVar[str] = "curve"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    ratios: tuple[tables.Fraction, ...] = RATIOS
    splits: tuple[Literal["test", "train"], ...] = ("test",)
    retrain: str = ""

    def check(self) -> None:
        super().check()
        for name in ("ratios", "splits"):
            if not getattr(self, name):
                raise tables.ConfigError(name, (), allowed="at least one")

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        # `state` without optimizer: then a curve after every training is the same program
        state = interface.without_optimizer(state)
        shapes, options = train.shapes_of(problem), self.keywords(problem)
        every = [allocate.keep_counts(shapes, ratio, **options) for ratio in self.ratios]
        points = curve_points(problem, state, self, every)
        measure = self.measuring(problem, place)
        retrain = self.retraining(problem, state, place) if self.retrain else None
        # results are fetched a few ratios late, so the device never waits for the host
        late = 1 if self.retrain else 16
        done = finished_points(points, [len(own) // len(self.splits) for own in rows])
        waiting: list[tuple[Point, Any]] = []
        for number, point in enumerate(points[done:], start=done + 1):
            stopping.check()
            pruned = retrain(point) if retrain else state
            waiting.append((point, measure(pruned, point.counts)))
            if len(waiting) >= late or number == len(points):
                yield train.Update(state, self.rows_of(problem, waiting), number / len(points))
                waiting = []

    def program(self, position: int) -> tuple:
        """What its compiled programs depend on. position: of the stage in the pipeline."""
        return (*self.selecting(position), self.splits, bool(self.retrain))

    def measuring(self, problem: train.Problem, place: interface.Place) -> Callable:
        """`measure(state, counts)`: what `pruned_results` gives, of all members."""
        inputs = split_arrays(problem, self.splits)
        axes = (0, None, *[None] * len(inputs))
        results = pruned_results(
            problem, self, self.splits, place.position, masked=bool(self.retrain)
        )
        name = ("curve", self.program(place.position))
        compiled = problem.once(name, lambda: jax.jit(problem.lift(results, axes)))
        return lambda state, counts: compiled(state, counts, *inputs)

    def retraining(
        self, problem: train.Problem, state: train.State, place: interface.Place
    ) -> Callable:
        """`retrain(point)`: the networks of `state`, pruned to the point and trained again."""
        prune = pruning(problem, self, place.position)
        name = ("cut", self.program(place.position))
        pruned = problem.once(name, lambda: jax.jit(problem.lift(prune, (0, None))))
        fits = place.others[self.retrain]
        numbers = train.numbers_of_fits(problem, state, fits)

        def retrain(point: "Point") -> train.State:
            kept = pruned(state, point.counts)
            current = train.begin_members(problem, state._replace(masks=kept), fits, numbers)
            where = f"{place.name}: {self.retrain} at ratio {min(point.ratios.values()):g}"
            for update in train.fit_epochs(
                problem, current, fits[0], numbers, place.position, where
            ):
                current = update.state
            return interface.without_optimizer(current)

        return retrain

    def rows_of(
        self, problem: train.Problem, waiting: Sequence[tuple["Point", Any]]
    ) -> list[list[dict]]:
        """Rows of the measured points, of each member that takes them."""
        options, rows = self.keywords(problem), interface.rows_per_member(problem)
        fixed = dict(
            num_prunable=trees.size(choosable(train.shapes_of(problem), options)),
            selection=self.selection,
            scope=options.get("scope", "kernels"),
            retrained=bool(self.retrain),
        )
        results = read_results(problem, self.splits, [result for _, result in waiting])
        for (point, _), (measured, extra) in zip(waiting, results, strict=True):
            for split in self.splits:
                values = {**measured[split], **extra}
                found = train.member_rows(problem, values, split=split, **fixed)
                for member, ratio in point.ratios.items():
                    (row,) = found[member]
                    rows[member].append(dict(row, ratio=ratio))
        return rows


def pruning(problem: train.Problem, chosen: Selecting, position: int) -> Callable:
    """`prune(state, counts) -> masks` of one member; position: of the stage in the pipeline, for
    random masks.
    """
    options = chosen.keywords(problem)

    def prune(state, counts):
        key = train.stage_key(state.key, position)
        return allocate.keep_masks(state.params, counts, key, before=state.masks, **options)

    return prune


def pruned_results(
    problem: train.Problem,
    chosen: Selecting,
    splits: Sequence[str],
    position: int,
    *,
    masked: bool = False,
) -> Callable:
    """`measure(state, counts, *arrays of every split) -> (loss and accuracy by split, more)` of one
    member.

    On streamed data `measure(state, counts) -> (params and batch_stats to evaluate, more)`. masked:
    whether states are pruned already. position: of the stage in the pipeline, for random masks.
    """
    prune, options = pruning(problem, chosen, position), chosen.keywords(problem)
    evaluators = {
        split: train.evaluation(problem, split) for split in splits if not problem.streamed
    }

    def measure(state, counts, *arrays):
        """Results on all splits of the network pruned to `counts`: one program for all ratios."""
        kept = state.masks if masked else prune(state, counts)
        params, found = masks.apply(state.params, kept), {}
        if problem.streamed:
            found = params, state.batch_stats
        for i, (split, evaluate) in enumerate(evaluators.items()):
            loss, accuracy = evaluate(params, state.batch_stats, *arrays[2 * i : 2 * i + 2])
            found[split] = dict(loss=loss, accuracy=accuracy)
        return found, sparsity(params, kept, options)

    return measure


def split_arrays(problem: train.Problem, splits: Sequence[str]) -> list[jax.Array]:
    """Images and labels of every split, one after the other; none of streamed ones."""
    return [
        array for split in splits for array in train.arrays(problem, split) if not problem.streamed
    ]


def read_results(
    problem: train.Problem, splits: Sequence[str], results: list[tuple]
) -> list[tuple]:
    """Results of `measure` with losses and accuracies; streamed splits are read once for all of
    them.
    """
    if not problem.streamed:
        return results
    sums = problem.once("sums", lambda: jax.jit(train.batch_sums(problem)))
    looks, found = (
        [functools.partial(sums, *variables) for variables, _ in results],
        [{} for _ in results],
    )
    for split in splits:
        for own, (loss, accuracy) in zip(
            found, train.over_stream(problem, split, looks)[0], strict=True
        ):
            own[split] = dict(loss=loss, accuracy=accuracy)
    return [(own, more) for own, (_, more) in zip(found, results, strict=True)]


def pruned_evaluation(
    problem: train.Problem,
    state: train.State,
    chosen: Selecting,
    place: interface.Place,
    member: int,
    split: str,
) -> Callable[[float], dict[str, float]]:
    """`evaluate(ratio) -> dict(accuracy, loss)` of one member on a split: one program for all
    ratios.
    """
    state = member_state(problem, state, member)
    measure = pruned_results(problem, chosen, (split,), place.position)
    compiled = problem.once(
        ("pruned evaluation", split, chosen.selecting(place.position)), lambda: jax.jit(measure)
    )
    inputs, shapes = split_arrays(problem, (split,)), train.shapes_of(problem)
    options = chosen.keywords(problem)

    def evaluate(ratio):
        counts = allocate.keep_counts(shapes, ratio, **options)
        ((found, _),) = read_results(problem, (split,), [compiled(state, counts, *inputs)])
        return {name: float(value) for name, value in found[split].items()}

    return evaluate


class Point(NamedTuple):
    """A ratio of a curve. counts: of `allocate.keep_counts`. ratios: as rows give it, by member
    that takes it.
    """

    counts: PyTree
    ratios: dict[int, float]


def curve_points(
    problem: train.Problem, state: train.State, chosen: Curve, counts: list[PyTree]
) -> list[Point]:
    """The ratios of a curve that are not below what each member's masks have removed already.

    counts: of all ratios. Where some are below, one point comes first: the network as it is, at the
        share removed.
    """
    look = lambda kept: allocate.left_by(kept, **chosen.keywords(problem))
    compiled = problem.once(("left", chosen.selecting(0)), lambda: jax.jit(problem.lift(look)))
    number, share = (np.atleast_1d(values) for values in jax.device_get(compiled(state.masks)))
    totals = [sum(jax.tree.leaves(own)) for own in counts]
    points, starts = [], {}
    for ratio, own, total in zip(chosen.ratios, counts, totals, strict=True):
        takes = {}
        for member, left in enumerate(number.tolist()):
            reached = (
                chosen.selection != "structured" or ratio >= share[member] or share[member] == 0
            )
            if total <= left and reached:
                takes[member] = ratio
            elif left not in totals:
                starts[member] = float(share[member])
        if takes:
            points.append(Point(own, takes))
    if starts:
        whole = allocate.keep_counts(train.shapes_of(problem), 0.0, **chosen.keywords(problem))
        points.insert(0, Point(whole, starts))
    return points


def finished_points(points: list[Point], numbers: list[int]) -> int:
    """How many points are done if each member has so many."""
    done = 0
    for member, number in enumerate(numbers):
        own = [i for i, point in enumerate(points) if member in point.ratios]
        done = max(done, own[number - 1] + 1 if number else 0)
    return done


# histogram ----------------------------------------------------------------------------------------


@tables.option
class Histogram(interface.Stage):
    """Histogram of weight magnitudes.

    Counts above 0, 10, 1, 0.1, ... down to 1e-10 (the original's bins), and `bins` equal bins of
    log10 |w| from 1e-12 to 100 for the figure. scope: `all` parameters (as the original) or
    `kernels`.
    """

    kind: ClassVar[str] = "histogram"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    scope: allocate.Scope = "all"
    bins: tables.Count = 60

    def run(self, problem, state, settings, place, rows) -> Iterator[train.Update]:
        count = problem.once(
            ("histogram", self),
            lambda: jax.jit(
                problem.lift(lambda params: magnitude_histogram(params, self.scope, self.bins))
            ),
        )
        common = dict(
            threshold=magnitude_thresholds(), edges=np.linspace(-12, 2, self.bins + 1).tolist()
        )
        found = train.member_rows(problem, count(state.params), scope=self.scope, **common)
        yield train.Update(state, found, 1.0)


def magnitude_thresholds() -> list[float]:
    """0, then 10, 1, 0.1, ... by repeated division while above 1e-10, as the original computes
    them.
    """
    thresholds, value = [0.0], 10.0
    while value > 1e-10:
        thresholds.append(value)
        value /= 10
    return thresholds


def magnitude_histogram(params: PyTree, scope: str = "all", bins: int = 60) -> dict[str, jax.Array]:
    """`count_above` each of `magnitude_thresholds` (strictly), `num_zero`, and `counts` per log10
    bin of `bins`.
    """
    leaves = [jnp.abs(leaf) for leaf in allocate.prunable(params, scope).values()]
    edges = 10.0 ** np.linspace(-12, 2, bins + 1)

    def counts(test, bounds):  # a loop, so that the program stays small
        count = lambda bound: sum(jnp.sum(test(leaf, bound), dtype=jnp.int32) for leaf in leaves)
        return jax.lax.map(count, jnp.asarray(bounds, leaves[0].dtype))

    above = counts(lambda leaf, bound: leaf > bound, magnitude_thresholds())
    beyond = counts(lambda leaf, bound: (leaf > 0) & (leaf >= bound), [0.0, *edges[1:-1], np.inf])
    num_zero = sum(jnp.sum(leaf == 0, dtype=jnp.int32) for leaf in leaves)
    return dict(count_above=above, num_zero=num_zero, counts=beyond[:-1] - beyond[1:])


STAGES = (Train, SfwInit, Prune, Curve, Histogram)
