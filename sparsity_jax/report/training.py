"""What training left behind: its course, the magnitudes of weights, the search of SFW-Init."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparsity_jax.report import draw, series
from sparsity_jax.report.sections import Cell, Shown, table
from sparsity_jax.report.series import Frame, Grouped

__all__ = ["magnitudes", "sfw_init", "training"]

_SPLITS = ("train", "test")
_FEW = 1e-3  # share of the weights in a bin that is not drawn at the ends
_FIRST = 0.1  # share of the epochs that may be below the axis of accuracies
_COUNTS = {"all": "{total:,}", "exactly 0|%": "{zero_share:.2%}|{num_zero:,}"}  # templates


def training(grouped: Grouped) -> Shown:
    """Loss and accuracy against the epoch, on train and test data."""
    fields = [f"{split}_{what}" for what in ("accuracy", "loss") for split in _SPLITS]
    told = series.frame(grouped, *series.TRAINING, fields=["epoch", *fields])
    told["epoch"] += _epochs_before(told)
    lines = []
    for field in fields:
        split, what = field.split("_")
        lines.append(draw.points(told, "epoch", field, what.capitalize(), _SPLITS.index(split)))
    names = series.labels(grouped)
    caption = "Accuracy and loss during training."
    section = draw.section("Training", caption, lines, names, _SPLITS, xlabel="epoch")
    if section and section.figure:
        _fit(section.figure.axes[0], told)
    return section


def _fit(axes: Axes, told: Frame) -> None:
    """Fits an axis of accuracies to all but the first epochs."""
    later = told[told["epoch"] > _FIRST * told["epoch"].max()]
    values = later[["train_accuracy", "test_accuracy"]].stack()
    if axes.get_title(loc="left") == "Accuracy" and len(values):
        draw.fit_accuracies(axes, values.min(), values.max())


def _epochs_before(told: Frame) -> np.ndarray:
    """Per line of a frame, the epochs of earlier stages and visits of its network."""
    network = ["series", "member"]
    place = [*network, *series.PLACE]
    ends = told.groupby(place, sort=False)["epoch"].max().fillna(0)
    before = ends.groupby(level=network, sort=False).cumsum() - ends
    return told.join(before.rename("before"), on=place)["before"].to_numpy()


def sfw_init(grouped: Grouped) -> Shown:
    """Loss before and after the one SFW step that SFW-Init differentiates, at the last visit."""
    fields = ("loss_after", "loss_before")
    told = series.frame(grouped, "sfw_init", fields=["iteration", *fields])
    told = series.last_visits(told)
    lines = [draw.points(told, "iteration", field, dash=i) for i, field in enumerate(fields)]
    return draw.section(
        "SFW-Init",
        "Loss on the batch before and after the SFW step whose result SFW-Init minimises, at the "
        "last visit.",
        lines,
        series.labels(grouped),
        ("after the step", "before the step"),
        xlabel="iteration",
        ylabel="loss",
    )


def magnitudes(grouped: Grouped) -> Shown:
    """Share of the weights per bin of log10 |w| at the last visit, and a table of every visit."""
    told = series.frame(grouped, "histogram")
    last = series.last_visits(told).index
    lines = []
    bins = []
    for index, line in told.iterrows():
        row = line["row"]
        label = series.network_name(grouped[line["series"]], line["member"])
        counts = np.array(row.get("counts", []))
        num_zero = row.get("num_zero", 0)
        total = max(counts.sum() + num_zero, 1)
        name = f"{label}, {line['stage']}, visit {line['visit']}"
        numbers = dict(total=total, num_zero=num_zero, zero_share=num_zero / total)
        lines.append((Cell(name, color=line["series"]), numbers))
        if index in last:
            edges = np.array(row.get("edges", []))
            middles = (edges[1:] + edges[:-1]) / 2
            own = pd.DataFrame({"x": middles, "y": counts / total})
            own = own.assign(series=line["series"], member=line["member"])
            bins.append(draw.points(own, "x", "y"))
    if bins:
        points = pd.concat(bins)
        many = points.loc[points["y"] > _FEW, "x"]
        bins = [points[points["x"].between(many.min(), many.max())]]
    section = draw.section(
        "Weight magnitudes",
        "Weight magnitudes at the last visit; those that are exactly zero are in the table.",
        bins,
        series.labels(grouped),
        xlabel="log10 of the magnitude |w|",
        ylabel="share of weights per bin",
    )
    return section and section._replace(tables=[table("weights", _COUNTS, lines)])
