"""Compiled programs, kept in the user's cache folder: the second start of a run, a resume and the
members of a sweep read them instead of compiling them again.

Only command lines call `keep`; no function of the library does, and no import.
"""

import os
import platform
import tempfile
import time
import warnings
import zlib
from pathlib import Path

from sparsity_jax.workdirs import say

__all__ = ["FLAG", "HELP", "folder", "keep"]

_UNUSED_DAYS = 30  # after which a program is removed
FLAG = "compilation_cache"
HELP = (
    "Keep compiled programs in $XDG_CACHE_HOME/sparsity_jax, by default ~/.cache/sparsity_jax, for "
    "other starts; what was not used for 30 days is removed. JAX_COMPILATION_CACHE_DIR in the "
    "environment names another folder, which is left to JAX."
)


def folder() -> Path:
    """Where the programs for this kind of processor are. Raises RuntimeError without a home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = named if named.is_absolute() else Path("~/.cache").expanduser()
    return base / "sparsity_jax" / "programs" / _processor()


def _processor() -> str:
    """A name of the kind of processor, of all whose home is one folder: XLA compiles for this one,
    and its programs may crash on another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not on Linux
        lines = [platform.processor()]
    telling = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    kind = "\n".join(sorted(telling or lines[:1]))
    return f"{platform.machine()}-{zlib.crc32(kind.encode()):08x}"


def keep() -> None:
    """Lets JAX keep and find programs in `folder`, however fast they compile.

    A folder of the user's own, in the environment, comes first. One that cannot be written costs no
    more than a line.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write there runs code
        tempfile.TemporaryFile(dir=place).close()
    except (OSError, RuntimeError) as error:
        say(f"compiled programs are not kept: {error}")
        return
    _remove_unused(place.parent)
    # of a disk that is full, or an entry that was cut off: the program is compiled
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")

    import jax  # here, so that command lines can tell mistakes before it is there

    jax.config.update("jax_compilation_cache_dir", str(place))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _remove_unused(place: Path) -> None:
    """Removes the files below that were neither written nor read for a month; other processes
    may do the same.
    """
    oldest = time.time() - _UNUSED_DAYS * 24 * 3600
    for parent, _, names in os.walk(place):
        for name in names:
            path = Path(parent, name)
            try:
                used = path.stat()
                if max(used.st_atime, used.st_mtime) < oldest:
                    path.unlink()
            except OSError:  # somebody else's, or removed by now
                continue
