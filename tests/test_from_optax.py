"""Optimizers of optax by name: options, numbers, schedules, penalties and sets."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny
from numpy.testing import assert_allclose

from sparsity_jax import optim
from sparsity_jax.optim import from_optax

PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.ones(3)}
GRADS = jax.tree.map(jnp.cos, PARAMS)
OWN = ("sfw", "adagrad_sfw", "sgd")


@functools.partial(jax.jit, static_argnums=0)
def run(tx):
    """The weights after some steps along the same gradients, and the optimizer's state."""
    state = tx.init(PARAMS)
    params = PARAMS
    for _ in range(3):
        updates, state = tx.update(GRADS, state, params, value=jnp.ones(()))
        params = optax.apply_updates(params, updates)
    return params, state


def of(config: dict, epochs: int = 3):
    """The transformation of an optimizer config, one step per epoch."""
    recipe = optim.check_config(config)
    return optim.make(recipe, optim.numbers(recipe, PARAMS, None), epochs, 1)


@pytest.mark.parametrize("name", sorted({*optim.OPTIMIZERS} - {*OWN}))
def test_each_is_traced_with_all_its_numbers_and_names_its_rate(name):
    recipe = optim.check_config(optim.settings(name, learning_rate=0.25))

    def step(values):
        tx = optim.make(recipe, values, 2, 3)
        before = tx.init(PARAMS)
        _, after = tx.update(GRADS, before, PARAMS, value=jnp.ones(()))
        return before, after, optim.learning_rate(after)

    before, after, rate = jax.eval_shape(step, optim.numbers(recipe, PARAMS, None))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.leaves(before) == jax.tree.leaves(after)  # shapes and types
    assert rate.shape == ()


def test_numbers_and_schedules_are_those_of_optax():
    config = optim.settings(
        "adamw",
        learning_rate=0.1,
        weight_decay=0.5,
        b1=0.8,
        schedule=dict(name="multistep", milestones=(2,), gamma=0.5),
    )
    rate = optax.piecewise_constant_schedule(0.1, {2: 0.5})
    by_name, state = run(of(config))
    by_hand, _ = run(optax.adamw(rate, weight_decay=0.5, b1=0.8))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), by_name, by_hand)
    assert float(optim.learning_rate(state)) == pytest.approx(0.05)


def test_penalties_and_sets_act_as_with_the_own_ones():
    penalty = dict(name="l2", strength=0.1)
    by_name, _ = run(of(optim.settings("lion", learning_rate=0.01, penalty=penalty)))
    by_hand, _ = run(optax.chain(optim.add_l2(0.1), optax.lion(0.01)))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), by_name, by_hand)
    ball = dict(name="l2", tau=0.5)
    inside, _ = run(of(optim.settings("adam", learning_rate=0.1, constraint=ball)))
    assert optax.tree.norm(inside["w"]) <= 0.5 + 1e-6


def test_a_program_is_shared_by_those_that_differ_in_numbers():
    first, second, other = (
        optim.check_config(optim.settings("adamw", **options))
        for options in (dict(b1=0.5), dict(weight_decay=0.5), dict(nesterov=True))
    )
    assert optim.program(first) == optim.program(second) != optim.program(other)


def test_mistakes_are_told_as_always():
    with tiny.refused("name", "admw", closest="adamw"):
        optim.check_config(dict(name="admw"))
    with tiny.refused("", "weight_deca", closest="weight_decay"):
        optim.check_config(dict(name="adamw", weight_deca=0.1))
    with tiny.refused("b1", "high", allowed="float"):
        optim.check_config(dict(name="adamw", b1="high"))
    with tiny.refused("", "mask"):  # a function is no plain data
        optim.check_config(dict(name="adamw", mask=None))
    assert "muon" in from_optax.optimizers()
