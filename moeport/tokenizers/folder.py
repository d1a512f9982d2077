"""A folder that `AutoTokenizer` of transformers opens: a tokenizer.json, its settings, and the code that it needs."""

from __future__ import annotations

from pathlib import Path

from moeport.files import make_folder, write_json, write_text
from moeport.reading import parse_json, read_bytes, read_json
from moeport.tokenizers.definition_reading import is_ours

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
CODE = Path(__file__).with_name("tokenization_moeport.py")
"""Defines `MoeportTokenizer`, a class of transformers; it is copied into folders, and moeport never imports it."""


def write_tokenizer(folder: Path, definition: str, end_of_text: str | None) -> None:
    """Write a tokenizer as transformers opens it, into a folder that may hold other files.

    An ordinary tokenizer.json needs nothing else. One of ours brings a file of code along, so it is opened with
    `trust_remote_code=True`; without it, transformers raises an error.

    Args:
        folder: is made if it is not there.
        definition: contents of the tokenizer.json.
        end_of_text: the token that ends a document; None if there is none.

    Raises:
        WriteError: a file cannot be written.
    """
    make_folder(folder)
    write_text(folder / TOKENIZER_FILE, definition)
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if is_ours(parse_json(definition)):
        settings = {
            "tokenizer_class": "MoeportTokenizer",
            "auto_map": {"AutoTokenizer": [f"{CODE.stem}.MoeportTokenizer", None]},
        }
        write_text(folder / CODE.name, code())
    write_json(folder / SETTINGS_FILE, {**settings, **({"eos_token": end_of_text} if end_of_text else {})})


def add_code(folder: Path) -> None:
    """Write the code that transformers needs beside the tokenizer.json of a folder, if it is one of ours."""
    file = folder / TOKENIZER_FILE
    if file.is_file() and is_ours(read_json(file)):
        write_text(folder / CODE.name, code())


def has_our_code(folder: Path) -> bool:
    """Whether the code beside a tokenizer.json is what `write_tokenizer` writes, and not somebody else's."""
    file = folder / CODE.name
    return file.is_file() and read_bytes(file) == code().encode()


def code() -> str:
    """The code that lies beside a tokenizer.json of ours."""
    return CODE.read_text(encoding="utf-8")
