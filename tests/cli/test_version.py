"""`moeport --version`: moeport with its commit, Python, and the frameworks, none of which is imported."""

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from moeport import version
from moeport.cli import versions
from moeport.cli.main import ALONE, main, whole_command
from moeport.version import COMMIT_FILE, VERSION

GIT = shutil.which("git")


def git(folder, *arguments):
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.example")
    command = [GIT, "-C", folder, *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=clean()).stdout.strip()


def clean():
    """The environment without what git sets for its hooks, which would lead to the repository of the hook."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "One")
    return tmp_path


def test_it_names_what_is_installed_and_what_is_not(capsys, monkeypatch):
    there = {"torch": "2.13.0+cpu", "numpy": "2.3.1"}

    def found(name):
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setattr(versions, "commit", lambda: "0123456789abcdef0123456789abcdef01234567-dirty")
    monkeypatch.setattr(sys, "argv", ["moeport", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first == f"moeport {VERSION} (commit 0123456789ab, changed since)"
    assert second == f"Python {platform.python_version()}, {platform.platform()}"
    assert sorted(others) == ["mindspore not installed", "numpy 2.3.1", "torch 2.13.0+cpu", "torch-npu not installed"]


@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("rest", [("extra",), ("train", "c.yaml"), ("--bogus",), ("--help",)], ids=" ".join)
def test_nothing_may_stand_behind_an_option_that_ends_moeport(capsys, monkeypatch, option, rest):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["moeport", option, *rest])
    with pytest.raises(SystemExit) as ended:
        main()
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert f"{option} takes no arguments; received {' '.join(rest)}" in error


def test_no_other_option_of_moeport_ends_it():
    """Of those with a callback of click's, which runs before the rest of the line is looked at."""
    assert {*ALONE} == {option.opts[0] for option in whole_command().params if option.callback}


def test_the_versions_are_those_of_the_frameworks_and_none_is_imported():
    program = """
import sys
from moeport.cli.main import ALONE, main, whole_command
sys.argv = ["moeport", "--version"]
try:
    main()
finally:
    print(sorted({"torch", "mindspore", "torch_npu", "numpy"} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert f"numpy {metadata.version('numpy')}" in lines


@pytest.mark.skipif(GIT is None, reason="git is not installed")
class TestCheckout:
    def test_the_commit_is_that_of_git(self, checkout):
        assert version.of_checkout(checkout) == git(checkout, "rev-parse", "HEAD")

    def test_a_tag_is_not_taken_for_the_commit(self, checkout):
        git(checkout, "tag", "-a", "v0.1.0", "-m", "Version 0.1.0")
        assert version.of_checkout(checkout) == git(checkout, "rev-parse", "HEAD")

    def test_changes_of_tracked_files_count_and_others_do_not(self, checkout):
        (checkout / "new").write_text("a")
        assert version.of_checkout(checkout) == git(checkout, "rev-parse", "HEAD")
        (checkout / "file").write_text("b")
        assert version.of_checkout(checkout) == git(checkout, "rev-parse", "HEAD") + "-dirty"

    def test_inside_a_hook_of_another_repository_it_is_still_that_of_the_folder(self, checkout, tmp_path, monkeypatch):
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
        assert version.of_checkout(checkout) == git(checkout, "rev-parse", "HEAD")

    def test_a_folder_inside_a_checkout_has_no_commit(self, checkout):
        (checkout / "inner").mkdir()
        assert version.of_checkout(checkout / "inner") is None


def test_where_git_is_missing_or_fails_the_commit_is_unknown(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    assert version.of_checkout(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert version.of_checkout(tmp_path) is None
    monkeypatch.setattr(version, "__file__", str(tmp_path / "moeport/version.py"))
    assert versions.text().splitlines()[0] == f"moeport {VERSION} (commit unknown)"


def test_what_a_build_has_written_comes_first(tmp_path, monkeypatch):
    (tmp_path / COMMIT_FILE).write_text("a" * 40 + "\n")
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    assert version.commit() == "a" * 40
