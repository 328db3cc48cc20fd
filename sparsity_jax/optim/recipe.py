"""Optimizers from configs: a checked recipe, its numbers, and the transformation made of both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.tree_util import tree_map
from optax import GradientTransformationExtraArgs as Transformation

from sparsity_jax import originals, polytopes, tables, trees
from sparsity_jax.optim import adagrad, from_optax, penalties, steps
from sparsity_jax.optim.schedules import SCHEDULES
from sparsity_jax.tables import ConfigError
from sparsity_jax.types import Fields, PyTree

__all__ = [
    "OPTIMIZERS",
    "PENALTIES",
    "Config",
    "Recipe",
    "check_config",
    "make",
    "needs_norms",
    "no_penalty",
    "numbers",
    "options",
    "program",
    "settings",
]


def no_penalty(tx: Transformation, values: Fields) -> Transformation:
    """The loss as it is."""
    del values
    return tx


OPTIMIZERS: dict[str, Callable] = {
    **from_optax.optimizers(),
    "sfw": steps.sfw,
    "adagrad_sfw": adagrad.adagrad_sfw,
    "sgd": steps.sgd,
}
PENALTIES: dict[str, Callable] = {"none": no_penalty, "l1": penalties.l1, "l2": penalties.l2}


class Recipe(NamedTuple):
    """A checked optimizer config. Recipes that differ in numbers only share a program.

    Options are complete, defaults included; the optimizer's own have the learning rate among them.
    """

    name: str
    options: Fields
    schedule: tuple[str, Fields]
    constraint: tuple[polytopes.Rule, ...]
    norms: str
    penalty: tuple[str, Fields]


def options(
    *,
    name: str,
    learning_rate: tables.NonNegative = 0.1,
    schedule: Annotated[dict, tables.Named(SCHEDULES)] = {"name": "keep"},  # noqa: B006
    constraint: polytopes.Config = {"name": "unconstrained"},  # noqa: B006
    norms: Literal["per_parameter", "per_shape"] = "per_parameter",
    penalty: Annotated[dict, tables.Named(PENALTIES)] = {"name": "none"},  # noqa: B006
) -> None:
    """Fields of every optimizer config beside the chosen optimizer's own.

    norms: how `initialization` radii are measured; `per_shape` is the original's table, see
        `originals.share_by_shape`.
    """


Config = Annotated[dict, tables.Named(OPTIMIZERS, options)]


def settings(
    name: str, *, schedule: str | dict = "keep", penalty: str | dict = "none", **chosen: Any
) -> Fields:
    """An optimizer config with all its fields; schedule, penalty: a name, or a dict of a name and
    chosen options.
    """
    config = {**tables.defaults(options), **tables.options(OPTIMIZERS, name)}
    for field, table, entry in (("schedule", SCHEDULES, schedule), ("penalty", PENALTIES, penalty)):
        given = {"name": entry} if isinstance(entry, str) else entry
        config[field] = tables.options(table, **given)
    return {**config, **chosen}


def check_config(config: Mapping[str, Any]) -> Recipe:
    """The recipe of an optimizer config such as `dict(name="sfw", learning_rate=1.0,
    constraint=dict(...), ...)`.

    Raises ConfigError for unknown names and fields, wrong types and values out of range.
    """
    shared = tables.parameters(options)
    factory = tables.lookup(OPTIMIZERS, config.get("name", ""), "name")
    given = {field: value for field, value in config.items() if field in shared}
    common = tables.defaults(options)
    common |= tables.check_options(options, given)
    given = {field: value for field, value in config.items() if field not in shared}
    own = tables.defaults(factory)
    own |= tables.check_options(factory, given, also=shared)
    name, rate = common["name"], common["learning_rate"]
    own["learning_rate"] = rate
    if name == "sfw" and rate > 1:
        raise ConfigError("learning_rate", rate, allowed="0 to 1 with the name 'sfw'")
    with tables.within("schedule"):
        schedule, of_schedule = tables.entry(SCHEDULES, common["schedule"], "keep")
        SCHEDULES[schedule](1.0, 10**6, 1, **of_schedule)  # raises for what does not go together
    with tables.within("constraint"):
        constraint = polytopes.check(common["constraint"])
    with tables.within("penalty"):
        penalty, of_penalty = tables.entry(PENALTIES, common["penalty"], "none")
        trees.check_pattern(of_penalty.get("parameters", ""), "parameters")
        kinds = {kind for _, kind, _ in constraint}
        plain = name == "sgd" and kinds == {"unconstrained"}
        if of_penalty.get("method") == "proximal" and not plain:
            allowed = "'subgradient', and 'proximal' with an unconstrained sgd"
            raise ConfigError("method", "proximal", allowed=allowed)
    chosen_schedule = schedule, of_schedule
    chosen_penalty = penalty, of_penalty
    return Recipe(name, own, chosen_schedule, constraint, common["norms"], chosen_penalty)


def _split(options: Fields) -> tuple[Fields, Fields]:
    """(the numbers, which may be traced; everything else) of options."""
    numbers = {name: value for name, value in options.items() if isinstance(value, float)}
    fixed = {name: value for name, value in options.items() if name not in numbers}
    return numbers, fixed


def program(recipe: Recipe) -> str:
    """What the compiled program depends on: all but the numbers."""
    kinds = []
    for pattern, name, of_set in recipe.constraint:
        static = [of_set.get(field) for field in ("p", "zero_up", "zero_below")]
        kinds.append((pattern, name, static))
    penalty, of_penalty = recipe.penalty
    _, fixed = _split(recipe.options)
    _, fixed_of_penalty = _split(of_penalty)
    optimizer = (recipe.name, fixed, recipe.schedule)
    return repr((optimizer, kinds, recipe.norms, penalty, fixed_of_penalty))


def needs_norms(recipe: Recipe) -> bool:
    """Whether some set takes its radius from the initialisation."""
    modes = [of_set.get("mode") for _, _, of_set in recipe.constraint]
    return "initialization" in modes


def numbers(
    recipe: Recipe, params: PyTree, norms: PyTree | None, order: Sequence[str] | None = None
) -> Fields:
    """What `make` may trace: the recipe's numbers and the feasible set of every parameter array.

    params: arrays or shape structs. norms: mean initial norms (`polytopes.mean_norms`), None if not
        `needs_norms`.
    order: paths of the params in the network's order, for norms `per_shape`; see
        `originals.share_by_shape`.
    """
    if norms is None:
        norms = tree_map(lambda _: 1.0, params)
    elif recipe.norms == "per_shape":
        norms = originals.share_by_shape(norms, params, order)
    sets = polytopes.build(params, norms, recipe.constraint)
    floats, _ = _split(recipe.options)
    values = {name: jnp.asarray(x, float) for name, x in floats.items()}
    _, of_penalty = recipe.penalty
    if "strength" in of_penalty:
        penalised = trees.matching(params, of_penalty["parameters"], "penalty.parameters")
        strength = jnp.asarray(of_penalty["strength"], float)
        of_array = lambda path, _: jnp.where(penalised[path], strength, 0.0)
        values["penalty"] = trees.map_named(of_array, params)
    return {**values, "sets": tree_map(jnp.asarray, sets)}


def make(recipe: Recipe, values: Fields, epochs: int, steps_per_epoch: int) -> Transformation:
    """The transformation of `recipe` with `values` from `numbers`, for a run of so many epochs."""
    floats, fixed = _split(recipe.options)
    traced = {name: values[name] for name in floats}
    schedule, of_schedule = recipe.schedule
    learning_rate = traced.pop("learning_rate")
    rate = SCHEDULES[schedule](learning_rate, epochs, steps_per_epoch, **of_schedule)
    tx = OPTIMIZERS[recipe.name](rate, values["sets"], **traced, **fixed)
    penalty, of_penalty = recipe.penalty
    if "penalty" in values:
        of_penalty = {**of_penalty, "strength": values["penalty"]}
    return PENALTIES[penalty](tx, traced, **of_penalty)
