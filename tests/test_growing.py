"""Growing regularisation: golden numbers of the original, an obvious reference, coupled groups, transformations."""

import math

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsity_jax import growing

CLOSE = dict(rtol=1e-9, atol=1e-11)
GOLDEN = "08_growing_reg.npz"
METHODS = ("GReg-1", "GReg-2", "FixReg")
CASES = [f"{method}/{group}" for method in METHODS for group in ("filter", "channel", "weight")]
CASES += ["GReg-1/filter_magratio", "GReg-2/filter_magratio"]


def options(case):
    """Our options for the original's."""
    own = golden_data.load("hyper.json")[GOLDEN][case]
    return dict(
        method=own["method"].lower().replace("-", ""),
        update_every=own["update_reg_interval"],
        granularity_prune=own["reg_granularity_prune"],
        granularity_pick=own["reg_granularity_pick"],
        granularity_recover=own["reg_granularity_recover"],
        upper_limit=own["reg_upper_limit"],
        upper_limit_pick=own["reg_upper_limit_pick"],
        mag_ratio_limit=own["mag_ratio_limit"],
        fix_steps=own["fix_reg_interval"],
        stabilize_steps=own["stabilize_reg_interval"],
    )


def golden_layers(params, case):
    own = golden_data.load("hyper.json")[GOLDEN][case]
    paths = [f"{name}/kernel" for name in golden_data.load(GOLDEN)[f"{case}/layer_names"]]
    return paths, growing.layers(params, dict(zip(paths, own["stage_pr"])), own["wg"])


def removed(case, j, kernel):
    """The original's choice as our bools."""
    golden, group = golden_data.load(GOLDEN), case.split("/")[1]
    torch_shape = golden_data.to_torch(kernel).shape
    size = {"weight": math.prod(torch_shape), "channel": torch_shape[1]}.get(group, torch_shape[0])
    out = np.zeros(size, bool)
    out[golden[f"{case}/pruned_idx/{j}"]] = True
    return golden_data.from_torch(out.reshape(torch_shape)) if group == "weight" else out


@pytest.mark.parametrize("case", CASES)
def test_replayed_weights_give_the_penalties_of_the_original(case):
    golden = golden_data.load(GOLDEN)
    names, updates = golden[f"{case}/layer_names"], list(golden[f"{case}/update_iterations"])
    weights = [golden[f"{case}/replay/weight/{j}"] for j in range(3)]
    at = lambda u: {name: {"kernel": golden_data.from_torch(w[u])} for name, w in zip(names, weights)}
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, at(0))
        paths, layers = golden_layers(params, case)
        tx = growing.growing_l2(layers, **options(case))
        step = jax.jit(lambda s, p: tx.update(jax.tree.map(jnp.zeros_like, p), s, p))
        state, picked, done = jax.jit(tx.init)(params), {}, {}
        for iteration in range(int(golden[f"{case}/last_iter"]) + 1):
            assert not growing.finished(state)
            u = min(iteration // 2, len(updates) - 1)
            params = jax.tree.map(jnp.asarray, at(u))
            added, state = step(state, params)
            for name, progress in growing.progress(state).items():
                if progress.phase >= growing.PUSH:
                    picked.setdefault(name, iteration)
                if progress.phase == growing.STABILIZE:
                    done.setdefault(name, iteration)
            if iteration not in updates:
                continue
            regs = growing.penalties(state)
            for j, path in enumerate(paths):
                kernel = params[names[j]]["kernel"]
                reg = golden[f"{case}/replay/reg/{j}"][u]
                if case.endswith("weight"):
                    reg = golden_data.from_torch(reg.reshape(golden_data.to_torch(kernel).shape))
                    own = regs.get(path, jnp.zeros(()))
                else:
                    reg = reg.T  # [in, out]
                    own = regs.get(path, jnp.zeros(()))
                    own = own[:, None] if own.ndim and "channel" in case else own
                np.testing.assert_allclose(jnp.broadcast_to(own, reg.shape), reg, err_msg=f"{path} {u}", **CLOSE)
                wanted = (
                    reg
                    if case.endswith("weight")
                    else reg.reshape(reg.shape if kernel.ndim == 2 else (1, 1, *reg.shape))
                )
                np.testing.assert_allclose(added[names[j]]["kernel"], wanted * kernel, **CLOSE)
                ratio = golden[f"{case}/replay/hist_mag_ratio"][u][j]
                if path in regs:
                    np.testing.assert_allclose(growing.progress(state)[path].ratio, np.nan_to_num(ratio), **CLOSE)
                else:
                    assert np.isnan(ratio)
        assert growing.finished(state)
    finish = golden[f"{case}/replay/iter_update_finished"][-1]
    pick = golden[f"{case}/replay/iter_finish_pick"][-1]
    for j, path in enumerate(paths):
        if path in done:
            assert done[path] == finish[j]
            assert picked[path] == max(pick[j], 0)  # -1: never, which is from the start
            np.testing.assert_array_equal(~growing.kept(state)[path], removed(case, j, params[names[j]]["kernel"]))
        else:
            assert finish[j] == 0
            assert golden[f"{case}/pruned_idx/{j}"].size == 0
    assert max(done.values()) == golden[f"{case}/iter_stabilize"]


# A training run of the original, from its initial weights to those before the removal


def forward(params, images):
    x = images
    for conv, norm in (("features.0", "features.1"), ("features.4", "features.5")):
        x = jax.lax.conv_general_dilated(
            x, params[conv]["weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        if "bias" in params[conv]:
            x = x + params[conv]["bias"][:, None, None]
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        scale, bias = (params[norm][k][:, None, None] for k in ("weight", "bias"))
        x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias)
        pool = jnp.max if norm == "features.1" else jnp.mean
        x = pool(x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2), (3, 5))
    return x.reshape(len(x), -1) @ params["classifier"]["weight"].T + params["classifier"]["bias"]


@pytest.mark.parametrize("case", ["GReg-1/filter", "GReg-2/filter_magratio", "GReg-2/weight", "FixReg/channel"])
def test_training_ends_where_the_original_does(case):
    golden = golden_data.load(GOLDEN)
    own = golden_data.load("hyper.json")[GOLDEN][case]
    group = own["wg"]
    params = {}
    for name in golden["param_names"]:
        module, leaf = str(name).rsplit(".", 1)
        params.setdefault(module, {})[leaf] = golden[f"init/{name}"]
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        # PyTorch's layouts, so groups are described by hand
        layers = []
        for name, ratio in zip(golden[f"{case}/layer_names"], own["stage_pr"]):
            path, axis = f"{name}/weight", {"filter": 0, "channel": 1, "weight": None}[group]
            shape = params[str(name)]["weight"].shape
            shape = shape if axis is None else (shape[axis],)
            part = (growing.Part(path, axis),)
            layers.append(growing.Layer(path, shape, growing.num_pruned(ratio, math.prod(shape)), part, part))
        tx = optax.chain(
            growing.growing_l2(layers, **options(case)),
            optax.add_decayed_weights(own["weight_decay"]),
            optax.sgd(own["lr_prune"], own["momentum"]),
        )
        images, labels = jnp.asarray(golden["data/x"]), jnp.asarray(golden["data/y"])

        @jax.jit
        def step(carry):
            params, state, i = carry
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
                forward(p, images[i % 5]), labels[i % 5]
            ).mean()
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state, i + 1

        carry = (params, jax.jit(tx.init)(params), 0)
        while not growing.finished(carry[1]):
            carry = step(carry)
        assert carry[2] == golden[f"{case}/last_iter"] + 1
        for name in golden["param_names"]:
            module, leaf = str(name).rsplit(".", 1)
            np.testing.assert_allclose(
                carry[0][module][leaf], golden[f"{case}/before_prune/{name}"], rtol=1e-7, atol=1e-9
            )
