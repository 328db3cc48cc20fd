"""Rows to `report.html`: which functions show which rows, and everything on the page besides.

A report reads a folder, whoever wrote it: it imports no stage, nor jax, which all stages need. So
FIGURES says here what shows the rows of which kind of stage, and `extend.register` adds to it.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import matplotlib

from sparsity_jax import imports, intact
from sparsity_jax.report import (
    channels,
    draw,
    files,
    growth,
    limits,
    pruning,
    raw,
    series,
    summary,
    training,
)
from sparsity_jax.report.rows import completed
from sparsity_jax.report.sections import Section, setting
from sparsity_jax.types import AnyPath, Fields, Rows

__all__ = ["FIGURES", "TEMPLATES", "write"]

_CITATIONS = {  # a word of the config to the works it stands for
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
TEMPLATES = jinja2.Environment(  # which escape all that is filled in
    loader=jinja2.PackageLoader("sparsity_jax", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_SIZES = {"num_params": "parameters", "num_prunable": "prunable weights"}
FIGURES: dict[Any, tuple[str, ...]] = {  # what shows rows, in the order of the page: of which kinds
    summary.summary: ("train", "curve"),
    limits.prediction: ("limit", "width"),
    pruning.sizes: series.TRAINING,
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
    growth.growth_norms: ("grow",),
    growth.growth_ratio: ("grow",),
    growth.growth_groups: ("grow",),
    pruning.zeros: ("curve",),
    raw.pruned: raw.STEPS,
}


def write(
    workdir: AnyPath, config: Fields, rows: Rows, title: str | None, environment: Fields | None
) -> pathlib.Path:
    """Writes the page and its figures; see `report.write`."""
    folder = pathlib.Path(workdir)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    if environment is not None:
        files.write_environment(folder, environment)
    told = json.dumps(files.plain([config, rows, environment or {}]), ensure_ascii=False)
    config, rows, environment = json.loads(told.encode(errors="replace"))  # of lone surrogates
    rows = completed(rows, config, environment)
    failed = environment.pop(files.FAILED, {})
    with matplotlib.rc_context(draw.STYLE):
        sections = _sections_of(rows, imports.remembered(folder).get("stage", {}))
        drawings = _draw_all(figures, sections)
    settings = dict(files.flatten(config))
    text = TEMPLATES.get_template("report/page.html.j2").render(
        title=title or files.title_of(config, folder),
        facts=_facts(settings, rows),
        rows=rows,
        sections=sections,
        drawings=drawings,
        failed=failed,
        trees={"settings": _tree(config), "entries": _tree(environment)},
        command=environment.get("command") or [],
        works=_works(settings),
        colors=draw.COLORS,
    )
    path = folder / files.REPORT
    intact.write(path, draw.printable(text).encode())
    return path


# Sections -----------------------------------------------------------------------------------------


def _sections_of(rows: Rows, own_stages: Mapping[str, str]) -> dict[str, Section]:
    """Sections by name: of FIGURES, and tables of rows that none of them shows.

    own_stages: files that registered stages, by their kind.
    """
    grouped = series.group(rows)
    kinds = dict.fromkeys(str(row.get("kind")) for row in rows)
    sections = {}
    shown: set[str] = set()
    for show, own in FIGURES.items():
        section = show(grouped) if kinds.keys() & own else None
        if section is not None:
            sections[show.__name__] = section
            shown.update(own)
    for kind in kinds:
        own_file = own_stages.get(kind, "FILE")
        section = None if kind in shown else raw.unknown(grouped, kind, own_file)
        if section is not None:
            sections[f"rows_{len(sections)}"] = section
    return sections


def _draw_all(folder: pathlib.Path, sections: dict[str, Section]) -> dict[str, str]:
    """Inline drawings by name; writes the PNGs and removes those of earlier reports."""
    for show in FIGURES:
        (folder / f"{show.__name__}.png").unlink(missing_ok=True)
    drawings = {}
    for name, section in sections.items():
        if section.figure is not None:
            png, drawings[name] = draw.files_of(name, section.figure)
            intact.write(folder / f"{name}.png", png)
    return drawings


# Besides the sections -----------------------------------------------------------------------------


def _facts(settings: Fields, rows: Rows) -> list[tuple[str, str]]:
    """(fact, what it is) about data, model and its size, if known."""
    result = []
    for path in ("data.name", "model.name"):
        name = settings.get(path)
        if name:
            names = name if isinstance(name, list) else [name]
            result.append((", ".join(map(str, names)), ""))
    for field, what in _SIZES.items():
        counts = [row[field] for row in rows if isinstance(row.get(field), int)]
        if counts:
            result.append((f"{max(counts):,.0f}", what))
    return result


def _tree(values: Fields) -> dict[str, list[tuple[str, str]]]:
    """(path, text) of every setting by the top-level key it belongs to."""
    leaves = {}
    for key, value in values.items():
        flat = files.flatten(value)
        leaves[key] = [(path or key, setting(leaf)) for path, leaf in flat]
    return leaves


def _works(settings: Fields) -> list[str]:
    """The works that a config builds on."""
    words = set()
    for path, value in settings.items():
        words |= {path.split(".")[-1], str(value).lower()}
    return [work for word, cited in _CITATIONS.items() if word in words for work in cited]
