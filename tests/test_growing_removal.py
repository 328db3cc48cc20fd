"""Growing regularisation: what is left after the removal, by the channels that we trace in the original's network."""

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsity_jax import groups

FILE = "08_growing_reg.npz"
CASES = golden_data.parts(FILE, r"(\w+-?\d?/(?:filter|channel|weight)\w*)/pr$")


def network(variables, images):
    """The original's network in its layouts, with running statistics."""
    params, stats, x = variables["params"], variables["batch_stats"], images
    for conv, norm, pool in (("features.0", "features.1", jnp.max), ("features.4", "features.5", jnp.mean)):
        dimensions = ("NCHW", "OIHW", "NCHW")
        x = jax.lax.conv_general_dilated(x, params[conv]["weight"], (1, 1), "SAME", dimension_numbers=dimensions)
        if "bias" in params[conv]:
            x = x + params[conv]["bias"][:, None, None]
        mean, var = stats[norm]["running_mean"], stats[norm]["running_var"]
        scale = params[norm]["weight"] * jax.lax.rsqrt(var + 1e-5)
        x = (x - mean[:, None, None]) * scale[:, None, None] + params[norm]["bias"][:, None, None]
        x = jax.nn.relu(x)
        batch, channels, height, width = x.shape
        x = pool(x.reshape(batch, channels, height // 2, 2, width // 2, 2), (3, 5))
    return x.reshape(len(x), -1) @ params["classifier"]["weight"].T + params["classifier"]["bias"]


def stored(case, moment):
    """The arrays of a moment as variables."""
    variables = {"params": {}, "batch_stats": {}}
    for name in golden_data.parts(FILE, rf"{case}/{moment}/(.+)"):
        module, _, leaf = name.rpartition(".")
        kind = "batch_stats" if leaf.startswith("running") else "params"
        variables[kind].setdefault(module, {})[leaf] = golden_data.load(FILE)[f"{case}/{moment}/{name}"]
    return variables


def kept_channels(channels, case):
    """Which channels of each group the original keeps."""
    golden = golden_data.load(FILE)
    weights = [f"params/{name}/weight" for name in golden[f"{case}/layer_names"]]
    axis = 0 if golden_data.hyper(FILE)[case]["wg"] == "filter" else 1
    keep = {name: np.ones(group.size, bool) for name, group in channels.groups.items()}
    for j, path in enumerate(weights):
        removed = golden[f"{case}/pruned_idx/{j}"]
        for name, group in channels.groups.items():
            for member in group.members:
                if (member.path, member.axis) == (path, axis) and removed.size:
                    keep[name] &= ~np.isin(np.asarray(member.index), removed).any(1)
    return keep


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_the_originals(case):
    golden = golden_data.load(FILE)
    images = golden["data/x"][0]
    before = stored(case, "before_prune")
    for j, _ in enumerate(golden[f"{case}/layer_names"]):
        indices = [golden[f"{case}/{name}/{j}"] for name in ("pruned_idx", "kept_idx")]
        assert sorted(np.concatenate(indices)) == list(range(sum(map(len, indices))))
    with jax.enable_x64(True):
        variables = jax.tree.map(jnp.asarray, before)
        if golden_data.hyper(FILE)[case]["wg"] == "weight":
            logits = jax.jit(network)(variables, images)  # the original multiplies the masks later
        else:
            channels = groups.trace(network, variables, images)
            keep = kept_channels(channels, case)
            compact = groups.compact(variables, channels, keep)
            expected = stored(case, "after_prune")["params"]
            for module, leaves in expected.items():
                for leaf, array in leaves.items():
                    np.testing.assert_array_equal(compact["params"][module][leaf], array, err_msg=f"{module}.{leaf}")
            logits = groups.elastic(network, channels, keep)(compact, images)
        np.testing.assert_allclose(logits, golden[f"{case}/logits_after"], rtol=1e-9, atol=1e-11)
