"""Feasible sets for Frank-Wolfe training: K-sparse polytopes, Lp balls and the whole space.

A set is a small immutable value, a pytree whose numbers (`k`, `radius`) may be traced. It acts on
one array:

    lmo(gradient)    the vertex (or boundary point) v of the set that minimises <v, gradient>
    project(x)       the point of the set nearest to x
    shift_inside(x)  x itself if feasible, else a feasible multiple of x (the original's start:
                     radial, not nearest)
    gauge(x)         smallest t >= 0 by which the set must be multiplied to hold x: feasible up to 1
    pull_back(x)     a feasible point near x, cheap, for x that rounding took out of the set
    diameter(size)   largest Euclidean distance of two points of the set in R^size

Sources: Pokutta, Spiegel, Zimmer 2020, arXiv:2010.07243 (sets and LMOs); Miao et al., ICLR 2022
    (K-sparse training).
"""

from sparsity_jax.polytopes.balls import LpBall, l2, lp_ball
from sparsity_jax.polytopes.ksparse import KSparse, k_sparse
from sparsity_jax.polytopes.sets import (
    SETS,
    Config,
    ConstraintSet,
    Rule,
    Unconstrained,
    broadcast,
    build,
    check,
    for_params,
    is_set,
    map_arrays,
    map_together,
    mean_norms,
    outside,
    project_all,
    settled,
    shift_inside,
    vertices,
)

__all__ = [
    "SETS",
    "Config",
    "ConstraintSet",
    "KSparse",
    "LpBall",
    "Rule",
    "Unconstrained",
    "broadcast",
    "build",
    "check",
    "for_params",
    "is_set",
    "k_sparse",
    "l2",
    "lp_ball",
    "map_arrays",
    "map_together",
    "mean_norms",
    "outside",
    "project_all",
    "settled",
    "shift_inside",
    "vertices",
]
