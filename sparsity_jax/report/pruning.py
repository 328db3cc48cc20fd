"""Curves of accuracy and loss under pruning, and what they removed from every layer."""

import pandas as pd

from sparsity_jax.report import draw, series, summary
from sparsity_jax.report.sections import Cell, Section, Shown, joined, table
from sparsity_jax.report.series import NEAR, Frame, Grouped

LAYER_STOPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # ratios shown layer by layer
ZOOM = 0.9  # where the second panel begins


def accuracy(grouped: Grouped) -> Shown:
    """Accuracy against the pruning ratio, and the sentence that it amounts to."""
    curves = series.best_known_curves(grouped)
    caption = summary.finding(summary.summarize(grouped))
    return section(grouped, curves, "accuracy", "Accuracy under pruning", caption)


def loss(grouped: Grouped) -> Shown:
    """Loss against the pruning ratio."""
    caption = "Mean loss per example by ratio."
    return section(
        grouped, series.best_known_curves(grouped), "loss", "Loss under pruning", caption
    )


def accuracy_train(grouped: Grouped) -> Shown:
    """Accuracy on training data, where it is known on test data too."""
    if series.curves(grouped).empty:
        return None
    curves = series.curves(grouped, "train")
    heading = "Accuracy under pruning, training data"
    return section(grouped, curves, "accuracy", heading, "As above.")


def section(grouped: Grouped, curves: Frame, field: str, heading: str, caption: str) -> Shown:
    """All ratios and those above ZOOM once more; None without numbers."""
    every = draw.points(curves, "removed", field, "All ratios", curves["dash"])
    above = every[every["x"] >= ZOOM - NEAR].assign(panel=f"Above {ZOOM:.0%}")
    variants = curves.sort_values("dash")["variant"].unique()
    figure, axes = draw.chart(
        draw.means(pd.concat([every, above])),
        series.labels(grouped),
        variants,
        xlabel="weights removed",
        ylabel=field,
    )
    for panel in axes.values():
        draw.percents(panel.xaxis)
        draw.scale(field, panel)
    caption += " Bands: ± one standard deviation over networks."
    return Section(heading, figure, caption.strip()) if axes else None


# ------------------------------------------------------------------------------ layers, channels


def layers(grouped: Grouped) -> Shown:
    """Heat maps of what every layer keeps."""
    maps = {}
    for (index, variant), curve in series.best_known_curves(grouped).groupby(["series", "variant"]):
        shares = pd.DataFrame([row.get("layers") or {} for row in curve["row"]], dtype=float)
        by_ratio = shares.groupby(curve["removed"].to_numpy()).mean()
        near = {stop: series.at_ratio(by_ratio, stop) for stop in LAYER_STOPS}
        table = pd.DataFrame(near).dropna(axis="columns", how="all")
        if table.size:
            maps[joined(grouped[index].label, variant)] = table
    if not maps:
        return None
    caption = "Share of each layer's weights that is kept, by the share removed from the network."
    fold = f"{len(maps)} heat maps" if len(maps) > 6 else ""
    return Section("Sparsity by layer", draw.heat_maps(maps, "weights"), caption, fold)


ZEROS = {  # column to template
    "weights removed|%": "{removed:.2%}",
    "channels removed|%": "{channels_removed:.2%}",
    "zeros|%": "{sparsity:.2%}|of all {sparsity_all:.2%}",
}


def zeros(grouped: Grouped) -> Shown:
    """Share of zeros at the usual ratios, and at every one of a structured selection."""
    curves = series.best_known_curves(grouped).dropna(subset=["sparsity_all"])
    wanted = curves["channels_removed"].notna()
    for stop in LAYER_STOPS:
        wanted |= abs(curves["removed"] - stop) <= NEAR
    shown = curves[wanted]
    fields = ["channels_removed", "sparsity", "sparsity_all"]
    means = shown.groupby(["series", "variant", "removed"])[fields].mean().reset_index()
    lines = []
    for row in means.to_dict("records"):
        name = joined(grouped[row["series"]].label, row["variant"])
        lines.append((Cell(name, color=row["series"]), row))
    note = (
        "Zeros in the arrays that may be pruned; of all: in all parameters of the network. A "
        "removed channel is zero with all its weights."
    )
    tables = [table("network", ZEROS, lines, note)]
    return Section("Zeros", tables=tables) if lines else None
