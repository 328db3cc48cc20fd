"""Curves of accuracy and loss under pruning, and what they removed from every layer."""

import numpy as np
import pandas as pd

from sparsity_jax.report import draw, series, summary
from sparsity_jax.report.rows import NEAR, number
from sparsity_jax.report.sections import Cell, Section, Shown, joined, table
from sparsity_jax.report.series import Frame, Grouped

__all__ = ["accuracy", "accuracy_train", "layers", "loss", "sizes", "zeros"]

_LAYER_STOPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # ratios shown layer by layer
_ZOOM = 0.9  # where the second panel begins
_BANDS = "Bands: ± one standard deviation over networks."


def sizes(grouped: Grouped) -> Shown:
    """Accuracy of trained networks against the share that was removed from them before."""
    told = series.frame(grouped, *series.TRAINING, fields=("test_accuracy",)).dropna()
    what = []
    share = []
    accuracy = []
    for row in told["row"]:
        network = row["network"]
        removed = network["removed"] or ("", 0.0)
        known = network.get("pruned" if network["removed"] else "dense")
        what.append(removed[0])
        share.append(removed[1])
        accuracy.append(number(known))
    told = told.assign(what=what, removed=share, accuracy=accuracy)
    last = told.drop_duplicates(["series", "member", "what", "removed"], keep="last")
    lines = []
    for name in sorted(set(what) - {""}):
        points = last[last["what"].isin(["", name])]
        panel = f"{name.capitalize()} removed"
        lines.append(draw.points(points, "removed", "accuracy", panel))
    return draw.section(
        "Accuracy by size",
        f"Test accuracy at the end of the training after each removal. {_BANDS}",
        lines,
        series.labels(grouped),
        xlabel=draw.SHARE,
        ylabel="accuracy",
    )


def accuracy(grouped: Grouped) -> Shown:
    """Accuracy against the pruning ratio, and the sentence that it amounts to."""
    curves = series.best_known_curves(grouped)
    sentence = summary.finding(summary.summarize(grouped))
    return _section(grouped, curves, "accuracy", "Accuracy under pruning", sentence)


def loss(grouped: Grouped) -> Shown:
    """Loss against the pruning ratio."""
    curves = series.best_known_curves(grouped)
    caption = "Mean loss per example by ratio."
    return _section(grouped, curves, "loss", "Loss under pruning", caption)


def accuracy_train(grouped: Grouped) -> Shown:
    """Accuracy on training data, where it is known on test data too."""
    if series.curves(grouped).empty:
        return None
    curves = series.curves(grouped, split="train")
    heading = "Accuracy under pruning, training data"
    return _section(grouped, curves, "accuracy", heading, "As above.")


def _section(grouped: Grouped, curves: Frame, field: str, heading: str, caption: str) -> Shown:
    """All ratios and those above ZOOM once more; None without numbers."""
    every = draw.points(curves, "removed", field, "All ratios", curves["dash"])
    far = every["x"] >= _ZOOM - NEAR
    above = every[far].assign(panel=f"Above {_ZOOM:.0%}")
    panels = [every]
    if above["x"].nunique() > 1:
        panels.append(above)
    variants = curves.sort_values("dash")["variant"].unique()
    return draw.section(
        heading,
        f"{caption} {_BANDS}".strip(),
        panels,
        series.labels(grouped),
        variants,
        xlabel=draw.REMOVED,
        ylabel=field,
    )


# Layers and channels ------------------------------------------------------------------------------


def layers(grouped: Grouped) -> Shown:
    """Heat maps of what every layer keeps."""
    maps = {}
    curves = series.best_known_curves(grouped)
    for (index, variant), curve in curves.groupby(["series", "variant"]):
        of_layers = [row.get("layers") or {} for row in curve["row"]]
        shares = pd.DataFrame(of_layers, dtype=float)
        by_ratio = shares.groupby(curve["removed"].to_numpy()).mean()
        columns = {stop: series.at_ratio(by_ratio, stop) for stop in _LAYER_STOPS}
        known = pd.DataFrame(columns).dropna(axis="columns", how="all")
        if known.size:
            maps[joined(grouped[index].label, variant)] = known
    if not maps:
        return None
    caption = "Share of each layer's weights that is kept, by the share removed from the network."
    fold = f"{len(maps)} heat maps" if len(maps) > 6 else ""
    return Section("Sparsity by layer", draw.heat_maps(maps, "weights"), caption, fold)


_ZEROS = {  # column to template
    "weights removed|%": "{removed:.2%}",
    "channels removed|%": "{channels_removed:.2%}",
    "zeros|%": "{sparsity:.2%}|of all {sparsity_all:.2%}",
}


def zeros(grouped: Grouped) -> Shown:
    """Share of zeros at the usual ratios, and at every one of a structured selection."""
    curves = series.best_known_curves(grouped).dropna(subset="sparsity_all")
    wanted = curves["channels_removed"].notna()
    for stop in _LAYER_STOPS:
        distance = abs(curves["removed"] - stop)
        least = distance.groupby([curves["series"], curves["dash"]]).transform("min")
        wanted |= distance <= np.minimum(least + 1e-9, NEAR)
    fields = ["channels_removed", "sparsity", "sparsity_all"]
    points = curves[wanted].groupby(["series", "variant", "removed"])
    lines = []
    for row in points[fields].mean().reset_index().to_dict("records"):
        name = joined(grouped[row["series"]].label, row["variant"])
        lines.append((Cell(name, color=row["series"]), row))
    if not lines:
        return None
    note = (
        "Zeros in the arrays that may be pruned; of all: in all parameters of the network. A "
        "removed channel is zero with all its weights."
    )
    return Section("Zeros", tables=[table("network", _ZEROS, lines, note=note)])
