"""What claims to be exact computes in full float32 on every device: read from the programs, since a
CPU rounds none of them. Training does as it is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax

from sparsity_jax import (
    evaluate,
    geometry,
    gradinit,
    interface,
    linops,
    losses,
    pipeline,
    polytopes,
    probes,
    report,
    scores,
    spectrum,
    structured,
    surgery,
    train,
)

PRODUCTS = ("dot_general", "conv_general_dilated")
DATA = np.linspace(-1, 1, 6 * 25).reshape(6, 5, 5, 1).astype(np.float32)
PARAMS = {
    "conv": np.linspace(-0.5, 0.4, 18).reshape(3, 3, 1, 2).astype(np.float32),
    "dense": np.linspace(-0.3, 0.5, 54).reshape(18, 3).astype(np.float32),
}
MATRIX = np.eye(72, dtype=np.float32)


def inner_programs(value):
    """The jaxprs that a parameter of an equation holds."""
    if isinstance(value, (tuple, list)):
        return [program for item in value for program in inner_programs(item)]
    program = getattr(value, "jaxpr", value)
    return [program] if hasattr(program, "eqns") else []


def precisions_in(program):
    """Names of the precisions of all products in a jaxpr; None where it leaves them open."""
    names = set()
    for eqn in program.eqns:
        if eqn.primitive.name in PRODUCTS:
            given = eqn.params["precision"]
            both = given if isinstance(given, tuple) else (given, given)
            names |= {precision and precision.name for precision in both}
        for value in eqn.params.values():
            for inner in inner_programs(value):
                names |= precisions_in(inner)
    return names


def precisions_of(function, *arguments):
    return precisions_in(jax.make_jaxpr(function)(*arguments).jaxpr)


@jax.custom_vjp
def layer(x, kernel):
    return x @ kernel


def backward(kept, g):
    x, kernel = kept
    return g @ kernel.T, x.T @ g


layer.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), backward)


def outputs(params, images, dense=jnp.matmul):
    """A network with a program in it, and a layer that is computed again for its derivative."""
    windows = ("NHWC", "HWIO", "NHWC")
    convolve = functools.partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=windows
    )
    features = jax.jit(convolve)(images, params["conv"]).reshape(len(images), -1)
    return jax.checkpoint(dense)(jnp.tanh(features), params["dense"])


def loss(params, images, temperature=1.0):
    return jnp.mean(jnp.square(outputs(params, images) / temperature))


def reversible(params, images, temperature=1.0):
    """With a derivative of its own, which forward mode does not know."""
    return jnp.mean(jnp.square(outputs(params, images, layer) / temperature))


def of_logits(z, *_):
    return jnp.mean(jnp.square(z))


def matvec(v):
    return {"all": MATRIX @ v["all"]}


VECTOR = {"all": np.ones(72, np.float32)}
KEY = jax.random.key(0)


def product_of_batches(**options):
    return spectrum.over_batches(spectrum.hessian_product(loss, **options), DATA, 4, **options)


def linear_product(**options):
    product = spectrum.hessian_product(loss, **options)
    return spectrum.linearized(product, PARAMS, DATA, 4, **options)


def statistics(needs, chosen=loss, **options):
    collect = scores.gather(chosen, needs, 4, **options)
    return functools.partial(collect, data=DATA, balanced=DATA)


# programs of functions of a loss or a network: (what the options make, its arguments)
CASES = {
    "hvp": (lambda **options: linops.hvp(loss, PARAMS, DATA, **options), PARAMS),
    "gauss_newton": (
        lambda **options: linops.gauss_newton(
            lambda params: outputs(params, DATA), of_logits, PARAMS, **options
        ),
        PARAMS,
    ),
    "over_batches": (product_of_batches, PARAMS, PARAMS),
    "linearized": (linear_product, PARAMS),
    "taylor": (lambda **options: spectrum.taylor(loss, DATA, 4, **options), PARAMS, PARAMS),
    "batch_losses": (
        lambda **options: lambda params: spectrum.batch_losses(loss, params, DATA, 4, **options),
        PARAMS,
    ),
    "gather gradients": (functools.partial(statistics, ("g2",), reversible), PARAMS),
    "gather products": (functools.partial(statistics, ("hg_grasp",)), PARAMS),
    "scale_step": (
        lambda **options: gradinit.scale_step(reversible, polytopes.Unconstrained(), **options),
        gradinit.init(PARAMS),
        DATA,
        DATA,
    ),
    "jacobian_singular_values": (
        lambda **options: (
            lambda params, images: probes.jacobian_singular_values(
                outputs, params, images, **options
            )
        ),
        PARAMS,
        DATA,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_all_products_are_in_full_precision_unless_an_option_relaxes_them(name):
    make, *arguments = CASES[name]
    assert precisions_of(make(), *arguments) == {"HIGHEST"}
    assert precisions_of(make(precision="tensorfloat32"), *arguments) == {"HIGH"}
    with jax.default_matmul_precision("bfloat16"):  # as a whole run may be
        assert precisions_of(make(), *arguments) == {"HIGHEST"}


def orthogonal(kernel):
    return surgery.reinitialize(
        {"kernel": kernel}, {"kernel": kernel != 0}, KEY, method="orthogonal"
    )


# of operators, which may say themselves how precise they are
OPERATORS = {
    "lanczos": (lambda matvec: lambda v: linops.lanczos(3)(matvec, v), VECTOR),
    "hutchinson": (lambda matvec: lambda v: linops.hutchinson(2)(matvec, KEY, v), VECTOR),
    "hutchpp": (lambda matvec: lambda v: linops.hutchpp(6)(matvec, KEY, v), VECTOR),
    "squared": (linops.squared, VECTOR),
    "over_batches": (
        lambda matvec: spectrum.over_batches(lambda _, v, batch: matvec(v), DATA, 4),
        VECTOR,
        VECTOR,
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_that_leaves_its_precision_open_is_in_full(name):
    make, *arguments = OPERATORS[name]

    def relaxed(v):
        with jax.default_matmul_precision("high"):
            return matvec(v)

    assert precisions_of(make(matvec), *arguments) == {"HIGHEST"}
    kept = precisions_of(make(relaxed), *arguments)
    assert "HIGH" in kept
    assert kept <= {"HIGH", "HIGHEST"}  # those of the algorithm itself stay


def test_weights_drawn_as_orthogonal_are():
    kernel = np.ones((6, 4), np.float32)
    assert precisions_of(orthogonal, kernel) == {"HIGHEST"}


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listening():
    """(a problem that computes curvature in `float32`, a state, and the precisions in which its
    network was used so far)."""
    heard = set()

    def heeded(function):
        @functools.wraps(function)
        def heard_too(*arguments, **options):
            heard.add(jax.config.jax_default_matmul_precision)
            return function(*arguments, **options)

        return heard_too

    problem = tiny.problem(curvature_precision="float32")
    model = problem.model
    model = model._replace(apply=heeded(model.apply), apply_train=heeded(model.apply_train))
    problem = problem._replace(model=model)
    structured.channels_of(problem)  # shapes only
    return problem, train.create_state(problem, train.key_of(0)), heard


EXACT = {
    "path": dict(ratios=(0.5,)),
    "row_norms": dict(num_weights=1),
    "row_norms of batches": dict(num_weights=1, rows="original"),
    "spectrum": dict(num_matvecs=1),
    "spectrum linearized": dict(num_matvecs=1, linearize_once=True, operator="gauss_newton"),
    "cut": dict(measure="grasp", ratio=0.5, imp_samples=40),
    "sfw_init": dict(constraint=tiny.POLYTOPE, iterations=1, batch_size=32),
    "jacobian": dict(num_examples=2),
}


@pytest.mark.parametrize("name", EXACT)
def test_stages_that_claim_to_be_exact_use_the_precision_of_curvature(name, listening):
    problem, state, heard = listening
    stage = tiny.settings(name.split(" ", 1)[0], **EXACT[name])
    place = interface.Place("x", 0, {"x": [stage]}, earlier=[[]], rows=[[]])
    heard.clear()
    with jax.default_matmul_precision("bfloat16"):
        for _ in stage.run(problem, stage.begin(problem, state, place), place):
            pass
    assert heard == {"float32"}


def test_the_tolerated_loss_is_in_the_precision_of_curvature(listening):
    problem, state, heard = listening
    heard.clear()
    geometry.tolerated(
        problem, geometry.wide_variables(state), tiny.settings("width", batch_size=32)
    )
    assert heard == {"float32"}


def test_training_leaves_its_products_to_jax(listening):
    problem, _, _ = listening
    fit = tiny.fit()
    state, numbers = tiny.start(problem, fit)
    images, labels = (array[:32] for array in train.arrays(problem, "train"))
    step = functools.partial(train.step_on_batch, problem, fit)
    assert precisions_of(step, state, numbers, 0, images, labels) == {None}


def test_a_run_trains_and_evaluates_in_its_precision_and_says_so(tmp_path, monkeypatch):
    heard = set()
    whole = losses.cross_entropy

    def heeded(logits, labels):
        heard.add(jax.config.jax_default_matmul_precision)
        return whole(logits, labels)

    monkeypatch.setattr(losses, "cross_entropy", heeded)
    monkeypatch.setitem(losses.LOSSES, "heeded", heeded)
    config = tiny.config("fit", precision="high")
    config["fit"] |= dict(epochs=1, loss=dict(name="heeded"))
    pipeline.run(config, tmp_path)
    assert heard == {"high"}
    assert report.read_environment(tmp_path)["precision"] == "high, of curvature highest"
    heard.clear()
    evaluate.run(tmp_path)
    assert heard == {"high"}


def test_an_unknown_precision_is_refused():
    config = tiny.config("fit", curvature_precision="hihgest")
    with tiny.refused("config.curvature_precision", "hihgest", "highest"):
        pipeline.check(config)


def test_a_network_of_a_narrower_type_says_so(tmp_path):
    config = tiny.config("fit")
    config["fit"]["epochs"] = 1
    config["model"] = dict(name="mlp", widths=(8,), dtype="bfloat16")
    pipeline.run(config, tmp_path)
    assert "the network computes in bfloat16" in report.read_environment(tmp_path)["precision"]
