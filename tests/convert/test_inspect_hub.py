"""`moeport inspect` on folders of the hub, against what transformers' own routers do with the same text."""

import json

import pytest
import torch
import transformers

from moeport.data.tokenizer import ByteTokenizer
from tests.convert.folders import hub_folder
from tests.convert.test_command import moeport

TEXT = "some text, which is not long.\n" * 4
CONTEXT = 24


@pytest.fixture(params=["mixtral", "qwen3_moe", "olmoe"])
def hub(request, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    return hub_folder(tmp_path / "hub", request.param)


def of_transformers(hub):
    """(assignments by layer and expert, mean loss) of the whole sequences of the text."""
    tokenizer = ByteTokenizer()
    stream = torch.tensor([tokenizer.end_of_text, *TEXT.encode(), tokenizer.end_of_text])
    count = (len(stream) - 1) // CONTEXT
    inputs, targets = (stream[first : first + count * CONTEXT].reshape(count, CONTEXT) for first in (0, 1))
    model = transformers.AutoModelForCausalLM.from_pretrained(hub, experts_implementation="eager").eval()
    with torch.no_grad():
        found = model(inputs, output_router_logits=True)
    chosen = [torch.topk(logits, model.config.num_experts_per_tok).indices for logits in found.router_logits]
    loads = [torch.bincount(each.flatten(), minlength=4).tolist() for each in chosen]
    return loads, float(torch.nn.functional.cross_entropy(found.logits.flatten(0, 1).double(), targets.flatten()))


def test_experts_get_what_the_routers_of_transformers_choose(hub, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "f.json"
    words = ("inspect", hub, "--text", tmp_path / "t.txt", "--context", CONTEXT, "--least", 4, "--json", figures)
    code, out, _ = moeport(monkeypatch, capsys, *words, "--backend", "torch")
    found, (loads, loss) = json.loads(figures.read_text()), of_transformers(hub)
    assert code == 0
    assert [layer["load"] for layer in found["layers"]] == loads
    assert found["robustness"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["checkpoints"] == []
    assert f"page: {hub / 'inspect.html'}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "has no held-out text; expected --text FILES"),
        (("--text", "t.txt", "--checkpoint", "step-5"), "a folder of the Hugging Face hub, which has one checkpoint"),
    ],
)
def test_what_a_folder_does_not_have_is_refused(tmp_path, monkeypatch, capsys, words, message):
    code, _, err = moeport(monkeypatch, capsys, "inspect", hub_folder(tmp_path / "hub", "olmoe"), *words)
    assert code == 2
    assert message in err
