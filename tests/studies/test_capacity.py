"""Capacity in training, and what `moeport capacity` makes of a run."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import moeport.torch
from moeport.backends import get_backend
from moeport.cli.main import main
from moeport.comm.mesh import single_mesh
from moeport.config import load_config
from moeport.core.parameters import initial_parameters
from moeport.errors import UserError
from moeport.studies.capacity.capacity import Loads, run_capacity, select_layer
from moeport.training.batches import Batches
from moeport.training.checkpoint import list_checkpoints
from moeport.training.metrics import read_metrics
from moeport.training.metrics_table import printed, scalars
from moeport.training.placed import place_model
from moeport.training.run import train
from moeport.training.run_dir import read_config
from moeport.training.task import build_task
from moeport.training.trainer import Trainer
from tests.training.test_checkpoint import write_meta
from tests.training.tiny import TIMED, tiny_config
from tests.training.whole import load_checkpoint

QUIET = Console(quiet=True)
CONFIGS = Path(__file__).parents[2] / "configs" / "capacity"
ESTIMATED = {
    "locmoe": {"policy": "locmoe", "floor": 2, "factor": 1.5, "target": "success", "delta": "quantile"},
    "locmoe_plus": {"policy": "locmoe_plus", "floor": 2, "factor": 1.5, "update_interval": 2},
    "controller": {"policy": "locmoe_plus", "rule": "controller", "floor": 2, "factor": 1.5, "delta": "minimum"},
    "delta_max": {"policy": "locmoe_plus", "rule": "delta_max", "floor": 2, "factor": 1.5, "freeze_after": 3},
}
every_policy = pytest.mark.parametrize("capacity", ESTIMATED.values(), ids=ESTIMATED)


def config_with(folder, capacity=None, router=None, **sections):
    moe = {"capacity": capacity or {"policy": "dropless"}} | ({"router": router} if router else {})
    return tiny_config(folder, model={"moe": moe}, **sections)


def run(folder, capacity=None, router=None, **sections):
    """(config, step metrics) of a whole run."""
    config = config_with(folder, capacity, router, **sections)
    train(config, console=QUIET)
    return config, steps_of(config)


def steps_of(config):
    return read_metrics(config.run.dir / "metrics.jsonl")[0]


def stop_after(config, step):
    """Leave the run folder as a kill after the checkpoint of `step` would."""
    for path in list_checkpoints(config.run.dir / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (config.run.dir / "summary.json").unlink()


def comparable(config):
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


@every_policy
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path, capacity):
    config, _ = run(tmp_path, capacity, training={"gradient_accumulation": 2})
    last = list_checkpoints(config.run.dir / "checkpoints")[-1]
    weights, metrics = (last / "model-00000-of-00001.safetensors").read_bytes(), comparable(config)
    stop_after(config, 2)
    train(config, resume=True, console=QUIET)
    assert (last / "model-00000-of-00001.safetensors").read_bytes() == weights
    assert comparable(config) == metrics


@every_policy
def test_capacities_are_those_of_the_checkpoint_within_their_limits(tmp_path, capacity):
    """4 sequences of 32 tokens, two choices, 4 experts: 1.5 even shares are 96, which hold until the first estimate."""
    config, steps = run(tmp_path, capacity)
    assert steps[0].capacity_per_layer == [96, 96]
    for before, after in zip(list_checkpoints(config.run.dir / "checkpoints"), steps[1:], strict=False):
        params = load_checkpoint(before).model
        rows = [float(params[f"layers.{layer}.moe.capacity"][0]) for layer in (0, 1)]
        assert after.capacity_per_layer == [min(max(round(row), 2), 96) for row in rows]
    assert any(step.capacity_per_layer != [96, 96] for step in steps)
    for step in steps:
        served = np.minimum(np.round(np.array(step.expert_load) * 256), np.array(step.capacity_per_layer)[:, None])
        assert step.drop_rate_per_layer == pytest.approx((1 - served.sum(1) / 256).tolist(), abs=1e-6)


def test_a_frozen_capacity_is_that_of_the_first_batch(tmp_path):
    _, steps = run(tmp_path, ESTIMATED["locmoe_plus"] | {"freeze_after": 1, "update_interval": 1})
    first = zip(steps[0].kept_per_layer, steps[0].competitors_per_layer, strict=True)
    frozen = [min(max(int(np.ceil(kept + rivals - 1e-2)), 2), 96) for kept, rivals in first]
    assert {tuple(step.capacity_per_layer) for step in steps[1:]} == {tuple(frozen)}
    assert len({tuple(step.kept_per_layer) for step in steps}) > 1  # measured and logged all the same


def test_micro_batches_have_the_delta_of_the_whole_batch_and_a_capacity_of_their_own(tmp_path):
    """In the first step, when parameters are alike; with the mean as delta."""
    capacity = {"policy": "locmoe", "floor": 2, "factor": 1.5}
    whole, halves = (
        run(tmp_path / str(parts), capacity, training={"gradient_accumulation": parts, "steps": 1})[1]
        for parts in (1, 2)
    )
    assert halves[0].delta_per_layer == pytest.approx(whole[0].delta_per_layer, abs=2e-6)
    assert [whole[0].capacity_per_layer, halves[0].capacity_per_layer] == [[96, 96], [48, 48]]
    assert halves[0].assignments_per_layer == whole[0].assignments_per_layer == [256, 256]
    for name in ("kept_per_layer", "competitors_per_layer"):
        ratio = np.array(getattr(halves[0], name)) / getattr(whole[0], name)
        assert ratio == pytest.approx([0.5, 0.5], abs=0.15)


def four_steps(config):
    """Without the evaluation that ends a run."""
    task = build_task(config, report=lambda _: None)
    lm = task.model()
    params = initial_parameters(lm.parameter_specs(), config.training.seed)
    trainer = trainer_of(config, task, lm, params)
    return [trainer.step() for _ in range(4)]


def trainer_of(config, task, lm, params):
    backend = get_backend(config.backend)
    mesh = single_mesh(backend.ops)
    placed = place_model(config, backend, lm, params, mesh)
    return Trainer(config, placed, Batches(config.training, lm, task.train, mesh.world))


def test_backends_agree_on_every_capacity(tmp_path):
    pytest.importorskip("mindspore")
    capacity = ESTIMATED["locmoe_plus"] | {"delta": "quantile", "quantile": 0.2, "factor": 3.0, "update_interval": 1}
    torch, mindspore = (
        four_steps(config_with(tmp_path, capacity, backend={"name": name, "dtype": "float64", "compile": False}))
        for name in ("torch", "mindspore")
    )
    assert len({tuple(step.capacity_per_layer) for step in torch}) > 2
    for one, other in zip(torch, mindspore, strict=True):
        assert other.capacity_per_layer == one.capacity_per_layer
        assert other.drop_rate_by_position == one.drop_rate_by_position
        assert other.delta_per_layer == pytest.approx(one.delta_per_layer, abs=2e-6)
        assert other.kept_per_layer == pytest.approx(one.kept_per_layer, abs=2e-3)
        assert other.competitors_per_layer == pytest.approx(one.competitors_per_layer, abs=2e-3)
        assert other.loss == pytest.approx(one.loss, rel=1e-9)


def test_a_layer_whose_tokens_all_chose_null_experts_is_balanced(tmp_path):
    """Rows of true experts are 0 and those of the two null experts opposite: one of those always wins."""
    config = config_with(tmp_path, router={"name": "adamoe", "top_k": 1, "null_experts": 2}, training={"steps": 1})
    task = build_task(config, report=lambda _: None)
    lm = task.model()
    params = initial_parameters(lm.parameter_specs(), 0)
    for layer in (0, 1):
        weight = params[f"layers.{layer}.moe.router.weight"]
        weight[:4], weight[5] = 0, -weight[4]
    step = trainer_of(config, task, lm, params).step()
    assert step.assignments_per_layer == [0, 0]
    assert (step.imbalance, step.drop_rate, step.drop_rate_per_layer) == (1.0, 0.0, [0.0, 0.0])
    assert step.expert_load == [[0.0] * 4] * 2
    assert np.isfinite(step.loss)


def test_dropless_runs_log_no_capacity(tmp_path):
    _, steps = run(tmp_path, training={"steps": 1})
    assert steps[0].capacity_per_layer == steps[0].drop_rate_by_position == steps[0].delta_per_layer == []
    assert np.isnan(steps[0].capacity)


def test_summary_and_report_show_capacity_and_drops(tmp_path):
    config = config_with(tmp_path, {"policy": "factor", "factor": 0.5}, metrics={"report": True})
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(train(config, console=QUIET))
    assert "32, 32 assignments per expert, by layer; dropped: " in console.export_text()
    report = (config.run.dir / "report.html").read_text()
    for text in (
        "Expert capacity",
        "Layer 0, capacity 32 at the end",
        "Dropped assignments by position in the sequence",
        "<dt>0 to 1</dt>",
        "<dt>30 to 31</dt>",
    ):
        assert text in report


def test_progress_and_tensorboard_show_the_capacity(tmp_path):
    _, steps = run(tmp_path, ESTIMATED["locmoe_plus"], training={"steps": 2})
    last = steps[-1]
    mean = sum(last.capacity_per_layer) / 2
    assert printed(last)["capacity"] == f"{mean:.0f}"
    events = scalars(last)
    assert events["moe/capacity"] == mean
    for layer in (0, 1):
        assert events[f"moe/capacity/{layer}"] == last.capacity_per_layer[layer]
        assert events[f"moe/drop_rate/{layer}"] == last.drop_rate_per_layer[layer]


def test_the_torch_layer_moves_its_capacity():
    """First the factor bound, 80; then own tokens and rivals of the first batch, which are frozen."""
    layer = moeport.torch.MoE(16, 4, 8, capacity={"policy": "locmoe_plus", "factor": 2.5, "freeze_after": 1})
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    layer(x)
    assert int(layer.metrics.capacity) == 80
    count_E, _, kept_E, rivals_E = layer.metrics.affinity_4E
    wanted = math.ceil(float((kept_E + rivals_E).sum() / count_E.sum()) - 1e-4)
    for _ in range(2):
        layer.update_router_state()
        layer(-x)
        assert int(layer.metrics.capacity) == wanted
    assert 4 < wanted < 80


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_configs_are_accepted(path):
    config = load_config(path)
    assert config.model.moe.capacity.policy == config.run.dir.name == path.stem


def test_sub_layers_are_layers_of_their_own(tmp_path):
    router = {"name": "cartesian", "top_k": 1}
    config, steps = run(tmp_path, ESTIMATED["locmoe_plus"], router, metrics={"report": True})
    assert len(steps[0].capacity_per_layer) == len(steps[0].drop_rate_per_layer) == 4
    assert "Layer 1, sub-layer 2, capacity" in (config.run.dir / "report.html").read_text()
    found = run_capacity(config.run.dir)
    names = [f"Layer {layer}, sub-layer {number}" for layer in (0, 1) for number in (1, 2)]
    assert [layer.name for layer in found.layers] == names
    assert [layer.name for layer in select_layer(found, 1)] == names[2:]
    assert all(layer.measured.bounds for layer in found.layers)


def test_drop_curve_of_known_loads():
    loads = Loads(np.array([[4.0, 0.0], [1.0, 3.0]]), 2.0)
    assert loads.mean == 2.0
    assert loads.curve() == ([0, 1, 2, 3, 4], [1.0, 5 / 8, 3 / 8, 1 / 8, 0.0])
    assert [loads.capacity_for(rate) for rate in (0.0, 0.12, 0.125, 0.4, 1.0)] == [4, 4, 3, 2, 1]
    empty = Loads(np.zeros((2, 3)), 1.0)
    assert (empty.drop_rate(1), empty.capacity_for(0.0), empty.curve()) == (0.0, 1, ([0, 1], [0.0, 0.0]))


def test_drop_rates_are_those_that_the_run_had(tmp_path):
    """From the loads before any drop, the drop rate at the run's own capacity is the real one."""
    config, steps = run(tmp_path, {"policy": "factor", "factor": 0.75})
    for layer, real in zip(run_capacity(config.run.dir, 1).layers, steps[-1].drop_rate_per_layer, strict=True):
        assert layer.present == 48
        assert layer.loads.drop_rate(48) == pytest.approx(real, abs=1e-6)
        assert layer.drop_rate == pytest.approx(real, abs=1e-6)
        assert layer.loads.drop_rate(layer.loads.capacity_for(0.01)) <= 0.01


@pytest.mark.parametrize("name", ["locmoe_plus", "controller", "delta_max"])
def test_measured_on_a_checkpoint_is_what_the_next_step_measures(tmp_path, name):
    config, steps = run(tmp_path, ESTIMATED[name])
    stop_after(config, 5)
    estimator = {"locmoe_plus": "low quantile", "controller": "minimum", "delta_max": "maximum"}[name]
    for number, layer in enumerate(run_capacity(config.run.dir).layers):
        estimate = layer.measured.estimates[estimator]
        assert estimate.delta == pytest.approx(steps[5].delta_per_layer[number], abs=2e-6)
        assert estimate.kept == pytest.approx(steps[5].kept_per_layer[number], abs=2e-3)
        assert estimate.rivals == pytest.approx(steps[5].competitors_per_layer[number], abs=2e-3)


FORMER = {"rule": "controller", "delta": "quantile", "quantile": 0.9, "probability": "exact"}
"""What earlier versions accepted, and `moeport` refuses to train now."""


def as_formerly(config):
    """Make the run look as if an earlier version had trained it."""
    (path,) = [path for path in list_checkpoints(config.run.dir / "checkpoints") if path.name.endswith("2")]
    meta = json.loads((path / "meta.json").read_text())
    meta["config"]["model"]["moe"]["capacity"] |= FORMER
    write_meta(path, meta)
    text = (config.run.dir / "config.yaml").read_text()
    for key, today in (("rule", "rivals"), ("delta", "null"), ("quantile", "null"), ("probability", "independent")):
        assert text.count(f" {key}: {today}\n") == 1
        text = text.replace(f" {key}: {today}\n", f" {key}: {FORMER[key]}\n")
    (config.run.dir / "config.yaml").write_text(text)


def test_a_run_of_the_former_estimator_is_read_and_goes_on_with_the_new_one(tmp_path):
    config, steps = run(tmp_path, ESTIMATED["locmoe_plus"])
    stop_after(config, 2)
    as_formerly(config)
    read = read_config(config.run.dir).model.moe.capacity
    assert (read.rule, read.quantile, read.probability) == ("controller", 0.9, "independent")
    assert run_capacity(config.run.dir).layers[0].measured.bounds
    train(config, resume=True, console=QUIET)
    assert [step.step for step in steps_of(config)] == [step.step for step in steps]
    assert read_config(config.run.dir).model.moe.capacity.rule == "rivals"


def test_micro_batches_are_taken_to_be_alike(tmp_path):
    config, _ = run(tmp_path, training={"gradient_accumulation": 2})
    found = run_capacity(config.run.dir)
    assert found.layers[0].loads.mean == found.layers[0].loads.choices == 32.0
    assert found.notes[0].startswith(
        "The metrics hold the loads of whole steps; each of the 2 micro-batches is assumed"
    )


def test_a_run_without_a_checkpoint_has_loads_all_the_same(tmp_path):
    config, _ = run(tmp_path)
    shutil.rmtree(config.run.dir / "checkpoints")
    found = run_capacity(config.run.dir)
    assert found.layers[0].measured.bounds == {}
    assert found.layers[0].loads.mean == found.layers[0].loads.choices == 64.0
    assert "there is no checkpoint" in found.notes[-1]


def test_metrics_of_older_versions_are_read(tmp_path):
    config, _ = run(tmp_path)
    path = config.run.dir / "metrics.jsonl"
    new = {"assignments_per_layer", "capacity_per_layer", "delta_per_layer", "kept_per_layer", "competitors_per_layer"}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{k: v for k, v in record.items() if k not in new | {"drop_rate_by_position"}} for record in records]
    want = run_capacity(config.run.dir).layers[1].loads.rows_SE
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    found = run_capacity(config.run.dir)
    np.testing.assert_array_equal(found.layers[1].loads.rows_SE, want)
    assert "older moeport" in found.notes[0]


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["moeport", "capacity", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_the_command(tmp_path, monkeypatch, capsys):
    config, _ = run(tmp_path)
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.html"
    code, out, _ = command(
        monkeypatch, capsys, config.run.dir, "--layer", 1, "--target", 0.05, "--json", numbers, "--output", page
    )
    assert code == 0
    assert "capacity for 5.00%" in out
    assert "quantile" in out
    (layer,) = json.loads(numbers.read_text())["layers"]
    assert layer["layer"] == "Layer 1"
    assert layer["recommended"]["drop_rate"] <= 0.05
    assert layer["recommended"]["factor"] == layer["recommended"]["capacity"] / 64
    assert layer["drop_curve"]["drop_rate"][0] == 1.0
    assert layer["drop_curve"]["drop_rate"][-1] == 0.0
    assert set(layer["bounds"]) == {"minimum", "low quantile", "mean", "quantile", "maximum"}
    for name, bounds in layer["bounds"].items():  # at a delta of tokens that are given up, these two say nothing
        keeps, found = name in ("minimum", "low quantile"), layer["estimates"][name]
        assert bounds["kept + rivals"] == (found["kept"] + found["competitors"] if keeps else None)
        assert bounds["2 s q"] == (2 * found["competitors"] if keeps else None)
    assert layer["present"] == {"capacity": None, "drop_rate": 0.0}
    html = page.read_text()
    # The recommendation can be pasted into the config, keeps the target there, and a smaller factor would not.
    (factor,) = re.findall(r"set model\.moe\.capacity: \{policy: factor, factor: ([\d.]+)\}", out)
    assert f"factor: {factor}" in html
    (loads,) = (found.loads for found in run_capacity(config.run.dir).layers if found.name == "Layer 1")
    served = math.ceil(float(factor) * loads.choices)
    assert loads.drop_rate(served) <= 0.05 < loads.drop_rate(layer["recommended"]["capacity"] - 1)
    assert served - layer["recommended"]["capacity"] <= 1
    assert "<h2>Layer 1</h2>" in html
    assert "Layer 0" not in html
    assert 'aria-label="Drop rate over capacities"' in html


def test_the_page_is_in_the_run_folder_by_default(tmp_path, monkeypatch, capsys):
    config, _ = run(tmp_path, router={"name": "hash"})
    code, out, _ = command(monkeypatch, capsys, config.run.dir)
    assert code == 0
    assert "No bounds: router hash has no gate row for each expert." in out
    assert "<h2>Layer 0</h2>" in (config.run.dir / "capacity.html").read_text()


def test_errors_say_what_to_do(tmp_path, monkeypatch, capsys):
    config, _ = run(tmp_path)
    for arguments, message in (
        ((tmp_path,), "not a run folder: it has no config.yaml"),
        ((config.run.dir, "--layer", 5), "--layer 5: no such layer with experts in"),
        ((config.run.dir, "--output", tmp_path / "a.png"), "expected a name that ends in .html"),
        ((config.run.dir, "--json", tmp_path), "it is a folder; name a file"),
    ):
        code, out, error = command(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, "")
        assert message in error


def test_a_config_of_another_model_is_refused(tmp_path):
    config, _ = run(tmp_path)
    (config.run.dir / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: does not describe the run of metrics\.jsonl: it has 4 layers"):
        run_capacity(config.run.dir)


def test_a_run_that_has_not_begun_is_refused(tmp_path):
    config, _ = run(tmp_path)
    (config.run.dir / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no step yet"):
        run_capacity(config.run.dir)
