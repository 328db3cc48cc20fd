"""Channels that were cut: their groups, what is left of each, and the compact network."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sparsity_jax.report import draw, series
from sparsity_jax.report.rows import number, removal
from sparsity_jax.report.sections import Section, Shown, amount, table
from sparsity_jax.report.series import Frame, Grouped, Series
from sparsity_jax.types import Fields

__all__ = ["channel_rounds", "channels", "compact", "group_figure", "groups"]

_MOST_CUTS = 12  # columns of a heat map
_ROLES = {  # of an array in a group of channels
    "producer": "makes the channels",
    "consumer": "reads them",
    "depthwise": "passes them on one by one",
    "other": "norm, bias",
}


def groups(grouped: Grouped) -> Shown:
    """The channel groups of the network whose cut comes first."""
    for one in grouped:
        for row in one.of_kind("cut"):
            layout = row.get("layout") or {}
            if layout.get("kernels"):
                count = len(layout["groups"])
                return Section(
                    "Channel groups",
                    group_figure(layout),
                    "Channels that only go together, a row each, and the layers that have a part "
                    "in them.",
                    fold=f"{count} groups" if count > 80 else "",
                )
    return None


def group_figure(layout: Fields) -> Figure:
    """A row per group, with a dot on every layer that has a part in it.

    layout: of `groups.layout`.
    """
    names = draw.short_paths(list(layout["groups"]))
    kernels = draw.short_paths(layout["kernels"], limit=40)
    ticks = []
    marks = []
    for y, (name, group) in enumerate(zip(names, layout["groups"].values())):
        ticks.append(f"{name} ({group['size']:,})")
        for color, role in enumerate(_ROLES):
            marks += [(color, y, x, y) for x in group["marks"].get(role, ())]
    points = pd.DataFrame(marks, columns=["color", "line", "x", "y"]).assign(panel="")
    figure = draw.chart([points], list(_ROLES.values()), xlabel="layers, by use")
    figure.set_figheight(0.18 * len(names) + 2.2)
    (axes,) = figure.axes
    axes.set_yticks(range(len(names)), ticks)
    axes.set_xticks(range(len(kernels)), kernels, rotation=90)
    axes.invert_yaxis()
    axes.tick_params(labelsize=min(7, 500 / len(kernels)))
    return figure


def channels(grouped: Grouped) -> Shown:
    """Heat maps of what every group keeps, cut by cut."""
    rounds = {one.label: channel_rounds(one) for one in grouped}
    shown = {label: shares for label, shares in rounds.items() if shares.size}
    if not shown:
        return None
    caption = "Share of each group's channels that is kept, by the share removed from the network."
    return Section("Channels by group", draw.heat_maps(shown, "channels"), caption)


def channel_rounds(one: Series) -> Frame:
    """Share of each group's channels that is gone [groups, shares removed], mean over members."""
    removed = []
    gone = []
    for row in one.of_kind("cut"):
        if row.get("sizes"):
            _, share = removal(row) or ("", number(row["ratio"]))
            sizes = pd.Series(row["sizes"], dtype=float)
            kept = pd.Series({**row["sizes"], **row["kept"]}, dtype=float)
            removed.append(round(share, 4))
            gone.append(1 - kept / sizes)
    means = pd.DataFrame(gone).groupby(np.array(removed, float)).mean()
    some = np.linspace(0, len(means) - 1, min(_MOST_CUTS, len(means)))
    return means.iloc[some.round().astype(int)].T


# Compact networks ---------------------------------------------------------------------------------

_COMPACT = {  # column to template
    "accuracy|%": "{accuracy:.2%}",
    "parameters|%": "{parameters_compact:,}|of {parameters:,}, {parameters_share:.1%}",
    "FLOPs of an image|%": "{flops_compact:,}|of {flops:,}, {flops_share:.1%}",
    "bytes|%": "{bytes_compact:,}|of {bytes:,}, {bytes_share:.1%}",
    "time|ms": "{milliseconds[compact]:.3g}|of {milliseconds[dense]:.3g}",
    "speed": "{verdict}: {speedup:.2f} times the speed|{speedup_low:.2f}–{speedup_high:.2f}; "
    "batch {batch_size}, {device}",
}


def compact(grouped: Grouped) -> Shown:
    """Networks without their removed channels: accuracy, sizes and, in words, whether they are
    faster.
    """
    told = series.frame(grouped, "compact", fields=["difference"])
    lines = []
    note = "Compact, of dense. Time: median of whole batches, in alternation."
    for line in told.to_dict("records"):
        row = dict(line["row"])
        for field in ("parameters", "flops", "bytes"):
            compact = number(row.get(f"{field}_compact"))
            whole = number(row.get(field))
            row[f"{field}_share"] = compact / whole
        name = series.network_name(grouped[line["series"]], line["member"])
        if told["visit"].nunique() > 1:
            name += f", visit {line['visit']}"
        lines.append((name, row))
        if row.get("warning"):
            note += f" {name}: {row['warning']}."
    worst = amount(told["difference"].max())
    note += f" Logits of both differ by at most {worst} of the largest."
    return Section("Compact network", tables=[table("network", _COMPACT, lines, note=note)])
