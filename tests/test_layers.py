"""The layout: every file of the package has a rank, and imports point upwards only."""

import ast
import pathlib
import re
import textwrap

import pytest

import sparsity_jax

ROOT = pathlib.Path(sparsity_jax.__file__).parent
# each may import those before it
NUMERICS = (
    *(
        "types",
        "precision",
        "stopping",
        "tables",
        "trees",
        "originals",
        "pixels",
        "decoding",
        "sources",
        "folders",
        "prepared",
        "masks",
        "polytopes",
        "linops",
        "batches",
        "channels",
        "groups",
    ),
    "kernels",
    "units",
    "coupling",
    "shares",
    "filters",
)
# never each other
PARTS = (
    *(
        "models",
        "data",
        "losses",
        "optim",
        "gradinit",
        "allocate",
        "spectrum",
        "width",
        "scores",
        "saliency",
        "cost",
        "budgets",
    ),
    *("ratios", "surgery", "probes", "growing", "pretrained"),
)
# each may import those before it
RUNS = (
    *(
        "intact",
        "workdirs",
        "compilation",
        "checkpoint",
        "lock",
        "imports",
        "report",
        "stream",
        "interface",
        "members",
        "train",
    ),
    *(
        "sfw_init",
        "stages",
        "alone",
        "geometry",
        "structured",
        "compaction",
        "cuts",
        "removal",
        "greg",
        "trials",
        "ancestry",
        "plans",
        "building",
        "turns",
        "progress",
        "pipeline",
        "describe",
        "extend",
        "export",
        "evaluate",
        "run",
    ),
)
# in a folder, each may import those before it
FOLDERS = {
    "channels": ("labels", "values", "rules", "walk", "execute", "__init__"),
    "data": (
        *("sets", "augment", "inputs", "streams"),
        *("loading", "__init__"),
    ),
    "masks": ("search", "counts", "select", "thresholds", "__init__"),
    "polytopes": ("inside", "ksparse", "balls", "sets", "__init__"),
    "optim": ("rates", "schedules", "steps", "adagrad", "penalties", "recipe", "__init__"),
    "models": ("layers", "mlp", "convolutions", "cnn", "resnet", "vgg", "mobilenet", "__init__"),
    "report": (
        *("files", "rows", "events", "runs", "sections", "series", "raw", "draw", "summary"),
        *("pruning", "training", "growth", "channels", "limits", "page", "__init__", "__main__"),
    ),
}
ALLOWED = {
    **{name: set(NUMERICS[:i]) for i, name in enumerate(NUMERICS)},
    **{name: set(NUMERICS) for name in PARTS},
    **{name: {*NUMERICS, *PARTS, *RUNS[:i]} for i, name in enumerate(RUNS)},
    "prepare": {"prepared", "tables"},
    "__init__": {*NUMERICS, *PARTS, *RUNS},
}


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names below `sparsity_jax` that the file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            inside = node.module.split(".")[0] == "sparsity_jax"
            package = inside and (ROOT.parent / pathlib.Path(*node.module.split("."))).is_dir()
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if package
                else {node.module}
            )
    return {name.split(".", 1)[1] for name in found if name.startswith("sparsity_jax.")}


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = sorted(path for path in ROOT.rglob("*.py"))


def test_the_parser_sees_imports():
    assert imports(ROOT / "trees.py") == {"precision", "tables", "types"}
    assert {"checkpoint", "train", "stages"} <= imports(ROOT / "pipeline.py")
    assert "models.layers" in imports(ROOT / "models" / "mlp.py") | imports(
        ROOT / "models" / "__init__.py"
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_upwards(path):
    module, _, part = name_of(path).partition(".")
    assert module in ALLOWED, f"{path.name} has no place in the layout"
    allowed = ALLOWED[module]
    for name in imports(path):
        first, _, inner = name.partition(".")
        if first == module and module in FOLDERS:
            files = FOLDERS[module]
            assert inner in ("", *files[: files.index(part)]), f"{name_of(path)} imports {name}"
        else:
            assert first in allowed, (
                f"{name_of(path)} imports {name}; allowed: {', '.join(sorted(allowed))}"
            )


def test_only_prepare_and_the_set_reader_know_tensorflow():
    users = {
        name_of(path) for path in FILES if "import tensorflow" in path.read_text(encoding="utf-8")
    }
    assert users <= {"prepared", "prepare"}


def test_nothing_is_imported_or_run_by_name():
    """Names in data, configs and checkpoints must not become code."""
    by_name = {"import_module", "__import__", "eval", "exec", "builder_from_directory"}
    for path in FILES:
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        ]
        names = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
        assert not names & by_name, path.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_examples_in_docstrings_are_python(path):
    """Indented lines of a module's docstring, where one sets a name."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for paragraph in re.split(r"\n(?=\S)", text):
        _, _, block = paragraph.partition("\n\n")
        if re.search(r"^    \w+ = ", block, re.MULTILINE):
            ast.parse(textwrap.dedent(block))
