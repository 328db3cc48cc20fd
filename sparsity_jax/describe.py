"""What a config can say: every field with its type, its default, its value and what it means.

An option is explained where it is declared, in the docstring of its function or class, as
`name: text`, several of one text as `one, other: text`; what many functions share is in `_SHARED`.
"""

import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from typing import Any

from sparsity_jax import data, members, models, plans, tables
from sparsity_jax.tables import Named, lookup, parameters
from sparsity_jax.types import Config

__all__ = ["Part", "describe", "summary_of", "texts_of"]

_SHARED = {  # what an option means wherever its own function does not say
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
    "eps": "added to what is divided by.",
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
    "preconditioning": "how the matrix is scaled before it is made orthogonal.",
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
_ELSEWHERE = ("data", "model", "num_classes")  # told by parts of their own, or no field
Part = tuple[str, Callable, Config]  # place, what its fields are parameters of, their values


def describe(config: Config) -> str:
    """The fields of a config, of its data and model, and of all its stages. Raises ConfigError for
    an unknown name.
    """
    return "\n".join(line for part in _parts(plans.plain(config)) for line in _part_lines(*part))


def _parts(config: Config) -> Iterator[Part]:
    """Every part of a config, and the parts in it that it chooses by name."""
    yield "config", plans.settings, config
    yield from _parts_of("config.sweep", members.choices, config.get("sweep", {}))
    yield from _parts_of("config.data", data.Options, config["data"])
    network = Named(models.MODELS, models.build)
    yield from _parts_named("config.model", network, config["model"])
    for name in members.stages_of(config):
        with tables.within(f"config.{name}"):
            kind = lookup(plans.STAGES, config[name]["kind"], "kind")
        yield from _parts_of(f"config.{name}", kind, config[name])


def _parts_of(place: str, options: Callable, values: Config) -> Iterator[Part]:
    """One part, and those in it that are chosen by name."""
    yield place, options, values
    every = {**tables.defaults(options), **values}
    for field, named in _named_options(options).items():
        if every.get(field) is not None:  # else every arm of a sweep has its own
            yield from _parts_named(f"{place}.{field}", named, every[field])


def _named_options(function: Callable) -> dict[str, Named]:
    """The options of `function` that choose an entry of a table by name."""
    hints = typing.get_type_hints(function, include_extras=True)
    named = {}
    for name in parameters(function):
        rules = getattr(hints.get(name), "__metadata__", ())
        if rules and isinstance(rules[0], Named):
            named[name] = rules[0]
    return named


def _parts_named(place: str, named: Named, values: Config) -> Iterator[Part]:
    """The part that `values` choose by name, after what all of its table share."""
    if named.common is not None:
        yield from _parts_of(place, named.common, values)
    entry = lookup(named.table, values.get("name", "none"), f"{place}.name")
    yield from _parts_of(place, entry, values)


def _part_lines(place: str, options: Callable, values: Config) -> Iterator[str]:
    """Heading, explanation, and two lines or more per option; nothing without options."""
    names = [name for name in parameters(options) if name not in _ELSEWHERE]
    if not names:
        return
    kind = getattr(options, "kind", "")
    yield f"{place}, kind {kind!r}" if kind else place
    yield from _wrapped(summary_of(options), 4)
    hints = typing.get_type_hints(options, include_extras=True)
    defaults = tables.defaults(options)
    texts = texts_of(options)
    for name in names:
        default = f"default {defaults[name]!r}" if name in defaults else "no default"
        here = f", here {values[name]!r}" if _is_other(name, values, defaults) else ""
        yield f"  {name}: {tables.describe(hints.get(name, Any))}; {default}{here}"
        yield from _wrapped(texts.get(name, ""), 6)
    yield ""


def _wrapped(text: str, indent: int) -> list[str]:
    """`text` in lines of at most 100 columns."""
    space = " " * indent
    return textwrap.wrap(text, 100, initial_indent=space, subsequent_indent=space)


def summary_of(options: Callable) -> str:
    """The docstring of a function or class up to the first option that it explains."""
    return _split(options, parameters(options))[0]


def texts_of(options: Callable) -> dict[str, str]:
    """What each option means, by name: as its docstring says, one of the classes it derives from,
    or `_SHARED`.
    """
    names = parameters(options)
    texts = {name: _SHARED[name] for name in names if name in _SHARED}
    for source in reversed(getattr(options, "__mro__", (options,))):
        _, told = _split(source, names)
        texts |= told
    return texts


def _split(options: Callable, names: Config) -> tuple[str, dict[str, str]]:
    """(the docstring up to its first option, the text of every option that it explains)."""
    text = " ".join((options.__doc__ or "").split())
    text = re.split(r" (?:Raises|Source:|Rows:|Options:) ", text)[0]
    name = "|".join(map(re.escape, names))
    if not name:
        return text, {}
    head = rf"(?:^|(?<=[.;:)] ))((?:{name})(?:, (?:{name}))*): "
    summary, *rest = re.split(head, text)
    texts: dict[str, str] = {}
    for listed, told in zip(rest[::2], rest[1::2]):
        texts |= dict.fromkeys(listed.split(", "), told.strip())
    return summary.strip(), texts


def _is_other(name: str, values: Config, defaults: Config) -> bool:
    """Whether the config has another value than the default; lists are the tuples that JSON has
    made lists of.
    """
    as_plain = lambda value: list(value) if isinstance(value, tuple) else value
    default = as_plain(defaults.get(name, ...))
    return as_plain(values.get(name, default)) != default
