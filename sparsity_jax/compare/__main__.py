"""`python -m sparsity_jax.compare DIR...`: runs and sweeps in one table, and on one page."""

import argparse
import shutil
import sys
from pathlib import Path

from sparsity_jax import compare, imports, runs
from sparsity_jax.compare import lines
from sparsity_jax.report.runs import Run, merged
from sparsity_jax.report.sections import joined

_NAME = "compare"  # of the files in --out


def main(argv: list[str] | None = None) -> int:
    """Parses `argv`, default the command line; 1 if a folder could not be read, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        for file in options.files:
            imports.load(file)
        several, problems = _readable(options.workdirs)
        for problem in problems:
            sys.stderr.write(f"left out: {problem}\n")
        if not several:
            return 1
        rows = merged(several).rows
        told = compare.compared(
            rows, ratios=options.ratios, metrics=options.metrics, decimals=options.decimals
        )
        if not told.lines:
            raise ValueError("no run has trained or measured a network yet; there is no table.")
        _write(options, several, told)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return int(bool(problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_jax.compare",
        description="Runs and sweeps in one table by the settings in which they differ.",
    )
    add = parser.add_argument
    add("workdirs", nargs="+", metavar="DIR", help="folder of a run, a sweep, or several runs")
    add("--ratios", type=float, nargs="+", default=lines.RATIOS, help="shares of removed weights")
    add(
        "--metric",
        dest="metrics",
        metavar="STAGE.FIELD",
        action="append",
        default=[],
        help="a number of rows, such as compact.flops_compact; may be repeated",
    )
    add("--decimals", type=int, default=2, help="of accuracies in percent")
    add("--out", type=Path, help=f"folder for {compare.PAGE}, {_NAME}.csv and {_NAME}.md")
    add("--csv", type=Path, help="file for the numbers")
    add("--markdown", type=Path, help="file for the table")
    add("--title", default="Comparison", help="title of the page")
    imports.add_option(parser)
    return parser


def _readable(workdirs: list[str]) -> tuple[list[Run], list[str]]:
    """The runs in all folders, and a sentence per folder that has none or is damaged."""
    every: dict[Path, Run] = {}
    problems = []
    for workdir in workdirs:
        try:
            several = runs.several(workdir)
            merged(several)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        for run in several:
            every[run.folder.resolve()] = run
    return list(every.values()), problems


def _write(options: argparse.Namespace, several: list[Run], told: compare.Comparison) -> None:
    """Prints the table, and writes the files that are asked for."""
    table = compare.texts(told)
    table.index += 1
    for number, line in zip(table.index, told.lines):
        sys.stdout.write(f"{number}: {joined(line.label, line.variant)}\n")
    width = shutil.get_terminal_size().columns
    sys.stdout.write(f"{table.loc[:, 'seeds':].to_string(line_width=width)}\n")
    for sentence in compare.notes(told):
        sys.stdout.write(f"{sentence}\n")
    csv = [options.csv]
    markdown = [options.markdown]
    if options.out:
        path = compare.write(options.out, several, told, options.title)
        sys.stdout.write(f"{path}\n")
        csv.append(options.out / f"{_NAME}.csv")
        markdown.append(options.out / f"{_NAME}.md")
    for file in filter(None, csv):
        compare.numbers(told).to_csv(file, index=False)
    for file in filter(None, markdown):
        file.write_text(compare.markdown(told), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
