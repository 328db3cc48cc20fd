"""Weights changed without training: those left by pruning drawn anew, noise on weights.

    params = surgery.reinitialize(params, masks, key)                    # before fine-tuning
    noisy = surgery.add_noise(params, key, std=0.1, relative=True, pattern=".*/kernel")

Both work under jit and vmap.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import groups, kernels, masks, tables, trees
from sparsity_jax.precision import FULL
from sparsity_jax.types import Fields, PyTree

__all__ = ["METHODS", "add_noise", "normal", "orthogonal", "reinitialize"]


def normal(key: Array, mask: Array, dtype: Any) -> Array:
    """N(0, 2 / fan_in), which is right for ReLU. mask: [..., in, out].

    Source: He et al. 2015, arXiv:1502.01852.
    """
    rows, _ = _kept(mask)
    fan_in = jnp.maximum(rows.sum(), 1)
    std = 2**0.5 / jnp.sqrt(fan_in)
    gaussian = jax.random.normal(key, mask.shape, dtype)
    return std.astype(dtype) * gaussian


def orthogonal(key: Array, mask: Array, dtype: Any) -> Array:
    """A random matrix [fan_in, out] of orthonormal columns, or rows where fewer inputs than outputs
    stay.

    Uniform (Haar) among them: the polar factor of a Gaussian matrix. Weights missing inside the
    matrix make it less than orthogonal. Every device makes it whole: all columns depend on each
    other, and what a square matrix would need to be made in shares, its Gram matrix, is as large.
    mask: [..., in, out]. Source: Saxe et al. 2014, arXiv:1312.6120.
    """
    rows, columns = _kept(mask)
    kept = rows[:, None] & columns
    wide = jnp.promote_types(dtype, jnp.float32)
    gaussian = jax.random.normal(key, kept.shape, wide)
    gaussian = trees.gathered(jnp.where(kept, gaussian, 0))
    left, _, right = jnp.linalg.svd(gaussian, full_matrices=False)
    rank = jnp.minimum(rows.sum(), columns.sum())  # the singular values behind it are zero
    nonzero = jnp.arange(left.shape[1]) < rank
    polar = jnp.matmul(left * nonzero, right, precision=FULL)
    return polar.reshape(mask.shape).astype(dtype)


def _kept(mask: Array) -> tuple:
    """Inputs (bool [fan_in]: every position of a kept channel) and outputs (bool [out]) of the
    compact kernel.
    """
    flat = mask.reshape(-1, *mask.shape[-2:])
    inputs = trees.gathered(flat.any((0, 2)))
    outputs = flat.any((0, 1))
    return jnp.tile(inputs, len(flat)), outputs


METHODS = {"normal": normal, "orthogonal": orthogonal}


def reinitialize(
    params: PyTree,
    kept: PyTree,
    key: Array,
    *,
    method: str = "normal",
    channels: groups.Channels | None = None,
    layout: kernels.Layout | None = None,
) -> PyTree:
    """`params` as if drawn anew: kernels by `method`, scales of norms 1, biases 0; zero where
    `kept` is False.

    kept: masks in the structure of `params`. A kernel's fan-in is what it has in the compact
    network: positions times input channels with any weight left, so that single missing weights do
    not lower it. channels, layout: which arrays are kernels, and which of their axes are inputs and
    outputs; see `kernels.axes`. Norms and biases go by the names of Flax, Haiku, Equinox and
    PyTorch; other arrays stay as they are. Running statistics are not in `params`: start them anew
    too. Of arrays that devices have shares of, `orthogonal` makes one kernel at a time whole on
    every device, `normal` none. Raises ConfigError for an unknown method and ValueError where it is
    open what the kernels are, or their layout.
    """
    draw: Callable = tables.lookup(METHODS, method, "method")
    paths = kernels.paths(params, channels, strict=False)
    axes = kernels.axes(params, paths, channels, layout=layout)
    keys = _keys(key, params)

    def renewed(path: str, leaf: Array, mask: Array) -> Array:
        name = trees.last_name(path)
        if path in axes:
            of_kernel = functools.partial(draw, dtype=leaf.dtype)
            mask = jnp.asarray(mask)
            drawn = _drawn(of_kernel, keys[path], mask, axes[path])
            return trees.divided_like(drawn, leaf)
        if name in ("bias", "b", "offset"):
            return trees.zeros_like(leaf)
        if name in ("scale", "weight"):
            return trees.divided_like(jnp.ones_like(leaf), leaf)
        return leaf

    return masks.apply(trees.map_named(renewed, params, kept), kept)


def _keys(key: Array, params: PyTree) -> Fields:
    """A key for each array, by path."""
    paths = trees.named_leaves(params)
    keys = jax.random.split(key, len(paths))
    return dict(zip(paths, keys))


def _drawn(draw: Callable, key: Array, mask: Array, axes: kernels.Axes) -> Array:
    """`draw(key, mask)` of a kernel laid out in any way; each kernel of a stack on its own."""
    window, inputs, outputs = map(list, (axes.window, axes.inputs, axes.outputs))
    inner = window + inputs + outputs
    stack = np.delete(range(mask.ndim), inner)
    order = [*stack, *inner]
    ordered = mask.transpose(order)
    sizes = np.array(mask.shape)
    fan_in = sizes[inputs].prod()
    fan_out = sizes[outputs].prod()
    flat = ordered.reshape(-1, *sizes[window], fan_in, fan_out)
    if stack.size:
        keys = jax.random.split(key, len(flat))
        drawn = jax.vmap(draw)(keys, flat)
    else:
        drawn = draw(key, flat[0])
    back = np.argsort(order)
    return drawn.reshape(ordered.shape).transpose(back)


def add_noise(
    params: PyTree,
    key: Array,
    *,
    std: float | Array,
    relative: bool = False,
    pattern: str = ".*",
    kept: PyTree | None = None,
) -> PyTree:
    """Gaussian noise added to the arrays whose whole path matches `pattern`, where the masks `kept`
    (if any) are True.

    std: of the noise, or with `relative` of that over the root mean square of each array's kept
    entries; may be traced. Raises ConfigError for a bad pattern and if nothing matches.
    """
    matched = trees.matching(params, pattern)
    keys = _keys(key, params)

    def disturbed(path: str, leaf: Array, mask: Array) -> Array:
        if not matched[path]:
            return leaf
        size = jnp.asarray(std)
        if relative:
            norm = trees.norm(jnp.where(mask, leaf, 0))
            entries = jnp.maximum(jnp.sum(mask), 1)
            size = std * (norm / jnp.sqrt(entries))
        noise = jax.random.normal(keys[path], leaf.shape, leaf.dtype)
        return jnp.where(mask, leaf + size.astype(leaf.dtype) * noise, leaf)

    if kept is None:
        kept = masks.full(params)
    return trees.map_named(disturbed, params, kept)
