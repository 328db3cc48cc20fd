"""Networks of other frameworks behave like those of the library: one small network in each, with
batch norm, dropout and weights that a seed decides.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_allclose

from sparsity_jax import groups, models

IMAGES = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 5, rngs=rngs)])
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.layers[0](x.reshape(len(x), -1)))
        return self.fc(self.dropout(jax.nn.relu(x)))


class Equinox(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    fc: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(16, 5, key=first), jax.nn.relu]
        self.norm = eqx.nn.BatchNorm(5, "batch", momentum=0.9, mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.fc = eqx.nn.Linear(5, 3, key=second)

    def __call__(self, x, state, key):
        linear, relu = self.layers
        x, state = self.norm(linear(x.ravel()), state)
        return self.fc(self.dropout(relu(x), key=key)), state


def init(key, images):
    first, second = jax.random.split(key)
    weights = (0.3 * jax.random.normal(first, (images[0].size, 5)), jnp.zeros(5))
    out = {"kernel": 0.3 * jax.random.normal(second, (5, 3))}
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    return {"params": [weights, out], "batch_stats": [stats]}


def apply(variables, images, train, key):
    (weight, bias), out = variables["params"]
    (stats,) = variables["batch_stats"]
    x = images.reshape(len(images), -1) @ weight + bias
    if train:
        now = {"mean": x.mean(0), "var": x.var(0)}
        stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, now)
        x = (x - now["mean"]) / jnp.sqrt(now["var"] + 1e-5)
        x = x * jax.random.bernoulli(key, 0.5, x.shape) * 2
    else:
        x = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
    return jax.nn.relu(x) @ out["kernel"], [stats]


MADE = {
    "nnx": lambda num_classes, settings: lambda key: Nnx(nnx.Rngs(key)),
    "equinox": lambda num_classes, settings: Equinox,
    "pair": lambda num_classes, settings: (init, apply),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, factory in MADE.items():
        monkeypatch.setitem(models.MODELS, name, factory)


@pytest.mark.parametrize("name", MADE)
def test_any_framework(name):
    model = models.build(name=name, num_classes=3)
    variables, other = (model.init(jax.random.key(seed), IMAGES) for seed in (0, 1))
    assert {type(part) for part in variables.values()} == {dict}
    assert all(type(part) is dict for part in variables["params"].values())
    different = jax.tree.map(
        lambda a, b: bool((a != b).any()), *(v["params"] for v in (variables, other))
    )
    assert any(jax.tree.leaves(different)), "a seed decides"
    tiny.same(variables, model.init(jax.random.key(0), IMAGES))
    assert len(jax.tree.leaves(variables["batch_stats"])) >= 2

    apply, train = jax.jit(model.apply), jax.jit(model.apply_train)
    logits = apply(variables, IMAGES)
    assert logits.shape == (6, 3)
    assert_allclose(apply(variables, IMAGES[:2]), logits[:2], rtol=1e-4, atol=1e-5)
    first, stats = train(variables, IMAGES, jax.random.key(2))
    second, _ = train(variables, IMAGES, jax.random.key(3))
    assert not jnp.allclose(first, second), "dropout has another key"
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables["batch_stats"])
    assert any(jax.tree.leaves(moved))
    after = apply({**variables, "batch_stats": stats}, IMAGES)
    assert not jnp.allclose(after, logits), "running statistics count"
    grads = jax.grad(
        lambda params: model.apply({**variables, "params": params}, IMAGES)[:, 0].sum()
    )
    assert all(leaf.any() for leaf in jax.tree.leaves(grads(variables["params"])) if leaf.ndim > 1)
    channels = groups.trace(model.apply, variables, IMAGES)
    assert 5 in channels.sizes.values(), "hidden units can be removed"


def test_what_is_no_network_is_refused_in_one_sentence(monkeypatch):
    for network in (3, Nnx(nnx.Rngs(0)), Equinox(jax.random.key(0))):
        monkeypatch.setitem(models.MODELS, "mine", lambda *_, network=network: network)
        with tiny.refused("the model", type(network).__name__, allowed="a function of a key"):
            models.build(name="mine", num_classes=3)
    monkeypatch.setitem(models.MODELS, "mine", lambda *_: lambda key: key)
    with tiny.refused("the model", allowed="Equinox"):
        models.build(name="mine", num_classes=3).init(jax.random.key(0), IMAGES)
    monkeypatch.setitem(models.MODELS, "mine", lambda *_: (lambda key, images: [key], apply))
    with tiny.refused("init(key, images)", allowed="'params'"):
        models.build(name="mine", num_classes=3).init(jax.random.key(0), IMAGES)


def test_variables_of_other_kinds_are_named():
    class Counts(nnx.Module):
        def __init__(self, rngs):
            self.calls = nnx.Variable(jnp.zeros(()))

    with tiny.refused("the model", "calls", allowed="nnx.BatchStat"):
        models.frameworks.functions_of(lambda key: Counts(nnx.Rngs(key))).init(
            jax.random.key(0), IMAGES
        )
