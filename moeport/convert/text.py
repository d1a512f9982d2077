"""The tokenizer of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeport.convert.folder import Folder, read_object
from moeport.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from moeport.errors import UserError
from moeport.training.run_dir import TOKENIZER_FILE


def tokenizer_of(folder: Folder, given: Path | None, without: bool) -> tuple[Tokenizer | None, str]:
    """The tokenizer, None if the user wants none, and the token that ends a document."""
    if without:
        return None, _end_of_text(folder, None)
    file = given or folder.path / TOKENIZER_FILE
    if given is None and not file.is_file():
        raise UserError(
            f"{folder.path}: has no {TOKENIZER_FILE}, which training and generation need; give one with --tokenizer "
            "FILE (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it), or convert the weights alone "
            "with --without-tokenizer"
        )
    end = _end_of_text(folder, file)
    return load_tokenizer(file, end), end


def _end_of_text(folder: Folder, tokenizer: Path | None) -> str:
    """The model's end-of-sequence token, of which some folders name the id only."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _optional(folder.path / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    wanted = _optional(folder.path / "generation_config.json").get("eos_token_id", folder.config.get("eos_token_id"))
    number = wanted[0] if isinstance(wanted, list) and wanted else wanted
    added = _optional(tokenizer).get("added_tokens") if tokenizer and type(number) is int else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("id") == number and isinstance(token.get("content"), str):
            return str(token["content"])
    return END_OF_TEXT


def _optional(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_object(file) if file.is_file() else {}
