"""Operations of real networks that leave channels apart: which can go, and that the smaller network
is the masked one, in float64.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import rms_norm, rotate
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from numpy.random import default_rng
from numpy.testing import assert_allclose

from sparsity_jax import groups


@pytest.fixture(autouse=True, scope="module")
def in_float64():
    with jax.enable_x64(True):
        yield


KEY = jax.random.key(3)
ROWS = np.array([0, 1, 0, 1])
SIZES = np.array([1, 1, 2, 0])  # of groups of rows


def normal(*shape):
    rng = default_rng(sum(shape))
    return rng.normal(size=shape) / np.sqrt(shape[-1])


V = dict(
    a=normal(5, 8),
    out=normal(8, 3),
    half=normal(4, 3),
    table=normal(11, 8),
    up=normal(4, 8, 6),
    down=normal(4, 6, 8),
    conv=normal(3, 3, 8, 6),
    last=normal(6, 3),
    q=normal(8, 2, 4),
    o=normal(2, 4, 8),
    bias=normal(4, 1),
)
X = normal(4, 5)


def hidden(v, x):
    return jnp.tanh(x @ v["a"])


def two_pass_norm(h):
    centred = h - h.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def response_norm(h):
    energy = jnp.sqrt((h**2).sum(0, keepdims=True) + 1e-6)
    return h * energy / (energy.mean(-1, keepdims=True) + 1e-6)


def standardised(v, x):
    kernel = v["conv"]
    kernel = kernel - kernel.mean((0, 1, 2))
    kernel = kernel / (kernel.std((0, 1, 2)) + 1e-5)
    image = hidden(v, x)[:, None, None]
    numbers = ("NHWC", "HWIO", "NHWC")
    image = lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    return image[:, 0, 0] @ v["last"]


def experts(v, x):
    h = lax.ragged_dot(hidden(v, x), v["up"], SIZES)
    return lax.ragged_dot(jnp.tanh(h), v["down"], SIZES) @ v["out"]


def attention(v, x):
    h = hidden(v, x)
    values = jnp.einsum("td,dhe->the", h, v["q"])
    turned = rotate(values[None])[0]
    weights = jax.nn.softmax(jnp.einsum("the,she->ths", turned, turned))
    mixed = jnp.einsum("ths,she->the", weights, values)
    return jnp.einsum("the,hed->td", mixed, v["o"]) @ v["out"]


def watched(v, x):
    h = hidden(v, x)
    jax.debug.callback(lambda h: None, h)
    return h @ v["out"]


def sharded(v, x):
    mesh = Mesh(np.array(jax.devices()[:1]), "d")
    specs = (PartitionSpec("d"), PartitionSpec())
    made = lambda x, a: jax.nn.relu(x @ a)  # which has its own derivative
    product = jax.shard_map(made, mesh=mesh, in_specs=specs, out_specs=specs[0])
    return jax.nn.silu(product(x, v["a"])) @ v["out"]


def scattered(write):
    """At rows of zeros, which `write(zeros.at[rows])` fills."""
    return lambda v, x: write(jnp.zeros((6, 8)).at[ROWS + 2], hidden(v, x)) @ v["out"]


def quantised(v, x):
    step = jnp.max(jnp.abs(v["a"])) / 7
    return (
        jnp.tanh(x @ (v["a"] + lax.stop_gradient(jnp.round(v["a"] / step) * step - v["a"])))
        @ (v["out"])
    )


def one_hot(v, x):
    return jnp.tanh(jax.nn.one_hot(ROWS, 11) @ v["table"]) @ v["out"]


positions = np.sin(np.arange(32.0).reshape(4, 8))
# name: (function, sizes of the groups of `hidden` and behind it)
EXACT = {
    "take": (lambda v, x: rms_norm(jnp.take(v["table"], ROWS, 0), 1.0) @ v["out"], [8]),
    "one hot": (one_hot, [8, 11]),
    "segment sum": (lambda v, x: jax.ops.segment_sum(hidden(v, x), ROWS, 2) @ v["out"], [8]),
    "segment max": (lambda v, x: jax.ops.segment_max(hidden(v, x), ROWS, 2) @ v["out"], [8]),
    "cache": (lambda v, x: jnp.zeros((6, 8)).at[1:5].set(hidden(v, x)) @ v["out"], [8]),
    "scatter add": (scattered(lambda at, h: at.add(h)), [8]),
    "scatter max": (scattered(lambda at, h: at.max(h)), [8]),
    "scatter multiply": (
        lambda v, x: (
            hidden(v, x).at[1:4].multiply(hidden(v, x)[:3], unique_indices=True) @ v["out"]
        ),
        [8],
    ),
    "cache on channels": (lambda v, x: jnp.zeros((4, 9)).at[:, 1:].set(hidden(v, x)).sum(1), []),
    "fft over time": (lambda v, x: jnp.fft.rfft(hidden(v, x), axis=0).real @ v["out"], [8]),
    "fft over channels": (lambda v, x: jnp.fft.rfft(hidden(v, x)).real, []),
    "ragged dot": (experts, [6, 8, 8]),
    "reduce": (
        lambda v, x: lax.reduce(hidden(v, x), np.float64(1), lax.add, (0,)) @ v["out"],
        [8],
    ),
    "debug callback": (watched, [8]),
    "shard_map": (sharded, [8]),
    "strided gate": (lambda v, x: (hidden(v, x)[:, ::2] * hidden(v, x)[:, 1::2]) @ v["half"], [4]),
    "strided part": (lambda v, x: hidden(v, x)[:, 1:8:2] @ v["half"], [4, 4]),
    "largest weight": (quantised, [8]),
    "largest of squares": (
        lambda v, x: hidden(v, x) / (1 + (hidden(v, x) ** 2).max(1, keepdims=True)) @ v["out"],
        [8],
    ),
    "largest of anything": (lambda v, x: hidden(v, x).max(1), []),
    "rotary": (attention, [2, 2, 8, 8]),
}
ZEROED = {
    "two-pass norm": (lambda v, x: two_pass_norm(hidden(v, x)) @ v["out"], [8]),
    "positions": (lambda v, x: rms_norm(hidden(v, x) + positions, 1.0) @ v["out"], [8]),
    "bias on tokens": (lambda v, x: rms_norm(hidden(v, x) + v["bias"], 1.0) @ v["out"], [8]),
    "weight standardisation": (standardised, [6, 8]),
    "response norm": (lambda v, x: response_norm(hidden(v, x)) @ v["out"], [8]),
    "product of exponentials": (
        lambda v, x: jnp.exp(hidden(v, x)) @ jnp.exp(hidden(v, x)).T @ v["half"],
        [8],
    ),
    "in a scan": (
        lambda v, x: (
            lax.scan(lambda h, _: (two_pass_norm(h), h.sum()), hidden(v, x), length=2)[0] @ v["out"]
        ),
        [8],
    ),
    "with its own derivative": (
        lambda v, x: jax.nn.silu(two_pass_norm(hidden(v, x)) + 1).sum(1),
        [8],
    ),
}


def agree(function, channels, keep, run):
    """Whether `run`, the full network without removed channels, and the compact one have the same
    results and slopes.
    """
    small = groups.compact(V, channels, keep)
    elastic = groups.elastic(function, channels, keep)

    def loss(v, run):
        out = run(v, X)
        return jnp.sum(jnp.sin(out)), out

    slopes = jax.grad(loss, has_aux=True)
    both = jax.jit(lambda v, small: (slopes(v, run), slopes(small, elastic)))
    (of_full, full), (of_small, compact) = both(V, small)
    assert_allclose(compact, full, rtol=0, atol=1e-12)
    of_full = groups.compact(jax.tree.map(np.asarray, of_full), channels, keep)
    for path, slope in of_small.items():
        assert_allclose(slope, of_full[path], rtol=0, atol=1e-12)


def without_some(channels):
    """Every group loses its second channel and every third one after it."""
    return {name: np.arange(size) % 3 != 1 for name, size in channels.sizes.items()}


def sizes(channels):
    """Of the groups that the function uses."""
    return sorted(channels.sizes.values())


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    function, expected = EXACT[name]
    channels = groups.trace(function, V, X)
    assert sizes(channels) == expected
    keep = without_some(channels)
    if expected:
        run = lambda v, x: function(groups.mask(v, channels, keep), x)
        agree(function, channels, keep, run)


@pytest.mark.parametrize("name", ZEROED)
def test_zeroed_sums(name):
    function, expected = ZEROED[name]
    assert len(groups.trace(function, V, X).groups) < len(expected)
    channels = groups.trace(function, V, X, sums="zeroed")
    assert sizes(channels) == expected
    keep = without_some(channels)
    agree(function, channels, keep, groups.masked(function, channels, keep))
    assert groups.check(function, V, channels, X, key=KEY) < 1e-12


def test_zeroed_groups_are_marked():
    """Zeros among the variables do not remove them, so `mask` does not pretend to."""
    function, _ = ZEROED["weight standardisation"]
    channels = groups.trace(function, V, X, sums="zeroed")
    marked = {group.size: group.zeroed for group in channels.groups.values()}
    assert marked == {8: True, 6: False}
    assert groups.describe(channels).count("zeroed in sums") == 1
    (name,) = [group.name for group in channels.groups.values() if group.zeroed]
    (other,) = [group.name for group in channels.groups.values() if not group.zeroed]
    groups.mask(V, channels, {other: np.arange(6) < 3})
    with pytest.raises(ValueError, match=r"groups\.masked"):
        groups.mask(V, channels, {name: np.arange(8) < 4})


def test_zeroed_sums_by_hand():
    """Means and variances are of the entries that stay, over the number of all."""
    function, _ = ZEROED["two-pass norm"]
    channels = groups.trace(function, V, X, sums="zeroed")
    kept = np.arange(8) % 3 > 0
    keep = dict.fromkeys(channels.names, kept)
    h = np.tanh(X @ V["a"])[:, kept]
    centred = h - h.sum(1, keepdims=True) / 8
    scaled = centred / np.sqrt((centred**2).sum(1, keepdims=True) / 8 + 1e-5)
    by_hand = scaled @ V["out"][kept]
    assert_allclose(groups.masked(function, channels, keep)(V, X), by_hand, rtol=1e-12)
    small = groups.compact(V, channels, keep)
    assert_allclose(groups.elastic(function, channels, keep)(small, X), by_hand, rtol=1e-12)


def test_masked_is_traced_once_for_any_keep():
    function, _ = ZEROED["two-pass norm"]
    channels = groups.trace(function, V, X, sums="zeroed")
    (name,) = channels.names

    @jax.jit
    def run(kept):
        return groups.masked(function, channels, {name: kept})(V, X)

    for kept in (np.arange(8) < 5, np.arange(8) % 2 == 0):
        keep = {name: kept}
        small = groups.compact(V, channels, keep)
        compact = groups.elastic(function, channels, keep)(small, X)
        assert_allclose(run(kept), compact, atol=1e-12)


def test_other_groups_need_no_request():
    """Where nothing is summed over, both ways find the same, and mask it."""
    function, expected = EXACT["rotary"]
    channels = groups.trace(function, V, X, sums="zeroed")
    assert sizes(channels) == expected
    assert not any(group.zeroed for group in channels.groups.values())


def test_a_fill_that_is_a_number_counts():
    """Entries that are read outside of the table are 1, removed or not."""
    look = lambda v, x: jnp.take(v["table"], ROWS, 0, mode="fill", fill_value=1.0).sum(1)
    assert not groups.trace(look, V, X).groups


STEPS = {  # h: [4, 8]
    "norm": lambda h, v: two_pass_norm(h),
    "response": lambda h, v: response_norm(h),
    "shift": lambda h, v: h + positions,
    "exp": lambda h, v: jnp.exp(-jnp.abs(h)),
    "halves": lambda h, v: jnp.concatenate([h[:, ::2], h[:, 1::2]], 1),
    "rows": lambda h, v: jnp.zeros((6, 8)).at[ROWS].add(h)[:4],
    "mean": lambda h, v: h - h.mean(1, keepdims=True),
    "mix": lambda h, v: jnp.tanh(h @ v["out"] @ v["out"].T),
    "largest": lambda h, v: h / (1 + jnp.max(h**2, 1, keepdims=True)),
    "tokens": lambda h, v: h + v["bias"],
}


@hypothesis.given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=5))
@hypothesis.settings(max_examples=10)
def test_random_programs(steps):
    def function(v, x):
        h = hidden(v, x)
        for name in steps:
            h = STEPS[name](h, v)
        return h @ v["out"]

    channels = groups.trace(function, V, X, sums="zeroed")
    if channels.groups:
        assert groups.check(function, V, channels, X, key=KEY) < 1e-12
