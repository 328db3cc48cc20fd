"""How many channels each layer or group keeps: schedules of rounds, and selections within a budget,
on the host.

    plan = budgets.schedule("gradient_flow", ratio=0.75, num_rounds=25)
    keep = budgets.select(scores, plan.ratios[0])                    # the least important go
    keep = budgets.select(new_scores, plan.ratios[1], alive=keep)    # removed stays removed
    keep = budgets.select_by_rule(scores, ((r"stage[12]/.*", 0.5), (r".*", 0.0)))
    keep = budgets.select_to_cost(scores, flops, 0.5 * dense)        # flops(keep) -> number
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
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np

from sparsity_jax import masks, originals, tables, trees

Scores = Mapping[str, Any]
Keep = dict[str, np.ndarray]
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


def rounded_down(share: float) -> float:
    """To four digits, for messages: a limit that is rounded up would be refused."""
    return math.floor(1e4 * share) / 1e4


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


def minimum_kept(sizes: Mapping[str, int], share: float = 0.05) -> dict[str, int]:
    """floor(share * size) + 1 channels for every layer of `sizes` (its channels before any
    pruning), at most all.
    """
    _number(share, tables.Fraction, "share")
    return {
        name: min(masks.count_of(share, int(size), "floor") + 1, int(size))
        for name, size in sizes.items()
    }


def select(
    scores: Scores,
    ratio: float,
    *,
    counts: Counts | None = None,
    **limits: Unpack[Limits],
) -> Keep:
    """Removes the least important floor(ratio * N) of the N channels alive in the whole network.

    counts: how often a channel of a layer counts in N (default 1; 2 for the original's MobileNet,
    which also counts the depthwise copies); removal stops before the channel that would exceed
    floor(ratio * N). Raises ValueError if the protection leaves fewer than that to remove.
    """
    ratio = _number(ratio, tables.Fraction, "ratio")
    ranking = _rank(scores, **limits)
    weights = _by_name(dict.fromkeys(scores, 1), counts, "counts")
    weight = np.zeros(len(ranking.alive), int)
    for name, place in ranking.places.items():
        weight[place] = weights[name]
    total = int(weight[ranking.counted].sum())
    removed = np.cumsum(weight[ranking.order])
    if limits.get("protect", "correct") == "correct":
        wanted = masks.count_of(ratio, total, "floor")
    else:
        wanted = originals.floor_of_product(ratio, total)
    reachable = int(removed[-1]) if removed.size else 0
    if wanted > reachable:
        raise ValueError(
            f"ratio {ratio} of {len(scores)} layers removes {wanted} of {total} channels, but the "
            f"minimum kept per layer leaves {reachable} to remove; use a ratio of at most "
            f"{rounded_down(reachable / max(total, 1))} or smaller floors."
        )
    return ranking.without_first(int(np.searchsorted(removed, wanted, side="right")))


def select_by_rule(
    scores: Scores, rules: Sequence[tuple[str, float]], **limits: Unpack[Limits]
) -> Keep:
    """Removes floor(ratio * n) of the n channels alive in every layer, the least important; `ratio`
    by rule.

    rules: pairs of a regular expression and a ratio, the first that matches the whole name decides;
    see `trees.match_rules`. Raises ValueError for a layer whose minimum kept leaves fewer to
    remove, ConfigError for rules.
    """
    _, alive = _checked(scores, limits.get("alive"))
    counts = {}
    for name, ratio in trees.match_rules(dict.fromkeys(scores, 0), rules).items():
        living = int(alive[name].sum())
        share = _number(ratio, tables.Fraction, "ratio")
        counts[name] = living - masks.count_of(share, living, "floor")
    return select_to_counts(scores, counts, **limits)


def select_to_counts(scores: Scores, counts: Counts, **limits: Unpack[Limits]) -> Keep:
    """Removes the least important channels of every layer until `counts[name]` are left, or none if
    fewer are.

    counts: of all layers. Raises ValueError for a count below the minimum kept of its layer.
    """
    ranking = _rank(scores, **limits)
    removed = []
    for name, place in ranking.places.items():
        in_layer = (place.start <= ranking.order) & (ranking.order < place.stop)
        removable = ranking.order[in_layer]
        number = int(ranking.alive[place].sum()) - counts[name]
        if number > len(removable):
            raise ValueError(
                f"{counts[name]} of {place.stop - place.start} channels of layer {name!r} are to "
                f"stay, fewer than its minimum; use a smaller ratio or a smaller floor."
            )
        removed.append(removable[: max(number, 0)])
    return ranking.without(np.concatenate(removed))


def select_to_cost(
    scores: Scores,
    cost: Callable[[Keep], float],
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
        least, full = cost(ranking.without_first(most)), cost(ranking.without_first(0))
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
    rounding: Literal["ceil", "nearest"] = "ceil",
    alive: Scores | None = None,
    floors: Counts | None = None,
) -> Keep:
    """`keep` with every layer's number of channels a multiple of `multiple` (8, 16, 32 for
    hardware).

    The most important removed channels come back first; only those of `alive` (default: all), so a
    layer with fewer keeps all of them. rounding: `nearest` drops the least important where the
    multiple below is nearer and at least the layer's floor. A budget may be exceeded by the
    rounding.
    """
    multiple = _number(multiple, tables.Count, "multiple")
    scores, alive = _checked(scores, alive)
    _, keep = _checked(scores, keep, "keep")
    floors = _floors(scores, floors)
    result = {}
    for name, array in scores.items():
        multiples = int(keep[name].sum()) / multiple
        wanted = masks.ROUNDINGS[rounding](multiples) * multiple
        if wanted < floors[name]:
            wanted = math.ceil(multiples) * multiple
        stock = alive[name] | keep[name]
        order = np.lexsort((-array, ~keep[name], ~stock))  # kept ones first, then by score; stable
        result[name] = np.zeros(array.size, bool)
        result[name][order[: min(wanted, stock.sum())]] = True
    return result


# Ranking ------------------------------------------------------------------------------------------


class _Ranking(NamedTuple):
    """The channels of all layers in one row, by sorted names."""

    places: dict[str, slice]  # where each layer is in the row; names in the caller's order
    alive: np.ndarray  # bool [channels of all layers]
    counted: np.ndarray  # bool: alive and not excluded
    order: np.ndarray  # positions of what may be removed, least important first
    held: np.ndarray  # positions of what stays, or comes back

    def without(self, removed: np.ndarray) -> Keep:
        """What is left without the channels at the positions `removed`."""
        kept = self.alive.copy()
        kept[removed] = False
        kept[self.held] = True
        return {name: kept[place] for name, place in self.places.items()}

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
    scores, alive = _checked(scores, alive)
    tables.convert(protect, Protect, "protect")
    floors = _floors(scores, floors)
    excluded = dict.fromkeys(scores, False)
    if exclude is not None:
        excluded = trees.matching(scores, exclude, "exclude")
    best = originals.last_alive if protect == "original" else _best
    names, start = sorted(scores), 0
    places, counted, held = {}, [], []
    for name in names:
        places[name] = slice(start, start + scores[name].size)
        counted.append(alive[name] & (not excluded[name]))
        held.append(start + best(scores[name], alive[name], floors[name]))
        start = places[name].stop
    row = np.concatenate([scores[name] for name in names])
    # ascending score; of equal ones the higher index first
    order = np.lexsort((-np.arange(row.size), row))
    removable = np.concatenate(counted)
    if protect != "original_resnet":
        removable[np.concatenate(held)] = False
    return _Ranking(
        {name: places[name] for name in scores},
        np.concatenate([alive[name] for name in names]),
        np.concatenate(counted),
        order[removable[order]],
        np.concatenate(held),
    )


def _best(scores: np.ndarray, alive: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` most important channels alive; equal scores: lower index first."""
    positions = np.flatnonzero(alive)
    return positions[np.argsort(-scores[positions], kind="stable")[:count]]


def _checked(scores: Scores, alive: Any, what: str = "alive") -> tuple[dict[str, np.ndarray], Keep]:
    """float64 scores and bools by name; raises ValueError for what does not fit together."""
    scores = {name: np.asarray(array, np.float64) for name, array in scores.items()}
    if alive is None:
        alive = {name: np.ones(array.shape, bool) for name, array in scores.items()}
    alive = {name: np.asarray(array) for name, array in alive.items()}
    if not scores or set(alive) != set(scores):
        different = sorted(set(alive) ^ set(scores))
        raise ValueError(
            f"scores have {len(scores)} layers, {what} {len(alive)}, not both have {different[:5]}."
        )
    for name, array in scores.items():
        _check_layer(name, array, alive[name], what)
    return scores, alive


def _check_layer(name: str, scores: np.ndarray, alive: np.ndarray, what: str) -> None:
    if scores.ndim != 1 or not scores.size:
        raise ValueError(
            f"scores of {name!r} have shape {scores.shape}; allowed: [channels], at least one."
        )
    if alive.shape != scores.shape or alive.dtype != bool:
        raise ValueError(
            f"{what} of {name!r} is {alive.dtype} {alive.shape}; needed: bool {scores.shape}, the "
            "shape of its scores."
        )
    if not alive.any():
        raise ValueError(f"{what} of {name!r} has no channel left; every layer keeps at least one.")
    if np.isnan(scores[alive]).any():
        raise ValueError(
            f"scores of {name!r} are NaN; look for a loss that is not finite before ranking."
        )


def _floors(scores: Keep, floors: Counts | None) -> dict[str, int]:
    sizes = {name: array.size for name, array in scores.items()}
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
