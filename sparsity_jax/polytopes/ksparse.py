"""The K-sparse polytope, and what all sets share: how they get their radius and scale points."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax import masks, tables, trees
from sparsity_jax.polytopes import inside
from sparsity_jax.trees import widen

__all__ = [
    "KSparse",
    "Mode",
    "Number",
    "check_radius",
    "k_sparse",
    "narrow",
    "project_k_sparse",
    "pulled",
    "radius_of",
]

Mode = Literal["initialization", "diameter", "radius"]
Number = float | Array


def check_radius(radius: Any) -> None:
    """Raises ValueError for a known radius that is not above 0."""
    if isinstance(radius, (int, float)) and not radius > 0:
        raise ValueError(f"radius is {radius}; allowed: above 0.")


def radius_of(tau: float, mode: Mode, norm: float, scale: float) -> float:
    """The radius of a set whose diameter is `scale` times its radius."""
    tables.convert(mode, Mode, "mode")
    if mode == "radius":
        return tau
    if mode == "initialization":
        tau = 2 * tau * (norm if norm > 0 else 1.0)
    return tau / scale


def narrow(x: Number, dtype: Any) -> Any:
    """`x` in a type that may be narrower: rounded, and never beyond its largest number."""
    if jnp.result_type(x) == dtype:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def pulled(x: Array, length: Array, target: Number, outside: Array) -> Array:
    """`x` of norm `length`, scaled to the norm `target` where it is `outside`."""
    wide = widen(x)
    target = jnp.asarray(target, wide.dtype)
    scaled = target * (wide / jnp.where(outside, length, 1))
    return jnp.where(outside, narrow(scaled, x.dtype), x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KSparse:
    """Convex hull of the vectors with at most `k` non-zero entries, each +-`radius`.

    Equals {||x||_1 <= k radius} and {||x||_inf <= radius}. k >= 1, more than the array's size
    counts as its size; radius > 0.
    """

    k: int | Array
    radius: Number

    def __post_init__(self) -> None:
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k is {self.k}; allowed: 1 and above.")
        check_radius(self.radius)

    def support(self, size: int) -> Any:
        """k of an array of `size` entries."""
        if isinstance(self.k, int):
            return min(self.k, size)
        return jnp.minimum(self.k, size)

    def lmo(self, gradient: Array) -> Array:
        """-radius * sign on the k entries of largest magnitude (ties: lower flat index), 0
        elsewhere and for sign 0.

        Constant in the gradient, to derivatives too.
        """
        if not gradient.size:
            return gradient
        mask = masks.k_largest_mask(gradient, self.support(gradient.size), magnitude=True)
        return self.vertex(gradient, mask)

    def vertex(self, gradient: Array, mask: Array) -> Array:
        """`lmo` where the mask of the entries of largest magnitude is known."""
        radius = narrow(self.radius, gradient.dtype)
        return jnp.where(mask, -radius * jnp.sign(gradient), 0)

    def project(self, x: Array) -> Array:
        """sign(x) * clip(|x| - t, 0, radius) with the smallest t >= 0 whose L1 norm is at most k *
        radius.

        That is the KKT point of the projection, exact but for rounding whatever the range of x. Its
        derivative is the exact one wherever there is one.
        """
        return project_k_sparse([self], [x])[0]

    def shift_inside(self, x: Array) -> Array:
        """x if feasible, else x scaled to L1 norm f * radius with f = min(floor(||x||_1 /
        ||x||_inf), k).

        The floor tolerates rounding: n equal entries give n (the original's floating-point floor
        may give n - 1).
        """
        wide = widen(x)
        length = trees.absolute_sum(wide)
        largest = jnp.max(jnp.abs(wide), initial=0)
        outside = (length > self.radius * self.k) | (largest > self.radius)
        ratio = jnp.where(outside, length, 1) / jnp.where(outside, largest, 1)
        tolerance = 8 * jnp.finfo(wide.dtype).eps
        entries = jnp.floor(ratio * (1 + tolerance))
        factor = jnp.minimum(entries, self.k)
        return pulled(x, length, factor * self.radius, outside)

    def pull_back(self, x: Array) -> Array:
        """A point of the set near x, for x a rounding outside: cut at the radius, then scaled to
        the L1 norm.
        """
        clipped = jnp.clip(x, -self.radius, self.radius)
        length = trees.absolute_sum(clipped)
        budget = self.radius * self.support(x.size)
        return pulled(clipped, length, budget, length > budget)

    def gauge(self, x: Array) -> Array:
        """The larger of ||x||_1 / (k radius) and ||x||_inf / radius, in at least float32."""
        wide = widen(x)
        peak = functools.partial(jnp.max, initial=0)
        largest = trees.fold(jnp.maximum, peak, jnp.abs, wide)
        share = trees.absolute_sum(wide) / self.support(x.size)
        return jnp.maximum(share, largest) / self.radius

    def diameter(self, size: int) -> Array:
        """2 radius sqrt(k)."""
        k = jnp.asarray(self.support(size), float)
        return 2 * self.radius * jnp.sqrt(k)


def project_k_sparse(sets: Sequence[KSparse], points: Sequence[Array]) -> list[Array]:
    """`project` of each point onto its set; on an accelerator they are searched together."""
    wide = [widen(x) for x in points]
    radii = [jnp.asarray(s.radius, x.dtype) for s, x in zip(sets, wide)]
    counts = [s.support(x.size) for s, x in zip(sets, wide)]
    budgets = [count * radius for count, radius in zip(counts, radii)]
    nearest = inside.nearest_k_sparse(wide, budgets, radii)
    return [narrow(inner, x.dtype) for inner, x in zip(nearest, points)]


def k_sparse(
    size: int,
    norm: float,
    *,
    k: tables.Index = 10,
    k_frac: tables.Fraction = 0.05,
    tau: tables.Positive = 15.0,
    mode: Mode = "initialization",
) -> KSparse:
    """The K-sparse polytope of one parameter array of `size` entries whose mean initial L2 norm is
    `norm`.

    k = min(max(k, floor(k_frac * size)), size), where the decimal k_frac counts: 0.29 of 100 are
    29; 0 switches either off. mode: `initialization` gives the diameter 2 tau norm (norm 0 counts
    as 1), `diameter` and `radius` take tau itself. Raises ConfigError if k comes out as 0.
    """
    share = masks.count_of(k_frac, size, rounding="floor")
    kept = min(max(k, share), size)
    if kept < 1:
        raise tables.ConfigError(
            f"constraint.k={k} and k_frac={k_frac} select no entry of an array of {size}; raise "
            "one."
        )
    scale = 2 * math.sqrt(kept)
    return KSparse(kept, radius_of(tau, mode, norm, scale))
