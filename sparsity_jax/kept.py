"""The trained networks that a run keeps beside its checkpoints, by label, as small files.

`workdir/networks/POSITION.safetensors` holds parameters, batch statistics and masks of the network
as the stage at that place of the pipeline left it, before the next training made another one.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from jax import Array

from sparsity_jax import hosts, intact, meshes, trees
from sparsity_jax.intact import DamagedError
from sparsity_jax.tables import reason_of
from sparsity_jax.types import AnyPath

__all__ = ["FOLDER", "Kept", "arrays", "networks", "save"]

FOLDER = "networks"
_PARTS = ("params", "batch_stats", "step", "key")  # of a train.State
_MASKS = "masks"  # in bits


class Kept(NamedTuple):
    """A network on disk. position: in the pipeline, of the stage that left it so."""

    file: Path
    label: str
    position: int


def networks(workdir: AnyPath) -> dict[str, Kept]:
    """The networks that the run in `workdir` has kept, by label, in the order of the pipeline.

    Raises DamagedError for a file that is not as it was written.
    """
    folder = Path(workdir) / FOLDER
    found = {}
    sums = intact.read_sums(folder)
    for file in sorted(folder.glob("[0-9]*.safetensors")):
        if file.name in sums:  # else its run ended while it was written, and goes on before it
            if intact.digest_of(file) != sums[file.name]:
                raise DamagedError(f"{file} is not as it was written")
            label = _label_in(file)
            found[label] = Kept(file, label, int(file.stem))
    return found


def _label_in(file: Path) -> str:
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            return opened.metadata()["label"]
    except (safetensors.SafetensorError, TypeError, KeyError) as error:
        raise DamagedError(f"{file} holds no network of a run: {reason_of(error)}") from None


def save(workdir: AnyPath, state: Any, label: str, position: int, most: int) -> None:
    """Keeps the network of a train.State; of older ones those of other labels stay, `most` in all.

    A second call with the same network changes nothing.
    """
    arrays = _arrays_of(state) if most else {}
    hosts.by_first(_write, Path(workdir) / FOLDER, arrays, label, position, most)


def _write(folder: Path, arrays: dict[str, Array], label: str, position: int, most: int) -> None:
    """`save`, of arrays by path."""
    before = [kept for kept in networks(folder.parent).values() if kept.position < position]
    others = [kept for kept in before if kept.label != label]
    if most:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{position:03d}.safetensors"
        intact.write(file, safetensors.flax.save(arrays, {"label": label}))
        intact.record(file)
    staying = others[max(len(others) + 1 - most, 0) :] if most else []
    for kept in before:
        if kept not in staying:
            intact.remove(kept.file)


def _arrays_of(state: Any) -> dict[str, Array]:
    """The arrays of a state by path, masks packed in bits."""
    tree = {name: getattr(state, name) for name in _PARTS}
    tree[_MASKS] = jax.tree.map(np.packbits, meshes.fetch(state.masks))
    return trees.named_leaves(meshes.fetch(tree))


def arrays(kept: Kept) -> dict[str, Array]:
    """The arrays of a kept network by path, as a checkpoint of its run has them."""
    stored = safetensors.flax.load_file(kept.file)
    for path in [path for path in stored if path.startswith(f"{_MASKS}/")]:
        like = stored[path.replace(_MASKS, "params", 1)]
        bits = np.unpackbits(np.asarray(stored[path]), count=like.size)
        stored[path] = jnp.asarray(bits.reshape(like.shape), bool)
    return stored
