"""The library's transformations in other people's loops: optax's wrappers, Flax NNX, meshes, other float types."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsity_jax import optim, polytopes, trees

PARAMS = {"a": {"kernel": jnp.linspace(-0.4, 0.4, 6).reshape(2, 3)}, "b": jnp.array([0.3, -0.1])}
GRADS = jax.tree.map(lambda p: jnp.cos(7 * p), PARAMS)
EVERYWHERE = jax.tree.map(lambda _: True, PARAMS)
WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1e6)), ("descend", tx)),
    "partition": lambda tx: optax.partition({"all": tx}, jax.tree.map(lambda _: "all", PARAMS)),
    "masked": lambda tx: optax.masked(tx, EVERYWHERE),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def run(tx, steps=4, params=PARAMS, grads=GRADS):
    """(params, state) after some steps with the same gradient."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params, value=jnp.ones(()))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# Rates ---------------------------------------------------------------------------------------------------------------

SCHEDULE = optax.linear_schedule(0.8, 0.0, 8)
INJECTED = {
    "a number": (optax.inject_hyperparams(optax.sgd)(0.3, momentum=0.9), [0.3] * 4),
    "a schedule": (optax.inject_hyperparams(optax.sgd)(SCHEDULE), [0.8, 0.7, 0.6, 0.5]),
    "a schedule of its own": (optim.sgd(SCHEDULE), [0.8, 0.7, 0.6, 0.5]),
    "its own, injected": (optax.inject_hyperparams(optim.sgd)(SCHEDULE), [0.8, 0.7, 0.6, 0.5]),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("injected", INJECTED)
def test_the_rate_is_found_in_every_wrapper(wrapper, injected):
    inner, rates = INJECTED[injected]
    tx = WRAPPERS[wrapper](inner)
    steps = 4 if wrapper == "MultiSteps" else 2
    _, state = run(tx, steps)
    np.testing.assert_allclose(optim.learning_rate(state), rates[1], rtol=1e-6)
    _, state = run(optim.choose(0, [tx]), steps)
    np.testing.assert_allclose(optim.learning_rate(state), rates[1], rtol=1e-6)


class Names(NamedTuple):
    learning_rate: jax.Array
    w: jax.Array


@pytest.mark.parametrize("make", [dict, Names])
def test_a_parameter_called_learning_rate_is_no_rate(make):
    params = make(learning_rate=jnp.ones(3), w=jnp.ones(2))
    state = optax.sgd(0.1, momentum=0.9).init(params)
    assert optim.learning_rate(state) is None
    state = optim.sgd(0.1).init(params)
    assert optim.learning_rate(state).shape == ()
    with pytest.raises(ValueError, match="learning_rate="):
        run(optim.proximal_l1(optax.sgd(0.1, momentum=0.9), 0.1), 1, params, params)


@pytest.mark.parametrize(
    "inner", [optax.sgd(SCHEDULE), optax.chain(optim.sgd(0.1), optim.sgd(0.2))], ids=["none", "several"]
)
def test_no_rate_and_several_are_refused(inner):
    with pytest.raises(ValueError, match="learning_rate="):
        run(optim.proximal_l1(inner, 0.1), 1)


# Trees of sets and strengths -----------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.fc = nnx.Linear(4, 2, rngs=nnx.Rngs(1))


BALL = polytopes.LpBall(0.5, float("inf"))  # cheap to compile
OF_TREES = {
    "sfw": (lambda tree: optim.sfw(0.1, tree), BALL),
    "adagrad_sfw": (lambda tree: optim.adagrad_sfw(0.1, tree), BALL),
    "projected": (lambda tree: optim.sgd(0.1, tree), BALL),
    "add_l1": (lambda tree: optax.chain(optim.add_l1(tree), optax.sgd(0.1)), 0.2),
    "add_l2": (lambda tree: optax.chain(optim.add_l2(tree), optax.sgd(0.1)), 0.2),
    "proximal_l1": (lambda tree: optim.proximal_l1(optim.sgd(0.1), tree), 0.2),
}


@pytest.mark.parametrize("name", OF_TREES)
def test_trees_of_nnx_states_mean_their_arrays(name):
    """`nnx.Optimizer` shows wrapped arrays at first, bare ones later; trees of either kind fit both."""
    make, entry = OF_TREES[name]
    results = []
    for tree in (nnx.state(Net(), nnx.Param), nnx.to_pure_dict(nnx.state(Net(), nnx.Param)), None):
        net = Net()
        given = entry if tree is None else jax.tree.map(lambda _: entry, tree)
        optimizer = nnx.Optimizer(net, make(given), wrt=nnx.Param)
        optimizer.update(net, jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param)))
        results.append(jax.tree.leaves(nnx.to_pure_dict(nnx.state(net, nnx.Param))))
    for other in results[:2]:
        jax.tree.map(np.testing.assert_array_equal, other, results[2])


@pytest.mark.parametrize("name", OF_TREES)
def test_trees_serve_what_a_mask_shows(name):
    make, entry = OF_TREES[name]
    whole = jax.tree.map(lambda _: entry, PARAMS)
    mask = {"a": {"kernel": True}, "b": False}
    masked, _ = run(optax.masked(make(whole), mask), 2)
    alone, _ = run(make(entry), 2, PARAMS["a"], GRADS["a"])
    np.testing.assert_array_equal(masked["a"]["kernel"], alone["kernel"])


@pytest.mark.parametrize("name", OF_TREES)
def test_a_tree_of_other_paths_is_refused(name):
    make, entry = OF_TREES[name]
    for tree, path in (({"a": {"kernel": entry}}, "'b'"), ({"a": {"kernel": entry}, "b": entry, "c": entry}, "'c'")):
        with pytest.raises(ValueError, match=path) as error:
            run(make(tree), 1)
        assert "PyTreeDef" not in str(error.value)


def test_plain_paths_drop_the_wrapper_of_nnx():
    state = nnx.state(Net(), nnx.Param)
    assert list(trees.plain_leaves(state)) == list(trees.named_leaves(nnx.to_pure_dict(state)))
    assert "value" in trees.plain_leaves({"value": 1.0})  # an entry of a dict is no wrapper
