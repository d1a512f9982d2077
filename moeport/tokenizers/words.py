"""The ids of single pre-tokens, in each of the encodings: the plain way, on which the compiled one is checked."""

from __future__ import annotations

from collections.abc import Callable

from moeport.tokenizers.definition import Definition
from moeport.tokenizers.longest import longest_first_of
from moeport.tokenizers.merging import merging


def word_encoder(definition: Definition) -> Callable[[bytes], list[int]]:
    """The function from a pre-token to its ids."""
    ids = definition.ids
    if definition.encoding == "longest_first":
        longest = longest_first_of(ids.keys())
        return lambda word: [ids[token] for token in longest(word)]
    merged = merging(definition.vocabulary, longest=definition.encoding == "longest_merge")
    demolished = definition.vocabulary.demolished

    def encode(word: bytes) -> list[int]:
        return [ids[piece] for token in merged(word) for piece in demolished.get(token, (token,))]

    return encode
