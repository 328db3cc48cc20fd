"""What is left of many networks when every channel group keeps half of its channels.

The best possible is that of the same network built with half of each size that can shrink, which
the keywords of its maker name.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from architectures import NETWORKS, OPERATIONS
from jax import jit
from test_groups import close

from sparsity_jax import groups

REACH = tiny.module("experiments/channels/reach.py")
LIMITS = {  # of the share left, where the best possible is not enough to ask for
    "mixer": 0.40,
    "convnext": 0.40,
    "convnext v2": 0.40,
    "bit": 0.35,
    "hybrid vit": 0.35,
    "graph": 0.40,
    "graph attention": 0.40,
}
FROZEN = {  # what is left where sums run over what is not zero, unless they are zeroed
    "equinox": 0.286,
    "gpt2": 0.781,
    "opt": 0.783,
    "bloom": 0.778,
    "gptj": 0.845,
    "bart": 0.649,
    "whisper": 0.613,
    "equinox encoder": 0.783,
    "bit": 1.0,
    "hybrid vit": 0.488,
    "sincos vit": 0.506,
    "mixer": 0.570,
    "convnext": 0.659,
    "convnext v2": 1.0,
    "swin": 0.506,
    "fourier": 0.648,
}


@functools.cache
def network(name):
    return NETWORKS[name]()


@functools.cache
def traced(name):
    apply, variables, inputs = network(name)
    sums = "zeroed" if name in FROZEN else "frozen"
    return groups.trace(apply, variables, *inputs, sums=sums)


@pytest.mark.parametrize("name", NETWORKS)
def test_share_left_at_half_of_the_channels(name):
    best = REACH.best_share(NETWORKS[name])
    assert REACH.share_left(traced(name)) <= min(best, LIMITS.get(name, best))


@pytest.mark.parametrize("name", FROZEN)
def test_share_left_where_sums_freeze(name):
    apply, variables, inputs = network(name)
    channels = groups.trace(apply, variables, *inputs)
    assert REACH.share_left(channels) <= FROZEN[name]


def in_float64(tree):
    def wide(leaf):
        is_float = np.issubdtype(np.result_type(leaf), np.inexact)
        return np.asarray(leaf, np.float64 if is_float else None)

    return jax.tree.map(wide, tree)


def without_channels(apply, channels, keep):
    """The function without its removed channels, at full shapes."""
    if any(group.zeroed for group in channels.groups.values()):
        return groups.masked(apply, channels, keep)
    return lambda v, *inputs: apply(groups.mask(v, channels, keep), *inputs)


def compare(name, seed, *, slopes=False):
    """Masked and compact results are equal but for the last digits of float64, and gradients."""
    apply, variables, inputs = network(name)
    channels = traced(name)
    keep = groups.random_keep(channels, jax.random.key(seed))
    masked = without_channels(apply, channels, keep)
    elastic = groups.elastic(apply, channels, keep)

    def loss(variables, function, inputs):
        results = function(variables, *inputs)
        flat, _ = jax.flatten_util.ravel_pytree(results)
        return jnp.sum(jnp.sin(flat)), results

    def both(variables, small, inputs):
        run = lambda *args: (None, loss(*args)[1])
        if slopes:
            run = jax.grad(loss, has_aux=True)
        return run(variables, masked, inputs), run(small, elastic, inputs)

    with jax.enable_x64(True):
        variables, inputs = in_float64((variables, inputs))
        small = groups.compact(variables, channels, keep)
        (of_full, full), (of_small, compact) = jit(both)(variables, small, inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(full))
    close(full, compact, 1e-12)
    if slopes:
        of_full = jax.tree.map(np.asarray, of_full)
        close(groups.compact(of_full, channels, keep), of_small, 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_compact(name):
    compare(name, 2, slopes=name in OPERATIONS)


@hypothesis.given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 1000))
@hypothesis.settings(max_examples=4)
def test_any_channels(name, seed):
    compare(name, seed)


def test_the_table_has_a_row_per_network_and_says_what_is_absent(capsys, monkeypatch):
    def missing():
        raise ImportError("No module named 'nothing'")

    monkeypatch.setitem(REACH.SOURCES, "haiku", missing)
    REACH.main(["tests", "haiku"], "tied.*")
    *_, row, empty, absent = capsys.readouterr().out.splitlines()
    name, parameters, left, zeroed, best, *seconds, difference = row.strip("| ").split(" | ")
    assert (name, parameters, left) == ("tied embedding", "704", best)
    assert zeroed == left
    assert min(map(float, seconds)) >= 0
    assert float(difference) < 1e-5
    assert not empty
    assert "haiku" in absent
