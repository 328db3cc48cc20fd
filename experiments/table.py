"""Prints results as a Markdown table: `python experiments/table.py runs/NAME [--ratios 0 0.5 0.9
0.98]`.

The table is that of `python -m sparsity_jax.compare runs/NAME --decimals 1 --markdown FILE`.
"""

import argparse

from sparsity_jax import compare, report


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
    told = compare.compared(rows, ratios=arguments.ratios, decimals=1)
    print(compare.markdown(told), end="")


if __name__ == "__main__":
    main()
