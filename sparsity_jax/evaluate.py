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
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from sparsity_jax import (
    building,
    checkpoint,
    compaction,
    compilation,
    cost,
    data,
    imports,
    intact,
    kept,
    members,
    models,
    pipeline,
    plans,
    pretrained,
    report,
    stored,
    tables,
    train,
    trees,
    workdirs,
)
from sparsity_jax.export import (
    check_export,
    check_shapes,
    compared,
    export,
    load,
    replacing,
    verify,
    write,
)
from sparsity_jax.precision import computed
from sparsity_jax.tables import ConfigError
from sparsity_jax.train import Problem, State
from sparsity_jax.types import AnyPath, Config, Fields, PyTree, Row, Rows, Shape

__all__ = [
    "Network",
    "Saved",
    "Statistics",
    "build",
    "compared",
    "describe",
    "describe_all",
    "export",
    "export_run",
    "export_torch",
    "label_of",
    "load",
    "main",
    "measure",
    "open_run",
    "restore",
    "run",
    "verify",
]

Statistics = Literal["run", "data"]
_MORE_MEMORY = (
    "Lower --batch_size if --latency fills it, or evaluate where there is more: with "
    "JAX_PLATFORMS=cpu in the environment the memory of the host counts."
)


# Runs on disk -------------------------------------------------------------------------------------


class Network(NamedTuple):
    """One member of a run.

    swept: its values of a sweep; progress: how far its run is, or was when it kept this network;
    state: without optimizer; label: name of the training that made it.
    """

    member: int
    swept: Fields
    progress: str
    state: State
    label: str


class Saved(NamedTuple):
    """A run as its newest checkpoints have it, or its kept networks of one label.

    missing: members that have saved nothing yet. labels: of all networks that can be opened, the
    last one's at the end.
    """

    config: Fields
    problem: Problem  # of one member: no leading axis
    networks: list[Network]
    missing: list[int]
    labels: Sequence[str] = ()


def open_run(
    workdir: AnyPath,
    *,
    data_dir: str = "",
    data_name: str = "",
    statistics: Statistics = "run",
    label: str = "",
) -> Saved:
    """Network, data and newest checkpoint of the run in `workdir`, which may also be one
    `member_...` folder of it.

    label: of the trained networks that are opened, one of `Saved.labels` or how one alone of them
    begins; by default those that the run made last. data_dir: where prepared sets are on this
    machine, instead of config.data.data_dir. data_name: another set with the same classes, e.g.
    `folder:PATH`.
    statistics: mean and std of its images are those of the "run", as the network was trained, for
    which the run's train images are read again where they are not published; or those of the other
    "data". Stages are not checked, so a run that started from another one can be evaluated without
    it. Raises ConfigError for a folder without a run or checkpoint, a checkpoint of another
    network, and an unknown label.
    """
    workdir = pathlib.Path(workdir)
    config = _read_config(workdir)
    whole = workdir
    folders = workdirs.member_folders(workdir)
    siblings = workdirs.member_folders(workdir.parent)
    alone = {number: folder for number, folder in siblings.items() if folder == workdir}
    if alone and (workdir.parent / "config.json").is_file():
        whole = workdir.parent
        folders = alone
    swept_values = [member.swept for member in members.expand(_read_config(whole))]
    snapshots = {}
    for number, folder in (folders or {0: workdir}).items():
        snapshot = workdirs.newest(folder)
        if snapshot:
            snapshots[number] = snapshot
    if not snapshots:
        raise ConfigError(
            f"{workdir} has no checkpoint: its run has saved nothing yet; start it once more."
        )
    with imports.telling_files(whole):
        problem = build(config, data_dir=data_dir, data_name=data_name, statistics=statistics)
    hint = " --data needs the run's classes and image size." if data_name else ""
    networks = []
    labels: dict[str, None] = {}
    saved = set()
    for number, snapshot in snapshots.items():
        own = dict(enumerate(swept_values))
        if folders:
            own = {number: swept_values[number]}
        opened = _networks_of(snapshot, config, problem, own, label, hint)
        networks += opened.networks
        labels |= dict.fromkeys(opened.labels)
        saved |= {*own}
    if not networks:
        allowed = ", ".join(map(repr, labels))
        raise ConfigError("label", label, allowed=allowed, known=labels)
    expected = saved if whole != workdir else range(len(swept_values))
    missing = [member for member in expected if member not in saved]
    return Saved(config, problem, networks, missing, tuple(labels))


def _networks_of(
    snapshot: workdirs.Snapshot,
    config: Fields,
    problem: Problem,
    swept_of: dict[int, Fields],
    label: str,
    hint: str,
) -> Saved:
    """The networks of this label of the run of a checkpoint, none of an unknown one; by default
    those of the checkpoint itself. swept_of: what is swept, by member.
    """
    workdir = snapshot.workdir
    older = kept.networks(workdir)
    states: list[State] | None = None
    last = label_of(config, snapshot.progress)
    labels = {number: swept.get("arm") or last for number, swept in swept_of.items()}
    known = [*(name for name in older if name not in labels.values()), *labels.values()]
    label = _whole_label(label, known)
    if label in older and label not in labels.values():
        states = _states_in(f"{older[label].file}", kept.arrays(older[label]), problem, hint)
        labels = dict.fromkeys(swept_of, label)
        place = _told(config, older[label].position, "after")
    else:
        states, progress = restore(snapshot, problem, hint)
        place = _told(config, progress.stage, "in")
    if len(states) != len(swept_of):
        raise ConfigError(
            f"{workdir}: config.json makes {len(swept_of)} networks, the checkpoint has "
            f"{len(states)}. Was config.json edited?"
        )
    networks = []
    for (number, swept), state in zip(swept_of.items(), states):
        if label in ("", labels[number]):
            networks.append(Network(number, swept, place, state, labels[number]))
    return Saved(config, problem, networks, [], known)


def _whole_label(start: str, labels: Sequence[str]) -> str:
    """The one label that begins so; `start` itself if it is one, or begins none or several."""
    longer = {label for label in labels if label.startswith(start)}
    if start and start not in labels and len(longer) == 1:
        return longer.pop()
    return start


def _read_config(workdir: pathlib.Path) -> Fields:
    """The config of a run, with the defaults of all common fields."""
    if not workdirs.holds_run(workdir):
        raise ConfigError(f"{workdir} holds no run (no config.json).")
    config = workdirs.read_config(workdir)
    known = tables.parameters(plans.settings)
    common = {name: value for name, value in config.items() if name in known}
    with tables.within("config"):
        tables.check_options(plans.settings, common)
    plans.check_names(config["pipeline"], members.stages_of(config))
    return {**tables.defaults(plans.settings), **config}


def build(
    config: Config, *, data_dir: str = "", data_name: str = "", statistics: Statistics = "run"
) -> Problem:
    """Data and network of a config, for one member on one device; see `open_run`."""
    tables.convert(statistics, Statistics, "statistics")
    own = {**tables.defaults(data.Options), **config["data"]}
    own["data_dir"] = data_dir or own["data_dir"]
    options = _other_data(own, data_name) if data_name else own
    if data_name:
        options["normalization"] = "auto" if statistics == "data" else "none"
    dataset = _load_data(options)
    if data_name and statistics == "run":
        dataset = dataset._replace(**_statistics_of_run(own, dataset)._asdict())
    with tables.within("config.model"):
        plans.check_model(config["model"])
    model = models.build(num_classes=dataset.num_classes, **config["model"])
    return train.build_problem(
        dataset,
        model,
        eval_batch_size=config["eval_batch_size"],
        precision=config["precision"],
    )


def _other_data(own: Fields, name: str) -> Fields:
    """Options of another data set; splits and limits are kept from one folder to another only."""
    if name.startswith("folder:") and own["name"].startswith("folder:"):
        return own | dict(name=name)
    whole = tables.defaults(data.Options)  # names of splits are the set's own
    fields = ("train_split", "test_split", "train_limit", "test_limit")
    return own | {field: whole[field] for field in fields} | dict(name=name)


def _load_data(options: Config) -> data.Dataset:
    """The data set of these options."""
    with tables.within("config.data"):
        return data.load(**options)


def _statistics_of_run(options: Config, dataset: data.Dataset) -> data.Normalization:
    """Mean and std with which a run of the data `options` trained, for images of another `dataset`.

    Raises ConfigError if they were computed from images that are not there.
    """
    channels = dataset.train.images.shape[-1]
    known = data.published(data.Options(**options), channels)
    if known is not None:
        return known
    try:
        trained_on = _load_data({**options, "test_limit": 1})
    except ConfigError as error:
        raise ConfigError(
            "--data: mean and std belong to the trained network and are those of its run's train "
            f"images: {error} --data_dir tells where they are; --statistics data takes mean and "
            "std of the other set instead."
        ) from None
    return data.Normalization(trained_on.mean, trained_on.std)


def _told(config: Config, index: int, where: str) -> str:
    """How far a run is. where: "in" the stage of this index or "after" it."""
    names = config["pipeline"]
    if index >= len(names):
        return "finished"
    return f"{where} stage {index + 1} of {len(names)} ({names[index]})"


def label_of(config: Config, progress: workdirs.Progress) -> str:
    """Name of the training that made the network of a checkpoint, as in the report."""
    finished = progress.stage - (not progress.begun)
    return pipeline.arm_of(config, max(finished, 0))


def restore(
    snapshot: workdirs.Snapshot, problem: Problem, hint: str
) -> tuple[list[State], workdirs.Progress]:
    """The state of each member, from a checkpoint made on whatever devices, or from a later one if
    its run has removed that; and where it was.

    hint: what else may be the reason if the checkpoint is of another network, which raises
    ConfigError.
    """
    workdir = snapshot.workdir
    try:
        with checkpoint.reading(snapshot):
            shapes = stored.shapes(snapshot)
            _check_shapes(f"{workdir}: the checkpoint", shapes, problem, hint)
            arrays = stored.arrays(snapshot)
    except intact.DamagedError:
        later = workdirs.newest(workdir)
        if later is None or later.folder == snapshot.folder:
            raise
        return restore(later, problem, hint)
    return _states_of(arrays, problem), snapshot.progress


def _states_in(what: str, arrays: Fields, problem: Problem, hint: str) -> list[State]:
    """The state of each member, from the arrays of a kept network by path. what: it is."""
    shapes = {path: leaf.shape for path, leaf in arrays.items()}
    _check_shapes(what, shapes, problem, hint)
    return _states_of(arrays, problem)


def _states_of(arrays: Fields, problem: Problem) -> list[State]:
    """The state of each member, of all arrays by path."""
    variables = problem.shapes()
    parts = {**variables, "masks": variables["params"]}
    parts = trees.map_named(lambda path, _: arrays[path], parts)
    parts |= dict(step=arrays["step"], key=arrays["key"])
    slices = [parts]
    if parts["step"].ndim:
        numbers = range(len(parts["step"]))
        slices = [jax.tree.map(lambda leaf, i=i: leaf[i], parts) for i in numbers]
    metrics = train.no_metrics()
    return [State(**own, opt_state=(), metrics=metrics) for own in slices]


def _check_shapes(what: str, shapes: dict[str, Shape], problem: Problem, hint: str) -> None:
    """Raises ConfigError unless arrays, by path, have the shapes of the network's variables, behind
    an axis of members if there is one.
    """
    with building.making_network(f"{what}: the network of config.model"):
        variables = problem.shapes()
    there = {path: shape for path, shape in shapes.items() if path.split("/")[0] in variables}
    leaves = trees.named_leaves(variables)
    wanted = {path: shapes["step"] + leaf.shape for path, leaf in leaves.items()}
    check_shapes(what, there, wanted, f" Was config.json edited?{hint}")


# Numbers ------------------------------------------------------------------------------------------


def run(
    workdir: AnyPath,
    *,
    data_dir: str = "",
    data_name: str = "",
    statistics: Statistics = "run",
    label: str = "",
    **options: Any,
) -> Rows:
    """The numbers of every member of the run in `workdir` that has a checkpoint.

    data_dir, data_name, statistics, label: as in `open_run`; the other options: as in `measure`.
    Raises ConfigError as these do, and where the memory is full.
    """
    with building.enough_memory(str(workdir), _MORE_MEMORY):
        saved = open_run(
            workdir, data_dir=data_dir, data_name=data_name, statistics=statistics, label=label
        )
        return list(_measured(saved, **options))


def _measured(saved: Saved, **options: Any) -> Iterator[Row]:
    """`measure` of every member, behind the fields that say which one it is."""
    precise = computed(measure, saved.problem.precision)
    for network in saved.networks:
        row = precise(saved.problem, network.state, **options)
        which = dict(
            data=saved.problem.dataset.name,
            model=saved.config["model"]["name"],
            member=network.member,
            swept=network.swept,
            network=network.label,
            progress=network.progress,
        )
        yield {**which, **row}


_COMPACT = (  # fields of `compaction.take_stock`
    *("parameters_compact", "flops_compact", "bytes_compact", "difference", "kept", "sizes"),
    *("batch_size", "milliseconds", "milliseconds_low", "milliseconds_high"),
    *("speedup", "speedup_low", "speedup_high", "verdict"),
)


def measure(
    problem: Problem,
    state: State,
    *,
    on_train: bool = False,
    latency: bool = False,
    batch_size: int = 64,
    repeats: int = 30,
) -> Row:
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
        raise ConfigError("repeats", repeats, allowed="int >= 2")
    variables = state.variables
    row = _scores(problem, state, "test")
    if on_train:
        row |= _scores(problem, state, "train")
    row |= dict(
        parameters=cost.num_params(variables),
        parameters_kept=_count_nonzero(state.masks),
        parameters_nonzero=_count_nonzero(state.params),
        bytes=cost.num_bytes(variables),
        flops=cost.flops(problem.model.apply, variables, problem.image(1)).products,
        device=jax.local_devices()[0].device_kind,
    )
    cut, stock, note = compared(
        problem, state, batch_size=batch_size, repeats=repeats if latency else 0
    )
    if stock is not None:
        row |= {name: stock[name] for name in _COMPACT if name in stock}
        row["test_accuracy_compact"] = stock["accuracy"]
        row["compression"] = stock["bytes"] / stock["bytes_compact"]
    elif latency:
        images = problem.images(problem.examples("test", batch_size)[0])
        took = cost.latency(jax.jit(problem.model.apply), variables, images, repeats=repeats)
        row["batch_size"] = len(images)
        row |= compaction.milliseconds({"dense": took})
    pruned = ["channels"] if cut else []
    if row["parameters_kept"] < row.get("parameters_compact", row["parameters"]):
        pruned.append("weights")
    return {**row, "pruned": " and ".join(pruned) or "nothing", "note": note}


def _count_nonzero(tree: PyTree) -> int:
    """Number of entries that are not zero."""
    return sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(tree))


def _scores(problem: Problem, state: State, split: str) -> Row:
    """Accuracy, loss and number of examples of one split."""
    result = train.measure(problem, state.params, state.batch_stats, split)
    unreadable = len(result.unreadable)
    examples = problem.size(split) - unreadable
    right = round(float(result.accuracy) * examples)  # the accuracy is rounded to float32
    row = {
        f"{split}_accuracy": right / max(examples, 1),
        f"{split}_loss": float(result.loss),
        f"{split}_examples": examples,
    }
    if unreadable:
        return row | {f"{split}_unreadable": unreadable}
    return row


_LINES = {  # of a member's table: field to name and format
    "test_accuracy": ("test accuracy", ".2%"),
    "test_loss": ("test loss", ".4f"),
    "test_examples": ("test images", ","),
    "train_accuracy": ("train accuracy", ".2%"),
    "train_loss": ("train loss", ".4f"),
    "train_examples": ("train images", ","),
    "parameters": ("parameters", ","),
    "parameters_kept": ("  not masked", ","),
    "parameters_nonzero": ("  not zero", ","),
    "flops": ("FLOPs of one image", ","),
    "bytes": ("bytes", ","),
    "compression": ("compression", ".2f"),
}
_SPEED = (
    "  {verdict}: compact has {speedup:.2f} times the speed of dense ({speedup_low:.2f} to "
    "{speedup_high:.2f}) on {device}"
)
_PRUNED = {  # what that means
    "nothing": "  nothing is pruned: zeros are those that training or its file left",
    "weights": "  single weights are masked: the arrays keep their shapes, so bytes and FLOPs stay",
}


def describe(row: Config) -> str:
    """The numbers of one member as a table."""
    swept = f" ({members.told(row['swept'])})" if row["swept"] else ""
    network = f"{row['network']}, member {row['member']}{swept}"
    lines = [f"{row['model']} on {row['data']}, {network}: {row['progress']}"]
    compact = "compact" if "parameters_compact" in row else ""
    lines.append(f"{'':<28}{'dense':>16}{compact:>16}")
    for field, (name, form) in _LINES.items():
        fields = (field, f"{field}_compact")
        texts = [format(row[key], form) for key in fields if key in row]
        if texts:
            columns = "".join(f"{text:>16}" for text in texts)
            lines.append(f"  {name:<26}{columns}")
    for name, middle in row.get("milliseconds", {}).items():
        low = row["milliseconds_low"][name]
        high = row["milliseconds_high"][name]
        batch = f"  {name}, a batch of {row['batch_size']}"
        spread = f"quartiles {low:.3g} to {high:.3g}"
        lines.append(f"{batch}: {middle:.3g} ms ({spread})")
    if "verdict" in row:
        lines.append(_SPEED.format_map(row))
    lines.append(_PRUNED.get(row["pruned"], ""))
    lines.append(f"  {row['note']}")
    return "\n".join(line.rstrip() for line in lines if line.strip())


def describe_all(rows: Rows) -> str:
    """The tables of all members, and of several seeds mean and deviation of their accuracy."""
    text = [describe(row) for row in rows]
    by_seed = all(set(row["swept"]) == {"seed"} for row in rows)
    are_seeds = by_seed and len(rows) > 1
    for split in ("test", "train") if are_seeds else ():
        values = [row[f"{split}_accuracy"] for row in rows if f"{split}_accuracy" in row]
        if values:
            mean = np.mean(values)
            deviation = np.std(values, ddof=1)
            of_seeds = f"{split} accuracy of {len(values)} seeds"
            text.append(f"{of_seeds}: {mean:.2%}, standard deviation {deviation:.2%}")
    return "\n\n".join(text)


# Export -------------------------------------------------------------------------------------------


def export_run(
    saved: Saved,
    folder: AnyPath,
    *,
    platforms: Sequence[str] = ("cpu",),
    dense: bool = False,
    notes: Sequence[str | None] = (),
) -> list[pathlib.Path]:
    """`export` of every member: of several, to `folder/member_000` and so on. Returns the folders.

    notes: of the members, as `measure` tells them; they are found anew without.
    """
    check_export(folder, platforms=platforms)
    folder = pathlib.Path(folder)
    model = saved.config["model"]
    with replacing(folder) as part:
        for network, note in itertools.zip_longest(saved.networks, notes):
            own = part / workdirs.member_name(network.member) if len(saved.networks) > 1 else part
            write(
                saved.problem,
                model,
                network.state,
                own,
                platforms=platforms,
                dense=dense,
                note=note,
            )
    return [*workdirs.member_folders(folder).values()] or [folder]


def _check_torch(file: AnyPath) -> None:
    """Raises ConfigError unless `file` is a new .safetensors file."""
    path = pathlib.Path(file)
    if path.suffix != ".safetensors" or path.exists():
        raise ConfigError(f"{path} cannot be written; name a new file *.safetensors.")


def export_torch(saved: Saved, file: AnyPath) -> list[pathlib.Path]:
    """Writes every member's weights as a PyTorch state dict (see `pretrained.to_torch`).

    Dense: pruned weights are zeros. To the new `file`, of several members to `NAME_000.safetensors`
    and so on. Returns the files.
    """
    file = pathlib.Path(file)
    paths = [file]
    if len(saved.networks) > 1:
        paths = [file.with_stem(f"{file.stem}_{network.member:03d}") for network in saved.networks]
    for path in paths:
        _check_torch(path)
    *_, channels = saved.problem.image(1).shape
    for path, network in zip(paths, saved.networks):
        weights = pretrained.to_torch(network.state.variables, image_channels=channels)
        pretrained.write(path, weights)
    return paths


def _check_writable(file: AnyPath) -> None:
    """Raises ConfigError if nothing can be written where `file` is to be."""
    parents = pathlib.Path(file).absolute().parents
    there = next(folder for folder in parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(
            f"{file} cannot be written, since {there} is not writable; name another place."
        )


# Command line -------------------------------------------------------------------------------------

_OPTIONS: dict[str, Fields] = {  # of the command line
    "workdir": dict(required=True, help="folder of the run, or of one of its members"),
    "label": dict(
        default="",
        help="of the trained networks that are meant, or how it begins; by default the last ones",
    ),
    "train": dict(action="store_true", help="accuracy and loss on the train set too"),
    "latency": dict(action="store_true", help="measure the time of a batch, dense against compact"),
    "batch_size": dict(type=int, default=64, help="images of a measured batch (default: 64)"),
    "repeats": dict(type=int, default=30, help="how often each batch is measured (default: 30)"),
    "data_dir": dict(default="", help="where prepared sets are, if not where the config says"),
    "data": dict(default="", help="another set of the same classes: a name or folder:PATH"),
    "statistics": dict(
        choices=["run", "data"],
        default="run",
        help="with --data: mean and std of the images are those the run trained with, or those of "
        "the other set",
    ),
    "json": dict(default="", metavar="FILE", help="write the numbers to this file"),
    "export": dict(
        default="", metavar="DIR", help="write the network, compact, to this new folder"
    ),
    "dense": dict(action="store_true", help="export with the masked channels, as zeros"),
    "torch": dict(
        default="", metavar="FILE", help="write the weights for PyTorch: FILE.safetensors"
    ),
    "platforms": dict(
        nargs="+", default=["cpu"], help="where the exported program runs: cpu, cuda, rocm, tpu"
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: tables to standard output, mistakes in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_jax.evaluate",
        description="Accuracy, size, FLOPs and time of the networks of a run, dense and compact; "
        "export of them.",
    )
    for name, settings in _OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument(
        f"--no{compilation.FLAG}",
        dest="cache",
        action="store_false",
        help=f"do not: {compilation.HELP}",
    )
    imports.add_option(parser)
    options = parser.parse_args(arguments)
    if options.cache:
        compilation.keep()
    try:
        for file in options.files:
            imports.load(file)
        with building.enough_memory(options.workdir, _MORE_MEMORY):
            for line in _answer(options):
                sys.stdout.write(f"{line}\n")
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def _answer(options: argparse.Namespace) -> Iterator[str]:
    """Writes what the command line asks for, and yields what it prints."""
    if options.export:
        check_export(options.export, platforms=options.platforms)
    if options.torch:
        _check_torch(options.torch)
    for file in filter(None, (options.export, options.torch, options.json)):
        _check_writable(file)
    saved = open_run(
        options.workdir,
        data_dir=options.data_dir,
        data_name=options.data,
        statistics=options.statistics,
        label=options.label,
    )
    numbers = _measured(
        saved,
        on_train=options.train,
        latency=options.latency,
        batch_size=options.batch_size,
        repeats=options.repeats,
    )
    rows = list(numbers)
    yield describe_all(rows)
    yield from _remarks(saved, options)
    if options.json:
        intact.write_object(pathlib.Path(options.json), report.plain(rows))
    if options.export:
        notes = [row["note"] for row in rows]
        folders = export_run(
            saved, options.export, platforms=options.platforms, dense=options.dense, notes=notes
        )
        for folder, row in zip(folders, rows):
            kind = "compact" if "channels" in row["pruned"] else "dense, since no channels are cut:"
            yield f"exported {'dense' if options.dense else kind} network: {folder}"
    for path in export_torch(saved, options.torch) if options.torch else ():
        yield f"wrote PyTorch weights of the dense network: {path}"


def _remarks(saved: Saved, options: argparse.Namespace) -> Iterator[str]:
    """What else there is to say about the networks that were measured."""
    if len(saved.labels) > 1:
        yield f"\nnetworks of this run, for --label: {', '.join(map(repr, saved.labels))}"
    if options.data:
        whose = "the train set of the run" if options.statistics == "run" else options.data
        yield f"\nmean and std of the images are those of {whose}"
    for member in saved.missing:
        yield f"\nmember {member} has no checkpoint yet"


if __name__ == "__main__":
    main()
