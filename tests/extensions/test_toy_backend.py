"""A backend is a folder and a row in the table of facts; everything else follows."""

import json
import os
from pathlib import Path

import pytest

import moeport
from tests.extensions.copies import Row, extended_copy

REFERENCE = Path(moeport.__path__[0], "backends", "numpy_ref")
NAMES = {"numpy_ref": "toy", "Numpy": "Toy", 'name = "numpy"': 'name = "toy"', '{"numpy": ': '{"toy": '}
ROW = Row(
    "moeport/facts.py",
    "BACKENDS: Mapping[str, BackendFacts] = {",
    """\
    "toy": BackendFacts(
        module="moeport.backends.toy.backend",
        cls="ToyBackend",
        framework="toy_arrays",
        install="pip install toy-arrays",
        purpose="a toy",
        dtypes={"cpu": ("float32", "float64")},
    ),
""",
)
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ONE_RANK |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def toy_files():
    """An adapter like the reference, for a framework of its own."""
    files = {}
    for path in REFERENCE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for old, new in NAMES.items():
            text = text.replace(old, new)
        files[f"moeport/backends/toy/{path.name}"] = text
    files["moeport/backends/toy/backend.py"] += "\n\nimport toy_arrays as _  # noqa: E402, F401\n"
    return files


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The copy, with the toy's framework installed."""
    copy = extended_copy(tmp_path_factory.mktemp("toy"), toy_files(), (ROW,))
    (copy.root / "toy_arrays.py").write_text("__version__ = '7.0'\n")
    return copy


def test_it_is_two_places(toy):
    assert toy.places == 2


def check(toy, **backend):
    overrides = [word for key, value in backend.items() for word in ("--set", f"backend.{key}={value}")]
    return toy.moeport("config", "check", "configs/quickstart.yaml", *overrides)


def said(done):
    return " ".join(done.stderr.split())


def test_config_check_takes_it(toy):
    done = check(toy, name="toy", dtype="float64")
    assert done.returncode == 0, done.stderr


def test_config_check_refuses_what_it_cannot_do(toy):
    done = check(toy, name="toy", device="cuda", dtype="bfloat16", compile="true")
    assert done.returncode == 2
    for message in (
        "backend toy runs on the CPU only (got cuda); expected auto or cpu; or backend.name torch",
        "backend toy has no bfloat16 (got bfloat16); expected auto, float32 or float64",
        "backend toy cannot compile (got true); expected false or null",
    ):
        assert message in said(done)


def test_a_name_that_is_almost_right_is_answered_with_it(toy):
    assert "did you mean toy?" in said(check(toy, name="toi"))


@pytest.mark.parametrize("command", [("train",), ("launch", "--ranks-per-node", "2")], ids=lambda command: command[0])
def test_training_is_refused_since_it_only_evaluates(toy, command):
    done = toy.moeport(command[0], "configs/quickstart.yaml", *command[1:], "--set", "backend.name=toy")
    assert done.returncode == 2
    assert "toy cannot train; set backend.name to torch or mindspore" in said(done)


def test_the_doctor_reports_it_where_no_other_framework_imports(toy, tmp_path):
    for other in ("torch", "mindspore"):
        (tmp_path / f"{other}.py").write_text(f"raise ImportError('{other} is not for the toy')")
    done = toy.moeport("doctor", "--json", PYTHONPATH=f"{tmp_path}{os.pathsep}{toy.root}")
    found = json.loads(done.stdout)["backends"]
    assert (found["toy"]["version"], found["toy"]["problem"], found["toy"]["trains"]) == ("7.0", None, False)
    assert found["toy"]["devices"]["cpu"]["dtypes"]["float64"]["usable"]
    assert "torch is not for the toy" in found["torch"]["problem"]


def test_probe_checks_it(toy):
    done = toy.moeport("probe", "--backend", "toy", **ONE_RANK)
    assert "toy on cpu: 1 ranks on 1 node" in done.stdout, done.stderr
    assert "every value is right" in done.stdout


def test_its_framework_is_asked_for_where_it_is_missing(toy):
    code = """if True:
        import sys
        sys.modules["toy_arrays"] = None
        from moeport.backends import get_backend
        from moeport.config.training import BackendConfig
        get_backend(BackendConfig(name="toy"))"""
    done = toy.python("-c", code)
    assert "toy needs toy_arrays, which is not installed; install it with: pip install toy-arrays" in done.stderr


@pytest.mark.slow
def test_the_conformance_suite_runs_on_it(toy):
    done = toy.pytest("tests/conformance/test_forward.py", "-k", "toy-cpu and (softmax or grouped_mlp)")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def contracts(copy):
    return copy.python("-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache")


def test_the_import_contracts_cover_it_without_naming_it(toy, tmp_path):
    assert "toy" not in (toy.root / "pyproject.toml").read_text()
    done = contracts(toy)
    assert done.returncode == 0, done.stdout
    files = toy_files()
    files["moeport/backends/toy/ops.py"] += (
        "\n\nfrom moeport.backends.numpy_ref.ops import NumpyOps  # noqa: E402, F401\n"
    )
    done = contracts(extended_copy(tmp_path, files, (ROW,)))
    assert done.returncode == 1
    assert "Backends do not know each other BROKEN" in done.stdout
