"""The tokenizer of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeport.convert.folder import Folder
from moeport.data.tokenizer import Tokenizer, load_tokenizer
from moeport.errors import UserError
from moeport.training.run_dir import TOKENIZER_FILE


def tokenizer_of(folder: Folder, given: Path | None, without: bool) -> Tokenizer | None:
    """The tokenizer; None if the user wants none."""
    if without:
        return None
    file = given or folder.path / TOKENIZER_FILE
    if given is None and not file.is_file():
        raise UserError(
            f"{folder.path}: has no {TOKENIZER_FILE}, which training and generation need; give one with --tokenizer "
            "FILE (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it), or convert the weights alone "
            "with --without-tokenizer"
        )
    return load_tokenizer(file, end_of_text(folder))


def end_of_text(folder: Folder) -> str:
    """The token that ends a document: the model's end-of-sequence token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = _optional(folder.path / name)
        token = values.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    wanted = _optional(folder.path / "generation_config.json").get("eos_token_id", folder.config.get("eos_token_id"))
    number = wanted[0] if isinstance(wanted, list) and wanted else wanted
    tree = _optional(folder.path / TOKENIZER_FILE)
    added = tree.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("id") == number and isinstance(token.get("content"), str):
            return str(token["content"])
    return "<|endoftext|>"


def _optional(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
