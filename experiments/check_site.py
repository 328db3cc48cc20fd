"""Checks the built documentation: `python experiments/check_site.py build/site`.

Every name of an `__all__` of the package has its place in the reference, every public function an
example, and no page loads anything from another host.
"""

import html.parser
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import types

import sparsity_jax

LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
OUTSIDE = re.compile(r"(https?:)?//")
IMPORTED = re.compile(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)")


class Reader(html.parser.HTMLParser):
    """What is of interest in the pages that it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.loaded: set[str] = set()
        self.shown: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.places.add(values.get("id") or "")
        address = values.get(LOADING.get(tag, "")) or ""
        if OUTSIDE.match(address):
            self.loaded.add(address)
        if values.get("class") == "example":
            self.shown.add(values.get("title") or "")


def modules() -> list[types.ModuleType]:
    """All that list public names, without programs that run when they are imported."""
    found = []
    for described in pkgutil.walk_packages(sparsity_jax.__path__, "sparsity_jax."):
        if described.name.endswith("__main__"):
            continue
        module = importlib.import_module(described.name)
        if hasattr(module, "__all__"):
            found.append(module)
    return found


def missing(module: types.ModuleType, places: set[str]) -> list[str]:
    """Names of the module that have no place, of their own or of the package that lists them."""
    path = module.__name__
    parent = importlib.import_module(path.rpartition(".")[0])
    absent = []
    for name in module.__all__:
        allowed = {f"{path}.{name}"}
        if getattr(parent, name, None) is getattr(module, name):
            allowed.add(f"{parent.__name__}.{name}")
        if not allowed & places:
            absent.append(f"{path}.{name}")
    return absent


def functions_of(module: types.ModuleType) -> list[str]:
    """Dotted names of its public functions."""
    functions = []
    for name in module.__all__:
        value = inspect.unwrap(getattr(module, name))
        if inspect.isfunction(value):
            functions.append(f"{module.__name__}.{name}")
    return functions


def without_example(shown: set[str]) -> list[str]:
    """The functions without an example, of the modules that users import."""
    functions = []
    for name in sparsity_jax._MODULES:
        module = importlib.import_module(f"sparsity_jax.{name}")
        functions += functions_of(module)
    return [name for name in functions if name not in shown]


def main(folder: str) -> int:
    site = pathlib.Path(folder)
    reader = Reader()
    for page in site.rglob("*.html"):
        reader.feed(page.read_text(encoding="utf-8"))
    for style in site.rglob("*.css"):
        reader.loaded.update(IMPORTED.findall(style.read_text(encoding="utf-8")))
    complaints = [f"loaded from elsewhere: {address}" for address in sorted(reader.loaded)]
    for module in modules():
        complaints += [f"not in the reference: {name}" for name in missing(module, reader.places)]
    complaints += [f"without an example: {name}" for name in without_example(reader.shown)]
    print("\n".join(complaints) or "every public name is there, every function has an example")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
