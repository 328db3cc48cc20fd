"""The look of all figures: matplotlib's own layout, one style, and colours that the page can
exchange.
"""

import io
import math
import re
import warnings

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Okabe and Ito's colour-blind-safe hues (2008) without yellow and black, then six others.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#7b4bb7", "#7d8590", "#8c1d4f", "#8c8c1f", "#0b7f8a", "#8a5a2b"),
)
INK, MUTED, GRID = "#1f2328", "#656d77", "#dfe3e8"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
MANY = 6  # more series than these are drawn finely
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so PNGs are the same everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}


def panels(count: int, *, columns: int = 2, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, each `height` inches high, in rows of `columns`."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(10, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.remove()
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    return figure, list(axes[:count])


def label(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    """Writes beside the axes what they show."""
    axes.set_title(literal(title), loc="left")
    axes.set_xlabel(literal(xlabel))
    axes.set_ylabel(literal(ylabel))


def literal(text: str, limit: int = 60) -> str:
    """`text` for matplotlib: no mathtext, no hidden label, and not long."""
    text = " ".join(str(text).split())
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def color(index: int | None) -> str:
    """The colour of a series; ink without one."""
    return INK if index is None else PALETTE[index % len(PALETTE)]


def band(
    axes: Axes, table: pd.DataFrame, index: int, *, dash: int = 0, fine: bool = False, **style
) -> None:
    """A line through the means of `table` [points, members] with a band of one standard
    deviation.
    """
    mean = table.mean(axis=1).dropna()
    if mean.empty:
        return
    deviation = table.std(axis=1).fillna(0.0).reindex(mean.index)
    low = np.maximum(mean - deviation, table.min(axis=1).reindex(mean.index))  # above 0 if all are
    paint = {"color": color(index), "zorder": 3 - index / 100}  # the first series lies on top
    width = 1.3 if fine else 1.8
    axes.plot(mean.index, mean, linestyle=dashed(dash), lw=width, **paint, **style)
    if deviation.any():
        axes.fill_between(
            mean.index, low, mean + deviation, alpha=0.1 if fine else 0.18, lw=0, **paint
        )


def dashed(index: int) -> str | tuple:
    """Line style of a variant."""
    return DASHES[index % len(DASHES)]


def key(text: str, index: int | None = None, **style) -> Line2D:
    """An entry of a legend: a line, of variants in grey."""
    style = {"color": MUTED if index is None else color(index), **style}
    return Line2D([], [], label=literal(text), **style)


def variant_keys(names: list[str]) -> list[Line2D]:
    """An entry per dash; none where there is nothing to tell."""
    if not any(names):
        return []
    return [key(name, linestyle=dashed(i), lw=1.4) for i, name in enumerate(names)]


def legend(figure: Figure, keys: list[Line2D]) -> None:
    """Writes the legend above all axes, in as many columns as fit, and makes room for its rows."""
    longest = max((len(entry.get_label()) for entry in keys), default=0)
    columns = max(1, min(len(keys), int(10 / (0.62 + 0.078 * longest))))
    height = figure.get_figheight() + 0.2 * math.ceil(len(keys) / columns)
    figure.set_figheight(height)
    figure.legend(handles=keys, loc="outside upper left", ncols=columns)


def percents(*axis: Axis) -> None:
    """Shows fractions in percent."""
    for one in axis:
        one.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def counts(axis: Axis) -> None:
    """Shows whole numbers only."""
    axis.set_major_locator(MaxNLocator(8, integer=True))


def scale(field: str, *panels: Axes) -> None:
    """The y axis of accuracies or losses."""
    if field == "accuracy":
        from_zero(*panels)
    else:
        loss_scale(*panels)


def from_zero(*panels: Axes) -> None:
    """Fractions on the y axis start at 0 where they come near it."""
    for axes in panels:
        percents(axes.yaxis)
        values = np.concatenate([[1.0], *(line.get_ydata() for line in axes.lines)])
        if values.min() < 0.6:
            axes.set_ylim(0, min(1.03, values[1:].max() * 1.08) or 1)


def loss_scale(*panels: Axes) -> None:
    """Losses over more than a decade and a half get a logarithmic axis."""
    lines = [line.get_ydata() for axes in panels for line in axes.lines]
    values = np.concatenate(lines or [[1.0]])
    if values.min() <= 0 or values.max() / values.min() <= 30:
        return
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def short_paths(paths: list[str], limit: int = 34) -> list[str]:
    """Paths without the first and last parts that all share; long ones lose their beginning."""
    split = [path.split("/") for path in paths]
    while len(split) > 1 and min(map(len, split)) > 1 and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    while min(map(len, split)) > 1 and all(parts[-1] == "kernel" for parts in split):
        split = [parts[:-1] for parts in split]
    joined = ["/".join(parts) for parts in split]
    return [name if len(name) <= limit else "…" + name[1 - limit :] for name in joined]


def heat_maps(maps: list[tuple[str, pd.DataFrame]], what: str) -> Figure:
    """Layer against ratio: the share of `what` kept, on a logarithmic colour scale, one map per
    label.

    maps: (label, shares removed [paths, ratios]).
    """
    paths = list(dict.fromkeys(path for _, table in maps for path in table.index))
    columns = max(2, min(len(maps), 5))
    rows = math.ceil(len(maps) / columns)
    height = 0.3 if len(paths) <= 12 else 0.2 if len(paths) <= 30 else 0.145
    size = max(height * len(paths), 0.4) + 0.7
    figure = Figure(figsize=(10, rows * size + 0.6), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    few = len(paths) <= 30
    palette = matplotlib.colormaps["cividis"].with_extremes(under="#5a0f14")
    for axes, (name, table) in zip(every, maps):
        kept = (1 - table.reindex(paths)).clip(0, 1)
        image = axes.imshow(
            np.maximum(kept, 1e-3).where(kept > 0, kept + 1e-9),
            norm="log",
            cmap=palette,
            aspect="auto",
            interpolation="nearest",
        )
        image.set_clim(1e-3, 1.0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title(literal(name, 100 // columns), loc="left")
        axes.xaxis.tick_top()
        axes.set_xticks(range(table.shape[1]), [f"{100 * ratio:.3g}%" for ratio in table.columns])
        axes.set_yticks(range(len(paths)), [literal(path) for path in short_paths(paths)])
        axes.tick_params(axis="y", labelsize=8 if few else 6.5)
        axes.tick_params(axis="x", labelsize=7.5 if columns < 4 else 5.5)
        if few and columns * table.shape[1] <= 26 and rows == 1:
            write_shares(axes, kept)
    for unused in every[len(maps) :]:
        unused.remove()
    bar = figure.colorbar(
        image,
        ax=list(every[: len(maps)]),
        location="bottom",
        shrink=0.3,
        aspect=30,
        extend="min",
        anchor=(0, 0),
    )
    bar.set_ticks([1e-3, 1e-2, 1e-1, 1.0], labels=["0.1%", "1%", "10%", "100%"])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(f"{what} kept (red: none left)", color=MUTED, fontsize=8)
    return figure


def write_shares(axes: Axes, kept: pd.DataFrame) -> None:
    """Writes every share of a heat map into its cell, in percent."""
    for (row, column), value in np.ndenumerate(kept.to_numpy()):
        if math.isfinite(value):
            ink = "#10131a" if value > 0.06 else "#f6f8fa"
            text = f"{100 * value:.2g}" if value < 0.995 else "100"
            axes.text(column, row, text, color=ink, fontsize=7, ha="center", va="center")


def png(name: str, figure: Figure) -> bytes:
    """The figure as a PNG on white, without a date or a version: the same rows give the same
    bytes.
    """
    return save(name, figure, "png", dpi=150, facecolor="white", metadata={"Software": None})


def svg(name: str, figure: Figure) -> str:
    """The figure as inline SVG whose colours are variables of the page's CSS (`--ink`, `--c0`
    ...).
    """
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = save(name, figure, "svg", transparent=True, metadata=empty).decode()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->\n?", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    variables = {INK: "--ink", MUTED: "--muted", GRID: "--line"}
    variables |= {value: f"--c{i}" for i, value in enumerate(PALETTE)}
    for value, variable in variables.items():
        text = text.replace(f": {value}", f": var({variable})")
    return text


def save(name: str, figure: Figure, kind: str, **options) -> bytes:
    """The bytes of a file of that kind. Identifiers in it depend on `name` only."""
    style = {**STYLE, "svg.hashsalt": name}
    buffer = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # an arm named in another script
        figure.savefig(buffer, format=kind, **options)
    figure.set_layout_engine("none")  # found once, it holds for all kinds of files
    return buffer.getvalue()
