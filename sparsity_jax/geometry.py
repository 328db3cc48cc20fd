"""Stages of the geometric limit: the actual one, the pruning path, weights without curvature,
spectrum, prediction.

They read a trained network, and earlier rows of the run (or of `config.start_from`); see
`interface`.
Source: Zhang et al. 2023, arXiv:2306.05857.
"""

import functools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import tree_map

from sparsity_jax import (
    allocate,
    interface,
    linops,
    losses,
    masks,
    spectrum,
    stages,
    tables,
    train,
    trees,
    width,
)
from sparsity_jax.interface import Place
from sparsity_jax.tables import ConfigError
from sparsity_jax.train import Problem, State, Update
from sparsity_jax.types import Fields, PyTree, Row, Rows

WITHOUT_BATCH_NORM = (
    r"(?!.*bn\d*/).*"  # as the original, which leaves scale and bias of batch norms out
)
Variables = tuple[PyTree, PyTree]  # params and batch_stats
Images = tuple[Array, Array]  # and their labels


class Trained(NamedTuple):
    """One trained network of a sweep, as a stage finds it."""

    problem: Problem
    sweep: State
    place: Place
    member: int

    @property
    def state(self) -> State:
        """Its own state between two stages."""
        return stages.member_state(self.problem, self.sweep, self.member)

    @property
    def variables(self) -> Variables:
        """In float32 or wider: weights of a narrower type keep their values, and the network its
        arithmetic; directions of curvature do not fit.
        """
        return tree_map(trees.widen, (self.state.params, self.state.batch_stats))

    @property
    def earlier(self) -> Rows:
        """Its rows of all stages before."""
        return self.place.earlier[self.member]

    def update(self, new: Rows, done: float) -> Update:
        """New rows of this member alone; done: share of its own part."""
        rows = interface.rows_per_member(self.problem)
        rows[self.member] = new
        return Update(self.sweep, rows, (self.member + done) / len(rows))


Updates = Iterator[Update]


class OneByOne:
    """A stage that leaves networks as they are and measures one after the other."""

    def measure(self, trained: Trained, rows: Rows) -> Updates:
        """Updates of one member. rows: those that it has already."""
        raise NotImplementedError

    def run(self, problem: Problem, state: State, place: Place) -> Updates:
        """Every member's part in turn."""
        for member, own in enumerate(place.own):
            yield from own.measure(Trained(problem, state, place, member), place.rows[member])


class Network(NamedTuple):
    """A trained network as functions of (params, batch_stats) and a batch (images, labels), in
    inference mode.
    """

    outputs: Callable  # -> logits
    loss: Callable  # (logits, batch) -> mean over the batch

    def mean_loss(self, variables: Variables, batch: Images) -> Array:
        return self.loss(self.outputs(variables, batch), batch)


def network_of(problem: Problem, loss: Fields) -> Network:
    rule = losses.of(loss)

    def outputs(variables: Variables, batch: Images) -> Array:
        named = dict(zip(("params", "batch_stats"), variables))
        return problem.model.apply(named, problem.images(batch[0]))

    return Network(outputs, lambda logits, batch: rule(logits, batch[1]).mean())


def examples(problem: Problem, num: int) -> Images:
    """`num` train images and labels, see `Problem.examples`; 0 for all."""
    return problem.examples("train", num or problem.size("train"))


def _check_loss(loss: Fields) -> None:
    with tables.within("loss"):
        losses.of(loss)


def _check_number(num_examples: int) -> None:
    """Raises ConfigError, of streamed data, unless a number of images says how many to keep in
    memory.
    """
    if not num_examples:
        raise interface.needs_memory("num_examples", 0, "all of which are read into memory")


# limit --------------------------------------------------------------------------------------------


class Criterion(NamedTuple):
    """What counts as losing nothing: test(row, dense_row, tolerance) -> bool."""

    test: Callable
    tolerance: float
    text: str


def _not_below(row: Row, dense: Row, tolerance: float) -> bool:
    return row["accuracy"] >= dense["accuracy"] - tolerance


def _above(row: Row, dense: Row, tolerance: float) -> bool:
    return row["accuracy"] > dense["accuracy"] + tolerance


def _loss_within(row: Row, dense: Row, tolerance: float) -> bool:
    return row["loss"] <= dense["loss"] + tolerance


CRITERIA = {
    "accuracy": Criterion(_not_below, 0.0, "accuracy not below dense"),
    "better_accuracy": Criterion(_above, 0.0, "accuracy above dense, as the original"),
    "accuracy_within": Criterion(_not_below, 0.001, "accuracy at most {} below dense"),
    "loss_within": Criterion(_loss_within, 0.01, "loss at most {} above dense"),
}


@tables.option
class Limit(OneByOne, stages.Selecting):
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
    tolerance: tables.NonNegative = 0.0
    split: Literal["test", "train"] = "test"
    scan: tuple[tables.Fraction, ...] = (
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
    resolution: Annotated[float, tables.Range(0.0, 0.5, above=True)] = 0.001

    def check(self) -> None:
        super().check()
        if not self.scan or list(self.scan) != sorted(set(self.scan)):
            raise ConfigError("scan", self.scan, allowed="at least one ratio, ascending")
        if self.tolerance and not CRITERIA[self.criterion].tolerance:
            raise ConfigError(
                "tolerance", self.tolerance, allowed=f"0 with criterion {self.criterion!r}"
            )

    def tolerated(self) -> float:
        """The tolerance in use."""
        return self.tolerance or CRITERIA[self.criterion].tolerance

    def measure(self, trained: Trained, rows: Rows) -> Updates:
        if rows and rows[-1].get("phase") == "result":
            return
        problem, state, place, member = trained
        evaluate = stages.pruned_evaluation(problem, state, self, place, member, self.split)
        known = {(row["phase"], row["ratio"]): row for row in rows if "ratio" in row}
        for row in find_limit(evaluate, self, known):
            yield trained.update([row], row.pop("done"))


Search = Generator[Row, None, Row]


def find_limit(
    evaluate: Callable[[float], Row], chosen: Limit, known: dict | None = None
) -> Iterator[Row]:
    """Rows of the search: evaluations (phase dense, scan, bisect), then the result; `known` ones
    are not repeated.

    evaluate(ratio) -> dict(accuracy=..., loss=...).
    """
    known = known or {}
    criterion = CRITERIA[chosen.criterion]
    tolerance = chosen.tolerated()
    count = 0

    def look(phase: str, ratio: float, done: float) -> Search:
        """Yields the row if it is new, and returns it."""
        nonlocal count
        count += 1
        if (phase, ratio) in known:
            return known[phase, ratio]
        row = dict(phase=phase, ratio=ratio, split=chosen.split, **evaluate(ratio))
        yield {**row, "done": done}
        return row

    dense = yield from look("dense", 0.0, 0.0)
    passes = lambda row: bool(criterion.test(row, dense, tolerance))
    low = 0.0 if passes(dense) else None
    high = None
    for i, ratio in enumerate(reversed(chosen.scan)):
        row = yield from look("scan", ratio, 0.5 * (i + 1) / len(chosen.scan))
        if passes(row):
            low = ratio
            break
        high = ratio
    end = "the end of the scan" if high is None else f"fails at {high:g} of the scan"
    how = "passes nowhere on the scan"
    if low is not None:
        how = f"passes at {low:g}, {end}, then bisection to {chosen.resolution:g}"
        high = 1.0 if high is None else high
        widest = max(high - low, chosen.resolution)
        while high - low > chosen.resolution:
            middle = (low + high) / 2
            done = 1 - (high - low - chosen.resolution) / widest
            row = yield from look("bisect", middle, 0.5 + 0.49 * done)
            low, high = (middle, high) if passes(row) else (low, middle)
    yield dict(
        phase="result",
        limit=low,
        criterion=chosen.criterion,
        tolerance=tolerance,
        split=chosen.split,
        evaluations=count,
        how=f"{criterion.text.format(f'{tolerance:g}')}; {how}",
        done=1.0,
    )


def largest_ratio(rows: Rows, criterion: str, tolerance: float | None = None) -> float | None:
    """The largest ratio of a curve (rows of one split) that loses nothing against its smallest;
    None: not even that.
    """
    rule = CRITERIA[criterion]
    tolerance = rule.tolerance if tolerance is None else tolerance
    dense = min(rows, key=lambda row: row["ratio"])
    good = [row["ratio"] for row in rows if rule.test(row, dense, tolerance)]
    return max(good, default=None)


# path ---------------------------------------------------------------------------------------------


@tables.option
class Path(OneByOne, stages.Selecting):
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
    ratios: tuple[tables.Fraction, ...] = (
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
    batch_size: tables.Count = 1000
    num_examples: tables.Index = 0
    loss: losses.Config = losses.CROSS_ENTROPY

    def check(self) -> None:
        super().check()
        if not self.ratios:
            raise ConfigError("ratios", self.ratios, allowed="at least one")
        _check_loss(self.loss)

    def check_streamed(self) -> None:
        _check_number(self.num_examples)

    def all_ratios(self, earlier: Rows) -> list[float]:
        """Where to measure, ascending. earlier: rows before the stage."""
        ratios = set(self.ratios)
        for row in earlier if self.at_limits else ():
            limit = row.get({"width": "predicted", "limit": "limit"}.get(row["kind"], ""))
            if limit is not None and limit < 1:
                ratios.add(limit)
        return sorted(ratios)

    def measure(self, trained: Trained, rows: Rows) -> Updates:
        problem, state = trained.problem, trained.state
        step_of = self.pruning_step(problem, trained.place)
        terms = self.terms(problem)
        shapes, options = train.shapes_of(problem), self.keywords(problem)
        ratios = self.all_ratios(trained.earlier)
        for i, ratio in enumerate(ratios[len(rows) :], len(rows) + 1):
            counts = allocate.keep_counts(shapes, ratio, **options)
            step, distance = step_of(state, counts)
            changes = terms((state.params, state.batch_stats), step)
            numbers = dict(distance=distance, **changes._asdict())
            row = {"ratio": ratio, **tree_map(float, numbers)}
            yield trained.update([row], i / len(ratios))

    def pruning_step(self, problem: Problem, place: Place) -> Callable:
        """`step_of(state, counts) -> (pruned less current params, its norm)` of one member: one
        program for all ratios.
        """
        prune = stages.pruning(problem, self, place.position)

        def step_of(state: State, counts: PyTree) -> tuple[PyTree, Array]:
            pruned = masks.apply(state.params, prune(state, counts))
            step = tree_map(jnp.subtract, pruned, state.params)
            return step, trees.norm(step)

        name = ("pruning step", self.selecting(place.position))
        return problem.once(name, lambda: jax.jit(step_of))

    def terms(self, problem: Problem) -> Callable:
        """`terms(variables, step)`: `spectrum.taylor` of the training loss for a step of the
        params.
        """
        network = network_of(problem, self.loss)
        data = examples(problem, self.num_examples)
        on_host = stages.on_host(problem)

        def build() -> Callable:
            terms = spectrum.taylor(network.mean_loss, data, self.batch_size, on_host=on_host)
            still = lambda variables: tree_map(jnp.zeros_like, variables[1])
            return lambda variables, step: terms(variables, (step, still(variables)))

        return problem.once(("path", self.loss, self.batch_size, self.num_examples), build)


# Curvature ----------------------------------------------------------------------------------------


def batch_product(problem: Problem, chosen: Any, kind: str = "hessian") -> spectrum.Product:
    """`product(variables, v, batch)` with the curvature of the training loss in the parameters
    `chosen.parameters`.
    """
    network = network_of(problem, chosen.loss)

    def product(variables: Variables, v: PyTree, batch: Images) -> PyTree:
        params, batch_stats = variables
        selected = spectrum.select(params, chosen.parameters)
        outputs = lambda part, batch: network.outputs((selected.rebuild(part), batch_stats), batch)
        if kind == "gauss_newton":
            return linops.gauss_newton(outputs, network.loss, selected.params, batch)(v)
        mean_loss = lambda part, batch: network.loss(outputs(part, batch), batch)
        return linops.hvp(mean_loss, selected.params, batch)(v)

    return product


def curvature(problem: Problem, chosen: Any, kind: str = "hessian") -> Callable:
    """`product(variables, v)`: `batch_product` over `chosen.num_examples` of the train set."""

    def build() -> Callable:
        product, data = batch_product(problem, chosen, kind), examples(problem, chosen.num_examples)
        on_host = stages.on_host(problem)
        return spectrum.over_batches(product, data, chosen.batch_size, on_host=on_host)

    depends = (chosen.loss, chosen.parameters, chosen.batch_size, chosen.num_examples)
    return problem.once(("curvature", kind, *depends), build)


# row_norms ----------------------------------------------------------------------------------------


@tables.option
class RowNorms(OneByOne, interface.Stage):
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
    num_weights: tables.Count = 100
    threshold: tables.NonNegative = 1e-7
    rows: Literal["mean", "original"] = "mean"
    batch_size: tables.Count = 128
    num_examples: tables.Index = 0
    parameters: str = ".*"
    loss: losses.Config = losses.CROSS_ENTROPY

    def check(self) -> None:
        trees.check_pattern(self.parameters, "parameters")
        _check_loss(self.loss)

    def check_streamed(self) -> None:
        _check_number(self.num_examples)

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

    def measure(self, trained: Trained, rows: Rows) -> Updates:
        if len(rows) > self.num_weights:
            return
        variables = trained.variables
        selected = spectrum.select(variables[0], self.parameters).params
        prunable = allocate.prunable(selected, "kernels")
        entries = spectrum.quantile_entries(prunable, self.num_weights)
        row_of = self.mean_row if self.rows == "mean" else self.sum_of_rows
        norm_of = row_of(trained.problem)
        norms = [row["row_norm"] for row in rows]
        for path, index, magnitude in entries[len(rows) :]:
            quantile = len(norms) / self.num_weights
            norm = float(norm_of(variables, spectrum.one_hot(selected, path, index)))
            norms.append(norm)
            row = dict(quantile=quantile, magnitude=magnitude, row_norm=norm, parameter=path)
            yield trained.update([row], len(norms) / (len(entries) + 1))
        result = dict(
            zero_share=float(np.mean(np.asarray(norms) < self.threshold)),
            threshold=self.threshold,
            rows=self.rows,
            num_weights=len(entries),
        )
        yield trained.update([result], 1.0)

    def mean_row(self, problem: Problem) -> Callable:
        """`norm(variables, v)`: the L1 norm of the whole data set's Hessian times v."""
        product = curvature(problem, self)
        return lambda variables, v: spectrum.absolute_sum(product(variables, v))

    def sum_of_rows(self, problem: Problem) -> Callable:
        """`norm(variables, v)`: the original's, see the option `rows`."""
        data = examples(problem, self.num_examples)
        size = len(data[0])
        product = batch_product(problem, self)

        def of_batch(variables: Variables, v: PyTree, data: Images, start: int, length: int) -> Any:
            return spectrum.absolute_sum(product(variables, v, spectrum.cut(data, start, length)))

        build = lambda: jax.jit(of_batch, static_argnums=4)
        compiled = problem.once(("row of a batch", self), build)

        def norm(variables: Variables, v: PyTree) -> float:
            total = 0.0
            for start, length in spectrum.pieces(size, self.batch_size):
                total += compiled(variables, v, data, start, length)
            return float(total) / size

        return norm


# spectrum -----------------------------------------------------------------------------------------

OPERATORS = {
    "hessian": "symmetric",
    "gauss_newton": "semidefinite",
    "absolute": "squared",
}  # as `width` calls them


class Probe(NamedTuple):
    """Where the stage stands: the probe under way (of all members' in turn) and its Lanczos
    state.
    """

    number: Array
    lanczos: linops.LanczosState


@tables.option
class Spectrum(OneByOne, interface.Stage):
    """Stochastic Lanczos quadrature of the curvature of the training loss at the trained weights.

    operator: the `hessian`; `gauss_newton`, its positive semi-definite part; `absolute`, the
    Hessian applied twice, whose square root is its absolute value (two products a step).
    num_matvecs: Lanczos steps; num_probes: random start vectors. reorthogonalize: see
        `linops.lanczos_method`.
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
    num_matvecs: tables.Count = 96
    num_probes: tables.Count = 1
    reorthogonalize: Literal["full", "bfloat16", "host", "none"] = "full"
    stop_width: tables.NonNegative = 0.0
    linearize_once: bool = False
    l2: tables.NonNegative = 0.0
    batch_size: tables.Count = 1000
    num_examples: tables.Index = 0
    parameters: str = WITHOUT_BATCH_NORM
    loss: losses.Config = losses.CROSS_ENTROPY

    def check(self) -> None:
        trees.check_pattern(self.parameters, "parameters")
        _check_loss(self.loss)

    def check_order(self, order: interface.Order) -> None:
        if self.stop_width and not any(isinstance(own, Width) for own in order.all.values()):
            raise ConfigError(
                "stop_width",
                self.stop_width,
                why="which needs the tolerance that a stage of kind 'width' defines",
                allowed="0 without such a stage in the config",
            )

    def check_streamed(self) -> None:
        _check_number(self.num_examples)

    def check_network(self, problem: Problem, visits: int) -> None:
        shapes = train.shapes_of(problem)
        trees.matching(shapes, self.parameters, "parameters")
        if self.reorthogonalize == "full":
            basis = 4 * self.num_matvecs * trees.size(shapes)
            with tables.blaming("num_matvecs", self.num_matvecs):
                train.check_memory(basis, "whose basis")

    def lanczos(self) -> linops.Lanczos:
        return linops.lanczos_method(self.num_matvecs, reorthogonalize=self.reorthogonalize)

    def begin(self, problem: Problem, state: State, place: Place) -> State:
        state = interface.without_optimizer(state)
        return self.started(Trained(problem, state, place, 0), 0).sweep

    def started(self, trained: Trained, number: int) -> Trained:
        """Before the first product of probe `number`, one of this network's."""
        key = train.stage_key(trained.state.key, trained.place.position)
        key = jax.random.fold_in(key, number % self.num_probes)
        like = spectrum.select(trained.variables[0], self.parameters).params
        lanczos = self.lanczos().init(linops.rademacher(key, like))
        return _at(trained, Probe(jnp.asarray(number, jnp.int32), lanczos))

    def matvec(self, problem: Problem, variables: Variables) -> linops.Matvec:
        """The operator at one member's `variables`."""
        kind = "gauss_newton" if self.operator == "gauss_newton" else "hessian"
        if self.linearize_once:
            data = examples(problem, self.num_examples)
            like = spectrum.select(variables[0], self.parameters).params
            product = batch_product(problem, self, kind)
            bare = spectrum.linearized(product, variables, data, self.batch_size, like=like)
        else:
            bare = functools.partial(curvature(problem, self, kind), variables)
        add = lambda a, b: a + 2 * self.l2 * b
        matvec = (lambda v: tree_map(add, bare(v), v)) if self.l2 else bare
        return linops.squared(matvec) if self.operator == "absolute" else matvec

    def enclosure(self, trained: Trained) -> Callable | None:
        """`gap(tridiagonal)`: upper less lower end of the enclosed prediction, with the tolerance
        of the width stage; None where no probe ends early.
        """
        if not self.stop_width:
            return None
        others = [own[trained.member] for own in trained.place.settings.values()]
        widths = [own for own in others if isinstance(own, Width)]
        name = trained.place.name
        reader = min(widths, key=lambda own: (own.spectrum != name, own.spectrum != ""))
        variables = trained.variables
        epsilon, _ = tolerated(trained.problem, variables, reader)
        distances = width.distances(variables[0])
        options: Fields = dict(
            operator=OPERATORS[self.operator], zero_share=zero_share_of(reader, trained.earlier)
        )

        def gap(tridiagonal: linops.Tridiagonal) -> float:
            answer = width.predict_probes(tridiagonal, distances, epsilon, **options)
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
        return gap(self.lanczos().result(lanczos)) <= self.stop_width

    def measure(self, trained: Trained, rows: Rows) -> Updates:
        matvec: Any = None
        for probe in range(len(rows), self.num_probes):
            number = trained.member * self.num_probes + probe
            if int(trained.sweep.opt_state.number) != number:
                trained = self.started(trained, number)
            if matvec is None:
                matvec = self.matvec(trained.problem, trained.variables)
                gap = self.enclosure(trained)
            started = time.perf_counter()
            number, lanczos = trained.sweep.opt_state
            while not self.is_finished(lanczos, gap):
                lanczos = self.lanczos().step(matvec, lanczos)
                step = int(lanczos.step)
                if not np.isfinite(float(lanczos.alphas[step - 1])):
                    raise train.NonFiniteLossError(
                        "a product is not finite; did the training diverge?"
                    )
                trained = _at(trained, Probe(number, lanczos))
                done = probe + step / (self.num_matvecs + 1)  # the rest is for the row
                yield trained.update([], done / self.num_probes)
            seconds = round(time.perf_counter() - started, 3)
            row = dict(probe=probe, **self.row(lanczos, gap), seconds=seconds)
            yield trained.update([row], (probe + 1) / self.num_probes)

    def row(self, lanczos: linops.LanczosState, gap: Callable | None) -> Row:
        """Of a probe that has ended."""
        tridiagonal = self.lanczos().result(lanczos)
        alphas, betas, steps = map(np.asarray, tridiagonal)
        row = dict(
            operator=self.operator,
            num_matvecs=int(steps),
            alphas=alphas[:steps].tolist(),
            betas=betas[:steps].tolist(),
            dtype=str(alphas.dtype),
            dimension=trees.size(lanczos.current),
        )
        if gap:
            enclosure = gap(tridiagonal)
            row.update(enclosure=enclosure, narrow_enough=enclosure <= self.stop_width)
        return row


def _at(trained: Trained, probe: Probe) -> Trained:
    return trained._replace(sweep=trained.sweep._replace(opt_state=probe))


def tridiagonals(rows: Rows) -> linops.Tridiagonal:
    """The Lanczos results in rows of a spectrum stage, one a probe on the leading axis."""
    steps = np.array([row["num_matvecs"] for row in rows], np.int32)
    coefficients = np.zeros((2, len(rows), steps.max()), rows[0]["dtype"])
    for i, row in enumerate(rows):
        coefficients[:, i, : steps[i]] = row["alphas"], row["betas"]
    alphas, betas = coefficients
    return linops.Tridiagonal(alphas, betas, steps)


# width --------------------------------------------------------------------------------------------


@tables.option
class Width(OneByOne, interface.Stage):
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
    method: Literal["fixed_point", "grid"] = "fixed_point"
    negative: Literal["absolute", "clip"] = "absolute"
    zero_share: Annotated[float, tables.Range(-1.0, 1.0)] = -1.0
    epsilon: tables.NonNegative = 0.0
    batch_size: tables.Count = 128
    epsilon_draws: tables.Index = 200
    tolerance: tables.NonNegative = 0.001
    loss: losses.Config = losses.CROSS_ENTROPY

    def check(self) -> None:
        _check_loss(self.loss)

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
        num_examples = problem.size("train")
        if not self.epsilon and num_examples < 2 * self.batch_size:
            raise ConfigError(
                "batch_size",
                self.batch_size,
                allowed=f"up to {num_examples // 2}, half the train set (epsilon is a deviation "
                "over batches), or any with epsilon set",
            )

    def measure(self, trained: Trained, rows: Rows) -> Updates:
        if rows:
            return
        spectra = [row for row in trained.earlier if row["kind"] == Spectrum.kind]
        name = self.spectrum or spectra[-1]["stage"]
        row = self.predict(trained, _newest(spectra, name))
        yield trained.update([row], 1.0)

    def predict(self, trained: Trained, spectra: Rows) -> Row:
        """The row of the stage. spectra: those that it reads."""
        tridiagonal = tridiagonals(spectra)
        variables, earlier = trained.variables, trained.earlier
        epsilon, batch_losses = tolerated(trained.problem, variables, self)
        draws: Sequence[float] = ()
        if batch_losses is not None:
            seed = trained.place.position
            draws = list(width.epsilon_draws(batch_losses, self.epsilon_draws, seed))
        plain: Fields = dict(negative=self.negative, zero_share=zero_share_of(self, earlier))
        operator = OPERATORS[spectra[0]["operator"]]
        options: Fields = dict(operator=operator, **plain)
        reach = (width.distances(variables[0]), epsilon)
        answer = width.predict_probes(tridiagonal, *reach, epsilons=draws, **options)
        course = width.history(tridiagonal, *reach, **options)
        values, weights = linops.ritz(tridiagonal)
        values = width.OPERATORS[operator](values)
        on_grid = width.predict(values, weights, *reach, method="grid", **plain)
        ratios = np.concatenate([np.arange(0, 0.9, 0.02), np.arange(0.9, 1.0005, 0.001)]).clip(0, 1)
        radii = reach[0].at(ratios)
        low, high = answer.band()
        return dict(
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
                lower=[_known(bound) for bound in course.lower],
                upper=[_known(bound) for bound in course.upper],
            ),
            ratios=ratios.tolist(),
            distances=radii.tolist(),
            widths=width.ratio(values, weights, radii, epsilon, **plain).tolist(),
            ritz_values=values.tolist(),
            ritz_weights=weights.tolist(),
        )


def _known(number: float) -> float | None:
    """None for NaN, which JSON lacks."""
    return float(number) if np.isfinite(number) else None


def _newest(rows: Rows, stage: str) -> Rows:
    """Those of the stage's latest visit."""
    rows = [row for row in rows if row["stage"] == stage]
    visit = max(row["visit"] for row in rows)
    return [row for row in rows if row["visit"] == visit]


def tolerated(
    problem: Problem, variables: Variables, chosen: Width
) -> tuple[float, np.ndarray | None]:
    """(epsilon, the mean training loss of every whole batch in the data's order, if epsilon is not
    set); raises ConfigError if it comes out as 0.
    """
    if chosen.epsilon:
        return chosen.epsilon, None
    mean_loss = network_of(problem, chosen.loss).mean_loss

    def losses_of(variables: Variables, *data: Array) -> Array:
        return spectrum.batch_losses(mean_loss, variables, data, chosen.batch_size)

    name = ("batch losses", chosen.loss, chosen.batch_size)
    compiled = problem.once(name, lambda: jax.jit(losses_of))
    batch_losses = compiled(variables, problem.train_images, problem.train_labels)
    batch_losses = np.asarray(batch_losses, np.float64)
    try:
        return width.epsilon(batch_losses), batch_losses
    except ValueError as error:
        alive = any(np.any(leaf) for leaf in allocate.prunable(variables[0], "kernels").values())
        hint = "" if alive else " All kernels of the network are 0: its penalty was too strong."
        raise ConfigError("epsilon", chosen.epsilon, why=f"{error}{hint}") from None


def zero_share_of(chosen: Width, earlier: Rows) -> float:
    """The share of directions without curvature: as set, else of the latest `row_norms` stage, else
    0.
    """
    if chosen.zero_share >= 0:
        return chosen.zero_share
    row_norms = [row for row in earlier if row["kind"] == RowNorms.kind]
    return next((row["zero_share"] for row in reversed(row_norms) if "zero_share" in row), 0.0)


def actual_limits(rows: Rows, tolerance: float, epsilon: float) -> dict[str, float]:
    """The actual largest ratio by every definition that the rows of curves and limit stages so far
    decide.

    Of the latest curve without retraining, on each of its splits, e.g. `test accuracy_within`; of
    limit stages by their stage's name.
    """
    limits = {}
    curves = [row for row in rows if row["kind"] == "curve" and not row["retrained"]]
    if curves:
        last = curves[-1]
        curves = [row for row in curves if row["visit"] == last["visit"]]
        curves = [row for row in curves if row["stage"] == last["stage"]]
    for split in sorted({row["split"] for row in curves}):
        on_split = [row for row in curves if row["split"] == split]
        for criterion in CRITERIA:
            bound = dict(accuracy_within=tolerance, loss_within=epsilon).get(criterion)
            limits[f"{split} {criterion}"] = largest_ratio(on_split, criterion, bound)
    for row in rows:
        if row["kind"] == Limit.kind and row.get("limit") is not None:
            limits[row["stage"]] = row["limit"]
    return {name: limit for name, limit in limits.items() if limit is not None}


STAGES = (Limit, Path, RowNorms, Spectrum, Width)
