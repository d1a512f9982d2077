"""The scripts in examples/ train: a few steps of each way to start them."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--width", "32", "--heads", "2", "--blocks", "2", "--length", "32", "--batch", "4", "--print-interval", "5"]
SMALL += ["--expert-hidden", "16", "--experts", "4", "--learning-rate", "0.01"]

SIZES = ("experts", "expert-hidden", "blocks", "width", "heads", "length", "batch", "steps", "print-interval")


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


def refusal(name, arguments, monkeypatch, capsys):
    """How a script ends, and what it says, with arguments of the command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        load(name).main()
    out, error = capsys.readouterr()
    assert not out
    return ended.value.code, " ".join(error.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--text none.txt", "No such file or directory: 'none.txt'"),
        ("--text folder", "Is a directory: 'folder'"),
        ("--text empty", "--text: too short; expected more than the 128 bytes of --length"),
        ("--length 99999999", "--text: too short; expected more than the 99999999 bytes of --length"),
        ("--heads 3", "--heads 3: does not divide --width 128"),
        *((f"--{name} 0", f"argument --{name}: '0' is too small or no integer; expected at least 1") for name in SIZES),
        ("--batch -1", "argument --batch: '-1' is too small or no integer"),
        ("--learning-rate -1", "--learning-rate -1.0: expected a number above 0"),
        ("--learning-rate nan", "--learning-rate nan: expected a number above 0"),
        ("--device gpu", "--device gpu: Expected one of cpu, cuda"),
        ("--router tpok", "did you mean topk?"),
        ("--experts 1", "model.moe.router.top_k: more experts per token than there are"),
        ("--capacity-factor -1", "model.moe.capacity.factor: is out of range (got -1.0)"),
    ],
)
def test_what_the_plain_script_refuses(monkeypatch, capsys, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    code, error = refusal("pytorch_model", options.split(), monkeypatch, capsys)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model none", "--model none: is not the folder of a model: [Errno 2] No such file"),
        ("--model broken", "--model broken: is not the folder of a model: Expecting value"),
        ("--model gpt2", "--model gpt2: is of the type gpt2; expected one of llama, qwen2, qwen3"),
        ("--model llama", "no file named model.safetensors"),
        ("--every 0", "argument --every: '0' is too small or no integer"),
        ("--learning-rate 0", "--learning-rate 0.0: expected a number above 0"),
        ("--router tpok", "did you mean topk?"),
    ],
)
def test_what_the_script_for_transformers_refuses(monkeypatch, capsys, tmp_path, options, message):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for name in ("broken", "gpt2", "llama"):
        (tmp_path / name).mkdir()
        text = "" if name == "broken" else json.dumps({"model_type": name})
        (tmp_path / name / "config.json").write_text(text)
    code, error = refusal("swap_into_transformers", options.split(), monkeypatch, capsys)
    assert code == 2
    assert message in error


@pytest.mark.parametrize("name", ["none.ipynb", "folder", "text.ipynb"])
def test_what_is_not_a_notebook(monkeypatch, capsys, tmp_path, name):
    pytest.importorskip("nbclient")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.ipynb").write_text("# Text")
    code, error = refusal("execute", [name], monkeypatch, capsys)
    assert code == 2
    assert f"error: {name}: is not a notebook that can be read: " in error


@pytest.mark.parametrize(
    ("name", "package", "extras"),
    [
        ("pytorch_model", "torch", "'.[torch]'"),
        ("pytorch_model", "moeport.torch", "'.[torch]'"),
        ("swap_into_transformers", "transformers", "'.[torch]' transformers"),
        ("execute", "nbformat", "'.[torch,plot,notebook]'"),
    ],
)
def test_a_package_that_is_missing(monkeypatch, capsys, name, package, extras):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        load(name)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert package in error
    assert f"pip install -e {extras}\n" in error
