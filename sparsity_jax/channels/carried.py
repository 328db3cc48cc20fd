"""Results that are new values of variables: statistics, averages, caches, all that training renews.

They lose the entries that their variables lose; all other results stay whole. Which they are is
declared, or recognised by names, shapes and types and by what the program computes them from.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity_jax import trees
from sparsity_jax.channels.walk import Walk
from sparsity_jax.types import PyTree, Shape

__all__ = ["Leaf", "Leaves", "Places", "declared", "leaves_of", "numbers", "recognised"]

Places = dict[str, str]  # paths of results, each with that of the variables it has new values of


class Leaf(NamedTuple):
    """One array of the results or of the variables."""

    number: int  # in flattening order
    shape: Shape
    dtype: Any


Leaves = dict[str, Leaf]  # by path


def leaves_of(tree: PyTree) -> Leaves:
    """The arrays of a tree, by path; of several with one path the last."""
    leaves = {}
    pairs = jax.tree.leaves_with_path(tree)
    for number, (path, leaf) in enumerate(pairs):
        name = trees.path_name(path)
        leaves[name] = Leaf(number, jnp.shape(leaf), jnp.result_type(leaf))
    return leaves


def numbers(places: Places, results: Leaves, variables: Leaves) -> dict[int, int]:
    """Numbers of the results at `places`, each with that of its variable.

    Raises ValueError for a place without results, and for results that are at no variable's place
    or of another shape.
    """
    result = {}
    for place, origin in places.items():
        below = _below(results, place)
        if not below:
            raise ValueError(
                f"state names the results {place!r}, of which there are none; allowed: the paths "
                f"{list(results)[:5]}, or the first parts of some."
            )
        variables_below = _below(variables, origin)
        for rest, leaf in below.items():
            given = f"state takes the result {_joined(place, rest)!r} for a new value of"
            if rest not in variables_below:
                raise ValueError(
                    f"{given} {_joined(origin, rest)!r}, which is no variable; allowed: "
                    f"{list(variables)[:5]}."
                )
            variable = variables_below[rest]
            if leaf.shape != variable.shape:
                raise ValueError(
                    f"{given} {_joined(origin, rest)!r}, but it has shape {leaf.shape}; allowed: "
                    f"that of the variable, {variable.shape}."
                )
            result[leaf.number] = variable.number
    return result


def declared(state: str | Mapping[str, str], results: Leaves, variables: Leaves) -> Places:
    """The places that a user names: those of results, or each with that of the variables.

    Raises ValueError for a path alone if the results below it have the names and shapes of no
    variables, or of those at several places.
    """
    if not isinstance(state, str):
        return dict(state)
    wanted = _below(results, state)
    if not wanted:
        return {state: state}  # refused by `numbers`
    fitting = []
    for place, node in _nodes(variables).items():
        if all(rest in node and node[rest].shape == wanted[rest].shape for rest in wanted):
            fitting.append(place)
    if len(fitting) != 1:
        raise ValueError(
            f"state is {state!r}, but the results below it, {list(wanted)[:5]}, have the names and "
            f"shapes of variables at {len(fitting)} places {fitting[:5]}; allowed: one place, or "
            "{path of results: path of variables}."
        )
    return {state: fitting[0]}


def recognised(walk: Walk, results: Leaves, variables: Leaves) -> Places:
    """Places whose results have the names, shapes and types of all variables at another place, and
    are computed from these.

    Numbers, as in lists, are no names. An outer place counts, not those inside of it. Variables at
    several places may fit only if they lose the same entries.
    """
    nodes = _nodes(variables)
    known = collections.defaultdict(list)
    for origin, node in nodes.items():
        known[_signature(node)].append(origin)
    places: Places = {}
    for place, node in _nodes(results).items():
        fitting = known[_signature(node)]
        is_inside = any(_is_below(place, outer) for outer in places)
        if not fitting or is_inside or not all(map(_is_named, node)):
            continue
        first, *others = (nodes[origin] for origin in fitting)
        same = all(_lose_the_same(walk, first, other) for other in others)
        if same and _is_computed(walk, node, first):
            places[place] = fitting[0]
    return places


def _is_computed(walk: Walk, node: Leaves, origin: Leaves) -> bool:
    """Whether each result that could lose entries depends on some variable of its new place."""
    bits = sum(1 << leaf.number for leaf in origin.values())
    ends = walk.results(walk.program)
    sources = [ends[leaf.number].sources for leaf in node.values() if _has_entries(leaf)]
    return len(sources) > 0 and all(source & bits for source in sources)


def _lose_the_same(walk: Walk, node: Leaves, other: Leaves) -> bool:
    """Whether variables of two places, of the same names, have the same labels."""
    for rest, leaf in node.items():
        pair = (leaf.number, other[rest].number)
        first, second = (walk.labels.find(walk.inputs[number].labels) for number in pair)
        if not np.array_equal(first, second):
            return False
    return True


def _has_entries(leaf: Leaf) -> bool:
    """Whether an array can lose any."""
    return len(leaf.shape) > 0 and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _signature(node: Leaves) -> frozenset:
    return frozenset((rest, leaf.shape, leaf.dtype) for rest, leaf in node.items())


# Paths -------------------------------------------------------------------------------------------


def _nodes(leaves: Leaves) -> dict[str, Leaves]:
    """What is below each place of a tree, by the rest of its path; outer places first."""
    nodes: dict = collections.defaultdict(dict)
    for path, leaf in leaves.items():
        parts = path.split("/")
        for i in range(len(parts)):
            place = "/".join(parts[:i])
            rest = "/".join(parts[i:])
            nodes[place][rest] = leaf
    return nodes


def _below(leaves: Leaves, place: str) -> Leaves:
    """What is at or below a place."""
    if place in leaves:
        return {"": leaves[place]}
    return _nodes(leaves).get(place, {})


def _is_below(path: str, place: str) -> bool:
    return not place or path.startswith(f"{place}/")


def _joined(place: str, rest: str) -> str:
    return "/".join(filter(None, (place, rest)))


def _is_named(rest: str) -> bool:
    """Whether a path has a name; `value` is in every path of an NNX state."""
    parts = rest.split("/")
    return any(part not in ("", "value") and not part.isdigit() for part in parts)
