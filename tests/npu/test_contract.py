"""The adapter refuses what the documentation forbids, before torch_npu, which lets it pass, is called."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moeport.backends.torch.npu import operators
from moeport.backends.torch.npu.contract import ContractError
from tests.npu.emulation.fused.rules import RefusedError
from tests.npu.forbidden import D, E, F, R, there, whole
from tests.npu.recorded import recorded

bfloat16, float64, int32 = torch.bfloat16, torch.float64, torch.int32


def rows(groups=(2, 3, 3, 0), x=(R, D), weight=(E, D, F), kind=torch.int64, dtype=torch.float32, other=None):
    groups = whole(*groups, dtype=kind)
    return operators.grouped_matmul(there(*x, dtype=dtype), there(*weight, dtype=other or dtype), groups, 0)


def columns(x, weight=(R, F), groups=(2, 3, 3, 0)):
    return operators.grouped_matmul(x, there(*weight), whole(*groups), 2)


def attention(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=None, other=torch.float32, mask=None):
    return operators.fusion_attention(there(*q), there(*k), there(*(v or k), dtype=other), mask)


def rotary(x=(2, 5, 3, 8), cos=(1, 5, 1, 8), dtype=torch.float32):
    return operators.rotary_mul(there(*x, dtype=dtype), there(*cos, dtype=dtype), there(*cos, dtype=dtype))


def unpermuted(places=8, kind=int32, probs=(4, 2), dtype=torch.float32):
    return operators.token_unpermute(there(R, D, dtype=dtype), whole(*range(places), dtype=kind), there(*probs))


SEEN = {
    "rms norm: another width": lambda: operators.rms_norm(there(R, D), there(D + 1), 1e-6),
    "rms norm: a narrower weight": lambda: operators.rms_norm(there(R, D), there(D, dtype=bfloat16), 1e-6),
    "rms norm: float64": lambda: operators.rms_norm(there(R, D, dtype=float64), there(D, dtype=float64), 1e-6),
    "swiglu: an odd width": lambda: operators.swiglu(there(R, 7)),
    "swiglu: strided": lambda: operators.swiglu(there(D, R).t()),
    "swiglu: empty": lambda: operators.swiglu(there(0, D)),
    "rotary: narrow tables": lambda: rotary(cos=(1, 5, 1, 4)),
    "rotary: tables of other positions": lambda: rotary(cos=(1, 4, 1, 8)),
    "rotary: tables of other sequences": lambda: rotary(cos=(3, 5, 1, 8)),
    "rotary: an odd width": lambda: rotary((2, 5, 3, 7), (1, 5, 1, 7)),
    "rotary: wide heads": lambda: rotary((1, 2, 1, 896), (1, 2, 1, 896)),
    "rotary: float64": lambda: rotary(dtype=float64),
    "attention: heads that cannot be shared": lambda: attention(k=(2, 5, 3, 8)),
    "attention: keys of another width": lambda: attention(k=(2, 5, 2, 4)),
    "attention: more keys than values": lambda: attention(v=(2, 4, 2, 8)),
    "attention: wide heads": lambda: attention((1, 2, 1, 772), (1, 2, 1, 772)),
    "attention: too many heads": lambda: attention((1, 2, 257, 4), (1, 2, 257, 4)),
    "attention: two types": lambda: attention(other=bfloat16),
    "attention: a mask of the size of the scores": lambda: attention(mask=there(5, 5, dtype=torch.bool)),
    "attention: a mask of numbers": lambda: attention(mask=there(2048, 2048)),
    "attention: a mask of other sequences": lambda: attention(mask=there(3, 1, 5, 5, dtype=torch.bool)),
    "grouped matmul: counts of int32": lambda: rows(kind=int32),
    "grouped matmul: a group too few": lambda: rows((2, 3, 3)),
    "grouped matmul: one group": lambda: rows((R,), weight=(1, D, F)),
    "grouped matmul: other inner dims": lambda: rows(weight=(E, D + 1, F)),
    "grouped matmul: float64": lambda: rows(dtype=float64),
    "grouped matmul: two types": lambda: rows(other=bfloat16),
    "grouped matmul: a wide result": lambda: rows(weight=(E, D, 65536)),
    "grouped matmul: a transposed x": lambda: operators.grouped_matmul(
        there(D, R).t(), there(E, D, F), whole(2, 3, 3, 0), 0
    ),
    "grouped matmul: a weight gradient of x as it is": lambda: columns(there(D, R)),
    "permute: indices that are no integers": lambda: operators.token_permute(there(4, D), there(4, 2)),
    "permute: indices of other tokens": lambda: operators.token_permute(there(4, D), whole(1, 2, 3).view(3, 1)),
    "permute: float64": lambda: operators.token_permute(there(4, D, dtype=float64), whole(1, 2, 3, 0).view(4, 1)),
    "permute: 513 indices": lambda: operators.token_permute(there(1, D), whole(*range(513)).view(1, 513)),
    "unpermute: places of int64": lambda: unpermuted(kind=torch.int64),
    "unpermute: other probabilities": lambda: unpermuted(probs=(3, 2)),
    "unpermute: float64": lambda: unpermuted(dtype=float64),
}
"""Calls that are wrong by types, shapes and strides."""
COUNTED = {
    "rows behind the last group": lambda: rows((2, 3, 2, 0)),
    "more than all rows": lambda: rows((2, 3, 4, 0)),
    "sums taken for counts": lambda: rows((2, 5, 8, 8)),
    "a negative count": lambda: rows((2, 7, -1, 0)),
    "columns behind the last group": lambda: columns(there(R, D).t(), groups=(2, 3, 2, 0)),
}
"""Calls that are wrong by the values of the counts, which are read where every call waits for the device anyway."""
WRONG = SEEN | COUNTED


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_it_is_refused_and_never_called(monkeypatch, call):
    with recorded(monkeypatch) as made, pytest.raises(ContractError, match="expected"):
        call()
    assert not made


@pytest.mark.parametrize("call", SEEN.values(), ids=SEEN)
def test_it_is_refused_without_values(call):
    with FakeTensorMode(), pytest.raises(ContractError, match="expected"):
        call()


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_torch_npu_would_let_it_pass(monkeypatch, call):
    monkeypatch.setattr(operators, "check", lambda operator, problems: None)
    with FakeTensorMode():
        call()


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_the_emulation_would_refuse_it(monkeypatch, call):
    """The adapter's rules and those of the emulation are written apart."""
    monkeypatch.setattr(operators, "check", lambda operator, problems: None)
    with pytest.raises(RefusedError, match="forbidden: "):
        call()


def test_what_is_right_is_called(monkeypatch):
    with recorded(monkeypatch) as made:
        rows()
        columns(there(R, D).t())
        attention(mask=torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu())
        rotary()
        unpermuted()
        operators.token_permute(there(4, D), whole(1, 2, 3, 0).view(4, 1))
        operators.rms_norm(there(R, D), there(D), 1e-6)
        operators.swiglu(there(R, D))
    assert {name for name, _, _ in made} == set(operators.OPERATORS)
