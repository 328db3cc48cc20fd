"""Names of your own in configs: stages, models, measures and more, each by one call, in a file that
your config loads.

    import sparsity_jax.extend as extend

    extend.register("loss", "hinge", hinge)

`register` says what each kind of thing is. A config loads the file with `load`; `report` and
`evaluate` import nothing that a workdir names, so they are given it: `--import FILE`. A workdir
remembers which file that was.
"""

import os
import sys
from collections.abc import MutableMapping
from typing import Any

from sparsity_jax import (
    data,
    imports,
    losses,
    meshes,
    models,
    optim,
    plans,
    scores,
    sources,
    tables,
)
from sparsity_jax.interface import Stage
from sparsity_jax.report import page
from sparsity_jax.tables import ConfigError

__all__ = ["TABLES", "load", "register"]

load = imports.load
TABLES: dict[str, MutableMapping[str, Any]] = {
    "stage": plans.STAGES,
    "model": models.MODELS,
    "data": sources.SETS,
    "augmentation": data.AUGMENTATIONS,
    "optimizer": optim.OPTIMIZERS,
    "schedule": optim.SCHEDULES,
    "loss": losses.LOSSES,
    "measure": scores.MEASURES,
    "mesh_rule": meshes.RULES,
}
_TAKEN = {what: frozenset(table) for what, table in TABLES.items()}  # the library's own names


def register(what: str, name: str, entry: Any) -> None:
    """Makes `entry` what configs mean by `name`, a second call with the same name another one.
    Options of functions are keyword-only parameters with type hints, which are checked.

    stage: a class of options that derives from `interface.Stage`, decorated by `tables.option`.
    model: `entry(num_classes, settings, *, options...)` gives a Flax Linen module, called as
        module(images, train); or a function of a key that makes a Flax NNX module, called as
        module(images), or an Equinox module, called as module(image), with state and key where it
        has them; or a pair of functions, init(key, images), variables `{"params": ...,
        "batch_stats": ...}`, and apply(variables, images, train, key), logits and batch_stats.
    data: `entry(train_split, test_split)` gives (train, test, number of classes); each of the two
        is a pair of arrays, images (uint8) and labels, a grain pipeline of examples or batches, or
        an iterable of batches, or a `sources.in_epochs`; or all of it is a `sources.Opened`.
    augmentation: `entry(key, images)` of a uint8 batch.
    optimizer: `entry(learning_rate, sets, *, options...)` gives an optax transformation.
    schedule: `entry(learning_rate, epochs, steps_per_epoch, *, options...)` gives an `optim.Rate`.
    loss: `entry(logits, labels, *, options...)`, one number per example.
    measure: a `scores.Measure`.
    mesh_rule: `entry(path, shape, devices)` gives the PartitionSpec of a parameter.
    figure: `entry(series)` gives a `report.sections.Section` or None; name: the kind of stage whose
    rows it shows. Primitives of JAX: `groups.teach`. Raises ConfigError for another `what`, and for
    a name that is the library's own.
    """
    if what == "figure":
        page.FIGURES[entry] = (name,)
        return
    table = tables.lookup({**TABLES, "figure": page.FIGURES}, what, "what")
    if name in _TAKEN[what]:
        raise ConfigError(what, name, why="a name of the library's own", allowed="another name")
    if what == "stage" and entry.kind != name:
        raise ConfigError(f"{entry.__name__}.kind", entry.kind, allowed=f"{name!r}, its name")
    if what == "stage" and entry.run is Stage.run:
        says = "what `interface.Stage.run` says"
        raise ConfigError(f"{entry.__name__}.run", why="is missing", allowed=says)
    table[name] = entry
    file = sys._getframe(1).f_code.co_filename  # of the caller
    imports.REGISTERED.setdefault(what, {})[name] = os.path.abspath(file)
