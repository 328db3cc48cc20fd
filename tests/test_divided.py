"""Algorithms on parameters alone, of arrays that devices have shares of: nothing is gathered.

On a mesh of one axis the compiler chooses how results are divided and arrays are worked on in turn;
on one of two explicit axes they are worked on together.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import groups, linops, platforms, polytopes, spectrum, trees
from sparsity_jax.masks import gaps

pytestmark = pytest.mark.usefixtures("eight_devices")
ALGORITHMS = tiny.module("experiments/scale/algorithms.py")
COLLECTIVES = tiny.module("experiments/scale/collectives.py")
EVERY = ALGORITHMS.EVERY
SHAPES = {"conv": {"kernel": (3, 3, 8, 32)}, "fc": {"kernel": (64, 16), "bias": (5,)}}
UNITS = 32 + 16  # filters of both kernels
EXPLICIT = ("masks", "adagrad_sfw", "Lanczos, full", "traces", *ALGORITHMS.OF_UNITS)


def network(seed, shapes=SHAPES):
    rng = default_rng(seed)
    draw = lambda shape: np.round(rng.normal(size=shape), 2).astype(np.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


def spec_of(shape, mesh):
    """Each axis of the mesh divides the largest axis of an array that is left, where it can."""
    spec = [None] * len(shape)
    for name, devices in mesh.shape.items():
        free = [i for i, size in enumerate(shape) if not (spec[i] or size % devices)]
        if free:
            largest = max(free, key=lambda i: (shape[i], i))
            spec[largest] = name
    return PartitionSpec(*spec)


def divided(tree, mesh):
    put = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec_of(leaf.shape, mesh)))
    return jax.tree.map(put, tree)


def exchanged(compiled):
    return COLLECTIVES.of_program(compiled.as_text())


def check_divided(results, mesh, shapes=SHAPES):
    """What has the shape of a parameter is divided as that is."""
    known = jax.tree.leaves(shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    for path, leaf in jax.tree_util.tree_leaves_with_path(results):
        if leaf.shape in known:
            wanted = NamedSharding(mesh, spec_of(leaf.shape, mesh))
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (path, leaf.sharding)


def close(found, wanted):
    """Masks and counts equal, numbers within rounding of the largest."""
    numbers = [leaf for leaf in jax.tree.leaves(wanted) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    largest = max([4.0, *(np.max(np.abs(leaf)) for leaf in numbers)])  # weights go up to 4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)
        else:
            assert_array_equal(a, b)


@pytest.fixture(scope="module")
def alone():
    """Results of one device, by name."""

    @functools.cache
    def results_of(name):
        with platforms.using("together"):
            return jax.jit(EVERY[name])(network(0), network(1))

    return results_of


def check_algorithm(name, mesh, alone):
    arguments = divided((network(0), network(1)), mesh)
    compiled = jax.jit(EVERY[name]).lower(*arguments).compile()
    results = compiled(*arguments)
    check_divided(results, mesh)
    close(results, alone(name))
    for collective in exchanged(compiled):
        if name in ALGORITHMS.OF_UNITS:  # scores of filters, and which of them stay
            assert collective.kind in ("all-reduce", "all-gather")
            assert collective.size <= 8 * UNITS
        else:
            assert collective.kind == "all-reduce"
            assert max(collective.sizes) <= 4 * 8 * 3  # a few numbers of each array


@pytest.mark.parametrize("name", EVERY)
def test_where_the_compiler_divides(name, alone):
    with platforms.using("in turn"):
        check_algorithm(name, jax.make_mesh((8,), ("x",), (AxisType.Auto,)), alone)


@pytest.mark.parametrize("name", EXPLICIT)
def test_two_explicit_axes(name, alone):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    with platforms.using("together"), jax.set_mesh(mesh):
        check_algorithm(name, mesh, alone)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_largest_gap_exchanges_buckets(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind,) * 2)
    scores = network(0)["conv"]["kernel"]
    count = jax.jit(functools.partial(gaps.count_below_largest, trim=0, buckets=32))
    with jax.set_mesh(mesh):
        shares = divided(scores, mesh)
        compiled = count.lower(shares).compile()
        assert compiled(shares) == count(scores)
    assert {exchange.kind for exchange in exchanged(compiled)} == {"all-reduce"}
    assert max(max(exchange.sizes) for exchange in exchanged(compiled)) <= 4 * 32


def applied(variables, x):
    layers = variables["params"]
    options = dict(
        window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    hidden = jax.lax.conv_general_dilated(x, layers["conv"]["kernel"], **options)
    means = jax.nn.relu(hidden).mean((1, 2))
    return jnp.concatenate([means, means], -1) @ layers["fc"]["kernel"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_removed_channels_are_cut_out_of_shares(kind):
    mesh = jax.make_mesh((8,), ("x",), (kind,))
    variables = {"params": network(0)}
    shares = divided(variables, mesh)
    channels = groups.trace(applied, variables, jnp.zeros((1, 2, 2, 8)))
    (name,) = (name for name, group in channels.groups.items() if group.size == 32)
    keep = {name: np.arange(32) % 4 > 0}
    with jax.set_mesh(mesh):
        small, masked = (cut(shares, channels, keep) for cut in (groups.compact, groups.mask))
    tiny.same(small, groups.compact(variables, channels, keep))
    tiny.same(masked, groups.mask(variables, channels, keep))
    check_divided(masked, mesh)
    for leaf in (small["params"]["conv"]["kernel"], small["params"]["fc"]["kernel"]):
        assert leaf.sharding.spec == spec_of(leaf.shape, mesh)
    if kind == AxisType.Explicit:  # else the compiler chooses
        with jax.set_mesh(mesh):
            cut = jax.jit(lambda variables: groups.compact(variables, channels, keep))
            exchanges = exchanged(cut.lower(shares).compile())
        assert {exchange.kind for exchange in exchanges} == {"all-to-all"}
        share = 4 * 3 * 3 * 8 * 32 // 8  # bytes
        assert all(exchange.size <= share for exchange in exchanges)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("shape", "spec", "axis"),
    [
        ((32,), PartitionSpec(("x", "y")), 0),
        ((2, 32), PartitionSpec("y", "x"), 1),
    ],
)
def test_entries_pass_between_shares_where_no_other_axis_can_be_divided(kind, shape, spec, axis):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind,) * 2)
    array = default_rng(0).normal(size=shape).astype(np.float32)
    entries = np.r_[0:5, 13:24]
    shares = jax.device_put(array, NamedSharding(mesh, spec))
    found = trees.taken(shares, entries, axis)
    assert_array_equal(found, array.take(entries, axis))
    assert found.sharding.spec == spec
    uneven = trees.taken(shares, entries[:7], axis)
    assert_array_equal(uneven, array.take(entries[:7], axis))
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            taken = jax.jit(lambda array: trees.taken(array, entries, axis)).lower(shares).compile()
        exchanges = exchanged(taken)
        assert {exchange.kind for exchange in exchanges} == {"collective-permute"}
        assert all(exchange.size <= 4 * array.size // 8 for exchange in exchanges)


def test_sets_vectors_and_eigenvectors_of_shares():
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    params = network(0)
    shares = divided(params, mesh)
    found = polytopes.for_params(shares, k_frac=0.2)
    wanted = polytopes.for_params(params, k_frac=0.2)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), found, wanted)
    drawn = linops.rademacher(jax.random.key(0), shares)
    row = spectrum.one_hot(trees.named_leaves(shares), "fc/kernel", (3, 4))
    check_divided((drawn, row), mesh)
    assert row["fc/kernel"][3, 4] == 1
    assert sum(float(trees.absolute_sum(leaf)) for leaf in row.values()) == 1
    find = linops.top_eigenpairs(2, 6)
    pairs = [find(ALGORITHMS.diagonal(tree), drawn) for tree in (shares, params)]
    assert_allclose(pairs[0].values, pairs[1].values, rtol=1e-5)
    kernel = pairs[0].vectors["conv"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    shortest = [trees.norm(jax.tree.map(lambda leaf: leaf[0], each.vectors)) for each in pairs]
    assert_allclose(shortest, 1, rtol=1e-4)
