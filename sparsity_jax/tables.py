"""Tables of named entries and the options they take: every wrong name, type or value is found here.

A table maps a name to a function whose keyword-only parameters are its options, or to a class whose
fields are, see `option`. Their annotations are the schema: `float`, `int`, `bool`, `str`, `dict`,
`tuple[T, ...]`, `Literal[...]`, `X | None`, `Annotated[T, Range(low, high)]`.
"""

import contextlib
import difflib
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

__all__ = [
    "NOT_GIVEN",
    "ConfigError",
    "Count",
    "Fraction",
    "Index",
    "Kind",
    "Named",
    "NonNegative",
    "Options",
    "Positive",
    "Range",
    "Seed",
    "Share",
    "blaming",
    "check_memory",
    "check_options",
    "closest",
    "convert",
    "defaults",
    "describe",
    "entry",
    "host_memory",
    "joined",
    "lookup",
    "nearest",
    "option",
    "options",
    "parameters",
    "read_text",
    "reason_of",
    "shortened",
    "within",
]

Kind = typing.TypeVar("Kind")
_NO_DEFAULT = inspect.Parameter.empty
NOT_GIVEN = ...  # no value, for None is one; survives pickling


class ConfigError(ValueError):
    """A setting that cannot work.

    where: its path below the place that is checked, e.g. `optimizer.momentum`, or "" for what is
    checked itself; `within` puts the places around it in front. value: what was given. verb: what
    the setting does with the value. why: what is wrong with it, where the value alone does not
    tell. allowed: what may be given. known: the names that are known there; they are what is
    allowed, unless that is given, and the field `closest` becomes the nearest of them, or "".

    The sentence is `where is value, why; allowed: ... Did you mean 'closest'?`, and without a value
    `where why; ...`. `where` alone is a sentence of its own, to which no place is added.
    """

    def __init__(
        self,
        where: str,
        value: Any = NOT_GIVEN,
        *,
        verb: str = "is",
        why: str = "",
        allowed: str = "",
        known: typing.Iterable[str] = (),
    ) -> None:
        super().__init__(where)
        names = sorted(known)
        self.where = where
        self.value = value
        self.verb = verb
        self.why = why.rstrip(".")
        self.allowed = allowed or ", ".join(names)
        self.closest = nearest(value, names)

    def is_sentence(self) -> bool:
        """Whether `where` says it all."""
        return self.value is NOT_GIVEN and not self.why and not self.allowed

    def __str__(self) -> str:
        if self.is_sentence():
            return self.where
        sentence = self.where or "the value"
        reason = f" {self.why}" if self.why else ""
        if self.value is not NOT_GIVEN:
            sentence += f" {self.verb} {shortened(self.value)}"
            sentence += "," if reason else ""
        allowed = f"; allowed: {self.allowed}" if self.allowed else ""
        hint = f" Did you mean {self.closest!r}?" if self.closest else ""
        return f"{sentence}{reason}{allowed}.{hint}"


@contextmanager
def within(place: str) -> Iterator[None]:
    """Mistakes that the block tells are of settings inside `place`, e.g. `config.fit`."""
    try:
        yield
    except ConfigError as error:
        if not error.is_sentence():
            error.where = joined(place, error.where)
        raise


def joined(place: str, path: str) -> str:
    """The place of the setting at `path` inside `place`: `config.fit` and `rules[0]`."""
    between = "." if place and path and not path.startswith("[") else ""
    return f"{place}{between}{path}"


@contextmanager
def blaming(where: str, value: Any = NOT_GIVEN) -> Iterator[None]:
    """What the block cannot do is a mistake of the setting `where`, whose value is `value`.

    A ValueError, and a ConfigError that is a sentence of its own, become its `why`.
    """
    try:
        yield
    except ConfigError as error:
        if error.is_sentence():
            raise _of_setting(where, value, error) from None
        if not error.where and error.value is NOT_GIVEN:
            error.value = value
        error.where = joined(where, error.where)
        raise
    except ValueError as error:
        raise _of_setting(where, value, error) from None


def _of_setting(where: str, value: Any, error: ValueError) -> ConfigError:
    reason = f"cannot work: {error}"
    return ConfigError(where, value, why=reason if value is NOT_GIVEN else f"which {reason}")


class Range(NamedTuple):
    """Allowed numbers: `low <= x <= high`, or strictly above `low` if `above`, strictly below
    `high` if `below`.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    def contains(self, value: float) -> bool:
        """Whether the number is allowed."""
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.below)

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"{'>' if self.above else '>='} {self.low}")
        if self.high is not None:
            parts.append(f"{'<' if self.below else '<='} {self.high}")
        return " and ".join(parts) or "any number"


Fraction = Annotated[float, Range(0.0, 1.0)]
Share = Annotated[float, Range(0.0, 1.0, below=True)]  # of which something has to be left
NonNegative = Annotated[float, Range(0.0)]
Positive = Annotated[float, Range(0.0, above=True)]
Count = Annotated[int, Range(1, 2**31 - 1)]  # steps and sizes are counted in 32 bits
Index = Annotated[int, Range(0, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # jax makes the same key of larger ones


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def option(cls: type[Kind]) -> type[Kind]:
    """A class of options: its fields are passed by name, it never changes and has a hash."""
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True, eq=False)
class Named:
    """Beside the type `dict`: options of the entry of `table` that the dict names, and those of
    `common` whichever it names.
    """

    table: Mapping[str, Callable]
    common: Callable | None = None

    def __str__(self) -> str:
        return f"with a name: {', '.join(sorted(self.table))}"


class Options(dict):
    """Options of a part that a config chooses by `name`; hashable, for they never change after they
    were read.
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


_SMALLEST = 1.2e-38  # what float32 holds without loss
_LARGEST = 3.4e38


def host_memory() -> float:
    """Bytes of memory of this machine; infinite where its system does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed: int, what: str, memory: float = 0) -> None:
    """Raises ConfigError for more bytes than `memory`, by default that of this machine. what: has
    so many, e.g. `whose weights take`.
    """
    memory = memory or host_memory()
    if needed > memory:
        raise ConfigError(
            "", why=f"{what} {needed / 1e9:,.1f} GB", allowed=f"{memory / 1e9:,.1f} GB, the memory"
        )


def nearest(name: Any, known: typing.Iterable[str]) -> str:
    """The known name that is nearest to `name`, or "" when none is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    if matches:
        return matches[0]
    return ""


def closest(name: str, known: typing.Iterable[str]) -> str:
    """A hint such as ` Did you mean 'momentum'?`, or nothing when no known name is near."""
    name = nearest(name, known)
    if name:
        return f" Did you mean {name!r}?"
    return ""


def lookup(table: Mapping[str, Any], name: Any, field: str = "") -> Any:
    """The entry `name` of `table`; raises ConfigError naming what is known.

    field: the caller's setting that names it, e.g. `name`.
    """
    if not isinstance(name, str) or name not in table:
        raise ConfigError(field, name, known=table)
    return table[name]


def parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """The options of `function`: its keyword-only parameters."""
    every = inspect.signature(function).parameters.items()
    keyword = inspect.Parameter.KEYWORD_ONLY
    return {name: parameter for name, parameter in every if parameter.kind is keyword}


def defaults(function: Callable) -> dict[str, Any]:
    """The options of `function` that have a default, with it."""
    every = {name: parameter.default for name, parameter in parameters(function).items()}
    return {name: value for name, value in every.items() if value is not _NO_DEFAULT}


def options(table: Mapping[str, Callable], /, name: str, **chosen: Any) -> dict[str, Any]:
    """A config of the entry `name`: every option with its default unless `chosen`, so that all can
    be overridden.
    """
    return {"name": name, **defaults(lookup(table, name, "name")), **chosen}


def check_options(
    function: Callable, options: Mapping[str, Any], also: typing.Iterable[str] = ()
) -> dict[str, Any]:
    """`options` as keyword arguments of `function`, after checking names, types and ranges against
    its signature.

    Only keyword-only parameters count as options. Lists become tuples, ints become floats where a
    float is asked for.
    also: further field names to list as known (checked elsewhere).
    Raises ConfigError for an unknown or missing option, a wrong type, or a value out of range.
    """
    hints = get_type_hints(function, include_extras=True)
    known = parameters(function)
    for name in options:
        if name not in known:
            raise ConfigError("", name, verb="has no field", known={*known, *also})
    for name in known:
        if known[name].default is _NO_DEFAULT and name not in options:
            raise ConfigError(name, why="is missing", allowed=describe(hints.get(name, Any)))
    return {name: convert(value, hints.get(name, Any), name) for name, value in options.items()}


def entry(
    table: Mapping[str, Callable], config: Mapping[str, Any], default: str = ""
) -> tuple[str, dict[str, Any]]:
    """(name, options) of the entry of `table` that a config such as `dict(name="sgd",
    momentum=0.9)` chooses, or of `default`; the options are complete.

    Raises ConfigError for an unknown name or option.
    """
    given = dict(config)
    name = given.pop("name", default)
    function = lookup(table, name, "name")
    return name, {**defaults(function), **check_options(function, given)}


def read_text(text: str, kind: type, field: str = "", least: float | None = None) -> Any:
    """The value of type `kind` that `text` stands for; raises ConfigError if there is none, or one
    below `least`. field: the caller's setting that holds it.
    """
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(field, text, allowed=kind.__name__) from None
    if least is not None and value < least:
        raise ConfigError(field, value, allowed=f"{least} and above")
    return value


def convert(value: Any, hint: Any, field: str = "") -> Any:
    """`value` as the type `hint`; raises ConfigError naming the value and what is allowed.

    field: the caller's setting that holds it.
    """
    with within(field):
        return _converted(value, hint)


def _converted(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    arguments = get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _in_ranges(value, hint)
    if origin in _UNIONS:
        return _as_one_of(value, hint)
    if origin is Literal:
        for literal in arguments:
            if value == literal and type(value) is type(literal):
                return value
        names = [literal for literal in arguments if isinstance(literal, str)]
        raise ConfigError("", value, allowed=describe(hint), known=names)
    if tuple in (hint, origin):
        return _as_tuple(value, hint)
    return _as_plain(value, hint, hint)


def _wrong_type(value: Any, hint: Any) -> ConfigError:
    return ConfigError("", value, why=f"of type {type(value).__name__}", allowed=describe(hint))


def _as_plain(value: Any, kind: Any, hint: Any) -> Any:
    """A value of the class `kind`; hint: what an error tells."""
    accepted, make = _ACCEPTED.get(kind, (kind, None))
    known = isinstance(accepted, (type, tuple)) and isinstance(value, accepted)
    if not known or (isinstance(value, bool) and kind is not bool):
        raise _wrong_type(value, hint)
    if kind is float and value and not _SMALLEST <= abs(value) <= _LARGEST:
        allowed = f"a finite number, 0 or {_SMALLEST} to {_LARGEST} in size"
        raise ConfigError("", value, allowed=allowed)
    if kind is str and not value.isprintable():
        raise ConfigError("", value, allowed="text of one line that can be printed")
    if make:
        return make(value)
    return value


def _in_ranges(value: Any, hint: Any) -> Any:
    kind, *rules = get_args(hint)
    value = _as_plain(value, kind, hint)
    for rule in rules:
        if isinstance(rule, Range) and not rule.contains(value):
            raise ConfigError("", value, allowed=describe(hint))
    return value


def _as_one_of(value: Any, hint: Any) -> Any:
    for kind in get_args(hint):
        with contextlib.suppress(ConfigError):
            return _converted(value, kind)
    raise _wrong_type(value, hint)


def _as_tuple(value: Any, hint: Any) -> tuple:
    kinds = get_args(hint)
    if not isinstance(value, (tuple, list)):
        raise _wrong_type(value, hint)
    if not kinds:  # of anything, without lists
        return tuple(_as_tuple(item, tuple) if isinstance(item, list) else item for item in value)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise _wrong_type(value, hint)
    pairs = enumerate(zip(value, kinds))
    converted = [convert(item, kind, f"[{i}]") for i, (item, kind) in pairs]
    return tuple(converted)


_UNIONS = (typing.Union, types.UnionType)
# what a class of options takes as a value of a class, and makes of it
_ACCEPTED: dict[Any, tuple[Any, Any]] = {
    float: ((int, float), float),
    dict: (Mapping, Options),
    Mapping: (Mapping, Options),
}


def shortened(value: Any) -> str:
    """`repr` of a value, cut where it is long."""
    text = repr(value)
    if len(text) <= 200:
        return text
    return f"{text[:200]}..."


def reason_of(error: Exception) -> str:
    """The first line of what an exception says, or else its type."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0] if lines else type(error).__name__)


def describe(hint: Any) -> str:
    """A readable form of a type annotation, e.g. `float >= 0.0 and <= 1.0` or `'global' |
    'random'`.
    """
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin is Annotated:
        return " ".join([describe(arguments[0]), *map(str, arguments[1:])])
    if origin in _UNIONS:
        return " | ".join(map(describe, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"tuple of {describe(arguments[0])}"
    if origin is tuple:
        return f"tuple ({', '.join(map(describe, arguments))})"
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))
