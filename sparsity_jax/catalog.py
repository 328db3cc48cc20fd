"""The library's own configs by name, so that `--config quickstart` works in any folder."""

import pathlib

from sparsity_jax.tables import ConfigError

__all__ = ["files", "located"]

_HERE = pathlib.Path(__file__).parent
_INSTALLED = _HERE / "configs"  # where setup.py copies them to
_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _HERE.with_name("configs")


def files() -> dict[str, pathlib.Path]:
    """The files of the configs, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.py"))}


def located(given: str) -> str:
    """FILE[:variant] of what `--config` names, a file or a config of the library.

    A file that is there goes first. Raises ConfigError, with the names that are known, where there
    is neither.
    """
    name, colon, variant = given.partition(":")
    known = files()
    if pathlib.Path(name).is_file():
        return given
    if name in known:
        return f"{known[name]}{colon}{variant}"
    beside = map(str, pathlib.Path(name).parent.glob("*.py"))
    raise ConfigError(
        "--config",
        name,
        verb="names",
        why="which is neither a file nor a config of the library",
        allowed=f"a file, {', '.join(known)}",
        known=[*known, *beside],
    )
