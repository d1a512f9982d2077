"""Hugging Face to moeport and back: every byte of every tensor, and the logits in between."""

import json

import pytest

from moeport.backends import get_backend
from moeport.config import config_from_dict
from moeport.config.training import BackendConfig
from moeport.model.decoder import DecoderLM
from moeport.training.fits import check_parameters
from tests.support import assert_close
from tests.training.whole import load_checkpoint

pytest.importorskip("transformers", minversion="5.0")

from moeport.convert.family import FAMILIES
from moeport.convert.from_hf import from_hf
from moeport.convert.to_hf import ExportOptions, to_hf
from tests.convert.models import TOKENS, random_case, save, tensors, their_logits

NAMES = [family.model_type for family in FAMILIES]


def cases(first, count, *marks):
    return [
        pytest.param(random_case(name, seed), marks=marks, id=f"{name}-{seed}")
        for name in NAMES
        for seed in range(first, first + count)
    ]


def checkpoint_of(run):
    (path,) = (run / "checkpoints").iterdir()
    return load_checkpoint(path)


def our_logits(checkpoint, backend, dtype):
    model = DecoderLM(config_from_dict(checkpoint.meta.config).model, 0)
    check_parameters(checkpoint, model.parameter_specs())
    placed = get_backend(BackendConfig(name=backend, device="cpu", dtype=dtype)).evaluation_model(
        model, checkpoint.model
    )
    return placed.logits(TOKENS)


@pytest.mark.parametrize("case", [*cases(0, 3), *cases(3, 47, pytest.mark.slow)])
def test_every_byte_comes_back_and_the_logits_are_those_of_transformers(tmp_path, case):
    """Logits of weights in the type of the case, which float32 and float64 hold exactly."""
    model = save(case, tmp_path / "theirs")
    from_hf(tmp_path / "theirs", tmp_path / "run", without_tokenizer=True)
    done = to_hf(tmp_path / "run", tmp_path / "back", ExportOptions(shard_size=500 if case.shards else 10**9))
    assert done.verified
    assert tensors(tmp_path / "back") == tensors(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((tmp_path / folder / name).read_text()) for folder in ("theirs", "back"))
        assert after == before
    assert (done.files > 1) == case.shards
    checkpoint = checkpoint_of(tmp_path / "run")
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        want = their_logits(model, TOKENS, dtype)
        for backend in ("torch", "numpy"):
            assert_close(our_logits(checkpoint, backend, dtype), want, tolerance, f"{backend} {dtype}")
