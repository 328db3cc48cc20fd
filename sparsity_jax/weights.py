"""Weights of PyTorch in a run: networks that start with them, and what it tells of them."""

from sparsity_jax import pretrained
from sparsity_jax.tables import within
from sparsity_jax.train import Problem
from sparsity_jax.trees import named_leaves
from sparsity_jax.types import Config

__all__ = ["starting_with", "told"]


def starting_with(problem: Problem, common: Config) -> Problem:
    """The problem whose networks start with the arrays of `config.pretrained`, without its
    classifier if that is to be fresh.
    """
    like = problem.shapes()
    state_dict = pretrained.read(common["pretrained"])
    with within("config.pretrained"):
        variables = pretrained.to_variables(
            state_dict,
            like,
            names=common["pretrained_names"],
            fresh=pretrained.CLASSIFIER if common["fresh_classifier"] else "",
            image_channels=problem.image(1).shape[-1],
        )
    fresh = named_leaves(like)
    leaves = named_leaves(variables)
    given = {path: leaf for path, leaf in leaves.items() if leaf is not fresh[path]}
    keep = common["pretrained_zeros"] == "keep"
    return problem._replace(pretrained=problem.divide(given), keep_zeros=keep)


def told(problem: Problem) -> str:
    """How many of the weights are zero, and what becomes of them."""
    zeros, size = pretrained.count_zeros(problem.pretrained)
    text = f"{zeros:,} of {size:,} weights are zero"
    if not zeros:
        return text
    if problem.keep_zeros:
        return f"{text}; masked, they stay zero"
    return f"{text}; training moves them (config.pretrained_zeros)"
