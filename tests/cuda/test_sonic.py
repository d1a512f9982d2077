"""SonicMoE as a form of `routed_mlp`, by a stand-in with the signature that its release 0.1.2 documents."""

import sys
from dataclasses import replace
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch

from moeport.backends.torch.cuda import kernels, sonic
from moeport.backends.torch.fused import FusedOps
from moeport.core.ops import Ops
from moeport.errors import BackendUnavailableError
from tests.cuda.cases import CPU, LOADS, inputs, wrong

pytestmark = pytest.mark.usefixtures("bits_may_change")


class ActivationType(Enum):
    SWIGLU = "swiglu"


def moe_general_routing_inputs(
    x,
    router_scores,
    token_indices,
    expert_indices,
    w1,
    b1,
    w2,
    b2,
    E,
    stream_id,
    activation_type,
    is_inference_mode_enabled=False,
    concat_layout=False,
):
    """w1 (2F, D, E) and w2 (D, F, E) with strides of (E, 2F, D) and (E, D, F); assignments in token order."""
    assert router_scores.dtype == torch.float32
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert concat_layout
    assert activation_type is ActivationType.SWIGLU
    assert w1.permute(2, 0, 1).is_contiguous()
    assert w2.permute(2, 0, 1).is_contiguous()
    assert (token_indices.diff() >= 0).all()
    assert int(expert_indices.max()) < E == w1.shape[-1] == w2.shape[-1]
    rows = x[token_indices.long()]
    hidden = torch.einsum("rd,rfd->rf", rows, w1.permute(2, 0, 1)[expert_indices.long()])
    gate, up = hidden.chunk(2, -1)
    a = torch.nn.functional.silu(gate) * up
    y = torch.einsum("rf,rdf->rd", a, w2.permute(2, 0, 1)[expert_indices.long()]) * router_scores.to(x.dtype)[:, None]
    return torch.zeros_like(x).index_add(0, token_indices.long(), y), torch.bincount(expert_indices, minlength=E)


@pytest.fixture
def installed(monkeypatch):
    package: Any = ModuleType("sonicmoe")
    enums: Any = ModuleType("sonicmoe.enums")
    package.moe_general_routing_inputs, enums.ActivationType = moe_general_routing_inputs, ActivationType
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    return package


def on_cpu() -> Any:
    return FusedOps(torch.device("cpu"), kernels.CANDIDATES, {"routed_mlp": "sonicmoe"})


def call(ops, load=LOADS[0], activation="swiglu", **changes):
    (x, gate_N, *weights), plan = inputs(load, activation, torch.bfloat16)
    plan = replace(plan, **changes)
    compose: Any = Ops.routed_mlp
    expected = compose(CPU, x.double(), gate_N.double(), plan, *(w.double() for w in weights), activation)
    return ops.routed_mlp(x, gate_N, plan, *weights, activation), expected


def test_it_is_called_as_documented(installed):
    ops = on_cpu()
    assert ops.choice("routed_mlp", "bfloat16").label == "sonicmoe"
    found, expected = call(ops)
    assert wrong([found], [expected], 2**-6) is None


def test_it_is_not_imported_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "sonicmoe", None)
    setting = {"routed_mlp": "grouped_mm", "grouped_mlp": "grouped_mm"}
    assert FusedOps(torch.device("cpu"), kernels.CANDIDATES, setting).prepare("bfloat16")
    with pytest.raises(BackendUnavailableError, match=r"sonicmoe fails on this device: sonic-moe cannot be imported"):
        on_cpu().prepare("bfloat16")


def test_an_older_interface_is_refused(installed):
    installed.moe_general_routing_inputs = lambda x, router_scores, token_indices, expert_indices: x
    with pytest.raises(BackendUnavailableError, match="no moe_general_routing_inputs with concat_layout"):
        on_cpu().prepare("bfloat16")
    del installed.moe_general_routing_inputs
    with pytest.raises(BackendUnavailableError, match="no moe_general_routing_inputs with router_scores"):
        on_cpu().prepare("bfloat16")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"load": LOADS[1]}, "assignments may be unrouted; expected a router and a capacity that serve all"),
        ({"activation": "gelu"}, "the activation is gelu; expected swiglu"),
        ({"choices_per_token": None}, "experts choose tokens, or rows are rounded; expected K rows per token"),
        ({"load": replace(LOADS[0], width=12)}, "the widths are 12 and 40; expected multiples of 8"),
    ],
)
def test_what_it_cannot_serve_is_refused(installed, options, reason):
    with pytest.raises(BackendUnavailableError, match=f"routed_mlp: sonicmoe: {reason}; set routed_mlp to auto"):
        call(on_cpu(), **options)


def test_it_is_refused_where_bits_must_not_change(installed):
    ops = on_cpu()
    ops.prepare("bfloat16")
    torch.use_deterministic_algorithms(True)
    with pytest.raises(BackendUnavailableError, match="does not promise the same bits"):
        call(ops)


def test_a_compiled_graph_has_the_composition_instead(installed):
    ops = on_cpu()
    ops.prepare("bfloat16")
    (x, gate_N, w_in, w_out), plan = inputs(LOADS[0], "swiglu", torch.bfloat16)
    run = torch.compile(lambda x: ops.routed_mlp(x, gate_N, plan, w_in, w_out, "swiglu"), backend="eager")
    y = run(x)
    assert wrong([y], [sonic.routed_mlp(ops, x, gate_N, plan, w_in, w_out, "swiglu")], 2**-6) is None
