"""Importance of channels: the measures of the literature, the statistics they need, and scores of
channel groups.

    needs = required("fisher", "grad_preserve")
    # loss(params, batch, temperature): the mean over a batch
    collect = gather(loss, needs, 128)
    chosen = class_balanced(labels, num_classes=10, num_samples=2560)
    statistics = collect(params, data, balanced=(images[chosen], labels[chosen]))
    score("fisher", statistics, group)    # [group.size], larger = more important

A group has `size` and `members`, each with `path`, `axis`, `index` [channels, copies] and `role`.
Its paths name the leaves of the params given here: with Flax, differentiate {"params": ...} and
score "params/conv1/kernel". NaN in a statistic makes the scores NaN that it enters, with `fpgm`
those of its whole kernel.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparsity_jax import batches, coupling, linops, tables, trees
from sparsity_jax.groups import Member
from sparsity_jax.precision import FULL, Precision, computed
from sparsity_jax.types import Fields, PyTree

__all__ = [
    "AGGREGATES",
    "MEASURES",
    "Measure",
    "Statistics",
    "class_balanced",
    "gather",
    "required",
    "score",
]


class Statistics(NamedTuple):
    """Trees of arrays, all in the structure of the params; None: not gathered.

    w: weights. w0: weights at initialisation. g: mean gradient. g2: mean over batches of the
    squared gradient of a batch. hg_grasp, hg_preserve: Hessian times gradient on class-balanced
    examples, each at the temperature of its measure. saliency: average of `saliency.of_weights`
    over minibatches, see `saliency.track`. All but w and w0 are float32 or wider.
    """

    w: PyTree = None
    w0: PyTree = None
    g: PyTree = None
    g2: PyTree = None
    hg_grasp: PyTree = None
    hg_preserve: PyTree = None
    saliency: PyTree = None


# The measures -------------------------------------------------------------------------------------


def _sum(rows: Array) -> Array:
    return jnp.sum(rows, -1)


def _abs_sum(rows: Array) -> Array:
    return jnp.abs(_sum(rows))


def _norm(rows: Array) -> Array:
    return trees.norm_along(rows, -1)


@jax.jit
def _distances(rows: Array) -> Array:
    """Sum of the distances to the rows that are not all zero; one by one, as squares from a Gram
    matrix cancel.
    """
    present = jnp.any(rows != 0, -1)

    distance = lambda row: _sum(jnp.where(present, _norm(rows - row), 0))
    return jax.lax.map(distance, rows)


def _layer_adaptive(rows: Array) -> Array:
    """Squared norm over the sum of those at least as large, in (0, 1]; a row of zeros scores 0."""
    scaled = rows / trees.scale_of(rows)  # only ratios matter
    squares = _sum(jnp.square(scaled))
    counted = squares >= squares[:, None]
    at_least = _sum(jnp.where(counted, squares, 0))
    return squares / jnp.where(at_least == 0, 1, at_least)


class Measure(NamedTuple):
    """One rule: `value` of the statistics `needs`, weight by weight, then `reduce` of each
    channel's values.

    reduce: [channels, weights of a channel] -> [channels]. biased: every value is multiplied by the
    distance abs(w) or abs(w - w0). on: the arrays that are read, `kernel`, `scale` (of norms),
    `norm` (scale and bias) or `nothing`. about: a line on what it is, and its source.
    """

    needs: tuple[str, ...]
    value: Callable
    reduce: Callable = _sum
    biased: bool = False
    on: Literal["kernel", "scale", "norm", "nothing"] = "kernel"
    about: str = ""

    def is_weighted(self, use_l2: bool) -> bool:
        """Whether values are multiplied by the distance: once, and not where use_l2 already did so
        while tracking.
        """
        tracked = use_l2 and "saliency" in self.needs
        return (use_l2 or self.biased) and not tracked


def _abs_product(w: Array, g: Array) -> Array:
    return jnp.abs(w * g)


def _square_product(w: Array, g2: Array) -> Array:
    return jnp.square(w) * g2


# Sums run over the weights of a filter. Lubana and Dick 2021, arXiv:2009.11839, compare the first
# eleven; another source is where the rule comes from.
MEASURES: dict[str, Measure] = {
    "mag_based": Measure(("w",), jnp.abs, _norm, about="sqrt(sum w^2); Lubana and Dick 2021"),
    "l1": Measure(("w",), jnp.abs, about="sum |w|; Li et al. 2017, arXiv:1608.08710"),
    "bn": Measure(
        ("w",),
        jnp.abs,
        on="scale",
        about="|scale| of the norm; Liu et al. 2017, arXiv:1708.06519",
    ),
    "loss_based": Measure(
        ("w", "g"), _abs_product, about="sum |w g|; Lee et al. 2019, arXiv:1810.02340"
    ),
    "biased_loss": Measure(
        ("w", "g"), _abs_product, biased=True, about="sum |w| |w g|; Lubana and Dick 2021"
    ),
    "biased_loss_tracked": Measure(
        ("saliency",),
        jnp.positive,
        biased=True,
        about="sum |w| average(|w g|); with use_l2, whose factor is in the average, "
        "sum average(|w| |w g|); Lubana and Dick 2021",
    ),
    "tfo": Measure(
        ("w", "g"),
        jnp.multiply,
        _abs_sum,
        about="|sum w g|; Molchanov et al. 2017, arXiv:1611.06440",
    ),
    "fisher": Measure(
        ("w", "g2"),
        _square_product,
        about="sum w^2 mean(g^2); Theis et al. 2018, arXiv:1801.05787",
    ),
    "nvidia": Measure(
        ("w", "g2"),
        _square_product,
        on="norm",
        about="scale^2 mean(g^2) plus the same of the bias; Molchanov et al. 2019, "
        "arXiv:1906.10771",
    ),
    "grasp": Measure(
        ("w", "hg_grasp"),
        jnp.multiply,
        about="sum w (H g), signed: removing what is negative raises the gradient norm; Wang et "
        "al. 2020, arXiv:2002.07376",
    ),
    "grad_preserve": Measure(
        ("w", "hg_preserve"), jnp.multiply, _abs_sum, about="|sum w (H g)|; Lubana and Dick 2021"
    ),
    "fpgm": Measure(
        ("w",),
        jnp.positive,
        _distances,
        about="distance from the geometric median: sum over the filters f' of the kernel of "
        "|f - f'|_2, without those masked to zero; He et al. 2019, arXiv:1811.00250",
    ),
    # there of weights; here filters take their place, and equal ones score equally instead of in
    # the order of a sort
    "lamp": Measure(
        ("w",),
        jnp.positive,
        _layer_adaptive,
        about="|f|^2 / (sum of |f'|^2 over the filters f' of the kernel with |f'| >= |f|); Lee et "
        "al. 2021, arXiv:2010.07611",
    ),
    "random": Measure((), jnp.positive, on="nothing", about="uniform in [0, 1)"),
}

_mean_over_members = functools.partial(jnp.mean, axis=0)
AGGREGATES: dict[str, Callable] = {
    "producer": _mean_over_members,
    "mean": _mean_over_members,
    "sum": functools.partial(jnp.sum, axis=0),
    "l2": functools.partial(trees.norm_along, axis=0),
}


def required(*names: str, use_l2: bool = False, use_init: bool = False) -> tuple[str, ...]:
    """The fields of Statistics that these measures need with these options, in their order; see
    `score`.

    Raises ConfigError for an unknown measure and for an option that would change nothing.
    """
    needed: set[str] = set()
    for name in names:
        measure = tables.lookup(MEASURES, name, "measure")
        if use_l2 and measure.on != "kernel":
            why = f"but the measure {name!r} reads no kernels to weight"
            raise tables.ConfigError("use_l2", True, why=why)
        if use_init and not (use_l2 or measure.biased):
            why = f"which replaces the factor |w|, but the measure {name!r} has none"
            raise tables.ConfigError(
                "use_init", True, why=why, allowed="with use_l2, or a measure that is biased"
            )
        needed.update(measure.needs)
        if measure.is_weighted(use_l2):
            needed.update(("w", "w0") if use_init else ("w",))
    return tuple(field for field in Statistics._fields if field in needed)


# Statistics ---------------------------------------------------------------------------------------


def gather(
    loss: Callable,
    needs: Iterable[str],
    batch_size: int,
    *,
    temperature: float = 1.0,
    grasp_temperature: float = 200.0,
    preserve_temperature: float = 1.0,
    on_host: bool = False,
    precision: Precision = FULL,
) -> Callable:
    """`collect(params, data, *, balanced, init)`: the statistics `needs`, from one pass over the
    data.

    loss(params, batch, temperature): the mean over a batch, in inference mode, of the cross-entropy
    of logits / temperature. data: a pytree of arrays [N, ...] for g and g2; batches count by their
    size, and g2 depends on batch_size. balanced: the examples for hg, e.g. those of
    `class_balanced`, passed twice: for their mean gradient g, then for H g. As classes have equally
    many, these are the means over classes, whatever the batches. init: w0. temperature and the two
    of the Hessian are arguments of one compiled program, so `loss` gets them traced. precision: of
    matrix products, in full float32 by default.
    on_host: see `batches.mean`; `collect` is then not traceable. Raises ConfigError for unknown
    statistics and a batch size below 1, ValueError for a missing or empty input.
    """
    needs = tuple(needs)
    for name in needs:
        tables.lookup(Statistics._field_defaults, name, "statistic")
    tables.convert(batch_size, tables.Count, "batch_size")

    def moments(batch: PyTree, params: PyTree, temperature: Array) -> Fields:
        g = jax.grad(loss)(params, batch, temperature)
        sums = {"g": jax.tree.map(trees.widen, g)}
        if "g2" in needs:
            sums["g2"] = jax.tree.map(jnp.square, sums["g"])
        return sums

    def product(batch: PyTree, params: PyTree, temperature: Array, vector: PyTree) -> PyTree:
        return linops.hvp(loss, params, batch, temperature, precision=precision)(vector)

    mean_moments = batches.mean(computed(moments, precision), batch_size, on_host=on_host)
    mean_product = batches.mean(product, batch_size, on_host=on_host)
    hessians = dict(hg_grasp=grasp_temperature, hg_preserve=preserve_temperature)

    def collect(
        params: PyTree, data: PyTree = None, *, balanced: PyTree = None, init: PyTree = None
    ) -> Statistics:
        _check_given(needs, dict(data=data, balanced=balanced, init=init))
        zeros = jax.tree.map(lambda x: trees.zeros_like(trees.widen(x)), params)
        start = {"g": zeros}
        if "g2" in needs:
            start["g2"] = zeros
        gathered: Fields = {}
        if "g" in needs or "g2" in needs:  # g2 brings g along
            gathered |= mean_moments(start, data, params, temperature)
        for name, own_temperature in hessians.items():
            if name in needs:
                vector = mean_moments(start, balanced, params, own_temperature)["g"]
                gathered[name] = mean_product(zeros, balanced, params, own_temperature, vector)
        return Statistics(w=params, w0=init, **gathered)

    return collect


# what each statistic is gathered from
_SOURCES = dict(g="data", g2="data", hg_grasp="balanced", hg_preserve="balanced", w0="init")


def _check_given(needs: tuple, given: Fields) -> None:
    for name, source in _SOURCES.items():
        if name in needs and given[source] is None:
            raise ValueError(f"{name} cannot be gathered: {source} is missing.")


def class_balanced(labels: np.ndarray, num_classes: int, num_samples: int) -> np.ndarray:
    """Positions of the first `num_samples // num_classes` examples of every class, class by class:
    int, on the host.

    Raises ValueError if that is none, or a class has fewer.
    """
    labels = np.asarray(labels)
    each = num_samples // num_classes
    examples = [np.flatnonzero(labels == c)[:each] for c in range(num_classes)]
    rarest = min(map(len, examples))
    if rarest < max(each, 1):
        raise ValueError(
            f"{num_samples} samples are {each} of each class, of which one has {rarest}; needed: 1 "
            "of each, and as many as that."
        )
    return np.concatenate(examples)


# Scores -------------------------------------------------------------------------------------------


def score(
    name: str,
    statistics: Statistics,
    group: Any,
    *,
    aggregate: str = "producer",
    use_l2: bool = False,
    use_init: bool = False,
    skip: str = "",
    key: Array | None = None,
) -> Array:
    """Importance of every channel of `group` by the row `name` of MEASURES: float [group.size],
    larger = keep.

    aggregate: `producer` scores the kernels that make the channels, as the original does; several,
    which a residual sum adds up, count by their mean, so that groups stay comparable. `sum`, `mean`
    and `l2` (which drops the sign of `grasp`) score all kernels of the group, those that read the
    channels and depthwise ones too. Measures of norms take every norm of the group instead
    (`producer` the mean). Members of the role `other` make no channels: a depthwise kernel with it
    leaves the score to the kernel that feeds it, as in the original. skip: a regular expression for
    whole paths of members to leave out, e.g. the norm behind a depthwise kernel,
    `.*block\\d+/bn1/.*`.
    use_l2: multiply every weight's value by abs(w); `biased_loss` does so anyway, and for
    `biased_loss_tracked` the average must have been made with it (`saliency.of_weights`).
    use_init: by abs(w - w0) instead.
    key: for `random`; derive one for each group.
    Raises ConfigError for unknown names and idle options (as `required`), ValueError for missing
    statistics and for a group without the arrays that the measure reads or of another network.
    Traceable in `statistics` and `key`.
    """
    needed = required(name, use_l2=use_l2, use_init=use_init)
    combine = tables.lookup(AGGREGATES, aggregate, "aggregate")
    trees.check_pattern(skip, "skip")
    measure = MEASURES[name]
    if measure.on == "nothing":
        if key is None:
            raise ValueError(f"the measure {name!r} needs a key.")
        return jax.random.uniform(key, (group.size,))
    leaves = {}
    for field in needed:
        tree = getattr(statistics, field)
        if tree is None:
            raise ValueError(f"the measure {name!r} misses the statistic {field}.")
        leaves[field] = trees.named_leaves(tree)

    def of_member(member: Member) -> Array:
        arrays = {}
        for field, by_path in leaves.items():
            leaf = tables.lookup(by_path, member.path, f"an array of the statistic {field}")
            arrays[field] = trees.widen(leaf)
        needs = [arrays[field] for field in measure.needs]
        values = measure.value(*needs)
        if measure.is_weighted(use_l2):
            moved = arrays["w"] - arrays["w0"] if use_init else arrays["w"]
            values = values * jnp.abs(moved)
        return measure.reduce(_rows(values, member))

    left_out = re.compile(skip or "(?!)")
    members = [member for member in group.members if not left_out.fullmatch(member.path)]
    arrays = leaves[needed[0]]
    if measure.on != "kernel":
        parts = _norms(members, measure.on)
    else:
        parts = [[member] for member in members if _is_scored(member, aggregate, arrays)]
    if not parts:
        path = group.members[0].path if group.members else "no members"
        what = "kernel" if measure.on == "kernel" else "norm scale"
        raise ValueError(
            f"the measure {name!r} has nothing to read: the group of {path!r} has no {what} for "
            f"aggregate={aggregate!r}."
        )
    totals = [sum(map(of_member, part)) for part in parts]
    return combine(jnp.stack(totals))


def _is_scored(member: Member, aggregate: str, leaves: Fields) -> bool:
    """Whether a measure of kernels reads it."""
    if aggregate == "producer":
        return member.role == "producer"
    return coupling.is_weight(member, leaves)


def _norms(members: list[Member], on: str) -> list[list[Member]]:
    """Every norm's scale, with its shift if `on` is `norm` and it has one.

    That is the shift beside the scale, the first after it if there are several.
    """
    parts = []
    for i, scale in enumerate(members):
        if scale.term != "scale":
            continue
        part = [scale]
        for member in (*members[i:], *members[:i]):
            is_beside = _module(member) == _module(scale)
            if on == "norm" and member.term == "shift" and is_beside:
                part.append(member)
                break
        parts.append(part)
    return parts


def _module(member: Member) -> str:
    """Path of what an array is part of."""
    return member.path.removesuffix("/value").rpartition("/")[0]


def _rows(values: Array, member: Member) -> Array:
    """The entries of each channel: [channels, entries]."""
    index = member.index
    size = values.shape[member.axis]
    if not np.isin(index, range(size)).all():
        raise ValueError(
            f"axis {member.axis} of {member.path!r} has {size} entries; the group's index exceeds "
            "them."
        )
    first = jnp.moveaxis(trees.gathered(values), member.axis, 0)
    return first[index].reshape(len(index), -1)
