"""Pruning on a schedule inside an optimizer: against a loop by hand, and in other loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import allocate, masks, optim
from sparsity_jax.optim import PruningSchedule

TARGET = {
    "a": {"kernel": jnp.sin(jnp.arange(24.0)).reshape(4, 6), "bias": jnp.cos(jnp.arange(6.0))},
    "b": {"kernel": jnp.cos(3 * jnp.arange(12.0)).reshape(6, 2)},
}
# the largest become the smallest: they pass through zero while pruned ones would grow
START = jax.tree.map(lambda w: 1.5 - 1.5 * jnp.abs(w), TARGET)


def slopes(params):
    """The gradient of half the squared distance to the target, which all weights move towards."""
    return jax.tree.map(jnp.subtract, params, TARGET)


def trained(tx, start=START, steps=8):
    """(params, masks) after every step."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(slopes(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optim.masks_of(state))

    return jax.lax.scan(step, (start, tx.init(start)), None, steps)[1]


def by_hand(schedule, selection, rate, momentum, steps=8):
    """The same with NumPy: momentum of masked gradients, and after it the smallest weights are
    zeroed for good.
    """
    params = {path: np.array(w) for path, w in flat(START).items()}
    target = {path: np.array(w) for path, w in flat(TARGET).items()}
    kept = {path: np.ones(w.shape, bool) for path, w in params.items()}
    buffers = {path: np.zeros_like(w) for path, w in params.items()}
    for step in range(steps):
        for path, w in params.items():
            slope = np.where(kept[path], w - target[path], 0)
            buffers[path] = momentum * buffers[path] + slope
            params[path] = np.where(kept[path], w - np.float32(rate) * buffers[path], 0)
        if step in schedule.steps:
            ratio = schedule.ratios[schedule.steps.index(step)]
            counts = allocate.keep_counts(START, ratio, selection=selection)
            kernels = ["a/kernel", "b/kernel"]
            compared = [(kernels, counts)]
            if selection == "layerwise":
                compared = [([path], counts[path]) for path in kernels]
            for paths, count in compared:
                sizes = np.concatenate([np.abs(params[path]).ravel() for path in paths])
                alive = np.concatenate([kept[path].ravel() for path in paths])
                order = np.argsort(np.where(alive, -sizes, 1), kind="stable")
                chosen = np.isin(np.arange(sizes.size), order[:count])
                for path in paths:
                    size = kept[path].size
                    kept[path] = chosen[:size].reshape(kept[path].shape)
                    chosen = chosen[size:]
        params = {path: np.where(kept[path], w, 0) for path, w in params.items()}
        yield {path: w.copy() for path, w in params.items()}, dict(kept)


def flat(tree):
    return {"/".join(key.key for key in path): x for path, x in jax.tree.leaves_with_path(tree)}


SCHEDULES = [
    (PruningSchedule.at(range(7), lambda step: 0.5 + 0.02 * step), "global"),
    (PruningSchedule.cubic(0.5, begin=2, end=6, every=3), "layerwise"),
    (PruningSchedule.once(1.0, step=3), "global"),
]


@pytest.mark.parametrize(("schedule", "selection"), SCHEDULES)
def test_masked_training_equals_a_loop_by_hand(schedule, selection):
    tx = optim.pruned(optim.sgd(0.4, momentum=0.9), schedule, selection=selection)
    found, kept = jax.jit(lambda: trained(tx))()
    for step, (params, own) in enumerate(by_hand(schedule, selection, 0.4, 0.9)):
        for path, w in flat(found).items():
            assert_array_equal(flat(kept)[path][step], own[path])
            assert_allclose(w[step], params[path], rtol=1e-5, atol=1e-6)
            assert not np.any(np.where(own[path], 0, w[step]))


def test_kept_weights_are_as_many_as_the_ratios_say():
    """Whatever the inner optimizer and the selection, also where removed weights would move."""
    schedule = PruningSchedule.at((1, 4), lambda step: {1: 0.3, 4: 0.77}[step])
    key = jax.random.key(0)
    for inner, own in (
        (optax.adamw(0.1), dict(scope="all")),
        (optax.sgd(0.1), dict(selection="random", key=key, exclude="b/.*")),
        (optax.sgd(0.1), dict(selection="layerwise", layer_ratios="erk")),
    ):
        tx = optim.pruned(inner, schedule, **own)
        params, kept = jax.jit(trained, static_argnums=0)(tx)
        own.pop("key", None)
        for step, ratio in ((0, 0.0), (1, 0.3), (3, 0.3), (4, 0.77), (7, 0.77)):
            counts = allocate.keep_counts(START, ratio, **own)
            masked = jax.tree.map(lambda leaf, step=step: leaf[step], kept)
            assert int(allocate.left_by(masked, **own)[0]) == sum(jax.tree.leaves(counts))
        check_zeros(params, kept)


def check_zeros(params, kept):
    """What is not kept is exactly zero."""
    removed = masks.apply(params, jax.tree.map(jnp.logical_not, kept))
    assert not any(jnp.any(w) for w in jax.tree.leaves(removed))
    assert 0 < masks.sparsity(kept) < 1


def test_the_optimizer_sees_no_gradients_of_pruned_weights():
    tx = optim.pruned(optax.trace(0.0), 0.5)
    update = jax.jit(tx.update)
    _, first = update(START, tx.init(START), START)
    _, second = update(START, first, START)
    seen = optax.tree.get(second, "trace")
    jax.tree.map(assert_array_equal, seen, masks.apply(START, optim.masks_of(first)))


def test_members_side_by_side_are_as_alone():
    starts = jax.tree.map(lambda w: jnp.stack([w, w[::-1], -2 * w]), START)
    tx = optim.pruned(optax.adam(0.1), PruningSchedule.cubic(0.8, end=4, every=2))
    alone = jax.jit(lambda start: trained(tx, start))
    together = jax.jit(jax.vmap(lambda start: trained(tx, start)))(starts)
    for i in range(3):
        own = alone(jax.tree.map(lambda w, i=i: w[i], starts))
        at = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-6, atol=1e-7), at, own)


def test_narrow_weights_become_exactly_zero():
    start = jax.tree.map(lambda w: w.astype(jnp.bfloat16), START)
    tx = optim.pruned(optax.sgd(0.1), 0.5)
    check_zeros(*jax.jit(trained, static_argnums=0)(tx, start))


class Net(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.fc = nnx.Linear(4, 2, rngs=nnx.Rngs(1))


def test_networks_of_nnx_and_equinox_are_pruned():
    net = Net()
    tx = optim.pruned(optax.sgd(0.1), 0.5, selection="layerwise")
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    nnx.jit(lambda optimizer, net: optimizer.update(net, nnx.state(net, nnx.Param)))(optimizer, net)
    optim.check(optimizer.opt_state)
    assert jnp.sum(net.hidden.kernel[...] == 0) == 6
    kept = optim.masks_of(optimizer.opt_state)
    assert sum(jnp.sum(mask) for mask in jax.tree.leaves(kept)) == 6 + 4 + 4 + 2
    params, _ = eqx.partition(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jnp.sum((params.layers[0].weight + updates.layers[0].weight) == 0) == 6


def test_schedules_say_when_and_how_much():
    assert PruningSchedule.once(0.5, step=3) == ((3,), (0.5,))
    cubic = PruningSchedule.cubic(0.8, begin=2, end=9, every=3, first=0.1)
    assert cubic.steps == (2, 5, 8, 9)
    assert_allclose(cubic.ratios, [0.8 - 0.7 * (left / 7) ** 3 for left in (7, 4, 1, 0)])


def test_what_cannot_work_is_refused():
    with tiny.complains(r"ratios\[0\] is 1.5; allowed: "):
        optim.pruned(optax.sgd(0.1), 1.5)
    with tiny.complains("never fall"):
        PruningSchedule.at((0, 1), lambda step: 0.5 - 0.1 * step)
    with tiny.complains("steps is .*each above"):
        PruningSchedule.at((3, 3), lambda _: 0.5)
    with tiny.complains(r"end is 5; allowed: above begin \(5\)"):
        PruningSchedule.cubic(0.5, begin=5, end=5)
    with pytest.raises(ValueError, match=r"optim\.pruned"):
        optim.masks_of(optax.sgd(0.1).init(START))
    tx = optim.pruned(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match="params"):
        tx.update(START, tx.init(START))
    assert masks.sparsity(optim.masks_of(tx.init(START))) == 0
