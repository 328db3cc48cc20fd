"""Training without the removed channels, in any framework: parameters, statistics and the state of
the optimizer are those of training the masked network.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, jit, lax
from numpy.testing import assert_allclose

from sparsity_jax import groups, trees

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(7, 5))
TARGETS = RANDOM.normal(size=(7, 3))


class Network(NamedTuple):
    """A network in training, whose state is declared where it cannot be recognised."""

    start: Any  # its variables
    train: Any  # train(variables, x) -> (logits, state)
    declared: Any = None
    parts: Any = tuple  # of variables, (params, state)
    variables: Any = lambda params, state: (params, state)


def doubled(variables):
    """Flax keeps statistics in float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), variables)


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, param_dtype=float)(x)
            x = nn.BatchNorm(use_running_average=False, momentum=0.9, param_dtype=float)(x)
            return nn.Dense(3, param_dtype=float)(nn.relu(x))

    model = Net()
    train = functools.partial(model.apply, mutable=["batch_stats"])

    def parts(variables):
        statistics = variables["batch_stats"]
        return variables["params"], dict(batch_stats=statistics)

    variables = lambda params, state: dict(params=params, **state)
    return Network(doubled(model.init(KEY, X)), train, None, parts, variables)


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(5, 8, rngs=rngs, param_dtype=float)
        self.norm = nnx.BatchNorm(8, rngs=rngs, param_dtype=float, momentum=0.9)
        self.outer = nnx.Linear(8, 3, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return self.outer(nnx.relu(self.norm(self.inner(x))))


def of_nnx():
    graph, *start = nnx.split(NNXNet(), nnx.Param, nnx.BatchStat)

    def train(variables, x):
        model = nnx.merge(graph, *variables, copy=True)
        logits = model(x)
        return logits, nnx.state(model, nnx.BatchStat)

    return Network(doubled(tuple(start)), train)


class EquinoxNet(eqx.Module):
    inner: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    outer: eqx.nn.Linear

    def __init__(self, mode):
        self.inner = eqx.nn.Linear(5, 8, key=KEY, dtype=float)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode=mode, dtype=float)
        self.outer = eqx.nn.Linear(8, 3, key=KEY, dtype=float)

    def __call__(self, x, state):
        x, state = self.norm(self.inner(x), state)
        return self.outer(jax.nn.relu(x)), state


def of_equinox(mode):
    model, state = eqx.nn.make_with_state(EquinoxNet)(mode)
    params, static = eqx.partition(model, eqx.is_array)

    def train(variables, x):
        params, state = variables
        model = eqx.combine(params, static)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return run(x, state)

    return Network((params, state), train, {"1": "1"})


def normalised(x, mean, variance, scale, shift):
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale + shift


def moving_average(state, value):
    """The new average is not made from that before."""
    counter = state["counter"] + 1
    hidden = 0.9 * state["hidden"] + 0.1 * value
    return dict(counter=counter, hidden=hidden, average=hidden / (1 - 0.9**counter))


def like_haiku():
    linear = lambda *shape: dict(w=RANDOM.normal(size=shape), b=RANDOM.normal(size=shape[1]))
    norm = dict(scale=np.ones(8), offset=np.zeros(8))
    params = {"net/linear": linear(5, 8), "net/norm": norm, "net/logits": linear(8, 3)}
    average = dict(counter=np.zeros((), int), hidden=np.zeros(8), average=np.zeros(8))
    state = {"net/norm/~/mean_ema": average, "net/norm/~/var_ema": average}

    def train(variables, x):
        params, state = variables
        x = x @ params["net/linear"]["w"] + params["net/linear"]["b"]
        now = (x.mean(0), x.var(0))
        new = {path: moving_average(state[path], value) for path, value in zip(state, now)}
        norm = params["net/norm"]
        x = jax.nn.relu(normalised(x, *now, norm["scale"], norm["offset"]))
        return x @ params["net/logits"]["w"] + params["net/logits"]["b"], new

    return Network((params, state), train)


def like_keras():
    """Two lists of variables, the last of which is a seed."""
    params = [RANDOM.normal(size=(5, 8)), np.ones(8), np.zeros(8), RANDOM.normal(size=(8, 3))]
    state = [np.zeros(8), np.ones(8), np.zeros(2, np.uint32)]

    def train(variables, x):
        kernel, scale, shift, last = variables["trainable"]
        mean, variance, seed = variables["others"]
        x = x @ kernel
        now = (x.mean(0), x.var(0))
        x = jax.nn.relu(normalised(x, *now, scale, shift))
        return x @ last, [0.9 * mean + 0.1 * now[0], 0.9 * variance + 0.1 * now[1], seed + 1]

    parts = lambda variables: (dict(trainable=variables["trainable"]), variables["others"])
    variables = lambda params, state: dict(params, others=state)
    start = dict(trainable=params, others=state)
    return Network(start, train, {"1": "others"}, parts, variables)


NETWORKS = {
    "linen": linen,
    "nnx": of_nnx,
    "equinox, moving averages": functools.partial(of_equinox, "ema"),
    "equinox, averages of batches": functools.partial(of_equinox, "batch"),
    "like haiku": like_haiku,
    "like keras": like_keras,
}
# of slopes that are zero but for rounding, a smaller eps would make steps
OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-2), optax.adam(0.1, eps=1e-3))


def trained(network, run, restrict, variables):
    """All that training renews, after three steps."""

    def loss(params, state):
        logits, state = run(network.variables(params, state), X)
        return jnp.mean((logits - TARGETS) ** 2), state

    @jit
    def step(variables, opt_state):
        params, state = network.parts(variables)
        slopes, state = jax.grad(loss, has_aux=True)(params, state)
        updates, opt_state = OPTIMIZER.update(slopes, opt_state, params)
        params = restrict(optax.apply_updates(params, updates))
        return network.variables(params, state), opt_state

    params, _ = network.parts(variables)
    opt_state = OPTIMIZER.init(params)
    for _ in range(3):
        variables, opt_state = step(variables, opt_state)
    return variables, opt_state


def equal(tree, other):
    leaves = jax.tree.leaves(tree)
    scale = max(np.max(np.abs(leaf)) for leaf in leaves)
    for first, second in zip(leaves, jax.tree.leaves(other), strict=True):
        assert first.dtype == second.dtype
        assert_allclose(first, second, rtol=0, atol=1e-12 * float(scale))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", NETWORKS)
def test_training_equals_training_of_the_masked_network(name, double):
    network = NETWORKS[name]()
    variables = network.start
    channels = groups.trace(network.train, variables, X, state=network.declared)
    assert list(channels.sizes.values()) == [8]
    keep = {name: np.arange(8) % 3 > 0 for name in channels.names}
    mask = lambda tree: groups.mask(tree, channels, keep)
    compact = lambda tree: groups.compact(tree, channels, keep)
    elastic = groups.elastic(network.train, channels, keep)
    full = trained(network, network.train, mask, mask(variables))
    small = trained(network, elastic, lambda params: params, compact(variables))
    equal(compact(full[0]), small[0])
    equal(compact(full[1]), small[1])


def stepping():
    """A whole step of training with the optimizer of NNX."""
    network = NNXNet()
    optimizer = nnx.Optimizer(network, OPTIMIZER, wrt=nnx.Param)
    graph, variables = nnx.split((network, optimizer))

    def step(variables, x, targets):
        network, optimizer = nnx.merge(graph, variables, copy=True)
        loss = lambda network: jnp.mean((network(x) - targets) ** 2)
        value, slopes = nnx.value_and_grad(loss)(network)
        optimizer.update(network, slopes)
        return value, nnx.state((network, optimizer))

    return step, doubled(variables)


def test_a_whole_step_loses_channels_of_all_that_it_renews(double):
    step, variables = stepping()
    channels = groups.trace(step, variables, X, TARGETS)
    assert channels.state == {"1": ""}
    keep = {name: np.arange(8) % 3 > 0 for name in channels.names}
    small = groups.compact(variables, channels, keep)
    masked = groups.mask(variables, channels, keep)
    run = jit(groups.elastic(step, channels, keep))
    for _ in range(3):
        value, masked = jit(step)(masked, X, TARGETS)
        masked = groups.mask(masked, channels, keep)
        small_value, small = run(small, X, TARGETS)
    equal((value, groups.compact(masked, channels, keep)), (small_value, small))
    assert groups.check(step, variables, channels, X, TARGETS, key=KEY) < 1e-10


def test_a_function_that_uses_fewer_variables_runs_with_the_channels_of_training(double):
    """In inference, the hidden part of an average as that of Haiku has no use."""
    network = like_haiku()
    channels = groups.trace(network.train, network.start, X)
    keep = {name: np.arange(8) % 3 > 0 for name in channels.names}

    def infer(variables, x):
        params, state = variables
        x = x @ params["net/linear"]["w"] + params["net/linear"]["b"]
        now = (average["average"] for average in state.values())
        norm = params["net/norm"]
        x = jax.nn.relu(normalised(x, *now, norm["scale"], norm["offset"]))
        return x @ params["net/logits"]["w"] + params["net/logits"]["b"]

    small = groups.compact(network.start, channels, keep)
    masked = infer(groups.mask(network.start, channels, keep), X)
    equal(masked, groups.elastic(infer, channels, keep)(small, X))
    inference = groups.trace(infer, network.start, X)
    small = groups.compact(network.start, inference, keep)
    with pytest.raises(ValueError, match="other channel groups"):
        groups.elastic(network.train, inference, keep)(small, X)


@pytest.mark.parametrize(("name", "batch"), [("nnx", "batch"), ("equinox, moving averages", "4")])
def test_steps_are_exported_with_variables_by_path(name, batch, double):
    """`jax.export` knows the containers of neither framework."""
    network = NETWORKS[name]()
    channels = groups.trace(network.train, network.start, X, state=network.declared)
    keep = {name: np.arange(8) % 3 > 0 for name in channels.names}
    compact = lambda variables: groups.compact(variables, channels, keep)
    run = groups.elastic(network.train, channels, keep)
    by_path = jit(lambda arrays, x: trees.named_leaves(run(arrays, x)))
    arrays = trees.named_leaves(compact(network.start))
    inputs = jax.ShapeDtypeStruct((*export.symbolic_shape(batch), 5), X.dtype)
    program = export.export(by_path)(arrays, inputs).serialize()
    found = export.deserialize(program).call(arrays, X[:4])
    params, state = network.parts(groups.mask(network.start, channels, keep))
    logits, state = network.train(network.variables(params, state), X[:4])
    _, state = network.parts(compact(network.variables(params, state)))
    expected = trees.named_leaves((logits, state))
    equal(expected, found)


# Which results are new values --------------------------------------------------------------------

WEIGHTS = dict(a=RANDOM.normal(size=(5, 8)), out=RANDOM.normal(size=(8, 3)))
STATISTICS = dict(mean=np.zeros(8), var=np.ones(8))
START = dict(params=WEIGHTS, state=STATISTICS)


def statistics(variables, x, momentum=0.9):
    x = x @ variables["params"]["a"]
    now = dict(mean=x.mean(0), var=x.var(0))
    logits = jnp.tanh(x - now["mean"]) @ variables["params"]["out"]
    mix = lambda old, new: momentum * old + (1 - momentum) * new
    return logits, jax.tree.map(mix, variables["state"], now)


def forgetful(variables, x):
    """Its statistics have no memory."""
    x = x @ variables["params"]["a"]
    return jnp.tanh(x) @ variables["params"]["out"], dict(mean=x.mean(0), var=x.var(0))


def smaller(function, variables, channels):
    """Shapes of the results without every third channel."""
    keep = {name: np.arange(size) % 3 > 0 for name, size in channels.sizes.items()}
    small = groups.compact(variables, channels, keep)
    results = groups.elastic(function, channels, keep)(small, X)
    return jax.tree.map(np.shape, results)


def test_new_values_are_recognised_and_told():
    channels = groups.trace(statistics, START, X)
    assert channels.state == {"1": "state"}
    assert "1 of state" in groups.describe(channels)
    expected = (7, 3), dict(mean=(5,), var=(5,))
    assert smaller(statistics, START, channels) == expected
    infer = lambda variables, x: statistics(variables, x)[0]
    channels = groups.trace(infer, START, X)
    assert channels.state == {}
    assert smaller(infer, START, channels) == (7, 3)


def averaged(variables, x):
    """A second set of parameters follows the first."""
    params, slow = variables
    slow = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, slow, params)
    return jnp.tanh(x @ params["a"]) @ params["out"], slow


def crossed(variables, x):
    """New values that either of two sets of variables may have."""
    first, second = variables
    new = jax.tree.map(lambda one, other: one + jnp.sum(other), first, second)
    logits = jnp.tanh(x @ first["a"]) @ first["out"] + jnp.sin(x @ second["a"]) @ second["out"]
    return logits, new


def products(variables, x):
    """As many rows as the variables have."""
    first = x.T @ x @ variables[0]
    return [first, first @ variables[1]]


def narrow(variables, x):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float16), statistics(variables, x))


ALIKE = {  # function, variables, which results are recognised
    "several sets that lose the same": (averaged, (WEIGHTS, WEIGHTS), {"1": "0"}),
    "several sets that lose others": (crossed, (WEIGHTS, WEIGHTS), {}),
    "nothing to remember": (forgetful, START, {}),
    "numbers for names": (products, [np.eye(5), np.eye(5)], {}),
    "an array alone": (lambda variables, x: x.T @ x @ variables, np.eye(5), {}),
    "other types": (narrow, START, {}),
    "a part of the names": (lambda v, x: (x, dict(mean=v["state"]["mean"] + 1)), START, {}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_results_that_are_like_variables(name):
    function, variables, expected = ALIKE[name]
    assert groups.trace(function, variables, X).state == expected


def test_new_values_are_declared():
    assert groups.trace(statistics, START, X, state={}).groups == {}
    parts = {"1/mean": "state/mean", "1/var": "state/var"}
    for state in ("1", {"1": "state"}, parts):
        channels = groups.trace(forgetful, START, X, state=state)
        assert channels.sizes == {"params/a": 8}
        assert smaller(forgetful, START, channels) == ((7, 3), dict(mean=(5,), var=(5,)))


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("0", "state is '0'"),
        ("2", "the results '2'"),
        ("", "state is ''"),
        ({"2": "state"}, "results '2', of which there are none"),
        ({"1": "params"}, "'params/mean', which is no variable"),
        ({"1/mean": "params/a"}, r"shape \(8,\); allowed: that of the variable, \(5, 8\)"),
    ],
)
def test_wrong_state_is_refused(state, told):
    with pytest.raises(ValueError, match=told):
        groups.trace(statistics, START, X, state=state)
