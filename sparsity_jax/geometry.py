"""Stages of the geometric limit: the actual one, the pruning path, weights without curvature,
spectrum, prediction.

They read a trained network, and earlier rows of the run (or of `config.start_from`); see
`interface`.
Source: Zhang et al. 2023, arXiv:2306.05857.
"""

import operator
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import tree_map

from sparsity_jax import (
    allocate,
    alone,
    batches,
    interface,
    linops,
    losses,
    meshes,
    spectrum,
    stages,
    tables,
    train,
    trees,
    width,
)
from sparsity_jax.interface import Place
from sparsity_jax.tables import ConfigError, Count, Fraction, Index, NonNegative, Range, option
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import Fields, PyTree, Row, Rows

__all__ = [
    "CRITERIA",
    "OPERATORS",
    "STAGES",
    "WITHOUT_BATCH_NORM",
    "Criterion",
    "Images",
    "Limit",
    "Path",
    "Probe",
    "RowNorms",
    "Spectrum",
    "TrainingLoss",
    "Updates",
    "Variables",
    "Width",
    "actual_limits",
    "find_limit",
    "largest_ratio",
    "tolerated",
    "tridiagonals",
    "wide_variables",
]

WITHOUT_BATCH_NORM = (
    r"(?!.*bn\d*/).*"  # as the original, which leaves scale and bias of batch norms out
)
Variables = tuple[PyTree, PyTree]  # params and batch_stats
Images = tuple[Array, Array]  # and their labels
Updates = Iterator[Update]


def wide_variables(state: State) -> Variables:
    """Variables in float32 or wider: weights of a narrower type keep their values, and the network
    its arithmetic; directions of curvature do not fit.
    """
    return tree_map(trees.widen, (state.params, state.batch_stats))


@option
class TrainingLoss(alone.OneByOne):
    """A stage that looks at the training loss around the trained weights."""

    batch_size: Count = 128
    loss: losses.Config = losses.CROSS_ENTROPY
    # without a type, so that they are no fields of every such stage
    num_examples = 0
    parameters = ".*"
    operator = "hessian"  # whose products with vectors are taken

    def check(self) -> None:
        super().check()
        trees.check_pattern(self.parameters, "parameters")
        with tables.within("loss"):
            losses.of(self.loss)

    def check_streamed(self) -> None:
        if not self.num_examples:
            raise interface.needs_memory("num_examples", 0, "all of which are read into memory")

    def examples(self, problem: Problem) -> Images:
        """`num_examples` train images and labels, see `Problem.examples`; 0 for all."""
        return problem.examples("train", self.num_examples or problem.size("train"))

    def loss_of(self, logits: Array, batch: Images) -> Array:
        """The mean over a batch."""
        _, labels = batch
        return losses.of(self.loss)(logits, labels).mean()

    def mean_loss(self, problem: Problem, variables: Variables, batch: Images) -> Array:
        """The mean over a batch, in inference mode."""
        images, _ = batch
        return self.loss_of(problem.logits(*variables, images), batch)

    def product(self, problem: Problem, variables: Variables, v: PyTree, batch: Images) -> PyTree:
        """v times the curvature of the loss over a batch, in the parameters of the stage."""
        params, batch_stats = variables
        precision = problem.curvature_precision
        part, rebuild = spectrum.select(params, self.parameters)
        if self.operator == "gauss_newton":
            outputs = lambda part, batch: problem.logits(rebuild(part), batch_stats, batch[0])
            matvec = linops.gauss_newton(outputs, self.loss_of, part, batch, precision=precision)
        else:
            loss = lambda part, batch: self.mean_loss(problem, (rebuild(part), batch_stats), batch)
            matvec = linops.hvp(loss, part, batch, precision=precision)
        return matvec(v)

    def whole_product(self, problem: Problem) -> Callable:
        """`product(variables, v)` over all examples of the stage."""
        return self.over_examples(problem, spectrum.over_batches, self.product)

    def over_examples(self, problem: Problem, make: Callable, of_batch: Callable) -> Callable:
        """`make(of_batch, ...)` over all examples of the stage, made once; of_batch: a method."""

        def build() -> Callable:
            return make(
                partial(of_batch, problem),
                self.examples(problem),
                self.batch_size,
                on_host=train.on_host(problem),
                precision=problem.curvature_precision,
            )

        return problem.once((make, self), build)


# limit --------------------------------------------------------------------------------------------


class Criterion(NamedTuple):
    """What counts as losing nothing: a `field` of a row, compared to that of the dense network plus
    `sign` times the tolerance.
    """

    field: str
    compare: Callable
    sign: int
    tolerance: float
    text: str

    def passes(self, row: Row, dense: Row, tolerance: float) -> bool:
        """Whether the network of `row` loses no more than the tolerance against the dense one."""
        bound = dense[self.field] + self.sign * tolerance
        return bool(self.compare(row[self.field], bound))


CRITERIA = {
    "accuracy": Criterion("accuracy", operator.ge, -1, 0.0, "accuracy not below dense"),
    "better_accuracy": Criterion(
        "accuracy", operator.gt, 1, 0.0, "accuracy above dense, as the original"
    ),
    "accuracy_within": Criterion(
        "accuracy", operator.ge, -1, 0.001, "accuracy at most {} below dense"
    ),
    "loss_within": Criterion("loss", operator.le, 1, 0.01, "loss at most {} above dense"),
}


@option
class Limit(alone.OneByOne, stages.Selecting):
    """The largest pruning ratio that loses nothing, by a coarse scan and bisection: some 20
    evaluations.

    The last ratio of the scan that passes is the start; between it and the next one bisection finds
    where passing turns into failing; if not even dense passes, the limit is None. Ratios beyond a
    failure in between are not looked at: accuracy is ragged, and a curve of 1,000 ratios may find a
    larger one by luck.

    criterion: accuracy not below dense (`accuracy`) or above it (`better_accuracy`, as the
    original), accuracy at most `tolerance` below (`accuracy_within`), loss at most `tolerance`
    above (`loss_within`).
    tolerance: 0 is the criterion's own, 0.001 of accuracy and 0.01 of loss.
    split: of the data that is evaluated on.
    scan: ratios that are tried first, ascending.
    resolution: of the bisection.
    """

    kind = "limit"
    needs = ("train",)
    criterion: Literal["accuracy", "better_accuracy", "accuracy_within", "loss_within"] = "accuracy"
    tolerance: NonNegative = 0.0
    split: Literal["test", "train"] = "test"
    scan: tuple[Fraction, ...] = (
        0.2,
        0.4,
        0.6,
        0.7,
        0.8,
        0.85,
        0.9,
        0.93,
        0.95,
        0.97,
        0.98,
        0.99,
    )
    resolution: Annotated[float, Range(0.0, 0.5, above=True)] = 0.001

    def check(self) -> None:
        super().check()
        if not self.scan or list(self.scan) != sorted(set(self.scan)):
            raise ConfigError("scan", self.scan, allowed="at least one ratio, ascending")
        if self.tolerance and not CRITERIA[self.criterion].tolerance:
            raise ConfigError(
                "tolerance", self.tolerance, allowed=f"0 with criterion {self.criterion!r}"
            )

    def measure(self, problem: Problem, state: State, place: Place) -> Updates:
        (rows,) = place.rows
        if rows and rows[-1].get("phase") == "result":
            return
        pruned = self.pruned(problem, place.position)

        def evaluate(ratio: float) -> Row:
            network, _ = pruned(state, self.counts(problem, ratio))
            result = train.measure(problem, network.params, network.batch_stats, self.split)
            return dict(loss=float(result.loss), accuracy=float(result.accuracy))

        known = {(row["phase"], row["ratio"]): row for row in rows}
        for row in find_limit(evaluate, self, known):
            done = row.pop("done")
            yield Update(state, [[row]], done)


def find_limit(
    evaluate: Callable[[float], Row], limit: Limit, known: dict | None = None
) -> Iterator[Row]:
    """Rows of the search: evaluations (phase dense, scan, bisect), then the result; `known` ones
    are not repeated.

    evaluate(ratio) -> dict(accuracy=..., loss=...).
    """
    known = known or {}
    criterion = CRITERIA[limit.criterion]
    tolerance = limit.tolerance or criterion.tolerance
    seen: list[Row] = []  # the dense network first

    def passes(phase: str, ratio: float, done: float) -> Generator[Row, None, bool]:
        """Yields the row if it is new."""
        row = known.get((phase, ratio))
        if row is None:
            row = dict(phase=phase, ratio=ratio, split=limit.split, **evaluate(ratio))
            yield {**row, "done": done}
        seen.append(row)
        return criterion.passes(row, seen[0], tolerance)

    low = None
    if (yield from passes("dense", 0.0, 0.0)):
        low = 0.0
    high = 1.0
    end = "the end of the scan"
    for i, ratio in enumerate(reversed(limit.scan), 1):
        if (yield from passes("scan", ratio, 0.5 * i / len(limit.scan))):
            low = ratio
            break
        high = ratio
        end = f"fails at {high:g} of the scan"
    how = "passes nowhere on the scan"
    if low is not None:
        how = f"passes at {low:g}, {end}, then bisection to {limit.resolution:g}"
        widest = max(high - low, limit.resolution)
        while high - low > limit.resolution:
            middle = (low + high) / 2
            done = 1 - (high - low - limit.resolution) / widest
            if (yield from passes("bisect", middle, 0.5 + 0.49 * done)):
                low = middle
            else:
                high = middle
    yield dict(
        phase="result",
        limit=low,
        criterion=limit.criterion,
        tolerance=tolerance,
        split=limit.split,
        evaluations=len(seen),
        how=f"{criterion.text.format(f'{tolerance:g}')}; {how}",
        done=1.0,
    )


def largest_ratio(rows: Rows, criterion: str, *, tolerance: float | None = None) -> float | None:
    """The largest ratio of a curve (rows of one split) that loses nothing against its smallest;
    None: not even that.
    """
    rule = CRITERIA[criterion]
    if tolerance is None:
        tolerance = rule.tolerance
    dense = min(rows, key=lambda row: row["ratio"])
    good = [row["ratio"] for row in rows if rule.passes(row, dense, tolerance)]
    return max(good, default=None)


# path ---------------------------------------------------------------------------------------------


@option
class Path(TrainingLoss, stages.Selecting):
    """How pruning really moves the training loss, beside the second order, which is all that the
    prediction knows.

    For every ratio: the distance R, the change of the loss, and its first- and second-order terms
    g.d and d.Hd / 2 for the step d that pruning makes. At a minimum the first is small; where it is
    not, the actual limit lies elsewhere than predicted, at a larger ratio if it is negative.
    ratios: shares removed; at_limits: and those of earlier predictions and `limit` stages.
    num_examples: of the train set, see
    `config.sample`; 0 for all.
    """

    kind = "path"
    needs = ("train",)
    ratios: tuple[Fraction, ...] = (
        0.5,
        0.7,
        0.8,
        0.9,
        0.95,
        0.96,
        0.97,
        0.975,
        0.98,
        0.985,
        0.99,
        0.995,
    )
    at_limits: bool = True
    batch_size: Count = 1000
    num_examples: Index = 0

    def check(self) -> None:
        super().check()
        if not self.ratios:
            raise ConfigError("ratios", self.ratios, allowed="at least one")

    def measure(self, problem: Problem, state: State, place: Place) -> Updates:
        pruned = self.pruned(problem, place.position)
        terms = self.over_examples(problem, spectrum.taylor, self.mean_loss)
        variables = (state.params, state.batch_stats)
        still = tree_map(jnp.zeros_like, state.batch_stats)
        ratios = set(self.ratios)
        if self.at_limits:
            fields = {"width": "predicted", "limit": "limit"}
            limits = [row.get(fields.get(row["kind"], "")) for row in place.earlier[0]]
            ratios.update(limit for limit in limits if limit is not None and limit < 1)
        number = len(place.rows[0])
        left = sorted(ratios)[number:]
        for i, ratio in enumerate(left, number + 1):
            network, _ = pruned(state, self.counts(problem, ratio))
            step, distance = _step_to(network.params, state.params)
            change = terms(variables, (step, still))
            orders = tree_map(float, change._asdict())
            row = dict(ratio=ratio, distance=float(distance), **orders)
            yield Update(state, [[row]], i / len(ratios))


@jax.jit
def _step_to(after: PyTree, before: PyTree) -> tuple[PyTree, Array]:
    """(the difference, its norm)."""
    step = tree_map(jnp.subtract, after, before)
    return step, trees.norm(step)


# row_norms ----------------------------------------------------------------------------------------


@option
class RowNorms(TrainingLoss):
    """Share of weights without curvature, from the Hessian rows of the weights at `num_weights`
    magnitude quantiles.

    num_weights: how many weights are looked at. threshold: a weight has no curvature if the L1 norm
    of its row is below. rows: `mean` is the row of the whole data set's Hessian; `original`
    sums the norms of every batch's row and divides by the number of examples, so that it scales
    like 1 / batch_size. num_examples: of the train set, see `config.sample`; 0 for all.
    parameters: pattern of the arrays whose entries make up a row, and among whose kernels the
    weights are.
    """

    kind = "row_norms"
    needs = ("train",)
    num_weights: Count = 100
    threshold: NonNegative = 1e-7
    rows: Literal["mean", "original"] = "mean"
    num_examples: Index = 0
    parameters: str = ".*"

    def check_network(self, problem: Problem, visits: int) -> None:
        shapes = train.shapes_of(problem)
        matches = trees.matching(shapes, self.parameters, "parameters")
        kernels = list(allocate.prunable(shapes, "kernels"))
        if not any(matches[path] for path in kernels):
            raise ConfigError(
                "parameters",
                self.parameters,
                why="which matches no kernel",
                allowed=f"a pattern of paths such as {kernels[0]!r}",
            )

    def measure(self, problem: Problem, state: State, place: Place) -> Updates:
        (rows,) = place.rows
        if len(rows) > self.num_weights:
            return
        variables = wide_variables(state)
        selected = spectrum.select(variables[0], self.parameters).params
        prunable = allocate.prunable(selected, "kernels")
        entries = spectrum.quantile_entries(meshes.fetch(prunable), self.num_weights)
        norm_of = self.row_norm(problem)
        norms = [row["row_norm"] for row in rows]
        for path, index, magnitude in entries[len(rows) :]:
            quantile = len(norms) / self.num_weights
            norm = norm_of(variables, spectrum.one_hot(selected, path, index))
            norms.append(norm)
            row = dict(quantile=quantile, magnitude=magnitude, row_norm=norm, parameter=path)
            yield Update(state, [[row]], len(norms) / (len(entries) + 1))
        result = dict(
            zero_share=float(np.mean(np.asarray(norms) < self.threshold)),
            threshold=self.threshold,
            rows=self.rows,
            num_weights=len(entries),
        )
        yield Update(state, [[result]], 1.0)

    def row_norm(self, problem: Problem) -> Callable:
        """`norm(variables, v)`: the L1 norm of the Hessian times v, see the option `rows`."""
        if self.rows == "mean":
            whole = self.whole_product(problem)
            return lambda variables, v: float(spectrum.absolute_sum(whole(variables, v)))
        data = self.examples(problem)

        def of_batch(batch: Images, variables: Variables, v: PyTree) -> Array:
            row = self.product(problem, variables, v, batch)
            return spectrum.absolute_sum(row)

        def build() -> Callable:
            return batches.mean(of_batch, self.batch_size, on_host=True, weighted=False)

        total = problem.once(("sum of rows", self), build)
        zero = jnp.zeros(())
        return lambda variables, v: float(total(zero, data, variables, v)) / len(data[0])


# spectrum -----------------------------------------------------------------------------------------

OPERATORS = {
    "hessian": "symmetric",
    "gauss_newton": "semidefinite",
    "absolute": "squared",
}  # as `width` calls them


class Probe(NamedTuple):
    """Where the stage stands: the probe under way of one network, -1 after its row, and its Lanczos
    state.
    """

    number: Array
    lanczos: linops.LanczosState


@option
class Spectrum(TrainingLoss):
    """Stochastic Lanczos quadrature of the curvature of the training loss at the trained weights.

    operator: the `hessian`; `gauss_newton`, its positive semi-definite part; `absolute`, the
    Hessian applied twice, whose square root is its absolute value (two products a step).
    num_matvecs: Lanczos steps; num_probes: random start vectors. reorthogonalize: see
        `linops.Lanczos`.
    stop_width: a probe ends once its enclosure of the prediction is narrower than this; 0: never.
    Needs a stage of kind `width` in the config, whose tolerance it uses: that of one that names
    this stage, else of one that names none.
    linearize_once: keep activations and the like for all examples between products: faster, at the
    memory told in `spectrum.linearized`. l2: strength of an L2 penalty in the loss (an L1 one has
    no curvature).
    num_examples: of the train set, see `config.sample`; 0 for all. parameters: pattern of the
    variables; the default leaves out batch norms, as the original does.
    Rows: coefficients of the tridiagonal matrix of every probe; everything else follows from them.
    """

    kind = "spectrum"
    needs = ("train",)
    operator: Literal["hessian", "gauss_newton", "absolute"] = "hessian"
    num_matvecs: Count = 96
    num_probes: Count = 1
    reorthogonalize: Literal["full", "bfloat16", "host", "none"] = "full"
    stop_width: NonNegative = 0.0
    linearize_once: bool = False
    l2: NonNegative = 0.0
    batch_size: Count = 1000
    num_examples: Index = 0
    parameters: str = WITHOUT_BATCH_NORM

    def check_order(self, order: interface.Order) -> None:
        if self.stop_width and not any(isinstance(own, Width) for own in order.all.values()):
            raise ConfigError(
                "stop_width",
                self.stop_width,
                why="which needs the tolerance that a stage of kind 'width' defines",
                allowed="0 without such a stage in the config",
            )

    def check_network(self, problem: Problem, visits: int) -> None:
        shapes = train.shapes_of(problem)
        trees.matching(shapes, self.parameters, "parameters")
        if self.reorthogonalize == "full":
            wide = tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)
            basis = self.num_matvecs * train.bytes_of(problem, wide)
            with tables.blaming("num_matvecs", self.num_matvecs):
                train.check_memory(basis, "whose basis")

    @property
    def lanczos(self) -> linops.Lanczos:
        """The iteration that measures the spectrum."""
        return linops.Lanczos(self.num_matvecs, self.reorthogonalize)

    def begin(self, problem: Problem, state: State, place: Place) -> State:
        state = interface.without_optimizer(state)
        first = train.member_of(problem, state, 0)
        return state._replace(opt_state=self.started(problem, first, place.position, 0))

    def started(self, problem: Problem, state: State, position: int, number: int) -> Probe:
        """A probe of one network before its first product."""
        draw = problem.with_members(None).program(_start_vector, self)
        start = draw(state, position, number)
        return Probe(jnp.asarray(number, jnp.int32), self.lanczos.init(start))

    def variables(self, state: State) -> PyTree:
        """The parameters in question."""
        params, _ = wide_variables(state)
        return spectrum.select(params, self.parameters).params

    def matvec(self, problem: Problem, state: State) -> linops.Matvec:
        """The operator at the weights of one network."""
        variables = wide_variables(state)
        if self.linearize_once:
            bare = spectrum.linearized(
                partial(self.product, problem),
                variables,
                self.examples(problem),
                self.batch_size,
                like=self.variables(state),
            )
        else:
            bare = partial(self.whole_product(problem), variables)
        matvec = bare
        if self.l2:
            add = lambda a, b: a + 2 * self.l2 * b
            matvec = lambda v: tree_map(add, bare(v), v)
        if self.operator == "absolute":
            return linops.squared(matvec)
        return matvec

    def enclosure(self, problem: Problem, state: State, place: Place) -> Callable | None:
        """`gap(tridiagonal)`: upper less lower end of the enclosed prediction, with the tolerance
        of the width stage; None where no probe ends early.
        """
        if not self.stop_width:
            return None
        widths = [own for (own,) in place.settings.values() if isinstance(own, Width)]
        nearness = lambda own: (own.spectrum != place.name, own.spectrum != "")
        reader = min(widths, key=nearness)
        variables = wide_variables(state)
        epsilon, _ = tolerated(problem, variables, reader)
        distances = width.distances(meshes.fetch(variables[0]))
        zero_share = _zero_share_of(reader, place.earlier[0])
        name: Any = OPERATORS[self.operator]

        def gap(tridiagonal: linops.Tridiagonal) -> float:
            answer = width.predict_probes(
                tridiagonal, distances, epsilon, operator=name, zero_share=zero_share
            )
            return answer.upper - answer.lower

        return gap

    def is_finished(self, lanczos: linops.LanczosState, gap: Callable | None) -> bool:
        """Whether a probe ends: all products made, the Krylov space exhausted, or the enclosure,
        looked at after every fourth product, narrow enough.
        """
        step = int(lanczos.step)
        if step == self.num_matvecs or int(lanczos.num_steps) < step:
            return True
        if gap is None or step == 0 or step % 4:
            return False
        return gap(lanczos.tridiagonal) <= self.stop_width

    def measure(self, problem: Problem, state: State, place: Place) -> Updates:
        (rows,) = place.rows
        if len(rows) == self.num_probes:
            return
        matvec = self.matvec(problem, state)
        gap = self.enclosure(problem, state, place)
        number, lanczos = state.opt_state
        for probe in range(len(rows), self.num_probes):
            if int(number) != probe:
                number, lanczos = self.started(problem, state, place.position, probe)
            started = time.perf_counter()
            while not self.is_finished(lanczos, gap):
                lanczos = self.lanczos.step(matvec, lanczos)
                step = int(lanczos.step)
                if not np.isfinite(float(lanczos.alphas[step - 1])):
                    raise train.NonFiniteLossError(
                        "a product is not finite; did the training diverge?"
                    )
                state = state._replace(opt_state=Probe(number, lanczos))
                done = probe + step / (self.num_matvecs + 1)  # the rest is for the row
                yield Update(state, [[]], done / self.num_probes)
            seconds = round(time.perf_counter() - started, 3)
            row = dict(probe=probe, **self.row(lanczos, gap), seconds=seconds)
            number = jnp.full_like(number, -1)
            state = state._replace(opt_state=Probe(number, lanczos))
            yield Update(state, [[row]], (probe + 1) / self.num_probes)

    def row(self, lanczos: linops.LanczosState, gap: Callable | None) -> Row:
        """Of a probe that has ended."""
        alphas, betas, steps = map(np.asarray, lanczos.tridiagonal)
        row = dict(
            operator=self.operator,
            num_matvecs=int(steps),
            alphas=alphas[:steps].tolist(),
            betas=betas[:steps].tolist(),
            dtype=str(alphas.dtype),
            dimension=trees.size(lanczos.current),
        )
        if gap:
            enclosure = gap(lanczos.tridiagonal)
            row.update(enclosure=enclosure, narrow_enough=enclosure <= self.stop_width)
        return row


def tridiagonals(rows: Rows) -> linops.Tridiagonal:
    """The Lanczos results in rows of a spectrum stage, one per probe on the leading axis."""
    steps = np.array([row["num_matvecs"] for row in rows], np.int32)
    coefficients = np.zeros((2, len(rows), steps.max()), rows[0]["dtype"])
    for i, row in enumerate(rows):
        coefficients[:, i, : steps[i]] = row["alphas"], row["betas"]
    alphas, betas = coefficients
    return linops.Tridiagonal(alphas, betas, steps)


# width --------------------------------------------------------------------------------------------

_FINE = np.arange(0.9, 1.0005, 0.001)
_RATIOS = np.append(np.arange(0, 0.9, 0.02), _FINE).clip(0, 1)  # at which rows give the width


@option
class Width(TrainingLoss):
    """The predicted largest pruning ratio, from the Gaussian width of the loss basin, beside the
    actual one.

    spectrum: name of the spectrum stage to use (empty: the latest). method: `fixed_point`, or
    `grid`, the original's discrete answer (interval and history stay those of the fixed point).
    negative: Ritz values below zero by `absolute` value (as the original) or at 0 (`clip`).
    zero_share: of directions without curvature; below 0: that of an earlier `row_norms` stage, if
        there is one.
    epsilon: tolerated loss; 0 for the standard deviation of the training loss over batches of
        `batch_size`.
    epsilon_draws: bootstrap draws of it for the error bar. tolerance: in accuracy, for the actual
        limit `within`.
    """

    kind = "width"
    needs = ("spectrum",)
    spectrum: str = ""
    method: width.Method = "fixed_point"
    negative: Literal["absolute", "clip"] = "absolute"
    zero_share: Annotated[float, Range(-1.0, 1.0)] = -1.0
    epsilon: NonNegative = 0.0
    epsilon_draws: Index = 200
    tolerance: NonNegative = 0.001

    def check_order(self, order: interface.Order) -> None:
        known = [name for name, kind in order.done.items() if kind == Spectrum.kind]
        if self.spectrum and self.spectrum not in known:
            raise ConfigError(
                "spectrum", self.spectrum, why="no earlier stage of kind 'spectrum'", known=known
            )

    def check_streamed(self) -> None:
        if not self.epsilon:
            raise interface.needs_memory("epsilon", 0, "which is measured on all images in memory")

    def check_network(self, problem: Problem, visits: int) -> None:
        most = problem.size("train") // 2
        if not self.epsilon and self.batch_size > most:
            raise ConfigError(
                "batch_size",
                self.batch_size,
                allowed=f"up to {most}, half the train set (epsilon is a deviation over batches), "
                "or any with epsilon set",
            )

    def measure(self, problem: Problem, state: State, place: Place) -> Updates:
        if place.rows[0]:
            return
        (earlier,) = place.earlier
        spectra = _newest(earlier, Spectrum.kind, self.spectrum)
        tridiagonal = tridiagonals(spectra)
        variables = wide_variables(state)
        epsilon, batch_losses = tolerated(problem, variables, self)
        draws: Sequence[float] = ()
        if batch_losses is not None:
            draws = width.epsilon_draws(batch_losses, self.epsilon_draws, place.position).tolist()
        plain: Fields = dict(negative=self.negative, zero_share=_zero_share_of(self, earlier))
        name: Any = OPERATORS[spectra[0]["operator"]]
        options: Fields = dict(operator=name, **plain)
        reach = (width.distances(meshes.fetch(variables[0])), epsilon)
        answer = width.predict_probes(tridiagonal, *reach, epsilons=draws, **options)
        course = width.history(tridiagonal, *reach, **options)
        values, weights = linops.ritz(tridiagonal)
        values = width.OPERATORS[name](values)
        on_grid = width.predict(values, weights, *reach, method="grid", **plain)
        radii = reach[0].at(_RATIOS)
        low, high = answer.band()
        row = dict(
            predicted=on_grid if self.method == "grid" else answer.ratio,
            method=self.method,
            low=low,
            high=high,
            enclosure_low=_known(answer.lower),
            enclosure_high=_known(answer.upper),
            standard_error=_known(answer.standard_error),
            epsilon_error=_known(answer.epsilon_error),
            per_probe=answer.per_probe.tolist(),
            predicted_on_grid=on_grid,
            epsilon=epsilon,
            operator=spectra[0]["operator"],
            spectrum=spectra[0]["stage"],
            num_matvecs=int(max(tridiagonal.num_steps)),
            num_probes=len(spectra),
            negative_mass=answer.negative_mass,
            **plain,
            actual=actual_limits(earlier, self.tolerance, epsilon),
            history=dict(
                num_matvecs=course.num_matvecs.tolist(),
                predicted=course.ratio.tolist(),
                lower=list(map(_known, course.lower)),
                upper=list(map(_known, course.upper)),
            ),
            ratios=_RATIOS.tolist(),
            distances=radii.tolist(),
            widths=width.ratio(values, weights, radii, epsilon, **plain).tolist(),
            ritz_values=values.tolist(),
            ritz_weights=weights.tolist(),
        )
        yield Update(state, [[row]], 1.0)


def _start_vector(
    problem: Problem, stage: Spectrum, state: State, position: int, number: int
) -> PyTree:
    """The random vector that a probe of one network starts from."""
    del problem
    key = train.stage_key(state.key, position)
    return linops.rademacher(jax.random.fold_in(key, number), stage.variables(state))


def _known(number: float) -> float | None:
    """None for NaN, which JSON lacks."""
    if np.isfinite(number):
        return float(number)
    return None


def _newest(rows: Rows, kind: str, stage: str = "") -> Rows:
    """Rows of the latest visit of a stage of a kind, by default of that which made the last row."""
    of_kind = [row for row in rows if row["kind"] == kind]
    of_kind = [row for row in of_kind if stage in ("", row["stage"])]
    if not of_kind:
        return []
    visit_of = operator.itemgetter("stage", "visit")
    last = visit_of(of_kind[-1])
    return [row for row in of_kind if visit_of(row) == last]


def tolerated(
    problem: Problem, variables: Variables, reader: Width
) -> tuple[float, np.ndarray | None]:
    """(epsilon, the mean training loss of every whole batch in the data's order, if epsilon is not
    set); raises ConfigError if it comes out as 0.
    """
    if reader.epsilon:
        return reader.epsilon, None
    losses_of = partial(
        spectrum.batch_losses,
        partial(reader.mean_loss, problem),
        batch_size=reader.batch_size,
        precision=problem.curvature_precision,
    )
    name = ("batch losses", reader.loss, reader.batch_size)
    compiled = problem.once(name, lambda: jax.jit(losses_of))
    measured = compiled(variables, train.arrays(problem, "train"))
    batch_losses = np.asarray(measured, np.float64)
    try:
        return width.epsilon(batch_losses), batch_losses
    except ValueError as error:
        why = str(error)
        kernels = allocate.prunable(variables[0], "kernels")
        if not any(map(np.any, kernels.values())):
            why += " All kernels of the network are 0: its penalty was too strong."
        raise ConfigError("epsilon", reader.epsilon, why=why) from None


def _zero_share_of(reader: Width, earlier: Rows) -> float:
    """The share of directions without curvature: as set, else of the latest `row_norms` stage, else
    0.
    """
    if reader.zero_share >= 0:
        return reader.zero_share
    for row in reversed(earlier):
        if row["kind"] == RowNorms.kind and "zero_share" in row:
            return row["zero_share"]
    return 0.0


def actual_limits(rows: Rows, tolerance: float, epsilon: float) -> dict[str, float]:
    """The actual largest ratio by every definition that the rows of curves and limit stages so far
    decide.

    Of the latest curve without retraining, on each of its splits, e.g. `test accuracy_within`; of
    limit stages by their stage's name.
    """
    limits = {}
    bounds = dict(accuracy_within=tolerance, loss_within=epsilon)
    curve = _newest([row for row in rows if not row.get("retrained")], "curve")
    for split in sorted({row["split"] for row in curve}):
        on_split = [row for row in curve if row["split"] == split]
        for criterion in CRITERIA:
            ratio = largest_ratio(on_split, criterion, tolerance=bounds.get(criterion))
            limits[f"{split} {criterion}"] = ratio
    for row in rows:
        if row["kind"] == Limit.kind and "limit" in row:
            limits[row["stage"]] = row["limit"]
    return {name: limit for name, limit in limits.items() if limit is not None}


STAGES = (Limit, Path, RowNorms, Spectrum, Width)
