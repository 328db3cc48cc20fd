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
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
)
from sparsity_jax.types import AnyPath, Arrays, Config, Fields, PyTree, Shape

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
FORMAT = 2  # of an exported folder
VARIABLES, PROGRAM, ABOUT = "variables.npz", "network.stablehlo", "network.json"
USE = (  # lines that need jax and flatbuffers only, and one on the arrays alone
    "import hashlib, jax.export, json, pathlib",
    (
        f"program, about = pathlib.Path('{PROGRAM}').read_bytes(), "
        f"json.loads(pathlib.Path('{ABOUT}').read_text())"
    ),
    (
        f"assert hashlib.sha256(program).hexdigest() == about['sha256']['{PROGRAM}']  # it is as "
        "it was written"
    ),
    "network = jax.export.deserialize(bytearray(program))",
    (
        "logits = network.call(images)  # float32 [batch >= 1, height, width, channels]: "
        "(uint8 / 255 - mean) / std"
    ),
    (
        f"# numpy.load('{VARIABLES}')[path] is an array; where arrays[path] is bfloat16, its "
        ".view(ml_dtypes.bfloat16)"
    ),
)


def variables_of(state: train.State) -> Fields:
    """What a model is applied to."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def compared(
    problem: train.Problem, state: train.State, batch_size: int = 64, repeats: int = 0
) -> tuple[bool, Fields | None, str]:
    """(whether whole channels are masked, numbers of the network without them, why there is none).

    The one verdict on the compact network, for tables and exports: its logits of `batch_size` test
    images are those of the masked network but for rounding. repeats: see `compaction.take_stock`.
    """
    cut, note = channels_cut(problem, state)
    if not cut:
        return cut, None, note
    compact = compaction.Compact(batch_size=batch_size, repeats=repeats)
    try:
        stock = compaction.take_stock(problem, state, compact)
    except (TypeError, ValueError) as error:
        return cut, None, f"cannot be compacted: {error}"
    if stock["warning"]:
        return cut, None, f"cannot be compacted: {stock['warning']}."
    return cut, stock, ""


def channels_cut(problem: train.Problem, state: train.State) -> tuple[bool, str]:
    """(whether whole channels are masked, why that cannot be told or "")."""
    if all(bool(leaf.all()) for leaf in jax.tree.leaves(state.masks)):
        return False, ""
    try:
        channels = structured.channels_of(problem)
    except (TypeError, ValueError) as error:
        return False, f"its channels cannot be traced: {error}"
    alive = coupling.alive(channels, {"params": state.masks})
    return any(not own.all() for own in alive.values()), ""


def check_export(folder: AnyPath, platforms: Sequence[str] = ("cpu",)) -> None:
    """Raises ConfigError for unknown platforms, and for a folder that is not new or empty."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise tables.ConfigError(f"{folder} is there and not empty; export to a new folder.")
    tables.convert(tuple(platforms), tuple[Platform, ...], "platforms")


# Writing ------------------------------------------------------------------------------------------


def export(
    problem: train.Problem,
    model: Config,
    state: train.State,
    folder: AnyPath,
    platforms: Sequence[str] = ("cpu",),
    *,
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
    check_export(folder, platforms)
    with replacing(pathlib.Path(folder)) as part:
        write(part, problem, model, state, platforms, dense=dense)
    return pathlib.Path(folder)


def write(
    folder: pathlib.Path,
    problem: train.Problem,
    model: Config,
    state: train.State,
    platforms: Sequence[str],
    *,
    dense: bool,
    note: str | None = None,
) -> None:
    """Writes what `export` says and reads it back. note: of `compared`; None: to be found."""
    variables, apply = variables_of(state), problem.model.apply
    whole = variables
    keep: Arrays = {}
    sizes: dict[str, int] = {}
    if note is None and not dense:
        _, _, note = compared(problem, state)
    if note and not dense:
        raise tables.ConfigError(
            f"the network cannot be exported without its masked channels: {note} With its "
            "channels it can: --dense, or dense=True."
        )
    compact = not dense and channels_cut(problem, state)[0]
    if compact:
        variables, apply, keep, channels = compaction.compacted(problem, state)
        sizes = channels.sizes
    shape = problem.dataset.test.images.shape[1:]
    program = traced(lambda image: apply(variables, image[None])[0], shape, platforms)
    arrays = {path: np.asarray(leaf) for path, leaf in trees.named_leaves(variables).items()}
    described = {}
    for path, array in arrays.items():
        described[path] = dict(shape=array.shape, dtype=str(array.dtype))
    libraries = ("jax", "jaxlib", "flax", "numpy")
    about = dict(
        format=FORMAT,
        model=dict(model),
        data=problem.dataset.name,
        num_classes=problem.dataset.num_classes,
        image_shape=shape,
        mean=problem.dataset.mean,
        std=problem.dataset.std,
        compact=compact,
        keep={name: np.flatnonzero(own) for name, own in keep.items()},
        sizes=sizes,
        arrays=described,
        parameters=cost.num_params(variables),
        parameters_dense=cost.num_params(whole),
        bytes=cost.num_bytes(variables),
        bytes_dense=cost.num_bytes(whole),
        platforms=list(program.platforms),
        versions={name: importlib.metadata.version(name) for name in libraries},
        use=USE,
    )
    write_files(folder, arrays, bytes(program.serialize()), report.plain(about))


def traced(
    network: Callable[[Array], Array], shape: Shape, platforms: Sequence[str]
) -> stablehlo.Exported:
    """The program of a network of one image, for batches of any size.

    It is analysed at known sizes, one image at a time under vmap, yet its batch may have any.
    """
    (batch,) = stablehlo.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    return stablehlo.export(jax.jit(jax.vmap(network)), platforms=tuple(platforms))(images)


def write_files(folder: pathlib.Path, arrays: Arrays, program: bytes, about: Fields) -> None:
    """Writes the three files with the checksums of what they shall hold, and verifies them."""
    stored = io.BytesIO()
    np.savez(stored, **dict[str, Any](arrays))
    contents = {VARIABLES: stored.getvalue(), PROGRAM: program}
    about["sha256"] = {name: hashlib.sha256(own).hexdigest() for name, own in contents.items()}
    about["checksum"] = intact.digest_of_value(about)
    contents[ABOUT] = f"{json.dumps(about, indent=1)}\n".encode()
    folder.mkdir(exist_ok=True)
    for name, own in contents.items():
        (folder / name).write_bytes(own)
    verify(folder)


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes the new `folder` at the end, or vanishes on an error."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield part
        part.chmod(0o755)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# Reading ------------------------------------------------------------------------------------------


def verify(folder: AnyPath) -> Fields:
    """What network.json of an exported folder says, after all files were compared with their sums.

    Raises ConfigError for a folder without an exported network, and naming the file that is not as
    it was written. network.json has SHA-256 of the other files in `sha256`, and in `checksum` that
    of its own other fields, as `json.dumps(..., sort_keys=True)` writes them.
    """
    folder = pathlib.Path(folder)
    for name in (ABOUT, VARIABLES, PROGRAM):
        if not (folder / name).is_file():
            raise tables.ConfigError(f"{folder} holds no whole exported network (no {name}).")
    try:
        about = report.read_dict(folder / ABOUT)
        written = {ABOUT: about["checksum"], **about["sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise intact.DamagedError(f"{folder / ABOUT} is not as it was written: {error}") from None
    if about.get("format") != FORMAT:
        raise tables.ConfigError(
            f"{folder / ABOUT} has the format {about.get('format')!r}; known: {FORMAT}."
        )
    rest = {name: value for name, value in about.items() if name != "checksum"}
    digests = {name: intact.digest_of(folder / name) for name in (VARIABLES, PROGRAM)}
    for name, digest in {ABOUT: intact.digest_of_value(rest), **digests}.items():
        if written.get(name) != digest:
            raise intact.DamagedError(
                f"{folder / name} is not as it was written (its checksum differs); export anew."
            )
    return about


def read_arrays(folder: pathlib.Path) -> Arrays:
    """The arrays of an exported folder, by path."""
    with np.load(folder / VARIABLES, allow_pickle=False) as stored:
        return {path: stored[path] for path in stored.files}


def load(folder: AnyPath) -> tuple[PyTree, Callable[..., Array]]:
    """(variables, apply) of a network that `export` wrote, of its smaller sizes.

    `logits = apply(variables, images)`; images: float32 [batch, height, width, channels],
    normalised as network.json says. The model is built anew from network.json and traced, so no
    width has to be known; `apply` can be differentiated and trained further. Raises ConfigError for
    a folder without an exported network, for a file that is not as it was written, see `verify`,
    and if network.json does not fit the arrays.
    """
    folder = pathlib.Path(folder)
    about, arrays = verify(folder), read_arrays(folder)
    with tables.within(f"{folder / ABOUT}: model"):
        plans.check_model(about["model"])
        with building.making_network("says a network that"):
            model = models.build(num_classes=about["num_classes"], **about["model"])
            image = lambda batch: jax.ShapeDtypeStruct((batch, *about["image_shape"]), jnp.float32)
            shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image(1)))
        train.check_memory(cost.num_bytes(shapes), "makes a network whose weights")
    wanted, apply = trees.named_leaves(shapes), model.apply
    if about["compact"]:
        channels = groups.trace(model.apply, shapes, image(2))
        if channels.sizes != about["sizes"]:
            raise tables.ConfigError(
                f"{folder / ABOUT}: the model has other channel groups than those it names."
            )
        keep = {}
        for name, size in channels.sizes.items():
            keep[name] = np.isin(np.arange(size), about["keep"][name])
        wanted = groups.compact_shapes(channels, keep)
        apply = groups.elastic(model.apply, channels, keep)
    stored, needed = (
        {path: leaf.shape for path, leaf in tree.items()} for tree in (arrays, wanted)
    )
    check_shapes(f"{folder / VARIABLES}", stored, needed, f" Was {ABOUT} edited?")

    def typed(path: str, _: Any) -> Array:
        array = arrays[path]
        return jnp.asarray(array.view(jnp.dtype(about["arrays"][path]["dtype"])))  # bfloat16: raw

    return trees.map_named(typed, shapes), apply


def check_shapes(
    what: str, found: Mapping[str, tuple], wanted: Mapping[str, tuple], hint: str
) -> None:
    """Raises ConfigError unless arrays have the shapes of those of a network, both by path."""
    paths = dict.fromkeys([*wanted, *found])
    differing = [path for path in paths if found.get(path) != wanted.get(path)]
    for path in differing[:1]:
        there, here = (
            f"the shape {shapes[path]}" if path in shapes else "no such array"
            for shapes in (found, wanted)
        )
        more = f"; {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise tables.ConfigError(
            f"{what} is of another network than the config makes: for {path} it has {there}, the "
            f"network {here}{more}.{hint}"
        )
