"""PyTorch's weights: the originals' numbers through real files, every tensor accounted for, and the
way back.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import pickle
import random
import re
import sys
import types
import zipfile
from typing import NamedTuple

import golden_data
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from test_models import ORIGINALS, TINY, created

from sparsity_jax import evaluate, masks, models, pipeline, pretrained, report, tables, train, trees

KEY = jax.random.key(0)


def filled(like, seed=0):
    """Random arrays of the shapes of `like`."""
    rng = default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)


@functools.cache
def shapes_of(name, num_classes=5, side=0, **options):
    tiny_options, tiny_side = TINY[name]
    images = jax.ShapeDtypeStruct((1, *(side or tiny_side,) * 2, 3), jnp.float32)
    model = models.build(name=name, num_classes=num_classes, **(options or tiny_options))
    return jax.eval_shape(model.init, KEY, images)


def same(first, second):
    """Equal in every bit, names and types too."""
    first, second = trees.named_leaves(first), trees.named_leaves(second)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert (leaf.dtype, leaf.shape) == (second[path].dtype, second[path].shape)
        assert np.asarray(leaf).tobytes() == np.asarray(second[path]).tobytes()


def without_counters(state_dict):
    return {
        name: array
        for name, array in state_dict.items()
        if not name.endswith("num_batches_tracked")
    }


# PyTorch's numbers


# Of a ResNet with a projection in its first block, or of a MobileNet V2
TORCHVISIONS_NAME = r"(net\.)?(layer1\.0\.downsample\.0|features\.1\.conv\.0\.0)\.weight"
TORCHVISION = [
    key
    for key, net in ORIGINALS.items()
    if any(re.fullmatch(TORCHVISIONS_NAME, name) for name in net["param_names"])
]


@pytest.mark.parametrize("key", TORCHVISION)
def test_logits_of_the_original_through_a_file(key, tmp_path):
    net, expected = ORIGINALS[key], golden_data.load("11_models.npz")[f"{key}/logits"]
    state_dict = golden_data.state_dict(net["param_names"], net["param_shapes"])
    state_dict = {
        name: array.astype(np.float32 if array.ndim else np.int64)
        for name, array in state_dict.items()
    }
    path = pretrained.write(tmp_path / "net.safetensors", state_dict)
    same(pretrained.read(path), state_dict)
    model = models.build(**golden_data.network_options(key))
    images = golden_data.images(net["input_shape"]).astype(np.float32)
    like = jax.eval_shape(model.init, KEY, images)
    variables = pretrained.to_variables(pretrained.read(path), like)
    logits = jax.jit(model.apply)(variables, images)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    names = pretrained.name_map({name: array.shape for name, array in state_dict.items()}, like)
    back = pretrained.to_torch(variables, names)
    assert back.keys() == state_dict.keys()
    same(without_counters(back), without_counters(state_dict))
    torchvision = pretrained.to_torch(
        variables
    )  # its own names, in which the original is wrapped or not
    assert torchvision.keys() == {name.removeprefix("net.") for name in state_dict}
    same(pretrained.to_variables(torchvision, like), variables)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_model_comes_back(name):
    _, like, _ = created(name)
    variables = filled(like)
    state_dict = pretrained.to_torch(variables)
    assert len(without_counters(state_dict)) == len(jax.tree.leaves(like))
    assert sum(name.endswith("num_batches_tracked") for name in state_dict) == str(like).count(
        "'mean'"
    )
    same(pretrained.to_variables(state_dict, like), variables)
    wrapped = {f"module.{name}": array for name, array in state_dict.items()}
    same(pretrained.to_variables(wrapped, like), variables)


def test_layouts():
    like = shapes_of("lenet5")
    state_dict = pretrained.to_torch(filled(like))
    assert {
        name: state_dict[name].shape for name in ("conv2.weight", "dense1.weight", "fc.bias")
    } == {
        "conv2.weight": (4, 3, 5, 5),
        "dense1.weight": (6, 5),
        "fc.bias": (5,),
    }
    like = {"params": {"conv1": {"kernel": np.zeros((2, 3, 1, 1))}}}
    kernel = np.arange(6.0).reshape(1, 1, 2, 3)
    variables = pretrained.to_variables({"conv1.weight": kernel}, like)
    assert_array_equal(variables["params"]["conv1"]["kernel"][..., 0, 0], kernel[0, 0])


def test_flattened_images():
    """PyTorch flattens channels, rows, columns; here channels come last."""
    model = models.build(name="mlp", num_classes=5, widths=(4,))
    images = default_rng(0).normal(size=(2, 3, 2, 6)).astype(np.float32)  # NHWC with 6 channels
    like = jax.eval_shape(model.init, KEY, images)
    state_dict = pretrained.to_torch(filled(like))
    variables = pretrained.to_variables(state_dict, like, image_channels=6)
    flat = images.transpose(0, 3, 1, 2).reshape(2, -1)
    hidden = np.maximum(flat @ state_dict["dense1.weight"].T + state_dict["dense1.bias"], 0)
    expected = hidden @ state_dict["fc.weight"].T + state_dict["fc.bias"]
    assert_allclose(model.apply(variables, images), expected, rtol=1e-5, atol=1e-5)
    same(pretrained.to_torch(variables, image_channels=6), state_dict)


# Names


def timm_names():
    """timm's names of MobileNet V2's convolutions and batch norms, and ours."""
    found = {
        "conv_stem": "conv1",
        "bn1": "bn1",
        "conv_head": "conv2",
        "bn2": "bn2",
        "classifier": "fc",
    }
    block = 0
    for stage, repeats in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for repeat in range(repeats):
            theirs = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
            ours = ("depthwise", "project") if stage == 0 else ("expand", "depthwise", "project")
            for i, (one, other) in enumerate(zip(theirs, ours, strict=True), 1):
                found[f"blocks.{stage}.{repeat}.{one}"] = f"block{block}/{other}"
                found[f"blocks.{stage}.{repeat}.bn{i}"] = f"block{block}/bn{i}"
            block += 1
    return found


def test_names_of_timm():
    model = models.build(name="mobilenet_v2", num_classes=1000, multiplier=0.1)
    like = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    variables, theirs = filled(like), {ours: name for name, ours in timm_names().items()}
    rename = lambda name, path: (
        f"{theirs[path.split('/', 1)[1].rpartition('/')[0]]}.{name.rpartition('.')[2]}"
    )
    names = {rename(name, path): path for name, path in pretrained.torch_names(like).items()}
    assert len(names) == len(jax.tree.leaves(like))
    state_dict = pretrained.to_torch(variables, names)
    assert (
        pretrained.name_map({name: array.shape for name, array in state_dict.items()}, like)
        == names
    )
    same(pretrained.to_variables(state_dict, like), variables)


def test_names_of_a_network_of_ones_own():
    like = {
        "layers": [{"w": np.zeros((2, 3)), "b": np.zeros(2)}],
        "head": {"kernel": np.zeros((2, 4)), "pos": np.zeros(1)},
    }
    state_dict = {
        "encoder.0.weight": np.arange(6.0).reshape(2, 3),
        "encoder.0.bias": np.ones(2),
        "out.weight": np.arange(8.0).reshape(4, 2),
        "pos": np.ones(1),
    }
    names = ((r"encoder\.(\d+)\.weight", r"layers/\1/w"), (r"encoder\.(\d+)\.bias", r"layers/\1/b"))
    names += ((r"out\.weight", "head/kernel"), (r"pos", "head/pos"))
    found = pretrained.to_variables(state_dict, like, names=names)
    assert_array_equal(found["layers"][0]["w"], state_dict["encoder.0.weight"])  # no kernel of Flax
    assert_array_equal(found["head"]["kernel"], state_dict["out.weight"].T)
    placed = pretrained.name_map(
        {name: array.shape for name, array in state_dict.items()}, like, names
    )
    same(pretrained.to_torch(found, placed), state_dict)
    with pytest.raises(
        ValueError, match=r"names leave out .* Without `names`, give whole variables"
    ):
        pretrained.to_torch(filled(resnet()[0])["params"])
    with pytest.raises(ValueError, match=r"names leave out head/pos; 1 of 4 arrays"):
        pretrained.to_torch(found, {name: path for name, path in placed.items() if name != "pos"})
    with tiny.complains(r"'pos' is to become 'head/poss', which .* Did you mean 'head/pos'"):
        pretrained.to_variables(state_dict, like, names=(*names[:3], ("pos", "head/poss")))


# Equally shaped layers


class Network(NamedTuple):
    """A random network: shape structs of ours, and a state dict with the path of each of its
    weights, in order.
    """

    like: dict
    state_dict: dict
    weights: dict


WORDS = ("stem", "inner", "mid", "tail", "alpha", "omega", "encode", "middle", "proj", "zeta")
SCHEMES = {
    "numbers": lambda i, words: f"fc{i}",
    "sequence": lambda i, words: f"net.{3 * i}",
    "nested": lambda i, words: f"stages.{i // 2}.{i % 2}.layer",
    "words": lambda i, words: words[i],
    "words and numbers": lambda i, words: words[0] if i == 0 else f"hidden{i}",
    "ours": lambda i, words: f"dense{i}",
}


def random_network(widths, scheme, words, conv):
    """Dense layers, or convolutions with batch norms, of `widths`, and `fc`, by names of the
    scheme.
    """
    rng = default_rng(0)
    like, state_dict, weights = {}, {}, {}
    kind, extent = ("conv", (3, 3)) if conv else ("dense", ())
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        ours = f"{kind}{i + 1}" if i + 2 < len(widths) else "fc"
        if ours == "fc":
            extent = ()
        theirs = SCHEMES[scheme](i, words)
        layers = {ours: dict(kernel=(*extent, before, after), bias=(after,))}
        if conv and ours != "fc":
            layers[f"bn{i + 1}"] = dict(scale=(after,), bias=(after,))
        for name, shapes in layers.items():
            module = f"{theirs}.norm" if name.startswith("bn") else theirs
            like[name] = {
                leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in shapes.items()
            }
            for leaf, shape in shapes.items():
                torch_leaf = "bias" if leaf == "bias" else "weight"
                torch_shape = (*shape[:-3:-1], *shape[:-2])
                array = rng.normal(size=torch_shape).astype(np.float32)
                state_dict[f"{module}.{torch_leaf}"] = array
                weights[f"{module}.{torch_leaf}"] = f"params/{name}/{leaf}"
    return Network({"params": like}, state_dict, weights)


def permuted(network, state_dict):
    """Whether the weights load, but at other places than their own; None if they are refused."""
    try:
        found = pretrained.to_variables(state_dict, network.like)
    except tables.ConfigError as error:
        if "which layers are which" in str(error) and "names=((" in str(error):
            return None
        raise
    leaves = trees.named_leaves(found)
    for name, path in network.weights.items():
        expected = network.state_dict[name]
        expected = (
            expected.transpose(*range(2, expected.ndim), 1, 0) if expected.ndim > 1 else expected
        )
        if not np.array_equal(leaves[path], expected):
            return True
    return False


networks = st.tuples(
    st.lists(st.sampled_from((3, 4)), min_size=2, max_size=6),
    st.sampled_from(sorted(SCHEMES)),
    st.permutations(WORDS),
    st.booleans(),
)


@hypothesis.given(networks, st.randoms(use_true_random=False))
@hypothesis.settings(max_examples=150)
def test_equally_shaped_layers_are_never_permuted(arguments, rng):
    network = random_network(*arguments)
    assert permuted(network, network.state_dict) is False  # in the order of the layers
    items = sorted(network.state_dict.items())
    rng.shuffle(items)
    scheme = arguments[1]
    found = permuted(network, dict(sorted(items)))
    assert not found
    shapes = [array.shape for array in network.state_dict.values() if array.ndim > 1]
    if scheme not in ("words", "words and numbers") or len(set(shapes)) == len(shapes) == 1:
        assert found is False
    names = [name for name, _ in items]
    biases = [name for name in names if name.endswith(".bias")]
    if any(name.replace(".bias", ".weight") in names[names.index(name) :] for name in biases):
        # no layer was defined like that
        assert not permuted(network, dict(items))


@hypothesis.given(st.integers(2, 5), st.randoms(use_true_random=False))
def test_numbers_against_the_order_are_refused_or_idle(count, rng):
    """Definition order is right, whatever the numbers in the names are."""
    network = random_network((3,) * (count + 1), "numbers", WORDS, False)
    numbers = list(range(count))
    rng.shuffle(numbers)
    rename = lambda name: re.sub(r"\d+", lambda match: str(numbers[int(match[0])]), name)
    state_dict = {rename(name): array for name, array in network.state_dict.items()}
    weights = {rename(name): path for name, path in network.weights.items()}
    found = permuted(Network(network.like, state_dict, weights), state_dict)
    assert not found
    assert (found is None) == (numbers != sorted(numbers))


def test_a_shortcut_defined_first_is_told_by_its_names_or_refused():
    """All batch norms of a block are of one shape; a network may define the shortcut before or
    after the others.
    """
    like = shapes_of("resnet", stage_sizes=(1, 1), widths=(4, 8))
    state_dict = pretrained.to_torch(filled(like))
    names = sorted(state_dict, key=lambda name: "downsample" not in name)
    moved = {name: state_dict[name] for name in names}
    same(pretrained.to_variables(moved, like), pretrained.to_variables(state_dict, like))
    unknown = {
        name.replace("downsample", "skip").replace("layer", "part"): moved[name] for name in names
    }
    with tiny.complains(r"part2\.0\.skip\.1\.weight.*neither an order nor"):
        pretrained.to_variables(unknown, like)


def test_names_lead_out():
    network = random_network((3, 3, 3, 3), "words", WORDS, False)
    shuffled = dict(sorted(network.state_dict.items()))
    assert permuted(network, shuffled) is None
    names = (("stem.weight", "params/dense1/kernel"), ("inner.weight", "params/dense2/kernel"))
    found = pretrained.to_variables(shuffled, network.like, names=names)
    expected = pretrained.to_variables(network.state_dict, network.like)
    same(found, expected)


def test_a_fresh_classifier_is_told_from_equal_layers():
    network = random_network((3, 3, 3, 3), "words", WORDS, False)
    like = {"params": {**network.like["params"], "fc": filled(network.like["params"]["fc"])}}
    like["params"]["fc"]["kernel"] = np.zeros((3, 2), np.float32)
    like["params"]["fc"]["bias"] = np.zeros(2, np.float32)
    found = pretrained.to_variables(network.state_dict, like, fresh=pretrained.CLASSIFIER)
    assert_array_equal(found["params"]["dense2"]["kernel"], network.state_dict["inner.weight"].T)
    assert found["params"]["fc"]["kernel"].shape == (3, 2)
    shuffled = dict(sorted(network.state_dict.items()))
    with tiny.complains("which layers are which"):
        pretrained.to_variables(shuffled, like, fresh=pretrained.CLASSIFIER)


# Whatever does not fit


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "module._orig_mod.", "net.features."])
def test_one_foreign_tensor_is_named_alone(prefix):
    like, state_dict = resnet()
    wrapped = {prefix + name: array for name, array in state_dict.items()}
    same(pretrained.to_variables(wrapped, like), pretrained.to_variables(state_dict, like))
    with tiny.complains(r"32 of 32 arrays do\.\n  unexpected: n_averaged \(\)\.$"):
        pretrained.to_variables({"n_averaged": np.array(5), **wrapped}, like)
    averaged = {"ema." + name: array for name, array in state_dict.items()}
    with tiny.complains(r"averaged weights"):
        pretrained.to_variables({**wrapped, **averaged}, like)


def test_pruned_weights():
    """As torch.nn.utils.prune saves them: the weight behind the bias, its mask among the
    buffers.
    """
    network = random_network((3, 3, 3), "words", WORDS, False)
    mask = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 1]], np.float32)
    saved, expected = {}, {}
    for name, array in network.state_dict.items():
        if name.endswith("bias"):
            weight = name.replace("bias", "weight")
            saved |= {
                name: array,
                f"{weight}_orig": network.state_dict[weight],
                f"{weight}_mask": mask,
            }
            expected[weight] = network.state_dict[weight] * mask
    found = pretrained.to_variables(saved, network.like)
    for layer, name in (("dense1", "stem"), ("fc", "inner")):
        assert_array_equal(found["params"][layer]["kernel"], expected[f"{name}.weight"].T)
        kept = masks.nonzero(found["params"])
        assert_array_equal(kept[layer]["kernel"], mask.T == 1)
        assert kept[layer]["bias"].all()
    with tiny.complains(r"stem\.weight_mask is no mask"):
        pretrained.to_variables({**saved, "stem.weight_mask": mask / 2}, network.like)
    normed = {name.replace("weight_orig", "weight_g"): array for name, array in saved.items()}
    with tiny.complains(r"prune\.remove"):
        pretrained.to_variables(normed, network.like)


WEIGHTLESS = {
    "complex": np.ones((3, 3), np.complex64),
    "int8": np.ones((3, 3), np.int8),
    "int64": np.ones((3, 3), np.int64),
    "bool": np.ones((3, 3), bool),
    "float8": np.ones((3, 3), jnp.float8_e4m3fn),
    "NaN": np.array([[1, 2, np.nan]] * 3, np.float32),
    "infinite": np.array([[1, 2, -np.inf]] * 3, jnp.bfloat16),
    "beyond": np.array([[1, 2, 1e39]] * 3),
    "object": np.array([[1, 2, None]] * 3),
    "text": np.array([["a", "b", "c"]] * 3),
}


@pytest.mark.parametrize("case", sorted(WEIGHTLESS))
@pytest.mark.parametrize("name", ["stem.weight", "inner.weight"])
def test_what_is_no_weight_is_refused(case, name):
    network = random_network((3, 3, 3), "words", WORDS, False)
    state_dict = {**network.state_dict, name: WEIGHTLESS[case]}
    with tiny.complains(rf"3 of 4 arrays do\.\n  no weights: {name} "):
        pretrained.to_variables(state_dict, network.like)
    if name == "inner.weight":  # a fresh classifier needs none
        pretrained.to_variables(state_dict, filled(network.like), fresh=pretrained.CLASSIFIER)


def test_values_beyond_half_precision_are_refused():
    like = {"params": {"bn1": {"scale": jax.ShapeDtypeStruct((2,), jnp.float16)}}}
    with tiny.complains(r"bn1\.weight holds .* beyond float16"):
        pretrained.to_variables({"bn1.weight": np.array([1.0, 7e4])}, like)


def resnet(num_classes=5, **options):
    like = shapes_of(
        "resnet", num_classes=num_classes, stage_sizes=(1, 1), widths=(4, 6), **options
    )
    return like, pretrained.to_torch(filled(like))


def test_what_does_not_fit_is_named():
    like, state_dict = resnet()
    del state_dict["layer2.0.conv1.weight"]
    state_dict["layer3.0.conv1.weight"] = np.zeros((6, 6, 3, 3))
    state_dict["num_batches_tracked"] = np.zeros(())
    state_dict["layer1.0.bn1.bias"] = np.zeros(9)
    with pytest.raises(tables.ConfigError) as raised:
        pretrained.to_variables(state_dict, like)
    assert raised.value.why.splitlines()[1:] == [
        "  missing: params/stage2_block0/conv1/kernel (3, 3, 4, 6)",
        "  unexpected: layer3.0.conv1.weight (6, 6, 3, 3); num_batches_tracked ()",
        "  wrong: layer1.0.bn1.bias is (9,), for params/stage1_block0/bn1/bias it must be (4,)",
    ]


def test_hints():
    like, _ = resnet()
    with tiny.complains(r"fc.weight is \(7, 6\), for .* it must be \(5, 6\).*\n.*other classes"):
        pretrained.to_variables(resnet(num_classes=7)[1], like)
    with tiny.complains(r"conv1.weight is \(4, 3, 7, 7\).*\n.* config.model.stem may be"):
        pretrained.to_variables(resnet(stem="imagenet")[1], like)
    with tiny.complains(r"missing: .*, and 28 more"):
        pretrained.to_variables({}, like)


def test_fresh_classifier():
    like, state_dict = resnet()
    kept = filled(like, seed=1)
    other = resnet(num_classes=7)[1]
    for given in (
        other,
        {name: array for name, array in other.items() if not name.startswith("fc.")},
    ):
        found = pretrained.to_variables(given, kept, fresh=pretrained.CLASSIFIER)
        same(found["params"]["fc"], kept["params"]["fc"])
        assert_array_equal(found["params"]["bn1"]["bias"], other["bn1.bias"])
    assert state_dict.keys() == other.keys()
    with tiny.complains("fresh is 'fcc', which matches no parameter"):
        pretrained.to_variables(state_dict, like, fresh="fcc")


def test_two_tensors_for_one_place():
    like, state_dict = resnet()
    state_dict["layer2.0.shortcut.0.weight"] = state_dict["layer2.0.downsample.0.weight"]
    with tiny.complains(r"unexpected: layer2\.0\.shortcut\.0\.weight"):
        pretrained.to_variables(state_dict, like)


# Files


def test_types_survive(tmp_path):
    arrays = {
        "half": np.arange(3, dtype=np.float16),
        "brain": np.arange(3).astype(jnp.bfloat16),
        "turned": np.arange(6.0).reshape(2, 3).T,
        "number": np.asarray(3),
        "flag": np.array([True, False]),
    }
    same(pretrained.read(pretrained.write(tmp_path / "new" / "all.safetensors", arrays)), arrays)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["all.safetensors"]
    like = {"params": {"bn1": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
    found = pretrained.to_variables({"bn1.weight": arrays["brain"]}, like)["params"]["bn1"]["scale"]
    assert found.dtype == np.float32
    assert_array_equal(found, [0, 1, 2])


def test_files_cut_short_or_foreign(tmp_path):
    path = pretrained.write(tmp_path / "net.safetensors", {"a": np.arange(100.0), "b": np.ones(3)})
    whole = path.read_bytes()
    foreign = (
        b"<!DOCTYPE html><html>not found</html>",
        b"PK\x03\x04" + bytes(100),
        b"",
        b"\xff" * 8 + whole,
    )
    for content in (*(whole[:n] for n in (4, 8, 60, len(whole) - 1)), *foreign):
        path.write_bytes(content)
        with tiny.complains("no whole safetensors file") as raised:
            pretrained.read(path)
        assert raised.value.value == str(path)
    path.write_bytes(safetensors.serialize({}))
    assert pretrained.read(path) == {}
    with tiny.complains(r"no such file"):
        pretrained.read(tmp_path / "absent.safetensors")
    for act, file in ((pretrained.read, "net.h5"), (pretrained.write, "net.pth")):
        with pytest.raises(tables.ConfigError) as raised:
            act(tmp_path / file, *[{}] * (act is pretrained.write))
        assert ".safetensors" in raised.value.allowed


def safetensors_of(shape, offsets, content=bytes(4)):
    header = json.dumps(
        {"fc.weight": dict(dtype="F32", shape=shape, data_offsets=offsets)}
    ).encode()
    return len(header).to_bytes(8, "little") + header + content


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([10**12], [0, 4]),
        ([10**12], [0, 4 * 10**12]),
        ([10**30], [0, 4]),
        ([2**62, 4], [0, 4]),
        ([-1], [0, 4]),
        ([1] * 99, [0, 4]),
        ([0, 10**18, 10**18], [0, 0]),
        ([0, 10**12], [0, 0]),
    ],
)
def test_absurd_shapes_in_a_file_are_refused(shape, offsets, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors_of(shape, offsets, bytes(4 if offsets[1] else 0)))
    like = {"params": {"fc": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}}
    with tiny.complains(r"net\.safetensors|fc\.weight is \(0, 10+\), for .* must be \(2, 3\)"):
        pretrained.to_variables(pretrained.read(path), like)


def test_files_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    path = pretrained.write(tmp_path / "net.safetensors", {"a": np.ones(3)})
    monkeypatch.setattr(tables, "host_memory", lambda: 50.0)
    with tiny.refused("", str(path)):
        pretrained.check(path)


def test_absurd_shapes_in_memory_are_refused_unread():
    """PyTorch's and NumPy's views may stand for any shape with one number."""
    network = random_network((3, 3, 3), "words", WORDS, False)
    state_dict = {
        **network.state_dict,
        "stem.weight": np.broadcast_to(np.float32(1), (10**8, 10**8)),
    }
    with tiny.complains(r"stem\.weight is \(10+, 10+\), for .* must be \(3, 3\)"):
        pretrained.to_variables(state_dict, network.like)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = pretrained.write(tmp_path / "net.safetensors", {"a": np.ones(3)})
    with pytest.raises(Exception, match="object"):
        pretrained.write(path, {"a": np.array([object()])})
    same(pretrained.read(path), {"a": np.ones(3)})
    assert list(tmp_path.iterdir()) == [path]


class Tensor:
    """As much of PyTorch's tensor as reading needs."""

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize

    def detach(self):
        return self

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def numpy(self, *, force):
        if not force or self.dtype != "torch.float32":
            raise TypeError(f"Got unsupported ScalarType {self.dtype}.")
        return self.array


def test_files_of_pytorch(tmp_path, monkeypatch):
    path, content = tmp_path / "net.pth", {}
    path.write_bytes(b"written by torch.save")

    def load(path, *, map_location, weights_only):
        assert (map_location, weights_only) == ("cpu", True)
        if isinstance(content["it"], Exception):
            raise content["it"]
        return content["it"]

    fake = types.SimpleNamespace(Tensor=Tensor, load=load)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    brain = np.arange(3).astype(jnp.bfloat16)
    arrays = {"module.w": np.arange(4.0), "module.b": brain}
    tensors = {"module.w": Tensor(arrays["module.w"]), "module.b": Tensor(brain, "torch.bfloat16")}
    for content["it"] in (tensors, {"epoch": 3, "state_dict": tensors}, {"model": tensors}):
        same(pretrained.read(path), arrays)
    for content["it"], reason in (
        (RuntimeError("PytorchStreamReader failed.\nmany lines"), "PytorchStreamReader failed"),
        (EOFError(), "it ends too early"),
        (pickle.UnpicklingError("Weights only load failed."), "other objects than tensors"),
        (
            pickle.UnpicklingError("Unsupported global: GLOBAL argparse.Namespace was"),
            "argparse.Namespace",
        ),
    ):
        with tiny.complains(rf"net\.pth cannot be read .*{reason}"):
            pretrained.read(path)
    itself = {}
    itself["model"] = itself
    for content["it"], shown in (
        ({"epoch": 3}, "'epoch'"),
        ([1], "list"),
        ({0: tensors["module.w"]}, "0, of type"),
        ({"w": Tensor(np.zeros(2), "torch.float8_e4m3fn")}, r"w is no plain array \(torch\.float8"),
        (
            {"w": Tensor(np.broadcast_to(np.float32(0), 10**15))},
            r"w has the shape \(10+,\) and takes 4,000,000\.0 GB; allo",
        ),
        (itself, "dict"),
    ):
        with tiny.complains(shown):
            pretrained.read(path)
    content["it"] = {"model": tensors, "model_ema": {"module.w": Tensor(arrays["module.w"] + 1)}}
    assert pretrained.read(path).keys() == arrays.keys()
    same(pretrained.read(path, key="model_ema"), {"module.w": arrays["module.w"] + 1})
    with pytest.raises(tables.ConfigError) as raised:
        pretrained.read(path, key="emma")
    assert raised.value.allowed == "model, model_ema"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with tiny.complains(r"`pip install torch`, or convert it to .safetensors"):
        pretrained.read(path)


@pytest.fixture(scope="module")
def torch():
    """PyTorch, from the environment or from the folder TORCH_PATH."""
    sys.path.append(os.environ.get("TORCH_PATH", ""))
    try:
        return pytest.importorskip("torch", reason="needs PyTorch (install it, or set TORCH_PATH)")
    finally:
        sys.path.pop()


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of sparse and quantized tensors
def test_odd_tensors_of_pytorch(torch, tmp_path):
    path, plain = tmp_path / "net.pth", torch.arange(6.0).reshape(2, 3)
    expected = plain.numpy()
    for tensor, found in (
        (torch._neg_view(plain), -expected),
        (plain.t(), expected.T),
        (torch.nn.Parameter(plain), expected),
        (torch._neg_view(plain.to(torch.bfloat16)), (-expected).astype(jnp.bfloat16)),
    ):
        torch.save({"state_dict": {"w": tensor}, "epoch": 3}, path)
        same(pretrained.read(path), {"w": found})
    for tensor in (
        plain.to(torch.float8_e4m3fn),
        plain.to_sparse(),
        torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        torch.empty(2, device="meta"),
    ):
        torch.save({"w": tensor}, path)
        with tiny.complains(r"net\.pth: w is no plain array"):
            pretrained.read(path)
    torch.save({"state_dict": {"w": plain}, "args": argparse.Namespace(lr=0.1)}, path)
    with tiny.complains(r"argparse\.Namespace"):
        pretrained.read(path)


def test_absurd_shapes_in_a_file_of_pytorch_are_refused(torch, tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"w": torch.zeros(1).expand(10**15)}, path)
    with tiny.complains(r"net\.pth: w has the shape \(10+,\) and takes 4,000,000\.0 GB"):
        pretrained.read(path)
    torch.save({"w": torch.zeros(10**4)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    count, claimed = pickle.dumps(10**4, 2)[2:-1], pickle.dumps(10**12, 2)[2:-1]
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(
                name, record.replace(count, claimed) if name.endswith("data.pkl") else record
            )
    with tiny.complains(r"net\.pth cannot be read as weights alone: .*size"):
        pretrained.read(path)


def test_pruned_network_of_pytorch(torch):
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))
    images = torch.randn(4, 3)
    prune = importlib.import_module("torch.nn.utils.prune")
    for layer in (network[0], network[2]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    like = random_network((3, 3, 3), "sequence", WORDS, False).like
    found = pretrained.to_variables(network.state_dict(), like)
    model = models.build(name="mlp", num_classes=3, widths=(3,))
    logits = model.apply(found, images.numpy())
    assert_allclose(logits, network(images).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert np.mean(found["params"]["dense1"]["kernel"] == 0) == pytest.approx(4 / 9)


def damaged(whole, random):
    """Copies of a file that are cut short or have flipped bits."""
    for i in range(60):
        content = bytearray(whole)
        if i % 3 == 0:
            del content[random.randrange(len(content)) :]
        for _ in range((0, 1, 8)[i % 3]):
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        yield bytes(content)


def test_damaged_files_of_pytorch_are_refused_or_right(torch, tmp_path):
    path, outcomes = tmp_path / "net.pth", []
    torch.save({"state_dict": {f"layer{i}.weight": torch.randn(3, 3) for i in range(3)}}, path)
    right = pretrained.read(path)
    for content in damaged(path.read_bytes(), random.Random(0)):
        path.write_bytes(content)
        try:
            same(pretrained.read(path), right)
            outcomes.append("right")
        except tables.ConfigError:
            outcomes.append("refused")
    assert 40 <= outcomes.count("refused") < len(outcomes) == 60


def test_damaged_safetensors_are_refused_or_have_the_same_layout(tmp_path):
    """Safetensors has no checksum: flipped bits of the values themselves cannot be seen, but all of
    the header are.
    """
    arrays = {"layer1.weight": np.ones((2, 3), np.float32), "layer2.weight": np.ones(3, np.float32)}
    path, outcomes = pretrained.write(tmp_path / "net.safetensors", arrays), []
    for content in damaged(path.read_bytes(), random.Random(0)):
        path.write_bytes(content)
        try:
            found = pretrained.read(path)
        except tables.ConfigError:
            outcomes.append("refused")
            continue
        outcomes.append("read")
        assert sum(array.nbytes for array in found.values()) == 36
    assert outcomes.count("refused") >= 20


# Runs


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(file, variables) of a trained network for the digits, the file of PyTorch's names and
    layouts.
    """
    problem = tiny.problem()
    state, _ = tiny.trained(problem, tiny.fit())
    variables = {"params": jax.device_get(state.params), "batch_stats": {}}
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    return str(pretrained.write(path, pretrained.to_torch(variables))), variables


STILL = pipeline.stage(
    "train", epochs=1, batch_size=32, optimizer=dict(tiny.SGD, learning_rate=0.0), start="init"
)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_runs_start_from_the_file(weights, mode, tmp_path):
    path, variables = weights
    sweep = dict(seed=(0, 1), mode=mode)
    config = tiny.config("cut", "curve", "still", still=STILL, pretrained=path, sweep=sweep)
    outcome = pipeline.run(config, tmp_path / "run")
    params = jax.tree.map(lambda leaf: leaf[1] if mode == "vmap" else leaf, outcome.state.params)
    same(jax.device_get(params), variables["params"])  # `still` started over from the file
    saved = evaluate.open_run(tmp_path / "run")
    assert len(saved.networks) == 2
    (file, *others) = evaluate.export_torch(saved, tmp_path / "out.safetensors")
    assert [other.name for other in others] == ["out_001.safetensors"]
    same(pretrained.read(file), pretrained.read(path))
    with tiny.complains("name a new file"):
        evaluate.export_torch(saved, tmp_path / "out.safetensors")
    again = pipeline.run(
        tiny.config("curve", start_from=str(tmp_path / "run"), sweep=sweep), tmp_path / "again"
    )
    # `still` took the masks off with the cut weights: the curve has all ratios again
    assert [row["ratio"] for row in again.rows if row["member"] == 0] == [0.0, 0.5, 0.9]


@pytest.mark.parametrize("zeros", ["keep", "train"])
def test_zeros_of_the_file(weights, zeros, tmp_path, capsys):
    arrays = pretrained.read(weights[0])
    kernel = arrays["dense1.weight"]
    arrays["dense1.weight"] = np.where(np.arange(kernel.size).reshape(kernel.shape) % 3, kernel, 0)
    path = pretrained.write(tmp_path / "zeros.safetensors", arrays)
    fields = dict(pretrained=str(path), pretrained_zeros=zeros)
    outcome = pipeline.run(tiny.config("fit", **fields), tmp_path / "run")
    left = np.sum(np.asarray(outcome.state.params["dense1"]["kernel"]) == 0)
    assert left >= 342 if zeros == "keep" else left < 342
    assert np.sum(~np.asarray(outcome.state.masks["dense1"]["kernel"])) == (
        342 if zeros == "keep" else 0
    )
    environment = report.read_environment(tmp_path / "run")
    assert "342 of 1,184" in environment["pretrained"]
    assert "342 of 1,184" in capsys.readouterr().err


def test_accuracy_of_the_file(weights, tmp_path):
    path, variables = weights
    problem = tiny.problem()
    _, expected = train.evaluate(problem, variables["params"], {}, "test")
    rows = pipeline.run(tiny.config("curve", pretrained=path), tmp_path).rows
    assert rows[0]["ratio"] == 0
    assert rows[0]["accuracy"] == pytest.approx(float(expected))


def test_states_do_not_share_memory_with_the_file(weights):
    """Training on an accelerator donates the state."""
    _, variables = weights
    arrays = {path: jnp.asarray(leaf) for path, leaf in trees.named_leaves(variables).items()}
    problem = tiny.problem()._replace(pretrained=arrays)
    create = jax.jit(lambda key, arrays: train.create_state(problem, key, arrays))
    state = create(train.key_of(0), problem.pretrained)
    for path, leaf in trees.named_leaves({"params": state.params}).items():
        assert_array_equal(leaf, arrays[path])
        assert leaf.unsafe_buffer_pointer() != arrays[path].unsafe_buffer_pointer()


def test_a_fresh_classifier_depends_on_the_seed(weights, tmp_path):
    path, variables = weights
    fresh = dict(pretrained=path, fresh_classifier=True)
    outcome = pipeline.run(
        tiny.config("still", still=STILL, sweep=dict(seed=(0, 1)), **fresh), tmp_path
    )
    params = jax.device_get(outcome.state.params)
    assert_array_equal(params["dense1"]["kernel"], [variables["params"]["dense1"]["kernel"]] * 2)
    kernels = params["fc"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], variables["params"]["fc"]["kernel"])


def test_mistakes_stop_a_run_before_it_begins(weights, tmp_path):
    path, _ = weights
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes(pathlib.Path(path).read_bytes()[:-10])
    absurd = tmp_path / "absurd.safetensors"
    absurd.write_bytes(safetensors_of([10**12], [0, 4 * 10**12]))
    wider = dict(model=dict(name="mlp", widths=(17,)))
    for fields, refusal in (
        (
            dict(pretrained="nowhere.safetensors"),
            ("config.pretrained", "nowhere.safetensors"),
        ),
        (
            dict(pretrained=str(truncated)),
            ("config.pretrained",),
        ),
        (
            dict(pretrained=str(absurd)),
            ("config.pretrained",),
        ),
        (
            dict(pretrained=path, start_from="x"),
            ("config.pretrained",),
        ),
        (
            dict(fresh_classifier=True),
            ("config.fresh_classifier", True),
        ),
        (
            dict(pretrained_zeros="keep"),
            ("config.pretrained_zeros", "keep"),
        ),
        (
            dict(pretrained=path, pretrained_zeros="drop"),
            ("config.pretrained_zeros", "drop"),
        ),
        (
            dict(pretrained=path, pretrained_names=[["fc.weight", "x"]]),
            ("names: 'fc.weight'",),
        ),
        (
            dict(pretrained=path, **wider),
            ("config.pretrained",),
        ),
        (
            dict(pretrained=path, sweep=dict(pretrained=[path])),
            ("config.sweep", "pretrained"),
        ),
    ):
        with tiny.refused(*refusal):
            pipeline.run(tiny.config("curve", **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with tiny.refused("config.pipeline", "curve"):
        pipeline.check(tiny.config("curve"))


def test_command_line_writes_torch_weights(weights, tmp_path, capsys):
    workdir, file = tmp_path / "run", tmp_path / "out.safetensors"
    pipeline.run(tiny.config("cut", pretrained=weights[0]), workdir)
    evaluate.main(["--workdir", str(workdir), "--torch", str(file)])
    assert f"wrote PyTorch weights of the dense network: {file}" in capsys.readouterr().out
    zeros = [
        np.mean(array == 0)
        for name, array in pretrained.read(file).items()
        if name.endswith("weight")
    ]
    assert 0.3 < np.mean(zeros) < 0.7
    for name in (file, tmp_path / "out.pth"):
        with pytest.raises(SystemExit, match=r"cannot be written; name a new file \*\.safetensors"):
            evaluate.main(["--workdir", str(workdir), "--torch", str(name)])
