"""Splits that come in an order of their own, epoch by epoch: batches of them, from any step on."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsity_jax.data import Stream
from sparsity_jax.sources import Arrays
from sparsity_jax.tables import ConfigError

__all__ = ["chosen", "evaluation", "training"]


def training(images: Stream, *, batch_size: int, epochs: int, start: int) -> Iterator[Arrays]:
    """The batches of a whole training from step `start` on; an epoch is read from its beginning.

    Raises ConfigError where an epoch has fewer images than it should.
    """
    per_epoch = images.shape[0] // batch_size
    first, skipped = divmod(start, per_epoch)
    for epoch in range(first, epochs):
        batches = _batches_of(images, epoch, batch_size)
        made = skipped
        for batch in itertools.islice(batches, skipped, per_epoch):
            yield batch
            made += 1
        _check_number(made * batch_size, per_epoch * batch_size, epoch)
        skipped = 0


def evaluation(images: Stream, *, batch_size: int) -> Iterator[Arrays]:
    """All images of the first epoch in order; labels are -1 where the last batch is filled up."""
    read = 0
    for pixels, labels in _batches_of(images, 0, batch_size):
        missing = batch_size - len(labels)
        read += len(labels)
        filled = np.pad(pixels, [(0, missing), *[(0, 0)] * 3])
        yield filled, np.pad(labels, (0, missing), constant_values=-1)
    _check_number(read, images.shape[0], 0)


def chosen(images: Stream, indices: Sequence[int]) -> Arrays:
    """The images at `indices` of the first epoch, and their labels."""
    places = {index: place for place, index in enumerate(indices)}
    pixels = np.zeros((len(indices), *images.shape[1:]), np.uint8)
    labels = np.zeros(len(indices), np.int32)
    singles = _batches_of(images, 0, 1)
    for index, (image, label) in enumerate(itertools.islice(singles, max(places, default=-1) + 1)):
        if index in places:
            pixels[places[index]] = image[0]
            labels[places[index]] = label[0]
    return pixels, labels


def _check_number(read: int, wanted: int, epoch: int) -> None:
    """Raises ConfigError for an epoch of another length than its source says."""
    if read < wanted:
        raise ConfigError(
            "config.data.name",
            read,
            why=f"the images that epoch {epoch} gave",
            allowed=f"{wanted}, as its source says",
        )


def _batches_of(images: Stream, epoch: int, size: int) -> Iterator[Arrays]:
    """An epoch in batches of `size`, whatever the sizes of its own; the last one may be smaller."""
    assert images.source.epochs is not None
    waiting: list[Arrays] = []
    for pixels, labels in images.source.epochs(epoch):
        waiting.append(_checked(images, pixels, labels))
        joined = [np.concatenate(arrays) for arrays in zip(*waiting, strict=True)]
        whole = len(joined[1]) // size * size
        for start in range(0, whole, size):
            yield joined[0][start : start + size], joined[1][start : start + size]
        waiting = [(joined[0][whole:], joined[1][whole:])]
    if waiting and len(waiting[0][1]):
        yield waiting[0]


def _checked(images: Stream, pixels: Any, labels: Any) -> Arrays:
    """One batch of the user's; raises ConfigError for images of another shape or type."""
    pixels = np.asarray(pixels)
    shape = (-1, *images.shape[1:])
    if pixels.dtype != np.uint8 or pixels[:1].size != np.prod(shape[1:]):
        given = f"{pixels.dtype} {[*pixels.shape]}"
        allowed = f"uint8 {[*images.shape[1:]]} each, as the first one and config.data.image_size"
        raise ConfigError("config.data.name", given, why="a batch of images", allowed=allowed)
    return pixels.reshape(shape), np.asarray(labels, np.int32)
