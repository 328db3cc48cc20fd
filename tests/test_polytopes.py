"""Feasible sets: golden numbers of the original, brute force, and properties."""

import fractions
import itertools
import math

import golden_data
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny import complains

from sparsity_jax import groups, models, originals, polytopes, trees

FILE = "01_constraints.npz"
GOLDEN = golden_data.load(FILE)
SHAPES = golden_data.parts(FILE, r"(x\w+)/ksparse/")
INPUTS = golden_data.parts(FILE, rf"{SHAPES[0]}/(\w+)$")
call = jax.jit(
    lambda constraint, x, method: getattr(constraint, method)(x), static_argnames="method"
)
CLOSE = dict(rtol=1e-9, atol=1e-11)
KEY = jax.random.key(0, impl="rbg")  # compiles five times faster than the default


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_k_sparse_matches_the_original(shape):
    cases = [
        name for name in GOLDEN if name.startswith(f"{shape}/ksparse/") and name.endswith("/params")
    ]
    assert cases
    for case in cases:
        _, k, value, radius, diameter = GOLDEN[case]
        mode = case.split("/")[2].rstrip("0123456789")
        size = GOLDEN[f"{shape}/{INPUTS[0]}"].size
        built = polytopes.k_sparse(
            size, 1.0, k=int(GOLDEN[case][0]), k_frac=0.0, tau=value, mode=mode
        )
        assert built.k == k
        assert_allclose([built.radius, built.diameter(size)], [radius, diameter], **CLOSE)
        compared = 0
        for operation, name in itertools.product(("lmo", "shift_inside"), INPUTS):
            key = case.replace("params", f"{operation}/{name}")
            if key in GOLDEN:
                x = jnp.asarray(GOLDEN[f"{shape}/{name}"])
                assert_allclose(call(built, x, operation), GOLDEN[key], err_msg=key, **CLOSE)
                compared += 1
        assert compared
        threes = GOLDEN[case.replace("params", "shift_inside/threes")]
        shifted = call(built, jnp.full(threes.shape, 3.0), "shift_inside")
        rounded = (size - 1) / size  # its floor of a rounded quotient may lose one entry
        closest = min((shifted, shifted * rounded), key=lambda x: np.abs(x - threes).max())
        assert_allclose(closest, threes, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", golden_data.parts(FILE, rf"{SHAPES[0]}/lp([^/]+)/"))
def test_lp_balls_match_the_original(shape, p):
    for mode in ("radius", "diameter"):
        prefix = f"{shape}/lp{p}/{mode}"
        _, _, value, radius, diameter = GOLDEN[f"{prefix}/params"]
        size = GOLDEN[f"{shape}/{INPUTS[0]}"].size
        ball = polytopes.lp_ball(
            size, 1.0, p=float(p), tau=value, mode=mode, zero_up=True, zero_below=1e-10
        )
        assert_allclose([ball.radius, ball.diameter(size)], [radius, diameter], **CLOSE)
        operations = {"lmo": "lmo", "shift_inside": "shift_inside", "euclidean_project": "project"}
        compared = 0
        for (operation, method), name in itertools.product(operations.items(), INPUTS):
            key = f"{prefix}/{operation}/{name}"
            if key in GOLDEN:
                assert_allclose(
                    call(ball, jnp.asarray(GOLDEN[f"{shape}/{name}"]), method),
                    GOLDEN[key],
                    err_msg=key,
                    **CLOSE,
                )
                compared += 1
        assert compared


def test_constant_tensors_keep_all_their_entries():
    """n equal entries are n vertices' worth: the original's floor of a rounded quotient gives n or
    n - 1.
    """
    sizes = GOLDEN["constant_tensor_factor/n"]
    shift = jax.jit(lambda x, k: polytopes.KSparse(k, 0.5).shift_inside(x))
    for n in sizes[:: len(sizes) // 4].tolist():  # every shape is a program of its own
        assert_allclose(shift(np.full(n, 3.0), n) * n / 0.5, n, **CLOSE)
    for dtype in golden_data.parts(FILE, r"constant_tensor_factor/(float\d+)"):
        lost = sizes - np.round(GOLDEN[f"constant_tensor_factor/{dtype}"])
        assert set(lost.tolist()) <= {0, 1}


def test_radii_in_other_norms_are_the_originals():
    for p, other, size, radius, expected in GOLDEN["convert_lp_radius"].tolist():
        diameter = float(polytopes.LpBall(radius, p).diameter(int(size)))
        ball = polytopes.lp_ball(int(size), 1.0, p=other, tau=diameter, mode="diameter")
        assert ball.radius == pytest.approx(expected, rel=1e-9)


def network_of_the_original():
    """Shapes of the parameters of its small network, by our path, in its order."""
    names = [str(name) for name in GOLDEN["model/param_names"]]
    shapes = golden_data.shapes_of(GOLDEN["model/param_shapes"])
    return dict(zip(golden_data.paths(names, shapes).values(), shapes, strict=True))


def golden_rules(setting):
    hyper = golden_data.hyper(FILE)[f"model_ksparse_{setting}"]
    return dict(
        k=hyper["K"] or 0, k_frac=hyper["K_frac"] or 0.0, tau=hyper["value"], mode=hyper["mode"]
    )


@pytest.mark.parametrize("setting", golden_data.parts(FILE, r"model/ksparse/(\w+)/"))
def test_sets_of_a_network_match_the_original(setting):
    """Radii from measured norms; the original keys them by shape, `share_by_shape` reproduces
    that.
    """
    network = network_of_the_original()
    paths = list(network)
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float64) for path, shape in network.items()}
    norms = dict.fromkeys(paths, 1.0)
    measured = f"model/ksparse/{setting}/measured_avg_norm"
    if measured in GOLDEN:
        given = dict(zip(paths, GOLDEN[measured]))
        leaves = [str(name).rpartition(".")[2] for name in GOLDEN["model/param_names"]]
        assert (
            GOLDEN[f"model/ksparse/{setting}/measured_layer_type"].tolist() == leaves
        )  # in the parameters' order
        norms = originals.share_by_shape(given, params, paths)
        assert_allclose(
            [norms[n] for n in paths], GOLDEN[f"model/ksparse/{setting}/norm_used"], **CLOSE
        )
    rules = polytopes.check(dict(name="k_sparse", **golden_rules(setting)))
    sets = polytopes.build(params, norms, rules)
    ours = [(sets[n].k, sets[n].radius, sets[n].diameter(params[n].size)) for n in paths]
    assert_allclose(ours, GOLDEN[f"model/ksparse/{setting}/K_radius_diameter"], **CLOSE)


def test_networks_start_with_the_originals_norms():
    """Means over 100 drawings on both sides, which differ by 2 % where an array has ten entries."""
    network = network_of_the_original()
    own = models.layers.INITIALIZERS["torch"]
    fan_in = {
        path: int(number)
        for path, number in zip(network, GOLDEN["model/param_fan_in"], strict=True)
        if number
    }
    assert fan_in == {
        path: math.prod(shape[1:]) for path, shape in network.items() if len(shape) > 1
    }

    def drawn(path, shape):
        """100 drawings [..., 100 * out] in one call: more outputs change nothing in how each is
        drawn.
        """
        kernel = f"{path.rpartition('/')[0]}/kernel"
        if len(shape) > 1:
            return (own.conv if len(shape) == 4 else own.dense)(
                KEY, (*shape[2:], shape[1], 100 * shape[0])
            )
        if kernel in fan_in:
            return own.bias(fan_in[kernel])(KEY, (100 * shape[0],))
        return np.full(100 * shape[0], float(path.endswith("scale")))  # of a norm

    arrays = [
        np.asarray(drawn(path, shape)).reshape(-1, 100, shape[0]) for path, shape in network.items()
    ]
    norms = [np.sqrt(np.square(array).sum((0, 2))).mean() for array in arrays]
    for setting in golden_data.parts(FILE, r"model/ksparse/(\w+)/measured_avg_norm"):
        measured = GOLDEN[f"model/ksparse/{setting}/measured_avg_norm"]
        assert_allclose(norms, measured, rtol=0.08)


def test_a_later_array_of_equal_shape_overwrites_in_the_order_of_modules():
    options = dict(widths=(8, 8, 16), dense_widths=(16,), batch_norm=True)
    network = models.build(name="small_cnn", num_classes=10, **options)
    variables = network.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    apply = lambda params: network.apply({**variables, "params": params}, jnp.zeros((1, 8, 8, 1)))
    order = groups.order_of_use(apply, variables["params"])
    assert order.index("bn3/scale") < order.index("bn3/bias") < order.index("dense1/kernel")
    own = {path: float(i) for i, path in enumerate(order, 1)}
    norms = trees.map_named(lambda path, _: own[path], variables["params"])
    shared = originals.share_by_shape(norms, variables["params"], order)
    assert shared["bn3"] == dict.fromkeys(("scale", "bias"), own["dense1/bias"])
    assert shared["bn1"]["scale"] == own["bn2/bias"]
    with pytest.raises(ValueError, match="order has 1 paths"):
        originals.share_by_shape(norms, variables["params"], ["bn1/scale"])


@pytest.mark.parametrize("p", golden_data.parts(FILE, r"model/lp([^/]+)/"))
def test_balls_of_a_network_match_the_original(p):
    sizes = [math.prod(shape) for shape in network_of_the_original().values()]
    norms, expected = GOLDEN[f"model/lp{p}/norm_used"], GOLDEN[f"model/lp{p}/radius_diameter"]
    tau = expected[0, 1] / (2 * norms[0])  # which no file holds; one for all parameters
    balls = [
        polytopes.lp_ball(size, norm, p=p, tau=tau) for size, norm in zip(sizes, norms, strict=True)
    ]
    ours = [(ball.radius, ball.diameter(size)) for ball, size in zip(balls, sizes)]
    assert_allclose(ours, expected, **CLOSE)


vectors = hypothesis.extra.numpy.arrays(
    np.float64,
    st.sampled_from([1, 2, 5]),
    elements=st.floats(-4, 4, allow_subnormal=False, width=32),
)
lmo = jax.jit(lambda x, k, radius: polytopes.KSparse(k, radius).lmo(x))
project = jax.jit(lambda x, k, radius: polytopes.KSparse(k, radius).project(x))
shift_inside = jax.jit(lambda x, k, radius: polytopes.KSparse(k, radius).shift_inside(x))


def vertices(size, k, radius):
    for support in itertools.combinations(range(size), k):
        for signs in itertools.product((-radius, radius), repeat=k):
            vertex = np.zeros(size)
            vertex[list(support)] = signs
            yield vertex


@hypothesis.given(vectors, st.data())
def test_k_sparse_lmo_is_the_best_vertex(gradient, data):
    k = data.draw(st.integers(1, gradient.size))
    vertex = np.asarray(lmo(gradient, k, 0.7))
    best = min(float(gradient @ v) for v in vertices(gradient.size, k, 0.7))
    assert_allclose(gradient @ vertex, best, atol=1e-12)
    assert np.abs(vertex).max() <= 0.7
    assert np.abs(vertex).sum() <= 0.7 * k + 1e-12


@hypothesis.given(vectors, st.data())
def test_k_sparse_projection_satisfies_the_optimality_condition(x, data):
    """p is the projection iff p is feasible and <x - p, v - p> <= 0 for every vertex v."""
    k = data.draw(st.integers(1, x.size))
    radius = data.draw(st.floats(0.1, 3))
    p = np.asarray(project(x, k, radius))
    assert np.abs(p).max() <= radius * (1 + 1e-12)
    assert np.abs(p).sum() <= radius * k * (1 + 1e-9)
    for vertex in vertices(x.size, k, radius):
        assert (x - p) @ (vertex - p) <= 1e-8 * (1 + np.abs(x).max()) * radius * k


def exact_projection(x, k, radius):
    """Of rational numbers: between two breakpoints of t, where the sum is linear."""
    sizes = [fractions.Fraction(float(abs(value))) for value in x]
    radius = fractions.Fraction(float(radius))
    above = lambda t: [min(max(size - t, 0), radius) for size in sizes]
    points = sorted({0, *(p for size in sizes for p in (size, size - radius) if p > 0)})
    budget = k * radius
    t = 0
    if sum(above(0)) > budget:
        last = max(i for i, point in enumerate(points) if sum(above(point)) >= budget)
        low, high = points[last], points[last + 1]
        start, end = sum(above(low)), sum(above(high))
        t = low + (start - budget) / (start - end) * (high - low)
    return np.sign(x) * np.array([float(value) for value in above(t)])


float32s = st.floats(-(2.0**100), 2.0**100, allow_subnormal=False, width=32)
wide_vectors = hypothesis.extra.numpy.arrays(np.float32, 8, elements=float32s)


@hypothesis.given(wide_vectors, st.integers(1, 8), st.integers(-30, 30))
@hypothesis.example(np.float32([1e10, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]), 2, 0)
@hypothesis.example(
    np.float32([1e8, -1e8, 1e8 + 8, 3, 2, 1, 0, -0.5]), 2, 0
)  # t has fewer digits than the radius
def test_the_projection_is_exact_whatever_the_range(x, k, exponent):
    radius = np.float32(1.1 * 2.0**exponent)
    with jax.enable_x64(False):
        found = np.asarray(project(x, k, radius), np.float64)
    assert_allclose(found / radius, exact_projection(x, k, radius) / radius, atol=5e-6)


BOUNDED = (polytopes.KSparse(2, 0.5), *(polytopes.LpBall(0.5, p) for p in (1, 2, 3, math.inf)))


@pytest.mark.parametrize("constraint", BOUNDED)
def test_arrays_without_entries_pass_unchanged(constraint):
    empty = jnp.zeros((0, 3), jnp.float32)
    params = {"a": empty, "b": jnp.full(3, 9.0)}
    moved = polytopes.shift_inside(params, constraint)
    assert moved["a"].shape == (0, 3)
    assert jnp.abs(moved["b"]).max() <= 0.5
    methods = ["lmo"] if constraint == polytopes.LpBall(0.5, 3) else ["lmo", "project"]
    for method in methods:
        passed = getattr(constraint, method)(empty)
        assert (passed.shape, passed.dtype) == (empty.shape, empty.dtype)
    assert trees.norm(empty) == 0


@hypothesis.given(vectors, st.data())
def test_shift_inside_is_feasible_and_leaves_feasible_points_alone(x, data):
    k = data.draw(st.integers(1, x.size))
    shifted = np.asarray(shift_inside(x, k, 0.9))
    assert np.abs(shifted).sum() <= 0.9 * k * (1 + 1e-12)
    assert np.abs(shifted).max() <= 0.9 * (1 + 1e-12)
    assert_array_equal(shift_inside(shifted * 0.999, k, 0.9), shifted * 0.999)


def test_shift_inside_is_feasible_in_bfloat16():
    for seed in range(20):
        x = jax.random.normal(jax.random.key(seed), 24).astype(jnp.bfloat16)
        shifted = polytopes.KSparse(5, 0.5).shift_inside(x)
        assert shifted.dtype == jnp.bfloat16
        assert np.abs(np.asarray(shifted, np.float64)).max() <= 0.5 * (
            1 + 2**-8
        )  # a rounding of the result


def test_lp_lmo_reaches_the_dual_norm():
    gradient = np.random.default_rng(0).normal(size=50) * 1e-6
    for p, q in GOLDEN["complementary_order"].tolist():
        ball = polytopes.LpBall(2.0, p)
        point = np.asarray(ball.lmo(jnp.asarray(gradient)))
        assert_allclose(gradient @ point, -2.0 * np.linalg.norm(gradient, q), rtol=1e-9)
        assert_allclose(ball.norm(jnp.asarray(point)), 2.0, rtol=1e-9)
        assert not np.any(np.asarray(ball.lmo(jnp.zeros(5))))


def test_rules_choose_sets_by_parameter():
    params = {"fc": {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(10)}}
    norms = {"fc": {"kernel": 2.0, "bias": 0.0}}
    config = dict(
        name="k_sparse", k=10, k_frac=0.1, tau=5.0, rules=((".*/bias", dict(name="unconstrained")),)
    )
    sets = polytopes.build(params, norms, polytopes.check(config))
    assert sets["fc"]["bias"] == polytopes.Unconstrained()
    assert sets["fc"]["kernel"].k == 20
    assert_allclose(sets["fc"]["kernel"].radius, 2 * 5.0 * 2.0 / (2 * math.sqrt(20)))
    config["rules"] = ((".*/offset", dict(name="l2")),)
    with complains("decides no parameter"):
        polytopes.build(params, norms, polytopes.check(config))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (dict(name="k_spars"), "allowed: k_sparse, l2, lp, unconstrained. Did you mean 'k_sparse'"),
        (dict(name="k_sparse", kfrac=0.1), "no field 'kfrac'.*Did you mean 'k_frac'"),
        (dict(name="k_sparse", tau=-1.0), "tau is -1.0; allowed: float > 0.0"),
        (dict(name="k_sparse", k=0, k_frac=0.0), "select no entry"),
        (dict(name="lp", p=1.5), "p is 1.5; allowed: 1, a number >= 2"),
        (dict(name="l2", mode="norm"), "mode is 'norm'; allowed: 'initialization'"),
        (dict(name="l2", rules=((".*", dict(name="ball")),)), r"rules\[0\].name is 'ball'"),
        (dict(name="l2", rules=(".*",)), r"rules\[0\] is '\.\*'"),
        (dict(name="l2", tau=float("inf")), r"tau is inf"),
    ],
)
def test_bad_constraints_are_refused(constraint, message):
    with complains(message):
        polytopes.check(constraint)


def test_mean_norms_measure_the_initialisation():
    init = lambda key: {"w": jax.random.normal(key, (30, 40)), "b": jnp.zeros(4)}
    norms = polytopes.mean_norms(init, jax.random.key(0), draws=50)
    assert_allclose(norms["w"], math.sqrt(1200), rtol=1e-2)
    assert norms["b"] == 0.0
    again = polytopes.mean_norms(init, jax.random.key(0), draws=50)
    assert again["w"] == norms["w"]
    short = lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init(key))
    assert_allclose(polytopes.mean_norms(short, jax.random.key(0))["w"], math.sqrt(1200), rtol=1e-2)


def test_sets_of_a_network_in_one_call():
    init = lambda key: {"w": jax.random.normal(key, (30, 40)), "bias": jnp.zeros(4)}
    params = init(KEY)
    own = dict(tau=3.0, k_frac=0.1, rules=(("bias", dict(name="l2")),))
    sets = polytopes.for_params(params, **own)
    assert_allclose(sets["w"].diameter(1200), 2 * 3.0 * np.linalg.norm(params["w"]))
    assert_allclose((sets["w"].k, sets["bias"].radius), (120, 15.0))
    of_run = polytopes.build(
        params, polytopes.mean_norms(init, KEY, draws=5), polytopes.check(dict(own))
    )
    assert polytopes.for_params(params, KEY, init=init, draws=5, **own) == of_run
    with pytest.raises(ValueError, match="init is None"):
        polytopes.for_params(params, KEY)


@pytest.mark.parametrize(
    "s", [polytopes.KSparse(2, 0.5), *(polytopes.LpBall(0.7, p) for p in (1, 2, 3, math.inf))]
)
def test_the_gauge_says_how_far_outside_a_point_is(s):
    """<x, g> <= gauge(x) max <v, g> over the set, and equal for the best g of many."""
    x, *slopes = np.random.default_rng(0).normal(size=(2000, 3)) ** 5  # many near the axes
    slopes = np.stack(slopes)
    gauge = call(s, x, "gauge")
    assert_allclose(call(s, 3 * x, "gauge"), 3 * gauge)
    vertices = jax.vmap(lambda g: s.lmo(-g))(slopes)
    shares = slopes @ x / np.sum(vertices * slopes, 1)
    assert gauge * 0.95 <= shares.max() <= gauge * (1 + 1e-9)
    near = jnp.array([0.999, 1.0005, 1.002])[:, None] * x / gauge
    beyond = jax.jit(jax.vmap(lambda w: polytopes.outside(s, {"w": w, "no": jnp.ones(0)})))
    assert beyond(near).tolist() == [False, False, True]


def test_two_roundings_of_narrow_weights_are_not_outside():
    s = polytopes.LpBall(1.0, math.inf)
    assert not polytopes.outside(s, jnp.full(2, 1.0078125, jnp.bfloat16))
    assert not polytopes.outside(polytopes.Unconstrained(), jnp.full(2, 9.0))


def test_sets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="k is 0; allowed: 1 and above"):
        polytopes.KSparse(0, 1.0)
    for make in (
        lambda radius: polytopes.KSparse(3, radius),
        lambda radius: polytopes.LpBall(radius, 2),
    ):
        with pytest.raises(ValueError, match=r"radius is -1.0; allowed: above 0"):
            make(-1.0)
    with pytest.raises(ValueError, match=r"mode is 'radus'; allowed: .* Did you mean 'radius'"):
        polytopes.k_sparse(100, 1.0, mode="radus")


def test_broadcast_refuses_another_structure():
    with pytest.raises(ValueError, match="sets have no entry for 'b'"):
        polytopes.broadcast({"a": polytopes.Unconstrained()}, {"b": jnp.ones(2)})
