"""What a set is: its options, its splits, and which of their images are used."""

import os
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy import ndarray

from sparsity_jax.tables import Fraction, Index, Range, option

__all__ = [
    "Dataset",
    "FixedSample",
    "Options",
    "Ratio",
    "Side",
    "Split",
    "spread",
    "tell_orientation",
    "usable_cores",
]

Side = Annotated[int, Range(0, 2**15)]
Ratio = Annotated[float, Range(1e-3, 1e3)]


@option
class Options:
    """Which set is loaded, and how.

    name: `digits` (1,797 grey 8x8 images inside scikit-learn, every fifth of each class is test:
        1,437 / 360); `folder:PATH` (`PATH/train/CLASS/**/*.png` and `PATH/test/...` or
        `PATH/val/...`; classes are numbered in sorted order; the official Tiny-ImageNet folder
        works as it is; hidden files and folders do not count, a file counts once however many links
        lead to it; see `decoding.FORMATS` for what is read); anything else is a set prepared by
        TFDS as array_record, `name`, `name/config` or `name:version` (without a version the newest
        there).
    data_dir: of TFDS; "" is TFDS's own default, `TFDS_DATA_DIR` or `~/tensorflow_datasets`. Other
        sets ignore it.
    image_size: every image becomes a square of this side: its central square, resized (bilinear and
        antialiased, see `pixels.resize`). 0 leaves images as they are; they must then all have
        the same shape.
    train_image_size: the same for train images only, for `resized_crop_flip`, which crops from
        larger images and returns the network's size (Tiny-ImageNet: 64 with image_size 32). 0 is
        image_size.
    channels: 1 is luminance (Rec. 601), 3 repeats grey; 0 is as stored (of a folder: as the first
        train image). Alpha is dropped and 16-bit images become 8-bit.
    train_split, test_split: split names, of TFDS also slices such as "train[:90%]"; of a folder its
        directories. The two must not overlap. test_split "" is "test", else "validation" or "val".
    train_limit, test_limit: keep at most this many images, spread evenly over the stored order and
        the same every time; a smaller limit keeps a subset of a larger one. 0 keeps all.
    normalization: mean and std are those published for the set if there are any and "computed" from
        the loaded train images otherwise ("auto", of a stream: those of ImageNet), those of a named
        set, or 0 and 1 ("none").
    stream: the splits hold a `Stream` and no labels. Needs image_size, the side of the square crops
        that the network sees; the other fields below are of streams only.
    resize_size: test images are resized to this shorter side, of which the central square stays; 0
        is 8/7 of image_size (256 for 224).
    crop_scale, crop_ratio: least and largest area (as a share of the image's) and ratio of width to
        height of the random part of a train image; (1, 1) and (1, 1) is always its central square.
    workers: processes that read and decode; 0 does it in threads of this one, as many as it has CPU
        cores; -1 decides between threads and as many processes by measurement, see `look_at`.
    prefetch: batches read ahead.
    unreadable: an image that cannot be decoded stops the run, or is replaced by a random other one
        (`skip`; in evaluation it is left out).
    unreadable_share: a run that skips ends when more than this share of a split's images are lost.
    orientation: images are used as they are stored (as by torchvision and TFDS; a warning tells if
        some are to be turned), or turned and mirrored as their EXIF orientation says. For sets in
        memory too.
    """

    name: str = "digits"
    data_dir: str = ""
    image_size: Side = 0
    train_image_size: Side = 0
    channels: Literal[0, 1, 3] = 0
    train_split: str = "train"
    test_split: str = ""
    train_limit: Index = 0
    test_limit: Index = 0
    normalization: Literal[
        "auto",
        "computed",
        "none",
        "cifar10",
        "cifar100",
        "fashion_mnist",
        "imagenet",
        "mnist",
        "svhn_cropped",
    ] = "auto"
    stream: bool = False
    resize_size: Side = 0
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    workers: Annotated[int, Range(-1, 256)] = -1
    prefetch: Annotated[int, Range(1, 1000)] = 4
    unreadable: Literal["stop", "skip"] = "stop"
    unreadable_share: Fraction = 0.1
    orientation: Literal["stored", "exif"] = "stored"


class Split(NamedTuple):
    """Images and their classes, in a fixed order."""

    images: Any  # uint8 [N, H, W, C], C is 1 or 3 (RGB), or a Stream
    labels: Any  # int32 [N], in 0..num_classes-1; None with a Stream, which reads them with images


class Dataset(NamedTuple):
    """A set. `test.images.shape[1:]` is what the network sees; train images in memory may be
    larger, see `Options`.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...]


def spread(size: int, limit: int) -> ndarray:
    """`limit` (0: all) of the indices 0..size-1, ascending, evenly spread and nested in those of a
    larger limit.

    Multiples of the golden ratio, modulo 1, visit every stretch of the order equally often: sets
    stored class by class keep their proportions, and no period in the order is picked up.
    """
    if not limit or limit >= size:
        return np.arange(size)
    return np.sort(_spread_order(size)[:limit])


def _spread_order(size: int, start: float = 0.0) -> ndarray:
    """The indices 0..size-1 in an order of which every stretch is spread evenly over them; see
    `spread`.

    start: in [0, 1), where the multiples of the golden ratio begin.
    """
    rank = (np.arange(size) * ((5**0.5 - 1) / 2) + start) % 1.0
    return np.argsort(rank, kind="stable")


class FixedSample(NamedTuple):
    """Which images stand for a whole split where a number of them is asked for.

    rule: "spread" evenly over its stored order, another sample for each seed, or the "first". A
    larger sample holds the smaller ones of its seed; a sample of all keeps the stored order.
    """

    rule: Literal["spread", "first"] = "spread"
    seed: int = 0

    def order(self, size: int) -> ndarray:
        """All indices of a split of `size`; the first n are the sample of n."""
        if self.rule == "first":
            return np.arange(size)
        start = np.random.default_rng(self.seed).random()
        return _spread_order(size, start)

    def indices(self, size: int, num: int) -> ndarray:
        """`num` indices of so many images, or all if there are no more: int [num]."""
        if num >= size:
            return np.arange(size)
        return self.order(size)[:num]


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tell_orientation(names: Sequence[str], total: int, options: Options) -> None:
    """Warns of images that are to be turned and are not."""
    if names and options.orientation == "stored":
        warnings.warn(
            f"{len(names)} of {total} images are to be turned by their EXIF orientation, e.g. "
            f"{names[0]}; they are used as stored. config.data.orientation='exif' turns them.",
            stacklevel=4,
        )
