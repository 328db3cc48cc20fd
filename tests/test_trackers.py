"""Numbers of a run at Weights & Biases and MLflow, which stand-ins take the place of."""

import sys
import types

import pytest
import tiny

from sparsity_jax import pipeline, plans
from sparsity_jax.report import Writer, trackers

CALLS = ("init", "log", "finish", "start_run", "log_params", "log_metrics", "end_run")


@pytest.fixture
def libraries(monkeypatch):
    """Both libraries: modules that write down (name, arguments, options) of every call."""
    said = []

    def call(name):
        def noted(*arguments, **options):
            said.append((name, arguments, options))
            return types.SimpleNamespace(**functions)

        return noted

    functions = {name: call(name) for name in CALLS}
    for library in trackers.TRACKERS:
        module = types.ModuleType(library)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, library, module)
    return said


def test_trackers_get_the_numbers_of_all_rows(libraries, tmp_path):
    """Those so far first, as at TensorBoard."""
    config = dict(title="A study", fit=dict(rate=0.1, widths=[8, 8]))
    row = dict(stage="fit", kind="train", visit=1, arm="A", member=0)
    begun = trackers.begin(("wandb", "mlflow"), tmp_path / "run", config)
    with Writer(tmp_path / "run", [row | dict(step=3, train_loss=0.5)], begun) as writer:
        writer.append([row | dict(step=6, train_loss=0.25, layers={"a": 1.0}), row])
    by_name = lambda name: [
        (*each, options) for called, each, options in libraries if called == name
    ]
    assert by_name("init") == [
        (dict(project="sparsity_jax", group="A study", name="run", config=config),)
    ]
    last = {"fit/train_loss": 0.25, "fit/layers/a": 1.0}
    assert by_name("log") == [
        ({"fit/train_loss": 0.5, "fit/step": 3}, {}),
        ({**last, "fit/step": 6}, {}),
    ]
    settings = {"title": '"A study"', "fit.rate": "0.1", "fit.widths": "[8, 8]"}
    assert by_name("log_params") == [(settings, {})]
    assert by_name("log_metrics") == [({"fit/train_loss": 0.5}, dict(step=3)), (last, dict(step=6))]
    assert len(by_name("finish")) == len(by_name("end_run")) == 1


def test_a_run_tells_the_trackers_of_its_config(libraries, tmp_path):
    pipeline.run(tiny.config("fit", log=("wandb",)), tmp_path)
    names = [name for name, *_ in libraries]
    assert names == ["init", *["log"] * (len(names) - 2), "finish"]
    assert len(names) > 2


@pytest.mark.parametrize("library", trackers.TRACKERS)
def test_a_missing_library_is_told_before_anything_is_loaded(library, tmp_path, monkeypatch):
    (tmp_path / library).mkdir()  # as wandb leaves one behind
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with tiny.refused("config.log", library, allowed=f"sparsity_jax[{library}]"):
        plans.check(tiny.config("fit", log=(library,)))
    with tiny.refused("config.log[0]", "wanb", "wandb"):
        plans.check(tiny.config("fit", log=("wanb",)))
