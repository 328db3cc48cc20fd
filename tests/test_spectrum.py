"""Curvature over a whole data set: against explicit Hessians, the original's numbers, and itself in
other orders.
"""

import functools

import golden_data
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import linops, losses, spectrum

HYPER = golden_data.hyper("10_hessian.npz")


def original(golden):
    """(params in its order and layouts, data), whose last batch is shorter."""
    params = [golden[f"trained/{name}"] for name in golden_data.dense_names()]
    return params, (golden["train/x"], golden["train/y"])


def logits(params, x):
    for i, (weight, bias) in enumerate(zip(params[::2], params[1::2])):
        x = (jax.nn.relu(x) if i else x) @ weight.T + bias
    return x


def loss(params, batch):
    return losses.cross_entropy(logits(params, batch[0]), batch[1]).mean() + HYPER["lmbda"] * sum(
        jnp.abs(leaf).sum() for leaf in params
    )


def small(examples=37, dtype=jnp.float32):
    """(params, data) of the loss `smooth`."""
    rng = default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = {
        "dense1": {"kernel": draw(5, 4), "bias": draw(4)},
        "fc": {"kernel": draw(4, 3), "bias": draw(3)},
    }
    return params, {"x": draw(examples, 5), "y": rng.integers(0, 3, examples)}


def outputs(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    return hidden @ params["fc"]["kernel"] + params["fc"]["bias"]


def smooth(params, batch):
    return losses.cross_entropy(outputs(params, batch), batch["y"]).mean()


def draw_vector(params, seed=0):
    leaves, structure = jax.tree.flatten(params)
    rng = default_rng(seed)
    return jax.tree.unflatten(structure, [rng.normal(size=x.shape).astype(x.dtype) for x in leaves])


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# Products -----------------------------------------------------------------------------------------


def test_products_equal_the_explicit_hessian_of_the_original():
    golden = golden_data.load("10_hessian.npz")
    with jax.enable_x64(True):
        params, data = original(golden)
        vector, unflatten = jax.flatten_util.ravel_pytree(params)
        for on_host in (True, False):
            product = spectrum.over_batches(
                spectrum.hessian_product(loss), data, HYPER["batch_size"], on_host=on_host
            )
            found = flat(product(params, unflatten(jnp.asarray(golden["hvp/v"]))))
            assert_allclose(found, golden["hvp/Hv"], rtol=1e-9, atol=1e-11)
        column = lambda v: jax.flatten_util.ravel_pytree(product(params, unflatten(v)))[0]
        columns = jax.jit(jax.vmap(column))(np.eye(vector.size))
        explicit = jax.jit(jax.hessian(lambda p: loss(unflatten(p), data)))(vector)
        largest = np.abs(explicit).max()
        assert np.abs(columns - explicit).max() <= 1e-10 * largest
        assert np.abs(columns - columns.T).max() <= 1e-14 * largest
        assert_allclose(
            np.linalg.eigvalsh(columns), np.sort(golden["hessian/eigenvalues"]), atol=1e-11
        )


def gauss_newton_product(outputs, loss):
    return lambda params, v, batch: linops.gauss_newton(outputs, loss, params, batch)(v)


def test_gauss_newton_products_equal_the_explicit_matrix():
    with jax.enable_x64(True):
        params, data = small(dtype=jnp.float64)
        vector, unflatten = jax.flatten_util.ravel_pytree(params)
        outer = lambda z, batch: losses.cross_entropy(z, batch["y"]).mean()
        jacobian = jax.jit(jax.jacobian(lambda p: outputs(unflatten(p), data).ravel()))(vector)
        z = jax.jit(outputs)(params, data)
        inner = jax.jit(jax.hessian(lambda z: outer(z.reshape(-1, 3), data)))(np.ravel(z))
        expected = jacobian.T @ inner @ jacobian
        product = spectrum.over_batches(gauss_newton_product(outputs, outer), data, 16)
        column = lambda v: jax.flatten_util.ravel_pytree(product(params, unflatten(v)))[0]
        columns = jax.jit(jax.vmap(column))(np.eye(vector.size))
        assert np.abs(columns - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("on_host", [False, True])
def test_products_repeat_bit_by_bit_and_are_symmetric(on_host):
    params, data = small()
    product = spectrum.over_batches(spectrum.hessian_product(smooth), data, 16, on_host=on_host)
    first, second = draw_vector(params, 1), draw_vector(params, 2)
    one = product(params, first)
    assert_array_equal(flat(one), flat(product(params, first)))
    other = spectrum.over_batches(
        spectrum.hessian_product(smooth), data, 16, on_host=on_host
    )  # compiled anew
    assert_array_equal(flat(one), flat(other(params, first)))
    mirrored = flat(first) @ flat(product(params, second))
    assert_allclose(flat(second) @ flat(one), mirrored, rtol=1e-5)


def test_the_batch_size_changes_rounding_only():
    params, data = small()
    vector = draw_vector(params)
    expected = flat(
        spectrum.over_batches(spectrum.hessian_product(smooth), data, 37)(params, vector)
    )
    assert np.abs(expected).max() > 0.1
    for size, on_host in [(1, False), (36, False), (10, True), (64, True)]:
        found = spectrum.over_batches(
            spectrum.hessian_product(smooth), data, size, on_host=on_host
        )(params, vector)
        assert_allclose(flat(found), expected, rtol=1e-5, atol=2e-6)
        assert jax.tree.structure(found) == jax.tree.structure(params)


def test_data_on_eight_devices_give_the_same_products():
    params, data = small(examples=40)
    vector = draw_vector(params)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), ("batch",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded, everywhere = jax.device_put(data, split), jax.device_put((params, vector), copied)
    for on_host in (False, True):
        expected = spectrum.over_batches(
            spectrum.hessian_product(smooth), data, 16, on_host=on_host
        )(params, vector)
        found = spectrum.over_batches(
            spectrum.hessian_product(smooth), sharded, 16, on_host=on_host
        )(*everywhere)
        assert_allclose(flat(found), flat(expected), rtol=1e-5, atol=1e-6)
        assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_products_linearized_once_are_the_same(kind):
    params, data = small()
    outer = lambda z, batch: losses.cross_entropy(z, batch["y"]).mean()
    products = dict(
        hessian=spectrum.hessian_product(smooth), gauss_newton=gauss_newton_product(outputs, outer)
    )
    calls = []

    def counted(params, v, batch):
        calls.append(batch["x"].shape)
        return products[kind](params, v, batch)

    matvec = spectrum.linearized(counted, params, data, 16)
    assert len(calls) == 2  # traced once for whole batches and once for the last
    expected = spectrum.over_batches(products[kind], data, 16, on_host=True)
    for seed in (1, 2):
        vector = draw_vector(params, seed)
        assert_allclose(flat(matvec(vector)), flat(expected(params, vector)), rtol=1e-5, atol=1e-6)
        assert_array_equal(flat(matvec(vector)), flat(matvec(vector)))
    assert len(calls) == 2
    half = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), params
    )  # with vectors of Lanczos' type
    found = spectrum.linearized(products[kind], half, data, 16)(draw_vector(params, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert_allclose(flat(found), flat(expected(half, draw_vector(params, 1))), rtol=0.1, atol=0.01)
    with pytest.raises(ValueError, match="the vector of a product has the structure"):
        matvec({"other": jnp.zeros(3)})
    with pytest.raises(ValueError, match="batch_size is 0; allowed: 1 and above"):
        spectrum.linearized(counted, params, data, 0)


@pytest.mark.parametrize("on_host", [False, True])
def test_taylor_terms_are_those_of_gradient_and_hessian(on_host):
    with jax.enable_x64(True):
        params, data = jax.tree.map(
            lambda leaf: leaf.astype(float) if leaf.dtype == np.float32 else leaf, small()
        )
        step = jax.tree.map(lambda leaf: 0.1 * leaf, draw_vector(params))
        found = spectrum.taylor(smooth, data, 16, on_host=on_host)(params, step)

        @jax.jit
        def three_terms(params, step):
            slope = lambda params: jax.jvp(lambda p: smooth(p, data), (params,), (step,))[1]
            first, second = jax.jvp(slope, (params,), (step,))
            moved = jax.tree.map(jnp.add, params, step)
            return smooth(moved, data) - smooth(params, data), first, second / 2

        expected = three_terms(params, step)
        assert_allclose(found, expected, rtol=1e-10)
        assert all(term.dtype == np.float64 for term in found)
        square = lambda params, batch: sum(
            jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params)
        )
        change, first, second = spectrum.taylor(square, data, 10)(
            params, step
        )  # nothing beyond the second order
        assert float(change) == pytest.approx(float(first + second), rel=1e-12)


def test_taylor_terms_of_other_types_and_mistakes():
    params, data = small()
    step = draw_vector(params)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    terms = spectrum.taylor(smooth, data, 16)
    assert_allclose(terms(half, step), terms(params, step), rtol=0.1, atol=0.02)
    with pytest.raises(ValueError, match="the vector of a product has the structure"):
        terms(params, {"other": jnp.zeros(3)})
    each = lambda params, batch: losses.cross_entropy(outputs(params, batch), batch["y"])
    with pytest.raises(
        ValueError, match=r"loss returns an array of shape \(\d+,\); curvature needs one scalar"
    ):
        spectrum.taylor(each, data, 8)(params, step)
    with pytest.raises(ValueError, match="batch_size is 0; allowed: 1 and above"):
        spectrum.taylor(smooth, data, 0)


def test_batch_losses_are_those_of_whole_batches():
    params, data = small()
    found = jax.jit(lambda params, data: spectrum.batch_losses(smooth, params, data, 10))(
        params, data
    )
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 10], data) for i in (0, 10, 20)]
    assert_allclose(found, [smooth(params, part) for part in parts], rtol=1e-6)
    for size in (0, 38):
        with pytest.raises(
            ValueError, match=rf"batch_size is {size}; allowed: 1 to 37, the number of examples"
        ):
            spectrum.batch_losses(smooth, params, data, size)
    with pytest.raises(ValueError, match=r"arrays of length \[36, 37\]; allowed: one length"):
        spectrum.batch_losses(smooth, params, data | {"y": data["y"][:-1]}, 8)


def test_misuse_of_products_is_explained():
    params, data = small()
    product = spectrum.hessian_product(smooth)
    for empty in ({"x": jnp.zeros((0, 5)), "y": jnp.zeros(0, int)}, {}):
        with pytest.raises(ValueError, match="allowed: one length, at least 1"):
            spectrum.over_batches(product, empty, 4)
    with pytest.raises(ValueError, match=r"arrays of length \[36, 37\]; allowed: one length"):
        spectrum.over_batches(product, data | {"y": data["y"][:-1]}, 4)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size is {size}; allowed: 1 and above"):
            spectrum.over_batches(product, data, size)
    each = lambda params, batch: losses.cross_entropy(outputs(params, batch), batch["y"])
    with pytest.raises(
        ValueError, match=r"loss returns an array of shape \(8,\); curvature needs one scalar"
    ):
        spectrum.over_batches(spectrum.hessian_product(each), data, 8)(params, params)
    rows = lambda z, batch: losses.cross_entropy(z, batch["y"])
    with pytest.raises(ValueError, match=r"loss returns an array of shape \(8,\)"):
        spectrum.over_batches(gauss_newton_product(outputs, rows), data, 8)(params, params)


# Some of the parameters ---------------------------------------------------------------------------


def test_selected_parameters_are_put_back():
    params, data = small()
    chosen = spectrum.select(params, r".*/kernel")
    assert list(chosen.params) == ["dense1/kernel", "fc/kernel"]
    whole = chosen.rebuild({path: 2 * leaf for path, leaf in chosen.params.items()})
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert_array_equal(whole["fc"]["kernel"], 2 * params["fc"]["kernel"])
    assert whole["fc"]["bias"] is params["fc"]["bias"]
    part = lambda part, batch: smooth(chosen.rebuild(part), batch)
    found = spectrum.over_batches(spectrum.hessian_product(part), data, 16)(
        chosen.params, chosen.params
    )
    zeros = {
        name: {"kernel": own["kernel"], "bias": jnp.zeros_like(own["bias"])}
        for name, own in params.items()
    }
    expected = spectrum.over_batches(spectrum.hessian_product(smooth), data, 16)(params, zeros)
    for path in chosen.params:
        layer, _ = path.split("/")
        assert_allclose(found[path], expected[layer]["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "refusal"),
    [
        (
            "dense2/kernel",
            ("parameters", "dense2/kernel", "dense1/kernel"),
        ),
        (
            "kernel",
            ("parameters", "kernel", "fc/kernel"),
        ),  # the whole path must match
        ("(", ("parameters", "(")),
    ],
)
def test_patterns_without_a_match_are_named(pattern, refusal):
    with tiny.refused(*refusal):
        spectrum.select(small()[0], pattern)


# Rows ---------------------------------------------------------------------------------------------


def test_weights_at_quantiles():
    params = {"a": np.array([[3.0, -1.0], [2.0, 0.5]]), "b": np.array([-4.0, 1.0])}
    entries = spectrum.quantile_entries(params, 3)  # of 0.5, 1, 1, 2, 3, 4: the 1st, 2nd and 4th
    assert entries == [("a", (1, 1), 0.5), ("a", (0, 1), 1.0), ("a", (1, 0), 2.0)]
    assert [entry[2] for entry in spectrum.quantile_entries(params, 6)] == [
        0.5,
        0.5,
        1.0,
        1.0,
        2.0,
        3.0,
    ]
    assert [entry[2] for entry in spectrum.quantile_entries(params, 4)] == [
        0.5,
        1.0,
        1.0,
        3.0,
    ]  # rounded up
    assert spectrum.quantile_entries(params, 6)[3] == (
        "b",
        (1,),
        1.0,
    )  # of equal ones the first comes first
    assert [entry[2] for entry in spectrum.quantile_entries(params, 1)] == [0.5]


def test_row_norms_are_those_of_the_explicit_hessian():
    params, data = small()
    chosen = spectrum.select(params, ".*")
    part = lambda part, batch: smooth(chosen.rebuild(part), batch)
    vector, unflatten = jax.flatten_util.ravel_pytree(chosen.params)
    explicit = jax.jit(jax.hessian(lambda p: part(unflatten(p), data)))(vector)
    product = spectrum.over_batches(spectrum.hessian_product(part), data, 16)
    matvec = functools.partial(product, chosen.params)
    for path, index in [("dense1/bias", (2,)), ("dense1/kernel", (4, 1)), ("fc/kernel", (0, 2))]:
        unit = spectrum.one_hot(chosen.params, path, index)
        position = int(np.argmax(flat(unit)))
        assert flat(unit).sum() == 1
        norm = spectrum.absolute_sum(matvec(unit))
        assert_allclose(norm, np.abs(explicit[position]).sum(), rtol=1e-5)
    for index in [(5, 0), (-1, 0), (1,)]:
        with pytest.raises(ValueError, match=r"is no entry of 'dense1/kernel', whose shape is"):
            spectrum.one_hot(chosen.params, "dense1/kernel", index)
    with tiny.refused("path", "fc/kernl", "fc/kernel"):
        spectrum.one_hot(chosen.params, "fc/kernl", (0, 0))


def test_data_sets_on_meshes():
    rng = default_rng(0)
    inputs, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 4), (2, 4)))
    loss = lambda params, batch: jnp.mean(jnp.tanh(batch @ params["w"]))

    def measure(inputs, weights):
        params = {"w": weights}
        product = spectrum.over_batches(spectrum.hessian_product(loss), inputs, 4)
        row = spectrum.absolute_sum(product(params, spectrum.one_hot(params, "w", (1,))))
        return product(params, params), row, spectrum.taylor(loss, inputs, 4)(params, params)

    tiny.check_on_meshes(measure, inputs, weights, rtol=1e-4)
