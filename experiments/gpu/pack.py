"""Packs what a GPU machine without a network lacks into one folder, `.gpu` in the root.

    python experiments/gpu/pack.py                  wheels and CIFAR-10
    python experiments/gpu/pack.py --set cifar10 cifar100 --data_dir DIR

`.gpu/wheels` holds packages for x86-64 Linux, `.gpu/datasets` prepared image sets: the same
records in larger groups, which compress better. It needs a package registry and git. Prints how
many MiB the folder and the tracked files take together, and exits with 1 above `--limit_mib`.
"""

import argparse
import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

from array_record.python import array_record_module

from sparsity_jax import prepared

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu"
MIB = 2**20
GROUPS = "group_size:256,zstd:9"
LACKING = (  # beside jax, flax, optax, orbax, torch and their own needs
    "array_record",
    "dm-tree",
    "docstring_parser",
    "googleapis-common-protos",
    "grain",
    "immutabledict",
    "ml_collections",
    "portpicker",
    "promise",
    "simple-parsing",
    "six",
    "tensorboardX",
    "tensorflow-datasets",
    "tensorflow-metadata",
    "termcolor",
    "toml",
)
SOURCE_ONLY = ("promise",)  # the registry has no wheel; it is pure Python, and built here
NEWEST_GLIBC = 39
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, NEWEST_GLIBC + 1)]


# Wheels -------------------------------------------------------------------------------------------


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fetch(requirement: str, folder: pathlib.Path, python: str) -> subprocess.CompletedProcess[str]:
    """pip's attempt to put the wheel of a requirement into `folder`."""
    common = ["--quiet", "--no-deps"]
    name, _, _ = requirement.partition("==")
    if name in SOURCE_ONLY:
        return pip("wheel", *common, "--wheel-dir", str(folder), requirement)
    machine = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    machine += [f"--platform={platform}" for platform in PLATFORMS]
    return pip("download", *common, *machine, "--dest", str(folder), requirement)


def fetch_wheels(folder: pathlib.Path, python: str) -> None:
    """Wheels of LACKING in the versions installed here or, where the registry has none of these for
    that Python, in the newest ones. Raises ValueError for what has none at all.
    """
    for name in LACKING:
        here = f"{name}=={importlib.metadata.version(name)}"
        attempt = fetch(here, folder, python)
        if attempt.returncode:
            print(f"{here} has no wheel for Python {python}; the newest is taken")
            attempt = fetch(name, folder, python)
        if attempt.returncode:
            lines = attempt.stderr.strip().splitlines() or ["pip says nothing"]
            raise ValueError(f"no wheel of {name} for Python {python}: {lines[-1]}")


# Image sets ---------------------------------------------------------------------------------------


def records_of(path: pathlib.Path) -> list[bytes]:
    """All records of an array_record file, in order."""
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        return reader.read_all()
    finally:
        reader.close()


def repack(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the records of the array_record file `source` to `target`, in compressed groups.

    Raises ValueError if `target` does not read back the same.
    """
    records = records_of(source)
    writer = array_record_module.ArrayRecordWriter(str(target), GROUPS)
    for record in records:
        writer.write(record)
    writer.close()
    if records_of(target) != records:
        raise ValueError(f"{target} does not hold the records of {source}.")


def pack_set(name: str, data_dir: str, folder: pathlib.Path) -> None:
    """Puts the prepared set `name` under `folder`, where TFDS looks for it there.

    data_dir: where it is, "" for TFDS's default. Raises ConfigError or ValueError if it is not
    there as array_record.
    """
    place = prepared.find_prepared(name, data_dir)
    root = prepared.tfds_directory(data_dir)
    if place is None:
        raise ValueError(f"{name!r} is not prepared in {root}.")
    formats = prepared.prepared_formats(place)
    if "array_record" not in formats:
        raise ValueError(f"{place} is prepared as {', '.join(formats)}, not as array_record.")
    target = folder / place.relative_to(root)
    target.mkdir(parents=True)
    for file in sorted(path for path in place.iterdir() if path.is_file()):
        copy: Callable[..., object] = shutil.copyfile
        if ".array_record" in file.name:
            copy = repack
        copy(file, target / file.name)
    before, after = bytes_of(place), bytes_of(target)
    print(f"{name}: {before / MIB:.1f} MiB, packed {after / MIB:.1f} MiB, the same records")


# Sizes --------------------------------------------------------------------------------------------


def bytes_in(paths: Iterable[pathlib.Path]) -> int:
    """Bytes of the files among `paths`."""
    total = 0
    for path in paths:
        if path.is_file():
            total += path.stat().st_size
    return total


def bytes_of(folder: pathlib.Path) -> int:
    """Bytes of all files in `folder`."""
    return bytes_in(folder.rglob("*"))


def tracked_bytes() -> int:
    """Bytes of the files that git tracks here."""
    command = ["git", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = listing.stdout.rstrip("\0").split("\0")
    return bytes_in(ROOT / name for name in names)


def tell_sizes(folder: pathlib.Path, limit_mib: float) -> bool:
    """Prints the sizes in MiB; whether their sum is within the limit."""
    packed = bytes_of(folder) / MIB
    tracked = tracked_bytes() / MIB
    total = packed + tracked
    fits = total <= limit_mib
    sizes = f"{folder.name} {packed:.1f} MiB + tracked files {tracked:.1f} MiB = {total:.1f} MiB"
    verdict = "within" if fits else "above"
    print(f"{sizes}, {verdict} the limit of {limit_mib:g} MiB")
    return fits


# Command line -------------------------------------------------------------------------------------


def fill(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Makes `folder` anew; an old one stays until all parts of the new one are there."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gpu_") as place:
        new = pathlib.Path(place) / "new"
        wheels = new / "wheels"
        wheels.mkdir(parents=True)
        for name in options.set:
            pack_set(name, options.data_dir, new / "datasets")
        fetch_wheels(wheels, options.python)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "prepared image sets, by the names of TFDS (default: cifar10)"
    parser.add_argument("--set", nargs="*", default=["cifar10"], metavar="NAME", help=text)
    text = "where they are prepared; default: TFDS_DATA_DIR, or ~/tensorflow_datasets"
    parser.add_argument("--data_dir", default="", help=text)
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine")
    parser.add_argument("--limit_mib", type=float, default=64, help="of folder and tracked files")
    options = parser.parse_args(arguments)
    try:
        fill(FOLDER, options)
        fits = tell_sizes(FOLDER, options.limit_mib)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        parser.exit(1, f"error: {error}\n")
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
