"""A user's Python file as a module, for names that it registers, see `extend`."""

import argparse
import importlib.util
import os
import pathlib
import sys
import types

from sparsity_jax import tables

__all__ = ["add_option", "load"]


def load(file: str | os.PathLike) -> types.ModuleType:
    """The Python file as a module, run anew. Raises ConfigError where there is none."""
    path = pathlib.Path(file)
    name = f"sparsity_jax_extension_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise tables.ConfigError(
            str(path), why="is no Python file", allowed="a file that registers names"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of options look up their module
    spec.loader.exec_module(module)
    return module


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option `--import FILE` of a command line."""
    parser.add_argument(
        "--import",
        dest="files",
        metavar="FILE",
        action="append",
        default=[],
        help="Python file that registers names of the run's config, see sparsity_jax.extend",
    )
