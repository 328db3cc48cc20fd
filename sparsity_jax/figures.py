"""Result rows to series, numbers and figures; `report` puts them on a page.

Nothing here reads files or keeps global state: figures are plain `matplotlib.figure.Figure` objects. Accuracies and
ratios are fractions in [0, 1] throughout and become percentages only on axes.
"""

import collections
import io
import json
import math
import re
import warnings
from typing import Any, NamedTuple

import numpy as np

STOPS = (0.9, 0.95, 0.98, 0.99)  # pruning ratios with a column of their own in the summary
LAYER_STOPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
NEAR = 0.0015  # a ratio this close to a stop stands for it; nothing is interpolated
DROP = 0.01  # "within one point of dense"

# Okabe and Ito's colour-blind-safe hues (2008) without yellow and black, then six that differ from them in lightness.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4bb7", "#7d8590",
    "#8c1d4f", "#8c8c1f", "#0b7f8a", "#8a5a2b")  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 1, 1, 1, 1, 1))
INK, MUTED, GRID = "#1f2328", "#656d77", "#dfe3e8"  # the page's own colours; `svg` turns them into CSS variables

FIELDS = {  # what rows of each kind hold; any other key may be a swept value
    "all": {"stage", "kind", "visit", "arm", "member", "num_params"},
    "train": {
        "epoch",
        "step",
        "learning_rate",
        "seconds",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "unreadable",
        "unreadable_images",
        "test_unreadable",
        "start",
        "chance",
    },
    "curve": {
        "ratio",
        "num_kept",
        "num_prunable",
        "sparsity",
        "sparsity_all",
        "channels_removed",
        "selection",
        "scope",
        "split",
        "accuracy",
        "loss",
        "retrained",
        "layers",
    },
    "grow": {"growth", "keep", "scores", "layers", "ratio"},
    "remove": {"layers", "ratio"},
    "oracle": {"choices", "loss", "loss_by_norm", "rank", "losses"},
    "noise": {"draw", "std", "loss", "accuracy"},
    "jacobian": {"mean", "std", "smallest", "largest", "mean_by_rank", "num_examples"},
    "histogram": {"threshold", "count_above", "edges", "counts", "num_zero"},
    "sfw_init": {"iteration", "loss_before", "loss_after"},
    "cut": {"measure", "ratio", "budget", "round", "num_kept", "num_channels", "kept", "sizes", "layout"},
    "compact": {
        *("accuracy", "difference", "parameters", "parameters_compact", "flops", "flops_compact", "bytes"),
        *("bytes_compact", "kept", "sizes", "batch_size", "milliseconds", "milliseconds_low", "milliseconds_high"),
        *("speedup", "speedup_low", "speedup_high", "verdict", "device", "tolerance", "warning"),
    },
    "limit": {"phase", "limit", "criterion", "tolerance", "evaluations", "how"},
    "path": {"ratio", "distance", "change", "first_order", "second_order"},
    "row_norms": {"quantile", "magnitude", "row_norm", "parameter", "zero_share", "rows", "num_weights"},
    "spectrum": {
        "probe",
        "operator",
        "num_matvecs",
        "alphas",
        "betas",
        "dtype",
        "dimension",
        "enclosure",
        "narrow_enough",
    },
    "width": {
        "predicted",
        "method",
        "low",
        "high",
        "enclosure_low",
        "enclosure_high",
        "standard_error",
        "epsilon_error",
        "per_probe",
        "predicted_on_grid",
        "epsilon",
        "spectrum",
        "num_probes",
        "negative_mass",
        "negative",
        "actual",
        "history",
        "ratios",
        "distances",
        "widths",
        "ritz_values",
        "ritz_weights",
    },
}


class Series(NamedTuple):
    """All rows of one arm at one setting of the swept values; its members differ in their seeds only.

    before: by member, rows of the same network under earlier names, since its weights were drawn.
    """

    label: str
    rows: list[dict]
    before: dict[tuple, list[dict]] = {}  # noqa: RUF012 - never changed


class Curve(NamedTuple):
    """One way of pruning one series, at every ratio. A value that a member lacks is NaN."""

    series: int  # index of the series
    stage: str
    visit: int
    variant: str  # what tells this curve from others of the series, "" if nothing needs telling
    dash: int  # index of the variant, the same for all series
    retrained: bool
    ratio: np.ndarray  # [ratios], ascending
    members: tuple  # [members], identity of each
    accuracy: np.ndarray  # [members, ratios]
    loss: np.ndarray  # [members, ratios]
    zeros: np.ndarray  # [members, ratios], share of zeros in the arrays that may be pruned
    zeros_of_all: np.ndarray  # [members, ratios], in all parameters
    channels: np.ndarray  # [members, ratios], share of channels removed by a structured selection
    layers: dict  # ratio to {path: mean sparsity}


class Line(NamedTuple):
    """One drawn line: `mean` with a band from `low` to `high`."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    color: int | None = 0  # None: ink
    dash: int = 0
    marks: bool = False
    points: str = ""  # "filled" or "open": markers without a line


class Guide(NamedTuple):
    """A straight line across a panel, with a band from `low` to `high` and `text` beside it."""

    at: float
    text: str = ""
    legend: str = ""
    color: int | None = None  # None: ink, dotted
    low: float = math.nan
    high: float = math.nan
    across: bool = False  # at a y rather than at an x, which needs the panel's xlim


class Panel(NamedTuple):
    """One pair of axes. `percent` names the axes ("x", "y", "xy") whose fractions are shown in percent."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    percent: str = ""
    xlim: tuple[float, float] | None = None
    shade: tuple[float, float] | None = None
    steps: bool = False
    powers: bool = False  # x is log10 of the quantity
    integers: bool = False  # x counts something
    guides: tuple[Guide, ...] = ()
    ylim: tuple[float, float] | None = None
    log: str = ""  # axes in powers of ten: "x", "y" or "xy"


# ---------------------------------------------------------------------------------------------- rows to numbers


def number(value: Any) -> float:
    """`value` as a float; anything that is no finite number becomes NaN."""
    return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else math.nan


def mean_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation (n - 1) over axis 0, NaN left out; 0 where there is only one value."""
    values = np.asarray(values, float)
    known = np.isfinite(values)
    count = known.sum(0)
    mean = np.where(known, values, 0.0).sum(0) / np.maximum(count, 1)
    spread = np.where(known, values - mean, 0.0) ** 2
    return np.where(count > 0, mean, np.nan), np.sqrt(spread.sum(0) / np.maximum(count - 1, 1))


def is_seed(key: str) -> bool:
    """Whether a swept value is a seed, to be averaged over: `seed`, or a setting of that name such as `data.seed`."""
    return key.rsplit(".", 1)[-1] == "seed"


def member_of(row: dict) -> tuple:
    """Identity of the trained network within its series."""
    return (row.get("member", 0), *(str(row[key]) for key in sorted(row) if key.endswith("seed") and is_seed(key)))


def swept_keys(rows: list[dict]) -> list[str]:
    """Names of the swept values other than seeds that take several values within some arm.

    A swept value is a key outside the row schema that is a dotted setting (`fit.optimizer.name`), or that stands on
    every row of a member with one value; a metric this module does not know is therefore not mistaken for one.
    """
    known = set().union(*FIELDS.values())
    candidates = sorted({key for row in rows for key in row if key not in known and not is_seed(key)})
    found = []
    for key in candidates:
        values, steady = collections.defaultdict(set), True
        per_member = {}
        for row in rows:
            value = json.dumps(row[key], default=str) if key in row else None
            values[row.get("arm")].add(value)
            steady &= per_member.setdefault((row.get("arm"), row.get("member")), value) == value and value is not None
        if ("." in key or steady) and any(len(seen) > 1 for seen in values.values()):
            found.append(key)
    return found


def group(rows: list[dict]) -> list[Series]:
    """Rows by arm and swept values, in order of first appearance; seeds stay together."""
    keys = swept_keys(rows)
    short = collections.Counter(key.rsplit(".", 1)[-1] for key in keys)
    stages = {row.get("stage") for row in rows}
    groups, arm_stages = {}, collections.defaultdict(set)
    before, lives = collections.defaultdict(dict), collections.defaultdict(list)
    for row in rows:
        arm = str(row.get("arm", "run"))
        values = tuple((key, json.dumps(row[key], default=str)) for key in keys if row.get(key) is not None)
        member = member_of(row)
        if begins_anew(row, lives[member]):
            lives[member] = []
        before[arm, values].setdefault(member, list(lives[member]))
        if row.get("kind") != "curve":
            lives[member].append(row)
        groups.setdefault((arm, values), []).append(row)
        arm_stages[arm].add(row.get("stage"))

    def name(key, arm):
        """The last part says enough, unless it is ambiguous or the setting belongs to a stage of another arm."""
        stage, _, last = key.partition(".")[0], None, key.rsplit(".", 1)[-1]
        return key if short[last] > 1 or (stage in stages and stage not in arm_stages[arm]) else last

    def label(arm, values):
        settings = ", ".join(f"{name(key, arm)}={value.strip(chr(34))}" for key, value in values)
        return f"{arm} ({settings})" if settings else arm

    return [Series(label(*name), members, before[name]) for name, members in groups.items()]


def begins_anew(row: dict, earlier: list[dict]) -> bool:
    """Whether `row` is the first one of a training that begins with the initial weights, all of them."""
    place = lambda row: (row.get("stage"), row.get("visit"))
    same = bool(earlier) and place(earlier[-1]) == place(row)
    return row.get("start") == "init" and not same


def share_gone(row: dict, total: str = "num_prunable") -> float:
    """Share of what a row counts that is not kept; NaN of a row without counts."""
    whole = number(row.get(total))
    return 1 - number(row.get("num_kept")) / whole if whole > 0 else math.nan


def share_removed(row: dict) -> float:
    """Share that a row of a curve really removed: the one asked for, unless the counts of weights say another.

    Masks from before a curve, and selections of whole filters, do not allow every share.
    """
    asked, gone = number(row["ratio"]), share_gone(row)
    exact = math.isnan(gone) or abs(gone - asked) <= NEAR
    return round(asked, 6) if exact else round(gone, 4)


def removal(row: dict) -> tuple[str, float] | None:
    """(what was removed, its share of all) after a row of a stage that removes something; None for any other row."""
    if row.get("kind") == "cut" and "num_channels" in row:
        return "channels", share_gone(row, "num_channels")
    if row.get("kind") in ("prune", "remove") or (row.get("kind") == "grow" and "layers" in row):
        gone = share_gone(row)
        return "weights", number(row.get("sparsity", row.get("ratio"))) if math.isnan(gone) else gone
    return None


def curves(series: list[Series], split: str = "test") -> list[Curve]:
    """Every pruning curve of every series on one split.

    A series with several ways of pruning (retrained, selection, scope, or another stage or visit) has one curve each.
    Of two rows of one member at one ratio the later one counts. Ratios are those of `share_removed`.
    """
    parts = ("retrained", "selection", "scope", "stage", "visit")
    tables = {}
    for index, one in enumerate(series):
        for row in one.rows:
            if row.get("kind") == "curve" and row.get("split", "test") == split and "ratio" in row:
                variant = (bool(row.get("retrained", False)), *(row.get(part) for part in parts[1:]))
                cells = tables.setdefault((index, variant), {})
                cells.setdefault(member_of(row), {})[share_removed(row)] = row
    seen = [{variant[i] for _, variant in tables} for i in range(len(parts))]
    distinct = [len({(index, variant[:i]) for index, variant in tables}) for i in range(len(parts) + 1)]
    several = [  # stage and visit tell curves apart only where one series has more than one of otherwise the same kind
        len(seen[i]) > 1 if i < 3 else distinct[i + 1] > distinct[i] for i in range(len(parts))
    ]

    def describe(variant):
        words = ["retrained" if variant[0] else "no retraining", *(f"{x}" for x in variant[1:4]), f"visit {variant[4]}"]
        return ", ".join(word for word, shown in zip(words, several) if shown)

    names = list(dict.fromkeys(describe(variant) for _, variant in sorted(tables, key=str)))
    names.sort(key=lambda name: name.startswith("retrained"))
    result = []
    for (index, variant), cells in tables.items():
        ratios = sorted({ratio for found in cells.values() for ratio in found})
        name = describe(variant)
        result.append(
            Curve(
                index,
                str(variant[3]),
                variant[4] or 1,
                name,
                names.index(name),
                variant[0],
                np.array(ratios),
                tuple(cells),
                tabulate(cells.values(), ratios, "accuracy"),
                tabulate(cells.values(), ratios, "loss"),
                tabulate(cells.values(), ratios, "sparsity"),
                tabulate(cells.values(), ratios, "sparsity_all"),
                tabulate(cells.values(), ratios, "channels_removed"),
                layer_means(cells, ratios),
            )
        )
    return sorted(result, key=lambda curve: (curve.series, curve.dash))


def tabulate(members, points, field: str) -> np.ndarray:
    """`field` as [members, points] from one {point: row} per member; NaN where a member has no number."""
    return np.array([[number(rows.get(point, {}).get(field)) for point in points] for rows in members])


def layer_means(cells: dict, ratios: list[float]) -> dict[float, dict[str, float]]:
    """Sparsity of each layer, averaged over members, at the ratios nearest to LAYER_STOPS that rows give layers for."""
    result = {}
    for stop in LAYER_STOPS:
        near = sorted((r for r in ratios if abs(r - stop) <= NEAR), key=lambda r: abs(r - stop))
        tables = [[cell[r]["layers"] for cell in cells.values() if cell.get(r, {}).get("layers")] for r in near]
        found = next((table for table in tables if table), None)
        if found:
            result[stop] = {
                path: float(mean_std(np.array([[number(one.get(path))] for one in found]))[0][0]) for path in found[0]
            }
    return result


def training(one: Series) -> dict[tuple, dict[int, dict]]:
    """Per member: rows of training, growing penalties or not, by epoch since the start of the arm.

    Epochs of later stages and visits count on.
    """
    result = {}
    for row in one.rows:
        if row.get("kind") in ("train", "grow") and "epoch" in row:
            block = result.setdefault(member_of(row), {}).setdefault((row.get("stage"), row.get("visit", 1)), {})
            block[int(row["epoch"])] = row
    merged = {}
    for member, blocks in result.items():
        start, merged[member] = 0, {}
        for block in blocks.values():
            merged[member] |= {start + epoch: row for epoch, row in sorted(block.items())}
            start += max(block)
    return merged


def channel_rounds(one: Series) -> dict[float, dict[str, float]]:
    """Share of each group's channels that is gone, by share removed from the network; mean over members."""
    cells: dict[float, dict[str, list[float]]] = {}
    for row in one.rows:
        if row.get("kind") == "cut" and row.get("sizes"):
            for name, size in row["sizes"].items():
                gone = 1 - number(row["kept"].get(name, size)) / size
                share = (removal(row) or ("", number(row["ratio"])))[1]
                cells.setdefault(round(share, 4), {}).setdefault(name, []).append(gone)
    return {ratio: {name: float(np.mean(gone)) for name, gone in own.items()} for ratio, own in sorted(cells.items())}


def group_layout(series: list[Series]) -> tuple[dict, list[tuple[str, dict[str, float]]]]:
    """(layout of the first row that has one, channels kept by group of each series after its last cut that is of it:
    (label, mean over members)); ({}, []) without any."""
    cuts = [(one.label, [row for row in one.rows if row.get("kind") == "cut"]) for one in series]
    layout = next((row["layout"] for _, rows in cuts for row in rows if row.get("layout")), {})
    found, names = [], set(layout.get("groups", ()))
    for label, rows in cuts:
        last = {member_of(row): row["kept"] for row in rows if set(row.get("kept", ())) == names}
        if last:
            mean = lambda name, last=last: float(np.mean([number(kept[name]) for kept in last.values()]))
            found.append((label, {name: mean(name) for name in layout["groups"]}))
    return layout, found


def at_ratio(curve: Curve, values: np.ndarray, stop: float) -> np.ndarray:
    """Column of `values` [members, ratios] at the available ratio nearest to `stop`; NaN if none is within NEAR."""
    distance = np.abs(curve.ratio - stop)
    return values[:, distance.argmin()] if distance.min() <= NEAR else np.full(len(values), np.nan)


class Summary(NamedTuple):
    """One line of the summary table. `cells` maps a column to (mean, std, number of members).

    floors: columns whose numbers are lower bounds.
    """

    series: int
    label: str
    variant: str
    cells: dict[str, tuple[float, float, int]]
    floors: frozenset = frozenset()


def summary(series: list[Series], found: list[Curve], stops: tuple[float, ...] = STOPS) -> list[Summary]:
    """The numbers of the summary table: one line per curve, and one per series whose trained network has none or was
    pruned on the way.

    Columns of a curve: `dense` (its own accuracy where nothing is removed; without that, the last test accuracy of the
    training before it if it does not retrain and nothing was removed before), `0.9` ... (accuracy at those `stops`),
    `largest` (largest share whose accuracy is at most DROP below `dense`, per member; none for a network at chance).
    Columns of a trained network: `dense` (last test accuracy before anything was removed, `before`: after so many
    epochs), `pruned` (last test accuracy after that), `channels` or `weights` (the share then gone). Of both: `epochs`
    and `seconds` under the name of the series until then, see `time_spent`. Columns without any number are left out.
    """
    result = []
    for index, one in enumerate(series):
        mine = [curve for curve in found if curve.series == index]
        for curve in mine:
            columns, floors = curve_columns(one, curve, stops)
            result.append(Summary(index, one.label, curve.variant, cells_of(columns), floors))
        columns = trained_columns(one)
        if not mine or "pruned" in columns:
            result.append(Summary(index, one.label, "as trained" if mine else "", cells_of(columns)))
    return [line for line in result if line.cells]


def cells_of(columns: dict[str, list[float]]) -> dict[str, tuple[float, float, int]]:
    """(mean, std, number of members) of every column with a number."""
    cells = {}
    for column, values in columns.items():
        known = np.array([value for value in values if math.isfinite(value)])
        if known.size:
            mean, std = mean_std(known[:, None])
            cells[column] = (float(mean[0]), float(std[0]), known.size)
    return cells


def curve_columns(one: Series, curve: Curve, stops: tuple[float, ...]) -> tuple[dict[str, list[float]], frozenset]:
    """(values per member of each column, columns that are lower bounds) of one curve; see `summary`."""
    pasts = {member: past(one, member, (curve.stage, curve.visit)) for member in curve.members}
    dense = at_ratio(curve, curve.accuracy, 0.0)
    if not curve.retrained:
        trained = [accuracies(pasts[member]) for member in curve.members]
        fallback = np.array([before if not gone[0] else math.nan for before, _, gone in trained])
        dense = np.where(np.isfinite(dense), dense, fallback)
    chance = np.array([chance_of(pasts[member]) for member in curve.members])
    within = np.where(curve.accuracy >= dense[:, None] - DROP - 1e-9, curve.ratio, -np.inf).max(1)
    columns = {"dense": list(dense), **{str(stop): list(at_ratio(curve, curve.accuracy, stop)) for stop in stops}}
    columns["largest"] = list(np.where(dense > chance + DROP, within, np.nan))
    reached = any(value >= curve.ratio.max() for value in columns["largest"])
    columns |= time_spent(one, pasts)
    return columns, frozenset({"largest"} if reached else ())


def trained_columns(one: Series) -> dict[str, list[float]]:
    """Values per member of each column of the network as training left it; see `summary`."""
    members = list(dict.fromkeys(member_of(row) for row in one.rows if row.get("kind") in ("train", "grow")))
    pasts = {member: past(one, member) for member in members}
    columns = collections.defaultdict(list)
    for rows in pasts.values():
        before, after, gone = accuracies(rows)
        columns["dense"].append(before)
        if math.isfinite(after):
            columns["before"].append(epochs_unpruned(rows))
            columns[gone[0]].append(gone[1])
            columns["pruned"].append(after)
    return {**columns, **time_spent(one, pasts)}


def past(one: Series, member: tuple, until: tuple[str, int] | None = None) -> list[dict]:
    """Rows of one network since its weights were drawn, up to the visit `until` of a stage, (name, number)."""
    own = [row for row in one.rows if member_of(row) == member]
    places = [(str(row.get("stage")), row.get("visit") or 1) for row in own]
    end = places.index(until) if until in places else len(own)
    return [*one.before.get(member, ()), *own[:end]]


def accuracies(rows: list[dict]) -> tuple[float, float, tuple[str, float]]:
    """(last test accuracy before anything was removed, last one after that, what is gone by then); NaN where none."""
    before = after = math.nan
    gone = ("", 0.0)
    for row in rows:
        gone = removal(row) or gone
        tested = number(row.get("test_accuracy"))
        if math.isnan(tested) or row.get("kind") not in ("train", "grow"):
            continue
        if gone[0]:
            after = tested
        elif row["kind"] == "train":  # a growing penalty already acts on what will go
            before = tested
    return before, after, gone


def epochs_unpruned(rows: list[dict]) -> float:
    """Epochs of training before anything was removed."""
    last = {}
    for row in rows:
        if removal(row):
            break
        if row.get("kind") == "train" and "epoch" in row:
            last[row.get("stage"), row.get("visit")] = int(row["epoch"])
    return float(sum(last.values()))


def chance_of(rows: list[dict]) -> float:
    """Accuracy of always answering the most frequent class, as far as rows know it; minus infinity otherwise."""
    known = [row["chance"] for row in rows if "chance" in row]
    return known[-1] if known else -math.inf


def time_spent(one: Series, pasts: dict[tuple, list[dict]]) -> dict[str, list[float]]:
    """`epochs` and `seconds` of the trainings among `pasts`, rows by member, that are of the series itself.

    seconds: per stage, the number of its epochs times their median time without the first one, which compiles. A stage
    with a single epoch counts as it was measured.
    """
    columns = {"epochs": [], "seconds": []}
    for rows in pasts.values():
        inside = {id(row) for row in one.rows}
        stages = collections.defaultdict(lambda: collections.defaultdict(dict))
        for row in rows:
            if id(row) in inside and row.get("kind") in ("train", "grow") and "epoch" in row:
                stages[row.get("stage")][row.get("visit", 1)][int(row["epoch"])] = number(row.get("seconds"))
        if not stages:
            continue
        durations = [[time for visit in own.values() for time in epoch_times(visit)] for own in stages.values()]
        columns["epochs"].append(sum(max(visit) for own in stages.values() for visit in own.values()))
        columns["seconds"].append(sum(len(times) * float(np.median(times[1:] or times)) for times in durations))
    return columns


def epoch_times(visit: dict[int, float]) -> list[float]:
    """Time of every epoch of one visit of a stage from the time since its start by epoch."""
    ends = [0.0, *(seconds for _, seconds in sorted(visit.items()))]
    return list(np.diff(ends))


def visits(rows: list[dict], kind: str) -> dict[tuple[str, int], list[dict]]:
    """Rows of one kind by the visit of a stage, (its name, number), in the order of the run."""
    result = {}
    for row in rows:
        if row.get("kind") == kind:
            result.setdefault((str(row.get("stage")), row.get("visit") or 1), []).append(row)
    return result


class Histogram(NamedTuple):
    """Weight magnitudes of one series at one visit, means over members."""

    edges: np.ndarray  # [bins + 1], log10 of the magnitude
    share: np.ndarray  # [members, bins], of all weights
    zero: float  # share of exact zeros
    threshold: list  # [thresholds]
    above: np.ndarray  # [thresholds], number of weights above each
    total: float  # number of weights


def histograms(one: Series) -> dict[str, Histogram]:
    """The magnitudes at every visit, by its name, which is empty if it is the only one."""
    found = {place: histogram(rows) for place, rows in visits(one.rows, "histogram").items()}
    known = {place: counted for place, counted in found.items() if counted is not None}
    name = lambda stage, visit: f"{stage}, visit {visit}" if len(known) > 1 else ""
    return {name(*place): counted for place, counted in known.items()}


def histogram(rows: list[dict]) -> Histogram | None:
    """The last row of each member, those on the bins of the first; None if there is none."""
    last = {member_of(row): row for row in rows if row.get("counts")}
    if not last:
        return None
    first = next(iter(last.values()))
    rows = [row for row in last.values() if row["edges"] == first["edges"]]
    total = [max(sum(row["counts"]) + row.get("num_zero", 0), 1) for row in rows]
    threshold = list(first.get("threshold", ()))
    above = [row["count_above"] for row in rows if row.get("threshold") == threshold and threshold]
    return Histogram(
        np.array(first["edges"], float),
        np.array([row["counts"] for row in rows], float) / np.array(total, float)[:, None],
        float(np.mean([row.get("num_zero", 0) / n for row, n in zip(rows, total)])),
        threshold,
        np.mean(np.array(above, float), 0) if above else np.zeros(0),
        float(np.mean(total)),
    )


# ------------------------------------------------------------------------------------------- numbers to figures


def line(x, values: np.ndarray, **options) -> Line | None:
    """A line through the mean of `values` [members, points] with a band of one std; None without any number."""
    mean, std = mean_std(values)
    known = np.isfinite(mean)
    if not known.any():
        return None
    floor = np.where(np.isfinite(values), values, np.inf).min(0)
    low = np.maximum(mean - std, np.minimum(floor, mean))  # the band stays in the range of a log axis
    return Line(np.asarray(x, float)[known], mean[known], low[known], (mean + std)[known], **options)


def ratio_panels(found: list[Curve], field: str, ylabel: str, percent: str) -> list[Panel]:
    """Accuracy or loss against the pruning ratio: the full range and, where there are ratios above 90 %, their zoom."""
    lines = [line(c.ratio, getattr(c, field), color=c.series, dash=c.dash, marks=True) for c in found]
    lines = [one for one in lines if one is not None]
    if not lines:
        return []
    end = max(one.x.max() for one in lines)
    zoom = end > 0.9 + NEAR and sum(((one.x >= 0.9 - NEAR).sum()) for one in lines) > len(lines)
    xlabel = "weights removed"
    full = Panel("All ratios", xlabel, ylabel, lines, percent, shade=(0.9, end) if zoom else None)
    if not zoom:
        return [full]
    return [full, Panel(f"Above {0.9:.0%}", xlabel, "", lines, percent, xlim=(0.9, end))]


def training_panels(series: list[Series]) -> list[Panel]:
    """Loss and accuracy against the epoch; train and test share a panel unless there are more than six series."""
    lines = {}
    for index, one in enumerate(series):
        members = training(one)
        epochs = sorted({epoch for found in members.values() for epoch in found})
        for field in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            values = tabulate(members.values(), epochs, field)
            drawn = line(epochs, values, color=index, dash=field.startswith("test")) if epochs else None
            if drawn is not None:
                lines.setdefault(field, []).append(drawn)
    panels = []
    for field, percent in (("loss", ""), ("accuracy", "y")):
        train, test = lines.get(f"train_{field}", []), lines.get(f"test_{field}", [])
        if len(series) > 6 and train and test:
            panels.append(Panel(f"Train {field}", "epoch", "", train, percent, integers=True))
            panels.append(Panel(f"Test {field}", "epoch", "", test, percent, integers=True))
        elif train or test:
            panels.append(Panel(field.capitalize(), "epoch", "", train + test, percent, integers=True))
    return panels


def histogram_panels(series: list[Series]) -> list[Panel]:
    """Share of the weights per bin of log10 |w|, at the last visit."""
    lines = []
    for index, one in enumerate(series):
        for last in list(histograms(one).values())[-1:]:
            values = np.concatenate([last.share, last.share[:, -1:]], 1)
            lines.append(line(last.edges, values, color=index))
    title = ("", "magnitude |w|", "share of weights per bin")
    return [Panel(*title, lines, "y", steps=True, powers=True)] if lines else []


def sfw_init_panels(series: list[Series]) -> list[Panel]:
    """Loss before and after the one SFW step that SFW-Init differentiates, at the last visit."""
    lines = []
    for index, one in enumerate(series):
        members = {}
        for rows in list(visits(one.rows, "sfw_init").values())[-1:]:
            for row in rows:
                if "iteration" in row:
                    members.setdefault(member_of(row), {})[int(row["iteration"])] = row
        iterations = sorted({iteration for found in members.values() for iteration in found})
        for dash, field in enumerate(("loss_after", "loss_before")):
            values = tabulate(members.values(), iterations, field)
            drawn = line(iterations, values, color=index, dash=dash) if iterations else None
            if drawn is not None:
                lines.append(drawn)
    return [Panel("", "iteration", "loss", lines, integers=True)] if lines else []


def rc(name: str) -> dict:
    """Style of every figure. The salt makes identifiers in the SVG depend on the figure's name only."""
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so PNGs are the same everywhere
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }


NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def literal(text: str, limit: int = 60) -> str:
    """`text` for matplotlib: no mathtext, no hidden label, nothing that XML lacks, at most `limit` characters."""
    text = NO_XML.sub("\ufffd", " ".join(str(text).split()))
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def line_figure(name: str, panels: list[Panel], labels: list[str], variants: list[str], *, columns: int = 2):
    """A Figure of line panels with one legend above them.

    labels: of the series, in colour order; only those drawn are listed. variants: of the dashes.
    """
    import matplotlib
    from matplotlib import figure, lines, ticker

    drawn = [one for panel in panels for one in panel.lines]
    used = sorted({one.color for one in drawn if one.color is not None})
    shown = {i: literal(labels[i]) for i in used}
    marks = any(one.marks for one in drawn)
    handles = []
    with matplotlib.rc_context(rc(name)):
        for i in used:
            marker = MARKERS[i % len(MARKERS)] if marks else None
            style = "none" if all(one.points for one in drawn if one.color == i) else "-"
            marker = "o" if style == "none" else marker
            options = {"color": color(i), "marker": marker, "markersize": 4.5, "linestyle": style}
            handles.append(lines.Line2D([], [], **options, label=shown[i]))
        dashes = sorted({one.dash for one in drawn})
        if len(dashes) > 1 or (dashes and len(variants) > 1):
            plain = {"color": MUTED, "linewidth": 1.4}
            handles += [lines.Line2D([], [], **plain, **dashed(d), label=literal(variants[d])) for d in dashes]
        known = dict.fromkeys((one.legend, one.color) for panel in panels for one in panel.guides if one.legend)
        handles += [lines.Line2D([], [], **straight(c), label=literal(text)) for text, c in known]
        width, top = 10.0, 0.1
        slots = max(1, min(len(handles), int(width / (0.62 + 0.078 * max(len(h.get_label()) for h in handles)))))
        legend_rows = math.ceil(len(handles) / slots)
        columns = min(columns, len(panels))
        rows = math.ceil(len(panels) / columns)
        legend_height = 0.24 * legend_rows + 0.12
        height = 3.0 if columns > 1 else 3.3
        gap, left, right = 0.75 if any(p.ylabel for p in panels[1:]) or rows > 1 else 0.55, 0.72, 0.12
        cell = (width - left - right - gap * (columns - 1)) / columns
        levels = [guide_levels(panel, cell) for panel in panels]
        titles = 0.28 if any(panel.title for panel in panels) else 0.0
        titles += LEVEL * max((level + 1 for found in levels for level in found), default=0)
        total = top + legend_height + rows * (titles + height + 0.55)
        fig = figure.Figure(figsize=(width, total))
        for i, panel in enumerate(panels):
            x = left + (i % columns) * (cell + gap)
            y = total - top - legend_height - (i // columns + 1) * (titles + height + 0.55) + 0.55
            axes = fig.add_axes((x / width, y / total, cell / width, height / total))
            draw_panel(axes, panel, ticker, len(used))
            beside = [level for found in levels[i // columns * columns :][:columns] for level in found]
            draw_guides(axes, panel, levels[i], LEVEL / height, 1 + max(beside, default=-1))
        fig.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=((left - 0.05) / width, 1 - top / total / 2),
            ncols=slots,
            borderaxespad=0,
            borderpad=0,
            handlelength=2.4,
            columnspacing=1.8,
        )
    return fig


def color(index: int | None) -> str:
    return INK if index is None else PALETTE[index % len(PALETTE)]


def straight(index: int | None) -> dict:
    """Style of a guide."""
    return {"color": color(index), "linewidth": 1.4, "linestyle": "-" if index is not None else (0, (1.5, 1.5))}


LEVEL = 0.165  # inches between two rows of texts above a panel


def guide_levels(panel: Panel, width: float) -> list[int]:
    """The row above the panel (0: the lowest) of every upright guide's text, so that none covers another; -1: none.

    width: of the panel in inches.
    """
    free, levels = [], [-1] * len(panel.guides)
    upright = [i for i, one in enumerate(panel.guides) if one.text and not one.across and inside(panel, one)]
    for i in sorted(upright, key=lambda i: panel.guides[i].at):
        one = panel.guides[i]
        half = 0.034 * len(one.text) + 0.06
        place = (one.at - panel.xlim[0]) / (panel.xlim[1] - panel.xlim[0]) * width
        start = min(max(place - half, 0.0), max(width - 2 * half, 0.0))
        level = next((k for k, end in enumerate(free) if end <= start), len(free))
        free[level : level + 1] = [start + 2 * half]
        levels[i] = level
    return levels


def inside(panel: Panel, guide: Guide) -> bool:
    return panel.xlim[0] <= guide.at <= panel.xlim[1]


def draw_guides(axes, panel: Panel, levels: list[int], step: float, rows: int) -> None:
    """Draws the guides and their texts. levels: of `guide_levels`; step: between rows of texts, in panel heights; rows:
    of texts below the titles of all panels beside this one."""
    for one, level in zip(panel.guides, levels):
        paint = color(one.color)
        span, stroke = (axes.axhspan, axes.axhline) if one.across else (axes.axvspan, axes.axvline)
        if one.high > one.low:
            span(one.low, one.high, color=paint, alpha=0.14, lw=0, zorder=1)
        stroke(one.at, **straight(one.color), zorder=2.5)
        if one.text and one.across:
            axes.text(0.995, one.at, literal(one.text), color=paint, fontsize=8, ha="right", va="bottom",
                      transform=axes.get_yaxis_transform())  # fmt: skip
        elif level >= 0:
            share = (one.at - panel.xlim[0]) / (panel.xlim[1] - panel.xlim[0])
            height, width = 1 + (level + 0.25) * step, axes.bbox.width / axes.figure.dpi
            half = (0.034 * len(one.text) + 0.02) / width
            side = "left" if share < half else "right" if share > 1 - half else "center"
            share = {"left": 0.0, "right": 1.0}.get(side, share)
            axes.text(share, height, literal(one.text), color=paint, fontsize=8, ha=side, transform=axes.transAxes)
    if rows:
        axes.set_title(literal(panel.title), pad=72 * LEVEL * rows + 6)


def dashed(index: int) -> dict:
    pattern = DASHES[index % len(DASHES)]
    return {"linestyle": (0, pattern) if pattern else "-"}


def draw_panel(axes, panel: Panel, ticker, num_series: int) -> None:
    """Draws one panel; later series first, so that the first one lies on top."""
    many = num_series > 6
    for one in reversed(panel.lines):
        paint = {"color": color(one.color), "zorder": 3 - (-1 if one.color is None else one.color) / 100}
        if one.points:
            fill = color(one.color) if one.points == "filled" else "none"
            paint["zorder"] += 1
            axes.plot(one.x, one.mean, "o", markersize=4, markerfacecolor=fill, markeredgewidth=0.9, **paint)
            continue
        marker = {}
        if one.marks:
            inside = (one.x >= panel.xlim[0] - NEAR) if panel.xlim else np.ones(len(one.x), bool)
            start, count = int(inside.argmax()), max(int(inside.sum()), 1)
            marker = {
                "marker": MARKERS[one.color % len(MARKERS)],
                "markersize": 3.6,
                "markevery": (start, max(1, math.ceil(count / 20))),
            }
        style = "steps-post" if panel.steps else "default"
        axes.plot(one.x, one.mean, lw=1.3 if many else 1.8, drawstyle=style, **dashed(one.dash), **marker, **paint)
        if panel.steps and num_series <= 4:
            axes.fill_between(one.x, one.mean, step="post", alpha=0.14, lw=0, **paint)
        elif not panel.steps and (one.high > one.low).any():
            axes.fill_between(one.x, one.low, one.high, alpha=0.1 if many else 0.18, lw=0, **paint)
    if panel.shade:
        axes.axvspan(*panel.shade, color=GRID, alpha=0.55, lw=0, zorder=0)
    axes.set_title(literal(panel.title))
    axes.set_xlabel(literal(panel.xlabel))
    axes.set_ylabel(literal(panel.ylabel))
    axes.margins(x=0.02)
    if panel.xlim:
        pad = 0.02 * (panel.xlim[1] - panel.xlim[0])
        axes.set_xlim(panel.xlim[0] - pad, panel.xlim[1] + pad)
    if "x" in panel.log:
        axes.set_xscale("log")
    if "y" in panel.log:
        axes.set_yscale("log")
    else:
        scale_y(axes, panel, ticker)
    if panel.ylim:
        axes.set_ylim(*panel.ylim)
    percents = ticker.FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
    if "x" in panel.percent:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(10, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(percents)
    if "y" in panel.percent:
        axes.yaxis.set_major_formatter(percents)
    if panel.powers:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(12, integer=True))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: power(value)))
    if panel.integers:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))


def scale_y(axes, panel: Panel, ticker) -> None:
    """Fractions start at 0 where they come near it; losses over more than a decade and a half get a log axis."""
    means = np.concatenate([one.mean for one in panel.lines])
    low, high = float(means.min()), float(means.max())
    if "y" in panel.percent:
        if low < 0.6:
            axes.set_ylim(0, min(1.03, high * 1.08) if high > 0 else 1)
    elif low > 0 and high / low > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def power(value: float) -> str:
    """A power of ten as text, e.g. 10⁻³."""
    return "10" + str(round(value)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short_paths(paths: list[str], limit: int = 34) -> list[str]:
    """Paths without the first and last parts that all share; long ones lose their beginning."""
    split = [path.split("/") for path in paths]
    while len(split) > 1 and min(map(len, split)) > 1 and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    while min(map(len, split)) > 1 and all(parts[-1] == "kernel" for parts in split):
        split = [parts[:-1] for parts in split]
    joined = ["/".join(parts) for parts in split]
    return [name if len(name) <= limit else "…" + name[1 - limit :] for name in joined]


def layer_figure(name: str, found: list[tuple[str, dict]], *, what: str = "weights"):
    """Heat maps layer x ratio of the share of `what` kept (log colour), one per (label, {ratio: {path: sparsity}}).

    Of weights, at the ratios LAYER_STOPS; of anything else, at all ratios, or at 12 of them.
    """
    import matplotlib
    from matplotlib import colors, figure

    paths = list(dict.fromkeys(path for _, table in found for layers in table.values() for path in layers))
    ratios = sorted({ratio for _, table in found for ratio in table})
    few = [ratios[i] for i in np.unique(np.linspace(0, len(ratios) - 1, 12).round().astype(int))]
    stops = [stop for stop in LAYER_STOPS if stop in ratios] if what == "weights" else few
    names = short_paths(paths)
    with matplotlib.rc_context(rc(name)):
        width, right = 10.0, 0.15
        left = 0.3 + 0.068 * max(map(len, names))
        slot = max(1, min(len(found), int((width - left - right) / 1.75)))
        rows = math.ceil(len(found) / slot)
        row_height = 0.3 if len(paths) <= 12 else 0.2 if len(paths) <= 30 else 0.145
        height, head, gap = max(row_height * len(paths), 0.4), 0.62, 0.16
        total = rows * (height + head) + 0.7
        cell = min((width - left - right - gap * (slot - 1)) / slot, 0.62 * len(stops) + 0.2)
        fig = figure.Figure(figsize=(width, total))
        norm, palette = colors.LogNorm(1e-3, 1.0), matplotlib.colormaps["cividis"].with_extremes(under="#5a0f14")
        for i, (label, table) in enumerate(found):
            x, y = left + (i % slot) * (cell + gap), total - (i // slot + 1) * (height + head)
            axes = fig.add_axes((x / width, y / total, cell / width, height / total))
            kept = np.array([[1 - table.get(stop, {}).get(path, math.nan) for stop in stops] for path in paths])
            kept = np.where(np.isfinite(kept), np.clip(kept, 0, 1), math.nan)
            shown = np.where(kept > 0, np.maximum(kept, 1e-3), np.where(kept == 0, 1e-9, math.nan))
            axes.imshow(np.ma.masked_invalid(shown), aspect="auto", norm=norm, cmap=palette, interpolation="nearest")
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.xaxis.tick_top()
            axes.set_xticks(range(len(stops)), [f"{100 * stop:.3g}%" for stop in stops])
            first = i % slot == 0
            axes.set_yticks(range(len(paths)) if first else [], [literal(n) for n in names] if first else [])
            small = 8 if len(paths) <= 30 else 6.5
            axes.tick_params(axis="x", labelsize=7.5 if cell / len(stops) > 0.3 else 5.5)
            axes.tick_params(axis="y", labelsize=small)
            axes.set_title(literal(label, max(8, int(cell / 0.088))), pad=6)
            if row_height >= 0.2 and cell / len(stops) >= 0.36 and kept.size * len(found) <= 600:
                for (r, c), value in np.ndenumerate(kept):
                    if math.isfinite(value):
                        ink = "#10131a" if value > 0.06 else "#f6f8fa"
                        axes.text(c, r, f"{100 * value:.2g}" if value < 0.995 else "100", color=ink, fontsize=7,
                                  ha="center", va="center")  # fmt: skip
        bar = fig.add_axes((left / width, 0.34 / total, 2.6 / width, 0.11 / total))
        scale = matplotlib.cm.ScalarMappable(norm, palette)
        marks = fig.colorbar(scale, cax=bar, orientation="horizontal", extend="min", extendfrac=0.06)
        marks.set_ticks([1e-3, 1e-2, 1e-1, 1.0], labels=["0.1%", "1%", "10%", "100%"])
        marks.minorticks_off()
        marks.outline.set_visible(False)
        fig.text((left + 2.75) / width, 0.35 / total, f"{what} kept (red: none left)", color=MUTED, fontsize=8)
    return fig


ROLES = {  # of an array in a group of channels: what it is called, and its marker
    "producer": ("makes the channels", dict(marker="s", markersize=5.2)),
    "depthwise": ("passes them on one by one", dict(marker="D", markersize=4.6)),
    "consumer": ("reads them", dict(marker="s", markersize=5.2, markerfacecolor="none", markeredgewidth=1.1)),
    "other": ("norm, bias", dict(marker=".", markersize=4.5)),
}


def group_figure(name: str, layout: dict, kept: list[tuple[str, dict[str, float]]] = ()):
    """The channel groups of a network: a row each, with a marker on every layer that has a part in it.

    layout: of `groups.layout`. kept: (label, channels left by group), drawn as bars beside the rows.
    """
    import matplotlib
    from matplotlib import figure, lines

    groups, kernels = layout["groups"], short_paths(layout["kernels"], 40)
    names, found = short_paths(list(groups)), list(kept)[:3]
    small = 8 if len(groups) <= 30 else 6.5
    with matplotlib.rc_context(rc(name)):
        width, row = 10.0, 0.21 if len(groups) <= 30 else 0.15
        left, right = 0.35 + 0.0085 * small * max(map(len, names)), 0.75 + 1.35 * len(found)
        bottom, top = 0.4 + 0.055 * max(map(len, kernels)), 0.55
        height = row * len(groups)
        total, middle = height + top + bottom, width - left - right
        fig = figure.Figure(figsize=(width, total))
        axes = fig.add_axes((left / width, bottom / total, middle / width, height / total))
        axes.grid(axis="y", visible=False)
        axes.spines[:].set_visible(False)
        step = middle / len(kernels)
        for y, one in enumerate(groups.values()):
            places = [x for marks in one["marks"].values() for x in marks]
            paint = {"color": color(y % 8)}
            axes.plot([min(places), max(places)], [y, y], lw=0.9, alpha=0.55, zorder=2, **paint)
            for role in ("other", "consumer", "depthwise", "producer"):
                marks = one["marks"].get(role, ())
                style = {**ROLES[role][1]}
                style["markersize"] *= min(1.0, step / 0.1, row / 0.15)
                axes.plot(marks, [y] * len(marks), linestyle="none", zorder=3, **style, **paint)
        axes.set_xlim(-0.7, len(kernels) - 0.3)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_yticks(range(len(groups)), [literal(text) for text in names])
        every = max(1, math.ceil(0.085 / step))
        shown = range(0, len(kernels), every)
        axes.set_xticks(shown, [literal(kernels[i]) for i in shown], rotation=90)
        axes.tick_params(axis="y", labelsize=small)
        axes.tick_params(axis="x", labelsize=7 if step * every > 0.11 else 5.8)
        axes.set_xlabel("layers, in order of use")
        sizes = fig.add_axes(((width - right) / width, bottom / total, 0.6 / width, height / total), sharey=axes)
        blank(sizes)
        sizes.set_title("channels", fontsize=8, fontweight="normal", color=MUTED, loc="right")
        for y, one in enumerate(groups.values()):
            sizes.text(1, y, f"{one['size']:,}", fontsize=small, ha="right", va="center")
        for i, (label, own) in enumerate(found):
            x = width - right + 0.75 + 1.35 * i
            bars = fig.add_axes((x / width, bottom / total, 0.7 / width, height / total), sharey=axes)
            blank(bars)
            title = literal(f"{label}: kept" if len(found) > 1 else "kept", 24)
            bars.set_title(title, fontsize=8, fontweight="normal", color=MUTED)
            bars.set_xlim(0, 1)
            bars.barh(range(len(groups)), 1, height=0.62, color=GRID)
            for y, (group, one) in enumerate(groups.items()):
                left_over = own.get(group, one["size"])
                bars.barh(y, left_over / one["size"], height=0.62, color=color(y % 8))
                bars.text(1.08, y, f"{left_over:.4g}", fontsize=small, va="center")
        used = [role for role in ROLES if any(role in one["marks"] for one in groups.values())]
        handles = [
            lines.Line2D([], [], linestyle="none", color=MUTED, label=ROLES[role][0], **ROLES[role][1]) for role in used
        ]
        place = ((left - 0.05) / width, 1 - 0.1 / total)
        fig.legend(handles=handles, loc="upper left", bbox_to_anchor=place, ncols=len(handles), borderaxespad=0,
                   borderpad=0, handletextpad=0.3, columnspacing=1.6)  # fmt: skip
    return fig


def blank(axes) -> None:
    """Leaves nothing of the axes but what is drawn in them."""
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelleft=False, labelbottom=False)


def png(name: str, fig) -> bytes:
    """The figure as a PNG on white, without a date or a version, so that the same rows give the same bytes."""
    return save(name, fig, "png", dpi=150, facecolor="white", metadata={"Software": None})


def svg(name: str, fig, alt: str) -> str:
    """The figure as inline SVG whose colours follow the page's CSS variables (`--ink`, `--c0` ...)."""
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = save(name, fig, "svg", transparent=True, metadata=empty).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    named = {INK: "--ink", MUTED: "--muted", GRID: "--line", **{c: f"--c{i}" for i, c in enumerate(PALETTE)}}
    for value, variable in named.items():
        text = text.replace(f": {value}", f": var({variable})")
    size = re.search(r'viewBox="[^"]*"', text).group(0)
    start = f'<svg {size} role="img" aria-label="{alt}">'
    return re.sub(r"<svg\b.*?>", lambda _: start, text, count=1, flags=re.DOTALL)


def save(name: str, fig, kind: str, **options) -> bytes:
    import matplotlib

    with matplotlib.rc_context(rc(name)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # an arm named in another script still gets a report
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
