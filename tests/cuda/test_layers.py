"""Layers and models with the table of CUDA, on the CPU in bfloat16, against the compositions."""

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import moeport.torch
from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.backends.examine import TINY, VOCAB_SIZE
from moeport.backends.torch import fused
from moeport.backends.torch.cuda import block
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.errors import BackendUnavailableError
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from tests.support import grid

NAMED = {"routed_mlp": "grouped_mm", "grouped_mlp": "grouped_mm"}
TOLERANCE = 2**-5


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """The CPU has CUDA's table. Returns: whether each block that ran had tokens, and whether it served every row."""
    monkeypatch.setitem(fused.TABLES, "cpu", "moeport.backends.torch.cuda.kernels")
    monkeypatch.setattr(fused, "_made", {})
    ran, forward = [], block._forward

    def counted(x, gate_N, w_in, w_out, layout, *rest):
        ran.append((gate_N is not None, layout.whole))
        return forward(x, gate_N, w_in, w_out, layout, *rest)

    monkeypatch.setattr(block, "_forward", counted)
    return ran


def layer(kernels, **options):
    return moeport.torch.MoE(16, 4, 24, seed=0, dtype=torch.bfloat16, init_std=0.3, kernels=kernels, **options)


def passed(moe, x):
    """Output and gradients, in float32."""
    x = x.clone().requires_grad_()
    y = moe(x)
    y.float().square().sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    return {name: array.float() for name, array in found.items()}


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert (found[name] - want).abs().max() <= TOLERANCE * want.abs().max(), name


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        ({}, (True, True)),
        ({"activation": "gelu", "num_shared_experts": 1}, (True, True)),
        ({"router": "switch", "capacity": {"policy": "factor", "factor": 0.5}}, (True, False)),
        ({"router": "expert_choice"}, (False, False)),
        ({"router": "soft"}, (False, False)),
    ],
    ids=["topk", "gelu", "drops", "expert choice", "soft"],
)
def test_every_kind_of_layer(options, ran, blocks):
    x = torch.tensor(grid(0, 2, 8, 16)).to(torch.bfloat16)
    expected = passed(layer("default", **options), x)
    moe = layer({"grouped_mlp": "grouped_mm"} | ({"routed_mlp": "grouped_mm"} if ran[0] else {}), **options)
    moe(x)  # tries the forms
    blocks.clear()
    assert_near(passed(moe, x), expected)
    assert blocks == [ran]


def test_a_named_form_that_cannot_serve_the_router_is_refused():
    with pytest.raises(BackendUnavailableError, match="routed_mlp: grouped_mm: experts choose tokens"):
        layer(NAMED, router="expert_choice")(torch.zeros(2, 8, 16, dtype=torch.bfloat16))


def test_recomputation_and_autocast_around_the_first_call():
    moe = layer(NAMED).float()
    x = torch.tensor(grid(0, 2, 8, 16), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in moe.experts.parameters()} == {torch.float32}


def test_shapes_without_memory(blocks):
    """Of the node as one operation, so that no kernel is launched on memory that is not there."""
    ops: Any = fused.operations(torch.device("cpu"), NAMED)
    ops.prepare("bfloat16")
    blocks.clear()
    with FakeTensorMode() as mode:
        x, w_in, w_out = (
            mode.from_tensor(torch.empty(shape, dtype=torch.bfloat16)).requires_grad_()
            for shape in ((10, 16), (3, 48, 16), (3, 16, 24))
        )
        y = ops.grouped_mlp(x, w_in, w_out, torch.empty(3, dtype=torch.int64), "swiglu")
        y.sum().backward()
    assert (y.shape, y.dtype, w_in.grad.shape) == (x.shape, x.dtype, w_in.shape)
    assert not blocks


def test_a_model_trains_and_says_what_computes_it(blocks):
    def trained(kernels):
        backend = get_backend(BackendConfig(device="cpu", dtype="bfloat16", kernels=kernels))
        lm = DecoderLM(TINY, VOCAB_SIZE)
        params = initial_parameters(lm.parameter_specs(), seed=0)
        token_BS = np.arange(16).reshape(2, 8)
        model = backend.training_model(lm, params, TrainingOptions(OptimizerConfig()))
        losses = []
        for _ in range(2):
            losses.append(float(backend.ops.to_numpy(model.accumulate(Batch(token_BS, token_BS + 1), 1.0).loss)))
            model.step(1e-2, model.gradient_norm())
        return losses, backend.kernel_choices(), backend.fused_kernels()

    expected, composed, _ = trained("default")
    blocks.clear()
    found, chosen, names = trained(NAMED)
    assert blocks
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    assert (chosen["routed_mlp"], chosen["grouped_mlp"]) == ("grouped_mm", "grouped_mm")
    assert names["routed_mlp"] == "grouped_mm"
    assert composed["routed_mlp"].endswith("; as backend.kernels says")
    assert chosen["adamw"] == composed["adamw"] == "torch.optim.AdamW, fused"


def test_sizes_beyond_a_named_form_are_refused_before_a_model_runs():
    moe = TINY.moe.model_copy(update={"expert_hidden": 20})
    lm = DecoderLM(TINY.model_copy(update={"moe": moe}), VOCAB_SIZE)
    params = initial_parameters(lm.parameter_specs(), seed=0)
    backend = get_backend(BackendConfig(device="cpu", dtype="bfloat16", kernels={"routed_mlp": "grouped_mm"}))
    with pytest.raises(BackendUnavailableError, match="routed_mlp: grouped_mm: the widths are 16 and 20"):
        backend.evaluation_model(lm, params)
