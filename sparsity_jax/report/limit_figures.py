"""The geometric limit of sparsity as figures: colour 0 is the network, those from 1 on its predictions.

Ink marks the actual limit. Each function draws the panels of the first MOST networks.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_jax.report import draw, sections, series
from sparsity_jax.report.limits import RULES as LIMIT_RULES
from sparsity_jax.report.limits import Network, actual, colors, main_limits, networks, prediction_names
from sparsity_jax.report.sections import Section
from sparsity_jax.report.series import Series, number

MOST = 6  # networks drawn in one figure
KINDS = ("curve", "limit", "path", "row_norms", "width")  # of the rows that are drawn
View = tuple[float, float]
Names = dict[str, str]


def show(
    grouped: list[Series],
    heading: str,
    caption: str,
    draw_figure: Callable[[list[Network], Names], Figure],
    has_rows: Callable[[Network], bool],
) -> Section | None:
    """The section of the networks that have rows for it; None without any."""
    every = networks(grouped)
    shown = [network for network in every if has_rows(network)][:MOST]
    if not shown:
        return None
    caption += sections.first(MOST, len(every), " networks") + series.seen_again(grouped, *KINDS)
    return Section(heading, draw_figure(shown, prediction_names(every)), caption)


def prediction_keys(names: Names) -> list:
    """Entries of a legend."""
    return [draw.key(names[stage], color) for stage, color in colors(names).items()]


def mark(axes: Axes, network: Network, names: Names, *, told: bool = True) -> None:
    """Predicted limits with their intervals, and the actual ones; above the panel what they are."""
    for stage, color in colors(names).items():
        if stage in network.predictions:
            row = network.predictions[stage]
            axes.axvspan(row["low"], row["high"], color=draw.color(color), alpha=0.14, lw=0, zorder=1)
            text = f"{names[stage]} {sections.percent(row['predicted'])}%"
            axes.axvline(row["predicted"], color=draw.color(color), lw=1.4, label=draw.literal(text))
    limits = main_limits(network)
    for name, value in limits.items():
        which = name if name in network.limits and len(limits) > 1 else ""
        text = sections.name(f"actual {sections.percent(value)}%", which)
        axes.axvline(value, color=draw.INK, lw=1.4, ls=draw.dashed(2), label=draw.literal(text))
    handles, _ = axes.get_legend_handles_labels()
    if told and handles:
        place = dict(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0.2)
        box = axes.legend(handles=handles, fontsize=8, ncols=2, handlelength=1.4, alignment="left", **place)
        box.set_title(axes.get_title(loc="left"), prop=dict(weight="bold", size=9.5))
        axes.set_title("", loc="left")


def level(axes: Axes, value: float, text: str) -> None:
    """A dotted line across the panel, with its text at the right end."""
    axes.axhline(value, color=draw.INK, lw=1.4, ls=draw.dashed(2))
    place = dict(ha="right", va="bottom", transform=axes.get_yaxis_transform())
    axes.text(0.995, value, draw.literal(text), fontsize=8, **place)


def window(found: list[Network]) -> View | None:
    """Ratios around all predicted and marked actual limits; None if that is most of them anyway."""
    values = [value for network in found for value in main_limits(network).values()]
    for network in found:
        for row in network.predictions.values():
            values += [row["low"], row["predicted"], row["high"]]
    if not values:
        return None
    low, high = around(values, 0.3, 0.01)
    return (low, high) if high - low < 0.6 else None


def zoom_to(axes: Axes, view: View) -> None:
    """Shows ratios in `view` and a little more."""
    pad = 0.02 * (view[1] - view[0])
    axes.set_xlim(view[0] - pad, view[1] + pad)


def around(values: list[float], margin: float, least: float) -> View:
    """A part of [0, 1] with all values inside and a margin, a share of their range and at least `least`."""
    pad = max(margin * (max(values) - min(values)), least)
    return max(min(values) - pad, 0.0), min(max(values) + pad, 1.0)


# ------------------------------------------------------------------------- accuracy and loss by ratio


def limits(grouped: list[Series]) -> Section | None:
    """Accuracy and loss against the pruning ratio with predicted and actual limits."""
    caption = "Bands: intervals of the predictions. Dots: the actual limit by the other definitions in the table."
    if any("ratio" in row for one in grouped for row in one.of_kind("limit")):
        caption += " Circles: evaluations of the bisection."
    has_rows = lambda network: bool(network.curves or network.search)
    return show(grouped, "Accuracy and loss up to the limit", caption, limit_figure, has_rows)


def limit_figure(found: list[Network], names: Names) -> Figure:
    """One row of panels per network; one network has the full range too if its limits are close together."""
    zoom = window(found)
    views = [zoom or (0.0, 1.0)]
    if zoom and len(found) == 1:
        views = [(0.0, 1.0), zoom]
    wanted = []
    for network in found:
        for field in ("accuracy", "loss"):
            for view in views:
                lines = ratio_lines(network, field, view)
                wanted += [(network, field, view, lines)] if lines else []
    figure, axes = draw.panels(len(wanted), height=3.7)
    for panel, (network, field, view, lines) in zip(axes, wanted):
        for line, style in lines:
            panel.plot(line.index, line, **style)
        (draw.from_zero if field == "accuracy" else draw.loss_scale)(panel)
        draw.percents(panel.xaxis)
        title = network.label or ("Around the limits" if view == zoom else "All ratios")
        draw.label(panel, title, "weights removed", field)
        zoom_to(panel, view)
        if len(views) > 1 and view == views[0]:
            panel.axvspan(*zoom, color=draw.GRID, alpha=0.55, lw=0, zorder=0)
        mark(panel, network, names, told=view == views[-1])
    on_train = any("train" in network.curves for network in found)
    splits = ["test", "train"] if on_train else []
    draw.legend(figure, [draw.key("pruned network", 0), *draw.variant_keys(splits)])
    return figure


def ratio_lines(network: Network, field: str, view: View) -> list[tuple[pd.Series, dict]]:
    """(numbers by ratio, style) of curves, evaluations of the search, and other definitions of the limit."""
    low, high = view
    lines = []
    for split, curve in network.curves.items():
        style = dict(color=draw.color(0), ls=draw.dashed(int(split == "train")))
        lines.append((curve[field].loc[low - 0.02 : high + 0.02], style))
    search = series.numbers(network.search, "ratio", field).set_index("ratio")[field].sort_index()
    open_points = dict(color=draw.color(0), marker="o", ms=4, mfc="none", ls="none" if lines else "-")
    lines.append((search.loc[low:high], open_points))
    for name, limit in actual(network).items():
        split, _, rule = name.partition(" ")
        of_field = rule in LIMIT_RULES and rule.startswith("loss") == (field == "loss")
        if of_field and split in network.curves and low <= limit <= high:
            curve = network.curves[split][field]
            value = np.interp(limit, curve.index, curve)
            lines.append((pd.Series([value], [limit]), dict(color=draw.INK, marker="o", ms=4, ls="none")))
    known = [(line.dropna(), style) for line, style in lines]
    return [(line, style) for line, style in known if line.size]


# -------------------------------------------------------------------------------- how predictions arise


def has_prediction(network: Network) -> bool:
    return bool(network.predictions)


def crossing(grouped: list[Series]) -> Section | None:
    """omega(R)^2 / D against R with the network's own p(R), and against p around the point where they meet."""
    caption = (
        "ω² / D, the squared Gaussian width of the loss basin per dimension, falls with the distance R; "
        "the share p of removed weights grows with it. The prediction is the p at which they meet."
    )
    return show(grouped, "Gaussian width against distance", caption, crossing_figure, has_prediction)


def crossing_figure(found: list[Network], names: Names) -> Figure:
    """Two panels per network: by distance and by share removed."""
    figure, axes = draw.panels(2 * len(found), height=3.6)
    for network, by_distance, by_ratio in zip(found, axes[::2], axes[1::2]):
        rows = {color: network.predictions.get(stage) for stage, color in colors(names).items()}
        rows = {color: row for color, row in rows.items() if row}
        far = 0.0
        for color, row in rows.items():
            meets = np.interp(row["predicted"], row["ratios"], row["distances"])
            far = max(far, meets)
            by_distance.plot(row["distances"], row["ratios"], color=draw.color(0))
            by_ratio.plot([0, 1], [0, 1], color=draw.color(0))
            for panel, x, at in ((by_distance, "distances", meets), (by_ratio, "ratios", row["predicted"])):
                panel.plot(row[x], row["widths"], color=draw.color(color))
                draw.points(panel, [at], [row["predicted"]], color)
        view = window([network]) or (0.0, 1.0)
        title = f"{network.label}: " if network.label else ""
        draw.label(by_distance, f"{title}by distance", "distance R(p) from the trained weights", "ω² / D, and p")
        draw.label(by_ratio, f"{title}by share removed", "share removed p", "ω² / D, and p")
        by_distance.set(xlim=(0, 1.6 * far or None), ylim=view)
        by_ratio.set_ylim(view)
        zoom_to(by_ratio, view)
        draw.percents(by_distance.yaxis, by_ratio.xaxis, by_ratio.yaxis)
        mark(by_ratio, network, names)
    widths = {stage: f"ω² / D, {name}" for stage, name in names.items()}
    draw.legend(figure, [draw.key("share removed p", 0), *prediction_keys(widths)])
    return figure


def history(grouped: list[Series]) -> Section | None:
    """The prediction after each number of products, with its enclosure."""
    caption = "What each number of products would have predicted. Bands: enclosures."
    has_rows = lambda network: any(row.get("history") for row in network.predictions.values())
    return show(grouped, "Prediction by number of products", caption, history_figure, has_rows)


def history_figure(found: list[Network], names: Names) -> Figure:
    """One panel per network, cut to what it does after the first quarter."""
    figure, axes = draw.panels(len(found))
    for panel, network in zip(axes, found):
        late = list(main_limits(network).values())
        for stage, color in colors(names).items():
            course = network.predictions.get(stage, {}).get("history")
            if course:
                table = pd.DataFrame(course).astype(float).set_index("num_matvecs")
                panel.plot(table.index, table["predicted"], color=draw.color(color))
                panel.fill_between(
                    table.index, table["lower"], table["upper"], color=draw.color(color), alpha=0.18, lw=0
                )
                settled = table[table.index >= table.index.max() / 4].stack()
                late += [settled.min(), settled.max()]
        draw.label(panel, network.label, "products (Lanczos steps)", "predicted limit")
        draw.percents(panel.yaxis)
        draw.counts(panel.xaxis)
        panel.set_ylim(around(late, 0.06, 0.005))
        panel.set_xlim(0, 1.15 * panel.dataLim.xmax)  # room for the text of the limit
        for value in main_limits(network).values():
            level(panel, value, f"actual {sections.percent(value)}%")
    draw.legend(figure, prediction_keys(names))
    return figure


def spectrum(grouped: list[Series]) -> Section | None:
    """Spectral density, smeared visibly, and the Ritz weights themselves against |value|."""
    caption = (
        "Left: Ritz values smeared by Gaussians of 0.8% of the range. Right: the values and weights "
        "themselves, one per Lanczos step and probe; open: negative values."
    )
    has_rows = lambda network: any(row.get("ritz_values") for row in network.predictions.values())
    return show(grouped, "Spectrum of the curvature", caption, spectrum_figure, has_rows)


def spectrum_figure(found: list[Network], names: Names) -> Figure:
    """Two panels per network: density and Ritz weights, both on logarithmic axes."""
    figure, axes = draw.panels(2 * len(found))
    for network, smooth, ritz in zip(found, axes[::2], axes[1::2]):
        top = 0.0
        for stage, color in colors(names).items():
            row = network.predictions.get(stage, {})
            if row.get("ritz_values"):
                values = np.atleast_2d(np.array(row["ritz_values"], float))
                weights = np.atleast_2d(np.array(row["ritz_weights"], float))
                grid, density = smeared(values, weights)
                top = max(top, density.max())
                smooth.plot(grid, density, color=draw.color(color))
                smooth.fill_between(grid, density, 1e-300, color=draw.color(color), alpha=0.18, lw=0)
                for filled, sign in ((True, values > 0), (False, values < 0)):
                    seen = sign & (weights > 1e-10)
                    draw.points(ritz, abs(values[seen]), weights[seen], color, filled=filled)
        prefix = f"{network.label}: " if network.label else ""
        draw.label(smooth, f"{prefix}spectral density", "eigenvalue", "density")
        draw.label(ritz, f"{prefix}Ritz weights", "|eigenvalue|", "weight")
        smooth.set(yscale="log", ylim=(1e-7 * top, 3 * top))
        ritz.set(xscale="log", yscale="log")
    draw.legend(figure, prediction_keys(names))
    return figure


def smeared(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(grid, density) of Ritz values [probes, steps] as Gaussians of 0.8 % of their range."""
    from sparsity_jax import linops  # it needs jax, which takes a second to import

    span = max(np.ptp(values), 1e-12)
    variance = (0.008 * span) ** 2 / max(1.0, 1.12 * span)
    density, grid = linops.spectral_density(values, weights, bins=1200, sigma2=variance, overhead=0.06 * span)
    return np.asarray(grid), np.maximum(density, 1e-8 * np.max(density))


# ------------------------------------------------------------------------------- along the way to a limit


def path(grouped: list[Series]) -> Section | None:
    """Change of the training loss along the pruning path, and its first and second order alone."""
    caption = (
        "What pruning does to the loss on the train set, and its first two orders alone. "
        "The theory assumes that the gradient adds nothing."
    )
    has_rows = lambda network: bool(network.path)
    return show(grouped, "Training loss along the pruning path", caption, path_figure, has_rows)


def path_figure(found: list[Network], names: Names) -> Figure:
    """One panel per network, as far as a few ε."""
    fields = {
        "change": "change",
        "second_order": "curvature alone (second order)",
        "first_order": "gradient alone (first order)",
    }
    start = dict.fromkeys(["ratio", *fields], 0.0)  # where nothing is removed
    figure, axes = draw.panels(len(found), height=3.6)
    for panel, network in zip(axes, found):
        table = series.numbers([start, *network.path], "ratio", *fields).set_index("ratio")
        for dash, field in enumerate(fields):
            panel.plot(table.index, table[field], color=draw.color(0), ls=draw.dashed(dash))
        draw.points(panel, table.index, table["change"], 0, filled=False)
        draw.label(panel, network.label, "weights removed", "change of the train loss")
        draw.percents(panel.xaxis)
        view = window([network]) or (table.index.min(), table.index.max())
        zoom_to(panel, view)
        epsilon = min((number(row.get("epsilon")) for row in network.predictions.values()), default=math.nan)
        if not math.isnan(epsilon):
            least = min(table[table.index <= view[1]].min().min(), 0.0)
            panel.set_ylim(max(least, -3 * epsilon) - 0.3 * epsilon, 3 * epsilon)
            level(panel, epsilon, "ε")
        mark(panel, network, names)
    draw.legend(figure, [draw.key("pruned network", 0), *draw.variant_keys(list(fields.values()))])
    return figure


def row_norms(grouped: list[Series]) -> Section | None:
    """L1 norms of Hessian rows against the magnitude quantile of their weights."""
    caption = "L1 norm of the Hessian row of one weight per quantile. Open: exactly 0."
    has_rows = lambda network: any(number(row.get("row_norm")) >= 0 for row in network.norms)
    return show(grouped, "Hessian rows by weight magnitude", caption, norm_figure, has_rows)


def norm_figure(found: list[Network], names: Names) -> Figure:
    """One panel per network; norms of 0 lie at the bottom, open."""
    figure, axes = draw.panels(len(found))
    for panel, network in zip(axes, found):
        norms = series.numbers(network.norms, "quantile", "row_norm").set_index("quantile")["row_norm"].dropna()
        result = network.norms[-1]
        threshold = number(result.get("threshold"))
        positive = [*norms[norms > 0], *([threshold] if threshold > 0 else [])]
        floor, top = 0.3 * min(positive, default=1.0), 3 * max(positive, default=1.0)
        for filled, shown in ((True, norms[norms > 0]), (False, norms[norms <= 0])):
            draw.points(panel, shown.index, np.maximum(shown, floor), 0, filled=filled)
        draw.label(panel, network.label, "quantile of the weight's magnitude", "row norm")
        draw.percents(panel.xaxis)
        panel.set(yscale="log", ylim=(0.7 * floor, top))
        if threshold > 0:
            level(panel, threshold, f"threshold {threshold:g}: {sections.percent(result['zero_share'])}% below")
    draw.legend(figure, [draw.key("one weight", 0, linestyle="none", marker="o")])
    return figure
