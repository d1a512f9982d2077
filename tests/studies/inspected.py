"""Models with weights that were drawn, and text that was drawn, for the tests of `moeport inspect`."""

from typing import Any

import numpy as np

from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.core.parameters import initial_parameters
from moeport.model.decoder import DecoderLM
from moeport.studies.inspect.counts import Keys
from moeport.studies.inspect.texts import portion
from moeport.studies.inspect.walk import Walk
from tests.training.tiny import tiny_config

LENGTH, VOCABULARY = 24, 32
CAPACITY = {"policy": "factor", "factor": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "topk": {"router": {"name": "topk", "top_k": 2}},
    "position": {"router": {"name": "topk", "top_k": 2}, "capacity": CAPACITY},
    "probability": {"router": {"name": "topk", "top_k": 2}, "capacity": CAPACITY | {"drop": "probability"}},
    "null experts": {"router": {"name": "adamoe", "top_k": 2, "null_experts": 2}},
    "experts choose": {"router": {"name": "expert_choice"}, "allow_future_tokens": True},
    "two layers": {"router": {"name": "cartesian", "top_k": 2}, "num_shared_experts": 1},
    "hash": {"router": {"name": "hash"}},
}


class Example:
    """A model with weights that were drawn, and text that was drawn: 3 portions of two datasets."""

    def __init__(self, folder, moe, backend="numpy"):
        config = tiny_config(folder, model={"moe": moe, "init_std": 0.3})
        self.lm = DecoderLM(config.model, VOCABULARY)
        self.params = initial_parameters(self.lm.parameter_specs(), seed=0)
        self.backend = get_backend(BackendConfig(name=backend, device="cpu", dtype="float32"))
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 2, LENGTH + 1))
        # the end of text is id 0: attention stays within documents
        self.portions = [
            portion("code" if i else "prose", rows[:, :-1], rows[:, 1:], 0, None) for i, rows in enumerate(ids)
        ]
        self.keys = Keys.of(self.portions)

    def walk(self, **options):
        return Walk(self.lm, self.params, self.backend, self.portions, **options)
