"""A machine without the optional packages collects every test, and says what it skips and why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optional import PACKAGES

ROOT = Path(__file__).parents[1]


def collected(missing, *arguments):
    return ran(missing, "--collect-only", *arguments)


def ran(missing, *arguments):
    path = os.pathsep.join([str(ROOT / "tests" / "without"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "MOEPORT_WITHOUT": ",".join(missing)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "kept", [pytest.param((), id="none", marks=pytest.mark.slow), pytest.param(("torch",), id="torch alone")]
)
def test_all_is_collected_with(kept):
    missing = [package for package in PACKAGES if package not in kept]
    code, output = collected(missing)
    assert code == 0, output[-3000:]
    assert "the whole file needs lm_eval, which is not installed" in output
    assert ("tests/torch_moe/test_layer.py::" in output) == ("torch" in kept)
    assert ("the whole file needs torch, which is not installed" in output) == ("torch" not in kept)


def test_what_is_missing_and_not_optional_is_an_error(tmp_path):
    (tmp_path / "test_a.py").write_text("import jinja2\n")
    (tmp_path / "test_b.py").write_text("import matplotlib\n")
    plugin = ("-p", "tests.optional", "--rootdir", str(tmp_path), "-c", os.devnull)
    code, output = collected(["jinja2", "matplotlib"], *plugin, str(tmp_path))
    assert code == 2
    assert "ERROR" in output
    assert "No module named 'jinja2'" in output
    assert "No module named 'matplotlib'" not in output


def test_a_test_that_fails_without_pytorch_is_skipped_and_any_other_is_not(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "test_it.py").write_text(
        "import pytest, subprocess, sys\n"
        "def test_a(): import torch; assert 0\n"
        "@pytest.fixture\n"
        "def fixed(): raise ValueError('x needs torch, which is not installed; install it')\n"
        "def test_b(fixed): pass\n"
        "def test_c(): assert not subprocess.run([sys.executable, '-c', 'import torch; torch.no']).returncode\n"
        "def test_d(): import json; assert 0\n"
        "def test_e(): raise ValueError('x needs torch')\n"
        "def test_f(): raise ValueError('x needs wandb, which is not installed')\n"
    )
    plugin = ("-p", "tests.optional", "--rootdir", str(tmp_path), "-c", os.devnull, "-rs", str(tmp_path))
    code, output = ran(["torch", "wandb"], *plugin)
    assert code == 1
    assert "3 failed, 3 skipped" in output
    assert "needs torch, which is not installed" in output
    code, output = ran(["wandb"], *plugin)
    assert code == 1
    assert "5 failed, 1 error" in output
