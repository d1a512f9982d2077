"""Processes that encode texts: the ids come out of the tokenizers library as Python objects, under Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np

from moeport.data.tokenizer import Tokenizer
from moeport.errors import DataError
from moeport.pool import Pool, Program, serve

Encoded = list[np.ndarray]
"""The ids of each text of a batch, uint32."""
Sent = tuple[list[int], np.ndarray]
"""The same as a process sends it: the number of ids of each text, and all ids."""
PROGRAM = Program(
    __name__,
    "encodes text",
    "if the memory was full, start fewer (moeport data ingest CONFIG --workers N)",
    DataError,
)


def encoded_batches(
    tokenizer: Tokenizer, batches: Iterable[Sequence[str]], workers: int
) -> Generator[Encoded, None, None]:
    """The ids of each batch of texts, in order.

    Args:
        tokenizer: encodes them.
        batches: are read a few at a time.
        workers: the largest number of processes; 1: this process, in the threads of the library.

    Raises:
        DataError: a pattern of the tokenizer fails, or a process cannot start or ended.
    """
    if workers <= 1:
        yield from map(tokenizer.encode_batch, batches)
        return
    pool: Pool[Sequence[str], Sent] = Pool(PROGRAM, tokenizer, workers)
    with pool:
        for lengths, ids in pool.answers(batches):
            yield np.split(ids, np.cumsum(lengths)[:-1])


def main() -> None:
    """One of the processes."""
    serve(_encoder)


def _encoder(tokenizer: Tokenizer) -> Callable[[Sequence[str]], Sent]:
    def encoded(texts: Sequence[str]) -> Sent:
        found = tokenizer.encode_batch(texts)
        return [len(ids) for ids in found], np.concatenate(found)

    return encoded
