"""The look of all figures: matplotlib's own layout, and colours that the page can exchange."""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Okabe and Ito's colour-blind-safe hues (2008) without yellow and black, then six others.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#7b4bb7", "#7d8590", "#8c1d4f", "#8c8c1f", "#0b7f8a", "#8a5a2b"),
)
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
INK, MUTED, GRID = "#1f2328", "#656d77", "#dfe3e8"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
Style = dict[str, Any]
MANY = 6  # more series than these are drawn finely
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so PNGs are the same everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
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


class Line(NamedTuple):
    """A line through the means of values [points, members], with a band of one deviation."""

    values: pd.DataFrame
    color: int
    dash: int = 0

    def above(self, start: float) -> "Line":
        """The part of the line from a point on."""
        return self._replace(values=self.values[self.values.index >= start])


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, one or two in a row."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(10, 3.8 * rows), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])


def lines(
    drawn: Mapping[str, Sequence[Line]],
    labels: Sequence[str],
    variants: Sequence[str] = (),
    *,
    xlabel: str,
    ylabel: str = "",
    markers: bool = False,
) -> tuple[Figure | None, dict[str, Axes]]:
    """A figure of lines, one panel per title, and its axes by title; none without any number.

    labels: of the colours, of which those that are drawn are explained; variants: of the dashes.
    """
    known = {}
    for title, members in drawn.items():
        shown = [line for line in members if line.values.notna().any(axis=None)]
        if shown:
            known[title] = shown
    if not known:
        return None, {}
    figure, axes = panels(len(known))
    used: set[int] = set()
    for panel, (title, members) in zip(axes, known.items()):
        for line in members:
            band(panel, line, fine=len(labels) > MANY, markers=markers)
            used.add(line.color)
        label(panel, title, xlabel, ylabel)
    explained = {index: labels[index] for index in sorted(used)}
    entries = keys(explained, variants)
    for index, entry in zip(explained if markers else (), entries):
        entry.set(marker=marker(index), markersize=4.5)
    legend(figure, entries)
    return figure, dict(zip(known, axes))


def band(axes: Axes, line: Line, *, fine: bool, markers: bool) -> None:
    """Draws one line and its band."""
    table = line.values
    mean = table.mean(axis=1).dropna()
    deviation = table.std(axis=1).fillna(0.0).reindex(mean.index)
    low = np.maximum(mean - deviation, table.min(axis=1).reindex(mean.index))  # above 0 if all are
    paint: Style = {
        "color": color(line.color),
        "zorder": 3 - line.color / 100,
    }  # the first lies on top
    style: Style = {"ls": dashed(line.dash), "lw": 1.3 if fine else 1.8}
    if markers:
        every = max(1, len(table) // 20)
        style |= {"marker": marker(line.color), "ms": 3.6, "markevery": every}
    axes.plot(mean.index, mean, **style, **paint)
    if deviation.any():
        alpha = 0.1 if fine else 0.18
        axes.fill_between(mean.index, low, mean + deviation, alpha=alpha, lw=0, **paint)


def label(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    """Writes beside the axes what they show."""
    axes.set_title(literal(title), loc="left")
    axes.set_xlabel(literal(xlabel))
    axes.set_ylabel(literal(ylabel))


def printable(text: str) -> str:
    """`text` without the characters that XML lacks."""
    return NO_XML.sub("\ufffd", text)


def literal(text: str, limit: int = 60) -> str:
    """`text` for matplotlib: no mathtext, no hidden label, and not long."""
    text = " ".join(printable(text).split())
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def color(index: int) -> str:
    """The colour of a series."""
    return PALETTE[index % len(PALETTE)]


def marker(index: int) -> str:
    """The marker of a series."""
    return MARKERS[index % len(MARKERS)]


def dashed(index: int) -> str | tuple:
    """The line style of a variant."""
    return DASHES[index % len(DASHES)]


def keys(labels: Mapping[int, str], variants: Sequence[str] = (), **style: Any) -> list[Line2D]:
    """Entries of a legend: labels by colour, then variants in grey, by their dashes."""
    entries = [key(text, color=color(index), **style) for index, text in labels.items()]
    if any(variants):
        dashes = map(dashed, range(len(variants)))
        entries += [key(text, ls=dash, lw=1.4) for text, dash in zip(variants, dashes)]
    return entries


def key(text: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=literal(text), **{"color": MUTED, **style})


def legend(figure: Figure, entries: Sequence[Line2D]) -> None:
    """Writes the legend above all axes, in as many columns as fit, and makes room for its rows."""
    if not entries:
        return
    longest = max(len(str(entry.get_label())) for entry in entries)
    columns = max(1, min(len(entries), int(10 / (0.62 + 0.078 * longest))))
    rows = math.ceil(len(entries) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(handles=entries, loc="outside upper left", ncols=columns)


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
    if field == "loss":
        loss_scale(*panels)
        return
    for axes in panels:
        from_zero(axes)


def values_of(*panels: Axes) -> np.ndarray:
    """All that the lines of the panels show."""
    shown = [line.get_ydata() for axes in panels for line in axes.lines]
    return np.concatenate(shown or [[1.0]])


def from_zero(axes: Axes) -> None:
    """Fractions on the y axis start at 0 where they come near it."""
    percents(axes.yaxis)
    values = values_of(axes)
    if values.min() < 0.6:
        axes.set_ylim(0, min(1.03, 1.08 * values.max()) or 1)


def loss_scale(*panels: Axes) -> None:
    """Losses over more than a decade and a half get a logarithmic axis."""
    values = values_of(*panels)
    if values.min() <= 0 or values.max() / values.min() <= 30:
        return
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def short_paths(paths: Sequence[str], limit: int = 34) -> list[str]:
    """Paths without the first and last parts that all share; long ones lose their beginning."""
    split = [path.split("/") for path in paths]
    if all(parts[-1] == "kernel" for parts in split) and min(map(len, split)) > 1:
        split = [parts[:-1] for parts in split]
    while len(split) > 1 and min(map(len, split)) > 1 and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    joined = ["/".join(parts) for parts in split]
    return [name if len(name) <= limit else "…" + name[1 - limit :] for name in joined]


def heat_maps(maps: Mapping[str, pd.DataFrame], what: str) -> Figure:
    """Layer against ratio: the share of `what` kept, on a logarithmic colour scale.

    maps: by label, shares removed [paths, ratios].
    """
    paths = list(dict.fromkeys(path for table in maps.values() for path in table.index))
    small = len(paths) > 30
    columns = max(2, min(len(maps), 5))
    rows = math.ceil(len(maps) / columns)
    height = 0.3 if len(paths) <= 12 else 0.145 if small else 0.2
    size = max(height * len(paths), 0.4) + 0.7
    figure = Figure(figsize=(10, rows * size + 0.6), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, (name, table) in zip(every, maps.items()):
        kept = (1 - table.reindex(paths)).clip(0, 1)
        image = heat_map(axes, kept)
        axes.set_title(literal(name, 100 // columns), loc="left")
        axes.set_xticks(range(table.shape[1]), [f"{100 * ratio:.3g}%" for ratio in table.columns])
        axes.set_yticks(range(len(paths)), [literal(path) for path in short_paths(paths)])
        axes.tick_params(axis="y", labelsize=6.5 if small else 8)
        axes.tick_params(axis="x", labelsize=7.5 if columns < 4 else 5.5)
        if rows == 1 and not small and columns * table.shape[1] <= 26:
            write_shares(axes, kept)
    for unused in every[len(maps) :]:
        unused.remove()
    used = list(every[: len(maps)])
    place: Style = dict(location="bottom", shrink=0.3, aspect=30, extend="min", anchor=(0, 0))
    bar = figure.colorbar(image, ax=used, **place)
    bar.set_ticks([1e-3, 1e-2, 1e-1, 1.0], labels=["0.1%", "1%", "10%", "100%"])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(f"{what} kept (red: none left)", color=MUTED, fontsize=8)
    return figure


def heat_map(axes: Axes, kept: pd.DataFrame) -> Any:
    """Draws the shares that are kept; those of 0 in red."""
    palette = matplotlib.colormaps["cividis"].with_extremes(under="#5a0f14")
    shown = np.maximum(kept, 1e-3).where(kept > 0, kept + 1e-9)
    style: Style = dict(cmap=palette, aspect="auto", interpolation="nearest")
    image = axes.imshow(shown, norm="log", **style)
    image.set_clim(1e-3, 1.0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    return image


def write_shares(axes: Axes, kept: pd.DataFrame) -> None:
    """Writes every share of a heat map into its cell, in percent."""
    for (row, column), value in np.ndenumerate(kept.to_numpy()):
        if math.isfinite(value):
            ink = "#10131a" if value > 0.06 else "#f6f8fa"
            text = f"{100 * value:.2g}" if value < 0.995 else "100"
            axes.text(column, row, text, color=ink, fontsize=7, ha="center", va="center")


def files_of(name: str, figure: Figure) -> tuple[bytes, str]:
    """(PNG on white, inline SVG) of a figure; the same rows give the same bytes.

    The colours of the SVG are variables of the page's CSS (`--ink`, `--c0` ...). Identifiers in it
    depend on `name` only.
    """
    png, svg = io.BytesIO(), io.BytesIO()
    style = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # an arm named in another script
        figure.set(dpi=150, facecolor="white")  # canvases draw once, `savefig` twice
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        figure.set_layout_engine("none")  # found once, it holds for both files
        figure.set(dpi=100, facecolor="none")
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(svg, metadata=empty)
    text = svg.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\n?", "", text, flags=re.DOTALL)
    variables = {INK: "--ink", MUTED: "--muted", GRID: "--line"}
    variables |= {value: f"--c{i}" for i, value in enumerate(PALETTE)}
    for value, variable in variables.items():
        text = text.replace(f": {value}", f": var({variable})")
    return png.getvalue(), text
