"""How sparse a trained network can get: Gaussian width of its loss basin, and the pruning ratio
where the two meet.

Weights of tolerable loss fill the ellipsoid {x: x^T H x / 2 <= epsilon} around the trained weights
w, with semi-axes r_i^2 = 2 epsilon / |lambda_i|. Seen from distance R its squared Gaussian width,
per dimension, is

    omega(R)^2 / D = sum_i tau_i r_i^2 / (R^2 + r_i^2)
                   = sum_i tau_i / (1 + |lambda_i| R^2 / (2 epsilon)),

where the Ritz values lambda_i and weights tau_i (sum 1) of Lanczos quadrature stand for the D
eigenvalues. Pruning the share p of the weights by magnitude moves w by R(p); the predicted largest
pruning ratio is the p with omega(R(p))^2 / D = p. In three lines, from a Lanczos run
(`linops.lanczos`):

    values, weights = linops.ritz(tridiagonal)
    tolerance = width.epsilon(batch_losses)
    ratio = width.predict(values, weights, width.distances(params), tolerance)

The estimate is fragile: nearly all weight tau sits at lambda = 0, where the summand has a kink.
`predict_probes` therefore returns it with its spread over probes and over epsilon and between
bounds of the quadrature error, and `history` with its course over the number of products.

Everything here is small and runs on the host, in NumPy and float64.
Source: Zhang et al. 2023, arXiv:2306.05857.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from sparsity_jax import linops, originals, tables, trees
from sparsity_jax.types import Fields, PyTree

__all__ = [
    "OPERATORS",
    "Count",
    "Distances",
    "History",
    "Method",
    "Operator",
    "Prediction",
    "Scope",
    "absolute_enclosure",
    "distances",
    "enclosure",
    "epsilon",
    "epsilon_draws",
    "history",
    "negative_mass",
    "predict",
    "predict_on_grid",
    "predict_probes",
    "ratio",
]

Scope = Literal["kernels", "all"]
Count = Literal["nearest", "original", "linear"]
Operator = Literal["symmetric", "semidefinite", "squared"]
Method = Literal["fixed_point", "grid"]

_NEGATIVE = {"absolute": np.abs, "clip": lambda values: np.maximum(values, 0.0)}


class _Spectrum(NamedTuple):
    """omega^2 / D as a function of R^2: flat + sum_i weights_i / (1 + sharpness_i R^2)."""

    sharpness: ndarray  # |lambda| / (2 epsilon) > 0, float64 [n], of all probes
    weights: ndarray  # float64 [n]
    flat: float  # weight of curvature 0; with `weights` it sums to 1

    def shares(self, squares: ArrayLike) -> ndarray:
        """squares: R^2, any shape. Returns omega^2 / D in [0, 1]; exactly 1 at R = 0."""
        squares = np.asarray(squares)
        flat_squares = squares.ravel()
        size = max(2**18 // max(self.weights.size, 1), 1)  # bounds the temporary array
        sums = np.empty(squares.size)
        for start in range(0, squares.size, size):
            part = slice(start, start + size)
            with np.errstate(over="ignore"):  # 1 / inf = 0 is right
                terms = np.multiply.outer(flat_squares[part], self.sharpness)
            terms += 1
            np.divide(self.weights, terms, out=terms)
            sums[part] = terms.sum(axis=1)
        shares = np.minimum(sums + self.flat, 1.0).reshape(squares.shape)
        return np.where(squares == 0, 1.0, shares)


def _rows(values: ArrayLike, weights: ArrayLike) -> tuple[ndarray, ndarray]:
    """Values and weights as finite float64 [probes, m], every row of weights summing to 1."""
    values = np.atleast_2d(np.asarray(values, float))
    weights = np.atleast_2d(np.asarray(weights, float))
    if values.shape != weights.shape or values.ndim != 2 or not values.size:
        raise ValueError(
            f"values and weights have shapes {values.shape} and {weights.shape}; both must be [m] "
            "or [probes, m], m at least 1."
        )
    if not np.isfinite([values, weights]).all():
        raise ValueError(
            "values or weights are not finite: the products behind them overflowed or returned NaN."
        )
    sums = weights.sum(axis=1, keepdims=True)
    if weights.min() < 0 or sums.min() <= 0:
        raise ValueError(
            "weights must not be negative and must not all be 0; did values and weights change "
            "places?"
        )
    return values, weights / sums


def _spectrum(
    values: ArrayLike,
    weights: ArrayLike,
    epsilon: float,
    negative: str = "absolute",
    zero_share: float = 0.0,
) -> _Spectrum:
    values, weights = _rows(values, weights)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(
            f"epsilon is {epsilon}; it must be above 0: no weight may go where no loss may be "
            "added."
        )
    if not 0 <= zero_share <= 1:
        raise ValueError(
            f"zero_share is {zero_share}; allowed: 0 to 1, the share of directions without "
            "curvature."
        )
    curvature = tables.lookup(_NEGATIVE, negative, "negative")(values)
    weights = weights * ((1 - zero_share) / len(weights))
    flat = zero_share + float(weights[curvature == 0].sum())
    curved = (curvature > 0) & (weights > 0)
    with np.errstate(over="ignore"):  # infinitely sharp is what a vanishing epsilon means
        sharpness = np.minimum(curvature[curved] / (2 * epsilon), np.finfo(float).max)
    return _Spectrum(sharpness, weights[curved], flat)


def ratio(
    values: ArrayLike,
    weights: ArrayLike,
    distance: ArrayLike,
    epsilon: float,
    *,
    negative: str = "absolute",
    zero_share: float = 0.0,
) -> Any:
    """Squared Gaussian width per dimension, omega(R)^2 / D in [0, 1], at every R in `distance`.

    values, weights: Ritz values and weights, or the grid and density of a smoothed spectrum; [m],
    or [probes, m] whose spectra are averaged; weights need not sum to 1.
    distance: R >= 0, any shape. epsilon: tolerated loss, in the units of the loss, above 0.
    negative: what becomes of negative values: `absolute` (as the original) or `clip` (no
        curvature).
    zero_share: q in [0, 1]; the spectrum is (1 - q) times the one given plus q at 0. The original
    adds its share of unimportant directions so, as a grid bin at 1e-30. Returns float64 of
    distance's shape: 1 at R = 0, falling with R, the weight at 0 for R to infinity. Raises
    ValueError for empty, unequal or non-finite input and for negative weights.
    """
    distance = np.asarray(distance, float)
    if not (distance >= 0).all() or np.isinf(distance).any():
        raise ValueError("distance must be finite and not negative.")
    with np.errstate(over="ignore"):
        squares = np.square(distance)
    return _spectrum(values, weights, epsilon, negative, zero_share).shares(squares)[()]


def negative_mass(values: ArrayLike, weights: ArrayLike) -> float:
    """Share of the (normalised, probe-averaged) weight on values below 0.

    Rounding scatters the zero eigenvalues to either side of 0 and counts too; whether the rest
    matters is told by comparing predictions with `negative` set to `absolute` and to `clip`.
    """
    values, weights = _rows(values, weights)
    return float((weights * (values < 0)).sum() / len(weights))


# Distances


class Distances(NamedTuple):
    """R(p), the distance that magnitude pruning at ratio p moves the weights, for every p; made by
    `distances`.
    """

    magnitudes: ndarray  # ascending, float32 or float64 [n]
    squares: ndarray  # float64 [n + 1]: R^2 after removing the 0, 1, ..., n smallest
    # sum over all parameter arrays of their L2 norms; ends the grid of `method="grid"`
    norm_sum: float

    @property
    def size(self) -> int:
        """n, the number of weights that may be pruned."""
        return self.magnitudes.size

    def at(self, ratio: Any, *, count: Count = "nearest") -> Any:
        """R at pruning ratios in [0, 1], any shape; float64 of the same shape.

        count: `nearest` removes round(p n) weights (as `allocate`). `linear` lets R^2 grow linearly
        between whole numbers of weights, which is what `predict` solves for. `original` removes all
        up to and including the ceil(p n)-th smallest (at least the 1st), hence all that are tied
        with the last, and measures from the network pruned so at ratio 0, which has lost its
        smallest weight.
        """
        ratios = np.asarray(ratio, float)
        if not ((ratios >= 0) & (ratios <= 1)).all():
            raise ValueError(f"ratio is {ratio}; allowed: 0 to 1, the share removed.")
        square_of = tables.lookup(_COUNTS, count, "count")
        return np.sqrt(square_of(self, ratios))[()]


def _nearest_square(distances: Distances, ratios: ndarray) -> ndarray:
    removed = np.rint(ratios * distances.size)
    return distances.squares[removed.astype(int)]


def _linear_square(distances: Distances, ratios: ndarray) -> ndarray:
    removed = ratios * distances.size
    whole = np.minimum(removed.astype(int), distances.size - 1)
    below = distances.squares[whole]
    above = distances.squares[whole + 1]
    return below + (removed - whole) * (above - below)


_COUNTS = {
    "nearest": _nearest_square,
    "original": originals.square_distances,
    "linear": _linear_square,
}


def distances(params: PyTree, *, scope: Scope = "kernels") -> Distances:
    """Distances R(p) = |w - w_p| of global magnitude pruning.

    params: arrays; those that may be pruned are sorted once, in their own precision.
    scope: `kernels` (matrices and convolutions, as the original) or `all`, which any list of arrays
    goes with. Raises TypeError for leaves that are no floats, ValueError if there is nothing to
    prune or an array is not finite. If all weights are 0 then R is 0 at every ratio and the
    prediction is 1: nothing is left to remove.
    """
    trees.check_parameters(params, "distances")
    tables.convert(scope, Scope, "scope")
    prunable = []
    total = 0.0
    leaves = trees.named_leaves(params)
    for path, leaf in leaves.items():
        array = np.asarray(leaf)
        if array.dtype != np.float64:
            array = array.astype(np.float32)
        norm = math.sqrt(np.sum(np.square(array, dtype=np.float64)))
        if not math.isfinite(norm):
            raise ValueError(f"{path or 'params'} has norm {norm}; did the training diverge?")
        total += norm
        if scope == "all" or (trees.is_kernel(path) and array.ndim > 1):
            prunable.append(np.abs(array).ravel())
    magnitudes = np.concatenate(prunable or [()])
    if not magnitudes.size:
        hint = "no matrix is named kernel, weight or w; use scope='all'"
        if scope == "all":
            hint = "no array has an entry"
        raise ValueError(f"nothing to prune: {hint}. Paths: {list(leaves)[:5]}")
    magnitudes.sort()
    squares = np.zeros(magnitudes.size + 1)
    np.square(magnitudes, out=squares[1:], dtype=np.float64)
    np.cumsum(squares, out=squares)
    return Distances(magnitudes, squares, total)


# Prediction


def _solve(spectrum: _Spectrum, distances: Distances) -> float:
    """The p in [0, 1] where the falling share(R(p)^2) meets the rising p; R^2 is linear between
    whole weights.
    """
    squares = distances.squares
    size = distances.size

    def excess(removed: int, part: float = 0.0) -> float:
        square = squares[removed]
        if part:
            square = (1 - part) * square + part * squares[removed + 1]
        return float(spectrum.shares(square)) * size - removed - part

    low, high = 0, size  # share >= p after removing `low` weights, share <= p after `high`
    while high - low > 1:
        middle = (low + high) // 2
        if excess(middle) >= 0:
            low = middle
        else:
            high = middle
    import scipy.optimize  # here: most runs never need it

    # of exactly the two distances at 0 and 1, whose signs the search above has found
    part = scipy.optimize.brentq(lambda part: excess(low, part), 0.0, 1.0, xtol=1e-15)
    return (low + part) / size


def predict(
    values: ArrayLike,
    weights: ArrayLike,
    distances: Distances,
    epsilon: float,
    *,
    method: Method = "fixed_point",
    **options: Any,
) -> float:
    """The predicted largest pruning ratio: the p in [0, 1] with omega(R(p))^2 / D = p.

    values, weights: Ritz values and weights, [m], or [probes, m]; several probes are averaged as
    spectra first, as the original does, not as predictions. distances, epsilon: see `distances` and
    `epsilon`; options: `negative` and `zero_share` of `ratio`.
    method: `fixed_point` solves exactly, R^2 being linear between whole numbers of weights; about
    log2(n) evaluations of the width. `grid` gives the original's answer: `predict_on_grid` on its
    smoothed spectral density.
    """
    tables.convert(method, Method, "method")
    if method == "fixed_point":
        return _solve(_spectrum(values, weights, epsilon, **options), distances)
    density, grid = linops.spectral_density(*_rows(values, weights))  # by default the original's
    if not density.any():
        raise ValueError(
            "no value lies on the grid, which ends at the mean least and largest of the probes."
        )
    return predict_on_grid(grid, density, distances, epsilon, **options)


def predict_on_grid(
    values: ArrayLike, weights: ArrayLike, distances: Distances, epsilon: float, **options: Any
) -> float:
    """The original's prediction, one of 0, 0.001, ..., 0.999, from a spectral density.

    values, weights: grid and density, [bins]. The width is known at whole distances 0 to
    int(norm_sum); each ratio's R (of `count="original"`) is rounded to one of them, half to even,
    and the first ratio closest to its width wins. A distance rounded above the grid, where the
    original fails, takes the last. options: as for `predict`.
    """
    ratios = np.arange(1000) / 1000
    radii = np.rint(distances.at(ratios, count="original"))
    radii = np.minimum(radii, int(distances.norm_sum))
    radii, where = np.unique(radii, return_inverse=True)
    widths = ratio(values, weights, radii, epsilon, **options)
    gaps = np.abs(widths[where] - ratios)
    return float(ratios[np.argmin(gaps)])


def epsilon(batch_losses: ArrayLike) -> float:
    """The tolerated loss: standard deviation (population) of the training loss over batches,
    penalty included.

    batch_losses: mean loss of every batch at the trained weights, [batches], at least 2.
    Raises ValueError if that is 0, too short or not finite.
    """
    return float(np.std(_losses(batch_losses)))


def _losses(batch_losses: ArrayLike) -> ndarray:
    losses = np.asarray(batch_losses, float)
    if losses.ndim != 1 or losses.size < 2:
        raise ValueError(
            f"batch_losses has shape {losses.shape}; at least 2 batches in one dimension are "
            "needed."
        )
    if not np.isfinite(losses).all():
        raise ValueError("batch_losses are not finite; did the training diverge?")
    if losses.min() == losses.max() or not np.std(losses) > 0:
        raise ValueError(
            "batch_losses are all equal, so epsilon is 0; use smaller batches or set epsilon "
            "yourself."
        )
    return losses


def epsilon_draws(batch_losses: ArrayLike, num: int, seed: Any) -> ndarray:
    """`num` values of epsilon, each from as many batch losses drawn with replacement: how well
    epsilon is known.

    seed: int or numpy.random.Generator. Draws of equal losses only are repeated. Returns float64
        [num], above 0.
    """
    losses = _losses(batch_losses)
    random = np.random.default_rng(seed)
    draws: list[float] = []
    while len(draws) < num:
        draw = np.std(random.choice(losses, losses.size))
        if draw > 0:
            draws.append(draw)
    return np.array(draws, float)


# Intervals


def enclosure(
    tridiagonal: linops.Tridiagonal,
    distances: Distances,
    epsilon: float,
    *,
    squared: bool = False,
    zero_share: float = 0.0,
    rounding: float = 1e-15,
) -> tuple[float, float]:
    """(lower, upper): between them lies the prediction of the spectrum that quadrature on a
    semi-definite A samples.

    tridiagonal: of one or more probes. With x an eigenvalue of A, 1 / (1 + x R^2 / (2 epsilon)) is
    completely monotone (its derivatives alternate in sign), so by the error terms of the two rules
    Gauss (`linops.ritz`) is below the integral and Gauss-Radau at 0 above, at every R. The width
    falls as p rises, hence the same order holds for the p where they meet. Each further product
    narrows the two.
    squared: A = H^2 stands for |H|, the values are squares: 1 / (1 + sqrt(x) R^2 / (2 epsilon)) is
    completely monotone as well, because sqrt has a completely monotone derivative (it is a
    Bernstein function).
    rounding: error of the values relative to the largest; each rule moves them so far to its
    careful side. The default is that of the tridiagonal eigenproblem; 5e-7 accounts for products in
    single precision. It matters for H^2, where rounding hides curvatures below sqrt(rounding) of
    the largest. Raises ValueError for values so negative that A is not semi-definite.
    Source: Golub and Meurant 2010, Matrices, Moments and Quadrature, chapter 6.
    """

    def bound(values: ndarray, weights: ndarray) -> float:
        if squared:
            values = np.sqrt(values)
        return predict(values, weights, distances, epsilon, zero_share=zero_share)

    upper_values, upper_weights = linops.gauss_radau(tridiagonal)
    slack = rounding * np.max(upper_values)
    upper = bound(np.maximum(upper_values - slack, 0.0), upper_weights)
    values, weights = _rows(*linops.ritz(tridiagonal))
    slack = rounding * np.max(np.abs(values))
    lower = bound(np.abs(values) + slack, weights)
    return min(lower, upper), max(lower, upper)


def absolute_enclosure(
    tridiagonal: linops.Tridiagonal,
    distances: Distances,
    epsilon: float,
    *,
    zero_share: float = 0.0,
    rounding: float = 1e-15,
) -> tuple[float, float]:
    """(lower, upper): between them lies the prediction from the absolute eigenvalues of the Lanczos
    run's symmetric A.

    m products fix the first 2 m + 1 moments of each probe's spectrum and nothing else. Of all
    spectra with these moments, 1 / (1 + |x| R^2 / (2 epsilon)) has its largest mean for the rule
    (`linops.bordered`) with a node at the peak, 0, and its smallest for another rule of the same
    one-parameter family, whose nodes straddle 0. Both are thus
    attained: without a further product no narrower bounds exist. The smallest is sought at the R of
    the answer itself, in a few rounds.
    tridiagonal: of one or more probes. rounding: error of the values relative to the largest, as
    for `enclosure`. Not from the paper; tests compare with linear programs over all spectra with
    the given moments.
    """
    probes = linops.probes_of(tridiagonal)
    nodes = [linops.ritz(probe)[0] for probe in probes]
    largest = max(np.abs(values).max() for values in nodes)
    slack = rounding * largest

    def solve(border_of: Callable, slack: float) -> float:
        values = []
        weights = []
        for probe in probes:
            nodes, firsts, _ = linops.bordered(probe, last=border_of(probe))
            values.append(np.maximum(np.abs(nodes) + slack, 0.0))
            weights.append(firsts**2)
        mean = (np.concatenate(values), np.concatenate(weights))
        return predict(*mean, distances, epsilon, zero_share=zero_share)

    upper = solve(linops.border_for, -slack)
    lower, before = upper, math.inf
    # falls towards the answer: each round's spectra are a candidate, best at one R
    while before - lower > 1e-9:
        before = lower
        sharpness = distances.at(lower, count="linear") ** 2 / (2 * epsilon)
        lower = solve(partial(_lowest, sharpness=sharpness), slack)
    return min(lower, before), upper


def _lowest(probe: linops.Tridiagonal, sharpness: float) -> float:
    """The border whose rule has the smallest mean of 1 / (1 + sharpness |x|).

    Along the circle of borders, cut where a node is at 0 and the mean is largest, it falls and then
    rises. The sign of its slope is bisected; the angle from the cut counts in decades, since the
    fall may take place next to it.
    """
    largest = np.max(np.abs(probe.alphas))
    scale = float(largest + np.max(probe.betas)) or 1.0
    cut = math.atan2(linops.border_for(probe), scale)
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        steep = 10 ** (6 - 20 * abs(middle))
        angle = math.copysign(math.atan(steep), -middle)
        border = scale * math.tan(cut + angle)
        values, firsts, lasts = linops.bordered(probe, last=border)
        size = np.abs(values)
        moves = firsts * lasts / (1 + sharpness * size)
        differences = np.subtract.outer(values, values)
        equal = differences == 0
        quotients = np.subtract.outer(size, size) / np.where(equal, 1.0, differences)
        quotients = np.where(equal, np.sign(values), quotients)
        if moves @ quotients @ moves > 0:  # minus the slope: it falls
            low = middle
        else:
            high = middle
    return border


class History(NamedTuple):
    """The prediction after each number of products; `lower` and `upper` are NaN where negative
    values are clipped.
    """

    num_matvecs: ndarray  # int [k]
    ratio: ndarray  # float64 [k]
    lower: ndarray  # float64 [k]
    upper: ndarray  # float64 [k]


class Prediction(NamedTuple):
    """A predicted largest pruning ratio and how far to trust it; made by `predict_probes`."""

    ratio: float  # of the probes' mean spectrum
    # enclosure of the quadrature error, for these probes and this epsilon; NaN if negative values
    # of an indefinite operator are clipped
    lower: float
    upper: float
    standard_error: float  # over probes, of `ratio`; NaN with one probe
    epsilon_error: float  # standard deviation over draws of epsilon; NaN without draws
    per_probe: ndarray  # float64 [probes]: each probe's own prediction
    epsilon: float
    negative_mass: float  # share of the weight on negative Ritz values

    def band(self, deviations: float = 2.0) -> tuple[float, float]:
        """The enclosure (or the ratio alone) widened by so many standard deviations of probes and
        epsilon together.

        What is NaN widens nothing: with one probe and no draws of epsilon the band is the enclosure
        itself.
        """
        errors = [self.standard_error, self.epsilon_error]
        spread = deviations * math.sqrt(np.nansum(np.square(errors)))
        low = float(np.nanmin([self.lower, self.ratio]))
        high = float(np.nanmax([self.upper, self.ratio]))
        return max(low - spread, 0.0), min(high + spread, 1.0)


OPERATORS = {  # Ritz values to eigenvalues of the Hessian, up to sign
    "symmetric": lambda values: values,
    "semidefinite": lambda values: values,
    "squared": lambda values: np.sqrt(np.abs(values)),
}


def predict_probes(
    tridiagonal: linops.Tridiagonal,
    distances: Distances,
    epsilon: float,
    *,
    operator: Operator = "symmetric",
    negative: str = "absolute",
    zero_share: float = 0.0,
    epsilons: Sequence[float] = (),
    rounding: float | None = None,
) -> Prediction:
    """The prediction from the Lanczos run of one or more probes, with its uncertainty.

    tridiagonal: of `linops.lanczos`; a leading axis holds the probes.
    operator: what the products were made with. `symmetric`: the Hessian, any signs. `semidefinite`:
    a positive semi-definite operator such as the Gauss-Newton matrix. `squared`: the Hessian
    applied twice; its values are squares, and the answer is that for absolute eigenvalues. All have
    lower and upper bounds, unless values of a `symmetric` one are clipped.
    negative, zero_share: see `ratio`. epsilons: further values of epsilon (`epsilon_draws`) for
        `epsilon_error`.
    rounding: see `enclosure`; by default 4 units of the coefficients' type, about what products
    lose, and a hundredth of one for `semidefinite`: a Gauss-Newton product squares J v, so its
    rounding errors shrink with the curvature (between single and double precision, 2e-5 of a ratio
    on a dense network of 26,122 weights). Give 4 units for a semi-definite matrix that is not such
    a product. The answer's `ratio` is that of the probes' mean spectrum by the Gauss rule, as the
    original's; except for a `symmetric` operator that is `lower` (up to `rounding`). Its standard
    error is std(per_probe) / sqrt(probes), to first order that of the mean spectrum's fixed point.
    """
    ritz, weights = _rows(*linops.ritz(tridiagonal))
    values = tables.lookup(OPERATORS, operator, "operator")(ritz)

    def solve(values: ndarray, weights: ndarray, epsilon: float) -> float:
        return _solve(_spectrum(values, weights, epsilon, negative, zero_share), distances)

    probes = zip(values, weights)
    per_probe = np.array([solve(*probe, epsilon) for probe in probes])
    num = len(per_probe)
    answer = float(per_probe[0])
    standard_error = math.nan
    if num > 1:
        answer = solve(values, weights, epsilon)
        standard_error = float(per_probe.std(ddof=1) / math.sqrt(num))
    draws = [solve(values, weights, e) for e in epsilons]
    if rounding is None:
        unit = float(np.finfo(np.asarray(tridiagonal.alphas).dtype).eps)
        rounding = unit * (0.01 if operator == "semidefinite" else 4.0)
    options: Fields = dict(zero_share=zero_share, rounding=rounding)
    bounds = (math.nan, math.nan)
    if operator != "symmetric":
        squared = operator == "squared"
        bounds = enclosure(tridiagonal, distances, epsilon, squared=squared, **options)
    elif negative == "absolute":
        bounds = absolute_enclosure(tridiagonal, distances, epsilon, **options)
    return Prediction(
        answer,
        *bounds,
        standard_error,
        float(np.std(draws)) if draws else math.nan,
        per_probe,
        epsilon,
        negative_mass(ritz, weights),
    )


def history(
    tridiagonal: linops.Tridiagonal,
    distances: Distances,
    epsilon: float,
    *,
    num_matvecs: Sequence[int] | None = None,
    **options: Any,
) -> History:
    """What `predict_probes` would have said after each number of products, from the longest run.

    num_matvecs: numbers in 1..m; by default all of them. A probe that ended earlier keeps its last
        answer.
    options: those of `predict_probes`.
    """
    longest = int(np.max(tridiagonal.num_steps))
    if num_matvecs is None:
        num_matvecs = range(1, longest + 1)
    answers = []
    for depth in num_matvecs:
        if not 1 <= depth <= longest:
            raise ValueError(
                f"num_matvecs is {num_matvecs}; allowed: 1 to {longest}, the Lanczos steps made."
            )
        shorter = linops.truncate(tridiagonal, depth)
        answer = predict_probes(shorter, distances, epsilon, **options)
        answers.append((answer.ratio, answer.lower, answer.upper))
    columns = np.array(answers, float).reshape(-1, 3).T
    return History(np.asarray(num_matvecs, int), *columns)
