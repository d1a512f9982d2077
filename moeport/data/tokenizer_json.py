"""The contents of a tokenizer.json: what is refused, and how its added tokens are kept out of text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from moeport.data.guarded import guarded
from moeport.errors import DataError
from moeport.reading import parse_json, read_bytes

NO_TOKENIZER = (
    "JSON, but not a tokenizer.json of Hugging Face tokenizers ({}); save one with "
    "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`"
)
MAX_IDS = 2**24
"""No vocabulary in use is a tenth of it, and every id costs a row of the embedding."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def definition_text(path: Path) -> str:
    """The contents of a tokenizer.json.

    Raises:
        DataError: the file cannot be read; the message does not name it.
    """
    try:
        return read_bytes(path).decode()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}; expected a tokenizer.json") from error


def parse_definition(definition: str) -> tuple[dict[str, Any], HFTokenizer]:
    """The JSON object of a tokenizer.json, and the tokenizer that it describes.

    Raises:
        DataError: it is not a tokenizer.json.
    """
    try:
        tree = parse_json(definition)
    except ValueError as error:
        raise DataError(f"{error}; expected a tokenizer.json") from error
    tokenizer = guarded(lambda: HFTokenizer.from_str(definition), len(definition), NO_TOKENIZER)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tree, tokenizer


def check_vocabulary(vocabulary: Mapping[str, int]) -> None:
    """Refuse ids that no embedding can have, or that do not say which token they are.

    Raises:
        DataError: names the tokens.
    """
    if not vocabulary:
        raise DataError("the vocabulary is empty; expected a trained tokenizer")
    largest = max(vocabulary, key=vocabulary.__getitem__)
    rows = vocabulary[largest] + 1
    if rows > min(MAX_IDS, 2 * len(vocabulary) + 2**16):
        raise DataError(
            f"token {largest!r} has the id {vocabulary[largest]:,}, but there are only {len(vocabulary):,} tokens; "
            "the embedding would have a row for every id: number the tokens from 0 without large gaps"
        )
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
        if number in tokens:
            raise DataError(f"tokens {tokens[number]!r} and {token!r} share the id {number}; expected an id for each")
        tokens[number] = token


def text_definition(definition: str, tree: Mapping[str, Any], end_of_text: str) -> str:
    """The tokenizer.json of a tokenizer to which added tokens are ordinary text; all ids are the same.

    The library can ignore added tokens that are marked as special. Those that are not so marked, and those that the
    model can also produce from pieces of text (Unigram and WordLevel, or BPE with merges for them), get a name that no
    text contains. Exempt are tokens that are not special and stand for white space or a single character.

    Args:
        definition: contents of the tokenizer.json.
        tree: its JSON object.
        end_of_text: the token that ends a document.
    """
    model, added = dict(tree["model"]), tree.get("added_tokens") or []
    mark = hashlib.sha256(definition.encode()).hexdigest()[:16]
    hidden = [token["content"] for token in added if _is_marker(token, end_of_text)]
    names = {
        token: f"\U0010ffff{mark}:{number}\U0010ffff"
        for number, token in enumerate(dict.fromkeys([*hidden, end_of_text]))
        if not (model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(token))
    }
    model["vocab"] = _renamed(model["vocab"], names)
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names, prefix)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("dropout"):
        model["dropout"] = None  # random merges would give the same text other tokens each time
    tokens = [
        {
            **token,
            "content": names.get(token["content"], token["content"]),
            "special": token["special"] or token["content"] in hidden,
        }
        for token in added
    ]
    return json.dumps({**tree, "model": model, "added_tokens": tokens, "truncation": None, "padding": None})


def _is_marker(token: Mapping[str, Any], end_of_text: str) -> bool:
    """Whether an added token is ordinary text when it is written out, rather than a way to write white space."""
    content = token["content"]
    plain = len(content) == 1 or content.replace("\u2581", " ").isspace()
    return token["special"] or content == end_of_text or not plain


def _renamed(vocabulary: Any, names: Mapping[str, str]) -> Any:
    """The vocabulary of a model, which is a mapping to ids or, for Unigram, a list of pieces with scores."""
    if isinstance(vocabulary, Mapping):
        return {names.get(token, token): number for token, number in vocabulary.items()}
    return [[names.get(token, token), score] for token, score in vocabulary]


def _makes(merge: Any, names: Mapping[str, str], prefix: str) -> bool:
    """Whether a merge of BPE reads or makes one of the named tokens."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right.removeprefix(prefix) in names
