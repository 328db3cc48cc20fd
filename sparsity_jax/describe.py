"""What a config can say: every field with its type, its default and its value, below the text that
explains them.
"""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparsity_jax import data, models, pipeline, tables


def describe(config: Mapping) -> str:
    """The fields of a config, of its data and model, and of all its stages. Raises ConfigError for
    an unknown name.
    """
    return "\n".join(
        line for part in parts(pipeline.plain(config)) for line in (*part_lines(*part), "")
    )


def parts(config: Mapping) -> Iterator[tuple[str, Callable, Mapping]]:
    """(place, function or class whose parameters are the options, values there) of every part of a
    config.
    """
    known = tables.parameters(pipeline.settings)
    parts_of_their_own = ("data", "model")
    common = {
        name: config[name] for name in known if name in config and name not in parts_of_their_own
    }
    yield "config", pipeline.settings, common
    yield "config.data", data.load, config["data"]
    model = tables.lookup(models.MODELS, config["model"].get("name"), "config.model.name")
    yield "config.model", model, config["model"]
    yield "config.model", models.build, config["model"]
    for name, fields in config.items():
        if name not in known:
            kind = tables.lookup(pipeline.STAGES, fields["kind"], f"config.{name}.kind")
            yield f"config.{name}", kind, fields


def part_lines(place: str, options: Callable, values: Mapping) -> Iterator[str]:
    """Heading, explanation and a line per option."""
    kind = getattr(options, "kind", "")
    yield f"{place}, kind {kind!r}" if kind else place
    for line in inspect.getdoc(options).splitlines():
        yield f"    {line}".rstrip()
    hints = typing.get_type_hints(options, include_extras=True)
    defaults = tables.defaults(options)
    for name in tables.parameters(options):
        default = f"default {defaults[name]!r}" if name in defaults else "no default"
        here = f", here {values[name]!r}" if is_other(name, values, defaults) else ""
        yield f"  {name}: {tables.describe(hints.get(name, Any))}; {default}{here}"


def is_other(name: str, values: Mapping, defaults: Mapping) -> bool:
    """Whether the config has another value than the default; lists are the tuples that JSON has
    made lists of.
    """
    as_plain = lambda value: list(value) if isinstance(value, tuple) else value
    return name in values and (
        name not in defaults or as_plain(defaults[name]) != as_plain(values[name])
    )
