"""Curvature products, Lanczos, quadrature and traces against dense linear algebra and the
original's numbers.
"""

import functools

import golden_data
import hypothesis
import hypothesis.strategies as st
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from sparsity_jax import linops, losses, masks, width

GOLDEN = golden_data.load("10_hessian.npz")

SEED = st.integers(0, 2**16)
LIKE = {"a": np.zeros((3, 4)), "b": [np.zeros(()), np.zeros(7)]}  # 20 entries


def dense(eigenvalues, seed=0):
    """A symmetric float64 matrix of these eigenvalues."""
    draw = default_rng(seed).normal(size=(len(eigenvalues),) * 2)
    vectors = np.linalg.qr(draw)[0]
    return (vectors * np.asarray(eigenvalues)) @ vectors.T


def product(matrix, dtype=None):
    """matvec on any tree with as many entries as the matrix has rows."""
    matrix = jnp.asarray(matrix, dtype)

    def matvec(v):
        flat, unflatten = jax.flatten_util.ravel_pytree(v)
        return unflatten(jnp.dot(matrix, flat, precision="highest"))

    return matvec


def spectrum(kind, size, seed=0):
    rng = default_rng(seed)
    return dict(
        normal=rng.normal(size=size),
        decaying=2.0 ** -np.arange(size),
        outliers=np.concatenate(
            [np.full(size // 2, 1e-3), rng.random(size - size // 2 - 2), [30.0, -20.0]]
        ),
        semidefinite=np.maximum(rng.normal(size=size), 0),
    )[kind]


def quadrature(function, values, weights):
    return np.sum(weights * function(values), -1)


def run_of(alphas, betas):
    """A Lanczos run of one probe."""
    return linops.Tridiagonal(np.array(alphas), np.array(betas), np.int32(len(alphas)))


def moments(matrix, start, function):
    """v^T f(A) v of the unit vector."""
    values, vectors = np.linalg.eigh(matrix)
    return np.sum((vectors.T @ (start / np.linalg.norm(start))) ** 2 * function(values))


def rows(basis, size):
    """The vectors of a state's basis, float64 [m, size]."""
    if isinstance(basis, np.ndarray):
        return basis.astype(np.float64)
    blocks = [np.asarray(block, np.float64).swapaxes(0, 1) for block in basis]
    return np.concatenate([block.reshape(len(block), -1)[:, :size] for block in blocks])


# Products -----------------------------------------------------------------------------------------


CASES = golden_data.parts("10_hessian.npz", r"lanczos/(\w+)/start")


def original(golden):
    """loss(params, x, y), params and data of the original's small network; params in its order and
    layouts.
    """
    params = [jnp.asarray(golden[f"trained/{name}"]) for name in golden_data.dense_names()]
    strength = golden_data.hyper("10_hessian.npz")["lmbda"]

    def loss(params, x, y):
        for i, (weight, bias) in enumerate(zip(params[::2], params[1::2])):
            x = (jax.nn.relu(x) if i else x) @ weight.T + bias
        return losses.cross_entropy(x, y).mean() + strength * sum(jnp.abs(p).sum() for p in params)

    return loss, params, (golden["train/x"], golden["train/y"])


def test_hessian_of_the_original_network():
    with jax.enable_x64(True):
        loss, params, data = original(GOLDEN)
        flat, unflatten = jax.flatten_util.ravel_pytree(params)
        flatten = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
        matvec = jax.jit(lambda v: flatten(linops.hvp(loss, params, *data)(unflatten(v))))
        whole = lambda p: loss(unflatten(p), *data)
        all_of = jax.jit(lambda p: (whole(p), jax.grad(whole)(p), jax.hessian(whole)(p)))
        value, slope, explicit = all_of(flat)
        assert_allclose(value, GOLDEN["loss_full"], rtol=1e-12)
        assert_allclose(slope, GOLDEN["grad_full"], rtol=1e-9, atol=1e-11)
        vector = GOLDEN["hvp/v"]
        assert_allclose(matvec(vector), GOLDEN["hvp/Hv"], rtol=1e-9, atol=1e-11)
        assert_allclose(vector @ matvec(vector), GOLDEN["hvp/vHv"], rtol=1e-9)
        columns = jax.jit(jax.vmap(matvec))(np.eye(flat.size))
        assert np.abs(columns - explicit).max() <= 1e-10 * np.abs(explicit).max()
        assert_allclose(columns, GOLDEN["hessian/full"], rtol=1e-9, atol=1e-11)
        assert_allclose(
            np.linalg.eigvalsh(columns), np.sort(GOLDEN["hessian/eigenvalues"]), atol=1e-11
        )


@pytest.mark.parametrize("reorthogonalize", ["full", "host"])
def test_ritz_values_of_the_original(reorthogonalize):
    with jax.enable_x64(True):
        loss, params, data = original(GOLDEN)
        unflatten = jax.jit(jax.flatten_util.ravel_pytree(params)[1])
        matvec = jax.jit(linops.hvp(loss, params, *data))
        for case in CASES:
            starts, expected = (
                GOLDEN[f"lanczos/{case}/start"],
                GOLDEN[f"lanczos/{case}/ritz_values"],
            )
            if case == "main":
                hyper = golden_data.hyper("10_hessian.npz")
                assert expected.shape == (hyper["lanczos_num"], hyper["lanczos_iter"])
            method = linops.lanczos(expected.shape[1], reorthogonalize=reorthogonalize, shift=1e-6)
            run = lambda start, method=method: method(matvec, start)
            run = run if reorthogonalize == "host" else jax.jit(run)
            for start, values, weights in zip(
                starts, expected, GOLDEN[f"lanczos/{case}/ritz_weights"]
            ):
                ours = linops.ritz(run(unflatten(start)))
                assert_allclose(ours, (values, weights), rtol=0, atol=1e-8)


def test_all_ritz_values_are_eigenvalues_at_full_depth():
    with jax.enable_x64(True):
        loss, params, data = original(GOLDEN)
        size = GOLDEN["hessian/eigenvalues"].size
        start = linops.rademacher(jax.random.key(0), params)
        matvec = jax.jit(linops.hvp(loss, params, *data))
        tridiagonal = linops.lanczos(size + 11)(matvec, start)
        distance = np.abs(
            np.subtract.outer(linops.ritz(tridiagonal)[0], GOLDEN["hessian/eigenvalues"])
        )
        assert distance.min(1).max() < 1e-10
        assert distance.min(0).max() < 1e-10
        zero = np.abs(GOLDEN["hessian/eigenvalues"]) < 1e-12
        num_steps = zero.size - max(
            zero.sum() - 1, 0
        )  # of equal eigenvalues a Krylov space sees one
        assert tridiagonal.num_steps == num_steps
        assert not np.any(tridiagonal.alphas[num_steps:])
        other_start = linops.rademacher(jax.random.key(1), params)
        values, vectors, residuals = linops.top_eigenpairs(3, 60)(matvec, other_start)
        assert_allclose(values, GOLDEN["power_iteration/top3"], atol=1e-10)
        assert residuals.max() < 1e-8
        assert [leaf.shape for leaf in vectors] == [(3, *leaf.shape) for leaf in params]


def network(params, x):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    return {"first": hidden @ params["out"], "second": jnp.sin(hidden @ params["out"]) ** 2}


def convex(z, x):
    return jax.nn.logsumexp(z["first"], axis=-1).mean() + jnp.sum(z["second"] ** 2) / len(x)


def draw_params(dtype=None):
    rng = default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {"in": {"w": draw(4, 5), "b": draw(5)}, "out": draw(5, 3)}, draw(6, 4)


def test_gauss_newton_is_the_dense_product():
    with jax.enable_x64(True):
        params, x = draw_params()
        flat, unflatten = jax.flatten_util.ravel_pytree(params)
        z, unflatten_z = jax.flatten_util.ravel_pytree(jax.jit(network)(params, x))
        flatten = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
        jacobian = jax.jit(jax.jacobian(lambda p: flatten(network(unflatten(p), x))))(flat)
        inner = jax.jit(jax.hessian(lambda z: convex(unflatten_z(z), x)))(z)
        matvec = linops.gauss_newton(network, convex, params, x)
        columns = jax.jit(jax.vmap(lambda row: flatten(matvec(unflatten(row)))))(np.eye(flat.size))
        assert_allclose(columns, jacobian.T @ inner @ jacobian, atol=1e-13)
        assert np.linalg.eigvalsh(columns).min() > -1e-14


def test_products_refuse_other_losses_and_vectors():
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(
        ValueError, match=r"loss returns an array of shape \(3,\); curvature needs one scalar"
    ):
        linops.hvp(lambda p: p["w"].sum(0), params)
    with pytest.raises(ValueError, match="loss returns a tuple"):
        linops.hvp(lambda p: (p["w"].sum(), 1), params)
    with pytest.raises(ValueError, match=r"loss returns an array of shape \(2,\)"):
        linops.gauss_newton(lambda p: p["w"], lambda z: z.sum(1), params)
    matvec = linops.hvp(lambda p: jnp.sum(p["w"] ** 2), params)
    with pytest.raises(ValueError, match="has the structure"):
        matvec({"v": jnp.ones((2, 3))})
    with pytest.raises(
        ValueError, match=r"has shape \(3, 2\) at .*allowed: that of params, \(2, 3\)"
    ):
        matvec({"w": jnp.ones((3, 2))})
    assert_array_equal(matvec({"w": np.ones((2, 3))})["w"], np.full((2, 3), 2.0))


# Lanczos ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "decaying", "outliers"])
@pytest.mark.parametrize("reorthogonalize", ["full", "host"])
def test_full_depth_gives_all_eigenvalues(kind, reorthogonalize):
    with jax.enable_x64(True):
        eigenvalues = spectrum(kind, 20)
        matrix, start = dense(eigenvalues), linops.rademacher(jax.random.key(0), LIKE)
        run = linops.lanczos(20, reorthogonalize=reorthogonalize)
        values, weights = linops.ritz(run(product(matrix), start))
        distance = np.abs(np.subtract.outer(values, eigenvalues)) / np.abs(eigenvalues).max()
        assert distance.min(1).max() < 1e-13
        assert distance.min(0).max() < 1e-13
        assert weights.sum() == pytest.approx(1, abs=1e-13)


run_eight = jax.jit(
    lambda matrix, start: linops.lanczos(8)(product(matrix), start)
)  # one compilation for all examples of a type


@hypothesis.given(SEED, st.sampled_from(["normal", "decaying", "semidefinite"]))
@hypothesis.settings(max_examples=15)
def test_quadrature_is_exact_for_polynomials(seed, kind):
    with jax.enable_x64(True):
        matrix = dense(spectrum(kind, 20, seed), seed)
        start = default_rng(seed).normal(size=20)
        tridiagonal = run_eight(matrix, start)
        for m in (1, 3, 8):
            shorter = linops.truncate(tridiagonal, m)
            for degree in range(2 * m):
                power = lambda x, degree=degree: x**degree
                exact = moments(matrix, start, power)
                scale = (
                    moments(matrix, start, lambda x, degree=degree: np.abs(x) ** degree) + 1e-300
                )
                assert abs(quadrature(power, *linops.ritz(shorter)) - exact) < 1e-11 * scale
                node = float(np.linalg.eigvalsh(matrix).min()) - 0.1
                moved = shorter._replace(alphas=shorter.alphas - node)
                values, weights = linops.gauss_radau(moved)
                assert abs(quadrature(power, values + node, weights) - exact) < 1e-10 * max(
                    scale, abs(node) ** degree
                )


@hypothesis.given(SEED, st.floats(-3, 3))
@hypothesis.settings(max_examples=15)
def test_enclosure_contains_the_answer_and_shrinks(seed, log_scale):
    """Completely monotone functions of a semi-definite operator: Gauss below, Gauss-Radau at 0
    above.
    """
    with jax.enable_x64(True):
        matrix, c = dense(spectrum("semidefinite", 20, seed), seed), 10.0**log_scale
        start = default_rng(seed).normal(size=20)
        tridiagonal = run_eight(matrix, start)
        functions = (lambda x: 1 / (1 + c * x), lambda x: np.exp(-c * x), lambda x: (x + c) ** -0.5)
        for function in functions:
            exact = moments(matrix, start, lambda x, function=function: function(np.maximum(x, 0)))
            history = [linops.truncate(tridiagonal, m) for m in range(1, 9)]
            lower = np.array([quadrature(function, *linops.ritz(t)) for t in history])
            upper = np.array([quadrature(function, *linops.gauss_radau(t)) for t in history])
            slack = 1e-10 * exact
            assert (lower <= exact + slack).all()
            assert (upper >= exact - slack).all()
            assert (np.diff(lower) >= -slack).all()
            assert (np.diff(upper) <= slack).all()


@hypothesis.given(SEED, st.floats(-2, 2), st.sampled_from(["normal", "decaying", "semidefinite"]))
@hypothesis.settings(max_examples=15)
def test_bordered_rules_are_exact_and_have_the_node_asked_for(seed, node, kind):
    with jax.enable_x64(True):
        matrix = dense(spectrum(kind, 20, seed), seed)
        start = default_rng(seed).normal(size=20)
        tridiagonal = run_eight(matrix, start)
        for m in (1, 3, 8):
            shorter = linops.truncate(tridiagonal, m)
            moved = shorter._replace(alphas=shorter.alphas - node)
            last = linops.border_for(moved) + node
            values, firsts, lasts = linops.bordered(shorter, last=last)
            assert np.abs(values - node).min() < 1e-10 * np.abs(values).max()
            moved, _, _ = linops.bordered(shorter, last=last + 1e-7)
            assert_allclose((moved - values) * 1e7, lasts**2, atol=1e-3)
            for degree in range(2 * m + 1):
                power = lambda x, degree=degree: x**degree
                exact, scale = (
                    moments(matrix, start, power),
                    moments(matrix, start, lambda x, d=degree: np.abs(x) ** d),
                )
                assert abs(quadrature(power, values, firsts**2) - exact) < 1e-9 * max(
                    scale, abs(node) ** degree
                )


def test_borders_by_hand():
    one = run_of([2.0], [1.0])  # 2 1; 1 a has eigenvalue 0 for a = 1/2
    assert linops.border_for(one) == pytest.approx(0.5)
    values, firsts, lasts = linops.bordered(one, last=0.5)
    assert_allclose(values, [0, 2.5], atol=1e-15)
    assert_allclose(firsts**2, [0.2, 0.8])
    assert_allclose(lasts**2, [0.8, 0.2])
    # no finite border puts a node on a Ritz value; a huge one comes as near as can be
    zero = run_of([0.0], [1.0])
    values, firsts, _ = linops.bordered(zero, last=linops.border_for(zero))
    assert np.abs(values).min() < 1e-12
    assert firsts[np.argmin(np.abs(values))] ** 2 == pytest.approx(1)
    exhausted = run_of([2.0, -1.0], [1.0, 0.0])  # the border gets no weight
    values, firsts, _ = linops.bordered(exhausted, last=linops.border_for(exhausted))
    kept = firsts**2 > 1e-20
    assert_allclose(values[kept], linops.ritz(exhausted)[0])


def test_gauss_radau_by_hand():
    # 2 1; 1 a with eigenvalue 0: a = 1/2
    values, weights = linops.gauss_radau(run_of([2.0], [1.0]))
    assert_allclose(values, [0, 2.5], atol=1e-15)
    assert_allclose(weights, [0.2, 0.8])
    exhausted = linops.gauss_radau(run_of([2.0], [0.0]))
    assert_array_equal(exhausted, [[2], [1]])
    values, weights = linops.gauss_radau(run_of([4.0], [1.0]))
    assert_allclose(values.min(), 0, atol=1e-15)
    assert_allclose([weights.sum(), weights @ values, weights @ values**2], [1, 4, 17])
    values, _ = linops.gauss_radau(run_of([1.0, -1e-9], [0.0, 0.0]))
    assert_array_equal(values, [0, 1])
    for alphas, betas in (([1.0, -0.1], [0.0, 0.0]), ([0.0], [1.0])):
        with pytest.raises(ValueError, match="not positive semi-definite"):
            linops.gauss_radau(run_of(alphas, betas))


@pytest.mark.parametrize("reorthogonalize", sorted(linops.REORTHOGONALIZE))
def test_modes_agree(reorthogonalize):
    eigenvalues = spectrum("outliers", 80)
    matvec, start = (
        product(dense(eigenvalues), jnp.float32),
        default_rng(1).normal(size=80),
    )
    run = linops.lanczos(20, reorthogonalize=reorthogonalize)
    function = lambda x: 1 / (1 + np.abs(x))
    ours = quadrature(function, *linops.ritz(run(matvec, jnp.asarray(start, jnp.float32))))
    tolerance = 1e-3 if reorthogonalize == "bfloat16" else 1e-5
    assert_allclose(ours, moments(dense(eigenvalues), start, function), rtol=tolerance)
    if reorthogonalize in ("full", "host"):
        with jax.enable_x64(True):
            exact = linops.lanczos(20)(product(dense(eigenvalues)), jnp.asarray(start))
        mine = run(matvec, jnp.asarray(start, jnp.float32))
        assert_allclose(mine.alphas[:10], exact.alphas[:10], atol=2e-3)


@pytest.mark.parametrize(
    ("reorthogonalize", "tolerance"), [("full", 2e-6), ("host", 2e-6), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("kind", ["decaying", "outliers"])
def test_basis_is_orthonormal(reorthogonalize, tolerance, kind):
    """Also where Ritz values have long converged and the recurrence alone loses all
    orthogonality.
    """
    matvec = product(dense(spectrum(kind, 150)), jnp.float32)
    method = linops.Lanczos(45, reorthogonalize=reorthogonalize)
    state = method.init(jnp.asarray(default_rng(1).normal(size=150), jnp.float32))
    for _ in range(45):
        state = method.step(matvec, state)
    basis = rows(state.basis, 150)[: int(state.num_steps)]
    assert np.abs(basis @ basis.T - np.eye(len(basis))).max() < tolerance
    if reorthogonalize == "full":
        matrix = dense(spectrum(kind, 150))
        tridiagonal = (
            np.diag(state.alphas) + np.diag(state.betas[:-1], 1) + np.diag(state.betas[:-1], -1)
        )
        steps = len(basis)
        assert_allclose(basis @ matrix @ basis.T, tridiagonal[:steps, :steps], atol=1e-4)


@pytest.mark.parametrize("reorthogonalize", sorted(linops.REORTHOGONALIZE))
def test_exhausted_krylov_spaces(reorthogonalize):
    start = default_rng(0).normal(size=12).astype(np.float32)
    method = linops.lanczos(14, reorthogonalize=reorthogonalize)
    run = lambda matrix: method(product(matrix, jnp.float32), start)
    run = run if reorthogonalize == "host" else jax.jit(run)
    identity = run(np.eye(12))
    assert identity.num_steps == 1
    assert_allclose(linops.ritz(identity), [[1], [1]], rtol=1e-6)
    assert_array_equal(identity.betas, 0)
    assert_array_equal(run(np.zeros((12, 12))).num_steps, 1)
    low_rank = run(np.outer(np.eye(12)[0], 3 * np.eye(12)[0]))
    assert low_rank.num_steps == 2
    assert_allclose(
        linops.ritz(low_rank)[0], [0, 3], atol=1e-3 if reorthogonalize == "bfloat16" else 1e-5
    )
    assert_allclose(linops.gauss_radau(low_rank), linops.ritz(low_rank), atol=1e-6)
    deep = run(dense(np.arange(12.0)))
    assert 10 <= deep.num_steps <= 12
    assert all(np.isfinite(x).all() for x in deep)
    assert not deep.alphas[12:].any()
    assert not deep.betas[11:].any()
    if reorthogonalize in ("full", "host"):
        assert_allclose(linops.ritz(deep)[0], np.arange(12.0), atol=1e-4)


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_loops_agree(reorthogonalize):
    matrix = dense(spectrum("normal", 20)).astype(np.float32)
    rng = default_rng(0)
    sign = lambda leaf: rng.choice(np.float32([-1, 1]), (3, *leaf.shape))
    starts = jax.tree.map(sign, LIKE)
    ith = lambda i: jax.tree.map(lambda leaf: leaf[i], starts)
    run = linops.lanczos(6, reorthogonalize=reorthogonalize)
    expected = run(product(matrix), ith(0))
    assert expected.num_steps == 6
    close = functools.partial(assert_allclose, rtol=2e-5, atol=2e-6)
    traced = jax.jit(lambda matrix, start: run(product(matrix), start))
    jax.tree.map(close, traced(matrix, ith(0)), expected)
    on_host = linops.lanczos(6, reorthogonalize=reorthogonalize, on_host=True)

    def host_loop(v):  # cannot be traced
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)])
        pieces = np.split(matrix @ flat, np.cumsum([leaf.size for leaf in jax.tree.leaves(v)]))
        shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, jax.tree.leaves(v))]
        return jax.tree.unflatten(jax.tree.structure(v), shaped)

    jax.tree.map(close, on_host(host_loop, ith(0)), expected)
    batched = jax.jit(jax.vmap(lambda start: run(product(matrix), start)))(starts)
    values, weights = linops.ritz(batched)
    for i in range(3):
        one = traced(matrix, ith(i))
        close(batched.alphas[i], one.alphas)
        close(batched.betas[i], one.betas)
        close(values[i], linops.ritz(one)[0])
        close(weights[i], linops.ritz(one)[1], atol=1e-5)


@pytest.mark.parametrize("reorthogonalize", sorted(linops.REORTHOGONALIZE))
def test_a_saved_state_resumes_to_the_same_bits(reorthogonalize):
    matvec = jax.jit(product(dense(spectrum("normal", 20)), jnp.float32))
    method = linops.Lanczos(9, reorthogonalize=reorthogonalize)
    state = method.init(linops.rademacher(jax.random.key(0), LIKE))
    for i in range(9):
        if i == 4:
            saved = jax.tree.map(np.array, state)
            half = state.tridiagonal
        state = method.step(matvec, state)
    resumed = saved
    for _ in range(5):
        resumed = method.step(matvec, resumed)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(resumed)):
        assert_array_equal(one, two)
    history = linops.truncate(state.tridiagonal, 4)
    assert half.num_steps == history.num_steps == 4
    assert_array_equal(half.alphas[:4], history.alphas)
    assert_array_equal(half.betas[:4], history.betas)


def test_the_basis_is_updated_in_place(as_users_compile):
    method = linops.Lanczos(16)
    state = method.init(jnp.ones(1000))
    matvec = lambda v: v * jnp.linspace(0, 1, 1000)
    pointers = [block.unsafe_buffer_pointer() for block in state.basis]
    for _ in range(8):
        state = method.step(matvec, state)
    assert [block.unsafe_buffer_pointer() for block in state.basis] == pointers
    traced = (
        jax.jit(method.update, donate_argnums=0)
        .lower(state, state.current)
        .compile()
        .memory_analysis()
    )
    assert traced.temp_size_in_bytes <= 4 * 4000


def test_many_entries_stay_orthogonal():
    """Products summed one after the other in float32 would leave 2e-4 here, and move quadrature by
    1e-2.
    """
    rng = default_rng(0)
    diagonal = np.concatenate(
        [np.abs(rng.standard_cauchy(50)) * 2, 10.0 ** rng.uniform(-6, -1, 200_000)]
    )
    diagonal, start = jnp.asarray(diagonal, jnp.float32), rng.choice([-1.0, 1.0], diagonal.size)
    method = linops.Lanczos(32)
    state = method.init(jnp.asarray(start, jnp.float32))
    for _ in range(32):
        state = method.step(lambda v: diagonal * v, state)
    basis = rows(state.basis, diagonal.size)
    assert np.abs(basis @ basis.T - np.eye(32)).max() < 1e-5


def test_memory_without_basis(as_users_compile):
    method = linops.Lanczos(8, reorthogonalize="none")
    start = {"w": jnp.ones((100, 100)), "b": jnp.ones(100)}
    step = jax.jit(lambda state: method.step(lambda v: jax.tree.map(lambda x: 2 * x, v), state))
    found = step.lower(method.init(start)).compile().memory_analysis()
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    assert total - found.alias_size_in_bytes <= 6 * 4 * 10_100


@pytest.mark.usefixtures("eight_devices")
def test_sharded_vectors_give_a_sharded_basis():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    start = default_rng(0).normal(size=(4096, 5)).astype(np.float32)
    diagonal = np.linspace(0, 1, start.size, dtype=np.float32).reshape(start.shape)
    method = linops.Lanczos(8)
    state, reference = method.init(jax.device_put(start, split)), method.init(jnp.asarray(start))
    sharded = jax.device_put(diagonal, split)
    for _ in range(8):
        state = method.step(lambda v: sharded * v, state)
        reference = method.step(lambda v: jnp.asarray(diagonal) * v, reference)
    rows = jax.tree.leaves(state.basis)
    assert not any(block.sharding.is_fully_replicated for block in rows)
    assert_allclose(state.alphas, reference.alphas, rtol=1e-5)
    assert_allclose(state.betas, reference.betas, rtol=1e-4)


def test_lanczos_refuses():
    with tiny.complains(r"reorthogonalize is 'ful'; allowed: .*Did you mean 'full'"):
        linops.lanczos(4, reorthogonalize="ful")
    with pytest.raises(ValueError, match="num_matvecs is 0"):
        linops.Lanczos(0)
    run = linops.lanczos(2)
    with pytest.raises(ValueError, match=r"length 0\.0"):
        run(lambda v: v, jnp.zeros(3))
    with pytest.raises(ValueError, match="length nan"):
        run(lambda v: v, jnp.array([1.0, np.nan]))
    for start, found in (
        (jnp.ones(3, int), "int32"),
        ((), "no arrays"),
        (jnp.ones(3, jnp.bfloat16), "bfloat16"),
    ):
        with pytest.raises(TypeError, match=f"start vector has {found}; .*float32 or float64"):
            run(lambda v: v, start)
    with pytest.raises(ValueError, match="the product has the structure"):
        run(lambda v: [v], jnp.ones(3))
    with pytest.raises(ValueError, match=r"the product has shape \(4,\)"):
        run(lambda v: jnp.ones(4), jnp.ones(3))
    with pytest.raises(ValueError, match="coefficients are not finite"):
        linops.ritz(run(lambda v: v * np.inf, jnp.ones(3)))
    with pytest.raises(ValueError, match="coefficients are not finite"):
        linops.ritz(jax.jit(lambda v: run(lambda v: v, v))(jnp.zeros(3)))


def test_probes_of_unequal_depth_are_padded():
    probes = linops.Tridiagonal(
        np.array([[1.0, 2], [3, 0]]), np.array([[0.5, 0.1], [0, 0]]), np.array([2, 1])
    )
    values, weights = linops.ritz(probes)
    assert_array_equal(values[1], [3, 3])
    assert_array_equal(weights[1], [1, 0])
    assert_allclose(values[0], np.linalg.eigvalsh([[1, 0.5], [0.5, 2]]))
    assert linops.gauss_radau(probes)[0].shape == (2, 3)
    assert quadrature(np.square, values, weights).tolist() == pytest.approx([1.25, 9])


# Density ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_density_of_the_original(case):
    values, weights = GOLDEN[f"lanczos/{case}/ritz_values"], GOLDEN[f"lanczos/{case}/ritz_weights"]
    names = [
        name for name in GOLDEN if name.startswith(f"density/{case}/") and name.endswith("/density")
    ]
    assert names
    for name in names:
        options = {
            key: float(value) for key, value in (part.split("=") for part in name.split("/")[2:-1])
        }
        density, grid = linops.spectral_density(
            values, weights, **options | {"bins": int(options["bins"])}
        )
        assert_allclose(density, GOLDEN[name], rtol=1e-9, atol=1e-11)
        ends = GOLDEN[name.removesuffix("density") + "grid_first_last"]
        assert_allclose(grid[[0, -1]], ends, rtol=1e-12)


def test_fine_density_of_the_original():
    """Gaussians narrower than the grid, each recovered from its two largest bins, give all others
    and no more.
    """
    bins, expected = (
        GOLDEN["pipeline/density_nonzero_bins"],
        GOLDEN["pipeline/density_nonzero_values"],
    )
    grid = golden_data.fine_grid()
    variance = 1e-10 * max(1, grid[-1] - grid[0])
    values, weights = [], []
    for cluster in np.split(np.arange(bins.size), np.flatnonzero(np.diff(bins) > 1) + 1):
        k = cluster[np.argmax(expected[cluster])]
        j = k + 1 if expected[k + 1] > expected[k - 1] else k - 1
        (x, y), ratio = grid[bins[[k, j]]], expected[k] / expected[j]
        values.append((x + y) / 2 - variance * np.log(ratio) / (y - x))
        weights.append(expected[k] * np.exp((x - values[-1]) ** 2 / (2 * variance)))
    assert len(values) == GOLDEN["lanczos/main/ritz_values"].size
    density, ours = linops.spectral_density(np.array(values), np.array(weights) / np.sum(weights))
    assert_allclose(ours[[0, -1]], grid[[0, -1]], rtol=1e-12)
    assert_array_equal(np.flatnonzero(density), bins)
    assert_allclose(density[bins], expected, rtol=1e-5)


def test_density_integrates_to_one_unless_it_misses_the_grid():
    density, grid = linops.spectral_density(
        np.array([0.0, 5.0]), np.array([0.25, 0.75]), bins=2000, sigma2=1e-3
    )
    assert np.sum(density) * (grid[1] - grid[0]) == pytest.approx(1)
    assert np.sum(density[grid > 2.5]) / np.sum(density) == pytest.approx(
        0.75, abs=0.2
    )  # cut at the grid's ends
    density, _ = linops.spectral_density(np.array([0.0, 5.0]), np.array([0.5, 0.5]), bins=8)
    assert_array_equal(density, 0)


# Eigenpairs and traces ----------------------------------------------------------------------------


def test_top_eigenpairs():
    matrix = dense([*spectrum("normal", 27), 9.0, -8.0, 7.0])
    start = jnp.asarray(default_rng(0).normal(size=30), jnp.float32)
    matvec = product(matrix, jnp.float32)
    values, vectors, residuals = linops.top_eigenpairs(3, 18)(matvec, start)
    assert_allclose(values, [9, -8, 7], rtol=1e-5)
    assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    true = [
        np.linalg.norm(matrix @ v - value * v)
        for value, v in zip(values, np.asarray(vectors, np.float64))
    ]
    assert_allclose(residuals, true, atol=2e-5)
    early = linops.top_eigenpairs(2, 6, on_host=True)(matvec, start)
    true = [
        np.linalg.norm(matrix @ v - value * v)
        for value, v in zip(early.values, np.asarray(early.vectors))
    ]
    assert_allclose(early.residuals, true, rtol=1e-3, atol=1e-5)
    assert (
        np.abs(np.subtract.outer(early.values, np.linalg.eigvalsh(matrix))).min(1)
        <= early.residuals + 1e-5
    ).all()
    with pytest.raises(ValueError, match="num is 7; allowed: 1 to num_matvecs, 6"):
        linops.top_eigenpairs(7, 6)
    values, _, _ = linops.top_eigenpairs(1, 2)(lambda v: [2 * v[0], 3 * v[1]], [1.0, 2.0])
    assert values == pytest.approx([3.0], abs=1e-6)
    with pytest.raises(ValueError, match="Krylov space has 1 dimensions"):
        linops.top_eigenpairs(2, 6)(lambda v: 2 * v, start)


def test_rademacher_vectors():
    like = {"a": jnp.zeros((50, 4)), "b": jnp.zeros(200, jnp.bfloat16)}
    signs = linops.rademacher(jax.random.key(0), like)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), signs) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    assert all(set(np.unique(leaf.astype(float))) == {-1, 1} for leaf in signs.values())
    assert not np.array_equal(signs["a"].ravel(), signs["b"].astype(jnp.float32))
    assert abs(float(signs["a"].mean())) < 0.25


@pytest.mark.parametrize("on_host", [False, True])
def test_traces_are_within_their_error(on_host):
    matrix = dense(spectrum("outliers", 20))
    matvec = product(matrix, jnp.float32)
    for estimate in (linops.hutchinson(40, on_host=on_host), linops.hutchpp(18, on_host=on_host)):
        of_key = lambda key, estimate=estimate: estimate(matvec, key, LIKE)
        of_key = of_key if on_host else jax.jit(of_key)
        found = [of_key(jax.random.key(i)) for i in range(3)]
        assert any(abs(t - np.trace(matrix)) > 1e-4 for t, _ in found)
        assert all(abs(t - np.trace(matrix)) < 4 * error + 1e-4 for t, error in found)
        assert all(0 < error < 30 for _, error in found)


def test_the_standard_error_of_a_trace_has_the_size_of_its_errors():
    """Its square is unbiased, also of two samples."""
    matvec = product(dense(spectrum("outliers", 20)), jnp.float32)
    estimate = jax.jit(jax.vmap(lambda key: linops.hutchinson(2)(matvec, key, LIKE)))
    found = estimate(jax.random.split(jax.random.key(0), 4000))
    assert_allclose(np.mean(found.standard_error**2), np.var(found.trace), rtol=0.1)


@hypothesis.given(SEED)
@hypothesis.settings(max_examples=10)
def test_hutchpp_is_exact_for_low_rank(seed):
    matrix = dense([5.0, -3.0, 2.0, 0.5, *np.zeros(16)], seed)
    found = traced_hutchpp(jnp.asarray(matrix, jnp.float32), jax.random.key(seed))
    assert_allclose(found.trace, 4.5, atol=1e-4)
    assert found.standard_error < 1e-4


traced_hutchpp = jax.jit(lambda matrix, key: linops.hutchpp(12)(product(matrix), key, LIKE))


def test_hutchpp_beats_hutchinson_where_the_spectrum_decays():
    matvec = product(dense(2.0 ** -np.arange(20)), jnp.float32)
    spread = lambda estimate: (
        jax.jit(lambda k: estimate(matvec, k, LIKE))(jax.random.key(0)).standard_error
    )
    assert spread(linops.hutchpp(30)) < spread(linops.hutchinson(30)) / 20
    for wrong, match in (
        (lambda: linops.hutchinson(1), "num_probes is 1"),
        (lambda: linops.hutchpp(3), "is 3; allowed"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


# What counts as a parameter


class Mixed(nnx.Module):
    """A network with running statistics, counters and random keys beside its parameters."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))


def test_the_documented_split_leaves_parameters_only():
    text = (tiny.ROOT / "docs" / "geometric_limit.md").read_text(encoding="utf-8")
    assert "net.eval()" in text
    assert "graph,params,rest=nnx.split(net,nnx.Param,...)" in "".join(text.split())
    net = nnx.jit(lambda: Mixed(nnx.Rngs(0)))()
    net.eval()
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    x = default_rng(0).normal(size=(6, 3)).astype(np.float32)
    loss = lambda params: jnp.mean(nnx.merge(graph, params, rest)(x) ** 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 3 * 4 + 4 + 2 * 4 + 4 * 2 + 2
    vector, rebuild = jax.flatten_util.ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda flat: loss(rebuild(flat))))(vector)
    signs = linops.rademacher(jax.random.key(1), params)
    product = jax.jit(lambda signs: linops.hvp(loss, params)(signs))(signs)
    flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
    assert_allclose(flat(product), dense @ flat(signs), atol=1e-5)


@pytest.mark.parametrize(
    "leaf", [jnp.arange(3), jnp.ones(3, bool), jax.random.key(0), jnp.ones(3, complex)]
)
def test_state_that_is_no_parameter_is_told_apart(leaf):
    state = {"dense": {"kernel": jnp.ones((2, 2))}, "other": leaf}
    for call in (
        lambda: linops.rademacher(jax.random.key(0), state),
        lambda: linops.hvp(lambda p: jnp.sum(p["dense"]["kernel"] ** 2), state),
        lambda: linops.gauss_newton(lambda p: p["dense"]["kernel"], jnp.sum, state),
        lambda: width.distances(state),
    ):
        with pytest.raises(TypeError, match=r"'other' is .* allowed: floating-point .* nnx\.Param"):
            call()
    if leaf.dtype == bool:
        assert masks.sparsity({"kept": leaf}) == 0
    else:
        with pytest.raises(TypeError, match="sparsity: 'other' is"):
            masks.sparsity(state)


def test_narrow_parameters_have_curvature():
    params = {"w": jnp.ones((6, 4), jnp.bfloat16)}
    x = jnp.ones((5, 6), jnp.bfloat16)
    product = linops.hvp(lambda p: jnp.sum(jnp.square(x @ p["w"])), params)
    estimate = jax.jit(lambda key: linops.hutchpp(24)(product, key, params))
    trace, error = estimate(jax.random.key(0))
    assert_allclose(trace, 2 * 5 * 6 * 4, rtol=0.01)
    assert error < 1
    with pytest.raises(TypeError, match="float32"):
        linops.lanczos(3)(product, linops.rademacher(jax.random.key(0), params))
    assert width.distances(params, scope="all").size == 24


@pytest.mark.usefixtures("eight_devices")
def test_curvature_on_meshes():
    rng = default_rng(0)
    matrices = rng.normal(size=(2, 6, 6)).astype(np.float32)
    starts = np.sign(rng.normal(size=(2, 6))).astype(np.float32)

    def measure(matrix, start):
        matvec = lambda v: matrix @ v
        traces = [
            method(matvec, jax.random.key(0), start)
            for method in (linops.hutchinson(3), linops.hutchpp(6))
        ]
        return (
            linops.lanczos(4)(matvec, start),
            linops.lanczos(4, reorthogonalize="none")(matvec, start),
            traces,
        )

    tiny.check_on_meshes(measure, matrices + matrices.swapaxes(1, 2), starts)
