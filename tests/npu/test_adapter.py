"""The adapter on the real front end of torch_npu over emulated kernels: which operators run, and what they give."""

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import moeport.torch
from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.backends.examine import TINY, VOCAB_SIZE
from moeport.backends.examples import EXAMPLES, plan_of
from moeport.backends.torch import fused
from moeport.backends.torch.fused import FusedOps, operations, value_and_gradients
from moeport.backends.torch.npu import kernels, operators
from moeport.backends.torch.npu.contract import ContractError
from moeport.backends.torch.ops import TorchOps
from moeport.backends.trial import TOLERANCE, disagreement
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.errors import BackendUnavailableError, UserError
from moeport.facts import BACKENDS
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from tests.npu.emulation import calls
from tests.npu.emulation.aten import TO_HOST
from tests.support import grid

NPU = "npu"
TYPES = ("float32", "bfloat16", "float16")
NAMES = {fact.kernel: fact.name for fact in BACKENDS["torch"].fused_on("npu")}
RUN = {  # what one forward and backward pass calls
    "rms_norm": {"npu_rms_norm", "npu_rms_norm_backward"},
    "rope": {"npu_rotary_mul", "npu_rotary_mul_backward"},
    "attention": {"npu_fusion_attention", "npu_fusion_attention_grad"},
    "swiglu": {"npu_swiglu", "npu_swiglu_backward"},
    "grouped_mlp": {"npu_grouped_matmul"},
    "permute": {"npu_moe_token_permute", "npu_moe_token_permute_grad_v2"},
    "unpermute": {"_npu_moe_token_unpermute", "npu_moe_token_unpermute_grad_v2"},
}


class Called:
    """The operators of torch_npu that ran inside the block."""

    def __enter__(self):
        self.before = calls.copy()
        return self

    def __exit__(self, *_):
        ran = calls - self.before
        self.counts = {name.removeprefix("npu::"): ran[name] for name in ran if name.startswith("npu::")}

    def __call__(self, *names):
        return [self.counts.get(name, 0) for name in names]


def on_npu(setting="auto", device=NPU) -> Any:
    """Operations with fused kernels, if the setting does not say otherwise."""
    return operations(torch.device(device), setting)


def there(x):
    return x.to(NPU) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", TYPES)
def test_every_operator_passes_its_trial(dtype):
    ops = on_npu()
    assert {*RUN, "adamw"} == set(NAMES)
    assert {kernel: ops.choice(kernel, dtype).label for kernel in RUN} == {kernel: NAMES[kernel] for kernel in RUN}


def test_backend_says_what_it_uses():
    backend = get_backend(BackendConfig(device="npu", dtype="bfloat16"))
    chosen = backend.kernel_choices()
    assert {kernel: chosen[kernel] for kernel in NAMES} == NAMES == backend.fused_kernels()
    assert "compute capability" not in str(chosen)
    wide = get_backend(BackendConfig(device="npu", dtype="float64")).kernel_choices()
    assert wide["swiglu"] == "silu, then multiply; npu_swiglu does not compute in float64"
    plain = get_backend(BackendConfig(device="npu", kernels="default")).kernel_choices()
    assert plain["grouped_mlp"] == "one product per expert in one autograd node; as backend.kernels says"
    some = get_backend(BackendConfig(device="npu", kernels={"rope": "default"})).kernel_choices()
    assert some["rope"] == "rolled halves and addcmul; as backend.kernels says"
    assert some["adamw"] == "_fused_adamw_"
    with pytest.raises(
        BackendUnavailableError, match="rope: npu_rotary_mul does not compute in float64; set rope to auto"
    ):
        get_backend(BackendConfig(device="npu", dtype="float64", kernels={"rope": "npu_rotary_mul"})).kernel_choices()


def test_nothing_is_tried_before_a_rank_has_its_device(monkeypatch):
    """All ranks of a node are on the first device until their communicator gives each its own."""
    monkeypatch.setattr(fused, "_made", {})
    with Called() as called:
        backend: Any = get_backend(BackendConfig(device="npu"))
    assert not called.counts
    assert backend.torch_device.index is None
    with Called() as called:
        backend.kernel_choices()
    assert called.counts


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernel", RUN)
def test_a_fused_kernel_gives_what_the_composition_gives(kernel, dtype):
    """In values and gradients, and by its operators."""
    ops, plain = on_npu(), TorchOps(torch.device("cpu"))
    ops.prepare(dtype)
    for example in EXAMPLES[kernel]:
        arguments, differentiated = example(ops, dtype)
        expected = value_and_gradients(plain, getattr(plain, kernel), *example(plain, dtype))
        with Called() as called:
            received = value_and_gradients(ops, getattr(ops, kernel), arguments, differentiated)
        assert disagreement(expected, received, TOLERANCE[dtype]) is None
        is_one_group = kernel == "grouped_mlp" and arguments[1].shape[0] == 1
        assert all(called(*RUN[kernel])) == (not is_one_group)


def grouped(counts, rows, dtype="float32"):
    """Arguments of grouped_mlp, on the CPU."""
    experts, kind = len(counts), getattr(torch, dtype)
    x, w_in, w_out = (
        torch.tensor(grid(i, *s) / 4) for i, s in enumerate([(rows, 8), (experts, 12, 8), (experts, 8, 6)])
    )
    return [x.to(kind), w_in.float(), w_out.float(), torch.tensor(counts), "swiglu"]


@pytest.mark.parametrize(
    "counts",
    [[2, 3, 4], [9, 0, 0], [0, 0, 9], [0, 4, 0], [0, 0, 0], [5], [9], [0], [1] * 9],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_without_rows_and_rows_without_experts(counts, dtype):
    ops, plain = on_npu(), TorchOps(torch.device("cpu"))
    ops.prepare(dtype)
    arguments = grouped(counts, 9, dtype)
    expected = value_and_gradients(plain, plain.grouped_mlp, arguments, 3)
    with Called() as called:
        received = value_and_gradients(ops, ops.grouped_mlp, [there(x) for x in arguments], 3)
    for want, got in zip(expected, received, strict=True):
        np.testing.assert_allclose(
            got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(np.abs(want).max(), 1e-3)
        )
    assert not received[0][sum(counts) :].any()
    products = 0 if len(counts) == 1 else 6  # two forward, and a gradient of the rows and of the weights for each
    assert called("npu_grouped_matmul") == [products]


def test_rows_of_nobody_may_hold_anything():
    ops = on_npu()
    x, *rest = (there(x) for x in grouped([2, 3], 7))
    x[5:] = float("nan")
    received = value_and_gradients(ops, ops.grouped_mlp, [x, *rest], 3)
    assert all(np.isfinite(array).all() for array in received)
    assert not received[0][5:].any()
    assert not received[1][5:].any()


def test_counts_stay_on_the_device(monkeypatch):
    """Reading them would make every layer wait."""
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "0")

    def read(ops):
        ops.prepare("float32")
        arguments = [there(x) for x in grouped([2, 0, 3], 7)]
        before = calls.copy()
        y = ops.grouped_mlp(*(x.requires_grad_() if i < 3 else x for i, x in enumerate(arguments)))
        y.sum().backward()
        ran = calls - before
        return [ran[name] for name in ("npu::npu_grouped_matmul", "aten::_local_scalar_dense", TO_HOST)]

    assert read(on_npu()) == [6, 0, 0]
    assert sum(read(on_npu("default"))) > 0  # the composition reads them


def test_the_operator_gets_a_group_for_every_row():
    x, w_in, _, _, _ = (there(x) for x in grouped([2, 3], 7))
    with pytest.raises(ContractError, match="group_list covers 5 rows; expected all 7"):
        operators.grouped_matmul(x, w_in.mT, torch.tensor([2, 3], device=NPU), group_type=0)
    with pytest.raises(ContractError, match="group_list is int32; expected int64"):
        operators.grouped_matmul(x, w_in.mT, torch.tensor([2, 5], dtype=torch.int32, device=NPU), group_type=0)


def test_one_that_is_broken_on_the_device_is_left_out(monkeypatch):
    monkeypatch.setattr(operators, "swiglu", lambda x: x[..., : x.shape[-1] // 2] * 0)
    monkeypatch.setattr(
        kernels.GroupedProduct, "apply", lambda x, w, counts: operators.grouped_matmul(x, w.mT, counts, 0)
    )
    choices = kernels_chosen()
    assert choices["swiglu"] == "npu_swiglu is wrong on this device by 1.0e+00"
    assert choices["grouped_mlp"] == "npu_grouped_matmul has no gradient of its argument 1 on this device"
    assert choices["rope"] == "npu_rotary_mul"


def kernels_chosen():
    ops = FusedOps(torch.device(NPU), kernels.CANDIDATES, "auto")
    return {kernel: ops.choice(kernel, "float32").label for kernel in RUN}


@pytest.mark.parametrize("wrong", ["forward permutation", "weight gradient"])
def test_planted_faults_are_found(monkeypatch, wrong):
    if wrong == "forward permutation":
        monkeypatch.setattr(kernels, "_positions", lambda plan: plan.order_R.to(torch.int32).view(plan.num_tokens, -1))
        labels = [kernels_chosen()[kernel] for kernel in ("permute", "unpermute")]
        assert all("is wrong on this device by" in label for label in labels)
    else:
        real = operators.grouped_matmul
        monkeypatch.setattr(
            operators, "grouped_matmul", lambda x, w, n, group_type: real(x, w, n, group_type) * (group_type == 0)
        )
        assert kernels_chosen()["grouped_mlp"] == "npu_grouped_matmul is wrong on this device by 1.0e+00"


def test_second_derivatives_are_refused_and_transforms_take_the_composition():
    ops, plain = on_npu(), TorchOps(torch.device("cpu"))
    x = torch.tensor(grid(0, 3, 8), dtype=torch.float32)
    y = ops.swiglu(x.to(NPU).requires_grad_())
    with pytest.raises(UserError, match="npu_swiglu has no second derivative"):
        torch.autograd.grad(y.sum(), y, create_graph=True)
    expected = torch.func.grad(lambda x: plain.swiglu(x).square().sum())(x)
    with Called() as called:
        received = torch.func.grad(lambda x: ops.swiglu(x).square().sum())(x.to(NPU))
    assert called("npu_swiglu") == [0]
    torch.testing.assert_close(received.cpu(), expected)


def layers(**options):
    """The same layer on both devices."""
    given: Any = {
        "d_model": 16,
        "num_experts": 4,
        "expert_hidden": 8,
        "router_options": {"top_k": 2},
        "seed": 0,
    } | options
    return moeport.torch.MoE(**given), moeport.torch.MoE(**given).to(NPU)


def passed(layer, x):
    x = x.detach().to(next(layer.parameters()).device).requires_grad_()
    y = layer(x)
    (y.float().square().mean() + layer.auxiliary_loss).backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in layer.named_parameters()}
    return {"y": y.detach().cpu(), "x": x.grad.cpu(), **gradients}


CAPACITY = {"policy": "factor", "factor": 0.5}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity": CAPACITY},
        {"num_shared_experts": 1, "activation": "gelu"},
        {"num_experts": 1, "router_options": {"top_k": 1}},
    ],
    ids=["topk", "drops", "gelu", "one expert"],
)
def test_the_layer_of_users_runs_fused(options):
    here, away = layers(**options)
    x = torch.tensor(grid(0, 3, 5, 16), dtype=torch.float32)
    expected = passed(here, x)
    away(x.to(NPU))  # tries the operators
    with Called() as called:
        received = passed(away, x)
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-6)
    assert all(called("npu_moe_token_permute", "npu_moe_token_permute_grad_v2", "_npu_moe_token_unpermute"))
    assert called("npu_grouped_matmul") == [0 if options.get("num_experts") == 1 else 6]


def test_the_layer_of_users_can_run_without_them():
    _, away = layers(kernels="default")
    with Called() as called:
        passed(away, torch.tensor(grid(0, 3, 5, 16), dtype=torch.float32))
    assert not called.counts


def test_experts_that_choose_take_the_composition_for_their_rows():
    here, away = layers(router="expert_choice", router_options={})
    x = torch.tensor(grid(0, 2, 8, 16), dtype=torch.float32)
    expected = passed(here, x)
    away(x.to(NPU))  # tries the operators
    with Called() as called:
        received = passed(away, x)
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-6)
    assert called("npu_moe_token_permute") == [0]
    assert called("npu_grouped_matmul")[0] >= 6


def test_checkpointing_and_autocast_around_the_first_call(monkeypatch):
    """The trial happens in the middle of them, and leaves no trace."""
    monkeypatch.setattr(fused, "_made", {})
    here, away = layers()
    x = torch.tensor(grid(0, 3, 5, 16), dtype=torch.float32)
    expected = passed(here, x)["y"]
    with torch.autocast("npu", dtype=torch.bfloat16):
        y = torch.utils.checkpoint.checkpoint(away, x.to(NPU), use_reentrant=False)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.detach().float().cpu(), expected, rtol=0.1, atol=0.1)
    assert all(parameter.grad is not None for parameter in away.experts.parameters())


def test_shapes_without_memory():
    """Forward and backward with the meta kernels of torch_npu; nothing is tried with them."""
    on_npu().prepare("bfloat16")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Called() as called:
        x = mode.from_tensor(torch.empty(3, 5, 16, dtype=torch.bfloat16, device=NPU))
        y = on_npu().swiglu(x.requires_grad_())
        y.sum().backward()
        q = mode.from_tensor(torch.empty(2, 4, 4, 8, dtype=torch.bfloat16, device=NPU)).requires_grad_()
        on_npu().attention(q, q, q).sum().backward()
    assert (y.shape, y.dtype, x.grad.shape, q.grad.shape) == ((3, 5, 8), torch.bfloat16, (3, 5, 16), (2, 4, 4, 8))
    assert not called.counts


@pytest.mark.slow
def test_a_compiled_layer_calls_them():
    here, away = layers()
    x = torch.tensor(grid(0, 3, 5, 16), dtype=torch.float32)
    on_npu(device="npu:0").prepare("float32")
    expected = passed(here, x)
    away.compile(backend="aot_eager")
    with Called() as called:
        received = passed(away, x)
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-6)
    assert called("npu_grouped_matmul") == [6]
    assert all(called("npu_moe_token_permute", "npu_swiglu", "_npu_moe_token_unpermute"))


def test_a_model_trains_fused():
    def trained(device, kernels="auto"):
        backend = get_backend(BackendConfig(device=device, kernels=kernels))
        lm = DecoderLM(TINY, VOCAB_SIZE)
        params = initial_parameters(lm.parameter_specs(), seed=0)
        token_BS = np.arange(16).reshape(2, 8)
        model = backend.training_model(lm, params, TrainingOptions(OptimizerConfig()))
        for _ in range(2):
            loss = model.accumulate(Batch(token_BS, token_BS + 1), 1.0).loss
            model.step(1e-2, model.gradient_norm())
        return float(backend.ops.to_numpy(loss)), model.parameters()

    expected = trained("cpu")
    get_backend(BackendConfig(device="npu")).kernel_choices()  # tries the operators
    before = calls["aten::_fused_adamw_"]
    with Called() as called:
        received = trained("npu")
    assert all(called(*(name for names in RUN.values() for name in names)))
    assert calls["aten::_fused_adamw_"] == before + 4  # a group of those that decay, and one of those that do not
    assert received[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(received[1], expected[1], rtol=1e-4, atol=1e-5)
    with Called() as called:
        plain = trained("npu", "default")
    assert not called.counts
    torch.testing.assert_close(plain[1], expected[1], rtol=1e-4, atol=1e-5)


def test_a_model_beyond_the_limits_is_served_and_that_is_said(monkeypatch):
    moe = TINY.moe.model_copy(update={"num_experts": 1025, "expert_hidden": 2})
    lm = DecoderLM(TINY.model_copy(update={"moe": moe}), VOCAB_SIZE)
    params = initial_parameters(lm.parameter_specs(), seed=0)

    def choices(kernels):
        backend = get_backend(BackendConfig(device="npu", kernels=kernels))
        backend.evaluation_model(lm, params)
        return backend.kernel_choices()["grouped_mlp"]

    monkeypatch.setattr(fused, "_made", {})
    assert choices("auto") == (
        "npu_grouped_matmul; where it cannot serve (there are 1025 experts on this rank; expected at most 1024): one "
        "product per expert in one autograd node"
    )
    with pytest.raises(BackendUnavailableError, match="grouped_mlp: npu_grouped_matmul: there are 1025 experts"):
        choices({"grouped_mlp": "npu_grouped_matmul"})


def test_unrouted_assignments_get_no_gradient_through_their_gates():
    ops, plain = on_npu(), TorchOps(torch.device("cpu"))
    expert_N = np.array([2, 3, 3, 0, 1, 3])

    def arguments(ops):
        x, w_in, w_out = (
            ops.from_numpy(grid(i, *s).astype(np.float32)) for i, s in enumerate([(3, 8), (3, 12, 8), (3, 8, 6)])
        )
        weight_N = ops.from_numpy(np.where(expert_N < 3, 0.5, 0).astype(np.float32))
        return x, weight_N, w_in, w_out, plan_of(ops, expert_N, 2, 3)

    def run(ops):
        *leaves, plan = arguments(ops)

        def call(x, weight_N, w_in, w_out):
            return ops.routed_mlp(x, weight_N, plan, w_in, w_out, "swiglu")

        return value_and_gradients(ops, call, leaves, 4)

    assert disagreement(run(plain), run(ops), 1e-5) is None
