"""What the channels of a group are to a human: heads, hidden units, experts, told from their uses.

The walk notes what products and sums do along which axes: `heads` are along a product of two
activations, `experts` along one of activations with weights of each, and so on.
"""

from collections.abc import Mapping

import numpy as np

from sparsity_jax.channels.labels import Labels
from sparsity_jax.channels.walk import Walk

__all__ = ["of_groups"]

# The first that fits; uses are noted by `rules`.
_KINDS = {
    "heads": "heads",
    "experts": "experts",
    "head": "head dimensions",
    "filters": "channels",
    "residual": "residual channels",
}
_OTHERS = "hidden units"
_SHARED = "key-value heads"  # of grouped queries
_QUERIES = "query heads of each"


def of_groups(walk: Walk, groups: Mapping[str, np.ndarray], members: Mapping[str, int]) -> dict:
    """The kind of each group. groups: labels of the channels of each; members: how many arrays are
    members of it."""
    owners = np.full(walk.labels.num, -1)
    names = list(groups)
    for number, name in enumerate(names):
        owners[groups[name]] = number
    uses: dict[str, set] = {name: set() for name in names}
    together = set()
    for use, axis in walk.uses:
        for number_set in _owner_sets(walk.labels, owners, axis):
            for number in number_set:
                uses[names[number]].add(use)
            if use == "heads" and len(number_set) == 2:
                together.add(number_set)
    kinds = {}
    for name, own in uses.items():
        fitting = (kind for use, kind in _KINDS.items() if use in own)
        kinds[name] = next(fitting, _OTHERS)
    for pair in together:  # heads of queries that share one of keys and values
        queries, shared = sorted((names[number] for number in pair), key=members.__getitem__)
        kinds |= {queries: _QUERIES, shared: _SHARED}
    return kinds


def _owner_sets(labels: Labels, owners: np.ndarray, axis: np.ndarray) -> set[frozenset]:
    """The groups that entries of an axis are of, several for an entry that dies with any."""
    parts = labels.parts(labels.find(axis))
    rows = np.unique(owners[parts], axis=0)
    return {frozenset(number for number in row if number >= 0) for row in rows.tolist()}
