"""Fitted links, predicted times and memory, placements, and `moeport plan` as a user calls it."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeport.cli.plan_options import parse_link
from moeport.comm.exchange import EXCHANGES, loads
from moeport.comm.load import Demand, Layout, Stages, all_reduce_load, ranks_sharing
from moeport.config import config_from_dict, load_config
from moeport.errors import UserError
from moeport.model.memory import ModelSizes, memory
from moeport.plan.compute import MeasuredStep, Speed, Work, fit_speed
from moeport.plan.cost import Cluster, Link, Links
from moeport.plan.fit import Sample, fit, read_samples
from moeport.plan.layer import exchange_costs, fastest, reason
from moeport.plan.planner import Planner, gradient_seconds
from moeport.plan.routes import counted_routes, expected_routes, routes
from moeport.plan.text import sentence
from moeport.training.metrics import MetricsLog
from tests.cli.test_cli import run  # noqa: F401
from tests.support import rng
from tests.training.metrics_examples import STEP

LINKS = Links(Link(20e-6, 1.5e9), Link(50e-6, 24e6), Link(100e-9, 4e9))
GLOO = replace(LINKS, inter=Link(50e-6, 24e6, 30e6, 40e6))


def samples(links, shares="nothing", noise=0.0):
    random, found = rng(1), []
    for layout in (Layout(2, 2), Layout(2, 4), Layout(4, 1)):
        for tokens in (1, 16, 256, 4096):
            for top_k, row_bytes in ((1, 64), (8, 1024)):
                demand = Demand(tokens, top_k, 64, row_bytes)
                for name in EXCHANGES:
                    stages = loads(name, layout, demand, expected_routes(layout, demand), ranks_sharing(shares, layout))
                    seconds = links.cost(stages).total * (1 + noise * random.standard_normal())
                    found.append(Sample(name, layout, demand, "uniform", shares, stages, seconds))
    return found


@pytest.mark.parametrize("shares", ["nothing", "node", "cluster"])
@pytest.mark.parametrize("links", [LINKS, GLOO])
def test_the_fit_finds_the_links_that_made_the_times(shares, links):
    found = fit(samples(links, shares))
    assert np.abs(found.errors).max() < 1e-6
    for name in ("intra", "inter", "copies"):
        fitted, true = getattr(found.links, name), getattr(links, name)
        assert fitted.latency == pytest.approx(true.latency, rel=1e-3)
        assert fitted.bandwidth == pytest.approx(true.bandwidth, rel=1e-3)
        for word in ("pair_bandwidth", "meeting_bandwidth"):
            assert 1 / getattr(fitted, word) == pytest.approx(1 / getattr(true, word), rel=1e-3, abs=1e-13)


def test_the_fit_is_near_with_noise_and_never_negative():
    found = fit(samples(LINKS, noise=0.05))
    assert 0.02 < np.std(found.errors) < 0.08
    assert found.links.inter.bandwidth == pytest.approx(24e6, rel=0.1)
    for link in vars(found.links).values():
        assert link.latency >= 0
        assert link.bandwidth > 0


def test_a_class_without_traffic_has_no_limit():
    found = fit([sample for sample in samples(LINKS) if sample.layout.ranks_per_node == 1])
    assert found.links.intra == Link(0.0, np.inf)
    assert found.links.inter.bandwidth == pytest.approx(24e6, rel=1e-3)


def measured(path, links=LINKS, **changes):
    """A file as bench comm writes it, with the times of `links`."""
    about: dict[str, Any] = {"ranks": 4, "nodes": [0, 0, 1, 1], "emulated": False, "device": "cuda:0"}
    about |= {"traffic": "local:0.5", "experts": 64, "top_k": 4, "width": 32, "backward": False} | changes
    layout, rows = Layout(len(set(about["nodes"])), about["ranks"] // len(set(about["nodes"]))), []
    for size in (4096, 65536, 1 << 20, 1 << 23):
        demand = Demand(size // 128, about["top_k"], 64, 128)
        for name in EXCHANGES:
            stages = loads(name, layout, demand, routes(about["traffic"], layout, demand))
            time_us = links.cost(stages).total * 1e6
            rows.append({"operation": name, "size": size, "type": "float32", "time_us": time_us})
        time_us = links.cost([all_reduce_load(layout, size, 1)]).total * 1e6
        rows.append({"operation": "all_reduce", "size": size, "type": "float32", "time_us": time_us})
    rows.append({"operation": "broadcast", "size": 4096, "type": "float32", "time_us": 1.0})
    path.write_text(json.dumps(about | {"rows": rows}))
    return path


def test_files_of_the_benchmark_are_read(tmp_path):
    found = read_samples(measured(tmp_path / "a.json"), routes)
    assert [sample.algorithm for sample in found] == [*EXCHANGES, "all_reduce"] * 4
    assert found[0].demand == Demand(32, 4, 64, 128)
    assert found[0].layout == Layout(2, 2)
    assert found[0].shares == "nothing"
    assert read_samples(measured(tmp_path / "a.json", device="cpu (1 threads)"), routes)[0].shares == "node"
    assert (
        read_samples(measured(tmp_path / "a.json", device="cpu (1 threads)", emulated=True), routes)[0].shares
        == "cluster"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a file of moeport bench comm --json"),
        ("{}", "not a file of moeport bench comm --json"),
        ('{"nodes": [0], "ranks": 1, "rows": []}', "has no exchange of experts; expected one of flat, hierarchical"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_samples(tmp_path / "a.json", routes)


@pytest.mark.parametrize(
    ("links", "demand", "best", "why"),
    [
        # 64 experts on 2 nodes, top-8: a token reaches the other node in 1 - C(32, 8) / C(64, 8) = 0.998 of all cases
        (
            Links(Link(0, 1e12), Link(0, 1e9)),
            Demand(4096, 8, 64, 4096),
            "node_dedup",
            "node_dedup: 1.0 rows per token between nodes instead of 4.0 with flat; 100% of its time goes to the "
            "link between nodes; flat takes 3.98 times as long, hierarchical takes 3.98 times as long",
        ),
        # 3 (7 + 80) us of flat, 3 (7 + 10) us of hierarchical, 5 (7 + 10) us of node_dedup
        (
            Links(Link(1e-6, 1e12), Link(1e-5, 1e12)),
            Demand(1, 1, 64, 4),
            "hierarchical",
            "hierarchical: 8 messages per rank to the experts instead of 15 with flat; 100% of its time goes to the "
            "latency of messages; flat takes 5.12 times as long, node_dedup takes 1.67 times as long",
        ),
        (
            Links(Link(0, 1e9), Link(0, 1e12)),
            Demand(4096, 1, 64, 4096),
            "flat",
            "flat: 0.5 rows per token between nodes; node_dedup has 0.5, but its other stages take "
            "longer; 100% of its time goes to the links inside a node; hierarchical takes 2.01 times as long, "
            "node_dedup takes 2.01 times as long",
        ),
    ],
)
def test_the_best_algorithm_and_why(links, demand, best, why):
    layout = Layout(2, 8)
    found = expected_routes(layout, demand)
    stages = Stages(layout, demand, found)
    costs = exchange_costs(stages, links)
    assert fastest(costs) == best
    facts = reason(stages, costs)
    assert (facts.algorithm, facts.chunks, facts.nodes, facts.hidden) == (best, 1, 2, 0.0)
    assert facts.slower == {
        name: pytest.approx(cost.total / costs[best].total) for name, cost in costs.items() if name != best
    }
    assert sentence(facts) == why


def config(**changes):
    values = {
        "model": {
            "num_layers": 2,
            "d_model": 32,
            "attention": {"num_heads": 2},
            "moe": {"num_experts": 16, "expert_hidden": 8, "router": {"name": "topk", "top_k": 2}, "first_dense": 1},
        },
        "data": {"sequence_length": 16, "tokenizer": {"name": "byte"}},
        "training": {"batch_size": 32, "steps": 100},
    }
    return config_from_dict(values | changes)


def test_memory_is_that_of_the_parameters_a_rank_holds():
    whole = config(parallelism={"shard": False})
    counts = whole.model.parameter_counts(257)
    expert = 16 * 3 * 32 * 8
    sizes = ModelSizes.of(whole, 257)
    assert (sizes.expert_total, sizes.dense_total) == (expert, counts.total - expert)
    assert (sizes.expert_block, sizes.row_bytes, sizes.sharded) == (expert, 128, ())
    held = 4 * (counts.total - expert + expert / 4)
    found = memory(whole, sizes, ranks=8, expert=4, tokens=64)
    assert (found.parameters, found.gradients, found.moments) == (held, held, 2 * held)
    muon = config(parallelism={"shard": False}, optimizer={"name": "muon"})
    of_muon = memory(muon, ModelSizes.of(muon, 257), ranks=8, expert=4, tokens=64)
    adamw = 2 * 257 * 32 + 32 + 2 * 2 * 32 + 16 * 32  # embedding, head, norms, router: two moments each
    assert of_muon.moments == found.moments - 4 * (counts.total - expert - adamw + expert / 4)
    assert of_muon.parameters == held
    sharded = memory(config(), ModelSizes.of(config(), 257), ranks=8, expert=4, tokens=64)
    assert sharded.parameters == 4 * counts.total / 8
    assert sizes.dense_outside == 2 * 257 * 32 + 32  # embedding, head and the last norm
    assert sharded.gathered == found.gathered == 2 * 4 * (sizes.dense_outside + sizes.dense_block + expert / 4)
    on_each = memory(config(), ModelSizes.of(config(), 257), ranks=4, expert=4, tokens=64)
    assert on_each.gathered == 2 * 4 * (sizes.dense_outside + sizes.dense_block)  # experts are whole where they are
    assert memory(config(), ModelSizes.of(config(), 257), ranks=1, expert=1, tokens=64).gathered == 0
    twice = config(training={"batch_size": 32, "gradient_accumulation": 2})
    accumulated = memory(twice, ModelSizes.of(twice, 257), ranks=8, expert=4, tokens=64)
    assert (accumulated.parameters, accumulated.gradients) == (sharded.parameters, held)
    assert sharded.total == 4 * sharded.parameters + sharded.gathered + sharded.activations


def test_gradients_of_copies_cross_the_links_in_rings():
    sizes = ModelSizes.of(config(parallelism={"shard": False}), 257)
    links = Links(Link(0, 1e9), Link(0, 1e8))
    dense, experts = 4 * sizes.dense_total, 4 * sizes.expert_total
    alone = gradient_seconds(Cluster(1, 4, links), 4, sizes, 1)
    assert alone == pytest.approx(2 * dense * 3 / 4 / 1e9)
    # experts over 2 of 4 ranks of a node: 4 copies, 2 rings of half of the experts through each node's link
    across = gradient_seconds(Cluster(2, 4, links), 2, sizes, 1)
    assert across == pytest.approx((2 * dense * 7 / 8 + 2 * 2 * experts / 2 * 3 / 4) / 1e8)
    assert gradient_seconds(Cluster(1, 1, links), 1, sizes, 1) == 0.0
    assert gradient_seconds(Cluster(2, 4, links), 2, ModelSizes.of(config(), 257), 2) == pytest.approx(5 / 2 * across)


def test_placements_divide_ranks_experts_and_nodes():
    cluster = Cluster(3, 4, LINKS)
    found = Planner(config(training={"batch_size": 24}, model=model(24)), 257, cluster, uniform).places()
    assert sorted(each.expert for each in found) == [1, 2, 4, 12]
    assert {each.expert: each.nodes for each in found} == {1: 1, 2: 1, 4: 1, 12: 3}
    assert [each.step for each in found] == sorted(each.step for each in found)
    by_expert = {each.expert: each for each in found}
    assert by_expert[1].algorithm is None
    assert by_expert[1].exchange == 0.0
    one = by_expert[12]
    assert one.exchange == pytest.approx(one.costs[one.algorithm].total * 2)
    assert one.step == one.exchange + one.gradients


def model(experts):
    moe = {"num_experts": experts, "expert_hidden": 8, "router": {"name": "topk", "top_k": 2}}
    return {"num_layers": 2, "d_model": 32, "attention": {"num_heads": 2}, "moe": moe}


def uniform(layout, demand):
    return routes("uniform", layout, demand)


def test_compute_follows_from_the_flops_of_the_busiest_rank():
    cluster = Cluster(1, 4, LINKS)
    planner = Planner(config(), 257, cluster, uniform)
    assert planner.flops == config().model.training_flops_per_token(257, 16) * 32 * 16 / 4
    assert planner.expert_flops == 6 * 3 * 32 * 8 * 2 * 32 * 16 / 4
    even = planner.places(Speed(0.5 / planner.flops))
    assert all(each.compute == pytest.approx(0.5) for each in even)
    assert all(each.step == each.exchange + each.gradients + each.compute for each in even)

    def first(layout, demand):
        """All choices of all tokens on the first half of the ranks."""
        return counted_routes(layout, demand, np.tile([0, 1], (64, 1)))

    planner = Planner(config(), 257, cluster, first)
    skewed = {each.expert: each.compute for each in planner.places(Speed(1 / planner.flops))}
    share = planner.expert_flops / planner.flops
    assert skewed == pytest.approx({1: 1.0, 2: 1 + share, 4: 1 + 3 * share})
    together = Planner(config(), 257, replace(cluster, shares="cluster"), first)
    assert {each.compute for each in together.places(Speed(1 / together.flops))} == {1.0}


def test_work_of_ranks_that_share_a_processor_adds_up():
    whole, sharded = config(parallelism={"shard": False}), config()
    alone = Planner(whole, 257, Cluster(2, 4, LINKS), uniform)
    node, every = (Planner(whole, 257, Cluster(2, 4, LINKS, shares), uniform) for shares in ("node", "cluster"))
    one = alone.work(4)
    assert one.parameters == alone.sizes.dense_total + alone.sizes.expert_total / 4
    assert one.blocks == 2
    assert node.work(4) == Work(4 * one.flops, 4 * one.parameters, 8)
    assert every.work(4) == Work(8 * one.flops, 8 * one.parameters, 16)
    assert Planner(sharded, 257, Cluster(2, 4, LINKS), uniform).work(4).parameters == pytest.approx(
        (alone.sizes.dense_total + alone.sizes.expert_total) / 8
    )


def test_a_fitted_speed_is_that_which_made_the_steps():
    speed = Speed(2e-10, 3e-8, 4e-3)
    works = [Work(1e9, 1e6, 8), Work(4e9, 1e6, 8), Work(1e9, 6e6, 8), Work(2e9, 2e6, 32)]
    found = fit_speed([MeasuredStep(work, 0.3, 0.3 + speed.seconds(work)) for work in works])
    assert vars(found.speed) == pytest.approx(vars(speed))
    assert np.abs(found.errors).max() < 1e-9
    alone = fit_speed([MeasuredStep(works[0], 0.3, 0.8)])
    assert vars(alone.speed) == pytest.approx(vars(Speed(0.5 / 1e9)))
    faster = fit_speed([MeasuredStep(works[0], 0.4, 0.2)])  # than its communication was predicted
    assert faster.speed == Speed(0.0)
    assert faster.errors == pytest.approx([1.0])


def test_chunks_are_tried_where_compute_is_known():
    links = Links(Link(0, 1e12), Link(1e-6, 1e9))
    big = {"batch_size": 4096, "steps": 100}
    planner = Planner(config(training=big, parallelism={"expert": 4}), 257, Cluster(4, 1, links), uniform)
    alone = next(each for each in planner.places() if each.expert == 4)
    assert alone.chunks == 1
    # as long in the experts as in the exchange: much of it passes meanwhile
    speed = Speed(alone.exchange / planner.expert_flops)
    found = next(each for each in planner.places(speed) if each.expert == 4)
    assert found.chunks > 1
    assert found.exchange < 0.7 * alone.exchange
    hidden = 1 - found.exchange / found.costs[found.algorithm].total / planner.exchanges
    said = f"in {found.chunks} chunks {hidden:.0%} of it passes while experts compute or others travel"
    assert said in sentence(found.reason)
    own = planner.place_of_config(speed)
    assert (own.algorithm, own.chunks, own.exchange) == ("flat", 1, own.costs["flat"].total)
    step = planner.measured(2.0)
    assert step == MeasuredStep(planner.work(4), own.exchange + own.gradients, 2.0)


def test_recomputed_blocks_exchange_again():
    cluster = Cluster(2, 2, LINKS)
    again = config(training={"batch_size": 32, "steps": 100, "activation_checkpointing": True})
    (plain,), (twice,) = (
        [each for each in Planner(each, 257, cluster, uniform).places() if each.expert == 4]
        for each in (config(), again)
    )
    assert 1.3 < twice.exchange / plain.exchange < 1.6
    assert twice.memory.activations < plain.memory.activations


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError) as error:
        Planner(config(), 257, Cluster(16, 8, LINKS), uniform)
    assert str(error.value) == (
        "training.batch_size: 32 sequences do not divide among 128 ranks x 1 micro-batches "
        "(training.gradient_accumulation); expected a multiple of 128: add --set training.batch_size=128"
    )


@pytest.mark.parametrize(
    ("text", "bandwidth", "latency"),
    [
        ("400GB/s,2us", 400e9, 2e-6),
        ("25GB/s", 25e9, None),
        ("200Mbit/s,0.5ms", 25e6, 5e-4),
        ("1.5TB/s,900ns", 1.5e12, 9e-7),
    ],
)
def test_units_of_links(text, bandwidth, latency):
    assert parse_link("--inter", text) == pytest.approx((bandwidth, latency))


@pytest.mark.parametrize("text", ["25Gb/s,5us", "25GB,5us", "25GB/s,5", "25GB/s,", "0GB/s,1us", "fast", "5us,25GB/s"])
def test_other_units_are_refused(text):
    with pytest.raises(UserError) as error:
        parse_link("--inter", text)
    assert str(error.value) == (
        f"--inter {text!r} is not a link; expected bandwidth and latency such as 25GB/s,5us: bandwidth in MB/s, GB/s "
        "or TB/s of bytes or Mbit/s or Gbit/s of bits, latency in ns, us, ms or s"
    )


GIVEN = ["--intra", "400GB/s,2us", "--inter", "25GB/s,5us"]


def test_the_command_plans_a_config(run, tmp_path):  # noqa: F811
    (tmp_path / "c.yaml").write_text("model: {moe: {num_experts: 16, router: {name: topk, top_k: 4}}}\n")
    arguments = ["plan", "c.yaml", "--nodes", "4", "--ranks-per-node", "4", *GIVEN, "--flops", "100T"]
    code, out, error = run(*arguments, "--traffic", "local:0.5", "--json", "out.json")
    assert code == 0, error
    assert "16 ranks: 4 nodes x 4" in out
    assert "between nodes  25 GB/s, 5 us per message" in out
    assert "Fastest: parallelism.expert = " in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert {each["expert"] for each in figures["placements"]} == {1, 2, 4, 8, 16}
    assert figures["links"]["copies"] == {"latency": 0.0, "bandwidth": None} | dict.fromkeys(
        ("pair_bandwidth", "meeting_bandwidth")
    )
    for each in figures["placements"]:
        assert each["step"] == pytest.approx(each["exchange"] + each["gradients"] + each["compute"])


def test_the_command_fits_files_and_predicts_another_cluster(run, tmp_path):  # noqa: F811
    measured(tmp_path / "a.json")
    code, out, error = run("plan", "--from", "a.json", "--nodes", "8", "--ranks-per-node", "4", "--json", "out.json")
    assert code == 0, error
    assert "fitted to 16 times; median error 0%, largest 0%" in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["links"]["inter"]["bandwidth"] == pytest.approx(24e6, rel=1e-3)
    demand, layout = Demand(8192, 4, 64, 128), Layout(8, 4)
    want = exchange_costs(Stages(layout, demand, routes("uniform", layout, demand)), LINKS)
    (found,) = [each for each in figures["exchanges"] if each["tokens"] == 8192]
    assert sum(found["costs"]["flat"].values()) == pytest.approx(want["flat"].total, rel=0.01)
    code, out, error = run("plan", "--from", "a.json", "--nodes", "8", "--ranks-per-node", "4", "--inter", "48MB/s")
    assert code == 0, error
    assert "between nodes  0.048 GB/s, 50 us per message" in out
    measured(tmp_path / "one.json", nodes=[0, 0, 0, 0])
    code, out, error = run("plan", "--from", "one.json", "--nodes", "2", "--inter", "48MB/s,9us")
    assert code == 0, error
    assert "between nodes  0.048 GB/s, 9 us per message" in out


def test_the_command_fits_compute_to_a_run(run, tmp_path):  # noqa: F811
    config_text = "model: {moe: {num_experts: 8}}\ndata: {tokenizer: {name: byte}}\ntraining: {batch_size: 8}\n"
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.yaml").write_text(config_text + "parallelism: {expert: 2}\n")
    (tmp_path / "c.yaml").write_text(config_text)
    links = Links(Link(2e-6, 400e9), Link(5e-6, 25e9))
    small, big = (
        Planner(load_config(tmp_path / file), 257, Cluster(nodes, 2, links), uniform)
        for file, nodes in (("small/config.yaml", 1), ("c.yaml", 2))
    )
    placed = small.place_of_config()
    steps = [9.0, 8.0, 7.0, *[placed.exchange + placed.gradients + 0.25] * 3]
    with MetricsLog(tmp_path / "small", resume_step=None) as log:
        for number, seconds in enumerate(steps, 1):
            log.step(replace(STEP, step=number, step_time=seconds))
    arguments = ["plan", "c.yaml", "--nodes", "2", "--ranks-per-node", "2", *GIVEN, "--json", "out.json"]
    code, out, error = run(*arguments, "--step", "small@1x2")
    assert code == 0, error
    assert "fitted to 1 runs; median error 0%, largest 0%" in out
    figures = json.loads((tmp_path / "out.json").read_text())
    for each in figures["placements"]:
        assert each["compute"] == pytest.approx(0.25 * big.flops / small.flops)
    code, _, error = run(*arguments, "--step", "small@1x2", "--flops", "1T")
    assert code == 2
    (tmp_path / "small" / "metrics.jsonl").write_text("")
    code, _, error = run(*arguments, "--step", "small@1x2")
    assert (code, error) == (2, "error: --step small@1x2: has no step after the first 3; expected a longer run\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "--intra: the link is not known; expected --intra with bandwidth and latency such as 25GB/s,5us, or --from",
        ),
        (GIVEN, "CONFIG or --from FILE.json is needed"),
        (["--intra", "400GB/s"], "--intra '400GB/s': has no latency; expected one such as 400GB/s,5us"),
        (
            [*GIVEN, "--compute-ms", "3", "--flops", "1T"],
            "--compute-ms, --flops and --step all say how long a rank computes",
        ),
        (
            ["c.yaml", *GIVEN, "--flops", "fast"],
            "--flops 'fast' is not a number; expected operations per second such as",
        ),
        (["c.yaml", *GIVEN, "--traffic", "local:2"], "--traffic 'local:2': expected uniform, zipf, local:F"),
        (["c.yaml", *GIVEN, "--step", "small"], "--step 'small' is not a run and its cluster; expected the run.dir"),
        (["c.yaml", *GIVEN, "--step", "small@1x2"], "small: not a run folder"),
        (["c.yaml", *GIVEN, "--memory", "2MB,1GB"], "no placement fits: the smallest needs about"),
        (["--from", "none.json"], "--from none.json: cannot be read: No such file or directory"),
        (
            ["--from", "one.json", "--nodes", "2", "--ranks-per-node", "2"],
            "--inter: the files of --from have no traffic between nodes; expected --inter",
        ),
        (
            ["--from", "a.json", "--nodes", "3", "--ranks-per-node", "4"],
            "the 64 experts of the files do not divide among 12 ranks; expected a divisor of 64",
        ),
        (
            ["--from", "a.json", "--from", "cpu.json"],
            "some files are of an emulated cluster or of CPUs and some are not",
        ),
    ],
)
def test_what_the_command_refuses(run, tmp_path, arguments, message):  # noqa: F811
    (tmp_path / "c.yaml").write_text("training: {batch_size: 16}\n")
    measured(tmp_path / "a.json")
    measured(tmp_path / "cpu.json", device="cpu (1 threads)")
    measured(tmp_path / "one.json", nodes=[0, 0, 0, 0])
    code, out, error = run("plan", *arguments)
    assert (code, out) == (2, "")  # no half of an answer
    assert message in error
