"""The table of what was run where names every backend, the releases that the tests install, and commits that exist."""

import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest

from moeport.facts import BACKENDS
from tests.npu.environment import VERSION as TORCH_NPU

ROOT = Path(__file__).parents[2]
DEFINED = runpy.run_path(str(ROOT / "docs" / "generate" / "platforms.py"))
PLATFORMS, NOT_RUN = DEFINED["PLATFORMS"], DEFINED["NOT_RUN"]


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_has_every_device_of_every_backend():
    assert sorted(PLATFORMS) == sorted((name, device) for name, facts in BACKENDS.items() for device in facts.devices)


def test_a_backend_that_does_not_train_says_so():
    for (name, _), each in PLATFORMS.items():
        assert BACKENDS[name].trains != each.state.startswith("forward only")


def test_every_accelerator_says_what_was_not_run_on_it():
    for (_, device), each in PLATFORMS.items():
        assert (NOT_RUN in each.hardware) == (device != "cpu")


def test_releases_are_those_that_the_tests_install():
    (torch,) = re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (mindspore,) = re.findall(r"^mindspore==(\S+?);", "\n".join(extras["mindspore"]), re.MULTILINE)
    installed = {("torch", "cpu"): torch, ("mindspore", "cpu"): mindspore, ("torch", "npu"): TORCH_NPU}
    for at, each in PLATFORMS.items():
        assert re.findall(r"\d+\.\d+(?:\.\d+)?", each.tests) == ([installed[at]] if at in installed else [])


def test_commits_of_hardware_runs_exist():
    named = [commit for each in PLATFORMS.values() for commit in re.findall(r"commit (\w+)", each.hardware)]
    assert named
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("the history of the repository is not here")
    assert [commit for commit in named if git("cat-file", "-e", f"{commit}^{{commit}}").returncode] == []
