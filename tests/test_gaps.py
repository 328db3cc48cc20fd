"""The largest gap between scores, against sorting them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_array_equal

from sparsity_jax.masks import gaps

TINY = float(np.finfo(np.float32).tiny)
MOST = float(np.finfo(np.float32).max)
SPECIAL = (0.0, 1.0, TINY, -TINY, 1.5 * TINY, TINY / 2, MOST, -MOST, MOST / 3)
NO_NUMBERS = (np.inf, -np.inf, np.nan)
SIZE = 60
KINDS = {
    "normal": lambda rng: rng.normal(size=SIZE),
    "ties": lambda rng: rng.integers(0, 30, SIZE) / 4,
    "equal": lambda rng: np.full(SIZE, rng.normal()),
    "equal gaps": lambda rng: rng.permutation(SIZE) * float(rng.choice([1, 0.1, TINY])),
    "heavy tails": lambda rng: rng.standard_cauchy(SIZE),
    "every magnitude": lambda rng: np.exp(rng.uniform(-85, 85, SIZE)),
    "tiny": lambda rng: TINY * rng.choice([0.5, 1, 3, 1000]) * rng.normal(size=SIZE),
    "near the smallest": lambda rng: TINY * (1 + rng.integers(0, 5, SIZE) * 2.0**-22),
    "huge": lambda rng: MOST * rng.uniform(-1, 1, SIZE),
    "no numbers": lambda rng: np.where(
        rng.random(SIZE) < 0.1, rng.choice(NO_NUMBERS, SIZE), rng.normal(size=SIZE)
    ),
    "special": lambda rng: rng.choice([*SPECIAL, *NO_NUMBERS], SIZE),
    "rounded": lambda rng: 1e10 + 1024 * rng.integers(0, 9, SIZE),
}


def by_sorting(scores, trim):
    """For subnormals as zero, as a CPU computes."""
    known = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    ordered = jnp.sort(known.ravel())[trim : scores.size - trim]
    upper, lower = ordered[1:], ordered[:-1]
    sizes = jnp.where(upper == lower, 0, upper - lower)
    return jnp.argmax(sizes) + trim + 1


def of_rows(count):
    """Counts of every row of scores, with none and with three left out at either end."""
    both = lambda scores: jnp.stack([count(scores, trim) for trim in (0, 3)])
    return jax.jit(jax.vmap(both))


COUNTED = of_rows(functools.partial(gaps.count_below_largest, buckets=8))
SORTED = of_rows(by_sorting)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_count_is_that_of_sorted_scores(kind, seed):
    """In windows of eight buckets, so that there are many."""
    rng = default_rng(seed)
    scores = np.stack([KINDS[kind](rng) for _ in range(4)]).astype(np.float32)
    assert_array_equal(COUNTED(scores), SORTED(scores))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_of_scores(dtype):
    with jax.enable_x64(dtype == "float64"):
        scores = jnp.asarray(default_rng(0).normal(size=(4, 5)), dtype)
        wanted = by_sorting(scores.astype(jnp.promote_types(dtype, "float32")), 0)
        assert gaps.count_below_largest(scores, 0) == wanted
