"""Download TFDS image sets once and write them as array_record, which `sparsity_jax.prepared` reads
without TensorFlow.

This is the only part that needs TensorFlow: pip install "sparsity_jax[prepare]".
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence

from sparsity_jax.prepared import find_prepared, name_hint, prepared_formats, tfds_directory
from sparsity_jax.tables import ConfigError

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m sparsity_jax.prepare cifar10 cifar100
  python -m sparsity_jax.prepare mnist fashion_mnist svhn_cropped --data_dir DIR
Then: python -m sparsity_jax.run --config ... with config.data.name = "cifar10"
(and config.data.data_dir = DIR).
Exit codes: 0 prepared, 1 not possible here, 2 wrong arguments.
"""


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_jax.prepare",
        description="Download TFDS image sets once and write them as array_record.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="TFDS set: name, name/config or name:version"
    )
    parser.add_argument(
        "--data_dir",
        default="",
        help="where to put it; default: TFDS_DATA_DIR, or ~/tensorflow_datasets",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a set that is there, e.g. one in another file format",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare every set named in `arguments` (default: the command line) which is not there yet;
    the exit code.

    Errors of the download itself (network, disk, a set that has to be fetched by hand) are TFDS's
    own and pass through.
    """
    parser = _make_parser()
    flags = parser.parse_args(arguments)
    missing = []
    for name in flags.names:
        try:
            directory = find_prepared(name, flags.data_dir)
            formats = prepared_formats(directory) if directory and not flags.overwrite else []
        except ConfigError as error:
            parser.error(str(error))
        if "array_record" in formats:
            _report(f"{name} is prepared already: {directory}")
        elif formats:
            _report(
                f"{directory} is prepared as {', '.join(formats)}; add --overwrite, or use "
                "another --data_dir."
            )
            return 1
        else:
            missing.append(name)
    if not missing:
        return 0

    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    for name in missing:
        hint = name_hint(name, known)
        if re.split("[:/]", name)[0] not in known:
            parser.error(
                f"TFDS has no set {name!r}.{hint} All sets: "
                "https://www.tensorflow.org/datasets/catalog"
            )
    if importlib.util.find_spec("tensorflow") is None:
        _report(
            'Preparing a set needs TensorFlow: pip install "sparsity_jax[prepare]". '
            "Reading it later does not."
        )
        return 1
    mode = (
        tfds.GenerateMode.REUSE_CACHE_IF_EXISTS
        if flags.overwrite
        else tfds.GenerateMode.REUSE_DATASET_IF_EXISTS
    )
    for name in missing:
        builder = tfds.builder(name, data_dir=str(tfds_directory(flags.data_dir)))
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(download_mode=mode),
            file_format="array_record",
        )
        sizes = ", ".join(
            f"{split} {info.num_examples}" for split, info in builder.info.splits.items()
        )
        _report(f"{name} is prepared: {builder.data_path} ({sizes})")
    return 0


def _report(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
