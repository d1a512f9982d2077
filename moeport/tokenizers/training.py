"""Training: byte-pair encoding, and Scaffold-BPE (2404.17808, algorithm 1).

Scaffold-BPE merges as BPE does. After each merge it looks at both tokens that were joined: one that is left on its own
less often than the next entry of the queue becomes a *scaffold*. It waits in the queue under the frequency that it has
left, may be readmitted, and does not count in the size of the vocabulary meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from moeport.errors import DataError
from moeport.errors import choices as expected
from moeport.tokenizers.linked_words import LinkedWords
from moeport.tokenizers.queues import PairEntry, PairQueue, ScaffoldEntry, ScaffoldQueue, Ties
from moeport.tokenizers.training_choices import Choices
from moeport.tokenizers.vocabulary import ALGORITHMS, BYTES, Vocabulary


def train(
    words: Mapping[bytes, int],
    vocab_size: int,
    algorithm: str = "scaffold_bpe",
    choices: Choices | None = None,
    progress: Callable[[int], None] | None = None,
) -> Vocabulary:
    """Trains a vocabulary. The same words give the same one, whatever their order (unless `Choices.pair_ties` says so).

    Args:
        words: pre-tokens and how often each occurs.
        vocab_size: normal tokens, including the 256 bytes. Words that hold no more pairs yield fewer.
        algorithm: one of `ALGORITHMS`.
        choices: what the algorithms leave open.
        progress: called with the number of normal tokens now and then.

    Raises:
        DataError: unknown algorithm, a size below 256, a word that is not bytes, a frequency that cannot be, or a size
            out of reach where `choices` asks for an error.
    """
    if algorithm not in ALGORITHMS:
        raise DataError(f"algorithm: got {algorithm!r}; {expected(algorithm, ALGORITHMS)}")
    if vocab_size < len(BYTES):
        raise DataError(f"vocab_size: got {vocab_size}; expected at least {len(BYTES)}, one token for each byte")
    for word, occurs in words.items():
        if not isinstance(word, bytes):
            raise DataError(f"words: got {word!r}; expected pre-tokens as bytes, which `count_words` gives")
        if occurs < 0:
            raise DataError(f"words: {word!r} occurs {occurs} times; expected counts of 0 or more")
    choices = choices or Choices()
    training = _Training({word: n for word, n in words.items() if len(word) > 1 and n > 0}, algorithm, choices)
    while training.size < vocab_size and training.step():
        if progress is not None and training.size % PROGRESS_TOKENS == 0:
            progress(training.size)
    if training.size < vocab_size:
        _out_of_reach(training.size, vocab_size, choices)
    return training.vocabulary()


PROGRESS_TOKENS = 64
"""Tokens between two calls of `progress`."""


def _out_of_reach(size: int, vocab_size: int, choices: Choices) -> None:
    rare = "" if choices.min_frequency == 1 else f" that occurs {choices.min_frequency} times or more"
    message = (
        f"vocab_size: {vocab_size} is out of reach; the words yield {size} tokens, since no pair is left{rare}; train "
        f"on more text, or ask for at most {size}"
    )
    if choices.unreachable == "error":
        raise DataError(message)
    warnings.warn(message, stacklevel=3)


class _Training:
    """What algorithm 1 keeps: L, the queue, and the kind of each token."""

    def __init__(self, words: Mapping[bytes, int], algorithm: str, choices: Choices):
        self._algorithm, self._choices = algorithm, choices
        self._tokens = [*BYTES]
        self._merges: list[tuple[int, int]] = []
        self._frequencies = [0] * len(BYTES)  # those of bytes are not kept: bytes never become scaffolds
        self._normal = [True] * len(BYTES)
        self._words = LinkedWords(words)
        ties = Ties(choices.pair_ties, self._tokens)
        self._pairs = PairQueue(self._words, ties, choices)
        current = choices.scaffold_key == "current"
        self._waiting = ScaffoldQueue(self._words, ties, self._frequencies, current)
        self.size = len(BYTES)
        """Normal tokens."""

    def step(self) -> bool:
        """Merges the head of the queue, or readmits it; False: the queue is empty."""
        pair, scaffold = self._pairs.head(), self._waiting_head()
        if scaffold is not None and self._is_first(scaffold, pair):
            token = self._waiting.pop()
            self._normal[token] = True
            self.size += 1
            return True
        if pair is None:
            return False
        self._merge(pair)
        if self._algorithm == "scaffold_bpe":
            for component in sorted({pair.left, pair.right}):
                self._demote_if_rare(component)
        return True

    def _waiting_head(self) -> ScaffoldEntry | None:
        head = self._waiting.head()
        if head is not None and head.negative == 0:
            pair_left = self._pairs.head() is not None
            return head if self._choices.used_up == "readmitted" and not pair_left else None
        return head

    def _is_first(self, scaffold: ScaffoldEntry, pair: PairEntry | None) -> bool:
        if pair is None or scaffold.negative != pair.negative:
            return pair is None or scaffold.negative < pair.negative
        rule = self._choices.scaffold_ties
        return rule == "scaffold" or (rule == "rule" and scaffold.tie < pair.tie)

    def _merge(self, pair: PairEntry) -> None:
        token, places, frequency = len(self._tokens), self._pairs.pop(), -pair.negative
        if pair.left == pair.right:
            places = self._words.disjoint(places)
            frequency = self._words.frequency(places)
        self._tokens.append(self._tokens[pair.left] + self._tokens[pair.right])
        self._merges.append((pair.left, pair.right))
        self._frequencies.append(frequency)
        self._normal.append(True)
        self._frequencies[pair.left] -= frequency
        self._frequencies[pair.right] -= frequency
        for pairs in self._words.merge(token, places):
            self._pairs.add(pairs)
        self.size += 1

    def _demote_if_rare(self, component: int) -> None:
        """Makes a normal token a waiting scaffold if the next entry of the queue is more frequent."""
        if component < len(BYTES) or not self._normal[component]:
            return
        if self._frequencies[component] < self._next_frequency():
            self._normal[component] = False
            self._waiting.push(component, self._merges[component - len(BYTES)])
            self.size -= 1

    def _next_frequency(self) -> int:
        heads: list[PairEntry | ScaffoldEntry | None] = [self._pairs.head()]
        if self._choices.head == "queue":
            heads.append(self._waiting_head())
        return max((-head.negative for head in heads if head is not None), default=0)

    def vocabulary(self) -> Vocabulary:
        """What training gives."""
        tokens = self._tokens
        merges = tuple((tokens[left], tokens[right]) for left, right in self._merges)
        return Vocabulary(self._algorithm, merges, frozenset(tokens[token] for token in self._waiting))
