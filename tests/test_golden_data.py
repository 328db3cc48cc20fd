"""The reference numbers themselves: which of them no test reads, and why."""

import os
import pathlib
import re

import golden_data
import tiny


def test_reasons_are_given_for_numbers_that_exist():
    places = golden_data.places()
    for pattern, reason in golden_data.NOT_COMPARED.items():
        assert any(re.fullmatch(pattern, place) for place in places), pattern
        assert reason


def test_numbers_are_remembered_when_they_are_read():
    entries = golden_data.Entries("file ", {"a/x": 1, "a/y": 2, "b": {"z": 3}})
    assert entries.places() == ["file a/x", "file a/y", "file b/z"]
    part = entries.under("a")
    assert list(part) == ["x", "y"]
    assert {"file a/x", "file a/y", "file b/z"}.isdisjoint(golden_data.READ)
    assert (part["x"], entries["b"]["z"]) == (1, 3)
    assert {"file a/x", "file b/z"} <= golden_data.READ
    assert "file a/y" not in golden_data.READ


def test_the_script_names_what_nobody_read(tmp_path):
    """With GOLDEN_READ every process appends what it read to a file."""
    forgotten, *places = golden_data.places()
    read = tmp_path / "read"
    read.write_text("".join(f"{place}\n" for place in places))
    path = pathlib.Path(golden_data.__file__)
    run = tiny.python(path, read)
    assert (run.returncode, run.stdout) == (1, f"{forgotten}: read by no test\n")
    file, key = forgotten.split(" ", 1)
    reader = f"import golden_data; golden_data.load({file!r})[{key!r}]"
    variables = os.environ | {"GOLDEN_READ": str(read), "PYTHONPATH": str(path.parent)}
    assert tiny.python("-c", reader, env=variables).returncode == 0
    run = tiny.python(path, read)
    assert (run.returncode, run.stdout) == (0, "")
