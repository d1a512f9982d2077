"""Real text that needles are hidden in, and whose loss is measured by position.

Shape suffixes: T tokens of the text, V vocabulary ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeport.config.data import DataConfig, FilesSource
from moeport.data import Tokenizer
from moeport.data.documents import Document
from moeport.data.files import FileReader
from moeport.data.find import find_files
from moeport.data.left_out import LeftOut
from moeport.data.prepare_mixture import read_sources
from moeport.data.scans import scanned
from moeport.errors import UserError

MOST_CHARACTERS = 2**24
"""Of the text that is kept in memory; what follows is not read."""
BETWEEN = "\n\n"
"""Stands between two documents of a haystack."""
_WORD = re.compile(r"\b[^\W\d_]{4,8}\b")


@dataclass(frozen=True)
class Text:
    """Documents, and what was left out of them."""

    documents: Sequence[str]
    origin: str
    """Where they come from, as messages and tables say it."""
    left_out: Sequence[str] = ()
    """What was not read, a sentence each."""

    @cached_property
    def words(self) -> list[str]:
        """Its words of 4 to 8 letters, none of them a capital, sorted, each once: the keys of needles."""
        found = {word for document in self.documents for word in _WORD.findall(document)}
        return sorted(word for word in found if word == word.lower())


def files_text(paths: Sequence[str]) -> Text:
    """The text of files, read as by the source `files`. Raises UserError or DataError."""
    left_out, reader = LeftOut(), FileReader(FilesSource(paths=tuple(paths)))
    found = find_files(paths, (), reader.is_readable, reader.kinds, "--text", left_out)
    documents = _first(reader.read(found, left_out))
    reader.refuse_faults(left_out)
    if not documents:
        raise UserError(f"--text: there is no text in {', '.join(paths)}")
    return Text(documents, ", ".join(paths), left_out.lines())


def held_out_text(config: DataConfig, report: Callable[[str], None]) -> Text:
    """The validation documents of a run's data, of several sources in their order. Raises DataError."""
    left_out = LeftOut()
    if config.streams:
        corpora = list(read_sources(config, report, lambda *_: None)[0].values())
    else:
        corpora = [scanned(config, left_out, lambda *_: None)]
    documents = _first(document for corpus in corpora for document in corpus.validation)
    if not documents:
        raise UserError("the run has no validation text; expected --text FILES")
    return Text(documents, "the validation text", left_out.lines())


def _first(documents: Iterable[Document]) -> list[str]:
    """The texts of the first documents that are not empty, of at most `MOST_CHARACTERS`."""
    found, room = list[str](), MOST_CHARACTERS
    for document in documents:
        if text := document.text[:room]:
            found.append(text)
            room -= len(text)
        if not room:
            break
    return found


@dataclass(frozen=True)
class Haystack:
    """All of a text as tokens of one tokenizer."""

    tokenizer: Tokenizer
    words: Sequence[str]
    """`Text.words`."""
    id_T: np.ndarray
    """Ids of the documents, one after the other."""
    break_T: np.ndarray
    """Places after tokens with an end of a line in them, ascending."""

    @classmethod
    def of(cls, text: Text, tokenizer: Tokenizer) -> Haystack:
        """The text in tokens of `tokenizer`."""
        id_T = np.concatenate(list(_parts(text, tokenizer))).astype(np.int64)
        kinds, kind_T = np.unique(id_T, return_inverse=True)
        ends = np.array(["\n" in tokenizer.decode([kind]) for kind in kinds])
        return cls(tokenizer, text.words, id_T, np.flatnonzero(ends[kind_T]) + 1)

    def near(self, place: int, within: int) -> int:
        """The nearest place after the end of a line, if one is at most `within` tokens away; else `place`."""
        index = int(np.searchsorted(self.break_T, place))
        near = self.break_T[max(0, index - 1) : index + 1]
        near = near[abs(near - place) <= within]
        return int(min(near, key=lambda each: abs(each - place))) if len(near) else place

    def encode(self, part: str) -> np.ndarray:
        """The ids of a text by itself."""
        return self.tokenizer.encode_batch([part])[0].astype(np.int64)


def _parts(text: Text, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    between = tokenizer.encode_batch([BETWEEN])[0]
    for number, document in enumerate(text.documents):
        if number:
            yield between
        yield tokenizer.encode_batch([document])[0]
