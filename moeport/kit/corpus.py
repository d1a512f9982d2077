"""The text and the model of the kit's trainings: made here, so that every machine has the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCUMENTS, SENTENCES = 48, 40
FILE = "text/{:02d}.txt"
_WORDS = (
    ("the first expert", "a second expert", "the router", "every token", "a small model", "the last layer"),
    ("takes", "sends", "counts", "weighs", "sorts", "returns"),
    ("two rows", "the gate", "its share", "a batch", "the rest", "one token"),
)


def write_corpus(folder: Path) -> None:
    """Write documents of simple sentences below a folder."""
    for document in range(DOCUMENTS):
        file = folder / FILE.format(document)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(map(_sentence, range(document * SENTENCES, (document + 1) * SENTENCES))))


def _sentence(number: int) -> str:
    drawn = number * 2654435761 % 2**32
    return (
        " ".join(words[(drawn >> shift) % len(words)] for words, shift in zip(_WORDS, (28, 22, 16), strict=True))
        + ".\n"
    )


def training(**changes: Any) -> dict[str, Any]:
    """A config of a small model; paths are relative to the folder that a process runs in."""
    return {
        "run": {"dir": "run"},
        "model": {
            "num_layers": 2,
            "d_model": 64,
            "attention": {"num_heads": 4, "num_kv_heads": 2},
            "moe": {"num_experts": 8, "expert_hidden": 64, "router": {"name": "topk", "top_k": 2}},
        },
        "data": {
            "source": {"name": "files", "paths": ["text/*.txt"]},
            "tokenizer": {"name": "byte"},
            "sequence_length": 64,
            "cache_dir": "cache",
        },
        "training": {"steps": 20, "batch_size": 16, "evaluation_interval": 0},
        "optimizer": {"learning_rate": 0.01, "schedule": {"name": "constant", "warmup_steps": 2}},
        "metrics": {"report": False, "tensorboard": False, "peak_tflops": 1.0},
        **changes,
    }
