"""What a saved network is worth: `python -m sparsity_jax.evaluate --workdir DIR` for any run,
finished or not.

    python -m sparsity_jax.evaluate --workdir runs/flow --train --latency --json flow.json --export
    flow_network

Rebuilds network and data from the run's config.json, restores its newest checkpoint, and tells
accuracy, loss, parameters, FLOPs, bytes and, if asked, measured time, for every member of a sweep.
Where whole channels are masked, the network without them (compact) stands beside the dense one.
`export` writes a network that runs without this library, `load` reads it back into it;
`export_torch` writes the dense one's weights for PyTorch.

Options of the evaluation of arXiv:2009.11839 (eval.py) and what stands for them: `model`, `pruned`
and `num_classes`: the run itself says; `model_path`: --workdir; `data_path`: --data_dir or --data;
`train_acc`: --train; `test_acc`, `flops`, `compression`: always told; `download`: `python -m
sparsity_jax.prepare`.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as stablehlo

from sparsity_jax import (
    checkpoint,
    cost,
    data,
    groups,
    imports,
    intact,
    members,
    models,
    pipeline,
    pretrained,
    report,
    structured,
    tables,
    train,
    trees,
    units,
    workdirs,
)

PyTree = Any
Platform = Literal["cpu", "cuda", "rocm", "tpu"]
Statistics = Literal["run", "data"]
FORMAT = 2  # of an exported folder
MORE_MEMORY = (
    "Lower --batch_size if --latency fills it, or evaluate where there is more: with "
    "JAX_PLATFORMS=cpu in the "
    "environment the memory of the host counts."
)
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


# Runs on disk -------------------------------------------------------------------------------------


class Network(NamedTuple):
    """One member of a run. swept: its values of a sweep; progress: how far its run is; state:
    without optimizer.

    label: name of the training whose network the checkpoint holds, the last one of several in a
        run.
    """

    member: int
    swept: dict[str, Any]
    progress: str
    state: train.State
    label: str


class Saved(NamedTuple):
    """A run as its newest checkpoints have it. missing: numbers of members that have saved nothing
    yet.
    """

    config: dict[str, Any]
    problem: train.Problem  # of one member: no leading axis
    networks: list[Network]
    missing: list[int]


def open_run(
    workdir: str | os.PathLike,
    *,
    data_dir: str = "",
    data_name: str = "",
    statistics: Statistics = "run",
) -> Saved:
    """Network, data and newest checkpoint of the run in `workdir`, which may also be one
    `member_...` folder of it.

    data_dir: where prepared sets are on this machine, instead of config.data.data_dir. data_name:
    another set with the same classes, e.g. `folder:PATH`. statistics: mean and std of its images
    are those of the "run", as the network was trained, for which the run's train images are read
    again where they are not published; or those of the other "data". Stages are not checked, so a
    run that started from another one can be evaluated without it. Raises ConfigError for a folder
    without a run or checkpoint, and for a checkpoint of another network.
    """
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    inside = (
        re.fullmatch(r"member_\d+", workdir.name) and (workdir.parent / "config.json").is_file()
    )
    whole = read_config(workdir.parent) if inside else config
    swept_values = [member.swept for member in members.expand(whole)]
    folders = sorted(
        path for path in workdir.glob("member_*") if re.fullmatch(r"member_\d+", path.name)
    )
    folders = [workdir] if inside else folders
    numbered = {int(path.name.removeprefix("member_")): path for path in folders}
    places = numbered or {0: workdir}
    found = {i: workdirs.newest(path) for i, path in places.items()}
    if not any(found.values()):
        raise tables.ConfigError(
            f"{workdir} has no checkpoint: its run has saved nothing yet; start it once more."
        )
    problem = build(config, data_dir, data_name, statistics)
    hint = " --data needs the run's classes and image size." if data_name else ""
    networks = []
    for i, snapshot in found.items():
        if snapshot is None:
            continue
        states, progress = restore_newest(snapshot, problem, hint)
        own = swept_values[i : i + len(states)] if numbered else swept_values
        if len(states) != len(own):
            raise tables.ConfigError(
                f"{workdir}: config.json makes {len(own)} networks, the checkpoint has "
                f"{len(states)}. Was "
                "config.json edited?"
            )
        text = _progress(config, progress)
        for j, (swept, state) in enumerate(zip(own, states)):
            label = swept.get("arm") or _label(config, progress)
            networks.append(Network(i + j, swept, text, state, label))
    expected = range(len(swept_values)) if numbered and not inside else ()
    missing = sorted({*expected, *places} - {network.member for network in networks})
    return Saved(config, problem, networks, missing)


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The config of a run, with the defaults of all common fields."""
    if not workdirs.holds_run(workdir):
        raise tables.ConfigError(f"{workdir} holds no run (no config.json).")
    config = workdirs.read_config(workdir)
    known = tables.parameters(pipeline.settings)
    common = {name: value for name, value in config.items() if name in known}
    with tables.within("config"):
        tables.check_options(pipeline.settings, common)
    pipeline.check_names(config["pipeline"], members.stages_of(config))
    return {**tables.defaults(pipeline.settings), **config}


def build(
    config: Mapping[str, Any],
    data_dir: str = "",
    data_name: str = "",
    statistics: Statistics = "run",
) -> train.Problem:
    """Data and network of a config, for one member on one device; see `open_run`."""
    tables.convert(statistics, Statistics, "statistics")
    own = _data_options(config["data"], data_dir, "")
    if data_name:
        chosen = _data_options(config["data"], data_dir, data_name)
        chosen["normalization"] = "none" if statistics == "run" else "auto"
        dataset = _load(chosen)
        if statistics == "run":
            dataset = dataset._replace(**_statistics_of_run(own, dataset)._asdict())
    else:
        dataset = _load(own)
    with tables.within("config.model"):
        pipeline.check_model(config["model"])
    model = models.build(num_classes=dataset.num_classes, **config["model"])
    return train.build_problem(dataset, model, eval_batch_size=config["eval_batch_size"])


def _data_options(options: Mapping[str, Any], data_dir: str, name: str) -> dict[str, Any]:
    chosen = {**tables.defaults(data.load), **options}
    if data_dir:
        chosen["data_dir"] = data_dir
    if name:
        if not (name.startswith("folder:") and chosen["name"].startswith("folder:")):
            whole = tables.defaults(data.load)  # names of splits are the set's own
            chosen |= {
                field: whole[field]
                for field in ("train_split", "test_split", "train_limit", "test_limit")
            }
        chosen["name"] = name
    return chosen


def _load(options: Mapping[str, Any]) -> data.Dataset:
    with tables.within("config.data"):
        return data.load(**tables.check_options(data.load, options))


def _statistics_of_run(options: Mapping[str, Any], dataset: data.Dataset) -> data.Normalization:
    """Mean and std with which the run of the data `options` trained, for the images of another
    `dataset`.

    Raises ConfigError if they were computed from images that are not there.
    """
    known = data.published(
        data.chosen_normalization(options), options["name"], dataset.train.images.shape[-1]
    )
    if known is not None:
        return known
    try:
        trained_on = _load({**options, "test_limit": 1})
    except tables.ConfigError as error:
        raise tables.ConfigError(
            "--data: mean and std belong to the trained network and are those of its run's train "
            f"images: {error} "
            "--data_dir tells where they are; --statistics data takes mean and std of the other "
            "set instead."
        ) from None
    return data.Normalization(trained_on.mean, trained_on.std)


def _progress(config: Mapping[str, Any], progress: workdirs.Progress) -> str:
    names = config["pipeline"]
    if progress.stage >= len(names):
        return "finished"
    return f"in stage {progress.stage + 1} of {len(names)} ({names[progress.stage]})"


def _label(config: dict[str, Any], progress: workdirs.Progress) -> str:
    """Name of the training that made the network of a checkpoint, as in the report."""
    finished = progress.stage - (not progress.begun)
    return pipeline.arm_of(config, max(finished, 0))


def restore_newest(
    snapshot: workdirs.Snapshot, problem: train.Problem, hint: str = ""
) -> tuple[list[train.State], workdirs.Progress]:
    """`restore` of the newest checkpoint of a workdir, or of a later one if its run, at work, has
    removed it.
    """
    while True:
        try:
            return restore(snapshot, problem, hint)
        except intact.DamagedError:
            later = workdirs.newest(snapshot.folder.parent.parent)
            if later is None or later.folder == snapshot.folder:
                raise
            snapshot = later


def restore(
    snapshot: workdirs.Snapshot, problem: train.Problem, hint: str = ""
) -> tuple[list[train.State], Any]:
    """(state of each member, progress) of a checkpoint made on whatever devices.

    hint: what else may be the reason if the checkpoint is of another network, which raises
        ConfigError.
    """
    with checkpoint.reading(snapshot):
        return _restored(snapshot, problem, hint), snapshot.progress


def _restored(snapshot: workdirs.Snapshot, problem: train.Problem, hint: str) -> list[train.State]:
    shapes, workdir = checkpoint.shapes(snapshot), snapshot.folder.parent.parent
    with pipeline.making_network(f"{workdir}: the network of config.model"):
        variables = jax.eval_shape(problem.init, jax.random.key(0))
    wanted = {**variables, "masks": variables["params"]}
    _check_shapes(workdir, shapes, wanted, hint)
    arrays = checkpoint.arrays(snapshot)
    parts = trees.map_named(lambda path, _: arrays[path], wanted)
    state = train.State(
        parts["params"],
        parts["batch_stats"],
        parts["masks"],
        (),
        arrays["step"],
        arrays["key"],
        train.no_metrics(),
    )
    if not shapes["step"]:
        return [state]
    slices = lambda i: jax.tree.map(lambda leaf: leaf[i], state._replace(metrics=()))
    return [slices(i)._replace(metrics=train.no_metrics()) for i in range(shapes["step"][0])]


def _check_shapes(
    workdir: pathlib.Path, found: dict[str, tuple], wanted: PyTree, hint: str
) -> None:
    leading = found["step"]  # () or (members,)
    here = {path: leading + leaf.shape for path, leaf in trees.named_leaves(wanted).items()}
    there = {path: shape for path, shape in found.items() if path.split("/")[0] in wanted}
    differing = [path for path in {**here, **there} if here.get(path) != there.get(path)]
    differing = [
        path for path in differing if not path.startswith("masks/")
    ] or differing  # they follow the params
    if differing:
        path = differing[0]
        one, two = (
            f"the shape {shapes[path]}" if path in shapes else "no such array"
            for shapes in (there, here)
        )
        more = f"; {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise tables.ConfigError(
            f"{workdir}: the checkpoint is of another network than config.model makes: for {path} "
            f"it has {one}, the "
            f"network {two}{more}. Was config.json edited?{hint}"
        )


# Numbers ------------------------------------------------------------------------------------------


def run(
    workdir: str | os.PathLike,
    *,
    on_train: bool = False,
    latency: bool = False,
    batch_size: int = 64,
    repeats: int = 30,
    data_dir: str = "",
    data_name: str = "",
    statistics: Statistics = "run",
    export_to: str | os.PathLike = "",
    platforms: Sequence[str] = ("cpu",),
    dense: bool = False,
) -> list[dict[str, Any]]:
    """The numbers of every member of the run in `workdir` that has a checkpoint; see `measure` for
    the fields.

    data_dir, data_name, statistics: as in `open_run`. export_to, platforms, dense: a new folder for
    `export`, and its options. Raises ConfigError as `open_run` and `export` do, and where the
    memory is full.
    """
    if export_to:
        check_export(export_to, platforms)
    with pipeline.enough_memory(str(workdir), MORE_MEMORY):
        saved = open_run(workdir, data_dir=data_dir, data_name=data_name, statistics=statistics)
        rows = list(
            measured(
                saved, on_train=on_train, latency=latency, batch_size=batch_size, repeats=repeats
            )
        )
        if export_to:
            export_run(
                saved, export_to, platforms, dense=dense, notes=[row["note"] for row in rows]
            )
    return rows


def measured(saved: Saved, **options: Any) -> Iterator[dict[str, Any]]:
    """`measure` of every member; before it the fields data, model, member, swept, network (its
    label) and progress.
    """
    about = dict(data=saved.problem.dataset.name, model=saved.config["model"]["name"])
    for network in saved.networks:
        own = measure(saved.problem, network.state, **options)
        which = dict(
            member=network.member,
            swept=network.swept,
            network=network.label,
            progress=network.progress,
        )
        yield {**about, **which, **own}


def measure(
    problem: train.Problem,
    state: train.State,
    *,
    on_train: bool = False,
    latency: bool = False,
    batch_size: int = 64,
    repeats: int = 30,
) -> dict[str, Any]:
    """One member's numbers; plain data.

    Always: test_accuracy, test_loss (nats per example), test_examples (where some images of a
    stream cannot be decoded, the others, and test_unreadable), parameters, parameters_kept (not
    masked), parameters_nonzero, bytes (params and running statistics as stored), flops
    (convolutions and matrix products of one image, one multiply-add = 2), pruned ("nothing",
    "weights", "channels" or "channels and weights"), note (why there is no compact network, or ""),
    device.
    on_train: train_accuracy, train_loss, train_examples.
    Where whole channels are masked: test_accuracy_compact, parameters_compact, flops_compact,
    bytes_compact, compression (bytes over bytes_compact), difference (of the logits, relative to
    the largest), kept and sizes (channels by group). latency: batch_size (at most the test set),
    milliseconds with low and high (quartiles) by network, and with two of them speedup (dense over
    compact) with low and high, and the verdict on compact. Raises ConfigError for batch_size below
    1 or repeats below 2.
    """
    tables.convert(batch_size, tables.Count, "batch_size")
    if latency and repeats < 2:
        raise tables.ConfigError(f"repeats is {repeats}; allowed: int >= 2.")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    row: dict[str, Any] = {}
    for split in ("test", "train") if on_train else ("test",):
        found = train.measure(problem, state.params, state.batch_stats, split)
        examples = problem.size(split) - len(found.unreadable)
        right = round(float(found.accuracy) * examples) / max(examples, 1)  # not rounded to float32
        row |= {
            f"{split}_accuracy": right,
            f"{split}_loss": float(found.loss),
            f"{split}_examples": examples,
        }
        row |= {f"{split}_unreadable": len(found.unreadable)} if found.unreadable else {}
    one = jax.ShapeDtypeStruct((1, *problem.dataset.test.images.shape[1:]), jnp.float32)
    count = lambda tree: sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(tree))
    row |= dict(
        parameters=cost.num_params(variables),
        parameters_kept=count(state.masks),
        parameters_nonzero=count(state.params),
        bytes=cost.num_bytes(variables),
        flops=cost.flops(problem.model.apply, variables, one).products,
        device=jax.local_devices()[0].device_kind,
    )
    cut, stock, note = compared(problem, state, batch_size, repeats if latency else 0)
    if stock is not None:
        row |= {
            f"{name}_compact": stock[f"{name}_compact"] for name in ("parameters", "flops", "bytes")
        }
        row |= dict(
            test_accuracy_compact=stock["accuracy"],
            compression=stock["bytes"] / stock["bytes_compact"],
        )
        times = ("batch_size", "milliseconds", "milliseconds_low", "milliseconds_high")
        times += ("speedup", "speedup_low", "speedup_high", "verdict")
        row |= {
            name: stock[name] for name in ("difference", "kept", "sizes", *times) if name in stock
        }
    elif latency:
        images = problem.images(problem.examples("test", batch_size)[0])
        own = cost.latency(jax.jit(problem.model.apply), variables, images, repeats=repeats)
        spread = dict(milliseconds=own.median, milliseconds_low=own.low, milliseconds_high=own.high)
        row |= dict(
            batch_size=len(images),
            **{name: {"dense": 1e3 * value} for name, value in spread.items()},
        )
    left = row.get("parameters_compact", row["parameters"])
    kinds = [
        kind
        for kind, found in (("channels", cut), ("weights", row["parameters_kept"] < left))
        if found
    ]
    return {**row, "pruned": " and ".join(kinds) or "nothing", "note": note}


def compared(
    problem: train.Problem, state: train.State, batch_size: int = 64, repeats: int = 0
) -> tuple[bool, dict[str, Any] | None, str]:
    """(whether whole channels are masked, numbers of the network without them, why there is none or
    "").

    The one verdict on the compact network, for tables and exports: its logits of `batch_size` test
    images are those of the masked network but for rounding. repeats: see `structured.take_stock`.
    """
    cut, note = channels_cut(problem, state)
    if not cut:
        return cut, None, note
    try:
        stock = structured.take_stock(
            problem, state, structured.Compact(batch_size=batch_size, repeats=repeats)
        )
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
    alive = units.alive(channels, {"params": state.masks})
    return any(not own.all() for own in alive.values()), ""


def describe(row: Mapping[str, Any]) -> str:
    """The numbers of one member as a table."""
    swept = ", ".join(f"{name}={value}" for name, value in row["swept"].items())
    which = f"{row['network']}, member {row['member']}{swept and f' ({swept})'}"
    lines = [f"{row['model']} on {row['data']}, {which}: {row['progress']}"]
    compact = "parameters_compact" in row

    def line(name: str, dense: str, small: str = "", more: str = "") -> None:
        lines.append(f"  {name:<26}{dense:>16}{small:>16}  {more}".rstrip())

    def both(name: str, field: str, form: str, more: str = "") -> None:
        small = format(row[f"{field}_compact"], form) if f"{field}_compact" in row else ""
        line(name, format(row[field], form), small, more)

    line("", "dense", "compact" if compact else "")
    for split in ("test", "train"):
        if f"{split}_accuracy" in row:
            both(
                f"{split} accuracy",
                f"{split}_accuracy",
                ".2%",
                f"of {row[f'{split}_examples']:,} images",
            )
            both(f"{split} loss", f"{split}_loss", ".4f")
    both("parameters", "parameters", ",")
    share = (
        f"{row['parameters_kept'] / row['parameters']:.1%} of the dense network's"
        if row["parameters"]
        else ""
    )
    line("  not masked", f"{row['parameters_kept']:,}", more=share)
    line("  not zero", f"{row['parameters_nonzero']:,}")
    both("FLOPs of one image", "flops", ",")
    both("bytes", "bytes", ",", f"compression {row['compression']:.2f}" if compact else "")
    for name in row.get("milliseconds", ()):
        low, middle, high = (row[f"milliseconds{part}"][name] for part in ("_low", "", "_high"))
        lines.append(
            f"  {name}, a batch of {row['batch_size']}: {middle:.3g} ms (quartiles {low:.3g} to "
            f"{high:.3g})"
        )
    if "verdict" in row:
        words = {"faster": "compact is faster", "slower": "compact is slower"}.get(
            row["verdict"], row["verdict"]
        )
        spread = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
        lines.append(
            f"  {words}: {row['speedup']:.2f} times the speed of dense ({spread}) on "
            f"{row['device']}"
        )
    zeros = row["parameters_kept"] - row["parameters_nonzero"]
    if row["pruned"] == "nothing" and zeros:
        lines.append(
            f"  nothing is masked: {zeros:,} parameters are zero, as training or their file left "
            "them"
        )
    elif row["pruned"] == "nothing":
        lines.append("  nothing is pruned: this is the dense network")
    elif row["pruned"] == "weights":
        lines.append(
            "  single weights are masked: the arrays keep their shapes, so bytes and FLOPs stay"
        )
    if row["note"]:
        lines.append(f"  {row['note']}")
    return "\n".join(lines)


def describe_all(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of all members; of several seeds also mean and standard deviation of their
    accuracy.
    """
    text = [describe(row) for row in rows]
    alike = len(rows) > 1 and all(set(row["swept"]) == {"seed"} for row in rows)
    for split in ("test", "train") if alike else ():
        values = [row[f"{split}_accuracy"] for row in rows if f"{split}_accuracy" in row]
        if values:
            mean, deviation = np.mean(values), np.std(values, ddof=1)
            text.append(
                f"{split} accuracy of {len(values)} seeds: {mean:.2%}, standard deviation "
                f"{deviation:.2%}"
            )
    return "\n\n".join(text)


# Export -------------------------------------------------------------------------------------------


def check_export(folder: str | os.PathLike, platforms: Sequence[str] = ("cpu",)) -> None:
    """Raises ConfigError if nothing can be exported to `folder`, because it is not empty, or for
    unknown platforms.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise tables.ConfigError(f"{folder} is there and not empty; export to a new folder.")
    tables.convert(tuple(platforms), tuple[Platform, ...], "platforms")


def check_writable(file: str | os.PathLike) -> None:
    """Raises ConfigError if nothing can be written where `file` is to be."""
    parents = pathlib.Path(file).absolute().parents
    there = next(folder for folder in parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise tables.ConfigError(
            f"{file} cannot be written, since {there} is not writable; name another place."
        )


def export_run(
    saved: Saved,
    folder: str | os.PathLike,
    platforms: Sequence[str] = ("cpu",),
    *,
    dense: bool = False,
    notes: Sequence[str] | None = None,
) -> list[pathlib.Path]:
    """`export` of every member: of several, to `folder/member_000` and so on. Returns the folders.

    notes: of the members, as `measure` tells them; they are found anew without.
    """
    check_export(folder, platforms)
    folder, config = pathlib.Path(folder), saved.config
    with _replacing(folder) as part:
        for i, network in enumerate(saved.networks):
            own = part / f"member_{network.member:03d}" if len(saved.networks) > 1 else part
            note = None if notes is None else notes[i]
            _write(
                own,
                *_exported(saved.problem, config["model"], network.state, platforms, dense, note),
            )
    return sorted(folder.glob("member_*")) or [folder]


def export(
    problem: train.Problem,
    model: Mapping[str, Any],
    state: train.State,
    folder: str | os.PathLike,
    platforms: Sequence[str] = ("cpu",),
    *,
    dense: bool = False,
) -> pathlib.Path:
    """Writes one member's network, compact where whole channels are masked, to the new folder
    `folder`.

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
    with _replacing(pathlib.Path(folder)) as part:
        _write(part, *_exported(problem, model, state, platforms, dense))
    return pathlib.Path(folder)


def _exported(
    problem: train.Problem,
    model: Mapping,
    state: train.State,
    platforms: Sequence[str],
    dense: bool = False,
    note: str | None = None,
) -> tuple:
    """(arrays by path, serialized program, contents of network.json). note: of `compared`; None: to
    be found.
    """
    variables, apply = (
        {"params": state.params, "batch_stats": state.batch_stats},
        problem.model.apply,
    )
    whole, keep, sizes = variables, {}, {}
    cut = False
    if not dense:
        if note is None:
            _, _, note = compared(problem, state)
        if note:
            raise tables.ConfigError(
                f"the network cannot be exported without its masked channels: {note} With its "
                "channels it can: "
                "--dense, or dense=True."
            )
        cut, _ = channels_cut(problem, state)
    if cut:
        variables, apply, keep, channels = structured.compacted(problem, state)
        sizes = channels.sizes
    shape = problem.dataset.test.images.shape[1:]
    # one image at a time under vmap: the program is analysed at known sizes, yet its batch may have
    # any
    logits = lambda images: jax.vmap(lambda image: apply(variables, image[None])[0])(images)
    (batch,) = stablehlo.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    program = stablehlo.export(jax.jit(logits), platforms=tuple(platforms))(images)
    arrays = {path: np.asarray(leaf) for path, leaf in trees.named_leaves(variables).items()}
    about = dict(
        format=FORMAT,
        model=dict(model),
        data=problem.dataset.name,
        num_classes=problem.dataset.num_classes,
        image_shape=shape,
        mean=problem.dataset.mean,
        std=problem.dataset.std,
        compact=cut,
        keep={name: np.flatnonzero(own) for name, own in keep.items()},
        sizes=sizes,
        arrays={
            path: dict(shape=array.shape, dtype=str(array.dtype)) for path, array in arrays.items()
        },
        parameters=cost.num_params(variables),
        parameters_dense=cost.num_params(whole),
        bytes=cost.num_bytes(variables),
        bytes_dense=cost.num_bytes(whole),
        platforms=list(program.platforms),
        versions={
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
        },
        use=USE,
    )
    return arrays, bytes(program.serialize()), about


def check_torch(file: str | os.PathLike) -> None:
    """Raises ConfigError unless `file` is a new .safetensors file."""
    path = pathlib.Path(file)
    if path.suffix != ".safetensors" or path.exists():
        raise tables.ConfigError(f"{path} cannot be written; name a new file *.safetensors.")


def export_torch(saved: Saved, file: str | os.PathLike) -> list[pathlib.Path]:
    """Writes every member's weights as a PyTorch state dict (see `pretrained.to_torch`) to the new
    `file`.

    Dense: pruned weights are zeros. Of several members to `NAME_000.safetensors` and so on. Returns
        the files.
    """
    file, channels = pathlib.Path(file), saved.problem.dataset.test.images.shape[-1]
    name = lambda member: (
        file.with_stem(f"{file.stem}_{member:03d}") if len(saved.networks) > 1 else file
    )
    paths = [name(network.member) for network in saved.networks]
    for path in paths:
        check_torch(path)
    for path, network in zip(paths, saved.networks):
        variables = {"params": network.state.params, "batch_stats": network.state.batch_stats}
        pretrained.write(path, pretrained.to_torch(variables, image_channels=channels))
    return paths


def _write(
    folder: pathlib.Path, arrays: Mapping[str, np.ndarray], program: bytes, about: Mapping
) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / VARIABLES, **arrays)
    (folder / PROGRAM).write_bytes(program)
    about = report.plain(about)
    about["sha256"] = {name: intact.digest_of(folder / name) for name in (VARIABLES, PROGRAM)}
    about["checksum"] = intact.digest_of_value(about)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    verify(folder)
    stored = read_arrays(folder)
    same = {path: array.tobytes() for path, array in stored.items()} == {
        p: a.tobytes() for p, a in arrays.items()
    }
    if not same or (folder / PROGRAM).read_bytes() != program:
        raise OSError(
            f"{folder} does not read as it was written; its disk or file system is not to be "
            "trusted."
        )


def verify(folder: str | os.PathLike) -> dict[str, Any]:
    """What network.json of an exported folder says, after all its files have been compared with
    their checksums.

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
    except ValueError as error:
        raise intact.DamagedError(str(error)) from None
    if about.get("format") != FORMAT:
        raise tables.ConfigError(
            f"{folder / ABOUT} has the format {about.get('format')!r}; known: {FORMAT}."
        )
    rest = {name: value for name, value in about.items() if name != "checksum"}
    sums = {ABOUT: (about.get("checksum"), intact.digest_of_value(rest))}
    if isinstance(about.get("sha256"), dict):
        sums |= {
            name: (about["sha256"].get(name), intact.digest_of(folder / name))
            for name in (VARIABLES, PROGRAM)
        }
    for name, (written, found) in sums.items():
        if written != found:
            raise intact.DamagedError(
                f"{folder / name} is not as it was written (its checksum differs); export anew."
            )
    return about


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an exported folder, by path."""
    with np.load(folder / VARIABLES, allow_pickle=False) as stored:
        return {path: stored[path] for path in stored.files}


@contextlib.contextmanager
def _replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes `folder` (new or empty) at the end, or vanishes after an
    error.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield part
        part.chmod(0o755)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(folder: str | os.PathLike) -> tuple[PyTree, Callable]:
    """(variables, apply) of a network that `export` wrote: `logits = apply(variables, images)`, of
    its smaller sizes.

    The model is built anew from network.json and traced, so no width has to be known; `apply` can
    be differentiated and trained further. images: float32 [batch, height, width, channels],
    normalised as network.json says. Raises ConfigError for a folder without an exported network,
    for a file that is not as it was written, see `verify`, and if network.json does not fit the
    arrays.
    """
    folder = pathlib.Path(folder)
    about, arrays = verify(folder), read_arrays(folder)
    with tables.within(f"{folder / ABOUT}: model"):
        pipeline.check_model(about["model"])
        with pipeline.making_network("says a network that"):
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
        keep = {
            name: np.isin(np.arange(size), about["keep"][name])
            for name, size in channels.sizes.items()
        }
        wanted, apply = (
            groups.compact_shapes(channels, keep),
            groups.elastic(model.apply, channels, keep),
        )
    for path in {**wanted, **arrays}:
        there, here = (
            getattr(tree.get(path), "shape", "no such array") for tree in (arrays, wanted)
        )
        if there != here:
            raise tables.ConfigError(
                f"{folder}: {path} is {there} in {VARIABLES}, {here} in the network of {ABOUT}; "
                "was it edited?"
            )
    typed = lambda path: jnp.asarray(
        arrays[path].view(jnp.dtype(about["arrays"][path]["dtype"]))
    )  # bfloat16: raw
    return trees.map_named(lambda path, _: typed(path), shapes), apply


# Command line -------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_jax.evaluate",
        description=(
            "Accuracy, size, FLOPs and time of the networks of a run, dense and compact; export "
            "of them."
        ),
    )
    parser.add_argument(
        "--workdir", required=True, help="folder of the run, or of one of its members"
    )
    parser.add_argument(
        "--train", action="store_true", help="accuracy and loss on the train set too"
    )
    parser.add_argument(
        "--latency", action="store_true", help="measure the time of a batch, dense against compact"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images of a measured batch (default: 64)"
    )
    parser.add_argument(
        "--repeats", type=int, default=30, help="how often each batch is measured (default: 30)"
    )
    parser.add_argument(
        "--data_dir", default="", help="where prepared sets are, if not where the config says"
    )
    parser.add_argument(
        "--data", default="", help="another set of the same classes: a name or folder:PATH"
    )
    parser.add_argument(
        "--statistics",
        choices=["run", "data"],
        default="run",
        help=(
            "with --data: mean and std of the images are those the run trained with, or those of "
            "the other set"
        ),
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the numbers to this file")
    parser.add_argument(
        "--export", default="", metavar="DIR", help="write the network, compact, to this new folder"
    )
    parser.add_argument(
        "--dense", action="store_true", help="export with the masked channels, as zeros"
    )
    parser.add_argument(
        "--torch",
        default="",
        metavar="FILE",
        help="write the weights for PyTorch: FILE.safetensors",
    )
    parser.add_argument(
        "--platforms",
        nargs="+",
        default=["cpu"],
        help="where the exported program runs: cpu, cuda, rocm, tpu",
    )
    imports.add_option(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: tables to standard output, mistakes in one line."""
    options = make_parser().parse_args(arguments)
    try:
        for file in options.files:
            imports.load(file)
        with pipeline.enough_memory(options.workdir, MORE_MEMORY):
            answer(options)
    except (tables.ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def answer(options: argparse.Namespace) -> None:
    """Prints and writes what the command line asks for."""
    if options.export:
        check_export(options.export, options.platforms)
    if options.torch:
        check_torch(options.torch)
    for file in filter(None, (options.export, options.torch, options.json)):
        check_writable(file)
    other = dict(data_name=options.data, statistics=options.statistics)
    saved = open_run(options.workdir, data_dir=options.data_dir, **other)
    chosen = dict(on_train=options.train, latency=options.latency)
    rows = list(measured(saved, batch_size=options.batch_size, repeats=options.repeats, **chosen))
    sys.stdout.write(describe_all(rows) + "\n")
    if options.data:
        whose = {"run": "those the run trained with", "data": f"those of {options.data}"}[
            options.statistics
        ]
        sys.stdout.write(f"\nmean and std of the images are {whose}\n")
    for member in saved.missing:
        sys.stdout.write(f"\nmember {member} has no checkpoint yet\n")
    if options.json:
        text = json.dumps(report.plain(rows), indent=1) + "\n"
        report.write_atomic(pathlib.Path(options.json), text.encode())
    if options.export:
        notes = [row["note"] for row in rows]
        folders = export_run(
            saved, options.export, options.platforms, dense=options.dense, notes=notes
        )
        for folder, row in zip(folders, rows):
            kind = "compact" if "channels" in row["pruned"] else "dense, since no channels are cut:"
            kind = "dense" if options.dense else kind
            sys.stdout.write(f"exported {kind} network: {folder}\n")
    for path in export_torch(saved, options.torch) if options.torch else ():
        sys.stdout.write(f"wrote PyTorch weights of the dense network: {path}\n")


if __name__ == "__main__":
    main()
