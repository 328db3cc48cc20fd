"""What each stage does to a network, against plain NumPy and the original's numbers."""

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from tiny import settings

from sparsity_jax import allocate, interface, masks, optim, stages, train, trees


@pytest.fixture(scope="module")
def problem():
    return tiny.problem()


@pytest.fixture(scope="module")
def trained(problem):
    return interface.without_optimizer(tiny.trained(problem, tiny.fit(epochs=4))[0])


def run(problem, state, kind, own, rows=(), others=None):
    """(state, rows) after the stage, of one member."""
    found = list(rows)
    place = interface.Place("x", 1, {"x": [own], **(others or {})}, rows=[list(rows)])
    for update in own.run(problem, state, place):
        found += update.rows[0]
        state = state if update.state is None else update.state
    return state, found


def brute_force(problem, state, ratio, split):
    """(loss, accuracy, weights kept) of the network without its smallest kernel entries, in
    NumPy.
    """
    params = {
        path: np.asarray(leaf, np.float64)
        for path, leaf in trees.named_leaves(state.params).items()
    }
    kernels = [path for path in params if trees.is_kernel(path)]
    sizes = np.sort(np.concatenate([np.abs(params[path]).ravel() for path in kernels]))
    cut = round(ratio * sizes.size)
    threshold = sizes[cut] if cut < sizes.size else np.inf
    for path in kernels:
        params[path] = np.where(np.abs(params[path]) >= threshold, params[path], 0)
    images, labels = getattr(problem.dataset, split)
    x = ((images / 255 - problem.dataset.mean) / problem.dataset.std).reshape(len(images), -1)
    hidden = np.maximum(x @ params["dense1/kernel"] + params["dense1/bias"], 0)
    logits = hidden @ params["fc/kernel"] + params["fc/bias"]
    top = logits.max(1)
    loss = (
        top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(labels)), labels]
    )
    return (
        loss.mean(),
        (logits.argmax(1) == labels).mean(),
        sum((params[path] != 0).sum() for path in kernels),
    )


def test_a_curve_equals_evaluating_every_pruned_network(problem, trained):
    own = settings("curve", ratios=(0.0, 0.3, 0.9, 0.99, 1.0), splits=("test", "train"))
    state, rows = run(problem, trained, "curve", own)
    tiny.same(state, trained)
    assert [(row["ratio"], row["split"]) for row in rows] == [
        (r, s) for r in own.ratios for s in own.splits
    ]
    for row in rows:
        loss, accuracy, kept = brute_force(problem, trained, row["ratio"], row["split"])
        assert_allclose(row["loss"], loss, rtol=1e-4)
        assert_allclose(row["accuracy"], accuracy, atol=1e-6)
        assert (row["num_kept"], row["num_prunable"]) == (kept, 1184)
        zeros = sum(share * n for share, n in zip(row["layers"].values(), (1024, 160), strict=True))
        assert round(zeros) == 1184 - kept


def test_two_hundred_ratios_compile_once_and_write_nothing(problem, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = problem._replace(compiled={})
    compiled = []

    def listen(event, seconds, **_):
        compiled.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(fresh, trained, "curve", settings("curve", ratios=(0.5,)))
        before, many = len(compiled), settings("curve", ratios=tuple(i / 200 for i in range(200)))
        assert before
        _, rows = run(fresh, trained, "curve", many)
        assert len(compiled) == before
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(rows) == 200
    assert [row["num_kept"] for row in rows] == [
        allocate.num_kept(1184, ratio) for ratio in many.ratios
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("selection", "options"),
    [
        ("layerwise", {}),
        ("random", {}),
        ("structured", dict(layer_ratios="uniform")),
        ("global", dict(scope="all")),
    ],
)
def test_other_selections_cut_the_counts_they_promise(problem, trained, selection, options):
    own = settings("curve", ratios=(0.0, 0.5), selection=selection, **options)
    _, rows = run(problem, trained, "curve", own)
    dense, half = rows
    assert dense["num_kept"] == dense["num_prunable"]
    assert half["selection"] == selection
    if selection == "structured":  # the classifier keeps its outputs
        assert half["layers"] == pytest.approx({"dense1/kernel": 0.5, "fc/kernel": 0.0}, abs=1e-6)
        assert [row["channels_removed"] for row in rows] == [0.0, 0.5]
    else:
        assert "channels_removed" not in half
        assert half["num_kept"] == half["num_prunable"] // 2
    if selection == "layerwise":
        assert half["layers"] == pytest.approx({"dense1/kernel": 0.5, "fc/kernel": 0.5}, abs=1e-6)
    assert half["num_prunable"] == (1184 + 26 if options.get("scope") == "all" else 1184)


def test_retraining_starts_from_the_same_network_at_every_ratio(problem, trained):
    others = {"again": [tiny.fit(dict(tiny.SGD, learning_rate=0.02), epochs=1)]}
    own = settings("curve", ratios=(0.5, 0.9), retrain="again")
    state, rows = run(problem, trained, "curve", own, others=others)
    tiny.same(state, trained)
    _, alone = run(
        problem, trained, "curve", settings("curve", ratios=(0.9,), retrain="again"), others=others
    )
    assert rows[1] == alone[0]
    _, bare = run(problem, trained, "curve", settings("curve", ratios=(0.5, 0.9)))
    assert [row["num_kept"] for row in rows] == [row["num_kept"] for row in bare]
    assert rows[1]["loss"] < bare[1]["loss"]
    assert [row["retrained"] for row in rows + bare] == [True, True, False, False]


def test_a_curve_continues_behind_the_rows_it_has(problem, trained):
    own = settings("curve", ratios=(0.0, 0.5, 0.9), splits=("test", "train"))
    _, rows = run(problem, trained, "curve", own)
    assert run(problem, trained, "curve", own, rows[:2])[1] == rows
    assert run(problem, trained, "curve", own, rows)[1] == rows


def test_the_histogram_has_the_originals_bins():
    golden = golden_data.load("05_magnitude_pruning.npz")
    with jax.enable_x64(True):
        params = {"fc": {"kernel": jnp.asarray(golden["flat_params"])}}
        counts = jax.jit(lambda p: stages.magnitude_histogram(p, scope="all"))(params)
    assert_array_equal(stages.magnitude_thresholds(), golden["hist_thresholds"])
    assert_array_equal(counts["count_above"], golden["hist_count_above"])
    above = np.asarray(counts["count_above"])
    assert_array_equal(
        [above[1], *np.diff(above[1:]), above[0] - above[-1]], golden["hist_density"]
    )


def test_the_histogram_counts_every_weight_once(problem, trained):
    state = trained._replace(
        params=jax.tree.map(lambda leaf: jnp.where(leaf > 0.1, 0, leaf), trained.params)
    )
    same, rows = run(problem, state, "histogram", settings("histogram", bins=20, scope="kernels"))
    tiny.same(same, state)
    (row,) = rows
    flat = np.concatenate(
        [np.abs(np.ravel(state.params[layer]["kernel"])) for layer in ("dense1", "fc")]
    )
    assert (len(row["counts"]), len(row["edges"])) == (20, 21)
    assert sum(row["counts"]) + row["num_zero"] == flat.size
    assert row["num_zero"] == (flat == 0).sum()
    expected = np.histogram(np.log10(np.maximum(flat[flat > 0], 1e-12)), row["edges"])[0]
    assert_array_equal(row["counts"], expected)
    assert row["count_above"] == [(flat > t).sum() for t in row["threshold"]]


def test_learned_scales_lower_the_loss_after_a_step(problem):
    state = interface.without_optimizer(train.create_state(problem, train.key_of(0)))
    big = jax.tree.map(lambda leaf: 4 * leaf, state.params)
    fields = dict(iterations=30, batch_size=64, scale_learning_rate=0.05, constraint=tiny.POLYTOPE)
    after, rows = run(
        problem, state._replace(params=big), "sfw_init", settings("sfw_init", **fields)
    )
    assert [row["iteration"] for row in rows] == [1, 10, 20, 30]
    still = settings("sfw_init", **fields | dict(scale_learning_rate=1e-9))  # on the same batches
    _, plain = run(problem, state._replace(params=big), "sfw_init", still)
    assert rows[0]["loss_after"] == pytest.approx(plain[0]["loss_after"], rel=1e-5)
    found = [row["loss_after"] / other["loss_after"] for row, other in zip(rows, plain)]
    assert max(found[1:]) < 1
    assert found[-1] < 0.9, found
    scales, old = [], trees.named_leaves(big)
    for path, leaf in trees.named_leaves(after.params).items():
        scales.append(np.linalg.norm(leaf) / np.linalg.norm(old[path]))
        assert_allclose(leaf, scales[-1] * old[path], rtol=1e-4, atol=1e-6)
    assert max(np.abs(np.subtract(scales, 1))) > 0.1
    assert int(after.step) == 0


def test_pruned_weights_stay_zero_in_later_training(problem, trained):
    state, rows = run(problem, trained, "prune", settings("prune", ratio=0.8))
    (row,) = rows
    kernels = allocate.prunable(state.masks, "kernels")
    assert sum(int(mask.sum()) for mask in kernels.values()) == allocate.num_kept(1184, 0.8)
    assert row["layers"] == {
        path: pytest.approx(1 - float(mask.mean())) for path, mask in kernels.items()
    }
    fit = tiny.fit(epochs=1)
    place = interface.Place("again", 2, {"again": [fit]})
    begun = fit.begin(problem, state, place)
    *_, last = fit.run(problem, begun, place)
    assert (
        float(jnp.abs(last.state.params["fc"]["kernel"] - state.params["fc"]["kernel"]).max()) > 0
    )
    for path, mask in kernels.items():
        assert not np.asarray(trees.named_leaves(last.state.params)[path])[~np.asarray(mask)].any()
    tiny.same(last.state.masks, state.masks)
    again, _ = run(
        problem, interface.without_optimizer(last.state), "prune", settings("prune", ratio=0.9)
    )
    assert all(
        bool((old | ~new).all())
        for new, old in zip(*map(jax.tree.leaves, (again.masks, state.masks)))
    )


def test_random_pruning_of_a_pruned_network_reaches_its_ratio(problem, trained):
    half, _ = run(problem, trained, "prune", settings("prune", ratio=0.5, selection="random"))
    more, _ = run(problem, half, "prune", settings("prune", ratio=0.8, selection="random"))
    assert sum(
        int(m.sum()) for m in allocate.prunable(more.masks, "kernels").values()
    ) == allocate.num_kept(1184, 0.8)
    assert all(
        bool((old | ~new).all())
        for new, old in zip(*map(jax.tree.leaves, (more.masks, half.masks)))
    )


def test_a_curve_starts_where_the_masks_are(problem, trained):
    cut, (row,) = run(problem, trained, "prune", settings("prune", ratio=0.9))
    assert (row["num_kept"], row["num_prunable"]) == (118, 1184)
    assert row["sparsity"] == pytest.approx(1 - 118 / 1184)
    assert row["sparsity_all"] == pytest.approx((1184 - 118 + 0) / (1184 + 26), abs=26 / 1210)
    own = settings("curve", ratios=(0.0, 0.5, 0.95))
    _, rows = run(problem, cut, "curve", own)
    assert [row["num_kept"] for row in rows] == [118, 59]
    assert rows[0]["ratio"] == pytest.approx(1 - 118 / 1184)
    assert run(problem, cut, "curve", own, rows[:1])[1] == rows  # resumed behind the first
    _, rows = run(problem, cut, "curve", settings("curve", ratios=(0.5, 0.9, 0.95)))
    assert [row["ratio"] for row in rows] == [0.9, 0.95]


def test_pruning_again_takes_what_is_gone_before_weights_that_became_zero(problem, trained):
    half, _ = run(problem, trained, "prune", settings("prune", ratio=0.5))
    zero = jax.tree.map(
        lambda leaf, mask: jnp.where(mask & (leaf < 0), 0, leaf), half.params, half.masks
    )
    again, (row,) = run(problem, half._replace(params=zero), "prune", settings("prune", ratio=0.5))
    assert row["num_kept"] == 592
    tiny.same(again.masks, half.masks)


def test_momentum_is_handed_on_where_asked(problem, trained):
    momentum = optim.HeavyBallState(jnp.int32(5), jax.tree.map(jnp.ones_like, trained.params))
    handed = trained._replace(opt_state=interface.Carried(momentum._asdict(), ()))
    for carry, expected in ((False, 0), (True, 5)):  # in one process, where programs are shared
        fit = tiny.fit(dict(tiny.SGD, momentum=0.9), carry=carry)
        begun = fit.begin(problem, handed, interface.Place("fit", 3, {"fit": [fit]}))
        assert int(optim.momentum_of(begun.opt_state).step) == expected


def test_structured_pruning_takes_whole_filters(problem, trained):
    own = settings("prune", ratio=0.25, selection="structured")
    state, _ = run(problem, trained, "prune", own)
    kept = np.asarray(state.masks["dense1"]["kernel"])
    assert (kept == kept[:1]).all()
    norms = np.abs(np.asarray(trained.params["dense1"]["kernel"])).sum(0)
    assert_array_equal(np.flatnonzero(~kept[0]), np.sort(np.argsort(norms)[:4]))
    assert bool(state.masks["fc"]["kernel"].all())


def test_start_init_gives_the_first_network_again(problem, trained):
    fit = tiny.fit(start="init", shift_inside=False)
    pruned = trained._replace(masks=jax.tree.map(lambda leaf: leaf & False, trained.masks))
    begun = fit.begin(problem, pruned, interface.Place("fit", 3, {"fit": [fit]}))
    tiny.same(
        begun.params, jax.jit(lambda key: train.create_state(problem, key))(train.key_of(0)).params
    )
    assert float(masks.sparsity(begun.masks)) == 0.0


def test_training_starts_inside_the_feasible_sets(problem):
    small = dict(tiny.SFW, constraint=dict(tiny.POLYTOPE, mode="radius", tau=1e-3))
    state, numbers = tiny.start(problem, tiny.fit(small))
    radii = trees.named_leaves(
        jax.tree.map(lambda s: s.radius, numbers["sets"], is_leaf=lambda s: hasattr(s, "lmo"))
    )
    for path, leaf in trees.named_leaves(state.params).items():
        assert float(jnp.abs(leaf).max()) <= 1.0001 * float(radii[path])


@pytest.mark.parametrize(
    ("kind", "fields", "refusal"),
    [
        ("curve", dict(ratios=()), ("config.x.ratios", ())),
        ("curve", dict(splits=()), ("config.x.splits", ())),
        ("curve", dict(ratios=(0.5, 1.5)), ("config.x.ratios[1]", 1.5)),
        (
            "curve",
            dict(selection="structured", scope="all"),
            ("config.x", "scope"),
        ),
        (
            "prune",
            dict(ratio=0.5, selection="globl"),
            ("config.x.selection", "globl", "global"),
        ),
        (
            "train",
            dict(epochs=1, optimizer=tiny.SGD, loss=dict(name="l2")),
            ("config.x.loss.name", "l2"),
        ),
        (
            "train",
            dict(epochs=1, optimizer=tiny.SGD, augment="flop"),
            ("config.x.augment", "flop", "flip"),
        ),
        (
            "train",
            dict(epochs=2, optimizer=dict(tiny.SGD, schedule=dict(name="cosine", warmup_epochs=2))),
            ("config.x.optimizer.schedule.warmup_epochs", 2.0),
        ),
    ],
)
def test_options_that_cannot_work_are_named(kind, fields, refusal):
    with tiny.refused(*refusal):
        settings(kind, **fields)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        (dict(include="conv.*"), ("include", "conv.*")),
        (dict(exclude=".*"), ("",)),
        (dict(selection="layerwise", exclude="dense9/kernel"), ("exclude", ..., "dense1/kernel")),
        (dict(selection="structured", exclude=".*"), ("",)),
        (dict(selection="structured", layers="convolutions"), ("",)),
    ],
)
def test_selections_that_fit_no_kernel_are_refused_before_training(problem, fields, refusal):
    for kind, ratios in (("prune", dict(ratio=0.5)), ("curve", {})):
        selection = {name: value for name, value in fields.items() if name == "selection"}
        settings(kind, **ratios, **selection).check_network(problem, 1)
        with tiny.refused(*refusal):
            settings(kind, **ratios, **fields).check_network(problem, 1)


def test_whole_filters_are_refused_where_all_are_outputs():
    one_layer = tiny.problem(widths=())
    own = settings("prune", ratio=0.5, selection="structured")
    with tiny.refused(""):
        own.check_network(one_layer, 1)
    by_channel = settings("prune", ratio=0.5, selection="structured", granularity="channel")
    by_channel.check_network(one_layer, 1)  # inputs may go
