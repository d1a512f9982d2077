"""A run that takes a second: a byte-level model on a few lines of text."""

from pathlib import Path

from moeport.config import config_from_dict

TIMED = ("tokens_per_second", "step_time", "mfu", "save_time")
"""Metrics that depend on the machine's load."""
LINES = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(120)]


def tiny_values(folder: Path, **sections: dict) -> dict:
    """Values of a whole config whose text lies in `folder`; `sections` are laid over it."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for i in range(6):
            (text / f"{i}.txt").write_text("".join(LINES[i * 20 : (i + 1) * 20]))
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "num_layers": 2,
            "d_model": 16,
            "init_std": 0.02,
            "attention": {"num_heads": 2, "num_kv_heads": 1},
            "moe": {"num_experts": 4, "expert_hidden": 16, "router": {"name": "topk", "top_k": 2}},
        },
        "data": {
            "source": {
                "name": "files",
                "paths": [str(text / "[0-4].txt")],
                "validation_paths": [str(text / "5.txt")],
            },
            "tokenizer": {"name": "byte"},
            "sequence_length": 32,
            "cache_dir": str(folder / "cache"),
        },
        "training": {"steps": 6, "batch_size": 4, "evaluation_interval": 3},
        "optimizer": {"learning_rate": 0.01, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "checkpoint": {"interval": 1, "keep_last": 10},
        "metrics": {"tensorboard": False, "report": False, "peak_tflops": 1.0},
        "backend": {"device": "cpu"},
    }
    return _merged(values, sections)


def tiny_config(folder: Path, **sections: dict):
    return config_from_dict(tiny_values(folder, **sections))


def _merged(base: dict, over: dict) -> dict:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        renamed = both and "name" in value and value["name"] != base[key].get("name")
        result[key] = _merged(base[key], value) if both and not renamed else value
    return result
