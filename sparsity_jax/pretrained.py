"""Weights of PyTorch networks into ours and back: files, names and layouts.

    state_dict = pretrained.read("resnet50.safetensors")
    variables = pretrained.to_variables(state_dict, jax.eval_shape(model.init, key, images))
    pretrained.write("pruned.safetensors", pretrained.to_torch(variables))

A state dict is a flat dict of NumPy arrays by PyTorch's names, in its layouts: convolutions [out, in / groups, height,
width], dense layers [out, in]. PyTorch itself is needed for its own file formats only.
"""

import importlib.util
import os
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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

# What PyTorch's modules are called here: a pattern of the whole name, and our module. The first row that leads to a
# module of the network counts; `#` is the rank of the captured block among all blocks. Modules in no row have their own
# names here too, or are numbered by kind in their order: conv1, conv2, ..., bn1, ..., dense1, ..., and the last is fc.
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
WRAPPERS = r"(?:(?:module|_orig_mod|model|net)\.)*"  # of a whole network, in front of every name
LEAVES = {"bias": "params/{}/bias", "running_mean": "batch_stats/{}/mean", "running_var": "batch_stats/{}/var"}
WEIGHTS = {"conv": "params/{}/kernel", "dense": "params/{}/kernel", "norm": "params/{}/scale"}  # by kind of module
COUNTER = "num_batches_tracked"  # of a batch norm; nothing here depends on it
CLASSIFIER = r"params/fc/.*"


# Files -------------------------------------------------------------------------------------------------------


def check(path: str | os.PathLike, where: str = "path") -> None:
    """Raises ConfigError unless `path` is a weight file with a whole header that can be read here.

    where: the setting that names it.
    """
    path, where = pathlib.Path(path), f"{where} is {os.fspath(path)!r}"
    if path.suffix not in (".safetensors", *TORCH_FILES):
        raise tables.ConfigError(f"{where}; allowed: a file of weights, .safetensors or {', '.join(TORCH_FILES)}.")
    if not path.is_file():
        raise tables.ConfigError(f"{where}, but there is no such file.")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="np"):
                return
        except (safetensors.SafetensorError, OSError) as error:
            raise tables.ConfigError(
                f"{where}, which is no whole safetensors file: {error}. Is it cut short, or another format?"
            ) from None
    if importlib.util.find_spec("torch") is None:
        raise tables.ConfigError(
            f"{where}, a file of PyTorch's, which only PyTorch reads: `pip install torch`, or convert it to "
            ".safetensors where PyTorch is installed."
        )


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The state dict in a `.safetensors` file, or in one that `torch.save` wrote (needs PyTorch).

    A checkpoint that holds the state dict as `state_dict`, `model_state_dict` or `model` besides other things is
    unwrapped. Nothing in a file is executed: pickled modules are refused. Raises ConfigError for files that are cut
    short or something else.
    """
    check(path)
    if pathlib.Path(path).suffix == ".safetensors":
        found = safetensors.deserialize(pathlib.Path(path).read_bytes())
        odd = sorted({entry["dtype"] for _, entry in found} - set(DTYPES))
        if odd:
            raise tables.ConfigError(f"{path} has tensors of type {', '.join(odd)}; known: {', '.join(DTYPES)}.")
        array = lambda entry: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return {name: array(entry) for name, entry in found}
    return _read_torch(pathlib.Path(path))


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        other = isinstance(error, pickle.UnpicklingError)  # whose text advises to read it nevertheless
        reason = "other objects than tensors" if other else str(error).partition("\n")[0].rstrip(".")
        raise tables.ConfigError(
            f"{path} cannot be read as weights alone: {reason or 'it ends too early'}. Is it cut short, or another "
            "format? Of a pickled network save its `state_dict()` instead."
        ) from None
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        names = f"a dict of {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise tables.ConfigError(f"{path} holds {names:.200}; allowed: tensors by name, alone or as `state_dict`.")

    def array(tensor):
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    return {name: array(tensor) for name, tensor in found.items()}


def write(path: str | os.PathLike, state_dict: StateDict) -> pathlib.Path:
    """Writes a state dict as safetensors, bit by bit; the file appears whole or not at all. Returns its path."""
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise tables.ConfigError(f"{path}: weights are written as safetensors; name the file *.safetensors.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    arrays = {name: np.array(array, order="C") for name, array in state_dict.items()}
    try:
        part.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


# Names -------------------------------------------------------------------------------------------------------


def name_map(shapes: Mapping[str, Sequence[int]], like: PyTree, names: Rules = ()) -> dict[str, str]:
    """Path in `like` of each tensor that has a place there, by PyTorch's name. shapes: of the tensors, in its layouts.

    names: for networks of your own, or other names: pairs of a pattern of the whole PyTorch name and a path, tried
    before the names known here, e.g. `((r"encoder\\.(\\d+)\\.weight", r"params/layer\\1/kernel"),)`. Raises ConfigError
    for one that leads to no array.
    """
    paths, placed = trees.named_leaves(like), {}
    for pattern, path in names:
        trees.check_pattern(pattern, "names")
        for name in [name for name in shapes if name not in placed and re.fullmatch(pattern, name)]:
            placed[name] = re.fullmatch(pattern, name).expand(path)
            if placed[name] not in paths:
                hint = tables.closest(placed[name], paths)
                raise tables.ConfigError(f"names: {name!r} is to become {placed[name]!r}, which is not there.{hint}")
    rest = [name for name in shapes if name not in placed]
    start = min((re.match(WRAPPERS, name).end() for name in rest), default=0)  # the same in front of all
    modules: dict[str, dict[str, str]] = {}
    for name in rest:
        module, _, leaf = name[start:].rpartition(".")
        modules.setdefault(module, {})[leaf] = name
    kinds = {module: _kind_of_rank(len(shapes[own["weight"]])) for module, own in modules.items() if "weight" in own}
    places = _modules_here(kinds, _kinds_here(paths), set(placed.values()))
    for module, place in places.items():
        for leaf, name in modules[module].items():
            path = (WEIGHTS[kinds[module]] if leaf == "weight" else LEAVES.get(leaf, "")).format(place)
            if path in paths:
                placed[name] = path
    return {name: placed[name] for name in shapes if name in placed}


def _kind_of_rank(rank: int) -> str:
    return {1: "norm", 2: "dense"}.get(rank, "conv")


def _kinds_here(paths: Mapping[str, Any]) -> dict[str, str]:
    """Kind of each module of one of our networks, by its name, in natural order."""
    kinds = {}
    for path, leaf in paths.items():
        found = re.fullmatch(r"params/(.+)/(?:kernel|scale)", path)
        if found:
            kinds[found[1]] = _kind_of_rank(len(leaf.shape))
    return {name: kinds[name] for name in _natural(kinds)}


def _natural(names: Iterable[str]) -> list[str]:
    """In the order of the numbers inside: "conv2" before "conv10"."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _modules_here(kinds: Mapping[str, str], ours: Mapping[str, str], taken: set[str]) -> dict[str, str]:
    """Our name of each of PyTorch's modules that has one. taken: paths that are not free any more."""
    free = {name for name, kind in ours.items() if WEIGHTS[kind].format(name) not in taken}
    matches = {name: [(re.fullmatch(pattern, name), path) for pattern, path in MODULES] for name in _natural(kinds)}
    blocks = _natural({match[1] for own in matches.values() for match, path in own if match and "#" in path})
    places: dict[str, str] = {}

    def place(name: str, candidates: Iterable[str]) -> None:
        for path in candidates:
            if path in free and ours[path] == kinds[name]:
                places[name] = path
                free.remove(path)
                return

    for name, own in matches.items():
        rank = lambda match, path: path.replace("#", str(blocks.index(match[1]))) if "#" in path else path
        place(name, [name.replace(".", "/"), *(match.expand(rank(match, path)) for match, path in own if match)])
    for kind, prefix in (("conv", "conv"), ("norm", "bn"), ("dense", "dense")):
        left = [name for name in matches if kinds[name] == kind and name not in places]
        numbered = [name for name in ours if name in free and re.fullmatch(rf"{prefix}\d+", name)]
        if kind == "dense" and left:
            place(left.pop(), ["fc"])
        for name, path in zip(left, numbered, strict=False):  # those left over are reported by `to_variables`
            place(name, [path])
    return places


def torch_names(like: PyTree) -> dict[str, str]:
    """Path in one of our networks of each tensor of its state dict, by PyTorch's name.

    ResNets and MobileNet V2 have torchvision's names, all others their own: `stage1/conv` becomes `stage1.conv`.
    """
    paths = trees.named_leaves(like)
    kinds, names = _kinds_here(paths), {}
    for module, kind in kinds.items():
        theirs = _torchvision_name(module, kinds)
        for leaf, path in {"weight": WEIGHTS[kind], **LEAVES}.items():
            if path.format(module) in paths:
                names[f"{theirs}.{leaf}"] = path.format(module)
    return names


def _torchvision_name(module: str, modules: Mapping[str, str]) -> str:
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
    own = module.replace("shortcut_conv", "downsample.0").replace("shortcut_bn", "downsample.1").replace("/", ".")
    return re.sub(r"^stage(\d+)_block(\d+)", r"layer\1.\2", own)


# Layouts -----------------------------------------------------------------------------------------------------


def _is_flax_kernel(path: str) -> bool:
    return re.search(r"(?:^|/)kernel(?:/value)?$", path) is not None


def _flattened(paths: Mapping[str, Any], image_channels: int) -> tuple[str, int]:
    """(path of the kernel behind flattened images, their channels); ("", 1) if the network has none."""
    kinds = _kinds_here(paths)
    convs = [name for name, kind in kinds.items() if kind == "conv"]
    if any(not re.fullmatch(r"conv\d+", name) for name in convs):  # residual and such: an average pool before `fc`
        return "", 1
    path = f"params/{'dense1' if 'dense1' in kinds else 'fc'}/kernel"
    channels = paths[f"params/{convs[-1]}/kernel"].shape[-1] if convs else image_channels
    if path not in paths or paths[path].shape[0] % channels:
        return "", 1
    return path, channels


def _from_torch(array: np.ndarray, channels: int) -> np.ndarray:
    """A kernel in Flax's layout. channels: those of images that it sees flattened, PyTorch's channels first; else 1."""
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
    """The tensors of a PyTorch state dict in the structure, shapes and types of `like`, as NumPy arrays.

    like: variables of one of our networks, or their shape structs; with `names` (see `name_map`) any pytree. Arrays
    called `kernel` are brought into Flax's layouts, all others stay as they are; `num_batches_tracked` is left out.
    fresh: pattern of whole paths that stay as in `like`, whatever the state dict has for them, e.g. `CLASSIFIER`.
    image_channels: of the images, for networks that begin with a dense layer: PyTorch flattens channels first.
    Raises ConfigError, which begins with `where`, and names the tensors, unless all of both sides fit one another, and
    for a `fresh` that matches nothing.
    """
    shapes, paths = {name: array.shape for name, array in state_dict.items()}, trees.named_leaves(like)
    placed = name_map(shapes, like, names)
    kept = {path for path, chosen in trees.matching(like, fresh, "fresh").items() if chosen} if fresh else set()
    flat, channels = _flattened(paths, image_channels)
    arrays: dict[str, np.ndarray] = {}
    wrong, unexpected = [], []
    for name, array in state_dict.items():
        path = placed.get(name)
        if path in kept or (path is None and _is_counter(name, placed)):
            continue
        if path is None or path in arrays:
            unexpected.append(f"{name} {array.shape}")
            continue
        kernel = _is_flax_kernel(path)
        if kernel and array.ndim == len(paths[path].shape):
            fits = array.size == np.prod(paths[path].shape, dtype=int)  # else it cannot be rearranged either
            array = _from_torch(array, channels if path == flat and fits else 1)
        arrays[path] = array.astype(paths[path].dtype)
        if array.shape != tuple(paths[path].shape):
            theirs = (len(paths[path].shape) > 1 and kernel and _torch_shape(paths[path].shape)) or paths[path].shape
            wrong.append((path, f"{name} is {shapes[name]}, for {path} it must be {tuple(theirs)}"))
    missing = [f"{path} {tuple(leaf.shape)}" for path, leaf in paths.items() if path not in arrays and path not in kept]
    if missing or unexpected or wrong:
        lines = [f"{where} does not fit the network; {len(arrays) - len(wrong)} of {len(paths)} arrays do."]
        for title, found in (("missing", missing), ("unexpected", unexpected), ("wrong", [text for _, text in wrong])):
            if found:
                more = f", and {len(found) - 4} more" if len(found) > 4 else ""
                lines.append(f"  {title}: {'; '.join(found[:4])}{more}")
        raise tables.ConfigError("\n".join([*lines, *_hints({path for path, _ in wrong}, missing)]))
    return trees.map_named(lambda path, leaf: arrays.get(path, leaf), like)


def _is_counter(name: str, placed: Mapping[str, str]) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == COUNTER and f"{module}.running_mean" in placed


def _torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-3:-1], *shape[:-2])


def _hints(wrong: set[str], missing: list[str]) -> list[str]:
    hints = []
    if wrong and all(re.fullmatch(CLASSIFIER, path) for path in wrong) and not missing:
        hints.append("  It has other classes: config.fresh_classifier (fresh=CLASSIFIER) trains a new classifier.")
    if "params/conv1/kernel" in wrong:
        hints.append("  The first convolution differs: is config.model.stem right ('imagenet' for ImageNet's ResNets)?")
    return hints


def to_torch(
    variables: PyTree, names: Mapping[str, str] | None = None, *, image_channels: int = 1
) -> dict[str, np.ndarray]:
    """The state dict of `variables`: the inverse of `to_variables`, for `torch_module.load_state_dict`.

    names: path of each tensor by PyTorch's name, as `name_map` and `torch_names` give it (default: the latter).
    Every batch norm gets the `num_batches_tracked` that PyTorch expects, 0. Raises ValueError for paths that `names`
    leaves out.
    """
    paths = trees.named_leaves(variables)
    given, names = names is not None, torch_names(variables) if names is None else names
    absent = sorted(set(paths) - set(names.values()))
    if absent:
        hint = "" if given else " Without `names`, give whole variables of one of our networks: {'params': ..., ...}."
        raise ValueError(f"names leave out {', '.join(absent[:4])}; {len(absent)} of {len(paths)} arrays in all.{hint}")
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
