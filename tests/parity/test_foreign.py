"""Any nn.Module on record: names, gradients, bundles, and against our model."""

import numpy as np
import pytest
import torch
from torch import nn

import moeport.torch
from moeport.parity.bundle import load_bundle
from moeport.parity.compare import compare
from moeport.parity.record import record
from tests.parity.tiny import subject


class Foreign(nn.Module):
    """Two layers that our code does not know; returns a mapping, as many models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.norm(torch.relu(self.first(x)))
        return {"out": self.second(hidden), "hidden": hidden}


def recorded(model, path=None, seed=1, **options):
    x = torch.tensor(np.random.default_rng(seed).standard_normal((5, 8))).to(next(model.parameters()).dtype)
    with moeport.torch.record(model, path, **options) as recording:
        loss = model(x)["out"].square().mean()
        recording.add("loss", loss)
        loss.backward()
        model(x)  # not recorded
    return recording.recording


def test_what_is_recorded():
    names = list(recorded(Foreign()).tensors)
    forward = [name for name in names if not name.startswith(("parameter:", "gradient:"))]
    assert forward == [
        "input[0]",
        "first:Linear",
        "norm:LayerNorm.x",
        "norm:LayerNorm",
        "second:Linear",
        "model:Foreign.out",
        "model:Foreign.hidden",
        "user:loss",
    ]
    for module in ("first", "norm", "second"):
        assert {f"{kind}:{module}.{part}" for kind in ("parameter", "gradient") for part in ("weight", "bias")} <= {
            *names
        }
    assert names.index("gradient:second:Linear") < names.index("gradient:first:Linear")


def test_inputs_are_traced():
    tensors = recorded(Foreign()).tensors
    assert tensors["second:Linear"].inputs[0] == "norm:LayerNorm"
    assert "parameter:second.weight" in tensors["second:Linear"].inputs
    assert tensors["second:Linear"].op == "Linear"


def test_gradients_are_those_of_the_model():
    model = Foreign()
    tensors = recorded(model, keep={}).tensors
    np.testing.assert_array_equal(tensors["gradient:first.weight"].values, model.first.weight.grad.numpy())


def test_recording_leaves_no_hooks():
    model = Foreign()
    recorded(model)
    assert not model.first._forward_hooks
    assert not model._forward_pre_hooks
    assert not model.first.weight._post_accumulate_grad_hooks


def test_equal_runs_and_types(tmp_path):
    recorded(Foreign(), tmp_path / "a")
    recorded(Foreign(), tmp_path / "b")
    recorded(Foreign().double(), tmp_path / "exact")
    recorded(Foreign().bfloat16(), tmp_path / "short")
    a, b, exact, short = (load_bundle(tmp_path / name) for name in ("a", "b", "exact", "short"))
    assert compare(a, b).equal
    assert (a.dtype, exact.dtype, short.dtype) == ("float32", "float64", "bfloat16")
    assert compare(exact, a).verdict == "pass"
    assert compare(a, short).verdict == "pass"


def test_a_fault_in_a_foreign_model_is_named():
    model = Foreign()
    model.norm.eps = 0.5
    found = compare(recorded(Foreign()), recorded(model))
    assert found.headline.startswith("FAIL norm:LayerNorm: first tensor beyond tolerance")
    assert "its inputs agree (own error)" in found.headline


@pytest.mark.parametrize(
    ("between", "says"),
    [
        (lambda x: x.reshape(16, 5).t().contiguous(), "FAIL norm:LayerNorm.x: "),
        (lambda x: x.flip(0), "FAIL norm:LayerNorm.x: "),
        (lambda x: torch.cat((x[:-1], 0 * x[-1:])), "FAIL norm:LayerNorm.x: "),
    ],
    ids=["transposed", "reversed", "a row lost"],
)
def test_a_fault_between_two_modules_is_named(between, says):
    class Faulty(Foreign):
        def forward(self, x):
            hidden = self.norm(between(torch.relu(self.first(x))))
            return {"out": self.second(hidden), "hidden": hidden}

    found = compare(recorded(Foreign()), recorded(Faulty()))
    assert found.headline.startswith(says), found.headline
    assert "plain arithmetic computed it" in found.headline


def test_an_error_writes_no_bundle(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), moeport.torch.record(Foreign(), tmp_path / "a"):
        raise RuntimeError("mine")
    assert not (tmp_path / "a").exists()


class PlainNorms(nn.Module):
    """The embedding and first norm of our model as torch.nn has them."""

    def __init__(self, params):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.tensor(params["embedding.weight"]), freeze=False)
        self.norm = nn.RMSNorm(32, eps=1e-5)

    def forward(self, token_BS):
        return self.norm(self.embed(token_BS))


def test_torch_nn_against_ours(tmp_path):
    """By a mapping of names; ours is A."""
    ours = subject(tmp_path)
    a = record(ours, steps=0)
    model = PlainNorms(ours.params)
    with moeport.torch.record(model, keep={}) as recording:
        model(torch.tensor(a.tensors["batch:token_BS"].values))
    names = {"embed:Embedding": "embedding:take_rows", "norm:RMSNorm": "layers.0/attention_norm:rms_norm"}
    found = compare(a, recording.recording, names=names)
    results = {tensor.name: tensor for tensor in found.tensors}
    assert results["embedding:take_rows"].metrics.equal
    assert results["layers.0/attention_norm:rms_norm"].verdict == "pass"
