"""What training left behind: its course, the magnitudes of weights, the search of SFW-Init, and
growing penalties: norms, their ratio, single groups.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from sparsity_jax.report import draw, series
from sparsity_jax.report.sections import Cell, Section, Shown, joined, table
from sparsity_jax.report.series import Frame, Grouped, Rows, member_of, numbers, place_of

SPLITS = ("train", "test")
KEPT, PRUNED = 0, 1  # colours
FATES = {KEPT: "stays", PRUNED: "goes"}
COUNTS = {"all": "{total:,}", "exactly 0|%": "{zero_share:.2%}|{num_zero:,}"}  # templates
LAYERS = 4  # panels of single groups
MOST = 6  # growths drawn in one figure


def training(grouped: Grouped) -> Shown:
    """Loss and accuracy against the epoch, on train and test data."""
    fields = [f"{split}_{field}" for field in ("loss", "accuracy") for split in SPLITS]
    told = series.frame(grouped, *series.TRAINING, fields=["epoch", *fields])
    told["epoch"] += epochs_before(told)
    lines = []
    for field in fields:
        split, title = field.split("_")
        dash = SPLITS.index(split)
        lines.append(draw.points(told, "epoch", field, title.capitalize(), dash))
    shown = draw.means(pd.concat(lines))
    figure, axes = draw.chart(shown, series.labels(grouped), SPLITS, xlabel="epoch")
    for title, panel in axes.items():
        draw.scale(title.lower(), panel)
    caption = "Loss and accuracy during training."
    return Section("Training", figure, caption) if axes else None


def epochs_before(told: Frame) -> np.ndarray:
    """Per line of a frame, the epochs of earlier stages and visits of its network."""
    network = ["series", "member"]
    place = [*network, "stage", "visit"]
    ends = told.groupby(place, sort=False)["epoch"].max().fillna(0)
    before = ends.groupby(level=network, sort=False).cumsum() - ends
    return told.join(before.rename("before"), on=place)["before"].to_numpy()


def sfw_init(grouped: Grouped) -> Shown:
    """Loss before and after the one SFW step that SFW-Init differentiates, at the last visit."""
    fields = ("loss_after", "loss_before")
    told = series.frame(grouped, "sfw_init", fields=["iteration", *fields])
    told = series.last_visits(told)
    lines = [draw.points(told, "iteration", field, dash=i) for i, field in enumerate(fields)]
    figure, axes = draw.chart(
        draw.means(pd.concat(lines)),
        series.labels(grouped),
        ("after the step", "before the step"),
        xlabel="iteration",
        ylabel="loss",
    )
    for panel in axes.values():
        draw.scale("loss", panel)
    caption = (
        "Loss on the batch before and after the SFW step whose result SFW-Init minimises, at the "
        "last visit."
    )
    return Section("SFW-Init", figure, caption) if axes else None


# ------------------------------------------------------------------------------------- magnitudes


def magnitudes(grouped: Grouped) -> Shown:
    """Share of the weights per bin of log10 |w| at the last visit, and a table of every visit."""
    told = series.frame(grouped, "histogram")
    told = told.loc[[bool(row.get("counts")) for row in told["row"]]]
    if told.empty:
        return None
    lines: list[tuple[Cell, dict]] = []
    for line in told.to_dict("records"):
        label = grouped[line["series"]].label
        name = f"{label}, {line['stage']}, visit {line['visit']}, network {line['member']}"
        row = {**line["row"], "total": total(line["row"])}
        row["zero_share"] = row.get("num_zero", 0) / row["total"]
        lines.append((Cell(name, color=line["series"]), row))
    bins = []
    for line in series.last_visits(told).to_dict("records"):
        edges, counts = np.array(line["row"]["edges"]), np.array(line["row"]["counts"])
        middles = (edges[1:] + edges[:-1]) / 2
        about = dict(series=line["series"], member=line["member"])
        bins.append(pd.DataFrame({**about, "x": middles, "y": counts / total(line["row"])}))
    figure, _ = draw.chart(
        draw.means(draw.points(pd.concat(bins), "x", "y")),
        series.labels(grouped),
        xlabel="log10 of the magnitude |w|",
        ylabel="share of weights per bin",
    )
    caption = "Weight magnitudes at the last visit; those that are exactly zero are in the table."
    return Section("Weight magnitudes", figure, caption, tables=[table("weights", COUNTS, lines)])


def total(row: dict) -> int:
    """Number of weights."""
    count = sum(row["counts"]) + row.get("num_zero", 0)
    return max(count, 1)


# ---------------------------------------------------------------------------- growing penalties


def growths(grouped: Grouped) -> dict[str, Rows]:
    """Rows with the numbers of the layers of every growth, by its label; of members the first."""
    visits: dict[str, Rows] = {}
    for one in grouped:
        rows = [row for row in one.of_kind("grow") if row.get("growth")]
        places = {place_of(row) for row in rows}
        for row in rows:
            if member_of(row) == member_of(rows[0]):
                stage, visit = place_of(row)
                name = f"{stage} {visit}" if len(places) > 1 else ""
                visits.setdefault(joined(one.label, name), []).append(row)
    return dict(list(visits.items())[:MOST])


def layer_lines(grouped: Grouped, at: str, fields: Mapping[str, int]) -> list[Frame]:
    """Points of every layer of every growth. fields: what is drawn by `at`, in which colour."""
    lines: list[Frame] = []
    for label, rows in growths(grouped).items():
        for layer in rows[0]["growth"]:
            told = [{"step": row["step"], **row["growth"].get(layer, {})} for row in rows]
            for field, color in fields.items():
                xy = numbers(told, at, field)
                xy.columns = ["x", "y"]
                lines.append(xy.assign(panel=label, color=color, line=len(lines)))
    return lines


def growth_norms(grouped: Grouped) -> Shown:
    """Mean magnitude of kept and pruned weights against the penalty, one line per layer."""
    lines = layer_lines(grouped, "reg_pruned", {"score_kept": KEPT, "score_pruned": PRUNED})
    caption = (
        "One line per layer: mean magnitude of the weights that stay and that go, by the penalty "
        "on the latter."
    )
    heading = "Norms under growing penalties"
    return growth_section(heading, lines, caption, "penalty λ on what goes", "mean |w|")


def growth_ratio(grouped: Grouped) -> Shown:
    """Mean magnitude of the kept over that of the pruned weights, smoothed, against the step."""
    lines = layer_lines(grouped, "step", {"ratio": KEPT})
    caption = "One line per layer: mean magnitude of what stays over that of what goes, smoothed."
    heading = "Separation under growing penalties"
    return growth_section(heading, lines, caption, "step", "kept / pruned |w|")


def growth_groups(grouped: Grouped) -> Shown:
    """The norm of every group against the step, in the first layers: how they separate."""
    lines = []
    every = growths(grouped)
    for label, rows in every.items():
        scored = [row for row in rows if row.get("scores")]
        layers = list(scored[0]["scores"]) if scored else []
        for layer in layers[: LAYERS if len(every) == 1 else 1]:
            title = joined(label if len(every) > 1 else "", layer.removesuffix("/kernel"))
            steps = [row["step"] for row in scored]
            norms = np.array([row["scores"][layer] for row in scored], float)
            for i, kept in enumerate(scored[-1]["keep"][layer]):
                own = pd.DataFrame(dict(panel=title, x=steps, y=norms[:, i], line=i))
                lines.append(own.assign(color=KEPT if kept else PRUNED))
    caption = (
        "Mean magnitude of every filter, channel or coupled group: how penalties set those apart "
        "that go."
    )
    return growth_section("Norms of single groups", lines, caption, "step", "mean |w|")


def growth_section(
    heading: str, lines: Sequence[Frame], caption: str, xlabel: str, ylabel: str
) -> Shown:
    """Lines with a logarithmic axis, without values that it cannot show."""
    if not lines:
        return None
    shown = pd.concat(lines)
    shown = shown[shown["y"] > 0]
    figure, axes = draw.chart(shown, FATES, xlabel=xlabel, ylabel=ylabel, yscale="log")
    return Section(heading, figure, caption) if axes else None
