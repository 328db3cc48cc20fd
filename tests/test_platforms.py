"""Both ways of working on many arrays: in turn, as a CPU likes it, and together, as an accelerator
does.
"""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from sparsity_jax import growing, masks, optim, platforms, polytopes, trees

WAYS = ("in turn", "together")
SHAPES = ((40,), (3, 4, 5, 6), (9000,), (1,), (4096,), (70, 70))


@pytest.fixture(params=[(way, alone) for way in WAYS for alone in (True, False)], ids=str)
def way(request, monkeypatch):
    """Either way, as on one device and as on the eight that tests have."""
    name, alone = request.param
    monkeypatch.setattr(platforms, "one_device", lambda: alone)
    with platforms.using(name):
        yield name


def draws(rng, shape):
    """Scores with many ties, and without numbers here and there."""
    scores = np.round(rng.normal(size=shape), 1).astype(np.float32)
    return jnp.asarray(np.where(rng.random(shape) < 0.05, np.nan, scores))


def expected_mask(scores, k, before):
    """By a sort: what `before` leaves out last, NaN before it, equal ones by index."""
    size = np.abs(np.ravel(scores))
    size = np.where(np.isnan(size), -1, size)
    left_out = ~np.ravel(before)
    order = np.lexsort((np.arange(size.size), -np.where(left_out, -2, size)))
    mask = np.zeros(size.size, bool)
    mask[order[:k]] = True
    return mask.reshape(np.shape(scores))


def test_masks_of_several_arrays_at_once(way):
    rng = np.random.default_rng(0)
    scores = [draws(rng, shape) for shape in SHAPES]
    before = [jnp.asarray(rng.random(shape) < 0.7) for shape in SHAPES]

    @jax.jit
    def select(scores, ks):
        return masks.k_largest_masks(scores, list(ks), magnitude=True, before=before)

    for share in (0, 0.1, 0.8, 1):
        ks = [int(share * array.size) for array in scores]
        for array, k, kept, mask in zip(scores, ks, before, select(scores, jnp.asarray(ks))):
            np.testing.assert_array_equal(mask, expected_mask(array, k, kept))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.data())
def test_both_ways_keep_the_same(data):
    """Of a tree that is ranked as one array, for all kinds of numbers."""
    numbers = st.floats(width=32, allow_subnormal=True)
    values = data.draw(st.lists(numbers, min_size=24, max_size=24))
    tree = [jnp.asarray(values[:9], jnp.float32), jnp.asarray(values[9:], jnp.float32)]
    k = data.draw(st.integers(1, 24))
    first, second = (_selected(tree, k, way=way) for way in WAYS)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def _selected(tree, k, *, way):
    with platforms.using(way):
        return _program[way](tree, k)


_program = {
    way: jax.jit(lambda tree, k: (masks.k_largest_mask(tree, k), masks.kth_largest(tree, k)))
    for way in WAYS
}


def test_a_vector_of_k_and_a_batch_of_scores(way):
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.normal(size=(3, 500)), jnp.float32)
    ks = jnp.array([1, 250, 500])
    found = jax.jit(jax.vmap(lambda row: masks.kth_largest(row, ks)))(scores)
    ordered = -np.sort(-np.asarray(scores), axis=1)
    np.testing.assert_array_equal(found, ordered[:, np.array(ks) - 1])
    kept = jax.jit(jax.vmap(masks.k_largest_mask))(scores, ks)
    assert kept.sum(1).tolist() == [1, 250, 500]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_norms_products_and_scales_of_several_arrays(way, scale):
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in SHAPES]
    arrays.append(jnp.zeros(3))
    exact = [np.linalg.norm(np.ravel(array).astype(np.float64)) for array in arrays]
    norms, scales = jax.jit(lambda arrays: (trees.norms(arrays), trees.scales(arrays)))(arrays)
    np.testing.assert_allclose(norms, exact, rtol=1e-5)
    assert [float(s) for s in scales] == [float(trees.scale_of(array)) for array in arrays]
    shrunk = [array / own for array, own in zip(arrays, scales)]
    products = jax.jit(trees.dots)(shrunk, shrunk)
    exact = [np.sum(np.square(np.asarray(array, np.float64))) for array in shrunk]
    np.testing.assert_allclose(products, exact, rtol=1e-5)


def sets_of(params):
    """One set of every kind."""
    kinds = [
        polytopes.KSparse(5, 0.3),
        polytopes.KSparse(100, 0.02),
        polytopes.LpBall(0.7, 1),
        polytopes.Unconstrained(),
        polytopes.LpBall(1.5, 2),
        polytopes.KSparse(40, 0.1),
    ]
    return dict(zip(params, kinds))


OPTIMIZERS = {
    "sfw": lambda sets: optim.sfw(0.1, sets),
    "sfw by diameter": lambda sets: optim.sfw(0.1, sets, rescale="diameter"),
    "sfw unscaled": lambda sets: optim.sfw(0.1, sets, rescale="none"),
    "adagrad": lambda sets: optim.adagrad_sfw(0.1, sets),
    "projected": lambda sets: optim.sgd(0.1, sets),
}


def network(seed):
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for shape in SHAPES]
    return dict(zip("abcdef", arrays))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_alike_both_ways(name, monkeypatch):
    params = network(3)
    sets = sets_of(params)
    params = polytopes.shift_inside(params, sets)
    results = []
    for way in WAYS:
        monkeypatch.setattr(platforms, "one_device", lambda way=way: way == "together")
        tx = OPTIMIZERS[name](sets)

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(network(4), state, params)
            return optax.apply_updates(params, updates), state

        with platforms.using(way):
            new, state = step(params, tx.init(params))
            new, _ = step(new, state)
        results.append(new)
    for path, array in results[0].items():
        np.testing.assert_allclose(results[1][path], array, rtol=2e-5, atol=1e-7, err_msg=path)
        assert not np.array_equal(array, params[path])


def controls(function, *arguments, platform="cuda"):
    """How many loops and branches a program for a platform has."""
    with platforms.using(None):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return len(re.findall(r"\bstablehlo\.(?:while|case|if)\b", lowered.as_text()))


@pytest.mark.parametrize("name", ["sfw", "adagrad", "projected"])
def test_a_gpu_meets_few_loops_and_branches_however_many_arrays(name):
    """Each is a round trip to the host. On a CPU each array has its own."""
    params = network(5)
    sets = {path: polytopes.KSparse(3, 0.1) for path in params}
    tx = OPTIMIZERS[name](sets)
    update = lambda grads, state: tx.update(grads, state, params)[0]
    many = controls(update, params, tx.init(params))
    few = {path: params[path] for path in "ab"}
    two = OPTIMIZERS[name]({path: sets[path] for path in "ab"})
    assert many == controls(lambda g, s: two.update(g, s, few)[0], few, two.init(few))
    assert many <= 12


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_growing_penalties_meet_few_too(granularity):
    params = {f"{i}/kernel": jnp.full((8, i), 0.1) for i in range(2, 8)}
    layers = growing.layers(params, dict.fromkeys(params, 0.5), granularity)
    tx = growing.growing_l2(layers, method="greg2", update_every=5)
    update = lambda grads, state: tx.update(grads, state, params)[0]
    assert 0 < controls(update, params, tx.init(params)) <= 12


@pytest.mark.usefixtures("eight_devices")
def test_divided_arrays_are_not_gathered_to_be_searched_together():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    rng = np.random.default_rng(6)
    scores = [np.round(rng.normal(size=(64, 8)), 1).astype(np.float32) for _ in range(2)]
    placed = jax.device_put(scores, sharding)
    select = jax.jit(lambda scores: masks.k_largest_masks(scores, [77, 300], magnitude=True))
    with platforms.using("together"):
        compiled = select.lower(placed).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    for array, k, mask in zip(scores, (77, 300), compiled(placed)):
        np.testing.assert_array_equal(mask, expected_mask(array, k, np.ones(array.shape, bool)))


def test_a_program_is_compiled_for_each_way():
    """A compiled function does not remember the way it was first called."""
    ask = platforms.compiled(lambda x: x + (1 if platforms.in_turn() else 2))
    answers = []
    for way in (*WAYS, *WAYS):
        with platforms.using(way):
            answers.append(float(ask(jnp.zeros(()))))
    assert answers == [1, 2, 1, 2]
    with platforms.using(None):
        assert float(platforms.per_platform(ask, jnp.zeros(()))) == 1  # on the CPU of the tests


@pytest.mark.parametrize("own", WAYS)
def test_inside_shard_map_on_one_device(own, monkeypatch):
    """Where arrays vary between devices, nothing is packed with constants."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("x",), axis_types=automatic)
    spec = jax.sharding.PartitionSpec("x")

    def select(scores):
        norm = trees.norms([scores])[0]
        return masks.k_largest_mask(scores, 17) & (norm > 0)

    rows = jnp.asarray(np.random.default_rng(7).normal(size=(3, 8, 50)), jnp.float32)
    assert platforms.one_device()
    with platforms.using(own):
        kept = jax.jit(jax.vmap(jax.shard_map(select, mesh=mesh, in_specs=spec, out_specs=spec)))
        assert kept(rows).sum((1, 2)).tolist() == [17, 17, 17]
