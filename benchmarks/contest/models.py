"""The models whose training step is timed."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moeport.config import Config, load_config
from moeport.core.parameters import ParameterSpec
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
QUICKSTART_VOCABULARY = 4096


def _lm(
    layers: int, width: int, heads: int, kv_heads: int, moe: tuple[int, int, int], vocabulary: int
) -> dict[str, Any]:
    experts, top_k, hidden = moe
    return {
        "vocab_size": vocabulary,
        "num_layers": layers,
        "d_model": width,
        "attention": {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width // heads},
        "moe": {
            "num_experts": experts,
            "expert_hidden": hidden,
            "router": {"name": "topk", "top_k": top_k},
        },
    }


def _config(model: dict[str, Any], sequences: int, length: int) -> dict[str, Any]:
    return {
        "model": model,
        "data": {"sequence_length": length, "tokenizer": {"name": "byte"}},
        "training": {"batch_size": sequences},
    }


MODELS: dict[str, dict[str, Any] | Path] = {
    "844m": _config(_lm(8, 1024, 16, 4, (64, 8, 512), 8192), 16, 2048),
    "quickstart": QUICKSTART,
    "cpu": _config(_lm(4, 256, 4, 2, (16, 4, 256), 4096), 4, 512),
    "tiny": _config(_lm(2, 32, 2, 1, (4, 2, 32), 320), 2, 16),
}
"""Configs, as sections or as a file."""


def config_of(name: str, device: str, dtype: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a model in MODELS, or of a YAML file, for a device and type.

    Args:
        name: in MODELS, or a path.
        device: `backend.device`.
        dtype: `backend.dtype`.
        overrides: `key=value`, as for `moeport train --set`.
    """
    backend = [f"backend.device={device}", f"backend.dtype={dtype}"]
    source = MODELS.get(name, Path(name))
    if isinstance(source, Path):
        return load_config(source, [*backend, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(source), encoding="utf-8")
        return load_config(file, [*backend, *overrides])


def vocabulary_of(config: Config) -> int:
    """Its size, without training a tokenizer."""
    return config.model.vocab_size or int(getattr(config.data.tokenizer, "vocab_size", QUICKSTART_VOCABULARY))


def shapes_of(config: Config) -> DecoderLM:
    """The model without its weights."""
    return DecoderLM(config.model, vocabulary_of(config))


def weights_of(lm: DecoderLM) -> dict[str, np.ndarray]:
    """Random weights of the right sizes, drawn by all cores; not those that a run would start with."""

    def draw(spec: ParameterSpec) -> np.ndarray:
        if spec.init != "normal":
            return np.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, np.float32)
        random = np.random.default_rng(zlib.crc32(spec.name.encode()))
        return random.standard_normal(spec.shape, np.float32) * np.float32(spec.std)

    specs = lm.parameter_specs()
    with ThreadPoolExecutor() as pool:
        return dict(zip([spec.name for spec in specs], pool.map(draw, specs), strict=True))


def batches_of(config: Config, count: int) -> list[Batch]:
    """Micro-batches of random ids whose frequencies fall like 1 / rank, as in text."""
    vocabulary, random = vocabulary_of(config), np.random.default_rng(0)
    size = config.training.batch_size // config.training.gradient_accumulation
    shape = size, config.data.sequence_length + 1
    drawn = [np.exp(random.random(shape) * np.log(vocabulary)).astype(np.int64) - 1 for _ in range(count)]
    return [Batch(ids[:, :-1].copy(), ids[:, 1:].copy()) for ids in drawn]


def described(config: Config, name: str) -> Mapping[str, Any]:
    """Sizes of a model, for the results."""
    vocabulary = vocabulary_of(config)
    counts = config.model.parameter_counts(vocabulary)
    size = config.training.batch_size // config.training.gradient_accumulation
    return {
        "name": name,
        "parameters": counts.total,
        "active": counts.active,
        "tokens": size * config.data.sequence_length,
        "flops_per_token": config.model.training_flops_per_token(vocabulary, config.data.sequence_length),
    }
