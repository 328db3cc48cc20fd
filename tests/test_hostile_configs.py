"""Hostile values of every option: refused before anything compiles, in a sentence that names stage
and field.
"""

import typing

import jax
import pytest
import tiny

from sparsity_jax import (
    data,
    evaluate,
    losses,
    models,
    optim,
    pipeline,
    polytopes,
    progress,
    report,
    tables,
    train,
    workdirs,
)

TABLES = {
    "stage": pipeline.STAGES,
    "optimizer": optim.OPTIMIZERS,
    "schedule": optim.SCHEDULES,
    "penalty": optim.PENALTIES,
    "constraint": polytopes.SETS,
    "loss": losses.LOSSES,
    "tracker": train.TRACKERS,
    "model": models.MODELS,
    "data": {"any": data.Options},
}
WRONG_TYPE = {float: "x", int: 1.5, str: 3, bool: "yes", dict: 3, tuple: 3}


def mistakes_of(hint):
    """(value, path in it of what is wrong, what is wrong there, the nearest name) for options of
    the type `hint`.
    """
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Annotated:
        yield from mistakes_of(arguments[0])
        for value in values_beyond(*arguments):
            yield value, "", value, ""
    elif kind is tuple:
        yield 3, "", 3, ""
        length = 1 if ... in arguments else len(arguments)
        for value, path, wrong, name in mistakes_of(arguments[0]):
            yield (value,) * length, f"[0]{path}", wrong, name
    elif kind is typing.Literal:
        yield 1.5, "", 1.5, ""
        for name in arguments:
            if name and isinstance(name, str):
                yield f"{name}x", "", f"{name}x", name
    elif hint is not typing.Any:
        wrong = WRONG_TYPE.get(hint, {"x": 1})  # a union
        yield wrong, "", wrong, ""


def values_beyond(kind, limits):
    """Numbers just outside of the limits; none where the rule is about something else."""
    if not isinstance(limits, tables.Range):
        return
    if limits.low is not None:
        yield kind(limits.low) if limits.above else kind(limits.low - 1)
    if limits.high is not None:
        yield kind(limits.high) if limits.below else kind(limits.high + 1)
    if kind is float:
        yield from (float("nan"), float("inf"), 1e-300)


@pytest.mark.parametrize("what", TABLES)
def test_every_option_refuses_wrong_types_values_out_of_range_and_misspellings(what):
    table = TABLES[what]
    for name, entry in table.items():
        error = refusal_of(tables.lookup, table, f"x{name}", "name")
        assert (error.where, error.value, error.closest) == ("name", f"x{name}", name)
        hints = typing.get_type_hints(entry, include_extras=True)
        whole = dict.fromkeys(tables.parameters(entry))
        for option in whole:
            error = refusal_of(tables.check_options, entry, whole | {f"{option}x": 1})
            assert (error.value, error.closest) == (f"{option}x", option)
            for value, path, wrong, nearest in mistakes_of(hints[option]):
                given = REQUIRED.get(name, {}) | {option: value}
                error = refusal_of(tables.check_options, entry, given)
                assert (error.where, repr(error.value)) == (f"{option}{path}", repr(wrong))
                assert (bool(error.allowed), error.closest) == (True, nearest)


def refusal_of(function, *arguments) -> tables.ConfigError:
    with pytest.raises(tables.ConfigError) as refused:
        function(*arguments)
    return refused.value


HOSTILE = (None, -1, 10**400, 2**33, -0.5, 1e300, 1e-300, float("nan"))
HOSTILE += ("xyz", "\x00", [], [[]], ["x"], {"x": 1})
REQUIRED = dict(
    train=dict(epochs=1, optimizer=tiny.SGD),
    grow=dict(optimizer=tiny.SGD, ratios="[0:0.5]"),
    remove=dict(ratios="[0:0.5]"),
    oracle=dict(ratios="[0:0.5]"),
    prune=dict(ratio=0.5),
    any=dict(name="digits"),
)


@pytest.mark.parametrize("kind", pipeline.STAGES)
def test_a_stage_takes_any_value_of_a_field_or_names_it(kind):
    options = pipeline.STAGES[kind]
    whole = {**tables.defaults(options), **REQUIRED.get(kind, {})}
    made = lambda given: options(**tables.check_options(options, given)).check()
    for field in tables.parameters(options):
        told = [refused_or_taken(made, {**whole, field: value}) for value in HOSTILE]
        assert all(field in sentence for sentence in told if sentence)
        assert sum(map(bool, told)) >= 8


def refused_or_taken(make, given) -> str:
    """The sentence with which `make` refuses, "" if it takes what is given."""
    try:
        make(given)
    except tables.ConfigError as error:
        return str(error)
    return ""


WRONG = {
    "network too large for its images": (
        dict(model=dict(name="vgg11", width=4)),
        r"config\.model 'vgg11' for images of 8 x 8 x 1",
    ),
    "more weights than memory": (
        dict(model=dict(name="mlp", widths=(2 * 10**9, 2))),
        r"config\.model .*weights.* GB",
    ),
    "more weights than can be counted": (
        dict(model=dict(name="mlp", widths=(2**31 - 1,) * 3)),
        r"config\.model 'mlp'",
    ),
    "float64": (
        dict(model=dict(name="mlp", dtype="float64")),
        r"model\.dtype is 'float64'; allowed: .*JAX_ENABLE_X64",
    ),
    "float64 weights": (
        dict(model=dict(name="mlp", param_dtype="float64")),
        r"model\.param_dtype is 'float64'",
    ),
    "seed beyond 32 bits": (
        dict(seed=2**32),
        r"config\.seed is 4294967296; allowed: int >= 0 and <= 4294967295",
    ),
    "seed that is no integer": (dict(seed=1e20), r"config\.seed is 1e\+20"),
    "swept seed": (dict(sweep=dict(seed=(0, 1e20))), r"config\.sweep\.seed is 1e\+20"),
    "too many steps": (
        dict(fit=pipeline.stage("train", epochs=2**31 - 1, batch_size=32, optimizer=tiny.SGD)),
        r"config\.fit\.epochs is 2147483647, .*steps",
    ),
    "noise on nothing": (
        dict(pipeline=("fit", "noise"), noise=pipeline.stage("noise", parameters="xyz")),
        r"config\.noise\.parameters is 'xyz', which matches no parameter",
    ),
    "a Lanczos basis larger than memory": (
        dict(pipeline=("fit", "s"), s=pipeline.stage("spectrum", num_matvecs=2**31 - 1)),
        r"config\.s\.num_matvecs is 2147483647, whose basis",
    ),
    "a label that cannot be printed": (dict(title="a\x00b"), r"config\.title is .*printed"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_does_not_fit_stops_before_training(mistake):
    fields, message = WRONG[mistake]
    with tiny.complains(message):
        pipeline.build(pipeline.check(tiny.config("fit") | fields))


def test_weights_that_are_not_finite_stop_the_next_stage(tmp_path, monkeypatch):
    """A diverged last step leaves a finite loss and NaN weights: no curve is drawn of them."""
    begin = train.begin
    spoiled = lambda *args: begin(*args)._replace(
        params=jax.tree.map(lambda leaf: leaf * float("nan"), args[2].params)
    )
    monkeypatch.setattr(train, "begin", spoiled)
    monkeypatch.setattr(train, "check_finite", lambda *_: None)
    with pytest.raises(
        train.NonFiniteLossError, match=r"fit: at its end: .* 'params/dense1/bias' are NaN"
    ):
        pipeline.run(tiny.config("fit", "curve"), tmp_path)


def test_finished_runs_and_members_need_nothing_but_their_folder(tmp_path, monkeypatch):
    short = pipeline.stage("train", epochs=1, batch_size=32, optimizer=tiny.SGD)
    pipeline.run(tiny.config("fit", fit=short), tmp_path / "base")
    config = tiny.config("weights", start_from=str(tmp_path / "base"))
    with tiny.pages(True):
        first = pipeline.run(config, tmp_path / "more")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    page = (tmp_path / "more" / "report.html").read_bytes()
    monkeypatch.setattr(progress, "describe_environment", lambda _: {"jax": "another"})
    with tiny.pages(True):
        again = pipeline.run(config, tmp_path / "more")
    tiny.same(again.state, first.state)
    assert (tmp_path / "more" / "report.html").read_bytes() == page  # versions too
    sweep = tiny.config("fit", fit=short, sweep=dict(seed=(0, 1), mode="loop"))
    pipeline.run(sweep, tmp_path / "sweep")
    (expected,) = evaluate.run(tmp_path / "sweep" / "member_001")
    (tmp_path / "sweep" / "member_001").rename(tmp_path / "alone")
    (found,) = evaluate.run(tmp_path / "alone")
    assert found["test_loss"] == expected["test_loss"]
    assert workdirs.read_config(tmp_path / "alone")["sweep"] == {}


def test_a_continued_run_lists_the_versions_of_both(tmp_path):
    report.write_environment(tmp_path, {"jax": "0.10.2", "numpy": "2.4", "command": "first"})
    joined = report.continued(tmp_path, {"jax": "0.11.0", "numpy": "2.4", "command": "second"})
    assert joined == {"jax": "0.10.2, then 0.11.0", "numpy": "2.4", "command": "first"}
    report.write_environment(tmp_path, joined)
    assert report.continued(tmp_path, {"jax": "0.11.0"})["jax"] == "0.10.2, then 0.11.0"
