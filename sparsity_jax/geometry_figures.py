"""The geometric limit of sparsity on the page: predicted and actual limits of every network, as numbers and panels.

Rows are those of the stages limit, path, row_norms, spectrum and width, and of curves; see `geometry`. Figures follow
the rules of `figures`: colour 0 is the network itself, those from 1 on its predictions, ink the actual limit.
"""

import math
from typing import NamedTuple

import numpy as np

from sparsity_jax import figures

MOST = 6  # networks drawn in one figure
WIDE = 0.01  # an enclosure wider than this is called so where the config asks for nothing
STEEP = 0.5  # share of ε that the gradient may change the loss by before a prediction, blind to it, is cautioned
OPERATORS = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton", "absolute": "absolute Hessian"}
RULES = {  # definitions of "nothing is lost", as `geometry.CRITERIA` names them
    "accuracy": "{} accuracy not below dense",
    "better_accuracy": "{} accuracy above dense, as the original",
    "accuracy_within": "{} accuracy at most {:g} points below dense",
    "loss_within": "{} loss at most ε above dense",
}


KINDS = ("curve", "limit", "path", "row_norms", "width")  # of the rows that are drawn


class Network(NamedTuple):
    """What the rows say about one trained network. Of several visits of a stage the latest counts."""

    label: str  # "" if there is only one network
    series: int  # index of its series
    curves: dict[str, np.ndarray]  # by split, of the latest curve without retraining: ratio, accuracy, loss [3, n]
    search: list[dict]  # evaluations of the limit stages
    limits: dict[str, dict]  # result of each limit stage
    predictions: dict[str, dict]  # row of each width stage
    norms: list[dict]  # rows of the latest row_norms stage, its result the last one
    path: list[dict]  # rows of the latest path stage, by ratio


def networks(series: list[figures.Series]) -> list[Network]:
    """All networks that have rows of a limit, path, row_norms or width stage."""
    found = []
    for index, one in enumerate(series):
        by_member = {}
        for row in one.rows:
            by_member.setdefault(figures.member_of(row), []).append(row)
        for rows in by_member.values():
            network = network_of(one.label, index, rows)
            if network.limits or network.predictions or network.norms or network.path:
                seed = next((row[key] for row in rows for key in row if figures.is_seed(key)), None)
                name = f"network {rows[0].get('member', 0)}" if seed is None else f"seed {seed}"
                found.append((network, name if len(by_member) > 1 else ""))
    many_series = len({network.series for network, _ in found}) > 1
    return [
        network._replace(label=", ".join(filter(None, (network.label if many_series else "", name))))
        for network, name in found
    ]


def network_of(label: str, index: int, rows: list[dict]) -> Network:
    of_kind = lambda kind: [row for row in rows if row.get("kind") == kind]
    curves = {}
    cut = [row for row in of_kind("curve") if not row.get("retrained") and "ratio" in row]
    for row in newest(cut):
        curves.setdefault(row.get("split", "test"), {})[figures.share_removed(row)] = row
    for split, by_ratio in curves.items():
        numbers = [(ratio, figures.number(row.get("accuracy")), figures.number(row.get("loss")))
                   for ratio, row in sorted(by_ratio.items())]  # fmt: skip
        curves[split] = np.array(numbers).T
    last = {stage: own for (stage, _), own in figures.visits(rows, "limit").items()}
    searched = [row for own in last.values() for row in own]
    search = [row for row in searched if "ratio" in row]
    limits = {row["stage"]: row for row in searched if row.get("phase") == "result"}
    predictions = {row["stage"]: row for row in of_kind("width")}
    path = sorted(newest(of_kind("path")), key=lambda row: row["ratio"])
    return Network(label, index, curves, search, limits, predictions, newest(of_kind("row_norms")), path)


def newest(rows: list[dict]) -> list[dict]:
    """Those of the last stage and visit."""
    last = lambda row: (row.get("stage"), row.get("visit", 1))
    return [row for row in rows if last(row) == last(rows[-1])]


def prediction_names(found: list[Network]) -> dict[str, str]:
    """What each width stage is called: its operator, and its own name where operators repeat."""
    operators = {stage: row.get("operator", "") for one in found for stage, row in one.predictions.items()}
    names = {stage: OPERATORS.get(operator, operator) for stage, operator in operators.items()}
    unique = lambda stage: list(operators.values()).count(operators[stage]) == 1
    return {stage: name if unique(stage) else f"{name}, {stage}" for stage, name in names.items()}


def actual(network: Network) -> dict[str, float]:
    """The actual limit by every definition: those the width stages have listed, and limit stages by their name."""
    listed = [row.get("actual") or {} for row in network.predictions.values()]
    known = {name: value for limits in listed for name, value in limits.items()}
    known |= {stage: row["limit"] for stage, row in network.limits.items()}
    return {name: float(value) for name, value in known.items() if math.isfinite(figures.number(value))}


def definitions(found: list[Network]) -> list[str]:
    """Names of all definitions that some network has an actual limit by: test, train, then limit stages."""
    order = [f"{split} {rule}" for split in ("test", "train") for rule in RULES]
    names = dict.fromkeys(name for one in found for name in actual(one))
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def main_limits(network: Network) -> dict[str, float]:
    """The actual limits to mark: those of limit stages, else the one by accuracy, on the test set if it is known."""
    known = actual(network)
    searched = [name for name in known if name.split(" ")[0] not in ("test", "train")]
    chosen = searched or [name for name in ("test accuracy", "train accuracy") if name in known][:1]
    return {name: known[name] for name in chosen}


def definition(name: str, found: list[Network], config: dict) -> str:
    """What the definition `name` of an actual limit means."""
    split, _, rule = name.partition(" ")
    if rule in RULES:
        stages = [config.get(stage) for one in found for stage in one.predictions]
        tolerance = next((s["tolerance"] for s in stages if isinstance(s, dict) and "tolerance" in s), math.nan)
        text = RULES[rule].format(split, 100 * figures.number(tolerance))
        return text.replace("nan points", "the tolerance")
    rows = [one.limits[name] for one in found if name in one.limits]
    if not rows:
        return "by bisection, in the run this one started from"
    rule = RULES.get(rows[0].get("criterion"), "{}").format(
        rows[0].get("split", "test"), 100 * figures.number(rows[0].get("tolerance"))
    )
    if rows[0].get("criterion") == "loss_within":
        rule = rule.replace("ε", f"{figures.number(rows[0].get('tolerance')):g}")
    return f"{rule}, by bisection"


class Gap(NamedTuple):
    """A prediction against one definition of the actual limit, over the networks that have both."""

    mean: float  # predicted less actual
    std: float
    inside: int  # networks whose interval contains the actual limit
    count: int


def gap(found: list[Network], stage: str, name: str) -> Gap | None:
    pairs = [(one.predictions[stage], actual(one)[name]) for one in found
             if stage in one.predictions and name in actual(one)]  # fmt: skip
    if not pairs:
        return None
    mean, std = figures.mean_std(np.array([[row["predicted"] - limit] for row, limit in pairs]))
    inside = sum(row["low"] <= limit <= row["high"] for row, limit in pairs)
    return Gap(float(mean[0]), float(std[0]), inside, len(pairs))


def enclosure_width(found: list[Network], stage: str) -> float:
    """Of the network whose enclosure is widest; NaN where nothing is enclosed."""
    rows = [one.predictions[stage] for one in found if stage in one.predictions]
    ends = [(figures.number(row.get("enclosure_low")), figures.number(row.get("enclosure_high"))) for row in rows]
    return max((high - low for low, high in ends if math.isfinite(high - low)), default=math.nan)


def slope(network: Network, stage: str) -> tuple[float, float]:
    """(first-order change of the loss by pruning to the predicted ratio, from a path stage; ε)."""
    row = network.predictions.get(stage, {})
    ratios = [one["ratio"] for one in network.path]
    if not row or not ratios or not ratios[0] <= row["predicted"] <= ratios[-1]:
        return math.nan, math.nan
    first = [figures.number(one["first_order"]) for one in network.path]
    return float(np.interp(row["predicted"], ratios, first)), figures.number(row["epsilon"])


class Verdict(NamedTuple):
    """A prediction in words: how far from the actual limit, and how far it is to be trusted."""

    name: str
    text: str
    caution: str  # what stands against trusting it, "" if nothing does


def verdicts(found: list[Network], names: dict[str, str], config: dict) -> list[Verdict]:
    result = []
    for stage, name in names.items():
        rows = [one.predictions[stage] for one in found if stage in one.predictions]
        products = max(int(row.get("num_matvecs", 0)) for row in rows)
        text = f"{percent(np.mean([row['predicted'] for row in rows]))} predicted"
        text += f" (mean of {len(rows)} networks)" if len(rows) > 1 else ""
        limits = list(dict.fromkeys(key for one in found for key in main_limits(one)))
        told = gap(found, stage, limits[0]) if limits else None
        if told is not None:
            side, defined = "above" if told.mean >= 0 else "below", definition(limits[0], found, config)
            text += f", {100 * abs(told.mean):.2f} points {side} the actual limit ({defined}), which is "
            inside = "inside the interval" if told.inside else "outside the interval"
            text += inside if told.count == 1 else f"inside the interval of {told.inside} of {told.count}"
        settings = config.get(rows[0].get("spectrum"))
        asked = figures.number(settings.get("stop_width", 0)) if isinstance(settings, dict) else 0.0
        asked = 0.0 if math.isnan(asked) else asked  # of several runs that ask for different widths
        wide, caution = enclosure_width(found, stage), ""
        if math.isnan(wide):
            caution = (
                f"No enclosure: with negative values clipped nothing bounds the error left after {products} products; "
                "only the history shows whether it has settled."
            )
        elif wide > (asked or WIDE):
            wanted = f" ({100 * asked:.2g} were asked for)" if asked else ""
            caution = (
                f"Not narrow enough: after {products} products the enclosure is {100 * wide:.2g} points wide{wanted}; "
                "any value in it is possible, and more products narrow it."
            )
        else:
            text += f". The enclosure is {100 * wide:.2g} points wide after {products} products"
            text += f", narrower than the {100 * asked:.2g} asked for" if asked else ""
        slopes = [pair for pair in (slope(one, stage) for one in found) if math.isfinite(pair[0])]
        first, epsilon = max(slopes, key=lambda pair: abs(pair[0]) / pair[1], default=(0.0, math.inf))
        if abs(first) > STEEP * epsilon:
            side, worst = "larger" if first < 0 else "smaller", " (the worst network)" if len(slopes) > 1 else ""
            caution += (
                f" The gradient, which the prediction leaves out, changes the loss by {first:+.2g} on the way there, "
                f"beside an ε of {epsilon:.2g}{worst}: expect a {side} actual limit."
            )
        result.append(Verdict(name[:1].upper() + name[1:], text + ".", caution.strip()))
    return result


# Panels ------------------------------------------------------------------------------------------------------


def line(x, y, color: int | None, *, low=None, high=None, **options) -> figures.Line:
    x, y = np.asarray(x, float), np.asarray(y, float)
    low, high = (y if end is None else np.asarray(end, float) for end in (low, high))
    known = np.isfinite(y)
    return figures.Line(x[known], y[known], low[known], high[known], color, **options)


def colors(names: dict[str, str]) -> dict[str, int]:
    return {stage: 1 + i for i, stage in enumerate(names)}


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def guides(network: Network, names: dict[str, str], *, texts: bool = True, legend: bool = True) -> tuple:
    """Predicted limits with their intervals, and the actual one."""
    say, explain = (lambda text: text if texts else ""), (lambda text: text if legend else "")
    result = []
    for stage, color in colors(names).items():
        if stage in network.predictions:
            row = network.predictions[stage]
            text = f"{names[stage]} {percent(row['predicted'])}"
            told = explain(f"predicted, {names[stage]}")
            result.append(figures.Guide(row["predicted"], say(text), told, color, row["low"], row["high"]))
    for name, value in main_limits(network).items():
        searched = name in network.limits and len(main_limits(network)) > 1
        text = f"actual {percent(value)}" + (f", {name}" if searched else "")
        result.append(figures.Guide(value, say(text), explain("actual limit")))
    return tuple(result)


def window(found: list[Network]) -> tuple[float, float] | None:
    """Ratios around all predicted and marked actual limits; None if that is most of them anyway."""
    values = [value for one in found for value in main_limits(one).values()]
    values += [row[key] for one in found for row in one.predictions.values() for key in ("low", "predicted", "high")]
    if not values:
        return None
    pad = max(0.3 * (max(values) - min(values)), 0.01)
    low, high = max(min(values) - pad, 0.0), min(max(values) + pad, 1.0)
    return (low, high) if high - low < 0.6 else None


def limit_panels(found: list[Network], names: dict[str, str]) -> list[figures.Panel]:
    """Accuracy and loss against the pruning ratio with predicted and actual limits: one row of panels a network.

    A single network has the full range too, where the limits are close together.
    """
    found = [one for one in found if one.curves or one.search][:MOST]
    zoom = window(found)
    views = [zoom or (0.0, 1.0)] if len(found) > 1 or zoom is None else [(0.0, 1.0), zoom]
    panels = []
    for one in found:
        for field, index in (("accuracy", 1), ("loss", 2)):
            for view in views:
                title = one.label or ("Around the limits" if view == zoom else "All ratios")
                lines = ratio_lines(one, field, index, view)
                if lines:
                    marked = guides(one, names, texts=view is views[-1])
                    shade = zoom if len(views) > 1 and view is views[0] else None
                    percents = "xy" if field == "accuracy" else "x"
                    panels.append(
                        figures.Panel(title, "weights removed", field, lines, percents, view, shade, guides=marked)
                    )
    return panels


def ratio_lines(network: Network, field: str, index: int, view: tuple[float, float]) -> list[figures.Line]:
    """Curves, the evaluations of the search and, in ink, the other definitions of the limit."""
    lines = []
    for split, curve in network.curves.items():
        ratio, value = curve[0], curve[index]
        near = (ratio >= view[0] - 0.02) & (ratio <= view[1] + 0.02)
        if near.any():
            lines.append(line(ratio[near], value[near], 0, dash=int(split == "train")))
    searched = [row for row in network.search if view[0] <= row["ratio"] <= view[1]]
    if searched:
        x, y = [row["ratio"] for row in searched], [figures.number(row.get(field)) for row in searched]
        order = np.argsort(x, kind="stable")
        if not network.curves:
            lines.append(line(np.array(x)[order], np.array(y)[order], 0))
        lines.append(line(x, y, 0, points="open"))
    for name, limit in actual(network).items():
        split, _, rule = name.partition(" ")
        drawn = rule in RULES and split in network.curves and view[0] <= limit <= view[1]
        if drawn and rule.startswith("loss") == (field == "loss"):
            curve = network.curves[split]
            lines.append(line([limit], [np.interp(limit, curve[0], curve[index])], None, points="filled"))
    return [one for one in lines if one.x.size]


def crossing_panels(found: list[Network], names: dict[str, str]) -> list[figures.Panel]:
    """omega(R)^2 / D against R with the network's own p(R), and against p around the point where the two meet."""
    panels = []
    for one in [one for one in found if one.predictions][:MOST]:
        prefix = f"{one.label}: " if one.label else ""
        view = window([one]) or (0.0, 1.0)
        first = next(iter(one.predictions.values()))
        ratios, radii = np.array(first["ratios"]), np.array(first["distances"])
        meeting = [np.interp(row["predicted"], ratios, radii) for row in one.predictions.values()]
        shown = radii <= max(1.6 * max(meeting), 1e-12)
        shown[: shown.sum() + 1] = True
        against_distance, against_ratio = [line(radii[shown], ratios[shown], 0)], [line([0, 1], [0, 1], 0)]
        for stage, color in colors(names).items():
            if stage in one.predictions:
                row = one.predictions[stage]
                meets, widths = row["predicted"], np.array(row["widths"])
                against_distance.append(line(np.array(row["distances"])[shown], widths[shown], color))
                at = np.interp(meets, row["ratios"], row["distances"])
                against_distance.append(line([at], [meets], color, points="filled"))
                against_ratio.append(line(row["ratios"], widths, color))
                against_ratio.append(line([meets], [meets], color, points="filled"))
        title, xlabel, ylabel = f"{prefix}by distance", "distance R(p) from the trained weights", "ω² / D, and p"
        panels.append(figures.Panel(title, xlabel, ylabel, against_distance, "y", ylim=view))
        title, marked = f"{prefix}by share removed", guides(one, names, legend=False)
        panel = figures.Panel(title, "share removed p", ylabel, against_ratio, "xy", view, guides=marked, ylim=view)
        panels.append(panel)
    return panels


def history_panels(found: list[Network], names: dict[str, str]) -> list[figures.Panel]:
    """The prediction after each number of products, with its enclosure; cut to what it does after the first quarter."""
    panels = []
    for one in [one for one in found if one.predictions][:MOST]:
        lines, late = [], list(main_limits(one).values())
        for stage, color in colors(names).items():
            course = one.predictions.get(stage, {}).get("history")
            if course:
                steps, values = np.array(course["num_matvecs"]), np.array(course["predicted"], float)
                ends = [np.array([figures.number(x) for x in course[end]]) for end in ("lower", "upper")]
                low, high = (np.where(np.isfinite(end), end, values) for end in ends)
                lines.append(line(steps, values, color, low=low, high=high))
                settled = steps >= max(steps) / 4
                late += [low[settled].min(), high[settled].max(), values[settled].min(), values[settled].max()]
        if lines:
            pad = max(0.06 * (max(late) - min(late)), 0.005)
            limits = [
                figures.Guide(value, f"actual {percent(value)}", across=True) for value in main_limits(one).values()
            ]
            view = (max(min(late) - pad, 0.0), min(max(late) + pad, 1.0))
            title, end = (one.label, "products (Lanczos steps)", "predicted limit"), max(max(one.x) for one in lines)
            panel = figures.Panel(*title, lines, "y", (0, 1.15 * end), guides=tuple(limits), ylim=view, integers=True)
            panels.append(panel)  # what lies beyond the lines is for the guide's text
    return panels


def spectrum_panels(found: list[Network], names: dict[str, str]) -> list[figures.Panel]:
    """Spectral density, smeared visibly, on a log scale, and the Ritz weights themselves against |value|."""
    from sparsity_jax import linops  # it needs jax, which takes a second to import

    panels = []
    for one in [one for one in found if one.predictions][:MOST]:
        prefix = f"{one.label}: " if one.label else ""
        smooth, points, tops = [], [], []
        for stage, color in colors(names).items():
            row = one.predictions.get(stage, {})
            if not row.get("ritz_values"):
                continue
            values = np.atleast_2d(np.array(row["ritz_values"], float))
            weights = np.atleast_2d(np.array(row["ritz_weights"], float))
            span = max(values.max() - values.min(), 1e-12)
            variance = (0.008 * span) ** 2
            density, grid = linops.spectral_density(
                values, weights, bins=1200, sigma2=variance / max(1.0, 1.12 * span), overhead=0.06 * span
            )
            tops.append(density.max())
            smooth.append((grid, density, color))
            for sign, points_of in ((values > 0, "filled"), (values < 0, "open")):
                kept = sign & (weights > 1e-10)
                if kept.any():
                    points.append(line(np.abs(values[kept]), weights[kept], color, points=points_of))
        if smooth:
            floor = 1e-7 * max(tops)
            lines = [  # what lies below the floor is drawn below the axes
                line(grid, np.maximum(density, 0.1 * floor), color, low=np.full(grid.size, floor),
                     high=np.maximum(density, floor))
                for grid, density, color in smooth
            ]  # fmt: skip
            panels.append(figures.Panel(f"{prefix}spectral density", "eigenvalue", "density", lines, log="y",
                                        ylim=(floor, 3 * max(tops))))  # fmt: skip
            panels.append(figures.Panel(f"{prefix}Ritz weights", "|eigenvalue|", "weight", points, log="xy"))
    return panels


def path_panels(found: list[Network], names: dict[str, str]) -> list[figures.Panel]:
    """Change of the training loss along the pruning path, and its first and second order alone, as far as a few ε."""
    panels = []
    for one in [one for one in found if one.path][:MOST]:
        start = dict(ratio=0.0, change=0.0, second_order=0.0, first_order=0.0)  # where nothing is removed
        x, *lines = (np.array([figures.number(row[field]) for row in (start, *one.path)]) for field in start)
        drawn = [*(line(x, y, 0, dash=dash) for dash, y in enumerate(lines)), line(x, lines[0], 0, points="open")]
        marked, ylim, view = guides(one, names), None, window([one]) or (float(x.min()), float(x.max()))
        epsilon = figures.number(next(iter(one.predictions.values()), {}).get("epsilon"))
        if math.isfinite(epsilon):
            least = min(y.min(where=np.isfinite(y) & (x <= view[1]), initial=0.0) for y in lines)
            ylim = (max(least, -3 * epsilon) - 0.3 * epsilon, 3 * epsilon)
            marked = (*marked, figures.Guide(epsilon, "ε", across=True))
        title = (one.label, "weights removed", "change of the train loss")
        panels.append(figures.Panel(*title, drawn, "x", view, guides=marked, ylim=ylim))
    return panels


def norm_panels(found: list[Network]) -> list[figures.Panel]:
    """L1 norms of Hessian rows against the magnitude quantile of their weights; norms of 0 lie at the bottom, open."""
    panels = []
    for one in [one for one in found if any("row_norm" in row for row in one.norms)][:MOST]:
        rows = [row for row in one.norms if "row_norm" in row]
        result = next((row for row in reversed(one.norms) if "zero_share" in row), {})
        x, y = (np.array([figures.number(row[key]) for row in rows]) for key in ("quantile", "row_norm"))
        threshold, marked = figures.number(result.get("threshold")), ()
        positive = [*y[y > 0], *([threshold] if threshold > 0 else [])]
        floor = 0.3 * min(positive, default=1.0)
        if threshold > 0:
            text = f"threshold {threshold:g}: {percent(result['zero_share'])} below"
            marked = (figures.Guide(threshold, text, across=True),)
        lines = [line(x[chosen], np.maximum(y[chosen], floor), 0, points=points)
                 for chosen, points in ((y > 0, "filled"), (y <= 0, "open")) if chosen.any()]  # fmt: skip
        if lines:
            top = 3 * max(positive, default=1.0)
            panels.append(figures.Panel(one.label, "quantile of the weight's magnitude", "row norm", lines, "x",
                                        guides=marked, log="y", ylim=(0.7 * floor, top)))  # fmt: skip
    return panels
