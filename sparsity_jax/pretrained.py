"""Weights of PyTorch networks into ours and back: files, names and layouts.

    state_dict = pretrained.read("resnet50.safetensors")
    variables = pretrained.to_variables(state_dict, jax.eval_shape(model.init, key, images))
    pretrained.write("pruned.safetensors", pretrained.to_torch(variables))

A state dict is a flat dict of NumPy arrays by PyTorch's names, in its layouts: convolutions [out,
in / groups, height, width], dense layers [out, in]. In memory and in files of `torch.save` it comes
in the order in which the network defines its layers; sorted names, as those of a safetensors file,
tell no order. PyTorch itself is needed for its own file formats only.
"""

import collections
import importlib.util
import itertools
import operator
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sparsity_jax import kernels
from sparsity_jax.tables import ConfigError, blaming, check_memory, closest, lookup, within
from sparsity_jax.trees import check_pattern, is_kernel, last_name, map_named, named_leaves
from sparsity_jax.types import AnyPath, Arrays, Paths, PyTree, Shape

__all__ = [
    "CLASSIFIER",
    "Group",
    "Leaves",
    "Module",
    "Modules",
    "Names",
    "Rules",
    "Shapes",
    "check",
    "count_zeros",
    "name_map",
    "read",
    "to_torch",
    "to_variables",
    "torch_names",
    "write",
]

Shapes = Mapping[str, Shape]
Rules = Sequence[tuple[str, str]]
Names = dict[str, str]
Leaves = Mapping[str, Any]  # of one of our networks, by path

_SAFETENSORS = ".safetensors"
_FILES = (_SAFETENSORS, ".pth", ".pt", ".bin", ".ckpt", ".tar")

# Under which names a checkpoint holds its state dict; the first counts. Averaged weights (EMA) only
# where alone.
_STATE_DICTS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)

# What PyTorch's modules are called here: a pattern of their whole name (see `_normal`), and our
# module. The first row that leads to a module of the network counts. Modules in no row are numbered
# by kind in their order: conv1, conv2, ..., bn1, ..., dense1, ..., and the last is fc.
_MODULES = (
    (r".*", r"\g<0>"),  # their own names
    # ResNets: torchvision, timm and others; the geometric-limit study; wide ones
    (r"layer(\d+)/(\d+)/((?:conv|bn)\d)", r"stage\1_block\2/\3"),
    (r"layer(\d+)/(\d+)/(?:downsample|shortcut)/0", r"stage\1_block\2/shortcut_conv"),
    (r"layer(\d+)/(\d+)/(?:downsample|shortcut)/1", r"stage\1_block\2/shortcut_bn"),
    (r"layer(\d+)/(\d+)/residual_function/0", r"stage\1_block\2/conv1"),
    (r"layer(\d+)/(\d+)/residual_function/1", r"stage\1_block\2/bn1"),
    (r"layer(\d+)/(\d+)/residual_function/3", r"stage\1_block\2/conv2"),
    (r"layer(\d+)/(\d+)/residual_function/4", r"stage\1_block\2/bn2"),
    (r"layer(\d+)/(\d+)/residual_function/6", r"stage\1_block\2/conv3"),
    (r"layer(\d+)/(\d+)/residual_function/7", r"stage\1_block\2/bn3"),
    (r"block(\d+)/layer/(\d+)/((?:conv|bn)\d)", r"stage\1_block\2/\3"),
    (r"block(\d+)/layer/(\d+)/convShortcut", r"stage\1_block\2/shortcut_conv"),
    (r"conv1/0", "conv1"),
    (r"conv1/1", "bn1"),
    (r"bn1|classifier/0", "final_bn"),
    # MobileNet V1; AlexNet for small images
    (r"layers/(\d+)/conv1", r"block\1/depthwise"),
    (r"layers/(\d+)/conv2", r"block\1/pointwise"),
    (r"layers/(\d+)/(bn\d)", r"block\1/\2"),
    (r"fc_bn(\d+)", r"dense_bn\1"),
    # MobileNet V2 of torchvision (its first block has no `expand`), then of timm
    (r"(block\d+)/conv/0/0", r"\1/expand"),
    (r"(block\d+)/conv/[01]/0", r"\1/depthwise"),
    (r"(block\d+)/conv/0/1", r"\1/bn1"),
    (r"(block\d+)/conv/1/1", r"\1/bn2"),
    (r"(block\d+)/conv/[12]", r"\1/project"),
    (r"(block\d+)/conv/2", r"\1/bn2"),
    (r"(block\d+)/conv/3", r"\1/bn3"),
    (r"features/0/0|conv_stem", "conv1"),
    (r"features/0/1", "bn1"),
    (r"features/\d+/0|conv_head", "conv2"),
    (r"features/\d+/1", "bn2"),
    (r"(block\d+)/conv_pw", r"\1/expand"),
    (r"(block\d+)/conv_dw", r"\1/depthwise"),
    (r"(block\d+)/conv_pwl?", r"\1/project"),
)
_MOBILE_BLOCK = r"(?:features/\d+(?=/conv/)|blocks/\d+/\d+)"  # of MobileNet V2
# Weights of ours whose order in the network is known by their paths; of others only numbers tell.
_OURS = r"params/(?:(?:conv|bn|dense|dense_bn)\d+|final_bn|fc|(?:stage\d+_)?block\d+/\w+)/\w+"

# The arrays of a module: PyTorch's name of each by ours.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"  # of a batch norm; nothing here depends on it
CLASSIFIER = r"params/fc/.*"

# Of arrays: at their place, of no tensor, of no place, of another shape, no numbers.
_GROUPS = ("right", "missing", "unexpected", "wrong", "no weights")

# What else to say where the text of a misfit of this group holds the pattern.
_HINTS = (
    (
        "wrong",
        r"for params/fc/bias ",
        "It has other classes: config.fresh_classifier (fresh=CLASSIFIER) trains a new classifier.",
    ),
    (
        "wrong",
        r"for params/conv1/kernel ",
        "The first convolution differs: config.model.stem may be another ('imagenet' for "
        "ImageNet's ResNets).",
    ),
    (
        "unexpected",
        r"\.parametrizations\.|_(?:orig|mask|[guv]) ",
        "Weights are computed from others there: torch.nn.utils.parametrize.remove_parametrizations"
        ", prune.remove, remove_weight_norm or remove_spectral_norm writes them out.",
    ),
    (
        "unexpected",
        r"(?:^|[._])(?:ema|shadow)[._ ]",
        "It also holds averaged weights (EMA): keep the tensors of one of the two networks.",
    ),
)

# Names of torchvision's MobileNet V2 by ours: outside of blocks, and inside, without and with the
# layer that expands.
_MOBILENET_V2_OUTSIDE = {
    "conv1": "features.0.0",
    "bn1": "features.0.1",
    "conv2": "features.{last}.0",
    "bn2": "features.{last}.1",
    "fc": "classifier.1",
}
_MOBILENET_V2_INSIDE = (
    dict(depthwise="0.0", bn1="0.1", project="1", bn2="2"),
    dict(expand="0.0", bn1="0.1", depthwise="1.0", bn2="1.1", project="2", bn3="3"),
)


# Files --------------------------------------------------------------------------------------------


def check(path: AnyPath) -> None:
    """Raises ConfigError unless `path` is a weight file with a whole header that can be read."""
    path = pathlib.Path(path)
    with blaming("", str(path)):
        if path.suffix not in _FILES:
            raise ConfigError("", allowed=f"a file of weights, {', '.join(_FILES)}")
        if not path.is_file():
            raise ConfigError("", why="but there is no such file")
        check_memory(path.stat().st_size, "which has")
        if path.suffix == _SAFETENSORS:
            _open(path)
        elif importlib.util.find_spec("torch") is None:
            advice = "`pip install torch`, or convert it to .safetensors where PyTorch is installed"
            raise ConfigError("", why=f"which only PyTorch reads: {advice}")


def _open(path: pathlib.Path) -> Any:
    """A safetensors file whose header was read."""
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        why = "which is no whole safetensors file (cut short, or of another format)"
        raise ConfigError("", str(path), why=f"{why}: {error}") from None


def read(path: AnyPath, *, key: str = "") -> Arrays:
    """The state dict in a `.safetensors` file, or in one that `torch.save` wrote (needs PyTorch).

    key: name of the state dict in a checkpoint that holds several, e.g. "model_ema"; by default the
    first of `_STATE_DICTS`, or the whole file. Nothing in a file is executed: pickled modules are
    refused. That of a safetensors file is sorted by name. Raises ConfigError for files that are cut
    short or something else, for tensors that are no plain arrays (sparse, quantized, complex,
    float8), and for files and shapes larger than the memory.
    """
    path = pathlib.Path(path)
    with within("path"):
        check(path)
    if path.suffix != _SAFETENSORS:
        return _read_torch(path, key)
    if key:
        raise ConfigError("key", key, allowed=f"none: {path} holds one state dict")
    file = _open(path)
    arrays = {}
    for name in sorted(file.keys()):
        arrays[name] = _array(file.get_tensor, name, f"{path}: {name}")
    return arrays


def _read_torch(path: pathlib.Path, key: str) -> Arrays:
    import torch

    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can break PyTorch's readers anywhere
        reason = _reason(error)
        raise ConfigError(f"{path} cannot be read as weights alone: {reason}") from None
    arrays = {}
    for name, value in _state_dict_in(content, key, path).items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _no_tensors(path, f"{name!r}, of type {type(value).__name__}")
        size = value.numel() * value.element_size()  # one stored number may stand for any shape
        with within(f"{path}: {name}"):
            check_memory(size, f"has the shape {tuple(value.shape)} and takes")
        arrays[name] = _array(_of_torch, value, f"{path}: {name}")
    return arrays


def _check_sums(path: pathlib.Path) -> None:
    """Raises an error where the checksums of `torch.save`, which PyTorch passes over, differ."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} has another checksum")


def _reason(error: Exception) -> str:
    """Why `torch.load` failed; PyTorch's own text may advise to read the file nevertheless."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        return (
            f"beside tensors it holds an object of {foreign[1]}, which reading could execute. "
            "Where you trust the file, load it with PyTorch and save its state dict alone."
        )
    reason = _first_line(error) or "it ends too early"
    if isinstance(error, pickle.UnpicklingError):
        reason = "it holds other objects than tensors"
    advice = "Is it cut short, or another format? Of a pickled network save its `state_dict()`"
    return f"{reason}. {advice} instead."


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _state_dict_in(content: Any, key: str, path: pathlib.Path) -> Mapping:
    """The state dict inside a checkpoint; raises ConfigError if there is none."""
    if key and isinstance(content, Mapping):
        content = lookup({str(name): held for name, held in content.items()}, key, "key")
    for name in 2 * _STATE_DICTS:  # one may be inside another
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise _no_tensors(path, type(content).__name__)
    return content


def _no_tensors(path: pathlib.Path, held: str) -> ConfigError:
    allowed = f"tensors by name, alone or as {', '.join(_STATE_DICTS)}"
    return ConfigError(f"{path} holds {held}; allowed: {allowed}.")


def _array(convert: Any, value: Any, name: str) -> np.ndarray:
    """`convert(value)`, a NumPy array; raises ConfigError for what is none. name: of it."""
    try:
        return convert(value)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        kind = getattr(value, "dtype", type(value).__name__)
        reason = f"{_first_line(error)}. Convert it to float32 with PyTorch."
        raise ConfigError(f"{name} is no plain array ({kind}): {reason}") from None


def _of_torch(value: Any) -> np.ndarray:
    """The array of a tensor of PyTorch, or of anything that NumPy reads."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    if str(value.dtype) == "torch.bfloat16":
        return value.detach().float().numpy(force=True).astype(jnp.bfloat16)
    return value.numpy(force=True)


def write(path: AnyPath, state_dict: Arrays) -> pathlib.Path:
    """Writes a state dict as safetensors, bit by bit, and returns its path.

    The file appears whole or not at all.
    """
    path = pathlib.Path(path)
    if path.suffix != _SAFETENSORS:
        raise ConfigError("path", str(path), allowed="*.safetensors, as it is written")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    arrays = {name: np.array(array, order="C") for name, array in state_dict.items()}
    try:
        part.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


# Modules of both sides ----------------------------------------------------------------------------


class Module(NamedTuple):
    """A layer of either side. Layers go by the name or path of their weight."""

    name: str
    shape: Shape  # of its weight, in PyTorch's layout
    arrays: Names  # their names or paths, by PyTorch's names inside the module

    @property
    def kind(self) -> int:
        """The axes of its weight: 1 is a norm, 2 a dense layer."""
        return len(self.shape)


Modules = dict[str, Module]  # by their weights
Group = tuple[Paths, Paths]  # weights of one form, PyTorch's and as many of ours


def _modules_there(shapes: Shapes) -> Modules:
    """PyTorch's modules, in the order of the tensors."""
    arrays: dict = collections.defaultdict(dict)
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        if leaf in _LEAVES.values():
            arrays[module][leaf] = name
    return _with_weights(arrays, shapes)


def _modules_here(leaves: Leaves) -> Modules:
    """Our modules, in the order in which PyTorch's networks define theirs."""
    arrays: dict = collections.defaultdict(dict)
    for path in leaves:
        match = re.fullmatch(r"(?:params|batch_stats)/(.+)/(\w+)", path)
        module, leaf = match.groups() if match else ("", "")
        if leaf in _LEAVES:
            arrays[module][_LEAVES[leaf]] = path
    ordered = {module: arrays[module] for module in sorted(arrays, key=_definition_order)}
    shapes = {path: _torch_shape(leaf.shape) for path, leaf in leaves.items()}
    return _with_weights(ordered, shapes)


def _with_weights(arrays: dict, shapes: Shapes) -> Modules:
    modules = {}
    for module, names in arrays.items():
        if "weight" in names:
            weight = names["weight"]
            modules[weight] = Module(module, tuple(shapes[weight]), names)
    return modules


def _torch_shape(shape: Shape) -> Shape:
    return (*shape[:-3:-1], *shape[:-2])


def _definition_order(name: str) -> tuple:
    """Sorts modules of one kind as PyTorch's networks define them."""
    block, _, layer = name.partition("/")
    if layer:
        return (1, _natural(block), layer != "expand", _natural(layer))
    place = 2
    if re.search(r"\D1$", name):
        place = 0
    elif name in ("fc", "final_bn"):
        place = 3
    return (place, _natural(name))


def _natural(name: str) -> list:
    """Sorts by the numbers inside: "conv2" before "conv10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# Which layer is which -----------------------------------------------------------------------------


def name_map(
    shapes: Shapes, like: PyTree, names: Rules = (), *, fresh: str = "", ordered: bool = True
) -> Names:
    """Path in `like` of each tensor that has a place there, by PyTorch's name.

    shapes: of the tensors, in PyTorch's layouts, and in the order in which the network defines them
    if `ordered`. Layers find their place by shape; equally shaped ones by that order and by their
    names, which have to agree. Names say something where they are known here (torchvision, timm,
    the studies) or are numbered. Where nothing decides, and where order and names disagree,
    ConfigError names the layers.
    names: for networks of your own, or other names: pairs of a pattern of the whole PyTorch name
    and a path, tried first, e.g. `((r"encoder\\.(\\d+)\\.weight", r"params/layer\\1/kernel"),)`;
    the bias and statistics of a layer follow its weight. Raises ConfigError for one that leads to
    no array, or to the array of another.
    fresh: pattern of paths that need no tensor, whatever their shape there.
    """
    kept = kernels.matching(like, fresh, "fresh")
    ordered = ordered and _is_as_defined(shapes)
    placed, doubts = _matched(shapes, named_leaves(like), names, kept, ordered)
    _refuse(doubts)
    return placed


def _matched(
    shapes: Shapes, leaves: Leaves, names: Rules, fresh: set[str], ordered: bool
) -> tuple[Names, Names]:
    """(path of each tensor that has a place, doubts by a rule that ends them)."""
    placed = _placed_by_rules(shapes, leaves, names)
    theirs = _modules_there(shapes)
    ours = _modules_here(leaves)
    others = {name: module for name, module in theirs.items() if name not in placed}
    free = {path: module for path, module in ours.items() if path not in placed.values()}
    places, doubts = _places(others, free, fresh, ordered)
    for name, path in (placed | places).items():
        if name in theirs and path in ours:
            arrays = ours[path].arrays
            for leaf, tensor in theirs[name].arrays.items():
                if leaf in arrays:
                    placed.setdefault(tensor, arrays[leaf])
    return placed, doubts


def _placed_by_rules(names: Iterable, leaves: Leaves, rules: Rules) -> Names:
    """Path of each tensor that a rule names."""
    placed: Names = {}
    for pattern, replacement in rules:
        check_pattern(pattern, "names")
        for name in names:
            match = re.fullmatch(pattern, name)
            if match is None or name in placed:
                continue
            path = placed[name] = match.expand(replacement)
            if path not in leaves:
                hint = closest(path, leaves)
                text = f"names: {name!r} is to become {path!r}, which is not there.{hint}"
                raise ConfigError(text)
    return placed


def _is_as_defined(names: Iterable) -> bool:
    """Whether tensors could come in the order in which a network defines its layers.

    PyTorch saves the parameters of a layer side by side, the weight before the bias; shuffled names
    break that. Sorted ones tell nothing.
    """
    names = list(names)
    arrays: dict = {}  # of each layer
    found = []
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            found.append(name)
            arrays.setdefault(layer, []).append(name)
    defined = [name for own in arrays.values() for name in sorted(own, reverse=True)]
    return found == defined and names != sorted(names)


def _places(theirs: Modules, ours: Modules, fresh: set[str], ordered: bool) -> tuple[Names, Names]:
    """(path of each weight that has one, doubts about alike ones by a rule that ends them)."""
    known = _known_places(theirs, ours)
    groups = _alike(theirs, ours, fresh)
    ordered = ordered and _turns(theirs, groups, 0) == _turns(ours, groups, 1)
    places: Names = {}
    doubts = {}
    for names, paths in groups:
        decided, doubt = _decided(names, paths, known, ordered)
        places |= decided
        if doubt:
            first = names[0]
            rule = str((re.escape(first), paths[0]))
            which = f"{', '.join(names)} {theirs[first].shape} could each be {', '.join(paths)}"
            doubts[rule] = f"{which}: {doubt}."
    return _with_others(theirs, ours, known, places), doubts


def _alike(theirs: Modules, ours: Modules, fresh: set[str]) -> list[Group]:
    """All groups; those of ours that are `fresh` fill up groups of any form."""
    forms: dict = collections.defaultdict(lambda: ([], []))
    for side, modules in enumerate((theirs, ours)):
        for name, module in modules.items():
            form = (module.shape, frozenset(module.arrays))
            forms[form][side].append(name)
    groups = []
    for names, same in forms.values():
        paths = [path for path in same if path not in fresh] or same
        if 0 < len(paths) < len(names):
            kind = ours[paths[0]].kind
            left = [path for path in ours if path in fresh]
            other = [path for path in left if ours[path].kind == kind]
            paths = [path for path in ours if path in same or path in other]
        if len(paths) == len(names):
            groups.append((names, paths))
            fresh = fresh.difference(paths)
    return groups


def _turns(modules: Modules, groups: list[Group], side: int) -> list[tuple]:
    """(kind, number of its group) of each module in a group, in the order of each kind."""
    group_of: dict = {}
    for i, group in enumerate(groups):
        group_of |= dict.fromkeys(group[side], i)
    grouped = [name for name in modules if name in group_of]
    turns = [(modules[name].kind, group_of[name]) for name in grouped]
    return sorted(turns, key=operator.itemgetter(0))


def _decided(names: Paths, paths: Paths, known: Names, ordered: bool) -> tuple[Names, str]:
    """Places of alike layers, and why they are a guess; "" where order or names decide."""
    in_order = paths
    if not all(re.fullmatch(_OURS, path) for path in paths):
        in_order = _ranked(paths)
    by_name = {name: known.get(name, "") for name in names}
    if set(by_name.values()) != set(paths):
        by_name = dict(zip(_ranked(names), in_order))
    by_order = dict(zip(names, in_order)) if ordered else {}
    pairs = itertools.combinations(by_order, 2)
    disagree = any(_is_before(*pair) is False for pair in pairs)
    doubt = ""
    if not by_order and not by_name:
        doubt = "neither an order nor their names tell"
    elif disagree or (by_order and by_name and by_order != by_name):
        doubt = "their order and their names disagree"
    return by_order or by_name or dict(zip(names, paths)), doubt


def _ranked(names: Paths) -> Paths:
    """`names` in the order of the numbers in them; [] where these do not tell."""
    if any(_is_before(*pair) is None for pair in itertools.combinations(names, 2)):
        return []
    return sorted(names, key=_natural)


def _is_before(first: str, second: str) -> bool | None:
    """Whether `first` has the lower number where the names begin to differ; None if no number does.

    "body.0" is before "body.1.conv"; "stem" and "body.0" tell nothing.
    """
    for one, other in zip(_natural(first), _natural(second)):
        if one != other and isinstance(one, int):
            return one < other
        if one != other:
            break
    return None


def _known_places(theirs: Modules, ours: Modules) -> Names:
    """Our weight of each whose name is known here.

    A prefix of half or more of the names, e.g. "backbone.", is passed over.
    """
    counts: collections.Counter[str] = collections.Counter()
    for name in theirs:
        parts = name.split(".")[:-1]
        counts.update(itertools.accumulate(f"{part}." for part in parts))
    shared = [prefix for prefix in counts if 2 * counts[prefix] >= len(theirs)]
    options = [_known_under(prefix, theirs, ours) for prefix in ("", *shared)]
    return max(options, key=len)  # the first of the longest


def _known_under(prefix: str, theirs: Modules, ours: Modules) -> Names:
    """`_known_places` of the names without `prefix`."""
    places: Names = {}
    blocks: list[str] = []
    free = {module.name: path for path, module in ours.items()}
    for weight in sorted(theirs, key=_natural):
        module = theirs[weight]
        inner = module.name.removeprefix(prefix)
        name = _normal(inner.replace(".", "/"), blocks)
        for pattern, replacement in _MODULES:
            match = re.fullmatch(pattern, name)
            place = match.expand(replacement) if match else ""
            if place in free and ours[free[place]].kind == module.kind:
                places[weight] = free.pop(place)
                break
    return places


def _normal(name: str, blocks: list[str]) -> str:
    """A name with the stages of the geometric-limit study, and the blocks of MobileNet V2, numbered
    as here and in torchvision. blocks: of MobileNet V2 that came before; a new one is added.
    """
    for number in range(2, 6):
        name = name.replace(f"conv{number}_x", f"layer{number - 1}")
    block = re.match(_MOBILE_BLOCK, name)
    if block is None:
        return name
    if block[0] not in blocks:
        blocks.append(block[0])
    return f"block{blocks.index(block[0])}{name[block.end() :]}"


def _with_others(theirs: Modules, ours: Modules, known: Names, places: Names) -> Names:
    """`places` with those of layers of other forms, for the report of misfits and for fresh layers.

    They go by known names, then by their order from the last on, to modules outside of blocks.
    """
    taken = set(places.values())
    places = {name: path for name, path in known.items() if path not in taken} | places
    outside = [path for path in ours if "/" not in ours[path].name]
    for name in reversed(theirs):
        if name in places:
            continue
        kind = theirs[name].kind
        free = [path for path in outside if path not in places.values()]
        fitting = [path for path in free if ours[path].kind == kind]
        if fitting:
            places[name] = fitting[-1]
    return places


def _refuse(doubts: Names) -> None:
    """Raises ConfigError, with the way out, for layers whose places nothing decides."""
    if doubts:
        rule = next(iter(doubts))
        way_out = f"Say it with names=({rule}, ...), of the weights: all else follows"
        lines = ["does not tell which layers are which:", *doubts.values(), way_out]
        raise ConfigError("", why="\n  ".join(lines))


def torch_names(like: PyTree) -> Names:
    """Path in one of our networks of each tensor of its state dict, by PyTorch's name.

    ResNets and MobileNet V2 have torchvision's names, all others their own: `stage1/conv` becomes
    `stage1.conv`.
    """
    names: Names = {}
    modules = _modules_here(named_leaves(like))
    is_mobilenet = "params/block0/project/kernel" in modules
    for module in modules.values():
        if is_mobilenet:
            theirs = _mobilenet_v2_name(module.name, modules)
        else:
            theirs = _torchvision_name(module.name)
        names |= {f"{theirs}.{leaf}": path for leaf, path in module.arrays.items()}
    return names


def _torchvision_name(module: str) -> str:
    name = re.sub(r"^stage(\d+)_block(\d+)", r"layer\1.\2", module)
    name = name.replace("shortcut_conv", "downsample.0").replace("shortcut_bn", "downsample.1")
    return name.replace("/", ".")


def _mobilenet_v2_name(module: str, modules: Modules) -> str:
    block, _, layer = module.partition("/")
    if not layer:
        last = sum(path.endswith("/project/kernel") for path in modules) + 1
        return _MOBILENET_V2_OUTSIDE[module].format(last=last)
    expands = f"params/{block}/expand/kernel" in modules
    number = int(block.removeprefix("block")) + 1
    inside = _MOBILENET_V2_INSIDE[expands]
    return f"features.{number}.conv.{inside[layer]}"


# Layouts ------------------------------------------------------------------------------------------


def _is_flax_kernel(path: str, leaf: Any) -> bool:
    return leaf.ndim > 1 and last_name(path) == "kernel"


def _flattened(leaves: Leaves, image_channels: int) -> dict[str, int]:
    """{path of the kernel that sees flattened images: their channels}; {} if there is none."""
    modules = _modules_here(leaves).values()
    convs = [module for module in modules if module.kind > 2]
    if not all(re.fullmatch(r"conv\d+", module.name) for module in convs):
        return {}  # residual and such: an average pool before `fc`
    channels = convs[-1].shape[0] if convs else image_channels
    for path in ("params/dense1/kernel", "params/fc/kernel"):
        if path in leaves:
            fits = leaves[path].shape[0] % channels == 0
            return {path: channels} if fits else {}
    return {}


def _from_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """A kernel in Flax's layout.

    channels: those of images that it sees flattened, PyTorch's channels first; else 1.
    """
    array = _swapped(array, channels, -1)
    outputs, inputs, *window = range(array.ndim)
    return array.transpose(*window, inputs, outputs)


def _to_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of `_from_torch`."""
    *window, inputs, outputs = range(array.ndim)
    array = array.transpose(outputs, inputs, *window)
    return _swapped(array, -1, channels)


def _swapped(array: np.ndarray, *axes: int) -> np.ndarray:
    """The two axes that make up all but the first change places."""
    apart = array.reshape(len(array), *axes)
    return apart.swapaxes(1, 2).reshape(array.shape)


def to_variables(
    state_dict: Mapping[str, Any],
    like: PyTree,
    *,
    names: Rules = (),
    fresh: str = "",
    image_channels: int = 1,
) -> PyTree:
    """The tensors of a PyTorch state dict in the structure, shapes and types of `like`.

    state_dict: arrays or tensors by name; sorted names tell no order of layers, see `name_map`.
    Weights that `torch.nn.utils.prune` keeps as `weight_orig` and `weight_mask` become their
    product (`_merge_pruned`).
    like: variables of one of our networks, or their shape structs; with `names` (see `name_map`)
    any pytree. Arrays called `kernel` are brought into Flax's layouts, all others stay as they are;
    `num_batches_tracked` is left out.
    fresh: pattern of whole paths that stay as in `like`, whatever the state dict has for them, e.g.
        `CLASSIFIER`.
    image_channels: of the images, for networks that begin with a dense layer: PyTorch flattens
    channels first. Returns NumPy arrays. Raises ConfigError, which names the tensors, unless all
    of both sides fit one another, for equally shaped layers that nothing tells apart, for values
    that are no weights (integers, bool, complex, NaN, infinities, beyond the type in `like`), and
    for a `fresh` that matches nothing.
    """
    arrays = {str(name): _array(_of_torch, value, name) for name, value in state_dict.items()}
    ordered = _is_as_defined(arrays)
    arrays = _merge_pruned(arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    leaves = named_leaves(like)
    kept = kernels.matching(like, fresh, "fresh")
    placed, doubts = _matched(shapes, leaves, names, kept, ordered)
    fitting = _fitting(arrays, placed, leaves, kept)
    _refuse(doubts)
    flattened = _flattened(leaves, image_channels)
    for path, array in fitting.items():
        if _is_flax_kernel(path, array):
            array = _from_torch(array, flattened.get(path, 1))
        fitting[path] = array.astype(leaves[path].dtype)
    return map_named(lambda path, leaf: fitting.get(path, leaf), like)


def _fitting(arrays: Arrays, placed: Names, leaves: Leaves, kept: set[str]) -> Arrays:
    """The array of each path; raises ConfigError unless all of both sides fit.

    kept: paths that need no array.
    """
    fitting: Arrays = {}
    misfits: dict = {group: [] for group in _GROUPS}
    for name, array in arrays.items():
        path = placed.get(name)
        if path in kept or (path is None and name.endswith(f".{_COUNTER}")):
            continue
        if path is None or path in fitting:
            misfits["unexpected"].append(f"{name} {array.shape}")
            continue
        fitting[path] = array
        group, text = _misfit(array, path, leaves[path])
        misfits[group].append(f"{name} {text}")
    for path in sorted(leaves.keys() - fitting.keys() - kept):
        shape = tuple(leaves[path].shape)
        misfits["missing"].append(f"{path} {shape}")
    right = len(misfits.pop("right"))
    if any(misfits.values()):
        count = f"{right} of {len(leaves)} arrays do"
        raise ConfigError("", why=f"does not fit the network; {count}.\n{_report(misfits)}")
    return fitting


def _misfit(array: Any, path: str, leaf: Any) -> tuple:
    """(group of `_GROUPS`, text) of an array that is to be the one at `path`."""
    needed = tuple(leaf.shape)
    if _is_flax_kernel(path, leaf):
        needed = _torch_shape(needed)
    if array.shape != needed:
        return "wrong", f"is {array.shape}, for {path} it must be {needed}"
    dtype = np.dtype(leaf.dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    scaled = floating and array.dtype.itemsize < 2  # float8, with scales of its own
    kind = np.floating if floating else dtype
    if scaled or not jnp.issubdtype(array.dtype, kind):
        return "no weights", f"is {array.dtype}, to be {dtype}"
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if not np.isfinite(converted).all():
        return "no weights", f"holds NaN or values beyond {dtype}"
    return "right", ""


def _report(misfits: Mapping) -> str:
    lines = []
    for group, texts in misfits.items():
        line = f"  {group}: {'; '.join(texts[:4])}"
        if len(texts) > 4:
            line += f", and {len(texts) - 4} more"
        if texts:
            lines.append(line)
    for group, pattern, hint in _HINTS:
        if any(re.search(pattern, text) for text in misfits[group]):
            lines.append(f"  {hint}")
    return "\n".join(lines).removesuffix(".")


def _merge_pruned(state_dict: Arrays) -> Arrays:
    """The state dict with `weight_orig` times `weight_mask` as `weight`.

    As `torch.nn.utils.prune.remove` makes it, for every tensor of which it holds both; all others
    stay. What the masks left out is zero then, and `masks.nonzero` of the params gives the masks
    again.
    """
    merged = {}
    for name, array in state_dict.items():
        base, _, ending = name.rpartition("_")
        if ending == "orig" and f"{base}_mask" in state_dict:
            mask = np.asarray(state_dict[f"{base}_mask"])
            if mask.shape != array.shape or not np.isin(mask, (0, 1)).all():
                allowed = "allowed are 0 and 1, of its shape"
                raise ConfigError(f"{base}_mask is no mask of {name}: {allowed}.")
            merged[base] = np.where(mask, array, array.dtype.type(0))
        elif ending != "mask" or f"{base}_orig" not in state_dict:
            merged[name] = array
    return merged


def count_zeros(arrays: Leaves) -> tuple[int, int]:
    """(zeros, entries) of the kernels among arrays by path."""
    zeros = entries = 0
    for path, array in arrays.items():
        if is_kernel(path):
            entries += array.size
            zeros += int(np.sum(np.asarray(array) == 0))
    return zeros, entries


def to_torch(variables: PyTree, names: Names | None = None, *, image_channels: int = 1) -> Arrays:
    """The state dict of `variables`: the inverse of `to_variables`.

    It is for `torch_module.load_state_dict`. names: path of each tensor by PyTorch's name, as
    `name_map` and `torch_names` give it (default: the latter). Every batch norm gets the
    `num_batches_tracked` that PyTorch expects, 0. Raises ValueError for paths that `names` leaves
    out.
    """
    leaves = named_leaves(variables)
    names = torch_names(variables) if names is None else names
    absent = sorted(leaves.keys() - names.values())
    if absent:
        raise ValueError(
            f"names leave out {', '.join(absent[:4])}; {len(absent)} of {len(leaves)} arrays. "
            "Without `names`, give whole variables of one of our networks: {'params': ..., ...}."
        )
    flattened = _flattened(leaves, image_channels)
    state_dict = {}
    for name, path in names.items():
        array = np.asarray(leaves[path])
        if _is_flax_kernel(path, array):
            array = _to_torch(array, flattened.get(path, 1))
        state_dict[name] = np.array(array, order="C")
        module, _, leaf = name.rpartition(".")
        if leaf == "running_var":
            state_dict[f"{module}.{_COUNTER}"] = np.zeros((), np.int64)
    return state_dict
