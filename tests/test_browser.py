"""Pages of every study and of a comparison in a browser, as wide as a screen and as a phone:
nothing is cut, and text can be read.

Skipped without Chromium and playwright; with SPARSITY_JAX_BROWSER=1 in the environment, as in
`.ci/run`, that is a failure.
"""

import json
import os
import pathlib
import shutil

import pytest
import tiny

from sparsity_jax import report
from sparsity_jax.compare import __main__ as compare

PAGES = True  # see conftest.py
WIDTHS = (1400, 420)
STUDIES = {  # of each study the committed rows of one run, in experiments/
    "quickstart": "quickstart/metrics",
    "small_cnn": "cifar10_small_cnn/metrics",
    "sfw_oneshot": "sfw_oneshot/sgd_resnet18_cifar10",
    "geometric_limit": "geometric_limit/fc5_seed1_annealed",
    "gradient_flow": "gradient_flow/mag_based",
    "greg": "growing_regularisation/greg1",
}
PROBLEMS = (pathlib.Path(__file__).parent / "page_problems.js").read_text(encoding="utf-8")


def lacking(what):
    reason = f"needs chromium and playwright; {what} is missing"
    if os.environ.get("SPARSITY_JAX_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        lacking("playwright (pip install '.[browser]')")
    chromium = shutil.which("chromium")
    if chromium is None:
        lacking("chromium (apt-get install chromium)")
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


def rows_of(name):
    return report.read_rows(tiny.ROOT / "experiments" / f"{STUDIES[name]}.jsonl")


def problems_of(browser, path):
    """What is wrong with a page, per width and colour scheme."""
    page = browser.new_page()
    page.goto(path.as_uri())
    found = []
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            problems = page.evaluate(PROBLEMS)
            found += [f"{width} {scheme}: {problem}" for problem in problems]
    page.close()
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_nothing_is_cut_on_the_page_of_a_study(browser, name, tmp_path):
    environment = dict(command=f"python -m sparsity_jax.run --config configs/{name}.py")
    config = dict(title=name, data=dict(name="digits"), fit=dict(optimizer=dict(name="sgd")))
    path = report.write(tmp_path, config, rows_of(name), environment=environment)
    assert problems_of(browser, path) == []


def test_long_names_are_not_cut(browser, tmp_path):
    rows = []
    for label in tiny.HOSTILE_LABELS:
        row = dict(stage="fit", kind="train", visit=1, arm=label * 3, member=0, epoch=1)
        rows.append(row | dict(train_loss=1.0, test_accuracy=0.5))
    path = report.write(tmp_path, {"".join(tiny.HOSTILE_LABELS): "value" * 60}, rows)
    assert problems_of(browser, path) == []


@pytest.fixture(scope="module")
def comparison(browser, tmp_path_factory):
    """A page that compares two runs of one study at different rates."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("a", 0.1), ("b", 0.3)):
        config = dict(fit=dict(kind="train", optimizer=dict(rate=rate)), sweep=dict(seed=[0, 1, 2]))
        with report.Writer(folder / name) as writer:
            writer.append(rows_of("quickstart"))
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert compare.main([str(folder), "--out", str(folder)]) == 0
    return folder / "compare.html"


def test_nothing_is_cut_on_a_comparison(browser, comparison):
    assert problems_of(browser, comparison) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_filter_hides_rows_and_curves_of_others(browser, comparison, width):
    page = browser.new_page(viewport=dict(width=width, height=900))
    page.goto(comparison.as_uri())
    rows = page.locator("tr[data-series]")
    curves = page.locator("figure").first.locator("[class^=series-] path")
    every = rows.filter(visible=True).count(), curves.filter(visible=True).count()
    page.get_by_label("fit.optimizer.rate").select_option("0.3")
    assert rows.filter(visible=True).count() == every[0] / 2
    assert curves.filter(visible=True).count() == every[1] / 2
    assert {row.locator("td").first.inner_text() for row in rows.filter(visible=True).all()} == {
        "0.3"
    }
    page.get_by_label("fit.optimizer.rate").select_option("")
    assert (rows.filter(visible=True).count(), curves.filter(visible=True).count()) == every
    page.close()
