"""Images per second of the input pipeline, against PyTorch's DataLoader with the same transforms
and against training.

    python experiments/speed/stream.py            # pip install torch for the rival

Makes JPEGs of ImageNet's usual size (500 x 375, quality 90, about 100 kB), then reads them with the
random crops of a training, 224 x 224. Both sides decode with OpenCV into uint8 batches of the same
shape; the rival decodes whole images, as its users' transforms do, and once more with this
package's reduced decoding. All ways take turns, so that noise hits all of them. The rate at which
networks consume images is measured with the training step itself, on this device.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import platform
import sys
import tempfile
import time

import cv2
import jax
import numpy as np

from sparsity_jax import data, decoding, models, optim, pixels, stream, train

SIZE, CLASSES = 224, 10


def write_images(root: pathlib.Path, count: int) -> None:
    """JPEGs with the detail of photographs: noise whose amplitude falls with its frequency."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = np.full((375, 500, 3), 128.0)
        for level in range(2, 10):  # noise on grids of 4 to 512 cells, weaker on finer ones
            coarse = rng.normal(size=(2**level * 3 // 4, 2**level, 3)) * 70 * 0.85 ** (level - 2)
            image += cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_LINEAR)
        for split in ("train", "test") if i < CLASSES else ("train",):
            file = root / split / f"class{i % CLASSES}" / f"{i:05}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(
                str(file), np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90]
            )


def rate(batches, batch_size: int, warm: int, count: int) -> float:
    """Images per second of `count` batches, after `warm` of them."""
    for _ in itertools.islice(batches, warm):
        pass
    start = time.perf_counter()
    done = sum(1 for _ in itertools.islice(batches, count))
    return done * batch_size / (time.perf_counter() - start)


def own_way(root: pathlib.Path, workers: int, batch_size: int, batches: int):
    dataset = data.load(name=f"folder:{root}", stream=True, image_size=SIZE, workers=workers)
    size = dataset.train.images.shape[0] // batch_size

    def measure(turn: int) -> float:
        epochs = 1 + (2 + workers + batches) // size
        found = stream.train_batches(
            dataset.train.images, [turn], batch_size=batch_size, epochs=epochs
        )
        with contextlib.closing(found):
            return rate(found, batch_size, 2 + workers, batches)

    return measure


class Folder:
    """The rival's data set: the same files, boxes and resizing."""

    def __init__(self, root: pathlib.Path, reduced: bool):
        images = data.load(name=f"folder:{root}", stream=True, image_size=SIZE).train.images
        self.options, self.reduced, self.labels = images.options, reduced, []
        self.files = [images.source.describe(i) for i in range(images.shape[0])]

    def __len__(self) -> int:
        return 100 * len(self.files)

    def __getitem__(self, index: int):
        encoded = pathlib.Path(self.files[index % len(self.files)]).read_bytes()
        draw = lambda height, width: stream.random_box(
            np.random.default_rng(index), height, width, self.options
        )
        if self.reduced:
            image = stream.part(encoded, SIZE, draw)
        else:
            image = decoding.decode(encoded)
            top, left, height, width = draw(*image.shape[:2])
            image = pixels.resize(image[top : top + height, left : left + width], SIZE, SIZE)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), index % CLASSES


def torch_way(root: pathlib.Path, workers: int, batch_size: int, batches: int, reduced: bool):
    import torch

    cv2.setNumThreads(1)
    folder = Folder(root, reduced)

    def measure(turn: int) -> float:
        loader = torch.utils.data.DataLoader(
            folder,
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            worker_init_fn=lambda _: cv2.setNumThreads(1),
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator().manual_seed(turn),
        )
        return rate(iter(loader), batch_size, 2 + workers, batches)

    return measure


def consumed(name: str, batch_size: int, repeats: int) -> list[float]:
    """Images per second of whole training steps on images that are there already."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, SIZE, SIZE, 3), np.uint8)
    split = data.Split(images, rng.integers(0, 1000, batch_size).astype(np.int32))
    dataset = data.Dataset("random", split, split, 1000, (0.5,) * 3, (0.25,) * 3)
    problem = train.build_problem(
        dataset, models.build(name=name, num_classes=1000, stem="imagenet")
    )
    options = dict(
        epochs=1,
        batch_size=batch_size,
        optimizer=optim.settings("sgd", learning_rate=0.1),
        augment="flip",
    )
    fit = train.Fit(**options)
    state = train.create_state(problem, train.key_of(0))
    numbers = train.numbers_of(problem, state, [fit])
    state = train.begin(problem, fit, state, numbers)
    step, times = jax.jit(functools.partial(train.step_on_batch, problem, fit)), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        state = jax.block_until_ready(
            step(state, numbers, 0, problem.train_images, problem.train_labels)
        )
        times.append(batch_size / (time.perf_counter() - start))
    return times[1:]


def row(name: str, rates: list[float]) -> str:
    return f"| {name} | {np.median(rates):.0f} ({min(rates):.0f} - {max(rates):.0f}) |"


def main(
    images: int, batch_size: int, batches: int, turns: int, networks: list[str], model_batch: int
) -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "grain"))
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_images(root, images)
        sizes = [file.stat().st_size for file in root.rglob("*.jpg")]
        print(f"{images} JPEGs of {np.mean(sizes) / 1e3:.0f} kB, batches of {batch_size}\n")
        ways = {"threads": own_way(root, 0, batch_size, batches)}
        for workers in (1, 2):
            ways[f"{workers} processes"] = own_way(root, workers, batch_size, batches)
        if importlib.util.find_spec("torch"):
            for workers, reduced in itertools.product((0, 1, 2), (False, True)):
                name = f"torch DataLoader, {workers} workers" + (
                    ", reduced decoding" if reduced else ""
                )
                ways[name] = torch_way(root, workers, batch_size, batches, reduced)
        else:
            print("torch is not installed: its DataLoader is left out.", file=sys.stderr)
        rates = {name: [] for name in ways}
        for turn in range(turns):
            for name, measure in ways.items():
                rates[name].append(measure(turn))
    print("| input pipeline | images / s |\n|---|---|")
    for name, found in rates.items():
        print(row(name, found), flush=True)
    for name in networks:
        print(
            row(f"training {name}, batch {model_batch}", consumed(name, model_batch, 3)), flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--model_batch", type=int, default=32)
    main(**vars(parser.parse_args()))
