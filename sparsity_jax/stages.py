"""Stages after training: pruning, accuracy by pruning ratio, magnitudes.

See `interface` for what a stage is, and `train.Fit` for the training itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import (
    allocate,
    interface,
    masks,
    meshes,
    stopping,
    structured,
    tables,
    train,
    trees,
)
from sparsity_jax.interface import Place, Stage, without_optimizer
from sparsity_jax.tables import Fraction, option
from sparsity_jax.train import NonFiniteLossError, Problem, State, Update, member_rows, shapes_of
from sparsity_jax.trees import check_pattern
from sparsity_jax.types import Arrays, Fields, MemberRows, PyTree

__all__ = [
    "STAGES",
    "Curve",
    "Histogram",
    "Point",
    "Prune",
    "Selecting",
    "check_weights",
    "magnitude_histogram",
    "magnitude_thresholds",
]

_HUNDREDTHS = (*range(0, 90, 10), *range(90, 100))
_RATIOS = tuple(percent / 100 for percent in _HUNDREDTHS)


def check_weights(problem: Problem, state: State) -> None:
    """Raises NonFiniteLossError, naming member and array, unless weights and running statistics are
    finite.

    The runner hands every network on through here, so that no stage selects among NaN.
    """
    if _all_finite(state.variables):
        return
    for member in range(problem.members or 1):
        own = train.member_of(problem, state.variables, member)
        named = "the network" if problem.members is None else f"member {member}"
        try:
            trees.check_finite(own, named)
        except ValueError as error:
            raise NonFiniteLossError(str(error)) from None


@jax.jit
def _all_finite(tree: PyTree) -> Array:
    per_array = jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
    return jax.tree.reduce(jnp.logical_and, per_array)


# What is pruned -----------------------------------------------------------------------------------


@option
class Selecting(Stage):
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
        check_pattern(self.include, "include")
        check_pattern(self.exclude, "exclude")
        self.options()

    def options(self) -> Fields:
        """The checked options of the selection; raises ConfigError."""
        given = {}
        for name in _SELECTING:
            value = getattr(self, name)
            if value and name != "selection":
                given[name] = value
        return allocate.check(self.selection, given)

    def keywords(self, problem: Problem) -> Fields:
        """Keyword arguments of `allocate.keep_counts` and `keep_masks`."""
        channels = None
        if self.selection == "structured":
            channels = structured.filters_of(problem)
        return dict(self.options(), selection=self.selection, channels=channels)

    def counts(self, problem: Problem, ratio: float) -> PyTree:
        """What the compiled selection keeps at a pruning ratio, see `allocate.keep_counts`."""
        return allocate.keep_counts(shapes_of(problem), ratio, **self.keywords(problem))

    def selecting(self, position: int) -> tuple:
        """What a compiled selection depends on; random masks also on the stage's `position` in the
        pipeline.
        """
        if self.selection != "random":
            position = 0
        fields = [getattr(self, name) for name in _SELECTING]
        return (*fields, position)

    def pruned(self, problem: Problem, position: int) -> Callable:
        """The compiled `pruned(state, counts) -> (state, its shares of zeros)` of all members."""
        key = self.selecting(position)
        return problem.program(_pruned, self, position, key=key, axes=(0, None))

    def choosable(self, tree: PyTree) -> Arrays:
        """The arrays of `tree` that may be pruned."""
        scope = self.scope or "kernels"
        return allocate.prunable(tree, scope, include=self.include, exclude=self.exclude)

    def check_network(self, problem: Problem, visits: int) -> None:
        with tables.blaming(""):
            self.counts(problem, 0.0)


_SELECTING = tuple(tables.parameters(Selecting))


def _pruned(
    problem: Problem, stage: Selecting, position: int, state: State, counts: PyTree
) -> tuple[State, Fields]:
    """`state` of one member pruned to `counts`, and its shares of zeros; position: of the stage in
    the pipeline, for random masks.
    """
    key = train.stage_key(state.key, position)
    options = stage.keywords(problem)
    kept = allocate.keep_masks(state.params, counts, key, before=state.masks, **options)
    params = masks.apply(state.params, kept)
    state = state._replace(params=params, masks=kept)
    return state, _shares(problem, stage, state)


def _shares(problem: Problem, stage: Selecting, state: State) -> Fields:
    """Of one member: num_kept entries of the arrays that may be pruned; shares of zeros: `sparsity`
    in these arrays, `sparsity_all` in all parameters, and `layers` in every kernel, by path; of
    structured selections `channels_removed`, their share.
    """
    kept = stage.choosable(state.masks)
    choosable = stage.choosable(state.params)
    kernels = allocate.prunable(state.params, "kernels")
    layers = {path: masks.sparsity(kernel) for path, kernel in kernels.items()}
    values = dict(
        num_kept=_number_of(kept.values()),
        layers=layers,
        sparsity=masks.sparsity(choosable),
        sparsity_all=masks.sparsity(state.params),
    )
    if stage.selection == "structured":
        left, _ = _left(problem, stage, state.masks)
        total = _total(stage.counts(problem, 0.0))
        values["channels_removed"] = 1 - left / total
    return values


def _number_of(bools: Iterable[Any]) -> Any:
    """How many entries of the arrays are True."""
    return sum(jnp.sum(array, dtype=jnp.int32) for array in bools)


def _left(problem: Problem, stage: Selecting, kept: PyTree) -> tuple[Array, Array]:
    return allocate.left_by(kept, **stage.keywords(problem))


def _total(counts: PyTree) -> Any:
    return sum(jax.tree.leaves(counts))


# prune --------------------------------------------------------------------------------------------


@option
class Prune(Selecting):
    """Prunes the network for good: later training keeps the pruned weights at zero, unless its
    start is `init`.

    `structured` removes the filters of each layer alone, also where a residual sum adds to them,
    with the scale and shift of the norm behind them and their bias.

    ratio: share removed, with what was pruned before.
    """

    kind: ClassVar[str] = "prune"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    ratio: Fraction

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        counts = self.counts(problem, self.ratio)
        pruned = self.pruned(problem, place.position)
        state, zeros = pruned(state, counts)
        choosable = self.choosable(shapes_of(problem))
        rows = member_rows(
            problem,
            zeros,
            ratio=self.ratio,
            selection=self.selection,
            num_prunable=trees.size(choosable),
        )
        yield Update(state, rows, 1.0)


# curve --------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A ratio of a curve. counts: of `allocate.keep_counts`. ratios: as rows give it, by member
    that takes it.
    """

    counts: PyTree
    ratios: dict[int, float]


@option
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
    ratios: tuple[Fraction, ...] = _RATIOS
    splits: tuple[Literal["test", "train"], ...] = ("test",)
    retrain: str = ""

    def check(self) -> None:
        super().check()
        for name in ("ratios", "splits"):
            if not getattr(self, name):
                raise tables.ConfigError(name, (), allowed="at least one")

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        # without optimizer: then a curve after every training is the same program
        state = without_optimizer(state)
        points = self.points(problem, state)
        finished = set()
        for member, own_rows in enumerate(place.rows):
            for row in own_rows:
                finished.add((member, row["ratio"]))
        left = [point for point in points if not point.ratios.items() <= finished]
        network_at = self.networks(problem, state, place)
        # results are fetched a few ratios late, so the device never waits for the host
        late = 1 if self.retrain else 16
        for start in range(0, len(left), late):
            some = left[start : start + late]
            networks = [network_at(point) for point in some]
            rows = self.rows_of(problem, some, networks)
            still_left = len(left) - start - len(some)
            yield Update(state, rows, 1 - still_left / len(points))

    def points(self, problem: Problem, state: State) -> list[Point]:
        """The ratios that are not below what each member's masks have removed already.

        Where some are below, one point comes first: the network as it is, at the share removed.
        """
        left_in = problem.program(_left, self, key=self.selecting(0))
        left, gone = meshes.fetch(left_in(state.masks))
        left = np.atleast_1d(left)
        gone = np.atleast_1d(gone)
        counts = [self.counts(problem, ratio) for ratio in self.ratios]
        totals = np.array([_total(kept) for kept in counts])
        takes = totals[:, None] <= left
        if self.selection == "structured":
            ratios = np.asarray(self.ratios, gone.dtype)[:, None]
            takes &= (ratios >= gone) | (gone == 0)
        points = []
        is_asked = takes.all(0) | np.isin(left, totals)
        members_below = _where(~is_asked)
        if members_below:
            own_ratios = {member: float(gone[member]) for member in members_below}
            as_it_is = self.counts(problem, 0.0)
            points.append(Point(as_it_is, own_ratios))
        for ratio, kept, taken in zip(self.ratios, counts, takes, strict=True):
            members = _where(taken)
            if members:
                points.append(Point(kept, dict.fromkeys(members, ratio)))
        return points

    def networks(self, problem: Problem, state: State, place: Place) -> Callable:
        """`network_at(point) -> ((params, batch_stats), shares of zeros)`, retrained if asked."""
        pruned = self.pruned(problem, place.position)
        shares_of = problem.program(_shares, self, key=self.selecting(0))
        if self.retrain:
            fits = place.settings[self.retrain]
            numbers = train.numbers_of(problem, state, fits)

        def network_at(point: Point) -> tuple[train.Network, Fields]:
            stopping.check()
            current, zeros = pruned(state, point.counts)
            if self.retrain:
                masked = state._replace(masks=current.masks)
                ratio = min(point.ratios.values())
                with train.naming(f"{self.retrain} at ratio {ratio:g}"):
                    current = train.trained(problem, masked, fits, numbers, place.position)
                zeros = shares_of(without_optimizer(current))
            return (current.params, current.batch_stats), zeros

        return network_at

    def rows_of(
        self,
        problem: Problem,
        points: Sequence[Point],
        networks: Sequence[tuple[train.Network, Fields]],
    ) -> MemberRows:
        """Rows of the networks at these points, of each member that takes them."""
        rows = interface.rows_per_member(problem)
        choosable = self.choosable(shapes_of(problem))
        fixed = dict(
            num_prunable=trees.size(choosable),
            selection=self.selection,
            scope=self.options().get("scope", "kernels"),
            retrained=bool(self.retrain),
        )
        variables = [network for network, _ in networks]
        results = {}
        for split in self.splits:
            results[split] = train.measure_all(problem, variables, split)
        for i, point in enumerate(points):
            _, zeros = networks[i]
            for split in self.splits:
                result = results[split][i]
                values = dict(loss=result.loss, accuracy=result.accuracy, **zeros)
                of_members = member_rows(problem, values, split=split, **fixed)
                for member, ratio in point.ratios.items():
                    (row,) = of_members[member]
                    row["ratio"] = ratio
                    rows[member].append(row)
        return rows


def _where(chosen: np.ndarray) -> list[int]:
    """Numbers of the members that are chosen."""
    return np.flatnonzero(chosen).tolist()


# histogram ----------------------------------------------------------------------------------------


@option
class Histogram(Stage):
    """Histogram of weight magnitudes.

    Counts above 0, 10, 1, 0.1, ... down to 1e-10 (the original's bins), and `bins` equal bins of
    log10 |w| from 1e-12 to 100 for the figure. scope: `all` parameters (as the original) or
    `kernels`.
    """

    kind: ClassVar[str] = "histogram"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    scope: allocate.Scope = "all"
    bins: tables.Count = 60

    def run(self, problem: Problem, state: State, place: Place) -> Iterator[Update]:
        histogram = problem.program(_histogram, self)
        counts = histogram(state.params)
        edges = np.linspace(-12, 2, self.bins + 1)
        thresholds = magnitude_thresholds()
        common = dict(scope=self.scope, threshold=thresholds, edges=edges.tolist())
        rows = member_rows(problem, counts, **common)
        yield Update(state, rows, 1.0)


def _histogram(problem: Problem, stage: Histogram, params: PyTree) -> Fields:
    return magnitude_histogram(params, scope=stage.scope, bins=stage.bins)


def magnitude_thresholds() -> list[float]:
    """0, then 10, 1, 0.1, ... by repeated division while above 1e-10, as the original computes
    them.
    """
    thresholds = [0.0]
    value = 10.0
    while value > 1e-10:
        thresholds.append(value)
        value /= 10
    return thresholds


def magnitude_histogram(params: PyTree, *, scope: allocate.Scope = "all", bins: int = 60) -> Fields:
    """`count_above` each of `magnitude_thresholds` (strictly), `num_zero`, and `counts` per log10
    bin of `bins`.
    """
    chosen = allocate.prunable(params, scope)
    leaves = [jnp.abs(leaf) for leaf in chosen.values()]

    def counts(test: Callable, bounds: Sequence) -> Array:
        count = lambda bound: _number_of(test(leaf, bound) for leaf in leaves)
        # a loop, so that the program stays small
        return jax.lax.map(count, jnp.asarray(bounds, leaves[0].dtype))

    edges = 10.0 ** np.linspace(-12, 2, bins + 1)
    bounds = [0.0, *edges[1:-1], np.inf]
    beyond = counts(lambda leaf, bound: (leaf > 0) & (leaf >= bound), bounds)
    return dict(
        count_above=counts(lambda leaf, bound: leaf > bound, magnitude_thresholds()),
        num_zero=_number_of(leaf == 0 for leaf in leaves),
        counts=beyond[:-1] - beyond[1:],
    )


STAGES = (train.Fit, Prune, Curve, Histogram)
