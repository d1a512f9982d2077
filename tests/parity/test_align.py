"""Wrapped models, models inside others, and what training keeps: of any nn.Module."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import moeport.torch
from moeport.errors import UserError
from moeport.parity.compare import compare
from moeport.parity.recording import Recording, TensorRecord
from tests.parity.test_foreign import Foreign, recorded


class Outer(nn.Module):
    def __init__(self, model, name="model"):
        super().__init__()
        self.name = name
        setattr(self, name, model)

    def forward(self, x):
        return getattr(self, self.name)(x)


class OtherNorm(nn.LayerNorm):
    pass


def with_part(name, change):
    model = Foreign()
    setattr(model, name, change(getattr(model, name)))
    return model


def other_norm(norm):
    new = OtherNorm(16)
    new.load_state_dict(norm.state_dict())
    return new


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPED = {
    "data parallel": lambda: nn.DataParallel(Foreign()),
    "checkpointed part": lambda: with_part("second", checkpoint_wrapper),
    "inside another": lambda: Outer(Foreign()),
    "inside two": lambda: Outer(Outer(Foreign(), "net")),
    "inside two of one name": lambda: Outer(Outer(Foreign())),
    "inside a data parallel other": lambda: nn.DataParallel(Outer(Foreign())),
    "other class": lambda: with_part("norm", other_norm),
    "compiled": lambda: compiled(Foreign()),
    "compiled part": lambda: with_part("first", compiled),
    "data parallel of compiled": lambda: nn.DataParallel(compiled(Foreign())),
}


@pytest.fixture(scope="module")
def plain():
    return recorded(Foreign())


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_and_prefixes_are_seen_through(plain, case):
    wrapped = recorded(WRAPPED[case]())
    for sides in ((plain, wrapped), (wrapped, plain)):
        found = compare(*sides)
        assert found.verdict == "pass", found.headline
        assert (found.only_a, found.only_b) == ([], [])
        assert {row.part: row.compared for row in found.coverage} == {
            "weights and inputs": 7,
            "forward": 7,
            "routing": 0,
            "gradients": 11,
            "optimizer": 0,
            "trajectory": 0,
        }


@pytest.mark.parametrize("case", ["data parallel", "inside two", "checkpointed part", "compiled part"])
def test_a_fault_in_a_wrapped_model_is_named(plain, case):
    model = WRAPPED[case]()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "second" in name and "bias" in name).add_(0.1)
    assert compare(plain, recorded(model)).headline.startswith("FAIL parameter second.bias: ")


def test_what_is_only_around_a_model_is_not_passed(plain):
    class Scaled(Outer):
        def forward(self, x):
            return {name: 2 * y for name, y in super().forward(x).items()}

    found = compare(plain, recorded(Scaled(Foreign())))
    assert found.verdict != "pass"
    assert "model:Scaled.out" in found.only_b


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.", "student.", "base_model.model."]
)
def test_prefixes_of_parameters(prefix):
    def side(prefix):
        named = {f"parameter:{prefix}w{i}": ("parameter", (i + 2,)) for i in range(5)}
        named |= {f"{prefix}m{i}:Linear": ("activation", (3,)) for i in range(5)}
        return Recording("x", "float32", {n: record(n, *k) for n, k in named.items()})

    def record(name, kind, shape):
        return TensorRecord(name, kind, "float32", shape, values=torch.ones(shape).numpy())

    found = compare(side(""), side(prefix))
    assert found.verdict == "pass", found.headline
    assert len(found.tensors) == 10


def test_two_of_seventy_tensors_in_common_are_no_pass():
    def side(prefix):
        values = torch.ones(3).numpy()
        names = ["user:loss", "shared:Linear", *(f"{prefix}{i}:Linear" for i in range(68))]
        return Recording(
            "x", "float32", {n: TensorRecord(n, "activation", "float32", (3,), values=values) for n in names}
        )

    found = compare(side("a"), side("b"))
    assert found.verdict == "warn"
    assert "forward not compared (2 of 70 tensors of A and of 70 of B; only B has b0:Linear" in found.headline


def test_a_recording_without_a_forward_pass_is_refused(tmp_path):
    with (
        pytest.raises(UserError, match="no forward pass of Foreign happened"),
        moeport.torch.record(Foreign(), tmp_path / "bundle") as recording,
    ):
        recording.add("loss", torch.tensor(1.0))
    assert not (tmp_path / "bundle").exists()
    parameters = {n: t for n, t in recorded(Foreign()).tensors.items() if t.kind == "parameter"}
    weights = Recording("weights", "float32", parameters)
    for sides in ((weights, weights), (Recording("empty", "float32"), weights)):
        with pytest.raises(UserError, match="nothing that was computed"):
            compare(*sides)


def trained(model, optimizer, **options):
    x = torch.linspace(-1, 1, 40).reshape(5, 8)
    with moeport.torch.record(model, optimizer=optimizer, **options) as recording:
        model(x)["out"].square().mean().backward()
        optimizer.step()
    return recording.recording


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "PASS"),
        ({"betas": (0.9, 0.95)}, "FAIL optimiser moment exp_avg_sq of "),
        ({"betas": (0.8, 0.999)}, "FAIL optimiser moment exp_avg of "),
        ({"weight_decay": 0.0100001}, "WARN"),
        ({"weight_decay": 50.0}, "FAIL optimiser update of "),
        ({"amsgrad": True}, "WARN"),
    ],
)
def test_the_state_of_an_optimiser_is_compared(options, says):
    sides = []
    for changed in ({}, options):
        model = Foreign()
        sides.append(trained(model, adamw(model, **changed)))
    found = compare(*sides)
    assert found.headline.startswith(says), found.headline
    assert {row.part: row.compared for row in found.coverage}["optimizer"] >= 18 + 6


def test_buffers_that_a_pass_changes_are_compared():
    def side(momentum):
        model = with_part("norm", lambda _: nn.BatchNorm1d(16, momentum=momentum))
        return recorded(model)

    assert compare(side(0.1), side(0.1)).verdict == "pass"
    assert compare(side(0.1), side(0.2)).headline.startswith("FAIL state norm.running_mean: ")


def test_the_state_of_a_router_is_compared():
    def side(steps):
        torch.manual_seed(0)
        layer = moeport.torch.MoE(8, 4, 16, router="sigmoid_bias")
        with moeport.torch.record(layer) as recording:
            layer(torch.ones(2, 3, 8)).sum().backward()
            for _ in range(steps):
                layer.update_router_state()
        return recording.recording

    assert compare(side(1), side(1)).verdict == "pass"
    found = compare(side(1), side(0))
    assert found.headline.startswith("FAIL state "), found.headline
    assert "bias" in found.headline
