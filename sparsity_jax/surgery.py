"""Weights changed without training: those left by pruning drawn anew, noise on weights.

    params = surgery.reinitialize(params, masks, key)                    # before fine-tuning
    noisy = surgery.add_noise(params, key, std=0.1, relative=True, pattern=".*/kernel")

Kernels are laid out as Flax's, [..., in, out]. Both work under jit and vmap.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsity_jax import masks, tables, trees

PyTree = Any


def normal(key: jax.Array, mask: jax.Array, dtype: Any, *, gain: float = 2**0.5) -> jax.Array:
    """N(0, gain^2 / fan_in); the gain is right for ReLU. Source: He et al. 2015, arXiv:1502.01852."""
    rows, _ = _kept(mask)
    return jax.random.normal(key, mask.shape, dtype) * (gain / jnp.sqrt(jnp.maximum(rows.sum(), 1))).astype(dtype)


def orthogonal(key: jax.Array, mask: jax.Array, dtype: Any, *, gain: float = 1.0) -> jax.Array:
    """`gain` times a random matrix [fan_in, out] of orthonormal columns, or rows where fewer inputs than outputs stay.

    Uniform (Haar) among them: the polar factor of a Gaussian matrix. Weights missing inside the matrix make it less
    than orthogonal. Source: Saxe et al. 2014, arXiv:1312.6120.
    """
    rows, columns = _kept(mask)
    gaussian = jax.random.normal(key, (rows.size, columns.size), jnp.promote_types(dtype, jnp.float32))
    left, _, right = jnp.linalg.svd(jnp.where(rows[:, None] & columns, gaussian, 0), full_matrices=False)
    rank = jnp.minimum(rows.sum(), columns.sum())  # the singular values behind it are zero
    return (gain * (left * (jnp.arange(left.shape[1]) < rank)) @ right).reshape(mask.shape).astype(dtype)


def _kept(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs (bool [fan_in]: every position of a kept channel) and outputs (bool [out]) of the compact kernel."""
    channels = mask.any(tuple(axis for axis in range(mask.ndim) if axis != mask.ndim - 2))
    rows = jnp.broadcast_to(channels[:, None], (*mask.shape[:-1], 1)).ravel()
    return rows, mask.any(tuple(range(mask.ndim - 1)))


METHODS = {"normal": normal, "orthogonal": orthogonal}


def reinitialize(
    params: PyTree, kept: PyTree, key: jax.Array, *, method: str = "normal", gain: float | None = None
) -> PyTree:
    """`params` as if drawn anew: kernels by `method`, scales of norms 1, biases 0; zero where `kept` is False.

    kept: masks in the structure of `params`. A kernel's fan-in is what it has in the compact network: positions times
    input channels with any weight left, so that single missing weights do not lower it. gain: of the kernels, by
    default that of the row of METHODS. Other arrays stay as they are; running statistics are not in `params`: start
    them anew too. Raises ConfigError for an unknown method.
    """
    draw: Callable = tables.lookup(METHODS, method, "method")
    options = {} if gain is None else {"gain": gain}
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))

    def one(path: str, leaf: jax.Array, mask: jax.Array) -> jax.Array:
        own, name = next(keys), path.removesuffix("/value").rpartition("/")[2].strip(".[]'\"")
        if trees.is_kernel(path) and leaf.ndim > 1:
            return draw(own, jnp.asarray(mask), leaf.dtype, **options)
        if name == "bias":
            return jnp.zeros_like(leaf)
        return jnp.ones_like(leaf) if name in ("scale", "weight") else leaf

    return masks.apply(trees.map_named(one, params, kept), kept)


def add_noise(
    params: PyTree,
    key: jax.Array,
    *,
    std: float | jax.Array,
    relative: bool = False,
    pattern: str = ".*",
    kept: PyTree | None = None,
) -> PyTree:
    """Gaussian noise added to the arrays whose whole path matches `pattern`, where the masks `kept` (if any) are True.

    std: of the noise, or with `relative` of that over the root mean square of each array's kept entries; may be traced.
    Raises ConfigError for a bad pattern and if nothing matches.
    """
    chosen = trees.matching(params, pattern)
    keys = iter(jax.random.split(key, len(chosen)))

    def one(path: str, leaf: jax.Array, mask: jax.Array) -> jax.Array:
        own = next(keys)
        if not chosen[path]:
            return leaf
        root_mean_square = trees.norm(jnp.where(mask, leaf, 0)) / jnp.sqrt(jnp.maximum(jnp.sum(mask), 1))
        size = std * root_mean_square if relative else jnp.asarray(std)
        return jnp.where(mask, leaf + size.astype(leaf.dtype) * jax.random.normal(own, leaf.shape, leaf.dtype), leaf)

    return trees.map_named(one, params, masks.full(params) if kept is None else kept)
