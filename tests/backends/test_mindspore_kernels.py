# ruff: noqa: E402
"""Fused operators are used only where they give what the default composition gives."""

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from mindspore import ops as msops

from moeport.backends import get_backend
from moeport.backends.mindspore import kernels
from moeport.backends.mindspore.kernels import try_fused, with_fused
from moeport.backends.mindspore.ops import MindSporeOps
from moeport.backends.trial import Candidate, Choice, fault_of
from moeport.config.training import BackendConfig
from moeport.core.ops import CAUSAL, AttentionOptions
from moeport.errors import BackendUnavailableError
from moeport.facts import BACKENDS, FusedKernel
from tests.support import assert_close, rng


@pytest.fixture(autouse=True)
def on_the_cpu():
    get_backend(BackendConfig(name="mindspore", device="cpu"))


def silu_product(ops, gate_up):
    gate, up = msops.split(gate_up, gate_up.shape[-1] // 2, -1)
    return msops.silu(gate) * up


def wrong_value(ops, gate_up):
    return silu_product(ops, gate_up) * ms.Tensor(1.001, gate_up.dtype)


def wrong_gradient(ops, gate_up):
    return msops.stop_gradient(silu_product(ops, gate_up)) + (gate_up - msops.stop_gradient(gate_up))[..., :64]


def candidates(monkeypatch, function):
    fact = FusedKernel("swiglu", "some.swiglu")
    monkeypatch.setattr(kernels, "CANDIDATES", (Candidate(fact, function),))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_cpu_target_has_none_of_them(dtype):
    choices = try_fused(MindSporeOps(), dtype)
    assert choices.keys() == {"rms_norm", "swiglu", "rope", "attention"}
    for choice in choices.values():
        assert choice.function is None
        assert "mindspore.ops." in choice.label
        assert "unregistered" in choice.label
    assert type(with_fused(MindSporeOps(), choices)) is MindSporeOps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_that_agrees_is_used(monkeypatch, dtype):
    candidates(monkeypatch, silu_product)
    choices = try_fused(MindSporeOps(), dtype)
    assert choices["swiglu"].label == "some.swiglu"
    ops = with_fused(MindSporeOps(), choices)
    assert type(ops).swiglu is silu_product
    assert isinstance(ops, MindSporeOps)


@pytest.mark.parametrize("fact", [candidate.fact for candidate in kernels.CANDIDATES], ids=lambda fact: fact.kernel)
def test_one_that_computes_what_the_composition_does_passes_its_trial(fact):
    """So its examples, with options that are no arrays, can be differentiated."""
    candidate = Candidate(fact, getattr(MindSporeOps, fact.kernel))
    assert fault_of(candidate, MindSporeOps(), "float32", kernels._value_and_gradients) is None


def test_what_it_cannot_serve_is_left_to_the_composition():
    (fact,) = (each for each in BACKENDS["mindspore"].fused_on("npu") if each.kernel == "attention")
    candidate = Candidate(fact, lambda ops, q, k, v, *_, **__: v * 0, kernels.attention_limit)
    ops = with_fused(MindSporeOps(), {"attention": Choice(candidate, fact.name)})
    q, k, v = (ops.from_numpy(rng(i).standard_normal((1, 3, 2, 4)).astype(np.float32)) for i in range(3))
    document = ops.from_numpy(np.zeros((1, 3), np.int64))
    options = CAUSAL, AttentionOptions(document_BS=document), AttentionOptions(scale=1.0)
    served = [ops.attention(q, k, v, each) for each in options]
    assert not any(ops.to_numpy(out).any() for out in served)
    half = AttentionOptions(scale=0.5)
    narrow, whole = ops.attention(q, k, v[..., :2], half), MindSporeOps().attention(q, k, v, half)
    assert_close(ops.to_numpy(narrow), ops.to_numpy(whole)[..., :2], 1e-6)


@pytest.mark.parametrize("function", [wrong_value, wrong_gradient])
def test_one_that_is_wrong_is_not_used_and_its_error_is_said(monkeypatch, function):
    candidates(monkeypatch, function)
    choice = try_fused(MindSporeOps(), "float32")["swiglu"]
    assert choice.function is None
    assert choice.label.startswith("some.swiglu is wrong on this device by ")


def test_the_doctor_says_what_was_chosen_and_why():
    chosen = get_backend(BackendConfig(name="mindspore", device="cpu")).kernel_choices()
    assert chosen["attention"].startswith(
        "batched products, with an additive mask; mindspore.ops.flash_attention_score fails"
    )
    plain = get_backend(BackendConfig(name="mindspore", device="cpu", compile=False)).kernel_choices()
    assert plain["attention"].startswith("default composition; mindspore.ops.flash_attention_score fails")


def test_the_config_switches_them_off():
    choices = try_fused(MindSporeOps(), "float32", "default")
    assert {choice.label for choice in choices.values()} == {"as backend.kernels says"}
    chosen = get_backend(BackendConfig(name="mindspore", device="cpu", kernels="default")).kernel_choices()
    assert chosen["attention"] == "batched products, with an additive mask; as backend.kernels says"


def test_one_that_is_named_must_pass():
    with pytest.raises(BackendUnavailableError, match=r"swiglu: mindspore\.ops\.swiglu fails .* set swiglu to auto or"):
        try_fused(MindSporeOps(), "float32", {"swiglu": "mindspore.ops.swiglu"})
