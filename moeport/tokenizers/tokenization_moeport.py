"""Scaffold-BPE and LBPE in transformers. This file lies beside the tokenizer.json that it reads, and needs no moeport.

`AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` loads it; it imports transformers and tokenizers alone.
The tokenizers library knows all parts of that file but the model. It is given a model of the vocabulary alone, and
handed the tokens of each pre-token; offsets, added tokens, padding, truncation and decoding are the library's.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers import Token, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODEL_TYPE, FORMAT = "moeport/BytePairs", 1
"""The model that this file reads, and the latest version of its entries."""

MAX_CACHED_WORDS = 2**17
"""Pre-tokens whose tokens are remembered."""

Split = Callable[[str], Iterable[str]]
"""From a pre-token to its tokens, in the printable characters with which byte-level vocabularies write bytes."""


class Words:
    """The tokens of pre-tokens, for the tokenizers library.

    Args:
        model: the model of the tokenizer.json.
    """

    def __init__(self, model: dict[str, Any]):
        self._ids: dict[str, int] = model["vocab"]
        self._split = ENCODINGS[model["encoding"]](model)
        self._cache: dict[str, list[Token]] = {}

    def pre_tokenize(self, text: Any) -> None:
        """Called with the pre-tokens of a text."""
        text.tokenize(self.tokens)

    def tokens(self, word: str) -> list[Token]:
        """The tokens of a pre-token."""
        found = self._cache.get(word)
        if found is None:
            found, start = [], 0
            for piece in self._split(word):
                end = start + len(piece.encode())  # the library counts in UTF-8
                found.append(Token(self._ids[piece], piece, (start, end)))
                start = end
            if len(self._cache) >= MAX_CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = found
        return found


def _by_rank(model: dict[str, Any]) -> Split:
    """BPE with all merges in the order of training, then without scaffold tokens."""
    merges = [(left, right) for left, right in model["merges"]]
    single = [token for token in model["vocab"] if len(token) == 1]
    expanded = dict.fromkeys([*single, *(left + right for left, right in merges)])
    bpe = models.BPE(vocab={token: rank for rank, token in enumerate(expanded)}, merges=merges)
    return _without_scaffolds(model, lambda word: (token.value for token in bpe.tokenize(word)))


def _by_merged_length(model: dict[str, Any]) -> Split:
    """Merges the pair that makes the longest token first, of several the leftmost; then without scaffold tokens."""
    merges = {(left, right) for left, right in model["merges"]}

    def split(word: str) -> Iterator[str]:
        parts, following, before = list(word), list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))
        queue: list[tuple[int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(parts) and (parts[left], parts[right]) in merges:
                heapq.heappush(queue, (-len(parts[left] + parts[right]), left))

        for place in range(len(word) - 1):
            offer(place, place + 1)
        while queue:
            size, left = heapq.heappop(queue)
            right = following[left]
            if not parts[left] or right == len(parts) or len(parts[left] + parts[right]) != -size:
                continue
            if (parts[left], parts[right]) not in merges:
                continue
            parts[left], parts[right] = parts[left] + parts[right], ""
            following[left] = after = following[right]
            if after < len(parts):
                before[after] = left
            offer(left, after)
            offer(before[left], left)
        return filter(None, parts)

    return _without_scaffolds(model, split)


def _by_length(model: dict[str, Any]) -> Split:
    """The longest token anywhere in the pre-token, of several the leftmost; then those to its left and to its right."""
    tokens = model["vocab"].keys()
    sizes = sorted({len(token) for token in tokens}, reverse=True)

    def split(word: str) -> Iterator[str]:
        found, gaps = [], [(0, len(word))]
        for size in sizes:
            left: list[tuple[int, int]] = []
            for start, end in gaps:
                place = start
                while place + size <= end:
                    if word[place : place + size] in tokens:
                        left.append((start, place))
                        found.append((place, place + size))
                        start = place = place + size
                    else:
                        place += 1
                left.append((start, end))
            gaps = left
        return (word[start:end] for start, end in sorted(found))

    return split


def _without_scaffolds(model: dict[str, Any], split: Split) -> Split:
    """Each scaffold token becomes the shortest normal tokens that it was merged from."""
    scaffolds = {left + right: (left, right) for left, right in (model["merges"][rank] for rank in model["scaffolds"])}

    def normal(token: str) -> Iterator[str]:
        if token not in scaffolds:
            yield token
            return
        for part in scaffolds[token]:
            yield from normal(part)

    return lambda word: (piece for token in split(word) for piece in normal(token))


ENCODINGS: dict[str, Callable[[dict[str, Any]], Split]] = {
    "merges": _by_rank,
    "longest_first": _by_length,
    "longest_merge": _by_merged_length,
}
"""How each encoding of a model splits a pre-token."""


class MoeportTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of moeport: Scaffold-BPE, LBPE, or LBPE over the vocabulary of another tokenizer."""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    _auto_class = "AutoTokenizer"

    def __init__(self, *args: Any, tokenizer_file: str, **kwargs: Any):
        with open(tokenizer_file, encoding="utf-8") as file:
            definition = json.load(file)
        model = definition["model"]
        if model.get("type") != MODEL_TYPE or model["format"] > FORMAT:
            raise ValueError(
                f"{tokenizer_file}: the model is {model.get('type')!r} in format {model.get('format')}; expected "
                f"{MODEL_TYPE!r} up to format {FORMAT}: use the tokenization_moeport.py that was written with it"
            )
        super().__init__(*args, tokenizer_object=_of_vocabulary(definition), **kwargs)
        self._definition = definition
        self._add_words()

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Keeps `tokenizer_file`; transformers 5 would pass the vocabulary in its place and lose the pre-tokenizer."""
        return kwargs

    def _add_words(self) -> None:
        self._words = Words(self._definition["model"])
        steps = [self._tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer.custom(self._words)]
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def _current_definition(self) -> dict[str, Any]:
        """The definition with the tokens that were added, and with the post-processor of now."""
        tokens, after = self._tokenizer.get_added_tokens_decoder(), self._tokenizer.post_processor
        return {
            **self._definition,
            "added_tokens": [{"id": number, **tokens[number].__getstate__()} for number in sorted(tokens)],
            "post_processor": None if after is None else json.loads(after.__getstate__()),
        }

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        name = f"{filename_prefix}-tokenizer.json" if filename_prefix else "tokenizer.json"
        path = os.path.join(save_directory, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self._current_definition(), file, ensure_ascii=False, indent=1)
            file.write("\n")
        return (*file_names, path)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_tokenizer", "_words")}
        return {**state, "_definition": self._current_definition()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["_tokenizer"] = _of_vocabulary(self._definition)
        self._tokenizer.encode_special_tokens = self.split_special_tokens
        self._add_words()

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        """As in transformers, which would ask the model of the vocabulary alone."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for word, _ in words for token in self._words.tokens(word)]


def _of_vocabulary(definition: dict[str, Any]) -> Tokenizer:
    """A tokenizer of the library with the definition's vocabulary, which splits no pre-token.

    Added tokens are in the vocabulary unless the library would number them as the definition does.
    """
    vocabulary, added = definition["model"]["vocab"], definition["added_tokens"]
    after = range(len(vocabulary), len(vocabulary) + len(added))
    if [token["id"] for token in added] != [*after]:
        vocabulary = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": []}
    return Tokenizer.from_str(json.dumps({**definition, "model": model}))
