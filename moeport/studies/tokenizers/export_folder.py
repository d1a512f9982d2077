"""A tokenizer as a folder for transformers."""

from __future__ import annotations

from pathlib import Path

from moeport.data.tokenizer import END_OF_TEXT
from moeport.data.tokenizer_file import tokenizer_file
from moeport.data.tokenizer_json import definition_text
from moeport.errors import DataError, UserError, choices
from moeport.reading import parse_json
from moeport.tokenizers.definition import ENCODINGS, write_definition
from moeport.tokenizers.definition_reading import is_ours, read_definition
from moeport.tokenizers.elsewhere import longest_first_of
from moeport.tokenizers.folder import write_tokenizer


def export_folder(path: Path, folder: Path, encoding: str | None, end_of_text: str | None) -> str:
    """Write a folder that `AutoTokenizer.from_pretrained` opens.

    Args:
        path: as data.tokenizer.path.
        folder: is made if it is not there.
        encoding: in place of that of the file.
        end_of_text: the token that ends a document; None: `<|endoftext|>`, if there is such a token.

    Returns: how to open it, for the user.

    Raises:
        DataError: the tokenizer cannot be read or encoded so, or has no such token.
        WriteError: a file cannot be written.
    """
    file = tokenizer_file(path)
    try:
        text = definition_text(file)
        added = {each["content"] for each in parse_json(text).get("added_tokens") or []}
        text = _with_encoding(text, encoding)
    except (DataError, ValueError) as error:
        raise DataError(f"{file}: {error}") from error
    token = end_of_text or (END_OF_TEXT if END_OF_TEXT in added else None)
    if token is not None and token not in added:
        raise UserError(f"--end-of-text {token}: is no special token of {file}; {choices(token, sorted(added))}")
    write_tokenizer(folder, text, token)
    code = ", trust_remote_code=True" if is_ours(parse_json(text)) else ""
    return f"{folder}: open it with transformers.AutoTokenizer.from_pretrained({str(folder)!r}{code})"


def _with_encoding(text: str, encoding: str | None) -> str:
    if encoding is None:
        return text
    if encoding not in ENCODINGS:
        raise UserError(f"--encoding {encoding}: {choices(encoding, ENCODINGS)}")
    if encoding == "longest_first":
        return longest_first_of(text)
    return write_definition(read_definition(text, encoding))
