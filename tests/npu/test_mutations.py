"""Tests of the tests: faults planted in the adapter for NPUs, which the suite's own checks must find and name.

A fused operator meets three of them: its trial before use, the conformance suite, and parity with the CPU. The last two
run with the trial switched off, or the fault would never come so far.
"""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.console import Console

from moeport.backends import get_backend
from moeport.backends.torch import fused
from moeport.backends.torch.npu import kernels, operators
from moeport.config.training import BackendConfig
from moeport.conformance.check import CASES, check_gradients, check_values
from moeport.errors import BackendUnavailableError
from moeport.parity.run import run
from moeport.parity.subject import Size
from moeport.training.run import train
from tests.npu.test_training import quickstart
from tests.parity.tiny import config_file


@dataclass(frozen=True)
class Mutation:
    where: Any
    """Holds what is replaced."""
    name: str
    mutated: Any
    """From the real thing to what takes its place."""
    kernel: str
    """Of Ops; the one that it serves."""
    trial: str
    """What the trial says, as a pattern."""
    conformance: str
    """What the suite says of one case at least."""
    parity: str
    """The first line of parity's report, or the error that it ends with."""


def zeros(real):
    """A kernel that writes nothing, over memory that was cleared; its gradients are those of nothing."""
    return lambda *args, **options: real(*args, **options) * 0


def without_weight_gradient(real):
    return staticmethod(lambda ctx, grad_RO: (real(ctx, grad_RO)[0], None, None))


def counts_in_int32(real):
    return lambda x, weight, counts, group_type: real(x, weight, counts.to(torch.int32), group_type)


def not_inverted(real):
    """The order in which rows are sorted in place of the place of each."""
    return lambda plan: plan.order_R.to(torch.int32).unflatten(0, (plan.num_tokens, -1))


def with_a_later_keyword(real):
    """`swiglu_mode` is no argument of this operator in torch_npu 2.13."""
    return lambda x: torch.ops.npu.npu_swiglu.default(x, dim=-1, swiglu_mode=1)


WRONG = "is wrong on this device by "
ZEROS = r"is wrong on this device by 1.0e\+00"
ALL_ZEROS = "all are zeros"
KEYWORD = r"npu::npu_swiglu\(\) expected at most 2 argument\(s\) but received 3"
FIRST = "first tensor beyond tolerance"
INT32 = "npu_grouped_matmul: group_list is int32; expected int64"
MUTATIONS = {
    "the weights of grouped products have no gradient": Mutation(
        kernels.GroupedProduct,
        "backward",
        without_weight_gradient,
        "grouped_mlp",
        "has no gradient of its argument 2 on this device",
        f"by input 1: .*{ALL_ZEROS}",
        "FAIL gradient of layers.1.moe.experts.w_",
    ),
    "group lists are int32": Mutation(operators, "grouped_matmul", counts_in_int32, "grouped_mlp", INT32, INT32, INT32),
    "the forward permutation for the inverse": Mutation(
        kernels, "_positions", not_inverted, "unpermute", WRONG, "values are wrong", f"FAIL layers.0:permute: {FIRST}"
    ),
    "a keyword that 2.13 does not have": Mutation(
        operators, "swiglu", with_a_later_keyword, "swiglu", KEYWORD, KEYWORD, KEYWORD
    ),
}
ZEROS_OF = {
    "rms_norm": ("rms_norm", "layers.0/attention.norm:rms_norm"),
    "rotary_mul": ("rope", "layers.0:rope"),
    "fusion_attention": ("attention", "layers.0:attention"),
    "swiglu": ("swiglu", "layers.0/moe.experts:grouped_mlp"),
    "grouped_matmul": ("grouped_mlp", "layers.0/moe.experts:grouped_mlp"),
    "token_permute": ("permute", "layers.0:permute"),
    "token_unpermute": ("unpermute", "layers.0:unpermute"),
}
"""By operator: the kernel that it serves, and the tensor at which parity says so."""
MUTATIONS |= {
    f"{name} returns zeros": Mutation(
        operators, name, zeros, kernel, ZEROS, ALL_ZEROS, f"FAIL {tensor}: {FIRST}.* zero"
    )
    for name, (kernel, tensor) in ZEROS_OF.items()
}


@pytest.fixture(params=MUTATIONS, ids=lambda name: name.replace(" ", "-"))
def mutation(request, monkeypatch):
    """One fault, planted; operations that were made before it are not used."""
    found = MUTATIONS[request.param]
    monkeypatch.setattr(found.where, found.name, found.mutated(getattr(found.where, found.name)))
    monkeypatch.setattr(fused, "_made", {})
    return found


@pytest.fixture
def untried(monkeypatch):
    """Whatever a device offers is used."""
    monkeypatch.setattr(fused, "fault_of", lambda *_: None)


def backend_with(kernel_setting="auto"):
    return get_backend(BackendConfig(name="torch", device="npu", dtype="float32", kernels=kernel_setting))


def test_the_trial_finds_it(mutation):
    """The composition takes its place and says why; an operator that the user has named ends the run."""
    backend = backend_with()
    choice = backend.ops.choice(mutation.kernel, "float32")
    assert choice.candidate is None
    assert re.search(mutation.trial, choice.label), choice.label
    assert choice.label in backend.kernel_choices()[mutation.kernel]
    operator = choice.label.partition(" ")[0]
    with pytest.raises(BackendUnavailableError, match=f"backend.kernels: {mutation.kernel}: {operator}"):
        backend_with({mutation.kernel: operator}).kernel_choices()


def test_the_conformance_suite_finds_it(mutation, untried):
    said = list(problems(backend_with(), [case for case in CASES if case.op == mutation.kernel]))
    assert any(re.search(mutation.conformance, problem) for problem in said), said


def problems(backend, cases):
    """What the suite says of cases, one after the other; an error is what pytest would show of it."""
    for case in cases:
        for check in [check_values, *[check_gradients] * bool(case.variables)]:
            try:
                found = check(case, backend).problem
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if found:
                yield found


def test_parity_finds_it(mutation, untried, tmp_path):
    try:
        (found,) = run(config_file(tmp_path), ["torch-cpu", "torch-npu"], size=Size(2, 12, 1), golden=None).comparisons
        said = found.headline
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert re.search(mutation.parity, said), said


def test_an_operator_that_nothing_emulates_ends_the_run(monkeypatch, untried, tmp_path):
    """It raises, as the stand-in's every launch does; it never gives a number."""
    monkeypatch.setattr(fused, "_made", {})
    monkeypatch.setattr(operators, "swiglu", lambda x: torch.ops.npu.npu_fast_gelu(x).chunk(2, -1)[0])
    config = quickstart(tmp_path, "npu")
    with pytest.raises(RuntimeError, match="507899"):
        train(config, console=Console(quiet=True))
    assert "total_loss" not in (config.run.dir / "metrics.jsonl").read_text()


def test_without_a_fault_none_is_found(monkeypatch):
    """What the tests above would also fail on."""
    monkeypatch.setattr(fused, "_made", {})
    backend = backend_with()
    for mutation in MUTATIONS.values():
        assert backend.ops.choice(mutation.kernel, "float32").candidate is not None
    kinds = {mutation.kernel for mutation in MUTATIONS.values()}
    assert list(problems(backend, [case for case in CASES if case.op in kinds])) == []
