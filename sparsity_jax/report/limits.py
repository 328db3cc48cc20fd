"""The geometric limit of sparsity: predicted and actual limits of every network, and the figures
behind them. Rows are those of the stages limit, path, row_norms and width, and of curves; see
`geometry`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_jax.report import draw, series
from sparsity_jax.report.rows import number
from sparsity_jax.report.sections import (
    Cell,
    Cells,
    Section,
    Shown,
    Table,
    joined,
    mean_cell,
    only_first,
    table,
)
from sparsity_jax.report.series import Frame, Grouped, Series
from sparsity_jax.types import Row

__all__ = [
    "KINDS",
    "actual",
    "crossing",
    "gaps",
    "history",
    "limits",
    "networks",
    "path",
    "prediction",
    "predictions",
    "pruned",
    "row_norms",
    "spectrum",
    "verdicts",
    "window",
]

KINDS = ("limit", "path", "row_norms", "width")  # of rows that make a network one of these here
_MOST = 6  # networks drawn in one figure
_WIDE = 0.01  # an enclosure wider than this is called so where the config asks for nothing
_STEEP = 0.5  # share of ε that the gradient may change the loss by before a prediction is cautioned
_OPERATORS = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton", "absolute": "absolute Hessian"}
_RULES = {  # definitions of "nothing is lost", as `geometry.CRITERIA` names them
    "accuracy": "{} accuracy not below dense",
    "better_accuracy": "{} accuracy above dense, as the original",
    "accuracy_within": "{} accuracy below dense by at most the tolerance",
    "loss_within": "{} loss above dense by at most ε, or the tolerance of the search",
}
_ELSEWHERE = "by bisection, in the run this one started from"
_PREDICTED = (
    "predicted",
    "low",
    "high",
    "epsilon",
    "enclosure_low",
    "enclosure_high",
    "stop_width",
)


# Networks, predictions, actual limits -------------------------------------------------------------


def networks(grouped: Grouped) -> list[Series]:
    """A series of its own per network that has rows of KINDS: those of the last visits."""
    result = []
    told = series.last_visits(series.frame(grouped, "curve", *KINDS))
    for (index, member), lines in told.groupby(["series", "member"], sort=False):
        name = series.network_name(grouped[index], member)
        network = Series(name, list(lines["row"]))
        if network.of_kind(*KINDS):
            result.append(network)
    if len(result) == 1:
        return [result[0]._replace(label="")]
    return result


def predictions(networks: Grouped) -> Frame:
    """A line per prediction: a `frame` of PREDICTED with its `name` and its `color`, for colour 0
    is the network.
    """
    told = series.frame(networks, "width", fields=_PREDICTED)
    names = []
    for row in told["row"]:
        operator = row.get("operator", "")
        names.append(f"{_OPERATORS.get(operator, operator)} ({row['stage']})")
    colors, _ = pd.factorize(told["stage"])
    return told.assign(name=names, color=1 + colors)


def _names_of(told: Frame) -> list[str]:
    """What the colours of predictions stand for, from colour 1."""
    return list(told.drop_duplicates("color")["name"])


def actual(networks: Grouped) -> Frame:
    """The actual limit [series, definition, rank, limit] by every definition that width and limit
    stages know; of rank 0 are those to compare with: by bisection, else by accuracy.
    """
    columns = ["series", "definition", "rank", "limit"]
    lines = []
    for index, network in enumerate(networks):
        for row in network.of_kind("width"):
            for name, limit in (row.get("actual") or {}).items():
                split, _, rule = name.partition(" ")
                definition = _RULES.get(rule, _ELSEWHERE).format(split)
                rank = 1 if name == "test accuracy" else 2
                lines.append((index, definition, rank, number(limit)))
        for row in network.of_kind("limit"):
            if row.get("phase") == "result":
                rule = _RULES.get(row.get("criterion", ""), "{} data")
                definition = f"{rule.format(row.get('split', 'test'))}, by bisection"
                lines.append((index, definition, 0, number(row["limit"])))
    told = pd.DataFrame(lines, columns=columns)
    least = told.groupby("series")["rank"].transform("min")
    told["rank"] -= least
    told = told[(told["definition"] != _ELSEWHERE) | (least > 0)]
    return told.drop_duplicates(columns[:3], keep="last").dropna()


def gaps(networks: Grouped) -> Frame:
    """Predicted less actual limit, and whether that is inside the interval as the page shows it,
    per pair of both.
    """
    pairs = predictions(networks).merge(actual(networks), on="series")
    low, high, limit = (pairs[name].round(4) for name in ("low", "high", "limit"))
    inside = limit.between(low, high)
    return pairs.assign(gap=pairs["predicted"] - pairs["limit"], inside=inside)


# In plain words -----------------------------------------------------------------------------------


def verdicts(networks: Grouped) -> list[tuple[str, str, str]]:
    """Per prediction (its name, how far it is from the actual limit, what stands against it)."""
    pairs = gaps(networks)
    result = []
    for name, rows in predictions(networks).groupby("name", sort=False):
        text = f"{rows['predicted'].mean():.2%} predicted"
        own = pairs[(pairs["name"] == name) & (pairs["rank"] == 0)]
        if len(own):
            gap = 100 * own["gap"].mean()
            side = "above" if gap >= 0 else "below"
            text += f", {abs(gap):.2f} points {side} the actual limit"
            inside = own["inside"]
            interval = f"{'inside' if inside.all() else 'outside'} the interval"
            if len(own) > 1:
                interval = f"inside {inside.sum()} of {len(own)} intervals"
            text += f" ({own['definition'].iloc[0]}), which is {interval}"
        caution = f"{_enclosure_caution(rows)} {_gradient_caution(networks, rows, own)}"
        result.append((str(name), f"{text}.", caution.strip()))
    return result


def _enclosure_caution(rows: Frame) -> str:
    """A caution where the enclosure of a prediction is missing or wide; else ""."""
    asked = rows["stop_width"].fillna(0).max() or _WIDE
    width = (rows["enclosure_high"] - rows["enclosure_low"]).max()
    if width <= asked:
        return ""
    if width > asked:
        return (
            f"Not narrow enough: the enclosure is {100 * width:.2g} points wide, more than "
            f"{100 * asked:.2g}; any value in it is possible, and more products narrow it."
        )
    return (
        "No enclosure: with negative values clipped nothing bounds the error left after so many "
        "products; only the history shows whether it has settled."
    )


def _gradient_caution(networks: Grouped, rows: Frame, known: Frame) -> str:
    """A caution where the gradient, which predictions leave out, changes the loss; else "".

    known: `gaps` to the actual limit, which the caution must not contradict.
    """
    path = series.frame(networks, "path", fields=["ratio", "first_order"]).sort_values("ratio")
    steepness = _STEEP
    change = 0.0
    for row in rows.to_dict("records"):
        own = path[path["series"] == row["series"]]
        if row["predicted"] <= own["ratio"].max():
            first = np.interp(row["predicted"], own["ratio"], own["first_order"])
            share = abs(first) / row["epsilon"]
            if share > steepness:
                steepness = share
                change = first
    agrees = len(known) > 0 and known["inside"].all()
    disagrees = known["gap"].mean() * change < 0
    if not change or agrees or disagrees:
        return ""
    side = "larger" if change < 0 else "smaller"
    says = f"expect a {side}" if known.empty else f"this agrees with the {side}"
    return (
        f"The gradient, which the prediction leaves out, changes the loss by {change:+.2g} on the "
        f"way there, {steepness:.2g} times ε: {says} actual limit."
    )


# The tables ---------------------------------------------------------------------------------------

_COLUMNS = {  # of one prediction
    "network": "{network}",
    "predicted|%": "{predicted:.2%}",
    "interval|%": "{low:.2%}–\u2060{high:.2%}",
    "enclosure|%": "{enclosure_low:.2%}–\u2060{enclosure_high:.2%}",
    "± probes": "{standard_error:.2%}",
    "± ε": "{epsilon_error:.2%}",
    "ε": "{epsilon:.3g}",
    "probes × products": "{num_probes} × {num_matvecs}",
    "share without curvature|%": "{zero_share:.1%}",
    "weight below 0|%": "{negative_mass:.1%}",
    "on the original's grid|%": "{predicted_on_grid:.1%}",
}


def prediction(grouped: Grouped) -> Shown:
    """Predictions, then every definition of the actual limit and how far off they are."""
    own = networks(grouped)
    tables = []
    lines = []
    for line in predictions(own).to_dict("records"):
        name = Cell(line["name"], color=line["color"])
        lines.append((name, {**line["row"], "network": own[line["series"]].label}))
    if lines:
        note = (
            "Interval: the enclosure, or the prediction alone, widened by two deviations (±) of "
            "probes and ε."
        )
        tables.append(table("prediction", _COLUMNS, lines, note=note))
    if len(actual(own)):
        tables.append(_actual_table(own))
    heading = "Predicted and actual limit"
    if tables:
        return Section(heading, statements=verdicts(own), tables=tables)
    return None


def _actual_table(networks: Grouped) -> Table:
    """One line per definition: the actual limit, and how far every prediction is from it."""
    heads: Cells = ["nothing is lost if", Cell("actual", "%")]
    names = _names_of(predictions(networks))
    for color, name in enumerate(names, start=1):
        heads.append(Cell(f"{name} less actual", "points", color=color))
    pairs = gaps(networks)
    lines = []
    for definition, limits in actual(networks).groupby("definition", sort=False):
        cells: Cells = [str(definition), mean_cell(*series.spread(limits["limit"]))]
        of_definition = pairs[pairs["definition"] == definition]
        for color, _ in enumerate(names, start=1):
            own = of_definition[of_definition["color"] == color]
            gap = mean_cell(*series.spread(own["gap"]), "+.2%")
            cells.append(gap._replace(bold=bool(own["inside"].all())))
        lines.append(cells)
    note = "Means ± sample standard deviation. Bold: inside the interval of every network."
    return Table(heads, lines, note=note)


# The figures --------------------------------------------------------------------------------------


def window(network: Series) -> tuple[float, float]:
    """Ratios around all predicted and actual limits of a network; all if that is most of them."""
    values = list(actual([network])["limit"])
    for edge in ("low", "predicted", "high"):
        values += list(predictions([network])[edge])
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if high - low < 0.6:
        pad = max(0.3 * (high - low), 0.01)
        return low - pad, min(high + pad, 1.0)
    return 0.0, 1.0


def _section(
    grouped: Grouped,
    points: Callable[[Series, Frame], Frame],
    heading: str,
    caption: str,
    *,
    ratio: str = "",
    **texts: Any,
) -> Shown:
    """A chart of `points`, which makes those of a network and its predictions, of the first MOST.

    ratio: the axis, x or y, that has pruning ratios; limits are marked there, and what is far from
    them is left out.
    """
    every = networks(grouped)
    lines = []
    by_title: dict[str, Series] = {}
    for network in every[:_MOST]:
        own = points(network, predictions([network]))
        near = own[own[ratio].between(*window(network))] if ratio else own
        if len(near):
            own = near
        titles = [joined(network.label, panel) for panel in own["panel"]]
        by_title |= dict.fromkeys(titles, network)
        lines.append(own.assign(panel=titles))
    names = ["network", *_names_of(predictions(every))]
    caption += " Stages that ran several times: the last time."
    caption += only_first(_MOST, len(every), "networks")
    shown = draw.section(heading, caption, lines, names, texts.pop("dashes", ()), **texts)
    if shown and shown.figure and ratio:
        for panel in shown.figure.axes:
            _mark(panel, by_title[str(panel.get_label())], upright=ratio == "x")
    return shown


def _mark(axes: Axes, network: Series, *, upright: bool) -> None:
    """Draws predictions with their intervals, and actual limits, as lines across the panel."""
    draw.percents(axes.xaxis if upright else axes.yaxis)
    line = axes.axvline if upright else axes.axhline
    span = axes.axvspan if upright else axes.axhspan
    for row in predictions([network]).to_dict("records"):
        color = draw.color(row["color"])
        span(row["low"], row["high"], color=color, alpha=0.14, lw=0)
        line(row["predicted"], color=color, label=f"predicted {row['predicted']:.2%}")
    limits = actual([network])
    for limit in limits.loc[limits["rank"] == 0, "limit"]:
        line(limit, color=draw.INK, ls=":", label=f"actual {limit:.2%}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def limits(grouped: Grouped) -> Shown:
    """Accuracy and loss against the pruning ratio with predicted and actual limits."""
    return _section(
        grouped,
        pruned,
        "Accuracy and loss up to the limit",
        "Bands: intervals of the predictions.",
        ratio="x",
        dashes=("test", "train", "bisection"),
        xlabel=draw.REMOVED,
    )


def pruned(network: Series, _: Frame) -> Frame:
    """Curves without retraining, and what a search for the limit evaluated."""
    search = series.frame([network], "limit", fields=["ratio", "accuracy", "loss"])
    search = search.assign(removed=search["ratio"], retrained=False)
    curves = [series.curves([network]), series.curves([network], split="train"), search]
    lines = []
    for field in ("accuracy", "loss"):
        for dash, curve in enumerate(curves):
            once = curve[~curve["retrained"].astype(bool)]
            lines.append(draw.points(once, "removed", field, field, dash))
    return pd.concat(lines)


def path(grouped: Grouped) -> Shown:
    """Change of the training loss along the pruning path, and its first and second order alone."""
    return _section(
        grouped,
        _orders,
        "Training loss along the pruning path",
        "What pruning does to the loss on the train set, and its first two orders alone: the "
        "gradient, of which the theory assumes that it adds nothing, and curvature.",
        ratio="x",
        dashes=("change", "curvature", "gradient", "ε"),
        xlabel=draw.REMOVED,
        ylabel="change of the train loss",
    )


def _orders(network: Series, told: Frame) -> Frame:
    """The change of the loss, its two orders, and the ε of a prediction."""
    fields = ["change", "second_order", "first_order"]
    path = series.frame([network], "path", fields=["ratio", *fields])
    epsilon = told["epsilon"].max()
    path["epsilon"] = epsilon
    lines = []
    for dash, field in enumerate([*fields, "epsilon"]):
        line = draw.points(path, "ratio", field, dash=dash)
        lines.append(line[~(abs(line["y"]) > 5 * epsilon)])
    orders = pd.concat(lines)
    end = orders.loc[orders["y"] != epsilon, "x"].max()
    return orders[~(orders["x"] > end)]


def row_norms(grouped: Grouped) -> Shown:
    """L1 norms of Hessian rows against the magnitude quantile of their weights."""
    return _section(
        grouped,
        _norms,
        "Hessian rows by weight magnitude",
        "L1 norm of the Hessian row of one weight per quantile; 1e-12 stands for less.",
        dashes=("row", "threshold"),
        xlabel="quantile of the weight's magnitude",
        ylabel="row norm",
        yscale="log",
    )


def _norms(network: Series, _: Frame) -> Frame:
    """Norms of rows, and the threshold under which they count as 0."""
    told = series.frame([network], "row_norms", fields=["quantile", "row_norm", "threshold"])
    told["row_norm"] = told["row_norm"].clip(lower=1e-12)
    told["threshold"] = told["threshold"].max()
    rows = draw.points(told, "quantile", "row_norm")
    return pd.concat([rows, draw.points(told, "quantile", "threshold", dash=1)])


def _unfolded(told: Frame, arrays: Callable[[Row], dict]) -> Frame:
    """A line per entry of the arrays by name that `arrays` gives for the row of a prediction."""
    none = pd.DataFrame(columns=["panel", "color", "x", "y"], dtype=float)
    parts = [none.astype({"color": int})]
    for line in told.to_dict("records"):
        part = pd.DataFrame(arrays(line["row"]), dtype=float)
        parts.append(part.assign(panel="", color=line["color"]))
    return pd.concat(parts[1:] or parts)


def crossing(grouped: Grouped) -> Shown:
    """omega(R)^2 / D and the network's own p(R) against R."""
    return _section(
        grouped,
        _widths,
        "Gaussian width against distance",
        "ω² / D, the squared Gaussian width of the loss basin per dimension, falls with the "
        "distance R; the share p that the network removes there grows with it. The prediction is "
        "the p at which they meet.",
        ratio="y",
        xlabel="distance R(p) from the trained weights",
        ylabel="ω² / D, and p",
    )


def _widths(_: Series, told: Frame) -> Frame:
    """Width and share removed by distance, up to twice that at which they meet."""
    width = _unfolded(told, lambda row: {"x": row["distances"], "y": row["widths"]})
    share = _unfolded(told, lambda row: {"x": row["distances"], "y": row["ratios"]})
    shown = pd.concat([width, share.assign(color=0)])
    meeting = [
        np.interp(line["predicted"], line["row"]["ratios"], line["row"]["distances"])
        for line in told.to_dict("records")
    ]
    return shown[~(shown["x"] > 2 * max(meeting, default=math.nan))]


def history(grouped: Grouped) -> Shown:
    """The prediction after each number of products, with its enclosure."""
    return _section(
        grouped,
        _courses,
        "Prediction by number of products",
        "What each number of products would have predicted. Bands: enclosures.",
        ratio="y",
        xlabel="products (Lanczos steps)",
        ylabel="predicted limit",
    )


def _courses(_: Series, told: Frame) -> Frame:
    """Predictions and their enclosures by number of products."""
    names = {"num_matvecs": "x", "predicted": "y", "lower": "low", "upper": "high"}
    return _unfolded(told, lambda row: row["history"]).rename(columns=names)


def spectrum(grouped: Grouped) -> Shown:
    """Spectral densities of the curvature."""
    return _section(
        grouped,
        lambda _, told: _unfolded(told, _density),
        "Spectrum of the curvature",
        "Ritz values smeared by Gaussians of 0.8% of their range.",
        xlabel="eigenvalue",
        ylabel="density",
        yscale="log",
    )


def _density(row: Row) -> dict[str, np.ndarray]:
    """Density of the Ritz values [probes, steps] of a prediction."""
    values = np.ravel(row["ritz_values"])
    weights = np.ravel(row["ritz_weights"])
    width = 0.008 * max(np.ptp(values), 1e-12)
    margin = 7 * width
    least = values.min() - margin
    most = values.max() + margin
    grid = np.linspace(least, most, 1200)
    distances = (grid[:, None] - values) / width
    heights = np.exp(-(distances**2) / 2)
    area = width * math.sqrt(2 * math.pi)
    bumps = heights / area
    heights = bumps @ (weights / weights.sum())
    return {"x": grid, "y": np.maximum(heights, 1e-7 * heights.max())}
