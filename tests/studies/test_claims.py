"""The scripts of the papers' claims: what their verdicts say, and that what they compare is comparable."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moeport.config import load_config
from moeport.model.build import build_model
from moeport.studies.compare.cost import Cost
from moeport.studies.compare.spread import paired
from tests.training.tiny import tiny_values

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
claims = importlib.import_module("claims")

CONTROLS = {"rare_ids": ("hash",), "composed_experts": ("one", "one-and-one")}
"""Configs that are not meant to have the parameters of the others."""


def script(name):
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("differences", "better", "no_worse", "direction"),
    [
        ([-0.3, -0.31, -0.29], "shown", "shown", "lower"),
        ([0.3, 0.31, 0.29], "refuted", "refuted", "higher"),
        ([-0.3, 0.31, -0.1], "not shown", "not resolved", "not resolved"),
        ([-0.003, 0.003, 0.001], "not shown", "shown", f"equal within {claims.MARGIN}"),
        ([-0.3], "one seed, no verdict", "one seed, no verdict", "one seed"),
    ],
)
def test_verdicts_follow_the_interval_and_not_the_mean(differences, better, no_worse, direction):
    found = paired(differences)
    assert (claims.better(found), claims.no_worse(found), claims.direction(found)) == (better, no_worse, direction)


def test_a_loss_between_two_capacities_is_that_of_the_line_between_them():
    curve = [({0: 100.0, 1: 200.0}, {0: 4.0, 1: 5.0}), ({0: 50.0, 1: 100.0}, {0: 4.5, 1: 5.5})]
    assert claims.interpolated(curve, {0: 60.0, 1: 200.0}) == {0: pytest.approx(4.4), 1: 5.0}
    with pytest.raises(ValueError, match="40 is beyond 50 to 100"):
        claims.interpolated(curve, {0: 40.0})


@pytest.mark.parametrize("name", list(CONTROLS))
def test_configs_of_a_claim_have_equal_parameters_and_cost(name):
    found = {}
    for arm, each in script(name).ARMS.items():
        config = load_config(claims.ROUTERS / f"{each.router}.yaml", (*claims.SMALL, *each.settings))
        model = config.model
        counts = build_model(model, config.data, 1024).parameter_counts()
        cost = Cost.of(model, 0.0, counts.active)
        rows = model.expert_layers * model.moe.router.experts_per_token
        experts = model.moe.num_experts * model.expert_parameters + model.always_active_parameters
        found[arm] = (model.expert_layers * experts, cost.experts(rows))
    assert len({total for arm, (total, _) in found.items() if arm not in CONTROLS[name]}) == 1
    assert len({active for arm, (_, active) in found.items() if arm != "hash"}) == 1
    assert found.get("hash", (0, 0))[1] < max(active for _, active in found.values())


def test_rows_at_equal_loss_reads_both_routers_at_the_rows_of_the_claim(tmp_path):
    rows = script("rows_at_equal_loss")
    given = claims.Given(tmp_path, own={"factors": "1.25,0.75,0.5"})
    kept = {"1.25": 1.0, "0.75": 0.75, "0.5": 0.5, "row": 0.01, "estimated": 1.0}

    def values(name, seed):
        share = kept[name.rpartition("-")[2]]
        loss = 5 - share + 0.001 * seed + (0.1 if name.startswith("locmoe") else 0) + (0.2 if "random" in name else 0)
        return {"val_loss": loss, "rows_total": 1000 * share, "rows_per_token": 4 * share, "drop_rate": 1 - share}

    names = list(rows.arms({"topk": "0.02", "locmoe_plus": "0.02"}, rows.factors_of(given)))
    found = SimpleNamespace(
        plan=SimpleNamespace(names=names, baseline="topk-position-1.25"),
        figures=lambda name: {s: SimpleNamespace(values=lambda s=s: values(name, s)) for s in (0, 1, 2)},
    )
    report = claims.Report(given)
    rows.losses(found, report)
    rows.verdicts(found, report)
    told = {question: (each["mean"], each["verdict"]) for question, each in report.figures["verdicts"].items()}
    assert len(told) == 4 + 2 + 3
    assert [verdict for _, verdict in told.values()] == ["shown", "refuted", "refuted", "higher", "lower", "lower"] + [
        "higher"
    ] * 3
    means = [mean for mean, _ in told.values()]
    assert means[:4] == [pytest.approx(x) for x in (-0.99, 0.5, 0.4, 0.1)]
    assert report.lines[2].startswith("| `topk` | position | one row per expert | 0.040")
    assert [line for line in report.lines if "| estimated |" in line]


def test_time_at_equal_loss_reads_topk_between_its_capacities(tmp_path):
    times = script("time_at_equal_loss")
    losses = {"topk": {1.25: 4.0, 0.75: 4.2, 0.5: 4.4}, "locmoe_plus": {1.25: 3.9, 0.75: 4.1, 0.5: 4.3}}
    seconds = {"topk": {1.25: 2.0, 0.75: 1.5, 0.5: 1.0}, "locmoe_plus": {1.25: 2.0, 0.75: 1.4, 0.5: 1.0}}
    name_of = {times.at_capacity(router, factor): (router, factor) for router in losses for factor in times.TIMED}

    def values(name):
        router, factor = name_of[name]
        return {"val_loss": losses[router][factor], "rows_per_token": factor}

    found = SimpleNamespace(figures=lambda name: {s: SimpleNamespace(values=lambda: values(name)) for s in (0, 1)})
    taken = {
        name: [{"step": seconds[router][factor] * slower, "exchange": 0.2} for slower in (1, 2)]
        for name, (router, factor) in name_of.items()
    }
    report = claims.Report(claims.Given(tmp_path), "time_at_equal_loss")
    times.compared(found, taken, report)
    lines = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[-3:-1]] for line in report.lines[2:]}
    assert lines[times.at_capacity("locmoe_plus", 1.25)] == ["beyond the losses of `topk`", "+0.0% (+0.0%, +0.0%)"]
    assert lines[times.at_capacity("locmoe_plus", 0.75)] == ["-20.0% (-20.0%, -20.0%)", "-6.7% (-6.7%, -6.7%)"]
    assert lines[times.at_capacity("locmoe_plus", 0.5)] == ["-20.0% (-20.0%, -20.0%)", "+0.0% (+0.0%, +0.0%)"]
    assert lines[times.at_capacity("topk", 0.5)] == ["", ""]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["rows_at_equal_loss", "rare_ids", "composed_experts", "null_experts", "routers_table"]
)
def test_a_script_runs_to_its_verdicts_and_repeats_them_without_training(tmp_path, monkeypatch, capsys, name):
    source = json.dumps(tiny_values(tmp_path)["data"]["source"])
    settings = [f"data.source={source}", "data.tokenizer.vocab_size=300", "training.steps=2", "training.batch_size=4"]
    settings += ["data.sequence_length=32", "data.validation_fraction=0.3", "model.d_model=32"]
    settings += [f"data.cache_dir={tmp_path / 'cache'}"]
    arguments = [name, "--output-dir", str(tmp_path / "runs"), "--seeds", "0,1"]
    monkeypatch.setattr("sys.argv", [*arguments, *(part for each in settings for part in ("--set", each))])
    script(name).main()
    first = json.loads((tmp_path / "runs" / "claim.json").read_text())
    assert first["verdicts"]
    table = (tmp_path / "runs" / "claim.md").read_text()
    assert table.strip() in capsys.readouterr().out
    monkeypatch.setattr("moeport.studies.compare.compare.train", None)  # nothing is trained again
    script(name).main()
    assert json.loads((tmp_path / "runs" / "claim.json").read_text()) == first
