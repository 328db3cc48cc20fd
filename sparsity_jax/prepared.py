"""Sets prepared by TFDS as array_record, read without TensorFlow.

Nothing that a set's files say is executed or imported: of the metadata of TFDS, names and numbers
are read as JSON.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sparsity_jax.sources import Opened, Pairs, Source, UnreadableError
from sparsity_jax.tables import ConfigError, closest
from sparsity_jax.types import Config

__all__ = [
    "Keys",
    "Records",
    "find_prepared",
    "name_hint",
    "open_prepared",
    "prepared_formats",
    "tfds_directory",
]

# classes of TFDS whose records are read here, with the field of features.json that describes them
_TFDS_FEATURES = {
    "image": "tensorflow_datasets.core.features.image_feature.Image",
    "classLabel": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
}
_TEST_SPLITS = ("test", "validation", "val")
_TFDS_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_VERSION = r"\d+\.\d+\.\d+"


class Keys(NamedTuple):
    """Names of the two features of a record that are read."""

    image: str
    label: str


def open_prepared(name: str, data_dir: str, train_split: str, test_split: str) -> Opened:
    """The set `name` of TFDS; see `data.Options` for the arguments. Its metadata is read, and the
    records of each file are counted. Raises ConfigError if it cannot be used.
    """
    directory = find_prepared(name, data_dir)
    if directory is None:
        raise ConfigError(_not_prepared(name, data_dir))
    again = _prepare_command(name, data_dir, "--overwrite")
    formats = prepared_formats(directory)
    if "array_record" not in formats:
        raise ConfigError(
            f"{directory} is prepared as {', '.join(formats)}, which only TensorFlow reads; "
            f"prepare it again as array_record: {again} (or into another --data_dir)."
        )
    keys, num_classes, channels = _read_features(name, directory)
    splits = _read_splits(directory)
    usual = [split for split in _TEST_SPLITS if split in splits]
    if not test_split and usual:
        test_split = usual[0]
    if not test_split:
        raise ConfigError(
            f"{name!r} has the splits {', '.join(map(repr, splits))} and none for testing; cut "
            "one, e.g. config.data.train_split='train[:90%]' and test_split='train[90%:]'."
        )
    sources = []
    parts = []
    for field, split in dict(train_split=train_split, test_split=test_split).items():
        given = f"config.data.{field} is {split!r}"
        own = _file_parts(name, splits, given, split)
        for part in own:
            _check_file(part, again)
            parts.append((given, part))
        sources.append(_records_source(f"{directory}, split {split!r}", own, keys))
    for (first, a), (second, b) in itertools.combinations(parts, 2):
        begin = max(a.skip, b.skip)
        end = min(a.skip + a.take, b.skip + b.take)
        if a.filename == b.filename and begin < end:
            other = "names some images twice" if first == second else f"{second} share images"
            raise ConfigError(f"{first}, {other}.")
    train, test = sources
    return Opened(train, test, num_classes, channels)


# What is there ------------------------------------------------------------------------------------


def tfds_directory(data_dir: str) -> pathlib.Path:
    """Where TFDS keeps prepared sets: `data_dir`, or TFDS's own default if that is ""."""
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(os.path.expanduser(place))


def find_prepared(name: str, data_dir: str) -> pathlib.Path | None:
    """The directory of the newest prepared version of `name` (forms: see `data.Options`), or None
    if there is none.

    Raises ConfigError if `name` is malformed, or has several prepared configs and does not say
    which.
    """
    if not re.fullmatch(rf"\w+(/[\w.+-]+)?([:/]{_VERSION})?", name):
        raise ConfigError(
            f"config.data.name is {name!r}; allowed: 'digits', 'folder:PATH', or a TFDS set as "
            "'name', 'name/config', 'name:version'."
        )
    root = tfds_directory(data_dir) / name.replace(":", "/")
    if not os.path.isdir(root):
        return None
    versions = {}
    for file in root.rglob("dataset_info.json"):
        path = file.parent
        if re.fullmatch(_VERSION, path.name):
            versions[path] = [int(number) for number in path.name.split(".")]
    configs = {f"{name}/{path.parent.name}" for path in versions}
    if len(configs) > 1:
        choices = ", ".join(map(repr, sorted(configs)))
        raise ConfigError(
            f"config.data.name is {name!r}, of which several configs are prepared: {choices}."
        )
    return max(versions, key=versions.__getitem__, default=None)


def _not_prepared(name: str, data_dir: str) -> str:
    import tensorflow_datasets as tfds  # half a second to import, for the names it knows

    root = tfds_directory(data_dir)
    there = []
    if os.path.isdir(root):
        there = sorted(path.name for path in root.glob("*/"))
    known = tfds.list_builders(with_community_datasets=False)
    return (
        f"config.data.name is {name!r}, which is not prepared in {root} (there: "
        f"{', '.join(there) or 'nothing'}).{name_hint(name, [*there, *known, 'digits'])} To "
        'prepare it once, online: pip install "sparsity_jax[prepare]" && '
        f"{_prepare_command(name, data_dir)}. Sets without preparation: 'digits', 'folder:PATH'."
    )


def prepared_formats(directory: pathlib.Path) -> list[str]:
    """File formats in which a set is prepared. Raises ConfigError if its metadata is damaged."""
    with _metadata(directory / "dataset_info.json") as info:
        return [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())]


def _prepare_command(name: str, data_dir: str, *flags: str) -> str:
    place = []
    if data_dir:
        place = ["--data_dir", str(tfds_directory(data_dir))]
    return shlex.join(["python", "-m", "sparsity_jax.prepare", name, *place, *flags])


def name_hint(name: str, known: Sequence[str]) -> str:
    """` Did you mean ...?` for a misspelled name, also for a shortened one (svhn), or ""."""
    name = re.split("[:/]", name)[0]
    if name in known:
        return ""
    name = name.lower()
    longer = [other for other in sorted(known) if other.startswith(name)]
    return closest(name, known) or (f" Did you mean {longer[0]!r}?" if longer else "")


# Metadata -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _metadata(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The JSON object in `file`; whatever it lacks becomes a ConfigError that names the file."""
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
    except ConfigError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ConfigError(f"{file} is not the metadata of a TFDS set: {error!r}.") from error


def _read_features(name: str, directory: pathlib.Path) -> tuple[Keys, int, int]:
    """(names of image and label, number of classes, channels or 0) of a prepared set."""
    with _metadata(directory / "dataset_info.json") as info:
        # written in one of two ways; of the words in it only names of features count below
        preferred = re.findall(r'[^"]+', json.dumps(info.get("supervisedKeys")))
    with _metadata(directory / "features.json") as stored:
        features = (stored.get("featuresDict") or stored["content"])["features"]
        image = _pick_feature(name, features, "image", [*preferred, "image"])
        label = _pick_feature(name, features, "classLabel", [*preferred, "label"])
        about = features[image]["image"]
        kind = about.get("dtype") or "uint8"
        if kind != "uint8":
            raise ConfigError(f"{name!r} has {kind} images; only uint8 images can be read.")
        shape = about.get("shape", {})
        dimensions = shape.get("dimensions", ["-1"])
        channels = {1: 1, 3: 3, 4: 3}.get(int(dimensions[-1]), 0)
        classes = features[label]["classLabel"]
        num_classes = int(classes.get("numClasses", 0))
    return Keys(image, label), num_classes, channels


def _pick_feature(name: str, features: Config, kind: str, preferred: Sequence) -> str:
    """The feature of a kind of `_TFDS_FEATURES`: the first of `preferred` that is one, or else the
    only one.
    """
    python_class = _TFDS_FEATURES[kind]
    fitting = []
    for key, feature in features.items():
        if kind in feature and feature.get("pythonClassName") == python_class:
            fitting.append(key)
    named = [key for key in preferred if key in fitting]
    if named:
        return named[0]
    if len(fitting) != 1:
        needed = f"it needs one {python_class.rpartition('.')[2]} feature"
        has = ", ".join(map(repr, fitting)) or "none"
        raise ConfigError(f"{name!r} is no image classification set: {needed} and has {has}.")
    return fitting[0]


def _read_splits(directory: pathlib.Path) -> Any:
    """The splits of a prepared set as TFDS's own table, which understands slices."""
    import tensorflow_datasets as tfds

    splits = []
    with _metadata(directory / "dataset_info.json") as info:
        for split in info["splits"]:
            files = tfds.core.ShardedFileTemplate(
                data_dir=directory,
                template=split.get("filepathTemplate") or _TFDS_TEMPLATE,
                dataset_name=info["name"],
                split=split["name"],
                filetype_suffix="array_record",
            )
            lengths = list(map(int, split.get("shardLengths", ())))
            splits.append(tfds.core.SplitInfo(split["name"], lengths, 0, files))
        return tfds.core.SplitDict(splits)


def _file_parts(name: str, splits: Any, given: str, split: str) -> list[Any]:
    """TFDS's instructions of what to read for a split or slice: filename, skip, take and
    examples_in_shard each. given: by which option.
    """
    try:
        parts = [part for part in splits[split].file_instructions if part.take]
    except Exception as error:  # its parser of slices has many
        known = f"{', '.join(map(repr, splits))}, and slices such as 'train[:90%]'"
        text = f"{given}; {name!r} has the splits {known}. TFDS says: {error}"
        raise ConfigError(text) from error
    if not parts:
        raise ConfigError(f"{given}, which is empty.")
    return parts


# Records ------------------------------------------------------------------------------------------


def _check_file(part: Any, again: str) -> None:
    """Raises ConfigError unless the file of a part holds as many records as the metadata says."""
    from array_record.python import array_record_module

    file = part.filename
    count = part.examples_in_shard
    try:
        reader = array_record_module.ArrayRecordReader(str(file))
        stored = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        text = f"{file} cannot be read, prepare the set again ({again}): {error}"
        raise ConfigError(text) from error
    if stored != count:
        raise ConfigError(
            f"{file} holds {stored} records, dataset_info.json counts {count}; prepare the "
            f"set again: {again}"
        )


def _records_source(name: str, parts: Sequence[Any], keys: Keys) -> Source:
    from array_record.python import array_record_data_source

    records = array_record_data_source.ArrayRecordDataSource(parts)
    reader = Records(records, name, keys)
    return Source(len(records), reader.read, reader.describe)


class Records(NamedTuple):
    """The records of a split, which can travel to other processes."""

    records: Any  # a data source of array_record
    name: str
    keys: Keys

    def describe(self, index: int) -> str:
        """The place of a record, for errors."""
        return f"{self.name}, record {index}"

    def read(self, indices: Sequence[int]) -> Pairs:
        """Encoded image and label of each record."""
        try:
            raw = self.records.__getitems__(list(indices))
        except (RuntimeError, IndexError, ValueError) as error:  # for a damaged file
            if len(indices) > 1:
                return [self.read([index])[0] for index in indices]
            where = self.describe(indices[0])
            raise UnreadableError(f"{where} cannot be read: {error}") from error
        records = zip(raw, indices)
        return [self.parse(*record) for record in records]

    def parse(self, record: bytes, index: int) -> tuple[bytes, int]:
        """Encoded image and label. Parsed here, which is 4 times as fast as by TFDS."""
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_generated_pb2

        try:
            example = tf_example_generated_pb2.Example.FromString(record)
        except DecodeError:
            where = self.describe(index)
            raise UnreadableError(f"{where} is damaged: it is no example of TFDS.") from None
        feature = example.features.feature
        images = feature[self.keys.image].bytes_list.value
        labels = feature[self.keys.label].int64_list.value
        if len(images) != 1 or len(labels) != 1:
            image, label = self.keys
            needed = f"one image under {image!r} and one whole number under {label!r}"
            has = f"{len(images)} and {len(labels)}"
            raise UnreadableError(f"{self.describe(index)} needs {needed}; it has {has}.")
        return images[0], labels[0]
