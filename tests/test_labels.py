"""Labels against what they stand for: the sets of entries that may be removed, listed one by
one.
"""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
from numpy.testing import assert_array_equal

from sparsity_jax.channels import labels

SIZES = (3, 2, 4, 6)


class Truth:
    """Every axis as sets of entries that die together, from all ways to let atoms (simple labels)
    die.
    """

    def __init__(self, of):
        self.of = of

    def removals(self, *axes):
        """All ways to remove entries of some axes: a set of tuples of tuples of bools."""
        parts = [self.of.parts(self.of.find(axis)) for axis in axes]
        sets = [[{*row} - {labels.FROZEN} for row in rows.tolist()] for rows in parts]
        atoms = sorted(set().union(*itertools.chain(*sets)))
        ways = set()
        for count in range(len(atoms) + 1):
            for gone in itertools.combinations(atoms, count):
                dies = lambda parts, gone=gone: not parts.isdisjoint(gone)
                ways.add(tuple(tuple(map(dies, axis)) for axis in sets))
        return ways


def fresh():
    made = labels.Labels()
    return made, [made.fresh(size) for size in SIZES], Truth(made)


PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4)


@hypothesis.given(st.lists(st.tuples(PAIRS, st.booleans()), max_size=5))
@hypothesis.example([([(0, 3), (1, 3)], False)])
@hypothesis.example([([(5, 1), (5, 2)], False)])
@hypothesis.example([([(1, 1)], True), ([(0, 1)], False)])
def test_ties_and_freezes_make_a_partition(rows):
    """Against connected components found by flooding."""
    made = labels.Labels()
    entries = made.fresh(8)
    edges, frozen = {i: set() for i in range(8)}, set()
    for pairs, freeze in rows:
        first, second = map(list, zip(*pairs))
        if freeze:
            made.freeze(entries[first])
            frozen.update(first)
        else:
            made.tie(entries[first], entries[second])
            for i, j in pairs:
                edges[i].add(j)
                edges[j].add(i)
    flooded = []
    for i in range(8):
        reached, todo = {i}, [i]
        while todo:
            new = edges[todo.pop()] - reached
            reached |= new
            todo += new
        flooded.append(frozenset() if reached & frozen else frozenset(reached))
    gone = {frozenset()}
    found = made.find(entries)
    for i, j in itertools.product(range(8), repeat=2):
        one = flooded[i] == flooded[j] or (flooded[i] in gone and flooded[j] in gone)
        assert (found[i] == found[j]) == one
    assert_array_equal(found == labels.FROZEN, [own in gone for own in flooded])
    assert made.is_live(entries) == (not all(own in gone for own in flooded))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("tie", "freeze", "merge")),
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=5,
)


@hypothesis.given(OPERATIONS)
def test_every_constraint_holds_in_the_end(operations):
    """Composites: whatever dies in the end, tied entries die together, products die with their
    factors, and no frozen entry dies."""
    made, axes, truth = fresh()
    tied, frozen, merged = [], [], []
    for kind, i, j, k in operations:
        a, b = axes[i % len(axes)], axes[j % len(axes)]
        if kind == "tie":
            size = min(len(a), len(b))
            a, b = np.roll(a, k)[:size], b[:size]
            made.tie(a, b)
            tied.append((a, b))
        elif kind == "freeze":
            made.freeze(a[k % len(a) :][:1])
            frozen.append(a[k % len(a) :][:1])
        elif len(a) * len(b) <= 24:
            axes.append(made.merge([a, b]))
            merged.append((a, b, axes[-1]))
    for a, b in tied:
        assert all(x == y for x, y in truth.removals(a, b))
    for a in frozen:
        assert not made.is_live(a)
    for a, b, product in merged:
        for x, y, xy in truth.removals(a, b, product):
            assert xy == tuple(p or q for p in x for q in y)


@hypothesis.given(
    st.permutations(range(12)), st.sampled_from(((3, 4), (2, 6), (2, 3, 2))), st.booleans()
)
def test_split_axes_removed_as_a_whole(order, shape, related):
    """Entry (i, j) dies exactly if its row or its column does."""
    made, _, truth = fresh()
    axis = (
        made.merge([made.fresh(3), made.fresh(4)]) if related else made.fresh(12)[np.array(order)]
    )
    parts = made.split(axis, shape)
    assert [len(part) for part in parts] == list(shape)
    for flat, *ways in truth.removals(axis, *parts):
        expected = [any(way[i] for way, i in zip(ways, at)) for at in np.ndindex(*shape)]
        assert list(flat) == expected
    if not related:  # nothing else is known of the entries, so every axis can be shortened
        assert all(made.is_live(part) for part in parts)
        assert len(truth.removals(*parts)) == 2 ** sum(shape)


def test_split_of_a_product_gives_its_factors():
    made, (rows, columns, _, _), _ = fresh()
    first, second = made.split(made.merge([rows, columns]), (3, 2))
    assert_array_equal(made.find(first), made.find(rows))
    assert_array_equal(made.find(second), made.find(columns))


def test_split_of_copies_freezes_what_is_copied():
    made, (rows, *_), _ = fresh()
    repeated, tiled = np.repeat(rows, 2), np.tile(rows, 2)
    for part, expected in zip(made.split(repeated, (3, 2)), (rows, np.zeros(2, int))):
        assert_array_equal(part, expected)
    for part, expected in zip(made.split(tiled, (2, 3)), (np.zeros(2, int), rows)):
        assert_array_equal(part, expected)
    assert made.is_live(rows)
    made.split(rows[[0, 0, 0, 0]], (2, 2))  # all four die at once: an axis would be left empty
    assert_array_equal(made.find(rows) == labels.FROZEN, [True, False, False])


def test_tie_of_two_products_pairs_their_factors():
    made, (rows, columns, *_), _ = fresh()
    others = made.fresh(3), made.fresh(2)
    made.tie(made.merge([rows, columns]), made.merge(others))
    assert_array_equal(made.find(rows), made.find(others[0]))
    assert_array_equal(made.find(columns), made.find(others[1]))


def test_tie_of_a_factor_to_its_product_freezes_the_rest():
    made = labels.Labels()
    (a,), (b,) = made.fresh(1), made.fresh(1)
    product = made.merge([np.array([a]), np.array([b, labels.FROZEN])])
    made.tie(product[:1], np.array([a]))  # a dies with a or b: b may not die alone
    assert not made.is_live(np.array([b]))
    assert made.is_live(np.array([a]))


def test_tie_of_products_of_different_length_freezes_nothing():
    """The last factor of the shorter becomes the product of what is left over."""
    made = labels.Labels()
    factors = [made.fresh(1) for _ in range(5)]
    made.tie(made.merge(factors[:2]), made.merge(factors[2:]))
    parts = made.parts(made.find(np.concatenate(factors)))
    assert_array_equal(np.count_nonzero(parts, 1), [1, 2, 1, 1, 1])


def test_a_label_may_become_a_product():
    made, (rows, columns, *_), truth = fresh()
    flat = made.fresh(6)
    made.tie(flat, made.merge([rows, columns]))
    assert_array_equal(made.parts(made.find(flat[:1])), [[rows[0], columns[0]]])
    assert len(truth.removals(flat)) == len(truth.removals(rows, columns)) - (2**3 - 1) - (
        2**2 - 1
    )  # all gone at once


def test_products_beyond_the_limit_are_frozen():
    made = labels.Labels()
    axes = made.fresh(labels.MOST // 2), made.fresh(3)
    assert not made.is_live(made.merge(axes))
    assert not any(map(made.is_live, axes))
    one = made.fresh(3)
    assert made.is_live(
        made.merge([np.zeros(labels.MOST, int), one])
    )  # one live axis is only repeated


def test_copies_do_not_touch_each_other():
    made, (rows, columns, *_), _ = fresh()
    product = made.merge([rows, columns])
    other = made.copy()
    other.freeze(rows)
    assert_array_equal(other.find(product), np.tile(columns, 3))
    assert made.is_live(rows)
    assert len(set(made.find(product).tolist())) == 6
    assert_array_equal(made.fresh(2), other.fresh(2))


def test_labels_tell_the_axis_they_were_made_for():
    made = labels.Labels()
    first, second = made.split(made.fresh(6), (3, 2))
    (of_first,), (of_second,) = map(np.unique, map(made.axis_of, (first, second)))
    assert of_first != of_second


def test_many_ties_at_once():
    """Several partners of one entry in one call, in a chain over the whole axis."""
    made = labels.Labels()
    axis = made.fresh(2000)
    made.tie(axis[:-1], axis[1:])
    assert set(made.find(axis).tolist()) == {int(axis[0])}
    made.tie(np.array([labels.FROZEN]), axis[-1:])
    assert not made.is_live(axis)


def test_dates_tell_when_entries_were_frozen():
    """Of a product: when the last of its factors was."""
    made, (rows, columns, others, _), _ = fresh()
    product = made.merge([rows, columns])
    made.tie(rows, others[:3])
    steps = (others[:1], columns, rows[1:2])
    for made.date, gone in enumerate(steps, 1):
        made.freeze(gone)
    assert_array_equal(made.dates(rows), [1, 3, 0])
    assert_array_equal(made.dates(others), [1, 3, 0, 0])
    assert_array_equal(made.dates(product), [2, 2, 3, 3, 0, 0])
    assert_array_equal(made.dates(np.zeros(2, int)), [0, 0])


def test_nothing():
    made = labels.Labels()
    none = made.fresh(0)
    made.tie(none, none.copy())
    made.freeze(none)
    assert len(made.find(none)) == len(made.merge([none, made.fresh(2)])) == 0
    assert [len(axis) for axis in made.split(none, (0, 3))] == [0, 3]
    assert not made.is_live(none)
