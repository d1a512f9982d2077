"""The common cost of configs whose experts differ in width and number."""

from pathlib import Path

import pytest

from moeport.config import load_config
from moeport.model.build import build_model
from moeport.studies.compare.cost import Cost

CONFIGS = Path(__file__).parents[2] / "configs"
SHARED = ("model.moe.num_shared_experts=2", "model.moe.residual_hidden=24")
SIX = 6
"""FLOPs per number of a matrix and row: 2 forward, 4 backward."""


def cost_of(config):
    """That of a config, FLOPs and active parameters of its model, and the model."""
    shapes = build_model(config.model, config.data, 300)
    flops, active = shapes.training_flops_per_token(config.data.tokens_per_sequence), shapes.parameter_counts().active
    return Cost.of(config.model, flops, active), flops, active, shapes


@pytest.mark.parametrize("settings", [(), SHARED], ids=["plain", "shared"])
@pytest.mark.parametrize("path", sorted((CONFIGS / "routers").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_token_with_all_its_choices_costs_what_the_model_says(path, settings):
    config = load_config(path, settings)
    cost, flops, active, shapes = cost_of(config)
    router = config.model.moe.router
    sub_layers = sum(spec.name.endswith("experts.w_out") for spec in shapes.parameter_specs())
    rows = router.passes * sub_layers * router.experts_per_token
    assert cost.per_token(rows) == flops
    assert cost.active_parameters(rows) == active


@pytest.mark.parametrize("name", ["topk", "cartesian", "random"])
def test_rows_and_shared_experts_cost_what_their_matrices_hold(name):
    config = load_config(CONFIGS / "routers" / f"{name}.yaml", SHARED)
    cost, _, _, shapes = cost_of(config)
    passes = config.model.moe.router.passes
    sizes = {spec.name: spec.size for spec in shapes.parameter_specs()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    always = sum(size for name, size in sizes.items() if ".shared.w_" in name or ".dense." in name)
    layers = sum(name.endswith("experts.w_out") for name in sizes)
    assert cost.row == SIX * routed / layers / config.model.moe.num_experts
    assert cost.always == passes * SIX * always
    assert cost.experts(2.5) == cost.always + 2.5 * cost.row
    assert cost.total(100, 250) == pytest.approx(100 * cost.per_token(2.5))


def test_two_halves_of_an_expert_cost_as_much_as_one():
    whole, halves = (
        cost_of(load_config(CONFIGS / "routers" / "topk.yaml", settings))[0]
        for settings in (
            ("model.moe.expert_hidden=128",),
            ("model.moe.expert_hidden=64", "model.moe.num_experts=32", "model.moe.router.top_k=4"),
        )
    )
    assert whole.experts(6) == halves.experts(12)
    router = SIX * 3 * 128 * 16  # twice the rows of the router's matrix
    assert halves.per_token(12) - whole.per_token(6) == router
