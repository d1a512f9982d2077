"""Bits per byte of a run's held-out documents by folder, beside gzip and xz: which text is easy, and which is not.

    python benchmarks/held_out_by_folder.py [RUN_DIR]

A token's bits go to the document it belongs to; the windows are those of training's evaluation.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
from collections import defaultdict
from pathlib import Path

import numpy as np

from moeport.backends import get_backend
from moeport.data import prepare_data
from moeport.data.sources import read_documents
from moeport.model.decoder import DecoderLM
from moeport.training.checkpoint import find_checkpoint, open_checkpoint
from moeport.training.run_dir import CHECKPOINT_DIR, config_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="?", type=Path, default=Path("runs/quickstart"))
    checkpoint = open_checkpoint(find_checkpoint(parser.parse_args().run_dir / CHECKPOINT_DIR, "latest"))
    config = config_of(checkpoint)
    documents = read_documents(config.data).validation
    data = prepare_data(config.data, report=print)
    lm = DecoderLM(config.model, data.tokenizer.vocab_size)
    model = get_backend(config.backend).evaluation_model(lm, checkpoint.model)

    bits: dict[int, float] = defaultdict(float)
    document = 0
    for token_BS, target_BS in data.validation.windows(4):
        logits = model.logits(token_BS).astype(np.float64).reshape(-1, lm.vocab_size)
        target = target_BS.reshape(-1)
        top = logits.max(1)
        nats = top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(target.size), target]
        for token, nat in zip(target, nats, strict=True):
            bits[document] += nat / np.log(2)
            document += token == data.tokenizer.end_of_text
    assert document == len(documents)

    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
    for number, held_out in enumerate(documents):
        text = held_out.text.encode()
        row = [1, len(text), bits[number], 8 * len(gzip.compress(text, 9)), 8 * len(lzma.compress(text, preset=9))]
        folder = held_out.name.split("/")[0] if "/" in held_out.name else "(top level)"
        sums[folder] += row
        sums["all"] += row
        if folder != "encodings":
            sums["all but encodings"] += row
    print(f"{'folder':20s} {'files':>6s} {'bytes':>9s} {'moeport':>8s} {'gzip -9':>8s} {'xz -9':>8s}   bits per byte")
    for folder, (files, size, *totals) in sorted(sums.items(), key=lambda item: item[1][1]):
        print(f"{folder:20s} {files:6.0f} {size:9,.0f} " + " ".join(f"{total / size:8.3f}" for total in totals))


if __name__ == "__main__":
    main()
