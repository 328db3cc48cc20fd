"""What is a kernel and which of its axes are inputs and outputs: by the trace for any framework, by
name or refused.
"""

import foreign
import jax
import numpy as np
import pytest
from tiny import complains

from sparsity_jax import groups, kernels

# inputs, outputs, window
AXES = {
    "depthwise": {
        "params/depthwise/kernel": ((2,), (3,), (0, 1)),
        "params/out/kernel": ((0,), (1,), ()),
    },
    "unet": {"params/up1/kernel": ((3,), (2,), (0, 1)), "params/up2/kernel": ((2,), (3,), (0, 1))},
    "vit": {
        "params/attention/query/kernel": ((0,), (1, 2), ()),
        "params/attention/out/kernel": ((0, 1), (2,), ()),
        "params/patches/kernel": ((2,), (3,), (0, 1)),
    },
    "scanned": {"params/layers/up/kernel": ((1,), (2,), ())},
    "nnx": {"conv1/kernel/value": ((2,), (3,), (0, 1))},
    "equinox": {"layers/0/weight": ((1,), (0,), (2, 3)), "layers/8/weight": ((1,), (0,), ())},
    "plain": {"u": ((0,), (1,), ())},
}
NO_KERNELS = ("bias", "embed", "embedding", "position", "token", "scale", "norm")


@pytest.mark.parametrize("name", sorted(AXES))
def test_a_trace_tells_inputs_and_outputs_in_any_framework(name):
    if name == "equinox":
        pytest.importorskip("equinox")
    apply, variables, inputs = foreign.FOREIGN[name]()
    channels = groups.trace(apply, variables, *inputs)
    found = kernels.axes(variables, kernels.paths(variables, channels), channels)
    for path, expected in AXES[name].items():
        assert found[path] == kernels.Axes(*expected)
    for path in found:
        assert path.removesuffix("/value").split("/")[-1] not in NO_KERNELS


def test_a_part_of_the_traced_variables_will_do():
    apply, variables, inputs = foreign.FOREIGN["vit"]()
    channels = groups.trace(apply, variables, *inputs)
    whole, part = (kernels.paths(tree, channels) for tree in (variables, variables["params"]))
    assert [path.removeprefix("params/") for path in whole] == part
    assert "attention/out/kernel" in part
    assert "position" not in part
    with pytest.raises(ValueError, match="has shape"):
        kernels.paths({"params": {"up": {"kernel": np.ones((3, 3))}}}, channels)


def shapes(**arrays):
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in arrays.items()}


def test_names_decide_only_as_far_as_they_tell():
    known = {
        "dense/kernel": (40, 30),
        "gru/w": (30, 30),
        "layer/weight": (20, 30),
        "embed/embedding": (500, 30),
    }
    small = {"gamma_matrix": (4, 4), "norm/bias": (8, 9), "norm/weight": (9,), "row": (1, 3000)}
    assert kernels.paths(shapes(**known, **small)) == ["dense/kernel", "gru/w", "layer/weight"]
    large = shapes(**known, **{"mlp/gate": (2, 90, 30), "mlp/up": (30, 20)})
    with pytest.raises(ValueError, match=r"'mlp/gate' and 1 more hold .*include=.*exclude="):
        kernels.paths(large)
    assert kernels.paths(large, include="mlp/.*") == [*known][:3] + ["mlp/gate", "mlp/up"]
    assert kernels.paths(large, exclude="mlp/.*|gru/w") == ["dense/kernel", "layer/weight"]
    with pytest.raises(ValueError, match=r"'mlp/gate' hold"):
        kernels.paths(large, include="mlp/up")
    with complains(r"include is 'mpl/\.\*', which matches no parameter"):
        kernels.paths(large, include="mpl/.*")
    with pytest.raises(ValueError, match=r"scope='all'"):
        kernels.paths(shapes(bias=(3, 3)))


@pytest.mark.parametrize(
    ("name", "shape", "layout", "expected"),
    [
        ("conv/kernel", (3, 3, 4, 8), None, ((2,), (3,), (0, 1))),
        ("linear/w", (4, 8), None, ((0,), (1,), ())),
        ("conv/kernel/value", (3, 4, 8), "in_out", ((1,), (2,), (0,))),
        ("conv/weight", (8, 4, 3, 3), "out_in", ((1,), (0,), (2, 3))),
        ("w", (8, 4), "out_in", ((1,), (0,), ())),
        ("conv/weight", (8, 4, 3, 3), None, None),
        ("weight", (8, 4), None, None),
        ("attention/query/kernel", (12, 3, 4), None, None),
        ("gate", (8, 4), None, None),
        ("kernel", (8,), "in_out", None),
    ],
)
def test_layouts_by_name_or_refused(name, shape, layout, expected):
    params = shapes(**{name: shape})
    if expected:
        assert kernels.axes(params, [name], layout=layout) == {name: kernels.Axes(*expected)}
    else:
        with pytest.raises(ValueError, match=r"channels=groups.trace.*layout='out_in'"):
            kernels.axes(params, [name], layout=layout)


def test_unknown_paths_and_layouts_are_named():
    params = shapes(kernel=(3, 4))
    with pytest.raises(ValueError, match="Did you mean 'kernel'"):
        kernels.axes(params, ["kernl"])
    with complains("layout is 'oihw'"):
        kernels.axes(params, ["kernel"], layout="oihw")
    channels = groups.trace(
        lambda v, x: x @ v["kernel"] + v["table"],
        dict(params, **shapes(table=(2, 4))),
        np.ones((2, 3)),
    )
    with pytest.raises(ValueError, match="'table' has no inputs and outputs"):
        kernels.axes(dict(params, **shapes(table=(2, 4))), ["table"], channels)
