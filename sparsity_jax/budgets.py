"""How many channels each layer or group keeps: schedules of rounds, and selections within a budget,
on the host.

    plan = budgets.schedule("gradient_flow", ratio=0.75, num_rounds=25)
    keep = budgets.select(scores, plan.ratios[0])                    # the least important go
    keep = budgets.select(new_scores, plan.ratios[1], alive=keep)    # removed stays removed
    keep = budgets.select_to_counts(scores, {"conv1": 12, "conv2": 24})
    keep = budgets.select_to_cost(flops, scores, 0.5 * dense)        # flops(keep) -> number
    keep = budgets.round_to_multiple(keep, scores, 8)

Throughout: `scores` maps the name of a layer or group to floats [channels], larger = keep; `keep`
and `alive` map the same names to bools [channels], True = kept. Random pruning is random scores. Of
equal scores the lower index stays, names in sorted order (that of a tree's leaves). NaN scores of
channels alive raise ValueError.

The number to remove is rounded by `floor` (`masks.count_of`): 0.29 of 100 are 29.

Every layer keeps a minimum, by default floor(0.05 * channels) + 1, so none ever vanishes; `floors`
sets other minima by name (`minimum_kept` of the original sizes where `scores` hold survivors only).
`protect` says which channels these are: `correct`, the most important alive; `original` and
`original_resnet` have what `originals` tells of them.
Source: Lubana & Dick 2021, arXiv:2009.11839, and its published code.
"""

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np

from sparsity_jax import masks, originals, tables, trees
from sparsity_jax.types import Arrays as Keep

__all__ = [
    "SCHEDULES",
    "Counts",
    "Limits",
    "Protect",
    "Rounds",
    "Scores",
    "Threshold",
    "manual_ratios",
    "minimum_kept",
    "polynomial_ratios",
    "ratio_to_reach",
    "round_ratios",
    "round_to_multiple",
    "schedule",
    "select",
    "select_to_cost",
    "select_to_counts",
]

Scores = Mapping[str, Any]
Counts = Mapping[str, int]
Protect = Literal["correct", "original", "original_resnet"]
Threshold = Annotated[float, tables.Range(0.0, 1.0, above=True, below=True)]


# Schedules of rounds ------------------------------------------------------------------------------


class Rounds(NamedTuple):
    """What every round of a schedule removes; density[i] is the product of (1 - ratios[j]) over j
    <= i.
    """

    # float64 [rounds]: share of the channels alive before the round that it removes
    ratios: np.ndarray
    density: np.ndarray  # float64 [rounds]: share of the original channels alive after the round


def round_ratios(
    *,
    ratio: tables.Share,
    num_rounds: tables.Count,
    cumulative: Literal["exact", "truncated"] = "exact",
) -> Rounds:
    """The gradient-flow original's schedule to `ratio` P in n rounds: p_i = P / (i P + n (1 - P)),
    i = 1..n.

    The density is (1 - P) / (1 - P + P i / n): early rounds remove more of the original network
    than late ones. With i counted down the shares would be equal, as those of `polynomial_ratios`
    of power 1.
    cumulative: `truncated`, see `originals.truncated_density`. Raises ConfigError if no channel
    would be left.
    """
    i = np.arange(1, num_rounds + 1)
    ratios = ratio / (i * ratio + num_rounds * (1 - ratio))
    if cumulative == "truncated":
        return _from_density(originals.truncated_density(ratios))
    return Rounds(ratios, (1 - ratio) / (1 - ratio + ratio * i / num_rounds))


def polynomial_ratios(
    *, ratio: tables.Share, num_rounds: tables.Count, power: tables.Positive = 3.0
) -> Rounds:
    """Density 1 - P (1 - (1 - i / n)^power) after round i = 1..n; power 1 removes equal shares of
    the original network.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, whose power is 3, from density 1.
    """
    left = 1 - np.arange(1, num_rounds + 1) / num_rounds
    return _from_density(1 - ratio * (1 - left**power))


def manual_ratios(*, thresholds: tuple[Threshold, ...]) -> Rounds:
    """Rounds after which the shares `thresholds` of the original network are gone: increasing, each
    in (0, 1).

    p_1 = t_1, p_i = (t_i - t_(i-1)) / (1 - t_(i-1)).
    """
    shares = np.array(thresholds)
    if not thresholds or np.any(np.diff(shares) <= 0):
        raise tables.ConfigError(
            "thresholds", thresholds, allowed="one or more increasing shares, e.g. (0.1, 0.5)"
        )
    before = np.append(0.0, shares[:-1])
    return Rounds((shares - before) / (1 - before), 1 - shares)


SCHEDULES: dict[str, Callable[..., Rounds]] = {
    "gradient_flow": round_ratios,
    "polynomial": polynomial_ratios,
    "manual": manual_ratios,
}


def schedule(name: str, **fields: Any) -> Rounds:
    """The schedule `name` of SCHEDULES; raises ConfigError for fields that are none of its own, or
    out of range.
    """
    function = tables.lookup(SCHEDULES, name, "name")
    return function(**tables.check_options(function, fields))


def ratio_to_reach(density: float, num_original: int, num_alive: int) -> float:
    """Share of the `num_alive` channels to remove for `density` of `num_original` to be left; 0 if
    fewer are alive.

    Instead of a schedule's `ratios`, it makes up for what earlier rounds removed more or less than
    asked.
    """
    return max(1 - density * (num_original / num_alive), 0.0)


def _from_density(density: np.ndarray) -> Rounds:
    if not density[-1] > 0:
        raise tables.ConfigError(
            "", why=f"ends at density {density[-1]}", allowed="fewer rounds or a smaller ratio"
        )
    before = np.append(1.0, density[:-1])
    return Rounds(1 - density / before, density)


# Selections ---------------------------------------------------------------------------------------


class Limits(TypedDict, total=False):
    """What a selection respects.

    alive: channels that are left, bools by name; all without it. floors: how many each layer keeps
    at least. protect: which these are. exclude: regular expression of whole names that stay whole
    and do not count; a floor of the layer's size keeps it whole and counts it.
    """

    alive: Scores | None
    floors: Counts | None
    protect: Protect
    exclude: str | None


def minimum_kept(sizes: Mapping[str, int], *, share: float = 0.05) -> dict[str, int]:
    """floor(share * size) + 1 channels for every layer of `sizes` (its channels before any
    pruning), at most all.
    """
    _number(share, tables.Fraction, "share")
    floors = {}
    for name, size in sizes.items():
        kept = masks.count_of(share, int(size), rounding="floor") + 1
        floors[name] = min(kept, int(size))
    return floors


def select(
    scores: Scores, ratio: float, *, counts: Counts | None = None, **limits: Unpack[Limits]
) -> Keep:
    """Removes the least important floor(ratio * N) of the N channels alive in the whole network.

    counts: how often a channel of a layer counts in N (default 1; 2 for the original's MobileNet,
    which also counts the depthwise copies); removal stops before the channel that would exceed
    floor(ratio * N). Raises ValueError if the protection leaves fewer than that to remove.
    """
    ratio = _number(ratio, tables.Fraction, "ratio")
    ranking = _rank(scores, **limits)
    row = ranking.row
    weight = row.spread(_by_name(dict.fromkeys(scores, 1), counts, "counts"))
    total = int(weight[ranking.counted].sum())
    removed = np.cumsum(weight[ranking.order])
    wanted = masks.count_of(ratio, total, rounding="floor")
    if limits.get("protect", "correct") != "correct":
        wanted = originals.floor_of_product(ratio, total)
    reachable = max(removed, default=0)
    if wanted > reachable:
        most = math.floor(1e4 * reachable / max(total, 1)) / 1e4  # rounded up, it would be refused
        raise ValueError(
            f"ratio {ratio} of {len(scores)} layers removes {wanted} of {total} channels, but the "
            f"minimum kept per layer leaves {reachable} to remove; use a ratio of at most {most} "
            "or smaller floors."
        )
    return ranking.without_first(int(np.searchsorted(removed, wanted, side="right")))


def select_to_counts(scores: Scores, counts: Counts, **limits: Unpack[Limits]) -> Keep:
    """Removes the least important channels of every layer until `counts[name]` are left, or none if
    fewer are.

    counts: of all layers. Raises ValueError for a count below the minimum kept of its layer.
    """
    ranking = _rank(scores, **limits)
    layers = ranking.row.layer[ranking.order]
    removed = []
    for i, (name, living) in enumerate(ranking.row.living().items()):
        removable = ranking.order[layers == i]
        surplus = living - counts[name]
        if surplus > len(removable):
            raise ValueError(
                f"{counts[name]} of {len(scores[name])} channels of layer {name!r} are to stay, "
                "fewer than its minimum; use a smaller ratio or a smaller floor."
            )
        removed.append(removable[: max(surplus, 0)])
    return ranking.without(np.concatenate(removed))


def select_to_cost(
    cost: Callable[[Keep], float],
    scores: Scores,
    target: float,
    *,
    tolerance: float = 0.01,
    **limits: Unpack[Limits],
) -> Keep:
    """Removes the least important channels, no more than needed for `cost(keep) <= target * (1 +
    tolerance)`.

    cost: any number that falls as channels go: parameters, FLOPs, bytes; called about
    log2(channels) + 2 times. The result is within `tolerance` of `target` if one channel costs less
    than twice that, else below; tolerance 0: never above `target`. Raises ValueError if the minimum
    kept per layer does not allow it, naming the cost it allows.
    """
    tolerance = _number(tolerance, tables.NonNegative, "tolerance")
    target = _number(target, tables.NonNegative, "target")
    ranking = _rank(scores, **limits)

    def fits(removed: int) -> bool:
        return cost(ranking.without_first(removed)) <= target * (1 + tolerance)

    most = len(ranking.order)
    removed = bisect.bisect_left(range(most + 1), True, key=fits)
    if removed > most:
        least = cost(ranking.without_first(most))
        full = cost(ranking.without_first(0))
        raise ValueError(
            f"cost target {target:g} cannot be reached: the minimum kept per layer costs "
            f"{least:g}, all channels {full:g}; use a larger target or smaller floors."
        )
    return ranking.without_first(removed)


def round_to_multiple(
    keep: Mapping[str, Any],
    scores: Scores,
    multiple: int,
    *,
    alive: Scores | None = None,
) -> Keep:
    """`keep` with every layer's number of channels rounded up to a multiple of `multiple` (8, 16,
    32 for hardware).

    The most important removed channels come back first; only those of `alive` (default: all), so a
    layer with fewer keeps all of them. A budget may be exceeded by the rounding.
    """
    multiple = _number(multiple, tables.Count, "multiple")
    row = _row(scores, alive)
    kept = _row(scores, keep, "keep")
    wanted = {}
    for name, number in kept.living().items():
        wanted[name] = math.ceil(number / multiple) * multiple
    stock = row.alive | kept.alive
    rank = row.rank(-row.score, ~kept.alive, ~stock)
    return row.split(stock & (rank < row.spread(wanted)))


# Ranking ------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """The channels of all layers in one row, by sorted names."""

    names: list[str]  # of the layers, in the caller's order
    layer: np.ndarray  # int [channels]: the number of its layer
    score: np.ndarray  # float64
    alive: np.ndarray  # bool

    def living(self) -> dict[str, int]:
        """How many channels of each layer are alive, by sorted names."""
        counts = np.bincount(self.layer, self.alive)
        names = sorted(self.names)
        return dict(zip(names, counts.astype(int)))

    def spread(self, values: Mapping[str, Any]) -> np.ndarray:
        """The value of its layer, for each channel."""
        return np.array([values[name] for name in sorted(self.names)])[self.layer]

    def split(self, row: np.ndarray) -> Keep:
        """Entries of a row, by name of layer."""
        number = sorted(self.names).index
        return {name: row[self.layer == number(name)] for name in self.names}

    def rank(self, *keys: np.ndarray) -> np.ndarray:
        """The place of each channel in its layer by `keys`, the last first; ties by index."""
        order = np.lexsort((*keys, self.layer))
        first = np.searchsorted(self.layer, self.layer)
        return np.argsort(order) - first


class _Ranking(NamedTuple):
    """What may be removed, and in which order."""

    row: _Row
    counted: np.ndarray  # bool [channels]: alive and not excluded
    held: np.ndarray  # bool: stays, or comes back
    order: np.ndarray  # positions of what may be removed, least important first

    def without(self, removed: np.ndarray) -> Keep:
        """What is left without the channels at the positions `removed`."""
        kept = self.row.alive.copy()
        kept[removed] = False
        return self.row.split(kept | self.held)

    def without_first(self, number: int) -> Keep:
        return self.without(self.order[:number])


def _rank(
    scores: Scores,
    *,
    alive: Scores | None = None,
    floors: Counts | None = None,
    protect: Protect = "correct",
    exclude: str | None = None,
) -> _Ranking:
    row = _row(scores, alive)
    tables.convert(protect, Protect, "protect")
    counted = row.alive
    if exclude is not None:
        counted = counted & ~row.spread(trees.matching(scores, exclude, "exclude"))
    index = np.arange(row.score.size)
    value = originals.last_alive(index) if protect == "original" else row.score
    best = row.rank(-value, ~row.alive)
    held = row.alive & (best < row.spread(_floors(scores, floors)))
    removable = counted if protect == "original_resnet" else counted & ~held
    order = np.lexsort((-index, row.score))  # of equal scores the higher index first
    return _Ranking(row, counted, held, order[removable[order]])


def _row(scores: Scores, alive: Scores | None, what: str = "alive") -> _Row:
    """Raises ValueError for what does not fit together."""
    if alive is None:
        alive = {name: np.ones(np.shape(scores[name]), bool) for name in scores}
    if not scores or alive.keys() != scores.keys():
        different = sorted(alive.keys() ^ scores.keys())
        raise ValueError(
            f"scores have {len(scores)} layers, {what} {len(alive)}, not both have {different[:5]}."
        )
    layers = []
    for i, name in enumerate(sorted(scores)):
        score = np.asarray(scores[name], np.float64)
        lives = np.asarray(alive[name])
        _check_layer(name, score, lives, what)
        layers.append((np.full(score.size, i), score, lives))
    return _Row(list(scores), *map(np.concatenate, zip(*layers)))


def _check_layer(name: str, scores: np.ndarray, alive: np.ndarray, what: str) -> None:
    given = f"{alive.dtype} {alive.shape}"
    needed = scores.shape
    if scores.ndim != 1 or not scores.size:
        wrong = f"scores of {name!r} have shape {needed}; allowed: [channels], at least one."
    elif alive.shape != needed or alive.dtype != bool:
        wrong = f"{what} of {name!r} is {given}; needed: bool {needed}, the shape of its scores."
    elif not alive.any():
        wrong = f"{what} of {name!r} has no channel left; every layer keeps at least one."
    elif np.isnan(scores[alive]).any():
        wrong = f"scores of {name!r} are NaN; look for a loss that is not finite before ranking."
    else:
        return
    raise ValueError(wrong)


def _floors(scores: Scores, floors: Counts | None) -> dict[str, int]:
    sizes = {name: len(array) for name, array in scores.items()}
    return _by_name(minimum_kept(sizes), floors, "floors")


def _by_name(default: dict[str, int], given: Counts | None, field: str) -> dict[str, int]:
    """`default` with the values of `given`, integers of at least 1."""
    result = dict(default)
    for name, value in (given or {}).items():
        if name not in default:
            raise tables.ConfigError(field, name, why="which has no scores", known=default)
        result[name] = _number(value, tables.Count, f"{field}[{name!r}]")
    return result


def _number(value: Any, hint: Any, field: str) -> Any:
    """`tables.convert`, for NumPy numbers too."""
    return tables.convert(value.item() if isinstance(value, np.generic) else value, hint, field)
