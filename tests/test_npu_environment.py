"""Where torch_npu cannot be had, `make test-npu` says so in a line, and its tests are skipped."""

import importlib.util
import re
import sys

import pytest

from tests.npu import environment


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ".ok").touch()  # of an earlier time
    return tmp_path


def said(folder, capfd, *options):
    environment.main(folder, *options)
    assert not (folder / ".ok").exists()
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("torch_npu 2.13.0 is not tested here: ")
    return line


def test_another_system(folder, capfd, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert said(folder, capfd).endswith("it exists for Linux only (this is darwin)")


def test_no_torch(folder, capfd, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said(folder, capfd).endswith("PyTorch is not installed")


@pytest.mark.parametrize(
    ("version", "cuda", "end"),
    [
        ("2.12.1+cpu", None, "it goes with PyTorch 2.13 (this is 2.12.1+cpu)"),
        ("2.13.0+cu130", "13.0", f"+cpu PIP_INSTALL_OPTIONS='--extra-index-url {environment.CPU_BUILDS}'"),
    ],
)
def test_another_torch(folder, capfd, monkeypatch, tmp_path, version, cuda, end):
    (tmp_path / "version.py").write_text(f"__version__, cuda = {version!r}, {cuda!r}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(environment, "package", lambda name: tmp_path)
    assert said(folder, capfd).endswith(end)


def test_no_compiler(folder, capfd, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(environment, "package", lambda name: folder)
    (folder / "version.py").write_text("__version__, cuda = '2.13.0+cpu', None")
    monkeypatch.setenv("PATH", "")
    assert said(folder, capfd).endswith("the stand-in for CANN needs gcc and nm")


def test_no_wheel(folder, capfd, monkeypatch):
    monkeypatch.setattr(environment, "unfit", lambda: "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    line = said(folder, capfd, "--no-index")
    assert "pip cannot install it" in line
    assert "torch-npu==2.13.0" in line


def test_no_test_with_the_mark_is_left_out():
    """`make test-npu` runs the folders of NPU_TESTS; a test elsewhere that has the mark would never run."""
    makefile = (environment.ROOT / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^NPU_TESTS := (.+)$", makefile, re.MULTILINE)
    folders = [environment.ROOT / folder for folder in listed.split()]
    files = (environment.ROOT / "tests").rglob("*.py")
    marked = [path for path in files if "pytest.mark." + "npu" in path.read_text(encoding="utf-8")]
    assert environment.ROOT / "tests/npu" in folders
    assert [path for path in marked if not any(path.is_relative_to(folder) for folder in folders)] == []
