"""Networks of the originals after each of their pruning rounds: logits and numbers of
parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import golden_data
import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_budgets import by_layer
from test_scores import Group, member

from sparsity_jax import groups, losses, models, scores

FILE = "07_rounds_and_cap.npz"
GOLDEN = golden_data.load(FILE)
HYPER = golden_data.hyper(FILE)
CASES = golden_data.parts(FILE, r"rounds/([^/]+)/(\w+)/round0/")


def unpacked(net):
    """(names, shapes, parameters, running statistics) of a network before the first round, in
    PyTorch's layouts.
    """
    names = [str(name) for name in GOLDEN[f"rounds/{net}/param_names"]]
    shapes = golden_data.shapes_of(GOLDEN[f"rounds/{net}/param_shapes"])
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    flat = GOLDEN[f"rounds/{net}/flat_params"].astype(np.float64)
    parts = np.split(flat, ends[:-1])
    params = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes)}
    return names, shapes, params, GOLDEN[f"rounds/{net}/flat_running_stats"].astype(np.float64)


class Original(NamedTuple):
    """A network before the first round.

    kernels: paths of its convolutions, in the original's order; norms: of the batch norm of each.
    owners: for each kernel the group of its outputs; shrinking: those groups that the original
    takes out of memory, which are all that no sum of several convolutions needs.
    """

    apply: Callable
    mask: Callable
    variables: dict
    channels: groups.Channels
    kernels: list[str]
    norms: list[str]
    owners: list[str]
    shrinking: list[str]


def options_of(names, shapes):
    strides = [block[1] if isinstance(block, list) else 1 for block in HYPER["mobilenet_cfg"][1]]
    return golden_data.architecture(names, shapes, strides)


@functools.cache
def original(net):
    names, shapes, params, running = unpacked(net)
    variables = golden_data.variables(names, shapes, params)
    norms, stats = golden_data.batch_norms(names, shapes), {}
    for path, width in norms.items():
        stats |= {f"{path}/mean": running[:width], f"{path}/var": running[width : 2 * width]}
        running = running[2 * width :]
    variables["batch_stats"] = golden_data.nest(stats)
    options = options_of(names, shapes)
    num_classes = GOLDEN[f"rounds/{net}/logits_before"].shape[-1]
    model = models.build(num_classes=num_classes, dtype="float64", param_dtype="float64", **options)
    channels = groups.trace(model.apply, variables, images())
    paths = golden_data.paths(names, shapes)
    kernels = [f"params/{paths[name]}" for name, shape in zip(names, shapes) if len(shape) == 4]
    producers = {name: producers_of(group) for name, group in channels.groups.items()}
    owners = [next(name for name, own in producers.items() if kernel in own) for kernel in kernels]
    shrinking = [
        name for name, own in producers.items() if list(own.values()).count("producer") == 1
    ]
    mask = jax.jit(lambda variables, keep: groups.mask(variables, channels, keep))
    return Original(
        jax.jit(model.apply), mask, variables, channels, kernels, list(norms), owners, shrinking
    )


@pytest.mark.parametrize("net", dict(CASES))
def test_networks_are_those_of_the_hyper_parameters(net):
    names, shapes, _, _ = unpacked(net)
    options = options_of(names, shapes)
    if options["name"] == "vgg":
        assert list(options["layout"]) == HYPER["vgg_cfg"]
    elif options["name"] == "mobilenet":
        first = lambda block: block[0] if isinstance(block, list) else block
        stem, blocks = HYPER["mobilenet_cfg"]
        assert (options["stem_width"], [width for width, _ in options["blocks"]]) == (
            stem,
            list(map(first, blocks)),
        )
    else:
        own = HYPER["resnet56_cfg"]
        stages = [own["l1"], own["l2"], own["l3"]]  # of each block the inner and the outer width
        assert options["stem_width"] == own["base"]
        assert list(options["inner_widths"]) == [
            width for widths in stages for width in widths[::2]
        ]
        for outer, count, widths in zip(
            options["widths"], options["stage_sizes"], stages, strict=True
        ):
            assert widths[1::2] == [outer] * count
        assert list(options["widths"][1:]) == [own["l2s"], own["l3s"]]


def images():
    return GOLDEN["rounds/x"].transpose(0, 2, 3, 1)


def producers_of(group):
    """Roles of the kernels that compute the channels of a group, by path."""
    return {
        member.path: member.role
        for member in group.members
        if member.role in ("producer", "depthwise")
    }


def num_params_left(it, keep):
    shapes = groups.compact_shapes(it.channels, {name: keep[name] for name in it.shrinking})
    return sum(math.prod(leaf.shape) for path, leaf in shapes.items() if path.startswith("params/"))


def silenced(it, silent):
    """The variables with the norms of filters at zero, and so all that they give."""
    variables = jax.tree.map(np.copy, it.variables)
    for path, filters in zip(it.norms, silent, strict=True):
        norm = golden_data.leaf(variables["params"], path)
        norm["scale"][filters] = 0
        norm["bias"][filters] = 0
    return variables


@functools.cache
def importance(net, measure):
    """scores(variables) of the filters of each convolution, on the original's training batches."""
    it = original(net)
    inputs, labels = GOLDEN["rounds/train_x"], GOLDEN["rounds/train_y"]
    num_batches = -(-HYPER["imp_samples"] // labels.shape[1])
    data = (
        np.concatenate(inputs[:num_batches]).transpose(0, 2, 3, 1),
        np.concatenate(labels[:num_batches]),
    )

    def loss(params, batch, temperature):
        logits = it.apply(it.variables | params, batch[0])
        return losses.cross_entropy(logits, batch[1], temperature=temperature).mean()

    needs, size = scores.required(measure), labels.shape[1]
    collect = scores.gather(loss, needs, size, temperature=HYPER["T"], on_host=True)
    widths = [golden_data.leaf(it.variables, kernel).shape[-1] for kernel in it.kernels]
    filters = [
        Group((member(path, 3, width, "producer"),)) for path, width in zip(it.kernels, widths)
    ]
    score = jax.jit(lambda statistics: [scores.score(measure, statistics, own) for own in filters])
    return lambda variables: score(collect({"params": variables["params"]}, data))


@pytest.mark.parametrize(("net", "measure"), CASES)
def test_networks_after_the_rounds_of_the_original(net, measure):
    with jax.enable_x64(True):
        it = original(net)
        logits = it.apply(it.variables, images())
        assert_allclose(logits, GOLDEN[f"rounds/{net}/logits_before"], rtol=1e-8, atol=1e-11)
        keep = {name: np.ones(group.size, bool) for name, group in it.channels.groups.items()}
        silent = [
            np.zeros(golden_data.leaf(it.variables, kernel).shape[-1], bool)
            for kernel in it.kernels
        ]
        masked = it.variables
        for i in range(HYPER["rounds"]):
            prefix = f"rounds/{net}/{measure}/round{i}"
            if "g" in scores.required(measure):
                theirs = by_layer(GOLDEN[f"{prefix}/imp_order"]).values()
                for found, expected, gone in zip(
                    importance(net, measure)(masked), theirs, silent, strict=True
                ):
                    assert_allclose(found[~gone], expected, rtol=1e-8, atol=1e-11)
            for j, owner in enumerate(it.owners):
                present = ~silent[j] if owner in it.shrinking else np.ones(silent[j].size, bool)
                assert GOLDEN[f"{prefix}/orig_size"][j] == present.sum()
                gone = np.flatnonzero(present)[GOLDEN[f"{prefix}/pruned_idx/{j:02d}"]]
                silent[j][gone] = True
                if owner in it.shrinking:
                    keep[owner] &= ~silent[j]
            masked = it.mask(silenced(it, silent), {name: keep[name] for name in it.shrinking})
            logits = it.apply(masked, images())
            assert_allclose(logits, GOLDEN[f"{prefix}/logits_after"], rtol=1e-8, atol=1e-11)
            assert num_params_left(it, keep) == GOLDEN[f"{prefix}/n_params_after"]
