"""Names and rules of pytrees, and reductions that equal the plain ones on every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from sparsity_jax import platforms, tables, trees

TREE = {
    "conv1": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "fc": [jnp.zeros(2), jnp.full(4, 2.0)],
}


def test_leaves_are_named_in_flattening_order():
    named = trees.named_leaves(TREE)
    assert list(named) == ["conv1/bias", "conv1/kernel", "fc/0", "fc/1"]
    assert all(a is b for a, b in zip(named.values(), jax.tree.leaves(TREE), strict=True))
    sizes = trees.map_named(lambda path, leaf, other: (path, leaf.size + other.size), TREE, TREE)
    assert sizes["fc"][1] == ("fc/1", 8)
    assert [trees.is_kernel(path) for path in named] == [False, True, False, False]
    assert trees.size(TREE) == 15
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        trees.named_leaves({"a/b": 1, "a": {"b": 2}})


def test_the_first_matching_rule_decides():
    rules = ((r"conv1/.*", 1), (r".*/bias", 2), (r"fc/\d", 3))
    with tiny.refused("[1]", ".*/bias"):
        trees.match_rules(TREE, rules)
    values = trees.match_rules(TREE, ((r".*/bias", 2), (r"conv1/.*", 1), (r"fc/\d", 3), (r".*", 4)))
    assert values == {"conv1": {"bias": 2, "kernel": 1}, "fc": [3, 3]}


@pytest.mark.parametrize(
    ("rules", "where", "value", "closest"),
    [
        (((r"conv1", 1), (r".*", 0)), "[0]", "conv1", ""),  # the whole path must match
        (((r"conv1/kernl", 1), (r".*", 0)), "[0]", "conv1/kernl", "conv1/kernel"),
        (((r"conv1/.*", 1),), "", tables.NOT_GIVEN, ""),  # nothing for fc/0
        (((r"(", 1), (r".*", 0)), "[0]", "(", ""),
        (((r".*", 1), (r"fc/0", 0)), "[1]", "fc/0", ""),
    ],
)
def test_rules_that_cannot_work_are_named(rules, where, value, closest):
    with tiny.refused(where, value, closest=closest):
        trees.match_rules(TREE, rules)


def test_a_pattern_chooses_leaves_by_their_whole_path():
    assert trees.matching(TREE, r"conv1/.*") == {
        "conv1/bias": True,
        "conv1/kernel": True,
        "fc/0": False,
        "fc/1": False,
    }
    assert list(trees.matching(TREE, ".*").values()) == [True] * 4
    for pattern, allowed, closest in (
        ("conv", "'conv1/bias'", ""),
        ("conv1/kernl", "", "conv1/kernel"),
        ("[", "", ""),
    ):
        with tiny.refused("config.x", pattern, closest, allowed=allowed):
            trees.matching(TREE, pattern, "config.x")
    trees.check_pattern(r"(?!.*bn\d*/).*", "config.x")


def test_kernels_of_other_libraries_are_recognised():
    paths = (
        "fc/kernel",
        "layers/0/kernel/value",
        "layers/0/weight",
        "w",
        "first/w",
        "layers/kernel/0",
        "layers/kernel/value/12",
        "kernel/bias",
        "value",
        "b",
        "0",
    )
    assert [trees.is_kernel(path) for path in paths] == [True] * 7 + [False] * 4


@pytest.mark.parametrize("one_cpu", [False, True])
@pytest.mark.parametrize("shape", [(5,), (64, 64), (4099,), (3, 3, 37, 41)])
def test_folds_equal_plain_reductions(monkeypatch, one_cpu, shape):
    monkeypatch.setattr(platforms, "one_device", lambda: one_cpu)
    x = jax.random.normal(jax.random.key(0), shape)
    y = jax.random.normal(jax.random.key(1), shape)
    wide = np.asarray(x, np.float64)
    counted = trees.fold_sum(lambda x: (x > 0.5).astype(jnp.int32), x)
    assert counted.dtype == jnp.int32
    assert int(counted) == int((np.asarray(x) > 0.5).sum())
    assert_allclose(
        trees.fold_sum(lambda x, y: x * y, x, y), (wide * np.asarray(y)).sum(), rtol=1e-5
    )
    lowest = trees.fold(jnp.minimum, jnp.min, lambda x: x, x)
    assert float(lowest) == float(np.asarray(x).min())
    largest = trees.fold(jnp.maximum, jnp.max, jnp.abs, x)
    assert float(largest) == float(np.abs(np.asarray(x)).max())


def test_compiled_folds_agree_on_both_paths(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (8192,))
    monkeypatch.setattr(platforms, "one_device", lambda: True)
    sliced = jax.jit(lambda x: trees.fold_sum(jnp.square, x))(x)
    monkeypatch.setattr(platforms, "one_device", lambda: False)
    assert_allclose(sliced, jnp.sum(jnp.square(x)), rtol=1e-6)


def test_inner_product_and_norm():
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(TREE)])
    other = jax.tree.map(lambda leaf: leaf + 1, TREE)
    assert_allclose(trees.dot(TREE, other), flat @ (flat + 1), rtol=1e-6)
    assert_allclose(trees.norm(TREE), np.linalg.norm(flat), rtol=1e-6)
    assert float(trees.dot({}, {})) == 0.0


def test_arrays_without_numbers_are_named():
    trees.check_finite({**TREE, "key": jax.random.key(0), "count": jnp.arange(3)}, "weights")
    bad = {"a": {"kernel": jnp.ones(3)}, "b": [jnp.array([0.0, np.nan, np.inf], jnp.bfloat16)]}
    with pytest.raises(ValueError, match="prune, member 2: 2 of 3 entries at 'b/0'"):
        trees.check_finite(bad, "prune, member 2")
    with pytest.raises(ValueError, match="1 of 3 entries at 'b/0' are NaN"):
        trees.check_finite(bad, "scores", infinite=True)
    with pytest.raises(ValueError, match=r"^scores: 1 of 1 entries are NaN"):
        trees.check_finite(jnp.full(1, np.nan), "scores")
    jax.jit(lambda tree: trees.check_finite(tree, "traced"))(bad)


def test_a_known_array_inside_a_traced_program_is_checked_too():
    numbers, broken = jnp.ones(3), jnp.full(3, jnp.inf)
    jax.jit(lambda x: trees.check_finite(numbers, "scores") or x)(1.0)
    with pytest.raises(ValueError, match="scores"):
        jax.jit(lambda x: trees.check_finite(broken, "scores") or x)(1.0)
