"""Channels that were cut: their groups, what is left of each, and the compact network."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsity_jax.report import draw, series
from sparsity_jax.report.sections import (
    MOST_LINES,
    Cell,
    Cells,
    Section,
    Table,
    amount,
    filled,
    headings,
    joined,
    only_first,
)
from sparsity_jax.report.series import Grouped, Series, member_of, number

SHOWN = 3  # networks with bars beside the groups
COLORS = 8  # of groups, in turn
ROLES: dict[
    str, tuple[str, draw.Style]
] = {  # of an array in a group of channels: what it is called, and its marker
    "other": ("norm, bias", dict(marker=".", ms=4.5)),
    "consumer": ("reads them", dict(marker="s", ms=5.2, mfc="none")),
    "depthwise": ("passes them on one by one", dict(marker="D", ms=4.6)),
    "producer": ("makes the channels", dict(marker="s", ms=5.2)),
}


def groups(grouped: Grouped) -> Section | None:
    """The channel groups of the network, and the channels kept by the last cut."""
    layout, kept = group_layout(grouped)
    if not layout.get("kernels"):
        return None
    caption = "Channels that only go together, a row each, and the layers that have a part in them."
    caption += " Kept: after the last cut."
    caption += only_first(SHOWN, len(kept), " networks")
    count = len(layout["groups"])
    fold = f"{count} groups" if count > 80 else ""
    return Section("Channel groups", group_figure(layout, kept), caption, fold)


def group_layout(grouped: Grouped) -> tuple[dict, dict[str, pd.Series]]:
    """(layout of the first row that has one, per series the channels its last cut kept by group).

    Channels are means over members. Empty without a layout; cuts of another network are left out.
    """
    cuts = [row for one in grouped for row in one.of_kind("cut")]
    layout: dict = next((row["layout"] for row in cuts if row.get("layout")), {})
    names = list(layout.get("groups", ()))
    kept = {}
    for one in grouped:
        last = {}
        for row in one.of_kind("cut"):
            if set(row.get("kept", ())) == set(names):
                last[member_of(row)] = row["kept"]
        if last and names:
            table = pd.DataFrame(last, dtype=float)
            kept[one.label] = table.mean(axis=1)[names]
    return layout, kept


def group_figure(layout: dict, kept: Mapping[str, pd.Series] | None = None) -> Figure:
    """A row per group, with a marker on every layer that has a part in it.

    layout: of `groups.layout`. kept: by label, channels left by group, drawn as bars beside the
        rows.
    """
    kernels = draw.short_paths(layout["kernels"], 40)
    rows = list(layout["groups"].values())
    bars = list((kept or {}).items())[:SHOWN]
    count = len(rows)
    small, height = (8, 0.21) if count <= 30 else (6.5, 0.15)
    figure = Figure(figsize=(10, height * count + 2.2), layout="constrained")
    widths = [8] + [1.5] * len(bars)
    axes, *beside = figure.subplots(
        1, len(widths), sharey=True, width_ratios=widths, squeeze=False
    )[0]
    draw_marks(axes, [row["marks"] for row in rows], min(1.0, 60 / len(kernels)))
    names = []
    for name, row in zip(draw.short_paths(list(layout["groups"])), rows):
        names.append(draw.literal(f"{name} ({row['size']:,})"))
    axes.set_yticks(range(count), names, fontsize=small)
    axes.set_ylim(count - 0.5, -0.5)
    shown = range(0, len(kernels), math.ceil(len(kernels) / 80))
    texts = [draw.literal(kernels[i]) for i in shown]
    size = 7 if len(kernels) <= 60 else 5.8
    axes.set_xticks(shown, texts, rotation=90, fontsize=size)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("layers, in order of use")
    draw_heading(axes, "groups of channels (size)")
    sizes = np.array([row["size"] for row in rows])
    for panel, (label, left) in zip(beside, bars):
        draw_heading(panel, f"{label}: kept" if len(bars) > 1 else "kept")
        draw_bars(panel, left.to_numpy(), sizes, small)
    used = {role for row in rows for role in row["marks"]}
    keys: list[Line2D] = []
    for role, (text, style) in ROLES.items():
        if role in used:
            keys.insert(0, draw.key(text, linestyle="none", **style))
    draw.legend(figure, keys)
    return figure


def draw_heading(axes: Axes, text: str) -> None:
    """Writes what a panel without a frame shows."""
    axes.spines[:].set_visible(False)
    axes.set_title(draw.literal(text, 24), loc="left", fontsize=8, color=draw.MUTED)


def draw_marks(axes: Axes, marks: list[dict[str, list[float]]], shrink: float) -> None:
    """Draws, per group, the layers by the role that they have in it, and a line through them."""
    for y, places in enumerate(marks):
        paint = draw.color(y % COLORS)
        every = list(itertools.chain(*places.values()))
        axes.plot([min(every), max(every)], [y, y], color=paint, lw=0.9, alpha=0.55)
        for role, (_, style) in ROLES.items():
            own = places.get(role, [])
            sized = {**style, "ms": shrink * style["ms"]}
            axes.plot(own, [y] * len(own), color=paint, ls="none", **sized)


def draw_bars(axes: Axes, left: np.ndarray, sizes: np.ndarray, fontsize: float) -> None:
    """Draws the share of every group that is left, and the number."""
    rows = range(len(sizes))
    colors = [draw.color(y % COLORS) for y in rows]
    axes.barh(rows, 1, height=0.62, color=draw.GRID)
    axes.barh(rows, left / sizes, height=0.62, color=colors)
    for y in rows:
        axes.text(1.08, y, f"{left[y]:.4g}", fontsize=fontsize, va="center")
    axes.set_xlim(0, 1.6)
    axes.grid(visible=False)
    axes.tick_params(labelleft=False, labelbottom=False)


def channels(grouped: Grouped) -> Section | None:
    """Heat maps of what every group keeps, cut by cut."""
    rounds = {one.label: channel_rounds(one) for one in grouped}
    shown = {label: table for label, table in rounds.items() if table.size}
    if not shown:
        return None
    caption = (
        "Share of each group's channels that is kept, in percent, by the share removed from the "
        "network."
    )
    return Section("Channels by group", draw.heat_maps(shown, "channels"), caption)


def channel_rounds(one: Series, most: int = 12) -> pd.DataFrame:
    """Share of each group's channels that is gone [groups, shares removed], mean over members."""
    gone: dict[float, list[pd.Series]] = {}
    for row in one.of_kind("cut"):
        if row.get("sizes"):
            sizes = pd.Series(row["sizes"], dtype=float)
            kept = pd.Series({**row["sizes"], **row["kept"]}, dtype=float)
            _, removed = series.removal(row) or ("", number(row["ratio"]))
            gone.setdefault(round(removed, 4), []).append(1 - kept / sizes)
    means = {removed: pd.DataFrame(gone[removed]).mean() for removed in sorted(gone)}
    count = len(means)
    few = np.linspace(0, count - 1, min(most, count))
    return pd.DataFrame(means).iloc[:, few.round().astype(int)]


# ------------------------------------------------------------------------------- compact networks

SIZES = {  # column to (field, factor)
    "parameters": ("parameters", 1),
    "MFLOPs per image": ("flops", 1e-6),
    "KiB": ("bytes", 1 / 1024),
}
ABOUT = {"accuracy|%": "{accuracy:.2%}"}
SPEED = {
    "time|ms": "{milliseconds[compact]:.3g}|of {milliseconds[dense]:.3g}",
    "speed": "{verdict}: {speedup:.2f} times the speed ({speedup_low:.2f}–{speedup_high:.2f}; "
    "batch {batch_size}, {device})",
}


def compact(grouped: Grouped) -> Section | None:
    """Networks without their removed channels: accuracy, sizes and, in words, whether they are
    faster.
    """
    rows = [(one.label, row) for one in grouped for row in one.of_kind("compact")]
    if not rows:
        return None
    heads = ["network", *headings([*ABOUT, *SIZES, *SPEED])]
    lines = [compact_line(label, row) for label, row in rows[:MOST_LINES]]
    note = "Compact, of dense. Time: median of whole batches, in alternation."
    differences = series.numbers([row for _, row in rows], "difference")
    worst = differences["difference"].max()
    if not math.isnan(worst):
        note += f" Logits of both differ by at most {worst:.2g} of the largest."
    note += only_first(MOST_LINES, len(rows), "")
    warnings = []
    for label, row in rows:
        if row.get("warning"):
            warnings.append(f"{label}: {row['warning']}.")
    table = Table(heads, lines, (0, len(heads) - 1), note, tuple(warnings[:MOST_LINES]))
    return Section("Compact network", tables=[table])


def compact_line(label: str, row: dict) -> Cells:
    """One network of the table."""
    seed = f"seed {row['seed']}" if "seed" in row else ""
    visit = f"visit {row['visit']}" if row.get("visit", 1) > 1 else ""
    cells: Cells = [joined(label, seed, visit), *filled(ABOUT, row)]
    for field, factor in SIZES.values():
        dense = factor * number(row.get(field))
        small = factor * number(row.get(f"{field}_compact"))
        text = ""
        if dense > 0:
            text = f"of {amount(dense)}, {small / dense:.1%}"
        cells.append(Cell(amount(small), text))
    time, speed = filled(SPEED, row)
    return [*cells, time, speed if row.get("verdict") else "not measured"]
