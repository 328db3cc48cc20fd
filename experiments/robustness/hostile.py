"""Reads damaged and hostile weight files, folders of images and prepared sets.

    python experiments/robustness/hostile.py --tries 300

Every try begins with whole data and damages it at random. Allowed: the data that an independent
count expects, arrays of numbers (a weight file has no checksum of its values), or one sentence as
ConfigError. Anything else fails: another exception, another number of images, a module that was
imported because a file names it. Files of PyTorch are tried where it is installed. Prints the
counts; exits 1 on a failure.
"""

import argparse
import collections
import functools
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Callable

import cv2
import numpy as np

from sparsity_jax import data, models, pretrained, tables, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
test_data = importlib.import_module("test_data")  # writes folders and prepared sets
CANARY = "hostile_canary"
Rng = np.random.Generator


def damaged(content: bytes, rng: Rng) -> bytes:
    """`content` with a few bits flipped, a part missing, repeated or replaced, or nothing of it
    left.
    """
    first, last = sorted(rng.integers(0, len(content), 2))
    noise = rng.bytes(int(last - first))
    ways = [
        content[:first],
        content[last:],
        content[:first] + content[last:],
        content[:last] + content[first:],
        content[:first] + noise + content[last:],
        noise,
    ]
    way = int(rng.integers(len(ways) + 4))
    if way < len(ways):
        return ways[way]
    flipped = bytearray(content)
    for place in rng.integers(
        0, min(len(content), int(10 ** rng.uniform(1, 5))), 1 + int(rng.integers(3))
    ):
        flipped[place] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


# Weight files -------------------------------------------------------------------------------------


@functools.cache
def network() -> tuple[train.Problem, dict]:
    """A small network and its weights under the names of PyTorch."""
    dataset = data.load(name="digits", train_limit=32, test_limit=20)
    model = models.build(name="small_cnn", num_classes=10, widths=(4, 4, 4), dense_widths=(8,))
    problem = train.build_problem(dataset, model)
    state = train.create_state(problem, train.key_of(0))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return problem, pretrained.to_torch(variables)


def weights(suffix: str, folder: pathlib.Path, rng: Rng) -> str:
    problem, arrays = network()
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        pretrained.write(path, arrays)
    else:
        import torch

        folder.mkdir()
        torch.save(
            {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, path
        )
    path.write_bytes(damaged(path.read_bytes(), rng))
    like = {"params": train.create_state(problem, train.key_of(0)).params, "batch_stats": {}}
    variables = pretrained.to_variables(pretrained.read(path), like)
    kernel = np.asarray(variables["params"]["fc"]["kernel"])
    return (
        "" if kernel.shape == (8, 10) and np.isfinite(kernel).all() else "weights of another kind"
    )


# Folders ------------------------------------------------------------------------------------------


def link(place: pathlib.Path, target: pathlib.Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def write(place: pathlib.Path, content: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


HARMLESS: dict[
    str, Callable
] = {  # what tools and links leave behind; images among them count once or not at all
    "hidden folder": lambda c, image: write(c / ".thumbs" / "0.png", image),
    "hidden file": lambda c, image: write(c / "._0.png", image),
    "archive": lambda c, image: write(c.parent / "__MACOSX" / "0.png", image),
    "text": lambda c, image: write(c / "notes.txt", b"no image"),
    "link to the class": lambda c, image: link(c / "again", c),
    "link to the split": lambda c, image: link(c / "sub" / "up", c.parent),
    "link to the root": lambda c, image: link(c / "root", c.parent.parent),
    "link to itself": lambda c, image: link(c / "self", c / "self"),
    "link to an image": lambda c, image: link(c / "copy.png", c / "0.png"),
}
FATAL: dict[str, Callable] = {  # what must be told
    "noise": lambda c, image: write(c / "broken.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
    "cut short": lambda c, image: write(c / "short.png", image[: len(image) // 2]),
    "another size": lambda c, image: write(
        c / "large.png", cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1]
    ),
}


def folder_of_images(folder: pathlib.Path, rng: Rng) -> str:
    test_data.folder_of_two(folder)
    image = (folder / "train/cat/0.png").read_bytes()
    place = folder / str(rng.choice(["train/cat", "train/ant", "test/cat"]))
    for name in rng.choice(list(HARMLESS), int(rng.integers(0, 5)), replace=False):
        HARMLESS[name](place, image)
    added = int(rng.integers(0, 3))
    for i in range(added):
        write(place / "deeper" / f"more_{i}.png", image)
    fatal = str(rng.choice([*FATAL, *[""] * len(FATAL)]))
    if fatal:
        FATAL[fatal](place, image)
    try:
        loaded = data.load(name=f"folder:{folder}")
    except tables.ConfigError:
        if fatal:
            raise
        return "refused, though nothing is wrong"
    found = len(loaded.train.labels) + len(loaded.test.labels)
    expected = 7 + added
    return (
        ""
        if not fatal and found == expected
        else f"{found} images, expected {expected}, {fatal or 'all whole'}"
    )


# Prepared sets ------------------------------------------------------------------------------------


def prepared_set(folder: pathlib.Path, rng: Rng) -> str:
    splits = {"train": test_data.random_split(0, 12), "test": test_data.random_split(1, 4)}
    test_data.write_tfds(folder, "cifar10", splits)
    whole = data.load(name="cifar10", data_dir=str(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[int(rng.integers(len(files)))]
    text = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.5:
        text = text.replace(b"tensorflow_datasets.core", CANARY.encode())
    else:
        text = damaged(text, rng)
    path.write_bytes(text)
    loaded = data.load(name="cifar10", data_dir=str(folder))
    if CANARY in sys.modules:
        return f"{path.name} made the reader import a module"
    same = [
        np.array_equal(getattr(whole, split).images, getattr(loaded, split).images)
        and np.array_equal(getattr(whole, split).labels, getattr(loaded, split).labels)
        for split in splits
    ]
    return "" if all(same) else f"other images after damage to {path.name}"


def tried(read: Callable[[pathlib.Path, Rng], str], seed: int) -> str:
    """ "read", "refused" or what is wrong, of one try."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return read(pathlib.Path(folder) / "data", np.random.default_rng(seed)) or "read"
        except tables.ConfigError:
            return "refused"
        except Exception as error:
            return f"seed {seed}: {type(error).__name__}: {error}"


def main() -> None:
    readers = {"safetensors": functools.partial(weights, ".safetensors")}
    if importlib.util.find_spec("torch"):
        readers["torch.save"] = functools.partial(weights, ".pth")
    readers |= {"folders": folder_of_images, "prepared sets": prepared_set}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=300, help="of each kind (300)")
    parser.add_argument("--kinds", nargs="*", choices=readers, default=list(readers), help="(all)")
    arguments = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / f"{CANARY}.py").write_text("")
        sys.path.insert(0, folder)
        for kind in arguments.kinds:
            counts = collections.Counter()
            for seed in range(arguments.tries):
                ending = tried(readers[kind], seed)
                counts[ending if ending in ("read", "refused") else "wrong"] += 1
                if ending not in ("read", "refused"):
                    sys.stdout.write(f"{kind}: {ending}\n")
            sys.stdout.write(f"{kind}: {dict(counts)}\n")
            failures += counts["wrong"]
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
