"""Losses and accuracy of a batch, example by example, in at least float32; cross-entropy in
nats.
"""

import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax import tables, trees
from sparsity_jax.types import Config as ConfigDict

__all__ = [
    "CROSS_ENTROPY",
    "LOSSES",
    "Config",
    "correct",
    "cross_entropy",
    "mean_squared_error",
    "of",
]


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    label_smoothing: tables.Fraction = 0.0,
    temperature: tables.Positive = 1.0,
) -> Array:
    """Cross-entropy of every example: logits [..., classes] / temperature against int labels
    [...].
    """
    logits = trees.widen(logits) / temperature
    log_probabilities = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    if isinstance(label_smoothing, (int, float)) and label_smoothing == 0:
        return -chosen  # classes masked by logits of -inf have no mean
    return -(1 - label_smoothing) * chosen - label_smoothing * log_probabilities.mean(-1)


def mean_squared_error(logits: Array, labels: Array) -> Array:
    """Mean over classes of (logit - one-hot label)^2, of every example."""
    logits = trees.widen(logits)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.mean(jnp.square(logits - targets), -1)


def correct(logits: Array, labels: Array) -> Array:
    """Whether the largest logit is the label's, bool [...]; never where a logit is NaN."""
    unknown = jnp.isnan(logits).any(-1)
    right = jnp.argmax(logits, -1) == labels
    return right & ~unknown


LOSSES = {"cross_entropy": cross_entropy, "mean_squared_error": mean_squared_error}
Config = Annotated[dict, tables.Named(LOSSES)]
CROSS_ENTROPY = tables.Options(name="cross_entropy")


def of(loss: ConfigDict) -> Callable:
    """`(logits, labels) -> loss` of a config such as `dict(name="cross_entropy")`, per example.

    Raises ConfigError for an unknown name or option.
    """
    name, options = tables.entry(LOSSES, loss, "cross_entropy")
    return functools.partial(LOSSES[name], **options)
