"""The benchmark of a whole step on a tiny model: who takes part, what is compared, what is written."""

import json

import pytest

torch = pytest.importorskip("torch")

import step  # noqa: E402
import trials  # noqa: E402
from contest.models import MODELS, config_of, described  # noqa: E402
from contest.steps import ablations  # noqa: E402

TINY = ["--device=cpu", "--tiny", "--dtype=float32"]


def test_the_844_m_model_has_844_m_parameters():
    found = described(config_of("844m", "cpu", "bfloat16"), "844m")
    assert round(found["parameters"] / 1e6) == 844
    assert round(found["active"] / 1e6) == 139
    assert found["tokens"] == 32768


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_a_valid_config(name):
    assert config_of(name, "cpu", "float32", ["optimizer.eps=1e-6"]).optimizer.eps == 1e-6


def test_moeport_and_the_plain_model_take_turns_from_equal_weights(tmp_path):
    found = step.main([*TINY, "--others=plain torch", "--variant=uncut:optimizer.clip_norm=null", f"--out={tmp_path}"])
    rows = found["cells"][0]["rows"]
    assert {name: len(row["step_s"]) for name, row in rows.items()} == {"moeport": 6, "uncut": 2, "plain torch": 2}
    assert rows["plain torch"]["loss"] == pytest.approx(rows["moeport"]["loss"], rel=1e-5)
    assert not any("reason" in row for row in rows.values())
    assert rows["moeport"]["held"] > 0
    assert rows["moeport"]["over_moeport"] == [1, 1]
    assert json.loads((tmp_path / "step.json").read_text()) == found
    assert "plain torch" in (tmp_path / "step.md").read_text()


def test_a_model_that_computes_something_else_is_named(monkeypatch):
    monkeypatch.setattr("contest.steps.plain", lambda config, weights: lambda batch: torch.tensor(3.0))
    rows = step.main([*TINY, "--others=plain torch"])["cells"][0]["rows"]
    assert rows["plain torch"]["reason"].startswith("wrong: a first loss of 3 instead of")


def test_every_kernel_with_a_fused_form_is_left_out_in_turn():
    assert ablations("npu")[1].overrides == ["backend.kernels={rms_norm: default}"]
    assert {way.name for way in ablations("npu")} >= {"moeport without grouped_mlp", "moeport without fused kernels"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--variant=fast", "--variant fast: expected NAME:KEY=VALUE"),
        ("--variant=fast:backend.fast=true", "backend.fast: unknown key"),
        ("--others=plain", "--others: plain: unknown; expected some of plain torch"),
        ("--models=no.yaml", "no.yaml: no such file"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_timed(option, message):
    with pytest.raises(SystemExit, match=message):
        step.main([*TINY, option])


def test_trials_say_what_computes_each_kernel(tmp_path):
    found = trials.main(["--device=cpu", f"--out={tmp_path}"])
    assert set(found) == {"bfloat16", "float32"}
    assert "| grouped_mlp | float32 |" in (tmp_path / "trials.md").read_text()


@pytest.mark.slow
def test_processes_of_their_own_and_transformers(tmp_path):
    found = step.main([*TINY, "--ablate", "--isolate", f"--out={tmp_path}"])
    rows = found["cells"][0]["rows"]
    assert {"moeport", "moeport without fused kernels", "plain torch", "transformers Qwen3-MoE"} <= set(rows)
    assert len(rows["transformers Qwen3-MoE"].get("step_s", [1, 1])) == 2  # or it is not installed
