"""Tables of named entries and the options they take: every wrong name, type or value is found here.

A table maps a name to a function whose keyword-only parameters are its options, or to a class whose
fields are, see `option`. Their annotations are the schema: `float`, `int`, `bool`, `str`, `dict`,
`tuple[T, ...]`, `Literal[...]`, `X | None`, `Annotated[T, Range(low, high)]`.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

NOT_GIVEN = ...  # no value, for None is one; survives pickling


class ConfigError(ValueError):
    """A setting that cannot work.

    where: its path below the place that is checked, e.g. `optimizer.momentum`; `within` puts the
    places around it in front. value: what was given. why: what is wrong with it, where the value
    alone does not tell. allowed: what may be given. known: the names that are known there; they are
    what is allowed, and the field `closest` becomes the nearest of them, or "".

    The sentence is `where is value, why; allowed: ... Did you mean 'closest'?`, and without a value
    `where why; ...`. `where` alone is a sentence of its own, to which no place is added.
    """

    def __init__(
        self,
        where: str,
        value: Any = NOT_GIVEN,
        *,
        why: str = "",
        allowed: str = "",
        known: typing.Iterable[str] = (),
    ) -> None:
        super().__init__(where)
        names = sorted(known)
        self.where = where
        self.value = value
        self.why = why
        self.allowed = allowed or ", ".join(names)
        self.closest = nearest(value, names)

    def is_sentence(self) -> bool:
        """Whether `where` says it all."""
        return self.value is NOT_GIVEN and not self.why and not self.allowed

    def __str__(self) -> str:
        if self.is_sentence():
            return self.where
        sentence = self.where
        if self.value is not NOT_GIVEN:
            sentence += f" is {shortened(self.value)}"
            if self.why:
                sentence += ","
        if self.why:
            sentence += f" {self.why}"
        if self.allowed:
            sentence += f"; allowed: {self.allowed}"
        sentence += "."
        if self.closest:
            sentence += f" Did you mean {self.closest!r}?"
        return sentence.lstrip()


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """Mistakes that the block tells are of settings inside `place`, e.g. `config.fit`."""
    try:
        yield
    except ConfigError as error:
        if not error.is_sentence():
            error.where = f"{place}.{error.where}" if error.where else place
        raise


class TypeConfigError(ConfigError):
    """A setting of the wrong type."""


class Range(NamedTuple):
    """Allowed numbers: `low <= x <= high`, or strictly above `low` if `above`, strictly below
    `high` if `below`.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    def contains(self, value: float) -> bool:
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


Fraction = typing.Annotated[float, Range(0.0, 1.0)]
Share = typing.Annotated[float, Range(0.0, 1.0, below=True)]  # of which something has to be left
NonNegative = typing.Annotated[float, Range(0.0)]
Positive = typing.Annotated[float, Range(0.0, above=True)]
Count = typing.Annotated[int, Range(1, 2**31 - 1)]  # steps and sizes are counted in 32 bits
Index = typing.Annotated[int, Range(0, 2**31 - 1)]
Seed = typing.Annotated[int, Range(0, 2**32 - 1)]  # jax makes the same key of larger ones

option = dataclasses.dataclass(frozen=True, kw_only=True)  # a class of options: hashable


class Options(dict):
    """Options of a part that a config chooses by `name`; hashable, for they never change after they
    were read.
    """

    def __hash__(self) -> int:
        return hash(json.dumps(self, sort_keys=True))


SMALLEST, LARGEST = 1.2e-38, 3.4e38  # what float32 holds without loss


def host_memory() -> float:
    """Bytes of memory of this machine; infinite where its system does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed: int, what: str, memory: float = 0) -> None:
    """Raises ConfigError for more bytes than `memory`, by default that of this machine. what:
    begins the sentence.
    """
    memory = memory or host_memory()
    if needed > memory:
        raise ConfigError(
            f"{what} {needed / 1e9:,.1f} GB; allowed: {memory / 1e9:,.1f} GB, the memory."
        )


def nearest(name: Any, known: typing.Iterable[str]) -> str:
    """The known name that is nearest to `name`, or "" when none is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else ""


def closest(name: str, known: typing.Iterable[str]) -> str:
    """A hint such as ` Did you mean 'momentum'?`, or nothing when no known name is near."""
    name = nearest(name, known)
    return f" Did you mean {name!r}?" if name else ""


def lookup(table: Mapping[str, Any], name: str, where: str) -> Any:
    """The entry `name` of `table`. `where` is the setting that named it, e.g. `config.model.name`.

    Raises ConfigError naming what is known.
    """
    if not isinstance(name, str) or name not in table:
        raise ConfigError(
            f"{where} is {name!r}; known: {', '.join(sorted(table))}.{closest(name, table)}"
        )
    return table[name]


def parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """The options of `function`: its keyword-only parameters."""
    found = inspect.signature(function).parameters
    return {
        name: parameter
        for name, parameter in found.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def defaults(function: Callable) -> dict[str, Any]:
    """The options of `function` that have a default, with it."""
    found = parameters(function).items()
    return {
        name: parameter.default
        for name, parameter in found
        if parameter.default is not inspect.Parameter.empty
    }


def options(table: Mapping[str, Callable], /, name: str, **chosen: Any) -> dict[str, Any]:
    """A config of the entry `name`: every option with its default unless `chosen`, so that all can
    be overridden.
    """
    return {"name": name, **defaults(lookup(table, name, "name")), **chosen}


def check_options(
    function: Callable, options: Mapping[str, Any], where: str, also: typing.Iterable[str] = ()
) -> dict[str, Any]:
    """`options` as keyword arguments of `function`, after checking names, types and ranges against
    its signature.

    Only keyword-only parameters count as options. Lists become tuples, ints become floats where a
    float is asked for.
    also: further field names to list as known (checked elsewhere).
    Raises ConfigError for an unknown or missing option, a wrong type, or a value out of range.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    known = parameters(function)
    for name in options:
        if name not in known:
            fields = sorted({*known, *also})
            raise ConfigError(
                f"{where} has no field {name!r}; fields: "
                f"{', '.join(fields)}.{closest(name, fields)}"
            )
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(
                f"{where} needs the field {name!r} ({describe(hints.get(name, Any))})."
            )
    return {
        name: convert(value, hints.get(name, Any), f"{where}.{name}")
        for name, value in options.items()
    }


def read_text(text: str, kind: type, where: str, least: float | None = None) -> Any:
    """The value of type `kind` that `text` stands for; raises ConfigError if there is none, or one
    below `least`.
    """
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{where} is {text!r}; allowed: {kind.__name__}.") from None
    if least is not None and value < least:
        raise ConfigError(f"{where} is {text}; allowed: {least} and above.")
    return value


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; raises ConfigError naming `where`, the value and what is
    allowed.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        try:
            value = convert(value, args[0], where)
        except TypeConfigError:
            raise TypeConfigError(
                f"{where} is {value!r} ({type(value).__name__}); allowed: {describe(hint)}."
            ) from None
        for rule in args[1:]:
            if isinstance(rule, Range) and not rule.contains(value):
                raise ConfigError(f"{where} is {shortened(value)}; allowed: {describe(hint)}.")
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return convert(value, option, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
        names = [option for option in args if isinstance(option, str)]
        raise ConfigError(
            f"{where} is {value!r}; allowed: {describe(hint)}.{closest(value, names)}"
        )
    elif origin is tuple:
        if isinstance(value, (tuple, list)):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(
                    convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value)
                )
            if len(args) == len(value):
                return tuple(
                    convert(item, arg, f"{where}[{i}]")
                    for i, (item, arg) in enumerate(zip(value, args))
                )
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value and not SMALLEST <= abs(value) <= LARGEST:
                raise ConfigError(
                    f"{where} is {shortened(value)}; allowed: a finite number, 0 or {SMALLEST} to "
                    f"{LARGEST} in size."
                )
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint in (dict, Mapping):
        if isinstance(value, Mapping):
            return Options(value)
    elif hint is tuple:
        if isinstance(value, (tuple, list)):
            return tuple(
                convert(item, tuple, where) if isinstance(item, list) else item for item in value
            )
    elif hint is type(None):
        if value is None:
            return None
    elif isinstance(hint, type) and isinstance(value, hint):
        if isinstance(value, str) and not value.isprintable():
            raise ConfigError(
                f"{where} is {value!r}; allowed: text of one line that can be printed."
            )
        return value
    raise TypeConfigError(
        f"{where} is {shortened(value)} ({type(value).__name__}); allowed: {describe(hint)}."
    )


def shortened(value: Any) -> str:
    """`repr` of a value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def describe(hint: Any) -> str:
    """A readable form of a type annotation, e.g. `float >= 0.0 and <= 1.0` or `'global' |
    'random'`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return " ".join([describe(args[0]), *(str(rule) for rule in args[1:])])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(describe(option) for option in args)
    if origin is Literal:
        return " | ".join(repr(option) for option in args)
    if origin is tuple:
        return (
            f"tuple of {describe(args[0])}"
            if args[-1] is Ellipsis
            else f"tuple ({', '.join(map(describe, args))})"
        )
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
