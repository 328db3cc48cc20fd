"""Images that do not fit in memory: read, decoded, cropped and put on the device while the network
computes.

`data.load(stream=True)` leaves a `data.Stream` in the place of an array; grain reads it here, in
threads or in processes. What a batch holds depends on the seed and the step only, so a training
goes on anywhere with the same bits.
"""

import atexit
import contextlib
import math

# before `_close_all` is registered, so that its own end comes after that
import multiprocessing.util
import os
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from absl import flags
from numpy import ndarray

from sparsity_jax import decoding, hosts, sequences, stopping
from sparsity_jax.data import Options, Stream
from sparsity_jax.data.sets import usable_cores
from sparsity_jax.data.streams import SKIPPING, check_losses
from sparsity_jax.pixels import fit, resize
from sparsity_jax.sources import Arrays, UnreadableError, array_of, check_colour, check_label
from sparsity_jax.tables import ConfigError

__all__ = [
    "ON_DEVICE",
    "Batch",
    "Batches",
    "Box",
    "Draw",
    "Example",
    "ahead",
    "central_box",
    "eval_batches",
    "example",
    "examples",
    "image_at",
    "part",
    "random_box",
    "train_batches",
]

_REDUCED = {8: 64, 4: 32, 2: 16}  # OpenCV's flags that decode a JPEG at 1/n of its size
ON_DEVICE = 2  # batches that wait on the device
_PATIENCE = 0.5  # seconds between two looks for a request to stop
_SHUFFLED_WHOLE = 50_000  # images up to which every epoch's order is a permutation in memory
_REPLACEMENTS = 100  # images drawn in the place of one that cannot be decoded
_OPEN: "weakref.WeakSet[Generator]" = weakref.WeakSet()  # readers that are not closed
Batches = Generator["Batch", None, None]
Box = tuple[int, int, int, int]  # top, left, height, width
Draw = Callable[[int, int], Box]  # the part that is used of an image of so many rows and columns


class Example(NamedTuple):
    """One image, decoded by a worker."""

    image: ndarray  # uint8 [H, W, C]
    label: int  # -1: does not count
    unreadable: str = ""  # the image that should have been here, if it could not be decoded


class Batch(NamedTuple):
    """One batch; on the device if `put` puts it there."""

    images: Any  # uint8 [B, H, W, C]
    labels: Any  # int32 [B], -1 for what does not count: a filled-up rest, unreadable images
    unreadable: tuple[str, ...]


# Batches ------------------------------------------------------------------------------------------


def train_batches(
    images: Stream,
    seed: Sequence[int],
    *,
    batch_size: int,
    epochs: int,
    start: int = 0,
    put: Callable = jax.device_put,
    lost: Sequence[str] = (),
    rows: slice | None = None,
) -> Batches:
    """The batches of a whole training from step `start` on; close it to stop reading.

    Every epoch visits the images in a new order, without those that do not fill a batch, and crops
    each at random.
    seed: non-negative integers. put((images, labels)) -> both where they are used. lost: images
    found unreadable by the steps before `start`. rows: those of every batch that are read here, one
    after the other, by default all. Raises ConfigError for a batch_size above the
    number of images, and when too many images cannot be decoded.
    """
    import grain  # a second to import, needed by streams only

    total = images.shape[0]
    if batch_size > total:
        raise ConfigError("batch_size", batch_size, allowed=f"up to {total}, the images")
    if images.source.epochs is not None:
        own = sequences.training(images, batch_size=batch_size, epochs=epochs, start=start)
        return _opened(_in_order(own, put, rows))
    size = total // batch_size * batch_size
    seeds = np.random.SeedSequence(seed).generate_state(epochs).tolist()
    if total <= _SHUFFLED_WHOLE:
        visit = partial(image_at, total=total, size=size, seeds=seeds)
        order = grain.MapDataset.range(size * epochs).map(visit)
    else:
        every = grain.MapDataset.range(total)
        order = grain.MapDataset.concatenate([every.shuffle(seed=own)[:size] for own in seeds])

    def cropped(position: int, index: int) -> Example:
        def draw(height: int, width: int) -> Box:
            rng = np.random.default_rng([*seed, position])
            return random_box(rng, height, width, images.options)

        drawn = example(images, index, draw)
        if drawn.label >= 0:
            return drawn
        return _replacement(images, drawn, draw, [*seed, position, index])

    order = order.map_with_index(cropped)
    order = order[start * batch_size :]
    return _opened(_counted(images, order, batch_size, put, rows, lost))


def image_at(position: int, *, total: int, size: int, seeds: Sequence[int]) -> int:
    """The image that a training visits at `position`: in an epoch the first `size` of a permutation
    of all `total`. seeds: of each epoch.
    """
    epoch, at = divmod(position, size)
    order = _permutation(total, seeds[epoch])
    return int(order[at])


@lru_cache(maxsize=4)
def _permutation(total: int, seed: int) -> ndarray:
    return np.random.default_rng(seed).permutation(total)


def eval_batches(
    images: Stream,
    *,
    batch_size: int,
    put: Callable = jax.device_put,
    indices: Sequence[int] | None = None,
    rows: slice | None = None,
) -> Batches:
    """All images, or those at `indices`, in order and with their central part.

    The last batch is filled up. rows: as of `train_batches`.
    """
    import grain

    if indices is None and images.source.epochs is not None:
        own = sequences.evaluation(images, batch_size=batch_size)
        return _opened(_in_order(own, put, rows))
    if indices is None:
        indices = range(images.shape[0])
    draw = partial(central_box, options=images.options)
    order = grain.MapDataset.source(indices)
    order = order.map(lambda index: example(images, index, draw))
    return _opened(_counted(images, order, batch_size, put, rows))


def examples(images: Stream, indices: Sequence[int], *, batch_size: int = 256) -> Arrays:
    """uint8 [n, H, W, C] and int32 [n] of the images at `indices` that can be decoded.

    Of each its central part.
    """
    if images.source.epochs is not None:
        return sequences.chosen(images, indices)
    parts = [np.zeros((0, *images.shape[1:]), np.uint8)]
    labels = [np.zeros(0, np.int32)]
    size = min(batch_size, len(indices))
    if size:
        batches = eval_batches(images, batch_size=size, put=lambda arrays: arrays, indices=indices)
        for batch in batches:
            readable = batch.labels >= 0
            parts.append(batch.images[readable])
            labels.append(batch.labels[readable])
    return np.concatenate(parts), np.concatenate(labels)


# Reading ------------------------------------------------------------------------------------------


def _opened(batches: Batches) -> Batches:
    """`batches`, which are closed with the interpreter if nobody closes them before."""
    _OPEN.add(batches)
    return batches


@atexit.register
def _close_all() -> None:
    """Readers that nobody closed end before the interpreter, which would complain about them."""
    for batches in list(_OPEN):
        batches.close()


def _in_order(batches: Iterator[Arrays], put: Callable, rows: slice | None) -> Batches:
    """Batches of arrays, of which a few wait on the device."""
    here = rows or slice(None)
    placed = (put((images[here], labels[here])) for images, labels in batches)
    with contextlib.closing(ahead(placed, ON_DEVICE)) as read:
        for images, labels in read:
            yield Batch(images, labels, ())


def _counted(
    images: Stream,
    order: Any,
    batch_size: int,
    put: Callable,
    rows: slice | None = None,
    lost: Sequence[str] = (),
) -> Batches:
    """Batches of a grain dataset of examples, until more than the allowed share of the split's
    images are lost.

    At most `prefetch` of them and 2 + `ON_DEVICE` more are read ahead of their use.
    """

    def placed(batch: Batch) -> Batch:
        images, labels = put(batch[:2])
        return Batch(images, labels, batch.unreadable)

    names = set(lost)
    if rows is not None:
        order = _share(order, batch_size, rows, np.zeros(images.shape[1:], np.uint8))
        batch_size = rows.stop - rows.start
    stacked = _stacked(images.options, order, batch_size)
    reading = ahead(iter(stacked.map(placed)), ON_DEVICE)
    with contextlib.closing(reading) as batches:
        for batch in batches:
            if rows is not None and images.options.unreadable == "skip":
                batch = batch._replace(unreadable=tuple(hosts.gathered(batch.unreadable)))
            names.update(batch.unreadable)
            check_losses(sorted(names), images.shape[0], images.options)
            yield batch


def _share(order: Any, batch_size: int, rows: slice, black: ndarray) -> Any:
    """A grain dataset of the examples at `rows` of every batch of another one. black: the image of
    one behind the end, which does not count.
    """
    import grain

    count = rows.stop - rows.start
    total = len(order)

    def at(own: int) -> Example:
        batch, row = divmod(own, count)
        position = batch * batch_size + rows.start + row
        return order[position] if position < total else Example(black, -1)

    return grain.MapDataset.range(math.ceil(total / batch_size) * count).map(at)


def _stacked(options: Options, order: Any, batch_size: int) -> Any:
    """A grain dataset of batches of a dataset of examples.

    Threads share the images of a batch; processes take whole batches in turn. Both give the same
    batches.
    """
    import grain

    cv2.setNumThreads(1)  # images are what runs side by side
    prefetch = options.prefetch
    workers = options.workers
    stack = partial(_stack_examples, batch_size)
    if workers <= 0:
        threads = usable_cores()
        size = max(threads, prefetch * batch_size)
        reading = grain.ReadOptions(threads, prefetch_buffer_size=size)
        examples = order.to_iter_dataset(reading)
        return examples.batch(batch_size, batch_fn=stack)
    _check_main_guard()
    if not flags.FLAGS.is_parsed():  # without a command line; grain asks for flags of its own
        flags.FLAGS.mark_as_parsed()
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = order.batch(batch_size, batch_fn=stack)
    batches = batches.to_iter_dataset(reading)
    # shared memory outlives a reader that is closed
    copied = grain.experimental.DatasetOptions(min_shm_size=2**62)
    batches = grain.experimental.WithOptionsIterDataset(batches, copied)
    size = math.ceil(prefetch / workers)
    processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=size)
    return batches.mp_prefetch(processes, worker_init_fn=_begin_worker)


def ahead(batches: Any, number: int) -> Generator:
    """`batches`, of which a thread reads up to `number` ahead; close it to end the thread.

    Raises KeyboardInterrupt where a stop is asked for while a batch is waited for. After that a
    read under way, which may hang, is left to its thread.
    """
    ready: queue.Queue = queue.Queue(number)
    ended = threading.Event()
    reader = threading.Thread(target=_fill, args=(ready, batches, ended), daemon=True)
    reader.start()
    try:
        while True:
            stopping.check_here()
            try:
                batch, error = ready.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch
    finally:
        ended.set()
        reader.join(timeout=4 * _PATIENCE if stopping.requested() else None)


def _fill(ready: queue.Queue, batches: Any, ended: threading.Event) -> None:
    """Puts pairs of a batch and None into `ready`, last None and the error that ends them.

    Returns soon after `ended` is set.
    """
    error = None
    while error is None and not ended.is_set():
        batch = None
        try:
            batch = next(batches)
        except BaseException as reason:
            error = reason
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((batch, error), timeout=_PATIENCE)
                break
    batches.close()


def _check_main_guard() -> None:
    """Raises ConfigError in a process that is only started to read, and runs its script again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "config.data.workers starts processes, which import this script again; put the part "
            "that reads under `if __name__ == '__main__':`, or set workers to 0."
        )


def _stack_examples(batch_size: int, examples: Sequence[Example]) -> Batch:
    """The examples as one batch, filled up to `batch_size` with black images."""
    images = np.zeros((batch_size, *examples[0].image.shape), np.uint8)
    labels = np.full(batch_size, -1, np.int32)
    unreadable = []
    for i, (image, label, name) in enumerate(examples):
        images[i] = image
        labels[i] = label
        if name:
            unreadable.append(name)
    return Batch(images, labels, tuple(unreadable))


def _begin_worker(*_: int) -> None:
    """A reading process ends with the one that started it, even when that is killed."""
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# One image ----------------------------------------------------------------------------------------


def example(images: Stream, index: int, draw: Draw) -> Example:
    """Image `index` of the split, of which `draw(height, width)` says the part to use.

    An image that cannot be decoded raises ConfigError, or with `unreadable="skip"` becomes a black
    one that does not count.
    """
    _, size, _, channels = images.shape
    options = images.options
    stored = int(images.indices[index])
    name = images.source.describe(stored)
    try:
        payload, label = images.source.read_one(stored)
        image = part(payload, size, draw, name=name, upright=options.orientation == "exif")
    except UnreadableError as error:
        if options.unreadable == "stop":
            raise ConfigError(f"{error} {SKIPPING}") from None
        return Example(np.zeros(images.shape[1:], np.uint8), -1, name)
    check_label(label, images.num_classes, name)
    if not options.channels:
        check_colour(image, channels, name)
    return Example(fit(image, 0, channels), label)


def _replacement(images: Stream, lost: Example, draw: Draw, seed: Sequence[int]) -> Example:
    """A random image of the split in the place of a lost one, which alone counts as unreadable."""
    for index in np.random.default_rng(seed).integers(images.shape[0], size=_REPLACEMENTS):
        other = example(images, int(index), draw)
        if other.label >= 0:
            return other._replace(unreadable=lost.unreadable)
    raise ConfigError(
        f"{lost.unreadable} cannot be decoded, nor can {_REPLACEMENTS} other images of its "
        "split drawn instead."
    )


def part(
    payload: Any, size: int, draw: Draw, *, name: str = "the image", upright: bool = False
) -> ndarray:
    """The part `draw(height, width)` of an image, resized to [size, size] by `pixels.resize`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which takes a fraction of the time, where the
    part stays at least `size` on both sides; its edges are then rounded to the coarser pixels.
    upright: as in `decoding.decode`, before the part is taken. Raises UnreadableError, with `name`,
    for a damaged image.
    """
    shape = decoding.jpeg_shape(payload) if isinstance(payload, bytes) else None
    factor = 1
    box = None
    if shape:
        if upright and decoding.orientation(payload) >= 5:
            shape = shape[::-1]
        box = draw(*shape)
        enough = [factor for factor in _REDUCED if min(box[2:]) >= factor * size]
        factor = max(enough, default=1)
    image = array_of(payload, name, reduced=_REDUCED.get(factor, 0), upright=upright)
    top, left, height, width = box or draw(*image.shape[:2])
    rows = slice(round(top / factor), round((top + height) / factor))
    columns = slice(round(left / factor), round((left + width) / factor))
    return resize(image[rows, columns], size, size)


def central_box(height: int, width: int, options: Options) -> Box:
    """What stays of an image resized to the shorter side `resize_size` and cut to its centre."""
    share = options.image_size / options.resize_size if options.resize_size else 7 / 8
    side = max(1, round(share * min(height, width)))
    return _centred(height, width, side, side)


def _centred(height: int, width: int, rows: int, columns: int) -> Box:
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def random_box(rng: np.random.Generator, height: int, width: int, options: Options) -> Box:
    """A random part of an image, drawn as by `data.random_box`: ten attempts, else the largest
    central one.
    """
    small, large = options.crop_scale
    low, high = options.crop_ratio
    for _ in range(10):
        share = rng.uniform(small, large)
        area = height * width * share
        logarithm = rng.uniform(math.log(low), math.log(high))
        ratio = math.exp(logarithm)
        h = round(math.sqrt(area / ratio))
        w = round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = rng.integers(height - h + 1)
            left = rng.integers(width - w + 1)
            return int(top), int(left), h, w
    h = max(1, min(height, round(width / low)))
    w = max(1, min(width, round(height * high)))
    return _centred(height, width, h, w)
