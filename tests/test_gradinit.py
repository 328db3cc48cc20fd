"""SFW-Init: golden numbers of the original, and its promise."""

import functools

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import gradinit, losses, polytopes

CLOSE = dict(rtol=1e-6, atol=1e-11)


FILE = "04_sfw_init.npz"
GOLDEN = golden_data.load(FILE)
NAMES = [str(name) for name in GOLDEN["param_names"]]
PATHS = [name.replace(".", "/") for name in NAMES]  # the last part tells a bias
FIRST, NORM, SECOND, DENSE = dict.fromkeys(
    path.rpartition("/")[0] for path in PATHS
)  # modules with parameters


def network(params, x):
    """The golden network on NCHW images, weights in PyTorch layouts, batch statistics in its batch
    norm.
    """
    conv = lambda x, w, stride: jax.lax.conv_general_dilated(
        x, w, (stride, stride), ((1, 1), (1, 1))
    )
    column = lambda name: params[name][:, None, None]
    x = conv(x, params[f"{FIRST}/weight"], 1)
    x = (x - x.mean((0, 2, 3), keepdims=True)) / jnp.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    x = jax.nn.relu(x * column(f"{NORM}/weight") + column(f"{NORM}/bias"))
    x = jax.nn.relu(conv(x, params[f"{SECOND}/weight"], 2) + column(f"{SECOND}/bias"))
    return x.mean((2, 3)) @ params[f"{DENSE}/weight"].T + params[f"{DENSE}/bias"]


def loss(params, batch):
    return losses.cross_entropy(network(params, batch[0]), batch[1]).mean()


def golden_set(constraint, size):
    """The feasible set of an array of `size` entries, for the original's hyper-parameters."""
    hyper = golden_data.hyper(FILE)
    own = dict(tau=hyper["diameter"], mode="diameter")
    if constraint == "ksparse":
        return polytopes.k_sparse(size, 1.0, k=hyper["K"], k_frac=hyper["K_frac"], **own)
    return polytopes.lp_ball(size, 1.0, p=constraint.removeprefix("l"), **own)


@functools.cache
def compiled(constraint):
    """One step of the scales' optimizer; the inner learning rate is an argument."""
    hyper = golden_data.hyper(FILE)
    sets = {
        path: golden_set(constraint, GOLDEN[f"init/{name}"].size)
        for path, name in zip(PATHS, NAMES)
    }
    options = dict(
        scale_learning_rate=hyper["adam_lr"],
        min_scale=hyper["min_scale_weight"],
        clip=hyper["grad_clip"],
        beta1=hyper["betas"][0],
        beta2=hyper["betas"][1],
        eps=hyper["eps"],
    )

    @jax.jit
    def step(learning_rate, state, inner, outer):
        return gradinit.scale_step(loss, sets, learning_rate=learning_rate, **options)(
            state, inner, outer
        )

    return sets, step


@pytest.mark.parametrize(("constraint", "lr"), golden_data.parts(FILE, r"(\w+)/lr=([^/]+)/"))
def test_scales_match_the_original(constraint, lr):
    hyper, case = golden_data.hyper(FILE), f"{constraint}/lr={lr}"
    assert hyper["min_scale_bias"] == 0  # not an option: biases may reach 0
    with jax.enable_x64(True):
        params = {path: GOLDEN[f"init/{name}"] for path, name in zip(PATHS, NAMES)}
        sets, step = compiled(constraint)
        ours = [(getattr(sets[path], "k", 0), sets[path].radius) for path in PATHS]
        assert_allclose(ours, GOLDEN[f"{case}/constraint_K_radius"], **CLOSE)
        state, batches = gradinit.init(params), len(GOLDEN["batches/x"])
        in_order = lambda tree: [tree[path] for path in PATHS]
        for i in range(hyper["iterations"]):
            numbers = [j % batches for j in range(3 * i, 3 * i + 3)]
            x, y = ([GOLDEN[f"batches/{part}"][j] for j in numbers] for part in "xy")
            inner = (np.concatenate(x[:2]), np.concatenate(y[:2]))
            outer = (np.concatenate((x[0], x[2])), np.concatenate((y[0], y[2])))
            state, metrics = step(float(lr), state, inner, outer)
            before_after = [metrics.loss_before, metrics.loss_after]
            assert_allclose(before_after, GOLDEN[f"{case}/losses"][i], **CLOSE)
            assert_allclose(
                in_order(metrics.step_sizes), GOLDEN[f"{case}/inner_step_size"][i], **CLOSE
            )
            assert_allclose(
                in_order(metrics.inner_products),
                GOLDEN[f"{case}/inner_product"][i],
                rtol=1e-6,
                atol=1e-10,
            )
            assert_allclose(in_order(state.scales), GOLDEN[f"{case}/alpha"][i], **CLOSE)
        for path, name in zip(PATHS, NAMES):
            assert_allclose(state.params[path], GOLDEN[f"{case}/final/{name}"], **CLOSE)
    for name in golden_data.parts(
        FILE, rf"{case}/final_buffers/(.+)"
    ):  # as new; our steps have none to change
        assert_array_equal(
            GOLDEN[f"{case}/final_buffers/{name}"], float(name.endswith("running_var"))
        )


def test_params_may_be_tuples():
    rng = default_rng(0)
    weights, bias = rng.normal(size=(6, 4)).astype(np.float32), np.full(4, 0.1, np.float32)
    batch = rng.normal(size=(64, 6)).astype(np.float32), np.arange(64) % 4
    found = []
    for pack, unpack in (
        (lambda w, b: [w, b], list),
        (lambda w, b: ([w], (b,)), lambda p: [p[0][0], p[1][0]]),
    ):
        loss = lambda p, batch, unpack=unpack: losses.cross_entropy(
            batch[0] @ unpack(p)[0] + unpack(p)[1], batch[1]
        ).mean()
        step = jax.jit(gradinit.scale_step(loss, polytopes.KSparse(8, 1.0)))
        params = pack(weights, bias)
        state, metrics = step(gradinit.init(params), batch, batch)
        assert (
            jax.tree.structure(state.params)
            == jax.tree.structure(metrics.step_sizes)
            == jax.tree.structure(params)
        )
        found.append(jax.tree.leaves((state.params, metrics)))
    jax.tree.map(assert_array_equal, *found)


def test_scales_lower_the_loss_after_a_step_and_skip_zero_arrays():
    key = jax.random.key(0)
    params = {"kernel": 3 * jax.random.normal(key, (6, 4)), "bias": jnp.zeros(4)}
    x = jax.random.normal(jax.random.key(1), (64, 6))
    batch = (x, jnp.argmax(x[:, :4], -1))
    linear = lambda p, b: losses.cross_entropy(b[0] @ p["kernel"] + p["bias"], b[1]).mean()
    step = jax.jit(gradinit.scale_step(linear, polytopes.KSparse(8, 1.0), scale_learning_rate=0.05))
    state, after = gradinit.init(params), []
    with jax.debug_nans(True):
        for _ in range(40):
            state, metrics = step(state, batch, batch)
            after.append(float(metrics.loss_after))
    assert after[-1] < 0.8 * after[0]
    assert float(state.scales["bias"]) == 1.0
    assert_array_equal(state.params["bias"], 0)
    assert_allclose(state.params["kernel"], params["kernel"] * state.scales["kernel"], rtol=1e-4)


def test_scales_on_meshes():
    rng = default_rng(0)
    inputs, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 4), (2, 4)))
    step = gradinit.scale_step(
        lambda params, batch: jnp.mean(jnp.tanh(batch @ params["w"])), polytopes.KSparse(2, 1.0)
    )

    def learn(inputs, weights):
        return jax.lax.scan(
            lambda state, _: step(state, inputs, inputs), gradinit.init({"w": weights}), length=2
        )

    tiny.check_on_meshes(learn, inputs, weights)
