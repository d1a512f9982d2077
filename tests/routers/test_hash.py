import numpy as np
import pytest

from moeport.config.model import ModelConfig, MoEConfig
from moeport.core.parameters import initial_parameters
from moeport.model.decoder import DecoderLM
from moeport.routers.hash import HashConfig
from tests.routers.examples import EXPERTS, TOKEN_COUNTS, build, choices, hidden_states, route, router_params, token_ids

VARIANTS = [HashConfig(top_k=3)]
"""Further configs for the tests of all routers."""


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_experts_are_those_of_the_table_with_equal_gates(top_k):
    config = HashConfig(top_k=top_k)
    params = router_params(build(config))
    experts, gates = choices(route(config, params))
    assert experts.tolist() == params["experts"][token_ids()].tolist()
    assert (gates == 1 / top_k).all()


def test_hidden_states_do_not_matter():
    assert route(HashConfig()).expert_N.tolist() == route(HashConfig(), x_TD=hidden_states(11)).expert_N.tolist()


def test_a_text_with_the_frequencies_of_the_training_set_loads_the_experts_evenly():
    lm = DecoderLM(ModelConfig(num_layers=2, d_model=8, moe=MoEConfig(num_experts=4, router=HashConfig())), 500)
    counts = 1_000_000 // np.arange(20, 520)
    params = initial_parameters(lm.parameter_specs(), 0, lambda: counts)
    tables = [params[f"layers.{layer}.moe.router.experts"][:, 0].astype(int) for layer in (0, 1)]
    for table in tables:
        load = np.bincount(table, counts, 4)
        assert load.max() / load.mean() < 1.001
    assert (tables[0] != tables[1]).mean() > 0.5, "each layer has its own table"


def test_nothing_is_trained():
    assert [spec.name for spec in build(HashConfig()).parameter_specs() if spec.trainable] == []
    assert build(HashConfig()).load_balance == 0
    assert build(HashConfig()).parameter_specs()[0].shape == (len(TOKEN_COUNTS), 1)


def test_more_choices_than_experts_are_a_problem():
    assert HashConfig(top_k=4).problems(4) == []
    assert HashConfig(top_k=5).problems(4) == [
        ("top_k", "more experts per token than there are", "at most model.moe.num_experts (4)")
    ]
