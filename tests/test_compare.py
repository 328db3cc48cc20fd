"""Runs beside each other: what is averaged, what is not, and how it is written."""

import html
import json
import math
import re

import pandas as pd
import pytest
import tiny

from sparsity_jax import compare, report, runs
from sparsity_jax.compare import __main__ as command
from sparsity_jax.report.runs import merged

RATIOS = (0.0, 0.9)


def row(kind="curve", member=0, **fields):
    common = dict(stage=kind, kind=kind, visit=1, arm="A", member=member)
    return common | fields


def curve(member, accuracy, **fields):
    """Rows of one network's curve: dense, and with 90 % removed."""
    return [
        row(member=member, ratio=ratio, accuracy=accuracy - 0.1 * ratio, split="test", **fields)
        for ratio in RATIOS
    ]


def save(folder, rows, environment=None, **config):
    """A workdir of these rows; its config trains at the rate 0.1 with the seed 0, unless said."""
    with report.Writer(folder) as writer:
        writer.append(rows)
    own = dict(seed=0, fit=dict(kind="train", optimizer=dict(rate=0.1)), mesh=1)
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    if environment:
        report.write_environment(folder, environment)
    return folder


def fit(rate):
    return dict(kind="train", optimizer=dict(rate=rate))


def compared(*folders, **options):
    return compare.compared(merged(runs.several(*folders)).rows, ratios=RATIOS, **options)


def cells(comparison):
    """(dense accuracy, count) by the label of every line."""
    return {line.label: (line.cells["0.0"][0], line.cells["0.0"][2]) for line in comparison.lines}


@pytest.fixture
def three(tmp_path):
    """Two seeds at one rate, side by side in one run, and another rate in a run of its own."""
    rows = [*curve(0, 0.5, seed=0), *curve(1, 0.7, seed=1)]
    save(tmp_path / "a", rows, sweep=dict(seed=[0, 1]))
    save(tmp_path / "b", curve(0, 0.9), fit=fit(0.3))
    return tmp_path


# Loading ------------------------------------------------------------------------------------------


def test_rows_have_the_settings_in_which_runs_differ(three):
    table = runs.load(three / "a", three / "b")
    places = ["run", "member", "arm", "fit.optimizer.rate", "seed", "stage", "kind", "visit"]
    assert list(table.columns[:8]) == places
    assert list(table["run"]) == ["a"] * 4 + ["b"] * 2
    assert list(table["member"]) == [0, 0, 1, 1, 0, 0]
    assert list(table["seed"]) == [0, 0, 1, 1, 0, 0]
    assert list(table["fit.optimizer.rate"]) == [0.1] * 4 + [0.3] * 2
    pd.testing.assert_frame_equal(table, runs.load(three))
    pd.testing.assert_frame_equal(table, runs.load(three, three / "a"))  # a run counts once


def test_members_have_the_settings_of_their_own_arm(tmp_path):
    """Also where two runs call another setting by the same name."""
    for name, seed, rate in (("a", 0, 0.1), ("b", 1, 0.2)):
        arms = dict(slow=dict(fit=dict(optimizer=dict(rate=rate))), fast=dict(label="F"))
        rows = [*curve(0, 0.5, arm="slow"), *curve(1, 0.7, arm="F")]
        save(tmp_path / name, rows, seed=seed, fit=fit(0.3), sweep=dict(arms=arms))
    table = runs.load(tmp_path)
    rates = table.groupby(["run", "arm"])["fit.optimizer.rate"].first()
    assert rates.to_dict() == {
        ("a", "F"): 0.3,
        ("a", "slow"): 0.1,
        ("b", "F"): 0.3,
        ("b", "slow"): 0.2,
    }
    assert sorted(count for _, count in cells(compared(tmp_path)).values()) == [1, 1, 2]


@pytest.mark.parametrize("retrain", ["again", ["again"], "idle"])
def test_settings_of_stages_that_a_run_does_not_use_make_no_difference(tmp_path, retrain):
    for name, seed, rate in (("a", 0, 0.1), ("b", 1, 0.2)):
        stages = dict(fit=fit(0.3), again=fit(rate), cut=dict(kind="cut", retrain=retrain))
        save(tmp_path / name, curve(0, 0.5), seed=seed, pipeline=["fit", "cut"], **stages)
    table = runs.load(tmp_path)
    is_used = retrain != "idle"
    assert ("again.optimizer.rate" in table) == is_used
    assert len(cells(compared(tmp_path))) == 1 + is_used


def test_members_that_ran_one_after_the_other_are_one_run(tmp_path):
    """Whose folders have newer rows than the whole run's while it goes on."""
    sweep = dict(fit=dict(optimizer=dict(rate=[0.1, 0.3])), mode="loop")
    whole = save(tmp_path / "run", [], sweep=sweep)
    for number, rate in enumerate((0.1, 0.3)):
        rows = curve(0, rate, **{"fit.optimizer.rate": rate})
        save(whole / f"member_00{number}", rows, fit=fit(rate))
    table = runs.load(whole)
    assert list(table["member"]) == [0, 0, 1, 1]
    assert list(table["fit.optimizer.rate"]) == [0.1, 0.1, 0.3, 0.3]
    assert cells(compared(whole)) == {"A (rate=0.1)": (0.1, 1), "A (rate=0.3)": (0.3, 1)}


def test_runs_without_rows_have_no_table(tmp_path, capsys):
    save(tmp_path / "run", [])
    assert runs.load(tmp_path / "run").empty
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "run")])
    assert "there is no table" in capsys.readouterr().err


def test_lists_and_top_level_settings_are_cells_of_a_table(tmp_path):
    save(tmp_path / "a", curve(0, 0.5), model=dict(widths=[8, 8]))
    save(tmp_path / "b", curve(0, 0.5), model=dict(widths=[8]), mesh=2)
    save(tmp_path / "c", curve(0, 0.5))
    table = runs.load(tmp_path).drop_duplicates("run")
    assert list(table["model.widths"].fillna("")) == ["[8, 8]", "[8]", ""]
    assert list(table["mesh"]) == [1, 2, 1]


def test_runs_of_one_name_in_two_folders_stay_apart(tmp_path):
    for place in ("x", "y"):
        save(tmp_path / place / "run", curve(0, 0.5))
    folders = [tmp_path / place / "run" for place in ("x", "y")]
    assert set(runs.load(*folders)["run"]) == set(map(str, folders))
    assert [count for _, count in cells(compared(*folders)).values()] == [1, 1]
    with pytest.raises(ValueError, match="folder"):
        runs.load()


# Averaging ----------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_nothing_else(three):
    both = compared(three)
    assert cells(both) == {
        "A (rate=0.1)": (pytest.approx(0.6), 2),
        "A (rate=0.3)": (pytest.approx(0.9), 1),
    }
    numbers = compare.numbers(both)
    assert "dense" not in numbers
    assert list(numbers["fit.optimizer.rate"]) == [0.1, 0.3]
    assert list(numbers["seeds"]) == [2, 1]
    assert numbers["0.9 std"][0] == pytest.approx(math.sqrt(0.02))
    assert math.isnan(numbers["0.9 std"][1])
    assert "60.00 ± 14.14" in compare.markdown(both)


@pytest.mark.parametrize("fact", ["sparsity_jax", "precision", "chance"])
def test_other_versions_precisions_and_data_are_not_averaged(tmp_path, fact):
    for name, seed, value in (("a", 0, "x"), ("b", 1, "x"), ("c", 2, "y")):
        save(tmp_path / name, curve(0, 0.5), {fact: value, "date": name}, seed=seed)
    both = compared(tmp_path)
    assert sorted(count for _, count in cells(both).values()) == [1, 2]
    assert any(fact in sentence for sentence in compare.notes(both))


def test_networks_of_one_setting_and_other_labels_are_lines_of_their_own(tmp_path):
    rows = [*curve(0, 0.5, arm="SFW"), *curve(0, 0.7, arm="SGD")]
    save(tmp_path / "a", rows)
    assert cells(compared(tmp_path / "a")) == {"SFW": (0.5, 1), "SGD": (0.7, 1)}


def test_settings_that_change_together_have_one_column(tmp_path):
    save(tmp_path / "a", curve(0, 0.5))
    save(tmp_path / "b", curve(0, 0.7), fit=fit(0.3), mesh=2, data=dict(size=3))
    both = compared(tmp_path)
    assert list(both.settings.values()) == ["fit.optimizer.rate"]
    assert set(both.also) == {"mesh", "data.size"}


def test_metrics_are_the_last_numbers_of_every_network(tmp_path):
    rows = [row("compact", bytes=9, accuracy=0.1), row("compact", visit=2, bytes=2000)]
    save(tmp_path / "a", [*rows, row("width", predicted=0.98)])
    save(tmp_path / "b", [row("compact", bytes=3000)], seed=1)
    (line,) = compared(tmp_path, metrics=["compact.bytes", "compact.accuracy"]).lines
    assert line.cells["compact.bytes"][::2] == (2500.0, 2)
    assert line.cells["compact.accuracy"] == (0.1, 0.0, 1)
    (line,) = compared(tmp_path).lines
    assert line.cells == {"width.predicted": (0.98, 0.0, 1)}
    assert "98.00 (n=1)" in compare.markdown(compared(tmp_path))
    with tiny.refused("--metric", "compact.byte", "compact.bytes"):
        compared(tmp_path, metrics=["compact.byte"])


# The command --------------------------------------------------------------------------------------


def test_the_command_writes_a_table_and_a_page(three, capsys):
    out = three / "out"
    named = three / "named.csv"
    assert command.main([str(three), "--out", str(out), "--csv", str(named)]) == 0
    assert "± 14.14" in capsys.readouterr().out
    assert len(pd.read_csv(named)) == 2
    assert named.read_bytes() == (out / "compare.csv").read_bytes()
    assert (out / "compare.md").read_text(encoding="utf-8").count("\n") == 4
    page = (out / "compare.html").read_text(encoding="utf-8")
    for series, rate in (("0", "0.1"), ("1", "0.3")):
        (filtered,) = re.findall(rf'data-series="{series}" data-settings="(.+?)">', page)
        assert json.loads(html.unescape(filtered))["fit.optimizer.rate"] == rate
        assert f'class="series-{series}"' in page
        assert f"<option>{rate}</option>" in page
    assert not re.search(r'(src|href)="[^#]', page)
    assert len(set(re.findall(r' id="([^"]+)"', page))) == len(re.findall(r' id="', page))


def test_folders_that_cannot_be_read_are_left_out_aloud(three, capsys):
    foreign = three / "foreign"
    foreign.mkdir()
    (three / "b" / "metrics.jsonl").write_text("?\n\n")
    short = save(three / "short", curve(1, 0.5))  # the config makes one network only
    odd = save(three / "odd", curve(0, 0.5), sweep=5)
    folders = [foreign, three / "b", short, odd, three / "none"]
    assert command.main([str(three / "a"), *map(str, folders)]) == 1
    out, err = capsys.readouterr()
    assert "60.00" in out
    assert len(err.splitlines()) == len(folders)
    for folder, sentence in zip(folders, err.splitlines()):
        assert str(folder) in sentence
    assert command.main([str(foreign)]) == 1
    with pytest.raises(SystemExit):
        command.main([str(three / "a"), "--metric", "curve.loss"])
