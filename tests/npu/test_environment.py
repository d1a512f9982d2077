"""What the real torch_npu does without CANN or with contradictory variables, and how moeport explains it."""

import json
import os
import subprocess
import sys

import pytest

from moeport.ascend import trouble
from moeport.ascend.checks import findings
from moeport.ascend.installed import machine
from moeport.ascend.table import DETERMINISM
from moeport.ascend.trouble import refuse_broken
from moeport.backends import examine, get_backend
from moeport.backends.doctor import FRAMEWORKS, Package, describe
from moeport.config.training import BackendConfig
from moeport.errors import BackendUnavailableError
from moeport.facts import BACKENDS
from tests.training.tiny import tiny_values

NO_CANN = "torch-npu 2.13.0 is installed, but CANN is not in effect: libhccl.so is not found"
MEND = "install CANN and source its set_env.sh, or do without NPUs: TORCH_DEVICE_BACKEND_AUTOLOAD=0"
USE = "import torch; torch.ones(4).npu()"


@pytest.fixture
def no_cann(monkeypatch):
    """Processes start without the stand-in."""
    monkeypatch.delenv("MOEPORT_FAKE_CANN", raising=False)
    monkeypatch.delenv(trouble.AUTOLOAD, raising=False)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_cann_the_layer_says_so(no_cann):
    done = run("import moeport.torch")
    assert done.stderr.splitlines()[-1].endswith(f"BackendUnavailableError: PyTorch does not start: {NO_CANN}; {MEND}")
    assert done.returncode == 1


def test_without_cann_no_launcher_is_started(no_cann):
    with pytest.raises(BackendUnavailableError, match="CANN is not in effect"):
        refuse_broken(BACKENDS["torch"].extensions)


def test_without_cann_doctor_says_so(no_cann):
    npu = describe(FRAMEWORKS["torch_npu"])
    assert (npu["problem"], npu["note"], npu["install"]) == (NO_CANN, MEND, None)


@pytest.mark.slow
def test_without_cann_doctor_reports_what_pytorch_can_do(no_cann):
    torch = describe(Package("training", "torch", "pip install", backend="torch", extensions=("torch-npu",)))
    assert (torch["problem"], torch["note"], torch["install"]) == (NO_CANN, MEND, None)
    assert torch["without_npus"]
    assert torch["devices"]["cpu"]["dtypes"]["float32"]["usable"]


CONTRADICTIONS = {
    "both names of the allocator": (
        {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_ALLOC_CONF": "x:1"},
        "RuntimeError: Both PYTORCH_NPU_ALLOC_CONF and",
    ),
    "options of the allocator": (
        {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"},
        "cannot be enabled with",
    ),
}
"""By name, variables, and what torch_npu says to them."""


@pytest.mark.parametrize(("variables", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_the_doctor_calls_wrong_torch_npu_refuses(monkeypatch, variables, message):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert [each.severity for each in findings(machine()) if "ALLOC_CONF" in each.subject] == ["wrong"]
    done = run(USE)
    assert done.returncode == 1
    assert message in done.stderr


def test_switches_of_determinism_are_set_and_versions_recorded(monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name not in DETERMINISM}
    monkeypatch.setattr(os, "environ", environment | {"LCCL_DETERMINISTIC": "0"})
    backend = get_backend(BackendConfig(name="torch", device="npu"))
    assert {name: os.environ[name] for name in DETERMINISM} == {**DETERMINISM, "LCCL_DETERMINISTIC": "0"}
    assert backend.versions()["torch_npu"] == "2.13.0"
    assert "torch_npu" not in get_backend(BackendConfig(name="torch", device="cpu")).versions()


def test_doctor_tries_the_npu():
    found = examine.examine("torch", "torch")["devices"]["npu"]
    assert found["description"] == "npu (Ascend910B2)"
    assert [unit["name"] for unit in found["units"]] == ["Ascend910B2"] * 2
    assert all(dtype["usable"] for dtype in found["dtypes"].values())


@pytest.mark.slow
def test_a_launched_job_trains_on_two_npus(tmp_path):
    """By the command; what it sets reaches the ranks, and the summary names what changes results."""
    values = tiny_values(tmp_path, backend={"device": "npu"}, training={"steps": 2, "evaluation_interval": 2})
    (tmp_path / "tiny.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "moeport", "launch", "tiny.yaml", "--ranks-per-node", "2", "--run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"] == "npu (Ascend910B2)"
    assert summary["environment"].items() >= DETERMINISM.items()
    assert "ranks       2 on 1 node" in done.stdout
