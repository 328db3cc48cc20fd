"""Sets of one's own as the library reads them: arrays, grain pipelines, iterables of batches."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy import ndarray

from sparsity_jax.sources import Arrays, Opened, Pairs, Source, arrays_source, as_decoded
from sparsity_jax.tables import ConfigError, check_memory

__all__ = ["ALLOWED", "opened"]

ALLOWED = (
    "a `sources.Opened`, or (train, test, number of classes), where train and test are each a pair "
    "of arrays (images, labels), a grain pipeline, an iterable of batches (images, labels), or a "
    "`sources.in_epochs`"
)
_IMAGES = "uint8 [N, height, width] or with a last axis of 1 or 3, and an integer label for each"


def opened(made: Any, *, stream: bool) -> Opened:
    """What a registered function of data gave, as a set.

    A grain `MapDataset` of examples is read where images are asked for, so that it can be streamed;
    all other pipelines and iterables are read once, whole. Raises ConfigError for anything but what
    is `ALLOWED`, and with `stream` for what can only be read from its beginning.
    """
    if isinstance(made, Opened):
        return made
    if not isinstance(made, tuple) or len(made) != 3:
        raise ConfigError("name", type(made).__name__, verb="gives", allowed=ALLOWED)
    *parts, num_classes = made
    train, test = (_source(part, split, stream) for part, split in zip(parts, ("train", "test")))
    return Opened(train, test, num_classes, channels=0)


def _source(part: Any, split: str, stream: bool) -> Source:
    """One split. part: as a user gave it."""
    if isinstance(part, Source):
        if stream or part.epochs is None:
            return part
        part = part.epochs(0)
    if _has_examples(part):
        read = partial(_examples_at, part, split)
        return Source(len(part), read, lambda index: f"{split} image {index}")
    if not _are_arrays(part):
        if stream:
            raise ConfigError(
                "stream",
                True,
                why=f"but the {split} images come in a sequence, which a resumed run could not "
                "enter in its middle",
                allowed="a grain MapDataset of examples, arrays, or sources.in_epochs(function of "
                "the epoch, size); without stream the sequence is read once into memory",
            )
        part = _joined(part, split)
    images, labels = part
    _check_arrays(images, labels, split)
    return arrays_source(len(labels), lambda: (images, labels), f"{split} image")


def _has_examples(part: Any) -> bool:
    """Whether it is a grain dataset that gives each example by its number."""
    grain = sys.modules.get("grain")
    if grain is None or not isinstance(part, grain.MapDataset):
        return False
    if len(part) >= sys.maxsize:
        why = "which repeats without end"
        raise ConfigError("name", "a grain MapDataset", why=why, allowed="one epoch of it")
    return np.ndim(_pair(part[0])[1]) == 0


def _are_arrays(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and hasattr(part[1], "shape")


def _pair(element: Any) -> tuple[Any, Any]:
    """Image and label, or images and labels, of what a pipeline gives."""
    if isinstance(element, Mapping) and {"image", "label"} <= {*element}:
        return element["image"], element["label"]
    if isinstance(element, (tuple, list)) and len(element) == 2:
        image, label = element
        return image, label
    allowed = "(images, labels), or a dict with 'image' and 'label'"
    raise ConfigError("name", type(element).__name__, why="as an element", allowed=allowed)


def _examples_at(part: Any, split: str, indices: Sequence[int]) -> Pairs:
    pairs = []
    for index in indices:
        image, label = map(np.asarray, _pair(part[index]))
        _check_arrays(image[None], label[None], split)
        pairs.append((as_decoded(image), int(label)))
    return pairs


def _joined(part: Any, split: str) -> Arrays:
    """All images and labels of a sequence of batches, or of examples."""
    batches = [*_batches(part)] if hasattr(part, "__iter__") else []
    if not batches:
        raise ConfigError("name", type(part).__name__, why=f"as {split} images", allowed=ALLOWED)
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return images, labels


def _batches(part: Any) -> Iterator[Arrays]:
    read = 0
    for element in part:
        images, labels = map(np.asarray, _pair(element))
        if labels.ndim == 0:
            images = images[None]
            labels = labels[None]
        read += images.nbytes
        check_memory(read, "the images that were read so far take")
        yield images, labels


def _check_arrays(images: ndarray, labels: ndarray, split: str) -> None:
    """Raises ConfigError for arrays that are no images with their labels."""
    are_images = images.dtype == np.uint8 and images.shape[3:] in ((), (1,), (3,))
    are_labels = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if images.ndim < 3 or not are_images or not are_labels or len(images) != len(labels):
        shapes = f"{images.dtype} {[*images.shape]} and {labels.dtype} {[*labels.shape]}"
        raise ConfigError("name", shapes, why=f"as {split} images and labels", allowed=_IMAGES)
