"""Lp balls."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparsity_jax import tables, trees
from sparsity_jax.polytopes.ksparse import (
    KSparse,
    Mode,
    Number,
    check_radius,
    narrow,
    pulled,
    radius_of,
)
from sparsity_jax.trees import widen

__all__ = ["LpBall", "l2", "lp_ball"]

_STATIC = dict(static=True)  # a field that decides what is compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LpBall:
    """{||x||_p <= radius}. p: 1 or >= 2, `inf` included (1 < p < 2 is not supported); static.
    radius > 0.

    zero_up: the original's LMO for p = inf, which sends zero gradient entries to +radius instead of
        0.
    zero_below: of the LMO for p = 2, which gives zero for gradients of a norm up to this. The
        original's is 1e-10.
    """

    radius: Number
    p: float = dataclasses.field(metadata=_STATIC)
    zero_up: bool = dataclasses.field(default=False, metadata=_STATIC)
    zero_below: float = dataclasses.field(default=0.0, metadata=_STATIC)

    def __post_init__(self) -> None:
        if not (self.p == 1 or self.p >= 2):
            raise ValueError(f"p is {self.p}; allowed: 1, or 2 and above (inf included).")
        check_radius(self.radius)

    def lmo(self, gradient: Array) -> Array:
        """-radius times the dual unit vector of the gradient; a zero gradient gives zero."""
        if self.p == 1:
            return KSparse(1, self.radius).lmo(gradient)
        g = widen(gradient)
        radius = jnp.asarray(self.radius, g.dtype)
        if math.isinf(self.p) and self.zero_up:
            vertex = jnp.where(g > 0, -radius, radius)
        else:
            vertex = -radius * self._dual_unit_vector(g)
        return narrow(vertex, gradient.dtype)

    def _dual_unit_vector(self, g: Array) -> Array:
        """sign(g) (|g| / ||g||_q)^(q / p) with 1/p + 1/q = 1, for p >= 2.

        Its slope at zero entries is infinite for finite p > 2; there, its derivative is taken as 0.
        """
        if math.isinf(self.p):
            return jnp.sign(g)
        if self.p == 2:
            length = trees.norm(g)
            usable = length > self.zero_below
            return jnp.where(usable, g / jnp.where(usable, length, 1), 0)
        q = self.p / (self.p - 1)
        # keeps powers of small numbers from underflowing
        magnitude = jnp.abs(g / trees.scale_of(g))
        positive = magnitude > 0
        magnitude = jnp.where(positive, magnitude, 1)
        powers = jnp.where(positive, magnitude**q, 0)
        length = jnp.sum(powers) ** (1 / q)
        share = magnitude / length
        size = share ** (q / self.p)
        return jnp.where(positive, jnp.sign(g) * size, 0)

    def project(self, x: Array) -> Array:
        """Nearest point for p = 1, 2, inf; other p raise ValueError."""
        if self.p == 1:
            return KSparse(1, self.radius).project(x)
        if self.p == 2:
            return self.shift_inside(x)
        if math.isinf(self.p):
            wide = widen(x)
            radius = jnp.asarray(self.radius, wide.dtype)
            return narrow(jnp.clip(wide, -radius, radius), x.dtype)
        raise ValueError(f"no closed projection onto the L{self.p:g} ball; allowed p: 1, 2, inf.")

    def shift_inside(self, x: Array) -> Array:
        """x if feasible, else x scaled to the boundary."""
        length = self.norm(x)
        return pulled(x, length, self.radius, length > self.radius)

    pull_back = shift_inside

    def norm(self, x: Array) -> Array:
        """||x||_p, in at least float32; its derivative at zero is zero."""
        wide = widen(x)
        if self.p == 1:
            return trees.absolute_sum(wide)
        if self.p == 2:
            return trees.norm(wide)
        if math.isinf(self.p):
            return jnp.max(jnp.abs(wide), initial=0)
        scale = trees.scale_of(wide)
        powers = jnp.sum(jnp.abs(wide / scale) ** self.p)
        positive = powers > 0
        root = jnp.where(positive, powers, 1) ** (1 / self.p)
        return scale * jnp.where(positive, root, 0)

    def gauge(self, x: Array) -> Array:
        """||x||_p / radius, in at least float32."""
        return self.norm(x) / self.radius

    def diameter(self, size: int) -> Number:
        """2 radius size^(1/2 - 1/p) for p >= 2; 2 radius for p = 1."""
        return self.radius * _width(self.p, size)


def _width(p: float, size: int) -> float:
    """Diameter of the Lp unit ball of R^size."""
    return 2 * size ** max(0.5 - 1 / p, 0.0)


def lp_ball(
    size: int,
    norm: float,
    *,
    p: Any = 2.0,
    tau: tables.Positive = 15.0,
    mode: Mode = "initialization",
    zero_up: bool = False,
    zero_below: tables.NonNegative = 0.0,
) -> LpBall:
    """The Lp ball of one parameter array; p: 1, a number >= 2, or "inf". mode and tau as for
    `k_sparse`.

    zero_up, zero_below: rules of the original's LMO, see `LpBall`.
    """
    try:
        p = float(p)
        allowed = p == 1 or p >= 2
    except (TypeError, ValueError):
        allowed = False
    if not allowed:
        raise tables.ConfigError(f"constraint.p is {p!r}; allowed: 1, a number >= 2, or 'inf'.")
    radius = radius_of(tau, mode, norm, _width(p, size))
    return LpBall(radius, p, zero_up, zero_below)


def l2(
    size: int,
    norm: float,
    *,
    tau: tables.Positive = 15.0,
    mode: Mode = "initialization",
    zero_below: tables.NonNegative = 0.0,
) -> LpBall:
    """The Euclidean ball; tau and mode as for `k_sparse`, zero_below as for `lp_ball`."""
    return lp_ball(size, norm, p=2.0, tau=tau, mode=mode, zero_below=zero_below)
