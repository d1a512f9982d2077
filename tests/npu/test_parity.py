"""`moeport parity` between the CPU and the real torch_npu front end, whose kernels are emulated."""

import json

import pytest

from moeport.parity.options import PARTS
from moeport.parity.run import run
from moeport.parity.subject import Size
from moeport.routers import BY_NAME
from tests.npu.emulation import calls
from tests.parity.conftest import parity  # noqa: F401  (a fixture)
from tests.parity.test_backends import options
from tests.parity.tiny import config_file

SMALL = Size(sequences=2, tokens=12, steps=2)
UNROUTED = ("forced_balance",)
"""Routers that compute no decision: places alone tell where tokens go. (`soft` decides which vectors are near zero.)"""


def assert_looked(found, name):
    """A verdict on every part, from tensors that the device has computed."""
    assert found.verdict == "pass", "\n".join([found.headline, *(f"{t.name}: {t.reason}" for t in found.tensors)])
    judged = {row.part: row.judged for row in found.coverage}
    routing = "not asked" if name in UNROUTED else "judged"
    assert judged == dict.fromkeys(["weights and inputs", *PARTS], "judged") | {"routing": routing}
    one_sided = [tensor for tensor in found.only_a + found.only_b if ":routed_mlp" not in tensor]
    assert not one_sided  # but for what is recorded beside its parts where it is fused, as on the CPU
    kinds = {tensor.kind for tensor in found.tensors}
    assert {"activation", "score", "plan", "loss", "gradient", "training gradient", "moment", "update"} <= kinds
    assert len(found.trajectory) == SMALL.steps
    assert "device" in {difference.key for difference in found.differences}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_router(tmp_path, name):
    file = config_file(tmp_path, options(BY_NAME[name].config_class).model_dump(mode="json"))
    before = sum(calls.values())
    (found,) = run(file, ["torch-cpu", "torch-npu"], size=SMALL, golden=None).comparisons
    assert_looked(found, name)
    assert sum(calls.values()) - before > 1000, "the device has not computed it"


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_types(tmp_path, dtype):
    variants = [f"torch-cpu:{dtype}", f"torch-npu:{dtype}"]
    (found,) = run(config_file(tmp_path), variants, size=SMALL).comparisons
    assert_looked(found, "topk")


def test_the_command_with_ranks(tmp_path, parity):  # noqa: F811
    """Two ranks that share the experts, over `hccl`, and one process: both as on the CPU."""
    variants = ["--backends", "torch-cpu,torch-npu", "--variant", "torch-npu@2 parallelism.expert=2"]
    code, out, err = parity("run", str(config_file(tmp_path)), *variants, "--steps", "1", "--json", "report.json")
    assert code == 0, out + err
    found = json.loads((tmp_path / "report.json").read_text())["comparisons"]
    assert [each["verdict"] for each in found] == ["pass", "pass"]
    for each in found:
        assert {row["judged"] for row in each["coverage"]} == {"judged"}
