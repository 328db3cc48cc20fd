"""How much of a network is left when every channel group keeps half of its channels."""

import functools

import numpy as np

from sparsity_jax import groups, trees
from sparsity_jax.types import Arrays


def half(size: int) -> int:
    return max(1, size // 2)


def best_share(maker: functools.partial) -> float:
    """Parameters of the network with half of every size that can shrink, over those of all.

    maker: its keywords are these sizes; it returns (apply, variables, inputs).
    """
    sizes = {name: half(size) for name, size in maker.keywords.items()}
    _, variables, _ = maker()
    _, small, _ = maker.func(*maker.args, **sizes)
    return trees.size(small) / trees.size(variables)


def first_half(channels: groups.Channels) -> Arrays:
    """Which channels stay, by group."""
    return {name: np.arange(size) < half(size) for name, size in channels.sizes.items()}


def share_left(channels: groups.Channels) -> float:
    """Of all parameters, when every group keeps its first half."""
    small = groups.compact_shapes(channels, first_half(channels))
    return trees.size(small) / trees.size(channels.shapes)
