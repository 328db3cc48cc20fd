"""Optimizers of optax by their names there, with options that a config can hold.

Each is as optax makes it for the learning rate of the step, so that schedules, penalties and
feasible sets act as with the optimizers of this package.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, get_origin

import jax.numpy as jnp
import optax
from optax import GradientTransformationExtraArgs as Transformation
from optax import contrib

from sparsity_jax.optim import rates, steps
from sparsity_jax.optim.rates import LearningRate, Updated
from sparsity_jax.optim.steps import Accumulator
from sparsity_jax.types import Fields, PyTree

__all__ = ["optimizers"]

_NEED_MORE = (  # than gradients, weights and the loss, or weights other than the trained ones
    *("lbfgs", "sophia", "noisy_sgd", "dpsgd"),
    *("schedule_free_adamw", "schedule_free_sgd"),
    "optimistic_adam",  # deprecated
)
_PLAIN = (bool, int, float)
_ARGUMENTS = re.compile(  # behind the learning rate
    r"^Args:\n(?:  learning_rate:.*\n(?:    .*\n)*)?((?: .*\n?|\n)*)", re.MULTILINE
)


def optimizers() -> dict[str, Callable]:
    """Every optimizer of optax and optax.contrib, by name, as `extend.register` takes one."""
    every = {**_made_from(contrib), **_made_from(optax)}
    return {name: _entry(make) for name, make in every.items()}


def _made_from(module: Any) -> dict[str, Callable]:
    """The functions of a module that make an optimizer of a learning rate alone."""
    functions: dict[str, Callable] = {}
    for name, function in vars(module).items():
        wanted = not name.startswith(("_", "scale_by")) and name not in _NEED_MORE
        if wanted and inspect.isfunction(function):
            first = next(iter(inspect.signature(function).parameters), "")
            if first == "learning_rate":
                functions[name] = function
    return functions


def _entry(make: Callable) -> Callable:
    """`entry(learning_rate, sets, *, options...)` of optax's `make(learning_rate, options...)`."""

    def entry(learning_rate: LearningRate, sets: PyTree, **chosen: Any) -> Transformation:
        return steps.within_sets(_at_rate(make, learning_rate, chosen), sets)

    kinds = {}
    parameters = []
    _, *options = inspect.signature(make).parameters.values()
    for parameter in options:
        kind = _kind_of(parameter)
        if kind is not None:
            kinds[parameter.name] = kind
            named = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind)
            parameters.append(named)
    entry.__name__ = make.__name__
    entry.__doc__ = _told(make)
    entry.__annotations__ = kinds
    vars(entry)["__signature__"] = inspect.Signature(parameters)
    return entry


def _at_rate(make: Callable, learning_rate: LearningRate, options: Fields) -> Transformation:
    """optax's optimizer, made anew for the rate of each step."""
    rate = rates.as_rate(learning_rate)

    def init(params: PyTree) -> tuple:
        rated = rates.first_state(rate)
        any_loss = jnp.zeros(())  # the state does not depend on the rate
        first = rates.next_state(rate, rated, any_loss).learning_rate
        return rated, make(first, **options).init(params)

    def update(updates: PyTree, states: Any, params: PyTree, extra: Fields) -> Updated:
        rated, inner = states
        rated = rates.next_state(rate, rated, extra.get("value"))
        tx = optax.with_extra_args_support(make(rated.learning_rate, **options))
        updates, inner = tx.update(updates, inner, params, **extra)
        return updates, (rated, inner)

    return steps.needing_params(init, update)


def _kind_of(parameter: inspect.Parameter) -> Any:
    """The type of an option that a config can hold; None for functions and trees."""
    default = parameter.default
    if parameter.name.endswith("dtype"):
        return Accumulator
    if get_origin(parameter.annotation) is Literal:
        return parameter.annotation
    if isinstance(default, tuple):
        return tuple
    if default is None and "mask" not in parameter.name and _is_number(parameter.annotation):
        return float | None
    if type(default) in _PLAIN:
        return type(default)
    return None


def _is_number(annotation: Any) -> bool:
    """Whether an annotation of optax allows a float and no tree."""
    text = str(annotation)
    return "float" in text and "ArrayTree" not in text


def _told(make: Callable) -> str:
    """The first sentence of optax's docstring, and what that says of the options but the rate."""
    text = inspect.cleandoc(make.__doc__ or "")
    summary = text.partition("\n\n")[0]
    arguments = _ARGUMENTS.search(text)
    return f"{summary}\n\n{arguments[1] if arguments else ''}"
