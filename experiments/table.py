"""Prints results as a Markdown table: `python experiments/table.py runs/NAME [--ratios 0 0.5 0.9
0.98]`.

Rules and numbers are those of the report: of a folder with several runs, only networks are averaged
whose settings agree in all but the seed. Accuracy in %, mean ± sample standard deviation; training
in seconds, without compilation.
"""

import argparse

from sparsity_jax import report
from sparsity_jax.report import series, summary


def cell(values: tuple[float, float, int] | None, factor: float = 100, decimals: int = 1) -> str:
    """Mean and, of several networks, deviation."""
    if values is None:
        return "–"
    mean, deviation, count = values
    text = f"{factor * mean:.{decimals}f}"
    return f"{text} ± {factor * deviation:.{decimals}f}" if count > 1 else text


def table(rows: list[dict], ratios: list[float]) -> str:
    """A Markdown table of rows as `report.gather` gives them, one line per pruning curve or trained
    network.
    """
    grouped = series.group(rows)
    lines = summary.summarize(grouped, stops=ratios)
    columns = {str(ratio): f"{100 * ratio:g}%" for ratio in ratios}
    columns |= {
        "dense": "unpruned",
        "channels": "channels removed",
        "weights": "weights removed",
        "pruned": "pruned",
    }
    if all("0.0" in line.cells for line in lines):
        columns.pop("dense")
    shown = [column for column in columns if any(column in line.cells for line in lines)]
    text = [f"| network | {' | '.join(columns[column] for column in shown)} | training s |"]
    text.append("|---" * (len(shown) + 2) + "|")
    for line in lines:
        name = ", ".join(filter(None, (line.label, line.variant)))
        cells = [cell(line.cells.get(column)) for column in shown]
        cells.append(cell(line.cells.get("seconds"), factor=1, decimals=0))
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "workdir", help="folder of a run, or of several runs in folders of their own"
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99]
    )
    arguments = parser.parse_args()
    try:
        _, rows, _ = report.gather(arguments.workdir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(rows, arguments.ratios))


if __name__ == "__main__":
    main()
