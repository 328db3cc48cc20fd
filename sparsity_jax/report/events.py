"""Rows on their way out of a running stage: to `metrics.jsonl` and to TensorBoard events."""

import pathlib
from collections.abc import Iterable
from typing import Self

from sparsity_jax.report import files
from sparsity_jax.report.files import AnyPath, Rows

STEPS = {  # of rows of each kind: the field that is the step axis, and how many steps its unit has
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
WHICH = {  # fields that say which row it is
    *("visit", "member", "epoch", "step", "ratio", "iteration", "seed", "quantile", "probe"),
    *("draw", "layout"),
}
USUAL = {"split": "test", "selection": "global", "scope": "kernels"}  # a curve's tag omits these


class Writer:
    """Appends rows to `workdir/metrics.jsonl` and their numbers to events in `workdir/tensorboard`.

    Both start as exactly `rows_so_far`: what a killed run wrote after its last checkpoint is
    dropped on resume. Events hold every number of the rows, nested ones too, but no lists (spectra,
    histograms, norms of single groups). Tags are `stage/field` and `stage/field/name`. The step
    axis is `step` for train rows, `iteration` for SFW-Init, the ratio in billionths (90 % =
    900,000,000) for curves, paths and searches of a limit, the quantile likewise for row norms, the
    probe for spectra, the draw for noise, and `visit` otherwise. Rows told apart by more than that
    get a longer tag: those of a later visit (`fit/train_loss/visit_2`), those of a curve that is
    not global, kernels-only, not retrained on test data (`curve/accuracy/train`), and once rows of
    several members have been seen the member is named (`fit/train_loss/member_1`).
    """

    def __init__(self, workdir: AnyPath, rows_so_far: Iterable[dict] = ()):
        from tensorboardX import FileWriter

        workdir = pathlib.Path(workdir)
        rows = list(rows_so_far)
        lines, self._sum = files.to_lines(rows)
        files.write_atomic(workdir / files.METRICS, lines.encode())
        events = workdir / "tensorboard"
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        self._members: set[int] = set()
        self._events = FileWriter(str(events))
        self._file = (workdir / files.METRICS).open("a", encoding="utf-8")
        self._add_events(rows)

    def append(self, rows: Rows) -> None:
        """Writes all rows and flushes. A row that cannot be written raises; then none of them is
        written.
        """
        lines, self._sum = files.to_lines(rows, self._sum)
        self._file.write(lines)
        self._file.flush()
        self._add_events(rows)

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_events(self, rows: Rows) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._members |= {row.get("member", 0) for row in rows}
        for row in map(files.plain, rows):
            member = f"/member_{row.get('member', 0)}" if len(self._members) > 1 else ""
            tags, step = scalars(row)
            summary = Summary()
            for tag, value in tags.items():
                summary.value.add(tag=tag + member, simple_value=value)
            if tags:
                self._events.add_summary(summary, step)
        self._events.flush()


def scalars(row: dict) -> tuple[dict[str, float], int]:
    """({tag: value} of every number a plain row holds but those that say which row it is, step)."""
    visit = row.get("visit", 1)
    field, unit = STEPS.get(row["kind"], ("visit", 1))
    words = []
    if row["kind"] == "curve":
        words += [row[key] for key, value in USUAL.items() if row.get(key, value) != value]
        words += ["retrained"] if row.get("retrained") else []
    if field != "visit" and visit != 1:
        words.append(f"visit_{visit}")
    told = {key: value for key, value in row.items() if key not in WHICH and "." not in key}
    tags = {}
    for path, value in numbers(told).items():
        tags["/".join([row["stage"], path, *words])] = value
    otherwise = row.get("epoch", 0) if field == "step" else 0
    return tags, round(unit * row.get(field, otherwise))


def numbers(tree: dict) -> dict[str, float]:
    """The numbers of a nested dict by path; no lists and no truth values."""
    values = {}
    for path, value in files.flatten(tree, separator="/"):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            values[path] = float(value)
    return values
