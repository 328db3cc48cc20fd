"""What the channels of a group are to a human: heads, hidden units, experts, told from their uses.

The walk notes what products and sums do along which axes: `heads` are along a product of two
activations, `experts` along one of activations with weights of each, and so on.
"""

from collections.abc import Iterator, Mapping

import numpy as np

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
    for use, *numbers in _used(walk, owners):
        own_names = {names[number] for number in numbers if number >= 0}
        for name in own_names:
            uses[name].add(use)
        if use == "heads" and len(own_names) == 2:
            together.add(frozenset(own_names))
    kinds = {}
    for name, own in uses.items():
        fitting = (kind for use, kind in _KINDS.items() if use in own)
        kinds[name] = next(fitting, _OTHERS)
    for pair in together:  # heads of queries that share one of keys and values
        queries, shared = sorted(pair, key=members.__getitem__)
        kinds |= {queries: _QUERIES, shared: _SHARED}
    return kinds


def _used(walk: Walk, owners: np.ndarray) -> Iterator[tuple]:
    """(use, numbers of groups ...) of entries, several for one that dies with any, -1 for none."""
    if not walk.uses:
        return
    uses, axes = zip(*walk.uses)
    which = np.repeat(np.arange(len(uses)), list(map(len, axes)))
    found = walk.labels.find(np.concatenate(axes))
    live = np.flatnonzero(found)
    parts = walk.labels.parts(found[live])
    rows = np.column_stack([which[live], owners[parts]])
    changes = np.diff(rows, axis=0, prepend=-1).any(1)  # neighbours are mostly alike
    for number, *numbers in np.unique(rows[changes], axis=0).tolist():
        yield (uses[number], *numbers)
