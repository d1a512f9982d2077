"""What torch-npu does to `import torch` is explained in one sentence, also where it ends the process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import moeport
from moeport.ascend import trouble
from moeport.ascend.installed import Machine, Package
from moeport.ascend.trouble import explained, guarded, messages, refuse_broken
from moeport.errors import BackendUnavailableError
from moeport.facts import BACKENDS
from tests.ascend.machines import TORCH, TORCH_NPU, write
from tests.training.tiny import tiny_values

PIP = "pip install torch==2.12.0+cpu --index-url https://download.pytorch.org/whl/cpu"
TORCH_EXTENSIONS = BACKENDS["torch"].extensions
WITHOUT = "or do without NPUs: TORCH_DEVICE_BACKEND_AUTOLOAD=0"
MACHINE = Machine((), None, None, None, (), {"torch": TORCH, "torch-npu": TORCH_NPU}, None, {})
AUTOLOAD = "RuntimeError: Failed to load the backend extension: torch_npu. You can disable extension auto-loading"
DUPLICATED = (
    "terminate called after throwing an instance of 'c10::Error'\\n  what():  Duplicated key "
    "'pinned_reserve_segment_size_mb' found in device-specific configuration parser hook registration\\n"
    "Exception raised from registerDeviceConfigParserHook\\nframe #0: c10::Error::Error"
)


@pytest.fixture(autouse=True)
def x86(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_no_cann():
    text = f"{AUTOLOAD}\nImportError: libhccl.so: cannot open shared object file: No such file or directory"
    assert str(explained(text, MACHINE)) == (
        "torch-npu 2.12.0.post3 is installed, but CANN is not in effect: libhccl.so is not found; "
        f"install CANN and source its set_env.sh, {WITHOUT}"
    )


def test_a_build_for_cuda():
    packages = {"torch": Package("2.12.0+cu130"), "torch-npu": TORCH_NPU}
    machine = replace(MACHINE, packages=packages, torch_cuda="13.0")
    expected = (
        "torch-npu 2.12.0.post3 does not work beside torch 2.12.0+cu130, which is a build for CUDA 13.0; "
        f"install the build that goes with it: {PIP}, {WITHOUT}"
    )
    assert str(explained(DUPLICATED, machine)) == expected
    assert (
        str(explained(f"{AUTOLOAD}\nRuntimeError: Two accelerators cannot be used at the same time", machine))
        == expected
    )


def test_another_torch():
    machine = replace(MACHINE, packages={"torch": Package("2.13.0+cpu"), "torch-npu": TORCH_NPU})
    text = f"{AUTOLOAD}\nImportError: torch_npu/lib/libtorch_npu.so: undefined symbol: _ZN3c10"
    assert str(explained(text, machine)) == (
        f"torch-npu 2.12.0.post3 is for torch 2.12.0, and this is torch 2.13.0+cpu; {PIP}, {WITHOUT}"
    )


def test_anything_else_of_torch_npu_is_passed_on():
    assert str(explained(f"{AUTOLOAD}\nImportError: something new\n", MACHINE)) == (
        f"torch-npu 2.12.0.post3 does not load: ImportError: something new; see moeport doctor, {WITHOUT}"
    )


@pytest.mark.parametrize("text", ["ImportError: libcudart.so.13: cannot open shared object file", ""])
def test_what_torch_npu_has_no_part_in(text):
    assert explained(text, MACHINE) is None


def test_without_torch_npu_nothing_is_explained():
    assert explained(AUTOLOAD, replace(MACHINE, packages={"torch": TORCH})) is None


def test_messages_of_the_errors_that_led_to_one():
    error = ImportError("second")
    error.__cause__ = OSError("first")
    assert messages(error) == "ImportError: second\nOSError: first"


def test_other_errors_pass_the_guard():
    with pytest.raises(RuntimeError, match="ours"), guarded("torch", TORCH_EXTENSIONS):
        raise RuntimeError("ours")
    with pytest.raises(ModuleNotFoundError, match="nothing"), guarded("mindspore", ()):
        raise ModuleNotFoundError("nothing")


@pytest.fixture
def site(tmp_path):
    """A folder of packages: torch-npu 2.12.0, and a torch that does at import what `broken` says."""

    def make(broken, cuda=None):
        version = "2.12.0+cu130" if cuda else "2.12.0+cpu"
        source = f"import os, sys\nif os.environ.get('{trouble.AUTOLOAD}') != '0':\n    {broken}\n"
        write(tmp_path, "torch/__init__.py", source)
        write(tmp_path, "torch/version.py", f"cuda = {cuda!r}\n")
        wanted = "2.12.0\nRequires-Dist: torch==2.12.0"
        for folder, text in {f"torch-{version}": version, "torch_npu-2.12.0": wanted}.items():
            metadata = f"Metadata-Version: 2.1\nName: {folder.partition('-')[0]}\nVersion: {text}\n"
            write(tmp_path, f"{folder}.dist-info/METADATA", metadata)
        return tmp_path

    return make


ABORTS = f"sys.stderr.write('{DUPLICATED}'); sys.stderr.flush(); os.abort()"
ABORTED = (
    "PyTorch does not start: torch-npu 2.12.0 does not work beside torch 2.12.0+cu130, which is a build for CUDA 13.0; "
    "install the build that goes with it: pip install torch==2.12.0"
)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "moeport", "train", "tiny.yaml"),
        ("-m", "moeport", "parity", "record", "tiny.yaml", "-o", "bundle"),
        ("-c", "import moeport.torch"),
    ],
)
def test_a_process_that_torch_npu_would_end_says_why(site, command):
    folder = site(ABORTS, cuda="13.0")
    write(folder, "tiny.yaml", json.dumps(tiny_values(folder)))
    path = os.pathsep.join((str(folder), str(Path(moeport.__file__).parents[1])))
    env = {name: value for name, value in os.environ.items() if name != trouble.AUTOLOAD} | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    assert ABORTED in done.stderr
    assert done.returncode == (2 if "moeport" in command else 1)


def test_without_autoload_nothing_is_tried(site, monkeypatch):
    monkeypatch.setenv(trouble.AUTOLOAD, "0")
    monkeypatch.setattr(trouble, "_try", lambda: pytest.fail("tried"))
    refuse_broken(TORCH_EXTENSIONS)
    with guarded("torch", TORCH_EXTENSIONS):
        pass


def test_only_torch_is_tried(monkeypatch):
    monkeypatch.setattr(trouble, "_try", lambda: pytest.fail("tried"))
    monkeypatch.setattr(trouble, "package", lambda name: TORCH_NPU)
    refuse_broken(BACKENDS["mindspore"].extensions)


def test_a_trial_that_says_nothing_of_torch_npu_refuses_nothing(site, monkeypatch):
    monkeypatch.delenv(trouble.AUTOLOAD, raising=False)
    monkeypatch.syspath_prepend(site("raise ImportError('libgomp.so')"))
    refuse_broken(TORCH_EXTENSIONS)


def test_a_trial_that_fails_refuses(site, monkeypatch):
    monkeypatch.delenv(trouble.AUTOLOAD, raising=False)
    missing = "torch_npu: libhccl.so: cannot open shared object file"
    monkeypatch.syspath_prepend(site(f"raise RuntimeError('{missing}')"))
    with pytest.raises(BackendUnavailableError, match=r"CANN is not in effect: libhccl\.so is not found"):
        refuse_broken(TORCH_EXTENSIONS)
