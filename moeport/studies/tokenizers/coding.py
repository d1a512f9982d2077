"""Texts to ids and back for the command line, in batches and streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moeport.data.tokenizer import END_OF_TEXT
from moeport.data.tokenizer_file import ARGUMENT, tokenizer_file
from moeport.data.tokenizer_json import definition_text
from moeport.errors import DataError, UserError
from moeport.studies.tokenizers.pieces import BATCH
from moeport.tokenizers.definition_reading import read_definition
from moeport.tokenizers.encoder import Encoder
from moeport.tokenizers.id_files import Blocks, Write, binary_writer, write_json, write_plain

CHUNK = 2**20
"""Bytes of a stream that are read at a time."""


class Coding:
    """A tokenizer that encodes and decodes.

    Args:
        path: as data.tokenizer.path.
        encoding: in place of that of the file.
        workers: threads; None: one per core.

    Raises:
        DataError: it cannot be read, or is not byte-level BPE.
    """

    def __init__(self, path: Path, encoding: str | None = None, workers: int | None = None):
        file = tokenizer_file(path, ARGUMENT)
        try:
            self._encoder = Encoder(read_definition(definition_text(file), encoding))
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        self._workers = workers

    def ids(self, text: str, special: bool = False) -> np.ndarray:
        """The ids of a text, uint32."""
        return self._encoder.encode_batch([text], special, self._workers)[0]

    def stream(self, source: BinaryIO) -> Iterator[np.ndarray]:
        """The ids of a stream of any length, as it comes."""
        return self._encoder.encode_stream(iter(lambda: source.read(CHUNK), b""))

    def documents(self, named: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Blocks]]:
        """The ids of named texts, many at a time."""
        names: list[str] = []
        texts: list[str] = []
        size = 0
        for name, text in named:
            names.append(name)
            texts.append(text)
            size += len(text)
            if size >= BATCH:
                yield from self._encoded(names, texts)
                names, texts, size = [], [], 0
        yield from self._encoded(names, texts)

    def _encoded(self, names: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[str, Blocks]]:
        ids = self._encoder.encode_batch(texts, workers=self._workers)
        return ((name, [each]) for name, each in zip(names, ids, strict=True))

    def writer(self, output: Path | None, plain: bool) -> Write:
        """Writes documents in the format that a file's name asks for.

        Args:
            output: .jsonl or .bin; None: standard output.
            plain: whether standard output gets lines of numbers, or else objects.

        Raises:
            UserError: another name.
        """
        suffix = "" if output is None else output.suffix
        if output is not None and suffix not in (".jsonl", ".bin"):
            raise UserError(f"--output {output}: expected a name that ends in .jsonl or .bin")
        if suffix == ".bin":
            return binary_writer(self._encoder.definition.special_tokens.get(END_OF_TEXT))
        return write_plain if plain and not suffix else write_json

    def numbers(self, words: Sequence[str]) -> Blocks:
        """Ids of the command line.

        Raises:
            UserError: something is no id.
        """
        wrong = next((word for word in words if not (word.isascii() and word.isdigit())), None)
        if wrong is not None:
            raise UserError(f"{wrong!r} is not an id; expected whole numbers from 0 to {self._encoder.vocab_size - 1}")
        return [np.array([min(int(word), 2**62) for word in words], np.int64)]

    def bytes(self, ids: np.ndarray) -> bytes:
        """What ids stand for.

        Raises:
            DataError: an id is beyond the last.
        """
        if len(ids) and ids.max() >= self._encoder.vocab_size:
            raise DataError(
                f"the id {ids.max()} belongs to no token; expected ids from 0 to {self._encoder.vocab_size - 1}: these "
                "ids come from another tokenizer"
            )
        return self._encoder.decode(ids)
