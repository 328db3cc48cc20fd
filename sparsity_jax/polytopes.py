"""Feasible sets for Frank-Wolfe training: K-sparse polytopes, Lp balls and the whole space.

A set is a small immutable value, a pytree whose numbers (`k`, `radius`) may be traced. It acts on
one array:

    lmo(gradient)    the vertex (or boundary point) v of the set that minimises <v, gradient>
    project(x)       the point of the set nearest to x
    shift_inside(x)  x itself if feasible, else a feasible multiple of x (the original's start:
    radial, not nearest) pull_back(x)     a feasible point near x, cheap, for x that rounding took
    out of the set diameter(size)   largest Euclidean distance of two points of the set in R^size

Sources: Pokutta, Spiegel, Zimmer 2020, arXiv:2010.07243 (sets and LMOs); Miao et al., ICLR 2022
    (K-sparse training).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import tree_map

from sparsity_jax import masks, tables, trees
from sparsity_jax.trees import widen
from sparsity_jax.types import PyTree

Mode = Literal["initialization", "diameter", "radius"]
Number = float | Array

STATIC = dict(static=True)  # a field that decides what is compiled


def _check_radius(radius: Any) -> None:
    if isinstance(radius, (int, float)) and not radius > 0:
        raise ValueError(f"radius is {radius}; allowed: above 0.")


def _narrow(x: Number, dtype: Any) -> Any:
    """`x` in a type that may be narrower: rounded, and never beyond its largest number."""
    if jnp.result_type(x) == dtype:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def _pulled(x: Array, length: Array, target: Number, outside: Array) -> Array:
    """`x` of norm `length`, scaled to the norm `target` where it is `outside`."""
    wide = widen(x)
    target = jnp.asarray(target, wide.dtype)
    scaled = target * (wide / jnp.where(outside, length, 1))
    return jnp.where(outside, _narrow(scaled, x.dtype), x)


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
        _check_radius(self.radius)

    def support(self, size: int) -> Any:
        """k of an array of `size` entries."""
        return min(self.k, size) if isinstance(self.k, int) else jnp.minimum(self.k, size)

    def lmo(self, gradient: Array) -> Array:
        """-radius * sign on the k entries of largest magnitude (ties: lower flat index), 0
        elsewhere and for sign 0.

        Constant in the gradient, to derivatives too.
        """
        if not gradient.size:
            return gradient
        mask = masks.k_largest_mask(gradient, self.support(gradient.size), magnitude=True)
        return jnp.where(mask, -_narrow(self.radius, gradient.dtype) * jnp.sign(gradient), 0)

    def project(self, x: Array) -> Array:
        """sign(x) * clip(|x| - t, 0, radius) with the smallest t >= 0 whose L1 norm is at most k *
        radius.

        That is the KKT point of the projection, exact but for rounding whatever the range of x. Its
        derivative is the exact one wherever there is one.
        """
        wide = widen(x)
        radius = jnp.asarray(self.radius, wide.dtype)
        return _narrow(_project(wide, self.support(x.size) * radius, radius), x.dtype)

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
        factor = jnp.minimum(jnp.floor(ratio * (1 + 8 * jnp.finfo(wide.dtype).eps)), self.k)
        return _pulled(x, length, factor * self.radius, outside)

    def pull_back(self, x: Array) -> Array:
        """A point of the set near x, for x a rounding outside: cut at the radius, then scaled to
        the L1 norm.
        """
        inside = jnp.clip(x, -self.radius, self.radius)
        length, budget = trees.absolute_sum(inside), self.radius * self.support(x.size)
        return _pulled(inside, length, budget, length > budget)

    def diameter(self, size: int) -> Array:
        """2 radius sqrt(k)."""
        return 2 * self.radius * jnp.sqrt(jnp.asarray(self.support(size), float))


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
    p: float = dataclasses.field(metadata=STATIC)
    zero_up: bool = dataclasses.field(default=False, metadata=STATIC)
    zero_below: float = dataclasses.field(default=0.0, metadata=STATIC)

    def __post_init__(self) -> None:
        if not (self.p == 1 or self.p >= 2):
            raise ValueError(f"p is {self.p}; allowed: 1, or 2 and above (inf included).")
        _check_radius(self.radius)

    def lmo(self, gradient: Array) -> Array:
        """-radius times the dual unit vector of the gradient; a zero gradient gives zero."""
        if self.p == 1:
            return KSparse(1, self.radius).lmo(gradient)
        g = widen(gradient)
        radius = jnp.asarray(self.radius, g.dtype)
        if self.p == 2:
            length = trees.norm(g)
            usable = length > self.zero_below
            vertex = jnp.where(usable, -radius * (g / jnp.where(usable, length, 1)), 0)
        elif math.isinf(self.p):
            vertex = jnp.where(g > 0, -radius, radius) if self.zero_up else -radius * jnp.sign(g)
        else:
            vertex = -radius * self._dual_unit_vector(g)
        return _narrow(vertex, gradient.dtype)

    def _dual_unit_vector(self, g: Array) -> Array:
        """sign(g) (|g| / ||g||_q)^(q / p) with 1/p + 1/q = 1, for finite p > 2.

        Its slope at zero entries is infinite; there, its derivative is taken as 0.
        """
        q = self.p / (self.p - 1)
        # keeps powers of small numbers from underflowing
        magnitude = jnp.abs(g / trees.scale_of(g))
        positive = magnitude > 0
        magnitude = jnp.where(positive, magnitude, 1)
        length = jnp.sum(jnp.where(positive, magnitude**q, 0)) ** (1 / q)
        return jnp.where(positive, jnp.sign(g) * (magnitude / length) ** (q / self.p), 0)

    def project(self, x: Array) -> Array:
        """Nearest point for p = 1, 2, inf; other p raise ValueError."""
        if self.p not in (1, 2, math.inf):
            raise ValueError(
                f"no closed projection onto the L{self.p:g} ball; allowed p: 1, 2, inf."
            )
        if self.p == 1:
            return KSparse(1, self.radius).project(x)
        if self.p == 2:
            return self.shift_inside(x)
        wide = widen(x)
        radius = jnp.asarray(self.radius, wide.dtype)
        return _narrow(jnp.clip(wide, -radius, radius), x.dtype)

    def shift_inside(self, x: Array) -> Array:
        """x if feasible, else x scaled to the boundary."""
        length = self.norm(x)
        return _pulled(x, length, self.radius, length > self.radius)

    def pull_back(self, x: Array) -> Array:
        """A point of the set near x, for x a rounding outside."""
        return self.shift_inside(x)

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
        return scale * jnp.where(positive, jnp.where(positive, powers, 1) ** (1 / self.p), 0)

    def diameter(self, size: int) -> Number:
        """2 radius size^(1/2 - 1/p) for p >= 2; 2 radius for p = 1."""
        return 2 * self.radius * _stretch(self.p, size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """The whole space: no LMO; optimizers take their gradient step instead."""

    def project(self, x: Array) -> Array:
        return x

    def shift_inside(self, x: Array) -> Array:
        return x

    def pull_back(self, x: Array) -> Array:
        return x

    def diameter(self, size: int) -> float:
        del size
        return math.inf


@jax.custom_jvp
def _project(x: Array, budget: Array, radius: Array) -> Array:
    """The nearest point to x of at least float32 with L1 norm at most `budget`, in magnitude at
    most `radius`.

    The threshold t is found by bisection among the floating-point numbers. Between two neighbours
    of them it is `high` - `beyond`, where |x| - high is exact near t: so nothing is lost where t
    has fewer digits than the radius.
    """
    magnitude = jnp.abs(x)
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    number = lambda key: lax.bitcast_convert_type(key, x.dtype)  # ascending, as x is not negative

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        over = trees.fold_sum(lambda m: jnp.clip(m - number(middle), 0, radius), magnitude) > budget
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    last = lax.bitcast_convert_type(
        jnp.where(budget > 0, jnp.max(magnitude, initial=0), 0), integer
    )
    _, key = lax.fori_loop(0, jnp.iinfo(integer).bits, halve, (jnp.zeros_like(last), last))
    high = number(key)
    rest = magnitude - high
    beyond = jnp.zeros_like(high)
    for _ in range(2):  # of a sum that is concave in `beyond` and has one kink at most
        raised = rest + beyond
        free = (raised >= 0) & (raised < radius)
        missing = budget - jnp.sum(jnp.clip(raised, 0, radius))
        beyond = beyond + missing / jnp.maximum(jnp.sum(free), 1)
    inside = jnp.sum(jnp.clip(magnitude, 0, radius)) <= budget
    moved = jnp.where(inside, magnitude, rest + beyond)
    return jnp.sign(x) * jnp.clip(moved, 0, radius)


@_project.defjvp
def _project_derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """t follows from the budget: where it is active, the changes of the free magnitudes and of the
    full ones add up.
    """
    x, budget, radius = primals
    change, more_budget, more_radius = tangents
    projected = _project(x, budget, radius)
    inside = jnp.sum(jnp.clip(jnp.abs(x), 0, radius)) <= budget
    sign, size = jnp.sign(x), jnp.abs(projected)
    full = size >= radius
    free = ~full & ((size > 0) | inside)
    outer = jnp.sum(jnp.where(free, sign * change, jnp.where(full, more_radius, 0)))
    rise = jnp.where(inside, 0, (outer - more_budget) / jnp.maximum(jnp.sum(free), 1))
    return projected, jnp.where(free, change - sign * rise, jnp.where(full, sign * more_radius, 0))


ConstraintSet = KSparse | LpBall | Unconstrained


def is_set(x: Any) -> bool:
    """Whether `x` is a feasible set (for `is_leaf=`)."""
    return isinstance(x, (KSparse, LpBall, Unconstrained))


def broadcast(sets: PyTree, params: PyTree) -> PyTree:
    """One set per parameter array: a single set serves all of them, a tree has their paths
    (`trees.aligned`).
    """
    if is_set(sets):
        return tree_map(lambda _: sets, params)
    return trees.aligned(sets, params, "sets", is_leaf=is_set)


def shift_inside(params: PyTree, sets: PyTree) -> PyTree:
    """`shift_inside` of every parameter array into its own set."""
    return tree_map(lambda s, x: s.shift_inside(x), broadcast(sets, params), params, is_leaf=is_set)


def _stretch(p: float, size: int) -> float:
    """Largest Euclidean norm over the Lp unit ball of R^size."""
    return 1.0 if p == 1 else size ** (0.5 - (0.0 if math.isinf(p) else 1 / p))


# From configuration to sets -----------------------------------------------------------------------


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
    kept = min(max(k, masks.count_of(k_frac, size, "floor")), size)
    if kept < 1:
        raise tables.ConfigError(
            f"constraint.k={k} and k_frac={k_frac} select no entry of an array of {size}; raise "
            "one."
        )
    scale = 2 * math.sqrt(kept)
    return KSparse(kept, radius_of(tau, mode, norm, scale))


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
    return LpBall(radius_of(tau, mode, norm, 2 * _stretch(p, size)), p, zero_up, zero_below)


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


def unconstrained(size: int, norm: float) -> Unconstrained:
    """The whole space."""
    del size, norm
    return Unconstrained()


def radius_of(tau: float, mode: Mode, norm: float, scale: float) -> float:
    """The radius of a set whose diameter is `scale` times its radius."""
    tables.convert(mode, Mode, "mode")
    if mode == "radius":
        return tau
    diameter = tau if mode == "diameter" else 2 * tau * (norm if norm > 0 else 1.0)
    return diameter / scale


SETS: dict[str, Callable] = {
    "k_sparse": k_sparse,
    "lp": lp_ball,
    "l2": l2,
    "unconstrained": unconstrained,
}
Config = Annotated[dict, tables.Named(SETS)]


def check(constraint: dict) -> tuple[tuple[str, str, dict], ...]:
    """(pattern, name, options) rules of a config `dict(name="k_sparse", rules=((pattern, dict),
    ...), **options)`.

    `rules` overrides single parameters, e.g. `((".*/(bias|scale)", dict(name="unconstrained")),)`:
    first match wins, everything else follows the outer name and options. Raises ConfigError as
    `tables.check_options` does.
    """
    outer = dict(constraint)
    overrides = tables.convert(outer.pop("rules", ()), tuple[tuple[str, dict], ...], "rules")
    checked = []
    for i, (pattern, rule) in enumerate(overrides):
        with tables.within(f"rules[{i}]"):
            checked.append((pattern, *_checked_set(rule)))
    return (*checked, (".*", *_checked_set(outer)))


def _checked_set(config: dict) -> tuple[str, dict]:
    """(name, options) of one set."""
    name, options = tables.entry(SETS, config, "k_sparse")
    SETS[name](2**20, 1.0, **options)  # rules that span several options
    return name, options


def build(params: PyTree, norms: PyTree, rules: Sequence[tuple[str, str, dict]]) -> PyTree:
    """The set of every parameter array.

    params: arrays or shape structs. norms: mean initial L2 norm of each (`mean_norms`), same
        structure.
    rules: from `check`. Raises ConfigError for a rule that decides no parameter.
    """
    with tables.within("constraint.rules"):
        indices = trees.match_rules(params, [(rule[0], i) for i, rule in enumerate(rules)])

    def build_one(leaf: Any, norm: float, index: int) -> ConstraintSet:
        _, name, options = rules[index]
        return SETS[name](math.prod(leaf.shape), float(norm), **options)

    return tree_map(build_one, params, norms, indices)


def mean_norms(init_params: Callable, key: Array, draws: int = 100) -> PyTree:
    """Mean L2 norm of every parameter array over `draws` initialisations.

    init_params: key -> params. Returns float scalars in the structure of the params. One
    initialisation is in memory at a time; the network itself is left alone (the original
    re-initialises it).
    """

    norms_of = lambda key: tree_map(trees.norm, init_params(key))
    add = lambda total, key: (tree_map(jnp.add, total, norms_of(key)), None)

    @jax.jit
    def total(key: Array) -> PyTree:
        start = tree_map(jnp.zeros_like, jax.eval_shape(norms_of, key))
        return lax.scan(add, start, jax.random.split(key, draws))[0]

    return tree_map(lambda norm: norm / draws, total(key))


def share_by_shape(norms: PyTree, params: PyTree, order: Sequence[str] | None) -> PyTree:
    """The original's norm table: keyed by shape, so a later array of equal shape overwrites an
    earlier one.

    norms: mean norms (0 counts as 1), one per array of `params`.
    order: paths of all arrays in the network's order, see `groups.order_of_use`. Raises ValueError
        for an order that does not name every array once.
    """
    leaves, order = trees.named_leaves(params), list(order or ())
    if sorted(order) != sorted(leaves):
        raise ValueError(
            f"order has {len(order)} paths; allowed: each of the {len(leaves)} of params once."
        )
    by_path = trees.named_leaves(norms)
    table = {leaves[path].shape: float(by_path[path]) or 1.0 for path in order}
    return tree_map(lambda leaf: table[leaf.shape], params)
