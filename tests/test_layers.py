"""The layout: every file of the package has a rank, and imports point upwards only."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
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
        "attendance",
        "watch",
        "hosts",
        "platforms",
        "blocks",
        "trees",
        "meshes",
        "originals",
        "pixels",
        "decoding",
        "sources",
        "feeds",
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
    "allocate",
)
# never each other
PARTS = (
    *(
        "models",
        "data",
        "losses",
        "optim",
        "gradinit",
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
        "versions",
        "workdirs",
        "compilation",
        "checkpoint",
        "stored",
        "kept",
        "lock",
        "imports",
        "members",
        "provenance",
        "catalog",
        "report",
        "runs",
        "compare",
        "sequences",
        "stream",
        "streaming",
        "interface",
        "train",
    ),
    *(
        "sfw_init",
        "structured",
        "stages",
        "alone",
        "geometry",
        "compaction",
        "cuts",
        "removal",
        "greg",
        "trials",
        "weights",
        "durations",
        "progress",
        "finished",
        "ancestry",
        "plans",
        "building",
        "turns",
        "pipeline",
        "launching",
        "describe",
        "listing",
        "extend",
        "export",
        "evaluate",
        "run",
    ),
)
# in a folder, each may import those before it
FOLDERS = {
    "channels": (
        *("labels", "symbolic", "values", "rules", "indexing", "walk"),
        *("carried", "kinds", "grouping", "resized", "execute", "unstack", "__init__"),
    ),
    "data": (
        *("sets", "augment", "inputs", "streams"),
        *("loading", "__init__"),
    ),
    "masks": (
        *("order", "probes", "digits", "search", "counts", "select", "thresholds"),
        "gaps",
        "__init__",
    ),
    "polytopes": ("inside", "ksparse", "balls", "sets", "__init__"),
    "launching": (
        *("resources", "mirror", "tasks", "worker", "dispatch", "ray_cluster", "launch"),
        "__init__",
    ),
    "compare": ("lines", "page", "__init__", "__main__"),
    "optim": (
        *("rates", "schedules", "order", "steps", "adagrad", "from_optax", "penalties"),
        *("pruning", "recipe"),
        "__init__",
    ),
    "models": (
        *("frameworks", "layers", "mlp", "convolutions", "cnn", "resnet", "vgg", "mobilenet"),
        "__init__",
    ),
    "report": (
        *("files", "rows", "trackers", "events", "runs", "sections", "series", "raw", "draw"),
        *("summary", "text"),
        *("pruning", "training", "growth", "channels", "limits", "page", "__init__", "__main__"),
    ),
}
ALLOWED = {
    **{name: set(NUMERICS[:i]) for i, name in enumerate(NUMERICS)},
    **{name: set(NUMERICS) for name in PARTS},
    **{name: {*NUMERICS, *PARTS, *RUNS[:i]} for i, name in enumerate(RUNS)},
    "prepare": {"prepared", "tables"},
    "commands": {"tables"},
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


def module_of(path: pathlib.Path) -> str:
    return name_of(path).removesuffix(".__init__")


FILES = sorted(path for path in ROOT.rglob("*.py"))
DOTTED = {module_of(path) for path in FILES}
EMPTY = {"__init__", "channels", "launching", "compare.__main__", "report.__main__"}  # list nothing
MODULES = [path for path in FILES if module_of(path) not in EMPTY]


def test_the_parser_sees_imports():
    assert imports(ROOT / "trees.py") == {"blocks", "platforms", "precision", "tables", "types"}
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


def listed(module: str) -> set[str]:
    """`__all__` of a dotted module below `sparsity_jax`, where all of it is."""
    imported = importlib.import_module(f"sparsity_jax.{module}")
    for name in imported.__all__:
        assert hasattr(imported, name), f"{module} has no {name}"
    return set(imported.__all__)


def names_of(statement: ast.stmt) -> list[str]:
    """Names that a statement of a module defines; none where it imports them."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    nodes = [node for target in targets for node in ast.walk(target)]
    return [node.id for node in nodes if isinstance(node, ast.Name)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_are_listed_documented_and_typed(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = {name for name in names_of(node) if not name.startswith("_")}
        assert names <= listed(module_of(path))
        if names and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
        if names and isinstance(node, ast.FunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            untyped = [argument.arg for argument in arguments if argument.annotation is None]
            assert not untyped, f"{node.name} does not say the type of {untyped}"


def undocumented(cls: type) -> list[str]:
    """Public methods and properties of the class itself that neither it nor a base describes."""
    kinds = (property, functools.cached_property, classmethod, staticmethod)
    own = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    methods = [name for name, value in own.items() if inspect.isroutine(value)]
    methods += [name for name, value in own.items() if isinstance(value, kinds)]
    return [name for name in methods if not inspect.getdoc(inspect.getattr_static(cls, name))]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_methods_are_documented(path):
    module = importlib.import_module(f"sparsity_jax.{module_of(path)}")
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) and value.__module__.startswith("sparsity_jax"):
            assert not undocumented(value), f"{module_of(path)}.{name}"


class Base:
    def told(self):
        """In the base."""


class Other(Base):
    def told(self):
        return 1

    @property
    def untold(self):
        return 2


def test_an_undocumented_method_is_found():
    assert undocumented(Other) == ["untold"]


MODULES_OF_PACKAGE = """
import sys
import sparsity_jax as sj
assert "jax" not in sys.modules
assert sj.masks is sys.modules["sparsity_jax.masks"]
"""


def test_the_package_gives_its_modules_when_they_are_used():
    run = subprocess.run([sys.executable, "-c", MODULES_OF_PACKAGE], capture_output=True, text=True)
    assert not run.returncode, run.stderr
    assert set(sparsity_jax._MODULES) <= DOTTED & set(dir(sparsity_jax))
    with pytest.raises(AttributeError, match="'maks'"):
        sparsity_jax.maks  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_use_only_what_others_list(path):
    modules = {}
    used = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sparsity_jax"):
            package = node.module.removeprefix("sparsity_jax").removeprefix(".")
            for alias in node.names:
                full = f"{package}.{alias.name}".removeprefix(".")
                if full in DOTTED:
                    modules[alias.asname or alias.name] = full
                else:
                    used.append((package, alias.name))
    used += [
        (modules[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in modules
    ]
    for module, name in used:
        assert name in listed(module) or f"{module}.{name}" in DOTTED, f"{module}.{name}"


def test_only_prepare_and_the_set_reader_know_tensorflow():
    users = {
        name_of(path) for path in FILES if "import tensorflow" in path.read_text(encoding="utf-8")
    }
    assert users <= {"prepared", "prepare"}


def test_nothing_is_imported_or_run_by_name():
    """Names in data, configs and checkpoints must not become code; the package itself imports
    those of its own list only.
    """
    by_name = {"import_module", "__import__", "eval", "exec", "builder_from_directory"}
    for path in set(FILES) - {ROOT / "__init__.py"}:
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
