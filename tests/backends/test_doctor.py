import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from moeport.ascend import installed, trouble
from moeport.backends import doctor, examine, get_backend
from moeport.backends.doctor import FRAMEWORKS, OPTIONAL, Package, describe, render, report
from moeport.config.training import BackendConfig
from moeport.core.ops import FLOAT_DTYPES, KERNELS
from moeport.facts import BACKENDS
from moeport.version import VERSION, commit


@pytest.fixture(scope="module")
def found():
    return report()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a module of that name before the installed ones."""

    def make(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return describe(Package("testing", name, f"pip install {name}"))

    return make


def printed(entry):
    text = io.StringIO()
    Console(file=text, width=200).print(render(entry))
    return text.getvalue()


def test_the_report_is_json_and_names_everything(found):
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [
        *("moeport", "commit", "python", "platform", "cpu", "accelerators_seen"),
        *("backends", "packages", "ascend", "network", "storage"),
    ]
    assert found["commit"] == commit()
    assert list(found["backends"]) == ["torch", "mindspore", "numpy", "torch_npu"]
    assert list(found["packages"]) == list(OPTIONAL)
    assert found["cpu"]["usable_cores"] >= 1
    assert found["cpu"]["memory_bytes"] > 2**28
    assert found["cpu"]["model"]
    assert found["cpu"]["settings"]["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
    assert found["storage"]["cache_free_bytes"] > 0


def test_the_numpy_backend(found):
    entry = found["backends"]["numpy"]
    assert entry["version"] == np.__version__
    assert entry["problem"] is None
    assert (entry["trains"], entry["divides"]) == (False, [])
    dtypes = entry["devices"]["cpu"]["dtypes"]
    assert [dtype for dtype in FLOAT_DTYPES if dtypes[dtype]["usable"]] == ["float32", "float64"]
    assert "numpy has no bfloat16" in dtypes["bfloat16"]["problem"]
    assert dtypes["float32"]["kernels"].keys() >= set(KERNELS)
    assert entry["devices"]["cpu"]["bfloat16_over_float32"] is None


def test_the_torch_backend(found):
    torch = pytest.importorskip("torch")
    entry = found["backends"]["torch"]
    assert entry["version"] == torch.__version__
    assert entry["install"] is None
    assert entry["trains"] is True
    assert entry["divides"] == ["parameters", "gradients", "moments"]
    assert entry["threads"] == str(torch.get_num_threads())
    assert entry["communication"]["gloo"]
    assert set(entry["communication"]) == {"gloo", "nccl", "mpi", "hccl"}
    cpu = entry["devices"]["cpu"]
    assert cpu["description"].startswith("cpu (")
    assert all(cpu["dtypes"][dtype]["usable"] for dtype in FLOAT_DTYPES)
    expected = get_backend(BackendConfig(name="torch", device="cpu")).kernel_choices()
    assert cpu["dtypes"]["float32"]["kernels"] == expected
    speeds = {dtype: cpu["dtypes"][dtype]["matmul_flops_per_second"] for dtype in FLOAT_DTYPES}
    assert cpu["bfloat16_over_float32"] == pytest.approx(speeds["bfloat16"] / speeds["float32"], abs=0.006)


@pytest.mark.cuda
def test_a_gpu_is_tried_too(found):
    device = found["backends"]["torch"]["devices"]["cuda"]
    assert device["units"][0]["memory_bytes"] > 2**30
    assert device["units"][0]["name"] in device["description"]
    assert device["dtypes"]["bfloat16"]["usable"]


def test_accelerators_are_listed_with_their_memory(monkeypatch):
    torch = pytest.importorskip("torch")
    from moeport.backends.torch.device import accelerators

    units = [SimpleNamespace(name="Ascend910B", total_memory=2**36), SimpleNamespace(name="other")]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(units))
    module = SimpleNamespace(get_device_properties=units.__getitem__)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert accelerators() == [("Ascend910B", 2**36), ("other", None)]


def test_what_was_not_run_on_hardware_is_said(found):
    assert found["backends"]["torch_npu"]["note"] == "not run on hardware"
    assert "not run on hardware" in printed(found)


def test_what_is_known_of_ascend_is_in_the_report(found):
    assert found["ascend"].keys() >= {"present", "cann", "driver", "firmware", "smi", "packages", "findings"}
    wrong = {"severity": "wrong", "subject": "CANN", "problem": "none is found", "mend": "install it"}
    entry = found["ascend"] | {"present": True, "findings": [wrong]}
    assert "wrong: CANN: none is found; install it" in printed(found | {"ascend": entry})
    nothing = found["ascend"] | {"present": False, "findings": []}
    assert "firmware" not in printed(found | {"ascend": nothing})


def test_the_printed_report(found):
    text = printed(found | {"commit": "0123456789abcdef-dirty"})
    assert text.startswith(f"moeport {VERSION} (commit 0123456789ab, changed since)\n")
    assert printed(found | {"commit": None}).startswith(f"moeport {VERSION} (commit unknown)\n")
    assert "numpy (reference, forward only)" in text
    assert "forward only: evaluates, does not train" in text
    assert "default composition: the reference has no fused kernels" in text
    assert "TFLOP/s in a matrix product" in text


def test_the_machine_is_printed(found):
    network = {
        "interfaces": [
            {"name": "eth0", "address": "10.0.0.2", "up": True, "mbit_per_second": 25000},
            {"name": "ib0", "address": None, "up": False, "mbit_per_second": None},
        ],
        "chosen": {"GLOO_SOCKET_IFNAME": "eth0"},
        "launchers": {"torchrun": "/bin/torchrun", "msrun": None, "srun": "/bin/srun"},
        "emulation": {"problem": "this machine cannot emulate a cluster; missing are\n  root"},
    }
    cpu = found["cpu"] | {"model": "Some CPU", "bfloat16_units": False, "load": 3.5, "settings": {"OMP_X": "1"}}
    storage = {"cache": "/c", "cache_free_bytes": 2**31, "here_free_bytes": 2**30, "cache_problem": "/c: cannot"}
    changed = {"network": network, "cpu": cpu, "storage": storage, "accelerators_seen": ["NVIDIA H100", "NVIDIA H100"]}
    lines = [line.strip() for line in printed(found | changed).splitlines()]
    for line in (
        "Some CPU, without bfloat16 units",
        "set: OMP_X=1",
        "accelerators that the system lists: NVIDIA H100, NVIDIA H100",
        "cache /c, 2.0 GiB free: /c: cannot",
        "current folder: 1.0 GiB free",
        "eth0: 10.0.0.2, 25,000 Mbit/s",
        "ib0: no IPv4 address, down",
        "GLOO_SOCKET_IFNAME=eth0",
        "launchers: torchrun, srun",
        "moeport emulate: this machine cannot emulate a cluster; missing are root",
    ):
        assert line in lines
    assert any(", load 3.5, " in line for line in lines)


def test_a_missing_package_comes_with_the_command_that_installs_it(found):
    entry = describe(Package("testing", "no_such_package", "pip install 'moeport[torch]'"))
    assert entry == {
        "purpose": "testing",
        "installed": False,
        "version": None,
        "problem": None,
        "install": "pip install 'moeport[torch]'",
        "note": None,
    }
    assert "(testing): not installed; install it with: pip install 'moeport[torch]'" in printed(
        found | {"backends": {"torch": entry}}
    )


def test_commands():
    assert FRAMEWORKS["torch"].install == "pip install 'moeport[torch]'"
    assert {name: package.install for name, package in OPTIONAL.items()} == {
        "datasets": "pip install 'moeport[data]'",
        "zstandard": "pip install 'moeport[data]'",
        "scikit-learn": "pip install 'moeport[vision]'",
        "matplotlib": "pip install 'moeport[plot]'",
        "tensorboard": "pip install 'moeport[tensorboard]'",
        "wandb": "pip install 'moeport[wandb]'",
        "mlflow": "pip install 'moeport[mlflow]'",
        "swanlab": "pip install 'moeport[swanlab]'",
        "lm_eval": "pip install 'moeport[eval]'",
    }


def test_a_folder_without_code_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "empty_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not describe(Package("testing", "empty_folder"))["installed"]


def test_a_package_that_works(fake):
    entry = fake("healthy", "__version__ = '1.2.3'")
    assert (entry["installed"], entry["version"], entry["problem"], entry["install"]) == (True, "1.2.3", None, None)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "raise ImportError('libtorch_cpu.so: undefined symbol')",
            "installed but fails to import: ImportError: libtorch_cpu.so: undefined symbol",
        ),
        (
            "import no_such_dependency",
            "installed but fails to import: ModuleNotFoundError: No module named 'no_such_dependency'",
        ),
        ("raise OSError(127, 'driver')", "installed but fails to import: OSError: [Errno 127] driver"),
        (
            "import os, sys; sys.stderr.write('no AVX2\\n'); os.abort()",
            "ends the process that imports it, SIGABRT: no AVX2",
        ),
        ("import sys; sys.exit(0)", "ends the process that imports it, exit code 0"),
        ("import sys; sys.exit('no licence')", "ends the process that imports it, exit code 1: no licence"),
    ],
)
def test_a_broken_package_is_reported_with_its_message(fake, found, source, problem):
    entry = fake("broken", source)
    assert entry["installed"]
    assert entry["problem"] == problem
    assert entry["install"] == "pip install broken"
    assert problem in printed(found | {"backends": {"torch": entry}})


BROKEN_BY_TORCH_NPU = """if True:
    import os
    __version__ = "2.12.0+cu130"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        os.write(2, b"what():  Duplicated key 'x' found\\nframe #0: c10::Error")
        os.abort()"""


def test_pytorch_that_torch_npu_keeps_from_starting_is_examined_without_it(tmp_path, monkeypatch, found):
    """The sentence says which build to install, and the table what works with the environment variable."""
    packages = {
        "torch": installed.Package("2.12.0+cu130"),
        "torch-npu": installed.Package("2.12.0", ("torch==2.12.0",)),
    }
    machine = installed.Machine((), None, None, None, (), packages, "13.0", {})
    monkeypatch.setattr(doctor, "explained", lambda text: trouble.explained(text, machine))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    (tmp_path / "torch.py").write_text(BROKEN_BY_TORCH_NPU)
    monkeypatch.syspath_prepend(tmp_path)
    entry = describe(Package("training", "torch", "pip install", backend="numpy", extensions=("torch-npu",)))
    assert entry["problem"] == (
        "torch-npu 2.12.0 does not work beside torch 2.12.0+cu130, which is a build for CUDA 13.0"
    )
    assert entry["install"] is None
    assert entry["note"].startswith("install the build that goes with it: pip install torch==2.12.0+cpu --index-url ")
    assert entry["without_npus"]
    assert entry["devices"]["cpu"]["dtypes"]["float32"]["usable"]
    text = printed(found | {"backends": {"torch": entry}})
    assert "2.12.0+cu130; torch-npu 2.12.0 does not work beside" in text
    assert "with TORCH_DEVICE_BACKEND_AUTOLOAD=0, so without NPUs:" in text
    assert "install it with" not in text.partition("Optional packages")[0]


def test_an_accelerator_on_which_every_type_fails_has_its_name(monkeypatch):
    """Not that of the config's `auto`."""

    def pretended(config):
        backend = get_backend(config.model_copy(update={"device": "cpu"}))
        backend.device = "npu (Ascend910B3)" if config.device == "auto" else "cpu"
        return backend

    def fail(backend):
        if backend.device != "cpu":
            raise RuntimeError("no kernel for this chip")

    monkeypatch.setattr(examine, "get_backend", pretended)
    monkeypatch.setattr(examine, "run_tiny_model", fail)
    device = examine.examine("numpy", "numpy")["devices"]["npu"]
    assert device["description"] == "npu (Ascend910B3)"
    assert not any(dtype["usable"] for dtype in device["dtypes"].values())


def test_a_package_that_hangs(fake, monkeypatch):
    monkeypatch.setattr(doctor, "TIME_LIMIT", 1)
    assert fake("hangs", "import time; time.sleep(60)")["problem"] == "does not answer within 1 s"


def test_output_of_a_package_does_not_disturb(fake):
    assert fake("chatty", "print('{\"hello\": 1}'); __version__ = '1'")["version"] == "1"


def test_a_type_that_fails_is_reported_and_the_others_are_tried(monkeypatch):
    run = examine.run_tiny_model

    def fail(backend):
        if backend.dtype == "float64":
            raise RuntimeError("no double precision")
        run(backend)

    monkeypatch.setattr(examine, "run_tiny_model", fail)
    dtypes = examine.examine("numpy", "numpy")["devices"]["cpu"]["dtypes"]
    assert dtypes["float32"]["usable"]
    assert dtypes["float64"] == {"usable": False, "problem": "RuntimeError: no double precision"}


def test_the_command_survives_broken_packages(tmp_path):
    for module in ("torch", "mindspore", *(package.module for package in OPTIONAL.values())):
        name = module.partition(".")[0]
        (tmp_path / f"{name}.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    done = subprocess.run(
        [sys.executable, "-m", "moeport", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)["backends"]["torch"]
    assert entry["problem"] == (
        "installed but fails to import: ImportError: libcudart.so.13: cannot open shared object"
    )
    assert entry["install"] == "pip install 'moeport[torch]'"


def test_the_doctor_imports_no_framework():
    code = "import sys; import moeport.backends.doctor; assert not {'torch', 'mindspore', 'datasets'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_imports_no_other_framework(name):
    facts = BACKENDS[name]
    pytest.importorskip(facts.framework)
    others = {other.framework for other in BACKENDS.values()} - {facts.framework, "numpy"}
    code = f"import sys, {facts.module}; assert not {others} & {{*sys.modules}}, {others} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mindspore_is_fine_where_torch_is_missing():
    """On the CPU, and on an accelerator that the process is made to see; the tiny model is tried elsewhere."""
    pytest.importorskip("mindspore")
    code = """if True:
        import json, sys
        sys.modules["torch"] = None  # an import of it raises ModuleNotFoundError
        from types import SimpleNamespace
        import mindspore
        from mindspore.device_context import ascend
        from moeport.backends import examine, get_backend

        def pretended(config):
            backend = get_backend(config.model_copy(update={"device": "cpu"}))
            if config.device == "auto":
                backend.device = "npu (Ascend910B)"
            return backend

        examine.get_backend, examine.run_tiny_model = pretended, lambda backend: None
        ascend.is_available, ascend.device_count = lambda: True, lambda: 2
        mindspore.hal.get_device_name = lambda index: f"Ascend910B number {index}"
        mindspore.hal.get_device_properties = lambda index: SimpleNamespace(total_memory=2**36)
        print(json.dumps(examine.examine("mindspore", "mindspore")))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout.splitlines()[-1])
    assert entry["problem"] is None
    assert entry["devices"]["cpu"]["dtypes"]["float32"]["usable"]
    assert entry["devices"]["npu"]["units"] == [
        {"name": f"Ascend910B number {index}", "memory_bytes": 2**36} for index in range(2)
    ]
