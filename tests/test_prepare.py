"""The preparing command without network and TensorFlow: what it refuses, and what it would ask TFDS
to do.
"""

import importlib.util
import json
import pathlib
import types

import pytest
import tiny

from sparsity_jax import prepare


class FakeBuilder:
    """Stands in for a TFDS builder: records the calls that would download."""

    def __init__(self, name, data_dir):
        self.name, self.data_path, self.calls = name, f"{data_dir}/{name}", []
        self.info = types.SimpleNamespace(splits={"train": types.SimpleNamespace(num_examples=7)})

    def download_and_prepare(self, **options):
        self.calls.append(options)


@pytest.fixture
def builders(monkeypatch):
    """Pretend that TensorFlow is there; the builders that the command makes."""
    import tensorflow_datasets as tfds

    made = []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name == "tensorflow" else find_spec(name)
    )
    monkeypatch.setattr(
        tfds, "builder", lambda name, data_dir: made.append(FakeBuilder(name, data_dir)) or made[-1]
    )
    return made


@pytest.fixture
def no_tensorflow(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )


def place(root, name, file_format):
    directory = root / name / "3.0.2"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text(
        json.dumps({"name": name, "fileFormat": file_format})
    )


def test_prepares_missing_sets_as_array_record(builders, tmp_path, capsys):
    place(tmp_path, "cifar10", "array_record")
    assert prepare.main(["cifar10", "mnist", "svhn_cropped", "--data_dir", str(tmp_path)]) == 0
    assert [(builder.name, len(builder.calls)) for builder in builders] == [
        ("mnist", 1),
        ("svhn_cropped", 1),
    ]
    assert all(pathlib.Path(builder.data_path).parent == tmp_path for builder in builders)
    options = builders[0].calls[0]
    assert options["file_format"] == "array_record"
    assert not options["download_config"].download_mode.overwrite_dataset
    out = capsys.readouterr().out
    assert "cifar10 is prepared already" in out
    assert "mnist is prepared: " in out
    assert "(train 7)" in out


def test_default_directory_is_that_of_tfds(builders, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert prepare.main(["mnist"]) == 0
    assert builders[0].data_path == f"{tmp_path}/mnist"


def test_another_format_is_replaced_only_when_asked(builders, tmp_path, capsys):
    place(tmp_path, "cifar10", "tfrecord")
    assert prepare.main(["cifar10", "--data_dir", str(tmp_path)]) == 1
    assert "prepared as tfrecord; add --overwrite" in capsys.readouterr().out
    assert not builders
    assert prepare.main(["cifar10", "--data_dir", str(tmp_path), "--overwrite"]) == 0
    mode = builders[0].calls[0]["download_config"].download_mode
    assert (
        mode.name == "REUSE_CACHE_IF_EXISTS"
    )  # downloads are kept, the prepared files are replaced
    assert mode.overwrite_dataset


@pytest.mark.parametrize(
    ("name", "message"),
    [("cifar11", "Did you mean 'cifar10"), ("svhn", "'svhn_cropped'"), ("a b", "allowed")],
)
def test_unknown_names_stop_before_anything_is_downloaded(
    builders, name, message, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["mnist", name, "--data_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not builders


def test_without_tensorflow_it_says_what_to_install(no_tensorflow, tmp_path, capsys):
    assert prepare.main(["mnist", "--data_dir", str(tmp_path)]) == 1
    assert 'pip install "sparsity_jax[prepare]"' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_ready_sets_need_no_tensorflow(no_tensorflow, tmp_path):
    place(tmp_path, "cifar10", "array_record")
    assert prepare.main(["cifar10", "--data_dir", str(tmp_path)]) == 0


def test_damaged_metadata_is_named(tmp_path, capsys):
    place(tmp_path, "cifar10", "array_record")
    file = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    file.write_text("{")
    with pytest.raises(SystemExit):
        prepare.main(["cifar10", "--data_dir", str(tmp_path)])
    assert str(file) in capsys.readouterr().err


def test_help_from_the_command_line():
    done = tiny.python("-W", "error", "-m", "sparsity_jax.prepare", "--help")
    assert "--data_dir" in done.stdout
    assert "examples:" in done.stdout
    assert done.stderr == ""
