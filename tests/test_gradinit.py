"""SFW-Init: golden numbers of the original, and its promise."""

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparsity_jax import gradinit, losses, polytopes

CLOSE = dict(rtol=1e-6, atol=1e-11)


def network(params, x):
    """The golden network on NCHW images, weights in PyTorch layouts, batch statistics in its batch norm."""
    conv = lambda x, w, stride: jax.lax.conv_general_dilated(x, w, (stride, stride), ((1, 1), (1, 1)))
    x = conv(x, params["0/weight"], 1)
    x = (x - x.mean((0, 2, 3), keepdims=True)) / jnp.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    x = jax.nn.relu(x * params["1/weight"][:, None, None] + params["1/bias"][:, None, None])
    x = jax.nn.relu(conv(x, params["3/weight"], 2) + params["3/bias"][:, None, None])
    return x.mean((2, 3)) @ params["7/weight"].T + params["7/bias"]


def loss(params, batch):
    return losses.cross_entropy(network(params, batch[0]), batch[1]).mean()


@pytest.mark.parametrize(("constraint", "lr"), golden_data.parts("04_sfw_init.npz", r"(\w+)/lr=([^/]+)/"))
def test_scales_match_the_original(constraint, lr):
    golden, hyper = golden_data.load("04_sfw_init.npz"), golden_data.hyper("04_sfw_init.npz")
    case, names = f"{constraint}/lr={lr}", [str(n).replace(".", "/") for n in golden["param_names"]]
    with jax.enable_x64(True):
        params = {name: jnp.asarray(golden["init/" + name.replace("/", ".")]) for name in names}
        if constraint == "ksparse":
            sets = {n: polytopes.KSparse(int(k), r) for n, (k, r) in zip(names, golden[f"{case}/constraint_K_radius"])}
        else:
            sets = {n: polytopes.LpBall(hyper["diameter"] / 2, 2.0) for n in names}
        assert hyper["min_scale_bias"] == 0  # not an option: biases may reach 0
        options = dict(
            learning_rate=float(lr),
            scale_learning_rate=hyper["adam_lr"],
            min_scale=hyper["min_scale_weight"],
            clip=hyper["grad_clip"],
            beta1=hyper["betas"][0],
            beta2=hyper["betas"][1],
            eps=hyper["eps"],
        )
        step = jax.jit(gradinit.scale_step(loss, sets, **options))
        state, batches = gradinit.init(params), len(golden["batches/x"])
        for i in range(hyper["iterations"]):
            x, y = zip(
                *((golden["batches/x"][j % batches], golden["batches/y"][j % batches]) for j in range(3 * i, 3 * i + 3))
            )
            inner = (np.concatenate(x[:2]), np.concatenate(y[:2]))
            outer = (np.concatenate((x[0], x[2])), np.concatenate((y[0], y[2])))
            state, metrics = step(state, inner, outer)
            in_order = lambda tree: [tree[name] for name in names]
            before_after = [metrics.loss_before, metrics.loss_after]
            np.testing.assert_allclose(before_after, golden[f"{case}/losses"][i], **CLOSE)
            np.testing.assert_allclose(in_order(metrics.step_sizes), golden[f"{case}/inner_step_size"][i], **CLOSE)
            np.testing.assert_allclose(
                in_order(metrics.inner_products), golden[f"{case}/inner_product"][i], rtol=1e-6, atol=1e-10
            )
            np.testing.assert_allclose(in_order(state.scales), golden[f"{case}/alpha"][i], **CLOSE)
        for name in names:
            np.testing.assert_allclose(state.params[name], golden[f"{case}/final/" + name.replace("/", ".")], **CLOSE)


def test_params_may_be_tuples():
    key = jax.random.key(0)
    weights, bias = jax.random.normal(key, (6, 4)), jnp.full(4, 0.1)
    batch = (jax.random.normal(jax.random.key(1), (64, 6)), jnp.arange(64) % 4)
    found = []
    for pack, unpack in (
        (lambda w, b: [w, b], list),
        (lambda w, b: (w, b), list),
        (lambda w, b: [(w, b)], lambda p: p[0]),
    ):
        loss = lambda p, batch, unpack=unpack: losses.cross_entropy(
            batch[0] @ unpack(p)[0] + unpack(p)[1], batch[1]
        ).mean()
        step = gradinit.scale_step(loss, polytopes.KSparse(8, 1.0))
        params = pack(weights, bias)
        state, metrics = step(gradinit.init(params), batch, batch)
        assert jax.tree.structure(state.params) == jax.tree.structure(metrics.step_sizes) == jax.tree.structure(params)
        found.append(jax.tree.leaves((state.params, metrics)))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


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
    np.testing.assert_array_equal(state.params["bias"], 0)
    np.testing.assert_allclose(state.params["kernel"], params["kernel"] * state.scales["kernel"], rtol=1e-4)


def test_scales_on_meshes():
    rng = np.random.default_rng(0)
    inputs, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 4), (2, 4)))
    step = gradinit.scale_step(lambda params, batch: jnp.mean(jnp.tanh(batch @ params["w"])), polytopes.KSparse(2, 1.0))

    def learn(inputs, weights):
        return jax.lax.scan(lambda state, _: step(state, inputs, inputs), gradinit.init({"w": weights}), length=2)

    tiny.check_on_meshes(learn, inputs, weights)
