"""The commands, their messages, and those of the documentation."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from moeport.cli.main import main
from tests.convert.folders import edit_json, hub_folder
from tests.convert.runs import run_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hugging-face.md").read_text(encoding="utf-8")


def moeport(monkeypatch, capsys, *arguments):
    """Exit code and output."""
    monkeypatch.setattr(sys, "argv", ["moeport", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        main()
    captured = capsys.readouterr()
    return ending.value.code or 0, captured.out, captured.err


def test_there_and_back(tmp_path, monkeypatch, capsys):
    hub = hub_folder(tmp_path / "hub", "qwen2_moe")
    edit_json(hub / "config.json", lambda config: config.update(logit_scale=1.0))
    code, _, err = moeport(monkeypatch, capsys, "convert", "from-hf", hub, "-o", tmp_path / "run")
    assert (code, "logit_scale = 1.0" in err, "--ignore-key KEY" in err) == (2, True, True)
    code, out, _ = moeport(
        monkeypatch, capsys, "convert", "from-hf", hub, "-o", tmp_path / "run", "--ignore-key", "logit_scale"
    )
    assert code == 0
    assert "qwen2_moe, 55 tensors with" in out
    assert "carried along: generation_config.json, tokenizer.json, tokenizer_config.json" in out
    assert "router_aux_loss_coef 0.001 is model.moe.load_balance.coefficient 0.001" in out
    code, out, _ = moeport(monkeypatch, capsys, "convert", "to-hf", tmp_path / "run", tmp_path / "back")
    assert code == 0
    assert "qwen2_moe, 55 tensors in 1 file" in out
    assert "every tensor and expert has the checksum that it was converted from" in out
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((hub / "config.json").read_text())
    code, out, _ = moeport(
        monkeypatch, capsys, "convert", "to-hf", tmp_path / "run", tmp_path / "small", "--max-shard-size", "1KB"
    )
    assert re.search(r"55 tensors in \d+ files", out)
    index = json.loads((tmp_path / "small/model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 5


def test_a_converted_run_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hub_folder(tmp_path / "hub")
    assert moeport(monkeypatch, capsys, "convert", "from-hf", "hub", "-o", "run")[0] == 0
    text = Path("text")
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"a line of text, number {number}\n" * 9)
    source = "data.source={name: files, paths: [text]}"
    arguments = ["train", "run/config.yaml", "--resume", "--set", source, "--set", f"data.cache_dir={tmp_path}/cache"]
    code, _, err = moeport(monkeypatch, capsys, *arguments, "--set", "backend.device=cpu")
    assert code == 2
    assert "holds converted weights and no training that could be resumed; start a run from them with" in err


def test_the_commands_of_the_page_work(tmp_path, monkeypatch, capsys):
    """Each in its order, on small models with the names of the page; the sizes of training are cut down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub_folder(tmp_path / "Qwen3-30B-A3B", "qwen3_moe")
    hub_folder(tmp_path / "Llama-3", "llama")
    run_of(tmp_path / "runs/routers/switch", moe={"router": {"name": "switch"}})
    corpus = Path("corpus")
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"a line of text, number {number}\n" * 9)
    commands = re.findall(r"^\$ moeport (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 10
    refusals = ""
    short = ["training.steps=1", "training.batch_size=2", "data.sequence_length=16", "metrics.report=false"]
    for line in commands:
        words = shlex.split(line)
        if words[0] == "train":
            words += [
                word for key in (*short, "metrics.tensorboard=false", "backend.device=cpu") for word in ("--set", key)
            ]
        if words[0] == "generate":
            words += ["--max-tokens", "2"]
        code, out, err = moeport(monkeypatch, capsys, *words)
        refusals += err if code == 2 else ""
        assert code == (2 if "switch" in line else 0), (line, out, err)
    shown = re.search(r"^error: (mixtral, .*); \.\.\.$", PAGE, re.MULTILINE)[1]
    assert shown in " ".join(refusals.split())
    assert json.loads(Path("qwen3-tuned/config.json").read_text())["torch_dtype"] == "bfloat16"
