"""Compact networks as Linen programs: those that equal groups.elastic, those that must be refused, and training."""

import functools

import flax.linen as nn
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsity_jax import groups, models, relaxed

RNG = functools.partial(np.random.default_rng, 0)
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
INDEX = jax.ShapeDtypeStruct((2,), jnp.int32)
ZOO = {
    "vgg": {"layout": (4, "M", 6, "M")},
    "mobilenet": {"stem_width": 4, "blocks": ((6, 2),)},
    "mobilenet_v2": {"stem_stride": 1, "blocks": ((1, 16, 1, 1), (2, 24, 1, 2))},
    "resnet": {"stage_sizes": (1, 1), "widths": (7, 8), "stem_width": 9, "inner_widths": (6, 5)},
    "small_cnn": {"widths": (4,), "dense_widths": (5,), "batch_norm": True},
}


class Layers(nn.Module):
    """The layers that the other networks lack; a branch of the widths of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvLocal(4, (2, 2), (2, 2), name="local")(x))
        x = nn.relu(nn.DenseGeneral((5, 3), name="general")(x))
        x = nn.relu(nn.DenseGeneral(6, axis=(-2, -1), name="merged")(x).mean((1, 2)))
        return nn.Dense(2, name="out")(nn.relu(nn.Einsum((6, 7), "bi,io->bo", name="einsum")(x)))


class Literal(nn.Module):
    """A hidden width in a shape of the code: of a parameter, of a reshape, or of a constant that is added."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="hidden")(x.mean((1, 2))))
        if self.kind == "parameter":
            x = x * self.param("gate", nn.initializers.ones, (6,))
        elif self.kind == "constant":
            x = x * np.linspace(1, 2, 6, dtype=np.float32)
        elif self.kind == "reshape":
            x = x.reshape(-1, 2, 3).swapaxes(1, 2).reshape(-1, 6)
        else:
            x = x * (x.sum(-1, keepdims=True) / x.shape[-1])
        return nn.Dense(2, name="out")(x)


class Small(nn.Module):
    features: int = 5

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.features, name="hidden")(x.mean((1, 2))))
        return nn.Dense(2, name="out")(x if x.shape[-1] == self.features else nn.Dense(9, name="fit")(x))


LINEN = {
    "densenet": (foreign.Densenet(), IMAGE),
    "resnext": (foreign.Resnext(), IMAGE),
    "depthwise": (foreign.Depthwise(), IMAGE),
    "unet": (foreign.Unet(), IMAGE),
    "gated": (foreign.Gated(), IMAGE, INDEX),
    "scanned": (foreign.Scanned(), IMAGE),
    "vit": (foreign.Vit(), IMAGE),
    "groupnorm": (foreign.Groupnorm(), IMAGE),
    "lstm": (foreign.Recurrent(nn.OptimizedLSTMCell), IMAGE),
    "layers": (Layers(), IMAGE),
}


def random(struct):
    integer = jnp.issubdtype(struct.dtype, jnp.integer)
    return jnp.asarray(RNG().integers(0, 2, struct.shape) if integer else RNG().normal(size=struct.shape), struct.dtype)


def filled(init, *inputs):
    """Random variables near 1 where they are vectors, with kernels that keep the size of activations."""
    rng = RNG()

    def one(leaf):
        if len(leaf.shape) < 2:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5, leaf.dtype)

    return jax.tree.map(one, jax.eval_shape(init, jax.random.key(0), *inputs))


def of_zoo(name, **options):
    model = models.build(name=name, num_classes=5, **(ZOO.get(name, {}) | options))
    return model, filled(model.init, IMAGE)


def network(name):
    """(apply, variables, inputs)."""
    if name in ZOO:
        model, variables = of_zoo(name)
        return model.apply, variables, (random(IMAGE),)
    module, *inputs = LINEN[name] if isinstance(name, str) else (name, IMAGE)
    return module.apply, filled(module.init, *inputs), tuple(map(random, inputs))


def thinned(apply, variables, *inputs, only="", sums="freeze"):
    """(channels, keep, compact variables) without every other channel of the groups whose names contain `only`."""
    channels = groups.trace(apply, variables, *inputs, sums=sums)
    keep = {name: np.arange(size) % 2 == 0 for name, size in channels.sizes.items() if only in name}
    assert keep, channels.names
    return channels, keep, jax.jit(lambda variables: groups.compact(variables, channels, keep))(variables)


def close(found, expected, tolerance=1e-5):
    """Asserts that all arrays of two trees agree, relative to the largest entry of any."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


# Exact


@pytest.mark.parametrize("name", [*ZOO, "densenet", "resnext", "depthwise", "unet", "gated", "scanned", "layers"])
def test_equals_the_masked_network(name):
    apply, variables, inputs = network(name)
    channels, keep, small = thinned(apply, variables, *inputs)
    run = relaxed.apply(apply, channels, keep, small, *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(small)) < 0.7 * sum(map(np.size, jax.tree.leaves(variables)))

    @jax.jit
    def compare(variables, small, *inputs):
        return run(small, *inputs), apply(groups.mask(variables, channels, keep), *inputs)

    close(*compare(variables, small, *inputs))


@pytest.mark.parametrize("name", ["small_cnn", "depthwise"])
def test_gradients_equal_those_of_elastic(name):
    apply, variables, inputs = network(name)
    channels, keep, small = thinned(apply, variables, *inputs)
    functions = relaxed.apply(apply, channels, keep, small, *inputs), groups.elastic(apply, channels, keep)
    square = lambda function: jax.grad(lambda small: jnp.sum(function(small, *inputs) ** 2))
    close(*jax.jit(lambda small: [square(function)(small) for function in functions])(small))


def test_training_equals_training_of_the_masked_network():
    model, variables = of_zoo("vgg")
    images, labels = random(IMAGE), jnp.array([1, 3])
    channels, keep, small = thinned(model.apply, variables, images)
    apply_train = relaxed.apply(model.apply_train, channels, keep, small, IMAGE, traced=model.apply)

    def trained(apply_train, restrict, variables):
        def loss_fn(params, batch_stats):
            logits, batch_stats = apply_train({"params": params, "batch_stats": batch_stats}, images)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), batch_stats

        def step(variables, _):
            grads, batch_stats = jax.grad(loss_fn, has_aux=True)(variables["params"], variables["batch_stats"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
            return {"params": restrict(params), "batch_stats": batch_stats}, None

        return jax.lax.scan(step, {name: variables[name] for name in ("params", "batch_stats")}, length=3)[0]

    @jax.jit
    def both(variables, small):
        mask = lambda tree: groups.mask(tree, channels, keep)
        masked = trained(model.apply_train, mask, mask(variables))
        return trained(apply_train, lambda params: params, small), groups.compact(masked, channels, keep)

    found, expected = both(variables, small)
    close(found, expected)
    assert float(jnp.abs(found["params"]["conv1"]["kernel"] - small["params"]["conv1"]["kernel"]).max()) > 1e-3
    assert float(jnp.abs(found["batch_stats"]["bn1"]["mean"] - small["batch_stats"]["bn1"]["mean"]).max()) > 1e-3


def test_other_image_sizes_and_dropout():
    model, variables = of_zoo("vgg", dropout=0.5)
    channels, keep, small = thinned(model.apply, variables, IMAGE)
    train = relaxed.apply(model.apply_train, channels, keep, small, IMAGE, traced=jax.jit(model.apply))
    logits, _ = jax.eval_shape(train, small, jnp.ones((7, 12, 16, 3)), key=jax.random.key(0))
    assert logits.shape == (7, 5)


def test_fields_set_the_widths_that_modules_hold():
    apply, variables, inputs = network(Small())
    channels, keep, small = thinned(apply, variables, *inputs)
    with pytest.raises(
        ValueError, match=r"raises ScopeParamNotFoundError.*\"/fit\".*hidden/kernel \(3, 5\) -> \(3, 3\)"
    ):
        relaxed.apply(apply, channels, keep, small, *inputs)
    run = relaxed.apply(apply, channels, keep, small, *inputs, fields={"": {"features": 3}})
    close(*jax.jit(lambda v: (run(v, *inputs), groups.elastic(apply, channels, keep)(v, *inputs)))(small))
    with pytest.raises(ValueError, match=r"matches none of the modules \['', 'hidden', 'fit'\]"):
        relaxed.apply(apply, channels, keep, small, *inputs, fields={"hiden": {"features": 3}})
    with pytest.raises(ValueError, match="fields set 'width' of '', but Small has no such field"):
        relaxed.apply(apply, channels, keep, small, *inputs, fields={"": {"width": 3}})


def of_attention(axis):
    """The small ViT without the second entry of one axis of its queries: heads (1) or entries of a head (2)."""
    apply, variables, inputs = network("vit")
    channels = groups.trace(apply, variables, *inputs, sums="freeze")
    query = lambda member: "query/kernel" in member.path and member.axis == axis
    keep = {name: np.arange(g.size) != 1 for name, g in channels.groups.items() if any(map(query, g.members))}
    assert len(keep) == 1
    return apply, channels, keep, groups.compact(variables, channels, keep), *inputs


def test_attention_without_a_head_is_exact():
    relaxed.apply(*of_attention(1))


# Refused


def refused(name, match, **options):
    apply, variables, inputs = network(name)
    channels, keep, small = thinned(apply, variables, *inputs, **options)
    with pytest.raises(ValueError, match=match):
        relaxed.apply(apply, channels, keep, small, *inputs)


def test_attention_of_smaller_heads_is_refused():
    message = r"heads of 3 instead of 4.*'attention' \(Multi.*\) divides its scores.*attention/(key|query)/"
    with pytest.raises(ValueError, match=message):
        relaxed.apply(*of_attention(2))


@pytest.mark.parametrize(
    ("name", "match", "options"),
    [
        ("vit", r"ScopeParamShapeError.*a number of channels is written.*arrays: .*params/token", {"sums": "allow"}),
        ("groupnorm", r"'norm' \(GroupNorm\) divides the remaining.*params/norm/\w+ \(12,\) -> \(", {"sums": "allow"}),
        ("lstm", r"'OptimizedLSTMCell_0' \(OptimizedLSTMCell\) carries a state.*LSTMCell_0/\w+/", {"only": "LSTM"}),
    ],
)
def test_modules_that_are_other_functions_at_other_widths(name, match, options):
    refused(name, match, **options)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            "parameter",
            r'ScopeParamShapeError, .*"gate".*a number of channels is written in the code.*params/gate \(6,\)',
        ),
        ("constant", "raises .*ncompatible shapes.*a number of channels is written in the code"),
        ("reshape", "raises .*cannot reshape.*hidden/kernel"),
        ("mean", "is summed over without weights.*something is averaged over channels"),
    ],
)
def test_widths_in_the_code(kind, match):
    refused(Literal(kind), match, sums="allow")


class Normed(nn.Module):
    norm: type
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="hidden")(x))
        return nn.Dense(2, name="out")(self.norm(**dict(self.options), name="norm")(x).mean((1, 2)))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_statistics_over_removed_channels(norm):
    message = (
        rf"summed over without weights.*'norm' \({norm.__name__}\) takes its statistics.*sums='freeze'.*params/norm"
    )
    refused(Normed(norm), message, sums="allow")


def test_whole_groups_of_a_group_norm():
    message = r"differ from groups\.elastic .*'norm' \(GroupNorm\) divides the remaining.*norm/bias \(16,\) -> \(8,\)"
    refused(Normed(nn.GroupNorm, (("num_groups", 4),)), message)


def test_padded_shortcuts():
    model, variables = of_zoo("resnet", shortcut="zero_pad", stem_width=7)
    channels, keep, small = thinned(model.apply, variables, IMAGE)
    with pytest.raises(ValueError, match=r"'stage\d_block0' raises .*a number of channels is written in the code"):
        relaxed.apply(model.apply, channels, keep, small, IMAGE)


def test_functions_that_call_no_linen_module():
    apply, variables, inputs = foreign.plain()
    channels, keep, small = thinned(apply, variables, *inputs)
    with pytest.raises(ValueError, match=r"calls no Flax Linen module.*groups\.elastic runs"):
        relaxed.apply(apply, channels, keep, small, *inputs)


class Scaled(nn.Module):
    """Neither raises nor sums, but uses its number of channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="hidden")(x.mean((1, 2))))
        return nn.Dense(2, name="out")(x / x.shape[-1] ** 0.5)


def test_results_that_tell_nothing():
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(2, name="out")(nn.relu(nn.Dense(6, name="hidden")(x.mean((1, 2)))))
            return nn.relu(x - 1e6)

    refused(Constant(), "largest result at random parameters is 0, so that nothing could be compared")


def test_the_comparison_finds_what_the_trace_does_not():
    apply, variables, inputs = network(Scaled())
    channels, keep, small = thinned(apply, variables, *inputs)
    message = r"differ from groups\.elastic by .* of their range; allowed: 0\.0001.*hidden/bias \(6,\) -> \(3,\)"
    with pytest.raises(ValueError, match=message):
        relaxed.apply(apply, channels, keep, small, *inputs)
    run = relaxed.apply(apply, channels, keep, small, *inputs, tolerance=None)
    assert jax.eval_shape(run, small, *inputs).shape == (2, 2)
    with pytest.raises(ValueError, match=r"hidden/bias has shape \(6,\); the compact variables have \(3,\) there"):
        run(variables, *inputs)
