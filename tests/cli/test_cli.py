"""Commands, exit codes and error messages."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moeport.cli.main import main
from moeport.config import Config, json_schema, resolved_yaml
from moeport.config.model import ModelConfig
from moeport.errors import RunError
from moeport.routers import BY_NAME
from moeport.training.continued import Generated
from moeport.training.sampling import Sampling
from moeport.version import VERSION


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeport", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run_command


@pytest.fixture
def stub(monkeypatch):
    """Put a module with one function in the place of one that a command calls; returns its calls."""

    def put(module: str, name: str, function) -> list:
        calls = []

        def recorder(*args, **kwargs):
            calls.append((args, kwargs))
            return function()

        fake = ModuleType(module)
        setattr(fake, name, recorder)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return put


def fail(error: BaseException):
    def raising():
        raise error

    return raising


class TestConfig:
    def test_check(self, run):
        Path("c.yaml").write_text("model: {d_model: 128}\n")
        code, out, err = run("config", "check", "c.yaml", "--set", "model.num_layers=3")
        assert (code, err) == (0, "")
        model = ModelConfig(d_model=128, num_layers=3)
        counts = model.parameter_counts(4096)
        assert out.splitlines() == [
            "c.yaml: ok",
            "3 blocks of width 128, 3 with 8 experts, 2 per token, router topk",
            f"{counts.total:,} parameters, {counts.active:,} active per token",
            f"{model.training_flops_per_token(4096, 512):,} floating-point operations per training token",
        ]

    def test_check_without_a_known_vocabulary(self, run):
        Path("c.yaml").write_text("data: {tokenizer: {name: file, path: tokenizer.json}}\n")
        assert len(run("config", "check", "c.yaml")[1].splitlines()) == 2

    def test_one_fault(self, run):
        Path("c.yaml").write_text("model: {d_modle: 128}\n")
        code, out, err = run("config", "check", "c.yaml")
        assert (code, out) == (2, "")
        assert err == "error: c.yaml:1:9 model.d_modle: unknown key; did you mean model.d_model?\n"

    def test_several_faults_each_on_its_line(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        Path("c.yaml").write_text("model: {d_model: 0}\n")
        code, out, err = run("config", "check", "c.yaml", "--set", "run.dir=[1]", "--set", "x")
        assert (code, out) == (2, "")
        assert err == (
            "error:\n"
            "c.yaml:1:18 model.d_model: is out of range (got 0); expected an integer of at least 1\n"
            "--set run.dir=[1] run.dir: is a list (got [1]); expected a path\n"
            '--set x: has no "="; expected section.key=value\n'
        )

    def test_show(self, run):
        Path("c.yaml").write_text("")
        assert run("config", "show", "c.yaml") == (0, resolved_yaml(Config()), "")

    def test_schema(self, run):
        code, out, _ = run("config", "schema")
        assert (code, json.loads(out)) == (0, json_schema())
        assert run("config", "schema", "-o", "schema.json") == (0, "", "")
        assert json.loads(Path("schema.json").read_text()) == json_schema()


class TestStandardInput:
    @pytest.fixture
    def typed(self, monkeypatch):
        def type_in(data: bytes) -> None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

        return type_in

    def test_a_config(self, run, typed):
        typed(b"model: {num_layers: 3}\n")
        assert run("config", "show", "-") == (0, resolved_yaml(Config(model=ModelConfig(num_layers=3))), "")
        typed(b"model: {num_layer: 3}\n")
        expected = "error: standard input:1:9 model.num_layer: unknown key; did you mean model.num_layers?\n"
        assert run("config", "check", "-") == (2, "", expected)

    @pytest.mark.parametrize("command", [("launch",), ("parity", "run"), ("parity", "record", "-o", "out")])
    def test_other_processes_cannot_read_it(self, run, command):
        code, out, err = run(*command, "-", *(["--variant", "torch-cpu"] if "record" in command else []))
        assert (code, out) == (2, "")
        assert "other processes read the config too; expected a file" in err

    def test_a_prompt(self, run, stub, typed):
        calls = stub("moeport.training.generate", "generate_texts", lambda: [Generated("à", " b", 0, 1, "length")])
        typed("à".encode())
        assert run("generate", "runs/a", "--prompt", "-")[:2] == (0, "à b\n")
        assert calls[0][0] == (Path("runs/a"), ["à"], Sampling())


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_config_that_is_no_file(run, kind):
    path = "/dev/zero" if kind == "device" else "c.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "folder":
        Path(path).mkdir()
    code, out, err = run("config", "check", path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.endswith("expected a YAML file\n")


class TestRouters:
    def test_all(self, run):
        code, out, err = run("routers")
        assert (code, err) == (0, "")
        for name, router in BY_NAME.items():
            assert name in out
            assert router.paper.partition(",")[0] in out
            assert all(option in out for option in router.config_class.model_fields if option != "name")

    @pytest.mark.parametrize("name", BY_NAME)
    def test_one(self, run, name):
        code, out, err = run("routers", name)
        assert (code, err) == (0, "")
        assert out.startswith(f"{name}\n")
        assert BY_NAME[name].paper in out

    def test_unknown(self, run):
        names = ", ".join(BY_NAME)
        expected = f"expected one of {names}; did you mean topk?"
        assert run("routers", "top_k") == (2, "", f"error: no router top_k; {expected}\n")


class TestCallsOfOtherModules:
    def test_train(self, run, stub):
        calls = stub("moeport.training.run", "train", lambda: "done")
        Path("c.yaml").write_text("training: {steps: 5}\n")
        assert run("train", "c.yaml", "--set", "training.seed=3", "--resume")[0] == 0
        ((config,), options) = calls[0]
        assert (config.training.steps, config.training.seed, config.metrics.profile) == (5, 3, False)
        assert (options["resume"], options["dry_run"]) == (True, False)
        assert run("train", "c.yaml", "--profile")[0] == 0
        assert calls[1][0][0].metrics.profile

    def test_generate(self, run, stub):
        text = Generated("Once upon a", " time", 0, 1, "length")
        calls = stub("moeport.training.generate", "generate_texts", lambda: [text])
        words = ("--prompt", "Once upon a", "--top-k", "5", "--top-p", "0.9", "--stop", ".", "--stop", "!")
        assert run("generate", "runs/a", *words)[:2] == (0, "Once upon a time\n")
        options = {"seeds": [0], "checkpoint": "latest", "batch_size": 16, "on_text": None}
        assert calls == [((Path("runs/a"), ["Once upon a"], Sampling(200, 0.8, 5, 0.9, (".", "!"))), options)]

    def test_generate_several(self, run, stub):
        texts = [Generated("a", "b", 3, 1, "length"), Generated("c\u2028", "d", 4, 2, "stop")]
        calls = stub("moeport.training.generate", "generate_texts", lambda: texts)
        Path("lines.txt").write_text("c\u2028\r\n", encoding="utf-8")
        words = ("generate", "runs/a", "--prompt", "a", "--prompts", "lines.txt", "--seed", "3", "--seed", "4")
        assert run(*words)[:2] == (0, "--- text 1, seed 3\nab\n--- text 2, seed 4\nc\u2028d\n")
        code, out, _ = run(*words, "--json")
        assert (code, [json.loads(line) for line in out.split("\n")[:-1]]) == (0, [vars(text) for text in texts])
        assert [(args[1], options["seeds"]) for args, options in calls] == [(["a", "c\u2028"], [3, 4])] * 2

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("{", "lines.jsonl:2: not JSON: .*; expected a line of JSON"),
            ("[1]", 'lines.jsonl:2: has no text under "prompt"; .*'),
            ('{"prompt": 1}', 'lines.jsonl:2: has no text under "prompt"; .*'),
        ],
    )
    def test_generate_from_lines_of_json(self, run, stub, line, found):
        calls = stub("moeport.training.generate", "generate_texts", list)
        Path("lines.jsonl").write_text(f'{{"prompt": "x y"}}\n{line}\n')
        code, _, err = run("generate", "runs/a", "--prompts", "lines.jsonl")
        assert code == 2
        assert re.fullmatch(f"error: {found}\n", err)
        Path("lines.jsonl").write_text('{"prompt": "x y"}\n\n{"prompt": ""}\n')
        assert run("generate", "runs/a", "--prompts", "lines.jsonl")[0] == 0
        assert calls[0][0][1] == ["x y", ""]

    def test_generate_without_a_prompt(self, run):
        Path("none.txt").write_text("")
        expected = "error: there is no prompt; expected --prompt TEXT or --prompts FILE with one per line\n"
        assert run("generate", "runs/a") == (2, "", expected)
        empty = "error: --prompts none.txt: is empty; expected a prompt per line\n"
        assert run("generate", "runs/a", "--prompts", "none.txt") == (2, "", empty)
        for name, why in (("no.txt", "No such file or directory"), (".", "it is a folder, not a file")):
            unreadable = f"error: --prompts {name}: cannot be read: {why}; expected a prompt per line\n"
            assert run("generate", "runs/a", "--prompts", name) == (2, "", unreadable)

    def test_doctor(self, run, stub):
        report = {"moeport": VERSION, "backends": {"numpy": {"available": True, "devices": ["cpu"]}, "torch": None}}
        stub("moeport.backends.doctor", "report", lambda: report)
        code, out, _ = run("doctor", "--json")
        assert (code, json.loads(out)) == (0, report)


class TestErrors:
    @pytest.fixture
    def doctor(self, run, stub):
        """Run a command that meets an error."""

        def run_doctor(error: BaseException, *arguments: str) -> tuple[Any, str, str]:
            stub("moeport.backends.doctor", "report", fail(error))
            return run("doctor", *arguments)

        return run_doctor

    def test_run_error(self, doctor):
        assert doctor(RunError("no [memory]")) == (1, "", "error: no [memory]\n")

    def test_unexpected(self, doctor):
        code, out, err = doctor(ZeroDivisionError("a b"))
        assert (code, out) == (1, "")
        assert err == "internal error:\nZeroDivisionError: a b\nRun again with --debug for the traceback.\n"

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    def test_out_of_memory(self, doctor, error):
        code, out, err = doctor(error)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert err.startswith("error: out of memory: ")

    def test_interrupt(self, doctor):
        assert doctor(KeyboardInterrupt())[0] == 130

    @pytest.mark.parametrize("arguments", [("bogus",), ("config", "check"), ("config", "check", "c.yaml", "--bogus")])
    def test_usage(self, run, arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Usage:" in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [("--debug", "config", "check", "c.yaml"), ("config", "check", "c.yaml", "--debug")]
)
def test_debug_shows_the_traceback(tmp_path, arguments):
    command = [sys.executable, "-m", "moeport", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("ConfigError: c.yaml: no such file; expected a YAML file\n")


def test_help_imports_no_framework():
    command = [sys.executable, "-X", "importtime", "-m", "moeport", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "torch_npu", "mindspore", "numpy", "pydantic", "yaml", "transformers", "matplotlib"}
    assert "doctor" in result.stdout
