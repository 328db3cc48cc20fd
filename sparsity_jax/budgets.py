"""How many channels each layer or group keeps: schedules of rounds, and selections within a budget,
on the host.

    plan = budgets.schedule("gradient_flow", ratio=0.75, num_rounds=25)
    keep = budgets.select(scores, plan.ratios[0])                        # of the whole network, the
    least important go keep = budgets.select(new_scores, plan.ratios[1], alive=keep)        # what
    is removed stays removed keep = budgets.select_by_rule(scores, ((r"stage[12]/.*", 0.5), (r".*",
    0.0))) keep = budgets.select_to_cost(scores, flops, 0.5 * dense)            # flops(keep) ->
    number keep = budgets.round_to_multiple(keep, scores, 8)

Throughout: `scores` maps the name of a layer or group to floats [channels], larger = keep; `keep`
and `alive` map the same names to bools [channels], True = kept. Random pruning is random scores. Of
equal scores the lower index stays, names in sorted order (that of a tree's leaves). NaN scores of
channels alive raise ValueError.

A share of channels is rounded down to a whole number, where decimals mean what they say
(`masks.count_of`): 0.29 of 100 are 29, for which the original takes 28.

Every layer keeps a minimum, by default floor(0.05 * channels) + 1, so none ever vanishes; `floors`
sets other minima by name (`minimum_kept` of the original sizes where `scores` hold survivors only).
`protect` says which channels these are: `correct`, the most important alive; `original`, as the
gradient-flow original, those of the highest index; `original_resnet`, as its ResNets: any may be
selected, then the best of a layer left below its minimum come back, so that fewer go than asked.
With both `original` ones `select` rounds the floating-point product down, as it does.
Source: Lubana & Dick 2021, arXiv:2009.11839, and its published code.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sparsity_jax import masks, tables, trees

Scores = Mapping[str, Any]
Keep = dict[str, np.ndarray]
Protect = Literal["correct", "original", "original_resnet"]


# Schedules of rounds ------------------------------------------------------------------------------


class Rounds(NamedTuple):
    """What every round of a schedule removes; density[i] is the product of (1 - ratios[j]) over j
    <= i.
    """

    ratios: (
        np.ndarray
    )  # float64 [rounds]: share of the channels alive before the round that it removes
    density: np.ndarray  # float64 [rounds]: share of the original channels alive after the round


def round_ratios(
    ratio: float, num_rounds: int, cumulative: Literal["exact", "truncated"] = "exact"
) -> Rounds:
    """The gradient-flow original's schedule to `ratio` P in n rounds: p_i = P / (i P + n (1 - P)),
    i = 1..n.

    The density is (1 - P) / (1 - P + P i / n): early rounds remove more of the original network
    than late ones. With i counted down the shares would be equal, as those of `polynomial_ratios`
    of power 1.
    cumulative: `truncated`, as its ResNets, keeps the density as a whole percentage, truncated
    every round, which ends lower than asked (0.18 for 0.75 in 25 rounds). Raises ConfigError, also
    if no channel would be left.
    """
    total, n = _ratio(ratio), _convert(num_rounds, tables.Count, "num_rounds")
    tables.convert(cumulative, Literal["exact", "truncated"], "cumulative")
    i = np.arange(1, n + 1)
    ratios = total / (i * total + n * (1 - total))
    if cumulative == "exact":
        return Rounds(ratios, (1 - total) / (1 - total + total * i / n))
    percent = [100]
    for removed in ratios:
        percent.append(int(percent[-1] * (1 - removed)))
    return _from_density(np.array(percent[1:]) / 100)


def polynomial_ratios(ratio: float, num_rounds: int, power: float = 3.0) -> Rounds:
    """Density 1 - P (1 - (1 - i / n)^power) after round i = 1..n; power 1 removes equal shares of
    the original network.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, whose power is 3, from density 1. Raises
        ConfigError.
    """
    total, n = _ratio(ratio), _convert(num_rounds, tables.Count, "num_rounds")
    power = _convert(power, tables.Positive, "power")
    return _from_density(1 - total * (1 - (1 - np.arange(1, n + 1) / n) ** power))


def manual_ratios(thresholds: Sequence[float]) -> Rounds:
    """Rounds after which the shares `thresholds` of the original network are gone: increasing, each
    in (0, 1).

    p_1 = t_1, p_i = (t_i - t_(i-1)) / (1 - t_(i-1)). Raises ConfigError.
    """
    if not isinstance(thresholds, Iterable) or isinstance(thresholds, str):
        raise tables.ConfigError(
            f"thresholds is {thresholds!r}; allowed: increasing shares removed, e.g. (0.1, 0.5)."
        )
    thresholds = [_ratio(t, f"thresholds[{i}]") for i, t in enumerate(thresholds)]
    if not thresholds or thresholds[0] <= 0 or np.any(np.diff(thresholds) <= 0):
        raise tables.ConfigError(
            f"thresholds are {thresholds}; allowed: one or more increasing shares removed, above "
            "0, e.g. (0.1, 0.5)."
        )
    before = np.array([0.0, *thresholds[:-1]])
    return Rounds((thresholds - before) / (1 - before), 1 - np.array(thresholds))


SCHEDULES = {
    "gradient_flow": round_ratios,
    "polynomial": polynomial_ratios,
    "manual": manual_ratios,
}


def schedule(name: str, **fields: Any) -> Rounds:
    """The schedule `name` of SCHEDULES with its arguments by name; raises ConfigError for an
    unknown or missing one.
    """
    function = tables.lookup(SCHEDULES, name, "schedule.name")
    try:
        inspect.signature(function).bind(**fields)
    except TypeError as error:
        known = ", ".join(inspect.signature(function).parameters)
        raise tables.ConfigError(f"schedule {name!r}: {error}; fields: {known}.") from None
    return function(**fields)


def ratio_to_reach(density: float, num_original: int, num_alive: int) -> float:
    """Share of the `num_alive` channels to remove for `density` of `num_original` to be left; 0 if
    fewer are alive.

    Instead of a schedule's `ratios`, it makes up for what earlier rounds removed more or less than
    asked.
    """
    return max(1 - density * (num_original / _convert(num_alive, tables.Count, "num_alive")), 0.0)


def _from_density(density: np.ndarray) -> Rounds:
    if not density[-1] > 0:
        raise tables.ConfigError(
            f"the schedule ends at density {density[-1]}; use fewer rounds or a smaller ratio."
        )
    return Rounds(1 - density / np.concatenate([[1.0], density[:-1]]), density)


def rounded_down(share: float) -> float:
    """To four digits, for messages: a limit that is rounded up would be refused."""
    return math.floor(1e4 * share) / 1e4


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`tables.convert`, for NumPy numbers too."""
    return tables.convert(value.item() if isinstance(value, np.generic) else value, hint, where)


def _ratio(value: float, where: str = "ratio") -> float:
    value = _convert(value, tables.Fraction, where)
    if value == 1:
        raise tables.ConfigError(
            f"{where} is 1, which removes everything; allowed: the share removed, below 1."
        )
    return value


# Selections ---------------------------------------------------------------------------------------


def minimum_kept(sizes: Mapping[str, int], share: float = 0.05) -> dict[str, int]:
    """floor(share * size) + 1 channels for every layer of `sizes` (its channels before any
    pruning), at most all.
    """
    _convert(share, tables.Fraction, "share")
    return {
        name: min(masks.count_of(share, int(size), math.floor) + 1, int(size))
        for name, size in sizes.items()
    }


def select(
    scores: Scores,
    ratio: float,
    *,
    alive: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
    protect: Protect = "correct",
    exclude: str | None = None,
) -> Keep:
    """Removes the least important floor(ratio * N) of the N channels alive in the whole network.

    counts: how often a channel of a layer counts in N (default 1; 2 for the original's MobileNet,
    which also counts the depthwise copies); removal stops before the channel that would exceed
    floor(ratio * N). exclude: regular expression of whole names that stay whole and do not count in
    N; a floor of the layer's size keeps it whole and counts it. Raises ValueError if the protection
    leaves fewer than that to remove.
    """
    ratio = _convert(ratio, tables.Fraction, "ratio")
    ranking = _rank(scores, alive, floors, protect, exclude)
    weights = _by_name(dict.fromkeys(ranking.sizes, 1), counts, "counts")
    weight = np.repeat([weights[name] for name in ranking.sizes], list(ranking.sizes.values()))
    total, removed = int(weight[ranking.counted].sum()), np.cumsum(weight[ranking.order])
    wanted = (
        masks.count_of(ratio, total, math.floor) if protect == "correct" else int(ratio * total)
    )
    reachable = int(removed[-1]) if removed.size else 0
    if wanted > reachable:
        layers = f"layer {next(iter(scores))!r}" if len(scores) == 1 else f"{len(scores)} layers"
        most = rounded_down(reachable / max(total, 1))
        raise ValueError(
            f"ratio {ratio} of {layers} removes {wanted} of {total} channels, but the minimum "
            "kept per layer leaves "
            f"{reachable} to remove; use a ratio of at most {most} or smaller floors."
        )
    return ranking.keep(int(np.searchsorted(removed, wanted, side="right")))


def select_by_rule(
    scores: Scores,
    rules: Sequence[tuple[str, float]],
    *,
    alive: Mapping[str, Any] | None = None,
    floors: Mapping[str, int] | None = None,
    protect: Protect = "correct",
) -> Keep:
    """Removes floor(ratio * n) of the n channels alive in every layer, the least important; `ratio`
    by rule.

    rules: pairs of a regular expression and a ratio, the first that matches the whole name decides;
    see `trees.match_rules`. Raises ValueError for a layer whose minimum kept leaves fewer to
    remove, ConfigError for rules.
    """
    scores, alive = _checked(scores, alive)
    ratios = trees.match_rules(scores, rules)
    living = {name: int(own.sum()) for name, own in alive.items()}
    counts = {}
    for name, ratio in ratios.items():
        share = _convert(ratio, tables.Fraction, "ratio")
        counts[name] = living[name] - masks.count_of(share, living[name], math.floor)
    return select_to_counts(scores, counts, alive=alive, floors=floors, protect=protect)


def select_to_counts(
    scores: Scores,
    counts: Mapping[str, int],
    *,
    alive: Mapping[str, Any] | None = None,
    floors: Mapping[str, int] | None = None,
    protect: Protect = "correct",
) -> Keep:
    """Removes the least important channels of every layer until `counts[name]` are left, or none if
    fewer are.

    Raises ValueError for a count below the minimum kept of its layer, ConfigError unless every
    layer has a count.
    """
    scores, alive = _checked(scores, alive)
    if missing := [name for name in scores if name not in counts]:
        raise tables.ConfigError(f"counts have no {missing[0]!r}; allowed: one for every layer.")
    counts = _by_name(dict.fromkeys(scores, 1), counts, "counts")
    floors, keep = _floors(scores, floors), {}
    for name, array in scores.items():
        ranking = _rank({name: array}, {name: alive[name]}, {name: floors[name]}, protect, None)
        removed = int(alive[name].sum()) - int(counts[name])
        if removed > len(ranking.order):
            raise ValueError(
                f"{counts[name]} of {array.size} channels of layer {name!r} are to stay, fewer "
                "than its minimum of "
                f"{floors[name]}; use a smaller ratio or a smaller floor."
            )
        keep |= ranking.keep(max(removed, 0))
    return keep


def select_to_cost(
    scores: Scores,
    cost: Callable[[Keep], float],
    target: float,
    *,
    tolerance: float = 0.01,
    alive: Mapping[str, Any] | None = None,
    floors: Mapping[str, int] | None = None,
    protect: Protect = "correct",
    exclude: str | None = None,
) -> Keep:
    """Removes the least important channels, no more than needed for `cost(keep) <= target * (1 +
    tolerance)`.

    cost: any number that falls as channels go: parameters, FLOPs, bytes; called about
    log2(channels) + 2 times. The result is within `tolerance` of `target` if one channel costs less
    than twice that, else below; tolerance 0: never above `target`. Raises ValueError if the minimum
    kept per layer does not allow it, naming the cost it allows.
    """
    tolerance = _convert(tolerance, tables.NonNegative, "tolerance")
    target = _convert(target, tables.NonNegative, "target")
    ranking = _rank(scores, alive, floors, protect, exclude)
    price = lambda removed: float(cost(ranking.keep(removed)))
    fits = lambda removed: price(removed) <= target * (1 + tolerance)
    low, high = 0, len(ranking.order)  # `low` does not fit, `high` does
    if fits(low):
        return ranking.keep(low)
    if not fits(high):
        raise ValueError(
            f"cost target {target:g} cannot be reached: the minimum kept per layer costs "
            f"{price(high):g}, all channels "
            f"{price(low):g}; use a larger target or smaller floors."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return ranking.keep(high)


def round_to_multiple(
    keep: Mapping[str, Any],
    scores: Scores,
    multiple: int,
    *,
    nearest: bool = False,
    alive: Mapping[str, Any] | None = None,
    floors: Mapping[str, int] | None = None,
) -> Keep:
    """`keep` with every layer's number of channels rounded up to a multiple of `multiple` (8, 16,
    32 for hardware).

    The most important removed channels come back first; only those of `alive` (default: all), so a
    layer with fewer keeps all of them. nearest: round down, dropping the least important, where
    that is nearer and at least the layer's floor. A budget may be exceeded by the rounding.
    """
    multiple = _convert(multiple, tables.Count, "multiple")
    scores, alive = _checked(scores, alive)
    _, keep = _checked(scores, keep, "keep")
    floors = _floors(scores, floors)
    result = {}
    for name, array in scores.items():
        kept = int(keep[name].sum())
        wanted = -(-kept // multiple) * multiple
        if nearest and kept % multiple and 2 * (wanted - kept) > multiple:
            wanted = wanted - multiple if wanted - multiple >= floors[name] else wanted
        stock = alive[name] | keep[name]
        order = np.lexsort((-array, ~keep[name], ~stock))  # kept ones first, then by score; stable
        result[name] = np.zeros(array.size, bool)
        result[name][order[: min(wanted, stock.sum())]] = True
    return result


# Ranking ------------------------------------------------------------------------------------------


class _Ranking(NamedTuple):
    """The channels of all layers in one row, names sorted."""

    names: tuple[str, ...]  # in the caller's order
    sizes: dict[str, int]  # in the order of the row
    alive: np.ndarray  # bool [channels of all layers]
    counted: np.ndarray  # bool: alive and not excluded
    order: np.ndarray  # positions of what may be removed, least important first
    held: np.ndarray  # positions of what stays, or comes back

    def keep(self, removed: int) -> Keep:
        """What is left without the first `removed` of `order`."""
        kept = self.alive.copy()
        kept[self.order[:removed]] = False
        kept[self.held] = True
        parts = dict(zip(self.sizes, np.split(kept, np.cumsum(list(self.sizes.values()))[:-1])))
        return {name: parts[name] for name in self.names}


def _rank(
    scores: Scores, alive: Any, floors: Any, protect: Protect, exclude: str | None
) -> _Ranking:
    scores, alive = _checked(scores, alive)
    _convert(protect, Protect, "protect")
    floors = _floors(scores, floors)
    excluded = (
        dict.fromkeys(scores, False)
        if exclude is None
        else trees.matching(scores, exclude, "exclude")
    )
    names = sorted(scores)
    sizes = {name: scores[name].size for name in names}
    counted = np.concatenate([alive[name] & (not excluded[name]) for name in names])
    starts = dict(zip(names, np.cumsum([0, *sizes.values()])))
    pick = _last if protect == "original" else _best
    held = np.concatenate(
        [starts[name] + pick(scores[name], alive[name], floors[name]) for name in names]
    )
    row, removable = np.concatenate([scores[name] for name in names]), counted.copy()
    if protect != "original_resnet":
        removable[held] = False
    order = np.lexsort(
        (-np.arange(row.size), row)
    )  # ascending score; of equal ones the higher index first
    alive_row = np.concatenate([alive[name] for name in names])
    return _Ranking(tuple(scores), sizes, alive_row, counted, order[removable[order]], held)


def _best(scores: np.ndarray, alive: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` most important channels alive; equal scores: lower index first."""
    positions = np.flatnonzero(alive)
    return positions[np.argsort(-scores[positions], kind="stable")[:count]]


def _last(scores: np.ndarray, alive: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` channels alive of the highest index."""
    return np.flatnonzero(alive)[-count:]


def _checked(
    scores: Scores, alive: Any, where: str = "alive"
) -> tuple[dict[str, np.ndarray], Keep]:
    """float64 scores and bools by name; raises ValueError for what does not fit together."""
    scores = {name: np.asarray(array, np.float64) for name, array in scores.items()}
    alive = (
        {name: np.ones(array.shape, bool) for name, array in scores.items()}
        if alive is None
        else alive
    )
    alive = {name: np.asarray(array) for name, array in alive.items()}
    if not scores or set(alive) != set(scores):
        different = sorted(set(alive) ^ set(scores))
        raise ValueError(
            f"scores have {len(scores)} layers, {where} {len(alive)}, not both have "
            f"{different[:5]}."
        )
    for name, array in scores.items():
        if array.ndim != 1 or not array.size:
            raise ValueError(
                f"scores of {name!r} have shape {array.shape}; allowed: [channels], at least one."
            )
        if alive[name].shape != array.shape or alive[name].dtype != bool:
            found = f"{alive[name].dtype} {alive[name].shape}"
            raise ValueError(
                f"{where} of {name!r} is {found}; needed: bool {array.shape}, the shape of its "
                "scores."
            )
        if not alive[name].any():
            raise ValueError(
                f"{where} of {name!r} has no channel left; every layer keeps at least one."
            )
        if np.isnan(array[alive[name]]).any():
            raise ValueError(
                f"scores of {name!r} are NaN; look for a loss that is not finite before ranking."
            )
    return scores, alive


def _floors(scores: dict[str, np.ndarray], floors: Mapping[str, int] | None) -> dict[str, int]:
    return _by_name(
        minimum_kept({name: array.size for name, array in scores.items()}), floors, "floors"
    )


def _by_name(
    default: dict[str, int], given: Mapping[str, int] | None, where: str
) -> dict[str, int]:
    """`default` with the values of `given`, integers of at least 1."""
    for name in given or {}:
        if name not in default:
            raise tables.ConfigError(
                f"{where} names {name!r}, which has no scores.{tables.closest(name, default)}"
            )
    return default | {
        name: _convert(value, tables.Count, f"{where}[{name!r}]")
        for name, value in (given or {}).items()
    }
