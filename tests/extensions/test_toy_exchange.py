"""A toy all-to-all in two places: a module with its class, and that class in EXCHANGES."""

import json

import pytest

from tests.extensions.copies import Row, extended_copy

TOY = '''"""Each row goes straight to the rank of its expert, one rank after another."""

from __future__ import annotations

import numpy as np

from moeport.comm.exchange.base import ExpertExchange
from moeport.comm.exchange.rows import Inner, Steps, by_assignment
from moeport.comm.load import Advantage, Load, Stages
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing


class PairwiseExchange(ExpertExchange):
    """In turn s, each rank sends to the rank s positions after it and receives from the one s positions before it."""

    name = "pairwise"
    summary = "each row straight to the rank of its expert, one rank after another"

    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        """See ExpertExchange."""
        return by_assignment(ops, x_TD, routing, lambda x_RD, counts_E: self._rows(ops, x_RD, counts_E, experts))

    def _rows(self, ops: Ops, x_RD: Array, counts_E: np.ndarray, experts: Inner) -> Steps:
        size, local = self.communicator.size, self.num_experts // self.communicator.size
        split = [local] * size
        got_E = yield self.communicator.start_all_to_all(ops.from_numpy(counts_E), split, split)
        got_We = ops.to_numpy(got_E).reshape(size, local)
        sent_W, received_W = counts_E.reshape(size, local).sum(1), got_We.sum(1)
        rows = yield from self._in_turns(ops, x_RD, sent_W, received_W)
        expert_R = np.repeat(np.tile(np.arange(local), size), got_We.reshape(-1))
        order_R = np.argsort(expert_R, kind="stable")
        outputs = yield from experts(ops.take_rows(rows, ops.from_numpy(order_R)), ops.from_numpy(got_We.sum(0)))
        outputs = ops.take_rows(outputs, ops.from_numpy(np.argsort(order_R)))
        return (yield from self._in_turns(ops, outputs, received_W, sent_W))

    def _in_turns(self, ops: Ops, x_RD: Array, sent_W: np.ndarray, received_W: np.ndarray) -> Steps:
        rank, ranks = self.communicator.rank, np.arange(self.communicator.size)
        parts = ops.split(x_RD, sent_W.tolist(), axis=0)
        found = {}
        for turn in ranks:
            to, source = (rank + turn) % len(ranks), (rank - turn) % len(ranks)
            send, receive = sent_W * (ranks == to), received_W * (ranks == source)
            found[source] = yield self.communicator.start_all_to_all(parts[to], send, receive)
        return ops.concat([found[source] for source in ranks], axis=0)

    @classmethod
    def load(cls, stages: Stages) -> list[Load]:
        """See ExpertExchange."""
        rows, local = stages.routes.flat, stages.demand.num_experts // stages.layout.ranks
        counts = stages.counts(stages.all_peers, local)
        copies = stages.copies(4 * rows.sent + 5 * rows.received)
        return [counts, *stages.there_and_back(stages.all_peers, rows), copies]

    @classmethod
    def why(cls, stages: Stages) -> Advantage | None:
        """See ExpertExchange."""
        return Advantage("messages per rank at a time", 1, sum(stages.all_peers), "flat")
'''
REGISTRY = "moeport/comm/exchange/__init__.py"
FILES = {"moeport/comm/exchange/pairwise.py": TOY}
ROWS = (
    Row(
        REGISTRY,
        after="from moeport.comm.exchange.node_dedup import NodeDedupExchange",
        text="from moeport.comm.exchange.pairwise import PairwiseExchange",
    ),
    Row(REGISTRY, after="NodeDedupExchange,", text="        PairwiseExchange,"),
)
"""The entry in EXCHANGES, with the import that it needs."""
PLACES = 2
"""The new module and the registry."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return extended_copy(tmp_path_factory.mktemp("toy"), FILES, ROWS)


def test_it_touches_two_places(copy):
    assert copy.places == PLACES


def test_a_config_may_name_it(copy):
    wanted = ["configs/quickstart.yaml", "--set", "parallelism.expert=2", "--set", "comm.algorithm=pairwise"]
    done = copy.moeport("config", "check", *wanted)
    assert done.returncode == 0, done.stderr
    done = copy.moeport("config", "check", *wanted[:-1], "comm.algorithm=ring")
    assert done.returncode == 2
    assert "flat, hierarchical, node_dedup, pairwise, auto" in done.stderr


def test_the_planner_prices_it(copy):
    links = ["--intra", "400GB/s,2us", "--inter", "25GB/s,5us"]
    cluster = ["--nodes", "2", "--ranks-per-node", "2", "--json", "plan.json"]
    done = copy.moeport("plan", "configs/quickstart.yaml", *cluster, *links)
    assert done.returncode == 0, done.stderr
    assert "pairwise takes " in done.stdout
    placements = json.loads((copy.root / "plan.json").read_text())["placements"]
    for each in placements:
        if each["expert"] > 1:
            cost = {name: sum(causes.values()) for name, causes in each["costs"].items()}
            assert cost["pairwise"] == pytest.approx(cost["flat"]), "the given links copy in no time"


def test_two_ranks_run_it_and_its_values_are_right(copy):
    """Outputs and gradients of the tokens, whole and in chunks, by the benchmark of exchanges."""
    sizes = ["-b", "1K", "-e", "1K", "-n", "1", "-w", "0", "--experts", "8", "--top-k", "3", "--width", "16"]
    options = ["pairwise", "--backward", "--chunks", "1,2", "--device", "cpu", "--json", "bench.json"]
    codes, output = copy.with_torch("bench", "comm", *options, *sizes, ranks=2)
    assert codes == [0, 0], output
    rows = json.loads((copy.root / "bench.json").read_text())["rows"]
    assert [(row["operation"], row["wrong"]) for row in rows] == [("pairwise", 0), ("pairwise in 2 chunks", 0)]
    assert all(row["intra_node_bytes"] > 0 for row in rows)


def test_shared_tests_and_documentation_have_it(copy):
    done = copy.pytest("-n", "0", "tests/comm/test_collectives.py", "-k", "one_process and torch and expert_exchange")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    cases = "from tests.comm.exchange_cases import EXCHANGES; print(*EXCHANGES)"
    assert copy.python("-c", cases).stdout.split()[-1] == "pairwise"
    assert copy.python("docs/generate").returncode == 0
    assert "pairwise: each row straight to the rank" in (copy.root / "docs/configuration.md").read_text()
    assert "| `pairwise` | `PairwiseExchange` |" in (copy.root / "docs/all-to-all.md").read_text()
