"""One of several processes that run the same configs together: `several.py FOLDER ADDRESS NUMBER
RANK`, see test_hosts.py.
"""

import contextlib
import pathlib
import sys
from unittest import mock

import cv2
import numpy as np
import tiny
from absl import flags

CASES = ("memory", "streamed", "divided")


def write_images(folder: pathlib.Path) -> None:
    """Few small images of two classes, of which one each of train and test cannot be decoded."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 18), ("test", 5)):
        for label in "ab":
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (10, 12, 3), np.uint8)
                cv2.imwrite(str(place / f"{i}.png"), pixels)
        (folder / split / "a" / "3.png").write_bytes(b"no image")


def config_of(case: str, folder: pathlib.Path) -> dict:
    """A tiny run: two members side by side, in turn with images of a stream, or one network that
    four devices have shares of.
    """
    if case == "divided":
        mesh = dict(data=2, params=2)
        model = dict(name="mlp", widths=(64, 64))  # of which one kernel is worth dividing
        return tiny.config("fit", "curve", model=model, mesh=mesh, eval_batch_size=32)
    if case == "begun":
        return dict(config_of("divided", folder), steps_per_call=1)
    if case == "memory":
        return tiny.config("again", sweep=dict(seed=(0, 1)), checkpoint_seconds=0.0)
    skipping = dict(image_size=8, unreadable="skip", unreadable_share=0.3)
    images = dict(name=f"folder:{folder / 'images'}", stream=True, **skipping)
    turns = dict(seed=(0, 1), mode="loop")
    return tiny.config("again", data=images, eval_batch_size=8, sweep=turns)


def begin(config: dict, workdir: pathlib.Path, looks: float) -> None:
    """Runs until a stop, which this process asks for after so many looks."""
    from sparsity_jax import pipeline, stopping

    check = stopping.check
    looked = 0

    def counted() -> None:
        nonlocal looked
        looked += 1
        if looked > looks:
            stopping.request()
        check()

    with mock.patch.object(stopping, "check", counted), contextlib.suppress(KeyboardInterrupt):
        pipeline.run(config, workdir)
    stopping.clear()


def refusal(config: dict, workdir: pathlib.Path) -> str:
    """Why such a run is refused."""
    from sparsity_jax import pipeline, tables

    try:
        pipeline.run(config, workdir)
    except tables.ConfigError as error:
        return str(error)
    return ""


def main(folder: str, address: str, number: str, rank: str) -> None:
    flags.FLAGS(["several"])
    import jax

    from sparsity_jax import hosts, meshes, pipeline, watch

    root = pathlib.Path(folder)
    seconds = watch.Limits(*[60.0] * 4)
    hosts.begin(watch.Place(address, int(number), int(rank)), seconds)
    with tiny.pages(False):
        for case in CASES:
            outcome = pipeline.run(config_of(case, root), root / case)
            leaves = jax.tree.leaves(meshes.fetch(outcome.state))
            np.savez(root / f"{case}_{rank}.npz", *leaves)
        config = config_of("memory", root)
        told = [
            refusal(config, root / f"own_{rank}"),
            refusal({**config, "seed": int(rank)}, root / "differing"),
        ]
        begin(config_of("begun", root), root / "begun", 0 if rank == "2" else np.inf)
    (root / f"refused_{rank}").write_text("\n".join(told))
    hosts.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
