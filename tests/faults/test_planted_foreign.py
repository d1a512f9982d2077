"""Faults planted into a model from elsewhere, recorded by `moeport.torch.record`: each is named in the first line."""

import re

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import moeport.torch  # noqa: E402
from moeport.parity.compare import compare  # noqa: E402


class Foreign(nn.Module):
    """An embedding, a norm, an attention, two experts with gates, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 32)
        self.norm = nn.LayerNorm(32)
        self.mix = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)
        self.gate = nn.Linear(32, 2)
        self.softmax = nn.Softmax(-1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(32, 16)

    def forward(self, ids):
        x = self.mix(self.norm(self.embed(ids)))
        gates = self.softmax(self.gate(x))
        return self.head(sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)))


def recorded(plant, dtype):
    model = Foreign().to(dtype).train()
    plant(model)
    ids = torch.arange(24).reshape(2, 12) % 16
    with moeport.torch.record(model, keep={}) as recording:
        loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(-1, 1).flatten())
        recording.add("loss", loss)
        loss.backward()
    return recording.recording


def weights(name, change):
    def plant(model):
        p = model.get_parameter(name)
        p.data = change(p.data)

    return plant


def output(name, change):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda module, args, out: change(out))


def one_row(value):
    def change(out):
        out = out.clone()
        out[1, 3] = out[1, 3] * value
        return out

    return change


def large_eps(model):
    model.norm.eps = 0.3


def exchanged(model):
    model.experts[0], model.experts[1] = model.experts[1], model.experts[0]


FAULTS = {
    "a transposed weight": (weights("experts.1.0.weight", lambda w: w.T.contiguous()), r"parameter experts\.1\.0"),
    "a scaled weight": (weights("gate.weight", lambda w: w * 1.1), r"parameter gate\.weight"),
    "experts exchanged": (exchanged, r"parameter experts\.0\.0"),
    "a norm's epsilon": (large_eps, r"norm:LayerNorm"),
    "a norm missing": (lambda model: setattr(model.norm, "forward", lambda x: x), r"norm:LayerNorm"),
    "gates not normalised": (output("softmax", lambda out: 1.3 * out), r"softmax:Softmax"),
    "a row dropped": (output("experts.0.0", one_row(0.0)), r"experts\.0\.0:Linear"),
    "a row with the wrong sign": (output("experts.1.1", one_row(-1.0)), r"experts\.1\.1:GELU"),
    "a NaN": (output("mix", one_row(float("nan"))), r"mix:TransformerEncoderLayer"),
    "an infinity": (output("head", one_row(float("inf"))), r"head:Linear"),
    "gradients times 8": (
        lambda model: model.head.weight.register_hook(lambda grad: 8 * grad), r"gradient of head\.weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sound_model_passes(dtype):
    assert compare(*(recorded(lambda model: None, dtype) for _ in range(2))).equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name, dtype):
    plant, says = FAULTS[name]
    found = compare(recorded(lambda model: None, dtype), recorded(plant, dtype))
    assert found.verdict == "fail", found.headline
    assert re.search(says, found.headline), found.headline
