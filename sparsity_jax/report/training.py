"""What training left behind: its course, the magnitudes of the weights, and the search of SFW-Init."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from sparsity_jax.report import draw, sections, series
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import Series


def training(grouped: list[Series]) -> Section | None:
    """Loss and accuracy against the epoch; train and test share a panel unless there are many series."""
    tables = {}
    for index, one in enumerate(grouped):
        rows = series.trained_rows(one)
        for split in ("train", "test"):
            for field in ("loss", "accuracy"):
                table = series.by_member(rows, "epoch", f"{split}_{field}").dropna(how="all")
                if table.size:
                    tables.setdefault(field, {}).setdefault(split, {})[index] = table
    apart = len(grouped) > draw.MANY
    views = []
    for field, splits in tables.items():
        if apart and len(splits) > 1:
            views += [(f"{split.capitalize()} {field}", field, {split: own}) for split, own in splits.items()]
        else:
            views.append((field.capitalize(), field, splits))
    if not views:
        return None
    figure, axes = draw.panels(len(views))
    for panel, (title, field, splits) in zip(axes, views):
        draw_splits(panel, splits, fine=apart)
        draw.label(panel, title, "epoch")
        draw.counts(panel.xaxis)
        draw.scale(field, panel)
    shown = {index for _, _, splits in views for own in splits.values() for index in own}
    keys = [draw.key(grouped[i].label, i) for i in sorted(shown)]
    draw.legend(figure, keys + draw.variant_keys(["train", "test"]))
    return Section("Training", figure, "Loss and accuracy during training.")


def draw_splits(axes: Axes, splits: dict[str, dict[int, pd.DataFrame]], *, fine: bool) -> None:
    """Draws one line per series and split; the first series on top."""
    for split, tables in splits.items():
        for index, table in reversed(tables.items()):
            draw.band(axes, table, index, dash=int(split == "test"), fine=fine)


def sfw_init(grouped: list[Series]) -> Section | None:
    """Loss before and after the one SFW step that SFW-Init differentiates, at the last visit."""
    shown = {}
    for index, one in enumerate(grouped):
        rows = [row for row in series.last_visit(one.of_kind("sfw_init")) if "iteration" in row]
        if rows:
            shown[index] = rows
    if not shown:
        return None
    figure, (axes,) = draw.panels(1)
    for index, rows in shown.items():
        for dash, field in enumerate(("loss_after", "loss_before")):
            draw.band(axes, series.by_member(rows, "iteration", field), index, dash=dash)
    draw.label(axes, "", "iteration", "loss")
    draw.counts(axes.xaxis)
    draw.loss_scale(axes)
    keys = [draw.key(grouped[i].label, i) for i in shown]
    draw.legend(figure, keys + draw.variant_keys(["after the step", "before the step"]))
    caption = "Loss on the batch before and after the SFW step whose result SFW-Init minimises."
    return Section("SFW-Init", figure, caption + series.seen_again(grouped, "sfw_init"))


# -------------------------------------------------------------------------------------------- magnitudes


def magnitudes(grouped: list[Series]) -> Section | None:
    """Share of the weights per bin of log10 |w| at the last visit, and a table of every visit."""
    every = {index: histograms(one) for index, one in enumerate(grouped)}
    known = {index: own for index, own in every.items() if own}
    if not known:
        return None
    figure, (axes,) = draw.panels(1)
    for index, own in reversed(known.items()):
        shares = shares_by_bin(list(own.values())[-1])
        mean = shares.mean(axis=1)
        axes.step(mean.index, mean, where="post", color=draw.color(index), zorder=3 - index / 100)
        if len(known) <= 4:
            axes.fill_between(mean.index, mean, step="post", alpha=0.14, lw=0, color=draw.color(index))
    draw.label(axes, "", "magnitude |w|", "share of weights per bin")
    draw.from_zero(axes)
    draw.counts(axes.xaxis)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    draw.legend(figure, [draw.key(grouped[i].label, i) for i in known])
    caption = "Weight magnitudes; weights that are exactly zero are off the axis and in the table."
    if any(len(own) > 1 for own in known.values()):
        caption += " The figure shows the last visit of a stage, the table every one."
    return Section("Weight magnitudes", figure, caption, tables=[bins_table(grouped, known)])


def histograms(one: Series) -> dict[str, list[dict]]:
    """The last row of every member at each visit, on the bins of the first, by the visit's name."""
    rows = [row for row in one.of_kind("histogram") if row.get("counts")]
    visits = series.visits(rows)
    result = {}
    for (stage, visit), own in visits.items():
        name = f"{stage}, visit {visit}" if len(visits) > 1 else ""
        last = {series.member_of(row): row for row in own if row["edges"] == own[0]["edges"]}
        result[name] = list(last.values())
    return result


def total(row: dict) -> int:
    """Number of weights."""
    return max(sum(row["counts"]) + row.get("num_zero", 0), 1)


def shares_by_bin(rows: list[dict]) -> pd.DataFrame:
    """Share of all weights [edges, members]; the last bin once more at its right edge."""
    shares = {}
    for member, row in enumerate(rows):
        shares[member] = np.array([*row["counts"], row["counts"][-1]]) / total(row)
    return pd.DataFrame(shares, rows[0]["edges"])


def power(value: float) -> str:
    """A power of ten as text, e.g. 10⁻³."""
    return "10" + str(round(value)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def bins_table(grouped: list[Series], every: dict[int, dict[str, list[dict]]]) -> Table:
    """Number and share of the weights that are zero and above each of the published thresholds."""
    rows = [row for own in every.values() for visit in own.values() for row in visit]
    thresholds = next((row["threshold"] for row in rows if row.get("threshold")), [])
    table = Table(["weights with |w|", "exactly 0", *(f"> {value:g}" for value in thresholds)], [])
    for index, own in every.items():
        for name, visit in own.items():
            above = [row["count_above"] for row in visit if row.get("threshold") == thresholds]
            means = pd.DataFrame(above, columns=range(len(thresholds)), dtype=float).mean()
            weights = np.mean([total(row) for row in visit])
            counts = [np.mean([row.get("num_zero", 0) for row in visit]), *means]
            label = sections.name(grouped[index].label, name)
            table.rows.append([Cell(label, color=index), *(bin_cell(count, weights) for count in counts)])
    return table


def bin_cell(count: float, weights: float) -> Cell | str:
    """A number of weights and its share; "–" if it is not known."""
    return "–" if np.isnan(count) else Cell(f"{count:,.0f}", f"{100 * count / weights:.3g}%")
