"""Choices on the own node, as the layers measure them."""

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import MoELayerConfig
from moeport.core.losses import chosen_counts
from moeport.core.routing import RouterContext, Routing, Topology
from moeport.model.moe import MoELayer
from moeport.model.moe_metrics import local_share
from moeport.routers import BY_NAME
from tests.conformance.targets import every_target
from tests.support import rng

EXPERTS, TOKENS = 6, 8


def routing_of(ops, expert_N, token_N=None):
    """With the expert EXPERTS where a choice is unrouted."""
    zeros = ops.from_numpy(np.zeros((TOKENS, EXPERTS), np.float32))
    return Routing(
        expert_N=ops.from_numpy(expert_N),
        weight_N=ops.from_numpy(np.ones(len(expert_N), np.float32)),
        num_tokens=TOKENS,
        num_experts=EXPERTS,
        logits_TE=zeros,
        probs_TE=zeros,
        balanced_choices=1,
        token_N=None if token_N is None else ops.from_numpy(token_N),
    )


def measured(ops, routing, nodes, topology):
    counts_E = chosen_counts(ops, routing.expert_N, EXPERTS)
    return float(ops.to_numpy(local_share(ops, routing, counts_E, nodes, topology)))


@pytest.mark.parametrize("by_expert", [False, True])
@every_target
def test_the_share_of_simulated_nodes_is_that_of_a_loop(target, by_expert):
    ops = target.build().ops
    for nodes in (1, 2, 3, 4):
        expert_N = rng(nodes).integers(EXPERTS + 1, size=2 * TOKENS)
        token_N = np.repeat(np.arange(TOKENS), 2)
        if by_expert:
            token_N = rng(nodes + 9).permutation(token_N)
        pairs = [(t * nodes // TOKENS, e * nodes // EXPERTS) for t, e in zip(token_N, expert_N, strict=True)]
        routed = [own == there for own, there in pairs if there < nodes]
        got = measured(ops, routing_of(ops, expert_N, token_N if by_expert else None), nodes, Topology(job_nodes=2))
        assert got == pytest.approx(sum(routed) / len(routed), abs=1e-6)


@every_target
def test_on_a_cluster_the_node_is_that_of_the_process(target):
    ops = target.build().ops
    expert_N = np.array([0, 1, 2, 3, 4, 5, 3, 6])
    for nodes, node, want in ((1, 0, 1.0), (2, 0, 3 / 7), (2, 1, 4 / 7), (3, 1, 3 / 7)):
        got = measured(ops, routing_of(ops, expert_N), None, Topology(nodes, node, job_nodes=2))
        assert got == pytest.approx(want, abs=1e-6)


def test_without_a_choice_the_share_is_0():
    ops = NumpyOps()
    assert measured(ops, routing_of(ops, np.full(TOKENS, EXPERTS)), 2, Topology()) == 0


def metrics_of(router, topology=Topology()):  # noqa: B008 (frozen)
    config = MoELayerConfig.model_validate({"num_experts": EXPERTS, "expert_hidden": 4, "router": router})
    layer = MoELayer(config, 6, 0.5, 0.5, vocab_size=20)
    params = {spec.name: rng(5).random(spec.shape) for spec in layer.parameter_specs()}
    noise = {name: rng(7).random(TOKENS) for name in layer.noise}
    ids_T = rng(8).integers(20, size=TOKENS)
    context = RouterContext(0, True, ids_T, noise, num_sequences=2, topology=topology)
    tables = {spec.name: np.ones(spec.shape) for spec in layer.parameter_specs() if spec.is_table}
    _, metrics = layer.forward(NumpyOps(), params | tables, rng(6).standard_normal((TOKENS, 6)), context)
    return metrics.measured


@pytest.mark.parametrize("name", BY_NAME)
def test_every_router_that_chooses_measures_it_where_there_are_nodes(name):
    """A slot of `soft` has no token whose node it could be on."""
    assert "local_share" not in metrics_of({"name": name})
    simulated, clustered = metrics_of({"name": name, "nodes": 2}), metrics_of({"name": name}, Topology(2, 1, 2))
    assert ("local_share" in simulated, "local_share" in clustered) == (name != "soft", name != "soft")
    assert all(0 <= share["local_share"] <= 1 for share in (simulated, clustered) if share)


def test_nodes_that_each_have_a_copy_of_the_experts_choose_nothing_elsewhere():
    assert metrics_of({"name": "switch"}, Topology(1, 0, job_nodes=2))["local_share"] == 1


@pytest.mark.parametrize("name", BY_NAME)
def test_every_router_needs_an_expert_on_each_node(name):
    config = BY_NAME[name].config_class(name=name, nodes=EXPERTS + 1)
    assert ("nodes", "leaves nodes without an expert", "at most model.moe.num_experts (6)") in config.problems(EXPERTS)
