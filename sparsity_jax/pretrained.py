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
Rules = Sequence[tuple[str, str]]
TORCH_FILES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
DTYPES = {
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
}

# What PyTorch's modules are called here: a pattern of the whole name, and our module. The first row
# that leads to a module of the network counts; `#` is the rank of the captured block among all
# blocks. Modules in no row have their own names here too, or are numbered by kind in their order:
# conv1, conv2, ..., bn1, ..., dense1, ..., and the last is fc.
MODULES = (
    # ResNets: torchvision, timm and others; the geometric-limit study; wide ones
    (r"layer(\d+)\.(\d+)\.((?:conv|bn)\d)", r"stage\1_block\2/\3"),
    (r"layer(\d+)\.(\d+)\.(?:downsample|shortcut)\.0", r"stage\1_block\2/shortcut_conv"),
    (r"layer(\d+)\.(\d+)\.(?:downsample|shortcut)\.1", r"stage\1_block\2/shortcut_bn"),
    *(
        (rf"conv{stage + 1}_x\.(\d+)\.{theirs}", rf"stage{stage}_block\1/{ours}")
        for stage in range(1, 5)
        for theirs, ours in (
            *((rf"residual_function\.{3 * i}", f"conv{i + 1}") for i in range(3)),
            *((rf"residual_function\.{3 * i + 1}", f"bn{i + 1}") for i in range(3)),
            *((r"shortcut\.0", "shortcut_conv"), (r"shortcut\.1", "shortcut_bn")),
        )
    ),
    (r"block(\d+)\.layer\.(\d+)\.((?:conv|bn)\d)", r"stage\1_block\2/\3"),
    (r"block(\d+)\.layer\.(\d+)\.convShortcut", r"stage\1_block\2/shortcut_conv"),
    (r"conv1\.0", "conv1"),
    (r"conv1\.1", "bn1"),
    (r"bn1|classifier\.0", "final_bn"),
    # MobileNet V1; AlexNet for small images
    (r"layers\.(\d+)\.conv1", r"block\1/depthwise"),
    (r"layers\.(\d+)\.conv2", r"block\1/pointwise"),
    (r"layers\.(\d+)\.(bn\d)", r"block\1/\2"),
    (r"fc_bn(\d+)", r"dense_bn\1"),
    # MobileNet V2 of torchvision (its first block has no `expand`), then of timm
    (r"features\.(\d+)\.conv\.0\.0", "block#/expand"),
    (r"features\.(\d+)\.conv\.[01]\.0", "block#/depthwise"),
    (r"features\.(\d+)\.conv\.0\.1", "block#/bn1"),
    (r"features\.(\d+)\.conv\.1\.1", "block#/bn2"),
    (r"features\.(\d+)\.conv\.[12]", "block#/project"),
    (r"features\.(\d+)\.conv\.2", "block#/bn2"),
    (r"features\.(\d+)\.conv\.3", "block#/bn3"),
    (r"features\.0\.0|conv_stem", "conv1"),
    (r"features\.0\.1", "bn1"),
    (r"features\.\d+\.0|conv_head", "conv2"),
    (r"features\.\d+\.1", "bn2"),
    (r"blocks\.(\d+\.\d+)\.conv_pw", "block#/expand"),
    (r"blocks\.(\d+\.\d+)\.conv_dw", "block#/depthwise"),
    (r"blocks\.(\d+\.\d+)\.conv_pwl?", "block#/project"),
    (r"blocks\.(\d+\.\d+)\.(bn\d)", r"block#/\2"),
)
LEAVES = {
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_var": "batch_stats/{}/var",
}
WEIGHTS = {
    "conv": "params/{}/kernel",
    "dense": "params/{}/kernel",
    "norm": "params/{}/scale",
}  # by kind of module
COUNTER = "num_batches_tracked"  # of a batch norm; nothing here depends on it
CLASSIFIER = r"params/fc/.*"

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

REPARAMETRISED = r"\.parametrizations\.|_(?:orig|mask|[guv])$"
AVERAGED = r"(?:^|[._])(?:ema|shadow)(?:[._]|$)"


@jax.tree_util.register_pytree_with_keys_class
class Unordered(dict):
    """A state dict whose order means nothing, like that of a safetensors file; a pytree as any
    dict.
    """

    def tree_flatten_with_keys(self) -> tuple[list, tuple]:
        names = sorted(self)
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], tuple(names)

    @classmethod
    def tree_unflatten(cls, names: tuple, arrays: Iterable) -> "Unordered":
        return cls(zip(names, arrays))


# Files --------------------------------------------------------------------------------------------


def check(path: str | os.PathLike) -> None:
    """Raises ConfigError unless `path` is a weight file with a whole header, readable here."""
    path, given = pathlib.Path(path), os.fspath(path)
    if path.suffix not in (".safetensors", *TORCH_FILES):
        suffixes = ", ".join(TORCH_FILES)
        raise tables.ConfigError(
            "", given, allowed=f"a file of weights, .safetensors or {suffixes}"
        )
    if not path.is_file():
        raise tables.ConfigError("", given, why="but there is no such file")
    with tables.blaming("", given):
        tables.check_memory(path.stat().st_size, "which has")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="np"):
                return
        except (safetensors.SafetensorError, OSError) as error:
            raise tables.ConfigError(
                "",
                given,
                why=f"which is no whole safetensors file: {error}",
                allowed="a file that is not cut short, of that format",
            ) from None
    if importlib.util.find_spec("torch") is None:
        raise tables.ConfigError(
            "",
            given,
            why="a file of PyTorch's, which only PyTorch reads: `pip install torch`, or convert "
            "it to .safetensors where PyTorch is installed",
        )


def read(path: str | os.PathLike, key: str = "") -> dict[str, np.ndarray]:
    """The state dict in a `.safetensors` file, or in one that `torch.save` wrote (needs PyTorch).

    key: name of the state dict in a checkpoint that holds several, e.g. "model_ema"; by default the
    first of `STATE_DICTS`, or the whole file. Nothing in a file is executed: pickled modules are
    refused. That of a safetensors file is `Unordered`. Raises ConfigError for files that are cut
    short or something else, for tensors that are no plain arrays (sparse, quantized, complex,
    float8), and for files and shapes larger than the memory.
    """
    check(path)
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        return _read_torch(path, key)
    if key:
        raise tables.ConfigError(
            f"key is {key!r}; allowed for {path}: none, it holds one state dict."
        )
    state_dict = Unordered()
    for name, entry in sorted(safetensors.deserialize(path.read_bytes())):
        if entry["dtype"] not in DTYPES:
            raise tables.ConfigError(
                f"{path}: {name} is of type {entry['dtype']}; known: {', '.join(DTYPES)}."
            )
        flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        try:
            state_dict[name] = flat.reshape(entry["shape"])
        except (
            ValueError,
            OverflowError,
        ) as error:  # of empty arrays: of too many axes, or too long ones
            shape = tables.shortened(entry["shape"])
            raise tables.ConfigError(
                f"{path}: {name} has the shape {shape}, of no array: {error}."
            ) from None
    return state_dict


def _read_torch(path: pathlib.Path, key: str) -> dict[str, np.ndarray]:
    import torch

    _check_sums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can break PyTorch's readers anywhere
        raise tables.ConfigError(
            f"{path} cannot be read as weights alone: {_reason(error)}"
        ) from None
    state_dict = _state_dict_in(content, key, path)
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise tables.ConfigError(
                f"{path} holds {name!r}, of type {type(value).__name__}; allowed: tensors by name, "
                f"alone or as {', '.join(map(repr, STATE_DICTS))}."
            )
    for name, value in state_dict.items():  # one number in the file may stand for any shape
        size = value.numel() * value.element_size()
        with tables.within(f"{path}: {name}"):
            tables.check_memory(size, f"has the shape {tuple(value.shape)} and takes")
    return {name: _array(value, f"{path}: {name}") for name, value in state_dict.items()}


def _check_sums(path: pathlib.Path) -> None:
    """Raises ConfigError for a file of `torch.save` whose content its checksums deny: PyTorch
    passes over them.
    """
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
    advice = (
        "Is it cut short, or another format? Of a pickled network save its `state_dict()` instead."
    )
    if not isinstance(error, pickle.UnpicklingError):
        first_line = str(error).partition("\n")[0].rstrip(".")
        return f"{first_line or 'it ends too early'}. {advice}"
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign is None:
        return f"it holds other objects than tensors. {advice}"
    return (
        f"beside tensors it holds an object of {foreign[1]}, which reading could execute. Where "
        "you trust the file, "
        "load it with PyTorch and save its state dict alone."
    )


def _state_dict_in(content: Any, key: str, path: pathlib.Path) -> Mapping:
    """The state dict inside a checkpoint; raises ConfigError if there is none."""
    if key:
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            names = [str(name) for name in content] if isinstance(content, Mapping) else []
            raise tables.ConfigError(f"key is {key!r}; {path} holds: {', '.join(names) or 'none'}.")
        return content[key]
    for _ in STATE_DICTS:  # one inside another, as deep as is sensible: a dict can also hold itself
        if not isinstance(content, Mapping):
            break
        inner = [name for name in STATE_DICTS if isinstance(content.get(name), Mapping)]
        if not inner:
            return content
        content = content[inner[0]]
    raise tables.ConfigError(f"{path} holds {type(content).__name__}; allowed: tensors by name.")


def _array(value: Any, name: str) -> np.ndarray:
    """A tensor of PyTorch, or any array, as a NumPy array; raises ConfigError for what is none."""
    try:
        if not hasattr(value, "detach"):
            return np.asarray(value)
        if str(value.dtype) == "torch.bfloat16":
            return value.detach().float().numpy(force=True).astype(jnp.bfloat16)
        return value.numpy(force=True)
    except (TypeError, RuntimeError, ValueError) as error:
        raise tables.ConfigError(
            f"{name} is no plain array ({getattr(value, 'dtype', type(value).__name__)}): "
            f"{str(error).partition(chr(10))[0].rstrip('.')}. Convert it to float32 with PyTorch."
        ) from None


def write(path: str | os.PathLike, state_dict: StateDict) -> pathlib.Path:
    """Writes a state dict as safetensors, bit by bit; the file appears whole or not at all. Returns
    its path.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise tables.ConfigError(
            f"{path}: weights are written as safetensors; name the file *.safetensors."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    arrays = {name: np.array(array, order="C") for name, array in state_dict.items()}
    try:
        part.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


# Names --------------------------------------------------------------------------------------------


class Module(NamedTuple):
    """A layer of either side, as far as it has to agree with the other side's."""

    kind: str  # "conv", "dense" or "norm"
    shape: tuple[int, ...]  # of its weight, in PyTorch's layout
    leaves: frozenset[str]  # what it holds beside the weight: keys of LEAVES


class Undecided(NamedTuple):
    """Layers of one shape that could be placed in several ways."""

    modules: list[str]  # PyTorch's names
    places: list[str]  # ours
    reason: str


def name_map(
    shapes: Mapping[str, Sequence[int]],
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
    if undecided:
        raise tables.ConfigError(_which_is_which(undecided, like))
    return placed


def _matched(
    shapes: Mapping[str, Sequence[int]], like: PyTree, names: Rules, fresh: str, ordered: bool
) -> tuple[dict[str, str], list[Undecided]]:
    """(path of each tensor that has a place, layers whose places are a guess)."""
    paths = trees.named_leaves(like)
    placed = _placed_by_rules(shapes, paths, names)
    ours = _modules_here(paths)
    tensors = _tensors_of_modules(shapes)
    places = _places_by_rules(placed, ours, tensors)
    theirs = {}
    for name, leaves in tensors.items():
        if "weight" in leaves and leaves["weight"] not in placed:
            shape = tuple(shapes[leaves["weight"]])
            theirs[name] = Module(_kind_of_rank(len(shape)), shape, frozenset(LEAVES) & set(leaves))
    free = {name: module for name, module in ours.items() if name not in places.values()}
    loose = _fresh_modules(free, like, fresh)
    by_structure, undecided = _places(theirs, free, loose, ordered)
    for name, place in (places | by_structure).items():
        for leaf, tensor in tensors[name].items():
            path = _path_of(ours[place].kind, leaf).format(place)
            if path in paths:
                placed.setdefault(tensor, path)
    return {name: placed[name] for name in shapes if name in placed}, undecided


def _placed_by_rules(
    shapes: Mapping[str, Sequence[int]], paths: Mapping[str, Any], names: Rules
) -> dict[str, str]:
    """Path of each tensor that a rule names."""
    placed: dict[str, str] = {}
    for pattern, path in names:
        trees.check_pattern(pattern, "names")
        for name in shapes:
            match = re.fullmatch(pattern, name)
            if match is None or name in placed:
                continue
            placed[name] = match.expand(path)
            if placed[name] not in paths:
                hint = tables.closest(placed[name], paths)
                raise tables.ConfigError(
                    f"names: {name!r} is to become {placed[name]!r}, which is not there.{hint}"
                )
    return placed


def _places_by_rules(
    placed: Mapping[str, str], ours: Mapping[str, Module], tensors: Mapping[str, dict[str, str]]
) -> dict[str, str]:
    """Our module of each of PyTorch's whose weight a rule has placed."""
    modules = {_path_of(module.kind, "weight").format(name): name for name, module in ours.items()}
    places = {}
    for name, leaves in tensors.items():
        path = placed.get(leaves.get("weight", ""), "")
        if path in modules:
            places[name] = modules[path]
    return places


def _tensors_of_modules(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{"layer1.0.bn1": {"weight": "layer1.0.bn1.weight", ...}, ...}, in the order of `names`."""
    tensors: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in names:
        module, _, leaf = name.rpartition(".")
        tensors[module][leaf] = name
    return tensors


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
        if (module != last and module in seen) or (leaf == "weight" and module == last):
            return False
        last = module
        seen.add(module)
    return True


def _path_of(kind: str, leaf: str) -> str:
    """Pattern of the path of a tensor in a module of ours; "" for a leaf that has none."""
    return WEIGHTS[kind] if leaf == "weight" else LEAVES.get(leaf, "")


def _kind_of_rank(rank: int) -> str:
    return {1: "norm", 2: "dense"}.get(rank, "conv")


def _modules_here(paths: Mapping[str, Any]) -> dict[str, Module]:
    """The modules of one of our networks by name, in the order in which PyTorch's networks define
    theirs.
    """
    modules = {}
    for path, leaf in paths.items():
        match = re.fullmatch(r"params/(.+)/(?:kernel|scale)", path)
        if match:
            name = match[1]
            held = frozenset(
                leaf for leaf, pattern in LEAVES.items() if pattern.format(name) in paths
            )
            modules[name] = Module(_kind_of_rank(len(leaf.shape)), _torch_shape(leaf.shape), held)
    return {name: modules[name] for name in sorted(modules, key=_definition_order)}


def _definition_order(name: str) -> tuple:
    """Sorts the modules of a network as PyTorch's networks define them: those of a kind, not the
    kinds.
    """
    if "/" not in name:
        part = 0 if re.search(r"\D1$", name) else 3 if name in ("fc", "final_bn") else 2
        return (part, "", False, _natural(name))
    block, _, leaf = name.partition("/")
    return (1, _natural(block), leaf != "expand", _natural(leaf))


def _natural(name: str) -> list[str | int]:
    """Sorts by the numbers inside: "conv2" before "conv10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# Modules whose order in the network is known by their names; of others only numbers tell.
OURS = r"(?:conv|bn|dense|dense_bn)\d+|final_bn|fc|(?:stage\d+_)?block\d+/\w+"


def _fresh_modules(ours: Mapping[str, Module], like: PyTree, fresh: str) -> set[str]:
    """Those of our modules whose weight matches `fresh`."""
    if not fresh:
        return set()
    matches = trees.matching(like, fresh, "fresh")
    return {
        name
        for name, module in ours.items()
        if matches[_path_of(module.kind, "weight").format(name)]
    }


def _places(
    theirs: Mapping[str, Module], ours: Mapping[str, Module], fresh: set[str], ordered: bool
) -> tuple[dict[str, str], list[Undecided]]:
    """(our module of each of PyTorch's that has one, those among equally shaped ones that nothing
    decides).
    """
    ours = _with_shapes_of_fresh(theirs, ours, fresh)
    known = _known_places(theirs, ours)
    groups = _equal_modules(theirs, ours, fresh)
    ordered = ordered and _come_in_one_order(theirs, ours, groups)
    places: dict[str, str] = {}
    undecided = []
    for names, targets in groups:
        if len(names) != len(targets):
            continue
        options = _options(names, targets, known, ordered)
        places |= options[0] if options else dict(zip(names, targets))
        reason = _doubt(names, options, ordered)
        if reason:
            undecided.append(Undecided(names, targets, reason))
    return places | _nearest(theirs, ours, known, places), undecided


def _with_shapes_of_fresh(
    theirs: Mapping[str, Module], ours: Mapping[str, Module], fresh: set[str]
) -> dict[str, Module]:
    """`ours`, where a fresh layer has the shape of the only layer of its kind that would be left
    over.
    """
    result = dict(ours)
    for name in fresh:
        kind = ours[name].kind
        count = collections.Counter(module for module in theirs.values() if module.kind == kind)
        count.subtract(module for module in ours.values() if module.kind == kind)
        left_over = [module for module, surplus in count.items() if surplus > 0]
        if count[ours[name]] < 0 and len(left_over) == 1 and count[left_over[0]] == 1:
            result[name] = left_over[0]
    return result


def _equal_modules(
    theirs: Mapping[str, Module], ours: Mapping[str, Module], fresh: set[str]
) -> list[tuple[list[str], list[str]]]:
    """(PyTorch's names, ours) of the modules that are alike; fresh ones of ours only where
    needed.
    """
    groups = []
    for module in dict.fromkeys(theirs.values()):
        names = [name for name in theirs if theirs[name] == module]
        targets = [name for name in ours if ours[name] == module]
        needed = [name for name in targets if name not in fresh]
        groups.append((names, needed if len(needed) == len(names) else targets))
    return groups


def _come_in_one_order(
    theirs: Mapping[str, Module],
    ours: Mapping[str, Module],
    groups: list[tuple[list[str], list[str]]],
) -> bool:
    """Whether the layers of each kind that have a partner come in the same order of shapes on both
    sides.
    """
    names, targets = set(), set()
    for some_names, some_targets in groups:
        if len(some_names) == len(some_targets):
            names.update(some_names)
            targets.update(some_targets)
    for kind in WEIGHTS:
        their_shapes = [m for name, m in theirs.items() if m.kind == kind and name in names]
        our_shapes = [m for name, m in ours.items() if m.kind == kind and name in targets]
        if their_shapes != our_shapes:
            return False
    return True


def _options(
    names: list[str], targets: list[str], known: Mapping[str, str], ordered: bool
) -> list[dict[str, str]]:
    """The places of equally shaped layers by each of their order, known names and numbers, as far
    as these tell.
    """
    options = []
    order_here = targets if all(re.fullmatch(OURS, name) for name in targets) else _ranked(targets)
    by_number = _ranked(names)
    if ordered and order_here:
        options.append(dict(zip(names, order_here)))
    if {known.get(name) for name in names} == set(targets):
        options.append({name: known[name] for name in names})
    elif by_number and order_here:
        options.append(dict(zip(by_number, order_here)))
    return options


def _doubt(names: list[str], options: list[dict[str, str]], ordered: bool) -> str:
    """Why the places of equally shaped layers are not decided; "" where they are."""
    if not options:
        return "neither an order nor their names tell"
    if any(option != options[0] for option in options[1:]):
        return "their order and their names disagree"
    pairs = [(first, second) for i, second in enumerate(names) for first in names[:i]]
    if ordered and any(_is_before(first, second) is False for first, second in pairs):
        return "their order and the numbers in their names disagree"
    return ""


def _ranked(names: list[str]) -> list[str]:
    """`names` in the order of the numbers in them; [] where these do not tell."""
    before = {name: [_is_before(other, name) for other in names if other != name] for name in names}
    if any(None in answers for answers in before.values()):
        return []
    return sorted(names, key=lambda name: sum(before[name]))


def _is_before(first: str, second: str) -> bool | None:
    """Whether `first` has the lower number where both names begin to differ: "body.0" before
    "body.1.conv".

    None where they differ in more than a number: "stem" and "body.0", "conv1" and "layer1.0.conv1".
    """
    for one, other in zip(re.split("[./]", first), re.split("[./]", second)):
        if one == other:
            continue
        numbers = [int(number) for number in re.findall(r"\d+", one)]
        other_numbers = [int(number) for number in re.findall(r"\d+", other)]
        if re.sub(r"\d+", "#", one) != re.sub(r"\d+", "#", other) or numbers == other_numbers:
            return None
        return numbers < other_numbers
    return None


def _known_places(theirs: Mapping[str, Module], ours: Mapping[str, Module]) -> dict[str, str]:
    """Our module of each name that is known here, without a prefix of half or more of them, e.g.
    "backbone.".
    """
    counts = collections.Counter()
    for name in theirs:
        parts = name.split(".")
        counts.update(".".join(parts[:i]) + "." for i in range(1, len(parts)))
    shared = [prefix for prefix in counts if 2 * counts[prefix] >= len(theirs)]
    options = [_known_under(prefix, theirs, ours) for prefix in ("", *shared)]
    return max(options, key=len)  # the first of the longest


def _known_under(
    prefix: str, theirs: Mapping[str, Module], ours: Mapping[str, Module]
) -> dict[str, str]:
    short = {name: name.removeprefix(prefix) for name in sorted(theirs, key=_natural)}
    matches = {
        name: [(re.fullmatch(pattern, text), path) for pattern, path in MODULES]
        for name, text in short.items()
    }
    blocks = {
        match[1] for rows in matches.values() for match, path in rows if match and "#" in path
    }
    ranks = {block: str(rank) for rank, block in enumerate(sorted(blocks, key=_natural))}
    places: dict[str, str] = {}
    for name, rows in matches.items():
        candidates = [short[name].replace(".", "/")]
        for match, path in rows:
            if match:
                candidates.append(
                    match.expand(path.replace("#", ranks[match[1]]) if "#" in path else path)
                )
        for place in candidates:
            if (
                place in ours
                and ours[place].kind == theirs[name].kind
                and place not in places.values()
            ):
                places[name] = place
                break
    return places


def _nearest(
    theirs: Mapping[str, Module],
    ours: Mapping[str, Module],
    known: Mapping[str, str],
    places: Mapping[str, str],
) -> dict[str, str]:
    """Places for layers of other shapes, for the report of what does not fit, and for fresh
    layers.
    """
    free = [name for name in ours if name not in places.values()]
    nearest = {}
    for name in theirs:
        if name not in places and known.get(name) in free:
            nearest[name] = known[name]
            free.remove(known[name])
    for kind in WEIGHTS:
        names = [name for name in theirs if theirs[name].kind == kind]
        names = [name for name in names if name not in places and name not in nearest]
        targets = [name for name in free if ours[name].kind == kind]
        if names and "fc" in targets:
            nearest[names.pop()] = "fc"
        numbered = [name for name in targets if re.fullmatch(r"\w+\d", name)]
        nearest |= dict(zip(names, numbered))
    return nearest


def _which_is_which(undecided: list[Undecided], like: PyTree) -> str:
    """The sentence about layers that nothing decides, with the way out."""
    modules = _modules_here(trees.named_leaves(like))
    lines = []
    for names, targets, reason in undecided:
        weight = _path_of(modules[targets[0]].kind, "weight")
        shape = modules[targets[0]].shape
        tensors = ", ".join(f"{name}.weight" for name in names)
        lines.append(
            f"  {tensors} {shape} could each be "
            f"{', '.join(weight.format(target) for target in targets)}: {reason}."
        )
    first = undecided[0]
    rule = (re.escape(first.modules[0]) + r"\.weight", weight.format(first.places[0]))
    return "\n".join(
        [
            "nothing decides which layers are which:",
            *lines,
            (
                f"  Say it with names=(({rule[0]!r}, {rule[1]!r}), ...), of the weights: all else "
                "follows."
            ),
        ]
    )


def torch_names(like: PyTree) -> dict[str, str]:
    """Path in one of our networks of each tensor of its state dict, by PyTorch's name.

    ResNets and MobileNet V2 have torchvision's names, all others their own: `stage1/conv` becomes
    `stage1.conv`.
    """
    paths, names = trees.named_leaves(like), {}
    modules = _modules_here(paths)
    for name, module in modules.items():
        theirs = _torchvision_name(name, modules)
        for leaf in ("weight", *LEAVES):
            path = _path_of(module.kind, leaf).format(name)
            if path in paths:
                names[f"{theirs}.{leaf}"] = path
    return names


def _torchvision_name(module: str, modules: Mapping[str, Module]) -> str:
    if "block0/project" in modules:  # MobileNet V2
        last = sum(name.endswith("/project") for name in modules) + 1
        outside = dict(conv1="features.0.0", bn1="features.0.1", fc="classifier.1")
        outside |= dict(conv2=f"features.{last}.0", bn2=f"features.{last}.1")
        if module in outside:
            return outside[module]
        block, _, own = module.partition("/")
        if f"{block}/expand" in modules:
            inside = dict(expand="0.0", bn1="0.1", depthwise="1.0", bn2="1.1", project="2", bn3="3")
        else:
            inside = dict(depthwise="0.0", bn1="0.1", project="1", bn2="2")
        return f"features.{int(block.removeprefix('block')) + 1}.conv.{inside[own]}"
    own = (
        module.replace("shortcut_conv", "downsample.0")
        .replace("shortcut_bn", "downsample.1")
        .replace("/", ".")
    )
    return re.sub(r"^stage(\d+)_block(\d+)", r"layer\1.\2", own)


# Layouts ------------------------------------------------------------------------------------------


def _is_flax_kernel(path: str) -> bool:
    return re.search(r"(?:^|/)kernel(?:/value)?$", path) is not None


def _flattened(paths: Mapping[str, Any], image_channels: int) -> tuple[str, int]:
    """(path of the kernel behind flattened images, their channels); ("", 1) if the network has
    none.
    """
    modules = _modules_here(paths)
    convs = [name for name, module in modules.items() if module.kind == "conv"]
    if any(
        not re.fullmatch(r"conv\d+", name) for name in convs
    ):  # residual and such: an average pool before `fc`
        return "", 1
    path = f"params/{'dense1' if 'dense1' in modules else 'fc'}/kernel"
    channels = paths[f"params/{convs[-1]}/kernel"].shape[-1] if convs else image_channels
    if path not in paths or paths[path].shape[0] % channels:
        return "", 1
    return path, channels


def _from_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """A kernel in Flax's layout. channels: those of images that it sees flattened, PyTorch's
    channels first; else 1.
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
    where: str = "the state dict",
) -> PyTree:
    """The tensors of a PyTorch state dict in the structure, shapes and types of `like`, as NumPy
    arrays.

    state_dict: arrays or tensors by name; an `Unordered` one has no order of layers, see
    `name_map`. Weights that `torch.nn.utils.prune` keeps as `weight_orig` and `weight_mask` become
    their product (`merge_pruned`).
    like: variables of one of our networks, or their shape structs; with `names` (see `name_map`)
    any pytree. Arrays called `kernel` are brought into Flax's layouts, all others stay as they are;
    `num_batches_tracked` is left out.
    fresh: pattern of whole paths that stay as in `like`, whatever the state dict has for them, e.g.
        `CLASSIFIER`.
    image_channels: of the images, for networks that begin with a dense layer: PyTorch flattens
    channels first. Raises ConfigError, which begins with `where`, and names the tensors, unless all
    of both sides fit one another, for equally shaped layers that nothing tells apart, for values
    that are no weights (integers, bool, complex, NaN, infinities, beyond the type in `like`), and
    for a `fresh` that matches nothing.
    """
    arrays = {str(name): _array(value, f"{where}: {name}") for name, value in state_dict.items()}
    ordered = not isinstance(state_dict, Unordered) and _is_as_defined(arrays)
    arrays = merge_pruned(arrays)
    paths = trees.named_leaves(like)
    shapes = {name: array.shape for name, array in arrays.items()}
    placed, undecided = _matched(shapes, like, names, fresh, ordered)
    kept = (
        {path for path, chosen in trees.matching(like, fresh, "fresh").items() if chosen}
        if fresh
        else set()
    )
    flat, channels = _flattened(paths, image_channels)
    loaded: dict[str, np.ndarray] = {}
    misfits = Misfits([], [], [], [])
    for name, array in arrays.items():
        path = placed.get(name)
        if path in kept or (path is None and _is_counter(name, placed)):
            continue
        if path is None or path in loaded:
            misfits.unexpected.append(f"{name} {array.shape}")
            continue
        shape = tuple(paths[path].shape)
        kernel = _is_flax_kernel(path) and len(shape) > 1
        if kernel and array.ndim == len(shape):
            fits = array.size == np.prod(shape, dtype=int)  # else it cannot be rearranged either
            array = _from_torch(array, channels if path == flat and fits else 1)
        if array.shape != shape:
            loaded[path] = array
            needed = _torch_shape(shape) if kernel else shape
            misfits.wrong.append(
                (path, f"{name} is {shapes[name]}, for {path} it must be {needed}")
            )
            continue
        loaded[path], problem = _as_type(array, np.dtype(paths[path].dtype))
        if problem:
            misfits.no_weights.append(f"{name} {problem}")
    for path, leaf in paths.items():
        if path not in loaded and path not in kept:
            misfits.missing.append(f"{path} {tuple(leaf.shape)}")
    if any(misfits):
        fitting = len(loaded) - len(misfits.wrong) - len(misfits.no_weights)
        raise tables.ConfigError(
            _misfit_report(misfits, f"{fitting} of {len(paths)} arrays do", where)
        )
    if undecided:
        raise tables.ConfigError(f"{where}: {_which_is_which(undecided, like)}")
    return trees.map_named(lambda path, leaf: loaded.get(path, leaf), like)


class Misfits(NamedTuple):
    """What keeps a state dict from fitting a network."""

    missing: list[str]
    unexpected: list[str]
    wrong: list[tuple[str, str]]  # path here, and what is wrong with the shape
    no_weights: list[str]


def merge_pruned(state_dict: StateDict) -> dict[str, np.ndarray]:
    """The state dict with `weight_orig` times `weight_mask` as `weight`, as
    `torch.nn.utils.prune.remove` makes it.

    So for every tensor of which it holds both; all others stay. What the masks left out is zero
    then, and `masks.nonzero` of the params gives the masks again.
    """
    merged = {}
    for name, array in state_dict.items():
        base, _, ending = name.rpartition("_")
        if ending == "orig" and f"{base}_mask" in state_dict:
            mask = np.asarray(state_dict[f"{base}_mask"])
            if mask.shape != array.shape or not np.isin(mask, (0, 1)).all():
                raise tables.ConfigError(
                    f"{base}_mask is no mask of {name}: allowed are 0 and 1, of its shape."
                )
            merged[base] = np.where(mask.astype(bool), array, np.zeros((), array.dtype))
        elif not (ending == "mask" and f"{base}_orig" in state_dict):
            merged[name] = array
    return merged


def count_zeros(arrays: Mapping[str, Any]) -> tuple[int, int]:
    """(zeros, entries) of the kernels among arrays by path."""
    kernels = [np.asarray(array) for path, array in arrays.items() if trees.is_kernel(path)]
    return sum(int(np.sum(kernel == 0)) for kernel in kernels), sum(
        kernel.size for kernel in kernels
    )


def _as_type(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, str]:
    """(`array` as `dtype`, what makes it no weights of that type, or "")."""
    wanted = np.floating if jnp.issubdtype(dtype, jnp.floating) else dtype.type
    narrow = (
        array.dtype.itemsize < 2 and wanted is np.floating
    )  # float8 comes with scales of its own
    if narrow or not jnp.issubdtype(array.dtype, wanted):
        return np.zeros(
            array.shape, dtype
        ), f"is {array.dtype}; allowed: {wanted.__name__.rstrip('_')}"
    if not np.isfinite(array).all():
        return array, "holds NaN or infinite values"
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    return cast, "" if np.isfinite(cast).all() else f"holds values beyond {dtype}"


def _misfit_report(misfits: Misfits, fitting: str, where: str) -> str:
    lines = [f"{where} does not fit the network; {fitting}."]
    groups = (
        ("missing", misfits.missing),
        ("unexpected", misfits.unexpected),
        ("wrong", [text for _, text in misfits.wrong]),
        ("no weights", misfits.no_weights),
    )
    for title, texts in groups:
        if texts:
            more = f", and {len(texts) - 4} more" if len(texts) > 4 else ""
            lines.append(f"  {title}: {'; '.join(texts[:4])}{more}")
    return "\n".join([*lines, *_hints(misfits)])


def _is_counter(name: str, placed: Mapping[str, str]) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == COUNTER and f"{module}.running_mean" in placed


def _torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-3:-1], *shape[:-2])


def _hints(misfits: Misfits) -> list[str]:
    hints = []
    paths = {path for path, _ in misfits.wrong}
    if paths and all(re.fullmatch(CLASSIFIER, path) for path in paths) and not misfits.missing:
        hints.append(
            "  It has other classes: config.fresh_classifier (fresh=CLASSIFIER) trains a new "
            "classifier."
        )
    if "params/conv1/kernel" in paths:
        hints.append(
            "  The first convolution differs: is config.model.stem right ('imagenet' for "
            "ImageNet's ResNets)?"
        )
    names = [text.partition(" ")[0] for text in misfits.unexpected]
    if any(re.search(REPARAMETRISED, name) for name in names):
        hints.append(
            "  Weights are computed from others there: "
            "torch.nn.utils.parametrize.remove_parametrizations, "
            "prune.remove, remove_weight_norm or remove_spectral_norm writes them out."
        )
    if any(re.search(AVERAGED, name) for name in names) and not misfits.missing:
        hints.append(
            "  It also holds averaged weights (EMA): keep the tensors of one of the two networks."
        )
    return hints


def to_torch(
    variables: PyTree, names: Mapping[str, str] | None = None, *, image_channels: int = 1
) -> dict[str, np.ndarray]:
    """The state dict of `variables`: the inverse of `to_variables`, for
    `torch_module.load_state_dict`.

    names: path of each tensor by PyTorch's name, as `name_map` and `torch_names` give it (default:
    the latter). Every batch norm gets the `num_batches_tracked` that PyTorch expects, 0. Raises
    ValueError for paths that `names` leaves out.
    """
    paths = trees.named_leaves(variables)
    given, names = names is not None, torch_names(variables) if names is None else names
    absent = sorted(set(paths) - set(names.values()))
    if absent:
        hint = (
            ""
            if given
            else " Without `names`, give whole variables of one of our networks: "
            "{'params': ..., ...}."
        )
        raise ValueError(
            f"names leave out {', '.join(absent[:4])}; {len(absent)} of {len(paths)} arrays in "
            f"all.{hint}"
        )
    flat, channels = _flattened(paths, image_channels)
    found: dict[str, np.ndarray] = {}
    for name, path in names.items():
        array = np.asarray(paths[path])
        if _is_flax_kernel(path) and array.ndim > 1:
            array = _to_torch(array, channels if path == flat else 1)
        found[name] = np.array(array, order="C")
        if name.endswith(".running_var"):
            found[f"{name.rpartition('.')[0]}.{COUNTER}"] = np.zeros((), np.int64)
    return found
