"""The console script: `sparsity-jax run ...` is `python -m sparsity_jax.run ...`."""

import runpy
import sys

from sparsity_jax import tables

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "run": "train, prune and measure as a config says, or go on with it",
    "report": "draw the report of a run again",
    "compare": "put several runs into one table and on one page",
    "evaluate": "measure the networks of a run, and export them",
    "prepare": "download sets of images",
}


def main() -> None:
    """Runs the command that the first argument names, with the others; prints all without one."""
    _, *arguments = sys.argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write("usage: sparsity-jax COMMAND ..., see sparsity-jax COMMAND --help\n\n")
        for name, what in COMMANDS.items():
            sys.stdout.write(f"  {name:<10}{what}\n")
        return
    name, *sys.argv[1:] = arguments
    try:
        tables.lookup(COMMANDS, name, "the command")
    except tables.ConfigError as error:
        sys.exit(f"error: {error}")
    runpy.run_module(f"sparsity_jax.{name}", run_name="__main__", alter_sys=True)
