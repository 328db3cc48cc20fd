"""Rows to `report.html`: which functions show which rows, and everything on the page besides.

A report reads a folder, whoever wrote it: it imports no stage, nor jax, which all stages need. So
FIGURES says here what shows the rows of which kind of stage, and `extend.register` adds to it.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib
import pandas as pd

from sparsity_jax.report import (
    channels,
    draw,
    files,
    growing,
    limit_figures,
    limit_numbers,
    pruning,
    runs,
    series,
    summary,
    training,
)
from sparsity_jax.report.sections import MOST_LINES, Cell, Section, Table, setting
from sparsity_jax.report.series import Series

DARK_PALETTE = (
    *("#4aa8e8", "#ff8a4c", "#2fc493", "#e29ac2", "#f0b13c", "#8fd0f5"),
    *("#b08ae8", "#a3abb5", "#e0669c", "#c9c94f", "#4fc3cf", "#c99463"),
)
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
    measures = ("oracle", "noise", "jacobian")
    told = lambda row: series.removes_weights(row) or row.get("kind") in measures
    return plain_section("Pruning steps", grouped, told)


FIGURES = {  # what shows rows, in the order of the page: the kinds of stages whose rows it shows
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
    config, environment, rows = map(encodable, (config, environment or {}, rows))
    rows = [runs.complete(row, config, environment) for row in rows]
    with matplotlib.rc_context(draw.STYLE):
        shown = sections_of(rows)
        drawings = draw_all(workdir / "figures", shown)
    text = template().render(
        title=title or runs.title_of(config, workdir),
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
    path = workdir / files.REPORT
    files.write_atomic(path, draw.printable(text).encode())
    return path


def encodable(value: Any) -> Any:
    """Plain data of texts without lone surrogates, which no encoding has."""
    text = json.dumps(files.plain(value), ensure_ascii=False)
    return json.loads(text.encode(errors="replace"))


def template() -> jinja2.Template:
    """The page, which escapes all that is filled in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2")


def sections_of(rows: list[dict]) -> dict[str, Section]:
    """Sections by name: of FIGURES, and tables of rows that none of them shows."""
    grouped = series.group(rows)
    unseen = dict.fromkeys(str(row.get("kind")) for row in rows)
    kinds = set(unseen)
    shown = {}
    for show, own in FIGURES.items():
        section = show(grouped) if kinds & set(own) else None
        if section is not None:
            shown[show.__name__] = section
            for kind in own:
                unseen.pop(kind, None)
    for kind in unseen:
        told = lambda row, kind=kind: str(row.get("kind")) == kind
        section = plain_section(f"Rows of {kind}", grouped, told)
        if section is not None:
            shown[f"rows_{len(shown)}"] = section
    return shown


def draw_all(folder: pathlib.Path, shown: dict[str, Section]) -> dict[str, str]:
    """Inline drawings by name; writes the PNGs and removes those of earlier reports."""
    for show in FIGURES:
        (folder / f"{show.__name__}.png").unlink(missing_ok=True)
    drawings = {}
    for name, section in shown.items():
        if section.figure is not None:
            png, drawings[name] = draw.files_of(name, section.figure)
            files.write_atomic(folder / f"{name}.png", png)
    return drawings


def plain_section(
    heading: str, grouped: list[Series], told: Callable[[dict], bool]
) -> Section | None:
    """The rows of which `told` holds as they are: every field that is a number or a text."""
    labels, rows = [], []
    for index, one in enumerate(grouped):
        own = list(filter(told, one.rows))
        labels += [Cell(one.label, color=index)] * len(own)
        rows += own
    if not rows:
        return None
    frame = pd.DataFrame(rows, dtype=object).drop(columns=["kind", "arm"], errors="ignore")
    simple = frame.where(frame.map(lambda value: isinstance(value, (str, int, float))))
    texts = simple.dropna(axis="columns", how="all").map(setting)
    lines = [[label, *texts.loc[i]] for i, label in enumerate(labels[:MOST_LINES])]
    more = f"The first {MOST_LINES} of {len(rows)} rows; {files.METRICS} has them all."
    note = more if len(rows) > MOST_LINES else ""
    heads = ["network", *texts.columns]
    return Section(heading, tables=[Table(heads, lines, tuple(range(len(heads))), note)])


# ----------------------------------------------------------------------------- besides the sections


def facts(config: dict, rows: list[dict]) -> list[tuple[str, str, str]]:
    """(text before, fact, text after) about data, model, size and number of networks, if known."""
    result = []
    for key in ("data", "model"):
        value = config.get(key)
        value = value.get("name") if isinstance(value, dict) else value
        names = value if isinstance(value, list) else [value]
        if value:
            result.append((key, ", ".join(map(str, names)), ""))
    counts = series.numbers(rows, "num_params", "num_prunable").max()
    for count, label in zip(counts, ("parameters", "prunable weights")):
        if count > 0:
            result.append(("", f"{count:,.0f}", label))
    count = count_networks(rows)
    if count:
        result.append(("", str(count), "trained network" + "s" * (count > 1)))
    return result


def count_networks(rows: list[dict]) -> int:
    """Networks that were trained: one that goes on from another one's weights is no new one."""
    drawn: dict[str, set] = {}
    for row in rows:
        if row.get("kind") in series.TRAINING:
            visits = drawn.setdefault(series.member_of(row), set())
            if not visits or row.get("start") == "init":
                visits.add(series.place_of(row))
    return sum(map(len, drawn.values()))


def tree(values: dict) -> dict[str, list[tuple[str, str]]]:
    """(path, text) of every setting by the top-level key it belongs to."""
    shown = {}
    for key, value in values.items():
        leaves = files.flatten(value)
        shown[key] = [(path or key, setting(leaf)) for path, leaf in leaves]
    return shown


def works(config: dict) -> list[str]:
    """The works that the config builds on."""
    words = set()
    for path, leaf in files.flatten(config):
        words |= {path.split(".")[-1], str(leaf).lower()}
    return [work for word, cited in CITATIONS.items() if word in words for work in cited]
