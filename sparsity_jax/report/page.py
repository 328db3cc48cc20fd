"""Rows to `report.html`: which functions show which rows, and everything on the page besides."""

import json
import os
import pathlib
import re
from typing import Any

import jinja2
import matplotlib

from sparsity_jax.report import (
    channels,
    draw,
    files,
    growing,
    limit_figures,
    limit_numbers,
    pruning,
    runs,
    sections,
    series,
    summary,
    training,
)
from sparsity_jax.report.sections import Cell, Section, Table
from sparsity_jax.report.series import Series

DARK_PALETTE = (
    *("#4aa8e8", "#ff8a4c", "#2fc493", "#e29ac2", "#f0b13c", "#8fd0f5"),
    *("#b08ae8", "#a3abb5", "#e0669c", "#c9c94f", "#4fc3cf", "#c99463"),
)
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
CITATIONS = {  # a word of the config to the works it stands for
    "sfw": (
        "L. Miao, X. Luo, T. Chen, W. Chen, D. Liu, Z. Wang. Learning Pruning-Friendly Networks "
        "via Frank-Wolfe: One-Shot, Any-Sparsity, and No Retraining. ICLR 2022.",
        (
            "S. Pokutta, C. Spiegel, M. Zimmer. Deep Neural Network Training with Frank-Wolfe. "
            "2020. arXiv:2010.07243."
        ),
    ),
    "spectrum": (
        "Q. Zhang, R. Zhang, J. Sun, Y. Liu. How Sparse Can We Prune a Deep Network: "
        "A Geometric Viewpoint. 2023. arXiv:2306.05857.",
    ),
    "cut": (
        "E. S. Lubana, R. P. Dick. A Gradient Flow Framework for Analyzing Network Pruning. "
        "ICLR 2021. arXiv:2009.11839.",
    ),
    "grow": (
        (
            "H. Wang, C. Qin, Y. Zhang, Y. Fu. Neural Pruning via Growing Regularization. "
            "ICLR 2021. arXiv:2012.09243."
        ),
    ),
}


def pruned(grouped: list[Series]) -> Section | None:
    """Rows of stages that prune, or measure a pruned network, as they are."""
    kinds = ("prune", "remove", "oracle", "noise", "jacobian")
    told = lambda row: row.get("kind") in kinds or (row.get("kind") == "grow" and "layers" in row)
    return plain_section("Pruning steps", grouped, told)


FIGURES = {  # what shows rows, in the order of the page: the kinds of stages that it shows
    summary.summary: ("train", "curve"),
    limit_numbers.prediction: ("limit", "width"),
    channels.compact: ("compact",),
    limit_figures.limits: ("limit", "width", "path", "row_norms"),
    limit_figures.path: ("path",),
    limit_figures.crossing: ("width",),
    limit_figures.history: ("width",),
    limit_figures.spectrum: ("width", "spectrum"),
    limit_figures.row_norms: ("row_norms",),
    pruning.accuracy: ("curve",),
    pruning.loss: ("curve",),
    pruning.accuracy_train: ("curve",),
    training.training: ("train", "grow"),
    training.magnitudes: ("histogram",),
    pruning.layers: ("curve",),
    channels.groups: ("cut",),
    channels.channels: ("cut",),
    training.sfw_init: ("sfw_init",),
    growing.growth_norms: ("grow",),
    growing.growth_ratio: ("grow",),
    growing.growth_groups: ("grow",),
    pruning.channels_removed: ("curve",),
    pruned: ("prune", "remove", "grow", "oracle", "noise", "jacobian"),
}


def write(
    workdir: str | os.PathLike,
    config: dict,
    rows: list[dict],
    *,
    title: str | None,
    environment: dict | None,
) -> pathlib.Path:
    """Writes the page and its figures; see `report.write`."""
    workdir = pathlib.Path(workdir)
    if environment is not None:
        files.write_environment(workdir, environment)
    config, environment = files.plain(config), files.plain(environment or {})
    rows = [runs.complete(printable(files.plain(row)), config, environment) for row in rows]
    named = config.get("title")
    title = title or (named if isinstance(named, str) else "") or workdir.resolve().name
    with matplotlib.rc_context(draw.STYLE):
        shown = sections_of(rows)
        drawings = draw_all(workdir / "figures", shown)
    path = workdir / files.REPORT
    text = template().render(
        title=title,
        facts=facts(config, rows),
        rows=rows,
        sections=shown,
        drawings=drawings,
        trees={"settings": tree(config), "entries": tree(environment)},
        command=environment.get("command") or [],
        works=works(config),
        light=(draw.INK, draw.MUTED, draw.GRID, *draw.PALETTE),
        dark=("#e8ebef", "#9aa4b0", "#2f3641", *DARK_PALETTE),
    )
    files.write_atomic(path, text.encode(errors="replace"))
    return path


def printable(value: Any) -> Any:
    """Plain data without the characters that XML lacks."""
    if isinstance(value, str):
        return NO_XML.sub("\ufffd", value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return list(map(printable, value)) if isinstance(value, list) else value


def template() -> jinja2.Template:
    """The page, which escapes all that is filled in."""
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2")


def sections_of(rows: list[dict]) -> dict[str, Section]:
    """Sections by name: those of FIGURES that have rows, and tables of rows that none of them
    shows.
    """
    grouped = series.group(rows)
    kinds = list(dict.fromkeys(str(row.get("kind")) for row in rows))
    shown, seen = {}, set()
    for show, own in FIGURES.items():
        section = show(grouped) if set(own) & set(kinds) else None
        if section is not None:
            shown[show.__name__] = section
            seen |= set(own)
    for kind in kinds:
        if kind not in seen:
            told = lambda row, kind=kind: str(row.get("kind")) == kind
            shown[f"rows_{len(shown)}"] = plain_section(f"Rows of {kind}", grouped, told)
    return shown


def draw_all(folder: pathlib.Path, shown: dict[str, Section]) -> dict[str, str]:
    """Inline drawings by name; writes the PNGs and removes those of earlier reports."""
    drawings = {}
    for name, section in shown.items():
        if section.figure is not None:
            files.write_atomic(folder / f"{name}.png", draw.png(name, section.figure))
            drawings[name] = draw.svg(name, section.figure)
    for show in FIGURES:
        if show.__name__ not in drawings:
            (folder / f"{show.__name__}.png").unlink(missing_ok=True)
    return drawings


def plain_section(heading: str, grouped: list[Series], told) -> Section | None:
    """The rows of which `told` holds as they are: every field that is a number or a text."""
    rows = [(i, one.label, row) for i, one in enumerate(grouped) for row in one.rows if told(row)]
    simple = [
        {key: value for key, value in row.items() if isinstance(value, (str, int, float))}
        for _, _, row in rows
    ]
    columns = [
        key
        for key in dict.fromkeys(key for row in simple for key in row)
        if key not in ("kind", "arm")
    ]
    if not rows:
        return None
    lines = []
    for (i, label, _), row in zip(rows[: sections.MOST], simple):
        lines.append(
            [
                Cell(label, color=i),
                *(sections.setting(row[key]) if key in row else "–" for key in columns),
            ]
        )
    more = f"The first {sections.MOST} of {len(rows)} rows; {files.METRICS} has them all."
    note = more if len(rows) > sections.MOST else ""
    return Section(
        heading, tables=[Table(["network", *columns], lines, tuple(range(1 + len(columns))), note)]
    )


# ------------------------------------------------------------------------------ besides the
# sections


def facts(config: dict, rows: list[dict]) -> list[tuple[str, str, str]]:
    """(text before, fact, text after) about data, model, size and number of networks: what is
    known.
    """
    result = []
    for key in ("data", "model"):
        value = config.get(key)
        value = value.get("name") if isinstance(value, dict) else value
        if value:
            result.append(
                (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value), "")
            )
    for field, label in {"num_params": "parameters", "num_prunable": "prunable weights"}.items():
        count = series.numbers(rows, field)[field].max()
        if count > 0:
            result.append(("", f"{count:,.0f}", label))
    count = count_networks(rows)
    if count:
        result.append(("", str(count), "trained network" + "s" * (count > 1)))
    return result


def count_networks(rows: list[dict]) -> int:
    """Networks that were trained: a training that goes on from another one's weights makes no new
    one.
    """
    drawn = {}
    for row in rows:
        if row.get("kind") in series.TRAINING:
            visits = drawn.setdefault(series.member_of(row), set())
            if not visits or row.get("start") == "init":
                visits.add(series.place_of(row))
    return sum(map(len, drawn.values()))


def tree(values: dict) -> dict[str, list[tuple[str, str]]]:
    """(path, text) of every setting by the top-level key it belongs to."""
    return {
        key: [(path or key, sections.setting(leaf)) for path, leaf in runs.flatten(value)]
        for key, value in values.items()
    }


def works(config: dict) -> list[str]:
    """The works that the config builds on."""
    words = set()
    for path, leaf in runs.flatten(config):
        words |= {path.split(".")[-1], json.dumps(leaf).strip('"').lower()}
    return [work for word, cited in CITATIONS.items() if word in words for work in cited]
