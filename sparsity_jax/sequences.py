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
        count = len(labels)
        read += count
        filled = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        filled[:count] = pixels
        counted = np.full(batch_size, -1, np.int32)
        counted[:count] = labels
        yield filled, counted
    _check_number(read, images.shape[0], 0)


def chosen(images: Stream, indices: Sequence[int]) -> Arrays:
    """The images at `indices` of the first epoch, and their labels."""
    places = {index: place for place, index in enumerate(indices)}
    pixels = np.zeros((len(indices), *images.shape[1:]), np.uint8)
    labels = np.zeros(len(indices), np.int32)
    left = len(indices)
    for index, (image, label) in enumerate(_batches_of(images, 0, 1)):
        if not left:
            break
        if index in places:
            place = places[index]
            pixels[place] = image[0]
            labels[place] = label[0]
            left -= 1
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
    epochs = images.source.epochs
    assert epochs is not None
    pixels = np.zeros((0, *images.shape[1:]), np.uint8)
    labels = np.zeros(0, np.int32)
    for batch in epochs(epoch):
        more_pixels, more_labels = _checked(images, *batch)
        pixels = np.concatenate([pixels, more_pixels])
        labels = np.concatenate([labels, more_labels])
        while len(labels) >= size:
            yield pixels[:size], labels[:size]
            pixels = pixels[size:]
            labels = labels[size:]
    if len(labels):
        yield pixels, labels


def _checked(images: Stream, pixels: Any, labels: Any) -> Arrays:
    """One batch of the user's; raises ConfigError for images of another shape or type."""
    pixels = np.asarray(pixels)
    labels = np.asarray(labels, np.int32)
    each = images.shape[1:]
    shape = (len(labels), *each)
    if pixels.dtype != np.uint8 or pixels.size != np.prod(shape):
        given = f"{pixels.dtype} {[*pixels.shape]}"
        why = f"a batch of images with {len(labels)} labels"
        allowed = f"uint8 {[*each]} for each label, as the first image is"
        raise ConfigError("config.data.name", given, why=why, allowed=allowed)
    return pixels.reshape(shape), labels
