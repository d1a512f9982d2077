import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import moeport
from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.core.ops import FLOAT_DTYPES
from moeport.errors import BackendUnavailableError
from moeport.facts import BACKENDS, DEVICES, default_backend, training_backends

ROOT = Path(moeport.__path__[0])
FRAMEWORKS = {facts.framework for facts in BACKENDS.values()} - {"numpy"}
"""Those that moeport itself can do without."""
EVERY_BACKEND = pytest.mark.parametrize("name", BACKENDS)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def modules(node):
    """Modules that an import names."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names]


def outside(*folders):
    """Sources of moeport outside of some of its folders."""
    return [path for path in ROOT.rglob("*.py") if not any(path.is_relative_to(ROOT / folder) for folder in folders)]


def adapter(name):
    """Folder of a backend, from the root of moeport."""
    return Path(*BACKENDS[name].module.split(".")[1:-1])


def test_the_table_is_read_without_a_framework():
    code = f"import sys, moeport.facts; assert not {FRAMEWORKS | {'numpy', 'pydantic'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


@EVERY_BACKEND
def test_a_row_names_its_backend(name):
    pytest.importorskip(BACKENDS[name].framework)
    backend = getattr(importlib.import_module(BACKENDS[name].module), BACKENDS[name].cls)
    assert backend.name == name
    assert (ROOT / adapter(name) / "ops.py").exists()
    assert (ROOT / adapter(name) / "model.py").exists()


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_backend_takes_the_types_of_its_row_on_the_cpu(name, dtype):
    pytest.importorskip(BACKENDS[name].framework)
    config = BackendConfig(name=name, device="cpu", dtype=dtype)
    if dtype in BACKENDS[name].dtypes["cpu"]:
        assert get_backend(config).dtype == dtype
    else:
        with pytest.raises(BackendUnavailableError, match=r"backend\.dtype"):
            get_backend(config)


@EVERY_BACKEND
def test_a_backend_refuses_devices_that_are_not_in_its_row(name):
    pytest.importorskip(BACKENDS[name].framework)
    for device in set(DEVICES) - set(BACKENDS[name].devices):
        with pytest.raises(BackendUnavailableError, match=r"backend\.device"):
            get_backend(BackendConfig(name=name, device=device))


@pytest.mark.parametrize(
    ("launcher", "name"), [("torchrun", "torch"), ("openmpi", "torch"), ("slurm", "torch"), ("msrun", "mindspore")]
)
def test_the_backend_of_a_launcher(launcher, name):
    assert default_backend(launcher) == name


def test_backends_that_train():
    assert training_backends() == ["torch", "mindspore"]


def test_types_on_any_device():
    assert BACKENDS["mindspore"].dtypes_on("cpu") == ("float32", "float64")
    assert BACKENDS["mindspore"].dtypes_on("auto") == ("float32", "bfloat16", "float64")
    assert BACKENDS["numpy"].dtypes_on("auto") == ("float32", "float64")


def test_no_neutral_file_compares_the_name_of_a_backend():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in outside(*map(adapter, BACKENDS))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Compare | ast.MatchValue)
        and any(isinstance(part, ast.Constant) and part.value in BACKENDS for part in ast.walk(node))
    ]
    assert found == []


@EVERY_BACKEND
def test_a_framework_is_imported_by_its_adapter_alone(name):
    framework = BACKENDS[name].framework
    if framework not in FRAMEWORKS:
        pytest.skip(f"moeport itself needs {framework}")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in outside(adapter(name), "torch")  # moeport.torch is the layer for PyTorch users
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(module.partition(".")[0] == framework for module in modules(node))
    ]
    assert found == []
