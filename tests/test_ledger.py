"""The filler of the ledger and the packer for a GPU machine, on the CPU and at tiny size."""

import pathlib
import time

import pytest
import tiny
from array_record.python import array_record_module
from numpy.random import default_rng

from sparsity_jax import pipeline, report

LEDGER = tiny.module("experiments/gpu/ledger.py")
PACK = tiny.module("experiments/gpu/pack.py")
HEAD = (
    "# A ledger\n\n"
    "| Experiment | Published number | Our number | Command | Hardware | Time | Date | Status |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
TINY = """"--config.pipeline=('fit_sgd',)" '--config.sweep.seed=(0,)' '--config.model.widths=(8,)'\
 --config.data.train_limit=128 --config.data.test_limit=50 --config.fit_sgd.epochs=3"""
CELLS = dict(number="5 %", hardware="a", time="b", date="c", status="done")


def row(experiment: str, command: str = "–", status: str = "open") -> LEDGER.Row:
    return LEDGER.Row(experiment, "none", "–", command, "–", "–", "–", status)


def tiny_row(workdir: pathlib.Path, fields: str = TINY) -> LEDGER.Row:
    config = "configs/quickstart.py"
    return row("tiny", f"`run --config {config} --workdir {workdir} {fields}`")


def written(folder: pathlib.Path, *rows: LEDGER.Row) -> pathlib.Path:
    """A ledger of its own."""
    path = folder / "LEDGER.md"
    text = "".join(f"{row.line()}\n" for row in rows)
    path.write_text(f"{HEAD}{text}\nThe end.\n", encoding="utf-8")
    return path


def begun(folder: pathlib.Path, seconds: tuple[float, ...]) -> LEDGER.Job:
    """The job of a run whose epochs ended after so many seconds."""
    job = LEDGER.job_of(tiny_row(folder / "run"))
    common = dict(stage="fit_sgd", kind="train", visit=1, arm="SGD", member=0, step=1)
    with report.Writer(job.workdir) as writer:
        for epoch, end in enumerate(seconds, start=1):
            writer.append([dict(common, epoch=epoch, seconds=end, test_accuracy=0.5)])
    return job


# Rows ---------------------------------------------------------------------------------------------


def test_a_filled_row_changes_its_own_line_only():
    """And open rows right below it that are of the same run; all of the real ledger."""
    text = LEDGER.claims.LEDGER.read_bytes().decode()
    text = text.replace("\n", "\r\n", 30)
    lines = text.splitlines(keepends=True)
    for found in LEDGER.rows_of(text):
        new = LEDGER.filled(text, found, **CELLS)
        pairs = zip(lines, new.splitlines(keepends=True), strict=True)
        changed = [pair for pair in pairs if pair[0] != pair[1]]
        (_, first), *below = changed
        assert LEDGER.row_of(first) == found._replace(**CELLS)
        for old, now in below:
            assert LEDGER.row_of(old).command == "the same run"
            assert LEDGER.row_of(now).status == CELLS["status"]
        for old, now in changed:
            assert old.endswith("\r\n") == now.endswith("\r\n")
        of_four = found.is_open() and "runs/toy_cnn`" in found.command
        assert len(below) == 3 or not of_four
    with pytest.raises(ValueError, match="0 rows"):
        LEDGER.filled(text, row("not there"), **CELLS)


def test_rows_are_chosen_in_order(tmp_path, capsys):
    missing = "--config.data.name=folder:PATH"
    ledger = written(
        tmp_path,
        row("nothing to run"),
        tiny_row(tmp_path / "a", missing)._replace(experiment="no data"),
        tiny_row(tmp_path / "b")._replace(status="done"),
        tiny_row(tmp_path / "c")._replace(experiment="second"),
        tiny_row(tmp_path / "d", "--config.x.y=1")._replace(experiment="mistaken"),
        row("no workdir", "`run --config configs/quickstart.py`"),
        tiny_row(tmp_path / "e")._replace(experiment="last"),
    )
    before = ledger.read_bytes()
    assert LEDGER.main(["--minutes", "5", "--dry", "--ledger", str(ledger)]) == 0
    said = [line.split(": ")[:2] for line in capsys.readouterr().out.splitlines()]
    expected = {"second": "would run", "last": "would run"}
    order = ("no data", "second", "mistaken", "no workdir", "last")
    assert said == [[expected.get(name, "passed over"), name] for name in order]
    assert ledger.read_bytes() == before
    with pytest.raises(SystemExit):
        LEDGER.main(["--minutes", "0.5", "--ledger", str(ledger)])
    assert capsys.readouterr().err == "error: --minutes is 0.5; allowed: 2 and more.\n"


# Runs ---------------------------------------------------------------------------------------------


def test_the_rest_of_a_training_is_known_after_three_epochs(tmp_path):
    sweep = "--config.fit_sfw.epochs=10 --config.fit_sgd.epochs=20"
    job = LEDGER.job_of(tiny_row(tmp_path, sweep))
    assert LEDGER.epochs_of(job) == 30  # three seeds side by side
    rows = [
        dict(kind="train", stage="fit_sfw", visit=1, member=member, epoch=epoch, seconds=seconds)
        for epoch, seconds in ((1, 60.0), (2, 62.0), (3, 65.0))
        for member in range(3)
    ]
    assert LEDGER.training_left(job, rows[:6]) is None
    assert LEDGER.training_left(job, rows) == 2 * 27


def test_a_run_that_does_not_fit_is_passed_over(tmp_path, capsys):
    job = begun(tmp_path, (30.0, 130.0, 230.0))
    job = job._replace(plans=LEDGER.job_of(tiny_row(tmp_path, "--config.seed=0")).plans)
    deadline = time.monotonic() + 120
    assert "needs" in LEDGER.reason_to_stop(job, deadline, part=False)
    assert not LEDGER.reason_to_stop(job, deadline, part=True)
    assert "over" in LEDGER.reason_to_stop(job, time.monotonic(), part=True)


@pytest.mark.parametrize(("ends_with", "reason"), [(7, "its run ended with exit code 7"), (0, "")])
def test_a_run_that_ends_says_how(ends_with, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(LEDGER, "RUNNER", ("-c", f"raise SystemExit({ends_with})"))
    job = LEDGER.job_of(tiny_row(tmp_path / "run"))
    assert LEDGER.attempt(job, time.monotonic() + 100, part=True) == reason


def test_a_run_that_is_ended_may_save(tmp_path, monkeypatch):
    listens, saved = tmp_path / "listens", tmp_path / "saved"
    program = (
        "import pathlib, signal, sys, time\n"
        f"stop = lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(130))\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(listens)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(LEDGER, "RUNNER", ("-c", program))
    monkeypatch.setattr(LEDGER, "POLL", 0.05)
    reason = lambda *_: "enough" if listens.exists() else ""
    monkeypatch.setattr(LEDGER, "reason_to_stop", reason)
    job = begun(tmp_path, ())
    assert LEDGER.attempt(job, 0.0, part=True) == "enough"
    assert saved.exists()
    assert float((job.workdir / LEDGER.SECONDS).read_text()) > 0


def test_a_whole_run_fills_its_row(tmp_path, capsys):
    ledger = written(tmp_path, tiny_row(tmp_path / "run"), row("below", "the same run"))
    assert LEDGER.main(["--minutes", "3", "--ledger", str(ledger)]) == 0
    first, below = LEDGER.rows_of(ledger.read_text(encoding="utf-8"))
    assert first.status == below.status == "done, one seed"
    assert first.number.endswith(" % ([rows](quickstart/run.jsonl))")
    assert first.hardware.endswith(" CPU cores, jax " + LEDGER.jax.__version__)
    (claim,) = LEDGER.claims.filled(ledger)
    assert not LEDGER.claims.stale(claim, ledger.read_text(encoding="utf-8"))
    assert "done: tiny" in capsys.readouterr().out
    assert LEDGER.main(["--minutes", "3", "--ledger", str(ledger)]) == 0  # nothing is open


def test_an_interrupted_writing_leaves_the_ledger_whole(tmp_path, monkeypatch):
    job = begun(tmp_path, (1.0, 2.0))
    config = pipeline.plain(tiny.module("configs/quickstart.py").get_config())
    LEDGER.workdirs.claim(job.workdir, config)
    ledger = written(tmp_path, job.row)
    before = ledger.read_bytes()
    replace = pathlib.Path.replace

    def interrupted(part, target):
        if target == ledger:
            raise KeyboardInterrupt
        return replace(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LEDGER.fill(ledger, job)
    assert ledger.read_bytes() == before
    assert LEDGER.fill(ledger, job) == "dense 50.0 % ([rows](quickstart/run.jsonl))"
    assert {path.name for path in tmp_path.iterdir()} == {"LEDGER.md", "quickstart", "run"}


# Packing ------------------------------------------------------------------------------------------


def test_a_packed_set_has_the_same_records(tmp_path, monkeypatch):
    place = tmp_path / "sets" / "cifar10" / "3.0.2"
    place.mkdir(parents=True)
    (place / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    header = default_rng(0).bytes(600)
    records = [header + number.to_bytes(2) for number in range(500)]
    name = "cifar10-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(place / name), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    PACK.pack_set("cifar10", str(tmp_path / "sets"), tmp_path / "packed")
    packed = tmp_path / "packed" / "cifar10" / "3.0.2"
    assert PACK.records_of(packed / name) == records
    assert PACK.bytes_of(packed) < PACK.bytes_of(place) / 2
    assert (packed / "dataset_info.json").read_bytes() == b'{"fileFormat": "array_record"}'
    monkeypatch.setattr(PACK, "tracked_bytes", lambda: 2**20)
    assert PACK.tell_sizes(packed, 10)
    assert not PACK.tell_sizes(packed, 0.5)
    with pytest.raises(ValueError, match="not prepared"):
        PACK.pack_set("cifar100", str(tmp_path / "sets"), tmp_path / "packed")
    monkeypatch.setattr(PACK, "records_of", lambda path: [str(path).encode()])
    with pytest.raises(ValueError, match="does not hold"):
        PACK.repack(place / name, tmp_path / "other")
