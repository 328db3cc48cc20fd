"""`python -m sparsity_jax.report --workdir DIR`: rebuilds the report of a run from its files."""

import argparse
import sys

from sparsity_jax import imports, report
from sparsity_jax.report import files

_OPTIONS = {
    "workdir": "folder of the run, or of several runs in folders of their own",
    "title": "title of the page; default: the config's, else the folder's name",
    "out": "folder for report.html and figures/; default: that of --workdir",
}


def main(argv: list[str] | None = None) -> None:
    """Parses `argv`, default the command line, and prints the path of the page."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_jax.report", description="Rebuild a run's report.html."
    )
    for name, words in _OPTIONS.items():
        parser.add_argument(f"--{name}", required=name == "workdir", help=words)
    imports.add_option(parser)
    options = parser.parse_args(argv)
    try:
        for file in options.files:
            imports.load(file)
        config, rows, environment = report.gather(options.workdir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    out = options.out or options.workdir
    title = options.title or files.title_of(config, options.workdir)
    try:
        path = report.write(out, config, rows, title=title, environment=environment)
    except OSError as error:
        parser.error(
            f"{out} cannot be written ({error}); --out names another folder for the report."
        )
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
