"""Selection against sorting: exact counts, ties, special values, trees, traced k, sharding."""

import fractions
import functools
import math

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.random import default_rng
from numpy.testing import assert_array_equal

from sparsity_jax import masks, platforms, polytopes, trees
from sparsity_jax.masks import probes, search

floats = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-42, 3.4e38]),
)
arrays = hypothesis.extra.numpy.arrays(np.float32, st.sampled_from([1, 13, 40]), elements=floats)
mask_of = jax.jit(masks.k_largest_mask)


@jax.jit
def selected(scores, k):
    """(mask, value, mask by magnitude)."""
    mask = masks.k_largest_mask(scores, k)
    return mask, masks.kth_largest(scores, k), masks.k_largest_mask(scores, k, magnitude=True)


@jax.jit
def selected_after(scores, k, before):
    """(mask, mask by magnitude) after an earlier mask."""
    plain = masks.k_largest_mask(scores, k, before=before)
    return plain, masks.k_largest_mask(scores, k, magnitude=True, before=before)


TINY = float(np.finfo(np.float32).tiny)


def reference(scores, k, tiny=TINY):
    """(mask, indices in order) by sorting: larger first, NaN last, equal scores by index,
    subnormals as zero.
    """
    flat = np.asarray(scores, np.float64).ravel()
    flat = np.where(np.abs(flat) < tiny, 0, flat)
    order = np.lexsort(
        (np.arange(flat.size), -np.where(np.isnan(flat), -np.inf, flat), np.isnan(flat))
    )
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask.reshape(np.shape(scores)), order


@hypothesis.given(arrays, st.data())
@hypothesis.settings(max_examples=100)
def test_mask_equals_sorting(scores, data):
    k = data.draw(st.integers(0, scores.size))
    mask, value, by_magnitude = selected(scores, k)
    expected, order = reference(scores, k)
    assert_array_equal(mask, expected)
    if k:
        exact = scores[order[k - 1]]
        assert_array_equal(value, 0 if abs(exact) < TINY else exact)
    expected, _ = reference(np.abs(scores), k)
    assert_array_equal(by_magnitude, expected)


def test_special_values_as_users_compile(as_users_compile):
    scores = np.float32([np.nan, 1, -0.0, 1e-45, np.inf, -1e-42, 0, -np.inf, -1, 3.4e38, 1])
    compiled = jax.jit(lambda scores, k: masks.k_largest_mask(scores, k))
    for k in range(scores.size + 1):
        assert_array_equal(compiled(scores, k), reference(scores, k)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "coarse", "cauchy", "constant"])
def test_every_float_type(dtype, distribution):
    rng = default_rng(0)
    draw = dict(
        normal=rng.normal(size=5000),
        uniform=rng.random(5000),
        coarse=np.round(rng.normal(size=5000), 1),
        cauchy=np.clip(rng.standard_cauchy(5000), -6e4, 6e4),
        constant=np.full(5000, 0.25),
    )[distribution]
    with jax.enable_x64(dtype == "float64"):
        scores = jnp.asarray(draw).astype(dtype).reshape(50, 100)
        for k in (1, 77, 2500, 4999, 5000):
            expected, order = reference(
                scores.astype(jnp.float64 if dtype == "float64" else jnp.float32), k
            )
            assert_array_equal(masks.k_largest_mask(scores, k), expected)
            value = masks.kth_largest(scores, k)
            assert value.dtype == scores.dtype
            assert value == scores.ravel()[order[k - 1]]


def test_a_tree_is_ranked_as_one_array_without_being_one():
    rng = default_rng(1)
    tree = {
        "a": jnp.asarray(np.round(rng.normal(size=(3, 4)), 1), jnp.float32),
        "b": [jnp.asarray(np.round(rng.normal(size=17), 1), jnp.float32), jnp.zeros(())],
    }
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for k in range(flat.size + 1):
        ours = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mask_of(tree, k))])
        assert_array_equal(ours, reference(flat, k)[0])
        assert ours.sum() == k
    text = str(jax.make_jaxpr(masks.k_largest_mask)(tree, 3))
    assert "[30]" not in text
    assert " sort[" not in text


def test_vectors_of_k_and_traced_k_compile_once():
    scores = jnp.asarray(default_rng(2).normal(size=1000), jnp.float32)
    ks = np.array([[1, 10, 500], [999, 1000, 3]])
    ordered = np.sort(np.asarray(scores))[::-1]
    assert_array_equal(masks.kth_largest(scores, ks), ordered[ks - 1])
    compiled = tiny.jitted_once(lambda s, k: masks.k_largest_mask(s, k).sum())
    assert [int(compiled(scores, k)) for k in (0, 5, 1000)] == [0, 5, 1000]
    batched = jax.vmap(masks.k_largest_mask, in_axes=(None, 0))(scores, jnp.array([2, 700]))
    assert batched.sum(1).tolist() == [2, 700]


@functools.partial(jax.jit, static_argnames="magnitude")
def of_one_cpu(scores, k, magnitude):
    """(mask, value), traced only where there seems to be one CPU device."""
    return (
        masks.k_largest_mask(scores, k, magnitude=magnitude),
        masks.kth_largest(scores, k, magnitude=magnitude),
    )


@pytest.mark.parametrize("distribution", ["normal", "coarse", "sparse", "nan", "trend"])
def test_the_path_of_one_cpu_gives_the_same_answers(monkeypatch, distribution):
    """Sampled brackets and sliced reductions, used where there is one CPU device, also when the
    sample misleads.
    """
    monkeypatch.setattr(platforms, "one_device", lambda: True)
    rng = default_rng(6)
    draw = dict(
        normal=rng.normal(size=70003),
        coarse=np.round(rng.normal(size=70003), 1),
        sparse=np.where(
            np.arange(70003) % 64 == 1, rng.normal(size=70003), 0
        ),  # the sample sees zeros only
        nan=np.where(rng.random(70003) < 0.3, np.nan, rng.normal(size=70003)),
        trend=np.arange(70003.0),
    )[distribution]
    array = draw.astype(np.float32)
    tree = {"a": array, "b": rng.normal(size=(3, 2)).astype(np.float32)}
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for scores, magnitude, ranked in (
        (tree, False, flat),
        (array, False, array),
        (array, True, np.abs(array)),
    ):
        for k in (1, 40, 1000, 35000, 69990, ranked.size):
            expected, order = reference(ranked, k)
            mask, value = of_one_cpu(scores, k, magnitude)
            ours = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mask)])
            assert_array_equal(ours, expected)
            assert_array_equal(value, ranked[order[k - 1]])


def test_the_search_is_short(monkeypatch):
    """A dozen or two counts, not a sort."""
    for draw in (
        default_rng(3).normal(size=4000),
        np.exp2(default_rng(4).uniform(-99, 99, 4000)),
    ):
        scores = [jnp.asarray(draw, jnp.float32)]
        counted = []
        monkeypatch.setattr(
            probes.Rows,
            "count_from",
            lambda *args, f=probes.Rows.count_from, seen=counted: (seen.append(args), f(*args))[1],
        )
        with jax.disable_jit(), platforms.using("in turn"):
            search.kth_keys([scores], [jnp.asarray(200)], magnitude=False)
        monkeypatch.undo()
        assert 1 < len(counted) < 40


@pytest.mark.usefixtures("eight_devices")
def test_sharded_scores_are_not_gathered():
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    scores = np.round(default_rng(5).normal(size=(1024, 8)), 2).astype(np.float32)
    placed = jax.device_put(scores, sharding)
    compiled = jax.jit(masks.k_largest_mask, out_shardings=sharding).lower(placed, 777).compile()
    assert_array_equal(compiled(placed, 777), reference(scores, 777)[0])
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


@hypothesis.given(arrays, st.data())
def test_what_an_earlier_mask_left_out_goes_first(scores, data):
    """Below zeros and NaN, ties or not, whatever its own score."""
    before = data.draw(hypothesis.extra.numpy.arrays(bool, scores.shape))
    k = data.draw(st.integers(0, scores.size))
    found = selected_after(scores, k, before)
    for mask, sizes in zip(map(np.asarray, found), (scores, np.abs(scores))):
        assert mask.sum() == k
        among = min(k, int(before.sum()))
        assert (mask & before).sum() == among
        expected, _ = reference(sizes[before], among)
        assert_array_equal(mask[before], expected)


def test_weights_that_became_zero_do_not_tie_with_those_pruned_before():
    weights = {"a": jnp.zeros((40, 5)), "b": jnp.zeros(50)}
    before = masks.random_mask(weights, 200, jax.random.key(0))
    kept = masks.k_largest_mask(weights, 125, magnitude=True, before=before)
    assert (
        sum(int((new & old).sum()) for new, old in zip(*map(jax.tree.leaves, (kept, before))))
        == 125
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nan_is_refused_outside_jit_and_lowest_inside(dtype):
    scores = {"a": jnp.ones(3, dtype), "b": jnp.array([1.0, np.nan, -1.0], dtype)}
    for select in (masks.k_largest_mask, masks.kth_largest):
        with pytest.raises(ValueError, match="'b'"):
            select(scores, 2)
    kept = mask_of(scores, 5)
    assert kept["b"].tolist() == [True, False, True]


@hypothesis.given(st.integers(0, 1000), st.integers(1, 10**6))
def test_decimal_shares_mean_what_they_say(thousandths, total):
    exact = fractions.Fraction(thousandths, 1000) * total
    for share in (
        thousandths / 1000,
        np.float32(thousandths / 1000),
        1 - (1000 - thousandths) / 1000,
    ):
        for rounding, function in masks.ROUNDINGS.items():
            assert masks.count_of(share, total, rounding=rounding) == function(exact)
    assert masks.num_pruned(thousandths / 1000, total) == min(math.ceil(exact), total - 1)
    assert masks.count_of(1 / total, total, rounding="floor") == 1


ON_EACH = {
    "mask": lambda x: masks.k_largest_mask(x, 5),
    "mask after another": lambda x: masks.k_largest_mask(x, 5, magnitude=True, before=x > 0),
    "threshold": lambda x: masks.kth_largest(x, 5),
    "vertex": polytopes.KSparse(5, 1.0).lmo,
    "projection": polytopes.KSparse(5, 0.5).project,
    "L1 projection": polytopes.LpBall(0.5, 1).project,
    "L3 vertex": polytopes.LpBall(0.5, 3).lmo,
    "norm": trees.norm,
}


@pytest.mark.usefixtures("eight_devices")
def test_values_that_differ_between_devices_and_explicit_meshes():
    """Inside shard_map each device has an array of its own; under an explicit mesh all share
    one.
    """
    on_each = lambda x: {name: function(x) for name, function in ON_EACH.items()}
    tiny.check_on_meshes(on_each, default_rng(0).normal(size=(2, 32)).astype(np.float32))


def test_random_masks_count_exactly():
    tree = {"a": jnp.arange(10.0), "b": -jnp.arange(6.0).reshape(2, 3)}
    first = masks.random_mask(tree, 7, jax.random.key(0))
    second = masks.random_mask(tree, 7, jax.random.key(1))
    assert sum(int(m.sum()) for m in jax.tree.leaves(first)) == 7
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second)))
    share = np.mean([masks.random_mask(tree, 8, jax.random.key(i))["a"].mean() for i in range(30)])
    assert abs(share - 0.5) < 0.1
    for k in (2, 9):  # of seven that an earlier mask keeps
        later = masks.random_mask(tree, k, jax.random.key(2), before=first)
        assert sum(int(m.sum()) for m in jax.tree.leaves(later)) == k
        both = sum(
            int((new & old).sum()) for new, old in zip(*map(jax.tree.leaves, (later, first)))
        )
        assert both == min(k, 7)


def test_a_share_is_no_number_of_entries():
    for select in (masks.k_largest_mask, masks.kth_largest):
        with pytest.raises(TypeError, match=r"k is 0.5, which is no integer"):
            select(jnp.arange(4.0), 0.5)


def test_the_threshold_of_mixed_types_is_exact():
    scores = {"a": jnp.ones(1, jnp.bfloat16), "b": jnp.array([1.001, 0.5])}
    assert float(masks.kth_largest(scores, 1)) == np.float32(1.001)


def test_apply_density_and_sparsity():
    tree = {"a": jnp.array([1.0, np.nan, 3.0]), "b": jnp.ones((2, 2))}
    mask = {"a": jnp.array([True, False, True]), "b": jnp.zeros((2, 2), bool)}
    masked = masks.apply(tree, mask)
    assert_array_equal(masked["a"], [1.0, 0.0, 3.0])
    assert float(masks.sparsity(mask)) == pytest.approx(5 / 7)
    assert float(masks.sparsity(masked)) == pytest.approx(5 / 7)
    assert float(masks.sparsity(masks.full(tree))) == 0.0


@pytest.mark.parametrize("wrapped", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_apply_refuses_other_shapes_and_swapped_arguments(wrapped):
    params = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(3)}
    kept = masks.full(params)
    with pytest.raises(ValueError, match=r"'a/w' has shape \(3,\); allowed: \(2, 3\)"):
        wrapped(masks.apply)(params, {**kept, "a": {"w": jnp.ones(3, bool)}})
    with pytest.raises(TypeError, match=r"'a/w' is float32; .*masks come second"):
        wrapped(masks.apply)(kept, params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.k_largest_mask(jnp.ones(3), 4), "k is 4; allowed: 0 to 3"),
        (lambda: masks.kth_largest(jnp.ones(3), 0), "k is 0; allowed: 1 to 3"),
        (lambda: masks.k_largest_mask(jnp.ones(0), 0), "scores are empty"),
    ],
)
def test_bad_k_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="scores are int32"):
        masks.k_largest_mask(jnp.arange(3), 1)
