"""The assignments that a run counts by vocabulary id while it trains."""

import json
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from moeport.backends import get_backend
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.core.routing import Routing
from moeport.data.tokenizer import ByteTokenizer
from moeport.errors import DataError
from moeport.model.moe import MoELayer
from moeport.training.metrics import read_metrics
from moeport.training.report import write_report
from moeport.training.report_routing import LEAST, routing
from moeport.training.routing_counts import NUMBERS, RoutingCounts, watched
from moeport.training.routing_log import PIECES, RECORDS, RoutingLog, read_routing
from moeport.training.routing_spread import overlap, spread
from moeport.training.run import train
from moeport.training.task import build_task
from tests.training.test_run import last, stop_after
from tests.training.tiny import tiny_config

QUIET = Console(quiet=True)
SINGLE = SingleProcess(get_backend(BackendConfig(name="numpy")).ops)
EVERY = {"routing_interval": 1}
MOE = {
    "topk": {},
    "null experts": {"router": {"name": "adamoe", "top_k": 2, "null_experts": 2}},
    "experts choose": {"router": {"name": "expert_choice"}, "allow_future_tokens": True},
    "two passes": {"router": {"name": "random"}},
    "two layers": {"router": {"name": "cartesian", "top_k": 2}, "num_shared_experts": 1},
    "capacity": {"capacity": {"policy": "factor", "factor": 1.0}},
}


def config_of(folder, moe=None, metrics=EVERY, **sections):
    return tiny_config(folder, model={"moe": moe or {}}, metrics=metrics, **sections)


def trained(folder, *args, **sections):
    """The routing.json of a run."""
    config = config_of(folder, *args, **sections)
    train(config, console=QUIET)
    return read_routing(config.run.dir / "routing.json")


def total(file):
    return sum(record.count_LXE for record in file.records)


@pytest.mark.parametrize("name", MOE)
def test_counts_are_those_of_a_loop_over_every_decision(tmp_path, monkeypatch, name):
    made, choose = Counter(), MoELayer._choose

    def noted(self, ops, context, params, x_TD):
        chosen = choose(self, ops, context, params, x_TD)
        if context.training and isinstance(chosen, Routing):
            ids, experts = ops.to_numpy(context.token_ids_T).tolist(), ops.to_numpy(chosen.expert_N).tolist()
            tokens = None if chosen.token_N is None else ops.to_numpy(chosen.token_N).tolist()
            for place, expert in enumerate(experts):
                token = tokens[place] if tokens else place * len(ids) // len(experts)
                made[self.number, ids[token], expert] += 1
        return chosen

    monkeypatch.setattr(MoELayer, "_choose", noted)
    init, built = MoELayer.__init__, []

    def numbered(self, *args, **options):
        init(self, *args, **options)
        self.number = len(built)
        built.append(self)

    monkeypatch.setattr(MoELayer, "__init__", numbered)
    training = {"steps": 3, "batch_size": 4, "gradient_accumulation": 2}
    file = trained(tmp_path, MOE[name], training=training)
    layers, experts = file.records[0].count_LXE.shape[::2]
    assert sum(record.steps for record in file.records) == 3
    expected = [
        [[made[layer, each, expert] for expert in range(experts)] for each in file.ids] for layer in range(layers)
    ]
    assert total(file).tolist() == expected
    assert layers == len(built) > 1
    assert total(file).sum() > 100


def test_the_most_frequent_ids_of_the_text_are_watched(tmp_path):
    config = config_of(tmp_path)
    task = build_task(config, report=lambda _: None)
    ids = task.frequent_ids(8)
    counts = task.train.token_counts()
    assert sorted(counts[list(ids)].tolist()) == sorted(np.sort(counts)[-8:].tolist())
    assert ids[ord(" ")] == "' '"
    assert next(iter(ids)) == counts.argmax()


@pytest.mark.parametrize(("layers", "experts", "wanted"), [(3, 8, 32), (58, 256, 4), (100, 10**6, 1)])
def test_models_of_many_experts_have_fewer_ids_watched(layers, experts, wanted):
    assert watched(layers, experts) == wanted
    assert wanted == 1 or layers * experts * wanted <= NUMBERS


def test_only_every_nth_step_is_counted_and_what_is_off_leaves_no_file(tmp_path):
    file = trained(tmp_path, metrics={"routing_interval": 4})
    assert [(record.first, record.last, record.steps) for record in file.stretches] == [(1, 4, 1), (5, 6, 0)]
    for moe, interval in (({}, 0), ({"router": {"name": "soft"}, "allow_future_tokens": True}, 1)):
        assert trained(tmp_path / f"{interval}", moe, {"routing_interval": interval}) is None


def test_recomputed_activations_are_counted_once(tmp_path):
    plain = trained(tmp_path / "plain")
    recomputed = trained(tmp_path / "recomputed", training={"activation_checkpointing": True})
    assert total(recomputed).tolist() == total(plain).tolist()


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_counts_nothing_twice(tmp_path, step):
    config = config_of(tmp_path, checkpoint={"interval": 1})
    train(config, console=QUIET)
    path = config.run.dir / "routing.json"
    whole = read_routing(path)
    stop_after(config, step)  # the file has later steps, as after a kill
    train(config, resume=True, console=QUIET)
    resumed = read_routing(path)
    for a, b in zip(resumed.stretches, whole.stretches, strict=True):
        assert (a.first, a.last, a.steps) == (b.first, b.last, b.steps)
        assert a.count_LXE.tolist() == b.count_LXE.tolist()


@pytest.mark.parametrize("steps", [70, 2_000])
def test_stretches_and_pieces_are_bounded(tmp_path, steps):
    """With a checkpoint after every step, which divides stretches into pieces."""
    random, files = np.random.default_rng(0), []
    expert_SPLN = random.integers(0, 3, (steps // 10 + 1, 1, 2, 8))  # 2 is not routed
    for divides in (False, True):
        counts = RoutingCounts({5: "a", 3: "b"}, layers=2, experts=2, interval=10)
        log = RoutingLog(tmp_path / str(divides), SINGLE, counts, steps, start_step=0)
        for step in range(1, steps + 1):
            if counts.samples(step - 1):
                counts.add([(np.array([[3, 4, 5, 5]]), {"chosen_expert": expert_SPLN[step // 10]})])
            if log.is_due(step) or (divides and (step < 100 or step > steps - 100)):
                log.write(step)
        files.append(read_routing(log.path))
    rarely, often = files
    assert len(rarely.records) == len(rarely.stretches) <= RECORDS
    assert len(often.stretches) == len(rarely.stretches) < len(often.records) == PIECES
    for a, b in zip(often.stretches, rarely.stretches, strict=True):
        assert (a.first, a.last, a.steps, a.count_LXE.tolist()) == (b.first, b.last, b.steps, b.count_LXE.tolist())
    assert sum(each.steps for each in rarely.records) == steps // 10
    for layer in range(2):
        for row, tokens in enumerate(([2, 3], [0])):  # id 5 is that of the last two tokens
            chosen = expert_SPLN[1 : steps // 10 + 1, 0, layer].reshape(-1, 4, 2)[:, tokens]
            assert total(rarely)[layer, row].tolist() == [(chosen == expert).sum() for expert in range(2)]


def test_a_run_resumed_without_counting_keeps_what_was_counted_before(tmp_path):
    config = config_of(tmp_path)
    train(config, console=QUIET)
    stop_after(config, 3)
    train(config_of(tmp_path, metrics={"routing_interval": 0}), resume=True, console=QUIET)
    assert read_routing(config.run.dir / "routing.json").records[-1].last == 3
    assert last(config).name == "step-000006"


RECORD = (
    '{"ids": [1], "names": ["a"], "records": [{"first": 1, "last": 1, "steps": 1, "ends": true, "assignments": %s}]}'
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"ids": [1], "names": [], "records": []}',
        '{"ids": 3}',
        '{"ids": [1e999], "names": ["a"], "records": []}',
        *(RECORD % f"[[[{count}]]]" for count in (10**30, "1e999", "NaN", -1)),
    ],
)
def test_a_damaged_file_is_said_and_begun_anew(tmp_path, capsys, text):
    config = config_of(tmp_path, training={"steps": 2})
    train(config, console=QUIET)
    path = config.run.dir / "routing.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"routing\.json: is not the routing counts of a run"):
        read_routing(path)
    stop_after(config, 1)
    train(config, resume=True, console=Console(width=300))
    assert "the counts start again" in capsys.readouterr().out
    assert [record.first for record in read_routing(path).records] == [2]


def test_live_counters_show_drops_towards_the_end_by_position_only(tmp_path):
    """OpenMoE's drop-towards-the-end: what has no room comes last, unless the least probable go."""
    thirds = {}
    for drop in ("position", "probability"):
        moe = {"capacity": {"policy": "factor", "factor": 0.5, "drop": drop}, "load_balance": {"coefficient": 0.01}}
        config = config_of(tmp_path / drop, moe, training={"steps": 4, "batch_size": 1, "evaluation_interval": 0})
        train(config, console=QUIET)
        steps, _ = read_metrics(config.run.dir / "metrics.jsonl")
        rates = np.mean([step.drop_rate_by_position for step in steps], axis=0)
        thirds[drop] = rates[: len(rates) // 3].mean(), rates[-(len(rates) // 3) :].mean()
    assert thirds["position"][1] > thirds["position"][0] + 0.4
    assert abs(thirds["probability"][1] - thirds["probability"][0]) < 0.2


def test_the_file_has_what_the_documentation_says(tmp_path):
    config = config_of(tmp_path, training={"steps": 2})
    train(config, console=QUIET)
    values = json.loads((config.run.dir / "routing.json").read_text())
    assert list(values) == ["ids", "names", "records"]
    assert list(values["records"][0]) == ["first", "last", "steps", "ends", "assignments"]
    assert len(values["ids"]) == len(values["names"]) == len(values["records"][0]["assignments"][0])
    assert ByteTokenizer().decode([values["ids"][0]]) == " "


def test_the_report_shows_ids_by_expert(tmp_path):
    config = config_of(tmp_path, training={"steps": 8, "evaluation_interval": 0}, metrics={**EVERY, "report": True})
    train(config, console=QUIET)
    file = read_routing(config.run.dir / "routing.json")
    page = (config.run.dir / "report.html").read_text()
    assert "Token ids and experts" in page
    assert page.count('class="panel matrix"') == 2
    for title in ("Deviation by token id", "Overlap with the end"):
        assert f'aria-label="{title} over steps"' in page
    figures = routing(config.run.dir / "routing.json", ["a", "b"], 8)
    last = file.stretches[-1].count_LXE[1]
    assert figures.maps[1].values[2][0] == f"{last[0, 2] / last[0].sum():.0%}"
    deviation, early = (each.chart.lines[1].hover["values"] for each in figures.listed)
    assert deviation[0] == f"{spread(file.stretches[0].count_LXE[1], LEAST).mean:.3f}"
    assert early[0] == f"{overlap(last, file.stretches[0].count_LXE[1], LEAST):.2f}"
    (config.run.dir / "routing.json").unlink()
    assert "Token ids and experts" not in write_report(config.run.dir).read_text()
