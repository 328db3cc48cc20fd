"""Growing regularisation, from rows of `grow` stages: norms against penalty, their ratio, single
groups.
"""

import pandas as pd
from matplotlib.figure import Figure

from sparsity_jax.report import draw, sections, series
from sparsity_jax.report.sections import Section
from sparsity_jax.report.series import Grouped, member_of, numbers

KEPT, PRUNED = 0, 1  # colours
LAYERS = 4  # panels of single groups
MOST = 6  # growths drawn in one figure
Panels = dict[str, list[tuple[pd.Series, int]]]  # by title: lines and their colours


def growths(grouped: Grouped) -> dict[str, list[dict]]:
    """Rows with the numbers of the layers of every growth, by its label; of members the first."""
    result = {}
    for one in grouped:
        rows = [row for row in one.of_kind("grow") if row.get("growth")]
        first = [row for row in rows if member_of(row) == member_of(rows[0])]
        visits = series.visits(first)
        for (stage, visit), own in visits.items():
            name = f"{stage} {visit}" if len(visits) > 1 else ""
            result[sections.name(one.label, name)] = own
    return dict(list(result.items())[:MOST])


def by_layer(rows: list[dict]) -> list[pd.DataFrame]:
    """Numbers of every layer, a line per row, with those of the row itself."""
    tables = []
    for layer in rows[0]["growth"]:
        told = [{"step": row["step"], **row["growth"].get(layer, {})} for row in rows]
        tables.append(numbers(told, "step", "reg_pruned", "score_kept", "score_pruned", "ratio"))
    return tables


def growth_norms(grouped: Grouped) -> Section | None:
    """Mean magnitude of the kept and of the pruned weights against the penalty, one line per
    layer.
    """
    panels = {}
    for label, rows in growths(grouped).items():
        panels[label] = lines = []
        for table in by_layer(rows):
            norms = table.set_index("reg_pruned")
            lines.append((norms["score_kept"], KEPT))
            lines.append((norms["score_pruned"], PRUNED))
    figure = line_figure(panels, "penalty λ on what goes", "mean |w|")
    caption = (
        "One line per layer: mean magnitude of the weights that stay and that go, by the penalty "
        "on the latter."
    )
    return figure and Section("Norms under growing penalties", figure, caption)


def growth_ratio(grouped: Grouped) -> Section | None:
    """Mean magnitude of the kept over that of the pruned weights, smoothed, against the step."""
    panels = {}
    for label, rows in growths(grouped).items():
        panels[label] = [(table.set_index("step")["ratio"], KEPT) for table in by_layer(rows)]
    figure = line_figure(panels, "step", "kept / pruned |w|")
    caption = "One line per layer: mean magnitude of what stays over that of what goes, smoothed."
    return figure and Section("Separation under growing penalties", figure, caption)


def growth_groups(grouped: Grouped) -> Section | None:
    """The norm of every group against the step, in the first layers: how they separate."""
    panels = {}
    every = growths(grouped)
    alone = len(every) == 1
    for label, rows in every.items():
        scored = [row for row in rows if row.get("scores")]
        layers = list(scored[0]["scores"]) if scored else []
        for layer in layers[: LAYERS if alone else 1]:
            steps = [row["step"] for row in scored]
            norms = pd.DataFrame([row["scores"][layer] for row in scored], steps, dtype=float)
            colors = [KEPT if kept else PRUNED for kept in scored[-1]["keep"][layer]]
            title = sections.name("" if alone else label, layer.removesuffix("/kernel"))
            panels[title] = [(norms[i], color) for i, color in enumerate(colors)]
    figure = line_figure(panels, "step", "")
    caption = (
        "Mean magnitude of every filter, channel or coupled group: how penalties set those apart "
        "that go."
    )
    return figure and Section("Norms of single groups", figure, caption)


def line_figure(panels: Panels, xlabel: str, ylabel: str) -> Figure | None:
    """Panels of lines with a logarithmic axis, without values that it cannot show; None without
    lines.
    """
    shown = {}
    for title, lines in panels.items():
        for line, color in lines:
            positive = line[line > 0]
            if positive.size:
                shown.setdefault(title, []).append((positive, color))
    if not shown:
        return None
    figure, axes = draw.panels(len(shown))
    used = set()
    for panel, (title, lines) in zip(axes, shown.items()):
        for line, color in lines:
            panel.plot(line.index, line, color=draw.color(color), lw=1.4)
            used.add(color)
        panel.set_yscale("log")
        draw.label(panel, title, xlabel, ylabel)
    names = {KEPT: "stays", PRUNED: "goes"}
    draw.legend(figure, [draw.key(names[color], color) for color in sorted(used)])
    return figure
