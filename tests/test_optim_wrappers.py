"""The library's transformations in other people's loops: optax's wrappers, Flax NNX, meshes, other
float types.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import growing, optim, polytopes, saliency, trees

PARAMS = {"a": {"kernel": jnp.linspace(-0.4, 0.4, 6).reshape(2, 3)}, "b": jnp.array([0.3, -0.1])}
GRADS = jax.tree.map(lambda p: jnp.cos(7 * p), PARAMS)
EVERYWHERE = jax.tree.map(lambda _: True, PARAMS)
SPLIT = jax.tree.map(lambda _: "all", PARAMS)
CLIP = ("clip", optax.clip(1e6))
WRAPPERS = {  # all of optax's, each in others
    "plain": lambda tx: tx,
    "apply_if_finite of chain of masked": lambda tx: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1e6), optax.masked(tx, EVERYWHERE)), 3
    ),
    "MultiSteps of named_chain of partition": lambda tx: optax.MultiSteps(
        optax.named_chain(CLIP, ("descend", optax.partition({"all": tx}, SPLIT))), 2
    ).gradient_transformation(),
}


def run_all(transformations, steps=4, params=PARAMS, grads=GRADS):
    """{name: (params, state) after some steps with the same gradient}, all in one program."""

    @jax.jit
    def step(results):
        return {name: after(tx, *results[name]) for name, tx in transformations.items()}

    def after(tx, params, state):
        if not isinstance(tx, optax.MultiSteps):
            tx = optax.with_extra_args_support(tx)
        updates, state = tx.update(grads, state, params, value=jnp.ones(()))
        return optax.apply_updates(params, updates), state

    results = {name: (params, tx.init(params)) for name, tx in transformations.items()}
    for _ in range(steps):
        results = step(results)
    return results


def run(tx, *args):
    return run_all({"one": tx}, *args)["one"]


def same_params(found, expected):
    for name, (params, _) in found.items():
        close = functools.partial(assert_allclose, rtol=1e-5, atol=1e-7, err_msg=name)
        jax.tree.map(close, params, expected[name][0])


# Rates --------------------------------------------------------------------------------------------

SCHEDULE = optax.linear_schedule(0.8, 0.0, 8)
INJECTED = {
    "a number": (optax.inject_hyperparams(optax.sgd)(0.3, momentum=0.9), [0.3] * 4),
    "a schedule": (optax.inject_hyperparams(optax.sgd)(SCHEDULE), [0.8, 0.7, 0.6, 0.5]),
    "a schedule of its own": (optim.sgd(SCHEDULE), [0.8, 0.7, 0.6, 0.5]),
    "its own, injected": (optax.inject_hyperparams(optim.sgd)(SCHEDULE), [0.8, 0.7, 0.6, 0.5]),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_rate_is_found_in_every_wrapper(wrapper):
    made = {name: WRAPPERS[wrapper](inner) for name, (inner, _) in INJECTED.items()}
    results = run_all(made, 4 if wrapper.startswith("MultiSteps") else 2)
    for name, (_, state) in results.items():
        rate = INJECTED[name][1][1]
        assert_allclose(optim.learning_rate(state), rate, rtol=1e-6, err_msg=name)


class Names(NamedTuple):
    learning_rate: jax.Array
    w: jax.Array


@pytest.mark.parametrize("make", [dict, Names])
def test_a_parameter_called_learning_rate_is_no_rate(make):
    params = make(learning_rate=jnp.ones(3), w=jnp.ones(2))
    state = optax.sgd(0.1, momentum=0.9).init(params)
    assert optim.learning_rate(state) is None
    state = optim.sgd(0.1).init(params)
    assert optim.learning_rate(state).shape == ()
    with pytest.raises(ValueError, match="learning_rate="):
        run(optim.proximal_l1(optax.sgd(0.1, momentum=0.9), 0.1), 1, params, params)


@pytest.mark.parametrize(
    "inner",
    [optax.sgd(SCHEDULE), optax.chain(optim.sgd(0.1), optim.sgd(0.2))],
    ids=["none", "several"],
)
def test_no_rate_and_several_are_refused(inner):
    with pytest.raises(ValueError, match="learning_rate="):
        run(optim.proximal_l1(inner, 0.1), 1)


# Trees of sets and strengths ----------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.fc = nnx.Linear(4, 2, rngs=nnx.Rngs(1))


BALL = polytopes.LpBall(0.5, float("inf"))  # cheap to compile
OF_TREES = {
    "sfw": (lambda tree: optim.sfw(0.1, tree), BALL),
    "adagrad_sfw": (lambda tree: optim.adagrad_sfw(0.1, tree), BALL),
    "projected": (lambda tree: optim.sgd(0.1, tree), BALL),
    "add_l1": (lambda tree: optax.chain(optim.add_l1(tree), optax.sgd(0.1)), 0.2),
    "add_l2": (lambda tree: optax.chain(optim.add_l2(tree), optax.sgd(0.1)), 0.2),
    "proximal_l1": (lambda tree: optim.proximal_l1(optim.sgd(0.1), tree), 0.2),
}


@pytest.mark.parametrize("name", OF_TREES)
def test_trees_of_nnx_states_mean_their_arrays(name):
    """`nnx.Optimizer` shows wrapped arrays at first, bare ones later; trees of either kind fit
    both.
    """
    make, entry = OF_TREES[name]
    results = []
    for tree in (nnx.state(Net(), nnx.Param), nnx.to_pure_dict(nnx.state(Net(), nnx.Param)), None):
        net = Net()
        given = entry if tree is None else jax.tree.map(lambda _: entry, tree)
        optimizer = nnx.Optimizer(net, make(given), wrt=nnx.Param)
        optimizer.update(net, jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param)))
        results.append(jax.tree.leaves(nnx.to_pure_dict(nnx.state(net, nnx.Param))))
    for other in results[:2]:
        jax.tree.map(assert_array_equal, other, results[2])


@pytest.mark.parametrize("name", OF_TREES)
def test_trees_serve_what_a_mask_shows(name):
    make, entry = OF_TREES[name]
    whole = jax.tree.map(lambda _: entry, PARAMS)
    mask = {"a": {"kernel": True}, "b": False}
    masked, _ = run(optax.masked(make(whole), mask), 2)
    alone, _ = run(make(entry), 2, PARAMS["a"], GRADS["a"])
    assert_array_equal(masked["a"]["kernel"], alone["kernel"])


@pytest.mark.parametrize("name", OF_TREES)
def test_a_tree_of_other_paths_is_refused(name):
    make, entry = OF_TREES[name]
    for tree, path in (
        ({"a": {"kernel": entry}}, "'b'"),
        ({"a": {"kernel": entry}, "b": entry, "c": entry}, "'c'"),
    ):
        with pytest.raises(ValueError, match=path) as error:
            run(make(tree), 1)
        assert "PyTreeDef" not in str(error.value)


def test_plain_paths_drop_the_wrapper_of_nnx():
    state = nnx.state(Net(), nnx.Param)
    assert list(trees.plain_leaves(state)) == list(trees.named_leaves(nnx.to_pure_dict(state)))
    assert "value" in trees.plain_leaves({"value": 1.0})  # an entry of a dict is no wrapper


# Narrow types -------------------------------------------------------------------------------------

SETS = {
    "k_sparse": polytopes.KSparse(5, 0.5),
    "l1": polytopes.LpBall(1.0, 1.0),
    "l2": polytopes.LpBall(0.7, 2.0),
    "l3": polytopes.LpBall(0.7, 3.0),
    "linf": polytopes.LpBall(0.3, float("inf")),
}
IN_SETS = {
    "sfw": lambda sets: optim.sfw(0.003, sets, rescale="none"),
    "adagrad_sfw": lambda sets: optim.adagrad_sfw(0.003, sets),
    "projected": lambda sets: optim.sgd(0.003, sets),
}


def excess(constraint, w):
    """How far outside its set an array is, relative to the radius; of members along the first axis
    the most.
    """
    w = np.abs(np.asarray(w, np.float64)).reshape(len(w), -1)
    if isinstance(constraint, polytopes.KSparse):
        largest = w.max() / constraint.radius
        return max(w.sum(1).max() / (constraint.k * constraint.radius), largest) - 1
    return np.linalg.norm(w, constraint.p, axis=1).max() / constraint.radius - 1


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.bfloat16) for name in IN_SETS), ("sfw", jnp.float16)]
)
def test_narrow_weights_stay_in_their_sets_for_thousands_of_steps(name, dtype):
    sets = {key: value for key, value in SETS.items() if name != "projected" or key != "l3"}
    tx = IN_SETS[name](sets)
    start = {
        key: s.shift_inside(jax.random.normal(jax.random.key(0), (24,)).astype(dtype))
        for key, s in sets.items()
    }

    def step(carry, i):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (24,))
        grads = jax.tree.map(lambda w: (w + noise - 0.3).astype(dtype), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), None

    def thousand(carry, i):
        carry, _ = jax.lax.scan(step, carry, 1000 * i + jnp.arange(1000))
        return carry, carry[0]

    _, seen = jax.jit(lambda p: jax.lax.scan(thousand, (p, tx.init(p)), jnp.arange(3)))(start)
    rounding = float(jnp.finfo(dtype).eps) / 2
    for key, constraint in sets.items():
        assert seen[key].dtype == dtype
        assert excess(constraint, seen[key]) <= rounding * (1 + 1e-3), key
        assert np.abs(np.asarray(seen[key], np.float64)).max() > 0


def test_a_narrow_update_ends_at_the_number_nearest_to_its_target():
    """w + u in bfloat16 is never further from 0 than the rounded target, whatever the two
    magnitudes.
    """
    key = jax.random.key(0)
    w = (
        jax.random.normal(key, (4096,)) * jnp.exp(4 * jax.random.normal(jax.random.key(1), (4096,)))
    ).astype(jnp.bfloat16)
    target = w[::-1] * jnp.bfloat16(0.01)
    update = polytopes.settled(
        polytopes.Unconstrained(), w, target.astype(jnp.float32) - w.astype(jnp.float32)
    )
    after = np.asarray(w + update, np.float64)
    before, target = np.asarray(w, np.float64), np.asarray(target, np.float64)
    assert (np.abs(after) <= np.abs(target)).all()
    assert (np.abs(after - target) <= 2.0**-7 * np.abs(before - target)).all()


@pytest.mark.parametrize("name", ["adagrad_sfw", "sfw", "sgd"])
def test_sums_over_steps_are_wide_unless_asked_otherwise(name):
    params = {"w": jnp.zeros(3, jnp.bfloat16)}
    floats = lambda state: {x.dtype for x in jax.tree.leaves(state) if x.shape == (3,)}
    make = lambda **options: optim.OPTIMIZERS[name](0.1, polytopes.Unconstrained(), **options)
    assert floats(make().init(params)) == {jnp.dtype("float32")}
    narrow = make(accumulator_dtype="bfloat16")
    assert floats(narrow.init(params)) == {jnp.dtype("bfloat16")}
    _, state = run(narrow, 1, params, params)
    assert floats(state) == {jnp.dtype("bfloat16")}
    config = dict(name=name, learning_rate=0.1, accumulator_dtype="float61")
    with pytest.raises(ValueError, match="accumulator_dtype"):
        optim.check_config(config)


def test_the_sum_of_squares_grows_for_ever():
    tx = optim.adagrad_sfw(0.1, polytopes.Unconstrained(), momentum=0.0)
    ones = jnp.ones(2, jnp.bfloat16)

    def step(state, _):
        update, state = tx.update(ones, state, ones)
        return state, update

    state, updates = jax.lax.scan(step, tx.init(ones), None, length=4096)
    root = optax.tree.get(state, "root")
    assert_allclose(root, 64.0, rtol=1e-4)
    assert_allclose(np.asarray(updates[-1], float), -0.1 / 64, rtol=2**-8)


@pytest.mark.parametrize(
    ("accumulator", "huge", "rounding"), [(None, 1e25, 1e-6), ("float16", 1e4, 1e-3)]
)
def test_squares_of_huge_gradients_stay_in_range(accumulator, huge, rounding):
    """In one array gradients whose squares the type of the sum cannot hold; the other array is as
    without them.
    """
    gradients = {
        "huge": jnp.array([1e-3, 1, 2, 1e-3]) * jnp.array([1, huge, huge, 1]),
        "small": jnp.full(4, 0.5),
    }

    def updates(gradients, accumulator):
        rate = jnp.asarray(0.1, gradients["small"].dtype)
        tx = optim.adagrad_sfw(
            rate, polytopes.Unconstrained(), momentum=0.0, accumulator_dtype=accumulator
        )
        state, steps = tx.init(jax.tree.map(lambda g: g[:1], gradients)), []
        for i in range(4):
            slopes = jax.tree.map(lambda g, i=i: g[i : i + 1], gradients)
            update, state = tx.update(slopes, state, slopes)
            steps.append([float(update["huge"][0]), float(update["small"][0])])
        return steps

    with jax.enable_x64(True):
        expected = updates(jax.tree.map(lambda g: g.astype(jnp.float64), gradients), None)
    assert_allclose(updates(gradients, accumulator), expected, rtol=4 * rounding)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "constraint"), [("sfw", "l2"), ("adagrad_sfw", "linf")])
def test_gradients_through_steps_are_right_where_gradients_are_zero(name, constraint):
    """Derivatives with respect to the learning rate and the data, with a dead array and a dead
    entry.
    """
    make = {
        "sfw": lambda lr, sets: optim.sfw(lr, sets, momentum=0.5),
        "adagrad_sfw": optim.adagrad_sfw,
    }[name]

    def after(lr, shift):
        tx = make(lr, SETS[constraint])
        params = {"dead": jnp.array([0.1, 0.0]), "w": jnp.array([0.1, 0.2, -0.1])}
        state = tx.init(params)
        for _ in range(2):
            slopes = {
                "dead": 0 * params["dead"],
                "w": (params["w"] - shift) * jnp.array([1.0, 1.0, 0.0]),
            }
            updates, state = tx.update(slopes, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(jnp.sin(params["w"])) + jnp.sum(params["dead"] ** 2)

    lr, shift, small = 0.05, 0.3, 1e-6
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(after, (0, 1)))(lr, shift)
        value = jax.jit(after)
        by_lr = (value(lr + small, shift) - value(lr - small, shift)) / (2 * small)
        by_shift = (value(lr, shift + small) - value(lr, shift - small)) / (2 * small)
    assert_allclose(found, [by_lr, by_shift], rtol=1e-4, atol=1e-7)


# Proximal steps -----------------------------------------------------------------------------------

TARGET, STRENGTH = jnp.array([1.0, -0.5, 0.2, 0.05, -0.3]), 0.25
descent = optax.inject_hyperparams(optax.sgd)
ACCEPTED = {
    "sgd": (optim.sgd(0.1, momentum=0.0), {}),
    "momentum": (optim.sgd(0.02), {}),
    "dampened": (optim.sgd(0.1, dampening=0.9), {}),
    "nesterov": (optim.sgd(0.02, nesterov=True), {}),
    "optax, a schedule": (descent(optax.linear_schedule(0.2, 0.1, 20)), {}),
    "optax, momentum": (descent(0.02, momentum=0.9), dict(momentum=0.9)),
    "scaled": (optax.chain(descent(0.1), optax.scale(0.5)), {}),
    "scaled, not named": (optax.chain(optax.sgd(0.1), optax.scale(0.5)), dict(learning_rate=0.05)),
    "not named": (optax.sgd(0.1), dict(learning_rate=0.1)),
    "MultiSteps": (optax.MultiSteps(descent(0.1), 4).gradient_transformation(), {}),
    "apply_if_finite": (optax.apply_if_finite(descent(0.1), 5), {}),
    "both": (
        optax.MultiSteps(optax.apply_if_finite(descent(0.1), 5), 2).gradient_transformation(),
        {},
    ),
}


def test_every_accepted_optimizer_solves_the_stated_lasso():
    """Orthonormal design: the minimum is the soft-thresholded target."""
    accepted = {
        name: optim.proximal_l1(inner, STRENGTH, **options)
        for name, (inner, options) in ACCEPTED.items()
    }

    def after(name, w, state, i):
        bad = (i % 3 == 1) & (name == "apply_if_finite")
        updates, state = accepted[name].update(jnp.where(bad, jnp.nan, w - TARGET), state, w)
        return w + updates, state

    step = lambda carry, i: ({name: after(name, *own, i) for name, own in carry.items()}, None)
    start = {name: (jnp.ones(5), tx.init(jnp.ones(5))) for name, tx in accepted.items()}
    ends, _ = jax.lax.scan(step, start, jnp.arange(600))
    expected = np.sign(TARGET) * np.maximum(np.abs(TARGET) - STRENGTH, 0)
    for name, (w, _) in ends.items():
        assert_allclose(w, expected, atol=1e-5, err_msg=name)
        assert_array_equal(np.asarray(w) == 0, expected == 0, err_msg=name)


REFUSED = {
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), descent(0.1)),
    "adam": optax.inject_hyperparams(optax.adam)(0.1),
    "adagrad": optax.inject_hyperparams(optax.adagrad)(0.1),
    "rmsprop": optax.inject_hyperparams(optax.rmsprop)(0.1),
    "lion": optax.inject_hyperparams(optax.lion)(0.1),
    "sfw": optim.sfw(0.1, polytopes.LpBall(0.5, 2.0)),
    "frozen": optax.partition({"b": descent(0.1), "a": optax.set_to_zero()}, {"a": "a", "b": "b"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_are_no_multiple_of_the_gradient_are_refused(name):
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="add_l1"):
        optim.proximal_l1(REFUSED[name], 0.1).init(params)
    with pytest.raises(ValueError, match=r"learning_rate=0\.2"):
        optim.proximal_l1(descent(0.1), 0.1, learning_rate=0.2).init(params)


def test_a_rate_inside_a_trace_is_not_tried_out():
    w = jnp.ones(3)

    @jax.jit
    def moved(rate):
        tx = optim.proximal_l1(descent(rate), 0.5)
        return w + tx.update(w, tx.init(w), w)[0]

    assert_allclose(moved(0.1), 1 - 0.1 - 0.05, rtol=1e-6)


def test_dampening_without_momentum_does_nothing():
    for momentum in (0.0, jnp.asarray(0.0)):
        tx = optim.heavy_ball(momentum, dampening=0.5)
        state = tx.init(TARGET)
        for factor in (1.0, 3.0):
            updates, state = tx.update(factor * TARGET, state)
            assert_allclose(updates, factor * TARGET, rtol=1e-6)


# Every transformation in every wrapper ------------------------------------------------------------

HALF = growing.layers(PARAMS, {"a/kernel": 0.5})
TRANSFORMATIONS = {
    "sgd": optim.sgd(0.1),
    "sgd, nesterov": optim.sgd(0.1, nesterov=True, weight_decay=0.01),
    "projected sgd": optim.sgd(0.1, BALL),
    "projected": optim.projected(optax.sgd(0.1), BALL),
    "sfw": optim.sfw(0.1, BALL),
    "adagrad_sfw": optim.adagrad_sfw(0.1, BALL),
    "scale_by_rate": optim.scale_by_rate(0.1),
    "heavy_ball": optim.heavy_ball(0.9),
    "add_l1": optim.add_l1(0.1),
    "add_l2": optim.add_l2(jax.tree.map(lambda _: 0.1, PARAMS)),
    "add_decayed_weights": optim.add_decayed_weights(0.1),
    "proximal_l1": optim.proximal_l1(optim.sgd(0.1), 0.1),
    "dynamic_change": optim.sgd(optim.dynamic_change(0.1, 30, 2)),
    "track_saliency": saliency.track(optim.sgd(0.1), steps_per_epoch=21),
    "growing_l2": growing.growing_l2(HALF, update_every=1),
    "pruned": optim.pruned(optim.sgd(0.1), 0.5),
}


def leaves_of(state):
    return [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "plain"])
def test_every_transformation_acts_in_every_wrapper_as_alone(wrapper):
    many = wrapper.startswith("MultiSteps")
    made = {name: WRAPPERS[wrapper](tx) for name, tx in TRANSFORMATIONS.items()}
    if many:  # as a plain transformation it hands no value on
        made["dynamic_change"] = optax.MultiSteps(TRANSFORMATIONS["dynamic_change"], 2)
    same_params(run_all(made, 4 if many else 2), run_all(TRANSFORMATIONS, 2))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_states_follow_the_conventions_of_optax(name):
    """Their parameters are found, no buffer is there twice, empty arrays pass, and extra arguments
    are no matter.
    """
    tx = TRANSFORMATIONS[name]
    state = tx.init(PARAMS)
    marked = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves_of(state)]
    assert len(set(buffers)) == len(buffers)
    if name in ("add_l2", "growing_l2"):
        return  # made for the paths of PARAMS
    params = {**PARAMS, "empty": jnp.zeros((0, 3))}
    extra = dict(value=jnp.ones(()), value_fn=jnp.sin, note="text")
    step = lambda params: tx.update(params, tx.init(params), params, **extra)[0]
    assert jax.eval_shape(step, params)["empty"].shape == (0, 3)


def test_every_transformation_runs_on_meshes():
    """In `shard_map`, each device takes its block for the whole; and with arrays on an explicit
    mesh.
    """
    kernels = np.linspace(-0.4, 0.4, 24, dtype=np.float32).reshape(2, 4, 3)
    layers = growing.layers({"a": {"kernel": kernels[0]}}, {"a/kernel": 0.5})
    transformations = TRANSFORMATIONS | {  # made for these paths and shapes
        "add_l2": optim.add_l2({"a": {"kernel": 0.1}}),
        "growing_l2": growing.growing_l2(layers, update_every=1),
    }

    def two_steps(tx, params):
        tx, grads = optax.with_extra_args_support(tx), jax.tree.map(jnp.cos, params)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params, value=jnp.ones(()))
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=2)[0][0]

    def descend(kernel):
        return {
            name: two_steps(tx, {"a": {"kernel": kernel}}) for name, tx in transformations.items()
        }

    tiny.check_on_meshes(descend, kernels)


INJECTABLE = {
    "sgd": (optim.sgd, dict(learning_rate=0.1, momentum=0.8, weight_decay=0.01), ("nesterov",)),
    "sfw": (optim.sfw, dict(learning_rate=0.1, sets=BALL, momentum=0.8), ()),
    "adagrad_sfw": (
        optim.adagrad_sfw,
        dict(learning_rate=0.1, sets=BALL, delta=1e-6),
        ("inner_steps",),
    ),
    "scale_by_rate": (optim.scale_by_rate, dict(learning_rate=0.1), ()),
    "heavy_ball": (optim.heavy_ball, dict(momentum=0.8), ("nesterov",)),
    "add_l1": (optim.add_l1, dict(strength=0.1), ()),
    "add_l2": (optim.add_l2, dict(strength=0.1), ()),
    "add_decayed_weights": (optim.add_decayed_weights, dict(weight_decay=0.1), ()),
    "proximal_l1": (optim.proximal_l1, dict(inner=optim.sgd(0.1), strength=0.1), ()),
    "projected": (optim.projected, dict(inner=optax.sgd(0.1), sets=BALL), ()),
}


def test_numbers_may_be_injected():
    given = {name: factory(**numbers) for name, (factory, numbers, _) in INJECTABLE.items()}
    injected = {
        name: optax.inject_hyperparams(factory, static_args=static)(**numbers)
        for name, (factory, numbers, static) in INJECTABLE.items()
    }
    same_params(run_all(injected, 2), run_all(given, 2))
