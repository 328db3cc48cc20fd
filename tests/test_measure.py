"""The rows that experiments/gpu/measure.py writes. Whole groups run with its option --small."""

import json
import pathlib
import sys

import jax.numpy as jnp
import pytest
import tiny

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "gpu"


@pytest.fixture
def measure(monkeypatch):
    """The command, whose modules lie beside it."""
    monkeypatch.syspath_prepend(FOLDER)
    yield tiny.module("experiments/gpu/measure.py")
    sys.modules.pop("timing", None)


def test_a_table_of_the_newest_rows_and_what_they_reach(measure, tmp_path):
    row = dict(group="updates", name="update", least=0.1, greatest=0.9, unit="ms", goal="<= 0.3")
    end = dict(group="updates", name="end of the group", seconds=1.5)
    end |= dict(device="a GPU", cores="16", versions="jax 1", date="2026-11-28")
    lines = [json.dumps(line) for line in (row | {"value": 0.5}, row | {"value": 0.2}, end)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    arguments = ["--out", str(tmp_path), "--no-tests", "--only", "updates"]
    assert measure.main(arguments) == 0  # the group is there already
    table = (tmp_path / "table.md").read_text()
    assert "| update | 0.2 | 0.1 - 0.9 | ms | <= 0.3 | yes |" in table
    assert "0.5" not in table
    assert "a GPU, 16 CPU cores, jax 1" in table
    timing = sys.modules["timing"]
    assert timing.one("speed", [1.0, 2.0, 3.0], "", ">= 2.5").reached == "no"
    assert timing.one("speed", 2.0, "").reached == ""


def test_calls_take_turns_and_a_loop_goes_on_where_it_was(measure):
    timing = sys.modules["timing"]
    call = timing.looped(lambda x: x + 1, jnp.zeros(()), 5)
    seen = []
    calls = {"loop": lambda: seen.append("loop") or call(), "other": lambda: jnp.ones(2)}
    times = timing.in_turn(calls, rounds=3, repeats=2)
    assert len(seen) == 8  # a first round that compiles
    assert {name: len(values) for name, values in times.items()} == {"loop": 3, "other": 3}
    assert float(call()) == 45
    ratio = list(timing.compared(times, "ms", [("loop", "other", "<= 1")]))[-1]
    assert ratio.least <= ratio.value <= ratio.greatest
