"""Where a run comes from, with git, without it, and after a change."""

import shutil
import subprocess

import pytest

from sparsity_jax import provenance, report


@pytest.fixture
def repository(tmp_path):
    """A repository with the committed file `config.py`, and a way to call git in it."""
    if shutil.which("git") is None:
        pytest.skip("needs git")

    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        told = subprocess.run(
            ["git", *name, *arguments], cwd=tmp_path, capture_output=True, check=True
        )
        return told.stdout.decode().strip()

    git("init", "--quiet")
    (tmp_path / "config.py").write_text("a = 1\n")
    git("add", "config.py")
    return tmp_path, git


def test_provenance_of_a_file_is_its_commit_and_whether_it_was_changed(repository):
    folder, git = repository
    file = folder / "config.py"
    assert provenance.commit_of(file) == (None, None)
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert provenance.commit_of(file) == (commit, False)
    other = folder / "other.py"
    other.write_text("")
    assert provenance.commit_of(other) == (None, None)
    assert provenance.commit_of(file) == (commit, True)
    other.unlink()
    file.write_text("a = 2\n")
    assert provenance.commit_of(file) == (commit, True)


def test_provenance_needs_no_git(monkeypatch, tmp_path):
    file = tmp_path / "config.py"
    file.touch()
    assert provenance.commit_of(file) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit_of(provenance.__file__) == (None, None)
    told = provenance.describe({"sweep": {"seed": [3, 1]}}, config_file=file)
    assert told["config_commit"] is told["config_dirty"] is None
    assert told["seed"] == [3, 1]
    assert told["cores"] >= 1
    assert "command" not in told


def test_a_continued_run_keeps_its_start_and_tells_another_commit(tmp_path):
    first = dict(commit="a", date="monday", command="run", dirty=False)
    report.write_environment(tmp_path, first)
    joint = report.continued(tmp_path, dict(commit="b", date="tuesday", command="", dirty=False))
    assert joint == first | dict(commit="a, then b")
