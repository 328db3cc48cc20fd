"""Growing regularisation: golden numbers of the original, an obvious reference, coupled groups,
transformations.
"""

import functools
import math
from fractions import Fraction

import golden_data
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import groups, growing, masks, originals, units

CLOSE = dict(rtol=1e-9, atol=1e-11)
FILE = "08_growing_reg.npz"
GOLDEN = golden_data.load(FILE)
HYPER = golden_data.hyper(FILE)
CASES = golden_data.parts(FILE, r"(?!structural/)(.+)/layer_names$")
PAIRS, CLASSIFIER = golden_data.growing_modules()


def options(case):
    """Our options for the original's."""
    own = HYPER[case]
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
    own = HYPER[case]
    paths = [f"{name}/kernel" for name in GOLDEN[f"{case}/layer_names"]]
    return paths, growing.layers(params, dict(zip(paths, own["stage_pr"])), own["wg"])


def removed(case, j, kernel):
    """The original's choice as our bools."""
    group = HYPER[case]["wg"]
    torch_shape = golden_data.to_torch(kernel).shape
    size = {"weight": math.prod(torch_shape), "channel": torch_shape[1]}.get(group, torch_shape[0])
    out = np.zeros(size, bool)
    out[GOLDEN[f"{case}/pruned_idx/{j}"]] = True
    return golden_data.from_torch(out.reshape(torch_shape)) if group == "weight" else out


@pytest.mark.parametrize("case", CASES)
# one log of the original, followed event by event
def test_replayed_weights_give_the_penalties_of_the_original(case):  # noqa: C901, PLR0912, PLR0915
    names, updates = GOLDEN[f"{case}/layer_names"], list(GOLDEN[f"{case}/update_iterations"])
    weights = [GOLDEN[f"{case}/replay/weight/{j}"] for j in range(len(names))]
    at = lambda u: {
        name: {"kernel": golden_data.from_torch(w[u])} for name, w in zip(names, weights)
    }
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, at(0))
        paths, layers = golden_layers(params, case)
        tx = growing.growing_l2(layers, **options(case))

        @jax.jit
        def step(state, params):
            added, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
            told = growing.progress(state), growing.penalties(state), growing.finished(state)
            return added, state, told

        state, picked, done, finished = jax.jit(tx.init)(params), {}, {}, False
        for iteration in range(int(GOLDEN[f"{case}/last_iter"]) + 1):
            assert not finished
            u = min(iteration // HYPER[case]["update_reg_interval"], len(updates) - 1)
            params = at(u)
            added, state, told = step(state, params)
            found, regs, finished = jax.device_get(told)
            for name, progress in found.items():
                if progress.phase >= growing.PUSH:
                    picked.setdefault(name, iteration)
                if progress.phase == growing.STABILIZE:
                    done.setdefault(name, iteration)
            rests = all(progress.phase == growing.STABILIZE for progress in found.values())
            assert ("stabilize_reg" if rests else "update_reg") == GOLDEN[f"{case}/state"][
                iteration
            ]
            in_force = [np.asarray(regs.get(path, 0.0)) for path in paths]
            sizes = [[reg.min(), reg.mean(), reg.max()] for reg in in_force]
            assert_allclose(sizes, GOLDEN[f"{case}/reg_min_mean_max"][iteration], **CLOSE)
            if iteration not in updates:
                continue
            for j, path in enumerate(paths):
                kernel = params[names[j]]["kernel"]
                reg = GOLDEN[f"{case}/replay/reg/{j}"][u]
                if HYPER[case]["wg"] == "weight":
                    reg = golden_data.from_torch(reg.reshape(golden_data.to_torch(kernel).shape))
                    own = regs.get(path, np.zeros(()))
                else:
                    reg = reg.T  # [in, out]
                    own = regs.get(path, np.zeros(()))
                    own = own[:, None] if own.ndim and HYPER[case]["wg"] == "channel" else own
                assert_allclose(
                    np.broadcast_to(own, reg.shape), reg, err_msg=f"{path} {u}", **CLOSE
                )
                wanted = (
                    reg
                    if HYPER[case]["wg"] == "weight"
                    else reg.reshape(reg.shape if kernel.ndim == 2 else (1, 1, *reg.shape))
                )
                assert_allclose(added[names[j]]["kernel"], wanted * kernel, **CLOSE)
                applied = f"{case}/apply_reg/iter={iteration}/layer{j}"
                if f"{applied}/weight" in GOLDEN:
                    torch = lambda x: golden_data.to_torch(np.asarray(x))
                    assert_array_equal(torch(kernel), GOLDEN[f"{applied}/weight"])
                    after = GOLDEN[f"{applied}/grad_before"] + torch(added[names[j]]["kernel"])
                    assert_allclose(after, GOLDEN[f"{applied}/grad_after"], **CLOSE)
                ratio = GOLDEN[f"{case}/replay/hist_mag_ratio"][u][j]
                if path in regs:
                    assert_allclose(found[path].ratio, np.nan_to_num(ratio), **CLOSE)
                else:
                    assert np.isnan(ratio)
        assert finished
    finish = GOLDEN[f"{case}/replay/iter_update_finished"][-1]
    pick = GOLDEN[f"{case}/replay/iter_finish_pick"][-1]
    for j, path in enumerate(paths):
        if path in done:
            assert done[path] == finish[j]
            assert picked[path] == max(pick[j], 0)  # -1: never, which is from the start
            kept = np.asarray(growing.kept(state)[path])
            assert_array_equal(~kept, removed(case, j, params[names[j]]["kernel"]))
        else:
            kept = np.ones(params[names[j]]["kernel"].shape, bool)
            assert finish[j] == 0
            assert GOLDEN[f"{case}/pruned_idx/{j}"].size == 0
        if HYPER[case]["wg"] == "weight":
            assert_array_equal(golden_data.to_torch(kept), GOLDEN[f"{case}/mask/{j}"])
    assert max(done.values()) == GOLDEN[f"{case}/iter_stabilize"]
    assert_array_equal(GOLDEN[f"{case}/iterations"], np.arange(len(GOLDEN[f"{case}/state"])))
    assert_array_equal(GOLDEN[f"{case}/pr"], HYPER[case]["stage_pr"])


@functools.cache
def first_choice(layers):
    names = [layer.name.removesuffix("/kernel") for layer in layers]
    with jax.enable_x64(True):
        kernels = {
            name: jnp.asarray(golden_data.from_torch(GOLDEN[f"init/{name}.weight"]))
            for name in names
        }
        return jax.jit(lambda params: growing.pick(params, layers))(
            {k: {"kernel": x} for k, x in kernels.items()}
        )


@pytest.mark.parametrize("case", CASES)
def test_first_choice_of_the_original(case):
    names = GOLDEN[f"{case}/layer_names"]
    params = {
        name: {"kernel": golden_data.from_torch(GOLDEN[f"init/{name}.weight"])} for name in names
    }
    paths, layers = golden_layers(params, case)
    keep = first_choice(layers)
    axes = {"filter": (1, 2, 3), "channel": (0, 2, 3), "weight": ()}[HYPER[case]["wg"]]
    for j, path in enumerate(paths):
        weights = GOLDEN[f"init/{names[j]}.weight"]
        scores = np.abs(weights).mean(tuple(axis for axis in axes if axis < weights.ndim))
        kept = np.asarray(keep.get(path, np.ones(scores.shape)), bool)
        kept = golden_data.to_torch(kept) if HYPER[case]["wg"] == "weight" else kept
        assert set(np.flatnonzero(~kept)) == set(GOLDEN[f"{case}/L1_pruned_idx/{j}"])
        assert_allclose(scores[kept].mean(), GOLDEN[f"{case}/original_kept_w_mag"][j], **CLOSE)


# A training run of the original, from its initial weights to those before the removal


def largest(x, axes):
    """As jnp.max over axes of two entries. Its gradient compares these: that of jnp.max compares
    them with their maximum, which needs an input rounded once, and compiled quickly it is not.
    """
    for axis in sorted(axes, reverse=True):
        first, second = (jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in (0, 1))
        x = jnp.where(first >= second, first, second)
    return x


def forward(params, images):
    """(logits, [mean and variance of each batch norm as PyTorch's running statistics take
    them]).
    """
    x, statistics = images, []
    for (conv, norm), pool in zip(PAIRS, (largest, jnp.mean), strict=True):
        x = jax.lax.conv_general_dilated(
            x, params[conv]["weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        if "bias" in params[conv]:
            x = x + params[conv]["bias"][:, None, None]
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        count = x.size // x.shape[1]
        statistics += [mean.ravel(), var.ravel() * count / (count - 1)]
        scale, bias = (params[norm][k][:, None, None] for k in ("weight", "bias"))
        x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias)
        x = pool(x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2), (3, 5))
    logits = x.reshape(len(x), -1) @ params[CLASSIFIER]["weight"].T + params[CLASSIFIER]["bias"]
    return logits, statistics


STATISTICS = [f"{norm}.running_{name}" for _, norm in PAIRS for name in ("mean", "var")]


def test_the_network_is_that_of_its_hyper_parameters():
    net = HYPER["net"]
    kernels = [GOLDEN[f"init/{conv}.weight"].shape for conv, _ in PAIRS]
    assert [kernels[0][1], *(shape[0] for shape in kernels)] == net["c"]
    assert GOLDEN[f"init/{CLASSIFIER}.weight"].shape == (net["nc"], net["c"][-1] * net["fs"] ** 2)
    assert GOLDEN["data/x"].shape == (net["nb"], net["B"], net["c"][0], net["hw"], net["hw"])


@pytest.mark.parametrize("case", [*CASES[::4], *CASES[-1:]])
def test_training_ends_where_the_original_does(case):
    own, net = HYPER[case], HYPER["net"]
    group = own["wg"]
    params = {}
    for name in GOLDEN["param_names"]:
        module, leaf = str(name).rsplit(".", 1)
        params.setdefault(module, {})[leaf] = GOLDEN[f"init/{name}"]
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        # PyTorch's layouts, so groups are described by hand
        layers = []
        for name, ratio in zip(GOLDEN[f"{case}/layer_names"], own["stage_pr"]):
            path, axis = f"{name}/weight", {"filter": 0, "channel": 1, "weight": None}[group]
            shape = params[str(name)]["weight"].shape
            shape = shape if axis is None else (shape[axis],)
            part = (units.Part(path, None if axis is None else (axis,)),)
            number = masks.num_pruned(ratio, math.prod(shape))
            layers.append(units.Layer(path, shape, part, part, number))
        tx = optax.chain(
            growing.growing_l2(layers, **options(case)),
            optax.add_decayed_weights(own["weight_decay"]),
            optax.sgd(own["lr_prune"], own["momentum"]),
        )
        images, labels = jnp.asarray(GOLDEN["data/x"]), jnp.asarray(GOLDEN["data/y"])

        @jax.jit
        def step(carry):
            params, state, i, running = carry

            def loss(params):
                logits, statistics = forward(params, images[i % net["nb"]])
                chosen = labels[i % net["nb"]]
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, chosen
                ).mean(), statistics

            grads, statistics = jax.grad(loss, has_aux=True)(params)
            running = [0.9 * old + 0.1 * new for old, new in zip(running, statistics)]
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, i + 1, running

        begun = [np.full(width, float(i % 2)) for i, width in enumerate(np.repeat(net["c"][1:], 2))]
        carry = (params, jax.jit(tx.init)(params), 0, begun)
        while not growing.finished(carry[1]):
            carry = step(carry)
        assert carry[2] == GOLDEN[f"{case}/last_iter"] + 1
        for name in GOLDEN["param_names"]:
            module, leaf = str(name).rsplit(".", 1)
            assert_allclose(
                carry[0][module][leaf], GOLDEN[f"{case}/before_prune/{name}"], rtol=1e-7, atol=1e-9
            )
        for name, found in zip(STATISTICS, carry[3], strict=True):
            assert_allclose(found, GOLDEN[f"{case}/before_prune/{name}"], rtol=1e-7, atol=1e-9)


# Numbers and picks


def test_updates_are_counted_exactly_or_as_the_original_adds_up():
    for bits, increment, limit, reach, number in GOLDEN["accumulation_counts"]:
        own = dict(method="greg2" if reach else "greg1", mag_ratio_limit=1.0)
        own |= dict(granularity_pick=increment, upper_limit_pick=limit) if reach else {}
        own |= {} if reach else dict(granularity_prune=increment, upper_limit=limit)
        counts = lambda plan, reach=reach: plan.pick_updates if reach else plan.push_updates
        assert counts(growing.Penalty(**own, counting=f"float{bits:.0f}").plan()) == number
        steps = Fraction(str(limit)) / Fraction(str(increment))
        assert counts(growing.Penalty(**own).plan()) == (steps if reach else steps + 1)
    plan = growing.Penalty(method="greg2").plan()  # 1,000 of 1e-5, then 9,901 of 1e-4 from 1e-2
    assert (plan.pick_updates, plan.push_updates, plan.push_start) == (1000, 9901, 0.01)
    with tiny.complains("never gets to"):
        growing.Penalty(granularity_prune=1e-7, upper_limit=4.0, counting="float32").plan()


def test_number_of_groups_to_remove_is_that_of_the_original():
    ours = [
        [originals.num_pruned(ratio, int(n)) for n in GOLDEN["pick_count/n"]]
        for ratio in GOLDEN["pick_count/pr"]
    ]
    assert_array_equal(ours, GOLDEN["pick_count/count"])


@pytest.mark.parametrize("granularity", ["filter", "channel", "weight"])
def test_picks_of_the_original(granularity):
    scores = GOLDEN["pick_modes/score"].astype(np.float32)
    kernel = scores[:, None] if granularity == "channel" else -scores[None]
    params = {"a": {"kernel": kernel}, "b": {"kernel": 2 * kernel}}
    picked = lambda ratio, **own: growing.pick(
        params, growing.layers(params, {"a/kernel": ratio, "b/kernel": 0.0}, granularity), **own
    )
    gone = lambda ratio, **own: np.flatnonzero(~picked(ratio, **own)["a/kernel"])
    num_pruned = len(GOLDEN["pick_modes/min"])
    ratio = num_pruned / len(scores)
    assert set(gone(ratio)) == set(GOLDEN["pick_modes/min"])
    assert set(gone(ratio, pick="max")) == set(GOLDEN["pick_modes/max"])
    # the original returns as many, but of the wrong groups
    number = GOLDEN["pick_modes/auto_pr_minus_one"].size
    assert set(gone("gap")) == set(np.argsort(scores)[:number].tolist())
    draw = lambda seed: gone(ratio, pick="rand", key=jax.random.key(seed)).tolist()
    assert draw(0) == draw(0) != draw(1)
    assert len(draw(0)) == num_pruned
    assert picked(ratio)["b/kernel"].all()


@pytest.mark.parametrize(
    ("scores", "number"),
    [
        ([1, 2], 1),
        ([3, 1, 2, 9], 3),
        ([5, 5, 5], 1),
        ([0, 4, 8, 8.1], 1),
        ([0] + [50] * 48 + [100], 2),
    ],
)
def test_largest_gap(scores, number):
    assert growing.largest_gap(jnp.asarray(scores, float)) == number


def test_mistakes_of_single_functions_are_told():
    with pytest.raises(ValueError, match="there are 1 scores; a gap is between 2 or more"):
        growing.largest_gap(jnp.ones(1))


def test_a_layer_of_zeros_does_not_spoil_its_ratio():
    params = {"a": {"kernel": np.zeros((3, 2), np.float32)}}
    layers = growing.layers(params, {"a/kernel": 0.5})
    tx = tiny.compiled(growing.growing_l2(layers, update_every=1, mag_ratio_limit=10.0))
    with jax.debug_nans(True):
        _, state = tx.update(params, tx.init(params), params)
        assert growing.progress(state)["a/kernel"].ratio == 1
        keep = np.asarray(growing.kept(state)["a/kernel"])
        kernel = np.where(keep, 1.0, 1e-6) * np.ones((3, 2))
        params = {"a": {"kernel": kernel.astype(np.float32)}}
        _, state = tx.update(params, state, params)
    assert growing.progress(state)["a/kernel"].ratio > 1e4
    assert growing.progress(state)["a/kernel"].phase == growing.STABILIZE


@pytest.mark.parametrize("pick", ["min", "max", "rand"])
@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_nan_goes_first_inside_jit_and_is_named_outside(pick, granularity):
    params = {"a": {"kernel": jnp.arange(1.0, 9).reshape(2, 4).at[0, 2].set(jnp.nan)}}
    layers = growing.layers(params, {"a/kernel": 0.25}, granularity)
    options = dict(pick=pick, key=jax.random.key(0))
    keep = jax.jit(lambda params: growing.pick(params, layers, **options))(params)["a/kernel"]
    assert not keep.reshape(-1, 4)[0, 2]
    assert (~keep).sum() == 0.25 * keep.size
    with pytest.raises(ValueError, match="NaN") as error:
        growing.pick(params, layers, **options)
    assert "a/kernel" in str(error.value)


@pytest.mark.parametrize(
    ("scores", "number"),
    [
        ([1, np.nan, 2, 9], 1),
        ([np.nan, np.nan, 3, 4], 2),
        ([np.nan] * 3, 1),
        ([-np.inf, np.inf, np.inf, 1], 1),
    ],
)
def test_largest_gap_of_numbers_that_are_none(scores, number):
    assert jax.jit(growing.largest_gap)(jnp.asarray(scores)) == number
    if np.isnan(scores).any():
        with pytest.raises(ValueError, match="NaN"):
            growing.largest_gap(jnp.asarray(scores))


def test_largest_gap_leaves_out_the_ends():
    scores = np.r_[-1e6, np.arange(40), np.arange(60, 118), 1e6]  # 2 of 100 at either end
    assert growing.largest_gap(jnp.asarray(scores)) == 41


# Against a reference that stores every penalty


def reference(
    trajectory,
    ratios,
    axis,
    *,
    method,
    update_every,
    prune,
    pick,
    recover,
    upper,
    upper_pick,
    limit,
    fix,
):
    """Penalties [steps][layer] and phases: the rules word by word, one layer after the other."""
    names = list(ratios)
    score = lambda w: (
        np.abs(w)
        if axis is None
        else np.abs(w).mean(tuple(i for i in range(w.ndim) if i != axis % w.ndim))
    )
    lowest = lambda w, r: np.argsort(score(w), axis=None)[
        : min(math.ceil(r * score(w).size), score(w).size - 1)
    ]
    reg = {n: np.zeros(score(trajectory[0][n]).size) for n in names}
    gone = {n: lowest(trajectory[0][n], ratios[n]) for n in names}
    picked = dict.fromkeys(names, method != "greg2")
    done, ratio, rows = dict.fromkeys(names, False), {}, []
    for i, weights in enumerate(trajectory):
        if i % update_every == 0:
            for n in [n for n in names if not done[n]]:
                scores = score(weights[n]).ravel()
                if not picked[n]:
                    gone[n] = lowest(weights[n], ratios[n])
                new = np.delete(scores, gone[n]).mean() / scores[gone[n]].mean()
                ratio[n] = 0.9 * ratio[n] + 0.1 * new if n in ratio else new
                if method == "fixreg":
                    reg[n][gone[n]] = upper
                    done[n] = i > fix
                    continue
                if not picked[n]:
                    reg[n] += pick
                    picked[n] = reg[n].max() >= upper_pick
                else:
                    if method == "greg2":
                        reg[n][:] = np.where(
                            np.isin(np.arange(reg[n].size), gone[n]), reg[n], recover
                        )
                    reg[n][gone[n]] += prune
                enough = (
                    axis is not None
                    and (min(ratio.values()) if method == "greg1" else ratio[n]) >= limit
                )
                done[n] = picked[n] and (enough or reg[n].max() > upper)
        rows.append(
            (
                {n: reg[n].copy() for n in names},
                {n: 2 if done[n] else int(picked[n]) for n in names},
            )
        )
    return rows


PATHS = {"b/kernel": 0.3, "a/kernel": 0.5}
RULES = {  # increments are powers of two, on whose grid most limits lie
    "greg1": dict(method="greg1", update_every=3, prune=2.0**-4, upper=0.5, limit=1e6),
    "greg1, ratio": dict(method="greg1", update_every=1, prune=2.0**-4, upper=2.0, limit=3.0),
    "greg2": dict(method="greg2", update_every=2, prune=2.0**-3, upper=0.75, limit=1e6),
    "greg2, ratio": dict(method="greg2", update_every=1, prune=2.0**-4, upper=2.0, limit=3.0),
    "fixreg": dict(method="fixreg", update_every=4, prune=1.0, upper=0.7, limit=1.0),
}
REST = dict(pick=2.0**-6, recover=-(2.0**-5), upper_pick=2.0**-4, fix=12)
STEPS = 45


def ours(rule):
    own = {**RULES[rule], **REST}
    return dict(
        method=own["method"],
        update_every=own["update_every"],
        granularity_prune=own["prune"],
        granularity_pick=own["pick"],
        granularity_recover=own["recover"],
        upper_limit=own["upper"],
        upper_limit_pick=own["upper_pick"],
        mag_ratio_limit=own["limit"],
        fix_steps=own["fix"],
        stabilize_steps=3,
    )


def trajectory(seed):
    """Weights that drift; first slices on both axes are small and shrink, so that ratios rise."""
    rng = default_rng(seed)

    def drift(*shape):
        start = rng.normal(size=shape)
        shrink = np.linspace(0.85, 1, shape[-2])[:, None] * np.linspace(0.8, 1, shape[-1])
        return [
            (start * shrink ** (i + 15) * (1 + 0.02 * np.sin(i + start))).astype(np.float32)
            for i in range(STEPS)
        ]

    return [
        {"a": {"kernel": a}, "b": {"kernel": b}} for a, b in zip(drift(3, 3, 4, 6), drift(7, 5))
    ]


def run(tx, stacked):
    """State after every step."""

    def step(state, params):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return state, (growing.penalties(state), state, growing.finished(state))

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], stacked)), stacked)[1]


@pytest.mark.parametrize(
    ("rule", "granularity"),
    [
        *((rule, "filter") for rule in RULES),
        ("greg1", "weight"),
        ("fixreg", "weight"),
        ("greg2, ratio", "channel"),
    ],
)
def test_penalties_and_phases_follow_the_rules(rule, granularity):
    members = [trajectory(seed) for seed in (0, 1)]
    layers = growing.layers(members[0][0], PATHS, granularity)
    tx = growing.growing_l2(layers, **ours(rule))
    stacked = jax.tree.map(
        lambda *x: np.stack(x), *(jax.tree.map(lambda *x: np.stack(x), *own) for own in members)
    )
    if granularity == "filter":  # the members of a sweep side by side
        regs, states, finished = jax.jit(jax.vmap(lambda x: run(tx, x)))(stacked)
    else:
        first = jax.jit(lambda x: run(tx, x))
        regs, states, finished = jax.tree.map(
            lambda *x: np.stack(x),
            *(first(jax.tree.map(lambda x, m=m: x[m], stacked)) for m in range(2)),
        )
    axis = {"filter": -1, "channel": -2, "weight": None}[granularity]
    for m, own in enumerate(members):
        flat = [{path: weights[path[0]]["kernel"] for path in PATHS} for weights in own]
        rows = reference(flat, PATHS, axis, **RULES[rule], **REST)
        phases = np.array([[phase[path] for path in sorted(PATHS)] for _, phase in rows])
        assert_array_equal(states.progress.phase[m], phases)
        for path in PATHS:
            wanted = np.stack([reg[path] for reg, _ in rows])
            assert_array_equal(
                np.asarray(regs[path][m]).reshape(STEPS, -1), wanted.astype(np.float32)
            )
        resting = np.cumsum((phases == growing.STABILIZE).all(1))
        assert (phases[-1] == growing.STABILIZE).all(), "the rule never ends; choose other numbers"
        assert_array_equal(finished[m], resting > 3)


# Layers in turn

IN_TURN = ("stem", "block", "head", "fc")  # not the order of their names


def kernels_of_ratio(ratios):
    """Kernels of two filters, the first of which is 1 and the second so many times larger; by
    layer.
    """
    return {
        name: {"kernel": jnp.stack([jnp.ones(1), ratio * jnp.ones(1)], -1)}
        for name, ratio in ratios.items()
    }


def walk(ratios, limit, most_updates):
    """At which update each layer is done: the original's loop over the layers, as its code runs."""
    smoothed, done = {}, {}
    for update, given in enumerate(ratios, 1):
        for name, new in given.items():
            if name in done:
                continue
            if name in smoothed:
                smoothed[name] = smoothed[name] * 0.9 + new * 0.1
            else:
                smoothed[name] = new
            pushed_enough = True
            for other in smoothed:
                if smoothed[other] < limit:
                    pushed_enough = False
            if pushed_enough or update >= most_updates:
                done[name] = update
    return done


def done_at(tx, ratios):
    """The same of our transformation."""
    step = jax.jit(lambda state, params: tx.update(params, state, params)[1])
    state, found = tx.init(kernels_of_ratio(ratios[0])), {}
    for i, own in enumerate(ratios):
        state = step(state, kernels_of_ratio(own))
        for name, progress in growing.progress(state).items():
            if progress.phase == growing.STABILIZE:
                found.setdefault(name.removesuffix("/kernel"), i)
    return found


@pytest.mark.parametrize(("order", "ends"), [("ab", {"a": 6, "b": 3}), ("ba", {"a": 3, "b": 6})])
def test_layers_before_the_last_to_get_there_end_an_update_later(order, ends):
    rows = [dict.fromkeys("ab", 1.001 if step < 3 else 3.0) for step in range(9)]
    layers = growing.layers(kernels_of_ratio(rows[0]), {f"{name}/kernel": 0.5 for name in order})
    tx = growing.growing_l2(layers, method="greg1", update_every=3, mag_ratio_limit=1.05)
    assert done_at(tx, rows) == ends


PUSHED = 5  # updates until the penalty of a layer is above its limit
TURN_LAYERS = growing.layers(
    kernels_of_ratio(dict.fromkeys(IN_TURN, 2.0)), {f"{name}/kernel": 0.5 for name in IN_TURN}
)
TURN = growing.growing_l2(
    TURN_LAYERS,
    update_every=1,
    granularity_prune=1.0,
    upper_limit=PUSHED - 0.5,
    mag_ratio_limit=2.0417,
)


@jax.jit
def turn_phases(ratios):
    """Phases [updates, layers] for ratios [updates, layers], both in the order of IN_TURN."""
    kernels = jax.vmap(lambda row: kernels_of_ratio(dict(zip(IN_TURN, row))))(ratios)
    _, states, _ = run(TURN, kernels)
    by_name = {name: states.progress.phase[:, i] for i, name in enumerate(sorted(IN_TURN))}
    return jnp.stack([by_name[name] for name in IN_TURN], 1)


VALUES = st.sampled_from([1.001, 1.5, 2.0, 2.1, 3.0, 30.0])


@hypothesis.given(st.lists(st.tuples(*[VALUES] * len(IN_TURN)), min_size=7, max_size=7))
@hypothesis.settings(max_examples=60)
def test_layers_are_judged_in_turn_as_in_the_original(rows):
    wanted = walk([dict(zip(IN_TURN, row)) for row in rows], 2.0417, PUSHED)
    phases = np.asarray(turn_phases(jnp.asarray(rows)))
    ends = 1 + (phases == growing.STABILIZE).argmax(0)
    assert dict(zip(IN_TURN, ends.tolist())) == wanted


# What the penalty acts on


class Residual(nn.Module):
    """A residual sum, a depthwise convolution and a flattened map that a dense layer reads."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        y = nn.relu(
            nn.BatchNorm(use_running_average=True, name="bn")(nn.Conv(4, (3, 3), name="inner")(x))
        )
        y = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(y)
        x = nn.relu(x + nn.Conv(6, (1, 1), name="outer")(y))
        return nn.Dense(3, name="fc")(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def residual():
    images = jnp.ones((2, 4, 4, 2))
    created = jax.jit(Residual().init)(jax.random.key(0), images)
    variables = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), created)
    return variables, groups.trace(Residual().apply, variables, images)


def test_coupled_groups_are_penalised_as_a_whole(residual):
    variables, channels = residual
    assert sorted(channels.sizes.values()) == [4, 6]
    params = variables["params"]
    layers = growing.coupled(params, channels, dict.fromkeys(channels.names, 0.5))
    tx = growing.growing_l2(layers, method="fixreg", upper_limit=0.25)
    added, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), jax.jit(tx.init)(params), params
    )
    reg = growing.penalties(state)
    wanted = jax.tree.map(np.zeros_like, params)
    for name, group in channels.groups.items():
        # what masking a channel sets to zero belongs to it
        mask = lambda keep, name=name: groups.mask(variables, channels, {name: keep})["params"]
        masked = jax.jit(jax.vmap(mask))(~np.eye(group.size, dtype=bool))
        lost = jax.tree.map(lambda w, m: w - np.asarray(m), params, masked)
        penalty = np.asarray(reg[name])
        wanted = jax.tree.map(lambda t, x, r=penalty: t + np.tensordot(r, x, 1), wanted, lost)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-7), added, wanted)
    assert any(x.any() for x in jax.tree.leaves(added))


def test_scores_of_coupled_groups_are_means_over_their_producers(residual):
    variables, channels = residual
    params = variables["params"]
    name = next(name for name, size in channels.sizes.items() if size == 6)
    keep = growing.pick(params, growing.coupled(params, channels, {name: 0.5}))[name]
    stem, outer = (np.abs(params[name]["kernel"]) for name in ("stem", "outer"))
    sums, entries = stem.sum((0, 1, 2)) + outer.sum((0, 1, 2)), (stem.size + outer.size) / 6
    assert set(np.flatnonzero(~np.asarray(keep))) == set(np.argsort(sums / entries)[:3])


def einsum_network(v, x):
    return jnp.tanh(jnp.einsum("oi,bi->bo", v["enc"]["w_i"], x)) @ v["out"]["w"]


EINSUM = dict(enc=dict(w_i=np.ones((8, 5), np.float32)), out=dict(w=np.ones((8, 3), np.float32)))


def test_roles_of_coupled_groups_do_not_depend_on_names():
    channels = groups.trace(einsum_network, EINSUM, jnp.ones((4, 5)))
    (name,) = channels.names
    (layer,) = growing.coupled(EINSUM, channels, {name: 0.5})
    with pytest.deprecated_call():  # the order of version 0.1
        assert growing.coupled(channels, EINSUM, {name: 0.5})[0].name == layer.name
    made, read = units.Part("enc/w_i", (0,)), units.Part("out/w", (0,))
    assert layer.scored == (made,)
    assert layer.parts == (made, read)


CONV = {
    "conv": {"weight": jnp.ones((16, 3, 5, 5))}
}  # [out, in, height, width], as in PyTorch and Equinox
CONVOLVE = lambda v, x: jax.lax.conv_general_dilated(x, v["conv"]["weight"], (1, 1), "SAME")


@pytest.mark.parametrize(("granularity", "size"), [("filter", 16), ("channel", 3)])
def test_layouts_are_told_by_trace_or_option_and_never_guessed(granularity, size):
    channels = groups.trace(CONVOLVE, CONV, jnp.ones((1, 3, 8, 8)))
    for known in (dict(channels=channels), dict(layout="out_in")):
        (layer,) = growing.layers(CONV, {"conv/weight": 0.5}, granularity, **known)
        assert layer.shape == (size,)
    with pytest.raises(ValueError, match="layout="):
        growing.layers(CONV, {"conv/weight": 0.5}, granularity)
    assert growing.layers(CONV, {"conv/weight": 0.5}, "weight")[0].shape == (16, 3, 5, 5)


def test_heads_of_an_attention_are_no_filters():
    params = {"query": {"kernel": jnp.ones((6, 2, 3))}}
    project = lambda v, x: jnp.einsum("bi,ihd->bhd", x, v["query"]["kernel"])
    channels = groups.trace(project, params, jnp.ones((4, 6)))
    with pytest.raises(ValueError, match="one axis"):
        growing.layers(params, {"query/kernel": 0.5}, channels=channels)
    assert growing.layers(params, {"query/kernel": 0.5}, "channel", channels=channels)[0].shape == (
        6,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_updates_keep_their_type(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = {"kernel": jnp.asarray(np.arange(1, 13).reshape(3, 4) / 8, dtype)}
        layers = growing.layers(params, {"kernel": 0.5}, "weight")
        tx = tiny.compiled(growing.growing_l2(layers, method="fixreg", upper_limit=0.5))
        added, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        assert added["kernel"].dtype == dtype
        wanted = 1 + np.where(np.arange(12).reshape(3, 4) < 6, 0.5, 0) * np.asarray(
            params["kernel"], float
        )
        assert_array_equal(np.asarray(added["kernel"], float), wanted)
        assert growing.progress(state)["kernel"].score_pruned == np.arange(1, 7).mean() / 8


def test_layers_that_lose_nothing_are_done_at_once():
    params = trajectory(0)[0]
    single = {"kernel": jnp.ones((3, 3, 1, 5))}
    assert (
        growing.layers(single, {"kernel": 1.0}, "channel")[0].num_pruned == 0
    )  # depthwise: one input slice
    assert growing.layers(single, {"kernel": "gap"}, "channel")[0].num_pruned == 0
    layers = growing.layers(params, dict.fromkeys(PATHS, 0.0))
    tx = tiny.compiled(growing.growing_l2(layers, stabilize_steps=2))
    state, seen = tx.init(params), []
    for _ in range(4):
        added, state = tx.update(params, state, params)
        seen.append(bool(growing.finished(state)))
    assert seen == [False, False, True, True]
    assert growing.kept(state) == growing.penalties(state) == growing.progress(state) == {}
    jax.tree.map(assert_array_equal, added, params)


@pytest.mark.parametrize("method", ["greg1", "greg2"])
def test_given_picks_replace_those_by_score(method):
    params = trajectory(0)[0]
    layers = growing.layers(params, PATHS)
    given = {"b/kernel": np.array([True, False, True, True, False])}
    rates = dict(granularity_pick=1.0, upper_limit_pick=1.0)
    tx = tiny.compiled(growing.growing_l2(layers, keep=given, method=method, **rates))
    _, state = tx.update(params, tx.init(params), params)
    assert_array_equal(growing.kept(state)["b/kernel"], given["b/kernel"])
    assert_array_equal(growing.kept(state)["a/kernel"], growing.pick(params, layers)["a/kernel"])
    whole = growing.growing_l2(layers, keep={"a/kernel": np.ones(6, bool)}, method=method).init(
        params
    )
    assert list(growing.kept(whole)) == ["b/kernel"]


def test_random_picks_are_those_of_the_key():
    params, key = trajectory(0)[0], jax.random.key(3)
    layers = growing.layers(params, PATHS, "weight")
    tx = growing.growing_l2(layers, pick="rand", key=key)
    jax.tree.map(
        assert_array_equal,
        growing.kept(tx.init(params)),
        growing.pick(params, layers, pick="rand", key=key),
    )


def test_a_stage_runs_to_its_end_inside_one_program():
    """A linear model grows sparse without the host; its state can be donated."""
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (64, 8))
    targets = inputs @ (jnp.zeros((8, 2)).at[:3].set(1.0))
    params = {"kernel": 0.3 + jax.random.uniform(key, (8, 2)) * jnp.linspace(2, 0, 8)[:, None]}
    loss = lambda p: jnp.mean((inputs @ p["kernel"] - targets) ** 2)
    layers = growing.layers(params, {"kernel": 5 / 8}, "channel")
    options = dict(
        granularity_pick=0.01, upper_limit_pick=0.2, granularity_prune=0.1, upper_limit=50.0
    )
    options |= dict(granularity_recover=0.0, mag_ratio_limit=300.0, stabilize_steps=20)
    tx = optax.chain(growing.growing_l2(layers, method="greg2", **options), optax.sgd(0.05))

    def step(carry):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    end = jax.jit(
        lambda c: jax.lax.while_loop(lambda c: ~growing.finished(c[1]), step, c), donate_argnums=0
    )
    grown, state = end((jax.tree.map(jnp.copy, params), tx.init(params)))
    progress = growing.progress(state)["kernel"]
    assert progress.ratio >= 300
    assert progress.reg_pruned < 50  # the ratio ended it
    assert_array_equal(growing.kept(state)["kernel"], np.arange(8) < 3)
    small = jnp.where(growing.kept(state)["kernel"][:, None], grown["kernel"], 0)
    assert loss({"kernel": small}) < loss(grown) + 1e-4 < 1e-3


# On several devices

FILTERS = default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
OF_DEVICES = {  # (granularity, ratio, options)
    "at once": ("filter", "gap", dict(method="greg1")),
    "later": ("weight", "gap", dict(method="greg2")),
}


def transformations(params):
    rates = dict(
        update_every=2,
        granularity_prune=0.5,
        upper_limit=1.5,
        granularity_pick=0.1,
        upper_limit_pick=0.2,
    )
    return {
        name: growing.growing_l2(
            growing.layers(params, {"a/kernel": ratio}, granularity), **rates, **options
        )
        for name, (granularity, ratio, options) in OF_DEVICES.items()
    }


def grown(params):
    """What is kept, progress, and the params, after nine steps of each transformation."""
    found = {}
    for name, tx in transformations(params).items():

        def step(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (
                optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates)),
                state,
            ), None

        (last, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=9)
        found[name] = (last, growing.kept(state), growing.progress(state))
    return found


@pytest.mark.usefixtures("eight_devices")
def test_growth_on_meshes():
    """Each device has a network of its own, or all share the filters of one."""
    tiny.check_on_meshes(lambda filters: grown({"a": {"kernel": filters.T}}), FILTERS)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.fc = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)


@pytest.mark.parametrize("path", ["hidden/kernel", "hidden/kernel/value"])
def test_nnx_optimizer_trains_and_tells(path):
    network = Pair(nnx.Rngs(0))
    params = nnx.state(network, nnx.Param)
    layers = growing.layers(params, {path: 0.5})
    grow = growing.growing_l2(
        layers, update_every=1, granularity_prune=1.0, upper_limit=1.5, stabilize_steps=0
    )
    optimizer = nnx.Optimizer(network, optax.chain(grow, optax.sgd(0.5)), wrt=nnx.Param)
    before = np.abs(np.asarray(network.hidden.kernel[...])).mean(0)
    unmoved = np.asarray(network.fc.kernel[...])
    for _ in range(2):
        assert not growing.finished(optimizer.opt_state)
        optimizer.update(network, jax.tree.map(jnp.zeros_like, params))
    assert growing.finished(optimizer.opt_state)
    keep = np.asarray(growing.kept(optimizer.opt_state)[path])
    assert set(np.flatnonzero(~keep)) == set(np.argsort(before)[:4])
    assert growing.progress(optimizer.opt_state)[path].updates == 2
    assert_array_equal(growing.penalties(optimizer.opt_state)[path], np.where(keep, 0, 2))
    after = np.abs(np.asarray(network.hidden.kernel[...])).mean(0)
    assert_allclose(after[~keep], 0, atol=1e-7)  # half of it, then all
    assert_array_equal(after[keep], before[keep])
    assert_array_equal(network.fc.kernel[...], unmoved)


# Misuse

W = {"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}}
OTHER = {"conv": {"kernel": jnp.ones((3, 3, 2, 5))}}
LAYERS = growing.layers(W, {"conv/kernel": 0.5})
AUTO = growing.layers(W, {"conv/kernel": "gap"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: growing.layers(W, {"conv/kernle": 0.5}), "Did you mean 'conv/kernel'"),
        (lambda: growing.layers(W, {}), "at least one layer"),
        (lambda: growing.layers(W, {"conv/kernel": 1.5}), "is 1.5; allowed"),
        (lambda: growing.layers(W, {"conv/kernel": float("nan")}), "is nan; allowed"),
        (lambda: growing.layers(W, {"conv/bias": 0.5}), "has shape"),
        (lambda: growing.layers(W, {"conv/kernel": 0.5}, "filters"), "Did you mean 'filter'"),
        (lambda: growing.pick(OTHER, LAYERS), "made for another array"),
        (lambda: growing.pick({"conv": {"bias": jnp.ones(4)}}, LAYERS), "allowed: conv/bias"),
        (lambda: growing.pick(W, LAYERS, pick="rand"), "needs a key"),
        (lambda: growing.pick(W, LAYERS, pick="least"), "allowed: 'min'"),
        (lambda: growing.pick(W, AUTO, pick="max"), "'min' to cut"),
        (lambda: growing.growing_l2(LAYERS, pick="rand"), "needs a key"),
        (lambda: growing.growing_l2(LAYERS, method="greg3"), "Did you mean 'greg"),
        (lambda: growing.growing_l2(LAYERS, granularity=1e-3), "no field 'granularity'"),
        (lambda: growing.growing_l2(LAYERS, granularity_prune=0.0), "allowed: float > 0"),
        (lambda: growing.growing_l2(LAYERS + LAYERS), "same name"),
        (lambda: growing.growing_l2(LAYERS, keep={"conv": np.ones(4, bool)}), "keep is 'conv'"),
        (
            lambda: growing.growing_l2(LAYERS, keep={"conv/kernel": np.ones(3, bool)}),
            r"allowed: bool \(4,\)",
        ),
        (
            lambda: growing.growing_l2(LAYERS, keep={"conv/kernel": np.zeros(4, bool)}),
            "keeps one or more",
        ),
        (lambda: growing.growing_l2(LAYERS).init(OTHER), "made for another array"),
        (
            lambda: growing.growing_l2(LAYERS).update(W, growing.growing_l2(LAYERS).init(W)),
            r"update\(grads, state, params\)",
        ),
        (lambda: growing.finished(optax.sgd(0.1).init(W)), "holds 0 states"),
    ],
)
def test_misuse_says_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_coupled_misuse(residual):
    variables, channels = residual
    name = channels.names[0]
    with pytest.raises(ValueError, match="ratios is 'stm'; allowed"):
        growing.coupled(variables, channels, {"stm": 0.5})
    with pytest.raises(ValueError, match="has no kernel among the params"):
        growing.coupled(variables["batch_stats"], channels, {name: 0.5})
