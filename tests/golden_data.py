"""Reference numbers of the original PyTorch implementations, and their weights in our layouts.

`load` finds a file of numbers. The weights behind files 11 and 12 are not stored but follow an
integer hash of the position (`rule_*`, exact in float64), in PyTorch's layouts; `variables` brings
them into one of our networks:

    net = golden_data.load("11_models.json")["sfw/ResNet18"]
    variables = golden_data.variables(net["param_names"], net["param_shapes"])
    images = golden_data.images(net["input_shape"])

The numbers are those of `tests/golden`, or of the folder that the environment variable GOLDEN
names: any set of the same form, with the originals' hyper-parameters in `hyper.json`, or as `hyper`
in `manifest.json`. Tests take names, cases and hyper-parameters from there; the section "What no
file holds" is about the rest.

Every number is compared, or `NOT_COMPARED` says why not. With GOLDEN_READ=FILE every process
appends the keys that it has read to FILE, and after a run of all tests

    python tests/golden_data.py FILE

prints those that are neither read nor in `NOT_COMPARED`, and exits with 1 if there are any.
`.ci/run` does so: a test inside the suite could not, as each of its processes reads some keys only.
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

FOLDER = pathlib.Path(
    os.environ.get("GOLDEN") or pathlib.Path(__file__).resolve().parent / "golden"
)
READ: set[str] = set()  # "FILE KEY"

# Pattern of "FILE KEY" to the reason why no test compares it with a number of ours.
NOT_COMPARED = {
    r"11_models\.json .*/float32_rel_dev": "how far the original's float32 is from its float64",
    r"hyper\.json 03_.*/(milestones|gamma)": "a cosine schedule has none",
    r"hyper\.json 08_.*/(lr_prune|momentum|weight_decay)": "not all trainings are repeated",
}


class Entries(Mapping):
    """The entries of a file, or of a part of it; remembers which were read.

    place: "FILE " and the name of the part.
    """

    def __init__(self, place: str, entries: Mapping[str, Any]):
        self.place, self.entries = place, entries

    def __getitem__(self, key: str) -> Any:
        entry = self.entries[key]
        if isinstance(entry, dict):
            return Entries(f"{self.place}{key}/", entry)
        READ.add(self.place + key)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def under(self, prefix: str) -> "Entries":
        """Those whose keys begin with `prefix`/, by the rest of their keys."""
        start = f"{prefix}/"
        keys = [key for key in self.entries if key.startswith(start)]
        return Entries(
            self.place + start, {key.removeprefix(start): self.entries[key] for key in keys}
        )

    def places(self) -> list[str]:
        """All of them, those of parts included, as "FILE KEY"."""
        places = []
        for key, entry in self.entries.items():
            place = self.place + key
            places += Entries(f"{place}/", entry).places() if isinstance(entry, dict) else [place]
        return places


@functools.cache
def load(name: str) -> Entries:
    """The arrays of an .npz file, or the content of a .json file; "hyper.json" also of a
    manifest.
    """
    path = FOLDER / name
    if name == "hyper.json" and not path.exists():
        manifest = json.loads((FOLDER / "manifest.json").read_text())
        entries = {file: own.get("hyper", {}) for file, own in manifest.items()}
    elif path.suffix == ".json":
        entries = json.loads(path.read_text())
    else:
        with np.load(path) as arrays:
            entries = {key: arrays[key] for key in arrays.files}
    return Entries(f"{name} ", entries)


def hyper(name: str) -> Entries:
    """The hyper-parameters behind an .npz file."""
    return load("hyper.json")[name]


def parts(name: str, pattern: str) -> list[Any]:
    """What the groups of `pattern` match in the keys of a file that begin with it, each once, in
    their order.
    """
    matches = [re.match(pattern, key) for key in load(name)]
    found = [match.groups() if len(match.groups()) > 1 else match[1] for match in matches if match]
    return list(dict.fromkeys(found))


def write_read() -> None:
    with open(os.environ["GOLDEN_READ"], "a") as file:
        file.writelines(f"{entry}\n" for entry in sorted(READ))


if os.environ.get("GOLDEN_READ"):
    atexit.register(write_read)


def places() -> list[str]:
    """All numbers of all files as "FILE KEY"."""
    names = sorted(path.name for path in FOLDER.glob("*.npz"))
    return [
        place for name in [*names, "11_models.json", "hyper.json"] for place in load(name).places()
    ]


def unread(read: set[str]) -> list[str]:
    """Numbers of all files, "FILE KEY", that are neither in `read` nor in NOT_COMPARED."""
    explained = re.compile("|".join(NOT_COMPARED))
    return [place for place in places() if place not in read and not explained.fullmatch(place)]


def growing_modules() -> tuple[list[tuple[str, str]], str]:
    """Of the small network of file 08: ([(convolution, the norm behind it), ...], the dense
    layer).
    """
    names = load("08_growing_reg.npz")["param_names"]
    *modules, classifier = dict.fromkeys(str(name).rpartition(".")[0] for name in names)
    return list(zip(modules[::2], modules[1::2], strict=True)), classifier


def dense_layers() -> list[str]:
    """Of the small network of file 10, in its order, which the numbers in their names tell."""
    number = lambda layer: [int(digits) for digits in re.findall(r"\d+", layer)]
    return sorted(parts("10_hessian.npz", r"trained/(.+)\.weight"), key=number)


def dense_names() -> list[str]:
    """Parameters of the small network of file 10, in its order."""
    return [f"{layer}.{leaf}" for layer in dense_layers() for leaf in ("weight", "bias")]


def fine_grid() -> np.ndarray:
    """Of the density of file 10's pipeline, whose sum, 1 / step, gives the number of bins."""
    golden = load("10_hessian.npz")
    first, last = golden["pipeline/grid_first_last"]
    steps = (last - first) * golden["pipeline/density_nonzero_values"].sum()
    return np.linspace(first, last, round(steps) + 1)


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
        if len(shape) >= 2:  # in place: the largest have millions of entries
            u *= 2
            u -= 1
            u *= math.sqrt(3 / math.prod(shape[1:]))
            params[name] = u
        else:
            params[name] = 0.75 + 0.5 * u if name.endswith("weight") else 0.2 * u - 0.1
    return params


def rule_batch_stats(widths: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(running mean, running variance) of batch norms of `widths`, in the network's order."""
    first = salt_offset() + 100000
    return [
        (
            0.2 * rule_uniform(width, first + 2 * i) - 0.1,
            0.5 + rule_uniform(width, first + 2 * i + 1),
        )
        for i, width in enumerate(widths)
    ]


def state_dict(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Everything that a PyTorch network of `names` and `shapes` would save, by the rule, in
    PyTorch's layouts.
    """
    arrays = rule_params(names, shapes)
    norms = [
        (name.rpartition(".")[0], shape) for name, shape in zip(names, shapes) if len(shape) == 1
    ]
    widths = {
        module: shape[0]
        for module, shape in norms
        if f"{module}.weight" in arrays and is_norm(arrays, module)
    }
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
    """`rule_input` of NCHW `shape` in our layout: [batch, height, width, channels]; other ranks
    unchanged.
    """
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

# First match wins: pattern of a PyTorch module name, our module path. Modules in no row are
# numbered in their order.
MODULES = (
    (
        r"layer(\d+)\.(\d+)\.((?:conv|bn)\d)",
        lambda stage, block, name: f"stage{stage}_block{block}/{name}",
    ),
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

    A plain sequence of convolutions and batch norms becomes conv1, bn1, conv2, ..., dense layers
    dense1, ...; the last is fc.
    """
    kinds = {
        name.rpartition(".")[0]: len(shape)
        for name, shape in zip(names, shapes)
        if name.endswith("weight")
    }
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
    """PyTorch parameter name to our leaf path, e.g. "bn1.weight" to "bn1/scale", in PyTorch's
    order.
    """
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


# What no file holds. The logits that the tests compare tell whether it is right for another set.
#
# Other such values follow from one of the numbers, and the tests that need them compare the rest:
# tau of the balls (01), strength of the penalties (05b), the share of the mass at 0 (10).

# Of the images of structural/* in file 08. Both networks end in an average: any side fits their
# shapes.
STRUCTURAL_SIDES = {"vgg": 16, "resnet": 32}


def usual_strides(num_blocks: int) -> tuple[int, ...]:
    """Of the blocks of the MobileNets in files 06 and 12: shapes tell how many are 2, not which."""
    return (1, *(2,) * (num_blocks - 2), 1)


# Architectures


def shapes_of(texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Shapes as the files write them, e.g. "16x3x3x3"."""
    return [tuple(int(size) for size in str(text).split("x")) for text in texts]


def is_mobilenet(names: Sequence[str]) -> bool:
    return any(str(name).startswith("layers.") for name in names)


def kernels_of(
    names: Sequence[str], shapes: Sequence[Sequence[int]], rank: int
) -> dict[str, Sequence[int]]:
    """Shape of every convolution (rank 4) or dense layer (rank 2), by module, in order."""
    kernels = zip(names, shapes)
    return {
        str(name).removesuffix(".weight"): shape for name, shape in kernels if len(shape) == rank
    }


def architecture(
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    strides: Sequence[int] = (),
    modules: Sequence[tuple[str, str]] = (),
    upsample: int | None = None,
) -> dict[str, Any]:
    """Options of `models.build`, but for `num_classes`, for an original's network, from its
    parameters.

    strides: of the blocks of a MobileNet, by default `usual_strides`. modules: (name, PyTorch's
    class) of the modules without children, in order, where the file lists them. upsample: how often
    an AlexNet repeats a pixel. Raises ValueError for a network that none of ours is like.
    """
    convolutions = kernels_of(names, shapes, 4)
    widths = tuple(shape[0] for shape in convolutions.values())
    dense_widths = tuple(shape[0] for shape in kernels_of(names, shapes, 2).values())[:-1]
    kinds = [kind for _, kind in modules]
    if not convolutions:
        activation = "linear" if "Identity" in kinds else "relu"
        return {"name": "mlp", "widths": dense_widths, "activation": activation}
    if is_mobilenet(names):
        return mobilenet(convolutions, strides)
    if any(re.search(RESIDUAL_CONVOLUTION, module) for module in convolutions):
        return resnet(names, convolutions)
    if any(".conv.0.0." in name for name in names):  # of inverted residual blocks
        return {"name": "mobilenet_v2", "multiplier": widths[0] / 32}
    if not dense_widths:
        return vgg(names, convolutions, kinds or vgg_modules(names, convolutions))
    options = {"name": plain(convolutions, kinds), "widths": widths, "dense_widths": dense_widths}
    return options | ({"upsample": upsample} if upsample else {})


def network_options(key: str) -> dict[str, Any]:
    """All options of `models.build` for a network of 11_models.json."""
    net = load("11_models.json")[key]
    layers = net["weight_layers"]
    details = [details for _, kind, _, details in layers if kind == "Conv2d"]
    strides = [strides[0] for strides, _, num_groups, _ in details if num_groups > 1]
    names, shapes = net["param_names"], net["param_shapes"]
    options = architecture(names, shapes, strides, net["leaf_module_order"], net["upsample"])
    return options | {"num_classes": layers[-1][2][0]}


def plain(convolutions: Mapping[str, Sequence[int]], kinds: Sequence[str]) -> str:
    """Name of a network of convolutions in a row and several dense layers, by its kernels'
    sizes.
    """
    number, first = len(convolutions), next(iter(convolutions.values()))[-1]
    if first == 11:
        return "alexnet_bn" if "BatchNorm2d" in kinds else "alexnet"
    if "LocalResponseNorm" in kinds:
        return "alexnet_cifar"
    if "BatchNorm2d" in kinds:
        return "cnet"
    if first != 5 or number not in (2, 3):
        raise ValueError(f"no network of ours is like the original's of {dict(convolutions)}.")
    return "lenet" if number == 2 else "lenet5"


def mobilenet(convolutions: Mapping[str, Sequence[int]], strides: Sequence[int]) -> dict[str, Any]:
    widths = [
        shape[0]
        for name, shape in convolutions.items()
        if re.fullmatch(r"layers\.\d+\.conv2", name)
    ]
    strides = strides or usual_strides(len(widths))
    blocks = tuple(zip(widths, strides, strict=True))
    return {"name": "mobilenet", "stem_width": convolutions["conv1"][0], "blocks": blocks}


# "layer2.0.conv1", "conv3_x.0.residual_function.0", "block2.layer.0.conv1", and the like of
# shortcuts
RESIDUAL_CONVOLUTION = r"^(?:layer|conv|block)(\d+)(?:_x)?(?:\.layer)?\.(\d+)\.(\w+)"


def resnet(names: Sequence[str], convolutions: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    blocks = {}  # widths of the convolutions of each, by (stage, number)
    shortcut = "zero_pad"
    for name, shape in convolutions.items():
        match = re.match(RESIDUAL_CONVOLUTION, name)
        if match and match[3] in ("conv1", "conv2", "conv3", "residual_function"):
            blocks.setdefault((int(match[1]), int(match[2])), []).append(shape[0])
        elif match:
            shortcut = "projection"
    stages = sorted({stage for stage, _ in blocks})
    depth = len(next(iter(blocks.values())))
    norm_first = ".bn1." in names[1]  # the first norm is a block's and not the stem's
    outer = [
        [widths[-1] for (own, _), widths in blocks.items() if own == stage] for stage in stages
    ]
    stem = next(iter(convolutions.values()))
    return {
        "name": "resnet",
        "stem": "imagenet" if stem[-1] == 7 else "cifar",
        "stem_width": stem[0],
        "stage_sizes": tuple(map(len, outer)),
        "widths": tuple(widths[-1] // (4 if depth == 3 else 1) for widths in outer),
        "inner_widths": tuple(widths[0] for widths in blocks.values()),
        "block": "bottleneck" if depth == 3 else "preact" if norm_first else "basic",
        "shortcut": shortcut,
    }


def vgg(
    names: Sequence[str], convolutions: Mapping[str, Sequence[int]], kinds: Sequence[str]
) -> dict[str, Any]:
    widths = iter(convolutions.values())
    steps = [kind for kind in kinds if kind in ("Conv2d", "MaxPool2d")]
    layout = tuple(next(widths)[0] if kind == "Conv2d" else "M" for kind in steps)
    norm = kinds.index("BatchNorm2d") if "BatchNorm2d" in kinds else None
    return {
        "name": "vgg",
        "layout": layout,
        "order": "conv_relu_bn" if norm == 2 else "conv_bn_relu",
        "conv_bias": f"{next(iter(convolutions))}.bias" in names,
        "batch_norm": norm is not None,
    }


def vgg_modules(names: Sequence[str], convolutions: Mapping[str, Sequence[int]]) -> list[str]:
    """Classes of the modules of a VGG with norms; a pool is where a number is skipped.

    Networks with the norm after the ReLU end in a pool, the others in an average.
    """
    relu_first = "features.1.weight" not in names
    block = ["Conv2d", "ReLU", "BatchNorm2d"] if relu_first else ["Conv2d", "BatchNorm2d", "ReLU"]
    places = [int(name.removeprefix("features.")) for name in convolutions]
    kinds = []
    for place, following in zip(places, [*places[1:], places[-1] + 3 + relu_first]):
        kinds += [*block, "MaxPool2d"] if following - place == 4 else block
    return kinds


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
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    params: Mapping[str, np.ndarray] | None = None,
) -> dict:
    """{"params": ..., "batch_stats": ...} of our network for PyTorch's `names` and `shapes`,
    float64 NumPy arrays.

    `params`: arrays by PyTorch name, in PyTorch's layouts; by default those of the rule, as are the
    running statistics.
    """
    params = rule_params(names, shapes) if params is None else params
    ours = paths(names, shapes)
    norms = batch_norms(names, shapes)
    stats = {}
    for path, (mean, var) in zip(norms, rule_batch_stats(list(norms.values()))):
        stats |= {f"{path}/mean": mean, f"{path}/var": var}
    return {
        "params": nest({ours[name]: from_torch(params[name]) for name in names}),
        "batch_stats": nest(stats),
    }


if __name__ == "__main__":
    forgotten = unread(set(pathlib.Path(sys.argv[1]).read_text().splitlines()))
    sys.stdout.writelines(f"{place}: read by no test\n" for place in forgotten)
    sys.exit(bool(forgotten))
