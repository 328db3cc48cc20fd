"""Channels that were cut: their groups, what is left of each, and the compact network."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity_jax.report import draw, sections, series
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import Grouped, Series, member_of, number

SHOWN = 3  # networks with bars beside the groups
COLORS = 8  # of groups, in turn
ROLES = {  # of an array in a group of channels: what it is called, and its marker
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
    caption += sections.first(SHOWN, len(kept), " networks")
    count = len(layout["groups"])
    fold = f"{count} groups" if count > 80 else ""
    return Section("Channel groups", group_figure(layout, kept), caption, fold)


def group_layout(grouped: Grouped) -> tuple[dict, dict[str, pd.Series]]:
    """(layout of the first row that has one, by series the channels that its last cut kept of each
    group).

    Channels are means over members. Empty without a layout; cuts of another network are left out.
    """
    layout = {}
    for one in grouped:
        for row in one.of_kind("cut"):
            layout = layout or row.get("layout") or {}
    names = list(layout.get("groups", ()))
    kept = {}
    for one in grouped:
        last = {}
        for row in one.of_kind("cut"):
            if names and set(row.get("kept", ())) == set(names):
                last[member_of(row)] = row["kept"]
        if last:
            kept[one.label] = pd.DataFrame(last, dtype=float).mean(axis=1)[names]
    return layout, kept


def group_figure(layout: dict, kept: dict[str, pd.Series] | None = None) -> Figure:
    """A row per group, with a marker on every layer that has a part in it.

    layout: of `groups.layout`. kept: by label, channels left by group, drawn as bars beside the
        rows.
    """
    kernels = draw.short_paths(layout["kernels"], 40)
    rows = list(layout["groups"].values())
    bars = list((kept or {}).items())[:SHOWN]
    count = len(rows)
    small = 8 if count <= 30 else 6.5
    height = 0.21 if count <= 30 else 0.15
    figure = Figure(figsize=(10, height * count + 2.2), layout="constrained")
    ratios = [8] + [1.5] * len(bars)
    axes, *beside = figure.subplots(
        1, len(ratios), sharey=True, width_ratios=ratios, squeeze=False
    )[0]
    for y, row in enumerate(rows):
        draw_marks(axes, row["marks"], y, min(1.0, 60 / len(kernels)))
    names = []
    for name, row in zip(draw.short_paths(list(layout["groups"])), rows):
        names.append(draw.literal(f"{name} ({row['size']:,})"))
    axes.set_yticks(range(count), names, fontsize=small)
    axes.set_ylim(count - 0.5, -0.5)
    shown = range(0, len(kernels), math.ceil(len(kernels) / 80))
    texts = [draw.literal(kernels[i]) for i in shown]
    axes.set_xticks(shown, texts, rotation=90, fontsize=7 if len(kernels) <= 60 else 5.8)
    axes.grid(axis="y", visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layers, in order of use")
    axes.set_title("groups of channels (size)", loc="left", fontsize=8, color=draw.MUTED)
    sizes = np.array([row["size"] for row in rows])
    for panel, (label, left) in zip(beside, bars):
        text = f"{label}: kept" if len(bars) > 1 else "kept"
        panel.set_title(draw.literal(text, 24), loc="left", fontsize=8, color=draw.MUTED)
        draw_bars(panel, left.to_numpy(), sizes, small)
    used = {role for row in rows for role in row["marks"]}
    keys = [
        draw.key(text, linestyle="none", **style)
        for role, (text, style) in ROLES.items()
        if role in used
    ]
    draw.legend(figure, keys[::-1])
    return figure


def draw_marks(axes: Axes, marks: dict[str, list[float]], y: int, shrink: float) -> None:
    """Draws the layers of one group and a line through them."""
    paint = draw.color(y % COLORS)
    places = [place for own in marks.values() for place in own]
    axes.plot([min(places), max(places)], [y, y], color=paint, lw=0.9, alpha=0.55)
    for role, (_, style) in ROLES.items():
        own = marks.get(role, [])
        style = {**style, "ms": shrink * style["ms"]}
        axes.plot(own, [y] * len(own), color=paint, ls="none", **style)


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
    axes.spines[:].set_visible(False)
    axes.tick_params(labelleft=False, labelbottom=False)


def channels(grouped: Grouped) -> Section | None:
    """Heat maps of what every group keeps, cut by cut."""
    rounds = [(one.label, channel_rounds(one)) for one in grouped]
    shown = [(label, table) for label, table in rounds if table.size]
    if not shown:
        return None
    caption = (
        "Share of each group's channels that is kept, in percent, by the share removed from the "
        "network."
    )
    return Section("Channels by group", draw.heat_maps(shown, "channels"), caption)


def channel_rounds(one: Series, most: int = 12) -> pd.DataFrame:
    """Share of each group's channels that is gone [groups, shares removed], mean over members."""
    gone = {}
    for row in one.of_kind("cut"):
        if row.get("sizes"):
            sizes = pd.Series(row["sizes"], dtype=float)
            kept = pd.Series({**row["sizes"], **row["kept"]}, dtype=float)
            _, removed = series.removal(row) or ("", number(row["ratio"]))
            gone.setdefault(round(removed, 4), []).append(1 - kept / sizes)
    means = {removed: pd.DataFrame(gone[removed]).mean() for removed in sorted(gone)}
    table = pd.DataFrame(means)
    count = table.shape[1]
    few = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    return table.iloc[:, few]


# ------------------------------------------------------------------------------------ compact
# networks

SIZES = {  # heading to (field, factor)
    "parameters": ("parameters", 1),
    "MFLOPs per image": ("flops", 1e-6),
    "KiB": ("bytes", 1 / 1024),
}
SPEED = (
    "{verdict}: {speedup:.2f} times the speed ({speedup_low:.2f}–{speedup_high:.2f}; batch "
    "{batch_size}, {device})"
)


def compact(grouped: Grouped) -> Section | None:
    """Networks without their removed channels: accuracy, sizes and, in plain words, whether they
    are faster.
    """
    rows = [(one.label, row) for one in grouped for row in one.of_kind("compact")]
    if not rows:
        return None
    heads = ["network", Cell("accuracy", "%"), *SIZES, Cell("time", "ms"), "speed"]
    lines = [compact_line(label, row) for label, row in rows[: sections.MOST]]
    note = "Compact, of dense. Time: median of whole batches, in alternation."
    worst = series.numbers([row for _, row in rows], "difference")["difference"].max()
    if not math.isnan(worst):
        note += f" Logits of both differ by at most {worst:.2g} of the largest."
    note += sections.first(sections.MOST, len(rows), "")
    warnings = [f"{label}: {row['warning']}." for label, row in rows if row.get("warning")]
    table = Table(heads, lines, (0, len(heads) - 1), note, tuple(warnings[: sections.MOST]))
    return Section("Compact network", tables=[table])


def compact_line(label: str, row: dict) -> list[Cell | str]:
    """One network of the table."""
    seed = f"seed {row['seed']}" if "seed" in row else ""
    visit = f"visit {row['visit']}" if row.get("visit", 1) > 1 else ""
    cells = [sections.name(label, seed, visit), sections.fill("{accuracy:.2%}", row)]
    for field, factor in SIZES.values():
        dense = factor * number(row.get(field))
        small = factor * number(row.get(f"{field}_compact"))
        text = f"of {sections.amount(dense)}, {small / dense:.1%}" if dense > 0 else ""
        cells.append(Cell(sections.amount(small), text))
    times = row.get("milliseconds")
    time = Cell(f"{times['compact']:.3g}", f"of {times['dense']:.3g}") if times else "–"
    speed = sections.fill(SPEED, row) if row.get("verdict") else "not measured"
    return [*cells, time, speed]
