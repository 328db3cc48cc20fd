"""The geometric limit of sparsity as figures: colour 0 is the network, others its predictions.

Ink marks the actual limit. Of several networks the first MOST are drawn.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties

from sparsity_jax.report import draw, limit_numbers, series
from sparsity_jax.report.limit_numbers import Network, Networks
from sparsity_jax.report.sections import Section, joined, only_first
from sparsity_jax.report.series import Grouped, number, numbers

MOST = 6  # networks drawn in one figure
KINDS = ("curve", "limit", "path", "row_norms", "width")  # of the rows that are drawn
View = tuple[float, float]
NETWORK = draw.color(0)
POINTS: draw.Style = dict(marker="o", ms=4, ls="none")


def show(
    grouped: Grouped,
    heading: str,
    caption: str,
    needs: tuple[str, str],
    draw_network: Callable[..., None],
    *,
    network: str = "",
    predictions: str = "",
    variants: Sequence[str] = (),
    panels: int = 1,
) -> Section | None:
    """The section of all networks that have rows of a kind with a field, `needs`.

    draw_network: of (network, axes ...) draws its panels. network, predictions, variants: what the
    legend says of the network's colour, of those of predictions ({} is the name), and of dashes.
    """
    kind, field = needs
    every = limit_numbers.networks(grouped)
    has_field = lambda one: any(field in row for row in one.of_kind(kind))
    shown = list(filter(has_field, every))
    if not shown:
        return None
    del shown[MOST:]
    figure, axes = draw.panels(panels * len(shown))
    for i, one in enumerate(shown):
        start = panels * i
        draw_network(one, *axes[start : start + panels])
    labels = {0: network} if network else {}
    if predictions:
        for row, *_ in limit_numbers.by_stage(every).values():
            labels[row["color"]] = predictions.format(row["name"])
    draw.legend(figure, draw.keys(labels, variants))
    return Section(heading, figure, caption + more(grouped, every))


def more(grouped: Grouped, every: Networks) -> str:
    """Sentences on what is not drawn."""
    omitted = only_first(MOST, len(every), " networks")
    return omitted + series.seen_again(grouped, *KINDS)


def mark(axes: Axes, network: Network, *, explained: bool = True) -> None:
    """Draws predicted limits with their intervals, and the actual ones.

    explained: a legend above the panel, below its title, says what they are.
    """
    for row in network.predictions():
        paint = draw.color(row["color"])
        text = f"{row['name']} {row['predicted']:.2%}"
        axes.axvspan(row["low"], row["high"], color=paint, alpha=0.14, lw=0, zorder=1)
        axes.axvline(row["predicted"], color=paint, lw=1.4, label=draw.literal(text))
    marked = network.main_limits()
    for name, value in marked.items():
        text = joined(f"actual {value:.2%}", name if len(marked) > 1 else "")
        style: draw.Style = dict(color=draw.INK, lw=1.4, ls=draw.dashed(2))
        axes.axvline(value, label=draw.literal(text), **style)
    handles, _ = axes.get_legend_handles_labels()
    if handles and explained:
        style = dict(ncols=2, handlelength=1.4, borderaxespad=0.2, borderpad=0.2)
        style |= dict(loc="lower left", bbox_to_anchor=(0, 1), alignment="left", fontsize=8)
        box = axes.legend(handles=handles, **style)
        box.set_title(axes.get_title(loc="left"), FontProperties(weight="bold", size=9.5))
        axes.set_title("", loc="left")


def level(axes: Axes, value: float, text: str) -> None:
    """A dotted line across the panel, with its text at the right end."""
    axes.axhline(value, color=draw.INK, lw=1.4, ls=draw.dashed(2))
    place = axes.get_yaxis_transform()
    axes.text(0.995, value, text, fontsize=8, ha="right", va="bottom", transform=place)


def window(found: Iterable[Network]) -> View | None:
    """Ratios around all predicted and marked actual limits; None if that is most of them anyway."""
    values: list[float] = []
    for network in found:
        values += network.main_limits().values()
        for row in network.predictions():
            values += [row["low"], row["predicted"], row["high"]]
    low, high = around(values, 0.3, 0.01)
    if values and high - low < 0.6:
        return low, high
    return None


def around(values: list[float], margin: float, least: float) -> View:
    """A part of [0, 1] with all values and a margin: a share of their range, at least `least`."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = max(margin * (high - low), least)
    return max(low - pad, 0.0), min(high + pad, 1.0)


def zoom_to(axes: Axes, view: View) -> None:
    """Shows ratios in `view` and a little more."""
    low, high = view
    pad = 0.02 * (high - low)
    axes.set_xlim(low - pad, high + pad)
    draw.percents(axes.xaxis)


# --------------------------------------------------------------------- accuracy and loss by ratio


def limits(grouped: Grouped) -> Section | None:
    """Accuracy and loss against the pruning ratio with predicted and actual limits.

    One row of panels per network; one network has the full range too if its limits are close
    together.
    """
    every = limit_numbers.networks(grouped)
    shown = [one for one in every if one.curves or one.of_kind("limit")]
    del shown[MOST:]
    zoom = window(shown)
    views = [zoom or (0.0, 1.0)]
    if zoom and len(shown) == 1:
        views.insert(0, (0.0, 1.0))
    wanted = list(itertools.product(shown, ("accuracy", "loss"), views))
    if not wanted:
        return None
    figure, axes = draw.panels(len(wanted))
    for panel, (network, field, view) in zip(axes, wanted):
        draw_ratios(panel, network, field, view)
        draw.scale(field, panel)
        text = "Around the limits" if view == zoom else "All ratios"
        draw.label(panel, network.label or text, "weights removed", field)
        zoom_to(panel, view)
        mark(panel, network, explained=view == views[-1])
    splits = []
    if any("train" in network.curves for network in shown):
        splits = ["test", "train"]
    draw.legend(figure, draw.keys({0: "pruned network"}, splits))
    caption = (
        "Bands: intervals of the predictions. Dots: the actual limit by the other definitions in "
        "the table."
    )
    if any("ratio" in row for network in shown for row in network.of_kind("limit")):
        caption += " Circles: evaluations of the bisection."
    return Section("Accuracy and loss up to the limit", figure, caption + more(grouped, every))


def draw_ratios(axes: Axes, network: Network, field: str, view: View) -> None:
    """Curves, evaluations of the search as circles, and other definitions as dots."""
    low, high = view
    for split, curve in network.curves.items():
        near = curve[field].dropna().loc[low - 0.02 : high + 0.02]
        dash = draw.dashed(int(split == "train"))
        axes.plot(near.index, near, color=NETWORK, ls=dash)
    search = numbers(network.of_kind("limit"), "ratio", field).dropna().sort_values("ratio")
    search = search[search["ratio"].between(low, high)]
    circles = POINTS | dict(mfc="none", ls="none" if network.curves else "-")
    axes.plot(search["ratio"], search[field], color=NETWORK, **circles)
    for name, limit in network.actual().items():
        split, _, rule = name.partition(" ")
        if rule not in limit_numbers.RULES or split not in network.curves:
            continue
        about_loss = rule.startswith("loss")
        if about_loss == (field == "loss") and low <= limit <= high:
            curve = network.curves[split][field]
            value = np.interp(limit, curve.index, curve)
            axes.plot(limit, value, color=draw.INK, **POINTS)


# ------------------------------------------------------------------------- how predictions arise


def crossing(grouped: Grouped) -> Section | None:
    """omega(R)^2 / D against R with the network's own p(R), and against p where they meet."""
    caption = (
        "ω² / D, the squared Gaussian width of the loss basin per dimension, falls with the "
        "distance "
        "R; the share p of removed weights grows with it. The prediction is the p at which they "
        "meet."
    )
    legend = dict(network="share removed p", predictions="ω² / D, {}")
    needs = ("width", "widths")
    heading = "Gaussian width against distance"
    return show(grouped, heading, caption, needs, draw_crossing, panels=2, **legend)


def draw_crossing(network: Network, by_distance: Axes, by_ratio: Axes) -> None:
    """Widths of every prediction by distance and by share removed."""
    far = 0.0
    for row in network.predictions():
        paint = draw.color(row["color"])
        predicted = row["predicted"]
        ratios, distances = row["ratios"], row["distances"]
        meets = np.interp(predicted, ratios, distances)
        far = max(far, 1.6 * meets)
        by_distance.plot(distances, ratios, color=NETWORK)
        by_distance.plot(distances, row["widths"], color=paint)
        by_distance.plot(meets, predicted, color=paint, **POINTS)
        by_ratio.plot(ratios, row["widths"], color=paint)
        by_ratio.plot(predicted, predicted, color=paint, **POINTS)
    by_ratio.plot([0, 1], [0, 1], color=NETWORK)
    view = window([network]) or (0.0, 1.0)
    names = {by_distance: "by distance", by_ratio: "by share removed"}
    xlabels = ("distance R(p) from the trained weights", "share removed p")
    for (axes, name), xlabel in zip(names.items(), xlabels):
        draw.label(axes, title(network, name), xlabel, "ω² / D, and p")
        axes.set_ylim(view)
        draw.percents(axes.yaxis)

    by_distance.set_xlim(0, far or None)
    zoom_to(by_ratio, view)
    mark(by_ratio, network)


def title(network: Network, text: str) -> str:
    """Title of a panel."""
    return f"{network.label}: {text}" if network.label else text


def history(grouped: Grouped) -> Section | None:
    """The prediction after each number of products, with its enclosure."""
    caption = "What each number of products would have predicted. Bands: enclosures."
    heading = "Prediction by number of products"
    return show(grouped, heading, caption, ("width", "history"), draw_history, predictions="{}")


def draw_history(network: Network, axes: Axes) -> None:
    """The course of every prediction, cut to what it does after the first quarter."""
    actual = list(network.main_limits().values())
    late = [*actual]
    for row in network.predictions():
        paint = draw.color(row["color"])
        table = pd.DataFrame(row["history"], dtype=float).set_index("num_matvecs")
        axes.plot(table.index, table["predicted"], color=paint)
        style: draw.Style = dict(color=paint, alpha=0.18, lw=0)
        axes.fill_between(table.index, table["lower"], table["upper"], **style)
        quarter = table.index.max() / 4
        settled = table[table.index >= quarter].stack()
        late += [settled.min(), settled.max()]
    draw.label(axes, network.label, "products (Lanczos steps)", "predicted limit")
    draw.percents(axes.yaxis)
    draw.counts(axes.xaxis)
    axes.set_ylim(around(late, 0.06, 0.005))
    axes.set_xlim(0, 1.15 * axes.dataLim.xmax)  # room for the text of the limit
    for value in actual:
        level(axes, value, f"actual {value:.2%}")


def spectrum(grouped: Grouped) -> Section | None:
    """Spectral density, smeared visibly, and the Ritz weights themselves against |value|."""
    caption = (
        "Left: Ritz values smeared by Gaussians of 0.8% of the range. Right: the values and "
        "weights "
        "themselves, one per Lanczos step and probe; open: negative values."
    )
    needs = ("width", "ritz_values")
    heading = "Spectrum of the curvature"
    return show(grouped, heading, caption, needs, draw_spectrum, panels=2, predictions="{}")


def draw_spectrum(network: Network, smooth: Axes, ritz: Axes) -> None:
    """Density and Ritz weights, on logarithmic axes."""
    top = 0.0
    for row in network.predictions():
        paint = draw.color(row["color"])
        values = np.array(row["ritz_values"], float, ndmin=2)
        weights = np.array(row["ritz_weights"], float, ndmin=2)
        grid, density = smeared(values, weights)
        top = max(top, density.max())
        smooth.plot(grid, density, color=paint)
        smooth.fill_between(grid, density, 1e-300, color=paint, alpha=0.18, lw=0)
        for fill, sign in ((paint, values > 0), ("none", values < 0)):
            seen = sign & (weights > 1e-10)
            sizes = abs(values[seen])
            ritz.plot(sizes, weights[seen], color=paint, mfc=fill, **POINTS)
    draw.label(smooth, title(network, "spectral density"), "eigenvalue", "density")
    draw.label(ritz, title(network, "Ritz weights"), "|eigenvalue|", "weight")
    smooth.set(yscale="log", ylim=(1e-7 * top, 3 * top))
    ritz.set(xscale="log", yscale="log")


def smeared(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(grid, density) of Ritz values [probes, steps] as Gaussians of 0.8 % of their range."""
    from sparsity_jax import linops  # it needs jax, which takes a second to import

    span = max(np.ptp(values), 1e-12)
    variance = (0.008 * span) ** 2 / max(1.0, 1.12 * span)
    options = dict(bins=1200, sigma2=variance, overhead=0.06 * span)
    density, grid = linops.spectral_density(values, weights, **options)
    least = 1e-8 * np.max(density)
    return np.asarray(grid), np.maximum(density, least)


# ------------------------------------------------------------------------ along the way to a limit

ORDERS = {
    "change": "change",
    "second_order": "curvature alone (second order)",
    "first_order": "gradient alone (first order)",
}


def path(grouped: Grouped) -> Section | None:
    """Change of the training loss along the pruning path, and its first and second order alone."""
    caption = (
        "What pruning does to the loss on the train set, and its first two orders alone. "
        "The theory assumes that the gradient adds nothing."
    )
    legend: draw.Style = dict(network="pruned network", variants=list(ORDERS.values()))
    heading = "Training loss along the pruning path"
    return show(grouped, heading, caption, ("path", "change"), draw_path, **legend)


def draw_path(network: Network, axes: Axes) -> None:
    """The change and its orders, as far as a few ε."""
    start = dict.fromkeys(["ratio", *ORDERS], 0.0)  # where nothing is removed
    rows = [start, *network.of_kind("path")]
    table = numbers(rows, "ratio", *ORDERS).set_index("ratio").sort_index()
    for dash, field in enumerate(ORDERS):
        circles: draw.Style = {} if dash else POINTS | dict(mfc="none")
        style = circles | dict(color=NETWORK, ls=draw.dashed(dash))
        axes.plot(table.index, table[field], **style)
    draw.label(axes, network.label, "weights removed", "change of the train loss")
    view = window([network]) or (table.index.min(), table.index.max())
    zoom_to(axes, view)
    for row in network.predictions()[:1]:
        epsilon = number(row.get("epsilon"))
        near = table[table.index <= view[1]]
        least = max(min(near.min().min(), 0.0), -3 * epsilon)
        axes.set_ylim(least - 0.3 * epsilon, 3 * epsilon)
        level(axes, epsilon, "ε")
    mark(axes, network)


def row_norms(grouped: Grouped) -> Section | None:
    """L1 norms of Hessian rows against the magnitude quantile of their weights."""
    caption = "L1 norm of the Hessian row of one weight per quantile. Open: exactly 0."
    heading = "Hessian rows by weight magnitude"
    return show(grouped, heading, caption, ("row_norms", "row_norm"), draw_norms)


def draw_norms(network: Network, axes: Axes) -> None:
    """Norms on a logarithmic axis; those of 0 lie at the bottom, open."""
    rows = network.of_kind("row_norms")
    table = numbers(rows, "quantile", "row_norm").dropna()
    norms = table.set_index("quantile")["row_norm"]
    threshold = number(rows[-1].get("threshold"))
    known = pd.Series([*norms, threshold])
    least, most = known[known > 0].agg(["min", "max"]).fillna(1.0)
    for fill, shown in ((NETWORK, norms[norms > 0]), ("none", norms[norms <= 0])):
        height = np.maximum(shown, 0.3 * least)
        axes.plot(shown.index, height, color=NETWORK, mfc=fill, **POINTS)
    draw.label(axes, network.label, "quantile of the weight's magnitude", "row norm")
    draw.percents(axes.xaxis)
    axes.set(yscale="log", ylim=(0.21 * least, 3 * most))
    if threshold > 0:
        below = rows[-1]["zero_share"]
        level(axes, threshold, f"threshold {threshold:g}: {below:.2%} below")
