"""Documents, and the rule that splits them into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from moeport.data.left_out import LeftOut
from moeport.errors import DataError
from moeport.pages.words import counted


class MissingPackageError(DataError):
    """An optional package cannot be imported; no file of its kind can be read."""


class ChangedError(DataError):
    """A source holds other documents than when it was split."""


class Document(NamedTuple):
    """A named text."""

    name: str
    """The path, or the path or dataset followed by the row."""
    text: str
    below: str = ""
    """The name without data.root; empty: there is no such folder."""

    @property
    def key(self) -> str:
        """What decides the split, and does not depend on where files lie."""
        return self.below or self.name

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode())


class Tally:
    """Number, size and fingerprint of documents, as they pass."""

    def __init__(self) -> None:
        self.count = 0
        """Documents so far."""
        self.num_bytes = 0
        """Their length in UTF-8 bytes."""
        self._digest = hashlib.sha256()

    def add(self, key: str, data: bytes) -> None:
        """Count a document by its key and the UTF-8 of its text."""
        self.count += 1
        self.num_bytes += len(data)
        for part in (_key_bytes(key), data):
            self._digest.update(len(part).to_bytes(8, "big"))
            self._digest.update(part)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all keys and texts in order."""
        return self._digest.hexdigest()


class Documents:
    """Documents with text, which are read from their source whenever they are iterated over.

    Args:
        read: gives them in order.
        count: how many there are.
        num_bytes: their length in UTF-8 bytes.
        fingerprint: `Tally.fingerprint`.
    """

    def __init__(self, read: Callable[[], Iterator[Document]], count: int, num_bytes: int, fingerprint: str):
        self._read, self._count = read, count
        self.num_bytes, self.fingerprint = num_bytes, fingerprint

    def __iter__(self) -> Iterator[Document]:
        return self._read()

    def __len__(self) -> int:
        return self._count


class Corpus(NamedTuple):
    """Training documents and validation documents, without empty ones."""

    train: Documents
    validation: Documents


def place(key: str, purpose: bytes = b"") -> int:
    """A hash of a document's key, below 2^64; another one for each purpose."""
    return int.from_bytes(hashlib.blake2b(_key_bytes(key), digest_size=8, person=purpose).digest(), "big")


def is_validation(key: str, validation_fraction: float) -> bool:
    """Whether the document with this key is held out, decided by a hash of the key."""
    return place(key) / 2**64 < validation_fraction


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
    """Hexadecimal SHA-256 of all keys and texts in order."""
    tally = Tally()
    for document in documents:
        tally.add(document.key, document.text.encode())
    return tally.fingerprint


def count_label(number: int) -> str:
    """A count such as `1,234 documents`."""
    return counted(number, "document")


def size_label(documents: Documents) -> str:
    """A count and size such as `1,234 documents (9.7 MB)`."""
    return f"{count_label(len(documents))} ({documents.num_bytes / 1e6:.1f} MB)"


def _key_bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")
