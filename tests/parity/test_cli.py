"""`moeport parity` as a user runs it: output, files, exit codes."""

import json
import subprocess
import sys

import pytest

from tests.parity.tiny import config_file

SMALL = ["--sequences", "2", "--tokens", "12", "--steps", "2"]


@pytest.fixture
def run(parity, tmp_path):
    """Run a command in an empty folder with a config in it; PyTorch is among the backends."""
    pytest.importorskip("torch")
    config_file(tmp_path)
    return parity


def test_run(run, tmp_path):
    code, out, err = run(
        "run", "config.yaml", "--backends", "numpy,torch-cpu", *SMALL, "--json", "r.json", "--markdown", "r.md",
        "--html", "r.html", "--parts", "forward,routing",
    )  # fmt: skip
    assert code == 0
    assert out.startswith("PASS torch-cpu against numpy: ")
    assert "recording torch-cpu" in err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["verdict"] == "pass"
    (found,) = report["comparisons"]
    assert out.startswith(found["headline"])
    assert found["golden"] == "numpy:fp64"
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    tensor = by_name["layers.1/attention.q:linear"]
    assert tensor["metrics"]["relative_rms"] == tensor["error"] < tensor["limit"]
    assert tensor["golden"]["error_b"] < 1e-5
    assert (tmp_path / "r.md").read_text().startswith(f"## {found['headline']}\n")
    assert found["headline"] in (tmp_path / "r.html").read_text()


def test_a_fault_exits_with_1(run):
    code, out, _ = run(
        "run", "config.yaml", "--backends", "torch-cpu", "--variant", "torch-cpu model.norm_eps=0.1", *SMALL,
        "--isolate",
    )  # fmt: skip
    assert code == 1
    assert out.startswith("FAIL layers.0/attention_norm:rms_norm: first tensor beyond tolerance")
    assert "(own error)" in out.splitlines()[0]


def test_bundles(run, tmp_path):
    record = ("record", "config.yaml", *SMALL)
    assert run(*record, "-o", "a")[0] == 0
    code, out, _ = run(*record, "--variant", "torch-cpu:bf16", "-o", "b")
    assert code == 0
    assert out.startswith("b: ")
    assert run(*record, "--variant", "torch-cpu:bf16", "-o", "replayed", "--replay", "a")[0] == 0
    assert run(*record, "--variant", "numpy:fp64", "-o", "golden", "--replay", "a")[0] == 0
    assert run("compare", "a", "a")[1].splitlines()[0].endswith("are bit-identical")
    code, out, _ = run("compare", "a", "b", "--replayed", "replayed", "--golden", "golden")
    assert code == 0
    assert out.startswith("PASS torch-cpu:bf16 against torch-cpu")
    assert run("compare", "a", "b", "--html", "b.html")[0] == 0
    assert "torch-cpu:bf16 against torch-cpu" in (tmp_path / "b.html").read_text()
    (tmp_path / "names.yaml").write_text("layers.0:rope: layers.0:rope\n")
    assert run("compare", "a", "a", "--names", "names.yaml")[0] == 0
    (tmp_path / "a" / "tensors.safetensors").write_bytes(b"x")
    code, _, err = run("compare", "a", "b")
    assert code == 2
    assert "truncated or altered" in err


def test_a_checkpoint_of_a_run(run, tmp_path):
    from rich.console import Console

    from moeport.config import load_config
    from moeport.training.run import train

    config = load_config(tmp_path / "config.yaml", ["training.steps=2"])
    train(config, console=Console(quiet=True))
    for checkpoint in (config.run.dir, config.run.dir / "checkpoints" / "step-000001"):
        code, out, _ = run(
            "run", "config.yaml", "--backends", "numpy,torch-cpu", *SMALL, "--checkpoint", str(checkpoint)
        )
        assert code == 0, out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "config.yaml", "--backends", "numpy"], "parity run compares at least two variants (got 1)"),
        (["run", "config.yaml", "--backends", "numpy,jax"], "variant 'jax': expected BACKEND"),
        (
            ["record", "config.yaml", "-o", "x", "--keep", "activation=some"],
            "--keep activation=some: expected KIND=HOW",
        ),
        (["compare", "absent", "absent"], "absent: no such folder; expected a bundle that moeport parity record"),
    ],
)
def test_mistakes_exit_with_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err


def test_help_imports_no_framework():
    code = (
        "import sys; sys.argv = ['moeport', 'parity', '--help']\n"
        "from moeport.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "loaded = {'torch', 'mindspore', 'numpy', 'moeport.parity.recording'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
