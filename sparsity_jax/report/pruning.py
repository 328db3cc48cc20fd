"""Curves of accuracy and loss under pruning, and what they removed from every layer."""

from collections.abc import Iterable

import pandas as pd

from sparsity_jax.report import draw, series, summary
from sparsity_jax.report.draw import Line
from sparsity_jax.report.sections import (
    MOST_LINES,
    Cell,
    Cells,
    Section,
    Table,
    filled,
    headings,
    joined,
    only_first,
)
from sparsity_jax.report.series import NEAR, Curve, Grouped, best_known_curves, member_of

LAYER_STOPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # ratios shown layer by layer
ZOOM = 0.9  # where the second panel begins
LIMITS = ("limit", "path", "row_norms", "width")  # kinds whose figure has a network's only curve


def accuracy(grouped: Grouped) -> Section | None:
    """Accuracy against the pruning ratio, and the sentence that it amounts to."""
    curves = best_known_curves(grouped)
    caption = summary.finding(summary.summarize(grouped, curves))
    return section(grouped, curves, "accuracy", "Accuracy under pruning", caption)


def loss(grouped: Grouped) -> Section | None:
    """Loss against the pruning ratio."""
    caption = "Mean loss per example by ratio."
    return section(grouped, best_known_curves(grouped), "loss", "Loss under pruning", caption)


def accuracy_train(grouped: Grouped) -> Section | None:
    """Accuracy on training data, where it is known on test data too."""
    curves = series.curves(grouped, "train") if series.curves(grouped) else []
    heading = "Accuracy under pruning, training data"
    return section(grouped, curves, "accuracy", heading, "As above.")


def section(
    grouped: Grouped, curves: list[Curve], field: str, heading: str, caption: str
) -> Section | None:
    """All ratios and, where there are some above ZOOM, those once more.

    None without numbers, or where the figure of limits has the only curve.
    """
    if len(curves) == 1 and not curves[0].retrained and grouped[curves[0].series].of_kind(*LIMITS):
        return None
    lines = [Line(curve.table(field), curve.series, curve.dash) for curve in curves]
    lines = [line for line in lines if line.values.notna().any(axis=None)]
    panels = {"All ratios": lines}
    ratios = [ratio for line in lines for ratio in line.values.index]
    end = max(ratios, default=0.0)
    if end > ZOOM + NEAR and sum(ratio >= ZOOM - NEAR for ratio in ratios) > len(lines):
        panels[f"Above {ZOOM:.0%}"] = [line.above(ZOOM - NEAR) for line in lines]
    variants = [""] * (1 + max((curve.dash for curve in curves), default=0))
    for curve in curves:
        variants[curve.dash] = curve.variant
    text: draw.Style = dict(xlabel="weights removed", ylabel=field, markers=True)
    figure, axes = draw.lines(panels, series.labels(grouped), variants, **text)
    if not axes:
        return None
    whole, *zoomed = axes.values()
    for panel in axes.values():
        draw.percents(panel.xaxis)
    draw.scale(field, *axes.values())
    for panel in zoomed:
        panel.set_ylabel("")
        whole.axvspan(ZOOM, end, color=draw.GRID, alpha=0.55, lw=0, zorder=0)
    if any(len(set(map(member_of, curve.rows))) > 1 for curve in curves):
        caption += " Bands: ± one standard deviation over networks."
    return Section(heading, figure, caption.strip() or "Accuracy by ratio.")


# ------------------------------------------------------------------------------ layers, channels


def layers(grouped: Grouped) -> Section | None:
    """Heat maps of what every layer keeps, and a table of the zeros in all parameters."""
    curves = best_known_curves(grouped)
    maps: dict[int, dict[str, pd.DataFrame]] = {}
    for curve in sorted(curves, key=lambda curve: (curve.retrained, curve.series)):
        table = layer_table(curve)
        variants = maps.setdefault(curve.series, {})
        if table.size and not (curve.retrained and variants):  # retraining keeps the masks
            variants[curve.variant] = table
    named = {}
    for index in sorted(maps):
        for variant, table in maps[index].items():
            told = variant if len(maps[index]) > 1 else ""
            named[joined(grouped[index].label, told)] = table
    if not named:
        return None
    caption = (
        "Share of each layer's weights that is kept, in percent, by the share removed from the "
        "network."
    )
    fold = f"{len(named)} heat maps" if len(named) > 6 else ""
    figure = draw.heat_maps(named, "weights")
    return Section("Sparsity by layer", figure, caption, fold, tables=zeros(grouped, curves))


def layer_table(curve: Curve) -> pd.DataFrame:
    """Sparsity [layers, ratios], mean over members, at the ratios nearest to LAYER_STOPS."""
    rows_at: dict[float, dict[str, dict]] = {}
    for row in curve.rows:
        if row.get("layers"):
            rows_at.setdefault(row["removed"], {})[member_of(row)] = row["layers"]
    columns = {}
    for stop in LAYER_STOPS:
        nearest = min(rows_at, key=lambda ratio: abs(ratio - stop), default=-1.0)
        if abs(nearest - stop) <= NEAR:
            columns[stop] = pd.DataFrame(rows_at[nearest].values(), dtype=float).mean()
    return pd.DataFrame(columns)


def zeros(grouped: Grouped, curves: Iterable[Curve]) -> list[Table]:
    """Share of zeros in the arrays that were pruned and in all parameters, at the usual ratios."""
    lines = []
    for curve in curves:
        pruned, of_all = curve.table("sparsity"), curve.table("sparsity_all")
        cells = {}
        for stop in LAYER_STOPS:
            share = series.at_ratio(of_all, stop).mean()
            if share >= 0:
                own = series.at_ratio(pruned, stop).mean()
                cells[stop] = Cell(f"{100 * own:.2f}", f"of all {100 * share:.2f}")
        if cells:
            lines.append((curve_name(grouped, curve), cells))
    shown = sorted({stop for _, cells in lines for stop in cells})
    heads = ["zeros in %, by share removed", *(f"{stop:.0%}" for stop in shown)]
    rows = [[name, *(cells.get(stop, "–") for stop in shown)] for name, cells in lines]
    note = "Zeros in the arrays that may be pruned; of all: in all parameters of the network."
    return [Table(heads, rows, note=note)] if rows else []


def curve_name(grouped: Grouped, curve: Curve) -> Cell:
    """Series and variant."""
    text = joined(grouped[curve.series].label, curve.variant)
    return Cell(text, color=curve.series)


REMOVED = {  # of curves of structured selections: column to template
    "channels removed|%": "{channels_removed:.2%}",
    "zeros, prunable arrays|%": "{sparsity:.2%}",
    "zeros, all parameters|%": "{sparsity_all:.2%}",
}


def channels_removed(grouped: Grouped) -> Section | None:
    """Share of channels removed, and of zeros, at every ratio of curves of structured
    selections.
    """
    lines: list[Cells] = []
    for curve in best_known_curves(grouped):
        fields = ("channels_removed", "sparsity", "sparsity_all")
        means = pd.DataFrame({field: curve.table(field).mean(axis=1) for field in fields})
        rows = means.dropna(subset=["channels_removed"]).to_dict("records")
        name = curve_name(grouped, curve)
        lines += [[name, *filled(REMOVED, row)] for row in rows]
    if not lines:
        return None
    note = "One line per ratio; a removed channel is zero with all its weights."
    note += only_first(MOST_LINES, len(lines), " lines")
    heads = ["network", *headings(REMOVED)]
    table = Table(heads, lines[:MOST_LINES], note=note)
    return Section("Channels removed and zeros", tables=[table])
