"""The oracle finds what brute force finds; Jacobians have the singular values of NumPy and of known
networks.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal, assert_equal

from sparsity_jax import groups, models, probes, trees

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default


# Every combination --------------------------------------------------------------------------------


def value_of(keep):
    """A loss with interactions between layers, in exact small integers."""
    weights = {
        "a": np.array([5, -3, 2, 8, -1]),
        "b": np.array([1, 4, -2, 7]),
        "c": np.array([3, 1]),
    }
    sums = [(keep[name] * weights[name]).sum(-1) for name in keep]
    return sums[0] * sums[1] - sums[0] + 3 * sums[-1]


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize(
    "counts", [{"a": (5, 2), "b": (4, 1)}, {"a": (5, 3), "b": (4, 0), "c": (2, 1)}]
)
def test_oracle_is_brute_force(counts, batch):
    calls = []

    def evaluate(keep):
        calls.append({name: own.shape for name, own in keep.items()})
        return value_of(keep)

    found = probes.oracle(evaluate, counts, batch=batch)
    assert calls == [{name: (batch, size) for name, (size, _) in counts.items()}] * len(calls)
    expected = [
        {
            name: ~np.isin(np.arange(n), pruned)
            for (name, (n, _)), pruned in zip(counts.items(), network)
        }
        for network in itertools.product(
            *(itertools.combinations(range(n), k) for n, k in counts.values())
        )
    ]
    losses = np.array([value_of(keep) for keep in expected])
    assert_array_equal(found.losses, losses)
    for row, keep in enumerate(expected):
        assert_equal(found.keep(row), keep)
        assert probes.rank(found, keep) == 1 + sum(losses < losses[row])
    assert_equal(found.best, expected[int(np.argmin(losses))])


def test_oracle_of_a_network_with_and_without_fine_tuning():
    model = models.build(name="mlp", num_classes=3, widths=(6, 5))
    images, labels = jax.random.normal(KEY, (12, 1, 4, 1)), jnp.arange(12) % 3
    variables = jax.jit(model.init)(KEY, images)
    channels = groups.trace(model.apply, variables, images)

    def loss(params, keep):
        logits = model.apply(groups.mask({**variables, "params": params}, channels, keep), images)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(12), labels])

    def tuned(keep):
        step = lambda _, params: jax.tree.map(
            lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, keep)
        )
        return loss(jax.lax.fori_loop(0, 5, step, variables["params"]), keep)

    counts = {name: (size, 2) for name, size in channels.sizes.items()}
    traces = []

    def once(function):
        def traced(keep):
            traces.append(1)
            return function(keep)

        return jax.jit(jax.vmap(traced))

    plain = probes.oracle(once(lambda keep: loss(variables["params"], keep)), counts, batch=32)
    better = probes.oracle(once(tuned), counts, batch=32)
    assert len(traces) == 2
    assert plain.losses.shape == better.losses.shape == (15 * 10,)
    assert np.all(better.losses < plain.losses)
    assert plain.losses.min() == pytest.approx(
        float(loss(variables["params"], plain.best)), rel=1e-5
    )
    kernels = {
        name: np.abs(trees.named_leaves(variables)[f"{name}/kernel"]).mean(0)
        for name in channels.names
    }
    magnitude = {name: own >= np.sort(own)[2] for name, own in kernels.items()}
    by_norm = float(loss(variables["params"], magnitude))
    assert probes.rank(plain, magnitude) == 1 + int((plain.losses < by_norm * (1 - 1e-6)).sum())
    assert probes.rank(plain, plain.best) == 1


def test_oracle_takes_what_diverges_for_the_worst():
    found = probes.oracle(
        lambda keep: np.where(keep["a"][:, 0], np.nan, 1.0), {"a": (3, 1)}, batch=2
    )
    assert_array_equal(found.losses, [1, np.inf, np.inf])
    assert probes.rank(found, {"a": np.array([True, False, True])}) == 2


def test_oracle_refuses():
    losses = lambda keep: np.zeros(len(keep["a"]))
    with pytest.raises(
        ValueError, match=r"155,117,520 combinations .* more than limit = 1,000,000"
    ):
        probes.oracle(losses, {"a": (30, 15)})
    with pytest.raises(ValueError, match="'a' loses 3 of 3 groups; allowed: 0 to 2"):
        probes.oracle(losses, {"a": (3, 3)})
    with pytest.raises(ValueError, match="batch is 0"):
        probes.oracle(losses, {"a": (3, 1)}, batch=0)
    with pytest.raises(ValueError, match=r"returned the shape \(\)"):
        probes.oracle(lambda keep: 0.0, {"a": (3, 1)})
    found = probes.oracle(losses, {"a": (3, 1)})
    with pytest.raises(ValueError, match="leaves 1 of 3 groups; the oracle tried 2 of 3"):
        probes.rank(found, {"a": np.array([True, False, False])})
    with pytest.raises(ValueError, match="leaves 1 of 2 groups"):
        probes.rank(found, {"a": np.array([True, False])})
    with pytest.raises(ValueError, match="keep has no 'a'"):
        probes.rank(found, {"b": np.array([True, True, False])})
    with pytest.raises(ValueError, match="counts names no layer"):
        probes.oracle(losses, {})


# Jacobians ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_a_linear_network_has_the_singular_values_of_its_matrix(shape):
    with jax.enable_x64(True):
        draw = np.random.default_rng(0).normal
        matrix, inputs = draw(size=shape), draw(size=(4, shape[0]))
        measure = functools.partial(probes.jacobian_singular_values, lambda w, x: x @ w + 1.0)
        values = jax.jit(measure)(matrix, inputs)
        expected = np.linalg.svd(matrix, compute_uv=False)
        assert_allclose(values, np.tile(expected, (4, 1)), rtol=1e-12)


def test_orthogonal_layers_are_isometric():
    draw = np.random.default_rng(0).normal
    left, right = np.linalg.qr(np.float32(draw(size=(2, 16, 16))))[0]
    inputs = np.float32(draw(size=(3, 4, 4, 1)))
    apply = lambda variables, x: (x.reshape(len(x), -1) @ variables[0] @ variables[1]).reshape(
        x.shape
    )

    @jax.jit
    def measure(*variables):
        return probes.isometry(probes.jacobian_singular_values(apply, variables, inputs))

    found = measure(left, right)
    assert_allclose(found, [1, 0, 1, 1], atol=1e-5)
    halved = measure(left, right * (np.arange(16) >= 4))
    assert_allclose(
        found._replace(mean=0.75, std=np.sqrt(0.75 * 0.25), smallest=0), halved, atol=1e-5
    )


def test_a_network_has_the_singular_values_of_its_numerical_jacobian():
    with jax.enable_x64(True):
        model = models.build(
            name="mlp", num_classes=5, widths=(32, 24), dtype="float64", param_dtype="float64"
        )
        images = jax.random.normal(KEY, (3, 2, 4, 1), jnp.float64)
        variables = jax.jit(model.init)(KEY, images)
        values = jax.jit(lambda v, x: probes.jacobian_singular_values(model.apply, v, x))(
            variables, images
        )
        assert values.shape == (3, 5)
        single = jax.jit(lambda x: model.apply(variables, x))
        step = 1e-6 * np.eye(8).reshape(8, 2, 4, 1)
        for image, own in zip(np.asarray(images), values):
            numeric = (np.asarray(single(image + step)) - np.asarray(single(image - step))) / 2e-6
            assert_allclose(own, np.linalg.svd(numeric.T, compute_uv=False), rtol=1e-6, atol=1e-9)
