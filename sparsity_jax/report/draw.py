"""The look of all figures: matplotlib's own layout, and colours that the page can exchange."""

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from sparsity_jax.report.sections import Section, Shown
from sparsity_jax.report.series import Frame

__all__ = [
    "COLORS",
    "INK",
    "PALETTE",
    "REMOVED",
    "SHARE",
    "STYLE",
    "chart",
    "color",
    "files_of",
    "fit_accuracies",
    "heat_maps",
    "means",
    "percents",
    "points",
    "printable",
    "section",
    "short_paths",
]

# Okabe and Ito's colour-blind-safe hues (2008) without yellow and black, then six others.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#7b4bb7", "#7d8590", "#8c1d4f", "#8c8c1f", "#0b7f8a", "#8a5a2b"),
)
INK = "#1f2328"
_MUTED = "#656d77"
_GRID = "#dfe3e8"
COLORS = {  # by the variable of the page's CSS, which has others for dark screens
    "--ink": INK,
    "--muted": _MUTED,
    "--line": _GRID,
    **{f"--c{index}": color for index, color in enumerate(PALETTE)},
}
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_IDENTIFIER = re.compile(r' id="|href="#|url\(#')  # what stands before one in SVG
_DASHES = ("-", "--", ":", "-.")
REMOVED = "weights removed"  # an axis of shares
SHARE = "share removed"  # another one
_CLASS = "series-"  # in SVG: of what is drawn of one colour, by its index
_WIDTH = 10.0  # inches
_PHONE = 4.2  # inches
_CHARACTERS = 38  # of a line of a legend that is as wide as a phone
_TITLE = 28  # characters of a line of the title of a panel
_LEAST_SPAN = 0.005  # of an axis of accuracies
_KEY_HEIGHT = 0.2  # inches of an entry of a legend
_MOST_CELLS = 100  # of a heat map whose shares are written into it
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so PNGs are the same everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}


# Text ---------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` without the characters that XML lacks."""
    return _NO_XML.sub("\ufffd", text)


def _literal(text: str, *, limit: int = 60, width: int = 60) -> str:
    """`text` for matplotlib: no mathtext, no hidden label, not long, in lines of `width`."""
    text = " ".join(printable(text).split())
    if len(text) > limit:
        text = f"{text[: limit - 1]}…"
    if text.startswith("_"):
        text = f"\u200b{text}"
    return textwrap.fill(text, width).replace("$", r"\$")


def short_paths(paths: Sequence[str], *, limit: int = 34) -> list[str]:
    """Paths without the first parts that all share; long ones lose their beginning."""
    split = [path.removesuffix("/kernel").split("/") for path in paths]
    while all(len(parts) > 1 for parts in split):
        firsts = {parts[0] for parts in split}
        if len(firsts) != 1:
            break
        split = [parts[1:] for parts in split]
    names = []
    for parts in split:
        name = "/".join(parts)
        if len(name) > limit:
            name = f"…{name[1 - limit :]}"
        names.append(_literal(name))
    return names


# Lines --------------------------------------------------------------------------------------------


def section(heading: str, caption: str, lines: Sequence[Frame], *names: Any, **texts: str) -> Shown:
    """A section with a `chart`; None without any number to draw."""
    figure = chart(lines, *names, **texts)
    if figure.axes:
        return Section(heading, figure, caption)
    return None


def points(told: Frame, x: str, y: str, panel: str = "", dash: Any = 0) -> Frame:
    """Two columns of a frame as points of a `chart`, in the colours of their series."""
    points = told[["member"]].assign(panel=panel, color=told["series"], dash=dash)
    return points.assign(x=told[x], y=told[y])


def means(shown: Frame) -> Frame:
    """The means over members of points, with one deviation to either side, but not below the least:
    losses stay above 0. Of two points of a member at the same place the later one counts.
    """
    place = ["panel", "color", "dash", "x"]
    last = shown.drop_duplicates([*place, "member"], keep="last").dropna(subset=["y"])
    values = last.groupby(place, sort=False)["y"]
    table = values.agg(y="mean", std="std", least="min").reset_index()
    low = table["y"] - table["std"]
    low = low.clip(lower=table["least"])
    high = table["y"] + table["std"]
    return table.assign(low=low, high=high)


def chart(
    lines: Sequence[Frame],
    colors: Sequence[str],
    dashes: Sequence[str] = (),
    *,
    xlabel: str,
    ylabel: str = "",
    yscale: str = "linear",
) -> Figure:
    """A figure of lines, one panel per title; without any number, without panels.

    lines: points [panel, color, dash, x, y], of which those of one `line` are connected. Several
    `member`s are averaged, see `means`. colors, dashes: what those that are drawn stand for. The
    label of an Axes is its title.
    """
    if not lines:
        return Figure()
    told = pd.concat(lines)
    if "member" in told:
        told = means(told)
    told = pd.DataFrame({"dash": 0, "line": 0, "low": math.nan, "high": math.nan, **told})
    told = told.dropna(subset=["x", "y"])
    titles = told["panel"].unique()
    figure, axes = _panels(len(titles))
    for title, panel in zip(titles, axes):
        inside = told[told["panel"] == title]
        for (hue, dash, _), line in inside.groupby(["color", "dash", "line"], sort=False):
            _draw_line(panel, line.sort_values("x", kind="stable"), hue, dash)
        panel.set_title(_literal(title, width=_TITLE), loc="left")
        panel.set(label=title, xlabel=xlabel, ylabel=ylabel, yscale=yscale)
        _scale(panel, ylabel or title)
    if axes:
        hues = sorted(told["color"].unique())
        keys = [_key(colors[hue], color(hue), name=f"{_CLASS}{hue}") for hue in hues]
        if any(dashes):
            keys += [
                _key(text, _MUTED, style) for text, style in zip(dashes, itertools.cycle(_DASHES))
            ]
        is_long = any(len(str(key.get_label())) > 24 for key in keys)
        _legend(figure, keys, columns=2 if is_long else 4)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, one or two in a row."""
    columns = max(1, min(2, count))
    rows = math.ceil(count / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(_WIDTH, 3.8 * rows), layout=layout)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    return figure, axes


def color(index: int) -> str:
    """The colour of a series."""
    return PALETTE[index % len(PALETTE)]


def _draw_line(axes: Axes, line: Frame, hue: int, dash: int) -> None:
    """Draws one line, with dots, and its band; the first colour lies on top."""
    paint: Any = dict(color=color(hue), zorder=3 - hue / 100, gid=f"{_CLASS}{hue}")
    every = len(line) // 20 + 1
    style = _DASHES[dash % len(_DASHES)]
    x = line["x"]
    axes.plot(x, line["y"], style, marker=".", markevery=every, **paint)
    if line["low"].notna().any():
        axes.fill_between(x, line["low"], line["high"], alpha=0.15, lw=0, **paint)


def _scale(axes: Axes, what: str) -> None:
    """Percent on axes of shares, a logarithm for losses of more than a decade and a half."""
    if axes.get_xlabel() in (REMOVED, SHARE):
        percents(axes.xaxis)
    what = what.lower().split(", ")[-1]
    if what == "accuracy":
        percents(axes.yaxis)
        fit_accuracies(axes, *axes.dataLim.intervaly)
    if what == "loss":
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        if 0 < 30 * values.min() < values.max():
            axes.set_yscale("log")


def fit_accuracies(axes: Axes, low: float, high: float) -> None:
    """Shows accuracies from `low` to `high`, and no less than _LEAST_SPAN."""
    middle = (low + high) / 2
    reach = 0.55 * max(high - low, _LEAST_SPAN)
    axes.set_ylim(middle - reach, middle + reach)


def percents(axis: Axis) -> None:
    """Shows fractions in percent."""
    axis.set_major_formatter(PercentFormatter(1.0))


def _key(text: str, color: str, dash: str = "-", *, name: str | None = None) -> Line2D:
    """An entry of a legend. name: that of what it stands for, in SVG."""
    return Line2D([], [], color=color, ls=dash, label=_literal(text, width=_CHARACTERS), gid=name)


def _legend(figure: Figure, keys: Sequence[Line2D], columns: int) -> None:
    """The only legend of a figure, written above all axes, with room for its rows."""
    for earlier in list(figure.legends):
        earlier.remove()
    legend = figure.legend(handles=keys, loc="outside upper left", ncols=columns)
    for key, shown, text in zip(keys, legend.legend_handles, legend.get_texts()):
        assert shown is not None
        shown.set(gid=key.get_gid(), label=key.get_label())
        text.set_gid(key.get_gid())
    lines = sum(1 + str(key.get_label()).count("\n") for key in keys)
    rows = math.ceil(lines / columns)
    figure.set_figheight(figure.get_figheight() + _KEY_HEIGHT * rows)


# Heat maps ----------------------------------------------------------------------------------------


def heat_maps(maps: Mapping[str, Frame], what: str) -> Figure:
    """Layer against ratio: the share of `what` kept, on a logarithmic colour scale.

    maps: by label, shares removed [paths, ratios].
    """
    figure, axes = _panels(len(maps))
    most = max(map(len, maps.values()))
    rows = math.ceil(len(maps) / 2)
    height = 0.16 * most + 1
    figure.set_figheight(height * rows + 0.6)
    palette = matplotlib.colormaps["cividis"].with_extremes(under="#5a0f14")
    look: Any = dict(norm="log", cmap=palette, aspect="auto", interpolation="nearest")
    for panel, (name, table) in zip(axes, maps.items()):
        kept = 1 - table
        shown = kept.clip(1e-3, 1).mask(kept <= 0, 1e-9)  # a logarithm hides 0
        image = panel.imshow(shown, **look)
        image.set_clim(1e-3, 1)
        panel.set_title(_literal(name, width=_TITLE), loc="left")
        ratios = [f"{100 * ratio:.3g}%" for ratio in table.columns]
        panel.set_xticks(range(len(ratios)), ratios)
        panel.set_yticks(range(len(table)), short_paths(list(table.index), limit=24))
        panel.tick_params(labelsize=6.5)
        panel.grid(visible=False)
        if table.size <= _MOST_CELLS:
            _write_shares(panel, kept)
    place: Any = dict(location="bottom", shrink=0.3, extend="min", format="{x:.1%}")
    bar = figure.colorbar(image, ax=axes, **place)
    bar.set_label(f"{what} kept (red: none left)")
    return figure


def _write_shares(axes: Axes, kept: Frame) -> None:
    """Writes every share of a heat map into its cell, in percent."""
    centred: Any = dict(ha="center", va="center", fontsize=7)
    for (row, column), share in np.ndenumerate(kept.to_numpy()):
        if math.isfinite(share):
            ink = "#10131a" if share > 0.06 else "#f6f8fa"
            axes.text(column, row, f"{100 * share:.3g}", color=ink, **centred)


# Files --------------------------------------------------------------------------------------------


def files_of(name: str, figure: Figure) -> tuple[bytes, str]:
    """(PNG on white, HTML) of a figure; the same rows give the same bytes.

    The HTML has two SVGs: one of class `wide`, and one of class `narrow`, for phones, with the
    panels below each other. Their colours are the variables COLORS. Identifiers in them depend on
    `name` only; what a `chart` draws of the colour 3 has the class `series-3`.
    """
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # an arm named in another script
        figure.set(dpi=150, facecolor="white")  # canvases draw once, `savefig` twice
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        layout = figure.get_layout_engine()
        figure.set_layout_engine("none")  # found once, it holds for both files
        wide = _svg(name, figure)
        figure.set_layout_engine(layout)
        _stack(figure)
        narrow = _svg(f"{name}_narrow", figure)
    return png.getvalue(), f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def _svg(name: str, figure: Figure) -> str:
    """A figure as SVG for inside a page."""
    svg = io.BytesIO()
    figure.set(dpi=100, facecolor="none")
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(svg, metadata=empty)
    text = svg.getvalue().decode()
    text = text[text.index("<svg") :].replace(f'id="{_CLASS}', f'class="{_CLASS}')
    text = _IDENTIFIER.sub(rf"\g<0>{name}_", text)
    for variable, value in COLORS.items():
        text = text.replace(f": {value}", f": var({variable})")
    return text


def _stack(figure: Figure) -> None:
    """Puts all panels below each other, as wide as a phone, under a legend of one column."""
    panels = [axes for axes in figure.axes if axes.get_subplotspec()]  # colour bars have none
    grid = GridSpec(len(panels), 1, figure=figure)
    for place, panel in enumerate(panels):
        panel.set_subplotspec(grid[place])
    height = 0.9 * figure.get_figheight()
    if len(panels) > 1:
        height *= len(panels) / math.ceil(len(panels) / 2)
    figure.set_size_inches(_PHONE, height)
    keys = [key for legend in figure.legends for key in legend.legend_handles]
    if keys:
        _legend(figure, [key for key in keys if isinstance(key, Line2D)], columns=1)
