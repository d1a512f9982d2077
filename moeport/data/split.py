"""The split of a source into training and validation, which reads it in memory that does not depend on its size.

What is needed at once of all documents is 24 bytes of each, in temporary files, and a bit of each on the side that
loses texts that the other side has too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moeport.data.documents import Corpus, Document, Documents, Tally, count_label, is_validation, place
from moeport.data.left_out import LeftOut
from moeport.data.shared import Marks, TextHashes, text_digest

TRAIN, VALIDATION = 0, 1
Sided = Iterator[tuple[int, Document]]
"""Documents with their sides."""
Reader = Callable[[LeftOut], Iterator[Document]]
"""Reads documents in order, and adds what cannot be read."""
Stamp = list[tuple[str, int, int, int, int]]
"""Name, size, times of change of content and of anything else, and inode of files."""
Progress = Callable[[str, int, int], None]
"""Is told what is done, how many bytes of it, and of how many; 0: not known."""
DOCUMENTS_PER_REPORT = 1000


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    train: Reader
    """The training documents, or all documents."""
    validation: Reader | None
    """The validation documents, if the config names them."""
    refuse_faults: Callable[[LeftOut], None]
    """Refuses what cannot be read, once everything has been read."""
    stamp: Callable[[], Stamp | None]
    """Of the files that hold the documents; None: there are none."""

    def sides(self, fraction: float, left_out: LeftOut | None = None, only: int | None = None) -> Sided:
        """All documents with text.

        Args:
            fraction: share to hold out, where the config names no validation documents.
            left_out: what cannot be read is added to it.
            only: the side that is needed; documents of the other may be left out.
        """
        left_out = LeftOut() if left_out is None else left_out
        if self.validation is None:
            documents = self.train(left_out)
            yield from ((int(is_validation(each.key, fraction)), each) for each in documents if each.text)
            return
        for side, read in ((TRAIN, self.train), (VALIDATION, self.validation)):
            if only in (None, side):
                yield from ((side, document) for document in read(left_out) if document.text)


def split(source: Source, fraction: float, left_out: LeftOut, folder: Path | None, progress: Progress) -> Corpus:
    """Split the documents as the config names them, or else with `is_validation`.

    No text is on both sides: texts of a named validation set are not trained on, and others are not held out if they
    are trained on. Where the rule leaves one side without text, the document that is closest to it changes sides, or
    the end of the only one is held out.

    Args:
        source: the documents.
        fraction: share to hold out.
        left_out: what is left out is added to it.
        folder: for temporary files.
        progress: is told how much was read.
    """
    named = source.validation is not None
    loser = TRAIN if named else VALIDATION
    tallies, outliers = (Tally(), Tally()), _Outliers()
    with TextHashes(folder) as hashes:
        for side, document in source.sides(fraction, left_out):
            data = document.text.encode()
            digest = text_digest(data)
            tallies[side].add(document.key, data)
            hashes.add(side, digest)
            outliers.see(side, document, digest)
            _tell(progress, tallies)
        source.refuse_faults(left_out)
        shared = hashes.shared(loser)
    left_out.shared, left_out.marks = shared.count, shared
    left_out.kept_side = "validation" if named else "training"
    if not named and tallies[VALIDATION].count == shared.count and tallies[TRAIN].count:
        return _exchanged(source, fraction, left_out, outliers.lowest, VALIDATION)
    if not named and not tallies[TRAIN].count and tallies[VALIDATION].count:
        return _exchanged(source, fraction, left_out, outliers.highest, TRAIN)

    read = _reader(source, fraction, shared)
    if shared.count:
        tallies = _tallies(read(None), progress)
    return _corpus(read, tallies)


def restored(source: Source, fraction: float, shared: Marks, sizes: list[tuple[int, int, str]]) -> Corpus:
    """The corpus of a split that was made before, in which no document changed sides.

    Args:
        source: the same documents.
        fraction: the same share.
        shared: the documents that were left out, since their texts are on the other side.
        sizes: number, bytes and fingerprint of each side's documents.
    """
    return _of_sides(_reader(source, fraction, shared), sizes)


def _reader(source: Source, fraction: float, shared: Marks) -> Callable[[int | None], Sided]:
    loser = VALIDATION if source.validation is None else TRAIN
    return lambda only: _without(source.sides(fraction, only=only), loser, shared)


class _Outliers:
    """The documents that are closest to the other side, with the hashes of their texts."""

    def __init__(self) -> None:
        self.lowest = (2**64, "", b"")
        self.highest = (-1, "", b"")

    def see(self, side: int, document: Document, digest: bytes) -> None:
        found = place(document.key), document.name, digest
        if side == TRAIN:
            self.lowest = min(self.lowest, found)
        else:
            self.highest = max(self.highest, found)


def _exchanged(source: Source, fraction: float, left_out: LeftOut, found: tuple[int, str, bytes], side: int) -> Corpus:
    """The split in which one document changes to a side that had no text, or is cut in two if there is no other."""
    _, name, digest = found

    def read(only: int | None) -> Sided:
        for own, document in source.sides(fraction):
            if document.name == name:
                yield side, document
            elif own != side and text_digest(document.text.encode()) != digest:
                yield own, document

    def read_in_two(only: int | None) -> Sided:
        for _, document in source.sides(fraction):
            if document.name == name:
                yield from _in_two(document, fraction)

    left_out.is_exchanged = True
    total = sum(1 for _ in source.sides(fraction))
    tallies = _tallies(read(None))
    left_out.shared = total - tallies[TRAIN].count - tallies[VALIDATION].count
    left_out.kept_side = "the other side of the split"
    if not tallies[1 - side].count:
        tallies = _tallies(read_in_two(None))
        left_out.notes.append(
            f"held out the last {tallies[VALIDATION].num_bytes:,} bytes of {name}, since it is the only text"
        )
        return _corpus(read_in_two, tallies)
    rule = f"data.validation_fraction {fraction} would hold out"
    left_out.notes.append(
        f"held out {name}: {rule} none of the texts of {count_label(total)}"
        if side == VALIDATION
        else f"training on {name}: {rule} all {count_label(total)}"
    )
    return _corpus(read, tallies)


def _in_two(document: Document, fraction: float) -> Sided:
    """The beginning for training and the end for validation, cut after white space if there is some close by."""
    text = document.text
    cut = len(text) - max(1, round(fraction * len(text)))
    space = max(text.rfind(each, cut // 2, cut) for each in (" ", "\n"))
    cut = space + 1 or cut
    for side, part in ((TRAIN, text[:cut]), (VALIDATION, text[cut:])):
        if part:
            yield side, Document(document.name, part)


def _without(documents: Sided, loser: int, shared: Marks) -> Sided:
    """The documents without those of a side that are marked."""
    ordinal = 0
    for side, document in documents:
        if side == loser:
            ordinal += 1
            if shared.count and ordinal - 1 in shared:
                continue
        yield side, document


def _tallies(documents: Sided, progress: Progress | None = None) -> tuple[Tally, Tally]:
    tallies = (Tally(), Tally())
    for side, document in documents:
        tallies[side].add(document.key, document.text.encode())
        if progress:
            _tell(progress, tallies)
    return tallies


def _tell(progress: Progress, tallies: tuple[Tally, Tally]) -> None:
    train, validation = tallies
    if (train.count + validation.count) % DOCUMENTS_PER_REPORT == 0:
        progress("reading", train.num_bytes + validation.num_bytes, 0)


def _corpus(read: Callable[[int | None], Sided], tallies: tuple[Tally, Tally]) -> Corpus:
    return _of_sides(read, [(tally.count, tally.num_bytes, tally.fingerprint) for tally in tallies])


def _of_sides(read: Callable[[int | None], Sided], sizes: list[tuple[int, int, str]]) -> Corpus:
    def of(wanted: int) -> Documents:
        return Documents(lambda: (document for side, document in read(wanted) if side == wanted), *sizes[wanted])

    return Corpus(of(TRAIN), of(VALIDATION))
