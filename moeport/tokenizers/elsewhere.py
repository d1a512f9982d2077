"""A tokenizer trained elsewhere, encoded by LBPE: the same vocabulary and ids, the longest token first."""

from __future__ import annotations

import json

from moeport.reading import parse_json
from moeport.tokenizers.definition import write_definition
from moeport.tokenizers.definition_reading import read_definition


def longest_first_of(definition: str) -> str:
    """The tokenizer.json that encodes with the vocabulary of another by LBPE.

    Every token keeps its id. Added tokens, the normalizer, the pre-tokenizer, the decoder and the post-processor stay
    as they are; truncation and padding are switched off.

    Args:
        definition: contents of a tokenizer.json of byte-level BPE, such as those of GPT-2, Llama 3 and Qwen, or of one
            that was trained here.

    Raises:
        DataError: it is of another kind, which is named: SentencePiece's, WordPiece, or BPE that is not byte-level.
    """
    model = parse_json(write_definition(read_definition(definition, "longest_first")))["model"]
    tree = {**parse_json(definition), "model": model, "truncation": None, "padding": None}
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"
