"""Checks the built documentation: `python experiments/check_site.py build/site`.

Every name of an `__all__` of the package has its place in the reference, and no page loads
anything from another host. Prints, by module, which public functions have no example.
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
    package = sparsity_jax.__path__
    found = [module.name for module in pkgutil.walk_packages(package, "sparsity_jax.")]
    imported = [importlib.import_module(name) for name in found if "__main__" not in name]
    return [module for module in imported if hasattr(module, "__all__")]


def missing(module: types.ModuleType, places: set[str]) -> list[str]:
    """Names of the module that have no place, of their own or of the package that lists them."""
    parent = importlib.import_module(module.__name__.rpartition(".")[0])
    absent = []
    for name in module.__all__:
        again = getattr(parent, name, None) is getattr(module, name)
        owners = [module, parent] if again else [module]
        if not any(f"{owner.__name__}.{name}" in places for owner in owners):
            absent.append(f"{module.__name__}.{name}")
    return absent


def report_examples(shown: set[str]) -> None:
    """Prints a line per module that users import, and the total."""
    total = 0
    with_example = 0
    for short in sparsity_jax._MODULES:
        module = importlib.import_module(f"sparsity_jax.{short}")
        values = {name: inspect.unwrap(getattr(module, name)) for name in module.__all__}
        functions = [name for name, value in values.items() if inspect.isfunction(value)]
        lacking = [name for name in functions if f"{module.__name__}.{name}" not in shown]
        total += len(functions)
        with_example += len(functions) - len(lacking)
        print(
            f"{short}: {len(functions)} functions, without example: {' '.join(lacking) or 'none'}"
        )
    print(f"{with_example} of {total} public functions have an example")


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
    report_examples(reader.shown)
    print("\n".join(complaints) or "every public name is there, and nothing is loaded from outside")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
