"""Figures of growing regularisation, from rows of `grow` stages: norms against penalty, their ratio, single groups."""

import numpy as np

from sparsity_jax import figures

KEPT, PRUNED = 0, 1  # colours
LAYERS = 4  # panels of single groups


def logs(one: figures.Series) -> list[tuple[str, list[dict]]]:
    """(label, rows in order) of every growth of one network, with the numbers of its layers; of members the first."""
    rows = [row for row in one.rows if row.get("kind") == "grow" and row.get("growth")]
    rows = [row for row in rows if figures.member_of(row) == figures.member_of(rows[0])]
    visits = figures.visits(rows, "grow")
    several = len(visits) > 1
    return [(f"{one.label}, {name} {n}" if several else one.label, own) for (name, n), own in visits.items()]


def columns(rows: list[dict], layer: str, *fields: str) -> list[np.ndarray]:
    """Numbers of one layer over all rows, one array a field."""
    found = [row["growth"].get(layer, {}) for row in rows]
    return [np.array([figures.number(own.get(field)) for own in found]) for field in fields]


def line(x: np.ndarray, y: np.ndarray, color: int, **options) -> figures.Line | None:
    known = np.isfinite(x) & np.isfinite(y) & (y > 0)
    if not known.any():
        return None
    return figures.Line(x[known], y[known], y[known], y[known], color=color, **options)


def norm_panels(found: list[tuple[str, list[dict]]]) -> list[figures.Panel]:
    """Mean magnitude of what stays and of what goes against the penalty on what goes, one line a layer."""
    panels = []
    for label, rows in found:
        lines = []
        for layer in rows[0]["growth"]:
            penalty, kept, pruned = columns(rows, layer, "reg_pruned", "score_kept", "score_pruned")
            lines += [line(penalty, kept, KEPT), line(penalty, pruned, PRUNED)]
        lines = [one for one in lines if one is not None]
        if lines:
            panels.append(figures.Panel(label, "penalty λ on what goes", "mean |w|", lines, log="y"))
    return panels


def ratio_panels(found: list[tuple[str, list[dict]]]) -> list[figures.Panel]:
    """Mean magnitude of what stays over that of what goes, smoothed, against the step."""
    panels = []
    for label, rows in found:
        steps = np.array([figures.number(row.get("step")) for row in rows])
        lines = [line(steps, columns(rows, layer, "ratio")[0], KEPT) for layer in rows[0]["growth"]]
        lines = [one for one in lines if one is not None]
        if lines:
            panels.append(figures.Panel(label, "step", "kept / pruned |w|", lines, log="y", integers=True))
    return panels


def group_panels(found: list[tuple[str, list[dict]]]) -> list[figures.Panel]:
    """The norm of every group against the step, of the first networks' first layers: how they separate."""
    panels = []
    for label, rows in found:
        rows = [row for row in rows if row.get("scores")]
        for layer in list(rows[0]["scores"])[: LAYERS if len(found) == 1 else 1] if rows else ():
            values = np.array([row["scores"][layer] for row in rows], float)  # [rows, groups]
            steps = np.array([figures.number(row.get("step")) for row in rows])
            kept = rows[-1]["keep"][layer]
            lines = [line(steps, own, KEPT if stays else PRUNED) for own, stays in zip(values.T, kept)]
            short = layer.removesuffix("/kernel")
            title = short if len(found) == 1 else f"{label}, {short}"
            panels.append(figures.Panel(title, "step", "", [one for one in lines if one], log="y", integers=True))
    return panels
