"""Growing regularisation, from rows of `grow` stages: norms, their ratio, single groups."""

from collections.abc import Mapping, Sequence

import pandas as pd

from sparsity_jax.report import draw, series
from sparsity_jax.report.draw import Line
from sparsity_jax.report.sections import Section, joined
from sparsity_jax.report.series import Grouped, member_of, numbers

LABELS = ("stays", "goes")
KEPT, PRUNED = 0, 1  # colours
LAYERS = 4  # panels of single groups
MOST = 6  # growths drawn in one figure


def growths(grouped: Grouped) -> dict[str, list[dict]]:
    """Rows with the numbers of the layers of every growth, by its label; of members the first."""
    result = {}
    for one in grouped:
        rows = [row for row in one.of_kind("grow") if row.get("growth")]
        first = [row for row in rows if member_of(row) == member_of(rows[0])]
        visits = series.visits(first)
        for (stage, visit), own in visits.items():
            name = f"{stage} {visit}" if len(visits) > 1 else ""
            result[joined(one.label, name)] = own
    return dict(list(result.items())[:MOST])


def by_layer(rows: list[dict], at: str) -> list[pd.DataFrame]:
    """Numbers of every layer, a line per row, by one of them."""
    tables = []
    for layer in rows[0]["growth"]:
        told = [{"step": row["step"], **row["growth"].get(layer, {})} for row in rows]
        table = numbers(told, "step", "reg_pruned", "score_kept", "score_pruned", "ratio")
        tables.append(table.set_index(at))
    return tables


def growth_norms(grouped: Grouped) -> Section | None:
    """Mean magnitude of kept and pruned weights against the penalty, one line per layer."""
    panels: dict[str, list[Line]] = {}
    for label, rows in growths(grouped).items():
        panels[label] = []
        for table in by_layer(rows, "reg_pruned"):
            panels[label].append(Line(table[["score_kept"]], KEPT))
            panels[label].append(Line(table[["score_pruned"]], PRUNED))
    caption = (
        "One line per layer: mean magnitude of the weights that stay and that go, by the penalty "
        "on the latter."
    )
    heading = "Norms under growing penalties"
    return section(heading, panels, caption, "penalty λ on what goes", "mean |w|")


def growth_ratio(grouped: Grouped) -> Section | None:
    """Mean magnitude of the kept over that of the pruned weights, smoothed, against the step."""
    panels = {}
    for label, rows in growths(grouped).items():
        panels[label] = [Line(table[["ratio"]], KEPT) for table in by_layer(rows, "step")]
    caption = "One line per layer: mean magnitude of what stays over that of what goes, smoothed."
    heading = "Separation under growing penalties"
    return section(heading, panels, caption, "step", "kept / pruned |w|")


def growth_groups(grouped: Grouped) -> Section | None:
    """The norm of every group against the step, in the first layers: how they separate."""
    panels: dict[str, list[Line]] = {}
    every = growths(grouped)
    for label, rows in every.items():
        scored = [row for row in rows if row.get("scores")]
        layers = list(scored[0]["scores"]) if scored else []
        if len(every) > 1:
            del layers[1:]
        for layer in layers[:LAYERS]:
            steps = [row["step"] for row in scored]
            norms = pd.DataFrame([row["scores"][layer] for row in scored], steps, dtype=float)
            title = joined(label if len(every) > 1 else "", layer.removesuffix("/kernel"))
            panels[title] = []
            for i, kept in enumerate(scored[-1]["keep"][layer]):
                panels[title].append(Line(norms[[i]], KEPT if kept else PRUNED))
    caption = (
        "Mean magnitude of every filter, channel or coupled group: how penalties set those apart "
        "that go."
    )
    return section("Norms of single groups", panels, caption, "step", "")


def section(
    heading: str, panels: Mapping[str, Sequence[Line]], caption: str, xlabel: str, ylabel: str
) -> Section | None:
    """Panels of lines with a logarithmic axis, without values that it cannot show."""
    positive = {}
    for title, lines in panels.items():
        positive[title] = [line._replace(values=line.values[line.values > 0]) for line in lines]
    figure, axes = draw.lines(positive, LABELS, xlabel=xlabel, ylabel=ylabel)
    for panel in axes.values():
        panel.set_yscale("log")
    return Section(heading, figure, caption) if axes else None
