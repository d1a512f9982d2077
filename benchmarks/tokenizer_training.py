"""Training of tokenizers beside the tokenizers library: seconds, peak memory, and whether BPE comes out the same.

    python benchmarks/tokenizer_training.py [--text PATHS] [--megabytes 50] [--vocab-size 32000] [--rounds 3]

Each run is a process of its own; the contenders take turns. Seconds are those of cutting, counting and merging, without
imports and reading. Memory is the largest sum of the peaks (VmHWM) of the processes that run at the same time, so pages
that they share count several times. It includes the text, which is held as a list for all of them. BPE breaks ties as
the library does (`Choices(pair_ties="huggingface")`), Scaffold-BPE by its default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from tokenizer_texts import parser_of, read_texts, take_turns
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from moeport.tokenizers import Choices, count_words, train
from moeport.tokenizers.byte_level import from_characters
from moeport.tokenizers.patterns import PATTERNS

Trained = tuple[dict[str, float], list[bytes]]
"""Seconds of each part, and the merged tokens in order."""


def library(texts: Sequence[str], pattern: str, vocab_size: int) -> Trained:
    """The tokenizers library, with the same pattern and alphabet."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    start = time.perf_counter()
    tokenizer.train_from_iterator(texts, trainer)
    seconds = {"all": time.perf_counter() - start}
    return seconds, merged(from_characters(token) for token in in_order(tokenizer.get_vocab()))


def in_order(ids: dict[str, int]) -> list[str]:
    """The tokens in the order of their ids."""
    return sorted(ids, key=ids.__getitem__)


def merged(tokens: Iterable[bytes]) -> list[bytes]:
    """Tokens without the single bytes."""
    return [token for token in tokens if len(token) > 1]


def ours(algorithm: str, choices: Choices) -> Callable[[Sequence[str], str, int], Trained]:
    """The trainer of moeport."""

    def contender(texts: Sequence[str], pattern: str, vocab_size: int) -> Trained:
        start = time.perf_counter()
        words = count_words(texts, pattern)
        counted = time.perf_counter()
        vocabulary = train(words, vocab_size, algorithm, choices)
        end = time.perf_counter()
        print(f"{len(words):,} distinct pre-tokens, {len(vocabulary.scaffolds):,} scaffolds")
        seconds = {"all": end - start, "cutting": counted - start, "merging": end - counted}
        return seconds, merged(vocabulary.expanded)

    return contender


CONTENDERS = {
    "tokenizers bpe": library,
    "moeport bpe": ours("bpe", Choices(pair_ties="huggingface")),
    "moeport scaffold_bpe": ours("scaffold_bpe", Choices()),
}


def run_one(options: argparse.Namespace) -> None:
    """Train one contender in this process and print what was measured as the last line."""
    texts = read_texts(options.text, options.megabytes)
    size = sum(len(text.encode()) for text in texts)
    seconds, tokens = CONTENDERS[options.one](texts, options.pattern, options.vocab_size)
    digest = hashlib.sha256(b"".join(b"%d %s" % (len(token), token) for token in tokens)).hexdigest()
    print(json.dumps({"bytes": size, "seconds": seconds, "digest": digest}))


def main() -> None:
    """Let the contenders take turns and print a table."""
    options = parser_of(__doc__, CONTENDERS).parse_args()
    if options.one:
        run_one(options)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    digests: dict[str, str] = {}
    for number, name, result, memory in take_turns(CONTENDERS, options.rounds):
        found[name].append({**result["seconds"], "memory": memory})
        digests[name] = result["digest"]
        print(f"round {number}, {name}: {result['seconds']['all']:.1f} s, {memory:.0f} MB", flush=True)
    print(f"{result['bytes'] / 1e6:.1f} MB of text, {options.vocab_size:,} tokens, pattern {options.pattern}")
    table(found)
    print("BPE is the same:", "yes" if digests["moeport bpe"] == digests["tokenizers bpe"] else "NO")


def table(found: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, and times as a share of the library's, round by round."""
    print(f"{'':22s} {'seconds':>8s} {'cutting':>8s} {'merging':>8s} {'memory':>8s}  of the library's time")
    reference = found["tokenizers bpe"]
    columns = ("all", "cutting", "merging")
    for name, rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        parts = " ".join(f"{middle[key]:8.1f}" if key in middle else f"{'':8s}" for key in columns)
        ratios = [each["all"] / other["all"] for each, other in zip(rounds, reference, strict=True)]
        print(f"{name:22s} {parts} {middle['memory']:5.0f} MB  {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
