"""What is built and installed: the configs inside the package, its data, one version."""

import re
import runpy
import sys
import tarfile

import pytest
import tiny

import sparsity_jax
from sparsity_jax import catalog, commands

ROOT = tiny.ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with `package`, what is installed, and `dist`, the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    steps = ["egg_info", "--egg-base", folder, "build_py", "--build-lib", folder / "package"]
    steps += ["sdist", "--dist-dir", folder / "dist"]
    ended = tiny.python("setup.py", "-q", *steps)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_installed_package_is_whole(built):
    package = built / "package"
    for name in catalog.files():
        file = package / "sparsity_jax" / "configs" / f"{name}.py"
        assert file.read_text() == (ROOT / "configs" / f"{name}.py").read_text()
    assert (package / "sparsity_jax" / "py.typed").exists()
    assert (package / "sparsity_jax" / "report" / "page.html.j2").exists()
    assert [path.name for path in package.iterdir()] == ["sparsity_jax"]


def test_the_installed_configs_are_found(built):
    code = "from sparsity_jax import catalog; print(catalog.located('greg:digits'))"
    ended = tiny.python("-c", code, cwd=built / "package")
    assert ended.stdout == f"{built / 'package/sparsity_jax/configs/greg.py'}:digits\n"


def test_the_source_distribution_can_be_built(built):
    (archive,) = (built / "dist").iterdir()
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.removeprefix(f"{root}/") for name in opened.getnames()}
    wanted = {"setup.py", "README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md"}
    assert wanted | {f"configs/{name}.py" for name in catalog.files()} <= names


def test_there_is_one_version(built):
    told = (built / "sparsity_jax.egg-info" / "PKG-INFO").read_text()
    assert f"\nVersion: {sparsity_jax.__version__}\n" in told
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {sparsity_jax.__version__}\n" in cited


def test_the_page_on_installation_has_every_dependency_and_extra(built):
    required = (built / "sparsity_jax.egg-info" / "requires.txt").read_text()
    always, *extras = re.split(r"^\[(\w+)\]$", required, flags=re.MULTILINE)
    page = (ROOT / "docs" / "install.md").read_text()
    cells = re.findall(r"^\| ([\w, -]+) \| \d+ \|", page, re.MULTILINE)
    assert set(", ".join(cells).split(", ")) == set(re.findall(r"^[\w-]+", always, re.MULTILINE))
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == sorted(extras[::2])


# The console script -------------------------------------------------------------------------------


def type_in(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sparsity-jax", *arguments])
    commands.main()


def test_every_program_of_the_package_is_a_command(monkeypatch, capsys):
    package = ROOT / "sparsity_jax"
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    programs = [path for path, text in texts.items() if '__name__ == "__main__"' in text]
    names = {path.parent.name if path.stem == "__main__" else path.stem for path in programs}
    type_in(monkeypatch)
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\w+) ", printed, re.MULTILINE) == list(commands.COMMANDS)
    assert names == set(commands.COMMANDS)


def test_a_command_is_the_module_with_the_other_arguments(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "sparsity_jax.report.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        type_in(monkeypatch, "report", "--workdir", "nowhere")
    assert ended.value.code == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(monkeypatch):
    monkeypatch.setattr(runpy, "run_module", pytest.fail)
    with pytest.raises(SystemExit) as ended:
        type_in(monkeypatch, "repot")
    assert "evaluate, prepare, report, run. Did you mean 'report'?" in ended.value.code
