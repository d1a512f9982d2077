"""Tokenizers that are trained on the training documents of a config."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from moeport.config.data import BPETokenizer, DataConfig, LBPETokenizer, ScaffoldBPETokenizer
from moeport.data.documents import Documents, count_label, place
from moeport.data.tokenizer import END_OF_TEXT, SPLIT_PATTERN, Tokenizer, train_bpe
from moeport.launch.machine import cores_per_rank
from moeport.tokenizers import train
from moeport.tokenizers.definition import Definition, expression, numbered, write_definition
from moeport.tokenizers.pretokens import count_words
from moeport.tokenizers.vocabulary import Vocabulary

MAX_TOKENIZER_BYTES = 2**25
"""Bytes of text that a tokenizer is trained on, which takes some ten times as much memory; of more, a sample."""
CHARACTERS_PER_PIECE = 2**16
"""Longest part of a document that is in the sample or not."""


TRAINING_VERSION = 1
"""Grows when the same documents give another Scaffold-BPE or LBPE tokenizer."""

TrainedConfig = BPETokenizer | ScaffoldBPETokenizer | LBPETokenizer


@dataclass(frozen=True)
class Kind:
    """What a name in the config stands for."""

    label: str
    """With its article."""
    encoding: str
    """How text becomes tokens, of `moeport.tokenizers.definition.ENCODINGS`."""


KINDS = {
    "bpe": Kind("a BPE", "merges"),
    "scaffold_bpe": Kind("a Scaffold-BPE", "merges"),
    "lbpe": Kind("an LBPE", "longest_first"),
}


def training_key(tokenizer: Any) -> list[Any]:
    """What decides, together with the documents, which tokenizer is trained: a part of the name of a cache."""
    if isinstance(tokenizer, BPETokenizer):
        return [tokenizer.model_dump(), SPLIT_PATTERN]
    return [tokenizer.model_dump(), expression(tokenizer.pattern), TRAINING_VERSION]


def train_tokenizer(config: DataConfig, several: Sequence[Documents], report: Callable[[str], None]) -> Tokenizer:
    """A tokenizer for the training documents of one or more sources; of little text it has fewer tokens."""
    chosen = config.tokenizer
    assert isinstance(chosen, TrainedConfig)
    num_bytes = sum(documents.num_bytes for documents in several)
    share = "" if num_bytes <= MAX_TOKENIZER_BYTES else f"a sample of {MAX_TOKENIZER_BYTES / 1e6:.0f} MB of "
    label = f"{count_label(sum(map(len, several)))} ({num_bytes / 1e6:.1f} MB)"
    report(f"training {KINDS[chosen.name].label} tokenizer of {chosen.vocab_size:,} tokens on {share}{label}")
    texts = tokenizer_texts(several)
    if isinstance(chosen, BPETokenizer):
        return train_bpe(texts, chosen.vocab_size)
    vocabulary = _vocabulary(texts, chosen)
    if len(vocabulary.tokens) < chosen.vocab_size - 1:
        report(f"warning: the text yields a vocabulary of {len(vocabulary.tokens) + 1:,} tokens only")
    special = numbered(vocabulary, [END_OF_TEXT])
    definition = Definition(vocabulary, KINDS[chosen.name].encoding, chosen.pattern, special)
    return Tokenizer(write_definition(definition))


def _vocabulary(texts: Iterator[str], chosen: ScaffoldBPETokenizer | LBPETokenizer) -> Vocabulary:
    """All tokens but the end of text."""
    words = count_words(texts, chosen.pattern, cores_per_rank(None))
    algorithm = chosen.base if isinstance(chosen, LBPETokenizer) else chosen.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too little text; the caller says so
        return train(words, chosen.vocab_size - 1, algorithm)


def tokenizer_texts(several: Sequence[Documents]) -> Iterator[str]:
    """The texts that a tokenizer is trained on: all, or of too many a sample by a hash of their keys and places.

    The pieces of a long document are drawn one by one, since it may be the only one.
    """
    num_bytes = sum(documents.num_bytes for documents in several)
    limit = 2**64 * MAX_TOKENIZER_BYTES // max(1, num_bytes)
    for document in chain.from_iterable(several):
        if limit >= 2**64:
            yield document.text
            continue
        for start in range(0, len(document.text), CHARACTERS_PER_PIECE):
            if place(f"{document.key}:{start}" if start else document.key, b"tokenizer") < limit:
                yield document.text[start : start + CHARACTERS_PER_PIECE]
