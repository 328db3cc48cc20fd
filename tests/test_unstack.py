"""Layers of a scan with channels of their own: the same values and gradients as the scan, groups
counted by hand, masked networks equal compact ones.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, jit, lax
from jax.extend import core
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import groups, trees

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(7, 5))
TIMES = RANDOM.normal(size=(4, 7, 5))
LAYERS = 3


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


class Network(NamedTuple):
    """A function that scans over layers, and the sizes of its groups once they are apart."""

    apply: Any
    variables: Any
    inputs: tuple
    sizes: tuple
    axis: int = 0  # of layers, in results that are new values of variables


def doubled(variables):
    """Flax keeps statistics in float32."""

    def wide(leaf):
        return leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(wide, variables)


# Networks ----------------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.relu(nn.Dense(8, name="up", param_dtype=float)(x))
        hidden = nn.BatchNorm(use_running_average=False, param_dtype=float, name="norm")(hidden)
        hidden = nn.Dropout(0.5, deterministic=False)(hidden)
        return x + nn.Dense(5, name="down", param_dtype=float)(hidden), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": self.axis, "batch_stats": self.axis},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, None)
        return x


def linen(axis):
    """Training with dropout, statistics and rematerialisation."""
    model = Scanned(axis)
    variables = model.init({"params": KEY, "dropout": KEY}, X)

    def train(variables, x, key):
        return model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})

    return Network(train, doubled(variables), (X, jax.random.key(1)), (8, 8, 8), axis)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 8, rngs=rngs, param_dtype=float)
        self.down = nnx.Linear(8, 5, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


def of_nnx():
    make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Layer))
    graph, variables = nnx.split(make(nnx.Rngs(0)))
    scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    apply = lambda variables, x: scan(x, nnx.merge(graph, variables))
    return Network(apply, variables, (X,), (8, 8, 8))


def kernels(*shape):
    return RANDOM.normal(size=(LAYERS, *shape)) / np.sqrt(shape[0])


V = dict(up=kernels(5, 8), down=kernels(8, 5))


def layer(x, kernels):
    """A step over layers, with a result of each."""
    hidden = jax.nn.relu(x @ kernels["up"])
    return x + hidden @ kernels["down"], x.sum(1)


def backwards(v, x):
    x, sums = lax.scan(layer, x, v, reverse=True)
    return x, sums, sums.sum(0)


def cast(v, x):
    """Kernels of a lower precision, and a scale of each layer from a list."""
    v = jax.tree.map(lambda leaf: leaf.astype(jnp.float32).astype(float), v)
    scales = np.linspace(1, 2, LAYERS)

    def step(x, each):
        kernels, scale = each
        return layer(scale * x, kernels)

    return lax.scan(step, x, (v, scales))[0]


def recurrent(v, xs):
    """Layers inside of time."""

    def step(state, x):
        state, _ = lax.scan(layer, state + x, v)
        return jnp.tanh(state), state

    return lax.scan(step, jnp.zeros_like(xs[0]), xs)


def branches(v, x):
    """In a loop, a branch and a compiled function, with and without kernels."""
    through = lambda v, x: lax.scan(layer, x, v)[0]
    repeated = lambda v, x: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(jit(through)(v, x)), x)
    return lax.cond(x.sum() > 99, lambda v, x: 2 * x, repeated, v, x)


def partly(v, x):
    """Kernels that are read as they are, too, stay, and tie the others."""
    x, _ = lax.scan(layer, x, v)
    return x + jnp.tanh(v["down"]).sum()


NETWORKS = {
    "linen": functools.partial(linen, 0),
    "linen, second axis": functools.partial(linen, 1),
    "nnx": of_nnx,
    "backwards": lambda: Network(backwards, V, (X,), (8, 8, 8)),
    "cast": lambda: Network(cast, V, (X,), (8, 8, 8)),
    "recurrent": lambda: Network(recurrent, V, (TIMES,), (8, 8, 8)),
    "branches": lambda: Network(branches, V, (X,), (8, 8, 8)),
    "compiled": lambda: Network(jit(backwards), V, (X,), (8, 8, 8)),
    "partly": lambda: Network(partly, V, (X,), (8,)),
}


# What must hold ----------------------------------------------------------------------------------


def equal(tree, other):
    """Numbers of arrays, whatever structures hold them, to rounding."""
    for first, second in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert first.dtype == second.dtype
        assert_allclose(first, second, rtol=1e-12, atol=1e-12)


def stacked(tree, axis):
    """Arrays in place of lists."""
    is_list = lambda node: isinstance(node, list)
    join = lambda node: jnp.stack(node, axis) if is_list(node) else node
    return jax.tree.map(join, tree, is_leaf=is_list)


def slopes(apply, variables, inputs):
    """Of a sum over all results."""

    def loss(variables):
        results = jax.tree.leaves(apply(variables, *inputs))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in results)

    return jit(jax.grad(loss))(variables)


def keeps(channels):
    """Other channels, and another number of them, in every group."""
    keep = {}
    for number, (name, size) in enumerate(channels.sizes.items()):
        keep[name] = np.arange(size) % (number + 2) > 0
    return keep


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_those_of_the_scan(name, double):
    apply, variables, inputs, _, axis = NETWORKS[name]()
    layered = groups.unstacked(apply, variables, *inputs)
    assert jax.tree.structure(layered.restack(layered.variables)) == jax.tree.structure(variables)
    jax.tree.map(assert_array_equal, layered.restack(layered.variables), variables)
    expected = jit(apply)(variables, *inputs)
    equal(expected, stacked(jit(layered.apply)(layered.variables, *inputs), axis))
    found = layered.restack(slopes(layered.apply, layered.variables, inputs))
    equal(slopes(apply, variables, inputs), found)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_lose_channels_of_their_own(name, double):
    apply, variables, inputs, sizes, _ = NETWORKS[name]()
    apply, variables, _ = groups.unstacked(apply, variables, *inputs)
    channels = groups.trace(apply, variables, *inputs)
    assert tuple(channels.sizes.values()) == sizes
    keep = keeps(channels)
    small = groups.compact(variables, channels, keep)
    compact = jit(groups.elastic(apply, channels, keep))(small, *inputs)
    masked = jit(apply)(groups.mask(variables, channels, keep), *inputs)
    if channels.state:
        masked = (masked[0], groups.compact(masked[1], channels, keep))
    equal(masked, compact)


def only_lists(tree):
    """Paths of all leaves of a list."""
    return {path for path in trees.named_leaves(tree) if path[-1].isdigit()}


def test_what_is_not_only_scanned_over_layers_stays(double):
    variables = V | dict(times=RANDOM.normal(size=(4, 5)), constant=np.ones(LAYERS))

    def apply(v, xs):
        positions, constant = v["times"], v["constant"]
        x, _ = lax.scan(lambda c, each: (c + each[0] * each[1], None), xs[0], (xs, positions))
        step = lambda x, each: layer(x * each[1], each[0])
        x, _ = lax.scan(step, x, (dict(up=v["up"], down=v["down"]), constant))
        return x * constant.sum()

    layered = groups.unstacked(apply, variables, TIMES)
    paths = {f"{name}/{number}" for name in ("up", "down") for number in range(LAYERS)}
    assert only_lists(layered.variables) == paths
    equal(apply(variables, TIMES), layered.apply(layered.variables, TIMES))
    channels = groups.trace(layered.apply, layered.variables, TIMES)
    assert list(channels.sizes) == ["up/0", "up/1", "up/2"]


def test_scans_inside_of_scanned_layers_come_apart_by_another_call(double):
    variables = {name: np.stack([leaf, -leaf]) for name, leaf in V.items()}
    stage = lambda x, kernels: lax.scan(layer, x, kernels)
    apply = lambda v, x: lax.scan(stage, x, v)[0]
    first = groups.unstacked(apply, variables, X)
    assert [leaf.shape for leaf in first.variables["up"]] == [(LAYERS, 5, 8)] * 2
    second = groups.unstacked(first.apply, first.variables, X)
    equal(apply(variables, X), second.apply(second.variables, X))
    channels = groups.trace(second.apply, second.variables, X)
    assert list(channels.sizes.values()) == [8] * 2 * LAYERS
    assert "up/1/2" in channels.names


def equations(jaxpr, name):
    """All of one primitive, also inside of others."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner, name)


def test_rematerialisation_and_derivatives_of_their_own_stay(double):
    policy = jax.checkpoint_policies.dots_saveable
    saving = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    apply = lambda v, x: lax.scan(saving, x, v)[0]
    layered = groups.unstacked(apply, V, X)
    jaxpr = jax.make_jaxpr(layered.apply)(layered.variables, X).jaxpr
    assert not list(equations(jaxpr, "scan"))
    found = list(equations(jaxpr, "remat2"))
    assert [eqn.params["policy"] for eqn in found] == [policy] * LAYERS
    assert all(eqn.params["prevent_cse"] for eqn in found)  # there is no scan to prevent it
    assert len(list(equations(jaxpr, "custom_jvp_call"))) == LAYERS


def test_a_network_without_channels_of_its_layers_is_exported(double):
    apply, variables, _ = groups.unstacked(backwards, V, X)
    channels = groups.trace(apply, variables, X)
    keep = keeps(channels)
    small = groups.compact(variables, channels, keep)
    run = jit(groups.elastic(apply, channels, keep))
    inputs = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), 5), X.dtype)
    arrays = trees.named_leaves(small)
    program = export.export(run)(arrays, inputs).serialize()
    masked = groups.mask(variables, channels, keep)
    equal(apply(masked, X[:3]), export.deserialize(program).call(arrays, X[:3]))


def test_shapes_serve_as_variables_and_kernels_are_known_by_name(double):
    network = of_nnx()
    shapes = jax.eval_shape(lambda: network.variables)
    apply, variables, _ = groups.unstacked(network.apply, shapes, X)
    known = trees.named_leaves(variables)
    assert known["up/kernel/value/2"].shape == (5, 8)
    assert trees.last_name("up/kernel/value/2") == "kernel"
    channels = groups.trace(apply, variables, X)
    assert channels.names == ["up/0", "up/1", "up/2"]
    made = [member.path for _, member in channels.members if trees.is_kernel(member.path)]
    assert len(made) == 2 * LAYERS
    assert "test_unstack.py" in groups.describe(channels)  # lines of the scan's own body


def test_other_variables_and_functions_without_scans_are_refused(double):
    with pytest.raises(ValueError, match="no scan takes apart"):
        groups.unstacked(lambda v, x: layer(x, jax.tree.map(lambda leaf: leaf[0], v)), V, X)
    layered = groups.unstacked(backwards, V, X)
    channels = groups.trace(layered.apply, layered.variables, X)
    with pytest.raises(ValueError, match="down/0"):
        layered.apply(V, X)
    with pytest.raises(ValueError, match="/0"):
        layered.restack(groups.compact(layered.variables, channels, keeps(channels)))
    longer = layered.variables | dict(up=[*layered.variables["up"], V["up"][0]])
    with pytest.raises(ValueError, match="up/3"):
        layered.apply(longer, X)
