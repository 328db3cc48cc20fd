"""Optimizers and schedules: golden numbers of the original, feasibility, composition, errors."""

import functools
import re

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import optim, polytopes, trees

CLOSE = dict(rtol=1e-9, atol=1e-11)


FILE = "02_sfw_optimizers.npz"
GOLDEN = golden_data.load(FILE)
SCHEDULES = "03_lr_schedules.npz"
RATES = golden_data.load(SCHEDULES)
CASES = golden_data.parts(FILE, r"((?:sfw|adagradsfw|projsgd)/.+)/\d+")
NOT_TRACED = ("rescale", "inner", "nesterov")


def golden_sets(name):
    """Of each tensor; `name`: "ksparse", "none", or "l" and the order of the norm."""
    hyper = golden_data.hyper(FILE)
    if name == "none":
        return [polytopes.Unconstrained()] * len(hyper["K"])
    if name == "ksparse":
        return [polytopes.KSparse(k, radius) for k, radius in zip(hyper["K"], hyper["k_radius"])]
    radii = hyper[name] if name in hyper else hyper[f"{name}_radius"]
    order = float(name.removeprefix("l"))
    return [polytopes.LpBall(radius, order, zero_up=True, zero_below=1e-10) for radius in radii]


def transformation(kind, sets, given):
    """Our optimizer for the original's; given: its settings, of which numbers may be traced."""
    if kind == "sfw":
        rescale = given["rescale"].replace("None", "none")
        return optim.sfw(given["lr"], sets, momentum=given["momentum"], rescale=rescale)
    if kind == "adagradsfw":
        own = dict(inner_steps=int(given["inner"]), delta=given["delta"])
        return optim.adagrad_sfw(given["lr"], sets, momentum=given["momentum"], **own)
    own = dict(
        dampening=given["dampening"], weight_decay=given["wd"], nesterov=given["nesterov"] == "True"
    )
    return optim.sgd(given["lr"], sets, momentum=given["momentum"], **own)


@functools.cache
def program(kind, name, fixed):
    """Parameters after every step, as a compiled function of the numbers among the settings."""

    @jax.jit
    def replay(numbers, params, grads):
        tx = transformation(kind, golden_sets(name), numbers | dict(fixed))

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return replay


@pytest.mark.parametrize("case", CASES)
def test_optimizers_match_the_original(case):
    kind, name, *settings = case.split("/")
    given = dict(setting.split("=") for setting in settings)
    fixed = tuple((key, value) for key, value in given.items() if key in NOT_TRACED)
    numbers = {key: float(value) for key, value in given.items() if key not in NOT_TRACED}
    starts = "start_raw" if name == "none" else f"start/{name}"
    with jax.enable_x64(True):
        sets = golden_sets(name)
        params, raw, grads = (
            [jnp.asarray(GOLDEN[f"{group}/{j}"]) for j in range(len(sets))]
            for group in (starts, "start_raw", "grads")
        )
        for ours, expected in zip(inside(raw, name), params):
            assert_allclose(ours, expected, **CLOSE)
        found = program(kind, name, fixed)(numbers, params, grads)
        for j, ours in enumerate(found):
            assert len(ours) == golden_data.hyper(FILE)["steps"]
            assert_allclose(ours, GOLDEN[f"{case}/{j}"], err_msg=f"{case} {j}", **CLOSE)


@functools.partial(jax.jit, static_argnums=1)
def inside(params, name):
    return polytopes.shift_inside(params, golden_sets(name))


def rates(rate, losses):
    """The rate in force during each epoch when every step of epoch e reports `losses[e, step]`."""
    epochs, steps = losses.shape

    def body(carry, value):
        state, step = carry
        rate_now, state = rate.update(state, step, value)
        return (state, step + 1), jnp.asarray(rate_now, float)

    _, out = jax.lax.scan(
        body, (rate.init(), jnp.zeros((), jnp.int32)), jnp.asarray(losses.ravel())
    )
    return np.asarray(out).reshape(epochs, steps)


@pytest.mark.parametrize(("name", "base"), golden_data.parts(SCHEDULES, r"(\w+)/lr0=(.+)"))
def test_schemes_match_the_original(name, base):
    losses = RATES["epoch_batch_losses"]
    assert len(losses) == golden_data.hyper(SCHEDULES)["epochs"]
    own = dict(loss="last_batch") if name == "dynamic_change" else {}
    with jax.enable_x64(True):
        ours = rates(optim.SCHEDULES[name](float(base), *losses.shape, **own), losses)
    assert (ours == ours[:, :1]).all()  # constant within an epoch
    assert_allclose(ours[:, 0], RATES[f"{name}/lr0={base}"], **CLOSE)


@pytest.mark.parametrize(("name", "base"), golden_data.parts(SCHEDULES, r"short/(\w+)/lr0=(.+)"))
def test_schemes_of_short_runs_match_the_original(name, base):
    losses = RATES["short/epoch_losses"][:, None]
    assert len(losses) == golden_data.hyper(SCHEDULES)["short_epochs"]
    with jax.enable_x64(True):
        ours = rates(optim.SCHEDULES[name](float(base), *losses.shape), losses)
    assert_allclose(ours[:, 0], RATES[f"short/{name}/lr0={base}"], **CLOSE)


@pytest.mark.parametrize("preset", golden_data.parts(SCHEDULES, r"preset/(\d+)/"))
def test_piecewise_tables_match_the_original(preset):
    table = str(RATES[f"preset/{preset}/spec"][0]).strip("{}")
    expected = RATES[f"preset/{preset}/lr"]
    shape = (len(expected), 2)
    with jax.enable_x64(True):
        ours = rates(optim.piecewise(1.0, *shape, table=table), np.zeros(shape))
    assert_allclose(ours[:, 1], expected, **CLOSE)


ONE_SHOT = {"multistep": optim.original_multistep, "cos": optim.original_cosine}


@pytest.mark.parametrize("name", golden_data.parts(SCHEDULES, r"globalprune/(\w+)"))
def test_schedules_of_the_one_shot_original(name):
    """Rates of every iteration, defects included: milestones and period in iterations, recursion
    from warm-up rates.
    """
    hyper = golden_data.hyper(SCHEDULES)[name]
    own = dict(warmup_epochs=hyper["warm"])
    if hyper["schedumode"] == "multistep":
        own.update(
            milestones=tuple(hyper["milestones"]) if hyper["schedu"] else (), gamma=hyper["gamma"]
        )
    else:
        assert hyper["schedu"]
    epochs, steps = hyper["epoch"], hyper["iterations_per_epoch"]
    with jax.enable_x64(True):
        ours = rates(
            ONE_SHOT[hyper["schedumode"]](hyper["base_lr"], epochs, steps, **own),
            np.zeros((epochs, steps)),
        )
    expected = RATES[f"globalprune/{name}"]
    assert_allclose(ours.ravel(), expected, rtol=1e-12, atol=1e-15)


def test_what_the_one_shot_schedules_meant():
    """Milestones in epochs, after a linear warm-up from 0."""
    ours = rates(
        optim.multistep(0.5, 8, 4, milestones=(4, 6), gamma=0.1, warmup_epochs=2.0),
        np.zeros((8, 4)),
    )
    assert_allclose(ours[:2].ravel(), 0.5 * np.arange(8) / 8, rtol=1e-6)
    assert_allclose(ours[2:, 0], [0.5, 0.5, 0.05, 0.05, 0.005, 0.005], rtol=1e-6)


def test_dynamic_change_uses_the_mean_of_the_epoch():
    """Last batches rise while the means fall: the default follows the means, the original the last
    batches.
    """
    losses = np.zeros((30, 4))
    losses[:, 0] = np.linspace(9, 1, 30) * 4
    losses[:, 3] = np.linspace(0, 0.1, 30)
    mean = rates(optim.dynamic_change(1.0, 1000, 4), losses)[-1, 0]
    last = rates(optim.dynamic_change(1.0, 1000, 4, loss="last_batch"), losses)[-1, 0]
    assert_allclose([mean, last], [1.06, 0.7], rtol=1e-6)


def test_cosine_warms_up_and_ends_at_zero():
    ours = rates(optim.cosine(0.2, 10, 5, warmup_epochs=2.0), np.zeros((10, 5))).ravel()
    assert_allclose(ours[:10], 0.2 * np.arange(10) / 10, rtol=1e-6)
    assert_allclose(ours[30], 0.1, rtol=1e-5)
    assert ours[10] == ours.max()
    assert ours[-1] < 0.002


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        *(("sfw", dict(rescale=rescale)) for rescale in ("gradient", "diameter", "none")),
        ("adagrad_sfw", {}),
        ("sgd", {}),
    ],
)
def test_weights_stay_feasible(name, extra):
    rng = np.random.default_rng(0)
    sets = {"a": polytopes.KSparse(7, 0.3), "b": polytopes.LpBall(1.5, 2.0)}
    tx = optim.OPTIMIZERS[name](0.7, sets, **extra)

    def start(params):
        params = polytopes.shift_inside(params, sets)
        return params, tx.init(params)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"a": rng.normal(size=(6, 9)), "b": np.ones(11)}
    grads = {"a": rng.normal(size=(30, 6, 9)), "b": rng.normal(size=(30, 11))}
    (params, _), _ = jax.jit(lambda p, g: jax.lax.scan(step, start(p), g))(params, grads)
    a, b = map(np.asarray, (params["a"], params["b"]))
    assert np.abs(a).max() <= 0.3 * (1 + 1e-5)
    assert np.abs(a).sum() <= 0.3 * 7 * (1 + 1e-5)
    assert np.linalg.norm(b) <= 1.5 * (1 + 1e-5)
    assert np.linalg.norm(a) + np.linalg.norm(b) > 0.1


HOLDING = {
    "sfw": optim.sfw(0.7, polytopes.KSparse(2, 0.5), rescale="none"),
    "adagrad_sfw": optim.adagrad_sfw(0.7, polytopes.LpBall(0.5, 1.0)),
    "projected": optim.sgd(0.7, polytopes.LpBall(0.5, 2.0)),
    "pruned": optim.pruned(optax.sgd(0.7), 0.5),
}


@pytest.mark.parametrize("name", HOLDING)
def test_what_comes_behind_a_set_is_counted(name):
    start = {"kernel": np.array([[0.1, -0.2], [0.1, 0.05]], np.float32)}

    @functools.partial(jax.jit, static_argnums=0)
    def trained(tx, params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, 4)[0][1]

    optim.check(trained(optax.chain(optax.clip(1.0), HOLDING[name]), start))
    wrong = trained(optax.chain(HOLDING[name], optax.scale(-9.0)), start)
    with pytest.raises(ValueError, match=r"[123] updates began outside .* come last"):
        optim.check(wrong)


def test_sfw_on_the_whole_space_is_sgd_with_averaged_momentum():
    params, grads = {"w": np.arange(4.0)}, {"w": np.ones(4)}
    tx = tiny.compiled(optim.sfw(0.1, polytopes.Unconstrained(), momentum=0.5))
    updates, state = tx.update(grads, tx.init(params), params)
    assert_allclose(updates["w"], -0.1 * np.ones(4), rtol=1e-6)
    updates, _ = tx.update(jax.tree.map(lambda g: 3 * g, grads), state, params)
    assert_allclose(updates["w"], -0.2 * np.ones(4), rtol=1e-6)


def test_adagrad_sfw_on_the_whole_space_divides_by_its_metric():
    params, grads = {"w": np.arange(4.0)}, {"w": np.array([1.0, -2.0, 4.0, 0.0])}
    own = dict(momentum=0.0, delta=1.0)
    tx = tiny.compiled(optim.adagrad_sfw(0.1, polytopes.Unconstrained(), **own))
    updates, state = tx.update(grads, tx.init(params), params)
    assert_allclose(updates["w"], [-0.05, 0.2 / 3, -0.08, 0.0], rtol=1e-6)
    updates, _ = tx.update(grads, state, params)
    metric = np.sqrt(2 * np.square(grads["w"])) + 1
    assert_allclose(updates["w"], -0.1 * grads["w"] / metric, rtol=1e-6)


def test_sfw_at_its_vertex_stays_there_without_nan():
    constraint = polytopes.KSparse(2, 1.0)
    grads = {"w": jnp.array([3.0, -2.0, 0.5])}
    params = {"w": constraint.lmo(grads["w"])}
    tx = optim.sfw(1.0, constraint)
    with jax.debug_nans(True):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_array_equal(updates["w"], np.zeros(3))


def test_optimizers_compose_with_optax():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optim.sfw(schedule, polytopes.KSparse(2, 1.0)))
    params, tx = {"w": np.zeros(5, np.float32)}, tiny.compiled(tx)
    state = tx.init(params)
    seen = []
    for _ in range(3):
        _, state = tx.update({"w": np.ones(5, np.float32)}, state, params)
        seen.append(float(optim.learning_rate(state)))
    assert_allclose(seen, [1.0, 0.9, 0.8], rtol=1e-6)
    wrapped = optax.inject_hyperparams(
        lambda learning_rate: optim.sfw(learning_rate, polytopes.KSparse(2, 1.0))
    )(0.3)
    wrapped = tiny.compiled(wrapped)
    updates, _ = wrapped.update({"w": np.ones(5, np.float32)}, wrapped.init(params), params)
    assert float(jnp.abs(updates["w"]).sum()) > 0
    for inner in (lambda learning_rate: optim.sgd(learning_rate), optax.sgd):
        wrapped = optax.inject_hyperparams(inner)(0.3)
        tx = optim.proximal_l1(wrapped, 0.5)
        updates, state = jax.jit(tx.update)({"w": -np.ones(5, np.float32)}, tx.init(params), params)
        assert_allclose(updates["w"], 0.3 - 0.3 * 0.5, rtol=1e-6)
        assert_allclose(optim.learning_rate(state), 0.3, rtol=1e-6)
    both = optax.chain(optim.sgd(0.1), optim.sgd(0.2))
    with pytest.raises(ValueError, match="names 2 learning rates"):
        optim.learning_rate(both.init(params))


@pytest.mark.parametrize(
    "sets", [polytopes.KSparse(3, jnp.float32(0.5)), polytopes.LpBall(jnp.float32(0.5), 1)]
)
def test_short_types_stay_what_they_are(sets):
    params, grads = {"w": jnp.ones(8, jnp.bfloat16)}, {"w": jnp.arange(8.0).astype(jnp.bfloat16)}
    traced = jnp.float32(0.1)  # a number of a wider type, as in the arms of a sweep
    for tx in (
        optim.sfw(traced, sets, weight_decay=traced),
        optim.adagrad_sfw(traced, sets, weight_decay=traced),
        optim.sgd(traced, sets, weight_decay=traced),
        optim.sgd(traced, weight_decay=traced, momentum=traced),
        optim.heavy_ball(traced, nesterov=True),
        optim.add_decayed_weights(traced),
        optim.add_l1(traced),
        optim.add_l2(traced),
    ):
        step = lambda grads, params, tx=tx: tx.update(grads, tx.init(params), params)[0]
        assert jax.eval_shape(step, grads, params)["w"].dtype == jnp.bfloat16


def test_a_step_never_talks_to_the_host():
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    for name in ("sfw", "adagrad_sfw", "sgd", "adamw"):
        tx = optim.OPTIMIZERS[name](optim.dynamic_change(0.5, 30, 2), polytopes.KSparse(3, 1.0))
        step = jax.jit(lambda g, s, p, v, tx=tx: tx.update(g, s, p, value=v))
        state, value = tx.init(params), jnp.ones(())
        step(params, state, params, value)
        with jax.transfer_guard("disallow"):
            _, state = step(params, state, params, value)
            _, state = step(params, state, params, value)
        assert int(optax.tree_utils.tree_get(state, "learning_rate") * 10) == 5


def test_numbers_may_be_traced_and_batched():
    """A sweep over learning rate, momentum and k is one program; each member equals its own run."""
    params = {"w": jnp.linspace(-1, 1, 12)}
    grads = {"w": jnp.cos(jnp.arange(12.0))}

    def run(lr, momentum, k):
        tx = optim.sfw(lr, polytopes.KSparse(k, 0.5), momentum=momentum)
        updates, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, optax.apply_updates(params, updates))[0]["w"]

    lrs, momenta, ks = jnp.array([0.1, 0.9]), jnp.array([0.0, 0.9]), jnp.array([2, 7])
    batched = jax.jit(jax.vmap(run))(lrs, momenta, ks)
    for i in range(2):
        own = float(lrs[i]), float(momenta[i]), int(ks[i])
        alone = jax.jit(lambda own=own: run(*own))()
        assert_allclose(batched[i], alone, rtol=1e-5, atol=1e-6)


def recipe(**changes):
    config = dict(
        name="sfw",
        learning_rate=0.5,
        schedule=dict(name="decrease_3"),
        constraint=dict(name="k_sparse", k=3, tau=2.0),
    )
    return optim.check_config({**config, **changes})


def test_a_config_becomes_the_same_optimizer():
    params = {"w": jnp.linspace(-1, 1, 60).reshape(6, 10)}
    norms = {"w": 4.0}
    values = optim.numbers(recipe(), params, norms)
    assert optim.needs_norms(recipe())
    built = optim.make(recipe(), values, epochs=9, steps_per_epoch=2)
    by_hand = optim.sfw(0.5, polytopes.KSparse(3, 2 * 2.0 * 4.0 / (2 * 3**0.5)))
    both = jax.jit(lambda p: [tx.update(p, tx.init(p), p)[0] for tx in (built, by_hand)])
    ours, expected = both(params)
    assert_allclose(ours["w"], expected["w"], rtol=1e-6)


def test_penalties_are_gradients_of_their_norms():
    params = {"a": jnp.array([0.5, -2.0, 0.0]), "b": jnp.array([[1.0]])}
    zero = jax.tree.map(jnp.zeros_like, params)
    strength = {"a": 0.1, "b": 0.0}
    found, _ = optim.add_l1(strength).update(zero, optax.EmptyState(), params)
    assert_allclose(found["a"], [0.1, -0.1, 0.0], rtol=1e-6)
    assert_array_equal(found["b"], [[0.0]])
    found, _ = optim.add_l2(0.1).update(zero, optax.EmptyState(), params)
    expected = jax.grad(lambda p: 0.1 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p)))(params)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-6), found, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_proximal_and_subgradient_steps_reach_the_same_minimum(momentum):
    """The lasso with an orthonormal design, whose minimum is the soft-thresholded target."""
    target, strength = jnp.array([1.0, -0.5, 0.2, 0.05, -0.3]), 0.25
    expected = np.sign(target) * np.maximum(np.abs(target) - strength, 0)
    penalised = dict(name="l1", strength=strength)
    for method, tolerance in (("proximal", 1e-5), ("subgradient", 0.02)):
        config = dict(
            name="sgd",
            learning_rate=0.01,
            momentum=momentum,
            penalty=dict(penalised, method=method),
        )
        chosen = optim.check_config(config)
        tx = optim.make(chosen, optim.numbers(chosen, target, None), epochs=1, steps_per_epoch=1)

        def step(carry, _, tx=tx):
            w, state = carry
            updates, state = tx.update(w - target, state, w)
            return (w + updates, state), None

        (w, _), _ = jax.lax.scan(step, (jnp.ones(5), tx.init(jnp.ones(5))), None, length=3000)
        assert_allclose(w, expected, atol=tolerance)
        assert method == "subgradient" or (np.asarray(w) == 0).tolist() == (expected == 0).tolist()


def test_proximal_step_needs_a_rate():
    w = jnp.ones(3)
    tx = optim.proximal_l1(optax.sgd(0.1), 0.1)
    with pytest.raises(ValueError, match="names no learning_rate; pass learning_rate="):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        optim.add_l1(0.1).update(w, optax.EmptyState())
    tx = optim.proximal_l1(optax.sgd(0.1), 2.0, learning_rate=0.1)
    updates, _ = tx.update(w, tx.init(w), w)
    assert_allclose(w + updates, 0.7, rtol=1e-6)  # 1 - 0.1 - 0.2


def test_a_penalty_acts_on_the_named_parameters_only():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    config = dict(name="sgd", learning_rate=1.0, momentum=0.0)
    chosen = optim.check_config(
        {**config, "penalty": dict(name="l1", strength=0.5, parameters=".*/kernel")}
    )
    tx = optim.make(chosen, optim.numbers(chosen, params, None), epochs=1, steps_per_epoch=1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert_allclose(updates["dense"]["kernel"], -0.5)
    assert_array_equal(updates["dense"]["bias"], 0.0)
    wrong = optim.check_config({**config, "penalty": dict(name="l1", parameters="kernel")})
    with tiny.refused("penalty.parameters", "kernel", "dense/kernel"):
        optim.numbers(wrong, params, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(
                name="sgd",
                constraint=dict(name="k_sparse"),
                penalty=dict(name="l1", method="proximal"),
            ),
            "unconstrained",
        ),
        (
            dict(penalty=dict(name="l1", method="proximal")),
            "'proximal' with an unconstrained sgd",
        ),
        (dict(penalty=dict(name="l3")), "penalty.name is 'l3'; allowed: l1, l2, none"),
        (
            dict(penalty=dict(name="l1", strength=-1.0)),
            "penalty.strength is -1.0; allowed: float >= 0.0",
        ),
        (
            dict(penalty=dict(name="l1", parameters="(")),
            "is not a regular",
        ),
        (dict(name="sfv"), "name is 'sfv'; allowed: .*Did you mean 'sfw'"),
        (dict(lerning_rate=0.1), "no field 'lerning_rate'; .*Did you mean 'learning_rate'"),
        (dict(learning_rate="fast"), "learning_rate is 'fast', of type str; allowed: float >= 0.0"),
        (dict(learning_rate=1.5), "learning_rate is 1.5; allowed: 0 to 1 with"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(momentum=1.2), "momentum is 1.2; allowed: float >= 0.0 and <= 1.0"),
        (dict(rescale="grad"), "rescale is 'grad'; allowed: 'gradient' | 'diameter' | 'none'"),
        (dict(schedule=dict(name="decrease3")), "schedule.name is 'decrease3'; allowed"),
        (dict(schedule=dict(name="piecewise", table="0-1")), "schedule.table is '0-1'"),
        (dict(constraint=dict(name="k_sparse", k=-1)), "constraint.k is -1; allowed: int >= 0"),
        (dict(nesterov=True), "no field 'nesterov'"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with tiny.complains(re.escape(message).replace(r"\.\*", ".*")):
        recipe(**changes)


# Sweeps whose members share a program -------------------------------------------------------------

POLYTOPE = dict(name="k_sparse", k=3, tau=0.5, rules=((".*/bias", dict(name="unconstrained")),))
L1 = dict(name="l1", strength=0.1)
KINDS = {
    "sgd": dict(momentum=0.5),
    "projected sgd": dict(constraint=POLYTOPE, schedule=dict(name="decrease_3")),
    "sfw": dict(name="sfw", constraint=dict(name="l2"), schedule=dict(name="dynamic_change")),
    "proximal sgd": dict(penalty=dict(L1, method="proximal"), schedule=dict(name="cosine")),
    "adagrad_sfw": dict(name="adagrad_sfw", constraint=POLYTOPE, penalty=L1),
}
NUMBERS = dict(learning_rate=(0.05, 0.02), momentum=(0.5, 0.9))


def descend(recipe, values, epochs=30):
    """(weights after 30 epochs of two steps from inside the sets, rates on the way) on a
    quadratic.
    """
    params = {
        "a": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": jnp.array([0.5, -0.2])}
    }
    target = jax.tree.map(lambda p: jnp.cos(3 * p), params)
    tx = optim.make(recipe, values, epochs, 2)
    params = polytopes.shift_inside(params, values["sets"])

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.subtract, params, target)
        updates, state = tx.update(grads, state, params, value=trees.dot(grads, grads) / 2)
        return (optax.apply_updates(params, updates), state), optim.learning_rate(state)

    (params, _), rates = jax.lax.scan(step, (params, tx.init(params)), None, length=2 * epochs)
    return params, rates


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_that_differ_in_numbers_are_one_program(kind):
    shapes = {"a": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(2)}}
    norms = jax.tree.map(lambda leaf: 1.0 + leaf.size, shapes)
    settings = [dict(zip(NUMBERS, pair)) for pair in zip(*NUMBERS.values())]
    recipes = [optim.check_config(dict(dict(name="sgd"), **KINDS[kind]) | own) for own in settings]
    assert optim.program(recipes[0]) == optim.program(recipes[1])
    values = [optim.numbers(recipe, shapes, norms) for recipe in recipes]
    together = jax.jit(jax.vmap(lambda values: descend(recipes[0], values)))
    found = together(jax.tree.map(lambda *leaves: np.stack(leaves), *values))
    after_another = tiny.jitted_once(lambda values: descend(recipes[0], values))
    close = lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for i, own in enumerate(values):
        jax.tree.map(lambda a, b, i=i: close(a[i], b), found, after_another(own))
    alone = jax.jit(lambda: descend(recipes[1], values[1]))()
    jax.tree.map(close, after_another(values[1]), alone)
    assert not np.allclose(*found[0]["a"]["kernel"], atol=1e-4)


def test_other_optimizers_are_other_programs():
    recipes = [optim.check_config(dict(dict(name="sgd"), **own)) for own in KINDS.values()]
    assert len({optim.program(recipe) for recipe in recipes}) == len(KINDS)


def test_misuse_is_explained():
    tx = optim.sfw(0.1, polytopes.KSparse(1, 1.0))
    with pytest.raises(ValueError, match="call update\\(grads, state, params\\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    tx = optim.sgd(optim.dynamic_change(0.1, 9, 1))
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="loss is 'last'; allowed: 'mean'"):
        optim.dynamic_change(0.1, 9, 1, loss="last")
    with pytest.raises(ValueError, match="rescale is 'no'"):
        optim.sfw(0.1, polytopes.KSparse(1, 1.0), rescale="no")
