"""Damages every file of a finished workdir and of an exported folder in every way, and reads, runs
and evaluates each.

    python experiments/robustness/faults.py --workdir /tmp/faults

Faults: every file deleted, emptied, truncated at three places, swapped with `--swaps` others, and
`--flips` single bits of it flipped.
Allowed: the numbers of the whole run, or one sentence that names a file. Prints the count of each;
exits 1 for anything else.
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import shutil
import sys

import jax
import numpy as np

from sparsity_jax import evaluate, optim, pipeline, report, tables, train

OPTIMIZER = optim.settings("sgd", learning_rate=0.1)
CONFIG = {
    "data": dict(name="digits", train_limit=128, test_limit=50),
    "model": dict(name="mlp", widths=(16,)),
    "fit": pipeline.stage("train", epochs=2, batch_size=32, optimizer=OPTIMIZER),
    "weights": pipeline.stage("histogram"),
    "pipeline": ("fit", "weights"),
}
DRAWN = ("figures", "tensorboard", "report.html")  # results that nothing reads back


def timeless(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.parts[0] not in DRAWN)


def faults(folder: pathlib.Path, flips: int, swaps: int, rng: np.random.Generator):
    """(name of the fault, {file: new content, None if deleted}) of every fault."""
    contents = {name: (folder / name).read_bytes() for name in files_of(folder)}
    for name, content in contents.items():
        yield "delete", {name: None}
        yield "empty", {name: b""}
        for share in (0.1, 0.5, 0.9):
            yield "truncate", {name: content[: int(share * len(content))]}
        for _ in range(flips if content else 0):
            changed = bytearray(content)
            changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
            yield "flip", {name: bytes(changed)}
    for name, content in contents.items():
        others = [other for other in contents if contents[other] != content]
        for other in rng.permutation(others)[:swaps]:
            yield "swap", {name: contents[other], other: content}


def same(first, second) -> bool:
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in leaves)


def verdict(check, place: pathlib.Path, names: list[pathlib.Path]) -> str:
    """`right`, `refused`, or what went wrong."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return "right" if check(place) else "ANOTHER NUMBER"
    except (tables.ConfigError, OSError, ValueError) as error:
        named = any(str(name) in str(error) for name in names)
        return "refused" if named else f"refused without a name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def try_all(
    whole: pathlib.Path, place: pathlib.Path, checks: dict, flips: int, swaps: int
) -> collections.Counter:
    names, counts = files_of(whole), collections.Counter()
    for kind, changes in faults(whole, flips, swaps, np.random.default_rng(0)):
        for what, check in checks.items():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole, place, ignore=shutil.ignore_patterns(*DRAWN))
            for name, content in changes.items():
                (place / name).unlink() if content is None else (place / name).write_bytes(content)
            found = verdict(check, place, names)
            counts[what, kind, found] += 1
            if found not in ("right", "refused"):
                sys.stdout.write(f"{what}, {kind} of {', '.join(map(str, changes))}: {found}\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--flips", type=int, default=8, help="flipped bits per file (8)")
    parser.add_argument("--swaps", type=int, default=4, help="files with which each is swapped (4)")
    arguments = parser.parse_args()
    amounts = (arguments.flips, arguments.swaps)
    run, export, place = (arguments.workdir / name for name in ("run", "export", "damaged"))
    outcome = pipeline.run(CONFIG, run)
    rows = timeless(json.loads(json.dumps(outcome.rows)))
    saved = evaluate.open_run(run)
    evaluate.export_run(saved, export)
    variables, _ = evaluate.load(export)
    loss = evaluate.run(run)[0]["test_loss"]
    report.write = lambda workdir, *_, **__: (
        workdir
    )  # the page is drawn of the rows that are compared
    problem = pipeline.build(pipeline.check(CONFIG))
    pipeline.build = lambda _: problem
    evaluate.build = lambda *_: problem

    def gathered(place):
        told = timeless(report.gather(place)[1])
        return told == rows[: len(told)]

    def resumed(place):
        again = pipeline.run(CONFIG, place)
        return (
            same(again.state, outcome.state)
            and timeless(json.loads(json.dumps(again.rows))) == rows
        )

    def evaluated(
        place,
    ):  # of the checkpoint before too: the last stage leaves the network as it is
        network = evaluate.open_run(place).networks[0]
        measured = train.measure(problem, network.state.params, network.state.batch_stats, "test")
        return float(measured.loss) == loss

    checks = {"report": gathered, "run": resumed, "evaluate": evaluated}
    counts = try_all(run, place, checks, *amounts)
    loads = {"load": lambda place: same(evaluate.load(place)[0], variables)}
    counts += try_all(export, place, loads, *amounts)
    for (what, kind, found), number in sorted(counts.items()):
        sys.stdout.write(f"{what:<10}{kind:<10}{number:>6}  {found}\n")
    wrong = sum(
        number for (_, _, found), number in counts.items() if found not in ("right", "refused")
    )
    sys.stdout.write(f"{sum(counts.values())} cases, {wrong} wrong\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
