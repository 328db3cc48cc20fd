"""From stored images to what a network sees: augmentation by name, and normalisation.

The mean and deviation of each channel are published ones or computed.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy import ndarray

from sparsity_jax.data.augment import flip, pad_crop, pad_crop_flip, resized_crop_flip
from sparsity_jax.data.sets import Dataset, Options
from sparsity_jax.tables import ConfigError, lookup

__all__ = [
    "AUGMENTATIONS",
    "NORMALIZATIONS",
    "Normalization",
    "make_augmentation",
    "none",
    "preprocess",
    "published",
    "statistics",
]


class Normalization(NamedTuple):
    """Per channel, of images scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# constants in common use, for images scaled to [0, 1]; CIFAR-10 as in the reference experiments
NORMALIZATIONS = {
    "none": Normalization((0.0,), (1.0,)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": Normalization((0.2860,), (0.3530,)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "svhn_cropped": Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
_AT_ONCE = 1_000_000  # pixels that are counted at a time, since np.bincount copies to int64


def statistics(options: Options, images: ndarray) -> Normalization:
    """Mean and std of each channel for `load`'s options; those of grey sets are repeated for
    replicated channels.
    """
    channels = images.shape[-1]
    known = published(options, channels)
    if known is not None:
        return known
    counts = np.zeros((channels, 256), np.int64)  # of the values: so the result is exact
    pixels = images.reshape(-1, channels)
    for start in range(0, len(pixels), _AT_ONCE):
        part = pixels[start : start + _AT_ONCE]
        counts += [np.bincount(channel, minlength=256) for channel in part.T]
    values = np.arange(256) / 255
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ values
    squares = (values - mean[:, None]) ** 2
    variance = (shares * squares).sum(1)
    std = np.maximum(np.sqrt(variance), 1 / 255)  # a constant channel becomes 0
    return Normalization(tuple(mean.tolist()), tuple(std.tolist()))


def published(options: Options, channels: int) -> Normalization | None:
    """`statistics` where they are known without an image; None where they have to be computed."""
    rule: str = options.normalization
    automatic = rule == "auto"
    if automatic:
        rule = re.split("[:/]", options.name)[0]
        if options.stream and rule not in NORMALIZATIONS:
            rule = "imagenet"
    row = NORMALIZATIONS.get(rule)
    if row is None:
        return None
    times = channels // len(row.mean)
    if times * len(row.mean) == channels:
        return Normalization(row.mean * times, row.std * times)
    if automatic and not options.stream:
        return None
    raise ConfigError(
        f"config.data.normalization {rule!r} is for 3 channels, the images have {channels}; use "
        "'computed' (a stream: 'none'), or set channels to 3."
    )


def preprocess(
    images: Array, mean: Sequence[float], std: Sequence[float], *, dtype: Any = jnp.float32
) -> Array:
    """`(images / 255 - mean) / std` as `dtype`: uint8 [..., C] and C means and stds. Computed in
    float32.
    """
    mean_array = jnp.asarray(mean, jnp.float32)
    std_array = jnp.asarray(std, jnp.float32)
    scaled = images.astype(jnp.float32) * (1 / (255 * std_array)) - mean_array / std_array
    return scaled.astype(dtype)


def none(key: Array, images: Array) -> Array:
    """The images as they are."""
    del key
    return images


AUGMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "none": none,
    "flip": flip,
    "pad_crop": pad_crop,
    "pad_crop_flip": pad_crop_flip,
    "resized_crop_flip": resized_crop_flip,
}


def make_augmentation(name: str, dataset: Dataset) -> Callable[[Array, Array], Array]:
    """`fn(key, images)` of the table which turns `dataset`'s train images into images of the test
    images' size.

    Raises ConfigError, of the setting `augment`, for an unknown name, and for train images of
    another size (`train_image_size`) with an augmentation that keeps sizes.
    """
    function = lookup(AUGMENTATIONS, name, "augment")
    stored = dataset.train.images.shape[1:3]
    height, width = dataset.test.images.shape[1:3]
    if stored == (height, width):
        return function
    if function is resized_crop_flip and height == width:
        return functools.partial(resized_crop_flip, size=height)
    raise ConfigError(
        "augment",
        name,
        why=f"which keeps train images of {stored} while the network sees {(height, width)}",
        allowed="'resized_crop_flip' with square images, and any without train_image_size",
    )
