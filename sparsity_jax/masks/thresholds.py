"""The k-th largest score itself, and masks of other kinds: random ones, those of zeros."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sparsity_jax import platforms, trees
from sparsity_jax.masks import search
from sparsity_jax.masks.order import Ranking, common_type
from sparsity_jax.masks.search import Count
from sparsity_jax.masks.select import k_largest_mask
from sparsity_jax.types import PyTree

__all__ = ["kth_largest", "nonzero", "random_mask"]


def kth_largest(scores: PyTree, k: Count, *, magnitude: bool = False) -> Array:
    """The k-th largest of all entries of `scores`, exactly.

    scores: an array or a tree of arrays of floats, any shapes; NaN counts as smallest, subnormals
    of float32 and float64 as zero.
    k: int in 1..n, or an integer array of any shape (several answers in one pass); may be traced,
        then it is clipped.
    magnitude: rank, and return, absolute values without computing them first.
    Its derivative is that of the entry it returns, of equal ones their mean.
    Returns an array of k's shape and the scores' type. Raises ValueError for empty scores, a k
    outside 1..n and, outside `jit`, NaN; TypeError for scores that are no floats.
    """
    return _kths(scores, search.checked_count(scores, k, lowest=1), magnitude=magnitude)


@functools.partial(platforms.compiled, static_argnames="magnitude")
def _kths(scores: PyTree, k: Array, magnitude: bool) -> Array:
    leaves = [jnp.asarray(leaf) for leaf in tree_leaves(scores)]
    leaves = [leaf for leaf in leaves if leaf.size]
    kth = lambda k: _kth(leaves, k, magnitude)
    if not k.ndim:
        return kth(k)
    return jax.vmap(kth)(k.ravel()).reshape(k.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kth(leaves: list[Array], k: Array, magnitude: bool) -> Array:
    ranking = Ranking(common_type(leaves), magnitude)
    wanted = jnp.clip(k, 1, trees.size(leaves))
    (threshold,) = search.kth_keys([leaves], [wanted], magnitude)

    def size_if_kept(leaf: Array) -> Array:
        kept = ranking.at_least(leaf, threshold) & ~jnp.isnan(leaf)
        return jnp.where(kept, ranking.size(leaf), jnp.inf)

    def is_number(leaf: Array) -> Array:
        known = ~jnp.isnan(leaf)
        return known.astype(jnp.int32)

    lowest = []
    numbers = jnp.zeros((), jnp.int32)
    for leaf in leaves:
        part = trees.fold(jnp.minimum, jnp.min, size_if_kept, leaf)
        lowest.append(part)
        numbers += trees.fold_sum(is_number, leaf)
    least = functools.reduce(jnp.minimum, lowest)
    key = ranking.key(least)
    value = jnp.where(key == 0, 0, ranking.bound(key))  # without subnormals
    value = jnp.where(numbers >= k, value, jnp.nan)
    return value.astype(jnp.result_type(*leaves))


@_kth.defjvp
def _kth_derivative(magnitude: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """That of the entry which is the k-th largest; the mean of those of equal ones."""
    leaves, k = primals
    value = _kth(leaves, k, magnitude)
    number = change = jnp.zeros(())
    for leaf, tangent in zip(leaves, tangents[0]):
        sign = jnp.sign(leaf) if magnitude else jnp.ones_like(leaf)
        hit = leaf == sign * value
        changes = jnp.where(hit, sign * tangent, 0)
        number += jnp.sum(hit)
        change += jnp.sum(changes)
    mean = change / jnp.maximum(number, 1)
    return value, mean.astype(value.dtype)


def random_mask(tree: PyTree, k: Count, key: Array, *, before: PyTree | None = None) -> PyTree:
    """True on exactly `k` entries of `tree`, drawn uniformly; of those that a mask `before` leaves
    out only if it must.

    before: in the structure of `tree`.
    """
    leaves, structure = tree_flatten(tree)
    keys = jax.random.split(key, len(leaves))
    uniform = []
    for own, leaf in zip(keys, leaves):
        drawn = jax.random.uniform(own, leaf.shape)
        uniform.append(trees.divided_like(drawn, leaf))
    scores = tree_unflatten(structure, uniform)
    if before is not None:
        behind = lambda score, kept: jnp.where(kept, score, score - 1)
        scores = tree_map(behind, scores, before)
    return k_largest_mask(scores, k)


def nonzero(params: PyTree) -> PyTree:
    """Masks of what is left of a pruned network: True where a kernel is not zero, and in all other
    arrays.
    """

    def mask(path: str, leaf: Array) -> Array:
        if trees.is_kernel(path):
            return jnp.asarray(leaf) != 0
        return trees.divided_like(jnp.ones(leaf.shape, bool), leaf)

    return trees.map_named(mask, params)
