"""The table of schemas is that of the installed torch_npu, and PyTorch binds calls to it as it says."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.npu.emulation.fused import OPERATORS
from tests.npu.environment import VERSION
from tests.npu.recorded import recorded
from tests.npu.schemas import Release, pinned, written_in

PINNED = pinned()


@pytest.fixture(scope="module")
def releases():
    return {name: Release(name, schemas) for name, schemas in PINNED.items()}


def test_supported_releases_are_pinned():
    assert {release.partition(".post")[0] for release in PINNED} == {"2.11.0", "2.12.0", "2.13.0", "2.14.0"}
    assert set(PINNED[VERSION]) == set(OPERATORS)
    for schemas in PINNED.values():
        assert set(schemas) >= {name for name in OPERATORS if not name.startswith("_") and "_grad" not in name}


@pytest.mark.parametrize("name", PINNED[VERSION])
def test_the_installed_release_has_registered_them(name):
    registered = getattr(torch.ops.npu, name).default._schema
    assert str(registered) == str(torch._C.parse_schema(f"npu::{PINNED[VERSION][name]}"))


def test_what_is_read_from_a_library_is_what_is_registered():
    """As the other releases were read: from the strings of their libraries."""
    folder = Path(importlib.util.find_spec("torch_npu").origin).parent
    found = {}
    for library in folder.rglob("*.so"):
        found |= written_in(library.read_bytes(), PINNED[VERSION])
    assert found == {name: {schema} for name, schema in PINNED[VERSION].items()}


@pytest.mark.parametrize("release", PINNED)
def test_a_call_of_another_form_is_refused(releases, release):
    x = torch.ones(4, 8)
    operators = releases[release]
    operators.take("npu_swiglu", (x,), {"dim": -1})
    operators.take("npu_grouped_matmul", ([x], [x]), {"group_list": x, "group_type": 0})
    for name, args, kwargs in (
        ("npu_swiglu", (x,), {"axis": -1}),
        ("npu_swiglu", (x, -1, True), {}),
        ("npu_swiglu", (), {"dim": -1}),
        ("npu_grouped_matmul", (x, [x]), {"group_list": x}),
        ("npu_grouped_matmul", ([x], [x]), {"group_lists": x}),
        ("npu_grouped_matmul", ([x], [x], None), {}),
    ):
        with pytest.raises((RuntimeError, TypeError), match=name):
            operators.take(name, args, kwargs)


def test_a_keyword_of_later_releases_alone_is_noticed(releases):
    call = ("npu_moe_gating_top_k", (torch.ones(4, 8), 2), {"input_ids": None})
    releases["2.13.0"].take(*call)
    with pytest.raises(RuntimeError, match="input_ids"):
        releases["2.12.0"].take(*call)


def test_calls_are_recorded_in_backward_too(monkeypatch):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.ops.npu.npu_swiglu.default(x, dim=1)

        @staticmethod
        def backward(ctx, grad):
            return torch.ops.npu.npu_swiglu_backward(grad, torch.cat([grad, grad], 1), dim=1)

    with recorded(monkeypatch) as made:
        Twice.apply(torch.ones(2, 8).npu().requires_grad_()).sum().backward()
    assert [(name, kwargs) for name, _, kwargs in made] == [
        ("npu_swiglu", {"dim": 1}),
        ("npu_swiglu_backward", {"dim": 1}),
    ]
