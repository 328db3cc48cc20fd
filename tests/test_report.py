"""Rows to files and back, the numbers of the report worked by hand, and pages for every shape of
input.
"""

import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import tiny
from matplotlib import colors
from numpy.testing import assert_allclose

from sparsity_jax import report
from sparsity_jax.report import __main__ as command
from sparsity_jax.report import (
    channels,
    draw,
    events,
    pruning,
    sections,
    series,
    summary,
    training,
)
from sparsity_jax.report.rows import completed, removal

PAGES = True  # see conftest.py
KINDS = ("train", "curve")

RATIOS = [i / 10 for i in range(10)] + [i / 100 for i in range(91, 100)]
CONFIG = {
    "title": "SFW one-shot pruning",
    "data": {"name": "cifar10", "batch_size": 128},
    "model": {"name": "resnet18", "num_classes": 10},
    "pipeline": ["fit_sfw", "curve_sfw"],
    "fit_sfw": {
        "kind": "train",
        "epochs": 20,
        "optimizer": {"name": "sfw", "learning_rate": 1.0, "k_frac": 0.05},
    },
}
ENVIRONMENT = {
    "jax": "0.10.0",
    "device": {"kind": "NVIDIA H200", "count": 1},
    "command": "python -m sparsity_jax.run",
}


def accuracy_at(ratio, dense, knee, floor=0.1):
    """A pruning curve that falls from `dense` to `floor` around `knee`."""
    return floor + (dense - floor) / (
        1 + ((ratio / max(1 - ratio, 1e-6)) / (knee / (1 - knee))) ** 3
    )


def make_rows(arms=2, seeds=3, ratios=RATIOS, layers=20, retrained=(False,), epochs=20):
    """Realistic rows: even arms resist pruning like SFW, odd ones collapse like SGD."""
    names = ["SFW, K-sparse polytope", "SGD"]
    names += [f"arm {i}, Lp ball with a longer name" for i in range(2, arms)]
    paths = [f"params/stage{i // 5 + 1}/block{i % 5}/conv/kernel" for i in range(layers)]
    rows = []
    for a, seed in itertools.product(range(arms), range(seeds)):
        knee, dense = (0.82, 0.945) if a % 2 else (0.992, 0.925)
        base = dict(visit=1, arm=names[a], member=seed, seed=seed)
        train, curve = ({**base, "stage": f"{kind}_{a}", "kind": kind} for kind in KINDS)
        for epoch in range(1, epochs + 1):
            loss = 2.2 * math.exp(-epoch / 6) + 0.05 * (a + 1)
            row = dict(train, epoch=epoch, step=390 * epoch, seconds=7.5 * epoch, train_loss=loss)
            if epoch % 2 == 0:
                row |= dict(test_loss=loss + 0.1, test_accuracy=dense * (1 - math.exp(-epoch / 4)))
            rows.append(row | dict(train_accuracy=1 - math.exp(-epoch / 3)))
        for again, ratio in itertools.product(retrained, ratios):
            top = dense - 0.003 * a + 0.004 * seed
            accuracy = accuracy_at(ratio, top, knee - 0.004 * a + 0.002 * again)
            shares = {
                path: min(1.0, ratio ** (2.5 - 2 * i / layers)) for i, path in enumerate(paths)
            }
            row = dict(curve, ratio=ratio, retrained=again, split="test", layers=shares)
            row |= dict(num_prunable=1000, num_kept=round(1000 * (1 - ratio)), selection="global")
            rows.append(row | dict(accuracy=accuracy, loss=0.3 + 40 * (top - accuracy) ** 2))
        bins = dict(edges=list(range(-9, 2)), counts=[10, 20, 40, 80, 90, 60, 40, 20, 10, 5])
        counts = dict(threshold=[0, 10, 1], count_above=[19_000, 0, 12], num_zero=1_000)
        rows.append(dict(train, kind="histogram", **bins, **counts))
        for i in range(0, 390 if a == 0 else 0, 5):
            losses = dict(loss_before=2.6 * math.exp(-i / 150), loss_after=2.3 * math.exp(-i / 150))
            rows.append(dict(base, stage="init", kind="sfw_init", iteration=i, **losses))
    return rows


def row_of(kind, arm="A", member=0, stage=None, visit=1, **more):
    common = dict(stage=stage or kind, kind=kind, visit=visit, arm=arm, member=member, seed=member)
    return common | more


def curve_row(arm, member, ratio, accuracy, **more):
    told = dict(ratio=ratio, accuracy=accuracy, loss=1.0, split="test", retrained=False)
    return row_of("curve", arm, member, **told | more)


def table_of(rows):
    grouped = series.group(rows)
    return summary.summarize(grouped)


def page_of(path, rows, **options):
    return report.write(path, CONFIG, rows, **options).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# ----- numbers


def test_mean_and_std_leave_missing_values_out():
    assert series.spread([1.0, None, 3.0]) == pytest.approx((2.0, math.sqrt(2), 2))
    assert series.spread([math.nan, 5.0]) == (5.0, 0.0, 1)


def test_summary_is_worked_by_hand():
    values = {0: [0.90, 0.895, 0.80], 1: [0.92, 0.915, 0.84], 2: [0.94, 0.900, 0.85]}
    train = row_of("train", stage="fit")
    ends = (50.0, 60.0, 72.0)  # the first epoch compiles
    rows = [
        train | {"member": m, "seed": m, "epoch": e + 1, "seconds": ends[e] + m * e}
        for m in range(3)
        for e in range(3)
    ]
    rows += [
        curve_row("A", m, r, a) for m, row in values.items() for r, a in zip((0.0, 0.9, 0.98), row)
    ]
    (line,) = table_of(rows)
    assert line.label == "A"
    assert line.cells["dense"] == pytest.approx((0.92, 0.02, 3))
    assert line.cells["0.9"] == pytest.approx((2.71 / 3, np.std([0.895, 0.915, 0.9], ddof=1), 3))
    assert line.cells["0.98"] == pytest.approx(
        (0.83, math.sqrt((0.03**2 + 0.01**2 + 0.02**2) / 2), 3)
    )
    assert line.cells["largest"] == pytest.approx(
        (0.6, math.sqrt(0.27), 3)
    )  # 0.9, 0.9 and, for member 2, 0
    assert line.cells["epochs"] == (3.0, 0.0, 3)
    assert line.cells["seconds"] == pytest.approx(
        (36.0, 3.0, 3)
    )  # 3 epochs of 11, 12 and 13 seconds
    assert "0.95" not in line.cells
    assert "0.99" not in line.cells


def test_epochs_and_seconds_add_up():
    """Epochs of stages and visits add up; seconds too, each stage at its largest."""
    base = {"kind": "train", "arm": "A", "member": 0, "seed": 0}
    rows = [
        base | {"stage": "fit", "visit": v, "epoch": e, "seconds": 3.0 * e}
        for v in (1, 2)
        for e in (1, 2, 3)
    ]
    rows += [
        base | {"stage": "final", "visit": 1, "epoch": 1, "seconds": 5.0, "test_accuracy": 0.7}
    ]
    (line,) = table_of(rows)
    assert line.cells == {
        "dense": (0.7, 0.0, 1),
        "epochs": (7.0, 0.0, 1),
        "seconds": (23.0, 0.0, 1),
    }


def train_row(arm, epoch, accuracy, stage="fit", **more):
    told = dict(epoch=epoch, test_accuracy=accuracy, seconds=2.0 * epoch)
    return row_of("train", arm, stage=stage, **told | more)


def cut_row(arm, kept, visit=1, **more):
    sizes = dict(sizes={"conv": 16}, kept={"conv": kept})
    counts = dict(ratio=0.5, num_channels=16, num_kept=kept)
    return row_of("cut", arm, visit=visit, **sizes | counts | more)


def test_a_network_cut_in_rounds_is_not_called_dense():
    """Its accuracy before the first cut and after the last training, and what is gone, not what was
    planned.
    """
    rows = [
        train_row("A", 1, 0.8),
        cut_row("A", 12),
        train_row("A", 1, 0.7, visit=2),
        cut_row("A", 10, visit=2),
    ]
    rows += [train_row("A", 1, 0.6, "final"), train_row("A", 2, 0.65, "final")]
    (line,) = table_of(rows)
    assert line.cells["dense"] == (0.8, 0.0, 1)
    assert line.cells["pruned"] == (0.65, 0.0, 1)
    assert line.cells["channels"] == (0.375, 0.0, 1)
    assert (line.cells["before"], line.cells["epochs"]) == ((1.0, 0.0, 1), (4.0, 0.0, 1))
    assert list(channels.channel_rounds(series.group(rows)[0])) == [0.25, 0.375]


def test_accuracy_by_size_is_that_after_the_last_training():
    rows = [train_row("A", 1, 0.5), train_row("A", 2, 0.9), cut_row("A", 4)]
    rows += [train_row("A", epoch, 0.6 + epoch / 10, stage="again") for epoch in (1, 2)]
    rows.append(train_row("B", 1, 0.7) | dict(member=1))
    section = pruning.sizes(series.group(rows))
    (axes,) = section.figure.axes
    assert axes.get_title(loc="left") == "Channels removed"
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert points == [[[0.0, 0.9], [0.75, 0.8]], [[0.0, 0.7]]]
    assert pruning.sizes(series.group(rows[:2])) is None


def test_growth_under_the_name_of_the_base_is_not_the_base():
    """Rows of a growth belong to the network before it; its accuracy is never that of the unpruned
    network.
    """
    grow = row_of("grow", "unpruned")
    rows = [
        train_row("unpruned", 1, 0.9, "base"),
        grow | {"epoch": 1, "test_accuracy": 0.7, "seconds": 1.0},
    ]
    rows += [grow | {"ratio": 0.5, "layers": {"a": 0.5}}, train_row("greg1", 1, 0.8, "finetune")]
    base, pruned = table_of(rows)
    assert base.cells["dense"][0] == 0.9
    assert "pruned" not in base.cells
    assert (pruned.cells["dense"][0], pruned.cells["pruned"][0], pruned.cells["weights"][0]) == (
        0.9,
        0.8,
        0.5,
    )


def test_a_training_from_initial_weights_forgets_what_was_pruned():
    prune = row_of("prune", ratio=0.5)
    rows = [train_row("A", 1, 0.9), prune, train_row("B", 1, 0.8, "again", start="init")]
    first, second = table_of(rows)
    assert first.cells["dense"][0] == 0.9
    assert second.cells["dense"][0] == 0.8
    assert "pruned" not in second.cells


def test_what_a_row_says_counts_before_what_its_run_knows():
    config, row = {"fit": {"start": "init"}}, {"stage": "fit", "kind": "train"}
    known = dict(start="init", chance=0.1)
    assert completed([row], config, {"chance": 0.1}) == [row | known]
    (said,) = completed([row | {"start": "current"}], config, {})
    assert said["start"] == "current"


def test_every_visit_of_a_stage_has_its_own_line():
    rows = []
    for visit, dense in ((1, 0.9), (2, 0.95)):
        rows += [train_row("A", epoch, dense, visit=visit) for epoch in (1, 2, 3)]
        rows += [curve_row("A", 0, r, a, visit=visit) for r, a in ((0.0, dense), (0.9, 0.895))]
    first, second = table_of(rows)
    assert [line.variant for line in (first, second)] == ["visit 1", "visit 2"]
    assert [line.cells["dense"][0] for line in (first, second)] == [0.9, 0.95]
    assert [line.cells["epochs"][0] for line in (first, second)] == [3.0, 6.0]
    assert [line.cells["seconds"][0] for line in (first, second)] == [6.0, 12.0]
    assert [line.cells["largest"][0] for line in (first, second)] == [0.9, 0.0]


def test_a_curve_of_a_pruned_network_starts_where_its_masks_are():
    """Ratios below what is gone already change nothing, and none of them is the dense network."""
    left = lambda ratio: min(round(1000 * (1 - ratio)), 30)
    prune = row_of("prune", ratio=0.97)
    rows = [train_row("A", 1, 0.9), prune]
    rows += [
        curve_row("A", 0, r, 0.5, num_prunable=1000, num_kept=left(r))
        for r in (0.0, 0.5, 0.9, 0.97, 0.99)
    ]
    curves = series.curves(series.group(rows))
    assert_allclose(curves["removed"], [0.97, 0.99])
    (line,) = table_of(rows)
    assert not {"dense", "0.9", "largest"} & set(line.cells)
    assert line.cells["0.99"][0] == 0.5


def test_zeros_of_the_chosen_arrays_and_of_all(tmp_path, sketches):
    rows = [
        curve_row("A", m, r, 0.5, sparsity=r + 0.002 * m, sparsity_all=0.9 * r, layers={"a": r})
        for m in (0, 1)
        for r in (0.0, 0.5, 0.98)
    ]
    text = page_of(tmp_path, rows)
    assert "98.10 <small>of all 88.20</small>" in text
    assert "50.10 <small>of all 45.00</small>" in text
    assert series.swept_keys(rows) == []


def test_shares_removed_are_counted_where_rows_have_counts():
    counts = {"num_kept": 30, "num_prunable": 100}
    assert removal({"kind": "prune", "ratio": 0.5, "sparsity": 0.8} | counts) == (
        "weights",
        0.7,
    )
    assert removal({"kind": "prune", "ratio": 0.5, "sparsity": 0.8}) == ("weights", 0.8)
    assert removal({"kind": "remove", "ratio": 0.5}) == ("weights", 0.5)
    assert removal({"kind": "cut", "ratio": 0.5, "num_kept": 10, "num_channels": 16}) == (
        "channels",
        0.375,
    )
    assert removal({"kind": "train", "ratio": 0.5}) is None


def test_a_network_at_chance_has_no_largest_share():
    rows = [
        train_row("A", 1, 0.105, chance=0.1),
        *(curve_row("A", 0, r, 0.105) for r in (0.0, 0.5, 0.99)),
    ]
    (line,) = table_of(rows)
    assert "largest" not in line.cells
    rows = [row | ({"accuracy": 0.5} if row["kind"] == "curve" else {}) for row in rows]
    (line,) = table_of(rows)
    assert line.cells["largest"][0] == 0.99
    assert line.floors == {"largest"}  # no measured share loses more


def test_bold_needs_more_than_a_deviation():
    def lines(first, second, spread, other_spread=None):
        other_spread = spread if other_spread is None else other_spread
        rows = [curve_row("A", m, 0.0, first + d * spread) for m, d in enumerate((-1, 0, 1))]
        rows += [
            curve_row("B", m, 0.0, second + d * other_spread) for m, d in enumerate((-1, 0, 1))
        ]
        return summary.best_line(table_of(rows), "dense")

    assert lines(0.9, 0.88, 0.01) == 0
    assert lines(0.9, 0.895, 0.01) is None
    assert lines(0.9, 0.92, 0.01) == 1
    assert lines(0.9, 0.88, 0.001, 0.03) is lines(0.9, 0.88, 0.03, 0.001) is None
    assert lines(0.9, 0.9, 0.0) is None


def test_a_band_of_losses_stays_above_zero():
    told = pd.DataFrame({"loss": [1.0, 100.0], "member": ["a", "b"]}).assign(series=0, epoch=1)
    (mean,) = draw.means(draw.points(told, "epoch", "loss")).to_dict("records")
    assert (mean["y"], mean["low"]) == (50.5, 1.0)
    assert mean["high"] == pytest.approx(50.5 + 99 / math.sqrt(2))


def test_only_a_layer_without_weights_is_red():
    table = pd.DataFrame([[0.5, 1 - 1e-4, 1.0, math.nan]], ["fc/kernel"], [0.5, 0.9, 0.95, 0.99])
    axes, _ = draw.heat_maps({"A": table}, "weights").axes
    half, little, none, unknown = axes.images[0].to_rgba(axes.images[0].get_array())[0]
    assert tuple(none[:3]) == pytest.approx(colors.to_rgb("#5a0f14"), abs=0.01)
    assert not np.allclose(little, none)
    assert not np.allclose(half, little)
    assert unknown[3] == 0  # nothing is drawn
    assert [text.get_text() for text in axes.texts] == ["50", "0.01", "0"]


def test_amounts_keep_their_digits():
    assert [sections.amount(value) for value in (13706, 3658.0, 12.5, 0.0508163, 123456.7)] == [
        "13,706",
        "3,658",
        "12.5",
        "0.05082",
        "123,457",
    ]


def test_ratios_are_never_interpolated():
    rows = [curve_row("A", 0, r, 1 - r) for r in (0.0, 0.8995, 0.97)]
    (line,) = table_of(rows)
    assert line.cells["0.9"][0] == pytest.approx(0.1005)
    assert "0.98" not in line.cells


def test_retrained_and_selection_make_lines_of_their_own():
    rows = [
        curve_row("A", 0, r, 0.9 - r / 10, selection=s)
        for r in (0.0, 0.9)
        for s in ("global", "layerwise")
    ]
    rows += [
        curve_row("A", 0, r, a, selection="global", retrained=True)
        for r, a in ((0.0, 0.91), (0.9, 0.88))
    ]
    lines = table_of(rows)
    assert [line.variant for line in lines] == [
        "no retraining, global",
        "no retraining, layerwise",
        "retrained, global",
    ]
    assert [line.cells["dense"][0] for line in lines] == pytest.approx(
        [0.9, 0.9, 0.91]
    )  # each curve's own
    assert [line.cells["largest"][0] for line in lines] == [0.0, 0.0, 0.0]
    assert lines[2].cells["0.9"][0] == pytest.approx(0.88)


def test_swept_values_separate_series_and_seeds_do_not():
    swept = "fit_sfw.optimizer.learning_rate"
    rows = [
        curve_row("SFW", m, 0.0, 0.5 + m / 10, **{swept: rate, "seed": m % 2, "threads": 4})
        for m, rate in enumerate((0.1, 0.1, 1.0, 1.0))
    ]
    grouped = series.group(rows)
    assert [one.label for one in grouped] == ["SFW (learning_rate=0.1)", "SFW (learning_rate=1.0)"]
    assert [line.cells["dense"][0] for line in table_of(rows)] == pytest.approx([0.55, 0.75])


def test_unknown_metrics_are_not_taken_for_swept_values():
    base = {"stage": "fit", "kind": "train", "arm": "A", "member": 0}
    rows = [base | {"epoch": e, "gradient_norm": 1.0 / e} for e in (1, 2, 3)]
    assert series.swept_keys(rows) == []


def weights_row(num_zero, visit=1):
    bins = dict(edges=[-2, -1, 0], counts=[30, 50], num_zero=num_zero)
    above = dict(threshold=[0, 1], count_above=[80, 0])
    return row_of("histogram", stage="weights", visit=visit, **bins, **above)


def test_magnitudes_of_every_visit_are_in_the_table(tmp_path, sketches):
    rows = [weights_row(0), weights_row(20, visit=2)]
    section = training.magnitudes(series.group(rows))
    (line,) = section.figure.axes[0].lines  # the last visit
    assert_allclose(line.get_xdata(), [-1.5, -0.5])
    assert_allclose(line.get_ydata(), [0.3, 0.5])
    text = page_of(tmp_path, rows)
    assert "A, weights, visit 1" in text
    assert "A, weights, visit 2" in text
    assert "20.00 <small>20</small>" in text


def test_sfw_init_shows_one_visit_only():
    row = row_of("sfw_init", loss_before=3.0)
    rows = [row | {"visit": 1, "iteration": i, "loss_after": 2.0} for i in range(5)]
    rows += [row | {"visit": 2, "iteration": i, "loss_after": 1.0} for i in range(3)]
    after, _ = training.sfw_init(series.group(rows)).figure.axes[0].lines
    assert_allclose(after.get_ydata(), [1.0] * 3)


def test_structured_curves_tell_channels_and_zeros(tmp_path, sketches):
    told = dict(selection="structured", channels_removed=0.25, sparsity=0.4375, sparsity_all=0.41)
    rows = [curve_row("A", 0, 0.25, 0.8, num_kept=56, num_prunable=100, **told)]
    text = page_of(tmp_path, rows + [curve_row("B", 0, 0.5, 0.7)])
    section = text[text.index('id="zeros"') :]
    for number in (">25.00<", ">43.75 <small>of all 41.00</small>"):
        assert number in section


def test_short_paths():
    paths = ["params/stage1/conv/kernel", "params/stage2/conv/kernel"]
    assert draw.short_paths(paths) == ["stage1/conv", "stage2/conv"]
    assert draw.short_paths(["params/" + "x" * 50])[0].startswith("…")
    assert draw.short_paths(["a/kernel", "a/kernel"]) == ["a", "a"]


# --------------------------------------------------------------------------------------------------
# ------- pages


def few_rows():
    return make_rows(seeds=2, layers=4, epochs=4, ratios=[0.0, 0.9, 0.98], retrained=(False, True))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    path = report.write(folder, CONFIG, few_rows(), environment=ENVIRONMENT)
    return folder, path.read_text(encoding="utf-8")


def test_report_has_every_section_and_valid_figures(full):
    folder, text = full
    for name in (
        "summary",
        "accuracy",
        "loss",
        "training",
        "magnitudes",
        "layers",
        "sfw_init",
        "config",
    ):
        assert f'<section id="{name}">' in text
    pngs = sorted(path.name for path in (folder / "figures").iterdir())
    assert pngs == [
        "accuracy.png",
        "layers.png",
        "loss.png",
        "magnitudes.png",
        "sfw_init.png",
        "training.png",
    ]
    for name in pngs:
        data = (folder / "figures" / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB\x60\x82")
    assert text.count('role="img"') == len(pngs)
    assert "Frank-Wolfe" in text
    assert "NVIDIA H200" in text
    assert "With 98% of the weights removed, SFW, K-sparse polytope (no retraining) keeps" in text


def test_page_loads_nothing(full):
    _, text = full
    assert not re.search(r"<(link|script|iframe|img|object|embed)\b", text)
    assert not re.search(r"""(src|href|xlink:href)\s*=\s*["']?(https?:)?//""", text)
    assert "@import" not in text
    assert not re.search(r"url\((?!['\"]?#)", text)


def test_same_rows_give_the_same_bytes(full, tmp_path):
    folder, text = full
    path = report.write(tmp_path / folder.name, CONFIG, few_rows(), environment=ENVIRONMENT)
    assert path.read_text(encoding="utf-8") == text
    for name in ("accuracy.png", "layers.png"):
        assert (path.parent / "figures" / name).read_bytes() == (
            folder / "figures" / name
        ).read_bytes()
    assert not list(path.parent.rglob(".*"))


def test_best_numbers_are_bold(tmp_path, sketches):
    rows = [
        curve_row(arm, 0, r, a)
        for arm, end in (("A", 0.91), ("B", 0.3))
        for r, a in ((0.0, 0.92), (0.98, end))
    ]
    text = page_of(tmp_path, rows)
    assert "<b>91.00</b>" in text
    assert "<b>30.00</b>" not in text
    assert "<b>92.00</b>" not in text  # a tie


def test_names_are_escaped_everywhere(tmp_path, sketches):
    evil = "<script>alert(1)</script>\"'&$x$"
    rows = [
        row | {"arm": evil if row["arm"] == "SGD" else "_hidden 名"}
        for row in make_rows(seeds=1, layers=3)
    ]
    rows[-1] |= {"selection": evil}
    layers = {f"{evil}/kernel": 0.5}
    rows = [row | ({"layers": layers} if row["kind"] == "curve" else {}) for row in rows]
    rows.append({"stage": "cut", "kind": "prune", "arm": evil, "member": 0, evil: evil})
    text = report.write(
        tmp_path,
        {evil: {evil: evil}, "data": {"name": evil}},
        rows,
        title=evil,
        environment={evil: evil, "command": evil},
    ).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "alert(1)</" not in text
    assert "&lt;script&gt;" in text
    assert "_hidden" in text


def test_no_label_breaks_a_page(tmp_path):
    kinds = make_rows(arms=1, seeds=1, ratios=[0.0, 0.9], layers=2, epochs=2)
    rows = []
    for i, label in enumerate(tiny.HOSTILE_LABELS):
        layout = dict(kernels=[label], groups={label: dict(size=16, marks=dict(producer=[0]))})
        own = [row for row in kinds if row["kind"] != "sfw_init"] + [
            cut_row(label, 8, layout=layout)
        ]
        rows += [
            row | {"arm": label, "member": i, "stage": f"{label} {row['stage']}"} for row in own
        ]
        rows[-1] |= dict(kept={label: 8}, sizes={label: 16})
    text = page_of(tmp_path, rows, title="".join(tiny.HOSTILE_LABELS))
    assert "<b>&lt;" not in text
    for name in ("accuracy", "training", "magnitudes", "layers", "groups", "channels"):
        assert f'<section id="{name}">' in text
    assert "a$b" in text
    assert "#0072b2" in text


@pytest.mark.parametrize("kind", ["train", "curve", "histogram", "sfw_init"])
def test_one_kind_of_rows_is_enough(tmp_path, kind, sketches):
    rows = [row for row in make_rows(seeds=1, layers=3) if row["kind"] == kind]
    text = page_of(tmp_path, rows)
    assert (
        len(list((tmp_path / "figures").iterdir()))
        == {"train": 1, "curve": 3, "histogram": 1, "sfw_init": 1}[kind]
    )
    assert "No results" not in text


def test_no_rows_and_stale_figures(tmp_path, sketches):
    page_of(tmp_path, make_rows(seeds=1, layers=3))
    text = page_of(tmp_path, [])
    assert "no result rows" in text
    assert not list((tmp_path / "figures").iterdir())


def test_missing_numbers_are_no_obstacle(tmp_path, sketches):
    rows = [
        curve_row("A", m, r, math.nan if m else 0.5, loss=None) for m in (0, 1) for r in (0.0, 0.9)
    ]
    assert "50.00" in page_of(tmp_path / "one", rows)
    assert "<figure" not in page_of(tmp_path / "two", [row | {"accuracy": None} for row in rows])


def test_train_split_alone_and_beside_test(tmp_path, sketches):
    rows = make_rows(seeds=1, layers=3)
    train = [row | {"split": "train"} for row in rows if row["kind"] == "curve"]
    assert 'id="accuracy"' in page_of(tmp_path / "one", train)
    assert 'id="accuracy_train"' in page_of(tmp_path / "two", rows + train)


def test_many_ratios_layers_and_arms(tmp_path):
    rows = make_rows(arms=4, seeds=1, ratios=[i / 1000 for i in range(1000)], layers=20)
    text = page_of(tmp_path, rows)
    assert len(text) < 600_000
    assert text.count("<tr><th scope") > 16


# --------------------------------------------------------------------------------------------------
# ------- files


def test_writer_round_trip_and_json_types(tmp_path):
    row = {
        "stage": "fit",
        "kind": "train",
        "member": np.int64(1),
        "step": 3,
        "train_loss": np.float32(0.5),
    }
    row |= {
        "test_loss": float("nan"),
        "bad": np.float64("inf"),
        "counts": np.arange(3),
        "ok": np.bool_(True),
        "t": (1, 2),
    }
    with report.Writer(tmp_path) as writer:
        writer.append([row])
        text = (tmp_path / "metrics.jsonl").read_text()  # flushed before the close
    assert text.endswith("\n")
    written = json.loads(text)
    assert len(written.pop("sum")) == 8
    assert written == {
        "stage": "fit",
        "kind": "train",
        "member": 1,
        "step": 3,
        "train_loss": 0.5,
        "test_loss": None,
        "bad": None,
        "counts": [0, 1, 2],
        "ok": True,
        "t": [1, 2],
    }
    assert report.read_rows(tmp_path / "metrics.jsonl") == [written]
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_resume_drops_rows_after_the_checkpoint(tmp_path):
    rows = [
        {"stage": "fit", "kind": "train", "epoch": e, "step": e, "train_loss": 1.0}
        for e in range(1, 5)
    ]
    with report.Writer(tmp_path) as writer:
        writer.append(rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "fit", "ki')  # killed while writing
    assert report.read_rows(tmp_path / "metrics.jsonl") == rows
    with report.Writer(tmp_path, rows[:2]) as writer:
        assert report.read_rows(tmp_path / "metrics.jsonl") == rows[:2]
        writer.append(rows[2:3])
    assert report.read_rows(tmp_path / "metrics.jsonl") == rows[:3]
    events = list((tmp_path / "tensorboard").glob("events*"))
    assert len(events) == 1
    assert steps_of(events[0], b"fit/train_loss") == 3


def steps_of(path, tag):
    return path.read_bytes().count(tag)


def test_a_row_that_cannot_be_written_writes_nothing(tmp_path):
    good = {"stage": "fit", "kind": "train"}
    with report.Writer(tmp_path) as writer:
        with pytest.raises(TypeError, match="a row holds <object"):
            writer.append([good, good | {"x": object()}])
        with pytest.raises(ValueError, match="a row lacks kind; it has: stage"):
            writer.append([good, {"stage": "fit"}])
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_tensorboard_tags_and_steps(tmp_path):
    base = {
        "stage": "curve",
        "kind": "curve",
        "ratio": 0.985,
        "accuracy": 0.5,
        "retrained": False,
        "layers": {"a": 1},
    }
    assert events.scalars(base) == ({"curve/accuracy": 0.5, "curve/layers/a": 1.0}, 985_000_000)
    more = {"split": "train", "retrained": True, "visit": 2, "seed": 1, "fit.rate": 0.1}
    end = "train/retrained/visit_2"
    assert events.scalars(base | more)[0] == {
        f"curve/accuracy/{end}": 0.5,
        f"curve/layers/a/{end}": 1.0,
    }
    train = {
        "stage": "fit",
        "kind": "train",
        "step": 390,
        "epoch": 1,
        "train_loss": 2.0,
        "test_loss": None,
    }
    assert events.scalars(train) == ({"fit/train_loss": 2.0}, 390)
    with report.Writer(tmp_path) as writer:
        writer.append([train | {"member": 0}, train | {"member": 1}])
    (written,) = (tmp_path / "tensorboard").glob("events*")
    assert steps_of(written, b"fit/train_loss/member_0") == 1
    assert steps_of(written, b"fit/train_loss/member_1") == 1


def test_no_two_events_share_a_tag_and_a_step():
    """Visits, ratios however close, draws, members' nested numbers: each number of each row has its
    own place.
    """
    close = (0.9, 0.9004, 0.90041, 0.900410002)
    rows = [
        curve_row("A", 0, ratio, 0.5, visit=visit, layers={"a": ratio}, split=split)
        for visit in (1, 2)
        for split in ("test", "train")
        for ratio in close
    ]
    rows += [
        train_row("A", epoch, 0.5, visit=visit, step=10 * epoch)
        for visit in (1, 2)
        for epoch in (1, 2)
    ]
    rows += [cut_row("A", 8, visit) for visit in (1, 2)]
    noise = {"stage": "noise", "kind": "noise", "arm": "A", "member": 0}
    rows += [
        noise | {"visit": visit, "draw": draw, "loss": 1.0} for visit in (1, 2) for draw in (0, 1)
    ]
    places = []
    for row in rows:
        found, step = events.scalars(report.plain(row))
        places += [(tag, step) for tag in found]
    assert len(set(places)) == len(places)
    assert "cut/kept/conv" in {tag for tag, _ in places}


@pytest.mark.parametrize(
    ("bad", "text"), [("{nope", "line 2: Expecting"), ("[1]", "line 2: not a JSON object")]
)
def test_a_bad_line_is_an_error_with_its_number(tmp_path, bad, text):
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n' + bad + '\n{"a": 2}\n')
    with pytest.raises(ValueError, match=text):
        report.read_rows(tmp_path / "m.jsonl")


def test_main_rebuilds_the_same_page(tmp_path, capsys, sketches):
    rows = make_rows(seeds=1, layers=3)
    with report.Writer(tmp_path) as writer:
        writer.append(rows)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first = report.write(tmp_path, CONFIG, rows, environment=ENVIRONMENT).read_bytes()
    (tmp_path / "report.html").unlink()
    command.main(["--workdir", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == first


def test_main_gathers_member_workdirs(tmp_path):
    for i, value in enumerate((0.5, 0.7)):
        with report.Writer(tmp_path / f"member_{i}") as writer:
            writer.append([curve_row("A", 0, 0.0, value)])
        (tmp_path / f"member_{i}" / "config.json").write_text(json.dumps({"seed": i}))
    _, rows, environment = report.gather(tmp_path)
    assert [row["member"] for row in rows] == [0, 1]
    assert environment is None
    assert table_of(rows)[0].cells["dense"] == pytest.approx((0.6, math.sqrt(0.02), 2))


def save_run(folder, rows, **config):
    with report.Writer(folder) as writer:
        writer.append(rows)
    (folder / "config.json").write_text(json.dumps(config))


def test_merged_runs_are_averaged_only_where_all_settings_but_the_seed_agree(tmp_path):
    fit = lambda rate: {"kind": "train", "optimizer": {"learning_rate": rate}, "start": "init"}
    for name, rate, seed, accuracy in (("a", 0.1, 0, 0.5), ("b", 0.1, 1, 0.7), ("c", 0.3, 0, 0.9)):
        rows = [train_row("A", 1, accuracy) | curve_row("A", 0, 0.0, accuracy)]
        rows = [{key: value for key, value in row.items() if key != "seed"} for row in rows]
        save_run(
            tmp_path / name, rows, title=name, seed=seed, fit=fit(rate), data={"name": "digits"}
        )
    config, rows, _ = report.gather(tmp_path)
    first, second = table_of(rows)
    assert first.label == "A (learning_rate=0.1)"
    assert first.cells["dense"] == pytest.approx((0.6, math.sqrt(0.02), 2))
    assert second.label == "A (learning_rate=0.3)"
    assert second.cells["dense"] == (0.9, 0.0, 1)
    assert config["data"] == {"name": "digits"}
    assert config["fit"]["optimizer"]["learning_rate"] == [0.1, 0.3]
    page_of(tmp_path / "page", rows)


@pytest.mark.parametrize(
    "change", [{"model": {"width": 2}}, {"model": {"width": 1, "new": True}}, {"mesh": 2}]
)
def test_any_setting_separates_merged_runs(tmp_path, change):
    for name, more in (("a", {}), ("b", change)):
        save_run(
            tmp_path / name,
            [curve_row("A", 0, 0.0, 0.5)],
            **{"model": {"width": 1}, "seed": 0, **more},
        )
    _, rows, _ = report.gather(tmp_path)
    assert [line.cells["dense"][2] for line in table_of(rows)] == [1, 1]


def test_the_same_run_twice_is_no_sample_of_seeds(tmp_path):
    for name in ("a", "b"):
        save_run(tmp_path / name, [curve_row("A", 0, 0.0, 0.5)], seed=0)
    _, rows, _ = report.gather(tmp_path)
    assert [line.label for line in table_of(rows)] == ["A (run=a)", "A (run=b)"]


def test_runs_from_bases_that_differ_in_their_seed_are_averaged(tmp_path):
    for base, rate, seed in (("x", 0.1, 0), ("y", 0.1, 1), ("z", 0.3, 2)):
        save_run(tmp_path / "bases" / base, [], seed=seed, fit={"rate": rate})
        rows = [curve_row("A", 0, 0.0, 0.5) | {"seed": seed}]
        save_run(
            tmp_path / "runs" / base, rows, seed=seed, start_from=str(tmp_path / "bases" / base)
        )
    _, rows, _ = report.gather(tmp_path / "runs")
    assert [line.cells["dense"][2] for line in table_of(rows)] == [2, 1]


def test_one_merged_run_without_settings_is_refused(tmp_path):
    save_run(tmp_path / "a", [curve_row("A", 0, 0.0, 0.5)])
    save_run(tmp_path / "b", [curve_row("A", 0, 0.0, 0.5)])
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config"):
        report.gather(tmp_path)


def test_rows_beside_checkpoints_without_checksums_are_used_aloud(tmp_path, capsys):
    save_run(tmp_path, [curve_row("A", 0, 0.0, 0.5)])
    checkpoint = tmp_path / "checkpoints" / "3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "data").write_text("of an older version")
    _, rows, _ = report.gather(tmp_path)
    assert [row["accuracy"] for row in rows] == [0.5]
    assert "checksum" in capsys.readouterr().err


def test_a_report_can_be_written_elsewhere(tmp_path, capsys):
    save_run(tmp_path / "run", [curve_row("A", 0, 0.0, 0.5)])
    before = sorted((tmp_path / "run").rglob("*"))
    command.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "page")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "report.html")
    assert "<h1>run</h1>" in (tmp_path / "page" / "report.html").read_text()
    assert sorted((tmp_path / "run").rglob("*")) == before
    with pytest.raises(SystemExit):
        command.main(
            ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "run" / "metrics.jsonl")]
        )
    assert "--out names another folder" in capsys.readouterr().err


def test_main_says_what_is_missing(tmp_path, capsys):
    def error(folder):
        with pytest.raises(SystemExit):
            command.main(["--workdir", str(folder)])
        return capsys.readouterr().err

    assert "is not a folder; give the workdir of a run" in error(tmp_path / "none")
    assert "has metrics.jsonl; has the run started there?" in error(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "has no config.json; a run writes it when it starts" in error(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "but a list" in error(tmp_path)


def test_import_is_cheap_and_events_are_written_without_torch(tmp_path):
    """Which takes seconds to import, and tensorboardX would do so."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')", encoding="utf-8")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from sparsity_jax import report
assert not {{"matplotlib", "tensorboardX", "jax"}} & set(sys.modules)
report.Writer({str(tmp_path / "run")!r}).close()
from sparsity_jax.compare import __main__
assert not {{"torch", "jax"}} & set(sys.modules)
"""
    done = tiny.python("-c", code)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_channel_groups_and_what_is_left_of_them(tmp_path):
    """A residual network of 60 groups and two arms: one figure, with the channels kept by the last
    cut of each.
    """
    kernels = [f"params/block{i}/conv{j}/kernel" for i in range(60) for j in (1, 2)]
    groups = {}
    for i in range(60):
        marks = dict(producer=[2 * i], other=[2 * i + 0.5], consumer=[2 * i + 1], depthwise=[])
        groups[f"params/block{i}/conv1"] = dict(size=16, marks=marks)
    layout = dict(kernels=kernels, groups=groups)
    sizes = dict.fromkeys(groups, 16)
    rows = []
    for arm, left in (("magnitude", 6), ("gradients", 7)):
        for member in (0, 1):
            for visit, kept in ((1, 12), (2, left + member)):
                row = cut_row(arm, kept, visit, member=member, sizes=sizes)
                row["kept"] = dict.fromkeys(groups, kept)
                rows.append(row | (dict(layout=layout) if visit == 1 else {}))
    text = page_of(tmp_path, rows)
    section = text.split('<section id="groups">')[1].split("</section>")[0]
    for text in ("block59/conv1", "makes the channels", "var(--c1)"):
        assert text in section
    assert not re.search("#[0-9a-f]{6}", section)  # all colours follow the text
    left = channels.channel_rounds(series.group(rows)[1])
    assert_allclose(1 - left.iloc[0], [12 / 16, 8 / 16, 7 / 16])
    later = [row for row in rows if row["visit"] == 2]
    assert channels.groups(series.group(later)) is None


def test_compact_networks_keep_their_digits_and_name_their_visit(tmp_path):
    base = dict(row_of("compact"), accuracy=0.5, flops=183552, flops_compact=50816)
    del base["seed"]
    base |= dict(parameters=13706, parameters_compact=3658, bytes=54824, bytes_compact=14632)
    rows = [base | dict(visit=visit, difference=10.0**-visit) for visit in (1, 2)]
    text = page_of(tmp_path, rows)
    assert "3,658 <small>of 13,706, 26.7</small>" in text
    assert "A, visit 2" in text
    assert "differ by at most 0.1 of the largest" in text
    text = page_of(tmp_path, [row_of("compact", warning="it has an empty layer")])
    assert "it has an empty layer" in text  # without any number
    assert "nan" not in text.split('<section id="compact">')[1].split("</section>")[0]


def test_rows_of_an_unknown_kind_show_as_a_table(tmp_path, sketches):
    row = row_of("novel", wonder=0.375, text="<b>", many=[1, 2])
    text = page_of(tmp_path, [train_row("A", 1, 0.5), row, row | dict(wonder=None)])
    section = text.split("<h2>Rows of novel</h2>")[1].split("</section>")[0]
    assert section.count('<th scope="row">') == 2
    assert ">0.375</td>" in section
    assert "&lt;b&gt;" in section
    assert "many" not in section
    assert "Rows of train" not in text
