"""Rows on their way out of a running stage: to `metrics.jsonl`, TensorBoard events, trackers."""

import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from sparsity_jax import intact
from sparsity_jax.report import files
from sparsity_jax.report.trackers import Tracker
from sparsity_jax.types import AnyPath, Row, Rows

__all__ = ["Writer", "scalars"]

_STEPS = {  # of rows of each kind: the field that is the step axis, and how many steps its unit has
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
_WHICH = {  # fields that say which row it is
    *("visit", "member", "epoch", "step", "ratio", "iteration", "seed", "quantile", "probe"),
    *("draw", "layout"),
}
_USUAL = {"split": "test", "selection": "global", "scope": "kernels"}  # a curve's tag omits these


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
    several members have been seen the member is named (`fit/train_loss/member_1`). `trackers` get
    the same numbers, and are closed with the files.
    """

    def __init__(
        self,
        workdir: AnyPath,
        rows_so_far: Iterable[Row] = (),
        trackers: Sequence[Tracker] = (),
    ):
        with _without_torch():
            from tensorboardX import FileWriter

        path = pathlib.Path(workdir) / files.METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = files.plain(list(rows_so_far))
        lines, self._sum = files.to_lines(rows)
        intact.write(path, lines.encode())
        events = path.parent / "tensorboard"
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        self._members: set[int] = set()
        self._trackers = trackers
        self._events = FileWriter(str(events))
        self._file = path.open("a", encoding="utf-8")
        self._add_events(rows)

    def append(self, rows: Rows) -> None:
        """Writes all rows and flushes. A row that cannot be written raises; then none of them is
        written.
        """
        rows = files.plain(rows)
        lines, self._sum = files.to_lines(rows, self._sum)
        self._file.write(lines)
        self._file.flush()
        self._add_events(rows)

    def close(self) -> None:
        """Closes both files and all trackers."""
        self._file.close()
        self._events.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_events(self, rows: Rows) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._members |= {row.get("member", 0) for row in rows}
        for row in rows:
            ending = ""
            if len(self._members) > 1:
                ending = f"/member_{row.get('member', 0)}"
            tags, step = scalars(row)
            numbers = {tag + ending: value for tag, value in tags.items()}
            summary = Summary()
            for tag, value in numbers.items():
                summary.value.add(tag=tag, simple_value=value)
            if numbers:
                self._events.add_summary(summary, step)
                for tracker in self._trackers:
                    tracker.add(row["stage"], numbers, step)
        self._events.flush()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Imports inside find no torch unless it is there already: tensorboardX takes it along, which
    takes six seconds, and needs it for tensors only.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def scalars(row: Row) -> tuple[dict[str, float], int]:
    """({tag: value} of every number a plain row holds but those that say which row it is, step)."""
    axis, unit = _STEPS.get(row["kind"], ("visit", 1))
    ending = ""
    if row["kind"] == "curve":
        for field, usual in _USUAL.items():
            if row.get(field, usual) != usual:
                ending += f"/{row[field]}"
        if row.get("retrained"):
            ending += "/retrained"
    visit = row.get("visit", 1)
    if axis != "visit" and visit != 1:
        ending += f"/visit_{visit}"
    tags = {}
    for key, value in row.items():
        if key not in _WHICH and "." not in key:
            for path, known in _numbers(value, key):
                tags[f"{row['stage']}/{path}{ending}"] = known
    step: float = row[axis] if axis in row else row.get("epoch", 0)
    return tags, round(unit * step)


def _numbers(tree: object, path: str) -> Iterator[tuple[str, float]]:
    """(path, number) of the numbers of a nested dict; no lists and no truth values."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _numbers(value, f"{path}/{key}")
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield path, float(tree)
