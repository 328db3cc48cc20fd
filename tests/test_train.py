"""The training step, its loop and evaluation, on one device, on eight, and for several members at
once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import interface, losses, masks, models, optim, polytopes, train, trees


@pytest.fixture(scope="module")
def problem():
    return tiny.problem()


def one_step(problem, fit):
    """(compiled step, its arguments after the state and numbers)."""
    order = jnp.arange(problem.dataset.train.images.shape[0])
    return jax.jit(functools.partial(train.steps_in_memory, problem, fit, 1)), (
        order,
        0,
        problem.train_images,
        problem.train_labels,
    )


def batch_loss(problem, state, index):
    inputs = problem.images(problem.train_images[index])
    logits = problem.model.apply({"params": state.params, "batch_stats": state.batch_stats}, inputs)
    return float(losses.cross_entropy(logits, problem.train_labels[index]).mean())


def test_a_step_lowers_the_loss_of_its_batch(problem):
    fit = tiny.fit()
    state, numbers = tiny.start(problem, fit)
    step, rest = one_step(problem, fit)
    batch = jnp.arange(fit.batch_size)
    after = step(state, numbers, *rest)
    assert batch_loss(problem, after, batch) < batch_loss(problem, state, batch)
    assert_allclose(after.metrics.loss, batch_loss(problem, state, batch), rtol=1e-5)
    assert (int(after.step), int(after.metrics.examples), int(after.metrics.bad_step)) == (
        1,
        fit.batch_size,
        -1,
    )


def test_a_step_is_that_of_plain_optax(problem):
    fit = tiny.fit()
    state, numbers = tiny.start(problem, fit)
    step, rest = one_step(problem, fit)
    params, tx = state.params, optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init(params)
    images = (problem.dataset.train.images / 255 - problem.dataset.mean) / problem.dataset.std

    @jax.jit
    def plain(params, opt_state, x, y):
        def loss(params):
            logits, _ = problem.model.apply_train({"params": params, "batch_stats": {}}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for i in range(4):
        batch = slice(32 * i, 32 * i + 32)
        params, opt_state = plain(
            params, opt_state, images[batch], problem.dataset.train.labels[batch]
        )
        state = step(state, numbers, *rest)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, params)


@pytest.mark.parametrize(
    "optimizer", [tiny.SGD, dict(tiny.SFW, schedule=dict(name="dynamic_change"))]
)
def test_no_step_waits_for_the_host(problem, optimizer):
    fit = tiny.fit(optimizer)
    state, numbers = tiny.start(problem, fit)
    step, rest = one_step(problem, fit)
    rest = jax.device_put(rest)
    step(state, numbers, *rest)  # constants move while compiling
    with jax.transfer_guard("disallow"), jax.debug_nans(False):
        for _ in range(3):
            state = step(state, numbers, *rest)
    assert int(state.step) == 3


def test_steps_have_no_nan_on_the_way(problem):
    fit = tiny.fit(tiny.SFW)
    with jax.debug_nans(True):
        state, numbers = tiny.start(problem, fit)
        step, rest = one_step(problem, fit)
        state = step(step(state, numbers, *rest), numbers, *rest)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


def test_steps_one_by_one_equal_a_scan_of_an_epoch(problem):
    fit = tiny.fit(tiny.IN_BALL)
    scanned, rows = tiny.trained(problem, fit)
    single, single_rows = tiny.trained(problem._replace(steps_per_call=1), fit)
    uneven, _ = tiny.trained(problem._replace(steps_per_call=3), fit)  # 3 + 1 steps an epoch
    close = lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, scanned, single)
    jax.tree.map(close, scanned, uneven)
    for a, b in zip(rows, single_rows, strict=True):
        assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
        assert_allclose(a["train_loss"], b["train_loss"], rtol=1e-4)


def test_every_epoch_sees_every_example_once_in_a_new_order(problem):
    seen = {}

    def spy(state, numbers, order, position, images, labels):
        seen[int(state.step) // 4] = np.asarray(order)
        return state._replace(step=state.step + 4)

    fit = tiny.fit(epochs=3)
    state, numbers = tiny.start(problem, fit)
    state = state._replace(metrics=state.metrics._replace(examples=jnp.ones((), jnp.int32)))
    spied = problem._replace(compiled={(train.steps_in_memory, (fit.program(), 4)): spy})
    list(train.fit_epochs(spied, state, fit, numbers, 0))
    assert sorted(seen) == [0, 1, 2]
    assert all(sorted(order.tolist()) == list(range(128)) for order in seen.values())
    assert not any((seen[a] == seen[b]).all() for a, b in ((0, 1), (1, 2), (0, 2)))


def test_members_side_by_side_equal_single_runs(problem):
    fit = tiny.fit(tiny.IN_BALL)
    both = problem.with_members(2)
    state = train.initial_state(both, jnp.stack([train.key_of(0), train.key_of(1)]))
    numbers = train.numbers_of(both, state, [fit] * 2)
    state = train.begin_members(both, state, [fit] * 2, numbers)
    rows = [[], []]
    for update in train.fit_epochs(both, state, fit, numbers, 0):
        state = update.state
        for own, new in zip(rows, update.rows, strict=True):
            own.extend(new)
    for seed in (0, 1):
        alone, alone_rows = tiny.trained(problem, fit, seed)
        member = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state)
        close = lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, member, alone)
        for a, b in zip(rows[seed], alone_rows, strict=True):
            assert_allclose(a["train_loss"], b["train_loss"], rtol=1e-4)
            assert a["test_accuracy"] == pytest.approx(
                b["test_accuracy"], abs=0.021
            )  # one example of 50
    assert rows[0][-1]["train_loss"] != rows[1][-1]["train_loss"]


def test_eight_devices_share_the_batch_and_give_the_same_numbers(problem):
    fit = tiny.fit(tiny.IN_BALL)
    wide = tiny.problem(mesh=0)
    assert len(jax.local_devices()) == 8
    assert wide.mesh.size == 8
    state, numbers = tiny.start(wide, fit)
    state = wide.place(state)
    order = wide.place(jnp.arange(128))
    batches = jax.jit(lambda images: wide.images(images[:32]))(wide.train_images)
    assert {shard.data.shape for shard in batches.addressable_shards} == {(4, 8, 8, 1)}
    step = jax.jit(functools.partial(train.steps_in_memory, wide, fit, 1))
    compiled = step.lower(state, numbers, order, 0, wide.train_images, wide.train_labels).compile()
    text = compiled.as_text()
    assert "all-reduce" in text  # of the gradients
    assert "f32[4,64]" in text  # a device's share of the inputs
    assert "f32[32,64]" not in text
    sharded, rows = tiny.trained(wide, fit)
    alone, alone_rows = tiny.trained(problem, fit)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        sharded.params,
        alone.params,
    )
    for a, b in zip(rows, alone_rows, strict=True):
        assert_allclose(a["train_loss"], b["train_loss"], rtol=1e-4)
        assert_allclose(a["test_loss"], b["test_loss"], rtol=1e-3)


@pytest.mark.parametrize("optimizer", [dict(tiny.SGD, momentum=0.9), tiny.IN_BALL])
def test_pruned_weights_stay_zero(problem, optimizer):
    """Also where a momentum from before the masks moves them."""
    fit = tiny.fit(optimizer, epochs=1)
    state, numbers = tiny.start(problem, fit)
    kept = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % 3 != 0, state.params
    )
    state = train.begin(problem, fit, state._replace(masks=kept), numbers)
    moving = jax.tree.map(
        lambda leaf: leaf + jnp.issubdtype(leaf.dtype, jnp.floating), state.opt_state
    )
    state = state._replace(opt_state=moving)
    for update in train.fit_epochs(problem, state, fit, numbers, 0):
        state = update.state
    for path, leaf in trees.named_leaves(state.params).items():
        mask = trees.named_leaves(kept)[path]
        assert not np.asarray(leaf)[~np.asarray(mask)].any()
    assert float(masks.sparsity(state.params)) < 0.5  # the others moved


@pytest.mark.parametrize("batch", [7, 50, 1000])
def test_evaluation_is_exact_for_any_batch_size(problem, batch):
    state, _ = tiny.start(problem, tiny.fit())
    own = problem._replace(eval_batch_size=batch, compiled={})
    for split in ("train", "test"):
        images, labels = train.arrays(own, split)
        logits = own.model.apply({"params": state.params, "batch_stats": {}}, own.images(images))
        loss, accuracy = train.evaluate(own, state.params, state.batch_stats, split)
        assert_allclose(loss, losses.cross_entropy(logits, labels).mean(), rtol=1e-5)
        assert_allclose(accuracy, losses.correct(logits, labels).mean(), rtol=1e-6)


def test_a_loss_that_is_not_finite_names_the_step(problem):
    fit = tiny.fit(dict(tiny.SGD, learning_rate=1e20))
    state, numbers = tiny.start(problem, fit)
    step, rest = one_step(problem, fit)
    by_hand, first = state, None
    for i in range(4):
        by_hand = step(by_hand, numbers, *rest)
        first = i if first is None and not np.isfinite(by_hand.metrics.loss) else first
    assert int(by_hand.metrics.bad_step) == first
    with pytest.raises(train.NonFiniteLossError, match=rf"not finite at step {first} \(epoch 1\)"):
        list(train.fit_epochs(problem, state, fit, numbers, 0))


def test_evaluations_come_every_few_epochs_and_at_the_end(problem):
    _, rows = tiny.trained(problem, tiny.fit(epochs=5, evaluate_every=2))
    assert [row["epoch"] for row in rows if "test_accuracy" in row] == [2, 4, 5]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_convolutions_run_step_by_step_on_a_cpu_and_dense_networks_by_the_epoch(problem):
    net = models.build(name="small_cnn", num_classes=10, widths=(2, 2, 2), dense_widths=(4,))
    convolving = train.build_problem(problem.dataset, net)
    assert train.steps_per_call(problem, 5) == 5
    assert train.steps_per_call(convolving, 5) == 1
    assert train.steps_per_call(convolving._replace(steps_per_call=2), 5) == 2
    assert train.steps_per_call(problem._replace(steps_per_call=9), 5) == 5
    assert train.steps_per_call(problem.with_members(3), 5) == 5


def test_training_goes_on_with_calls_of_another_size(problem):
    """As from a checkpoint of a CPU, one step a call, on a GPU."""
    fit = tiny.fit(epochs=2)
    singly = problem._replace(steps_per_call=1)
    state, numbers = tiny.start(problem, fit)
    updates = train.fit_epochs(singly, state, fit, numbers, 0)
    halfway = [next(updates) for _ in range(6)][-1]
    assert int(halfway.state.step) == 6  # of 4 an epoch
    before = [dict(seconds=100.0)]
    *_, last = train.fit_epochs(problem, halfway.state, fit, numbers, 0, rows=before)
    whole, _ = tiny.trained(problem, fit)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        last.state.params,
        whole.params,
    )
    assert last.rows[0][0]["seconds"] > 100  # its own time comes on top


def test_the_first_bad_member_is_named(problem):
    state, _ = tiny.start(problem, tiny.fit())
    bad = state._replace(metrics=state.metrics._replace(bad_step=jnp.array([10, -1, 3])))
    with pytest.raises(
        train.NonFiniteLossError,
        match=r"the training loss of member 2 .* at step 3 \(epoch 1\)",
    ):
        train.check_finite(bad, 4)


def test_a_state_between_stages_has_no_optimizer(problem):
    state, _ = tiny.trained(problem, tiny.fit(epochs=1))
    bare = interface.without_optimizer(state)
    assert (bare.opt_state, int(bare.step), int(bare.metrics.bad_step)) == ((), 0, -1)
    tiny.same(bare.params, state.params)


def test_a_training_that_leaves_its_sets_is_refused_at_its_end(monkeypatch):
    @functools.wraps(optim.sfw)
    def leaving(*args, **options):
        return optax.chain(optim.sfw(*args, **options), optax.scale(-9.0))

    monkeypatch.setitem(optim.OPTIMIZERS, "sfw", leaving)
    with pytest.raises(ValueError, match="updates began outside"):
        tiny.trained(tiny.problem(), tiny.fit(dict(tiny.IN_BALL, rescale="none"), epochs=1))


def test_sets_of_a_run_are_those_of_one_call(problem):
    root = train.key_of(0)
    state = train.State((), (), (), (), 0, root, ())
    numbers = train.numbers_of(problem, state, [tiny.fit(tiny.SFW)])
    key = jax.random.fold_in(jax.random.wrap_key_data(root), 1)
    init = lambda key: problem.init(key)["params"]
    own = polytopes.for_params(train.shapes_of(problem), key, init=init, **tiny.POLYTOPE)
    jax.tree.map(assert_array_equal, numbers["sets"], jax.tree.map(jnp.asarray, own))
