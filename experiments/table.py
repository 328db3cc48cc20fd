"""Prints a run's results as a Markdown table: `python experiments/table.py runs/NAME [--ratios 0 0.5 0.9 0.98]`."""

import argparse
import pathlib
import statistics

from sparsity_jax import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
    arguments = parser.parse_args()
    rows = report.read_rows(arguments.workdir / "metrics.jsonl")
    curves = [row for row in rows if row["kind"] == "curve" and row["split"] == "test"]
    print("| network | " + " | ".join(f"{100 * ratio:g}%" for ratio in arguments.ratios) + " | training s |")
    print("|---" * (len(arguments.ratios) + 2) + "|")
    for arm, stage in dict.fromkeys((row["arm"], row["stage"]) for row in curves):
        cells = []
        for ratio in arguments.ratios:
            found = [100 * r["accuracy"] for r in curves if (r["arm"], r["stage"], r["ratio"]) == (arm, stage, ratio)]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "-")
        times = [row["seconds"] for row in rows if row["kind"] == "train" and row["arm"] == arm]
        cells.append(f"{max(times):.0f}" if times else "-")
        print(f"| {arm} ({stage}) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
