"""A classifier of digits that takes seconds."""

from typing import Any

from moeport.config import config_from_dict


def digits_values(folder, **sections):
    """Values of a whole config; `sections` are laid over it, key by key of the section."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "num_layers": 2,
            "d_model": 16,
            "init_std": 0.2,
            "attention": {"num_heads": 2},
            "moe": {"num_experts": 4, "expert_hidden": 16, "router": {"name": "topk", "top_k": 2}},
        },
        "data": {"source": {"name": "digits", "patch_size": 4}, "validation_fraction": 0.2},
        "training": {"steps": 6, "batch_size": 8, "evaluation_interval": 3},
        "optimizer": {"learning_rate": 0.01, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "checkpoint": {"interval": 1, "keep_last": 10},
        "metrics": {"tensorboard": False, "report": False, "peak_tflops": 1.0},
        "backend": {"device": "cpu"},
    }
    return {key: {**value, **sections.get(key, {})} for key, value in values.items()}


def digits_config(folder, **sections):
    return config_from_dict(digits_values(folder, **sections))
