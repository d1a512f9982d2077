"""Rows and bytes of the all-to-alls against brute force and against what real exchanges count."""

import itertools
import json
from collections import Counter
from math import comb

import numpy as np
import pytest

from moeport.comm.exchange import EXCHANGES, loads
from moeport.comm.load import Demand, Layout, Load, all_reduce_load, ranks_sharing
from moeport.plan.cost import Link, Links
from moeport.plan.routes import counted_routes, expected_routes, routes
from moeport.plan.traffic import expert_choices
from tests.comm.jobs import start_on_nodes
from tests.support import rng

ROUTES = ("flat", "rail", "inside", "tokens", "inside_tokens")
LAYOUTS = [Layout(1, 1), Layout(1, 4), Layout(2, 1), Layout(2, 2), Layout(4, 1), Layout(4, 2)]


def rows(source_and_target, layout):
    """Rows by (rank, word) from pairs of ranks, with words such as `sent_inter_W`."""
    found = Counter()
    for source, target in source_and_target:
        if source == target:
            found[source, "kept_W"] += 1
        else:
            where = "intra" if source // layout.ranks_per_node == target // layout.ranks_per_node else "inter"
            found[source, f"sent_{where}_W"] += 1
            found[target, f"received_{where}_W"] += 1
    return found


def brute_force(layout, expert_TK, num_experts, source_T):
    """Rows by all-to-all, rank and word, one by one."""
    per_rank, per_node = num_experts // layout.ranks, layout.ranks_per_node
    pairs = {name: [] for name in ROUTES}
    for source, experts in zip(source_T, expert_TK, strict=True):
        relays, ends = [], []
        for expert in experts:
            target = expert // per_rank
            relay = target // per_node * per_node + source % per_node
            relays.append(relay)
            ends.append((relay, target))
            pairs["flat"].append((source, target))
            pairs["rail"].append((source, relay))
            pairs["inside"].append((relay, target))
        pairs["tokens"] += [(source, relay) for relay in set(relays)]
        pairs["inside_tokens"] += set(ends)
    return {name: rows(found, layout) for name, found in pairs.items()}


def check_equal(found, counts, layout, scale=1.0):
    for name, moved in vars(found).items():
        for word, rows_W in vars(moved).items():
            expected = [counts[name][rank, word] * scale for rank in range(layout.ranks)]
            np.testing.assert_allclose(rows_W, expected, atol=1e-9, err_msg=f"{name} {word}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_counted_rows_are_those_of_a_count_one_by_one(layout, top_k):
    experts, tokens = 8, 5
    expert_TK = np.concatenate([choices(rank, tokens, experts, top_k) for rank in range(layout.ranks)])
    counts = brute_force(layout, expert_TK, experts, np.repeat(range(layout.ranks), tokens))
    check_equal(counted_routes(layout, Demand(tokens, top_k, experts, 4), expert_TK), counts, layout)
    double = counted_routes(layout, Demand(2 * tokens, top_k, experts, 4), expert_TK)
    check_equal(double, counts, layout, scale=2)


def choices(seed, tokens, experts, top_k):
    return np.stack([rng((seed, token)).permutation(experts)[:top_k] for token in range(tokens)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_expected_rows_of_uniform_choices_are_the_mean_over_all_sets(layout, top_k):
    sets = list(itertools.combinations(range(8), top_k))
    source_T = np.repeat(range(layout.ranks), len(sets))
    counts = brute_force(layout, sets * layout.ranks, 8, source_T)
    check_equal(expected_routes(layout, Demand(3, top_k, 8, 4)), counts, layout, 3 / len(sets))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("top_k", "locality"), [(1, 0.3), (2, 0.5), (3, 0.9), (6, 0.8), (3, 0.0), (2, 1.0)])
def test_expected_rows_of_local_choices_are_the_mean_over_all_sets(layout, top_k, locality):
    """Each set weighs what `expert_choices` draws it with: a binomial number on the own node, any of those alike."""
    experts = 8
    near = experts // layout.nodes
    found = {name: Counter() for name in ROUTES}
    for rank in range(layout.ranks):
        node = rank // layout.ranks_per_node
        for chosen in itertools.combinations(range(experts), top_k):
            own = sum(expert // near == node for expert in chosen)
            drawn = sum(
                comb(top_k, j) * locality**j * (1 - locality) ** (top_k - j)
                for j in range(top_k + 1)
                if max(min(j, near), top_k - (experts - near)) == own
            )
            weight = drawn / (comb(near, own) * comb(experts - near, top_k - own))
            for name, counts in brute_force(layout, [chosen], experts, [rank]).items():
                for key, count in counts.items():
                    found[name][key] += weight * count
    check_equal(expected_routes(layout, Demand(5, top_k, experts, 4), locality), found, layout, 5)


@pytest.mark.parametrize(("experts", "top_k", "nodes"), [(64, 8, 2), (64, 8, 4), (8, 2, 2), (256, 8, 32)])
def test_nodes_of_a_token_are_hypergeometric(experts, top_k, nodes):
    found = expected_routes(Layout(nodes, 1), Demand(1, top_k, experts, 4)).tokens
    reached = 1 - comb(experts - experts // nodes, top_k) / comb(experts, top_k)
    assert found.kept_W == pytest.approx([reached] * nodes)
    assert found.sent_inter_W == pytest.approx([(nodes - 1) * reached] * nodes)


@pytest.mark.parametrize("kind", ["uniform", "local:0.7"])
def test_closed_forms_are_what_the_benchmark_draws(kind):
    layout, demand = Layout(2, 2), Demand(4000, 6, 16, 4)
    expert_TK = np.concatenate(
        [expert_choices(kind, 4000, 16, 6, rank=rank, size=4, node=rank // 2, nodes=2) for rank in range(4)]
    )
    drawn, expected = counted_routes(layout, demand, expert_TK), routes(kind, layout, demand)
    for name, moved in vars(expected).items():
        for word, rows_W in vars(moved).items():
            np.testing.assert_allclose(vars(vars(drawn)[name])[word], rows_W, rtol=0.03, err_msg=f"{name} {word}")


def test_zipf_loads_one_rank_most():
    moved = routes("zipf", Layout(2, 2), Demand(1000, 1, 16, 4)).flat
    assert moved.sent == pytest.approx([1000] * 4)
    weight_E = 1 / np.arange(1, 17)
    assert moved.received.max() >= 4000 * weight_E.max() / weight_E.sum() * 0.99


@pytest.mark.parametrize("backward", [False, True])
def test_bytes_are_those_that_real_exchanges_count(tmp_path, backward):
    """Four processes on two nodes; what node 1 wants is what node 0 wants with the nodes exchanged, so that both links
    carry the same.
    """
    experts, top_k, tokens, width, layout = 8, 3, 24, 16, Layout(2, 2)
    expert_TK = choices(7, 2 * tokens, experts, top_k)
    expert_TK = np.concatenate([expert_TK, (expert_TK + experts // 2) % experts])
    np.save(tmp_path / "choices.npy", expert_TK)
    arguments = [
        "bench",
        "comm",
        *EXCHANGES,
        "-b",
        str(tokens * width * 4),
        "-n",
        "1",
        "-w",
        "0",
        "--width",
        str(width),
    ]
    arguments += ["-e", str(tokens * width * 4), "--experts", str(experts), "--top-k", str(top_k)]
    arguments += ["--traffic", str(tmp_path / "choices.npy"), "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    arguments += ["--backward"] * backward
    job = start_on_nodes(4, 2, ["-m", "moeport", *arguments], tmp_path / "job")
    try:
        assert job.wait(200) == 0, job.output()
    finally:
        job.end()
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["nodes"] == [0, 0, 1, 1]
    assert about["emulated"] is False
    demand = Demand(tokens, top_k, experts, width * 4, backward)
    found = counted_routes(layout, demand, expert_TK)
    for row in about["rows"]:
        shared = loads(row["operation"], layout, demand, found, ranks_sharing("cluster", layout))
        if backward and row["operation"] == "node_dedup":  # the benchmark asks for no gradient of the gates
            shared = [load for load in shared if load.stage != "gates" or not load.is_backward]
        assert sum(load.intra_bytes for load in shared) == row["intra_node_bytes"] + row["inter_node_bytes"]
        assert sum(load.inter_bytes for load in shared) * 2 == row["inter_node_bytes"]


def test_the_busiest_rank_and_node_count():
    """All tokens want the expert of the last rank."""
    layout, demand = Layout(2, 2), Demand(10, 1, 4, 100)
    found = counted_routes(layout, demand, np.full((40, 1), 3))
    dispatch = {load.stage: load for load in loads("flat", layout, demand, found)}["dispatch"]
    assert (dispatch.intra_bytes, dispatch.inter_bytes) == (10 * 100, 20 * 100)
    assert (dispatch.intra_messages, dispatch.inter_messages) == (1, 2)
    copies = loads("flat", layout, demand, found)[-1]
    assert (copies.copied_rows, copies.copied_bytes) == (2 * 10 + 3 * 40, (2 * 10 + 3 * 40) * 100)


def test_messages_of_the_algorithms():
    layout, demand = Layout(8, 4), Demand(16, 2, 32, 8)
    found = expected_routes(layout, demand)
    messages = {
        name: (
            {load.intra_messages for load in loads(name, layout, demand, found)[:-1]},
            {load.inter_messages for load in loads(name, layout, demand, found)[:-1]},
        )
        for name in EXCHANGES
    }
    assert messages == {
        "flat": ({3}, {28}),
        "hierarchical": ({0, 3}, {0, 7}),
        "node_dedup": ({0, 3}, {0, 7}),
    }


def test_an_unknown_exchange_has_no_load():
    layout, demand = Layout(2, 2), Demand(16, 2, 4, 8)
    with pytest.raises(ValueError, match="exchange 'ring' does not exist; expected flat, hierarchical, node_dedup"):
        loads("ring", layout, demand, expected_routes(layout, demand))


def test_groups_alike_share_a_processor():
    """A copy of the experts on two of four ranks that share one processor costs as much as both copies."""
    layout, demand = Layout(1, 2), Demand(16, 2, 4, 8)
    found = expected_routes(layout, demand)
    alone, both = (loads("flat", layout, demand, found, sharing) for sharing in (2, 4))
    for one, two in zip(alone, both, strict=True):
        assert two.intra_bytes == 2 * one.intra_bytes
        assert two.intra_messages == 2 * one.intra_messages
        assert two.copied_bytes == 2 * one.copied_bytes


def test_time_is_that_of_the_slower_link_of_each_stage():
    links = Links(Link(1.0, 10.0), Link(3.0, 5.0), Link(0.5, 100.0))
    cost = links.cost(
        [
            Load("one", intra_messages=2, inter_messages=1, intra_bytes=40, inter_bytes=10),
            Load("two", inter_messages=1, intra_bytes=10, inter_bytes=20),
            Load("copies", copied_rows=4, copied_bytes=100),
        ]
    )
    assert (cost.latency, cost.intra, cost.inter, cost.copies) == (8.0, 4.0, 4.0, 3.0)
    assert cost.total == 19.0


def test_few_pairs_of_ranks_and_nodes_that_meet_take_longer():
    """Two ranks on each of three nodes: eight pairs cross in a flat exchange and four along the rail; two nodes send to
    each, so that half of the bytes meet others.
    """
    layout, demand = Layout(3, 2), Demand(18, 2, 6, 100)
    found = expected_routes(layout, demand)
    size = 2 * 18 * 2 * 2 / 3 * 100
    flat, rail = (loads(name, layout, demand, found)[1] for name in ("flat", "hierarchical"))
    for load, pairs in ((flat, 8), (rail, 4)):
        assert (load.inter_bytes, load.pair_bytes, load.meeting_bytes) == pytest.approx((size, size / pairs, size / 2))
    slow = Links(Link(0, 1e9), Link(0, 100.0, 50.0, 20.0)).cost([rail])
    assert slow.inter == pytest.approx(size / 100 + size / 4 / 50 + size / 2 / 20)
    assert Link(1.0, 100.0, 50.0, 20.0).at(200.0) == Link(1.0, 200.0, 100.0, 40.0)
    two = loads("flat", Layout(2, 2), Demand(18, 2, 4, 100), expected_routes(Layout(2, 2), Demand(18, 2, 4, 100)))
    assert all(load.meeting_bytes == 0 for load in two)


def test_an_all_reduce_passes_each_rank_as_a_ring():
    found = all_reduce_load(Layout(2, 4), 800, 4)
    assert found == Load("all_reduce", 4, 2, 4 * 1400, 1400)
    assert all_reduce_load(Layout(1, 4), 800, 1) == Load("all_reduce", 4, 0, 1200, 0)
