"""Checks the promise of the quick start: `python experiments/check_quickstart.py
runs/quickstart/metrics.jsonl`.

Dense accuracy at least 97 % for both optimizers; at 98 % sparsity SFW keeps at least 95 %, SGD
falls below 75 %.
"""

import statistics
import sys

from sparsity_jax import report


def mean_accuracy(rows: list[dict], arm: str, ratio: float) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    found = [
        row["accuracy"]
        for row in rows
        if row["kind"] == "curve" and row["arm"] == arm and row["ratio"] == ratio
    ]
    return statistics.mean(found), statistics.stdev(found)


def main(path: str) -> int:
    rows = report.read_rows(path)
    kept = True
    for arm, dense, least, most in (
        ("SFW, K-sparse polytope", 0.97, 0.95, 1.0),
        ("SGD", 0.97, 0.0, 0.75),
    ):
        at_0, at_98 = mean_accuracy(rows, arm, 0.0), mean_accuracy(rows, arm, 0.98)
        fine = at_0[0] >= dense and least <= at_98[0] < most
        kept &= fine
        numbers = (
            f"dense {at_0[0]:.4f} ± {at_0[1]:.4f}, 98 % sparse {at_98[0]:.4f} ± {at_98[1]:.4f}"
        )
        print(f"{arm}: {numbers}: {'as promised' if fine else 'BROKEN PROMISE'}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
