"""Schedules and selections: the original's numbers, slow references, exact counts, budgets met,
errors.
"""

import math
from fractions import Fraction

import golden_data
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import budgets, tables

FILE = "07_rounds_and_cap.npz"
GOLDEN = golden_data.load(FILE)
SIZES = {"conv1": 16, "stage1/conv1": 40, "stage1/conv2": 40, "stage2/conv1": 100, "tiny": 1}


@pytest.fixture(scope="module")
def golden():
    return GOLDEN


def random_scores(seed=0, sizes=SIZES, levels=None):
    """Scores by name; with `levels`, integers below it, hence many ties."""
    rng = default_rng(seed)
    draw = (
        rng.random if levels is None else lambda size: rng.integers(0, levels, size).astype(float)
    )
    return {name: draw(size) for name, size in sizes.items()}


def total(keep):
    return sum(int(mask.sum()) for mask in keep.values())


def share_of(ratio, number):
    """`ratio` of `number`, rounded down; the fraction that the decimal says."""
    return math.floor(Fraction(ratio).limit_denominator(10**9) * int(number))


def removed(keep, alive):
    return {name: np.flatnonzero(alive[name] & ~keep[name]) for name in keep}


# Schedules


def settings(golden, prefix):
    """(array, ratio, rounds) of the golden entries such as p_ratios/percent=75/rounds=5."""
    for key in golden:
        if key.startswith(f"{prefix}/percent="):
            percent, rounds = (int(part.split("=")[1]) for part in key.split("/")[1:])
            yield golden[key], percent / 100, rounds


def test_round_ratios_of_the_original(golden):
    cases = list(settings(golden, "p_ratios"))
    assert cases
    for expected, ratio, rounds in cases:
        plan = budgets.round_ratios(ratio=ratio, num_rounds=rounds)
        assert_allclose(plan.ratios, expected, rtol=1e-15)
        assert plan.density[-1] == pytest.approx(1 - ratio)


def test_truncated_percentages_of_the_original(golden):
    for expected, ratio, rounds in settings(golden, "p_cumulative"):
        assert_array_equal(
            budgets.round_ratios(ratio=ratio, num_rounds=rounds, cumulative="truncated").density,
            expected / 100,
        )
    assert (
        budgets.round_ratios(ratio=0.75, num_rounds=25, cumulative="truncated").density[-1] == 0.18
    )  # the quarter asked for is missed


def test_manual_thresholds_of_the_original(golden):
    for case in golden_data.parts(FILE, r"manual/(\d+)/"):
        percents = [
            int(number) for number in str(golden[f"manual/{case}/spec"][0]).strip("[]").split(",")
        ]
        plan = budgets.manual_ratios(thresholds=tuple(percent / 100 for percent in percents))
        assert_allclose(plan.ratios, golden[f"manual/{case}/p_ratios"], rtol=1e-12)
        assert_allclose(plan.density, 1 - np.array(percents) / 100, rtol=1e-12)


def test_polynomial_schedule_by_hand():
    assert_allclose(
        budgets.polynomial_ratios(ratio=0.8, num_rounds=2).density, [1 - 0.8 * 7 / 8, 0.2]
    )
    assert_allclose(
        budgets.polynomial_ratios(ratio=0.8, num_rounds=4, power=1).density, [0.8, 0.6, 0.4, 0.2]
    )


@pytest.mark.parametrize("name", sorted(budgets.SCHEDULES))
def test_density_is_the_product_of_the_rounds(name):
    fields = dict(thresholds=(0.2, 0.5, 0.9)) if name == "manual" else dict(ratio=0.9, num_rounds=7)
    plan = budgets.schedule(name, **fields)
    assert_allclose(np.cumprod(1 - plan.ratios), plan.density)
    assert plan.density[-1] == pytest.approx(0.1)
    assert (plan.ratios > 0).all()
    assert (np.diff(plan.density) < 0).all()


def test_ratio_to_reach():
    assert budgets.ratio_to_reach(0.5, 80, 80) == 0.5
    assert budgets.ratio_to_reach(0.25, 80, 40) == 0.5
    assert budgets.ratio_to_reach(0.5, 80, 30) == 0


@pytest.mark.parametrize(
    ("name", "fields", "where"),
    [
        ("cubic", dict(ratio=0.5), "name"),
        ("gradient_flow", dict(ratio=0.5, num_rounds=2, power=3), ""),
        ("polynomial", dict(ratio=0.5), "num_rounds"),
        ("gradient_flow", dict(ratio=1.0, num_rounds=3), "ratio"),
        ("gradient_flow", dict(ratio=0.5, num_rounds=0), "num_rounds"),
        ("gradient_flow", dict(ratio=0.99, num_rounds=40, cumulative="truncated"), ""),
        ("gradient_flow", dict(ratio=0.5, num_rounds=2, cumulative="integer"), "cumulative"),
        ("manual", dict(thresholds=(0.5, 0.3)), "thresholds"),
        ("manual", dict(thresholds=(0.5, 1.0)), "thresholds[1]"),
        ("manual", dict(thresholds=0.5), "thresholds"),
        ("manual", dict(thresholds=()), "thresholds"),
    ],
)
def test_schedules_explain_misuse(name, fields, where):
    with pytest.raises(tables.ConfigError) as error:
        budgets.schedule(name, **fields)
    assert error.value.where == where


# The original's selections


HYPER = golden_data.hyper(FILE)
ROUNDS = golden_data.parts(FILE, r"rounds/([^/]+)/(\w+)/round0/")
RESIDUAL = golden_data.parts(FILE, r"rounds/([^/]+)/(\w+)/round0/prune_fraction_requested")
DEPTHWISE = [
    case for case in ROUNDS if golden_data.is_mobilenet(GOLDEN[f"rounds/{case[0]}/param_names"])
]


def by_layer(rows):
    """Rows (layer, channel, score) as scores by name; names sort in the order of the rows."""
    layers = np.unique(rows[:, 0], return_inverse=True)[1]
    return {f"{layer:02d}": rows[layers == layer, 2] for layer in range(layers.max() + 1)}


def by_name(array):
    return {f"{layer:02d}": int(size) for layer, size in enumerate(array)}


def masks_without(stored, prefix, scores, digits):
    keep = {name: np.ones(array.shape, bool) for name, array in scores.items()}
    for layer, name in enumerate(keep):
        keep[name][stored[f"{prefix}/pruned_idx/{layer:0{digits}d}"]] = False
    removed_by_layer = [int((~mask).sum()) for mask in keep.values()]
    assert_array_equal(removed_by_layer, stored[f"{prefix}/n_pruned"])
    return keep


def assert_same(keep, expected):
    assert list(keep) == list(expected)
    for name, mask in expected.items():
        assert_array_equal(keep[name], mask, err_msg=name)


@pytest.mark.parametrize("case", golden_data.parts(FILE, r"cap/(\d+)/"))
def test_cap_of_the_original(golden, case):
    scores = by_layer(golden[f"cap/{case}/imp_order_in"])
    floors = budgets.minimum_kept(by_name(golden[f"cap/{case}/original_sizes"]))
    options = dict(floors=floors, protect="original")
    sizes = {name: array.size for name, array in scores.items()}
    assert by_name(golden[f"cap/{case}/current_sizes"]) == sizes
    protected = {name: np.arange(size) >= size - floors[name] for name, size in sizes.items()}
    importance = np.where(
        np.concatenate([*protected.values()]), 1e7, np.concatenate([*scores.values()])
    )
    assert_array_equal(golden[f"cap/{case}/importance_out"], importance)
    least = total(protected)
    for ratio in golden_data.parts(FILE, rf"cap/{case}/ratio=([\d.]+)/"):
        expected = masks_without(golden, f"cap/{case}/ratio={ratio}", scores, 1)
        if sum(sizes.values()) - share_of(float(ratio), sum(sizes.values())) >= least:
            assert_same(budgets.select(scores, float(ratio), **options), expected)
            continue
        # the protected channels do not suffice: the original cuts into them and empties layers,
        # where we refuse
        with pytest.raises(ValueError, match="minimum kept per layer leaves"):
            budgets.select(scores, float(ratio), **options)
        keep = budgets.select_to_cost(total, scores, least, tolerance=0, **options)
        assert_same(keep, protected)
        assert all((expected[name] <= keep[name]).all() for name in scores)


def replay(golden, net, measure, select):
    """Pairs of `select(scores, round, alive)` and what was kept: every round on survivors only, and
    in full size.
    """
    alive = None
    for i in range(HYPER["rounds"]):
        prefix = f"rounds/{net}/{measure}/round{i}"
        scores = by_layer(golden[f"{prefix}/imp_order"])
        assert by_name(golden[f"{prefix}/orig_size"]) == {
            name: array.size for name, array in scores.items()
        }
        expected = masks_without(golden, prefix, scores, 2)
        yield select(scores, i, None), expected
        alive = alive or {name: np.ones(array.shape, bool) for name, array in scores.items()}
        full, wanted = {}, {}
        for name, mask in alive.items():
            full[name], wanted[name] = np.full(mask.size, np.nan), np.zeros(mask.size, bool)
            full[name][mask], wanted[name][mask] = scores[name], expected[name]
        yield select(full, i, alive), wanted
        alive = wanted


@pytest.mark.parametrize(("net", "measure"), [case for case in ROUNDS if case not in RESIDUAL])
def test_rounds_of_the_original(golden, net, measure):
    plan = budgets.schedule(
        "gradient_flow", ratio=HYPER["total_percent"] / 100, num_rounds=HYPER["rounds"]
    )
    floors = budgets.minimum_kept(by_name(golden[f"rounds/{net}/{measure}/round0/orig_size"]))

    def select(scores, i, alive):
        return budgets.select(
            scores, plan.ratios[i], alive=alive, floors=floors, protect="original"
        )

    for keep, expected in replay(golden, net, measure, select):
        assert_same(keep, expected)


@pytest.mark.parametrize(("net", "measure"), DEPTHWISE)
def test_mobilenet_rounds_without_the_copies(golden, net, measure):
    """Depthwise layers (odd entries) follow the layer before: each channel counts twice instead."""
    plan = budgets.round_ratios(ratio=HYPER["total_percent"] / 100, num_rounds=HYPER["rounds"])
    for i in range(HYPER["rounds"]):
        prefix = f"rounds/{net}/{measure}/round{i}"
        every = by_layer(golden[f"{prefix}/imp_order"])
        scores = {name: every[name] for name in list(every)[::2]}
        counts = dict.fromkeys(list(scores)[:-1], 2)
        floors = by_name(golden[f"rounds/{net}/{measure}/round0/orig_size"])
        floors = {
            name: floor for name, floor in budgets.minimum_kept(floors).items() if name in scores
        }
        keep = budgets.select(
            scores, plan.ratios[i], counts=counts, floors=floors, protect="original"
        )
        expected = masks_without(golden, prefix, every, 2)
        assert_same(keep, {name: expected[name] for name in scores})


@pytest.mark.parametrize(("net", "measure"), RESIDUAL)
def test_resnet_rounds_of_the_original(golden, net, measure):
    """The first layer counts but stays (its score is 1e7); removed second convolutions come back
    with score 0.
    """
    plan = budgets.round_ratios(
        ratio=HYPER["total_percent"] / 100, num_rounds=HYPER["rounds"], cumulative="truncated"
    )
    sizes = by_name(golden[f"rounds/{net}/{measure}/round0/orig_size"])
    for i in range(HYPER["rounds"]):
        prefix = f"rounds/{net}/{measure}/round{i}"
        scores = by_layer(golden[f"{prefix}/imp_order"])
        alive = sum(array.size for array in scores.values())
        ratio = budgets.ratio_to_reach(plan.density[i], sum(sizes.values()), alive)
        assert ratio == golden[f"{prefix}/prune_fraction_requested"]
        options = dict(floors=dict.fromkeys(scores, 1), protect="original_resnet")
        keep = budgets.select(scores, ratio, **options)
        assert_same(keep, masks_without(golden, prefix, scores, 2))
        assert alive - total(keep) < int(ratio * alive)  # rescued filters are missing


# Network-wide ranking


def reference(scores, ratio, alive, counts, floors, excluded):
    """Removes one channel after the other, the least important that may go."""
    protected = {}
    for name, array in scores.items():
        best = sorted(np.flatnonzero(alive[name]), key=lambda j: (-array[j], j))
        protected[name] = {*best[: floors[name]], *(best if name in excluded else ())}
    order = sorted(
        (
            (array[j], -i, -j)
            for i, (name, array) in enumerate(sorted(scores.items()))
            for j in np.flatnonzero(alive[name])
        )
    )
    names = sorted(scores)
    budget = share_of(
        ratio, sum(counts[name] * alive[name].sum() for name in names if name not in excluded)
    )
    keep = {name: mask.copy() for name, mask in alive.items()}
    for _, i, j in order:
        name, j = names[-i], -j
        if j in protected[name]:
            continue
        budget -= counts[name]
        if budget < 0:
            break
        keep[name][j] = False
    return keep


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    names = draw(st.permutations([f"layer{i}" for i in range(len(sizes))]))
    rng = default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = random_scores(
        draw(st.integers(0, 9)), dict(zip(names, sizes)), draw(st.sampled_from([None, 2, 5]))
    )
    alive = {name: rng.random(array.size) < 0.8 for name, array in scores.items()}
    for mask in alive.values():
        mask[rng.integers(mask.size)] = True
    counts = {name: int(rng.integers(1, 4)) for name in names}
    floors = {name: int(rng.integers(1, array.size + 1)) for name, array in scores.items()}
    excluded = {name for name in names if rng.random() < 0.2}
    return (
        scores,
        draw(st.floats(0, 1, width=32, allow_subnormal=False)),
        alive,
        counts,
        floors,
        excluded,
    )


@hypothesis.given(problems())
def test_select_equals_the_slow_reference(problem):
    scores, ratio, alive, counts, floors, excluded = problem
    exclude = "|".join(sorted(excluded)) or None
    options = dict(alive=alive, counts=counts, floors=floors, exclude=exclude)
    try:
        keep = budgets.select(scores, ratio, **options)
    except ValueError as error:
        assert "minimum kept per layer leaves" in str(error)  # noqa: PT017
        free = {
            n: 0 if n in excluded else max(alive[n].sum() - floors[n], 0) * counts[n]
            for n in scores
        }
        assert share_of(
            ratio, sum(counts[n] * alive[n].sum() for n in scores if n not in excluded)
        ) > sum(free.values())
        return
    assert_same(keep, reference(scores, ratio, alive, counts, floors, excluded))
    assert list(keep) == list(scores)
    for name, mask in keep.items():
        assert not (mask & ~alive[name]).any()
        assert mask.sum() >= min(floors[name], alive[name].sum()) >= 1
        assert name not in excluded or (mask == alive[name]).all()


@pytest.mark.parametrize("protect", ["correct", "original"])
@pytest.mark.parametrize("levels", [None, 3])
def test_counts_are_exact_and_masks_nested(protect, levels):
    scores = random_scores(1, levels=levels)
    masks = [budgets.select(scores, ratio, protect=protect) for ratio in np.linspace(0, 0.9, 31)]
    for ratio, keep in zip(np.linspace(0, 0.9, 31), masks):
        assert total(keep) == sum(SIZES.values()) - share_of(ratio, sum(SIZES.values()))
        assert all(keep[name].sum() >= share_of(0.05, size) + 1 for name, size in SIZES.items())
    for larger, smaller in zip(masks, masks[1:]):  # noqa: RUF007
        assert all((smaller[name] <= larger[name]).all() for name in SIZES)


def test_what_the_minimum_protects():
    assert budgets.minimum_kept({"a": 20, "b": 1, "c": 39}) == {"a": 2, "b": 1, "c": 2}
    scores = {"a": np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), "b": np.arange(10.0, 30.0)}
    floors = {"a": 2, "b": 2}
    select = lambda protect: budgets.select(scores, 7 / 26, floors=floors, protect=protect)
    assert np.flatnonzero(select("correct")["a"]).tolist() == [0, 1]
    assert total(select("correct")) == 19
    assert np.flatnonzero(select("original")["a"]).tolist() == [4, 5]
    assert np.flatnonzero(select("original_resnet")["a"]).tolist() == [
        0,
        1,
    ]  # selected all six, two came back
    assert total(select("original_resnet")) == 21


def test_ties_keep_the_lower_index_and_the_earlier_name():
    scores = {"b": np.ones(4), "a": np.ones(4)}
    keep = budgets.select(scores, 3 / 8, floors={"a": 1, "b": 1})
    assert list(keep) == ["b", "a"]
    assert keep["b"].tolist() == [True, False, False, False]
    assert keep["a"].all()


def test_rounds_under_masks_remove_what_survivors_alone_would():
    scores, alive, plan = random_scores(3), None, budgets.round_ratios(ratio=0.7, num_rounds=5)
    for i, ratio in enumerate(plan.ratios):
        keep = budgets.select(scores, ratio, alive=alive)
        assert alive is None or all((keep[name] <= alive[name]).all() for name in SIZES)
        alive = keep
        assert total(keep) == pytest.approx(plan.density[i] * sum(SIZES.values()), abs=i + 1)


def test_decimal_shares_mean_what_they_say():
    scores = {"a": np.arange(100.0)}
    for percent in range(1, 95):
        assert budgets.select(scores, percent / 100)["a"].sum() == 100 - percent
        assert budgets.minimum_kept({"a": 100}, share=percent / 100) == {"a": percent + 1}
    assert (
        budgets.select(scores, 0.29, protect="original")["a"].sum() == 72
    )  # int(0.29 * 100) is 28


# Other budgets


def test_counts_of_layers():
    scores = random_scores(4)
    counts = {"conv1": 16, "stage1/conv1": 20, "stage1/conv2": 99, "stage2/conv1": 71, "tiny": 1}
    keep = budgets.select_to_counts(scores, counts)
    for name, mask in keep.items():
        assert mask.sum() == min(counts[name], mask.size)
        assert mask.all() or scores[name][mask].min() > scores[name][~mask].max()
    with pytest.raises(ValueError, match="1 of 16 channels of layer 'conv1' are to stay"):
        budgets.select_to_counts(scores, counts | {"conv1": 1}, floors={"conv1": 2})


def network_cost(keep):
    """FLOPs of a chain of 3x3 convolutions, each reading the one before."""
    widths = [3, *(mask.sum() for mask in keep.values())]
    return sum(9 * a * b for a, b in zip(widths, widths[1:]))  # noqa: RUF007


RESNET56 = {
    f"stage{s}_block{b}/conv{c}": 16 * 2 ** (s - 1)
    for s in (1, 2, 3)
    for b in range(9)
    for c in (1, 2)
}


@pytest.mark.parametrize("cost", [total, network_cost])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_budgets_are_met_within_one_percent(cost, share):
    scores, calls = random_scores(5, RESNET56), []
    dense = cost({name: np.ones(size, bool) for name, size in RESNET56.items()})
    count = lambda keep: calls.append(None) or cost(keep)
    keep = budgets.select_to_cost(count, scores, share * dense)
    assert cost(keep) == pytest.approx(share * dense, rel=0.01)
    assert len(calls) <= 14
    assert cost(budgets.select_to_cost(cost, scores, share * dense, tolerance=0)) <= share * dense


@hypothesis.given(problems(), st.floats(0, 1, width=32, allow_subnormal=False))
def test_the_smallest_removal_within_the_budget(problem, share):
    scores, _, alive, _, floors, excluded = problem
    exclude = "|".join(sorted(excluded)) or None
    options = dict(alive=alive, floors=floors, exclude=exclude)
    limit = share * network_cost(alive) * 1.01
    removable = sum(0 if n in excluded else max(int(alive[n].sum()) - floors[n], 0) for n in scores)
    chain = [reference(scores, 0, alive, dict.fromkeys(scores, 1), floors, excluded)]
    everything = sum(int(mask.sum()) for name, mask in alive.items() if name not in excluded)
    for wanted in range(1, removable + 1):
        ratio = (wanted + 0.5) / everything
        chain.append(reference(scores, ratio, alive, dict.fromkeys(scores, 1), floors, excluded))
    expected = next((keep for keep in chain if network_cost(keep) <= limit), None)
    search = lambda: budgets.select_to_cost(
        network_cost, scores, share * network_cost(alive), **options
    )
    if expected is None:
        with pytest.raises(
            ValueError, match=f"minimum kept per layer costs {network_cost(chain[-1]):g}"
        ):
            search()
    else:
        assert_same(search(), expected)


# Rounding


def test_rounding_by_hand():
    scores = {"a": np.array([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0]), "b": np.arange(3.0)}
    keep = {"a": scores["a"] >= 5, "b": np.array([True, True, True])}
    up = budgets.round_to_multiple(keep, scores, 4)
    assert np.flatnonzero(~up["a"]).tolist() == [1]
    assert up["b"].all()
    gone = {"a": np.arange(9) != 7, "b": np.ones(3, bool)}
    assert np.flatnonzero(
        ~budgets.round_to_multiple(keep, scores, 4, alive=gone)["a"]
    ).tolist() == [7]


@hypothesis.given(problems(), st.sampled_from([1, 2, 4, 8, 16]))
def test_rounding_properties(problem, multiple):
    scores, _, alive, *_ = problem
    rng = default_rng(0)
    keep = {name: mask & (rng.random(mask.size) < 0.7) for name, mask in alive.items()}
    hypothesis.assume(all(mask.any() for mask in keep.values()))
    rounded = budgets.round_to_multiple(keep, scores, multiple, alive=alive)
    for name, mask in rounded.items():
        before, after, size = keep[name].sum(), mask.sum(), alive[name].sum()
        assert after % multiple == 0 or after == size
        assert not (mask & ~alive[name]).any()
        assert before <= after < before + multiple
        assert (mask >= keep[name]).all()
        added, left = mask & ~keep[name], alive[name] & ~mask
        if added.any() and left.any():
            assert scores[name][added].min() >= scores[name][left].max()


# Errors and speed


EVERYTHING = {name: np.ones(size, bool) for name, size in SIZES.items()}


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"conv1": np.full(16, np.nan)}, {}, "scores of 'conv1' are NaN"),
        ({"conv1": np.zeros((4, 4))}, {}, r"allowed: \[channels\]"),
        ({}, dict(alive={"conv1": np.ones(16, bool)}), r"not both have \['stage1/conv1'"),
        ({}, dict(alive={**EVERYTHING, "tiny": np.ones(2, bool)}), r"needed: bool \(1,\)"),
        ({}, dict(alive={**EVERYTHING, "tiny": np.zeros(1, bool)}), "'tiny' has no channel left"),
        ({}, dict(ratio=0.99), "removes 195 of 197 channels.*leaves 183.*at most 0.92"),
    ],
)
def test_what_does_not_fit_together_is_explained(changed, options, message):
    scores = random_scores(6) | changed
    with pytest.raises(ValueError, match=message):
        budgets.select(scores, **{"ratio": 0.5, **options})


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (dict(floors={"conv2": 2}), "floors"),
        (dict(floors={"conv1": 0}), "floors['conv1']"),
        (dict(protect="best"), "protect"),
        (dict(ratio=1.5), "ratio"),
    ],
)
def test_misuse_is_explained(options, where):
    with pytest.raises(tables.ConfigError) as error:
        budgets.select(random_scores(6), **{"ratio": 0.5, **options})
    assert error.value.where == where


def test_scores_of_no_layer_and_costs_out_of_reach_are_refused():
    with pytest.raises(ValueError, match="scores have 0 layers"):
        budgets.select({}, 0.5)
    with pytest.raises(ValueError, match="costs 14, all channels 197"):
        budgets.select_to_cost(total, random_scores(6), 1)
