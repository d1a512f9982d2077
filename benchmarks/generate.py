"""Times generation with the cache against computing the whole text anew for each token, and against transformers.

    python benchmarks/generate.py [--steps 512] [--batch 1] [--layers 4] [--width 512] [--rounds 2]

One model of random weights on one device. Each round runs every contender once, in turn, so that the load of the
machine meets all alike: `cache` and `anew` are moeport's decoders, and `transformers` is `generate` with its cache on
the same model, exported with `moeport.to_hf` (left out where transformers is missing). All take the most likely token;
the scores of `cache` and `anew` are compared at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import EvaluationModel
from moeport.config import config_from_dict
from moeport.config.schema import Config
from moeport.core.parameters import initial_parameters
from moeport.model.decoder import DecoderLM
from moeport.model.decoding import Decoder, RecomputingDecoder

PROMPT = 16
"""Tokens of a prompt."""
VOCABULARY = 8192


def config_of(options: argparse.Namespace, folder: Path) -> Config:
    """A model that transformers has too: Qwen3-MoE."""
    return config_from_dict(
        {
            "run": {"dir": str(folder / "run")},
            "model": {
                "num_layers": options.layers,
                "d_model": options.width,
                "vocab_size": VOCABULARY,
                "attention": {"num_heads": options.width // 64, "num_kv_heads": options.width // 128, "qk_norm": True},
                "moe": {"num_experts": 16, "expert_hidden": options.width, "router": {"name": "topk", "top_k": 2}},
            },
            "data": {"sequence_length": PROMPT + options.steps},
            "backend": {"device": options.device, "dtype": options.dtype},
        }
    )


def greedy(make: Callable[[], Decoder], prompts: np.ndarray, steps: int) -> np.ndarray:
    """Continue prompts (B, S). Returns the last scores (B, V)."""
    decoder = make()
    scores = decoder.start(prompts.tolist())
    for _ in range(steps - 1):
        scores = decoder.step(scores.argmax(1).tolist())
    return scores


def of_transformers(
    config: Config, params: dict[str, np.ndarray], prompts: np.ndarray, steps: int, folder: Path
) -> Callable[[], Any] | None:
    """`generate` of transformers on the exported model."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError:
        return None
    from moeport.convert.export_options import ExportOptions
    from moeport.convert.to_hf import to_hf
    from moeport.training.checkpoint import save_checkpoint
    from moeport.training.checkpoint_meta import CheckpointMeta
    from moeport.version import VERSION

    meta = CheckpointMeta(0, 0, None, None, "", config.model_dump(mode="json"), VERSION)
    save_checkpoint(config.run.dir / "checkpoints", meta, params, {})
    to_hf(config.run.dir, folder / "hf", ExportOptions())
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts)
    limits = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "use_cache": True}

    def run() -> Any:
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)

    return run


def timed(contenders: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each contender in each round, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 512, "batch": 1, "layers": 4, "width": 512, "rounds": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> None:
    """Print the tokens per second of each contender, and the ratios."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options, Path(folder))
        lm = DecoderLM(config.model, VOCABULARY)
        params = initial_parameters(lm.parameter_specs(), 0)
        model: EvaluationModel = get_backend(config.backend).evaluation_model(lm, params)
        prompts, context = (
            np.random.default_rng(0).integers(1, VOCABULARY, (options.batch, PROMPT)),
            PROMPT + options.steps,
        )
        contenders: dict[str, Callable[[], Any]] = {
            "cache": lambda: greedy(lambda: model.decoder(context), prompts, options.steps),
            "anew": lambda: greedy(lambda: RecomputingDecoder(context, model.logits), prompts, options.steps),
        }
        if "transformers" not in options.without:
            peer = of_transformers(config, dict(params), prompts, options.steps, Path(folder))
            contenders |= {"transformers": peer} if peer else {}
        contenders = {name: run for name, run in contenders.items() if name not in options.without}
        timed({"cache": lambda: greedy(lambda: model.decoder(context), prompts, 4)}, 1)
        seconds, results = timed(contenders, options.rounds)
    tokens = options.steps * options.batch
    report: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}, "seconds": seconds}
    best = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in best.items():
        print(f"{name:13} {median:8.2f} s  {tokens / median:9.1f} tokens/s  {median / best['cache']:6.2f} x cache")
    if "anew" in results:
        error = float(np.abs(results["cache"] - results["anew"]).max() / np.abs(results["anew"]).max())
        print(f"largest difference of the last scores, relative to the largest score: {error:.1e}")
        report["difference"] = error
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
