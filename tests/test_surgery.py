"""Weights drawn anew have the moments of the compact network and respect masks; noise has the size
asked for.
"""

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from tiny import complains

from sparsity_jax import groups, masks, models, surgery, trees

KEY = jax.random.key(3, impl="rbg")  # compiles faster than the default
SHAPE = (3, 3, 24, 40)


def structured(shape=SHAPE, kept_in=15, kept_out=30):
    """Bool: the first of every three channels missing, or so."""
    rng = default_rng(0)
    keep_in, keep_out = (
        rng.permutation(n) < k for n, k in ((shape[-2], kept_in), (shape[-1], kept_out))
    )
    return np.broadcast_to(keep_in[:, None] & keep_out, shape), keep_in, keep_out


def params_of(kernel):
    return {
        "conv": {"kernel": kernel, "bias": jnp.full(kernel.shape[-1], 3.0)},
        "bn": {"scale": jnp.full(kernel.shape[-1], 3.0), "bias": jnp.full(kernel.shape[-1], 3.0)},
        "norm": {"weight": jnp.full(5, 3.0)},
        "position": jnp.full((2, 5), 3.0),
    }


def reinitialized(kernel_mask, **options):
    params = params_of(jnp.zeros(kernel_mask.shape))
    kept = masks.full(params)
    kept["conv"] = {
        "kernel": jnp.asarray(kernel_mask),
        "bias": jnp.arange(kernel_mask.shape[-1]) > 3,
    }
    kept["norm"]["weight"] = jnp.arange(5) > 0
    return surgery.reinitialize(params, kept, KEY, **options)


def test_normal_has_the_variance_of_the_compact_network():
    mask, keep_in, keep_out = structured()
    kernel = np.asarray(reinitialized(mask)["conv"]["kernel"])
    assert not kernel[~mask].any()
    compact = kernel[:, :, keep_in][..., keep_out]
    assert compact.size == 9 * 15 * 30
    assert abs(compact.std() * np.sqrt(9 * 15 / 2) - 1) < 0.04
    assert abs(compact.mean()) < 4 * compact.std() / np.sqrt(compact.size)
    single = (
        default_rng(1).random(SHAPE) < 0.5
    )  # no channel is missing: the dense network's variance
    kernel = np.asarray(reinitialized(single)["conv"]["kernel"])
    assert abs(kernel[single].std() * np.sqrt(9 * 24 / 2) - 1) < 0.04


@pytest.mark.parametrize(("kept_in", "kept_out"), [(15, 30), (24, 40), (2, 40), (1, 1)])
def test_orthogonal_columns_or_rows(kept_in, kept_out):
    mask, keep_in, keep_out = structured(kept_in=kept_in, kept_out=kept_out)
    kernel = np.asarray(reinitialized(mask, method="orthogonal")["conv"]["kernel"])
    assert not kernel[~mask].any()
    matrix = kernel[:, :, keep_in][..., keep_out].reshape(-1, kept_out)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert len(values) == min(9 * kept_in, kept_out)
    assert_allclose(values, 1, rtol=1e-5)


def test_orthogonal_is_uniform():
    mask = jnp.ones((3, 3), bool)
    drawn = np.asarray(
        jax.vmap(lambda key: surgery.orthogonal(key, mask, jnp.float32))(
            jax.random.split(KEY, 4000)
        )
    )
    assert_allclose(
        np.mean(drawn, 0), 0, atol=0.04
    )  # of a Haar matrix: mean 0, variance 1/n, both signs
    assert_allclose(np.mean(drawn**2, 0), 1 / 3, atol=0.03)
    assert abs(np.mean(np.linalg.det(drawn) > 0) - 0.5) < 0.05


@pytest.mark.parametrize("method", sorted(surgery.METHODS))
def test_other_arrays(method):
    params = reinitialized(np.ones((4, 6), bool), method=method)
    assert_array_equal(params["conv"]["bias"], 0)
    assert_array_equal(params["bn"]["scale"], 1)
    assert_array_equal(params["bn"]["bias"], 0)
    assert_array_equal(params["norm"]["weight"], [0, 1, 1, 1, 1])
    assert_array_equal(params["position"], 3)
    assert np.all(params["conv"]["kernel"] != 0)
    with complains("method is 'zeros'; allowed: normal, orthogonal"):
        reinitialized(np.ones((4, 6), bool), method="zeros")


@pytest.mark.parametrize("method", sorted(surgery.METHODS))
def test_a_network_under_jit_and_vmap(method):
    model = models.build(
        name="resnet", num_classes=5, stage_sizes=(1,), widths=(4,), inner_widths=(3,)
    )
    images = jnp.ones((2, 8, 8, 3))
    variables = foreign.filled(jax.eval_shape(model.init, KEY, images))
    channels = groups.trace(model.apply, variables, images)
    params = variables["params"]
    kept = jax.tree.map(
        lambda x: x != 0, groups.mask(params, channels, groups.random_keep(channels, KEY))
    )
    draw = lambda kept, key: surgery.reinitialize(params, kept, key, method=method)
    drawn = jax.jit(jax.vmap(draw, in_axes=(None, 0)))(kept, jax.random.split(KEY, 2))
    for path, (first, second) in trees.named_leaves(drawn).items():
        assert_array_equal(first != 0, trees.named_leaves(kept)[path] & (path[-4:] != "bias"))
        assert path.endswith("kernel") != bool(jnp.all(first == second))


def test_noise():
    params = {
        "a": {"kernel": jnp.full((200, 300), 4.0), "bias": jnp.ones(300)},
        "b": {"kernel": jnp.zeros((200, 300)).at[:100].set(2.0)},
    }
    kept = masks.full(params)
    kept["b"]["kernel"] = params["b"]["kernel"] != 0
    difference = lambda noisy: jax.tree.map(lambda x, y: np.asarray(x - y), noisy, params)
    noise = jax.jit(
        lambda std: surgery.add_noise(params, KEY, std=std, pattern=".*/kernel", kept=kept)
    )
    added = difference(noise(0.1))
    assert not added["a"]["bias"].any()
    assert not added["b"]["kernel"][100:].any()
    for sample in (added["a"]["kernel"], added["b"]["kernel"][:100]):
        assert abs(sample.std() / 0.1 - 1) < 0.02
        assert abs(sample.mean()) < 0.002
    assert (
        abs(
            np.corrcoef(added["a"]["kernel"][:100].ravel(), added["b"]["kernel"][:100].ravel())[
                0, 1
            ]
        )
        < 0.03
    )
    added = difference(surgery.add_noise(params, KEY, std=0.1, relative=True, kept=kept))
    assert abs(added["a"]["kernel"].std() / 0.4 - 1) < 0.02
    assert abs(added["b"]["kernel"][:100].std() / 0.2 - 1) < 0.02
    assert abs(added["a"]["bias"].std() / 0.1 - 1) < 0.2
    half = {
        "kernel": jnp.ones((300, 300), jnp.float16)
    }  # whose squares sum to more than float16 holds
    noisy = surgery.add_noise(half, KEY, std=0.1, relative=True)["kernel"]
    assert abs(np.asarray(noisy, float).std() / 0.1 - 1) < 0.02
    whole = difference(surgery.add_noise(params, KEY, std=0.1))
    assert abs(whole["b"]["kernel"].std() / 0.1 - 1) < 0.02
    with complains("matches no parameter"):
        surgery.add_noise(params, KEY, std=0.1, pattern="kernel")


@pytest.mark.parametrize("method", sorted(surgery.METHODS))
def test_kernels_of_other_layouts_are_told_or_refused(method):
    params = {
        "linear": {"weight": jnp.ones((50, 200)), "bias": jnp.ones(50)},
        "heads": {"kernel": jnp.ones((200, 5, 10))},
    }
    apply = lambda p, x: (
        x @ p["linear"]["weight"].T + p["linear"]["bias"],
        jnp.einsum("bi,ihs->bhs", x, p["heads"]["kernel"]),
    )
    channels = groups.trace(apply, params, jnp.ones((2, 200)))
    kept = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    with pytest.raises(ValueError, match=r"layout='out_in'"):
        surgery.reinitialize(params, kept, KEY, method=method)
    drawn = surgery.reinitialize(params, kept, KEY, method=method, channels=channels)
    for kernel in (drawn["linear"]["weight"].T, drawn["heads"]["kernel"].reshape(200, 50)):
        if method == "normal":
            assert float(kernel.std()) == pytest.approx((2 / 200) ** 0.5, rel=0.05)
        else:
            assert_allclose(kernel.T @ kernel, np.eye(50), atol=1e-4)
