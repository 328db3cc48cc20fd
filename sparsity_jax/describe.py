"""What a config can say: every field with its type, its default, its value and what it means.

An option is explained where it is declared, in the docstring of its function or class, as
`name: text`, several of one text as `one, other: text`; what many functions share is in `SHARED`.
"""

import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sparsity_jax import data, members, models, pipeline, tables

SHARED = {  # what an option means wherever its own function does not say
    # stages
    "augment": "how training images are changed at random, a row of `data.AUGMENTATIONS`.",
    "batch_size": "examples per batch.",
    "bins": "number of equal bins.",
    "epochs": "how often training goes through the data.",
    "evaluate_every": "epochs between evaluations on the test set.",
    "iterations": "how many steps are made.",
    "label": "name of the trained network in the report; the stage's where it is empty.",
    "loss": "what is minimised, a row of `losses.LOSSES` by name.",
    "num_examples": "how many train images are used, see `config.sample`.",
    "optimizer": "a row of `optim.OPTIMIZERS` by name.",
    # models
    "activation": "the function between layers.",
    "batch_norm": "whether layers are normalised over the batch.",
    "block": "which kind of residual block the network has.",
    "blocks": "channels and stride of every block.",
    "conv_bias": "whether convolutions have a bias.",
    "dense_widths": "outputs of the dense layers before the last one.",
    "depth": "number of layers, 6 n + 4.",
    "dropout": "share of activations that training drops.",
    "inner_widths": "channels inside each block; empty for those of its stage.",
    "layout": "channels of every convolution, and 'M' where images are halved.",
    "order": "what comes first behind a convolution, norm or activation.",
    "shortcut": "what the shortcut of a block that changes shape does.",
    "stage_sizes": "number of blocks per stage.",
    "stem": "the layers before the first block.",
    "stem_width": "channels of the stem.",
    "upsample": "factor by which images are enlarged first.",
    "widening": "factor of all widths.",
    "width": "channels of the first stage; later ones have multiples.",
    "widths": "outputs of every layer, or channels of every stage.",
    # optimizers, schedules, sets, penalties
    "constraint": "the feasible sets, a row of `polytopes.SETS` by name.",
    "dampening": "share of each new gradient that momentum leaves out.",
    "delta": "added to the square roots of the accumulated squares.",
    "gamma": "factor of the rate at every milestone.",
    "inner_steps": "Frank-Wolfe steps per update.",
    "k": "entries of every vertex that are not zero; at least k_frac of the array.",
    "k_frac": "the same as a share of the array.",
    "learning_rate": "the rate that the schedule starts from.",
    "method": "how the penalty acts: `subgradient`, or `proximal` steps that reach exact zeros.",
    "milestones": "epochs at whose start the rate drops.",
    "mode": "what tau is: see `polytopes.k_sparse`.",
    "momentum": "share of the old direction that stays.",
    "nesterov": "whether momentum looks ahead.",
    "p": "the exponent of the norm: 1, a number >= 2, or 'inf'.",
    "parameters": "pattern of the whole paths of the arrays that are meant.",
    "penalty": "what is added to the loss, a row of `optim.PENALTIES` by name.",
    "schedule": "how the rate changes, a row of `optim.SCHEDULES` by name.",
    "strength": "factor of the penalty.",
    "table": "epoch:factor pairs.",
    "tau": "size of the set, see `mode`.",
    "warmup_epochs": "epochs over which the rate rises from 0.",
    "weight_decay": "factor of the weights that is added to the gradient.",
    "zero_below": "magnitudes up to which a gradient counts as zero.",
    # losses and trackers
    "label_smoothing": "share of the target that all classes get alike.",
    "temperature": "divides the logits.",
    "alpha": "share of the old average that stays.",
    "track_batches": "batches at the end of each epoch that are averaged.",
    "use_l2": "whether scores are multiplied by the weight's magnitude.",
    "name": "which of the table it is.",
}
OF_MODELS = ("init", "dtype", "param_dtype")  # options of every model


class Part(NamedTuple):
    """A dict of a config. options: function or class whose parameters are its fields, of which
    `names` are meant.
    """

    place: str
    options: Callable
    values: Mapping
    names: tuple[str, ...]


def describe(config: Mapping) -> str:
    """The fields of a config, of its data and model, and of all its stages. Raises ConfigError for
    an unknown name.
    """
    lines = []
    for part in parts(pipeline.plain(config)):
        lines += [*part_lines(part), ""]
    return "\n".join(lines)


def parts(config: Mapping) -> Iterator[Part]:
    """Every part of a config, and the parts in it that it chooses by name."""
    known = tables.parameters(pipeline.settings)
    here = [name for name in known if name in config and name not in ("data", "model")]
    yield Part("config", pipeline.settings, config, tuple(here))
    yield from with_parts_of("config.sweep", members.choices, config.get("sweep", {}))
    yield from with_parts_of("config.data", data.load, config["data"])
    model = tables.lookup(models.MODELS, config["model"].get("name"), "config.model.name")
    yield from with_parts_of("config.model", model, config["model"])
    yield Part("config.model", models.build, config["model"], OF_MODELS)
    for name in members.stages_of(config):
        with tables.within(f"config.{name}"):
            kind = tables.lookup(pipeline.STAGES, config[name]["kind"], "kind")
        yield from with_parts_of(f"config.{name}", kind, config[name])


def with_parts_of(place: str, options: Callable, values: Mapping) -> Iterator[Part]:
    """One part, and those in it that are chosen by name."""
    names = tuple(tables.parameters(options))
    if names:
        yield Part(place, options, values, names)
    for field, named in tables.named_options(options).items():
        chosen = values.get(field, tables.defaults(options).get(field))
        if chosen is None:  # every arm of a sweep has its own
            continue
        if named.common is not None:
            yield from with_parts_of(f"{place}.{field}", named.common, chosen)
        entry = tables.lookup(named.table, chosen.get("name", "none"), f"{place}.{field}.name")
        yield from with_parts_of(f"{place}.{field}", entry, chosen)


def part_lines(part: Part) -> Iterator[str]:
    """Heading, explanation, and two lines or more per option."""
    kind = getattr(part.options, "kind", "")
    yield f"{part.place}, kind {kind!r}" if kind else part.place
    yield from wrapped(summary_of(part.options), 4)
    hints = typing.get_type_hints(part.options, include_extras=True)
    defaults, texts = tables.defaults(part.options), texts_of(part.options)
    for name in part.names:
        default = f"default {defaults[name]!r}" if name in defaults else "no default"
        here = f", here {part.values[name]!r}" if is_other(name, part.values, defaults) else ""
        yield f"  {name}: {tables.describe(hints.get(name, Any))}; {default}{here}"
        yield from wrapped(texts.get(name, ""), 6)


def wrapped(text: str, indent: int) -> list[str]:
    """`text` in lines of at most 100 columns."""
    space = " " * indent
    return textwrap.wrap(text, 100, initial_indent=space, subsequent_indent=space)


def texts_of(options: Callable) -> dict[str, str]:
    """What each option means, by name: as its docstring says, one of the classes it derives from,
    or `SHARED`.
    """
    names = tables.parameters(options)
    texts = {name: SHARED[name] for name in names if name in SHARED}
    for source in reversed(getattr(options, "__mro__", (options,))):
        _, told = split(source, names)
        texts |= told
    return texts


def summary_of(options: Callable) -> str:
    """The docstring before it comes to the options."""
    return split(options, tables.parameters(options))[0]


def split(options: Callable, names: Mapping) -> tuple[str, dict[str, str]]:
    """(the docstring up to its first option, the text of every option that it explains)."""
    text = " ".join((options.__doc__ or "").split())
    text = re.split(r" (?:Raises|Source:|Rows:|Options:) ", text)[0]
    name = "|".join(map(re.escape, names))
    if not name:
        return text, {}
    head = rf"(?:^|(?<=[.;:)] ))((?:{name})(?:, (?:{name}))*): "
    summary, *rest = re.split(head, text)
    texts = {}
    for listed, told in zip(rest[::2], rest[1::2]):
        texts |= dict.fromkeys(listed.split(", "), told.strip())
    return summary.strip(), texts


def is_other(name: str, values: Mapping, defaults: Mapping) -> bool:
    """Whether the config has another value than the default; lists are the tuples that JSON has
    made lists of.
    """
    as_plain = lambda value: list(value) if isinstance(value, tuple) else value
    return name in values and (
        name not in defaults or as_plain(defaults[name]) != as_plain(values[name])
    )
