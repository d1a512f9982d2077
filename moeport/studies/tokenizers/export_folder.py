"""A tokenizer as a folder for transformers."""

from __future__ import annotations

from pathlib import Path

from moeport.data.tokenizer import END_OF_TEXT
from moeport.data.tokenizer_file import ARGUMENT, tokenizer_file
from moeport.data.tokenizer_json import definition_text, parse_definition
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
    file = tokenizer_file(path, ARGUMENT)
    try:
        text = _with_encoding(definition_text(file), encoding)
        added = _added(text)
    except (DataError, ValueError) as error:
        raise DataError(f"{file}: {error}") from error
    token = end_of_text or (END_OF_TEXT if END_OF_TEXT in added else None)
    if token is not None and token not in added:
        known = choices(token, sorted(added)) if added else "it has none"
        raise UserError(f"--end-of-text {token}: {file} has no such special token; {known}")
    write_tokenizer(folder, text, token)
    code = ", trust_remote_code=True" if is_ours(parse_json(text)) else ""
    return f"{folder}: open it with transformers.AutoTokenizer.from_pretrained({str(folder)!r}{code})"


def _added(text: str) -> set[str]:
    """The added tokens of a tokenizer.json, which is refused if nobody could read it."""
    tree = parse_json(text)
    if is_ours(tree):
        return {*read_definition(text).special_tokens}
    _, tokenizer = parse_definition(text)
    return {token.content for token in tokenizer.get_added_tokens_decoder().values()}


def _with_encoding(text: str, encoding: str | None) -> str:
    if encoding is None:
        return text
    if encoding not in ENCODINGS:
        raise UserError(f"--encoding {encoding}: {choices(encoding, ENCODINGS)}")
    if encoding == "longest_first":
        return longest_first_of(text)
    return write_definition(read_definition(text, encoding))
