"""What experiments/scale/measure.py has measured, beside the formulas of docs/scale.md."""

import json

import pytest
import tiny

COLLECTIVES = tiny.module("experiments/scale/collectives.py")
FORMULAS = tiny.module("experiments/scale/formulas.py")
ROWS = json.loads((tiny.ROOT / "experiments/scale/scale.json").read_text())["rows"]
PROGRAM = """
%body (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = (s32[], f32[8]{0}) all-reduce(%a, %b), replica_groups={{0,1}}, to_apply=%add
}

%side (a: f32[8]) -> f32[8] {
  %all-gather.1 = f32[16]{0} all-gather(%a), dimensions={0}
}

ENTRY %main (a: f32[8], all-reduce: pred[3]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %conditional.1 = f32[8] conditional(%p, %a), branch_computations={%side, %side}
  ROOT %done = pred[3]{0} all-to-all(%p), dimensions={0}
}
"""


def test_exchanges_are_read_from_a_program():
    read = COLLECTIVES.of_program(PROGRAM)
    gather = ("all-gather", (64,), 1)
    assert read == [("all-reduce", (4, 32), 5), gather, gather, ("all-to-all", (3,), 1)]
    received = [COLLECTIVES.received(collective, 4) for collective in read]
    assert received == [5 * 2 * 36 * 3 / 4, 48, 48, 3 * 3 / 4]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['algorithm']} {row['devices']}")
def test_what_was_measured_is_what_the_formulas_say(row):
    expected = FORMULAS.expected(row["algorithm"], FORMULAS.MEASURED, row["devices"])
    exchanged = sum(row["exchanged"].values())
    assert 0.9 * expected.held <= row["held"] <= expected.held + 500
    if expected.exact:
        assert set(row["exchanged"]) <= {"all-reduce"}
        assert exchanged == pytest.approx(expected.exchanged)
    else:
        assert 0.8 * expected.exchanged <= exchanged <= expected.exchanged


def test_temporary_arrays_are_shared_too():
    """From two devices on: one alone has another layout of Lanczos vectors."""
    of_two = {row["algorithm"]: row["temporary"] for row in ROWS if row["devices"] == 2}
    for row in ROWS:
        expected = FORMULAS.expected(row["algorithm"], FORMULAS.MEASURED, row["devices"])
        if expected.exact and row["devices"] > 1:
            share = 2 * of_two[row["algorithm"]] / row["devices"]
            assert row["temporary"] == pytest.approx(share, rel=0.02, abs=10_000)
