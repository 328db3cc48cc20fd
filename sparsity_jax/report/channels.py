"""Channels that were cut: their groups, what is left of each, and the compact network."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_jax.report import draw, sections, series
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import Series, number

SHOWN = 3  # networks with bars beside the groups
COLORS = 8  # of groups, in turn
ROLES = {  # of an array in a group of channels: what it is called, and its marker
    "producer": ("makes the channels", dict(marker="s", markersize=5.2)),
    "depthwise": ("passes them on one by one", dict(marker="D", markersize=4.6)),
    "consumer": ("reads them", dict(marker="s", markersize=5.2, markerfacecolor="none")),
    "other": ("norm, bias", dict(marker=".", markersize=4.5)),
}


def groups(grouped: list[Series]) -> Section | None:
    """The channel groups of the network, and the channels kept by the last cut."""
    layout, kept = group_layout(grouped)
    if not layout.get("kernels"):
        return None
    caption = "Channels that only go together, a row each, and the layers that have a part in them."
    caption += " Kept: after the last cut." + sections.first(SHOWN, len(kept), " networks")
    count = len(layout["groups"])
    fold = f"{count} groups" if count > 80 else ""
    return Section("Channel groups", group_figure(layout, kept), caption, fold)


def group_layout(grouped: list[Series]) -> tuple[dict, dict[str, pd.Series]]:
    """(layout of the first row that has one, by series the channels that its last cut kept of each group).

    Channels are means over members. Empty without a layout; cuts of another network are left out.
    """
    cuts = {one.label: one.of_kind("cut") for one in grouped}
    layouts = [row["layout"] for rows in cuts.values() for row in rows if row.get("layout")]
    if not layouts:
        return {}, {}
    names = list(layouts[0]["groups"])
    kept = {}
    for label, rows in cuts.items():
        last = {series.member_of(row): row["kept"] for row in rows if set(row.get("kept", ())) == set(names)}
        if last:
            kept[label] = pd.DataFrame(last).astype(float).mean(axis=1)[names]
    return layouts[0], kept


def group_figure(layout: dict, kept: dict[str, pd.Series] | None = None) -> Figure:
    """A row per group, with a marker on every layer that has a part in it.

    layout: of `groups.layout`. kept: by label, channels left by group, drawn as bars beside the rows.
    """
    kernels, bars = layout["kernels"], list((kept or {}).items())[:SHOWN]
    rows = list(layout["groups"].values())
    sizes = np.array([row["size"] for row in rows])
    names = draw.short_paths(list(layout["groups"]))
    small = 8 if len(rows) <= 30 else 6.5
    height = (0.21 if len(rows) <= 30 else 0.15) * len(rows)
    figure = Figure(figsize=(10, height + 2.2), layout="constrained")
    ratios = [8, 0.5, *(1.2 for _ in bars)]
    axes, counts, *beside = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios)
    draw_marks(axes, rows, shrink=min(1.0, 60 / len(kernels)))
    axes.grid(axis="y", visible=False)
    axes.spines[:].set_visible(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [draw.literal(name) for name in names])
    axes.tick_params(axis="y", labelsize=small)
    shown = range(0, len(kernels), math.ceil(len(kernels) / 80))
    texts = draw.short_paths(kernels, 40)
    axes.set_xticks(shown, [draw.literal(texts[i]) for i in shown], rotation=90)
    axes.tick_params(axis="x", labelsize=7 if len(kernels) <= 60 else 5.8)
    axes.set_xlabel("layers, in order of use")
    blank(counts, "channels")
    for y, size in enumerate(sizes):
        counts.text(1, y, f"{size:,}", fontsize=small, ha="right", va="center")
    for panel, (label, left) in zip(beside, bars):
        blank(panel, f"{label}: kept" if len(bars) > 1 else "kept")
        draw_bars(panel, left.to_numpy(), sizes, small)
    used = [role for role in ROLES if any(role in row["marks"] for row in rows)]
    draw.legend(figure, [draw.key(ROLES[role][0], linestyle="none", **ROLES[role][1]) for role in used])
    return figure


def draw_marks(axes: Axes, rows: list[dict], *, shrink: float) -> None:
    """Draws the layers of every group and a line through them."""
    for y, row in enumerate(rows):
        marks = row["marks"]
        places = [place for own in marks.values() for place in own]
        paint = {"color": draw.color(y % COLORS)}
        axes.plot([min(places), max(places)], [y, y], lw=0.9, alpha=0.55, zorder=2, **paint)
        for role in reversed(ROLES):
            own = marks.get(role, ())
            style = {**ROLES[role][1], "linestyle": "none", **paint}
            style["markersize"] *= shrink
            axes.plot(own, [y] * len(own), zorder=3, **style)


def draw_bars(axes: Axes, left: np.ndarray, sizes: np.ndarray, fontsize: float) -> None:
    """Draws the share of every group that is left, and the number."""
    colors = [draw.color(y % COLORS) for y in range(len(sizes))]
    axes.barh(range(len(sizes)), 1, height=0.62, color=draw.GRID)
    axes.barh(range(len(sizes)), left / sizes, height=0.62, color=colors)
    axes.set_xlim(0, 1.7)
    for y, count in enumerate(left):
        axes.text(1.08, y, f"{count:.4g}", fontsize=fontsize, va="center")


def blank(axes: Axes, title: str) -> None:
    """Leaves nothing of the axes but a title and what is drawn in them."""
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelleft=False, labelbottom=False)
    axes.set_title(draw.literal(title, 24), fontsize=8, fontweight="normal", color=draw.MUTED)


def channels(grouped: list[Series]) -> Section | None:
    """Heat maps of what every group keeps, cut by cut."""
    rounds = [(one.label, channel_rounds(one)) for one in grouped]
    rounds = [(label, table) for label, table in rounds if table.size]
    if not rounds:
        return None
    caption = "Share of each group's channels that is kept, in percent, by the share removed from the network."
    return Section("Channels by group", draw.heat_maps(rounds, "channels"), caption)


def channel_rounds(one: Series, most: int = 12) -> pd.DataFrame:
    """Share of each group's channels that is gone [groups, shares removed], mean over members."""
    gone = {}
    for row in one.of_kind("cut"):
        if row.get("sizes"):
            sizes = pd.Series(row["sizes"], dtype=float)
            share = 1 - pd.Series(row["kept"], dtype=float).reindex(sizes.index).fillna(sizes) / sizes
            _, removed = series.removal(row) or ("", number(row["ratio"]))
            gone.setdefault(round(removed, 4), []).append(share)
    table = pd.DataFrame({removed: pd.DataFrame(shares).mean() for removed, shares in sorted(gone.items())})
    few = np.unique(np.linspace(0, table.shape[1] - 1, most).round().astype(int))
    return table.iloc[:, few] if table.shape[1] > most else table


# ------------------------------------------------------------------------------------ compact networks

SIZES = {  # heading to (field, factor)
    "parameters": ("parameters", 1),
    "MFLOPs per image": ("flops", 1e-6),
    "KiB": ("bytes", 1 / 1024),
}


def compact(grouped: list[Series]) -> Section | None:
    """Networks without their removed channels: accuracy, sizes and, in plain words, whether they are faster."""
    rows = [(one.label, row) for one in grouped for row in one.of_kind("compact")]
    if not rows:
        return None
    heads = ["network", Cell("accuracy", "%"), *SIZES, Cell("time", "ms"), "speed"]
    lines = [compact_line(label, row) for label, row in rows[: sections.MOST]]
    note = "Compact, of dense. Time: median of whole batches, in alternation."
    differences = [number(row.get("difference")) for _, row in rows]
    worst = pd.Series(differences).max()
    if not math.isnan(worst):
        note += f" Logits of both differ by at most {worst:.2g} of the largest."
    note += sections.first(sections.MOST, len(rows), "")
    warnings = [f"{label}: {row['warning']}." for label, row in rows if row.get("warning")]
    table = Table(heads, lines, (0, len(heads) - 1), note, remarks=tuple(warnings[: sections.MOST]))
    return Section("Compact network", tables=[table])


def compact_line(label: str, row: dict) -> list[Cell | str]:
    """One network of the table."""
    seed = f"seed {row['seed']}" if "seed" in row else ""
    visit = f"visit {row['visit']}" if row.get("visit", 1) > 1 else ""
    cells = [sections.name(label, seed, visit), sections.percent(number(row.get("accuracy")))]
    for field, factor in SIZES.values():
        dense = factor * number(row.get(field))
        small = factor * number(row.get(f"{field}_compact"))
        of_dense = f"of {sections.amount(dense)}, {100 * small / dense:.1f}%" if dense > 0 else ""
        cells.append(Cell(sections.amount(small), of_dense))
    times = row.get("milliseconds")
    if times:
        cells.append(Cell(f"{number(times['compact']):.3g}", f"of {number(times['dense']):.3g}"))
    return [*cells, *([] if times else ["–"]), speed(row)]


def speed(row: dict) -> str:
    """Whether the compact network is faster on the machine that measured it."""
    if not row.get("verdict"):
        return "not measured"
    ratio, low, high = (number(row.get(f"speedup{end}")) for end in ("", "_low", "_high"))
    where = f"batch {row.get('batch_size')}, {row.get('device')}"
    return f"{row['verdict']}: {ratio:.2f} times the speed ({low:.2f}–{high:.2f}; {where})"
