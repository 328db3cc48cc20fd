"""Weights of PyTorch networks into ours and back: files, names and layouts.

    state_dict = pretrained.read("resnet50.safetensors")
    variables = pretrained.to_variables(state_dict, jax.eval_shape(model.init, key, images))
    pretrained.write("pruned.safetensors", pretrained.to_torch(variables))

A state dict is a flat dict of NumPy arrays by PyTorch's names, in its layouts: convolutions [out,
in / groups, height, width], dense layers [out, in]. In memory and in files of `torch.save` it comes
in the order in which the network defines its layers, in safetensors files in none. PyTorch itself
is needed for its own file formats only.
"""

import collections
import importlib.util
import itertools
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sparsity_jax import tables, trees

PyTree = Any
StateDict = Mapping[str, np.ndarray]
Shape = Sequence[int]
Rules = Sequence[tuple[str, str]]
Names = dict[str, str]
Group = tuple[list[str], list[str]]  # PyTorch's modules, and ours
KINDS = ("conv", "dense", "norm")  # of modules

SAFETENSORS = ".safetensors"
TORCH_FILES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
DTYPES = {  # of safetensors, and NumPy's
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BF16": "bfloat16",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}

# Under which names a checkpoint holds its state dict; the first counts. Averaged weights (EMA) only
# where alone.
STATE_DICTS = (
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
MODULES = (
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
MOBILE_BLOCK = r"^(?:features/\d+(?=/conv/)|blocks/\d+/\d+)"  # of MobileNet V2
# Modules of ours whose order in the network is known by their names; of others only numbers tell.
OURS = r"(?:conv|bn|dense|dense_bn)\d+|final_bn|fc|(?:stage\d+_)?block\d+/\w+"

# The arrays of a module: PyTorch's name of each by ours.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
COUNTER = "num_batches_tracked"  # of a batch norm; nothing here depends on it
CLASSIFIER = r"params/fc/.*"

# What else to say where the text of a misfit of this group holds the pattern.
HINTS = (
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


@jax.tree_util.register_pytree_with_keys_class
class Unordered(dict):
    """A state dict whose order means nothing, as in a safetensors file; a pytree as any dict."""

    def tree_flatten_with_keys(self) -> tuple[list, tuple]:
        names = sorted(self)
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], tuple(names)

    @classmethod
    def tree_unflatten(cls, names: tuple, arrays: Iterable) -> "Unordered":
        return cls(zip(names, arrays))


# Files --------------------------------------------------------------------------------------------


def check(path: str | os.PathLike) -> None:
    """Raises ConfigError unless `path` is a weight file with a whole header that can be read."""
    path = pathlib.Path(path)
    suffixes = ", ".join((SAFETENSORS, *TORCH_FILES))
    if path.suffix not in (SAFETENSORS, *TORCH_FILES):
        raise tables.ConfigError("", str(path), allowed=f"a file of weights, {suffixes}")
    if not path.is_file():
        raise tables.ConfigError("", str(path), why="but there is no such file")
    with tables.blaming("", str(path)):
        tables.check_memory(path.stat().st_size, "which has")
    if path.suffix == SAFETENSORS:
        _check_header(path)
    elif importlib.util.find_spec("torch") is None:
        raise tables.ConfigError(
            "",
            str(path),
            why="which only PyTorch reads: `pip install torch`, or convert it to .safetensors "
            "where PyTorch is installed",
        )


def _check_header(path: pathlib.Path) -> None:
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise tables.ConfigError(
            "",
            str(path),
            why="which is no whole safetensors file (cut short, or of another format): "
            f"{str(error).rstrip('.')}",
        ) from None


def read(path: str | os.PathLike, key: str = "") -> dict[str, np.ndarray]:
    """The state dict in a `.safetensors` file, or in one that `torch.save` wrote (needs PyTorch).

    key: name of the state dict in a checkpoint that holds several, e.g. "model_ema"; by default the
    first of `STATE_DICTS`, or the whole file. Nothing in a file is executed: pickled modules are
    refused. That of a safetensors file is `Unordered`. Raises ConfigError for files that are cut
    short or something else, for tensors that are no plain arrays (sparse, quantized, complex,
    float8), and for files and shapes larger than the memory.
    """
    path = pathlib.Path(path)
    with tables.within("path"):
        check(path)
    if path.suffix != SAFETENSORS:
        return _read_torch(path, key)
    if key:
        raise tables.ConfigError("key", key, allowed=f"none: {path} holds one state dict")
    entries = sorted(safetensors.deserialize(path.read_bytes()))
    return Unordered((name, _array_of(entry, f"{path}: {name}")) for name, entry in entries)


def _array_of(entry: Mapping[str, Any], name: str) -> np.ndarray:
    """The array of an entry of a safetensors file."""
    if entry["dtype"] not in DTYPES:
        raise tables.ConfigError(f"{name} is of type {entry['dtype']}; known: {', '.join(DTYPES)}.")
    flat = np.frombuffer(entry["data"], jnp.dtype(DTYPES[entry["dtype"]]))
    try:
        return flat.reshape(entry["shape"])
    except (ValueError, OverflowError) as error:  # of empty arrays: too many axes, or too long ones
        shape = tables.shortened(entry["shape"])
        raise tables.ConfigError(f"{name} has the shape {shape}, of no array: {error}.") from None


def _read_torch(path: pathlib.Path, key: str) -> dict[str, np.ndarray]:
    import torch

    _check_sums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can break PyTorch's readers anywhere
        reason = _reason(error)
        raise tables.ConfigError(f"{path} cannot be read as weights alone: {reason}") from None
    arrays = {}
    for name, value in _state_dict_in(content, key, path).items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise tables.ConfigError(
                f"{path} holds {name!r}, of type {type(value).__name__}; allowed: tensors by name, "
                f"alone or as {', '.join(map(repr, STATE_DICTS))}."
            )
        size = value.numel() * value.element_size()  # one stored number may stand for any shape
        with tables.within(f"{path}: {name}"):
            tables.check_memory(size, f"has the shape {tuple(value.shape)} and takes")
        arrays[name] = _array(value, f"{path}: {name}")
    return arrays


def _check_sums(path: pathlib.Path) -> None:
    """Raises ConfigError where the checksums of `torch.save`, which PyTorch passes over, differ."""
    try:
        if not zipfile.is_zipfile(path):
            return  # of another format, or cut short, as PyTorch will find
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever else is damaged
        damaged = str(error)
    if damaged is not None:
        raise tables.ConfigError(
            f"{path} is damaged: {damaged} has another checksum. Copy it again."
        )


def _reason(error: Exception) -> str:
    """Why `torch.load` failed; PyTorch's own text may advise to read the file nevertheless."""
    reason = "it holds other objects than tensors"
    if not isinstance(error, pickle.UnpicklingError):
        reason = _first_line(error) or "it ends too early"
    elif foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"beside tensors it holds an object of {foreign[1]}, which reading could execute. "
            "Where you trust the file, load it with PyTorch and save its state dict alone."
        )
    return (
        f"{reason}. Is it cut short, or another format? Of a pickled network save its "
        "`state_dict()` instead."
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _state_dict_in(content: Any, key: str, path: pathlib.Path) -> Mapping:
    """The state dict inside a checkpoint; raises ConfigError if there is none."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise tables.ConfigError(f"{path} holds {kind}; allowed: tensors by name.")
    if key:
        if not isinstance(content.get(key), Mapping):
            raise tables.ConfigError("key", key, known=map(str, content))
        return content[key]
    for _ in STATE_DICTS:  # one inside another, as deep as is sensible: a dict can also hold itself
        held = [name for name in STATE_DICTS if isinstance(content.get(name), Mapping)]
        if not held:
            return content
        content = content[held[0]]
    raise tables.ConfigError(f"{path} holds dict in dict; allowed: tensors by name.")


def _array(value: Any, name: str) -> np.ndarray:
    """A tensor of PyTorch, or any array, as a NumPy array; raises ConfigError for what is none."""
    try:
        if not hasattr(value, "detach"):
            return np.asarray(value)
        if str(value.dtype) == "torch.bfloat16":
            return value.detach().float().numpy(force=True).astype(jnp.bfloat16)
        return value.numpy(force=True)
    except (TypeError, RuntimeError, ValueError) as error:
        kind = getattr(value, "dtype", type(value).__name__)
        raise tables.ConfigError(
            f"{name} is no plain array ({kind}): {_first_line(error)}. Convert it to float32 with "
            "PyTorch."
        ) from None


def write(path: str | os.PathLike, state_dict: StateDict) -> pathlib.Path:
    """Writes a state dict as safetensors, bit by bit, and returns its path.

    The file appears whole or not at all.
    """
    path = pathlib.Path(path)
    if path.suffix != SAFETENSORS:
        raise tables.ConfigError("path", str(path), allowed="*.safetensors, as it is written")
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
    """A layer of either side."""

    shape: tuple[int, ...]  # of its weight, in PyTorch's layout
    arrays: dict[str, str]  # their names or paths, by PyTorch's names inside the module

    @property
    def kind(self) -> str:
        return _kind(self.shape)

    @property
    def form(self) -> tuple:
        """What has to agree with the other side's."""
        return self.shape, frozenset(self.arrays)


def _kind(shape: Shape) -> str:
    """The kind of module by the shape of its weight."""
    return {1: "norm", 2: "dense"}.get(len(shape), "conv")


Modules = Mapping[str, Module]


def _modules(shapes: Mapping[str, Shape], pattern: str, leaves: Mapping[str, str]) -> Modules:
    """The modules of `shapes` that have a weight, by name, in its order.

    pattern: of a name, which captures those of the module and of its array. leaves: PyTorch's name
    of each array that counts.
    """
    arrays: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in shapes:
        match = re.fullmatch(pattern, name)
        if match and match[2] in leaves:
            arrays[match[1] or ""][leaves[match[2]]] = name
    return {
        name: Module(tuple(shapes[held["weight"]]), held)
        for name, held in arrays.items()
        if "weight" in held
    }


def _modules_there(shapes: Mapping[str, Shape]) -> Modules:
    """PyTorch's modules, in the order of the tensors."""
    leaves = {name: name for name in LEAVES.values()}
    return _modules(shapes, r"(?:(.*)\.)?(\w+)", leaves)


def _modules_here(paths: Mapping[str, Any]) -> Modules:
    """Our modules, in the order in which PyTorch's networks define theirs."""
    shapes = {path: _torch_shape(leaf.shape) for path, leaf in paths.items()}
    modules = _modules(shapes, r"(?:params|batch_stats)/(.+)/(\w+)", LEAVES)
    return {name: modules[name] for name in sorted(modules, key=_definition_order)}


def _of_kind(modules: Modules, kind: str) -> list[str]:
    return [name for name, module in modules.items() if module.kind == kind]


def _torch_shape(shape: Shape) -> tuple[int, ...]:
    return (*shape[:-3:-1], *shape[:-2])


def _definition_order(name: str) -> tuple:
    """Sorts modules of one kind as PyTorch's networks define them."""
    block, _, layer = name.partition("/")
    if layer:
        return (1, _natural(block), layer != "expand", _natural(layer))
    first, last = re.search(r"\D1$", name), name in ("fc", "final_bn")
    return (0 if first else 3 if last else 2, _natural(name))


def _natural(name: str) -> list[str | int]:
    """Sorts by the numbers inside: "conv2" before "conv10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# Which layer is which -----------------------------------------------------------------------------


class Undecided(NamedTuple):
    """Weights of one shape that could be placed in several ways."""

    tensors: list[str]
    shape: tuple[int, ...]
    paths: list[str]
    reason: str


def name_map(
    shapes: Mapping[str, Shape],
    like: PyTree,
    names: Rules = (),
    *,
    fresh: str = "",
    ordered: bool = True,
) -> dict[str, str]:
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
    ordered = ordered and _is_as_defined(shapes)
    placed, undecided = _matched(shapes, like, names, fresh, ordered)
    _refuse_undecided(undecided)
    return placed


def _matched(
    shapes: Mapping[str, Shape], like: PyTree, names: Rules, fresh: str, ordered: bool
) -> tuple[dict[str, str], list[Undecided]]:
    """(path of each tensor that has a place, layers whose places are a guess)."""
    paths = trees.named_leaves(like)
    placed = _placed_by_rules(shapes, paths, names)
    theirs, ours = _modules_there(shapes), _modules_here(paths)
    our_names = {module.arrays["weight"]: name for name, module in ours.items()}
    places, others = {}, {}
    for name, module in theirs.items():
        path = placed.get(module.arrays["weight"])
        if path is None:
            others[name] = module
        elif path in our_names:
            places[name] = our_names[path]
    free = {name: module for name, module in ours.items() if name not in places.values()}
    by_structure, undecided = _places(others, free, _fresh_modules(free, like, fresh), ordered)
    for name, place in (places | by_structure).items():
        for leaf, tensor in theirs[name].arrays.items():
            if leaf in ours[place].arrays:
                placed.setdefault(tensor, ours[place].arrays[leaf])
    return {name: placed[name] for name in shapes if name in placed}, undecided


def _placed_by_rules(
    names: Iterable[str], paths: Mapping[str, Any], rules: Rules
) -> dict[str, str]:
    """Path of each tensor that a rule names."""
    placed: dict[str, str] = {}
    for pattern, replacement in rules:
        trees.check_pattern(pattern, "names")
        for name in names:
            match = re.fullmatch(pattern, name)
            if match is None or name in placed:
                continue
            path = placed[name] = match.expand(replacement)
            if path not in paths:
                raise tables.ConfigError(
                    f"names: {name!r} is to become {path!r}, which is not there."
                    f"{tables.closest(path, paths)}"
                )
    return placed


def _is_as_defined(names: Iterable[str]) -> bool:
    """Whether tensors could come in the order in which a network defines its layers.

    PyTorch saves the parameters of a layer side by side, the weight before the bias; sorted names
    and shuffled ones break that.
    """
    last, seen = None, set()
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            continue
        begins_again = module != last and module in seen
        if begins_again or (module == last and leaf == "weight"):
            return False
        last = module
        seen.add(module)
    return True


def _fresh_modules(ours: Modules, like: PyTree, fresh: str) -> set[str]:
    """Those of our modules whose weight matches `fresh`."""
    if not fresh:
        return set()
    matches = trees.matching(like, fresh, "fresh")
    return {name for name, module in ours.items() if matches[module.arrays["weight"]]}


def _places(
    theirs: Modules, ours: Modules, fresh: set[str], ordered: bool
) -> tuple[Names, list[Undecided]]:
    """(our module of each of PyTorch's that has one, those among alike ones that are a guess)."""
    known = _known_places(theirs, ours)
    groups = _alike(theirs, ours, fresh)
    ordered = ordered and _come_in_one_order(theirs, ours, groups)
    places: Names = {}
    undecided = []
    for names, targets in groups:
        decided, doubt = _decided(names, targets, known, ordered)
        places |= decided
        if doubt:
            tensors = [theirs[name].arrays["weight"] for name in names]
            paths = [ours[name].arrays["weight"] for name in targets]
            undecided.append(Undecided(tensors, theirs[names[0]].shape, paths, doubt))
    return _with_others(theirs, ours, known, places), undecided


def _alike(theirs: Modules, ours: Modules, fresh: set[str]) -> list[Group]:
    """Modules of one form, where both sides have as many; fresh ones of any form fill up ours."""
    groups: list[Group] = []
    free = set(fresh)
    for form in dict.fromkeys(module.form for module in theirs.values()):
        names = [name for name, module in theirs.items() if module.form == form]
        alike = [name for name, module in ours.items() if module.form == form]
        targets = [name for name in alike if name not in fresh] or alike
        if targets and len(targets) < len(names):
            every = _of_kind(ours, _kind(form[0]))
            targets = [name for name in every if name in alike or name in free]
        if len(targets) == len(names):
            groups.append((names, targets))
            free.difference_update(targets)
    return groups


def _come_in_one_order(theirs: Modules, ours: Modules, groups: list[Group]) -> bool:
    """Whether the layers of each kind in `groups` come in one order of forms on both sides."""
    in_turn: Names = {}
    for names, targets in groups:
        in_turn |= dict(zip(names, targets))
    for kind in KINDS:
        places = [in_turn[name] for name in _of_kind(theirs, kind) if name in in_turn]
        if places != [place for place in _of_kind(ours, kind) if place in places]:
            return False
    return True


def _decided(
    names: list[str], targets: list[str], known: Names, ordered: bool
) -> tuple[Names, str]:
    """Places of alike layers, and why they are a guess; "" where order or names decide."""
    in_order = targets
    if not all(re.fullmatch(OURS, name) for name in targets):
        in_order = _ranked(targets)
    by_order = dict(zip(names, in_order)) if ordered else {}
    by_name = dict(zip(_ranked(names), in_order))
    if {known.get(name) for name in names} == set(targets):
        by_name = {name: known[name] for name in names}
    doubt = ""
    if not by_order and not by_name:
        doubt = "neither an order nor their names tell"
    elif by_order and by_name and by_order != by_name:
        doubt = "their order and their names disagree"
    elif ordered and any(_is_before(*pair) is False for pair in itertools.combinations(names, 2)):
        doubt = "their order and the numbers in their names disagree"
    return by_order or by_name or dict(zip(names, targets)), doubt


def _ranked(names: list[str]) -> list[str]:
    """`names` in the order of the numbers in them; [] where these do not tell."""
    ranks: dict[str, int] = {}
    for name in names:
        before = [_is_before(other, name) for other in names if other != name]
        if None in before:
            return []
        ranks[name] = before.count(True)
    return sorted(names, key=ranks.__getitem__)


def _is_before(first: str, second: str) -> bool | None:
    """Whether `first` has the lower number where the names begin to differ; None if no number does.

    "body.0" is before "body.1.conv"; "stem" and "body.0" tell nothing.
    """
    for one, other in zip(_natural(first), _natural(second)):
        if one == other:
            continue
        if isinstance(one, int) and isinstance(other, int):
            return one < other
        break
    return None


def _known_places(theirs: Modules, ours: Modules) -> Names:
    """Our module of each name that is known here.

    A prefix of half or more of the names, e.g. "backbone.", is passed over.
    """
    counts: collections.Counter[str] = collections.Counter()
    for name in theirs:
        counts.update(name[: dot.end()] for dot in re.finditer(r"\.", name))
    shared = [prefix for prefix in counts if 2 * counts[prefix] >= len(theirs)]
    options = [_known_under(prefix, theirs, ours) for prefix in ("", *shared)]
    return max(options, key=len)  # the first of the longest


def _normal(names: list[str]) -> list[str]:
    """Names with the blocks of MobileNet V2 and the stages of the geometric-limit study numbered
    as here and in torchvision.
    """
    blocks = re.findall(MOBILE_BLOCK, "\n".join(names), re.MULTILINE)
    ranks = list(dict.fromkeys(blocks))
    numbered = []
    for name in names:
        name = re.sub(MOBILE_BLOCK, lambda match: f"block{ranks.index(match[0])}", name)
        numbered.append(re.sub(r"^conv(\d)_x", lambda match: f"layer{int(match[1]) - 1}", name))
    return numbered


def _known_under(prefix: str, theirs: Modules, ours: Modules) -> Names:
    """`_known_places` of the names without `prefix`."""
    names = sorted(theirs, key=_natural)
    short = [name.removeprefix(prefix).replace(".", "/") for name in names]
    places: Names = {}
    for name, text in zip(names, _normal(short)):
        for pattern, replacement in MODULES:
            match = re.fullmatch(pattern, text)
            place = match.expand(replacement) if match else ""
            if place in ours.keys() - places.values() and ours[place].kind == theirs[name].kind:
                places[name] = place
                break
    return places


def _with_others(theirs: Modules, ours: Modules, known: Names, places: Names) -> Names:
    """`places` with those of layers of other forms, for the report of misfits and for fresh layers.

    They go by known names, then by their order: the last dense layer to our `fc`, others to
    numbered layers.
    """
    result = dict(places)
    for name in theirs:
        if name not in places and known.get(name, "") in ours.keys() - result.values():
            result[name] = known[name]
    for kind in KINDS:
        left = [name for name in _of_kind(theirs, kind) if name not in result]
        free = [name for name in _of_kind(ours, kind) if name not in result.values()]
        if left and "fc" in free:
            result[left.pop()] = "fc"
        numbered = [name for name in free if re.fullmatch(r"\w+\d", name)]
        result |= dict(zip(left, numbered))
    return result


def _refuse_undecided(undecided: list[Undecided]) -> None:
    """Raises ConfigError, with the way out, for layers whose places nothing decides."""
    if not undecided:
        return
    lines = ["does not tell which layers are which:"]
    for tensors, shape, paths, reason in undecided:
        lines.append(f"  {', '.join(tensors)} {shape} could each be {', '.join(paths)}: {reason}.")
    rule = (re.escape(undecided[0].tensors[0]), undecided[0].paths[0])
    lines.append(f"  Say it with names=({rule}, ...), of the weights: all else follows")
    raise tables.ConfigError("", why="\n".join(lines))


def torch_names(like: PyTree) -> dict[str, str]:
    """Path in one of our networks of each tensor of its state dict, by PyTorch's name.

    ResNets and MobileNet V2 have torchvision's names, all others their own: `stage1/conv` becomes
    `stage1.conv`.
    """
    names: Names = {}
    modules = _modules_here(trees.named_leaves(like))
    for name, module in modules.items():
        theirs = _torchvision_name(name, modules)
        names |= {f"{theirs}.{leaf}": path for leaf, path in module.arrays.items()}
    return names


def _torchvision_name(module: str, modules: Modules) -> str:
    if "block0/project" in modules:
        return _name_in_mobilenet_v2(module, modules)
    name = re.sub(r"^stage(\d+)_block(\d+)", r"layer\1.\2", module)
    name = name.replace("shortcut_conv", "downsample.0").replace("shortcut_bn", "downsample.1")
    return name.replace("/", ".")


def _name_in_mobilenet_v2(module: str, modules: Modules) -> str:
    last = sum(name.endswith("/project") for name in modules) + 1
    outside = {
        "conv1": "features.0.0",
        "bn1": "features.0.1",
        "conv2": f"features.{last}.0",
        "bn2": f"features.{last}.1",
        "fc": "classifier.1",
    }
    if module in outside:
        return outside[module]
    block, _, layer = module.partition("/")
    inside = dict(depthwise="0.0", bn1="0.1", project="1", bn2="2")
    if f"{block}/expand" in modules:
        inside = dict(expand="0.0", bn1="0.1", depthwise="1.0", bn2="1.1", project="2", bn3="3")
    number = int(block.removeprefix("block")) + 1
    return f"features.{number}.conv.{inside[layer]}"


# Layouts ------------------------------------------------------------------------------------------


def _is_flax_kernel(path: str, shape: Shape) -> bool:
    return len(shape) > 1 and re.search(r"(?:^|/)kernel(?:/value)?$", path) is not None


def _flattened(paths: Mapping[str, Any], image_channels: int) -> dict[str, int]:
    """{path of the kernel that sees flattened images: their channels}; {} if there is none."""
    modules = _modules_here(paths)
    convs = _of_kind(modules, "conv")
    if not all(re.fullmatch(r"conv\d+", name) for name in convs):
        return {}  # residual and such: an average pool before `fc`
    path = f"params/{'dense1' if 'dense1' in modules else 'fc'}/kernel"
    channels = modules[convs[-1]].shape[0] if convs else image_channels
    if path not in paths or paths[path].shape[0] % channels:
        return {}
    return {path: channels}


def _from_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """A kernel in Flax's layout.

    channels: those of images that it sees flattened, PyTorch's channels first; else 1.
    """
    if channels > 1:
        array = array.reshape(len(array), channels, -1).swapaxes(1, 2).reshape(array.shape)
    return array.transpose(*range(2, array.ndim), 1, 0)


def _to_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of `_from_torch`."""
    array = array.transpose(-1, -2, *range(array.ndim - 2))
    if channels > 1:
        array = array.reshape(len(array), -1, channels).swapaxes(1, 2).reshape(array.shape)
    return array


def to_variables(
    state_dict: StateDict,
    like: PyTree,
    *,
    names: Rules = (),
    fresh: str = "",
    image_channels: int = 1,
) -> PyTree:
    """The tensors of a PyTorch state dict in the structure, shapes and types of `like`.

    state_dict: arrays or tensors by name; an `Unordered` one has no order of layers, see
    `name_map`. Weights that `torch.nn.utils.prune` keeps as `weight_orig` and `weight_mask` become
    their product (`merge_pruned`).
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
    arrays = {str(name): _array(value, str(name)) for name, value in state_dict.items()}
    ordered = not isinstance(state_dict, Unordered) and _is_as_defined(arrays)
    arrays = merge_pruned(arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    placed, undecided = _matched(shapes, like, names, fresh, ordered)
    paths = trees.named_leaves(like)
    matches = trees.matching(like, fresh, "fresh") if fresh else {}
    kept = {path for path, matched in matches.items() if matched}
    loaded, misfits = _fitting(arrays, placed, paths, kept)
    if any(misfits.values()):
        fitting = len(loaded) - len(misfits["wrong"]) - len(misfits["no weights"])
        count = f"{fitting} of {len(paths)} arrays do"
        why = f"does not fit the network; {count}.\n{_report(misfits)}"
        raise tables.ConfigError("", why=why)
    _refuse_undecided(undecided)
    flattened = _flattened(paths, image_channels)

    def converted(path: str, leaf: Any) -> Any:
        if path not in loaded:
            return leaf
        array = loaded[path]
        if _is_flax_kernel(path, leaf.shape):
            array = _from_torch(array, flattened.get(path, 1))
        return array.astype(leaf.dtype)

    return trees.map_named(converted, like)


def _fitting(
    arrays: StateDict, placed: Mapping[str, str], paths: Mapping[str, Any], kept: set[str]
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """(array of each path, what does not fit by its group).

    kept: paths that need no array.
    """
    loaded: dict[str, np.ndarray] = {}
    misfits: dict[str, list[str]] = {"missing": [], "unexpected": [], "wrong": [], "no weights": []}
    for name, array in arrays.items():
        path = placed.get(name)
        if path in kept or (path is None and name.endswith(f".{COUNTER}")):
            continue
        if path is None or path in loaded:
            misfits["unexpected"].append(f"{name} {array.shape}")
            continue
        loaded[path] = array
        leaf = paths[path]
        needed = _torch_shape(leaf.shape) if _is_flax_kernel(path, leaf.shape) else leaf.shape
        if array.shape != tuple(needed):
            text = f"{name} is {array.shape}, for {path} it must be {tuple(needed)}"
            misfits["wrong"].append(text)
        elif problem := _no_weights(array, np.dtype(leaf.dtype)):
            misfits["no weights"].append(f"{name} {problem}")
    for path, leaf in paths.items():
        if path not in loaded and path not in kept:
            misfits["missing"].append(f"{path} {tuple(leaf.shape)}")
    return loaded, misfits


def _no_weights(array: np.ndarray, dtype: np.dtype) -> str:
    """What makes `array` no weights of the type `dtype`; "" where it is."""
    kind = np.floating if jnp.issubdtype(dtype, jnp.floating) else dtype.type
    scaled = kind is np.floating and array.dtype.itemsize < 2  # float8, with scales of its own
    if scaled or not jnp.issubdtype(array.dtype, kind):
        return f"is {array.dtype}; allowed: {kind.__name__.rstrip('_')}"
    if not np.isfinite(array).all():
        return "holds NaN or infinite values"
    with np.errstate(over="ignore"):
        beyond = not np.isfinite(array.astype(dtype)).all()
    return f"holds values beyond {dtype}" if beyond else ""


def _report(misfits: Mapping[str, list[str]]) -> str:
    lines = []
    for group, texts in misfits.items():
        more = f", and {len(texts) - 4} more" if len(texts) > 4 else ""
        if texts:
            lines.append(f"  {group}: {'; '.join(texts[:4])}{more}")
    for group, pattern, hint in HINTS:
        if any(re.search(pattern, text) for text in misfits[group]):
            lines.append(f"  {hint}")
    return "\n".join(lines).removesuffix(".")


def merge_pruned(state_dict: StateDict) -> dict[str, np.ndarray]:
    """The state dict with `weight_orig` times `weight_mask` as `weight`.

    As `torch.nn.utils.prune.remove` makes it, for every tensor of which it holds both; all others
    stay. What the masks left out is zero then, and `masks.nonzero` of the params gives the masks
    again.
    """
    merged = {}
    for name, array in state_dict.items():
        base, _, ending = name.rpartition("_")
        partner = {"orig": f"{base}_mask", "mask": f"{base}_orig"}.get(ending, "")
        if partner not in state_dict:
            merged[name] = array
        elif ending == "orig":
            merged[base] = _masked(array, np.asarray(state_dict[partner]), name)
    return merged


def _masked(array: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
    if mask.shape != array.shape or not np.isin(mask, (0, 1)).all():
        mask_name = name.removesuffix("orig") + "mask"
        raise tables.ConfigError(
            f"{mask_name} is no mask of {name}: allowed are 0 and 1, of its shape."
        )
    return np.where(mask, array, array.dtype.type(0))


def count_zeros(arrays: Mapping[str, Any]) -> tuple[int, int]:
    """(zeros, entries) of the kernels among arrays by path."""
    zeros = entries = 0
    for path, array in arrays.items():
        if trees.is_kernel(path):
            zeros += int(np.sum(np.asarray(array) == 0))
            entries += np.size(array)
    return zeros, entries


def to_torch(
    variables: PyTree, names: Mapping[str, str] | None = None, *, image_channels: int = 1
) -> dict[str, np.ndarray]:
    """The state dict of `variables`: the inverse of `to_variables`.

    It is for `torch_module.load_state_dict`. names: path of each tensor by PyTorch's name, as
    `name_map` and `torch_names` give it (default: the latter). Every batch norm gets the
    `num_batches_tracked` that PyTorch expects, 0. Raises ValueError for paths that `names` leaves
    out.
    """
    paths = trees.named_leaves(variables)
    if names is None:
        names = torch_names(variables)
    absent = sorted(paths.keys() - names.values())
    if absent:
        raise ValueError(
            f"names leave out {', '.join(absent[:4])}; {len(absent)} of {len(paths)} arrays. "
            "Without `names`, give whole variables of one of our networks: {'params': ..., ...}."
        )
    flattened = _flattened(paths, image_channels)
    state_dict: dict[str, np.ndarray] = {}
    for name, path in names.items():
        array = np.asarray(paths[path])
        if _is_flax_kernel(path, array.shape):
            array = _to_torch(array, flattened.get(path, 1))
        state_dict[name] = np.array(array, order="C")
        module, _, leaf = name.rpartition(".")
        if leaf == "running_var":
            state_dict[f"{module}.{COUNTER}"] = np.zeros((), np.int64)
    return state_dict
