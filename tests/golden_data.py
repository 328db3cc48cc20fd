"""Reference numbers of the original PyTorch implementations, and their weights in our layouts.

`load` finds a file of numbers. The weights behind files 11 and 12 are not stored but follow an integer hash of the
position (`rule_*`, exact in float64), in PyTorch's layouts; `variables` brings them into one of our networks:

    net = golden_data.load("11_models.json")["sfw/ResNet18"]
    variables = golden_data.variables(net["param_names"], net["param_shapes"])
    images = golden_data.images(net["input_shape"])

The numbers are those of `tests/golden`, or of the folder that the environment variable GOLDEN names: any set of the
same form, with the originals' hyper-parameters in `hyper.json`, or as `hyper` in `manifest.json`. Tests take names,
cases and hyper-parameters from there. With GOLDEN_READ=FILE every process appends the keys that it has read to FILE;
`python tests/golden_data.py FILE` then prints those that no test reads.
"""

import atexit
import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

FOLDER = pathlib.Path(os.environ.get("GOLDEN") or pathlib.Path(__file__).resolve().parent / "golden")
READ: set[str] = set()  # "FILE KEY"


class Arrays(Mapping):
    """The arrays of a file; remembers which were read."""

    def __init__(self, name: str, arrays: Mapping[str, np.ndarray]):
        self.name, self.arrays = name, arrays

    def __getitem__(self, key: str) -> np.ndarray:
        array = self.arrays[key]
        READ.add(f"{self.name} {key}")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __contains__(self, key: object) -> bool:
        return key in self.arrays


@functools.cache
def load(name: str) -> Mapping[str, Any]:
    """The arrays of an .npz file, or the content of a .json file; "hyper.json" also of a manifest."""
    path = FOLDER / name
    if name == "hyper.json" and not path.exists():
        manifest = json.loads((FOLDER / "manifest.json").read_text())
        return {file: entries.get("hyper", {}) for file, entries in manifest.items()}
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return Arrays(name, {key: arrays[key] for key in arrays.files})


def hyper(name: str) -> Mapping[str, Any]:
    """The hyper-parameters behind an .npz file."""
    return load("hyper.json")[name]


def parts(name: str, pattern: str) -> list[Any]:
    """What the groups of `pattern` match in the keys of a file that begin with it, each once, in their order."""
    matches = [re.match(pattern, key) for key in load(name)]
    found = [match.groups() if len(match.groups()) > 1 else match[1] for match in matches if match]
    return list(dict.fromkeys(found))


def write_read() -> None:
    with open(os.environ["GOLDEN_READ"], "a") as file:
        file.writelines(f"{entry}\n" for entry in sorted(READ))


if os.environ.get("GOLDEN_READ"):
    atexit.register(write_read)


def unread(read: set[str]) -> list[str]:
    """Arrays of all files, "FILE KEY", that are not in `read`."""
    names = sorted(path.name for path in FOLDER.glob("*.npz"))
    return [f"{name} {key}" for name in names for key in load(name) if f"{name} {key}" not in read]


def dense_names() -> list[str]:
    """Parameters of the small network of file 10, in its order."""
    layers = sorted(parts("10_hessian.npz", r"trained/(.+)\.weight"))
    return [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]


# The weight rule (PyTorch layouts, float64)


def rule_uniform(size: int, salt: int) -> np.ndarray:
    """The hash of positions 0..size-1 under `salt`, in [0, 1): float64 [size]."""
    h = np.arange(1, size + 1, dtype=np.uint32)
    h *= np.uint32(0x9E3779B1)
    h += np.uint32((salt + 1) * 0x85EBCA77 % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    return h / 2.0**32


def salt_offset() -> int:
    return int(load("11_models.npz")["rule/salt_offset"])


def rule_params(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Parameters in PyTorch's names and layouts; `names` and `shapes` in the network's order."""
    params = {}
    for salt, (name, shape) in enumerate(zip(names, shapes), salt_offset()):
        u = rule_uniform(math.prod(shape), salt).reshape(shape)
        if len(shape) >= 2:
            params[name] = (2 * u - 1) * math.sqrt(3 / math.prod(shape[1:]))
        else:
            params[name] = 0.75 + 0.5 * u if name.endswith("weight") else 0.2 * u - 0.1
    return params


def rule_batch_stats(widths: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(running mean, running variance) of batch norms of `widths`, in the network's order."""
    first = salt_offset() + 100000
    return [
        (0.2 * rule_uniform(width, first + 2 * i) - 0.1, 0.5 + rule_uniform(width, first + 2 * i + 1))
        for i, width in enumerate(widths)
    ]


def state_dict(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Everything that a PyTorch network of `names` and `shapes` would save, by the rule, in PyTorch's layouts."""
    arrays = rule_params(names, shapes)
    norms = [(name.rpartition(".")[0], shape) for name, shape in zip(names, shapes) if len(shape) == 1]
    widths = {module: shape[0] for module, shape in norms if f"{module}.weight" in arrays and is_norm(arrays, module)}
    for module, (mean, var) in zip(widths, rule_batch_stats(list(widths.values()))):
        arrays |= {f"{module}.running_mean": mean, f"{module}.running_var": var}
        arrays[f"{module}.num_batches_tracked"] = np.asarray(7)
    return arrays


def is_norm(arrays: Mapping[str, np.ndarray], module: str) -> bool:
    return arrays[f"{module}.weight"].ndim == 1


def rule_input(shape: Sequence[int]) -> np.ndarray:
    """The network input in PyTorch's layout: NCHW images, or [batch, features]."""
    return (2 * rule_uniform(math.prod(shape), salt_offset() + 999999) - 1).reshape(shape)


def images(shape: Sequence[int]) -> np.ndarray:
    """`rule_input` of NCHW `shape` in our layout: [batch, height, width, channels]; other ranks unchanged."""
    array = rule_input(shape)
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


# PyTorch's layouts and names to ours


def from_torch(array: np.ndarray) -> np.ndarray:
    """Kernel OIHW to HWIO, [out, in] to [in, out]; vectors unchanged."""
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


def to_torch(array: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`."""
    return np.asarray(array).transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[np.ndim(array)])


RESIDUAL_FUNCTION = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3", 7: "bn3"}
SHORTCUT = ("shortcut_conv", "shortcut_bn")

# First match wins: pattern of a PyTorch module name, our module path. Modules in no row are numbered in their order.
MODULES = (
    (r"layer(\d+)\.(\d+)\.((?:conv|bn)\d)", lambda stage, block, name: f"stage{stage}_block{block}/{name}"),
    (
        r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.(\d)",
        lambda stage, block, i: f"stage{stage}_block{block}/{SHORTCUT[int(i)]}",
    ),
    (
        r"conv(\d)_x\.(\d+)\.residual_function\.(\d)",
        lambda stage, block, i: f"stage{int(stage) - 1}_block{block}/{RESIDUAL_FUNCTION[int(i)]}",
    ),
    (
        r"conv(\d)_x\.(\d+)\.shortcut\.(\d)",
        lambda stage, block, i: f"stage{int(stage) - 1}_block{block}/{SHORTCUT[int(i)]}",
    ),
    (r"layers\.(\d+)\.conv1", lambda block: f"block{block}/depthwise"),
    (r"layers\.(\d+)\.conv2", lambda block: f"block{block}/pointwise"),
    (r"layers\.(\d+)\.(bn\d)", lambda block, name: f"block{block}/{name}"),
    (r"(conv1|bn1)", lambda name: name),
    (r"classifier\.0", lambda: "final_bn"),
)


def module_paths(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, str]:
    """PyTorch module name to our module path, e.g. "layer1.0.conv1" to "stage1_block0/conv1".

    A plain sequence of convolutions and batch norms becomes conv1, bn1, conv2, ..., dense layers dense1, ...; the last
    is fc.
    """
    kinds = {name.rpartition(".")[0]: len(shape) for name, shape in zip(names, shapes) if name.endswith("weight")}
    paths, counts = {}, {"conv": 0, "bn": 0, "dense": 0}
    for module, rank in kinds.items():
        matches = ((re.fullmatch(pattern, module), path) for pattern, path in MODULES)
        named = next((path(*match.groups()) for match, path in matches if match), None)
        if named is None:
            kind = {4: "conv", 2: "dense", 1: "bn"}[rank]
            counts[kind] += 1
            named = f"{kind}{counts[kind]}"
        paths[module] = named
    paths[next(reversed(kinds))] = "fc"
    return paths


def paths(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, str]:
    """PyTorch parameter name to our leaf path, e.g. "bn1.weight" to "bn1/scale", in PyTorch's order."""
    modules, ranks = module_paths(names, shapes), dict(zip(names, map(len, shapes)))
    result = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        leaf = "bias" if leaf == "bias" else "scale" if ranks[name] == 1 else "kernel"
        result[name] = f"{modules[module]}/{leaf}"
    return result


def batch_norms(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Our module path to width of every batch norm, in PyTorch's order."""
    modules = module_paths(names, shapes)
    return {
        modules[name.rpartition(".")[0]]: shape[0]
        for name, shape in zip(names, shapes)
        if len(shape) == 1 and name.endswith("weight")
    }


# Architectures


def shapes_of(texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Shapes as the files write them, e.g. "16x3x3x3"."""
    return [tuple(int(size) for size in str(text).split("x")) for text in texts]


def architecture(names: Sequence[str], shapes: Sequence[Sequence[int]], strides: Sequence[int] = ()) -> dict[str, Any]:
    """Options of `models.build` for an original's network, but for `num_classes`, from its parameters.

    strides: of the blocks of a MobileNet, which parameters do not tell; by default 1 for the first and the last block
    and 2 between them, as in files 06 and 12.
    """
    kernels = {name.removesuffix(".weight"): shape for name, shape in zip(names, shapes) if len(shape) == 4}
    if is_mobilenet(names):
        return mobilenet(kernels, strides)
    if any(name.startswith("layer1.") for name in kernels):
        return resnet(kernels)
    return vgg(names, kernels)


def is_mobilenet(names: Sequence[str]) -> bool:
    return any(str(name).startswith("layers.") for name in names)


def mobilenet(kernels: Mapping[str, Sequence[int]], strides: Sequence[int]) -> dict[str, Any]:
    widths = [shape[0] for name, shape in kernels.items() if re.fullmatch(r"layers\.\d+\.conv2", name)]
    strides = strides or (1, *(2,) * (len(widths) - 2), 1)
    return {"name": "mobilenet", "stem_width": kernels["conv1"][0], "blocks": tuple(zip(widths, strides, strict=True))}


def resnet(kernels: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Of blocks of two convolutions."""
    inner, outer = {}, {}
    for name, shape in kernels.items():
        match = re.fullmatch(r"layer(\d+)\.\d+\.conv([12])", name)
        if match:
            {"1": inner, "2": outer}[match[2]].setdefault(int(match[1]), []).append(shape[0])
    return {
        "name": "resnet",
        "stem_width": kernels["conv1"][0],
        "stage_sizes": tuple(len(outer[stage]) for stage in sorted(outer)),
        "widths": tuple(outer[stage][-1] for stage in sorted(outer)),
        "inner_widths": tuple(width for stage in sorted(inner) for width in inner[stage]),
        "shortcut": "projection" if any(".shortcut." in name for name in kernels) else "zero_pad",
    }


def vgg(names: Sequence[str], kernels: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """`features` is a sequence of convolution, norm, ReLU (two orders) and, where a number is skipped, a pool.

    Networks with the norm after the ReLU end in a pool, the others in an average.
    """
    places = [int(name.removeprefix("features.")) for name in kernels]
    relu_first = "features.1.weight" not in names
    layout = []
    for place, following, shape in zip(places, [*places[1:], places[-1] + 3 + relu_first], kernels.values()):
        layout += [shape[0], "M"] if following - place == 4 else [shape[0]]
    return {
        "name": "vgg",
        "layout": tuple(layout),
        "order": "conv_relu_bn" if relu_first else "conv_bn_relu",
        "conv_bias": "features.0.bias" in names,
    }


def nest(leaves: Mapping[str, Any]) -> dict:
    """{"a/b": x} to {"a": {"b": x}}."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def leaf(tree: Mapping[str, Any], path: str) -> Any:
    """The entry of a nested dict at a path such as "stage1_block0/conv1/kernel"."""
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def variables(
    names: Sequence[str], shapes: Sequence[Sequence[int]], params: Mapping[str, np.ndarray] | None = None
) -> dict:
    """{"params": ..., "batch_stats": ...} of our network for PyTorch's `names` and `shapes`, float64 NumPy arrays.

    `params`: arrays by PyTorch name, in PyTorch's layouts; by default those of the rule, as are the running
    statistics.
    """
    params = rule_params(names, shapes) if params is None else params
    ours = paths(names, shapes)
    norms = batch_norms(names, shapes)
    stats = {}
    for path, (mean, var) in zip(norms, rule_batch_stats(list(norms.values()))):
        stats |= {f"{path}/mean": mean, f"{path}/var": var}
    return {"params": nest({ours[name]: from_torch(params[name]) for name in names}), "batch_stats": nest(stats)}


if __name__ == "__main__":
    sys.stdout.writelines(f"{entry}\n" for entry in unread(set(pathlib.Path(sys.argv[1]).read_text().splitlines())))
