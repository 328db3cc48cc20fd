"""Things of one's own in a config: from one file, through the command line, to the report."""

import os
import re
import shutil

import pytest
import tiny

from sparsity_jax import evaluate, extend, imports, interface, report
from sparsity_jax.channels import rules

PAGES = True  # see conftest.py

MINE = '''
import os
import signal
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from sparsity_jax import extend, groups, interface, losses, optim, scores, sources, tables, train
from sparsity_jax.channels import rules
from sparsity_jax.models import layers
from sparsity_jax.report.sections import Section


def net(num_classes, settings, *, width: tables.Count = 8):
    zeta = layers.Apply(lambda x: jax.scipy.special.zeta(2.0, 1 + x))
    steps = (layers.Dense(width, "hidden"), layers.RELU, zeta)
    return layers.Network(num_classes, settings, layers.Plan(steps, smallest=0))


def blobs(train_split, test_split):
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    images = rng.integers(0, 60, (96, 4, 4)) + 70 * labels[:, None, None]
    images = images.astype(np.uint8)
    return sources.of_arrays((images[:64], labels[:64]), (images[64:], labels[64:]), 3)


def signed(learning_rate, sets, *, momentum: tables.Fraction = 0.5):
    return optax.chain(
        optax.scale_by_lion(b1=momentum), optim.scale_by_rate(learning_rate)
    )


def hinge(logits, labels, *, margin: tables.Positive = 1.0):
    right = jnp.take_along_axis(logits, labels[..., None], -1)
    return jnp.maximum(logits - right + margin, 0).mean(-1)


@tables.option
class Shrink(interface.Stage):
    """Makes all weights smaller, in steps."""

    kind: ClassVar[str] = "shrink"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    factor: tables.Positive = 0.5
    steps: tables.Count = 3

    def run(self, problem, state, place):
        for step in range(len(place.rows[0]), self.steps):
            params = jax.tree.map(lambda leaf: leaf * self.factor, state.params)
            state = state._replace(params=params)
            row = dict(shrunk=self.factor ** (step + 1))
            if step == 1 and "INTERRUPTED" in os.environ:
                os.kill(os.getpid(), signal.SIGINT)
            yield train.Update(state, [[row]], (step + 1) / self.steps)


def shrinking(series):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([row["shrunk"] for one in series for row in one.rows if row["kind"] == "shrink"])
    return Section("How it shrank", figure, "Size of the weights, step by step.")


extend.register("model", "net", net)
extend.register("data", "blobs", blobs)
extend.register("optimizer", "signed", signed)
extend.register("loss", "hinge", hinge)
first = scores.Measure(("w",), lambda w: jnp.abs(w), lambda rows: rows[:, 0])
extend.register("measure", "first", first)
extend.register("stage", "shrink", Shrink)
extend.register("figure", "shrink", shrinking)
groups.teach("zeta", rules.elementwise(rules.never_zero))
'''
CONFIG = """
import pathlib

from sparsity_jax import extend, optim, pipeline

extend.load(pathlib.Path(__file__).with_name("mine.py"))


def get_config():
    return pipeline.base(
        data=dict(name="blobs"),
        model=dict(name="net"),
        pipeline=("fit", "cut", "shrink", "weights"),
        fit=pipeline.stage(
            "train",
            epochs=8,
            batch_size=16,
            optimizer=optim.settings("signed", learning_rate=0.01),
            loss=dict(name="hinge", margin=2.0),
        ),
        cut=pipeline.stage("cut", measure="first", ratio=0.25),
        shrink=pipeline.stage("shrink"),
        weights=pipeline.stage("histogram"),
    )
"""


@pytest.fixture
def own_tables():
    """Tables that are after the test what they were before it."""
    changed = (*extend.TABLES.values(), extend.page.FIGURES, rules.RULES)
    tables_before = [(table, dict(table)) for table in changed]
    yield
    imports.REGISTERED.clear()
    for table, before in tables_before:
        table.clear()
        table.update(before)


def run(workdir, **changes):
    """(exit status, rows) of the command line, which prints no traceback."""
    command = ("sparsity_jax.run", "--config", workdir.parent / "config.py", "--workdir", workdir)
    ended = tiny.python("-m", *command, env=os.environ | changes)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, report.read_rows(workdir / report.METRICS)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the config above, interrupted in its own stage, with its file beside it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE)
    (folder / "config.py").write_text(CONFIG)
    code, _ = run(folder / "run", INTERRUPTED="yes")
    assert code == 130
    return folder / "run"


def test_everything_of_ones_own_goes_on_where_it_was_interrupted_and_shows(workdir):
    before = report.read_rows(workdir / report.METRICS)
    assert [row["shrunk"] for row in before if row["kind"] == "shrink"] == [0.5, 0.25]
    code, rows = run(workdir)
    assert code == 0
    assert rows[: len(before)] == before
    assert [row["train_accuracy"] for row in rows if row["kind"] == "train"][-1] > 0.9
    (cut,) = [row for row in rows if row["kind"] == "cut"]
    assert 0 < cut["num_kept"] < cut["num_channels"]  # of channels that pass the primitive
    assert [row["shrunk"] for row in rows if row["kind"] == "shrink"] == [0.5, 0.25, 0.125]
    assert "How it shrank" in (workdir / report.REPORT).read_text()
    assert (workdir / "figures" / "shrinking.png").is_file()


def test_nothing_that_a_workdir_names_is_imported(workdir, own_tables, tmp_path, capsys):
    again = shutil.copytree(workdir, tmp_path / "run")
    for folder, file in ((again, workdir.parent / "mine.py"), (tmp_path, "FILE")):
        report.write(folder, *report.gather(workdir)[:2])
        page = (folder / report.REPORT).read_text()
        assert "No figure here shows rows of shrink" in page
        assert f"--import {file}" in page
        assert "How it shrank" not in page
    file = re.escape(str(workdir.parent / "mine.py"))
    with pytest.raises(SystemExit, match=rf"data 'blobs' is registered by {file}: --import it"):
        evaluate.main(["--workdir", str(workdir)])
    evaluate.main(["--workdir", str(workdir), "--import", str(workdir.parent / "mine.py")])
    assert "accuracy" in capsys.readouterr().out


def test_names_of_the_library_are_not_replaced(own_tables):
    with tiny.refused("model", "mlp"):
        extend.register("model", "mlp", lambda num_classes, settings: None)
    with tiny.refused("what", "modle", closest="model"):
        extend.register("modle", "mine", None)
    with tiny.refused("Prune.kind", "prune", allowed="'mine'"):
        extend.register("stage", "mine", extend.plans.STAGES["prune"])
    lazy = type("Lazy", (interface.Stage,), dict(kind="lazy"))
    with tiny.refused("Lazy.run"):
        extend.register("stage", "lazy", lazy)
    with tiny.refused("nowhere.py"):
        imports.load("nowhere.py")
    extend.register("loss", "mine", len)
    extend.register("loss", "mine", max)  # a file that is loaded again
    assert extend.losses.LOSSES["mine"] is max
