"""Documents, and the rule that splits them into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from moeport.errors import DataError


class Document(NamedTuple):
    """A named text."""

    name: str
    """The path, or the path or dataset followed by the row; it decides the split."""
    text: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode())


class Corpus(NamedTuple):
    """Training documents and validation documents; neither list is empty."""

    train: Sequence[Document]
    validation: Sequence[Document]


def is_validation(name: str, validation_fraction: float) -> bool:
    """Whether the document with this name is held out, decided by a hash of the name."""
    digest = hashlib.blake2b(_name_bytes(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < validation_fraction


def split_by_name(documents: Sequence[Document], validation_fraction: float) -> Corpus:
    """Splits the non-empty documents with `is_validation`."""
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        (validation if is_validation(document.name, validation_fraction) else train).append(document)
    return without_empty(train, validation, f"data.validation_fraction is {validation_fraction}")


def without_empty(train: Iterable[Document], validation: Iterable[Document], split_rule: str) -> Corpus:
    """The corpus without its empty documents.

    Args:
        train: training documents.
        validation: validation documents.
        split_rule: describes how the split was made, for the error message.

    Raises:
        DataError: one side has no text.
    """
    corpus = Corpus(
        [document for document in train if document.text], [document for document in validation if document.text]
    )
    num_texts = len(corpus.train) + len(corpus.validation)
    if not num_texts:
        raise DataError("data.source: there are no documents with text in them")
    for purpose, documents in (("validation", corpus.validation), ("training", corpus.train)):
        if not documents:
            raise DataError(
                f"data.source: no text is left for {purpose} ({count_label(num_texts)} with text, {split_rule}); "
                "add documents, change data.validation_fraction or name validation data in data.source"
            )
    return corpus


def checked_text(value: Any, text_field: str, where: str) -> str:
    """The value of a text column.

    Raises:
        DataError: the value is not a string.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: column {text_field!r} holds {type(value).__name__}, expected a string")
    return value


def documents_fingerprint(documents: Iterable[Document]) -> str:
    """Hexadecimal SHA-256 of all names and texts in order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (_name_bytes(document.name), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def count_label(number: int) -> str:
    """A count such as `1,234 documents`."""
    return f"{number:,} document{'' if number == 1 else 's'}"


def size_label(documents: Sequence[Document]) -> str:
    """A count and size such as `1,234 documents (9.7 MB)`."""
    return f"{count_label(len(documents))} ({sum(document.num_bytes for document in documents) / 1e6:.1f} MB)"


def _name_bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")
