"""Figures of growing regularisation: lines hold the rows' numbers, and each figure is there exactly
when rows are.
"""

import pytest
from numpy.testing import assert_allclose

from sparsity_jax import report
from sparsity_jax.report import draw, growth, series

PAGES = True  # see conftest.py

NAMES = ("growth_norms", "growth_ratio", "growth_groups")


def growth_rows(steps=4, scores=True, member=0, **fields):
    """Layers a and b; in a the second of three filters goes."""
    rows = []
    for i in range(1, steps + 1):
        numbers = dict(
            phase=1,
            updates=i,
            reg_kept=0.0,
            reg_pruned=0.1 * i,
            score_kept=2.0,
            score_pruned=2.0 / 10**i,
        )
        layers = {"a/kernel": {**numbers, "ratio": 10.0**i}, "b/kernel": {**numbers, "ratio": 0.0}}
        own = dict(
            scores={"a/kernel": [3.0, 1.0 / 10**i, 2.0]}, keep={"a/kernel": [True, False, True]}
        )
        common = dict(stage="grow", kind="grow", visit=1, arm="net", member=member, step=100 * i)
        rows.append({**common, "growth": layers, **(own if scores else {}), **fields})
    return [*rows, {**common, "ratio": 0.4, "layers": {"a/kernel": 1 / 3, "b/kernel": 0.5}}]


def lines_of(show, rows):
    """Lines of every panel of a figure, by title; none without a figure."""
    section = show(series.group(rows))
    return (
        {axes.get_title(loc="left"): axes.lines for axes in section.figure.axes} if section else {}
    )


def colors_of(lines):
    names = {draw.color(growth.KEPT): "kept", draw.color(growth.PRUNED): "pruned"}
    return [names[line.get_color()] for line in lines]


def test_norms_by_penalty():
    lines = lines_of(growth.growth_norms, growth_rows())["net"]
    kept, pruned, other, _ = lines
    assert kept.get_color() == pruned.get_color() != other.get_color()  # that of the layer
    assert [kept.get_linestyle(), pruned.get_linestyle()] == ["-", "--"]
    assert_allclose(pruned.get_xdata(), [0.1, 0.2, 0.3, 0.4])
    assert_allclose(pruned.get_ydata(), [0.2, 0.02, 0.002, 0.0002])
    assert_allclose(kept.get_ydata(), 2.0)
    assert pruned.axes.get_yscale() == "log"


def test_more_layers_than_colours_are_coloured_by_what_happens_to_them():
    rows = growth_rows()
    for row in rows[:-1]:
        row["growth"] = {f"{i}/kernel": row["growth"]["a/kernel"] for i in range(13)}
    assert colors_of(lines_of(growth.growth_norms, rows)["net"]) == ["kept", "pruned"] * 13


def test_ratios_by_step_leave_out_layers_without():
    (line,) = lines_of(growth.growth_ratio, growth_rows())[
        "net"
    ]  # that of b is 0, as of layers of weights
    assert_allclose(line.get_xdata(), [100, 200, 300, 400])
    assert_allclose(line.get_ydata(), [10, 100, 1000, 10_000])


def test_groups_are_coloured_by_what_happens_to_them():
    lines = lines_of(growth.growth_groups, growth_rows())["a"]
    assert colors_of(lines) == ["kept", "pruned", "kept"]
    assert_allclose(lines[1].get_ydata(), [0.1, 0.01, 0.001, 0.0001])
    assert lines_of(growth.growth_groups, growth_rows(scores=False)) == {}


def test_of_several_members_the_first_is_drawn():
    rows = growth_rows(member=0, seed=0) + growth_rows(steps=2, member=1, seed=1)
    (line,) = lines_of(growth.growth_ratio, rows)["net"]
    assert len(line.get_xdata()) == 4


def test_every_growth_is_drawn_on_its_own():
    later = growth_rows(steps=3, stage="more", visit=1)
    for row in later:  # of other layers
        for name in ("growth", "scores", "keep"):
            row.update(
                {name: {path.replace("a/", "c/"): own for path, own in row.get(name, {}).items()}}
            )
    rows = growth_rows() + later + growth_rows(steps=2, visit=2)
    assert list(lines_of(growth.growth_groups, rows)) == [
        "net, grow 1, a",
        "net, more 1, c",
        "net, grow 2, a",
    ]
    norms = lines_of(growth.growth_norms, rows)
    assert [len(lines[0].get_xdata()) for lines in norms.values()] == [4, 3, 2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (growth_rows(), NAMES),
        (growth_rows(scores=False), NAMES[:2]),
        (growth_rows()[-1:], ()),
        (
            [
                dict(
                    stage="fit", kind="train", visit=1, arm="net", member=0, epoch=1, train_loss=1.0
                )
            ],
            (),
        ),
    ],
    ids=["with groups", "without", "removal only", "none"],
)
def test_figures_are_there_exactly_when_their_rows_are(rows, expected, tmp_path):
    page = report.write(tmp_path, {"data": {"name": "digits"}}, rows).read_text()
    for name in NAMES:
        assert (f'<section id="{name}">' in page) == (name in expected)
        assert (tmp_path / "figures" / f"{name}.png").is_file() == (name in expected)
    assert ("Pruning steps" in page) == ("layers" in rows[-1])


def test_no_label_breaks_a_page(tmp_path):
    rows = growth_rows(arm=r"_$\1$ {0}% <b>")
    assert "growth_norms" in report.write(tmp_path, {}, rows).read_text()


def test_rows_of_other_stages_are_told_as_they_are(tmp_path):
    common = dict(visit=1, arm="net", member=0)
    rows = [
        dict(common, stage="out", kind="remove", step=0, ratio=0.25, layers={}),
        dict(
            common,
            stage="best",
            kind="oracle",
            choices=28,
            loss=0.5,
            loss_by_norm=0.625,
            rank=3,
            losses=[0.5],
        ),
        dict(common, stage="noise", kind="noise", draw=0, std=0.01, accuracy=0.875, loss=0.25),
        dict(common, stage="values", kind="jacobian", mean=1.25, std=0.5, mean_by_rank=[2.0]),
    ]
    page = report.write(tmp_path, {}, rows).read_text()
    for text in (">28</td>", ">0.625</td>", ">0.875</td>", ">1.25</td>"):
        assert text in page
