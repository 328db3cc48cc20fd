"""Losses by hand and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from numpy.testing import assert_allclose

from sparsity_jax import losses, tables

LOGITS = jnp.asarray([[2.0, 1.0, -1.0], [0.0, 3.0, 0.5], [1.0, 1.0, 1.0]])
LABELS = jnp.asarray([0, 2, 1])


def test_cross_entropy_is_in_nats_per_example():
    found = losses.cross_entropy(LOGITS, LABELS)
    assert_allclose(
        found, optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS), rtol=1e-6
    )
    assert_allclose(found[2], np.log(3), rtol=1e-6)


def test_masked_classes_have_no_share():
    logits = jnp.array([[1.0, 0.0, -jnp.inf]])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[:, :2], jnp.array([0]))
    assert_allclose(losses.cross_entropy(logits, jnp.array([0])), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_smoothing_mixes_in_the_uniform_distribution(smoothing, temperature):
    targets = (1 - smoothing) * jax.nn.one_hot(LABELS, 3) + smoothing / 3
    expected = optax.softmax_cross_entropy(LOGITS / temperature, targets)
    found = losses.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing, temperature=temperature)
    assert_allclose(found, expected, rtol=1e-5)


def test_mean_squared_error_is_the_mean_over_classes():
    assert_allclose(losses.mean_squared_error(LOGITS, LABELS)[0], (1 + 1 + 1) / 3, rtol=1e-6)


@pytest.mark.parametrize("loss", losses.LOSSES.values())
def test_narrow_logits_are_widened(loss):
    narrow = LOGITS.astype(jnp.bfloat16)
    assert loss(narrow, LABELS).dtype == jnp.float32
    assert_allclose(loss(narrow, LABELS), loss(LOGITS, LABELS), rtol=1e-6)
    with jax.enable_x64(True):
        assert loss(jnp.asarray(np.asarray(LOGITS), jnp.float64), LABELS).dtype == jnp.float64


def test_large_logits_stay_finite_and_correct_is_per_example():
    assert bool(jnp.isfinite(losses.cross_entropy(1e4 * LOGITS, LABELS)).all())
    assert losses.correct(LOGITS, LABELS).tolist() == [True, False, False]


def test_no_nan_is_right():
    logits = np.full((4, 3), np.nan)
    logits[1] = [1.0, np.nan, 0.0]
    logits[2] = [1.0, 0.0, 0.0]
    assert losses.correct(jnp.asarray(logits), jnp.zeros(4, int)).tolist() == [
        False,
        False,
        True,
        False,
    ]


def test_options_are_checked():
    with tiny.refused("label_smoothing", 1.5, allowed="float >= 0.0 and <= 1.0"):
        tables.check_options(losses.cross_entropy, dict(label_smoothing=1.5))
    with tiny.refused("", "temprature", closest="temperature"):
        tables.check_options(losses.cross_entropy, dict(temprature=1.0))
