"""What training left behind: its course, the magnitudes of the weights, the search of SFW-Init."""

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

from sparsity_jax.report import draw, series
from sparsity_jax.report.draw import Line
from sparsity_jax.report.sections import Cell, Cells, Section, Table, joined
from sparsity_jax.report.series import Grouped, Series, by_member

SPLITS = ("train", "test")


def training(grouped: Grouped) -> Section | None:
    """Loss and accuracy against the epoch, on train and test data."""
    rows_of = list(map(series.trained_rows, grouped))
    panels: dict[str, list[Line]] = {"Loss": [], "Accuracy": []}
    for title, lines in panels.items():
        for dash, split in enumerate(SPLITS):
            for index, rows in enumerate(rows_of):
                field = f"{split}_{title.lower()}"
                table = by_member(rows, "epoch", field)
                lines.append(Line(table, index, dash))
    figure, axes = draw.lines(panels, series.labels(grouped), SPLITS, xlabel="epoch")
    for title, panel in axes.items():
        draw.counts(panel.xaxis)
        draw.scale(title.lower(), panel)
    caption = "Loss and accuracy during training."
    return Section("Training", figure, caption) if axes else None


def sfw_init(grouped: Grouped) -> Section | None:
    """Loss before and after the one SFW step that SFW-Init differentiates, at the last visit."""
    lines = []
    for index, one in enumerate(grouped):
        rows = series.last_visit(one.of_kind("sfw_init"))
        for dash, field in enumerate(("loss_after", "loss_before")):
            table = by_member(rows, "iteration", field)
            lines.append(Line(table, index, dash))
    variants = ("after the step", "before the step")
    labels = series.labels(grouped)
    panels = {"": lines}
    figure, axes = draw.lines(panels, labels, variants, xlabel="iteration", ylabel="loss")
    if not axes:
        return None
    draw.counts(axes[""].xaxis)
    draw.loss_scale(axes[""])
    caption = "Loss on the batch before and after the SFW step whose result SFW-Init minimises."
    caption += series.seen_again(grouped, "sfw_init")
    return Section("SFW-Init", figure, caption)


# ------------------------------------------------------------------------------------- magnitudes


def magnitudes(grouped: Grouped) -> Section | None:
    """Share of the weights per bin of log10 |w| at the last visit, and a table of every visit."""
    every = {index: histograms(one) for index, one in enumerate(grouped)}
    known = {index: visits for index, visits in every.items() if visits}
    if not known:
        return None
    figure, (axes,) = draw.panels(1)
    for index, visits in reversed(known.items()):
        *_, last = visits.values()
        share = share_by_bin(last)
        paint = draw.color(index)
        axes.step(share.index, share, where="post", color=paint)
        if len(known) <= 4:
            axes.fill_between(share.index, share, step="post", alpha=0.14, lw=0, color=paint)
    draw.label(axes, "", "magnitude |w|", "share of weights per bin")
    draw.from_zero(axes)
    draw.counts(axes.xaxis)
    axes.xaxis.set_major_formatter(FuncFormatter(power))
    labels = {index: grouped[index].label for index in known}
    draw.legend(figure, draw.keys(labels))
    caption = "Weight magnitudes; weights that are exactly zero are off the axis and in the table."
    if any(len(visits) > 1 for visits in known.values()):
        caption += " The figure shows the last visit of a stage, the table every one."
    return Section("Weight magnitudes", figure, caption, tables=[bins_table(grouped, known)])


def histograms(one: Series) -> dict[str, list[dict]]:
    """The last row of every member at each visit, on the bins of the first, by the visit's name."""
    rows = [row for row in one.of_kind("histogram") if row.get("counts")]
    visits = series.visits(rows)
    result = {}
    for (stage, visit), rows in visits.items():
        last = {}
        for row in rows:
            if row["edges"] == rows[0]["edges"]:
                last[series.member_of(row)] = row
        name = f"{stage}, visit {visit}" if len(visits) > 1 else ""
        result[name] = list(last.values())
    return result


def total(row: dict) -> int:
    """Number of weights."""
    count = sum(row["counts"]) + row.get("num_zero", 0)
    return max(count, 1)


def share_by_bin(rows: list[dict]) -> pd.Series:
    """Share of all weights by left edge, mean over rows; the last bin again at its right edge."""
    shares = []
    for row in rows:
        counts = np.array(row["counts"])
        shares.append(counts / total(row))
    mean = np.mean(shares, axis=0)
    return pd.Series([*mean, mean[-1]], rows[0]["edges"])


def power(value: float, _: int) -> str:
    """A power of ten as text, e.g. 10⁻³."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + str(round(value)).translate(digits)


def bins_table(grouped: Grouped, every: dict[int, dict[str, list[dict]]]) -> Table:
    """Number and share of the weights that are zero and above each of the published thresholds."""
    visits = []
    for index, named in every.items():
        for name, rows in named.items():
            visits.append((Cell(joined(grouped[index].label, name), color=index), rows))
    known = [rows[0]["threshold"] for _, rows in visits if rows[0].get("threshold")]
    thresholds = known[0] if known else []
    heads = ["weights with |w|", "exactly 0"]
    heads += [f"> {value:g}" for value in thresholds]
    lines = []
    for label, rows in visits:
        lines.append([label, *bin_cells(rows, thresholds)])
    return Table(heads, lines)


def bin_cells(rows: list[dict], thresholds: list[float]) -> Cells:
    """Mean numbers of weights and their shares; "–" where they are not known."""
    weights = np.mean([total(row) for row in rows])
    counts = []
    for row in rows:
        above = row["count_above"] if row.get("threshold") == thresholds else []
        counts.append([row.get("num_zero", 0), *above])
    columns = range(1 + len(thresholds))
    means = pd.DataFrame(counts, columns=columns, dtype=float).mean()
    cells: Cells = []
    for count in means:
        if np.isnan(count):
            cells.append("–")
            continue
        share = 100 * count / weights
        cells.append(Cell(f"{count:,.0f}", f"{share:.3g}%"))
    return cells
