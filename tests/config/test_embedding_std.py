"""The default of model.embedding_std, and what configs of versions without the key mean."""

import numpy as np
import pytest
from rich.console import Console

from moeport.config import config_from_dict, load_config, resolved_yaml
from moeport.core.parameters import initial_parameters
from moeport.model.decoder import DecoderLM
from moeport.training.run import train
from tests.training.tiny import tiny_config


@pytest.mark.parametrize(
    ("model", "std"),
    [
        ({}, 1.0),
        ({"embedding_std": 0.5}, 0.5),
        ({"embedding_std": None}, 0.02),
        ({"init_std": 0.1}, 0.1),
        ({"tie_embeddings": True}, 0.02),
        ({"tie_embeddings": True, "init_std": 0.1}, 0.1),
        ({"tie_embeddings": True, "embedding_std": 0.5}, 0.5),
        ({"init_std": 0.1, "embedding_std": 1.0}, 1.0),
    ],
)
def test_embeddings_are_drawn_with_the_given_std_or_its_default(tmp_path, model, std):
    config = config_from_dict({"model": {"num_layers": 1, "d_model": 64, **model}})
    params = initial_parameters(DecoderLM(config.model, 500).parameter_specs(), 0)
    assert np.std(params["embedding.weight"]) == pytest.approx(std, rel=0.02)
    if "lm_head.weight" in params:
        assert np.std(params["lm_head.weight"]) == pytest.approx(config.model.init_std, rel=0.02)
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(config))
    assert load_config(path) == config


def test_a_resolved_config_of_a_version_without_the_key_keeps_its_embeddings(tmp_path):
    text = resolved_yaml(config_from_dict({}))
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("  embedding_std: 1.0\n", ""))
    assert path.read_text() != text
    assert DecoderLM(load_config(path).model, 8).embedding_specs()[0].std == 0.02


def test_a_run_from_before_the_key_is_resumed(tmp_path):
    """Its checkpoint's config has no such key, and the config at hand has another default by now."""
    constant = {"optimizer": {"schedule": {"name": "constant"}}}
    old = tiny_config(tmp_path, model={"tie_embeddings": False, "embedding_std": None}, **constant)
    train(old, console=Console(quiet=True))
    steps = {"training": {"steps": old.training.steps + 1}}
    now = tiny_config(tmp_path, model={"tie_embeddings": False, "embedding_std": 1.0}, **constant, **steps)
    assert train(now, resume=True, console=Console(quiet=True)).steps == old.training.steps + 1
