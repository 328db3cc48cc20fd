"""Stages of the geometric limit: against the original's numbers, explicit operators, and their own
interrupted runs.
"""

import math

import golden_data
import hypothesis
import hypothesis.strategies as st
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from tiny import settings

from sparsity_jax import (
    allocate,
    data,
    geometry,
    interface,
    linops,
    losses,
    masks,
    models,
    optim,
    spectrum,
    train,
    trees,
    width,
)

GOLDEN = golden_data.load("10_hessian.npz")


@pytest.fixture(scope="module")
def problem():
    return tiny.problem()


@pytest.fixture(scope="module")
def trained(problem):
    return interface.without_optimizer(tiny.trained(problem, tiny.fit(epochs=4))[0])


def updates(
    problem, state, kind, own, *, earlier=(), others=None, rows=None, position=1, begun=False
):
    """All updates of the stage. own: its settings; earlier, rows: one list a member; begun: whether
    the state is one that it has reported.
    """
    members = problem.members or 1
    none = [[] for _ in range(members)]
    settings = {"x": [own] * members, **(others or {})}
    place = interface.Place("x", position, settings, earlier or none, rows or none)
    state = state if begun else own.begin(problem, state, place)
    return list(own.run(problem, state, place))


def run(problem, state, kind, own, member=0, **more):
    """Rows of one member."""
    found = updates(problem, state, kind, own, **more)
    done = [update.done for update in found]
    assert done == sorted(done)
    assert [update.done == 1 for update in found] == [False] * (len(found) - 1) + [
        True
    ]  # 1 ends the stage
    return [row for update in found for row in update.rows[member]]


# The original's numbers ---------------------------------------------------------------------------


class Floats(train.Problem):
    """A problem whose images are the network's inputs already."""

    def images(self, batch):
        return batch


NAMES = golden_data.dense_names()


def original(golden, group):
    """(problem, state) of its small network; call with 64 bits enabled."""
    split = lambda name: data.Split(
        golden[f"{name}/x"][:, None, None], golden[f"{name}/y"].astype(np.int32)
    )
    num_inputs, *widths, num_classes = HYPER["dims"]
    mean, std = (0.0,) * num_inputs, (1.0,) * num_inputs
    dataset = data.Dataset("original", split("train"), split("val"), num_classes, mean, std)
    double = dict(dtype="float64", param_dtype="float64")
    model = models.build(name="mlp", num_classes=num_classes, widths=tuple(widths), **double)
    problem = Floats(*train.build_problem(dataset, model))
    params = original_params(golden, group)
    key, zero = train.key_of(0), jnp.zeros((), jnp.int32)
    return problem, train.State(params, {}, masks.full(params), (), zero, key, train.no_metrics())


def original_params(golden, group):
    arrays = {name: golden[f"{group}/{name}"] for name in NAMES}
    variables = golden_data.variables(NAMES, [array.shape for array in arrays.values()], arrays)
    return jax.tree.map(jnp.asarray, variables["params"])


HYPER = golden_data.hyper("10_hessian.npz")


def test_a_thousand_pruned_networks_have_the_originals_accuracy_and_loss():
    number = HYPER["sparse_epoch"]
    with jax.enable_x64(True):
        problem, state = original(GOLDEN, "trained")
        fields = dict(
            ratios=(np.arange(number) / number).tolist(), splits=("test", "train"), count="ceil"
        )
        own = settings("curve", **fields)
        rows = run(problem, state, "curve", own)
    arrays = {name: GOLDEN[f"trained/{name}"] for name in NAMES}
    kernels = np.concatenate([arrays[name].ravel() for name in NAMES if arrays[name].ndim > 1])
    order = np.sort(np.abs(kernels))
    removed = np.maximum(np.ceil(np.arange(number) / number * order.size).astype(int), 1)
    penalty = HYPER["lmbda"] * (
        sum(np.abs(a).sum() for a in arrays.values()) - np.cumsum(order)[removed - 1]
    )
    for split, name in (("test", "val"), ("train", "train")):
        own = [row for row in rows if row["split"] == split]
        assert [row["num_kept"] for row in own] == (order.size - removed).tolist()
        size = len(GOLDEN[f"{name}/y"])
        correct = np.rint([size * row["accuracy"] for row in own])
        assert_allclose(correct, size * GOLDEN[f"pipeline/{name}_acc"] / 100, rtol=1e-12)
        assert_allclose(
            [r["loss"] for r in own] + penalty, GOLDEN[f"pipeline/{name}_loss"], rtol=1e-9
        )


def test_row_norms_are_the_originals():
    """Its 20 thresholds are the weights at 20 quantiles; sums of batches' norms over the number of
    examples.
    """
    with jax.enable_x64(True):
        problem, state = original(GOLDEN, "trained")
        stats, batch_size = GOLDEN["threshold_row_stats"], HYPER["batch_size"]
        size = len(GOLDEN["train/y"])
        start = (size - 1) // batch_size * batch_size  # of the last batch
        fields = dict(num_weights=len(stats), rows="original", batch_size=batch_size)
        rows = run(problem, state, "row_norms", settings("row_norms", **fields))
        entries = spectrum.quantile_entries(allocate.prunable(state.params, "kernels"), len(stats))
        stage = settings("row_norms")
        part = lambda p, batch: stage.mean_loss(problem, (p, {}), batch)
        last = (problem.train_images[start:], problem.train_labels[start:])
        whole = (problem.train_images, problem.train_labels)
        slopes = trees.named_leaves(jax.jit(jax.grad(part))(state.params, whole))
        product = jax.jit(lambda v: linops.hvp(part, state.params, last)(v))
        unit = lambda path, index: trees.map_named(
            lambda name, leaf: (
                jnp.zeros_like(leaf).at[index].set(1) if name == path else jnp.zeros_like(leaf)
            ),
            state.params,
        )
        assert len(rows) == len(stats) + 1
        assert_array_equal(
            [row["quantile"] for row in rows[:-1]], stats[:, 0] / HYPER["sparse_epoch"]
        )
        assert_array_equal([row["magnitude"] for row in rows[:-1]], stats[:, 4])
        assert_allclose([row["row_norm"] for row in rows[:-1]], stats[:, 3], rtol=1e-9)
        for (path, index, _), (_, slope, diagonal, *_) in zip(entries, stats, strict=True):
            penalty = HYPER["lmbda"] * jnp.sign(trees.named_leaves(state.params)[path][index])
            assert_allclose(slopes[path][index] + penalty, slope, rtol=1e-9, atol=1e-12)
            found = trees.named_leaves(product(unit(path, index)))[path][index]
            assert_allclose(found / size, diagonal, rtol=1e-9, atol=1e-14)
    assert rows[-1]["zero_share"] == np.mean(stats[:, 3] < 1e-7)


def close(found, expected, **tolerances):
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_allclose(leaf, other, **tolerances)


def test_training_is_the_originals():
    penalty = dict(name="l1", strength=HYPER["lmbda"])
    settings = optim.settings(
        "sgd", learning_rate=HYPER["lr"], momentum=HYPER["momentum"], penalty=penalty
    )
    recipe = optim.check_config(settings)
    size, batch_size = len(GOLDEN["train/y"]), HYPER["batch_size"]
    with jax.enable_x64(True):
        problem, state = original(GOLDEN, "init")
        tx = optim.make(
            recipe,
            optim.numbers(recipe, state.params, None),
            epochs=1,
            steps_per_epoch=-(-size // batch_size),
        )
        logits = lambda params, x: problem.model.apply({"params": params, "batch_stats": {}}, x)

        @jax.jit
        def step(params, opt_state, x, y):
            loss, grads = jax.value_and_grad(
                lambda p: losses.cross_entropy(logits(p, x), y).mean()
            )(params)
            change, opt_state = tx.update(grads, opt_state, params, value=loss)
            return jax.tree.map(jnp.add, params, change), opt_state

        params, opt_state = state.params, tx.init(state.params)
        for epoch in range(HYPER["epoch"]):
            for i in range(0, size, batch_size):
                batch = (
                    problem.train_images[i : i + batch_size],
                    problem.train_labels[i : i + batch_size],
                )
                params, opt_state = step(params, opt_state, *batch)
            if epoch == 0:
                close(params, original_params(GOLDEN, "after_one_epoch"), rtol=1e-9, atol=1e-11)
        # stored in float32
        close(params, original_params(GOLDEN, "trained"), rtol=1e-7, atol=1e-9)


def thresholds_of_the_original():
    golden = golden_data.load("05b_global_threshold.npz")
    paths = {}
    for name in map(str, golden["param_names"]):
        module, leaf = name.rsplit(".", 1)
        kind = (
            "bias" if leaf == "bias" else "kernel" if golden[f"params/{name}"].ndim > 1 else "scale"
        )
        paths[name] = f"{module.replace('.', '')}/{kind}"
    return (
        golden,
        paths,
        {path: jnp.asarray(golden[f"params/{name}"]) for name, path in paths.items()},
    )


def test_thresholds_and_masks_are_the_originals():
    with jax.enable_x64(True):
        golden, paths, params = thresholds_of_the_original()
        kernels = allocate.prunable(params, "kernels")
        order = [paths[str(name)] for name in golden["prunable_order"]]
        assert set(order) == set(kernels)
        (number,) = golden_data.parts("05b_global_threshold.npz", r"threshold_(\d+)")
        counts = [
            allocate.keep_counts(params, i / int(number), count="ceil") for i in range(int(number))
        ]
        found = jax.jit(lambda k: masks.kth_largest(kernels, k, magnitude=True))(
            np.array(counts) + 1
        )
        assert_array_equal(found, golden[f"threshold_{number}"])
        compiled = tiny.jitted_once(
            lambda counts: allocate.keep_masks(params, counts, count="ceil")
        )
        for sparsity, expected in zip(golden["sparsities"], golden["keep_mask"], strict=True):
            kept = compiled(allocate.keep_counts(params, float(sparsity), count="ceil"))
            assert_array_equal(np.concatenate([np.ravel(kept[path]) for path in order]), expected)
            assert all(bool(mask.all()) for path, mask in kept.items() if path not in order)
        assert not compiled(allocate.keep_counts(params, 1.0, count="ceil"))["conv0/kernel"].any()
        tied = {
            "w": jnp.array([[1.0, -1.0, 2.0, 3.0]])
        }  # what ties with the last weight goes as well
        kept = allocate.keep_masks(
            tied, allocate.keep_counts(tied, 0.0, count="ceil"), count="ceil"
        )
        assert kept["w"].tolist() == [[False, False, True, True]]
        assert width.distances(params).norm_sum == pytest.approx(
            float(golden["params_size"][1]), rel=1e-12
        )
    with tiny.complains("count is 'ceil'; allowed: "):
        allocate.check("layerwise", dict(count="ceil"))


def test_penalties_are_the_originals():
    with jax.enable_x64(True):
        golden, _, params = thresholds_of_the_original()
        zeros = jax.tree.map(jnp.zeros_like, params)
        # the strength of both is in no file
        strength = float(golden["regularization_L1"]) / sum(
            float(jnp.abs(leaf).sum()) for leaf in params.values()
        )
        for add, name, power in ((optim.add_l1, "L1", 1), (optim.add_l2, "L2", 2)):
            slopes, _ = jax.jit(add(strength).update)(zeros, add(strength).init(params), params)
            value = trees.dot(slopes, params) / power  # homogeneous of this degree
            assert_allclose(value, golden[f"regularization_{name}"], rtol=1e-9)


# limit --------------------------------------------------------------------------------------------


def falling(edge):
    """accuracy and loss that get worse behind the ratio `edge`, by 0.2 and 2 at once."""
    return lambda ratio: dict(accuracy=0.9 - 0.2 * (ratio > edge), loss=0.1 + 2.0 * (ratio > edge))


@hypothesis.given(
    edge=st.floats(0, 1),
    criterion=st.sampled_from(sorted(geometry.CRITERIA)),
    resolution=st.sampled_from([0.001, 0.01, 0.2]),
    scan=st.lists(
        st.sampled_from([i / 20 for i in range(21)]), min_size=1, max_size=12, unique=True
    ),
    stop=st.integers(0, 30),
)
def test_the_limit_of_a_falling_curve_is_found(edge, criterion, resolution, scan, stop):
    own = settings("limit", criterion=criterion, resolution=resolution, scan=tuple(sorted(scan)))
    evaluate, calls = falling(edge), []

    def counted(ratio):
        calls.append(ratio)
        better = 0.01 * (
            0 < ratio <= edge
        )  # the one criterion that the dense network does not meet
        return evaluate(ratio) | dict(accuracy=evaluate(ratio)["accuracy"] + better)

    rows = list(geometry.find_limit(counted, own))
    *_, result = rows
    if criterion == "better_accuracy" and not any(0 < ratio <= edge for ratio in scan):
        assert result["limit"] is None
    else:
        assert (
            result["limit"] <= edge < result["limit"] + resolution or result["limit"] == edge == 1
        )
    gaps = np.diff([0, *own.scan, 1])
    assert result["evaluations"] == len(calls) == len(rows) - 1
    assert len(calls) <= 1 + len(scan) + max(0, math.ceil(math.log2(max(gaps) / resolution)))
    done = [row.pop("done") for row in rows]
    assert done == sorted(done)
    assert done[-1] == 1 > max(done[:-1])
    known = {(row["phase"], row["ratio"]): row for row in rows[:stop] if "ratio" in row}
    calls.clear()
    again = list(geometry.find_limit(counted, own, known))
    assert len(calls) == result["evaluations"] - len(known)
    assert [
        {name: value for name, value in row.items() if name != "done"} for row in again
    ] == rows[len(known) :]


def test_criteria_differ_where_they_should():
    curve = {
        0.0: (0.9, 0.1),
        0.25: (0.91, 0.1),
        0.5: (0.9, 0.105),
        0.75: (0.8995, 0.2),
        1.0: (0.1, 3.0),
    }
    rows = [dict(ratio=ratio, accuracy=a, loss=l) for ratio, (a, l) in curve.items()]
    found = {name: geometry.largest_ratio(rows[::-1], name) for name in geometry.CRITERIA}
    assert found == dict(accuracy=0.5, better_accuracy=0.25, accuracy_within=0.75, loss_within=0.5)
    assert geometry.largest_ratio(rows, "loss_within", tolerance=0.15) == 0.75
    assert geometry.largest_ratio(rows, "accuracy_within", tolerance=0.0) == 0.5
    assert geometry.largest_ratio([rows[0], rows[4]], "better_accuracy") is None
    evaluate = lambda ratio: dict(zip(("accuracy", "loss"), curve[ratio]))
    for name, ratio in found.items():
        own = settings("limit", criterion=name, scan=(0.25, 0.5, 0.75, 1.0), resolution=0.25)
        *_, result = geometry.find_limit(evaluate, own)
        assert result["limit"] == ratio
        assert result["criterion"] == name
        assert f"passes at {ratio:g}, fails at {ratio + 0.25:g} of the scan" in result["how"]
    *found, result = geometry.find_limit(
        falling(1.0), settings("limit", criterion="better_accuracy", scan=(0.2, 0.5))
    )
    assert result["limit"] is None  # nothing is better than dense
    assert result["how"].endswith("passes nowhere on the scan")
    assert [row["ratio"] for row in found] == [0, 0.5, 0.2]
    assert geometry.actual_limits([dict(result, kind="limit", stage="limit")], 0.001, 0.1) == {}
    *_, result = geometry.find_limit(falling(1.0), settings("limit", scan=(0.5,)))
    assert result["limit"] > 0.998
    assert "accuracy not below dense; passes at 0.5, the end of the scan" in result["how"]
    *_, result = geometry.find_limit(
        falling(1.0), settings("limit", criterion="loss_within", tolerance=0.02)
    )
    assert result["tolerance"] == 0.02
    assert "loss at most 0.02 above dense" in result["how"]


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        (dict(scan=()), ("config.x.scan", ())),
        (dict(scan=(0.5, 0.2)), ("config.x.scan", (0.5, 0.2))),
        (dict(resolution=0.0), ("config.x.resolution", 0.0)),
        (dict(criterion="acc"), ("config.x.criterion", "acc")),
        (dict(tolerance=0.01), ("config.x.tolerance", 0.01)),
        (dict(selection="globl"), ("config.x.selection", "globl", "global")),
    ],
)
def test_limits_that_cannot_be_found_are_named(fields, refusal):
    with tiny.refused(*refusal):
        settings("limit", **fields)


def test_the_limit_stage_evaluates_the_pruned_network(problem, trained):
    own = settings(
        "limit", criterion="loss_within", tolerance=0.05, scan=(0.25, 0.5, 0.75), resolution=0.05
    )
    rows = run(problem, trained, "limit", own)
    ratios = sorted({row["ratio"] for row in rows[:-1]})
    curve = run(problem, trained, "curve", settings("curve", ratios=ratios))
    measured = {row["ratio"]: row for row in curve}
    for row in rows[:-1]:
        assert_allclose(row["loss"], measured[row["ratio"]]["loss"], rtol=1e-6)
        assert row["accuracy"] == measured[row["ratio"]]["accuracy"]
    dense, limit = rows[0]["loss"], rows[-1]["limit"]
    assert measured[limit]["loss"] <= dense + 0.05
    assert min(row["loss"] for row in curve if row["ratio"] > limit) > dense + 0.05
    assert 0 < limit < 1
    for stop in (1, 3, len(rows) - 1, len(rows)):  # an interrupted search goes on
        again = [
            r
            for update in updates(problem, trained, "limit", own, rows=[rows[:stop]])
            for r in update.rows[0]
        ]
        assert rows[:stop] + again == rows


def test_actual_limits_of_curves_and_limit_stages():
    row = lambda ratio, accuracy, loss, **more: dict(
        dict(kind="curve", stage="curve", visit=1, split="test", retrained=False, ratio=ratio),
        accuracy=accuracy,
        loss=loss,
        **more,
    )
    old = [row(0.0, 0.5, 1.0), row(0.9, 0.6, 0.5)]
    new = [
        dict(row(ratio, accuracy, loss), stage="second", split=split)
        for split in ("test", "train")
        for ratio, accuracy, loss in (
            (0.0, 0.9, 0.1),
            (0.5, 0.9, 0.15),
            (0.7, 0.88, 0.4),
            (0.9, 0.2, 2.0),
        )
    ]
    again = [dict(row(0.99, 1.0, 0.0), retrained=True)]
    limits = [
        dict(kind="limit", stage="limit", phase="scan", ratio=0.5),
        dict(kind="limit", stage="limit"),
    ]
    limits[1].update(phase="result", limit=0.625)
    found = geometry.actual_limits([*old, *new, *again, *limits], tolerance=0.03, epsilon=0.1)
    one = dict(accuracy=0.5, accuracy_within=0.7, loss_within=0.5)
    assert found == {
        f"{split} {name}": limit for split in ("test", "train") for name, limit in one.items()
    } | {"limit": 0.625}
    assert geometry.actual_limits([], 0.0, 0.0) == {}


# row_norms ----------------------------------------------------------------------------------------


def test_weights_of_dead_units_have_no_curvature(problem, trained):
    bias = trained.params["dense1"]["bias"].at[:8].set(-1e4)  # half of the units never fire
    params = trained.params | {"dense1": trained.params["dense1"] | {"bias": bias}}
    state = trained._replace(params=params)
    entries = spectrum.quantile_entries(allocate.prunable(params, "kernels"), 10)
    dead = [index[1] < 8 if path == "dense1/kernel" else index[0] < 8 for path, index, _ in entries]
    assert 0 < sum(dead) < 10
    for rows in ("mean", "original"):
        own = settings("row_norms", num_weights=10, rows=rows, batch_size=48)
        found = run(problem, state, "row_norms", own)
        assert [row["row_norm"] == 0 for row in found[:-1]] == dead
        assert found[-1]["zero_share"] == pytest.approx(np.mean(dead))
        assert [row["parameter"] for row in found[:-1]] == [path for path, *_ in entries]
        for stop in (4, 10, 11):
            more = updates(problem, state, "row_norms", own, rows=[found[:stop]])
            assert found[:stop] + [row for update in more for row in update.rows[0]] == found
    own = settings("row_norms", num_weights=3, parameters="fc/.*", num_examples=64)
    assert {row["parameter"] for row in run(problem, state, "row_norms", own)[:-1]} == {"fc/kernel"}


# path ---------------------------------------------------------------------------------------------


def test_the_path_has_the_terms_of_gradient_and_hessian(problem, trained):
    own = settings("path", ratios=(0.9, 0.3, 0.0), batch_size=48)
    earlier = [
        [
            dict(kind="limit", limit=0.6),
            dict(kind="limit", limit=None),
            dict(kind="width", predicted=1.0),
        ]
    ]
    rows = run(problem, trained, "path", own, earlier=earlier)
    assert [row["ratio"] for row in rows] == [0.0, 0.3, 0.6, 0.9]
    outputs, rule, params = network_loss(problem, trained)
    loss = jax.jit(lambda part: rule(outputs(part)))
    gradient, matvec = jax.jit(jax.grad(loss))(params), jax.jit(linops.hvp(loss, params))
    dot = lambda a, b: sum(
        float(jnp.vdot(x, y)) for x, y in zip(a.values(), b.values(), strict=True)
    )
    for row in rows:
        keep = allocate.keep_masks(
            trained.params, allocate.keep_counts(trained.params, row["ratio"])
        )
        pruned = spectrum.select(masks.apply(trained.params, keep), ".*").params
        step = {name: pruned[name] - params[name] for name in params}
        assert row["distance"] == pytest.approx(math.sqrt(dot(step, step)), rel=1e-6)
        assert row["change"] == pytest.approx(
            float(loss(pruned) - loss(params)), rel=1e-4, abs=1e-6
        )
        assert row["first_order"] == pytest.approx(dot(gradient, step), rel=1e-4, abs=1e-6)
        assert row["second_order"] == pytest.approx(dot(step, matvec(step)) / 2, rel=1e-4, abs=1e-6)
    assert abs(rows[0]["change"]) < 1e-7
    assert rows[-1]["change"] > rows[1]["change"]
    without = settings("path", ratios=(0.9, 0.3, 0.0), batch_size=48, at_limits=False)
    assert run(problem, trained, "path", without, earlier=earlier) == [
        row for row in rows if row["ratio"] != 0.6
    ]
    rest = updates(problem, trained, "path", own, earlier=earlier, rows=[rows[:3]])
    assert [row for update in rest for row in update.rows[0]] == rows[3:]
    with tiny.refused("config.x.ratios", ()):
        settings("path", ratios=())


def test_the_path_of_a_network_with_convolutions():
    model = models.build(name="small_cnn", num_classes=10, widths=(4,), dense_widths=(8,))
    problem = train.build_problem(tiny.digits(), model)
    state = train.initial_state(problem, train.key_of(0))
    own = dict(ratios=(0.5,), num_examples=50)
    (row,) = run(problem, state, "path", settings("path", batch_size=20, **own))
    (same,) = run(problem, state, "path", settings("path", batch_size=50, **own))
    assert {key: pytest.approx(row[key], rel=1e-3, abs=1e-7) for key in row} == same


# spectrum -----------------------------------------------------------------------------------------


def network_loss(problem, state):
    """(loss(params by path), outputs, params by path) over the whole train set, written down
    directly.
    """
    chosen = spectrum.select(state.params, ".*")
    images = problem.images(problem.train_images)
    outputs = lambda part: problem.model.apply(
        {"params": chosen.rebuild(part), "batch_stats": {}}, images
    )
    rule = lambda logits: losses.cross_entropy(logits, problem.train_labels).mean()
    return outputs, rule, chosen.params


def start_of(problem, state, own, position=1):
    begun = own.begin(problem, state, interface.Place("x", position, {}))
    return begun.opt_state.lanczos.current


@pytest.mark.parametrize(
    ("operator", "once"),
    [("hessian", False), ("hessian", True), ("gauss_newton", True), ("absolute", False)],
)
def test_coefficients_are_those_of_the_operator(problem, trained, operator, once):
    own = settings("spectrum", operator=operator, num_matvecs=6, batch_size=48, linearize_once=once)
    (row,) = run(problem, trained, "spectrum", own)
    outputs, rule, params = network_loss(problem, trained)
    plain = linops.hvp(lambda part: rule(outputs(part)), params)
    newton = linops.gauss_newton(outputs, rule, params)
    matvec = dict(hessian=plain, gauss_newton=newton, absolute=linops.squared(plain))[operator]
    expected = linops.lanczos(6, on_host=True)(jax.jit(matvec), start_of(problem, trained, own))
    assert_allclose(row["alphas"], expected.alphas, rtol=2e-3, atol=1e-4)
    assert_allclose(row["betas"], expected.betas, rtol=2e-3, atol=1e-4)
    assert (row["num_matvecs"], row["dimension"], row["dtype"]) == (6, 1210, "float32")
    assert (row["operator"], row["probe"]) == (operator, 0)
    assert "enclosure" not in row
    found = geometry.tridiagonals([row])
    assert found.alphas.dtype == np.float32
    assert linops.ritz(found)[0].min() < 0 or operator != "hessian"


def test_an_l2_penalty_moves_all_values(problem, trained):
    bare, moved = (
        run(problem, trained, "spectrum", settings("spectrum", num_matvecs=6, l2=l2))[0]
        for l2 in (0.0, 0.25)
    )
    assert_allclose(np.array(moved["alphas"]) - bare["alphas"], 0.5, rtol=1e-3)
    assert_allclose(moved["betas"], bare["betas"], rtol=2e-3, atol=1e-4)


def test_probes_start_differently_and_repeat(problem, trained):
    own = settings("spectrum", num_matvecs=5, num_probes=3)
    rows = run(problem, trained, "spectrum", own)
    assert [row["probe"] for row in rows] == [0, 1, 2]
    assert len({row["alphas"][0] for row in rows}) == 3
    assert tiny.timeless(run(problem, trained, "spectrum", own)) == tiny.timeless(rows)
    (first,) = run(problem, trained, "spectrum", settings("spectrum", num_matvecs=5))
    assert tiny.timeless([first]) == tiny.timeless(rows[:1])
    moved = run(problem, trained, "spectrum", own, position=2)
    assert moved[0]["alphas"] != rows[0]["alphas"]
    assert geometry.tridiagonals(rows).alphas.shape == (3, 5)


@pytest.fixture(scope="module")
def pair(problem, trained):
    """(problem of two members, their state, their single states)."""
    other = interface.without_optimizer(tiny.trained(problem, tiny.fit(epochs=2), seed=1)[0])
    both = jax.tree.map(lambda *leaves: np.stack(leaves), trained, other)
    return problem.with_members(2), both, (trained, other)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("limit", dict(scan=(0.5,), resolution=0.2)),
        ("path", dict(ratios=(0.5, 0.9))),
        ("row_norms", dict(num_weights=3)),
        ("spectrum", dict(num_matvecs=4, num_probes=2)),
        ("spectrum", dict(num_matvecs=3, num_probes=2, linearize_once=True)),
    ],
)
def test_members_of_a_sweep_are_single_networks(problem, pair, kind, fields):
    both, state, singles = pair
    own = settings(kind, **fields)
    together = updates(both, state, kind, own)
    rows = [[row for update in together for row in update.rows[member]] for member in (0, 1)]
    for found, single in zip(rows, singles, strict=True):
        assert tiny.timeless(found) == tiny.timeless(run(problem, single, kind, own))
    half = [update for update in together if update.done <= 0.5]
    again = updates(both, half[-1].state, kind, own, rows=[rows[0], []], begun=True)
    assert not any(update.rows[0] for update in again)
    assert sum(len(update.rows[0]) for update in half) == len(rows[0])
    assert tiny.timeless([row for update in again for row in update.rows[1]]) == tiny.timeless(
        rows[1]
    )


def test_eight_devices_give_the_same_coefficients(problem, trained, hessian):
    eight = tiny.problem(mesh=0)
    state = eight.place(trained)
    (row,) = run(eight, state, "spectrum", settings("spectrum", num_matvecs=8, batch_size=48))
    assert_allclose(row["alphas"], hessian[0]["alphas"], rtol=5e-3, atol=1e-3)
    assert_allclose(row["betas"], hessian[0]["betas"], rtol=5e-3, atol=1e-3)
    found, expected = (
        predict(p, s, hessian)["predicted"] for p, s in ((eight, state), (problem, trained))
    )
    assert found == pytest.approx(expected, abs=1e-5)


def widths(**fields):
    return {"width": [settings("width", batch_size=16, **fields)]}


@pytest.mark.parametrize("operator", ["gauss_newton", "absolute", "hessian"])
def test_a_probe_ends_once_its_enclosure_is_narrow(problem, trained, operator):
    fields = dict(operator=operator, num_matvecs=30)
    own = settings("spectrum", **fields, stop_width=1e-9)
    (whole,) = run(problem, trained, "spectrum", own, others=widths())
    assert whole["num_matvecs"] == 30
    assert not whole["narrow_enough"]
    wide = 2 * whole["enclosure"]
    assert wide < 1
    (row,) = run(
        problem,
        trained,
        "spectrum",
        settings("spectrum", **fields, stop_width=wide),
        others=widths(),
    )
    assert row["num_matvecs"] % 4 == 0
    assert 4 <= row["num_matvecs"] < 30
    assert 1e-9 < whole["enclosure"] < row["enclosure"] <= wide
    assert row["narrow_enough"]
    assert whole["alphas"][: row["num_matvecs"]] == row["alphas"]
    # what the last product gave, not what the last test on the way saw
    answer = width.predict_probes(
        geometry.tridiagonals([whole]),
        width.distances(trained.params),
        geometry.tolerated(problem, (trained.params, {}), widths()["width"][0])[0],
        operator=geometry.OPERATORS[operator],
    )
    assert whole["enclosure"] == pytest.approx(answer.upper - answer.lower)


def test_the_tolerance_of_an_early_end_is_its_own_readers(problem, trained):
    others = {
        "first": [settings("width", epsilon=1e-6)],
        "second": [settings("width", spectrum="x", epsilon=50.0)],
    }
    unnamed = {
        "other": [settings("width", spectrum="y", epsilon=1e-6)],
        "second": [settings("width", epsilon=50.0)],
    }
    own = settings("spectrum", operator="gauss_newton", num_matvecs=9, stop_width=0.02)
    (row,) = run(problem, trained, "spectrum", own, others=others)
    assert (row["num_matvecs"], row["narrow_enough"]) == (4, True)
    (row,) = run(problem, trained, "spectrum", own, others=unnamed)
    assert (row["num_matvecs"], row["narrow_enough"]) == (4, True)
    (row,) = run(problem, trained, "spectrum", own, others={"first": others["first"]})
    assert (row["num_matvecs"], row["narrow_enough"]) == (9, False)


def test_an_early_end_counts_directions_without_curvature_as_the_prediction_does(problem, trained):
    own = settings("spectrum", operator="gauss_newton", num_matvecs=8, stop_width=1e-9)
    earlier = [dict(kind="row_norms", zero_share=0.6)]
    (row,) = run(problem, trained, "spectrum", own, others=widths(), earlier=[earlier])
    answer = width.predict_probes(
        geometry.tridiagonals([row]),
        width.distances(trained.params),
        geometry.tolerated(problem, (trained.params, {}), widths()["width"][0])[0],
        operator="semidefinite",
        zero_share=0.6,
    )
    assert row["enclosure"] == pytest.approx(answer.upper - answer.lower)
    (plain,) = run(problem, trained, "spectrum", own, others=widths())
    assert row["enclosure"] != pytest.approx(plain["enclosure"])


def test_more_products_than_dimensions(problem, trained):
    own = settings("spectrum", num_matvecs=64, parameters="fc/bias")
    (row,) = run(problem, trained, "spectrum", own)
    assert row["num_matvecs"] <= row["dimension"] == 10
    assert len(row["alphas"]) == len(row["betas"]) == row["num_matvecs"]
    outputs, rule, params = network_loss(problem, trained)
    explicit = jax.jit(jax.hessian(lambda bias: rule(outputs({**params, "fc/bias": bias}))))(
        params["fc/bias"]
    )
    (values,), _ = linops.ritz(geometry.tridiagonals([row]))
    eigenvalues = np.linalg.eigvalsh(explicit)
    assert np.abs(np.subtract.outer(values, eigenvalues)).min(1).max() < 1e-5
    assert_allclose([values[0], values[-1]], eigenvalues[[0, -1]], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "vgg16", "mobilenet", "alexnet"])
def test_batch_norms_are_left_out(name):
    """Exactly the arrays that share a module with a batch norm's scale."""
    model = models.build(name=name, num_classes=10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
    chosen = trees.matching(shapes, geometry.WITHOUT_BATCH_NORM)
    norms = {path.rpartition("/")[0] for path in chosen if path.endswith("/scale")}
    assert (
        len(norms) == dict(resnet18=20, preact_resnet18=17, vgg16=13, mobilenet=27, alexnet=0)[name]
    )
    assert {path for path, kept in chosen.items() if not kept} == {
        f"{n}/{leaf}" for n in norms for leaf in ("scale", "bias")
    }


def test_products_that_are_not_finite_stop_the_stage(problem, trained):
    state = trained._replace(params=jax.tree.map(lambda leaf: leaf * 1e30, trained.params))
    for fields in (dict(), dict(operator="gauss_newton", stop_width=0.1)):
        own = settings("spectrum", num_matvecs=5, **fields)
        with pytest.raises(train.NonFiniteLossError, match="a product is not finite"):
            run(
                problem, state, "spectrum", own, others=dict(width=[settings("width", epsilon=1.0)])
            )


def test_spectrum_settings_are_checked():
    with tiny.refused("config.x.parameters", "("):
        settings("spectrum", parameters="(")
    with tiny.refused("config.x.loss.name", "mse"):
        settings("spectrum", loss=dict(name="mse"))


# width --------------------------------------------------------------------------------------------


def spectra(problem, state, **fields):
    """Rows of a spectrum stage as a run keeps them."""
    rows = run(
        problem, state, "spectrum", settings("spectrum", **{**dict(num_matvecs=8), **fields})
    )
    return [dict(row, kind="spectrum", stage="hessian", visit=1) for row in rows]


@pytest.fixture(scope="module")
def hessian(problem, trained):
    return spectra(problem, trained)


def predict(problem, state, earlier, **fields):
    (row,) = run(
        problem,
        state,
        "width",
        settings("width", **{**dict(batch_size=16), **fields}),
        earlier=[earlier],
    )
    return row


def test_a_prediction_reads_the_rows_before_it(problem, trained, hessian):
    row = predict(problem, trained, hessian)
    tridiagonal, distances = geometry.tridiagonals(hessian), width.distances(trained.params)
    values, weights = linops.ritz(tridiagonal)
    stage = settings("width")
    one = lambda i: stage.mean_loss(problem, (trained.params, {}), (images[i], labels[i]))
    images, labels = (array.reshape(8, 16, *array.shape[1:]) for array in stage.examples(problem))
    epsilon = np.std([float(one(i)) for i in range(8)])
    assert row["epsilon"] == pytest.approx(epsilon, rel=1e-5)
    expected = width.predict(values, weights, distances, row["epsilon"])
    assert row["predicted"] == pytest.approx(expected, abs=1e-12)
    grid = width.predict(values, weights, distances, row["epsilon"], method="grid")
    assert (
        row["predicted_on_grid"]
        == grid
        == predict(problem, trained, hessian, method="grid")["predicted"]
    )
    assert (row["operator"], row["spectrum"], row["num_matvecs"], row["num_probes"]) == (
        "hessian",
        "hessian",
        8,
        1,
    )
    assert row["low"] < row["predicted"] < row["high"]
    assert row["enclosure_low"] < row["predicted"] < row["enclosure_high"]
    assert row["standard_error"] is None
    clipped = predict(problem, trained, hessian, negative="clip")
    assert clipped["enclosure_low"] is clipped["enclosure_high"] is None
    assert row["epsilon_error"] > 0
    assert 0 < row["negative_mass"] < 1
    assert row["history"]["predicted"][-1] == pytest.approx(row["predicted"], abs=1e-12)
    assert row["history"]["num_matvecs"] == list(range(1, 9))
    assert len(row["ratios"]) == len(row["distances"]) == len(row["widths"])
    near = np.interp(row["predicted"], row["ratios"], row["widths"])
    assert near == pytest.approx(row["predicted"], abs=0.01)  # where the two curves meet
    assert row["actual"] == {}


def test_a_prediction_names_its_spectrum_or_takes_the_latest_visit(problem, trained, hessian):
    first = [dict(row, stage="first") for row in spectra(problem, trained, num_matvecs=3)]
    again = [dict(row, visit=2) for row in spectra(problem, trained, num_matvecs=5)]
    assert predict(problem, trained, [*first, *hessian])["num_matvecs"] == 8
    assert predict(problem, trained, [*hessian, *first])["num_matvecs"] == 3
    assert predict(problem, trained, [*first, *hessian], spectrum="first")["num_matvecs"] == 3
    row = predict(problem, trained, [*hessian, *again])
    assert (row["num_matvecs"], row["num_probes"]) == (5, 1)


def test_a_prediction_from_several_semidefinite_probes_is_enclosed(problem, trained):
    rows = spectra(problem, trained, operator="gauss_newton", num_probes=3)
    row = predict(problem, trained, rows)
    assert row["num_probes"] == len(row["per_probe"]) == 3
    assert row["enclosure_low"] <= row["predicted"] <= row["enclosure_high"]
    assert row["low"] <= row["enclosure_low"]
    assert row["enclosure_high"] <= row["high"]
    assert row["standard_error"] > 0
    gaps = np.subtract(row["history"]["upper"], row["history"]["lower"])
    assert gaps[-1] < gaps[0]


def test_the_share_of_weights_without_curvature_flattens_the_spectrum(problem, trained, hessian):
    norms = [dict(kind="row_norms", row_norm=1.0), dict(kind="row_norms", zero_share=0.5)]
    bare, measured = (
        predict(problem, trained, hessian),
        predict(problem, trained, [*hessian, *norms]),
    )
    assert (bare["zero_share"], measured["zero_share"]) == (0.0, 0.5)
    assert measured["predicted"] > bare["predicted"]
    assert (
        predict(problem, trained, [*hessian, *norms], zero_share=0.0)["predicted"]
        == bare["predicted"]
    )
    given = predict(problem, trained, hessian, zero_share=0.5)
    assert given["predicted"] == measured["predicted"]


def test_options_of_a_prediction(problem, trained, hessian):
    loose, tight = (predict(problem, trained, hessian, epsilon=epsilon) for epsilon in (0.5, 0.005))
    assert loose["predicted"] > tight["predicted"]
    assert loose["epsilon"] == 0.5
    assert loose["epsilon_error"] is None
    clipped = predict(problem, trained, hessian, negative="clip")
    assert clipped["predicted"] > predict(problem, trained, hessian)["predicted"]
    assert predict(problem, trained, hessian, epsilon_draws=0)["epsilon_error"] is None
    squares = predict(problem, trained, hessian, loss=dict(name="mean_squared_error"))
    assert squares["epsilon"] != predict(problem, trained, hessian)["epsilon"]


def test_a_prediction_shows_the_actual_limits(problem, trained, hessian):
    curve = [
        dict(
            kind="curve",
            stage="curve",
            visit=1,
            split="test",
            retrained=False,
            ratio=ratio,
            accuracy=a,
            loss=loss,
        )
        for ratio, a, loss in ((0.0, 0.9, 0.1), (0.5, 0.9, 0.2), (0.9, 0.85, 0.9), (0.99, 0.1, 5.0))
    ]
    limit = [dict(kind="limit", stage="edge", phase="result", limit=0.875)]
    row = predict(problem, trained, [*curve, *limit, *hessian], tolerance=0.06, epsilon=0.5)
    assert row["actual"] == {
        "test accuracy": 0.5,
        "test accuracy_within": 0.9,
        "test loss_within": 0.5,
        "edge": 0.875,
    }


def test_a_loss_without_spread_is_explained(problem, trained, hessian):
    dead = trained._replace(params=jax.tree.map(jnp.zeros_like, trained.params))
    with tiny.refused("epsilon", 0.0):
        predict(problem, dead, hessian)
    own = settings("spectrum", operator="gauss_newton", stop_width=0.1)
    with tiny.refused("epsilon", 0.0):
        run(problem, dead, "spectrum", own, others=widths())
    equal = problem._replace(train_images=problem.train_images[:1].repeat(128, 0), compiled={})
    equal = equal._replace(train_labels=problem.train_labels[:1].repeat(128, 0))
    with tiny.refused("epsilon", 0.0):
        predict(equal, trained, hessian)
    assert 0 < predict(equal, trained, hessian, epsilon=0.1)["predicted"] < 1


def test_a_penalty_that_kills_all_weights_leaves_nothing_to_remove(problem, trained):
    """R is 0 at every ratio: the prediction is 1, from a spectrum that is there for the biases
    only.
    """
    params = trees.map_named(lambda path, leaf: leaf * (not trees.is_kernel(path)), trained.params)
    dead = trained._replace(params=params)
    rows = spectra(problem, dead)
    row = predict(problem, dead, rows)
    assert row["predicted"] == row["low"] == row["high"] == 1
    assert set(row["distances"]) == {0.0}
    assert set(row["widths"]) == {1.0}
