"""A user's Python file as a module, for names that it registers, see `extend`.

A run remembers which file registered what.
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Iterator

from sparsity_jax import intact, tables
from sparsity_jax.types import AnyPath

__all__ = ["NAMES", "REGISTERED", "add_option", "load", "remember", "remembered", "telling_files"]

NAMES = "names.json"  # in a workdir: the files that registered names, by what and name
REGISTERED: dict[str, dict[str, str]] = {}  # the same in this process


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


def remember(workdir: AnyPath) -> None:
    """Writes to `workdir/names.json` which files have registered names, if any have."""
    path = pathlib.Path(workdir) / NAMES
    if REGISTERED:
        intact.write_recorded(path, {**remembered(workdir), **REGISTERED})


def remembered(workdir: AnyPath) -> dict[str, dict[str, str]]:
    """The files that registered names for the run in `workdir`, by what and name."""
    path = pathlib.Path(workdir) / NAMES
    with contextlib.suppress(FileNotFoundError):
        return intact.read_recorded(path)
    return {}


@contextlib.contextmanager
def telling_files(workdir: AnyPath) -> Iterator[None]:
    """A mistake that the block tells of a name unknown by now says which file registered it for the
    run in `workdir`.
    """
    try:
        yield
    except tables.ConfigError as error:
        sentence = str(error)
        for what, files in remembered(workdir).items():
            for name, file in files.items():
                if name not in REGISTERED.get(what, {}) and repr(name) in sentence:
                    told = f"The run's {what} {name!r} is registered by {file}: --import it, or"
                    load_it = f"extend.load({file!r}) in Python."
                    raise tables.ConfigError(f"{sentence} {told} {load_it}") from None
        raise


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
