"""Growing regularisation, from rows of `grow` stages: norms against penalty, their ratio, single groups."""

import pandas as pd
from matplotlib.figure import Figure

from sparsity_jax.report import draw, sections, series
from sparsity_jax.report.sections import Section
from sparsity_jax.report.series import Series

KEPT, PRUNED = 0, 1  # colours
LAYERS = 4  # panels of single groups
MOST = 6  # growths drawn in one figure


def growths(grouped: list[Series]) -> dict[str, list[dict]]:
    """Rows with the numbers of the layers of every growth, by its label; of members the first."""
    result = {}
    for one in grouped:
        rows = [row for row in one.of_kind("grow") if row.get("growth")]
        rows = [row for row in rows if series.member_of(row) == series.member_of(rows[0])]
        visits = series.visits(rows)
        for (stage, visit), own in visits.items():
            label = f"{one.label}, {stage} {visit}" if len(visits) > 1 else one.label
            result[label] = own
    return dict(list(result.items())[:MOST])


def layer_numbers(rows: list[dict], layer: str, *fields: str) -> pd.DataFrame:
    """Numbers of one layer, a line per row."""
    return series.numbers([row["growth"].get(layer, {}) for row in rows], *fields)


def growth_norms(grouped: list[Series]) -> Section | None:
    """Mean magnitude of the kept and of the pruned weights against the penalty, one line per layer."""
    panels = {}
    for label, rows in growths(grouped).items():
        lines = []
        for layer in rows[0]["growth"]:
            table = layer_numbers(rows, layer, "reg_pruned", "score_kept", "score_pruned")
            norms = table.set_index("reg_pruned")
            lines += [(norms["score_kept"], KEPT), (norms["score_pruned"], PRUNED)]
        panels[label] = lines
    figure = line_figure(panels, "penalty λ on what goes", "mean |w|")
    caption = "One line per layer: mean magnitude of the weights that stay and that go, by the penalty on the latter."
    return figure and Section("Norms under growing penalties", figure, caption)


def growth_ratio(grouped: list[Series]) -> Section | None:
    """Mean magnitude of the kept over that of the pruned weights, smoothed, against the step."""
    panels = {}
    for label, rows in growths(grouped).items():
        steps = series.numbers(rows, "step")["step"]
        ratios = [layer_numbers(rows, layer, "ratio")["ratio"] for layer in rows[0]["growth"]]
        panels[label] = [(ratio.set_axis(steps), KEPT) for ratio in ratios]
    figure = line_figure(panels, "step", "kept / pruned |w|")
    caption = "One line per layer: mean magnitude of what stays over that of what goes, smoothed."
    return figure and Section("Separation under growing penalties", figure, caption)


def growth_groups(grouped: list[Series]) -> Section | None:
    """The norm of every group against the step, in the first layers: how they separate."""
    every = growths(grouped)
    panels = {}
    for label, rows in every.items():
        scored = [row for row in rows if row.get("scores")]
        layers = list(scored[0]["scores"]) if scored else []
        for layer in layers[: LAYERS if len(every) == 1 else 1]:
            steps = [row["step"] for row in scored]
            norms = pd.DataFrame([row["scores"][layer] for row in scored], steps, dtype=float)
            colors = [KEPT if kept else PRUNED for kept in scored[-1]["keep"][layer]]
            title = sections.name("" if len(every) == 1 else label, layer.removesuffix("/kernel"))
            panels[title] = [(norms[i], color) for i, color in enumerate(colors)]
    figure = line_figure(panels, "step", "")
    caption = "Mean magnitude of every filter, channel or coupled group: how penalties set those apart that go."
    return figure and Section("Norms of single groups", figure, caption)


def line_figure(panels: dict[str, list[tuple[pd.Series, int]]], xlabel: str, ylabel: str) -> Figure | None:
    """Panels of lines with a logarithmic axis, without values that it cannot show; None without lines."""
    shown = {}
    for title, lines in panels.items():
        positive = [(line[line > 0], color) for line, color in lines]
        shown[title] = [(line, color) for line, color in positive if line.size]
    shown = {title: lines for title, lines in shown.items() if lines}
    if not shown:
        return None
    figure, axes = draw.panels(len(shown))
    fine = max(map(len, shown.values())) > 2 * draw.MANY
    for panel, (title, lines) in zip(axes, shown.items()):
        for line, color in lines:
            panel.plot(line.index, line, color=draw.color(color), lw=1.0 if fine else 1.5)
        panel.set_yscale("log")
        draw.label(panel, title, xlabel, ylabel)
    used = {color for lines in shown.values() for _, color in lines}
    names = {KEPT: "stays", PRUNED: "goes"}
    draw.legend(figure, [draw.key(names[color], color) for color in sorted(used)])
    return figure
