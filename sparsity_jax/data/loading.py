"""Sets opened, checked, and decoded into memory or left where they are."""

import concurrent.futures
import math
from typing import Any

import numpy as np
from numpy import ndarray

from sparsity_jax import decoding, feeds, folders, prepared, stopping
from sparsity_jax.data import streams
from sparsity_jax.data.inputs import published, statistics
from sparsity_jax.data.sets import Dataset, Options, Split, spread, tell_orientation, usable_cores
from sparsity_jax.pixels import colours, fit
from sparsity_jax.sources import SETS, Opened, Source, array_of, check_colour, check_label
from sparsity_jax.tables import ConfigError, check_memory, check_options, within
from sparsity_jax.types import Config, Shape

__all__ = ["check", "decoded", "load"]

_CHUNK = 500  # records one thread reads and decodes at a time
_STREAMS_ALONE = (
    "resize_size",
    "crop_scale",
    "crop_ratio",
    "workers",
    "prefetch",
    "unreadable",
    "unreadable_share",
)


def load(**options: Any) -> Dataset:
    """A whole set, decoded into memory or, with `stream`, left where it is; see `Options`.

    Raises ConfigError for whatever `check` finds, and for images that are damaged, of differing
    shape while their size option is 0, in colour in a grey set, or without a label; of a stream
    `look_at` tells them.
    """
    chosen = _read_options(options)
    opened = _open_set(chosen)
    channels = chosen.channels or opened.channels
    splits = []
    parts = (
        (opened.train, chosen.train_limit, chosen.train_image_size or chosen.image_size),
        (opened.test, chosen.test_limit, chosen.image_size),
    )
    for source, limit, side in parts:
        indices = spread(source.size, limit)
        if chosen.stream:
            split = streams.leave(source, indices, chosen, opened.num_classes, channels)
        else:
            split = decoded(source, indices, side, chosen, opened.num_classes, channels)
        channels = split.images.shape[-1]  # without an option, of the train images
        splits.append(split)
    train, test = splits
    seen = _sides(train.images.shape[1:])
    tested = _sides(test.images.shape[1:])
    if seen != tested and not chosen.train_image_size:
        raise ConfigError(
            f"{chosen.name!r} has train images of {seen}, test images of {tested}; set image_size."
        )
    mean, std = statistics(chosen, train.images)
    return Dataset(chosen.name, train, test, opened.num_classes, mean, std)


def _sides(shape: Shape) -> str:
    """Height and width of an image [H, W, C], as text."""
    height, width, _ = shape
    return f"{height}x{width}"


def check(**options: Any) -> None:
    """Raises ConfigError if `load(**options)` could not start: a wrong option, or a set that is not
    there.

    Reads names and metadata only, no image.
    """
    _open_set(_read_options(options))


def _read_options(options: Config) -> Options:
    """The checked options; raises ConfigError for wrong ones, and for those of streams without
    one.
    """
    chosen = Options(**check_options(Options, options))
    if chosen.stream:
        streams.check_options(chosen)
        return chosen
    for field in _STREAMS_ALONE:
        value = getattr(chosen, field)
        if value != getattr(Options, field):
            why = "which only a stream uses; set config.data.stream=True"
            raise ConfigError(field, value, why=why)
    return chosen


def _open_set(options: Options) -> Opened:
    """The set that is meant, checked as far as no image is needed."""
    name, splits = options.name, (options.train_split, options.test_split)
    if name in SETS:
        opened = feeds.opened(SETS[name](*splits), stream=options.stream)
    elif name.startswith("folder:"):
        opened = folders.open_folder(name.removeprefix("folder:"), *splits)
    else:
        opened = prepared.open_prepared(name, options.data_dir, *splits)
    if name not in SETS and opened.num_classes < 2:
        raise ConfigError("name", name, why="which has one class", allowed="sets of two and more")
    channels = options.channels or opened.channels
    if channels:
        published(options, channels)
    return opened


def decoded(
    source: Source,
    indices: ndarray,
    side: int,
    options: Options,
    num_classes: int,
    channels: int,
) -> Split:
    """The images of a source at `indices`, squares of `side` (0: as they are), read and decoded in
    threads (OpenCV and the reader release the interpreter lock).

    channels 0: as the first image.
    """
    upright = options.orientation == "exif"
    first_name = source.describe(indices[0])
    payload, _ = source.read_one(int(indices[0]))
    first = array_of(payload, first_name, upright=upright)
    channels = channels or colours(first)
    shape = fit(first, side, channels).shape
    with within("image_size"):
        what = "is too large without config.data.stream=True, which reads images while it trains"
        size = f"{len(indices)} images of {_sides(shape)} take"
        check_memory(len(indices) * math.prod(shape), f"{what}: {size}")
    images = np.empty((len(indices), *shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    turned: list[int] = []

    def decode_chunk(start: int) -> None:
        chunk = indices[start : start + _CHUNK].tolist()
        for i, (payload, label) in enumerate(source.read(chunk)):
            name = source.describe(chunk[i])
            check_label(label, num_classes, name)
            image = array_of(payload, name, upright=upright)
            if not options.channels:
                check_colour(image, channels, name)
            image = fit(image, side, channels)
            if image.shape != shape:
                raise ConfigError(
                    f"{name} is {_sides(image.shape)}, {first_name} is {_sides(shape)}; set "
                    "image_size, images of differing sizes need one."
                )
            images[start + i] = image
            labels[start + i] = label
            if isinstance(payload, bytes) and decoding.orientation(payload) != 1:
                turned.append(chunk[i])

    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        futures = [pool.submit(decode_chunk, start) for start in range(0, len(indices), _CHUNK)]
        try:
            for future in futures:
                stopping.result_of(future)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the rest is not decoded
    names = [source.describe(index) for index in sorted(turned)]
    tell_orientation(names, len(indices), options)
    return Split(images, labels)
