"""Stages of the geometric limit: the actual one, the pruning path, weights without curvature,
spectrum, prediction.

They read a trained network, and earlier rows of the run (or of `config.start_from`); see
`interface`.
Source: Zhang et al. 2023, arXiv:2306.05857.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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

PyTree = Any
WITHOUT_BATCH_NORM = (
    r"(?!.*bn\d*/).*"  # as the original, which leaves scale and bias of batch norms out
)


def one_member(problem: train.Problem, state: train.State, member: int) -> tuple[PyTree, PyTree]:
    """(params, batch_stats) of one member, in float32 or wider.

    Weights of a narrower type keep their values, and the network its arithmetic; directions of
    curvature do not fit.
    """
    pair = jax.tree.map(trees.widen, (state.params, state.batch_stats))
    return pair if problem.members is None else jax.tree.map(lambda leaf: leaf[member], pair)


def member_key(problem: train.Problem, state: train.State, member: int) -> Array:
    return state.key if problem.members is None else state.key[member]


def members_of(problem: train.Problem) -> range:
    return range(problem.members or 1)


def only(problem: train.Problem, member: int, row: dict) -> list[list[dict]]:
    """Rows of all members, of which only one has something new."""
    return [[row] if i == member else [] for i in members_of(problem)]


class Network(NamedTuple):
    """A trained network as functions of (params, batch_stats) and a batch (images, labels), in
    inference mode.
    """

    outputs: Callable  # -> logits
    loss: Callable  # (logits, batch) -> mean over the batch

    def mean_loss(self, variables: tuple[PyTree, PyTree], batch: tuple[Array, Array]) -> Array:
        return self.loss(self.outputs(variables, batch), batch)


def network_of(problem: train.Problem, loss: dict) -> Network:
    rule = losses.of(loss)

    def outputs(variables: tuple, batch: tuple) -> Array:
        params, batch_stats = variables
        return problem.model.apply(
            {"params": params, "batch_stats": batch_stats}, problem.images(batch[0])
        )

    return Network(outputs, lambda logits, batch: rule(logits, batch[1]).mean())


def train_losses(
    problem: train.Problem, variables: tuple[PyTree, PyTree], loss: dict, batch_size: int
) -> np.ndarray:
    """Mean training loss of every whole batch, in the data's order: float64 [batches]."""
    network = network_of(problem, loss)
    compiled = problem.once(
        ("batch losses", loss, batch_size),
        lambda: jax.jit(
            lambda variables, *data: spectrum.batch_losses(
                network.mean_loss, variables, data, batch_size
            )
        ),
    )
    return np.asarray(compiled(variables, problem.train_images, problem.train_labels), np.float64)


# limit --------------------------------------------------------------------------------------------


class Criterion(NamedTuple):
    """What counts as losing nothing: test(accuracy, loss, dense_accuracy, dense_loss, tolerance) ->
    bool.
    """

    test: Callable
    tolerance: float
    text: str


CRITERIA = {
    "accuracy": Criterion(lambda a, _, a0, __, ___: a >= a0, 0.0, "accuracy not below dense"),
    "better_accuracy": Criterion(
        lambda a, _, a0, __, ___: a > a0, 0.0, "accuracy above dense, as the original"
    ),
    "accuracy_within": Criterion(
        lambda a, _, a0, __, t: a >= a0 - t, 0.001, "accuracy at most {} below dense"
    ),
    "loss_within": Criterion(
        lambda _, l, __, l0, t: l <= l0 + t, 0.01, "loss at most {} above dense"
    ),
}


@tables.option
class Limit(stages.Selecting):
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

    kind: ClassVar[str] = "limit"
    needs: ClassVar[tuple[str, ...]] = ("train",)
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
            raise tables.ConfigError("scan", self.scan, allowed="at least one ratio, ascending")
        if self.tolerance and not CRITERIA[self.criterion].tolerance:
            raise tables.ConfigError(
                "tolerance", self.tolerance, allowed=f"0 with criterion {self.criterion!r}"
            )

    def tolerated(self) -> float:
        """The tolerance in use."""
        return self.tolerance or CRITERIA[self.criterion].tolerance

    def run(
        self,
        problem: train.Problem,
        state: train.State,
        settings: Sequence[Any],
        place: interface.Place,
        rows: list[list[dict]],
    ) -> Iterator[train.Update]:
        for member in members_of(problem):
            chosen = settings[member]
            if rows[member] and rows[member][-1].get("phase") == "result":
                continue
            evaluate = stages.pruned_evaluation(problem, state, chosen, place, member, chosen.split)
            known = {(row["phase"], row["ratio"]): row for row in rows[member] if "ratio" in row}
            for row in find_limit(evaluate, chosen, known):
                done = (member + row.pop("done")) / (problem.members or 1)
                yield train.Update(state, only(problem, member, row), done)


def find_limit(
    evaluate: Callable[[float], dict], chosen: Limit, known: dict | None = None
) -> Iterator[dict]:
    """Rows of the search: evaluations (phase dense, scan, bisect), then the result; `known` ones
    are not repeated.

    evaluate(ratio) -> dict(accuracy=..., loss=...).
    """
    known, count, rule = known or {}, 0, CRITERIA[chosen.criterion]

    def look(phase: str, ratio: float, done: float) -> tuple[dict, list[dict]]:
        nonlocal count
        count += 1
        if (phase, ratio) in known:
            return known[phase, ratio], []
        row = dict(phase=phase, ratio=ratio, split=chosen.split, **evaluate(ratio))
        return row, [{**row, "done": done}]

    dense, new = look("dense", 0.0, 0.0)
    yield from new
    passes = lambda row: bool(
        rule.test(
            row["accuracy"], row["loss"], dense["accuracy"], dense["loss"], chosen.tolerated()
        )
    )
    low, high = (0.0 if passes(dense) else None), None
    for i, ratio in enumerate(reversed(chosen.scan)):
        row, new = look("scan", ratio, 0.5 * (i + 1) / len(chosen.scan))
        yield from new
        if passes(row):
            low = ratio
            break
        high = ratio
    how = rule.text.format(f"{chosen.tolerated():g}")
    if low is None:
        how += "; passes nowhere on the scan"
    else:
        how += f"; passes at {low:g}, " + (
            "the end of the scan" if high is None else f"fails at {high:g} of the scan"
        )
        how += f", then bisection to {chosen.resolution:g}"
        high = 1.0 if high is None else high
        start = (low, high)
        while high - low > chosen.resolution:
            middle = (low + high) / 2
            share = 1 - (high - low - chosen.resolution) / max(
                start[1] - start[0], chosen.resolution
            )
            row, new = look("bisect", middle, 0.5 + 0.49 * share)
            yield from new
            low, high = (middle, high) if passes(row) else (low, middle)
    yield dict(
        phase="result",
        limit=low,
        criterion=chosen.criterion,
        tolerance=chosen.tolerated(),
        split=chosen.split,
        evaluations=count,
        how=how,
        done=1.0,
    )


def largest_ratio(rows: list[dict], criterion: str, tolerance: float | None = None) -> float | None:
    """The largest ratio of a curve (rows of one split) that loses nothing against its smallest;
    None: not even that.
    """
    rows, rule = sorted(rows, key=lambda row: row["ratio"]), CRITERIA[criterion]
    dense, tolerance = rows[0], rule.tolerance if tolerance is None else tolerance
    good = [
        row["ratio"]
        for row in rows
        if rule.test(row["accuracy"], row["loss"], dense["accuracy"], dense["loss"], tolerance)
    ]
    return max(good, default=None)


# path ---------------------------------------------------------------------------------------------


@tables.option
class Path(stages.Selecting):
    """How pruning really moves the training loss, beside the second order, which is all that the
    prediction knows.

    For every ratio: the distance R, the change of the loss, and its first- and second-order terms
    g.d and d.Hd / 2 for the step d that pruning makes. At a minimum the first is small; where it is
    not, the actual limit lies elsewhere than predicted, at a larger ratio if it is negative.
    ratios: shares removed; at_limits: and those of earlier predictions and `limit` stages.
    num_examples: of the train set, see
    `config.sample`; 0 for all.
    """

    kind: ClassVar[str] = "path"
    needs: ClassVar[tuple[str, ...]] = ("train",)
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
            raise tables.ConfigError("ratios", self.ratios, allowed="at least one")
        _check_loss(self.loss)

    def check_streamed(self) -> None:
        _check_number(self.num_examples)

    def run(
        self,
        problem: train.Problem,
        state: train.State,
        settings: Sequence[Any],
        place: interface.Place,
        rows: list[list[dict]],
    ) -> Iterator[train.Update]:
        shapes, total = train.shapes_of(problem), problem.members or 1
        for member in members_of(problem):
            chosen, own = settings[member], stages.member_state(problem, state, member)
            step_of, terms = pruning_step(problem, chosen, place), path_terms(problem, chosen)
            ratios = path_ratios(chosen, place.earlier[member])
            for i, ratio in enumerate(ratios):
                if i < len(rows[member]):
                    continue
                counts = allocate.keep_counts(shapes, ratio, **chosen.keywords(problem))
                step, distance = step_of(own, counts)
                found = terms((own.params, own.batch_stats), step)._asdict()
                row = dict(ratio=ratio, distance=float(distance))
                row |= {name: float(value) for name, value in found.items()}
                done = (member + (i + 1) / len(ratios)) / total
                yield train.Update(state, only(problem, member, row), done)


def path_ratios(chosen: Path, earlier: list[dict]) -> list[float]:
    """Where to measure, ascending. earlier: rows before the stage."""
    field = {"width": "predicted", "limit": "limit"}
    limits = [
        row.get(field[row["kind"]]) for row in earlier if chosen.at_limits and row["kind"] in field
    ]
    return sorted({*chosen.ratios, *(ratio for ratio in limits if ratio is not None and ratio < 1)})


def pruning_step(problem: train.Problem, chosen: Path, place: interface.Place) -> Callable:
    """`step_of(state, counts) -> (pruned less current params, its norm)` of one member: one program
    for all ratios.
    """
    prune = stages.pruning(problem, chosen, place.position)

    def step_of(state: train.State, counts: PyTree) -> tuple[PyTree, Array]:
        pruned = masks.apply(state.params, prune(state, counts))
        step = jax.tree.map(jnp.subtract, pruned, state.params)
        return step, trees.norm(step)

    name = ("pruning step", chosen.selecting(place.position))
    return problem.once(name, lambda: jax.jit(step_of))


def path_terms(problem: train.Problem, chosen: Path) -> Callable:
    """`terms(variables, step)`: `spectrum.taylor` of the training loss for a step of the params."""
    network = network_of(problem, chosen.loss)

    def build() -> Callable:
        data = examples(problem, chosen.num_examples)
        terms = spectrum.taylor(
            network.mean_loss, data, chosen.batch_size, on_host=stages.on_host(problem)
        )
        return lambda variables, step: terms(
            variables, (step, jax.tree.map(jnp.zeros_like, variables[1]))
        )

    return problem.once(("path", chosen.loss, chosen.batch_size, chosen.num_examples), build)


# row_norms ----------------------------------------------------------------------------------------


@tables.option
class RowNorms(interface.Stage):
    """Share of weights without curvature, from the Hessian rows of the weights at `num_weights`
    magnitude quantiles.

    num_weights: how many weights are looked at. threshold: a weight has no curvature if the L1 norm
    of its row is below. rows: `mean` is the row of the whole data set's Hessian; `original`
    sums the norms of every batch's row and divides by the number of examples, so that it scales
    like 1 / batch_size. num_examples: of the train set, see `config.sample`; 0 for all.
    parameters: pattern of the arrays whose entries make up a row, and among whose kernels the
    weights are.
    """

    kind: ClassVar[str] = "row_norms"
    needs: ClassVar[tuple[str, ...]] = ("train",)
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

    def check_network(self, problem: train.Problem, visits: int) -> None:
        shapes = train.shapes_of(problem)
        matches = trees.matching(shapes, self.parameters, "parameters")
        kernels = list(allocate.prunable(shapes, "kernels"))
        if not any(matches[path] for path in kernels):
            raise tables.ConfigError(
                "parameters",
                self.parameters,
                why="which matches no kernel",
                allowed=f"a pattern of paths such as {kernels[0]!r}",
            )

    def run(
        self,
        problem: train.Problem,
        state: train.State,
        settings: Sequence[Any],
        place: interface.Place,
        rows: list[list[dict]],
    ) -> Iterator[train.Update]:
        total = problem.members or 1
        for member in members_of(problem):
            chosen = settings[member]
            if len(rows[member]) > chosen.num_weights:
                continue
            variables = one_member(problem, state, member)
            prunable = allocate.prunable(
                spectrum.select(variables[0], chosen.parameters).params, "kernels"
            )
            entries = spectrum.quantile_entries(prunable, chosen.num_weights)
            norm = row_measure(problem, chosen)
            norms = [row["row_norm"] for row in rows[member]]
            for i, (path, index, magnitude) in enumerate(entries):
                if i < len(norms):
                    continue
                norms.append(norm(variables, path, index))
                row = dict(
                    quantile=i / chosen.num_weights,
                    magnitude=magnitude,
                    row_norm=norms[-1],
                    parameter=path,
                )
                done = (member + (i + 1) / (len(entries) + 1)) / total
                yield train.Update(state, only(problem, member, row), done)
            share = float(np.mean(np.asarray(norms) < chosen.threshold))
            result = dict(
                zero_share=share,
                threshold=chosen.threshold,
                rows=chosen.rows,
                num_weights=len(entries),
            )
            yield train.Update(state, only(problem, member, result), (member + 1) / total)


def _check_loss(loss: dict) -> None:
    with tables.within("loss"):
        losses.of(loss)


def _check_number(num_examples: int) -> None:
    """Raises ConfigError, of streamed data, unless a number of images says how many to keep in
    memory.
    """
    if not num_examples:
        raise interface.needs_memory("num_examples", 0, "all of which are read into memory")


def examples(problem: train.Problem, num: int) -> tuple[Array, Array]:
    """`num` train images and labels, see `Problem.examples`; 0 for all."""
    return problem.examples("train", num or problem.size("train"))


def batch_product(problem: train.Problem, chosen: Any, kind: str = "hessian") -> spectrum.Product:
    """`product(variables, v, batch)` with the curvature of the training loss in the parameters
    `chosen.parameters`.
    """
    network = network_of(problem, chosen.loss)

    def product(variables: tuple, v: PyTree, batch: tuple) -> PyTree:
        params, batch_stats = variables
        selected = spectrum.select(params, chosen.parameters)
        outputs = lambda part, batch: network.outputs((selected.rebuild(part), batch_stats), batch)
        if kind == "gauss_newton":
            return linops.gauss_newton(outputs, network.loss, selected.params, batch)(v)
        return linops.hvp(
            lambda part, batch: network.loss(outputs(part, batch), batch), selected.params, batch
        )(v)

    return product


def curvature(problem: train.Problem, chosen: Any, kind: str = "hessian") -> Callable:
    """`product(variables, v)`: `batch_product` over `chosen.num_examples` of the train set."""
    name = (
        "curvature",
        kind,
        chosen.loss,
        chosen.parameters,
        chosen.batch_size,
        chosen.num_examples,
    )
    product, data = batch_product(problem, chosen, kind), examples(problem, chosen.num_examples)
    on_host = stages.on_host(problem)
    return problem.once(
        name, lambda: spectrum.over_batches(product, data, chosen.batch_size, on_host=on_host)
    )


def curvature_at(
    problem: train.Problem, chosen: Any, kind: str, variables: tuple[PyTree, PyTree]
) -> Callable:
    """`matvec(v)`: `curvature` at these variables."""
    if not chosen.linearize_once:
        product = curvature(problem, chosen, kind)
        return lambda v: product(variables, v)
    (params, batch_stats), product = variables, batch_product(problem, chosen, kind)
    selected = spectrum.select(params, chosen.parameters)
    of_selected = lambda part, v, batch: product((selected.rebuild(part), batch_stats), v, batch)
    return spectrum.linearized(
        of_selected, selected.params, examples(problem, chosen.num_examples), chosen.batch_size
    )


def row_measure(problem: train.Problem, chosen: RowNorms) -> Callable:
    """`norm(variables, path, index)`: a row's L1 norm as `chosen.rows` defines it."""
    selected = lambda variables: spectrum.select(variables[0], chosen.parameters).params
    if chosen.rows == "mean":
        product = curvature(problem, chosen)

        def norm_of_mean(variables: tuple, path: str, index: tuple[int, ...]) -> float:
            matvec = lambda v: product(variables, v)
            return float(spectrum.row_norm(matvec, selected(variables), path, index))

        return norm_of_mean
    data = examples(problem, chosen.num_examples)
    size = len(data[0])
    batch_row = batch_product(problem, chosen)

    def norm_of_batch(variables: tuple, v: PyTree, data: tuple, start: int, length: int) -> Any:
        row = batch_row(variables, v, spectrum.cut(data, start, length))
        return sum(map(trees.absolute_sum, row.values()))

    name = ("row of a batch", chosen)
    compiled = problem.once(name, lambda: jax.jit(norm_of_batch, static_argnums=4))

    def mean_norm(variables: tuple, path: str, index: tuple[int, ...]) -> float:
        v = spectrum.one_hot(selected(variables), path, index)
        total = 0.0
        for start in range(0, size, chosen.batch_size):
            length = min(chosen.batch_size, size - start)
            total += compiled(variables, v, data, start, length)
        return float(total) / size

    return mean_norm


# spectrum -----------------------------------------------------------------------------------------

OPERATORS = {
    "hessian": "symmetric",
    "gauss_newton": "semidefinite",
    "absolute": "squared",
}  # as `width` calls them


@tables.option
class Spectrum(interface.Stage):
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

    kind: ClassVar[str] = "spectrum"
    needs: ClassVar[tuple[str, ...]] = ("train",)
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
            raise tables.ConfigError(
                "stop_width",
                self.stop_width,
                why="which needs the tolerance that a stage of kind 'width' defines",
                allowed="0 without such a stage in the config",
            )

    def check_streamed(self) -> None:
        _check_number(self.num_examples)

    def check_network(self, problem: train.Problem, visits: int) -> None:
        shapes = train.shapes_of(problem)
        trees.matching(shapes, self.parameters, "parameters")
        if self.reorthogonalize == "full":
            basis = 4 * self.num_matvecs * trees.size(shapes)
            with tables.blaming("num_matvecs", self.num_matvecs):
                train.check_memory(basis, "whose basis")

    def begin(
        self,
        problem: train.Problem,
        state: train.State,
        settings: Sequence[Any],
        place: interface.Place,
    ) -> train.State:
        return interface.without_optimizer(state)._replace(
            opt_state=_start(problem, state, self, place, 0)
        )

    def matvec(self, problem: train.Problem, variables: tuple) -> linops.Matvec:
        """The operator at one member's `variables`."""
        kind = "gauss_newton" if self.operator == "gauss_newton" else "hessian"
        bare = matvec = curvature_at(problem, self, kind, variables)
        if self.l2:
            add = lambda a, b: a + 2 * self.l2 * b
            matvec = lambda v: jax.tree.map(add, bare(v), v)
        return linops.squared(matvec) if self.operator == "absolute" else matvec

    def run(
        self,
        problem: train.Problem,
        state: train.State,
        settings: Sequence[Any],
        place: interface.Place,
        rows: list[list[dict]],
    ) -> Iterator[train.Update]:
        total = self.num_probes * (problem.members or 1)
        method = linops.lanczos_method(self.num_matvecs, reorthogonalize=self.reorthogonalize)
        finished = sum(map(len, rows))
        matvec: Any = None
        at = narrow = None
        for number in range(finished, total):
            if int(state.opt_state.number) != number:
                state = state._replace(opt_state=_start(problem, state, self, place, number))
            member, probe = divmod(number, self.num_probes)
            variables = one_member(problem, state, member)
            if at != member:
                matvec = None  # what it keeps may be large
                matvec = self.matvec(problem, variables)
                at = member
            if self.stop_width:
                narrow = _enclosure_width(problem, self, place, variables, member)
            lanczos = state.opt_state.lanczos
            started = time.perf_counter()
            while (step := int(lanczos.step)) < self.num_matvecs:
                lanczos = method.step(matvec, lanczos)
                state = state._replace(opt_state=Probe(state.opt_state.number, lanczos))
                step += 1
                if not np.isfinite(float(lanczos.alphas[step - 1])):
                    raise train.NonFiniteLossError(
                        f"{place.name}: a product is not finite; did the training diverge?"
                    )
                if narrow and step % 4 == 0 and narrow(method.result(lanczos)) <= self.stop_width:
                    break
                if int(lanczos.num_steps) < step:
                    break  # the Krylov space is exhausted
                done = (number + step / (self.num_matvecs + 1)) / total  # 1 is for the row
                yield train.Update(state, interface.rows_per_member(problem), done)
            tridiagonal = method.result(lanczos)
            alphas, betas, steps = map(np.asarray, tridiagonal)
            row = dict(
                probe=probe,
                operator=self.operator,
                num_matvecs=int(steps),
                alphas=alphas[:steps].tolist(),
                betas=betas[:steps].tolist(),
                dtype=str(alphas.dtype),
                dimension=trees.size(lanczos.current),
                seconds=round(time.perf_counter() - started, 3),
            )
            if narrow:
                gap = narrow(tridiagonal)
                row.update(enclosure=gap, narrow_enough=gap <= self.stop_width)
            yield train.Update(state, only(problem, member, row), (number + 1) / total)


class Probe(NamedTuple):
    """Where the stage stands: the probe under way (of all members' in turn) and its Lanczos
    state.
    """

    number: Array
    lanczos: linops.LanczosState


def _start(
    problem: train.Problem,
    state: train.State,
    chosen: Spectrum,
    place: interface.Place,
    number: int,
) -> Probe:
    """The state before the first product of probe `number`."""
    member, probe = divmod(number, chosen.num_probes)
    params, _ = one_member(problem, state, member)
    like = spectrum.select(params, chosen.parameters).params
    key = jax.random.fold_in(
        train.stage_key(member_key(problem, state, member), place.position), probe
    )
    method = linops.lanczos_method(chosen.num_matvecs, reorthogonalize=chosen.reorthogonalize)
    return Probe(jnp.asarray(number, jnp.int32), method.init(linops.rademacher(key, like)))


def _enclosure_width(
    problem: train.Problem,
    chosen: Spectrum,
    place: interface.Place,
    variables: tuple,
    member: int,
) -> Callable:
    """`gap(tridiagonal)`: upper less lower end of the enclosed prediction, with the tolerance of
    the width stage.
    """
    found = [own[member] for own in place.others.values() if isinstance(own[member], Width)]
    reader = min(found, key=lambda own: (own.spectrum != place.name, own.spectrum != ""))
    epsilon, _ = tolerated(problem, variables, reader)
    zero_share = zero_share_of(reader, place.earlier[member])
    options: dict[str, Any] = dict(operator=OPERATORS[chosen.operator], zero_share=zero_share)
    distances = width.distances(variables[0])

    def gap(tridiagonal: linops.Tridiagonal) -> float:
        answer = width.predict_probes(tridiagonal, distances, epsilon, **options)
        return answer.upper - answer.lower

    return gap


def tridiagonals(rows: list[dict]) -> linops.Tridiagonal:
    """The Lanczos results in rows of a spectrum stage, one a probe on the leading axis."""
    most = max(row["num_matvecs"] for row in rows)
    row_type = np.dtype(rows[0]["dtype"])
    pad = lambda values: np.pad(np.asarray(values, row_type), (0, most - len(values)))
    alphas = np.stack([pad(row["alphas"]) for row in rows])
    betas = np.stack([pad(row["betas"]) for row in rows])
    return linops.Tridiagonal(
        alphas, betas, np.array([row["num_matvecs"] for row in rows], np.int32)
    )


# width --------------------------------------------------------------------------------------------


@tables.option
class Width(interface.Stage):
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

    kind: ClassVar[str] = "width"
    needs: ClassVar[tuple[str, ...]] = ("spectrum",)
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
            raise tables.ConfigError(
                "spectrum", self.spectrum, why="no earlier stage of kind 'spectrum'", known=known
            )

    def check_streamed(self) -> None:
        if not self.epsilon:
            raise interface.needs_memory("epsilon", 0, "which is measured on all images in memory")

    def check_network(self, problem: train.Problem, visits: int) -> None:
        num_examples = problem.size("train")
        if not self.epsilon and num_examples < 2 * self.batch_size:
            raise tables.ConfigError(
                "batch_size",
                self.batch_size,
                allowed=f"up to {num_examples // 2}, half the train set (epsilon is a deviation "
                "over batches), or any with epsilon set",
            )

    def run(
        self,
        problem: train.Problem,
        state: train.State,
        settings: Sequence[Any],
        place: interface.Place,
        rows: list[list[dict]],
    ) -> Iterator[train.Update]:
        found = []
        for member in members_of(problem):
            chosen, earlier = settings[member], place.earlier[member]
            spectra = [row for row in earlier if row["kind"] == Spectrum.kind]
            name = chosen.spectrum or spectra[-1]["stage"]
            used = [row for row in spectra if row["stage"] == name]
            newest = max(row["visit"] for row in used)
            used = [row for row in used if row["visit"] == newest]
            variables = one_member(problem, state, member)
            found.append([predict(problem, variables, chosen, used, earlier, place)])
        yield train.Update(state, found, 1.0)


def tolerated(
    problem: train.Problem, variables: tuple, chosen: Width
) -> tuple[float, np.ndarray | None]:
    """(epsilon, the batch losses behind it, if it is not set); raises ConfigError if it comes out
    as 0.
    """
    if chosen.epsilon:
        return chosen.epsilon, None
    found = train_losses(problem, variables, chosen.loss, chosen.batch_size)
    try:
        return width.epsilon(found), found
    except ValueError as error:
        alive = any(np.any(leaf) for leaf in allocate.prunable(variables[0], "kernels").values())
        hint = "" if alive else " All kernels of the network are 0: its penalty was too strong."
        raise tables.ConfigError("epsilon", chosen.epsilon, why=f"{error}{hint}") from None


def zero_share_of(chosen: Width, earlier: list[dict]) -> float:
    """The share of directions without curvature: as set, else of the latest `row_norms` stage, else
    0.
    """
    measured = [
        row["zero_share"] for row in earlier if row["kind"] == "row_norms" and "zero_share" in row
    ]
    return chosen.zero_share if chosen.zero_share >= 0 else (measured[-1] if measured else 0.0)


def predict(
    problem: train.Problem,
    variables: tuple,
    chosen: Width,
    spectra: list[dict],
    earlier: list[dict],
    place: interface.Place,
) -> dict:
    """The row of a `width` stage."""
    operator, tridiagonal = OPERATORS[spectra[0]["operator"]], tridiagonals(spectra)
    distances = width.distances(variables[0])
    epsilon, batch = tolerated(problem, variables, chosen)
    draws = []
    if batch is not None:
        draws = list(width.epsilon_draws(batch, chosen.epsilon_draws, place.position))
    zero_share = zero_share_of(chosen, earlier)
    plain: dict[str, Any] = dict(negative=chosen.negative, zero_share=zero_share)
    options: dict[str, Any] = dict(operator=operator, **plain)
    answer = width.predict_probes(tridiagonal, distances, epsilon, epsilons=draws, **options)
    values, weights = linops.ritz(tridiagonal)
    values = width.OPERATORS[operator](values)
    course = width.history(tridiagonal, distances, epsilon, **options)
    low, high = answer.band()
    on_grid = width.predict(values, weights, distances, epsilon, method="grid", **plain)
    ratios = np.concatenate([np.arange(0, 0.9, 0.02), np.arange(0.9, 1.0005, 0.001)]).clip(0, 1)
    radii = distances.at(ratios)
    known = lambda number: float(number) if np.isfinite(number) else None
    return dict(
        predicted=on_grid if chosen.method == "grid" else answer.ratio,
        method=chosen.method,
        low=low,
        high=high,
        enclosure_low=known(answer.lower),
        enclosure_high=known(answer.upper),
        standard_error=known(answer.standard_error),
        epsilon_error=known(answer.epsilon_error),
        per_probe=answer.per_probe.tolist(),
        predicted_on_grid=on_grid,
        epsilon=epsilon,
        zero_share=zero_share,
        operator=spectra[0]["operator"],
        spectrum=spectra[0]["stage"],
        num_matvecs=int(max(tridiagonal.num_steps)),
        num_probes=len(spectra),
        negative_mass=answer.negative_mass,
        negative=chosen.negative,
        actual=actual_limits(earlier, chosen.tolerance, epsilon),
        history=dict(
            num_matvecs=course.num_matvecs.tolist(),
            predicted=course.ratio.tolist(),
            lower=[known(x) for x in course.lower],
            upper=[known(x) for x in course.upper],
        ),
        ratios=ratios.tolist(),
        distances=radii.tolist(),
        widths=width.ratio(values, weights, radii, epsilon, **plain).tolist(),
        ritz_values=values.tolist(),
        ritz_weights=weights.tolist(),
    )


def actual_limits(rows: list[dict], tolerance: float, epsilon: float) -> dict[str, float]:
    """The actual largest ratio by every definition that the rows of curves and limit stages so far
    decide.

    Of the latest curve without retraining, on each of its splits, e.g. `test accuracy_within`; of
    limit stages by their stage's name.
    """
    found = {}
    curves = [row for row in rows if row["kind"] == "curve" and not row["retrained"]]
    if curves:
        newest = [
            row
            for row in curves
            if (row["stage"], row["visit"]) == (curves[-1]["stage"], curves[-1]["visit"])
        ]
        for split in sorted({row["split"] for row in newest}):
            own = [row for row in newest if row["split"] == split]
            for name in CRITERIA:
                bound = dict(accuracy_within=tolerance, loss_within=epsilon).get(name)
                best = largest_ratio(own, name, bound)
                if best is not None:
                    found[f"{split} {name}"] = best
    for row in rows:
        if row["kind"] == "limit" and row.get("limit") is not None:
            found[row["stage"]] = row["limit"]
    return found


STAGES = (Limit, Path, RowNorms, Spectrum, Width)
