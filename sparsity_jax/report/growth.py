"""Growing penalties: norms of what they push out and of what stays, their ratio, single groups."""

from collections.abc import Mapping

import pandas as pd

from sparsity_jax.report import draw
from sparsity_jax.report.rows import member_of, number, place_of
from sparsity_jax.report.sections import Shown, joined
from sparsity_jax.report.series import Grouped
from sparsity_jax.types import Rows

__all__ = ["KEPT", "PRUNED", "growth_groups", "growth_norms", "growth_ratio"]

KEPT = 0  # colours
PRUNED = 1
_FATES = ("stays", "goes")
_LAYERS = 4  # panels of single groups
_MOST = 6  # growths drawn in one figure


def _growths(grouped: Grouped) -> dict[str, Rows]:
    """Rows with the numbers of the layers of every growth, by its label; of members the first."""
    by_label: dict[str, Rows] = {}
    for one in grouped:
        rows = [row for row in one.of_kind("grow") if row.get("growth")]
        rows = [row for row in rows if member_of(row) == member_of(rows[0])]
        places = {place_of(row) for row in rows}
        for row in rows:
            stage, visit = place_of(row)
            label = one.label
            if len(places) > 1:
                label = f"{label}, {stage} {visit}"
            by_label.setdefault(label, []).append(row)
    return dict(list(by_label.items())[:_MOST])


def _layer_points(grouped: Grouped, at: str, fields: Mapping[str, int]) -> list[tuple]:
    """Points of every layer of every growth. fields: what is drawn by `at`, in which colour."""
    points = []
    for label, rows in _growths(grouped).items():
        for row in rows:
            for layer, numbers in row["growth"].items():
                x = numbers.get(at, row["step"])
                for field, color in fields.items():
                    points.append((label, color, layer, x, number(numbers.get(field))))
    return points


def growth_norms(grouped: Grouped) -> Shown:
    """Mean magnitude of kept and pruned weights against the penalty, one line per layer."""
    points = _layer_points(grouped, "reg_pruned", {"score_kept": KEPT, "score_pruned": PRUNED})
    caption = (
        "One line per layer: mean magnitude of the weights that stay and that go, by the penalty "
        "on the latter."
    )
    heading = "Norms under growing penalties"
    return _section(heading, caption, points, "penalty λ on what goes", "mean |w|")


def growth_ratio(grouped: Grouped) -> Shown:
    """Mean magnitude of the kept over that of the pruned weights, smoothed, against the step."""
    points = _layer_points(grouped, "step", {"ratio": KEPT})
    caption = "One line per layer: mean magnitude of what stays over that of what goes, smoothed."
    heading = "Separation under growing penalties"
    return _section(heading, caption, points, "step", "kept / pruned |w|")


def growth_groups(grouped: Grouped) -> Shown:
    """The norm of every group against the step, in the first layers: how they separate."""
    every = _growths(grouped)
    alone = len(every) == 1
    points = []
    for label, rows in every.items():
        scored = [row for row in rows if row.get("scores")]
        layers = list(scored[0]["scores"]) if scored else []
        for layer in layers[: _LAYERS if alone else 1]:
            panel = joined("" if alone else label, layer.removesuffix("/kernel"))
            colors = [KEPT if kept else PRUNED for kept in scored[-1]["keep"][layer]]
            for row in scored:
                for line, norm in enumerate(row["scores"][layer]):
                    points.append((panel, colors[line], line, row["step"], norm))
    caption = (
        "Mean magnitude of every filter, channel or coupled group: how penalties set those apart "
        "that go."
    )
    return _section("Norms of single groups", caption, points, "step", "mean |w|")


def _section(heading: str, caption: str, points: list[tuple], xlabel: str, ylabel: str) -> Shown:
    """Lines with a logarithmic axis, without values that it cannot show.

    points: (panel, color, line, x, y).
    """
    told = pd.DataFrame(points, columns=["panel", "color", "line", "x", "y"])
    told = told[told["y"] > 0]
    return draw.section(
        heading, caption, [told], _FATES, xlabel=xlabel, ylabel=ylabel, yscale="log"
    )
