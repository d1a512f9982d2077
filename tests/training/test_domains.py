"""Runs on text that differs from node to node."""

import json

import numpy as np
import pytest
from rich.console import Console

from moeport.config import resolved_yaml
from moeport.errors import UserError
from moeport.training.metrics import read_metrics
from moeport.training.ranks import check_ranks
from moeport.training.run import train
from tests.comm.jobs import ROOT, start
from tests.training.test_run import contents, last, stop_after
from tests.training.tiny import tiny_config
from tests.training.whole import load_checkpoint

QUIET = Console(quiet=True)
NAMES = ("digits", "letters")
LOCMOE = {"name": "locmoe", "locality_coefficient": 0.5}
RRE = {"name": "rre", "groups": 2, "group_by": "domain"}


def config_of(folder, router, capacity=None, **sections):
    """Two kinds of text that share no byte but the space."""
    domains = []
    for name, alphabet in zip(NAMES, ("0123456789", "abcdefghij"), strict=True):
        where = folder / name
        where.mkdir(exist_ok=True)
        for i in range(6):
            text = "".join(f"{alphabet[i]}{alphabet[j % 10]}{alphabet[j * j % 10]} " for j in range(60 + 20 * i))
            (where / f"{i}.txt").write_text(text)
        held_out = {"paths": [str(where / "[0-4].txt")], "validation_paths": [str(where / "5.txt")]}
        domains.append({"name": name, "source": {"name": "files", **held_out}})
    moe = {"router": router, "load_balance": {"coefficient": 0.0}, "capacity": capacity or {}}
    data = {"source": {"name": "stdlib"}, "domains": domains}
    return tiny_config(folder, model={"moe": moe}, data=data, **sections)


def records(config):
    return read_metrics(config.run.dir / "metrics.jsonl")


def test_rre_by_domain_is_the_oracle_of_locality_and_a_run_resumes_exactly(tmp_path):
    config = config_of(tmp_path, {**RRE, "nodes": 2}, metrics={"report": True}, training={"skip_steps": ["2"]})
    summary = train(config, console=QUIET)
    steps, evaluations = records(config)
    assert [step.local_share for step in steps] == [1.0] * 5
    assert {step.rows_computed for step in steps} == {2 * 4 * 32}  # layers, sequences, tokens
    assert summary.domains == json.loads((config.run.dir / "summary.json").read_text())["domains"]
    assert {name: drawn["tokens"] for name, drawn in summary.domains.items()} == dict.fromkeys(NAMES, 5 * 2 * 32)
    assert summary.val_loss_by_domain == evaluations[-1].val_loss_by_domain
    assert list(summary.val_loss_by_domain) == list(NAMES)
    assert min(summary.val_loss_by_domain.values()) < summary.val_loss < max(summary.val_loss_by_domain.values())
    page = (config.run.dir / "report.html").read_text()
    assert "Validation loss by domain" in page
    assert all(f"{loss:.4f}" in page for loss in summary.val_loss_by_domain.values())
    whole = contents(last(config))
    stop_after(config, 3)
    train(config, resume=True, console=QUIET)
    assert contents(last(config)) == whole


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_process_that_simulates_nodes_does_what_a_cluster_of_them_does(tmp_path, ranks, per_node):
    """The same text on each node, and so the same losses, of which one is the locality loss; each continues the
    other's run. The tokens of a node on which the loss depends are those of a rank, or of a micro-batch.
    """
    simulated = {"router": {**LOCMOE, "nodes": 2}, "training": {"gradient_accumulation": per_node}}
    alone = config_of(tmp_path, **simulated)
    train(alone, console=QUIET)
    run = {"dir": str(tmp_path / "cluster")}
    cluster = {"parallelism": {"expert": ranks}, "comm": {"ranks_per_node": per_node}, "run": run}
    config = config_of(tmp_path, LOCMOE, **cluster)
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    script = str(ROOT / "tests/training/ranks_cli.py")
    job = start("torch", ranks, [script, str(tmp_path), "train", str(tmp_path / "config.yaml")], tmp_path / "start")
    try:
        assert job.wait(200) == 0, job.output()[-3000:]
    finally:
        job.end()
    shares = "domains     digits 50.0% of the sequences (node 0); letters 50.0% of the sequences (node 1)"
    assert shares in job.output()
    same(config, alone)
    stop_after(config, 3)
    with pytest.raises(UserError, match="each step drew digits 2, letters 2 sequences, and on the nodes of this job"):
        train(config_of(tmp_path, LOCMOE, run=run), resume=True, console=QUIET)
    train(config_of(tmp_path, **simulated, run=run), resume=True, console=QUIET)
    same(config, alone)


def same(config, other):
    """Losses, shares on the own node, and parameters of two runs are equal up to rounding."""
    (steps, evaluations), (wanted_steps, wanted_evaluations) = records(config), records(other)
    for found, wanted in zip(steps, wanted_steps, strict=True):
        assert found.total_loss == pytest.approx(wanted.total_loss, rel=1e-4)
        assert found.local_share == pytest.approx(wanted.local_share, abs=0.02)
        assert found.rows_computed == wanted.rows_computed
    for found, wanted in zip(evaluations, wanted_evaluations, strict=True):
        assert found.val_loss_by_domain == pytest.approx(wanted.val_loss_by_domain, rel=1e-4)
    model, wanted_model = (load_checkpoint(last(each)).model for each in (config, other))
    for name, value in wanted_model.items():
        np.testing.assert_allclose(model[name], value, atol=2e-3, err_msg=name)


def test_rows_and_choices_are_counted_over_layers_and_micro_batches(tmp_path):
    sections = {"training": {"gradient_accumulation": 2, "steps": 2}}
    capacity = {"policy": "factor", "factor": 0.7}
    config = config_of(tmp_path, {"name": "topk", "top_k": 2, "nodes": 2}, capacity, **sections)
    train(config, console=QUIET)
    for step in records(config)[0]:
        kept_L = 1 - np.array(step.drop_rate_per_layer)
        assert step.rows_computed == round(float(np.dot(step.assignments_per_layer, kept_L)))
        assert 0 < step.rows_computed < 2 * 2 * 4 * 32
        assert 0 <= step.local_share <= 1


def test_nodes_that_do_not_divide_a_micro_batch_are_refused_before_ranks_start(tmp_path):
    config = config_of(tmp_path, {"name": "switch", "nodes": 2})
    check_ranks(config, 2)
    with pytest.raises(UserError, match=r"^model\.moe\.router\.nodes: 2 nodes do not divide the 1 sequences"):
        check_ranks(config, 4)


def test_without_domains_nothing_is_said_of_them(tmp_path):
    config = tiny_config(tmp_path, training={"steps": 1})
    summary = train(config, console=QUIET)
    assert (summary.domains, summary.val_loss_by_domain) == ({}, None)
    lines = [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "val_loss_by_domain" in line or "local_share" in line]
