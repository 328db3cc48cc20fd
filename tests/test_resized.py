"""A walk at other sizes of the inputs: what another walk would find, or none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import NETWORKS

from sparsity_jax import groups
from sparsity_jax.channels import resized

NAMES = ["densenet", "vit", "lstm", "gpt2", "llama", "t5", "swin", "scanned layers", "quantised"]
V = {"a": np.ones((3, 4), np.float32), "b": np.ones((4, 2), np.float32)}
X = np.ones((2, 3), np.float32)


def doubled(inputs):
    return jax.tree.map(lambda x: np.concatenate([x, x]), inputs)


def programs(program):
    yield program
    for inner in program.inner:
        for own in inner:
            yield from programs(own)


def shapes(walk, alive):
    """Of all variables of all equations, without removed entries."""
    found = []
    for program in programs(walk.program):
        for eqn, _ in program.equations():
            values = program.known((*eqn.invars, *eqn.outvars))
            found.append((eqn.primitive, *map(alive.shape, values)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_are_known_without_a_walk(name):
    apply, variables, inputs = NETWORKS[name]()
    channels = groups.trace(apply, variables, *inputs)
    larger = doubled(inputs)
    walk = resized.walked_like(channels.walked, jax.make_jaxpr(apply)(variables, *larger))
    anew = groups.trace(apply, variables, *larger)
    keep = groups.random_keep(channels, jax.random.key(3))
    assert shapes(walk, channels.alive(keep)) == shapes(anew.walked, anew.alive(keep))


OTHERS = {  # what another walk may find something else for, at twice as many rows
    "other equations": lambda v, x: (jnp.tanh if len(x) < 3 else jnp.sin)(x @ v["a"]) @ v["b"],
    "rows among the channels": lambda v, x: (x @ v["a"]).reshape(-1) @ jnp.ones(x.shape[0] * 4),
    "a number below zero": lambda v, x: jnp.maximum(x @ v["a"], 3.0 - len(x)) @ v["b"],
    "another constant": lambda v, x: (x @ v["a"] + np.zeros(4) + len(x) - 2.0) @ v["b"],
    "another axis": lambda v, x: jnp.sum(x @ v["a"], int(len(x) < 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_programs_that_may_need_another_walk(name):
    function = OTHERS[name]
    channels = groups.trace(function, V, X)
    closed = jax.make_jaxpr(function)(V, doubled(X))
    assert resized.walked_like(channels.walked, closed) is None


def test_elastic_runs_at_other_sizes_without_a_walk(monkeypatch):
    function = lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"]
    channels = groups.trace(function, V, X)
    keep = {name: np.arange(4) < 3 for name in channels.names}
    elastic = groups.elastic(function, channels, keep)
    monkeypatch.delattr(groups.walk, "analyse")
    small = groups.compact(V, channels, keep)
    expected = function(groups.mask(V, channels, keep), doubled(X))
    np.testing.assert_allclose(elastic(small, doubled(X)), expected, rtol=1e-6)
