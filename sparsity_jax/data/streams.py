"""Splits that stay where they are, for `sparsity_jax.stream` to read: what is checked before."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

from numpy import ndarray

from sparsity_jax import decoding
from sparsity_jax.data.sets import Options, Split, spread, tell_orientation, usable_cores
from sparsity_jax.pixels import colours
from sparsity_jax.sources import Source, UnreadableError, array_of, check_label
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import Shape

__all__ = [
    "SKIPPING",
    "Stream",
    "check_losses",
    "check_options",
    "choose_workers",
    "leave",
    "look_at",
]

_DECODED_ALONE = 32  # of those looked at, to measure what threads gain
_LOOKED_AT = 512  # images of each split of a stream that are decoded before anything starts
SKIPPING = "config.data.unreadable='skip' goes on without such images and counts them."


@dataclasses.dataclass(frozen=True)
class Stream:
    """Images that stay where they are until `stream` reads them; stands where an array of this
    shape would.
    """

    source: Source
    indices: ndarray  # of `source`, in the split's order
    shape: Shape  # [N, H, W, C]
    num_classes: int
    options: Options
    reading: str = ""  # what `look_at` chose, in words


def check_options(options: Options) -> None:
    """Raises ConfigError for what a stream cannot have."""
    size = options.image_size
    ascending = "two numbers above 0, ascending"
    small, large = options.crop_scale
    low, high = options.crop_ratio
    rules = {
        "image_size": (size > 0, "the side of a stream's crops, e.g. 224"),
        "train_image_size": (not options.train_image_size, "0: a stream crops to image_size"),
        "normalization": (
            options.normalization != "computed",
            "that of a set, or 'none': a stream's images are not in memory",
        ),
        "resize_size": (not 0 < options.resize_size < size, f"from image_size, {size}, or 0"),
        "crop_scale": (0 < small <= large, ascending),
        "crop_ratio": (low <= high, ascending),
    }
    for field, (right, allowed) in rules.items():
        if not right:
            raise ConfigError(field, getattr(options, field), allowed=allowed)


def leave(
    source: Source, indices: ndarray, options: Options, num_classes: int, channels: int
) -> Split:
    """The images of a source at `indices` as a `Stream`. channels 0: as the first image that can be
    decoded.
    """
    if source.epochs is not None:
        _check_in_order(source, indices, options)
    for index in () if channels else indices.tolist():
        with contextlib.suppress(UnreadableError):
            payload, _ = source.read_one(index)
            channels = colours(array_of(payload, source.describe(index)))
            break
    if not channels:
        raise ConfigError(f"{source.describe(indices[0])} and all other images cannot be decoded.")
    shape = (len(indices), options.image_size, options.image_size, channels)
    return Split(Stream(source, indices, shape, num_classes, options), None)


def _check_in_order(source: Source, indices: ndarray, options: Options) -> None:
    """Raises ConfigError for options that do not fit images in an order of their own."""
    if len(indices) < source.size:
        why = "of a set that comes in an order of its own"
        raise ConfigError("train_limit or test_limit", len(indices), why=why, allowed="0")
    image, _ = source.read_one(0)
    side = options.image_size
    if image.shape[:2] != (side, side):
        height, width = image.shape[:2]
        why = "but images in an order of their own are used as they come"
        raise ConfigError("image_size", side, why=why, allowed=f"their size, {height}x{width}")


def look_at(images: Stream) -> Stream:
    """Decodes `_LOOKED_AT` images of a stream, evenly spread, so that mistakes are told before
    anything starts.

    Returns it with `workers` decided: some of the images are decoded one after the other, the rest
    in threads. Raises ConfigError for a label that is no class, and for images that cannot be
    decoded if they would stop the run.
    """
    options = images.options
    if images.source.epochs is not None:
        _look_at_image(images, 0)  # the others come in their turn
        return images
    size = len(images.indices)
    chosen = spread(size, _LOOKED_AT)
    sample = images.indices[chosen].tolist()
    look = functools.partial(_look_at_image, images)
    alone, first = _timed(map, look, sample[:_DECODED_ALONE])
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        together, others = _timed(pool.map, look, sample[_DECODED_ALONE:])
    seen = first + others
    lost = [reason for reason, _ in seen if reason]
    if lost and options.unreadable == "stop":
        raise ConfigError(f"{lost[0]} {SKIPPING}")
    check_losses(lost, len(sample), options)
    turned = [name for _, name in seen if name]
    tell_orientation(turned, len(sample), options)
    if options.workers >= 0 or len(sample) <= 2 * _DECODED_ALONE:
        return images
    workers, reading = choose_workers(size, usable_cores(), alone, together)
    options = dataclasses.replace(options, workers=workers)
    return dataclasses.replace(images, options=options, reading=reading)


def _look_at_image(images: Stream, index: int) -> tuple[str, str]:
    """(why image `index` of the source cannot be read, its name if it is to be turned), "" where
    not.
    """
    name = images.source.describe(index)
    try:
        payload, label = images.source.read_one(index)
        array_of(payload, name)
    except UnreadableError as error:
        return str(error), ""
    check_label(label, images.num_classes, name)
    if isinstance(payload, bytes) and decoding.orientation(payload) != 1:
        return "", name
    return "", ""


def _timed(apply: Callable, function: Callable, items: list) -> tuple[float, list]:
    """(items per second, results) of a kind of `map`."""
    started = time.perf_counter()
    results = list(apply(function, items))
    return len(items) / max(time.perf_counter() - started, 1e-9), results


def choose_workers(count: int, cores: int, alone: float, together: float) -> tuple[int, str]:
    """(number of processes, 0 for threads; the choice in words) to read `count` images.

    alone, together: images a second decoded by one thread and by a thread per core. Processes take
    seconds to start and copy what they read. They are worth it where threads leave half of at least
    four cores idle and an epoch takes a minute and more.
    """
    measured = f"{together:.4g} images/s in {cores} threads, {alone:.4g} in one"
    if cores >= 4 and together < cores * alone / 2 and count / together > 60:
        return cores, f"{cores} processes, since threads do not keep the cores busy ({measured})"
    return 0, f"threads ({measured})"


def check_losses(lost: Sequence[str], total: int, options: Options) -> None:
    """Raises ConfigError if more than the allowed share of `total` images are lost; lost: their
    names.
    """
    share = options.unreadable_share
    if len(lost) > share * total:
        raise ConfigError(
            f"{len(lost)} of {total} images cannot be read, e.g. {lost[0].rstrip('.')}; allowed: "
            f"a share of {share}, config.data.unreadable_share."
        )
