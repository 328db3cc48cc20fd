"""Sets that are folders of images: every file of a class counts once, and none is lost unseen."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from sparsity_jax.decoding import SUFFIXES, format_of
from sparsity_jax.sources import Opened, Pairs, Source, UnreadableError
from sparsity_jax.tables import ConfigError

__all__ = ["Images", "Listing", "open_folder", "read_file"]

# folders of file managers; those that begin with a dot are passed over too
_LEFT_BY_TOOLS = ("@eaDir", "__MACOSX")
_ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet
Listing = dict[str, tuple[str, str]]  # (class, path) of each image, by its real path
Images = Iterator[tuple[str, str, str]]  # class, path, real path


def open_folder(path: str, train_split: str, test_split: str) -> Opened:
    """The set in the folder `path`, whose files are listed; see `data.Options` for the arguments.
    Raises ConfigError if it cannot be used.
    """
    root = pathlib.Path(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise ConfigError(
            f"config.data.name is 'folder:{path}', but there is no directory {root.absolute()}."
        )
    test_split = test_split or _test_folder(root)
    if train_split == test_split:
        raise ConfigError(f"config.data.train_split and test_split are both {train_split!r}.")
    train = _list_images(root / train_split)
    test = _list_images(root / test_split)
    train_classes = {name for name, _ in train.values()}
    test_classes = {name for name, _ in test.values()}
    lonely = [f"{train_split}/{name}" for name in sorted(train_classes - test_classes)]
    lonely += [f"{test_split}/{name}" for name in sorted(test_classes - train_classes)]
    if lonely:
        named = ", ".join(map(repr, lonely[:5]))
        raise ConfigError(
            f"{root}: {train_split} and {test_split} need the same class directories; in one only: "
            f"{named}."
        )
    for place in train.keys() & test.keys():
        raise ConfigError(
            f"{test[place][1]} of the test split is the same file as {train[place][1]} of the "
            "train split; the two must not share images."
        )
    return Opened(_folder_source(train), _folder_source(test), len(train_classes), channels=0)


def _test_folder(root: pathlib.Path) -> str:
    """The split of a folder for testing, where none is named."""
    order = ["test", "val", "validation"]
    if (root / "val" / _ANNOTATIONS).is_file():
        order = ["val"]  # the official Tiny-ImageNet has a test directory without labels
    return next((split for split in order if (root / split).is_dir()), "test")


def _folder_source(images: Listing) -> Source:
    """Images in the order of their classes and paths."""
    names, paths = zip(*sorted(images.values()))
    _, labels = np.unique(names, return_inverse=True)

    def read(indices: Sequence[int]) -> Pairs:
        return [(read_file(paths[i]), int(labels[i])) for i in indices]

    return Source(len(paths), read, paths.__getitem__)


def read_file(file: str) -> bytes:
    """The bytes of a file; raises UnreadableError where they cannot be read."""
    try:
        return pathlib.Path(file).read_bytes()
    except OSError as error:
        raise UnreadableError(f"{file} cannot be read: {error.strerror}.") from error


def _list_images(split: pathlib.Path) -> Listing:
    """The image files below the directory of each class.

    Every file of a class counts once, however many links lead to it. Hidden files and folders,
    those of file managers and files that are no images are passed over. Raises ConfigError for
    everything else that would be lost or counted twice: a directory that cannot be listed, images
    of other formats or outside of the classes, and a file in two classes.
    """
    if not os.path.isdir(split):
        raise ConfigError(
            f"{split} is missing; a folder needs train/ and test/ (or val/), with one directory "
            "per class."
        )
    listed: Listing = {}
    images = _visible_images
    if (split / _ANNOTATIONS).is_file():
        images = _annotated_images
    for name, path, place in images(split):
        other, _ = listed.setdefault(place, (name, path))
        if other != name:
            advice = "remove one of them, an image has one class"
            raise ConfigError(f"{path} is the same file as one of the class {other!r}; {advice}.")
    return listed


def _visible_images(split: pathlib.Path) -> Images:
    """Those of all classes, which are the directories of a split."""
    _, _, classes, files = next(_walk(split), ("", "", [], []))
    if not classes:
        raise ConfigError(
            f"{split} has no class directories; put the images of class X into {split / 'X'}."
        )
    for file in files:
        if _is_image(str(split / file)):
            raise ConfigError(f"{split / file} is in no class directory; move it into one.")
    for name in classes:
        empty = True
        for folder, real, _, files in _walk(split / name):
            paths = [os.path.join(folder, file) for file in files]
            for path in filter(_is_image, paths):
                empty = False
                place = os.path.join(real, os.path.basename(path))
                if os.path.islink(path):
                    place = os.path.realpath(path)
                yield name, path, place
        if empty:
            raise ConfigError(
                f"{split / name} has no images ({', '.join(SUFFIXES)}); remove it or fill it."
            )


def _walk(directory: pathlib.Path) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """(directory, its real path, directories in it, files in it) of everything visible, sorted.

    Links are followed, to each directory once, and never to one that contains the link.
    """
    visited = set()
    for folder, names, files in os.walk(directory, onerror=_refuse_listing, followlinks=True):
        place = os.path.realpath(folder)
        parent = os.path.dirname(folder)
        around = os.path.realpath(parent)
        if place in visited or os.path.commonpath((place, around)) == place:
            names.clear()
            continue
        visited.add(place)
        names[:] = sorted(filter(_is_visible, names))
        yield folder, place, names, sorted(filter(_is_visible, files))


def _refuse_listing(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}.") from error


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in _LEFT_BY_TOOLS


def _is_image(path: str) -> bool:
    """Whether a file counts as an image, by its suffix.

    Raises ConfigError for what looks like an image and would not count: an image by its content
    under another suffix, and an image by its suffix that is no file.
    """
    is_file = os.path.isfile(path)
    if path.lower().endswith(SUFFIXES):
        if os.path.exists(path) and not is_file:
            raise ConfigError(f"{path} is no file but a pipe or device; remove it.")
        return True
    start = b""
    with contextlib.suppress(OSError):
        if is_file:
            with open(path, "rb") as file:
                start = file.read(32)
    kind = format_of(start)
    if kind:
        allowed = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise ConfigError(
            f"{path} is an image ({kind}) that would not be read; allowed: files named "
            f"{allowed}. Convert or rename it, or remove it."
        )
    return False


def _annotated_images(split: pathlib.Path) -> Images:
    """Those of Tiny-ImageNet: "file <tab> class <tab> box" for the files in images/."""
    annotations = split / _ANNOTATIONS
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{annotations} cannot be read: {error}.") from error
    lines = list(filter(str.strip, lines))
    if not lines:
        raise ConfigError(f"{annotations} names no images.")
    for line in lines:
        file, *rest = line.split("\t")
        if not rest or os.path.basename(file) != file:
            raise ConfigError(
                f"{annotations}: the line {line!r} is no file and class with a tab between them."
            )
        path = str(split / "images" / file)
        yield rest[0], path, os.path.realpath(path)
