"""Every reduction over parameters, in every float type and at every scale, against the same in
float64.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from numpy.random import default_rng
from numpy.testing import assert_allclose

from sparsity_jax import (
    allocate,
    geometry,
    linops,
    models,
    optim,
    polytopes,
    scores,
    spectrum,
    surgery,
    train,
    trees,
    width,
)

TYPES = ("float16", "bfloat16", "float32", "float64")
RANDOM = default_rng(0)
SIGNS = RANDOM.choice([-1.0, 1.0], (4, 6))
DRAWN = SIGNS * RANDOM.uniform(1, 8, (4, 6))
SETS = {
    "KSparse": lambda radius: polytopes.KSparse(5, radius),
    "L1": lambda radius: polytopes.LpBall(radius, 1),
    "L2": lambda radius: polytopes.LpBall(radius, 2),
    "L3": lambda radius: polytopes.LpBall(radius, 3),
    "Linf": lambda radius: polytopes.LpBall(radius, math.inf),
}


def units(dtype):
    """Powers of two from the smallest normal number to a hundredth of the largest, at most 1e-30 to
    1e30.
    """
    info = jnp.finfo(dtype)
    low = max(math.ceil(math.log2(info.tiny)), -99)
    high = min(math.floor(math.log2(info.max) - math.log2(100)), 99)
    return [2.0**exponent for exponent in (low, low + 5, 0, high - 5, high)]


# Each is a function of x and its unit; of x in another unit the result is the same.


def per_unit(function):
    return lambda x, unit: function(x) / trees.widen(unit)


def feasible(method, make):
    """From outside of the set into it."""
    return lambda x, unit: getattr(make(trees.widen(unit)), method)(x) / unit


def step_size(x, unit):
    del unit
    gap = 8 * jnp.roll(x, 1, axis=1)
    return optim.frank_wolfe_step_size(0.5, x, gap, 1.0, "gradient")


def score(measure):
    rule = scores.MEASURES[measure]
    reduced = lambda x: rule.reduce(rule.value(trees.widen(x)))
    return per_unit(reduced) if measure != "lamp" else lambda x, unit: reduced(x)


def trace(method):
    matvec = lambda x: lambda v: (x * v + jnp.roll(x * v, 1)).astype(x.dtype)
    return per_unit(lambda x: jnp.stack(method(matvec(x), jax.random.key(0), x)))


def frank_wolfe(make):
    """Two steps in a ball, where weights and gradients have the same unit."""

    def steps(x, unit):
        size = trees.widen(unit)
        tx = make(0.3 * size, polytopes.LpBall(40 * size, 2), 1e-3 * size)
        weights = x[::-1]
        state = tx.init(weights)
        for gradients in (x, jnp.roll(x, 1)):
            updates, state = tx.update(gradients, state, weights)
            weights = optax.apply_updates(weights, updates)
        return trees.widen(weights) / size

    return steps


def kept_filters(x, unit):
    del unit
    params = {"fully": {"kernel": x}}
    counts = {"fully/kernel": 2}
    kept = allocate.keep_masks(params, counts, selection="structured", include="fully/kernel")
    return kept["fully"]["kernel"].astype(float)


def row_norm(x):
    return spectrum.absolute_sum({"x": x})


REDUCTIONS = {
    "norm": per_unit(trees.norm),
    "norm of a tree": per_unit(lambda x: trees.norm([x, x[0]])),
    "norm along an axis": per_unit(lambda x: trees.norm_along(x, 0)),
    "absolute sum": per_unit(trees.absolute_sum),
    "dot": per_unit(lambda x: trees.dot(x, jnp.asarray(SIGNS, x.dtype))),
    "mean norms": per_unit(
        lambda x: polytopes.mean_norms(lambda key: x, jax.random.key(0), draws=2)
    ),
    **{
        f"{name}.lmo": lambda x, unit, make=make: make(0.7).lmo(x)
        for name, make in SETS.items()
        if name != "L1"
    },
    **{f"{name}.shift_inside": feasible("shift_inside", make) for name, make in SETS.items()},
    **{f"{name}.project": feasible("project", SETS[name]) for name in ("KSparse", "L2", "Linf")},
    **{
        f"{name}.norm": per_unit(make(1.0).norm) for name, make in SETS.items() if name != "KSparse"
    },
    "step size": step_size,
    **{f"score {name}": score(name) for name in ("mag_based", "l1", "fpgm", "lamp")},
    "score l2": per_unit(lambda x: scores.AGGREGATES["l2"](trees.widen(x))),
    "sfw": frank_wolfe(lambda rate, ball, delta: optim.sfw(0.1, ball, rescale="none")),
    "adagrad_sfw": frank_wolfe(
        lambda rate, ball, delta: optim.adagrad_sfw(rate, ball, delta=delta)
    ),
    "kept filters": kept_filters,
    "row norm": per_unit(row_norm),
    "hutchinson": trace(linops.hutchinson(4)),
    "hutchpp": trace(linops.hutchpp(9)),
}


@jax.jit
def reduced(x, unit):
    return {name: function(x, unit) for name, function in REDUCTIONS.items()}


@pytest.mark.parametrize("dtype", TYPES)
def test_reductions_depend_neither_on_the_type_nor_on_the_scale(dtype):
    with jax.enable_x64(True):
        drawn = jnp.asarray(DRAWN, dtype)
        expected = reduced(drawn.astype(jnp.float64), jnp.float64(1))
        info = jnp.finfo(dtype)
        rounding = 40 * float(info.eps)
        for unit in units(dtype):
            found = reduced(drawn * jnp.asarray(unit, dtype), jnp.asarray(unit, dtype))
            least = float(info.smallest_subnormal) / unit
            for name, value in found.items():
                wide = np.asarray(value, np.float64)
                message = f"{name} of {dtype} in units of {unit:.0e}"
                assert_allclose(
                    wide, expected[name], rtol=rounding, atol=rounding + least, err_msg=message
                )
                check_inside(name, wide, 1 + 4 * float(info.eps) + least)


def check_inside(name, point, slack):
    """Points of a set are at most a rounding of their own type outside of it."""
    kind, _, method = name.partition(".")
    radius = {"lmo": 0.7, "shift_inside": 1.0, "project": 1.0}.get(method)
    if radius is None:
        return
    size = np.abs(point).ravel()
    if kind == "KSparse":
        assert size.max() <= radius * slack
        assert size.sum() <= 5 * radius * slack
    else:
        assert np.linalg.norm(size, SETS[kind](1.0).p) <= radius * slack


@pytest.mark.parametrize("dtype", TYPES)
def test_sizes_on_the_host_and_noise_follow_the_scale(dtype):
    with jax.enable_x64(True):
        for unit in units(dtype):
            params = {"kernel": jnp.asarray(DRAWN, dtype) * jnp.asarray(unit, dtype)}
            distances = width.distances(params)
            norm = np.linalg.norm(np.asarray(params["kernel"], np.float64))
            assert_allclose([distances.norm_sum, distances.at(1.0)], norm, rtol=1e-6)
            noisy = surgery.add_noise(params, jax.random.key(0), std=0.5, relative=True)
            change = np.asarray(noisy["kernel"], np.float64) - np.asarray(
                params["kernel"], np.float64
            )
            assert 0.2 < np.linalg.norm(change) / norm < 1


@pytest.mark.parametrize(
    ("dtype", "unit"), [("float16", 2.0**7), ("float16", 2.0**-12), ("float32", 2.0**60)]
)
def test_the_product_with_a_square_keeps_its_range(dtype, unit):
    diagonal = jnp.asarray(DRAWN, dtype)
    square = linops.squared(lambda v: jnp.asarray(unit, dtype) * (diagonal * v))(
        jnp.ones_like(diagonal)
    )
    assert square.dtype == jnp.float32
    exact = np.square(np.asarray(diagonal, np.float64))
    assert_allclose(
        np.asarray(square, np.float64) / unit**2, exact, rtol=4 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18])
def test_lanczos_follows_the_unit_of_the_operator(scale):
    eigenvalues = np.linspace(-1, 3, 30)
    basis = np.linalg.qr(default_rng(0).normal(size=(30, 30)))[0]
    matrix = jnp.asarray(basis * eigenvalues @ basis.T, jnp.float32)
    start = jnp.asarray(np.sign(default_rng(1).normal(size=30)), jnp.float32)
    tridiagonal = steps_of(matrix, jnp.float32(scale), start)
    assert int(tridiagonal.num_steps) == 12
    values, weights = linops.ritz(tridiagonal)
    expected, shares = linops.ritz(steps_of(matrix, jnp.float32(1), start))
    assert_allclose(values / scale, expected, atol=1e-5)
    assert_allclose(weights, shares, atol=1e-5)
    moved = tridiagonal._replace(alphas=tridiagonal.alphas + np.float32(scale))
    last = linops.border_for(moved)
    values, _, _ = linops.bordered(moved, last=last)
    assert_allclose(values[0] / scale, 0, atol=1e-4)
    trace, error = linops.hutchpp(12)(lambda v: scale * (matrix @ v), jax.random.key(0), start)
    one, deviation = linops.hutchpp(12)(lambda v: matrix @ v, jax.random.key(0), start)
    assert_allclose([trace / scale, error / scale], [one, deviation], rtol=1e-3)


@functools.partial(jax.jit, static_argnames="num")
def steps_of(matrix, scale, start, num=12):
    return linops.lanczos(num)(lambda v: scale * (matrix @ v), start)


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("bfloat16", "bfloat16"), ("float32", "float16")]
)
def test_curvature_is_that_of_narrow_weights_in_wide_ones(dtype, param_dtype):
    """experiments/robustness/precisions.py runs every config in every type."""
    dataset = tiny.digits()
    model = models.build(
        name="mlp", num_classes=10, widths=(4,), dtype=dtype, param_dtype=param_dtype
    )
    problem = train.build_problem(dataset, model)
    state = train.create_state(problem, train.key_of(0))
    params, _ = geometry.wide_variables(state)
    tiny.same(params, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.params))
    images = problem.images(dataset.test.images)
    outputs = jax.jit(lambda params: problem.model.apply({"params": params}, images))
    tiny.same(outputs(params), outputs(state.params))
    linops.Lanczos(2).init(params)  # takes no narrow type
