"""`moeport eval` on folders of the hub, and its messages."""

import json
import sys

import pytest
import torch
import transformers

from moeport.data.tokenizer import ByteTokenizer
from tests.convert.folders import hub_folder
from tests.convert.test_command import moeport

TEXT = "some text, which is not long.\n" * 4


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    return hub_folder(tmp_path / "hub", "qwen3_moe")


def loss_of_transformers(hub, context, has_end=True):
    """Mean negative log-likelihood of the text, and of its end if it has one, in windows."""
    end = ByteTokenizer().end_of_text
    ids = torch.tensor([end, *TEXT.encode(), *[end] * has_end])
    model = transformers.AutoModelForCausalLM.from_pretrained(hub).eval()
    total = 0.0
    for first in range(0, len(ids) - 1, context):
        window, targets = ids[first : first + context][: len(ids) - 1 - first], ids[first + 1 : first + 1 + context]
        with torch.no_grad():
            logits = model(window[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))
    return total / (len(ids) - 1)


def test_a_folder_of_the_hub_has_the_loss_that_transformers_gives(hub, tmp_path, monkeypatch, capsys):
    file, figures = tmp_path / "t.txt", tmp_path / "f.json"
    words = ("eval", hub, "--text", file, "--context", "24", "--json", figures, "--backend", "torch")
    code, out, err = moeport(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    found = json.loads(figures.read_text())
    assert found["files"][0] == {"file": str(file)} | found["total"]
    assert found["total"]["loss"] == pytest.approx(loss_of_transformers(hub, 24), rel=1e-5)
    assert (found["context"], found["stride"], found["total"]["bytes"]) == (24, 24, len(TEXT))
    assert f"{found['total']['bits_per_byte']:.4f}" in out


def test_the_loss_by_position_is_that_of_transformers(hub, tmp_path, monkeypatch, capsys):
    words = ("--by-position", "--lengths", "24", "--text", tmp_path / "t.txt", "--json", tmp_path / "f.json")
    code, _, err = moeport(monkeypatch, capsys, "eval", hub, *words, "--backend", "torch")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "f.json").read_text())["models"][0]["positions"]
    assert (found["sequences"], found["documents"], len(found["blocks"])) == (5, 1, 24)
    mean = sum(block["loss"] for block in found["blocks"]) / 24
    assert mean == pytest.approx(loss_of_transformers(hub, 24, has_end=False), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is nothing to evaluate on; expected --text FILES, --tasks NAMES, --needle or --by-position"),
        (
            ("--text", "t.txt", "--backend", "jax"),
            "--backend jax: is not a backend; expected one of torch, mind",
        ),
        (("--text", "t.txt", "--context", "8", "--stride", "9"), "the stride must be at least 1 and at most the con"),
        (("--needle",), "there is no validation text: "),
        (("--text", "t.txt", "--checkpoint", "best"), "--checkpoint best: "),
        (("--tasks", "a"), "--tasks needs the package `lm-eval`: pip install 'moeport[eval]'"),
    ],
)
def test_what_is_refused(hub, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = moeport(monkeypatch, capsys, "eval", hub, *words)
    assert code == 2
    assert err.startswith(f"error: {message}")
