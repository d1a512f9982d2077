"""Tensors of every kind in models from elsewhere: judged by their own rules or noted, never fatal."""

from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import moeport.torch  # noqa: E402
from moeport.parity.bundle import load_bundle  # noqa: E402
from moeport.parity.compare import compare  # noqa: E402
from moeport.parity.recording import SAMPLED, STATISTICS, STORED  # noqa: E402

FLOAT8 = [name for name in STORED if name.startswith("float8")]


def base():
    torch.manual_seed(1)
    return torch.randn(12, 16)


def quantised(x):
    return torch.quantize_per_tensor(x, 0.05, 10, torch.quint8)


def to_float8(x, name):
    return x.abs().to(getattr(torch, name))


KINDS: dict[str, Any] = {
    "complex64": lambda x: torch.complex(x, x.flip(0)),
    "complex128": lambda x: torch.complex(x.double(), x.flip(0).double()).conj(),
    "bool": lambda x: x > 0,
    "int64": lambda x: (x * 10).long(),
    "uint16": lambda x: (x.abs() * 10).to(torch.uint16),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "quint8": quantised,
    "coo": lambda x: x.relu().to_sparse(),
    "csr": lambda x: x.relu().to_sparse_csr(),
    "csc": lambda x: x.relu().to_sparse_csc(),
    "bsr": lambda x: x.relu().to_sparse_bsr((2, 2)),
    "nested": lambda x: torch.nested.nested_tensor([x[:5], x[5:]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[:5], x[5:]], layout=torch.jagged),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0],
    "negated view": lambda x: torch.complex(x, x).conj().imag,
    **{name: partial(to_float8, name=name) for name in FLOAT8 if hasattr(torch, name)},
}
UNREADABLE = {
    "meta": lambda x: x.to("meta"),
    "uint4": lambda x: torch.zeros(4, dtype=torch.uint8).view(torch.uint4),
    "bits8": lambda x: torch.zeros(4, dtype=torch.uint8).view(torch.bits8),
}
if hasattr(torch, "float4_e2m1fn_x2"):
    UNREADABLE["float4"] = lambda x: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


class Holder(nn.Module):
    """A model that has a tensor as a buffer, takes it and returns it."""

    def __init__(self, held):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(16))
        self.register_buffer("held", held)

    def forward(self, x, given):
        return self.linear(x), given


def recorded(make, change=lambda x: x, keep=SAMPLED, path=None, sample_size=16):
    model = Holder(make(base()))
    with moeport.torch.record(model, path, name="side", keep=keep, sample_size=sample_size) as recording:
        model(base(), make(change(base())))[0].sum().backward()
    return recording.recording


def other(x):
    x = x.clone()
    x[3] = x[3].flip(0) + 1
    return x


def rounded(x):
    """Every other row is off by one unit in the last place."""
    x = x.clone()
    x[::2] = torch.nextafter(x[::2], torch.tensor(9.0))
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tensors_pass_and_others_do_not(kind, tmp_path):
    make = KINDS[kind]
    for i, keep in enumerate((SAMPLED, {}, STATISTICS)):
        recorded(make, keep=keep, path=tmp_path / f"{kind}{i}")
        a = load_bundle(tmp_path / f"{kind}{i}")
        found = compare(a, recorded(make, keep=keep))
        # Means and RMS cannot show that two sides agree.
        assert found.verdict == ("warn" if keep is STATISTICS else "pass"), found.headline
        assert {"parameter:held", "input[0][1]", "model:Holder[1]"} <= a.tensors.keys()
    if kind not in ("empty", "scalar"):
        found = compare(recorded(make, keep={}), recorded(make, other, keep={}))
        assert found.headline.startswith("FAIL input input[0][1]"), found.headline


@pytest.mark.parametrize(
    "kind", [name for name in UNREADABLE if name != "float4" or hasattr(torch, "float4_e2m1fn_x2")]
)
def test_what_cannot_be_read_is_noted(kind):
    found = compare(*(recorded(UNREADABLE[kind]) for _ in range(2)))
    assert found.verdict == "pass"
    assert any(
        "parameter:held, input[0][1], model:Holder[1]" in note and "not recorded: " in note for note in found.notes
    )


@pytest.mark.parametrize("kind", ["complex64", "float8_e4m3fn", "quint8", "coo", "nested"])
def test_rounding_of_another_kind_is_no_fault(kind):
    """Errors of a few float32 roundings pass: complex numbers are compared as numbers, not as bits."""
    found = compare(recorded(KINDS[kind], keep={}), recorded(KINDS[kind], rounded, keep={}))
    assert found.verdict == "pass", found.headline
    assert kind == "float8_e4m3fn" or any("held" in note for note in found.notes)


def test_float8_weights_against_wider_ones():
    make = KINDS["float8_e4m3fn"]
    wide, narrow = recorded(lambda x: make(x).float(), keep={}), recorded(make, keep={})
    assert compare(wide, narrow).verdict == "pass"
    a, b = recorded(lambda x: x.abs(), keep={}), recorded(make, keep={})
    results = {tensor.name: tensor for tensor in compare(a, b).tensors}
    assert results["parameter:held"].verdict == "pass"
    assert 0 < results["parameter:held"].error < results["parameter:held"].limit
    assert b.dtype == "float32"


def test_lazy_parameters_are_noted():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with moeport.torch.record(model) as recording:
        model(base())
    assert any("0.weight" in note and "before the first pass" in note for note in recording.recording.notes)
    assert "0:LazyLinear" in recording.recording.tensors or "0:Linear" in recording.recording.tensors


def test_sparse_gradients():
    model = nn.Embedding(32, 4, sparse=True)
    with moeport.torch.record(model, keep={}) as recording:
        model(torch.tensor([1, 5])).sum().backward()
    assert recording.recording.tensors["gradient:weight"].shape == (32, 4)
    assert any("sparse" in note for note in recording.recording.notes)


def test_a_distributed_tensor_is_gathered():
    from torch.distributed.tensor import DTensor, init_device_mesh

    from tests.jobs.ports import free_port

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        a, b = (
            recorded(lambda x, to=to: to(x), keep={}) for to in (lambda x: x, lambda x: DTensor.from_local(x, mesh))
        )
        assert compare(a, b).equal
    finally:
        torch.distributed.destroy_process_group()


def test_a_mask_in_a_buffer_is_no_fault():
    def mask(x):
        return torch.full((4, 4), float("-inf")).triu(1)

    assert recorded(mask).non_finite is None
    assert compare(recorded(mask), recorded(mask)).verdict == "pass"


class Breaks(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.linear = nn.Linear(16, 3000)

        def spoil(module, args, out):
            out.data[5, 2999] = value

        self.linear.register_forward_hook(spoil)

    def forward(self, x):
        return self.linear(x).relu()


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_single_entry_that_is_not_finite_is_found(value, word, tmp_path):
    """Although only a sample of the entries is kept; and an error that a check for NaN raises keeps the bundle."""
    model = Breaks(value)

    def checked():
        with moeport.torch.record(model, tmp_path / "b", name="mine", sample_size=10):
            if not model(base()).isfinite().all():
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        checked()
    kept = load_bundle(tmp_path / "b")
    assert kept.non_finite == f"{word} in linear:Linear (operation Linear, forward pass, 1 of 36000 entries)"
    assert any("ended with RuntimeError" in note for note in kept.notes)
