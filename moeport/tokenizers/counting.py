"""Counts of pre-tokens, and processes that count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from moeport.errors import RunError
from moeport.pool import Pool, Program, serve
from moeport.tokenizers.splitting import splitter

Counted = tuple[int, dict[bytes, int]]
"""Characters of a batch, and how often each of its pre-tokens occurs."""
PROGRAM = Program(__name__, "counts pre-tokens", "use fewer workers if memory ran out", RunError)


def counts_of(texts: Sequence[str], split: Callable[[str], list[str]]) -> Counted:
    """How often each pre-token of the texts occurs.

    Args:
        texts: as `as_text` gives them.
        split: what `splitter` gives.
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update(split(text))
    return sum(map(len, texts)), {word.encode("utf-8", "surrogateescape"): count for word, count in words.items()}


def counting(pattern: str, workers: int) -> Pool[list[str], Counted]:
    """Processes that count batches of texts, as `counts_of` does.

    Args:
        pattern: a name or a regular expression, which `splitter` has taken.
        workers: the largest number of processes.
    """
    return Pool(PROGRAM, pattern, workers)


def main() -> None:
    """One of the processes."""
    serve(_counter)


def _counter(pattern: str) -> Callable[[list[str]], Counted]:
    split = splitter(pattern)
    return lambda texts: counts_of(texts, split)
