"""Documents, and the rule that splits them into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from moeport.data.left_out import LeftOut
from moeport.errors import DataError


class MissingPackageError(DataError):
    """An optional package is not installed; no file of its kind can be read."""


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
    """Training documents and validation documents, without empty ones."""

    train: Sequence[Document]
    validation: Sequence[Document]


def is_validation(name: str, validation_fraction: float) -> bool:
    """Whether the document with this name is held out, decided by a hash of the name."""
    digest = hashlib.blake2b(_name_bytes(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < validation_fraction


def split_by_name(documents: Iterable[Document], validation_fraction: float, left_out: LeftOut) -> Corpus:
    """Splits the documents with `is_validation`. Held-out texts that are also trained on are left out."""
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        (validation if is_validation(document.name, validation_fraction) else train).append(document)
    left_out.kept_side = "training"
    return Corpus(_with_text(train), _unshared(validation, train, left_out))


def split_as_given(train: Iterable[Document], validation: Sequence[Document], left_out: LeftOut) -> Corpus:
    """The split that a config names. Training texts that are also held out are left out."""
    left_out.kept_side = "validation"
    return Corpus(_unshared(train, validation, left_out), _with_text(validation))


def check_split(corpus: Corpus, rule: str, left_out: LeftOut) -> None:
    """Refuse a split that leaves one side without text.

    Args:
        corpus: the split.
        rule: describes how it was made, for the error message.
        left_out: what was left out of the source.

    Raises:
        DataError: one side has no text.
    """
    left = "".join(f"; {line}" for line in left_out.lines())
    num_texts = len(corpus.train) + len(corpus.validation) + left_out.shared
    if not num_texts:
        raise DataError(f"data.source: there are no documents with text in them{left}")
    for purpose, documents in (("validation", corpus.validation), ("training", corpus.train)):
        if not documents:
            raise DataError(
                f"data.source: no text is left for {purpose} ({count_label(num_texts)} with text, {rule}); "
                f"add documents, change data.validation_fraction or name validation data in data.source{left}"
            )


def checked_text(value: Any, text_field: str, where: str) -> str:
    """The value of a text column.

    Raises:
        DataError: the value is not a string.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: column {text_field!r} holds {type(value).__name__}, expected a string")
    return value


def no_column(columns: Sequence[str], text_field: str, where: str) -> DataError:
    """The fault of a row or file without the text column; lists the first columns that it has."""
    listed = ", ".join(column[:40] for column in columns[:20]) + (", ..." if len(columns) > 20 else "")
    return DataError(f"{where}: no column {text_field!r}; columns: {listed}; set data.source.text_field")


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


def _with_text(documents: Iterable[Document]) -> list[Document]:
    return [document for document in documents if document.text]


def _unshared(documents: Iterable[Document], others: Iterable[Document], left_out: LeftOut) -> list[Document]:
    """The documents with text whose text is not among the others; counts those that are left out."""
    taken = {hashlib.blake2b(document.text.encode(), digest_size=16).digest() for document in others}
    kept = []
    for document in _with_text(documents):
        if hashlib.blake2b(document.text.encode(), digest_size=16).digest() in taken:
            left_out.shared += 1
        else:
            kept.append(document)
    return kept


def _name_bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")
