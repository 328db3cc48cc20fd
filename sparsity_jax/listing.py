"""What configs can name, a line each: `python -m sparsity_jax.run --list [KIND]`."""

import ast
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparsity_jax import catalog, describe, imports, models, optim, plans, scores, sources, tables

__all__ = ["KINDS", "listed"]

_WIDTH = 100
_MORE_DATA = {  # beside those that have a name of their own
    "folder:PATH": "Images in PATH/train/CLASS and PATH/test/CLASS.",
    "NAME": "Any image-classification set of TensorFlow Datasets, see `sparsity_jax.prepare`.",
}


def _configs() -> dict[str, str]:
    """The library's configs by name, with the text at their top."""
    texts = {}
    for name, file in catalog.files().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts[name] = ast.get_docstring(tree) or ""
    return texts


def _variants() -> dict[str, str]:
    """What may stand behind the colon, of all configs that have `variants`."""
    texts = {}
    for name, file in catalog.files().items():
        module = imports.load(file)
        own = module.variants() if hasattr(module, "variants") else {}
        for variant, text in own.items():
            texts[f"{name}:{variant}"] = text
    return texts


def _of_table(table: Mapping[str, Any]) -> Callable[[], dict[str, str]]:
    """Reads the entries of a table, those registered later included."""
    return lambda: {name: _about(entry) for name, entry in table.items()}


def _about(entry: Any) -> str:
    """What an entry of a table is."""
    if isinstance(entry, scores.Measure):
        return entry.about
    return describe.summary_of(entry)


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "configs": _configs,
    "variants": _variants,
    "stages": _of_table(plans.STAGES),
    "models": _of_table(models.MODELS),
    "measures": _of_table(scores.MEASURES),
    "optimizers": _of_table(optim.OPTIMIZERS),
    "data": lambda: {**_of_table(sources.SETS)(), **_MORE_DATA},
}


def listed(kind: str = "") -> str:
    """Names of this kind, or of all, with a line on each. Raises ConfigError for another kind."""
    if kind:
        tables.lookup(KINDS, kind, "--list")
    kinds = [kind] if kind else list(KINDS)
    return "\n".join(line for name in kinds for line in _lines(name))


def _lines(kind: str) -> Iterator[str]:
    yield kind
    texts = KINDS[kind]()
    width = max(map(len, texts)) + 4
    for name, text in texts.items():
        yield f"  {name:<{width - 2}}{_first_sentence(text, _WIDTH - width)}".rstrip()
    yield ""


def _first_sentence(text: str, width: int) -> str:
    """The first sentence, cut where it is longer."""
    one_line = " ".join(text.split())
    first, *_ = re.split(r"(?<=[.]) (?=[A-Z])", one_line)
    return textwrap.shorten(first, width, placeholder=" ...")
