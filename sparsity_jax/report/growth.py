"""Growing penalties: norms of what they push out and of what stays, their ratio, single groups."""

from collections.abc import Mapping, Sequence

import pandas as pd

from sparsity_jax.report import draw
from sparsity_jax.report.rows import member_of, number, place_of
from sparsity_jax.report.sections import Shown, joined
from sparsity_jax.report.series import Grouped
from sparsity_jax.types import Rows

__all__ = ["KEPT", "PRUNED", "growth_groups", "growth_norms", "growth_ratio"]

KEPT = 0  # colours
PRUNED = 1
_NAMED = len(draw.PALETTE)  # layers that have a colour of their own
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


def _layers(grouped: Grouped) -> list[str]:
    """The layers of all growths."""
    every = [row["growth"] for rows in _growths(grouped).values() for row in rows]
    return list(dict.fromkeys(layer for growth in every for layer in growth))


def _layer_section(
    heading: str,
    caption: str,
    grouped: Grouped,
    at: str,
    fields: Mapping[str, str],
    **texts: str,
) -> Shown:
    """Every layer of every growth: `fields`, and what they stand for, against the field `at`.

    Colours are those of the layers if there are no more than these, else those of the fields.
    """
    layers = _layers(grouped)
    are_named = len(layers) <= _NAMED
    points = []
    for label, rows in _growths(grouped).items():
        for row in rows:
            for layer, numbers in row["growth"].items():
                x = numbers.get(at, row["step"])
                for dash, field in enumerate(fields):
                    color = layers.index(layer) if are_named else dash
                    y = number(numbers.get(field))
                    points.append((label, color, dash, layer, x, y))
    names = list(fields.values())
    if not are_named:
        return _section(heading, caption, points, names, **texts)
    colors = draw.short_paths(layers)
    dashes = names if len(names) > 1 else ()
    return _section(heading, caption, points, colors, dashes, **texts)


def growth_norms(grouped: Grouped) -> Shown:
    """Mean magnitude of kept and pruned weights against the penalty, one line per layer."""
    return _layer_section(
        "Norms under growing penalties",
        "Per layer: mean magnitude of the weights that stay and that go, by the penalty on the "
        "latter.",
        grouped,
        "reg_pruned",
        {"score_kept": "stays", "score_pruned": "goes"},
        xlabel="penalty λ on what goes",
        ylabel="mean |w|",
    )


def growth_ratio(grouped: Grouped) -> Shown:
    """Mean magnitude of the kept over that of the pruned weights, smoothed, against the step."""
    return _layer_section(
        "Separation under growing penalties",
        "Per layer: mean magnitude of what stays over that of what goes, smoothed.",
        grouped,
        "step",
        {"ratio": "a layer"},
        xlabel="step",
        ylabel="kept / pruned |w|",
    )


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
                    points.append((panel, colors[line], 0, line, row["step"], norm))
    return _section(
        "Norms of single groups",
        "Mean magnitude of every filter, channel or coupled group: how penalties set those apart "
        "that go.",
        points,
        ("stays", "goes"),
        xlabel="step",
        ylabel="mean |w|",
    )


def _section(
    heading: str,
    caption: str,
    points: list[tuple],
    colors: Sequence[str],
    dashes: Sequence[str] = (),
    **texts: str,
) -> Shown:
    """Lines with a logarithmic axis, without values that it cannot show.

    points: (panel, color, dash, line, x, y).
    """
    told = pd.DataFrame(points, columns=["panel", "color", "dash", "line", "x", "y"])
    told = told[told["y"] > 0]
    return draw.section(heading, caption, [told], colors, dashes, yscale="log", **texts)
