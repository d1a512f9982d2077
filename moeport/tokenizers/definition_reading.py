"""Reads a tokenizer.json: one of ours, or an ordinary one of byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeport.errors import DataError
from moeport.reading import parse_json
from moeport.tokenizers.byte_level import from_characters
from moeport.tokenizers.definition import FORMAT, MODEL_TYPE, Definition
from moeport.tokenizers.normalizing import NORMALIZERS
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.vocabulary import BYTES, Vocabulary

EXPECTED = "expected a tokenizer.json of `moeport tokenizer train`, or of byte-level BPE"


def is_ours(tree: Any) -> bool:
    """Whether the JSON value is a tokenizer.json that only moeport reads."""
    model = tree.get("model") if isinstance(tree, Mapping) else None
    return isinstance(model, Mapping) and str(model.get("type")).startswith("moeport/")


def read_definition(text: str, encoding: str | None = None) -> Definition:
    """The tokenizer of a tokenizer.json.

    An ordinary one of byte-level BPE is read as well, so that its vocabulary can be encoded with in another way.

    Args:
        text: contents of the file.
        encoding: one of `ENCODINGS`, in place of that of the file.

    Raises:
        DataError: what is wrong with it.
    """
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise DataError(f"{error}; {EXPECTED}") from error
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        raise DataError(f"JSON without an object `model`; {EXPECTED}")
    try:
        return _ours(tree, model, encoding) if is_ours(tree) else _ordinary(tree, model, encoding or "merges")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"an entry is missing or malformed ({type(error).__name__}: {error}); {EXPECTED}") from error
    except ValueError as error:
        raise DataError(f"{error}; {EXPECTED}") from error


def _ours(tree: Mapping[str, Any], model: Mapping[str, Any], encoding: str | None) -> Definition:
    if model["type"] != MODEL_TYPE or model["format"] > FORMAT:
        raise DataError(
            f"the model is {model['type']!r} in format {model['format']}; this version of moeport reads {MODEL_TYPE!r} "
            f"up to format {FORMAT}: install a later one"
        )
    merges = _merges(model["merges"])
    scaffolds = frozenset(left + right for left, right in _at(merges, model["scaffolds"]))
    vocabulary = Vocabulary(model["algorithm"], merges, scaffolds, BYTES)
    return _definition(tree, model, vocabulary, encoding or model["encoding"])


def _ordinary(tree: Mapping[str, Any], model: Mapping[str, Any], encoding: str) -> Definition:
    """Byte-level BPE without anything that our encoders do not know."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise DataError(f"the model is {kind!r}, not byte-level BPE; {EXPECTED}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(key):
            raise DataError(f"model.{key} is {model[key]!r}; {EXPECTED}")
    merges = _merges(model["merges"])
    if encoding == "longest_first" and not _are_in_order(merges):
        merges = ()
    if encoding == "merges" and (model.get("ignore_merges") or len(merges) < len(model["merges"])):
        raise DataError(
            "it has tokens that several merges make, or takes whole words before merging (ignore_merges); our encoder "
            "knows neither: choose the encoding longest_first, or use the tokenizers library"
        )
    vocabulary = Vocabulary("bpe", merges, frozenset(), BYTES)
    return _definition(tree, model, vocabulary, encoding)


def _definition(tree: Mapping[str, Any], model: Mapping[str, Any], vocabulary: Vocabulary, encoding: str) -> Definition:
    added = {token["content"]: int(token["id"]) for token in tree.get("added_tokens") or []}
    numbers = {from_characters(token): int(number) for token, number in model["vocab"].items() if token not in added}
    derived = {token: number for number, token in enumerate(vocabulary.tokens)}
    return Definition(
        vocabulary,
        encoding,
        _pattern(tree.get("pre_tokenizer") or {}),
        added,
        None if numbers == derived else numbers,
        model.get("training") or {},
        _normalizer(tree.get("normalizer")),
    )


def _merges(entries: Sequence[Any]) -> tuple[tuple[bytes, bytes], ...]:
    """Pairs of byte strings; older files write a pair as one string with a space. Later ways to a token are dropped."""
    pairs: dict[bytes, tuple[bytes, bytes]] = {}
    for entry in entries:
        left, right = map(from_characters, entry.split(" ") if isinstance(entry, str) else entry)
        pairs.setdefault(left + right, (left, right))
    return tuple(pairs.values())


def _are_in_order(merges: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether each pair joins bytes or tokens of earlier ones; files that were converted from tiktoken's need not."""
    known = {*BYTES}
    for left, right in merges:
        if not {left, right} <= known:
            return False
        known.add(left + right)
    return True


def _at(merges: Sequence[tuple[bytes, bytes]], ranks: Sequence[int]) -> list[tuple[bytes, bytes]]:
    outside = [rank for rank in ranks if not 0 <= rank < len(merges)]
    if outside:
        raise DataError(f"scaffold {outside[0]} is not a merge; expected numbers from 0 to {len(merges) - 1}")
    return [merges[rank] for rank in ranks]


def _pattern(tree: Mapping[str, Any]) -> str:
    """The name of the pattern, or its expression: of a Split with ByteLevel after it, or of ByteLevel alone (GPT-2)."""
    steps: list[Mapping[str, Any]] = list(tree["pretokenizers"]) if tree.get("type") == "Sequence" else [tree]
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise DataError("its pre-tokenizer adds a space before texts (add_prefix_space); " + EXPECTED)
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and _isolates(steps[0]):
        found = str(steps[0]["pattern"]["Regex"])
        return next((name for name, known in PATTERNS.items() if known == found), found)
    raise DataError(f"its pre-tokenizer is {', '.join(map(str, kinds)) or 'missing'}; expected Split and ByteLevel")


def _normalizer(tree: Mapping[str, Any] | None) -> str | None:
    """The one that there is, which may be the only one of a sequence."""
    steps = tree["normalizers"] if tree and tree.get("type") == "Sequence" else [tree] if tree else []
    kinds = [step.get("type") for step in steps]
    if len(kinds) > 1 or not {*kinds} <= {*NORMALIZERS}:
        raise DataError(f"it has a normalizer ({', '.join(map(str, kinds))}) other than {NORMALIZERS[0]}; {EXPECTED}")
    return kinds[0] if kinds else None


def _isolates(step: Mapping[str, Any]) -> bool:
    return step.get("behavior") == "Isolated" and not step.get("invert")
