"""Subjects that take a fraction of a second: two blocks of width 32, four experts, a byte-level vocabulary."""

from pathlib import Path
from typing import Any

from moeport.config import config_from_dict, resolved_yaml
from moeport.parity.subject import Size, build_subject
from tests.training.tiny import tiny_values

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "d_model": 32,
    "init_std": 0.2,
    "output_z_loss": 1e-4,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "qk_norm": True},
    "moe": {
        "num_experts": 4,
        "expert_hidden": 16,
        "router_z_loss": 1e-3,
        "router": {"name": "topk", "top_k": 2},
        "allow_future_tokens": True,
    },
}
SIZE = Size(sequences=2, tokens=16, steps=3)


def config_file(folder: Path, router: dict | None = None, **sections: dict) -> Path:
    """A whole config as a YAML file in `folder`."""
    model = {**MODEL, "moe": {**MODEL["moe"], "router": router or MODEL["moe"]["router"]}}
    optimizer = {"learning_rate": 0.01, "schedule": {"name": "constant", "warmup_steps": 0}}
    config = config_from_dict(tiny_values(folder, **{"model": model, "optimizer": optimizer, **sections}))
    path = folder / "config.yaml"
    path.write_text(resolved_yaml(config))
    return path


def subject(
    folder: Path, spec: str = "torch-cpu", router: dict | None = None, overrides=(), size: Size = SIZE, **sections: dict
):
    """A subject of the tiny config."""
    return build_subject(config_file(folder, router, **sections), spec, overrides, size=size)
