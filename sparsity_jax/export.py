"""Networks as folders that run without this library; `evaluate` writes them on the command line.

`export` writes variables.npz, network.stablehlo and network.json; `load` reads them back. The
compact network is exported where whole channels are masked.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax import export as stablehlo

from sparsity_jax import (
    building,
    compaction,
    cost,
    coupling,
    groups,
    intact,
    models,
    plans,
    report,
    structured,
    tables,
    train,
    trees,
    versions,
)
from sparsity_jax.tables import ConfigError
from sparsity_jax.train import Problem, State
from sparsity_jax.types import AnyPath, Arrays, Config, Fields, PyTree, Shape

__all__ = [
    "check_export",
    "check_shapes",
    "compared",
    "export",
    "load",
    "replacing",
    "verify",
    "write",
]

_Platform = Literal["cpu", "cuda", "rocm", "tpu"]
_FORMAT = 2  # of an exported folder
_VARIABLES = "variables.npz"
_PROGRAM = "network.stablehlo"
_ABOUT = "network.json"
_USE = (  # lines that need jax and flatbuffers only, and one on the arrays alone
    "import hashlib, jax.export, json, pathlib",
    (
        f"program, about = pathlib.Path('{_PROGRAM}').read_bytes(), "
        f"json.loads(pathlib.Path('{_ABOUT}').read_text())"
    ),
    (
        f"assert hashlib.sha256(program).hexdigest() == about['sha256']['{_PROGRAM}']  # it is as "
        "it was written"
    ),
    "network = jax.export.deserialize(bytearray(program))",
    (
        "logits = network.call(images)  # float32 [batch >= 1, height, width, channels]: "
        "(uint8 / 255 - mean) / std"
    ),
    (
        f"# numpy.load('{_VARIABLES}')[path] is an array; where arrays[path] is bfloat16, its "
        ".view(ml_dtypes.bfloat16)"
    ),
)


def compared(
    problem: Problem, state: State, *, batch_size: int = 64, repeats: int = 0
) -> tuple[bool, Fields | None, str]:
    """(whether whole channels are masked, numbers of the network without them, why there is none).

    The one verdict on the compact network, for tables and exports: its logits of `batch_size` test
    images are those of the masked network but for rounding. repeats: see `compaction.take_stock`.
    """
    is_cut, note = _channels_cut(problem, state)
    if not is_cut:
        return False, None, note
    options = compaction.Compact(batch_size=batch_size, repeats=repeats)
    try:
        stock = compaction.take_stock(problem, state, options)
        warning = f"{stock['warning']}." if stock["warning"] else ""
    except (TypeError, ValueError) as error:
        warning = str(error)
    if warning:
        return True, None, f"cannot be compacted: {warning}"
    return True, stock, ""


def _channels_cut(problem: Problem, state: State) -> tuple[bool, str]:
    """(whether whole channels are masked, why that cannot be told or "")."""
    if all(leaf.all() for leaf in jax.tree.leaves(state.masks)):
        return False, ""
    try:
        channels = structured.channels_of(problem)
    except (TypeError, ValueError) as error:
        return False, f"its channels cannot be traced: {error}"
    alive = coupling.alive(channels, {"params": state.masks})
    return any(not own.all() for own in alive.values()), ""


def check_export(folder: AnyPath, *, platforms: Sequence[str] = ("cpu",)) -> None:
    """Raises ConfigError for unknown platforms, and for a folder that is not new or empty."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not empty; export to a new folder.")
    tables.convert(tuple(platforms), tuple[_Platform, ...], "platforms")


# Writing ------------------------------------------------------------------------------------------


def export(
    problem: Problem,
    model: Config,
    state: State,
    folder: AnyPath,
    *,
    platforms: Sequence[str] = ("cpu",),
    dense: bool = False,
) -> pathlib.Path:
    """Writes one member's network, compact where whole channels are masked, to the new `folder`.

    variables.npz: its arrays by path; NumPy has no bfloat16, so such an array comes as raw bytes
    and is read by `array.view(ml_dtypes.bfloat16)`. network.stablehlo: images to logits with the
    weights inside, for any batch of one image or more, to be run by `jax.export` alone.
    network.json: classes, image shape, mean and std, the channels kept by group and how many there
    were, versions, `model` (config.model of the run) and how to run it. The folder appears whole or
    not at all.
    platforms: where the program shall run: cpu, cuda, rocm, tpu. dense: with its masked channels,
    as zeros. Raises ConfigError for a folder that is not empty and, unless dense, for a network
    that cannot be compacted.
    """
    check_export(folder, platforms=platforms)
    with replacing(pathlib.Path(folder)) as part:
        write(problem, model, state, part, platforms=platforms, dense=dense)
    return pathlib.Path(folder)


def write(
    problem: Problem,
    model: Config,
    state: State,
    folder: pathlib.Path,
    *,
    platforms: Sequence[str],
    dense: bool,
    note: str | None = None,
) -> None:
    """Writes what `export` says and reads it back. note: of `compared`; None: to be found."""
    dataset = problem.dataset
    whole = variables = state.variables
    apply = problem.model.apply
    keep: Arrays = {}
    sizes: dict[str, int] = {}
    is_compact = False
    if not dense:
        if note is None:
            _, _, note = compared(problem, state)
        if note:
            raise ConfigError(
                f"the network cannot be exported without its masked channels: {note} With its "
                "channels it can: --dense, or dense=True."
            )
        is_compact, _ = _channels_cut(problem, state)
    if is_compact:
        variables, apply, keep, channels = compaction.compacted(problem, state)
        sizes = channels.sizes
    shape = problem.image(1).shape[1:]
    program = _traced(lambda images: apply(variables, images), shape, platforms)
    arrays = {path: np.asarray(leaf) for path, leaf in trees.named_leaves(variables).items()}
    described = {}
    for path, array in arrays.items():
        described[path] = dict(shape=array.shape, dtype=str(array.dtype))
    libraries = ("jax", "jaxlib", "flax", "numpy")
    about = dict(
        format=_FORMAT,
        model=dict(model),
        data=dataset.name,
        num_classes=dataset.num_classes,
        image_shape=shape,
        mean=dataset.mean,
        std=dataset.std,
        compact=is_compact,
        keep={name: np.flatnonzero(own) for name, own in keep.items()},
        sizes=sizes,
        arrays=described,
        parameters=cost.num_params(variables),
        parameters_dense=cost.num_params(whole),
        bytes=cost.num_bytes(variables),
        bytes_dense=cost.num_bytes(whole),
        platforms=list(program.platforms),
        versions={name: importlib.metadata.version(name) for name in libraries},
        use=_USE,
    )
    _write_files(folder, arrays, bytes(program.serialize()), report.plain(about))


def _traced(
    network: Callable[[Array], Array], shape: Shape, platforms: Sequence[str]
) -> stablehlo.Exported:
    """The program of a network, for batches of any size. shape: of one image."""
    (batch,) = stablehlo.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    return stablehlo.export(jax.jit(network), platforms=tuple(platforms))(images)


def _write_files(folder: pathlib.Path, arrays: Arrays, program: bytes, about: Fields) -> None:
    """Writes the three files with the checksums of what they shall hold, and verifies them."""
    stored = io.BytesIO()
    np.savez(stored, **dict[str, Any](arrays))
    contents = {_VARIABLES: stored.getvalue(), _PROGRAM: program}
    digest = lambda data: hashlib.sha256(data).hexdigest()
    about["sha256"] = {name: digest(data) for name, data in contents.items()}
    about["checksum"] = intact.digest_of_value(about)
    contents[_ABOUT] = f"{json.dumps(about, indent=1)}\n".encode()
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    verify(folder)


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes the new `folder` at the end, or vanishes on an error."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        part = pathlib.Path(place) / folder.name
        part.mkdir()
        yield part
        part.replace(folder)


# Reading ------------------------------------------------------------------------------------------


def verify(folder: AnyPath) -> Fields:
    """What network.json of an exported folder says, after all files were compared with their sums.

    Raises ConfigError for a folder without an exported network, and naming the file that is not as
    it was written. network.json has SHA-256 of the other files in `sha256`, and in `checksum` that
    of its own other fields, as `json.dumps(..., sort_keys=True)` writes them.
    """
    folder = pathlib.Path(folder)
    for name in (_ABOUT, _VARIABLES, _PROGRAM):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no whole exported network (no {name}).")
    about = intact.read_object(folder / _ABOUT)
    if about.get("format") != _FORMAT:
        raise ConfigError(
            f"{folder / _ABOUT} has the format {about.get('format')!r}; known: {_FORMAT}."
        )
    rest = {name: value for name, value in about.items() if name != "checksum"}
    digests = {_ABOUT: intact.digest_of_value(rest)}
    digests |= {name: intact.digest_of(folder / name) for name in (_VARIABLES, _PROGRAM)}
    for name, digest in digests.items():
        written = about.get("checksum") if name == _ABOUT else about["sha256"].get(name)
        if written != digest:
            raise intact.DamagedError(
                f"{folder / name} is not as it was written (its checksum differs); export anew."
            )
    return about


def load(folder: AnyPath) -> tuple[PyTree, Callable[..., Array]]:
    """(variables, apply) of a network that `export` wrote, of its smaller sizes.

    `logits = apply(variables, images)`; images: float32 [batch, height, width, channels],
    normalised as network.json says. The model is built anew from network.json and traced, so no
    width has to be known; `apply` can be differentiated and trained further. Raises ConfigError for
    a folder without an exported network, for a file that is not as it was written, see `verify`,
    and if network.json does not fit the arrays.
    """
    folder = pathlib.Path(folder)
    about = verify(folder)
    with np.load(folder / _VARIABLES, allow_pickle=False) as stored:
        arrays = dict(stored)
    images = lambda count: jax.ShapeDtypeStruct((count, *about["image_shape"]), jnp.float32)
    with tables.within(f"{folder / _ABOUT}: model"):
        plans.check_model(about["model"])
        with building.making_network("says a network that"):
            model = models.build(num_classes=about["num_classes"], **about["model"])
            shapes = jax.eval_shape(model.init, jax.random.key(0), images(1))
        train.check_memory(cost.num_bytes(shapes), "makes a network whose weights")
    wanted = trees.named_leaves(shapes)
    apply = model.apply
    if about["compact"]:
        channels = groups.trace(model.apply, shapes, images(2))
        if channels.sizes != about["sizes"]:
            raise ConfigError(
                f"{folder / _ABOUT}: the model has other channel groups than those it names."
            )
        keep = {}
        for name, size in channels.sizes.items():
            keep[name] = np.isin(np.arange(size), about["keep"][name])
        wanted = groups.compact_shapes(channels, keep)
        apply = groups.elastic(model.apply, channels, keep)
    stored_shapes = {path: array.shape for path, array in arrays.items()}
    needed = {path: leaf.shape for path, leaf in wanted.items()}
    check_shapes(f"{folder / _VARIABLES}", stored_shapes, needed, f" Was {_ABOUT} edited?")

    def typed(path: str, _: Any) -> Array:
        dtype = jnp.dtype(about["arrays"][path]["dtype"])
        return jnp.asarray(arrays[path].view(dtype))  # bfloat16 was stored as raw bytes

    return trees.map_named(typed, shapes), apply


def check_shapes(what: str, there: Fields, wanted: Fields, hint: str) -> None:
    """Raises ConfigError unless arrays have the shapes of those of a network, both by path."""
    differing = versions.differences(there, wanted)
    for path, *shapes in differing[:1]:
        theirs, ours = ("absent" if shape is versions.ABSENT else shape for shape in shapes)
        more = f"; {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise ConfigError(
            f"{what} is of another network than the config makes: the shape of {path} is {theirs} "
            f"there and {ours} in the network{more}.{hint}"
        )
