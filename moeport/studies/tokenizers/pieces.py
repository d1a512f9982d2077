"""The text on which tokenizers are measured, in pieces that are dealt into folds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

PIECE = 2**14
"""Characters from which a document is cut, so that few long documents make several folds too."""
BATCH = 2**22
"""Characters that are encoded at a time."""


@dataclass
class Batch:
    """Pieces that are encoded together."""

    texts: list[str] = field(default_factory=list)
    folds: list[int] = field(default_factory=list)
    """The fold of each."""


class Folds:
    """Deals pieces of text into folds of nearly equal size.

    Args:
        number: of folds.
    """

    def __init__(self, number: int):
        self.bytes_F = [0] * number
        """UTF-8 bytes dealt into each so far."""

    def batches(self, documents: Iterable[str]) -> Iterator[Batch]:
        """All pieces in order, each in the fold that is the smallest so far, so that folds depend on the text alone."""
        batch, size = Batch(), 0
        for text in (piece for document in documents for piece in pieces(document)):
            num_bytes = len(text.encode())
            fold = self.bytes_F.index(min(self.bytes_F))
            self.bytes_F[fold] += num_bytes
            batch.texts.append(text)
            batch.folds.append(fold)
            size += len(text)
            if size >= BATCH:
                yield batch
                batch, size = Batch(), 0
        if batch.texts:
            yield batch


def pieces(document: str) -> Iterator[str]:
    """The document, cut behind the last line end of every `PIECE` characters where it is longer."""
    start = 0
    while len(document) - start > PIECE:
        end = document.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]
