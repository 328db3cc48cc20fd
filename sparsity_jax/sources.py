"""What a set is before it is decoded: two splits of encoded images or arrays, each with a label.

Here are sets of arrays, and the digits; `folders` and `prepared` open the others.
"""

import functools
import importlib.metadata
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from sparsity_jax import decoding
from sparsity_jax.tables import ConfigError

__all__ = [
    "SETS",
    "Arrays",
    "Opened",
    "Pairs",
    "Source",
    "UnreadableError",
    "array_of",
    "arrays_source",
    "as_decoded",
    "check_colour",
    "check_label",
    "in_epochs",
    "of_arrays",
    "open_digits",
    "read_digits",
]

Arrays = tuple[ndarray, ndarray]  # images and labels
Pairs = list[tuple[Any, int]]  # of an image, encoded bytes or uint8 [H, W], and its label


class UnreadableError(ConfigError):
    """An image that is damaged or not there; the message names it. A stream may go on without such
    images.
    """


class Source(NamedTuple):
    """One split that is there but not decoded.

    epochs: where it comes in an order of its own, the batches (images, labels) of epoch i.
    """

    size: int
    read: Callable[[Sequence[int]], Pairs]  # of indices
    describe: Callable[[int], str]  # where item i comes from, for errors
    epochs: Callable[[int], Iterable] | None = None

    def read_one(self, index: int) -> tuple[Any, int]:
        """Image and label of one item."""
        return self.read([index])[0]


class Opened(NamedTuple):
    """A set whose splits can be read, image by image."""

    train: Source
    test: Source
    num_classes: int
    channels: int  # 0: decided by the first train image


def array_of(payload: Any, name: str, *, reduced: int = 0, upright: bool = False) -> ndarray:
    """What a `Source` reads, decoded if it is not yet; see `decoding.decode`. Raises
    UnreadableError for an image that is damaged. name: of it.
    """
    if isinstance(payload, ndarray):
        return payload
    image = decoding.decode(payload, reduced=reduced, upright=upright)
    if image is None:
        raise UnreadableError(f"{name} {decoding.why_not(payload)}")
    return image


def check_label(label: int, num_classes: int, name: str) -> None:
    """Raises ConfigError for a label that is no class; name: the image's."""
    if not 0 <= label < num_classes:
        raise ConfigError(
            f"{name} has the label {label} where 0..{num_classes - 1} are classes; unlabelled "
            "splits cannot be used, name another one through config.data.train_split or test_split."
        )


def check_colour(image: ndarray, channels: int, name: str) -> None:
    """Raises ConfigError for an image in colour of a grey set; channels: of the set."""
    if image.ndim == 3 and channels == 1:
        raise ConfigError(
            f"{name} is in colour, the set is grey; set config.data.channels to 1 or 3."
        )


# Arrays -------------------------------------------------------------------------------------------


def of_arrays(train: Arrays, test: Arrays, num_classes: int) -> Opened:
    """Pairs of images, uint8 [N, H, W] or [N, H, W, C], and labels, integers [N], as a set; C is 1,
    or 3 for RGB.
    """
    images, labels = train
    channels = 1 if images.ndim == 3 else images.shape[-1]
    first = arrays_source(len(labels), lambda: train)
    second = arrays_source(len(test[1]), lambda: test)
    return Opened(first, second, num_classes, channels)


def arrays_source(size: int, load: Callable[[], Arrays], what: str = "image") -> Source:
    """Pairs of `load()`, the arrays in RGB, which are made when they are needed."""

    def read(indices: Sequence[int]) -> Pairs:
        images, labels = load()
        return [(as_decoded(images[i]), int(labels[i])) for i in indices]

    return Source(size, read, lambda i: f"{what} {i}")


def in_epochs(batches: Callable[[int], Iterable], size: int) -> Source:
    """A split of `size` images that comes in an order of its own: `batches(epoch)` gives pairs of
    images, uint8 [B, H, W, C] in RGB, and labels [B].

    The same epoch must give the same, then a run that is resumed goes on exactly.
    """

    def read(indices: Sequence[int]) -> Pairs:
        first = max(indices, default=-1) + 1
        pairs = ((image, label) for batch in batches(0) for image, label in zip(*batch))
        there = dict(enumerate(itertools.islice(pairs, first)))
        return [(as_decoded(there[i][0]), int(there[i][1])) for i in indices]

    return Source(size, read, lambda index: f"image {index} of epoch 0", batches)


def as_decoded(image: ndarray) -> ndarray:
    """A grey [H, W] or [H, W, 1] or RGB image as a decoder gives it: [H, W] or BGR."""
    if image.ndim == 3 and image.shape[-1] == 1:
        return image[..., 0]
    if image.ndim == 3:
        return image[..., ::-1]
    return image


def open_digits(train_split: str, test_split: str) -> Opened:
    """The digits inside scikit-learn: the first 1,437 train, the other 360 test."""
    if train_split != "train" or test_split not in ("", "test"):
        raise ConfigError(
            f"'digits' has the splits 'train' and 'test', not {train_split!r} and {test_split!r}."
        )
    train = arrays_source(1437, lambda: read_digits()[0], "digit")
    test = arrays_source(360, lambda: read_digits()[1], "digit")
    return Opened(train, test, num_classes=10, channels=1)


SETS = {"digits": open_digits}  # sets by name: opened(train_split, test_split)


@functools.cache
def read_digits() -> tuple[Arrays, Arrays]:
    """The train and the test digits. Within each class every fifth image is test."""
    # the file alone: all of scikit-learn takes a second and a half to import
    library = importlib.metadata.distribution("scikit-learn")
    file = library.locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), np.int64, delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16))
    images = pixels.astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, -1]
    test = np.sort(np.argsort(labels, kind="stable")[::5])
    train = np.delete(np.arange(len(images)), test)
    return (images[train], labels[train]), (images[test], labels[test])
