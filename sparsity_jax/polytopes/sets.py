"""The whole space, trees of sets, and sets from configs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sparsity_jax import masks, platforms, tables, trees
from sparsity_jax.polytopes import balls, inside
from sparsity_jax.polytopes.ksparse import KSparse, k_sparse, project_k_sparse
from sparsity_jax.types import PyTree

__all__ = [
    "SETS",
    "Config",
    "ConstraintSet",
    "Rule",
    "Unconstrained",
    "broadcast",
    "build",
    "check",
    "for_params",
    "is_set",
    "map_arrays",
    "map_together",
    "mean_norms",
    "outside",
    "project_all",
    "settled",
    "shift_inside",
    "unconstrained",
    "vertices",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """The whole space: no LMO; optimizers take their gradient step instead."""

    def project(self, x: Array) -> Array:
        """x itself, as it is feasible."""
        return x

    shift_inside = pull_back = project

    def diameter(self, size: int) -> float:
        """Infinite."""
        del size
        return math.inf


ConstraintSet = KSparse | balls.LpBall | Unconstrained


def is_set(x: Any) -> bool:
    """Whether `x` is a feasible set (for `is_leaf=`)."""
    return isinstance(x, ConstraintSet)


def broadcast(sets: PyTree, params: PyTree) -> PyTree:
    """One set per parameter array: a single set serves all of them, a tree has their paths
    (`trees.aligned`).
    """
    if is_set(sets):
        return tree_map(lambda _: sets, params)
    return trees.aligned(sets, params, "sets", is_leaf=is_set)


def map_arrays(function: Callable, sets: PyTree, params: PyTree, *rest: PyTree) -> PyTree:
    """`function(set, w, *rest)` of every parameter array `w`; empty arrays stay as they are."""
    of_array = lambda s, w, *others: function(s, w, *others) if w.size else w
    return tree_map(of_array, broadcast(sets, params), params, *rest, is_leaf=is_set)


def map_together(
    function: Callable, free: Callable, sets: PyTree, params: PyTree, *rest: PyTree
) -> PyTree:
    """`function(sets, ws, *rests)` of lists of all constrained arrays, laid out as the platform
    likes, and `free(w, *rest)` of every other one, empty ones included.
    """
    leaves, structure = tree_flatten(params)
    set_of = tree_leaves(broadcast(sets, params), is_leaf=is_set)
    columns = [leaves, *map(tree_leaves, rest)]
    results = {}
    bound = []
    for i, w in enumerate(leaves):
        if w.size and not isinstance(set_of[i], Unconstrained):
            bound.append(i)
        else:
            results[i] = free(*[column[i] for column in columns])
    own_sets = [set_of[i] for i in bound]
    own = [[column[i] for i in bound] for column in columns]
    if bound:
        moved = platforms.per_platform(lambda *lists: function(own_sets, *lists), *own)
        results |= zip(bound, moved)
    return tree_unflatten(structure, [results[i] for i in range(len(leaves))])


def vertices(sets: Sequence[Any], gradients: Sequence[Array]) -> list[Array]:
    """`lmo` of each gradient; those of K-sparse polytopes are searched together."""
    polytopes = {i: _as_k_sparse(s) for i, s in enumerate(sets)}
    sparse = {i: s for i, s in polytopes.items() if s is not None and gradients[i].size}
    found: dict[int, Array] = {}
    if sparse:
        ks = [s.support(gradients[i].size) for i, s in sparse.items()]
        own = [gradients[i] for i in sparse]
        found = dict(zip(sparse, masks.k_largest_masks(own, ks, magnitude=True)))
    return [
        sparse[i].vertex(gradient, found[i]) if i in sparse else sets[i].lmo(gradient)
        for i, gradient in enumerate(gradients)
    ]


def project_all(sets: Sequence[Any], points: Sequence[Array]) -> list[Array]:
    """`project` of each point; those onto K-sparse polytopes are searched together."""
    polytopes = {i: _as_k_sparse(s) for i, s in enumerate(sets)}
    sparse = {i: s for i, s in polytopes.items() if s is not None}
    own = [points[i] for i in sparse]
    found = dict(zip(sparse, project_k_sparse(list(sparse.values()), own))) if sparse else {}
    return [found[i] if i in sparse else sets[i].project(x) for i, x in enumerate(points)]


def _as_k_sparse(s: Any) -> KSparse | None:
    """The set as a K-sparse polytope, which the L1 ball is too; None if it is none."""
    if isinstance(s, balls.LpBall) and s.p == 1:
        return KSparse(1, s.radius)
    return s if isinstance(s, KSparse) else None


def shift_inside(params: PyTree, sets: PyTree) -> PyTree:
    """`shift_inside` of every parameter array into its own set."""
    return map_arrays(lambda s, x: s.shift_inside(x), sets, params)


def outside(sets: PyTree, params: PyTree) -> Array:
    """Whether some parameter array is outside its set, of which its `gauge` tells.

    Rounding does not count: a gauge up to 1.001 is inside, and in bfloat16 up to 1.016, which is
    two roundings.
    """

    def of_bound(sets: Sequence[Any], ws: Sequence[Array]) -> list[Array]:
        tolerances = [max(1e-3, 2 * float(jnp.finfo(w.dtype).eps)) for w in ws]
        return [s.gauge(w) > 1 + rest for s, w, rest in zip(sets, ws, tolerances)]

    beyond = map_together(of_bound, lambda _: jnp.zeros((), bool), sets, params)
    return jnp.any(jnp.array(tree_leaves(beyond), bool))


def settled(constraint: ConstraintSet, w: Array, update: Array) -> Array:
    """`update` in the type of the weights `w`, so that they stay in the set.

    In float32 or wider a step inside the set ends inside it; see `inside.settled` for other types.
    """
    if jnp.finfo(w.dtype).bits < 32:
        return inside.settled(constraint, w, update)
    return update.astype(w.dtype)


# From configuration to sets -----------------------------------------------------------------------


def unconstrained(size: int, norm: float) -> Unconstrained:
    """The whole space."""
    del size, norm
    return Unconstrained()


SETS: dict[str, Callable] = {
    "k_sparse": k_sparse,
    "lp": balls.lp_ball,
    "l2": balls.l2,
    "unconstrained": unconstrained,
}
Config = Annotated[dict, tables.Named(SETS)]
Rule = tuple[str, str, dict]  # pattern of paths, name of the set, its options


def check(constraint: dict) -> tuple[Rule, ...]:
    """The rules of a config `dict(name="k_sparse", rules=((pattern, dict), ...), **options)`.

    `rules` overrides single parameters, e.g. `((".*/(bias|scale)", dict(name="unconstrained")),)`:
    first match wins, everything else follows the outer name and options. Raises ConfigError as
    `tables.check_options` does.
    """
    outer = dict(constraint)
    given = outer.pop("rules", ())
    overrides = tables.convert(given, tuple[tuple[str, dict], ...], "rules")
    rules = []
    for i, (pattern, config) in enumerate(overrides):
        with tables.within(f"rules[{i}]"):
            rules.append(_rule(pattern, config))
    return (*rules, _rule(".*", outer))


def _rule(pattern: str, config: dict) -> Rule:
    name, options = tables.entry(SETS, config, "k_sparse")
    SETS[name](2**20, 1.0, **options)  # raises for options that do not go together
    return pattern, name, options


def build(params: PyTree, norms: PyTree, rules: Sequence[Rule]) -> PyTree:
    """The set of every parameter array.

    params: arrays or shape structs. norms: mean initial L2 norm of each (`mean_norms`), same
        structure.
    rules: from `check`. Raises ConfigError for a rule that decides no parameter.
    """
    numbered = [(pattern, i) for i, (pattern, _, _) in enumerate(rules)]
    with tables.within("constraint.rules"):
        indices = trees.match_rules(params, numbered)

    def set_of(leaf: Any, norm: float, index: int) -> ConstraintSet:
        _, name, options = rules[index]
        return SETS[name](math.prod(leaf.shape), float(norm), **options)

    return tree_map(set_of, params, norms, indices)


def for_params(
    params: PyTree,
    key: Array | None = None,
    *,
    init: Callable | None = None,
    draws: int = 100,
    **constraint: Any,
) -> PyTree:
    """The feasible set of every parameter array, as a run makes them; not traceable.

    params: arrays at their initial values. constraint: the fields of `constraint` in a config, by
    default a K-sparse polytope for every array: name, its options such as k_frac and tau, and rules
    for some arrays, e.g. `rules=((".*bias", dict(name="unconstrained")),)`; see `check`.
    The diameter of a set is 2 tau times the L2 norm of its initial array, or 2 tau where that is
    0; other modes are those of `k_sparse`. Source: Pokutta et al. 2020, arXiv:2010.07243.
    key, init: the mean norm over `draws` initialisations `init(key) -> params` instead, which is
    what a run takes. Raises ConfigError for a wrong constraint, ValueError for one of both alone.
    """
    if (key is None) != (init is None):
        missing = "key" if key is None else "init"
        raise ValueError(f"{missing} is None; allowed: key and init together, or none of them.")
    if key is None or init is None:
        norms = jax.jit(lambda params: tree_map(trees.norm, params))(params)
    else:
        norms = mean_norms(init, key, draws=draws)
    return build(params, jax.device_get(norms), check(constraint))


def mean_norms(init_params: Callable, key: Array, *, draws: int = 100) -> PyTree:
    """Mean L2 norm of every parameter array over `draws` initialisations.

    init_params: key -> params. Returns float scalars in the structure of the params. One
    initialisation is in memory at a time; the network itself is left alone (the original
    re-initialises it).
    """

    def norms_of(key: Array) -> PyTree:
        return tree_map(trees.norm, init_params(key))

    def add(total: PyTree, key: Array) -> tuple[PyTree, None]:
        return tree_map(jnp.add, total, norms_of(key)), None

    @jax.jit
    def total(key: Array) -> PyTree:
        start = tree_map(jnp.zeros_like, jax.eval_shape(norms_of, key))
        return lax.scan(add, start, jax.random.split(key, draws))[0]

    return tree_map(lambda norm: norm / draws, total(key))
