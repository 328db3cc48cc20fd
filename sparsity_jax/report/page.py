"""Rows to `report.html`: which functions show which rows, and everything on the page besides.

A report reads a folder, whoever wrote it: it imports no stage, nor jax, which all stages need. So
FIGURES says here what shows the rows of which kind of stage, and `extend.register` adds to it.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib

from sparsity_jax.report import (
    channels,
    draw,
    files,
    limits,
    pruning,
    runs,
    series,
    summary,
    training,
)
from sparsity_jax.report.sections import Cell, Section, Shown, plain_table, setting
from sparsity_jax.report.series import Grouped

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


def pruned(grouped: Grouped) -> Shown:
    """Rows of stages that prune, or measure a pruned network, as they are."""
    kinds = ("prune", "remove", "oracle", "noise", "jacobian")
    told = lambda row: row.get("kind") in kinds or (row.get("kind") == "grow" and "layers" in row)
    return plain_section("Pruning steps", grouped, told)


FIGURES: dict[Any, tuple[str, ...]] = {  # what shows rows, in the order of the page: of which kinds
    summary.summary: ("train", "curve"),
    limits.prediction: ("limit", "width"),
    channels.compact: ("compact",),
    limits.limits: limits.KINDS,
    limits.path: ("path",),
    limits.crossing: ("width",),
    limits.history: ("width",),
    limits.spectrum: ("width", "spectrum"),
    limits.row_norms: ("row_norms",),
    pruning.accuracy: ("curve",),
    pruning.loss: ("curve",),
    pruning.accuracy_train: ("curve",),
    training.training: series.TRAINING,
    training.magnitudes: ("histogram",),
    pruning.layers: ("curve",),
    channels.groups: ("cut",),
    channels.channels: ("cut",),
    training.sfw_init: ("sfw_init",),
    training.growth_norms: ("grow",),
    training.growth_ratio: ("grow",),
    training.growth_groups: ("grow",),
    pruning.zeros: ("curve",),
    pruned: ("prune", "remove", "grow", "oracle", "noise", "jacobian"),
}


def write(
    workdir: files.AnyPath,
    config: dict,
    rows: files.Rows,
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


def sections_of(rows: files.Rows) -> dict[str, Section]:
    """Sections by name: of FIGURES, and tables of rows that none of them shows."""
    grouped = series.group(rows)
    kinds = dict.fromkeys(str(row.get("kind")) for row in rows)
    shown = {}
    seen: set[str] = set()
    for show, own in FIGURES.items():
        section = show(grouped) if kinds.keys() & own else None
        if section is not None:
            shown[show.__name__] = section
            seen |= {*own}
    for kind in kinds.keys() - seen:
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


def plain_section(heading: str, grouped: Grouped, told: Callable[[dict], bool]) -> Shown:
    """The rows of which `told` holds, as they are."""
    lines = []
    for index, one in enumerate(grouped):
        for row in filter(told, one.rows):
            shown = {key: value for key, value in row.items() if key not in ("kind", "arm")}
            lines.append((Cell(one.label, color=index), shown))
    table = plain_table(lines)
    return Section(heading, tables=[table]) if table else None


# ----------------------------------------------------------------------------- besides the sections


def facts(config: dict, rows: files.Rows) -> list[tuple[str, str]]:
    """(fact, what it is) about data, model and its size, if known."""
    result = []
    for key in ("data", "model"):
        value = config.get(key)
        names = value.get("name") if isinstance(value, dict) else value
        if names:
            names = names if isinstance(names, list) else [names]
            result.append((", ".join(map(str, names)), ""))
    sizes = dict(num_params="parameters", num_prunable="prunable weights")
    counts = series.numbers(rows, *sizes).max().dropna()
    for field, count in counts.items():
        result.append((f"{count:,.0f}", sizes[str(field)]))
    return result


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
