"""The members of a run: the networks that `config.sweep` asks for, each with its own config."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

from sparsity_jax.tables import (
    ConfigError,
    Index,
    Seed,
    check_options,
    convert,
    defaults,
    joined,
    lookup,
    parameters,
    within,
)
from sparsity_jax.types import Config, Fields

__all__ = ["FailedError", "Member", "choices", "expand", "mode_of", "replaced", "stages_of", "told"]


def choices(
    *,
    arms: dict = {},  # noqa: B006 - never changed
    arm: tuple[str, ...] | None = None,
    mode: Literal["auto", "vmap", "loop"] = "auto",
    members: tuple[Index, ...] = (),
) -> None:
    """Entries of `config.sweep` beside the fields that it lists values of.

    arms: labelled alternatives, fields of stages that change together, by name of the arm, e.g.
        `dict(fast=dict(label="Fast", fit=dict(optimizer=...), again=dict(epochs=1)))`; each field
        is replaced as a whole, and the label (default: the arm's name) is that of the report.
    arm: names of the arms that run; all of them where it is not given.
    mode: members run side by side in one program (`vmap`), or one after the other (`loop`); `auto`
        is `vmap` for dense networks, of those that share a compiled program: they differ in the
        seed and in numbers of one optimizer.
    members: numbers of the members that run, counted from 0; all where it is empty.
    """


class FailedError(Exception):
    """Members that failed for other reasons than a loss that is not finite, a line for each; the
    others have run.
    """


class Member(NamedTuple):
    """One network of a run. config: plain dicts. swept: values that differ, by field path, as rows
    show them: an arm by its label, a dict by its name. stages: the checked ones by name, once they
    are.
    """

    config: Fields
    swept: Fields
    stages: Mapping[str, Any] = {}


def mode_of(config: Config) -> str:
    """How members run: `auto`, `vmap` or `loop`."""
    return _split(config["sweep"])[0]["mode"]


def _split(sweep: Config) -> tuple[Fields, Fields]:
    """(the checked `choices` of a sweep, the fields that it lists values of)."""
    fields = dict(sweep)
    given = {name: fields.pop(name) for name in parameters(choices) if name in sweep}
    with within("config.sweep"):
        return {**defaults(choices), **check_options(choices, given)}, fields


def expand(config: Config) -> list[Member]:
    """Every member of a plain config: all combinations, arms outermost; one without a sweep."""
    options, fields = _split(config.get("sweep", {}))
    seed = config.get("seed")
    if seed and "seed" in fields:
        raise ConfigError(
            "config.seed",
            seed,
            why="but config.sweep.seed decides",
            allowed=f"--config.sweep.seed=({seed},)",
        )
    every: list[Member] = []
    with within("config.sweep"):
        for label, values in _arms_of(config, options):
            arm = replaced({"seed": 0, **config, "sweep": {}}, values)
            every += _combined(arm, {"arm": label} if label else {}, fields)
        numbers = options["members"] or range(len(every))
        if max(numbers) >= len(every):
            raise ConfigError("members", numbers, allowed=f"0 to {len(every) - 1}")
    return [every[number] for number in numbers]


def _combined(config: Config, labels: Fields, sweep: Config) -> Iterator[Member]:
    """All combinations of a sweep's values in one config. labels: what their rows show besides."""
    sweepable = {name: config[name] for name in ("seed", *stages_of(config))}
    fields = dict(_swept_fields(sweep, sweepable))
    listed = [zip(values, _shown(values)) for values in fields.values()]
    for values in product(*listed):
        new = {path: value for path, (value, _) in zip(fields, values)}
        texts = {path: text for path, (_, text) in zip(fields, values)}
        convert(new.get("seed", 0), Seed, "seed")
        yield Member(replaced(config, new), {**labels, **texts})


def stages_of(config: Config) -> list[str]:
    """Names of the stages of a config."""
    return [name for name, value in config.items() if isinstance(value, dict) and "kind" in value]


def _arms_of(config: Config, options: Config) -> Iterator[tuple[str, Fields]]:
    """(label, fields by path) of every arm that runs; ("", {}) where there are none."""
    arms = options["arms"]
    stages = stages_of(config)
    names = list(arms) if options["arm"] is None else options["arm"]
    if arms and not names:
        raise ConfigError("arm", names, allowed="at least one name", known=arms)
    if not names:
        yield "", {}
    labels: dict[str, str] = {}
    for name in names:
        arm = lookup(arms, name, "arm")
        with within(f"arms.{name}"):
            values = _fields_of(arm, stages)
            label = arm.get("label") or name
            if label in labels:
                same = f"as of {labels[label]!r}"
                raise ConfigError("label", label, why=same, allowed="one of its own")
        labels[label] = name
        yield label, values


def _fields_of(arm: Any, stages: Sequence[str]) -> Fields:
    """The fields that an arm replaces, by path."""
    if not isinstance(arm, dict) or not isinstance(arm.get("label", ""), str):
        raise ConfigError("", arm, allowed="a label, and fields by stage")
    values: Fields = {}
    for stage in [name for name in arm if name != "label"]:
        if stage not in stages:
            raise ConfigError("", stage, verb="has no stage", known=stages)
        if not isinstance(arm[stage], dict):
            allowed = "a dict of the stage's fields that change"
            raise ConfigError(stage, arm[stage], allowed=allowed)
        own = arm[stage]
        values |= {f"{stage}.{field}": value for field, value in own.items()}
    return values


def _shown(values: Sequence) -> list:
    """Values of one swept field as rows show them: dicts by their names, numbered where several
    have the same.
    """
    names = [value.get("name", "") for value in values if isinstance(value, dict)]
    texts = []
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            name = value.get("name", "")
            is_unique = name and names.count(name) == 1
            value = name if is_unique else f"{name} {number}".strip()
        texts.append(value)
    return texts


def told(swept: Fields) -> str:
    """The values of a sweep that a network has, in one line."""
    return ", ".join(f"{name}={value}" for name, value in swept.items())


def _swept_fields(sweep: Config, config: Any, path: str = "") -> Iterator[tuple[str, list]]:
    """(path, values) of every field that a sweep lists values of. config: what may be swept."""
    fields = list(config) if isinstance(config, dict) else []
    for name, value in sweep.items():
        if name not in fields:
            known = fields if path else [*fields, *parameters(choices)]
            nested = "fields in fields as sweep=dict(fit=dict(epochs=(1, 2)))"
            raise ConfigError(
                path,
                name,
                verb="names",
                why="which cannot be swept",
                allowed=nested if "." in name else "",
                known=known,
            )
        here = joined(path, name)
        if isinstance(value, dict):
            yield from _swept_fields(value, config[name], here)
        elif isinstance(value, (list, tuple)) and value:
            yield here, list(value)
        else:
            raise ConfigError(here, value, allowed="a list of values for one field")


def replaced(config: Config, values: Fields) -> Fields:
    """A copy of `config` with the fields at the given paths replaced."""
    new = copy.deepcopy(dict(config))
    for path, value in values.items():
        *outer, last = path.split(".")
        functools.reduce(dict.__getitem__, outer, new)[last] = value
    return new
