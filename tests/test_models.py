"""The model zoo: numbers of the original PyTorch networks, and what every row of MODELS
promises.
"""

import functools
import os
import re

import foreign
import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from tiny import refused

from sparsity_jax import models, pretrained, trees
from sparsity_jax.models import convolutions, layers

ORIGINALS = golden_data.load("11_models.json")
# Rows of MODELS that are a network of the originals: options besides the defaults.
PUBLISHED = {
    "mlp": {},
    "fc5": {},
    "fc12": {},
    "mlp7": {"activation": "linear"},
    "lenet": {},
    "lenet5": {},
    "cnet": {},
    "alexnet": {},
    "alexnet_cifar": {},
    "alexnet_bn": {},
    "vgg13": {"order": "conv_relu_bn", "conv_bias": False},
    "vgg16": {},
    "resnet18": {},
    "resnet34": {"stem": "imagenet"},
    "resnet50": {},
    "resnet20": {},
    "resnet56": {},
    "preact_resnet18": {},
    "wrn": {},
    "mobilenet": {},
    "mobilenet_v2": {},
}
# Networks and image sizes without stored logits: parameters with 10 classes, counted by hand.
COUNTS = {
    ("small_cnn", (8, 8, 1)): 60_554,
    ("fc2", (32, 32, 3)): 3072 * 100 + 100 + 100 * 10 + 10,
    ("fc2", (28, 28, 1)): 784 * 100 + 100 + 100 * 10 + 10,
    ("fc13", (32, 32, 3)): 7_269_610
    - (400 * 200 + 200)
    + (400 * 250 + 250)
    + (250 * 200 + 200),  # from FC12
    ("lenet", (28, 28, 1)): (25 + 1) * 16
    + (400 + 1) * 32
    + (512 + 1) * 120
    + (120 + 1) * 84
    + (84 + 1) * 10,
    (
        "vgg16",
        (32, 32, 3),
    ): 14_728_266,  # 9 * 1,634,496 in kernels, 3 * 4,224 in biases and norms, 513 * 10
}
# Every row of MODELS in a size that compiles in a moment, and the side of its images.
TINY = {
    "mlp": ({"widths": (8, 6)}, 8),
    "fc2": ({}, 4),
    "fc5": ({"widths": (8, 6, 5, 4)}, 4),
    "fc12": ({"widths": (8,) * 11}, 4),
    "fc13": ({"widths": (8,) * 12}, 4),
    "mlp7": ({"widths": (4,) * 6}, 4),
    "small_cnn": ({"widths": (4, 6, 6), "dense_widths": (5,), "batch_norm": True}, 9),
    "lenet": ({"widths": (3, 4), "dense_widths": (6, 5)}, 17),
    "lenet5": ({"widths": (3, 4, 5), "dense_widths": (6,)}, 32),
    "cnet": ({"widths": (3, 4, 3, 2), "dense_widths": (6, 5)}, 18),
    "alexnet": ({"widths": (3, 4, 5, 4, 3), "dense_widths": (6, 5)}, 10),
    "alexnet_cifar": ({"widths": (3, 4, 5, 4, 3), "dense_widths": (6, 5)}, 15),
    "alexnet_bn": ({"widths": (3, 4, 5, 4, 3), "dense_widths": (6, 5)}, 63),
    "vgg": ({"layout": (4, "M", 6, 6, "M")}, 8),
    "vgg11": ({"width": 2}, 32),
    "vgg13": ({"width": 2, "order": "conv_relu_bn"}, 32),
    "vgg16": ({"width": 2}, 32),
    "vgg19": ({"width": 2, "batch_norm": False}, 32),
    "resnet": (
        {"stage_sizes": (1, 1), "widths": (4, 6), "inner_widths": (3, 5), "stem_width": 3},
        8,
    ),
    "resnet18": ({"width": 2}, 8),
    "resnet34": ({"width": 2, "stem": "imagenet"}, 32),
    "resnet50": ({"width": 2}, 8),
    "resnet20": ({"width": 2}, 8),
    "resnet56": ({"width": 2}, 8),
    "preact_resnet18": ({"width": 2}, 8),
    "wrn": ({"depth": 10, "widening": 1}, 8),
    "mobilenet": ({"stem_width": 3, "blocks": ((4, 1), (6, 2))}, 8),
    "mobilenet_v2": ({"multiplier": 0.1, "blocks": ((1, 60, 1, 1), (2, 80, 2, 2))}, 8),
}
KEY = jax.random.key(
    0, impl="rbg"
)  # compiles five times faster than the default, and any key will do

names = pytest.mark.parametrize("name", sorted(models.MODELS))
families = pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "small_cnn",
        "alexnet_cifar",
        "vgg",
        "resnet",
        "preact_resnet18",
        "mobilenet",
        "mobilenet_v2",
    ],
)


@functools.cache
def created(name):
    """(model, shapes of its variables, images [3, side, side, 3]) of a row of MODELS."""
    options, side = TINY[name]
    model = models.build(name=name, num_classes=5, **options)
    images = foreign.image(size=side, batch=3)
    return model, jax.eval_shape(model.init, KEY, images), images


@functools.cache
def tiny(name):
    """(model, variables, images) of a row of MODELS.

    NumPy draws the weights: to compile an initialisation takes longer than all that is done with it
    here.
    """
    model, variables, images = created(name)
    return model, foreign.filled(variables), images


@functools.cache
def tiny_apply(name):
    return jax.jit(tiny(name)[0].apply)


@functools.cache
def tiny_logits(name):
    _, variables, images = tiny(name)
    return tiny_apply(name)(variables, images)


def settings(**changes):
    return layers.Settings()._replace(**changes)


def shapes(tree):
    return jax.tree.map(np.shape, tree)


# Agreement with the originals


def test_weight_rule():
    stored = golden_data.load("11_models.npz")
    assert_array_equal(
        [golden_data.rule_uniform(8, salt) for salt in range(4)],
        stored["rule/hash_u_first8_salt0..3"],
    )
    assert_array_equal(
        golden_data.rule_input((3, 32, 32)).ravel()[:8], stored["rule/input_first8_3x32x32"]
    )


@pytest.mark.skipif(
    "GOLDEN" in os.environ, reason="other sets need not have all of our published networks"
)
def test_presets_are_networks_of_the_originals():
    def module(name, num_classes, **options):
        return models.MODELS[name](num_classes, settings(), **options)

    originals = [golden_data.network_options(key) for key in ORIGINALS]
    theirs = [module(**options) for options in originals]
    for name, options in PUBLISHED.items():
        ours = [
            module(name, num_classes, **options)
            for num_classes in {own["num_classes"] for own in originals}
        ]
        assert any(preset in theirs for preset in ours), name


@functools.cache
def traced(key):
    """(model in float64, its layers, widths of its norms, shapes of its variables) of a network of
    the originals.

    Layers are convolutions and dense layers as the file of the originals lists them, by our path,
    in order: a convolution is described by [strides, padding, groups, has a bias], a dense layer by
    None.
    """
    model = models.build(dtype="float64", param_dtype="float64", **golden_data.network_options(key))
    found, norms = {}, {}

    def note(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, nn.Conv):
            padding = [low for low, high in module.padding if low == high]
            found[path] = [
                list(module.strides),
                padding,
                module.feature_group_count,
                module.use_bias,
            ]
        elif isinstance(module, nn.Dense):
            found[path] = None
        elif isinstance(module, convolutions.BatchNorm):
            norms[path] = args[0].shape[-1]
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct(shape_of_images(ORIGINALS[key]["input_shape"]), jnp.float32)
    with jax.enable_x64(True), nn.intercept_methods(note):
        variables = jax.eval_shape(model.init, KEY, images)
    return model, found, norms, variables


def shape_of_images(shape):
    """[batch, height, width, channels] for NCHW; other shapes unchanged."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)


@pytest.mark.parametrize("key", ORIGINALS)
def test_logits_and_parameter_count_of_the_original(key):
    net, expected = ORIGINALS[key], golden_data.load("11_models.npz")[f"{key}/logits"]
    shape = net["input_shape"]
    dense = max(map(len, net["param_shapes"])) == 2  # those of the originals flatten NCHW images
    images = golden_data.rule_input(shape) if dense else golden_data.images(shape)
    with jax.enable_x64(True):
        model, _, _, created = traced(key)
        variables = pretrained.to_variables(
            golden_data.state_dict(net["param_names"], net["param_shapes"]), created
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(created["params"])) == net["n_params"]
        logits = jax.jit(model.apply)(variables, images)
    expected = expected.reshape(shape[0], -1)  # some drop the batch axis of a single image
    assert_allclose(logits, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("key", ORIGINALS)
def test_names_orders_and_layers_of_the_original(key):
    net = ORIGINALS[key]
    _, found, norms, variables = traced(key)
    shapes = dict(zip(net["param_names"], net["param_shapes"], strict=True))
    paths = pretrained.name_map(shapes, variables)
    assert sorted(paths) == sorted(shapes)
    place = lambda module: paths[f"{module}.weight"].removeprefix("params/").rpartition("/")[0]
    expected = {place(module): details for module, _, _, details in net["weight_layers"]}
    assert found == expected
    of_blocks = lambda layers: [path for path in layers if "shortcut" not in path]
    # shortcuts are defined last in the originals' blocks, and called first where the block begins
    # with its norm
    assert of_blocks(found) == of_blocks(expected)
    for module, _, shape, _ in net["weight_layers"]:
        assert shapes[f"{module}.weight"] == shape
    leaves = trees.named_leaves(variables["params"])
    sizes = [leaf.size for path, leaf in leaves.items() if path.rpartition("/")[0] in found]
    assert sum(sizes) == net.get("params_conv_linear_only", net["n_params"])
    expected = {place(module): width for module, width, _, _ in net["bn_layers"]}
    assert norms == expected
    assert of_blocks(norms) == of_blocks(expected)
    for module, _, epsilon, momentum in net["bn_layers"]:
        assert (epsilon, momentum) == (1e-5, 0.1), module
    listed = [
        name
        for name, kind in net["leaf_module_order"]
        if kind in ("Conv2d", "Linear", "BatchNorm2d")
    ]
    known = [name.rpartition(".")[0] for name in net["param_names"] if name.endswith("weight")]
    assert listed == known


@pytest.mark.parametrize(("name", "shape"), COUNTS)
def test_parameter_count(name, shape):
    model = models.build(name=name, num_classes=10)
    variables = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == COUNTS[name, shape]


@pytest.mark.parametrize("key", golden_data.parts("12_training_steps.npz", r"(\w+)/param_names"))
def test_training_steps_of_the_original(key):
    stored, hyper = (
        golden_data.load("12_training_steps.npz"),
        golden_data.hyper("12_training_steps.npz"),
    )
    momentum_rate, decay, rate = (hyper[name] for name in ("momentum", "weight_decay", "lr"))
    expected = stored.under(key)
    torch_names = [str(name) for name in expected["param_names"]]
    torch_shapes = golden_data.shapes_of(expected["param_shapes"])
    paths = golden_data.paths(torch_names, torch_shapes)
    norms = golden_data.batch_norms(torch_names, torch_shapes)
    images, labels = golden_data.images(expected["input_shape"]), expected["labels"]
    check = functools.partial(assert_allclose, rtol=1e-9, atol=1e-11)

    def check_tree(tree, norm_key, first_key):
        leaves = [
            golden_data.to_torch(golden_data.leaf(tree, paths[name])).ravel()
            for name in torch_names
        ]
        check([np.linalg.norm(leaf) for leaf in leaves], expected[norm_key])
        check([leaf[:3] for leaf in leaves], expected[first_key])

    with jax.enable_x64(True):
        num_classes = expected["logits_train_step0"].shape[-1]
        options = golden_data.architecture(torch_names, torch_shapes)
        model = models.build(
            num_classes=num_classes, dtype="float64", param_dtype="float64", **options
        )

        def loss_fn(params, batch_stats):
            logits, batch_stats = model.apply_train(
                {"params": params, "batch_stats": batch_stats}, images
            )
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
            return -chosen.mean(), (logits, batch_stats)

        @jax.jit
        def step(params, momentum, batch_stats):
            (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, batch_stats
            )
            momentum = jax.tree.map(
                lambda m, g, p: momentum_rate * m + g + decay * p, momentum, grads, params
            )
            params = jax.tree.map(lambda p, m: p - rate * m, params, momentum)
            return (params, momentum, batch_stats), (loss, logits, grads)

        variables = golden_data.variables(torch_names, torch_shapes)
        params, batch_stats = variables["params"], variables["batch_stats"]
        state = params, jax.tree.map(np.zeros_like, params), batch_stats
        losses = []
        for i in range(hyper["steps"]):
            state, (loss, logits, grads) = step(*state)
            losses.append(loss)
            if i == 0:
                assert_allclose(logits, expected["logits_train_step0"], rtol=1e-8, atol=1e-11)
                check_tree(grads, "grad_norms_step0", "grad_first3_step0")
        params, _, batch_stats = state
        check(losses, expected["losses"])
        check_tree(params, "param_norms_final", "param_first3_final")
        for statistic in ("mean", "var"):
            stats = [golden_data.leaf(batch_stats, f"{path}/{statistic}") for path in norms]
            check(np.concatenate(stats), expected[f"bn_running_{statistic}"])
        logits = jax.jit(model.apply)({"params": params, "batch_stats": batch_stats}, images)
        assert_allclose(logits, expected["logits_eval_final"], rtol=1e-8, atol=1e-11)


def test_layouts_round_trip():
    for array in (np.arange(120).reshape(2, 3, 4, 5), np.arange(6).reshape(2, 3), np.arange(3)):
        assert_array_equal(golden_data.to_torch(golden_data.from_torch(array)), array)
    assert golden_data.from_torch(np.zeros((8, 3, 5, 7))).shape == (5, 7, 3, 8)  # OIHW to HWIO


# Every row of MODELS


def test_every_model_has_a_tiny_version():
    assert sorted(TINY) == sorted(models.MODELS)


@names
def test_init(name):
    _, variables, _ = created(name)
    assert sorted(variables) == ["batch_stats", "params"]
    assert variables["params"]["fc"]["kernel"].shape[-1] == 5
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_init_under_jit_equals_init():
    model, _, images = tiny("small_cnn")
    jax.tree.map(assert_array_equal, model.init(KEY, images), jax.jit(model.init)(KEY, images))


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_jit_equals_eager(name):
    model, variables, images = tiny(name)
    assert_allclose(model.apply(variables, images), tiny_logits(name), rtol=1e-4, atol=1e-5)


@families
def test_inference_does_not_mix_images(name):
    _, variables, images = tiny(name)
    assert tiny_logits(name).shape == (3, 5)
    assert np.isfinite(tiny_logits(name)).all()
    in_other_company = np.stack([images[2] + 7, images[0], images[0]])
    logits = tiny_apply(name)(variables, in_other_company)
    assert_allclose(logits[1:], np.asarray(tiny_logits(name))[[0, 0]], rtol=1e-4, atol=1e-5)


@families
def test_training_mode_updates_the_running_statistics(name):
    model, variables, images = tiny(name)
    logits, batch_stats = jax.jit(model.apply_train)(variables, images)
    assert np.isfinite(logits).all()
    changed = jax.tree.map(
        lambda new, old: bool((new != old).any()), batch_stats, variables["batch_stats"]
    )
    assert all(jax.tree.leaves(changed))


@families
def test_bfloat16_gives_float32_logits_and_statistics(name):
    _, variables, images = tiny(name)
    model = models.build(name=name, num_classes=5, dtype="bfloat16", **TINY[name][0])
    created = jax.eval_shape(model.init, KEY, images)
    assert shapes(created) == shapes(variables)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(created))
    logits, batch_stats = jax.eval_shape(model.apply_train, variables, images)
    assert shapes(batch_stats) == shapes(variables["batch_stats"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((logits, batch_stats)))
    logits, expected = jax.jit(model.apply)(variables, images), tiny_logits(name)
    assert logits.dtype == jnp.float32
    assert_allclose(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_bfloat16_params_keep_float32_statistics():
    model = models.build(
        name="small_cnn", num_classes=3, batch_norm=True, dtype="bfloat16", param_dtype="bfloat16"
    )
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["batch_stats"])} == {
        jnp.dtype("float32")
    }
    assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32


def test_module_names():
    def paths(name, **options):
        model = models.build(name=name, num_classes=2, **options)
        variables = jax.eval_shape(
            model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        )
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
        return ["/".join(key.key for key in path) for path, _ in leaves]

    resnet = paths("resnet20", shortcut="projection")
    assert len([path for path in resnet if re.fullmatch(r"stage[123]_.*/conv1/kernel", path)]) == 9
    assert {"conv1/kernel", "bn1/scale", "stage2_block0/shortcut_conv/kernel", "fc/bias"} <= set(
        resnet
    )
    assert "stage3_block0/shortcut_bn/bias" in resnet
    assert "final_bn/scale" in paths("preact_resnet18")
    assert {"block0/depthwise/kernel", "block12/pointwise/kernel", "block0/bn2/bias"} <= set(
        paths("mobilenet")
    )
    assert {"conv1/bias", "bn16/scale", "fc/kernel"} <= set(paths("vgg19"))
    assert paths("mlp") == [
        f"{m}/{p}" for m in ("dense1", "dense2", "fc") for p in ("bias", "kernel")
    ]


def test_inner_widths_thin_the_blocks():
    _, variables, _ = tiny("resnet")
    block = variables["params"]["stage2_block0"]
    assert [block[conv]["kernel"].shape[-2:] for conv in ("conv1", "conv2", "shortcut_conv")] == [
        (4, 5),
        (5, 6),
        (4, 6),
    ]


def test_dropout_uses_its_key_in_training_only():
    model = models.build(name="mlp", num_classes=4, widths=(64,), dropout=0.5)
    images = jnp.ones((2, 6))
    variables = model.init(KEY, images)
    first, _ = model.apply_train(variables, images, jax.random.key(1))
    again, _ = model.apply_train(variables, images, key=jax.random.key(1))
    other, _ = model.apply_train(variables, images, key=jax.random.key(2))
    assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert_array_equal(*model.apply(variables, images))
    with pytest.raises(ValueError, match=r"dropout 0\.5: apply_train needs a key"):
        model.apply_train(variables, images)


# Layers


def test_initialiser_variances():
    shape, inputs = (3, 3, 64, 128), 9 * 64
    for name, conv_variance, dense_variance in (
        ("torch", 1 / (3 * inputs), 1 / (3 * 200)),
        ("kaiming", 2 / (9 * 128), 2 / 200),
        ("kaiming_normal", 2 / inputs, 2 / 200),
        ("kaiming_uniform", 2 / inputs, 2 / 200),
        ("flax", 1 / inputs, 1 / 200),
    ):
        init = layers.INITIALIZERS[name]
        conv = init.conv(KEY, shape, jnp.float32)
        dense = init.dense(KEY, (200, 300), jnp.float32)
        assert_allclose([conv.var(), dense.var()], [conv_variance, dense_variance], rtol=0.03)
        assert_allclose([conv.mean(), dense.mean()], 0, atol=4 * (dense_variance / 60000) ** 0.5)
    depthwise = layers.INITIALIZERS["torch"].conv(KEY, (3, 3, 1, 500), jnp.float32)
    assert_allclose(jnp.abs(depthwise).max(), 1 / 3, rtol=0.01)  # fan_in is 9


@pytest.mark.parametrize("init", sorted(layers.INITIALIZERS))
def test_initial_biases(init):
    model = models.build(name="small_cnn", num_classes=400, init=init, dense_widths=())
    params = model.init(KEY, jnp.zeros((1, 8, 8, 1)))["params"]
    for name, fan_in in (("conv1", 9), ("conv3", 9 * 64), ("fc", 64)):
        bound = fan_in**-0.5 if init == "torch" else 0.0
        bias = params[name]["bias"]
        assert float(jnp.abs(bias).max()) <= bound
        assert_allclose(bias.var(), bound**2 / 3, rtol=0.5)


def test_stride_two_convolution_pads_both_sides():
    network = convolutions.Sequence(settings(), (convolutions.Conv(1, 3, stride=2, name="conv"),))
    variables = {"params": {"conv": {"kernel": jnp.ones((3, 3, 1, 1))}}}
    y = network.apply(variables, jnp.ones((1, 4, 4, 1)))
    assert_array_equal(y[0, :, :, 0], [[4, 6], [6, 9]])


def test_batch_norm_by_hand():
    x = jnp.array([[1.0], [2.0], [6.0]])  # mean 3, biased variance 14/3, unbiased 7
    norm = convolutions.BatchNorm(settings())
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert_allclose(y[:, 0], np.array([-2, -1, 3]) / np.sqrt(14 / 3 + 1e-5), rtol=1e-6)
    assert_allclose(updated["batch_stats"]["mean"], [0.3], rtol=1e-6)
    assert_allclose(updated["batch_stats"]["var"], [0.9 + 0.7], rtol=1e-6)
    y = norm.apply({"params": {"scale": jnp.full(1, 3.0), "bias": jnp.full(1, 0.5)}, **updated}, x)
    assert_allclose(y[:, 0], (np.array([1, 2, 6]) - 0.3) * 3 / np.sqrt(1.6 + 1e-5) + 0.5, rtol=1e-6)


def test_batch_norm_statistics_of_bfloat16_are_float32():
    x = (100 + jax.random.normal(jax.random.key(0), (4096, 1))).astype(jnp.bfloat16)
    norm = convolutions.BatchNorm(settings(dtype=jnp.dtype("bfloat16")))
    y, updated = norm.apply(norm.init(jax.random.key(0), x), x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    assert_allclose(updated["batch_stats"]["mean"], 0.1 * exact.mean(0), rtol=1e-5)
    assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * exact.var(0, ddof=1), rtol=1e-4)


def test_batch_norm_needs_two_values_in_training():
    model, variables, _ = tiny("resnet")
    with pytest.raises(ValueError, match="one value per channel has no variance"):
        model.apply_train(variables, jnp.zeros((1, 1, 1, 3)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("side", [6, 7])
def test_max_pool_equals_window_reduction(side, size):
    x = default_rng(0).normal(size=(2, side, side + 2, 3)).astype(np.float32)
    pools = (
        lambda x: convolutions.max_pool(x, size=size),
        lambda x: nn.max_pool(x, window_shape=(size, size), strides=(2, 2)),
    )

    @jax.jit
    def pooled_and_slopes(x):
        slopes = [jax.grad(lambda x, pool=pool: (pool(x) ** 2).sum())(x) for pool in pools]
        return [pool(x) for pool in pools], slopes

    (pooled, expected), (slope, its_slope) = pooled_and_slopes(x)
    assert_array_equal(pooled, expected)
    assert_allclose(slope, its_slope, rtol=1e-6)


def test_max_pool_of_equal_entries_and_nan():
    """The gradient goes to the first of equal entries, as in PyTorch; NaN is the maximum of its
    window.
    """
    x = jnp.ones((1, 2, 4, 1)).at[0, 1, 3, 0].set(jnp.nan)
    first = lambda x: jnp.sum(convolutions.max_pool(x)[0, 0, 0])
    value, slope = jax.jit(jax.value_and_grad(first))(x)
    assert value == 1
    assert_array_equal(slope.ravel(), [1, 0, 0, 0, 0, 0, 0, 0])
    assert_array_equal(convolutions.max_pool(x).ravel(), [1, np.nan])


def test_upsample_repeats_pixels():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    y = convolutions.upsample(x, 2)
    assert_array_equal(y[0, :, :, 0], [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    assert_array_equal(convolutions.upsample(x, 1), x)


SMALLEST = dict(
    lenet=16, lenet5=32, cnet=18, alexnet=10, alexnet_cifar=15, alexnet_bn=63, small_cnn=8
)


@pytest.mark.parametrize(("name", "smallest"), SMALLEST.items())
def test_smallest_images(name, smallest):
    model = models.build(name=name, num_classes=2)

    def create(side):
        return jax.eval_shape(
            model.init, KEY, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        )["params"]

    last = max(path for path in create(smallest) if path.startswith("conv"))
    assert (
        create(smallest)["dense1"]["kernel"].shape[0] == create(smallest)[last]["kernel"].shape[-1]
    )
    with pytest.raises(ValueError, match=f"height and width at least {smallest}"):
        create(smallest - 1)


def test_alexnet_of_large_images():
    _, variables, images = tiny("alexnet")
    plain = models.build(name="alexnet", num_classes=5, upsample=1, **TINY["alexnet"][0])
    logits = jax.jit(plain.apply)(variables, convolutions.upsample(images, 7))
    assert_allclose(logits, tiny_logits("alexnet"), rtol=1e-6)


def test_zero_pad_shortcut():
    x = jnp.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    y = models.resnet.zero_pad_shortcut(x, 5, 2)
    assert_array_equal(y, [[[[0, 1, 2, 0, 0]]]])


# Errors


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"name": "resnet19"},
            ("name", "resnet19", "resnet18"),
        ),
        (
            {"init": "torhc"},
            ("init", "torhc", "torch"),
        ),
        ({"dtype": "float8"}, ("dtype", "float8", "float64")),
        ({"param_dtype": "int32"}, ("param_dtype", "int32")),
        ({"num_classes": 0}, ("num_classes", 0)),
        ({"widht": 3}, ("", "widht", "width")),
        ({"width": "3"}, ("width", "3")),
        (
            {"shortcut": "identity"},
            ("shortcut", "identity"),
        ),
        ({"name": "vgg", "layout": (4, "P")}, ("layout[1]", "P")),
        ({"name": "mobilenet", "blocks": ((4, 0),)}, ("blocks[0][1]", 0)),
        ({"name": "mlp", "dropout": 1.5}, ("dropout", 1.5)),
        (
            {"name": "resnet", "widths": (4, 8)},
            ("widths", (4, 8)),
        ),
        (
            {"name": "resnet", "inner_widths": (4,)},
            ("inner_widths", (4,)),
        ),
        (
            {"name": "resnet", "widths": (8, 4, 4), "shortcut": "zero_pad"},
            ("shortcut", "zero_pad"),
        ),
        (
            {"name": "alexnet", "widths": (4, 8)},
            ("widths", (4, 8)),
        ),
        ({"name": "alexnet", "upsample": 0}, ("upsample", 0)),
        ({"name": "wrn", "depth": 18}, ("depth", 18)),
    ],
)
def test_wrong_settings_are_found_while_building(changes, refusal):
    with refused(*refusal):
        models.build(**{"name": "resnet18", "num_classes": 10, **changes})


def test_lists_are_accepted_for_tuples():
    model = models.build(name="vgg", num_classes=3, layout=[4, "M", 6])
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    )
    assert variables["params"]["conv2"]["kernel"].shape == (3, 3, 4, 6)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "vgg16",
            (2, 16, 16, 3),
            r"shape \(2, 16, 16, 3\); this network needs .* height and width at least 32",
        ),
        ("small_cnn", (2, 7, 9, 3), r"shape \(2, 7, 9, 3\); this network needs .* at least 8"),
        (
            "resnet18",
            (32, 32, 3),
            r"shape \(32, 32, 3\); this network needs \[batch, height, width, channels\]",
        ),
        ("mlp", (784,), r"shape \(784,\); .* at least two axes"),
    ],
)
def test_wrong_images(name, shape, message):
    model = models.build(name=name, num_classes=2)
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros(shape))


def test_float64_needs_x64():
    model = models.build(name="mlp", num_classes=2, dtype="float64", param_dtype="float64")
    images = np.ones((2, 3))
    with pytest.raises(ValueError, match="jax runs in 32 bits"):
        model.init(jax.random.key(0), images)
    with jax.enable_x64(True):
        variables = model.init(KEY, images)
        assert variables["params"]["fc"]["kernel"].dtype == jnp.float64
        assert model.apply(variables, images).dtype == jnp.float64


def test_tanh():
    model = models.build(name="mlp", num_classes=3, widths=(4,), activation="tanh")
    images = default_rng(0).normal(size=(2, 3)).astype(np.float32)
    variables = model.init(KEY, images)
    params = variables["params"]
    hidden = np.tanh(images @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    expected = hidden @ params["fc"]["kernel"] + params["fc"]["bias"]
    assert_allclose(model.apply(variables, images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "vgg11", "mobilenet_v2"])
@pytest.mark.parametrize("dropout", [1, 1.0, 1.5, -0.1])
def test_dropout_leaves_something(name, dropout):
    with refused("dropout", dropout):
        models.build(name=name, num_classes=2, dropout=dropout)
    models.build(name=name, num_classes=2, dropout=0.999)
