"""Curves of accuracy and loss under pruning, and what they removed from every layer."""

import pandas as pd
from matplotlib.figure import Figure

from sparsity_jax.report import draw, sections, series, summary
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import NEAR, Curve, Grouped, best_known_curves, member_of

LAYER_STOPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # ratios shown layer by layer
ZOOM = 0.9  # where the second panel begins
Drawn = list[tuple[Curve, pd.DataFrame]]


def accuracy(grouped: Grouped) -> Section | None:
    """Accuracy against the pruning ratio, and the sentence that it amounts to."""
    curves = best_known_curves(grouped)
    told = summary.finding(summary.summarize(grouped, curves))
    caption = (told + deviation(curves)).strip() or "Accuracy by ratio."
    return section(grouped, curves, "accuracy", "Accuracy under pruning", caption)


def loss(grouped: Grouped) -> Section | None:
    """Loss against the pruning ratio."""
    curves = best_known_curves(grouped)
    caption = "Mean loss per example by ratio." + deviation(curves)
    return section(grouped, curves, "loss", "Loss under pruning", caption)


def accuracy_train(grouped: Grouped) -> Section | None:
    """Accuracy on training data, where it is known on test data too."""
    curves = series.curves(grouped, "train") if series.curves(grouped) else []
    heading = "Accuracy under pruning, training data"
    return section(grouped, curves, "accuracy", heading, "As above." + deviation(curves))


def deviation(curves: list[Curve]) -> str:
    """A sentence on the bands, "" without any."""
    for curve in curves:
        if len(set(map(member_of, curve.rows))) > 1:
            return " Bands: ± one standard deviation over networks."
    return ""


def section(
    grouped: Grouped, curves: list[Curve], field: str, heading: str, caption: str
) -> Section | None:
    """The section of one field; None without numbers, or where the figure of limits has the
    curve.
    """
    drawn = []
    for curve in curves:
        table = curve.table(field)
        if table.notna().any(axis=None):
            drawn.append((curve, table))
    if not drawn or is_drawn_with_limits(grouped, curves):
        return None
    labels = [one.label for one in grouped]
    return Section(heading, ratio_figure(labels, drawn, field), caption)


def is_drawn_with_limits(grouped: Grouped, curves: list[Curve]) -> bool:
    """Whether the figure of the geometric limit has the only curve."""
    if len(curves) > 1 or curves[0].retrained:
        return False
    return bool(grouped[curves[0].series].of_kind("limit", "path", "row_norms", "width"))


def ratio_figure(labels: list[str], drawn: Drawn, field: str) -> Figure:
    """All ratios and, where there are some above ZOOM, those once more."""
    ratios = pd.concat([table.index.to_series() for _, table in drawn])
    end = ratios.max()
    zoom = end > ZOOM + NEAR and (ratios >= ZOOM - NEAR).sum() > len(drawn)
    figure, axes = draw.panels(2 if zoom else 1)
    for panel, start in zip(axes, (0.0, ZOOM)):
        for curve, table in drawn:
            near = table[table.index >= start - NEAR]
            style = dict(marker=marker(curve.series), ms=3.6, markevery=max(1, len(near) // 20))
            fine = len(drawn) > draw.MANY
            draw.band(panel, near, curve.series, dash=curve.dash, fine=fine, **style)
        draw.percents(panel.xaxis)
    draw.scale(field, *axes)
    draw.label(axes[0], "All ratios", "weights removed", field)
    if zoom:
        axes[0].axvspan(ZOOM, end, color=draw.GRID, alpha=0.55, lw=0, zorder=0)
        draw.label(axes[1], f"Above {ZOOM:.0%}", "weights removed")
    variants = [""] * (1 + max(curve.dash for curve, _ in drawn))
    shown = set()
    for curve, _ in drawn:
        variants[curve.dash] = curve.variant
        shown.add(curve.series)
    keys = [draw.key(labels[i], i, marker=marker(i), ms=4.5) for i in sorted(shown)]
    draw.legend(figure, keys + draw.variant_keys(variants))
    return figure


def marker(index: int) -> str:
    """Marker of a series."""
    return draw.MARKERS[index % len(draw.MARKERS)]


# -------------------------------------------------------------------------------------- layers,
# channels


def layers(grouped: Grouped) -> Section | None:
    """Heat maps of what every layer keeps, and a table of the zeros in all parameters."""
    curves = best_known_curves(grouped)
    maps = {}
    for curve in sorted(curves, key=lambda curve: curve.retrained):
        table = layer_table(curve)
        own = maps.setdefault(curve.series, {})
        if table.size and not (curve.retrained and own):  # retraining does not change the masks
            own[curve.variant] = table
    named = []
    for index, own in sorted(maps.items()):
        for variant, table in own.items():
            label = sections.name(grouped[index].label, variant if len(own) > 1 else "")
            named.append((label, table))
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
    """Sparsity [layers, ratios], mean over members, at the ratios nearest to LAYER_STOPS that have
    it.
    """
    rows_at = {}
    for row in curve.rows:
        if row.get("layers"):
            rows_at.setdefault(row["removed"], {})[member_of(row)] = row["layers"]
    columns = {}
    for stop in LAYER_STOPS:
        nearest = min(rows_at, key=lambda ratio: abs(ratio - stop), default=-1.0)
        if abs(nearest - stop) <= NEAR:
            members = pd.DataFrame(rows_at[nearest].values(), dtype=float)
            columns[stop] = members.mean()
    return pd.DataFrame(columns)


def zeros(grouped: Grouped, curves: list[Curve]) -> list[Table]:
    """Share of zeros in the arrays that were pruned and in all parameters, at the usual ratios."""
    lines, stops = [], set()
    for curve in curves:
        cells = {}
        for stop in LAYER_STOPS:
            pruned = series.at_ratio(curve.table("sparsity"), stop).mean()
            of_all = series.at_ratio(curve.table("sparsity_all"), stop).mean()
            if of_all >= 0:
                cells[stop] = Cell(f"{100 * pruned:.2f}", f"of all {100 * of_all:.2f}")
        if cells:
            stops |= set(cells)
            lines.append((curve_name(grouped, curve), cells))
    shown = sorted(stops)
    heads = ["zeros in %, by share removed", *(f"{stop:.0%}" for stop in shown)]
    rows = [[name, *(cells.get(stop, "–") for stop in shown)] for name, cells in lines]
    note = "Zeros in the arrays that may be pruned; of all: in all parameters of the network."
    return [Table(heads, rows, note=note)] if rows else []


def curve_name(grouped: Grouped, curve: Curve) -> Cell:
    """Series and variant."""
    text = sections.name(grouped[curve.series].label, curve.variant)
    return Cell(text, color=curve.series)


def channels_removed(grouped: Grouped) -> Section | None:
    """Share of channels removed, and of zeros, at every ratio of curves of structured
    selections.
    """
    fields = {
        "channels_removed": "channels removed",
        "sparsity": "zeros, prunable arrays",
        "sparsity_all": "zeros, all parameters",
    }
    lines = []
    for curve in best_known_curves(grouped):
        means = pd.DataFrame({field: curve.table(field).mean(axis=1) for field in fields})
        for shares in means.dropna(subset=["channels_removed"]).to_numpy():
            cells = map(sections.percent, shares)
            lines.append([curve_name(grouped, curve), *cells])
    if not lines:
        return None
    note = "One line per ratio; a removed channel is zero with all its weights."
    note += sections.first(sections.MOST, len(lines), " lines")
    heads = ["network", *(Cell(text, "%") for text in fields.values())]
    table = Table(heads, lines[: sections.MOST], note=note)
    return Section("Channels removed and zeros", tables=[table])
