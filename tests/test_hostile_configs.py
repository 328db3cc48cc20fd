"""Hostile values of every option: refused before anything compiles, in a sentence that names stage
and field.
"""

import jax
import pytest
import tiny

from sparsity_jax import (
    checkpoint,
    evaluate,
    losses,
    optim,
    pipeline,
    polytopes,
    report,
    tables,
    train,
    workdirs,
)

HOSTILE = [
    None,
    -1,
    10**400,
    2**33,
    -0.5,
    1e300,
    1e-300,
    float("nan"),
    "xyz",
    "\x00",
    [],
    [[]],
    ["x"],
    {"x": 1},
]
REQUIRED = dict(
    train=dict(epochs=1, optimizer=tiny.SGD),
    grow=dict(optimizer=tiny.SGD, ratios="[0:0.5]"),
    remove=dict(ratios="[0:0.5]"),
    oracle=dict(ratios="[0:0.5]"),
    prune=dict(ratio=0.5),
)


def checked(function, given: dict) -> dict:
    return tables.check_options(function, given)


def refusal_of(function, *arguments) -> str:
    """The sentence with which `function` refuses its arguments, "" if it takes them; other
    exceptions go through.
    """
    try:
        function(*arguments)
    except tables.ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", pipeline.STAGES)
def test_every_field_of_a_stage_takes_a_value_or_names_itself(kind):
    options = pipeline.STAGES[kind]
    whole = {**tables.defaults(options), **REQUIRED.get(kind, {})}
    refused = 0
    for field in tables.parameters(options):
        for value in HOSTILE:
            given = {**whole, field: value}
            sentence = refusal_of(
                lambda given: options(**checked(options, given)).settings(), given
            )
            refused += bool(sentence)
            assert not sentence or field in sentence, (value, sentence)
        with pytest.raises(tables.ConfigError, match=rf"{field}x.* mean '"):
            tables.check_options(options, {**whole, f"{field}x": 1})
    assert refused >= 8 * len(tables.parameters(options))


@pytest.mark.parametrize(
    "table", [optim.OPTIMIZERS, polytopes.SETS, losses.LOSSES, optim.SCHEDULES]
)
def test_every_option_of_a_table_takes_a_value_or_names_itself(table):
    for function in table.values():
        for field in tables.parameters(function):
            for value in HOSTILE:
                sentence = refusal_of(
                    checked, function, {**tables.defaults(function), field: value}
                )
                assert not sentence or sentence.startswith(field)


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
    with pytest.raises(tables.ConfigError, match=message):
        pipeline.build(pipeline.check(tiny.config("fit") | fields)[0])


def test_weights_that_are_not_finite_stop_the_next_stage(tmp_path, monkeypatch):
    """A diverged last step leaves a finite loss and NaN weights: no curve is drawn of them."""
    begin = train.begin
    spoiled = lambda *args: begin(*args)._replace(
        params=jax.tree.map(lambda leaf: leaf * float("nan"), args[1].params)
    )
    monkeypatch.setattr(train, "begin", spoiled)
    monkeypatch.setattr(train, "check_finite", lambda *_: None)
    with pytest.raises(
        train.NonFiniteLossError, match=r"fit, at its end: .* 'params/dense1/bias' are NaN"
    ):
        pipeline.run(tiny.config("fit", "curve"), tmp_path)


def test_finished_runs_and_members_need_nothing_but_their_folder(tmp_path, monkeypatch, pages):
    short = pipeline.stage("train", epochs=1, batch_size=32, optimizer=tiny.SGD)
    pipeline.run(tiny.config("fit", fit=short), tmp_path / "base")
    config = tiny.config("weights", start_from=str(tmp_path / "base"))
    first = pipeline.run(config, tmp_path / "more")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    page = (tmp_path / "more" / "report.html").read_bytes()
    monkeypatch.setattr(pipeline, "describe_environment", lambda _: {"jax": "another"})
    again = pipeline.run(config, tmp_path / "more")
    tiny.same(again.state, first.state)
    assert (tmp_path / "more" / "report.html").read_bytes() == page  # versions too
    sweep = tiny.config("fit", fit=short, sweep=dict(seed=(0, 1)), sweep_mode="loop")
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
    assert checkpoint.FOLDER == workdirs.FOLDER
