"""Programs of any batch size without the removed channels: traced, run and exported with symbolic
sizes.
"""

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, jit, lax
from numpy.testing import assert_allclose

from sparsity_jax import cost, groups

V = dict(
    a=foreign.normal(0, 5, 8),
    b=foreign.normal(1, 8) + 1,
    d=foreign.normal(2, 8, 3),
    kernel=foreign.normal(3, 3, 8, 8),
    wide=foreign.normal(4, 16, 3),
)
KEY = jax.random.key(0)


def hidden(v, x):
    return jnp.tanh(x @ v["a"] + v["b"])


def batch_norm(v, x):
    h = x[:, 0] @ v["a"]
    h = (h - h.mean(0)) * lax.rsqrt(h.var(0) + 1e-5) * v["b"]
    return jax.nn.relu(h) @ v["d"]


def pairs(v, x):
    """Each example beside the next of its pair."""
    h = hidden(v, x[:, 0])
    return h.reshape(h.shape[0] // 2, 16) @ v["wide"]


def heads(v, x):
    """Attention in the manner of PyTorch: heads and examples share an axis."""
    h = hidden(v, x)
    batch, time, _ = h.shape
    h = h.reshape(batch, time, 4, 2).swapaxes(1, 2).reshape(batch * 4, time, 2)
    h = jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h
    h = h.reshape(batch, 4, time, 2).swapaxes(1, 2).reshape(batch, time, 8)
    return h @ v["d"]


def convolution(v, x):
    h = hidden(v, x)
    h = lax.conv_general_dilated(
        h, v["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jax.nn.relu(h).max(1) @ v["d"]


def positions(v, x):
    """Indices and constants as long as the inputs."""
    h = hidden(v, x)
    weights = jnp.arange(x.shape[1]) / x.shape[1]
    h = h * weights[:, None] + jnp.pad(h[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return (h + jnp.zeros((*x.shape[:2], 1)))[:, -1] @ v["d"]


def scanned(v, x):
    step = lambda carry, row: (jnp.tanh(carry + row), carry.sum())
    carry, sums = lax.scan(step, jnp.zeros((x.shape[1], 8)), hidden(v, x))
    return carry @ v["d"], sums


FUNCTIONS = {  # with the constraints of their sizes b and t
    "batch norm": (batch_norm, ()),
    "pairs": (pairs, ("mod(b, 2) == 0",)),
    "heads": (heads, ()),
    "convolution": (convolution, ("t >= 3",)),
    "positions": (positions, ("t >= 2", "b <= 16")),
    "scanned": (scanned, ()),
}


def symbolic(shape, constraints=()):
    sizes = export.symbolic_shape(shape, constraints=constraints)
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def half(channels):
    """Keeps half of every group."""
    return {name: np.arange(size) % 2 == 0 for name, size in channels.sizes.items()}


def examples(*shape):
    return np.float32(np.random.default_rng(sum(shape)).normal(size=shape))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exported_programs_serve_all_sizes(name):
    function, constraints = FUNCTIONS[name]
    channels = groups.trace(function, V, examples(4, 6, 5))
    keep = half(channels)
    assert keep
    small = groups.compact(V, channels, keep)
    run = jit(groups.elastic(function, channels, keep))
    exported = export.export(run)(small, symbolic("b, t, 5", constraints))
    for size in ((2, 7), (6, 4)):
        x = examples(*size, 5)
        masked = jit(function)(groups.mask(V, channels, keep), x)
        jax.tree.map(
            lambda one, other: assert_allclose(one, other, rtol=1e-4, atol=1e-5),
            masked,
            exported.call(small, x),
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traces_of_symbolic_sizes_find_the_same_groups(name):
    function, constraints = FUNCTIONS[name]
    channels = groups.trace(function, V, symbolic("b, t, 5", constraints))
    x = examples(4, 6, 5)
    same = groups.trace(function, V, x)
    assert channels.sizes == same.sizes
    for (_, one), (_, other) in zip(channels.members, same.members, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert groups.check(function, V, channels, x, key=KEY) < 1e-5
    with pytest.raises(ValueError, match="symbolic"):
        cost.of_channels(channels, "flops")


def test_exported_slopes():
    """Of functions with derivatives of their own, also where heads and examples share an axis."""

    def function(v, x):
        h = jax.nn.relu(x @ v["a"]).reshape(-1, 4, 2)
        h = jax.nn.silu(h.reshape(x.shape[0] * 4, 2)).reshape(-1, 8)
        return jnp.sum(jnp.sin(h @ v["d"]), 1)

    channels = groups.trace(function, V, examples(4, 5))
    keep = half(channels)
    slopes = lambda run: jax.grad(lambda v, x: run(v, x).mean())
    small = groups.compact(V, channels, keep)
    run = jit(slopes(groups.elastic(function, channels, keep)))
    exported = export.export(run)(small, symbolic("b, 5"))
    x = examples(6, 5)
    masked = slopes(function)(groups.mask(V, channels, keep), x)
    expected = groups.compact(masked, channels, keep)
    jax.tree.map(
        lambda one, other: assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        expected,
        exported.call(small, x),
    )


def test_channels_that_share_an_axis_unevenly_are_refused():
    """Half of the channels of all examples, and all of a vector."""

    def function(v, x):
        flat = jnp.tanh(x @ v["a"]).reshape(-1)
        return jnp.concatenate([flat, v["b"]])[:, None].sum(0)

    channels = groups.trace(function, V, examples(4, 5))
    assert channels.sizes == {"a": 8, "b": 8}
    keep = {"a": np.arange(8) % 2 == 0}
    small = groups.compact(V, channels, keep)
    run = groups.elastic(function, channels, keep)
    assert_allclose(
        run(small, examples(6, 5)),
        function(groups.mask(V, channels, keep), examples(6, 5)),
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match="symbolic size"):
        export.export(jit(run))(small, symbolic("b, 5"))


def test_sizes_that_no_number_meets_are_refused():
    with pytest.raises(ValueError, match="symbolic sizes b"):
        groups.trace(hidden, V, symbolic("b, 5", ("b >= 1000000",)))
