"""Gaussian width and predicted pruning ratio: closed forms, the original's numbers, bounds, bad
input.
"""

import math

import golden_data
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import linops, width

FILE = "10_hessian.npz"
HYPER = golden_data.hyper(FILE)
NUMS = golden_data.parts(FILE, r"pipeline/num=(\d+)/gw")
EQUAL = width.distances([np.full(50, 0.3)], scope="all")  # R(p)^2 = 0.09 * 50 p
UNIT = width.distances([np.ones(1)], scope="all")  # R(p)^2 = p


def quadratic(a, b, c):
    return (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)


def random_spectrum(seed, size=40, zeros=0.5):
    random = default_rng(seed)
    return np.where(random.random(size) < zeros, 0.0, random.lognormal(0, 3, size)), random.random(
        size
    )


def lanczos(eigenvalues, start, num_matvecs):
    """Tridiagonal of the diagonal matrix, with full re-orthogonalisation; stops at an invariant
    space.
    """
    basis, alphas, betas = [start / np.linalg.norm(start)], [], []
    for _ in range(num_matvecs):
        vector = eigenvalues * basis[-1]
        alphas.append(vector @ basis[-1])
        known = np.array(basis)
        for _ in range(2):
            vector = vector - known.T @ (known @ vector)
        norm = np.linalg.norm(vector)
        betas.append(norm if norm > 1e-10 * np.abs(eigenvalues).max() else 0.0)
        if betas[-1] == 0:
            break
        basis.append(vector / norm)
    return linops.Tridiagonal(np.array(alphas), np.array(betas), np.int32(len(alphas)))


def stack(runs):
    """Several runs as one, with a leading axis; shorter ones are filled up with 0."""
    longest = max(run.num_steps for run in runs)
    fill = lambda row: np.pad(row, (0, longest - len(row)))
    return linops.Tridiagonal(
        np.stack([fill(run.alphas) for run in runs]),
        np.stack([fill(run.betas) for run in runs]),
        np.array([run.num_steps for run in runs]),
    )


# Closed forms


def test_flat_spectrum():
    distance = np.array([[0.0, 1e-3, 0.5], [1.0, 7.0, 1e4]])
    expected = 0.02 / (0.02 + 3.0 * distance**2)
    assert_allclose(width.ratio([3.0, -3.0, 3.0], [1, 5, 2], distance, 0.01), expected, rtol=1e-13)
    for curvature in (1e-6, 0.02, 1.0, 300.0, 1e9):
        scale = curvature * 0.09 * 50 / (2 * 0.01)  # p = 1 / (1 + scale p)
        expected = 2 / (1 + math.sqrt(1 + 4 * scale))
        assert width.predict([curvature], [1.0], EQUAL, 0.01) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_two_level_spectrum(share):
    """`share` of the weight at 0: p = share + (1 - share) / (1 + scale p)."""
    scale = 4.0 * 0.09 * 50 / (2 * 0.05)
    expected = quadratic(scale, 1 - share * scale, -1)
    assert width.predict([0.0, 4.0], [share, 1 - share], EQUAL, 0.05) == pytest.approx(
        expected, abs=1e-12
    )
    assert width.predict([4.0], [1.0], EQUAL, 0.05, zero_share=share) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(
    ("power", "share"),
    [(1, lambda s: math.log1p(s) / s), (2, lambda s: math.atan(math.sqrt(s)) / math.sqrt(s))],
)
def test_power_law_spectrum(power, share):
    """Eigenvalues 5 x^power, x uniform in [0, 1], by 200 Gauss-Legendre nodes against the
    integral.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    values = 5 * ((nodes + 1) / 2) ** power
    distance = np.array([0.01, 0.3, 1.0, 4.0])
    expected = [share(5 * r**2 / (2 * 0.1)) for r in distance]
    assert_allclose(width.ratio(values, weights, distance, 0.1), expected, rtol=1e-8)
    p = width.predict(values, weights, UNIT, 0.1)  # R(p)^2 = p
    assert p == pytest.approx(share(5 * p / (2 * 0.1)), abs=1e-8)


def test_distances_of_a_ramp():
    n = 1000
    ramp = default_rng(0).permutation(np.arange(1.0, n + 1)) * np.where(np.arange(n) % 3, 1, -1)
    distances = width.distances(
        {"a": {"kernel": ramp[:600].reshape(20, 30)}, "b": {"kernel": ramp[600:, None]}}
    )
    removed = np.array([0, 1, 2, 499, 999, 1000])
    squares = removed * (removed + 1) * (2 * removed + 1) / 6
    for count in ("nearest", "linear"):
        assert_allclose(distances.at(removed / n, count=count) ** 2, squares, rtol=1e-12)
    assert_allclose(distances.at(0.0015, count="linear") ** 2, 1 + 4 / 2, rtol=1e-12)
    assert distances.at(0.0014) == distances.at(0.001) == 1.0
    # one weight more is gone at ratio 0, and does not count
    assert_allclose(
        distances.at(removed / n, count="original")[1:] ** 2, squares[1:] - 1, rtol=1e-12
    )
    assert distances.at(0.0, count="original") == 0
    assert distances.at(0.0011, count="original") == 2.0


def test_ties_go_together_in_the_original_only():
    distances = width.distances([np.array([1.0, -2.0, 2.0, 2.0, 3.0])], scope="all")
    ratios = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
    assert_allclose(distances.at(ratios) ** 2, [1, 5, 9, 13, 22])
    assert_allclose(distances.at(ratios, count="original") ** 2, [0, 12, 12, 12, 21])


def test_only_kernels_are_pruned_but_all_arrays_have_norms():
    params = {
        "fc": {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([12.0])},
        "norm": {"scale": jnp.ones(1)},
    }
    kernels, everything = width.distances(params), width.distances(params, scope="all")
    assert (kernels.size, everything.size) == (2, 4)
    assert kernels.norm_sum == everything.norm_sum == 5 + 12 + 1
    assert kernels.magnitudes.dtype == np.float32
    assert_allclose(kernels.at([0.0, 0.5, 1.0]), [0, 3, 5])
    bfloat16 = width.distances({"kernel": jnp.array([[3.0, 4.0]], jnp.bfloat16)})
    assert_array_equal(bfloat16.squares, kernels.squares)


# Laws


@given(seed=st.integers(0, 10**6), epsilon=st.floats(1e-6, 1e3), size=st.integers(1, 30))
def test_prediction_solves_its_equation(seed, epsilon, size):
    values, weights = random_spectrum(seed)
    random = default_rng(seed)
    distances = width.distances(
        [np.where(random.random(size) < 0.3, 0, random.normal(size=size))], scope="all"
    )
    p = width.predict(values, weights, distances, epsilon)
    assert 0 <= p <= 1
    assert width.ratio(values, weights, distances.at(p, count="linear"), epsilon) == pytest.approx(
        p, abs=1e-9
    )


@given(seed=st.integers(0, 10**6), zero_share=st.floats(0, 1), epsilon=st.floats(1e-4, 10))
def test_ratio_falls_from_one_to_the_weight_at_zero(seed, zero_share, epsilon):
    values, weights = random_spectrum(seed)
    distance = np.concatenate([[0], np.geomspace(1e-6, 1e9, 40)])
    found = width.ratio(values, weights, distance, epsilon, zero_share=zero_share)
    flat = zero_share + (1 - zero_share) * weights[values == 0].sum() / weights.sum()
    assert found[0] == 1
    assert (np.diff(found) <= 1e-15).all()
    assert (found >= flat - 1e-12).all()
    assert found[-1] == pytest.approx(flat, abs=1e-9)
    assert width.predict(values, weights, EQUAL, epsilon, zero_share=zero_share) >= flat - 1e-12


@given(seed=st.integers(0, 10**6), factor=st.floats(1e-3, 1e3))
def test_scales(seed, factor):
    values, weights = random_spectrum(seed)
    kernel = default_rng(seed).normal(size=30)
    distances, scaled = (
        width.distances([w], scope="all") for w in (kernel, math.sqrt(factor) * kernel)
    )
    expected = width.predict(values, weights, distances, 0.1)
    assert width.predict(factor * values, weights, distances, factor * 0.1) == pytest.approx(
        expected, abs=1e-12
    )
    assert width.predict(values, weights, scaled, factor * 0.1) == pytest.approx(
        expected, abs=1e-12
    )
    assert width.predict(values, 7 * factor * weights, distances, 0.1) == pytest.approx(
        expected, abs=1e-12
    )
    wider = width.predict(values, weights, distances, 0.1 * max(factor, 1 / factor))
    assert wider >= expected - 1e-12


def test_probes_are_averaged_as_spectra():
    values, weights = np.stack([random_spectrum(seed)[0] for seed in range(3)]), np.ones((3, 40))
    weights[1] *= 5  # no probe counts more than another
    distance = np.array([0.0, 0.1, 1.0, 10.0])
    each = [width.ratio(v, w, distance, 0.1) for v, w in zip(values, weights)]
    assert_allclose(width.ratio(values, weights, distance, 0.1), np.mean(each, axis=0), rtol=1e-12)
    assert np.shape(width.ratio(values, weights, 1.0, 0.1)) == ()


def test_negative_values():
    values, weights = [-2.0, 0.0, 1.0, 2.0], [0.2, 0.3, 0.1, 0.4]
    assert width.negative_mass(values, weights) == pytest.approx(0.2)
    assert width.negative_mass([values, [1.0] * 4], [weights, weights]) == pytest.approx(0.1)
    absolute, clip = (
        width.ratio(values, weights, 1.0, 0.5, negative=n) for n in ("absolute", "clip")
    )
    assert absolute == pytest.approx(0.3 + 0.1 / 2 + 0.6 / 3)
    assert clip == pytest.approx(0.5 + 0.1 / 2 + 0.4 / 3)


def test_blocks_of_distances_give_the_same_as_one_by_one():
    values, weights = random_spectrum(0, size=100_000)
    distance = np.geomspace(1e-3, 1e3, 7)
    one_by_one = [width.ratio(values, weights, r, 0.1) for r in distance]
    assert_allclose(width.ratio(values, weights, distance, 0.1), one_by_one, rtol=1e-14)


def test_all_weights_zero_predicts_one():
    distances = width.distances({"kernel": np.zeros((4, 5))})
    for method in ("fixed_point", "grid"):
        predicted = width.predict([1.0, 2.0], [0.5, 0.5], distances, 0.1, method=method)
        assert predicted == {"fixed_point": 1.0, "grid": 0.999}[method]
    assert_array_equal(distances.at([0.0, 0.5, 1.0]), 0)


def test_a_steep_width_is_solved_too():
    found = width.predict([1e30, 1.0], [0.1, 0.9], UNIT, 0.01)  # p = 0.9 / (1 + 50 p)
    assert found == pytest.approx((np.sqrt(1 + 4 * 50 * 0.9) - 1) / 100, abs=1e-12)


@given(share=st.integers(0, 20), size=st.integers(1, 20), sharp=st.sampled_from([1.0, 1e12, 1e300]))
def test_predictions_at_whole_numbers_of_weights(share, size, sharp):
    """A width that is all but a step: the root lies where bisection and root finder hand over."""
    distances = width.distances([np.arange(1.0, size + 1)], scope="all")
    found = width.predict([0.0, sharp], [share / 20, 1 - share / 20], distances, 1e-9)
    assert share / 20 - 1e-12 <= found <= 1
    if sharp > 1:
        assert found == pytest.approx(share / 20, abs=1e-6)


def test_extreme_epsilon():
    assert width.predict([1.0], [1.0], EQUAL, 1e-320) < 1e-15
    assert width.predict([1.0], [1.0], EQUAL, 1e300) == pytest.approx(1.0, abs=1e-12)


class Watched(np.ndarray):
    """An array that counts how often entries are looked up."""

    lookups = 0

    def __getitem__(self, index):
        type(self).lookups += 1
        return super().__getitem__(index)


def test_a_prediction_looks_up_a_few_dozen_distances():
    values, weights = random_spectrum(0, size=1000)
    distances = width.distances([default_rng(0).laplace(size=1_000_000)], scope="all")
    watched = distances._replace(squares=distances.squares.view(Watched))
    width.predict(values, weights, watched, 0.1)
    # bisection over a million counts, then between two of them, each evaluation looks up to twice
    assert 20 <= Watched.lookups <= 2 * 30


# The original's numbers


@pytest.fixture(scope="module")
def golden():
    return golden_data.load(FILE)


@pytest.fixture(scope="module")
def golden_distances(golden):
    return width.distances(golden_params(golden))


def golden_params(golden):
    return {
        f"{key}/{'kernel' if golden[key].ndim > 1 else 'bias'}": golden[key]
        for key in golden
        if key[:8] == "trained/"
    }


@pytest.mark.parametrize("epsilon", golden_data.parts(FILE, r"gw/with_zero_mass/ep=(.+)"))
def test_width_matches_the_original(golden, epsilon):
    (bins,) = golden_data.parts(FILE, r"gw/two_runs_bins=(\d+)/")
    (key,) = golden_data.parts(FILE, rf"(density/two_runs/bins={bins}/.+)/density")
    density, grid = (
        golden[f"{key}/density"],
        np.linspace(*golden[f"{key}/grid_first_last"], int(bins)),
    )
    found = width.ratio(grid, density, golden["gw/R"], float(epsilon))
    assert_allclose(found, golden[f"gw/two_runs_bins={bins}/ep={epsilon}"], rtol=1e-9)
    expected = golden[f"gw/with_zero_mass/ep={epsilon}"]
    # no file holds the share of the mass at 0: the largest distance gives it, for all others
    curve = golden[f"gw/two_runs_bins={bins}/ep={epsilon}"]
    share = (expected[-1] - curve[-1]) / (1 - curve[-1])
    found = width.ratio(grid, density, golden["gw/R"], float(epsilon), zero_share=share)
    assert_allclose(found, expected, rtol=1e-9)


def test_distances_match_the_original(golden, golden_distances):
    number = HYPER["sparse_epoch"]
    found = golden_distances.at(np.arange(number) / number, count="original")
    assert_allclose(found, golden["pipeline/R"], rtol=1e-9, atol=1e-11)
    assert golden_distances.norm_sum == pytest.approx(float(golden["pipeline/norm2"]), rel=1e-9)


def golden_penalty(params):
    return HYPER["lmbda"] * sum(np.abs(array).sum() for array in params.values())


def golden_losses(golden, drop_smallest):
    """Cross-entropy plus penalty of every example; `drop_smallest`: of the network pruned at ratio
    0.
    """
    params = {key: golden[key] for key in golden if key[:8] == "trained/"}
    if drop_smallest:
        least = min(np.abs(array).min() for array in params.values() if array.ndim > 1)
        params = {k: np.where((np.abs(x) <= least) & (x.ndim > 1), 0, x) for k, x in params.items()}
    x, y = golden["train/x"], golden["train/y"]
    for i, layer in enumerate(golden_data.dense_layers()):
        x = np.maximum(x, 0) if i else x
        x = x @ params[f"trained/{layer}.weight"].T + params[f"trained/{layer}.bias"]
    if not drop_smallest:
        assert_allclose(x, golden["logits_train"], rtol=1e-8, atol=1e-11)
        assert golden_penalty(params) == pytest.approx(float(golden["l1_penalty"]), rel=1e-12)
    return np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y] + golden_penalty(params)


def golden_epsilon(losses):
    """From the losses of every example: batches count equally."""
    size = HYPER["batch_size"]
    return width.epsilon([losses[i : i + size].mean() for i in range(0, len(losses), size)])


def test_epsilon_matches_the_original(golden):
    losses = golden_losses(golden, False)
    assert golden_epsilon(losses) == pytest.approx(float(golden["pipeline/epsilon"]), rel=1e-9)
    assert losses.mean() == pytest.approx(float(golden["pipeline/mean_train_loss"]), rel=1e-12)


@pytest.mark.parametrize("num", NUMS)
def test_grid_prediction_matches_the_original(golden, golden_distances, num):
    bins, density = (
        golden["pipeline/density_nonzero_bins"],
        golden["pipeline/density_nonzero_values"],
    )
    grid, share = golden_data.fine_grid()[bins], int(num) / 100
    epsilon = golden_epsilon(
        golden_losses(golden, True)
    )  # the original measures the network it pruned at ratio 0
    found = width.ratio(
        grid, density, np.arange(int(golden["pipeline/norm2"]) + 1), epsilon, zero_share=share
    )
    assert_allclose(found, golden[f"pipeline/num={num}/gw"], rtol=1e-9)
    index = HYPER["sparse_epoch"] * width.predict_on_grid(
        grid, density, golden_distances, epsilon, zero_share=share
    )
    assert index == pytest.approx(int(golden[f"pipeline/num={num}/predicted_index"]), abs=1e-9)


@pytest.mark.parametrize("num", NUMS)
def test_grid_prediction_from_ritz_values_matches_the_original(golden, golden_distances, num):
    ritz = golden["lanczos/main/ritz_values"], golden["lanczos/main/ritz_weights"]
    epsilon, share = float(golden["pipeline/epsilon"]), int(num) / 100
    found = width.predict(*ritz, golden_distances, epsilon, method="grid", zero_share=share)
    assert found == golden[f"pipeline/num={num}/predicted_index"] / HYPER["sparse_epoch"]
    exact = width.predict(*ritz, golden_distances, epsilon, zero_share=share)
    assert exact != found
    assert exact == pytest.approx(found, abs=0.02)  # whole distances, 0 to 16, are coarse


def test_original_counts_match_the_thresholds():
    golden = golden_data.load("05b_global_threshold.npz")
    kernels = [golden[f"params/{name}"] for name in golden["prunable_order"]]
    flat, distances = (
        np.concatenate([k.ravel() for k in kernels]),
        width.distances(kernels, scope="all"),
    )
    removed = ~golden["keep_mask"]
    expected = (flat**2 * removed).sum(1) - np.abs(flat).min() ** 2
    found = distances.at(golden["sparsities"], count="original") ** 2
    assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    (number,) = golden_data.parts("05b_global_threshold.npz", r"threshold_(\d+)")
    thresholds = golden[f"threshold_{number}"]
    expected = (flat**2 * (np.abs(flat) <= thresholds[:, None])).sum(1) - np.abs(flat).min() ** 2
    found = distances.at(np.arange(int(number)) / int(number), count="original") ** 2
    assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


# Epsilon


def test_epsilon_is_the_population_deviation():
    assert width.epsilon([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(1.25))
    assert width.epsilon(jnp.array([0.0, 1.0])) == 0.5


def test_epsilon_draws_repeat_and_centre():
    losses = default_rng(0).normal(2.0, 0.3, 400)
    draws = width.epsilon_draws(losses, 300, 7)
    assert_array_equal(draws, width.epsilon_draws(losses, 300, default_rng(7)))
    assert draws.shape == (300,)
    assert draws.mean() == pytest.approx(width.epsilon(losses), rel=0.01)
    assert draws.std() == pytest.approx(0.3 / math.sqrt(2 * 400), rel=0.2)
    assert_array_equal(width.epsilon_draws([0.0, 1.0], 50, 0), 0.5)  # never 0


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "at least 2"),
        ([1.0], "at least 2"),
        ([[1.0, 2.0]], "at least 2"),
        ([1.0, math.nan], "not finite"),
    ]
    + [([0.1] * 3, "use smaller batches")],
)
def test_epsilon_errors(losses, message):
    with pytest.raises(ValueError, match=message):
        width.epsilon(losses)
    with pytest.raises(ValueError, match=message):
        width.epsilon_draws(losses, 3, 0)


# Enclosures


def semidefinite(seed, size=60):
    """(eigenvalues, start vector, magnitudes): most eigenvalues are 0, the others spread over four
    decades.
    """
    random = default_rng(seed)
    eigenvalues = np.where(random.random(size) < 0.7, 0.0, 10 ** random.uniform(-3, 1, size))
    return (
        eigenvalues,
        random.choice([-1.0, 1.0], size),
        width.distances([random.laplace(size=50)], scope="all"),
    )


@given(seed=st.integers(0, 10**6), operator=st.sampled_from(["semidefinite", "squared"]))
def test_enclosure_contains_the_dense_answer_and_shrinks(seed, operator):
    eigenvalues, start, distances = semidefinite(seed)
    tridiagonal = lanczos(eigenvalues**2 if operator == "squared" else eigenvalues, start, 14)
    dense = width.predict(eigenvalues, start**2, distances, 0.05)
    found = width.history(tridiagonal, distances, 0.05, operator=operator)
    assert found.num_matvecs.tolist() == list(range(1, tridiagonal.num_steps + 1))
    # a Ritz value of 0 moves by sqrt(1e-15) of the largest
    within, rounding = (1e-6, 1e-3) if operator == "squared" else (1e-9, 1e-9)
    assert (found.lower <= dense + within).all()
    assert (found.upper >= dense - within).all()
    gaps = found.upper - found.lower
    assert (np.diff(gaps) <= rounding).all()
    assert gaps[-1] < 0.7 * gaps[0]
    assert_allclose(found.ratio, found.lower, atol=rounding)


def test_rounding_widens_the_enclosure():
    eigenvalues, start, distances = semidefinite(5)
    tridiagonal = lanczos(eigenvalues, start, 10)
    values, weights = linops.ritz(tridiagonal)
    bounds = [
        width.enclosure(tridiagonal, distances, 0.05, rounding=r) for r in (0.0, 1e-7, 1e-4, 1e-2)
    ]
    lower, upper = zip(*bounds)
    assert np.all(np.diff(lower) < 0)
    assert np.all(np.diff(upper) > 0)
    noise = 1e-7 * eigenvalues.max() * default_rng(0).choice([-1.0, 1.0], values.size)
    assert bounds[1][0] <= width.predict(values + noise, weights, distances, 0.05)
    assert width.predict_probes(tridiagonal, distances, 0.05, operator="semidefinite")[
        1:3
    ] == pytest.approx(bounds[0])
    single = tridiagonal._replace(
        alphas=np.float32(tridiagonal.alphas), betas=np.float32(tridiagonal.betas)
    )
    wider = width.predict_probes(single, distances, 0.05, operator="semidefinite", rounding=5e-7)
    assert wider.lower < bounds[0][0]
    assert wider.upper > bounds[0][1]
    usual = width.predict_probes(single, distances, 0.05, operator="semidefinite")
    assert wider.lower < usual.lower < usual.upper < wider.upper


def test_full_depth_closes_the_enclosure():
    eigenvalues = np.array([0.0, 0.0, 0.5, 2.0, 2.0, 7.0])
    tridiagonal = lanczos(eigenvalues, np.ones(6), 6)
    assert tridiagonal.num_steps == 4  # as many as distinct eigenvalues
    found = width.predict_probes(tridiagonal, EQUAL, 0.1, operator="semidefinite")
    dense = width.predict(eigenvalues, np.ones(6), EQUAL, 0.1)
    assert found.ratio == pytest.approx(dense, abs=1e-10)
    assert (found.lower, found.upper) == pytest.approx((dense, dense), abs=1e-8)


def test_enclosure_of_the_original_network(golden, golden_distances):
    eigenvalues, epsilon = np.abs(golden["hessian/eigenvalues"]), float(golden["pipeline/epsilon"])
    start = default_rng(0).choice([-1.0, 1.0], eigenvalues.size)
    run = lanczos(eigenvalues, start, HYPER["lanczos_iter"])
    found = width.predict_probes(run, golden_distances, epsilon, operator="semidefinite")
    dense = width.predict(eigenvalues, np.ones(eigenvalues.size), golden_distances, epsilon)
    assert found.lower <= dense <= found.upper
    assert found.upper - found.lower < 1e-6


@pytest.mark.parametrize("operator", ["semidefinite", "squared", "symmetric"])
def test_products_of_a_matrix(operator):
    """From a matrix to the prediction by `linops` alone, in single precision."""
    random = default_rng(0)
    rotation = np.linalg.qr(random.normal(size=(40, 40)))[0]
    eigenvalues = np.where(np.arange(40) < 28, 0.0, random.uniform(0.1, 5, 40))
    signs = 1 if operator == "semidefinite" else random.choice([-1, 1], 40)
    matrix = jnp.asarray(rotation * (signs * eigenvalues) @ rotation.T, jnp.float32)
    matvec = lambda v: matrix @ v
    matvec = linops.squared(matvec) if operator == "squared" else matvec
    start = random.choice([-1.0, 1.0], 40)
    tridiagonal = linops.lanczos(13)(matvec, jnp.asarray(start, jnp.float32))
    dense = width.predict(eigenvalues, (rotation.T @ start) ** 2, EQUAL, 0.1)
    found = width.predict_probes(tridiagonal, EQUAL, 0.1, operator=operator)
    assert found.ratio == pytest.approx(dense, abs=0.02)
    assert found.lower - 1e-6 <= dense <= found.upper + 1e-6  # single-precision weights


def test_history_is_what_shorter_runs_predict():
    eigenvalues, start, distances = semidefinite(3)
    tridiagonal = lanczos(eigenvalues, start, 9)
    found = width.history(
        tridiagonal, distances, 0.05, num_matvecs=[2, 5, 9], operator="semidefinite"
    )
    for i, m in enumerate(found.num_matvecs):
        answer = width.predict_probes(
            lanczos(eigenvalues, start, m), distances, 0.05, operator="semidefinite"
        )
        assert (found.ratio[i], found.lower[i], found.upper[i]) == pytest.approx(
            answer[:3], abs=1e-10
        )
    signed = width.history(tridiagonal, distances, 0.05)
    assert (signed.lower[[1, 4, 8]] <= found.lower + 1e-9).all()  # may put weight below 0
    assert_allclose(signed.upper[[1, 4, 8]], found.upper, atol=1e-9)
    clipped = width.history(tridiagonal, distances, 0.05, negative="clip")
    assert np.isnan([clipped.lower, clipped.upper]).all()
    assert_allclose(signed.ratio[[1, 4, 8]], found.ratio, atol=1e-10)
    assert width.history(tridiagonal, distances, 0.05, num_matvecs=[]).ratio.shape == (0,)
    for wrong in ([0, 3], [10]):
        with pytest.raises(ValueError, match="1 to 9"):
            width.history(tridiagonal, distances, 0.05, num_matvecs=wrong)


def test_probes_give_a_mean_and_its_error():
    eigenvalues, _, distances = semidefinite(0, size=400)
    random = default_rng(1)
    runs = [lanczos(eigenvalues, random.choice([-1.0, 1.0], 400), 12) for _ in range(6)]
    found = width.predict_probes(stack(runs), distances, 0.05, operator="semidefinite")
    each = [width.predict_probes(run, distances, 0.05) for run in runs]
    assert_allclose(found.per_probe, [one.ratio for one in each], rtol=1e-12)
    assert found.standard_error == pytest.approx(np.std(found.per_probe, ddof=1) / math.sqrt(6))
    assert math.isnan(each[0].standard_error)
    dense = width.predict(eigenvalues, np.ones(400), distances, 0.05)
    assert abs(found.ratio - dense) < 4 * found.standard_error + (found.upper - found.lower)
    mean_spectrum = width.predict(*linops.ritz(stack(runs)), distances, 0.05)
    assert found.ratio == pytest.approx(mean_spectrum, rel=1e-12)
    assert found.lower <= found.ratio + 1e-12
    assert found.ratio <= found.upper


def test_probes_of_unequal_depth():
    eigenvalues, start, distances = semidefinite(2)
    runs = [lanczos(eigenvalues, start, m) for m in (3, 8)]
    found = width.predict_probes(stack(runs), distances, 0.05, operator="semidefinite")
    expected = [width.predict_probes(run, distances, 0.05).ratio for run in runs]
    assert_allclose(found.per_probe, expected, rtol=1e-12)
    assert width.history(stack(runs), distances, 0.05).ratio.shape == (8,)


def test_band_adds_the_spreads():
    eigenvalues, start, distances = semidefinite(4)
    tridiagonal, draws = lanczos(eigenvalues, start, 6), np.array([0.04, 0.05, 0.06])
    found = width.predict_probes(
        tridiagonal, distances, 0.05, operator="semidefinite", epsilons=draws
    )
    answers = [width.predict_probes(tridiagonal, distances, e).ratio for e in draws]
    assert found.epsilon_error == pytest.approx(np.std(answers))
    assert found.band(0.0) == (found.lower, found.upper)
    low, high = found.band(2.0)
    assert low == pytest.approx(found.lower - 2 * found.epsilon_error)
    assert high == pytest.approx(min(found.upper + 2 * found.epsilon_error, 1.0))
    signed = width.predict_probes(tridiagonal, distances, 0.05, negative="clip")
    assert signed.band() == (signed.ratio, signed.ratio)
    assert found._replace(standard_error=3.0).band() == (0.0, 1.0)


def indefinite(seed, size=60):
    eigenvalues, start, distances = semidefinite(seed, size)
    return eigenvalues * default_rng(seed).choice([-1.0, 1.0], size), start, distances


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_absolute_enclosure_contains_the_dense_answer_and_shrinks(seed):
    eigenvalues, start, distances = indefinite(seed)
    tridiagonal = lanczos(eigenvalues, start, 12)
    found = width.history(tridiagonal, distances, 0.05)
    dense = width.predict(eigenvalues, start**2, distances, 0.05)
    assert (found.lower <= dense + 1e-9).all()
    assert (found.upper >= dense - 1e-9).all()
    assert (found.lower <= found.ratio + 1e-9).all()
    assert (found.ratio <= found.upper + 1e-9).all()
    assert (np.diff(found.lower) >= -1e-7).all()
    assert (np.diff(found.upper) <= 1e-7).all()


def test_a_ritz_value_at_the_peak_keeps_the_enclosure_open():
    """Of a symmetric spectrum every odd number of products has one; the border for it is beyond all
    numbers.
    """
    half = default_rng(0).gamma(0.4, 1.0, 100)
    eigenvalues = np.concatenate([half, -half])
    found = width.history(lanczos(eigenvalues, np.ones(200), 9), UNIT, 0.1)
    dense = width.predict(eigenvalues, np.ones(200), UNIT, 0.1)
    assert (found.lower <= dense).all()
    assert (found.upper >= dense).all()
    assert (np.diff(found.lower) >= -1e-7).all()
    assert found.lower[0] < 0.5 < dense < 0.7 < found.upper[0]


def extremes(eigenvalues, weights, num_matvecs, function):
    """Least and largest mean of `function` over all spectra with the first 2 m + 1 moments: two
    linear programs.
    """
    tridiagonal = lanczos(eigenvalues, np.sqrt(weights), 2 * num_matvecs + 1)
    reach = 5 * np.abs(eigenvalues).max()
    short = linops.truncate(tridiagonal, num_matvecs)
    cut = linops.border_for(short)
    rules = [
        linops.bordered(short, last=cut + x)[0] for x in np.r_[0.0, np.geomspace(1e-9, 1e3, 200)]
    ]
    rules += [linops.bordered(short, last=cut - x)[0] for x in np.geomspace(1e-9, 1e3, 200)]
    grid = np.unique(np.concatenate([np.linspace(-reach, reach, 2001), *rules]))
    polynomials, before = (
        [np.ones_like(grid)],
        np.zeros_like(grid),
    )  # orthonormal, by the three-term recurrence
    for i in range(2 * num_matvecs):
        beta = tridiagonal.betas[i - 1] if i else 0.0
        after = (grid - tridiagonal.alphas[i]) * polynomials[-1] - beta * before
        before = polynomials[-1]
        polynomials.append(after / tridiagonal.betas[i])
    scale = np.abs(polynomials).max(0)
    equal, right = np.array(polynomials) / scale, np.eye(2 * num_matvecs + 1)[0]
    programs = [
        scipy.optimize.linprog(s * function(grid) / scale, A_eq=equal, b_eq=right) for s in (1, -1)
    ]
    assert all(program.status == 0 for program in programs)
    return programs[0].fun, -programs[1].fun


@pytest.mark.parametrize("seed", range(6))
def test_absolute_enclosure_is_that_of_linear_programs(seed):
    """At the bounds' own distances no spectrum with the same moments has a lesser, or larger,
    width.
    """
    random = default_rng(seed)
    eigenvalues, weights = (
        random.choice([-1, 1], 80) * random.gamma(0.4, 1.0, 80),
        random.dirichlet(np.ones(80)),
    )
    num_matvecs, epsilon = 2 + seed % 3, 10.0 ** random.uniform(-2, 0)
    found = width.predict_probes(lanczos(eigenvalues, np.sqrt(weights), num_matvecs), UNIT, epsilon)
    least, _ = extremes(
        eigenvalues,
        weights,
        num_matvecs,
        lambda x: 1 / (1 + np.abs(x) * found.lower / (2 * epsilon)),
    )
    _, most = extremes(
        eigenvalues,
        weights,
        num_matvecs,
        lambda x: 1 / (1 + np.abs(x) * found.upper / (2 * epsilon)),
    )
    assert found.lower == pytest.approx(least, abs=2e-4)  # R^2 = p, and the width at R is p
    assert found.upper == pytest.approx(most, abs=1e-6)


def test_absolute_enclosure_of_several_probes():
    eigenvalues, _, distances = indefinite(1, size=200)
    random = default_rng(1)
    starts = [random.choice([-1.0, 1.0], 200) for _ in range(3)]
    runs = [lanczos(eigenvalues, start, m) for start, m in zip(starts, (5, 9, 7))]
    found = width.predict_probes(stack(runs), distances, 0.05)
    dense = width.predict(np.tile(eigenvalues, 3), np.concatenate(starts) ** 2, distances, 0.05)
    assert found.lower <= dense <= found.upper
    each = [width.predict_probes(run, distances, 0.05) for run in runs]
    assert min(one.lower for one in each) <= found.lower
    assert found.upper <= max(one.upper for one in each)
    looser = width.predict_probes(stack(runs), distances, 0.05, rounding=1e-3)
    assert looser.lower < found.lower < found.upper < looser.upper
    doubled = width.predict_probes(stack(runs[:1] * 2), distances, 0.05)
    assert doubled[1:3] == pytest.approx(each[0][1:3], abs=1e-9)


def test_indefinite_operators():
    eigenvalues = np.array([-3.0, 0.0, 1.0, 4.0])
    tridiagonal = lanczos(eigenvalues, np.ones(4), 3)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        width.predict_probes(tridiagonal, EQUAL, 0.1, operator="semidefinite")
    found = width.predict_probes(tridiagonal, EQUAL, 0.1)
    assert found.negative_mass > 0.1
    whole = width.predict_probes(lanczos(eigenvalues, np.ones(4), 4), EQUAL, 0.1)
    dense = width.predict(eigenvalues, np.ones(4), EQUAL, 0.1)
    assert whole[:3] == pytest.approx((dense, dense, dense), abs=1e-9)
    assert found.lower < dense == pytest.approx(found.upper)  # four values, one at 0: attained
    squared = width.predict_probes(
        lanczos(eigenvalues**2, np.ones(4), 2), EQUAL, 0.1, operator="squared"
    )
    assert squared.lower <= width.predict(eigenvalues, np.ones(4), EQUAL, 0.1) <= squared.upper


# Bad input


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], [], "m at least 1"),
        ([1.0, 2.0], [1.0], r"\(1, 2\) and \(1, 1\)"),
        ([[[1.0]]], [[[1.0]]], r"must be \[m\]"),
        ([math.nan], [1.0], "not finite"),
        ([1.0], [math.inf], "not finite"),
        ([1.0, 2.0], [2.0, -1.0], "negative"),
        ([1.0], [0.0], "must not all be 0"),
    ],
)
def test_bad_spectra(values, weights, message):
    for call in (
        lambda: width.ratio(values, weights, 1.0, 0.1),
        lambda: width.predict(values, weights, EQUAL, 0.1),
        lambda: width.predict(values, weights, EQUAL, 0.1, method="grid"),
        lambda: width.negative_mass(values, weights),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("method", ["fixed_point", "grid"])
def test_bad_epsilon(epsilon, method):
    with pytest.raises(ValueError, match="epsilon is"):
        width.predict([1.0], [1.0], EQUAL, epsilon, method=method)


def test_values_off_the_grid_of_the_original_are_explained():
    """Its ends are means over probes: two narrow spectra far apart leave it empty between them."""
    with pytest.raises(ValueError, match="no value lies on the grid"):
        width.predict([[100.0], [200.0]], [[1.0], [1.0]], EQUAL, 0.1, method="grid")


def test_bad_options():
    with pytest.raises(ValueError, match="scope is 'everything'; allowed: 'kernels'"):
        width.distances({"kernel": np.ones((2, 2))}, scope="everything")
    with pytest.raises(ValueError, match="zero_share is"):
        width.predict([1.0], [1.0], EQUAL, 0.1, zero_share=1.5)
    with pytest.raises(ValueError, match="allowed: absolute, clip"):
        width.predict([1.0], [1.0], EQUAL, 0.1, negative="square")
    with pytest.raises(ValueError, match="method is 'newton'; allowed: 'fixed_point'"):
        width.predict([1.0], [1.0], EQUAL, 0.1, method="newton")
    with pytest.raises(ValueError, match="allowed: linear, nearest, original"):
        EQUAL.at(0.5, count="exact")
    with pytest.raises(ValueError, match="allowed: semidefinite, squared, symmetric"):
        width.predict_probes(lanczos(np.ones(2), np.ones(2), 1), EQUAL, 0.1, operator="psd")
    for distance in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="distance must be"):
            width.ratio([1.0], [1.0], distance, 0.1)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="0 to 1"):
            EQUAL.at(share)


@pytest.mark.parametrize(
    ("params", "scope", "message"),
    [
        ({}, "kernels", "nothing to prune"),
        ([], "all", "nothing to prune: no array has an entry"),
        ([np.ones((2, 2))], "kernels", "use scope='all'"),
        ({"kernel": np.ones((0, 3))}, "kernels", "nothing to prune"),
        ({"kernel": np.array([[1.0, math.nan]])}, "kernels", "kernel has norm nan"),
        ({"kernel": np.ones((2, 2)), "bias": np.array([math.inf])}, "kernels", "bias has norm inf"),
    ],
)
def test_bad_params(params, scope, message):
    with pytest.raises(ValueError, match=message):
        width.distances(params, scope=scope)
