"""Ratios of layers: the original's notations and exclusions, published speed-ups, order by the
program, errors.
"""

import functools
import math

import foreign
import golden_data
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_array_equal
from test_models import created

from sparsity_jax import allocate, cost, groups, masks, models, ratios, tables
from sparsity_jax.models import vgg

FILE = "09_stage_pr.npz"
GOLDEN = golden_data.load(FILE)
GRANULARITIES = ("filter", "channel", "weight")
RESIDUAL = golden_data.parts(FILE, r"resnet/(\w+)/")
SINGLE = golden_data.parts(FILE, r"single/(\w+)/")


# The original -------------------------------------------------------------------------------------


def golden(key):
    """(notation, skip, layers, ratios by granularity, all stored arrays of the network)."""
    own = GOLDEN.under(key)
    text = lambda name: str(own[name][0])
    return text("stage_pr"), text("skip_layers"), own["layer_names"].tolist(), own


NETWORKS = [f"resnet/{name}" for name in RESIDUAL] + [f"single/{name}" for name in SINGLE]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("key", NETWORKS)
def test_ratios_of_the_original(key, granularity):
    notation, skip, layers, own = golden(key)
    table = ratios.parse(notation, layers, granularity=granularity, skip=skip, reading="original")
    assert list(table) == layers
    assert_array_equal(list(table.values()), own[f"pr_{granularity}"])


@pytest.mark.parametrize("name", RESIDUAL)
def test_places_of_the_original(name):
    _, _, layers, own = golden(f"resnet/{name}")
    for layer, (stage, block, conv) in zip(
        ratios.places(layers), own["stage_seq_block"], strict=True
    ):
        assert layer.address == ((stage,) if block == -9 else (stage, block, conv)), layer


@pytest.mark.parametrize("key", NETWORKS)
def test_layers_are_counted_as_in_the_original(key):
    """A projection shortcut has the number of the layer before it."""
    _, _, layers, own = golden(key)
    counted = [layer.address[2:] != (-1,) for layer in ratios.places(layers)]
    assert_array_equal(np.cumsum(counted) - 1, own["layer_index"])


@pytest.mark.parametrize("i", golden_data.parts(FILE, r"single_branch_parse/(\d+)/"))
def test_ranges_of_the_original(i):
    expected = GOLDEN[f"single_branch_parse/{i}/ratio"]
    layers = [f"layer {j}" for j in range(len(expected))]
    table = ratios.parse(str(GOLDEN[f"single_branch_parse/{i}/spec"][0]), layers)
    assert_array_equal(list(table.values()), expected)


@pytest.mark.parametrize("i", golden_data.parts(FILE, r"list_parse/(\d+)/"))
def test_lists_of_the_original(i):
    items = GOLDEN[f"list_parse/{i}/items"].tolist()
    text = str(GOLDEN[f"list_parse/{i}/spec"][0])
    # a list of ratios begins with that of the first stage, 0; no list of places to skip does
    if items[0] == "0":
        layers = [
            "stem",
            *(f"stage{stage}_block0/conv1" for stage in range(1, len(items) - 1)),
            "fc",
        ]
        table = ratios.parse(text, layers, granularity="weight")
        assert list(table.values()) == [float(item) for item in items]
        return
    blocks = range(1 + max(int(part) for item in items for part in item.split(".")))
    layers = [
        "stem",
        *(f"stage{s}_block{b}/conv{c}" for s in blocks if s for b in blocks for c in (1, 2)),
        "fc",
    ]
    skipped = {
        layer.path
        for layer in ratios.places(layers)
        for item in items
        if in_place(layer.address, item)
    }
    table = ratios.parse(((".*", 0.5),), layers, granularity="weight", skip=text)
    assert {path for path, ratio in table.items() if ratio == 0} == skipped != set()


def in_place(address, item):
    parts = item.split(".")
    return [str(part) for part in address[: len(parts)]] == parts


def test_prefixes_are_whole_numbers_unless_read_as_the_original():
    layers = ["conv1", *(f"stage1_block{i}/conv{j}" for i in range(12) for j in (1, 2)), "fc"]
    parse = functools.partial(ratios.parse, "[0,0.5,0]", layers, skip="[1.1]")
    half = lambda table: [path for path, ratio in table.items() if ratio]
    kept = [f"stage1_block{i}/conv1" for i in range(12)]
    assert half(parse()) == [path for path in kept if "block1/" not in path]
    assert half(parse(reading="original")) == [
        path for path in kept if "block1" not in path
    ]  # also blocks 10 and 11
    assert len(half(parse(granularity="weight"))) == 22
    assert (
        len(half(parse(granularity="weight", reading="original"))) == 24
    )  # which skips nothing there


# The order of layers ------------------------------------------------------------------------------


def called(apply, variables, *inputs):
    """Paths of the modules with a kernel, in the order in which they are called first."""
    found = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, (nn.Conv, nn.Dense)):
            found.append(f"params/{'/'.join(context.module.path)}/kernel")
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(
            lambda *args: apply(*args), variables, *inputs
        )  # anew: jax remembers traces of `apply`
    return list(dict.fromkeys(found))


def network(name):
    """(apply, shapes of variables, images) of a row of the zoo."""
    model, variables, images = created(name)
    return model.apply, variables, images


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_order_of_the_zoo(name):
    apply, variables, images = network(name)
    layers = ratios.order(apply, variables, images)
    assert layers == called(apply, variables, images)
    assert layers[-1] == "params/fc/kernel"
    assert set(layers) == set(allocate.prunable(variables, "kernels"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nnx", "conv1 conv2 out"),
        ("equinox", "0 3 6 8"),
        ("gated", "stem shared squeeze excite out"),
        ("unet", "down1 down2 middle up2 merge2 up1 out"),
        ("scanned", "stem up down out"),
        ("gru", "embed hn ir hr iz hz in out"),
        ("plain", "w"),
    ],
)
def test_order_in_other_frameworks(name, expected):
    apply, variables, inputs = foreign.FOREIGN[name]()
    found = ratios.order(apply, variables, *inputs)
    parts = expected.split()
    named = [
        next((part for part in reversed(path.split("/")) if part in parts), None) for path in found
    ]
    if name == "gru":  # gates: the order is the cell's affair
        assert sorted(named) == sorted(parts)
        assert [named[0], named[-1]] == ["embed", "out"]
    else:
        assert named == parts


def test_order_ignores_what_happens_before_the_products():
    def apply(variables, x):
        half = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16), variables
        )  # in the order of names
        body = lambda x: jnp.tanh(x @ half["b"]["kernel"])
        x = jax.lax.while_loop(
            lambda x: (x @ half["d"]["kernel"]).sum() < 0, body, x.astype(jnp.bfloat16)
        )
        return (
            jax.jit(jax.checkpoint(lambda x: x @ half["c"]["kernel"].T))(x)
            + half["a"]["kernel"].sum()
        )

    variables = {name: {"kernel": jnp.zeros((4, 4))} for name in "abcd"}
    assert ratios.order(apply, variables, jnp.ones((2, 4))) == ["d/kernel", "b/kernel", "c/kernel"]


# Places and rules ---------------------------------------------------------------------------------


def test_a_network_with_other_names():
    layers = [
        "stem.0",
        "stem.1",
        "s0.b1.a",
        "s0.b1.b",
        "s0.b2.proj",
        "s0.b2.a",
        "s0.b2.b",
        "mid",
        "s3.b1.a",
        "out",
    ]
    pattern = r"s(?P<stage>\d)\.b(?P<block>\d)\.(?P<shortcut>proj)?.*"
    found = ratios.places(layers, pattern)
    assert [layer.address for layer in found] == [
        (0,),
        (0,),
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, -1),
        (1, 1, 0),
        (1, 1, 1),
        (1,),
        (2, 0, 0),
        (3,),
    ]
    assert [layer.path for layer in found if "filter" in layer.whole] == [
        "s0.b1.b",
        "s0.b2.proj",
        "s0.b2.b",
        "s3.b1.a",
    ]
    assert [layer.path for layer in found if "channel" in layer.whole] == [
        "s0.b1.a",
        "s0.b2.proj",
        "s0.b2.a",
        "s3.b1.a",
    ]
    table = ratios.parse(
        (0.1, 0.2, 0.3, 0.4), layers, granularity="weight", blocks=pattern, skip=["1.1"]
    )
    assert list(table.values()) == [0.1, 0.1, 0.2, 0.2, 0, 0, 0, 0.2, 0.3, 0.4]
    plain = r"s(?P<stage>\d)\.b(?P<block>\d)\..*"
    assert ratios.places(layers, plain)[4].address == (1, 1, 0)


RESNET = [
    "conv1",
    "stage1_block0/conv1",
    "stage1_block0/conv2",
    "stage2_block0/conv1",
    "stage2_block0/conv2",
]
RESNET += ["stage2_block0/shortcut_conv", "fc"]
VGG = ["conv1", "conv2", "conv3", "fc"]


def test_rules_on_paths():
    rules = (("stage2.*", 0.25), ("fc", -1), (".*", 0.5))
    assert list(ratios.parse(rules, RESNET).values()) == [0.5, 0.5, 0, 0.25, 0, 0, "gap"]
    assert list(ratios.parse(rules, RESNET, granularity="channel").values()) == [
        0.5,
        0,
        0.5,
        0,
        0.25,
        0,
        "gap",
    ]
    assert list(ratios.parse(rules, RESNET, granularity="weight").values()) == [
        0.5,
        0.5,
        0.5,
        0.25,
        0.25,
        0.25,
        "gap",
    ]
    assert list(ratios.parse([["conv.*", 0.5], ["fc", 0]], VGG, skip="1").values()) == [
        0.5,
        0,
        0.5,
        0,
    ]


def test_automatic_ratios():
    gap = "gap"
    assert list(ratios.parse("[0-2:-1]", VGG).values()) == [gap, gap, gap, 0]
    assert list(ratios.parse("[0,gap,-1.0,0]", RESNET).values()) == [0, gap, 0, gap, 0, 0, 0]


@pytest.mark.parametrize(
    ("notation", "layers", "options", "where", "value"),
    [
        ("[0,0.5]", RESNET, {}, "ratios", ["0", "0.5"]),
        ("[0,0.5,0,0,0]", RESNET, {}, "ratios", ["0", "0.5", "0", "0", "0"]),
        ("[0,0.5,x,0]", RESNET, {}, "ratios[2]", "x"),
        ("[0,0.5,1,0]", RESNET, {}, "ratios[2]", "1"),
        ("[0,0.5,-0.5,0]", RESNET, {}, "ratios[2]", "-0.5"),
        ("[0,0.5,nan,0]", RESNET, {}, "ratios[2]", "nan"),
        ((0, 0.5, True, 0), RESNET, {}, "ratios[2]", True),
        ("[0,0.5,,0]", RESNET, {}, "ratios", "[0,0.5,,0]"),
        ("[0,0.5,0.5,0", RESNET, {}, "ratios", "[0,0.5,0.5,0"),
        ("[]", RESNET, {}, "ratios", "[]"),
        ("[0-3:0.5]", RESNET, {}, "ratios", "[0-3:0.5]"),
        ("[0,0.5,0.5,0]", VGG, {}, "ratios", "[0,0.5,0.5,0]"),
        ("[0-4:0.5]", VGG, {}, "ratios[0]", "0-4:0.5"),
        ("[2-1:0.5]", VGG, {}, "ratios[0]", "2-1:0.5"),
        ("[0-2;0.5:1]", VGG, {}, "ratios[0]", "0-2;0.5:1"),
        ("[0-2:0.5, 0.3]", VGG, {}, "ratios[1]", "0.3"),
        ("[0-2:]", VGG, {}, "ratios[0]", ""),
        ("[0-2:1.5]", VGG, {}, "ratios[0]", "1.5"),
        (0.5, VGG, {}, "ratios", 0.5),
        ("[0-2:0.5]", VGG, {"skip": "[4]"}, "skip", "4"),
        ("[0-2:0.5]", VGG, {"skip": "[1.0]"}, "skip", "1.0"),
        ("[0,0.5,0.5,0]", RESNET, {"skip": "[1.1]"}, "skip", "1.1"),
        ("[0,0.5,0.5,0]", RESNET, {"skip": "[a]"}, "skip", "a"),
        ((("conv1", 0.5, 1),), VGG, {}, "ratios[0]", ("conv1", 0.5, 1)),
        ((("conv1", 0.5), 0.1), VGG, {}, "ratios[1]", 0.1),
        ((("conv1", 1.0), (".*", 0)), VGG, {}, "ratios[0]", 1.0),
        ((("stage1.*conv2", 0.5), (".*", 0)), RESNET, {}, "ratios[0]", "stage1.*conv2"),
        ("[0-2:0.5]", VGG, {"blocks": r"conv(?P<stage>\d)"}, "blocks", r"conv(?P<stage>\d)"),
        ("[0-2:0.5]", VGG, {"blocks": "(?P<stage>conv)(?P<block>.)"}, "blocks", "conv"),
    ],
)
def test_mistakes(notation, layers, options, where, value):
    with pytest.raises(tables.ConfigError) as error:
        ratios.parse(notation, layers, **options)
    assert (error.value.where, error.value.value) == (where, value)


@pytest.mark.parametrize(
    ("notation", "options"),
    [
        ((("conv9", 0.5), (".*", 0)), {}),
        ((("conv1", 0.5),), {}),
        ((("conv[", 0.5),), {}),
        ("[0-2:0.5]", {"granularity": "row"}),
        ("[0-2:0.5]", {"reading": "mine"}),
    ],
)
def test_patterns_and_options_are_checked(notation, options):
    with pytest.raises(tables.ConfigError):
        ratios.parse(notation, VGG, **options)


# Another network's ratios -------------------------------------------------------------------------


def test_inherited():
    rng = np.random.default_rng(0)
    keep_in, keep_out = rng.random(6) < 0.5, rng.random(8) < 0.5
    kernel = np.broadcast_to(keep_in[:, None] & keep_out, (3, 3, 6, 8)) & (
        rng.random((3, 3, 6, 8)) < 0.9
    )
    own = {"conv/kernel": kernel, "conv/bias": keep_out, "fc/kernel": np.ones((8, 2), bool)}
    layers = ["conv/kernel", "fc/kernel"]
    for granularity, kept in (("filter", keep_out), ("channel", keep_in), ("weight", kernel)):
        found = ratios.kept_groups(own, layers, granularity=granularity)
        assert_array_equal(found["conv/kernel"], kept)
        table = ratios.inherited(own, layers, granularity=granularity)
        assert table == {"conv/kernel": pytest.approx(1 - kept.mean()), "fc/kernel": 0}
        assert masks.num_pruned(table["conv/kernel"], kept.size) == (~kept).sum()
    by_group = {"conv/kernel": keep_out, "fc/kernel": np.ones(2, bool)}
    assert (
        ratios.inherited(by_group, layers, granularity="filter")["conv/kernel"]
        == 1 - keep_out.mean()
    )
    with pytest.raises(ValueError, match=r"mask is 'conv2/kernel'; .* Did you mean 'conv/kernel'"):
        ratios.kept_groups(own, ["conv2/kernel"], granularity="filter")
    with pytest.raises(ValueError, match="allowed: bool"):
        ratios.kept_groups(by_group, layers, granularity="weight")
    with pytest.raises(ValueError, match="allowed: bool"):
        ratios.kept_groups({"conv/kernel": kernel * 1.0}, ["conv/kernel"], granularity="filter")
    with pytest.raises(ValueError, match="keeps nothing"):
        ratios.inherited({"w": np.zeros((2, 2), bool)}, ["w"], granularity="weight")


def test_inherited_masks_of_unknown_layout_are_refused():
    given = {"conv/weight": np.ones((8, 6, 3, 3), bool)}  # [out, in, height, width]
    with pytest.raises(ValueError, match="layout="):
        ratios.kept_groups(given, ["conv/weight"], granularity="filter")


@hypothesis.given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
@hypothesis.example(25, 0.3)  # 7 of them
def test_inherited_counts_are_exact(size, share):
    removed = int(share * size)
    (ratio,) = ratios.inherited(
        {"w": np.arange(size) >= removed}, ["w"], granularity="filter"
    ).values()
    assert masks.num_pruned(ratio, size) == removed
    assert ratio == pytest.approx(removed / size, rel=1e-15)


# Speed-up -----------------------------------------------------------------------------------------


def traced(options, side, num_classes):
    """(layers, channels, FLOPs of a table) of a network; nothing is computed."""
    model = models.build(num_classes=num_classes, **options)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    channels = groups.trace(model.apply, variables, images)
    flops = cost.of_channels(channels, "flops")
    return (
        ratios.order(model.apply, variables, images),
        channels,
        lambda t: flops(ratios.keep_of(channels, t)),
    )


@functools.cache
def published(name):
    return traced(
        {
            "vgg19": dict(name="vgg", layout=vgg.stages(19, 64)[:-1], conv_bias=False),
            "resnet56": dict(name="resnet56"),
            "resnet34": dict(name="resnet34", stem="imagenet"),
            "resnet50": dict(name="resnet50", stem="imagenet"),
        }[name],
        *{"vgg19": (32, 100), "resnet56": (32, 10)}.get(name, (224, 1000)),
    )


@pytest.mark.parametrize(
    ("name", "notation", "skip", "expected"),
    [
        ("resnet56", "[0,0.75,0.75,0.32,0]", "", 2.55),
        (
            "vgg19",
            "[1-15:0.7]",
            "",
            8.89,
        ),  # published as 8.84: its counter is not that of the others
        ("resnet34", "[0,0.5,0.6,0.4,0,0]", "[1.0,2.0,2.3,3.0,3.5]", 1.32),
        ("resnet50", "[0,0.3,0.3,0.3,0.14,0]", "", 1.49),
        ("resnet50", "[0,0.6,0.6,0.6,0.21,0]", "", 2.31),
        ("resnet50", "[0,0.74,0.74,0.6,0.21,0]", "", 2.56),
        ("resnet50", "[0,0.68,0.68,0.68,0.5,0]", "", 3.06),
    ],
)
def test_published_speedups(name, notation, skip, expected):
    layers, _, flops = published(name)
    dense, pruned = (
        flops(dict.fromkeys(layers, 0.0)),
        flops(ratios.parse(notation, layers, skip=skip)),
    )
    assert round(dense / pruned, 2) == expected


def test_every_channel_inside_blocks_goes_by_the_ratio_of_its_stage():
    layers, channels, _ = published("resnet56")
    kept = ratios.keep_of(channels, ratios.parse("[0,0.75,0.5,0.32,0]", layers))
    assert kept.keys() == channels.groups.keys()
    sizes = sorted(
        int(keep.sum()) for name, keep in kept.items() if "block" in name and keep.sum() < len(keep)
    )
    assert sizes == [4] * 9 + [16] * 9 + [43] * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1/kernel": 0.5}, "ratio is 'conv1/kernel'; allowed"),
        ({"params/fc/kernel": 0.5}, "no filter of 'params/fc/kernel' can be removed"),
        ({"params/conv1/kernel": 0.5}, "layers with different ratios"),
        ({"params/stage1_block0/conv2/kernel": 1.0}, "the ratio of .* is 1.0"),
        ({"params/stage1_block0/conv1/kernel": "gap"}, "is 'gap'; allowed"),
    ],
)
def test_keep_of_refuses(change, message):
    layers, channels, _ = published("resnet56")
    with pytest.raises(ValueError, match=message):
        ratios.keep_of(channels, dict.fromkeys(layers, 0.0) | change)


@functools.cache
def small():
    return traced(
        dict(name="resnet", stage_sizes=(1, 1), widths=(6, 9), inner_widths=(7, 11)), 8, 5
    )


@pytest.mark.parametrize("notation", ["[0,0.5,0.5,0]", "[0,0.9,0.3,0]", "[0,0.4,0,0]"])
def test_smallest_factor_for_a_speedup(notation):
    layers, _, flops = small()
    table = ratios.parse(notation, layers)
    dense = flops(dict.fromkeys(layers, 0.0))
    speedups = []
    for i in range(331):  # every factor on the grid, in turn
        scaled = {path: min(i / 100 * ratio, 0.9) for path, ratio in table.items()}
        speedups.append(dense / flops(scaled))
    for target in (1.0, 1.2, 1.5, 2.0):
        reached = [i for i, speedup in enumerate(speedups) if speedup >= target]
        if not reached:
            with pytest.raises(ValueError, match=f"{max(speedups):.4g}"):
                ratios.for_speedup(flops, target, table, highest=0.9, steps=100)
            continue
        found = ratios.for_speedup(flops, target, table, highest=0.9, steps=100)
        factor = min(reached) / 100
        assert found == {path: min(factor * ratio, 0.9) for path, ratio in table.items()}


def test_one_ratio_for_a_published_speedup():
    layers, _, flops = published("resnet56")
    ones = {
        path: 1.0 if ratio else 0.0
        for path, ratio in ratios.parse("[0,0.5,0.5,0.5,0]", layers).items()
    }
    found = ratios.for_speedup(flops, 2.55, ones)
    speedup = flops(dict.fromkeys(layers, 0.0)) / flops(found)
    assert 2.55 <= speedup < 2.62  # 19 of 32 channels; 18 reach 2.51
    (ratio,) = set(found.values()) - {0.0}
    assert ratio == round(ratio, 4)


@pytest.mark.parametrize(
    ("target", "table", "message"),
    [
        (0.5, {"a": 1.0}, "target is 0.5"),
        (math.nan, {"a": 1.0}, "target is nan"),
        (2.0, {"a": 0.0}, "proportions"),
        (2.0, {"a": -1.0}, "proportions"),
    ],
)
def test_speedup_refuses(target, table, message):
    with pytest.raises(ValueError, match=message):
        ratios.for_speedup(lambda table: 1 - sum(table.values()), target, table)
