"""The members of a run: the networks that `config.sweep` asks for, each with its own config."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sparsity_jax import tables


def choices(
    *,
    arms: dict = {},  # noqa: B006 - never changed
    arm: tuple[str, ...] | None = None,
    mode: Literal["auto", "vmap", "loop"] = "auto",
    members: tuple[tables.Index, ...] = (),
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


class Member(NamedTuple):
    """One network of a run. config: plain dicts. swept: values that differ, by field path, as rows
    show them: an arm by its label, a dict by its name.
    """

    config: dict
    swept: dict[str, Any]


def mode_of(config: Mapping) -> str:
    """How members run: `auto`, `vmap` or `loop`."""
    return split(config["sweep"])[0]["mode"]


def split(sweep: Mapping) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the checked `choices` of a sweep, the fields that it lists values of)."""
    known = tables.parameters(choices)
    given = {name: value for name, value in sweep.items() if name in known}
    fields = {name: value for name, value in sweep.items() if name not in known}
    with tables.within("config.sweep"):
        return {**tables.defaults(choices), **tables.check_options(choices, given)}, fields


def expand(config: Mapping) -> list[Member]:
    """Every member of a plain config: all combinations, arms outermost; one without a sweep."""
    chosen, fields = split(config.get("sweep", {}))
    if config.get("seed") and "seed" in fields:
        raise tables.ConfigError(
            "config.seed",
            config["seed"],
            why="but config.sweep.seed decides",
            allowed=f"--config.sweep.seed=({config['seed']},)",
        )
    found: list[Member] = []
    with tables.within("config.sweep"):
        for label, values in arms_of(config, chosen):
            found += combined(config, label, values, fields)
        numbers = chosen["members"] or range(len(found))
        if max(numbers) >= len(found):
            raise tables.ConfigError("members", chosen["members"], allowed=f"0 to {len(found) - 1}")
    return [found[number] for number in numbers]


def combined(
    config: Mapping, label: str, values: Mapping[str, Any], sweep: Mapping
) -> Iterator[Member]:
    """The members of one arm, whose fields are `values` by path: all combinations of a sweep."""
    arm = replaced({"seed": 0, **config}, {**values, "sweep": {}})
    refuse_other_fields(sweep, arm)
    fields = dict(swept_fields(sweep, arm))
    ranges = [range(len(listed)) for listed in fields.values()]
    for picked in itertools.product(*ranges):
        swept = {"arm": label} if label else {}
        new = {}
        for (path, listed), i in zip(fields.items(), picked):
            new[path] = listed[i]
            swept[path] = shown(listed)[i]
        tables.convert(new.get("seed", 0), tables.Seed, "seed")
        yield Member(replaced(arm, new), swept)


def stages_of(config: Mapping) -> list[str]:
    """Names of the stages of a config."""
    return [
        name for name, value in config.items() if isinstance(value, Mapping) and "kind" in value
    ]


def refuse_other_fields(sweep: Mapping, config: Mapping) -> None:
    """Raises ConfigError for fields that members of one run cannot differ in."""
    known = ["seed", *stages_of(config)]
    for name in sweep:
        if name.split(".")[0] not in known:
            raise tables.ConfigError(
                "", name, verb="names", known=[*known, *tables.parameters(choices)]
            )


def arms_of(config: Mapping, chosen: Mapping) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, fields by path) of every arm that runs; ("", {}) where there are none."""
    arms = chosen["arms"]
    names = list(arms) if chosen["arm"] is None else chosen["arm"]
    if not names:
        if arms:
            raise tables.ConfigError("arm", names, allowed="at least one name", known=arms)
        yield "", {}
    labels: dict[str, str] = {}
    for name in names:
        arm = tables.lookup(arms, name, "arm")
        with tables.within(f"arms.{name}"):
            values = fields_of(arm, config)
            label = arm.get("label") or name
            if label in labels:
                raise tables.ConfigError(
                    "label", label, why=f"as of {labels[label]!r}", allowed="one of its own"
                )
        labels[label] = name
        yield label, values


def fields_of(arm: Any, config: Mapping) -> dict[str, Any]:
    """The fields that an arm replaces, by path."""
    if not isinstance(arm, Mapping) or not isinstance(arm.get("label", ""), str):
        raise tables.ConfigError("", arm, allowed="a label, and fields by stage")
    values = {}
    for stage, fields in arm.items():
        if stage == "label":
            continue
        if stage not in stages_of(config):
            raise tables.ConfigError("", stage, verb="has no stage", known=stages_of(config))
        if not isinstance(fields, Mapping):
            raise tables.ConfigError(
                stage, fields, allowed="a dict of the stage's fields that change"
            )
        for field, value in fields.items():
            values[f"{stage}.{field}"] = value
    return values


def shown(values: Sequence) -> list:
    """Values of one swept field as rows show them: dicts by their names, numbered where several
    have the same.
    """
    names = [value.get("name", "") if isinstance(value, Mapping) else None for value in values]
    texts = []
    for i, (value, name) in enumerate(zip(values, names)):
        if name is None:
            texts.append(value)
        elif name and names.count(name) == 1:
            texts.append(name)
        else:
            texts.append(f"{name} {i + 1}".strip())
    return texts


def swept_fields(sweep: Mapping, config: Any, path: str = "") -> Iterator[tuple[str, list]]:
    """(path, values) of every field that a sweep lists values of."""
    known = list(config) if isinstance(config, Mapping) else []
    for name, value in sweep.items():
        if name not in known:
            nested = "." in name
            raise tables.ConfigError(
                path,
                name,
                verb="names",
                why="which does not exist",
                allowed="fields in fields as sweep=dict(fit=dict(epochs=(1, 2)))" * nested,
                known=known,
            )
        here = tables.joined(path, name)
        if isinstance(value, Mapping):
            yield from swept_fields(value, config[name], here)
        elif isinstance(value, (list, tuple)) and value:
            yield here, list(value)
        else:
            raise tables.ConfigError(here, value, allowed="a list of values for one field")


def replaced(config: Mapping, values: Mapping[str, Any]) -> dict:
    """A copy of `config` with the fields at the given paths replaced."""
    new = copy.deepcopy(dict(config))
    for path, value in values.items():
        *outer, last = path.split(".")
        inner = new
        for name in outer:
            inner = inner[name]
        inner[last] = value
    return new
