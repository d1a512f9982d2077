"""The sdist, and the wheel that is built from it, installed in a folder of its own and used outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from moeport.version import VERSION
from tests.training.tiny import tiny_values

REPOSITORY = Path(__file__).parent.parent
GIT = shutil.which("git")
LEFT_BEHIND = (
    *(".git", ".venv*", "build", "dist", "site", "*.egg-info", "__pycache__", ".*_cache", "runs", "commit.txt"),
    *("PKG-INFO", "setup.cfg"),
)
"""What is in a folder in which somebody works, and in no commit."""
MADE = ("PKG-INFO", "setup.cfg", "moeport.egg-info/")
"""What the build adds to an sdist."""


def run(*command, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # those of a hook
    done = subprocess.run(command, capture_output=True, text=True, **{"env": environment, **options})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def source(folder):
    """A copy of the repository."""
    shutil.copytree(REPOSITORY, folder / "source", ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    return folder / "source"


@pytest.fixture(scope="module")
def tracked(source):
    """The files of the repository; the copy then gets some that are not, and a commit if git is there."""
    found = files(source)
    for name in ("runs/a/metrics.jsonl", "examples/runs/b.txt", "tests/__pycache__/a.pyc", "moeport/__pycache__/a.pyc"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("left behind")
    if GIT:
        git = (GIT, "-C", source, "-c", "user.name=A", "-c", "user.email=a@b.example")
        run(*git, "init", "--quiet")
        run(*git, "add", "README.md")
        run(*git, "commit", "--quiet", "--message", "One")
    return found


@pytest.fixture(scope="module")
def sdist(folder, source, tracked):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)
    return folder / f"moeport-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def installed(folder, sdist):
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, sdist)
    (wheel,) = folder.glob("moeport-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", folder / "site", wheel)
    return folder / "site"


@pytest.fixture
def options(installed, tmp_path):
    """Those of a process outside the repository that uses the installed package."""
    return {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}}


def test_the_wheel_trains_reports_and_generates_outside_the_repository(installed, tmp_path, options):
    place = run(sys.executable, "-c", "import moeport; print(moeport.__file__)", **options)
    assert Path(place.strip()).is_relative_to(installed)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_values(tmp_path, metrics={"report": True})))
    output = run(sys.executable, "-m", "moeport", "train", config, **options)
    assert "bits per byte" in output
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    assert run(sys.executable, "-m", "moeport", "generate", tmp_path / "run", "--prompt", "def", **options)


def test_the_sdist_holds_all_files_of_the_repository_and_nothing_else(sdist, tracked):
    root = f"moeport-{VERSION}/"
    with tarfile.open(sdist) as archive:
        found = {member.name.removeprefix(root) for member in archive if member.isfile()}
    added = {name for name in found if name.startswith(MADE)}
    assert found - added - {"moeport/commit.txt"} == tracked


def test_the_wheel_holds_all_files_of_the_package_and_nothing_else(installed, tracked):
    expected = {name for name in tracked if name.startswith("moeport/")}
    found = {name for name in files(installed) if name.startswith("moeport/")}
    assert found - {"moeport/commit.txt"} == expected
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"moeport", "bin"}


@pytest.mark.skipif(GIT is None, reason="git is not installed")
def test_the_wheel_says_of_which_commit_it_is(source, options):
    commit = run(GIT, "-C", source, "rev-parse", "HEAD").strip()
    first, *_ = run(sys.executable, "-m", "moeport", "--version", **options).splitlines()
    assert first == f"moeport {VERSION} (commit {commit[:12]})"
