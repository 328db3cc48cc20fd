"""Growing regularisation: what is left after the removal, by the channels that we trace in the
original's network.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import groups, growing, models, ratios, trees

FILE = "08_growing_reg.npz"
GOLDEN = golden_data.load(FILE)
CASES = golden_data.parts(FILE, r"(?!structural/)(.+)/layer_names$")
PAIRS, CLASSIFIER = golden_data.growing_modules()


def network(variables, images):
    """The original's network in its layouts, with running statistics."""
    params, stats, x = variables["params"], variables["batch_stats"], images
    for (conv, norm), pool in zip(PAIRS, (jnp.max, jnp.mean), strict=True):
        dimensions = ("NCHW", "OIHW", "NCHW")
        x = jax.lax.conv_general_dilated(
            x, params[conv]["weight"], (1, 1), "SAME", dimension_numbers=dimensions
        )
        if "bias" in params[conv]:
            x = x + params[conv]["bias"][:, None, None]
        mean, var = stats[norm]["running_mean"], stats[norm]["running_var"]
        scale = params[norm]["weight"] * jax.lax.rsqrt(var + 1e-5)
        x = (x - mean[:, None, None]) * scale[:, None, None] + params[norm]["bias"][:, None, None]
        x = jax.nn.relu(x)
        batch, channels, height, width = x.shape
        x = pool(x.reshape(batch, channels, height // 2, 2, width // 2, 2), (3, 5))
    return x.reshape(len(x), -1) @ params[CLASSIFIER]["weight"].T + params[CLASSIFIER]["bias"]


def stored(case, moment):
    """The arrays of a moment as variables."""
    variables = {"params": {}, "batch_stats": {}}
    for name in golden_data.parts(FILE, rf"{case}/{moment}/(.+)"):
        module, _, leaf = name.rpartition(".")
        kind = "batch_stats" if leaf.startswith("running") else "params"
        variables[kind].setdefault(module, {})[leaf] = GOLDEN[f"{case}/{moment}/{name}"]
    return variables


def kept_channels(channels, paths, pruned, axis):
    """Which channels of each group the original keeps; pruned: its choice for the kernel of each
    path, along `axis`.
    """
    keep = {name: np.ones(group.size, bool) for name, group in channels.groups.items()}
    for path, removed in zip(paths, pruned, strict=True):
        for name, group in channels.groups.items():
            for member in group.members:
                if (member.path, member.axis) == (path, axis) and removed.size:
                    keep[name] &= ~np.isin(np.asarray(member.index), removed).any(1)
    return keep


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_the_originals(case):
    images = GOLDEN["data/x"][0]
    before = stored(case, "before_prune")
    for j, _ in enumerate(GOLDEN[f"{case}/layer_names"]):
        indices = [GOLDEN[f"{case}/{name}/{j}"] for name in ("pruned_idx", "kept_idx")]
        assert sorted(np.concatenate(indices)) == list(range(sum(map(len, indices))))
    with jax.enable_x64(True):
        variables = jax.tree.map(jnp.asarray, before)
        if golden_data.hyper(FILE)[case]["wg"] == "weight":
            logits = jax.jit(network)(variables, images)  # the original multiplies the masks later
        else:
            channels = groups.trace(network, variables, images)
            names = GOLDEN[f"{case}/layer_names"]
            axis = 0 if golden_data.hyper(FILE)[case]["wg"] == "filter" else 1
            pruned = [GOLDEN[f"{case}/pruned_idx/{j}"] for j, _ in enumerate(names)]
            keep = kept_channels(
                channels, [f"params/{name}/weight" for name in names], pruned, axis
            )
            compact = groups.compact(variables, channels, keep)
            expected = stored(case, "after_prune")["params"]
            for module, leaves in expected.items():
                for leaf, array in leaves.items():
                    assert_array_equal(
                        compact["params"][module][leaf], array, err_msg=f"{module}.{leaf}"
                    )
            logits = groups.elastic(network, channels, keep)(compact, images)
        assert_allclose(logits, GOLDEN[f"{case}/logits_after"], rtol=1e-9, atol=1e-11)


# Whole networks, whose weights follow a rule: selection by L1 norm and removal

WHOLE = golden_data.parts(FILE, r"structural/(\w+)/(\w+)/pr$")


class Whole(NamedTuple):
    """A network before the removal.

    paths: of its arrays in the original's order. layers: paths of its kernels; modules: their names
        in the file.
    """

    apply: Callable
    variables: dict
    channels: groups.Channels
    images: np.ndarray
    paths: list[str]
    layers: list[str]
    modules: list[str]


def parameter_names(layers, shapes):
    """Convolutions without bias, each followed by a norm, then the classifier with its bias."""
    *convolutions, classifier = map(str, layers)
    names = []
    for name in convolutions:
        before, number = re.fullmatch(r"(.*?)(\d+)", name).groups()
        norm = (
            f"{before}{int(number) + 1}"
            if before == "features."
            else f"{before.replace('conv', 'bn')}{number}"
        )
        names += [f"{name}.weight", f"{norm}.weight", f"{norm}.bias"]
    names += [f"{classifier}.weight", f"{classifier}.bias"]
    assert len(names) == len(shapes)
    return names


@functools.cache
def whole(net):
    key = f"structural/{net}/{dict(WHOLE)[net]}"
    shapes = golden_data.shapes_of(GOLDEN[f"{key}/param_shapes_before"])
    modules = GOLDEN[f"{key}/layer_names"].tolist()
    names = parameter_names(modules, shapes)
    batch, num_classes = GOLDEN[f"{key}/logits_before"].shape
    options = golden_data.architecture(names, shapes)
    side = golden_data.STRUCTURAL_SIDES[options["name"]]
    images = golden_data.images((batch, shapes[0][1], side, side))
    model = models.build(num_classes=num_classes, dtype="float64", param_dtype="float64", **options)
    variables = golden_data.variables(names, shapes)
    channels = groups.trace(model.apply, variables, images)
    paths = [f"params/{path}" for path in golden_data.paths(names, shapes).values()]
    layers = [path for path in paths if path.endswith("kernel")]
    return Whole(jax.jit(model.apply), variables, channels, images, paths, layers, modules)


def masked_by(variables, keep):
    """The variables without the entries that `keep`, by path, leaves out."""
    return trees.map_named(lambda path, leaf: leaf * keep.get(path, True), variables)


def notation_of(shares, layers):
    """The original's list of ratios: per stage in residual networks, per layer in others."""
    if any(len(layer.address) == 3 for layer in ratios.places(layers)):
        return tuple(shares)
    return f"[{', '.join(f'{i}:{share}' for i, share in enumerate(shares))}]"


def to_text(shape):
    """A shape of ours as the file writes it, in PyTorch's layout."""
    return "x".join(map(str, golden_data.to_torch(np.empty(shape)).shape))


@pytest.mark.parametrize(("net", "granularity"), WHOLE)
def test_whole_networks_after_the_removal(net, granularity):
    case = f"structural/{net}/{granularity}"
    own = golden_data.hyper(FILE)[case]
    numbers = sorted(golden_data.parts(FILE, rf"{case}/pruned_idx/(\d+)"))
    pruned = [GOLDEN[f"{case}/pruned_idx/{number}"] for number in numbers]
    with jax.enable_x64(True):
        it = whole(net)
        assert it.modules == GOLDEN[f"{case}/layer_names"].tolist()
        ours = [to_text(golden_data.leaf(it.variables, path).shape) for path in it.paths]
        assert ours == GOLDEN[f"{case}/param_shapes_before"].tolist()
        logits = it.apply(it.variables, it.images)
        assert_allclose(logits, GOLDEN[f"{case}/logits_before"], rtol=1e-9, atol=1e-11)
        options = dict(granularity=granularity, skip=own["skip_layers"], reading="original")
        table = ratios.parse(notation_of(own["stage_pr"], it.layers), it.layers, **options)
        assert_array_equal(list(table.values()), GOLDEN[f"{case}/pr"])
        picked = growing.pick(it.variables, growing.layers(it.variables, table, granularity))
        for path, removed in zip(it.layers, pruned, strict=True):
            kept = np.asarray(picked.get(path, True))
            found = golden_data.to_torch(kept) if kept.ndim > 1 else kept
            assert set(np.flatnonzero(~found)) == set(removed)
        if granularity == "weight":
            logits = it.apply(masked_by(it.variables, picked), it.images)
        else:
            axis = 3 if granularity == "filter" else 2
            keep = kept_channels(it.channels, it.layers, pruned, axis)
            shapes = groups.compact_shapes(it.channels, keep)
            found = [to_text(shapes[path].shape) for path in it.paths]
            assert found == GOLDEN[f"{case}/param_shapes_after"].tolist()
            compact = groups.compact(it.variables, it.channels, keep)
            logits = jax.jit(groups.elastic(it.apply, it.channels, keep))(compact, it.images)
        assert_allclose(logits, GOLDEN[f"{case}/logits_after"], rtol=1e-9, atol=1e-11)
