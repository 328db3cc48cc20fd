"""Feasible sets for Frank-Wolfe training: K-sparse polytopes, Lp balls and the whole space.

A set is a small immutable value, a pytree whose numbers (`k`, `radius`) may be traced. It acts on one array:

    lmo(gradient)    the vertex (or boundary point) v of the set that minimises <v, gradient>
    project(x)       the point of the set nearest to x
    shift_inside(x)  x itself if feasible, else a feasible multiple of x (the original's start: radial, not nearest)
    pull_back(x)     a feasible point near x, cheap, for x that rounding took out of the set
    diameter(size)   largest Euclidean distance of two points of the set in R^size

Sources: Pokutta, Spiegel, Zimmer 2020, arXiv:2010.07243 (sets and LMOs); Miao et al., ICLR 2022 (K-sparse training).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from sparsity_jax import masks, tables, trees

PyTree = Any
Mode = Literal["initialization", "diameter", "radius"]


def _register(*static: str):
    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        fields = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=list(static))

    return decorate


def _check_radius(radius: Any) -> None:
    if isinstance(radius, (int, float)) and not radius > 0:
        raise ValueError(f"radius is {radius}; allowed: above 0.")


@_register()
class KSparse:
    """Convex hull of the vectors with at most `k` non-zero entries, each +-`radius`.

    Equals {||x||_1 <= k radius} and {||x||_inf <= radius}. k >= 1, more than the array's size counts as its size;
    radius > 0.
    """

    k: int | jax.Array
    radius: float | jax.Array

    def __post_init__(self):
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k is {self.k}; allowed: 1 and above.")
        _check_radius(self.radius)

    def support(self, size: int) -> int | jax.Array:
        """k of an array of `size` entries."""
        return min(self.k, size) if isinstance(self.k, int) else jnp.minimum(self.k, size)

    def lmo(self, gradient: jax.Array) -> jax.Array:
        """-radius * sign on the k entries of largest magnitude (ties: lower flat index), 0 elsewhere and for sign 0."""
        mask = masks.k_largest_mask(gradient, self.support(gradient.size), magnitude=True)
        return jnp.where(mask, -jnp.asarray(self.radius, gradient.dtype) * jnp.sign(gradient), 0)

    def project(self, x: jax.Array) -> jax.Array:
        """sign(x) * clip(|x| - t, 0, radius) with the smallest t >= 0 whose L1 norm is at most k * radius.

        That is the KKT point of the projection. t is bracketed by bisection, then solved for on its linear piece.
        """
        magnitude = jnp.abs(x)
        radius = jnp.asarray(self.radius, x.dtype)
        budget = self.k * radius
        clipped = lambda t: jnp.clip(magnitude - t, 0, radius)

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            above = jnp.sum(clipped(middle)) > budget
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        steps = 60 if x.dtype == jnp.float64 else 30
        low, high = jax.lax.fori_loop(0, steps, halve, (jnp.zeros((), x.dtype), jnp.max(magnitude)))
        middle = (low + high) / 2
        free = (magnitude > middle) & (magnitude < middle + radius)
        full = jnp.sum(magnitude >= middle + radius)
        count = jnp.sum(free)
        linear = (jnp.sum(jnp.where(free, magnitude, 0)) + full * radius - budget) / jnp.maximum(count, 1)
        t = jnp.where(count > 0, jnp.clip(linear, low, high), high)
        t = jnp.where(jnp.sum(clipped(jnp.zeros((), x.dtype))) <= budget, 0, t)
        return jnp.sign(x) * clipped(t)

    def shift_inside(self, x: jax.Array) -> jax.Array:
        """x if feasible, else x scaled to L1 norm f * radius with f = min(floor(||x||_1 / ||x||_inf), k).

        The floor tolerates rounding: n equal entries give n (the original's floating-point floor may give n - 1).
        """
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        length, largest = jnp.sum(jnp.abs(wide)), jnp.max(jnp.abs(wide))
        outside = (length > self.radius * self.k) | (largest > self.radius)
        length = jnp.where(outside, length, 1)
        ratio = length / jnp.where(outside, largest, 1)
        factor = jnp.minimum(jnp.floor(ratio * (1 + 8 * jnp.finfo(wide.dtype).eps)), self.k)
        return jnp.where(outside, (factor * self.radius / length * wide).astype(x.dtype), x)

    def pull_back(self, x: jax.Array) -> jax.Array:
        """A point of the set near x, for x a rounding outside: cut at the radius, then scaled to the L1 norm."""
        inside = jnp.clip(x, -self.radius, self.radius)
        length, budget = trees.absolute_sum(inside), self.radius * self.support(x.size)
        return jnp.where(length > budget, budget * (inside / jnp.where(length > budget, length, 1)), inside)

    def diameter(self, size: int) -> jax.Array:
        """2 radius sqrt(k)."""
        return 2 * self.radius * jnp.sqrt(jnp.asarray(self.support(size), float))


@_register("p", "zero_up")
class LpBall:
    """{||x||_p <= radius}. p: 1 or >= 2, `inf` included (1 < p < 2 is not supported); static. radius > 0.

    zero_up: the original's LMO for p = inf, which sends zero gradient entries to +radius instead of 0.
    """

    radius: float | jax.Array
    p: float
    zero_up: bool = False

    def __post_init__(self):
        if not (self.p == 1 or self.p >= 2):
            raise ValueError(f"p is {self.p}; allowed: 1, or 2 and above (inf included).")
        _check_radius(self.radius)

    def lmo(self, gradient: jax.Array) -> jax.Array:
        """-radius times the dual unit vector of the gradient; a zero gradient gives zero (p = 2: one below 1e-10)."""
        g, radius = gradient, jnp.asarray(self.radius, gradient.dtype)
        if self.p == 1:
            return KSparse(1, radius).lmo(g)
        if self.p == 2:
            length = jnp.sqrt(jnp.sum(g * g))
            return jnp.where(length > 1e-10, -radius * g / jnp.where(length > 1e-10, length, 1), 0)
        if math.isinf(self.p):
            return jnp.where(g > 0, -radius, radius) if self.zero_up else -radius * jnp.sign(g)
        q = self.p / (self.p - 1)
        largest = jnp.max(jnp.abs(g))
        scaled = jnp.abs(g) / jnp.where(largest > 0, largest, 1)  # keeps powers of small numbers from underflowing
        length = jnp.where(largest > 0, jnp.sum(scaled**q) ** (1 / q), 1)
        return -radius * jnp.sign(g) * scaled ** (q / self.p) / length ** (q / self.p)

    def project(self, x: jax.Array) -> jax.Array:
        """Nearest point for p = 1, 2, inf (optax.projections); other p raise ValueError."""
        projections = {
            1: optax.projections.projection_l1_ball,
            2: optax.projections.projection_l2_ball,
            math.inf: optax.projections.projection_linf_ball,
        }
        if self.p not in projections:
            raise ValueError(f"no closed projection onto the L{self.p:g} ball; allowed p: 1, 2, inf.")
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return projections[self.p](wide, jnp.asarray(self.radius, wide.dtype)).astype(x.dtype)

    def shift_inside(self, x: jax.Array) -> jax.Array:
        """x if feasible, else x scaled to the boundary."""
        length = self.norm(x)
        outside = length > self.radius
        return jnp.where(outside, (self.radius * x / jnp.where(outside, length, 1)).astype(x.dtype), x)

    def pull_back(self, x: jax.Array) -> jax.Array:
        """A point of the set near x, for x a rounding outside."""
        return self.shift_inside(x)

    def norm(self, x: jax.Array) -> jax.Array:
        """||x||_p."""
        magnitude = jnp.abs(x)
        if self.p == 1:
            return jnp.sum(magnitude)
        if self.p == 2:
            return jnp.sqrt(jnp.sum(x * x))
        largest = jnp.max(magnitude)
        if math.isinf(self.p):
            return largest
        return largest * jnp.sum((magnitude / jnp.where(largest > 0, largest, 1)) ** self.p) ** (1 / self.p)

    def diameter(self, size: int) -> jax.Array:
        """2 radius size^(1/2 - 1/p) for p >= 2; 2 radius for p = 1."""
        return 2 * self.radius * _stretch(self.p, size)


@_register()
class Unconstrained:
    """The whole space: no LMO; optimizers take their gradient step instead."""

    def project(self, x: jax.Array) -> jax.Array:
        return x

    def shift_inside(self, x: jax.Array) -> jax.Array:
        return x

    def pull_back(self, x: jax.Array) -> jax.Array:
        return x

    def diameter(self, size: int) -> float:
        del size
        return math.inf


ConstraintSet = KSparse | LpBall | Unconstrained


def is_set(x: Any) -> bool:
    """Whether `x` is a feasible set (for `is_leaf=`)."""
    return isinstance(x, (KSparse, LpBall, Unconstrained))


def broadcast(sets: PyTree, params: PyTree) -> PyTree:
    """One set per parameter array: a single set serves all of them, a tree has their paths (`trees.aligned`)."""
    if is_set(sets):
        return jax.tree.map(lambda _: sets, params)
    return trees.aligned(sets, params, "sets", is_leaf=is_set)


def shift_inside(params: PyTree, sets: PyTree) -> PyTree:
    """`shift_inside` of every parameter array into its own set."""
    return jax.tree.map(lambda s, x: s.shift_inside(x), broadcast(sets, params), params, is_leaf=is_set)


def _stretch(p: float, size: int) -> float:
    """Largest Euclidean norm over the Lp unit ball of R^size."""
    return 1.0 if p == 1 else size ** (0.5 - (0.0 if math.isinf(p) else 1 / p))


# From configuration to sets ---------------------------------------------------------------------------------


def k_sparse(
    size: int,
    norm: float,
    *,
    k: tables.Index = 10,
    k_frac: tables.Fraction = 0.05,
    tau: tables.Positive = 15.0,
    mode: Mode = "initialization",
) -> KSparse:
    """The K-sparse polytope of one parameter array of `size` entries whose mean initial L2 norm is `norm`.

    k = min(max(k, floor(k_frac * size)), size); 0 switches either off. mode: `initialization` gives the diameter
    2 tau norm (norm 0 counts as 1), `diameter` and `radius` take tau itself. Raises ConfigError if k comes out as 0.
    """
    kept = min(max(k, int(k_frac * size)), size)
    if kept < 1:
        raise tables.ConfigError(f"k={k} and k_frac={k_frac} select no entry of an array of {size}; raise one of them.")
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
) -> LpBall:
    """The Lp ball of one parameter array; p: 1, a number >= 2, or "inf". mode and tau as for `k_sparse`."""
    try:
        p = float(p)
        allowed = p == 1 or p >= 2
    except (TypeError, ValueError):
        allowed = False
    if not allowed:
        raise tables.ConfigError(f"constraint.p is {p!r}; allowed: 1, a number >= 2, or 'inf'.")
    return LpBall(radius_of(tau, mode, norm, 2 * _stretch(p, size)), p, zero_up)


def l2(size: int, norm: float, *, tau: tables.Positive = 15.0, mode: Mode = "initialization") -> LpBall:
    """The Euclidean ball; tau and mode as for `k_sparse`."""
    return lp_ball(size, norm, p=2.0, tau=tau, mode=mode)


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


SETS = {"k_sparse": k_sparse, "lp": lp_ball, "l2": l2, "unconstrained": unconstrained}


def check(constraint: dict, where: str) -> tuple[tuple[str, str, dict], ...]:
    """(pattern, name, options) rules of a config `dict(name="k_sparse", rules=((pattern, dict), ...), **options)`.

    `rules` overrides single parameters, e.g. `((".*/(bias|scale)", dict(name="unconstrained")),)`: first match wins,
    everything else follows the outer name and options. Raises ConfigError as `tables.check_options` does.
    """
    outer = dict(constraint)
    overrides = tables.convert(outer.pop("rules", ()), tuple[tuple[str, dict], ...], f"{where}.rules")
    rules = [(pattern, rule, f"{where}.rules[{i}]") for i, (pattern, rule) in enumerate(overrides)]
    checked = []
    for pattern, rule, place in (*rules, (".*", outer, where)):
        name = rule.pop("name", "k_sparse")
        factory = tables.lookup(SETS, name, f"{place}.name")
        options = tables.check_options(factory, rule, place)
        factory(2**20, 1.0, **options)  # rules that span several options
        checked.append((pattern, name, options))
    return tuple(checked)


def build(params: PyTree, norms: PyTree, rules: Sequence[tuple[str, str, dict]]) -> PyTree:
    """The set of every parameter array.

    params: arrays or shape structs. norms: mean initial L2 norm of each (`mean_norms`), same structure.
    rules: from `check`. Raises ConfigError for a rule that decides no parameter.
    """
    indices = trees.match_rules(params, [(rule[0], i) for i, rule in enumerate(rules)], "constraint.rules")

    def one(leaf, norm, index):
        _, name, options = rules[index]
        return SETS[name](math.prod(leaf.shape), float(norm), **options)

    return jax.tree.map(one, params, norms, indices)


def mean_norms(init_params, key: jax.Array, draws: int = 100) -> PyTree:
    """Mean L2 norm of every parameter array over `draws` initialisations.

    init_params: key -> params. Returns float scalars in the structure of the params. One initialisation is in memory at
    a time; the network itself is left alone (the original re-initialises it).
    """

    def add(total, key):
        norms = jax.tree.map(lambda leaf: jnp.sqrt(trees.square_sum(leaf)), init_params(key))
        return jax.tree.map(jnp.add, total, norms), None

    @jax.jit
    def measure(key):
        wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)
        start = jax.tree.map(lambda leaf: jnp.zeros((), wide(leaf)), jax.eval_shape(init_params, key))
        return jax.lax.scan(add, start, jax.random.split(key, draws))[0]

    return jax.tree.map(lambda total: total / draws, measure(key))


def share_by_shape(norms: PyTree, params: PyTree) -> PyTree:
    """The original's norm table: keyed by shape, so a later array of equal shape overwrites an earlier one.

    Later means: kernels come before dense and convolution biases, these before the scale and then the bias of batch
    norms. norms: mean norms (0 counts as 1), one per array of `params`.
    """
    paths = trees.named_leaves(params)
    rank = {"kernel": 0, "scale": 2}

    def age(path):
        module, _, leaf = path.rpartition("/")
        return rank.get(leaf, 3 if f"{module}/scale" in paths else 1)

    by_path, table = trees.named_leaves(norms), {}
    for path in sorted(paths, key=age):  # stable: modules stay in order
        table[paths[path].shape] = float(by_path[path]) or 1.0
    return jax.tree.map(lambda leaf: table[leaf.shape], params)
