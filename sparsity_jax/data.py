"""Image classification sets as uint8 arrays in memory, and the augmentation that runs on the device inside the step.

`load` reads the digits inside scikit-learn, any prepared TFDS set (without TensorFlow) or a folder of images, decodes
it once and keeps it in memory; or it leaves the images where they are, for `stream` to read. Nothing is downloaded
here: `python -m sparsity_jax.prepare` does that.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import stopping
from sparsity_jax.tables import ConfigError, Count, Fraction, Index, Positive, check_options, closest, defaults, lookup

CHUNK = 500  # records one thread reads and decodes at a time
DECODE = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION  # 8 bit, grey or BGR as stored, no alpha, no EXIF turning
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Split(NamedTuple):
    """Images and their classes, in a fixed order."""

    images: "np.ndarray | Stream"  # uint8 [N, H, W, C], C is 1 or 3 (RGB)
    labels: np.ndarray | None  # int32 [N], in 0..num_classes-1; None with a Stream, which reads them with the images


class Dataset(NamedTuple):
    """A set. `test.images.shape[1:]` is what the network sees; train images in memory may be larger, see `load`."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...]


class Source(NamedTuple):
    """One split that is there but not decoded."""

    size: int
    read: Callable[[Sequence[int]], list[tuple[Any, int]]]  # indices -> (encoded bytes or uint8 [H, W], label) of each
    describe: Callable[[int], str]  # where item i comes from, for errors


@dataclasses.dataclass(frozen=True)
class Stream:
    """Images that stay where they are until `stream` reads them; stands where an array of this shape would."""

    source: Source
    indices: np.ndarray  # of `source`, in the split's order
    shape: tuple[int, int, int, int]  # [N, H, W, C]
    num_classes: int
    options: Mapping[str, Any]  # of `load`


class Opened(NamedTuple):
    train: Source
    test: Source
    num_classes: int
    channels: int  # 0: decided by the first train image


class Normalization(NamedTuple):
    mean: tuple[float, ...]
    std: tuple[float, ...]


NORMALIZATIONS = {  # constants in common use, for images scaled to [0, 1]; CIFAR-10 as in the reference experiments
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": Normalization((0.2860,), (0.3530,)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "svhn_cropped": Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


# Loading


def load(
    *,
    name: str = "digits",
    data_dir: str = "",
    image_size: Index = 0,
    train_image_size: Index = 0,
    channels: Literal[0, 1, 3] = 0,
    train_split: str = "train",
    test_split: str = "",
    train_limit: Index = 0,
    test_limit: Index = 0,
    normalization: Literal[
        "auto", "computed", "none", "cifar10", "cifar100", "fashion_mnist", "imagenet", "mnist", "svhn_cropped"
    ] = "auto",
    stream: bool = False,
    resize_size: Index = 0,
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0),
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3),
    workers: Index = 0,
    prefetch: Count = 4,
    unreadable: Literal["stop", "skip"] = "stop",
) -> Dataset:
    """A whole set, decoded into memory or, with `stream`, left where it is.

    name: `digits` (1,797 grey 8x8 images inside scikit-learn, every fifth of each class is test: 1,437 / 360);
        `folder:PATH` (`PATH/train/CLASS/**/*.png` and `PATH/test/...` or `PATH/val/...`; classes are numbered in sorted
        order; the official Tiny-ImageNet folder works as it is); anything else is a set prepared by TFDS as
        array_record, `name`, `name/config` or `name:version` (without a version the newest there).
    data_dir: of TFDS; "" is TFDS's own default, `TFDS_DATA_DIR` or `~/tensorflow_datasets`. Other sets ignore it.
    image_size: every image becomes a square of this side: its central square, resized (area average to shrink, bilinear
        to grow). 0 leaves images as they are; they must then all have the same shape.
    train_image_size: the same for train images only, for `resized_crop_flip`, which crops from larger images and
        returns the network's size (Tiny-ImageNet: 64 with image_size 32). 0 is image_size.
    channels: 1 is luminance (Rec. 601), 3 repeats grey; 0 is as stored (of a folder: as the first train image). Alpha
        is dropped and 16-bit images become 8-bit.
    train_split, test_split: split names, of TFDS also slices such as "train[:90%]"; of a folder its directories. The
        two must not overlap. test_split "" is "test", else "validation" or "val".
    train_limit, test_limit: keep at most this many images, spread evenly over the stored order and the same every time;
        a smaller limit keeps a subset of a larger one. 0 keeps all.
    normalization: mean and std are those published for the set if there are any and "computed" from the loaded train
        images otherwise ("auto", of a stream: those of ImageNet), those of a named set, or 0 and 1 ("none").
    stream: the splits hold a `Stream` and no labels. Needs image_size, the side of the square crops that the network
        sees; the other fields below are of streams only.
    resize_size: test images are resized to this shorter side, of which the central square stays; 0 is 8/7 of
        image_size (256 for 224).
    crop_scale, crop_ratio: least and largest area (as a share of the image's) and ratio of width to height of the
        random part of a train image; (1, 1) and (1, 1) is always its central square.
    workers: processes that read and decode; 0 does it in threads of this one, as many as it has CPU cores.
    prefetch: batches read ahead.
    unreadable: an image that cannot be decoded stops the run, or is replaced by the next one that can (`skip`; in
        evaluation it is left out).

    Raises ConfigError for whatever `check` finds, and for images that are damaged, of differing shape while their size
    option is 0, in colour in a grey set, or without a label.
    """
    options = dict(locals())
    opened = check_and_open(options)
    if stream:
        return streamed(opened, options)
    sizes = {"train": train_image_size or image_size, "test": image_size}
    train = decode_split(opened.train, train_limit, sizes["train"], channels or opened.channels, bool(channels))
    stored = train.images.shape[-1]
    test = decode_split(opened.test, test_limit, sizes["test"], stored, bool(channels))
    for split, labels in (("train", train.labels), ("test", test.labels)):
        if labels.min() < 0 or labels.max() >= opened.num_classes:
            raise ConfigError(
                f"{name!r}: the split used for {split} has labels {labels.min()}..{labels.max()} where "
                f"0..{opened.num_classes - 1} are classes; unlabelled splits cannot be used, name another one through "
                f"config.data.{split}_split."
            )
    shapes = [f"{split.images.shape[1]}x{split.images.shape[2]}" for split in (train, test)]
    if shapes[0] != shapes[1] and not train_image_size:
        raise ConfigError(f"{name!r} has train images of {shapes[0]}, test images of {shapes[1]}; set image_size.")
    mean, std = statistics(normalization, name, train.images)
    return Dataset(name, train, test, opened.num_classes, mean, std)


def check(**options) -> None:
    """Raises ConfigError if `load(**options)` could not start: a wrong option, or a set that is not there.

    Reads names and metadata only, no image.
    """
    check_and_open(options)


def check_and_open(options: Mapping[str, Any]) -> Opened:
    known = defaults(load)
    options = known | check_options(load, options, "config.data")
    check_stream(options)
    name, splits = options["name"], (options["train_split"], options["test_split"])
    if name == "digits":
        opened = open_digits(*splits)
    elif name.startswith("folder:"):
        opened = open_folder(name.removeprefix("folder:"), *splits)
    else:
        opened = open_tfds(name, options["data_dir"], *splits)
    if stored := options["channels"] or opened.channels:
        check_normalization(chosen_normalization(options), stored)
    return opened


def check_stream(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of streams without one, and for those that a stream cannot have."""
    given = lambda name: f"config.data.{name} is {options[name]!r}"
    if not options["stream"]:
        for name in ("resize_size", "crop_scale", "crop_ratio", "workers", "prefetch", "unreadable"):
            if options[name] != defaults(load)[name]:
                raise ConfigError(f"{given(name)}, which only a stream uses; set config.data.stream=True.")
        return
    if not options["image_size"]:
        raise ConfigError("config.data.stream needs config.data.image_size, the side of its crops, e.g. 224.")
    if options["train_image_size"]:
        raise ConfigError(f"{given('train_image_size')}; a stream crops train images to image_size: set it to 0.")
    if options["normalization"] == "computed":
        raise ConfigError(f"{given('normalization')}, which needs all images in memory; name a set, or 'none'.")
    if 0 < options["resize_size"] < options["image_size"]:
        raise ConfigError(f"{given('resize_size')}; allowed: from image_size, {options['image_size']}, or 0.")
    for name in ("crop_scale", "crop_ratio"):
        low, high = options[name]
        if not 0 < low <= high:
            raise ConfigError(f"{given(name)}; allowed: two numbers above 0, in ascending order.")


def streamed(opened: Opened, options: dict[str, Any]) -> Dataset:
    """The set of `load`'s options with a `Stream` for each split."""
    splits, name, size = [], options["name"], options["image_size"]
    channels = options["channels"] or opened.channels
    for source, limit in ((opened.train, options["train_limit"]), (opened.test, options["test_limit"])):
        indices = np.asarray(spread(source.size, limit))
        channels = channels or first_channels(source, indices)
        shape = (len(indices), size, size, channels)
        splits.append(Split(Stream(source, indices, shape, opened.num_classes, options), None))
    mean, std = statistics(chosen_normalization(options), name, splits[0].images)
    return Dataset(name, *splits, opened.num_classes, mean, std)


def first_channels(source: Source, indices: Sequence[int]) -> int:
    """1 or 3, as the first image that can be decoded."""
    for index in indices:
        with contextlib.suppress(ConfigError):
            image = as_array(source.read([int(index)])[0][0])
            if image is not None:
                return 1 if image.ndim == 2 else 3
    raise ConfigError(f"{source.describe(int(indices[0]))} and all other images cannot be decoded.")


def decode_split(source: Source, limit: int, size: int, channels: int, convert: bool) -> Split:
    """Read and decode `source` in a pool of threads (OpenCV and the reader release the interpreter lock).

    size: see `fit`. channels 0: as the first image. convert: colour may become grey.
    """
    indices = spread(source.size, limit)

    def decoded(payload: Any, index: int) -> np.ndarray:
        image = as_array(payload)
        if image is None:
            raise ConfigError(f"{source.describe(index)} is not an image that can be decoded; is it damaged?")
        return image

    first = decoded(source.read(indices[:1])[0][0], indices[0])
    target = channels or (1 if first.ndim == 2 else 3)
    shape = fit(first, size, target).shape
    images, labels = np.empty((len(indices), *shape), np.uint8), np.empty(len(indices), np.int32)

    def work(start: int) -> None:
        chunk = indices[start : start + CHUNK]
        for position, (index, (payload, label)) in enumerate(zip(chunk, source.read(chunk)), start):
            image = decoded(payload, index)
            if image.ndim == 3 and target == 1 and not convert:
                raise ConfigError(f"{source.describe(index)} is in colour, the set is grey; set channels to 1 or 3.")
            image = fit(image, size, target)
            if image.shape != shape:
                raise ConfigError(
                    f"{source.describe(index)} is {image.shape[0]}x{image.shape[1]}, {source.describe(indices[0])} is "
                    f"{shape[0]}x{shape[1]}; set image_size, images of differing sizes need one."
                )
            images[position], labels[position] = image, label

    with concurrent.futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, start) for start in range(0, len(indices), CHUNK)]
        try:
            for future in futures:
                stopping.result_of(future)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the rest is not decoded
    return Split(images, labels)


def as_array(payload: Any) -> np.ndarray | None:
    """What a `Source` reads, decoded if it is not yet."""
    return payload if isinstance(payload, np.ndarray) else decode(payload)


def decode(data: bytes, reduced: int = 0) -> np.ndarray | None:
    """uint8 [H, W] (grey) or [H, W, 3] (BGR, OpenCV's order); None if `data` is not a whole image.

    reduced: 0, or OpenCV's flag for 1/2, 1/4, 1/8 of the size: 16, 32, 64.
    """
    return cv2.imdecode(np.frombuffer(data, np.uint8), DECODE | reduced) if data else None


def fit(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Grey [H, W] or BGR [H, W, 3] as [h, w, channels] in RGB; h = w = `size` unless that is 0 (unchanged)."""
    if channels == 1:
        image = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    else:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)
    if size and image.shape[:2] != (size, size):
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        method = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
        image = cv2.resize(image[top : top + side, left : left + side], (size, size), interpolation=method)
    return image if image.ndim == 3 else image[:, :, None]


def spread(size: int, limit: int) -> list[int]:
    """`limit` (0: all) of the indices 0..size-1, ascending, evenly spread and nested in those of a larger limit.

    Multiples of the golden ratio, modulo 1, visit every stretch of the order equally often: sets stored class by class
    keep their proportions, and no period in the order is picked up.
    """
    if not limit or limit >= size:
        return list(range(size))
    rank = np.arange(size) * ((5**0.5 - 1) / 2) % 1.0
    return np.sort(np.argsort(rank, kind="stable")[:limit]).tolist()


# Where images come from


def open_digits(train_split: str, test_split: str) -> Opened:
    if train_split != "train" or test_split not in ("", "test"):
        raise ConfigError(f"'digits' has the splits 'train' and 'test', not {train_split!r} and {test_split!r}.")

    def source(size: int, part: int) -> Source:
        return Source(size, lambda indices: [read_digits()[part][i] for i in indices], lambda i: f"digit {i}")

    return Opened(source(1437, 0), source(360, 1), 10, 1)


@functools.cache
def read_digits() -> tuple[list[tuple[np.ndarray, int]], list[tuple[np.ndarray, int]]]:
    """(image, label) of the train and of the test digits. Within each class every fifth image is test."""
    from sklearn import datasets  # a second to import, needed by this set only

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    is_test = np.zeros(len(images), bool)
    is_test[np.argsort(digits.target, kind="stable")[::5]] = True
    train, test = ([(images[i], int(digits.target[i])) for i in np.flatnonzero(part)] for part in (~is_test, is_test))
    return train, test


def open_folder(path: str, train_split: str, test_split: str) -> Opened:
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise ConfigError(f"config.data.name is 'folder:{path}', but there is no directory {root.absolute()}.")
    if not test_split:
        # The official Tiny-ImageNet has a test directory too, without labels.
        order = ("val", "test") if (root / "val" / "val_annotations.txt").is_file() else ("test", "val", "validation")
        test_split = next((split for split in order if (root / split).is_dir()), "test")
    if train_split == test_split:
        raise ConfigError(f"config.data.train_split and test_split are both {train_split!r}.")
    files = {split: list_images(root / split) for split in (train_split, test_split)}
    classes, other = (sorted(files[split]) for split in (train_split, test_split))
    if classes != other:
        only = {split: sorted(set(files[split]) - set(a)) for split, a in ((train_split, other), (test_split, classes))}
        detail = "; ".join(f"only in {split}: {', '.join(map(repr, c[:5]))}" for split, c in only.items() if c)
        raise ConfigError(f"{root}: {train_split} and {test_split} need the same class directories; {detail}.")

    def source(split: str) -> Source:
        items = [(file, label) for label, cls in enumerate(classes) for file in files[split][cls]]
        return Source(
            len(items), lambda indices: [(read_file(items[i][0]), items[i][1]) for i in indices], lambda i: items[i][0]
        )

    return Opened(source(train_split), source(test_split), len(classes), 0)


def list_images(split: pathlib.Path) -> dict[str, list[str]]:
    """Class -> sorted image files below its directory (hidden and other files are passed over); all errors named."""
    if not split.is_dir():
        raise ConfigError(
            f"{split} is missing; a folder needs train/ and test/ (or val/), with one directory per class."
        )
    annotations = split / "val_annotations.txt"
    if annotations.is_file():  # Tiny-ImageNet: "file <tab> class <tab> box" for the files in images/
        files: dict[str, list[str]] = {}
        for line in sorted(filter(str.strip, annotations.read_text(encoding="utf-8").splitlines())):
            file, tab, rest = line.partition("\t")
            if not tab:
                raise ConfigError(f"{annotations}: the line {line!r} is no file and class with a tab between them.")
            cls = rest.partition("\t")[0]
            files.setdefault(cls, []).append(str(split / "images" / file))
        return files
    classes = sorted(entry for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ConfigError(f"{split} has no class directories; put the images of class X into {split / 'X'}.")
    files = {}
    for cls in classes:
        found = (
            os.path.join(parent, file)
            for parent, _, names in os.walk(cls, followlinks=True)
            for file in names
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        files[cls.name] = sorted(found)
        if not files[cls.name]:
            raise ConfigError(f"{cls} has no images ({', '.join(SUFFIXES)}); remove the directory or fill it.")
    return files


def read_file(file: str) -> bytes:
    try:
        return pathlib.Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error


def tfds_directory(data_dir: str) -> pathlib.Path:
    """Where TFDS keeps prepared sets: `data_dir`, or TFDS's own default if that is ""."""
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find_prepared(name: str, data_dir: str) -> pathlib.Path | None:
    """The directory of the newest prepared version of `name` (forms: see `load`), or None if there is none.

    Raises ConfigError if `name` is malformed, or has several prepared configs and does not say which.
    """
    if not re.fullmatch(r"\w+(/[\w.+-]+)?([:/]\d+\.\d+\.\d+)?", name):
        raise ConfigError(
            f"config.data.name is {name!r}; allowed: 'digits', 'folder:PATH', or a TFDS set as 'name', 'name/config', "
            "'name:version'."
        )
    root = tfds_directory(data_dir) / name.replace(":", "/")
    for level in ("", "*/", "*/*/"):  # root is the version, the config, the name
        found = [file.parent for file in root.glob(f"{level}dataset_info.json")]
        found = [path for path in found if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
        configs = sorted({path.parent.name for path in found})
        if len(configs) > 1:
            choices = ", ".join(repr(f"{name}/{config}") for config in configs)
            raise ConfigError(f"config.data.name is {name!r}, of which several configs are prepared: {choices}.")
        if found:
            return max(found, key=lambda path: [int(number) for number in path.name.split(".")])
    return None


def prepared_formats(directory: pathlib.Path) -> list[str]:
    """File formats in which a set is prepared. Raises ConfigError if its metadata is damaged."""
    file = directory / "dataset_info.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        return [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())]
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is not the metadata of a TFDS set: {error}.") from error


def prepare_command(name: str, data_dir: str, *flags: str) -> str:
    where = ["--data_dir", str(tfds_directory(data_dir))] if data_dir else []
    return shlex.join(["python", "-m", "sparsity_jax.prepare", name, *where, *flags])


def name_hint(name: str, known: Sequence[str]) -> str:
    """` Did you mean ...?` for a misspelled name, also for a shortened one (svhn), or ""."""
    name, known = re.split("[:/]", name)[0], sorted(known)
    if name in known:
        return ""
    longer = next((other for other in known if other.startswith(name.lower())), None)
    return closest(name.lower(), known) or (f" Did you mean {longer!r}?" if longer else "")


def open_tfds(name: str, data_dir: str, train_split: str, test_split: str) -> Opened:
    directory = find_prepared(name, data_dir)
    import tensorflow_datasets as tfds  # half a second to import, not needed by the other sets

    if directory is None:
        root = tfds_directory(data_dir)
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        hint = name_hint(name, [*there, *tfds.list_builders(with_community_datasets=False), "digits"])
        raise ConfigError(
            f"config.data.name is {name!r}, which is not prepared in {root} (there: {', '.join(there) or 'nothing'})."
            f'{hint} To prepare it once, online: pip install "sparsity_jax[prepare]" && '
            f"{prepare_command(name, data_dir)}. Sets without preparation: 'digits', 'folder:PATH'."
        )
    formats = prepared_formats(directory)
    if "array_record" not in formats:
        raise ConfigError(
            f"{directory} is prepared as {', '.join(formats)}, which only TensorFlow reads; prepare it again as "
            f"array_record: {prepare_command(name, data_dir, '--overwrite')} (or into another --data_dir)."
        )
    if not (directory / "features.json").is_file():
        raise ConfigError(f"{directory / 'features.json'} is missing; {prepare_command(name, data_dir, '--overwrite')}")
    builder = tfds.builder_from_directory(directory, file_format="array_record")

    features, supervised = builder.info.features, builder.info.supervised_keys or ()
    image_key = pick_feature(name, features, tfds.features.Image, [*supervised, "image"])
    label_key = pick_feature(name, features, tfds.features.ClassLabel, [*supervised, "label"])
    if features[image_key].np_dtype != np.uint8:
        stored_as = np.dtype(features[image_key].np_dtype)
        raise ConfigError(f"{name!r} has {stored_as} images; only uint8 images can be read.")

    splits = builder.info.splits
    if not test_split:
        test_split = next((split for split in ("test", "validation", "val") if split in splits), "")
        if not test_split:
            raise ConfigError(
                f"{name!r} has the splits {', '.join(map(repr, splits))} and none for testing; cut one, e.g. "
                "config.data.train_split='train[:90%]' and test_split='train[90%:]'."
            )

    def source(option: str, split: str) -> tuple[Source, list]:
        try:
            instructions = splits[split].file_instructions
        except (ValueError, KeyError) as error:
            detail = f"config.data.{option} is {split!r}; {name!r} has the splits {', '.join(map(repr, splits))}"
            raise ConfigError(f"{detail}, and slices such as 'train[:90%]'. TFDS says: {error}") from error
        if not sum(instruction.take for instruction in instructions):
            raise ConfigError(f"config.data.{option} is {split!r}, which is empty in {directory}.")
        for instruction in instructions:
            if not os.path.isfile(instruction.filename):
                raise ConfigError(
                    f"{instruction.filename} is missing; {prepare_command(name, data_dir, '--overwrite')} restores it."
                )
        records = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        read = functools.partial(read_records, records, f"{directory}, split {split!r}", image_key, label_key)
        return Source(len(records), read, lambda i: f"{directory}, split {split!r}, record {i}"), instructions

    (train, train_parts), (test, test_parts) = source("train_split", train_split), source("test_split", test_split)
    for a, b in itertools.product(train_parts, test_parts):
        if a.filename == b.filename and max(a.skip, b.skip) < min(a.skip + a.take, b.skip + b.take):
            raise ConfigError(f"config.data.train_split {train_split!r} and test_split {test_split!r} share images.")
    stored = {1: 1, 3: 3, 4: 3}.get(features[image_key].shape[-1], 0)
    return Opened(train, test, features[label_key].num_classes, stored)


def pick_feature(name: str, features: Mapping[str, Any], kind: type, preferred: Sequence[str]) -> str:
    """The feature of type `kind`: the first of `preferred` that is one, or else the only one."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    choice = next((key for key in preferred if key in found), found[0] if len(found) == 1 else None)
    if choice is None:
        raise ConfigError(
            f"{name!r} is no image classification set: it needs one {kind.__name__} feature and has "
            f"{', '.join(map(repr, found)) or 'none'}."
        )
    return choice


def read_records(
    records: Any, where: str, image_key: str, label_key: str, indices: Sequence[int]
) -> list[tuple[bytes, int]]:
    """Encoded image and label of each record. Parsed here, which is 4 times as fast as by TFDS."""
    from tensorflow_datasets.proto import tf_example_generated_pb2

    try:
        raw = records.__getitems__(list(indices))
    except (RuntimeError, IndexError, ValueError) as error:  # array_record's, for a damaged or too short file
        raise ConfigError(f"{where} cannot be read, prepare the set again: {error}") from error
    pairs = []
    for record in raw:
        feature = tf_example_generated_pb2.Example.FromString(record).features.feature
        pairs.append((feature[image_key].bytes_list.value[0], feature[label_key].int64_list.value[0]))
    return pairs


# Normalisation


def chosen_normalization(options: Mapping[str, Any]) -> str:
    """`load`'s option; of a stream "auto" is decided."""
    if options["normalization"] == "auto" and options["stream"]:
        name = re.split("[:/]", options["name"])[0]
        return name if name in NORMALIZATIONS else "imagenet"
    return options["normalization"]


def check_normalization(normalization: str, channels: int) -> None:
    if normalization in NORMALIZATIONS and len(NORMALIZATIONS[normalization].mean) not in (1, channels):
        raise ConfigError(
            f"config.data.normalization {normalization!r} is for 3 channels, the images have {channels}; use "
            "'computed' (a stream: 'none'), or set channels to 3."
        )


def statistics(normalization: str, name: str, images: np.ndarray) -> Normalization:
    """Mean and std of each channel for `load`'s option; those of grey sets are repeated for replicated channels."""
    channels = images.shape[-1]
    check_normalization(normalization, channels)
    if normalization == "none":
        return Normalization((0.0,) * channels, (1.0,) * channels)
    row = NORMALIZATIONS.get(re.split("[:/]", name)[0] if normalization == "auto" else normalization)
    if row is not None and len(row.mean) in (1, channels):
        return Normalization(*(values * (channels // len(values)) for values in row))
    # Exact, from counts of the 256 values; in parts, since bincount copies to int64.
    parts = range(0, len(images), 2000)
    counts = np.array(
        [sum(np.bincount(images[i : i + 2000, ..., c].ravel(), minlength=256) for i in parts) for c in range(channels)]
    )
    values, shares = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    return Normalization(tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist()))  # a constant channel becomes 0


def preprocess(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32) -> jax.Array:
    """`(images / 255 - mean) / std` as `dtype`: uint8 [..., C] and C means and stds. Computed in float32."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) * (1 / (255 * std)) - mean / std).astype(dtype)


# Augmentation: uint8 [B, H, W, C] -> the same, drawn independently for each image; pure, for use inside jit


def shift_flip(images: jax.Array, offsets: jax.Array, flips: jax.Array, padding: int) -> jax.Array:
    """Crop [H, W] at `offsets` (int [B, 2], 0..2*padding) from images padded with 0, mirrored where `flips` (bool [B]).

    One gather with the mirror folded into its column index: 0.2 ms for 128 CIFAR images on 2 CPU cores, where
    selecting among the 81 shifts takes 10 ms.
    """
    batch, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    columns = jnp.where(flips[:, None], jnp.arange(width)[::-1], jnp.arange(width)) + offsets[:, 1:]
    rows = jnp.arange(height) + offsets[:, :1]
    return padded[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def none(key: jax.Array, images: jax.Array) -> jax.Array:
    """The images as they are."""
    del key
    return images


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability 1/2."""
    flips = jax.random.bernoulli(key, shape=(len(images),))
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def pad_crop(key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Pad with black (before normalisation, as torchvision's RandomCrop does) and crop the old size at random."""
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    return shift_flip(images, offsets, jnp.zeros(len(images), bool), padding)


def pad_crop_flip(key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """`pad_crop`, then `flip`: the usual augmentation of CIFAR."""
    crop_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(crop_key, (len(images), 2), 0, 2 * padding + 1)
    return shift_flip(images, offsets, jax.random.bernoulli(flip_key, shape=(len(images),)), padding)


def resized_crop_flip(key: jax.Array, images: jax.Array, size: int = 0) -> jax.Array:
    """A random box of each image, resized to `size` x `size` (0: the old size) and mirrored with probability 1/2.

    The box has 8 % to 100 % of the area and a ratio of width to height of 3/4 to 4/3, drawn as torchvision's
    RandomResizedCrop does: ten attempts, else the largest central box with an allowed ratio. Resizing is bilinear,
    antialiased; at the box's edge it sees the neighbouring pixels of the image, where torchvision sees the box only.
    """
    height, width = images.shape[1:3]
    box_key, flip_key = jax.random.split(key)
    boxes = jax.vmap(lambda k: random_box(k, height, width))(jax.random.split(box_key, len(images)))
    resized = jax.vmap(lambda image, box: resize_box(image, box, size or height, size or width))(images, boxes)
    return flip(flip_key, resized)


def random_box(key: jax.Array, height: int, width: int, attempts: int = 10) -> jax.Array:
    """(top, left, height, width), float32 whole numbers, of a box inside the image; see `resized_crop_flip`."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(area_key, (attempts,), minval=0.08, maxval=1.0)
    log_ratio = jnp.log(jnp.array([3 / 4, 4 / 3]))
    ratio = jnp.exp(jax.random.uniform(ratio_key, (attempts,), minval=log_ratio[0], maxval=log_ratio[1]))
    sizes = jnp.round(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1))
    image = jnp.array([height, width], jnp.float32)
    fits = jnp.all((sizes >= 1) & (sizes <= image), axis=1)
    central = jnp.array([min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))], jnp.float32)
    box = jnp.where(fits.any(), sizes[jnp.argmax(fits)], central)
    places = jnp.floor(jax.random.uniform(place_key, (2,)) * (image - box + 1))
    corner = jnp.where(fits.any(), jnp.minimum(places, image - box), (image - box) // 2)
    return jnp.concatenate([corner, box])


def resize_box(image: jax.Array, box: jax.Array, height: int, width: int) -> jax.Array:
    """The part `box` (top, left, height, width; traced) of a uint8 [H, W, C] image, resized to [height, width, C]."""
    scale = jnp.array([height, width], jnp.float32) / box[2:]
    shape = (height, width, image.shape[2])
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32), shape, (0, 1), scale, -box[:2] * scale, method="linear", antialias=True
    )
    return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": none,
    "flip": flip,
    "pad_crop": pad_crop,
    "pad_crop_flip": pad_crop_flip,
    "resized_crop_flip": resized_crop_flip,
}


def make_augmentation(name: str, dataset: Dataset, where: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`fn(key, images)` of the table which turns `dataset`'s train images into images of the test images' size.

    where: the setting that holds `name`, for errors. Raises ConfigError for an unknown name, and for train images of
    another size (`train_image_size`) with an augmentation that keeps sizes.
    """
    function = lookup(AUGMENTATIONS, name, where)
    stored, wanted = dataset.train.images.shape[1:3], dataset.test.images.shape[1:3]
    if stored == wanted:
        return function
    if name != "resized_crop_flip" or wanted[0] != wanted[1]:
        raise ConfigError(
            f"{where} is {name!r}, which keeps the train images at {stored[0]}x{stored[1]} while the network sees "
            f"{wanted[0]}x{wanted[1]}; use 'resized_crop_flip' with square images, or drop train_image_size."
        )
    return functools.partial(resized_crop_flip, size=wanted[0])
