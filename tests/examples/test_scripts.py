"""The scripts in examples/ train: a few steps of each way to start them."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--width", "32", "--heads", "2", "--blocks", "2", "--length", "32", "--batch", "4", "--print-interval", "5"]
SMALL += ["--expert-hidden", "16", "--experts", "4", "--learning-rate", "0.01"]


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(*options, steps=5):
    """What the plain script prints."""
    script = load("pytorch_model")
    text = ["--text", str(EXAMPLES / "pytorch_model.py")]
    return script.train(script.parser().parse_args([*SMALL, "--steps", str(steps), "--device", "cpu", *text, *options]))


def test_the_plain_script_learns():
    """Better than the text's own frequencies of bytes, which is what a model learns first."""
    text = (EXAMPLES / "pytorch_model.py").read_bytes()
    frequencies = [text.count(bytes([byte])) / len(text) for byte in set(text)]
    entropy = -sum(frequency * math.log(frequency) for frequency in frequencies)
    printed = train(steps=80)
    assert [line["step"] for line in printed] == list(range(5, 81, 5))
    assert printed[0]["loss"] > printed[-1]["loss"]
    assert printed[-1]["loss"] < entropy
    assert all(line["dropped"] == 0 and 1 <= line["imbalance"] <= 2 for line in printed)


def test_a_capacity_drops_and_a_bias_moves():
    printed = train("--router", "sigmoid_bias", "--capacity-factor", "0.5")
    assert all(0.4 < line["dropped"] <= 0.75 for line in printed)


def test_the_dense_model_has_no_experts_and_the_cost_of_two():
    script = load("pytorch_model")
    counts = {}
    for dense in (True, False):
        options = script.parser().parse_args([*SMALL, *(["--dense"] if dense else [])])
        counts[dense] = sum(p.numel() for p in script.feed_forward(options).parameters() if p.dim() > 1)
    assert counts[True] == 2 * 32 * 2 * 16
    assert train("--dense")[-1].keys() == {"step", "loss"}


def test_it_computes_in_bfloat16_and_compiled(monkeypatch):
    """As one graph: another backend than inductor, which needs a compiler of C++, sees the same one."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    plain, other = train("--blocks", "1", steps=2), train("--blocks", "1", "--amp", "--compile", steps=2)
    assert other[-1]["loss"] != plain[-1]["loss"]
    assert other[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.02)


def test_experts_are_swapped_into_a_model_of_transformers():
    pytest.importorskip("transformers")
    script = load("swap_into_transformers")
    losses = script.train(script.parser().parse_args(["--steps", "8", "--every", "2"]))
    assert losses[-1] < losses[0] - 0.5


def test_every_second_block_is_swapped_and_the_last_is_one_of_them():
    transformers = pytest.importorskip("transformers")
    script = load("swap_into_transformers")
    model = script.small_llama()
    layers = script.swap(model, experts=4, expert_hidden=8, router="switch", every=2)
    blocks = [block.mlp for block in model.model.layers]
    assert [block in layers for block in blocks] == [True, False, True]
    assert isinstance(blocks[1], transformers.models.llama.modeling_llama.LlamaMLP)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_a_model_in_a_folder_keeps_its_other_weights(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=256, num_key_value_heads=1, head_dim=16, **sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "model")
    script = load("swap_into_transformers")
    options = script.parser().parse_args(["--model", str(tmp_path / "model"), "--steps", "1", "--expert-hidden", "8"])
    (loss,) = script.train(options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    dense = model.model.layers[0].mlp
    assert len(script.swap(model, experts=4, expert_hidden=8, router="topk", every=1)) == 2
    assert model.model.layers[0].mlp is not dense
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    kept = model.state_dict().keys() & stored.keys()
    assert {name for name in stored if ".mlp." not in name} == kept
    assert all(torch.equal(model.state_dict()[name], stored[name]) for name in kept)
    assert 0 < loss < 10
