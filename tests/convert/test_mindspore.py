"""A converted model on MindSpore computes what transformers does."""

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.config import config_from_dict
from moeport.config.training import BackendConfig
from moeport.convert.from_hf import from_hf
from moeport.model.decoder import DecoderLM
from tests.support import assert_close
from tests.training.whole import load_checkpoint

pytest.importorskip("mindspore")
pytest.importorskip("transformers", minversion="5.0")

from tests.convert.models import TOKENS, random_case, save, their_logits


@pytest.mark.parametrize(
    "family",
    ["qwen2_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3_moe", "olmoe", "llama"))],
)
def test_logits_are_those_of_transformers(tmp_path, family):
    model = save(random_case(family, 0), tmp_path / "theirs")
    from_hf(tmp_path / "theirs", tmp_path / "run", without_tokenizer=True)
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/step-000000")
    ours = DecoderLM(config_from_dict(checkpoint.meta.config).model, 0)
    backend = get_backend(BackendConfig(name="mindspore", device="cpu", dtype="float64"))
    got = backend.evaluation_model(ours, checkpoint.model).logits(TOKENS)
    assert np.ptp(got) > 0
    assert_close(got, their_logits(model, TOKENS, "float64"), 1e-12)
