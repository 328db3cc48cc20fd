"""Feasible sets for Frank-Wolfe training: K-sparse polytopes, Lp balls and the whole space.

A set is a small immutable value, a pytree whose numbers (`k`, `radius`) may be traced. It acts on
one array:

    lmo(gradient)    the vertex (or boundary point) v of the set that minimises <v, gradient>
    project(x)       the point of the set nearest to x
    shift_inside(x)  x itself if feasible, else a feasible multiple of x (the original's start:
                     radial, not nearest)
    pull_back(x)     a feasible point near x, cheap, for x that rounding took out of the set
    diameter(size)   largest Euclidean distance of two points of the set in R^size

Sources: Pokutta, Spiegel, Zimmer 2020, arXiv:2010.07243 (sets and LMOs); Miao et al., ICLR 2022
    (K-sparse training).
"""

from sparsity_jax.polytopes.balls import LpBall as LpBall
from sparsity_jax.polytopes.balls import l2 as l2
from sparsity_jax.polytopes.balls import lp_ball as lp_ball
from sparsity_jax.polytopes.ksparse import KSparse as KSparse
from sparsity_jax.polytopes.ksparse import k_sparse as k_sparse
from sparsity_jax.polytopes.sets import SETS as SETS
from sparsity_jax.polytopes.sets import Config as Config
from sparsity_jax.polytopes.sets import ConstraintSet as ConstraintSet
from sparsity_jax.polytopes.sets import Rule as Rule
from sparsity_jax.polytopes.sets import Unconstrained as Unconstrained
from sparsity_jax.polytopes.sets import broadcast as broadcast
from sparsity_jax.polytopes.sets import build as build
from sparsity_jax.polytopes.sets import check as check
from sparsity_jax.polytopes.sets import is_set as is_set
from sparsity_jax.polytopes.sets import map_arrays as map_arrays
from sparsity_jax.polytopes.sets import mean_norms as mean_norms
from sparsity_jax.polytopes.sets import settled as settled
from sparsity_jax.polytopes.sets import shift_inside as shift_inside
