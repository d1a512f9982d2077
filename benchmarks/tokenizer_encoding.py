"""Encoding beside the tokenizers library: MB/s on one thread and on all processors, peak memory, and whether ids agree.

    python benchmarks/tokenizer_encoding.py --tokenizers FOLDER [--text PATHS] [--megabytes 50] [--rounds 3]

FOLDER keeps a BPE and a Scaffold-BPE tokenizer of the text, which are trained where they are missing. Each run is a
process of its own; the contenders take turns. MB/s are of encoding alone, with compiled code loaded and no word seen
before; that of the library leaves out making arrays of its ids. Memory (VmHWM) includes the text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizer_texts import parser_of, read_texts, take_turns
from tokenizers import Tokenizer

from moeport.tokenizers import count_words, train
from moeport.tokenizers.definition import Definition, write_definition
from moeport.tokenizers.definition_reading import read_definition
from moeport.tokenizers.encoder import Encoder

CONTENDERS = {
    "tokenizers bpe": ("bpe", "", 1),
    "moeport bpe": ("bpe", "merges", 1),
    "moeport scaffold_bpe": ("scaffold_bpe", "merges", 1),
    "moeport lbpe": ("bpe", "longest_first", 1),
    "moeport scaffold_bpe, longest_first": ("scaffold_bpe", "longest_first", 1),
    "moeport bpe, longest_merge": ("bpe", "longest_merge", 1),
    "tokenizers bpe, all processors": ("bpe", "", 0),
    "moeport scaffold_bpe, all processors": ("scaffold_bpe", "merges", 0),
    "moeport lbpe, all processors": ("bpe", "longest_first", 0),
}
"""Vocabulary, encoding (none: the tokenizers library) and threads (0: one per processor)."""

BATCH = 256
"""Documents that are encoded at once."""


def encode(options: argparse.Namespace) -> None:
    """Encode with one contender in this process and print what was measured as the last line."""
    algorithm, encoding, threads = CONTENDERS[options.one]
    text = tokenizer_file(options, algorithm).read_text(encoding="utf-8")
    documents = read_texts(options.text, options.megabytes)
    size = sum(len(document.encode()) for document in documents)
    run = ours(text, encoding, threads, documents) if encoding else library(text, threads, documents)
    seconds, tokens, digest = 0.0, 0, hashlib.sha256()
    for spent, ids in run:
        seconds += spent
        tokens += sum(map(len, ids))
        for each in ids:
            digest.update(np.asarray(each, np.uint32).tobytes())
    print(json.dumps({"bytes": size, "seconds": seconds, "tokens": tokens, "digest": digest.hexdigest()}))


def library(text: str, threads: int, documents: Sequence[str]) -> Iterator[tuple[float, list[list[int]]]]:
    """Seconds and ids of each batch, by the tokenizers library."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if threads else "true"
    tokenizer = Tokenizer.from_str(text)
    for batch in batches(documents):
        start = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        yield time.perf_counter() - start, [encoding.ids for encoding in encodings]


def ours(text: str, encoding: str, threads: int, documents: Sequence[str]) -> Iterator[tuple[float, list[np.ndarray]]]:
    """Seconds and ids of each batch, by moeport."""
    definition = read_definition(text, encoding)
    Encoder(definition, "compiled").encode_bytes(b"loads compiled code")
    encoder = Encoder(definition, "compiled")
    for batch in batches(documents):
        start = time.perf_counter()
        ids = encoder.encode_batch(batch, workers=threads or None)
        yield time.perf_counter() - start, ids


def batches(documents: Sequence[str]) -> Iterator[Sequence[str]]:
    """The documents in groups of `BATCH`."""
    for start in range(0, len(documents), BATCH):
        yield documents[start : start + BATCH]


def tokenizer_file(options: argparse.Namespace, algorithm: str) -> Path:
    """Where the tokenizer of an algorithm is."""
    folder: Path = options.tokenizers
    return folder / f"{algorithm}-{options.pattern}-{options.vocab_size}.json"


def prepare(options: argparse.Namespace) -> None:
    """Train the tokenizers that are missing."""
    missing = [name for name in ("bpe", "scaffold_bpe") if not tokenizer_file(options, name).exists()]
    words = count_words(read_texts(options.text, options.megabytes), options.pattern) if missing else {}
    options.tokenizers.mkdir(parents=True, exist_ok=True)
    for name in missing:
        definition = Definition(train(words, options.vocab_size, name), pattern=options.pattern)
        tokenizer_file(options, name).write_text(write_definition(definition), encoding="utf-8")


def main() -> None:
    """Let the contenders take turns and print a table."""
    parser = parser_of(__doc__, CONTENDERS)
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder of the trained tokenizers")
    options = parser.parse_args()
    if options.one:
        encode(options)
        return
    prepare(options)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    digests: dict[str, str] = {}
    for number, name, result, memory in take_turns(CONTENDERS, options.rounds):
        rate = result["bytes"] / result["seconds"] / 1e6
        found[name].append({"rate": rate, "memory": memory, "length": result["bytes"] / result["tokens"]})
        digests[name] = result["digest"]
        print(f"round {number}, {name}: {rate:.1f} MB/s, {memory:.0f} MB", flush=True)
    print(f"{result['bytes'] / 1e6:.1f} MB of text, {options.vocab_size:,} tokens, pattern {options.pattern}")
    table(found)
    print("ids of BPE are the same:", "yes" if digests["moeport bpe"] == digests["tokenizers bpe"] else "NO")


def table(found: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, and rates as multiples of the library's on as many threads, round by round."""
    print(f"{'':36s} {'MB/s':>6s} {'memory':>8s} {'bytes/token':>12s}  times the library")
    for name, rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        reference = found["tokenizers bpe" if CONTENDERS[name][2] else "tokenizers bpe, all processors"]
        ratios = [each["rate"] / other["rate"] for each, other in zip(rounds, reference, strict=True)]
        print(
            f"{name:36s} {middle['rate']:6.1f} {middle['memory']:5.0f} MB {middle['length']:12.3f}"
            f"  {min(ratios):.1f} to {max(ratios):.1f}"
        )


if __name__ == "__main__":
    main()
