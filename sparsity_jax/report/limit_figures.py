"""The geometric limit of sparsity as figures: colour 0 is the network, those from 1 on its
predictions.

Ink marks the actual limit. Of several networks the first MOST are drawn.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sparsity_jax.report import draw, limit_numbers, sections, series
from sparsity_jax.report.limit_numbers import Names, Network, Networks, colors, main_limits
from sparsity_jax.report.sections import Section
from sparsity_jax.report.series import Grouped, number, numbers

MOST = 6  # networks drawn in one figure
KINDS = ("curve", "limit", "path", "row_norms", "width")  # of the rows that are drawn
View = tuple[float, float]
Keys = list[Line2D]


def show(
    grouped: Grouped,
    heading: str,
    caption: str,
    needs: tuple[str, str],
    draw_network: Callable,
    keys: Callable[[Names], Keys],
    panels: int = 1,
) -> Section | None:
    """The section of all networks that have rows of a kind with a field, `needs`.

    draw_network: of (network, names, axes ...) draws its panels.
    """
    kind, field = needs
    every = limit_numbers.networks(grouped)
    names = limit_numbers.prediction_names(every)
    shown = [network for network in every if any(field in row for row in network.of_kind(kind))]
    shown = shown[:MOST]
    if not shown:
        return None
    figure, axes = draw.panels(panels * len(shown))
    for i, network in enumerate(shown):
        draw_network(network, names, *axes[panels * i :][:panels])
    draw.legend(figure, keys(names))
    return Section(heading, figure, caption + more(grouped, every))


def more(grouped: Grouped, every: Networks) -> str:
    """Sentences on what is not drawn."""
    return sections.first(MOST, len(every), " networks") + series.seen_again(grouped, *KINDS)


def prediction_keys(names: Names) -> Keys:
    """Entries of a legend."""
    return [draw.key(names[stage], color) for stage, color in colors(names).items()]


def mark(axes: Axes, network: Network, names: Names) -> None:
    """Predicted limits with their intervals, and the actual ones."""
    for stage, color in colors(names).items():
        row = network.predictions.get(stage)
        if row:
            paint = draw.color(color)
            text = draw.literal(f"{names[stage]} {row['predicted']:.2%}")
            axes.axvspan(row["low"], row["high"], color=paint, alpha=0.14, lw=0, zorder=1)
            axes.axvline(row["predicted"], color=paint, lw=1.4, label=text)
    marked = main_limits(network)
    for name, value in marked.items():
        text = sections.name(f"actual {value:.2%}", name if len(marked) > 1 else "")
        axes.axvline(value, color=draw.INK, lw=1.4, ls=draw.dashed(2), label=draw.literal(text))


def explain(axes: Axes) -> None:
    """Writes above the panel, below its title, what the marks are."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        place = dict(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0.2)
        style = dict(fontsize=8, ncols=2, handlelength=1.4, alignment="left")
        box = axes.legend(handles=handles, **place, **style)
        box.set_title(axes.get_title(loc="left"), prop=dict(weight="bold", size=9.5))
        axes.set_title("", loc="left")


def level(axes: Axes, value: float, text: str) -> None:
    """A dotted line across the panel, with its text at the right end."""
    axes.axhline(value, color=draw.INK, lw=1.4, ls=draw.dashed(2))
    place = axes.get_yaxis_transform()
    axes.text(0.995, value, text, fontsize=8, ha="right", va="bottom", transform=place)


def window(found: Networks) -> View | None:
    """Ratios around all predicted and marked actual limits; None if that is most of them anyway."""
    values = [value for network in found for value in main_limits(network).values()]
    for network in found:
        for row in network.predictions.values():
            values += [row["low"], row["predicted"], row["high"]]
    low, high = around(values, 0.3, 0.01)
    return (low, high) if values and high - low < 0.6 else None


def around(values: list[float], margin: float, least: float) -> View:
    """A part of [0, 1] with all values and a margin, a share of their range and at least
    `least`.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = max(margin * (high - low), least)
    return max(low - pad, 0.0), min(high + pad, 1.0)


def zoom_to(axes: Axes, view: View) -> None:
    """Shows ratios in `view` and a little more."""
    low, high = view
    pad = 0.02 * (high - low)
    axes.set_xlim(low - pad, high + pad)
    draw.percents(axes.xaxis)


def title(network: Network, text: str) -> str:
    """Title of a panel."""
    return f"{network.label}: {text}" if network.label else text


# ------------------------------------------------------------------------- accuracy and loss by
# ratio


def limits(grouped: Grouped) -> Section | None:
    """Accuracy and loss against the pruning ratio with predicted and actual limits.

    One row of panels per network; one network has the full range too if its limits are close
    together.
    """
    every = limit_numbers.networks(grouped)
    names = limit_numbers.prediction_names(every)
    shown = [network for network in every if network.curves or network.of_kind("limit")][:MOST]
    zoom = window(shown)
    views = [zoom or (0.0, 1.0)]
    if zoom and len(shown) == 1:
        views = [(0.0, 1.0), zoom]
    wanted = []
    for network in shown:
        for field in ("accuracy", "loss"):
            for view in views:
                lines = ratio_lines(network, field, view)
                wanted += [(network, field, view, lines)] if lines else []
    if not wanted:
        return None
    figure, axes = draw.panels(len(wanted))
    for panel, (network, field, view, lines) in zip(axes, wanted):
        for line, style in lines:
            panel.plot(line.index, line, **style)
        draw.scale(field, panel)
        text = "Around the limits" if view == zoom else "All ratios"
        draw.label(panel, network.label or text, "weights removed", field)
        zoom_to(panel, view)
        mark(panel, network, names)
        if view == views[-1]:
            explain(panel)
    splits = ["test", "train"] if any("train" in network.curves for network in shown) else []
    draw.legend(figure, [draw.key("pruned network", 0), *draw.variant_keys(splits)])
    caption = (
        "Bands: intervals of the predictions. Dots: the actual limit by the other definitions in "
        "the table."
    )
    if any("ratio" in row for network in shown for row in network.of_kind("limit")):
        caption += " Circles: evaluations of the bisection."
    return Section("Accuracy and loss up to the limit", figure, caption + more(grouped, every))


def ratio_lines(network: Network, field: str, view: View) -> list[tuple[pd.Series, dict]]:
    """(numbers by ratio, style) of curves, evaluations of the search, and other definitions."""
    low, high = view
    lines = []
    paint = draw.color(0)
    for split, curve in network.curves.items():
        near = curve[field].loc[low - 0.02 : high + 0.02]
        lines.append((near, dict(color=paint, ls=draw.dashed(int(split == "train")))))
    search = numbers(network.of_kind("limit"), "ratio", field).dropna()
    evaluations = search.set_index("ratio")[field].sort_index().loc[low:high]
    line = "none" if lines else "-"
    lines.append((evaluations, dict(color=paint, marker="o", ms=4, mfc="none", ls=line)))
    for name, limit in limit_numbers.actual(network).items():
        split, _, rule = name.partition(" ")
        of_field = rule in limit_numbers.RULES and rule.startswith("loss") == (field == "loss")
        if of_field and split in network.curves and low <= limit <= high:
            curve = network.curves[split][field]
            dot = pd.Series(np.interp(limit, curve.index, curve), [limit])
            lines.append((dot, dict(color=draw.INK, marker="o", ms=4, ls="none")))
    known = [(line.dropna(), style) for line, style in lines]
    return [(line, style) for line, style in known if line.size]


# -------------------------------------------------------------------------------- how predictions
# arise


def crossing(grouped: Grouped) -> Section | None:
    """omega(R)^2 / D against R with the network's own p(R), and against p around where they
    meet.
    """
    caption = (
        "ω² / D, the squared Gaussian width of the loss basin per dimension, falls with the "
        "distance "
        "R; the share p of removed weights grows with it. The prediction is the p at which they "
        "meet."
    )

    def keys(names: Names) -> Keys:
        widths = {stage: f"ω² / D, {name}" for stage, name in names.items()}
        return [draw.key("share removed p", 0), *prediction_keys(widths)]

    heading = "Gaussian width against distance"
    return show(grouped, heading, caption, ("width", "widths"), draw_crossing, keys, panels=2)


def draw_crossing(network: Network, names: Names, by_distance: Axes, by_ratio: Axes) -> None:
    """Widths of every prediction by distance and by share removed."""
    far = 0.0
    for stage, row in network.predictions.items():
        paint = draw.color(colors(names)[stage])
        predicted, ratios, distances = row["predicted"], row["ratios"], row["distances"]
        meets = np.interp(predicted, ratios, distances)
        far = max(far, 1.6 * meets)
        by_distance.plot(distances, ratios, color=draw.color(0))
        by_distance.plot(distances, row["widths"], color=paint)
        by_distance.plot(meets, predicted, "o", ms=4, color=paint)
        by_ratio.plot(ratios, row["widths"], color=paint)
        by_ratio.plot(predicted, predicted, "o", ms=4, color=paint)
    by_ratio.plot([0, 1], [0, 1], color=draw.color(0))
    view = window([network]) or (0.0, 1.0)
    ylabel = "ω² / D, and p"
    draw.label(
        by_distance, title(network, "by distance"), "distance R(p) from the trained weights", ylabel
    )
    draw.label(by_ratio, title(network, "by share removed"), "share removed p", ylabel)
    by_distance.set(xlim=(0, far or None), ylim=view)
    by_ratio.set_ylim(view)
    zoom_to(by_ratio, view)
    draw.percents(by_distance.yaxis, by_ratio.yaxis)
    mark(by_ratio, network, names)
    explain(by_ratio)


def history(grouped: Grouped) -> Section | None:
    """The prediction after each number of products, with its enclosure."""
    caption = "What each number of products would have predicted. Bands: enclosures."
    heading = "Prediction by number of products"
    return show(grouped, heading, caption, ("width", "history"), draw_history, prediction_keys)


def draw_history(network: Network, names: Names, axes: Axes) -> None:
    """The course of every prediction, cut to what it does after the first quarter."""
    actual = list(main_limits(network).values())
    late = [*actual]
    for stage, row in network.predictions.items():
        paint = draw.color(colors(names)[stage])
        table = pd.DataFrame(row["history"], dtype=float).set_index("num_matvecs")
        axes.plot(table.index, table["predicted"], color=paint)
        axes.fill_between(
            table.index, table["lower"], table["upper"], color=paint, alpha=0.18, lw=0
        )
        settled = table[table.index >= table.index.max() / 4].stack()
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
    return show(
        grouped,
        "Spectrum of the curvature",
        caption,
        needs,
        draw_spectrum,
        prediction_keys,
        panels=2,
    )


def draw_spectrum(network: Network, names: Names, smooth: Axes, ritz: Axes) -> None:
    """Density and Ritz weights, on logarithmic axes."""
    top = 0.0
    for stage, row in network.predictions.items():
        paint = draw.color(colors(names)[stage])
        values = np.atleast_2d(np.array(row["ritz_values"], float))
        weights = np.atleast_2d(np.array(row["ritz_weights"], float))
        grid, density = smeared(values, weights)
        top = max(top, density.max())
        smooth.plot(grid, density, color=paint)
        smooth.fill_between(grid, density, 1e-300, color=paint, alpha=0.18, lw=0)
        for fill, sign in ((paint, values > 0), ("none", values < 0)):
            seen = sign & (weights > 1e-10)
            ritz.plot(abs(values[seen]), weights[seen], "o", ms=4, color=paint, mfc=fill)
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
    return np.asarray(grid), np.maximum(density, 1e-8 * np.max(density))


# ------------------------------------------------------------------------------- along the way to a
# limit

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

    def keys(_: Names) -> Keys:
        return [draw.key("pruned network", 0), *draw.variant_keys(list(ORDERS.values()))]

    heading = "Training loss along the pruning path"
    return show(grouped, heading, caption, ("path", "change"), draw_path, keys)


def draw_path(network: Network, names: Names, axes: Axes) -> None:
    """The change and its orders, as far as a few ε."""
    start = dict.fromkeys(["ratio", *ORDERS], 0.0)  # where nothing is removed
    rows = [start, *network.of_kind("path")]
    table = numbers(rows, "ratio", *ORDERS).set_index("ratio").sort_index()
    paint = draw.color(0)
    for dash, field in enumerate(ORDERS):
        marker = "" if dash else "o"
        axes.plot(
            table.index,
            table[field],
            color=paint,
            ls=draw.dashed(dash),
            marker=marker,
            mfc="none",
            ms=4,
        )
    draw.label(axes, network.label, "weights removed", "change of the train loss")
    view = window([network]) or (table.index.min(), table.index.max())
    zoom_to(axes, view)
    epsilons = [number(row.get("epsilon")) for row in network.predictions.values()]
    for epsilon in epsilons[:1]:
        least = min(table[table.index <= view[1]].min().min(), 0.0)
        axes.set_ylim(max(least, -3 * epsilon) - 0.3 * epsilon, 3 * epsilon)
        level(axes, epsilon, "ε")
    mark(axes, network, names)
    explain(axes)


def row_norms(grouped: Grouped) -> Section | None:
    """L1 norms of Hessian rows against the magnitude quantile of their weights."""
    caption = "L1 norm of the Hessian row of one weight per quantile. Open: exactly 0."

    def keys(_: Names) -> Keys:
        return [draw.key("one weight", 0, linestyle="none", marker="o")]

    heading = "Hessian rows by weight magnitude"
    return show(grouped, heading, caption, ("row_norms", "row_norm"), draw_norms, keys)


def draw_norms(network: Network, _: Names, axes: Axes) -> None:
    """Norms on a logarithmic axis; those of 0 lie at the bottom, open."""
    rows = network.of_kind("row_norms")
    norms = numbers(rows, "quantile", "row_norm").dropna().set_index("quantile")["row_norm"]
    threshold = number(rows[-1].get("threshold"))
    positive = pd.Series([*norms[norms > 0], threshold]).dropna()
    floor = 0.3 * (positive.min() if positive.size else 1.0)
    top = 3 * (positive.max() if positive.size else 1.0)
    paint = draw.color(0)
    for fill, shown in ((paint, norms[norms > 0]), ("none", norms[norms <= 0])):
        axes.plot(shown.index, np.maximum(shown, floor), "o", ms=4, color=paint, mfc=fill)
    draw.label(axes, network.label, "quantile of the weight's magnitude", "row norm")
    draw.percents(axes.xaxis)
    axes.set(yscale="log", ylim=(0.7 * floor, top))
    if threshold > 0:
        level(axes, threshold, f"threshold {threshold:g}: {rows[-1]['zero_share']:.2%} below")
