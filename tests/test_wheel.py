"""The built wheel, installed in a folder of its own and used from outside the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.tiny import tiny_values

REPOSITORY = Path(__file__).parent.parent


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "moeport", source / "moeport", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("moeport-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", folder / "site", wheel)
    return folder / "site"


def test_the_wheel_trains_reports_and_generates_outside_the_repository(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": tmp_path, "env": environment}
    place = run(sys.executable, "-c", "import moeport; print(moeport.__file__)", **options)
    assert Path(place.strip()).is_relative_to(installed)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_values(tmp_path, metrics={"report": True})))
    output = run(sys.executable, "-m", "moeport", "train", config, **options)
    assert "bits per byte" in output
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    assert run(sys.executable, "-m", "moeport", "generate", tmp_path / "run", "--prompt", "def", **options)


def test_the_wheel_holds_all_files_of_the_package_and_nothing_else(installed):
    def files(root):
        return {path.relative_to(root) for path in (root / "moeport").rglob("*") if path.is_file()}

    expected = {path for path in files(REPOSITORY) if "__pycache__" not in path.parts}
    assert files(installed) == expected
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"moeport", "bin"}
