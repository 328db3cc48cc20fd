"""Curves of accuracy and loss under pruning, and what they removed from every layer."""

import pandas as pd
from matplotlib.figure import Figure

from sparsity_jax.report import draw, sections, series, summary
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import NEAR, Curve, Series

LAYER_STOPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # ratios shown layer by layer
ZOOM = 0.9  # where the second panel begins


def accuracy(grouped: list[Series]) -> Section | None:
    """Accuracy against the pruning ratio, and the sentence that it amounts to."""
    curves = series.curves(grouped) or series.curves(grouped, "train")
    told = summary.finding(summary.summarize(grouped, curves))
    caption = (told + deviation(curves)).strip() or "Accuracy by ratio."
    return section(grouped, curves, "accuracy", "Accuracy under pruning", caption)


def loss(grouped: list[Series]) -> Section | None:
    """Loss against the pruning ratio."""
    curves = series.curves(grouped) or series.curves(grouped, "train")
    caption = "Mean loss per example by ratio." + deviation(curves)
    return section(grouped, curves, "loss", "Loss under pruning", caption)


def accuracy_train(grouped: list[Series]) -> Section | None:
    """Accuracy on training data, where it is known on test data too."""
    if not series.curves(grouped):
        return None
    curves = series.curves(grouped, "train")
    heading = "Accuracy under pruning, training data"
    return section(grouped, curves, "accuracy", heading, "As above." + deviation(curves), "train ")


def deviation(curves: list[Curve]) -> str:
    """A sentence on the bands, "" without any."""
    several = any(len({series.member_of(row) for row in curve.rows}) > 1 for curve in curves)
    return " Bands: ± one standard deviation over networks." if several else ""


def section(
    grouped: list[Series], curves: list[Curve], field: str, heading: str, caption: str, prefix: str = ""
) -> Section | None:
    """The section of one field; None without numbers, or where the figure of limits shows the only curve."""
    tables = [curve.table(field) for curve in curves]
    drawn = [(curve, table) for curve, table in zip(curves, tables) if table.notna().any(axis=None)]
    if not drawn or (len(curves) == 1 and is_drawn_with_limits(grouped, curves[0])):
        return None
    figure = ratio_figure([one.label for one in grouped], drawn, field, prefix + field)
    return Section(heading, figure, caption)


def is_drawn_with_limits(grouped: list[Series], curve: Curve) -> bool:
    """Whether the figure of the geometric limit has the curve."""
    found = grouped[curve.series].of_kind("limit", "path", "row_norms", "width")
    return bool(found) and not curve.retrained


def ratio_figure(labels: list[str], drawn: list[tuple[Curve, pd.DataFrame]], field: str, ylabel: str) -> Figure:
    """All ratios and, where there are some above ZOOM, those once more."""
    end = max(table.index.max() for _, table in drawn)
    above = sum((table.index >= ZOOM - NEAR).sum() for _, table in drawn)
    zoom = end > ZOOM + NEAR and above > len(drawn)
    figure, axes = draw.panels(2 if zoom else 1)
    fine = len(drawn) > draw.MANY
    for panel, start in zip(axes, (0.0, ZOOM)):
        for curve, table in reversed(drawn):
            near = table[table.index >= start - NEAR]
            style = dict(marker=marker(curve.series), ms=3.6, markevery=max(1, len(near) // 20))
            draw.band(panel, near, curve.series, dash=curve.dash, fine=fine, **style)
        draw.percents(panel.xaxis)
    draw.scale(field, *axes)
    draw.label(axes[0], "All ratios", "weights removed", ylabel)
    if zoom:
        axes[0].axvspan(ZOOM, end, color=draw.GRID, alpha=0.55, lw=0, zorder=0)
        draw.label(axes[1], f"Above {ZOOM:.0%}", "weights removed")
    shown = sorted({curve.series for curve, _ in drawn})
    names = {curve.dash: curve.variant for curve, _ in drawn}
    keys = [draw.key(labels[i], i, marker=marker(i), ms=4.5) for i in shown]
    variants = [names.get(i, "") for i in range(max(names) + 1)]
    draw.legend(figure, keys + draw.variant_keys(variants))
    return figure


def marker(index: int) -> str:
    """Marker of a series."""
    return draw.MARKERS[index % len(draw.MARKERS)]


# -------------------------------------------------------------------------------------- layers, channels


def layers(grouped: list[Series]) -> Section | None:
    """Heat maps of what every layer keeps, and a table of the zeros in all parameters."""
    curves = series.curves(grouped) or series.curves(grouped, "train")
    tables = [layer_table(curve) for curve in curves]
    known = [(curve, table) for curve, table in zip(curves, tables) if table.size]
    without = {curve.series for curve, _ in known if not curve.retrained}
    maps = {}
    for curve, table in known:
        if not (curve.retrained and curve.series in without):  # retraining does not change the masks
            maps.setdefault(curve.series, []).append((curve.variant, table))
    named = [
        (sections.name(grouped[i].label, variant if len(own) > 1 else ""), table)
        for i, own in maps.items()
        for variant, table in own
    ]
    if not named:
        return None
    figure = draw.heat_maps(named, "weights")
    caption = "Share of each layer's weights that is kept, in percent, by the share removed from the network."
    fold = f"{len(named)} heat maps" if len(named) > 6 else ""
    return Section("Sparsity by layer", figure, caption, fold, tables=zeros(grouped, curves))


def layer_table(curve: Curve) -> pd.DataFrame:
    """Sparsity [layers, ratios], mean over members, at the ratios nearest to LAYER_STOPS that have it."""
    rows_at = {}
    for row in curve.rows:
        if row.get("layers"):
            rows_at.setdefault(row["removed"], {})[series.member_of(row)] = row["layers"]
    columns = {}
    for stop in LAYER_STOPS:
        nearest = min(rows_at, key=lambda ratio: abs(ratio - stop), default=-1.0)
        if abs(nearest - stop) <= NEAR:
            columns[stop] = pd.DataFrame(rows_at[nearest].values()).astype(float).mean()
    return pd.DataFrame(columns)


def zeros(grouped: list[Series], curves: list[Curve]) -> list[Table]:
    """Share of zeros in the arrays that were pruned and in all parameters, at the usual ratios."""
    fields = ("sparsity", "sparsity_all")
    shares = []
    for curve in curves:
        both = [curve.table(field) for field in fields]
        means = [[series.at_ratio(table, stop).mean() for table in both] for stop in LAYER_STOPS]
        shares.append(pd.DataFrame(means, LAYER_STOPS, fields).dropna())
    stops = sorted({stop for table in shares for stop in table.index})
    heads = ["zeros in %, by share removed", *(f"{100 * stop:g}%" for stop in stops)]
    told = "Zeros in the arrays that may be pruned; of all: in all parameters of the network."
    table = Table(heads, [], note=told)
    for curve, known in zip(curves, shares):
        if known.size:
            label = sections.name(grouped[curve.series].label, curve.variant)
            pairs = known.reindex(stops).to_numpy()
            cells = [zero_cell(*map(sections.percent, pair)) for pair in pairs]
            table.rows.append([Cell(label, color=curve.series), *cells])
    return [table] if stops else []


def zero_cell(pruned: str, of_all: str) -> Cell:
    return Cell(pruned, "" if pruned == "–" else f"of all {of_all}")


def channels_removed(grouped: list[Series]) -> Section | None:
    """Share of channels removed, and of zeros, at every ratio of curves of structured selections."""
    fields = {
        "channels_removed": "channels removed",
        "sparsity": "zeros, prunable arrays",
        "sparsity_all": "zeros, all parameters",
    }
    rows = []
    for curve in series.curves(grouped) or series.curves(grouped, "train"):
        label = sections.name(grouped[curve.series].label, curve.variant)
        means = pd.DataFrame({field: curve.table(field).mean(axis=1) for field in fields})
        known = means.dropna(subset=["channels_removed"]).to_numpy()
        rows += [[Cell(label, color=curve.series), *map(sections.percent, shares)] for shares in known]
    if not rows:
        return None
    note = "One line per ratio; a removed channel is zero with all its weights."
    note += sections.first(sections.MOST, len(rows), " lines")
    heads = ["network", *(Cell(text, "%") for text in fields.values())]
    return Section("Channels removed and zeros", tables=[Table(heads, rows[: sections.MOST], note=note)])
