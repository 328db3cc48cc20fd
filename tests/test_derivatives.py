"""Derivatives of selection, norms, projections and vertices: exact, or documented as constant."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import masks, polytopes, trees

SIZE = 6
seeds = st.integers(0, 2**20)


def products(function):
    """(value, J v, u J) of `function(x, *rest)` along x, compiled once."""

    @jax.jit
    def both(x, v, u, *rest):
        value, along = jax.jvp(lambda x: function(x, *rest), (x,), (v,))
        return value, along, jax.vjp(lambda x: function(x, *rest), x)[1](u)[0]

    return both


project = products(lambda x, k, radius: polytopes.KSparse(k, radius).project(x))
FUNCTIONS = {
    "norm": lambda x: trees.norm([x[:2], x[2:]]),
    "norm_along": lambda x: trees.norm_along(x.reshape(2, 3), 1),
    "kth_largest": lambda x: masks.kth_largest(x, 2, magnitude=True),
    "kth_largest of a tree": lambda x: masks.kth_largest(
        {"a": x[:2], "b": x[2:]}, jnp.array([1, 4])
    ),
    **{
        f"L{p:g} {method}": lambda x, p=p, method=method: getattr(polytopes.LpBall(0.8, p), method)(
            x
        )
        for p in (1, 2, 3, math.inf)
        for method in ("project", "shift_inside", "norm")
        if (p, method) not in ((3, "project"), (1, "project"))
    },
    **{f"L{p:g} lmo": lambda x, p=p: polytopes.LpBall(0.8, p).lmo(x) for p in (2, 3)},
    "KSparse shift_inside": lambda x: polytopes.KSparse(2, 0.8).shift_inside(x),
}


@jax.jit
def every_product(x, v):
    return {name: jax.jvp(function, (x,), (v,)) for name, function in FUNCTIONS.items()}


def weighted(function, x):
    value = function(x)
    return jnp.sum(value * jnp.arange(1, 1 + value.size).reshape(value.shape))


@jax.jit
def every_gradient(x):
    return {
        name: jax.grad(functools.partial(weighted, function))(x)
        for name, function in FUNCTIONS.items()
    }


every_value = jax.jit(lambda x: {name: function(x) for name, function in FUNCTIONS.items()})


@hypothesis.given(seeds)
@hypothesis.settings(max_examples=15)
def test_derivatives_equal_finite_differences(seed):
    rng = default_rng(seed)
    with jax.enable_x64(True):
        x, v = jnp.asarray(rng.normal(size=SIZE)), jnp.asarray(rng.normal(size=SIZE))
        above, below = every_value(x + 1e-6 * v), every_value(x - 1e-6 * v)
        gradients = every_gradient(x)
        for name, (value, change) in every_product(x, v).items():
            assert_allclose(change, (above[name] - below[name]) / 2e-6, atol=1e-5, err_msg=name)
            weights = np.arange(1, 1 + value.size).reshape(value.shape)
            assert_allclose(gradients[name] @ v, np.sum(weights * change), atol=1e-9, err_msg=name)


@pytest.mark.parametrize("x", [np.zeros(SIZE), np.eye(SIZE)[0], np.full(SIZE, -2.0)])
def test_derivatives_are_finite_at_zeros_and_ties(x):
    with jax.enable_x64(True):
        for name, gradient in every_gradient(jnp.asarray(x)).items():
            assert np.isfinite(gradient).all(), name


@hypothesis.given(seeds, st.integers(1, SIZE), st.floats(0.1, 3))
def test_the_projection_has_its_exact_derivative(seed, k, radius):
    """On its face: free entries move with their mean change removed, full and zero ones not at
    all.
    """
    rng = default_rng(seed)
    x, v, u = rng.normal(size=(3, SIZE))
    with jax.enable_x64(True):
        value, along, back = project(x, v, u, k, radius)
    value, sign = np.asarray(value), np.sign(x)
    active = np.clip(np.abs(x), 0, radius).sum() > k * radius
    free = (np.abs(value) < radius) & ((value != 0) | (not active))
    jacobian = np.diag(free.astype(float))
    if active and free.any():
        jacobian -= np.outer(sign * free, sign * free) / free.sum()
    assert_allclose(along, jacobian @ v, atol=1e-9)
    assert_allclose(back, u @ jacobian, atol=1e-9)


def test_the_projection_follows_its_numbers_and_is_the_identity_inside():
    x = jnp.asarray([3.0, -2.0, 1.0, 0.0])
    both = jax.jit(
        jax.jacfwd(lambda x, radius: polytopes.KSparse(2, radius).project(x), argnums=(0, 1))
    )
    by_x, by_radius = both(x, 1.5)  # 1.5, -1.25, 0.25, 0
    assert_allclose(by_radius, [1, -0.5, 0.5, 0])
    assert_allclose(by_x[1], [0, 0.5, 0.5, 0])
    assert_allclose(both(0.01 * x, 1.5)[0], np.eye(4))


one_sparse = products(lambda x, radius: polytopes.LpBall(radius, 1).project(x))
of_optax = products(optax.projections.projection_l1_ball)


@hypothesis.given(seeds, st.floats(0.1, 3))
@hypothesis.settings(max_examples=20)
def test_the_l1_projection_and_its_derivative_equal_those_of_optax(seed, radius):
    x, v, u = default_rng(seed).normal(size=(3, SIZE))
    with jax.enable_x64(True):
        for ours, theirs in zip(one_sparse(x, v, u, radius), of_optax(x, v, u, radius)):
            assert_allclose(ours, theirs, atol=1e-9)


def test_vertices_of_polytopes_and_masks_are_constants():
    x = jnp.asarray([0.3, -2.0, 1.0])
    for constraint in (
        polytopes.KSparse(2, 1.0),
        polytopes.LpBall(1.0, 1),
        polytopes.LpBall(1.0, math.inf),
    ):
        assert_array_equal(jax.jacrev(constraint.lmo)(x), np.zeros((3, 3)))
    kept = jax.grad(lambda x: jnp.sum(x * masks.k_largest_mask(x, 2, magnitude=True)))(x)
    assert_array_equal(kept, [0, 1, 1])
    by_radius = jax.grad(lambda radius: polytopes.KSparse(2, radius).lmo(x).sum())(1.0)
    assert by_radius == 0  # +1 and -1
