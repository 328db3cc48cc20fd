"""Predicted and actual limits on the page: numbers worked by hand, each figure exactly when its
rows exist, sizes.
"""

import re

import numpy as np

from sparsity_jax import report
from sparsity_jax.report import events, limits, series
from sparsity_jax.report.rows import completed

PAGES = True  # see conftest.py

CONFIG = {
    "data": {"name": "digits"},
    "hessian": {"kind": "spectrum", "stop_width": 0.0},
    "gauss_newton": {"kind": "spectrum", "stop_width": 0.005},
    "width": {"kind": "width", "tolerance": 0.002, "spectrum": "hessian"},
}
ACTUAL = {"test accuracy": 0.95, "test loss_within": 0.93}


def base(kind, stage, member=0, **fields):
    return {"stage": stage, "kind": kind, "visit": 1, "arm": "fit", "member": member, **fields}


def curve_rows(member=0, num=100, splits=("test", "train")):
    return [
        base(
            "curve",
            "curve",
            member,
            ratio=i / num,
            split=split,
            retrained=False,
            selection="global",
            scope="kernels",
            accuracy=0.98 if i / num < 0.95 else 0.98 - 10 * (i / num - 0.95),
            loss=0.05 + (i / num) ** 20,
            num_prunable=1000,
            num_kept=1000 - round(1000 * i / num),
            layers={"a/kernel": i / num},
        )
        for i in range(num)
        for split in splits
    ]


def limit_rows(member=0, limit=0.951):
    looked = [("dense", 0.0), ("scan", 0.99), ("scan", 0.9), ("bisect", 0.945)]
    rows = [
        base(
            "limit",
            "limit",
            member,
            phase=phase,
            ratio=ratio,
            split="test",
            accuracy=0.97,
            loss=0.1,
        )
        for phase, ratio in looked
    ]
    result = dict(
        phase="result",
        limit=limit,
        criterion="accuracy",
        tolerance=0.0,
        split="test",
        evaluations=4,
    )
    return [*rows, base("limit", "limit", member, **result, how="passes here, fails there")]


def norm_rows(member=0, num=10):
    rows = [
        base(
            "row_norms",
            "rows",
            member,
            quantile=i / num,
            magnitude=0.1 * i,
            row_norm=0.0 if i < 3 else 10.0**-i,
            parameter="a/kernel",
        )
        for i in range(num)
    ]
    return [
        *rows,
        base(
            "row_norms",
            "rows",
            member,
            zero_share=0.5,
            threshold=1e-5,
            rows="mean",
            num_weights=num,
        ),
    ]


def path_rows(member=0, slope=-0.002):
    """At 96 % the gradient changes the loss by half of `slope`."""
    return [
        base(
            "path",
            "path",
            member,
            ratio=ratio,
            distance=ratio,
            change=0.003 * i,
            first_order=slope * i / 2,
            second_order=0.004 * i,
        )
        for i, ratio in enumerate((0.9, 0.96, 0.99))
    ]


def width_row(
    member=0,
    operator="hessian",
    predicted=0.96,
    probes=1,
    products=8,
    width=0.02,
    stage=None,
    **fields,
):
    enclosed = operator != "hessian"
    values = np.linspace(0 if enclosed else -0.1, 2, products)[None].repeat(probes, 0)
    ratios = np.linspace(0, 1, 21)
    course = list(range(1, products + 1))
    fields = {"actual": ACTUAL, **fields}
    return base(
        "width",
        stage or ("width" if operator == "hessian" else f"width_{operator}"),
        member,
        predicted=predicted,
        method="fixed_point",
        low=predicted - 0.01,
        high=predicted + 0.01,
        operator=operator,
        spectrum=operator,
        enclosure_low=predicted if enclosed else None,
        enclosure_high=predicted + width if enclosed else None,
        standard_error=0.001 if probes > 1 else None,
        epsilon_error=0.002,
        per_probe=[predicted] * probes,
        predicted_on_grid=0.9,
        epsilon=0.00354,
        zero_share=0.0,
        num_matvecs=products,
        num_probes=probes,
        negative_mass=0.25,
        negative="absolute",
        ratios=ratios.tolist(),
        distances=(ratios**2).tolist(),
        widths=(1 - 0.04 * ratios**2).tolist(),
        ritz_values=values.tolist(),
        ritz_weights=np.full_like(values, 1 / products).tolist(),
        history=dict(
            num_matvecs=course,
            predicted=[predicted - 0.1 / i for i in course],
            lower=[predicted - 0.1 / i if enclosed else None for i in course],
            upper=[predicted + 0.1 / i if enclosed else None for i in course],
        ),
        **fields,
    )


def spectrum_row(member=0, operator="hessian", probe=0, products=8):
    return base(
        "spectrum",
        operator,
        member,
        probe=probe,
        operator=operator,
        num_matvecs=products,
        seconds=1.0,
        alphas=[0.1] * products,
        betas=[0.1] * products,
        dtype="float32",
        dimension=1000,
    )


def all_rows(members=1, num=20):
    rows = []
    for member in range(members):
        seed = {"seed": member} if members > 1 else {}
        own = [
            *curve_rows(member, num),
            *limit_rows(member),
            *norm_rows(member),
            spectrum_row(member),
        ]
        own += [
            *path_rows(member),
            width_row(member),
            width_row(member, "gauss_newton", 0.97, probes=3),
        ]
        rows += [row | seed for row in own]
    return rows


def networks_of(rows, config=CONFIG):
    return limits.networks(series.group(completed(rows, config, {})))


def page_of(folder, rows, config=CONFIG):
    return report.write(folder, config, rows).read_text(encoding="utf-8")


def drawn(folder):
    return sorted(path.stem for path in (folder / "figures").iterdir())


def section(page, name):
    return re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)[0]


# Numbers ------------------------------------------------------------------------------------------


def test_networks_and_their_names():
    (one,) = networks_of(all_rows())
    assert one.label == ""
    assert len(series.curves([one], split="train")) == 20
    labels = [network.label for network in networks_of(all_rows(members=2))]
    assert labels == ["fit, seed=0", "fit, seed=1"]
    two_arms = [row | {"arm": arm} for arm in ("A", "B") for row in all_rows()]
    assert [network.label for network in networks_of(two_arms)] == ["A", "B"]
    assert networks_of(curve_rows()) == []


def test_numbers_of_widths_alone_are_not_taken_for_swept_values():
    rows = (
        [width_row(member, predicted=0.9 + member / 100) for member in (0, 1)]
        + norm_rows()
        + limit_rows()
    )
    assert series.swept_keys(rows) == []
    assert len(networks_of(rows)) == 2


def test_later_visits_count():
    old, new = (curve_rows(num=num) for num in (10, 20))
    rows = [
        *old,
        *(row | {"visit": 2} for row in new),
        width_row(),
        width_row(predicted=0.5) | {"visit": 2},
    ]
    rows += [row | {"retrained": True} for row in curve_rows(num=30)]
    (one,) = networks_of(rows)
    shown = limits.pruned(one, limits.predictions([one]))
    assert len(shown[(shown["panel"] == "loss") & (shown["dash"] == 0)]) == 20
    assert list(limits.predictions([one])["predicted"]) == [0.5]
    searched = limit_rows()
    (one,) = networks_of(searched + [row | {"visit": 2} for row in searched[-2:]])
    assert len(one.of_kind("limit")) == 2


def actual_of(rows):
    """Actual limits of one network by definition, and those to compare with."""
    told = limits.actual(networks_of(rows))
    main = told[told["rank"] == 0]
    return dict(zip(told["definition"], told["limit"])), list(main["limit"])


def test_actual_limits_and_their_definitions():
    rows = all_rows()
    known, main = actual_of(rows)
    assert {name.partition(",")[0]: limit for name, limit in known.items()} == {
        "test accuracy not below dense": 0.951,
        "test loss above dense by at most ε": 0.93,
    }
    assert known["test accuracy not below dense"] == 0.95
    assert known["test accuracy not below dense, by bisection"] == 0.951
    assert main == [0.951]
    assert actual_of([row for row in rows if row["kind"] != "limit"])[1] == [0.95]
    known, _ = actual_of([width_row(actual={"elsewhere": 0.9})])
    assert list(known) == ["by bisection, in the run this one started from"]


def test_gap_is_worked_by_hand():
    found = networks_of([width_row(0, predicted=0.96), width_row(1, predicted=0.98)])
    pairs = limits.gaps(found)
    own = pairs[pairs["definition"] == "test accuracy not below dense"]
    np.testing.assert_allclose(own["gap"], [0.01, 0.03])
    assert list(own["inside"]) == [True, False]  # the intervals are 2 points wide


def test_verdicts_say_how_far_to_trust():
    rows = [width_row(), width_row(operator="gauss_newton", width=0.02)]
    rows.append(width_row(operator="absolute", width=0.004))
    hessian, newton, absolute = limits.verdicts(networks_of(rows))
    names = [verdict[0].split(" (")[0] for verdict in (hessian, newton, absolute)]
    assert names == ["Hessian", "Gauss-Newton", "absolute Hessian"]
    assert hessian[1] == (
        "96.00% predicted, 1.00 points above the actual limit (test accuracy not below dense), "
        "which is inside the interval."
    )
    assert hessian[2].startswith("No enclosure")
    assert newton[2].startswith("Not narrow enough: the enclosure is 2 points wide, more than 0.5")
    assert absolute[2] == ""


def test_verdicts_know_the_gradient():
    caution = lambda *rows: limits.verdicts(networks_of(rows))[0][2]
    unknown = dict(operator="absolute", actual={})
    row = width_row(**unknown, width=0.004)  # 96 % predicted, ε 0.00354
    assert caution(row, *path_rows(slope=-0.002)) == ""  # under half of ε
    told = caution(row, *path_rows(slope=-0.004))
    assert "changes the loss by -0.002 on the way there" in told
    assert told.endswith("expect a larger actual limit.")
    both = [row, *path_rows(slope=-0.004), row | {"member": 1}, *path_rows(1, slope=0.01)]
    assert caution(*both).endswith("expect a smaller actual limit.")  # of the worst network
    beyond = width_row(**unknown, predicted=0.995, width=0.004)  # nothing measured there
    assert caution(beyond, *path_rows(slope=-0.004)) == ""
    wide = width_row(**unknown, width=0.02)
    told = caution(wide, *path_rows(slope=1.0))
    assert re.fullmatch(r"Not narrow enough.* narrow it\. The gradient.*", told)


def test_verdicts_agree_with_the_actual_limit():
    """96 % predicted, 95 to 97 % the interval; along the way the gradient changes the loss."""

    def caution(actual, slope):
        row = width_row(operator="absolute", width=0.004, actual={"test accuracy": actual})
        return limits.verdicts(networks_of([row, *path_rows(slope=slope)]))[0][2]

    assert caution(0.9500004, -0.004) == caution(0.9699996, 0.004) == ""
    assert caution(0.94, -0.004) == caution(0.98, 0.004) == ""  # on the other side
    assert caution(0.98, -0.004).endswith("this agrees with the larger actual limit.")
    assert caution(0.94, 0.004).endswith("this agrees with the smaller actual limit.")
    assert caution(0.9499996, 0.004) == ""  # 95.00 to all who read the page


def test_predictions_of_one_operator_are_told_apart():
    names = limits.predictions(networks_of([width_row(), width_row(stage="deeper")]))["name"]
    assert list(names) == ["Hessian (width)", "Hessian (deeper)"]


def test_window_is_around_the_limits_or_left_out():
    (one,) = networks_of(all_rows())
    low, high = limits.window(one)
    assert 0.9 < low < 0.95
    assert 0.98 < high <= 1.0
    (apart,) = networks_of([width_row(predicted=0.2), width_row(stage="b", predicted=0.9)])
    assert limits.window(apart) == (0.0, 1.0)


# Pages --------------------------------------------------------------------------------------------


def test_each_figure_appears_exactly_with_its_rows(tmp_path, sketches):
    kinds = {
        "curves": (curve_rows(), {"accuracy", "loss", "accuracy_train", "layers"}),
        "limit": (limit_rows(), {"limits"}),
        "path": (path_rows(), {"path"}),
        "norms": (norm_rows(), {"row_norms"}),
        "spectrum": ([spectrum_row()], set()),
        "width": ([width_row()], {"crossing", "history", "spectrum"}),
        "all": (
            all_rows(),
            {"limits", "path", "crossing", "history", "spectrum", "row_norms", "layers"}
            | {"accuracy", "loss", "accuracy_train"},
        ),
    }
    for name, (rows, expected) in kinds.items():
        page = page_of(tmp_path, rows)  # the same folder: figures of other rows go
        assert set(drawn(tmp_path)) == expected, name
        assert page.count('role="img"') == len(expected)
        assert ('id="prediction"' in page) == (name in ("limit", "width", "all"))


def test_table_has_the_numbers(tmp_path, sketches):
    text = section(page_of(tmp_path, all_rows()), "prediction")
    lines = re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
    rows = [re.findall(r'class="num">(.*?)</td>', line) for line in lines]
    first = "96.00 95.00\u201397.00 – – 0.20 0.00354 1 × 8 0.0 25.0 90.0"
    second = "97.00 96.00\u201398.00 97.00\u201399.00 0.10 0.20 0.00354 3 × 8 0.0 25.0 90.0"
    assert [" ".join(row).replace("\u2060", "") for row in rows[1:3]] == [first, second]
    assert rows[4:] == [
        ["95.00", "<b>+1.00</b>", "+2.00"],
        ["93.00", "+3.00", "+4.00"],
        ["95.10", "<b>+0.90</b>", "+1.90"],
    ]
    assert "Not narrow enough" in text
    assert "nan" not in text.lower()


def test_several_networks_share_the_table_and_have_panels_of_their_own(tmp_path, sketches):
    page = page_of(tmp_path, all_rows(members=2))
    assert "seed=1" in section(page, "prediction")
    assert "inside 2 of 2 intervals" in section(page, "prediction")
    assert section(page, "limits").count("seed=1") == 2  # accuracy and loss
    page = page_of(tmp_path, [width_row(member, seed=member) for member in range(8)])
    assert "The first 6 of 8 networks." in section(page, "history")


def test_curves_of_several_arms_are_still_compared(tmp_path, sketches):
    page_of(tmp_path, [row | {"arm": arm} for arm in ("A", "B") for row in all_rows()])
    assert {"limits", "accuracy", "loss"} <= set(drawn(tmp_path))


def test_page_of_a_thousand_ratios_and_long_spectra_stays_small(tmp_path):
    rows = [*curve_rows(num=1000), *limit_rows(), *norm_rows(num=100)]
    rows += [spectrum_row(products=512), width_row(probes=4, products=512)]
    page = page_of(tmp_path, rows)
    assert len(page.encode()) < 1_500_000
    assert "[0.1, 0.1" not in page
    assert all(path.stat().st_size < 1_000_000 for path in (tmp_path / "figures").iterdir())


def test_missing_numbers_are_no_obstacle(tmp_path, sketches):
    holes = dict(actual={}, epsilon_error=None, enclosure_low=None, enclosure_high=None)
    rows = [
        width_row(operator="gauss_newton") | holes,
        *norm_rows(num=1)[:1],
        path_rows()[0] | {"change": None},
    ]
    text = section(page_of(tmp_path, rows), "prediction")
    assert "No enclosure" in text
    assert "nothing is lost if" not in text
    assert {"crossing", "history", "path", "row_norms", "spectrum"} == set(drawn(tmp_path))


def test_names_are_escaped(tmp_path, sketches):
    evil = "<script>$x$"
    rows = [
        width_row(operator=evil, stage=evil),
        width_row(operator=evil, stage="other"),
        *limit_rows(),
    ]
    rows[-1] |= {"how": evil, "stage": evil}
    assert "<script" not in page_of(tmp_path, rows, {**CONFIG, evil: {"tolerance": evil}})


def test_no_label_breaks_a_page(tmp_path):
    page_of(tmp_path, [{**row, "arm": r"_$\1$ {0}% <b>"} for row in all_rows(num=10)])
    assert {"limits", "crossing", "history", "path", "row_norms", "spectrum"} <= set(
        drawn(tmp_path)
    )


def test_the_study_is_cited(tmp_path, sketches):
    assert "arXiv:2306.05857" in page_of(tmp_path, all_rows())
    assert "arXiv:2306.05857" not in page_of(tmp_path, curve_rows(), {"data": {"name": "digits"}})


def test_tensorboard_steps_and_no_lists():
    tags = events.scalars(report.plain(limit_rows()[1]))
    assert tags == ({"limit/accuracy": 0.97, "limit/loss": 0.1}, 990_000_000)
    found, step = events.scalars(norm_rows()[9])
    assert (found["rows/row_norm"], step) == (1e-9, 900_000_000)
    found, step = events.scalars(path_rows()[1])
    assert (found["path/change"], step) == (0.003, 960_000_000)
    assert events.scalars(spectrum_row(probe=2))[1] == 2
    fields, _ = events.scalars(report.plain(width_row()))
    assert {"width/predicted", "width/low", "width/high", "width/actual/test accuracy"} <= set(
        fields
    )
    assert not any(word in tag for tag in fields for word in ("ritz", "history", "widths"))
