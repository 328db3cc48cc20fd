"""Images that do not fit in memory: read, decoded, cropped and put on the device while the network computes.

`data.load(stream=True)` leaves a `data.Stream` in the place of an array; grain reads it here, in threads or in
processes. What a batch holds depends on the seed and the step only, so a training goes on anywhere with the same bits.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from absl import flags

from sparsity_jax import data
from sparsity_jax.tables import ConfigError

ON_DEVICE = 2  # batches that wait on the device
Box = tuple[int, int, int, int]  # top, left, height, width


class Example(NamedTuple):
    image: np.ndarray  # uint8 [H, W, C]
    label: int  # -1: does not count
    unreadable: tuple[str, ...]  # images that could not be decoded on the way to this one


class Batch(NamedTuple):
    """One batch; on the device if `put` puts it there."""

    images: Any  # uint8 [B, H, W, C]
    labels: Any  # int32 [B], -1 for what does not count: the rest of the last batch, unreadable images
    unreadable: tuple[str, ...]


# Batches -----------------------------------------------------------------------------------------------------


def train_batches(
    images: data.Stream,
    seed: Sequence[int],
    *,
    batch_size: int,
    epochs: int,
    start: int = 0,
    put: Callable = jax.device_put,
) -> Iterator[Batch]:
    """The batches of a whole training from step `start` on; close it to stop reading.

    Every epoch visits the images in a new order, without those that do not fill a batch, and crops each at random.
    seed: non-negative integers. put((images, labels)) -> both where they are used.
    Raises ConfigError for a batch_size above the number of images.
    """
    import grain  # a second to import, needed by streams only

    if batch_size > images.shape[0]:
        raise ConfigError(f"batch_size is {batch_size}; allowed: up to {images.shape[0]}, the images.")
    size = images.shape[0] // batch_size * batch_size
    numbers = np.random.SeedSequence(seed).generate_state(epochs).tolist()
    every = grain.MapDataset.range(images.shape[0])
    order = grain.MapDataset.concatenate([every.shuffle(seed=number)[:size] for number in numbers])

    def cropped(position: int, index: int) -> Example:
        draw = lambda height, width: random_box(np.random.default_rng([*seed, position]), height, width, images.options)
        return example(images, index, draw)

    return read_ahead(images, order.map_with_index(cropped)[start * batch_size :], batch_size, put)


def eval_batches(
    images: data.Stream, *, batch_size: int, put: Callable = jax.device_put, indices: Sequence[int] | None = None
) -> Iterator[Batch]:
    """All images, or those at `indices`, in order and with their central part; the last batch is filled up."""
    import grain

    order = grain.MapDataset.source(range(images.shape[0]) if indices is None else [int(i) for i in indices])
    draw = functools.partial(central_box, options=images.options)
    return read_ahead(images, order.map(lambda index: example(images, index, draw, replace=False)), batch_size, put)


def examples(images: data.Stream, indices: Sequence[int], batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, H, W, C] and int32 [n] of the images at `indices` that can be decoded, with their central part."""
    if not len(indices):
        return np.zeros((0, *images.shape[1:]), np.uint8), np.zeros(0, np.int32)
    stay = lambda arrays: arrays
    batches = eval_batches(images, batch_size=min(batch_size, len(indices)), put=stay, indices=indices)
    with contextlib.closing(batches):
        found = [(batch.images[batch.labels >= 0], batch.labels[batch.labels >= 0]) for batch in batches]
    return tuple(np.concatenate(arrays) for arrays in zip(*found))


def read_ahead(images: data.Stream, found: Any, batch_size: int, put: Callable) -> Iterator[Batch]:
    """Batches of a grain dataset of examples, at most `prefetch` of them and 2 + `ON_DEVICE` more ahead of their use.

    Threads share the images of a batch; processes take whole batches in turn. Both give the same batches.
    """
    import grain

    cv2.setNumThreads(1)  # images are what runs side by side
    workers, prefetch = images.options["workers"], images.options["prefetch"]
    stack = functools.partial(stack_examples, batch_size)
    if workers:
        if not flags.FLAGS.is_parsed():  # where no command line was; grain asks for flags of its own
            flags.FLAGS.mark_as_parsed()
        own = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=math.ceil(prefetch / workers))
        batches = found.batch(batch_size, batch_fn=stack).to_iter_dataset(own)
        batches = batches.mp_prefetch(options, worker_init_fn=begin_worker)
    else:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = grain.ReadOptions(threads, prefetch_buffer_size=max(threads, prefetch * batch_size))
        batches = found.to_iter_dataset(own).batch(batch_size, batch_fn=stack)
    placed = batches.map(lambda batch: Batch(*put(batch[:2]), batch.unreadable))
    return iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=ON_DEVICE))


def stack_examples(batch_size: int, found: Sequence[Example]) -> Batch:
    """The examples as one batch, filled up to `batch_size` with black images."""
    images = np.zeros((batch_size, *found[0].image.shape), np.uint8)
    labels = np.full(batch_size, -1, np.int32)
    for i, one in enumerate(found):
        images[i], labels[i] = one.image, one.label
    return Batch(images, labels, tuple(name for one in found for name in one.unreadable))


def begin_worker(index: int, count: int) -> None:
    """A reading process ends with the one that started it, even when that is killed."""
    del index, count
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# One image ---------------------------------------------------------------------------------------------------


def example(images: data.Stream, index: int, draw: Callable[[int, int], Box], *, replace: bool = True) -> Example:
    """Image `index` of the split, of which `draw(height, width)` says the part to use.

    An image that cannot be decoded raises ConfigError, or with `unreadable="skip"` gives its place to the next of the
    split that can; without `replace` to a black image that does not count.
    """
    total, size, _, channels = images.shape
    names = ()
    for step in range(total if replace else 1):
        stored = int(images.indices[(index + step) % total])
        name = images.source.describe(stored)
        try:
            ((payload, label),) = images.source.read([stored])
            image = part(payload, size, draw)
            reason = f"{name} is not an image that can be decoded; is it damaged?"
        except ConfigError as error:  # the file or record itself cannot be read
            image, reason = None, str(error)
        if image is not None:
            check_example(images, image, label, name)
            return Example(data.fit(image, 0, channels), label, names)
        if images.options["unreadable"] == "stop":
            raise ConfigError(f"{reason} config.data.unreadable='skip' goes on without such images and counts them.")
        names += (name,)
    if replace:
        raise ConfigError(f"{names[0]} and all other images of its split cannot be decoded.")
    return Example(np.zeros(images.shape[1:], np.uint8), -1, names)


def check_example(images: data.Stream, image: np.ndarray, label: int, name: str) -> None:
    if image.ndim == 3 and images.shape[3] == 1 and not images.options["channels"]:
        raise ConfigError(f"{name} is in colour, the set is grey; set config.data.channels to 1 or 3.")
    if not 0 <= label < images.num_classes:
        raise ConfigError(
            f"{name} has the label {label} where 0..{images.num_classes - 1} are classes; unlabelled splits cannot be "
            "used, name another one through config.data.train_split or test_split."
        )


def part(payload: Any, size: int, draw: Callable[[int, int], Box]) -> np.ndarray | None:
    """The part `draw(height, width)` of an image, resized to [size, size] as `data.fit` does; None if it is damaged.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which takes a fraction of the time, where the part stays at least
    `size` on both sides; its edges are then rounded to the coarser pixels.
    """
    shape = jpeg_shape(payload) if isinstance(payload, bytes) else None
    box = draw(*shape) if shape else None
    reduced = max(r for r in (1, 2, 4, 8) if r == 1 or min(box[2:]) >= r * size) if shape else 1
    image = data.decode(payload, {1: 0, 2: 16, 4: 32, 8: 64}[reduced]) if shape else data.as_array(payload)
    if image is None:
        return None
    top, left, height, width = box or draw(*image.shape[:2])
    rows, columns = (slice(round(a / reduced), round((a + n) / reduced)) for a, n in ((top, height), (left, width)))
    image = image[rows, columns]
    method = cv2.INTER_AREA if min(image.shape[:2]) > size else cv2.INTER_LINEAR
    return image if image.shape[:2] == (size, size) else cv2.resize(image, (size, size), interpolation=method)


def jpeg_shape(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) in the frame header of a JPEG; None if `encoded` is something else, or not a plain one."""
    at = 2 if encoded[:2] == b"\xff\xd8" else len(encoded)
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        if 0xC0 <= encoded[at + 1] <= 0xCF and encoded[at + 1] not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(encoded[at + i : at + i + 2], "big") for i in (5, 7))
            return (height, width) if height and width else None
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return None


def central_box(height: int, width: int, options: dict[str, Any]) -> Box:
    """What stays when an image is resized to the shorter side `resize_size` and its central square is cut out."""
    share = options["image_size"] / options["resize_size"] if options["resize_size"] else 7 / 8
    side = max(1, round(share * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


def random_box(rng: np.random.Generator, height: int, width: int, options: dict[str, Any]) -> Box:
    """A random part of an image, drawn as by `data.random_box`: ten attempts, else the largest central one."""
    (small, large), (low, high) = options["crop_scale"], options["crop_ratio"]
    for _ in range(10):
        area = height * width * rng.uniform(small, large)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = max(1, min(height, round(width / low))), max(1, min(width, round(height * high)))
    return (height - h) // 2, (width - w) // 2, h, w
