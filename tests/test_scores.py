"""Importance measures: against the original's numbers, slow references, and the properties each
promises.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import golden_data
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import groups, losses, models, saliency, scores, trees
from sparsity_jax.groups import Member

FILE = "06_filter_importance.npz"
GOLDEN = golden_data.load(FILE)
NETS = golden_data.parts(FILE, r"(\w+)/param_names")
HYPER = golden_data.hyper(FILE)


@jax.jit
def of_one_batch(params, grads):
    """Statistics from a single gradient."""
    importance = saliency.of_weights(params, grads)
    g2 = jax.tree.map(lambda g: jnp.square(trees.widen(g)), grads)
    return scores.Statistics(w=params, g=grads, g2=g2, saliency=importance)


def batch_sizes():
    """Of the loader's batches, until `num_stop` samples are reached."""
    sizes = [HYPER["batch_size"]] * HYPER["batches"]
    sizes[1] = HYPER["second_batch_is_truncated_to"]
    reached = np.cumsum(sizes) >= HYPER["num_stop"]
    return tuple(sizes[: np.argmax(reached) + 1])


SIZES = batch_sizes()
HESSIAN = f"hess_grad_T{HYPER['grad_preserve_T']}"
TEMPERATURES = {"temperature": HYPER["T"], "grasp_temperature": HYPER["grasp_T"]}
nets = pytest.mark.parametrize("net", sorted(NETS))
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def tracker(**options):
    """(init(params), update(state, params, grads)) of the average alone."""
    tx = saliency.track(optax.set_to_zero(), **options)
    return tx.init, lambda state, params, grads: tx.update(grads, state, params)[1]


class Group(NamedTuple):
    members: tuple[Member, ...]

    @property
    def size(self):
        return len(self.members[0].index)


def member(path, axis, size, role, term=""):
    return Member(path, axis, np.arange(size)[:, None], role, term=term)


# The original's networks --------------------------------------------------------------------------


class Original(NamedTuple):
    """One of its networks in our layouts, float64 NumPy arrays.

    data: (images, labels) of the examples used. groups: one per convolution, with its norm, in its
    order. paths: its parameter names to ours. stored(topic): the arrays of `topic` by parameter, as
    a tree. golden: the file.
    """

    params: dict
    batch_stats: dict
    data: tuple
    groups: list
    paths: dict
    stored: Callable
    golden: dict


def original(net):
    names = [str(name) for name in GOLDEN[f"{net}/param_names"]]
    shapes = [GOLDEN[f"{net}/params/{name}"].shape for name in names]
    paths = golden_data.paths(names, shapes)
    norms = golden_data.batch_norms(names, shapes)
    modules = golden_data.module_paths(names, shapes)
    stats = {}
    for module, path in modules.items():
        if path in norms:
            stats[f"{path}/mean"] = GOLDEN[f"{net}/buffers/{module}.running_mean"]
            stats[f"{path}/var"] = GOLDEN[f"{net}/buffers/{module}.running_var"]

    def stored(topic):
        found = {name: GOLDEN.get(f"{net}/{topic}/{name}") for name in names}
        arrays = {
            paths[name]: golden_data.from_torch(x) for name, x in found.items() if x is not None
        }
        return {"params": golden_data.nest(arrays)}

    groups = []
    for kernel, scale, bias in zip(names[:-2:3], names[1:-2:3], names[2:-2:3]):
        size = len(GOLDEN[f"{net}/params/{scale}"])
        terms = {scale: "scale", bias: "shift"}
        norm = [
            member(f"params/{paths[name]}", 0, size, "other", term) for name, term in terms.items()
        ]
        groups.append(Group((member(f"params/{paths[kernel]}", 3, size, "producer"), *norm)))
    batches = range(len(SIZES))
    x = np.concatenate([GOLDEN[f"{net}/x"][i][: SIZES[i]] for i in batches]).transpose(0, 2, 3, 1)
    y = np.concatenate([GOLDEN[f"{net}/y"][i][: SIZES[i]] for i in batches])
    return Original(
        stored("params"), golden_data.nest(stats), (x, y), groups, paths, stored, GOLDEN
    )


def model(net):
    names = [str(name) for name in GOLDEN[f"{net}/param_names"]]
    options = golden_data.architecture(
        names, [GOLDEN[f"{net}/params/{name}"].shape for name in names]
    )
    return models.build(
        num_classes=num_classes(net), dtype="float64", param_dtype="float64", **options
    )


def num_classes(net):
    return GOLDEN[f"{net}/logits_eval"].shape[-1]


def inference_loss(net, batch_stats):
    apply = model(net).apply

    def loss(params, batch, temperature):
        logits = apply({**params, "batch_stats": batch_stats}, batch[0])
        return losses.cross_entropy(logits, batch[1], temperature=temperature).mean()

    return loss


@functools.cache
def collector(net):
    """`scores.gather` of all statistics, compiled once for a network."""
    needs = scores.required(*(set(scores.MEASURES) - {"biased_loss_tracked"}))
    return scores.gather(
        inference_loss(net, original(net).batch_stats),
        needs,
        SIZES[0],
        on_host=True,
        **TEMPERATURES,
    )


@functools.cache
def gathered(net, factor=1.0):
    """All statistics of the original's loader for logits of `factor` times the size: float64."""
    with jax.enable_x64(True):
        it, collect = original(net), collector(net)
        params = trees.map_named(
            lambda path, leaf: leaf * (factor if "/fc/" in path else 1.0), it.params
        )
        chosen = scores.class_balanced(it.data[1], num_classes(net), HYPER["num_stop"])
        balanced = jax.tree.map(lambda x: x[chosen], it.data)
        init = it.stored("params_init")
        # the second batch of the loader is shorter: parts count by their size
        ends = (0, SIZES[0], SIZES[0] + SIZES[1], sum(SIZES))
        parts = [
            collect(
                params,
                jax.tree.map(lambda x, a=a, b=b: x[a:b], it.data),
                balanced=balanced,
                init=init,
            )
            for a, b in itertools.pairwise(ends)
        ]
        mean = lambda *xs: sum(
            share * np.asarray(x) for share, x in zip(np.diff(ends) / ends[-1], xs)
        )
        means = {
            name: jax.tree.map(mean, *(getattr(part, name) for part in parts))
            for name in ("g", "g2")
        }
        return parts[0]._replace(**means)


def filters(it, prefix, i):
    """Stored scores of the filters of convolution i."""
    return it.golden[f"{prefix}/{i:02d}"]


def check_all(it, net, statistics, *cases):
    """Scores of every convolution against the original's; cases: (topic, measure, options), all in
    one program.
    """
    score = jax.jit(
        lambda s: [
            [scores.score(name, s, x, **options) for x in it.groups] for _, name, options in cases
        ]
    )
    for (topic, _, _), found in zip(cases, score(statistics)):
        for i, mine in enumerate(found):
            assert_allclose(mine, filters(it, f"{net}/{topic}", i), **TIGHT, err_msg=f"{topic} {i}")


@nets
def test_networks_and_gathered_statistics_are_the_originals(net):
    with jax.enable_x64(True):
        it, statistics = original(net), gathered(net)
        assert len(it.groups) == HYPER[f"{net}_n_layers"]
        logits = jax.jit(model(net).apply)(
            {**it.params, "batch_stats": it.batch_stats}, it.data[0][: SIZES[0]]
        )
        assert_allclose(logits, it.golden[f"{net}/logits_eval"], **TIGHT)
        for field, topic in (("g", "grad"), ("hg_preserve", HESSIAN)):
            found, expected = getattr(statistics, field), it.stored(topic)
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            jax.tree.map(lambda x, y: assert_allclose(x, y, **TIGHT), found, expected)


@nets
def test_every_measure_gives_the_originals_scores(net):
    it = original(net)
    with jax.enable_x64(True):
        statistics = gathered(net)
        plain = sorted(set(scores.MEASURES) - {"biased_loss_tracked", "fpgm", "lamp", "random"})
        cases = [
            *((name, name, {}) for name in plain),
            ("biased_loss_init", "biased_loss", {"use_init": True}),
            ("biased_loss", "loss_based", {"use_l2": True}),
        ]
        check_all(it, net, statistics, *cases)
        swapped = statistics._replace(
            hg_grasp=statistics.hg_preserve, hg_preserve=statistics.hg_grasp
        )
        check_all(
            it, net, swapped, ("grasp_T1", "grasp", {}), ("grad_preserve_Tg", "grad_preserve", {})
        )


@nets
def test_larger_logits_undo_the_temperature(net):
    with jax.enable_x64(True):
        check_all(
            original(net), net, gathered(net, HYPER["T"]), ("loss_based_T1", "loss_based", {})
        )


@nets
def test_stored_gradients_give_the_originals_scores(net):
    with jax.enable_x64(True):
        it = original(net)
        params, grads, init = it.params, it.stored("grad"), it.stored("params_init")
        stored = scores.Statistics(w=params, g=grads, hg_preserve=it.stored(HESSIAN))
        check_all(
            it,
            net,
            stored,
            *((x, x, {}) for x in ("loss_based", "biased_loss", "tfo", "grad_preserve")),
        )
        one = params_of(params, it.stored("train_grad"))
        unsquared = of_one_batch(*one)._replace(g2=one[1], w0=init)
        cases = [
            (f"nograd_{x}", x, {}) for x in ("loss_based", "biased_loss", "tfo", "fisher", "nvidia")
        ]
        check_all(
            it,
            net,
            unsquared,
            *cases,
            ("nograd_biased_loss_init", "biased_loss", {"use_init": True}),
        )
        squared = of_one_batch(*one)
        jax.tree.map(assert_array_equal, squared.g2, jax.tree.map(np.square, one[1]))
        full = of_one_batch(params, grads)
        for topic, statistics in (
            ("biased_loss_tracked", full),
            ("nograd_biased_loss_tracked", unsquared),
        ):
            leaves = trees.named_leaves(statistics.saliency)
            for i, group in enumerate(it.groups):
                found = golden_data.to_torch(leaves[group.members[0].path])
                expected = filters(it, f"{net}/{topic}", i)
                assert_allclose(found.reshape(expected.shape), expected, **TIGHT)


def test_depthwise_filters_share_the_score_of_the_pointwise_ones_before():
    net = next(net for net in NETS if golden_data.is_mobilenet(GOLDEN[f"{net}/param_names"]))
    with jax.enable_x64(True):
        it = original(net)
        pointwise, depthwise = it.groups[2], it.groups[3]  # five filters each
        assert [group.members[0].path for group in (pointwise, depthwise)] == [
            "params/block0/pointwise/kernel",
            "params/block1/depthwise/kernel",
        ]
        coupled = Group(
            (*(one._replace(role="other") for one in depthwise.members), *pointwise.members)
        )
        statistics = scores.Statistics(w=it.params)
        for name, options in (("l1", {}), ("bn", {"skip": r".*/block\d+/bn1/.*"})):
            found = scores.score(name, statistics, coupled, **options)
            assert_allclose(found, filters(it, f"{net}/{name}", 2), **TIGHT)


def params_of(params, grads):
    """(params, grads) without the arrays that have no gradient stored."""
    named = trees.named_leaves(params)
    return golden_data.nest({path: named[path] for path in trees.named_leaves(grads)}), grads


# Tracking -----------------------------------------------------------------------------------------


def replay(net, it):
    names = [name for name in it.paths if f"{net}/tracked_replay/weight/{name}" in it.golden]
    assert len(names) == len(it.groups)

    def tree(kind):
        arrays = {name: it.golden[f"{net}/tracked_replay/{kind}/{name}"] for name in names}
        turned = {
            it.paths[n]: np.stack([golden_data.from_torch(step) for step in x])
            for n, x in arrays.items()
        }
        return {"params": golden_data.nest(turned)}

    return tree("weight"), tree("grad")


@nets
def test_tracked_scores_are_the_originals(net):
    with jax.enable_x64(True):
        it = original(net)
        weights, grads = replay(net, it)

        def run(statistic):
            init, update = tracker(alpha=HYPER["ema_alpha"], statistic=statistic)
            step = lambda state, pair: (update(state, *pair), None)
            first = jax.tree.map(lambda x: x[0], weights)
            return jax.jit(lambda w, g: jax.lax.scan(step, init(first), (w, g))[0])(weights, grads)

        last, init = jax.tree.map(lambda x: x[-1], weights), it.stored("params_init")
        for topic, start in (("tracked_l2", None), ("tracked_l2_init", init)):
            state = run(functools.partial(saliency.of_weights, use_l2=True, init=start))
            assert state.step == HYPER["track_batches"]
            statistics = scores.Statistics(w=last, saliency=state.saliency)
            options = {"use_l2": True, "use_init": start is not None}
            check_all(it, net, statistics, (topic, "biased_loss_tracked", options))
        for name in ("loss_based", "tfo"):
            own = lambda w, g, name=name: [
                scores.score(name, of_one_batch(w, g), x) for x in it.groups
            ]
            for i, found in enumerate(run(own).saliency):
                assert_allclose(found, filters(it, f"{net}/tracked_{name}", i), **TIGHT)


def test_an_epoch_of_training_tracks_what_the_original_tracks():
    net = NETS[0]
    with jax.enable_x64(True):
        it, own = original(net), model(net)
        sgd = HYPER["tracking_sgd"]
        steps = optax.chain(
            optax.add_decayed_weights(sgd["weight_decay"]),
            optax.sgd(sgd["lr"], momentum=sgd["momentum"]),
        )
        statistic = functools.partial(saliency.of_weights, use_l2=True)
        options = dict(alpha=HYPER["ema_alpha"], track_batches=HYPER["track_batches"])
        tx = saliency.track(steps, steps_per_epoch=HYPER["batches"], statistic=statistic, **options)

        @jax.jit
        def step(params, batch_stats, opt_state, batch):
            def loss(params):
                logits, updated = own.apply_train({**params, "batch_stats": batch_stats}, batch[0])
                return losses.cross_entropy(
                    logits, batch[1], temperature=HYPER["T"]
                ).mean(), updated

            grads, updated = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), updated, opt_state

        params, batch_stats = jax.tree.map(jnp.asarray, (it.params, it.batch_stats))
        opt_state = tx.init(params)
        for i in range(HYPER["batches"]):
            length = HYPER["second_batch_is_truncated_to"] if i == 1 else HYPER["batch_size"]
            batch = (
                it.golden[f"{net}/x"][i][:length].transpose(0, 2, 3, 1),
                it.golden[f"{net}/y"][i][:length],
            )
            params, batch_stats, opt_state = step(params, batch_stats, opt_state, batch)
        statistics = scores.Statistics(w=params, saliency=optax.tree.get(opt_state, "saliency"))
        check_all(it, net, statistics, ("tracked_l2", "biased_loss_tracked", {"use_l2": True}))


def toy(dtype=jnp.float32, examples=23):
    """(loss, params, data) of a dense network of widths 3, 4, 3 classes; labels 0, 1, 2, 0, ..."""
    rng = default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = {"dense1": {"kernel": draw(3, 4), "bias": draw(4)}, "fc": {"kernel": draw(4, 3)}}
    data = {"x": draw(examples, 3), "y": np.arange(examples) % 3}

    def loss(params, batch, temperature):
        hidden = jnp.tanh(batch["x"] @ params["dense1"]["kernel"] + params["dense1"]["bias"])
        return losses.cross_entropy(
            hidden @ params["fc"]["kernel"], batch["y"], temperature=temperature
        ).mean()

    return loss, params, data


def test_the_tracker_averages_the_last_steps_of_every_epoch():
    _, params, _ = toy()
    init, update = tracker(alpha=0.7, steps_per_epoch=5, track_batches=3)
    update, state, expected = jax.jit(update), init(params), 0.0
    for step in range(12):
        grads = jax.tree.map(lambda w, step=step: w + step, params)
        state = update(state, params, grads)
        if step % 5 >= 2:
            new = np.abs(params["fc"]["kernel"] * grads["fc"]["kernel"])
            expected = 0.7 * new + 0.3 * (0.0 if step % 5 == 2 else expected)
        assert_allclose(state.saliency["fc"]["kernel"], expected * np.ones((4, 3)), rtol=1e-6)
    init, update = tracker(steps_per_epoch=2, track_batches=20)  # epochs shorter than the window
    state = init(params)
    for _ in range(3):
        state = update(state, params, params)
    assert_allclose(
        state.saliency["fc"]["kernel"], 0.8 * jnp.square(params["fc"]["kernel"]), rtol=1e-6
    )


def test_tracking_inside_shard_map():
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("x")
    init, update = tracker(alpha=0.5, steps_per_epoch=3, track_batches=2)

    def track(params):
        step = lambda state, _: (update(state, params, 2 * params), None)
        return jax.lax.scan(step, init(params), length=3)[0].saliency

    found = jax.jit(jax.shard_map(track, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.arange(4.0))
    assert_allclose(found, 0.75 * 2 * np.arange(4.0) ** 2)


def test_tracking_leaves_the_optimizer_as_it_is():
    loss, params, data = toy()
    plain, tracked = optax.adam(0.1), saliency.track(optax.adam(0.1))
    state, both = plain.init(params), tracked.init(params)
    grads = jax.jit(jax.grad(loss))(params, data, 1.0)
    step, same_step = jax.jit(plain.update), jax.jit(tracked.update)
    for _ in range(2):
        updates, state = step(grads, state, params)
        same, both = same_step(grads, both, params, value=0.0)
        jax.tree.map(assert_array_equal, updates, same)
        jax.tree.map(assert_array_equal, state, both.inner)
    with pytest.raises(ValueError, match="reads the weights"):
        tracked.update(grads, both)
    for options in ({"alpha": 1.5}, {"track_batches": 0}, {"steps_per_epoch": 0}):
        with tiny.complains(next(iter(options))):
            saliency.track(plain, **options)


# Statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_host", [False, True])
def test_statistics_are_the_means_their_names_say(on_host):
    with jax.enable_x64(True):
        loss, params, data = toy(jnp.float64)
        chosen = scores.class_balanced(data["y"], 3, 16)  # five of each class
        balanced = jax.tree.map(lambda x: x[chosen], data)
        needs = scores.required("fisher", "tfo", "grasp", "grad_preserve")
        collect = scores.gather(
            loss, needs, 10, temperature=3.0, grasp_temperature=20.0, on_host=on_host
        )
        found = collect(params, data, balanced=balanced)
        grad = jax.jit(jax.grad(loss))
        batches = [jax.tree.map(lambda x, a=a: x[a : a + 10], data) for a in (0, 10, 20)]
        grads = [grad(params, batch, 3.0) for batch in batches]
        mean = lambda *xs: sum(len(batch["y"]) * x for batch, x in zip(batches, xs)) / 23
        near = lambda x, y: assert_allclose(x, y, rtol=1e-9, atol=1e-13)
        jax.tree.map(near, found.g, jax.tree.map(mean, *grads))
        jax.tree.map(near, found.g, grad(params, data, 3.0))
        jax.tree.map(near, found.g2, jax.tree.map(lambda *xs: mean(*map(np.square, xs)), *grads))
        assert found.w0 is None
        assert found.saliency is None
        per_class = [jax.tree.map(lambda x, c=c: x[5 * c : 5 * c + 5], balanced) for c in range(3)]
        assert all(set(np.asarray(batch["y"])) == {c} for c, batch in enumerate(per_class))
        for field, temperature in (("hg_grasp", 20.0), ("hg_preserve", 1.0)):
            grads = [grad(params, batch, temperature) for batch in per_class]
            g = jax.tree.map(lambda *xs: sum(xs) / 3, *grads)

            def slope(params, batch, g=g, temperature=temperature):
                return trees.dot(jax.grad(loss)(params, batch, temperature), g)

            product = jax.jit(jax.grad(slope))
            products = [product(params, batch) for batch in per_class]
            jax.tree.map(
                near, getattr(found, field), jax.tree.map(lambda *xs: sum(xs) / 3, *products)
            )


def test_gathering_again_compiles_nothing_and_skips_what_nobody_needs():
    loss, params, data = toy()
    calls = []

    def counted(params, batch, temperature):
        calls.append(len(batch["y"]))
        return loss(params, batch, temperature)

    for on_host in (False, True):
        collect = scores.gather(counted, ("g", "w0"), 10, on_host=on_host)
        for factor in (1.0, 2.0):
            found = collect(jax.tree.map(lambda x, f=factor: f * x, params), data, init=params)
            assert sorted(calls) == [3, 10]  # one trace per batch size
            assert found.g2 is found.hg_grasp is None
            assert found.w0 is params
        calls.clear()
    inside = jax.jit(lambda params: scores.gather(loss, ("g",), 64)(params, data).g)(params)
    near = lambda x, y: assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, inside, jax.grad(loss)(params, data, 1.0))
    assert scores.gather(loss, ("w",), 10)(params).w is params


def test_misuse_of_gather_is_explained():
    loss, params, data = toy()
    with tiny.complains(r"statistic is 'hg_graps'; allowed: .* Did you mean 'hg_grasp'"):
        scores.gather(loss, ("hg_graps",), 10)
    with tiny.refused("batch_size", 0):
        scores.gather(loss, ("g",), 0)
    for needs, message in (
        (("g", "g2"), "g cannot be gathered: data is missing"),
        (("hg_grasp",), "hg_grasp cannot be gathered: balanced is missing"),
        (("w0",), "w0 cannot be gathered: init is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            scores.gather(loss, needs, 10)(params)
    for on_host in (False, True):
        collect = scores.gather(loss, ("g",), 10, on_host=on_host)
        with pytest.raises(ValueError, match=r"arrays of length \[22, 23\]; allowed: one length"):
            collect(params, data | {"y": data["y"][1:]})
        with pytest.raises(
            ValueError, match=r"arrays of length \[0\]; allowed: one length, at least 1"
        ):
            collect(params, jax.tree.map(lambda x: x[:0], data))


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 30))
def test_class_balanced_examples_are_the_first_of_each_class(seed, num_classes, num_samples):
    labels = default_rng(seed).integers(0, num_classes, 40)
    each = num_samples // num_classes
    if each < 1 or min(list(labels).count(c) for c in range(num_classes)) < each:
        with pytest.raises(ValueError, match=f"are {each} of each class"):
            scores.class_balanced(labels, num_classes, num_samples)
    else:
        expected = [
            i for c in range(num_classes) for i in [j for j in range(40) if labels[j] == c][:each]
        ]
        assert_array_equal(scores.class_balanced(labels, num_classes, num_samples), expected)


def test_a_weight_that_is_nan_makes_its_own_score_nan():
    _, params, _ = toy()
    bad = {**params, "fc": {"kernel": params["fc"]["kernel"].copy()}}
    bad["fc"]["kernel"][1, 2] = np.nan
    group = Group((member("fc/kernel", 0, 4, "producer"),))
    found = scores.score("l1", scores.Statistics(w=bad), group)
    assert_array_equal(np.isnan(found), [False, True, False, False])


# Scores -------------------------------------------------------------------------------------------

CHANNELS = 5


def example(seed, dtype=np.float64):
    """(statistics, group): two producers, two norms (one without bias), a depthwise kernel, a
    flattened consumer.
    """
    rng = default_rng(seed)
    shapes = {
        "conv1/kernel": (2, 2, 3, CHANNELS),
        "conv2/kernel": (1, 1, 4, CHANNELS + 2),  # two more filters, of another group
        "depthwise/kernel": (2, 2, 1, CHANNELS),
        "bn1/scale": (CHANNELS,),
        "bn1/bias": (CHANNELS,),
        "conv2/bias": (CHANNELS + 2,),
        "norm2/scale": (CHANNELS,),
        "fc/kernel": (4 * CHANNELS, 3),  # every channel at four positions
    }
    tree = lambda: golden_data.nest(
        {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}
    )
    statistics = scores.Statistics(
        *(jax.tree.map(jnp.asarray, tree()) for _ in scores.Statistics._fields)
    )
    shuffled = np.array([6, 0, 3, 2, 5])[:, None]
    group = Group(
        (
            member("conv1/kernel", 3, CHANNELS, "producer"),
            member("bn1/bias", 0, CHANNELS, "other", "shift"),
            Member("conv2/kernel", 3, shuffled, "producer"),
            Member("conv2/bias", 0, shuffled, "other", term="shift"),
            member("bn1/scale", 0, CHANNELS, "other", "scale"),
            member("bn1/mean", 0, CHANNELS, "other"),  # running statistics are never read
            member("depthwise/kernel", -1, CHANNELS, "other"),
            member("norm2/scale", 0, CHANNELS, "other", "scale"),
            Member("fc/kernel", 0, np.arange(4 * CHANNELS).reshape(4, CHANNELS).T, "consumer"),
        )
    )
    return statistics, group


def slow_score(name, statistics, group, aggregate, use_l2, use_init):
    """Entry by entry, as the table of formulas reads."""
    s = {
        field: trees.named_leaves(getattr(statistics, field)) for field in scores.Statistics._fields
    }

    def entries(one, c):
        array = {field: np.moveaxis(np.asarray(s[field][one.path]), one.axis, 0) for field in s}
        slices = [{field: array[field][i].ravel() for field in s} for i in one.index[c]]
        return [
            {field: cut[field][j] for field in s} for cut in slices for j in range(len(cut["w"]))
        ]

    def distance(e):
        return abs(e["w"] - e["w0"]) if use_init else abs(e["w"])

    def kernel_score(one, c):
        mine = entries(one, c)
        factor = [distance(e) if use_l2 else 1.0 for e in mine]
        every = [
            [e["w"] * (distance(e) if use_l2 else 1.0) for e in entries(one, d)]
            for d in range(CHANNELS)
        ]
        squares = [sum(w * w for w in row) for row in every]
        return {
            "mag_based": lambda: squares[c] ** 0.5,
            "l1": lambda: sum(abs(w) for w in every[c]),
            "loss_based": lambda: sum(abs(e["w"] * e["g"]) * f for e, f in zip(mine, factor)),
            "biased_loss": lambda: sum(abs(e["w"] * e["g"]) * distance(e) for e in mine),
            "biased_loss_tracked": lambda: sum(
                e["saliency"] * (1.0 if use_l2 else distance(e)) for e in mine
            ),
            "tfo": lambda: abs(sum(e["w"] * e["g"] * f for e, f in zip(mine, factor))),
            "fisher": lambda: sum(e["w"] ** 2 * e["g2"] * f for e, f in zip(mine, factor)),
            "grasp": lambda: sum(e["w"] * e["hg_grasp"] * f for e, f in zip(mine, factor)),
            "grad_preserve": lambda: abs(
                sum(e["w"] * e["hg_preserve"] * f for e, f in zip(mine, factor))
            ),
            "fpgm": lambda: sum(
                sum((a - b) ** 2 for a, b in zip(every[c], row)) ** 0.5 for row in every
            ),
            "lamp": lambda: squares[c] / sum(square for square in squares if square >= squares[c]),
        }[name]()

    member_of = {one.path: one for one in group.members}

    def norm_score(path, c):
        (scale,) = entries(member_of[f"{path}/scale"], c)
        if name == "bn":
            return abs(scale["w"])
        bias = entries(member_of[f"{path}/bias"], c) if f"{path}/bias" in member_of else []
        return sum(e["w"] ** 2 * e["g2"] for e in [scale, *bias])

    found = []
    for c in range(CHANNELS):
        if name in ("bn", "nvidia"):
            parts = [norm_score(path, c) for path in ("bn1", "norm2")]
        else:
            roles = ("producer",) if aggregate == "producer" else ("producer", "consumer")
            chosen = [one for one in group.members if one.role in roles]
            parts = [kernel_score(one, c) for one in chosen]
            if aggregate != "producer":
                parts.append(kernel_score(member_of["depthwise/kernel"], c))
        mean = sum(parts) / len(parts)
        found.append(
            {"sum": sum(parts), "l2": sum(p * p for p in parts) ** 0.5}.get(aggregate, mean)
        )
    return np.array(found)


KERNEL_MEASURES = [name for name, measure in scores.MEASURES.items() if measure.on == "kernel"]
FEW = ("l1", "tfo", "bn", "nvidia")
CASES = (
    [(name, {}) for name in scores.MEASURES if name != "random"]
    + [(name, {"use_l2": True}) for name in KERNEL_MEASURES]
    + [(name, {"use_l2": True, "use_init": True}) for name in KERNEL_MEASURES]
    + [(name, {"use_init": True}) for name in ("biased_loss", "biased_loss_tracked")]
)


def cases(aggregate):
    """All for one way to add up, the measures for another, some for the rest."""
    if aggregate == "producer":
        return CASES
    plain = [(name, {}) for name in scores.MEASURES if name != "random"]
    return plain if aggregate == "sum" else [case for case in plain if case[0] in FEW]


@functools.cache
def all_scores(aggregate):
    """Every case in one program."""
    group, chosen = example(0)[1], cases(aggregate)
    return jax.jit(
        lambda s: [
            scores.score(name, s, group, aggregate=aggregate, **options) for name, options in chosen
        ]
    )


@pytest.mark.parametrize("aggregate", sorted(scores.AGGREGATES))
@hypothesis.settings(max_examples=5)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_scores_are_those_of_the_formulas_entry_by_entry(aggregate, seed):
    with jax.enable_x64(True):
        statistics, group = example(seed)
        for (name, options), found in zip(cases(aggregate), all_scores(aggregate)(statistics)):
            chosen = {"use_l2": False, "use_init": False, **options}
            expected = slow_score(name, statistics, group, aggregate, **chosen)
            assert found.shape == (group.size,)
            assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=f"{name} {options}")


def test_reordered_channels_reorder_their_scores():
    order = np.array([3, 0, 4, 2, 1])
    group = example(0)[1]
    moved = Group(tuple(one._replace(index=one.index[order]) for one in group.members))
    names = ("mag_based", "bn", "fpgm", "lamp", "tfo")
    both = jax.jit(lambda s: [[scores.score(n, s, own) for n in names] for own in (group, moved)])
    for seed in range(5):
        plain, reordered = both(example(seed, np.float32)[0])
        for before, after in zip(plain, reordered):
            assert_allclose(after, before[order], rtol=1e-5, atol=1e-6)


def test_half_precision_is_widened_before_sums_and_squares():
    w = {"w": jnp.full((1, 1, 4096, 2), 1.0, jnp.float16)}
    group = Group((member("w", 3, 2, "producer"),))
    found = scores.score("l1", scores.Statistics(w=w), group)
    assert found.dtype == jnp.float32
    assert_array_equal(found, 4096)
    collect = scores.gather(
        lambda params, batch, _: 1e-4 * (params["w"].sum((0, 1, 2)) @ batch).mean(), ("g2",), 2
    )
    statistics = collect(w, jnp.ones((3, 2, 1), jnp.float16))
    small = jnp.square(jnp.float16(1e-4).astype(jnp.float32))  # 0 in half precision
    assert_allclose(statistics.g2["w"], jnp.full(w["w"].shape, small), rtol=1e-2)
    half = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), w)
    alone = of_one_batch(w, half)
    assert_allclose(alone.g2["w"], jnp.full(w["w"].shape, small), rtol=1e-2)
    assert statistics.g2["w"].dtype == saliency.of_weights(w, w)["w"].dtype == jnp.float32


def score_of(name, kernel):
    """Scores of the outputs of a kernel [in, out]."""
    group = Group((member("kernel", 1, kernel.shape[1], "producer"),))
    return jax.jit(lambda w: scores.score(name, scores.Statistics(w=w), group))({"kernel": kernel})


def test_whole_kernel_rules_on_kernels_worked_by_hand():
    kernel = np.array(
        [[3.0, 0.0, -3.0, 0.0], [4.0, 0.0, -4.0, 5.0]], np.float32
    )  # filters (3, 4), 0, (-3, -4), (0, 5)
    to_last = (10.0**0.5, 90.0**0.5)
    expected = [
        10 + to_last[0],
        5 + 5 + 5,
        10 + to_last[1],
        to_last[0] + to_last[1],
    ]  # the zero filter does not count
    assert_allclose(score_of("fpgm", kernel), expected, rtol=1e-6)
    found = score_of("lamp", kernel)  # three of squared norm 25
    assert_allclose(found, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    kernel = np.array([[1.0, 2.0, 3.0]], np.float32)
    assert_allclose(score_of("lamp", kernel), [1 / 14, 4 / 13, 1], rtol=1e-6)
    assert_array_equal(score_of("lamp", 0 * kernel), 0)


def test_random_scores_follow_their_key():
    group = Group((member("w", 0, 1000, "producer"),))
    draw = jax.jit(lambda key: scores.score("random", scores.Statistics(), group, key=key))
    found = draw(jax.random.key(0))
    assert_array_equal(
        found, scores.score("random", scores.Statistics(), group, key=jax.random.key(0))
    )
    assert (found != draw(jax.random.key(1))).any()
    assert 0 <= found.min() < 0.05
    assert 0.95 < found.max() < 1
    with pytest.raises(ValueError, match="'random' needs a key"):
        scores.score("random", scores.Statistics(), group)


def test_members_can_be_skipped():
    statistics, group = example(2, np.float32)
    both = scores.score("bn", statistics, group)
    first = scores.score("bn", statistics, group, skip="norm2/.*")
    assert_array_equal(first, jnp.abs(statistics.w["bn1"]["scale"]))
    assert (both != first).all()
    kernels = scores.score(
        "l1", statistics, group, aggregate="sum", skip="(conv2|fc|depthwise)/kernel"
    )
    assert_allclose(kernels, jnp.abs(statistics.w["conv1"]["kernel"]).sum((0, 1, 2)), rtol=1e-6)


def test_norms_are_found_under_any_names():
    """By what the function does with them: two norms, of which one has a shift, and a bias."""
    array = lambda *values: jnp.array(values, jnp.float32)
    w = {
        "one": {"gain": {"value": array(1, -2)}, "add": {"value": array(3, 0)}},
        "two": {"g": array(5, 6)},
        "dense": {"w": jnp.ones((3, 2)), "b": array(7, 7)},
        "mean": array(1, 1),
        "out": jnp.ones((2, 4)),
    }

    def apply(w, x):
        x = x @ w["dense"]["w"] + w["dense"]["b"]
        x = (x - w["mean"]) * w["one"]["gain"]["value"] + w["one"]["add"]["value"]
        return (x * w["two"]["g"]) @ w["out"]

    channels = groups.trace(apply, w, jnp.ones((1, 3)))
    (group,) = channels.groups.values()
    terms = {one.path: one.term for one in group.members if one.term}
    shifts = dict.fromkeys(("dense/b", "one/add/value"), "shift")
    assert terms == shifts | dict.fromkeys(("one/gain/value", "two/g"), "scale")
    statistics = scores.Statistics(w=w, g2=jax.tree.map(jnp.ones_like, w))
    assert_array_equal(scores.score("bn", statistics, group, aggregate="sum"), [6, 8])
    assert_array_equal(
        scores.score("nvidia", statistics, group, aggregate="sum"), [1 + 9 + 25, 4 + 36]
    )


def test_required_statistics():
    assert scores.required("l1", "bn") == ("w",)
    assert scores.required("grasp", "fisher", "tfo") == ("w", "g", "g2", "hg_grasp")
    assert scores.required("biased_loss_tracked") == ("w", "saliency")
    assert scores.required("biased_loss_tracked", use_l2=True, use_init=True) == (
        "saliency",
    )  # tracked with both
    assert scores.required("l1", use_l2=True, use_init=True) == ("w", "w0")
    assert scores.required("random") == scores.required() == ()


@pytest.mark.parametrize(
    ("name", "options", "refusal"),
    [
        ("fischer", {}, ("measure", "fischer", "fisher")),
        ("l1", {"aggregate": "max"}, ("aggregate", "max")),
        ("bn", {"use_l2": True}, ("use_l2", True)),
        ("tfo", {"use_init": True}, ("use_init", True)),
        ("l1", {"skip": "("}, ("skip", "(")),
    ],
)
def test_wrong_options_of_score_are_refused(name, options, refusal):
    statistics, group = example(0, np.float32)
    with tiny.refused(*refusal):
        scores.score(name, statistics, group, **options)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("fisher", {}, "'fisher' .* g2"),
        ("l1", {"use_l2": True, "use_init": True}, "'l1' .* w0"),
        ("l1", {"skip": ".*/kernel"}, "'l1' .* 'conv1/kernel'"),
        ("bn", {"skip": ".*/scale"}, "'bn' .* 'conv1/kernel'"),
    ],
)
def test_what_a_score_cannot_read_is_named(name, options, named):
    statistics, group = example(0, np.float32)
    with pytest.raises(ValueError, match=named):
        scores.score(name, scores.Statistics(w=statistics.w, g=statistics.g), group, **options)


def test_groups_of_another_network_are_refused():
    statistics, _ = example(0, np.float32)
    with tiny.refused("an array of the statistic w", "conv3/kernel", "conv2/kernel"):
        scores.score("l1", statistics, Group((member("conv3/kernel", 3, 5, "producer"),)))
    with pytest.raises(
        ValueError, match="axis 3 of 'conv1/kernel' has 5 entries; the group's index exceeds them"
    ):
        scores.score("l1", statistics, Group((member("conv1/kernel", 3, 6, "producer"),)))
