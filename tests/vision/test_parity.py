"""Verdicts between backends on the digits."""

import pytest

from moeport.config import config_from_dict, resolved_yaml
from moeport.parity.run import run
from moeport.parity.subject import Size
from tests.parity.test_backends import assert_passes
from tests.vision.tiny import digits_values

pytest.importorskip("torch")


def config_file(folder, router):
    moe = {"num_experts": 4, "expert_hidden": 16, "router": {"name": router}}
    model = {"num_layers": 2, "d_model": 16, "init_std": 0.2, "attention": {"num_heads": 2}, "moe": moe}
    path = folder / "config.yaml"
    path.write_text(resolved_yaml(config_from_dict(digits_values(folder, model=model))))
    return path


@pytest.mark.parametrize("router", ["topk", "soft", "expert_choice"])
def test_numpy_and_torch(tmp_path, router):
    report = run(config_file(tmp_path, router), ["numpy:fp64", "torch-cpu:fp64", "torch-cpu"], size=Size(2, steps=2))
    assert_passes(report, 2)
    assert {"activation", "loss", "gradient", "update"} <= {t.kind for t in report.comparisons[1].tensors}
    assert report.comparisons[1].trajectory


def test_a_compiled_block_is_recorded_from_outside(tmp_path):
    variants = ["torch-cpu", "torch-cpu training.activation_checkpointing=true"]
    assert_passes(run(config_file(tmp_path, "topk"), variants, size=Size(2, steps=1)), 1)


def test_mindspore(tmp_path):
    pytest.importorskip("mindspore")
    assert_passes(run(config_file(tmp_path, "topk"), ["numpy:fp64", "mindspore"], size=Size(2, steps=1)), 1)
