"""The one door for results: rows to `metrics.jsonl` and TensorBoard, and rows to a self-contained `report.html`.

Reads rows and the config as plain data, never models. Rebuild a report: `python -m sparsity_jax.report --workdir DIR`.
"""

import argparse
import html
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sparsity_jax import figures, geometry_figures, growing_figures, intact, workdirs

METRICS, CONFIG, ENVIRONMENT, REPORT = "metrics.jsonl", "config.json", "environment.json", "report.html"

CITATIONS = {  # a word of the config to the work it stands for
    "sfw": (
        "L. Miao, X. Luo, T. Chen, W. Chen, D. Liu, Z. Wang. Learning Pruning-Friendly Networks via Frank-Wolfe: "
        "One-Shot, Any-Sparsity, and No Retraining. ICLR 2022.",
        "S. Pokutta, C. Spiegel, M. Zimmer. Deep Neural Network Training with Frank-Wolfe. 2020. arXiv:2010.07243.",
    ),
    "spectrum": (
        "Q. Zhang, R. Zhang, J. Sun, Y. Liu. How Sparse Can We Prune a Deep Network: A Geometric Viewpoint. 2023. "
        "arXiv:2306.05857.",
    ),
    "cut": (
        "E. S. Lubana, R. P. Dick. A Gradient Flow Framework for Analyzing Network Pruning. ICLR 2021. "
        "arXiv:2009.11839.",
    ),
    "grow": (
        "H. Wang, C. Qin, Y. Zhang, Y. Fu. Neural Pruning via Growing Regularization. ICLR 2021. arXiv:2012.09243.",
    ),
}

# ------------------------------------------------------------------------------------------------ rows to files


def plain(value: Any) -> Any:
    """`value` as JSON data: NumPy and JAX scalars and arrays become numbers and lists, NaN and infinities null.

    Raises TypeError for anything JSON cannot hold.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a row holds {value!r} ({type(value).__name__}); allowed: numbers, text, lists, dicts, arrays.")


def write_atomic(path: pathlib.Path, data: bytes) -> None:
    """Replaces `path` at once: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def to_line(row: Mapping, before: int) -> tuple[str, int]:
    """(the line of a row, with its checksum, the checksum); before: that of the line before, 0 of the first."""
    missing = [field for field in ("stage", "kind") if field not in row]
    if missing:
        raise ValueError(f"a row lacks {' and '.join(missing)}; it has: {', '.join(map(str, row)) or 'nothing'}.")
    line, total = intact.summed_row(json.dumps(plain(row), allow_nan=False), before)
    return line + "\n", total


def to_lines(rows: Iterable[Mapping], before: int = 0) -> tuple[str, int]:
    """(the lines of rows, the checksum of the last one)."""
    lines = []
    for row in rows:
        line, before = to_line(row, before)
        lines.append(line)
    return "".join(lines), before


def read_rows(path) -> list[dict]:
    """Rows of a metrics file, without their checksums. A last line cut off by a killed run is left out.

    Raises ValueError with the line number for any other line that is not one JSON object, or not as it was written.
    """
    path = pathlib.Path(path)
    lines = path.read_bytes().split(b"\n")
    rows, total = [], 0
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row, total = intact.read_row(line, total)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if i == len(lines) - 1:
                break
            raise ValueError(f"{path}, line {i + 1}: {error}. Each line holds one row as a JSON object.") from error
        rows.append(row)
    return rows


class Writer:
    """Appends rows to `workdir/metrics.jsonl` and their numbers to TensorBoard events in `workdir/tensorboard`.

    Both start as exactly `rows_so_far`: what a killed run wrote after its last checkpoint is dropped on resume.
    Events hold every number of the rows, nested ones too, but no lists (spectra, histograms, norms of single groups).
    Tags are `stage/field` and `stage/field/name`. The step axis is `step` for train rows, `iteration` for SFW-Init, the
    ratio in billionths (90 % = 900,000,000) for curves, paths and searches of a limit, the quantile likewise for row
    norms, the probe for spectra, the draw for noise, and `visit` otherwise. Rows told apart by more than that get a
    longer tag: those of a later visit (`fit/train_loss/visit_2`), those of a curve that is not global, kernels-only,
    not retrained on test data (`curve/accuracy/train`), and once rows of several members have been seen the member is
    named (`fit/train_loss/member_1`).
    """

    def __init__(self, workdir, rows_so_far: Iterable[dict] = ()):
        from tensorboardX import FileWriter

        workdir = pathlib.Path(workdir)
        rows = list(rows_so_far)
        lines, self._sum = to_lines(rows)
        write_atomic(workdir / METRICS, lines.encode())
        events = workdir / "tensorboard"
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        self._members = set()
        self._events = FileWriter(str(events))
        self._file = (workdir / METRICS).open("a", encoding="utf-8")
        self._add_scalars(rows)

    def append(self, rows: list[dict]) -> None:
        """Writes all rows and flushes. A row that cannot be written raises, and then none of them is written."""
        lines, self._sum = to_lines(rows, self._sum)
        self._file.write(lines)
        self._file.flush()
        self._add_scalars(rows)

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _add_scalars(self, rows: list[dict]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._members |= {row.get("member", 0) for row in rows}
        several = len(self._members) > 1
        for row in map(plain, rows):
            member = f"/member_{row.get('member', 0)}" if several else ""
            found, step = scalars(row)
            values = [Summary.Value(tag=tag + member, simple_value=value) for tag, value in found.items()]
            if values:
                self._events.add_summary(Summary(value=values), step)
        self._events.flush()


STEPS = {  # of rows of each kind: the field that is the step axis of their events, and how many steps its unit has
    "train": ("step", 1),
    "grow": ("step", 1),
    "remove": ("step", 1),
    "sfw_init": ("iteration", 1),
    "curve": ("ratio", 10**9),
    "limit": ("ratio", 10**9),
    "path": ("ratio", 10**9),
    "row_norms": ("quantile", 10**9),
    "spectrum": ("probe", 1),
    "noise": ("draw", 1),
}
WHICH = ("visit", "member", "epoch", "step", "ratio", "iteration", "seed", "quantile", "probe", "draw", "layout")
USUAL = {"split": "test", "selection": "global", "scope": "kernels"}  # what a curve's tag does not name


def scalars(row: dict) -> tuple[dict[str, float], int]:
    """({tag: value} of every number a plain row holds, without those that say which row it is; step)."""
    visit = row.get("visit", 1)
    field, unit = STEPS.get(row["kind"], ("visit", 1))
    words = []
    if row["kind"] == "curve":
        words += [row[key] for key, value in USUAL.items() if row.get(key, value) != value]
        words += ["retrained"] * bool(row.get("retrained"))
    if field != "visit" and visit != 1:
        words.append(f"visit_{visit}")
    suffix = "".join(f"/{word}" for word in words)
    step = row.get(field, row.get("epoch", 0) if field == "step" else 0)
    told = {key: value for key, value in row.items() if key not in WHICH and "." not in key}
    found = {f"{row['stage']}/{path}{suffix}": value for path, value in numbers(told).items()}
    return found, round(unit * step)


def numbers(tree: dict, path: str = "") -> dict[str, float]:
    """The numbers of a nested dict by path; no lists and no truth values."""
    found = {}
    for key, value in tree.items():
        own = f"{path}/{key}" if path else str(key)
        if isinstance(value, dict):
            found |= numbers(value, own)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[own] = float(value)
    return found


# ------------------------------------------------------------------------------------------------- rows to a page


def write(
    workdir, config: dict, rows: list[dict], *, title: str | None = None, environment: dict | None = None
) -> pathlib.Path:
    """Writes `workdir/report.html`, one file without outside parts, and `workdir/figures/NAME.png`.

    title: default `config["title"]`, else the folder's name. environment: versions, devices and, as `command`, what
    was run; it is kept in `workdir/environment.json` so that a rebuilt report shows it too. The same arguments give
    the same bytes. Sections without rows are left out. Returns the path of the page.
    """
    workdir = pathlib.Path(workdir)
    config = plain(config)
    if environment is not None:
        write_environment(workdir, environment)
    environment = plain(environment or {})
    rows = [complete(row, config, environment) for row in rows if isinstance(row, dict)]
    titles = config.get("title")
    title = title or (titles if isinstance(titles, str) else "") or workdir.resolve().name
    series = figures.group(rows)
    found = figures.curves(series) or figures.curves(series, "train")
    table = figures.summary(series, found)
    limits = geometry_figures.networks(series)
    sections = [
        ("summary", "Summary", summary_section(series, table, found)),
        ("prediction", "Predicted and actual limit", prediction_section(limits, config)),
        ("compact", "Compact network", compact_section(series)),
        *figure_sections(workdir, series, found, table, limits),
        ("channels_removed", "Channels removed and zeros", channels_section(series, found)),
        ("pruned", "Pruning steps", prune_section(series)),
        ("config", "Configuration", tree_section(config, "settings")),
        ("environment", "Environment", tree_section(environment, "entries", show=True)),
        ("reproduce", "Reproduce and cite", reproduce_section(config, environment)),
    ]
    sections = [section for section in sections if section[2]]
    if not rows:
        note = '<p class="note">This run has no result rows yet, so there is nothing to show but its settings.</p>'
        sections.insert(0, ("empty", "No results", note))
    links = "".join(f'<a href="#{name}">{esc(heading)}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{esc(heading)}</h2>{content}</section>' for name, heading, content in sections
    )
    page = PAGE.format(title=esc(title), style=style(), context=context_line(config, rows), links=links, body=body)
    write_atomic(workdir / REPORT, page.encode(errors="replace"))
    return workdir / REPORT


def complete(row: dict, config: dict, environment: dict) -> dict:
    """`row` with what its run knows about it besides, unless it says so itself.

    start: of a training, whether it begins with the initial weights ("init") or the current ones. chance: accuracy of
    always answering the most frequent class.
    """
    stage = config.get(row.get("stage"))
    more = {}
    if row.get("kind") == "train" and isinstance(stage, dict) and "start" in stage:
        more["start"] = stage["start"]
    if row.get("kind") == "train" and isinstance(environment.get("chance"), float):
        more["chance"] = environment["chance"]
    return {**more, **row}


def write_environment(workdir, environment: dict) -> None:
    """Writes `workdir/environment.json`."""
    path = pathlib.Path(workdir) / ENVIRONMENT
    write_atomic(path, (json.dumps(plain(environment), indent=2) + "\n").encode())
    intact.record(path)


def read_environment(workdir) -> dict | None:
    """What `workdir/environment.json` holds; None where there is none, or another than was written, which is told."""
    path = pathlib.Path(workdir) / ENVIRONMENT
    try:
        if not path.exists():
            return None
        if intact.is_changed(path):
            raise ValueError(f"{path} is not as it was written (its checksum differs)")
        return read_dict(path)
    except ValueError as error:
        workdirs.say(f"{error}; versions are left out")
        return None


def continued(workdir, environment: dict) -> dict:
    """`environment` after that of the run so far in `workdir`: where they differ, both, e.g. `0.10.2, then 0.11.0`."""
    before = read_environment(workdir) or {}
    joined = {}
    for name, value in {**before, **environment}.items():
        old = before.get(name, value)
        known = str(old).split(", then ")[-1] == str(value) or name == "command"
        joined[name] = old if known else f"{old}, then {value}"
    return joined


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def context_line(config: dict, rows: list[dict]) -> str:
    """Dataset, model, size, number of trained networks: whatever is known."""

    def name(key):
        value = config[key].get("name") if isinstance(config.get(key), dict) else config.get(key)
        return ", ".join(map(str, value)) if isinstance(value, list) else value

    words = [f"{label} <b>{esc(name(key))}</b>" for key, label in (("data", "data"), ("model", "model")) if name(key)]
    sizes = {"num_params": "parameters", "num_prunable": "prunable weights"}
    for field, label in sizes.items():
        count = max((figures.number(row.get(field, 0)) for row in rows), default=0)
        if count > 0:
            words.append(f"<b>{count:,.0f}</b> {label}")
    networks = count_networks(rows)
    if networks:
        words.append(f"<b>{networks}</b> trained network{'s' * (networks > 1)}")
    return " · ".join(words)


def count_networks(rows: list[dict]) -> int:
    """Networks that were trained: a training that goes on from another one's weights makes no new one."""
    drawn = {}
    for row in rows:
        if row.get("kind") in ("train", "grow"):
            visits = drawn.setdefault(figures.member_of(row), set())
            if not visits or row.get("start") == "init":
                visits.add((row.get("stage"), row.get("visit")))
    return sum(map(len, drawn.values()))


COLUMNS = {  # column of figures.summary to (heading, unit, factor, decimals; None: no best)
    "dense": ("unpruned", "%", 100, 2),
    "before": ("after epochs", "", 1, None),
    "channels": ("channels removed", "%", 100, None),
    "weights": ("weights removed", "%", 100, None),
    "pruned": ("pruned", "%", 100, 2),
    **{str(stop): (f"at {100 * stop:g}%", "%", 100, 2) for stop in figures.STOPS},
    "largest": ("largest within 1 point", "%", 100, 1),
    "epochs": ("epochs", "", 1, None),
    "seconds": ("training", "s", 1, None),
}


def cell_text(column: str, cell: tuple[float, float, int]) -> tuple[str, str]:
    """Mean and, over several members, the deviation, as shown; equal epochs need none."""
    mean, std, count = cell
    whole = column in ("epochs", "before")
    count = 1 if whole and std == 0 else count
    _, _, factor, decimals = COLUMNS[column]
    if decimals is None:
        decimals = 0 if whole or factor * abs(mean) >= 100 else 1
    return f"{factor * mean:,.{decimals}f}", f"± {factor * std:,.{decimals}f}" if count > 1 else ""


def best_line(table: list, column: str) -> int | None:
    """The line whose mean in `column` is above all others by more than either deviation; None if there is none."""
    lines = [i for i, line in enumerate(table) if column in line.cells and column not in line.floors]
    if COLUMNS[column][3] is None or len(lines) < 2:
        return None
    first, *others = sorted(lines, key=lambda i: -table[i].cells[column][0])
    mean, std, _ = table[first].cells[column]
    for i in others:
        other, spread, _ = table[i].cells[column]
        alike = cell_text(column, (mean, 0.0, 1)) == cell_text(column, (other, 0.0, 1))
        if alike or mean - other <= max(std, spread):
            return None
    return first


def summary_section(series: list, table: list, found: list) -> str:
    """The summary table; bold: a mean that is above all others by more than one deviation."""
    if not table:
        return ""
    columns = [column for column in COLUMNS if any(column in line.cells for line in table)]
    variants = any(line.variant for line in table)
    best = {column: best_line(table, column) for column in columns}
    head = '<th scope="col">network</th>' + ('<th scope="col">pruning</th>' if variants else "")
    for column in columns:
        heading, unit, _, _ = COLUMNS[column]
        head += f'<th scope="col" class="num">{esc(heading)}{f"&nbsp;<small>{unit}</small>" if unit else ""}</th>'
    body = ""
    for i, line in enumerate(table):
        body += f'<tr><th scope="row">{swatch(line.series)}{esc(line.label)}</th>'
        body += f'<td class="keep">{esc(line.variant)}</td>' if variants else ""
        for column in columns:
            mean, deviation = cell_text(column, line.cells[column]) if column in line.cells else ("–", "")
            mean = f"≥ {mean}" if column in line.floors and column in line.cells else mean
            mean = f"<b>{mean}</b>" if i == best[column] else mean
            body += f'<td class="num">{mean}{f" <small>{deviation}</small>" if deviation else ""}</td>'
        body += "</tr>"
    notes = summary_notes(series, table, found, columns)
    table_html = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return scroll(table_html) + note(" ".join(notes))


def summary_notes(series: list, table: list, found: list, columns: list[str]) -> list[str]:
    """What the numbers of the summary table mean, as far as it has them."""
    tested = any(row.get("split", "test") == "test" for one in series for row in one.rows if row.get("kind") == "curve")
    kind = "Train" if found and not tested else "Test"
    notes = []
    if "dense" in columns or "pruned" in columns:
        notes.append(f"{kind} accuracy. Unpruned: the network of that line before anything was removed.")
    if "pruned" in columns:
        notes.append("Pruned: after the last training, with the share removed that stands before it.")
    if found:
        notes.append("At: with that share of the prunable weights removed.")
    if any(curve.retrained for curve in found):
        notes.append("Retrained: every number of the line is after retraining, also the unpruned one.")
    if "largest" in columns:
        notes.append("Largest: the last share that loses at most one point; ≥ where no measured share loses more.")
    members = max(cell[2] for line in table for cell in line.cells.values())
    if members > 1:
        notes.append(f"Mean ± sample standard deviation over up to {members} networks.")
    if len(table) > 1:
        notes.append("Bold: above all other lines by more than one deviation.")
    if "seconds" in columns:
        notes.append("Training: epochs times the median one, so that compilation is left out.")
    if members > 1 and "seconds" in columns:
        notes.append("Networks trained side by side share their wall time.")
    return notes


def swatch(index: int) -> str:
    return f'<i class="swatch" style="background:var(--c{index % len(figures.PALETTE)})"></i>'


def scroll(content: str) -> str:
    return f'<div class="scroll">{content}</div>'


def note(text: str) -> str:
    return f'<p class="note">{esc(text)}</p>' if text else ""


def finding(table: list) -> str:
    """One sentence on the accuracy kept at the telling ratio, for at most four lines of the table."""
    stop = next((s for s in ("0.98", "0.99", "0.95", "0.9") if any(s in line.cells for line in table)), None)
    told = [line for line in table if stop in line.cells]
    if stop is None or not 0 < len(told) <= 4:
        return ""
    parts = []
    for line in told:
        name = f"{line.label} ({line.variant})" if line.variant else line.label
        dense = f" of {100 * line.cells['dense'][0]:.1f}%" if "dense" in line.cells else ""
        parts.append(f"{name} keeps {100 * line.cells[stop][0]:.1f}%{dense}")
    return f"With {100 * float(stop):g}% of the weights removed, " + "; ".join(parts) + "."


LIMIT_COLUMNS = {  # of one prediction: heading, and its text from a row of a width stage
    "predicted": lambda row: percents(row, "predicted"),
    "interval": lambda row: percents(row, "low", "high"),
    "enclosure": lambda row: percents(row, "enclosure_low", "enclosure_high"),
    "± probes": lambda row: percents(row, "standard_error"),
    "± ε": lambda row: percents(row, "epsilon_error"),
    "ε": lambda row: f"{figures.number(row.get('epsilon')):.3g}",
    "probes × products": lambda row: f"{row.get('num_probes', 1)} × {row.get('num_matvecs', 0)}",
    "share without curvature": lambda row: percents(row, "zero_share", decimals=1),
    "weight below 0": lambda row: percents(row, "negative_mass", decimals=1),
    "on the original's grid": lambda row: percents(row, "predicted_on_grid", decimals=1),
}


def percents(row: dict, *fields: str, decimals: int = 2) -> str:
    values = [figures.number(row.get(field)) for field in fields]
    if not all(map(math.isfinite, values)):
        return "–"
    return "\u2013".join(f"{100 * value:.{decimals}f}" for value in values)


def prediction_section(limits: list, config: dict, most: int = 60) -> str:
    """Predictions, at most `most` of them, then every definition of the actual limit and how far off they are."""
    names = geometry_figures.prediction_names(limits)
    colors, several = geometry_figures.colors(names), len(limits) > 1
    rows = [(one, stage) for one in limits for stage in names if stage in one.predictions]
    verdicts = [
        f"<b>{esc(one.name)}:</b> {esc(one.text)}{f' <b>{esc(one.caution)}</b>' if one.caution else ''}"
        for one in geometry_figures.verdicts(limits, names, config)
    ]
    result = bullets(verdicts)
    if rows:
        head = '<th scope="col">prediction</th>' + '<th scope="col">network</th>' * several
        for column in LIMIT_COLUMNS:
            unit = "" if column in ("ε", "probes × products") or column.startswith("±") else "%"
            head += f'<th scope="col" class="num">{esc(column)}{f"&nbsp;<small>{unit}</small>" if unit else ""}</th>'
        body = ""
        for one, stage in rows[:most]:
            row = one.predictions[stage]
            cells = "".join(f'<td class="num">{esc(text(row))}</td>' for text in LIMIT_COLUMNS.values())
            body += f'<tr><th scope="row">{swatch(colors[stage])}{esc(names[stage])}</th>'
            body += (f'<td class="keep">{esc(one.label)}</td>' if several else "") + f"{cells}</tr>"
        result += scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        text = "Interval: the enclosure, or the prediction alone, widened by two deviations (±) of probes and ε."
        result += note(f"{text} The first {most} of {len(rows)}." if len(rows) > most else text)
    defined = geometry_figures.definitions(limits)
    if defined:
        head = '<th scope="col">nothing is lost if</th><th scope="col" class="num">actual&nbsp;<small>%</small></th>'
        for stage, name in names.items():
            heading = f"{esc(name)} less actual&nbsp;<small>points</small>"
            head += f'<th scope="col" class="num">{swatch(colors[stage])}{heading}</th>'
        body = ""
        for name in defined:
            values = [known[name] for known in map(geometry_figures.actual, limits) if name in known]
            mean, std = figures.mean_std(np.array(values)[:, None])
            deviation = f" <small>± {100 * std[0]:.2f}</small>" if len(values) > 1 else ""
            body += f'<tr><th scope="row">{esc(geometry_figures.definition(name, limits, config))}</th>'
            body += f'<td class="num">{100 * mean[0]:.2f}{deviation}</td>'
            body += "".join(gap_cell(geometry_figures.gap(limits, stage, name)) for stage in names) + "</tr>"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        result += f'<div class="apart">{scroll(table)}</div>'
        searched = []
        for one in limits:
            for stage, row in one.limits.items():
                name = ", ".join(filter(None, (one.label, stage)))
                searched.append(esc(f"{name}: {row.get('how')}; {row.get('evaluations')} evaluations."))
        averaged = "Means ± sample standard deviation over networks. " if several else ""
        result += note(averaged + "Bold: inside the interval" + (" of every network." if several else "."))
        result += bullets(searched[:most])
    return result


COMPACT_COLUMNS = {  # heading to (field, factor)
    "parameters": ("parameters", 1),
    "MFLOPs per image": ("flops", 1e-6),
    "KiB": ("bytes", 1 / 1024),
}


def compact_section(series: list, most: int = 60) -> str:
    """Networks without their removed channels: accuracy, sizes and, in plain words, whether they are faster."""
    found = [(one.label, row) for one in series for row in one.rows if row.get("kind") == "compact"]
    if not found:
        return ""
    head = '<th scope="col">network</th><th scope="col" class="num">accuracy&nbsp;<small>%</small></th>'
    head += "".join(f'<th scope="col" class="num">{esc(name)}</th>' for name in COMPACT_COLUMNS)
    head += '<th scope="col" class="num">time&nbsp;<small>ms</small></th><th scope="col">speed</th>'
    body = ""
    for label, row in found[:most]:
        accuracy = 100 * figures.number(row.get("accuracy"))
        cells = f'<td class="num">{accuracy:.2f}</td>' if math.isfinite(accuracy) else DASH
        for field, factor in COMPACT_COLUMNS.values():
            dense, small = (factor * figures.number(row.get(f"{field}{end}")) for end in ("", "_compact"))
            share = f" <small>of {amount(dense)}, {100 * small / dense:.1f}%</small>" if dense > 0 else ""
            cells += f'<td class="num">{amount(small)}{share}</td>'
        times = row.get("milliseconds") or {}
        dense, small = (figures.number(times.get(name)) for name in ("dense", "compact"))
        cells += (
            f'<td class="num">{small:.3g} <small>of {dense:.3g}</small></td>' if times else '<td class="num">–</td>'
        )
        name = label + (f", seed {row['seed']}" if "seed" in row else "")
        name += f", visit {row['visit']}" if row.get("visit", 1) > 1 else ""
        body += f'<tr><th scope="row">{esc(name)}</th>{cells}<td class="keep">{esc(speed(row))}</td></tr>'
    table = scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    told = "Compact, of dense. Time: median of whole batches, in alternation."
    warnings = [f"{label}: {row['warning']}." for label, row in found if row.get("warning")]
    differences = [figures.number(row.get("difference")) for _, row in found]
    if np.isfinite(differences).any():
        told += f" Logits of both differ by at most {np.nanmax(differences):.2g} of the largest."
    more = f" The first {most} of {len(found)}." if len(found) > most else ""
    return table + note(told + more) + "".join(map(note, warnings[:most]))


def amount(value: float) -> str:
    """A number with all its digits before the point, and four at least: 13,706 and 0.05082; "–" for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


def speed(row: dict) -> str:
    """Whether the compact network is faster on the machine that measured it."""
    if not row.get("verdict"):
        return "not measured"
    low, high = (figures.number(row.get(f"speedup_{end}")) for end in ("low", "high"))
    where = f"batch {row.get('batch_size')}, {row.get('device')}"
    numbers = f"{figures.number(row.get('speedup')):.2f} times the speed ({low:.2f}–{high:.2f}; {where})"
    return f"{row['verdict']}: {numbers}"


def gap_cell(gap) -> str:
    if gap is None:
        return '<td class="num">–</td>'
    text = f"{100 * gap.mean:+.2f}".replace("-", "−")
    text = f"<b>{text}</b>" if gap.inside == gap.count else text
    return f'<td class="num">{text}{f" <small>± {100 * gap.std:.2f}</small>" if gap.count > 1 else ""}</td>'


def bullets(items: list[str]) -> str:
    return f'<ul class="note">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def figure_sections(
    workdir: pathlib.Path, series: list, found: list, table: list, limits: list
) -> list[tuple[str, str, str]]:
    """(name, heading, content) of every figure that has rows; writes the PNGs and removes those of earlier reports."""
    labels = [one.label for one in series]
    variants = [""] * (1 + max((curve.dash for curve in found), default=0))
    for curve in found:
        variants[curve.dash] = curve.variant
    folder = workdir / "figures"
    result, written = [], set()

    def add(name, heading, fig, caption, extra="", fold=""):
        write_atomic(folder / f"{name}.png", figures.png(name, fig))
        written.add(f"{name}.png")
        drawing = figures.svg(name, fig, esc(f"{heading}. {caption}"))
        drawing = scroll(drawing)
        drawing = f"<details><summary>{esc(fold)}</summary>{drawing}</details>" if fold else drawing
        content = f'<figure>{drawing}<figcaption class="note">{esc(caption)}</figcaption></figure>{extra}'
        result.append((name, heading, content))

    def add_lines(name, heading, panels, caption, dashes=("",), extra=""):
        if panels:
            add(name, heading, figures.line_figure(name, panels, labels, list(dashes)), caption, extra)

    repeated = " Of several visits of a stage the last one." if visited_again(series, geometry_figures.KINDS) else ""
    for name, heading, panels, colors, dashes, caption in limit_figures(limits):
        add(name, heading, figures.line_figure(name, panels, colors, dashes), caption + repeated)
    drawn = "limits.png" in written and len(found) == 1 and not found[0].retrained  # with more besides
    pruned = [] if drawn else found
    band = " Bands: ± one standard deviation over networks." if any(len(c.members) > 1 for c in found) else ""
    accuracy = figures.ratio_panels(pruned, "accuracy", "accuracy", "xy")
    told = finding(table)
    add_lines("accuracy", "Accuracy under pruning", accuracy, (told + band).strip() or "Accuracy by ratio.", variants)
    loss = figures.ratio_panels(pruned, "loss", "loss", "x")
    add_lines("loss", "Loss under pruning", loss, "Mean loss per example by ratio." + band, variants)
    on_train = figures.curves(series, "train")
    if pruned and on_train and any(row.get("split", "test") == "test" for one in series for row in one.rows):
        panels = figures.ratio_panels(on_train, "accuracy", "train accuracy", "xy")
        names = {curve.dash: curve.variant for curve in on_train}
        dashes = [names.get(i, "") for i in range(max(names) + 1)]
        add_lines("accuracy_train", "Accuracy under pruning, training data", panels, "As above." + band, dashes)
    training = figures.training_panels(series)
    add_lines("training", "Training", training, "Loss and accuracy during training.", ("train", "test"))
    caption = "Weight magnitudes; weights that are exactly zero are off the axis and in the table."
    caption += last_visit(series, "histogram") and " The figure shows the last visit of a stage, the table every one."
    extra = bins_table(labels, [figures.histograms(one) for one in series])
    add_lines("magnitudes", "Weight magnitudes", figures.histogram_panels(series), caption, extra=extra)
    layers, pruned_only = [], {curve.series for curve in found if curve.layers and not curve.retrained}
    for curve in found:  # retraining does not change the masks
        if curve.layers and not (curve.retrained and curve.series in pruned_only):
            shown = sum(c.series == curve.series and bool(c.layers) and c.retrained == curve.retrained for c in found)
            layers.append(
                (f"{labels[curve.series]}, {curve.variant}" if shown > 1 else labels[curve.series], curve.layers)
            )
    if layers:
        caption = "Share of each layer's weights that is kept, in percent, by the share removed from the network."
        fold = f"{len(layers)} heat maps" if len(layers) > 6 else ""
        drawing = figures.layer_figure("layers", layers)
        add("layers", "Sparsity by layer", drawing, caption, zeros_table(labels, found), fold)
    layout, kept = figures.group_layout(series)
    if layout.get("kernels"):
        caption = "Channels that only go together, a row each, and the layers that have a part in them."
        caption += " Kept: after the last cut." + f" The first 3 of {len(kept)} networks." * (len(kept) > 3)
        fold = f"{len(layout['groups'])} groups" if len(layout["groups"]) > 80 else ""
        add("groups", "Channel groups", figures.group_figure("groups", layout, kept), caption, fold=fold)
    rounds = [(label, figures.channel_rounds(one)) for label, one in zip(labels, series)]
    rounds = [(label, cells) for label, cells in rounds if cells]
    if rounds:
        caption = "Share of each group's channels that is kept, in percent, by the share removed from the network."
        add("channels", "Channels by group", figures.layer_figure("channels", rounds, what="channels"), caption)
    caption = "Loss on the batch before and after the SFW step whose result SFW-Init minimises."
    caption += last_visit(series, "sfw_init")
    panels = figures.sfw_init_panels(series)
    add_lines("sfw_init", "SFW-Init", panels, caption, ("after the step", "before the step"))
    grown = [found for label, one in zip(labels, series) for found in growing_figures.logs(one._replace(label=label))]
    grown = grown[: geometry_figures.MOST]
    for name, heading, panels, caption in growth_figures(grown):
        if panels:
            add(name, heading, figures.line_figure(name, panels, ["stays", "goes"], [""]), caption)
    for name in NAMES - {pathlib.Path(name).stem for name in written}:
        (folder / f"{name}.png").unlink(missing_ok=True)
    return result


def last_visit(series: list, kind: str) -> str:
    """A sentence for figures of rows of which only those of the last visit are drawn; "" if there are no others."""
    several = any(len(figures.visits(one.rows, kind)) > 1 for one in series)
    return " Of several visits of a stage the last one." if several else ""


def visited_again(series: list, kinds: tuple[str, ...]) -> bool:
    """Whether a stage of one of these kinds was visited more than once."""
    rows = [row for one in series for row in one.rows if row.get("kind") in kinds]
    return any((row.get("visit") or 1) > 1 for row in rows)


NAMES = {"accuracy", "loss", "accuracy_train", "training", "magnitudes", "layers", "groups", "channels", "sfw_init"}
NAMES |= {"growth_norms", "growth_ratio", "growth_groups"}
NAMES |= {"limits", "path", "crossing", "history", "spectrum", "row_norms"}


def growth_figures(grown: list) -> list[tuple]:
    """(name, heading, panels, caption) of every figure of growing regularisation."""
    return [
        ("growth_norms", "Norms under growing penalties", growing_figures.norm_panels(grown),
         "One line per layer: mean magnitude of the weights that stay and that go, by the penalty on the latter."),
        ("growth_ratio", "Separation under growing penalties", growing_figures.ratio_panels(grown),
         "One line per layer: mean magnitude of what stays over that of what goes, smoothed."),
        ("growth_groups", "Norms of single groups", growing_figures.group_panels(grown),
         "Mean magnitude of every filter, channel or coupled group: how penalties set those apart that go."),
    ]  # fmt: skip


def limit_figures(limits: list) -> list[tuple]:
    """(name, heading, panels, labels of colours, names of dashes, caption) of every figure of the geometric limit."""
    names = geometry_figures.prediction_names(limits)
    predictions = list(names.values())
    splits = ["test", "train"] if any("train" in one.curves for one in limits) else [""]
    marked = "Bands: intervals of the predictions. Dots: the actual limit by the other definitions in the table."
    if any(one.search for one in limits):
        marked += " Circles: evaluations of the bisection."
    caption = {
        "limits": marked,
        "path": "What pruning does to the loss on the train set, and its first two orders alone. The theory assumes "
        "that the gradient adds nothing.",
        "crossing": "ω² / D, the squared Gaussian width of the loss basin per dimension, falls with the distance R; "
        "the share p of removed weights grows with it. The prediction is the p at which they meet.",
        "history": "What each number of products would have predicted. Bands: enclosures.",
        "spectrum": "Left: Ritz values smeared by Gaussians of 0.8% of the range. Right: the values and weights "
        "themselves, one per Lanczos step and probe; open: negative values.",
        "row_norms": "L1 norm of the Hessian row of one weight per quantile. Open: exactly 0.",
    }
    drawn = (
        ("limits", "Accuracy and loss up to the limit", geometry_figures.limit_panels(limits, names),
         ["pruned network"], splits),
        ("path", "Training loss along the pruning path", geometry_figures.path_panels(limits, names),
         ["pruned network"], ["change", "curvature alone (second order)", "gradient alone (first order)"]),
        ("crossing", "Gaussian width against distance", geometry_figures.crossing_panels(limits, names),
         ["share removed p", *(f"ω² / D, {name}" for name in predictions)], [""]),
        ("history", "Prediction by number of products", geometry_figures.history_panels(limits, names),
         ["", *predictions], [""]),
        ("spectrum", "Spectrum of the curvature", geometry_figures.spectrum_panels(limits, names),
         ["", *predictions], [""]),
        ("row_norms", "Hessian rows by weight magnitude", geometry_figures.norm_panels(limits), ["one weight"], [""]),
    )  # fmt: skip
    more = f" The first {geometry_figures.MOST} of {len(limits)} networks." * (len(limits) > geometry_figures.MOST)
    return [(*figure, caption[figure[0]] + more) for figure in drawn if figure[2]]


def bins_table(labels: list[str], histograms: list[dict[str, figures.Histogram]]) -> str:
    """Number and share of the weights that are zero and above each of the published thresholds, at every visit."""
    lines = [
        (i, ", ".join(filter(None, (label, visit))), counted)
        for i, (label, own) in enumerate(zip(labels, histograms))
        for visit, counted in own.items()
    ]
    thresholds = next((counted.threshold for _, _, counted in lines if counted.threshold), [])
    head = '<th scope="col" class="num">exactly 0</th>'
    head += "".join(f'<th scope="col" class="num">&gt; {value:g}</th>' for value in thresholds)
    body = ""
    for i, name, counted in lines:
        known = counted.threshold == thresholds and len(counted.above) == len(thresholds)
        counts = [counted.zero * counted.total, *(counted.above if known else [math.nan] * len(thresholds))]
        cells = "".join(
            f'<td class="num">{count:,.0f} <small>{100 * count / counted.total:.3g}%</small></td>'
            if math.isfinite(count)
            else DASH
            for count in counts
        )
        body += f'<tr><th scope="row">{swatch(i)}{esc(name)}</th>{cells}</tr>'
    head = f'<thead><tr><th scope="col">weights with |w|</th>{head}</tr></thead>'
    return scroll(f"<table>{head}<tbody>{body}</tbody></table>")


def zeros_table(labels: list[str], found: list) -> str:
    """Share of zeros in the arrays that were pruned and in all parameters, at the usual ratios; "" if rows lack it."""
    known = [curve for curve in found if np.isfinite(curve.zeros_of_all).any()]
    near = lambda curve, stop: np.abs(curve.ratio - stop).min() <= figures.NEAR
    stops = [stop for stop in figures.LAYER_STOPS if any(near(curve, stop) for curve in known)]
    if not stops:
        return ""
    head = "".join(f'<th scope="col" class="num">{100 * stop:g}%</th>' for stop in stops)
    body = ""
    for curve in known:
        cells = ""
        for stop in stops:
            pair = (figures.at_ratio(curve, values, stop) for values in (curve.zeros, curve.zeros_of_all))
            texts = [f"{100 * figures.mean_std(values[:, None])[0][0]:.2f}" for values in pair]
            cells += f'<td class="num">{" <small>of all ".join(texts)}</small></td>' if "nan" not in texts else DASH
        name = ", ".join(filter(None, (labels[curve.series], curve.variant)))
        body += f'<tr><th scope="row">{swatch(curve.series)}{esc(name)}</th>{cells}</tr>'
    head = f'<thead><tr><th scope="col">zeros in %, by share removed</th>{head}</tr></thead>'
    told = "Zeros in the arrays that may be pruned; of all: in all parameters of the network."
    return scroll(f"<table>{head}<tbody>{body}</tbody></table>") + note(told)


def channels_section(series: list, found: list, most: int = 60) -> str:
    """Share of channels removed, and of zeros, at every ratio of curves of structured selections."""
    lines = []
    for curve in found:
        name = ", ".join(filter(None, (series[curve.series].label, curve.variant)))
        shares = zip(*(figures.mean_std(part)[0] for part in (curve.channels, curve.zeros, curve.zeros_of_all)))
        lines += [(curve.series, name, own) for own in shares if math.isfinite(own[0])]
    if not lines:
        return ""
    head = '<th scope="col">network</th><th scope="col" class="num">channels removed&nbsp;<small>%</small></th>'
    head += '<th scope="col" class="num">zeros, prunable arrays&nbsp;<small>%</small></th>'
    head += '<th scope="col" class="num">zeros, all parameters&nbsp;<small>%</small></th>'
    body = ""
    for i, name, shares in lines[:most]:
        cells = "".join(f'<td class="num">{100 * share:.2f}</td>' if math.isfinite(share) else DASH for share in shares)
        body += f'<tr><th scope="row">{swatch(i)}{esc(name)}</th>{cells}</tr>'
    more = f" The first {most} of {len(lines)} lines." if len(lines) > most else ""
    table = scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return table + note("One line per ratio; a removed channel is zero with all its weights." + more)


DASH = '<td class="num">–</td>'


def prune_section(series: list, limit: int = 60) -> str:
    """Rows of stages that prune, or measure a pruned network, as they are, at most `limit` of them."""
    kinds = ("prune", "remove", "oracle", "noise", "jacobian")
    told = lambda row: row.get("kind") in kinds or (row.get("kind") == "grow" and "layers" in row)
    rows = [(i, one.label, row) for i, one in enumerate(series) for row in one.rows if told(row)]
    if not rows:
        return ""
    simple = lambda value: isinstance(value, (str, int, float, np.number))
    hidden = {"kind", "arm"}
    columns = list(dict.fromkeys(key for _, _, row in rows for key in row if key not in hidden and simple(row[key])))
    head = "".join(f'<th scope="col">{esc(key)}</th>' for key in columns)
    body = ""
    for i, label, row in rows[:limit]:
        values = [row.get(key) if simple(row.get(key)) else None for key in columns]
        cells = "".join(f"<td>{esc(setting(plain(value)) if value is not None else '–')}</td>" for value in values)
        body += f'<tr><th scope="row">{swatch(i)}{esc(label)}</th>{cells}</tr>'
    head = f'<thead><tr><th scope="col">network</th>{head}</tr></thead>'
    more = f"The first {limit} of {len(rows)} rows; {METRICS} has them all." if len(rows) > limit else ""
    return scroll(f"<table>{head}<tbody>{body}</tbody></table>") + note(more)


def flatten(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted path, value) of every setting of a nested dict."""
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in flatten(value, f"{path}.{key}" if path else str(key))]
    return [(path, tree)]


def setting(value: Any) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def tree_section(tree: dict, what: str, *, show: bool = False) -> str:
    """A nested dict as a collapsible table, one group of rows per top-level key that holds several."""
    if not tree:
        return ""
    body = ""
    for key, value in tree.items():
        leaves = flatten(value)
        if isinstance(value, dict) and value:
            body += f'<tr class="group"><th scope="rowgroup" colspan="2">{esc(key)}</th></tr>'
        nested = ' class="nested"' if isinstance(value, dict) and value else ""
        for path, leaf in leaves:
            body += (
                f'<tr><th scope="row"{nested}>{esc(path or key)}</th><td><code>{esc(setting(leaf))}</code></td></tr>'
            )
    count = len(flatten(tree))
    table = scroll(f'<table class="tree"><tbody>{body}</tbody></table>')
    return f"<details{' open' * show}><summary>{count} {what}</summary>{table}</details>"


def reproduce_section(config: dict, environment: dict) -> str:
    """The command of the run if known, the one that rebuilds this page, and the works the config builds on."""
    typed = environment.get("command") or []
    commands = {
        "Run": "\n".join(typed) if isinstance(typed, list) else typed,
        "Rebuild this page, in its folder": "python -m sparsity_jax.report --workdir .",
    }
    shown = ((label, command) for label, command in commands.items() if command)
    result = "".join(f'<p class="note">{label}</p><pre>{esc(command)}</pre>' for label, command in shown)
    words = {str(leaf).lower() for _, leaf in flatten(config)} | {path.split(".")[-1] for path, _ in flatten(config)}
    works = [work for word, found in CITATIONS.items() if word in words for work in found]
    if works:
        result += '<p class="note">Cite</p><ul>' + "".join(f"<li>{esc(work)}</li>" for work in works) + "</ul>"
    return result


def style() -> str:
    light = "".join(f"--c{i}:{value};" for i, value in enumerate(figures.PALETTE))
    dark = "".join(f"--c{i}:{value};" for i, value in enumerate(DARK_PALETTE))
    base = f"--ink:{figures.INK};--muted:{figures.MUTED};--line:{figures.GRID};"
    return STYLE.replace("LIGHT", base + light).replace("DARK", dark)


DARK_PALETTE = ("#4aa8e8", "#ff8a4c", "#2fc493", "#e29ac2", "#f0b13c", "#8fd0f5", "#b08ae8", "#a3abb5",
    "#e0669c", "#c9c94f", "#4fc3cf", "#c99463")  # fmt: skip

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--soft:#f3f5f7;--link:#0a5fb0;LIGHT}
@media (prefers-color-scheme:dark){:root{--page:#0f1217;--card:#171b22;--soft:#1e232c;--link:#7cbcff;
--ink:#e8ebef;--muted:#9aa4b0;--line:#2f3641;DARK}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:48px 24px 72px}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:1.15rem;letter-spacing:-.01em;margin:0 0 14px}
header p{margin:0;color:var(--muted)} header b{color:var(--ink);font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 26px;font-size:.9rem}
nav a{color:var(--link);text-decoration:none} nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px 20px;margin:0 0 20px;
scroll-margin-top:12px}
.scroll{overflow-x:auto}
figure{margin:0} figure svg{display:block;width:100%;min-width:640px;height:auto}
figure svg text,figure svg tspan{font-family:inherit!important}
.note{color:var(--muted);font-size:.88rem;margin:12px 0 0}
figure+.scroll,.apart{margin-top:18px} .note+.scroll{margin-top:14px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;font-weight:400;padding:8px 8px;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{padding-left:0} th:last-child,td:last-child{padding-right:0}
thead th{color:var(--muted);font-size:.84rem;vertical-align:bottom}
tbody th{min-width:150px;overflow-wrap:anywhere} tbody tr:last-child>*{border-bottom:0}
.num{text-align:right} .num,.keep{white-space:nowrap} thead .num{white-space:normal}
td b{font-weight:700} small{color:var(--muted);font-size:.82em}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:3px;margin-right:.55em}
details summary{cursor:pointer;color:var(--link);font-size:.92rem}
.tree{margin-top:10px} .tree th,.tree td{padding:5px 10px 5px 0} .tree th{width:40%;color:var(--muted)}
.tree .group th{color:var(--ink);font-weight:600;padding-top:14px} .tree .nested{padding-left:16px}
code,pre{font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;overflow-wrap:anywhere}
pre{background:var(--soft);border-radius:8px;padding:12px 14px;margin:6px 0 14px;white-space:pre-wrap}
ul{margin:6px 0 0;padding-left:1.2em;font-size:.92rem}
@media (max-width:600px){main{padding:28px 12px 48px} section{padding:16px 14px} h1{font-size:1.6rem}}
@media print{body{background:#fff} section{break-inside:avoid;border:0;padding:0} nav{display:none}}
""".strip()

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main><header><h1>{title}</h1><p>{context}</p></header><nav aria-label="Sections">{links}</nav>
{body}</main></body></html>
"""

# --------------------------------------------------------------------------------------------------- command line


def gather(workdir) -> tuple[dict, list[dict], dict | None]:
    """Config, rows and environment of a finished or running workdir.

    Rows come from a sweep's members, else from `metrics.jsonl`, else from the folders inside, see `merged`. Raises
    FileNotFoundError saying what is missing, ValueError for a file that cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not a folder; give the workdir of a run.")
    # of a sweep's members, newer than the joint ones while it runs; its own; of several runs
    choices = (sorted(workdir.glob("member_[0-9]*")), [workdir], sorted(workdir.iterdir()))
    files = next(filter(None, ([f / METRICS for f in folders if has_rows(f)] for folders in choices)), [])
    if not files:
        raise FileNotFoundError(f"neither {workdir} nor a folder in it has {METRICS}; has the run started there?")
    members = files[0].parent.name.startswith("member_")
    if len(files) > 1 and not members:
        return merged([file.parent for file in files])
    folders = [folder for folder in (workdir, files[0].parent) if workdirs.holds_run(folder)]
    if not folders:
        raise FileNotFoundError(f"{workdir} has no {CONFIG}; a run writes it when it starts.")
    rows = []
    for file in files:
        own = {"member": int(file.parent.name.removeprefix("member_"))} if members else {}
        rows += [{**row, **own} for row in whole_rows(file)]
    return workdirs.read_config(folders[0]), rows, read_environment(folders[0])


IDLE = ("title", "checkpoint_seconds", "sweep", "sweep_mode", "seed")  # they leave the numbers of one network alone


def merged(folders: list[pathlib.Path]) -> tuple[dict, list[dict], dict | None]:
    """Config, rows and environment of several runs together.

    Members are numbered anew. Rows have every setting in which the runs differ, so that only networks whose settings
    agree in all but the seed are averaged; where even that agrees, the name of the run. Config and environment have one
    value where the runs agree, else the list of values.
    """
    for folder in folders:
        if not workdirs.holds_run(folder):
            raise FileNotFoundError(f"{folder} has {METRICS} but no {CONFIG}, so its settings are not known; move it.")
    configs = [workdirs.read_config(folder) for folder in folders]
    environments = [read_environment(folder) or {} for folder in folders]
    tables = [whole_rows(folder / METRICS) for folder in folders]
    swept = {key for rows in tables for row in rows for key in row if "." in key and not figures.is_seed(key)}
    settings = [settings_of(folder, config) for folder, config in zip(folders, configs, strict=True)]
    paths = dict.fromkeys(path for own in settings for path in own)
    differing = [path for path in paths if path in swept or len({json.dumps(own.get(path)) for own in settings}) > 1]
    rows, numbers = [], {}
    for i, folder in enumerate(folders):
        more = {path: settings[i].get(path) for path in differing}
        if is_repeated(i, settings, configs, tables):
            more["run"] = folder.name
        for row in tables[i]:
            row = complete({**more, "seed": configs[i].get("seed", 0), **row}, configs[i], environments[i])
            row["member"] = numbers.setdefault((i, row.get("member", 0)), len(numbers))
            rows.append(row)
    return agreed(configs), rows, agreed(environments) or None


def settings_of(folder: pathlib.Path, config: dict, seen: tuple = ()) -> dict[str, Any]:
    """Every setting that decides the numbers of a run, by dotted path; for `start_from`, those of the run there."""
    settings = dict(flatten({name: value for name, value in config.items() if name not in IDLE}))
    start = pathlib.Path(config.get("start_from") or "")
    here = config.get("start_from") and workdirs.holds_run(start)
    if here and start.resolve() not in seen:
        own = settings_of(start, workdirs.read_config(start), (*seen, folder.resolve(), start.resolve()))
        settings.pop("start_from")
        settings |= {f"start_from.{path}": value for path, value in own.items()}
    return settings


def is_repeated(index: int, settings: list[dict], configs: list[dict], tables: list[list[dict]]) -> bool:
    """Whether another run has the same settings and a seed in common, so that both are no sample of seeds."""
    seeds = [{row.get("seed", config.get("seed", 0)) for row in rows} for config, rows in zip(configs, tables)]
    same = [i for i, own in enumerate(settings) if i != index and own == settings[index]]
    return any(seeds[i] & seeds[index] for i in same)


def agreed(trees: list[dict]) -> dict:
    """One nested dict of several: a value where all have the same, else the list of different values."""
    result = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree[key] for tree in trees if key in tree]
        if all(isinstance(value, dict) for value in values):
            result[key] = agreed(values)
        else:
            different = list({json.dumps(value): value for value in values}.values())
            result[key] = different[0] if len(different) == 1 else different
    return result


def has_rows(folder: pathlib.Path) -> bool:
    return (folder / METRICS).exists() or (folder / workdirs.FOLDER).is_dir()


def whole_rows(file: pathlib.Path) -> list[dict]:
    """Rows of the metrics file of a run; of its newest checkpoint, aloud, where those are not its first ones.

    Raises ValueError where the file is damaged and there is no other copy. Checkpoints that are all damaged, or older
    than their checksums, leave the rows as they are, aloud.
    """
    try:
        saved = workdirs.newest(file.parent)
    except intact.DamagedError as error:
        rows = read_rows(file)
        workdirs.say(f"{error} The rows of {file.name} are used; whether they are all is not known.")
        return rows
    if saved is None:
        return read_rows(file)
    known = plain(saved.progress.rows)
    try:
        rows = read_rows(file)
        reason = "" if rows[: len(known)] == known else f"{file} is not as it was written"
    except (FileNotFoundError, ValueError) as error:
        rows, reason = known, str(error)
    if reason:
        workdirs.say(f"{reason}; the rows of the newest checkpoint are used")
        return known
    return rows


def read_dict(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; it must hold a JSON object.")
    return value


def main(argv: list[str] | None = None) -> None:
    """`python -m sparsity_jax.report --workdir DIR`: rebuilds the report of a run from its files."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_jax.report", description="Rebuild a run's report.html.")
    parser.add_argument(
        "--workdir", required=True, help="folder of the run, or of several runs in folders of their own"
    )
    parser.add_argument("--title", help="title of the page; default: the config's, else the folder's name")
    parser.add_argument("--out", help="folder for report.html and figures/; default: that of --workdir")
    options = parser.parse_args(argv)
    try:
        config, rows, environment = gather(options.workdir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    name = pathlib.Path(options.workdir).resolve().name
    title = options.title or (config["title"] if isinstance(config.get("title"), str) else "") or name
    out = options.out or options.workdir
    try:
        path = write(out, config, rows, title=title, environment=environment)
    except OSError as error:
        parser.error(f"{out} cannot be written ({error}); --out names another folder for the report.")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
