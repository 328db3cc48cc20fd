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
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import (
    checkpoint,
    cost,
    data,
    imports,
    intact,
    members,
    models,
    pipeline,
    pretrained,
    report,
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
    variables_of,
    verify,
    write,
)

__all__ = ["compared", "export", "load", "verify"]  # of `sparsity_jax.export`

PyTree = Any
Statistics = Literal["run", "data"]
MEMBER = re.compile(r"member_(\d+)")
MORE_MEMORY = (
    "Lower --batch_size if --latency fills it, or evaluate where there is more: with "
    "JAX_PLATFORMS=cpu in the environment the memory of the host counts."
)


# Runs on disk -------------------------------------------------------------------------------------


class Network(NamedTuple):
    """One member of a run.

    swept: its values of a sweep; progress: how far its run is; state: without optimizer; label:
    name of the training whose network the checkpoint holds, the last one of several in a run.
    """

    member: int
    swept: dict[str, Any]
    progress: str
    state: train.State
    label: str


class Saved(NamedTuple):
    """A run as its newest checkpoints have it. missing: members that have saved nothing yet."""

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
    folders = member_folders(workdir)
    whole = config
    inside = MEMBER.fullmatch(workdir.name)
    if inside and (workdir.parent / "config.json").is_file():
        folders = {int(inside[1]): workdir}
        whole = read_config(workdir.parent)
    swept_values = [member.swept for member in members.expand(whole)]
    snapshots = {}
    for number, folder in (folders or {0: workdir}).items():
        snapshots[number] = workdirs.newest(folder)
    if not any(snapshots.values()):
        raise tables.ConfigError(
            f"{workdir} has no checkpoint: its run has saved nothing yet; start it once more."
        )
    problem = build(config, data_dir, data_name, statistics)
    hint = " --data needs the run's classes and image size." if data_name else ""
    networks = []
    for number, snapshot in snapshots.items():
        if snapshot is None:
            continue
        states, progress = restore_newest(snapshot, problem, hint)
        own = swept_values
        if folders:
            own = swept_values[number : number + len(states)]
        if len(states) != len(own):
            raise tables.ConfigError(
                f"{workdir}: config.json makes {len(own)} networks, the checkpoint has "
                f"{len(states)}. Was config.json edited?"
            )
        for member, (swept, state) in enumerate(zip(own, states), start=number):
            label = swept.get("arm") or label_of(config, progress)
            networks.append(Network(member, swept, told(config, progress), state, label))
    expected = {*folders} if whole is not config else {*folders, *range(len(swept_values))}
    missing = sorted(expected - {network.member for network in networks})
    return Saved(config, problem, networks, missing)


def member_folders(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
    """Folders of the members of a run that have their own, by number."""
    folders = {}
    for path in sorted(workdir.glob("member_*")):
        match = MEMBER.fullmatch(path.name)
        if match:
            folders[int(match[1])] = path
    return folders


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
    own = {**tables.defaults(data.load), **config["data"]}
    own["data_dir"] = data_dir or own["data_dir"]
    if not data_name:
        dataset = load_data(own)
    elif statistics == "data":
        dataset = load_data(other_data(own, data_name) | dict(normalization="auto"))
    else:
        dataset = load_data(other_data(own, data_name) | dict(normalization="none"))
        dataset = dataset._replace(**statistics_of_run(own, dataset)._asdict())
    with tables.within("config.model"):
        pipeline.check_model(config["model"])
    model = models.build(num_classes=dataset.num_classes, **config["model"])
    return train.build_problem(dataset, model, eval_batch_size=config["eval_batch_size"])


def other_data(own: dict[str, Any], name: str) -> dict[str, Any]:
    """Options of another data set; splits and limits are kept from one folder to another only."""
    if name.startswith("folder:") and own["name"].startswith("folder:"):
        return own | dict(name=name)
    whole = tables.defaults(data.load)  # names of splits are the set's own
    fields = ("train_split", "test_split", "train_limit", "test_limit")
    return own | {field: whole[field] for field in fields} | dict(name=name)


def load_data(options: Mapping[str, Any]) -> data.Dataset:
    """The data set of these options."""
    with tables.within("config.data"):
        return data.load(**tables.check_options(data.load, options))


def statistics_of_run(options: Mapping[str, Any], dataset: data.Dataset) -> data.Normalization:
    """Mean and std with which a run of the data `options` trained, for images of another `dataset`.

    Raises ConfigError if they were computed from images that are not there.
    """
    channels = dataset.train.images.shape[-1]
    known = data.published(options, channels)
    if known is not None:
        return known
    try:
        trained_on = load_data({**options, "test_limit": 1})
    except tables.ConfigError as error:
        raise tables.ConfigError(
            "--data: mean and std belong to the trained network and are those of its run's train "
            f"images: {error} --data_dir tells where they are; --statistics data takes mean and "
            "std of the other set instead."
        ) from None
    return data.Normalization(trained_on.mean, trained_on.std)


def told(config: Mapping[str, Any], progress: workdirs.Progress) -> str:
    """How far a run is."""
    names = config["pipeline"]
    if progress.stage >= len(names):
        return "finished"
    return f"in stage {progress.stage + 1} of {len(names)} ({names[progress.stage]})"


def label_of(config: dict[str, Any], progress: workdirs.Progress) -> str:
    """Name of the training that made the network of a checkpoint, as in the report."""
    finished = progress.stage - (not progress.begun)
    return pipeline.arm_of(config, max(finished, 0))


def restore_newest(
    snapshot: workdirs.Snapshot, problem: train.Problem, hint: str
) -> tuple[list[train.State], workdirs.Progress]:
    """`restore` of the newest checkpoint, or of a later one if its run has removed that."""
    while True:
        try:
            return restore(snapshot, problem, hint), snapshot.progress
        except intact.DamagedError:
            later = workdirs.newest(snapshot.folder.parent.parent)
            if later is None or later.folder == snapshot.folder:
                raise
            snapshot = later


def restore(snapshot: workdirs.Snapshot, problem: train.Problem, hint: str) -> list[train.State]:
    """The state of each member, from a checkpoint made on whatever devices.

    hint: what else may be the reason if the checkpoint is of another network, which raises
    ConfigError.
    """
    workdir = snapshot.folder.parent.parent
    with checkpoint.reading(snapshot):
        shapes = checkpoint.shapes(snapshot)
        with pipeline.making_network(f"{workdir}: the network of config.model"):
            variables = jax.eval_shape(problem.init, jax.random.key(0))
        leading = shapes["step"]  # () or (members,)
        found = {path: shape for path, shape in shapes.items() if path.split("/")[0] in variables}
        wanted = {
            path: leading + leaf.shape for path, leaf in trees.named_leaves(variables).items()
        }
        what = f"{workdir}: the checkpoint"
        check_shapes(what, found, wanted, f" Was config.json edited?{hint}")
        arrays = checkpoint.arrays(snapshot)
    parts = {**variables, "masks": variables["params"]}
    parts = trees.map_named(lambda path, _: arrays[path], parts)
    state: Any = train.State(
        parts["params"],
        parts["batch_stats"],
        parts["masks"],
        opt_state=(),
        step=arrays["step"],
        key=arrays["key"],
        metrics=train.no_metrics(),
    )
    if not leading:
        return [state]
    states = []
    for i in range(leading[0]):
        slices = jax.tree.map(lambda leaf, i=i: leaf[i], state._replace(metrics=()))
        states.append(slices._replace(metrics=state.metrics))
    return states


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
) -> list[dict[str, Any]]:
    """The numbers of every member of the run in `workdir` that has a checkpoint; see `measure`.

    data_dir, data_name, statistics: as in `open_run`. Raises ConfigError as that does, and where
    the memory is full.
    """
    chosen = dict(on_train=on_train, latency=latency, batch_size=batch_size, repeats=repeats)
    with pipeline.enough_memory(str(workdir), MORE_MEMORY):
        saved = open_run(workdir, data_dir=data_dir, data_name=data_name, statistics=statistics)
        return list(measured(saved, **chosen))


def measured(saved: Saved, **options: Any) -> Iterator[dict[str, Any]]:
    """`measure` of every member, behind the fields that say which one it is."""
    for network in saved.networks:
        row = measure(saved.problem, network.state, **options)
        which = dict(
            data=saved.problem.dataset.name,
            model=saved.config["model"]["name"],
            member=network.member,
            swept=network.swept,
            network=network.label,
            progress=network.progress,
        )
        yield {**which, **row}


COMPACT = (  # fields of `structured.take_stock`
    *("parameters_compact", "flops_compact", "bytes_compact", "difference", "kept", "sizes"),
    *("batch_size", "milliseconds", "milliseconds_low", "milliseconds_high"),
    *("speedup", "speedup_low", "speedup_high", "verdict"),
)


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
        raise tables.ConfigError("repeats", repeats, allowed="int >= 2")
    variables = variables_of(state)
    row: dict[str, Any] = {}
    for split in ("test", "train") if on_train else ("test",):
        row |= scores(problem, state, split)
    one = jax.ShapeDtypeStruct((1, *problem.dataset.test.images.shape[1:]), jnp.float32)
    row |= dict(
        parameters=cost.num_params(variables),
        parameters_kept=count_nonzero(state.masks),
        parameters_nonzero=count_nonzero(state.params),
        bytes=cost.num_bytes(variables),
        flops=cost.flops(problem.model.apply, variables, one).products,
        device=jax.local_devices()[0].device_kind,
    )
    cut, stock, note = compared(problem, state, batch_size, repeats if latency else 0)
    if stock is not None:
        row |= {name: stock[name] for name in COMPACT if name in stock}
        row["test_accuracy_compact"] = stock["accuracy"]
        row["compression"] = stock["bytes"] / stock["bytes_compact"]
    elif latency:
        images = problem.images(problem.examples("test", batch_size)[0])
        took = cost.latency(jax.jit(problem.model.apply), variables, images, repeats=repeats)
        row["batch_size"] = len(images)
        row["milliseconds"] = {"dense": 1e3 * took.median}
        row["milliseconds_low"] = {"dense": 1e3 * took.low}
        row["milliseconds_high"] = {"dense": 1e3 * took.high}
    pruned = ["channels"] if cut else []
    if row["parameters_kept"] < row.get("parameters_compact", row["parameters"]):
        pruned.append("weights")
    return {**row, "pruned": " and ".join(pruned) or "nothing", "note": note}


def count_nonzero(tree: PyTree) -> int:
    """Number of entries that are not zero."""
    return sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(tree))


def scores(problem: train.Problem, state: train.State, split: str) -> dict[str, Any]:
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
    return row | {f"{split}_unreadable": unreadable} if unreadable else row


LINES = (  # of a member's table: name, field, its format, and (field, text) of a remark
    ("test accuracy", "test_accuracy", ".2%", ("test_examples", "of {:,} images")),
    ("test loss", "test_loss", ".4f", None),
    ("train accuracy", "train_accuracy", ".2%", ("train_examples", "of {:,} images")),
    ("train loss", "train_loss", ".4f", None),
    ("parameters", "parameters", ",", None),
    ("  not masked", "parameters_kept", ",", ("share_kept", "{:.1%} of the dense network's")),
    ("  not zero", "parameters_nonzero", ",", None),
    ("FLOPs of one image", "flops", ",", None),
    ("bytes", "bytes", ",", ("compression", "compression {:.2f}")),
)
PRUNED = {  # what that means
    "nothing": "  nothing is pruned: this is the dense network",
    "weights": "  single weights are masked: the arrays keep their shapes, so bytes and FLOPs stay",
}


def describe(row: Mapping[str, Any]) -> str:
    """The numbers of one member as a table."""
    swept = ", ".join(f"{name}={value}" for name, value in row["swept"].items())
    which = f"{row['network']}, member {row['member']}{swept and f' ({swept})'}"
    lines = [f"{row['model']} on {row['data']}, {which}: {row['progress']}"]
    compact = "compact" if "parameters_compact" in row else ""
    lines.append(f"{'':<28}{'dense':>16}{compact:>16}".rstrip())
    share = row["parameters_kept"] / max(row["parameters"], 1)
    known = {**row, "share_kept": share}
    for name, field, form, remark in LINES:
        if field not in row:
            continue
        small = format(row[f"{field}_compact"], form) if f"{field}_compact" in row else ""
        more = remark[1].format(known[remark[0]]) if remark and remark[0] in known else ""
        lines.append(f"  {name:<26}{format(row[field], form):>16}{small:>16}  {more}".rstrip())
    lines += describe_times(row)
    zeros = row["parameters_kept"] - row["parameters_nonzero"]
    if row["pruned"] == "nothing" and zeros:
        masked = f"  nothing is masked: {zeros:,} parameters are zero, as training or their file"
        lines.append(f"{masked} left them")
    elif row["pruned"] in PRUNED:
        lines.append(PRUNED[row["pruned"]])
    if row["note"]:
        lines.append(f"  {row['note']}")
    return "\n".join(lines)


def describe_times(row: Mapping[str, Any]) -> list[str]:
    """Lines on the time that a batch takes, as far as it was measured."""
    lines = []
    for name in row.get("milliseconds", ()):
        low, middle, high = (row[f"milliseconds{part}"][name] for part in ("_low", "", "_high"))
        quartiles = f"(quartiles {low:.3g} to {high:.3g})"
        lines.append(f"  {name}, a batch of {row['batch_size']}: {middle:.3g} ms {quartiles}")
    if "verdict" in row:
        verdict = row["verdict"]
        words = f"compact is {verdict}" if verdict in ("faster", "slower") else verdict
        spread = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
        times = f"{row['speedup']:.2f} times the speed of dense ({spread})"
        lines.append(f"  {words}: {times} on {row['device']}")
    return lines


def describe_all(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of all members, and of several seeds mean and deviation of their accuracy."""
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


def export_run(
    saved: Saved,
    folder: str | os.PathLike,
    platforms: Sequence[str] = ("cpu",),
    *,
    dense: bool = False,
    notes: Sequence[str | None] = (),
) -> list[pathlib.Path]:
    """`export` of every member: of several, to `folder/member_000` and so on. Returns the folders.

    notes: of the members, as `measure` tells them; they are found anew without.
    """
    check_export(folder, platforms)
    folder = pathlib.Path(folder)
    model = saved.config["model"]
    with replacing(folder) as part:
        for network, note in zip(saved.networks, notes or [None] * len(saved.networks)):
            own = part / f"member_{network.member:03d}" if len(saved.networks) > 1 else part
            write(own, saved.problem, model, network.state, platforms, dense=dense, note=note)
    return sorted(folder.glob("member_*")) or [folder]


def check_torch(file: str | os.PathLike) -> None:
    """Raises ConfigError unless `file` is a new .safetensors file."""
    path = pathlib.Path(file)
    if path.suffix != ".safetensors" or path.exists():
        raise tables.ConfigError(f"{path} cannot be written; name a new file *.safetensors.")


def export_torch(saved: Saved, file: str | os.PathLike) -> list[pathlib.Path]:
    """Writes every member's weights as a PyTorch state dict (see `pretrained.to_torch`).

    Dense: pruned weights are zeros. To the new `file`, of several members to `NAME_000.safetensors`
    and so on. Returns the files.
    """
    file = pathlib.Path(file)
    paths = [file]
    if len(saved.networks) > 1:
        paths = [file.with_stem(f"{file.stem}_{network.member:03d}") for network in saved.networks]
    for path in paths:
        check_torch(path)
    channels = saved.problem.dataset.test.images.shape[-1]
    for path, network in zip(paths, saved.networks):
        weights = pretrained.to_torch(variables_of(network.state), image_channels=channels)
        pretrained.write(path, weights)
    return paths


def check_writable(file: str | os.PathLike) -> None:
    """Raises ConfigError if nothing can be written where `file` is to be."""
    parents = pathlib.Path(file).absolute().parents
    there = next(folder for folder in parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise tables.ConfigError(
            f"{file} cannot be written, since {there} is not writable; name another place."
        )


# Command line -------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {  # of the command line
    "workdir": dict(required=True, help="folder of the run, or of one of its members"),
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
        nargs="+",
        default=["cpu"],
        help="where the exported program runs: cpu, cuda, rocm, tpu",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: tables to standard output, mistakes in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_jax.evaluate",
        description="Accuracy, size, FLOPs and time of the networks of a run, dense and compact; "
        "export of them.",
    )
    for name, settings in OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)
    imports.add_option(parser)
    options = parser.parse_args(arguments)
    try:
        for file in options.files:
            imports.load(file)
        with pipeline.enough_memory(options.workdir, MORE_MEMORY):
            for line in answer(options):
                sys.stdout.write(f"{line}\n")
    except (tables.ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def answer(options: argparse.Namespace) -> Iterator[str]:
    """Writes what the command line asks for, and yields what it prints."""
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
    yield describe_all(rows)
    if options.data:
        of_run = options.statistics == "run"
        whose = "those the run trained with" if of_run else f"those of {options.data}"
        yield f"\nmean and std of the images are {whose}"
    for member in saved.missing:
        yield f"\nmember {member} has no checkpoint yet"
    if options.json:
        text = json.dumps(report.plain(rows), indent=1) + "\n"
        report.write_atomic(pathlib.Path(options.json), text.encode())
    if options.export:
        notes = [row["note"] for row in rows]
        chosen = dict(dense=options.dense, notes=notes)
        folders = export_run(saved, options.export, options.platforms, **chosen)
        for folder, row in zip(folders, rows):
            kind = "compact" if "channels" in row["pruned"] else "dense, since no channels are cut:"
            yield f"exported {'dense' if options.dense else kind} network: {folder}"
    for path in export_torch(saved, options.torch) if options.torch else ():
        yield f"wrote PyTorch weights of the dense network: {path}"


if __name__ == "__main__":
    main()
